r"""Where a method is unstable along rays h·λ, h > 0: exactly on the axes, fast for many rays.

With R = P/Q, the step is unstable at z = r·e^{iθ} where

    g(r) = |P(z)|² − G·|Q(z)|² > 0,        G = 1, or the growth of |R|² that is allowed,

a real polynomial in r whose coefficients are polynomials in x = cos θ with rational coefficients,
c_n(x) = Σ_m A_nm T_m(x) with Chebyshev's T_m. Its positive roots follow from Descartes' rule in Bernstein
form, as in `resode.stability.polynomials`, in float64 for all rays at once with a bound on every rounding.
A ray on which the bound leaves a sign open is done again with integers, so rounding decides nowhere. The
substitution r = r₀·t/(1−t) makes r = ∞ an ordinary end of the interval 0 < t < 1.

Source:
    Farin, Curves and Surfaces for CAGD (2002), 4.3 and 5.2 (blossoms, subdivision).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from resode.stability.polynomials import Intervals, positive_intervals, roots_lie_right

Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]
Indices = NDArray[np.intp]

UNIT = 2.0**-53  # largest relative error of one rounding
_LEVELS = 40  # halvings before a ray is handed to the integers
NEAR = 0.25  # |cos θ| below which a ray is near the imaginary axis
_TOUCH = 1e-3  # relative width up to which an interval may be one where |R| touches 1
_SLIVER = 1e-12  # relative width below which a gap between unstable intervals is rounding


class RayPolynomials:
    """g(r) = |P|² − G|Q|² along every ray, for one method and one allowed growth G.

    Args:
        numerator: P of R = P/Q, lowest degree first, exact.
        denominator: Q, which has no root in common with P.
        growth: G, exact, at least 1.
        touches: whether |R(z)| exceeds 1 by no more than rounding of the method's coefficients explains;
            such an interval, where R touches the unit circle from within, is left out. None for exact
            coefficients.
    """

    def __init__(
        self,
        numerator: Sequence[Fraction],
        denominator: Sequence[Fraction],
        growth: Fraction = Fraction(1),
        touches: Callable[[complex], bool] | None = None,
    ):
        self.touches = touches
        self.parts = ((Fraction(1), tuple(numerator)), (-growth, tuple(denominator)))
        size = max(len(numerator), len(denominator))
        table = [[Fraction(0)] * size for _ in range(2 * size - 1)]  # A_nm
        for weight, poly in self.parts:
            for j, p in enumerate(poly):
                for k, q in enumerate(poly):
                    table[j + k][abs(j - k)] += weight * p * q
        used = [n for n, row in enumerate(table) if any(row)]
        self.lowest = used[0]  # g is divisible by r^lowest, and is so from here on
        self.chebyshev = table[used[0] : used[-1] + 1]
        self.powers = [_chebyshev_to_powers(row) for row in self.chebyshev]
        self.degree = len(self.chebyshev) - 1

    def unstable_exactly(self, direction: complex) -> Intervals:
        """Where g > 0 along h·direction, h > 0, for the two float64 numbers exactly as they stand."""
        re, im = Fraction(direction.real), Fraction(direction.imag)
        square = re * re + im * im
        intervals = positive_intervals(
            [
                sum(
                    (
                        c * re**m * square ** ((n + self.lowest - m) // 2)  # an even number where c is not 0
                        for m, c in enumerate(row)
                        if c
                    ),
                    Fraction(0),
                )
                for n, row in enumerate(self.powers)
            ]
        )
        return [pair for pair in intervals if not self._is_touch(direction, *pair)]

    def _is_touch(self, direction: complex, start: float, stop: float) -> bool:
        """Whether an interval along h·direction, narrow and off 0, is there by rounding."""
        if self.touches is None or start == 0 or not stop - start <= _TOUCH * start:
            return False
        return self.touches((start + stop) / 2 * direction)

    @cached_property
    def axes(self) -> dict[str, Floats]:
        """Unstable intervals (K, 2) on the negative, the positive and either imaginary half axis."""
        directions = {"negative": -1 + 0j, "positive": 1 + 0j, "imaginary": 1j}
        return {k: np.array(self.unstable_exactly(d)).reshape(-1, 2) for k, d in directions.items()}

    @cached_property
    def covers_left_half(self) -> bool:
        """Whether g ≤ 0 wherever Re z ≤ 0: on the imaginary axis, and no pole to its left."""
        return not len(self.axes["imaginary"]) and roots_lie_right(self.parts[1][1])

    def unstable(self, eigenvalues: Complexes) -> Floats:
        """Open intervals of h > 0 where g > 0 at h·λ for each λ (M,), not 0: (M, K, 2), filled with inf."""
        modulus = np.abs(eigenvalues)
        done: list[tuple[Indices, Floats]] = []
        for axis, index in by_axis(eigenvalues).items():
            if axis == "none":
                left = self.covers_left_half & (eigenvalues.real[index] < 0)
                index = index[~left]
                if index.size:
                    unit = eigenvalues[index] / modulus[index]
                    intervals, undecided = self._isolate(unit)
                    done.append((index, intervals))
                    for i in undecided:
                        exact = np.array(self.unstable_exactly(complex(unit[i]))).reshape(1, -1, 2)
                        done.append((index[[i]], exact))
            elif index.size:
                done.append((index, self.axes[axis][None]))
        width = max((intervals.shape[1] for _, intervals in done), default=0)
        result = np.full((len(eigenvalues), width, 2), np.inf)
        for index, intervals in done:
            result[index] = np.inf
            result[index, : intervals.shape[1]] = intervals
        if self.touches is not None:
            for i, row in enumerate(result):
                unit = eigenvalues[i] / modulus[i]
                gone = [bool(np.isfinite(a)) and self._is_touch(unit, a, b) for a, b in row]
                row[gone] = np.inf
                row[:] = row[np.argsort(row[:, 0], kind="stable")]
        with np.errstate(over="ignore"):
            return result / modulus[:, None, None]

    def coefficients(self, x: Floats) -> tuple[Floats, Floats]:
        """c_n(x) of g / r^lowest, and the sums of their terms' moduli, each (degree + 1, M).

        Near the imaginary axis they are sums of powers of x, because there the low ones go to 0 with x
        and the relative error counts; elsewhere Chebyshev sums, whose terms stay small.
        """
        near = np.abs(x) < NEAR
        if near.any() and not near.all():
            values, mass = np.empty((2, self.degree + 1, len(x)))
            for side in (near, ~near):
                values[:, side], mass[:, side] = self.coefficients(x[side])
            return values, mass
        chebyshev, powers = self.tables
        basis = np.ones((chebyshev.shape[1], len(x)))
        if near.all():
            for m in range(1, len(basis)):
                np.multiply(x, basis[m - 1], out=basis[m])
            return powers @ basis, np.abs(powers) @ np.abs(basis)
        for m in range(1, len(basis)):
            basis[m] = 2 * x * basis[m - 1] - basis[m - 2] if m > 1 else x
        mass = np.abs(chebyshev).sum(axis=1, keepdims=True)
        return chebyshev @ basis, np.broadcast_to(mass, (len(mass), len(x)))

    @cached_property
    def tables(self) -> tuple[Floats, Floats]:
        """A_nm, and the coefficients of rⁿx^m, from n = `lowest` on, in float64."""
        return np.array(self.chebyshev, dtype=float), np.array(self.powers, dtype=float)

    @cached_property
    def scale(self) -> float:
        """r₀, where the lowest and the highest term are alike; the factor keeps round roots off cell ends."""
        mass = np.abs(self.tables[0]).sum(axis=1)
        return 1.0379 * float(mass[0] / mass[-1]) ** (1 / max(self.degree, 1))

    def _isolate(self, unit: Complexes) -> tuple[Floats, Indices]:
        """Unstable intervals in r for directions e^{iθ} off the axes, (M, K, 2), and the undecided rays."""
        count, degree = len(unit), self.degree
        binomial = np.array([math.comb(degree, n) for n in range(degree + 1)], dtype=float)
        values, mass = (part.T for part in self.coefficients(unit.real))
        powers = self.scale ** np.arange(degree + 1)
        halves = _halving(degree)
        ray, lo = np.arange(count), np.zeros(count)  # an entry is a cell lo < t < lo + 2^−level of a ray
        cell, size = values * (powers / binomial), mass * (powers / binomial)
        undecided = np.zeros(count, dtype=bool)
        found = []
        for level in range(_LEVELS):
            bound = size * (UNIT * (4 * degree + 16 + degree * level))
            sign = (cell > bound).astype(np.int8) - (cell < -bound)
            undecided[ray[(sign[:, 0] == 0) | (sign[:, -1] == 0)]] = True
            changes, doubtful = _sign_changes(sign)
            decided = ~undecided[ray]
            simple = decided & (changes == 1) & ~doubtful
            found.append((ray[simple], lo[simple], lo[simple] + 2.0**-level))
            split = decided & ((changes > 1) | doubtful)
            ray, lo = np.tile(ray[split], 2), np.concatenate([lo[split], lo[split] + 2.0 ** -(level + 1)])
            cell = np.concatenate([cell[split] @ half for half in halves])
            size = np.concatenate([size[split] @ half for half in halves])
            if not ray.size:
                break
        undecided[ray] = True
        owner, start, stop = (np.concatenate(parts) for parts in zip(*found, strict=True))
        keep = ~undecided[owner]
        owner, start, stop = owner[keep], start[keep], stop[keep]
        t = _bracketed_roots(values[owner] * powers, start, stop)
        r = self._polish(unit[owner], self.scale * t / (1 - t), mass[owner])
        return _as_intervals(owner, r, starts_unstable=values[:, 0] > 0), np.flatnonzero(undecided)

    def _polish(self, unit: Complexes, r: Floats, mass: Floats) -> Floats:
        """Two Newton steps on |P|² − G|Q|² in complex arithmetic, where that rounds less than Σ c_n rⁿ."""
        for _ in range(2):
            z = r * unit
            value, slope, complex_error, real_error = np.zeros((4, len(r)))
            for weight, poly in self.parts:
                p, dp, terms = np.zeros(len(r), complex), np.zeros(len(r), complex), np.zeros(len(r))
                for c in map(float, reversed(poly)):
                    p, dp, terms = p * z + c, dp * z + p, terms * r + abs(c)
                value += float(weight) * np.abs(p) ** 2
                slope += float(weight) * 2 * (p.conj() * dp * unit).real
                complex_error += abs(float(weight)) * np.abs(p) * terms
            for column in mass.T[::-1]:
                real_error = real_error * r + column
            with np.errstate(all="ignore"):
                step = value / slope
                better = (complex_error < real_error * r**self.lowest) & (np.abs(step) < 1e-6 * r)
            r = r - np.where(better, step, 0.0)
        return r


def complement(unstable: Floats) -> Intervals:
    """The intervals of (0, ∞) outside a union of open intervals, shape (…, 2), rounding slivers left out."""
    ends = np.concatenate([unstable.reshape(-1, 2), [(np.inf, np.inf)]])
    ends = ends[np.argsort(ends[:, 0], kind="stable")]
    reached = np.concatenate([[0.0], np.maximum.accumulate(ends[:-1, 1])])
    with np.errstate(invalid="ignore"):
        gap = ends[:, 0] - reached > _SLIVER * ends[:, 0]
    gap |= np.isinf(ends[:, 0]) & np.isfinite(reached)
    return [(float(a), float(b)) for a, b in zip(reached[gap], ends[gap, 0], strict=True)]


def bernstein_matrix(degree: int, start: float | Floats, stop: float | Floats) -> Floats:
    """Power coefficients to Bernstein coefficients on [start, stop], where stop may be inf.

    Row k, times the binomials, is (1 + start·X)^{d−k}·(1 + stop·X)^k, the blossom of the powers with k
    arguments at stop; an argument at infinity contributes the factor X. Arrays of ends give a stack.
    """
    start, stop = np.broadcast_arrays(np.asarray(start, float)[..., None], np.asarray(stop, float)[..., None])
    matrix = np.zeros((*start.shape[:-1], degree + 1, degree + 1))
    matrix[..., 0] = 1
    bounded = np.isfinite(stop)
    ends = np.where(bounded, stop, 1.0)
    for k in range(degree + 1):
        row = matrix[..., k, :]
        for j in range(degree):
            shifted = row[..., :-1] * (ends if j < k else start)
            if j < k:
                row[...] = np.where(bounded, row, 0.0)
            row[..., 1:] += shifted
    return matrix / [math.comb(degree, n) for n in range(degree + 1)]


def _halving(degree: int) -> tuple[Floats, Floats]:
    """Matrices that take Bernstein coefficients (row vectors) to those on either half of the interval."""
    left = np.array(
        [[math.comb(k, j) * 2.0**-k for k in range(degree + 1)] for j in range(degree + 1)]
    )  # comb(k, j) is 0 for j > k
    return left, left[::-1, ::-1]


def _sign_changes(sign: NDArray[np.int8]) -> tuple[Indices, NDArray[np.bool_]]:
    """Changes of sign along each row, and whether an open sign (0) could alter their number.

    A single 0 between opposite signs counts one change whichever way it falls; any other may add two.
    """
    last, changes = sign[:, 0], np.zeros(len(sign), dtype=np.intp)
    for column in sign.T[1:]:
        now = np.where(column == 0, last, column)
        changes += now != last
        last = now
    open_sign = (sign[:, 1:-1] == 0) & (sign[:, :-2] * sign[:, 2:] != -1)
    return changes, open_sign.any(axis=1)


def _bracketed_roots(coefficients: Floats, lo: Floats, hi: Floats) -> Floats:
    """The root of Σ c_n tⁿ (1−t)^{d−n} in each bracket, by false position and every third time halving."""
    lo, hi, root = lo.copy(), hi.copy(), np.empty_like(lo)
    at_lo, at_hi = _mixed(coefficients, lo), _mixed(coefficients, hi)
    todo = np.arange(len(lo))
    for turn in range(200):
        if not todo.size:
            break
        a, b, fa, fb = lo[todo], hi[todo], at_lo[todo], at_hi[todo]
        middle = a + (b - a) * (0.5 if turn % 3 == 2 else fa / (fa - fb))
        middle = np.clip(middle, a + 1e-16 * b, b * (1 - 1e-16))
        value = _mixed(coefficients[todo], middle)
        below = (value > 0) == (fa > 0)
        # The end that stays put counts half, so that the next guess crosses to its side (Illinois).
        lo[todo], at_lo[todo] = np.where(below, middle, a), np.where(below, value, fa / 2)
        hi[todo], at_hi[todo] = np.where(below, b, middle), np.where(below, fb / 2, value)
        root[todo] = middle
        todo = todo[(hi[todo] - lo[todo] > 4 * UNIT * hi[todo]) & (value != 0)]
    return root


def _mixed(coefficients: Floats, t: Floats) -> Floats:
    """Σ c_n tⁿ (1−t)^{d−n} for coefficients (M, d+1) and t (M,)."""
    value, power = coefficients[:, -1].copy(), np.ones(len(t))
    for column in coefficients.T[-2::-1]:
        power *= 1 - t
        value = value * t + column * power
    return value


def _as_intervals(owner: Indices, r: Floats, starts_unstable: NDArray[np.bool_]) -> Floats:
    """Roots of several rays to unstable intervals (M, K, 2): the sign alternates from the first one on."""
    order = np.lexsort((r, owner))
    owner, r = owner[order], r[order]
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
    width = int(rank.max(initial=-1)) + 2
    ends = np.full((len(starts_unstable), width + width % 2), np.inf)
    ends[owner, rank + starts_unstable[owner]] = r
    ends[starts_unstable, 0] = 0.0
    intervals = ends.reshape(len(ends), -1, 2)
    return intervals[:, : int(np.isfinite(intervals[..., 0]).sum(axis=1).max(initial=0))]


def by_axis(eigenvalues: Complexes) -> dict[str, Indices]:
    """Indices of eigenvalues on the real half axes and on the imaginary axis, and of those on none."""
    real, imaginary = eigenvalues.imag == 0, eigenvalues.real == 0
    return {
        "negative": np.flatnonzero(real & (eigenvalues.real < 0)),
        "positive": np.flatnonzero(real & (eigenvalues.real > 0)),
        "imaginary": np.flatnonzero(imaginary),
        "none": np.flatnonzero(~(real | imaginary)),
    }


def _chebyshev_to_powers(row: Sequence[Fraction]) -> list[Fraction]:
    """Σ a_m T_m(x) in powers of x, exactly, by T_m+1 = 2x T_m − T_m−1."""
    total = [Fraction(0)] * len(row)
    before, now = [Fraction(0), Fraction(1)], [Fraction(1)]  # T_−1 = T_1 = x, T_0 = 1
    for a in row:
        for n, c in enumerate(now):
            total[n] += a * c
        following = [Fraction(0), *(2 * c for c in now)]
        for n, c in enumerate(before):
            following[n] -= c
        before, now = now, following
    return total
