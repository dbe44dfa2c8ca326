"""Networks: published counts and names, the papers' formulas, the ODE-ResNet's identity, and refusals."""

import copy
import dataclasses
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resode.blocks import ResidualStack
from resode.fields import MLPField
from resode.networks import (
    FAMILIES,
    NETWORKS,
    CifarResNet,
    ImageNetPreActResNet,
    ImageNetResNet,
    PlainMLP,
    ResidualMLP,
    StochasticDepth,
    Style,
    available,
    build,
    preact_names,
)
from resode.networks.common import IMAGENET
from resode.networks.resnet import BasicBlock, PlainBlock, PreActBlock

EVERY_KIND = [
    "resnet8",
    "preact8",
    "plain8",
    "odenet14",
    "wide_resnet10_2",
    "highway19",
    "maxout",
    "nin",
    "dsn",
    "fitnet19",
    "resnet18",
    "plain18",
    "residual_mlp3",
    "plain_mlp3",
]
"""One small network of every kind."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(name, **options):
    """The network for 8×8 images of one channel; those for ImageNet thinner than they are."""
    if "image_size" in NETWORKS[name].options:
        options["image_size"] = 8
    if name in ("resnet18", "plain18", "resnet50"):
        options["width"] = 16
    return build(name, in_channels=1, **options)


def randomize_norms(model):
    """Norms other than the identity that they start as, so that a misplaced one shows."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for p, low, high in ((m.weight, 0.5, 1.5), (m.bias, -0.5, 0.5)):
                nn.init.uniform_(p, low, high)
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 1.5)
    return model


# Published numbers of parameters.


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("resnet20", {}, 269_722),
        ("resnet32", {}, 464_154),
        ("resnet44", {}, 658_586),
        ("resnet56", {}, 853_018),
        ("resnet110", {}, 1_727_962),
        ("resnet1202", {}, 19_421_274),
        ("resnet20", {"shortcut": "B"}, 272_474),
        ("preact164", {}, 1_703_258),
        ("preact1001", {}, 10_327_706),
        ("wide_resnet28_10", {}, 36_479_194),
        ("resnet18", {}, 11_689_512),
        ("resnet34", {}, 21_797_672),
        ("resnet50", {}, 25_557_032),
        ("resnet101", {}, 44_549_160),
        ("resnet152", {}, 60_192_808),
        ("wide_resnet50_2", {}, 68_883_240),
        ("wide_resnet101_2", {}, 126_886_696),
        ("resnext50_32x4d", {}, 25_028_904),
        ("resnext101_32x8d", {}, 88_791_336),
        ("resnext101_64x4d", {}, 83_455_272),
    ],
)
def test_published_parameter_counts(name, options, count):
    assert NETWORKS[name].parameter_count(**options) == count


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet18d", 11.71), ("resnet26d", 16.01), ("resnet34d", 21.82), ("resnet50d", 25.58),
        ("resnet101d", 44.57), ("resnet152d", 60.21), ("resnet200d", 64.69), ("seresnet18", 11.78),
        ("seresnet34", 21.96), ("seresnet50", 28.09), ("seresnet101", 49.33), ("seresnet152", 66.82),
        ("resnetv2_50", 25.55), ("resnetv2_101", 44.54), ("resnetv2_50d", 25.57),
    ],
)  # fmt: skip
def test_timms_published_counts_to_two_decimals(name, millions):
    """As in timm's table of results."""
    assert round(NETWORKS[name].parameter_count() / 1e6, 2) == millions


def test_resnet26_says_which_network_it_is():
    """12 blocks of a CIFAR network here, 8 bottlenecks of an ImageNet network in timm."""
    with pytest.warns(
        UserWarning, match=r"resnet26 is the network for small images .*ImageNetResNet\(26\)"
    ) as seen:
        with torch.device("meta"):
            assert isinstance(build("resnet26"), CifarResNet)
    assert seen[0].filename == __file__
    with torch.device("meta"):
        assert sum(p.numel() for p in ImageNetResNet(26).parameters()) == 15_995_176  # timm: 16.00 M


