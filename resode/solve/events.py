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

from resode.jacobian.products import first_jvp
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
from resode.solve.step import Field, all_finite, moved_along
from resode.tableaus import ButcherTableau

Event = Callable[[Tensor, Any], Any]
"""c(t, y), one number, of a 0-D t and the state."""


ON_VALUES = (
    "a solve ends where the event's value says",
    "Solve the batch in one call: odeint_event with per_sample=True gives each sample its own event.",
)

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
    if first.numel() == 0 or not all_finite(first):
        raise ValueError(
            f"event_fn must be finite and not empty at t[0]; got {first.tolist()} at t={float(t0):.9g}."
        )
    signs = torch.sign(signed(first))
    signs = torch.where(signs == 0, 1, signs)  # the solve ends there, whatever they are
    return lambda t, y: torch.min(signed(event_fn(t, y)) * signs)


def signed(c: Tensor) -> Tensor:
    """An event's values; of booleans 1 and −1, whose zero is where they flip.

    Raises:
        TypeError: they are complex, and have no sign.
    """
    if c.is_complex():
        raise TypeError(f"an event must return real numbers, whose sign counts; got {c.dtype}.")
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
        y = moved_along(counted, t[0].to(y0.device, real), y, -zero_with_gradient(t[0], real))
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
        real = y0.dtype.to_real()
        y = moved_along(field, t[0].to(y0.device, real), y, -zero_with_gradient(t[0], real))
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


def between_ends(h: Any, x: Tensor, k0: Tensor, x1: Tensor, k1: Tensor | None) -> list[Tensor]:
    """The states at the ends of a step's parts, on the polynomial through both ends with their slopes.

    Args:
        h: the step, signed; a number, or one a sample that broadcasts to x.
        x: the state at the start.
        k0: F there.
        x1: the state at the end.
        k1: F there, where it is known.
    """
    with torch.no_grad():
        s = torch.arange(1, PARTS, dtype=torch.float64) / PARTS
        if k1 is None:
            rows, known = [1 - s**2, s - s**2, s**2], [x, h * k0, x1]
        else:
            rows = [(1 + 2 * s) * (1 - s) ** 2, s * (1 - s) ** 2, s**2 * (3 - 2 * s), s**3 - s**2]
            known = [x, h * k0, x1, h * k1]
        inner = torch.stack(rows, 1).to(x) @ torch.stack(known).reshape(len(known), -1)
        return [x, *inner.reshape(-1, *x.shape), x1]


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
        """The states there, roughly between."""
        return between_ends(self.end - self.begin, self.x, self.k0, self.x1, self.k1)

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
        c = decided(signed(c), *ON_VALUES)
        c = c if isinstance(c, int | float) else np.array(c).item()
    elif isinstance(c, bool):
        c = 2 * c - 1
    try:
        value = float(c)
    except (TypeError, ValueError):
        raise TypeError(f"an event must return one number, or yes or no; got {c!r}.") from None
    if math.isnan(value):
        raise ValueError(
            f"event_fn must return numbers, got NaN at t={time:.9g}. Keep it defined past the event."
        )
    return value


def root(value: Callable[[float], float], a: float, b: float, before: float, after: float) -> float:
    """A time, to rounding, at which a function that is before > 0 at a and after ≤ 0 at b comes to be ≤ 0."""
    ends = (np.array([float(s)]) for s in (a, b, before, after))
    return roots(lambda s: np.array([value(s.item())]), *ends).item()


def roots(
    values: Callable[[np.ndarray], np.ndarray],
    a: np.ndarray,
    b: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
) -> np.ndarray:
    """Times at which functions that are before > 0 at a and after ≤ 0 at b come to be ≤ 0, (B,), to rounding.

    Only their signs are relied on, so a zero of any order, a jump and a function that stays 0 are found in as
    many evaluations as by halving, and one more; a smooth simple zero in few. (The ITP method, with κ₁ = 0.2
    over the width, κ₂ = 2 and n₀ = 1.)

    Args:
        values: the functions at a time of each, (B,).
        a: where they are positive.
        b: where they are not; a itself where nothing is looked for.
        before: their values at a.
        after: their values at b.
    """
    a, b, before, after = a.copy(), b.copy(), before.copy(), after.copy()
    tiny = 4 * 2.0**-52 * np.maximum(abs(a), abs(b)).clip(min=2.0**-1000)
    width = abs(b - a)
    slack = tiny * 2.0 ** np.ceil(np.log2((width / tiny).clip(min=1.0)))
    flat, at_zero = np.zeros(len(a), bool), np.zeros(len(a), bool)
    done = width <= tiny
    while not done.all():
        size = abs(b - a)
        middle = a + 0.5 * (b - a)
        with np.errstate(all="ignore"):
            s = a + (b - a) * (before / (before - after))
            shift = 0.2 * size * size / width  # towards the middle, past the zero: both ends then close in
            s = np.where(shift >= abs(middle - s), middle, s + np.copysign(shift, middle - s))
            reach = (slack - 0.5 * size).clip(min=0.0)
            s = np.where(abs(s - middle) > reach, middle + np.copysign(reach, s - middle), s)
            straight = (after < 0) & np.isfinite(before) & np.isfinite(after)
        s = np.where(straight, s, middle)
        s = np.where((s == a) | (s == b), middle, s)
        # An exact zero is the one looked for, unless the function is 0 before it, too.
        s = np.where(at_zero, b + np.copysign(np.minimum(tiny, 0.5 * size), a - b), s)
        done = done | (s == a) | (s == b)
        s = np.where(done, b, s)
        c = values(s)
        up = ~done & (c > 0)
        down = ~done & ~up
        done = done | (at_zero & up)
        flat = flat | (at_zero & down)
        slack = np.where(at_zero, slack, 0.5 * slack)
        a, before = np.where(up, s, a), np.where(up, c, before)
        b, after = np.where(down, s, b), np.where(down, c, after)
        at_zero = down & (c == 0) & ~flat
        done = done | (abs(b - a) <= tiny)
    return b


