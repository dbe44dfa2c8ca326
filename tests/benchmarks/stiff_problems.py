"""Stiff problems: Robertson, van der Pol, the 25 of STIFF DETEST, and a Brusselator in the plane.

Fields take (t, y) with y of shape (n,) in float64; `array_field` is the same for numpy, without torch's calls.

Source:
    Enright, Hull & Lindberg, Comparing numerical methods for stiff systems of O.D.E.s, BIT 15 (1975), classes A to E;
    Enright & Pryce, ACM Trans. Math. Softw. 13 (1987). Hairer & Wanner, Solving Ordinary Differential Equations II,
    IV.10, for the Brusselator, without its source term, which acts from t = 1.1.

    Neither article nor Algorithm 648's own text was at hand. The 25 were compared, fact by fact, with three transcriptions:
    odeToJava (University of Saskatchewan; stiffDETest and its reference solutions), SciMLBenchmarks.jl
    (NonStiffODE/enright_pryce.jl) and lsoda-java (StiffExamplesTest.java); B1 and E1 also with Torsten's fixtures, E5
    with Hairer's FE5, A and B with the tables in Petcu's EpODE, the Brusselator with Hairer's driver. Right-hand sides
    agree with SciML's to rounding at random points (A2 and A4 by reading), starts and ends with odeToJava's files, and
    solutions at 1e-11 with the end states there to 2e-9 of each entry above 1e-6 (none in B1 and E1, which end near 0);
    E5 to 6e-8 alone, where Radau and LSODA agree with each other to 1e-11.

    They differ among themselves. E2 ends at 1 (SciML, lsoda-java) or 10 (odeToJava): 1 here. E4 ends at 1000 (odeToJava,
    SciML) or 500 (lsoda-java): 1000 here. C1's y_3 in y_1' is squared, but cubed in odeToJava, against its own solution.
    lsoda-java has A1 from 0 to 120, -y_1 for -10 y_1 in B2 to B5 and 40 beta for 4 beta in C2 to C5; Torsten 1e5 for 1e4
    and an end at 100 in B1, an end at 10 in E1; EpODE 10000 for 1000 in A2 and y_1(0) = 0 in B2 to B5. The initial step
    of E5 is 5e-5 (odeToJava) or 1e-3 (SciML); no initial step is used here, each solver takes its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class StiffProblem:
    """A field, where it starts and ends, and atol over rtol.

    `parts` gives the derivative's entries from y's, by arithmetic alone: for torch, numpy and jax.
    """

    name: str
    parts: Callable[..., Any]
    start: tuple[float, ...]
    end: float
    ratio: float = 1.0

    def field(self, t: Any, y: torch.Tensor) -> torch.Tensor:
        """For torch."""
        return torch.stack(list(self.parts(t, *y.unbind(-1), exp=torch.exp, sin=torch.sin)), -1)

    def array_field(self, t: float, y: np.ndarray) -> np.ndarray:
        """For scipy."""
        return np.array(self.parts(t, *y, exp=np.exp, sin=np.sin))


def _rates(t, *y, rates, **_):
    return [r * v for r, v in zip(rates, y, strict=True)]


def _a2(t, *y, **_):
    inner = [y[i - 1] - 2 * y[i] + y[i + 1] for i in range(1, 8)]
    return [-1800 * y[0] + 900 * y[1], *inner, 1000 * y[7] - 2000 * y[8] + 1000]


def _a3(t, a, b, c, d, **_):
    return [-1e4 * a + 100 * b - 10 * c + d, -1e3 * b + 10 * c - 10 * d, -c + 10 * d, -0.1 * d]


def _b1(t, a, b, c, d, **_):
    return [-a + b, -100 * a - b, -100 * c + d, -1e4 * c - 100 * d]


def _b2(t, a, b, c, d, e, f, turn, **_):
    return [-10 * a + turn * b, -turn * a - 10 * b, -4 * c, -d, -0.5 * e, -0.1 * f]


def _c1(t, a, b, c, d, **_):
    return [-a + b * b + c * c + d * d, -10 * b + 10 * (c * c + d * d), -40 * c + 40 * d * d, -100 * d + 2]


def _c2(t, a, b, c, d, beta, **_):
    squares = a * a + b * b
    return [
        -a + 2,
        -10 * b + beta * a * a,
        -40 * c + 4 * beta * squares,
        -100 * d + 10 * beta * (squares + c * c),
    ]


def _d1(t, a, b, c, **_):
    return [0.2 * (b - a), 10 * a - (60 - 0.125 * c) * b + 0.125 * c, 0 * c + 1]


def _d2(t, a, b, c, **_):
    return [-0.04 * a + 0.01 * b * c, 400 * a - 100 * b * c - 3000 * b * b, 30 * b * b]


def _d3(t, a, b, c, d, **_):
    ab = 100 * a * b
    return [c - ab, c + 2 * d - ab - 2e4 * b * b, -c + ab, -d + 1e4 * b * b]


def _d4(t, a, b, c, **_):
    first, second = -0.013 * a - 1000 * a * c, -2500 * b * c
    return [first, second, first + second]


def _d5(t, a, b, **_):
    total = 0.01 + a + b
    return [0.01 - (1 + (a + 1000) * (a + 1)) * total, 0.01 - (1 + b * b) * total]


def _d6(t, a, b, c, **_):
    first, second = -a + 1e8 * c * (1 - a), -10 * b + 3e7 * c * (1 - b)
    return [first, second, -first - second]


def _e1(t, a, b, c, d, exp, sin):
    g = 100.0
    last = (
        (a * a - sin(a) - g**4) * a
        + (b * c / (a * a + 1) - 4 * g**3) * b
        + (1 - 6 * g**2) * c
        + (10 * exp(-d * d) - 4 * g) * d
        + 1
    )
    return [b, c, d, last]


def _van_der_pol(t, a, b, mu, **_):
    return [b, mu * (1 - a * a) * b - a]


def _e3(t, a, b, c, **_):
    return [-(55 + c) * a + 65 * b, 0.0785 * (a - b), 0.1 * a]


def _e4(t, a, b, c, d, **_):
    half = (a + b + c + d) / 2  # z = Uy, and U is its own inverse
    z = half - a, half - b, half - c, half - d
    g = (
        10 * z[0] + 10 * z[1] + (z[0] * z[0] - z[1] * z[1]) / 2,  # 8 ± 10i at the start, −10 ± 10i at the end
        -10 * z[0] + 10 * z[1] + z[0] * z[1],
        -1000 * z[2] + z[2] * z[2],
        -0.01 * z[3] + z[3] * z[3],
    )
    half = (g[0] + g[1] + g[2] + g[3]) / 2
    return [half - x for x in g]


def _e5(t, a, b, c, d, **_):
    first, second, third, fourth = 7.89e-10 * a, 1.1e7 * a * c, 1.13e9 * b * c, 1.13e3 * d
    return [-first - second, first - third, first - second + fourth - third, second - fourth]


def _robertson(t, a, b, c, **_):
    slow, fast, back = 0.04 * a, 3e7 * b * b, 1e4 * b * c
    return [back - slow, slow - fast - back, fast]


ROBERTSON = StiffProblem("Robertson to 1e11", _robertson, (1.0, 0.0, 0.0), 1e11, 1e-4)
VAN_DER_POL = StiffProblem("van der Pol to 2000", partial(_van_der_pol, mu=1000.0), (2.0, 0.0), 2000.0)

DETEST = [
    StiffProblem("A1", partial(_rates, rates=(-0.5, -1.0, -100.0, -90.0)), (1.0,) * 4, 20.0),
    StiffProblem("A2", _a2, (0.0,) * 9, 120.0),
    StiffProblem("A3", _a3, (1.0,) * 4, 20.0),
    StiffProblem(
        "A4", partial(_rates, rates=tuple(-(float(i) ** 5) for i in range(1, 11))), (1.0,) * 10, 1.0
    ),
    StiffProblem("B1", _b1, (1.0, 0.0, 1.0, 0.0), 20.0),
    *[
        StiffProblem(f"B{i}", partial(_b2, turn=turn), (1.0,) * 6, 20.0)
        for i, turn in ((2, 3.0), (3, 8.0), (4, 25.0), (5, 100.0))
    ],
    StiffProblem("C1", _c1, (1.0,) * 4, 20.0),
    *[
        StiffProblem(f"C{i}", partial(_c2, beta=beta), (1.0,) * 4, 20.0)
        for i, beta in ((2, 0.1), (3, 1.0), (4, 10.0), (5, 20.0))
    ],
    StiffProblem("D1", _d1, (0.0,) * 3, 400.0),
    StiffProblem("D2", _d2, (1.0, 0.0, 0.0), 40.0),
    StiffProblem("D3", _d3, (1.0, 1.0, 0.0, 0.0), 20.0),
    StiffProblem("D4", _d4, (1.0, 1.0, 0.0), 50.0, 1e-2),
    StiffProblem("D5", _d5, (0.0, 0.0), 100.0),
    StiffProblem("D6", _d6, (1.0, 0.0, 0.0), 1.0, 1e-4),
    StiffProblem("E1", _e1, (0.0,) * 4, 1.0, 1e-4),
    StiffProblem("E2", partial(_van_der_pol, mu=5.0), (2.0, 0.0), 1.0),
    StiffProblem("E3", _e3, (1.0, 1.0, 0.0), 500.0),
    StiffProblem("E4", _e4, (0.0, -2.0, -1.0, -1.0), 1000.0),
    StiffProblem("E5", _e5, (1.76e-3, 0.0, 0.0, 0.0), 1000.0, 1e-7),
]
"""The 25 problems. y(0) = 0 of D1 … E1, and E5's traces of 1e-9, ask for atol below rtol."""


