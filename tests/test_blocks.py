"""Residual stacks: Euler is the ResNet to the bit, and every other method solves the same equation."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import resode
from resode import METHODS, ODEBlock, ResidualStack

EXPLICIT = [name for name, tableau in METHODS.items() if tableau.explicit]
FIXED = [name for name in EXPLICIT if not METHODS[name].adaptive]


class PreActivation(nn.Module):
    """norm-relu-conv-norm-relu-conv, as He et al. (2016) place them."""

    def __init__(self, width=4, norm=True):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x):
        x = self.conv1(torch.relu(self.norm1(x)))
        return self.conv2(torch.relu(self.norm2(x)))


class Recorder(nn.Module):
    """A constant field that notes every call."""

    def __init__(self, value, seen):
        super().__init__()
        self.value, self.seen = value, seen

    def forward(self, x):
        self.seen.append(self.value)
        return torch.full_like(x, self.value)


def smooth(width=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)).double()


@pytest.mark.parametrize("step_size", [1.0, 0.3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_euler_is_a_hand_written_preactivation_resnet_to_the_bit(step_size, shared, train):
    torch.manual_seed(0)
    fields = [PreActivation() for _ in range(1 if shared else 5)]
    stack = (
        ResidualStack(fields[0], depth=5, step_size=step_size)
        if shared
        else ResidualStack(fields, step_size=step_size)
    )
    stack.train(train)
    by_hand = copy.deepcopy(stack)
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    y = stack(x)
    z = x
    for index in range(5):
        field = by_hand.fields[0 if shared else index]
        z = z + field(z) if step_size == 1.0 else z + step_size * field(z)
    assert torch.equal(y, z)
    weights = torch.randn_like(y)
    got = torch.autograd.grad((y * weights).sum(), [x, *stack.parameters()])
    expected = torch.autograd.grad((z * weights).sum(), [x, *by_hand.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(stack.buffers(), by_hand.buffers(), strict=True))


@pytest.mark.parametrize("solver", EXPLICIT)
def test_no_stage_of_a_block_reads_the_next_blocks_weights(solver):
    """The last stage of rk4 lies at the block's end, where a clock would already name the next block."""
    seen = []
    stack = ResidualStack([Recorder(float(v), seen) for v in (1, 2, 4)], step_size=0.5, solver=solver)
    y = stack(torch.zeros(2, 1))
    assert seen == sorted(seen), "blocks in order, each with its own weights only"
    assert set(seen) == {1.0, 2.0, 4.0}
    assert torch.allclose(y, torch.full((2, 1), 3.5)), "η (1 + 2 + 4), exactly what the pieces integrate to"


@pytest.mark.parametrize("solver", EXPLICIT)
def test_each_solver_is_its_own_step_map(solver):
    """One block of a linear field is R(ηλ) x for every fixed method, exp(ηλ) x within tolerance else."""
    stack = ResidualStack(
        nn.Linear(1, 1, bias=False).double(), depth=1, step_size=0.7, solver=solver, rtol=1e-9, atol=1e-9
    )
    with torch.no_grad():
        stack.fields[0].weight.fill_(-1.5)
    z = -1.05
    order = METHODS[solver].order
    value = float(stack(torch.ones(1, 1, dtype=torch.float64)).detach())
    if METHODS[solver].adaptive:
        assert value == pytest.approx(math.exp(z), abs=1e-7)
    else:
        assert value == pytest.approx(sum(z**k / math.factorial(k) for k in range(order + 1)), abs=1e-14)


def test_swapping_the_solver_in_place_keeps_weights_and_state_dict():
    stack = ResidualStack([PreActivation() for _ in range(2)]).eval()
    before = copy.deepcopy(stack.state_dict())
    x = torch.randn(2, 4, 5, 5)
    results = {}
    for solver in EXPLICIT:
        stack.solver = solver
        assert stack.solver == solver
        results[solver] = stack(x)
    assert list(stack.state_dict()) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(stack.state_dict().values(), before.values(), strict=True))
    stack.solver = "euler"
    assert torch.equal(stack(x), results["euler"])
    assert not torch.equal(results["euler"], results["rk4"])


