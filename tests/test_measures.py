"""What a diagnosis measures, on networks whose numbers are known in closed form."""

import math

import pytest
import torch
from torch import nn

import resode
from resode.analysis.diagnose import measures
from resode.analysis.diagnose.measures import largest_singular_value, measure, spread
from resode.jacobian.products import JacobianProducts
from tests.clinic.networks import Residual


def look(model: nn.Module, x, target=None, loss_fn=None, blocks=None):
    return measure(model.eval(), x, target, loss_fn, blocks, 0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turn(n: int, c: float, seed: int = 1) -> nn.Linear:
    """c times an orthogonal matrix."""
    layer = nn.Linear(n, n, bias=False)
    layer.weight.data = c * torch.linalg.qr(normal(n, n, seed=seed))[0]
    return layer


# -- batch norm ------------------------------------------------------------------------------------


def test_statistics_of_a_batch_norm_against_its_inputs():
    """Ten channels with deviations 1 … 10 around 3, statistics of deviation 2 around 1: ratio k²/4, offset (3 − 1)/2."""
    x = normal(50_000, 10)
    x = (x - x.mean(0)) / x.std(0, unbiased=False) * torch.arange(1.0, 11) + 3
    norm = nn.BatchNorm1d(10, eps=0.0)
    norm.running_mean.fill_(1.0), norm.running_var.fill_(4.0)
    [found] = look(nn.Sequential(norm, nn.Linear(10, 2)), x).norms
    ratios = torch.arange(1.0, 11).double() ** 2 / 4
    assert found.name == "0" and not found.untouched and not found.trained
    assert found.variance_ratio == pytest.approx(float(torch.quantile(ratios, 0.9)), rel=1e-4)
    assert found.largest_ratio == pytest.approx(25.0, rel=1e-4) and found.offset == pytest.approx(
        1.0, rel=1e-4
    )
    norm.eps = 4.0
    assert look(nn.Sequential(norm, nn.Linear(10, 2)), x).norms[0].largest_ratio == pytest.approx(
        12.5, rel=1e-4
    )
    pictures = x[:400, :, None, None].expand(-1, -1, 2, 3)
    conv = nn.BatchNorm2d(10)
    [found] = look(nn.Sequential(conv, nn.Flatten(), nn.Linear(60, 2)), pictures).norms
    want = pictures.transpose(0, 1).reshape(10, -1).var(1, unbiased=False).double()
    assert found.untouched and found.largest_ratio == pytest.approx(float(want.max()) / (1 + 1e-5), rel=1e-4)


@pytest.mark.parametrize(("weight", "trained"), [(1.0, False), (0.0, False), (0.5, True)])
def test_norms_that_were_trained(weight, trained):
    """A weight of 1 or of 0 throughout is as it was made."""
    norm = nn.BatchNorm1d(4)
    norm.weight.data.fill_(weight)
    [found] = look(nn.Sequential(norm, nn.Linear(4, 2)), normal(8, 4)).norms
    assert found.trained is trained and found.untouched
    norm.running_var[0] = 2
    assert not look(nn.Sequential(norm, nn.Linear(4, 2)), normal(8, 4)).norms[0].untouched
    assert look(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), normal(1, 4)).norms == [], (
        "of one number no variance"
    )


# -- layers ----------------------------------------------------------------------------------------


