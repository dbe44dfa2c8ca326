"""Networks whose groups are runs of blocks with streams, halves, a velocity, or attention over depth."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resode
from resode.networks import build
from resode.networks.resnet import BasicBlock, Bottleneck, PreActBlock, PreActBottleneck
from resode.shortcuts import (
    RUN_SHORTCUTS,
    AdditiveCoupling,
    AttentionResidual,
    HyperConnection,
    MomentumStack,
    make_run,
)

BLOCKS = BasicBlock | Bottleneck | PreActBlock | PreActBottleneck
HYPER = [kind for kind in RUN_SHORTCUTS if kind.startswith("hyper")]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def with_weights_of(other, network):
    """The network with the weights of another of the same blocks, block by block."""
    for (_, a), (_, b) in zip(other.named_children(), network.named_children(), strict=True):
        if not isinstance(a, nn.Sequential):
            b.load_state_dict(a.state_dict())
    blocks = [[m for m in net.modules() if isinstance(m, BLOCKS)] for net in (other, network)]
    for a, b in zip(*blocks, strict=True):
        b.load_state_dict(a.state_dict())
    return network


@pytest.mark.parametrize("kind", HYPER)
@pytest.mark.parametrize("name", ["resnet14", "preact20", "preact164", "wide_resnet16_2", "resnetv2_18"])
def test_at_the_start_streams_are_the_residual_network(name, kind):
    """Copies of one x stay copies of x + F(x), of σ(x + F(x)) behind a post-activation block.

    The constrained kinds have row sums of 1 to 1e-6, so that sixteen blocks leave some 1e-5.
    """
    options = {"width": 8, "in_channels": 1}
    plain = build(name, shortcut="A", **options).double().eval()
    network = with_weights_of(plain, build(name, shortcut=kind, **options).double()).eval()
    assert sum(isinstance(m, HyperConnection) for m in network.modules()) >= 3
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(network(x), plain(x), rtol=2e-5, atol=2e-5)


def test_momentum_is_its_recurrence():
    """v ← 0.9 v + 0.1 F(x), x ← x + v within a group; the block that changes the shape is a plain one."""
    network = build("preact14", shortcut="momentum", width=4).double().eval()
    assert [[type(m) for m in group] for group in (network.layer1, network.layer2)] == [
        [MomentumStack],
        [PreActBlock, MomentumStack],
    ]
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    v, y = torch.zeros_like(x), x
    for branch in network.layer1[0].branches:
        v = 0.9 * v + 0.1 * branch.block.branches(y)[1]
        y = y + v
    torch.testing.assert_close(network.layer1(x), y, rtol=1e-12, atol=1e-12)


def test_couplings_are_undone_within_a_group():
    """Half the channels a branch, so a quarter of a block's weights in each of two."""
    network = build("preact26", shortcut="coupling", width=4).double().eval()
    whole = build("preact26", width=4)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    y = network.layer1(x)
    for block in reversed(network.layer1):
        assert isinstance(block, AdditiveCoupling)
        y = block.inverse(y)
    torch.testing.assert_close(y, x, rtol=1e-10, atol=1e-10)
    weights = [
        sum(p.numel() for n, p in net.layer1.named_parameters() if "conv" in n) for net in (network, whole)
    ]
    assert weights[0] * 2 == weights[1]


def test_attention_starts_as_a_mean_over_what_was_before():
    network = build("preact20", shortcut="attention", width=4).double().eval()
    run = network.layer1[0]
    assert isinstance(run, AttentionResidual)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    values = [x]
    for branch in run.branches:
        values.append(branch.block.branches(torch.stack(values).mean(0))[1])
    torch.testing.assert_close(network.layer1(x), torch.stack(values).mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", RUN_SHORTCUTS)
def test_every_parameter_learns_and_checkpoints_agree(kind):
    """A step moves each parameter's gradient off 0 once mixing has left its start, with checkpoints too."""
    network = build("preact14", shortcut=kind, width=8, in_channels=1).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".block." not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    sparing = copy.deepcopy(network)
    sparing.gradient = "checkpoint"
    x, y = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.arange(4)
    for net in (network, sparing):
        F.cross_entropy(net(x), y).backward()
    for (name, p), q in zip(network.named_parameters(), sparing.parameters(), strict=True):
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)
    for p, q in zip(network.buffers(), sparing.buffers(), strict=True):
        torch.testing.assert_close(q, p)


def test_training_by_name(tmp_path):
    run = resode.train(
        "resnet8", "digits", recipe="digits", updates=3, run_dir=tmp_path / "run", progress=False,
        model_options={"shortcut": "hyper_manifold", "streams": 2, "width": 4},
    )  # fmt: skip
    assert run.network.eval()(torch.zeros(1, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {"shortcut": "momentum"}, "'momentum' leaves no place for an activation after each sum"),
        ("resnet50", {"shortcut": "coupling"}, "take a pre-activation network"),
        ("resnet20", {"shortcut": "attention"}, "or one of 'hyper', 'hyper_dynamic'"),
        ("preact20", {"shortcut": "coupling", "width": 3}, "in halves: take an even width, got 3"),
        ("preact20", {"shortcut": "hiper"}, "got 'hiper'. Did you mean hyper"),
        ("preact20", {"streams": 3}, "streams are of a 'hyper…' shortcut, and 'A' has none"),
        ("preact20", {"shortcut": "hyper", "streams": 0}, "streams must be"),
        ("odenet20", {"shortcut": "hyper"}, "its transitions take 'A', 'B' or 'D', got 'hyper'"),
        ("plain20", {"shortcut": "hyper"}, "no option 'shortcut'"),
    ],
)
def test_what_does_not_fit_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


def test_a_coupling_needs_pairs():
    with pytest.raises(ValueError, match="two branches on halves of the features: got 1 branches and 4"):
        make_run("coupling", [nn.Linear(2, 2)], 4)
