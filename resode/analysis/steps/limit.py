"""The largest stable step: of a matrix, of eigenvalues, and of a field at states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import scipy  # whose submodules are loaded when first named
import torch

from resode.analysis.steps.matrix_free import BUDGET, field_limit
from resode.analysis.steps.nonnormal import contraction_steps, logarithmic_norms
from resode.jacobian.linearize import check_field, jacobian
from resode.jacobian.matrices import (
    DENSE_LIMIT,
    Matrices,
    all_eigenvalues,
    check_precision,
    checked_matrices,
    spectral_norms,
)
from resode.stability import StepLimit, eigenvalue_step_limit
from resode.stability.limits import checked_spectrum, like, nested
from resode.stability.multistep import EXPLICIT_ADAMS
from resode.stability.rays import Complexes
from resode.tableaus import ButcherTableau, get_tableau

DENSE_STATE = 1024
"""Entries of a state up to which a field's Jacobian is formed, unless told otherwise."""

_LARGE = 256  # rows from which all singular vectors cost too much for one eigenvalue's


def max_stable_step(
    field_or_jacobian: Any = None,
    x: torch.Tensor | None = None,
    *,
    eigenvalues: Any = None,
    solver: str | ButcherTableau = "euler",
    k: int = 6,
    growth: tuple[int, float] | None = None,
    matrix_free: bool | None = None,
    rtol: float | None = None,
    budget: int = BUDGET,
) -> Any:
    r"""Largest stable step η: sup{h : |R(sλ)| ≤ 1 for all 0 ≤ s ≤ h and every eigenvalue λ of J}.

    Give a Jacobian, eigenvalues, or a field and states at which to linearize it. A network has growing modes
    as a rule, and then the answer is 0: `step_limit` says which they are, and what the rest would allow.

    Args:
        field_or_jacobian: J (1/time), a tensor, array or scipy sparse matrix of shape (n, n) or (…, n, n)
            with up to 4,096 rows; or a field F(x) in eval mode, together with x.
        x: states, shape (batch, *state), where a field is given, of any size.
        eigenvalues: the spectrum, shape (n,) or (…, n): alone, or with its matrix to spare its computation.
        solver: a name in METHODS, or a tableau, or "explicit_adams" (order 4, by its root condition).
        k: eigenvalues that limit the step, and largest ones, to hold on to where J is not formed; without
            effect where it is.
        growth: (N, tol) allows |R|^N ≤ 1 + tol instead of |R| ≤ 1, see `eigenvalue_step_limit`.
        matrix_free: of a field: whether to seek outer eigenvalues by products with J (True), or to form J and
            take all of them (False, up to 4,096 entries a state); None forms J up to 1,024 entries.
        rtol: of a field, matrix-free: relative accuracy of the limit; None for 1e-6 in float64 and 1e-4 in
            float32.
        budget: of a field, matrix-free: products a sample; beyond it a RuntimeWarning tells that a limit did
            not converge, and the limit is an upper bound.

    Returns:
        A float for one matrix or spectrum; for a batch of shape (…) an array, a tensor where a tensor came;
        for a field a tensor (batch,). 0 where a mode grows at every small step, inf where nothing limits it.

    Raises:
        TypeError: integer matrices, an x that is no floating-point tensor, a field without x or an x without
            a field.
        ValueError: matrices not square, empty or not finite; an unknown solver; states that are too large;
            fields that cannot be linearized (`resode.jacobian.linearize.check_field`); an implicit method
            where J is not formed; matrix_free, rtol or budget without a field; a dtype too coarse for so
            many rows, such as bfloat16 with more than a dozen.

    Example:
        >>> max_stable_step(torch.diag(torch.tensor([-2.0, -5.0])))
        0.4
        >>> max_stable_step(eigenvalues=[-2, -5], solver="rk4")
        0.5570587126810563
        >>> max_stable_step(torch.sin, torch.tensor([[0.0], [3.1416]]))  # slopes 1 and −1
        tensor([0., 2.])
    """
    arguments = (field_or_jacobian, x, eigenvalues, solver, k, growth, matrix_free, rtol, budget)
    return _limit(*arguments, details=False).step


