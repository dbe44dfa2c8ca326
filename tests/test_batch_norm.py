"""Batch norm inside a solver's step: one field during a block call, the one that evaluation meets."""

import copy

import pytest
import torch
from torch import nn

from resode import METHODS, ODEBlock, ResidualStack
from resode.blocks.statistics import measure_statistics
from resode.fields import Autonomous, ConvField

F64 = torch.float64
SEVERAL = [name for name, t in METHODS.items() if t.explicit and not t.adaptive and name != "euler"]


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def stack_of(solver, seed=0, depth=3, **options):
    torch.manual_seed(seed)
    return ResidualStack([ConvField(4) for _ in range(depth)], solver=solver, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("solver", "substeps"), [("midpoint", 1), ("rk4", 1), ("rk4", 2), ("euler", 3)])
def test_evaluation_meets_the_function_that_training_made(solver, substeps, seed):
    """After 200 passes over one batch the running statistics are its own, but for 0.9^200 and n/(n − 1).

    The running variance is the unbiased one: a share 1/(2n) = 1/4096 of the branch at n = 32·64 in each of six
    norms. The bound 0.02 leaves room for how nets amplify that; a statistic for each stage differs by 0.2 to 0.5.
    """
    stack = stack_of(solver, seed, substeps=substeps)
    x = torch.randn(32, 4, 8, 8)
    with torch.no_grad():
        for _ in range(200):
            trained = stack(x)
        evaluated = stack.eval()(x)
    assert float((trained - evaluated).norm() / trained.norm()) <= 0.02


@pytest.mark.parametrize("solver", SEVERAL)
def test_a_block_in_training_is_one_field(solver):
    """It equals the block in evaluation mode with the first stage's batch statistics, to rounding."""
    stack = stack_of(solver, depth=1, substeps=2).double()
    x = torch.randn(5, 4, 6, 6, dtype=F64)
    y = stack(x)
    fixed = copy.deepcopy(stack)
    field, seen = fixed.fields[0], {}
    for norm in norms(field):
        norm.register_forward_pre_hook(lambda m, inputs: seen.setdefault(m, inputs) and None)
    fixed(x)
    for norm, (inputs,) in seen.items():
        norm.running_var, norm.running_mean = torch.var_mean(inputs.detach(), (0, 2, 3), correction=0)
    torch.testing.assert_close(fixed.eval()(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", ["autograd", "checkpoint"])
@pytest.mark.parametrize("weights", ["constant", "linear"])
def test_gradients_go_through_the_statistics(gradient, weights):
    """Against finite differences of the whole map: the first stage's statistics depend on x and on weights."""
    torch.manual_seed(1)
    fields = [nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Tanh()) for _ in range(2)]
    stack = ResidualStack(fields, solver="rk4", step_size=0.5, weights=weights, gradient=gradient).double()
    x = torch.randn(4, 3, dtype=F64, requires_grad=True)
    names, values = zip(*stack.named_parameters(), strict=True)

    def whole(x, *values):
        return torch.func.functional_call(stack, dict(zip(names, values, strict=True)), (x,))

    if gradient == "checkpoint":  # which looks its parameters up again on the way back
        assert torch.autograd.gradcheck(stack, (x,))
    else:
        assert torch.autograd.gradcheck(whole, (x, *values))


def test_a_norm_that_a_field_calls_twice_holds_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return torch.tanh(self.norm(x) + self.norm(3 * x.square()))

    torch.manual_seed(0)
    stack = ResidualStack([Twice()], solver="rk4").double()
    x = torch.randn(6, 2, dtype=F64)
    first, second = (torch.var_mean(z, 0, correction=0) for z in (x, 3 * x.square()))

    def field(y):
        parts = zip((y, 3 * y.square()), (first, second), strict=True)
        return torch.tanh(sum((z - mean) / (variance + 1e-5).sqrt() for z, (variance, mean) in parts))

    torch.testing.assert_close(stack(x), ResidualStack([field_module(field)], solver="rk4")(x))
    assert stack.fields[0].norm.num_batches_tracked == 2, "two calls of the first evaluation"


def field_module(function):
    module = nn.Module()
    module.forward = function
    return module


def test_a_forward_of_the_norms_own_is_put_back():
    """Tools that wrap modules set `forward` on the instance; it serves the first stage and stays."""
    stack = ResidualStack([nn.Sequential(nn.BatchNorm1d(2))], solver="midpoint")
    norm, calls = stack.fields[0][0], []

    def wrapped(x):
        calls.append(x)
        return nn.BatchNorm1d.forward(norm, x)

    norm.forward = wrapped
    stack(torch.randn(3, 2))
    assert norm.forward is wrapped and len(calls) == 1


def test_statistics_are_kept_in_float32_under_autocast():
    """bfloat16 resolves 1/256: statistics taken in it would miss a mean of 100 with a deviation of 0.1."""
    torch.manual_seed(0)
    stack = ResidualStack(
        [nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))], solver="midpoint", step_size=1e-3
    )
    x = 100 + 0.1 * torch.randn(64, 1)
    with torch.autocast("cpu", torch.bfloat16):
        low = stack(x) - x
    high = stack(x) - x
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, high, rtol=0.05, atol=5e-5)


@pytest.mark.parametrize("block", ["stack", "ode"])
def test_measured_statistics_are_those_of_training(block):
    """A plain average over the batches of each batch's statistics at the first evaluation."""
    torch.manual_seed(0)
    field = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    solving = (
        ResidualStack([field], solver="rk4")
        if block == "stack"
        else ODEBlock(Autonomous(field), solver="rk4", n_steps=2, per_sample=False)
    )
    model = nn.Sequential(nn.Dropout(0.9), solving).train()
    batches = [torch.randn(8, 2) + k for k in range(3)]
    measure_statistics(model, batches)
    torch.testing.assert_close(field[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(field[0].running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert field[0].num_batches_tracked == 3 and field[0].momentum == 0.1
    assert all(m.training for m in model.modules())
    measure_statistics(model, batches, every_evaluation=True)
    assert field[0].num_batches_tracked == 3 * (4 if block == "stack" else 8)


def test_statistics_need_inputs():
    norm = nn.BatchNorm1d(1)
    norm(torch.randn(4, 1))
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match="there are none"):
        measure_statistics(norm, [])
    assert all(torch.equal(a, before[name]) for name, a in norm.state_dict().items())
