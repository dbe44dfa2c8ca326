r"""Error-controlled steps: each sample its own.

The state is a batch, x of shape (B, *state), and each sample has its own time and step; one step for
the whole of a coupled state is the case B = 1. A step is kept where its error estimate

    err = ‖ h Σ_i (b_i − b̂_i) k_i / (atol + rtol max(|x|, |x⁺|)) ‖_rms  ≤  1,

and the next step follows from this error and those of the steps before (`control.next_step`), within
[0.2 h, 10 h] and not above h after a rejection. Finished samples stay where they are: their step is 0.

Source:
    Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, II.4 (error norm, first step).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.solve.control import NUMPY, Control, Tolerance, decide, plan
from resode.solve.dense import Step, interpolate
from resode.solve.failures import (
    Standing,
    field_not_finite,
    newton_failed,
    nothing_finite,
    step_underflow,
    too_many_steps,
)
from resode.solve.host import decided, plain
from resode.solve.implicit.steps import COUNTS, ImplicitStep, step_rule
from resode.solve.result import Stats
from resode.solve.states import Passing, States
from resode.solve.step import Field, Time, all_finite, increment
from resode.tableaus import ButcherTableau

STANDSTILLS = 20
"""So many attempts may fail at steps too small to move the state."""

FIRST_ERROR = 1e-4  # before the first step, as in Hairer's codes, where an error before lowers the step


@dataclass
class Progress:
    """Where a solve stands: enough for the next interval to go on without a fresh start.

    All on the host, because a decision is taken there at every step; one entry a sample.
    """

    step: np.ndarray  # the step size to try next, (B,), positive
    errors: np.ndarray  # of the last two steps taken, (2, B)
    nfe: np.ndarray  # (B,) int64, as the two below
    n_accepted: np.ndarray
    n_rejected: np.ndarray
    implicit: np.ndarray | None = None  # what implicit steps took, (4, B)

    def stats(self) -> Stats:
        """The counts, one entry a sample."""
        nfe, kept, refused = map(torch.from_numpy, (self.nfe, self.n_accepted, self.n_rejected))
        implicit = () if self.implicit is None else torch.from_numpy(self.implicit)
        return Stats(nfe, kept + refused, kept, refused, 0, *implicit)


class Adaptive:
    """A solve from `start` to `end` under way: `x`, `time` and `progress` say where it stands.

    With control.per_sample the state is a batch, x of shape (B, *state), and f gets t of shape
    (B, 1, …, 1). Without, x has any shape, f gets a 0-D t, and B = 1 below. A sample whose `end` is set to
    its `time` stays there.

    Args:
        tableau: a method with an error estimate.
        f: the field of t and x.
        x: the state at the start.
        start: time of the start; one, or each sample's own, (B,).
        end: time of the end likewise, on the same side for all; infinite to go on until the caller stops.
        control: how steps are chosen.
        resume: where an earlier interval of the same solve ended.

    Raises:
        NonFiniteField: F is not finite at the start.
    """

    def __init__(
        self,
        tableau: ButcherTableau,
        f: Field,
        x: Tensor,
        start: float | np.ndarray,
        end: float | np.ndarray,
        control: Control,
        resume: Progress | None = None,
    ):
        batch = x.shape[0] if control.per_sample else 1
        self.tableau, self.f, self.control = tableau, f, control
        self.per_sample = control.per_sample
        self.time, self.end = (np.full(batch, s, NUMPY[control.dtype]) for s in (start, end))
        self.forward = -1.0 if (self.end < self.time).any() else 1.0
        self.column = (batch,) + (1,) * (x.ndim - 1) if control.per_sample else ()
        self.real = x.dtype.to_real()
        self.x = x
        self.take = step_rule(tableau, control.per_sample, control)
        self.k0 = f(self.as_times(self.time[None])[0], x)
        if not all_finite(self.k0):
            rows = self.k0 if control.per_sample else self.k0[None]
            bad = np.array([not all_finite(row) for row in rows])
            raise field_not_finite(self.standing(bad, np.zeros_like(self.time)), self.k0)
        if resume is None:
            if control.first_step is None:
                step = self._first_step()
            else:
                step = np.full_like(self.time, control.first_step)
            zeros = np.zeros(batch, np.int64)
            calls = int(control.first_step is None)
            error = FIRST_ERROR if control.filter[1] < 0 else 1.0
            implicit = None if tableau.explicit else np.zeros((COUNTS, batch), np.int64)
            resume = Progress(
                step, np.full((2, batch), error, step.dtype), zeros + calls, zeros, zeros, implicit
            )
        step = resume.step.clip(control.min_step, control.max_step)
        self.progress = replace(resume, step=step, nfe=resume.nfe + 1)
        self.rejected, self.standstills = np.zeros(batch, bool), np.zeros(batch, np.int64)
        self.limit: int | np.ndarray = control.max_steps  # of attempts
        if control.per_output:
            self.limit = resume.n_accepted + resume.n_rejected + control.max_steps

    def __copy__(self) -> Adaptive:
        """A solve that goes on from where this one stands, in the same steps whenever it does."""
        other = object.__new__(Adaptive)
        other.__dict__.update(self.__dict__)
        if isinstance(self.take, ImplicitStep):
            other.take = self.take.anew()
        return other

    def as_times(self, times: np.ndarray) -> Sequence[Tensor]:
        """Times (S, B) as f gets them, one tensor for each of S."""
        if not self.column:
            return torch.tensor(times[:, 0].tolist(), dtype=self.real, device=self.x.device).unbind(0)
        return torch.from_numpy(times).to(self.x.device, self.real).view(-1, *self.column).unbind(0)

    def as_size(self, size: np.ndarray) -> Time:
        """Signed step sizes (B,) as factors of the state."""
        if not self.column:
            return self.forward * size.item()
        return torch.from_numpy(self.forward * size).to(self.x.device, self.real).view(self.column)

    def _numbers(self, values: Tensor) -> np.ndarray:
        """One number a sample, on the host."""
        numbers = decided(values.reshape(-1), "error-controlled steps are chosen by the values of the state")
        return np.array(numbers, self.time.dtype)

    def mask(self, keep: np.ndarray) -> Tensor:
        """Marks of samples, (B,), in a shape that selects among states."""
        return torch.from_numpy(keep).to(self.x.device).view(self.column)

    def standing(self, mask: np.ndarray, step: np.ndarray | None = None) -> Standing:
        """Where the first marked sample stands, for an error; it would try `step`, or progress's."""
        i, (t,) = int(mask.nonzero()[0][0]), self.as_times(self.time[None])
        return Standing(
            self.tableau,
            self.f,
            t,
            self.x,
            sample=i if self.control.per_sample else None,
            time=float(self.time[i]),
            step=float((self.progress.step if step is None else step)[i]),
            end=float(self.end[i]),
            several=len(mask) > 1,
        )

    def steps(self, outputs: np.ndarray | None = None) -> Iterator[Step]:
        """Goes to the end, giving every step that passes an output; every step kept where outputs is None.

        Args:
            outputs: times beyond the start in order, (T,) or each sample's own, (B, T).

        Raises:
            MaxStepsReached: as the name says, for some sample.
            StepSizeUnderflow: the tolerance asks for a step below the time's precision.
            NonFiniteField, NonFiniteState: no step, however small, leads to a finite field and state.
        """
        tableau, control = self.tableau, self.control
        forward, callbacks = self.forward, control.callbacks
        progress = self.progress = replace(self.progress)  # a copy of a solve goes on by itself
        stage_times = np.array([*tableau.stage_times, 1.0], self.time.dtype)[:, None]
        implicit = self.take if isinstance(self.take, ImplicitStep) else None
        behind = np.zeros(len(self.time), np.int64)  # outputs passed so far
        if outputs is not None:
            outputs = np.broadcast_to(forward * outputs, (len(self.time), outputs.shape[-1]))
            behind = (outputs <= forward * self.time[:, None]).sum(1)

        while True:
            x, k0, time, step, end = self.x, self.k0, self.time, progress.step, self.end
            attempt = plan(np, time, step, end, forward, control)
            size, active = attempt.size, attempt.active
            if not active.any():
                return
            spent = active & (progress.n_accepted + progress.n_rejected >= self.limit)
            if spent.any():
                raise too_many_steps(self.standing(spent), control.max_steps)
            stuck = active & (attempt.end == time)
            if stuck.any():
                raise step_underflow(self.standing(stuck))
            told = (self.as_times(time[None])[0], x, torch.from_numpy(size)[0]) if callbacks else None
            if callbacks is not None and told is not None:
                callbacks.step(*told)
            h = self.as_size(size)
            at = time + stage_times * (forward * size)
            at[-1] = attempt.end
            if not tableau.looks_ahead:  # a rounding must not take a stage beyond the end
                at = at.clip(max=end) if forward > 0 else at.clip(min=end)
            times = self.as_times(at)

            k, new_x, error, new_calls = self._attempt(times, x, h, k0)
            # What is not active may hold anything.
            verdict = decide(np, attempt, np.where(active, error, 0.0), time, step, progress.errors,
                             self.rejected, tableau.error_power, control)  # fmt: skip
            keep = verdict.keep
            all_kept = bool(keep.all())
            if callbacks is not None and told is not None:
                (callbacks.accept if all_kept else callbacks.reject)(*told)
            progress.nfe = progress.nfe + (keep | verdict.refused) * new_calls
            progress.n_accepted = progress.n_accepted + keep
            progress.n_rejected = progress.n_rejected + verdict.refused
            if verdict.failed.any():
                self.standstills = self.standstills + (verdict.failed & self.stands_still())
            progress.step, progress.errors = verdict.step, verdict.errors
            self.rejected = verdict.rejected
            if implicit is not None:
                progress.implicit = progress.implicit + active * implicit.spent
                implicit.took(keep)
                # A step that would hardly grow stays, and its factors serve again.
                little = keep & (progress.step >= size) & (progress.step <= 1.2 * size) & ~attempt.reaches
                progress.step = np.where(little, size, progress.step)
            if all_kept:
                self.x, self.k0, self.time = new_x, k[-1], attempt.end
            elif keep.any():
                mask = self.mask(keep)
                self.x, self.k0 = torch.where(mask, new_x, x), torch.where(mask, k[-1], k0)
                self.time = np.where(keep, attempt.end, time)
            passed = keep
            if outputs is not None:
                ahead = (outputs <= forward * self.time[:, None]).sum(1)
                passed, behind = ahead > behind, ahead
            if passed.any():
                if control.per_output and outputs is not None:
                    count = progress.n_accepted + progress.n_rejected
                    self.limit = np.where(passed, count + control.max_steps, self.limit)
                yield Step(time, self.time, x, k, new_x, error, k_start=k0 if implicit else None)
            if implicit is not None and (unsolved := verdict.stuck & implicit.failed).any():
                raise newton_failed(self.standing(unsolved), *implicit.last_of(unsolved))
            hopeless = verdict.failed & (verdict.stuck | (self.standstills >= STANDSTILLS))
            if hopeless.any():
                raise nothing_finite(self.standing(hopeless), k)
            if verdict.stuck.any():
                raise step_underflow(self.standing(verdict.stuck))

    def stands_still(self) -> np.ndarray:
        """Whose states the step after a failed one would leave as they are by rounding, (B,); F is not 0."""
        x, k0 = (plain(s).reshape(len(self.time), -1) for s in (self.x, self.k0))
        h = self.forward * self.control.shrink * self.progress.step
        h = torch.from_numpy(h).to(x.device, self.real)[:, None]
        return ((x + h * k0 == x).all(1) & (k0 != 0).any(1)).cpu().numpy()

    def _attempt(
        self, times: Sequence[Tensor], x: Tensor, h: Time, k0: Tensor
    ) -> tuple[list[Tensor], Tensor, np.ndarray, Any]:
        """A step's stages and f at its end, the state there, its error over the tolerance, new calls of f."""
        tableau, control, take = self.tableau, self.control, self.take
        tolerance = (control.rtol, control.atol)
        k, new_x = take(tableau, self.f, times, x, h, k0)
        if not isinstance(take, ImplicitStep):
            k.append(self.f(times[-1], new_x))
            error = self._numbers(error_norm(tableau, control, x, new_x, k, h, tolerance))
            return k, new_x, error, tableau.b_row[-1][0] + 1  # without the first stage
        if not tableau.fsal:
            k.append(self.f(times[-1], new_x))
        estimate = take.error(h, k, k0)
        error = self._numbers(error_norm(tableau, control, x, new_x, k, h, tolerance, estimate))
        # Where no stages were found, the error that asks for a quarter of the step.
        error = np.where(take.failed, (4 * control.safety) ** tableau.error_power, error)
        return k, new_x, error, take.calls + (not tableau.fsal)

    def _first_step(self) -> np.ndarray:
        """A first step whose error should be near the tolerance, (B,); one call of f."""
        control, x, k0 = self.control, self.x, self.k0
        span = abs(self.end - self.time)
        with torch.no_grad():
            scale = control.atol + control.rtol * x.abs()
        d0, d1 = self._norm(x, scale), self._norm(k0, scale)
        small = (d0 < 1e-5) | (d1 < 1e-5)
        h0 = np.where(small, 1e-6, 0.01 * d0 / d1.clip(min=1e-30)).clip(max=span)
        # With gradients on where they are: a field may take one of its own, as a Hamiltonian's does.
        k1 = self.f(self.as_times((self.time + self.forward * h0)[None])[0], x + self.as_size(h0) * k0)
        d2 = self._norm(k1.detach() - k0.detach(), scale) / np.where(h0 == 0, 1.0, h0)
        steepest = np.maximum(d1, d2)
        h1 = np.where(
            steepest <= 1e-15,
            (h0 * 1e-3).clip(min=1e-6),
            (0.01 / steepest.clip(min=1e-30)) ** (1 / (self.tableau.order + 1)),
        )
        # Where the trial state leaves the field's domain, start from the small step.
        h1 = np.where(np.isfinite(d2), h1, h0 * 0.01)
        first = np.minimum(100 * h0, h1).clip(max=span)
        # A field that is 0 here and beside sets no scale, but the interval does.
        return np.where((steepest == 0) & np.isfinite(span), 0.1 * span, first)

    def _norm(self, x: Tensor, scale: Tensor | float) -> np.ndarray:
        """‖x / scale‖ of each sample, (B,); neither squares nor quotients overflow in the state's dtype."""
        with torch.no_grad():
            x = x.detach()
            largest = float(self._numbers(x.abs().max())[0]) if x.numel() else 0.0
            if not (0 < largest < math.inf):
                return self._numbers(self.control.measure(x / scale))
            return self._numbers(self.control.measure(x / largest / scale)) * largest


