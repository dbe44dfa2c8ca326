"""Parts of the stability room, each against another way to the same numbers, and what a step limit says of itself."""

import dataclasses
import math
from fractions import Fraction as Q

import numpy as np
import pytest
import torch

from resode import design_method
from resode.stability import StepLimit, eigenvalue_step_limit
from resode.stability import limits as limits_module
from resode.stability.binding import _NODES, _ends_on_nodes, _safe, _stable_on
from resode.stability.function import rounding_of, stability_product
from resode.stability.intervals import rays_of_tableau
from resode.stability.limits import bounds, first_exits, nested, rays_of
from resode.stability.multistep import AdamsRays
from resode.stability.optimal import (
    Problem,
    _converted,
    _in_stages,
    _outermost,
    _to_order,
    ellipse_around,
    rounding_growth,
)
from resode.stability.polynomials import common_factor, divide, positive_intervals, roots_lie_right
from resode.stability.recurrences import RecurrenceRays
from resode.stability.spectra import FirstExits, Spectrum, limits
from resode.stability.unstable_rays import RayPolynomials, _sign_changes, by_axis, complement
from resode.tableaus import METHODS, ButcherTableau, get_tableau

# -- the Adams-Bashforth method --------------------------------------------------------------------

SIGMA = np.array([55, -59, 37, -9]) / 24


def largest_root(z: complex) -> float:
    return float(np.abs(np.roots(np.array([1, -1, 0, 0, 0], complex) - z * np.array([0, *SIGMA]))).max())


def test_the_interval_of_adams_and_bashforth():
    """ζ = −1 is a root at z = −3/10, where 2 = −z·160/24."""
    limit = eigenvalue_step_limit([-1.0, -0.5], "explicit_adams")
    assert limit.step == pytest.approx(0.3, rel=1e-9) and limit.method == "explicit_adams"
    assert limit.limiting_eigenvalue == -1


@pytest.mark.parametrize("growth", [None, (10, 0.05)])
def test_adams_against_the_roots_of_its_polynomial(growth):
    """Along rays of the left half plane, just below and above each end; what may grow, may."""
    bound = 1.05 ** (1 / 10) if growth else 1.0
    for unit in [1j, *np.exp(1j * np.linspace(0.51, 1, 16) * np.pi)]:
        intervals = eigenvalue_step_limit(
            [2 * unit], "explicit_adams", growth=growth, tolerance=0.0
        ).intervals
        assert intervals[0][0] == 0
        for h in np.linspace(0.002, 0.6, 300):
            inside = any(a <= h <= b for a, b in intervals)
            if min(abs(h - end) for pair in intervals for end in pair) > 1e-6:
                assert inside == (largest_root(2 * h * unit) <= bound * (1 + 1e-9)), (unit, h)


def test_adams_and_growing_modes():
    """What grows by itself grows at any step; with a budget it has a step."""
    assert eigenvalue_step_limit([0.5 + 0.1j], "explicit_adams").step == 0
    step = eigenvalue_step_limit([0.5], "explicit_adams", growth=(10, 0.05)).step
    assert largest_root(0.5 * step) == pytest.approx(1.05**0.1, rel=1e-8) and step > 0
    table = AdamsRays().unstable(np.array([-1.0 + 0j, 1.0, -2.0]))
    assert table.shape[0] == 3 and table[1, 0].tolist() == [0.0, np.inf]
    assert table[2, 0, 0] == pytest.approx(table[0, 0, 0] / 2, rel=1e-12)


# -- rays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rkc1_5", "rkc1_9", "rkc2_9", "rkl1_8", "rkl2_11", "rkl2_12"])
def test_rays_by_values_are_the_exact_ones(name):
    """Of up to 20 stages both ways are at hand: recurrences in floats, polynomials in fractions."""
    rng = np.random.default_rng(0)
    lam = np.concatenate(
        [-rng.uniform(0.1, 2, 12) + 1j * rng.normal(size=12), [-1.0, 1j, 0.3 + 1j, 0.5, -1 + 1e-3j]]
    )
    lam = np.append(lam, [-1 + 0.04216965j, -1 + 0.1j])  # rkc1_9 leaves and comes back between two looks
    by_values, exact = RecurrenceRays(get_tableau(name)), rays_of_tableau(get_tableau(name))
    assert isinstance(exact, RayPolynomials)
    for z in lam:
        found, want = by_values.unstable_exactly(z), [pair for pair in exact.unstable_exactly(z)]
        assert len(found) == len(want), z
        np.testing.assert_allclose(found, want, rtol=1e-7, atol=1e-9)
    many = by_values.unstable(lam)
    assert many.shape[0] == len(lam)
    np.testing.assert_allclose(many[0, 0], by_values.unstable(lam[:1])[0, 0])


