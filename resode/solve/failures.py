"""The errors of error-controlled solving, each for the first of the samples that can't go on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.solve.diagnosis import STIFF_SOLVER, explain, number, spectrum
from resode.solve.implicit.blocks import stage_blocks
from resode.solve.result import (
    MaxStepsReached,
    NewtonNotConverged,
    NonFiniteField,
    NonFiniteState,
    SolverError,
    StepSizeUnderflow,
)
from resode.solve.step import Field
from resode.tableaus import ButcherTableau

NEAR_SINGULAR = 0.1
"""|1 − ηγλ| below which λ is named where Newton's method fails."""


@dataclass(frozen=True)
class Standing:
    """Where the first of the samples that can't go on stands.

    Attributes:
        tableau: the method.
        field: of t and the whole state.
        t: the time as the field takes it.
        x: the whole state.
        sample: the row of the state, or None where it is taken whole.
        time: the sample's time.
        step: the size of the step to be tried, at least 0.
        end: where the solve ends.
        several: whether there are other samples, so that the message names this one.
    """

    tableau: ButcherTableau
    field: Field
    t: Any
    x: Tensor
    sample: int | None
    time: float
    step: float
    end: float
    several: bool

    @property
    def own(self) -> Tensor:
        """The sample's part of the state."""
        return self.part(self.x)

    def part(self, x: Tensor) -> Tensor:
        """The sample's part of a tensor like the state."""
        return x if self.sample is None else x[self.sample]

    def explain(self) -> tuple[str, str, complex | None]:
        """Why it can't go on, from its Jacobian's eigenvalues."""
        eigenvalues = spectrum(self.field, self.t, self.x, self.sample)
        return explain(self.tableau, eigenvalues, self.step, abs(self.end - self.time))

    @property
    def name(self) -> str:
        """', sample 3', or nothing where there is one alone."""
        return f", sample {self.sample}" if self.several else ""

    def __str__(self) -> str:
        return f"t={self.time:.9g}{self.name}, with a step of {number(self.step)}"

    def about(self, eigenvalue: complex | None = None) -> dict[str, Any]:
        """What a SolverError says of it."""
        sample = self.sample if self.several else None
        return {"time": self.time, "step_size": self.step, "sample": sample, "eigenvalue": eigenvalue}


def too_many_steps(at: Standing, max_steps: int) -> SolverError:
    """For a sample that used up its steps."""
    kind, text, eigenvalue = at.explain()
    if kind == "stiff":
        advice = f"{text}. Try {STIFF_SOLVER}, or raise max_steps."
    elif kind == "growing":
        advice = f"{text}. End the interval before, check the field, or raise max_steps."
    elif kind == "smooth":
        advice = f"{text}; the tolerance asks for shorter ones. Raise max_steps, or loosen rtol and atol."
    else:
        advice = f"Raise max_steps, loosen rtol and atol, or, if it is stiff, try {STIFF_SOLVER}."
    goal = f"before {at.end:g}"
    if math.isinf(at.end):
        goal = "without an event"
        advice = f"Check event_fn's sign and t's direction. {advice[0].upper()}{advice[1:]}"
    message = f"max_steps={max_steps} attempted steps ended at {at}, {goal}. {advice}"
    return MaxStepsReached(message, **at.about(eigenvalue))


def step_underflow(at: Standing) -> SolverError:
    """For a sample whose tolerance asks for a step below the time's precision."""
    kind, text, eigenvalue = at.explain()
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
    message = f"the tolerance asks for a step below what the time resolves at {at}: {advice}"
    return StepSizeUnderflow(message, **at.about(eigenvalue))


