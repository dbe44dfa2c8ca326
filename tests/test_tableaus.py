"""Every tableau meets the order conditions that it declares, exactly where it is rational."""

import itertools
import math
from fractions import Fraction as Q
from functools import cache

import numpy as np
import pytest

from resode.tableaus import METHODS, ButcherTableau, get_tableau

ALL = list(METHODS.values())
IRRATIONAL = {"gauss4", "radau5", "sdirk2", "trbdf2", "kvaerno3"}
PUBLISHED_ROUNDED = {"tsit5": 1e-32, "dopri8": 1e-16, "kvaerno5": 1e-15}


@cache
def trees(n):
    """All rooted trees with n vertices, each a sorted tuple of its subtrees."""
    if n == 1:
        return ((),)

    def partitions(total, largest):
        if total == 0:
            yield []
        for part in range(min(total, largest), 0, -1):
            for rest in partitions(total - part, part):
                yield [part, *rest]

    return tuple(
        {
            tuple(sorted(forest))
            for sizes in partitions(n - 1, n - 1)
            for forest in itertools.product(*(trees(k) for k in sizes))
        }
    )


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    product = size(tree)
    for branch in tree:
        product *= density(branch)
    return product


def stage_weights(tree, a):
    weights = [1] * len(a)
    for branch in tree:
        inner = stage_weights(branch, a)
        weights = [
            w * sum(row[j] * inner[j] for j in range(len(a))) for w, row in zip(weights, a, strict=True)
        ]
    return weights


def defect(b, tree, a):
    """|Σ b_i φ_i(tree) − 1/γ(tree)|, zero where the order condition holds; in floats if a and b are."""
    return abs(sum(x * w for x, w in zip(b, stage_weights(tree, a), strict=True)) - Q(1, density(tree)))


def tolerance(name):
    return PUBLISHED_ROUNDED.get(name, 1e-15 if name in IRRATIONAL else 0)


def test_number_of_rooted_trees():
    """1, 1, 2, 4, 9, 20, 48, 115: the check itself (Cayley)."""
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@pytest.mark.parametrize("tableau", ALL, ids=lambda t: t.name)
def test_every_order_condition_up_to_the_order_holds_and_one_beyond_fails(tableau):
    """All rooted trees up to order 5; beyond, the quadrature conditions Σ b c^(q−1) = 1/q."""
    for q in range(1, tableau.order + 1):
        conditions = trees(q) if q <= 5 else [((),) * (q - 1)]
        for tree in conditions:
            assert defect(tableau.b, tree, tableau.a) <= tolerance(tableau.name), tree
    if tableau.order < 6:
        assert max(defect(tableau.b, tree, tableau.a) for tree in trees(tableau.order + 1)) > 1e-5


def test_dopri8_meets_all_200_conditions_up_to_order_8_and_not_all_of_order_9():
    """In floats, because 200 exact conditions of 13 stages take minutes."""
    tableau = METHODS["dopri8"]
    a, b = [[float(x) for x in row] for row in tableau.a], [float(x) for x in tableau.b]
    assert max(defect(b, tree, a) for q in range(1, 9) for tree in trees(q)) < 1e-14
    assert max(defect(b, tree, a) for tree in trees(9)) > 1e-7


ADAPTIVE = dict(
    bosh3=3, fehlberg45=5, dopri5=5, tsit5=5, dopri8=8, radau5=4, sdirk2=2, trbdf2=3, kvaerno3=3, kvaerno5=5
)


@pytest.mark.parametrize(("name", "power"), ADAPTIVE.items())
def test_the_error_estimate_is_of_its_power(name, power):
    """Σ e_i φ_i(tree) = 0 for all trees below it (where f at the start counts at the root), and not for all of it."""
    tableau = METHODS[name]
    assert tableau.error_power == power
    for q in range(1, min(power, 5) + 1):
        sums = [
            sum(e * w for e, w in zip(tableau.b_error, stage_weights(tree, tableau.a), strict=True))
            + (q == 1) * (tableau.error_start or 0)
            for tree in trees(q)
        ]
        assert max(map(abs, sums)) <= max(tolerance(name), 2e-16) if q < power else max(map(abs, sums)) > 1e-4