@pytest.mark.parametrize("name", ["rkc2_9", "rk4"])
def test_products_with_the_stability_function(name):
    """R(A)x by products alone, of a matrix that is not normal."""
    a = np.array([[-1.0, 5.0], [0.0, -2.0]])
    x = np.array([1.0, 2.0])
    value, vectors = np.linalg.eig(a)
    from resode.stability import stability_function

    r = stability_function(name, torch.tensor(value, dtype=torch.complex128)).numpy().real
    want = vectors @ np.diag(r) @ np.linalg.solve(vectors, x)
    np.testing.assert_allclose(stability_product(get_tableau(name), lambda v: a @ v, x), want, rtol=1e-10)


def test_whose_touching_points_rounding_may_move():
    """Explicit methods in floats that stand for no simple fraction, alone."""
    third = 1 / 3 + 1e-13
    typed = ButcherTableau(
        "typed", ((0.0, 0.0), (third, 0.0)), (1 - 1 / (2 * third), 1 / (2 * third)), (0.0, third), order=2
    )
    assert rounding_of(typed) is not None
    gauss = METHODS["gauss4"]
    for tableau in (
        METHODS["rk4"],
        gauss,
        ButcherTableau("rounded", gauss.a, gauss.b, gauss.c, order=4),
        METHODS["kvaerno3"],
        get_tableau("rkl2_9"),
    ):
        assert rounding_of(tableau) is None, tableau
    touches = rounding_of(typed)
    assert touches is not None and touches(-2.0) and not touches(-2.1), "R(−2) = 1 up to rounding"


def test_polynomials_with_a_prime_for_a_leading_coefficient():
    """Where the quick test for repeated roots, modulo 2⁶¹ − 1, must not be trusted."""
    p = 2**61 - 1
    assert positive_intervals([-1, 2 * p, -(p**2)]) == [], "−(px − 1)² is never positive"
    assert positive_intervals([1, -2 * p, p**2]) == [(0.0, math.inf)], "touching 0 divides nothing"
    ends = positive_intervals([-6 * p, 11 * p + 6, -6 * p - 11, p + 6, -1])  # (p − x)(x − 1)(x − 2)(x − 3)
    assert ends == [(1.0, 2.0), (3.0, float(p))]
    assert positive_intervals([-2, 1 + 4 * p, -2 * p - 2 * p**2, p**2]) == [(2.0, math.inf)], (
        "(px − 1)²(x − 2)"
    )
    third = [
        Q(-1),
        Q(15) + Q(8, 15),
        Q(-121, 15),
        Q(1),
    ]  # (x − 1/15)(x − 3)(x − 5): 3 is the middle of a cell
    assert positive_intervals(third) == [(1 / 15, 3.0), (5.0, math.inf)]
    assert positive_intervals([0, 0, -1, 1]) == [(1.0, math.inf)] and positive_intervals([0, 0]) == []
    assert positive_intervals([5]) == [(0.0, math.inf)] and positive_intervals([-5]) == []
    tiny = Q(1, 10**9)
    [(a, b)] = positive_intervals([-tiny * (1 + tiny), 1 + 2 * tiny, -1])  # roots at about 1e-9 and 1
    assert a == pytest.approx(1e-9, rel=1e-8) and b == pytest.approx(1.0, rel=1e-8)
    quotient, rest = divide([Q(1), Q(0), Q(1)], [Q(1), Q(1)])  # x² + 1 = (x + 1)(x − 1) + 2
    assert quotient == [-1, 1] and rest == [2]
    assert common_factor([Q(1), Q(1)], [Q(2), Q(1)]) == [1]


