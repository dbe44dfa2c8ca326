"""Total variation: exact where the knots are known, from below elsewhere."""

import math

import pytest
import torch

from resode.fields import MLPField
from theory.measures.variation import total_variation


def test_monotone_functions_vary_by_what_they_rise():
    assert total_variation(lambda x: x**3, (-1.0, 2.0), samples=7) == pytest.approx(9.0, rel=1e-15)
    assert total_variation(lambda x: torch.ones_like(x)) == 0.0


def test_a_zigzag_needs_its_knots():
    """|x − k| summed over knots k: the slopes between them are −3, −1, 1, 3."""
    knots = torch.tensor([0.2, 0.3, 0.9], dtype=torch.float64)

    def f(x):
        return (x - knots).abs().sum(1)

    exact = 3 * 0.2 + 0.1 + 0.6 + 3 * 0.1
    assert total_variation(f, knots=knots, samples=1) == pytest.approx(exact, rel=1e-14)
    assert total_variation(f, samples=2) < exact - 0.05
    beyond = [-1.0, *knots.tolist(), 2.0]  # those outside are left out
    assert total_variation(f, knots=beyond, samples=1) == pytest.approx(exact, rel=1e-14)


def test_relu_networks_are_exact_at_their_knots():
    """TV is the sum of |slope| times length over the pieces; the slopes come from the weights.

    Eight knots within (0, 1), eight beyond.
    """
    torch.manual_seed(0)
    field = MLPField(1, hidden=16).double()
    with torch.no_grad():
        field.fc1.bias.copy_(-field.fc1.weight[:, 0] * torch.cat([torch.rand(8), 1 + torch.rand(8)]))
    w1, b1, w2 = (p.detach().flatten() for p in (field.fc1.weight, field.fc1.bias, field.fc2.weight))
    knots = -b1 / w1
    ends = torch.cat([torch.tensor([0.0, 1.0]).double(), knots[(knots > 0) & (knots < 1)]]).sort().values
    middles = (ends[1:] + ends[:-1]) / 2
    slopes = ((w1 * middles[:, None] + b1 > 0) * (w1 * w2)).sum(1)
    expected = float((slopes.abs() * ends.diff()).sum())
    assert len(ends) == 10
    assert total_variation(field, knots=knots, samples=1) == pytest.approx(expected, rel=1e-13)


def test_smooth_functions_come_from_below_at_second_order():
    """sin 2πkx rises and falls by 4k."""
    errors = [4 * 3 - total_variation(lambda x: torch.sin(6 * math.pi * x), samples=n) for n in (101, 202)]
    assert errors[0] > 0 and math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.6)


def test_of_a_curve_it_is_the_length():
    def circle(x):
        return torch.cat([torch.cos(2 * math.pi * x), torch.sin(2 * math.pi * x)], 1)

    assert total_variation(circle) == pytest.approx(2 * math.pi, rel=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="a < b"):
        total_variation(torch.relu, (1.0, 0.0))
    with pytest.raises(ValueError, match="samples"):
        total_variation(torch.relu, samples=0)
    with pytest.raises(ValueError, match="knots"):
        total_variation(torch.relu, knots=[math.nan])
    with pytest.raises(ValueError, match="one row a point"):
        total_variation(lambda x: x[:1])
    with pytest.raises(ValueError, match="finite"):
        total_variation(lambda x: 1 / (x * 0))
