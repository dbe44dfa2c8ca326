"""`solve_ivp`: scipy's way to ask, with torch's tensors and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.checks import warn_user
from resode.solve.adaptive import Adaptive, Progress
from resode.solve.control import MAX_STEPS
from resode.solve.dense import Step, interpolate
from resode.solve.events import root, value_of
from resode.solve.fixed import steps_between
from resode.solve.native import Evaluations, not_finite
from resode.solve.options import NATIVE, SolveSettings, resolve_method
from resode.solve.problem import check_per_sample, check_state
from resode.solve.result import Stats
from resode.solve.step import Field, all_finite, combine, stages
from resode.tableaus import ButcherTableau

SCIPY_NAMES = {"RK45": "dopri5", "RK23": "bosh3"}
"""scipy's names of the pairs that are also here."""


@dataclass(repr=False)
class DenseOutput:
    """The solution at any time of the solve, to about the accuracy of its steps.

    dopri5 and tsit5 interpolate, bosh3 by a cubic; the other methods take a step of their own from the
    last point before the time, which calls the field again.

    Args:
        tableau: the method.
        f: the field.
        steps: as taken.
        t_min: the earliest time.
        t_max: the latest.
        forward: 1, or −1 where the solve went back in time.
        per_sample: whether the states are batches, each sample with its own steps.
    """

    tableau: ButcherTableau
    f: Field
    steps: list[Step]
    t_min: float
    t_max: float
    forward: float
    per_sample: bool

    def __call__(self, t: Tensor | float) -> Tensor:
        """The state at t: (*y.shape) for one time, (T, *y.shape) for t of shape (T,).

        Raises:
            ValueError: a time outside the solve.
        """
        times = torch.as_tensor(t, dtype=torch.float64).detach()
        if times.ndim > 1 or not ((times >= self.t_min) & (times <= self.t_max)).all():
            raise ValueError(
                "dense output holds for one time or a vector of times from "
                f"{self.t_min:g} to {self.t_max:g}; got {times.tolist()}."
            )
        path = self.at(times.reshape(-1).cpu().numpy())
        if not path:
            return self.steps[0].x.new_zeros((0, *self.steps[0].x.shape))
        return torch.stack(path) if times.ndim else path[0]

    def at(self, times: np.ndarray) -> list[Tensor]:
        """The states at times (T,), each of y's shape."""
        return interpolate(self.tableau, self.f, self.steps, times, self.forward, self.per_sample)[0]


@dataclass
class Solution:
    """What `solve_ivp` gives back.

    Args:
        t: the times, (T,): t_eval, or every step's end where t_eval is None, and the start.
        y: the states there, (T, *y0.shape): time first, where scipy has it last.
        stats: what it cost.
        status: 0, the end was reached; 1, a terminal event ended the solve. Failures raise SolverError.
        message: the status in words.
        sol: dense output, `sol(t)`; None with dense_output=False. The solution itself can be called, too.
        t_events: for every event the times of its zeros, (E,); None without events.
        y_events: and the states there, (E, *y0.shape).
    """

    t: Tensor
    y: Tensor
    stats: Stats
    status: int
    message: str
    sol: DenseOutput | None = None
    t_events: list[Tensor] | None = None
    y_events: list[Tensor] | None = None

    @property
    def success(self) -> bool:
        """Whether the solve ended as asked; always, because failures raise."""
        return self.status >= 0

    def __call__(self, t: Tensor | float) -> Tensor:
        """Dense output: the state at t, (*y0.shape) or (T, *y0.shape)."""
        if self.sol is None:
            raise ValueError("the solution keeps no steps: solve with dense_output=True to evaluate it.")
        return self.sol(t)