def test_grouped_and_wide_bottlenecks_have_the_published_channels():
    with torch.device("meta"):
        grouped, wide = build("resnext50_32x4d").layer2[0].conv2, build("wide_resnet50_2").layer2[0].conv2
    assert (grouped.in_channels, grouped.groups) == (256, 32) and (wide.in_channels, wide.groups) == (256, 1)
    with pytest.raises(ValueError, match="networks of 18 and 34 layers have none: got 2 and 64"):
        build("resnet18", cardinality=2)
    with pytest.raises(ValueError, match=r"a pre-activation network .* cannot do without"):
        build("resnetv2_18", shortcut="none")
    with pytest.raises(ValueError, match=r"18, 26, 34, 50, 101, 152, 200 layers: got 20"):
        ImageNetResNet(20)


@pytest.mark.parametrize(
    "name", ["resnet18d", "resnetv2_18", "resnetv2_26d", "seresnet18", "resnext50_32x4d"]
)
def test_cost_of_imagenet_variants_is_what_a_run_counts(name):
    from resode.analysis import count

    if name == "resnetv2_26d":
        model = ImageNetPreActResNet(26, style=dataclasses.replace(IMAGENET, stem="deep", shortcut="D"))
    else:
        model = build(name)
    counted, formula = count(model.eval(), torch.zeros(1, 3, 65, 65)), model.cost((3, 65, 65))
    assert (counted.parameters, counted.macs) == (formula.parameters, formula.macs)


def test_other_counts_follow_from_the_published_ones():
    for depth in (20, 110):
        plain, residual = (NETWORKS[f"{kind}{depth}"].parameter_count() for kind in ("plain", "resnet"))
        assert plain == residual  # option A is free
    # without the three projections: 64·128 + 128·256 + 256·512 weights, and 2 a channel of their norms
    assert NETWORKS["plain18"].parameter_count() == 11_689_512 - (8_192 + 32_768 + 131_072 + 2 * 896)
    # the stem's norm of 16 channels moves to the end, where it has 64; each transition's first norm
    # reads 16 instead of 32, and 32 instead of 64 channels: 2·(64 − 16) − 2·(16 + 32) = 0
    assert NETWORKS["preact20"].parameter_count() == NETWORKS["odenet20"].parameter_count() == 269_722
    # a linear layer in, 2 a block, one out
    assert NETWORKS["residual_mlp5"].parameter_count() == 3073 * 64 + 10 * 65 * 64 + 65 * 10


def test_highway19_has_19_layers_and_2_3_million_parameters():
    """3×3 layers with two kernels each beyond the first of a group, a 1×1 layer and a linear one."""
    expected = 3 * 32 * 9 + 32 + 32 * 80 * 9 + 80 + 80 * 128 * 9 + 128
    expected += sum(n * 2 * (9 * c * c + c) for n, c in ((4, 32), (5, 80), (5, 128)))
    expected += 128 * 100 + 100 + 100 * 10 + 10
    model = build("highway19")
    assert sum(p.numel() for p in model.parameters()) == expected == 2_256_838
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len([n for n in layers if "highway" not in n]) == 19
    # every gate starts nearly shut, T = sigmoid(−2)
    for name, p in model.named_parameters():
        if name.endswith("transform.bias"):
            assert (p == -2).all()


# Module names under which others publish weights.


def torchvision_names(block_convs, counts, projected_first):
    """The entries of a torchvision ResNet's state dict, from its naming scheme."""

    def norm(name):
        return [
            f"{name}.{x}" for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ]

    names = ["conv1.weight", *norm("bn1"), "fc.weight", "fc.bias"]
    for group, count in enumerate(counts, 1):
        for i in range(count):
            at = f"layer{group}.{i}"
            for conv in range(1, block_convs + 1):
                names += [f"{at}.conv{conv}.weight", *norm(f"{at}.bn{conv}")]
            if i == 0 and (group > 1 or projected_first):
                names += [f"{at}.downsample.0.weight", *norm(f"{at}.downsample.1")]
    return set(names)


