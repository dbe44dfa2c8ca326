"""What a stack can do besides solving: coarsen, learn its steps, drop blocks, hold its statistics; ODEBlock."""

import copy
import math

import pytest
import torch
from torch import nn

from resode import METHODS, ODEBlock, ResidualStack
from resode.blocks import StochasticDepth
from resode.fields import AntisymmetricField, Autonomous, ConvField, HamiltonianField

EXPLICIT = [name for name, tableau in METHODS.items() if tableau.explicit]


def smooth(width=3):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)).double()


# Coarsening.


@pytest.mark.parametrize("weights", ["constant", "linear"])
@pytest.mark.parametrize("learn_step", [False, "block", "channel"])
def test_coarsening_undoes_refining(weights, learn_step):
    """To the bit, with batch-norm statistics; steps of η/k add up to η again."""
    torch.manual_seed(0)
    stack = ResidualStack(
        [ConvField(4) for _ in range(3)], step_size=0.5, weights=weights, learn_step=learn_step
    )
    stack(torch.randn(8, 4, 5, 5))  # statistics of its own in each block
    again = stack.refine(4).coarsen(4)
    assert (again.depth, again.step_size) == (3, 0.5)
    for (name, a), b in zip(stack.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b) or (name == "step_sizes" and torch.allclose(a, b, rtol=1e-6)), name
    assert again.stochastic_depth == stack.stochastic_depth


def test_coarsening_a_shared_field_divides_its_depth():
    stack = ResidualStack(smooth(), depth=6, step_size=0.5)
    coarser = stack.coarsen(3)
    assert (coarser.depth, coarser.step_size, len(coarser.fields)) == (2, 1.5, 1)
    assert coarser.fields[0] is not stack.fields[0], "a copy"
    stack = ResidualStack([smooth() for _ in range(4)], step_size=0.5, stochastic_depth=[0.0, 0.1, 0.2, 0.3])
    coarser = stack.coarsen(2)
    assert coarser.stochastic_depth == (0.0, 0.2)
    assert torch.equal(coarser.fields[1][0].weight, stack.fields[2][0].weight), "sampled at the left end"


@pytest.mark.parametrize("k", [4, 0, 1.5, True])
def test_coarsening_needs_a_divisor(k):
    with pytest.raises(ValueError, match="whole number"):
        ResidualStack(smooth(), depth=6).coarsen(k)


