"""Fixed points: found, several of them, spurious ones, what they are, and their gradient."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resode import classify, find_fixed_points, find_several_fixed_points
from resode.jacobian.gmres import gmres
from resode.jacobian.krylov import KrylovSchur
from resode.jacobian.lanczos import singular_values
from resode.jacobian.linearize import dense_jacobian
from resode.jacobian.products import JacobianProducts

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logistic(x):
    return x * (1 - x)


def van_der_pol(x):
    a, b = x.unbind(1)
    return torch.stack([b, 2 * (1 - a * a) * b - a], 1)


def lorenz(x):
    a, b, c = x.unbind(1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], 1)


def hopfield(patterns, gain=4.0):
    weights = patterns.T @ patterns / patterns.shape[1]
    return lambda x: torch.tanh(gain * x @ weights) - x


def ordered(points):
    return sorted(tuple(round(v, 8) + 0.0 for v in p) for p in points.flatten(1).tolist())


# -- known systems ---------------------------------------------------------------------------------

ROOT72 = math.sqrt(72)


@pytest.mark.parametrize(
    ("field", "start", "expected"),
    [
        (logistic, [0.3], [(0.0,), (1.0,)]),
        (van_der_pol, [1.0, 2.0], [(0.0, 0.0)]),
        (lorenz, [1.0, 2.0, 3.0], [(0, 0, 0), (ROOT72, ROOT72, 27), (-ROOT72, -ROOT72, 27)]),
    ],
)
def test_deflation_finds_every_fixed_point(field, start, expected):
    """Lorenz at ρ = 28, β = 8/3: (±√(β(ρ−1)), ±√(β(ρ−1)), ρ−1) and 0, from one start."""
    found = find_several_fixed_points(field, torch.tensor([start], dtype=F64))
    assert found.converged.all() and float(found.residual.max()) <= 1e-10
    assert ordered(found.points) == sorted(tuple(round(v, 8) for v in p) for p in expected)
    for point in found.points:
        oracle = scipy.optimize.root(lambda x: field(torch.tensor(x[None]))[0].numpy(), point.numpy() + 0.01)
        np.testing.assert_allclose(point.numpy(), oracle.x, atol=1e-7)


def test_a_hopfield_networks_patterns():
    patterns = torch.sign(torch.randn(3, 64, generator=generator(), dtype=F64))
    noisy = patterns + 0.3 * torch.randn(3, 64, generator=generator(1), dtype=F64)
    found = find_fixed_points(hopfield(patterns), noisy)
    assert found.converged.all() and float(found.residual.max()) <= 1e-10
    assert torch.equal(found.points.sign(), patterns)
    assert classify(hopfield(patterns), found.points).stable.all()


def test_a_planted_one_of_4096_entries():
    """Krylov products only: the Jacobian would take 134 MB."""
    n = 4096
    matrix = 0.5 * torch.randn(n, n, generator=generator(), dtype=F64) / 64 - torch.eye(n, dtype=F64)
    planted = torch.randn(n, generator=generator(1), dtype=F64)

    def field(x):
        return (x - planted) @ matrix.T + 0.1 * torch.tanh(x - planted) ** 3

    found = find_fixed_points(field, torch.zeros(1, n, dtype=F64))
    assert found.converged.all() and float(found.residual) <= 1e-10
    assert float((found.points - planted).abs().max()) < 1e-10


def test_a_batch_is_as_its_samples_alone():
    x0 = 3 * torch.randn(256, 2, generator=generator(), dtype=F64)
    found = find_fixed_points(van_der_pol, x0)
    assert found.converged.all() and float(found.points.abs().max()) < 1e-10
    assert len(set(found.iterations.tolist())) > 1, "each sample has its own number of steps"
    alone = [find_fixed_points(van_der_pol, x0[i : i + 1]) for i in range(0, 256, 16)]
    assert torch.equal(torch.cat([a.points for a in alone]), found.points[::16])
    assert torch.equal(torch.cat([a.iterations for a in alone]), found.iterations[::16])


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_a_zero_is_one_for_scipy_too(seed, n):
    """Smooth fields A x + tanh(B x) + c with A well-conditioned: scipy's root from the same start."""
    g = torch.Generator().manual_seed(seed)
    a = 3 * torch.eye(n, dtype=F64) + 0.3 * torch.randn(n, n, generator=g, dtype=F64)
    b, c = torch.randn(n, n, generator=g, dtype=F64) / n, torch.randn(n, generator=g, dtype=F64)

    def field(x):
        return x @ a.T + torch.tanh(x @ b.T) + c

    x0 = torch.randn(3, n, generator=g, dtype=F64)
    found = find_fixed_points(field, x0)
    assert found.converged.all() and float(field(found.points).abs().max()) <= 1e-10
    for start, point in zip(x0, found.points, strict=True):
        oracle = scipy.optimize.root(lambda x: field(torch.tensor(x[None]))[0].numpy(), start.numpy())
        if oracle.success:
            assert float(field(torch.tensor(oracle.x[None])).abs().max()) < 1e-6
            np.testing.assert_allclose(point.numpy(), oracle.x, atol=1e-6)


