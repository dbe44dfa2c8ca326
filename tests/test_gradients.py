"""A block's gradient in its two parts, and shortcuts as matrices."""

import copy
import math

import pytest
import torch
from torch import nn

from resode import ResidualStack, odeint
from resode.analysis import gradient_parts, shortcut_matrix
from resode.fields import BottleneckField, ConvField, MLPField
from resode.networks import build
from resode.shortcuts import GatedShortcut, InputGatedShortcut, PadShortcut, ProjectionShortcut

F64 = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def autograd(block, x, g):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(block(x), x, g)[0]


def test_the_parts_of_a_rectified_layer_are_those_of_its_jacobian():
    """F = relu(Wx + b): the identity part is g itself, the residual one (g ⊙ 1[Wx + b > 0]) W."""
    layer = nn.Linear(6, 6).double()
    x, g = torch.randn(2, 5, 6, dtype=F64)
    parts = gradient_parts(nn.Sequential(layer, nn.ReLU()), x, g, step_size=0.5)
    assert torch.equal(parts.identity, g)
    expected = 0.5 * (g * (layer(x) > 0)) @ layer.weight
    torch.testing.assert_close(parts.residual, expected.detach(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "field",
    [MLPField(8), ConvField(8), ConvField(8, norm="none"), BottleneckField(8)],
    ids=["dense", "batch norm", "conv", "bottleneck"],
)
def test_the_parts_sum_to_autograds_gradient(field, training):
    field = copy.deepcopy(field).double().train(training)
    shape = (4, 8) if isinstance(field, MLPField) else (4, 8, 5, 5)
    x, g = torch.randn(2, *shape, dtype=F64)
    state = copy.deepcopy(field.state_dict())
    parts = gradient_parts(field, x, g, step_size=0.7)
    for name, value in field.state_dict().items():  # running statistics have not moved
        assert torch.equal(value, state[name]), name
    whole = autograd(ResidualStack([field], step_size=0.7), x, g)
    torch.testing.assert_close(parts.total, whole, rtol=0, atol=1e-13)
    assert float(parts.residual.abs().max()) > 1e-2


def test_with_every_unit_off_the_gradient_is_g_to_the_bit():
    layer = nn.Linear(6, 6)
    nn.init.constant_(layer.bias, -100.0)
    field = nn.Sequential(layer, nn.ReLU())
    x, g = torch.randn(2, 5, 6)
    parts = gradient_parts(field, x, g)
    assert torch.equal(parts.total, g) and not parts.residual.any()
    assert torch.equal(autograd(ResidualStack([field]), x, g), g)


def test_a_shortcut_that_changes_the_shape():
    block = build("preact20", shortcut="B").layer2[0].double().eval()
    x = torch.randn(2, 16, 6, 6, dtype=F64)
    g = torch.randn_like(block(x))
    parts = gradient_parts(lambda x: block.branches(x)[1], x, g, shortcut=lambda x: block.branches(x)[0])
    torch.testing.assert_close(parts.total, autograd(block, x, g), rtol=0, atol=1e-13)


def test_what_does_not_depend_on_x_has_no_gradient():
    x = torch.randn(2, 3)
    assert not gradient_parts(lambda x: torch.ones(2, 3), x, x).residual.any()
    assert not gradient_parts(lambda x: torch.ones(2, 3, requires_grad=True) * 1, x, x).residual.any()


def test_gradient_parts_refuse_what_does_not_fit():
    x = torch.randn(2, 3)
    with pytest.raises(TypeError, match="floating-point"):
        gradient_parts(torch.relu, torch.ones(2, 3, dtype=torch.int64), x)
    with pytest.raises(ValueError, match=r"x \(2, 3\), g \(3,\)"):
        gradient_parts(torch.relu, x, x[0])
    with pytest.raises(ValueError, match=r"F\(x\) \(2, 2\), g \(2, 3\)"):
        gradient_parts(lambda x: x[:, :2], x, x)
    with pytest.raises(ValueError, match=r"S\(x\) \(2, 2\), g \(2, 3\)"):
        gradient_parts(torch.relu, x, x, shortcut=lambda x: x[:, :2])


def test_the_matrix_of_option_a():
    """Every second pixel of 3 × 3 is four of nine; two channels become four, one of zeros on either side."""
    matrix = shortcut_matrix(PadShortcut(2, 4, 2), torch.randn(1, 2, 3, 3))
    assert matrix.shape == (16, 18)
    ones = {(4 * (c + 1) + 2 * i + j, 9 * c + 6 * i + 2 * j) for c in (0, 1) for i in (0, 1) for j in (0, 1)}
    assert {tuple(place) for place in matrix.nonzero().tolist()} == ones
    assert matrix.sum() == len(ones)


def test_the_matrices_of_linear_shortcuts():
    assert torch.equal(shortcut_matrix(nn.Identity(), torch.ones(1, 3)), torch.eye(3))
    assert torch.equal(shortcut_matrix(GatedShortcut(0.5), torch.ones(1, 3)), 0.5 * torch.eye(3))
    projection = ProjectionShortcut(2, 3)
    matrix = shortcut_matrix(projection, torch.randn(1, 2, 1, 1))
    torch.testing.assert_close(matrix, projection[0].weight.detach().flatten(1))


def test_a_constant_is_left_out():
    layer = nn.Linear(3, 2).double()
    torch.testing.assert_close(shortcut_matrix(layer, torch.ones(1, 3, dtype=F64)), layer.weight.detach())


def test_a_gate_that_depends_on_x_has_no_matrix():
    gated = InputGatedShortcut(3)
    nn.init.ones_(gated.score.weight)
    with pytest.raises(ValueError, match=r"only where it is linear"):
        shortcut_matrix(gated, torch.ones(1, 3))
    with pytest.raises(ValueError, match="batch"):
        shortcut_matrix(gated, torch.ones(3))
    with pytest.raises(TypeError, match="floating-point"):
        shortcut_matrix(gated, torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "rk4"])
def test_second_derivatives_in_the_times(method, per_sample):
    """y' = −t y is y(T) = exp((s² − T²)/2): ∂²/∂T² = (T² − 1) y, ∂²/∂s² = (s² + 1) y and ∂²/∂s∂T = −s T y."""
    how = dict(n_steps=100) if method == "rk4" else dict(rtol=1e-8, atol=1e-10)
    y0 = torch.ones(2, 1, dtype=torch.float64)

    def end(times):
        t = times[:, None].expand(2, 2) if per_sample else times
        return odeint(lambda t, y: -t * y, y0, t, method=method, per_sample=per_sample, **how)[-1].mean()

    s, e = 0.5, 1.2
    y = math.exp((s**2 - e**2) / 2)
    right = y * torch.tensor([[s**2 + 1, -s * e], [-s * e, e**2 - 1]], dtype=torch.float64)
    times = torch.tensor([s, e], dtype=torch.float64)
    twice = torch.func.jacrev(torch.func.jacrev(end))
    for hessian in (twice(times), torch.autograd.functional.hessian(end, times)):
        assert torch.allclose(hessian, right, rtol=0, atol=1e-6)
