r"""Error-controlled steps: each sample its own.

The state is a batch, x of shape (B, *state), and each sample has its own time and step; one step for
the whole of a coupled state is the case B = 1. A step is kept where its error estimate

    err = ‖ h Σ_i (b_i − b̂_i) k_i / (atol + rtol max(|x|, |x⁺|)) ‖_rms  ≤  1,

and the next step is h · 0.9 err^(−α) err_previous^β, within [0.2 h, 10 h] and not above h after a
rejection. Finished samples stay where they are: their step is 0.

Source:
    Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, II.4 (error norm, first
    step); Hairer & Wanner, Solving Ordinary Differential Equations II, IV.2 (the PI controller).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resode.solve.control import Control, rms
from resode.solve.dense import Step, interpolate
from resode.solve.diagnosis import STIFF_SOLVER, explain, number, spectrum
from resode.solve.result import (
    MaxStepsReached,
    NonFiniteField,
    NonFiniteState,
    SolverError,
    Stats,
    StepSizeUnderflow,
)
from resode.solve.step import Field, combine, stages
from resode.tableaus import ButcherTableau

FIRST_ERROR = 1e-4  # err_previous of the first step, as in Hairer's codes: there is none before it


@dataclass
class Progress:
    """Where a solve stands: enough for the next interval to go on without a fresh start."""

    step: Tensor  # the step size to try next, (B,), positive
    previous_error: Tensor  # (B,)
    nfe: Tensor  # (B,) int64, as the two below
    n_accepted: Tensor
    n_rejected: Tensor

    def stats(self) -> Stats:
        """The counts, one entry a sample."""
        return Stats(self.nfe, self.n_accepted + self.n_rejected, self.n_accepted, self.n_rejected)


class Adaptive:
    """A solve from `start` to `end` under way: `x`, `time` and `progress` say where it stands.

    Args:
        tableau: an explicit method with an error estimate.
        f: the field of t, shape (B, 1, …, 1), and x, shape (B, *state).
        x: the state at the start, shape (B, *state).
        start: time of the start.
        end: time of the end, on either side; infinite to go on until the caller stops.
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
        start: float,
        end: float,
        control: Control,
        resume: Progress | None = None,
    ):
        batch, device = x.shape[0], x.device
        self.tableau, self.f, self.control, self.end = tableau, f, control, end
        self.forward = 1.0 if end > start else -1.0
        self.column = (batch,) + (1,) * (x.ndim - 1)
        self.eps = torch.finfo(control.dtype).eps
        self.x = x
        self.time = torch.full((batch,), start, dtype=control.dtype, device=device)
        self.k0 = f(self.time.view(self.column), x)
        bad = ~torch.isfinite(rms(self.k0.detach()))
        if bad.any():
            raise NonFiniteField(
                f"the field is not finite at t={start:.9g}{_which(bad)}, before the first step: F(x) holds "
                f"{_first_bad(self.k0[bad][0])}. Check the field's weights and the state it is given.",
                **_place(bad, self.time, torch.zeros_like(self.time)),
            )
        if resume is None:
            if control.first_step is None:
                step = self._first_step()
            else:
                step = torch.full_like(self.time, control.first_step)
            zeros = torch.zeros(batch, dtype=torch.int64, device=device)
            calls = int(control.first_step is None)
            resume = Progress(step, torch.full_like(step, FIRST_ERROR), zeros + calls, zeros, zeros)
        step = resume.step.clamp(control.min_step, control.max_step)
        self.progress = replace(resume, step=step, nfe=resume.nfe + 1)

    def steps(self, outputs: Tensor | None = None) -> Iterator[Step]:
        """Goes to the end, giving every step that passes an output; every step kept where outputs is None.

        Args:
            outputs: times strictly between start and end, in order, (T,).

        Raises:
            MaxStepsReached: as the name says, for some sample.
            StepSizeUnderflow: the tolerance asks for a step below the time's precision.
            NonFiniteField, NonFiniteState: no step, however small, leads to a finite field and state.
        """
        tableau, f, control, column = self.tableau, self.f, self.control, self.column
        end, forward, progress = self.end, self.forward, self.progress
        rtol, atol, norm, callbacks = control.rtol, control.atol, control.norm, control.callbacks
        real = self.x.dtype.to_real()
        stage_times = torch.tensor(tableau.stage_times, dtype=control.dtype, device=self.x.device)
        new_calls = tableau.b_row[-1][0] + 1  # the stages beyond k_1, and f at the step's end
        beta = 0.2 / tableau.order  # 0.04 for order 5, as α is 0.17
        alpha = 1 / tableau.order - 0.75 * beta
        limit: int | Tensor = control.max_steps
        if control.per_output:
            limit = progress.n_accepted + progress.n_rejected + limit
        rejected = torch.zeros(self.x.shape[:1], dtype=torch.bool, device=self.x.device)

        while True:
            x, k0, time, step = self.x, self.k0, self.time, progress.step
            left = (end - time) * forward
            active = left > 0
            spent = active & (progress.n_accepted + progress.n_rejected >= limit)
            any_active, any_spent = torch.stack([active.any(), spent.any()]).tolist()
            if not any_active:
                return
            if any_spent:
                raise self._too_many_steps(spent)
            # Stretched by 1 % rather than leaving a sliver for another step.
            reaches = step * 1.01 >= left
            size = torch.where(reaches, left, step)
            if callbacks is not None:
                callbacks.step(time[0], x[0], size[0])
            new_time = torch.where(reaches, end, time + forward * size)
            h = (forward * size).to(real).view(column)
            at = time[:, None] + stage_times * (forward * size)[:, None]
            at = at.clamp(max=end) if forward > 0 else at.clamp(min=end)

            k = stages(tableau, f, [t.view(column) for t in at.unbind(1)], x, h, k0)
            new_x = combine(x, h, tableau.b_row, k)
            k.append(f(new_time.view(column), new_x))
            with torch.no_grad():
                scale = atol + rtol * torch.maximum(x.abs(), new_x.abs())
                error = norm(combine(torch.zeros_like(x), h, tableau.error_row, k) / scale).to(size.dtype)
                # An overflowed state, or a last stage outside the estimate, must not pass for a small error.
                failed = active & ~torch.isfinite(error + 0 * rms(new_x) + 0 * rms(k[-1]))
                keep = active & (error <= 1)
                if control.min_step > 0:
                    keep = active & ~failed & ((error <= 1) | (size <= control.min_step * 1.01))
                passed = keep
                if outputs is not None:
                    passed = keep & (
                        _count_before(outputs, new_time, forward) > _count_before(outputs, time, forward)
                    )
                stuck = active & (new_time == time)
                any_failed, any_stuck, all_kept, any_kept, any_passed = torch.stack(
                    [failed.any(), stuck.any(), keep.all(), keep.any(), passed.any()]
                ).tolist()
            if any_stuck:
                raise self._underflow(stuck)
            if any_failed:
                # The attempt is dropped for all, so that no infinity enters the graph of other samples;
                # only the failing samples' steps shrink and count.
                if callbacks is not None:
                    callbacks.reject(time[0], x[0], size[0])
                progress.n_rejected, progress.nfe = (
                    progress.n_rejected + failed,
                    progress.nfe + failed * new_calls,
                )
                progress.step = torch.where(failed, size * control.shrink, step)
                rejected = rejected | failed
                underflow = failed & (self._too_small(progress.step) | (size <= control.min_step))
                if underflow.any():
                    raise self._not_finite(underflow, k)
                continue

            if callbacks is not None:
                (callbacks.accept if all_kept else callbacks.reject)(time[0], x[0], size[0])
            progress.nfe = progress.nfe + active * new_calls
            progress.n_accepted = progress.n_accepted + keep
            progress.n_rejected = progress.n_rejected + (active & ~keep)
            error = error.clamp(min=1e-10)
            # A rejected step shrinks by its own error alone, and its successor must not grow.
            factor = torch.where(
                keep, error.pow(-alpha) * progress.previous_error.pow(beta), error.pow(-1 / tableau.order)
            )
            factor = (control.safety * factor).clamp(control.shrink, control.grow)
            factor = torch.where(rejected | ~keep, factor.clamp(max=1.0), factor)
            # A step cut short by the end says little about the one that the tolerance allows.
            proposal = torch.where(keep & reaches, torch.maximum(size * factor, step), size * factor)
            proposal = proposal.clamp(control.min_step, control.max_step)
            progress.step = torch.where(active, proposal, step)
            progress.previous_error = torch.where(keep, error, progress.previous_error)
            rejected = active & ~keep
            if all_kept:
                self.x, self.k0, self.time = new_x, k[-1], new_time
            elif any_kept:
                mask = keep.view(column)
                self.x, self.k0 = torch.where(mask, new_x, x), torch.where(mask, k[-1], k0)
                self.time = torch.where(keep, new_time, time)
            if any_passed:
                if control.per_output and outputs is not None:
                    count = progress.n_accepted + progress.n_rejected
                    limit = torch.where(passed, count + control.max_steps, limit)
                yield Step(time, self.time, x, k, new_x)
            if not all_kept and (underflow := rejected & self._too_small(progress.step)).any():
                raise self._underflow(underflow)

    def _first_step(self) -> Tensor:
        """A first step whose error should be near the tolerance, (B,); one call of f."""
        control, x, k0, time = self.control, self.x, self.k0, self.time.view(self.column)
        dtype, span = control.dtype, abs(self.end - float(self.time[0]))
        with torch.no_grad():
            scale = control.atol + control.rtol * x.abs()
            d0, d1 = control.norm(x / scale).to(dtype), control.norm(k0 / scale).to(dtype)
            small = (d0 < 1e-5) | (d1 < 1e-5)
            h0 = torch.where(small, 1e-6, 0.01 * d0 / d1.clamp(min=1e-30)).clamp(max=span)
            h = h0.view(self.column) * self.forward
            k1 = self.f(time + h, x + h.to(x.dtype.to_real()) * k0)
            d2 = control.norm((k1 - k0) / scale).to(dtype) / h0
            steepest = torch.maximum(d1, d2)
            h1 = torch.where(
                steepest <= 1e-15,
                (h0 * 1e-3).clamp(min=1e-6),
                (0.01 / steepest.clamp(min=1e-30)).pow(1 / (self.tableau.order + 1)),
            )
            # Where the trial state leaves the field's domain, start from the small step.
            h1 = torch.where(torch.isfinite(d2), h1, h0 * 0.01)
            return torch.minimum(100 * h0, h1).clamp(max=span)

    def _too_small(self, step: Tensor) -> Tensor:
        return step <= 4 * self.eps * self.time.abs().clamp(min=1e-290 if self.eps < 1e-10 else 1e-30)

    def _explain(self, mask: Tensor) -> tuple[str, str, complex | None]:
        """Why the first marked sample can't go on, from its Jacobian's eigenvalues."""
        i = int(mask.nonzero()[0])
        eigenvalues = spectrum(self.f, self.time.view(self.column), self.x, i)
        left = (self.end - float(self.time[i])) * self.forward
        return explain(self.tableau, eigenvalues, float(self.progress.step[i]), left)

    def _too_many_steps(self, spent: Tensor) -> SolverError:
        kind, text, eigenvalue = self._explain(spent)
        control = self.control
        if kind == "stiff":
            advice = f"{text}. Try {STIFF_SOLVER}, or raise max_steps."
        elif kind == "growing":
            advice = f"{text}. End the interval before, check the field, or raise max_steps."
        elif kind == "smooth":
            advice = f"{text}; the tolerance asks for shorter ones. Raise max_steps, or loosen rtol and atol."
        else:
            advice = f"Raise max_steps, loosen rtol and atol, or, if it is stiff, try {STIFF_SOLVER}."
        where = _where(spent, self.time, self.progress.step)
        goal = f"before {self.end:g}"
        if math.isinf(self.end):
            goal = "without an event"
            advice = f"Check event_fn's sign and t's direction. {advice[0].upper()}{advice[1:]}"
        return MaxStepsReached(
            f"max_steps={control.max_steps} attempted steps ended at {where}, {goal}. {advice}",
            **_place(spent, self.time, self.progress.step),
            eigenvalue=eigenvalue,
        )

    def _underflow(self, underflow: Tensor) -> SolverError:
        kind, text, eigenvalue = self._explain(underflow)
        if kind == "stiff":
            advice = f"{text}. Try {STIFF_SOLVER}."
        elif kind == "growing":
            advice = f"{text}: end the interval before, or check the field."
        else:
            cause = (
                f"{text}, so the field is discontinuous" if text else "the field is discontinuous or stiff"
            )
            advice = (
                f"{cause} there, or rtol and atol are finer than its rounding. Loosen them, or name the "
                'discontinuity with options={"jump_t": …}, or end the interval at it.'
            )
        where = _where(underflow, self.time, self.progress.step)
        return StepSizeUnderflow(
            f"the tolerance asks for a step below what the time resolves at {where}: {advice}",
            **_place(underflow, self.time, self.progress.step),
            eigenvalue=eigenvalue,
        )

    def _not_finite(self, underflow: Tensor, k: list[Tensor]) -> SolverError:
        kind, text, eigenvalue = self._explain(underflow)
        where, i = _where(underflow, self.time, self.progress.step), int(underflow.nonzero()[0])
        place = _place(underflow, self.time, self.progress.step)
        reason = f" {text[0].upper()}{text[1:]}." if kind == "growing" else ""
        bad = next((stage[i] for stage in k if not torch.isfinite(stage[i]).all()), None)
        # A huge state that overflows in F is a blow-up; a moderate one that F can't take is F's domain.
        if bad is not None and kind != "growing" and float(self.x[i].detach().abs().max()) < 1e6:
            return NonFiniteField(
                f"the field is not finite near {where}: F(x) holds {_first_bad(bad)} at a finite state, and "
                f"no shorter step avoids it.{reason} The solution reaches the edge of the field's domain: "
                "end the interval before, or extend the field.",
                **place,
                eigenvalue=eigenvalue,
            )
        return NonFiniteState(
            f"the state leaves the finite numbers at {where}: a blow-up in finite time, or a field that "
            f"overflows.{reason} End the interval before it, or check the field.",
            **place,
            eigenvalue=eigenvalue,
        )


