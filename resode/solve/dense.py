"""States between the ends of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from resode.solve.step import Field, combine, stages
from resode.tableaus import ButcherTableau


@dataclass
class Step:
    """A step that was kept: what its interpolant needs.

    Either the state is a batch of B samples, each with its own times, or B = 1 and it has any shape.
    """

    start: np.ndarray  # (B,)
    end: np.ndarray  # (B,); the start again for samples that did not take it
    x: Tensor  # the state at the start
    k: list[Tensor]  # the stages, each as x; the last one is f at the step's end
    x_end: Tensor
    error: np.ndarray | None = None  # estimated, over the tolerance, (B,); None for steps of a given size
    more: list[Tensor] | None = None  # the stages that only dense output needs, once it was asked for
    k_start: Tensor | None = None  # f at the step's start, where it is not the first stage

    @property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """The field at the step's start and end."""
        return self.k[0] if self.k_start is None else self.k_start, self.k[-1]

    def whole(self, tableau: ButcherTableau, f: Field, per_sample: bool) -> int:
        """Takes the stages of dense output where the method has some and they are missing; the calls of f."""
        if not tableau.dense_rows or (self.more and not self._lacks_gradient()):
            return 0
        real, device = self.x.dtype.to_real(), self.x.device
        column = (len(self.x),) + (1,) * (self.x.ndim - 1) if per_sample else ()
        size, k = self.end - self.start, list(self.k)
        h = torch.from_numpy(size).to(device, real).view(column if per_sample else (1,) * self.x.ndim)
        for row in tableau.dense_rows:
            at = torch.from_numpy(self.start + sum(c for _, c in row) * size).to(device, real)
            k.append(f(at.view(column), combine(self.x, h, row, k)))
        self.more = k[len(self.k) :]
        return len(self.more)

    def _lacks_gradient(self) -> bool:
        """Whether the stages were taken without a gradient that is wanted now."""
        assert self.more is not None
        return torch.is_grad_enabled() and self.k[-1].requires_grad and not self.more[-1].requires_grad


def interpolate(
    tableau: ButcherTableau,
    f: Field,
    steps: Sequence[Step],
    outputs: np.ndarray,
    forward: float,
    per_sample: bool,
) -> tuple[list[Tensor], int]:
    """States at the outputs, each of the state's shape, and the calls of f they took.

    By the method's own interpolant where it has one, which may take further stages in the steps that hold
    outputs, a cubic Hermite polynomial up to order 3 and for implicit methods, and for the others a step of
    the method itself from the step's start to the output.

    Args:
        tableau: the method that took the steps.
        f: the field.
        steps: in the order they were taken; every output lies in one of each sample's.
        outputs: times, (T,), in any order, or (B, T), each sample's own.
        forward: 1, or −1 where time decreases.
        per_sample: whether the steps' states are batches.
    """
    if outputs.size == 0:
        return [], 0
    n_outputs = outputs.shape[-1]
    outputs = np.broadcast_to(outputs, (len(steps[0].start), n_outputs))
    like = steps[0].x
    real, device = like.dtype.to_real(), like.device
    start, end = np.stack([s.start for s in steps], 1), np.stack([s.end for s in steps], 1)  # (B, S)
    index = _first_to_reach(forward * end, forward * outputs)
    used, index = np.unique(index.clip(max=len(steps) - 1), return_inverse=True)
    index, steps = index.reshape(outputs.shape), [steps[i] for i in used]
    start, end = (np.take_along_axis(s[:, used], index, 1).astype(np.float64) for s in (start, end))
    size = (end - start).T
    # A sample that did not take the step has size 0; only an output at its start can fall there.
    theta = ((outputs - start).T / np.where(size == 0, 1.0, size)).clip(0, 1)
    column = (n_outputs,) + ((len(like),) + (1,) * (like.ndim - 1) if per_sample else (1,) * like.ndim)
    # Rows of one sample's state at one step; a state that is no batch is one row.
    pick = torch.from_numpy((index.T * len(end) + np.arange(len(end))).reshape(-1)).to(device)

    def as_factor(numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(device, real).view(column)

    def at_step(entries: list[Tensor]) -> Tensor:
        """Of one entry a step, the one at each output's step: (T, *x.shape)."""
        rows = torch.stack(entries).reshape(len(steps) * len(end), -1)
        return rows.index_select(0, pick).reshape(n_outputs, *like.shape)

    x = at_step([s.x for s in steps])
    if tableau.interpolant is not None:
        calls = sum(step.whole(tableau, f, per_sample) for step in steps)
        stages_of = [[*step.k, *(step.more or ())] for step in steps]
        powers = [size * theta]
        while len(powers) < len(tableau.interpolant[0]):
            powers.append(powers[-1] * theta)
        for i, row in enumerate(tableau.interpolant):
            if any(row):
                weight = sum(float(c) * p for c, p in zip(row, powers, strict=True) if c)
                x = torch.addcmul(x, as_factor(weight), at_step([k[i] for k in stages_of]))  # type: ignore[arg-type]
        return list(x), calls
    k0, h = at_step([s.slopes[0] for s in steps]), as_factor(size)
    if tableau.order <= 3 or not tableau.explicit:
        x1, k1 = at_step([s.x_end for s in steps]), at_step([s.slopes[1] for s in steps])
        return list(hermite(as_factor(theta), h, x, k0, x1, k1)), 0
    path = []
    for i in range(len(theta)):
        part = theta[i] * size[i]
        h = torch.from_numpy(part).to(device, real).view(column[1:])
        at = [(outputs[:, i] - part) + c * part for c in tableau.stage_times]
        times = [torch.from_numpy(s).to(device, real).view(column[1:] if per_sample else ()) for s in at]
        path.append(combine(x[i], h, tableau.b_row, stages(tableau, f, times, x[i], h, k0[i])))
    return path, len(theta) * tableau.b_row[-1][0]


def _first_to_reach(ends: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Of steps that end at rising times (B, S), how many end before each of the times (B, T)."""
    if len(ends) <= ends.shape[1]:
        return np.stack([row.searchsorted(t) for row, t in zip(ends, times, strict=True)])
    before = np.zeros(times.shape, np.int64)
    for end in ends.T:
        before += end[:, None] < times
    return before


def hermite(s: Tensor | float, h: Tensor | float, x0: Tensor, k0: Tensor, x1: Tensor, k1: Tensor) -> Tensor:
    """The cubic through (x0, slope k0) and (x1, slope k1) at the fraction s of a step of size h."""
    values = (1 + 2 * s) * (1 - s) ** 2 * x0 + s**2 * (3 - 2 * s) * x1
    return values + h * (s * (1 - s) ** 2 * k0 - s**2 * (1 - s) * k1)
