r"""Stability of the Adams-Bashforth method that "explicit_adams" is: of fourth order, in equal steps.

On x' = λx, with z = hλ, the method

    x_{n+1} = x_n + h/24 (55 f_n − 59 f_{n−1} + 37 f_{n−2} − 9 f_{n−3})

has solutions Σ c_i ζ_i^n, ζ_i the roots of ζ⁴ − ζ³ − z (55 ζ³ − 59 ζ² + 37 ζ − 9)/24. It is stable at z where
all of them lie in the unit disc (the root condition).

Source:
    Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, III.1 and III.3; Hairer & Wanner,
    Solving Ordinary Differential Equations II, V.1.
"""

from __future__ import annotations

import numpy as np

from resode.stability.unstable_rays import Complexes, Floats

EXPLICIT_ADAMS = "explicit_adams"
ORDER = 4
"""Of the method by that name; of order 8 and more the region is so small that hardly a step is in it."""

_SIGMA = np.array([55, -59, 37, -9]) / 24
_SLACK = 1e-11  # of the roots' moduli, for rounding
_REACH = 1.0  # the region lies within |z| < 0.5
_LOOKS = 512


class AdamsRays:
    """Where along a ray the method is unstable, as `RayPolynomials` tells it for a one-step method.

    Args:
        growth: what all |ζ| may reach.
    """

    def __init__(self, growth: float = 1.0):
        self.growth = growth

    def unstable(self, eigenvalues: Complexes) -> Floats:
        """Intervals of h > 0 in which some |ζ| at h·λ is too large, for each λ: (M, K, 2), padded by inf."""
        modulus = np.abs(eigenvalues)
        unit = eigenvalues / modulus
        looks = np.linspace(0, _REACH, _LOOKS + 1)
        bad = ~self._stable(looks * unit[:, None])
        bad[:, 0] = unit.real > 0 if self.growth == 1 else False  # what grows by itself grows at any step
        rows = []
        for u, row in zip(unit, bad, strict=True):
            turns = [self._turn(u, looks[i], looks[i + 1]) for i in np.flatnonzero(row[1:] != row[:-1])]
            ends = [0.0, *turns, np.inf] if row[0] else [*turns, np.inf]
            rows.append(np.reshape(ends, (-1, 2)))
        width = max((len(row) for row in rows), default=0)
        result = np.full((len(rows), width, 2), np.inf)
        for line, row in zip(result, rows, strict=True):
            line[: len(row)] = row
        return result / modulus[:, None, None]

    def _stable(self, z: Complexes) -> np.ndarray:
        """Whether the root condition holds at z, of z's shape."""
        scale = (self.growth * (1 + _SLACK)) ** np.arange(4, -1, -1)
        a = scale * (np.array([1, -1, 0, 0, 0]) - z[..., None] * np.array([0, *_SIGMA]))
        inside = np.ones(z.shape, dtype=bool)
        while a.shape[-1] > 1:  # Schur and Cohn: |a_0| > |a_n|, and the same of the reduced polynomial
            first, last = a[..., :1], a[..., -1:]
            inside &= np.abs(first[..., 0]) > np.abs(last[..., 0])
            a = (first.conj() * a - last * a[..., ::-1].conj())[..., :-1]
            a = a / np.maximum(np.abs(a).max(axis=-1, keepdims=True), 1e-300)  # 0 of roots on the circle
        return inside

    def _turn(self, unit: complex, low: float, high: float) -> float:
        """Where between two radii, of which one is stable, stability turns."""
        first = self._stable(np.array([low * unit]))[0]
        for _ in range(50):
            middle = 0.5 * (low + high)
            same = self._stable(np.array([middle * unit]))[0] == first
            low, high = (middle, high) if same else (low, middle)
        return high