class _WithoutGradient(torch.autograd.Function):
    """Passes tensors on; asking for the gradient of the samples marked is an error."""

    @staticmethod
    def forward(none: Tensor, *tensors: Tensor) -> Any:
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.none = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        for grad in grads:
            if grad is not None and (grad[ctx.none] != 0).any():
                raise ValueError(
                    "the event's time has no gradient: event_fn does not change along the solution there, as "
                    "a comparison, an integer or a constant does not. Give a function that passes through 0, "
                    "such as y - 0.5 for y > 0.5, or detach the event's time and state."
                )
        return None, *grads


def with_event_gradient(
    func: Callable[..., Any], event: Event, event_t: Tensor, y: Any, start: Tensor
) -> tuple[Tensor, Any]:
    """The event's time and state, as they were, with the implicit function's derivatives to second order.

    Args:
        func: the field of (t, y).
        event: one number, or with event_t of shape (B,) each sample's own.
        event_t: the event's time, 0-D, or each sample's own, (B,).
        y: the state there, a tensor or a tuple, differentiable at fixed time.
        start: t[0], of event_t's shape.
    """
    parts: Sequence[Tensor] = y if isinstance(y, tuple) else (y,)

    def rebuild(parts: Sequence[Tensor]) -> Any:
        return tuple(parts) if isinstance(y, tuple) else parts[0]

    def beside(s: Tensor, p: Tensor) -> Tensor:  # a number a sample as a factor of its state
        return s.view(-1, *[1] * (p.ndim - 1)) if s.ndim else s

    real = parts[0].dtype.to_real()
    time, began = (s.detach().to(parts[0].device, real) for s in (event_t, start))
    if not any(map(moves, parts)) and not moves(event(beside(time, parts[0]), y)):
        return event_t, y  # nobody asks for a gradient, which event_fn need not have
    slope = func(beside(time, parts[0]), y)
    slopes = [d.detach() for d in (slope if isinstance(y, tuple) else (slope,))]
    way = time - began
    # Where c has no slope at its zero, as relu(y) and (y − 1)³ have none, it is taken a little before.
    unit = torch.copysign(16 * torch.finfo(real).eps * torch.maximum(time.abs(), way.abs()), way)
    shift, rate = torch.zeros_like(time), torch.zeros_like(time)
    for factor in (0.0, 1.0, 64.0):
        s = time - factor * unit
        found = _rate(event, s, [p - beside(time - s, p) * d for p, d in zip(parts, slopes, strict=True)],
                      slopes, rebuild, beside)  # fmt: skip
        shift, rate = torch.where(rate == 0, factor * unit, shift), torch.where(rate == 0, found, rate)
        if (rate != 0).all():
            break
    none = (rate == 0) & (way != 0)
    if none.any() and torch.is_grad_enabled() and any(p.requires_grad for p in parts):
        event_t, *parts = _WithoutGradient.apply(none, event_t, *parts)
    still = rate == 0
    if still.all():
        return event_t, rebuild(parts)
    at = [p - beside(shift, p) * d for p, d in zip(parts, slopes, strict=True)]

    def moved(time: Tensor, parts: Sequence[Tensor], dt: Tensor) -> Any:
        """The state dt later, with derivatives to second order in dt: a step of the midpoint rule."""
        k = slope if isinstance(slope, tuple) else (slope,)
        half = [p + 0.5 * beside(dt, p) * d for p, d in zip(parts, k, strict=True)]
        k = func(beside(time + 0.5 * dt, parts[0]), rebuild(half))
        k = k if isinstance(k, tuple) else (k,)
        return rebuild([p + beside(dt, p) * d for p, d in zip(parts, k, strict=True)])

    # Newton's method from the event's time, whose steps are 0 and have derivatives: the first is right to
    # first order in what the solution depends on, the second to second order.
    dt = torch.zeros_like(time)
    for state in (lambda dt: rebuild(at), lambda dt: moved(time - shift, at, dt)):
        change = event(beside(time - shift + dt, parts[0]), state(dt))
        dt = dt - torch.where(still, 0.0, (change - change.detach()) / torch.where(still, 1.0, rate)).to(dt)
    return event_t + dt.to(event_t), moved(time, parts, dt)


def _rate(
    event: Event,
    time: Tensor,
    parts: Sequence[Tensor],
    slopes: Sequence[Tensor],
    rebuild: Callable[[Sequence[Tensor]], Any],
    beside: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The event's change in time along the solution, ċ, of time's shape, without gradient."""
    at_time = beside(time, parts[0])
    if any(map(is_transformed, parts)):
        first_jvp()
        ones = torch.ones_like(at_time)
        moving = torch.func.jvp(
            lambda s, *at: event(s, rebuild(at)) + 0.0 * s.reshape(time.shape),
            (at_time, *parts),
            (ones, *slopes),
        )
        return moving[1].detach()
    with torch.enable_grad():
        s, at = at_time.clone().requires_grad_(), [p.detach().requires_grad_() for p in parts]
        value = event(s, rebuild(at))
        if not value.requires_grad:
            return torch.zeros_like(time)
        try:
            rate, *rates = torch.autograd.grad(
                value.sum(), (s, *at), allow_unused=True, materialize_grads=True
            )
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            return torch.zeros_like(time)  # as heaviside and other jumps, of which torch has no derivative
    along = [(r.conj() * d).real for r, d in zip(rates, slopes, strict=True)]
    return rate.reshape(time.shape) + sum(c.reshape(*time.shape, -1).sum(-1) for c in along)
