"""States between the ends of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resode.solve.step import Field, combine, stages
from resode.tableaus import ButcherTableau


@dataclass
class Step:
    """A step that was kept: what its interpolant needs. B samples, each with its own times."""

    start: Tensor  # (B,)
    end: Tensor  # (B,); the start again for samples that did not take it
    x: Tensor  # the state at the start, (B, *state)
    k: list[Tensor]  # the stages, (B, *state) each; the last one is f at the step's end
    x_end: Tensor


def interpolate(
    tableau: ButcherTableau,
    f: Field,
    steps: Sequence[Step],
    outputs: Tensor,
    forward: float,
) -> tuple[list[Tensor], int]:
    """States at the outputs, each (B, *state), and the calls of f they took.

    By the method's own interpolant where it has one, a cubic Hermite polynomial up to order 3, and
    for the others a step of the method itself from the step's start to the output.

    Args:
        tableau: the method that took the steps.
        f: the field.
        steps: in the order they were taken; every output lies in one of each sample's.
        outputs: times, (T,), in the steps' dtype; for Hermite and the interpolants in any order.
        forward: 1, or −1 where time decreases.
    """
    if len(outputs) == 0:
        return [], 0
    like = steps[0].x
    batch, column = like.shape[0], (len(outputs), like.shape[0]) + (1,) * (like.ndim - 1)
    start, end = torch.stack([s.start for s in steps], 1), torch.stack([s.end for s in steps], 1)  # (B, S)
    wanted = outputs.expand(batch, -1).contiguous()  # (B, T)
    index = torch.searchsorted(forward * end, forward * wanted)  # the first step that reaches the output
    start, end = start.gather(1, index), end.gather(1, index)
    size = (end - start).T.reshape(column)
    # A sample that did not take the step has size 0; only an output at its start can fall there.
    theta = (wanted - start).T.reshape(column) / torch.where(size == 0, 1.0, size)
    pick, sample = index.T, torch.arange(batch, device=like.device)

    def at_step(entries: list[Tensor]) -> Tensor:
        """Of one entry a step, the one at each output's step: (T, B, *state)."""
        return torch.stack(entries)[pick, sample]

    real = like.dtype.to_real()
    x, h = at_step([s.x for s in steps]), size.to(real)
    if tableau.interpolant is not None:
        powers = [theta ** (j + 1) for j in range(len(tableau.interpolant[0]))]
        for i, row in enumerate(tableau.interpolant):
            if any(row):
                weight = torch.stack([float(c) * p for c, p in zip(row, powers, strict=True)]).sum(0)
                x = x + (h * weight.to(real)) * at_step([s.k[i] for s in steps])
        return list(x), 0
    k0 = at_step([s.k[0] for s in steps])
    if tableau.order <= 3:
        x1, k1 = at_step([s.x_end for s in steps]), at_step([s.k[-1] for s in steps])
        return list(hermite(theta.to(real), h, x, k0, x1, k1)), 0
    path = []
    for i in range(len(outputs)):
        part = theta[i] * size[i]
        begin = outputs[i] - part
        at = [begin + c * part for c in tableau.stage_times]
        k = stages(tableau, f, at, x[i], part.to(real), k0[i])
        path.append(combine(x[i], part.to(real), tableau.b_row, k))
    return path, len(outputs) * tableau.b_row[-1][0]


def hermite(s: Tensor | float, h: Tensor | float, x0: Tensor, k0: Tensor, x1: Tensor, k1: Tensor) -> Tensor:
    """The cubic through (x0, slope k0) and (x1, slope k1) at the fraction s of a step of size h."""
    values = (1 + 2 * s) * (1 - s) ** 2 * x0 + s**2 * (3 - 2 * s) * x1
    return values + h * (s * (1 - s) ** 2 * k0 - s**2 * (1 - s) * k1)
