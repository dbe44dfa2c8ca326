"""Solving with compiled steps.

An attempted step (stages, error norm, controller, masked acceptance) is one graph, and so are a few fixed
steps. An attempt decides by masks where `Adaptive.steps` branches on the host; the results are the same but
for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.checks import warn_user
from resode.solve.adaptive import (
    STANDSTILLS,
    Adaptive,
    Progress,
    adaptive_solve,
    at_the_ends,
    between,
    error_norm,
)
from resode.solve.control import NUMPY, Control, decide, plan
from resode.solve.dense import Step
from resode.solve.failures import too_many_steps
from resode.solve.fixed import equal_steps
from resode.solve.kept import compiled_for
from resode.solve.kernels.solve import solve_by_rows
from resode.solve.result import SolverError
from resode.solve.step import Counted, Field, Time, as_stage, combine, increment, stages
from resode.tableaus import ButcherTableau

WINDOW = {"cuda": 8}
"""Attempts between two looks of the host at the flags, 1 where not named; finished samples wait meanwhile."""

EVALUATIONS = 16
"""About how many evaluations of the field one graph of fixed steps holds."""

RECENT = 256
"""How many attempts are held before those that passed no output are dropped."""

COMPILED_OPTIONS = (
    "first_step",
    "min_step",
    "max_step",
    "dtype",
    "safety",
    "ifactor",
    "dfactor",
    "controller",
)
"""The options that compiled steps know."""


def attempt(
    tableau: ButcherTableau,
    control: Control,
    forward: float,
    f: Field,
    x: Tensor,
    k0: Tensor,
    state: Tensor,
    end: Tensor,
    tolerance: tuple[Tensor, Tensor],
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """One attempted step of every sample that is not at the end.

    Args:
        tableau: the method.
        control: its limits.
        forward: 1, or −1 where time decreases.
        f: the field.
        x: the state.
        k0: f there.
        state: time, next step, errors of the last two steps taken, whether the last attempt was rejected,
            steps accepted and rejected: (7, B).
        end: each sample's, (B,).
        tolerance: rtol and atol, of the state's real dtype.
        dense: whether states within the step will be asked for.

    Returns:
        x, k0 and state after it; the flags (3,) whether some sample is not at the end, failed to be finite,
        can't go on; with dense, the coefficients of the polynomial in θ over the step, (d, *x.shape), or the
        stages, where the polynomial takes more of them.
    """
    real = tolerance[0].dtype
    column = (-1,) + (1,) * (x.ndim - 1) if control.per_sample else ()
    time, step, *errors, was_rejected, accepted, rejected = state.unbind(0)
    tried = plan(torch, time, step, end, forward, control)
    size = tried.size
    h = (forward * size).to(real).reshape(column)
    times = [time + c * (forward * size) for c in tableau.stage_times]
    times = [t.clamp(max=end) if forward > 0 else t.clamp(min=end) for t in times]
    k = stages(tableau, f, [t.to(real).reshape(column) for t in times], x, h, k0)
    new_x = combine(x, h, tableau.b_row, k)
    k.append(f(tried.end.to(real).reshape(column), new_x))

    with torch.no_grad():
        error = error_norm(tableau, control, x, new_x, k, h, tolerance)
        error = error.reshape(-1).to(state.dtype)
        verdict = decide(
            torch, tried, error, time, step, torch.stack(errors), was_rejected > 0, tableau.order, control
        )
        keep, refused = verdict.keep, verdict.refused
        new_time = torch.where(keep, tried.end, time)
        rows = [
            new_time,
            verdict.step,
            *verdict.errors,
            verdict.rejected,
            accepted + keep,
            rejected + refused,
        ]
        state = torch.stack([row.to(state.dtype) for row in rows])
        flags = [(end - new_time) * forward > 0, verdict.failed, verdict.stuck]
        flags = torch.stack([flag.any() for flag in flags])

    mask = keep.reshape(column)
    polynomial = interpolant(tableau, h, x, new_x, k) if dense else None
    return torch.where(mask, new_x, x), torch.where(mask, k[-1], k0), state, flags, polynomial


def interpolant(
    tableau: ButcherTableau, h: Tensor, x: Tensor, new_x: Tensor, k: list[Tensor]
) -> Tensor | None:
    """Coefficients of 1, θ, θ², … of the state at the fraction θ of a step, (d, *x.shape), or the stages."""
    if tableau.dense_rows:
        return torch.stack(k)
    if tableau.interpolant is not None:
        columns = zip(*tableau.interpolant, strict=True)
        rows = [tuple((i, float(c)) for i, c in enumerate(column) if c) for column in columns]
        return torch.stack([x, *(increment(h, row, k) for row in rows)])
    if tableau.order <= 3:
        rise, slope0, slope1 = new_x - x, h * k[0], h * k[-1]
        return torch.stack([x, slope0, 3 * rise - 2 * slope0 - slope1, slope0 + slope1 - 2 * rise])
    return None


@dataclass
class _Attempt:
    """An attempt, as its interpolant needs it."""

    x: Tensor
    k0: Tensor
    state: Tensor
    later: Tensor  # the state after it
    polynomial: Tensor | None


class NotStuck(Exception):
    """What was at its smallest step compiled was not so on the host, by a rounding."""


def compiled_solve(
    tableau: ButcherTableau,
    f: Counted,
    x: Tensor,
    times: Sequence[float] | np.ndarray,
    control: Control,
    resume: Progress | None,
    key: Any,
) -> tuple[list[Tensor], Progress]:
    """As `adaptive_solve`, by compiled attempts.

    Args:
        tableau: an explicit method with an error estimate.
        f: the field, which is counted where it is not compiled.
        x: the state at times[0].
        times: at least two, strictly monotone either way, or each sample's own, (T, B).
        control: how steps are chosen, without callbacks.
        resume: where an earlier interval of the same solve ended.
        key: what the compiled functions are kept for: a module, or a function's code.
    """
    at = np.asarray(times, NUMPY[control.dtype])
    solve = Adaptive(tableau, f, x, at[0], at[-1], control, resume)
    if x.requires_grad and torch.is_grad_enabled() and not solve.k0.requires_grad:
        warn_user(
            "func's result has no gradient though the state has one (detach, no_grad or numpy in it?): the "
            "gradients will be those of a constant field.",
        )
    outputs = at[1:-1].T
    try:
        if (found := solve_by_rows(solve, outputs, key)) is not None:
            calls = tableau.b_row[-1][0] + 1
            tried = found.state[5:].sum(0).numpy() - solve.progress.n_accepted - solve.progress.n_rejected
            f.calls += calls * int(tried.max())
            _place(solve, found.x, found.k0, found.state, calls)
            if ((solve.end - solve.time) * solve.forward > 0).any():
                next(solve.steps(), None)  # raises, with the reason
                raise NotStuck
            return [*at_the_ends(list(found.path), outputs, solve, (x, at[0])), solve.x], solve.progress
        passed = _attempts(solve, outputs, key)
    except SolverError:
        raise
    except Exception as error:
        if not isinstance(error, NotStuck):
            warn_of_eager(error)
        return adaptive_solve(tableau, f, x, times, control, resume)
    path, calls = _between(solve, passed, outputs, (x, at[0]))
    return [*path, solve.x], replace(solve.progress, nfe=solve.progress.nfe + calls)


def _attempts(solve: Adaptive, outputs: np.ndarray, key: Any) -> list[_Attempt]:
    """Takes the solve to its end; the attempts in which some sample passed an output, and others."""
    tableau, control, f, x, k0 = solve.tableau, solve.control, solve.f, solve.x, solve.k0
    assert isinstance(f, Counted)
    device, dtype = x.device, control.dtype
    dense = outputs.shape[-1] > 0
    window = 1 if torch.is_grad_enabled() else WINDOW.get(device.type, 1)
    run = compiled_for(_attempt_of, key, x, tableau, constants(control), solve.forward, dense, window)
    p = solve.progress
    rows = [solve.time, p.step, *p.errors, np.zeros_like(p.step), p.n_accepted, p.n_rejected]
    state = torch.from_numpy(np.stack(rows).astype(NUMPY[dtype])).to(device)
    end = torch.from_numpy(solve.end).to(device)
    tolerance = (as_real(control.rtol, x), as_real(control.atol, x))
    ahead = np.broadcast_to(solve.forward * outputs, (len(solve.time), outputs.shape[-1]))
    ahead = torch.from_numpy(ahead.copy()).to(device)
    calls = tableau.b_row[-1][0] + 1
    attempts, recent, most = 0, 0, int((p.n_accepted + p.n_rejected).max())
    passed: list[_Attempt] = []
    going = True
    while going:
        if attempts + most >= control.max_steps:
            _place(solve, x, k0, state, calls)
            spent = ((solve.end - solve.time) * solve.forward > 0) & (
                solve.progress.n_accepted + solve.progress.n_rejected >= control.max_steps
            )
            if spent.any():
                raise too_many_steps(solve.standing(spent), control.max_steps)
        x, k0, state, flags, made = run(f.f, x, k0, state, end, tolerance)
        tried = [_Attempt(*a) for a in made]
        attempts += len(tried)
        f.calls += calls * len(tried)
        seen = flags.tolist()
        going = seen[-1][0]
        for (_, failed, stuck), was in zip(seen, tried, strict=True):
            if failed:
                _place(solve, was.x, was.k0, was.state, calls)
                solve.standstills = solve.standstills + solve.stands_still()
            if stuck or (solve.standstills >= STANDSTILLS).any():
                _place(solve, was.x, was.k0, was.state, calls)
                next(solve.steps(), None)  # raises, with the reason
                raise NotStuck
            if failed and window == 1:
                x, k0 = was.x, was.k0  # so that no infinity enters their graph
        if dense:
            passed += tried
            recent += len(tried)
            if recent >= RECENT:
                passed, recent = _that_passed(passed, ahead, solve.forward), 0
    _place(solve, x, k0, state, calls)
    return passed


def _that_passed(attempts: list[_Attempt], ahead: Tensor, forward: float) -> list[_Attempt]:
    """Of the attempts, those in which some sample passed one of its outputs, forward · t, (B, T)."""
    ends = [torch.stack([a.state[0] for a in attempts], 1), torch.stack([a.later[0] for a in attempts], 1)]
    before, after = (torch.searchsorted(ahead, forward * s, right=True) for s in ends)
    return [a for a, passed in zip(attempts, (after > before).any(0).tolist(), strict=True) if passed]


def _place(solve: Adaptive, x: Tensor, k0: Tensor, state: Tensor, calls: int) -> None:
    """Puts the solve where compiled attempts have brought it."""
    time, step, last, older, _, accepted, rejected = state.cpu().numpy()
    before = solve.progress.n_accepted + solve.progress.n_rejected
    accepted, rejected = accepted.astype(np.int64), rejected.astype(np.int64)
    nfe = solve.progress.nfe + calls * (accepted + rejected - before)
    solve.x, solve.k0, solve.time = x, k0, time
    solve.progress = Progress(step, np.stack([last, older]), nfe, accepted, rejected)


def _between(
    solve: Adaptive, passed: list[_Attempt], outputs: np.ndarray, begin: tuple[Tensor, np.ndarray]
) -> tuple[list[Tensor], int]:
    """The states at the outputs, all at once, and the calls of the field they took."""
    forward, more = solve.forward, bool(solve.tableau.dense_rows)
    if not passed or passed[0].polynomial is None or more:
        steps = []
        for p in passed:
            ends = (p.state[0].cpu().numpy(), p.later[0].cpu().numpy())
            k = list(p.polynomial) if more and p.polynomial is not None else [p.k0]
            steps.append(Step(*ends, p.x, k, p.x))
        return between(solve.tableau, solve.f, steps, outputs, solve, begin)
    x, coefficients = passed[0].x, torch.stack([p.polynomial for p in passed], 1)  # type: ignore[misc]
    start, end = (torch.stack(s, 1) for s in ([p.state[0] for p in passed], [p.later[0] for p in passed]))
    wanted = torch.from_numpy(outputs).to(x.device).expand(len(start), -1).contiguous()
    index = torch.searchsorted(forward * end, forward * wanted)  # the first step that reaches it, (B, T)
    index = index.clamp(max=len(passed) - 1)  # an output at a sample's start may lie in none
    start, size = start.gather(1, index), (end - start).gather(1, index)
    theta = ((wanted - start) / torch.where(size == 0, 1.0, size)).clamp(0, 1).T.to(x.dtype.to_real())
    # One row for each attempt and sample; a state that is no batch is one row.
    rows = coefficients.reshape(len(coefficients), len(passed) * len(start), -1)
    pick = (index.T * len(start) + torch.arange(len(start), device=x.device)).reshape(-1)
    path = rows[-1].index_select(0, pick)
    theta = (
        theta.reshape(-1, 1).expand_as(path).contiguous()
    )  # kernels are slow where short rows share a number
    for row in rows.unbind(0)[-2::-1]:
        path = torch.addcmul(row.index_select(0, pick), path, theta)
    return at_the_ends(list(path.reshape(len(index.T), *x.shape)), outputs, solve, begin), 0


def compiled_steps(key: Any) -> Callable[..., Tensor]:
    """A function like `equal_steps`, by graphs of a few steps each."""
    failed = False

    def advance(tableau: ButcherTableau, f: Field, t: Time, x: Tensor, h: Time, n: int) -> Tensor:
        nonlocal failed
        many, done = max(1, EVALUATIONS // len(tableau.b)), 0
        while done < n:
            steps = many if n - done >= many else 1
            begin = t + done * h
            if not failed:
                try:
                    time = torch.as_tensor(begin, dtype=torch.float64, device=x.device)
                    size = torch.as_tensor(h, device=x.device)  # each sample's own in x's dtype, as they come
                    size = size if size.ndim else size.double()
                    x = compiled_for(_steps_of, key, x, tableau, steps)(f, time, x, size)
                    done += steps
                    continue
                except Exception as error:
                    failed = True
                    warn_of_eager(error)
            x = equal_steps(tableau, f, begin, x, h, n - done)
            done = n
        return x

    return advance


def _attempt_of(
    tableau: ButcherTableau, control: Control, forward: float, dense: bool, n: int
) -> Callable[..., Any]:
    def run(f: Any, x: Tensor, k0: Tensor, state: Tensor, end: Tensor, tolerance: Any) -> Any:
        def field(t: Time, x: Tensor) -> Tensor:
            return as_stage(f(t, x), x).clone()  # func may write into one buffer; the copy is fused away

        made, flags = [], []
        for _ in range(n):
            x1, k1, later, flag, polynomial = attempt(
                tableau, control, forward, field, x, k0, state, end, tolerance, dense
            )
            made.append((x, k0, state, later, polynomial))
            flags.append(flag)
            x, k0, state = x1, k1, later
        return x, k0, state, torch.stack(flags), made

    return run


def _steps_of(tableau: ButcherTableau, n: int) -> Callable[..., Any]:
    def run(f: Field, t: Tensor, x: Tensor, h: Tensor) -> Tensor:
        return equal_steps(tableau, f, t, x, h, n)

    return run


def constants(control: Control) -> Control:
    """What is constant in a graph; tolerances are its inputs, the rest plays no part in it."""
    return replace(control, rtol=0.0, atol=0.0, max_steps=1, first_step=None)


def as_real(value: Any, x: Tensor) -> Tensor:
    """A number as a tensor of the real dtype of x."""
    return torch.as_tensor(value, dtype=x.dtype.to_real(), device=x.device)


def warn_of_eager(error: Exception) -> None:
    """Says that a field is solved without compiling, and why."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    reason = " ".join(lines[: 2 if len(lines) > 1 and lines[1].startswith("Explanation") else 1])
    warn_user(
        f"compile=True solves without compiling, because the field could not be compiled: "
        f"{type(error).__name__}: {reason} Branch by torch.where rather than by values, keep to torch's "
        "operations, or set compile=False.",
    )