def test_imagenet_names_are_torchvisions():
    with torch.device("meta"):
        assert set(build("resnet34").state_dict()) == torchvision_names(2, (3, 4, 6, 3), False)
        assert set(build("resnet50").state_dict()) == torchvision_names(3, (3, 4, 6, 3), True)


def test_cifar_names_are_the_widespread_ones():
    names = torchvision_names(2, (3, 3, 3), False)
    names = {name for name in names if "downsample" not in name and not name.startswith("fc.")}
    assert set(build("resnet20").state_dict()) == names | {"linear.weight", "linear.bias"}


def test_imagenet_stages_halve_and_bottlenecks_stride_in_the_3x3():
    model = build("resnet50", width=8, num_classes=4).eval()
    shapes = []
    for layer in (model.maxpool, model.layer1, model.layer2, model.layer3, model.layer4):
        layer.register_forward_hook(lambda _m, _x, y: shapes.append(tuple(y.shape[1:])))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 4)
    assert shapes == [(8, 16, 16), (32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)]
    block = model.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


# The papers' formulas, written out by hand on the network's own weights.


def bn(x, w, name, training):
    mean, var = w[f"{name}.running_mean"].clone(), w[f"{name}.running_var"].clone()
    return F.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"], training=training)


def conv(x, w, name, stride=1):
    return F.conv2d(x, w[f"{name}.weight"], stride=stride, padding=w[f"{name}.weight"].shape[-1] // 2)


def option_a(x, channels):
    """Every second pixel between channels of zeros."""
    if x.shape[1] == channels:
        return x
    zeros = x.new_zeros(x.shape[0], (channels - x.shape[1]) // 2, *x[0, 0, ::2, ::2].shape)
    return torch.cat((zeros, x[:, :, ::2, ::2], zeros), 1)


def stages(n):
    """(group's name of the block, channels, stride) from the first to the last."""
    for group, channels in enumerate((16, 32, 64), 1):
        for i in range(n):
            yield f"layer{group}.{i}", channels, 2 if group > 1 and i == 0 else 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["resnet20", "plain20"])
def test_post_activation_is_relu_of_the_sum(name, training):
    model = randomize_norms(build(name)).train(training)
    images = torch.randn(2, 3, 32, 32)
    w = copy.deepcopy(model.state_dict())
    x = bn(conv(images, w, "conv1"), w, "bn1", training).relu()
    for at, channels, stride in stages(3):
        f = bn(conv(x, w, f"{at}.conv1", stride), w, f"{at}.bn1", training).relu()
        f = bn(conv(f, w, f"{at}.conv2"), w, f"{at}.bn2", training)
        x = (option_a(x, channels) + f if name == "resnet20" else f).relu()
    logits = x.mean((2, 3)) @ w["linear.weight"].T + w["linear.bias"]
    assert torch.allclose(model(images), logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_pre_activation_is_the_sum_alone(shortcut):
    """A projection reads what the first convolution reads; option A reads x."""
    model = randomize_norms(build("preact20", shortcut=shortcut)).eval()
    images = torch.randn(2, 3, 32, 32)
    w = model.state_dict()
    x = conv(images, w, "conv1")
    for at, channels, stride in stages(3):
        pre = bn(x, w, f"{at}.bn1", False).relu()
        f = conv(pre, w, f"{at}.conv1", stride)
        f = conv(bn(f, w, f"{at}.bn2", False).relu(), w, f"{at}.conv2")
        projects = shortcut == "B" and stride == 2
        x = f + (conv(pre, w, f"{at}.shortcut.0", 2) if projects else option_a(x, channels))
    x = bn(x, w, "bn", False).relu()
    logits = x.mean((2, 3)) @ w["linear.weight"].T + w["linear.bias"]
    assert torch.allclose(model(images), logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())


def test_blocks_show_their_two_branches():
    style = Style(shortcut="B")
    x = torch.randn(2, 4, 6, 6)
    for block_class, after in ((BasicBlock, F.relu), (PreActBlock, lambda y: y)):
        block = block_class(4, 8, 2, style, nn.Identity()).eval()
        shortcut, residual = block.branches(x)
        assert torch.equal(block(x), after(shortcut + residual))
    plain = PlainBlock(4, 4, 1, Style(shortcut="none"), nn.Identity()).eval()
    assert torch.equal(plain(x), plain.residual(x).relu())


# ODE-ResNets.


def paired(depth=20, **options):
    """An ODE-ResNet and the pre-activation ResNet with its weights, and the mapping of names."""
    odenet, preact = build(f"odenet{depth}", **options), build(f"preact{depth}", **options)
    randomize_norms(odenet)
    names = preact_names(odenet)
    preact.load_state_dict({names[name]: value for name, value in odenet.state_dict().items()}, strict=True)
    return odenet, preact, names


@pytest.mark.parametrize("options", [{}, {"shortcut": "B"}, {"norm": "group"}, {"squeeze_excitation": True}])
@pytest.mark.parametrize("training", [True, False])
def test_odenet_with_euler_is_the_pre_activation_resnet_to_the_bit(options, training):
    odenet, preact, names = paired(**options)
    inputs = [torch.randn(4, 3, 16, 16).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    logits = [net.train(training)(x) for net, x in zip((odenet, preact), inputs, strict=True)]
    assert torch.equal(*logits)
    for out in logits:
        F.cross_entropy(out, torch.arange(4)).backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    gradients = {name: p.grad for name, p in preact.named_parameters()}
    assert len(gradients) == len(list(odenet.parameters()))
    for name, p in odenet.named_parameters():
        assert torch.equal(p.grad, gradients[names[name]]), name
    buffers = dict(preact.named_buffers())
    for name, buffer in odenet.named_buffers():
        assert torch.equal(buffer, buffers[names[name]]), name


def test_odenet_with_euler_is_a_hand_written_loop_to_the_bit():
    model = build("odenet20", step_size=0.5, norm="none", activation="tanh", zero_init_last=False)
    images = torch.randn(2, 3, 16, 16)
    x = model.conv1(images)
    for group in (model.layer1, model.layer2, model.layer3):
        for part in group:
            if isinstance(part, ResidualStack):
                for field in part.fields:
                    x = x + 0.5 * field(x)
            else:
                x = part(x)
    assert torch.equal(model(images), model.linear(x.tanh().mean((2, 3))))


def test_odenet_passes_its_options_to_every_stack():
    model = build(
        "odenet20",
        solver="bosh3",
        step_size=0.5,
        rtol=1e-2,
        atol=1e-3,
        per_sample=False,
        gradient="checkpoint",
    )
    assert [stack.depth for stack in model.stacks()] == [3, 2, 2]
    for stack in model.stacks():
        assert (stack.solver, stack.step_size, stack.rtol, stack.atol) == ("bosh3", 0.5, 1e-2, 1e-3)
        assert stack.per_sample is False and stack.gradient == "checkpoint"
    assert [s.substeps for s in build("odenet20", solver="rk4", substeps=2).stacks()] == [2, 2, 2]
    assert [s.depth for s in build("odenet8").stacks()] == [1]


def test_a_solver_swap_keeps_the_weights_and_changes_the_answer():
    model = build("odenet20", norm="group").eval()
    x = torch.randn(2, 3, 16, 16)
    euler, weights = model(x), copy.deepcopy(model.state_dict())
    for stack in model.stacks():
        stack.solver = "rk4"
    assert not torch.allclose(model(x), euler, rtol=1e-3)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert weights.keys() == model.state_dict().keys()


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_under_autocast_the_state_keeps_its_precision(shortcut):
    """Only F runs in bf16, so that an adaptive solver can control its error."""
    model = build("odenet20", solver="dopri5", norm="group", shortcut=shortcut).eval()
    dtypes = []
    for stack in model.stacks():
        stack.register_forward_hook(lambda _m, x, y: dtypes.extend((x[0].dtype, y.dtype)))
        stack.fields[0].register_forward_hook(lambda _m, _x, y: dtypes.append(y.dtype))
    x = torch.randn(1, 3, 8, 8)
    exact = model(x)
    assert set(dtypes) == {torch.float32}
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x)
    assert set(dtypes[-2:]) == {torch.float32} and torch.bfloat16 in dtypes
    assert torch.allclose(rough.float(), exact, atol=0.1 * exact.abs().max().item())


def test_learnt_steps_have_no_counterpart():
    model = build("odenet20", learn_step=True)
    preact = build("preact20")
    names = preact_names(model)
    assert len(model.state_dict()) - len(names) == 3
    assert set(names.values()) == set(preact.state_dict())


# Every network.


@pytest.mark.parametrize("name", EVERY_KIND)
def test_small_images_of_one_channel(name):
    """Digits are 8×8 with one channel."""
    model = small(name, num_classes=7)
    logits = model(torch.randn(4, 1, 8, 8))
    assert logits.shape == (4, 7) and logits.isfinite().all()
    F.cross_entropy(logits, torch.arange(4)).backward()
    for parameter_name, p in model.named_parameters():
        if not parameter_name.startswith("companions"):  # which have a loss of their own
            assert p.grad is not None and p.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", EVERY_KIND)
def test_copies_formats_and_state_dicts_give_the_same(name):
    model = randomize_norms(small(name)).eval()
    x = torch.randn(3, 1, 8, 8)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    other = small(name).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)
    nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)
    tolerance = 1e-4 * expected.abs().max().item()
    assert torch.allclose(nhwc(x.to(memory_format=torch.channels_last)), expected, atol=tolerance)
    assert torch.equal(x, x.clone()) and torch.equal(model(x), expected)


