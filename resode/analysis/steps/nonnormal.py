r"""What eigenvalues do not tell: growth for a while under a stable step, for matrices that are not normal.

With ρ(R(ηJ)) < 1 every perturbation decays in the end, but ‖R(ηJ)ⁿ‖₂ can rise first. The logarithmic norm
μ₂(J) bounds the growth of the flow, and the contraction limit is the step below which one step enlarges
nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # whose submodules are loaded when first named

from resode.checks import check_number, check_whole, checked
from resode.jacobian.matrices import Matrices, checked_matrices, spectral_norms
from resode.jacobian.spectrum import matrix_spectrum
from resode.results import Result
from resode.stability import stability_coefficients, stability_properties
from resode.stability.function import stability_product
from resode.stability.limits import like, plain
from resode.stability.recurrences import EXACT_UP_TO
from resode.stability.spectra import limits
from resode.stability.unstable_rays import Floats, bernstein_matrix
from resode.tableaus import ButcherTableau, get_tableau

_FAR = 1e8  # times 1/‖J‖: more than the contraction limit of any method with a thousand stages


@checked
def logarithmic_norm(jacobian: Any) -> Any:
    r"""μ₂(J) = λ_max((J + J*)/2), the rate at which ‖x‖₂ can grow under x' = Jx.

    ‖e^{tJ}‖₂ ≤ e^{tμ₂}, and no smaller rate bounds it for every t > 0. μ₂ ≥ max Re λ, with equality where J
    is normal.

    Args:
        jacobian: J (1/time), tensor, array or scipy sparse matrix, shape (n, n) or (…, n, n).

    Returns:
        A float for one matrix, else an array or tensor of shape (…).

    Raises:
        TypeError, ValueError: as `checked_matrices`.

    Source:
        Dahlquist (1958); Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, I.10.

    Example:
        >>> logarithmic_norm([[-1.0, 10.0], [0.0, -2.0]])  # eigenvalues −1 and −2
        3.524937810560...
    """
    values, _ = checked_matrices(jacobian)
    return like(jacobian, logarithmic_norms(values), values.shape[:-2])


def logarithmic_norms(values: Matrices) -> Floats:
    """μ₂ (…) of matrices (…, n, n)."""
    symmetric = (values + np.conj(np.swapaxes(values, -1, -2))) / 2
    return np.asarray(np.linalg.eigvalsh(symmetric)[..., -1], dtype=float)


@checked
def contraction_step(jacobian: Any, method: str | ButcherTableau = "euler") -> Any:
    r"""sup{h : ‖R(sJ)‖₂ ≤ 1 for all 0 ≤ s ≤ h}: up to this step no step enlarges any perturbation.

    ‖R(hJ)‖₂ ≤ 1 says that W(h) = (P*P − Q*Q)/h, with P and Q taken at hJ, is negative semidefinite. W is a
    matrix polynomial in h; where its Bernstein coefficients on an interval are negative semidefinite it is so
    throughout. The first exit follows by halving the intervals that this leaves open, so no excursion between
    samples is missed. It is 0 where μ₂(J) > 0, never above the step limit of the spectrum, equal to it where
    J is normal, and inf for A-stable methods where μ₂(J) ≤ 0.

    Args:
        jacobian: J (1/time), tensor, array or scipy sparse matrix, shape (n, n) or (…, n, n).
        method: a name in METHODS, or a tableau.

    Returns:
        A float for one matrix, else an array or tensor of shape (…), to about ten digits. What is
        positive by no more than 2nε‖J‖₂ counts as 0.

    Raises:
        TypeError, ValueError: as `checked_matrices`, or the method is unknown.

    Source:
        Hairer & Wanner, Solving Ordinary Differential Equations II, IV.11 (von Neumann's theorem).

    Example:
        >>> contraction_step([[-2.0, 0.0], [0.0, -5.0]]), contraction_step([[-1.0, 10.0], [0.0, -2.0]])
        (0.4, 0.0)
    """
    values, eps = checked_matrices(jacobian)
    tableau = get_tableau(method)
    flat = values.reshape(-1, *values.shape[-2:])
    norms = spectral_norms(flat)
    spectral = plain(limits(matrix_spectrum(jacobian), tableau).step).reshape(-1)
    found = contraction_steps(flat, tableau, eps, spectral, norms, logarithmic_norms(flat))
    return like(jacobian, found, values.shape[:-2])


def contraction_steps(
    matrices: Matrices, tableau: ButcherTableau, eps: float, spectral: Floats, norms: Floats, growth: Floats
) -> Floats:
    """The contraction limits (B,) of matrices (B, n, n) with known spectral limits, ‖J‖₂ and μ₂(J)."""
    slack = 2 * matrices.shape[-1] * eps
    found = np.zeros(len(matrices))
    for i, norm in enumerate(norms):
        if norm == 0:
            found[i] = math.inf
        elif spectral[i] > 0 and growth[i] <= slack * norm:
            found[i] = _contraction(matrices[i], tableau, slack, float(spectral[i]), float(norm))
    return found


def _contraction(
    jacobian: Matrices, tableau: ButcherTableau, slack: float, spectral: float, norm: float
) -> float:
    """The contraction limit of one matrix with μ₂ ≤ 0, up to rounding, and a positive spectral limit."""
    unit = jacobian / norm
    adjoint = unit.conj().T
    if stability_properties(tableau).a_stable or np.linalg.norm(unit @ adjoint - adjoint @ unit) <= slack:
        return spectral
    if tableau.recurrence is not None and len(tableau.b) > EXACT_UP_TO:
        return _contraction_by_values(unit, tableau, slack, min(spectral * norm, _FAR)) / norm
    matrices = _defect(unit, tableau)
    start, width = 0.0, 1.0
    while start < 1e12:
        found = _first_exit(matrices, start, start + width, slack)
        if found is not None:
            return min(found / norm, spectral) if found > 1e3 * slack else 0.0
        start, width = start + width, 2 * width
    return spectral


def _contraction_by_values(
    jacobian: Matrices, tableau: ButcherTableau, slack: float, spectral: float
) -> float:
    """The first h at which ‖R(hJ)‖₂ exceeds 1: between looks as dense as R's extrema, then by halving."""
    one = np.eye(len(jacobian), dtype=jacobian.dtype)
    allowed = 1 + len(tableau.b) * slack

    def grows(h: float) -> bool:
        return bool(
            np.linalg.norm(stability_product(tableau, lambda x: h * (jacobian @ x), one), 2) > allowed
        )

    looks = 4 * len(tableau.b)
    low = 0.0
    for high in spectral * (1 - np.cos(np.linspace(0, np.pi, looks + 1)[1:])) / 2:
        if grows(high):
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (low, middle) if grows(middle) else (middle, high)
            return float(low)
        low = high
    return spectral


def _defect(unit: Matrices, tableau: ButcherTableau) -> list[Matrices]:
    """W_0, W_1, … of W(h) = (P*P − Q*Q)/h, hermitian."""
    size = len(unit)
    parts = stability_coefficients(tableau)
    powers = [np.eye(size, dtype=unit.dtype)]
    for _ in range(max(map(len, parts)) - 1):
        powers.append(powers[-1] @ unit)
    terms = [np.zeros_like(unit) for _ in range(2 * len(powers) - 1)]
    for weight, part in zip((1.0, -1.0), parts, strict=True):
        for k, c in enumerate(part):
            column = weight * float(c) * powers[k]
            for j, d in enumerate(part):
                terms[j + k] += float(d) * (powers[j].conj().T @ column)
    return [(w + w.conj().T) / 2 for w in terms[1:]]


def _first_exit(matrices: list[Matrices], start: float, stop: float, slack: float) -> float | None:
    """The first h in [start, stop] beyond which λ_max(W) > slack, or None; leftmost cells first."""
    stack = np.stack(matrices)
    degree = len(stack) - 1

    def excess(h: float) -> float:  # λ_max(W(h)) − slack
        return float(np.linalg.eigvalsh(np.tensordot(h ** np.arange(degree + 1), stack, 1))[-1]) - slack

    def proven(a: float, b: float) -> bool:
        coefficients = np.tensordot(bernstein_matrix(degree, a, b), stack, 1)
        return all(_below(c, slack) for c in coefficients[::-1])

    cells, found = [(start, stop)], None
    while cells:
        a, b = cells.pop()
        if proven(a, b):
            continue
        if excess(b) > 0:  # an exit lies in this cell: nothing beyond it matters
            root = (
                scipy.optimize.root_scalar(excess, bracket=(a, b), xtol=1e-14 * b) if excess(a) < 0 else None
            )
            found = a if root is None else float(root.root)
            b, cells = found, []
            if b - a <= max(1e-11 * b, slack) or proven(a, b * (1 - 1e-11)):
                continue
        if b - a > max(1e-12 * b, slack):
            middle = (a + b) / 2
            cells += [(middle, b), (a, middle)]
    return found


def _below(hermitian: Matrices, slack: float) -> bool:
    """Whether λ_max ≤ slack, by Cholesky's factorization."""
    try:
        np.linalg.cholesky(slack * np.eye(len(hermitian)) - hermitian)
    except np.linalg.LinAlgError:
        return False
    return True


@dataclass(frozen=True, eq=False, repr=False)
class TransientGrowth(Result):
    """How powers of one step's matrix grow before they decay.

    For a batch, `peak`, `peak_step` and `complete` have the batch's shape and `norms` one more dimension.

    Args:
        method: the method's name.
        step_size: η.
        norms: ‖R(ηJ)ⁿ‖₂ for n = 0, 1, …, n_steps.
        peak: the largest of them.
        peak_step: the n at which it occurs.
        complete: whether no later power can exceed the peak, because some power n ≥ 1 in range has norm ≤ 1.
    """

    method: str
    step_size: float
    norms: Any
    peak: Any
    peak_step: Any
    complete: Any

    def plot(self, path: str | None = None) -> Any:
        """Draw the norms over n; see `resode.plots.transient_growth`."""
        from resode import plots

        return plots.transient_growth(self, path)


@checked
def transient_growth(
    jacobian: Any, step_size: float, method: str | ButcherTableau = "euler", *, n_steps: int = 100
) -> TransientGrowth:
    r"""‖R(ηJ)ⁿ‖₂ for n = 0 … n_steps, and their peak.

    Args:
        jacobian: J (1/time), tensor, array or scipy sparse matrix, shape (n, n) or (…, n, n).
        step_size: η > 0.
        method: a name in METHODS, or a tableau.
        n_steps: the last power.

    Returns:
        TransientGrowth; inf where a power overflows.

    Raises:
        TypeError, ValueError: as `checked_matrices`; a step size that is not positive; n_steps below 1; an
            implicit method at a step where R has a pole.

    Source:
        Trefethen & Embree, Spectra and Pseudospectra (2005), chapter 14.

    Example:
        >>> growth = transient_growth([[-1.0, 10.0], [0.0, -2.0]], 0.1)
        >>> round(growth.peak, 4), growth.peak_step, growth.complete
        (2.7569, 6, True)
    """
    values, _ = checked_matrices(jacobian)
    tableau = get_tableau(method)
    check_number("step_size", step_size, above=0)
    check_whole("n_steps", n_steps, 1)
    step = _step_matrix(values * step_size, tableau)
    norms, power = [np.ones(values.shape[:-2])], np.broadcast_to(np.eye(values.shape[-1]), values.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(n_steps):
            power = power @ step
            lost = np.any(~np.isfinite(power), axis=(-1, -2))
            power = np.where(np.expand_dims(lost, (-1, -2)), 0.0, power)
            sizes = np.where(lost | np.isinf(norms[-1]), np.inf, np.linalg.norm(power, 2, axis=(-1, -2)))
            norms.append(sizes)
    path = np.stack(norms, axis=-1)
    shape = path.shape[:-1]
    return TransientGrowth(
        method=tableau.name,
        step_size=step_size,
        norms=like(jacobian, path, path.shape),
        peak=like(jacobian, path.max(axis=-1), shape),
        peak_step=like(jacobian, path.argmax(axis=-1), shape),
        complete=like(jacobian, np.any(path[..., 1:] <= 1, axis=-1), shape),
    )


def _step_matrix(z: Matrices, tableau: ButcherTableau) -> Matrices:
    """R at matrices (…, n, n)."""
    one = np.broadcast_to(np.eye(z.shape[-1], dtype=z.dtype), z.shape)
    if tableau.explicit:
        return stability_product(tableau, lambda x: z @ x, one)
    parts = []
    for part in stability_coefficients(tableau):
        value = float(part[-1]) * one
        for c in part[-2::-1]:
            value = value @ z + float(c) * one
        parts.append(value)
    try:
        return np.linalg.solve(parts[1], parts[0])
    except np.linalg.LinAlgError:
        raise ValueError(
            f"{tableau.name}'s R has a pole at an eigenvalue of ηJ: the stages cannot be solved at this step "
            "size. Change it."
        ) from None
