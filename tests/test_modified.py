"""The field whose flow a stack follows, against flows and against series known in closed form."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from resode import METHODS, ResidualStack, distance_from_ode, modified_field
from resode.analysis.swap.bseries import (
    modified_coefficient,
    splits,
    step_coefficient,
    symmetry,
    trees,
    vertices,
)
from resode.solve.step import rk_step
from resode.tableaus import ButcherTableau

D = torch.float64
EXPLICIT = [name for name, t in METHODS.items() if t.explicit]


def layers(seed, width=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, width)).double()


# -- trees and coefficients


def test_trees():
    """Their numbers (A000081), and Cayley's: the n^(n−1) labelled rooted trees are n!/σ of each."""
    assert [len(trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]
    for n in range(1, 8):
        assert sum(Fraction(math.factorial(n), symmetry(t)) for t in trees(n)) == n ** (n - 1)
        assert all(vertices(t) == n and len(splits(t)) == n - 1 for t in trees(n))


def test_coefficients_that_books_give():
    """Hairer, Lubich & Wanner IX.1: Euler's F̃ = F − h/2 F'F + h²(F''(F, F)/12 + F'F'F/3) − …; for x' = λx the
    series is that of the logarithm of R(z)."""
    assert modified_coefficient("euler", ((), ())) / symmetry(((), ())) == Fraction(1, 12)
    tall, logarithm = (), [Fraction((-1) ** (n + 1), n) for n in range(1, 8)]
    for value in logarithm:  # log(1 + z) = z − z²/2 + z³/3 − …
        assert modified_coefficient("euler", tall) == value
        tall = (tall,)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_order(name):
    """b vanishes exactly up to the order and not beyond; up to there the step's own coefficients are the flow's,
    1/γ(τ), to the precision of the tableau."""
    tableau = METHODS[name]
    for n in range(1, min(tableau.order, 6) + 1):
        for tree in trees(n):
            assert modified_coefficient(tableau, tree) == (n == 1)
            assert float(step_coefficient(tableau, tree)) == pytest.approx(1 / density(tree), rel=1e-12)
    if tableau.order < 8:
        assert any(modified_coefficient(tableau, tree) for tree in trees(tableau.order + 1))


def density(tree):
    return vertices(tree) * math.prod(map(density, tree))


@pytest.mark.parametrize("name", [n for n in EXPLICIT if METHODS[n].order < 5])
def test_the_flow_of_the_series_is_the_step(name):
    """On x' = x² + 1 a step's error against the flow of F̃ with two terms is of order p + 3 in h."""
    tableau = METHODS[name]

    def error(h):
        x = torch.tensor([0.3], dtype=D)
        step, field = rk_step(tableau, lambda t, y: y * y + 1, 0.0, x, h), modified_scalar(tableau, h, 2)
        for _ in range(4):  # dopri8 in quarters: exact to rounding
            x = rk_step(METHODS["dopri8"], field, 0.0, x, h / 4)
        return float((step - x).abs())

    assert math.log2(error(0.05) / error(0.025)) == pytest.approx(tableau.order + 3, abs=0.35)


def modified_scalar(tableau, h, order):
    """F̃ of x' = x² + 1, whose derivatives are 2x and 2, by hand."""
    terms = [
        (h ** (n - 1) * float(modified_coefficient(tableau, tree) / symmetry(tree)), tree)
        for n in range(tableau.order + 1, tableau.order + order + 1)
        for tree in trees(n)
    ]

    def differential(tree, y):
        if len(tree) > 2:
            return 0.0 * y
        inner = math.prod((differential(child, y) for child in tree), start=torch.ones_like(y))
        return (y * y + 1, 2 * y, 2.0)[len(tree)] * inner

    return lambda t, y: y * y + 1 + sum(c * differential(tree, y) for c, tree in terms)


# -- of a stack


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun3", "rk4"])
@pytest.mark.parametrize("order", [1, 2])
def test_drift_falls_at_the_order_of_the_series(solver, order):
    """What is left of F̃ with m terms is h^(p+m): that is the slope over a fixed depth time."""
    field, x, drifts = layers(0), torch.randn(2, 3, dtype=D), []
    for depth in (3, 6):
        stack = ResidualStack(field, depth=depth, step_size=1 / depth, solver=solver)
        with torch.no_grad():
            drifts.append(float((stack(x) - modified_field(stack, order).flow(x, n_steps=1)).norm()))
    assert math.log2(drifts[0] / drifts[1]) == pytest.approx(METHODS[solver].order + order, abs=0.1)


@pytest.mark.parametrize("weights", ["constant", "linear"])
def test_fields_that_change_in_depth(weights):
    stack = ResidualStack([layers(i) for i in range(3)], step_size=0.5, weights=weights)
    x, drifts = torch.randn(2, 3, dtype=D), []
    for n in (8, 16):
        stack.substeps = n
        with torch.no_grad():
            drifts.append(float((stack(x) - modified_field(stack, 2).flow(x, n_steps=2)).norm()))
    assert math.log2(drifts[0] / drifts[1]) == pytest.approx(3, abs=0.1)


def test_learnt_steps_are_in_the_field():
    """In units of blocks: a stack that learnt the step 0.1 is one of F/10."""
    field, x = layers(0), torch.randn(2, 3, dtype=D)
    learnt = ResidualStack(field, depth=2, step_size=0.1, learn_step="channel", channels=3).double()
    plain = ResidualStack(field, depth=2, step_size=0.1)
    torch.testing.assert_close(modified_field(learnt)(0.0, x), 0.1 * modified_field(plain)(x))
    torch.testing.assert_close(distance_from_ode(learnt, x), distance_from_ode(plain, x))


def test_g_of_depth_time():
    stack = ResidualStack([layers(i) for i in range(3)], step_size=0.5)
    g, x = modified_field(stack), torch.randn(2, 3, dtype=D)
    for t, index in ((0.0, 0), (0.49, 0), (0.5, 1), (torch.tensor(1.2), 2), (1.5, 2)):
        torch.testing.assert_close(g(t, x), g.block(index)(x))
    f = stack.field(1)
    jf = torch.func.jvp(f, (x,), (f(x),))[1]
    torch.testing.assert_close(g(0.5, x), f(x) - 0.25 * jf)  # Euler's first term, − h/2 F'F


def test_gradients_reach_state_and_weights():
    stack = ResidualStack(layers(0), depth=2, step_size=0.5)
    x = torch.randn(2, 3, dtype=D, requires_grad=True)
    modified_field(stack)(x).sum().backward()
    assert x.grad.abs().sum() > 0 and stack.field(0)[0].weight.grad.abs().sum() > 0


def test_distance_is_the_first_term_against_the_field():
    """Of x' = Ax under Euler: h/2 ‖A²x‖/‖Ax‖; a field of 0 is at no distance."""
    turn = nn.Linear(2, 2, bias=False).double()
    turn.weight.data = torch.tensor([[0.0, -3.0], [3.0, 0.0]], dtype=D)
    stack = ResidualStack(turn, depth=3, step_size=0.1)
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=D)
    found = distance_from_ode(stack, x)
    torch.testing.assert_close(found[:, 0], torch.full((3,), 0.15, dtype=D))
    assert (found[:, 1] == 0).all()