def solve_ivp(
    func: Callable[..., Any],
    t_span: Sequence[float] | Tensor,
    y0: Tensor,
    method: str | ButcherTableau | None = None,
    t_eval: Tensor | Sequence[float] | None = None,
    dense_output: bool = True,
    events: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    args: Sequence[Any] | None = None,
    *,
    rtol: Any = None,
    atol: Any = None,
    first_step: float | None = None,
    min_step: float = 0.0,
    max_step: float = math.inf,
    step_size: float | None = None,
    n_steps: int | None = None,
    max_steps: int = MAX_STEPS,
    per_sample: bool = False,
) -> Solution:
    r"""Solve dy/dt = func(t, y), y(t_span[0]) = y0, over t_span, as scipy's function of this name.

    Args:
        func: `func(t, y, *args)` -> dy/dt of y's shape, as for `odeint`.
        t_span: the start and the end, two floats; the end may be the lesser.
        y0: the state at the start, a float or complex tensor of any shape.
        method: a name in resode.METHODS that can be solved with, or a tableau; "dopri5" by default, which
            scipy calls "RK45"; "RK23" is "bosh3".
        t_eval: times to give the state at, within t_span and in its direction; every step's where None.
        dense_output: keep the steps, so that the solution can be evaluated at any time.
        events: one or several functions `event(t, y, *args)` -> one number, whose zeros are to be found. One
            with an attribute `terminal` = True (or a number of zeros) ends the solve; one with `direction`
            above (below) 0 counts where it rises (falls) only.
        args: further arguments of func and the events.
        rtol: relative tolerance, as for `odeint` (scipy's defaults are looser).
        atol: absolute tolerance likewise.
        first_step: the first step to try.
        min_step: a step that is not above it is kept, whatever its error.
        max_step: the largest step.
        step_size: the largest of equal steps over t_span; makes every method take fixed steps.
        n_steps: the number of equal steps over t_span; likewise.
        max_steps: attempted steps.
        per_sample: each sample of dimension 0 has its own steps; needs t_eval, and no events.

    Returns:
        The `Solution`. Gradients flow to y0 and to what func uses, not to times.

    Raises:
        ValueError, TypeError: an argument is wrong; the message says the rule and what came.
        SolverError: the solve can't go on.

    Source:
        Virtanen et al., SciPy 1.0, Nature Methods 17 (2020): the interface.

    Example:
        >>> import torch, resode
        >>> s = resode.solve_ivp(lambda t, y: -y, (0.0, 2.0), torch.ones(1, dtype=torch.float64))
        >>> s.status, tuple(s.y.shape) == (len(s.t), 1), round(float(s(1.0)), 6)
        (0, True, 0.367879)
    """
    check_state(y0)
    if not isinstance(y0, Tensor):
        raise TypeError("solve_ivp takes one tensor as y0; solve tuples with odeint.")
    start, end = _span(t_span)
    name = SCIPY_NAMES.get(method, method) if isinstance(method, str) else method
    tableau = resolve_method(name)
    if isinstance(tableau, str):
        raise ValueError(
            f"solve_ivp solves with {', '.join(NATIVE)}; {tableau!r} is torchdiffeq's, use it with odeint."
        )
    if per_sample:
        check_per_sample(y0)
        if t_eval is None or events:
            raise ValueError("per_sample=True gives each sample its own times: give t_eval, and no events.")
    wanted = None if t_eval is None else _t_eval(t_eval, start, end)
    numbers = {"first_step": first_step, "min_step": min_step, "max_step": max_step}
    fixed = step_size is not None or n_steps is not None or not tableau.adaptive
    if fixed and numbers != {"first_step": None, "min_step": 0.0, "max_step": math.inf}:
        raise ValueError("first_step, min_step and max_step steer adaptive steps; these are fixed.")
    settings = SolveSettings(
        tableau, rtol, atol, {} if fixed else numbers, step_size, n_steps, max_steps, per_sample
    )
    settings.check()
    extra = tuple(args or ())
    counted = Evaluations((lambda t, y: func(t, y, *extra)) if extra else func)
    watch = _Watch(events, extra)
    solve = (_Equal if fixed else _controlled)(tableau, counted, y0, start, end, settings)
    kept: list[Step] = []
    final: tuple[float, Tensor] | None = None
    for step in solve.steps():
        kept.append(step)
        if watch.events and (final := watch.see(step, tableau, solve.f, solve.forward)) is not None:
            break
    time = end if final is None else final[0]
    dense = DenseOutput(tableau, solve.f, kept, min(start, time), max(start, time), solve.forward, per_sample)
    if wanted is None:
        points = np.concatenate([kept[0].start, *(step.end for step in kept)])
        states = [kept[0].x, *(step.x_end for step in kept)]
        if final is not None:
            points[-1], states[-1] = final
    else:
        points = wanted[(wanted - time) * solve.forward <= 0].cpu().numpy()
        states = dense.at(points)
    grid = torch.from_numpy(points).to(y0.device)
    y = torch.stack(states) if states else y0.new_zeros((0, *y0.shape))
    stats = solve.progress.stats()
    if not per_sample:
        stats = replace(stats.item(), nfe=counted.calls)
    message = "the end of t_span was reached." if final is None else "a terminal event ended the solve."
    found = watch.found(y0) if watch.events else (None, None)
    return Solution(grid, y, stats, int(final is not None), message, dense if dense_output else None, *found)


def _controlled(
    tableau: ButcherTableau,
    counted: Evaluations,
    y0: Tensor,
    start: float,
    end: float,
    settings: SolveSettings,
) -> Adaptive:
    """Error-controlled steps."""
    return Adaptive(tableau, counted, y0, start, end, settings.control(y0, None))


