"""`solve_ivp`: scipy's way to ask, with torch's tensors and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.checks import warn_user
from resode.solve.adaptive import Adaptive, Progress
from resode.solve.control import MAX_STEPS
from resode.solve.dense import Step, interpolate
from resode.solve.events import Event, Within, value_of
from resode.solve.fixed import steps_between
from resode.solve.native import Evaluations, not_finite
from resode.solve.options import NATIVE, SolveSettings, resolve_method
from resode.solve.problem import check_per_sample, check_state, checked_args
from resode.solve.result import Stats
from resode.solve.states import Passing, States
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
        times = inside(_as_times(t), self.t_min, self.t_max)
        if times is None or times.ndim > 1:
            raise ValueError(
                "dense output holds for one time or a vector of times from "
                f"{self.t_min:g} to {self.t_max:g}; got {_as_times(t).tolist()}."
            )
        path = self.at(np.array(times.reshape(-1).tolist()))
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
    wanted = None if t_eval is None else _t_eval(t_eval, start, end, _rounding(t_span))
    numbers = {"first_step": first_step, "min_step": min_step, "max_step": max_step}
    fixed = step_size is not None or n_steps is not None or not tableau.adaptive
    if fixed and numbers != {"first_step": None, "min_step": 0.0, "max_step": math.inf}:
        raise ValueError("first_step, min_step and max_step steer adaptive steps; these are fixed.")
    settings = SolveSettings(
        tableau, rtol, atol, {} if fixed else numbers, step_size, n_steps, max_steps, per_sample
    )
    settings.check()
    extra = checked_args(args)
    counted = Evaluations((lambda t, y: func(t, y, *extra)) if extra else func)
    watch = _Watch(events, extra)
    solve = (_Equal if fixed else _controlled)(tableau, counted, y0, start, end, settings)
    points = np.array(wanted.tolist()) if wanted is not None else np.zeros(0)
    passing = Passing(tableau, solve.f, points, solve.forward, per_sample)
    path = States(len(points), y0)
    if wanted is None:
        path.append(y0)
    ends: list[float] = [start]
    kept: list[Step] = []
    final: tuple[float, Tensor] | None = None
    for step in solve.steps():
        final = watch.see(step, tableau, solve.f, solve.forward) if watch.events else None
        time, state = (step.end[0], step.x_end) if final is None else final
        if dense_output:
            kept.append(step)
        if wanted is None:
            ends.append(time)
            path.append(state)
        elif final is not None:
            passing.end_at(time)
        for y in passing.add(step) if wanted is not None else ():
            path.append(y)
        if final is not None:
            break
    for y in passing.finish():
        path.append(y)
    time = end if final is None else final[0]
    dense = None
    if dense_output:
        dense = DenseOutput(
            tableau, solve.f, kept, min(start, time), max(start, time), solve.forward, per_sample
        )
    times = np.array(ends) if wanted is None else points[: path.count]
    grid = torch.from_numpy(times).to(y0.device)
    y = path.stacked() if path.count else y0.new_zeros((0, *y0.shape))
    stats = solve.progress.stats()
    if not per_sample:
        stats = replace(stats.item(), nfe=counted.calls)
    message = "the end of t_span was reached." if final is None else "a terminal event ended the solve."
    found = watch.found(y0) if watch.events else (None, None)
    return Solution(grid, y, stats, int(final is not None), message, dense, *found)


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
        self.limits = [_zeros_to_end(getattr(e, "terminal", None)) for e in given]
        self.direction = [getattr(e, "direction", 0) for e in given]
        self.values: list[float] | None = None  # at the last step's end
        self.times: list[list[float]] = [[] for _ in given]
        self.states: list[list[Tensor]] = [[] for _ in given]

    def see(
        self, step: Step, tableau: ButcherTableau, f: Field, forward: float
    ) -> tuple[float, Tensor] | None:
        """Notes the zeros within a step; the time and state of one that ends the solve, or None."""
        within = Within(step.start.item(), step.end.item(), step.x, step.k[0], step.x_end, step.k[-1])
        at = within.ending(lambda s: interpolate(tableau, f, [step], np.array([s]), forward, False)[0][0])
        points = list(zip(within.grid, within.states, strict=True))
        before = self.values or [value_of(event, *points[0]) for event in self.events]
        values = [
            [b, *(value_of(e, *p) for p in points[1:])] for e, b in zip(self.events, before, strict=True)
        ]
        zeros = [
            (time, i)
            for i, (event, v) in enumerate(zip(self.events, values, strict=True))
            for time in _zeros(within, event, at, v, self.direction[i], self.values is None)
        ]
        self.values = [v[-1] for v in values]
        for time, i in sorted(zeros, key=lambda zero: forward * zero[0]):
            self.times[i].append(time)
            self.states[i].append(at(time) if time != within.begin else step.x)
            if len(self.times[i]) >= self.limits[i]:
                return time, self.states[i][-1]
        return None

    def found(self, y0: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The zeros' times and states, one tensor an event."""
        times = [torch.tensor(s, dtype=torch.float64, device=y0.device) for s in self.times]
        return times, [torch.stack(s) if s else y0.new_zeros((0, *y0.shape)) for s in self.states]


