"""The errors of error-controlled solving, each for the first of the samples that can't go on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from resode.solve.diagnosis import STIFF_SOLVER, explain, number, spectrum
from resode.solve.result import (
    MaxStepsReached,
    NonFiniteField,
    NonFiniteState,
    SolverError,
    StepSizeUnderflow,
)

if TYPE_CHECKING:
    from resode.solve.adaptive import Adaptive


def _explain(solve: Adaptive, mask: np.ndarray) -> tuple[str, str, complex | None]:
    """Why the first marked sample can't go on, from its Jacobian's eigenvalues."""
    i, (time,) = int(mask.nonzero()[0][0]), solve.as_times(solve.time[None])
    eigenvalues = spectrum(solve.f, time, solve.x, i if solve.control.per_sample else None)
    left = float(solve.end[i] - solve.time[i]) * solve.forward
    return explain(solve.tableau, eigenvalues, float(solve.progress.step[i]), left)


def too_many_steps(solve: Adaptive, spent: np.ndarray) -> SolverError:
    """For samples that used up their steps."""
    kind, text, eigenvalue = _explain(solve, spent)
    control = solve.control
    if kind == "stiff":
        advice = f"{text}. Try {STIFF_SOLVER}, or raise max_steps."
    elif kind == "growing":
        advice = f"{text}. End the interval before, check the field, or raise max_steps."
    elif kind == "smooth":
        advice = f"{text}; the tolerance asks for shorter ones. Raise max_steps, or loosen rtol and atol."
    else:
        advice = f"Raise max_steps, loosen rtol and atol, or, if it is stiff, try {STIFF_SOLVER}."
    where = _where(spent, solve.time, solve.progress.step)
    end = float(solve.end[int(spent.nonzero()[0][0])])
    goal = f"before {end:g}"
    if math.isinf(end):
        goal = "without an event"
        advice = f"Check event_fn's sign and t's direction. {advice[0].upper()}{advice[1:]}"
    return MaxStepsReached(
        f"max_steps={control.max_steps} attempted steps ended at {where}, {goal}. {advice}",
        **place(spent, solve.time, solve.progress.step),
        eigenvalue=eigenvalue,
    )


def step_underflow(solve: Adaptive, underflow: np.ndarray) -> SolverError:
    """For samples whose tolerance asks for a step below the time's precision."""
    kind, text, eigenvalue = _explain(solve, underflow)
    if kind == "stiff":
        advice = f"{text}. Try {STIFF_SOLVER}."
    elif kind == "growing":
        advice = f"{text}: end the interval before, or check the field."
    else:
        cause = f"{text}, so the field is discontinuous" if text else "the field is discontinuous or stiff"
        advice = (
            f"{cause} there, or rtol and atol are finer than its rounding. Loosen them, or name the "
            'discontinuity with options={"jump_t": …}, or end the interval at it.'
        )
    where = _where(underflow, solve.time, solve.progress.step)
    return StepSizeUnderflow(
        f"the tolerance asks for a step below what the time resolves at {where}: {advice}",
        **place(underflow, solve.time, solve.progress.step),
        eigenvalue=eigenvalue,
    )


def nothing_finite(solve: Adaptive, underflow: np.ndarray, k: list[Tensor]) -> SolverError:
    """For samples that no step, however small, takes to a finite field and state; k are the stages."""
    kind, text, eigenvalue = _explain(solve, underflow)
    where, i = _where(underflow, solve.time, solve.progress.step), int(underflow.nonzero()[0][0])
    at = place(underflow, solve.time, solve.progress.step)
    reason = f" {text[0].upper()}{text[1:]}." if kind == "growing" else ""
    rows = [solve.sample(stage, i) for stage in k]
    bad = next((row for row in rows if not torch.isfinite(row).all()), None)
    # A huge state that overflows in F is a blow-up; a moderate one that F can't take is F's domain.
    if bad is not None and kind != "growing" and float(solve.sample(solve.x, i).detach().abs().max()) < 1e6:
        return NonFiniteField(
            f"the field is not finite near {where}: F(x) holds {first_bad(bad)} at a finite state, and "
            f"no shorter step avoids it.{reason} The solution reaches the edge of the field's domain: "
            "end the interval before, or extend the field.",
            **at,
            eigenvalue=eigenvalue,
        )
    return NonFiniteState(
        f"the state leaves the finite numbers at {where}: a blow-up in finite time, or a field that "
        f"overflows.{reason} End the interval before it, or check the field.",
        **at,
        eigenvalue=eigenvalue,
    )


def field_not_finite(solve: Adaptive, bad: np.ndarray) -> SolverError:
    """For samples whose field is not finite at the start."""
    i = int(bad.nonzero()[0][0])
    return NonFiniteField(
        f"the field is not finite at t={solve.time[i]:.9g}{which(bad)}, before the first step: F(x) holds "
        f"{first_bad(solve.sample(solve.k0, i))}. Check the field's weights and the state it is given.",
        **place(bad, solve.time, np.zeros_like(solve.time)),
    )


def which(mask: np.ndarray) -> str:
    """The first marked sample, for a message; nothing where there is one sample only."""
    return f", sample {int(mask.nonzero()[0][0])}" if len(mask) > 1 else ""


def _where(mask: np.ndarray, time: np.ndarray, step: np.ndarray) -> str:
    i = int(mask.nonzero()[0][0])
    return f"t={float(time[i]):.9g}{which(mask)}, with a step of {number(float(step[i]))}"


def place(mask: np.ndarray, time: np.ndarray, step: np.ndarray) -> dict[str, Any]:
    """Where the first marked sample stands, as SolverError takes it."""
    i = int(mask.nonzero()[0][0])
    return {
        "time": float(time[i]),
        "step_size": float(step[i]),
        "sample": i if len(mask) > 1 else None,
    }


def first_bad(dx: Tensor) -> str:
    """Which entry of one sample's derivative is not finite."""
    dx = dx.detach()
    entry = (~torch.isfinite(dx)).nonzero()[0].tolist()
    value = dx[tuple(entry)].item()
    return f"{value} at entry {entry}" if entry else f"{value}"