def test_where_the_series_stops_helping():
    """At ηλ = −3 the logarithm's series log(1 + z) has left its circle: each term makes it worse."""
    decay = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(decay.weight, -3.0)
    x = torch.ones(1, 1, dtype=D)
    stack = ResidualStack(decay, depth=1)
    with torch.no_grad():
        sizes = [float(modified_field(stack, m)(x).abs()) for m in range(1, 6)]
    assert all(b > 2 * a for a, b in itertools.pairwise(sizes))


# -- bad input


class Kinked(nn.Module):
    def forward(self, x):
        return torch.relu(x) - 1


def test_kinks_are_said():
    stack, x = ResidualStack(Kinked(), depth=2, step_size=0.1), torch.ones(1, 2)
    g = modified_field(stack)
    with pytest.warns(UserWarning, match=r"F has kinks \(relu\)"):
        value = g(x)
    torch.testing.assert_close(value, Kinked()(x))  # F = 0 at 1, and so is every differential
    g(x)  # said once


def test_arguments():
    stack = ResidualStack(layers(0), depth=2)
    with pytest.raises(ValueError, match="order must be a whole number of at least 1, got 0"):
        modified_field(stack, 0)
    with pytest.raises(TypeError, match="order must be a whole number"):
        modified_field(stack, 1.5)
    with pytest.raises(ValueError, match="at most 9 are implemented, got 10"):
        modified_field(stack, 10)
    with pytest.raises(TypeError, match="a ResidualStack's steps, got Sequential"):
        modified_field(layers(0))
    with pytest.raises(TypeError, match=r"called as g\(x\)"):
        modified_field(stack)(0.0, torch.zeros(1, 3, dtype=D))
    with pytest.raises(ValueError, match="one depth time for all samples"):
        modified_field(ResidualStack([layers(0)]))(torch.zeros(2, 1), torch.zeros(2, 3, dtype=D))
    with pytest.raises(ValueError, match="keep the state's shape"):
        modified_field(ResidualStack(nn.Linear(3, 2), depth=2))(torch.zeros(1, 3))
    stack.solver = "dopri5"
    with pytest.raises(ValueError, match="dopri5 chooses its own steps"):
        modified_field(stack)


def test_an_implicit_tableau_has_coefficients_too():
    """Implicit Euler is Euler's adjoint: b changes its sign with h, so by (−1)^(|τ|+1)."""
    for n in range(1, 6):
        for tree in trees(n):
            sign = (-1) ** (n + 1)
            assert modified_coefficient("implicit_euler", tree) == sign * modified_coefficient("euler", tree)


def test_a_tableau_of_ones_own():
    own = ButcherTableau("own", a=((0, 0), (Fraction(1, 2), 0)), b=(0, 1), c=(0, Fraction(1, 2)), order=2)
    for tree in trees(4):
        assert modified_coefficient(own, tree) == modified_coefficient("midpoint", tree)


class Timed(nn.Module):
    """F(t, x) = tanh(Wx) + cos 3t: a field that takes the depth time."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(3, 3)

    def forward(self, t, x):
        return torch.tanh(self.linear(x)) + torch.cos(3 * t)


@pytest.mark.parametrize(("solver", "order", "slope"), [("euler", 1, 2), ("euler", 2, 3), ("midpoint", 1, 3)])
def test_fields_of_time_and_state(solver, order, slope):
    """Their F̃ holds derivatives in time, too, or the drift would fall at the method's own order."""
    field, drifts = Timed(0).double(), []
    x = torch.randn(2, 3, dtype=D)
    for n in (8, 16):
        stack = ResidualStack(field, depth=n, step_size=1 / n, solver=solver)
        drifts.append(float((stack(x) - modified_field(stack, order).flow(x)).detach().norm()))
    assert math.log2(drifts[0] / drifts[1]) == pytest.approx(slope, abs=0.15)
    with pytest.raises(TypeError, match="g\\(t, x\\)"):
        modified_field(stack)(x)
    distance = distance_from_ode(stack, x)
    assert distance.shape == (16, 2) and bool((distance > 0).all())
