"""Shortcuts: exact values, the gradient Sᵀg, shapes at odd sizes, and what they refuse."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resode.shortcuts import (
    SHORTCUTS,
    GatedShortcut,
    HighwayShortcut,
    InputGatedShortcut,
    PadShortcut,
    ProjectionShortcut,
    make_shortcut,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_option_a_is_every_second_pixel_and_zeros():
    x = torch.randn(2, 16, 8, 8)
    around, behind = PadShortcut(16, 32, 2)(x), PadShortcut(16, 32, 2, zeros="behind")(x)
    assert torch.equal(around[:, 8:24], x[:, :, ::2, ::2])
    assert torch.count_nonzero(around[:, :8]) == torch.count_nonzero(around[:, 24:]) == 0
    assert torch.equal(behind[:, :16], x[:, :, ::2, ::2])
    assert torch.count_nonzero(behind[:, 16:]) == 0
    assert around.shape == behind.shape == (2, 32, 4, 4)
    assert not list(PadShortcut(16, 32, 2).parameters())


def test_option_a_takes_channels_that_do_not_double():
    """16 to 21: two channels of zeros before, three behind."""
    x = torch.rand(1, 16, 3, 3) + 1
    assert (PadShortcut(16, 21)(x).amax((0, 2, 3)) > 0).tolist() == [False] * 2 + [True] * 16 + [False] * 3


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    kind=st.sampled_from(SHORTCUTS),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    stride=st.integers(1, 3),
    channels=st.integers(1, 6),
    more=st.integers(0, 6),
)
def test_shape_is_that_of_the_padded_convolution(kind, height, width, stride, channels, more):
    """Both branches of a block must meet at every size: a 3×3 convolution of padding 1 is the other."""
    x = torch.randn(2, channels, height, width)
    residual = nn.Conv2d(channels, channels + more, 3, stride, padding=1)(x)
    assert make_shortcut(kind, channels, channels + more, stride)(x).shape == residual.shape


def matrix(shortcut, shape):
    """S as a dense matrix, column by column from the unit states."""
    units = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return shortcut(units).reshape(len(units), -1).T.detach()


@pytest.mark.parametrize(
    "shortcut",
    [
        nn.Identity(),
        PadShortcut(3, 6, 2),
        PadShortcut(3, 7, 2, zeros="behind"),
        ProjectionShortcut(3, 6, 2),
        ProjectionShortcut(3, 4, 2, average_pool=True),
        GatedShortcut(0.7),
    ],
    ids=["identity", "A around", "A behind", "B", "D", "gated"],
)
def test_gradient_through_a_shortcut_is_its_transpose(shortcut):
    shortcut = copy.deepcopy(shortcut).double()
    S = matrix(shortcut, (3, 5, 4))
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    y = shortcut(x)
    assert torch.allclose(y.flatten(), S @ x.detach().flatten(), atol=1e-13)
    g = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, g)
    assert torch.allclose(gradient.flatten(), S.T @ g.flatten(), atol=1e-13)


def test_projection_is_the_strided_product():
    shortcut = ProjectionShortcut(3, 5, 2)
    x = torch.randn(2, 3, 5, 5)
    expected = torch.einsum("oc,bchw->bohw", shortcut[0].weight[:, :, 0, 0], x[:, :, ::2, ::2])
    assert torch.allclose(shortcut(x), expected, atol=1e-6)
    assert [name for name, _ in shortcut.named_parameters()] == ["0.weight"]
    normed = ProjectionShortcut(3, 5, 2, norm=nn.BatchNorm2d)
    assert [name for name, _ in normed.named_parameters()] == ["0.weight", "1.weight", "1.bias"]


def test_option_d_averages_the_pixels_that_exist():
    shortcut = ProjectionShortcut(1, 1, 2, average_pool=True)
    nn.init.ones_(shortcut[1].weight)
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert shortcut(x).flatten().tolist() == [2.0, 3.5, 6.5, 8.0]


def test_kinds():
    kept = {kind: type(make_shortcut(kind, 4, 4)) for kind in SHORTCUTS}
    changed = {kind: type(make_shortcut(kind, 4, 8, 2)) for kind in SHORTCUTS}
    assert kept == {
        "A": nn.Identity,
        "B": nn.Identity,
        "C": ProjectionShortcut,
        "D": nn.Identity,
        "gated": GatedShortcut,
        "input_gated": InputGatedShortcut,
    }
    assert changed == {
        "A": PadShortcut,
        "B": ProjectionShortcut,
        "C": ProjectionShortcut,
        "D": ProjectionShortcut,
        "gated": PadShortcut,
        "input_gated": PadShortcut,
    }
    assert type(make_shortcut("B", 4, 4, 2)) is ProjectionShortcut
    assert isinstance(make_shortcut("D", 4, 8, 2)[0], nn.AvgPool2d)


def test_alpha_is_learnt():
    """dL/dα = g·x."""
    shortcut = GatedShortcut(0.5)
    x, g = torch.randn(2, 3), torch.randn(2, 3)
    shortcut(x).backward(g)
    assert shortcut.alpha.grad.item() == pytest.approx((g * x).sum().item(), abs=1e-6)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 5)])
def test_input_gate_is_one_number_a_sample(shape):
    shortcut = InputGatedShortcut(3, alpha=0.8)
    x = torch.randn(shape)
    assert torch.allclose(shortcut(x), 0.8 * x)
    nn.init.normal_(shortcut.score.weight)
    mean = x if x.ndim == 2 else x.mean((2, 3))
    gate = torch.sigmoid(mean @ shortcut.score.weight[0] + shortcut.score.bias)  # (4,)
    assert torch.allclose(shortcut(x), gate.reshape(-1, *[1] * (x.ndim - 1)) * x, atol=1e-6)
    assert torch.allclose(shortcut(x[1:2]), shortcut(x)[1:2], atol=1e-6)


@pytest.mark.parametrize("bias", [-6.0, -2.0, 0.0])
def test_gradient_through_highway_shortcuts_is_the_product_of_one_minus_t(bias):
    """With constant gates and F held fixed, (1 − sigmoid(b))^L."""
    layers = [HighwayShortcut(4, bias=bias).double() for _ in range(100)]
    x = state = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    for layer in layers:
        nn.init.zeros_(layer.transform.weight)
        state = layer(state, torch.zeros_like(state))
    (gradient,) = torch.autograd.grad(state.sum(), x)
    expected = (1 - 1 / (1 + math.exp(-bias))) ** 100
    assert torch.allclose(gradient, torch.full_like(gradient, expected), rtol=1e-10)


@pytest.mark.parametrize(("options", "shape"), [({}, (2, 4)), ({"kernel_size": 3}, (2, 4, 5, 5))])
def test_highway_mixes_by_its_gate(options, shape):
    highway = HighwayShortcut(4, **options)
    x, f = torch.randn(shape), torch.randn(shape)
    t = torch.sigmoid(highway.transform(x))
    assert t.shape == x.shape
    assert torch.allclose(highway(x, f), x + t * (f - x), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PadShortcut(32, 16), "32 in, 16 out. Use a projection"),
        (lambda: make_shortcut("A", 32, 16, 2), "cannot drop channels"),
        (lambda: PadShortcut(4, 8, zeros="before"), "one of around, behind"),
        (lambda: PadShortcut(4, 8, 0), "stride must be"),
        (lambda: ProjectionShortcut(0, 8), "in_channels must be"),
        (lambda: make_shortcut("E", 4, 8), "A, B, C, D, gated, input_gated; got 'E'"),
        (lambda: make_shortcut("gatd", 4, 8), "Did you mean gated"),
        (lambda: GatedShortcut(math.inf), "finite"),
        (lambda: InputGatedShortcut(3, alpha=1.0), "above 0 and below 1"),
        (lambda: HighwayShortcut(3, kernel_size=2), "odd"),
        (lambda: PadShortcut(4, 8)(torch.zeros(2, 3, 4, 4)), r"\(batch, 4, .*got x \(2, 3, 4, 4\)"),
        (lambda: ProjectionShortcut(4, 8)(torch.zeros(2, 3, 4, 4)), r"got x \(2, 3, 4, 4\)"),
        (lambda: InputGatedShortcut(4)(torch.zeros(2, 3)), r"got x \(2, 3\)"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", SHORTCUTS)
def test_copies_and_memory_formats_give_the_same(kind):
    shortcut = make_shortcut(kind, 4, 8, 2, norm=nn.BatchNorm2d).eval()
    x = torch.randn(2, 4, 5, 5)
    expected = shortcut(x)
    assert torch.equal(pickle.loads(pickle.dumps(shortcut))(x), expected)
    assert torch.allclose(shortcut(x.to(memory_format=torch.channels_last)), expected, atol=1e-6)
