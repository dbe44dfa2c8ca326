r"""Compiled implicit steps: every sample at a place of its own.

One graph takes one iteration of Newton's method for all samples, each in the step and the stage where it
stands. Where the iteration has converged the sample goes on within the graph: to its next stage, or to the
step's end, its error estimate, the controller and the start of the next step, with a Jacobian of its own. So
no sample waits for another one's iterations, and the number of graphs that run is that of the slowest sample.
For the few unknowns that this is made for, forming and factoring I − hλJ costs less than keeping it: every
step has a new Jacobian, and every iteration factors anew.

Gradients are those of the eager steps: the stages are found without a graph, and are then put into the
equations of the steps once more (`ImplicitStep.given`), whose way back is `implicit.gradient`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp, vmap

from resode.checks import warn_user
from resode.solve.adaptive import STANDSTILLS, Adaptive, Progress, adaptive_solve, between, error_norm
from resode.solve.compiled import NotStuck, as_real, constants, warn_of_eager
from resode.solve.control import NUMPY, Attempt, Control, decide, plan
from resode.solve.dense import Step
from resode.solve.failures import too_many_steps
from resode.solve.implicit.blocks import StageBlock, lagrange, stage_blocks
from resode.solve.implicit.newton import MOST, TRUSTED
from resode.solve.implicit.steps import FAR, ImplicitStep, newton_tolerance
from resode.solve.implicit.systems import DenseSystems
from resode.solve.kept import compiled_for
from resode.solve.result import SolverError
from resode.solve.step import Counted, as_stage, combine, increment
from resode.tableaus import ButcherTableau

LARGEST = 16
"""Entries of a state (of a sample) up to which its steps are compiled."""

UNROLLED = 12
"""Unknowns up to which a system is eliminated entry by entry; above, by LAPACK."""

RECENT = 256
"""How many iterations are held before those in which no step was taken are dropped."""


class Samples(NamedTuple):
    """Where the samples stand."""

    x: Tensor  # the state, (B, n)
    k0: Tensor  # f there, (B, n)
    jacobian: Tensor  # ∂f_i/∂x_j there, (n, n, B)
    stages: Tensor  # those found, and the iterate of those sought, (s, B, n)
    last: Tensor  # the stages of the step before, (s, B, n)
    clock: Tensor  # time, next step, the last two errors, was rejected, accepted, rejected, last size: (8, B)
    newton: Tensor  # stage, iteration, the last correction, rates of the last step and of this one: (5, B)
    counts: Tensor  # calls of f, Newton iterations, Jacobians: (3, B)


class Taken(NamedTuple):
    """What an iteration leads to, as the steps that were kept are needed later."""

    start: Tensor  # time, (B,)
    end: Tensor  # time after the iteration, which is that before it where no step was kept
    x: Tensor  # the state at the start, (B, n)
    k0: Tensor  # f there
    k: Tensor  # the stages and, where the last one is not that, f at the end, (s or s + 1, B, n)
    new_x: Tensor


class Factors:
    """A matrix for each sample, (n, n, B), eliminated so that several right-hand sides can follow.

    Up to `UNROLLED` rows, row i is exchanged with row k, where its entry is larger, at the very moment that
    it is to be eliminated: multipliers stay at most 1, and no sample looks at another one's rows.

    Source:
        Sorensen, Analysis of pairwise pivoting in Gaussian elimination, IEEE Trans. Comput. 34 (1985).
    """

    def __init__(self, matrix: Tensor):
        self.n = len(matrix)
        self.moves: list[tuple[int, int, Tensor, Tensor]] = []
        if self.n > UNROLLED:
            self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(matrix.permute(2, 0, 1).contiguous())
            return
        rows = [list(row.unbind(0)) for row in matrix.unbind(0)]
        for k in range(self.n):
            for i in range(k + 1, self.n):
                swap = rows[i][k].abs() > rows[k][k].abs()
                upper = [torch.where(swap, b, a) for a, b in zip(rows[k][k:], rows[i][k:], strict=True)]
                lower = [torch.where(swap, a, b) for a, b in zip(rows[k][k:], rows[i][k:], strict=True)]
                factor = lower[0] / upper[0]
                rows[k][k:] = upper
                rows[i][k + 1 :] = [b - factor * a for a, b in zip(upper[1:], lower[1:], strict=True)]
                self.moves.append((k, i, swap, factor))
        self.rows = rows

    def solve(self, right: Tensor) -> Tensor:
        """The solutions of right-hand sides (n, B)."""
        if self.n > UNROLLED:
            return torch.linalg.lu_solve(self.lu, self.pivots, right.T.contiguous()[..., None])[..., 0].T
        x = list(right.unbind(0))
        for k, i, swap, factor in self.moves:
            x[k], below = torch.where(swap, x[i], x[k]), torch.where(swap, x[k], x[i])
            x[i] = below - factor * x[k]
        for i in reversed(range(self.n)):
            for j in range(i + 1, self.n):
                x[i] = x[i] - self.rows[i][j] * x[j]
            x[i] = x[i] / self.rows[i][i]
        return torch.stack(x)


@dataclass(frozen=True)
class Modes:
    """A `StageBlock` in plain numbers, which a trace takes as constants."""

    values: tuple[complex, ...]
    to_modes: tuple[tuple[complex, ...], ...]
    to_stages: tuple[tuple[complex, ...], ...]
    filter: int  # which of the values filters the error estimate, −1 for none

    @classmethod
    def of(cls, block: StageBlock) -> Modes:
        """The block's."""
        values, to_modes, to_stages = (
            np.asarray(x, complex).tolist() for x in (block.eigenvalues, block.to_modes, block.to_stages)
        )
        which = values.index(block.filter) if block.filter in values else -1
        return cls(tuple(values), tuple(map(tuple, to_modes)), tuple(map(tuple, to_stages)), which)


