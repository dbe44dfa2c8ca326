"""Matrices as they come in, checked, and all of their eigenvalues."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.stability.rays import Complexes, Floats

DENSE_LIMIT = 4096
"""Rows of the largest matrix whose eigenvalues are computed densely."""

Matrices = np.ndarray


def checked_matrices(jacobian: Any) -> tuple[Matrices, float]:
    """J as float64 or complex128 of shape (…, n, n), and the spacing of the dtype it came in.

    Args:
        jacobian: tensor, array, nested sequence, or scipy sparse matrix or array.

    Raises:
        TypeError: integers or something that is no matrix.
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
    """Refuse a dtype so coarse that eigenvalues could not be told from 0.

    Args:
        rounding: share of ‖J‖₂ up to which eigenvalues count as 0.
        n: rows of J.
        eps: spacing of its dtype.

    Raises:
        ValueError: the share is a tenth or more, as with bfloat16 and more than a few entries.
    """
    if rounding >= 0.1:
        raise ValueError(
            f"a step limit needs eigenvalues beyond rounding: with {n} rows in a dtype of spacing {eps:.2g} "
            f"all up to {rounding:.2g} ‖J‖ count as 0. Use float32: .float() on the field and on x, or on J."
        )


def _too_large(size: int) -> str:
    return (
        f"eigenvalues of all of a matrix are computed up to {DENSE_LIMIT} rows, got {size}. "
        "Pass the extreme eigenvalues of a larger one as eigenvalues=."
    )


def all_eigenvalues(matrices: Matrices) -> Complexes:
    """Eigenvalues (…, n) of matrices (…, n, n); those of a hermitian matrix have no imaginary part.

    Example:
        >>> all_eigenvalues(np.array([[0.0, 2.0], [-2.0, 0.0]])).imag
        array([ 2., -2.])
    """
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    found = [
        np.linalg.eigvalsh(m) if (m == m.conj().T).all() else np.linalg.eigvals(m)
        for m in flat  # LAPACK takes them one by one as well
    ]
    return np.array(found, dtype=np.complex128).reshape(matrices.shape[:-1])


def spectral_norms(matrices: Matrices) -> Floats:
    """‖J‖₂ (…) of matrices (…, n, n)."""
    return np.asarray(np.linalg.norm(matrices, 2, axis=(-2, -1)), dtype=float)
