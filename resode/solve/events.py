r"""Solving until an event, and the gradient of its time.

An event is a zero of c(t, y), or a time at which a c of booleans flips. Every step is looked at in eighths,
so that two zeros within a step are seen where an eighth's end lies between them; the first is taken. At the
event time τ, c(τ, y(τ)) = 0 gives, with ċ = ∂c/∂t + ∂c/∂y · f,

    dτ = − dc / ċ,        dy(τ) = dy|_τ fixed + f(τ, y) dτ,

where dc is the change of c at fixed time, through y and through the parameters of c.

Source:
    Chen, Amos & Nickel, Learning Neural Event Functions for Ordinary Differential Equations (2021);
    Oliveira & Takahashi, An Enhancement of the Bisection Method Average Performance Preserving Minmax
    Optimality, ACM TOMS 47 (2020): the search for the zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.solve.adaptive import Adaptive
from resode.solve.control import Callbacks
from resode.solve.fixed import Grid, one_step
from resode.solve.foreign import foreign_methods, stops_at_events
from resode.solve.host import decided, is_transformed, moves, plain
from resode.solve.implicit.steps import step_rule
from resode.solve.native import (
    Evaluations,
    call_torchdiffeq,
    fixed_field,
    segments,
    zero_with_gradient,
)
from resode.solve.options import SolveSettings
from resode.solve.result import MaxStepsReached, NonFiniteState, Stats
from resode.solve.step import Field, all_finite
from resode.tableaus import ButcherTableau

Event = Callable[[Tensor, Any], Any]
"""c(t, y), one number, of a 0-D t and the state."""


PARTS = 8
"""An event's sign is looked at this often within a step."""


def combined(event_fn: Callable[..., Any], t0: Tensor, y0: Any) -> Event:
    """One number that starts positive and first reaches 0 where some entry of event_fn does.

    It is 0 from the start where an entry is.

    Raises:
        TypeError, ValueError: event_fn gives no finite tensor.
    """
    with torch.no_grad():
        first = event_fn(t0, y0)
    if not isinstance(first, Tensor):
        raise TypeError(f"event_fn must return a tensor, got {type(first).__name__}.")
    if first.numel() == 0 or not torch.isfinite(first).all():
        raise ValueError(
            f"event_fn must be finite and not empty at t[0]; got {first.tolist()} at t={float(t0):.9g}."
        )
    signs = torch.sign(signed(first))
    return lambda t, y: torch.min(signed(event_fn(t, y)) * signs)


def signed(c: Tensor) -> Tensor:
    """An event's values; of booleans 1 and −1, whose zero is where they flip."""
    return 2 * c.to(torch.int8) - 1 if c.dtype == torch.bool else c


