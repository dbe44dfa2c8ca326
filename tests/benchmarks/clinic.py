"""The clinic: healthy networks left alone, broken ones named, by cause, fitted on one half and told of the "
"other.

python -m tests.benchmarks.clinic [--fit] [--treat] [--verbose]
"""

from __future__ import annotations

import argparse
import time
import zlib

from resode.analysis.diagnose.diagnose import diagnose
from tests.clinic.faults import Broken, broken, named_right, output_change
from tests.clinic.networks import HEALTHY, data, healthy

ENOUGH = 0.01
"""A fault counts where it moves the outputs by more than this."""


def held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % 2 == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    started = time.monotonic()
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
        counts = table.setdefault((b.cause, held_out(b.origin + b.name)), [0, 0, 0])
        place, cause = examined(b)
        right = named_right(b, place), cause in b.causes
        counts[0] += 1
        counts[1] += right[0]
        counts[2] += right[1]
        if arguments.verbose or not all(right):
            print(
                f"{'ok   ' if all(right) else 'wrong'} {b.name}: {b.culprit} {b.cause} | {place} {cause}",
                flush=True,
            )
    print(f"\n{'':<20}{'fitted':>24}{'held out':>24}")
    print(f"{'cause':<20}" + 2 * f"{'n':>6}{'block':>9}{'cause':>9}")
    totals = {False: [0, 0, 0], True: [0, 0, 0]}
    for cause in dict.fromkeys(c for c, _ in table):
        line = f"{cause:<20}"
        for half in (False, True):
            n, block, right = table.get((cause, half), [0, 0, 0])
            totals[half] = [a + b for a, b in zip(totals[half], (n, block, right), strict=True)]
            line += f"{n:>6}{_percent(block, n):>9}{_percent(right, n):>9}"
        print(line)
    line = f"{'all':<20}"
    for half in (False, True):
        n, block, right = totals[half]
        line += f"{n:>6}{_percent(block, n):>9}{_percent(right, n):>9}"
    print(line)
    for half in (False, True):
        print(
            f"healthy alarmed, {'held out' if half else 'fitted'}: {alarmed[half][0]} of {alarmed[half][1]}"
        )
    print(f"{time.monotonic() - started:.0f} s")


def examined(b: Broken) -> tuple[str, str]:
    """Block and cause that are named first."""
    x, y = data(b.task).look()
    found = diagnose(b.model, x, y, lr=b.lr).findings
    return (found[0].block, found[0].cause) if found else ("", "nothing")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


if __name__ == "__main__":
    main()
