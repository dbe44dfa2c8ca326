"""What the Ritz values of a large Jacobian say of a method's step, and how far that can be relied on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scipy  # whose submodules are loaded when first named

from resode.jacobian.krylov import Ritz
from resode.stability import imaginary_stability_interval, stability_coefficients
from resode.stability.intervals import ray_polynomials
from resode.stability.limits import allowed_growth, as_counted
from resode.stability.rays import Complexes, Floats
from resode.tableaus import ButcherTableau

DEFLATED = 24
"""Growing modes that are taken out one by one."""

_FEW = 0.01  # eigenvalues expected where one would limit the step unseen
_LOOKS = 6  # without a change, after which Ritz values that might yet move past the limit are let be


@dataclass
class Outlook:
    """What the Ritz values of one sample say of one method's step.

    Args:
        step, limiting, growing, decaying: as in `StepLimit`, over what is trusted.
        estimate: the same over all Ritz values, converged or not.
        mode: index of the Ritz value that sets it, -1 if none does.
        fastest: index of the fastest growing one, -1 if none grows.
        error: relative error of `decaying`, by first-order perturbation.
        converged: whether `step` rests on eigenvalues found to tolerance.
        outer: whether no decaying eigenvalue inside the spectrum's hull could limit the step further.
        settled: whether `decaying` was found to tolerance too.
        hopeless: whether it will not be: more modes grow than can be told from those that barely decay.
        modes: indices of the growing Ritz values.
    """

    step: float
    limiting: complex
    growing: Complexes
    decaying: float
    estimate: float
    mode: int
    fastest: int
    error: float
    converged: bool
    outer: bool
    settled: bool
    hopeless: bool
    modes: np.ndarray = field(repr=False)


class Judge:
    """Step limits from Ritz values, with the rules of `StepLimit` and with their errors.

    Args:
        n: entries of a state.
        eps: spacing of the dtype that J is in.
        rtol: wanted relative accuracy of a limit.
        growth: as in `eigenvalue_step_limit`.
        patient: whether to wait until the Krylov space is all of R^n where outer eigenvalues do not decide.
    """

    def __init__(
        self,
        n: int,
        eps: float,
        rtol: float,
        growth: tuple[int, float] | None,
        patient: bool = False,
    ) -> None:
        self.patient = patient
        self.n, self.eps, self.rtol, self.growth = n, eps, rtol, growth
        self.bound = allowed_growth(growth)

    def _tau(self, scale: float) -> float:
        return rounding(self.n, self.eps) * scale

    def _exits(
        self, values: Complexes, tableau: ButcherTableau, scale: float, few: int | None = None
    ) -> Floats:
        """First exit of each eigenvalue; inf where it limits nothing, and where it is not among the `few`."""
        upper, place = np.unique(values.real + 1j * np.abs(values.imag), return_inverse=True)
        lam = as_counted(upper, np.array(self._tau(scale)))
        exits = np.full(len(lam), np.inf)
        some = np.flatnonzero(lam)
        if few is not None and len(some) > few:
            guess = rough_exits(lam[some], tableau)
            decays = lam[some].real <= 0
            some = some[np.argsort(np.where(decays, guess, np.inf))[:few]]
        if len(some):
            unstable = ray_polynomials(tableau, self.bound).unstable(lam[some])
            exits[some] = unstable[:, 0, 0] if unstable.shape[1] else np.inf
        return exits[place]

    def outlook(self, ritz: Ritz, tableau: ButcherTableau, past: list[float], whole: bool = False) -> Outlook:
        """What is known of one method's step.

        Args:
            ritz: the Ritz values now.
            tableau: the method.
            past: its `estimate` at earlier looks.
            whole: whether the Krylov space is all of R^n.
        """
        tau = self._tau(ritz.scale)
        errors = ritz.conditions * (ritz.residuals + 4 * self.eps * ritz.scale)
        values = ritz.values
        counted = as_counted(values, np.array(tau))
        exits = self._exits(values, tableau, ritz.scale, None if self.growth else DEFLATED)
        growing = counted.real > 0
        sure = values.real > tau + errors
        slow = np.where(growing, np.inf, exits)
        mode = int(slow.argmin()) if np.isfinite(slow).any() else -1
        error, decaying = 0.0, float("inf")
        if mode >= 0:
            decaying = float(slow[mode])
            error = self._spread(complex(values[mode]), float(errors[mode]), tableau, ritz.scale, decaying)
            still = len(past) >= 2 and all(abs(p - decaying) <= 0.1 * self.rtol * decaying for p in past[-2:])
            if still and ritz.residuals[mode] <= 1e-2 * ritz.scale:  # the edge of a cluster whose members mix
                error = min(error, 0.3 * self.rtol)
        calm = len(past) >= _LOOKS and all(abs(p - decaying) <= self.rtol * decaying for p in past[-_LOOKS:])
        known = error <= self.rtol and (
            whole or calm or mode < 0 or not self._threatened(ritz, slow, tableau, decaying)
        )
        estimate = decaying
        if not known:
            decaying = self._bound(values, errors, slow, tableau, ritz.scale)
        fastest = int(np.where(sure, values.real, -np.inf).argmax()) if sure.any() else -1
        if fastest >= 0:
            rightmost = values.real.max() <= values[fastest].real + errors[fastest]
            converged = bool(rightmost and errors[fastest] <= self.rtol**0.5 * abs(values[fastest]))
            step, limiting = (0.0 if self.growth is None else float(exits[sure].min())), values[fastest]
            step = min(step, decaying)
            height = _axis_height(values)
            axis = imaginary_stability_interval(tableau)
            outer = whole or height == 0 or axis >= 0.98 * estimate * height
            outer = outer or (axis == 0 and self._hidden(values, estimate, height) < _FEW)
            hopeless = (known or axis == 0) and not outer and not self.patient
            settled = known and outer
        else:
            step, limiting = decaying, counted[mode] if mode >= 0 else complex("nan")
            converged = settled = bool(known and not growing.any())
            outer, hopeless = True, False
        if limiting == limiting:
            limiting = complex(limiting.real, abs(limiting.imag))
        modes = np.flatnonzero(growing)
        listed = values[sure][np.argsort(-values[sure].real)]
        return Outlook(
            step,
            limiting,
            listed,
            decaying,
            estimate,
            mode,
            fastest,
            error,
            converged,
            outer,
            settled,
            hopeless,
            modes,
        )

    def _threatened(self, ritz: Ritz, slow: Floats, tableau: ButcherTableau, decaying: float) -> bool:
        """Whether some Ritz value, moved by half its residual, would leave the region before the limit."""
        near = np.argsort(slow)[:DEFLATED]
        near = near[np.isfinite(slow[near]) & (ritz.residuals[near] > self.rtol * ritz.scale)]
        around = np.exp(0.25j * np.pi * np.arange(8))
        moved = (ritz.values[near, None] + 0.5 * ritz.residuals[near, None] * around).ravel()
        exits = rough_exits(moved[moved.real < 0], tableau)
        return bool((exits < (1 - self.rtol) * decaying).any())

    def _bound(
        self, values: Complexes, errors: Floats, slow: Floats, tableau: ButcherTableau, scale: float
    ) -> float:
        """What still holds where the first exit is not known: the first one that is, within a hundredth."""
        for i in map(int, np.argsort(slow)[: 2 * DEFLATED]):
            if 0 < slow[i] < np.inf:
                error = self._spread(complex(values[i]), float(errors[i]), tableau, scale, float(slow[i]))
                if error <= 1e-2:
                    return float(slow[i]) * (1 + error)
        return float("inf")

    def _hidden(self, values: Complexes, limit: float, height: float) -> float:
        """How many of n eigenvalues, if spread evenly over the hull, would limit Euler's step further.

        They lie left of the imaginary axis, up to the height at which the hull crosses it, and right of the
        circle |z + 1/η| = 1/η: an area of ηy³/3.
        """
        if not np.isfinite(limit):
            return float("inf")
        try:
            hull = scipy.spatial.ConvexHull(np.stack([values.real, values.imag], axis=1))
        except scipy.spatial.QhullError:  # all on one line, which is the real axis
            return 0.0
        return self.n * limit * height**3 / 3 / float(hull.volume)

    def _spread(
        self, value: complex, error: float, tableau: ButcherTableau, scale: float, decaying: float
    ) -> float:
        """Relative change of an exit where the eigenvalue moves by its error."""
        if decaying == 0:
            return 0.0
        around: Complexes = value + error * np.array([1, -1, 1j, -1j], dtype=np.complex128)
        moved = self._exits(around, tableau, scale)
        return float(np.abs(moved - decaying).max() / decaying)


def rounding(n: int, eps: float) -> float:
    """Share of ‖J‖ up to which eigenvalues count as 0: 8√n·ε, as in `eigenvalue_step_limit`."""
    return 8 * n**0.5 * eps


def amplification(z: np.ndarray, tableau: ButcherTableau) -> Floats:
    """|R(z)|, what a step multiplies a mode by, for z = step times eigenvalue."""
    numerator, denominator = (
        np.polyval([float(c) for c in part[::-1]], z) for part in stability_coefficients(tableau)
    )
    return np.abs(numerator / denominator)


def rough_exits(values: Complexes, tableau: ButcherTableau) -> Floats:
    """First exit of each eigenvalue, bracketed on a grid and halved: to choose which ones are computed."""
    radii = np.logspace(-3, 1.5, 91)
    modulus = np.abs(values)
    directions = np.divide(values, modulus, out=np.zeros_like(values), where=modulus > 0)

    def outside(r: Floats) -> np.ndarray:
        return amplification(r * directions[:, None], tableau) > 1 + 1e-12

    there = outside(radii)
    first = there.argmax(axis=1)[:, None]
    inner, outer = np.where(first > 0, radii[first - 1], 0.0), radii[first]
    for _ in range(32):  # the grid alone would leave ties, and the nearest of them must not be lost
        middle = (inner + outer) / 2
        beyond = outside(middle)
        inner, outer = np.where(beyond, inner, middle), np.where(beyond, middle, outer)
    exits = np.where(there.any(axis=1), outer[:, 0], np.inf)
    return np.divide(exits, modulus, out=np.full(len(values), np.inf), where=modulus > 0)


def _axis_height(values: Complexes) -> float:
    """Where the hull of a spectrum crosses the imaginary axis; 0 if it does not."""
    right, left = values[values.real > 0], values[values.real < 0]
    if not len(right) or not len(left):
        return 0.0
    a, b = right[:, None], left[None, :]
    share = a.real / (a.real - b.real)
    return float((np.abs(a.imag) + share * (np.abs(b.imag) - np.abs(a.imag))).max())