def test_many_states_are_taken_in_parts(monkeypatch):
    """As when their Jacobians together would not fit into memory; forwards and backwards."""
    x0 = 3 * torch.randn(50, 2, generator=generator(), dtype=F64)
    a = torch.tensor(1.0, dtype=F64, requires_grad=True)

    def field(x):
        return van_der_pol(x) - a

    whole = find_fixed_points(field, x0)
    (expected,) = torch.autograd.grad(whole.points.sum(), a)
    monkeypatch.setattr("resode.analysis.rest.fixed_points._ENTRIES", 4 * 7)
    some = find_fixed_points(field, x0)
    assert torch.equal(whole.points, some.points)
    torch.testing.assert_close(torch.autograd.grad(some.points.sum(), a)[0], expected)


def test_a_sample_that_has_no_fixed_point_leaves_the_others_alone():
    """x² + c: no zero for c = 1, zeros ±1 for c = −1. A non-converged sample is no exception."""

    def field(x):
        return torch.stack([x[:, 0] ** 2 + x[:, 1], 0 * x[:, 1]], 1)

    found = find_fixed_points(field, torch.tensor([[0.5, 1.0], [0.5, -1.0]], dtype=F64), max_iter=20)
    assert found.converged.tolist()[1] and float(found.points[1, 0]) ** 2 == pytest.approx(
        -float(found.points[1, 1])
    )
    lonely = find_fixed_points(lambda x: x * x + 1, torch.tensor([[3.0], [-0.1]], dtype=F64))
    assert not lonely.converged.any() and float(lonely.residual.min()) >= 1
    assert "not converged" in str(lonely)


def test_singular_jacobians_at_the_fixed_point():
    """x² and (x − 1)³: Newton's method is linear there, and still arrives; |F| ≤ 1e-10 is all it can say."""
    double = find_fixed_points(lambda x: x * x, torch.tensor([[3.0]], dtype=F64))
    triple = find_fixed_points(lambda x: (x - 1) ** 3, torch.tensor([[3.0]], dtype=F64))
    assert double.converged.all() and triple.converged.all()
    assert abs(float(double.points)) <= 1.001e-5 and abs(float(triple.points) - 1) <= 1e-3


def test_picard_leads_on_where_newton_has_no_direction():
    """tanh(50(x − 2)) is 1 to the last bit at 3: its slope there is 0."""
    found = find_fixed_points(lambda x: torch.tanh(50 * (x - 2)), torch.tensor([[3.0]], dtype=F64))
    assert found.converged.all() and float(found.points) == pytest.approx(2, abs=1e-11)


def test_float32_and_its_tolerance():
    found = find_fixed_points(lorenz, torch.tensor([[8.0, 9.0, 25.0]]))
    assert found.points.dtype == torch.float32 and found.converged.all() and float(found.residual) < 2e-5


def test_large_states_with_a_jacobian_that_gmres_cannot_solve():
    """A cyclic shift: GMRES makes no progress before n products."""
    n = 400
    planted = torch.randn(n, generator=generator(), dtype=F64)
    found = find_fixed_points(lambda x: (x - planted).roll(1, 1), torch.zeros(1, n, dtype=F64))
    assert found.converged.all() and float((found.points - planted).abs().max()) < 1e-12


# -- a solver's own fixed points ---------------------------------------------------------------------


