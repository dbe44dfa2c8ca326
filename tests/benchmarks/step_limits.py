"""Step limits without the Jacobian: agreement, time, memory, and prediction against observation.

    python -m tests.benchmarks.step_limits agreement   # 200 blocks against dense eigenvalues
    python -m tests.benchmarks.step_limits time        # one block of 16×32×32, beside scipy's eigs
    python -m tests.benchmarks.step_limits memory      # peak memory up to a million states
    python -m tests.benchmarks.step_limits observed    # 100 blocks: predicted limit, first step that leaves

One thread; run it on a machine that does nothing else.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import islice

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from resode import step_limit
from resode.analysis import max_stable_step
from resode.fields import ConvField
from resode.solve.step import rk_step
from resode.tableaus import METHODS
from tests.benchmarks.many_blocks import Block, Damped, random_block, rightmost, trained_blocks, varied

SOLVERS = ("euler", "rk4")


def base_blocks(small: bool = False) -> Iterator[Block]:
    """Random and trained ones in turn; `small` leaves out those of 1,024 states."""
    trained = [b for b in trained_blocks() if b.x[0].numel() <= (512 if small else 1024)]
    order = torch.randperm(len(trained), generator=torch.Generator().manual_seed(0)).tolist()
    for seed in range(10_000):
        block = random_block(seed)
        if small and block.x[0].numel() > 512:
            continue
        yield block
        yield trained[order[seed % len(order)]]


def agreement(count: int, seconds: float) -> None:
    """Limits of both ways on every block, and how far they are apart where the one says it converged."""
    rows: dict[tuple[str, str], list] = {}
    begun = time.perf_counter()
    for i, block in enumerate(islice(varied(base_blocks()), count)):
        if time.perf_counter() - begun > seconds:
            count = i
            break
        for solver in SOLVERS:
            dense = step_limit(block.field, block.x, solver=solver, matrix_free=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                free = step_limit(block.field, block.x, solver=solver, matrix_free=True)
            kind = block.kind.split(", ")[-1] if "," in block.kind else block.kind
            rows.setdefault((kind, solver), []).append(
                (
                    bool(free.converged[0]),
                    _apart(free.step[0], dense.step[0]),
                    bool(free.decaying_converged[0]),
                    _apart(free.decaying_step[0], dense.decaying_step[0]),
                    float(free.decaying_step[0]) >= 0.99 * float(dense.decaying_step[0]),
                )
            )
            if (free.converged[0] and rows[kind, solver][-1][1] > 1e-6) or (
                free.decaying_converged[0] and rows[kind, solver][-1][3] > 1e-6
            ):
                print(
                    "apart", i, block.kind, tuple(block.x.shape), solver, free, dense, sep="\n  ", flush=True
                )
    print(f"{count} blocks, {time.perf_counter() - begun:.0f} s")
    print(
        "| blocks | solver | number | step converged | largest error | others converged | largest error | bound |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (kind, solver), found in sorted(rows.items()):
        steps = [error for fine, error, *_ in found if fine]
        others = [error for _, _, fine, error, _ in found if fine]
        bounds = [bound for *_, fine, _, bound in found if not fine]
        print(
            f"| {kind} | {solver} | {len(found)} | {len(steps)} | {max(steps, default=0):.1e} | {len(others)} "
            f"| {max(others, default=0):.1e} | {sum(bounds)} of {len(bounds)} |"
        )


def _apart(a: Tensor, b: Tensor) -> float:
    """Relative difference; 0 where both are 0 or infinite."""
    a, b = float(a), float(b)
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))


def timing(rounds: int) -> None:
    """One block of 16×32×32 in float32, as it is and damped, beside scipy's eigs with forward products."""
    torch.manual_seed(0)
    plain = ConvField(16).eval()
    x = torch.randn(64, 16, 32, 32)
    for name, field in (("random block", plain), ("the same, damped", Damped(plain, 1.0).eval())):
        ours: dict[tuple[str, str, int], list[float]] = {}
        theirs = []
        for _ in range(rounds):
            for solver in SOLVERS:
                for what, function in (("limit", max_stable_step), ("details", step_limit)):
                    for batch in (1, 64):
                        if batch == 64 and what == "details" and rounds > 1:
                            continue
                        begun = time.perf_counter()
                        function(field, x[:batch], solver=solver)
                        ours.setdefault((solver, what, batch), []).append(
                            (time.perf_counter() - begun) / batch
                        )
            theirs.append(_scipy_seconds(field, x[:1]))
        reference = statistics.median(theirs)
        print(f"{name}: scipy eigs {reference:.2f} s ({min(theirs):.2f} to {max(theirs):.2f})")
        for (solver, what, batch), seconds in ours.items():
            middle = statistics.median(seconds)
            print(
                f"  {solver}, {what}, batch {batch}: {middle:.3f} s a sample, ratio {middle / reference:.3f} "
                f"({min(seconds):.3f} to {max(seconds):.3f} s)"
            )


