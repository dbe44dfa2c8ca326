"""Fields that know the time, augmented states, known and learned parts; counting of stateful fields."""

import math

import pytest
import torch
from torch import nn

from resode import METHODS, ODEBlock, ResidualStack, diagnose, odeint, odeint_adjoint, profile_depth
from resode.analysis import product_norm
from resode.analysis.steps.block_limits import block_limits
from resode.fields import (
    Augmented,
    Autonomous,
    KnownPlusLearned,
    MLPField,
    TimeConvField,
    TimeMLPField,
    append_time,
)
from resode.training.monitor import StepLimits

DOUBLE = torch.float64
EXPLICIT = [name for name, tableau in METHODS.items() if tableau.explicit]


@pytest.mark.parametrize(
    "field", [TimeMLPField(3, hidden=8).double(), TimeConvField(3, activation="tanh").double()]
)
def test_each_sample_sees_its_own_time(field):
    """t of shape (B, 1, …) gives each row what it gets alone with a 0-D t; and t matters."""
    x = torch.randn(4, 3, *(() if isinstance(field, TimeMLPField) else (5, 5)), dtype=DOUBLE)
    t = torch.linspace(0, 1, 4, dtype=DOUBLE).reshape(4, *[1] * (x.ndim - 1))
    together = field(t, x)
    alone = torch.cat([field(s.reshape(()), row) for s, row in zip(t, x.split(1), strict=True)])
    assert torch.allclose(together, alone, atol=1e-14) and together.shape == x.shape
    assert (field(0.0, x) - field(1.0, x)).abs().max() > 1e-3


def test_the_time_is_one_more_feature_or_channel():
    assert append_time(2.0, torch.zeros(2, 3, 4, 4), 1)[:, 3].unique().tolist() == [2.0]
    t = torch.tensor([[1.0], [2.0]])
    assert append_time(t, torch.zeros(2, 3), -1)[:, 3].tolist() == [1.0, 2.0]
    assert append_time(torch.tensor(1.0).double(), torch.zeros(2, 3), -1).dtype == torch.float32


def test_a_time_field_can_integrate_what_no_autonomous_one_can():
    """With W₁ = 0 and W₂ = (0, 1) the field is F = t, so x(1) = x(0) + 1/2."""
    field = TimeMLPField(1).double()
    with torch.no_grad():
        for p in field.parameters():
            p.zero_()
        field.fc2.weight[0, -1] = 1
    for per_sample in (False, True):
        y = odeint(
            field, torch.zeros(3, 1, dtype=DOUBLE), torch.tensor([0.0, 1.0]).double(), per_sample=per_sample
        )
        assert torch.allclose(y[-1], torch.full((3, 1), 0.5, dtype=DOUBLE), atol=1e-12)


@pytest.mark.parametrize("gradient", ["autograd", "adjoint"])
def test_gradients_through_a_block_of_a_time_field(gradient):
    block = ODEBlock(TimeMLPField(2, hidden=4).double(), rtol=1e-9, atol=1e-9, gradient=gradient)
    x = torch.randn(3, 2, dtype=DOUBLE, requires_grad=True)
    block(x).square().sum().backward()
    by_hand = ODEBlock(block.func, solver="rk4", n_steps=100)(x)
    expected = torch.autograd.grad(by_hand.square().sum(), [x, *block.parameters()])
    for p, e in zip([x, *block.parameters()], expected, strict=True):
        assert torch.allclose(p.grad, e, atol=1e-6)


def test_augmented_states_may_cross():
    """x → −x on a line needs trajectories that cross; in the plane a half turn does it."""
    turn = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        turn.weight.copy_(torch.tensor([[0.0, -math.pi], [math.pi, 0.0]]))
    block = Augmented(ODEBlock(Autonomous(turn), rtol=1e-9, atol=1e-9), extra=1)
    x = torch.tensor([[-1.0], [0.5], [2.0]], dtype=DOUBLE)
    assert torch.allclose(block(x), -x, atol=1e-6)
    block.keep = True
    assert torch.allclose(block(x), torch.cat([-x, 0 * x], 1), atol=1e-6)
    images = Augmented(ODEBlock(TimeConvField(5)), extra=2)
    assert images(torch.zeros(2, 3, 4, 4)).shape == (2, 3, 4, 4)