def test_layers_of_a_linear_chain():
    """y₁ = cQx, y₂ = dRy₁ and ½‖y₂‖²: sizes, gains, and gradients ∂L/∂y₁ = dRᵀy₂, root mean squares over the samples."""
    model = nn.Sequential(turn(16, 3.0), turn(16, 0.5, 2))
    x = normal(4, 16)
    m = look(model, x)
    size = float(x.norm()) / 8
    first, second = m.layers
    assert (first.name, second.name) == ("0", "1") and m.probed == 4 and m.samples == 4
    assert first.gain == pytest.approx(3, rel=1e-5) and second.gain == pytest.approx(0.5, rel=1e-5)
    assert first.size == pytest.approx(3 * size, rel=1e-5) and second.size == pytest.approx(
        1.5 * size, rel=1e-5
    )
    y = float(x.norm()) * 1.5
    assert second.gradient == pytest.approx(y / 2, rel=1e-5) and first.gradient == pytest.approx(
        0.5 * y / 2, rel=1e-5
    )
    want = float((x - x.mean(0)).norm() / x.norm())
    assert first.spread == pytest.approx(want, rel=1e-5) and m.spread[0] == pytest.approx(want, rel=1e-5)
    assert math.isnan(m.spread[1]) and m.spread[2] == pytest.approx(want, rel=1e-5)
    assert m.loss == pytest.approx(0.5 * y**2 / 4, rel=1e-5) and m.classes == 0
    assert m.blocks == [] and math.isnan(m.whole_gain)
    assert spread(torch.ones(1, 3), 1) != spread(torch.ones(1, 3), 1), "of one sample nan"
    assert spread(torch.tensor([[1.0], [-1.0]]), 2) == 1.0 and math.isnan(spread(torch.zeros(2, 2), 2))


def test_classes_and_what_all_logits_share():
    head = nn.Linear(3, 5)
    head.weight.data.zero_(), head.bias.data.copy_(torch.arange(5.0))
    m = look(nn.Sequential(head), normal(6, 3), torch.arange(6) % 5)
    assert m.classes == 5 and m.spread[2] == pytest.approx(0.0, abs=1e-6)
    want = nn.functional.cross_entropy(torch.arange(5.0).expand(6, 5), torch.arange(6) % 5)
    assert m.loss == pytest.approx(float(want), rel=1e-5)
    tokens = look(nn.Sequential(nn.Linear(3, 7)), normal(6, 4, 3), torch.zeros(6, 4, dtype=torch.long))
    assert tokens.classes == 7
    pictures = look(
        nn.Sequential(nn.Conv2d(3, 5, 1)), normal(6, 3, 4, 4), torch.zeros(6, 4, 4, dtype=torch.long)
    )
    assert pictures.classes == 5
    assert look(nn.Sequential(head), normal(6, 3), normal(6, 5)).classes == 0
    own = look(nn.Sequential(head), normal(6, 3), torch.zeros(6, dtype=torch.long), nn.CrossEntropyLoss())
    assert own.classes == 0 and own.spread[2] == pytest.approx(0.0, abs=1e-6)


def test_sizes_of_weights_and_their_places():
    """Root mean square times √(inputs of a unit): 2·√9 for a 3×3 kernel of twos on one channel."""
    conv, fc = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(32, 4)
    conv.weight.data.fill_(2.0), fc.weight.data.fill_(-0.5)
    m = look(nn.Sequential(conv, nn.Flatten(), fc), normal(3, 1, 4, 4))
    assert [(w.name, w.block, w.place) for w in m.weights] == [("0", "", "03×3"), ("2", "", "2")]
    assert [w.size for w in m.weights] == pytest.approx([6.0, 0.5 * 32**0.5])
    blocks = nn.Sequential(
        *[Residual(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))) for _ in range(2)]
    )
    m = look(blocks, normal(3, 4))
    assert [(w.name, w.block, w.place) for w in m.weights] == [
        (f"{i}.branch.{j}", str(i), f"*.branch.{j}") for i in (0, 1) for j in (0, 2)
    ]


def test_weights_that_a_norm_divides_by_are_left_out():
    """In a block behind a batch norm; outside behind any norm right after."""
    normed = Residual(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))
    layered = Residual(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)))
    assert [w.name for w in look(nn.Sequential(normed, normed), normal(3, 4)).weights] == ["0.branch.2"]
    assert [w.name for w in look(nn.Sequential(layered), normal(3, 4)).weights] == [
        "0.branch.0",
        "0.branch.2",
    ]
    plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    assert [w.name for w in look(plain, normal(3, 4)).weights] == ["2"]