def test_midpoints_spurious_fixed_points():
    """x⁺ = x where F(x + ηF(x)/2) = 0: x + (η/2)x(1−x) is 0 or 1, so x = 0, 1 + 2/η; 1, 2/η."""
    eta = 1.5
    found = find_several_fixed_points(
        logistic, torch.tensor([[0.3]], dtype=F64), solver="midpoint", step_size=eta
    )
    assert ordered(found.points) == [(0.0,), (1.0,), (round(2 / eta, 8),), (round(1 + 2 / eta, 8),)]
    spurious = {round(float(p), 8): bool(s) for p, s in zip(found.points, found.spurious, strict=True)}
    assert spurious == {0.0: False, 1.0: False, round(2 / eta, 8): True, round(1 + 2 / eta, 8): True}
    assert str(found).count("spurious: no zero of F") == 2


def test_eulers_fixed_points_are_the_fields():
    found = find_several_fixed_points(
        logistic, torch.tensor([[0.3]], dtype=F64), solver="euler", step_size=2.7
    )
    assert ordered(found.points) == [(0.0,), (1.0,)] and not found.spurious.any()


def test_a_true_fixed_point_where_a_spurious_one_meets_it():
    """At η = 2 midpoint's 2/η is 1: its map has a double zero there, so x is right to 1e-5 only, and |F| with it."""
    found = find_fixed_points(logistic, torch.tensor([[1.3]], dtype=F64), solver="midpoint", step_size=2.0)
    assert found.converged.all() and float(found.points) == pytest.approx(1, abs=2e-5)
    assert abs(float(logistic(found.points))) > 1e-9 and not found.spurious.any()


# -- the gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 160])
def test_implicit_gradient_equals_autograds_through_a_converged_solve(n):
    """n = 160 solves with GMRES on vjp products."""
    field = nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, n)).double()
    with torch.no_grad():
        for p, values in zip(field.parameters(), torch.randn(4, n * n, generator=generator()), strict=True):
            p.copy_(0.3 / n**0.5 * values[: p.numel()].reshape(p.shape))

    def total(x):
        return field(x) - x

    x0 = torch.zeros(2, n, dtype=F64)
    weight = torch.randn(2, n, generator=generator(3), dtype=F64)
    found = find_fixed_points(total, x0)
    implicit = torch.autograd.grad((found.points * weight).sum(), list(field.parameters()))
    x = x0
    for _ in range(200):  # a contraction: iterate until nothing moves
        x = field(x)
    unrolled = torch.autograd.grad((x * weight).sum(), list(field.parameters()))
    assert torch.equal(found.points.detach(), find_fixed_points(total, x0).points.detach())
    for a, b in zip(implicit, unrolled, strict=True):
        assert float((a - b).abs().max()) <= 1e-8 * max(1.0, float(b.abs().max()))
        assert float(b.abs().max()) > 1e-3


def test_a_singular_jacobian_warns_in_the_backward_pass():
    c = torch.tensor(0.0, dtype=F64, requires_grad=True)
    found = find_fixed_points(lambda x: x * x + c * (1 + x), torch.zeros(1, 1, dtype=F64))
    with pytest.warns(RuntimeWarning, match="did not converge"):
        found.points.sum().backward()
    nowhere = find_fixed_points(lambda x: x * x + 1 + c, torch.tensor([[0.5]], dtype=F64), max_iter=5)
    with pytest.warns(RuntimeWarning, match="1 samples are no fixed points"):
        nowhere.points.sum().backward()


