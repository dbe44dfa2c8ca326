"""One step after another of a solve: what `steps` gives out, and what `solve_ivp` goes along."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from resode.checks import checked, warn_user
from resode.solve.adaptive import Adaptive, Progress
from resode.solve.control import MAX_STEPS
from resode.solve.dense import Step, interpolate
from resode.solve.fixed import steps_between
from resode.solve.implicit.steps import ImplicitStep, step_rule
from resode.solve.native import Evaluations, not_finite
from resode.solve.options import NATIVE, SolveSettings, resolve_method
from resode.solve.problem import (
    FlatField,
    Split,
    State,
    check_field,
    check_per_sample,
    check_state,
    checked_args,
    flat_tolerance,
    flatten,
    largest_rms,
    of_one_dtype,
)
from resode.solve.result import MaxStepsReached
from resode.solve.step import Field, all_finite
from resode.tableaus import ButcherTableau

SCIPY_NAMES = {"RK45": "dopri5", "RK23": "bosh3"}
"""scipy's names of the pairs that are also here."""


@dataclass(repr=False)
class DenseOutput:
    """The solution at any time of the solve, to about the accuracy of its steps.

    dopri5, tsit5 and dopri8 interpolate, the last with three more stages a step, bosh3 by a cubic; the other
    methods take a step of their own from the last point before the time, which calls the field again.

    Args:
        tableau: the method.
        f: the field.
        steps: as taken.
        t_min: the earliest time.
        t_max: the latest.
        forward: 1, or −1 where the solve went back in time.
        per_sample: whether the states are batches, each sample with its own steps.
        split: from the state as one vector to y0's structure, where y0 is no tensor.
    """

    tableau: ButcherTableau
    f: Field
    steps: list[Step]
    t_min: float
    t_max: float
    forward: float
    per_sample: bool
    split: Split | None = None

    def __call__(self, t: Tensor | float) -> Any:
        """The state at t: (*y.shape) for one time, (T, *y.shape) for t of shape (T,); in y0's structure.

        Raises:
            ValueError: a time outside the solve.
        """
        times = inside(as_times(t), self.t_min, self.t_max)
        if times is None or times.ndim > 1:
            raise ValueError(
                "dense output holds for one time or a vector of times from "
                f"{self.t_min:g} to {self.t_max:g}; got {as_times(t).tolist()}."
            )
        path = self.at(np.array(times.reshape(-1).tolist()))
        x = self.steps[0].x
        y = torch.stack(path) if path else x.new_zeros((0, *x.shape))
        y = y if times.ndim else y[0]
        return y if self.split is None else self.split(y)

    def at(self, times: np.ndarray) -> list[Tensor]:
        """The states at times (T,), each of y's shape."""
        path = interpolate(self.tableau, self.f, self.steps, times, self.forward, self.per_sample)[0]
        if self.per_sample:
            return path
        # At the end of a step the step's own state, to the bit.
        ends = self.forward * np.array([step.end.item() for step in self.steps])
        places = ends.searchsorted(self.forward * times).clip(max=len(ends) - 1)
        on = ends[places] == self.forward * times
        return [self.steps[i].x_end if met else y for i, met, y in zip(places, on, path, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all of it, where func can be."""
        try:
            pickle.dumps(self.f)
        except Exception as error:
            raise pickle.PicklingError(
                f"the dense output keeps func, which can't be pickled ({error}). Define func at a module's "
                "top level, or pickle the solution without it: dense_output=False, or sol = None."
            ) from error
        return self.__dict__.copy()

    def __copy__(self) -> DenseOutput:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseOutput:
        return replace(self, steps=copy.deepcopy(self.steps, memo))


class EqualSteps:
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
        self.h, self.n, self.limit = 0.0, 0.0, math.inf
        if math.isinf(end):
            if settings.step_size is None:
                raise ValueError(f"{tableau.name} takes fixed steps: without an end it needs step_size.")
            self.h, self.n = self.forward * settings.step_size, math.inf
            self.limit = settings.max_steps
        elif start != end:
            self.n = steps_between(start, end, settings.step_size, settings.n_steps)
            self.h = (end - start) / self.n
        self.taken, self.take = 0, step_rule(tableau, settings.per_sample)

    def steps(self) -> Iterator[Step]:
        """One step after another."""
        x, (low, high) = self.x, sorted((self.start, self.end))
        batch = len(x) if self.per_sample else 1
        column, real = (batch,) + (1,) * (x.ndim - 1) if self.per_sample else (), x.dtype.to_real()
        h = self.h
        take, k0 = self.take, None
        while self.taken < self.n:
            begin = self.start + self.taken * h
            end = self.end if self.taken == self.n - 1 else self.start + (self.taken + 1) * h
            if self.taken >= self.limit:
                raise MaxStepsReached(
                    f"max_steps={self.limit} steps of {abs(h):g} met no terminal event; they ended at "
                    f"t={begin:.9g}. Check the event and t_span's direction, take larger steps, or raise "
                    "max_steps.",
                    time=begin,
                    step_size=abs(h),
                )
            at = [begin + c * h for c in self.tableau.stage_times]
            if not self.tableau.looks_ahead:
                at = [min(max(s, low), high) for s in at]
            times = [x.new_full(column, s, dtype=real) for s in (*at, end)]
            if k0 is None and not self.tableau.explicit:
                k0 = self.f(times[0].new_full(column, begin), x)
            k, new_x = take(self.tableau, self.f, times, x, h, k0)
            if not all_finite(new_x):
                both = torch.tensor([begin, end], dtype=torch.float64)
                raise not_finite(self.tableau, self.f, [x, new_x], both, 1, self.per_sample)
            start_slope = None if self.tableau.explicit else k0
            if self.tableau.explicit or not self.tableau.fsal:
                k.append(self.f(times[-1], new_x))
            k0 = k[-1]
            self.taken += 1
            yield Step(np.full(batch, begin), np.full(batch, end), x, k, new_x, k_start=start_slope)
            x = new_x

    @property
    def progress(self) -> Progress:
        """The counts."""
        zeros = np.zeros(len(self.x) if self.per_sample else 1, np.int64)
        implicit = self.take.total if isinstance(self.take, ImplicitStep) else None
        return Progress(zeros, zeros, zeros + self.counted.calls, zeros + self.taken, zeros, implicit)


def _last(func: Callable[..., Any], args: tuple[Any, ...], t: Tensor, y: Any) -> Any:
    return func(t, y, *args)


@dataclass
class Walk:
    """A problem, ready to be solved step by step.

    Args:
        solve: makes the steps.
        f: the field, counted.
        y0: the state at the start as one tensor.
        split: from it to the structure that was given, None where that is a tensor.
        args: further arguments of func.
        start: time of the start.
        end: time of the end, perhaps infinite.
    """

    solve: Adaptive | EqualSteps
    f: Evaluations
    y0: Tensor
    split: Split | None
    args: tuple[Any, ...]
    start: float
    end: float

    def dense(self, steps: list[Step], end: float) -> DenseOutput:
        """Dense output of the steps from the start to `end`; of the start alone where there are none."""
        s, low, high = self.solve, min(self.start, end), max(self.start, end)
        batch = len(self.y0) if self.per_sample else 1
        if not steps:
            at = np.full(batch, self.start)
            column = (batch,) + (1,) * (self.y0.ndim - 1) if self.per_sample else ()
            k = self.f(self.y0.new_full(column, self.start, dtype=self.y0.dtype.to_real()), self.y0)
            steps = [Step(at, at, self.y0, [k] * (len(s.tableau.b) + 1), self.y0)]
        return DenseOutput(s.tableau, self.f, steps, low, high, s.forward, self.per_sample, self.split)

    @property
    def per_sample(self) -> bool:
        """Whether each sample has its own steps."""
        return self.solve.per_sample


def begin(
    func: Callable[..., Any],
    t_span: Any,
    y0: State,
    method: str | ButcherTableau | None,
    args: Any,
    settings: dict[str, Any],
    *,
    controls: dict[str, Any],
    per_sample: bool = False,
    endless: bool = True,
) -> Walk:
    """Checks a problem and makes it ready.

    Args:
        func: as the user gave it, as all down to args.
        t_span: the start and the end.
        y0: the state.
        method: a name or a tableau.
        args: further arguments of func.
        settings: rtol, atol, step_size, n_steps and max_steps.
        controls: options of error-controlled steps; those that are None count as not given.
        per_sample: each sample its own steps.
        endless: whether the end may be infinite.
    """
    check_state(y0)
    start, end = _span(t_span, endless)
    name = SCIPY_NAMES.get(method, method) if isinstance(method, str) else method
    tableau = resolve_method(name)
    if isinstance(tableau, str):
        raise ValueError(
            f"steps are taken by {', '.join(NATIVE)}; {tableau!r} is torchdiffeq's, use it with odeint."
        )
    if per_sample:
        check_per_sample(y0)
    given = {name: value for name, value in controls.items() if value is not None}
    fixed = settings["step_size"] is not None or settings["n_steps"] is not None or not tableau.adaptive
    if fixed and given:
        raise ValueError(f"{', '.join(given)} steer adaptive steps; these are fixed.")
    extra = checked_args(args)
    check_field(func, extra)
    told = of_one_dtype(func, tree_leaves(y0)[0])
    field: Callable[..., Any] = partial(_last, told, extra) if extra else told
    state, split = (y0, None) if isinstance(y0, Tensor) else flatten(y0)
    for name in ("rtol", "atol"):
        settings[name] = flat_tolerance(name, settings[name], y0)
    if split is not None:
        field = FlatField(field, split)
        given = given if fixed else {"norm": lambda y: largest_rms(split(y)), **given}
    resolved = SolveSettings(tableau, options=given, per_sample=per_sample, **settings)
    resolved.check()
    counted = Evaluations(field)
    solve = (
        EqualSteps(tableau, counted, state, start, end, resolved)
        if fixed
        else Adaptive(tableau, counted, state, start, end, resolved.control(state, None))
    )
    return Walk(solve, counted, state, split, extra, start, end)


@dataclass
class SolverStep:
    """One step that was kept: the solution from `start` to `time`.

    Args:
        start: the time at its start.
        time: the time at its end.
        state: the state at its end, in y0's structure.
        error: the estimated error over the tolerance, at most 1; None for steps of a given size.
        sol: dense output, which the step itself gives when called: `step(t)` for start ≤ t ≤ time.
    """

    start: float
    time: float
    state: Any
    error: float | None
    sol: DenseOutput

    def __call__(self, t: Tensor | float) -> Any:
        """The state at a time within the step, (*y.shape), or at several, (T, *y.shape)."""
        return self.sol(t)


@checked
def steps(
    func: Callable[..., Any],
    y0: State,
    t_span: Sequence[float] | Tensor,
    method: str | ButcherTableau | None = None,
    args: Sequence[Any] | None = None,
    *,
    rtol: Any = None,
    atol: Any = None,
    first_step: float | None = None,
    min_step: float | None = None,
    max_step: float | None = None,
    controller: str | Sequence[float] | None = None,
    step_size: float | None = None,
    n_steps: int | None = None,
    max_steps: int = MAX_STEPS,
) -> Iterator[SolverStep]:
    r"""The solution of dy/dt = func(t, y), y(t_span[0]) = y0, one step at a time.

    The solve goes on when the next step is asked for; leave the loop to end it.

    Args:
        func: `func(t, y, *args)` -> dy/dt of y's shape or structure, as for `odeint`.
        y0: the state at the start.
        t_span: the start and the end, two floats; the end may be the lesser, the start, or infinite.
        method: as for `solve_ivp`.
        args: further arguments of func.
        rtol: relative tolerance, as for `odeint`.
        atol: absolute tolerance likewise.
        first_step: the first step to try.
        min_step: a step that is not above it is kept, whatever its error.
        max_step: the largest step.
        controller: how the next step follows from the errors, as in `odeint`'s options.
        step_size: the largest of equal steps over t_span; makes every method take fixed steps.
        n_steps: the number of equal steps over t_span; likewise.
        max_steps: attempted steps.

    Returns:
        An iterator over `SolverStep`: its `start` and `time`, the `state` at its end, the `error`, and the
        solution within it, `step(t)`. Gradients flow to y0 and to what func uses.

    Raises:
        ValueError, TypeError: an argument is wrong.
        SolverError: the solve can't go on.

    Example:
        >>> import torch, resode
        >>> for step in resode.steps(lambda t, y: y, torch.ones(1, dtype=torch.float64), (0.0, float("inf"))):
        ...     if step.state > 100:  # stop where the solution says so
        ...         break
        >>> step.time > 4.6, bool(step.error <= 1), step(4.6).item()
        (True, True, 99.484...)
    """
    controls = dict(first_step=first_step, min_step=min_step, max_step=max_step, controller=controller)
    settings = dict(rtol=rtol, atol=atol, step_size=step_size, n_steps=n_steps, max_steps=max_steps)
    walk = begin(func, t_span, y0, method, args, settings, controls=controls)
    return _given_out(walk)


def _given_out(walk: Walk) -> Iterator[SolverStep]:
    for step in walk.solve.steps():
        start, end = step.start.item(), step.end.item()
        sol = walk.dense([step], end)
        sol.t_min, sol.t_max = min(start, end), max(start, end)
        state = step.x_end if walk.split is None else walk.split(step.x_end)
        yield SolverStep(start, end, state, None if step.error is None else step.error.item(), sol)


def _span(t_span: Any, endless: bool) -> tuple[float, float]:
    if isinstance(t_span, Tensor) and t_span.requires_grad:
        raise ValueError("t_span gets no gradient; use odeint for that, or t_span.detach().")
    try:
        start, end = (float(s) for s in t_span)
    except (TypeError, ValueError):
        raise ValueError(f"t_span must be two times, the start and the end; got {t_span!r}.") from None
    if not math.isfinite(start) or math.isnan(end):
        raise ValueError(f"t_span must be a finite start and an end, got {start:g} and {end:g}.")
    if math.isinf(end) and not endless:
        raise ValueError(f"t_span ends at {end:g}, which only an event with terminal=True can end; got none.")
    return start, end


def as_times(t: Any) -> Tensor:
    """Times as a tensor without gradient; Python's numbers are float64, numpy's floats what they are."""
    if isinstance(t, Tensor):
        return t.detach()
    given = np.asarray(t)
    return torch.as_tensor(given if given.dtype in (np.float16, np.float32) else given.astype(np.float64))


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
    slack = eps * max(abs(s) for s in (low, high) if math.isfinite(s))
    if not ((times >= low - slack) & (times <= high + slack)).all():
        return None
    return times.clamp(low, high)
