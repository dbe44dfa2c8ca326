"""What blocks and chains of blocks do to the length of a gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from theory.measures.gains import block_gains, gradient_norms

F64 = torch.float64


def linear(matrix):
    return lambda x: x @ matrix.T


def test_gains_of_known_matrices():
    """diag(0.5, −0.25) at η = 2: I + ηJ = diag(2, 0.5); a rotation by 90° stretches everything by √2."""
    x = torch.ones(1, 2, dtype=F64)
    gains = block_gains(linear(torch.diag(torch.tensor([0.5, -0.25], dtype=F64))), x, step_size=2.0)
    assert gains.singular_values.tolist() == [[2.0, 0.5]]
    assert sorted(gains.eigenvalues.real[0].tolist()) == [0.5, 2.0] and not gains.eigenvalues.imag.any()
    assert gains.norm.tolist() == gains.radius.tolist() == [1.0]
    assert gains.lower.tolist() == [0.0] and gains.upper.tolist() == [2.0]
    turned = block_gains(linear(torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)), x)
    assert turned.singular_values[0].tolist() == pytest.approx([2**0.5, 2**0.5], rel=1e-15)
    assert sorted(turned.eigenvalues.imag[0].tolist()) == pytest.approx([-1.0, 1.0])


def test_the_radius_of_a_nilpotent_matrix_bounds_nothing():
    """[[1, a], [0, 1]] has the singular values √(1 + a²/4) ± a/2, its W the radius 0."""
    gains = block_gains(
        linear(torch.tensor([[0.0, 10.0], [0.0, 0.0]], dtype=F64)), torch.ones(1, 2, dtype=F64)
    )
    assert gains.radius.tolist() == [0.0] and gains.norm.tolist() == pytest.approx([10.0])
    assert gains.singular_values[0].tolist() == pytest.approx([26**0.5 + 5, 26**0.5 - 5], rel=1e-12)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(n=st.integers(1, 12), size=st.floats(0.01, 3), seed=st.integers(0, 1000), eta=st.floats(-2, 2))
def test_singular_values_lie_within_the_norm_of_one(n, size, seed, eta):
    """Weyl's inequality, for any matrix and any step."""
    matrix = size * torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    gains = block_gains(linear(matrix), torch.ones(2, n, dtype=F64), step_size=eta)
    assert gains.singular_values.shape == (2, n)
    assert float((gains.singular_values - 1).abs().max()) <= float(gains.norm[0]) + 1e-12
    assert float(gains.radius[0]) <= float(gains.norm[0]) + 1e-12


def test_gradient_norms_are_products_of_transposed_jacobians():
    torch.manual_seed(0)
    matrices = [torch.randn(4, 3, dtype=F64), torch.randn(2, 4, dtype=F64)]
    x, g = torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
    found = gradient_norms([linear(m) for m in matrices], x, g)
    middle = g @ matrices[1]
    expected = torch.stack([(middle @ matrices[0]).norm(dim=1), middle.norm(dim=1), g.norm(dim=1)])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_gradient_norms_through_modules_and_constants():
    """Behind a constant nothing arrives; modules' parameters do not get in the way."""
    x = torch.randn(2, 3)
    found = gradient_norms([nn.Linear(3, 3), lambda x: torch.ones(2, 3), nn.Linear(3, 3)], x, x)
    assert not found[:2].any() and bool((found[2:] > 0).all())
    assert not gradient_norms([lambda x: torch.ones(2, 3)], x, x)[0].any()


def test_gradient_norms_refuse_what_does_not_fit():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="at least one block"):
        gradient_norms([], x, x)
    with pytest.raises(ValueError, match=r"x_L \(2, 3\), g \(2, 2\)"):
        gradient_norms([torch.relu], x, x[:, :2])
    with pytest.raises(TypeError, match="floating-point"):
        gradient_norms([torch.relu], torch.ones(2, 3, dtype=torch.int64), x)
