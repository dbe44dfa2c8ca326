"""Parts of the Jacobians' room, each against dense linear algebra: GMRES, Lanczos, Krylov–Schur, products, matrices."""

import math

import numpy as np
import pytest
import torch

from resode.jacobian.gmres import gmres
from resode.jacobian.krylov import KrylovSchur, Sketch, norm_estimate, outermost
from resode.jacobian.lanczos import largest, orthogonalized, random_start, singular_values
from resode.jacobian.linearize import check_field, dense_jacobian
from resode.jacobian.matrices import check_precision, checked_matrices, eigenvalues_with_errors, evened
from resode.jacobian.outer import SpectrumOptions
from resode.jacobian.places import Place, pulled_back
from resode.jacobian.products import Combination, JacobianProducts, full_precision, rows
from resode.jacobian.spectrum import formed, matrix_spectrum, spectrum

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def counting(product):
    calls = []

    def counted(v):
        calls.append(len(v))
        return product(v)

    return counted, calls


# -- GMRES -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [60, 6])
def test_gmres_solves_each_sample(steps):
    """Shifted random matrices, a scale and a right-hand side each; with few vectors it starts anew."""
    a = normal(4, 12, 12) / 12**0.5 + 3 * torch.eye(12, dtype=DOUBLE)
    a = a * torch.tensor([1.0, 1e6, 1e-6, 1.0], dtype=DOUBLE)[:, None, None]
    b = normal(4, 12, seed=1) * torch.tensor([1.0, 1.0, 1e8, 0.0], dtype=DOUBLE)[:, None]
    x, residual = gmres(lambda v: (a @ v[..., None])[..., 0], b, tol=1e-10, steps=steps, restarts=30)
    torch.testing.assert_close(x, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-20)
    true = (b - (a @ x[..., None])[..., 0]).norm(dim=1) / b.norm(dim=1).clamp_min(1e-300)
    torch.testing.assert_close(residual, true, rtol=1e-6, atol=1e-16)
    assert (residual <= 1e-10).all() and residual[3] == 0 and not x[3].any()


def test_gmres_takes_as_many_products_as_there_are_eigenvalues():
    """Three distinct ones: three products, and one for the residual; none where b is 0."""
    d = torch.tensor([1.0, 2.0, 5.0] * 4, dtype=DOUBLE)
    product, calls = counting(lambda v: v * d)
    x, residual = gmres(product, torch.ones(2, 12, dtype=DOUBLE), tol=1e-12)
    torch.testing.assert_close(x, (1 / d).expand(2, -1), rtol=1e-12, atol=0)
    assert len(calls) == 4 and (residual < 1e-12).all()
    product, calls = counting(lambda v: v * d)
    gmres(product, torch.zeros(2, 12, dtype=DOUBLE), tol=1e-12)
    assert not calls
    loose, calls = counting(lambda v: v * torch.linspace(1, 2, 12, dtype=DOUBLE))
    _, residual = gmres(loose, torch.ones(1, 12, dtype=DOUBLE), tol=1e-2)
    assert len(calls) <= 5 and residual <= 1e-2, "κ = 2: the error falls by (√2 − 1)/(√2 + 1) a product"


def test_gmres_and_singular_matrices():
    """The least residual that there is: of b = 1 the part that A = diag(2, 0) does not reach."""
    d = torch.tensor([[2.0, 0.0], [2.0, 4.0]], dtype=DOUBLE)
    x, residual = gmres(lambda v: v * d, torch.ones(2, 2, dtype=DOUBLE), tol=1e-10)
    assert float(residual[0]) == pytest.approx(math.sqrt(0.5), rel=1e-6) and float(residual[1]) < 1e-10
    torch.testing.assert_close(x[1], 1 / d[1])
    product, calls = counting(lambda v: torch.roll(v, 1, -1))  # no residual falls before the n-th product
    b = torch.eye(8, dtype=DOUBLE)[:1]
    _, residual = gmres(product, b, tol=1e-6, steps=3, restarts=50)
    assert float(residual) == pytest.approx(1.0) and len(calls) <= 12, (
        "a cycle that gains nothing is the last"
    )


