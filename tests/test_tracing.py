"""What is added to what: cut states, couplings, additions in place and fused, and what is no block."""

from __future__ import annotations

import csv
import gc
import math
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from resode import ResidualStack, classify, max_stable_step, profile_depth, step_limit
from resode.analysis.depth.lesion import run_edited
from resode.analysis.depth.tracing import trace
from resode.networks import build

F64 = torch.float64


def times(factor, n=4):
    """f = factor · I."""
    layer = nn.Linear(n, n, bias=False, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(factor * torch.eye(n))
    return layer


class Net(nn.Module):
    """A forward of one's own over layers f, g, …"""

    def __init__(self, forward, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.run = forward

    def forward(self, x):
        return self.run(x, *self.layers)


def states(batch=3, n=8, seed=0):
    return torch.randn(batch, n, dtype=F64, generator=torch.Generator().manual_seed(seed))


def dense(function, x):
    """∂y/∂x of one sample."""
    return torch.autograd.functional.jacobian(lambda s: function(s[None])[0], x)


# -- halves -------------------------------------------------------------------------------------------


def first_of_chunk(x, f):
    a, b = x.chunk(2, 1)
    return torch.cat([a + f(a), b], 1)


def second_of_chunk(x, f):
    a, b = x.chunk(2, 1)
    return torch.cat([a, b + f(b)], 1)


def second_of_split(x, f):
    a, b = x.split([4, 4], 1)
    return torch.cat([a, f(b) + b], 1)


def second_of_unbind(x, f):
    a, b = x.reshape(-1, 2, 4).unbind(1)
    return torch.stack([a, b + f(b)], 1).flatten(1)


def the_same_slice_twice(x, f):
    return torch.cat([x[:, :4] + f(x[:, :4]), x[:, 4:]], 1)


def a_slice_in_place(x, f):
    x = x.clone()
    x[:, 4:] += f(x[:, 4:])
    return x


def a_chunk_in_place(x, f):
    x = x.clone()
    _, b = x.chunk(2, 1)
    b += f(b)
    return x


def a_slice_as_ghost_modules_return_it(x, f):
    """The state is the slice of a concatenation, and the shortcut is added to it in place."""
    y = torch.cat([f(x[:, :4]), x[:, 4:]], 1)[:, :4]
    y += x[:, :4]
    return torch.cat([y, x[:, 4:]], 1)


@pytest.mark.parametrize(
    "forward",
    [first_of_chunk, second_of_chunk, second_of_split, second_of_unbind, the_same_slice_twice,
     a_slice_in_place, a_chunk_in_place, a_slice_as_ghost_modules_return_it],
)  # fmt: skip
def test_a_half_is_a_state(forward):
    """f = −3I on a half: eigenvalue −3, Euler's limit 2/3, σ = |1 − 3| = 2; without f the half stays."""
    model, x = Net(forward, times(-3)).eval(), states()
    [row] = profile_depth(model, x).rows
    assert (row.kind, row.shape) == ("identity", (4,))
    assert complex(row.rightmost) == pytest.approx(-3) == complex(row.leftmost)
    assert row.step_limit == pytest.approx(2 / 3)
    assert row.sigma_max == pytest.approx(2) == row.sigma_min
    assert row.split_error < 1e-14
    torch.testing.assert_close(run_edited(model, x, [(trace(model, x).additions[0], 0.0)]), x)


# -- couplings ------------------------------------------------------------------------------------------


def coupling(x, f):
    a, b = x.chunk(2, 1)
    return torch.cat([a, b + f(a)], 1)


def swapped_coupling(x, f):
    a, b = x.chunk(2, 1)
    return torch.cat([b + f(a), a], 1)


def coupling_in_place(x, f):
    x = x.clone()
    x[:, 4:] += f(x[:, :4])
    return x


def coupling_of_outputs(x, f):
    a, b = x.chunk(2, 1)
    return a, b + f(a)


def coupling_that_reads_all(x, f):
    a, b = x.chunk(2, 1)
    return torch.cat([a, b + f((x * torch.tensor([1.0] * 4 + [0.0] * 4, dtype=F64))[:, :4])], 1)


@pytest.mark.parametrize(
    "forward", [coupling, swapped_coupling, coupling_in_place, coupling_of_outputs, coupling_that_reads_all]
)
def test_a_coupling_is_nilpotent(forward):
    """(a, b) ← (a, b + f(a)): J − I has no eigenvalue but 0; σ max of [[1, 0], [−3, 1]] is (3 + √13)/2."""
    model, x = Net(forward, times(-3)).eval(), states()
    [row] = profile_depth(model, x).rows
    assert row.shape == (8,) and row.kind == "identity"
    assert complex(row.rightmost) == complex(row.leftmost) == 0
    assert row.step_limit == math.inf
    assert row.sigma_max == pytest.approx((3 + 13**0.5) / 2)
    assert row.split_error < 1e-14


def reversible(x, *layers):
    a, b = x.chunk(2, 1)
    for f, g in zip(layers[::2], layers[1::2], strict=True):
        a = a + f(b)
        b = b + g(a)
    return torch.cat([a, b], 1)


@pytest.mark.parametrize("end", [lambda x: x, lambda x: x[:, :4] + x[:, 4:]])
def test_reversible_blocks(end):
    """F = G = −3I: J − I = [[0, −3], [−3, 9]], so (9 ± √117)/2 in every block, however they are joined."""
    model = Net(lambda x, *layers: end(reversible(x, *layers)), *[times(-3) for _ in range(6)]).eval()
    rows = profile_depth(model, states()).rows
    assert len(rows) == 3
    for row in rows:
        assert complex(row.leftmost) == pytest.approx((9 - 117**0.5) / 2)
        assert complex(row.rightmost) == pytest.approx((9 + 117**0.5) / 2)
        assert row.split_error < 1e-12  # the gradient at one stream without what comes through the other


def test_reversible_blocks_against_dense_jacobians():
    """Nonlinear, streams of unequal width: eigenvalues, singular values, gradients and lesions."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = (nn.Sequential(nn.Linear(m, n), nn.Tanh()) for m, n in ((5, 3), (3, 5)))

        def forward(self, a, b):
            a = a + self.f(b)
            return a, b - self.g(a)

    class Reversible(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = nn.Linear(6, 8), nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            a, b = self.stem(x).split([3, 5], 1)
            for block in self.blocks:
                a, b = block(a, b)
            return torch.cat([a, b], 1)

    torch.manual_seed(0)
    model, x = Reversible().double().eval(), states(1, 6)
    profile = profile_depth(model, x)
    assert [r.name for r in profile.rows] == ["blocks.0", "blocks.1", "blocks.2"]
    assert profile.outside == ["stem"]
    s = model.stem(x)[0].detach()
    jacobians = []
    for row, block in zip(profile.rows, model.blocks, strict=True):

        def step(s, block=block):
            return torch.cat(block(*s.split([3, 5], 1)), 1)

        j = dense(step, s)
        values = torch.linalg.eigvals(j - torch.eye(8))
        assert complex(row.rightmost).real == pytest.approx(float(values.real.max()), abs=1e-9)
        assert row.sigma_max == pytest.approx(float(torch.linalg.svdvals(j)[0]), rel=1e-9)
        assert row.state_norm == pytest.approx(float(s.norm())) and row.split_error < 1e-12
        jacobians.append(j)
        s = step(s[None])[0].detach()
    g = s  # of ½‖output‖²
    for row, j in zip(profile.rows[::-1], jacobians[::-1], strict=True):
        g = j.T @ g
        assert row.gradient == pytest.approx(float(g.norm()), rel=1e-9)
    with torch.no_grad():
        a, b = model.stem(x).split([3, 5], 1)
        for i in (0, 2):
            a, b = model.blocks[i](a, b)
    edited = run_edited(model, x, [(trace(model, x).additions[1], 0.0)])
    torch.testing.assert_close(edited, torch.cat([a, b], 1))


def test_streams_that_never_meet_again_are_refused_by_name():
    """Two copies of one state that go on as streams: after the first two blocks nothing is the state."""

    def forward(x, *layers):
        a = b = x
        for f, g in zip(layers[::2], layers[1::2], strict=True):
            a = a + f(b)
            b = b + g(a)
        return a * b

    profile = profile_depth(Net(forward, *[times(-0.5, 8) for _ in range(6)]).eval(), states())
    assert len(profile.rows) == 2
    [(name, why)] = profile.refused
    assert name == "model" and "more than the state" in why
    assert f"model: no residual block, since {why}" in str(profile)


def test_a_function_with_its_own_gradient_is_named():
    """A reversible layer that adds within torch.autograd.Function, as memory-saving packages do."""

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(w)
            return x + x @ w

        @staticmethod
        def backward(ctx, g):
            return g + g @ ctx.saved_tensors[0].T, None

    model = Net(lambda x, f: Hidden.apply(x, f.weight), times(-3, 8)).eval()
    with pytest.raises(ValueError, match=r"no residual block.*HiddenBackward is a gradient of its own"):
        profile_depth(model, states())


def test_parts_of_a_branch_are_no_blocks():
    """Res2Net: within F the state is cut, and parts are added to parts: one block, and nothing refused."""

    class Res2Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            parts = torch.relu(self.first(x)).split(2, 1)
            out = [torch.relu(self.inner[0](parts[0]))]
            for layer, part in zip(self.inner[1:], parts[1:], strict=False):
                out.append(torch.relu(layer(out[-1] + part)))
            return torch.relu(x + self.last(torch.cat([*out, parts[-1]], 1)))

    torch.manual_seed(0)
    model = nn.Sequential(Res2Net(), Res2Net()).double().eval()
    found = trace(model, states())
    assert [a.name for a in found.additions] == ["0", "1"] and not found.refused and not found.outside


def test_a_state_space_layer_holds_no_blocks():
    """Mamba: h ← A(x)h + B(x)x over time and y + Dx within the branch; the block is what is around it."""

    class Mamba(nn.Module):
        def __init__(self, n=4, states=3):
            super().__init__()
            self.into, self.out = nn.Linear(n, 2 * n), nn.Linear(n, n)
            self.select = nn.Linear(n, 2 * states + 1)
            self.a, self.d = nn.Parameter(torch.rand(n, states)), nn.Parameter(torch.rand(n))

        def forward(self, x):
            u, gate = self.into(x).chunk(2, -1)
            u = nn.functional.silu(u)
            b, c, dt = self.select(u).split([3, 3, 1], -1)
            dt = nn.functional.softplus(dt)
            decay = torch.exp(-dt[..., None] * self.a)
            drive = dt[..., None] * b[..., None, :] * u[..., None]
            h, y = torch.zeros_like(drive[:, 0]), []
            for t in range(x.shape[1]):
                h = decay[:, t] * h + drive[:, t]
                y.append((h * c[:, t, None]).sum(-1))
            y = torch.stack(y, 1) + u * self.d
            return x + self.out(y * nn.functional.silu(gate))

    torch.manual_seed(0)
    model = nn.Sequential(Mamba(), Mamba()).double().eval()
    x = torch.randn(2, 5, 4, dtype=F64)
    profile = profile_depth(model, x)
    assert [(r.name, r.kind) for r in profile.rows] == [("0", "identity"), ("1", "identity")]
    j = dense(model[0], x[0]).reshape(20, 20)
    row = profile_depth(model, x[:1]).rows[0]
    assert row.sigma_max == pytest.approx(float(torch.linalg.svdvals(j)[0]), rel=1e-9)


def test_bottlenecks_on_a_half_of_a_cross_stage_block():
    """YOLO's C2f: each bottleneck's state is a half, which the concatenation reads too: split errors say so."""

    class C2f(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(16, 8)
            self.inner = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

        def forward(self, x):
            y = list(self.first(x).chunk(2, 1))
            for f in self.inner:
                y.append(y[-1] + f(y[-1]))
            return self.last(torch.cat(y, 1))

    torch.manual_seed(0)
    model, x = C2f().double().eval(), states(1)
    profile = profile_depth(model, x)
    assert [(r.name, r.shape) for r in profile.rows] == [("model[0]", (4,)), ("model[1]", (4,))]
    half = model.first(x).chunk(2, 1)[1][0].detach()
    for row, f in zip(profile.rows, model.inner, strict=True):
        value = torch.linalg.eigvals(dense(f, half)).real.max()
        assert complex(row.rightmost).real == pytest.approx(float(value), abs=1e-12)
        half = half + f(half[None])[0].detach()
        assert row.split_error > 0.01 and f"{row.name}: split error {row.split_error:.2g}" in str(profile)
    assert profile.outside == ["first", "last"]
    assert "weights outside every addition: first, last" in str(profile)


# -- fused additions ---------------------------------------------------------------------------------


def in_place_lerp(x, f):
    x = x.clone()
    return x.lerp_(f(x), 0.1)


@pytest.mark.parametrize(
    ("forward", "eta", "eigenvalue"),
    [
        (lambda x, f: x.lerp(f(x), 0.1), 0.1, -4),  # x + 0.1 (f(x) − x)
        (lambda x, f: torch.lerp(x, f(x), weight=torch.tensor(0.1, dtype=F64)), 0.1, -4),
        (in_place_lerp, 0.1, -4),
        (lambda x, f: torch.addcmul(x, f(x), torch.ones(8, dtype=F64), value=0.5), 0.5, -3),
        (lambda x, f: torch.addcdiv(x, f(x), torch.ones(8, dtype=F64), value=0.5), 0.5, -3),
        (lambda x, f: torch.addmm(x, x, f.weight.T, alpha=0.5), 0.5, -3),
        (lambda x, f: torch.stack([x, f(x)]).sum(0), 1, -3),
        (lambda x, f: torch.stack([f(x), x], dim=-1).sum(-1), 1, -3),
        (lambda x, f: 2 * torch.stack([x, f(x)], 1).mean(1), 1, -3),
    ],
)
def test_fused_additions(forward, eta, eigenvalue):
    """Each is a step x + ηF(x) with F = −3I, or −3I − I for an interpolation; removed it leaves S(x)."""
    model, x = Net(forward, times(-3, 8)).eval(), states()
    [row] = profile_depth(model, x).rows
    assert row.kind == "identity" and row.step_size == pytest.approx(eta)
    assert complex(row.rightmost) == pytest.approx(eigenvalue)
    assert row.sigma_max == pytest.approx(abs(1 + eta * eigenvalue))
    [a] = trace(model, x).additions
    torch.testing.assert_close(run_edited(model, x, [(a, 1.0)]), model(x))
    torch.testing.assert_close(run_edited(model, x, [(a, 0.0)]), x)


def test_a_bias_in_addmm_is_no_shortcut():
    layer = nn.Linear(8, 8, dtype=F64)
    model = Net(lambda x, f: torch.addmm(f.bias, x, f.weight), layer).eval()
    assert trace(model, states()).additions == []


# -- what a profile takes and says -------------------------------------------------------------------


def images(n=6):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 3


def test_a_loader_gives_what_its_tensors_give():
    model, (x, target) = build("odenet20").eval(), images()
    whole = profile_depth(model, x, target, spectra=0)
    for loader in (
        DataLoader(TensorDataset(x, target), batch_size=4),
        [(x[:4], target[:4]), (x[4:], target[4:])],
    ):
        found = profile_depth(model, loader, spectra=0)
        assert found.samples == 6 and found.has_target
        assert found.loss == pytest.approx(whole.loss, rel=1e-5)
        for a, b in zip(found.rows, whole.rows, strict=True):
            assert a.gradient == pytest.approx(b.gradient, rel=1e-4)
            assert a.loss_change == pytest.approx(b.loss_change, rel=1e-3, abs=1e-5)
    assert not profile_depth(model, DataLoader(TensorDataset(x), batch_size=4), spectra=0).has_target
    with pytest.raises(ValueError, match="leave target= out"):
        profile_depth(model, DataLoader(TensorDataset(x, target)), target)
    with pytest.raises(ValueError, match="no batches"):
        profile_depth(model, DataLoader(TensorDataset(x[:0], target[:0])))


def test_a_terminal_shows_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("resode.progress.AFTER", 0.0)  # it waits two seconds
    profile_depth(Net(first_of_chunk, times(-3)).eval(), states())
    shown = capsys.readouterr().err
    assert "profile: 3 samples" in shown and "block 1 of 1" in shown and shown.endswith(" \r")
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    profile_depth(Net(first_of_chunk, times(-3)).eval(), states())
    assert capsys.readouterr().err == ""


def test_eigenvalues_read_back_as_numbers(tmp_path):
    """A rotation: λ = ±2i."""
    layer = nn.Linear(2, 2, bias=False, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, -2.0], [2.0, 0.0]]))
    profile_depth(ResidualStack([layer]).eval(), states(2, 2)).to_csv(tmp_path / "p.csv")
    with open(tmp_path / "p.csv") as file:
        [row] = csv.DictReader(file)
    assert abs(float(row["largest_imag"])) == pytest.approx(2)
    assert float(row["largest_real"]) == pytest.approx(0, abs=1e-12)
    assert "largest" not in row


@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("layer2.1.conv2.weight", "block layer2.1 gives inf or nan"),
        ("conv1.weight", "what comes before the first block, layer1.0 gives"),
        ("linear.weight", "what follows the last block gives"),
        ("layer1.0.bn1.running_var", "block layer1.0 gives"),
    ],
)
def test_the_first_place_that_is_not_finite_is_named(weight, place):
    model, (x, target) = build("resnet20").eval(), images(2)
    model.state_dict()[weight].view(-1)[1] = math.nan
    with pytest.raises(ValueError, match=rf"{place}.*not finite are {weight}"):
        profile_depth(model, x, target)


# -- a whole block for a branch ----------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, after=None):
        super().__init__()
        self.f, self.after = nn.Linear(4, 4, dtype=F64), after

    def forward(self, x):
        y = self.f(torch.tanh(x))
        y += x
        return y if self.after is None else self.after(y)


@pytest.mark.parametrize("after", [None, torch.relu])
@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_a_stack_of_whole_blocks_is_warned_of_once(after, solver):
    net, x = nn.Sequential(Block(after), Block(after)), states(2, 4)
    stack = ResidualStack(list(net), solver=solver)
    with pytest.warns(
        UserWarning, match=r"block 0, Block, returns its own input.*F\(x\) = x \+ G\(x\)"
    ) as seen:
        stack(x)
    assert len(seen) == 1 and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack(x)


@pytest.mark.parametrize("ask", [step_limit, max_stable_step, classify])
def test_a_field_that_returns_its_input_too_is_warned_of(ask):
    f, x = times(-0.5), states(2, 4)
    for whole in (lambda y: y + f(y), lambda y: f(y) + y, lambda y: y - f(y)):
        with pytest.warns(UserWarning, match=r"lambda x: block\(x\) - x"):
            ask(whole, x)


def test_honest_fields_hold_their_input():
    """−x + W tanh x, x − x³, ½x + Wx, tanh(x + Wx), an addition within the field: no warning."""
    f, x = times(-0.5), states(2, 4)
    inner = nn.Sequential(times(-0.5), Block(), times(-0.5))
    for field in (
        lambda y: f(torch.tanh(y)) - y, lambda y: y - y**3, lambda y: 0.5 * y + f(y),
        lambda y: torch.tanh(y + f(y)), inner,
    ):  # fmt: skip
        step_limit(field, x)
    ResidualStack([inner, f])(x)


def test_a_trace_is_freed():
    """Autograd's graph keeps the hooks that watched it: they may not keep the graph."""
    found = trace(build("resnet20", width=2).eval(), torch.randn(2, 3, 8, 8))
    alive = weakref.ref(found.additions[0].y)
    del found
    gc.collect()
    assert alive() is None
