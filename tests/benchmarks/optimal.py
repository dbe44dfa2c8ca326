"""Designed methods against the optimum itself: the conditions of Karush, Kuhn and Tucker solved at 50 digits.

python -m tests.benchmarks.optimal

The largest h with |R(hrλ)|² ≤ 1 for 0 ≤ r ≤ 1 and all λ, over R's free coefficients a_k, has multipliers μ_j ≥ 0 with
Σ μ_j ∂|R_j|²/∂a_k = 0 and Σ μ_j ∂|R_j|²/∂h = 1 at the points j where |R| = 1. Newton's method in mpmath solves these,
with the places on rays where |R| is largest, from a design's polynomial on; what it shares with the design is the
start alone.
"""

from __future__ import annotations

import mpmath
import numpy as np

import resode
from resode.stability import stability_coefficients

DIGITS = 50


def negative_axis() -> np.ndarray:
    """One eigenvalue, whose ray is the negative axis."""
    return np.array([-1.0 + 0j])


def chebyshev(n: int) -> np.ndarray:
    """Of the Chebyshev differentiation matrix on n + 1 points with one boundary value, times −1 where it grows.

    Trefethen, Spectral Methods in MATLAB (2000), chapters 6 and 10.
    """
    k = np.arange(n + 1)
    x, c = np.cos(np.pi * k / n), np.where((k == 0) | (k == n), 2.0, 1.0) * (-1.0) ** k
    d = np.outer(c, 1 / c) / (x[:, None] - x + np.eye(n + 1))
    d -= np.diag(d.sum(1))
    values = np.linalg.eigvals(d[1:, 1:])
    return values if values.real.max() < 0 else -values


def active(values: np.ndarray, a: list[float], h: float, near: float) -> list[tuple[complex, float]]:
    """(λ, r) of the peaks of |R(hrλ)| along rays that reach 1 to `near`; r = 1 for those at an end."""
    found = []
    r = (1 - np.cos(np.linspace(0, np.pi, 4001))) / 2
    for value in values[values.imag >= 0]:
        size = np.abs(np.polyval(a[::-1], h * r * value))
        inner = (
            (size[1:-1] >= size[:-2])
            & (size[1:-1] > size[2:])
            & (size[1:-1] > 1 - near)
            & (h * r[1:-1] * abs(value) > 0.5)
        )
        found += [(complex(value), float(r[i + 1])) for i in np.flatnonzero(inner)]
        if size[-1] > 1 - near and size[-1] >= size[-2]:
            found.append((complex(value), 1.0))
    return found


def solved(values: np.ndarray, stages: int, order: int, near: float = 1e-4) -> tuple[mpmath.mpf, float]:
    """The optimal step at 50 digits, and the step of the design."""
    method = resode.design_method(values, stages, order)
    step = float(resode.max_stable_step(eigenvalues=values, solver=method))
    with mpmath.workdps(DIGITS):
        a = [mpmath.mpf(c.numerator) / c.denominator for c in stability_coefficients(method)[0]]
        points = active(values, [float(c) for c in a], step, near)
        inner = [i for i, (_, r) in enumerate(points) if r < 1]
        lines = [mpmath.mpc(value) for value, _ in points]
        fixed = [mpmath.mpf(1) / mpmath.factorial(k) for k in range(order + 1)]
        free = stages - order

        def parts(u):
            u = [x * unit for x, unit in zip(u, units, strict=True)]
            rest, h, at, mu = (
                u[:free],
                u[free],
                u[free + 1 : free + 1 + len(inner)],
                u[free + 1 + len(inner) :],
            )
            r = [mpmath.mpf(1)] * len(points)
            for i, value in zip(inner, at, strict=True):
                r[i] = value
            return [*fixed, *rest], h, r, mu

        def equations(*u):
            a, h, r, mu = parts(u)
            size, slope, gradients = [], [], []
            for value, share in zip(lines, r, strict=True):
                z = h * share * value
                big, change = (
                    mpmath.polyval(a[::-1], z),
                    mpmath.polyval([k * c for k, c in enumerate(a)][:0:-1], z),
                )
                size.append(abs(big) ** 2 - 1)
                slope.append(2 * mpmath.re(mpmath.conj(big) * change * value))
                powers = zip(units, range(order + 1, stages + 1), strict=False)
                gradients.append([2 * mpmath.re(mpmath.conj(big) * unit * z**k) for unit, k in powers])
            still = [sum(m * g[k] for m, g in zip(mu, gradients, strict=True)) for k in range(free)]
            rise = h * sum(m * s * share for m, s, share in zip(mu, slope, r, strict=True)) - 1
            return [*size, *(h * slope[i] for i in inner), *still, rise]

        units = [*map(abs, a[order + 1 :]), mpmath.mpf(step), *[mpmath.mpf(1)] * (len(inner) + len(points))]
        start = [*map(mpmath.sign, a[order + 1 :]), mpmath.mpf(1), *(points[i][1] for i in inner)]
        zero = [mpmath.mpf(0)] * len(points)
        base = equations(*start, *zero)
        matrix = mpmath.matrix(free + 1, len(points))
        for j in range(len(points)):
            unit = [mpmath.mpf(i == j) for i in range(len(points))]
            column = equations(*start, *unit)[-free - 1 :]
            for k in range(free + 1):
                matrix[k, j] = column[k] - base[-free - 1 :][k]
        right = mpmath.matrix([-b for b in base[-free - 1 :]])
        mu = mpmath.qr_solve(matrix, right)[0] if len(points) <= free + 1 else _least(matrix, right)
        root = mpmath.findroot(equations, [*start, *mu], tol=mpmath.mpf(10) ** (-DIGITS), maxsteps=40)
        _, h, _, mu = parts(list(root))
        assert all(m > 0 for m in mu), "a multiplier is negative: not the optimum"
        return +h, step


def _least(matrix, right):
    """The shortest solution."""
    other = matrix.T
    return other * mpmath.lu_solve(matrix * other, right)


def main() -> None:
    """Prints a table."""
    print(
        "| spectrum | stages | order | optimum | designed, over it, less 1 |\n| --- | --- | --- | --- | --- |"
    )
    cases = [("negative axis", negative_axis(), s, p) for s in (4, 8, 12) for p in (1, 2)]
    cases += [("Chebyshev, 10 points", chebyshev(10), s, p) for s in (4, 6, 8) for p in (1, 2)]
    cases += [("Chebyshev, 20 points", chebyshev(20), s, p) for s in (6, 8) for p in (1, 2)]
    for name, values, stages, order in cases:
        h, step = solved(values, stages, order)
        print(
            f"| {name} | {stages} | {order} | {mpmath.nstr(h, 30)} | {float(step / h - 1):.1e} |", flush=True
        )


if __name__ == "__main__":
    main()
