"""The clinic: healthy networks left alone, broken ones named, by cause, fitted on one half and told of the "
"other.

python -m tests.benchmarks.clinic [--fit] [--treat] [--verbose]
"""

from __future__ import annotations

import argparse
import time
import zlib

from resode import diagnose
from resode.analysis.diagnose.findings import CAUSES
from tests.clinic.faults import Broken, broken, named_right, output_change
from tests.clinic.networks import HEALTHY, data, healthy
from tests.clinic.treatments import repaired

ENOUGH = 0.01
"""A fault counts where it moves the outputs by more than this."""


def held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % 2 == 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--verbose", action="store_true", help="Every patient, not those that went wrong alone."
    )
    parser.add_argument("--treat", type=int, metavar="N", help="Follow the first advice, N patients a fault.")
    arguments = parser.parse_args()
    started = time.monotonic()
    if arguments.treat:
        treat(arguments.treat, arguments.verbose)
    else:
        examine(arguments.verbose)
    print(f"{time.monotonic() - started:.0f} s")


def examine(verbose: bool) -> None:
    """Alarms of healthy networks; place and cause that are named first of broken ones."""
    alarmed = {False: [0, 0], True: [0, 0]}
    for name, spec in HEALTHY.items():
        x, y = data(spec.task).look()
        found = diagnose(healthy(name), x, y, lr=0.01)
        counts = alarmed[held_out(name)]
        counts[0] += not found.ok
        counts[1] += 1
        if not found.ok:
            print(f"alarmed: {name}: {found.findings[0]}")
    table: dict[tuple[str, bool], list[int]] = {}
    for b in broken():
        if output_change(b) < ENOUGH:
            continue
        counts = table.setdefault((b.cause, held_out(b.origin or b.name)), [0, 0, 0])
        place, cause = first_named(b)
        right = named_right(b, place), cause in b.causes
        for i, value in enumerate((True, *right)):
            counts[i] += value
        if verbose or not all(right):
            word = "ok   " if all(right) else "wrong"
            print(f"{word} {b.name}: {b.culprit} {b.cause} | {place} {cause}", flush=True)
    print(f"\n{'':<20}{'fitted':>24}{'held out':>24}")
    print(f"{'cause':<20}" + 2 * f"{'n':>6}{'block':>9}{'cause':>9}")
    totals = {False: [0, 0, 0], True: [0, 0, 0]}
    for cause in CAUSES:
        halves = [table.get((cause, half), [0, 0, 0]) for half in (False, True)]
        print(f"{cause:<20}" + "".join(map(_shares, halves)))
        for half, counts in zip((False, True), halves, strict=True):
            totals[half] = [a + b for a, b in zip(totals[half], counts, strict=True)]
    print(f"{'all':<20}" + "".join(map(_shares, totals.values())))
    for half in (False, True):
        print(
            f"healthy alarmed, {'held out' if half else 'fitted'}: {alarmed[half][0]} of {alarmed[half][1]}"
        )


def first_named(b: Broken) -> tuple[str, str]:
    """Block and cause that are named first."""
    x, y = data(b.task).look()
    found = diagnose(b.model, x, y, lr=b.lr).findings
    return (found[0].block, found[0].cause) if found else ("", "nothing")


def treat(each: int, verbose: bool) -> None:
    """The share of broken networks that the first advice repairs, by cause."""
    seen: dict[str, int] = {}
    table: dict[str, list[int]] = {}
    for b in broken():
        fault = b.name.split(":")[0]
        if seen.get(fault, 0) >= each or output_change(b) < ENOUGH:
            continue
        seen[fault] = seen.get(fault, 0) + 1
        x, y = data(b.task).look()
        found = diagnose(b.model, x, y, lr=b.lr).findings
        ok, now, wanted = repaired(b, found[0]) if found else (False, 0.0, 0.0)
        counts = table.setdefault(b.cause, [0, 0])
        counts[0] += 1
        counts[1] += ok
        if verbose or not ok:
            print(f"{'ok   ' if ok else 'wrong'} {b.name}: {now:.3f} of {wanted:.3f}", flush=True)
    print(f"\n{'cause':<20}{'treated':>9}{'repaired':>10}")
    for cause, (n, ok) in table.items():
        print(f"{cause:<20}{n:>9}{_percent(ok, n):>10}")
    n, ok = (sum(counts[i] for counts in table.values()) for i in (0, 1))
    print(f"{'all':<20}{n:>9}{_percent(ok, n):>10}")


def _shares(counts: list[int]) -> str:
    n, block, cause = counts
    return f"{n:>6}{_percent(block, n):>9}{_percent(cause, n):>9}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


if __name__ == "__main__":
    main()
