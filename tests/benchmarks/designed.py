"""Evaluations that a stack of parabolic blocks takes to end within 1 % of its flow: designed methods and others.

python -m tests.benchmarks.designed [--stiffness 100] [--depth 10]

One field −Kᵀ tanh(Kx + b), shared by all blocks, scaled so that η ρ(J) is the stiffness at the start (at 0, where tanh is steepest, it is larger). Each method takes
the fewest substeps, or stages, with which the end is within 1 % of the flow; the flow by rk4 in fine steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from resode import METHODS, ResidualStack, design_method, max_stable_step
from resode.fields import ParabolicField
from resode.jacobian.linearize import jacobian


def problem(stiffness: float, seed: int = 0) -> tuple[ParabolicField, torch.Tensor, np.ndarray]:
    """The field, states (2, 4, 6, 6), and the eigenvalues of their Jacobians, which are symmetric, and of that at 0, where all ends."""
    torch.manual_seed(seed)
    field, x = ParabolicField(4, kernel_size=3).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for _ in range(8):  # tanh flattens as K grows
        size = np.abs(spectrum(field, x)).max()
        with torch.no_grad():
            next(p for p in field.parameters() if p.ndim > 1).mul_((stiffness / size) ** 0.5)
    return field, x, np.append(spectrum(field, x), spectrum(field, 0 * x[:1]))


def spectrum(field: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    """Eigenvalues at all states."""
    with torch.no_grad():
        return np.linalg.eigvals(jacobian(field, x).numpy()).real.clip(max=0).reshape(-1)


def rows(stiffness: float, depth: int, tableaus: Sequence[str]):
    """(method, stages, substeps, evaluations of a block, distance from the flow) of each that ends within 1 %."""
    field, x, values = problem(stiffness)
    with torch.no_grad():  # to 1e-8 of it: rk4 in steps far below its limit
        flow = ResidualStack(field, depth=depth, solver="rk4", substeps=int(3 * stiffness))(x)

    def distance(solver, substeps):
        stack = ResidualStack(field, depth=depth, solver=solver, substeps=substeps)
        with torch.no_grad():
            return float((stack(x) - flow).norm() / flow.norm())

    for name in tableaus:
        n = max(1, int(0.9 / max_stable_step(eigenvalues=values, solver=name)))
        while not (error := distance(name, n)) <= 0.01:
            n += max(1, n // 50)
        stages = len(METHODS[name].b)
        yield name, stages, n, stages * n, error
    kinds = {
        f"{family}_S": (lambda s, family=family: f"{family}_{s}")
        for family in ("rkc1", "rkl1", "rkc2", "rkl2")
    }
    for order, damping in ((1, 0.05), (2, 0.05)):
        kinds[f"designed, order {order}"] = lambda s, order=order, damping=damping: design_method(
            values, s, order, damping=damping
        )
    for name, method_of in kinds.items():
        found = None
        for n in range(1, 8):  # of more and shorter steps with fewer stages each
            s = max(2, int((np.abs(values).max() / (2 * n)) ** 0.5))  # 2 s² is the most that any holds
            while max_stable_step(eigenvalues=values, solver=(method := method_of(s))) < 1 / n:
                s += 1
            error = distance(method, n)
            if error <= 0.01 and (found is None or s * n < found[2]):
                found = s, n, s * n, error
        yield (name, *(found or ("–", "–", "–", error)))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stiffness", type=float, default=100.0)
    parser.add_argument("--depth", type=int, default=10)
    fixed = [name for name, t in METHODS.items() if t.explicit and not t.adaptive]
    parser.add_argument("--tableaus", default=",".join(fixed))
    given = parser.parse_args()
    print("| method | stages | substeps | evaluations a block | distance from the flow |\n|" + " --- |" * 5)
    for name, stages, substeps, evaluations, error in rows(
        given.stiffness, given.depth, given.tableaus.split(",")
    ):
        print(f"| {name} | {stages} | {substeps} | {evaluations} | {100 * error:.2g} % |", flush=True)


if __name__ == "__main__":
    main()