def _zeros(
    within: Within,
    event: Event,
    at: Callable[[float], Tensor],
    values: list[float],
    direction: float,
    is_first: bool,
) -> list[float]:
    """The times of an event's zeros within a step, at whose parts' ends it has the given values."""
    times: list[float] = []
    if is_first and values[0] == 0 and direction * values[1] >= 0:
        times.append(within.begin)
    for i, (before, after) in enumerate(pairwise(values)):
        falls, rises = before > 0 >= after, before < 0 <= after
        if (falls and direction <= 0) or (rises and direction >= 0):
            sign = 1.0 if falls else -1.0
            time = within.zero(lambda t, y, s=sign: s * value_of(event, float(t), y), at, i)
            times += [] if time is None or time in times else [time]
    return times


def _zeros_to_end(terminal: Any) -> float:
    """How many zeros of an event end the solve, from its attribute `terminal`."""
    if terminal is None or terminal is False or (isinstance(terminal, int | float) and terminal == 0):
        return math.inf
    whole = isinstance(terminal, int | float | np.integer | np.bool_) and terminal % 1 == 0
    if not whole or not 0 < terminal < math.inf:
        raise ValueError(
            f"an event's attribute terminal must be True, False or the number of zeros that ends the solve, "
            f"got {terminal!r}."
        )
    return int(terminal)


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


def _rounding(t_span: Any) -> float:
    """How coarse the ends are: the rounding of a tensor's dtype, 0 for Python's numbers."""
    numbers = [s for s in ([t_span] if isinstance(t_span, Tensor) else t_span) if isinstance(s, Tensor)]
    return max((torch.finfo(s.dtype).eps for s in numbers if s.is_floating_point()), default=0.0)


def _as_times(t: Any) -> Tensor:
    """Times as a tensor of their own dtype; Python's numbers are float64."""
    return t.detach() if isinstance(t, Tensor) else torch.as_tensor(np.asarray(t, np.float64))


def inside(t: Tensor, start: float, end: float, coarse: float = 0.0) -> Tensor | None:
    """Times in float64, moved into [start, end] where a rounding is all that they are outside; None else.

    Args:
        t: times of any dtype, whose rounding counts.
        start: one end.
        end: the other.
        coarse: the relative rounding of the ends.
    """
    low, high = sorted((start, end))
    eps = max(coarse, torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0)
    times = t.to(torch.float64)
    slack = eps * max(abs(low), abs(high))
    if not ((times >= low - slack) & (times <= high + slack)).all():
        return None
    return times.clamp(low, high)


def _t_eval(t_eval: Any, start: float, end: float, coarse: float) -> Tensor:
    given = _as_times(t_eval)
    times = inside(given, start, end, coarse)
    forward = 1 if end > start else -1
    if given.ndim != 1 or not (given.diff() * forward > 0).all():
        raise ValueError("t_eval must be a vector of times in strict order, in the direction of t_span.")
    if times is None:
        raise ValueError(
            f"t_eval must lie within t_span, {start:.9g} to {end:.9g}; it runs from {float(given.min()):.9g} "
            f"to {float(given.max()):.9g}."
        )
    return times
