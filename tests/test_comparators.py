"""Maxout, NIN, DSN and FitNet: published counts, the definitions written out by hand, companions, refusals."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from resode.analysis import count
from resode.networks import NETWORKS, DeeplySupervisedNet, Maxout, build
from resode.training.evaluate import load
from resode.training.recipe import make_recipe
from resode.training.run import train
from resode.training.task import ClassificationTask


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def convolutions(*layers):
    """Weights and biases of (kernel, in, out) layers."""
    return sum(k * k * c_in * c_out + c_out for k, c_in, c_out in layers)


NIN = [(5, 3, 192), (1, 192, 160), (1, 160, 96), (5, 96, 192), (1, 192, 192), (1, 192, 192), (3, 192, 192),
       (1, 192, 192), (1, 192, 10)]  # fmt: skip
FITNET = [3, 32, 32, 32, 48, 48, *6 * [80], *6 * [128]]
THIN = [(3, a, 2 * b) for a, b in pairwise(FITNET)]
MAXOUT = [(8, 3, 192), (8, 96, 384), (5, 192, 384)]


@pytest.mark.parametrize(
    ("name", "options", "by_hand", "published"),
    [
        ("nin", {}, convolutions(*NIN), None),
        ("dsn", {}, convolutions(*NIN) + 192 * (32**2 + 16**2 + 8**2) * 10 + 30, None),
        ("maxout", {}, convolutions(*MAXOUT, (1, 192 * 25, 5 * 500), (1, 500, 10)), None),
        # the teacher's 9 M and the FitNet's 2.5 M are those of two pieces
        ("maxout", {"hidden_pieces": 2}, convolutions(*MAXOUT, (1, 192 * 25, 1000), (1, 500, 10)), "9"),
        ("fitnet19", {}, convolutions(*THIN, (1, 128, 1000), (1, 500, 10)), "2.5"),
        ("fitnet19", {"hidden_pieces": 5}, convolutions(*THIN, (1, 128, 2500), (1, 500, 10)), None),
        ("highway19", {}, None, "2.3"),
    ],
)
def test_published_parameters(name, options, by_hand, published):
    found = NETWORKS[name].parameter_count(**options)
    assert by_hand is None or found == by_hand
    if published is not None:
        digits = len(published.partition(".")[2])
        assert f"{found / 1e6:.{digits}f}" == published


@pytest.mark.parametrize(
    ("name", "options", "millions"), [("maxout", {"hidden_pieces": 2}, 725), ("fitnet19", {}, 382)]
)
def test_published_multiplications(name, options, millions):
    """By formula and by counting, as the FitNets' table has them."""
    with torch.device("meta"):
        model = build(name, **options)
        cost = model.cost((3, 32, 32))
        assert cost == count(model, torch.zeros(1, 3, 32, 32))
    assert round(cost.macs / 1e6) == millions


