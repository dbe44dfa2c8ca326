"""Networks that get deeper while they train, and test accuracy under another solver than the trained one."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from run_tools import Stop
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from resode.blocks import ResidualStack
from resode.blocks.solving import other_solver
from resode.cli import app
from resode.fields import ConvField
from resode.solve import SolverError
from resode.training import loop as loop_module
from resode.training.data import Batches, load_data
from resode.training.evaluate import evaluate, load, plain_batches, score
from resode.training.loop import Interrupted
from resode.training.recipe import RECIPES, make_recipe
from resode.training.refining import refine
from resode.training.run import train

pytestmark = pytest.mark.usefixtures("blank_curves")


class Small(nn.Module):
    """Two stacks of two and one blocks with batch norm, on 8×8 images."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.first = nn.Sequential(ResidualStack([ConvField(2), ConvField(2)], **options))
        self.second = ResidualStack([ConvField(2)], **options)
        self.out = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(self.stem(x))).flatten(1))


def short_run(path: Path, network: nn.Module | None = None, **settings):
    """Three epochs of two updates."""
    settings = {"epochs": 3, "batch_size": 600, "progress": False} | settings
    return train(network or Small(), "digits", "smoke", run_dir=path, **settings)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "weights.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# Refining


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_a_refined_network_computes_what_twice_the_substeps_did(solver):
    """F_l on [lη, (l+1)η), and on its halves: the same steps of η/2 of the same fields."""
    network = Small(solver=solver)
    for _ in range(3):  # statistics that are no longer 0 and 1
        network(torch.randn(64, 1, 8, 8))
    network.eval()
    x = torch.randn(16, 1, 8, 8)
    finer = copy.deepcopy(network)
    refine(finer)
    with torch.no_grad(), other_solver(network, None, 2):
        expected = network(x)
    torch.testing.assert_close(finer(x), expected, rtol=1e-5, atol=1e-6)
    assert (finer.second.depth, finer.second.step_size) == (2, 0.5)
    refine(finer)
    assert finer.first[0].depth == 8 and finer.first[0].step_size == 0.25