def test_error_estimates_of_implicit_methods_are_the_published_ones():
    """radau5: γ₀ = 1/μ with μ the real eigenvalue of A⁻¹, e A⁻¹ = γ₀(−13 − 7√6, −13 + 7√6, −1)/3 (Hairer & Wanner,
    IV.8); its filter and sdirk2's and trbdf2's are the γ of their stages, 1 − 1/√2 for both.
    """
    radau = METHODS["radau5"]
    a = np.array([[float(x) for x in row] for row in radau.a])
    eigenvalues = np.linalg.eigvals(a)
    real = float(eigenvalues[abs(eigenvalues.imag) < 1e-12].real[0])
    root = math.sqrt(6)
    published = real * np.array([-13 - 7 * root, -13 + 7 * root, -1]) / 3
    assert radau.error_start == radau.error_filter == pytest.approx(real, rel=1e-14)
    assert list(radau.b_error) == pytest.approx(list(published @ a), rel=1e-14)
    for name in ("sdirk2", "trbdf2"):
        assert (
            METHODS[name].error_filter
            == METHODS[name].a[1][1]
            == pytest.approx(1 - math.sqrt(0.5), rel=1e-15)
        )


@pytest.mark.parametrize("name", [t.name for t in ALL if t.rational])
def test_exact_stability_functions_are_those_of_the_coefficients(name):
    """N(z)/D(z) = 1 + z bᵀ(I − zA)⁻¹1."""
    tableau = METHODS[name]
    a, b = np.array(tableau.a, dtype=float), np.array(tableau.b, dtype=float)
    top, bottom = ([float(x) for x in reversed(part)] for part in tableau.rational)
    assert top[-1] == bottom[-1] == 1
    for z in (-3.0, 0.7, 2j, -1 + 1j):
        found = 1 + z * b @ np.linalg.solve(np.eye(len(b)) - z * a, np.ones(len(b)))
        assert np.polyval(top, z) / np.polyval(bottom, z) == pytest.approx(found, rel=1e-13)


@pytest.mark.parametrize("name", ["implicit_midpoint", "gauss4", "radau5"])
def test_dense_output_of_a_collocation_method_integrates_its_nodes_polynomials(name):
    """Σ b_i(θ) c_i^(q−1) = θ^q/q for q up to the stages; b_i(1) = b_i."""
    tableau = METHODS[name]
    for row, b in zip(tableau.interpolant, tableau.b, strict=True):
        assert len(row) == tableau.stages and float(sum(row)) == pytest.approx(float(b), abs=1e-14)
    for theta in (0.2, 0.5, 0.9):
        weights = [sum(float(x) * theta ** (k + 1) for k, x in enumerate(row)) for row in tableau.interpolant]
        for q in range(1, tableau.stages + 1):
            got = sum(w * float(c) ** (q - 1) for w, c in zip(weights, tableau.c, strict=True))
            assert got == pytest.approx(theta**q / q, abs=1e-14)


@pytest.mark.parametrize("name", ["dopri5", "tsit5", "kvaerno5"])
def test_dense_output_is_of_order_4_inside_and_ends_on_the_step(name):
    """b_i(θ) meets Σ b_i(θ) φ_i = θ^q / γ to order 4, and b_i(1) = b_i."""
    tableau = METHODS[name]
    close = {"tsit5": 1e-14, "kvaerno5": 1e-13}.get(name, 1e-15)
    for row, b in zip(tableau.interpolant, tableau.b, strict=True):
        assert abs(float(sum(row) - b)) < close
    for theta in (0.1, 0.5, 0.9):
        weights = [sum(float(c) * theta ** (j + 1) for j, c in enumerate(row)) for row in tableau.interpolant]
        for q in range(1, 5):
            for tree in trees(q):
                got = sum(w * float(s) for w, s in zip(weights, stage_weights(tree, tableau.a), strict=True))
                assert abs(got - theta**q / density(tree)) < close


def test_kvaerno5s_dense_output_has_the_fields_slope_at_both_ends():
    """b_i'(0) is 1 for the first stage alone, b_i'(1) for the last: steps join with one derivative."""
    rows = np.array(METHODS["kvaerno5"].interpolant, float)
    assert rows[:, 0] == pytest.approx(np.eye(7)[0], abs=1e-14)
    assert rows @ [1, 2, 3, 4] == pytest.approx(np.eye(7)[6], abs=1e-13)


