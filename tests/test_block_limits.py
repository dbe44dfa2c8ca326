"""Step limits across a network and while it trains: groups, the callback, the penalty, operator norms."""

from __future__ import annotations

import math
import shutil
import signal

import numpy as np
import pytest
import torch
from run_tools import Stop
from torch import nn
from torch.nn.utils import parametrize

import resode
from resode import ResidualStack
from resode.analysis import StepLimitPenalty, bound_operator_norm, jacobian, operator_norm
from resode.analysis.steps.block_limits import block_limits
from resode.analysis.steps.blocks import block_groups
from resode.networks import build
from resode.training.files import DamagedFile
from resode.training.folder import RunFolder
from resode.training.monitor import StepLimits


class PreBlock(nn.Module):
    """Anyone's residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv(torch.relu(self.norm(x)))


class Other(nn.Module):
    """A network that knows nothing of resode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.layer = nn.Sequential(PreBlock(4), PreBlock(4))
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.layer(self.stem(x)).mean((2, 3)))


def images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


# -- across a network ----------------------------------------------------------------------------


def test_states_of_an_odenet_are_those_of_its_path():
    torch.manual_seed(0)
    network = build("odenet20", in_channels=1)
    network.train()
    groups = block_groups(network, images())
    assert [s.shape for s in groups] == [(16, 8, 8), (32, 4, 4), (64, 2, 2)]
    assert all(module.training for module in network.modules())
    group = groups[1]
    with torch.no_grad():
        after = group.states[0] + group.fields[0].eval()(group.states[0])
    torch.testing.assert_close(after, group.states[1])


def test_any_network_through_its_blocks():
    """x + F(x) is Euler's step of length 1: F's eigenvalues are the block's less 1."""
    torch.manual_seed(0)
    network = Other().eval()
    (group,) = block_limits(network, images(), ["euler", "rk4"])
    assert (group.name, group.shape, group.steps) == ("layer.0", (4, 8, 8), [1.0, 1.0])
    state = network.stem(images()).detach()
    j = jacobian(lambda x: network.layer[0](x) - x, state).double()
    want = torch.linalg.eigvals(j).abs().max()
    assert np.abs(group.spectra[0]).max() == pytest.approx(float(want), rel=1e-4)
    euler, rk4 = group.rows[:2]
    assert euler.amplification == pytest.approx(float((1 + torch.linalg.eigvals(j)).abs().max()), rel=1e-4)
    assert euler.complete and rk4.decaying_step > 0
    (named,) = block_limits(network, images(), ["euler"], blocks="layer.1")
    assert len(named.rows) == 1
    with pytest.raises(ValueError, match="no module named stem"):
        list(block_limits(network, images(), ["euler"], blocks="stem"))
    with pytest.raises(ValueError, match="BatchNorm2d, Conv2d"):
        list(block_limits(nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1)), images(), ["euler"]))


class Tied(nn.Module):
    """One block, called three times."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        for _ in range(3):
            x = self.block(x)
        return x.mean((1, 2, 3))


class OuterBlock(nn.Module):
    """A residual block, part of whose F keeps the state's shape and is called a block."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class ScaledBlock(nn.Module):
    """A block that takes more than its state, by keyword, and returns more."""

    def forward(self, x, scale=1.0, shift=None):
        return (x - scale * x if shift is None else x - scale * x + shift), scale


