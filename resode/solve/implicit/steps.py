"""One implicit Runge-Kutta step after another, each sample with its own Newton iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.solve.control import Control
from resode.solve.failures import Standing, newton_failed
from resode.solve.host import decided, is_transformed, moves, plain
from resode.solve.implicit.blocks import StageBlock, lagrange, stage_blocks
from resode.solve.implicit.gradient import implicit
from resode.solve.implicit.newton import Newton
from resode.solve.implicit.systems import systems_at
from resode.solve.result import SolverError
from resode.solve.step import Field, Time, combine, explicit_step, increment
from resode.tableaus import ButcherTableau

COUNTS = 4
"""Jacobians, factorisations, Newton iterations and linear iterations, of each sample."""

FAR = 4.0
"""A step that is so many times longer than the last one is not foretold by it."""


class ImplicitStep:
    """Takes the steps of one solve; what it learns in one serves in the next.

    It is called as `step.explicit_step` is. Afterwards `failed` (B,) marks the samples whose stages were not
    found, which hold the step's start in their place; `calls` (B,) and `spent` (4, B) say what the step
    took, `total` (4, B) and `total_calls` (B,) what all did.

    Args:
        tableau: the method.
        per_sample: whether dimension 0 of the state is a batch of samples that do not interact; else the
            state is one sample, B = 1.
        control: whose tolerance decides when Newton's iteration has converged; None for steps that are
            given, where it goes on to rounding, and damped where it must.

    Raises:
        NewtonNotConverged: when called, for steps that are given.
    """

    def __init__(self, tableau: ButcherTableau, per_sample: bool, control: Control | None = None):
        self.tableau, self.per_sample, self.control = tableau, per_sample, control
        self.blocks = stage_blocks(tableau)
        self.systems: Any = None
        self.current = np.zeros(0, bool)  # whose Jacobian is that of the step's start
        self.slow = np.zeros(0, bool)  # whose last Newton iteration was slow
        self.rate = np.zeros(0)  # of the slowest Newton iteration of the last step, NaN where there was none
        # Sizes and stages (s, B, n) of the last steps taken.
        self.last: tuple[np.ndarray, Tensor] | None = None
        self.given: Tensor | None = None  # the stages (s, B, n) of the next step where they are known
        self.failed, self.calls, self.spent = (np.zeros(0, np.int64) for _ in range(3))
        self.total, self.total_calls = np.zeros((COUNTS, 1), np.int64), np.zeros(1, np.int64)
        # Of the samples that failed, the last correction over what was asked of it, and its rate.
        self.left = np.zeros((2, 0))

    def anew(self) -> ImplicitStep:
        """One that has learnt nothing."""
        return ImplicitStep(self.tableau, self.per_sample, self.control)

    def __call__(
        self,
        tableau: ButcherTableau,
        f: Field,
        times: Sequence[Time],
        x: Tensor,
        h: Time,
        k0: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """The stages, each as x, and the state one step later."""
        check_implicit(x)
        batch = len(x) if self.per_sample else 1
        if len(self.rate) != batch:
            self.systems, self.last = None, None
            self.rate, (self.current, self.slow) = np.full(batch, np.nan), np.zeros((2, batch), bool)
        self.failed, self.left = np.zeros(batch, bool), np.zeros((2, batch))
        self.calls, self.spent = np.zeros(batch, np.int64), np.zeros((COUNTS, batch), np.int64)
        attempt = _Attempt(self, f, times, x, h, batch)
        k: list[Tensor] = []
        for block in self.blocks:
            if block.is_explicit:
                known = block.first == 0 and k0 is not None
                k.append(k0 if known else attempt.explicit(block, k))  # type: ignore[arg-type]
            else:
                k += attempt.block(block, k, k0)
        self.rate, self.slow, self.attempt = attempt.slowest, attempt.slow, attempt
        self.total, self.total_calls = self.total + self.spent, self.total_calls + self.calls
        if self.control is None:
            if self.failed.any():
                raise self._failure(f, times[self.blocks[-1].first], x)
            self.took(~self.failed)
        return k, combine(x, h, self.tableau.b_row, k)

    def error(self, h: Time, k: Sequence[Tensor], k0: Tensor) -> Tensor:
        """The estimated error of the step just taken, as x."""
        tableau = self.tableau
        e = increment(h, tableau.error_row, k)
        if tableau.error_start is not None:
            e = e + float(tableau.error_start) * h * k0
        if tableau.error_filter is None:
            return e
        block = next(b for b in self.blocks if not b.is_explicit)
        rows = self.systems.filtered(block, self.attempt.rows(e))
        return rows.reshape(e.shape)

    def took(self, keep: np.ndarray) -> None:
        """Notes which samples went on with the step just taken."""
        attempt = self.attempt
        self.current = self.current & ~keep
        if len(self.blocks[0].a) > 1 and len(self.blocks) == 1 and attempt.stages is not None:
            sizes, stages = attempt.h, attempt.stages
            if self.last is not None and not keep.all():
                mask = torch.from_numpy(keep).to(stages.device)[:, None]
                sizes, stages = np.where(keep, sizes, self.last[0]), torch.where(mask, stages, self.last[1])
            self.last = sizes, stages

    def _failure(self, f: Field, time: Time, x: Tensor) -> SolverError:
        """The error of a step that was given."""
        i = int(self.failed.nonzero()[0][0])
        h, at = float(self.attempt.h[i]), np.array(_numbers(time), float).reshape(-1)
        begin = float(at[i if len(at) > 1 else 0])
        standing = Standing(
            self.tableau,
            f,
            time,
            x,
            sample=i if self.per_sample else None,
            time=begin,
            step=abs(h),
            end=begin + h,
            several=len(self.failed) > 1,
        )
        return newton_failed(standing, *self.last_of(self.failed), fixed=True)

    def last_of(self, mask: np.ndarray) -> tuple[float, float]:
        """Of the first marked sample, the last correction over what was asked of it, and its rate."""
        residual, rate = self.left[:, int(mask.nonzero()[0][0])]
        return float(residual), float(rate)

    def needs_jacobian(self) -> np.ndarray:
        """Whose Jacobian is not that of the step's start and has not served well, (B,)."""
        if self.systems is None:
            return np.ones(len(self.rate), bool)
        return ~self.current & self.slow


