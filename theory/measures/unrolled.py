r"""Whether a network's state is its first state plus the sum of what its blocks add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resode.analysis.depth.tracing import Addition, trace


@dataclass(frozen=True)
class UnrolledSum:
    """A run of consecutive residual additions that keep the state's shape.

    Args:
        first: name of the first block.
        last: name of the last.
        blocks: how many.
        error: ‖x_0 + Σ ηF_l(x_l) − y_L‖ / ‖y_L‖ over all samples, y_L the last addition's result.
        after: the operation that follows an addition within the run, such as "Relu"; "" where none does.
    """

    first: str
    last: str
    blocks: int
    error: float
    after: str


def unrolled_sum(model: nn.Module, x: Any) -> list[UnrolledSum]:
    r"""Compare the last state of every run of residual blocks with x_0 + Σ ηF_l(x_l).

    They are equal to rounding where every shortcut is the identity and nothing follows the additions; a ReLU
    after them breaks it. A change of width ends a run: across it the sum has no meaning.

    Args:
        model: in eval mode.
        x: as in `resode.profile_depth`.

    Raises:
        ValueError: the model has no residual addition that keeps the shape.

    Source:
        Veit, Wilber & Belongie, Residual Networks Behave Like Ensembles of Relatively Shallow Networks
        (2016); Greff, Srivastava & Schmidhuber (2017), arXiv:1612.07771.

    Example:
        >>> from resode import ResidualStack
        >>> stack = ResidualStack([nn.Linear(4, 4) for _ in range(3)]).double().eval()
        >>> [run] = unrolled_sum(stack, torch.randn(2, 4, dtype=torch.float64))
        >>> run.blocks, run.error < 1e-14
        (3, True)
    """
    runs: list[list[Addition]] = []
    for a in trace(model, x).additions:
        if not a.keeps_shape:
            runs.append([])
        elif runs and runs[-1] and runs[-1][-1].y.shape == a.x.shape:
            runs[-1].append(a)
        else:
            runs.append([a])
    found = [_compared(run) for run in runs if run]
    if not found:
        raise ValueError("no residual addition that keeps the state's shape was found in this network.")
    return found


@torch.no_grad()
def _compared(run: list[Addition]) -> UnrolledSum:
    total: Tensor = torch.zeros_like(run[0].x)
    for a in run:  # without x_0, so that the network's own order of additions is not just repeated
        total += a.increment.detach().expand_as(a.y)
    total += run[0].x.detach()
    last = run[-1].y.detach()
    error = float((total - last).norm() / last.norm())
    after = next((a.after for a in run[:-1] if a.after), "")
    return UnrolledSum(run[0].name, run[-1].name, len(run), error, after)
