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

from dataclasses import dataclass, field

import torch
from torch import Tensor

from resode.solve.result import MaxStepsReached, NonFiniteField, NonFiniteState, Stats, StepSizeUnderflow
from resode.solve.step import Field, combine, stages
from resode.tableaus import ButcherTableau

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
FIRST_ERROR = 1e-4  # err_previous of the first step, as in Hairer's codes: there is none before it
EPS = torch.finfo(torch.float64).eps


@dataclass
class Progress:
    """Where a solve stands: enough for the next interval to go on without a fresh start."""

    step: Tensor  # the step size to try next, (B,) float64, positive
    previous_error: Tensor  # (B,) float64
    nfe: Tensor  # (B,) int64, as the two below
    n_accepted: Tensor
    n_rejected: Tensor

    def stats(self) -> Stats:
        """The counts, one entry a sample."""
        return Stats(self.nfe, self.n_accepted + self.n_rejected, self.n_accepted, self.n_rejected)


@dataclass
class Crossings:
    """The steps inside which an output lies: what their interpolants need. Entries are (B, …) each."""

    start: list[Tensor] = field(default_factory=list)
    end: list[Tensor] = field(default_factory=list)  # the start again for samples that did not take it
    x: list[Tensor] = field(default_factory=list)
    k: list[list[Tensor]] = field(default_factory=list)  # the last one is f at the step's end
    x_end: list[Tensor] = field(default_factory=list)


def rms(x: Tensor) -> Tensor:
    """Root mean square over all but the first dimension, shape (B,), in float64."""
    x = x.reshape(x.shape[0], -1)
    return torch.linalg.vector_norm(x, dim=1).to(torch.float64) / max(x.shape[1], 1) ** 0.5