def adaptive_solve(
    tableau: ButcherTableau,
    f: Field,
    x: Tensor,
    times: list[float],
    control: Control,
    resume: Progress | None = None,
) -> tuple[list[Tensor], Progress]:
    """States at times[1:], each (B, *state), and where the solve stands at the end.

    Args:
        tableau: an explicit method with an error estimate.
        f: the field, as for `Adaptive`.
        x: the state at times[0], shape (B, *state).
        times: at least two, strictly monotone either way.
        control: how steps are chosen.
        resume: where an earlier interval of the same solve ended.

    Raises:
        SolverError: as `Adaptive` and its steps.
    """
    solve = Adaptive(tableau, f, x, times[0], times[-1], control, resume)
    outputs = torch.tensor(times[1:-1], dtype=control.dtype, device=x.device)
    steps = list(solve.steps(outputs))
    path, calls = interpolate(tableau, f, steps, outputs, solve.forward)
    return [*path, solve.x], replace(solve.progress, nfe=solve.progress.nfe + calls)


def _count_before(outputs: Tensor, time: Tensor, forward: float) -> Tensor:
    """How many outputs lie at or before `time`, in the direction of integration, (B,)."""
    return torch.searchsorted(forward * outputs, forward * time, right=True)


def _which(mask: Tensor) -> str:
    """The first marked sample, for a message; nothing where there is one sample only."""
    return f", sample {int(mask.nonzero()[0])}" if len(mask) > 1 else ""


def _where(mask: Tensor, time: Tensor, step: Tensor) -> str:
    i = int(mask.nonzero()[0])
    return f"t={float(time[i]):.9g}{_which(mask)}, with a step of {number(float(step[i]))}"


def _place(mask: Tensor, time: Tensor, step: Tensor) -> dict:
    i = int(mask.nonzero()[0])
    return {
        "time": float(time[i]),
        "step_size": float(step[i]),
        "sample": i if len(mask) > 1 else None,
    }


def _first_bad(dx: Tensor) -> str:
    """Which entry of one sample's derivative is not finite."""
    dx = dx.detach()
    entry = (~torch.isfinite(dx)).nonzero()[0].tolist()
    value = dx[tuple(entry)].item()
    return f"{value} at entry {entry}" if entry else f"{value}"
