"""Matrices as they come in, checked, and all of their eigenvalues."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # whose submodules are loaded when first named
import torch
from torch import Tensor

from resode.jacobian.krylov import norm_estimate
from resode.jacobian.outer import Row
from resode.stability.spectra import ROUNDINGS
from resode.stability.unstable_rays import Complexes, Floats

DENSE_LIMIT = 4096
"""Rows of the largest matrix whose eigenvalues are computed densely."""

Matrices = np.ndarray

_UNSURE = 1e-9  # of ‖J‖: an error in float64 from which balancing is worth more effort
_EVENINGS = 40


def checked_matrices(jacobian: Any) -> tuple[Matrices, float]:
    """J as float64 or complex128 of shape (…, n, n), and the spacing of the dtype it came in.

    It is a tensor, array, nested sequence, or scipy's sparse matrix or array.

    Raises:
        TypeError: an array or tensor of integers, or something that is no matrix.
        ValueError: not square, empty, not finite, or more than DENSE_LIMIT rows.
    """
    if type(jacobian).__module__.startswith("scipy.sparse"):
        size = max(jacobian.shape)
        if size > DENSE_LIMIT:
            raise ValueError(_too_large(size))
        jacobian = jacobian.toarray()
    if isinstance(jacobian, Tensor):
        kind = "f" if jacobian.is_floating_point() else "c" if jacobian.is_complex() else "i"
        eps = torch.finfo(jacobian.dtype).eps if kind in "fc" else 0.0
        values = jacobian.detach().cpu().to(torch.complex128 if kind == "c" else torch.float64)
        values = values.to_dense().resolve_conj().resolve_neg().numpy()
        name = str(jacobian.dtype)
    else:
        values = np.asarray(jacobian)
        if isinstance(jacobian, list | tuple) and values.dtype.kind == "i":
            values = values.astype(np.float64)  # numbers as they are written
        kind, name = values.dtype.kind, str(values.dtype)
        eps = max(float(np.finfo(values.dtype).eps), 2.0**-52) if kind in "fc" else 0.0
        values = values.astype(np.complex128 if kind == "c" else np.float64) if kind in "fc" else values
    if kind not in "fc":
        raise TypeError(
            f"a Jacobian needs real or complex floating-point entries, got {name}. "
            "Convert it, for example with .astype(float) or .to(torch.float64)."
        )
    if values.ndim < 2 or values.shape[-1] != values.shape[-2] or values.size == 0:
        raise ValueError(
            f"a Jacobian must be square and not empty, shape (n, n) or (…, n, n): got {tuple(values.shape)}."
        )
    if values.shape[-1] > DENSE_LIMIT:
        raise ValueError(_too_large(values.shape[-1]))
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise ValueError(f"a Jacobian must be finite; {count} of {values.size} entries are not.")
    return values, eps


def check_precision(rounding: float, n: int, eps: float) -> None:
    """Refuse a dtype so coarse that eigenvalues of a quarter of ‖J‖₂ count as 0: bfloat16 with n > 12."""
    if rounding >= 0.25:
        raise ValueError(
            f"a step limit needs eigenvalues beyond rounding: with {n} rows in a dtype of spacing {eps:.2g} "
            f"all up to {rounding:.2g} ‖J‖ count as 0. Use float32: .float() on the field and on x, or on J."
        )


def _too_large(size: int) -> str:
    return (
        f"eigenvalues of all of a matrix are computed up to {DENSE_LIMIT} rows, got {size}. "
        "Pass the extreme eigenvalues of a larger one as eigenvalues=."
    )


def eigenvalues_with_errors(matrix: Matrices, eps: float) -> Row:
    """All eigenvalues of a matrix (n, n), with their condition numbers and errors.

    The matrix is balanced first, and where that is not enough once more with all care, so that an eigenvalue
    that is ill-conditioned by scales alone is right all the same. Its error is what rounding of J may have
    changed it by, condition times 4ε‖J‖, and what float64 leaves. Eigenvalues of a hermitian matrix have no
    imaginary part; those of a normal one have condition 1.

    Example:
        >>> eigenvalues_with_errors(np.array([[0.0, 2.0], [-2.0, 0.0]]), 2.0**-52).values.imag
        array([ 2., -2.])
    """
    n = len(matrix)
    largest = float(np.abs(matrix).max())
    unit = 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0  # no square of it may overflow
    scaled = matrix / unit
    zeros, ones = np.zeros(n), np.ones(n)
    if (scaled == scaled.conj().T).all():
        values = np.linalg.eigvalsh(scaled).astype(np.complex128)
        scale = float(np.abs(values).max())
        errors = np.full(n, ROUNDINGS * eps * scale)
        return Row(unit * values, unit * errors, zeros, ones, unit * scale, True, True)
    scale = norm_estimate(scaled)
    rounded = ROUNDINGS * eps * scale
    if _is_normal(scaled):
        values = np.linalg.eigvals(scaled).astype(np.complex128)
        return Row(unit * values, np.full(n, unit * rounded), zeros, ones, unit * scale, True, True)
    balanced, (stretch, _) = scipy.linalg.matrix_balance(scaled, permute=False, separate=True)
    found = _eigenpairs(balanced, np.log(stretch))
    if (found.moved > _UNSURE * scale).any():  # in float64, whatever dtype it came in
        better, logs = evened(balanced)
        found = _eigenpairs(better, np.log(stretch) - logs)
    with np.errstate(over="ignore", invalid="ignore"):
        errors = found.conditions * rounded + found.moved
    return Row(
        unit * found.values, unit * errors, unit * found.residuals, found.conditions, unit * scale, True
    )


def _is_normal(matrix: Matrices) -> bool:
    """Whether a matrix commutes with its adjoint, to rounding."""
    adjoint = matrix.conj().T
    apart = float(np.linalg.norm(matrix @ adjoint - adjoint @ matrix))
    return apart <= 2.0**-50 * float(np.linalg.norm(matrix)) ** 2


@dataclass
class _Pairs:
    """Eigenvalues of D⁻¹AD, with the condition numbers that they have in A.

    Args:
        values: λ.
        residuals: ‖Bv − λv‖ of unit eigenvectors of B = D⁻¹AD.
        conditions: 1/|w*v| of unit eigenvectors of A.
        moved: what rounding in float64 has moved the eigenvalues of B by, to first order.
    """

    values: Complexes
    residuals: Floats
    conditions: Floats
    moved: Floats


def _eigenpairs(balanced: Matrices, logs: Floats) -> _Pairs:
    """Eigenvalues and conditions, where `logs` are the logarithms of D."""
    found: Any = scipy.linalg.eig(balanced, left=True, right=True, check_finite=False)
    values, left, right = found
    residuals = np.linalg.norm(balanced @ right - right * values, axis=0)
    overlaps = np.abs((left.conj() * right).sum(axis=0))
    stretch = np.exp(np.clip(logs - logs.mean(), -300, 300))[:, None]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        own = np.linalg.norm(left / stretch, axis=0) * np.linalg.norm(right * stretch, axis=0)
        conditions = np.where(overlaps > 2.0**-52, own / overlaps, np.inf)
        moved = (residuals + 2.0**-52 * norm_estimate(balanced)) / overlaps
    return _Pairs(values.astype(np.complex128), residuals, conditions, moved)


def evened(matrix: Matrices) -> tuple[Matrices, Floats]:
    """D A D⁻¹ of least Frobenius norm over all diagonal D > 0, and log D.

    It takes to a symmetric matrix what a diagonal D took from one, and a triangular matrix to its diagonal,
    where LAPACK's balancing, row by row, stops long before. Σ |a_ij|² e^{2(u_i − u_j)} is convex in
    u = log D, and Newton's step solves a graph's Laplacian.

    Source:
        Osborne, On pre-conditioning of matrices, J. ACM 7 (1960), for what is sought.

    Example:
        >>> evened(np.array([[0.0, 9.0], [4.0, 0.0]]))[0].round(6)
        array([[0., 6.],
               [6., 0.]])
    """
    n = len(matrix)
    u, off = np.zeros(n), ~np.eye(n, dtype=bool) & (matrix != 0)
    for _ in range(_EVENINGS):
        now = matrix * np.exp(np.where(off, u[:, None] - u[None], 0.0))
        squares = np.where(off, np.abs(now) ** 2, 0.0)
        gradient = squares.sum(axis=1) - squares.sum(axis=0)
        if np.abs(gradient).max() <= 1e-6 * (squares.sum() / n + 1e-300):
            break
        sums = squares.sum(axis=1) + squares.sum(axis=0)
        laplacian = np.diag(sums * (1 + 1e-10) + 1e-14 * sums.max()) - squares - squares.T
        step = -scipy.linalg.solve(laplacian, gradient, assume_a="pos", check_finite=False) / 2
        size = float(np.abs(step[:, None] - step[None])[off].max())
        u = u + step * min(1.0, 2.0 / size)
    return matrix * np.exp(np.where(off, u[:, None] - u[None], 0.0)), u


def spectral_norms(matrices: Matrices) -> Floats:
    """‖J‖₂ (…) of matrices (…, n, n)."""
    return np.asarray(np.linalg.norm(matrices, 2, axis=(-2, -1)), dtype=float)