def test_second_derivatives_are_not_lost_in_silence():
    """x* = √a at a = 4: x*' = 1/4, and no second derivative, which is said."""
    a = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    found = find_fixed_points(lambda x: x**2 - a, torch.tensor([[1.5]], dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match="differentiable once"):
        (g,) = torch.autograd.grad(found.points.sum(), a, create_graph=True)
    assert float(g) == pytest.approx(0.25, abs=1e-12)


def test_a_double_zero_warns_in_the_backward_pass():
    """x² − a at a = 0 has no derivative of x* = √a; Newton's method stops at 4e-6, where J is not quite 0."""
    a = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    found = find_fixed_points(lambda x: x**2 - a, torch.tensor([[0.5]], dtype=torch.float64))
    assert found.converged.all()
    with pytest.warns(RuntimeWarning, match="1 of 1 solves did not converge"):
        found.points.sum().backward()


@pytest.mark.parametrize("n", [20, 160])
def test_a_field_that_saturates(n):
    """tanh(Ax) + 0.1, A stable: Newton's steps run away where tanh is flat, and the flow leads back."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    matrix = matrix - 2 * torch.eye(n, dtype=torch.float64)
    start = torch.randn(4, n, generator=generator, dtype=torch.float64)
    found = find_fixed_points(lambda x: torch.tanh(x @ matrix.T) + 0.1, start)
    assert found.converged.all()
    value = torch.full((n,), -math.atanh(0.1), dtype=torch.float64)
    expected = torch.linalg.solve(matrix, value).expand(4, n)
    torch.testing.assert_close(found.points, expected, rtol=0, atol=1e-9)


def test_no_warning_where_all_is_well():
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    found = find_fixed_points(lambda x: a - x**3, torch.ones(1, 1, dtype=F64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (g,) = torch.autograd.grad(found.points.sum(), a)
    assert float(g) == pytest.approx(2 ** (-2 / 3) / 3, rel=1e-12)  # d a^(1/3)/da


# -- classes ----------------------------------------------------------------------------------------


def spectrum(rng, kind):
    """Blocks of a real matrix with a spectrum of this kind."""
    n = int(rng.integers(2, 6))
    sizes = rng.uniform(0.3, 2, n)
    if kind == "node":
        return np.diag(sizes * rng.choice([-1, 1]))
    if kind == "saddle":
        return np.diag(sizes * np.r_[-1, 1, rng.choice([-1, 1], n - 2)])
    pairs = [np.array([[0, w], [-w, 0]]) for w in sizes[: max(1, n // 2)]]
    if kind == "centre":
        return scipy.linalg.block_diag(*pairs)
    if kind == "spiral":
        sign = rng.choice([-1, 1])
        return scipy.linalg.block_diag(
            *[p + sign * s * np.eye(2) for p, s in zip(pairs, sizes, strict=False)]
        )
    return np.diag(np.r_[0.0, sizes[1:] * rng.choice([-1, 1])])


def test_a_thousand_linear_systems():
    """Real Jordan form in a random basis: the class is known by construction."""
    rng = np.random.default_rng(0)
    wrong = []
    for i in range(1000):
        kind = ("node", "spiral", "saddle", "centre", "degenerate")[i % 5]
        blocks = spectrum(rng, kind)
        basis = rng.normal(size=blocks.shape)
        matrix = torch.tensor(basis @ blocks @ np.linalg.inv(basis))
        found = classify(lambda x, a=matrix: x @ a.T, torch.zeros(1, len(matrix), dtype=F64))
        stable = kind in ("node", "spiral") and np.trace(blocks) < 0
        if found.kind != [kind] or bool(found.stable[0]) != stable:
            wrong.append((kind, found.kind, np.linalg.cond(basis)))
    assert not wrong


def test_an_improper_node_is_no_spiral():
    """One eigenvector to −1 twice: rounding of a random basis splits it into −1 ± 1e-8 i or so."""
    rng = np.random.default_rng(1)
    split = 0
    for _ in range(30):
        basis = rng.normal(size=(2, 2))
        matrix = basis @ np.array([[-1.0, 1.0], [0.0, -1.0]]) @ np.linalg.inv(basis)
        split += bool(np.linalg.eigvals(matrix).imag.any())
        j = torch.tensor(matrix)
        assert classify(lambda x, j=j: x @ j.T, torch.zeros(1, 2, dtype=F64)).kind == ["node"]
    assert split > 5


def test_stable_for_the_flow_but_not_for_euler():
    """λ = −1: |1 − 2.5| > 1; and rk4 stands up to 2.785."""
    x = torch.tensor([[1.0]], dtype=F64)
    found = classify(logistic, x, solver="euler", step_size=2.5)
    assert found.kind == ["node"] and found.stable.item() and not found.solver_stable.item()
    assert "node, stable for the flow" in str(found) and "unstable for euler at η = 2.5" in str(found)
    assert classify(logistic, x, solver="rk4", step_size=2.5).solver_stable.item()
    assert classify(logistic, x, solver="implicit_euler", step_size=100.0).solver_stable.item()


def test_what_a_classification_says_at_the_edge():
    """|R(−2)| = 1 for Euler: neither stable nor unstable; and a point where F is 1/4 is no fixed point."""
    at_edge = classify(lambda x: -x, torch.zeros(1, 1, dtype=torch.float64), solver="euler", step_size=2.0)
    assert not at_edge.solver_stable.any() and "neutral for euler" in str(at_edge)
    above = classify(lambda x: -x, torch.zeros(1, 1, dtype=torch.float64), solver="euler", step_size=2.001)
    assert "unstable for euler" in str(above)
    moving = classify(lambda x: x * (1 - x), torch.tensor([[0.5], [1.0]], dtype=torch.float64))
    first, second = str(moving).splitlines()
    assert "max|F| = 0.25), so it is no fixed point" in first and "no fixed point" not in second


def test_a_spurious_points_own_stability():
    """Midpoint's map at 2/η: its derivative 1 + ηΦ' by hand, Φ' = (1 − 2m)(1 + (η/2)(1 − 2x)), m = 1."""
    eta = 2.2
    x = 2 / eta
    factor = abs(1 + eta * (1 - 2) * (1 + eta / 2 * (1 - 2 * x)))
    found = classify(logistic, torch.tensor([[x]], dtype=F64), solver="midpoint", step_size=eta)
    assert found.spurious.item() and not found.stable.item()
    assert float(found.growth) == pytest.approx(factor, rel=1e-12)
    assert found.solver_stable.item() == (factor < 1) and "spurious" in str(found)


def test_a_networks_stored_patterns_by_deflation():
    """Two orthogonal patterns ±p, ±q: each is found, from one start near the middle, and 0 beside them."""
    patterns = torch.ones(2, 32, dtype=F64)
    patterns[0, 16:] = -1
    patterns[1, ::2] = -1
    start = (0.3 * patterns[0] + 0.1 * patterns[1])[None]
    found = find_several_fixed_points(hopfield(patterns), start, max_points=24, attempts=4)
    signs = {tuple(p.sign().tolist()) for p in found.points if float(p.abs().min()) > 0.9}
    assert all(tuple((s * p).tolist()) in signs for p in patterns for s in (1, -1))
    assert float(found.points.abs().amax(1).min()) < 1e-9 and float(found.residual.max()) <= 1e-10


def test_classes_without_forming_the_jacobian():
    """2,000 entries: rotations at −0.1 and one growing mode at 0.5."""
    pairs = torch.linspace(1, 3, 999, dtype=F64)

    def field(x):
        a, b, rest = x[:, :999], x[:, 999:1998], x[:, 1998:]
        return torch.cat([-0.1 * a + pairs * b, -0.1 * b - pairs * a, rest * rest.new_tensor([0.5, -1.0])], 1)

    found = classify(field, torch.zeros(1, 2000, dtype=F64))
    assert found.kind == ["saddle"] and not found.stable.item() and found.converged.item()
    assert complex(found.eigenvalues[0, 0]) == pytest.approx(0.5, abs=1e-9)


# -- products and Krylov methods --------------------------------------------------------------------


def test_products_are_the_jacobians():
    field = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    x, v = torch.randn(2, 3, 5, generator=generator(), dtype=F64)
    products, dense = JacobianProducts(field, x), dense_jacobian(field, x)
    torch.testing.assert_close(products.jvp(v), (dense @ v[..., None])[..., 0])
    torch.testing.assert_close(products.vjp(v), (dense.mT @ v[..., None])[..., 0])


def test_gmres_stops_each_sample_by_itself():
    a = torch.randn(3, 30, 30, generator=generator(), dtype=F64) / 10 + 2 * torch.eye(30, dtype=F64)
    a[1] = torch.eye(30, dtype=F64)
    b = torch.randn(3, 30, generator=generator(1), dtype=F64)
    b[2] = 0
    x, residual = gmres(lambda v: (a @ v[..., None])[..., 0], b, tol=1e-12)
    torch.testing.assert_close(x, torch.linalg.solve(a, b[..., None])[..., 0])
    assert float(residual.max()) <= 1e-12 and float(x[2].abs().max()) == 0
    singular, left = gmres(lambda v: v * torch.tensor([1.0, 0.0]), torch.ones(1, 2), tol=1e-6)
    assert torch.isfinite(singular).all() and float(left) == pytest.approx(math.sqrt(0.5), rel=1e-6)


def test_ritz_and_singular_values_against_dense_ones():
    a = torch.randn(2, 8, 12, 12, generator=generator(), dtype=F64)[0]
    start = torch.randn(8, 12, generator=generator(2), dtype=F64)

    def forward(v):
        return (a @ v[..., None])[..., 0]

    def backward(v):
        return (a.mT @ v[..., None])[..., 0]

    space = KrylovSchur(forward, start, 12)
    space.grow(12)
    for row, theirs in enumerate(torch.linalg.eigvals(a)):
        found = space.ritz(row)
        assert found.residuals.max() < 1e-9
        assert float((torch.as_tensor(found.values)[:, None] - theirs).abs().amin(1).max()) < 1e-9
    sigma, _ = singular_values(forward, backward, start, 12)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(a))