def test_units_that_are_all_the_same():
    same, zero, single = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
    for layer, value in ((same, 0.5), (zero, 0.0), (single, 0.5)):
        layer.weight.data.fill_(value)
    assert look(nn.Sequential(same, zero, nn.Linear(4, 4), single), normal(3, 4)).alike == ["0"]


def test_dead_shares():
    """Relu of −|x|: all of its units; of x with half of the columns negative: half. The layer before has the blame."""
    fc = nn.Linear(4, 4, bias=False)
    fc.weight.data = torch.diag(torch.tensor([1.0, 1.0, -1.0, -1.0]))
    x = normal(6, 4).abs() + 0.1
    model = nn.Sequential(fc, nn.Identity(), nn.ReLU(), nn.Linear(4, 2))
    [found] = look(model, x).dead_layers
    assert (found.name, found.layer, found.share) == ("2", "0", 0.5)
    [found] = look(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), -x).dead_layers
    assert (found.name, found.layer, found.share) == ("0", "0", 1.0)
    shares = look(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.GELU(), nn.Linear(4, 2)), x).dead_layers
    assert shares == [], "functions without a dead zone"
    twice = nn.Sequential(fc, nn.ReLU())
    both = nn.Sequential(twice, twice, nn.Linear(4, 2))
    assert look(both, x).dead_layers[0].share == 0.5, "the least of several calls"


def test_modules_that_no_sample_reaches():
    class Gate(nn.Module):
        def __init__(self, n, reached):
            super().__init__()
            self.experts, self.reached = nn.ModuleList([nn.Linear(4, 4) for _ in range(n)]), reached

        def forward(self, x):
            return sum(self.experts[i](x) for i in range(self.reached))

    [note] = look(Gate(4, 2), normal(3, 4)).notes
    assert "No sample reached experts.2, experts.3, of 4 modules" in note
    [note] = look(Gate(12, 2), normal(3, 4)).notes
    assert "experts.9 and 2 more, of 12 modules" in note
    assert look(Gate(4, 4), normal(3, 4)).notes == [] and look(Gate(2, 1), normal(3, 4)).notes == []


# -- what is not finite ----------------------------------------------------------------------------


def test_the_first_place_that_is_not_finite():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].bias.data[0] = math.nan
    assert look(model, normal(3, 2)).non_finite == ("1", "the weights: bias of 1")
    lone = nn.Linear(2, 2)
    lone.weight.data[0] = math.inf
    assert look(lone, normal(3, 2)).non_finite == ("", "the weights: weight of the model")
    norm = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    norm[0].running_var[0] = math.nan
    assert look(norm, normal(3, 2)).non_finite == ("0", "the weights: running_var of 0")
    mask = nn.Linear(2, 2)
    mask.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert look(mask, normal(3, 2)).non_finite is None, "−∞ beside finite numbers masks"

    class Log(nn.Module):
        def forward(self, x):
            return x.log()

    bad = nn.Sequential(nn.Linear(2, 2), Log(), nn.Linear(2, 2))
    bad[0].weight.data.zero_(), bad[0].bias.data.fill_(-1.0)
    assert look(bad, normal(3, 2)).non_finite == ("1", "the output of 1")
    huge = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    huge[0].weight.data.fill_(1e20), huge[1].weight.data.fill_(1e20)
    huge[2].weight.data.fill_(1.0)
    place, what = look(huge, torch.ones(3, 2)).non_finite
    assert place == "1" and what == "the output of 1, whose inputs and weights reach 2e+20"
    assert look(nn.Linear(2, 2), torch.tensor([[math.nan, 1.0]])).non_finite == ("", "the inputs")
    fine = nn.Linear(2, 2)
    assert look(fine, normal(3, 2), torch.full((3, 2), math.nan)).non_finite == ("", "the targets")
    assert look(fine, normal(3, 2), normal(3, 2), lambda y, t: (y - t).mean() * math.inf).non_finite == (
        "",
        "the loss",
    )

    class Root(nn.Module):
        def forward(self, x):
            return (x - x.detach()).abs().sqrt() + x

    rooted = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Root(), nn.Linear(2, 2))
    assert look(rooted, normal(3, 2)).non_finite == ("1", "the gradient at the output of 1")