@pytest.mark.parametrize(
    "roots", [[1], [2, 3], [1, 2, 5], [1, 2, 3, 4], [0.5, 1, 2, 3, 7], [1, 1, 1, 2, 2, 9]]
)
def test_routh_by_roots(roots):
    """∏ (x − r), and the same with one root, or a pair, moved to the left or onto the axis."""

    def product(*factors):
        poly = [Q(1)]
        for f in factors:
            poly = [
                sum((Q(f[k]) * poly[n - k] for k in range(len(f)) if 0 <= n - k < len(poly)), Q(0))
                for n in range(len(poly) + len(f) - 1)
            ]
        return poly

    right = [(-Q(r), 1) for r in roots]
    assert roots_lie_right(product(*right)) and roots_lie_right(product(*right, (5, -2, 1)))  # 1 ± 2i
    for other in ((1, 1), (0, 1), (5, 2, 1), (4, 0, 1)):  # −1, 0, −1 ± 2i, ±2i
        assert not roots_lie_right(product(*right, other)), other


def test_signs_that_are_open():
    """A 0 between opposite signs counts one change whichever way it falls; another may add two."""
    signs = np.array([[1, 0, 1], [1, 0, -1], [-1, 1, -1], [0, 1, 1], [1, 1, 0]], dtype=np.int8)
    changes, open_ = _sign_changes(signs)
    assert changes.tolist()[:3] == [0, 1, 2] and open_.tolist() == [True, False, False, False, False]


def test_complements_leave_rounding_out():
    inf = math.inf
    for unstable, want in (
        ([], [(0.0, inf)]),
        ([(0.0, inf)], []),
        ([(1.0, 2.0), (2.0 + 1e-13, 3.0)], [(0.0, 1.0), (3.0, inf)]),
        ([(1.0, 2.0), (2.1, 3.0)], [(0.0, 1.0), (2.0, 2.1), (3.0, inf)]),
        ([(2.0, 5.0), (1.0, 3.0), (4.0, 4.5)], [(0.0, 1.0), (5.0, inf)]),
        ([(0.0, 2.0), (4.0, inf)], [(2.0, 4.0)]),
    ):
        assert complement(np.array(unstable).reshape(-1, 2)) == want


# -- many eigenvalues ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "rk4", "dopri8", "implicit_euler"])
def test_proofs_on_the_axes_hold(name):
    """Eigenvalues on the half axes, of which the ends are known: nothing that leaves is called stable."""
    lam = np.array([-1.0, -3.0, 2.0, 1j, -0.5j, 3j, -1e-3])
    rays = rays_of_tableau(METHODS[name])
    starts, stops = np.moveaxis(rays.unstable(lam), -1, 0)
    seen = 0
    for stable in ([(0.0, 0.3)], [(0.0, 0.9)], [(0.0, 0.1), (0.7, 0.95)], [(2.5, math.inf)]):
        proven = _stable_on(rays, stable, lam, np.abs(lam))
        for k in range(len(lam)):
            hit = any(((starts[k] < b) & (stops[k] > a)).any() for a, b in stable)
            assert proven[k] == (not hit), (lam[k], stable)
            seen += proven[k]
    assert seen
    if not rays.covers_left_half:
        exits = _ends_on_nodes(rays)[-1]
        exits = np.minimum(exits[:-1], exits[1:])
        if name == "euler":  # |1 + h(−c + is)| = 1 at h = 2c
            np.testing.assert_allclose(_ends_on_nodes(rays)[-1], 2 * _NODES, rtol=1e-9)
            assert np.isinf(_ends_on_nodes(rays)[1]).all()
        ratio = _safe(rays)[np.isfinite(exits)] / exits[np.isfinite(exits)]
        assert ratio.max() < 0.95 and np.median(ratio) >= 0.5, (
            "a quick proof reaches more than half of the way"
        )


def test_by_axis():
    lam = np.array([-1.0, 2.0, 1j, -3j, 1 + 1j, -0.5])
    groups = by_axis(lam)
    assert {k: v.tolist() for k, v in groups.items()} == {
        "negative": [0, 5],
        "positive": [1],
        "imaginary": [2, 3],
        "none": [4],
    }


