"""The depth profile: every block found, gradients split, limits and gains measured, in anyone's network."""

from __future__ import annotations

import copy
import csv
import math

import numpy as np
import pytest
import torch
from foreign_networks import GPT, HFResNet, ResNet50
from torch import nn

from resode import ODEBlock, ResidualStack, profile_depth
from resode.analysis import product_norm, reordering_study, step_scan
from resode.analysis.depth.alignment import class_means
from resode.analysis.depth.gradients import split_gradient
from resode.analysis.depth.lesion import evaluated, run_edited
from resode.analysis.depth.tracing import trace
from resode.networks import build

F64 = torch.float64


def randomized(model, seed=0):
    """Running statistics and scales off their starts, so that nothing is symmetric by chance."""
    g = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            value.copy_(0.1 * torch.randn(value.shape, generator=g))
        elif name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=g))
    return model.eval()


def images(n=2, size=16):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def names(model, x, **options):
    return [(a.name, a.kind) for a in trace(model, x, **options).additions]


# -- every residual addition is found -----------------------------------------------------------------


def test_resnet50_as_torchvision_writes_it():
    """3 + 4 + 6 + 3 bottlenecks; the first of each group has a projection."""
    model = randomized(ResNet50())
    found = trace(model, images(1, 64)).additions
    expected = [(f"layer{i}.{j}", "projection" if j == 0 else "identity")
                for i, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for j in range(n)]  # fmt: skip
    assert [(a.name, a.kind) for a in found] == expected
    assert {a.after for a in found} == {"Relu"} and {a.step_size for a in found} == {1.0}


def test_ours():
    resnet = names(randomized(build("resnet20")), images())
    assert [n for n, _ in resnet] == [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3)]
    assert [k for _, k in resnet] == [
        "identity" if n not in ("layer2.0", "layer3.0") else "parameter-free" for n, _ in resnet
    ]
    for option in ({}, {"solver": "rk4"}, {"solver": "midpoint"}, {"learn_step": True}):
        assert len(names(randomized(build("odenet20", **option)), images())) == 9, option
    assert len(names(build("highway19").eval(), images())) == 14
    assert names(build("plain20").eval(), images()) == []
    assert len(names(build("resnet50", num_classes=5).eval(), images(1, 64))) == 16
    assert len(names(randomized(build("resnet20", gradient="checkpoint")), images())) == 9


def test_substeps_are_additions_of_their_own():
    found = trace(
        randomized(build("odenet20", solver="euler", substeps=2, step_size=0.5)), images()
    ).additions
    assert len(found) == 2 * 7 + 2
    assert {round(a.step_size, 6) for a in found if a.module.startswith("layer1")} == {0.25}


def test_a_solvers_steps_are_blocks_and_its_stages_none():
    """An ODEBlock of three steps under rk4, whose stages add too: three blocks x + ηΦ(x)."""

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, t, x):
            return torch.tanh(self.linear(x))

    block = ODEBlock(Field(), solver="rk4", n_steps=3).double().eval()
    x = torch.randn(2, 4, dtype=F64)
    profile = profile_depth(block, x)
    assert [r.name for r in profile.rows] == ["model[0]", "model[1]", "model[2]"]
    torch.testing.assert_close(trace(block, x).additions[-1].y, block(x).detach())
    with pytest.raises(ValueError, match="n_steps="):
        profile_depth(ODEBlock(Field(), solver="dopri5").eval(), x)


def test_hugging_face_style_and_mappings():
    found = names(randomized(HFResNet()), {"pixel_values": images()})
    assert found == [(f"layers.{i}", "projection" if i == 2 else "identity") for i in range(4)]


def test_a_forward_that_takes_one_dictionary():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, batch):
            return {"out": batch["image"] + self.f(batch["image"]).tanh()}

    profile = profile_depth(Net().eval(), {"image": torch.randn(5, 4), "id": torch.arange(5)}, batch_size=2)
    assert [r.name for r in profile.rows] == ["model"] and profile.samples == 5