# -- blocks ----------------------------------------------------------------------------------------


def test_blocks_of_rotations():
    """y = x + cQx: branch gain c; ‖y‖²/‖x‖² and the gain's square have mean 1 + c²; σ from below, (1 + c) at most."""
    cs = (0.1, 0.5, 2.0)
    model = nn.Sequential(*[Residual(turn(24, c, i)) for i, c in enumerate(cs)])
    x = normal(8, 24)
    m = look(model, x)
    assert ([b.name for b in m.blocks] == ["0", "1", "2"] and m.siblings == []) or len(m.siblings) == 3
    for b, c, layer in zip(m.blocks, cs, model, strict=True):
        jacobian = torch.eye(24) + layer.branch.weight.detach()
        sigma = float(torch.linalg.svdvals(jacobian)[0])
        assert b.branch_gain == pytest.approx(c, rel=1e-4) and b.ratio == pytest.approx(c, rel=1e-4)
        assert b.size == pytest.approx(c * float(x.norm()) / (8 * 24) ** 0.5, rel=1e-4)
        y = x @ jacobian.T
        assert b.growth == pytest.approx(float(y.norm() / x.norm()), rel=1e-4)
        assert b.gain == pytest.approx(math.sqrt(1 + c * c), rel=0.15) and 0.9 * sigma <= b.sigma <= sigma * (
            1 + 1e-5
        )
        assert (b.shortcut, b.factor, b.kind, b.sibling, b.keeps_shape) == (
            1.0,
            1.0,
            "identity",
            "Residual",
            True,
        )
        x = y
    whole = torch.eye(24)
    for layer in model:
        whole = (torch.eye(24) + layer.branch.weight.detach()) @ whole
    sigma = float(torch.linalg.svdvals(whole)[0])
    assert 0.9 * sigma <= m.whole_sigma <= sigma * (1 + 1e-5)
    assert m.whole_gain == pytest.approx(float(whole.norm()) / 24**0.5, rel=0.2)
    start = normal(8, 24)
    assert m.state_growth == pytest.approx(float((x.norm(dim=1) / start.norm(dim=1)).max()), rel=1e-4)
    out = x
    gradient = float((out @ whole).norm()) / 8**0.5  # of ½‖y‖² at the first block's x
    assert m.blocks[0].gradient == pytest.approx(gradient, rel=1e-4)


def test_shortcuts_and_signs():
    """c·x by its factor; average pooling is none; a subtracted branch has η = −1."""
    scaled = Residual(turn(8, 0.5), factor=0.25)
    minus = Residual(turn(8, 0.5))
    minus.sign = -1
    found = look(nn.Sequential(scaled, minus), normal(4, 8)).blocks
    assert [b.shortcut for b in found] == pytest.approx([0.25, 1.0]) and [b.factor for b in found] == [
        1.0,
        -1.0,
    ]
    assert found[0].branch_gain == pytest.approx(0.5, rel=1e-4) and found[1].branch_gain == pytest.approx(
        0.5, rel=1e-4
    )

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x):
            return nn.functional.avg_pool2d(x, 3, 1, 1) + self.conv(x)

    [b] = look(nn.Sequential(Pooled()), normal(4, 2, 6, 6)).blocks
    assert math.isnan(b.shortcut) and b.kind == "parameter-free" and b.branch_gain > 0


