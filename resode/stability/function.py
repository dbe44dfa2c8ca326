r"""The stability function R(z) of a method: exactly, and its values.

One step of size η on x' = λx multiplies x by R(ηλ). The coefficients are exact fractions; only values are
floating-point numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.checks import checked
from resode.stability.polynomials import common_factor, divide
from resode.tableaus import ButcherTableau, get_tableau

Fractions = tuple[Fraction, ...]

_EPS = 2.0**-52
_DENOMINATOR = 10_000


@lru_cache(maxsize=256)
def _coefficients(tableau: ButcherTableau) -> tuple[Fractions, Fractions]:
    if tableau.rational is not None:
        return tableau.rational
    if tableau.recurrence is not None:
        return _of_recurrence(tableau.recurrence, tableau.recurrence_weights), (Fraction(1),)
    a = [[_fraction(x) for x in row] for row in tableau.a]
    b = [_fraction(x) for x in tableau.b]
    stages = range(len(b))
    floats = [x for row in (*tableau.a, tableau.b) for x in row if isinstance(x, float)]
    exact = all(_fraction(x).denominator <= _DENOMINATOR for x in floats)
    mass = [Fraction(0)]
    if tableau.explicit:
        denominator, numerator = [Fraction(1)], [Fraction(1)]
        vector = moduli = [Fraction(1)] * len(b)  # A^(k−1)·1, and |A|^(k−1)·1
        for _ in stages:
            numerator.append(_dot(b, vector))
            mass.append(_dot(map(abs, b), moduli))
            vector = [_dot(row, vector) for row in a]
            moduli = [_dot(map(abs, row), moduli) for row in a]
    else:
        denominator = _determinant(a)
        numerator = _determinant([[a[i][j] - b[j] for j in stages] for i in stages])
    for k in range(min(tableau.order, len(b)) + 1):
        # P = Q·e^z up to the order: what the order conditions say, free of the coefficients' rounding
        value = sum((q / math.factorial(k - j) for j, q in enumerate(denominator[: k + 1])), Fraction(0))
        if abs(value - numerator[k]) > 1e-8:
            raise ValueError(
                f"tableau {tableau.name!r}: order {tableau.order} asks for R(z) = e^z up to "
                f"z^{tableau.order}, but its coefficient of z^{k} differs by "
                f"{float(numerator[k] - value):.3g}. Correct the order or the coefficients."
            )
        numerator[k] = value
    if not exact and tableau.explicit:
        # A coefficient is a sum of products of k floats: it is 0 if their rounding explains it.
        numerator = [
            c if k == 0 or abs(c) > 2 * k * _EPS * m else Fraction(0)
            for k, (c, m) in enumerate(zip(numerator, mass, strict=True))
        ]
    elif not exact:
        size = float(max(sum(abs(x) for x in row) for row in a)) + float(sum(abs(x) for x in b))
        numerator, denominator = _without_rounding(numerator, size), _without_rounding(denominator, size)
    factor = common_factor(numerator, denominator)
    return _trimmed(divide(numerator, factor)[0]), _trimmed(divide(denominator, factor)[0])


def rounding_of(tableau: ButcherTableau) -> Callable[[complex], bool] | None:
    """Whether |R(z)| exceeds 1 by what rounding of an explicit method's coefficients explains; None if exact.

    With the stages Y = (I − zA)⁻¹1 and u = (I − zA)⁻ᵀb, a change δA, δb changes R by z (δbᵀY + z uᵀδA Y).
    """
    floats = [x for row in (*tableau.a, tableau.b) for x in row if isinstance(x, float)]
    simple = all(_fraction(x).denominator <= _DENOMINATOR for x in floats)
    if simple or not tableau.explicit or tableau.recurrence is not None or tableau.rational is not None:
        return None
    a, b = np.array(tableau.a, dtype=float), np.array(tableau.b, dtype=float)
    one = np.eye(len(b))

    def touches(z: complex) -> bool:
        y, u = np.linalg.solve(one - z * a, one.sum(0)), np.linalg.solve((one - z * a).T, b)
        change = abs(z) * (np.abs(b) @ np.abs(y) + abs(z) * (np.abs(u) @ np.abs(a) @ np.abs(y)))
        return bool(abs(1 + z * (b @ y)) - 1 <= 2 * len(b) * _EPS * change)

    return touches


def _of_recurrence(rows: Sequence[Sequence[Fraction]], weights: Sequence[Fraction] | None) -> Fractions:
    """R = 1 + Σ w_j d_j, where d_j = μ d_{j−1} + ν d_{j−2} + z (μ̃ (1 + d_{j−1}) + γ̃), as a polynomial."""
    weights = (*[Fraction(0)] * (len(rows) - 1), Fraction(1)) if weights is None else weights
    before, d = [Fraction(0)], [Fraction(0)]
    total = [Fraction(1), *[Fraction(0)] * len(rows)]
    for (mu, nu, slope, at_start), w in zip(rows, weights, strict=True):
        new = [Fraction(0)] * (len(d) + 1)
        for k, c in enumerate(d):
            new[k] += mu * c
            new[k + 1] += slope * c
        for k, c in enumerate(before):
            new[k] += nu * c
        new[1] += slope + at_start
        before, d = d, new
        if w:
            for k, c in enumerate(d):
                total[k] += w * c
    return _trimmed(total)


def stability_product(tableau: ButcherTableau, product: Callable[[Any], Any], x: Any) -> Any:
    """R(A)x of an explicit method from products z ↦ Az.

    By the method's recurrence where it has one, because powers of A cancel in many stages.

    Args:
        tableau: the method.
        product: A times something like x.
        x: a number, array or tensor.

    Example:
        >>> from resode.tableaus import get_tableau
        >>> round(stability_product(get_tableau("rkl1_3"), lambda x: -12.0 * x, 1.0), 12)
        -1.0
    """
    if tableau.recurrence is None:
        coefficients = [float(c) for c in stability_coefficients(tableau)[0]]
        total = coefficients[-1] * x
        for c in coefficients[-2::-1]:
            total = c * x + product(total)
        return total
    before = d = 0.0 * x
    total = x
    for (mu, nu, slope, at_start), w in zip(tableau.recurrence_rows, tableau.recurrence_sum, strict=True):
        before, d = d, mu * d + nu * before + product(slope * (x + d) + at_start * x)
        if w:
            total = total + w * d
    return total


def _fraction(x: Fraction | float) -> Fraction:
    """The number itself; for a float that is the nearest one to a fraction in small terms, the fraction.

    So a method that is typed with 1 / 6 is the method with the coefficient 1/6. Chance puts one float in some
    10⁸ that near to such a fraction.
    """
    if isinstance(x, Fraction | int):
        return Fraction(x)
    simple = Fraction(x).limit_denominator(_DENOMINATOR)
    return simple if float(simple) == x else Fraction(x)


def _trimmed(poly: list[Fraction]) -> Fractions:
    while poly[-1] == 0:
        poly.pop()
    return tuple(poly)


def _dot(x: Iterable[Fraction], y: Sequence[Fraction]) -> Fraction:
    return sum((p * q for p, q in zip(x, y, strict=True)), Fraction(0))


def _determinant(a: list[list[Fraction]]) -> list[Fraction]:
    """Coefficients of det(I − zA), lowest first (Faddeev and Le Verrier)."""
    size = len(a)
    coefficients, product = [Fraction(1)], [[Fraction(0)] * size for _ in range(size)]
    for k in range(1, size + 1):
        for i in range(size):
            product[i][i] += coefficients[-1]
        columns = list(zip(*product, strict=True))
        product = [[_dot(row, column) for column in columns] for row in a]
        coefficients.append(-sum((product[i][i] for i in range(size)), Fraction(0)) / k)
    return coefficients


def _without_rounding(poly: list[Fraction], size: float) -> list[Fraction]:
    """Coefficients that are 0 up to the rounding of a tableau in floats, set to 0."""
    return [c if abs(c) > 64 * _EPS * size**k or k == 0 else Fraction(0) for k, c in enumerate(poly)]


@checked
def stability_coefficients(method: str | ButcherTableau) -> tuple[Fractions, Fractions]:
    r"""R(z) = P(z)/Q(z) as exact fractions.

    P(z) = det(I − zA + z·1bᵀ) and Q(z) = det(I − zA), common factors removed; for an explicit method Q = 1
    and the coefficient of z^k is bᵀA^{k−1}1. Up to the method's order p the coefficients are those that
    P = Q·e^z + O(z^{p+1}) demands (1/k! for an explicit method), so that a method whose published
    coefficients are rounded does not leave its region by a rounding.

    Args:
        method: a name in METHODS, or a tableau.

    Returns:
        (numerator, denominator), each lowest degree first; the denominator begins with 1.

    Raises:
        ValueError: the name is unknown, or the tableau's coefficients contradict its order.

    Source:
        Hairer & Wanner, Solving Ordinary Differential Equations II, IV.3, eq. (3.3).

    Example:
        >>> [str(c) for c in stability_coefficients("rk4")[0]]
        ['1', '1', '1/2', '1/6', '1/24']
        >>> [[str(c) for c in part] for part in stability_coefficients("trapezoid")]
        [['1', '1/2'], ['1', '-1/2']]
    """
    return _coefficients(get_tableau(method))


@checked
def stability_function(method: str | ButcherTableau, z: Tensor) -> Tensor:
    r"""Growth factor R(z) of one step on x' = λx, with z = ηλ.

    R(z) = 1 + z bᵀ(I − zA)⁻¹1; the step is stable where |R(z)| ≤ 1.

    Args:
        method: a name in METHODS, or a tableau; explicit or implicit.
        z: step size times eigenvalue (dimensionless), complex, shape (*grid).

    Returns:
        R(z), shape (*grid), dtype and device of z; differentiable in z. inf at a pole.

    Raises:
        TypeError: z is real, which would drop the phase of the spectrum, or no tensor.
        ValueError: the method is unknown.

    Source:
        Hairer & Wanner, Solving Ordinary Differential Equations II, IV.3.

    Example:
        >>> stability_function("euler", torch.tensor([-1, -2, 1j])).abs()
        tensor([0.0000, 1.0000, 1.4142])
    """
    tableau = get_tableau(method)
    if not isinstance(z, Tensor) or not z.is_complex():
        came = f"a {z.dtype} tensor" if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(
            f"z must be a complex tensor, because R depends on the phase of z = ηλ: got {came}. "
            "Convert with torch.as_tensor(z, dtype=torch.complex128)."
        )
    if tableau.recurrence is not None:
        return _finite_or_inf(stability_product(tableau, lambda x: z * x, torch.ones_like(z)), z)
    numerator, denominator = (tuple(map(float, part)) for part in stability_coefficients(tableau))
    if len(denominator) == 1:
        return _finite_or_inf(_horner(numerator, z), z)
    # Beyond |z| = 1 in powers of 1/z, so that nothing overflows where R tends to a constant.
    degree = max(len(numerator), len(denominator))
    outside = z.abs() > 1
    inner = torch.where(outside, torch.ones_like(z), z)
    outer = 1 / torch.where(outside, z, torch.ones_like(z))
    reverse = [(*(0.0,) * (degree - len(part)), *part[::-1]) for part in (numerator, denominator)]
    ratio = torch.where(
        outside,
        _horner(reverse[0], outer) / _horner(reverse[1], outer),
        _horner(numerator, inner) / _horner(denominator, inner),
    )
    return _finite_or_inf(ratio, z)


def amplification(method: str | ButcherTableau, z: np.ndarray) -> np.ndarray:
    """|R(z)|, what a step multiplies a mode by, of an array z = step times eigenvalue.

    Example:
        >>> amplification("euler", np.array([-1.0, 0.5j, -3 + 1j])).tolist()
        [0.0, 1.118033988749895, 2.23606797749979]
    """
    return stability_function(method, torch.as_tensor(np.asarray(z, dtype=np.complex128))).abs().numpy()


def _horner(coefficients: Sequence[float], z: Tensor) -> Tensor:
    value = torch.full_like(z, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * z + c
    return value


def _finite_or_inf(value: Tensor, z: Tensor) -> Tensor:
    """Overflow and division by 0 make nan of a complex number; |R| is inf there."""
    lost = ~torch.isfinite(value) & ~torch.isnan(z)
    return torch.where(lost, torch.full_like(z, math.inf), value) if lost.any() else value