# -- Lanczos ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [32, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_top_of_symmetric_operators(vectors, batch):
    """Algebraically largest, though others are larger in modulus; with few vectors it starts anew."""
    q = torch.linalg.qr(normal(batch, 40, 40))[0]
    d = torch.cat([torch.linspace(-9, 1, 39, dtype=DOUBLE), torch.tensor([2.0], dtype=DOUBLE)])
    a = q * d @ q.mT
    found = largest(lambda v: (a @ v[..., None])[..., 0], normal(batch, 40, seed=3), 1e-8, vectors=vectors)
    torch.testing.assert_close(found.value, torch.full((batch,), 2.0, dtype=DOUBLE), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        (found.vector * q[..., -1]).sum(1).abs(), torch.ones(batch, dtype=DOUBLE), rtol=1e-6, atol=0
    )
    true = ((a @ found.vector[..., None])[..., 0] - 2 * found.vector).norm(dim=1)
    torch.testing.assert_close(found.residual, true, rtol=0.5, atol=1e-8)
    assert (found.residual <= 1e-8 * found.size).all()
    if vectors == 32:
        torch.testing.assert_close(found.size, torch.full((batch,), 9.0, dtype=DOUBLE), rtol=1e-3, atol=0)


def test_lanczos_ends_with_its_products():
    a = torch.linspace(-1, 1, 200, dtype=DOUBLE)
    product, calls = counting(lambda v: v * a)
    found = largest(product, normal(1, 200), 1e-14, products=20, vectors=6)
    assert len(calls) == 20 and found.value < 1 and found.residual > 1e-14
    product, calls = counting(lambda v: v * a[:5])
    found = largest(product, normal(1, 5), 1e-30, products=50)
    assert len(calls) == 5 and float(found.value) == pytest.approx(float(a[4]), rel=1e-14), (
        "all that there are"
    )
    zero = largest(lambda v: 0 * v, normal(2, 7), 1e-6)
    assert not zero.value.any() and not zero.residual.any()


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_all_singular_values_from_as_many_steps(shape):
    a = normal(2, *shape)
    values, residuals = singular_values(
        lambda v: (a @ v[..., None])[..., 0],
        lambda u: (a.mT @ u[..., None])[..., 0],
        normal(2, shape[1], seed=1),
        50,
    )
    torch.testing.assert_close(values, torch.linalg.svdvals(a), rtol=1e-10, atol=1e-10)
    assert (residuals < 1e-8).all()


def test_few_steps_bound_singular_values():
    """The largest from below, the smallest from above; residuals are what Aᵀu − σv is, and 0 where they are right."""
    d = torch.cat([torch.tensor([10.0], dtype=DOUBLE), torch.linspace(1, 2, 29, dtype=DOUBLE)])
    values, residuals = singular_values(lambda v: v * d, lambda u: u * d, normal(1, 30), 6)
    assert values.shape == residuals.shape == (1, 6) and (values.diff() <= 0).all()
    assert 9.9999 < float(values[0, 0]) <= 10 + 1e-12 and float(values[0, -1]) >= 1
    assert (residuals[0, 0] < 1e-4) and (residuals[0, 1:] > 1e-4).all()
    errors = (values[0, :, None] - d).abs().min(1).values
    assert (errors <= residuals[0] + 1e-12).all(), "a singular value lies within the residual"


def test_invariant_spaces_are_left_by_another_vector():
    """The identity: one vector spans a space, and two steps still give two values."""
    values, _ = singular_values(lambda v: 3 * v, lambda u: 3 * u, normal(1, 5), 4)
    torch.testing.assert_close(values, torch.full((1, 4), 3.0, dtype=DOUBLE))


