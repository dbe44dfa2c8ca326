"""The largest stable step of a spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.checks import check_number, check_whole, checked
from resode.results import Result
from resode.stability.binding import binding
from resode.stability.intervals import Interval, rays_of_tableau
from resode.stability.multistep import EXPLICIT_ADAMS, AdamsRays
from resode.stability.recurrences import RecurrenceRays
from resode.stability.unstable_rays import Complexes, RayPolynomials, complement
from resode.tableaus import ButcherTableau, get_tableau

_MANY = 4096  # eigenvalues beyond which those that cannot bind are sorted out first
_CHUNK = 65536  # rays at a time
_EPS = 2.0**-52


@dataclass(frozen=True, eq=False, repr=False)
class StepLimit(Result):
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
        converged: whether `step` is exact to its error. Where not, it is an upper bound; or no bound at all,
            the limit of the eigenvalues as they were computed, where `error` is inf: then rounding may have
            moved them anywhere, as the condition number says, or none has been found yet.
        method: the method's name.
        decaying_converged: the same of `decaying_step`.
        error: relative error of `decaying_step`, as far as the eigenvalues' conditions and residuals tell;
            None for eigenvalues that were given, which count as exact.
        logarithmic_norm: μ₂(J) = λ_max((J + J*)/2), the fastest growth of ‖x‖ at any moment; None as above.
        complete: whether all eigenvalues were computed; else `growing` lists those modes that were found.
        decaying_eigenvalue: the λ that sets `decaying_step`, in the way of `limiting_eigenvalue`.
    """

    _columns = (
        "method",
        "step",
        "decaying_step",
        "limiting_eigenvalue",
        "contraction_step",
        "converged",
        "decaying_converged",
        "condition",
        "error",
    )

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
    complete: Any = True
    decaying_eigenvalue: Any = None

    def __str__(self) -> str:
        steps = plain(self.step)
        if steps.size == 1 and steps.ndim:
            return str(self._only())
        if steps.ndim:
            return self._summary(steps)
        lines = self._verdict()
        further = [pair for pair in self.intervals if pair[0] > 0 and self.converged]
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
        return "\n".join(lines)

    def _only(self) -> StepLimit:
        """The one limit of a batch that holds one."""
        intervals, growing = self.intervals, self.growing
        for _ in plain(self.step).shape:
            intervals, growing = intervals[0], growing[0]
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("intervals", "growing")}
        values: dict[str, Any] = {
            k: v if v is None or isinstance(v, str) else plain(v).item() for k, v in rest.items()
        }
        return StepLimit(intervals=intervals, growing=growing, **values)

    def _verdict(self) -> list[str]:
        """What the step limit is, or what is known of it; and how sure that is."""
        limiting, count = f"λ = {_show(self.limiting_eigenvalue)}", len(self.growing)
        unsure = self.error is not None and math.isinf(self.error)
        if self.step == 0 and count:
            least = "" if self.complete else "at least "
            grow = "mode grows" if count == 1 else "modes grow"
            lines = [
                f"{self.method}: no small step is stable: {least}{count} {grow} with the equation itself, "
                f"fastest {limiting}."
            ]
            if math.isfinite(self.decaying_step):
                others = "it" if count == 1 else "them"
                lines.append(f"  Without {others} the limit would be {self._figure(self.decaying_step)}.")
            return lines
        if self.converged and self.step == 0:
            return [
                f"{self.method}: no small step is stable, because {limiting} "
                "lies on the imaginary axis, of which the method's region holds no segment at 0."
            ]
        if self.converged:
            if math.isinf(self.step):
                return [f"{self.method}: stable at every step size."]
            return [f"{self.method}: stable up to step {self.step:.6g}; {limiting} leaves the region first."]
        if not unsure:
            return [
                f"{self.method}: stable up to a step ≤ {self.step:.6g}, an upper bound from {limiting}: "
                "not converged, an eigenvalue that limits the step further may be missing or within rounding."
            ]
        lines = [
            f"{self.method}: the limit is not known; the eigenvalues as computed would allow "
            f"{self.step:.6g}, which is no bound."
        ]
        if self.complete:
            lines.append(
                f"  They are ill-conditioned: rounding moves {limiting} by up to its condition number "
                f"{self.condition:.3g} times that of J, and others likewise."
            )
        else:
            lines.append("  Not converged: no eigenvalue has been found well enough.")
        return lines

    def _figure(self, value: float) -> str:
        """The limit of the decaying modes: a figure, a bound, or neither."""
        if self.decaying_converged:
            return f"{value:.6g}"
        if self.error is not None and math.isinf(self.error):
            return f"about {value:.6g}, as the eigenvalues were computed (no bound: they are ill-conditioned)"
        return f"≤ {value:.6g} (an upper bound)"

    def _summary(self, steps: np.ndarray) -> str:
        decaying, no = plain(self.decaying_step), np.zeros(steps.shape, dtype=bool)
        none = no if self.error is None else np.isinf(plain(self.error))
        exact, converged = plain(self.decaying_converged) | no, plain(self.converged) | no
        unstable = int((steps == 0).sum())
        sign, slow_sign = ("" if every.all() else "≤ " for every in (converged, exact))
        lines = [
            f"{self.method}, {steps.size} spectra: stable up to step {sign}{steps.min():.6g} in all of them, "
            f"{sign}{np.median(steps):.6g} in half, {sign}{steps.max():.6g} at most."
        ]
        if unstable:
            worst: Complexes = plain(self.limiting_eigenvalue)[steps == 0]
            where = f"in {unstable}" if unstable < steps.size else "in any of them"
            reason = (
                f"no small step is stable {where}, fastest λ = {_show(worst[worst.real.argmax()])}; "
                f"without growing modes: {slow_sign}{decaying.min():.6g} in all, "
                f"{slow_sign}{np.median(decaying):.6g} in half."
            )
            if unstable < steps.size:
                lines.append(f"  N{reason[1:]}")
            else:
                lines = [f"{self.method}, {steps.size} spectra: {reason}"]
        for what, some in (
            ("I", ~converged & ~none),
            ("Without growing modes i", converged & ~exact & ~none),
        ):
            if some.any() and (unstable or what == "I"):
                lines.append(f"  {what}t is an upper bound in {int(some.sum())}: not converged.")
        if none.any():
            worst = np.where(none, plain(self.condition), 0.0).max()
            lines.append(
                f"  {int(none.sum())} where none is known: eigenvalues are ill-conditioned or were not found "
                f"(condition {worst:.3g})."
            )
        return "\n".join(lines)


