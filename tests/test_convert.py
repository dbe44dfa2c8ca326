"""Converted networks are the same function with the same parameters, and their solvers can be swapped."""

import copy

import pytest
import torch
from foreign_networks import GPT, Bottleneck, HFResNet
from torch import nn
from torch.nn import functional as f

from resode import ODEBlock, ResidualStack, convert, swap_report
from resode.blocks.frozen import StochasticDepth
from resode.fields import Autonomous
from resode.networks import build


class PreActBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def branch(self, x):
        return self.conv2(torch.relu(self.conv1(torch.relu(self.bn(x)))))

    def forward(self, x):
        return x + self.branch(x)


class PreActDown(nn.Module):
    def __init__(self, channels, wider):
        super().__init__()
        self.conv = nn.Conv2d(channels, wider, 3, 2, 1)
        self.shortcut = nn.Conv2d(channels, wider, 1, 2)
        self.last = nn.Conv2d(wider, wider, 3, padding=1)

    def forward(self, x):
        x = torch.relu(x)
        return self.shortcut(x) + self.last(torch.relu(self.conv(x)))


def preact_resnet():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        *[PreActBlock(4) for _ in range(3)],
        PreActDown(4, 6),
        *[PreActBlock(6) for _ in range(2)],
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


class ViTBlock(nn.Module):
    """Two branches with LayerScale, one Dropout used in both, and stochastic depth."""

    def __init__(self, width, drop):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))
        self.dropout, self.drop_path = nn.Dropout(drop), StochasticDepth(drop)

    def forward(self, x):
        h = self.norm1(x)
        attended, _ = self.attention(h, h, h)
        x = x + self.drop_path(self.dropout(self.scale1 * attended))
        return x + self.drop_path(self.dropout(self.scale2 * self.mlp(self.norm2(x))))


def vit(drop=0.2):
    blocks = [ViTBlock(4, drop) for _ in range(3)]
    return nn.Sequential(nn.Linear(3, 4), *blocks, nn.LayerNorm(4), nn.Linear(4, 2))


class ConvNeXtBlock(nn.Module):
    """An identity module as shortcut, a sum in place, channels last on the way."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 8), nn.GELU(), nn.Linear(8, channels))
        self.gamma = nn.Parameter(torch.ones(channels))
        self.shortcut = nn.Identity()

    def forward(self, x):
        out = self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        out = out.mul(self.gamma.reshape(1, -1, 1, 1))
        out += self.shortcut(x)
        return out


def convnext():
    return nn.Sequential(
        nn.Conv2d(3, 4, 2, 2),
        *[ConvNeXtBlock(4) for _ in range(2)],
        nn.Conv2d(4, 6, 2, 2),
        *[ConvNeXtBlock(6) for _ in range(3)],
    )


class Inlined(nn.Module):
    """Sums in the network's own forward, with a factor, a functional dropout, and a subtraction elsewhere."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.other = nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + 0.25 * f.dropout(torch.tanh(layer(x)), 0.1, self.training)
        x = torch.flip(x, (1,))
        x = x - self.other(x)
        return self.last(torch.relu(x))


IMAGE = (2, 3, 12, 12)
NETWORKS = {
    "pre-activation ResNet": (preact_resnet, IMAGE, [3, 2]),
    "ViT": (vit, (2, 5, 3), [6]),
    "ConvNeXt": (convnext, IMAGE, [2, 3]),
    "inlined": (Inlined, (2, 3), [4, 1]),
}


# A sum in place takes the branch's memory layout, so that the next convolution runs another kernel.
REORDERED = ("ConvNeXt",)


def assert_same(name, one, other):
    if name in REORDERED:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(one, other)


def made(name):
    torch.manual_seed(0)
    make, shape, _ = NETWORKS[name]
    return make().eval(), torch.randn(shape)


def gradients(network, model, x, target=1.0):
    model.zero_grad()
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    (network(x) - target).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found if x.grad is None else found | {"x": x.grad}


