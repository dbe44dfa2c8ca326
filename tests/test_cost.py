"""Cost: published figures, and formulas that agree with what torch executes, for everything there is."""

import pytest
import torch
from torch import nn

from resode import METHODS, ODEBlock, ResidualStack
from resode.analysis import count
from resode.fields import (
    AntisymmetricField,
    Augmented,
    Autonomous,
    BottleneckField,
    ConvField,
    HamiltonianField,
    KnownPlusLearned,
    MLPField,
    ParabolicField,
    SoftThresholdField,
    SqueezeExcitation,
    TimeConvField,
    TimeMLPField,
)
from resode.formulas import Cost, cost_of
from resode.networks import NETWORKS, build
from resode.shortcuts import (
    RUN_SHORTCUTS,
    HighwayShortcut,
    InputGatedShortcut,
    PadShortcut,
    ProjectionShortcut,
    make_shortcut,
)


@pytest.mark.parametrize(
    ("name", "size", "macs", "digit"),
    [
        ("resnet18", 224, 1.814e9, 1e6),
        ("resnet34", 224, 3.664e9, 1e6),
        ("resnet50", 224, 4.089e9, 1e6),
        ("resnet101", 224, 7.801e9, 1e6),
        ("resnet152", 224, 11.514e9, 1e6),
        ("resnet20", 32, 40.55e6, 1e4),
    ],
)
def test_published_multiply_adds(name, size, macs, digit):
    """To every digit that is published, by formula and by counting."""
    with torch.device("meta"):
        model = build(name)
        cost = model.cost((3, size, size))
        assert cost == count(model, torch.zeros(1, 3, size, size))
    assert abs(cost.macs - macs) <= digit / 2
    assert cost.parameters == NETWORKS[name].parameter_count()


def test_resnet20_by_hand():
    """3×3 convolutions: stem, 6 + 5 + 5 between equal channels and 2 that double them, and a linear layer."""
    by_hand = 1024 * 9 * 3 * 16 + 6 * 1024 * 9 * 16 * 16
    by_hand += 256 * 9 * 16 * 32 + 5 * 256 * 9 * 32 * 32 + 64 * 9 * 32 * 64 + 5 * 64 * 9 * 64 * 64 + 640
    assert build("resnet20").cost((3, 32, 32)).macs == by_hand


EVERY_NETWORK = [
    *((name, {}) for name in NETWORKS if name not in ("resnet1202", "preact1001")),
    ("resnet20", {"shortcut": "B", "norm": "none", "squeeze_excitation": True, "stem": "imagenet"}),
    ("resnet20", {"shortcut": "C", "norm": "group", "activation": "gelu"}),
    ("resnet50", {"shortcut": "D", "squeeze_excitation": True, "stem": "small"}),
    ("resnet18", {"shortcut": "gated"}),
    ("preact20", {"shortcut": "input_gated"}),
    ("preact20", {"shortcut": "D"}),
    ("preact164", {"shortcut": "C", "squeeze_excitation": True}),
    *(("preact20", {"shortcut": kind}) for kind in RUN_SHORTCUTS),
    ("resnet32", {"shortcut": "hyper_dynamic", "streams": 3, "width": 5}),
    ("resnet18", {"shortcut": "hyper_manifold", "width": 8}),
    ("resnetv2_50", {"shortcut": "coupling", "width": 8}),
    ("odenet20", {"shortcut": "D", "solver": "rk4", "substeps": 2, "learn_step": True}),
    ("odenet20", {"weights": "linear", "solver": "midpoint", "gradient": "checkpoint"}),
    ("nin", {"norm": "batch", "num_classes": 7}),
    ("maxout", {"norm": "batch", "hidden_pieces": 2}),
    ("dsn", {"norm": "group"}),
    ("residual_mlp5", {"hidden": 7, "solver": "kutta3", "learn_step": "channel"}),
]


@pytest.mark.parametrize(("name", "options"), EVERY_NETWORK)
@pytest.mark.parametrize("size", [32, 19])
def test_formula_and_count_agree_for_every_network(name, options, size):
    if "image_size" in NETWORKS[name].options:
        options = {**options, "image_size": size}
    with torch.device("meta"):
        model = build(name, **options)
        assert model.cost((3, size, size)) == count(model, torch.zeros(3, 3, size, size))


IMAGE, VECTOR = (8, 7, 9), (12,)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (ConvField(8, squeeze_excitation=True), IMAGE),
        (BottleneckField(8, norm="none"), IMAGE),
        (MLPField(12, hidden=5), VECTOR),
        (MLPField(12), (3, 12)),
        (SoftThresholdField(ConvField(8), channels=8), IMAGE),
        (SqueezeExcitation(8), IMAGE),
        (nn.Conv2d(8, 6, 3, padding="same", dilation=2), IMAGE),
        (nn.Conv2d(8, 6, (3, 1), (2, 1), padding="valid", groups=2), IMAGE),
        (nn.Sequential(nn.MaxPool2d(3, 2, dilation=2), nn.Conv2d(8, 4, 1)), (8, 11, 13)),
        (nn.Sequential(nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.Conv2d(8, 4, 1)), (8, 8, 9)),
        (AntisymmetricField(12), VECTOR),
        (AntisymmetricField(8, kernel_size=3), IMAGE),
        (ParabolicField(12), VECTOR),
        (ParabolicField(8, kernel_size=5), IMAGE),
        (HamiltonianField(12), VECTOR),
        (HamiltonianField(8, kernel_size=3), IMAGE),
        (Augmented(MLPField(15), extra=3), VECTOR),
        (Augmented(ConvField(10), extra=2, keep=True), IMAGE),
        (make_shortcut("A", 8, 8), IMAGE),
        (PadShortcut(8, 20, 2), IMAGE),
        (ProjectionShortcut(8, 12, 2, norm=nn.BatchNorm2d), IMAGE),
        (ProjectionShortcut(8, 12, 3, average_pool=True), IMAGE),
        (make_shortcut("gated", 8, 8), IMAGE),
        (InputGatedShortcut(8), IMAGE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_formula_and_count_agree_for_every_block(module, shape):
    assert cost_of(module, shape) == count(module, torch.randn(2, *shape))


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        (TimeMLPField(12, hidden=5), VECTOR),
        (TimeConvField(8), IMAGE),
        (Autonomous(ConvField(8)), IMAGE),
        (KnownPlusLearned(lambda t, x: -x, TimeMLPField(12)), VECTOR),
    ],
    ids=lambda value: type(value).__name__,
)
def test_fields_that_see_the_time(field, shape):
    once = cost_of(field, shape)
    block = ODEBlock(field, solver="rk4", n_steps=3)
    assert count(block, torch.randn(2, *shape)) == once.evaluated(12)