def _show(value: Any) -> str:
    value = complex(value)
    if value.imag == 0:
        return f"{value.real:.6g}"
    return f"{value.real:.6g} {'±' if value.imag > 0 else '-'} {abs(value.imag):.6g}i"


@checked
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
    rays = rays_of(method, growth)
    shape, n = values.shape[:-1], values.shape[-1]
    given: Complexes = values.reshape(-1, n)
    size = np.abs(values).max(axis=-1, keepdims=True)
    tau = rounding(n, eps) * size if tolerance is None else plain(tolerance)
    if not (tau >= 0).all():
        raise ValueError(f"a tolerance must be at least 0, got {tolerance}.")
    tau = np.broadcast_to(tau, values.shape).reshape(given.shape)
    growing = given.real > tau
    lam = as_counted(given, tau)
    if n <= _MANY or not isinstance(rays, RayPolynomials):
        exits, intervals = exits_and_intervals(rays, lam)
    else:
        parts = [_exits_of_many(rays, *row) for row in zip(lam, growing, strict=True)]
        exits, intervals = np.stack([p[0] for p in parts]), [p[1] for p in parts]
    step = exits.min(axis=1)
    slow = np.where(growing, np.inf, exits)
    # Of those that allow no step at all the worst: the fastest growth, else the fastest oscillation.
    axis = np.where(lam.real == 0, np.abs(lam), -1.0)
    fastest = np.where(
        growing.any(axis=1), np.where(growing, given.real, -np.inf).argmax(axis=1), axis.argmax(axis=1)
    )
    lines = np.arange(len(given))
    chosen = {
        "limiting_eigenvalue": (step, np.where(step == 0, fastest, exits.argmin(axis=1))),
        "decaying_eigenvalue": (
            slow.min(axis=1),
            np.where(slow.min(axis=1) == 0, axis.argmax(axis=1), slow.argmin(axis=1)),
        ),
    }
    shown = {
        name: like(
            eigenvalues, np.where(np.isinf(least), np.nan, upper_of_pairs(lam[lines, i], given, tau)), shape
        )
        for name, (least, i) in chosen.items()
    }
    fast_first = [row[mask][np.argsort(-row[mask].real)] for row, mask in zip(given, growing, strict=True)]
    return StepLimit(
        step=like(eigenvalues, step, shape),
        intervals=nested(intervals, shape),
        growing=nested([like(eigenvalues, row, row.shape) for row in fast_first], shape),
        decaying_step=like(eigenvalues, slow.min(axis=1), shape),
        converged=like(eigenvalues, np.ones(len(given), dtype=bool), shape),
        decaying_converged=like(eigenvalues, np.ones(len(given), dtype=bool), shape),
        method=name_of(method),
        **shown,
    )


def upper_of_pairs(chosen: Complexes, values: Complexes, tau: np.ndarray) -> Complexes:
    """One eigenvalue (B,) of each spectrum (B, n): of a conjugate pair the one above the real axis."""
    paired = (np.abs(values - chosen.conj()[:, None]) <= tau).any(axis=1)
    return np.where(paired & (chosen.imag < 0), chosen.conj(), chosen)


