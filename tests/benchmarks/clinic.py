"""The clinic: healthy networks left alone, broken ones named, by cause, fitted on one half and told of the "
"other.

python -m tests.benchmarks.clinic [--fit] [--treat] [--verbose]
"""

from __future__ import annotations

import argparse
import math
import time
import zlib
from collections.abc import Callable

from torch import nn

from resode import diagnose
from resode.analysis.diagnose.findings import CAUSES, usual_branch_gain
from resode.analysis.diagnose.measures import Measures, measure
from tests.clinic.faults import Broken, broken, named_right, output_change
from tests.clinic.networks import HEALTHY, data, healthy
from tests.clinic.swaps import swaps
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
    parser.add_argument("--fit", action="store_true", help="The thresholds that the fitted half asks for.")
    parser.add_argument("--treat", type=int, metavar="N", help="Follow the first advice, N patients a fault.")
    arguments = parser.parse_args()
    started = time.monotonic()
    if arguments.fit:
        fit()
    elif arguments.treat:
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


def fit() -> None:
    """What healthy and broken networks of the fitted half measure, and thresholds between them.

    A threshold is the geometric mean of the healthy networks' extreme and the broken ones' twentieth part.
    """
    healthy_values: dict[str, list[float]] = {name: [] for name in MEASURES}
    broken_values: dict[str, list[float]] = {name: [] for name in MEASURES}
    for name, spec in HEALTHY.items():
        if not held_out(name):
            m = _measured(healthy(name), spec.task)
            for measure_of, (*_, value) in MEASURES.items():
                healthy_values[measure_of].append(value(m))
    for b in broken():
        wanted = [n for n, (cause, word, _) in MEASURES.items() if cause == b.cause and word in b.name]
        if wanted and not held_out(b.origin or b.name) and not output_change(b) < ENOUGH:
            m = _measured(b.model, b.task)
            for name in wanted:
                broken_values[name].append(MEASURES[name][-1](m))
    print(f"{'measure':<16}{'healthy, most':>15}{'broken, 5 %':>15}{'between':>12}")
    for name in MEASURES:
        most = max((v for v in healthy_values[name] if v == v), default=math.nan)
        values = sorted(v for v in broken_values[name] if v == v)
        least = values[len(values) // 20] if values else math.nan
        print(f"{name:<16}{most:>15.4g}{least:>15.4g}{math.sqrt(most * least):>12.3g}")
    fit_swaps()


def fit_swaps() -> None:
    """Drift up to which accuracy is kept within 2 points, and from which it loses 10; verdicts held out."""
    found = list(swaps())
    fitted = [s for s in found if not held_out(s.origin)]
    for lost in (0.02, 0.10):
        cuts = sorted(s.foretold.drift for s in fitted)
        right = {d: sum((s.foretold.drift > d) == (s.lost > lost) for s in fitted) for d in cuts}
        best = max(right.values())
        between = [d for d in cuts if right[d] == best]
        print(
            f"drift that parts losses of {lost:.0%}: {between[0]:.3f} to {between[-1]:.3f} ({best} of {len(fitted)})"
        )
    for verdict in ("keeps", "may lose", "loses"):
        told = [s.lost for s in found if held_out(s.origin) and s.foretold.verdict == verdict]
        if told:
            print(f"held out, {verdict}: {len(told)} swaps lost {min(told):.1%} to {max(told):.1%}")


def _measured(model: nn.Module, task: str) -> Measures:
    x, y = data(task).look()
    return measure(model, x, y, None, None, 0)


def _relative(m: Measures) -> list[float]:
    """Branch gains over the median of their siblings', the first block's halved."""
    found = []
    for b in m.blocks:
        usual = usual_branch_gain(m, b)
        if usual > 0:
            found.append(b.branch_gain / usual / (2 if b.name == m.blocks[0].name else 1))
    return found


MEASURES: dict[str, tuple[str, str, Callable[[Measures], float]]] = {
    "strong": ("strong-block", "branch", lambda m: max(_relative(m), default=math.nan)),
    "1/idle": ("idle", "branch ×", lambda m: 1 / max(min(_relative(m), default=math.nan), 1e-30)),
    "variance": (
        "norm-statistics",
        "variance ×",
        lambda m: max((n.variance_ratio for n in m.norms), default=math.nan),
    ),
    "whole": ("explosion", "", lambda m: m.whole_sigma),
    "1/whole": ("vanishing", "", lambda m: 1 / m.whole_sigma if m.whole_sigma > 0 else math.nan),
    "1/collapse": ("collapse", "constant stem,", lambda m: m.spread[0] / max(m.spread[1], 1e-12)),
}
"""By threshold: the cause that it tells, a word in the names of the faults that it tells, what is compared."""


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
