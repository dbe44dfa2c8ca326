"""Polynomials with rational coefficients: where they are positive, decided without rounding.

Coefficients stand lowest degree first. Descartes' rule of signs isolates the positive roots: in the
Bernstein basis of an interval, no change of sign means no root in it, one means exactly one, and more
mean halving the interval. All of it is done with integers.

Source:
    Collins & Akritas, Polynomial real root isolation using Descartes' rule of signs (1976);
    Farin, Curves and Surfaces for CAGD (2002), 5.2 (subdivision).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

Polynomial = Sequence[Fraction | int]
Intervals = list[tuple[float, float]]

_PRIME = 2**61 - 1


def positive_intervals(coefficients: Polynomial) -> Intervals:
    """Open intervals of (0, ∞) where the polynomial is positive.

    Returns:
        Disjoint intervals in order, ends rounded once to float64, inf where there is no end. A root
        at which the polynomial only touches 0 does not divide an interval.

    Example:
        >>> positive_intervals([-6, 11, -6, 1])  # (x - 1)(x - 2)(x - 3)
        [(1.0, 2.0), (3.0, inf)]
        >>> positive_intervals([-1, 2, -1])  # -(x - 1)² is never positive
        []
    """
    poly = _integers(coefficients)
    if not poly:
        return []
    roots = _positive_roots(_square_free(poly))
    cuts = [0.0, *(float((lo + hi) / 2) for lo, hi in roots), math.inf]
    found: Intervals = []
    for i, point in enumerate(_points_between(roots)):
        if _value(poly, point.numerator, point.denominator) <= 0:
            continue
        start = found.pop()[0] if found and found[-1][1] == cuts[i] else cuts[i]
        found.append((start, cuts[i + 1]))
    return found


def common_factor(a: Polynomial, b: Polynomial) -> list[Fraction]:
    """The greatest common divisor, scaled to a constant term of 1 (a leading one if that is 0).

    Example:
        >>> common_factor([1, 3, 2], [1, 1, -2])  # (1 + x)(1 + 2x) and (1 + 2x)(1 - x)
        [Fraction(1, 1), Fraction(2, 1)]
    """
    left, right = _trimmed(a), _trimmed(b)
    while right:
        left, right = right, [Fraction(c) for c in _primitive(divide(left, right)[1])]
    scale = left[0] or left[-1]
    return [c / scale for c in left]


def divide(a: Polynomial, b: Polynomial) -> tuple[list[Fraction], list[Fraction]]:
    """Quotient and remainder of a by b, whose last coefficient is not 0.

    Example:
        >>> quotient, rest = divide([2, 3, 1], [1, 1])
        >>> [str(c) for c in quotient], rest
        (['2', '1'], [])
    """
    rest = [Fraction(c) for c in a]
    quotient = [Fraction(0)] * max(len(a) - len(b) + 1, 0)
    for shift in reversed(range(len(quotient))):
        quotient[shift] = rest[shift + len(b) - 1] / b[-1]
        for i, c in enumerate(b):
            rest[shift + i] -= quotient[shift] * c
    return quotient, _trimmed(rest[: len(b) - 1])


def roots_lie_right(coefficients: Polynomial) -> bool:
    """Whether every complex root has a positive real part (Routh's array, exactly).

    Example:
        >>> roots_lie_right([1, -1]), roots_lie_right([1, 0, 1]), roots_lie_right([1, 1])
        (True, False, False)
    """
    mirrored = [c * (-1) ** n for n, c in enumerate(_trimmed(coefficients))][::-1]
    above, row = mirrored[0::2], mirrored[1::2]
    for _ in range(len(mirrored) - 1):
        if row[0] * above[0] <= 0:
            return False
        row_after = [
            a - above[0] / row[0] * (row[i + 1] if i + 1 < len(row) else 0) for i, a in enumerate(above[1:])
        ]
        above, row = row, row_after or [Fraction(0)]
    return True


def _trimmed(coefficients: Polynomial) -> list[Fraction]:
    exact = [Fraction(c) for c in coefficients]
    while exact and exact[-1] == 0:
        exact.pop()
    return exact


def _primitive(coefficients: Polynomial) -> list[int]:
    """A positive multiple with coprime integer coefficients."""
    common = math.lcm(*(Fraction(c).denominator for c in coefficients))
    whole = [int(c * common) for c in coefficients]
    content = math.gcd(*whole) or 1
    return [c // content for c in whole]


def _integers(coefficients: Polynomial) -> list[int]:
    """A positive multiple of the polynomial over a power of x: coprime integers, both ends not 0."""
    exact = _trimmed(coefficients)
    while exact and exact[0] == 0:
        exact.pop(0)
    return _primitive(exact)


def _value(poly: list[int], p: int, q: int) -> int:
    """q^d times the value at p/q, q > 0: its sign in integers."""
    value, power = poly[-1], 1
    for c in reversed(poly[:-1]):
        power *= q
        value = value * p + c * power
    return value


def _square_free(poly: list[int]) -> list[int]:
    """The same roots, each of them simple: f / gcd(f, f')."""
    slope = [n * c for n, c in enumerate(poly)][1:]
    if len(poly) <= 2 or _coprime_modulo_prime(poly, slope):
        return poly
    return _integers(divide(poly, common_factor(poly, slope))[0])


def _coprime_modulo_prime(a: list[int], b: list[int]) -> bool:
    """Whether a and b are coprime modulo a prime; then they are so over the rationals (not conversely)."""
    if a[-1] % _PRIME == 0:
        return False
    a, b = [c % _PRIME for c in a], [c % _PRIME for c in b]
    while any(b):
        while b[-1] == 0:
            b.pop()
        inverse = pow(b[-1], -1, _PRIME)
        while len(a) >= len(b):
            factor, shift = a[-1] * inverse % _PRIME, len(a) - len(b)
            for i, c in enumerate(b):
                a[shift + i] = (a[shift + i] - factor * c) % _PRIME
            a.pop()
        a, b = b, a
    return len(a) == 1


def _positive_roots(poly: list[int]) -> list[tuple[Fraction, Fraction]]:
    """The positive roots of a square-free polynomial, in brackets of relative width 2⁻⁶² or less."""
    degree = len(poly) - 1
    if degree == 0:
        return []
    shift = round((math.log2(abs(poly[0])) - math.log2(abs(poly[-1]))) / degree)  # x = 2^shift·u
    scaled = [c << (shift * n if shift >= 0 else -shift * (degree - n)) for n, c in enumerate(poly)]
    bernstein = [c * math.factorial(n) * math.factorial(degree - n) for n, c in enumerate(scaled)]
    roots = []
    cells = [(0, 0, bernstein)]  # the cell k/2^level < t < (k+1)/2^level of t = u/(1+u)
    while cells:
        k, level, b = cells.pop()
        signs = [c > 0 for c in b if c]
        changes = sum(s != t for s, t in itertools.pairwise(signs))
        if changes == 1:
            roots.append(_bisect(scaled, k, level, positive_first=signs[0]))
        elif changes > 1:
            left, right = _halves(b)
            if right[0] == 0:
                middle = Fraction(2 * k + 1, 2 ** (level + 1) - 2 * k - 1)
                roots.append((middle, middle))
            cells += [(2 * k, level + 1, left), (2 * k + 1, level + 1, right)]
    return sorted((lo * Fraction(2) ** shift, hi * Fraction(2) ** shift) for lo, hi in roots)


def _halves(b: list[int]) -> tuple[list[int], list[int]]:
    """De Casteljau at the middle; both halves come out times 2^degree."""
    degree, row, left, right = len(b) - 1, b, [], []
    for n in range(degree + 1):
        left.append(row[0] << (degree - n))
        right.append(row[-1] << (degree - n))
        row = [p + q for p, q in itertools.pairwise(row)]
    return left, right[::-1]


def _bisect(poly: list[int], k: int, level: int, positive_first: bool) -> tuple[Fraction, Fraction]:
    """A bracket in u = t/(1−t) of the one root in a cell, given the sign after its left end."""
    lo = k
    while lo * (2**level - lo - 1) < 2 ** (level + 62):
        lo, level = 2 * lo, level + 1
        value = _value(poly, lo + 1, 2**level - lo - 1)
        if value == 0:
            root = Fraction(lo + 1, 2**level - lo - 1)
            return root, root
        if (value > 0) == positive_first:
            lo += 1
    return Fraction(lo, 2**level - lo), Fraction(lo + 1, 2**level - lo - 1)


def _points_between(roots: list[tuple[Fraction, Fraction]]) -> list[Fraction]:
    """One point before, one between and one after the roots."""
    if not roots:
        return [Fraction(1)]
    inner = [(left[1] + right[0]) / 2 for left, right in itertools.pairwise(roots)]
    return [roots[0][0] / 2, *inner, roots[-1][1] + 1]