def rounding(n: int, eps: float) -> float:
    """τ/‖J‖ = 8√n·ε: the share of ‖J‖ up to which eigenvalues count as 0, for n rows in a dtype of spacing ε.

    A few times what a backward stable routine leaves in n eigenvalues. Where only eigenvalues are known, the
    largest of them stands for ‖J‖.
    """
    return 8 * math.sqrt(n) * eps


def as_counted(values: Complexes, tau: np.ndarray | float) -> Complexes:
    """Eigenvalues with |λ| ≤ τ set to 0 and those with |Re λ| ≤ τ moved onto the imaginary axis."""
    counted = values.copy()
    counted.real[np.abs(values.real) <= tau] = 0
    counted[np.abs(values) <= tau] = 0
    return counted


Rays = RayPolynomials | RecurrenceRays | AdamsRays
"""Where along rays h·λ a method is unstable."""


def rays_of(method: str | ButcherTableau, growth: tuple[int, float] | None = None) -> Rays:
    """The rays of a method that is given by name, with what N steps may amplify."""
    allowed = allowed_growth(growth)
    if method == EXPLICIT_ADAMS:
        return AdamsRays(math.sqrt(allowed))
    return rays_of_tableau(get_tableau(method), allowed)


def name_of(method: str | ButcherTableau) -> str:
    """What a limit calls a method."""
    return EXPLICIT_ADAMS if method == EXPLICIT_ADAMS else get_tableau(method).name


def exits_and_intervals(rays: Rays, lam: np.ndarray) -> tuple[np.ndarray, list[list[Interval]]]:
    """First exit of each eigenvalue (B, n), and the stable intervals of each row; λ = 0 has no exit."""
    flat = lam.reshape(-1)
    nonzero = np.flatnonzero(flat)
    parts = [rays.unstable(flat[nonzero[i : i + _CHUNK]]) for i in range(0, len(nonzero), _CHUNK)]
    unstable = np.full((flat.size, max((p.shape[1] for p in parts), default=0) or 1, 2), np.inf)
    for i, part in enumerate(parts):
        unstable[nonzero[i * _CHUNK : (i + 1) * _CHUNK], : part.shape[1]] = part
    unstable = unstable.reshape(*lam.shape, -1, 2)
    return unstable[..., 0, 0], [complement(row) for row in unstable]


def first_exits(rays: Rays, lam: Complexes) -> np.ndarray:
    """First exit of each eigenvalue, any shape, as it was counted: inf where it never leaves."""
    upper, place = np.unique(lam.real + 1j * np.abs(lam.imag), return_inverse=True)
    exits = exits_and_intervals(rays, upper[None])[0][0] if lam.size else np.zeros(0)
    return exits[place].reshape(lam.shape)


def _exits_of_many(
    rays: RayPolynomials, lam: np.ndarray, growing: np.ndarray
) -> tuple[np.ndarray, list[Interval]]:
    """The same for one large spectrum; inf for eigenvalues that bind nowhere."""
    decaying = np.flatnonzero(~growing & (lam != 0))
    chosen = decaying[binding(rays, lam[decaying], [(0.0, math.inf)])]
    stable = exits_and_intervals(rays, lam[None, chosen])[1][0] if chosen.size else [(0.0, math.inf)]
    rising = np.flatnonzero(growing)
    chosen = np.concatenate([chosen, rising[binding(rays, lam[rising], stable)]])
    exits = np.full(len(lam), np.inf)
    if chosen.size:
        some, intervals = exits_and_intervals(rays, lam[None, chosen])
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
    steps = check_whole("the N of growth=(N, tol), which asks for |R|^N ≤ 1 + tol,", steps, 1)
    tol = check_number("the tol of growth=(N, tol)", tol, least=0)
    return 1 + Fraction(math.expm1(2 * math.log1p(tol) / steps))


def plain(values: Any) -> np.ndarray:
    """A tensor, array or number as an array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().resolve_conj().resolve_neg().numpy()
    return np.asarray(values)


def bounds(limit: StepLimit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A batch's steps and decaying steps, inf where nothing is known, and whether the latter are exact."""
    exact = plain(limit.decaying_converged)
    none = np.isinf(plain(limit.error)) & ~exact
    steps, decaying = (
        np.where(none & (s > 0), np.inf, s) for s in (plain(limit.step), plain(limit.decaying_step))
    )
    return steps, decaying, exact


def checked_spectrum(eigenvalues: Any) -> tuple[Complexes, float]:
    """Checked eigenvalues as complex128 of shape (…, n), and the spacing of the dtype they came in."""
    if isinstance(eigenvalues, Tensor):
        floating = eigenvalues.is_floating_point() or eigenvalues.is_complex()
        eps = torch.finfo(eigenvalues.dtype).eps if floating else _EPS
        wide = torch.complex128 if eigenvalues.is_complex() else torch.float64
        values = plain(eigenvalues.to(wide))
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