class NewtonSystems:
    """(I − h A_b ⊗ J) Δ = r of one block, for the Jacobians (n, n, B) and steps (B,) of the samples.

    A pair of complex eigenvalues α ± iβ is one real system of twice the size, of P = I − hαJ and Q = hβJ.
    """

    def __init__(self, modes: Modes, jacobian: Tensor, h: Tensor):
        self.modes, self.n = modes, len(jacobian)
        identity = torch.eye(self.n, dtype=h.dtype, device=h.device)[..., None]
        self.factors = []
        for value in modes.values:
            p = identity - value.real * h * jacobian
            if value.imag:
                q = value.imag * h * jacobian
                p = torch.cat([torch.cat([p, q], 1), torch.cat([-q, p], 1)])
            self.factors.append(Factors(p))

    def solve(self, right: Tensor) -> Tensor:
        """Δ of right-hand sides (m, B, n)."""
        rows, n = right.mT.unbind(0), self.n
        if len(rows) == 1:
            return self.factors[0].solve(rows[0]).T[None]
        parts = []  # real, or real and imaginary, of each mode
        for factors, mode in zip(self.factors, self.modes.to_modes, strict=True):
            real = weighted([c.real for c in mode], rows)
            if factors.n == n:
                parts += [(factors.solve(real), None)]
                continue
            both = factors.solve(torch.cat([real, weighted([c.imag for c in mode], rows)]))
            parts += [(both[:n], both[n:])]
        stages = []
        for row in self.modes.to_stages:
            pairs = list(zip(row, parts, strict=True))
            real = weighted([c.real for c, _ in pairs], [u for _, (u, _) in pairs])
            odd = [(c.imag, v) for c, (_, v) in pairs if v is not None]
            stages.append((real - weighted(*zip(*odd, strict=True)) if odd else real).T)
        return torch.stack(stages)

    def filtered(self, right: Tensor) -> Tensor:
        """(I − hγJ)⁻¹ of rows (B, n), γ the block's real eigenvalue."""
        return self.factors[self.modes.filter].solve(right.T).T


def weighted(weights: Sequence[Any], parts: Sequence[Tensor]) -> Tensor:
    """The sum Σ w_j p_j."""
    total = weights[0] * parts[0]
    for w, part in zip(weights[1:], parts[1:], strict=True):
        total = total + w * part
    return total