def test_layers_are_as_many_as_the_name_says():
    layers = [m for m in build("fitnet19").modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == 19


# The definitions, written out by hand on the network's own weights.


def larger_of_two(x, w, name, padding):
    y = F.conv2d(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"], padding=padding)
    return torch.maximum(y[:, 0::2], y[:, 1::2])


def maxout_layer(x, w, pieces):
    y = F.linear(x, w["hidden.0.weight"], w["hidden.0.bias"]).reshape(len(x), 500, pieces)
    return F.linear(y.max(2).values, w["linear.weight"], w["linear.bias"])


def pooled(x, size):
    """Windows of stride 2 that begin inside; beyond the border there is nothing."""
    n = -(-(x.shape[-1] - size) // 2) + 1
    rows = [x[:, :, 2 * i : 2 * i + size].amax(2) for i in range(n)]
    rows = torch.stack(rows, 2)
    return torch.stack([rows[..., 2 * j : 2 * j + size].amax(-1) for j in range(n)], -1)


@pytest.mark.parametrize("size", [32, 9])
def test_maxout_by_hand(size):
    model = build("maxout", image_size=size).eval()
    x, w = torch.randn(2, 3, size, size), model.state_dict()
    y = pooled(larger_of_two(x, w, "layers.0.0", 4), 4)
    y = pooled(larger_of_two(y, w, "layers.1.0", 3), 4)
    y = pooled(larger_of_two(y, w, "layers.2.0", 3), 2)
    if size == 32:
        assert y.shape[2:] == (5, 5)  # 33, 16, 15, 7, 9, 5 pixels
    assert torch.allclose(model(x), maxout_layer(y.flatten(1), w, 5), atol=1e-4)


def test_fitnet_by_hand():
    model = build("fitnet19").eval()
    x, w = torch.randn(2, 3, 32, 32), model.state_dict()
    y = x
    for layer, layers in (("layer1", 5), ("layer2", 6), ("layer3", 6)):
        for i in range(layers):
            y = larger_of_two(y, w, f"{layer}.{i}", 1)
        y = F.max_pool2d(y, 8 if layer == "layer3" else 2)
    assert y.shape == (2, 128, 1, 1)
    assert torch.allclose(model(x), maxout_layer(y.flatten(1), w, 2), atol=1e-4)


@pytest.mark.parametrize("name", ["nin", "dsn"])
def test_network_in_network_by_hand(name):
    model = build(name).eval()
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.kernel_size[0], c.in_channels, c.out_channels) for c in convs] == NIN
    y = x = torch.randn(2, 3, 32, 32)
    for i, conv in enumerate(convs):
        y = F.conv2d(y, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2)
        y = y if name == "dsn" and i == 8 else y.relu()
        y = pooled(y, 3) if i in (2, 5) else y
    assert y.shape[2:] == (8, 8)
    assert torch.allclose(model(x), y.mean((2, 3)), atol=1e-4)


def test_the_state_keeps_its_second_moment():
    """The larger of two normals has the second moment of one: E(max² + min²) = 2, and the two are alike."""
    model = build("fitnet19")
    x = torch.randn(8, 3, 32, 32)
    growth = model.layer1(x).square().mean() / x.square().mean()
    assert growth.item() == pytest.approx(1, rel=0.4)  # 5 layers; with He's variance 32 times as much


def test_maxout_units_are_maxima():
    x = torch.randn(4, 6, 3)
    y = Maxout(3)(x)
    assert y.shape == (4, 2, 3)
    for c in range(2):
        assert torch.equal(y[:, c], torch.stack([x[:, 3 * c + k] for k in range(3)]).max(0).values)


# Companions.


def by_hand(scores, labels):
    """The squared hinge of one class against the rest, sample by sample."""
    total = 0.0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        for k, s in enumerate(row):
            total += max(0.0, 1 - (s if k == label else -s)) ** 2
    return total / len(labels)


def test_companion_loss_by_hand():
    """α (1 − t) Σ [ℓ − γ]₊, the companions reading the first layers before their ReLU."""
    model = build("dsn", image_size=8, dropout=0.0, companion_weight=0.3, companion_threshold=2.0)
    x, labels = torch.randn(4, 3, 8, 8), torch.tensor([1, 0, 7, 7])
    logits, loss = model.with_companion_loss(x, labels, 0.25)
    assert torch.equal(logits, model(x))
    y, losses = x, []
    for group, companion in zip(model.layers, model.companions, strict=True):
        first = group[0](y).flatten(1)
        scores = F.linear(first / first.shape[1] ** 0.5, companion.weight, companion.bias)
        losses.append(by_hand(scores, labels))
        y = group(y)
    assert max(losses) > 2.0
    assert loss.item() == pytest.approx(0.3 * 0.75 * sum(max(0.0, v - 2.0) for v in losses), rel=1e-5)
    assert model.with_companion_loss(x, labels, 1.0)[1] == 0.0
    content = build("dsn", image_size=8, companion_threshold=1e6)
    assert content.with_companion_loss(x, labels, 0.0)[1] == 0.0


def test_an_update_adds_the_companions_to_the_loss():
    """The gradient of `resode train` at a quarter of the run is that of cross entropy + 3/4 α Σ ℓ."""
    model = build("dsn", image_size=8, dropout=0.0)
    task = ClassificationTask(model, make_recipe("smoke", updates=8, label_smoothing=0.0), 8)
    x, labels = torch.randn(4, 3, 8, 8), torch.tensor([1, 0, 7, 7])
    task.set_learning_rate(task.configure_optimizers(), 2)
    found = task.training_step((x, labels))["loss"]
    extra = model.with_companion_loss(x, labels, 0.25)[1]
    assert found.item() == pytest.approx((F.cross_entropy(model(x), labels) + extra).item(), rel=1e-6)
    found.backward()
    assert all(c.weight.grad.abs().max() > 0 for c in model.companions)


def test_evaluation_takes_the_logits_alone():
    model = build("dsn", image_size=8).eval()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    for companion in model.companions:
        torch.nn.init.constant_(companion.weight, math.nan)
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match=r"in evaluation mode: call train\(\)"):
        model.with_companion_loss(x, torch.tensor([0, 1]), 0.0)