@pytest.mark.parametrize("name", [*EVERY_KIND, "resnet146"])  # 24 blocks a group are checkpointed by twos
def test_checkpoint_has_the_same_gradients_and_statistics(name):
    """Computed twice, a block must count its batch once."""
    options = {o: 0.0 for o in NETWORKS[name].options if o.endswith("dropout")}
    plain, saving = small(name, **options), small(name, gradient="checkpoint", **options)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 1, 8, 8)
    for model in (plain, saving):
        F.cross_entropy(model(x), torch.arange(4)).backward()
    for (key, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert key.startswith("companions") or torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-7), key
    for (key, a), b in zip(plain.named_buffers(), saving.named_buffers(), strict=True):
        assert torch.equal(a, b[1]), key
    for m in saving.modules():
        assert not isinstance(m, nn.BatchNorm2d) or m.momentum == 0.1


def test_checkpointed_networks_graphs_can_be_kept():
    model = build("resnet8", gradient="checkpoint")
    loss = model(torch.randn(2, 3, 8, 8)).square().sum()
    first, again = (torch.autograd.grad(loss, model.conv1.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again) and model.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["resnet8", "preact8", "odenet14", "highway19", "resnet18"])
def test_group_norm_keeps_samples_apart(name):
    options = {"dropout": 0.0} if name == "highway19" else {}
    model = small(name, norm="group", **options)
    x = torch.randn(4, 1, 8, 8)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.allclose(model(x[:1]), model(x)[:1], atol=1e-4)


