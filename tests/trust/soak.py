"""The soak: 20,000 solves, 500 swaps, 300 step limits and 50 runs in one process; memory, descriptors and threads.

python -m tests.trust.soak [SHARE]       of those numbers, 1 by default

Memory is read once the allocator has given freed pages back: what it keeps of them grows for long where runs of
different sizes follow each other, and says nothing of what is held.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import median

import torch
from torch import nn

import resode
from resode.blocks.solving import set_solver


def memory() -> float:
    """Resident MiB of this process, without what the allocator keeps of freed memory."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measured() -> dict[str, float]:
    gc.collect()
    return {
        "memory, MiB": round(memory(), 1),
        "objects": len(gc.get_objects()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count() + len(os.listdir("/proc/self/task")),
    }


def solve(number: int) -> None:
    method = ("dopri5", "rk4", "tsit5", "kvaerno3")[number % 4]
    y0 = torch.full((3, 2), 1.0 + number % 7, dtype=torch.float64, requires_grad=number % 2 == 0)
    steps = {"n_steps": 5} if method == "rk4" else {}
    y = resode.odeint(lambda t, y: -y, y0, torch.tensor([0.0, 0.1]).double(), method=method, **steps)
    if number % 2 == 0:
        y[-1].sum().backward()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(resode.ResidualStack(nn.Linear(4, 4), depth=3, step_size=0.1), nn.Linear(4, 2))


NETWORK, X = network(), torch.ones(2, 4)


def swap(number: int) -> None:
    set_solver(NETWORK, ("euler", "midpoint", "rk4")[number % 3], 1 + number % 2)
    NETWORK(X).sum().backward()
    NETWORK.zero_grad()


def limit(number: int) -> None:
    resode.step_limit(torch.tanh, torch.full((2, 3), 0.1 * (number % 9)).double(), solver="rk4")


def run(number: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        options = {"model_options": {"width": 2}, "progress": False, "updates": 1, "seed": number}
        resode.train("odenet8", "digits", "smoke", run_dir=f"{folder}/run", **options)


PARTS: dict[str, tuple[Callable[[int], None], int, int]] = {
    "solves": (solve, 20_000, 200),
    "swaps": (swap, 500, 20),
    "limits": (limit, 300, 20),
    "runs": (run, 50, 3),
}
"""Name -> what is done, how often, and how often before the first measurement: caches fill."""


POINTS = 6
GRAIN = 4.0  # MiB by which pages that are partly used differ


def soak(name: str, share: float = 1.0) -> list[dict[str, float]]:
    """What the process holds at the start and after each of six equal parts of the work."""
    part, times, before = PARTS[name]
    for number in range(before):
        part(number)
    found, times = [measured()], max(POINTS, int(times * share))
    for point in range(POINTS):
        for number in range(times * point // POINTS, times * (point + 1) // POINTS):
            part(number)
        found.append(measured())
    return found


def growth(found: list[dict[str, float]], key: str) -> float:
    """How much more the second half of the work held at its end than at its start: caches fill in the first.

    The median of the slopes between all pairs of points (Theil and Sen), so that one point tells nothing.
    """
    values = [point[key] for point in found[len(found) // 2 :]]
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(values), 2)]
    return median(slopes) * (len(values) - 1)


def flat(found: list[dict[str, float]]) -> bool:
    """Nothing grows with the work: no object a call, no descriptor, no thread, memory within a grain."""
    start, end = found[len(found) // 2], found[-1]
    return (
        growth(found, "memory, MiB") < GRAIN
        and growth(found, "objects") < 100
        and end["descriptors"] <= start["descriptors"]
        and end["threads"] <= start["threads"]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    held = True
    for name in PARTS:
        found = soak(name, float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
        held &= flat(found)
        grown = ", ".join(f"{key} {growth(found, key):+.1f}" for key in ("memory, MiB", "objects"))
        shown = ", ".join(f"{key} {found[0][key]:g} → {found[-1][key]:g}" for key in found[0])
        print(f"{name}: {shown}; in the second half {grown}", flush=True)
    sys.exit(0 if held else 1)
