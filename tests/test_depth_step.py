"""The first step at which a stack's Jacobian reaches a gain, against closed forms and dense scans."""

import math

import pytest
import torch
from foreign_networks import GPT
from torch import nn
from torch.autograd.functional import jacobian

from resode import ResidualStack, depth_step
from resode.analysis.depth.depth_step import _first_crossing

D = torch.float64


def linear(matrix):
    matrix = torch.tensor(matrix, dtype=D)
    layer = nn.Linear(*matrix.shape, bias=False).double()
    layer.weight.data = matrix
    return layer


CLOSED = {  # F and the η at which σ_max of (I + ηA)^L is 10
    "growth": ([[1.0]], 20, 10 ** (1 / 20) - 1),
    "decay, overshooting": ([[-2.0]], 8, (10 ** (1 / 8) + 1) / 2),
    "rotation": ([[0.0, -3.0], [3.0, 0.0]], 10, math.sqrt(10 ** (2 / 10) - 1) / 3),
    "shear, no eigenvalue of which grows": ([[0.0, 5.0], [0.0, 0.0]], 4, (10 - 1 / 10) / 20),
    "huge": ([[1e6]], 3, (10 ** (1 / 3) - 1) / 1e6),
    "tiny": ([[1e-2]], 2, (10**0.5 - 1) / 1e-2),
    "none": ([[0.0]], 5, math.inf),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name):
    matrix, depth, eta = CLOSED[name]
    stack = ResidualStack(linear(matrix), depth=depth, step_size=0.7).train()
    x = torch.ones(3, len(matrix), dtype=D)
    assert depth_step(stack, x) == pytest.approx(eta, rel=2e-4)
    assert stack.step_size == 0.7 and stack.training
    if math.isfinite(eta):
        other = ResidualStack([linear(matrix) for _ in range(depth)], step_size=0.5, learn_step=True).double()
        assert depth_step(other, x) == pytest.approx(eta / 0.5, rel=2e-4), "of learnt steps: the factor"


def test_other_solvers():
    """For F = x and rk4, σ is R(η)^L."""
    stack = ResidualStack(linear([[1.0]]), depth=4, solver="rk4")
    r = 10 ** (1 / 4)
    found = depth_step(stack, torch.ones(1, 1, dtype=D))
    assert sum(found**k / math.factorial(k) for k in range(5)) == pytest.approx(r, rel=1e-3)


class Shift(nn.Module):
    def forward(self, x):
        return torch.ones_like(x) + 0 * x


class Bump(nn.Module):
    """F' is 40 near x = 1, and 0 elsewhere: the gain of Shift and Bump crosses 10 and falls back."""

    def forward(self, x):
        return 8 * torch.tanh(5 * (x - 1))


@pytest.mark.parametrize("gain", [10, 37])
def test_the_first_of_several_crossings(gain):
    stack = ResidualStack([Shift(), Bump()])
    x = torch.zeros(1, 1, dtype=D)

    def sigma(eta):  # 1 + ηF'(η)
        return 1 + eta * 40 / math.cosh(5 * (eta - 1)) ** 2

    scan = [i / 1e5 for i in range(1, 300_000)]
    first = next(eta for eta in scan if sigma(eta) >= gain)
    assert depth_step(stack, x, gain) == pytest.approx(first, rel=2e-4)
    assert sigma(2.0) < 2, "it falls back, so that a coarser search would miss it"


@pytest.mark.parametrize("centre", [0.01, 0.3, 0.7, 1.3, 2.9, 40.0])
def test_narrow_peaks_are_not_stepped_over(centre):
    """3 exp(−u²) with u = (η − c)/0.15c reaches 2.9 only within 3 % of c."""
    width = 0.15 * centre
    first = centre - width * math.sqrt(math.log(3 / 2.9))
    found = _first_crossing(lambda eta: 3 * math.exp(-(((eta - centre) / width) ** 2)), 2.9, 1e-9, 1e3)
    assert found == pytest.approx(first, rel=2e-4)


def test_the_worst_sample_counts():
    class Cubic(nn.Module):
        def forward(self, x):
            return x**3 / 3

    stack, x = ResidualStack(Cubic(), depth=1), torch.tensor([[0.1], [3.0], [1.0]], dtype=D)
    assert depth_step(stack, x) == pytest.approx(1.0, rel=2e-4)  # 1 + 9η = 10


