"""Solving one problem whose state is one tensor: by our own solvers, or by torchdiffeq's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.solve.adaptive import adaptive_solve
from resode.solve.checkpoint import Recomputation, checkpointed_solve, checkpointed_steps
from resode.solve.compiled import compiled_solve, compiled_steps
from resode.solve.control import Callbacks
from resode.solve.diagnosis import explain, number, spectrum
from resode.solve.fixed import equal_steps, fixed_solve, grid_solve, opened, own_steps, within
from resode.solve.foreign import foreign_solve
from resode.solve.host import moves, plain
from resode.solve.implicit.compiled import compiled_implicit_solve
from resode.solve.implicit.steps import ImplicitStep, check_implicit, step_rule, steps_by
from resode.solve.options import SolveSettings, tolerances
from resode.solve.result import NonFiniteState, SolverError, Stats
from resode.solve.states import States
from resode.solve.step import Counted, Field, all_finite, as_stage, explicit_step, moved_along
from resode.stability.multistep import ORDER
from resode.tableaus import ButcherTableau

SHARED_TIMES = ("step_t", "jump_t", "step_size", "grid_constructor", "perturb")
"""The options that speak of times that all samples share."""


class Evaluations(Counted):
    """A user's func, counted; what it raises is told where."""

    def __call__(self, t: Any, x: Tensor) -> Tensor:
        """func(t, x), in x's dtype."""
        self.calls += 1
        watched = self.calls == 1 and not x.is_inference()
        version = x._version if watched else 0
        try:
            dx = self.f(t, x)
        except Exception as error:
            if not isinstance(error, SolverError):
                when = f"t={float(plain(t).reshape(-1)[0]):.9g}" if t.numel() else "an empty batch"
                error.add_note(
                    f"resode: func raised this at {when}, call {self.calls}, "
                    f"with a state of shape {tuple(x.shape)} and dtype {x.dtype}."
                )
            raise
        if watched and x._version != version:
            raise ValueError(
                "a field must leave the state as it is; func changed y in place. Write y * a for y.mul_(a), "
                "and nn.ReLU() for nn.ReLU(inplace=True)."
            )
        return self.kept(as_stage(dx, x))


def solve(
    func: Callable[..., Any],
    y0: Tensor,
    t: Tensor,
    settings: SolveSettings,
    callbacks: Callbacks | None = None,
) -> tuple[Tensor, Stats]:
    """The states at t, shape (T, *y0.shape), and what they took.

    Args:
        func: the field of (t, y), t as `odeint` gives it.
        y0: state at t[0], any shape; (B, *state) where settings.per_sample.
        t: times, (T,), monotone; or each sample's own, (T, B), where settings.per_sample.
        settings: the method and its options, checked.
        callbacks: told of every step.
    """
    counted = Evaluations(func)
    if t.ndim > 1 and (not_own := sorted(set(settings.options) & set(SHARED_TIMES))):
        raise ValueError(f"t of shape (T, B) gives each sample its own times: it does not go with {not_own}.")
    if isinstance(settings.method, str):
        return _torchdiffeq(counted, y0, t, settings, callbacks)
    if not settings.method.explicit:
        check_implicit(y0)
    if settings.fixed:
        return _fixed(counted, y0, t, settings.method, settings, callbacks)
    return _adaptive(counted, y0, t, settings.method, settings, callbacks)


def fixed_field(f: Callable[..., Tensor], y0: Tensor, low: Any, high: Any, per_sample: bool) -> Field:
    """The field for steps that are given: s a float or a 0-D tensor, y of y0's shape."""
    real = y0.dtype.to_real()
    shape = (y0.shape[0],) + (1,) * (y0.ndim - 1) if per_sample else ()
    if isinstance(low, Tensor) and low.ndim:
        low, high = (s.to(y0.device).view(shape) for s in (low, high))

    def field(s: Any, y: Tensor) -> Tensor:
        # The last stage's time may lie beyond the end by a rounding; func never sees that.
        s = within(s, low, high)
        if isinstance(s, Tensor):
            return f(s.to(y.device, real).expand(shape), y)
        return f(torch.full(shape, s, dtype=real, device=y.device), y)

    return field


