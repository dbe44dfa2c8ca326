"""Step limits without the Jacobian: against dense eigenvalues, on the step map, and what may go wrong."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from resode import step_limit
from resode.analysis import jacobian, max_stable_step
from resode.fields import ConvField
from resode.jacobian import outer
from resode.jacobian.krylov import KrylovSchur, outermost
from resode.jacobian.products import JacobianProducts, full_precision
from resode.jacobian.spectrum import SpectrumOptions, spectrum
from resode.solve.step import rk_step
from resode.stability.function import amplification
from resode.stability.spectra import limits
from resode.tableaus import METHODS


def block(channels: int = 8, damping: float = 0.0, seed: int = 0, dtype=torch.float64):
    """A random convolutional field, its eigenvalues moved left by `damping`."""
    torch.manual_seed(seed)
    field = ConvField(channels).to(dtype).eval()
    return (lambda x: field(x) - damping * x) if damping else field


def decaying(channels: int, x: torch.Tensor):
    """Such a field with every mode at these states left of −0.2, whatever is drawn."""
    bare = block(channels)
    c = 0.2 + float(torch.linalg.eigvals(jacobian(bare, x)).real.max())
    return lambda x: bare(x) - c * x


def state(*shape: int, seed: int = 1, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(matrix: torch.Tensor):
    """F(x) = Ax for every row."""
    return lambda x: x @ matrix.T


# -- against dense eigenvalues -------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "rk4"])
@pytest.mark.parametrize("damped", [False, True])
def test_convolutional_blocks(solver, damped):
    """288 states, more than a Krylov space has: the limit within 1e-6, growing modes or not."""
    x = state(3, 8, 6, 6)
    field = decaying(8, x) if damped else block(8)
    dense = step_limit(field, x, solver=solver)
    free = step_limit(field, x, solver=solver, matrix_free=True)
    assert free.converged.all()
    torch.testing.assert_close(free.step, dense.step, rtol=1e-6, atol=0)
    torch.testing.assert_close(free.limiting_eigenvalue, dense.limiting_eigenvalue, rtol=1e-3, atol=1e-6)
    known = free.decaying_converged
    assert known.all() or (solver == "euler" and not damped)
    torch.testing.assert_close(free.decaying_step[known], dense.decaying_step[known], rtol=1e-6, atol=0)
    assert (free.decaying_step >= 0.99 * dense.decaying_step).all()  # else a bound
    assert (free.residual < 1e-3 * free.limiting_eigenvalue.abs()).all()
    torch.testing.assert_close(free.condition, dense.condition, rtol=0.1, atol=0)
    torch.testing.assert_close(free.logarithmic_norm, dense.logarithmic_norm, rtol=1e-2, atol=0)


def test_far_from_normal():
    """Channel scales over three decades leave the eigenvalues, and make the condition large."""
    scale = torch.logspace(0, 3, 8, dtype=torch.float64)[:, None, None]
    x = state(1, 8, 6, 6)
    inner = decaying(8, x)
    plain = step_limit(inner, x, solver="rk4")
    free = step_limit(lambda x: scale * inner(x / scale), x * scale, solver="rk4", matrix_free=True)
    assert free.converged.all()
    assert float(free.step) == pytest.approx(float(plain.step), rel=1e-6)


@pytest.mark.parametrize("width", [1.0, 1e-3, 1e-6])
def test_clusters(width):
    """Every eigenvalue within `width` of −2: 2/2 for Euler, as near as the cluster is wide."""
    inner, x = block(8), state(1, 8, 6, 6)
    dense = step_limit(lambda x: width * inner(x) - 2 * x, x)
    free = step_limit(lambda x: width * inner(x) - 2 * x, x, matrix_free=True)
    assert free.converged.all()
    assert float(free.step) == pytest.approx(float(dense.step), rel=1e-6)


def test_a_contraction_limit():
    """Where μ₂ < 0: by Lanczos on R(hJ)ᵀR(hJ), against the dense matrix's."""
    bare, x = block(4), state(1, 4, 6, 6)
    j = jacobian(bare, x)[0]
    c = 0.5 + float(torch.linalg.eigvalsh((j + j.T) / 2).max())
    field = lambda x: bare(x) - c * x  # noqa: E731
    for solver in ("euler", "midpoint"):
        dense = step_limit(field, x, solver=solver)
        free = step_limit(field, x, solver=solver, matrix_free=True)
        assert (dense.contraction_step > 0).all()
        torch.testing.assert_close(free.contraction_step, dense.contraction_step, rtol=1e-3, atol=0)