def adaptive_solve(
    tableau: ButcherTableau,
    f: Field,
    x: Tensor,
    times: list[float],
    *,
    rtol: float,
    atol: float,
    max_steps: int,
    max_step: float = float("inf"),
    resume: Progress | None = None,
) -> tuple[list[Tensor], Progress]:
    """States at times[1:], each (B, *state), and where the solve stands at the end.

    Args:
        tableau: an explicit method with an error estimate.
        f: the field of t, shape (B, 1, …, 1) float64, and x, shape (B, *state).
        x: the state at times[0], shape (B, *state).
        times: at least two, strictly monotone either way.
        rtol: relative tolerance of a step's error, per entry of the state.
        atol: absolute tolerance, likewise.
        max_steps: attempted steps of each sample over the whole solve.
        max_step: the largest step allowed.
        resume: where an earlier interval of the same solve ended.

    Raises:
        MaxStepsReached: as the name says, for some sample.
        StepSizeUnderflow: the tolerance asks for a step below the time's precision.
        NonFiniteField: F is not finite at the start.
        NonFiniteState: no step, however small, leads to a finite state.
    """
    batch, device = x.shape[0], x.device
    column = (batch,) + (1,) * (x.ndim - 1)
    real = x.dtype.to_real()
    end, forward = times[-1], 1.0 if times[-1] > times[0] else -1.0
    outputs = torch.tensor(times[1:-1], dtype=torch.float64, device=device)
    stage_times = torch.tensor(tableau.stage_times, dtype=torch.float64, device=device)
    new_calls = tableau.b_row[-1][0] + 1  # the stages beyond k_1, and f at the step's end
    beta = 0.2 / tableau.order  # 0.04 for order 5, as α is 0.17
    alpha = 1 / tableau.order - 0.75 * beta

    time = torch.full((batch,), times[0], dtype=torch.float64, device=device)
    k0 = f(time.view(column), x)
    bad = ~torch.isfinite(rms(k0.detach()))
    if bad.any():
        raise NonFiniteField(
            f"the field is not finite at t={times[0]:g}{_which(bad)}, where the solve starts: F(x) holds an "
            "infinity or NaN. Check the field's weights and the state it is given."
        )
    if resume is None:
        step = _first_step(tableau, f, time.view(column), x, k0, rtol, atol, end - times[0])
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        resume = Progress(step, torch.full_like(step, FIRST_ERROR), zeros + 1, zeros, zeros)
    step, previous_error = resume.step.clamp(max=max_step), resume.previous_error
    nfe, n_accepted, n_rejected = resume.nfe + 1, resume.n_accepted, resume.n_rejected

    crossings = Crossings()
    rejected = torch.zeros(batch, dtype=torch.bool, device=device)
    while True:
        left = (end - time) * forward
        active = left > 0
        spent = active & (n_accepted + n_rejected >= max_steps)
        any_active, any_spent = torch.stack([active.any(), spent.any()]).tolist()
        if not any_active:
            break
        if any_spent:
            raise MaxStepsReached(
                f"max_steps={max_steps} attempted steps ended at {_where(spent, time, step)}, "
                f"before {end:g}. Raise max_steps, loosen rtol and atol, or go implicit if it is stiff."
            )
        # Stretched by 1 % rather than leaving a sliver for another step.
        reaches = step * 1.01 >= left
        size = torch.where(reaches, left, step)
        new_time = torch.where(reaches, end, time + forward * size)
        h = (forward * size).to(real).view(column)
        at = time[:, None] + stage_times * (forward * size)[:, None]
        at = at.clamp(max=end) if forward > 0 else at.clamp(min=end)

        k = stages(tableau, f, [t.view(column) for t in at.unbind(1)], x, h, k0)
        new_x = combine(x, h, tableau.b_row, k)
        k.append(f(new_time.view(column), new_x))
        with torch.no_grad():
            scale = atol + rtol * torch.maximum(x.abs(), new_x.abs())
            error = rms(combine(torch.zeros_like(x), h, tableau.error_row, k) / scale)
            # An overflowed state, or a last stage outside the estimate, must not pass for a small error.
            failed = active & ~torch.isfinite(error + 0 * rms(new_x) + 0 * rms(k[-1]))
            keep = active & (error <= 1)
            passed = _count_before(outputs, new_time, forward) > _count_before(outputs, time, forward)
            any_failed, all_kept, any_kept, any_passed = torch.stack(
                [failed.any(), keep.all(), keep.any(), (keep & passed).any()]
            ).tolist()
        if any_failed:
            # The attempt is dropped for all, so that no infinity enters the graph of other samples;
            # only the failing samples' steps shrink and count.
            n_rejected, nfe = n_rejected + failed, nfe + failed * new_calls
            step, rejected = torch.where(failed, size * SHRINK, step), rejected | failed
            if (underflow := failed & _too_small(step, time)).any():
                raise NonFiniteState(
                    f"the state leaves the finite numbers at {_where(underflow, time, step)}: a blow-up in "
                    "finite time, or a field that overflows. Stop before it, or check the field."
                )
            continue

        if any_passed:
            crossings.start.append(time)
            crossings.end.append(torch.where(keep, new_time, time))
            crossings.x.append(x)
            crossings.k.append(k)
            crossings.x_end.append(new_x)
        nfe, n_accepted, n_rejected = (
            nfe + active * new_calls,
            n_accepted + keep,
            n_rejected + (active & ~keep),
        )
        error = error.clamp(min=1e-10)
        # A rejected step shrinks by its own error alone, and its successor must not grow.
        factor = torch.where(
            keep, error.pow(-alpha) * previous_error.pow(beta), error.pow(-1 / tableau.order)
        )
        factor = (SAFETY * factor).clamp(SHRINK, GROW)
        factor = torch.where(rejected | ~keep, factor.clamp(max=1.0), factor)
        # A step cut short by the end says little about the one that the tolerance allows.
        proposal = torch.where(keep & reaches, torch.maximum(size * factor, step), size * factor)
        step = torch.where(active, proposal.clamp(max=max_step), step)
        previous_error = torch.where(keep, error, previous_error)
        rejected = active & ~keep
        if all_kept:
            x, k0, time = new_x, k[-1], new_time
            continue
        if any_kept:
            mask = keep.view(column)
            x, k0 = torch.where(mask, new_x, x), torch.where(mask, k[-1], k0)
            time = torch.where(keep, new_time, time)
        if (underflow := rejected & _too_small(step, time)).any():
            raise StepSizeUnderflow(
                "the tolerance asks for a step below what the time resolves at "
                f"{_where(underflow, time, step)}: the field is discontinuous or stiff there, or rtol and "
                "atol are finer than its rounding. Loosen them, end the interval at the discontinuity, or "
                "use an implicit method."
            )

    path, calls = _interpolate(tableau, f, crossings, outputs, forward, x)
    return [*path, x], Progress(step, previous_error, nfe + calls, n_accepted, n_rejected)