def test_orthogonalized_twice():
    basis = torch.linalg.qr(normal(1, 20, 6))[0].mT
    w = normal(1, 20, seed=1)
    free, column, norm = orthogonalized(w, basis, 2.0**-52)
    torch.testing.assert_close(column, (basis @ w[..., None])[..., 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        w, (column[:, None] @ basis)[:, 0] + norm[:, None] * free, rtol=1e-12, atol=1e-12
    )
    assert float((basis @ free[..., None]).abs().max()) < 1e-15 and float(free.norm()) == pytest.approx(1)
    within = (normal(1, 6, seed=2)[:, None] @ basis)[:, 0]
    free, _, norm = orthogonalized(within, basis, 2.0**-52)
    assert norm == 0 and not free.any(), "what is left of a vector of the space is rounding"


def test_random_starts_are_the_same_row_for_every_sample():
    start = random_start(3, 50, like=torch.zeros(1))
    assert (
        start.dtype == torch.float32
        and (start == start[:1]).all()
        and not (start[0] == random_start(1, 50, start, 1)[0]).any()
    )
    assert 0.5 < float(start[0].std()) < 1.5


# -- Krylov–Schur ----------------------------------------------------------------------------------


def test_a_sketch_keeps_lengths_and_angles():
    """A few hundred numbers for 5,000 entries: the Gram matrix of 5 vectors to 20 %, about 3 standard errors of 1/√600."""
    v = torch.linalg.qr(normal(5000, 5))[0].T
    sketch = Sketch(5000, 640, torch.device("cpu"))
    s = sketch(v.float())
    assert s.shape == (5, 640) and s.dtype == DOUBLE and sketch.blocks == 4
    torch.testing.assert_close(s @ s.T, torch.eye(5, dtype=DOUBLE), rtol=0, atol=0.2)
    constant = sketch(torch.ones(1, 5000, dtype=DOUBLE))
    assert 0.7 < float(constant.norm()) / 5000**0.5 < 1.3, "signs: no vector is special"
    plain = Sketch(2048, 640, torch.device("cpu"))
    assert (
        plain.plain
        and plain(v[:, :2048].float()).dtype == DOUBLE
        and not Sketch(2049, 640, torch.device("cpu")).plain
    )


@pytest.mark.parametrize("n", [60, 3000])
def test_ritz_pairs_have_the_residuals_that_they_name(n):
    """‖Jv − θv‖ of the vectors themselves, sketched or not; conditions and ‖J‖ within the space."""
    d = torch.linspace(-1, 0, n, dtype=DOUBLE)
    d[:2] = torch.tensor([-3.0, -2.5], dtype=DOUBLE)
    space = KrylovSchur(lambda v: v * d, normal(2, n, seed=5), 24, 4 if n > 100 else 1)
    space.grow(24)
    assert space.used == 24 and not space.whole
    ritz = space.ritz(1)
    best = np.argsort(ritz.values.real)[:2]
    vectors = space.vector(1, ritz.vectors[:, best])
    true = (vectors * d - torch.from_numpy(ritz.values[best])[:, None] * vectors).norm(dim=1) / vectors.norm(
        dim=1
    )
    np.testing.assert_allclose(ritz.residuals[best], true, rtol=0.3, atol=1e-12)
    np.testing.assert_allclose(ritz.values[best], [-3.0, -2.5], atol=1e-5)
    np.testing.assert_allclose(ritz.conditions[best], 1, rtol=0.3)  # of a sketch
    assert ritz.scale == pytest.approx(3, rel=0.2) and (ritz.errors == ritz.residuals * ritz.conditions).all()
    space.grow(10)
    assert space.used == 24, "no more room"


def test_rows_that_are_left_go_on():
    j = normal(3, 30, 30)
    space = KrylovSchur(lambda v: (j @ v[..., None])[..., 0], normal(3, 30, seed=3), 30)
    space.grow(10)
    kept = space.ritz(2).values
    space.select([0, 2])
    np.testing.assert_allclose(space.ritz(1).values, kept)
    j = j[[0, 2]]
    space.product = lambda v: (j @ v[..., None])[..., 0]
    space.grow(20)
    assert space.whole
    for row in range(2):
        found, want = space.ritz(row).values, np.linalg.eigvals(j[row].numpy())
        assert max(np.abs(found - z).min() for z in want) < 1e-8
        assert space.ritz(row).residuals.max() < 1e-8


def test_an_invariant_space_is_left_by_a_random_vector():
    """J of rank 2 from a start in its range: all eigenvalues are found, 0 too; strides of one and of four."""
    for stride in (1, 4):
        a = torch.zeros(12, 12, dtype=DOUBLE)
        a[0, 0], a[1, 1], a[0, 1] = -2.0, -1.0, 1.0
        space = KrylovSchur(
            lambda v, a=a: v @ a.T,
            torch.eye(12, dtype=DOUBLE)[:1] + torch.eye(12, dtype=DOUBLE)[1:2],
            12,
            stride,
        )
        space.grow(12)
        values = np.sort(space.ritz(0).values.real)
        np.testing.assert_allclose(values, [-2, -1, *[0] * 10], atol=1e-10)
        basis = space.basis[0, :12]
        torch.testing.assert_close(basis @ basis.T, torch.eye(12, dtype=DOUBLE), rtol=0, atol=1e-12)


def test_the_condition_of_an_eigenvalue_that_occurs_twice():
    """diag(2, 2, 1) turned by a far from orthogonal S: the angle between left and right spaces, by hand."""
    s = torch.tensor([[1.0, 0, 3], [0, 1, 0], [0, 0, 1]], dtype=DOUBLE)
    a = s @ torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=DOUBLE)) @ torch.linalg.inv(s)
    space = KrylovSchur(lambda v: v @ a.T, normal(1, 3), 3)
    space.grow(3)
    assert space.condition(0, 2.0) == pytest.approx(
        math.sqrt(10), rel=1e-6
    )  # left (1, 0, −3) against right (1, 0, 0)
    assert space.condition(0, 1.0) == pytest.approx(math.sqrt(10), rel=1e-6)


