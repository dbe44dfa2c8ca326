"""What steers error-controlled steps: tolerances, limits, the norm, callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from resode.checks import one_of

MAX_STEPS = 100_000

CONTROLLERS: dict[str, tuple[float, float, float]] = {
    # name: (pcoeff, icoeff, dcoeff), as diffrax and torchode name them
    "i": (0.0, 1.0, 0.0),
    "pi": (0.2, 0.65, 0.0),  # 0.17 and 0.04 of order 5, as in Hairer's DOPRI5
    "pi34": (0.4, 0.3, 0.0),
    "pi42": (0.2, 0.4, 0.0),
    "h211pi": (-1 / 6, 1 / 3, 0.0),
    "pid": (-2 / 9, 2 / 9, 1 / 18),
}
"""Step controllers by name: the proportional, integral and derivative gains of the logarithm of the error.

Source:
    "i": the elementary controller. "pi": Hairer & Wanner, Solving Ordinary Differential Equations II, IV.2.
    "pi34": Gustafsson, ACM Trans. Math. Softw. 17 (1991). "pi42", "h211pi" and "pid" (H312PID):
    Söderlind, Digital filters in adaptive time-stepping, ACM Trans. Math. Softw. 29 (2003).
"""


def controller_filter(controller: str | Sequence[float]) -> tuple[float, float, float]:
    r"""The exponents (β₁, β₂, β₃) of a controller: β₁ = P + I + D, β₂ = −P − 2D, β₃ = D.

    With an error that is h^p, log h follows q³ = (1 − β₁) q² − β₂ q − β₃; a root on or beyond the unit circle
    would let steps swing without end.

    Args:
        controller: a name in `CONTROLLERS`, or (pcoeff, icoeff, dcoeff).

    Raises:
        ValueError: an unknown name, other than three finite numbers, or a controller that can't be stable.

    Example:
        >>> controller_filter("i")
        (1.0, 0.0, 0.0)
    """
    if isinstance(controller, str):
        gains: Sequence[float] = CONTROLLERS[one_of("controller", controller, CONTROLLERS)]
    else:
        try:
            gains = [float(c) for c in controller]
        except (TypeError, ValueError):
            gains = []
    if len(gains) != 3 or not all(map(math.isfinite, gains)):
        raise ValueError(
            f"controller must be one of {', '.join(CONTROLLERS)}, or three finite numbers "
            f"(pcoeff, icoeff, dcoeff); got {controller!r}."
        )
    p, i, d = gains
    filter = (p + i + d, -p - 2 * d + 0.0, d + 0.0)
    largest = float(abs(np.roots([1.0, filter[0] - 1, filter[1], filter[2]])).max())
    if largest >= 1:
        raise ValueError(
            f"the controller (pcoeff, icoeff, dcoeff) = ({p:g}, {i:g}, {d:g}) can't be stable: changes of "
            f"the step grow by {largest:.3g} a step, not below 1. Published: {', '.join(CONTROLLERS)}."
        )
    return filter


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
        filter: the exponents (β₁, β₂, β₃) of the errors of the last three steps, times the order: a
            controller, see `CONTROLLERS`; "pi" by default.
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
    filter: tuple[float, float, float] = (0.85, -0.2, 0.0)
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


class Attempt(NamedTuple):
    """A step to try, for each sample, (B,)."""

    size: Any  # > 0; 0 where the sample is at its end
    end: Any  # the time it leads to
    reaches: Any  # whether that is the sample's end
    active: Any  # whether the sample is not there yet


class Decision(NamedTuple):
    """What became of an attempt, for each sample, (B,)."""

    keep: Any  # the step is taken
    failed: Any  # something in it was not finite; then no sample takes its step
    refused: Any  # it counts as rejected
    stuck: Any  # no smaller step is left
    step: Any  # the step to try next
    errors: Any  # of the last two steps taken, (2, B)
    rejected: Any  # whether the last attempt that counted was rejected


def plan(xp: Any, time: Any, step: Any, end: Any, forward: float, control: Control) -> Attempt:
    """The next attempt of each sample, from arrays (B,) of `xp`, numpy or torch.

    Args:
        xp: numpy or torch.
        time: where the samples stand.
        step: the step to try, positive.
        end: each sample's end.
        forward: 1, or −1 where time decreases.
        control: the limits.
    """
    left = (end - time) * forward
    # Stretched by 1 % rather than leaving a sliver for another step.
    reaches = (step * 1.01 >= left) & (left <= control.longest)
    size = xp.where(reaches, left, step)
    return Attempt(size, xp.where(reaches, end, time + forward * size), reaches, left > 0)


def decide(
    xp: Any,
    attempt: Attempt,
    error: Any,
    time: Any,
    step: Any,
    errors: Any,
    rejected: Any,
    order: int,
    control: Control,
) -> Decision:
    """Which steps are kept, and what to try next; the same rule for numpy and torch.

    Args:
        xp: numpy or torch.
        attempt: what was tried.
        error: its error over the tolerance, (B,).
        time: where it began.
        step: the step that would have been tried, had the end not been nearer.
        errors: of the last two steps taken, (2, B).
        rejected: whether the attempt before was rejected.
        order: of the method.
        control: the limits.
    """
    size, active = attempt.size, attempt.active
    failed = active & ~xp.isfinite(error)
    # Where some sample fails, only it changes: no infinity may enter the gradients of the others.
    sound = ~failed.any()
    keep = active & sound & (error <= 1)
    if control.min_step > 0:
        keep = keep | (active & sound & (size <= control.min_step * 1.01))
    refused = xp.where(sound, active & ~keep, failed)
    proposal, error = next_step(xp, attempt, error, step, errors, keep, rejected, order, control)
    step = xp.where(failed, size * control.shrink, xp.where(active & sound, proposal, step))
    errors = xp.where(keep, xp.stack([error, errors[0]]), errors)
    rejected = xp.where(sound, refused, rejected | failed)
    info = xp.finfo(time.dtype)
    smallest = 4 * info.eps * xp.clip(abs(xp.where(keep, attempt.end, time)), 1e8 * info.tiny, None)
    stuck = (active & (attempt.end == time)) | (refused & (step <= smallest))
    stuck = stuck | (failed & (size <= control.min_step))
    return Decision(keep, failed, refused, stuck, step, errors, rejected)


def next_step(
    xp: Any,
    attempt: Attempt,
    error: Any,
    step: Any,
    errors: Any,
    keep: Any,
    rejected: Any,
    order: int,
    control: Control,
) -> tuple[Any, Any]:
    r"""The step to try next, and the error to remember, for each sample, (B,).

    After a step taken it is h · safety · e_n^(−β₁/p) e_{n−1}^(−β₂/p) e_{n−2}^(−β₃/p), with e the errors over
    the tolerance and p the method's order: the estimate, of order p − 1, is a number times h^p.
    """
    first, second, third = (b / order for b in control.filter)
    error = xp.clip(error, 1e-10, None)
    # A rejected step shrinks by its own error alone, and its successor must not grow.
    factor = error**-first
    for beta, before in zip((second, third), (errors[0], errors[1]), strict=True):
        if beta:
            factor = factor * before**-beta
    factor = xp.where(keep, factor, error ** (-1 / order))
    factor = xp.clip(control.safety * factor, control.shrink, control.grow)
    factor = xp.where(rejected | ~keep, xp.clip(factor, None, 1.0), factor)
    # A step cut short by the end says little about the one that the tolerance allows.
    proposal = attempt.size * factor
    proposal = xp.where(keep & attempt.reaches, xp.maximum(proposal, step), proposal)
    return xp.clip(proposal, control.min_step, control.max_step), error
