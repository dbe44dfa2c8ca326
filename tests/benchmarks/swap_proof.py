"""What a solver drawn for each batch does to a swap, and what it costs: odenet20 (width 8) on the digits.

    python -m tests.benchmarks.swap_proof --seeds 10
    python -m tests.benchmarks.swap_proof --seeds 4 --ways

train with Euler alone and with `swap_proof`, and with other ways that were proposed; means with standard errors over the
seeds. Points lost are those of the accuracy recalibrated at 500 training images, against the network's own solver, under Euler,
midpoint and rk4 with 1, 2 and 4 steps a block (--ways: 1 and 2) and dopri5, those of them that call F more often than the network's own.
Seconds are those of the processor in training.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import resode
from resode import SwapProof, swap_report
from resode.analysis.steps.blocks import block_groups
from resode.blocks.solving import other_solver, set_solver, stacks_of
from resode.modes import evaluating
from resode.training.data import load_data
from resode.training.evaluate import plain_batches
from resode.training.files import RunError


class Drawn:
    """A solver drawn among these; the run's own option draws among three in its second half."""

    def __init__(self, choices: list[tuple[str, int]] | None, start: float = 0.5) -> None:
        self.choices, self.start = choices, start

    def after_update(self, loop: Any) -> None:
        if loop.proof is None:
            seed = loop.recipe.seed
            loop.proof = SwapProof(loop.network, choices=self.choices, start=self.start, seed=seed)

    def after_run(self, loop: Any) -> None:
        pass