def test_norms_and_the_outside():
    a = np.random.default_rng(1).normal(size=(30, 30)) + 1j * np.random.default_rng(2).normal(size=(30, 30))
    u, _, v = np.linalg.svd(a)
    for sizes in ([7.0, *np.linspace(0, 3, 29)], [7.0, 6.9, *np.zeros(28)]):
        found = norm_estimate(u @ np.diag(sizes) @ v)
        assert 6.9 < found <= 7.0 + 1e-9
    assert norm_estimate(np.zeros((3, 3))) == 0
    circle = np.exp(1j * np.linspace(0.1, 3, 9))
    inner = 0.3 * np.exp(1j * np.linspace(0, 3, 20))
    order = outermost(np.concatenate([inner, circle, circle.conj()]))
    assert set(order[:4]) <= set(range(20, 38)) and len(set(order)) == 38


# -- products --------------------------------------------------------------------------------------


def test_products_of_a_field_and_their_count():
    w = normal(5, 5)
    x = normal(3, 5, seed=1)
    products = JacobianProducts(lambda x: torch.tanh(x @ w.T), x)
    j = (1 - torch.tanh(x @ w.T) ** 2)[:, :, None] * w
    v = normal(3, 5, seed=2)
    torch.testing.assert_close(products.jvp(v), (j @ v[..., None])[..., 0])
    torch.testing.assert_close(products.vjp(v), (j.mT @ v[..., None])[..., 0])
    torch.testing.assert_close(products.value, torch.tanh(x @ w.T))
    assert products.count == 2
    torch.testing.assert_close(formed(products, x), j)
    half = products.vjp(v.float())
    assert half.dtype == torch.float32
    both = Combination((2.0, products), (-0.5, None))
    torch.testing.assert_close(both.jvp(v), 2 * (j @ v[..., None])[..., 0] - 0.5 * v)
    torch.testing.assert_close(both.vjp(v), 2 * (j.mT @ v[..., None])[..., 0] - 0.5 * v)
    assert both.count == 2


def edge(t: torch.Tensor) -> torch.autograd.graph.GradientEdge:
    return torch.autograd.graph.get_gradient_edge(t)