@pytest.mark.parametrize("name", ["maxout", "nin", "dsn", "fitnet19"])
def test_the_same_command_trains_them(name, tmp_path):
    """On the digits, whose 8×8 pixels and ten classes it tells them; they load again."""
    run = train(
        name, "digits", "smoke", updates=2, batch_size=16, lr=0.01, run_dir=tmp_path / "run", progress=False
    )
    assert math.isfinite(run.summary["test_loss"])
    if name == "dsn":
        assert isinstance(run.network, DeeplySupervisedNet) and run.network.image_size == 8
    again = load(tmp_path / "run")
    x = torch.randn(2, 1, 8, 8)
    assert torch.allclose(again(x), run.network.eval()(x), atol=1e-5)


# Bad input.


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("maxout", {"image_size": 7}, r"MaxoutNet pools its images away below 8×8 pixels: got image_size=7"),
        ("dsn", {"image_size": 3}, r"DeeplySupervisedNet pools its images away below 4×4"),
        ("maxout", {"num_classes": 0}, "num_classes must be"),
        ("nin", {"num_classes": 2.5}, "num_classes must be"),
        ("maxout", {"hidden_pieces": 1}, "pieces must be"),
        ("fitnet19", {"hidden_pieces": "5"}, "pieces must be"),
        ("fitnet19", {"hints": "teacher"}, "fitnet19 has no option 'hints'"),
        ("nin", {"image_size": 32}, "nin has no option 'image_size'"),
        ("nin", {"norm": "bach"}, "Did you mean batch"),
        ("maxout", {"input_dropout": 1.0}, "input_dropout must be"),
        ("dsn", {"companion_weight": -1.0}, "companion_weight must be"),
        ("dsn", {"companion_threshold": math.nan}, "companion_threshold must be"),
        ("dsn", {"gradient": "adjoint"}, "autograd, checkpoint"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize("name", ["maxout", "dsn"])
def test_images_of_another_size_are_refused(name):
    model = build(name)
    with pytest.raises(ValueError, match=r"images of 32×32 pixels: got \(2, 3, 28, 28\).*image_size="):
        model(torch.zeros(2, 3, 28, 28))


def test_the_smallest_images():
    assert build("maxout", image_size=8)(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    assert build("dsn", image_size=4)(torch.zeros(2, 3, 4, 4)).shape == (2, 10)
    assert build("nin")(torch.zeros(2, 3, 4, 4)).shape == (2, 10)
    assert build("fitnet19")(torch.zeros(2, 3, 1, 1)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"4×4 pixels or more: got \(2, 3, 3, 8\)"):
        build("nin")(torch.zeros(2, 3, 3, 8))