def test_linear_refinement_interpolates_statistics_as_evaluation_does():
    """rk4's midpoint in a block and the refined stack's node there read the same running statistics."""
    torch.manual_seed(0)
    stack = ResidualStack([ConvField(4) for _ in range(2)], step_size=0.5, weights="linear").double()
    for _ in range(3):
        stack(torch.randn(8, 4, 5, 5, dtype=torch.float64) * 3)
    stack.eval()
    nodes = [field.bn1.running_mean for field in stack.fields]
    finer = stack.refine(2)
    assert torch.allclose(finer.fields[1].bn1.running_mean, (nodes[0] + nodes[1]) / 2, rtol=1e-12)
    assert torch.equal(finer.fields[3].bn1.running_mean, nodes[1])
    # two Euler substeps of the whole block are the two Euler blocks of the refined one
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    stack.substeps = 2
    assert torch.allclose(finer(x), stack(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
def test_linear_weights_move_their_nodes_statistics_once(solver):
    torch.manual_seed(0)
    reference = ResidualStack([ConvField(4) for _ in range(2)], step_size=0.1)
    stack = ResidualStack(
        [copy.deepcopy(f) for f in reference.fields],
        step_size=0.1, weights="linear", solver=solver, substeps=2, per_sample=False,
    )  # fmt: skip
    x = torch.randn(6, 4, 5, 5)
    reference(x)
    stack(x).sum().backward()
    first = [dict(s.fields[0].named_buffers()) for s in (stack, reference)]
    assert all(torch.allclose(first[0][name], first[1][name], atol=1e-6) for name in first[0])
    assert [int(f.bn1.num_batches_tracked) for f in stack.fields] == [1, 1]


# Learnt steps.


def test_steps_learnt_by_channel_are_a_layer_scale():
    """x + diag(η)F(x), and dL/dη = Σ over samples and pixels of g ⊙ F(x)."""
    stack = ResidualStack([ConvField(4, norm="none")], step_size=1e-4, learn_step="channel").double()
    assert stack.step_sizes.shape == (1, 4), "as the field's first layer says"
    x, g = (torch.randn(3, 4, 5, 5, dtype=torch.float64) for _ in range(2))
    y = stack(x)
    f = stack.fields[0](x)
    assert torch.allclose(y, x + 1e-4 * f, rtol=1e-14)
    (y * g).sum().backward()
    assert torch.allclose(stack.step_sizes.grad[0], (g * f).sum((0, 2, 3)), rtol=1e-10)
    for solver in ("rk4", "dopri5"):
        stack.solver = solver
        with torch.no_grad():
            stack.step_sizes.copy_(torch.tensor([[0.0, 1.0, 0.5, 0.0]]))
        moved = (stack(x) != x).flatten(2).any(2).any(0)
        assert moved.tolist() == [False, True, True, False], "η = 0 leaves its channel as it is"


def test_steps_learnt_by_channel_solve_the_scaled_equation():
    """With η = diag(η_c), rk4's step is R(diag(η)A) x: the stages see the scaled field too."""
    stack = ResidualStack([nn.Linear(3, 3, bias=False).double()], solver="rk4", learn_step="channel").double()
    eta = torch.tensor([0.1, 0.7, -0.3], dtype=torch.float64)
    with torch.no_grad():
        stack.step_sizes.copy_(eta[None])
    Z = torch.diag(eta) @ stack.fields[0].weight.detach()
    R = sum(torch.linalg.matrix_power(Z, k) / math.factorial(k) for k in range(5))
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.allclose(stack(x), x @ R.T, rtol=1e-12, atol=1e-13)
    finer = stack.refine(2)
    assert finer.step_sizes.shape == (2, 3) and torch.equal(finer.step_sizes[1], eta / 2)


def test_state_dicts_stay_the_same_across_solvers_with_learnt_steps():
    stack = ResidualStack([smooth() for _ in range(2)], learn_step="channel", channels=3)
    names = list(stack.state_dict())
    assert names[0] == "step_sizes"
    stack.solver = "rk4"
    assert list(stack.state_dict()) == names
    other = ResidualStack([smooth() for _ in range(2)], learn_step="channel", channels=3, solver="dopri5")
    other.load_state_dict(stack.state_dict())
    with pytest.raises(ValueError, match=r"step_sizes \(2, 3\), not \(2,\)"):
        ResidualStack([smooth() for _ in range(2)], learn_step=True).load_state_dict(stack.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"learn_step": "row"}, ValueError, "False, True, block, channel; got 'row'"),
        ({"learn_step": 1}, ValueError, "got 1"),
        ({"channels": 3}, ValueError, "learn_step='channel'"),
        ({"channels": 0, "learn_step": "channel"}, ValueError, "at least 1, got 0"),
        ({"stochastic_depth": 1.0}, ValueError, "below 1, got 1.0"),
        ({"stochastic_depth": [0.1, 0.2]}, ValueError, "got 2 for 1 blocks"),
        ({"stochastic_depth": "half"}, ValueError, "got 'half'"),
    ],
)  # fmt: skip
def test_wrong_steps_and_probabilities_say_the_rule(options, error, message):
    with pytest.raises(error, match=message):
        ResidualStack([nn.Linear(3, 3)], **options)


def test_a_number_of_channels_that_nobody_says_is_asked_for():
    with pytest.raises(ValueError, match="needs channels="):
        ResidualStack([nn.Tanh()], learn_step="channel")
    stack = ResidualStack([nn.Tanh()], learn_step="channel", channels=4)
    with pytest.raises(ValueError, match=r"4 channels.*got x \(2, 3\)"):
        stack(torch.ones(2, 3))