def test_contract_of_the_methods():
    orders = dict(
        euler=1, midpoint=2, heun2=2, ralston2=2, kutta3=3, heun3=3, ssprk3=3, rk4=4, rk4_38=4,
        bosh3=3, fehlberg45=5, dopri5=5, tsit5=5, dopri8=8,
        implicit_euler=1, implicit_midpoint=2, trapezoid=2, gauss4=4, radau5=5,
        sdirk2=2, trbdf2=2, kvaerno3=3, kvaerno5=5,
    )  # fmt: skip
    assert {name: t.order for name, t in METHODS.items()} == orders
    assert [t.name for t in ALL if not t.explicit] == list(orders)[-9:]
    adaptive = ["bosh3", "fehlberg45", "dopri5", "tsit5", "dopri8", *list(orders)[-5:]]
    assert [t.name for t in ALL if t.adaptive] == adaptive
    stiffly_accurate = ["trapezoid", "radau5", "sdirk2", "trbdf2", "kvaerno3", "kvaerno5"]
    assert [t.name for t in ALL if t.fsal] == ["bosh3", "dopri5", "tsit5", *stiffly_accurate]
    assert [t.name for t in ALL if t.looks_ahead] == ["kvaerno5"]  # a stage beyond the step's end
    assert all(t.source and t.stages == len(t.b) for t in ALL)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (dict(a=((0, 0), (1, 0)), b=(1,), c=(0, 1)), "b, which has 1"),
        (dict(a=((0, 0), (1, 0)), b=(0.5, 0.5), c=(0, 0.5)), "row 1 of a sums to 1.0, c is 0.5"),
        (dict(a=((0,),), b=(0.5,), c=(0,)), "b must sum to 1, got 0.5"),
        (dict(a=((0,),), b=(1,), c=(0,), explicit=False), "explicit is True"),
        (dict(a=((1,),), b=(1,), c=(1,), explicit=True), "explicit is False"),
        (dict(a=((0,),), b=(1,), c=(0,), stages=2), "stages is 1 by a and b, not 2"),
        (dict(a=((0,),), b=(1,), c=(0,), stages=0), "stages is 1 by a and b, not 0"),
        (dict(a=((0, 0), (0.5, 0.5)), b=(0.5, 0.5), c=(0, 1), fsal=False), "fsal is True"),
        (dict(a=((1,),), b=(1,), c=(1,), fsal=True), "fsal is False"),
        (dict(a=((0,),), b=(1,), c=(0, 1)), "which has 1; c has 2"),
        (dict(a=((0, 0), (1,)), b=(0.5, 0.5), c=(0, 1)), "which has 2; row 1 of a has 1"),
        (dict(a=((0,),), b=(1,), c=(0,), b_error=(0, 0)), "which has 1; b_error has 2"),
        (dict(a=((0,),), b=(1,), c=(0,), interpolant=((1,), (0,))), "which has 1; interpolant has 2"),
        (dict(a=((0,),), b=(1,), c=(0,), interpolant=((1,), (0,)), dense_a=((0.5, 0),)), "interpolant has 0"),
    ],
)
def test_a_tableau_whose_parts_disagree_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        ButcherTableau("odd", **parts)


@pytest.mark.parametrize(
    ("stages", "off", "refused"),
    [(2, 8e-15, False), (2, 3e-14, True), (20, 1.5e-14, False), (20, 5e-14, True)],
)
def test_sums_may_be_off_by_rounding_alone(stages, off, refused):
    """By 1e-14, and by as much for every ten stages."""
    a = [[0.0] * stages for _ in range(stages)]
    a[1][0] = 0.5
    weights, times = [1 / stages] * stages, [0.0, 0.5, *[0.0] * (stages - 2)]
    weights[0] += 1 - sum(weights)
    assert ButcherTableau("right", a, weights, times).fsal is False
    for parts in ((weights, [0.0, 0.5 + off, *times[2:]]), ([weights[0] + off, *weights[1:]], times)):
        if refused:
            with pytest.raises(ValueError, match="sum"):
                ButcherTableau("off", a, *parts)
        else:
            ButcherTableau("off", a, *parts)