@pytest.mark.parametrize("name", ["resnet110", "preact110", "odenet110", "plain110"])
def test_deep_networks_without_norm_start_finite(name):
    """Residual ones start as the identity between groups; a plain one keeps He's second moment."""
    logits = small(name, norm="none")(torch.randn(2, 1, 8, 8))
    assert 1e-3 < logits.std() < 10


def record_residual(into, block, inputs, _output):
    into.append(block.branches(*inputs)[1].abs().max().item())


def test_zero_init_last_makes_every_block_its_shortcut():
    for name in ("resnet20", "preact20", "resnet50", "preact164"):
        model = small(name, zero_init_last=True)
        x = torch.randn(2, 1, 8, 8)
        blocks = [m for m in model.modules() if hasattr(m, "branches")]
        residuals: list[float] = []
        for block in blocks:
            block.register_forward_hook(partial(record_residual, residuals))
        loss = F.cross_entropy(model(x), torch.arange(2))
        assert len(residuals) == len(blocks) >= 9 and max(residuals) == 0.0
        loss.backward()  # not dead: the zeros get a gradient
        zeros = [p for p in model.parameters() if not p.any() and p.ndim in (1, 4)]
        assert any(p.grad.abs().max() > 0 for p in zeros)


def test_stochastic_depth_falls_linearly_and_drops_whole_samples():
    model = build("resnet20", stochastic_depth=0.9)
    rates = [m.p for m in model.modules() if isinstance(m, StochasticDepth)]
    assert rates == pytest.approx([0.9 * i / 9 for i in range(1, 10)])
    drop = StochasticDepth(0.25)
    out = drop(torch.ones(4000, 3, 2, 2)).flatten(1)
    assert (out == out[:, :1]).all()
    assert set(out[:, 0].tolist()) == {0.0, out.max().item()}
    assert out.max().item() == pytest.approx(4 / 3)
    # 4 standard deviations of the share of 4,000 samples kept with probability 3/4
    assert (out[:, 0] > 0).double().mean().item() == pytest.approx(0.75, abs=4 * math.sqrt(0.1875 / 4000))
    x = torch.randn(2, 3, 8, 8)
    plain = build("resnet20")
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_options_change_what_they_say():
    assert build("resnet20", width=8).layer3[0].conv2.weight.shape == (32, 32, 3, 3)
    assert build("preact20", width=8).linear.in_features == 32
    assert build("wide_resnet16_3").layer1[0].conv1.weight.shape == (48, 16, 3, 3)
    assert isinstance(build("resnet20", activation="gelu").layer1[0].act, nn.GELU)
    assert build("resnet20", shortcut="C").layer1[0].downsample[0].weight.shape == (16, 16, 1, 1)
    assert len([n for n, _ in build("resnet20", shortcut="gated").named_parameters() if "alpha" in n]) == 7
    assert (
        len([n for n, _ in build("preact20", shortcut="input_gated").named_parameters() if "score" in n])
        == 14
    )
    stem = build("resnet20", stem="imagenet")
    assert stem.conv1.weight.shape == (16, 3, 7, 7)
    assert build("resnet18", stem="small").conv1.stride == (1, 1)
    assert (
        len([m for m in build("resnet20", squeeze_excitation=True).modules() if "Squeeze" in repr(type(m))])
        == 9
    )
    with torch.device("meta"):
        for name in EVERY_KIND:
            build(name, **NETWORKS[name].options)