def _scipy_seconds(field, x: Tensor) -> float:
    n = x.numel()

    def product(v: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(v.astype(np.float32)).reshape(x.shape)
        return torch.func.jvp(field, (x,), (v,))[1].detach().numpy().ravel()

    begun = time.perf_counter()
    operator = scipy.sparse.linalg.LinearOperator((n, n), matvec=product, dtype=np.float32)
    scipy.sparse.linalg.eigs(operator, k=6, v0=np.ones(n, dtype=np.float32), return_eigenvectors=False)
    return time.perf_counter() - begun


def memory() -> None:
    """Peak memory of one limit, each in a process of its own."""
    for shape in ("16,32,32", "16,64,64", "32,64,64", "64,64,64", "64,128,128"):
        subprocess.run([sys.executable, "-m", "tests.benchmarks.step_limits", "one", shape], check=True)


def one(shape: str) -> None:
    channels, height, width = map(int, shape.split(","))
    torch.manual_seed(0)
    field = ConvField(channels).eval()
    x = torch.randn(1, channels, height, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begun = time.perf_counter()
    limit = step_limit(field, x, solver="rk4")
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{x[0].numel():>9,} states: {peak - before:6.0f} MB over {before:.0f}, {seconds:6.1f} s, converged "
        f"{bool(limit.converged[0])}, limit without growing modes {float(limit.decaying_step[0]):.4f} "
        f"({'found' if limit.decaying_converged[0] else 'at most'})",
        flush=True,
    )


def observed(count: int, allowed: float) -> None:
    """The predicted limit of each block against the first step at which the real iteration leaves.

    F(x) − F(x*) − c(x − x*) has the fixed point x*, and c, a little above the fastest growth, makes every mode
    decay. Its nonlinear step of each of many sizes, one a row of a batch, starts near x* and is repeated.
    """
    within, begun = 0, time.perf_counter()
    ratios = []
    for i, block in enumerate(islice(base_blocks(small=True), count)):
        if time.perf_counter() - begun > allowed:
            count = i
            break
        solver = SOLVERS[i // 2 % 2]
        field = _pinned(block)
        limit = step_limit(field, block.x, solver=solver, matrix_free=True)
        predicted = float(limit.step)
        leaving = _first_leaving(field, block.x, solver, predicted)
        ratios.append(leaving / predicted)
        fine = abs(leaving / predicted - 1) <= 0.02
        within += fine
        if not fine:
            print(
                f"  {i}, {block.kind}, {tuple(block.x.shape)}, {solver}: predicted {predicted:.5f}, left at "
                f"{leaving:.5f}, λ {complex(limit.limiting_eigenvalue[0]):.4g}, condition "
                f"{float(limit.condition):.3g}, contraction limit {float(limit.contraction_step):.4g}, "
                f"converged {bool(limit.converged)}",
                flush=True,
            )
    print(
        f"{within} of {count} within 2 %; observed/predicted {min(ratios):.4f} to {max(ratios):.4f}, "
        f"median {statistics.median(ratios):.4f}; {time.perf_counter() - begun:.0f} s"
    )


def _pinned(block: Block):
    """The block with a fixed point at its state, and every mode decaying."""
    inner, x = block.field, block.x
    c = 1.1 * max(rightmost(block), 0.0) + 0.1
    with torch.no_grad():
        at = inner(x)
    return lambda y: inner(y) - at - c * (y - x)


def _first_leaving(field, x: Tensor, solver: str, predicted: float, steps: int = 600) -> float:
    """The smallest step size, of those 0.25 % apart up to 4 % around the prediction, whose iteration leaves.

    It leaves where its distance from the fixed point grows over the second half of the steps; a start of 1e-9
    keeps what stays in the block's linear range.
    """
    factors = 1 + torch.arange(-16, 17, dtype=torch.float64) / 400
    h = (predicted * factors).reshape(-1, *(1,) * (x.ndim - 1))
    generator = torch.Generator().manual_seed(3)
    y = x + 1e-9 * torch.randn(x.shape, generator=generator, dtype=x.dtype).expand(len(factors), *x.shape[1:])
    half = None
    with torch.no_grad():
        for n in range(steps):
            y = rk_step(METHODS[solver], lambda t, y: field(y), 0.0, y, h)
            distance = (y - x).flatten(1).norm(dim=1)
            if n == steps // 2:
                half = distance
            # What has left is held: growth was seen. What decays to rounding is done too.
            y = torch.where(
                (distance > 1e-4).reshape(h.shape), x + 1e-4 * (y - x) / distance.reshape(h.shape), y
            )
    left = (distance >= 0.9e-4) | ((distance > half) & (distance > 1e-12))
    return float((predicted * factors)[left].min()) if left.any() else float("inf")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("agreement", "time", "memory", "observed", "one"))
    parser.add_argument("shape", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help="blocks (200 for agreement, 100 for observed)")
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    given = parser.parse_args()
    if given.what == "agreement":
        agreement(given.count or 200, given.seconds)
    elif given.what == "time":
        timing(given.rounds)
    elif given.what == "memory":
        memory()
    elif given.what == "one":
        one(given.shape)
    else:
        observed(given.count or 100, given.seconds)


if __name__ == "__main__":
    main()