class Block(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


def test_of_a_model_eta_multiplies_every_branch():
    """Embedding, two blocks of F = x and a head: (1 + η)² = 10, whatever lies outside the blocks."""
    model = nn.Sequential(linear([[7.0]]), Block(linear([[1.0]])), Block(linear([[1.0]])), linear([[9.0]]))
    assert depth_step(model, torch.ones(2, 1, dtype=D)) == pytest.approx(10**0.5 - 1, rel=2e-4)
    alone = nn.Sequential(Block(linear([[1.0]])), Block(linear([[1.0]])))
    assert depth_step(alone, torch.ones(2, 1, dtype=D)) == pytest.approx(10**0.5 - 1, rel=2e-4)


def test_a_model_against_its_own_jacobian():
    """At the step that is found a dense Jacobian of the scaled network has σ_max = 3, and not before."""
    torch.manual_seed(0)
    blocks = [Block(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()) for _ in range(5)]
    model, x = nn.Sequential(*blocks), torch.randn(3, 4, dtype=D)

    def sigma(eta):
        def scaled(z):
            for block in blocks:
                z = z + eta * block.branch(z)
            return z

        return max(float(torch.linalg.svdvals(jacobian(scaled, row))[0]) for row in x)

    found = depth_step(model, x, 3.0)
    assert sigma(found) == pytest.approx(3.0, rel=1e-3)
    assert max(sigma(found * i / 20) for i in range(20)) < 3


def test_a_transformer_of_tokens():
    torch.manual_seed(0)
    model, ids = GPT(), torch.randint(0, 11, (2, 5))
    found = [depth_step(model, ids, gain) for gain in (1.5, 3.0)]
    assert 0 < found[0] < found[1] < math.inf and model.training
    assert all(p.grad is None for p in model.parameters())


def test_200_blocks_without_normalization():
    """Random blocks are known for this: ∏‖I + ηJ‖ grows as exp(η √L …), so η for gain 10 falls with depth."""
    torch.manual_seed(0)
    x = torch.randn(2, 16)
    found = []
    for depth in (10, 40):
        fields = [nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(depth)]
        found.append(depth_step(ResidualStack(fields), x))
    assert found[1] < 0.75 * found[0]


def test_shortcuts_that_reach_the_gain_alone():
    class Wider(nn.Module):
        def __init__(self):
            super().__init__()
            self.short, self.first, self.last = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 3)
            nn.init.constant_(self.short.weight, 10.0)

        def forward(self, x):
            return self.short(x) + self.last(torch.tanh(self.first(x)))

    assert depth_step(nn.Sequential(nn.Linear(2, 2), Wider()), torch.ones(1, 2)) == 0


def test_states_that_no_gain_is_measured_at():
    """Weights of nan once led to a search of a thousand halvings, and the answer 0."""
    bad = nn.Linear(2, 2)
    nn.init.constant_(bad.weight, math.nan)
    x, good = torch.ones(3, 2), ResidualStack(nn.Linear(2, 2), depth=2)
    for model in (ResidualStack(bad, depth=2), nn.Sequential(ResidualStack(bad, depth=2), nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="infinite or nan whatever the step"):
            depth_step(model, x)
    with pytest.raises(ValueError, match="infinite or nan"):
        depth_step(good, x / 0)
    with pytest.raises(TypeError, match="int64"):
        depth_step(good, x.long())
    with pytest.raises(ValueError, match="at least one sample"):
        depth_step(good, x[:0])


def test_arguments():
    stack = ResidualStack(linear([[1.0]]), depth=2)
    x = torch.ones(1, 1, dtype=D)
    for gain in (1.0, -2, math.inf, "10", True):
        with pytest.raises(ValueError, match="gain must be"):
            depth_step(stack, x, gain)
    with pytest.raises(ValueError, match="no residual block"):
        depth_step(nn.Sequential(nn.Linear(1, 1)), torch.ones(1, 1))
    with pytest.raises(TypeError, match="a ResidualStack or a network"):
        depth_step(lambda x: x, x)