def test_accuracy_is_kept_at_refinement_within_the_solvers_change(tmp_path):
    """The refined network scores as the coarse one with two substeps, image by image."""
    digits = load_data("digits")
    network = short_run(tmp_path / "run").network
    finer = copy.deepcopy(network)
    refine(finer)
    with other_solver(network, None, 2):
        expected = score(network, plain_batches(digits))
    found = score(finer, plain_batches(digits))
    assert (found.accuracy, found.nfe) == (expected.accuracy, expected.nfe) == (expected.accuracy, 6)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_a_refined_run_is_that_of_a_loop_by_hand(tmp_path):
    """Before the third update every block becomes two with its weights and its momentum; to the bit."""
    digits = load_data("digits")
    seen = []

    class Watch:
        def after_update(self, loop):
            seen.append(sum(s.depth for s in loop.network.modules() if isinstance(s, ResidualStack)))

        def after_run(self, loop):
            pass

    run = short_run(tmp_path / "run", refine_at=(2,), epochs=2, callbacks=[Watch()])
    assert seen == [3, 3, 6, 6] and run.metrics["nfe"] == [3, 6]
    assert run.summary["parameters"] == sum(p.numel() for p in run.network.parameters())

    def sgd(network):
        matrices = [p for p in network.parameters() if p.ndim > 1]
        vectors = [p for p in network.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 5e-4}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True)

    network = Small().to(memory_format=torch.channels_last)
    optimizer = sgd(network)
    normal = {"mean": digits.mean, "std": digits.std}
    batches = Batches(digits.train_images, digits.train_labels, 600, train=True, crop_padding=1, **normal)
    for update in range(4):
        if update == 2:
            optimizer.zero_grad()
            momentum = {n: optimizer.state[p]["momentum_buffer"] for n, p in network.named_parameters()}
            network.first[0], network.second = network.first[0].refine(2), network.second.refine(2)
            optimizer = sgd(network)
            origins = {"first.0.fields.1.": "first.0.fields.0.", "second.fields.1.": "second.fields.0."}
            origins |= {f"first.0.fields.{n}.": "first.0.fields.1." for n in (2, 3)}
            for name, parameter in network.named_parameters():
                old = next((name.replace(a, b) for a, b in origins.items() if name.startswith(a)), name)
                optimizer.state[parameter]["momentum_buffer"] = momentum[old].clone()
        batches.set_epoch(update // 2)
        images, labels = list(batches)[update % 2]
        for group in optimizer.param_groups:
            group["lr"] = RECIPES["smoke"].learning_rate(update, 4)
        optimizer.zero_grad()
        cross_entropy(network(images), labels, label_smoothing=0.1).backward()
        optimizer.step()
    assert same(network.state_dict(), run.network.state_dict())


@pytest.mark.parametrize(
    ("options", "updates"),
    [({"weights": "linear"}, (1, 2, 3, 4, 5)), ({"learn_step": True}, (2, 3)), ({"solver": "heun2"}, (4, 5))],
)
def test_resumed_across_a_refinement_to_the_bit(tmp_path, options, updates):
    """Of 6 updates: before, at and after the refinements in the second and third epoch."""
    settings = {"refine_at": (2, 3), "ema": 0.9}
    whole = short_run(tmp_path / "whole", Small(**options), **settings)
    assert whole.network.second.depth == 4
    for update in updates:
        path = tmp_path / str(update)
        with pytest.raises(Interrupted):
            short_run(path, Small(**options), callbacks=[Stop(update)], **settings)
        again = train(Small(**options), resume=path, progress=False)
        assert same(weights(path), weights(whole.path)), update
        assert again.metrics["nfe"] == whole.metrics["nfe"]


def test_an_unrefined_epoch_is_untouched(tmp_path):
    plain, refined = short_run(tmp_path / "plain"), short_run(tmp_path / "refined", refine_at=[3])
    for name in ("train_loss", "test_loss"):
        assert plain.metrics[name][:2] == refined.metrics[name][:2]
        assert plain.metrics[name][2] != refined.metrics[name][2]


def test_a_refined_run_is_loaded_from_its_header_and_measured(tmp_path):
    settings = {"epochs": 2, "batch_size": 700, "progress": False}
    run = train("odenet20", "digits", "smoke", refine_at=(2,), run_dir=tmp_path / "run", **settings)
    assert [stack.depth for stack in load(run.path).stacks()] == [6, 4, 4]
    for source in (run.path, run.path / "checkpoints" / "last.safetensors"):
        assert same(load(source).state_dict(), run.network.state_dict())
    found = evaluate(run.path)
    assert (found.accuracy, found.nfe) == (run.summary["test_accuracy"], 14)


def test_the_commands_take_a_refined_run(tmp_path):
    short_run(tmp_path / "run", epochs=2, refine_at=(2,))
    for arguments in (
        ["evaluate", "RUN"],
        ["swap", "RUN", "--solvers", "euler", "--substeps", "1", "--limit", "8"],
        ["stability", "RUN", "--solvers", "euler", "--samples", "1"],
    ):
        command = [a.replace("RUN", str(tmp_path / "run")) for a in arguments]
        result = CliRunner().invoke(app, [*command, "--model", f"{__name__}:Small"])
        assert result.exit_code == 0, result.output
    assert "h = 0.5" in result.output and result.output.count("euler, as trained") == 2


# Another solver


def test_another_solver_is_measured_every_epoch_and_changes_nothing(tmp_path, capsys):
    plain = short_run(tmp_path / "plain")
    run = short_run(tmp_path / "run", eval_solver="rk4", eval_substeps=2, progress=True)
    assert same(weights(plain.path), weights(run.path))
    found = evaluate(run.path, solver="rk4", substeps=2, model=Small)
    assert run.metrics["eval_nfe"] == [24, 24, 24] and run.metrics["nfe"] == [3, 3, 3]
    assert run.metrics["eval_accuracy"][-1] == found.accuracy == run.summary["eval_accuracy"]
    assert run.metrics["eval_loss"][-1] == pytest.approx(found.loss, rel=1e-5)
    assert run.metrics["test_accuracy"] == plain.metrics["test_accuracy"]
    assert "eval_loss" not in plain.metrics
    printed = capsys.readouterr().out
    assert "rk4×2 %" in printed and f"under rk4×2 {100 * found.accuracy:.2f} %, 24 F evaluations" in printed
    assert (run.network.second.solver, run.network.second.substeps) == ("euler", 1)


def test_a_solver_that_gives_up_ends_no_run(tmp_path, monkeypatch):
    def give_up(network, batches):
        if network.second.solver == "dopri5":
            raise SolverError("step size underflow at t=0.5")
        return score(network, batches)

    monkeypatch.setattr(loop_module, "score", give_up)
    run = short_run(tmp_path / "run", epochs=2, eval_solver="dopri5")
    assert all(math.isnan(value) for value in run.metrics["eval_accuracy"]) and run.summary["epochs"] == 2


# Refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"refine_at": (1,)}, "rising epochs from 2 on, got \\(1,\\)"),
        ({"refine_at": (3, 2)}, "rising epochs"),
        ({"refine_at": (2, 2)}, "rising epochs"),
        ({"refine_at": (2,), "sync_batch_norm": True}, "sync_batch_norm does not reach"),
        ({"eval_solver": "rk5"}, "got 'rk5'. Did you mean rk4"),
        ({"eval_substeps": 2}, "eval_substeps belongs to eval_solver"),
        ({"eval_solver": "rk4", "eval_substeps": 0}, "eval_substeps must be at least 1"),
    ],
)
def test_contradictions_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        make_recipe("smoke", **settings)
    with pytest.raises(TypeError, match=r"refine_at must be int"):
        make_recipe("smoke", refine_at=(2.5,))


@pytest.mark.parametrize(
    ("network", "settings", "words"),
    [
        ("resnet20", {"refine_at": (2,)}, "this network has none"),
        ("resnet20", {"eval_solver": "rk4"}, "this network has none"),
        ("odenet20", {"refine_at": (2, 4)}, r"which has 3: got \(2, 4\)"),
        (Small(weights="linear"), {"eval_solver": "dopri5"}, "can't give each sample its own time"),
    ],
)
def test_what_the_network_cannot_do_leaves_no_folder(tmp_path, network, settings, words):
    with pytest.raises(ValueError, match=words):
        short_run(tmp_path / "run", network, **settings)
    assert not (tmp_path / "run").exists()


def test_the_flags_are_stored_and_repeat_the_run(tmp_path):
    command = ["train", "--recipe", "smoke", "--epochs", "2", "--batch-size", "700", "--quiet"]
    flags = ["--refine-at", "2", "--eval-solver", "midpoint", "--eval-substeps", "2"]
    first = CliRunner().invoke(app, [*command, *flags, "--run-dir", str(tmp_path / "one")])
    assert first.exit_code == 0, first.output
    config = ["train", "--config", str(tmp_path / "one" / "config.yaml"), "--quiet"]
    again = CliRunner().invoke(app, [*config, "--run-dir", str(tmp_path / "two")])
    assert again.exit_code == 0, again.output
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    wrong = CliRunner().invoke(app, [*command, "--refine-at", "soon"])
    assert wrong.exit_code == 2 and "--refine-at takes whole numbers" in wrong.output
