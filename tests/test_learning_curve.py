"""Learning curves: rates and gains that closed forms predict; and the short way to fit."""

import math

import pytest
import torch
from torch import nn

from resode.training.fit import fit
from theory.measures.learning_curve import LearningCurve, LeastSquares, PiecewiseLinear, learning_curve

TEST = (torch.arange(4000, dtype=torch.float64)[:, None] + 0.5) / 4000


def sine(k, size=1.0):
    return lambda x: size * torch.sin(2 * math.pi * k * x)


def one_a_cell(n, generator):
    """One uniform sample in each of n equal cells."""
    cell = torch.arange(n, dtype=torch.float64)[:, None]
    return (cell + torch.rand(n, 1, generator=generator, dtype=torch.float64)) / n


def test_error_of_straight_lines_is_the_closed_form():
    """rms(f'')/(√40 n²), f = sin 2πx; 40 draws of 256 cells leave some 1 % of scatter."""
    curve = learning_curve(PiecewiseLinear, sine(1), one_a_cell, [128, 256], TEST, draws=40)
    for n, measured in zip((128, 256), curve.mean.tolist(), strict=True):
        assert measured == pytest.approx((2 * math.pi) ** 2 / math.sqrt(2) / math.sqrt(40) / n**2, rel=0.05)
    assert (curve.standard_error / curve.mean < 0.05).all()


def test_equal_samples_are_exact_at_the_nodes_and_wrap_round():
    x = one_a_cell(16, torch.Generator().manual_seed(1))
    f = PiecewiseLinear(x, sine(1)(x))
    assert torch.allclose(f(x), sine(1)(x), atol=1e-12)
    assert torch.allclose(f(x + 3), f(x), atol=1e-12)


def test_unresolved_roughness_has_error_five_sixths():
    """Nodes have random phases: A²/2 of the truth and 2/3 of A²/2 of the lines between them."""
    curve = learning_curve(PiecewiseLinear, sine(30011, 0.3), one_a_cell, [64, 128], TEST, draws=40)
    assert curve.mean.tolist() == pytest.approx([0.3 * math.sqrt(5 / 6)] * 2, rel=0.05)


def test_least_squares_reproduces_its_span_and_nothing_else_changes():
    def features(x):
        return torch.cat([x**k for k in range(4)], 1)

    x = one_a_cell(20, torch.Generator().manual_seed(0))
    known = 3 * x**3 - x
    direct = LeastSquares(x, sine(1)(x), features)(TEST)
    residual = LeastSquares(x, sine(1)(x) - known, features)(TEST) + 3 * TEST**3 - TEST
    assert (direct - residual).abs().max() < 1e-12
    assert (direct - sine(1)(TEST)).abs().max() > 0.01  # it is no exact fit


def test_samples_for_an_error_lie_on_the_curve():
    curve = LearningCurve(torch.tensor([10, 1000]), torch.tensor([[1e-2], [1e-6]], dtype=torch.float64))
    assert curve.samples_for(1e-4) == pytest.approx(100)  # error = n⁻²
    assert curve.samples_for(1.0) == 10
    assert curve.samples_for(1e-9) == math.inf


def test_standard_error_is_that_of_the_root_of_the_mean_square():
    """Errors of squares 1 ± s around 1: std(squares)/√4/2."""
    squares = torch.tensor([[0.9, 1.1, 0.9, 1.1]], dtype=torch.float64)
    curve = LearningCurve(torch.tensor([1]), squares.sqrt())
    assert curve.mean.item() == pytest.approx(1.0)
    assert curve.standard_error.item() == pytest.approx(0.1 * math.sqrt(4 / 3) / 2 / 2)


def test_draws_are_the_same_for_every_learner():
    seen = []

    def learner(x, y):
        seen.append(x)
        return PiecewiseLinear(x, y)

    for k in (1, 2):
        learning_curve(learner, sine(k), one_a_cell, [4], TEST, draws=2)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_wrong_arguments_say_so():
    with pytest.raises(ValueError, match="at least one number"):
        learning_curve(PiecewiseLinear, sine(1), one_a_cell, [], TEST)
    with pytest.raises(ValueError, match="must have the target's shape"):
        learning_curve(lambda x, y: lambda t: t[:1], sine(1), one_a_cell, [4], TEST)
    with pytest.raises(ValueError, match=r"shape \(n, 1\)"):
        PiecewiseLinear(torch.zeros(3, 2), torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("method", "steps", "rate"), [("lbfgs", 5, None), ("adam", 300, 0.1), ("sgd", 300, 0.05)]
)
def test_fit_finds_the_least_squares_solution(method, steps, rate):
    torch.manual_seed(0)
    x = torch.randn(64, 3, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + 0.25
    model = nn.Linear(3, 1).double()
    losses = fit(model, x, y, steps=steps, method=method, learning_rate=rate)
    assert losses.shape == (steps,) and losses[-1] < 1e-6 < losses[0]
    assert model.weight.flatten().tolist() == pytest.approx([1.0, -2.0, 0.5], abs=1e-3)


def test_fit_takes_classes_and_batches_without_replacement():
    """Every pass sees every sample once: a loss that records its rows."""
    seen = []

    def loss(z, target):
        seen.append(target.tolist())
        return nn.functional.cross_entropy(z, target)

    model = nn.Linear(2, 8)
    fit(model, torch.randn(8, 2), torch.arange(8), steps=4, batch_size=4, loss_fn=loss, method="sgd")
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(8))
    assert seen[:2] != seen[2:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"steps": 1, "method": "newton"}, "must be one of"),
        ({"steps": 1, "method": "lbfgs", "batch_size": 2}, "all samples at once"),
        ({"steps": 1, "batch_size": 0}, "batch_size must be"),
    ],
)
def test_fit_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        fit(nn.Linear(1, 1), torch.zeros(4, 1), torch.zeros(4, 1), **options)
    with pytest.raises(ValueError, match="nothing to fit"):
        fit(nn.Identity(), torch.zeros(4, 1), torch.zeros(4, 1), steps=1)
