"""R(z), the intervals and the step limit of a spectrum, against other ways to the same numbers."""

from __future__ import annotations

import itertools
import math
import os
import time
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resode import plots
from resode.stability import (
    StepLimit,
    eigenvalue_step_limit,
    imaginary_stability_interval,
    real_stability_interval,
    stability_coefficients,
    stability_function,
    stability_properties,
    stable_intervals,
)
from resode.stability import limits as limits_module
from resode.stability.binding import _stable_on
from resode.stability.intervals import rays_of_tableau
from resode.stability.polynomials import positive_intervals, roots_lie_right
from resode.stability.unstable_rays import bernstein_matrix
from resode.tableaus import METHODS, ButcherTableau
from theory.measures.edge import edge_check

EXPLICIT = [name for name, t in METHODS.items() if t.explicit]
IMPLICIT = [name for name in METHODS if name not in EXPLICIT]
SPECTRA = 10_000 if os.environ.get("RESODE_FULL_TESTS") else 1000


def step_factor(name: str, z: np.ndarray) -> np.ndarray:
    """R(z) by solving the stages in float64, from the tableau alone."""
    tableau = METHODS[name]
    a, b = np.array(tableau.a, dtype=float), np.array(tableau.b, dtype=float)
    if tableau.explicit:
        k: list[np.ndarray] = []
        for row in a:
            k.append(1 + z * sum((c * x for c, x in zip(row, k, strict=False) if c), np.zeros_like(z)))
        return 1 + z * sum(c * x for c, x in zip(b, k, strict=True))
    system = np.eye(len(b)) - z[..., None, None] * a
    ones = np.ones((*z.shape, len(b), 1))
    return 1 + z * (np.linalg.solve(system, ones)[..., 0] @ b)