def test_growth_budget():
    field, x = block(4, 0.0), state(1, 4, 6, 6)
    given = {"solver": "rk4", "growth": (10, 0.5)}
    dense, free = (max_stable_step(field, x, matrix_free=m, **given) for m in (False, True))
    torch.testing.assert_close(free, dense, rtol=1e-6, atol=0)


def test_samples_in_parts(monkeypatch):
    """Memory for one sample at a time gives what memory for all gives."""
    x = state(3, 4, 8, 8)
    field = decaying(4, x)
    whole = max_stable_step(field, x, matrix_free=True)
    monkeypatch.setattr(outer, "MEMORY", 200 * x[0].numel() * 8)
    torch.testing.assert_close(max_stable_step(field, x, matrix_free=True), whole, rtol=1e-6, atol=0)


def test_a_small_space_restarts(monkeypatch):
    """With 40 vectors the space is cut back again and again, and the limit is the same."""
    x = state(2, 8, 6, 6)
    field = decaying(8, x)
    whole = step_limit(field, x)
    monkeypatch.setattr(outer, "SPACE", 40)
    small = step_limit(field, x, matrix_free=True)
    assert small.converged.all()
    torch.testing.assert_close(small.step, whole.step, rtol=1e-6, atol=0)


def test_large_states_are_sketched():
    """4,608 entries in float32, where vectors are sketched: λ and its mirror image in the transposed field.

    One mode stands out, decaying faster than the others, so that the search ends whatever is drawn.
    """
    x = state(2, 8, 24, 24)
    q = state(*x.shape[1:], seed=2)
    q = q / q.norm()

    def with_a_fast_mode(dtype: torch.dtype):
        inner, fast = block(8, 2.0, dtype=dtype), q.to(dtype)
        return lambda x: inner(x) - 4 * (x * fast).sum((1, 2, 3), keepdim=True) * fast

    limit = step_limit(with_a_fast_mode(torch.float32), x.float(), solver="rk4")
    assert limit.converged.all() and (limit.step > 0).all() and (limit.error < 1e-4).all()
    tight = max_stable_step(with_a_fast_mode(torch.float64), x, solver="rk4", rtol=1e-7)
    torch.testing.assert_close(limit.step.double(), tight, rtol=1e-4, atol=0)


def test_the_nearest_of_many_exits_that_lie_close():
    """A circular convolution's spectrum fills a plane region: dozens of exits within a hundredth."""
    generator = torch.Generator().manual_seed(1)
    kernel = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    kernel[1, 1] -= 4
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False).double()
    conv.weight.data[0, 0] = kernel
    pulse = torch.zeros(1, 1, 40, 40, dtype=torch.float64)
    pulse[..., 0, 0] = 1
    eigenvalues = torch.fft.fft2(conv(pulse).detach()).flatten()
    want = step_limit(eigenvalues=eigenvalues)
    found = limits(spectrum(conv, 0 * pulse), "euler")
    assert want.step > 0 and found.converged
    assert float(found.step) == pytest.approx(want.step, rel=1e-6)


# -- on the step map -----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_decay_below_and_growth_above_on_the_decaying_modes(solver):
    """Vectors of the decaying modes' invariant subspace, through the solver's own steps of x' = Jx."""
    bare, x = block(4), state(1, 4, 6, 6)
    real = torch.linalg.eigvals(jacobian(bare, x)[0]).real.sort(descending=True).values[:20]
    wide = int((real[:-1] - real[1:]).argmax())  # a mode near the axis would take too long to decay
    damping = float(real[wide] + real[wide + 1]) / 2
    field = lambda x: bare(x) - damping * x  # noqa: E731
    limit = step_limit(field, x, solver="rk4" if solver == "rk4" else "euler", matrix_free=True)
    j = jacobian(field, x)[0]
    values, vectors = torch.linalg.eig(j)
    decaying = values.real < -1e-9
    assert not decaying.all() and limit.decaying_converged.all()
    q, _ = torch.linalg.qr(vectors[:, decaying])
    start = q @ state(int(decaying.sum()), 1).to(q.dtype)

    def later_growth(factor: float, steps: int = 3000) -> float:
        """Of the norm over the last half of the steps, when the slowest mode is what is left."""
        v = torch.view_as_real(start).permute(2, 1, 0).reshape(2, -1).clone()  # real and imaginary part
        h, projector = float(limit.decaying_step) * factor, (q @ q.mH).real
        complement = (q @ q.mH).imag
        half = 0.0
        for step in range(steps):
            half = float(v.norm()) if step == steps // 2 else half
            v = rk_step(METHODS[solver], lambda t, v: v @ j.T, 0.0, v, h)
            real = v[0] @ projector.T - v[1] @ complement.T  # rounding must not bring growing modes back
            v = torch.stack([real, v[0] @ complement.T + v[1] @ projector.T])
        return float(v.norm()) / half

    assert later_growth(0.99) < 1 < later_growth(1.01)