# Perceptrons.


def test_perceptrons_are_their_loops():
    residual, plain = ResidualMLP(5, in_features=6, step_size=0.5), PlainMLP(5, in_features=6)
    v = torch.randn(3, 6)
    x = residual.input(v)
    for field in residual.stack.fields:
        assert isinstance(field, MLPField)
        x = x + 0.5 * field(x)
    assert torch.equal(residual(v), residual.linear(x))
    x = plain.input(v)
    for block in plain.blocks:
        x = block[0](x).relu()
    assert torch.equal(plain(v), plain.linear(x))


def test_residual_perceptron_starts_bounded_at_any_depth():
    """E F² = 2 E x² / L, since W₁ doubles what relu halves and W₂ doubles again: (1 + 2/L)^L < e²."""
    for depth in (10, 300):
        model = ResidualMLP(depth, in_features=64, width=256)
        x = torch.randn(64, 256)
        growth = (model.stack(x).square().mean() / x.square().mean()).item()
        assert growth == pytest.approx((1 + 2 / depth) ** depth, rel=0.3)


# Names and options.


def test_every_name_listed_builds():
    assert available() == list(NETWORKS) and len(set(available())) == len(available())
    with torch.device("meta"):
        for name, network in NETWORKS.items():
            if name not in ("resnet1202", "preact1001", "resnet152"):
                assert isinstance(build(name), nn.Module)
            assert network.name == name and network.description and "\n" not in network.description


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet14", 6),
        ("resnet32", 15),
        ("plain14", 6),
        ("preact26", 12),
        ("preact173", 57),
        ("preact158", 78),
    ],
)
def test_any_depth_of_the_rule_exists(name, blocks):
    with torch.device("meta"):
        model = build(name)
    assert len([m for m in model.modules() if hasattr(m, "branches")]) == blocks
    assert name in NETWORKS and NETWORKS[name].name == name


