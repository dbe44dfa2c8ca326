r"""One Runge-Kutta step.

With a tableau (A, b, c), a step of size h on x' = f(t, x) is

    k_i = f(t + c_i h, x + h Σ_j a_ij k_j),        x⁺ = x + h Σ_i b_i k_i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resode.solve.host import address, plain
from resode.tableaus import ButcherTableau, Row

Time = float | Tensor
"""A time or a step size: a float, a 0-D tensor, or one entry a sample, shape (B, 1, …, 1)."""

Field = Callable[[Time, Tensor], Tensor]
"""f(t, x) -> dx/dt, of x's shape."""


def combine(x: Tensor, h: Time, row: Row, k: Sequence[Tensor]) -> Tensor:
    r"""State x + h Σ c_i k_i over the (i, c_i) of `row`, in x's dtype.

    A single coefficient 1 is written as on paper, x + h * k, so that an Euler step is a hand-written
    residual block to the bit. A float h goes into the kernels' own scaling: no temporaries.
    """
    if not row:
        return x
    if len(row) == 1 and row[0][1] == 1.0:
        return x + h * k[row[0][0]]
    if isinstance(h, Tensor):
        return torch.addcmul(x, _weighted(row, k), h)
    for i, c in row:
        x = torch.add(x, k[i], alpha=h * c)
    return x


def increment(h: Time, row: Row, k: Sequence[Tensor]) -> Tensor:
    r"""Sum h Σ c_i k_i over the (i, c_i) of `row`, which is not empty."""
    if isinstance(h, Tensor):
        return h * _weighted(row, k)
    (first, c), *rest = row
    total = k[first] * (h * c)
    for i, c in rest:
        total = torch.add(total, k[i], alpha=h * c)
    return total


def _weighted(row: Row, k: Sequence[Tensor]) -> Tensor:
    """The sum Σ c_i k_i."""
    (first, c), *rest = row
    total = k[first] * c
    for i, c in rest:
        total = torch.add(total, k[i], alpha=c)
    return total


def stages(
    tableau: ButcherTableau,
    f: Field,
    times: Sequence[Time],
    x: Tensor,
    h: Time,
    k0: Tensor | None = None,
) -> list[Tensor]:
    """The stages k_i that x⁺ needs, at their times t + c_i h; `k0` is f(t, x) where it is known.

    Trailing stages without weight (the last one of a first-same-as-last method) are left out.
    """
    k = [f(times[0], x) if k0 is None else k0]
    for i in range(1, tableau.b_row[-1][0] + 1):
        k.append(f(times[i], combine(x, h, tableau.a_rows[i], k)))
    return k