def test_a_recurrence_ends_in_its_last_stage():
    tableau = get_tableau("rkl1_3")
    assert tableau.recurrence_sum == (0.0, 0.0, 1.0)
    assert [list(map(float, row)) for row in tableau.recurrence] == list(map(list, tableau.recurrence_rows))
    assert METHODS["rk4"].recurrence_sum == METHODS["rk4"].recurrence_rows == METHODS["rk4"].dense_rows == ()
    assert repr(tableau) == "<rkl1_3: explicit Runge-Kutta method of order 1, 3 stages>"
    assert repr(METHODS["gauss4"]) == "<gauss4: implicit Runge-Kutta method of order 4, 2 stages>"


@pytest.mark.parametrize("s", [2, 5, 9])
def test_rkc2s_rows_are_the_published_ones(s):
    """Sommeijer, Shampine & Verwer (1998): b_j = T_j''/T_j'², b₀ = b₁ = b₂, and μ_j, ν_j, μ̃_j, γ̃_j of them."""
    tableau, w0 = get_tableau(f"rkc2_{s}"), 1 + 2 / 13 / s**2
    t = [np.polynomial.chebyshev.Chebyshev.basis(j) for j in range(s + 1)]
    w1 = t[s].deriv()(w0) / t[s].deriv(2)(w0)
    b = [t[max(j, 2)].deriv(2)(w0) / t[max(j, 2)].deriv()(w0) ** 2 for j in range(s + 1)]
    rows = [(0, 0, b[1] * w1, 0)]
    for j in range(2, s + 1):
        slope = 2 * b[j] * w1 / b[j - 1]
        rows.append(
            (2 * b[j] * w0 / b[j - 1], -b[j] / b[j - 2], slope, -(1 - b[j - 1] * t[j - 1](w0)) * slope)
        )
    np.testing.assert_allclose(tableau.recurrence_rows, rows, rtol=1e-9, atol=1e-12)
    assert tableau.order == get_tableau(f"rkl2_{s}").order == 2 and get_tableau(f"rkc1_{s}").order == 1


def test_get_tableau_names_what_it_knows():
    assert get_tableau("rk4") is METHODS["rk4"]
    with pytest.raises(ValueError, match=r"unknown method 'rk5'.*euler, midpoint"):
        get_tableau("rk5")
    with pytest.raises(TypeError, match="got int"):
        get_tableau(4)


def test_dopri8s_interpolant_meets_all_85_conditions_up_to_order_7_at_every_theta():
    """Σ b_i(θ) φ_i(tree) = θ^q/γ(tree), with f at the step's end and the three further stages; C¹ at the ends."""
    tableau = METHODS["dopri8"]
    rows = [[float(x) for x in row] for row in (*tableau.a, tableau.b, *tableau.dense_a)]
    a = [row + [0.0] * (len(rows) - len(row)) for row in rows]
    polynomials = [[float(x) for x in row] for row in tableau.interpolant]
    weights = {tree: stage_weights(tree, a) for q in range(1, 8) for tree in trees(q)}
    for theta in (0.1, 0.37, 0.5, 0.83, 1.0):
        b = [sum(c * theta ** (k + 1) for k, c in enumerate(row)) for row in polynomials]
        for tree, w in weights.items():
            moment = sum(x * y for x, y in zip(b, w, strict=True))
            # Published fractions meet their own conditions to 1e-16, and coefficients go up to 1,400.
            assert abs(moment - theta ** size(tree) / density(tree)) < 1e-12
    value = [sum(row) for row in polynomials]
    slopes = (
        [row[0] for row in polynomials],
        [sum((k + 1) * c for k, c in enumerate(row)) for row in polynomials],
    )
    assert value == pytest.approx([float(x) for x in tableau.b] + [0.0] * 4, abs=1e-12)
    assert slopes[0] == pytest.approx([float(i == 0) for i in range(17)], abs=1e-12)
    assert slopes[1] == pytest.approx([float(i == 13) for i in range(17)], abs=1e-11)