def test_products_between_places_of_a_graph():
    x = normal(2, 3).requires_grad_()
    w = normal(4, 3, seed=1)
    y = torch.tanh(x @ w.T)
    at_x, at_y = (Place((edge(t),), (t.shape,)) for t in (x, y))
    products = JacobianProducts.between(at_y, at_x, y, x, 2, factor=3.0)
    j = 3 * (1 - y.detach() ** 2)[:, :, None] * w
    u, v = normal(2, 4, seed=2), normal(2, 3, seed=3)
    torch.testing.assert_close(products.vjp(u), (j.mT @ u[..., None])[..., 0])
    torch.testing.assert_close(products.jvp(v), (j @ v[..., None])[..., 0])
    torch.testing.assert_close(products.pulled_back(u), products.vjp(u))
    torch.testing.assert_close(pulled_back(at_y, at_x, u), products.vjp(u) / 3)
    same = JacobianProducts.between(at_x, at_x, x, x, 2, factor=3.0)
    torch.testing.assert_close(same.vjp(v), 3 * v)
    torch.testing.assert_close(same.jvp(v), 3 * v)
    assert products.count == 4 and same.count == 2


def test_a_batch_that_is_the_second_dimension():
    """As of sequences, (time, batch, channels)."""
    x = normal(4, 2, 3)
    assert rows(x, 2).shape == (2, 12) and (rows(x, 2)[1] == x[:, 1].flatten()).all()
    assert rows(x, 4).shape == (4, 6) and rows(x, 5).shape == (1, 24) and rows(normal(3), 3).shape == (3, 1)
    w = normal(4, 4, seed=1)
    leaf = x.clone().requires_grad_()
    y = torch.einsum("ts,sbc->tbc", w, leaf)
    at_x, at_y = (Place((edge(t),), (t.shape,)) for t in (leaf, y))
    products = JacobianProducts.between(at_y, at_x, y, leaf, 2)
    v = normal(2, 12, seed=2)
    torch.testing.assert_close(
        products.jvp(v), rows(torch.einsum("ts,sbc->tbc", w, v.reshape(2, 4, 3).movedim(0, 1)), 2)
    )
    torch.testing.assert_close(
        products.vjp(v), rows(torch.einsum("ts,tbc->sbc", w, v.reshape(2, 4, 3).movedim(0, 1)), 2)
    )


def test_states_of_several_parts():
    """Side by side along a dimension; of a part that is computed from another its share is taken off."""
    p = normal(2, 2).requires_grad_()
    q = 3 * p + normal(2, 2, seed=1).requires_grad_()
    y = p * 5 + q * 7
    place = Place((edge(p), edge(q)), (p.shape, q.shape), 1, (0, 1))
    assert place.join([p, q]).shape == (2, 4)
    for part, whole in zip(place.cut(normal(2, 4)), (slice(0, 2), slice(2, 4)), strict=True):
        assert (part == normal(2, 4)[:, whole]).all()
    at_y = Place((edge(y),), (y.shape,))
    u = normal(2, 2, seed=2)
    torch.testing.assert_close(pulled_back(at_y, place, u), torch.cat([5 * u, 7 * u], 1))
    free = Place((edge(p), edge(q)), (p.shape, q.shape), 1)
    torch.testing.assert_close(pulled_back(at_y, free, u), torch.cat([26 * u, 7 * u], 1))
    other = normal(2, 2, seed=4).requires_grad_()
    apart = Place((edge(other), edge(q)), (p.shape, q.shape), 1)
    torch.testing.assert_close(pulled_back(at_y, apart, u), torch.cat([0 * u, 7 * u], 1))


def test_constant_fields_have_no_jacobian():
    x = normal(2, 3)
    products = JacobianProducts(torch.ones_like, x)
    assert not products.jvp(x).any() and not products.vjp(x).any()
    assert not dense_jacobian(torch.ones_like, x).any()
    partly = JacobianProducts(lambda x: torch.ones_like(x) * normal(3).requires_grad_(), x)
    assert not partly.jvp(x).any() and not partly.vjp(x).any()


def test_precision_is_put_back_also_in_float16_contexts():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision():
            assert not torch.is_autocast_enabled("cpu")
            assert (
                normal(2, 2, dtype=torch.float32) @ normal(2, 2, dtype=torch.float32)
            ).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")