class Calling(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.block, self.options = ScaledBlock(), options

    def forward(self, x):
        return self.block(x=x, **self.options)[0]


def test_a_block_that_is_used_again_is_a_block_again():
    """Each call has the state that came to it."""
    torch.manual_seed(0)
    network, x = Tied(PreBlock(4)).eval(), torch.randn(2, 4, 5, 5)
    (group,) = block_groups(network, x)
    assert len(group.fields) == 3 and torch.equal(group.states[0], x)
    torch.testing.assert_close(group.states[2], network.block(network.block(x)).detach())


def test_parts_of_a_block_are_no_blocks():
    """F of the outer block holds them; what only calls blocks one after the other is none itself."""
    inner, x = PreBlock(4), torch.randn(2, 4, 5, 5)
    (group,) = block_groups(nn.Sequential(OuterBlock(inner)), x)
    assert group.name == "0" and len(group.fields) == 1

    class BlockGroup(nn.Sequential):
        pass

    (group,) = block_groups(nn.Sequential(BlockGroup(PreBlock(4), PreBlock(4))), x)
    assert group.name == "0.0" and len(group.fields) == 2


def test_a_pattern_takes_the_blocks_that_it_matches_and_not_their_layers():
    """torchvision's layout: activations after the addition, in place; a pattern that matches every layer."""

    class BasicBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            out = self.conv2(self.relu(self.conv1(x)))
            out += x
            return self.relu(out)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = nn.Sequential(BasicBlock(), BasicBlock())

        def forward(self, x):
            return self.layer1(x)

    x = torch.randn(2, 4, 5, 5)
    for pattern in (None, "layer*.*", "layer1*"):
        (group,) = block_groups(Net(), x, pattern)
        assert group.name == "layer1.0" and len(group.fields) == 2
        assert isinstance(group.fields[1].block, BasicBlock)


def test_states_are_those_before_a_block_writes_into_them():
    class InPlaceBlock(nn.Module):
        def forward(self, x):
            return x.relu_() * 1.0

    x = torch.randn(2, 4, 5, 5)
    (group,) = block_groups(nn.Sequential(nn.Identity(), InPlaceBlock()), x.clone())
    assert torch.equal(group.states[0], x)


def test_what_a_block_takes_besides_its_state_is_kept():
    """x − 3x: one eigenvalue, −3, and Euler's limit 2/3; not so where it differs from sample to sample."""
    x = torch.randn(2, 4, 5, 5)
    (group,) = block_limits(Calling(scale=3.0), x, ["euler"])
    assert group.rows[0].step == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"block takes a second tensor, of shape \(2, 4, 5, 5\)"):
        block_groups(Calling(shift=x), x)
    with pytest.raises(ValueError, match="at least one image"):
        block_groups(Calling(), x[:0])


def test_learned_steps_of_channels_and_of_either_sign():
    """F = −x with η = 0.5, 1.5 and 3 a channel: R = 0.5, −0.5, −2; with η = −1 each mode grows twofold."""

    class Decay(nn.Module):
        def forward(self, x):
            return -x

    x = torch.ones(1, 3, 2, 2)
    stack = ResidualStack([Decay()], learn_step="channel", channels=3)
    stack.step_sizes.data[:] = torch.tensor([0.5, 1.5, 3.0])
    (group,) = block_limits(stack, x, ["euler"])
    row = group.rows[0]
    assert group.steps == [1.0] and row.amplification == pytest.approx(2.0) and not row.within
    assert row.decaying_step == pytest.approx(2 / 3)
    stack = ResidualStack([Decay()], learn_step=True, step_size=-1.0)
    (group,) = block_limits(stack, x, ["euler"])
    assert group.steps == [1.0] and group.rows[0].growing == 12
    assert group.rows[0].amplification == pytest.approx(2.0)
    torch.testing.assert_close(stack(x), 2 * x)


def test_large_states_without_the_jacobian():
    """1,058 states: outer eigenvalues, in one search for both methods, against dense ones."""
    torch.manual_seed(0)
    field = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1))
    network = ResidualStack([field], step_size=0.5)
    x = torch.randn(1, 2, 23, 23)
    (group,) = block_limits(network, x, ["euler", "rk4"])
    dense = resode.step_limit(field.double(), x.double(), solver="rk4", matrix_free=False)
    row = group.rows[1]
    assert not row.complete and row.converged
    assert row.step == pytest.approx(float(dense.step.min()), rel=1e-4)
    if row.exact:
        assert row.decaying_step == pytest.approx(float(dense.decaying_step.min()), rel=1e-4)
    assert row.within == (row.decaying_step >= 0.5)


# -- while it trains -----------------------------------------------------------------------------


