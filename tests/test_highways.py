"""The gradient through highway layers: along the shortcuts, and along every path."""

import pytest
import torch
from torch import nn

from resode.networks import build
from resode.shortcuts import HighwayShortcut
from theory.measures.highways import highway_gradients

F64 = torch.float64


def constant_gates(size, bias):
    highway = HighwayShortcut(size, bias=bias).double()
    nn.init.zeros_(highway.transform.weight)
    return highway


def quarter_turn(x):
    return torch.stack([-x[:, 1], x[:, 0]], 1)


@pytest.mark.parametrize("bias", [0.0, -2.0, -6.0, 6.0])
def test_constant_gates(bias):
    """(1 − t)^100 along the shortcuts; |1 − t + it|^100 in all, where F turns the plane by 90°."""
    t = 1 / (1 + torch.exp(torch.tensor(-bias, dtype=F64)))
    x, g = torch.randn(2, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = highway_gradients([(quarter_turn, constant_gates(2, bias))] * 100, x, g)
    torch.testing.assert_close(found.gates, t.expand(100, 3, 2), rtol=1e-14, atol=0)
    for left in (100, 1, 0):  # layers behind the state
        torch.testing.assert_close(found.carry[100 - left], (1 - t) ** left * g, rtol=1e-12, atol=0)
        size = ((1 - t) ** 2 + t**2) ** (left / 2) * g.norm(dim=1)
        torch.testing.assert_close(found.total[100 - left].norm(dim=1), size, rtol=1e-12, atol=0)


def test_gates_that_depend_on_the_state():
    torch.manual_seed(0)
    layers = [
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double(), HighwayShortcut(4, bias=-1.0).double())
        for _ in range(6)
    ]
    x, g = torch.randn(2, 3, 4, dtype=F64)
    found = highway_gradients(layers, x, g)
    torch.testing.assert_close(found.carry[0], (1 - found.gates).prod(0) * g, rtol=1e-13, atol=0)
    state = x.clone().requires_grad_()
    y = state
    for field, highway in layers:
        y = highway(y, field(y))
    assert torch.equal(found.total[0], torch.autograd.grad(y, state, g)[0])
    assert torch.equal(found.total[-1], g) and torch.equal(found.carry[-1], g)


def test_convolutional_layers():
    layers = [
        (lambda x, layer=layer: layer.act(layer.bn(layer.conv(x))), layer.highway)
        for layer in build("highway19").double().eval().layer1[3:]
    ]
    x = torch.randn(1, 32, 4, 4, dtype=F64)
    found = highway_gradients(layers, x, torch.ones_like(x))
    torch.testing.assert_close(found.carry[0], (1 - found.gates).prod(0), rtol=1e-13, atol=0)


def test_refusals():
    x = torch.randn(2, 3)

    class Residual(nn.Module):
        def gate(self, x):
            return torch.full_like(x, 0.5)

        def forward(self, x, residual):
            return x + residual

    with pytest.raises(ValueError, match="layer 0 is no highway layer"):
        highway_gradients([(torch.relu, Residual())], x, x)
    with pytest.raises(ValueError, match="at least one pair"):
        highway_gradients([], x, x)
    with pytest.raises(ValueError, match=r"g \(2, 2\)"):
        highway_gradients([(torch.relu, HighwayShortcut(3))], x, x[:, :2])
    with pytest.raises(TypeError, match="floating-point"):
        highway_gradients([(torch.relu, HighwayShortcut(3))], x.long(), x)