def test_linear_weights_need_the_same_layers():
    def field(activation):
        return nn.Sequential(nn.Linear(2, 2), activation)

    with pytest.raises(ValueError, match=r"block 1 has ReLU\(\) where block 0 has Tanh\(\) \(1\)"):
        ResidualStack([field(nn.Tanh()), field(nn.ReLU())], weights="linear")
    with pytest.raises(ValueError, match=r"negative_slope=0.3"):
        ResidualStack([field(nn.LeakyReLU(0.1)), field(nn.LeakyReLU(0.3))], weights="linear")
    with pytest.raises(ValueError, match=r"block 1 has Sigmoid\(\) where block 0 has nothing \(2\)"):
        ResidualStack([field(nn.Tanh()), field(nn.Tanh()).append(nn.Sigmoid())], weights="linear")
    with pytest.raises(ValueError, match=r"block 1 has nothing where block 0 has Sigmoid\(\) \(2\)"):
        ResidualStack([field(nn.Tanh()).append(nn.Sigmoid()), field(nn.Tanh())], weights="linear")
    with pytest.raises(ValueError, match=r"gamma=0.9\) where block 0 has .*gamma=0.1"):
        ResidualStack([AntisymmetricField(4, gamma=gamma) for gamma in (0.1, 0.9)], weights="linear")
    with pytest.raises(ValueError, match=r"leapfrog=1\) where block 0 has .*leapfrog=0"):
        ResidualStack([HamiltonianField(4, leapfrog=eta) for eta in (0.0, 1.0)], weights="linear")


# Stochastic depth.


@pytest.mark.parametrize("solver", EXPLICIT)
@pytest.mark.parametrize("gradient", ["autograd", "checkpoint"])
def test_a_dropped_sample_stays_and_a_kept_one_makes_up_for_it(solver, gradient):
    """Two outcomes a block, x and x + (Φ(x) − x) / (1 − p), whatever the stages and substeps: mean Φ(x)."""
    torch.manual_seed(0)
    stack = ResidualStack(
        [smooth()], solver=solver, substeps=2, stochastic_depth=0.25, gradient=gradient, step_size=0.7
    )  # fmt: skip
    x = torch.randn(1, 3, dtype=torch.float64).expand(400, 3)
    phi = stack.eval()(x)
    y = stack.train()(x)
    dropped = (y == x).all(1)
    kept = x + (phi - x) / 0.75
    assert torch.allclose(y[~dropped], kept[~dropped], atol=1e-9)
    # 4 standard deviations of a share of 400
    assert dropped.double().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 400))


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_masks_are_drawn_anew_for_each_block_and_call(solver):
    torch.manual_seed(0)
    field = nn.Linear(1, 1)
    nn.init.zeros_(field.weight)
    nn.init.ones_(field.bias)
    stack = ResidualStack(field, depth=2, solver=solver, stochastic_depth=[0.5, 0.5])
    y = stack(torch.zeros(4000, 1))
    counts = [(y - value).abs().lt(1e-6).double().mean().item() for value in (0.0, 2.0, 4.0)]
    assert sum(counts) == pytest.approx(1.0)
    assert counts == pytest.approx([0.25, 0.5, 0.25], abs=4 * 0.5 / math.sqrt(4000)), "independent blocks"
    assert not torch.equal(stack(torch.zeros(4000, 1)), y)
    assert torch.equal(stack.eval()(torch.zeros(2, 1)), torch.full((2, 1), 2.0))


@pytest.mark.parametrize("solver", EXPLICIT)
def test_stochastic_depth_inside_a_field_holds_its_mask_through_the_block(solver):
    """F = 1 where kept: with one mask a block, x moves by 0 or 2 and nothing between."""
    torch.manual_seed(0)
    constant = nn.Linear(1, 1)
    nn.init.zeros_(constant.weight)
    nn.init.ones_(constant.bias)
    field = nn.Sequential(constant, StochasticDepth(0.5))
    stack = ResidualStack(field, depth=1, solver=solver, substeps=3)
    values = stack(torch.zeros(64, 1)).round(decimals=5)
    assert set(values.flatten().tolist()) == {0.0, 2.0}
    block = ODEBlock(Autonomous(field), solver=solver, n_steps=3)
    assert set(block(torch.zeros(64, 1)).round(decimals=5).flatten().tolist()) == {0.0, 2.0}
    assert field[1].masks is None
    assert torch.allclose(stack.eval()(torch.zeros(2, 1)), torch.ones(2, 1))


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
def test_gradients_see_the_mask_that_the_forward_pass_drew(solver):
    """Checkpointed too; a sample that every block dropped has passed unchanged, and so has its gradient."""
    torch.manual_seed(0)
    stack = ResidualStack([smooth() for _ in range(2)], solver=solver, stochastic_depth=0.5)
    x = torch.randn(32, 3, dtype=torch.float64, requires_grad=True)
    results = {}
    for stack.gradient in ("autograd", "checkpoint"):
        torch.manual_seed(3)
        y = stack(x)
        dropped = (y == x).all(1)
        assert dropped.any() and not dropped.all()
        grads = torch.autograd.grad(y.square().sum(), [x, *stack.parameters()])
        assert torch.equal(grads[0][dropped], 2 * x.detach()[dropped])
        assert (grads[0][~dropped] != 2 * x.detach()[~dropped]).any()
        results[stack.gradient] = (y, *grads)
    for a, b in zip(results["autograd"], results["checkpoint"], strict=True):
        assert torch.equal(a, b)