class _Attempt:
    """One step of an `ImplicitStep`."""

    def __init__(self, step: ImplicitStep, f: Field, times: Sequence[Time], x: Tensor, h: Time, batch: int):
        self.step, self.f, self.times, self.x, self.size = step, f, times, x, h
        self.batch = batch
        self.h = np.array(_numbers(h), float).reshape(-1) * np.ones(batch)
        self.start = self.rows(x.detach())
        self.slowest, self.slow = np.full(batch, np.nan), np.zeros(batch, bool)
        self.stages: Tensor | None = None  # of a method that is one block, (s, B, n)
        self.scale = self._scale()
        self.renewed = False
        with torch.no_grad():
            self.h_rows = torch.as_tensor(self.h, dtype=x.dtype, device=x.device)[:, None]

    def rows(self, x: Tensor) -> Tensor:
        """A tensor like x as one row a sample, (B, n)."""
        return x.reshape(self.batch, -1)

    def _scale(self) -> Tensor | None:
        control = self.step.control
        if control is None:
            return None
        return control.atol + control.rtol * self.x.detach().abs()

    def field_at(self, time: Time) -> Callable[[Tensor], Tensor]:
        """The field at a time, on rows."""
        return lambda y: self.rows(self.f(time, y.reshape(self.x.shape)))

    def explicit(self, block: StageBlock, k: list[Tensor]) -> Tensor:
        """An explicit stage."""
        self.step.calls += 1
        return self.f(self.times[block.first], combine(self.x, self.size, block.before[0], k))

    def block(self, block: StageBlock, k: list[Tensor], k0: Tensor | None) -> list[Tensor]:
        """The stages of an implicit block, with their gradients."""
        step = self.step
        times = self.times[block.first : block.stop]
        bases = [combine(self.x, self.size, row, k) for row in block.before]
        asked = torch.is_grad_enabled()
        has_graph = [asked and bases[0].requires_grad]

        def residual(stages: Tensor, live: np.ndarray) -> Tensor:
            step.calls += live * len(stages)
            values = []
            for i, time in enumerate(times):
                y = self.rows(bases[i].detach()) + self.h_rows * _weighted(block.a[i], stages)
                with torch.set_grad_enabled(asked and not has_graph[0]):
                    value = self.field_at(time)(y)
                has_graph[0] = has_graph[0] or value.requires_grad
                values.append(value.detach())
            return torch.stack(values) - stages

        if step.given is not None:
            stages, has_graph[0] = step.given[block.first : block.stop], asked
        else:
            with torch.no_grad():
                stages = self._solved(block, residual, self._start(block, k, k0), bases)
        if asked and (has_graph[0] or any(moves(s) for s in (*times, self.size) if isinstance(s, Tensor))):
            stages = self._with_gradient(block, times, bases, stages)
        if len(step.blocks) == 1:
            self.stages = stages.detach()
        return [row.reshape(self.x.shape) for row in stages]

    def _start(self, block: StageBlock, k: list[Tensor], k0: Tensor | None) -> Tensor:
        """What Newton's method starts from, (m, B, n)."""
        if len(block.a) == 1:
            if block.predictor:
                return sum(w * self.rows(k[j].detach()) for j, w in block.predictor)[None]  # type: ignore[index]
            return (torch.zeros_like(self.start) if k0 is None else self.rows(k0.detach()))[None]
        last, zeros = self.step.last, self.start.new_zeros(len(block.a), *self.start.shape)
        if last is None:
            return zeros
        sizes, stages = last
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where((sizes != 0) & (abs(self.h) <= FAR * abs(sizes)), self.h / sizes, np.nan)
        c = self.step.tableau.stage_times
        at = 1 + np.multiply.outer(c, ratio)  # in units of the last step, (s, B)
        weights = np.array(lagrange(c, at))  # (s, s, B)
        weights = torch.from_numpy(np.nan_to_num(weights)).to(zeros)[..., None]
        return (weights * stages).sum(1)

    def _solved(self, block: StageBlock, residual: Any, start: Tensor, bases: list[Tensor]) -> Tensor:
        """The stages, (m, B, n); those of samples that fail are 0."""
        step = self.step
        at = self.times[block.first]
        if not self.renewed and (asked := step.needs_jacobian()).any():
            self._renew(at, self.start, asked)
        live = ~step.failed  # a step of 0 ends with its first correction
        newton = Newton(residual, lambda r: self._solve(block, r), self._size(block), start, live, step.rate)
        found = self._run(newton, block)
        stale = ~found & ~step.current
        if stale.any():
            self._renew(at, self.start, stale)
            start = torch.where(newton.chosen(found), newton.k, start)
            unknown = np.full(self.batch, np.nan)
            again = Newton(residual, newton.solve, newton.size, start, live & ~found, unknown)
            found = self._run(again, block) & (found | ~live | again.live)
            newton = again
        if step.control is None and not found.all():
            found = self._damped(newton, block, residual, bases, ~found)
        step.failed |= ~found
        step.left = np.where(found, step.left, [newton.left, newton.rate])
        return torch.where(newton.chosen(~step.failed), newton.k, torch.zeros_like(newton.k))

    def _damped(
        self, newton: Newton, block: StageBlock, residual: Any, bases: list[Tensor], live: np.ndarray
    ) -> np.ndarray:
        """Another try for the marked samples, with damping, from the state that the step starts at."""
        step = self.step

        def renew(stages: Tensor, live: np.ndarray) -> None:
            last = len(stages) - 1
            y = self.rows(bases[last].detach()) + self.h_rows * _weighted(block.a[last], stages)
            self._renew(self.times[block.stop - 1], y, live)
            step.current = step.current & ~live

        newton.k = torch.where(newton.chosen(live), torch.zeros_like(newton.k), newton.k)
        newton.live, newton.iterations = live, np.zeros_like(newton.iterations)
        newton.size = self._size(block)
        found = newton.damped(renew)
        step.spent[2] += newton.iterations
        step.rate = np.where(live, np.nan, step.rate)
        return found | ~live

    def _run(self, newton: Newton, block: StageBlock) -> np.ndarray:
        found = newton.simplified()
        self.step.spent[2] += newton.iterations
        self.slow |= newton.slow
        with np.errstate(invalid="ignore"):
            self.slowest = np.fmax(self.slowest, np.where(newton.live, newton.rate, np.nan))
        return found

    def _renew(self, time: Time, y: Tensor, mask: np.ndarray) -> None:
        """Jacobians at a time and states (B, n), for the marked samples."""
        step, self.renewed = self.step, True
        made = systems_at(self.field_at(time), y)
        step.systems = made if step.systems is None else step.systems.renewed(made, mask)
        step.current = step.current | mask
        step.calls += mask
        step.spent[0] += mask

    def _solve(self, block: StageBlock, r: Tensor) -> Tensor:
        systems = self.step.systems
        self.step.spent[1] += systems.factor(block, self.h)
        before = systems.linear_iterations
        correction = systems.solve(block, r)
        self.step.spent[3] += systems.linear_iterations - before
        return correction

    def _size(self, block: StageBlock) -> Callable[[Tensor], np.ndarray]:
        """Δ (m, B, n) to the norm of hA_bΔ over what is asked of the last correction, (B,)."""
        control, a = self.step.control, torch.from_numpy(block.a).to(self.start)
        floor: Tensor | None = None

        def size(correction: Tensor) -> np.ndarray:
            nonlocal floor
            z = self.h_rows * torch.tensordot(a, correction, 1)
            if control is None:
                finest = torch.finfo(z.dtype).eps ** 0.8
                if floor is None:  # how large the state is, or becomes
                    norms = [_rms(self.start), _rms(z).amax(0)]
                    floor = (norms[0] + torch.nan_to_num(norms[1], 0.0, 0.0, 0.0)).clamp(min=1e-30)
                values = _rms(z).amax(0) / (finest * floor)
            else:
                kappa = newton_tolerance(control, z.dtype)
                rows = [control.measure(row.reshape(self.x.shape) / self.scale) for row in z]
                values = torch.stack(rows).amax(0).reshape(-1) / kappa
            return np.array(_numbers(values), float)

        return size

    def _with_gradient(
        self, block: StageBlock, times: Sequence[Time], bases: list[Tensor], stages: Tensor
    ) -> Tensor:
        """The stages as solutions of their equation."""
        m, n, shape, f, batch = len(stages), self.start.shape[1], self.x.shape, self.f, self.batch
        as_tensors = [s if isinstance(s, Tensor) else None for s in (*times, self.size)]
        given = [s for s in as_tensors if s is not None]
        fixed: list[Any] = [None if isinstance(s, Tensor) else s for s in (*times, self.size)]

        def equation(y: Tensor, *tensors: Tensor) -> Tensor:
            rest = iter(tensors[m:])
            *at, h = (next(rest) if s is None else s for s in fixed)
            k = [row.reshape(shape) for row in y.reshape(batch, m, n).unbind(1)]
            row = [tuple((j, float(c)) for j, c in enumerate(line) if c) for line in block.a]
            values = [f(at[i], combine(tensors[i], h, row[i], k)) for i in range(m)]
            return torch.stack([v.reshape(batch, n) for v in values], 1).reshape(batch, m * n)

        y = stages.transpose(0, 1).reshape(batch, m * n)
        y = implicit(equation, y, *bases, *given)
        return y.reshape(batch, m, n).transpose(0, 1)