@pytest.mark.parametrize("solver", FIXED)
def test_substeps_converge_to_the_flow_at_the_methods_order(solver):
    """Shared smooth field: error against a fine reference falls as substeps^−p."""
    stack = ResidualStack(smooth(), depth=2, step_size=1.0, solver="dopri8", rtol=1e-13, atol=1e-13)
    x = torch.randn(4, 3, dtype=torch.float64)
    exact = stack(x)
    stack.solver = solver
    errors = []
    for n in (8, 16):
        stack.substeps = n
        errors.append(float((stack(x) - exact).detach().norm()))
        assert stack.stats.nfe == 2 * n * METHODS[solver].stages
    assert math.log2(errors[0] / errors[1]) >= METHODS[solver].order - 0.2


def test_refinement_of_a_shared_field_is_more_substeps():
    stack = ResidualStack(smooth(), depth=3, step_size=0.5, solver="midpoint")
    x = torch.randn(4, 3, dtype=torch.float64)
    finer = stack.refine(4)
    assert (finer.depth, finer.step_size, len(finer.fields)) == (12, 0.125, 1)
    stack.substeps = 4
    assert torch.allclose(finer(x), stack(x), rtol=0, atol=1e-15)


def test_refining_own_fields_copies_weights_and_batch_norm_statistics():
    stack = ResidualStack([PreActivation() for _ in range(2)], step_size=0.8)
    stack.train()
    stack(torch.randn(8, 4, 5, 5))
    stack.eval()
    finer = stack.refine(3)
    assert finer.depth == len(finer.fields) == 6
    assert torch.equal(finer.fields[4].norm1.running_mean, stack.fields[1].norm1.running_mean)
    x = torch.randn(2, 4, 5, 5)
    stack.substeps = 3
    assert torch.allclose(finer(x), stack(x), atol=1e-6)
    finer.fields[0].conv1.weight.data.zero_()
    assert stack.fields[0].conv1.weight.abs().sum() > 0, "copies, not views"


def test_linear_weights_lie_on_the_lines_between_nodes():
    """F = b(t), b through nodes 0, 1, 3 at 0, ½, 1, held to 1.5: ∫ = ½(½ + 2 + 3) = 2.75, by rk4 exactly."""
    fields = [nn.Linear(1, 1).double() for _ in range(3)]
    for field, value in zip(fields, (0.0, 1.0, 3.0), strict=True):
        nn.init.zeros_(field.weight)
        nn.init.constant_(field.bias, value)
    x = torch.zeros(2, 1, dtype=torch.float64)
    stack = ResidualStack(fields, step_size=0.5, weights="linear", per_sample=False)
    assert torch.allclose(stack(x), x + 2.0), "Euler takes the left nodes: ½(0 + 1 + 3)"
    for solver in ("midpoint", "rk4", "dopri5"):
        stack.solver = solver
        assert torch.allclose(stack(x), x + 2.75, atol=1e-12), solver
    finer = stack.refine(2)
    assert [f.bias.item() for f in finer.fields] == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0]


def test_learned_steps_start_at_step_size_and_get_the_gradient_of_alpha():
    """dL/dη_l = g_lᵀ F_l(x_l), g_l the gradient at the block's output (claim B5); 0 is ReZero."""
    stack = ResidualStack([smooth() for _ in range(2)], step_size=0.0, learn_step=True).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(stack(x), x)
    weights = torch.randn(4, 3, dtype=torch.float64)
    (stack(x) * weights).sum().backward()
    expected = [(weights * stack.field(i)(x)).sum() for i in range(2)]
    assert torch.allclose(stack.step_sizes.grad, torch.stack(expected))
    for solver in ("rk4", "dopri5"):
        stack.solver = solver
        assert torch.equal(stack(x), x)


