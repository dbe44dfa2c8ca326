"""Step limits of matrices and fields, and what eigenvalues do not tell."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn

from resode.analysis import (
    bifurcation,
    contraction_step,
    jacobian,
    logarithmic_norm,
    max_stable_step,
    step_limit,
    transient_growth,
)
from resode.analysis.steps.nonnormal import _first_exit
from resode.jacobian.matrices import DENSE_LIMIT
from resode.solve.step import rk_step
from resode.stability import stability_coefficients
from resode.tableaus import METHODS

EXPLICIT = [name for name, t in METHODS.items() if t.explicit]
DIAGONAL = torch.diag(torch.tensor([-2.0, -5.0]))


def matrix_function(name: str, z: np.ndarray) -> np.ndarray:
    """R at matrices (…, n, n) from its fractions, for explicit methods."""
    powers = np.broadcast_to(np.eye(z.shape[-1]), z.shape)
    total = np.zeros(z.shape, dtype=z.dtype)
    for c in stability_coefficients(name)[0]:
        total = total + float(c) * powers
        powers = powers @ z
    return total


# -- matrices ------------------------------------------------------------------------------------


def test_a_diagonal_matrix():
    """2/5, and 2.785293563405/5 for rk4, to the last digit."""
    step = max_stable_step(DIAGONAL)
    assert isinstance(step, float) and step == 0.4
    assert max_stable_step(DIAGONAL, solver="rk4") == pytest.approx(0.557058712681, abs=5e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_antisymmetric(dtype):
    """Imaginary eigenvalues up to rounding: 2√2/max|λ| for rk4, 0 for Euler."""
    a = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    j = (a - a.T).to(dtype)
    largest = np.abs(np.linalg.eigvals(j.double().numpy())).max()
    assert max_stable_step(j, solver="rk4") == pytest.approx(math.sqrt(8) / largest, rel=1e-14)
    assert max_stable_step(j, solver="euler") == 0
    # float32 eigenvalues have real parts of rounding; given as such they must not decide either
    assert max_stable_step(eigenvalues=torch.linalg.eigvals(j), solver="rk4") == pytest.approx(
        math.sqrt(8) / largest, rel=20 * torch.finfo(dtype).eps
    )
    assert step_limit(j, solver="rk4").contraction_step == pytest.approx(math.sqrt(8) / largest, rel=1e-12)


def test_kinds_of_matrices():
    """numpy, scipy sparse, nested lists and tensors, one and many, are the same matrix."""
    j = np.array([[-2.0, 1.0], [0.0, -5.0]])
    assert max_stable_step(j) == max_stable_step(j.tolist()) == 0.4
    for sparse in (scipy.sparse.csr_matrix(j), scipy.sparse.coo_array(j)):
        assert max_stable_step(sparse) == 0.4
    stack = max_stable_step(np.stack([j, 2 * j]))
    assert isinstance(stack, np.ndarray)
    np.testing.assert_array_equal(stack, [0.4, 0.2])
    tensors = max_stable_step(torch.tensor(np.stack([[j, 2 * j]]), dtype=torch.float32, requires_grad=True))
    torch.testing.assert_close(tensors, torch.tensor([[0.4, 0.2]]))
    assert max_stable_step(torch.tensor(1j * j), solver="rk4") == pytest.approx(math.sqrt(8) / 5, rel=1e-14)
    assert max_stable_step(torch.zeros(3, 3)) == math.inf
    assert max_stable_step(torch.tensor(j).to_sparse()) == 0.4
    assert max_stable_step(torch.tensor(j + 0j).mH) == 0.4  # a view with its conjugation pending
    assert max_stable_step(eigenvalues=torch.tensor([-2.0, -5 + 1e-9j]).conj()) == pytest.approx(0.4)


def test_everything_the_limit_rests_on():
    """Upper triangular by hand: λ = −1, −3; v = (1, 0) and (−2, 1)/√5, left ones (1, 2)/√5 and (0, 1)."""
    j = torch.tensor([[-1.0, 4.0], [0.0, -3.0]], dtype=torch.float64)
    limit = step_limit(j)
    assert limit.step == pytest.approx(2 / 3, rel=1e-15)
    assert limit.limiting_eigenvalue == -3 and limit.converged is True
    assert limit.residual < 1e-14
    assert limit.condition == pytest.approx(math.sqrt(5), rel=1e-12)  # 1/|(0, 1)·(−2, 1)/√5|
    assert limit.logarithmic_norm == pytest.approx(-2 + math.sqrt(5), rel=1e-14)
    assert limit.contraction_step == 0  # μ₂ > 0
    assert "any step, because J is not normal" in str(limit)


def test_growing_modes_of_a_matrix():
    j = torch.block_diag(torch.tensor([[0.5]]), torch.tensor([[-4.0, 1.0], [-1.0, -4.0]]))
    limit = step_limit(j, solver="midpoint")
    assert limit.step == 0 and limit.growing.tolist() == [0.5 + 0j]
    alone = max_stable_step(j[1:, 1:], solver="midpoint")
    assert limit.decaying_step == pytest.approx(alone, rel=1e-12)


def test_batches_of_limits():
    """Every field has the batch's shape, in the tensor's dtype."""
    j = torch.stack([DIAGONAL, -DIAGONAL, torch.tensor([[-1.0, 4.0], [0.0, -3.0]])])
    limit = step_limit(j)
    torch.testing.assert_close(limit.step, torch.tensor([0.4, 0.0, 2 / 3]))
    torch.testing.assert_close(limit.contraction_step, torch.tensor([0.4, 0.0, 0.0]))
    for field in (
        "residual",
        "condition",
        "logarithmic_norm",
        "decaying_step",
        "converged",
        "decaying_converged",
    ):
        assert getattr(limit, field).shape == (3,)
    assert limit.limiting_eigenvalue.dtype == torch.complex64
    assert [len(g) for g in limit.growing] == [0, 2, 0]
    assert limit.intervals[1] == []


def test_defective_eigenvalues_are_reported_as_ill_conditioned():
    """A Jordan block: the double eigenvalue moves by √ε, its condition number is infinite."""
    limit = step_limit(np.array([[-1.0, 1.0], [0.0, -1.0]]))
    assert limit.condition > 1e7
    assert step_limit(-np.eye(3)).condition == pytest.approx(1)


def test_conditions_are_those_of_the_singular_vectors():
    """1/|w*v| of the null vectors of J − λI, which all of its singular vectors give as well."""
    j = np.random.default_rng(0).normal(size=(40, 40)) - 9 * np.eye(40)
    limit = step_limit(j)
    left, sizes, right = np.linalg.svd(j - limit.limiting_eigenvalue * np.eye(40))
    assert sizes[-1] < 1e-12 and limit.residual < 1e-12
    assert limit.condition == pytest.approx(1 / abs(np.vdot(left[:, -1], right[-1].conj())), rel=1e-9)
    assert limit.condition > 1.01
    assert step_limit(-np.eye(40) + np.diag(np.ones(39), 1)).condition > 1e15  # a Jordan chain


def test_own_eigenvalues_spare_the_computation():
    j = np.array([[-1.0, 2.0], [-2.0, -1.0]])
    limit = step_limit(j, eigenvalues=[-1 + 2j, -1 - 2j])
    assert limit.step == pytest.approx(0.4) and limit.contraction_step == pytest.approx(0.4)
    with pytest.raises(ValueError, match="conjugate pairs: -1\\+2j stands without"):
        step_limit(j, eigenvalues=[-1 + 2j, -1 + 2j])
    with pytest.raises(ValueError, match="differs from its trace"):
        step_limit(j, eigenvalues=[-2 + 2j, -2 - 2j])
    with pytest.raises(ValueError, match="has eigenvalues of shape \\(2,\\), got \\(1,\\)"):
        step_limit(j, eigenvalues=[-1.0])


def test_growth_budget_of_a_matrix():
    """Euler on a rotation: (1 + h²)^(N/2) = 1 + tol; the contraction limit stays strict."""
    limit = step_limit(np.array([[0.0, 1.0], [-1.0, 0.0]]), growth=(100, 0.1))
    assert limit.step == pytest.approx(math.sqrt(1.1 ** (2 / 100) - 1), rel=1e-12)
    assert limit.contraction_step == 0


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (np.ones((2, 3)), ValueError, "square"),
        (np.ones(3), ValueError, "square"),
        (np.zeros((0, 0)), ValueError, "not empty"),
        (torch.zeros(0, 3, 3), ValueError, "not empty"),
        (np.array([[1.0, np.nan], [0, 1]]), ValueError, "1 of 4 entries are not"),
        (torch.tensor([[math.inf]]), ValueError, "finite"),
        (np.array([[1, 2], [3, 4]]), TypeError, "floating-point entries, got int64"),
        (torch.eye(2, dtype=torch.int32), TypeError, "torch.int32"),
        ([["a"]], TypeError, "floating-point"),
        (scipy.sparse.eye(DENSE_LIMIT + 1), ValueError, "eigenvalues="),
    ],
)
def test_bad_matrices(bad, error, words):
    for function in (max_stable_step, step_limit, logarithmic_norm, contraction_step):
        with pytest.raises(error, match=words):
            function(bad)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"unknown method 'rk5'.*euler"):
        max_stable_step(DIAGONAL, solver="rk5")
    with pytest.raises(ValueError, match="give a Jacobian, eigenvalues="):
        max_stable_step()
    with pytest.raises(TypeError, match="a field needs the states x"):
        max_stable_step(torch.tanh)
    with pytest.raises(TypeError, match="x goes with a field"):
        max_stable_step(DIAGONAL, torch.ones(1, 2))
    with pytest.raises(TypeError, match="nothing to linearize"):
        max_stable_step(eigenvalues=[-1.0], x=torch.ones(1, 2))
    with pytest.raises(TypeError, match="not both"):
        max_stable_step(torch.tanh, torch.ones(1, 2), eigenvalues=[-1.0])
    with pytest.raises(ValueError, match="k must be"):
        max_stable_step(DIAGONAL, k=0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        max_stable_step(DIAGONAL, solvr="rk4")


# -- fields --------------------------------------------------------------------------------------


def conv_field() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3, padding=1),
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jacobian_of_a_convolutional_field(dtype):
    """Against autograd one sample at a time."""
    field = conv_field().to(dtype)
    x = torch.randn(4, 3, 5, 5, dtype=dtype)
    theirs = [torch.func.jacrev(lambda s: field(s[None])[0])(s).reshape(75, 75) for s in x]
    tight = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(jacobian(field, x), torch.stack(theirs), atol=tight, rtol=tight)


def test_jacobian_in_parts(monkeypatch):
    """When copies of the batch do not fit at once, the rows come in several passes."""
    from resode.jacobian import linearize

    field, x = conv_field(), torch.randn(2, 3, 4, 4)
    whole = jacobian(field, x)
    monkeypatch.setattr(linearize, "_ENTRIES", 7 * x.numel())
    torch.testing.assert_close(jacobian(field, x), whole)


def test_jacobian_under_no_grad_and_inference():
    field, x = nn.Linear(2, 2, bias=False), torch.ones(3, 2)
    with torch.no_grad():
        torch.testing.assert_close(jacobian(field, x)[1], field.weight.data)
    with torch.inference_mode():
        torch.testing.assert_close(jacobian(field, x)[2], field.weight.data)
    assert jacobian(torch.ones_like, x).abs().max() == 0
    assert field.weight.grad is None


def test_a_linear_field_has_its_matrix_limit():
    """F(x) = Jx for every sample; a batch of one, and a single row among many, agree."""
    j = torch.tensor([[-1.0, 3.0], [-3.0, -2.0]])
    x = torch.randn(5, 2)
    limits = max_stable_step(lambda x: x @ j.T, x, solver="rk4")
    assert limits.shape == (5,) and limits.dtype == torch.float32
    torch.testing.assert_close(limits, torch.full((5,), max_stable_step(j, solver="rk4")))


def test_the_limit_is_that_of_the_network_s_own_steps():
    """Near a fixed point of a nonlinear field the iteration converges just below the step and leaves just above."""
    torch.manual_seed(1)
    a = torch.randn(6, 6, dtype=torch.float64)
    w = -(a @ a.T) / 6 - 0.5 * torch.eye(6, dtype=torch.float64)

    def field(x):
        return torch.tanh(x @ w.T)  # F(0) = 0

    for solver in ("euler", "midpoint", "rk4", "dopri5"):
        step = float(max_stable_step(field, torch.zeros(1, 6, dtype=torch.float64), solver=solver))
        sizes = []
        for factor in (0.99, 1.01):
            x = 1e-9 * torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            for _ in range(1500):
                x = rk_step(METHODS[solver], lambda t, x: field(x), 0.0, x, step * factor)
            sizes.append(float(x.norm()))
        assert sizes[0] < 1e-12 and sizes[1] > 1e-3, (solver, sizes)


def test_step_limit_of_a_field_is_batched():
    limit = step_limit(torch.sin, torch.tensor([[0.0, 1.0], [math.pi, 2.0]]))
    assert limit.step.tolist() == [0.0, pytest.approx(2.0)]
    assert [len(g) for g in limit.growing] == [2, 0]
    assert limit.contraction_step.shape == limit.residual.shape == (2,)
    assert "2 spectra" in str(limit)


class Coupled(nn.Module):
    def forward(self, x):
        return x - x.mean(dim=0)


def fields_that_have_no_jacobian():
    x = torch.randn(3, 4)
    image = torch.randn(2, 3, 4, 4)
    yield "batch norm", conv_field().train(), image, ValueError, r"BatchNorm2d \(0\) normalizes .*\.eval\(\)"
    yield (
        "no running statistics",
        nn.BatchNorm1d(4, track_running_stats=False).eval(),
        x,
        ValueError,
        "running statistics",
    )
    yield "in place", nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), x, ValueError, "inplace=False"
    yield "in place, unchanged", nn.ReLU(inplace=True), x.abs(), ValueError, "inplace=False"
    yield "shape", nn.Linear(4, 5), x, ValueError, r"got x \(3, 4\), F\(x\) \(3, 5\)"
    yield "no tensor", lambda x: (x, x), x, ValueError, "tuple"
    yield "dropout", nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), x, ValueError, r"Dropout \(1\) drops"
    yield "random", lambda x: x + torch.randn_like(x), x, ValueError, "random"
    yield "rows", Coupled(), x, ValueError, "must not interact"
    yield "rows, one sample", Coupled(), x[:1], ValueError, "must not interact"
    yield "detached", lambda x: x.detach() ** 2, x, ValueError, "detached"
    yield "nan", lambda x: x * math.nan, x, ValueError, r"F\(x\) must be finite"
    yield "x nan", torch.tanh, x * math.nan, ValueError, "12 of 12 entries are not"
    yield "x without batch", torch.tanh, x[0], ValueError, r"x\[None\]"
    yield "empty", torch.tanh, x[:0], ValueError, "at least one entry"
    yield "integers", torch.abs, x.long(), TypeError, "floating-point tensor, got torch.int64"
    yield "list", torch.tanh, [[1.0]], TypeError, "got list"


@pytest.mark.parametrize(
    ("field", "x", "error", "words"),
    [pytest.param(*case[1:], id=case[0]) for case in fields_that_have_no_jacobian()],
)
def test_fields_that_cannot_be_linearized(field, x, error, words):
    before = x.clone() if isinstance(x, torch.Tensor) else x
    with pytest.raises(error, match=words):
        step_limit(field, x)
    if isinstance(x, torch.Tensor):
        torch.testing.assert_close(x, before, equal_nan=True)


def test_train_mode_without_batch_norm_is_fine():
    """A fresh module is in train mode; that alone changes nothing."""
    field = nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3), nn.Dropout(0.0)).train()
    assert max_stable_step(field, torch.randn(2, 3)).shape == (2,)


# -- what eigenvalues do not tell ----------------------------------------------------------------


def test_logarithmic_norm():
    """By hand for 2×2, and as the limit (‖I + hJ‖ − 1)/h that defines it."""
    assert logarithmic_norm([[-1.0, 10.0], [0.0, -2.0]]) == pytest.approx(-1.5 + math.sqrt(25.25), rel=1e-14)
    j = np.random.default_rng(0).normal(size=(4, 5, 5))
    limit = (np.linalg.norm(np.eye(5) + 1e-7 * j, 2, axis=(1, 2)) - 1) / 1e-7
    np.testing.assert_allclose(logarithmic_norm(j), limit, atol=1e-5)
    single = logarithmic_norm(torch.tensor(j, dtype=torch.float32))
    torch.testing.assert_close(single, torch.tensor(limit, dtype=torch.float32), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", EXPLICIT)
def test_contraction_limit_against_a_scan(name):
    """‖R(sJ)‖₂ ≤ 1 at every s on a fine grid below it, and above 1 beyond it; never above the spectral limit."""
    rng = np.random.default_rng(EXPLICIT.index(name))
    for n in (2, 3, 5):
        j = rng.normal(size=(6, n, n))
        shift = logarithmic_norm(j) + rng.choice([1e-3, 0.1, 1.0], size=6)
        j -= shift[:, None, None] * np.eye(n)
        found = contraction_step(j, name)
        assert (found <= max_stable_step(j, solver=name) * (1 + 1e-12)).all() and (found > 0).all()
        below = np.linspace(0, 1, 500)[1:-1] * found[:, None]
        above = (1 + np.geomspace(1e-9, 1e-3, 6)) * found[:, None]
        for h, worst in ((below, False), (above, True)):
            norms = np.linalg.norm(matrix_function(name, h[..., None, None] * j[:, None]), 2, axis=(-1, -2))
            assert ((norms > 1 + 1e-13).any(axis=1) == worst).all()


@pytest.mark.parametrize("roots", [(0.2, 0.3, 0.8), (0.01, 0.012, 0.9), (0.5, 0.7, 0.71), (0.4,)])
def test_the_first_of_several_exits_is_found(roots):
    """λ_max(W) of 1×1 matrices is the polynomial itself: positive first beyond its smallest root."""
    poly = np.polynomial.polynomial.polyfromroots(roots)
    found = _first_exit([np.array([[c]]) for c in poly], 0.0, 1.0, 1e-15)
    assert found == pytest.approx(roots[0], rel=1e-10)
    assert _first_exit([np.array([[-c]]) for c in (0.0, 1.0, 1.0)], 0.0, 1.0, 1e-15) is None


def test_contraction_of_normal_and_of_a_stable_methods():
    """Normal: the spectral limit. A-stable with μ₂ ≤ 0: inf (von Neumann)."""
    j = np.array([[-1.0, 0.9], [0.0, -2.0]])
    assert contraction_step(j, "radau5") == math.inf
    assert contraction_step(np.diag([-2.0, -5.0]), "rk4") == pytest.approx(2.785293563405 / 5, rel=1e-12)
    assert contraction_step(np.zeros((2, 2))) == math.inf
    # Euler by hand: 1 − ‖I + hJ‖² has the factor 2Sym + hJᵀJ ⪯ 0, h ≤ λ_min of the pencil
    pencil = np.linalg.eigvals(np.linalg.solve(j.T @ j, -(j + j.T))).real.min()
    assert contraction_step(j) == pytest.approx(pencil, rel=1e-10)


def test_nilpotent_growth_has_no_spectral_limit_but_never_contracts():
    """ρ = 0, yet powers of I + hJ grow linearly."""
    limit = step_limit(np.array([[0.0, 1.0], [0.0, 0.0]]))
    assert limit.step == math.inf and limit.contraction_step == 0
    assert "grow for a while at any step" in str(limit)


def test_transient_growth():
    """Euler, η = 0.1: R = [[0.9, 1], [0, 0.8]], Rⁿ = [[0.9ⁿ, 10(0.9ⁿ − 0.8ⁿ)], [0, 0.8ⁿ]]."""
    growth = transient_growth([[-1.0, 10.0], [0.0, -2.0]], 0.1, n_steps=60)
    n = np.arange(61)
    closed = np.zeros((61, 2, 2))
    closed[:, 0, 0], closed[:, 1, 1] = 0.9**n, 0.8**n
    closed[:, 0, 1] = 10 * (0.9**n - 0.8**n)
    np.testing.assert_allclose(growth.norms, np.linalg.norm(closed, 2, axis=(1, 2)), rtol=1e-12)
    assert growth.peak == growth.norms.max() and growth.peak_step == 6 and growth.complete is True
    early = transient_growth([[-1.0, 10.0], [0.0, -2.0]], 0.1, n_steps=5)
    assert early.complete is False and early.peak_step == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transient_growth_of_a_batch(dtype):
    j = torch.tensor([[[-1.0, 10.0], [0.0, -2.0]], [[-1.0, 0.0], [0.0, -2.0]]], dtype=dtype)
    growth = transient_growth(j, 0.1, "rk4", n_steps=20)
    assert growth.norms.shape == (2, 21) and growth.norms.dtype == dtype
    assert growth.complete.tolist() == [False, True] and growth.peak_step.tolist() == [7, 0]
    implicit = transient_growth(j.double().numpy(), 0.1, "trapezoid", n_steps=3).norms[0, 1]
    m = j[0].double().numpy() * 0.05
    assert implicit == pytest.approx(np.linalg.norm(np.linalg.solve(np.eye(2) - m, np.eye(2) + m), 2))


def test_transient_growth_that_overflows_is_infinite():
    growth = transient_growth([[5.0]], 1e3, n_steps=200)
    assert growth.peak == math.inf and not np.isnan(growth.norms).any()


def test_transient_growth_arguments():
    with pytest.raises(ValueError, match="step_size must be above 0"):
        transient_growth([[1.0]], 0.0)
    with pytest.raises(ValueError, match="n_steps"):
        transient_growth([[1.0]], 0.1, n_steps=0)
    with pytest.raises(ValueError, match="pole"):
        transient_growth([[1.0]], 1.0, "implicit_euler")


def test_bifurcation_of_the_logistic_family(tmp_path):
    """x = 1 until η = 2, a cycle of two until √6, of four after it; heun2 too leaves its fixed point at η = 2."""
    eta = torch.tensor([1.99, 2.2, 2.44, 2.46, 2.9], dtype=torch.float64)
    result = bifurcation(lambda x: x * (1 - x), eta, x0=0.1, transient=4000, keep=64)
    visited = [len(torch.unique(torch.round(row, decimals=6))) for row in result.orbits]
    assert visited[:4] == [1, 2, 2, 4] and visited[4] > 32
    assert result.orbits[0, 0] == pytest.approx(1, abs=1e-9)
    second = bifurcation(lambda x: x * (1 - x), eta[:2], x0=0.1, solver="heun2", transient=4000, keep=4)
    assert second.orbits[0, 0] == pytest.approx(1, abs=1e-9)
    assert (second.orbits[1] - 1).abs().max() > 0.1  # R(−2.2) = 1 − 2.2 + 2.2²/2 = 1.22
    result.plot(str(tmp_path / "b.png"))
    growth = transient_growth([[-1.0, 10.0], [0.0, -2.0]], 0.1)
    growth.plot(str(tmp_path / "t.png"))
    assert (tmp_path / "b.png").stat().st_size > 5000 < (tmp_path / "t.png").stat().st_size
    with pytest.raises(ValueError, match="explicit"):
        bifurcation(torch.tanh, eta, 0.1, solver="radau5")
    with pytest.raises(ValueError, match="step_sizes must be positive"):
        bifurcation(torch.tanh, -eta, 0.1)
    with pytest.raises(ValueError, match="keep must"):
        bifurcation(torch.tanh, eta, 0.1, keep=0)


def test_periods_of_orbits():
    """Logistic at r = 1 + η: 1, 2, 4, the window of 3 and chaos; a cycle must fit twice; none at infinity."""
    eta = torch.tensor([1.5, 2.2, 2.5, 2.835, 3.0, 4.0], dtype=torch.float64)
    settled = bifurcation(lambda x: x * (1 - x), eta, x0=0.1, transient=2000, keep=16)
    assert settled.periods().tolist() == [1, 2, 4, 3, 0, 0]
    brief = bifurcation(lambda x: x * (1 - x), eta, x0=0.1, transient=2000, keep=7)
    assert brief.periods().tolist() == [1, 2, 0, 3, 0, 0]
    assert brief.periods(tol=1.0).tolist() == [1, 1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="tol must be above 0"):
        brief.periods(0.0)
    with pytest.raises(ValueError, match="two states or more"):
        bifurcation(torch.tanh, eta, 0.1, keep=1).periods()