def newton_failed(at: Standing, residual: float, rate: float, fixed: bool = False) -> SolverError:
    """For a sample whose stages Newton's method did not find.

    Args:
        at: where it stands.
        residual: the last correction over what was asked of it.
        rate: what the last iteration left of the correction before.
        fixed: whether the step was given, so that no shorter one was tried.
    """
    eigenvalue, reason = None, ""
    values = spectrum(at.field, at.t, at.x, at.sample)
    if values is not None:
        gamma = np.concatenate([block.eigenvalues for block in stage_blocks(at.tableau)]).astype(complex)
        signed = math.copysign(at.step, at.end - at.time)
        distance = abs(1 - signed * np.multiply.outer(gamma, values.numpy()))
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        if distance[i, j] < NEAR_SINGULAR:
            eigenvalue = complex(values[j])
            what = "" if gamma[i] == 1 else f"{number(gamma[i])} times "
            reason = (
                f" The matrix I − ηγJ is near singular: the field grows with λ ≈ {number(eigenvalue)} "
                f"there, and {what}the step times λ is {number(signed * gamma[i] * eigenvalue)}, near 1."
            )
    if not _derivative_is_finite(at):
        reason = " The field is finite there, but its Jacobian holds infinities or NaN."
        advice = (
            "torch.where passes on the NaN of the branch that it does not take, and √ and norms have no "
            "derivative at 0: choose the argument by torch.where, not the result, or add a small number "
            "under the root."
        )
    elif fixed:
        advice = "Take shorter steps, or a field that does not grow (Re λ ≤ 0), which any step suits."
    else:
        advice = (
            'The field jumps there, or is not smooth: name a jump with options={"jump_t": …}, or check it.'
        )
    said = f"{residual:.2g} times what was asked" if math.isfinite(residual) else "not finite"
    speed = f", {rate:.2g} times the one before" if math.isfinite(rate) else ""
    return NewtonNotConverged(
        f"Newton's method did not find the stages of {at.tableau.name} at {at}: its last correction was "
        f"{said}{speed}.{reason} {advice}",
        residual=residual,
        rate=rate,
        **at.about(eigenvalue),
    )


def _derivative_is_finite(at: Standing) -> bool:
    """Whether the sums of the columns of the sample's Jacobian are finite; True where they can't be had."""
    try:
        with torch.enable_grad():
            x = at.x.detach().clone().requires_grad_()
            (grad,) = torch.autograd.grad(at.part(at.field(at.t, x)).sum(), x)
        return bool(torch.isfinite(at.part(grad)).all())
    except Exception:  # whatever a field may raise, the failure that is being explained comes first
        return True


def nothing_finite(at: Standing, k: list[Tensor]) -> SolverError:
    """For a sample that no step, however small, takes to a finite field and state; k are the stages."""
    kind, text, eigenvalue = at.explain()
    reason = f" {text[0].upper()}{text[1:]}." if kind == "growing" else ""
    bad = next((row for row in map(at.part, k) if not torch.isfinite(row).all()), None)
    # A huge state that overflows in F is a blow-up; a moderate one that F can't take is F's domain.
    if bad is not None and kind != "growing" and float(at.own.detach().abs().max()) < 1e6:
        return NonFiniteField(
            f"the field is not finite near {at}: F(x) holds {first_bad(bad)} at a finite state, and "
            f"no shorter step avoids it.{reason} The solution reaches the edge of the field's domain: "
            "end the interval before, or extend the field.",
            **at.about(eigenvalue),
        )
    return NonFiniteState(
        f"the state leaves the finite numbers at {at}: a blow-up in finite time, or a field that "
        f"overflows.{reason} End the interval before it, or check the field.",
        **at.about(eigenvalue),
    )


def field_not_finite(at: Standing, k0: Tensor) -> SolverError:
    """For a sample whose field k0 is not finite at the start."""
    return NonFiniteField(
        f"the field is not finite at t={at.time:.9g}{at.name}, before the first step: F(x) holds "
        f"{first_bad(at.part(k0))}. Check the field's weights and the state it is given.",
        **at.about(),
    )


def first_bad(dx: Tensor) -> str:
    """Which entry of one sample's derivative is not finite."""
    dx = dx.detach()
    entry = (~torch.isfinite(dx)).nonzero()[0].tolist()
    value = dx[tuple(entry)].item()
    return f"{value} at entry {entry}" if entry else f"{value}"