def explicit_step(
    tableau: ButcherTableau,
    f: Field,
    times: Sequence[Time],
    x: Tensor,
    h: Time,
    k0: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The stages that x⁺ needs, at their times t + c_i h, and x⁺; `k0` is f(t, x) where it is known.

    Of a method with a recurrence, the first stage alone.
    """
    if tableau.recurrence is not None:
        return recurrence_step(tableau, f, times, x, h, k0)
    k = stages(tableau, f, times, x, h, k0)
    return k, combine(x, h, tableau.b_row, k)


def recurrence_step(
    tableau: ButcherTableau,
    f: Field,
    times: Sequence[Time],
    x: Tensor,
    h: Time,
    k0: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """As `explicit_step`, in which rounding does not grow with the stages: two of them are held at a time."""
    k = k0 = f(times[0], x) if k0 is None else k0
    before = d = torch.zeros_like(x)
    total: Tensor | None = None
    for j, (mu, nu, slope, at_start) in enumerate(tableau.recurrence_rows):
        if j:
            k = f(times[j], x + d)
        rise = slope * k + at_start * k0 if at_start else slope * k
        before, d = d, mu * d + nu * before + h * rise
        if (w := tableau.recurrence_sum[j]) != 0:
            total = w * d if total is None else torch.add(total, d, alpha=w)
    assert total is not None
    return [k0], x + total


def rk_step(tableau: ButcherTableau, f: Field, t: Time, x: Tensor, h: Time) -> Tensor:
    """The state one step later.

    Args:
        tableau: an explicit method.
        f: the field, f(t, x) of x's shape.
        t: the step's start.
        x: state, shape (*state).
        h: step size, negative to go back in time.

    Returns:
        x⁺, shape (*state).

    Example:
        >>> from resode.tableaus import METHODS
        >>> rk_step(METHODS["rk4"], lambda t, x: -x, 0.0, torch.ones(1), 1.0)
        tensor([0.3750])
    """
    times = [t + c * h if c else t for c in tableau.stage_times]
    return explicit_step(tableau, f, times, x, h)[1]


def moved_along(f: Field, t: Time, x: Tensor, dt: Tensor) -> Tensor:
    """The state dt later, by the midpoint rule: for a dt that is 0, with its first and second derivative."""
    return x + dt * f(t + 0.5 * dt, x + 0.5 * dt * f(t, x))


def as_stage(dx: object, x: Tensor) -> Tensor:
    """What a field returned, as a stage in x's dtype; refused where it is no derivative of x.

    Under autocast a field may return a lower precision; the state keeps its own.

    Raises:
        TypeError: not a tensor, or another dtype outside autocast.
        ValueError: another shape or device.
    """
    if not isinstance(dx, Tensor):
        raise TypeError(f"a field must return a tensor of the state's shape, got {type(dx).__name__}.")
    if dx.shape != x.shape:
        raise ValueError(
            f"a field must keep the state's shape: got x {tuple(x.shape)}, F(x) {tuple(dx.shape)}. "
            "Change width or resolution between groups of blocks (resode.shortcuts), not inside F."
        )
    if dx.device != x.device:
        raise ValueError(
            f"a field must stay on the state's device: x is on {x.device}, F(x) on {dx.device}. "
            "Move the field's parameters and constants there with .to(x.device)."
        )
    if dx.dtype != x.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"a field must keep the state's dtype: x is {x.dtype}, F(x) {dx.dtype}. "
                "Convert the field's parameters and constants with .to(x.dtype)."
            )
        dx = dx.to(x.dtype)
    return dx


class Counted:
    """A field that counts its calls and refuses results that are no derivative of the state.

    A field may write each result into one buffer: where a step needs several results at a time, the first
    is copied, and so are all where the second turns up in the same memory.

    Args:
        f: the field.
        several: whether a step needs several results at a time.
    """

    def __init__(self, f: Callable[[Any, Tensor], Any], several: bool = True):
        self.f, self.several = f, several
        self.calls = 0
        self.first: Tensor | None = None
        self.place: int | None = None
        self.version, self.copies = 0, False

    def __call__(self, t: Any, x: Tensor) -> Tensor:
        """f(t, x), in x's dtype."""
        self.calls += 1
        return self.kept(as_stage(self.f(t, x), x))

    def kept(self, dx: Tensor) -> Tensor:
        """A result of the field, which no later one writes over."""
        return dx.clone() if self.several and self._is_reused(dx) else dx

    def _is_reused(self, dx: Tensor) -> bool:
        """Whether func may write its next result over this one."""
        if self.copies or torch.compiler.is_compiling():
            return True
        if self.first is None:
            self.first, self.place, self.version = dx.detach(), address(dx), _version(dx)
            return True
        # The first is still held, so that no other tensor can lie where it does.
        if self.place is None or address(dx) != self.place:
            return False
        self.copies = True
        if self.calls > 2 and _version(dx) != self.version:
            raise ValueError(
                "a field must return a new tensor each time, or write into one buffer; func took turns with "
                "several, and has written over a result that is still needed. Return a copy, dy.clone()."
            )
        return True


def _version(x: Tensor) -> int:
    """How often a tensor was written into; torch does not count it in inference mode."""
    return 0 if x.is_inference() else x._version


def all_finite(x: Tensor) -> bool:
    """Whether x holds no infinity and no NaN; an extremum is one if any entry is, and costs less to find."""
    if x.numel() == 0:
        return True
    x = plain(x)
    low, high = torch.aminmax(torch.view_as_real(x) if x.is_complex() else x)
    return math.isfinite(low.item()) and math.isfinite(high.item())