def test_watching_changes_nothing_and_draws(tmp_path):
    """The same weights to the bit with and without; a table and a figure in the run folder."""
    runs = []
    watch = StepLimits(every=2, solvers=["euler", "rk4"])
    for name, callbacks in (("plain", []), ("watched", [watch])):
        run = resode.train(
            "odenet20",
            "digits",
            "smoke",
            updates=4,
            run_dir=tmp_path / name,
            progress=False,
            callbacks=callbacks,
        )
        runs.append(run.network.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert [r.update for r in watch.records] == [2] * 6 + [4] * 6
    lines = (tmp_path / "watched" / "step_limits.csv").read_text().splitlines()
    assert len(lines) == 13 and lines[0].startswith("update,group,solver,step,growing")
    assert (tmp_path / "watched" / "figures" / "step_limits.png").stat().st_size > 1000
    euler = watch.records[0]
    assert euler.solver == "euler" and euler.growing > 0 and euler.amplification > 1


def test_a_resumed_run_goes_on_with_its_records(tmp_path):
    """Interrupted after update 5: what was recorded at 2 and 4 is kept, and the same figures follow."""

    def network():
        torch.manual_seed(0)
        stack = ResidualStack([nn.Linear(8, 8), nn.Linear(8, 8)], solver="rk4")
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), stack, nn.Linear(8, 10))

    settings = {"recipe": "smoke", "updates": 8, "progress": False}
    whole, first, again = (StepLimits(every=2) for _ in range(3))
    resode.train(network(), run_dir=tmp_path / "whole", callbacks=[whole], **settings)
    with pytest.raises(KeyboardInterrupt):
        resode.train(
            network(), run_dir=tmp_path / "run", callbacks=[first, Stop(5, signal.SIGTERM)], **settings
        )
    resode.train(network(), resume=tmp_path / "run", callbacks=[again], progress=False)
    assert [r.update for r in first.records] == [2, 4]
    assert again.records == whole.records
    one, two = (tmp_path / name / "step_limits.csv" for name in ("whole", "run"))
    assert one.read_text() == two.read_text()
    two.write_text(one.read_text() + "10,2,rk4\n")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(DamagedFile, match=r"step_limits.csv is no sound table.*Remove it"):
        resode.train(network(), resume=tmp_path / "run", callbacks=[StepLimits(every=2)], progress=False)


def test_watching_keeps_to_its_share(tmp_path):
    """With a share of 1 % and records of 0.1 s, the next one comes after 10 s."""
    stack = ResidualStack([nn.Linear(4, 4)])

    class Loop:
        network, update, folder = stack, 1, RunFolder(tmp_path)

    watch = StepLimits(torch.ones(1, 4), share=0.01)
    watch._begun = 0.0
    watch.after_update(Loop)  # the clock has long passed
    assert len(watch.records) == 1
    watch.costs[:] = [1e9]
    watch.after_update(Loop)
    assert len(watch.records) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"every": 0},
        {"every": 2.5},
        {"samples": 0},
        {"samples": 1.5},
        {"share": 1.5},
        {"solvers": ["radau5"]},
        {"solvers": ["rk5"]},
        {"solvers": "rk4"},
    ],
)
def test_wrong_settings_of_the_callback(wrong):
    with pytest.raises((ValueError, TypeError), match=r"must|implicit|unknown|explicit"):
        StepLimits(**wrong)


def test_no_records_are_a_table_without_rows():
    assert StepLimits(images()).to_csv() == (
        "update,group,solver,step,growing,decaying_step,amplification,exact,estimate\n"
    )
    StepLimits(images()).plot()


def test_watching_and_penalizing_under_autocast():
    """The same figures as without: states and products are float32's."""
    torch.manual_seed(0)
    network = Other()
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            watch = StepLimits(images())
            watch.record(network, 0)
            penalty = StepLimitPenalty("euler", samples=1, vectors=8)(network, images())
        values.append((watch.records, penalty.item()))
    assert values[0] == values[1] and values[0][1] > 0
    with pytest.raises(TypeError, match="keep the network in float32"):
        StepLimitPenalty("euler")(network.bfloat16(), images().bfloat16())


def test_the_penalty_is_zero_inside_and_its_gradient_points_there():
    """Against finite differences of the largest |R(λ)| of a normal matrix."""
    a = torch.diag(torch.tensor([-2.5, -1.0, -0.5], dtype=torch.float64)).requires_grad_()
    penalty = StepLimitPenalty("euler", margin=0.0)
    x = torch.zeros(1, 3, dtype=torch.float64)
    value = penalty.of_field(lambda x: x @ a.T, x, 1.0)
    assert value.item() == pytest.approx(0.5 / 3.5 / 3)  # (|1 − 2.5| − 1)/(1 + 2.5), of three modes
    value.backward()
    want = torch.zeros(3, 3, dtype=torch.float64)
    want[0, 0] = -1 / 3.5 / 3
    torch.testing.assert_close(a.grad, want, atol=1e-8, rtol=0)
    assert penalty.of_field(lambda x: x @ a.T, x, 0.5).item() == 0
    assert penalty.of_field(torch.ones_like, x, 0.5).item() == 0
    with pytest.raises(ValueError, match="explicit method"):
        StepLimitPenalty("radau5")
    for wrong in ({"margin": 1.0}, {"samples": 1.5}, {"vectors": 0}, {"weight": -1.0}, {"weight": math.nan}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            StepLimitPenalty("euler", **wrong)


def test_the_penalty_brings_a_network_inside():
    """A stack that is outside for Euler is inside after a few updates of the penalty alone.

    Its slope fades with what is left, so that after 400 updates some of the excess, below 1 %, may be there.
    """
    torch.manual_seed(0)
    stack = ResidualStack([nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6)) for _ in range(2)])
    with torch.no_grad():
        for weight in stack.parameters():
            weight.mul_(3)
    x = torch.randn(2, 6)
    before = max(row.amplification for s in block_limits(stack, x, ["euler"]) for row in s.rows)
    penalty = StepLimitPenalty("euler", margin=0.2)
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        penalty(stack, x).backward()
        optimizer.step()
    rows = [row for s in block_limits(stack, x, ["euler"]) for row in s.rows]
    assert before > 1.5 and all(row.amplification - 1 <= 0.01 * (before - 1) and row.within for row in rows)
    assert stack.training


