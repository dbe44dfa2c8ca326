"""Claims C1 and C7, and what a thousand blocks do: the tables of docs/blocks.md, asserted."""

import pytest
import torch

from resode import METHODS
from resode.fields import AntisymmetricField
from tests.benchmarks import blocks

DEPTHS = (32, 128)


@pytest.mark.parametrize(
    "case",
    ["shared smooth field (tanh)", 'refined, weights "constant"', 'refined, weights "linear"'],
)
def test_depth_converges_at_the_solvers_order(case):
    """A smooth field, and pieces that refinement keeps: nothing but the solver's error is left."""
    slope = blocks.CASES[case][0](DEPTHS)
    for solver in ("euler", "midpoint", "heun2", "rk4"):
        order = METHODS[solver].order
        assert order - 0.1 <= slope(solver) <= order + 0.3, solver


@pytest.mark.parametrize(("weights", "order"), [("constant", 1), ("linear", 2)])
def test_sampling_smooth_weights_limits_the_order(weights, order):
    """Held over a block the weights lie off by O(η), joined by lines by O(η²): no solver can be better."""
    slope = blocks.sampled(weights, DEPTHS)
    assert slope("euler") == pytest.approx(1, abs=0.1)
    for solver in ("midpoint", "kutta3", "rk4"):
        assert slope(solver) == pytest.approx(order, abs=0.15), solver


def test_relus_kinks_limit_the_order():
    slope = blocks.CASES["shared ReLU field"][0]((32, 256))  # the kinks' places make a shorter range ragged
    assert slope("euler") == pytest.approx(1, abs=0.1)
    assert slope("kutta3") < 2.5 and slope("rk4") < 2.5


def through(name):
    torch.manual_seed(0)
    return blocks.through(blocks.DEEP[name][0]())


@pytest.mark.parametrize("name", ["antisymmetric, γ = 0, rk4", "Hamiltonian, leapfrog", "Hamiltonian, rk4"])
def test_a_thousand_blocks_keep_norms_and_gradients(name):
    ratios = through(name)
    for what in ("state", "gradient"):
        low, high = ratios[what]
        assert 0.1 < low <= high < 10, what


@pytest.mark.parametrize(
    "name", ["parabolic, Euler", "antisymmetric, γ = 0.3, Euler", "antisymmetric, γ = 0.3, rk4"]
)
def test_a_thousand_damped_blocks_never_grow(name):
    """In no block, for no sample; gradients not over the whole."""
    ratios = through(name)
    assert ratios["step"][1] <= 1 and ratios["gradient"][1] <= 1


def test_the_damped_blocks_step_is_below_its_limit():
    torch.manual_seed(0)
    fields = [AntisymmetricField(blocks.WIDE, gamma=0.3) for _ in range(20)]
    assert blocks.STEP < blocks.euler_limit(0.3, fields) < 2 * blocks.STEP


def test_euler_without_damping_grows():
    ratios = through("antisymmetric, γ = 0, Euler")
    assert ratios["state"][0] > 10 and ratios["gradient"][0] > 10


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("plain relu layers, gain 0.9", 0, 1e-40),
        ("plain relu layers, gain 1 (He)", 0, 1e-2),
        ("plain relu layers, gain 1.1", 1e20, float("inf")),
        ("the antisymmetric fields as plain layers", 0, 1e-100),
    ],
)
def test_a_thousand_plain_layers_vanish_or_explode(name, low, high):
    """ln‖x‖² gains 2 ln(gain) − 5/2n ± √(5/n) a layer of n = 64 relus: 10^(1000 lg(gain) − 8.5 ± 1.9) over all.

    The bounds are three standard deviations or more away.
    """
    ratios = through(name)
    for what in ("state", "gradient"):
        assert low <= ratios[what][0] <= ratios[what][1] <= high, what
