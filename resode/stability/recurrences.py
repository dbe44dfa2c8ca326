r"""Where a method of many stages is unstable along rays h·λ, by values of R that its recurrence gives.

In exact fractions, as `resode.stability.unstable_rays` works, a polynomial of degree 50 takes minutes.
Values are right to about s·ε instead. |R|² along a ray is a polynomial of degree 2s; it is looked at 16 s
times, its extrema between looks are sought where they lie near the bound, and its crossings halved down to
rounding. Near 0, where |R|² − 1 is too small for values, the first terms of its series tell the sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from resode.stability.function import stability_function
from resode.stability.polynomials import Intervals
from resode.stability.unstable_rays import Complexes, Floats
from resode.tableaus import ButcherTableau

EXACT_UP_TO = 20
"""Stages up to which exact fractions serve."""

_TERMS = 10  # of the series about 0, used for
_NEAR = 0.05  # |z| below it
_LOOKS = 16  # a stage
_VALUES = 2**20  # at a time
_EPS = 2.0**-52


class RecurrenceRays:
    """Where along rays |R|² exceeds G, as `RayPolynomials` tells it in exact fractions.

    Args:
        tableau: a method with a recurrence.
        growth: G, at least 1.
    """

    covers_left_half = False

    def __init__(self, tableau: ButcherTableau, growth: float = 1.0):
        self.tableau, self.growth = tableau, growth
        self.stages = len(tableau.b)
        self.slack = 16 * self.stages * _EPS
        self.series = _series(tableau)
        # Beyond its zeros |R| grows along every ray.
        zeros = np.linalg.eigvals(_companion(tableau))
        self.reach = 1.05 * float(np.abs(zeros).max())

    def unstable_exactly(self, direction: complex) -> Intervals:
        """Intervals of h > 0 where |R|² > G along h·direction, to s·ε over the slope of |R|."""
        row = self.unstable(np.array([direction], dtype=complex))[0]
        return [(float(a), float(b)) for a, b in row if a < np.inf]

    def unstable(self, eigenvalues: Complexes) -> Floats:
        """Intervals of h > 0 where |R|² > G at h·λ for each λ (M,), not 0: (M, K, 2), filled with inf."""
        modulus = np.abs(eigenvalues)
        many = max(1, _VALUES // (_LOOKS * self.stages))
        parts = [self._of(u) for u in np.split(eigenvalues / modulus, range(many, len(modulus), many))]
        rows = [row for part in parts for row in part]
        width = max((len(row) for row in rows), default=0)
        result = np.full((len(rows), width, 2), np.inf)
        for line, row in zip(result, rows, strict=True):
            line[: len(row)] = row
        return result / modulus[:, None, None]

    def excess(self, r: Floats, unit: Complexes) -> Floats:
        """|R|² − G at r·unit, what rounding explains taken off."""
        z = r * unit
        value = stability_function(self.tableau, torch.from_numpy(np.ascontiguousarray(z)))
        with np.errstate(over="ignore"):
            far = np.square(value.abs().numpy()) - self.growth - self.slack
        near = r < _NEAR
        if near.any():
            powers = z[near] ** np.arange(_TERMS + 1)[:, None]
            rest = np.tensordot(self.series[1:], powers[1:], 1)  # R − 1
            far[near] = 2 * rest.real + np.square(np.abs(rest)) - (self.growth - 1)
        return far

    def _of(self, unit: Complexes) -> list[Floats]:
        """The unstable intervals of some directions, each (K, 2)."""
        if not len(unit):
            return []
        looks = _LOOKS * self.stages
        r = self.reach * (1 - np.cos(np.linspace(0, np.pi, looks + 1)[1:])) / 2
        r = np.concatenate([np.geomspace(1e-3 * min(r[0], _NEAR), r[0], 12)[:-1], r])
        values = self.excess(np.broadcast_to(r, (len(unit), len(r))), unit[:, None])
        extra = self._extrema(r, values, unit)
        found = []
        for i, u in enumerate(unit):
            at, value = r, values[i]
            if len(extra[i]):
                at = np.concatenate([r, extra[i][:, 0]])
                order = np.argsort(at)
                at, value = at[order], np.concatenate([value, extra[i][:, 1]])[order]
            bad = value > 0
            turns = np.flatnonzero(bad[1:] != bad[:-1])
            ends = self._crossings(at[turns], at[turns + 1], u, bad[turns])
            ends = [*([0.0] if bad[0] else []), *ends, np.inf]
            found.append(np.reshape(ends, (-1, 2)) if len(ends) % 2 == 0 else np.reshape(ends[:-1], (-1, 2)))
        return found

    def _extrema(self, r: Floats, values: Floats, unit: Complexes) -> list[Floats]:
        """Extrema between looks of another sign than their neighbours: (r, value), of each ray."""
        left, here, right = values[:, :-2], values[:, 1:-1], values[:, 2:]
        with np.errstate(invalid="ignore", over="ignore"):
            bend = left - 2 * here + right
            guess = here - np.square(right - left) / np.where(bend == 0, np.inf, 8 * bend)
        top = (here <= 0) & (here >= left) & (here >= right) & (guess > -0.1 * np.abs(bend))
        low = (here > 0) & (here <= left) & (here <= right) & (guess < 0.1 * np.abs(bend))
        found: list[list[tuple[float, float]]] = [[] for _ in unit]
        row, place = np.nonzero(top | low)
        if not len(row):
            return [np.zeros((0, 2))] * len(unit)
        sign = np.where(top[row, place], 1.0, -1.0)
        middle, width = r[place + 1], (r[place + 2] - r[place]) / 2
        shares = np.linspace(-1, 1, 9)
        for _ in range(12):
            at = np.maximum(middle[:, None] + width[:, None] * shares, 0.0)
            best = (sign[:, None] * self.excess(at, unit[row, None])).argmax(1)
            middle, width = at[np.arange(len(row)), best], width / 4
        value = self.excess(middle, unit[row])
        for i, at, v, s in zip(row, middle, value, sign, strict=True):
            if s * v > 0:
                found[i].append((at, v))
        return [np.array(f).reshape(-1, 2) for f in found]

    def _crossings(self, low: Floats, high: Floats, unit: complex, bad: np.ndarray) -> list[float]:
        """Where between two radii, `bad` or not at the lower one, that changes."""
        for _ in range(56):
            middle = (low + high) / 2
            same = (self.excess(middle, np.broadcast_to(unit, middle.shape)) > 0) == bad
            low, high = np.where(same, middle, low), np.where(same, high, middle)
        return ((low + high) / 2).tolist()


def _series(tableau: ButcherTableau) -> Floats:
    """R's coefficients up to z^_TERMS, those up to the order as the order has them."""
    before, d = np.zeros((2, _TERMS + 1))
    total = np.zeros(_TERMS + 1)
    one = np.eye(_TERMS + 1)
    for (mu, nu, slope, at_start), w in zip(tableau.recurrence_rows, tableau.recurrence_sum, strict=True):
        rise = np.concatenate([[0.0], slope * d[:-1]]) + (slope + at_start) * one[1]
        before, d = d, mu * d + nu * before + rise
        total = total + w * d
    known = 1 / np.cumprod(np.maximum(np.arange(tableau.order + 1), 1))
    total[: len(known)] = known
    return total


def _companion(tableau: ButcherTableau) -> Floats:
    """A matrix whose eigenvalues are the zeros of R.

    With d_0 = 0 and p_j = 1 + d_j the recurrence reads z (μ̃_j p_{j−1} + γ̃_j p_0) = d_j − μ_j d_{j−1} −
    ν_j d_{j−2} for j = 1 … s, and R = 0 says that the d weigh up to −1: a pencil in (p_0, d_1, …, d_{s−1}).
    """
    rows, weights = tableau.recurrence_rows, tableau.recurrence_sum
    s = len(rows)
    left, right = np.zeros((2, s, s))  # left v = z right v with v = (p_0, d_1, …, d_{s−1})
    for j, (mu, nu, slope, at_start) in enumerate(rows, 1):
        right[j - 1, 0] += slope + at_start
        if j > 1:
            right[j - 1, j - 1] += slope
            left[j - 1, j - 1] -= mu
        if j > 2:
            left[j - 1, j - 2] -= nu
        if j < s:
            left[j - 1, j] += 1
        else:  # d_s = −(p_0 + Σ w_j d_j) / w_s
            left[j - 1] -= np.array([1.0, *weights[:-1]]) / weights[-1]
    matrix: Any = np.linalg.solve(right, left)
    return matrix
