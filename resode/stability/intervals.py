"""Where a method is stable on a line through 0, and which stabilities it has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from resode.checks import checked
from resode.results import Result
from resode.stability.function import rounding_of, stability_coefficients
from resode.stability.polynomials import roots_lie_right
from resode.stability.recurrences import EXACT_UP_TO, RecurrenceRays
from resode.stability.unstable_rays import RayPolynomials, complement
from resode.tableaus import ButcherTableau, get_tableau

Interval = tuple[float, float]


@lru_cache(maxsize=256)
def rays_of_tableau(
    tableau: ButcherTableau, growth: Fraction = Fraction(1)
) -> RayPolynomials | RecurrenceRays:
    """Where |R|² exceeds the allowed growth G along rays, of a method; kept once made."""
    if tableau.recurrence is not None and len(tableau.b) > EXACT_UP_TO:
        return RecurrenceRays(tableau, float(growth))
    return RayPolynomials(*stability_coefficients(tableau), growth, rounding_of(tableau))


@checked
def stable_intervals(method: str | ButcherTableau, direction: complex = -1.0) -> tuple[Interval, ...]:
    """Every interval of r > 0 with |R(r·direction)| ≤ 1, in order, ends correct to the last digit.

    Of stabilised methods with more than 20 stages to about 1e-12.

    The set can be disconnected, and unbounded (inf) for implicit methods. Points and intervals narrower than
    1e-12 of their distance from 0 are left out: no step size in float64 hits them reliably.

    Args:
        method: a name in METHODS, or a tableau.
        direction: a complex number other than 0; −1 is the negative real axis, 1j the imaginary one.
            r is measured in units of it.

    Raises:
        ValueError: the direction is 0 or not finite, or the method is unknown.

    Example:
        >>> stable_intervals("rk4")
        ((0.0, 2.785293563405282),)
        >>> stable_intervals("fehlberg45", 1j)  # none at 0, one further out
        ((2.0460495138625543, 3.6065624758039556),)
        >>> stable_intervals("implicit_euler", 1.0)
        ((2.0, inf),)
    """
    tableau, direction = get_tableau(method), complex(direction)
    modulus = abs(direction)
    if modulus == 0 or not math.isfinite(modulus):
        raise ValueError(f"a direction is a finite complex number other than 0, got {direction}.")
    unstable = rays_of_tableau(tableau).unstable_exactly(direction)
    return tuple(complement(np.array(unstable).reshape(-1, 2)))


def _first_exit(intervals: Sequence[Interval]) -> float:
    return intervals[0][1] if intervals and intervals[0][0] == 0 else 0.0


@checked
def real_stability_interval(method: str | ButcherTableau) -> float:
    """The largest r such that [−r, 0] lies in the stability region; inf if it is unbounded.

    Further intervals that are not connected with 0: `stable_intervals(method, -1)`.

    Example:
        >>> real_stability_interval("rk4"), real_stability_interval("radau5")
        (2.785293563405282, inf)
    """
    return _first_exit(stable_intervals(method, -1.0))


@checked
def imaginary_stability_interval(method: str | ButcherTableau) -> float:
    """The largest r such that i[−r, r] lies in the stability region; 0 if no segment does, inf if all does.

    Further intervals that are not connected with 0: `stable_intervals(method, 1j)`.

    Example:
        >>> imaginary_stability_interval("rk4"), imaginary_stability_interval("midpoint")
        (2.8284271247461903, 0.0)
    """
    return _first_exit(stable_intervals(method, 1j))


@dataclass(frozen=True)
class StabilityProperties(Result):
    """What a method's R(z) says of it: a row of the methods' table.

    Args:
        name, order, stages: the method's.
        real_interval, imaginary_interval: as the functions of these names give them.
        a_stable: |R(z)| ≤ 1 wherever Re z ≤ 0.
        l_stable: A-stable, and R(z) → 0 as z → ∞.
        i_stable: |R(z)| ≤ 1 on the whole imaginary axis.
    """

    name: str
    order: int
    stages: int
    real_interval: float
    imaginary_interval: float
    a_stable: bool
    l_stable: bool
    i_stable: bool

    @property
    def letters(self) -> str:
        """The stabilities it has, as in "A, L, I"; "–" if none."""
        having = zip("ALI", (self.a_stable, self.l_stable, self.i_stable), strict=True)
        return ", ".join(letter for letter, holds in having if holds) or "–"


@checked
def stability_properties(method: str | ButcherTableau) -> StabilityProperties:
    """Order, stages, intervals, and A-, L- and I-stability of a method, all decided with exact fractions.

    A method is A-stable if it is I-stable and R has no pole in the left half plane (Routh's array),
    L-stable if moreover the numerator's degree is below the denominator's.

    Source:
        Hairer & Wanner, Solving Ordinary Differential Equations II, IV.3, definitions 3.3 and 3.7.

    Example:
        >>> stability_properties("radau5").letters, stability_properties("gauss4").letters
        ('A, L, I', 'A, I')
        >>> stability_properties("rk4").letters
        '–'
    """
    tableau = get_tableau(method)
    numerator, denominator = ((), ()) if tableau.explicit else stability_coefficients(tableau)
    i_stable = not tableau.explicit and not rays_of_tableau(tableau).unstable_exactly(1j)
    a_stable = i_stable and roots_lie_right(denominator)
    return StabilityProperties(
        name=tableau.name,
        order=tableau.order,
        stages=len(tableau.b),
        real_interval=real_stability_interval(tableau),
        imaginary_interval=imaginary_stability_interval(tableau),
        a_stable=a_stable,
        l_stable=a_stable and len(numerator) < len(denominator),
        i_stable=i_stable,
    )
