r"""What another solver will cost, foretold from a few unlabelled inputs.

Two numbers tell it beforehand: how far the logits drift, and the worst block's defect
‖Φ_new(x) − Φ_old(x)‖ / ‖Φ_old(x)‖, Φ the block's map at the states that it meets. Whether a mode grows, or
the step is within the new solver's limit, tells nearly nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from resode.analysis.depth.losses import batch_of, part, prediction
from resode.blocks import ResidualStack
from resode.blocks.solving import block_name, named_stacks, other_solver
from resode.calls import call, hooked
from resode.checks import checked
from resode.modes import evaluating
from resode.results import Result
from resode.tableaus import get_tableau

INPUTS = 64
"""Inputs that are looked at, the first ones."""

KEEPS = 0.25
"""Drift of the logits up to which networks kept their accuracy within 2 points."""

LOSES = 0.45
"""Drift from which they lost more than 10 points."""


@dataclass(frozen=True)
class Forecast(Result):
    """What the same weights do under another solver.

    Args:
        drift: ‖z' − z‖ / ‖z‖ of the outputs over the inputs.
        worst_block: the block that differs most, a module's name.
        defect: its ‖Φ_new(x) − Φ_old(x)‖ / ‖Φ_old(x)‖.
        verdict: "keeps" (the accuracy within 2 points), "may lose" or "loses".
    """

    drift: float
    worst_block: str
    defect: float
    verdict: str


@checked
def forecast(model: nn.Module, x: Any, solver: str, substeps: int = 1) -> Forecast:
    """What swapping the solver of every `ResidualStack` will do to the outputs.

    Statistics of batch norm stay as they are; measuring them anew under the new solver can only help.

    Args:
        model: with at least one `ResidualStack`; looked at in evaluation mode, and put back.
        x: unlabelled inputs, dimension 0 the batch; the first 64 are taken.
        solver: an explicit method's name.
        substeps: its steps a block.

    Raises:
        ValueError: the model holds no `ResidualStack`, or no explicit method has this name.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> field = nn.Linear(4, 4, bias=False)
        >>> _ = field.weight.data.copy_(-torch.eye(4))
        >>> model = nn.Sequential(ResidualStack(field, depth=1, step_size=1.0), nn.Linear(4, 2, bias=False))
        >>> forecast(model, torch.randn(8, 4), "rk4").verdict  # 1 − 1 against 1 − 1 + 1/2 − 1/6 + 1/24
        'loses'
    """
    get_tableau(solver)
    stacks = named_stacks(model)
    if not stacks:
        raise ValueError(
            "a solver can be swapped only in a resode.ResidualStack, and this model holds none. "
            "resode.convert makes stacks of the blocks of other networks."
        )
    some = part(x, 0, min(INPUTS, batch_of(x)), batch_of(x))
    paths: dict[str, list[Tensor]] = {name: [] for name in stacks}

    def kept(name: str, args: tuple[Tensor, ...], kwargs: Any, output: Any) -> None:
        stack, states = stacks[name], [args[0].detach().clone()]
        for index in range(stack.depth):
            states.append(stack.advance(index, states[-1]).detach())
        if not paths[name]:  # of a stack that is called several times, the first call
            paths[name] += states

    with evaluating(model), torch.no_grad():
        with hooked(stacks, after=kept):
            before = prediction(call(model, some)).double()
        worst, defect = "", 0.0
        with other_solver(model, solver, 1 if get_tableau(solver).adaptive else substeps):
            after = prediction(call(model, some)).double()
            for block, differs in _defects(stacks, paths):
                if differs > defect or not math.isfinite(differs):
                    worst, defect = block, differs
    moved = drift(after, before)
    return Forecast(moved, worst, defect, verdict(moved))


def _defects(stacks: dict[str, ResidualStack], paths: dict[str, list[Tensor]]) -> Iterator[tuple[str, float]]:
    """Each block's name, and how far its map is from the one that made the paths."""
    for name, stack in stacks.items():
        for i, (start, old) in enumerate(pairwise(paths[name])):
            new, size = stack.advance(i % stack.depth, start), float(old.norm())
            block = block_name(name, stack, i % stack.depth)
            yield block, float((new - old).norm()) / size if size > 0 else 0.0


def drift(after: Tensor, before: Tensor) -> float:
    """‖after − before‖ / ‖before‖; nan where before is 0."""
    size = float(before.double().norm())
    return float((after.double() - before.double()).norm()) / size if size > 0 else math.nan


def verdict(drift: float) -> str:
    """What a drift of the logits means for the accuracy."""
    return "keeps" if drift <= KEEPS else "may lose" if drift <= LOSES else "loses"
