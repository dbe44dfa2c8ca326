"""Stacks of fields of (t, x), and stacks as sequences of blocks whose state is looked at."""

import math

import pytest
import torch
from torch import nn

import resode
from resode import ResidualStack, odeint

DOUBLE = torch.float64


class Driven(nn.Module):
    """F(t, x) = rate · (cos t − x)."""

    def __init__(self, rate=1.0):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=DOUBLE))
        self.times = []

    def forward(self, t, x):
        self.times.append(t.detach().reshape(-1)[0].item())
        return self.rate * (torch.cos(t) - x)


X = torch.linspace(-1, 1, 6, dtype=DOUBLE).reshape(3, 2)


@pytest.mark.parametrize(
    "solver, tol", [("rk4", 1e-12), ("euler", 1e-12), ("dopri5", 1e-6), ("dopri8", 1e-6)]
)
@pytest.mark.parametrize("substeps", [1, 3])
def test_a_field_of_time_is_given_the_depth_time(solver, tol, substeps):
    """Blocks of η = 0.3 are the solve of F over [0, 1.5], a step (or more) a block."""
    field = Driven()
    stack = ResidualStack(
        field, depth=5, solver=solver, step_size=0.3, substeps=substeps, rtol=1e-8, atol=1e-8
    )
    times = torch.linspace(0, 1.5, 6, dtype=DOUBLE)
    how = dict(rtol=1e-10, atol=1e-10) if stack._tableau.adaptive else dict(n_steps=substeps)
    exact = odeint(field, X, times, method=solver, **how)
    end, path = stack(X, return_path=True)
    assert (path - exact).abs().max() < tol and torch.equal(end, path[-1])


def test_euler_asks_at_the_blocks_starts():
    field = Driven()
    ResidualStack(field, depth=4, step_size=0.5)(X)
    assert field.times == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    "kw", [dict(weights="linear"), dict(learn_step=True), dict(gradient="checkpoint"), {}]
)
def test_learned_steps_and_linear_weights_keep_the_clock(kw):
    """Equal fields, so that the weights' interpolation changes nothing: all are the same solve."""
    fields = [Driven(2.0) for _ in range(4)]
    stack = ResidualStack(fields, solver="rk4", step_size=0.25, **kw).double()
    exact = odeint(fields[0], X, torch.tensor([0.0, 1.0], dtype=DOUBLE), method="rk4", n_steps=4)[-1]
    y = stack(X)
    assert torch.allclose(y, exact, atol=1e-12)
    y.sum().backward()
    assert all(field.rate.grad is not None for field in fields)
    if kw.get("learn_step"):
        with torch.no_grad():
            stack.step_sizes.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        times = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0], dtype=DOUBLE)
        assert torch.allclose(stack(X), odeint(fields[0], X, times, method="rk4", n_steps=1)[-1], atol=1e-7)


def test_time_and_plain_fields_mix_and_refining_keeps_the_span():
    class Plain(nn.Module):
        def forward(self, x, scale=2.0):
            return -scale * x

    stack = ResidualStack([Plain(), Driven()], solver="euler", step_size=0.5)
    assert stack.timed == (False, True)
    half = X + 0.5 * (-2 * X)
    assert torch.allclose(stack(X), half + 0.5 * (math.cos(0.5) - half))
    fine = ResidualStack(Driven(), depth=2, solver="rk4", step_size=0.5).refine(8)
    exact = odeint(Driven(), X, torch.tensor([0.0, 1.0], dtype=DOUBLE), method="rk4", n_steps=16)[-1]
    assert torch.allclose(fine(X), exact, atol=1e-12)


def test_a_step_a_channel_has_no_one_time():
    with pytest.raises(ValueError, match="one depth time"):
        ResidualStack(Driven(), depth=2, learn_step="channel", channels=2)


def test_a_stack_is_a_sequence_of_its_blocks_fields():
    fields = [nn.Linear(2, 2) for _ in range(3)]
    stack = ResidualStack(fields)
    assert len(stack) == 3 and list(stack) == fields and stack[0] is fields[0] and stack[-1] is fields[2]
    shared = ResidualStack(fields[0], depth=4)
    assert len(shared) == 4 and list(shared) == [fields[0]] * 4
    for bad, error in ((3, IndexError), (-4, IndexError), (1.0, TypeError), (slice(0, 1), TypeError)):
        with pytest.raises(error):
            stack[bad]


class Overflowing(nn.Module):
    def forward(self, x):
        return 1e200 * x**2


@pytest.mark.parametrize("weights", ["constant", "linear"])
def test_a_state_that_is_not_finite_names_block_and_step(weights):
    fields = [nn.Linear(2, 2).double(), nn.Linear(2, 2).double(), nn.Linear(2, 2).double()]
    with torch.no_grad():
        fields[1].weight[0, 0] = math.nan
    stack = ResidualStack(fields, solver="rk4", substeps=2, check_finite=True, weights=weights)
    first = 0 if weights == "linear" else 1  # the nan lies between the nodes 0 and 1 already
    with pytest.raises(
        resode.NonFiniteState,
        match=rf"block {first} \(Linear\), step 1 of 2: the state is nan at entry \[0, 0\]",
    ):
        stack(X)
    late = ResidualStack(Overflowing(), depth=1, substeps=4, check_finite=True)
    with pytest.raises(
        resode.NonFiniteState, match=r"block 0 \(Overflowing\), step 2 of 4: the state is inf"
    ):
        late(torch.ones(1, 1, dtype=DOUBLE))
    with pytest.raises(resode.NonFiniteState, match="was not finite before it"):
        ResidualStack(nn.Linear(2, 2), check_finite=True, depth=1)(torch.full((1, 2), math.inf))
    unchecked = ResidualStack(fields, solver="rk4", substeps=2, weights=weights)
    assert unchecked(X).isnan().any()


def test_looking_changes_nothing():
    stack = ResidualStack([nn.Linear(2, 2).double() for _ in range(3)], solver="rk4", substeps=3)
    plain = stack(X)
    stack.check_finite = True
    assert torch.equal(stack(X), plain)
