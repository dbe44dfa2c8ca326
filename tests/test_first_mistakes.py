"""What people do wrong first: each error says what came, the rule, and the way out."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

import resode
from resode import ODEBlock, ResidualStack

T = torch.tensor([0.0, 1.0])
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class OfTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, t, y):
        return self.layer(y)


class OfState(OfTime):
    def forward(self, y):
        return self.layer(y)


class TimeLast(OfTime):
    def forward(self, y, t):
        return self.layer(y)


class OfThree(OfTime):
    def forward(self, t, y, context):
        return self.layer(y)


@pytest.mark.parametrize(
    ("typed", "meant", "call"),
    [
        ("rk44", "rk4", lambda s: ResidualStack(OfState(), depth=1, solver=s)),
        ("RK4", "rk4", lambda s: ResidualStack(OfState(), depth=1, solver=s)),
        ("tsitt5", "tsit5", lambda s: ODEBlock(OfTime(), solver=s)),
        ("dopr5", "dopri5", lambda s: resode.odeint(OfTime(), X, T, method=s)),
        ("eulr", "euler", lambda s: resode.stability_function(s, torch.zeros(1, dtype=torch.complex64))),
        ("dopri", "dopri5", lambda s: resode.max_stable_step(-torch.eye(2), solver=s)),
        ("rk-4", "rk4", lambda s: resode.solve_ivp(OfTime(), (0.0, 1.0), X, method=s)),
        ("implicit_adam", "implicit_adams", lambda s: resode.odeint(OfTime(), X, T, method=s)),
    ],
)
def test_did_you_mean(typed, meant, call):
    with pytest.raises(ValueError, match=f"'{typed}'.*Did you mean .*{meant}"):
        call(typed)


SOLVES = {
    "odeint": lambda f, x: resode.odeint(f, x, T),
    "odeint_adjoint": lambda f, x: resode.odeint_adjoint(f, x, T),
    "odeint_event": lambda f, x: resode.odeint_event(f, x, torch.tensor(0.0), event_fn=lambda t, y: y.sum()),
    "solve_ivp": lambda f, x: resode.solve_ivp(f, (0.0, 1.0), x),
    "steps": lambda f, x: next(iter(resode.steps(f, x, (0.0, 1.0)))),
    "ODEBlock": lambda f, x: ODEBlock(f)(x),
}


@pytest.mark.parametrize("solve", SOLVES)
def test_a_field_without_time(solve):
    rule = r"func is called as func\(t, y\), and OfState.forward takes y alone\. Wrap it, lambda t, y: func\(y\); or take"
    with pytest.raises(TypeError, match=rule):
        SOLVES[solve](OfState(), X)
    with pytest.raises(TypeError, match=r"Sequential.forward takes input alone"):
        SOLVES[solve](nn.Sequential(nn.Linear(4, 4), nn.Tanh()), X)


@pytest.mark.parametrize("solve", SOLVES)
def test_float64_into_float32_weights(solve):
    rule = "a field and its state have one dtype: .* float32 weights, the state is float64. Convert the state"
    with pytest.raises(TypeError, match=rule):
        SOLVES[solve](OfTime(), X.double())


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
@pytest.mark.parametrize(
    "field", [nn.Linear(4, 4), nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1), nn.Flatten())]
)
def test_float64_into_a_float32_stack(solver, field):
    """By what torch says of a product, and of a convolution."""
    with pytest.raises(
        TypeError, match=r"one dtype: .* has float32 weights, .* float64.*x.to\(torch.float32\)"
    ):
        ResidualStack(field, depth=2, solver=solver)(X.double())
    for ask in (resode.step_limit, resode.find_fixed_points):
        with pytest.raises(TypeError, match="one dtype"):
            ask(field.eval(), X.double())


def test_other_errors_of_a_field_stay_its_own():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ResidualStack(nn.Linear(4, 4), depth=2)(torch.randn(2, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        resode.odeint(OfTime(), torch.randn(2, 5), T)


@pytest.mark.parametrize("make", [lambda: ResidualStack(OfState(), depth=1), lambda: ODEBlock(OfTime())])
def test_arrays_and_lists(make):
    with pytest.raises(TypeError, match=r"numpy.ndarray of float32: convert it with torch.as_tensor\(x\)"):
        make()(X.numpy())
    with pytest.raises(TypeError, match="got list: convert it"):
        make()([1.0, 2.0])
    with pytest.raises(TypeError, match=r"numpy.ndarray of float64: convert it with torch.as_tensor\(x\)"):
        resode.odeint(OfTime(), np.zeros((2, 4)), T)
    with pytest.raises(TypeError, match=r"torch.int64: convert it with x.float\(\)"):
        ResidualStack(OfState(), depth=1)(torch.zeros(2, 4, dtype=torch.long))


def test_modules_of_time_in_a_stack():
    """(t, x) is a field of depth time; the other order, and a third argument, are named."""
    assert ResidualStack(OfTime(), depth=2)(X).shape == X.shape
    with pytest.raises(TypeError, match=r"F\(t, x\) with the depth time first: TimeLast.forward takes y, t"):
        ResidualStack(TimeLast(), depth=2)
    with pytest.raises(TypeError, match=r"OfThree.forward takes t, y, context"):
        ResidualStack(OfThree(), depth=2)
    with pytest.raises(TypeError, match=r"takes t, y, context. Pass the others by args="):
        resode.odeint(OfThree(), X, T)
    with pytest.raises(TypeError, match=r"with 1 further argument, and OfTime.forward takes t, y"):
        resode.odeint(OfTime(), X, T, args=(1.0,))


def test_a_sequential_of_blocks():
    blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"needs depth.*An nn.Sequential is one field.*list\(sequential\).*resode.convert"
    ):
        ResidualStack(blocks)
    assert len(ResidualStack(list(blocks))) == 2


def test_what_takes_any_arguments_is_let_through():
    def any_of(*args):
        return -args[1]

    for f in (any_of, lambda t, y, scale=1.0: -y, functools.partial(lambda k, t, y: -k * y, 2.0)):
        assert resode.odeint(f, X, T, method="rk4", n_steps=1).shape == (2, 2, 4)
