"""Timing of several ways to do one thing, in turns, on a machine that does nothing else."""

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

QUIET = 0.15
"""The share of all processors' time that others may use before nothing is measured."""


@dataclass
class Row:
    """One way's time. Ratios are to the way named `over`, of the same rounds."""

    case: str
    way: str
    milliseconds: float
    low: float  # quartiles
    high: float
    over: str | None = None
    ratio: float | None = None
    bar: float | None = None
    error: float | None = None


def busy(seconds: float = 2.0) -> float:
    """The share of all processors' time that is used while this process sleeps."""

    def read() -> tuple[int, int]:
        fields = [int(s) for s in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(fields), fields[3] + fields[4]

    total, idle = read()
    time.sleep(seconds)
    total2, idle2 = read()
    return 1 - (idle2 - idle) / max(total2 - total, 1)


def refuse_a_loaded_machine(force: bool) -> None:
    """Ends the program where others use the processors."""
    if not Path("/proc/stat").exists():
        return
    if (share := busy()) > QUIET and not force:
        raise SystemExit(
            f"the processors are {share:.0%} busy with other work, so timings would mean nothing; stop it, or "
            "give --force to measure anyway."
        )


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round, after one round that does not count; the order is shuffled."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for i in range(rounds + 1):
        names = list(ways)
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            ways[name]()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def rows(
    case: str,
    seconds: Mapping[str, list[float]],
    over: Mapping[str, str | list[str]],
    bars: Mapping[str, float] | None = None,
    errors: Mapping[str, float] | None = None,
) -> list[Row]:
    """The table's rows; `over` names what each way is compared with (of several, the fastest)."""
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    result = []
    for name, s in seconds.items():
        quartiles = statistics.quantiles(s, n=4)
        rivals = over.get(name, [])
        rival = min([rivals] if isinstance(rivals, str) else rivals, key=lambda r: medians[r], default=None)
        result.append(
            Row(
                case,
                name,
                medians[name] * 1e3,
                quartiles[0] * 1e3,
                quartiles[2] * 1e3,
                rival,
                None if rival is None else medians[name] / medians[rival],
                (bars or {}).get(name),
                (errors or {}).get(name),
            )
        )
    return result


def machine() -> str:
    """Hardware and versions, as a table's caption."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model\t")), "")
    return (
        f"{name}{f' (model {model})' if model else ''}, {os.cpu_count()} processors, {torch.get_num_threads()} "
        f"thread(s) used, Python {platform.python_version()}, torch {torch.__version__}"
    )


def table(found: list[Row]) -> str:
    """A table in Markdown."""
    text = "| case | way | ms (quartiles) | ratio | bar | rms error |\n|---|---|---|---|---|---|\n"
    for row in found:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f} of {row.over}"
        bar = ""
        if row.bar is not None:
            verdict = "not measured" if row.ratio is None else "met" if row.ratio <= row.bar else "missed"
            bar = f"{verdict}: {row.bar:g}"
        error = "" if row.error is None else f"{row.error:.2g}"
        spread = f"{row.milliseconds:.4g}" + (
            f" ({row.low:.4g} to {row.high:.4g})" if row.low == row.low else ""
        )
        text += f"| {row.case} | {row.way} | {spread} | {ratio} | {bar} | {error} |\n"
    return text


def to_json(found: list[Row], path: Path) -> None:
    """All rows and the machine, as JSON."""
    path.write_text(json.dumps({"machine": machine(), "rows": [asdict(r) for r in found]}, indent=1) + "\n")
