"""What steers error-controlled steps: tolerances, limits, the norm, callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_STEPS = 100_000

Tolerance = float | Tensor
"""One number, or a tensor that broadcasts to the state."""


NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
"""Times and step sizes are numpy arrays on the host, of these dtypes."""


def rms(x: Tensor, per_sample: bool) -> Tensor:
    """Root mean square: of each sample (B,), or of all entries, 0-D."""
    if per_sample:
        x = x.reshape(x.shape[0], -1)
        return torch.linalg.vector_norm(x, dim=1) / max(x.shape[1], 1) ** 0.5
    return torch.linalg.vector_norm(x) / max(x.numel(), 1) ** 0.5


def _nothing(time: Tensor, x: Tensor, size: Tensor) -> None:
    """The callback of a field that has none."""


@dataclass(frozen=True)
class Callbacks:
    """What a field wants to be told: each is called with (t, state, step size > 0) at a step's start."""

    step: Callable[[Tensor, Tensor, Tensor], object] = _nothing
    accept: Callable[[Tensor, Tensor, Tensor], object] = _nothing
    reject: Callable[[Tensor, Tensor, Tensor], object] = _nothing


@dataclass(frozen=True)
class Control:
    """How error-controlled steps are chosen.

    Args:
        rtol: relative tolerance of a step's error, per entry of the state.
        atol: absolute tolerance, likewise.
        max_steps: attempted steps of each sample over the whole solve.
        per_output: count max_steps anew from every output on.
        first_step: the first step to try; chosen from the field where None.
        min_step: a step that is not above it is kept, whatever its error.
        max_step: the largest step allowed.
        safety: the next step is this times the one whose error should meet the tolerance,
        shrink: and at least this,
        grow: and at most this times the last one.
        norm: from the error over the tolerance to one number a sample, (B,), or one in all; None for the
            root mean square.
        dtype: of times and step sizes.
        callbacks: told of every step, where there is one for all.
        per_sample: dimension 0 of the state is a batch, each sample with its own time and step.
    """

    rtol: Tolerance
    atol: Tolerance
    max_steps: int = MAX_STEPS
    per_output: bool = False
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 10.0
    norm: Callable[[Tensor], Tensor] | None = None
    dtype: torch.dtype = torch.float64
    callbacks: Callbacks | None = None
    per_sample: bool = False

    @property
    def longest(self) -> float:
        """What a step that is stretched to the end may reach; max_step, but for the rounding of times."""
        return self.max_step * (1 + 1e-12)

    def measure(self, x: Tensor) -> Tensor:
        """The norm of x: one number a sample, (B,), or one in all."""
        return rms(x, self.per_sample) if self.norm is None else self.norm(x)


def next_step(
    xp: Any,
    error: Any,
    size: Any,
    step: Any,
    previous: Any,
    keep: Any,
    rejected: Any,
    reaches: Any,
    order: int,
    control: Control,
) -> tuple[Any, Any]:
    """The step to try next, and the error to remember, for each sample, (B,): arrays of `xp`.

    Args:
        xp: numpy or torch.
        error: of the attempt, over the tolerance.
        size: what was attempted.
        step: what would have been, had the end not been nearer.
        previous: the error of the last kept step.
        keep: whether the attempt is kept.
        rejected: whether the attempt before was not.
        reaches: whether it ends at the end.
        order: of the method.
        control: the limits.
    """
    beta = 0.2 / order  # 0.04 for order 5, as α is 0.17
    alpha = 1 / order - 0.75 * beta
    error = xp.clip(error, 1e-10, None)
    # A rejected step shrinks by its own error alone, and its successor must not grow.
    factor = xp.where(keep, error**-alpha * previous**beta, error ** (-1 / order))
    factor = xp.clip(control.safety * factor, control.shrink, control.grow)
    factor = xp.where(rejected | ~keep, xp.clip(factor, None, 1.0), factor)
    # A step cut short by the end says little about the one that the tolerance allows.
    proposal = size * factor
    proposal = xp.where(keep & reaches, xp.maximum(proposal, step), proposal)
    return xp.clip(proposal, control.min_step, control.max_step), error