def test_dense_jacobians_in_parts(monkeypatch):
    """As many rows at a time as memory allows: by all at once, by four, by one."""
    from resode.jacobian import linearize

    w = normal(6, 6)
    x = normal(2, 6, seed=1)
    whole = dense_jacobian(lambda x: torch.sin(x @ w.T), x)
    torch.testing.assert_close(whole, torch.cos(x @ w.T)[:, :, None] * w)
    for entries, calls in ((2 * 6 * 4, 2), (1, 6), (2 * 6 * 6, 1)):
        monkeypatch.setattr(linearize, "_ENTRIES", entries)
        field, seen = counting(lambda x: torch.sin(x @ w.T))
        assert torch.equal(dense_jacobian(field, x), whole) and len(seen) == calls
    assert torch.equal(check_field(torch.sin, x), torch.sin(x))


# -- matrices --------------------------------------------------------------------------------------


def test_eigenvalues_with_their_conditions_and_errors():
    """[[1, k], [0, 2]] has conditions √(1 + k²); hermitian and normal ones have 1."""
    k = 100.0
    for scale in (1.0, 1e200, 1e-200):
        found = eigenvalues_with_errors(scale * np.array([[1.0, k], [0.0, 2.0]]), 2.0**-52)
        np.testing.assert_allclose(found.conditions, math.sqrt(1 + k * k), rtol=1e-9)
        np.testing.assert_allclose(np.sort(found.values.real), [scale, 2 * scale], rtol=1e-12)
        norm = scale * np.linalg.norm([[1.0, k], [0.0, 2.0]], 2)
        assert found.scale == pytest.approx(norm, rel=1e-2) and not found.normal and found.complete
        assert (found.errors >= 4 * 2.0**-52 * norm * 99).all() and (
            found.errors <= 16 * 2.0**-52 * norm * 101
        ).all()
    coarse = eigenvalues_with_errors(np.array([[1.0, k], [0.0, 2.0]]), 2.0**-23)
    assert (coarse.errors >= 4 * 2.0**-23 * 99 * k).all() and (
        coarse.errors <= 4.1 * 2.0**-23 * 101 * k
    ).all()
    hermitian = np.array([[1.0, 2j], [-2j, 1.0]])
    turned = np.array([[0.0, 3.0], [-3.0, 0.0]])
    for matrix, values in ((hermitian, [-1, 3]), (turned, [-3j, 3j])):
        found = eigenvalues_with_errors(matrix, 2.0**-52)
        np.testing.assert_allclose(
            np.sort_complex(found.values), np.sort_complex(np.array(values, complex)), atol=1e-14
        )
        assert (
            found.normal
            and (found.conditions == 1).all()
            and not found.residuals.any()
            and found.scale == pytest.approx(3)
        )
        np.testing.assert_allclose(found.errors, 4 * 2.0**-52 * 3, rtol=1e-6)
    zero = eigenvalues_with_errors(np.zeros((2, 2)), 2.0**-52)
    assert not zero.values.any() and zero.scale == 0 and not zero.errors.any()


def test_bad_scales_alone_make_no_eigenvalue_ill_conditioned_in_float64():
    """D⁻¹SD with S symmetric: values of S to many digits although ‖J‖ is 1e12 times as large."""
    s = np.array([[2.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 4.0]])
    d = np.diag([1.0, 1e6, 1e12])
    found = eigenvalues_with_errors(np.linalg.inv(d) @ s @ d, 2.0**-52)
    np.testing.assert_allclose(np.sort(found.values.real), np.linalg.eigvalsh(s), rtol=1e-12)
    better, logs = evened(np.linalg.inv(d) @ s @ d)
    np.testing.assert_allclose(better, s, rtol=1e-5)
    np.testing.assert_allclose(np.exp(logs - logs[0]), [1, 1e6, 1e12], rtol=1e-4)
    same, logs = evened(s)
    np.testing.assert_allclose(same, s, rtol=1e-12)
    assert not logs.any()