def step_limit(
    field_or_jacobian: Any = None,
    x: torch.Tensor | None = None,
    *,
    eigenvalues: Any = None,
    solver: str | ButcherTableau = "euler",
    k: int = 6,
    growth: tuple[int, float] | None = None,
    matrix_free: bool | None = None,
    rtol: float | None = None,
    budget: int = BUDGET,
) -> StepLimit:
    r"""The largest stable step with all that it rests on; arguments and errors as `max_stable_step`.

    Eigenvalues are compared with τ = n·ε·‖J‖₂, ε that of the dtype that came: |λ| ≤ τ counts as 0, |Re λ| ≤ τ
    as on the imaginary axis, and Re λ > τ as growing. For a matrix the contraction limit and the logarithmic
    norm stand beside the spectral limit, because eigenvalues alone do not bound what a non-normal matrix
    does for a while.

    Returns:
        StepLimit; for a batch, and for a field, what it holds has the batch's shape.

    Example:
        >>> limit = step_limit(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), solver="rk4")
        >>> print(limit)
        rk4: stable up to step 2.82843; λ = 0 ± 1i leaves the region first.
        >>> print(step_limit(torch.tensor([[-1.0, 10.0], [0.0, -2.0]])))
        euler: stable up to step 1; λ = -2 leaves the region first.
          Some perturbations grow for a while at any step, because J is not normal (logarithmic norm 3.52494).
    """
    arguments = (field_or_jacobian, x, eigenvalues, solver, k, growth, matrix_free, rtol, budget)
    return _limit(*arguments, details=True)


def _limit(
    subject: Any,
    x: Any,
    eigenvalues: Any,
    solver: Any,
    k: int,
    growth: Any,
    matrix_free: bool | None,
    rtol: float | None,
    budget: int,
    *,
    details: bool,
) -> StepLimit:
    """Which of the ways to a step limit the arguments ask for."""
    if solver == EXPLICIT_ADAMS:
        return _of_adams(subject, x, eigenvalues, growth)
    tableau = get_tableau(solver)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}.")
    is_field = callable(subject) and not isinstance(subject, torch.Tensor)
    if not is_field and (matrix_free is not None or rtol is not None or budget != BUDGET):
        raise ValueError(
            "matrix_free, rtol and budget go with a field: of a matrix all eigenvalues are taken."
        )
    if subject is None and eigenvalues is None:
        raise ValueError(
            "give a Jacobian, eigenvalues=, or a field and the states x at which to linearize it; got none."
        )
    if subject is None:
        if x is not None:
            raise TypeError("x goes with a field; with eigenvalues= alone there is nothing to linearize.")
        return eigenvalue_step_limit(eigenvalues, tableau, growth=growth)
    if is_field:
        if eigenvalues is not None:
            raise TypeError(
                "give a field and x, or eigenvalues=, not both: a field has a spectrum at each x."
            )
        if x is None:
            raise TypeError("a field needs the states x, shape (batch, *state), at which to linearize it.")
        return _of_field(subject, x, tableau, k, growth, matrix_free, rtol, budget, details=details)
    if x is not None:
        raise TypeError(
            f"x goes with a field, and {type(subject).__name__} is not callable. "
            "Pass the Jacobian alone, or a callable F."
        )
    return _of_matrices(subject, eigenvalues, tableau, growth, details=details)


def _of_adams(subject: Any, x: Any, eigenvalues: Any, growth: Any) -> StepLimit:
    """By the root condition at all eigenvalues: given, or of a matrix, or of a field's Jacobian at x."""
    if eigenvalues is None and subject is None:
        raise ValueError(
            "give a Jacobian, eigenvalues=, or a field and the states x at which to linearize it; got none."
        )
    if eigenvalues is None:
        if x is not None:
            check_field(subject, x)
            subject = jacobian(subject, x)
        eigenvalues = torch.linalg.eigvals(torch.as_tensor(subject))
    return eigenvalue_step_limit(eigenvalues, EXPLICIT_ADAMS, growth=growth)


def _of_field(
    field: Any,
    x: torch.Tensor,
    tableau: ButcherTableau,
    k: int,
    growth: Any,
    matrix_free: bool | None,
    rtol: float | None,
    budget: int,
    *,
    details: bool,
) -> StepLimit:
    """From all eigenvalues where a state is small, else from the outer ones."""
    if rtol is not None and not (isinstance(rtol, (int, float)) and 0 < rtol < 1):
        raise ValueError(f"rtol must be a number between 0 and 1, got {rtol!r}.")
    if matrix_free not in (None, True, False):
        raise ValueError(f"matrix_free must be True, False or None, got {matrix_free!r}.")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget must be a whole number of products, at least 1, got {budget!r}.")
    check_field(field, x)
    size = x[0].numel()
    if matrix_free is None:
        matrix_free = size > DENSE_STATE
    if not matrix_free:
        if size > DENSE_LIMIT:
            raise ValueError(
                f"a Jacobian is formed for states of up to {DENSE_LIMIT} entries, got {size} in x "
                f"{tuple(x.shape)}. Leave matrix_free=False out."
            )
        return _of_matrices(jacobian(field, x), None, tableau, growth, details=details)
    return field_limit(field, x, tableau, k=k, growth=growth, rtol=rtol, budget=budget, details=details)