def assert_same_gradients(network, model, x):
    one, other = gradients(model, model, x), gradients(network, model, x)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_function_to_the_bit(name):
    model, x = made(name)
    before = copy.deepcopy(model.state_dict())
    converted = convert(model, x)
    assert [stack.depth for stack in converted.stacks.values()] == NETWORKS[name][2]
    if name == "inlined":  # a factor that is common to a run is its step
        assert [stack.step_size for stack in converted.stacks.values()] == [0.25, 1.0]
    assert_same(name, converted(x), model(x))
    assert converted.difference <= (1e-6 if name in REORDERED else 0)
    bigger = torch.randn(5, *x.shape[1:])
    assert_same(name, converted(bigger), model(bigger))
    assert_same_gradients(converted, model, x)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_parameters_by_names_both_ways(name):
    model, x = made(name)
    converted = convert(model, x)
    old, new = (dict(m.state_dict(keep_vars=True)) for m in (model, converted))
    assert converted.new_names.keys() == old.keys() and converted.old_names.keys() == new.keys()
    for name, other in converted.new_names.items():
        assert old[name] is new[other] and converted.old_names[other] == name
    assert {id(p) for p in model.parameters()} == {id(p) for p in converted.parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_the_same_too(name):
    """Dropout and stochastic depth draw in the same order; batch norm moves the one set of statistics."""
    model, x = made(name)
    model.train()
    converted = convert(model, x)
    assert all(m.training for m in converted.modules()), "the mode is the model's"
    start = copy.deepcopy(model.state_dict())
    found, statistics = [], []
    for network in (model, converted):
        model.load_state_dict(start)
        torch.manual_seed(1)
        found.append(network(x))
        statistics.append(copy.deepcopy(model.state_dict()))
    assert_same(name, *found)
    assert all(torch.equal(statistics[0][k], statistics[1][k]) for k in start)
    if name in ("ViT", "inlined"):
        assert not torch.equal(found[0], converted.eval()(x)) and model.training


def test_other_solvers_solve_the_branches():
    """The truth is a step of the midpoint rule with the blocks' own branches."""
    model, x = made("pre-activation ResNet")
    converted = convert(model, x, solver="midpoint")
    with torch.no_grad():
        state = x
        for module in model:
            if isinstance(module, PreActBlock):
                state = state + module.branch(state + 0.5 * module.branch(state))
            else:
                state = module(state)
        torch.testing.assert_close(converted(x), state, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(converted(x), model(x), rtol=1e-3)
        for solver in ("rk4", "dopri5"):
            for stack in converted.stacks.values():
                stack.solver = solver
            assert converted(x).isfinite().all()


def test_a_transformer_of_tokens():
    """Sizes stay open, though a mask is made of them; the answer at other lengths is the model's."""
    torch.manual_seed(0)
    model = GPT(blocks=3).eval()
    converted = convert(model, torch.randint(0, 11, (2, 7)))
    assert [stack.depth for stack in converted.stacks.values()] == [6]
    for ids in (torch.randint(0, 11, (2, 7)), torch.randint(0, 11, (3, 4))):
        assert torch.equal(converted(ids), model(ids))
    assert_same_gradients(converted, model, ids)


def test_parallel_branches_are_one_field():
    """x + a(x) + m(x) is x + (a(x) + m(x)), in another order of rounding."""
    torch.manual_seed(0)
    model, ids = GPT(blocks=2, parallel=True).eval(), torch.randint(0, 11, (2, 7))
    converted = convert(model, ids)
    assert [stack.depth for stack in converted.stacks.values()] == [2]
    torch.testing.assert_close(converted(ids), model(ids), rtol=1e-5, atol=1e-6)


def test_branches_side_by_side_through_layers_that_do_nothing():
    """y = x + 2f(x), then y − tanh g(x): one block of the field 2f − tanh g, as the trace sees it."""

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g, self.same = nn.Linear(4, 4), nn.Linear(4, 4), nn.Identity()

        def forward(self, x):
            y = self.same(x + 2 * self.f(x))
            return self.same(y - torch.tanh(self.g(x)))

    torch.manual_seed(0)
    model, x = nn.Sequential(Parallel(), Parallel()), torch.randn(3, 4)
    converted = convert(model, x)
    stack = next(iter(converted.stacks.values()))
    torch.testing.assert_close(stack.field(0)(x), 2 * model[0].f(x) - torch.tanh(model[0].g(x)))
    torch.testing.assert_close(converted(x), model(x))


class Masked(nn.Module):
    """Blocks that are given a mask, and give a pair back, as Hugging Face's do."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, mask=None, scale=1.0):
            return x + scale * self.linear(x) * mask, None

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Block() for _ in range(3)])

    def forward(self, x, mask):
        for i, block in enumerate(self.blocks):
            x = block(x, mask=mask * i, scale=0.5)[0]
        return x


def test_what_a_block_is_given_beside_the_state():
    torch.manual_seed(0)
    model, x, mask = Masked(), torch.randn(2, 4), torch.rand(2, 4)
    converted = convert(model, (x, mask))
    [stack] = converted.stacks.values()
    assert stack.depth == 3
    other = torch.rand(2, 4, requires_grad=True)
    assert torch.equal(converted(x, other), model(x, other))
    (one,) = torch.autograd.grad(model(x, other).sum(), other)
    (two,) = torch.autograd.grad(converted(x, other).sum(), other)
    assert torch.equal(one, two), "gradients reach the mask"
    assert torch.equal(stack.refine(2)(x), copy.deepcopy(stack).refine(2)(x)), (
        "with the mask of the last call"
    )
    assert torch.equal(copy.deepcopy(converted)(x, mask), model(x, mask))


class Gates(nn.Module):
    """Blocks inlined in a row that read different gates; the last one reads an earlier state."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

    def forward(self, x, c):
        for gate, layer in zip(self.gates, self.layers, strict=False):
            x = x + torch.sigmoid(gate(c)) * layer(x)
        y = x + self.layers[3](torch.tanh(x))
        return y + x * torch.tanh(y @ self.gates[0].weight)


def test_contexts_of_blocks_in_one_forward():
    torch.manual_seed(0)
    model, x, c = Gates(), torch.randn(2, 4), torch.randn(2, 4)
    converted = convert(model, (x, c))
    assert torch.equal(converted(x, c), model(x, c))
    other = torch.randn(2, 4)
    assert torch.equal(converted(x, other), model(x, other))
    stack = next(iter(converted.stacks.values()))
    assert stack.depth == 3
    for field, gate, layer in zip(stack.fields, model.gates, model.layers, strict=False):
        torch.testing.assert_close(field(x), torch.sigmoid(gate(other)) * layer(x))
        assert field(x[:1]).shape == (1, 4) and field(torch.cat([x, x])).shape == (4, 4)


class Tapped(nn.Module):
    """States between blocks are read elsewhere."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([PreActBlock(3) for _ in range(3)])

    def forward(self, x):
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return x, states


def test_blocks_whose_states_are_read_stay_apart():
    model, x = Tapped().eval(), torch.randn(2, 3, 4, 4)
    converted = convert(model, x)
    assert [stack.depth for stack in converted.stacks.values()] == [1, 1, 1]
    for one, other in zip(converted(x)[1], model(x)[1], strict=True):
        assert torch.equal(one, other)


def test_a_swap_report_of_a_converted_network():
    model, x = made("pre-activation ResNet")
    converted = convert(model, x)
    rows = swap_report(converted, [(x, torch.tensor([0, 1]))], ["euler", "rk4"], [1]).rows
    assert [row.nfe for row in rows] == [5, 20] and rows[0].logit_drift == 0 < rows[1].logit_drift


def test_the_table():
    model, x = made("pre-activation ResNet")
    text = str(convert(model, x))
    assert (
        "4×10×10" in text
        and "6×5×5" in text
        and "1 left as they are (4): its shortcut is a projection" in text
    )


# -- refused


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(x + self.linear(x))


class Highway(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.linear = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        t = torch.sigmoid(self.gate(x))
        return t * torch.tanh(self.linear(x)) + (1 - t) * x


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Repeated(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(self.block(x))


class Choosing(Step):
    def forward(self, x):
        return x + self.linear(x) if x.sum() > 0 else x - self.linear(x)


class Counting(Step):
    """A number from a sum of constants, which leaves no trace in a graph."""

    def forward(self, x):
        ones = torch.ones(2)
        return x + float((ones + ones).sum()) * self.linear(x)


class Forgetful(Step):
    """Not the same in training: no dropout as a module, but another formula."""

    def forward(self, x):
        return x + self.linear(x) if self.training else x + self.linear(torch.relu(x))


class Cache:
    """Something that a block writes to."""


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = self.Block()

    class Block(Step):
        def forward(self, x, cache):
            cache.seen = x
            return super().forward(x)

    def forward(self, x):
        return self.block(x, Cache())


X = torch.randn(3, 4)
REFUSED = {
    "post-activation": (
        lambda: nn.Sequential(Bottleneck(8, 2), Bottleneck(8, 2)),
        torch.randn(1, 8, 4, 4),
        "2 left .*ReLU follows the sum",
    ),
    "identity module": (
        lambda: HFResNet(),
        {"pixel_values": torch.randn(1, 3, 8, 8)},
        "3 left .*ReLU follows",
    ),
    "post-norm": (lambda: nn.Sequential(PostNorm(), PostNorm()), X, "2 left .*LayerNorm follows the sum"),
    "gated": (lambda: nn.Sequential(Highway(), Highway()), X, "its shortcut is gated"),
    "shared": (
        lambda: Repeated(Step()),
        X,
        r"shared: block is called 2 times.*ResidualStack\(branch, depth=2\)",
    ),
    "data": (lambda: nn.Sequential(Choosing()), X, "values of a tensor"),
    "mode": (lambda: nn.Sequential(Forgetful()), X, "other things in training"),
    "constants": (lambda: nn.Sequential(Counting()), X, "adds constants"),
    "cache": (Cached, X, "given a Cache, which every stage would change"),
    "none": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), X, "no residual block was found"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_and_the_way_out(name):
    make, x, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){reason}.*blocks="):
        convert(make().eval(), x)


SOLVED = {
    "converted": (lambda: convert(nn.Sequential(Step(), Step()).eval(), X), X, r"stack \(2 blocks, euler\)"),
    "built": (
        lambda: build("odenet14", in_channels=1, solver="dopri5"),
        torch.randn(2, 1, 8, 8),
        r"layer1.0 \(2 blocks, dopri5\), layer2.1 \(1 block, dopri5\).*2 left as they are .*projection|size",
    ),
    "refined": (
        lambda: ResidualStack([nn.Linear(4, 4), nn.Linear(4, 4)]).refine(3),
        X,
        r"the network itself \(6 blocks, euler\)",
    ),
    "an ODE block": (
        lambda: nn.Sequential(ODEBlock(Autonomous(nn.Linear(4, 4)), solver="rk4", n_steps=2)),
        X,
        r"0 \(an ODE block\)",
    ),
}


@pytest.mark.parametrize("name", SOLVED)
def test_blocks_that_a_solver_advances_already_are_named(name):
    """Not "no residual block was found", nor x + (M(x) − x) of a solve M where blocks= names a stack."""
    make, x, places = SOLVED[name]
    model = make().eval()
    with pytest.raises(ValueError, match=f"(?s)nothing is left to convert.*already, in .*{places}"):
        convert(model, x)
    stack = next(n for n, m in model.named_modules() if isinstance(m, ResidualStack | ODEBlock))
    if stack:
        with pytest.raises(ValueError, match="nothing is left to convert"):
            convert(model, x, blocks=stack)


def test_a_single_activation_after_the_last_block_is_the_networks():
    """As before a head; the same within a block makes it post-activation, see above."""
    model = nn.Sequential(Step(), Step(), nn.ReLU(), nn.Linear(4, 2))
    assert [s.depth for s in convert(model, X).stacks.values()] == [2]


def test_an_inlined_post_activation_network():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = torch.relu(x + self.a(x))
            return torch.relu(x + self.b(x))

    with pytest.raises(ValueError, match="relu follows the sum"):
        convert(Network(), X)


def test_blocks_by_pattern():
    model, x = made("pre-activation ResNet")
    converted = convert(model, x, blocks=["1", "2"])
    assert [stack.depth for stack in converted.stacks.values()] == [2]
    assert torch.equal(converted(x), model(x))
    with pytest.raises(ValueError, match="names no module"):
        convert(model, x, blocks="layer*")
    with pytest.raises(ValueError, match="keep the state's shape"):
        convert(model, x, blocks="4")


def test_blocks_taken_whole():
    """What is no x + F(x) is taken as x + (M(x) − x): under Euler the same, under others M − 1 is the field."""
    torch.manual_seed(0)
    model = nn.Sequential(PostNorm(), PostNorm(), nn.Linear(4, 2)).eval()
    converted = convert(model, X, blocks=["0", "1"])
    [stack] = converted.stacks.values()
    assert stack.depth == 2
    torch.testing.assert_close(converted(X), model(X), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stack.field(0)(X), model[0](X) - X)
    place = converted.new_names["0.linear.weight"]
    assert dict(converted.named_parameters())[place] is model[0].linear.weight


def test_arguments():
    with pytest.raises(TypeError, match=r"an nn\.Module"):
        convert(lambda x: x, X)
    with pytest.raises(ValueError, match="solver must be one of"):
        convert(nn.Sequential(Step()), X, solver="rk5")


def test_a_call_of_another_form_is_refused():
    model, x, mask = Masked(), torch.randn(2, 4), torch.rand(2, 4)
    converted = convert(model, (x, mask))
    block = converted.network.blocks[0]
    with pytest.raises(ValueError, match=r"Block blocks\.0 was converted for a call of another form"):
        block(x, mask=mask, scale=0.25)


def test_a_condition_on_the_shape_is_kept():
    class Padding(Step):
        def forward(self, x):
            if x.shape[0] % 2:
                return x + self.linear(x)
            return x + 2 * self.linear(x)

    model = nn.Sequential(Padding(), Padding())
    converted = convert(model, torch.randn(3, 4))
    assert torch.equal(converted(X), model(X))
    with pytest.raises(ValueError, match="another branch of its forward"):
        converted(torch.randn(2, 4))
