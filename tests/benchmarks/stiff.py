"""Stiff problems: error, steps and evaluations of implicit methods beside scipy's Radau and BDF and diffrax's Kvaerno5.

python -m tests.benchmarks.stiff [long|detest|brusselator|robertsons] [--tolerance 1e-6] [--only D,E4] [--methods kvaerno5] [--diffrax PYTHON]

Errors are those at the end and at nine times between, over atol + rtol |y*|, at worst over times and entries; y* by
scipy's Radau at a ten-thousandth of the tolerance. Steps are attempted ones (scipy's: accepted), evaluations count one
for a Jacobian (scipy's: none; diffrax does not count them).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.integrate import solve_ivp

import resode
from tests.benchmarks.stiff_problems import (
    DETEST,
    ROBERTSON,
    VAN_DER_POL,
    StiffProblem,
    brusselator,
    brusselator_start,
    robertson_of,
    robertson_rates,
)

PROBLEMS = {p.name: p for p in (ROBERTSON, VAN_DER_POL)}
HEAD = "| problem | method | tolerance | error / tolerance | steps | evaluations | s |"
PEER = Path(__file__).with_name("stiff_peer.py")


def rows(
    problem: StiffProblem, rtol: float, methods=("kvaerno5", "radau5"), others=("Radau", "BDF"), peer=None
):
    """(method, error over tolerance, steps, evaluations, seconds) of every solver."""
    atol, span, start = problem.ratio * rtol, (0.0, problem.end), np.array(problem.start)
    t = np.linspace(0, problem.end, 11)
    fine = max(1e-4 * rtol, 1e-11)
    exact = solve_ivp(problem.array_field, span, start, "Radau", t, rtol=fine, atol=fine * problem.ratio).y.T

    def error(y: np.ndarray) -> float:
        return float((np.abs(y - exact) / (atol + rtol * np.abs(exact)))[1:].max())

    made = []
    for method in methods:
        begin = time.perf_counter()
        with torch.no_grad():
            y, stats = resode.odeint(problem.field, torch.from_numpy(start), torch.from_numpy(t), method=method, rtol=rtol,
                                     atol=atol, return_stats=True)  # fmt: skip
        made.append((method, error(y.numpy()), stats.n_steps, stats.nfe, time.perf_counter() - begin))
    for method in others:
        begin = time.perf_counter()
        s = solve_ivp(problem.array_field, span, start, method, t, rtol=rtol, atol=atol)
        steps = len(solve_ivp(problem.array_field, span, start, method, rtol=rtol, atol=atol).t) - 1
        made.append((f"scipy {method}", error(s.y.T), steps, s.nfev, (time.perf_counter() - begin) / 2))
    if peer:
        found = json.loads(_peer(peer, problem.name, rtol, atol))
        made.append(("diffrax Kvaerno5", error(np.array(found["y"])), found["steps"], "–", found["seconds"]))
    return made


def _peer(python: str, *arguments) -> str:
    """What the peer's script prints in an environment of its own."""
    command = [python, str(PEER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def brusselator_rows(rtol: float, n: int = 64, end: float = 1.0) -> Iterator[tuple]:
    """As `rows`, for 2 n² states: Newton's systems by GMRES here, sparse factors in scipy."""
    start, t = brusselator_start(n), torch.tensor([0.0, end], dtype=torch.float64)

    def plain(t, y):
        return brusselator(t, torch.from_numpy(y), n).numpy()

    settings = dict(jac_sparsity=_sparsity(n), t_eval=[end])
    exact = solve_ivp(plain, (0, end), start.numpy(), "BDF", rtol=1e-10, atol=1e-10, **settings).y[:, -1]

    def error(y):
        return float((np.abs(y - exact) / (rtol + rtol * np.abs(exact))).max())

    for method in ("kvaerno5", "kvaerno3", "trbdf2", "radau5"):
        begin = time.perf_counter()
        with torch.no_grad():
            y, stats = resode.odeint(lambda t, y: brusselator(t, y, n), start, t, method=method, rtol=rtol, atol=rtol,
                                     return_stats=True)  # fmt: skip
        seconds = time.perf_counter() - begin
        yield (
            f"{method} ({stats.n_linear:,} products)",
            error(y[-1].numpy()),
            stats.n_steps,
            stats.nfe,
            seconds,
        )
    for method in ("Radau", "BDF"):
        begin = time.perf_counter()
        s = solve_ivp(
            plain,
            (0, end),
            start.numpy(),
            method,
            rtol=rtol,
            atol=rtol,
            jac_sparsity=settings["jac_sparsity"],
        )
        yield f"scipy {method}", error(s.y[:, -1]), len(s.t) - 1, s.nfev, time.perf_counter() - begin


def robertsons(rtol: float, peer: str | None = None) -> Iterator[tuple]:
    """256 Robertson systems with rates of their own to t = 40, in one call; scipy's Radau one by one.

    The error is the median over 16 systems of the largest over their entries, over the tolerance. Times are the least
    of eight calls after the first (eager ones of three; diffrax's of eight with each of its settings; scipy is called once),
    in [] the processor's of the same call.
    """
    rates, atol, end = robertson_rates(), 1e-4 * rtol, 40.0
    k, start = torch.from_numpy(rates).T, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)

    def field(t, y):
        return torch.stack(robertson_of(k, *y.unbind(-1)), -1)

    def one_by_one(rtol, atol, rates=rates):
        return [
            solve_ivp(lambda t, y, r=r: np.array(robertson_of(r, *y)), (0, end), start.numpy(), "Radau", rtol=rtol, atol=atol)
            for r in rates
        ]  # fmt: skip

    exact = np.array([s.y[:, -1] for s in one_by_one(1e-10, 1e-14, rates[:16])])

    def error(y):
        return float(np.median((np.abs(y[:16] - exact) / (atol + rtol * np.abs(exact))).max(1)))

    y0, t = start.expand(len(rates), 3).clone(), torch.tensor([0.0, end], dtype=torch.float64)
    begin, spent = time.perf_counter(), sum(os.times()[:4])
    found = one_by_one(rtol, atol)
    seconds, spent = time.perf_counter() - begin, sum(os.times()[:4]) - spent
    steps = int(np.mean([len(s.t) - 1 for s in found]))
    yield (
        f"scipy Radau [{spent:.2f}]",
        error(np.array([s.y[:, -1] for s in found])),
        steps,
        sum(s.nfev for s in found),
        seconds,
    )
    for method, compile in itertools.product(("radau5", "kvaerno5"), (False, True)):
        times = []
        for _ in range(9 if compile else 4):
            begin, spent = time.perf_counter(), sum(os.times()[:4])
            with torch.no_grad():
                y, stats = resode.odeint(field, y0, t, method=method, rtol=rtol, atol=atol, per_sample=True,
                                         compile=compile, return_stats=True)  # fmt: skip
            times.append((time.perf_counter() - begin, sum(os.times()[:4]) - spent))
        steps = int(stats.n_steps.double().mean())
        best, spent = min(times[1:])
        what = f"{method}, compiled (first call {times[0][1]:.0f} s of processor)" if compile else method
        yield what + f" [{spent:.2f}]", error(y[-1].numpy()), steps, int(stats.nfe.sum()), best
    if peer:
        got = json.loads(_peer(peer, "robertsons", rtol, atol))
        name = f"diffrax Kvaerno5 [{got['processor']:.2f}]"
        yield name, error(np.array(got["y"])), int(got["steps"]), "–", got["seconds"]


def _sparsity(n: int):
    """Which states of the Brusselator's each depends on."""
    from scipy.sparse import bmat, eye, kron

    ring = eye(n, format="lil")
    for i in range(n):
        ring[i, (i + 1) % n] = ring[i, i - 1] = 1
    around = kron(ring, eye(n)) + kron(eye(n), ring)
    return bmat([[around, eye(n * n)], [eye(n * n), around]], format="csc")


def main() -> None:
    """Prints a table, each line when it is there; of the DETEST problems the medians too."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "what", nargs="?", choices=("long", "detest", "brusselator", "robertsons"), default="long"
    )
    parser.add_argument("--tolerance", type=float, default=1e-6)
    parser.add_argument("--diffrax", metavar="PYTHON", help="an interpreter that has diffrax")
    parser.add_argument("--methods", default="kvaerno5,radau5", help="ours, of long and detest")
    parser.add_argument("--others", default="Radau,BDF", help="scipy's, likewise; '' for none")
    parser.add_argument("--only", default="", help="of DETEST: classes or problems, as A,E4")
    given = parser.parse_args()
    print(HEAD + "\n|" + " --- |" * 7, flush=True)
    if given.what == "brusselator":
        found = ((f"Brusselator {64}²", row) for row in brusselator_rows(given.tolerance))
    elif given.what == "robertsons":
        found = (("256 Robertsons", row) for row in robertsons(given.tolerance, given.diffrax))
    else:
        chosen = [p for p in DETEST if p.name.startswith(tuple(given.only.split(",")))]
        problems = chosen if given.what == "detest" else PROBLEMS.values()
        named = given.methods.split(","), [name for name in given.others.split(",") if name]
        found = (
            (p.name, row) for p in problems for row in rows(p, given.tolerance, *named, peer=given.diffrax)
        )
    made: dict[str, list[tuple]] = {}
    for name, (method, error, steps, nfe, seconds) in found:
        made.setdefault(method, []).append((error, steps, nfe))
        counts = " | ".join(n if isinstance(n, str) else f"{n:,}" for n in (steps, nfe))
        print(
            f"| {name} | {method} | {given.tolerance:g} | {error:.2g} | {counts} | {seconds:.2f} |",
            flush=True,
        )
    for method, counts in made.items() if given.what == "detest" else ():
        columns = [sorted(c)[len(c) // 2] for c in zip(*counts, strict=True) if not isinstance(c[0], str)]
        print(
            f"| median of {len(counts)} | {method} | {given.tolerance:g} | "
            + " | ".join(f"{c:.3g}" for c in columns)
        )


if __name__ == "__main__":
    sys.exit(main())