# -- R(z) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_values_are_those_of_the_stages(name):
    """det(I − zA + z·1bᵀ)/det(I − zA) is what one step does to x = 1."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=200) * 2 + 2j * rng.normal(size=200)
    ours = stability_function(name, torch.as_tensor(z)).numpy()
    # kvaerno5's R has a pole of order 5 at 3.8, beside which both ways lose digits
    rtol = 1e-9 if name == "kvaerno5" else 2e-12
    np.testing.assert_allclose(ours, step_factor(name, z), rtol=rtol, atol=2e-12)


@pytest.mark.parametrize("name", METHODS)
def test_series_is_that_of_the_exponential_up_to_the_order(name):
    """P = Q·e^z up to z^p, exactly; and no further, unless R is e^z's Padé approximant by chance.

    The γ of these three is no rational number: P's degree is that of γ, and the rest is rounding.
    """
    numerator, denominator = stability_coefficients(name)

    def defect(k: int) -> Fraction:
        series = sum((q / math.factorial(k - j) for j, q in enumerate(denominator[: k + 1])), Fraction(0))
        return (numerator[k] if k < len(numerator) else Fraction(0)) - series

    order = METHODS[name].order
    rounded = Fraction(1, 10**15) if name in ("sdirk2", "trbdf2", "kvaerno3") else 0
    assert all(abs(defect(k)) <= rounded for k in range(order + 1))
    assert abs(defect(order + 1)) > rounded


def test_known_coefficients():
    """By hand, and from Hairer & Wanner IV.3 for the implicit ones."""
    assert stability_coefficients("rk4") == (
        (1, 1, Fraction(1, 2), Fraction(1, 6), Fraction(1, 24)),
        (1,),
    )
    assert stability_coefficients("bosh3")[0] == (1, 1, Fraction(1, 2), Fraction(1, 6))  # b_4 = 0
    assert stability_coefficients("dopri5")[0][6] == Fraction(1, 600)
    assert stability_coefficients("fehlberg45")[0][6] == Fraction(1, 2080)
    assert stability_coefficients("radau5")[1] == (1, Fraction(-3, 5), Fraction(3, 20), Fraction(-1, 60))
    assert stability_coefficients("trapezoid") == stability_coefficients("implicit_midpoint")


def test_a_tableau_in_floats_is_the_method_it_stands_for():
    """1/6 in float64 is not 1/6, but the boundary of the region must be the same."""
    exact = METHODS["rk4"]
    floats = ButcherTableau(
        "typed", tuple(tuple(map(float, r)) for r in exact.a), tuple(map(float, exact.b)), exact.c, order=4
    )
    assert stability_coefficients(floats) == stability_coefficients("rk4")
    gauss = METHODS["gauss4"]
    rounded = ButcherTableau("rounded", gauss.a, gauss.b, gauss.c, order=4)  # without the exact R
    assert stability_properties(rounded).letters == "A, I"
    assert stable_intervals(rounded, 1j) == ((0.0, math.inf),)


def test_a_wrong_order_is_refused():
    wrong = ButcherTableau("wrong", ((0, 0), (Fraction(1, 3), 0)), (0, 1), (0, Fraction(1, 3)), order=2)
    with pytest.raises(ValueError, match=r"order 2 asks for .* coefficient of z\^2 differs by -0.167"):
        stability_coefficients(wrong)


@pytest.mark.parametrize("name", ["euler", "rk4", "dopri8", "radau5", "gauss4"])
def test_dtype_shape_and_gradient(name):
    z = torch.randn(3, 2, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    assert stability_function(name, z).dtype == torch.complex64
    assert stability_function(name, z).shape == (3, 2)
    double = z.to(torch.complex128).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: stability_function(name, z), double)


def test_poles_and_far_away():
    """1/0 and overflow are infinite growth, not nan; R tends to its limit without overflow."""
    pole = stability_function("implicit_euler", torch.tensor([1 + 0j]))
    assert pole.abs().item() == math.inf
    assert stability_function("dopri8", torch.tensor([1e30 + 1e30j])).abs().item() == math.inf
    far = torch.tensor([-1e200 + 0j], dtype=torch.complex128)
    assert stability_function("radau5", far).abs().item() < 1e-199
    assert stability_function("gauss4", far).item() == pytest.approx(1, abs=1e-15)
    assert torch.isnan(stability_function("radau5", torch.tensor([complex("nan")])).abs()).all()


@pytest.mark.parametrize("z", [torch.tensor([-1.0]), torch.tensor([1]), -1.0, 1j, np.array([1j])])
def test_real_z_and_no_tensor_are_refused(z):
    with pytest.raises(TypeError, match="z must be a complex tensor"):
        stability_function("rk4", z)


def test_an_unknown_method_lists_the_names():
    with pytest.raises(ValueError, match=r"unknown method 'rk5'.*rk4.*radau5"):
        stability_function("rk5", torch.tensor([1j]))


# -- intervals -----------------------------------------------------------------------------------


def mpmath_intervals(name: str, direction: complex) -> list[tuple[mpmath.mpf, mpmath.mpf]]:
    """Stable intervals along a half axis by mpmath at 60 digits: all complex roots, then signs between them."""
    tableau = METHODS[name]
    with mpmath.workdps(60):
        a = mpmath.matrix([[mpmath.mpf(x.numerator) / x.denominator for x in row] for row in tableau.a])
        b = [mpmath.mpf(x.numerator) / x.denominator for x in tableau.b]
        coefficients, vector = [mpmath.mpf(1)], mpmath.ones(len(b), 1)
        for k in range(1, len(b) + 1):
            value = mpmath.fdot(b, vector)
            coefficients.append(1 / mpmath.factorial(k) if k <= tableau.order else value)
            vector = a * vector
        # |R|² − 1 as a polynomial in r, lowest first
        along = [c * mpmath.mpc(direction) ** k for k, c in enumerate(coefficients)]
        square = [mpmath.mpf(0)] * (2 * len(along) - 1)
        for j, p in enumerate(along):
            for k, q in enumerate(along):
                square[j + k] += (p * mpmath.conj(q)).real
        square[0] -= 1
        while abs(square[-1]) < 1e-50:
            square.pop()
        while abs(square[0]) < 1e-50:
            square.pop(0)
        roots = mpmath.polyroots(square[::-1], maxsteps=500, extraprec=400)
        ends = [
            mpmath.mpf(0),
            *sorted(r.real for r in roots if abs(r.imag) < 1e-30 and r.real > 0),
            mpmath.inf,
        ]
        stable = []
        for lo, hi in itertools.pairwise(ends):
            middle = lo + 1 if hi == mpmath.inf else (lo + hi) / 2
            if mpmath.polyval(square[::-1], middle) <= 0:
                stable.append((lo, hi))
        return stable


@pytest.mark.parametrize("direction", [-1, 1j], ids=["real", "imaginary"])
@pytest.mark.parametrize("name", EXPLICIT)
def test_intervals_against_mpmath(name, direction):
    """Durand-Kerner at 60 digits shares neither the algorithm nor the arithmetic."""
    theirs = [(a, b) for a, b in mpmath_intervals(name, direction) if b - a > 1e-12 * b]
    ours = stable_intervals(name, direction)
    assert len(ours) == len(theirs)
    for (a, b), (c, d) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(float(c), rel=4e-16, abs=0)
        assert b == pytest.approx(float(d), rel=4e-16, abs=0)
    first = real_stability_interval if direction == -1 else imaginary_stability_interval
    assert first(name) == (ours[0][1] if ours and ours[0][0] == 0 else 0.0)


def test_published_intervals():
    """Twelve digits from roots by radicals: 2.7852… is the real root of r³ − 4r² + 12r − 24."""
    assert real_stability_interval("rk4") == pytest.approx(2.785293563405, abs=5e-13)
    assert imaginary_stability_interval("rk4") == pytest.approx(math.sqrt(8), rel=4e-16)
    for name in ("bosh3", "kutta3", "ssprk3", "heun3"):
        assert real_stability_interval(name) == pytest.approx(2.512745326618, abs=5e-13)
        assert imaginary_stability_interval(name) == pytest.approx(math.sqrt(3), rel=4e-16)


def test_no_imaginary_segment_is_exactly_zero():
    """|R(iy)|² − 1 begins with a positive coefficient: y², y⁴/4, and 1.1e-7·y^10 for dopri8."""
    none = [name for name in METHODS if imaginary_stability_interval(name) == 0]
    assert none == ["euler", "midpoint", "heun2", "ralston2", "fehlberg45", "dopri8"]


def test_disconnected_intervals_are_listed():
    (first, further) = stable_intervals("fehlberg45", -1)
    assert first[0] == 0 and further[0] > 12 > first[1]
    r = np.array([first[1] + 0.01, further[0] - 0.001, sum(further) / 2, further[1] + 0.001])
    assert list(np.abs(step_factor("fehlberg45", -r + 0j)) <= 1) == [False, False, True, False]
    assert stable_intervals("dopri8", 1j)[0][0] > 1.5


@pytest.mark.parametrize("name", IMPLICIT)
def test_a_stable_methods_have_no_limit_to_the_left(name):
    assert real_stability_interval(name) == imaginary_stability_interval(name) == math.inf


def test_letters():
    """Hairer & Wanner IV.3: Padé(k, k) is A- and I-stable, Radau IIA L-stable; no explicit method is any of it."""
    letters = {name: stability_properties(name).letters for name in METHODS}
    assert {letters[name] for name in EXPLICIT} == {"–"}
    assert letters["implicit_euler"] == letters["radau5"] == "A, L, I"
    assert letters["implicit_midpoint"] == letters["trapezoid"] == letters["gauss4"] == "A, I"


def test_i_stable_is_not_a_stable_with_a_pole_on_the_left():
    """R = (1 − z/2)/(1 + z/2): |R| = 1 on the axis, a pole at −2."""
    mirrored = ButcherTableau(
        "mirrored",
        ((Fraction(-1, 2),),),
        (Fraction(1),),
        (Fraction(-1, 2),),
        order=0,
        rational=((Fraction(1), Fraction(-1, 2)), (Fraction(1), Fraction(1, 2))),
    )
    properties = stability_properties(mirrored)
    assert properties.i_stable and not properties.a_stable and not properties.l_stable


@given(st.lists(st.complex_numbers(max_magnitude=9, allow_nan=False), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_routh_against_numpy_roots(roots):
    """Real polynomials with chosen roots, none within 1e-3 of the axis."""
    roots = [complex(round(r.real, 2), round(r.imag, 2)) for r in roots]
    roots = [r for r in roots if abs(r.real) > 1e-3] or [1 + 0j]
    poly = np.poly([*roots, *np.conj(roots)])[::-1].real
    assert roots_lie_right([Fraction(c) for c in poly]) == all(r.real > 0 for r in np.roots(poly[::-1]))


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_touching_the_boundary_is_no_exit(stages):
    """R = T_s(1 + z/s²) touches ±1 s − 1 times inside its interval [−2s², 0]; |R| = 1 is stable."""
    tableau = chebyshev(stages)
    assert stable_intervals(tableau) == ((0.0, 2.0 * stages**2),)
    assert eigenvalue_step_limit([-1.0], tableau).step == 2.0 * stages**2
    # Off the axis the region pinches at the touching points: the first of them is the limit.
    touch = stages**2 * (1 - math.cos(math.pi / stages))
    assert eigenvalue_step_limit([-1 + 1e-6j], tableau).step == pytest.approx(touch, rel=1e-2)


def chebyshev(stages: int) -> ButcherTableau:
    """The first-order method with R = T_s(1 + z/s²), as a chain of stages."""
    poly = [Fraction(0)] * (stages + 1)
    t = np.polynomial.chebyshev.cheb2poly([0] * stages + [1])
    for n, c in enumerate(t):  # (1 + z/s²)^n
        for k in range(n + 1):
            poly[k] += Fraction(int(c)) * math.comb(n, k) / Fraction(stages**2) ** k
    # x_i = x + a_i·η·f(x_{i−1}): the coefficients of R are the products of the a_i from the last stage down
    chain = [poly[k + 1] / poly[k] for k in range(1, stages)][::-1]
    a = tuple(
        tuple(chain[i - 1] if j == i - 1 else Fraction(0) for j in range(stages)) for i in range(stages)
    )
    b = (*(Fraction(0),) * (stages - 1), Fraction(1))
    return ButcherTableau("chebyshev", a, b, tuple(sum(row, Fraction(0)) for row in a), order=1)


@pytest.mark.parametrize("direction", [0, complex("nan"), math.inf])
def test_a_direction_must_point_somewhere(direction):
    with pytest.raises(ValueError, match="a direction is a finite complex number other than 0"):
        stable_intervals("rk4", direction)


# -- the step limit ------------------------------------------------------------------------------


def test_two_real_eigenvalues():
    """−5 leaves first: 2/5, and 2.785293563405/5 for rk4."""
    assert eigenvalue_step_limit([-2, -5]).step == 0.4
    assert eigenvalue_step_limit([-2, -5], "rk4").step == pytest.approx(0.557058712681, abs=5e-13)


def test_the_limiting_eigenvalue_is_not_the_largest():
    """Euler: η < −2 Re λ/|λ|² = 0.2/4.01 for −0.1 ± 2i, and 0.4 for −5."""
    limit = eigenvalue_step_limit([-5, -0.1 - 2j, -0.1 + 2j])
    assert limit.step == pytest.approx(0.2 / 4.01, rel=1e-15)
    assert limit.limiting_eigenvalue == -0.1 + 2j
    assert limit.intervals == [(0.0, limit.step)]


@pytest.mark.parametrize("name", EXPLICIT)
def test_a_growing_pair_allows_no_step(name):
    """λ = 0.01 ± i grows with the equation; some methods are stable again further out."""
    limit = eigenvalue_step_limit([0.01 + 1j, 0.01 - 1j], name)
    assert limit.step == 0.0 and limit.decaying_step == math.inf
    assert sorted(limit.growing.imag) == [-1, 1]
    assert limit.limiting_eigenvalue == 0.01 + 1j
    h = np.linspace(1e-3, 8, 20_001)
    stable = np.abs(step_factor(name, h * (0.01 + 1j))) <= 1
    inside = np.zeros_like(stable)
    for a, b in limit.intervals:
        inside |= (h >= a) & (h <= b)
    assert (stable == inside).all()
    assert (name == "rk4") <= bool(limit.intervals)


def test_implicit_methods_are_not_capped():
    """Implicit Euler on λ = 1 is stable from h = 2 on; A-stable methods never limit a decaying spectrum."""
    growing = eigenvalue_step_limit([1.0], "implicit_euler")
    assert growing.step == 0 and growing.intervals == [(2.0, math.inf)]
    for name in IMPLICIT:
        limit = eigenvalue_step_limit([-1e-6 + 1e3j, -1e9, 1j], name)
        assert limit.step == math.inf and limit.intervals == [(0.0, math.inf)]
        assert np.isnan(limit.limiting_eigenvalue)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_rounding_decides_nothing(dtype):
    """A real part of a few units in the last place is the imaginary axis, not growth or decay."""
    eps = torch.finfo(dtype).eps
    pairs = torch.tensor([2 * eps + 2j, 2 * eps - 2j, -3 * eps + 1j, -3 * eps - 1j, eps], dtype=dtype)
    limit = eigenvalue_step_limit(pairs, "rk4")
    assert limit.step == pytest.approx(math.sqrt(2), rel=1e-15)
    assert limit.limiting_eigenvalue == 2j and len(limit.growing) == 0
    assert eigenvalue_step_limit(pairs).step == 0
    exact = eigenvalue_step_limit(pairs, "rk4", tolerance=0.0)
    assert exact.step == 0 and len(exact.growing) == 3


def test_zero_eigenvalues_limit_nothing():
    assert eigenvalue_step_limit([0.0, 0.0]).step == math.inf
    assert eigenvalue_step_limit([0.0, -1e-20, -2.0]).step == 1.0
    assert eigenvalue_step_limit([1e-17j, -1e-17j, -2.0]).step == 1.0  # 0 if it were on the axis


def test_growth_budget():
    """dopri8 grows by 9e-8 a step at most on the imaginary axis below 3.7: nothing over 1,000 steps."""
    strict = eigenvalue_step_limit([1j, -1j], "dopri8")
    assert strict.step == 0 and strict.intervals[0] == pytest.approx((1.5018652793, 3.7022956768))
    budget = eigenvalue_step_limit([1j, -1j], "dopri8", growth=(1000, 1e-3))
    assert 3.7 < budget.step < 3.71
    assert abs(step_factor("dopri8", np.array([1j * budget.step])))[0] ** 1000 == pytest.approx(
        1.001, rel=1e-9
    )
    # Euler on λ = i: (1 + h²)^(N/2) = 1 + tol
    expected = math.sqrt(1.01 ** (2 / 50) - 1)
    assert eigenvalue_step_limit([1j], growth=(50, 0.01)).step == pytest.approx(expected, rel=1e-12)
    # and on a growing real mode, 1 + h = 1.01^(1/50)
    assert eigenvalue_step_limit([1.0], growth=(50, 0.01)).step == pytest.approx(
        1.01 ** (1 / 50) - 1, rel=1e-12
    )
    for bad in ((0, 0.1), (10, -1.0), (2.5, 0.1), (10, math.inf)):
        with pytest.raises(ValueError, match="of growth="):
            eigenvalue_step_limit([1j], growth=bad)
    with pytest.raises(TypeError, match="growth is a pair"):
        eigenvalue_step_limit([1j], growth=0.1)


def random_spectra(rng: np.random.Generator, count: int) -> np.ndarray:
    """Spectra of six: decaying, near the imaginary axis, real, conjugate pairs; of very different sizes."""
    lam = -np.abs(rng.normal(size=(count, 6))) + 3j * rng.normal(size=(count, 6))
    near, real, paired = rng.integers(0, 3, size=(3, count)) == 0
    lam[near, :3] = -(10.0 ** rng.uniform(-9, -1, size=(near.sum(), 3))) + 1j * lam[near, :3].imag
    lam[real] = lam[real].real
    lam[paired, 3:] = lam[paired, :3].conj()
    return lam * 10.0 ** rng.uniform(-2, 2, size=(count, 1))


@pytest.mark.parametrize("name", EXPLICIT)
def test_random_spectra_against_a_scan(name):
    """|R(hλ)|, from the stages, never exceeds 1 on a fine grid below the limit, and does just above it.

    10,000 spectra with RESODE_FULL_TESTS=1.
    """
    rng = np.random.default_rng(EXPLICIT.index(name))
    for lam in np.array_split(random_spectra(rng, SPECTRA), max(1, SPECTRA // 500)):
        limit = eigenvalue_step_limit(lam, name, tolerance=0.0)
        assert ((limit.step > 0) & np.isfinite(limit.step)).all() or name in ("euler",)
        grid = np.concatenate([np.linspace(0, 1, 151)[1:-1], 1 - np.geomspace(1e-9, 1e-2, 12)])
        z = limit.step[:, None, None] * grid[:, None] * lam[:, None, :]
        assert np.abs(step_factor(name, z)).max() <= 1 + 1e-12
        # Just above: the limiting mode grows. Near the axis it grows so little that only Σ c_n rⁿ resolves it.
        first = limit.limiting_eigenvalue
        above = limit.step[:, None] * (1 + np.geomspace(1e-9, 1e-3, 7))
        size = np.abs(step_factor(name, above * first[:, None])).max(axis=1)
        weak = size <= 1 + 1e-12
        for h, z in zip(limit.step[weak], first[weak], strict=True):
            assert ray_growth(name, h * (1 + 1e-9) * z) > 0 > ray_growth(name, h * (1 - 1e-9) * z)


@pytest.mark.parametrize("name", METHODS)
def test_every_stable_interval_against_a_scan(name):
    """Spectra with growing modes too: a step on the grid is stable if and only if it lies in a listed interval."""
    rng = np.random.default_rng(100 + list(METHODS).index(name))
    lam = random_spectra(rng, 100)
    lam[:60, 0] = np.abs(lam[:60, 0].real) * 0.1 + 1j * lam[:60, 0].imag
    lam /= np.abs(lam).max(axis=1, keepdims=True)
    h = np.linspace(0, 15, 1501)[1:] * 1.000378  # off the poles at round numbers
    limit = eigenvalue_step_limit(lam, name, tolerance=0.0)
    size = np.abs(step_factor(name, h[:, None] * lam[:, None, :])).max(axis=2)
    for row, intervals in zip(size, limit.intervals, strict=True):
        inside = np.zeros_like(h, dtype=bool)
        for a, b in intervals:
            inside |= (h >= a) & (h <= b)
        wrong = (row <= 1) != inside
        assert (np.abs(row[wrong] - 1) < 1e-11).all()


def ray_growth(name: str, z: complex) -> float:
    """|R(z)|² − 1 with 60 digits, order conditions exact, for the cases that float64 cannot tell from 0."""
    with mpmath.workdps(60):
        c = [mpmath.mpf(p.numerator) / p.denominator for p in stability_coefficients(name)[0]]
        return float(abs(mpmath.polyval(c[::-1], mpmath.mpc(z))) ** 2 - 1)


@pytest.mark.parametrize("name", [*EXPLICIT, *IMPLICIT])
def test_fast_rays_are_the_exact_ones(name):
    """The vectorised float path against integer arithmetic, near the axes most of all, growing and decaying."""
    rng = np.random.default_rng(1)
    lam = rng.normal(size=40) + 1j * rng.normal(size=40)
    lam[:12] = 10.0 ** rng.uniform(-15, -1, 12) * rng.choice([-1, 1], 12) + 1j
    lam[12:20] = rng.choice([-1, 1], 8) + 1j * 10.0 ** rng.uniform(-15, -1, 8)
    rays = rays_of_tableau(METHODS[name])
    for z, row in zip(lam, rays.unstable(lam), strict=True):
        found = row[np.isfinite(row[:, 0])]
        exact = np.array(rays.unstable_exactly(z)).reshape(-1, 2)
        assert found.shape == exact.shape
        np.testing.assert_allclose(found, exact, rtol=2e-14)


def test_a_root_at_a_cell_end_goes_to_the_integers():
    """Where rounding leaves a sign open, the ray is solved exactly: here the exit lies at t = 1/2 of the cells."""
    rays = rays_of_tableau(METHODS["rk4"])
    lo, hi = 0.55 * math.pi, 0.65 * math.pi  # the exit falls from 2.96 to 2.67 between, through 2.84
    for _ in range(60):
        middle = (lo + hi) / 2
        far = rays.unstable(np.exp(1j * np.array([middle])))[0, 0, 0] > rays.scale
        lo, hi = (middle, hi) if far else (lo, middle)
    angles = lo + np.linspace(-1e-15, 1e-15, 9)
    unit = np.exp(1j * angles)
    assert rays._isolate(unit)[1].size > 0
    np.testing.assert_allclose(rays.unstable(unit)[:, 0, 0], rays.scale, rtol=1e-13)
    assert (rays.unstable(unit)[:, 0, 1] == math.inf).all()


def test_large_spectra_are_the_small_ones(monkeypatch):
    """Leaving out what cannot bind changes no interval: compared with every ray solved."""
    rng = np.random.default_rng(2)
    box = -rng.uniform(0, 10, 1500) + 1j * rng.uniform(-10, 10, 1500)
    spectra = {
        "box": box,
        "growing": np.concatenate([box, rng.uniform(0, 1e-3, 5) + 1j * rng.uniform(0.1, 1, 5)]),
        "far growing": rng.uniform(0.01, 0.02, 1500) + 1j * rng.uniform(0.95, 1.05, 1500),
        "circle": -1 + np.exp(2j * np.pi * rng.uniform(size=1500)),
        "axes": np.concatenate([-rng.uniform(2.9, 3, 700), 1j * rng.uniform(0.9, 1, 700)]),
        "positive": rng.uniform(1, 2, 1500),
        "near": -(10.0 ** rng.uniform(-12, -1, 1500)) + 1j * rng.normal(size=1500),
    }
    for name in METHODS:
        for lam in spectra.values():
            monkeypatch.setattr(limits_module, "_MANY", 100)
            some = eigenvalue_step_limit(lam, name)
            monkeypatch.setattr(limits_module, "_MANY", 10**9)
            every = eigenvalue_step_limit(lam, name)
            np.testing.assert_allclose(some.intervals, every.intervals, rtol=1e-12)
            assert some.step == pytest.approx(every.step, rel=1e-12, abs=0)
            assert some.decaying_step == pytest.approx(every.decaying_step, rel=1e-12, abs=0)


@pytest.mark.parametrize("name", EXPLICIT)
def test_what_is_left_out_was_proven_stable(name):
    """A proof must never be wrong, excursions between the ends of an interval included, and rarely fail."""
    rng = np.random.default_rng(4)
    lam = -np.abs(rng.normal(size=400)) + 1j * rng.normal(size=400)
    lam[:250] = -(10.0 ** rng.uniform(-14, -1, 250)) + 1j * rng.uniform(0.1, 1.0, 250)
    lam[250:300] = rng.uniform(0.05, 0.3, 50) + 1j * rng.uniform(0.5, 1.0, 50)
    rays = rays_of_tableau(METHODS[name])
    starts, stops = np.moveaxis(rays.unstable(lam), -1, 0)
    for stable in ([(0.0, 0.3)], [(0.0, 2.0)], [(0.0, 0.1), (1.6, 3.5)], [(0.5, 0.6), (3.0, math.inf)]):
        proven = _stable_on(rays, stable, lam, np.abs(lam))
        clear = np.ones(len(lam), dtype=bool)
        for a, b in stable:
            clear &= ~((starts < b) & (stops > a)).any(axis=1)
        assert not (proven & ~clear).any()
        assert proven.sum() >= 0.75 * clear.sum()


@pytest.mark.parametrize("name", ["euler", "rk4", "dopri8"])
def test_a_million_eigenvalues_in_a_second(name):
    """About 0.2 s for rk4 on one core; processor time, so that other work on the machine does not count."""
    rng = np.random.default_rng(3)
    lam = -rng.uniform(0, 10, 10**6) + 1j * rng.uniform(-10, 10, 10**6)
    times = []
    for _ in range(3):
        start = time.process_time()
        limit = eigenvalue_step_limit(lam, name)
        times.append(time.process_time() - start)
        if times[-1] < 1:
            break
    assert min(times) < 1
    h = limit.step
    assert np.abs(step_factor(name, h * lam)).max() == pytest.approx(1, abs=1e-12)


def test_batches_and_kinds():
    """A batch is its rows; tensors come back as tensors of their dtype, arrays as arrays."""
    lam = torch.tensor([[-1.0, -4.0], [-2.0, 0.5]], dtype=torch.float32)
    limit = eigenvalue_step_limit(lam)
    torch.testing.assert_close(limit.step, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(limit.decaying_step, torch.tensor([0.5, 1.0]))
    assert limit.limiting_eigenvalue.dtype == torch.complex64
    assert [g.tolist() for g in limit.growing] == [[], [0.5]]
    assert limit.intervals == [[(0.0, 0.5)], []]
    assert limit.converged.tolist() == [True, True]
    deep = eigenvalue_step_limit(np.broadcast_to([-1.0, -2.0], (2, 3, 2)))
    assert isinstance(deep.step, np.ndarray) and deep.step.shape == (2, 3)
    assert deep.intervals[1][2] == [(0.0, 1.0)]
    assert isinstance(eigenvalue_step_limit(lam[0]).step, float)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ([], ValueError, "n ≥ 1"),
        (3.0, ValueError, "shape \\(n,\\)"),
        ([math.nan, 1.0], ValueError, "1 of 2 are not"),
        ([complex(0, math.inf)], ValueError, "finite"),
        (["a"], TypeError, "real or complex numbers"),
        (torch.tensor([True]), TypeError, "real or complex numbers"),
    ],
)
def test_bad_spectra(bad, error, words):
    with pytest.raises(error, match=words):
        eigenvalue_step_limit(bad)


def test_bad_tolerance():
    with pytest.raises(ValueError, match="a tolerance must be at least 0"):
        eigenvalue_step_limit([-1.0], tolerance=-1.0)


def test_it_says_why():
    """str() names the method, the eigenvalue and the step that is safe."""
    assert "stable up to step 0.4; λ = -5" in str(eigenvalue_step_limit([-2, -5]))
    unstable = str(eigenvalue_step_limit([0.01 + 1j, 0.01 - 1j, -4.0], "rk4"))
    assert "2 modes grow" in unstable and "0.01 ± 1i" in unstable and "0.696323" in unstable
    assert "Stable again for steps in [1.10325, 2.80585]" in str(eigenvalue_step_limit([0.01 + 1j], "rk4"))
    assert "imaginary axis" in str(eigenvalue_step_limit([1j, -1j]))
    assert "every step" in str(eigenvalue_step_limit([-1.0], "radau5"))
    batch = str(eigenvalue_step_limit([[-1.0], [1.0]]))
    assert "2 spectra" in batch and "No small step is stable in 1, fastest λ = 1;" in batch
    assert "no small step is stable in any of them" in str(eigenvalue_step_limit([[1.0], [2.0]]))


# -- parts ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=5), st.booleans())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_sign_intervals_of_products(roots, negative):
    """∏ (x − r), roots repeated at will: the sign changes at positive roots of odd multiplicity only."""
    poly = [Fraction(-1 if negative else 1)]
    for r in roots:
        shifted = [Fraction(0), *poly]
        poly = [s - r * p for s, p in zip(shifted, [*poly, Fraction(0)], strict=True)]
    found = positive_intervals(poly)
    for x in [k + 0.5 for k in range(8)]:
        value = math.prod(x - r for r in roots) * (-1 if negative else 1)
        assert (value > 0) == any(a < x < b for a, b in found)
    assert all(b == math.inf or b in roots for _, b in found)
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(found))  # a touched 0 divides nothing


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.5, 3.0), (0.0, math.inf), (2.0, math.inf)])
def test_bernstein_coefficients(start, stop):
    """They reproduce the polynomial: Σ b_k C(d, k) t^k (1−t)^{d−k}, over (1−t)^d where stop is infinite."""
    power = np.array([1.0, -3.0, 0.5, 2.0])
    b = bernstein_matrix(3, start, stop) @ power
    for t in (0.0, 0.3, 0.8):
        value = sum(b[k] * math.comb(3, k) * t**k * (1 - t) ** (3 - k) for k in range(4))
        x = start + t / (1 - t) if math.isinf(stop) else start + t * (stop - start)
        scale = (1 - t) ** 3 if math.isinf(stop) else 1.0
        assert value == pytest.approx(np.polyval(power[::-1], x) * scale, abs=1e-12)


# -- the edge, and pictures ----------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_simulation_decays_below_and_grows_above(name):
    for lam in ([-2.0, -5.0], [-1 + 2j, -1 - 2j, -3], [0.1, -1.0], [1j, -1j]):
        check = edge_check(name, lam)
        assert check.holds, f"{name} {lam}\n{check}"
    assert f"{name}: step limit" in str(check)


def test_edge_check_sees_a_wrong_limit(monkeypatch):
    """The check must be able to fail: a limit that is 1 % too large lets modes grow below it."""
    from theory.measures import edge

    right = eigenvalue_step_limit([-2.0, -5.0], "rk4")
    wrong = StepLimit(right.step * 1.01, right.limiting_eigenvalue, right.intervals, right.growing, 0.0)
    monkeypatch.setattr(edge, "eigenvalue_step_limit", lambda *_: wrong)
    assert not edge_check("rk4", [-2.0, -5.0]).holds


def test_edge_check_survives_overflow_and_poles():
    check = edge_check("rk4", [-1.0], margin=0.9)
    assert check.growth[-1] == math.inf and check.holds
    assert edge_check("implicit_euler", [1.0, 2.0]).holds


def test_edge_check_arguments():
    with pytest.raises(ValueError, match="one spectrum"):
        edge_check("rk4", [[-1.0], [-2.0]])
    with pytest.raises(ValueError, match="margin"):
        edge_check("rk4", [-1.0], margin=0.0)


def test_stability_region_draws_what_it_says(tmp_path):
    """Three of the six ηλ lie outside Euler's disc; the ring sits on the eigenvalue that limits."""
    lam = [-5, -0.6 + 2j, -0.6 - 2j, -1, -2 + 1j, -2 - 1j]
    ax = plots.stability_region(["euler", "rk4"], lam, step_size=0.5)
    ax.figure.savefig(tmp_path / "region.png")
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [
        "euler",
        "rk4",
        "stable with euler (3)",
        "unstable with euler (3)",
        "limits euler: η ≤ 0.2752",
        "limits rk4: η ≤ 0.5571",
    ]
    assert ax.get_aspect() == 1.0
    rings = [line for line in ax.lines if line.get_markerfacecolor() == "none"]
    np.testing.assert_allclose(rings[0].get_xydata(), [[-0.3, 1.0], [-0.3, -1.0]])
    np.testing.assert_allclose(rings[1].get_xydata()[0], [-2.5, 0.0])
    assert (tmp_path / "region.png").stat().st_size > 10_000


