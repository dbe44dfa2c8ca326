r"""What a fixed point is: node, spiral, saddle, centre or degenerate, for the flow and for a solver's map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.analysis.rest.fixed_points import SMALL, newton_direction, solver_slope
from resode.checks import check_number, checked
from resode.jacobian.linearize import Field, check_field, dense_jacobian
from resode.jacobian.spectrum import SpectrumOptions, spectrum
from resode.results import Result
from resode.stability.function import amplification
from resode.stability.unstable_rays import Complexes, Floats
from resode.tableaus import ButcherTableau, get_tableau
from resode.tables import short_complex

KINDS = ("node", "spiral", "saddle", "centre", "degenerate")

_NEUTRAL = 1e-12  # distance of |R(ηλ)| from 1
_LEAST = 240  # products with a Jacobian that is not formed: the rightmost eigenvalue may limit no step
_SAFETY = 16.0  # times the first-order error: what may make a part of an eigenvalue count as 0


@dataclass(frozen=True, eq=False, repr=False)
class Classification(Result):
    """What fixed points are.

    Args:
        kind: of each sample. "node": real eigenvalues of one sign; "spiral": real parts of one sign, some
            eigenvalues complex; "saddle": both signs; "centre": all imaginary, none 0; "degenerate": an
            eigenvalue 0, or imaginary ones beside others, so that linearization does not decide.
        stable: Re λ < 0 for every eigenvalue, shape (batch,): asymptotically stable for the flow; never so at
            a spurious point.
        solver_stable: |R(ηλ)| < 1 for every eigenvalue, shape (batch,); at a spurious fixed point the
            eigenvalues of the map itself are below 1. None without a solver.
        eigenvalues: λ (1/time) of each sample, rightmost first, shape (batch, n); of states with more than
            1,024 entries the outermost ones that were found, filled up with nan.
        residual: max|F(x)|, shape (batch,); not small where x is no fixed point of the flow.
        spurious: whether the solver's map rests at x but F does not; None without a solver.
        converged: whether the rightmost eigenvalue was found to 1e-3 of the largest, (batch,).
        solver: the method's name, or None.
        step_size: η, or None.
        growth: the largest |R(ηλ)|, shape (batch,); None without a solver.
    """

    kind: list[str]
    stable: Tensor
    solver_stable: Tensor | None
    eigenvalues: Tensor
    residual: Tensor
    spurious: Tensor | None
    converged: Tensor
    solver: str | None = None
    step_size: float | None = None
    growth: Tensor | None = None

    def __str__(self) -> str:
        lines = []
        for i, kind in enumerate(self.kind):
            flow = "stable" if self.stable[i] else "unstable"
            rightmost = complex(self.eigenvalues[i, 0])
            if kind == "centre":
                flow = "neutral"
            elif kind == "degenerate" and not self.stable[i] and rightmost.real <= 0:
                flow = "undecided"
            line = f"{kind}, {flow} for the flow (λ = {short_complex(rightmost, 6)})"
            if self.spurious is not None and self.spurious[i]:
                line = f"spurious, no fixed point of the flow (max|F| = {float(self.residual[i]):.3g})"
            if self.solver_stable is not None and self.growth is not None:
                word = "stable" if self.solver_stable[i] else "unstable"
                if abs(float(self.growth[i]) - 1) <= _NEUTRAL:
                    word = "neutral"
                line += f"; {word} for {self.solver} at η = {self.step_size:g} "
                line += f"(largest |R(ηλ)| = {float(self.growth[i]):.6g})"
            if self.residual[i] > _rest(self.residual.dtype) and not (
                self.spurious is not None and self.spurious[i]
            ):
                line += f"; F is not 0 here (max|F| = {float(self.residual[i]):.3g}), so it is no fixed point"
            if not self.converged[i]:
                line += "; eigenvalues not converged"
            lines.append(line)
        return "\n".join(lines)


def _rest(dtype: torch.dtype) -> float:
    """max|F| up to which a point counts as a fixed point."""
    return 1e-6 if dtype == torch.float64 else 1e-3


@checked
def classify(
    field: Field, x: Tensor, *, solver: str | ButcherTableau | None = None, step_size: float | None = None
) -> Classification:
    r"""Classify fixed points by the eigenvalues of F's Jacobian, for the flow and for a solver's map.

    An eigenvalue counts as real or as imaginary up to what rounding, its condition and the residual at x
    may have moved it by.

    Args:
        field: F, as in `find_fixed_points`.
        x: fixed points, shape (batch, *state); those of a solver's map, with `solver`, may be spurious.
        solver: a method's name or tableau; implicit ones too, at fixed points of F.
        step_size: η > 0, together with `solver`.

    Raises:
        TypeError, ValueError: as `resode.jacobian.linearize.check_field`; a solver without a step size or
            the reverse.

    Source:
        Strogatz, Nonlinear Dynamics and Chaos (2nd ed. 2015), chapter 5; Hairer & Wanner, Solving Ordinary
        Differential Equations II, IV.2.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> print(classify(lambda x: x * (1 - x), x, solver="euler", step_size=2.5))
        node, unstable for the flow (λ = 1); unstable for euler at η = 2.5 (largest |R(ηλ)| = 3.5)
        node, stable for the flow (λ = -1); unstable for euler at η = 2.5 (largest |R(ηλ)| = 1.5)
    """
    value = check_field(field, x)
    x = x.detach()
    if (solver is None) != (step_size is None):
        raise ValueError("a solver's map needs its step: give solver= and step_size= together, or neither.")
    if step_size is not None:
        check_number("step_size", step_size, above=0)
    residual = value.detach().flatten(1).abs().amax(1)
    spectra = _spectra(field, x, value.detach())
    width = max(len(s.values) for s in spectra)
    padded = [np.pad(s.values, (0, width - len(s.values)), constant_values=np.nan) for s in spectra]
    eigenvalues = torch.as_tensor(np.array(padded), device=x.device)
    stable = torch.tensor([s.stable() for s in spectra], device=x.device)
    spurious = solver_stable = growth = None
    tableau = None if solver is None else get_tableau(solver)
    if tableau is not None and step_size is not None:
        size, spurious = _growth(field, x, residual, spectra, tableau, step_size)
        growth = torch.as_tensor(size, device=x.device)
        solver_stable = growth < 1 - _NEUTRAL
    return Classification(
        kind=[s.kind() for s in spectra],
        stable=stable if spurious is None else stable & ~spurious,
        solver_stable=solver_stable,
        eigenvalues=eigenvalues,
        residual=residual,
        spurious=spurious,
        converged=torch.tensor([s.converged for s in spectra], device=x.device),
        solver=None if tableau is None else tableau.name,
        step_size=step_size,
        growth=growth,
    )


@dataclass
class _Spectrum:
    """Eigenvalues, rightmost first, and how far each may be from the true one."""

    values: Complexes
    error: Floats
    converged: bool

    def stable(self) -> bool:
        return bool((self.values.real < -self.error).all())

    def kind(self) -> str:
        grows, decays = self.values.real > self.error, self.values.real < -self.error
        neutral = ~grows & ~decays
        turns = np.abs(self.values.imag) > self.error
        if neutral.any():
            return "centre" if neutral.all() and turns.all() else "degenerate"
        if grows.any() and decays.any():
            return "saddle"
        return "spiral" if turns.any() else "node"


def _spectra(field: Field, x: Tensor, value: Tensor) -> list[_Spectrum]:
    """Of every sample; of a search those that are known, and the rightmost."""
    found = spectrum(field, x, SpectrumOptions(rtol=1e-3, check=False, least=_LEAST))
    eps = max(float(torch.finfo(x.dtype).eps), 2.0**-52)
    result = []
    for i in range(len(x)):
        order = np.argsort(-found.values[i].real, kind="stable")  # nan last
        values, scale = found.values[i][order], found.scale[i] or 1.0
        error = np.minimum(_SAFETY * found.errors[i][order], _SAFETY * x[0].numel() * eps**0.5 * scale)
        keep, converged = np.isfinite(values), True
        if found.complete[i]:
            error = error + _moved_by_residual(field, x[i : i + 1], value[i : i + 1])
        else:
            error = np.maximum(found.errors[i][order], 16 * x[0].numel() * eps * scale)
            converged = bool(error[0] <= 1e-3 * scale)
            keep &= error <= 1e-3 * scale
            keep[0] = True
        values, error = values[keep], error[keep]
        real = np.abs(values.imag) <= error
        values[real] = values[real].real
        result.append(_Spectrum(values, error, converged))
    return result


def _moved_by_residual(field: Field, x: Tensor, value: Tensor) -> float:
    """How far the Jacobian changes from x to the fixed point next to it, where x is nearly one."""
    scale = torch.finfo(x.dtype).eps ** 0.25 * (1 + float(x.norm()))
    if not bool(value.abs().max() > 0) or x.numel() > SMALL:
        return 0.0
    step = newton_direction(field, x, value.flatten(1))
    if not bool(torch.isfinite(step).all()) or float(step.norm()) > scale:
        return 0.0
    moved = dense_jacobian(field, x + step.reshape(x.shape)) - dense_jacobian(field, x)
    return float(moved.double().norm())


def _growth(
    field: Field, x: Tensor, residual: Tensor, spectra: list[_Spectrum], tableau: ButcherTableau, h: float
) -> tuple[np.ndarray, Tensor]:
    """The largest growth factor of the map at each sample, and whether the point is spurious."""
    small = _rest(x.dtype)
    spurious = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    slope: Any = None
    if tableau.explicit and tableau.b_row[-1][0] > 0 and bool((residual > small).any()):
        slope = solver_slope(field, tableau, h)
        rests = slope(x).detach().flatten(1).abs().amax(1) <= small * residual
        spurious = rests & (residual > small)
    sizes = np.empty(len(x))
    for i, own in enumerate(spectra):
        if spurious[i]:
            mapped = _spectra(slope, x[i : i + 1], slope(x[i : i + 1]).detach())[0]
            sizes[i] = np.abs(1 + h * mapped.values).max()
        else:
            sizes[i] = amplification(tableau, h * own.values).max()
    return sizes, spurious