def adaptive_solve(
    tableau: ButcherTableau,
    f: Field,
    x: Tensor,
    times: Sequence[float] | np.ndarray,
    control: Control,
    resume: Progress | None = None,
    path: States | None = None,
) -> tuple[list[Tensor], Progress]:
    """States at times[1:], each of x's shape, and where the solve stands at the end.

    Args:
        tableau: a method with an error estimate.
        f: the field, as for `Adaptive`.
        x: the state at times[0].
        times: at least two, strictly monotone either way; or each sample's own, (T, B), monotone.
        control: how steps are chosen.
        resume: where an earlier interval of the same solve ended.
        path: where the states at times[1:-1] go as they are made; the last alone is then given back.

    Raises:
        SolverError: as `Adaptive` and its steps.
    """
    at = np.asarray(times, NUMPY[control.dtype])
    solve = Adaptive(tableau, f, x, at[0], at[-1], control, resume)
    outputs, given = at[1:-1].T, list[Tensor]()
    to = given if path is None else path
    if at.ndim > 1:
        states, calls = between(tableau, f, list(solve.steps(outputs)), outputs, solve, (x, at[0]))
        for y in states:
            to.append(y)
    else:
        passing = Passing(tableau, f, outputs, solve.forward, control.per_sample)
        for step in solve.steps(outputs):
            for y in passing.add(step):
                to.append(y)
        for y in passing.finish():
            to.append(y)
        calls = passing.calls
    return [*given, solve.x], replace(solve.progress, nfe=solve.progress.nfe + calls)