def test_imagenet_depths_are_the_imagenet_networks():
    """50 and 152 are 6n + 2 as well: the published networks go first."""
    assert NETWORKS["resnet50"].options["num_classes"] == 1000
    assert NETWORKS["resnet56"].options["num_classes"] == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet21", r"6n \+ 2.*The nearest: resnet20 and resnet26"),
        ("odenet3", r"6n \+ 2.*The nearest: odenet8"),
        ("preact165", r"9n \+ 2.*The nearest: preact164 and preact173"),
        ("wide_resnet27_10", r"6n \+ 4.*wide_resnet22_10 and wide_resnet28_10"),
        ("resnt20", r"Did you mean resnet20.*\?.*odenet110.*highway19.*Families: resnet…"),
        ("wide_resnet28", "Did you mean wide_resnet28_10"),
        ("resnet020", "no network 'resnet020'"),
        ("", "no network ''"),
    ],
)
def test_unknown_names_are_refused_with_the_rule(name, message):
    assert name not in NETWORKS
    with pytest.raises(ValueError, match=message):
        build(name)
    with pytest.raises(KeyError):
        NETWORKS[name]


def test_families_know_their_nearest_depths():
    for family in FAMILIES:
        for depth in (1, 21, 163, 164, 1000):
            assert all(family.has(d) for d in family.nearest(depth))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {"numclasses": 3}, "no option 'numclasses'. Did you mean num_classes.*shortcut, norm"),
        ("resnet20", {"solver": "rk4"}, "resnet20 has no option 'solver'"),
        ("plain20", {"shortcut": "A"}, "plain20 has no option 'shortcut'"),
        ("highway19", {"shortcut": "A"}, "highway19 has no option 'shortcut'"),
        ("odenet20", {"solvers": "rk4"}, "Did you mean solver"),
        ("odenet20", {"solver": "rk5"}, "rk4"),
        ("odenet20", {"shortcut": "C"}, "'A', 'B' or 'D', got 'C'"),
        ("odenet20", {"step_size": -1.0}, "step_size"),
        ("resnet20", {"shortcut": "a"}, "A, B, C, D, gated, input_gated"),
        ("resnet20", {"norm": "bach"}, "Did you mean batch"),
        ("resnet20", {"activation": "relux"}, "Did you mean relu"),
        ("resnet20", {"stem": "large"}, "small, imagenet"),
        ("resnet20", {"gradient": "adjoint"}, "autograd, checkpoint"),
        ("resnet20", {"stochastic_depth": 1.0}, "at least 0 and below 1, got 1.0"),
        ("resnet20", {"stochastic_depth": "0.1"}, "at least 0 and below 1, got '0.1'"),
        ("resnet20", {"squeeze_excitation": "no"}, "must be True or False: got 'no'"),
        ("highway19", {"dropout": -0.5}, "dropout must be at least 0"),
        ("highway19", {"gate_bias": "tanh"}, "bias must be a number, got 'tanh'"),
        ("highway19", {"gate_bias": float("nan")}, "bias must be finite"),
        ("resnet20", {"num_classes": 0}, "num_classes must be"),
        ("resnet20", {"in_channels": 2.0}, "in_channels must be"),
        ("resnet20", {"width": "16"}, "width must be"),
        ("resnet20", {"shortcut": "none", "zero_init_last": True}, "plain network"),
        ("preact20", {"shortcut": "none"}, "sum over its shortcuts"),
        ("resnet50", {"shortcut": "none"}, "18 or 34"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_images_of_other_channels_are_refused(name):
    with pytest.raises(ValueError, match=r"got \(2, 3, 8, 8\)"):
        small(name)(torch.zeros(2, 3, 8, 8))