class _Equal:
    """Equal steps, each with F at its end, which is the next one's first stage."""

    def __init__(
        self,
        tableau: ButcherTableau,
        counted: Evaluations,
        y0: Tensor,
        start: float,
        end: float,
        settings: SolveSettings,
    ):
        self.tableau, self.start, self.end, self.per_sample = tableau, start, end, settings.per_sample
        self.forward = 1.0 if end > start else -1.0
        self.x, self.f, self.counted = y0, counted, counted
        if settings.step_size is None and settings.n_steps is None:
            warn_user(f"{tableau.name} takes one step over t_span; give n_steps or step_size.")
        self.n = steps_between(start, end, settings.step_size, settings.n_steps)
        self.taken = 0

    def steps(self) -> Iterator[Step]:
        x, (low, high) = self.x, sorted((self.start, self.end))
        batch = len(x) if self.per_sample else 1
        column, real = (batch,) + (1,) * (x.ndim - 1) if self.per_sample else (), x.dtype.to_real()
        h = (self.end - self.start) / self.n
        k0: Tensor | None = None
        for i in range(self.n):
            begin = self.start + i * h
            end = self.end if i == self.n - 1 else self.start + (i + 1) * h
            at = [min(max(begin + c * h, low), high) for c in self.tableau.stage_times]
            times = [x.new_full(column, s, dtype=real) for s in (*at, end)]
            k = stages(self.tableau, self.f, times, x, h, k0)
            new_x = combine(x, h, self.tableau.b_row, k)
            if not all_finite(new_x):
                both = torch.tensor([begin, end], dtype=torch.float64)
                raise not_finite(self.tableau, self.f, [x, new_x], both, 1, self.per_sample)
            k.append(k0 := self.f(times[-1], new_x))
            self.taken += 1
            yield Step(np.full(batch, begin), np.full(batch, end), x, k, new_x)
            x = new_x

    @property
    def progress(self) -> Progress:
        """The counts."""
        zeros = np.zeros(len(self.x) if self.per_sample else 1, np.int64)
        return Progress(zeros, zeros, zeros + self.counted.calls, zeros + self.taken, zeros)


class _Watch:
    """The events of a solve: their zeros, step by step."""

    def __init__(self, events: Any, args: tuple[Any, ...]):
        given = () if events is None else events if isinstance(events, tuple | list) else (events,)
        self.events = [(lambda t, y, e=e: e(t, y, *args)) for e in given]
        self.terminal = [getattr(e, "terminal", None) for e in given]
        self.direction = [getattr(e, "direction", 0) for e in given]
        self.times: list[list[float]] = [[] for _ in given]
        self.states: list[list[Tensor]] = [[] for _ in given]

    def see(
        self, step: Step, tableau: ButcherTableau, f: Field, forward: float
    ) -> tuple[float, Tensor] | None:
        """Notes the zeros within a step; the time and state of one that ends the solve, or None."""
        begin, end = step.start.item(), step.end.item()

        def at(time: float) -> Tensor:
            if time == end:
                return step.x_end
            return interpolate(tableau, f, [step], np.array([time]), forward, False)[0][0]

        zeros = []
        for i, event in enumerate(self.events):
            before, after = value_of(event, begin, step.x), value_of(event, end, step.x_end)
            falls, rises = before > 0 >= after, before < 0 <= after
            if (falls and self.direction[i] <= 0) or (rises and self.direction[i] >= 0):
                sign = 1.0 if falls else -1.0
                zeros.append((root(lambda t, y, e=event, s=sign: s * e(t, y), at, begin, end), i))
        for time, i in sorted(zeros, key=lambda zero: forward * zero[0]):
            self.times[i].append(time)
            self.states[i].append(at(time))
            if self.terminal[i] and len(self.times[i]) >= int(self.terminal[i]):
                return time, self.states[i][-1]
        return None

    def found(self, y0: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The zeros' times and states, one tensor an event."""
        times = [torch.tensor(s, dtype=torch.float64, device=y0.device) for s in self.times]
        return times, [torch.stack(s) if s else y0.new_zeros((0, *y0.shape)) for s in self.states]


def _span(t_span: Any) -> tuple[float, float]:
    if isinstance(t_span, Tensor) and t_span.requires_grad:
        raise ValueError("solve_ivp gives times no gradient; use odeint for that, or t_span.detach().")
    try:
        start, end = (float(s) for s in t_span)
    except (TypeError, ValueError):
        raise ValueError(f"t_span must be two times, the start and the end; got {t_span!r}.") from None
    if not (math.isfinite(start) and math.isfinite(end)) or start == end:
        raise ValueError(f"t_span must be two different finite times, got {start:g} and {end:g}.")
    return start, end


def _t_eval(t_eval: Any, start: float, end: float) -> Tensor:
    times = torch.as_tensor(t_eval).detach().to(torch.float64)
    forward = 1 if end > start else -1
    if times.ndim != 1 or not (times.diff() * forward > 0).all():
        raise ValueError("t_eval must be a vector of times in strict order, in the direction of t_span.")
    if not ((times >= min(start, end)) & (times <= max(start, end))).all():
        raise ValueError(
            f"t_eval must lie within t_span, {start:g} to {end:g}; it runs from {float(times.min()):g} "
            f"to {float(times.max()):g}."
        )
    return times