def newton_tolerance(control: Control, dtype: torch.dtype) -> float:
    """κ, what the error that Newton's method leaves may be of the step's tolerance.

    Source:
        Hairer & Wanner, Solving Ordinary Differential Equations II, IV.8, and RADAU5.
    """
    rtol = control.rtol
    rtol = float(rtol.min()) if isinstance(rtol, Tensor) else rtol
    if rtol == 0:
        return 0.03
    return max(10 * torch.finfo(dtype).eps / rtol, min(0.03, math.sqrt(rtol)))


def check_implicit(x: Tensor) -> None:
    """Refuses states that no implicit method takes.

    Raises:
        TypeError: complex, of half precision, or within a transform of torch.func.
    """
    if is_transformed():
        raise TypeError(
            "implicit steps have a way back of their own, which torch.func's transforms do not follow; take "
            "torch.autograd.grad, or an explicit method."
        )
    if x.is_complex():
        raise TypeError(
            "an implicit method solves equations in the real numbers, and the state is complex: give it as "
            "torch.view_as_real(y0), with a field that views it as complex."
        )
    if torch.finfo(x.dtype).bits < 32:
        raise TypeError(
            f"an implicit method factors matrices, which {x.dtype} can't; keep the state in float32."
        )


def _numbers(values: Any) -> Any:
    if not isinstance(values, Tensor):
        return [values]
    return decided(plain(values).reshape(-1) if not is_transformed(values) else values.reshape(-1),
                   "Newton's iteration goes by the values of the state")  # fmt: skip


