"""Evaluations that a stack of parabolic blocks takes to end within 1 % of its flow: designed methods and others.

python -m tests.benchmarks.designed [--stiffness 100] [--depth 10]
python -m tests.benchmarks.designed --run FOLDER

One field −Kᵀ tanh(Kx + b), shared by all blocks, scaled so that η ρ(J) is the stiffness at the start (at 0, where tanh is steepest, it is larger). Each method takes
the fewest substeps, or stages, with which the end is within 1 % of the flow; the flow by rk4 in fine steps.

With --run, the logits of 64 test images under a trained network of ODE blocks take the place of the end: the methods are
designed for the decaying eigenvalues of all blocks at four of these images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from resode import METHODS, ResidualStack, design_method, max_stable_step
from resode.analysis.steps.blocks import block_groups
from resode.blocks.solving import other_solver
from resode.fields import ParabolicField
from resode.jacobian.linearize import jacobian
from resode.training.data import load_data
from resode.training.evaluate import load, plain_batches


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


def network_rows(run: str):
    """As `rows`, of a trained network's logits; the fewest evaluations up to 24 a block."""
    network = load(run).eval()
    data = load_data("digits")
    images = next(iter(plain_batches(data, "test", limit=64)))[0]

    def logits(solver, substeps):
        with torch.no_grad(), other_solver(network, solver, substeps):
            return network(images)

    values = []
    for group in block_groups(network, images[:4]):
        for field, step, x in zip(group.fields, group.steps, group.states, strict=True):
            with torch.no_grad():
                values.append(step * np.linalg.eigvals(jacobian(field, x).numpy()).reshape(-1))
    values = np.concatenate(values)
    print(f"largest |ηλ| {abs(values).max():.2g}, {100 * (values.real > 0).mean():.0f} % growing")
    values = values[values.real <= 0]
    flow = logits("rk4", 32)
    kinds = {name: (lambda s, name=name: METHODS[name], [len(METHODS[name].b)])
             for name in ("euler", "midpoint", "heun2", "rk4")}  # fmt: skip
    for order in (1, 2):
        kinds[f"designed, order {order}"] = (
            lambda s, order=order: design_method(values, s, order),
            range(order + 1, 7),
        )
    for name, (method_of, choices) in kinds.items():
        found = None
        for s in choices:
            method = method_of(s)
            for n in range(1, 24 // s + 1):
                error = float((logits(method, n) - flow).norm() / flow.norm())
                if error <= 0.01:
                    found = (s, n, s * n, error) if found is None or s * n < found[2] else found
                    break
        yield (name, *(found or ("–", "–", "–", error)))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stiffness", type=float, default=100.0)
    parser.add_argument("--depth", type=int, default=10)
    fixed = [name for name, t in METHODS.items() if t.explicit and not t.adaptive]
    parser.add_argument("--tableaus", default=",".join(fixed))
    parser.add_argument("--run", help="a run's folder, on the digits")
    given = parser.parse_args()
    print("| method | stages | substeps | evaluations a block | distance from the flow |\n|" + " --- |" * 5)
    if given.run:
        found = network_rows(given.run)
    else:
        found = rows(given.stiffness, given.depth, given.tableaus.split(","))
    for name, stages, substeps, evaluations, error in found:
        print(f"| {name} | {stages} | {substeps} | {evaluations} | {100 * error:.2g} % |", flush=True)


if __name__ == "__main__":
    main()
