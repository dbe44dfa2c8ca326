r"""Step limits of spectra whose eigenvalues are known to an error each, all of them or the outer ones.

First-order perturbation says how far an eigenvalue may lie from the computed one: its condition number
1/|w*v| times the residual and the rounding of J. A limit is `converged` where no eigenvalue, moved by its
error, would change it. Where one would, what holds is an upper bound, from those that are sure; and where the
errors are so large that none is sure, the eigenvalues say nothing, and the limit says that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from resode.stability.limits import (
    StepLimit,
    as_counted,
    exits_and_intervals,
    first_exits,
    like,
    name_of,
    nested,
    rays_of,
    rounding,
    upper_of_pairs,
)
from resode.stability.unstable_rays import Complexes, Floats
from resode.tableaus import ButcherTableau

ROUNDINGS = 4.0
"""Times ε‖J‖: what rounding is taken to have changed J by."""

ACCEPTED = 4.0
"""Times the accuracy that is sought: an error up to which a figure counts as found."""

_FIRST_ORDER = 1e-2  # relative change up to which first-order perturbation is relied on
_ZERO = 0.1  # of the accuracy sought, in units of 1/‖J‖: a step that is as good as none
_NEAR = 48  # eigenvalues, from the nearest exit on, that are moved by their errors
_AROUND = np.exp(0.25j * np.pi * np.arange(8))


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of a batch of B Jacobians, with their errors.

    Args:
        values: λ (1/time), complex, shape (B, m): all of them, or the outer ones that were found; nan where
            one Jacobian has fewer.
        errors: how far each may lie from the true one, to first order, shape (B, m).
        residuals: ‖Jv − λv‖₂ of the unit eigenvectors v, shape (B, m).
        conditions: 1/|w*v|, w and v unit left and right eigenvectors, shape (B, m).
        scale: ‖J‖₂, or about it; where J was balanced, of what it became; shape (B,).
        n: rows of J.
        eps: spacing of the dtype that J came in.
        shape: of the batch as it came; () for one Jacobian.
        origin: the tensor or array that came, whose kind results take.
        complete: whether the values are all of them, bool, shape (B,).
        normal: whether J commutes with its transpose, to rounding, bool, shape (B,).
        steady: whether a search for more of them has changed no limit for long, bool, shape (B,).
        growth: as in `eigenvalue_step_limit`.
        rtol: relative accuracy of limits that was sought.
        products: with each J or its transpose, that finding them took.
    """

    values: Complexes
    errors: Floats
    residuals: Floats
    conditions: Floats
    scale: Floats
    n: int
    eps: float
    shape: tuple[int, ...]
    origin: Any
    complete: np.ndarray
    normal: np.ndarray
    steady: np.ndarray
    growth: tuple[int, float] | None = None
    rtol: float = 1e-6
    products: int = 0

    @property
    def tau(self) -> Floats:
        """Modulus up to which eigenvalues count as 0, real parts as on the imaginary axis; shape (B, 1)."""
        return rounding(self.n, self.eps) * self.scale[:, None]

    @property
    def trusted(self) -> np.ndarray:
        """Which values are known to a thousandth of ‖J‖, or are all that are known; bool, shape (B, m)."""
        sure = self.complete[:, None] | (self.errors <= 1e-3 * self.scale[:, None])
        return np.where(sure.any(axis=1, keepdims=True), sure, True) & np.isfinite(self.values)


def limits(spectrum: Spectrum, method: str | ButcherTableau) -> StepLimit:
    """The step limits of a spectrum under a method: the one answer behind every step limit of a Jacobian."""
    return FirstExits(spectrum, method).limits()