# -- traps ---------------------------------------------------------------------------------------


class OneWay(torch.autograd.Function):
    """tanh without a forward derivative, and with one that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class Once(OneWay):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


def test_functions_without_a_forward_derivative():
    """Jv by a second backward pass; torch.func.jvp refuses this function."""
    w = state(6, 6)
    x = state(2, 6)
    with warnings.catch_warnings(), pytest.raises(RuntimeError):
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own first use of jvp
        torch.func.jvp(OneWay.apply, (x,), (x,))
    got = JacobianProducts(lambda x: OneWay.apply(x @ w.T), x).jvp(x)
    want = (1 - torch.tanh(x @ w.T) ** 2) * (x @ w.T)
    torch.testing.assert_close(got, want)


def test_functions_that_can_be_differentiated_once():
    """Their step limit is found by Jᵀ alone; what needs products with J, by central differences."""
    w = state(300, 300) / 20 - 2 * torch.eye(300, dtype=torch.float64)
    x = torch.zeros(1, 300, dtype=torch.float64)
    limit = step_limit(lambda x: Once.apply(x @ w.T), x, matrix_free=True)
    dense = step_limit(w)
    assert limit.converged.all()
    assert float(limit.step) == pytest.approx(dense.step, rel=1e-6)
    assert float(limit.condition) == pytest.approx(dense.condition, rel=1e-2)
    assert float(limit.logarithmic_norm) == pytest.approx(dense.logarithmic_norm, rel=1e-2)


def test_differences_stand_in_for_forward_products():
    x = state(2, 6).float()
    w = state(6, 6).float()
    products = JacobianProducts(lambda x: Once.apply(x @ w.T), x)
    want = (1 - torch.tanh(x @ w.T) ** 2) * (1e-3 * x @ w.T)
    torch.testing.assert_close(products.jvp(1e-3 * x), want, rtol=1e-3, atol=1e-7)
    assert not products.jvp(torch.zeros_like(x)).any()


def test_train_mode_batch_norm_is_refused():
    field = ConvField(4)
    with pytest.raises(ValueError, match=r"\.eval\(\)"):
        step_limit(field, state(2, 4, 6, 6).float(), matrix_free=True)


def test_in_place_relu():
    """First it changes the state and is refused; later it is as good as any."""
    first = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 2, 3, padding=1))
    with pytest.raises(ValueError, match="inplace=False"):
        step_limit(first, state(1, 2, 6, 6).float(), matrix_free=True)
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)]
    x = state(1, 2, 6, 6).float()
    plain = max_stable_step(nn.Sequential(*layers), x, solver="rk4", matrix_free=True)
    layers[1] = nn.ReLU(inplace=True)
    assert max_stable_step(nn.Sequential(*layers), x, solver="rk4", matrix_free=True) == plain


def test_channels_last():
    x = state(2, 4, 8, 8)
    field = decaying(4, x)
    plain = max_stable_step(field, x, matrix_free=True)
    last = x.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    torch.testing.assert_close(max_stable_step(field, last, matrix_free=True), plain, rtol=1e-9, atol=0)


def test_nearly_defective():
    """A Jordan chain with eigenvalue −1 ± 1e-6: ill-conditioned, found, and said so."""
    n = 300
    j = -torch.diag(torch.linspace(0.1, 0.5, n, dtype=torch.float64))
    j[0, 0], j[1, 1], j[0, 1] = -1 - 1e-6, -1 + 1e-6, 1.0
    limit = step_limit(linear(j), torch.zeros(1, n, dtype=torch.float64), matrix_free=True)
    assert float(limit.step) == pytest.approx(2.0, rel=1e-4) and float(limit.condition) > 1e4


def test_degenerate():
    """−2 I: one vector spans an invariant space, and the search goes on to the end of its budget's need."""

    def field(x):
        return -2 * x

    for n in (1, 2, 300, 5000):
        limit = step_limit(field, torch.ones(2, n), matrix_free=True)
        assert limit.converged.all()
        np.testing.assert_allclose(limit.step, 1.0, rtol=1e-6)
        np.testing.assert_allclose(limit.condition, 1.0, rtol=1e-4)