def _first_step(
    tableau: ButcherTableau,
    f: Field,
    time: Tensor,
    x: Tensor,
    k0: Tensor,
    rtol: float,
    atol: float,
    span: float,
) -> Tensor:
    """A first step whose error should be near the tolerance, (B,) float64; one call of f."""
    with torch.no_grad():
        scale = atol + rtol * x.abs()
        d0, d1 = rms(x / scale), rms(k0 / scale)
        small = (d0 < 1e-5) | (d1 < 1e-5)
        h0 = torch.where(small, 1e-6, 0.01 * d0 / d1.clamp(min=1e-300)).clamp(max=abs(span))
        h = h0.view(time.shape) * (1 if span > 0 else -1)
        k1 = f(time + h, x + h.to(x.dtype.to_real()) * k0)
        d2 = rms((k1 - k0) / scale) / h0
        steepest = torch.maximum(d1, d2)
        h1 = torch.where(
            steepest <= 1e-15,
            (h0 * 1e-3).clamp(min=1e-6),
            (0.01 / steepest.clamp(min=1e-300)).pow(1 / (tableau.order + 1)),
        )
        # Where the trial state leaves the field's domain, start from the small step.
        h1 = torch.where(torch.isfinite(d2), h1, h0 * 0.01)
        return torch.minimum(100 * h0, h1).clamp(max=abs(span))


def _count_before(outputs: Tensor, time: Tensor, forward: float) -> Tensor:
    """How many outputs lie at or before `time`, in the direction of integration, (B,)."""
    return torch.searchsorted(forward * outputs, forward * time, right=True)


def _too_small(step: Tensor, time: Tensor) -> Tensor:
    return step <= 4 * EPS * time.abs().clamp(min=1e-290)


def _which(mask: Tensor) -> str:
    """The first marked sample, for a message; nothing where there is one sample only."""
    return f", sample {int(mask.nonzero()[0])}" if len(mask) > 1 else ""


def _where(mask: Tensor, time: Tensor, step: Tensor) -> str:
    i = int(mask.nonzero()[0])
    return f"t={float(time[i]):.9g}{_which(mask)}, with a step of {float(step[i]):.2e}"


def _interpolate(
    tableau: ButcherTableau,
    f: Field,
    crossings: Crossings,
    outputs: Tensor,
    forward: float,
    like: Tensor,
) -> tuple[list[Tensor], int]:
    """States at the outputs, each (B, *state), and the calls of f they took.

    By the method's own interpolant where it has one, a cubic Hermite polynomial up to order 3, and
    for the others a step of the method itself from the step's start to the output.
    """
    if len(outputs) == 0:
        return [], 0
    batch, column = like.shape[0], (len(outputs), like.shape[0]) + (1,) * (like.ndim - 1)
    start, end = torch.stack(crossings.start, 1), torch.stack(crossings.end, 1)  # (B, S)
    wanted = outputs.expand(batch, -1).contiguous()  # (B, T)
    index = torch.searchsorted(forward * end, forward * wanted)  # the first step that reaches the output
    start, end = start.gather(1, index), end.gather(1, index)
    size = (end - start).T.reshape(column)
    theta = (wanted - start).T.reshape(column) / size
    pick, sample = index.T, torch.arange(batch, device=like.device)

    def at_step(entries: list[Tensor]) -> Tensor:
        """Of one entry a step, the one at each output's step: (T, B, *state)."""
        return torch.stack(entries)[pick, sample]

    real = like.dtype.to_real()
    x, h = at_step(crossings.x), size.to(real)
    if tableau.interpolant is not None:
        powers = [theta ** (j + 1) for j in range(len(tableau.interpolant[0]))]
        for i, row in enumerate(tableau.interpolant):
            if any(row):
                weight = torch.stack([float(c) * p for c, p in zip(row, powers, strict=True)]).sum(0)
                x = x + (h * weight.to(real)) * at_step([k[i] for k in crossings.k])
        return list(x), 0
    k0 = at_step([k[0] for k in crossings.k])
    if tableau.order <= 3:
        x1, k1 = at_step(crossings.x_end), at_step([k[-1] for k in crossings.k])
        s = theta.to(real)
        hermite = (1 + 2 * s) * (1 - s) ** 2 * x + s**2 * (3 - 2 * s) * x1
        return list(hermite + h * (s * (1 - s) ** 2 * k0 - s**2 * (1 - s) * k1)), 0
    path = []
    for i in range(len(outputs)):
        part = theta[i] * size[i]
        begin = outputs[i] - part
        at = [begin + c * part for c in tableau.stage_times]
        k = stages(tableau, f, at, x[i], part.to(real), k0[i])
        path.append(combine(x[i], part.to(real), tableau.b_row, k))
    return path, len(outputs) * tableau.b_row[-1][0]