def test_highway_shortcut():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.highway = HighwayShortcut(8, kernel_size=3)

        def forward(self, x):
            return self.highway(x, x)

    assert cost_of(Layer().highway, IMAGE) == count(Layer(), torch.randn(2, *IMAGE))


@pytest.mark.parametrize("method", [name for name, tableau in METHODS.items() if tableau.explicit])
@pytest.mark.parametrize("shared", [True, False])
def test_evaluations_multiply_the_ode_part(method, shared):
    """Fixed: depth · substeps · stages. Adaptive: as often as the last call did."""
    field = MLPField(12)
    stack = ResidualStack(field, depth=2, solver=method, substeps=3) if shared else ResidualStack(
        [MLPField(12), MLPField(12, hidden=5)], solver=method, substeps=3
    )  # fmt: skip
    adaptive = METHODS[method].adaptive
    if adaptive:
        with pytest.raises(ValueError, match="call the stack first"):
            stack.cost(VECTOR)
    x = torch.randn(4, 12)
    counted = count(stack, x)
    assert stack.cost(VECTOR) == counted
    costs = [cost_of(stack.field(i), VECTOR).macs for i in range(2)]
    evaluations = stack.evaluations if adaptive else [3 * METHODS[method].stages] * 2
    assert counted.macs == sum(n * c for n, c in zip(evaluations, costs, strict=True))
    assert sum(stack.evaluations) >= int(torch.as_tensor(stack.stats.nfe).max())


def test_modules_without_formula_are_counted_or_refused():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten())
    with pytest.raises(TypeError, match=r"no formula for the cost of a Conv1d.*analysis\.count"):
        cost_of(model, (3, 8))
    assert count(model, torch.randn(2, 3, 8)) == Cost(40, 6 * 3 * 4 * 3, (24,))
    grouped = nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=4)
    assert cost_of(grouped, (8, 9, 12)) == count(grouped, torch.randn(2, 8, 9, 12))
    with pytest.raises(ValueError, match="at least one sample"):
        count(model, torch.randn(0, 3, 8))


def test_counting_leaves_the_module_as_it_was():
    model = build("resnet8").train()
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count(model, torch.randn(2, 3, 8, 8))
    assert model.training and model.layer2.training and not model.layer1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def self_attention(layer):
    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, x, x)[0]

    return Self()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("make", "macs"),
    [  # 50 steps of 32 features
        (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 364_800 + 2 * 50 * 32 * 64),
        (lambda: self_attention(nn.MultiheadAttention(32, 4, batch_first=True)), 50 * 4 * 32**2 + 2 * 50**2 * 32),
        (lambda: nn.LSTM(32, 16, batch_first=True), 50 * 4 * 16 * (32 + 16)),
        (lambda: nn.LSTM(32, 16, 2, bidirectional=True, batch_first=True), 50 * 2 * 4 * 16 * (48 + 48)),
        (lambda: nn.GRU(32, 16, batch_first=True), 50 * 3 * 16 * (32 + 16)),
    ],
)  # fmt: skip
def test_attention_and_recurrence(make, macs, device):
    """Projections of 4·32² a step and two products of 50 × 32 × 50; four or three gates of two matrices each."""
    layer = make().to(device)
    for batch in (1, 3):
        assert count(layer, torch.zeros(batch, 50, 32, device=device)).macs == macs
    assert layer.training and torch.backends.mha.get_fastpath_enabled()


def test_fused_attention_and_several_inputs():
    class Fused(nn.Module):
        def forward(self, q, k):
            return nn.functional.scaled_dot_product_attention(q, k, k)

    q, k = torch.zeros(2, 4, 50, 8), torch.zeros(2, 4, 20, 8)
    assert count(Fused(), (q, k)).macs == 2 * 4 * 50 * 20 * 8
    assert count(nn.LSTM(32, 16), torch.zeros(50, 2, 32)).macs == 153_600  # the batch is dimension 1


class Token(nn.Module):
    """A class token, expanded to the batch, goes through a module as cait's does."""

    def __init__(self):
        super().__init__()
        self.token, self.linear = nn.Parameter(torch.zeros(1, 3)), nn.Linear(3, 5)
        self.token.requires_grad_(True)
        self.linear.bias.requires_grad_(False)

    def forward(self, x):
        return self.linear(self.token.expand(len(x), -1)) + self.linear(x)


def test_a_parameter_may_be_a_modules_input():
    """Two products of 15 a sample; which parameters learn is left as it was."""
    model = Token()
    assert count(model, torch.zeros(2, 3)).macs == 30
    assert [p.requires_grad for p in model.parameters()] == [True, True, False]