def test_transformers_have_two_additions_a_block_or_one():
    """Masks, position embeddings and a GELU written by hand add too, and are no blocks."""
    ids = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    assert names(GPT().eval(), ids) == [(f"h.{i}[{j}]", "identity") for i in range(2) for j in range(2)]
    parallel = trace(GPT(parallel=True).eval(), ids).additions
    assert [(a.name, a.kind) for a in parallel] == [("h.0", "identity"), ("h.1", "identity")]
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    found = trace(encoder, torch.randn(2, 5, 8)).additions
    assert len(found) == 6 and {a.after for a in found} == {"NativeLayerNorm"}


def test_a_decoders_cross_attention_is_a_block():
    """It adds to the decoder's state what it reads from the encoder: 2 additions an encoder layer, 3 a decoder
    layer, and F's part of the gradient is that through the decoder's state."""
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 2, 16, batch_first=True).double().eval()
    x = torch.randn(2, 4, 8, dtype=F64), torch.randn(2, 3, 8, dtype=F64)
    profile = profile_depth(model, x)
    found = [row.name for row in profile.rows]
    assert found == [f"encoder.layers.0[{i}]" for i in range(2)] + [
        f"decoder.layers.{layer}[{i}]" for layer in range(2) for i in range(3)
    ]
    assert all(row.kind == "identity" and row.split_error < 1e-14 for row in profile.rows)


def test_a_skip_around_other_blocks_is_found_beside_them():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            y = x + torch.tanh(self.a(x))
            y = y + torch.tanh(self.b(y))
            return x + self.c(y)

    assert len(names(Outer().eval(), torch.randn(2, 4))) == 3


