r"""Solving until an event, and the gradient of its time.

An event is a zero of c(t, y). At the event time τ, c(τ, y(τ)) = 0 gives, with ċ = ∂c/∂t + ∂c/∂y · f,

    dτ = − dc / ċ,        dy(τ) = dy|_τ fixed + f(τ, y) dτ,

where dc is the change of c at fixed time, through y and through the parameters of c.

Source:
    Chen, Amos & Nickel, Learning Neural Event Functions for Ordinary Differential Equations (2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy  # whose submodules are loaded when first named
import torch
from torch import Tensor

from resode.solve.adaptive import Adaptive
from resode.solve.control import Callbacks
from resode.solve.fixed import Grid, one_step
from resode.solve.foreign import foreign_methods, stops_at_events
from resode.solve.native import (
    Evaluations,
    call_torchdiffeq,
    fixed_field,
    segments,
    zero_with_gradient,
)
from resode.solve.options import SolveSettings
from resode.solve.result import MaxStepsReached, NonFiniteState, Stats
from resode.solve.step import Field, all_finite, combine, stages
from resode.tableaus import ButcherTableau

Event = Callable[[Tensor, Any], Tensor]
"""c(t, y) of a 0-D t and the state."""


def combined(event_fn: Callable[..., Any], t0: Tensor, y0: Any) -> Event:
    """One number that starts positive and first reaches 0 where some entry of event_fn does.

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
    signs = torch.sign(first)
    return lambda t, y: torch.min(event_fn(t, y) * signs)


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
    start, forward = float(t[0].detach()), 1 if t[1] > t[0] else -1
    y = y0
    if t.requires_grad:
        y = y - counted(t[0].detach().to(y0.device, real), y) * zero_with_gradient(t[0], real)
    if value_of(event, start, y0) <= 0:
        return start, y, (0, 0, 0)
    progress = None
    for times, _, f in segments(counted, np.array([start, forward * math.inf]), settings, real):
        solve = Adaptive(tableau, f, y, times[0], times[-1], control, progress)
        for step in solve.steps():
            begin, end = step.start.item(), step.end.item()
            if value_of(event, end, step.x_end) <= 0:
                at = _step_to(tableau, f, begin, step.x, step.k[0])
                time = root(event, at, begin, end)
                accepted, rejected = solve.progress.n_accepted.item(), solve.progress.n_rejected.item()
                counts = (accepted + rejected, accepted, rejected)
                return time, step.x_end if time == end else at(time), counts
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
    begin, direction = t.detach().tolist()
    start, h = begin, math.copysign(float(size), direction - begin)
    field = fixed_field(counted, y0, -math.inf, math.inf, False)
    y = y0
    if t.requires_grad:
        y = y - field(start, y) * zero_with_gradient(t[0], y0.dtype.to_real())
    if value_of(event, start, y0) <= 0:
        return start, y, (0, 0, 0)
    for n in range(1, settings.max_steps + 1):
        begin, end = start + (n - 1) * h, start + n * h
        y1, k0 = one_step(tableau, field, begin, y, h, callback, perturb)
        value = value_of(event, end, y1)
        if not all_finite(y1):
            raise NonFiniteState(
                f"the state is infinite or NaN at t={end:.9g}, before an event, with steps of {size:g}: "
                "take smaller ones, or check the field.",
                time=end,
                step_size=float(size),
            )
        if value <= 0:
            at = (
                _step_to(tableau, field, begin, y, k0)
                if grid is None
                else _along(grid, field, begin, y, k0, end, y1)
            )
            time = root(event, at, begin, end)
            return time, y1 if time == end else at(time), (n, n, 0)
        y = y1
    raise MaxStepsReached(
        f"max_steps={settings.max_steps} steps of {size:g} met no event; they ended at t={begin + h:.9g}. "
        "Check event_fn's sign and t's direction, take larger steps, or raise max_steps.",
        time=begin + h,
        step_size=float(size),
    )


def _along(
    grid: Grid, f: Field, begin: float, x: Tensor, k0: Tensor, end: float, x1: Tensor
) -> Callable[[float], Tensor]:
    """The state at a time within a step of a grid: as the grid interpolates."""
    return lambda time: grid.between(f, time, begin, x, k0, end, x1)


def _step_to(
    tableau: ButcherTableau, f: Field, begin: float, x: Tensor, k0: Tensor
) -> Callable[[float], Tensor]:
    """The state at a time within a step: the method's own step from the start to it."""

    def at(time: float) -> Tensor:
        h = time - begin
        real = x.dtype.to_real()
        times = [torch.tensor(begin + c * h, dtype=real, device=x.device) for c in tableau.stage_times]
        return combine(x, h, tableau.b_row, stages(tableau, f, times, x, h, k0))

    return at


def value_of(event: Event, time: float, y: Tensor) -> float:
    """The event's value, without gradient."""
    with torch.no_grad():
        c = event(torch.tensor(time, dtype=y.dtype.to_real(), device=y.device), y)
        value = float(c.detach() if isinstance(c, Tensor) else c)
    if math.isnan(value):
        raise ValueError(
            f"event_fn must return numbers, got NaN at t={time:.9g}. Keep it defined past the event."
        )
    return value


def root(event: Event, at: Callable[[float], Tensor], begin: float, end: float) -> float:
    """The time between begin (event > 0) and end (event ≤ 0) at which the event reaches 0."""
    with torch.no_grad():
        ends = {begin: 1.0, end: value_of(event, end, at(end))}
        if ends[end] >= 0:
            return end
        ends[begin] = value_of(event, begin, at(begin))
        if ends[begin] <= 0:
            return begin
        tiny = 4 * 2.0**-52 * max(abs(begin), abs(end))

        def value(s: float) -> float:
            return ends[s] if s in ends else value_of(event, s, at(s))

        return float(scipy.optimize.brentq(value, begin, end, xtol=tiny, rtol=4 * 2.0**-52))


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
    with torch.no_grad():
        slope = func(time, rebuild([p.detach() for p in parts]))
    slopes = slope if isinstance(y, tuple) else (slope,)
    event = combined(event_fn, start[0].detach().to(time), start[1])
    with torch.enable_grad():
        s = time.clone().requires_grad_()
        at = [p.detach().requires_grad_() for p in parts]
        value = event(s, rebuild(at))
        if not value.requires_grad:
            return event_t, y
        rate, *rates = torch.autograd.grad(value, (s, *at), allow_unused=True, materialize_grads=True)
        rate = rate + sum((r.conj() * d).real.sum() for r, d in zip(rates, slopes, strict=True))
    # A grazing event (rate 0) has no gradient; the floor keeps its time finite.
    rate = torch.where(rate.abs() < 1e-12, rate.new_tensor(1e-12), rate)
    change = event(time, y)
    change = (change - change.detach()) / rate
    event_t = event_t.detach() - change.to(event_t)
    return event_t, rebuild([p - d * change.to(real) for p, d in zip(parts, slopes, strict=True)])
