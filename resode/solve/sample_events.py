r"""Each sample its own event: its time τ_i is the first zero of c(t, y)_i, and its state stays there.

As in `events`, with every number one a sample: c(τ_i, y(τ_i))_i = 0 gives dτ_i = −dc_i / ċ_i and
dy_i(τ_i) = dy_i|_τ fixed + f_i dτ_i.

Source:
    Chen, Amos & Nickel, Learning Neural Event Functions for Ordinary Differential Equations (2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.solve.adaptive import Adaptive
from resode.solve.dense import Step
from resode.solve.events import ON_VALUES, PARTS, Event, between_ends, roots, signed
from resode.solve.host import decided, moves, plain
from resode.solve.implicit.steps import step_rule
from resode.solve.native import Evaluations, zero_with_gradient
from resode.solve.options import SolveSettings
from resode.solve.result import MaxStepsReached, NonFiniteState, Stats
from resode.solve.step import all_finite, moved_along
from resode.tableaus import ButcherTableau


def column(s: Tensor | np.ndarray, y: Tensor) -> Tensor:
    """One number a sample, (B,), as (B, 1, …, 1) for states like y, in their real dtype."""
    return torch.as_tensor(s, device=y.device).to(y.dtype.to_real()).view(-1, *[1] * (y.ndim - 1))


def sample_event(event_fn: Callable[..., Any]) -> Event:
    """c(t, y), one number a sample, (B,), whose zero is the event; yes or no counts as 1 or −1.

    Raises:
        TypeError, ValueError: when called, event_fn gives something else.
    """

    def event(t: Tensor, y: Tensor) -> Tensor:
        c = event_fn(t, y)
        if not isinstance(c, Tensor):
            raise TypeError(f"event_fn must return a tensor, got {type(c).__name__}.")
        if c.shape != y.shape[:1]:
            raise ValueError(
                f"with per_sample=True event_fn must return one number a sample, shape ({len(y)},), got "
                f"{tuple(c.shape)}. t has shape {tuple(t.shape)} there: t.reshape(-1) goes with y[:, 0]."
            )
        return signed(c)

    return event


@dataclass
class Crossing:
    """The step of each sample in which its event happens: all (B,) or of the state's shape."""

    begin: np.ndarray
    end: np.ndarray
    x: Tensor  # the state at begin
    k0: Tensor  # f there
    x_end: Tensor
    part: np.ndarray  # the part of the step in which rough states have it, from 0 on

    def note(self, other: Crossing, mask: np.ndarray) -> None:
        """Takes another's steps as those of the samples marked."""
        self.begin, self.end = np.where(mask, other.begin, self.begin), np.where(mask, other.end, self.end)
        self.part = np.where(mask, other.part, self.part)
        marked = column(mask, self.x) != 0
        self.x, self.k0 = torch.where(marked, other.x, self.x), torch.where(marked, other.k0, self.k0)
        self.x_end = torch.where(marked, other.x_end, self.x_end)

    def state(self, tableau: ButcherTableau, f: Callable[..., Tensor], time: np.ndarray) -> Tensor:
        """The states at times within the steps, by steps of the method itself; at their ends, those there."""
        size = time - self.begin
        at = [column(self.begin + c * size, self.x) for c in tableau.stage_times]
        h = column(size, self.x)
        inner = step_rule(tableau, True)(tableau, f, at, self.x, h, self.k0)[1]
        return torch.where(column(time == self.end, self.x) != 0, self.x_end, inner)