def test_singular_values_where_one_sample_ends_early():
    """The identity's Krylov space has one dimension; its neighbour goes on, and neither sees a 0."""
    a = torch.stack([torch.eye(6, dtype=F64), torch.diag(torch.arange(1.0, 7, dtype=F64))])

    def product(v):
        return (a @ v[..., None])[..., 0]

    sigma, _ = singular_values(product, product, torch.ones(2, 6, dtype=F64), 6)
    torch.testing.assert_close(sigma[0], torch.ones(6, dtype=F64))
    torch.testing.assert_close(sigma[1], torch.arange(6.0, 0, -1, dtype=F64))


# -- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x0", "options", "error", "words"),
    [
        (torch.tensor([[1]]), {}, TypeError, "floating-point"),
        (torch.tensor([[1j]]), {}, TypeError, "complex state"),
        (torch.tensor([[1.0]]).half(), {}, TypeError, "float32 or float64"),
        (torch.tensor([1.0]), {}, ValueError, "batch"),
        (torch.tensor([[math.nan]]), {}, ValueError, "finite"),
        (torch.ones(1, 1), {"solver": "rk4"}, ValueError, "solver= and step_size= together"),
        (torch.ones(1, 1), {"step_size": 1.0}, ValueError, "solver= and step_size= together"),
        (
            torch.ones(1, 1),
            {"solver": "rk4", "step_size": 0.0},
            ValueError,
            "step_size must be above 0",
        ),
        (torch.ones(1, 1), {"solver": "radau5", "step_size": 1.0}, ValueError, "implicit"),
        (torch.ones(1, 1), {"solver": "rk5", "step_size": 1.0}, ValueError, "rk5"),
        (torch.ones(1, 1), {"max_iter": 0}, ValueError, "max_iter"),
        (torch.ones(1, 1), {"tol": 0.0}, ValueError, "tol"),
        (torch.ones(1, 1), {"known": torch.ones(1, 2)}, ValueError, "known"),
    ],
)
def test_bad_input(x0, options, error, words):
    with pytest.raises(error, match=words):
        find_fixed_points(logistic, x0, **options)