# ODEBlock.


@pytest.mark.parametrize(("solver", "n_steps"), [("rk4", 2), ("dopri5", None)])
@pytest.mark.parametrize("gradient", ["autograd", "adjoint"])
def test_an_ode_blocks_statistics_move_once_a_call(solver, n_steps, gradient):
    """At the first evaluation, of the input itself; not on the adjoint's way back either."""
    torch.manual_seed(0)
    field = ConvField(4)
    reference = copy.deepcopy(field)
    x = torch.randn(6, 4, 5, 5)
    reference(x)
    block = ODEBlock(Autonomous(field), solver=solver, n_steps=n_steps, gradient=gradient, per_sample=False)
    block(x).sum().backward()
    assert field.bn1.num_batches_tracked == 1 and field.bn1.momentum == 0.1
    for (name, a), b in zip(field.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert field.conv1.weight.grad.abs().max() > 0
    block(x)
    assert field.bn1.num_batches_tracked == 2


def test_an_ode_block_refuses_dropout_in_training():
    block = ODEBlock(Autonomous(nn.Dropout()), solver="rk4", n_steps=1)
    with pytest.raises(ValueError, match="new mask at every stage"):
        block(torch.ones(1, 3))
    block.eval()(torch.ones(1, 3))
    ODEBlock(Autonomous(nn.Dropout()), solver="euler", n_steps=1)(torch.ones(1, 3))


def test_an_ode_blocks_field_keeps_its_callbacks():
    field, seen = Autonomous(nn.Linear(2, 2)), []
    field.callback_step = lambda t, y, dt: seen.append(float(t))
    ODEBlock(field, solver="rk4", n_steps=4)(torch.ones(1, 2))
    assert seen == [0.0, 0.25, 0.5, 0.75]


def test_an_adaptive_ode_block_refuses_bf16():
    block = ODEBlock(Autonomous(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"dopri5 can't control an error in torch\.bfloat16"):
        block.bfloat16()(torch.ones(1, 2).bfloat16())
    fixed = ODEBlock(Autonomous(nn.Linear(2, 2)), solver="rk4", n_steps=2).bfloat16()
    assert fixed(torch.ones(1, 2).bfloat16()).dtype == torch.bfloat16


# What fields and steps must be, also where autograd does not look or the block was built before.


@pytest.mark.parametrize("solver", ["euler", "rk4"])
@pytest.mark.parametrize("weights", ["constant", "linear"])
def test_in_place_fields_are_refused_with_and_without_gradients(solver, weights):
    stack = ResidualStack(
        [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2)) for _ in range(2)],
        solver=solver,
        weights=weights,
    )
    for grad in (False, True):
        with pytest.raises(ValueError, match=r"Sequential of block 0 does.*inplace=False"):
            stack(torch.full((1, 2), -1.0, requires_grad=grad))
    with torch.inference_mode(), pytest.raises(ValueError, match="block 0 does"):
        stack(torch.full((1, 2), -1.0))
    fine = ResidualStack([nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))], solver=solver)
    with torch.inference_mode():
        fine(torch.ones(1, 2))
    fine(torch.ones(1, 2, requires_grad=True))