def _of_matrices(
    subject: Any, eigenvalues: Any, tableau: ButcherTableau, growth: Any, *, details: bool
) -> StepLimit:
    """The limit of J of shape (…, n, n), with what eigenvalues do not tell if `details` are wanted."""
    values, eps = checked_matrices(subject)
    shape, n = values.shape[:-2], values.shape[-1]
    check_precision(n * eps, n, eps)
    flat = values.reshape(-1, n, n)
    if eigenvalues is None:
        spectrum = all_eigenvalues(flat)
    else:
        spectrum = _own_spectrum(eigenvalues, values).reshape(-1, n)
    norms = spectral_norms(flat)
    tau = n * eps * norms[:, None]  # what a backward stable routine may move a normal matrix's eigenvalue by
    limit = eigenvalue_step_limit(spectrum, tableau, tolerance=tau, growth=growth)
    fields = {
        name: getattr(limit, name)
        for name in ("step", "limiting_eigenvalue", "decaying_step", "converged", "decaying_converged")
    }
    if details:
        pairs = zip(flat, limit.limiting_eigenvalue, strict=True)
        fields["residual"], fields["condition"] = np.array([_residual_and_condition(*p) for p in pairs]).T
        spectral = limit if growth is None else eigenvalue_step_limit(spectrum, tableau, tolerance=tau)
        growth_rates = fields["logarithmic_norm"] = logarithmic_norms(flat)
        fields["contraction_step"] = contraction_steps(flat, tableau, eps, spectral.step, norms, growth_rates)
    return replace(
        limit,
        intervals=nested(limit.intervals, shape),
        growing=nested([like(subject, g, g.shape) for g in limit.growing], shape),
        **{name: like(subject, value, shape) for name, value in fields.items()},
    )


def _own_spectrum(eigenvalues: Any, values: Matrices) -> Complexes:
    """Given eigenvalues, after a check that they can be the matrices' own."""
    spectrum, eps = checked_spectrum(eigenvalues)
    if spectrum.shape != values.shape[:-1]:
        raise ValueError(
            f"a matrix of shape {values.shape} has eigenvalues of shape {values.shape[:-1]}, "
            f"got {spectrum.shape}."
        )
    near = eps**0.5 * float(np.abs(values).sum(axis=-1).max())  # of ‖J‖, at least
    if not np.iscomplexobj(values):
        distance = np.abs(spectrum[..., :, None] - spectrum.conj()[..., None, :]).min(axis=-1)
        if (distance > near).any():
            lonely = spectrum[distance > near][0]
            raise ValueError(
                f"the eigenvalues of a real matrix come in conjugate pairs: {lonely:.6g} stands without its "
                "conjugate. Pass the whole spectrum, or a complex matrix."
            )
    trace = np.trace(values, axis1=-2, axis2=-1)
    if (np.abs(spectrum.sum(axis=-1) - trace) > near * values.shape[-1]).any():
        raise ValueError(
            "the eigenvalues given are not the matrix's own: their sum differs from its trace. "
            "Leave eigenvalues out, or leave the matrix out."
        )
    return spectrum


def _residual_and_condition(matrix: Matrices, eigenvalue: complex) -> tuple[float, float]:
    """‖Jv − λv‖₂ and 1/|w*v| for unit right and left eigenvectors v and w.

    They are the singular vectors of J − λI to its smallest singular value. Of an eigenvalue with several
    eigenvectors, the same between the subspaces that those span.
    """
    if np.isnan(eigenvalue):
        return float("nan"), float("nan")
    n = len(matrix)
    scale = float(np.linalg.norm(matrix)) or 1.0
    shifted = matrix - (eigenvalue if eigenvalue.imag else eigenvalue.real) * np.eye(n)
    if n > _LARGE:
        left, right = _inverse_iteration(shifted, scale)
        if np.isfinite(left).all() and np.isfinite(right).all():
            overlap = float(np.abs(np.vdot(left, right)))
            return float(np.linalg.norm(shifted @ right)), _inverse(overlap)
    left, sizes, right = np.linalg.svd(shifted)
    several = max(1, int((sizes <= n * 2.0**-52 * scale).sum()))
    cosines = np.linalg.svd(left[:, -several:].conj().T @ right[-several:].conj().T, compute_uv=False)
    return float(sizes[-1]), _inverse(float(cosines[-1]))


def _inverse(overlap: float) -> float:
    return float(1 / overlap) if overlap > 2.0**-52 else float("inf")


def _inverse_iteration(shifted: Matrices, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit left and right null vectors of J − λI, at a tenth of the cost of all singular vectors.

    Not finite where the solves overflow, as they do for an eigenvalue with a long Jordan chain.
    """
    n = len(shifted)
    factors = scipy.linalg.lu_factor(shifted - 2.0**-50 * scale * np.eye(n), check_finite=False)
    vectors = []
    for transposed in (2, 0):
        v = np.random.default_rng(0).normal(size=n).astype(shifted.dtype)
        with np.errstate(all="ignore"):
            for _ in range(3):
                v = scipy.linalg.lu_solve(factors, v, trans=transposed, check_finite=False)
                v = v / np.linalg.norm(v)
        vectors.append(v)
    return vectors[0], vectors[1]
