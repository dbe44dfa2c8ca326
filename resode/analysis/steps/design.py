"""An explicit method made for a spectrum: the largest step that so many stages can have there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.checks import check_number, check_whole, checked, warn_user
from resode.jacobian.lanczos import largest
from resode.jacobian.linearize import check_field
from resode.jacobian.products import JacobianProducts, full_precision
from resode.jacobian.spectrum import SpectrumOptions, spectrum
from resode.stability.limits import (
    as_counted,
    checked_spectrum,
    eigenvalue_step_limit,
    plain,
    rounding,
)
from resode.stability.optimal import MARGIN, Problem
from resode.stability.spectra import Spectrum
from resode.stability.unstable_rays import Complexes
from resode.tableaus import ButcherTableau

MOST_STAGES = 60
"""That a method is designed with; more cost too long, and rkc1_S and rkc2_S are near the best on the real
axis."""

_SOURCE = "largest stable step for a spectrum, by convex optimisation: Ketcheson & Ahmadia (2012)"
_AROUND = np.exp(0.25j * np.pi * np.arange(8))
_EDGE = np.linspace(0, 1, 9)
_DIRECTIONS = 12  # in the upper half plane, of the lines around a numerical range
_CONE = 0.02  # |Re λ|/|Im λ| that the region ends at
_LANCZOS = 1e-3  # relative residual of their distances from 0
_KNOWN = 1e-3  # of ‖J‖: an error up to which a search's eigenvalue is one


@checked
def design_method(
    eigenvalues: Any, stages: int, order: int = 1, *, x: Tensor | None = None, damping: float = 0.0
) -> ButcherTableau:
    r"""An explicit method whose step limit for a spectrum is as large as its stages allow.

    Of all polynomials R(z) = 1 + z + … + z^p/p! + … of degree s it takes the one with the largest h at which
    |R(rλ)| ≤ 1 for all 0 ≤ r ≤ h and every eigenvalue λ: the first exit, as `step_limit` knows it. Its
    stages follow a three-term recurrence in which rounding does not grow, in float32 neither. Use it
    wherever a method's name is taken; the step is `max_stable_step(eigenvalues=…, solver=method)`.

    Args:
        eigenvalues: λ (1/time), shape (n,), or (…, n) for several spectra that one method is to serve;
            tensor, array or sequence, with conjugates or without. Or a field F(x), together with x.
        stages: s, the evaluations of the field in a step, from 1 to 60.
        order: p, up to s. Order 1 or 2 holds for every field; a higher one for linear fields alone, on
            others the method is of order 2 (and a warning says so).
        x: states, shape (batch, *state), at which a field is linearized. Where a state is too large for all
            of its eigenvalues, those are taken that a Krylov space resolves, and for all others the left
            half of the numerical range, in which they must lie.
        damping: |R| ≤ 1 − damping away from 0, instead of 1, so that stiff modes die out and nearby
            eigenvalues are held too; for a little of the step. 0.05 is common.

    Returns:
        The tableau, named "designed_S" or, with an order above 1, "designedP_S".

    Raises:
        ValueError: eigenvalues that grow (Re λ > 0), on which no step is stable; a spectrum that no method
            of so many stages holds, as the imaginary axis with one stage; all eigenvalues 0; stages, order
            or damping out of range; a field that cannot be linearized.
        TypeError: eigenvalues that are no numbers; a field without x, or x without a field.

    Source:
        Ketcheson & Ahmadia, Commun. Appl. Math. Comput. Sci. 7 (2012).

    Example:
        >>> import resode
        >>> method = resode.design_method([-1.0], stages=5)   # the negative axis: 2 s²
        >>> round(resode.max_stable_step(eigenvalues=[-1.0], solver=method), 3)
        50.0
        >>> circle = -1 + np.exp(1j * np.linspace(0.1, 6.2, 40))
        >>> round(resode.max_stable_step(eigenvalues=circle, solver=resode.design_method(circle, 4)), 2)
        4.0
    """
    stages = check_whole("stages", stages, 1)
    if stages > MOST_STAGES:
        raise ValueError(
            f"a method is designed with 1 to {MOST_STAGES} stages, got {stages}. Take several steps of "
            f"fewer, or on the negative real axis rkc1_{stages} or rkc2_{stages}."
        )
    order = check_whole("order", order, 1)
    if order > stages:
        raise ValueError(f"order {order} takes at least {order} stages, got {stages}. Give more stages.")
    damping = check_number("damping", damping, least=0)
    if damping > 0.5:
        raise ValueError(f"damping is the share from 0 to 0.5 that |R| stays below 1 by, got {damping}.")
    given = _values(eigenvalues, x)
    counted = _counted(given)
    size = float(np.abs(counted).max(initial=0.0))
    if size == 0:
        raise ValueError("all eigenvalues are 0: nothing limits the step, and any method serves. Take euler.")
    if order > 2:
        warn_user(
            f"order {order} of a designed method holds for linear fields alone; on others it is of order 2."
        )
    upper = np.unique((counted.real + 1j * np.abs(counted.imag))[counted != 0] / size)
    name = f"designed_{stages}" if order == 1 else f"designed{order}_{stages}"
    source = _SOURCE if order < 3 else f"{_SOURCE}; order {order} on linear fields"
    margin = max(MARGIN, damping)
    for attempt in range(4):
        problem = Problem(upper, stages, order, margin * 4**attempt)
        found = problem.largest()
        if found is None:
            break
        tableau = problem.tableau(*found, name, source)
        step = float(eigenvalue_step_limit(counted, tableau, tolerance=0).step) * size
        if step >= 0.99 * found[0]:
            return tableau
    raise ValueError(_unheld(counted, stages, order))


def _counted(given: tuple[Complexes, float]) -> Complexes:
    """Eigenvalues (n,) as `eigenvalue_step_limit` counts them, none of them growing."""
    values, eps = given
    tau = rounding(values.shape[-1], eps) * np.abs(values).max(axis=-1, keepdims=True)
    growing = values.real > tau
    if growing.any():
        fastest = values[growing][values[growing].real.argmax()]
        raise ValueError(
            f"no method holds eigenvalues that grow: {int(growing.sum())} of {values.size} have Re λ > 0, "
            f"fastest λ = {fastest:.6g}. Leave them out (eigenvalues[eigenvalues.real <= 0]): what grows "
            "with the equation itself is no matter of the step."
        )
    return as_counted(values, np.broadcast_to(tau, values.shape)).reshape(-1)


def _unheld(values: Complexes, stages: int, order: int) -> str:
    axis = values[(values.real == 0) & (values != 0)]
    lines = f"no method of {stages} stages and order {order} is stable on this spectrum at any step"
    if len(axis):
        return (
            f"{lines}: λ = {axis[np.abs(axis).argmax()]:.6g} lies on the imaginary axis, which asks for more "
            f"stages than the order. Give at least {order + 1} stages."
        )
    worst = values[np.abs(values) > 0]
    worst = worst[(np.abs(worst.real) / np.abs(worst)).argmin()]
    return (
        f"{lines} worth the name: λ = {worst:.6g} has |Re λ|/|λ| = {abs(worst.real) / abs(worst):.2g}. Give "
        "more stages, or take an implicit method."
    )


def _values(eigenvalues: Any, x: Tensor | None) -> tuple[Complexes, float]:
    """The eigenvalues, and the spacing of the dtype they came in."""
    if not callable(eigenvalues) or isinstance(eigenvalues, Tensor):
        if x is not None:
            raise TypeError("x goes with a field; eigenvalues are complete without it. Leave x out.")
        return checked_spectrum(eigenvalues)
    if x is None:
        raise TypeError("a field needs the states x, shape (batch, *state), at which to linearize it.")
    field: Any = eigenvalues
    check_field(field, x)
    found = spectrum(field, x, SpectrumOptions(check=False))
    rows = [_known(found, i) for i in range(len(x))]
    for i in np.flatnonzero(~plain(found.complete)):
        rows[i] = np.concatenate([rows[i], _unresolved(field, x[i : i + 1])])
    return np.concatenate(rows), found.eps


def _known(found: Spectrum, i: int) -> Complexes:
    """The eigenvalues of one sample that are known; where all are, with those that their errors allow."""
    values, errors, tau = found.values[i], found.errors[i], float(found.tau[i].max())
    if not plain(found.complete)[i]:
        return values[np.isfinite(values) & (errors <= _KNOWN * found.scale[i])]
    open_ = (errors > tau) & (values.real < -tau)
    moved = values[open_, None] + np.minimum(errors, found.scale[i])[open_, None] * _AROUND
    moved = np.minimum(moved.real, values[open_, None].real / 4) + 1j * moved.imag  # none comes to the axis
    return np.concatenate([values, moved.reshape(-1)])


def _unresolved(field: Any, x: Tensor) -> Complexes:
    """Points around all eigenvalues of one sample's J with Re λ ≤ 0: around its numerical range.

    The range is convex and holds every eigenvalue; it lies where Re(e^{−iφ}λ) is at most the largest
    eigenvalue of the hermitian part of e^{−iφ}J. Some φ make a polygon, whose upper half is given. Of what
    lies within a degree of the imaginary axis, which would ask for more than eigenvalues beside it do,
    those count that were found.
    """
    n = x[0].numel()
    wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    start = torch.randn(1, 2 * n, generator=torch.Generator().manual_seed(29), dtype=wide).to(x.device)
    angles, supports = np.pi * np.arange(1, _DIRECTIONS + 1) / _DIRECTIONS, []
    with full_precision():
        products = JacobianProducts(field, x)

        def hermitian(v: Tensor, angle: float) -> Tensor:  # cos φ S − i sin φ K, in real and imaginary parts
            re, im = v.split(n, 1)
            (a, b), (c, d) = ((products.jvp(u), products.vjp(u)) for u in (re, im))
            even, odd = np.cos(angle) / 2, np.sin(angle) / 2
            return torch.cat([even * (a + b) + odd * (c - d), even * (c + d) - odd * (a - b)], 1)

        for angle in angles:
            top = largest(lambda v, angle=angle: hermitian(v, angle), start, _LANCZOS, products=96)
            supports.append(max(0.0, float(top.value + top.residual)))
            start = top.vector.to(wide)
    corners = [0j]
    for k in range(_DIRECTIONS - 1):
        normals = np.array([[np.cos(t), np.sin(t)] for t in angles[k : k + 2]])
        re, im = np.linalg.solve(normals, supports[k : k + 2])
        corners.append(complex(min(re, -_CONE * max(im, 0.0)), max(im, 0.0)))
    corners.append(complex(-supports[-1], 0.0))
    ends = np.array(corners)
    ends = np.append(0j, ends[np.abs(ends) > _CONE * np.abs(ends).max()])
    return np.unique((ends[:-1, None] + _EDGE * np.diff(ends)[:, None]).reshape(-1)).astype(np.complex128)
