"""The largest stable step of a spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.stability.intervals import Interval, ray_polynomials
from resode.stability.multistep import EXPLICIT_ADAMS, AdamsRays
from resode.stability.pruning import binding
from resode.stability.rays import Complexes, RayPolynomials, complement
from resode.tableaus import ButcherTableau, get_tableau

_MANY = 4096  # eigenvalues beyond which those that cannot bind are sorted out first
_CHUNK = 65536  # rays at a time
_EPS = 2.0**-52


@dataclass(frozen=True, eq=False)
class StepLimit:
    """The largest stable step, and what it rests on.

    For a batch every number is an array (a tensor, where a tensor came in) of the batch's shape, `intervals`
    a nested list of that shape, and `growing` a nested list of arrays.

    Args:
        step: sup{h : |R(sλ)| ≤ 1 for all 0 ≤ s ≤ h and every λ}; 0 if a mode grows at any step, inf if
            nothing limits it.
        limiting_eigenvalue: the λ that leaves the region first, as it was counted (τ); of a conjugate pair
            the one above the real axis, of growing modes the fastest; nan where the step is inf.
        intervals: every interval (start, stop) of steps that are stable for the whole spectrum.
        growing: eigenvalues with Re λ > τ, fastest first: modes that x' = Jx itself amplifies.
        decaying_step: the step limit over all the others.
        contraction_step: sup{h : ‖R(sJ)‖₂ ≤ 1 for all 0 ≤ s ≤ h}, below which no perturbation grows even
            for a while; None if only eigenvalues are known.
        residual: ‖Jv − λv‖₂ of the limiting eigenvalue and its unit eigenvector v; None if not known.
        condition: condition number 1/|w*v| of the limiting eigenvalue, w and v its unit left and right
            eigenvectors: a change of J by ε moves it by up to condition·ε. None if not known.
        converged: whether the eigenvalues it rests on were found to tolerance (always so for dense ones).
        method: the method's name.
        decaying_converged: whether `decaying_step` is known; where not, it is an upper bound.
        error: relative error of `decaying_step`, as far as the eigenvalue's condition and residual tell;
            None where all eigenvalues were computed. Else `growing` lists those modes that were found.
        logarithmic_norm: μ₂(J) = λ_max((J + J*)/2), the fastest growth of ‖x‖ at any moment; None as above.
    """

    step: Any
    limiting_eigenvalue: Any
    intervals: list[Any]
    growing: Any
    decaying_step: Any
    contraction_step: Any = None
    residual: Any = None
    condition: Any = None
    converged: Any = True
    method: str = ""
    logarithmic_norm: Any = None
    decaying_converged: Any = True
    error: Any = None

    def __str__(self) -> str:
        steps = _plain(self.step)
        if steps.ndim:
            return self._summary(steps)
        lines = []
        count = len(self.growing)
        least = "" if self.error is None else "at least "
        if math.isinf(self.step):
            lines.append(f"{self.method}: stable at every step size.")
        elif self.step > 0:
            lines.append(
                f"{self.method}: stable up to step {self.step:.6g}; "
                f"λ = {_show(self.limiting_eigenvalue)} leaves the region first."
            )
        elif count:
            lines.append(
                f"{self.method}: no small step is stable: {least}{count} "
                f"{'mode grows' if count == 1 else 'modes grow'} with the equation itself, "
                f"fastest λ = {_show(self.limiting_eigenvalue)}."
            )
            if math.isfinite(self.decaying_step):
                others = "it" if count == 1 else "them"
                bound = "" if self.decaying_converged else "at most "
                lines.append(f"  Without {others} the limit would be {bound}{self.decaying_step:.6g}.")
        else:
            lines.append(
                f"{self.method}: no small step is stable, because λ = {_show(self.limiting_eigenvalue)} "
                "lies on the imaginary axis, of which the method's region holds no segment at 0."
            )
        further = [pair for pair in self.intervals if pair[0] > 0]
        if further:
            shown = ", ".join(f"[{a:.6g}, {b:.6g}]" for a, b in further[:4])
            lines.append(f"  Stable again for steps in {shown}{', …' if len(further) > 4 else ''}.")
        if self.contraction_step == 0 and self.step > 0:
            lines.append(
                "  Some perturbations grow for a while at any step, because J is not normal "
                f"(logarithmic norm {self.logarithmic_norm:.6g})."
            )
        elif self.contraction_step is not None and self.contraction_step < self.step * (1 - 1e-9):
            lines.append(
                f"  Some perturbations grow for a while at steps above {self.contraction_step:.6g} "
                "(contraction limit), because J is not normal "
                f"(logarithmic norm {self.logarithmic_norm:.6g})."
            )
        if not self.converged:
            lines.append("  Not converged: an eigenvalue that limits the step further may be missing.")
        return "\n".join(lines)

    def _summary(self, steps: np.ndarray) -> str:
        decaying = _plain(self.decaying_step)
        unstable = int((steps == 0).sum())
        lines = [
            f"{self.method}, {steps.size} spectra: stable up to step {steps.min():.6g} in all of them, "
            f"{np.median(steps):.6g} in half, {steps.max():.6g} at most."
        ]
        if unstable:
            worst: Complexes = _plain(self.limiting_eigenvalue)[steps == 0]
            where = f"in {unstable}" if unstable < steps.size else "in any of them"
            reason = (
                f"no small step is stable {where}, fastest λ = {_show(worst[worst.real.argmax()])}; "
                f"without growing modes: {decaying.min():.6g} in all, {np.median(decaying):.6g} in half."
            )
            if unstable < steps.size:
                lines.append(f"  N{reason[1:]}")
            else:
                lines = [f"{self.method}, {steps.size} spectra: {reason}"]
        open_ended = int((~_plain(self.decaying_converged) & np.ones(steps.shape, dtype=bool)).sum())
        if unstable and open_ended:
            lines.append(f"  Without growing modes it is an upper bound in {open_ended}.")
        missing = int((~_plain(self.converged)).sum())
        if missing:
            lines.append(f"  {missing} not converged.")
        return "\n".join(lines)


def _show(value: Any) -> str:
    value = complex(value)
    if value.imag == 0:
        return f"{value.real:.6g}"
    return f"{value.real:.6g} {'±' if value.imag > 0 else '-'} {abs(value.imag):.6g}i"


def eigenvalue_step_limit(
    eigenvalues: Any,
    method: str | ButcherTableau = "euler",
    *,
    tolerance: Any = None,
    growth: tuple[int, float] | None = None,
) -> StepLimit:
    r"""The first exit from the stability region: sup{h : |R(sλ)| ≤ 1 for all 0 ≤ s ≤ h and every λ}.

    Rounding of the spectrum must not decide. With the tolerance τ, |λ| ≤ τ counts as 0 and limits
    nothing, and |Re λ| ≤ τ counts as on the imaginary axis. Re λ > τ gives the step 0, however large a later
    interval is. |R| = 1 counts as stable.

    Args:
        eigenvalues: λ (1/time), real or complex, conjugate pairs or not; tensor, array or sequence,
            shape (n,), or (…, n) for a batch of spectra.
        method: a name in METHODS, or a tableau; explicit or implicit; or "explicit_adams", by the root
            condition of the Adams-Bashforth method of order 4.
        tolerance: τ in the units of λ, a number or an array that broadcasts to the eigenvalues. None:
            8·√n·ε·max|λ| with ε that of the eigenvalues' dtype, a few times what a backward stable routine
            leaves in n eigenvalues. 0 takes them as exact.
        growth: (N, tol) asks for |R|^N ≤ 1 + tol instead of |R| ≤ 1: what N steps may amplify. Weak
            instabilities, as of dopri8 on the imaginary axis, matter only over many steps. A mode with
            Re λ > τ then has a (small) step of its own.

    Returns:
        StepLimit; floats for one spectrum, arrays or tensors (of the real dtype that came) for a batch.

    Raises:
        ValueError: no eigenvalues, not finite ones, an unknown method, a negative tolerance or growth.
        TypeError: eigenvalues that are not numbers.

    Example:
        >>> limit = eigenvalue_step_limit([-5, -0.1 + 2j, -0.1 - 2j])
        >>> limit.step, limit.limiting_eigenvalue  # −5 alone would allow 0.4
        (0.04987531172069826, (-0.1+2j))
        >>> print(eigenvalue_step_limit([0.01 + 1j, 0.01 - 1j, -4], "rk4"))
        rk4: no small step is stable: 2 modes grow with the equation itself, fastest λ = 0.01 ± 1i.
          Without them the limit would be 0.696323.
    """
    values, eps = checked_spectrum(eigenvalues)
    allowed, adams = allowed_growth(growth), method == EXPLICIT_ADAMS
    rays = AdamsRays(math.sqrt(allowed)) if adams else ray_polynomials(get_tableau(method), allowed)
    shape, n = values.shape[:-1], values.shape[-1]
    given: Complexes = values.reshape(-1, n)
    tau = rounding_of_spectrum(values, eps) if tolerance is None else _plain(tolerance)
    if not (tau >= 0).all():
        raise ValueError(f"a tolerance must be at least 0, got {tolerance}.")
    tau = np.broadcast_to(tau, values.shape).reshape(given.shape)
    growing = given.real > tau
    lam = as_counted(given, tau)
    if n <= _MANY or isinstance(rays, AdamsRays):
        exits, intervals = _exits(rays, lam)
    else:
        parts = [_exits_of_many(rays, *row) for row in zip(lam, growing, strict=True)]
        exits, intervals = np.stack([p[0] for p in parts]), [p[1] for p in parts]
    step = exits.min(axis=1)
    # Of those that allow no step at all the worst: the fastest growth, else the fastest oscillation.
    fastest = np.where(growing, given.real, -np.inf).argmax(axis=1)
    fastest = np.where(
        growing.any(axis=1), fastest, np.where(lam.real == 0, np.abs(lam), -1.0).argmax(axis=1)
    )
    first = np.where(step == 0, fastest, exits.argmin(axis=1))
    limiting = lam[np.arange(len(given)), first]
    paired = (np.abs(given - limiting.conj()[:, None]) <= tau).any(axis=1)
    limiting = np.where(paired & (limiting.imag < 0), limiting.conj(), limiting)
    fast_first = [row[mask][np.argsort(-row[mask].real)] for row, mask in zip(given, growing, strict=True)]
    return StepLimit(
        step=like(eigenvalues, step, shape),
        limiting_eigenvalue=like(eigenvalues, np.where(np.isinf(step), np.nan, limiting), shape),
        intervals=nested(intervals, shape),
        growing=nested([like(eigenvalues, row, row.shape) for row in fast_first], shape),
        decaying_step=like(eigenvalues, np.where(growing, np.inf, exits).min(axis=1), shape),
        converged=like(eigenvalues, np.ones(len(given), dtype=bool), shape),
        decaying_converged=like(eigenvalues, np.ones(len(given), dtype=bool), shape),
        method=EXPLICIT_ADAMS if adams else get_tableau(method).name,
    )


def rounding_of_spectrum(values: Complexes, eps: float) -> np.ndarray:
    """τ = 8·√n·ε·max|λ| of spectra (…, n), shape (…, 1)."""
    return 8 * math.sqrt(values.shape[-1]) * eps * np.abs(values).max(axis=-1, keepdims=True)


def as_counted(values: Complexes, tau: np.ndarray) -> Complexes:
    """Eigenvalues with |λ| ≤ τ set to 0 and those with |Re λ| ≤ τ moved onto the imaginary axis."""
    counted = values.copy()
    counted.real[np.abs(values.real) <= tau] = 0
    counted[np.abs(values) <= tau] = 0
    return counted


def _exits(rays: RayPolynomials | AdamsRays, lam: np.ndarray) -> tuple[np.ndarray, list[list[Interval]]]:
    """First exit of each eigenvalue (B, n), and the stable intervals of each row; λ = 0 has no exit."""
    flat = lam.reshape(-1)
    nonzero = np.flatnonzero(flat)
    parts = [rays.unstable(flat[nonzero[i : i + _CHUNK]]) for i in range(0, len(nonzero), _CHUNK)]
    unstable = np.full((flat.size, max((p.shape[1] for p in parts), default=0) or 1, 2), np.inf)
    for i, part in enumerate(parts):
        unstable[nonzero[i * _CHUNK : (i + 1) * _CHUNK], : part.shape[1]] = part
    unstable = unstable.reshape(*lam.shape, -1, 2)
    return unstable[..., 0, 0], [complement(row) for row in unstable]


def _exits_of_many(
    rays: RayPolynomials, lam: np.ndarray, growing: np.ndarray
) -> tuple[np.ndarray, list[Interval]]:
    """The same for one large spectrum; inf for eigenvalues that bind nowhere."""
    decaying = np.flatnonzero(~growing & (lam != 0))
    chosen = decaying[binding(rays, lam[decaying], [(0.0, math.inf)])]
    stable = _exits(rays, lam[None, chosen])[1][0] if chosen.size else [(0.0, math.inf)]
    rising = np.flatnonzero(growing)
    chosen = np.concatenate([chosen, rising[binding(rays, lam[rising], stable)]])
    exits = np.full(len(lam), np.inf)
    if chosen.size:
        some, intervals = _exits(rays, lam[None, chosen])
        exits[chosen], stable = some[0], intervals[0]
    return exits, stable


def allowed_growth(growth: tuple[int, float] | None) -> Fraction:
    """The bound on |R|² that keeps |R|^N ≤ 1 + tol, accurate in its distance from 1."""
    if growth is None:
        return Fraction(1)
    try:
        steps, tol = growth
    except TypeError:
        raise TypeError(f"growth is a pair (number of steps, tolerance), got {growth!r}.") from None
    if not (isinstance(steps, int) and steps >= 1 and 0 <= tol < math.inf):
        raise ValueError(
            "growth is (N, tol) with an integer N ≥ 1 and a finite tol ≥ 0, asking for |R|^N ≤ 1 + tol; "
            f"got {growth!r}."
        )
    return 1 + Fraction(math.expm1(2 * math.log1p(tol) / steps))


def _plain(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().resolve_conj().resolve_neg().numpy()
    return np.asarray(values)


def checked_spectrum(eigenvalues: Any) -> tuple[Complexes, float]:
    """Checked eigenvalues as complex128 of shape (…, n), and the spacing of the dtype they came in."""
    if isinstance(eigenvalues, Tensor):
        floating = eigenvalues.is_floating_point() or eigenvalues.is_complex()
        eps = torch.finfo(eigenvalues.dtype).eps if floating else _EPS
        wide = torch.complex128 if eigenvalues.is_complex() else torch.float64
        values = _plain(eigenvalues.to(wide))
        numeric = eigenvalues.dtype != torch.bool
    else:
        values = np.asarray(eigenvalues)
        numeric = values.dtype.kind in "iufc"
        eps = max(float(np.finfo(values.dtype).eps), _EPS) if values.dtype.kind in "fc" else _EPS
    if not numeric:
        came = getattr(eigenvalues, "dtype", values.dtype)
        raise TypeError(f"eigenvalues must be real or complex numbers, got {came}.")
    if values.ndim == 0 or values.size == 0:
        raise ValueError(
            f"eigenvalues need shape (n,), or (…, n) for a batch, with n ≥ 1; got {tuple(values.shape)}."
        )
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise ValueError(f"eigenvalues must be finite; {count} of {values.size} are not.")
    return values.astype(np.complex128), eps


def like(origin: Any, values: np.ndarray, shape: tuple[int, ...]) -> Any:
    """Results of shape `shape` in the kind of the input: numbers for one, else arrays or tensors."""
    values = np.asarray(values).reshape(shape)
    if values.ndim == 0:
        return values.item()
    if not isinstance(origin, Tensor):
        return values
    tensor = torch.as_tensor(values)
    dtype = torch.zeros((), dtype=origin.dtype).abs().dtype  # real, of the same precision
    dtype = dtype if dtype in (torch.float32, torch.float64) else torch.get_default_dtype()
    if tensor.is_complex():
        dtype = dtype.to_complex()
    return tensor.to(origin.device, torch.bool if tensor.dtype == torch.bool else dtype)


def nested(items: list[Any], shape: tuple[int, ...]) -> Any:
    """A flat list as nested lists of this shape."""
    if not shape:
        return items[0]
    size = len(items) // shape[0] if shape[0] else 0
    return [nested(items[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]