def test_return_path_holds_every_block_boundary():
    stack = ResidualStack([smooth() for _ in range(3)], step_size=0.5, solver="rk4")
    x = torch.randn(2, 3, dtype=torch.float64)
    y, path = stack(x, return_path=True)
    assert path.shape == (4, 2, 3)
    assert torch.equal(path[0], x) and torch.equal(path[-1], y)
    first = ResidualStack([stack.fields[0]], step_size=0.5, solver="rk4")
    assert torch.equal(first(x), path[1])


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
@pytest.mark.parametrize("gradient", ["autograd", "checkpoint"])
def test_running_statistics_move_once_a_block_call_whatever_the_solver(solver, gradient):
    """At the first stage, which reads the same input under every solver: the statistics agree to the bit."""
    torch.manual_seed(0)
    reference = ResidualStack([PreActivation()], step_size=0.1)
    stack = copy.deepcopy(reference)
    stack.solver, stack.substeps, stack.gradient = solver, 2, gradient
    x = torch.randn(6, 4, 5, 5)
    reference(x)
    stack(x).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(stack.buffers(), reference.buffers(), strict=True))
    assert stack.fields[0].norm1.num_batches_tracked == 1 and stack.fields[0].norm1.momentum == 0.1


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
def test_checkpointing_gives_the_same_gradient_and_counts_its_calls(solver):
    stack = ResidualStack([smooth() for _ in range(3)], solver=solver)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(stack(x).square().sum(), [x, *stack.parameters()])
    stack.gradient = "checkpoint"
    got = torch.autograd.grad(stack(x).square().sum(), [x, *stack.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    nfe = stack.stats.nfe if solver != "dopri5" else int(stack.stats.nfe.max())
    assert nfe // 2 < stack.stats.nfe_backward <= nfe


def test_a_samples_answer_does_not_depend_on_its_neighbours():
    stack = ResidualStack([smooth() for _ in range(2)], step_size=9.0, solver="dopri5")
    x = torch.randn(8, 3, dtype=torch.float64) * torch.linspace(0.1, 9, 8, dtype=torch.float64)[:, None]
    together = stack(x)
    assert stack.stats.nfe.shape == (8,) and len(set(stack.stats.nfe.tolist())) > 1
    assert torch.allclose(torch.cat([stack(row) for row in x.split(1)]), together, atol=1e-12)
    stack.per_sample = False
    alone = torch.cat([stack(row) for row in x.split(1)])
    assert (alone - stack(x)).abs().max() > 1e-7, "one step for all: the neighbours move the answer"
    assert isinstance(stack.stats.nfe, int)


@pytest.mark.parametrize("solver", ["euler", "rk4", "tsit5"])
def test_stack_can_be_copied_pickled_compiled_and_exported_after_a_call(solver):
    stack = ResidualStack([PreActivation(norm=False) for _ in range(2)], solver=solver).eval()
    x = torch.randn(2, 4, 5, 5)
    y = stack(x)
    assert torch.equal(copy.deepcopy(stack)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(stack))(x), y)
    if solver != "tsit5":
        assert torch.allclose(torch.compile(stack, backend="eager", fullgraph=True)(x), y)
        assert torch.allclose(torch.export.export(stack, (x,)).module()(x), y)


def test_autocast_keeps_the_state_in_float32():
    stack = ResidualStack([PreActivation(norm=False) for _ in range(2)], solver="rk4")
    x = torch.randn(2, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = stack(x)
    assert y.dtype == torch.float32
    assert torch.allclose(y, stack(x), atol=0.1)


def test_channels_last_goes_through():
    stack = ResidualStack([PreActivation() for _ in range(2)], solver="rk4").to(
        memory_format=torch.channels_last
    )
    y = stack(torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ResidualStack(nn.Linear(2, 2)), ValueError, "shared field needs depth"),
        (lambda: ResidualStack([nn.Linear(2, 2)] * 2, depth=3), ValueError, "depth=3 and 2 fields disagree"),
        (lambda: ResidualStack([]), TypeError, "got an empty sequence"),
        (lambda: ResidualStack(None), TypeError, "non-empty sequence of them, got NoneType"),
        (lambda: ResidualStack(3, depth=3), TypeError, "got int"),
        (lambda: ResidualStack([torch.tanh]), TypeError, "got builtin_function"),
        (lambda: ResidualStack(nn.Linear(2, 2), depth=0), ValueError, "at least 1, got 0"),
        (lambda: ResidualStack(nn.Linear(2, 2), depth=1, solver="rk5"), ValueError, "solver must be one of euler"),
        (lambda: ResidualStack(nn.Linear(2, 2), depth=1, solver="radau"), ValueError, "got 'radau'"),
        (lambda: ResidualStack(nn.Linear(2, 2), depth=1, step_size=0.0), ValueError, "positive and finite"),
        (lambda: ResidualStack(nn.Linear(2, 2), depth=1, step_size=math.nan), ValueError, "got nan"),
        (lambda: ResidualStack(nn.Linear(2, 2), depth=1, substeps=0), ValueError, "at least 1, got 0"),
        (lambda: ResidualStack(nn.Linear(2, 2), depth=1, weights="cubic"), ValueError, "constant, linear"),
        (lambda: ResidualStack(nn.Linear(2, 2), depth=1, gradient="none"), ValueError, "autograd, checkpoint"),
        (lambda: ResidualStack([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)], weights="linear"), ValueError,
         r"block 1 and block 0 differ in bias \(2,\)"),
        (lambda: ResidualStack(nn.Linear(2, 2), depth=1, steps=3), TypeError, "steps"),
        (lambda: ODEBlock(lambda t, x: -x, solver="rk4"), ValueError, "give n_steps"),
        (lambda: ODEBlock(lambda t, x: -x, t=(1.0, 1.0)), ValueError, "two different finite times"),
    ],
)  # fmt: skip
def test_wrong_arguments_say_the_rule(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("stack", "x", "error", "message"),
    [
        (ResidualStack([nn.Linear(3, 2)]), torch.ones(4, 3), ValueError, r"x \(4, 3\), F\(x\) \(4, 2\)"),
        (ResidualStack([nn.ReLU(inplace=True)]), torch.ones(1, 3), ValueError, r"ReLU of block 0 does.*inplace=False"),
        (ResidualStack([nn.Dropout()], solver="rk4"), torch.ones(1, 3), ValueError, "new mask at every stage"),
        (ResidualStack([nn.Tanh()]), torch.ones(3, dtype=torch.int64), TypeError, "got torch.int64"),
        (ResidualStack([nn.Tanh()], solver="dopri5"), torch.ones(3), ValueError, r"got \(3,\)"),
        (ResidualStack([nn.Tanh()], solver="dopri5"), torch.ones(3, 1).bfloat16(), TypeError, "torch.bfloat16"),
        (ResidualStack([nn.Linear(1, 1)] * 2, solver="dopri5", weights="linear"), torch.ones(2, 1), ValueError,
         "per_sample=False"),
    ],
)  # fmt: skip
def test_wrong_states_and_fields_say_the_rule(stack, x, error, message):
    with pytest.raises(error, match=message):
        stack(x)


def test_dropout_is_fine_with_euler_and_in_evaluation():
    stack = ResidualStack([nn.Dropout()])
    stack(torch.ones(1, 3))
    stack.eval()
    stack.solver = "rk4"
    stack(torch.ones(1, 3))


def test_ode_block_solves_to_its_end_with_either_kind_of_steps():
    block = ODEBlock(lambda t, x: -2 * t * x * x, t=(0.0, 2.0), rtol=1e-8, atol=1e-8)
    x = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    exact = 1 / (1 / x + 4)
    assert torch.allclose(block(x), exact, atol=1e-6)
    assert block.stats.nfe.shape == (2,)
    fixed = ODEBlock(block.func, t=(0.0, 2.0), solver="rk4", n_steps=100)
    assert torch.allclose(fixed(x), exact, atol=1e-6)
    assert fixed.stats.nfe == 400
    with pytest.raises(resode.SolverError, match="t="):
        ODEBlock(lambda t, x: x * x, t=(0.0, 3.0), rtol=1e-2)(x)
