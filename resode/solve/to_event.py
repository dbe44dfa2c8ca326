"""Solving until an event: of a coupled state, or each sample its own, where it stays while others go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.solve.adaptive import Adaptive, Progress
from resode.solve.control import Callbacks
from resode.solve.events import PARTS, Event, Within, column, numbers, which
from resode.solve.fixed import Grid, one_step
from resode.solve.foreign import foreign_methods, stops_at_events
from resode.solve.host import moves, plain
from resode.solve.implicit.steps import ImplicitStep, step_rule
from resode.solve.native import (
    SHARED_TIMES,
    Evaluations,
    as_column,
    call_torchdiffeq,
    fixed_field,
    segments,
    zero_with_gradient,
)
from resode.solve.options import SolveSettings
from resode.solve.result import MaxStepsReached, NonFiniteState, Stats
from resode.solve.step import Field, Time, all_finite, moved_along
from resode.tableaus import ButcherTableau


@dataclass
class _Search:
    """A solve until the first event of each sample.

    Args:
        tableau: the method.
        counted: the field.
        event: positive at the start.
        settings: how to solve.
        callbacks: told of every step.
        forward: 1, or −1 where time decreases.
        found: the start, as a step that leads nowhere; in the end the steps that hold the events.
        running: who has had no event, (B,).
        progress: of error-controlled steps.
    """

    tableau: ButcherTableau
    counted: Evaluations
    event: Event
    settings: SolveSettings
    callbacks: Callbacks | None
    forward: float
    found: Within
    running: np.ndarray
    progress: Progress | None = None

    def values(self, time: np.ndarray, x: Tensor) -> np.ndarray:
        """The events at times (B,), (B,)."""
        return numbers(self.event, time, x, self.found.per_sample)

    def see(self, step: Within) -> None:
        """Notes whose event happens within a step; they no longer run."""
        taken = self.running & (step.end != step.begin)
        fired, sure = np.zeros((2, len(taken)), bool)
        for i, x in enumerate(step.states[1:]):
            below = taken & (self.values(step.time(i + 1), x) <= 0)
            step.part = np.where(below & ~fired, i, step.part)
            fired, sure = fired | below, below & (i == PARTS - 1)  # the end alone is exact
            if (fired == taken).all():
                break
        if (unsure := fired & ~sure).any():
            step.around = np.where(unsure, step.bracket(self.values, step.part, unsure), np.nan)
            fired = sure | (unsure & (step.around[2] > 0) & (step.around[3] <= 0))
        if fired.any():
            self.found, self.running = self.found.merged(step, fired), self.running & ~fired

    def times(self) -> np.ndarray:
        """The events' times, (B,), to rounding."""
        step = self.found
        within, around = step.begin != step.end, step.around
        if (unknown := within & np.isnan(around[0])).any():
            around = np.where(unknown, step.bracket(self.values, step.part, unknown), around)
        a = np.where(within, around[0], step.begin)
        b = np.where(within & (around[2] > 0), around[1], a)  # a start that rounding makes 0 is the zero
        return step.zeros(self.values, np.stack([a, b, *around[2:]]))

    def controlled(self) -> Iterator[Within]:
        """Error-controlled steps of the samples that run."""
        per_sample, start, y = self.settings.per_sample, self.found.begin, self.found.x
        control = self.settings.control(y, self.callbacks)
        points = np.stack([start, np.where(self.running, self.forward * math.inf, start)])
        points = points if per_sample else points[:, 0]
        for times, _, f in segments(self.counted, points, self.settings, y.dtype.to_real()):
            if not self.running.any():
                return
            solve = Adaptive(self.tableau, f, y, times[0], times[-1], control, self.progress)
            for step in solve.steps():
                (k0, k1), x_end = step.slopes, step.x_end
                if per_sample:  # what an attempt that was not taken has led to may be anything
                    took = solve.mask(step.end != step.start)
                    k1, x_end = torch.where(took, k1, 0.0), torch.where(took, x_end, step.x)
                begin, end = step.start.astype(float), step.end.astype(float)
                yield Within(begin, end, step.x, k0, x_end, _step_to(self.tableau, f), per_sample, k1)
                solve.end = np.where(self.running, solve.end, solve.time)
            y, self.progress = solve.x, solve.progress

    def given(self) -> Iterator[Within]:
        """Steps of a size that is given, of the samples that run."""
        settings, tableau = self.settings, self.tableau
        size = settings.step_size if settings.step_size is not None else settings.options.get("step_size")
        if size is None:
            raise ValueError(f"{tableau.name} takes fixed steps: to find an event it needs step_size.")
        per_sample, start, y = settings.per_sample, self.found.begin, self.found.x
        grid, h = settings.grid(), self.forward * float(size)
        perturb = bool(settings.options.get("perturb", False))
        callback = None if self.callbacks is None else self.callbacks.step
        f = fixed_field(self.counted, y, -math.inf, math.inf, per_sample)
        take = step_rule(tableau, per_sample)
        exact = _step_to(tableau, f) if grid is None else _along(grid, f)
        taken = np.zeros(len(start), np.int64)
        while self.running.any():
            i = int(self.running.argmax())
            begin, who = start + taken * h, f"sample {i}" if per_sample else "they"
            if taken[i] >= settings.max_steps:
                raise MaxStepsReached(
                    f"max_steps={settings.max_steps} steps of {abs(h):g} met no event; {who} ended at "
                    f"t={begin[i]:.9g}. Check event_fn's sign and t's direction, take larger steps, or raise "
                    "max_steps.",
                    time=float(begin[i]),
                    step_size=abs(h),
                    sample=i if per_sample else None,
                )
            taken = taken + self.running
            end = start + taken * h
            at: Time = begin[0].item()
            by: Time = h
            if per_sample:  # the times in their own precision
                at = as_column(torch.from_numpy(begin).to(y.device), y, True)
                by = column(self.running * h, y, True)
            x_end, k0 = one_step(tableau, f, at, y, by, callback, perturb, take)
            if not all_finite(x_end):
                i = next(i for i, x in enumerate(x_end if per_sample else x_end[None]) if not all_finite(x))
                raise NonFiniteState(
                    f"the state is infinite or NaN at t={end[i]:.9g}{which(i, per_sample)}, before an event, "
                    f"with steps of {abs(h):g}: take smaller ones, or check the field.",
                    time=float(end[i]),
                    step_size=abs(h),
                    sample=i if per_sample else None,
                )
            yield Within(begin, end, y, k0, x_end, exact, per_sample)
            y = x_end
        zeros, calls, implicit = 0 * taken, taken * (tableau.b_row[-1][0] + 1), None
        if isinstance(take, ImplicitStep) and taken.any():
            calls, implicit = take.total_calls + taken, take.total
        self.progress = Progress(zeros, zeros, calls, taken, zeros, implicit)