def test_zero_and_constant_fields():
    for field in (lambda x: 0 * x, torch.ones_like):
        limit = step_limit(field, torch.ones(2, 1500), matrix_free=True)
        assert torch.isinf(limit.step).all() and limit.converged.all()


def test_antisymmetric():
    """Imaginary eigenvalues: 0 for Euler, 2√2/max|λ| for rk4."""
    a = state(300, 300) / 20
    field, x = linear(a - a.T), torch.zeros(1, 300, dtype=torch.float64)
    assert float(max_stable_step(field, x, matrix_free=True)) == 0
    largest = float(torch.linalg.eigvals(a - a.T).abs().max())
    assert float(max_stable_step(field, x, solver="rk4", matrix_free=True)) == pytest.approx(
        math.sqrt(8) / largest, rel=1e-6
    )


def test_tf32_is_off_within_and_as_before_afterwards():
    seen = []

    def field(x):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return -x

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    try:
        JacobianProducts(field, torch.ones(1, 3))
        assert seen == [("highest", False)]
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyError), full_precision():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        j = state(50, 50, dtype=torch.float32) / 10 - torch.eye(50)
        got = max_stable_step(linear(j), torch.zeros(1, 50), solver="rk4", matrix_free=True)
    assert float(got) == pytest.approx(max_stable_step(j, solver="rk4"), rel=1e-4)


# -- bad input -----------------------------------------------------------------------------------


def test_bad_input():
    x = state(2, 4, 6, 6)
    with pytest.raises(ValueError, match="keep the state's shape"):
        step_limit(nn.Conv2d(4, 5, 3, padding=1).double(), x, matrix_free=True)
    with pytest.raises(ValueError, match="random"):
        step_limit(lambda x: x + torch.randn_like(x), x, matrix_free=True)
    with pytest.raises(ValueError, match="at least one entry"):
        step_limit(torch.tanh, x[:0], matrix_free=True)
    with pytest.raises(ValueError, match=r"radau5 is implicit.*Valid: euler"):
        step_limit(torch.tanh, state(2, 4, 8, 8), solver="radau5", matrix_free=True)
    with pytest.raises(ValueError, match="rtol must"):
        step_limit(torch.tanh, x, rtol=2.0)
    with pytest.raises(ValueError, match="budget must"):
        step_limit(torch.tanh, x, budget=0)
    with pytest.raises(ValueError, match="go with a field"):
        step_limit(torch.eye(2), matrix_free=True)
    with pytest.raises(ValueError, match="up to 4096 entries, got 5000"):
        step_limit(torch.tanh, torch.ones(1, 5000), matrix_free=False)


def kinked(x):
    """A field of infinite slope at 10."""
    return torch.where(x > 5, -(x - 10).abs().sqrt(), -x)


def test_what_has_no_limit_is_refused():
    """Infinite slopes, numbers that are none, and dtypes in which every eigenvalue would count as 0."""
    x = torch.ones(3, 300)
    x[1] = 10.0
    with pytest.raises(ValueError, match=r"a Jacobian must be finite: .* sample 1 are not \(1 such"):
        step_limit(kinked, x, matrix_free=True)
    with pytest.raises(ValueError, match=r"floating-point numbers.*complex64"):
        step_limit(lambda x: x * 1j, x)
    with pytest.raises(ValueError, match=r"floating-point numbers.*int32"):
        step_limit(lambda x: x.int(), x)
    for matrix_free_ in (True, False):
        with pytest.raises(ValueError, match=r"Use float32: \.float\(\)"):
            step_limit(torch.neg, x.bfloat16(), matrix_free=matrix_free_)
    with pytest.raises(ValueError, match="Use float32"):
        step_limit(-torch.eye(40, dtype=torch.bfloat16))
    assert step_limit(torch.neg, x[:, :4].bfloat16()).step.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="matrix_free must be"):
        step_limit(torch.neg, x, matrix_free="yes")
    with pytest.raises(ValueError, match="rtol must be"):
        step_limit(torch.neg, x, rtol="tight")