def test_power_iteration_from_below():
    """diag(4, 1, …): every round gains (4/1)²; the worst sample counts; functions of one derivative give nan."""
    d = torch.ones(6)
    d[0] = 4.0
    x = torch.tensor([[1.0], [2.0]]) * torch.ones(2, 6)
    products = JacobianProducts(lambda x: x * d * x.detach(), x)  # J = diag(d) and 2 diag(d)
    u = torch.ones(2, 6)
    one, many = (largest_singular_value(products, u, 2, rounds) for rounds in (1, 12))
    assert one < many <= 8 * (1 + 1e-6) and many == pytest.approx(8.0, rel=1e-5)
    assert one == pytest.approx(2 * math.sqrt((4**4 + 5) / (4**2 + 5)), rel=1e-5)
    assert largest_singular_value(products, torch.zeros(2, 6), 2, 3) == 0


def test_two_evaluations_that_a_solver_took():
    """An adaptive block's steps are counted, and replaced by rk4's, one for each twelve evaluations."""

    class Field(nn.Linear):
        def forward(self, t, x):
            return super().forward(x)

    model = nn.Sequential(
        resode.ODEBlock(Field(3, 3), solver="dopri5"), resode.ResidualStack(nn.Linear(3, 3), depth=2)
    )
    m = look(model, normal(4, 3))
    assert set(m.evaluations) == {"0", "1"} and m.evaluations["1"] == [1, 1] and m.evaluations["0"][0] >= 7
    assert model[0].solver == "dopri5" and model[0].n_steps is None
    assert m.order["0"] < m.order["1"] and len(m.blocks) >= 3
    assert m.blocks[-1].name.startswith("1")


def test_recurrent_layers():
    rnn = nn.LSTM(3, 5, batch_first=True, bidirectional=True)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = rnn, nn.Linear(10, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    m = look(Reads(), normal(4, 7, 3))
    [r] = m.recurrences
    assert (r.name, r.kind, r.steps) == ("rnn", "LSTM", 7)
    x = normal(4, 7, 3).requires_grad_()
    [g] = torch.autograd.grad(rnn(x)[0][:, -1, :5].sum(), x)
    assert r.ratio == pytest.approx(float(g[:, 0].norm() / g[:, -1].norm()), rel=1e-4)
    forgetful = nn.RNN(3, 5)
    forgetful.weight_hh_l0.data.mul_(1e-4)

    class Time(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = forgetful, nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.rnn(x.transpose(0, 1))[0][-1])

    [note] = look(Time(), normal(4, 6, 3)).notes
    assert note.startswith("rnn (RNN): at the first of 6 time steps") and "LSTM or a GRU" in note


def test_outputs_must_hold_the_samples():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x).sum(0)

    with pytest.raises(ValueError, match=r"must hold the 4 samples as dimension 0: got shape \(3,\)"):
        look(Summed(), normal(4, 3))
    assert measures.SAMPLES == 8 and look(nn.Linear(3, 3), normal(20, 3)).probed == 8


def test_blocks_of_a_stack_and_of_a_loop_are_named():
    shared = resode.ResidualStack(nn.Linear(3, 3), depth=2)
    own = resode.ResidualStack([nn.Linear(3, 3), nn.Linear(3, 3)], solver="rk4")
    names = [b.name for b in look(nn.Sequential(shared, own), normal(4, 3)).blocks]
    assert names[:2] == ["0", "0"] and {n for n in names[2:]} == {"1.fields.0", "1.fields.1"}

    class Loop(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.branches = nn.ModuleList([nn.Linear(3, 3) for _ in range(n)])

        def forward(self, x):
            for branch in self.branches:
                x = x + branch(x)
            return x

    assert [b.name for b in look(nn.Sequential(Loop(4)), normal(4, 3)).blocks] == [
        f"0.branches.{i}" for i in range(4)
    ]
    assert [b.name for b in look(nn.Sequential(Loop(3)), normal(4, 3)).blocks] == ["0"] * 3
    assert len({b.sibling for b in look(nn.Sequential(Loop(3)), normal(4, 3)).blocks}) == 3