# -- operator norms ------------------------------------------------------------------------------


def dense_norm(conv: nn.Module, shape: tuple[int, ...]) -> float:
    """The largest singular value of the convolution as a matrix."""
    basis = torch.eye(math.prod(shape)).reshape(-1, *shape)
    with torch.no_grad():
        bias = conv(torch.zeros(1, *shape))
        return float(torch.linalg.matrix_norm((conv(basis) - bias).flatten(1), 2))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": 1, "stride": 2},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "groups": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "reflect"},
        {},
    ],
)
def test_operator_norm_is_the_matrix_s(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **options)
    assert operator_norm(conv, (4, 7, 7)) == pytest.approx(dense_norm(conv, (4, 7, 7)), rel=1e-5)
    kernel = float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2))
    assert abs(kernel - operator_norm(conv, (4, 7, 7))) > 0.01  # the reshaped kernel's is another number


@pytest.mark.parametrize("seed", range(3))
def test_a_bound_holds_while_an_optimizer_pushes_against_it(seed):
    """σ's iteration goes on from update to update: it lags by up to 4 % (seven seeds, 60 updates, either rate)."""
    torch.manual_seed(seed)
    conv = bound_operator_norm(nn.Conv2d(3, 3, 3, padding=1, stride=2, bias=False), (3, 8, 8), bound=0.7)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.01)
    x = torch.randn(8, 3, 8, 8)
    for _ in range(30):
        optimizer.zero_grad()
        (-conv(x).square().sum()).backward()
        optimizer.step()
        assert operator_norm(conv, (3, 8, 8)) <= 0.7 * (1 + 6e-2)
    conv.eval()
    assert operator_norm(conv, (3, 8, 8)) == pytest.approx(0.7, rel=4e-2)
    parametrize.remove_parametrizations(conv, "weight")
    assert dense_norm(conv, (3, 8, 8)) == pytest.approx(0.7, rel=4e-2)


def test_a_bound_leaves_smaller_norms_alone():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1)
    weight = conv.weight.detach().clone()
    bound_operator_norm(conv, (2, 6, 6), bound=100.0)
    torch.testing.assert_close(conv.weight, weight)


def test_wrong_operator_norms():
    with pytest.raises(TypeError, match="got BatchNorm2d"):
        operator_norm(nn.BatchNorm2d(3), (3, 4, 4))
    with pytest.raises(ValueError, match=r"3 of them.*got \(4, 4, 4\)"):
        operator_norm(nn.Conv2d(3, 3, 3), (4, 4, 4))
    with pytest.raises(ValueError, match="above 0"):
        bound_operator_norm(nn.Conv2d(3, 3, 3), (3, 4, 4), bound=0.0)
    assert operator_norm(nn.Linear(5, 3), (5,)) > 0


def test_a_resumed_run_keeps_its_penalty(tmp_path):
    """Without it, the run would end with other weights than it would have had."""
    penalty = StepLimitPenalty("euler", 0.2, samples=1, vectors=4)
    options = dict(recipe="smoke", updates=1, progress=False, run_dir=tmp_path / "run")
    resode.train("odenet8", "digits", penalty=penalty, **options)
    for other, got in [(None, "none"), (StepLimitPenalty("euler", 0.1, samples=1, vectors=4), "euler', 0.1")]:
        with pytest.raises(ValueError, match=rf"StepLimitPenalty\('euler', 0.2.*got .*{got}"):
            resode.train(resume=tmp_path / "run", penalty=other, progress=False)