def test_matrices_as_they_come():
    for given, eps in (
        ([[1, 2], [3, 4]], 2.0**-52),
        (np.eye(2, dtype=np.float32), 2.0**-23),
        (torch.eye(2, dtype=torch.float32), 2.0**-23),
        (torch.eye(2, dtype=torch.bfloat16), 2.0**-7),
        (torch.eye(2, dtype=torch.complex64), 2.0**-23),
        (np.eye(2, dtype=np.complex64), 2.0**-23),
        (np.eye(2, dtype=np.longdouble), 2.0**-52),
    ):
        values, found = checked_matrices(given)
        assert found == eps and values.dtype == (
            np.complex128 if "complex" in str(getattr(given, "dtype", "")) else np.float64
        )
    for bad, error, words in (
        (np.eye(2, dtype=int), TypeError, "int64"),
        (torch.eye(2, dtype=torch.int32), TypeError, "int32"),
        (np.ones((2, 3)), ValueError, "square"),
        (np.ones(4), ValueError, "square"),
        (np.ones((0, 0)), ValueError, "not empty"),
        (np.array([[1.0, math.nan], [math.inf, 1.0]]), ValueError, "2 of 4 entries"),
        (np.broadcast_to(0.0, (4097, 4097)), ValueError, "up to 4096 rows, got 4097"),
    ):
        with pytest.raises(error, match=words):
            checked_matrices(bad)
    import scipy.sparse

    assert checked_matrices(scipy.sparse.eye(3).tocsr())[0].shape == (3, 3)
    with pytest.raises(ValueError, match="got 5000"):
        checked_matrices(scipy.sparse.eye(5000).tocsr())
    check_precision(0.249, 12, 2.0**-7)
    with pytest.raises(ValueError, match="Use float32"):
        check_precision(0.25, 12, 2.0**-7)


def test_spectra_of_matrices_and_of_known_eigenvalues():
    a = np.stack([np.diag([-1.0, -2.0]), np.array([[0.0, 1.0], [-1.0, 0.0]])])[None]
    found = matrix_spectrum(a)
    assert found.shape == (1, 2) and found.complete.all() and found.n == 2
    known = matrix_spectrum(a, eigenvalues=np.array([[[-1.0, -2.0], [1j, -1j]]]))
    np.testing.assert_allclose(known.values, [[-1, -2], [1j, -1j]])
    assert np.isnan(known.conditions).all() and known.complete.all()
    np.testing.assert_allclose(known.scale, [2, 1], rtol=1e-3)
    np.testing.assert_allclose(known.errors[0], 4 * 2.0**-52 * 2, rtol=1e-3)


def test_options_of_a_search():
    for bad, words in (
        (dict(k=0), "k must"),
        (dict(budget=0), "budget"),
        (dict(dense_up_to=-1), "dense_up_to"),
        (dict(rtol=0.0), "rtol"),
        (dict(rtol=1.0), "rtol"),
    ):
        with pytest.raises(ValueError, match=words):
            SpectrumOptions(**bad)
    assert SpectrumOptions(k=1, budget=1, dense_up_to=0).rtol is None
    options = SpectrumOptions()
    assert [options.accuracy(2.0**-e) for e in (52, 23, 7)] == [1e-6, 1e-4, 8 * 2.0**-7]
    assert SpectrumOptions(rtol=0.01).accuracy(2.0**-52) == 0.01


@pytest.mark.parametrize("n", [200, 400])
def test_a_search_takes_no_more_products_than_it_is_given(n):
    """−1 … 0 and one eigenvalue at −4: found by one space of 40 vectors and a few more for its right vector."""
    d = torch.cat([torch.tensor([-4.0], dtype=DOUBLE), torch.linspace(-1, -0.1, n - 1, dtype=DOUBLE)])
    field = lambda x: x * d  # noqa: E731
    found = spectrum(field, torch.zeros(2, n, dtype=DOUBLE), SpectrumOptions(dense_up_to=0))
    assert not found.complete.any() and found.products <= 100
    for row in range(2):
        best = int(np.abs(found.values[row] + 4).argmin())
        assert (
            abs(found.values[row, best] + 4) <= max(found.errors[row, best], 1e-12)
            and found.errors[row, best] < 1e-5
        )
        assert found.conditions[row, best] == 1 and found.normal[row], "diag is normal"
    dense = spectrum(field, torch.zeros(2, n, dtype=DOUBLE))
    assert dense.complete.all() and np.sort(dense.values[0].real) == pytest.approx(np.sort(d.numpy()))