def test_attentions_own_dropout_is_refused_too():
    class Field(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dropout=p, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    with pytest.raises(ValueError, match=r"MultiheadAttention \(attention\) draws a new mask"):
        ResidualStack([Field(0.5)], solver="rk4")(torch.ones(1, 2, 4))
    for stack in (
        ResidualStack([Field(0.5)], solver="rk4").eval(),
        ResidualStack([Field(0.0)], solver="rk4"),
    ):
        assert stack(torch.ones(1, 2, 4)).shape == (1, 2, 4)


def test_masks_have_the_states_precision():
    """What is kept is scaled by 1 / (1 − p) to float64's rounding: F = 1 gives 0 or 1 / 0.7."""
    one = nn.Linear(1, 1).double()
    nn.init.zeros_(one.weight)
    nn.init.ones_(one.bias)
    stack = ResidualStack([one], solver="rk4", stochastic_depth=0.3)
    torch.manual_seed(0)
    kept = {round(v, 14) for v in stack(torch.zeros(50, 1, dtype=torch.float64)).flatten().tolist()}
    assert kept == {0.0, round(1 / 0.7, 14)}


@pytest.mark.parametrize("weights", ["constant", "linear"])
def test_checkpointed_graphs_can_be_kept_and_differentiated_twice(weights):
    """Each backward pass computes the blocks again, with the same masks and without moving statistics."""

    def derivatives(gradient):
        torch.manual_seed(0)
        field = [
            nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Tanh(), StochasticDepth(0.4)) for _ in "ab"
        ]
        stack = ResidualStack(field, solver="rk4", weights=weights, gradient=gradient, step_size=0.2).double()
        x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        loss = stack(x).square().sum()
        (again,) = torch.autograd.grad(loss, x, retain_graph=True)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        assert torch.equal(first, again)
        return [first, second, *stack.buffers()]

    for a, b in zip(derivatives("autograd"), derivatives("checkpoint"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("eta", "error"),
    [
        (0, ValueError),
        (-1.0, ValueError),
        (math.inf, ValueError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_a_step_is_checked_when_it_is_set_too(eta, error):
    stack = ResidualStack(smooth(), depth=2)
    with pytest.raises(error, match="step_size must be"):
        stack.step_size = eta
    with pytest.raises(error, match="step_size must be"):
        ResidualStack(smooth(), depth=2, step_size=eta)
    stack.step_size = 0.25
    assert stack.step_size == 0.25


def test_learnt_steps_are_not_set_by_the_number_they_started_from():
    stack = ResidualStack(smooth(), depth=2, step_size=0.5, learn_step=True)
    with pytest.raises(ValueError, match="set the parameter step_sizes"):
        stack.step_size = 0.25
    assert stack.step_size == 0.5 and stack.step_sizes.tolist() == [0.5, 0.5]


def test_steps_that_were_frozen_stay_so():
    stack = ResidualStack(smooth(), depth=2, learn_step=True)
    for frozen in (False, True):
        stack.step_sizes.requires_grad_(not frozen)
        assert stack.refine(2).step_sizes.requires_grad is not frozen
        assert stack.coarsen(2).step_sizes.requires_grad is not frozen


class InPlace(nn.Module):
    """Changes its input by a function, which no attribute of a module tells."""

    def forward(self, x):
        return -x.relu_()


def test_a_function_that_changes_the_state_is_seen_in_inference_mode():
    with torch.inference_mode(), pytest.raises(ValueError, match="InPlace of block 0 does"):
        ResidualStack(InPlace(), depth=2)(torch.ones(1, 2))


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_a_compiled_graph_gives_a_field_that_writes_a_copy(solver):
    """It can't look at versions. By hand, η = 1, F(x) = −relu(x): −1 stays −1, and 2 becomes R(−1)² · 2."""
    stack = ResidualStack(InPlace(), depth=2, solver=solver)
    x = torch.tensor([[-1.0, 2.0]])
    with torch.no_grad():
        y = torch.compile(stack, fullgraph=True, backend="eager")(x)
    growth = {"euler": 0.0, "rk4": 1 - 1 + 1 / 2 - 1 / 6 + 1 / 24}[solver]
    torch.testing.assert_close(y, torch.tensor([[-1.0, 2 * growth**2]]))
    assert x.tolist() == [[-1.0, 2.0]]


def test_an_empty_batch_is_refused_where_each_sample_has_its_steps():
    with pytest.raises(ValueError, match=r"at least one sample, got \(0, 3\)"):
        ResidualStack(smooth(), depth=2, solver="dopri5")(torch.ones(0, 3).double())
    assert ResidualStack(smooth(), depth=2, solver="rk4")(torch.ones(0, 3).double()).shape == (0, 3)