def test_zeros_among_many_eigenvalues_limit_nothing(monkeypatch):
    monkeypatch.setattr(limits_module, "_MANY", 10)
    lam = np.concatenate([np.zeros(5), -np.linspace(0.1, 4, 30), [0.0]])
    limit = eigenvalue_step_limit(lam)
    assert limit.step == 0.5 and limit.limiting_eigenvalue == -4 and limit.intervals == [(0.0, 0.5)]
    many = eigenvalue_step_limit(lam, "rkl1_25")
    assert many.step == pytest.approx((25**2 + 25) / 4, rel=1e-9), "by values of R every ray is looked at"
    growing = eigenvalue_step_limit(np.concatenate([lam, [1.0, 2.0]]), "implicit_euler")
    assert growing.step == 0 and growing.intervals == [(2.0, math.inf)] and growing.growing.tolist() == [2, 1]
    assert eigenvalue_step_limit(np.zeros(20)).step == math.inf


def test_exits_of_any_shape():
    lam = np.array([[-1.0, -1 + 1j], [-1 - 1j, 0.0]])
    exits = first_exits(rays_of("euler"), lam)
    np.testing.assert_allclose(exits, [[2.0, 1.0], [1.0, np.inf]])
    assert first_exits(rays_of("euler"), np.zeros((0, 2))).shape == (0, 2)
    assert nested([1, 2, 3, 4, 5, 6], (2, 3)) == [[1, 2, 3], [4, 5, 6]] and nested([], (0, 3)) == []


# -- designs ---------------------------------------------------------------------------------------


def test_ellipses_around_spectra():
    """A segment, a disc, and for a tall one the least a + b by its derivative: a = t/2, (t² − 1)^{3/2} = 10."""
    real = ellipse_around(np.array([-4.0, -1.0]) + 0j)
    assert (real.c, real.g, real.q) == (-2.0, 2.0, 1.0)
    imaginary = ellipse_around(np.array([3j, 1j]))
    assert (imaginary.c, imaginary.g, imaginary.q) == (0.0, 3.0, -1.0)
    disc = ellipse_around(-1 + np.exp(1j * np.linspace(0, np.pi, 181)))
    assert disc.c == pytest.approx(-1) and disc.g == pytest.approx(2, rel=1e-2) and abs(disc.q) < 0.02
    tall = ellipse_around(np.array([-1 + 5j]))
    t = math.sqrt(1 + 10 ** (2 / 3))
    assert tall.g == pytest.approx(t / 2 + 5 / math.sqrt(1 - t**-2), rel=1e-4) and tall.q < -0.5
    for values in (np.array([-1 + 5j]), np.array([-3 + 1j, -0.1 + 2j, -5.0]), np.array([-1.0, -1 + 1e-3j])):
        e = ellipse_around(values)
        a, b = e.g * (1 + e.q) / 2, e.g * (1 - e.q) / 2
        points = np.append(values, 0)
        assert (((points.real - e.c) / a) ** 2 + (points.imag / b) ** 2 <= 1 + 1e-9).all()


@pytest.mark.parametrize("value", [-1.0 + 0j, 1j, -0.3 + 0.8j])
def test_faber_polynomials(value):
    """u^k + q^k/u^k at z = c + g/2 (u + q/u); and the same by powers of z."""
    e = ellipse_around(np.array([value, -0.2]))
    u = np.array([1.3 + 0.4j, 0.9 - 1.1j])
    z = e.c + e.g / 2 * (u + e.q / u)
    faber, taylor = e.faber(z, 5), e.taylor(5, 5)
    for k in range(6):
        want = u**k + (e.q / u) ** k if k else np.ones(2)
        np.testing.assert_allclose(faber[k], want, rtol=1e-10)
        np.testing.assert_allclose(np.polyval(taylor[k][::-1], z), want, rtol=1e-9)
    assert e.faber(z, 1).shape == (2, 2) and e.taylor(1, 3).shape == (2, 4)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [1j, -0.1 + 1j])
