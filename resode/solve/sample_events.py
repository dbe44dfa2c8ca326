r"""Each sample its own event: its time τ_i is the first zero of c(t, y)_i, and its state stays there.

As in `events`, with every number one a sample: c(τ_i, y(τ_i))_i = 0 gives dτ_i = −dc_i / ċ_i and
dy_i(τ_i) = dy_i|_τ fixed + f_i dτ_i.

Source:
    Chen, Amos & Nickel, Learning Neural Event Functions for Ordinary Differential Equations (2021);
    Chandrupatla, A new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear function,
    Adv. Eng. Softw. 28 (1997).
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
from resode.solve.implicit.steps import step_rule
from resode.solve.native import Evaluations, zero_with_gradient
from resode.solve.options import SolveSettings
from resode.solve.result import MaxStepsReached, NonFiniteState, Stats
from resode.tableaus import ButcherTableau


def column(s: Tensor | np.ndarray, y: Tensor) -> Tensor:
    """One number a sample, (B,), as (B, 1, …, 1) for states like y, in their real dtype."""
    return torch.as_tensor(s, device=y.device).to(y.dtype.to_real()).view(-1, *[1] * (y.ndim - 1))


def event_values(event_fn: Callable[..., Any], t: Tensor, y: Tensor) -> Tensor:
    """event_fn(t, y), one number a sample, (B,); yes or no counts as 1 or −1.

    Raises:
        TypeError, ValueError: something else.
    """
    c = event_fn(t, y)
    if not isinstance(c, Tensor):
        raise TypeError(f"event_fn must return a tensor, got {type(c).__name__}.")
    if c.shape != y.shape[:1]:
        raise ValueError(
            f"with per_sample=True event_fn must return one number a sample, shape ({len(y)},), got "
            f"{tuple(c.shape)}. t has shape {tuple(t.shape)} there: t.reshape(-1) goes with y[:, 0]."
        )
    if torch.isnan(c).any():
        i = int(torch.isnan(c).nonzero()[0])
        raise ValueError(
            f"event_fn must return numbers, got NaN at t={float(t.reshape(-1)[i]):.9g}, sample {i}. "
            "Keep it defined past the event."
        )
    return torch.where(c, 1.0, -1.0) if c.dtype == torch.bool else c


@dataclass
class Crossing:
    """The step of each sample in which its event happens: all (B,) or of the state's shape."""

    begin: np.ndarray
    end: np.ndarray
    x: Tensor  # the state at begin
    k0: Tensor  # f there

    def note(self, step: Step, fired: np.ndarray) -> None:
        """Takes the step as that of the samples marked."""
        self.begin, self.end = np.where(fired, step.start, self.begin), np.where(fired, step.end, self.end)
        mask = column(torch.from_numpy(fired), self.x).bool()
        self.x, self.k0 = torch.where(mask, step.x, self.x), torch.where(mask, step.slopes[0], self.k0)

    def state(self, tableau: ButcherTableau, f: Callable[..., Tensor], time: np.ndarray) -> Tensor:
        """The states at times within the steps: by a step of the method itself."""
        size = time - self.begin
        at = [column(self.begin + c * size, self.x) for c in tableau.stage_times]
        h = column(size, self.x)
        return step_rule(tableau, True)(tableau, f, at, self.x, h, self.k0)[1]


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
    both = t.detach().double().cpu().expand(len(y0), 2).T if t.ndim == 1 else t.detach().double().cpu()
    start, forward = both[0].numpy().copy(), 1.0 if (both[1] >= both[0]).all() else -1.0
    y = y0
    if t.requires_grad:
        moved = zero_with_gradient(t[0], real).expand(len(y0)).to(y0.device)
        y = y - counted(column(start, y0), y) * moved.view(-1, *[1] * (y0.ndim - 1))

    def values(time: np.ndarray, x: Tensor) -> np.ndarray:
        with torch.no_grad():
            return event_values(event_fn, column(time, x), x).double().cpu().numpy()

    first = values(start, y0)
    if not np.isfinite(first).all():
        raise ValueError(f"event_fn must be finite at the start; got {first.tolist()}.")
    running = first != 0
    found = Crossing(start, start, y, torch.zeros_like(y))
    walk = (_fixed if settings.fixed else _adaptive)(tableau, counted, y, start, forward, settings, running)
    if running.any():
        for step in walk.steps():
            taken = step.end != step.start  # by the others, x_end is what an attempt would have led to
            x = torch.where(column(torch.from_numpy(taken), y0).bool(), step.x_end, step.x)
            fired = running & taken & (np.sign(first) * values(step.end, x) <= 0)
            if fired.any():
                found.note(step, fired)
                running &= ~fired
                walk.freeze(fired)
    with torch.no_grad():
        time = find_roots(
            lambda s: np.sign(first) * values(s, found.state(tableau, counted, s)), found.begin, found.end
        )
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
            finite = torch.isfinite(new_x.detach().flatten(1)).all(1).cpu().numpy()
            if not finite.all():
                i = int((~finite).nonzero()[0][0])
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