def _weighted(row: np.ndarray, k: Tensor) -> Tensor:
    """The sum Σ a_j k_j over the first dimension of k."""
    return sum(float(c) * v for c, v in zip(row, k, strict=True) if c)  # type: ignore[return-value]


def _rms(x: Tensor) -> Tensor:
    """Root mean square over the last dimension, which need not fit when squared."""
    return torch.linalg.vector_norm(x, dim=-1) / max(1, x.shape[-1]) ** 0.5


def steps_by(take: ImplicitStep, anew: bool = False) -> Callable[..., Tensor]:
    """A function like `fixed.equal_steps`, by implicit steps.

    Args:
        take: takes them.
        anew: let each call begin with a rule that has learnt nothing, as what is to be repeated must.
    """

    def advance(tableau: ButcherTableau, f: Field, t: Time, x: Tensor, h: Time, n: int) -> Tensor:
        k0: Tensor | None = None
        step = take.anew() if anew else take
        for i in range(n):
            begin = t + i * h
            times = [begin + c * h if c else begin for c in tableau.stage_times]
            k, x = step(tableau, f, times, x, h, k0)
            k0 = k[-1] if tableau.fsal else None
        if anew:
            take.total, take.total_calls = take.total + step.total, take.total_calls + step.total_calls
        return x

    return advance


def step_rule(tableau: ButcherTableau, per_sample: bool, control: Control | None = None) -> Any:
    """What takes a step of the method: `step.explicit_step`, or an `ImplicitStep`."""
    return explicit_step if tableau.explicit else ImplicitStep(tableau, per_sample, control)