def test_a_contraction_limit_where_no_eigenvalue_converges():
    """A Jordan chain: its eigenvalue −1 is not to be relied on, its singular values are."""
    j = -torch.eye(50, dtype=torch.float64) + torch.diag(torch.full((49,), 0.5, dtype=torch.float64), 1)
    x = torch.zeros(1, 50, dtype=torch.float64)
    limit = step_limit(linear(j), x, solver="rk4", matrix_free=True)
    assert not limit.converged and math.isinf(limit.error)
    assert "limit is not known" in str(limit) and "condition number" in str(limit)
    assert float(limit.contraction_step) == pytest.approx(
        step_limit(j, solver="rk4").contraction_step, rel=1e-3
    )
    with pytest.warns(RuntimeWarning, match="ill-conditioned") as seen:
        max_stable_step(linear(j), x, solver="rk4", matrix_free=True)
    assert seen[0].filename == __file__


def test_no_convergence_within_the_budget():
    """A warning, `converged` False, and an upper bound or the word that there is none yet."""
    x = state(1, 8, 6, 6)
    field = decaying(8, x)
    with pytest.warns(RuntimeWarning, match="no convergence within 10 products in 1 of 1 samples"):
        limit = step_limit(field, x, solver="rk4", matrix_free=True, budget=10)
    assert not limit.converged.any() and "not converged" in str(limit).lower()
    if limit.error.isinf():
        assert "no bound" in str(limit)
    else:
        assert limit.step >= 0.99 * max_stable_step(field, x, solver="rk4")


def test_growing_modes_of_a_large_state_are_a_lower_bound():
    """What Euler would do beside them is said to be a bound, or found from J itself where that is small."""
    field, x = block(8), state(1, 8, 6, 6)
    free, dense = (
        limits(spectrum(field, x, SpectrumOptions(search=True, dense_up_to=0)), "euler"),
        step_limit(field, x),
    )
    assert not free.decaying_converged.any() and 0 < len(free.growing[0]) <= len(dense.growing[0])
    assert (free.decaying_step >= (1 - 1e-6) * dense.decaying_step).all() and "≤" in str(free)
    formed = step_limit(field, x, matrix_free=True)
    assert formed.decaying_converged.all() and formed.complete.all()
    torch.testing.assert_close(formed.decaying_step, dense.decaying_step, rtol=1e-6, atol=0)


# -- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 4])
def test_the_krylov_relation(stride):
    """Ritz values in all of R^n are the eigenvalues; images are J times the basis."""
    j = state(40, 40)
    space = KrylovSchur(lambda v: v @ j.T, state(2, 40, seed=3), 40, stride)
    space.grow(40)
    torch.testing.assert_close(space.images[1], space.basis[1, :40] @ j.T, rtol=1e-9, atol=1e-9)
    found = np.sort_complex(space.ritz(0).values.round(8))
    np.testing.assert_allclose(found, np.sort_complex(np.linalg.eigvals(j.numpy()).round(8)), atol=1e-7)


def test_cutting_a_space_keeps_the_wanted_pairs():
    j = state(60, 60)
    space = KrylovSchur(lambda v: v @ j.T, state(1, 60, seed=3), 60)
    space.grow(50)
    before = space.ritz(0)
    kept = before.values[outermost(before.values)[:6]]
    space.cut(20, lambda row, values: outermost(values))
    after = space.ritz(0).values
    assert len(after) == 20 and all(np.abs(after - value).min() < 1e-9 for value in kept)
    space.grow(10)
    torch.testing.assert_close(space.images[0, :30], space.basis[0, :30] @ j.T, rtol=1e-8, atol=1e-8)


def test_amplification_is_the_stability_function():
    z = np.array([-1.0, 0.5j, -3 + 1j])
    np.testing.assert_allclose(amplification("euler", z), np.abs(1 + z))
    np.testing.assert_allclose(amplification("implicit_euler", z), np.abs(1 / (1 - z)))


def test_the_same_twice():
    """Random starts are fixed, and the caller's random numbers are untouched."""
    field, x = block(4, 1.0), state(1, 4, 8, 8)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert max_stable_step(field, x, matrix_free=True) == max_stable_step(field, x, matrix_free=True)
    assert (torch.get_rng_state() == before).all()