def solve_to_event(
    func: Callable[..., Any],
    y0: Tensor,
    t: Tensor,
    settings: SolveSettings,
    event: Event,
    callbacks: Callbacks | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """The event's time (0-D, without gradient), the states at t[0] and there (2, *state), the cost.

    With settings.per_sample each sample has its own event and time, (B,).

    Args:
        func: the field of (t, y).
        y0: the state at t[0].
        t: the start and a time that gives the direction, (2,), or each sample's own, (2, B).
        settings: the method and its options.
        event: positive at the start.
        callbacks: told of every step.

    Raises:
        MaxStepsReached: no event.
    """
    counted, per_sample = Evaluations(func), settings.per_sample
    if isinstance(settings.method, str):
        return _by_torchdiffeq(counted, y0, t, settings, event, callbacks)
    if per_sample and (shared := sorted(set(settings.options) & set(SHARED_TIMES))):
        raise ValueError(f"each sample's own event does not go with the options {shared}, which all share.")
    batch = len(y0) if per_sample else 1
    both = np.broadcast_to(np.array(plain(t).tolist()).reshape(2, -1), (2, batch))
    start, forward = both[0].copy(), 1.0 if (both[1] >= both[0]).all() else -1.0
    y = y0
    if moves(t):
        real = y0.dtype.to_real()
        at = as_column(t[0].to(y0.device, real), y0, per_sample)
        y = moved_along(counted, at, y, -zero_with_gradient(at, real))
    at_start = Within(start, start, y, torch.zeros_like(y), y, _step_to(settings.method, counted), per_sample)
    running = numbers(event, start, y0, per_sample) > 0
    search = _Search(settings.method, counted, event, settings, callbacks, forward, at_start, running)
    for step in search.given() if settings.fixed else search.controlled():
        search.see(step)
    time = search.times()
    path = torch.stack([y0, search.found.state(time)])
    zeros = np.zeros(batch, np.int64)
    stats = (search.progress or Progress(zeros, zeros, zeros + counted.calls, zeros, zeros)).stats()
    if not per_sample:
        stats = replace(stats.item(), nfe=counted.calls)
    return torch.from_numpy(time).to(t.device, t.dtype).reshape(time.shape if per_sample else ()), path, stats


def _by_torchdiffeq(
    counted: Evaluations,
    y0: Tensor,
    t: Tensor,
    settings: SolveSettings,
    event: Event,
    callbacks: Callbacks | None,
) -> tuple[Tensor, Tensor, Stats]:
    if not stops_at_events(str(settings.method)):
        able = [name for name in foreign_methods() if stops_at_events(name)]
        raise ValueError(
            f"{settings.method!r} can't stop at an event; use a method of resode's or {', '.join(able)}."
        )
    time, path = call_torchdiffeq(counted, y0, t, settings, callbacks, event_fn=event)
    return time.detach().to(t.dtype), path, Stats(counted.calls, None, None, None)


def _step_to(tableau: ButcherTableau, f: Field) -> Callable[[Within, np.ndarray], Tensor]:
    """The states at times within steps: the method's own step from the start to them."""

    def exact(step: Within, time: np.ndarray) -> Tensor:
        size = time - step.begin
        times = [step.of(step.begin + c * size) for c in tableau.stage_times]
        h = step.of(size) if step.per_sample else size.item()
        return step_rule(tableau, step.per_sample)(tableau, f, times, step.x, h, step.k0)[1]

    return exact


def _along(grid: Grid, f: Field) -> Callable[[Within, np.ndarray], Tensor]:
    """The state at a time within a step of a grid: as the grid interpolates."""

    def exact(step: Within, time: np.ndarray) -> Tensor:
        s, begin, end = (float(a[0]) for a in (time, step.begin, step.end))
        return grid.between(f, s, begin, step.x, step.k0, end, step.x_end)

    return exact