def test_train_mode_and_changed_shapes_are_refused():
    with pytest.raises(ValueError, match="eval"):
        find_fixed_points(nn.BatchNorm1d(3), torch.randn(4, 3))
    with pytest.raises(ValueError, match="shape"):
        find_fixed_points(nn.Linear(3, 2), torch.randn(4, 3))
    with pytest.raises(ValueError, match="together"):
        classify(logistic, torch.ones(1, 1), solver="rk4")
    with pytest.raises(ValueError, match=r"batch"):
        find_several_fixed_points(logistic, torch.tensor(1.0))
    with pytest.raises(ValueError, match="max_points"):
        find_several_fixed_points(logistic, torch.ones(1, 1), max_points=0)


@pytest.mark.parametrize(
    ("field", "start"),
    [(lambda x: torch.exp(-x), 24.0), (lambda x: 1 / x, 1e10), (lambda x: torch.exp(-x), 100.0)],
    ids=["exp(−x) at 24", "1/x at 1e10", "exp(−x) at 100"],
)
def test_a_small_value_without_a_zero_near_is_no_fixed_point(field, start):
    """|F| is within its tolerance there, and Newton's step is 1 or as long as x: no zero is near."""
    x = torch.tensor([[start]], dtype=torch.float64)
    assert float(field(x).abs()) <= 1e-10
    assert not bool(find_fixed_points(field, x).converged)


def test_a_flat_field_is_followed_to_its_zero():
    """1e-12·(x − 1) is within the tolerance everywhere near 0, and its zero is 1."""
    found = find_fixed_points(lambda x: 1e-12 * (x - 1), torch.tensor([[-5.0], [0.0], [30.0]]).double())
    assert bool(found.converged.all())
    assert found.points.flatten().tolist() == pytest.approx([1.0, 1.0, 1.0], abs=1e-9)