def find_roots(f: Callable[[np.ndarray], np.ndarray], begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Where each of the functions f, which are positive at begin and not at end, reaches 0; to rounding.

    Inverse quadratic interpolation where the last three points promise it, halving where they do not.

    Args:
        f: times (B,) -> values (B,).
        begin: (B,).
        end: (B,), equal to begin where there is nothing to find.
    """
    a, b, c = end, begin, begin
    fa, fb = f(a), f(b)
    fc, done = fb, (begin == end) | (fa == 0)
    # A start that rounding makes 0 or less is the zero.
    a, done = np.where(~done & (fb <= 0), b, a), done | (fb <= 0)
    tiny = 4 * np.finfo(np.float64).eps * np.maximum(abs(begin), abs(end)).clip(min=1e-300)
    share = np.full_like(begin, 0.5)
    while not done.all():
        x = np.where(done, a, a + share * (b - a))
        fx = f(x)
        same = np.sign(fx) == np.sign(fa)
        c, fc, b_next, fb_next = np.where(same, a, b), np.where(same, fa, fb), np.where(same, b, a), None
        fb_next = np.where(same, fb, fa)
        b, fb = np.where(done, b, b_next), np.where(done, fb, fb_next)
        a, fa = x, np.where(done, fa, fx)
        gap = abs(b - a)
        done = done | (fa == 0) | (gap <= tiny)
        with np.errstate(all="ignore"):
            xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
            quadratic = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
            good = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi) & np.isfinite(quadratic)
            least = np.minimum(0.5, 0.5 * tiny / gap)
            share = np.where(good, quadratic, 0.5).clip(least, 1 - least)
    return a


def with_own_event_gradients(
    func: Callable[..., Any], event_fn: Callable[..., Any], event_t: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """The events' times (B,) and states (B, …), as they were, with the gradients of the implicit function.

    Args:
        func: the field of (t, y).
        event_fn: c(t, y), (B,).
        event_t: the times, (B,).
        y: the states there, differentiable at fixed times.
    """
    time = column(event_t.detach(), y)
    with torch.no_grad():
        slope = func(time, y.detach())
    with torch.enable_grad():
        s, at = time.clone().requires_grad_(), y.detach().requires_grad_()
        value = event_values(event_fn, s, at)
        if not value.requires_grad:
            return event_t, y
        rate, rates = torch.autograd.grad(value.sum(), (s, at), allow_unused=True, materialize_grads=True)
        rate = rate.reshape(-1) + (rates.conj() * slope).real.flatten(1).sum(1)
    # A grazing event (rate 0) has no gradient; the floor keeps its time finite.
    rate = torch.where(rate == 0, torch.finfo(rate.dtype).eps, rate)
    change = event_values(event_fn, time, y)
    change = (change - change.detach()) / rate
    return event_t.detach() - change.to(event_t), y - slope * column(change, y)