def segments(
    field: Field, points: np.ndarray, settings: SolveSettings, real: torch.dtype
) -> Iterator[tuple[np.ndarray, bool, Field]]:
    """The solve cut at step_t and jump_t: the times of each part, whether its end is asked for, its field.

    On a part that ends at a jump, the field is given times strictly inside. Times of each sample's own,
    (T, B), are not cut, and a single time is no part.
    """
    if points.ndim > 1 or len(points) < 2:
        yield from [(points, True, field)] * (len(points) > 1)
        return
    times: list[float] = points.tolist()
    stops, jumps = settings.stops()
    low, high = sorted((times[0], times[-1]))
    inner = sorted((s for s in stops if low < s < high), reverse=times[0] > times[-1])
    for start, end in pairwise([times[0], *inner, times[-1]]):
        low, high = sorted((start, end))
        inside = [s for s in times if low < s < high]
        f = field
        if start in jumps or end in jumps:
            inner_low, inner_high = opened(start, end, real)
            low = inner_low if low in jumps else low
            high = inner_high if high in jumps else high
            f = _limited(field, low, high, real)
        yield np.array([start, *inside, end]), bool(end in times), f


def _limited(field: Field, low: float, high: float, real: torch.dtype) -> Field:
    return lambda s, y: field(torch.as_tensor(s).to(real).clamp(low, high), y)


def _fixed(
    counted: Counted,
    y0: Tensor,
    t: Tensor,
    tableau: ButcherTableau,
    settings: SolveSettings,
    callbacks: Callbacks | None,
) -> tuple[Tensor, Stats]:
    callback = None if callbacks is None else callbacks.step
    grid = settings.grid()
    steps = {"step_size": settings.step_size, "n_steps": settings.n_steps}
    recomputation = Recomputation(counted) if settings.checkpoint else None
    if recomputation is not None and len(t) > 1:
        recomputation.check(within_dtype(t, y0, settings.per_sample), y0)
    perturb = bool(settings.options.get("perturb", False))
    take = step_rule(tableau, settings.per_sample)
    low, high = (-math.inf, math.inf) if tableau.looks_ahead else _ends(t)
    field = fixed_field(counted, y0, low, high, settings.per_sample)
    if grid is not None and len(t) > 1 and t[0] != t[-1]:
        path, n = grid_solve(tableau, field, y0, t, grid, callback, take)
    elif callback is not None or perturb:
        path, n = fixed_solve(tableau, field, y0, t, **steps, callback=callback, perturb=perturb, take=take)
    else:
        given, advance = _advance(counted, y0, t, settings)
        if isinstance(take, ImplicitStep):
            given, advance = field, steps_by(take, anew=recomputation is not None)
        if recomputation is not None:
            advance = checkpointed_steps(recomputation, advance)
        path, n = (own_steps if t.ndim > 1 else fixed_solve)(tableau, given, y0, t, **steps, advance=advance)
        if settings.compile_for is not None and isinstance(n, int):
            counted.calls += n * (tableau.b_row[-1][0] + 1)  # they were not counted on the way
    result = path.stacked()
    if not all_finite(result[-1]):
        raise not_finite(tableau, field, result, t, n, settings.per_sample)
    calls: Any = counted.calls if isinstance(n, int) else n * (tableau.b_row[-1][0] + 1)
    counts: list[Any] = [calls, n, n, 0]
    if isinstance(take, ImplicitStep) and settings.per_sample:
        counts = [take.total_calls, n, n, 0, *take.total]
    elif isinstance(take, ImplicitStep):
        counts += take.total[:, 0].tolist()
    if settings.per_sample:
        counts = [torch.from_numpy(np.full(len(y0), c, np.int64)).to(y0.device) for c in counts]
    stats = stats_of(counts)
    return result if recomputation is None else recomputation.finish(result, stats), stats


def stats_of(counts: Sequence[Any]) -> Stats:
    """Statistics of calls, steps, steps kept and rejected, and what implicit steps took."""
    nfe, n_steps, n_accepted, n_rejected, *implicit = counts
    return Stats(nfe, n_steps, n_accepted, n_rejected, 0, *implicit)


