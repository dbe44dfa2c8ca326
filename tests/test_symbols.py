"""torch.fx draws every network: the graph computes the same, to the bit, and checks its input as well."""

import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.fx import symbolic_trace

from resode import ODEBlock, ResidualStack
from resode.fields import (
    AntisymmetricField,
    Augmented,
    BottleneckField,
    ConvField,
    HamiltonianField,
    KnownPlusLearned,
    MLPField,
    ParabolicField,
    SoftThresholdField,
    TimeConvField,
    TimeMLPField,
)
from resode.networks import ResidualMLP, build
from resode.shortcuts import SHORTCUTS, make_shortcut

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NETWORKS = {
    **{name: (name, {}) for name in (
        "resnet8", "preact8", "preact164", "plain8", "odenet14", "wide_resnet10_2", "highway19",
    )},
    **{name: (name, {"width": 8, "num_classes": 3}) for name in (
        "resnet18", "plain18", "resnet18d", "seresnet18", "resnetv2_18", "resnetv2_50d",
    )},
    **{f"shortcut {kind}": ("resnet8", {"shortcut": kind}) for kind in SHORTCUTS},
    "resnext": ("resnext50_32x4d", {"width": 16, "num_classes": 3}),
    "groups, checkpoints": ("preact8", {"norm": "group", "gradient": "checkpoint"}),
    "dropped blocks": ("resnet8", {"stochastic_depth": 0.5, "squeeze_excitation": True}),
    "rk4": ("odenet14", {"solver": "rk4"}),
    "adaptive": ("odenet14", {"solver": "dopri5", "norm": "group"}),
    "residual_mlp3": ("residual_mlp3", {"image_size": 16, "in_channels": 3}),
    "plain_mlp3": ("plain_mlp3", {"image_size": 16, "in_channels": 3}),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", NETWORKS)
def test_the_graph_is_the_network_to_the_bit(case, training):
    """Outputs, gradients, and what training mode does to the running statistics."""
    name, options = NETWORKS[case]
    model = build(name, **options).train(training)
    traced = symbolic_trace(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    results = []
    for network in (model, traced):
        torch.manual_seed(3)
        model.load_state_dict(before)
        out = network(IMAGES)
        gradients = torch.autograd.grad(out.square().sum(), tuple(model.parameters()), allow_unused=True)
        results.append((out, gradients, {k: v.clone() for k, v in model.state_dict().items()}))
    (first, ours, state), (second, theirs, other) = results
    assert torch.equal(first, second)
    assert all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )
    assert all(torch.equal(value, other[key]) for key, value in state.items())


def test_the_graph_says_what_is_wrong_in_the_same_words():
    for name, wrong in (("resnet8", IMAGES[:, :2]), ("odenet14", IMAGES[0]), ("residual_mlp3", IMAGES)):
        model = build(name)
        messages = []
        for network in (model, symbolic_trace(model)):
            with pytest.raises(ValueError, match=r"takes (images|inputs)") as caught:
                network(wrong)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_graphs_are_copied_pickled_and_rewritten():
    """What torch.fx is for: here every ReLU becomes a tanh."""
    traced = symbolic_trace(build("resnet8").eval())
    assert torch.equal(pickle.loads(pickle.dumps(traced))(IMAGES), traced(IMAGES))
    model = build("resnet8", activation="tanh").eval()
    model.load_state_dict(traced.state_dict())
    for node in traced.graph.nodes:
        if node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.ReLU):
            with traced.graph.inserting_before(node):
                node.replace_all_uses_with(traced.graph.call_function(torch.tanh, node.args))
            traced.graph.erase_node(node)
    traced.recompile()
    assert torch.equal(traced(IMAGES), model(IMAGES))


def test_a_solver_is_one_node():
    """Its steps depend on what it sees; the nodes around it are ours to rewrite."""
    model = nn.Sequential(
        ResidualStack([ConvField(3)] * 2, solver="rk4"), ODEBlock(TimeConvField(3), n_steps=2)
    ).eval()
    traced = symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert torch.equal(traced(IMAGES), model(IMAGES))
    for block in (model[0], model[1]):
        with pytest.raises(TypeError, match="is one node of a graph, and here it is the whole"):
            symbolic_trace(block)


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        (ConvField(3), (2, 3, 8, 8)),
        (BottleneckField(4), (2, 4, 8, 8)),
        (MLPField(5), (2, 5)),
        (AntisymmetricField(5), (2, 5)),
        (ParabolicField(3, kernel_size=3), (2, 3, 8, 8)),
        (HamiltonianField(4), (2, 4)),
        (SoftThresholdField(ConvField(3), channels=3), (2, 3, 8, 8)),
        (Augmented(MLPField(7), extra=2), (2, 5)),
        (nn.Sequential(KnownPlusLearned(lambda x: -x, MLPField(5))), (2, 5)),
        (make_shortcut("B", 3, 6, 2), (2, 3, 8, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_fields_and_shortcuts_are_drawn_too(field, shape):
    x = torch.randn(shape)
    traced = symbolic_trace(field.eval())
    assert torch.equal(traced(x), field(x))
    with pytest.raises(ValueError) as ours:
        field(x[:, :1])
    with pytest.raises(ValueError) as theirs:
        traced(x[:, :1])
    assert str(ours.value) == str(theirs.value)


def test_fields_of_time_are_drawn_with_the_time_as_an_input():
    for field, x in ((TimeMLPField(3), torch.randn(2, 3)), (TimeConvField(3), IMAGES)):
        assert torch.equal(symbolic_trace(field)(torch.tensor(0.5), x), field(torch.tensor(0.5), x))


def test_the_whole_is_still_one_graph_for_export_and_compile():
    """The nodes that torch.fx sees are plain calls for torch.export and torch.compile."""
    model = build("resnet8", shortcut="input_gated").eval()
    exported = torch.export.export(model, (IMAGES,)).module()
    assert torch.allclose(exported(IMAGES), model(IMAGES), atol=1e-6)
    stack = nn.Sequential(ResidualStack([MLPField(4)] * 2, solver="rk4")).eval()
    x = torch.randn(2, 4)
    compiled = torch.compile(stack, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), stack(x), atol=1e-6)
    parameters = dict(ResidualMLP(2, in_features=4).named_parameters())
    assert functional_call(ResidualMLP(2, in_features=4), parameters, (x,)).shape == (2, 10)