def error_norm(
    tableau: ButcherTableau,
    control: Control,
    x: Tensor,
    new_x: Tensor,
    k: Sequence[Tensor],
    h: Time,
    tolerance: tuple[Tolerance, Tolerance],
    estimate: Tensor | None = None,
) -> Tensor:
    """The estimated error over the tolerance, one number a sample; not finite where something is not.

    `estimate` is the error as x, h Σ (b_i − b̂_i) k_i where None.
    """
    rtol, atol = tolerance
    with torch.no_grad():
        scale = torch.maximum(x.abs(), new_x.abs()).mul_(rtol).add_(atol)
        estimate = increment(h, tableau.error_row, k) if estimate is None else estimate
        ratio = estimate / scale
        # An overflowed state, or a last stage outside the estimate, must not pass for a small error.
        ratio = torch.add(ratio, new_x, alpha=0)
        if tableau.error_row[-1][0] < len(k) - 1:
            ratio = torch.add(ratio, k[-1], alpha=0)
        return control.measure(ratio)


def between(
    tableau: ButcherTableau,
    f: Field,
    steps: Sequence[Step],
    outputs: np.ndarray,
    solve: Adaptive,
    start: tuple[Tensor, np.ndarray],
) -> tuple[list[Tensor], int]:
    """As `interpolate`, for outputs that may lie at a sample's start or end too.

    Args:
        tableau: the method.
        f: the field.
        steps: those that passed an output, in the order they were taken.
        outputs: times, (T,), or each sample's own, (B, T).
        solve: at its end.
        start: the state and the times at which it began.
    """
    if outputs.shape[-1] == 0:
        return [], 0
    path, calls = [start[0]] * outputs.shape[-1], 0
    if steps:
        path, calls = interpolate(tableau, f, steps, outputs, solve.forward, solve.control.per_sample)
    return at_the_ends(path, outputs, solve, start), calls


def at_the_ends(
    path: list[Tensor], outputs: np.ndarray, solve: Adaptive, start: tuple[Tensor, np.ndarray]
) -> list[Tensor]:
    """The states at the outputs, the ends where a sample's own, (B, T), lie there."""
    if outputs.ndim > 1:
        for known, times in (start, (solve.x, solve.end)):
            for j in np.flatnonzero((hit := outputs == times[:, None]).any(0)):
                path[j] = torch.where(solve.mask(hit[:, j]), known, path[j])
    return path