def test_rounding_paints_nothing_unstable():
    """float32 eigenvalues on the imaginary axis, real parts of 1e-7: dots, as the limit counts them."""
    lam = torch.tensor([1e-7 + 1j, 1e-7 - 1j], dtype=torch.complex64)
    labels = [t.get_text() for t in plots.stability_region("rk4", lam).get_legend().get_texts()]
    assert labels == ["rk4", "stable with rk4 (2)", "limits rk4: η ≤ 2.828"]
    with pytest.raises(ValueError, match="must be finite"):
        plots.stability_region("rk4", [math.nan])


def test_stability_region_into_given_axes():
    from matplotlib.figure import Figure

    axes = Figure().subplots(1, 2)
    assert plots.stability_region("radau5", torch.tensor([1.0, -1.0]), ax=axes[1]) is axes[1]
    assert not axes[0].collections
    with pytest.raises(ValueError, match="at least one method"):
        plots.stability_region([])
    with pytest.raises(ValueError, match="step_size must be above 0"):
        plots.stability_region("rk4", step_size=0.0)


def test_the_other_figures(tmp_path):
    plots.amplification(["euler", "rk4", "dopri8", "radau5"], tmp_path / "a.png")
    edge_check("rk4", [-1.0]).plot(tmp_path / "e.png")
    edge_check("radau5", [-1.0]).plot(tmp_path / "i.svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "e.png", "i.svg"]
