"""Explicit methods with many stages: their intervals, orders, and rounding that does not grow."""

import math
from fractions import Fraction as Q

import pytest
import torch

import resode
from resode import ButcherTableau, ResidualStack, odeint
from resode.stability import stability_coefficients
from resode.tableaus import get_tableau, on_demand

DOUBLE = torch.float64
INTERVALS = dict(
    rkc1=(lambda s: 1.93 * s**2, 0.01),
    rkc2=(lambda s: 0.653 * (s**2 - 1), 0.01),
    rkl1=(lambda s: s**2 + s, 1e-9),
    rkl2=(lambda s: (s**2 + s - 2) / 2, 1e-9),
)


@pytest.mark.parametrize("family", INTERVALS)
@pytest.mark.parametrize("stages", [9, 51, 201])
def test_real_intervals_are_the_published_ones(family, stages):
    """For odd stages; rkl2's and rkc2's even and few ones reach a little further or less far."""
    formula, close = INTERVALS[family]
    found = resode.real_stability_interval(f"{family}_{stages}")
    assert found >= formula(stages) * (1 - 1e-9)
    assert found == pytest.approx(formula(stages), rel=close if stages > 9 or close < 0.01 else 0.05) or (
        family == "rkl2"
        and found < 1.3 * formula(stages)  # R = a + bP leaves where it reaches −1, beyond w = −1
    )


@pytest.mark.parametrize("family", INTERVALS)
def test_recurrence_tableau_and_polynomial_are_one_method(family):
    """The stages' sums, the recurrence and the exact coefficients of R, at 7 stages."""
    tableau, z = get_tableau(f"{family}_7"), torch.linspace(-20, 0, 9, dtype=DOUBLE)
    assert tableau is on_demand(f"{family}_7") and tableau.stages == 7 and tableau.explicit
    exact = sum(float(c) * z**k for k, c in enumerate(stability_coefficients(tableau)[0]))
    one = ButcherTableau("sums", tableau.a, tableau.b, tableau.c, order=tableau.order)
    for value in (
        resode.stability_function(tableau, z.to(torch.complex128)).real,
        torch.stack([odeint(lambda t, y, s=s: s * y, torch.ones(1, dtype=DOUBLE), torch.tensor([0.0, 1.0]).double(),
                            method=m, n_steps=1)[-1, 0] for s in z for m in (tableau,)]),
        torch.stack([odeint(lambda t, y, s=s: s * y, torch.ones(1, dtype=DOUBLE), torch.tensor([0.0, 1.0]).double(),
                            method=one, n_steps=1)[-1, 0] for s in z]),
    ):  # fmt: skip
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "order"), [("rkc1_6", 1), ("rkc2_6", 2), ("rkl1_6", 1), ("rkl2_7", 2)])
def test_orders(method, order):
    """On a field that is not linear and knows the time."""
    y0, t = torch.tensor([0.5], dtype=DOUBLE), torch.tensor([0.0, 1.0], dtype=DOUBLE)
    field = lambda t, y: torch.sin(3 * t) - y * y  # noqa: E731
    exact = odeint(field, y0, t, rtol=1e-12, atol=1e-12)[-1]
    errors = [float((odeint(field, y0, t, method=method, n_steps=n)[-1] - exact).abs()) for n in (20, 40)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("family", ["rkc2", "rkl2"])
def test_fifty_stages_in_float32_are_right_to_float32(family):
    """The heat equation, a step at 0.9 of the interval: powers of z would cancel to nothing."""
    n = 32
    laplace = torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1) - 2 * torch.eye(n)
    laplace = laplace.double() * 0.9 * resode.real_stability_interval(f"{family}_50") / 4
    y0 = torch.linspace(0, 1, n, dtype=DOUBLE).sin()
    ends = [
        odeint(
            lambda t, y: laplace.to(y.dtype) @ y,
            y0.to(dtype),
            torch.tensor([0.0, 1.0]),
            method=f"{family}_50",
            n_steps=1,
        )[-1]
        for dtype in (torch.float32, DOUBLE)
    ]
    assert (ends[0] - ends[1]).abs().max() < 1e-5
    z = torch.tensor([-700.0 + 0j], dtype=torch.complex64)
    both = [resode.stability_function(f"{family}_50", x)[0] for x in (z, z.to(torch.complex128))]
    assert abs(both[0] - both[1]) < 1e-4


def chebyshev_tableau(s):
    """T_s(1 + z/s²) as a tableau of floats, in which stage j is T_j(1 + z/s²)."""
    rows = [[0.0] * s]
    for j in range(1, s + 1):
        new = [0.0] * s
        if j == 1:
            new[0] = 1 / s**2
        else:
            new = [2 * x - y for x, y in zip(rows[-1], rows[-2], strict=True)]
            new[j - 1] += 2 / s**2
        rows.append(new)
    return ButcherTableau(f"chebyshev{s}", rows[:-1], rows[-1], [sum(r) for r in rows[:-1]], order=1)


@pytest.mark.parametrize("s", [5, 9, 12])
def test_small_coefficients_are_not_taken_for_rounding(s):
    """T₉'s last is 2⁸/9¹⁸ = 1.7e-15; with it the interval is 2s² = 162, where |R| = 1 again and again."""
    numerator, _ = stability_coefficients(chebyshev_tableau(s))
    assert len(numerator) == s + 1
    assert float(numerator[-1]) == pytest.approx(2.0 ** (s - 1) / float(s) ** (2 * s), rel=1e-9)
    assert numerator[1] == Q(1)


@pytest.mark.parametrize("s", [3, 5, 9, 12])
def test_touching_the_unit_circle_is_no_exit(s):
    """|T_s| reaches 1 at s − 1 places within its interval 2s², where rounded coefficients take it above."""
    tableau = chebyshev_tableau(s)
    assert resode.real_stability_interval(tableau) == pytest.approx(2 * s**2, rel=1e-9)
    limits = [resode.max_stable_step(eigenvalues=e, solver=tableau) for e in ([-1.0], [-1.0, -0.5], [-2.0])]
    assert limits == pytest.approx([2 * s**2, 2 * s**2, s**2], rel=1e-9)
    # A real excursion stays one: the same stages, the last one 1e-9 too long.
    b = [*tableau.b[:-1], tableau.b[-1] * (1 + 1e-9)]
    longer = ButcherTableau("longer", tableau.a, [x / sum(b) for x in b], tableau.c, order=1)
    assert resode.real_stability_interval(longer) < 2 * s**2 * 0.99


def test_a_stack_takes_stabilised_solvers():
    """At η = 5 its fields are stiff: rkc2_10 has the interval, rk4 has not."""
    torch.manual_seed(0)
    field = torch.nn.Linear(6, 6, bias=False).double()
    with torch.no_grad():
        field.weight.copy_(-torch.diag(torch.linspace(0.1, 10, 6)))
    stack, x = ResidualStack(field, depth=4, step_size=5.0, solver="rkc2_10"), torch.ones(2, 6, dtype=DOUBLE)
    assert stack(x).abs().max() <= 1
    assert stack.stats.nfe == 40
    stack.solver = "rk4"
    assert stack(x).abs().max() > 1e6


@pytest.mark.parametrize(
    ("name", "message"),
    [("rkc2_1", "from 2 to 1000"), ("rkl1_5000", "got 5000"), ("rkc3_5", "unknown method")],
)
def test_stages_out_of_range(name, message):
    with pytest.raises(ValueError, match=message):
        get_tableau(name)