def test_modules_by_name_where_nothing_is_traced():
    class Hidden(nn.Module):
        """A residual map whose addition no mode sees: one linear operation."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Hidden().eval(), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"no residual block was found.*blocks="):
        profile_depth(model, x)
    profile = profile_depth(model, x, blocks="layers.*")
    assert [r.name for r in profile.rows] == ["layers.0", "layers.1", "layers.2"]
    weight = model.layers[1].weight.detach()
    assert profile.rows[1].epsilon == pytest.approx(
        float(torch.linalg.matrix_norm(weight - torch.eye(4), 2)), rel=1e-4
    )
    with torch.no_grad():
        z, without = model(x), model.layers[2](model.layers[0](x))
    assert profile.rows[1].output_change == pytest.approx(float((without - z).norm() / z.norm()), rel=1e-5)
    assert profile.rows[1].split_error < 1e-6
    with pytest.raises(ValueError, match="names no module"):
        profile_depth(model, x, blocks="layer.*")
    wide = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).eval()
    with pytest.raises(ValueError, match="keep the state's shape"):
        profile_depth(wide, x, blocks="0")


def test_forms_of_addition():
    """x − f, alpha=, in place, a learned factor of one entry, F before x: y, η and F's sign are right."""

    class Forms(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.ModuleList([nn.Linear(3, 3) for _ in range(7)])
            self.alpha = nn.Parameter(torch.tensor([0.3]))

        def forward(self, x):
            x = x - 0.5 * self.f[0](x)
            x = torch.add(x, self.f[1](x), alpha=0.25)
            y = self.f[2](x)
            y.add_(x)
            y = y + self.alpha * self.f[3](y)
            y = self.f[4](y) + y
            y = y + self.f[5](y) / 4
            return sum([y, -2 * self.f[6](y)])

    model, x = Forms().double().eval(), torch.randn(4, 3, dtype=F64)
    traced = trace(model, x)
    assert [round(a.step_size, 6) for a in traced.additions] == [0.5, 0.25, 1, 0.3, 1, 0.25, 2]
    signs = [-1, 1, 1, 1, 1, 1, -1]
    profile = profile_depth(model, x)
    for a, row, f, sign in zip(traced.additions, profile.rows, model.f, signs, strict=True):
        assert a.kind == "identity" and row.split_error < 1e-14
        torch.testing.assert_close(a.increment, sign * a.step_size * f(a.x).detach())
        largest = torch.linalg.eigvals(sign * f.weight.detach()).real.max()
        assert complex(row.rightmost).real == pytest.approx(float(largest), rel=1e-9)
        assert row.epsilon == pytest.approx(
            a.step_size * float(torch.linalg.matrix_norm(f.weight.detach(), 2))
        )
    with torch.inference_mode():
        again = profile_depth(model, x)
    assert again.rows[0].gradient == profile.rows[0].gradient


# -- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "odenet20", "preact20"])
def test_states_increments_and_split_gradients_are_autograds(name):
    """x, F(x), y by hooks and by hand; both parts against autograd's gradient with the other path cut."""
    model = randomized(build(name)).double()
    x = images().double()
    traced = trace(model, x)
    loss = traced.output.square().sum()
    for a in traced.additions:
        torch.testing.assert_close(a.shortcut + a.increment, a.y, rtol=1e-12, atol=1e-12)
        gx, gy = torch.autograd.grad(loss, [*a.at_x.edges, *a.at_y.edges], retain_graph=True)
        identity, residual = split_gradient(a, gy)
        torch.testing.assert_close(identity + residual, gx, rtol=1e-10, atol=1e-12 * float(gx.abs().max()))
        if a.kind == "identity":
            assert torch.equal(identity, gy)
        assert float(residual.norm()) > 1e-3 * float(gx.norm())


def test_residual_part_by_hand():
    """y = x + 0.5 W x: identity part g, residual part 0.5 Wᵀg, eigenvalues of W, singular values of I + W/2."""
    torch.manual_seed(0)
    stack = ResidualStack([nn.Linear(3, 3, bias=False) for _ in range(2)], step_size=0.5).double().eval()
    x = torch.randn(5, 3, dtype=F64)
    profile = profile_depth(stack, x, torch.zeros(5, 3, dtype=F64))
    w = [f.weight.detach() for f in stack.fields]
    one = torch.eye(3, dtype=F64)
    states = [x, x + 0.5 * x @ w[0].T]
    y = states[1] + 0.5 * states[1] @ w[1].T
    g = 2 * y / 3  # mean squared error over 3 entries, sample by sample
    last, first = profile.rows[1], profile.rows[0]
    assert last.step_size == 0.5 and last.solver == "euler"
    assert last.identity_gradient == pytest.approx(float(g.norm(dim=1).mean()), rel=1e-12)
    assert last.residual_gradient == pytest.approx(float((0.5 * g @ w[1]).norm(dim=1).mean()), rel=1e-12)
    assert last.gradient == pytest.approx(float((g @ (one + 0.5 * w[1])).norm(dim=1).mean()), rel=1e-12)
    g0 = g @ (one + 0.5 * w[1]) @ (one + 0.5 * w[0])
    assert first.gradient == pytest.approx(float(g0.norm(dim=1).mean()), rel=1e-12)
    cosines = nn.functional.cosine_similarity(g0, g @ (one + 0.5 * w[1]), dim=1)
    assert first.next_cosine == pytest.approx(float(cosines.mean()), rel=1e-6)
    assert first.ratio == pytest.approx(
        float(((0.5 * x @ w[0].T).norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-12
    )
    for row, weight in zip(profile.rows, w, strict=True):
        eigenvalues = torch.linalg.eigvals(weight)
        assert complex(row.rightmost).real == pytest.approx(float(eigenvalues.real.max()), rel=1e-9)
        sigma = torch.linalg.svdvals(one + 0.5 * weight)
        assert row.sigma_max == pytest.approx(float(sigma[0]), rel=1e-9)
        assert row.sigma_min == pytest.approx(float(sigma[-1]), rel=1e-9)
        assert row.epsilon == pytest.approx(0.5 * float(torch.linalg.matrix_norm(weight, 2)), rel=1e-9)
        assert 1 - row.epsilon <= row.sigma_min and row.sigma_max <= 1 + row.epsilon
    product = (one + 0.5 * w[1]) @ (one + 0.5 * w[0])
    [group] = profile.groups
    assert group.exact and group.blocks == 2
    assert group.norm == pytest.approx(float(torch.linalg.matrix_norm(product, 2)), rel=1e-6)
    assert group.lower <= group.smallest and group.norm <= group.upper <= group.uniform * (1 + 1e-12)
    assert first.correction == pytest.approx(
        float(nn.functional.cosine_similarity(x @ w[0].T, y - x, dim=1).mean()), rel=1e-6
    )
    assert last.correction == pytest.approx(1.0) and last.boosting == pytest.approx(
        float(nn.functional.cosine_similarity(states[1] @ w[1].T, -g, dim=1).mean()), rel=1e-6
    )
    removed = states[1].square().mean(1).mean() - y.square().mean(1).mean()
    assert last.loss_change == pytest.approx(float(removed), rel=1e-9)


def test_dead_units_and_class_means():
    field = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        field[0].weight.zero_()
        field[0].bias.copy_(torch.tensor([1.0, 1, -1, -1, -1, -1, -1, -1]))
    profile = profile_depth(ResidualStack([field]).eval(), torch.randn(2, 4))
    assert profile.rows[0].inactive == 0.75
    assert profile.rows[0].epsilon == 0 and profile.rows[0].step_limit == math.inf
    means = class_means(torch.tensor([[1.0], [2.0], [6.0], [9.0]]), torch.tensor([0, 0, 0, 1]))
    assert means[:3, 0].tolist() == [4.0, 3.5, 1.5] and math.isnan(means[3, 0])


def test_a_rows_limit_is_of_the_stacks_own_solver():
    """F = −3x under rk4 with η = 0.5: its limit is 2.785…/3, Euler's 2/3; both within."""
    field = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        field.weight.copy_(-3 * torch.eye(2))
    stack = ResidualStack(field, depth=3, solver="rk4", step_size=0.5).double().eval()
    x = torch.randn(2, 2, dtype=F64)
    row = profile_depth(stack, x).rows[1]
    assert (row.solver, row.step_size) == ("rk4", 0.5)
    assert row.step_limit == pytest.approx(2.785293563405 / 3, rel=1e-10)
    assert profile_depth(stack, x, solver="euler").rows[1].step_limit == pytest.approx(2 / 3, rel=1e-12)


def test_an_unstable_blocks_row_tells_its_growth_and_its_limit():
    """λ = −5 in every block: 2/5 is safe, the third block takes 0.9 and multiplies by |1 − 4.5|."""
    field = nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        field.weight.copy_(torch.diag(torch.tensor([-5.0, -3, -2, -1, -1, -0.5])))
    fields = [copy.deepcopy(field) for _ in range(4)]
    stack = ResidualStack(fields, step_size=0.1, learn_step=True).double().eval()
    with torch.no_grad():
        stack.step_sizes[2] = 0.9
    profile = profile_depth(nn.Sequential(stack, nn.Linear(6, 2)).double().eval(), torch.randn(3, 6).double())
    row = profile.rows[2]
    assert (row.growth, row.decaying_step) == (pytest.approx(3.5), pytest.approx(0.4))


def test_a_hugging_face_resnet():
    """From its public package, where that is installed, with random weights: 2 blocks a group."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config).eval()
    profile = profile_depth(model, {"pixel_values": images(2, 32)}, torch.tensor([0, 1]), spectra=1)
    assert [r.name.removeprefix("resnet.encoder.") for r in profile.rows] == [
        f"stages.{i}.layers.{j}" for i in range(2) for j in range(2)
    ]
    assert max(r.split_error for r in profile.rows) < 1e-5


# -- whole networks, and parts -----------------------------------------------------------------------


def test_a_profile_of_a_resnet(tmp_path):
    model = randomized(build("resnet20"))
    before = copy.deepcopy(model.state_dict())
    x, target = images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    profile = profile_depth(model, x, target, spectra=1)
    assert len(profile.rows) == 9 and max(r.split_error for r in profile.rows) < 1e-5
    shapeless = [r for r in profile.rows if r.kind != "identity"]
    assert len(shapeless) == 2 and all("changes shape" in r.note and math.isnan(r.growth) for r in shapeless)
    assert all(0 < r.sigma_min < r.sigma_max for r in profile.rows)
    assert all(r.sigma_max <= 1 + r.epsilon + 1e-4 for r in profile.rows if r.kind == "identity")
    assert all(
        0 <= r.inactive <= 1 and not math.isnan(r.class_correction)
        for r in profile.rows
        if r.kind == "identity"
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    profile.to_csv(tmp_path / "p.csv")
    with open(tmp_path / "p.csv") as file:
        rows = list(csv.DictReader(file))
    assert [r["name"] for r in rows] == [r.name for r in profile.rows]
    assert float(rows[0]["state_norm"]) == profile.rows[0].state_norm
    profile.plot(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 20_000


def test_parts_give_what_the_whole_gives():
    model, x, target = randomized(build("odenet20")), images(7), torch.arange(7) % 3
    whole = profile_depth(model, x, target, spectra=0)
    some = profile_depth(model, x, target, spectra=0, batch_size=3)
    for a, b in zip(whole.rows, some.rows, strict=True):
        for name in (
            "state_norm",
            "ratio",
            "gradient",
            "gradient_cosine",
            "boosting",
            "loss_change",
            "output_change",
        ):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=2e-4, abs=1e-6), name
    assert whole.loss == pytest.approx(some.loss, rel=1e-5) and some.samples == 7


def test_sequences_with_a_target_at_every_position():
    ids = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    profile = profile_depth(GPT().double().eval(), ids, ids)
    assert len(profile.rows) == 4 and max(r.split_error for r in profile.rows) < 1e-12
    assert all(not r.note and r.sigma_max > 1 for r in profile.rows)
    assert profile.groups[0].exact and profile.groups[0].norm <= profile.groups[0].upper


def test_lesions_are_the_network_without_the_block():
    """The block's F at 0 by its weights: the last batch norm's scale and shift."""
    model, x, target = randomized(build("resnet20")), images(4), torch.tensor([0, 1, 2, 3])
    additions = trace(model, x).additions
    for i, name in ((1, "layer1.1"), (3, "layer2.0"), (8, "layer3.2")):
        without = copy.deepcopy(model)
        with torch.no_grad():
            without.get_submodule(f"{name}.bn2").weight.zero_()
            without.get_submodule(f"{name}.bn2").bias.zero_()
            expected = without(x)
        torch.testing.assert_close(
            run_edited(model, x, [(additions[i], 0.0)]), expected, rtol=1e-5, atol=1e-5
        )
        half = copy.deepcopy(model)
        with torch.no_grad():
            half.get_submodule(f"{name}.bn2").weight.mul_(0.5)
            half.get_submodule(f"{name}.bn2").bias.mul_(0.5)
            torch.testing.assert_close(
                run_edited(model, x, [(additions[i], 0.5)]), half(x), rtol=1e-4, atol=1e-4
            )
    assert evaluated(model, x, target, size=3)[0] == pytest.approx(evaluated(model, x, target)[0], rel=1e-5)


def test_lesion_of_torchvisions_in_place_addition():
    model, x = randomized(ResNet50()), images(1, 32)
    additions = trace(model, x).additions
    without = copy.deepcopy(model)
    with torch.no_grad():
        without.layer3[2].bn3.weight.zero_()
        without.layer3[2].bn3.bias.zero_()
        torch.testing.assert_close(
            run_edited(model, x, [(additions[9], 0.0)]), without(x), rtol=1e-4, atol=1e-5
        )


def test_reordering_and_the_critical_step():
    torch.manual_seed(0)
    fields = [nn.Linear(3, 3) for _ in range(3)]
    stack = ResidualStack(fields, step_size=0.2).double().eval()
    x, target = torch.randn(6, 3, dtype=F64), torch.randn(6, 3, dtype=F64)
    before = [id(f) for f in stack.fields]
    found = reordering_study(stack, x, target)
    assert [(s.first, s.second) for s in found] == [(0, 1), (1, 2), (0, 2)]
    other = ResidualStack([fields[1], fields[0], fields[2]], step_size=0.2).double().eval()
    assert found[0].loss == pytest.approx(evaluated(other, x, target)[0], rel=1e-12)
    assert [id(f) for f in stack.fields] == before
    scan = step_scan(stack, x, target, (1.0, 2.0))
    longer = ResidualStack(fields, step_size=0.4).double().eval()
    assert scan.losses[1] == pytest.approx(evaluated(longer, x, target)[0], rel=1e-12)


# -- products of Jacobians ---------------------------------------------------------------------------


def test_the_product_bound():
    """(1.05)^100 = 131.501… and 0.05^100 for J = 0.05 I; and between the bounds for random J."""
    found = product_norm([lambda x: 0.05 * x] * 100, torch.ones(2, 4, dtype=F64))
    assert found.norm.tolist() == pytest.approx([1.05**100] * 2, rel=1e-12)
    assert found.uniform.tolist() == pytest.approx([131.501257846304] * 2, rel=1e-9)
    assert float(found.plain[0]) == pytest.approx(0.05**100, rel=1e-9)
    torch.manual_seed(0)
    weights = [0.02 * torch.randn(40, 40, dtype=F64) for _ in range(10)]
    found = product_norm([lambda x, w=w: x @ w.T for w in weights], torch.randn(2, 40, dtype=F64))
    product = torch.eye(40, dtype=F64)
    for w in weights:
        product = (torch.eye(40, dtype=F64) + w) @ product
    sigma = torch.linalg.svdvals(product)
    assert found.norm.tolist() == pytest.approx([float(sigma[0])] * 2, rel=1e-10)
    assert found.smallest.tolist() == pytest.approx([float(sigma[-1])] * 2, rel=1e-8)
    assert bool((found.lower <= found.smallest).all() & (found.norm <= found.upper).all())
    assert bool((found.upper <= found.uniform).all())


def test_eigenvalues_alone_bound_no_product():
    """Alternating nilpotent blocks: ρ = 0 in each, and the product grows like a golden mean's square."""
    a = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64)
    found = product_norm([lambda x: x @ a.T, lambda x: x @ a] * 10, torch.ones(1, 2, dtype=F64))
    assert float(found.radii.max()) < 1e-6
    assert float(found.norm) == pytest.approx(((3 + 5**0.5) / 2) ** 10, rel=1e-10)
    assert float(found.norm) <= float(found.upper)


def test_a_stack_under_another_solver_is_refused():
    with pytest.raises(ValueError, match="Euler"):
        product_norm(ResidualStack(nn.Linear(2, 2), depth=2, solver="rk4"), torch.ones(1, 2))


# -- bad input ------------------------------------------------------------------------------------------


def test_bad_input():
    model = randomized(build("resnet20"))
    with pytest.raises(ValueError, match=r"training mode.*eval"):
        profile_depth(build("resnet20"), images())
    with pytest.raises(ValueError, match="no residual block"):
        profile_depth(build("plain20").eval(), images())
    with pytest.raises(TypeError, match="complex"):
        profile_depth(model, images() + 0j)
    with pytest.raises(ValueError, match="depends on its input"):
        profile_depth(nn.Identity().eval(), torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="do not fit an output"):
        profile_depth(model, images(), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="output's shape"):
        profile_depth(model, images(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="dopri5 takes steps of its own in layer1"):
        profile_depth(build("odenet20", solver="dopri5").eval(), images())
    with pytest.raises(ValueError, match="spectra must be"):
        profile_depth(model, images(), spectra=-1)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        profile_depth(lambda x: x, images())
    with pytest.raises(ValueError, match="batch_size"):
        profile_depth(model, images(), batch_size=0)
    with pytest.raises(ValueError, match="at least one tensor"):
        profile_depth(model, {})
    with pytest.raises(ValueError, match="one number a sample"):
        profile_depth(model, images(), torch.tensor([0, 1]), loss_fn=lambda z, t: z)


def test_a_head_that_reads_the_last_state_is_no_activation():
    """x + W x, then a linear head: an Euler step. With a ReLU after the addition it is none."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, after):
            super().__init__()
            self.f, self.after = nn.Linear(3, 3), after

        def forward(self, x):
            return self.after(x + self.f(x))

    for after, expected in ((nn.Identity(), ""), (nn.ReLU(), "Relu")):
        model = nn.Sequential(Block(after), nn.Linear(3, 2)).eval()
        profile = profile_depth(model, torch.randn(2, 3), spectra=0)
        assert [row.after for row in profile.rows] == [expected]
    pooled = nn.Sequential(Block(nn.Identity()), nn.AdaptiveAvgPool1d(1)).eval()
    assert profile_depth(pooled, torch.randn(2, 3), spectra=0).rows[0].after == ""

    def afters(*layers):
        return [
            row.after
            for row in profile_depth(nn.Sequential(*layers).eval(), torch.randn(2, 3), spectra=0).rows
        ]

    def head():
        return nn.LayerNorm(3), nn.Linear(3, 2)

    assert afters(Block(nn.Identity()), Block(nn.Identity()), *head()) == ["", ""]
    assert afters(Block(nn.LayerNorm(3)), Block(nn.LayerNorm(3)), *head()) == 2 * ["NativeLayerNorm"]
    between = afters(Block(nn.Identity()), nn.ReLU(), Block(nn.Identity()), nn.ReLU(), nn.Linear(3, 2))
    assert between == ["Relu", ""], "the second is the head's"


def test_random_masks_of_ones_own_are_refused():
    """A hand-written stochastic depth left in training mode inside an eval model; without it all is well."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(3, 3)

        def forward(self, x):
            y = self.f(x)
            if self.training:
                y = y * torch.empty(len(x), 1).bernoulli_(0.5) / 0.5
            return x + y

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(12))).eval()
    assert len(profile_depth(model, torch.randn(4, 3), spectra=0).rows) == 12
    for block in model:
        block.train()
    with pytest.raises(ValueError, match=r"another output each time.*eval.*; 0 is in training mode"):
        profile_depth(model, torch.randn(4, 3))


def test_ones_own_loss():
    model, x, target = randomized(build("odenet20")), images(), torch.tensor([0, 1])
    plain = profile_depth(model, x, target, spectra=0)
    own = profile_depth(model, x, target, spectra=0, loss_fn=nn.CrossEntropyLoss())
    assert own.loss == pytest.approx(plain.loss, rel=1e-6)
    assert own.rows[0].gradient == pytest.approx(plain.rows[0].gradient, rel=1e-5)


@pytest.mark.parametrize("learn", ["block", "channel"])
def test_learnt_steps_of_either_sign_are_part_of_the_field(learn):
    """A step −η of F is one of η of −F: λ is of diag(c) W, and of −W, whatever the method."""
    torch.manual_seed(0)
    stack = ResidualStack([nn.Linear(3, 3, bias=False) for _ in range(2)], solver="rk4", learn_step=learn,
                          channels=3 if learn == "channel" else None).double()  # fmt: skip
    learnt = torch.tensor([-0.5, 0.25, 2.0]) if learn == "channel" else torch.tensor(-0.5)
    with torch.no_grad():
        stack.step_sizes[0] = learnt
    row = profile_depth(
        stack.eval(), torch.randn(2, 3).double(), spectra=1, lesions=False, progress=False
    ).rows[0]
    weight = stack.fields[0].weight.detach().numpy()
    scaled = np.diag(learnt.double().numpy()) @ weight if learn == "channel" else -weight
    assert row.step_size == (1.0 if learn == "channel" else 0.5)
    assert row.rightmost.real == pytest.approx(np.linalg.eigvals(scaled).real.max(), abs=1e-12)