@dataclass
class Search:
    """The events of a batch.

    Args:
        tableau: the method.
        f: the field, counted.
        event: c(t, y), (B,).
        signs: of the events at the start, (B,).
    """

    tableau: ButcherTableau
    f: Evaluations
    event: Event
    signs: np.ndarray

    def values(self, time: np.ndarray, x: Tensor) -> np.ndarray:
        """The events, positive at the start, (B,)."""
        return self.signs * numbers(self.event, time, x)

    def in_step(self, step: Step, running: np.ndarray) -> tuple[Crossing, np.ndarray]:
        """The step, and whose event happens within it, (B,), of the samples that are running and took it."""
        taken = running & (step.end != step.start)
        took = column(taken, step.x) != 0
        size, none = step.end - step.start, torch.zeros_like(step.x)
        # What an attempt that was not taken has led to may be anything.
        x_end = torch.where(took, step.x_end, step.x)
        n_stages = self.tableau.b_row[-1][0] + 1
        k0, *k1 = (
            torch.where(took, k, none) for k in (step.slopes[0], *step.k[n_stages:])
        )  # f at the end, if known
        states = between_ends(column(size, step.x), step.x, k0, x_end, k1[0] if k1 else None)
        here = Crossing(step.start, step.end, step.x, step.slopes[0], x_end, np.zeros(len(running), int))
        fired, value = np.zeros_like(running), np.zeros(len(running))
        for i in range(PARTS):
            time = step.end if i == PARTS - 1 else step.start + (i + 1) / PARTS * size
            value = self.values(time, states[i + 1])
            met = taken & ~fired & (value <= 0)
            fired, here.part = fired | met, np.where(met, i, here.part)
        unsure = fired & (value > 0)  # the end is exact, and the states before it are not
        if unsure.any():
            *_, before, after = self.bracket(here, unsure)
            fired &= ~unsure | ((before > 0) & (after <= 0))
        return here, fired

    def bracket(self, of: Crossing, mask: np.ndarray) -> tuple[np.ndarray, ...]:
        """Times (B,) before and after the events of the samples marked, and the exact values there."""
        a, b = of.part, of.part + 1

        def at(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            time = np.where(part == PARTS, of.end, of.begin + part / PARTS * (of.end - of.begin))
            return time, self.values(time, of.state(self.tableau, self.f, time))

        (time_b, after), on = at(b), mask
        while (on := on & (after > 0) & (b < PARTS)).any():
            a, b = np.where(on, b, a), b + on
            time_b, after = at(b)
        (time_a, before), on = at(a), mask
        while (on := on & (before <= 0) & (a > 0)).any():
            time_b, after, a = np.where(on, time_a, time_b), np.where(on, before, after), a - on
            time_a, before = at(a)
        return time_a, time_b, before, after

    def times(self, found: Crossing) -> np.ndarray:
        """The events' times, (B,), to rounding."""
        mask = found.begin != found.end
        a, b, before, after = self.bracket(found, mask)
        a = np.where(mask, a, found.begin)
        b = np.where(mask & (before > 0), b, a)  # a start that rounding makes 0 or less is the zero
        return roots(lambda s: self.values(s, found.state(self.tableau, self.f, s)), a, b, before, after)


def numbers(event: Event, time: np.ndarray, x: Tensor) -> np.ndarray:
    """The events' values, (B,), on the host, without gradient.

    Raises:
        ValueError: some are NaN.
    """
    with torch.no_grad():
        c = np.array(decided(event(column(time, x), x), *ON_VALUES), float)
    if np.isnan(c).any():
        i = int(np.isnan(c).nonzero()[0][0])
        raise ValueError(
            f"event_fn must return numbers, got NaN at t={float(time[i]):.9g}, sample {i}. "
            "Keep it defined past the event."
        )
    return c


def solve_to_own_events(
    func: Callable[..., Any], y0: Tensor, t: Tensor, settings: SolveSettings, event_fn: Callable[..., Any]
) -> tuple[Tensor, Tensor, Stats]:
    """The events' times (B,), without gradient, the states at the start and there (2, B, …), the cost.

    Args:
        func: the field of (t, y), t of shape (B, 1, …, 1).
        y0: the states at t[0], (B, *state).
        t: the start and a time that gives the direction, (2,) or (2, B).
        settings: the method and its options.
        event_fn: c(t, y), (B,).

    Raises:
        MaxStepsReached: some sample has no event.
    """
    tableau = settings.method
    if isinstance(tableau, str) or settings.stops()[0] or settings.grid() is not None:
        raise ValueError(
            "each sample's own event goes with resode's own methods and step_size as an argument, not with "
            "torchdiffeq's methods, step_t, jump_t or a grid."
        )
    counted, real = Evaluations(func), y0.dtype.to_real()
    both = np.array(plain(t).tolist())
    both = np.broadcast_to(both.reshape(2, -1), (2, len(y0)))
    start, forward = both[0].copy(), 1.0 if (both[1] >= both[0]).all() else -1.0
    y = y0
    if moves(t):
        at = column(t[0].expand(len(y0)), y0)
        y = moved_along(counted, at, y, -zero_with_gradient(at, real))
    event = sample_event(event_fn)
    first = numbers(event, start, y0)
    if not np.isfinite(first).all():
        raise ValueError(f"event_fn must be finite at the start; got {first.tolist()}.")
    running = first != 0
    search = Search(tableau, counted, event, np.sign(first))
    found = Crossing(start, start, y, torch.zeros_like(y), y, np.zeros(len(start), int))
    walk = (_fixed if settings.fixed else _adaptive)(tableau, counted, y, start, forward, settings, running)
    if running.any():
        for step in walk.steps():
            here, fired = search.in_step(step, running)
            if fired.any():
                found.note(here, fired)
                running = running & ~fired
                walk.freeze(fired)
    time = search.times(found)
    path = torch.stack([y0, found.state(tableau, counted, time)])
    return torch.from_numpy(time).to(t), path, walk.stats(counted.calls)


class _adaptive:
    """Error-controlled steps of samples that stop one by one."""

    def __init__(
        self,
        tableau: ButcherTableau,
        f: Evaluations,
        y: Tensor,
        start: np.ndarray,
        forward: float,
        settings: SolveSettings,
        running: np.ndarray,
    ):
        end = np.where(running, forward * math.inf, start)
        self.solve = Adaptive(tableau, f, y, start, end, settings.control(y.detach(), None))
        self.steps = self.solve.steps

    def freeze(self, fired: np.ndarray) -> None:
        """Lets the samples stay where they are."""
        self.solve.end = np.where(fired, self.solve.time, self.solve.end)

    def stats(self, calls: int) -> Stats:
        """The counts, calls being those of the whole."""
        return self.solve.progress.stats()


class _fixed:
    """Steps of a size that is given."""

    def __init__(
        self,
        tableau: ButcherTableau,
        f: Evaluations,
        y: Tensor,
        start: np.ndarray,
        forward: float,
        settings: SolveSettings,
        running: np.ndarray,
    ):
        if settings.step_size is None:
            raise ValueError(f"{tableau.name} takes fixed steps: to find an event it needs step_size.")
        self.tableau, self.f, self.x, self.start = tableau, f, y, start
        self.h, self.running, self.limit = forward * settings.step_size, running.copy(), settings.max_steps
        self.taken = np.zeros(len(start), np.int64)

    def steps(self) -> Iterator[Step]:
        """One step after another of the samples that are not frozen."""
        take = step_rule(self.tableau, True)
        while self.running.any():
            if (self.taken >= self.limit).any():
                i = int(self.running.nonzero()[0][0])
                time = float(self.start[i] + self.taken[i] * self.h)
                raise MaxStepsReached(
                    f"max_steps={self.limit} steps of {abs(self.h):g} met no event; sample {i} ended at "
                    f"t={time:.9g}. Check event_fn's sign and t's direction, take larger steps, or raise "
                    "max_steps.",
                    time=time,
                    step_size=abs(self.h),
                    sample=i,
                )
            begin = self.start + self.taken * self.h
            self.taken = self.taken + self.running
            end = self.start + self.taken * self.h
            size = end - begin
            h = column(size, self.x)
            at = [column(begin + c * size, self.x) for c in self.tableau.stage_times]
            k, new_x = take(self.tableau, self.f, at, self.x, h)
            if not all_finite(new_x):
                i = next(i for i, row in enumerate(new_x) if not all_finite(row))
                raise NonFiniteState(
                    f"the state is infinite or NaN at t={end[i]:.9g}, sample {i}, before an event, with "
                    f"steps of {abs(self.h):g}: take smaller ones, or check the field.",
                    time=float(end[i]),
                    step_size=abs(self.h),
                    sample=i,
                )
            x, self.x = self.x, new_x
            yield Step(begin, end, x, k, new_x)

    def freeze(self, fired: np.ndarray) -> None:
        """Lets the samples stay where they are."""
        self.running = self.running & ~fired

    def stats(self, calls: int) -> Stats:
        """The counts, calls being those of the whole."""
        n = torch.from_numpy(self.taken)
        return Stats(n * (self.tableau.b_row[-1][0] + 1), n, n, torch.zeros_like(n))