def solve_to_event(
    func: Callable[..., Any],
    y0: Tensor,
    t: Tensor,
    settings: SolveSettings,
    event: Event,
    callbacks: Callbacks | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """The event's time (0-D, without gradient), the states at t[0] and there (2, *state), the cost.

    Args:
        func: the field of (t, y).
        y0: the state at t[0].
        t: two times: the start, and one that gives the direction.
        settings: the method and its options.
        event: positive at the start.
        callbacks: told of every step.

    Raises:
        MaxStepsReached: no event.
    """
    counted = Evaluations(func)
    if isinstance(settings.method, str):
        time, path = _by_torchdiffeq(counted, y0, t, settings, event, callbacks)
        return time.detach().to(t.dtype), path, Stats(counted.calls, None, None, None)
    run = _fixed if settings.fixed else _adaptive
    time, y, n_steps = run(counted, y0, t, settings.method, settings, event, callbacks)
    stats = Stats(counted.calls, *n_steps)
    return torch.tensor(time, dtype=t.dtype, device=t.device), torch.stack([y0, y]), stats


def _by_torchdiffeq(
    counted: Evaluations,
    y0: Tensor,
    t: Tensor,
    settings: SolveSettings,
    event: Event,
    callbacks: Callbacks | None,
) -> tuple[Tensor, Tensor]:
    if not stops_at_events(str(settings.method)):
        able = [name for name in foreign_methods() if stops_at_events(name)]
        raise ValueError(
            f"{settings.method!r} can't stop at an event; use a method of resode's or {', '.join(able)}."
        )
    return call_torchdiffeq(counted, y0, t, settings, callbacks, event_fn=event)


def _adaptive(
    counted: Evaluations,
    y0: Tensor,
    t: Tensor,
    tableau: ButcherTableau,
    settings: SolveSettings,
    event: Event,
    callbacks: Callbacks | None,
) -> tuple[float, Tensor, tuple[int, int, int]]:
    control, real = settings.control(y0, callbacks), y0.dtype.to_real()
    start, forward = float(plain(t)[0]), 1 if t[1] > t[0] else -1
    y = y0
    if moves(t):
        y = y - counted(t[0].detach().to(y0.device, real), y) * zero_with_gradient(t[0], real)
    if value_of(event, start, y0) <= 0:
        return start, y, (0, 0, 0)
    progress = None
    for times, _, f in segments(counted, np.array([start, forward * math.inf]), settings, real):
        solve = Adaptive(tableau, f, y, times[0], times[-1], control, progress)
        for step in solve.steps():
            k0, k1 = step.slopes
            within = Within(step.start.item(), step.end.item(), step.x, k0, step.x_end, k1)
            at = within.ending(_step_to(tableau, f, within.begin, step.x, k0))
            if (time := within.first_zero(event, at)) is not None:
                accepted, rejected = solve.progress.n_accepted.item(), solve.progress.n_rejected.item()
                return time, at(time), (accepted + rejected, accepted, rejected)
        y, progress = solve.x, solve.progress
    raise AssertionError("the last segment has no end")


def _fixed(
    counted: Evaluations,
    y0: Tensor,
    t: Tensor,
    tableau: ButcherTableau,
    settings: SolveSettings,
    event: Event,
    callbacks: Callbacks | None,
) -> tuple[float, Tensor, tuple[int, int, int]]:
    size = settings.step_size if settings.step_size is not None else settings.options.get("step_size")
    if size is None:
        raise ValueError(f"{tableau.name} takes fixed steps: to find an event it needs step_size.")
    grid: Grid | None = settings.grid()
    perturb = bool(settings.options.get("perturb", False))
    callback = None if callbacks is None else callbacks.step
    begin, direction = plain(t).tolist()
    start, h = begin, math.copysign(float(size), direction - begin)
    field = fixed_field(counted, y0, -math.inf, math.inf, False)
    y, take = y0, step_rule(tableau, False)
    if moves(t):
        y = y - field(start, y) * zero_with_gradient(t[0], y0.dtype.to_real())
    if value_of(event, start, y0) <= 0:
        return start, y, (0, 0, 0)
    for n in range(1, settings.max_steps + 1):
        begin, end = start + (n - 1) * h, start + n * h
        y1, k0 = one_step(tableau, field, begin, y, h, callback, perturb, take)
        if not all_finite(y1):
            raise NonFiniteState(
                f"the state is infinite or NaN at t={end:.9g}, before an event, with steps of {size:g}: "
                "take smaller ones, or check the field.",
                time=end,
                step_size=float(size),
            )
        within = Within(begin, end, y, k0, y1)
        at = _along(grid, field, within) if grid else _step_to(tableau, field, begin, y, k0)
        at = within.ending(at)
        if (time := within.first_zero(event, at)) is not None:
            return time, at(time), (n, n, 0)
        y = y1
    raise MaxStepsReached(
        f"max_steps={settings.max_steps} steps of {size:g} met no event; they ended at t={begin + h:.9g}. "
        "Check event_fn's sign and t's direction, take larger steps, or raise max_steps.",
        time=begin + h,
        step_size=float(size),
    )


@dataclass
class Within:
    """A step, as the search for events within it needs it.

    Args:
        begin: where it starts.
        end: where it ends.
        x: the state at the start.
        k0: F there.
        x1: the state at the end.
        k1: F there, where it is known.
    """

    begin: float
    end: float
    x: Tensor
    k0: Tensor
    x1: Tensor
    k1: Tensor | None = None

    def ending(self, at: Callable[[float], Tensor]) -> Callable[[float], Tensor]:
        """The states within, `at`, with the step's own at its end."""
        return lambda time: self.x1 if time == self.end else at(time)

    @cached_property
    def grid(self) -> list[float]:
        """The ends of its parts."""
        size = self.end - self.begin
        return [*(self.begin + i / PARTS * size for i in range(PARTS)), self.end]

    @cached_property
    def states(self) -> list[Tensor]:
        """The states there, roughly between: on the polynomial through both ends with their slopes."""
        with torch.no_grad():
            h = self.end - self.begin
            s = torch.arange(1, PARTS, dtype=torch.float64) / PARTS
            if self.k1 is None:
                rows, known = [1 - s**2, s - s**2, s**2], [self.x, h * self.k0, self.x1]
            else:
                rows = [(1 + 2 * s) * (1 - s) ** 2, s * (1 - s) ** 2, s**2 * (3 - 2 * s), s**3 - s**2]
                known = [self.x, h * self.k0, self.x1, h * self.k1]
            inner = torch.stack(rows, 1).to(self.x) @ torch.stack(known).reshape(len(known), -1)
            return [self.x, *inner.reshape(-1, *self.x.shape), self.x1]

    def first_zero(self, event: Event, at: Callable[[float], Tensor]) -> float | None:
        """The first time at which an event, positive at the start, reaches 0; None where it does not.

        Args:
            event: positive at the start.
            at: the states within.
        """
        for i in range(PARTS):
            if value_of(event, self.grid[i + 1], self.states[i + 1]) <= 0:
                if (time := self.zero(event, at, i)) is not None:
                    return time
        return None

    def zero(self, event: Event, at: Callable[[float], Tensor], part: int) -> float | None:
        """Where the event falls to 0, by rough states in a part; None where exact ones have no zero."""
        a, b = part, part + 1

        def value(time: float) -> float:
            return value_of(event, time, at(time))

        while (after := value(self.grid[b])) > 0 and b < PARTS:
            a, b = b, b + 1
        while (before := value(self.grid[a])) <= 0 and a > 0:
            a, b, after = a - 1, a, before
        return root(value, self.grid[a], self.grid[b], before, after) if before > 0 >= after else None


def _along(grid: Grid, f: Field, step: Within) -> Callable[[float], Tensor]:
    """The state at a time within a step of a grid: as the grid interpolates."""
    return lambda time: grid.between(f, time, step.begin, step.x, step.k0, step.end, step.x1)


def _step_to(
    tableau: ButcherTableau, f: Field, begin: float, x: Tensor, k0: Tensor
) -> Callable[[float], Tensor]:
    """The state at a time within a step: the method's own step from the start to it."""
    take = step_rule(tableau, False)

    def at(time: float) -> Tensor:
        h = time - begin
        real = x.dtype.to_real()
        times = [torch.tensor(begin + c * h, dtype=real, device=x.device) for c in tableau.stage_times]
        return take(tableau, f, times, x, h, k0)[1]

    return at


def value_of(event: Event, time: float, y: Tensor) -> float:
    """The event's value, without gradient."""
    with torch.no_grad():
        c = event(torch.tensor(time, dtype=y.dtype.to_real(), device=y.device), y)
    if isinstance(c, Tensor):
        if c.numel() != 1:
            raise ValueError(
                f"an event must return one number, got a tensor of shape {tuple(c.shape)}. Give every "
                "entry an event of its own; odeint_event takes them together."
            )
        c = decided(signed(c), "a solve ends where the event's value says")
        c = c if isinstance(c, int | float) else np.array(c).item()
    elif isinstance(c, bool):
        c = 2 * c - 1
    value = float(c)
    if math.isnan(value):
        raise ValueError(
            f"event_fn must return numbers, got NaN at t={time:.9g}. Keep it defined past the event."
        )
    return value


def root(value: Callable[[float], float], a: float, b: float, before: float, after: float) -> float:
    """A time, to rounding, at which a function that is before > 0 at a and after ≤ 0 at b comes to be ≤ 0.

    Only its sign is relied on, so a zero of any order, a jump and a function that stays 0 are found in as
    many evaluations as by halving, and one more; a smooth simple zero in few. (The ITP method, with κ₁ = 0.2
    over the width, κ₂ = 2 and n₀ = 1.)
    """
    tiny = 4 * 2.0**-52 * max(abs(a), abs(b), 2.0**-1000)
    width = abs(b - a)
    flat = False
    slack = tiny * 2.0 ** math.ceil(math.log2(max(width / tiny, 1.0)))
    while (size := abs(b - a)) > tiny:
        middle = a + 0.5 * (b - a)
        s = middle
        if after < 0 and math.isfinite(before) and math.isfinite(after):
            s = a + (b - a) * (before / (before - after))
            shift = 0.2 * size * size / width  # towards the middle, past the zero: both ends then close in
            s = middle if shift >= abs(middle - s) else s + math.copysign(shift, middle - s)
            reach = max(slack - 0.5 * size, 0.0)
            if abs(s - middle) > reach:
                s = middle + math.copysign(reach, s - middle)
        if s in (a, b):
            s = middle
        if s in (a, b):
            break
        if (c := value(s)) > 0:
            a, before = s, c
        else:
            b, after = s, c
            # An exact zero is the one looked for, unless the function is 0 before it, too.
            if c == 0 and not flat:
                if value(s + math.copysign(min(tiny, size / 2), a - s)) > 0:
                    break
                flat = True
        slack *= 0.5
    return b


class _WithoutGradient(torch.autograd.Function):
    """Passes tensors on; asking for their gradient is an error."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Any:
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError(
            "the event's time has no gradient: event_fn does not change along the solution there, as a "
            "comparison, an integer or a constant does not. Give a function that passes through 0, such as "
            "y - 0.5 for y > 0.5, or detach the event's time and state."
        )


def with_event_gradient(
    func: Callable[..., Any],
    event_fn: Callable[..., Any],
    event_t: Tensor,
    y: Any,
    start: tuple[Tensor, Any],
) -> tuple[Tensor, Any]:
    """The event's time and state, as they were, with the gradients of the implicit function.

    Args:
        func: the field of (t, y).
        event_fn: as the user gave it.
        event_t: the event's time, 0-D.
        y: the state there, a tensor or a tuple, differentiable at fixed time.
        start: (t[0], y0), which settle the event's sign.
    """
    parts: Sequence[Tensor] = y if isinstance(y, tuple) else (y,)

    def rebuild(parts: Sequence[Tensor]) -> Any:
        return tuple(parts) if isinstance(y, tuple) else parts[0]

    real = parts[0].dtype.to_real()
    time = event_t.detach().to(parts[0].device, real)
    slope = func(time, y)
    slopes = [d.detach() for d in (slope if isinstance(y, tuple) else (slope,))]
    event = combined(event_fn, start[0].detach().to(time), start[1])
    way = float(time - start[0].detach())
    if way == 0:
        return event_t, y
    # Where c has no slope at its zero, as relu(y) and (y − 1)³ have none, it is taken a little before.
    unit = math.copysign(16 * torch.finfo(real).eps * max(abs(float(time)), abs(way)), way)
    for shift in (0.0, unit, 64 * unit):
        s, at = time - shift, [p - shift * d for p, d in zip(parts, slopes, strict=True)]
        if (rate := _rate(event, s, at, slopes, rebuild)) != 0:
            break
    else:
        moving = (event_t, *parts)
        if torch.is_grad_enabled() and any(p.requires_grad for p in parts):
            moving = _WithoutGradient.apply(*moving)
        return moving[0], rebuild(moving[1:])
    change = event(s, rebuild(at))
    change = (change - change.detach()) / rate
    event_t = event_t.detach() - change.to(event_t)
    return event_t, rebuild([p - d * change.to(real) for p, d in zip(parts, slopes, strict=True)])


def _rate(
    event: Event,
    time: Tensor,
    parts: Sequence[Tensor],
    slopes: Sequence[Tensor],
    rebuild: Callable[[Sequence[Tensor]], Any],
) -> Tensor:
    """The event's change in time along the solution, ċ, without gradient."""
    if any(map(is_transformed, parts)):
        ones = torch.ones_like(time)
        return torch.func.jvp(lambda s, *at: event(s, rebuild(at)), (time, *parts), (ones, *slopes))[
            1
        ].detach()
    with torch.enable_grad():
        s, at = time.clone().requires_grad_(), [p.detach().requires_grad_() for p in parts]
        value = event(s, rebuild(at))
        if not value.requires_grad:
            return torch.zeros_like(time)
        rate, *rates = torch.autograd.grad(value, (s, *at), allow_unused=True, materialize_grads=True)
    return rate + sum((r.conj() * d).real.sum() for r, d in zip(rates, slopes, strict=True))
