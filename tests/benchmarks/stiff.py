"""Stiff problems: error, steps and evaluations of implicit methods beside scipy's Radau and BDF.

python -m tests.benchmarks.stiff [--tolerance 1e-6]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from scipy.integrate import solve_ivp

import resode


def robertson(t, y):
    """Three reactions with rates from 0.04 to 3e7."""
    a, b, c = y.unbind(-1)
    slow, fast, back = 0.04 * a, 3e7 * b * b, 1e4 * b * c
    return torch.stack([back - slow, slow - fast - back, fast], -1)


def van_der_pol(t, y):
    """Relaxation oscillations, μ = 1000."""
    x, v = y.unbind(-1)
    return torch.stack([v, 1000 * (1 - x * x) * v - x], -1)


PROBLEMS = {
    "Robertson to 1e11": (robertson, [1.0, 0.0, 0.0], 1e11, 1e-4),
    "van der Pol to 2000": (van_der_pol, [2.0, 0.0], 2000.0, 1.0),
}
"""Name: field, start, end, and atol over rtol."""


def rows(name: str, rtol: float, methods=("kvaerno5", "radau5"), others=("Radau", "BDF")) -> list[tuple]:
    """(method, relative error, steps, evaluations, seconds) of every solver, against Radau at 1e-11."""
    field, start, end, ratio = PROBLEMS[name]
    atol = ratio * rtol

    def plain(t, y):
        return field(t, torch.from_numpy(y)).numpy()

    exact = solve_ivp(plain, (0, end), start, "Radau", rtol=1e-11, atol=1e-11 * ratio).y[:, -1]
    made = []
    for method in methods:
        begin = time.perf_counter()
        with torch.no_grad():
            y, stats = resode.odeint(field, torch.tensor(start).double(), torch.tensor([0.0, end]).double(),
                                     method=method, rtol=rtol, atol=atol, return_stats=True)  # fmt: skip
        made.append((method, y[-1].numpy(), stats.n_steps, stats.nfe, time.perf_counter() - begin))
    for method in others:
        begin = time.perf_counter()
        s = solve_ivp(plain, (0, end), start, method, rtol=rtol, atol=atol)
        made.append((f"scipy {method}", s.y[:, -1], len(s.t) - 1, s.nfev, time.perf_counter() - begin))
    return [(m, float(np.abs((y - exact) / exact).max()), *rest) for m, y, *rest in made]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tolerance", type=float, default=1e-6)
    tolerance = parser.parse_args().tolerance
    print(
        "| problem | method | relative error | steps | evaluations | s |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name in PROBLEMS:
        for method, error, steps, nfe, seconds in rows(name, tolerance):
            print(f"| {name} | {method} | {error:.1e} | {steps:,} | {nfe:,} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