def _advance(
    counted: Counted, y0: Tensor, t: Tensor, settings: SolveSettings
) -> tuple[Field, Callable[..., Tensor]]:
    """The field of equal steps, and what takes them: `equal_steps`, or faster, or compiled."""
    low, high = _ends(t)
    if settings.compile_for is None:
        field = fixed_field(counted, y0, low, high, settings.per_sample)
        if moves(t) or t.ndim > 1:
            return field, equal_steps
        return field, steps_at(counted, y0, low, high, settings.per_sample)

    def func(t: Any, x: Tensor) -> Tensor:
        return as_stage(counted.f(t, x), x).clone()  # as in compiled attempts

    # As tensors they are inputs of the graph; as floats each choice of times would be another one.
    low, high = (torch.as_tensor(s, dtype=torch.float64, device=y0.device) for s in (low, high))
    return fixed_field(func, y0, low, high, settings.per_sample), compiled_steps(settings.compile_for)


def _ends(t: Tensor) -> tuple[Any, Any]:
    """The least and the largest of monotone times: floats, or columns (B, 1) of each sample's own."""
    if t.ndim > 1:
        return t.detach().amin(0), t.detach().amax(0)
    first, last = plain(t)[[0, -1]].tolist()
    return min(first, last), max(first, last)


def steps_at(
    counted: Counted, y0: Tensor, low: float, high: float, per_sample: bool
) -> Callable[..., Tensor]:
    """A function like `equal_steps` that makes all times beforehand, as the field gets them."""
    shape = (y0.shape[0],) + (1,) * (y0.ndim - 1) if per_sample else ()

    def advance(tableau: ButcherTableau, f: Any, t: float, x: Tensor, h: float, n: int) -> Tensor:
        begin = t + np.arange(n)[:, None] * h
        at = torch.from_numpy((begin + np.array(tableau.stage_times) * h).clip(low, high)).to(x.device, real)
        for times in at.view(n, -1, *(1,) * len(shape)).expand(n, len(tableau.c), *shape).unbind(0):
            x = explicit_step(tableau, counted, times.unbind(0), x, h)[1]
        return x

    real = y0.dtype.to_real()
    return advance


def within_dtype(t: Tensor, y0: Tensor, per_sample: bool) -> Tensor:
    """The first time as func takes it."""
    return as_column(t[0].detach().to(y0.device, y0.dtype.to_real()), y0, per_sample)


def as_column(s: Tensor, y0: Tensor, per_sample: bool) -> Tensor:
    """One time, 0-D, or each sample's, (B,), as a field of y0 takes it: 0-D, or (B, 1, …, 1) per sample."""
    if not per_sample:
        return s
    return s.reshape(-1, *[1] * (y0.ndim - 1)).expand(len(y0), *[1] * (y0.ndim - 1))


def not_finite(
    tableau: ButcherTableau, f: Field, path: Sequence[Tensor] | Tensor, t: Tensor, n: Any, per_sample: bool
) -> SolverError:
    """The error of n fixed steps that left the finite numbers, explained at the last finite output.

    Args:
        tableau: the method.
        f: the field.
        path: the states at t.
        t: the times, (T,) or (T, B).
        n: how many steps there are between t[0] and t[-1], one number or each sample's.
        per_sample: whether the states are batches, so that a sample can be named.
    """
    t, path = plain(t), [plain(y) for y in path]
    first = next(i for i, y in enumerate(path) if not torch.isfinite(y).all())
    last, bad = path[first - 1], path[first]
    index, *rest = (~torch.isfinite(bad)).nonzero()[0].tolist() or [0]
    if t.ndim > 1:
        t, n = t[:, index], n[index]
    time, step = float(t[first]), abs(float(t[-1] - t[0])) / n
    sample, entry = (index, rest) if per_sample else (None, [index, *rest] if bad.ndim else [])
    column = (len(last),) + (1,) * (last.ndim - 1) if per_sample else ()
    begin = torch.full(column, float(t[first - 1]), dtype=last.dtype.to_real(), device=last.device)
    values = spectrum(f, begin, last, sample)
    kind, text, eigenvalue = explain(tableau, values, step, math.inf)
    which = f", sample {sample}" if sample is not None else f", entry {entry}" if entry else ""
    reason = f" At t={float(t[first - 1]):.9g}: {text}." if text else ""
    if kind == "growing":
        advice = "End the interval before, or check the field's sign."
    else:
        advice = "Take a smaller step (resode.max_stable_step tells the largest), or check the field."
    return NonFiniteState(
        f"the state is infinite or NaN at t={time:.9g}{which}, after steps of {number(step)}: "
        f"{tableau.name}'s step is outside its stability region, or the field blows up.{reason} {advice}",
        time=time,
        step_size=step,
        sample=sample,
        eigenvalue=eigenvalue,
    )


