"""The largest stable step: of a matrix, of eigenvalues, and of a field at states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from resode.analysis.steps.contraction import contraction_limits
from resode.analysis.steps.nonnormal import contraction_steps, logarithmic_norms
from resode.checks import checked, warn_user
from resode.jacobian.linearize import check_field, jacobian
from resode.jacobian.matrices import DENSE_LIMIT, Matrices, checked_matrices, spectral_norms
from resode.jacobian.spectrum import SpectrumOptions, matrix_spectrum, spectrum
from resode.stability import StepLimit, eigenvalue_step_limit
from resode.stability.limits import checked_spectrum, like, plain
from resode.stability.multistep import EXPLICIT_ADAMS
from resode.stability.spectra import limits
from resode.stability.unstable_rays import Complexes
from resode.tableaus import ButcherTableau, get_tableau

BUDGET = SpectrumOptions.budget


@checked
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
        matrix_free: of a field: whether to seek outer eigenvalues by products with J first (True; J is
            formed, up to 1,024 entries, where they do not decide), or to form J and take all of them (False,
            up to 4,096 entries a state); None forms J up to 1,024 entries.
        rtol: of a field, matrix-free: relative accuracy of the limit; None for 1e-6 in float64 and 1e-4 in
            float32.
        budget: of a field, matrix-free: products a sample; beyond it a RuntimeWarning tells that a limit did
            not converge, and the limit is an upper bound.

    Returns:
        A float for one matrix or spectrum; for a batch of shape (…) an array, a tensor where a tensor came;
        for a field a tensor (batch,). 0 where a mode grows at every small step, inf where nothing limits it.

    Raises:
        TypeError: arrays or tensors of integers, an x that is no floating-point tensor, a field without x or
            an x without a field.
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
    options = SpectrumOptions(k, rtol, budget, growth)
    limit = _limit(field_or_jacobian, x, eigenvalues, solver, options, matrix_free, details=False)
    _warn_if_unknown(limit)
    return limit.step


@checked
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

    Eigenvalues are compared with τ = 8√n·ε·‖J‖₂, ε that of the dtype that came: |λ| ≤ τ counts as 0,
    |Re λ| ≤ τ as on the imaginary axis, and Re λ > τ as growing. A limit is exact to its `error` where
    `converged`; else it is an upper bound, or nothing is known, and the printed line says so. For a matrix
    the contraction limit and the logarithmic norm stand beside the spectral limit, because eigenvalues alone
    do not bound what a non-normal matrix does for a while.

    Args:
        field_or_jacobian: J (1/time) of shape (n, n) or (…, n, n), or a field F(x) in eval mode, with x.
        x: states, shape (batch, *state), where a field is given.
        eigenvalues: the spectrum, shape (n,) or (…, n): alone, or with its matrix.
        solver: a name in METHODS, or a tableau, or "explicit_adams".
        k: eigenvalues to hold on to where J is not formed.
        growth: (N, tol) allows |R|^N ≤ 1 + tol instead of |R| ≤ 1.
        matrix_free: of a field: True seeks outer eigenvalues by products first, False forms J, None decides.
        rtol: of a field, matrix-free: relative accuracy of the limit.
        budget: of a field, matrix-free: products a sample.

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
    options = SpectrumOptions(k, rtol, budget, growth)
    return _limit(field_or_jacobian, x, eigenvalues, solver, options, matrix_free, details=True)


def _warn_if_unknown(limit: StepLimit) -> None:
    """Of a figure that is none, where there is no printed line to say so."""
    if limit.error is None:
        return
    unknown = (
        ~np.asarray(plain(limit.converged)) & np.isinf(plain(limit.error)) & np.asarray(plain(limit.complete))
    )
    if unknown.any():
        warn_user(
            f"no step limit is known in {int(unknown.sum())} of {unknown.size} spectra: eigenvalues are "
            "so ill-conditioned that rounding may have moved them anywhere, and the figure is that of the "
            "eigenvalues as computed. step_limit says more.",
            RuntimeWarning,
        )


def _limit(
    subject: Any,
    x: Any,
    eigenvalues: Any,
    solver: Any,
    options: SpectrumOptions,
    matrix_free: bool | None,
    *,
    details: bool,
) -> StepLimit:
    """Which of the ways to a step limit the arguments ask for."""
    method = EXPLICIT_ADAMS if solver == EXPLICIT_ADAMS else get_tableau(solver)
    is_field = callable(subject) and not isinstance(subject, torch.Tensor)
    if not is_field and (matrix_free is not None or options.rtol is not None or options.budget != BUDGET):
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
        return eigenvalue_step_limit(eigenvalues, method, growth=options.growth)
    if is_field:
        if eigenvalues is not None:
            raise TypeError(
                "give a field and x, or eigenvalues=, not both: a field has a spectrum at each x."
            )
        if x is None:
            raise TypeError("a field needs the states x, shape (batch, *state), at which to linearize it.")
        return _of_field(subject, x, method, options, matrix_free, details=details)
    if x is not None:
        raise TypeError(
            f"x goes with a field, and {type(subject).__name__} is not callable. "
            "Pass the Jacobian alone, or a callable F."
        )
    return _of_matrices(subject, eigenvalues, method, options, details=details)


def _of_field(
    field: Any,
    x: torch.Tensor,
    method: str | ButcherTableau,
    options: SpectrumOptions,
    matrix_free: bool | None,
    *,
    details: bool,
) -> StepLimit:
    """From all eigenvalues where a state is small, else from the outer ones."""
    if matrix_free not in (None, True, False):
        raise ValueError(f"matrix_free must be True, False or None, got {matrix_free!r}.")
    check_field(field, x)
    size = x[0].numel()
    if matrix_free is None:
        matrix_free = size > options.dense_up_to
    if not matrix_free or isinstance(method, str):  # a search needs R(z), which multistep methods have not
        if size > DENSE_LIMIT:
            raise ValueError(
                f"a Jacobian is formed for states of up to {DENSE_LIMIT} entries, got {size} in x "
                f"{tuple(x.shape)}. Leave matrix_free=False out."
            )
        return _of_matrices(jacobian(field, x), None, method, options, details=details)
    found = spectrum(field, x, replace(options, search=True), [method])
    limit = limits(found, method)
    if not details:
        return limit
    rates, contraction = contraction_limits(field, x, method, limit, found)
    return replace(
        limit, logarithmic_norm=like(x, rates, (len(x),)), contraction_step=like(x, contraction, (len(x),))
    )


def _of_matrices(
    subject: Any, eigenvalues: Any, method: str | ButcherTableau, options: SpectrumOptions, *, details: bool
) -> StepLimit:
    """The limit of J of shape (…, n, n), with what eigenvalues do not tell if `details` are wanted."""
    if eigenvalues is not None:
        eigenvalues = _own_spectrum(eigenvalues, checked_matrices(subject)[0])
    found = matrix_spectrum(subject, options, eigenvalues)
    limit = limits(found, method)
    if not details or isinstance(method, str):
        return limit
    values, eps = checked_matrices(subject)
    flat = values.reshape(-1, *values.shape[-2:])
    spectral = limit if found.growth is None else limits(replace(found, growth=None), method)
    rates = logarithmic_norms(flat)
    steps = np.asarray(plain(spectral.step), dtype=float).reshape(-1)
    contraction = contraction_steps(flat, method, eps, steps, spectral_norms(flat), rates)
    return replace(
        limit,
        logarithmic_norm=like(subject, rates, found.shape),
        contraction_step=like(subject, contraction, found.shape),
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