class FirstExits:
    """Where the eigenvalues of each Jacobian leave a method's stability region first."""

    def __init__(self, spectrum: Spectrum, method: str | ButcherTableau) -> None:
        self.spectrum, self.method = spectrum, method
        self.rays = rays_of(method, spectrum.growth)
        self.lines = np.arange(len(spectrum.scale))
        present = np.isfinite(spectrum.values)
        self.values: Complexes = np.where(present, spectrum.values, 0)
        self.errors = np.where(present, spectrum.errors, 0.0)
        self.counted: Complexes = as_counted(self.values, spectrum.tau)
        small = self.errors <= _FIRST_ORDER * spectrum.scale[:, None]
        self.counted[small & (np.abs(self.values) <= self.errors)] = 0  # as good as 0
        self.exits = first_exits(self.rays, self.counted)
        self.beside = self._beside_the_axis()
        self.grows = self.counted.real > 0
        # The union of discs of n times the first-order errors holds all eigenvalues, however ill-conditioned.
        wide = np.where((spectrum.normal | ~spectrum.complete)[:, None], 1, spectrum.n) * self.errors
        self.surely_grows = self.grows & (self.values.real > spectrum.tau + wide)
        self.slow = np.where(self.grows, np.inf, self.exits)
        self.mode = self.slow.argmin(axis=1)  # index of the decaying mode that leaves first
        self.estimate = self.slow[self.lines, self.mode]
        self.fastest = np.where(self.surely_grows, self.values.real, -np.inf).argmax(axis=1)
        self.unstable = np.asarray(self.surely_grows.any(axis=1))
        self.doubtful = (self.grows & ~self.surely_grows).any(axis=1) | self.beside.any(axis=1)

    def _beside_the_axis(self) -> np.ndarray:
        """Which eigenvalues counted as on the imaginary axis may allow more than the step 0; bool (B, m).

        Re λ = −τ/2 allows Euler τ/|λ|², and 0 would be no upper bound. The limit is as good as 0 where one of
        them cannot be told from the axis, by its error, and surely allows no more than a tenth of `rtol`/‖J‖.
        Elsewhere the exit of each becomes the largest step that its error allows, or none where it may as
        well grow.
        """
        s, beside = self.spectrum, np.zeros(self.exits.shape, dtype=bool)
        row, place = np.nonzero((self.counted != 0) & (self.counted.real == 0) & (self.exits == 0))
        value, error = self.values[row, place], self.errors[row, place]
        latest = np.asarray(np.minimum(value.real, 0) - error + 1j * value.imag, np.complex128)
        allowed = first_exits(self.rays, latest)
        least = np.full(len(self.lines), np.inf)
        on_axis = np.abs(value.real) <= error + rounding(s.n, 2.0**-52) * s.scale[row]
        np.minimum.at(least, row[on_axis], allowed[on_axis])
        unsure = least[row] * s.scale[row] > _ZERO * s.rtol
        beside[row[unsure], place[unsure]] = True
        self.exits[beside] = np.inf
        decays = unsure & (value.real + error < 0)
        self.exits[row[decays], place[decays]] = allowed[decays]
        self.counted[row[decays], place[decays]] = value[decays]
        return beside

    @property
    def first(self) -> np.ndarray:
        """Index of the eigenvalue that sets the limit: the fastest growth, else the first exit."""
        return np.where(self.unstable, self.fastest, self.mode)

    @cached_property
    def error(self) -> Floats:
        """Relative change of the limit of the decaying modes where its eigenvalue moves by its error."""
        return self._spread(self.lines, self.mode)

    @property
    def accurate(self) -> np.ndarray:
        """Whether the eigenvalue that sets the limit of the decaying modes is known well enough."""
        return self.error <= ACCEPTED * self.spectrum.rtol

    @cached_property
    def threatened(self) -> np.ndarray:
        """Whether another eigenvalue, moved by its error, would decay and leave the region before.

        Of a search's Ritz values the error is half the residual: they converge towards the outside.
        """
        s = self.spectrum
        scale = s.scale[:, None]
        complete = s.complete[:, None]
        reach = np.minimum(np.where(complete, self.errors, s.residuals / 2), 2 * scale)
        near = np.zeros(reach.shape, dtype=bool)
        np.put_along_axis(near, self.slow.argsort(axis=1, kind="stable")[:, :_NEAR], True, axis=1)
        unsure = complete & (np.abs(self.values.real) <= reach + s.tau)
        matters = complete | (np.isfinite(self.slow) & (reach > s.rtol * scale / 2))
        row, place = np.nonzero((near | unsure) & matters & (reach > 0) & (self.counted != 0))
        around: Complexes = self.values[row, place, None] + reach[row, place, None] * _AROUND
        moved = as_counted(around, s.tau[row])
        exits = np.where(moved.real > 0, np.inf, first_exits(self.rays, moved)).min(axis=1)
        before = exits < (1 - ACCEPTED * s.rtol) * self.estimate[row]
        return np.bincount(row[before], minlength=len(self.lines)) > 0

    @cached_property
    def known(self) -> np.ndarray:
        """Whether the decaying eigenvalues that were found set the limit beyond doubt."""
        return self.accurate & (self.spectrum.steady | ~self.threatened) & ~self.beside.any(axis=1)

    @cached_property
    def axis(self) -> float:
        """How far up the imaginary axis the region reaches, from 0 on."""
        return float(first_exits(self.rays, np.array([1j]))[0])

    @cached_property
    def all_seen(self) -> np.ndarray:
        """Whether no decaying eigenvalue inside the spectrum's hull could limit the step further.

        Where modes grow, the hull crosses the imaginary axis, near which eigenvalues that barely decay may
        lie unseen. They limit the step of a method whose region holds no segment of that axis.
        """
        seen = self.spectrum.complete | ~self.unstable
        for row in np.flatnonzero(~seen):
            height = _axis_height(self.values[row])
            seen[row] = height == 0 or self.axis >= 0.98 * self.estimate[row] * height
        return seen

    @property
    def settled(self) -> np.ndarray:
        """Whether the limit of the decaying modes is exact to its error."""
        open_ = self.doubtful & ~self.unstable & ~self.spectrum.complete
        return self.known & self.all_seen & ~open_

    @property
    def converged(self) -> np.ndarray:
        """Whether the step limit is exact to its error; where a mode surely grows it is 0."""
        error: Floats = self.errors[self.lines, self.fastest]
        value: Complexes = self.values[self.lines, self.fastest]
        rightmost = self.values.real.max(axis=1) <= value.real + error
        rightmost &= error <= ACCEPTED * self.spectrum.rtol**0.5 * np.abs(value)
        return np.where(self.unstable, self.spectrum.complete | rightmost, self.settled & ~self.doubtful)

    @property
    def hopeless(self) -> np.ndarray:
        """Whether a search for outer eigenvalues has done what it can, though the limit has not settled."""
        return self.converged & ~self.all_seen & (self.known | (self.axis == 0))

    def bound(self, row: int) -> tuple[int, float, float]:
        """(index, limit, error): the least upper bound that one eigenvalue proves, to first order.

        That of the first exit as it was computed, with an error of inf, where none proves any: no bound.
        """
        allowed = 0.5 if self.spectrum.normal[row] else _FIRST_ORDER
        for i in map(int, self.slow[row].argsort(kind="stable")[:_NEAR]):
            if self.beside[row, i] and self.slow[row, i] < np.inf:
                return i, float(self.slow[row, i]), 1.0
            if 0 < self.slow[row, i] < np.inf:
                error = float(self._spread(np.array([row]), np.array([i]))[0])
                if error <= allowed:
                    return i, float(self.slow[row, i]) * (1 + error), error
        return int(self.mode[row]), float(self.estimate[row]), np.inf

    def limits(self) -> StepLimit:
        """What is known of every Jacobian."""
        s = self.spectrum
        index, decaying, error = self.mode.copy(), self.estimate.copy(), self.error.copy()
        for row in np.flatnonzero(~self.known).tolist():
            index[row], decaying[row], error[row] = self.bound(row)
        first = np.where(self.unstable, self.fastest, index)
        least = np.where(self.surely_grows, self.exits, np.inf).min(axis=1)
        step = np.where(self.unstable & (s.growth is None), 0.0, np.minimum(least, decaying))
        limiting = np.where(self.unstable, self.values[self.lines, first], self.counted[self.lines, first])
        near = s.tau + 1e-9 * np.abs(self.values)
        limiting = upper_of_pairs(limiting, self.values, near)
        slow = upper_of_pairs(self.counted[self.lines, index], self.values, near)
        listed = np.where(s.complete[:, None], self.grows, self.surely_grows)
        growing = [v[some][np.argsort(-v[some].real)] for v, some in zip(self.values, listed, strict=True)]
        counted = np.where(s.trusted, self.counted, 0)
        intervals = exits_and_intervals(self.rays, counted)[1]
        fields = {
            "step": step,
            "limiting_eigenvalue": np.where(np.isinf(step), np.nan, limiting),
            "decaying_eigenvalue": np.where(np.isinf(decaying), np.nan, slow),
            "decaying_step": decaying,
            "converged": self.converged,
            "decaying_converged": self.settled,
            "error": error,
            "residual": np.where(np.isinf(step), np.nan, s.residuals[self.lines, first]),
            "condition": np.where(np.isinf(step), np.nan, s.conditions[self.lines, first]),
            "complete": s.complete,
        }
        return StepLimit(
            intervals=nested(intervals, s.shape),
            growing=nested([like(s.origin, g, g.shape) for g in growing], s.shape),
            method=name_of(self.method),
            **{name: like(s.origin, value, s.shape) for name, value in fields.items()},
        )

    def _spread(self, row: np.ndarray, place: np.ndarray) -> Floats:
        """Relative change of eigenvalues' exits where they move by their errors; shape of the indices."""
        exits, errors = self.slow[row, place], self.errors[row, place]
        reach = np.minimum(errors, self.spectrum.scale[row])
        moved = as_counted(self.values[row, place, None] + reach[:, None] * _AROUND, self.spectrum.tau[row])
        with np.errstate(invalid="ignore", divide="ignore"):
            change = np.abs(first_exits(self.rays, moved) - exits[:, None]).max(axis=1) / exits
        change = np.where((exits == 0) | np.isinf(exits) | (errors == 0), 0.0, change)
        return np.where(np.isfinite(exits) & (errors > self.spectrum.scale[row]), np.inf, change)


def _axis_height(values: Complexes) -> float:
    """Where the hull of a spectrum crosses the imaginary axis; 0 if it does not."""
    right, left = values[values.real > 0], values[values.real < 0]
    if not len(right) or not len(left):
        return 0.0
    a, b = right[:, None], left[None, :]
    share = a.real / (a.real - b.real)
    return float((np.abs(a.imag) + share * (np.abs(b.imag) - np.abs(a.imag))).max())