def _adaptive(
    counted: Counted,
    y0: Tensor,
    t: Tensor,
    tableau: ButcherTableau,
    settings: SolveSettings,
    callbacks: Callbacks | None,
) -> tuple[Tensor, Stats]:
    control, real = settings.control(y0, callbacks), y0.dtype.to_real()
    field, start = counted, y0

    def at(s: Tensor) -> Tensor:
        return as_column(s.detach().to(y0.device, real), y0, settings.per_sample)

    def moved(s: Tensor) -> Tensor:
        return as_column(zero_with_gradient(s, real).to(y0.device), y0, settings.per_sample)

    if moves(t):
        # The steps are held fixed; ∂y/∂t_i = f(t_i, y_i), and moving t_0 moves the start back along f.
        start = moved_along(field, at(t[0]) + moved(t[0]), start, -moved(t[0]))
    times_asked = np.array(plain(t).tolist(), np.float64)
    changes = np.any(times_asked[1:] != times_asked[:-1], axis=tuple(range(1, t.ndim)))
    distinct = times_asked[np.append(True, changes)]
    path, state, progress = States(len(distinct), start), start, None
    path.append(start)
    recomputation = Recomputation(counted) if settings.checkpoint else None
    if recomputation is not None and len(t) > 1:
        recomputation.check(at(t[0]), y0)
    for times, asked, f in segments(field, distinct, settings, real):
        if recomputation is not None:
            later, progress = checkpointed_solve(tableau, recomputation, f, state, times, control, progress)
        elif settings.compile_for is not None:
            key = settings.compile_for
            solved = compiled_solve if tableau.explicit else compiled_implicit_solve
            later, progress = solved(tableau, counted, state, times, control, progress, key)
        else:
            later, progress = adaptive_solve(tableau, f, state, times, control, progress, path)
        state = later.pop()
        for y in later:
            path.append(y)
        if asked:
            path.append(state)
    result = path.stacked()
    if len(distinct) < len(t):
        result = result[np.append(0, changes.cumsum()).tolist()]
    if moves(t):
        result = torch.stack([moved_along(field, at(s), y, moved(s)) for s, y in zip(t, result, strict=True)])
    if progress is None:
        zero = torch.zeros(start.shape[0] if settings.per_sample else 1, dtype=torch.int64)
        stats = Stats(zero + counted.calls, zero, zero, zero)
    else:
        stats = progress.stats()
    if not settings.per_sample:
        stats = replace(stats.item(), nfe=counted.calls)
    return result if recomputation is None else recomputation.finish(result, stats), stats


def zero_with_gradient(t: Tensor, dtype: torch.dtype) -> Tensor:
    """T − t: the value 0 with the gradient of t."""
    return (t - t.detach()).to(dtype)


def _torchdiffeq(
    counted: Counted, y0: Tensor, t: Tensor, settings: SolveSettings, callbacks: Callbacks | None
) -> tuple[Tensor, Stats]:
    result = call_torchdiffeq(counted, y0, t, settings, callbacks)
    return result, Stats(counted.calls, None, None, None)


def call_torchdiffeq(
    counted: Counted,
    y0: Tensor,
    t: Tensor,
    settings: SolveSettings,
    callbacks: Callbacks | None,
    event_fn: Any = None,
) -> Any:
    """torchdiffeq.odeint with what `settings` asks for."""
    options = dict(settings.options)
    if str(settings.method).endswith("_adams"):
        # torchdiffeq climbs to order 12: unstable explicitly at ordinary steps, and implicitly, by the few
        # iterations of its corrector, 95 % off on y' = −y with steps of 0.1 over [0, 10].
        options.setdefault("max_order", ORDER)
    if settings.step_size is not None:
        options["step_size"] = settings.step_size
    rtol, atol = tolerances(y0.dtype, settings.rtol, settings.atol)
    # Left out, tolerances are torchdiffeq's own, which do not follow the dtype.
    given = {} if settings.rtol is None else {"rtol": rtol}
    given |= {} if settings.atol is None else {"atol": atol}
    method = str(settings.method)
    return foreign_solve(
        counted, y0, t, callbacks, method=method, options=options, event_fn=event_fn, **given
    )