class Rule:
    """Newton's iteration and what follows it, for one method and one choice of limits.

    Args:
        tableau: the method; see `refusal`.
        control: how steps are chosen.
        forward: 1, or −1 where time decreases.
        shape: of the state that the field takes, but for the batch.
    """

    def __init__(self, tableau: ButcherTableau, control: Control, forward: float):
        self.tableau, self.control, self.forward = tableau, control, forward
        self.blocks = stage_blocks(tableau)
        self.whole = len(self.blocks[0].a) > 1
        self.first = int(self.blocks[0].is_explicit)  # the first stage that is sought
        self.modes = Modes.of(self.blocks[self.first])
        self.sought, self.n_blocks = len(self.blocks[self.first].a), len(self.blocks)
        self.power = tableau.error_power
        a = torch.tensor([[float(x) for x in row] for row in tableau.a], dtype=torch.float64)
        predictors = torch.zeros_like(a)
        for i, block in enumerate(self.blocks):
            for j, w in block.predictor:
                predictors[i, j] = w
        self.diagonal = float(a[self.first, self.first])
        self.tables = (a.tril(-1), predictors, torch.tensor(tableau.stage_times, dtype=torch.float64))

    def iterate(
        self,
        f: Callable[..., Any],
        like: Tensor,
        s: Samples,
        end: Tensor,
        limit: Tensor,
        tolerance: tuple[Tensor, Tensor, Tensor],
        tables: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Samples, Tensor, Taken]:
        """One iteration of every sample that is not at its end.

        Args:
            f: the field.
            like: a tensor of the state's shape.
            s: where the samples stand.
            end: their ends, (B,).
            limit: attempts that each may make.
            tolerance: rtol, atol, and what Newton's error may be of them.
            tables: `self.tables`, where the state lies.

        Returns:
            Where they stand after it; whether some sample is not at the end, failed to be finite, can't go
            on, has used up its attempts (4,); what led there.
        """
        rtol, atol, kappa = tolerance
        control, forward = self.control, self.forward
        time, step, *errors, was_rejected, accepted, rejected, last_size = s.clock.unbind(0)
        stage, iteration, before, old_rate, slowest = s.newton.unbind(0)
        field = self._field(f, like)
        tried = plan(torch, time, step, end, forward, control)
        active = tried.active & (accepted + rejected < limit)
        size = forward * tried.size
        h = size.to(s.x.dtype)
        systems = NewtonSystems(self.modes, s.jacobian, h)

        new, z = self._corrected(field, s, systems, time, size, end, tables)
        scale = atol + rtol * s.x.reshape(like.shape).abs()
        measured = [control.measure(row.reshape(like.shape) / scale) for row in z]
        norm = (torch.stack(measured).amax(0).reshape(-1) / kappa).to(s.newton.dtype)
        converged, hopeless, rate = judged(norm, before, old_rate, iteration)
        converged, hopeless = active & converged, active & hopeless
        stages = torch.where((active & ~hopeless)[:, None], new, s.stages)
        slowest = torch.where(converged | hopeless, torch.fmax(slowest, rate), slowest)
        ended = hopeless | (converged & (stage == self.n_blocks - 1))

        new_x = combine(s.x, h[:, None], self.tableau.b_row, stages.unbind(0))
        k_end, jacobian = linearised(field, tried.end, new_x)
        if self.tableau.fsal:
            k_end = stages[-1]
        k = [*stages.unbind(0), *([] if self.tableau.fsal else [k_end])]
        error = self._error(like, s, systems, h, new_x, k, (rtol, atol)).to(time.dtype)
        # Where no stages were found, the error that asks for a quarter of the step.
        error = torch.where(hopeless, (4 * control.safety) ** self.power, error)
        error, tries = torch.where(ended, error, 0.0), tried._replace(active=ended)
        verdict = decide(torch, tries, error, time, step, torch.stack(errors), was_rejected > 0,
                         order=self.power, control=control)  # fmt: skip
        keep = verdict.keep
        little = keep & (verdict.step >= tried.size) & (verdict.step <= 1.2 * tried.size) & ~tried.reaches
        next_step = torch.where(little, tried.size, verdict.step)
        new_time = torch.where(keep, tried.end, time)
        accepted, rejected = accepted + keep, rejected + verdict.refused
        last_size = torch.where(keep, size, last_size)
        kept = keep[:, None]
        rows = [new_time, next_step, *verdict.errors, verdict.rejected, accepted, rejected, last_size]
        after = s._replace(
            x=torch.where(kept, new_x, s.x),
            k0=torch.where(kept, k_end, s.k0),
            jacobian=torch.where(keep, jacobian, s.jacobian),
            last=torch.where(kept, stages, s.last),
            clock=torch.stack([row.to(s.clock.dtype) for row in rows]),
        )
        goes_on = converged & ~ended
        at = torch.where(ended, float(self.first), stage + goes_on)
        rows = [at, torch.where(ended | goes_on, 0.0, iteration + 1), norm,
                torch.where(ended, slowest, old_rate), torch.where(ended, torch.nan, slowest)]  # fmt: skip
        ahead = plan(torch, new_time, next_step, end, forward, control)
        calls = active * self.sought + ended * (not self.tableau.fsal) + keep
        going = ahead.active
        spent = going & (accepted + rejected >= limit)
        flags = torch.stack([mask.any() for mask in (going, verdict.failed, verdict.stuck, spent)])
        after = after._replace(
            stages=self._begun(after, stages, ahead, ended, goes_on, at, tables),
            newton=torch.stack([row.to(s.newton.dtype) for row in rows]),
            counts=s.counts + torch.stack([calls, active.to(calls.dtype), keep.to(calls.dtype)]),
        )
        return after, flags, Taken(time, new_time, s.x, s.k0, torch.stack(k), new_x)

    def _field(self, f: Callable[..., Any], like: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The field of times (B,) and rows (B, n)."""
        column = (-1,) + (1,) * (like.ndim - 1) if self.control.per_sample else ()

        def field(t: Tensor, y: Tensor) -> Tensor:
            y = y.reshape(like.shape)
            value = as_stage(f(t.to(like.dtype).reshape(column), y), y)
            return value.clone().reshape(len(t), -1)  # func may write into one buffer

        return field

    def _corrected(
        self,
        field: Callable[[Tensor, Tensor], Tensor],
        s: Samples,
        systems: NewtonSystems,
        time: Tensor,
        size: Tensor,
        end: Tensor,
        tables: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The next iterate of the stages, and hA_b times its difference to this one, (m, B, n)."""
        a, _, c = tables
        h = size.to(s.x.dtype)[:, None]

        def at(fraction: Any) -> Tensor:
            t = time + fraction * size
            if self.tableau.looks_ahead:
                return t
            return torch.minimum(t, end) if self.forward > 0 else torch.maximum(t, end)

        if self.whole:
            k = s.stages.unbind(0)
            points = [combine(s.x, h, row, k) for row in self.tableau.a_rows]
            values = [field(at(x), y) for x, y in zip(self.tableau.stage_times, points, strict=True)]
            correction = systems.solve(torch.stack(values) - s.stages)
            z = [increment(h, row, correction.unbind(0)) for row in self.tableau.a_rows]
            return s.stages + correction, torch.stack(z)
        stage = s.newton[0].long()
        sought = self._at(stage)
        iterate = (s.stages * sought).sum(0)
        weights = a.to(h.dtype)[stage].T[..., None]  # (s, B, 1)
        base = s.x + h * (weights * s.stages).sum(0)
        value = field(at(c[stage]), base + self.diagonal * h * iterate)
        correction = systems.solve((value - iterate)[None])
        return s.stages + sought * correction, self.diagonal * h * correction

    def _at(self, stage: Tensor) -> Tensor:
        """1 at each sample's stage, (s, B, 1)."""
        numbers = torch.arange(self.n_blocks, device=stage.device)
        return (numbers[:, None] == stage)[..., None]

    def _error(
        self,
        like: Tensor,
        s: Samples,
        systems: NewtonSystems,
        h: Tensor,
        new_x: Tensor,
        k: list[Tensor],
        tolerance: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The estimated error over the tolerance, (B,)."""
        tableau = self.tableau
        estimate = increment(h[:, None], tableau.error_row, k)
        if tableau.error_start is not None:
            estimate = estimate + float(tableau.error_start) * h[:, None] * s.k0
        if tableau.error_filter is not None:
            estimate = systems.filtered(estimate)
        x, new_x, estimate, *k = (row.reshape(like.shape) for row in (s.x, new_x, estimate, *k))
        return error_norm(tableau, self.control, x, new_x, k, h, tolerance, estimate).reshape(-1)

    def _begun(
        self,
        s: Samples,
        stages: Tensor,
        ahead: Attempt,
        ended: Tensor,
        goes_on: Tensor,
        stage: Tensor,
        tables: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """The stages with what Newton's method starts from, where a step or a stage begins."""
        if self.whole:
            last_size = s.clock[-1]
            size = self.forward * ahead.size
            ratio = size / torch.where(last_size == 0, 1.0, last_size)
            known = (last_size != 0) & (size.abs() <= FAR * last_size.abs())
            c = self.tableau.stage_times
            weights = lagrange(c, [1 + x * ratio for x in c])
            last = s.last.unbind(0)
            found = [weighted([(known * w).to(s.x.dtype)[:, None] for w in row], last) for row in weights]
            return torch.where(ended[:, None], torch.stack(found), stages)
        if self.first:
            begun = torch.cat([torch.where(ended[:, None], s.k0, stages[0])[None], stages[1:]])
        else:
            begun = torch.where((ended[:, None] & self._at(stage)), s.k0, stages)
        weights = tables[1].to(stages.dtype)[stage.long()].T[..., None]
        predicted = (weights * begun).sum(0)
        starts = (goes_on | ended) if self.first else goes_on
        return torch.where(starts[:, None] & self._at(stage), predicted, begun)


def judged(
    size: Tensor, before: Tensor, old_rate: Tensor, iteration: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `Newton.simplified` makes of a correction: whether it converged, is hopeless, and the rate."""
    first = iteration == 0
    rate = torch.where(first, old_rate.clamp(min=TRUSTED) ** 0.8, (size / before).clamp(min=1e-16))
    left = torch.where(first, rate, rate / (1 - rate)) * size
    out_of_reach = ~(rate < 1) | (rate ** (MOST - 1 - iteration) * left > 1)
    converged = (size == 0) | ((left <= 1) & (rate < 1))
    hopeless = torch.where(first, ~torch.isfinite(size), out_of_reach)
    return converged, hopeless & ~converged, rate


def linearised(field: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(t, x) of rows (B, n), and the Jacobians ∂f_i/∂x_j, (n, n, B)."""
    n = x.shape[1]
    # Not in forward mode, which is not traced where B is left open.
    value, pulled_back, *_ = vjp(lambda y: field(t, y), x)
    directions = torch.eye(n, dtype=x.dtype, device=x.device)[:, None].expand(n, *x.shape)
    (rows,) = vmap(pulled_back)(directions)
    return value, rows.permute(0, 2, 1)


def refusal(tableau: ButcherTableau, x: Tensor, per_sample: bool) -> str | None:
    """Why steps of the method on states like x are not compiled, or None where they are."""
    n = x.numel() // max(1, len(x)) if per_sample else x.numel()
    if n > LARGEST:
        what = "of a sample " if per_sample else ""
        return f"an implicit method on {n} entries {what}(compiled implicit steps take at most {LARGEST})"
    if n == 0 or x.numel() == 0:
        return "an empty state"
    blocks = stage_blocks(tableau)
    sought = [b for b in blocks if not b.is_explicit]
    diagonals = {float(b.a[0, 0]) for b in sought}
    single = len(diagonals) == 1 and all(len(b.a) == 1 for b in sought)
    if (len(blocks) == 1 and sought) or (single and sought in (list(blocks), list(blocks[1:]))):
        return None
    return f"{tableau.name}, whose stages are neither one system nor of one diagonal entry"


def compiled_implicit_solve(
    tableau: ButcherTableau,
    f: Counted,
    x: Tensor,
    times: Sequence[float] | np.ndarray,
    control: Control,
    resume: Progress | None,
    key: Any,
) -> tuple[list[Tensor], Progress]:
    """As `compiled_solve`, for implicit methods."""
    at = np.asarray(times, NUMPY[control.dtype])
    outputs = at[1:-1].T
    why = refusal(tableau, x, control.per_sample)
    if why is not None:
        warn_user(f"compile=True has no effect with {why}.")
        return adaptive_solve(tableau, f, x, times, control, resume)
    solve = Adaptive(tableau, f, x.detach(), at[0], at[-1], control, resume)
    asked = torch.is_grad_enabled() and (x.requires_grad or solve.k0.requires_grad)
    start = solve.time

    def rows(y: Tensor) -> Tensor:
        return f(solve.as_times(start[None])[0], y.reshape(x.shape)).reshape(y.shape)

    jacobians = DenseSystems.at(rows, x.detach().reshape(len(start), -1)).jacobians
    taken = None
    try:
        with torch.no_grad():
            taken = _iterations(solve, jacobians, outputs.shape[-1] > 0 or asked, key)
    except SolverError:
        raise
    except Exception as error:
        if not isinstance(error, NotStuck):
            warn_of_eager(error)
    if taken is None:
        return adaptive_solve(tableau, f, x, times, control, resume)
    if asked:
        steps, end = _replayed(solve, taken, x, start)
    else:
        steps, end = [_as_step(t, x) for t in taken], solve.x
    solve.x = end
    path, calls = between(tableau, f, steps, outputs, solve, (x, at[0]))
    return [*path, end], replace(solve.progress, nfe=solve.progress.nfe + calls)


def _iterations(solve: Adaptive, jacobians: Tensor, record: bool, key: Any) -> list[Taken]:
    """Takes the solve to its end; where `record`, the iterations in which some sample took a step."""
    tableau, control, f, x = solve.tableau, solve.control, solve.f, solve.x
    assert isinstance(f, Counted)
    batch, device, dtype = len(solve.time), x.device, control.dtype
    rule = Rule(tableau, constants(control), solve.forward)
    run = compiled_for(_iterations_of, key, x, tableau, constants(control), solve.forward, record)
    p = solve.progress
    rows = x.reshape(batch, -1)
    zeros = rows.new_zeros(len(tableau.b), *rows.shape)
    clock = np.stack([solve.time, p.step, *p.errors, np.zeros_like(p.step), p.n_accepted, p.n_rejected,
                      np.zeros_like(p.step)])  # fmt: skip
    newton = torch.full((5, batch), torch.nan, dtype=torch.float64, device=device)
    newton[0], newton[1] = rule.first, 0
    k0 = solve.k0.detach().reshape(batch, -1)
    begun = zeros.clone() if rule.whole else zeros + k0  # one tensor in two places is traced anew
    s = Samples(
        rows, k0, jacobians.permute(1, 2, 0).contiguous(), begun, zeros,
        torch.from_numpy(clock.astype(NUMPY[dtype])).to(device), newton,
        torch.zeros(3, batch, dtype=torch.int64, device=device),
    )  # fmt: skip
    end = torch.from_numpy(solve.end).to(device)
    limit = torch.full((batch,), control.max_steps, dtype=torch.int64, device=device)
    kappa = torch.tensor(newton_tolerance(control, x.dtype), dtype=x.dtype, device=device)
    tolerance = (as_real(control.rtol, x), as_real(control.atol, x), kappa)
    tables = tuple(t.to(device) for t in rule.tables)
    taken: list[Taken] = []
    going = True
    while going:
        before = s
        s, flags, step = run(f.f, x, s, end, limit, tolerance, tables)
        going, failed, stuck, spent = flags.tolist()
        if failed or stuck or spent:
            _place(solve, s if spent else before, p)
            if spent:
                left = (solve.end - solve.time) * solve.forward > 0
                counts = solve.progress.n_accepted + solve.progress.n_rejected
                raise too_many_steps(solve.standing(left & (counts >= control.max_steps)), control.max_steps)
            solve.standstills = solve.standstills + solve.stands_still()
            if stuck or (solve.standstills >= STANDSTILLS).any():
                next(solve.steps(), None)  # raises, with the reason
                raise NotStuck
        if record:
            taken.append(step)
            if len(taken) % RECENT == 0:
                taken = _kept(taken)
    _place(solve, s, p)
    f.calls += int(s.counts[0].max())
    return _kept(taken)


def _kept(taken: list[Taken]) -> list[Taken]:
    """Those in which some sample took a step."""
    if not taken:
        return taken
    moved = torch.stack([(t.start != t.end).any() for t in taken]).tolist()
    return [t for t, any_ in zip(taken, moved, strict=True) if any_]


def _place(solve: Adaptive, s: Samples, begun: Progress) -> None:
    """Puts the solve where compiled iterations have brought it since it began."""
    time, step, last, older, _, accepted, rejected, _ = s.clock.cpu().numpy()
    calls, iterations, jacobians = s.counts.cpu().numpy()
    accepted, rejected = accepted.astype(np.int64), rejected.astype(np.int64)
    implicit = np.stack([1 + jacobians, iterations, iterations, 0 * iterations])
    solve.x, solve.k0, solve.time = s.x.reshape(solve.x.shape), s.k0.reshape(solve.x.shape), time
    solve.progress = Progress(
        step, np.stack([last, older]), begun.nfe + 1 + calls, accepted, rejected, implicit
    )


def _as_step(t: Taken, x: Tensor) -> Step:
    """An iteration as one step of the samples that took it."""
    k = [row.reshape(x.shape) for row in t.k]
    start, end = t.start.cpu().numpy(), t.end.cpu().numpy()
    return Step(start, end, t.x.reshape(x.shape), k, t.new_x.reshape(x.shape), k_start=t.k0.reshape(x.shape))


def _replayed(solve: Adaptive, taken: list[Taken], x: Tensor, start: np.ndarray) -> tuple[list[Step], Tensor]:
    """The steps once more, in the order that each sample took them, as functions of x; and the end."""
    tableau, control, f = solve.tableau, solve.control, solve.f
    take = ImplicitStep(tableau, control.per_sample, control)
    if not taken:
        return [], x
    begin, end = (torch.stack(s) for s in ([t.start for t in taken], [t.end for t in taken]))  # (N, B)
    kept = begin != end
    order = torch.argsort(~kept, dim=0, stable=True)[: int(kept.sum(0).max())]  # (S, B)
    here = kept.gather(0, order)
    s = len(tableau.b)
    stages = torch.stack([t.k[:s] for t in taken])  # (N, s, B, n)
    index = order[:, None, :, None].expand(-1, s, -1, stages.shape[-1])
    stages = torch.where(here[:, None, :, None], stages.gather(0, index), 0.0)
    starts = torch.where(here, begin.gather(0, order), torch.from_numpy(solve.time).to(begin)).cpu().numpy()
    ends = torch.where(here, end.gather(0, order), torch.from_numpy(solve.time).to(end)).cpu().numpy()
    c = np.array([*tableau.stage_times, 1.0], starts.dtype)[:, None]
    steps, (k0,) = [], [f(solve.as_times(start[None])[0], x)]
    for begun, ended, known in zip(starts, ends, stages, strict=True):
        size = ended - begun
        at = begun + c * size
        at[-1] = ended
        if not tableau.looks_ahead:
            at = at.clip(max=solve.end) if solve.forward > 0 else at.clip(min=solve.end)
        times = solve.as_times(at)
        take.given = known
        k, new_x = take(tableau, f, times, x, solve.as_size(solve.forward * size), k0)
        if not tableau.fsal:
            k.append(f(times[-1], new_x))
        steps.append(Step(begun, ended, x, k, new_x, k_start=k0))
        x, k0 = new_x, k[-1]
    return steps, x


def _iterations_of(
    tableau: ButcherTableau, control: Control, forward: float, record: bool
) -> Callable[..., Any]:
    rule = Rule(tableau, control, forward)

    def run(f: Any, like: Tensor, s: Samples, end: Tensor, limit: Tensor, tolerance: Any, tables: Any) -> Any:
        after, flags, taken = rule.iterate(f, like, s, end, limit, tolerance, tables)
        after = Samples(*(part.contiguous() for part in after))  # laid out as they came, or it is traced anew
        return after, flags, taken if record else None

    return run
