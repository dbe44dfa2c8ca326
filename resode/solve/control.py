"""What steers error-controlled steps: tolerances, limits, the norm, callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STEPS = 100_000

Tolerance = float | Tensor
"""One number, or a tensor that broadcasts to the state."""


def rms(x: Tensor) -> Tensor:
    """Root mean square over all but the first dimension, shape (B,), in float64."""
    x = x.reshape(x.shape[0], -1)
    return torch.linalg.vector_norm(x, dim=1).to(torch.float64) / max(x.shape[1], 1) ** 0.5


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
        norm: from the error over the tolerance, (B, *state), to one number a sample, (B,).
        dtype: of times and step sizes.
        callbacks: told of every step of a batch of one.
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
    norm: Callable[[Tensor], Tensor] = rms
    dtype: torch.dtype = torch.float64
    callbacks: Callbacks | None = None
