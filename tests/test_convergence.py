"""The order at which a network's output settles as its depth grows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from resode import ResidualStack
from resode.analysis import depth_convergence

ONE = torch.ones(3, 1, dtype=torch.float64)


class Decay(nn.Module):
    def forward(self, x):
        return -x


def decay(n):
    return ResidualStack(Decay(), depth=n, step_size=1 / n)


def test_errors_and_slopes_are_eulers_on_decay():
    """x_L = (1 − 1/L)^L, so every figure has a closed form."""
    depths = [4, 8, 32]
    found = depth_convergence(decay, ONE, depths, reference=ONE / math.e)
    exact = [math.exp(-1) - (1 - 1 / n) ** n for n in depths]
    assert found.depths == depths
    assert found.errors == pytest.approx(exact, rel=1e-13)
    assert found.slopes == pytest.approx(
        [math.log(exact[0] / exact[1], 2), math.log(exact[1] / exact[2], 4)], rel=1e-12
    )
    assert min(found.slopes) < found.order < max(found.slopes)


def test_changes_stand_in_for_errors():
    """x_2L − x_L falls at the order too, and needs no reference."""
    found = depth_convergence(decay, ONE, [4, 8, 16])
    exact = [(1 - 0.5 / n) ** (2 * n) - (1 - 1 / n) ** n for n in (4, 8)]
    assert found.errors == pytest.approx(exact, rel=1e-13)
    assert found.slopes == pytest.approx([math.log2(exact[0] / exact[1])], rel=1e-12)
    assert found.order == pytest.approx(found.slopes[0], rel=1e-12)


def test_samples_are_averaged_as_root_mean_square():
    y = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    found = depth_convergence(lambda n: lambda x: x / n, y, [1, 5], reference=torch.zeros_like(y))
    assert found.errors == pytest.approx([5 / math.sqrt(2), 1 / math.sqrt(2)], rel=1e-15)
    assert found.order == pytest.approx(1, rel=1e-14)


def test_exact_and_diverging_outputs():
    assert depth_convergence(lambda n: lambda x: x, ONE, [1, 2], reference=ONE).order == math.inf
    lost = depth_convergence(lambda n: lambda x: x * math.inf, ONE, [1, 2], reference=ONE)
    assert math.isnan(lost.order) and math.isnan(lost.slopes[0])


@pytest.mark.parametrize(
    ("depths", "reference"),
    [([4, 8], None), ([4], ONE), ([8, 4], ONE), ([4, 4], ONE), ([2.0, 4], ONE), ([0, 4], ONE)],
)
def test_wrong_depths_say_the_rule(depths, reference):
    with pytest.raises(ValueError, match="whole number"):
        depth_convergence(decay, ONE, depths, reference=reference)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"one shape: got \(1, 3\) beside \(3, 1\)"):
        depth_convergence(decay, ONE, [2, 4], reference=ONE.T)