def test_known_plus_learned_starts_at_the_known_and_learns_the_rest():
    """A pendulum whose damping −0.3 v is missing: the linear part finds it from one trajectory."""

    def known(t, y):
        return torch.stack([y[..., 1], -torch.sin(y[..., 0])], -1)

    def truth(t, y):
        return known(t, y) - 0.3 * torch.stack([0 * y[..., 1], y[..., 1]], -1)

    y0, t = torch.tensor([1.0, 0.5], dtype=DOUBLE), torch.linspace(0, 4, 21, dtype=DOUBLE)
    target = odeint(truth, y0, t)
    rest = nn.Linear(2, 2, bias=False).double()
    nn.init.zeros_(rest.weight)
    field = KnownPlusLearned(known, Autonomous(rest))
    assert torch.equal(field(0.0, y0), known(0.0, y0))
    assert [name for name, _ in field.named_parameters()] == ["learned.field.weight"]
    optimizer = torch.optim.LBFGS(field.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (odeint(field, y0, t, method="rk4", n_steps=4) - target).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(rest.weight, torch.tensor([[0.0, 0.0], [0.0, -0.3]], dtype=DOUBLE), atol=2e-3)


def test_known_plus_learned_of_autonomous_fields():
    field = KnownPlusLearned(torch.neg, MLPField(3, zero_init_last=True))
    assert torch.equal(field(torch.ones(2, 3)), -torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"one shape: got \(1, 3\) and \(2, 3\)"):
        KnownPlusLearned(lambda x: x[:1], MLPField(3))(torch.ones(2, 3))


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
@pytest.mark.parametrize("method", EXPLICIT)
def test_a_field_that_counts_its_calls_agrees_with_the_statistics(method, solve):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate, self.calls = nn.Parameter(torch.tensor(-1.0, dtype=DOUBLE)), 0

        def forward(self, t, y):
            self.calls += 1
            return self.rate * y * (1 + t)

    field, t = Counting(), torch.linspace(0, 2, 6, dtype=DOUBLE, requires_grad=True)
    steps = {} if METHODS[method].adaptive else {"n_steps": 3}
    y, stats = solve(
        field, torch.ones(2, dtype=DOUBLE), t, method=method, rtol=1e-5, atol=1e-5, return_stats=True, **steps
    )
    assert stats.nfe == field.calls
    y.sum().backward()
    assert stats.nfe + stats.nfe_backward == field.calls


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimeMLPField(0), "width must be a whole number"),
        (lambda: TimeMLPField(2)(0.0, torch.zeros(1, 3)), r"\(\*batch, 2\): got x \(1, 3\)"),
        (lambda: TimeConvField(4, norm="batch"), "norm.*group.*none"),
        (lambda: TimeConvField(4)(0.0, torch.zeros(1, 3, 4, 4)), "4"),
        (lambda: TimeMLPField(2, activation="rleu"), "relu"),
        (lambda: Augmented(nn.Identity(), extra=0), "extra must be a whole number"),
    ],
)
def test_wrong_arguments_say_the_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Quickening(nn.Module):
    """F(t, x) = −8 (1 + t) x: λ is −8 in a block that starts at 0, and −12 in one that starts at ½."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Linear(3, 3, bias=False, dtype=DOUBLE)
        with torch.no_grad():
            self.rate.weight.copy_(-8 * torch.eye(3))

    def forward(self, t, x):
        return (1 + t) * self.rate(x)


def test_analyses_take_a_stacks_time_fields_at_the_blocks_start():
    """Euler's limits are 2/8 and 2/12; steps of ½ multiply by −3 and −5."""
    torch.manual_seed(0)
    stack, x = (
        ResidualStack([Quickening(), Quickening()], step_size=0.5).eval(),
        torch.randn(2, 3, dtype=DOUBLE),
    )
    [group] = block_limits(stack, x, ["euler"], progress=False)
    assert [row.decaying_step for row in group.rows] == pytest.approx([1 / 4, 1 / 6], rel=1e-12)
    watch = StepLimits(x)
    watch.record(stack, update=0)
    assert watch.records[0].estimate == pytest.approx(1 / 6, rel=1e-6)
    assert product_norm(stack, x).norm.tolist() == pytest.approx([15.0, 15.0])
    found = diagnose(stack, x, progress=False).findings[0]
    assert (found.block, found.cause) == ("fields.1", "overstep")
    assert found.evidence["eigenvalue"] == pytest.approx(-12, rel=1e-6)
    stack.solver = "rk4"
    rows = profile_depth(stack, x, spectra=1, lesions=False, progress=False).rows
    assert [row.rightmost.real for row in rows] == pytest.approx([-8.0, -12.0])
    assert [row.step_size for row in rows] == [0.5, 0.5]