class AdaptiveStep:
    """Ott et al. (2021): the step is halved where half of it gives another training accuracy, and else doubled."""

    def __init__(self, every: int = 20, tolerance: float = 0.01, most: int = 8) -> None:
        self.every, self.tolerance, self.most, self.updates = every, tolerance, most, 0
        self.x, self.y = next(iter(plain_batches(load_data("digits"), "train", limit=256)))

    def after_update(self, loop: Any) -> None:
        self.updates += 1
        if self.updates % self.every:
            return
        n = stacks_of(loop.network)[0].substeps
        with evaluating(loop.network), torch.no_grad():
            own, finer = [self._accuracy(loop.network, m) for m in (n, 2 * n)]
        if abs(own - finer) > self.tolerance:
            set_solver(loop.network, substeps=min(2 * n, self.most))
        elif n > 1:
            set_solver(loop.network, substeps=n // 2)

    def after_run(self, loop: Any) -> None:
        pass

    def _accuracy(self, network: nn.Module, substeps: int) -> float:
        with other_solver(network, None, substeps):
            return float((network(self.x).argmax(1) == self.y).double().mean())


def penalty(weight: float, of_block: Callable[..., Tensor], samples: int = 16) -> Callable[..., Tensor]:
    """The weight times the sum over the blocks of what a field, its states and its step give."""

    def total(network: nn.Module, images: Tensor) -> Tensor:
        values = []
        for group in block_groups(network, images[:samples]):
            with evaluating(network):
                for field, x, step in zip(group.fields, group.states, group.steps, strict=True):
                    values.append(of_block(field, x.detach(), step))
        return weight * torch.stack(values).sum()

    return total


def kinetic(field: Callable[[Tensor], Tensor], x: Tensor, step: float) -> Tensor:
    """Finlay et al. (2020): h ‖F‖², an entry."""
    return step * field(x).square().mean()


def jacobian(field: Callable[[Tensor], Tensor], x: Tensor, step: float) -> Tensor:
    """Finlay et al. (2020): h ‖vᵀJ‖² for a random v, an entry: an estimate of ‖J‖² in Frobenius' norm."""
    x = x.requires_grad_()
    y = field(x)
    (pulled,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
    return step * pulled.square().mean()


def defect(field: Callable[[Tensor], Tensor], x: Tensor, step: float) -> Tensor:
    """‖midpoint's step − Euler's‖² / ‖Euler's‖²."""
    first = field(x)
    return (field(x + step / 2 * first) - first).square().sum() / first.detach().square().sum()


EULER, HALVES, MIDPOINT, RK4 = ("euler", 1), ("euler", 2), ("midpoint", 1), ("rk4", 1)

WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "Euler alone": dict,
    "drawn: Euler, two half steps, midpoint; second half (`--swap-proof`)": lambda: {"swap_proof": True},
    "the same from the start": lambda: {"callbacks": [Drawn(None, 0.0)]},
    "drawn: Euler, two half steps": lambda: {"callbacks": [Drawn([EULER, HALVES])]},
    "drawn: Euler, midpoint, rk4": lambda: {"callbacks": [Drawn([EULER, MIDPOINT, RK4])]},
    "midpoint alone": lambda: {"model_options": {"width": 8, "solver": "midpoint"}},
    "adaptive step (Ott et al.)": lambda: {"callbacks": [AdaptiveStep()]},
    "refined in epoch 7 (`--refine-at 7`)": lambda: {"refine_at": (7,)},
    "kinetic penalty, weight 0.1": lambda: {"penalty": penalty(0.1, kinetic)},
    "Jacobian penalty, weight 0.1": lambda: {"penalty": penalty(0.1, jacobian)},
    "Jacobian penalty, weight 1": lambda: {"penalty": penalty(1.0, jacobian)},
    "penalty on the defect, weight 0.1": lambda: {"penalty": penalty(0.1, defect)},
    "penalty on the defect, weight 1": lambda: {"penalty": penalty(1.0, defect)},
}


def measured(seed: int, settings: dict[str, Any], substeps: set[int]) -> dict[str, float]:
    """The figures of one run, under Euler, midpoint and rk4 with so many steps a block, and dopri5."""
    data = load_data("digits")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        run = resode.train(
            "odenet20", "digits", epochs=12, seed=seed, run_dir=Path(folder) / "run", progress=False,
            **{"model_options": {"width": 8}, **settings},
        )  # fmt: skip
        seconds = time.process_time() - begun
    training = list(plain_batches(data, "train", limit=500))
    own_substeps = stacks_of(run.network)[0].substeps
    report = swap_report(
        run.network,
        list(plain_batches(data)),
        substeps=sorted(substeps | {own_substeps}),
        recalibrate=training,
    )
    [own] = [row for row in report.rows if row.as_trained]
    found = {
        "processor seconds": seconds,
        "F calls": own.nfe,
        "accuracy, %": 100 * own.accuracy,
        "accuracy recalibrated, %": 100 * own.kept,
    }
    finer = [row for row in report.rows if row.nfe > own.nfe]
    for row in finer:
        name = f"{row.solver}×{row.substeps}" if row.substeps else row.solver
        found[f"points lost under {name}, recalibrated"] = 100 * (own.kept - row.kept)
        found[f"points lost under {name}, as it is"] = 100 * (own.accuracy - row.accuracy)
    found["lost on average"] = 100 * mean(own.kept - row.kept for row in finer)
    found["lost on average, as it is"] = 100 * mean(own.accuracy - row.accuracy for row in finer)
    found["distance from an ODE"] = mean(d.distance for d in report.distances)
    return found


def shown(values: list[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values) / len(values) ** 0.5:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="at least two")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--ways", action="store_true", help="other ways too, a line each")
    parser.add_argument("--only", help="of the ways those that hold this word, and Euler alone")
    given = parser.parse_args()
    ways = list(WAYS) if given.ways else list(WAYS)[:2]
    if given.only:
        ways = [way for way in WAYS if way == "Euler alone" or given.only in way]
    columns: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in ways}
    diverged = dict.fromkeys(ways, 0)
    measured(given.first_seed, {"swap_proof": True}, {1})  # the first run of a process takes longer
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        for way, column in columns.items():
            try:
                found = measured(seed, WAYS[way](), {1, 2} if given.ways else {1, 2, 4})
            except RunError as error:  # the loss became nan
                diverged[way] += 1
                print(f"seed {seed}, {way}: {str(error)[:60]}", file=sys.stderr, flush=True)
                continue
            for name, value in found.items():
                column[name].append(value)
            print(f"seed {seed}, {way}: {found['lost on average']:.2f} lost", file=sys.stderr, flush=True)
    if not given.ways:
        print(f"| | {' | '.join(ways)} |\n| --- |{' --- |' * len(ways)}")
        for name in columns[ways[-1]]:
            print(f"| {name} | {' | '.join(shown(column[name]) for column in columns.values())} |")
        return
    names = (
        "F calls",
        "accuracy recalibrated, %",
        "lost on average",
        "lost on average, as it is",
        "distance from an ODE",
    )
    print(
        f"| way | time | {' | '.join(names)} | lost under the worst solver |\n| --- |{' --- |' * (len(names) + 2)}"
    )
    euler = mean(columns["Euler alone"]["processor seconds"])
    for way, column in columns.items():
        name = f"{way}, {diverged[way]} of {given.seeds} diverged" if diverged[way] else way
        if len(column["F calls"]) < 2:
            print(f"| {name} |{' |' * (len(names) + 2)}")
            continue
        lost = {n: v for n, v in column.items() if n.startswith("points lost") and n.endswith("recalibrated")}
        worst = max(lost, key=lambda n: mean(lost[n]))
        cells = [f"{mean(column['processor seconds']) / euler:.2f}", *(shown(column[n]) for n in names)]
        solver = worst.removeprefix("points lost under ").removesuffix(", recalibrated")
        print(f"| {name} | {' | '.join(cells)} | {solver}: {shown(lost[worst])} |")


if __name__ == "__main__":
    main()
