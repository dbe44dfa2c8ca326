"""The soak: 20,000 solves, 500 swaps, 300 step limits and 50 runs in one process; memory, descriptors and threads.

python -m tests.trust.soak [SHARE]       of those numbers, 1 by default
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import resode
from resode.blocks.solving import set_solver


def memory() -> float:
    """Resident MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measured() -> dict[str, float]:
    gc.collect()
    return {
        "memory, MiB": round(memory(), 1),
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


def soak(name: str, share: float = 1.0) -> tuple[dict[str, float], dict[str, float]]:
    """What the process holds at the start and at the end."""
    part, times, before = PARTS[name]
    for number in range(before):
        part(number)
    start = measured()
    for number in range(max(1, int(times * share))):
        part(number)
    return start, measured()


def flat(start: dict[str, float], end: dict[str, float]) -> bool:
    """Descriptors and threads as before; memory within the allocator's own grain."""
    return (
        end["memory, MiB"] < 1.05 * start["memory, MiB"] + 8
        and end["descriptors"] <= start["descriptors"]
        and end["threads"] <= start["threads"]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    held = True
    for name in PARTS:
        start, end = soak(name, float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
        held &= flat(start, end)
        print(f"{name}: " + ", ".join(f"{key} {start[key]:g} → {end[key]:g}" for key in start), flush=True)
    sys.exit(0 if held else 1)
