r"""The polynomial R of a given degree and order with the largest step for a spectrum, by convex optimisation.

|R(z)| ≤ 1 is convex in R's coefficients. For a step h the problem

    minimise over R, R(z) = 1 + z + … + z^p/p! + O(z^{p+1}), the largest (|R(hλ)| − 1) / w(hλ)

over the rays from 0 to every eigenvalue λ is so too, and what a larger h can hold, a smaller one can: h is
bisected. |R| ≤ 1 stands as Re(e^{−iφ}R) ≤ 1 for angles φ and points z that are added where |R| is largest, so
that each problem is a linear program (scipy's HiGHS). The weight w = min(1, |Re z| + |z|^q) vanishes at 0 as
1 − |R| must.

R is written in Faber polynomials of an ellipse around the spectrum, F_k(z) = u^k + q^k u^{−k} where
z = c + (g/2)(u + q/u): Chebyshev's on a segment (|q| = 1), powers on a disc (q = 0). They are at most 2
within, so that coefficients are of the size of R, and follow F_{k+1} = F_1 F_k − q F_{k−1}: of which the
steps are taken.

Source:
    Ketcheson & Ahmadia, Optimal stability polynomials for numerical integration of initial value problems,
    Commun. Appl. Math. Comput. Sci. 7 (2012), for the convex problem and the bisection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import scipy  # whose submodules are loaded when first named

from resode.stability.function import stability_coefficients
from resode.stability.limits import eigenvalue_step_limit
from resode.stability.unstable_rays import Complexes, Floats
from resode.tableaus import ButcherTableau, of_recurrence

MARGIN = 1e-6
"""By which |R| stays below 1 away from 0, so that rounding takes it nowhere above."""

_SOLVED = 1e-9  # excess over the weight up to which a linear program counts as solved
_TIGHT = 1e-10  # HiGHS's least tolerance
_NEAR = 0.03  # |z| below which the terms after the order tell nothing: R is known there
_LOOKS = 16  # points a stage along a ray
_CUTS = 12  # peaks a stage that become constraints in a round
_ROUNDS = 60
_CALM = 6.0  # times s²: growth of rounding up to which stages are kept; rkc's has 3.4
_RAYS = 96  # that are looked at in every round; the others once the problem is solved


@dataclass(frozen=True)
class Ellipse:
    """Symmetric about the real axis: centre c, sum g of the half axes, and q = (a − b)/(a + b)."""

    c: float
    g: float
    q: float

    def faber(self, z: Complexes, degree: int) -> np.ndarray:
        """F_0 … F_degree at points (N,), shape (degree + 1, N)."""
        first = 2 * (z - self.c) / self.g
        rows = [np.ones_like(z), first, first * first - 2 * self.q]
        for _ in range(2, degree):
            rows.append(first * rows[-1] - self.q * rows[-2])
        return np.array(rows[: degree + 1])

    def taylor(self, degree: int, terms: int) -> Floats:
        """Coefficients of 1, z, …, z^terms in F_0 … F_degree, shape (degree + 1, terms + 1)."""
        rows = np.zeros((max(3, degree + 1), terms + 1))
        rows[0, 0] = 1
        for k in range(max(2, degree)):
            rows[k + 1] = -2 * self.c / self.g * rows[k]
            rows[k + 1, 1:] += 2 / self.g * rows[k, :-1]
            if k:
                rows[k + 1] -= self.q * rows[k - 1] * (2 if k == 1 else 1)
        return rows[: degree + 1]


def ellipse_around(values: Complexes) -> Ellipse:
    """Of those with an axis on the real one that hold the values and 0, nearly that with the least a + b."""
    points: Complexes = np.append(values, 0.0)
    low, high, top = points.real.min(), points.real.max(), float(np.abs(points.imag).max())
    size = float(np.abs(points).max())
    c, half = (low + high) / 2, (high - low) / 2
    if top <= 1e-12 * size:
        return Ellipse(c, half, 1.0)
    if half <= 1e-12 * size:
        return Ellipse(0.0, top, -1.0)
    a = half * np.linspace(1.0001, 3, 400)
    heights = np.sqrt(np.maximum(1 - np.square((points.real - c) / a[:, None]), 1e-12))
    b = np.abs(points.imag / heights).max(1)
    best = int((a + b).argmin())
    return Ellipse(c, float(a[best] + b[best]), float((a[best] - b[best]) / (a[best] + b[best])))


class Problem:
    """The optimal R of one degree and order, for eigenvalues (n,) in the upper half of the unit disc.

    Args:
        values: λ, Re λ ≤ 0, none 0.
        stages: the degree.
        order: p ≤ stages.
        margin: what |R| stays below 1 by, away from 0.
    """

    def __init__(self, values: Complexes, stages: int, order: int, margin: float):
        self.stages, self.order, self.margin = stages, order, margin
        self.ellipse = ellipse_around(values)
        self.values = values
        self.power = 2 * (order // 2) + 2  # of the first term of |R(iy)|² − 1 that is free
        terms = self.ellipse.taylor(stages, max(self.power, order))[1:]
        self.offset = self.ellipse.taylor(stages, 0)[1:, 0]
        conditions = terms[:, 1 : order + 1].T  # (p, s)
        self.solve_order = np.linalg.pinv(conditions)
        self.free = np.linalg.svd(conditions)[2][order:].T  # (s, s − p)
        self.terms = terms
        count = _LOOKS * stages
        self.shares = (1 - np.cos(np.pi * np.arange(1, count + 1) / count)) / 2
        self.rays = np.unique(np.concatenate([_outermost(values), _spread(values)]))
        self.cuts: dict[tuple[float, float, float], None] = {}
        directions = np.linspace(0, np.pi, 5)
        for ray in values[self.rays[:: max(1, len(self.rays) // 16)]]:
            for share in self.shares[:: _LOOKS // 2]:
                for angle in directions[:: 4 if ray.imag == 0 else 1]:
                    self._cut(share * ray, angle)

    def _cut(self, point: complex, angle: float) -> bool:
        """Adds the constraint Re(e^{−iφ}R) ≤ 1 at a point; whether it is new."""
        key = (float(point.real), float(point.imag), round(angle, 12))
        new = key not in self.cuts
        self.cuts[key] = None
        return new

    def best(self, h: float) -> tuple[float, Floats]:
        """The least excess (|R(hλ)| − 1)/w + margin on the rays, and R's coefficients of F_k − F_k(0).

        Where no R stays below the margin the excess is a lower bound of it, or inf.
        """
        given = self._given(h)
        excess, weights = math.inf, given
        for _ in range(_ROUNDS):
            bound, weights = self._program(h, given)
            if bound > 1e3 * _SOLVED:
                return bound, weights
            excess, new = self._worst(h, weights, self.rays, bound)
            if excess <= max(bound, 0.0) + _SOLVED or not new:
                others = np.setdiff1d(np.arange(len(self.values)), self.rays)
                beyond, _ = self._worst(h, weights, others, math.inf)
                if beyond <= max(excess, 0.0) + 10 * _SOLVED:
                    return excess, weights
                worst = others[self._excess(h, weights, others).max(0).argsort()[-_RAYS:]]
                self.rays = np.union1d(self.rays, worst)
        return excess, weights

    def _given(self, h: float) -> Floats:
        """Coefficients that meet the order, of all those the least."""
        return self.solve_order @ (h ** np.arange(1, self.order + 1) / _factorials(self.order))

    def _program(self, h: float, given: Floats) -> tuple[float, Floats]:
        """The linear program with the constraints so far: its least excess, and the coefficients."""
        x, y, angle = np.array(list(self.cuts)).T
        points = x + 1j * y
        seen = h * np.abs(points) > _NEAR
        points, turn = points[seen], np.exp(-1j * angle[seen])
        weight = self._weight(h * points)
        basis = turn * self._basis(points)  # (s, N)
        rows = (basis.T @ self.free).real / weight[:, None]
        right = -self.margin - ((turn * 1).real - 1 + (basis.T @ given).real) / weight
        rows = np.hstack([rows, np.full((len(rows), 1), -1.0)])
        if self.power <= self.stages:
            row, room = self._axis_row(h, given)
            rows, right = np.vstack([rows, np.append(row, 0.0)]), np.append(right, room)
        cost = np.append(np.zeros(self.free.shape[1]), 1.0)
        bounds = [(None, None)] * self.free.shape[1] + [(-1.0, None)]
        result = scipy.optimize.linprog(
            cost, rows, right, bounds=bounds, method="highs",
            options={"primal_feasibility_tolerance": _TIGHT, "dual_feasibility_tolerance": _TIGHT},
        )  # fmt: skip
        if result.status != 0:
            return math.inf, given
        return float(result.x[-1]), given + self.free @ result.x[:-1]

    def _axis_row(self, h: float, given: Floats) -> tuple[Floats, float]:
        """A row for what is free, and what it may come to, for |R| < 1 on all rays up to |z| = `_NEAR`.

        There |R|² = 1 + 2 Re z + N |z|^q + …, where N is linear in R's coefficients.
        """
        q, half = self.power, self.power // 2
        a = np.append(1.0, 1 / _factorials(self.order))  # R's coefficients that the order sets
        signs = {k: (-1.0) ** (k - half) for k in range(q + 1)}
        row, constant = np.zeros(self.stages), 0.0
        for k in range(q + 1):
            other = q - k
            if k <= self.order and other <= self.order:
                constant += signs[k] * a[k] * a[other]
            elif k > self.order:
                row += 2 * signs[k] * a[other] * self.terms[:, k] / h**k
        size = np.abs(self.values)
        room = 2 * np.abs(self.values.real) / size / np.minimum(h * size, _NEAR) ** (q - 1)
        return row @ self.free, float(room.min()) - self.margin - constant - float(row @ given)

    def _basis(self, points: Complexes) -> np.ndarray:
        return self.ellipse.faber(points, self.stages)[1:] - self.offset[:, None]

    def _weight(self, z: Complexes) -> Floats:
        return np.minimum(1.0, np.abs(z.real) + np.abs(z) ** self.power)

    def _at(self, h: float, weights: Floats, points: Complexes) -> tuple[Floats, Floats]:
        """The excess and the angle of R at points of any shape."""
        flat = points.reshape(-1)
        r = 1 + weights @ self._basis(flat)
        z = h * flat
        known = np.abs(z) <= _NEAR
        excess = (np.abs(r) - 1) / np.where(known, 1.0, self._weight(z)) + self.margin
        excess[known] = -1.0
        return excess.reshape(points.shape), np.angle(r).reshape(points.shape)

    def _excess(self, h: float, weights: Floats, rays: np.ndarray) -> Floats:
        return self._at(h, weights, self.shares[:, None] * self.values[rays])[0]

    def _worst(self, h: float, weights: Floats, rays: np.ndarray, above: float) -> tuple[float, int]:
        """The largest excess on some rays, and how many of its peaks became new constraints."""
        if not len(rays):
            return -1.0, 0
        excess = self._excess(h, weights, rays)
        before, after = np.vstack([excess[:1], excess[:-1]]), np.vstack([excess[1:], excess[-1:]])
        # A peak between two looks may be higher by what a parabola through three of them is.
        bend = np.maximum(np.maximum(excess - before, excess - after), 0)
        peaks = (excess >= before) & (excess >= after) & (excess + bend > above)
        place, ray = np.nonzero(peaks)
        order = np.argsort(-excess[place, ray])[: _CUTS * self.stages]
        place, ray = place[order], ray[order]
        if not len(place):
            return float(excess.max()), 0
        low = np.append(0.0, self.shares)[place]
        high = np.append(self.shares, 1.0)[np.minimum(place + 1, len(self.shares))]
        middle, width = (low + high) / 2, (high - low) / 2
        values, lines = self.values[rays[ray]], np.arange(len(place))
        for _ in range(9):
            at = np.clip(middle[:, None] + width[:, None] * np.linspace(-1, 1, 9), 0.0, 1.0)
            best = self._at(h, weights, at * values[:, None])[0].argmax(1)
            middle, width = at[lines, best], width / 4
        top, angle = self._at(h, weights, middle * values)
        new = sum(
            self._cut(complex(p), float(f))
            for p, f, t in zip(middle * values, angle, top, strict=True)
            if t > above + _SOLVED / 2
        )
        return max(float(excess.max()), float(top.max())), new

    def largest(self) -> tuple[float, Floats] | None:
        """The largest step, to 1e-9 of it, and R's coefficients; None where there is none worth the name."""
        if self.stages == self.order:
            h = float(
                eigenvalue_step_limit(
                    self.values, _in_stages(self.ellipse, 1.0, self._given(1.0), self.order, "", "")
                ).step
            )
            return (h, self._given(h)) if h else None
        low, high = 2 * _NEAR, 2.0 * self.stages**2
        excess, weights = self.best(low)
        if excess > 10 * _SOLVED:
            return None
        while high - low > 1e-9 * high:
            middle = math.sqrt(low * high) if high > 1.5 * low else (low + high) / 2
            excess, tried = self.best(middle)
            if excess <= 10 * _SOLVED:
                low, weights = middle, tried
            else:
                high = middle
        return low, weights

    def tableau(self, h: float, weights: Floats, name: str = "", source: str = "") -> ButcherTableau:
        """The method of R = 1 + Σ w_k (F_k − F_k(0)) at λ = z/h, in stages whose rounding does not grow.

        Where those of the ellipse around the spectrum would let it grow, an ellipse is sought that fits R
        better.
        """
        made = _in_stages(self.ellipse, h, weights, self.order, name, source)
        some = self.values[self.rays[:: max(1, len(self.rays) // 60)]]
        points = np.append((self.shares[:: _LOOKS // 4, None] * some).reshape(-1), some)
        if rounding_growth(made, h * points) <= _CALM * self.stages**2:
            return made
        right = weights @ self._basis(points)

        def fitted(at: Floats) -> tuple[Ellipse, Floats]:
            a, b = np.exp(at[:2])
            e = Ellipse(float(at[2]), float(a + b), float((a - b) / (a + b)))
            basis = e.faber(points, self.stages)[1:] - e.taylor(self.stages, 0)[1:]
            both = np.hstack([basis.real, basis.imag]).T
            found: Any = np.linalg.lstsq(both, np.append(right.real, right.imag), rcond=None)[0]
            return e, found

        def growth(at: Floats) -> float:
            if np.abs(at).max() > 12:
                return 1e6
            e, w = fitted(at)
            tried = _in_stages(e, h, w, self.order, "", "", exact=False)
            return float(np.log(np.minimum(rounding_growth(tried, h * points), 1e30)))

        e = self.ellipse
        start = [np.log(max(e.g * (1 + t * e.q) / 2, 1e-3 * e.g)) for t in (1, -1)]
        settings = {"maxiter": 120, "xatol": 1e-3, "fatol": 1e-2}
        best = scipy.optimize.minimize(growth, [*start, e.c], method="Nelder-Mead", options=settings)
        ellipse = fitted(best.x)[0]
        better = _in_stages(ellipse, h, _converted(made, ellipse, h), self.order, name, source)
        return min(made, better, key=lambda t: rounding_growth(t, h * points))


def rounding_growth(tableau: ButcherTableau | _Rows, z: Complexes) -> float:
    """By how much R(z)x of a method with a recurrence may be off, in units of rounding of x, at worst over z.

    Each row rounds its own terms; what it loses goes on to the result as the derivative of R by the row.
    """
    rows, weights = tableau.recurrence_rows, tableau.recurrence_sum
    before = d = np.zeros_like(z)
    lost, parts = [], np.zeros(z.shape)
    with np.errstate(all="ignore"):
        for (mu, nu, slope, at_start), w in zip(rows, weights, strict=True):
            sizes = (
                np.abs(mu * d) + np.abs(nu * before) + np.abs(z) * (np.abs(slope * (1 + d)) + abs(at_start))
            )
            before, d = d, mu * d + nu * before + z * (slope * (1 + d) + at_start)
            lost.append(sizes)
            parts = parts + np.abs(w * d)
        later = last = np.zeros_like(z)  # derivatives by the next row but one, and by the next row
        next_rows = [*rows[1:], (0.0, 0.0, 0.0, 0.0)]
        after_next = [*rows[2:], (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)]
        for j in range(len(rows) - 1, -1, -1):
            mu, _, slope, _ = next_rows[j]
            later, last = last, weights[j] + (mu + z * slope) * last + after_next[j][1] * later
            parts = parts + np.abs(last) * lost[j]
    return float(np.nan_to_num(parts, nan=np.inf).max())


def _in_stages(
    e: Ellipse, h: float, weights: Floats, order: int, name: str, source: str, exact: bool = True
) -> Any:
    """The method of R(z) = 1 + Σ w_k (F_k − F_k(0)) at λ = z/h.

    Its stages are x + d_k with d_k = α_k (F_k − F_k(0))x and α_k at most 1/(1 + |q|^k), so that they stay
    of x's size, and such that their times do not lie beyond the step. The weights are corrected by their
    rounding, for the order to hold exactly; where `exact` is False nothing is, and the rows and weights
    alone are made.
    """
    s, q = len(weights), e.q
    slope, shift = 2 / (h * e.g), -2 * e.c / e.g
    start, times = e.taylor(s, 1).T.tolist()
    scale = [1.0, *(1 / max(1 + abs(q) ** k, abs(times[k]) / h) for k in range(1, s + 1))]
    rows = [(0.0, 0.0, scale[1] * slope, 0.0)]
    for k in range(1, s):
        up = scale[k + 1] / scale[k]
        down = 0.0 if k == 1 else -q * scale[k + 1] / scale[k - 1]
        at_start = scale[k + 1] * slope * (start[k] - 1 / scale[k])
        rows.append((shift * up, down, up * slope, at_start))
    chosen = [float(w) / a for w, a in zip(weights, scale[1:], strict=True)]
    if not exact:
        return _Rows(tuple(rows), tuple(chosen))
    exactly = [tuple(map(Fraction, row)) for row in rows]
    corrected = _to_order(exactly, [Fraction(w) for w in chosen], order)
    return of_recurrence(name, exactly, corrected, min(order, 2), source)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Rows:
    """What `rounding_growth` reads of a method."""

    recurrence_rows: tuple[tuple[float, ...], ...]
    recurrence_sum: tuple[float, ...]


def _converted(tableau: ButcherTableau, e: Ellipse, h: float) -> Floats:
    """The weights of a method's R for another ellipse, exactly but for a last rounding."""
    s = len(tableau.b)
    shift, slope, q = -2 * Fraction(e.c) / Fraction(e.g), 2 / Fraction(e.g), Fraction(e.q)
    basis = [[Fraction(1)], [shift, slope]]
    for k in range(1, s):
        new = [shift * c for c in basis[k]] + [Fraction(0)]
        for i, c in enumerate(basis[k]):
            new[i + 1] += slope * c
        for i, c in enumerate(basis[k - 1]):
            new[i] -= q * c * (2 if k == 1 else 1)
        basis.append(new)
    rest = [c * Fraction(h) ** k for k, c in enumerate(stability_coefficients(tableau)[0])]
    rest += [Fraction(0)] * (s + 1 - len(rest))
    weights = [Fraction(0)] * (s + 1)
    for k in range(s, 0, -1):
        weights[k] = rest[k] / basis[k][k]
        for i, c in enumerate(basis[k]):
            rest[i] -= weights[k] * c
    return np.array([float(w) for w in weights[1:]])


def _to_order(rows: Sequence[Sequence[Fraction]], weights: list[Fraction], order: int) -> list[Fraction]:
    """Weights that are changed, by rounding, so that Σ w_j d_j = z + … + z^p/p! + O(z^{p+1})."""
    before, d = [[Fraction(0)] * (order + 1) for _ in range(2)]
    terms = []
    for mu, nu, slope, at_start in rows:
        rise = [Fraction(0), *(slope * c for c in d[:-1])]
        rise[1] += slope + at_start
        before, d = d, [mu * x + nu * y + z for x, y, z in zip(d, before, rise, strict=True)]
        terms.append(d)
    for k in range(
        order, 0, -1
    ):  # d_k is of degree k, so that w_k sets the term z^k once the later ones are set
        missing = Fraction(1, math.factorial(k)) - sum(
            (w * t[k] for w, t in zip(weights, terms, strict=True)), Fraction(0)
        )
        weights[k - 1] += missing / terms[k - 1][k]
    return weights


def _factorials(n: int) -> Floats:
    return np.cumprod(np.arange(1.0, n + 1)).astype(np.float64)


def _outermost(values: Complexes) -> np.ndarray:
    """The eigenvalue of largest modulus in each of some directions."""
    bins = np.round(np.angle(values) / np.pi * 4 * _RAYS).astype(int)
    order = np.lexsort((-np.abs(values), bins))
    return order[np.append(True, np.diff(bins[order]) != 0)][: 4 * _RAYS]


def _spread(values: Complexes) -> np.ndarray:
    """A few of the largest."""
    return np.argsort(-np.abs(values))[:_RAYS]