def robertson_rates(batch: int = 256, seed: int = 0) -> np.ndarray:
    """Rates (batch, 3) of Robertson's reactions, each within a decade of 0.04, 3e7 and 1e4 either way."""
    return np.array([0.04, 3e7, 1e4]) * 10 ** np.random.default_rng(seed).uniform(-1, 1, (batch, 3))


def robertson_of(rates: Any, *y: Any) -> list[Any]:
    """Robertson's equations with these three rates."""
    a, b, c = y
    slow, fast, back = rates[0] * a, rates[1] * b * b, rates[2] * b * c
    return [back - slow, slow - fast - back, fast]


def brusselator(t: Any, y: torch.Tensor, n: int = 64, alpha: float = 0.1) -> torch.Tensor:
    """u' = 1 + u²v − 4.4u + αΔu, v' = 3.4u − u²v + αΔv on the unit square, periodic; y of shape (2 n²,)."""
    u, v = y.reshape(2, n, n)
    both = y.reshape(2, n, n)
    spread = sum(torch.roll(both, shift, axis) for axis in (1, 2) for shift in (1, -1)) - 4 * both
    spread = alpha * n**2 * spread
    product = u * u * v
    return torch.stack([1 + product - 4.4 * u + spread[0], 3.4 * u - product + spread[1]]).reshape(-1)


def brusselator_start(n: int = 64) -> torch.Tensor:
    """u = 22 y (1 − y)^{3/2}, v = 27 x (1 − x)^{3/2}, shape (2 n²,)."""
    s = torch.arange(n, dtype=torch.float64) / n
    u, v = 22 * s * (1 - s) ** 1.5, 27 * s * (1 - s) ** 1.5
    return torch.stack([u[None, :].expand(n, n), v[:, None].expand(n, n)]).reshape(-1)