def test_the_row_that_holds_r_near_zero(order, value):
    """|R|² = 1 + 2 Re z + N|z|^q: N of any R of the order, from the powers of R(iy)."""
    problem, h = Problem(np.array([value]), 6, order, 1e-3), 1.7
    given = problem._given(h)
    row, room = problem._axis_row(h, given)
    x = np.random.default_rng(order).normal(size=problem.free.shape[1])
    powers = problem.ellipse.taylor(6, 6)[1:]
    r = (given + problem.free @ x) @ powers / h ** np.arange(7)  # R(z) at λ = z/h
    r[0] = 1.0
    np.testing.assert_allclose(r[: order + 1], [1 / math.factorial(k) for k in range(order + 1)], atol=1e-9)
    along = np.array([c * 1j**k for k, c in enumerate(r)])
    square = np.convolve(along, along.conj()).real
    q = 2 * (order // 2) + 2
    size = abs(value)
    allowed = 2 * abs(value.real) / size / min(h * size, 0.03) ** (q - 1)
    assert row @ x - room == pytest.approx(square[q] + 1e-3 - allowed, rel=1e-7, abs=1e-8)
    assert problem.power == q


def test_growth_of_rounding_is_the_sum_over_its_rows():
    """Each row's terms, times the change of R by a change of that row's result."""
    z = np.array([-3.0 + 0j, -10 + 1j])
    for tableau in (get_tableau("rkc2_7"), design_method([-1.0, -0.5 + 0.2j], 5, 2)):
        check_growth(tableau, z)


def check_growth(tableau, z):
    rows, weights = tableau.recurrence_rows, tableau.recurrence_sum

    def run(z, extra=None):
        before = d = 0j
        total, sizes, added = 1.0, [], 0.0
        for j, ((mu, nu, slope, at_start), w) in enumerate(zip(rows, weights, strict=True)):
            sizes.append(abs(mu * d) + abs(nu * before) + abs(z) * (abs(slope * (1 + d)) + abs(at_start)))
            before, d = (
                d,
                mu * d + nu * before + z * (slope * (1 + d) + at_start) + (1.0 if j == extra else 0.0),
            )
            total, added = total + w * d, added + abs(w * d)
        return total, sizes, added

    worst = 0.0
    for point in z:
        base, sizes, added = run(point)
        worst = max(worst, added + sum(abs(run(point, j)[0] - base) * sizes[j] for j in range(len(rows))))
    assert rounding_growth(tableau, z) == pytest.approx(worst, rel=1e-9)


def test_a_polynomial_in_stages_and_in_another_ellipse():
    """R = 1 + Σ w_k (F_k − F_k(0)) at λ = z/h: the stages' polynomial, and the weights that give it elsewhere."""
    from resode.stability import stability_coefficients

    e, other, h = ellipse_around(np.array([-1 + 0.5j])), ellipse_around(np.array([-1.2 + 0.2j])), 2.0
    problem = Problem(np.array([-1 + 0.5j]), 4, 1, 0.0)
    x = np.random.default_rng(0).normal(size=problem.free.shape[1]) / 10
    weights = problem._given(h) + problem.free @ x
    made = _in_stages(e, h, weights, 1, "made", "source")
    found = np.array([float(c) for c in stability_coefficients(made)[0]])
    want = weights @ e.taylor(4, 4)[1:] / h ** np.arange(5)
    want[0] = 1
    np.testing.assert_allclose(found, want, rtol=1e-9)
    assert (
        made.name == "made"
        and made.order == 1
        and 0 <= min(made.stage_times)
        and max(made.stage_times) <= 1 + 1e-12
    )
    again = _in_stages(other, h, _converted(made, other, h), 1, "", "")
    np.testing.assert_allclose([float(c) for c in stability_coefficients(again)[0]], want, rtol=1e-9)
    loose = _in_stages(e, h, weights, 1, "", "", exact=False)
    np.testing.assert_allclose(loose.recurrence_rows, made.recurrence_rows, rtol=1e-12)
    np.testing.assert_allclose(loose.recurrence_sum, made.recurrence_sum, rtol=1e-6, atol=1e-9)
    exactly = [tuple(map(Q, row)) for row in made.recurrence_rows]
    corrected = _to_order(exactly, [Q(w) * (1 + Q(1, 1000)) for w in made.recurrence_sum], 1)
    d = [Q(0), Q(0)]
    before, slopes = Q(0), []
    for mu, nu, slope, at_start in exactly:  # dd_j/dz at 0
        before, d[1] = d[1], mu * d[1] + nu * before + slope + at_start
        slopes.append(d[1])
    assert sum(w * s for w, s in zip(corrected, slopes, strict=True)) == 1


def test_the_outermost_of_each_direction():
    values = np.array([1j, 2j, -1 + 1j, -2 + 2j, -3.0, -1.0])
    assert sorted(_outermost(values).tolist()) == [1, 3, 4]


# -- what a limit says -----------------------------------------------------------------------------


def limit(**given) -> StepLimit:
    parts = dict(
        step=1.0,
        limiting_eigenvalue=-2.0,
        intervals=[(0.0, 1.0)],
        growing=np.zeros(0),
        decaying_step=1.0,
        method="rk4",
    )
    return StepLimit(**{**parts, **given})


def test_lines_of_one_limit():
    assert str(limit()) == "rk4: stable up to step 1; λ = -2 leaves the region first."
    assert str(limit(limiting_eigenvalue=-1 - 2j)).endswith("λ = -1 - 2i leaves the region first.")
    for contraction, line in (
        (0.5, "at steps above 0.5 (contraction limit)"),
        (0.0, "grow for a while at any step"),
    ):
        text = str(limit(contraction_step=contraction, logarithmic_norm=0.25))
        assert line in text and "(logarithmic norm 0.25)" in text and len(text.splitlines()) == 2
    assert str(limit(contraction_step=1.0, logarithmic_norm=-1.0)) == str(limit())
    assert str(limit(step=math.inf)) == "rk4: stable at every step size."
    assert "lies on the imaginary axis" in str(limit(step=0.0, limiting_eigenvalue=1j))
    assert "stable up to a step ≤ 1, an upper bound from λ = -2" in str(limit(converged=False, error=0.1))
    assert "stable up to a step ≤ 1, an upper bound from λ = -2" in str(limit(converged=False))
    lost = str(limit(converged=False, error=math.inf, condition=1e9))
    assert "the limit is not known" in lost and "condition number 1e+09" in lost
    assert "no eigenvalue has been found well enough" in str(
        limit(converged=False, error=math.inf, complete=False)
    )
    again = str(limit(intervals=[(0.0, 1.0), *[(float(i), i + 0.5) for i in range(2, 7)]]))
    assert "Stable again for steps in [2, 2.5], [3, 3.5], [4, 4.5], [5, 5.5], …." in again
    assert "…" not in str(limit(intervals=[(0.0, 1.0), *[(float(i), i + 0.5) for i in range(2, 6)]]))
    assert "Stable again" not in str(limit(intervals=[(0.0, 1.0), (2.0, 3.0)], converged=False))


def test_lines_of_growing_modes():
    for count, words in ((1, "1 mode grows with the equation itself, fastest λ = 3"), (2, "2 modes grow")):
        text = str(limit(step=0.0, limiting_eigenvalue=3.0, growing=np.arange(count) + 3.0))
        assert words in text and f"Without {'it' if count == 1 else 'them'} the limit would be 1." in text
    grown = dict(step=0.0, limiting_eigenvalue=3.0, growing=np.array([3.0]))
    assert "at least 1 mode" in str(limit(**grown, complete=False))
    assert len(str(limit(**grown, decaying_step=math.inf)).splitlines()) == 1
    assert "would be ≤ 1 (an upper bound)." in str(limit(**grown, decaying_converged=False))
    assert "would be ≤ 1 (an upper bound)." in str(limit(**grown, decaying_converged=False, error=0.5))
    assert "about 1, as the eigenvalues were computed" in str(
        limit(**grown, decaying_converged=False, error=math.inf)
    )


def batch(steps, decaying=None, **given) -> StepLimit:
    steps = np.array(steps)
    n = len(steps)
    parts = dict(
        limiting_eigenvalue=np.full(n, -2.0 + 0j), intervals=[[]] * n, growing=[np.zeros(0)] * n, method="rk4"
    )
    return StepLimit(
        step=steps, decaying_step=steps if decaying is None else np.array(decaying), **{**parts, **given}
    )


def test_lines_of_a_batch():
    text = "rk4, 3 spectra: stable up to step 1 in all of them, 2 in half, 5 at most."
    yes, no = np.ones(3, bool), np.array([True, True, False])
    assert str(batch([1.0, 5.0, 2.0], converged=yes, decaying_converged=yes)) == text
    some = str(batch([1.0, 5.0, 2.0], converged=no, decaying_converged=no, error=np.array([0.0, 0.0, 0.1])))
    assert (
        some
        == text.replace("1 in", "≤ 1 in").replace("2 in", "≤ 2 in").replace("5 at", "≤ 5 at")
        + "\n  It is an upper bound in 1: not converged."
    )
    values = np.array([1.0 + 0j, -2.0, 3.0])
    mixed = str(batch([0.0, 5.0, 0.0], [1.0, 5.0, 2.0], limiting_eigenvalue=values))
    assert "No small step is stable in 2, fastest λ = 3; without growing modes: 1 in all, 2 in half." in mixed
    every = str(batch([0.0, 0.0, 0.0], [1.0, 5.0, 2.0], limiting_eigenvalue=values))
    assert (
        every
        == "rk4, 3 spectra: no small step is stable in any of them, fastest λ = 3; without growing modes: 1 in all, 2 in half."
    )
    slow = str(
        batch(
            [0.0, 0.0, 0.0],
            [1.0, 5.0, 2.0],
            limiting_eigenvalue=values,
            decaying_converged=no,
            error=np.array([0.0, 0.0, 0.1]),
        )
    )
    assert "≤ 1 in all, ≤ 2 in half" in slow and "Without growing modes it is an upper bound in 1" in slow
    lost = batch(
        [1.0, 5.0, 2.0],
        converged=no,
        decaying_converged=no,
        error=np.array([0.0, 0.0, np.inf]),
        condition=np.array([9.0, 1.0, 7e9]),
    )
    assert (
        "1 where none is known" in str(lost)
        and "(condition 7e+09)" in str(lost)
        and "upper bound" not in str(lost)
    )
    steps, decaying, exact = bounds(lost)
    assert steps.tolist() == decaying.tolist() == [1.0, 5.0, math.inf] and exact.tolist() == no.tolist()
    fine = batch(
        [1.0, 0.0],
        [1.0, 2.0],
        converged=np.ones(2, bool),
        decaying_converged=np.array([True, False]),
        error=np.array([np.inf, np.inf]),
    )
    assert bounds(fine)[0].tolist() == [1.0, 0.0] and bounds(fine)[1].tolist() == [1.0, math.inf]
    assert (
        str(batch([1.0], [1.0], intervals=[[(0.0, 1.0)]], growing=[np.zeros(0)]))
        == "rk4: stable up to step 1; λ = -2 leaves the region first."
    )


# -- spectra with errors ---------------------------------------------------------------------------


def spectrum(
    values, errors=0.0, complete=True, normal=False, steady=True, scale=None, residuals=None, n=None
) -> Spectrum:
    values = np.atleast_2d(np.array(values, dtype=complex))
    errors = np.broadcast_to(np.asarray(errors, float), values.shape).copy()
    one = np.ones(len(values), dtype=bool)
    return Spectrum(
        values=values, errors=errors, residuals=errors.copy() if residuals is None else np.broadcast_to(residuals, values.shape).copy(),
        conditions=np.ones(values.shape), scale=np.full(len(values), np.abs(values).max() if scale is None else scale),
        n=values.shape[1] if n is None else n, eps=2.0**-52, shape=(len(values),), origin=None,
        complete=one & complete, normal=one & normal, steady=one & steady,
    )  # fmt: skip


def test_exact_spectra_have_exact_limits():
    with pytest.raises(dataclasses.FrozenInstanceError):
        spectrum([[1.0]]).n = 2
    found = limits(spectrum([[-1.0, -4.0, 0.0]]), "euler")
    assert found.step[0] == 0.5 and found.converged[0] and found.decaying_converged[0] and found.error[0] == 0
    assert found.limiting_eigenvalue[0] == -4
    grown = limits(spectrum([[1.0, -4.0]]), "euler")
    assert (
        grown.step[0] == 0
        and grown.decaying_step[0] == 0.5
        and grown.converged[0]
        and grown.growing[0].tolist() == [1]
    )


@pytest.mark.parametrize(("errors", "trusted"), [(0.9e-3, True), (1.1e-3, False)])
def test_values_of_a_search_count_where_they_are_known(errors, trusted):
    """To a thousandth of ‖J‖; where none is, all are all that is known."""
    s = spectrum([[-4.0, -1.0]], [[1e-9, 4 * errors]], complete=False)
    assert s.trusted.tolist() == [[True, trusted]]
    assert spectrum([[-4.0, -1.0]], 0.1, complete=False).trusted.all()
    assert spectrum([[-4.0, -1.0]], 0.1).trusted.all()
    assert spectrum([[-4.0, math.nan]], 0.0, scale=4.0).trusted.tolist() == [[True, False]]


def test_the_error_of_a_limit_is_what_its_eigenvalues_error_makes():
    """Euler's 2/4 where λ = −4 ± 0.004: 1e-3; beyond what is accepted the limit is a bound by that much."""
    found = limits(spectrum([[-4.0, -1.0]], [[4e-3, 0.0]], complete=False, steady=False), "euler")
    assert found.error[0] == pytest.approx(1e-3, rel=0.01) and not found.converged[0]
    assert 0.5 <= found.step[0] <= 0.5 * 1.0011
    sure = limits(spectrum([[-4.0, -1.0]], [[4e-9, 0.0]], complete=False), "euler")
    assert sure.converged[0] and sure.step[0] == 0.5
    lost = limits(spectrum([[-4.0, -1.0]], 5.0), "euler")
    assert not lost.converged[0] and np.isinf(lost.error[0])


def test_a_mode_that_may_grow_or_not_is_no_growing_one():
    doubtful = FirstExits(spectrum([[0.01, -4.0]], [[0.1, 0.0]]), "euler")
    assert not doubtful.unstable[0] and doubtful.doubtful[0] and not doubtful.converged[0]
    sure = FirstExits(spectrum([[0.3, -4.0]], [[0.1, 0.0]]), "euler")
    assert sure.unstable[0] and not sure.doubtful[0] and sure.converged[0], (
        "0.3 > 2 × 0.1, of a full spectrum of two"
    )
    between = FirstExits(spectrum([[0.15, -4.0]], [[0.1, 0.0]]), "euler")
    assert not between.unstable[0], "all of two ill-conditioned ones lie within twice the first-order error"
    assert FirstExits(spectrum([[0.15, -4.0]], [[0.1, 0.0]], normal=True), "euler").unstable[0]


def test_doubts_of_growing_modes():
    """Of a normal J the first-order error is all, also of a search; two doubts are no certainty."""
    normal = FirstExits(spectrum([[0.15, -4.0]], [[0.1, 0.0]], normal=True, complete=False), "euler")
    assert normal.unstable[0]
    beside = FirstExits(spectrum([[0.01, 1j, -1j, -4.0]], [[0.1, 1e-3, 1e-3, 0.0]]), "euler")
    assert beside.beside.any() and beside.doubtful[0]
    found = FirstExits(spectrum([[0.5, -4.0]], [[1e-5, 0.0]], complete=False), "euler")
    assert found.converged[0], "the rightmost one, known to a part of √rtol"
    assert not FirstExits(spectrum([[0.5, -4.0]], [[1e-2, 0.0]], complete=False), "euler").converged[0]


def test_what_a_search_cannot_have_seen():
    """Beside growing modes something may lie near the axis, of which Euler's region holds nothing and rk4's 2.8."""
    s = dict(complete=False, steady=True)
    values = [[0.5 + 1j, 0.5 - 1j, -4.0]]
    assert not FirstExits(spectrum(values, **s), "euler").all_seen[0]
    assert FirstExits(spectrum(values, **s), "rk4").all_seen[0]
    assert not FirstExits(spectrum([[0.5 + 9j, 0.5 - 9j, -4.0]], **s), "rk4").all_seen[0]
    assert FirstExits(spectrum([[0.5, -4.0]], **s), "euler").all_seen[0], (
        "a hull on the real axis crosses at 0"
    )
    assert FirstExits(spectrum(values), "euler").all_seen[0]
