"""`solve_ivp`: scipy's way to ask, with torch's tensors and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.checks import checked, one_of
from resode.results import Result
from resode.solve.control import MAX_STEPS
from resode.solve.dense import Step, interpolate
from resode.solve.events import Event, Within, numbers
from resode.solve.problem import State, checked_args
from resode.solve.result import MaxStepsReached, Stats
from resode.solve.states import Passing, States
from resode.solve.step import Field
from resode.solve.stepping import DenseOutput, Walk, as_times, begin, inside
from resode.tableaus import ButcherTableau


@dataclass(repr=False)
class Solution(Result):
    """What `solve_ivp` gives back.

    Args:
        t: the times, (T,): t_eval, or every step's end where t_eval is None, and the start.
        y: the states there, (T, *y0.shape), in y0's structure: time first, where scipy has it last.
        stats: what it cost.
        status: 0, the end was reached; 1, a terminal event ended the solve; −1, max_steps did, with
            on_max_steps="stop". Other failures raise SolverError.
        message: the status in words.
        sol: dense output, `sol(t)`; None with dense_output=False. The solution itself can be called, too.
        t_events: for every event the times of its zeros, (E,); None without events.
        y_events: and the states there, (E, *y0.shape).
    """

    _columns = ("t", "y")

    t: Tensor
    y: Any
    stats: Stats
    status: int
    message: str
    sol: DenseOutput | None = None
    t_events: list[Tensor] | None = None
    y_events: list[Any] | None = None

    @property
    def success(self) -> bool:
        """Whether the solve ended as asked: always but for max_steps, because other failures raise."""
        return self.status >= 0

    def __call__(self, t: Tensor | float) -> Any:
        """Dense output: the state at t, (*y0.shape) or (T, *y0.shape)."""
        if self.sol is None:
            raise ValueError("the solution keeps no steps: solve with dense_output=True to evaluate it.")
        return self.sol(t)


@checked
def solve_ivp(
    func: Callable[..., Any],
    t_span: Sequence[float] | Tensor,
    y0: State,
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
    controller: str | Sequence[float] | None = None,
    step_size: float | None = None,
    n_steps: int | None = None,
    max_steps: int = MAX_STEPS,
    per_sample: bool = False,
    on_max_steps: str = "raise",
) -> Solution:
    r"""Solve dy/dt = func(t, y), y(t_span[0]) = y0, over t_span, as scipy's function of this name.

    Args:
        func: `func(t, y, *args)` -> dy/dt of y's shape, as for `odeint`.
        t_span: the start and the end, two floats; the end may be the lesser, the start itself, or infinite
            with a terminal event.
        y0: the state at the start, a float or complex tensor of any shape, or tensors in tuples, lists and
            dicts; func, events and the solution then have that structure.
        method: a name in resode.METHODS that can be solved with, or a tableau; "dopri5" by default, which
            scipy calls "RK45"; "RK23" is "bosh3".
        t_eval: times to give the state at, within t_span and in its direction, which may repeat; every
            step's where None.
        dense_output: keep the steps, so that the solution can be evaluated at any time.
        events: one or several functions `event(t, y, *args)` -> one number, whose zeros are to be found. One
            with an attribute `terminal` = True (or a number of zeros) ends the solve; one with `direction`
            above (below) 0 counts where it rises (falls) only. A zero at the start counts once, by the way
            the event goes on; of booleans, a zero is where they flip. Pairs of zeros within an eighth of a
            step can be missed: max_step bounds it.
        args: further arguments of func and the events.
        rtol: relative tolerance, as for `odeint` (scipy's defaults are looser).
        atol: absolute tolerance likewise.
        first_step: the first step to try.
        min_step: a step that is not above it is kept, whatever its error.
        max_step: the largest step.
        controller: how the next step follows from the errors, as in `odeint`'s options.
        step_size: the largest of equal steps over t_span; makes every method take fixed steps.
        n_steps: the number of equal steps over t_span; likewise.
        max_steps: attempted steps.
        per_sample: each sample of dimension 0 has its own steps; needs t_eval, and no events.
        on_max_steps: "raise" MaxStepsReached where max_steps end the solve, or "stop" there: status −1, the
            error's text as message, and the time and state reached last in t and y.

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
    watch = _Watch(events, checked_args(args))
    if per_sample and (t_eval is None or events or on_max_steps != "raise"):
        raise ValueError(
            "per_sample=True gives each sample its own times: give t_eval, no events, and leave on_max_steps."
        )
    one_of("on_max_steps", on_max_steps, ("raise", "stop"))
    controls = dict(first_step=first_step, min_step=min_step or None, controller=controller,
                    max_step=None if max_step == math.inf else max_step)  # fmt: skip
    settings = dict(rtol=rtol, atol=atol, step_size=step_size, n_steps=n_steps, max_steps=max_steps)
    walk = begin(func, t_span, y0, method, args, settings, controls=controls, per_sample=per_sample,
                 endless=min(watch.limits, default=math.inf) < math.inf)  # fmt: skip
    if walk.split is not None:
        watch.take(walk.split)
    points = None if t_eval is None else _t_eval(t_eval, walk.start, walk.end, _rounding(t_span))
    return _solved(walk, watch, points, dense_output, on_max_steps)


def _solved(
    walk: Walk, watch: _Watch, points: np.ndarray | None, dense_output: bool, on_max_steps: str
) -> Solution:
    """Goes along the steps to the end, a terminal event or, where asked, the last of max_steps."""
    solve, y0 = walk.solve, walk.y0
    passing = Passing(solve.tableau, walk.f, np.zeros(0) if points is None else points, solve.forward,
                      walk.per_sample)  # fmt: skip
    path = States(0 if points is None else len(points) + 1, y0)
    if points is None:
        path.append(y0)
    ends: list[float] = [walk.start]
    kept: list[Step] = []
    final: tuple[float, Tensor] | None = None
    time, state, stopped = walk.start, y0, None
    try:
        for step in solve.steps():
            final = watch.see(step, solve.tableau, walk.f, solve.forward) if watch.events else None
            time, state = (step.end[0], step.x_end) if final is None else final
            if dense_output:
                kept.append(step)
            if points is None:
                ends.append(time)
                path.append(state)
            elif final is not None:
                passing.end_at(time)
            for y in passing.add(step) if points is not None else ():
                path.append(y)
            if final is not None:
                break
    except MaxStepsReached as error:
        if on_max_steps == "raise":
            raise
        stopped = error
        passing.end_at(time)
    at_rest = time == walk.start  # the outputs that are left lie there too
    for y in [y0] * len(passing.outputs) if at_rest else passing.finish():
        path.append(y)
    times = np.array(ends) if points is None else points[: path.count]
    if stopped and (len(times) == 0 or times[-1] != time):
        path.append(state)
        times = np.append(times, time)
    dense = walk.dense(kept, time) if dense_output else None
    y = path.stacked() if path.count else y0.new_zeros((0, *y0.shape))
    stats = solve.progress.stats()
    if not walk.per_sample:
        stats = replace(stats.item(), nfe=walk.f.calls)
    message = "the end of t_span was reached." if final is None else "a terminal event ended the solve."
    status, message = (-1, str(stopped)) if stopped else (int(final is not None), message)
    t_events, y_events = watch.found(y0) if watch.events else (None, None)
    if walk.split is not None:
        y, y_events = walk.split(y), y_events and [walk.split(e) for e in y_events]
    return Solution(
        torch.from_numpy(times).to(y0.device), y, stats, status, message, dense, t_events, y_events
    )


class _Watch:
    """The events of a solve: their zeros, step by step."""

    def __init__(self, events: Any, args: tuple[Any, ...]):
        given = () if events is None else events if isinstance(events, tuple | list) else (events,)
        if not all(map(callable, given)):
            raise TypeError(f"events must be a function of (t, y), or a list of such; got {events!r}.")
        self.events = [(lambda t, y, e=e: e(t, y, *args)) for e in given]
        self.limits = [_zeros_to_end(getattr(e, "terminal", None)) for e in given]
        self.direction = [_direction(getattr(e, "direction", 0)) for e in given]
        self.times: list[list[float]] = [[] for _ in given]
        self.states: list[list[Tensor]] = [[] for _ in given]
        self.values: list[float] | None = None  # at the last step's end

    def take(self, split: Callable[[Tensor], Any]) -> None:
        """Gives the events the state in its structure."""
        self.events = [(lambda t, y, e=e: e(t, split(y))) for e in self.events]

    def see(
        self, step: Step, tableau: ButcherTableau, f: Field, forward: float
    ) -> tuple[float, Tensor] | None:
        """Notes the zeros within a step; the time and state of one that ends the solve, or None."""
        k0, k1 = step.slopes

        def exact(_: Within, time: np.ndarray) -> Tensor:
            return interpolate(tableau, f, [step], time, forward, False)[0][0]

        begin, end = step.start.astype(float), step.end.astype(float)
        within = Within(begin, end, step.x, k0, step.x_end, exact, k1=k1)
        points = [(within.time(i), x) for i, x in enumerate(within.states)]
        before = self.values or [numbers(event, *points[0]).item() for event in self.events]
        values = [
            [b, *(numbers(e, *p).item() for p in points[1:])]
            for e, b in zip(self.events, before, strict=True)
        ]
        zeros = [
            (time, i)
            for i, (event, v) in enumerate(zip(self.events, values, strict=True))
            for time in _zeros(within, event, v, self.direction[i], self.values is None)
        ]
        self.values = [v[-1] for v in values]
        for time, i in sorted(zeros, key=lambda zero: forward * zero[0]):
            self.times[i].append(time)
            self.states[i].append(within.state(np.array([time])) if time != within.begin else step.x)
            if len(self.times[i]) >= self.limits[i]:
                return time, self.states[i][-1]
        return None

    def found(self, y0: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The zeros' times and states, one tensor an event."""
        times = [torch.tensor(s, dtype=torch.float64, device=y0.device) for s in self.times]
        return times, [torch.stack(s) if s else y0.new_zeros((0, *y0.shape)) for s in self.states]


def _zeros(
    within: Within, event: Event, values: list[float], direction: float, is_first: bool
) -> list[float]:
    """The times of an event's zeros within a step, at whose parts' ends it has the given values."""
    times: list[float] = []
    if is_first and values[0] == 0 and direction * values[1] >= 0:
        times.append(within.begin.item())
    for i, (before, after) in enumerate(pairwise(values)):
        falls, rises = before > 0 >= after, before < 0 <= after
        if (falls and direction <= 0) or (rises and direction >= 0):
            sign = 1.0 if falls else -1.0

            def value(t: np.ndarray, y: Tensor, sign: float = sign) -> np.ndarray:
                return sign * numbers(event, t, y)

            around = within.bracket(value, np.array([i]), np.array([True]))
            if around[2] > 0 >= around[3] and (time := within.zeros(value, around).item()) not in times:
                times.append(time)
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


def _direction(direction: Any) -> float:
    """An event's attribute `direction`, whose sign counts."""
    if not isinstance(direction, int | float | np.number) or math.isnan(direction):
        raise ValueError(
            "an event's attribute direction must be a number: above 0 to count rises, below 0 falls, 0 both; "
            f"got {direction!r}."
        )
    return float(direction)


def _rounding(t_span: Any) -> float:
    """How coarse the ends are: the rounding of a tensor's dtype, 0 for Python's numbers."""
    numbers = [s for s in ([t_span] if isinstance(t_span, Tensor) else t_span) if isinstance(s, Tensor)]
    return max((torch.finfo(s.dtype).eps for s in numbers if s.is_floating_point()), default=0.0)


def _t_eval(t_eval: Any, start: float, end: float, coarse: float) -> np.ndarray:
    try:
        given = as_times(t_eval)
    except (TypeError, ValueError):
        raise ValueError(f"t_eval must be a vector of times, got {t_eval!r}.") from None
    times = inside(given, start, end, coarse)
    forward = 1 if end >= start else -1
    if given.ndim != 1 or not (given.diff() * forward >= 0).all():
        raise ValueError("t_eval must be a vector of times in order, in the direction of t_span.")
    if times is None:
        raise ValueError(
            f"t_eval must lie within t_span, {start:.9g} to {end:.9g}; it runs from {float(given.min()):.9g} "
            f"to {float(given.max()):.9g}."
        )
    return np.array(times.tolist())
