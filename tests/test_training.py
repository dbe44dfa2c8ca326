"""Runs: resumed to the bit, never half written, and stopped with a message that helps."""

from __future__ import annotations

import copy
import csv
import errno
import json
import math
import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

from resode.analysis.steps.block_limits import block_limits
from resode.blocks import ODEBlock, ResidualStack
from resode.blocks.solving import set_solver
from resode.blocks.statistics import measure_statistics
from resode.networks import build
from resode.training import files
from resode.training.data import Batches, ImageData, load_data
from resode.training.evaluate import calibration_batches, load, plain_batches, score
from resode.training.evaluate import evaluate as evaluate_run
from resode.training.files import DamagedFile, RunError, pack, read_yaml, unpack, write_atomically
from resode.training.folder import FolderTaken, NoSuchRun, RunFolder
from resode.training.loop import Interrupted
from resode.training.monitor import StepLimits
from resode.training.plan import Plan, choose_device, choose_precision, resolve
from resode.training.processes import interruption
from resode.training.recipe import RECIPES, make_recipe
from resode.training.run import train
from resode.training.task import ClassificationTask


class Tiny(nn.Module):
    """A small network with everything that a resumed run must bring back: batch norm and dropout."""

    def __init__(self, width: int = 4, classes: int = 10, at: dict | None = None) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),  # its kernel has a memory order of its own
            nn.Dropout(0.2),
        )
        self.out = nn.Linear(width * 64, classes)
        self.at = at or {}  # what happens at which training call
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.out(self.features(x).flatten(1))
        if self.training:
            self.calls += 1
            if self.calls in self.at:
                return self.at[self.calls](logits)
        return logits


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


def tiny_run(path: Path, at: dict | None = None, *, classes: int = 10, **settings):
    """Two epochs of 22 updates of batch 64, from the same weights every time."""
    torch.manual_seed(7)
    network = Tiny(classes=classes, at=at)
    return train(network, "digits", "smoke", run_dir=path, progress=False, **settings)


def interrupted(signum: int):
    """Sends this process a signal in the middle of an update."""

    def act(logits: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signum)
        return logits

    return act


def poisoned(logits: torch.Tensor) -> torch.Tensor:
    return logits * float("nan")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run's own code runs afterwards."""


def killed(logits: torch.Tensor) -> torch.Tensor:
    raise Killed


def same_weights(a: Path, b: Path) -> bool:
    one, two = load_file(a / "weights.safetensors"), load_file(b / "weights.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def columns(path: Path) -> dict[str, list[str]]:
    """metrics.csv without what depends on the clock."""
    rows = list(csv.DictReader((path / "metrics.csv").read_text().splitlines()))
    return {name: [r[name] for r in rows] for name in rows[0] if name not in ("images_per_second", "seconds")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of `Tiny`."""
    return tiny_run(tmp_path_factory.mktemp("runs") / "undisturbed")


@pytest.fixture(autouse=True)
def blank_curves(finished, monkeypatch):
    """Half a second a run; the undisturbed run's figure is the real one."""
    from resode import plots

    monkeypatch.setattr(plots, "training_curves", lambda metrics, path: Path(path).write_bytes(b""))


# What a run does


def test_the_weights_are_those_of_a_loop_by_hand(tmp_path, digits):
    """Five updates in three epochs: one-cycle rate, Nesterov, smoothing, decay of matrices alone; to the bit."""
    settings = {"updates": 5, "batch_size": 600, "run_dir": tmp_path / "run", "progress": False}
    run = train("odenet20", "digits", "smoke", **settings)
    torch.manual_seed(0)
    network = build("odenet20", in_channels=1, num_classes=10).to(memory_format=torch.channels_last)
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 5e-4}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True)
    normal = {"mean": digits.mean, "std": digits.std}
    batches = Batches(digits.train_images, digits.train_labels, 600, train=True, crop_padding=1, **normal)
    assert len(batches) == 2
    for update in range(5):
        batches.set_epoch(update // 2)
        images, labels = list(batches)[update % 2]
        for group in optimizer.param_groups:
            group["lr"] = RECIPES["smoke"].learning_rate(update, 5)
        optimizer.zero_grad()
        cross_entropy(network(images), labels, label_smoothing=0.1).backward()
        optimizer.step()
    weights = network.state_dict()
    for name, value in run.network.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_run_leaves_its_settings_figures_and_metrics(finished):
    files = {str(p.relative_to(finished.path)) for p in finished.path.rglob("*") if p.is_file()}
    assert files == {
        "config.yaml",
        "metrics.csv",
        "weights.safetensors",
        "summary.json",
        "checkpoints/last.safetensors",
        "checkpoints/previous.safetensors",
        "figures/training.png",
    }
    summary = json.loads((finished.path / "summary.json").read_text())
    assert summary.pop("checksums").keys() == {"summary.json", "metrics.csv"}
    assert summary == finished.summary
    assert (summary["data"], summary["epochs"], summary["updates"]) == ("digits (scikit-learn)", 2, 44)
    assert summary["parameters"] == 10 * 256 + 10 + 4 * 9 + 4 + 2 * 4 + 4 * 4 * 9 + 4
    assert 0.5 < summary["test_accuracy"] <= 1 and summary["images_per_second"] > 0
    assert summary["nfe"] == 0, "no solver advances anything in this network"
    rows = columns(finished.path)
    assert rows["epoch"] == ["1", "2"] and rows["update"] == ["22", "44"]
    assert float(rows["lr"][1]) == RECIPES["smoke"].learning_rate(43, 44)
    assert float(rows["test_accuracy"][1]) == summary["test_accuracy"]
    config = finished_config(finished)
    assert config["record"]["torch"] == torch.__version__ and config["record"]["resode"]
    assert (config["precision"], config["crop_padding"], config["flip"]) == ("32", 1, False)


def finished_config(run):
    return RunFolder.open(run.path).read_config()


def test_field_evaluations_are_counted(tmp_path):
    """odenet20 has 3 + 2 + 2 blocks in its stacks; rk4 calls each field four times a substep."""
    run = train(
        "odenet20",
        "digits",
        "smoke",
        updates=1,
        model_options={"solver": "rk4", "substeps": 2},
        run_dir=tmp_path / "run",
        progress=False,
    )
    assert run.summary["nfe"] == 7 * 4 * 2
    assert evaluate_run(run.path, solver="euler", substeps=1).nfe == 7
    assert evaluate_run(run.path).nfe == 56, "the solver of the run is stored with it"


def test_training_leaves_the_global_random_state(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    train(Tiny(), "digits", "smoke", updates=1, run_dir=tmp_path / "run", progress=False)
    torch.manual_seed(3)
    Tiny()
    assert not torch.equal(before, torch.get_rng_state()), "the network was initialised outside the run"
    torch.set_rng_state(before)
    train("odenet20", "digits", "smoke", updates=1, run_dir=tmp_path / "other", progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_bf16_computes_in_bfloat16_and_keeps_weights_in_float32(tmp_path):
    seen = []

    def look(logits):
        seen.append(logits.dtype)
        return logits

    run = tiny_run(tmp_path / "run", {1: look}, updates=2, precision="bf16")
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in run.network.parameters()} == {torch.float32}
    assert torch.isfinite(torch.tensor(run.metrics["train_loss"])).all()


def test_an_update_never_waits_for_the_device(tmp_path, monkeypatch):
    """Reading a number from the device in every update would serialise a GPU."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _original=original):
            if self.requires_grad or in_update:
                reads.append(1)
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    in_update = []

    def start(logits):
        in_update.append(1)
        return logits

    def stop(logits):
        in_update.clear()
        return logits

    tiny_run(tmp_path / "run", {2: start, 20: stop}, epochs=1)
    assert len(reads) <= 2, "18 updates, and at most one look a second"


def test_held_out_images_are_not_trained_on(tmp_path, digits):
    run = tiny_run(tmp_path / "run", epochs=1, validation=400)
    assert run.metrics["update"] == [(1437 - 400) // 64]
    assert 0 < run.summary["validation_accuracy"] <= 1
    config = finished_config(run)
    assert config["validation"] == 400 and digits.train_labels.shape == (1437,)


def test_a_trainer_can_drive_the_task(digits):
    """The Lightning module is complete: a Trainer follows the same schedule."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning import Trainer

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        batches = Batches(
            digits.train_images, digits.train_labels, 64, mean=digits.mean, std=digits.std, train=True
        )
        task = ClassificationTask(Tiny(), RECIPES["smoke"], updates=4)
        trainer = Trainer(
            max_steps=4,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task, batches)
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == RECIPES["smoke"].learning_rate(3, 4)


# Stopping and going on


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("call", [10, 22, 23, 40])
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, finished, signum, call):
    """Call 22 is an epoch's last update, 23 the next one's first."""
    with pytest.raises(Interrupted, match=f"update {call} of 44.*resode train --resume") as stop:
        tiny_run(tmp_path / "run", {call: interrupted(signum)})
    assert stop.value.signum == signum
    assert not (tmp_path / "run" / "summary.json").exists()
    train(Tiny(), resume=tmp_path / "run", progress=False)
    assert same_weights(tmp_path / "run", finished.path)
    assert columns(tmp_path / "run") == columns(finished.path)


def test_the_average_of_the_weights_is_evaluated_kept_and_resumed(tmp_path):
    """The average starts at the first update's weights w₁ and then is 0.9 of itself and 0.1 of w_t.

    Its batch-norm statistics are its own, measured at the last epoch's images: not averages of others'.
    """
    seen, last = [], []

    class Watch:
        def after_update(self, loop):
            seen.append({name: value.clone() for name, value in loop.network.state_dict().items()})

        def after_run(self, loop):
            loop.batches.set_epoch(1)
            last.extend(images for images, _ in loop.batches)

    whole = tiny_run(tmp_path / "whole", ema=0.9, callbacks=[Watch()])
    kept = load_file(whole.path / "weights.safetensors")
    measured = copy.deepcopy(whole.network)
    measure_statistics(measured, last)
    for name, value in measured.state_dict().items():
        torch.testing.assert_close(kept[name], value, rtol=1e-5, atol=1e-6)
    for name, value in seen[0].items():
        if value.is_floating_point() and "running" not in name:
            for state in seen[1:]:
                value = 0.9 * value + 0.1 * state[name]
            torch.testing.assert_close(kept[name], value, rtol=1e-5, atol=1e-6)
            assert not torch.equal(kept[name], seen[-1][name])
    assert all(torch.equal(value, kept[name]) for name, value in whole.network.state_dict().items())
    again = evaluate_run(whole.path, model=Tiny).accuracy
    assert (
        again
        == whole.summary["test_accuracy"]
        == score(whole.network, plain_batches(load_data("digits"), "test", torch.device("cpu"))).accuracy
    )
    checkpoint = load(whole.path / "checkpoints" / "last.safetensors", model=Tiny)
    assert all(torch.equal(value, kept[name]) for name, value in checkpoint.state_dict().items())
    with pytest.raises(Interrupted):
        tiny_run(tmp_path / "run", {31: interrupted(signal.SIGTERM)}, ema=0.9)
    train(Tiny(), resume=tmp_path / "run", progress=False)
    assert same_weights(tmp_path / "run", whole.path)


@pytest.mark.parametrize("call", [25, 30])
def test_a_run_that_ends_within_an_epoch_is_resumed_too(tmp_path, call):
    whole = tiny_run(tmp_path / "whole", updates=30)
    assert whole.metrics["update"] == [22, 30] and whole.summary["updates"] == 30
    with pytest.raises(Interrupted, match=f"update {call} of 30"):
        tiny_run(tmp_path / "run", {call: interrupted(signal.SIGTERM)}, updates=30)
    train(Tiny(), resume=tmp_path / "run", progress=False)
    assert same_weights(tmp_path / "run", whole.path)
    assert columns(tmp_path / "run") == columns(whole.path)


def test_a_figure_that_is_not_finite_is_null(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_summary({"test_loss": float("nan"), "nfe": float("inf"), "seconds": 1.5})
    stored = json.loads((folder.path / "summary.json").read_text())
    assert {name: value for name, value in stored.items() if name != "checksums"} == {
        "test_loss": None,
        "nfe": None,
        "seconds": 1.5,
    }


@pytest.mark.parametrize("call", [5, 30])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, finished, call):
    """Before the first checkpoint it starts again, later it goes on from the last epoch's end."""
    with pytest.raises(Killed):
        tiny_run(tmp_path / "run", {call: killed})
    torch.manual_seed(7)  # without a checkpoint the weights are those of the network passed in
    train(Tiny(), resume=tmp_path / "run", progress=False)
    assert same_weights(tmp_path / "run", finished.path)
    assert columns(tmp_path / "run") == columns(finished.path)


def test_a_named_network_starts_again_from_its_seed(tmp_path):
    options = {"updates": 3, "progress": False}
    whole = train("odenet20", "digits", "smoke", run_dir=tmp_path / "whole", **options)
    train("odenet20", "digits", "smoke", run_dir=tmp_path / "half", **options)
    for file in ("last", "previous"):
        (tmp_path / "half" / "checkpoints" / f"{file}.safetensors").unlink(missing_ok=True)
    (tmp_path / "half" / "weights.safetensors").unlink()
    train(resume=tmp_path / "half", progress=False)
    assert same_weights(tmp_path / "half", whole.path)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, finished, damage, capsys):
    with pytest.raises(Interrupted):
        tiny_run(tmp_path / "run", {30: interrupted(signal.SIGINT)})
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    content = bytearray(last.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[-20] ^= 1
    last.write_bytes(content)
    train(Tiny(), resume=tmp_path / "run")
    said = capsys.readouterr().out
    assert "last.safetensors" in said and "resuming after update 22 of 44" in said
    assert same_weights(tmp_path / "run", finished.path)


def test_a_finished_run_is_finished(tmp_path, capsys):
    first = tiny_run(tmp_path / "run", epochs=1)
    before = first.path.joinpath("weights.safetensors").read_bytes()
    again = train(Tiny(), resume=first.path, progress=False)
    assert again.summary == first.summary
    assert first.path.joinpath("weights.safetensors").read_bytes() == before


def test_a_second_interrupt_stops_at_once():
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruption() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_resumed_run_keeps_its_settings(tmp_path):
    run = tiny_run(tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match=r"keeps the settings it was started with, got recipe"):
        train(Tiny(), recipe="fast", resume=run.path)
    with pytest.raises(RunError, match=r"trained a model of your own, .*Tiny. Pass it again"):
        train(resume=run.path)
    with pytest.raises(ValueError, match=r"keeps its data: it has digits, got cifar10"):
        train(Tiny(), "cifar10", resume=run.path)


def test_a_run_of_other_images_is_not_resumed(tmp_path, digits):
    from dataclasses import replace

    with pytest.raises(Killed):
        torch.manual_seed(7)
        train(Tiny(at={30: killed}), digits, "smoke", run_dir=tmp_path / "run", progress=False)
    with pytest.raises(RunError, match=r"trained a data of your own|trained a data set of your own"):
        train(Tiny(), resume=tmp_path / "run", progress=False)
    fewer = replace(digits, train_images=digits.train_images[:1000], train_labels=digits.train_labels[:1000])
    with pytest.raises(RunError, match=r"1,437 training and 360 test images, and finds .* 1,000"):
        train(Tiny(), fewer, resume=tmp_path / "run", progress=False)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        tiny_run(tmp_path / "run", {30: interrupted(signal.SIGINT)})
    with pytest.raises(RunError, match=r"belongs to another network"):
        train(Tiny(width=5), resume=tmp_path / "run", progress=False)


# What goes wrong


def test_a_nan_loss_says_where_and_keeps_the_last_good_checkpoint(tmp_path, finished):
    with pytest.raises(RunError) as error:
        tiny_run(tmp_path / "run", {31: poisoned})
    message = str(error.value)
    assert "the loss became nan in epoch 2, update 31 of 44, at learning rate 0.0429" in message
    assert "Try a tenth of that --lr" in message and "checkpoint of epoch 1 is kept" in message
    checkpoint, damaged = RunFolder.open(tmp_path / "run").read_checkpoint()
    assert damaged is None and checkpoint is not None and checkpoint.state["epoch"] == 1
    assert all(t.isfinite().all() for t in checkpoint.part("network").values())
    train(Tiny(), resume=tmp_path / "run", progress=False)
    assert same_weights(tmp_path / "run", finished.path)


def test_weights_that_overflow_in_the_last_update_are_no_checkpoint(tmp_path):
    """The loss is still finite when the gradient is not."""

    def overflow(logits):
        logits.register_hook(lambda gradient: gradient * float("inf"))
        return logits

    with pytest.raises(RunError, match=r"weights are no longer finite .* in epoch 1, update 22 of 44"):
        tiny_run(tmp_path / "run", {22: overflow})
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["diverged.safetensors"]

    def overflow_and_interrupt(logits):
        return overflow(interrupted(signal.SIGINT)(logits))

    with pytest.raises(RunError, match=r"weights are no longer finite .* in epoch 2, update 30 of 44"):
        tiny_run(tmp_path / "stopped", {30: overflow_and_interrupt})
    checkpoint, _ = RunFolder.open(tmp_path / "stopped").read_checkpoint()
    assert checkpoint is not None and checkpoint.state["epoch"] == 1, "the good one stands"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 2000}, "batch_size 2000, .* has 1437 training images"),
        ({"batch_size": 64, "validation": 1400}, "has 37 training images after 1400 were held out"),
        ({"validation": 1437}, "0 training images .* Hold out fewer"),
        ({"crop_padding": 8}, "crop_padding must be less than the image's side.* got 8, images of 8×8"),
        ({"data_dir": "images"}, "neither data_dir nor download, got data_dir images"),
        ({"download": True}, "neither data_dir nor download, got download"),
        (
            {"updates": 5, "schedule": "cosine", "warmup_updates": 5},
            "warmup_updates 5, the run has 5 updates",
        ),
        ({"lrr": 5}, "no setting 'lrr'. Did you mean lr"),
    ],
)
def test_settings_that_contradict_the_data_leave_no_folder(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_run(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_network_with_too_few_outputs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"logits \(2, 10\), got \(2, 7\)"):
        tiny_run(tmp_path / "run", classes=7)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 5}, TypeError, "model must be a name, a network or a function .* got 5"),
        ({"data": 5}, TypeError, "data must be digits, cifar10, .* or an ImageData, got 5"),
        ({"recipe": 5}, TypeError, "recipe must be paper, .* or a Recipe, got 5"),
        ({"device": ["cpu"]}, TypeError, r"device must be auto, .* got \['cpu'\]"),
        ({"model_options": {"depth": 3}}, TypeError, "Tiny must make a network .* got depth: .*unexpected"),
        ({"model": lambda: Tiny().double()}, ValueError, "takes float32 images .* fails with them"),
        ({"model": lambda: Tiny().requires_grad_(False)}, ValueError, "nothing to train: .*lambda"),
        (
            {"model": "odenet8", "model_options": {"solver": "dopri5"}, "compile": True},
            ValueError,
            "compile needs solvers of fixed steps, got dopri5",
        ),
        (
            {"model": lambda: nn.Sequential(ODEBlock(lambda t, x: -x), Tiny()), "compile": True},
            ValueError,
            "compile needs solvers of fixed steps, got dopri5",
        ),
        ({"callbacks": [StepLimits()]}, ValueError, "step limits belong to blocks .* this network has no"),
    ],
)
def test_arguments_of_another_kind_leave_no_folder(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        train(**{"model": Tiny, "data": "digits", "recipe": "smoke", "updates": 1, "progress": False,
                 "run_dir": tmp_path / "run", **arguments})  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_ones_own_data_may_hold_arrays_and_a_single_test_image(tmp_path, digits):
    """A run's files hold plain numbers: an array once failed in JSON, after the first epoch."""
    mine = replace(
        digits,
        name="a/b",
        test_images=digits.test_images[:1],
        test_labels=digits.test_labels[:1],
        classes=np.array(digits.classes),
        mean=np.float32(digits.mean),
        std=torch.tensor(digits.std),
    )
    assert mine.classes == digits.classes and mine.mean == pytest.approx(digits.mean, rel=1e-7)
    run = train(Tiny, mine, "smoke", updates=1, run_dir=tmp_path / "run", progress=False)
    assert run.summary["test_accuracy"] in (0.0, 1.0)
    plan = Plan.new(Tiny, mine, None, None, None, {})
    assert plan.default_run_dir().parent == Path("runs") and "-a-b-" in plan.default_run_dir().name
    for name, value in (("mean", (math.nan,)), ("std", (math.inf,))):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            replace(digits, **{name: value})
    for name, value in (("title", None), ("mean", 0.5)):
        with pytest.raises(TypeError, match=f"{name} must be"):
            replace(digits, **{name: value})


@pytest.mark.parametrize("stop", [False, True])
def test_a_compiler_that_fails_or_is_stopped_says_so(tmp_path, monkeypatch, stop):
    """Ctrl-C and `timeout` reach the compiler's processes too, so that a stop looks like its failure."""

    def compiled(function, **options):
        def call(*batch):
            if stop:
                os.kill(os.getpid(), signal.SIGTERM)
            raise CompilerError("CppCompileError: no g++\nand its whole output")

        return call

    CompilerError = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(Interrupted if stop else RunError) as error:
        tiny_run(tmp_path / "run", compile=True)
    said = (
        "by SIGTERM while update 1 of 44 was compiled" if stop else "(CppCompileError: no g++). Train without"
    )
    assert said in str(error.value) and "whole output" not in str(error.value)
    monkeypatch.undo()


def test_a_short_run_has_a_record_of_its_step_limits(tmp_path):
    watch = StepLimits()
    watch.share = 1e-9
    settings = {"model_options": {"width": 2}, "updates": 2, "progress": False}
    train("odenet8", "digits", "smoke", run_dir=tmp_path / "run", callbacks=[watch], **settings)
    assert {record.update for record in watch.records} == {2}
    assert (tmp_path / "run" / "figures" / "step_limits.png").exists()
    assert (tmp_path / "run" / "step_limits.csv").exists()


def test_wrong_names_come_before_the_data(tmp_path, monkeypatch):
    from resode.training import run as run_module

    monkeypatch.setattr(run_module, "load_data", lambda *a, **k: pytest.fail("images were decoded"))
    with pytest.raises(ValueError, match=r"no data set 'cifar101'.*cifar100"):
        train("resnet20", "cifar101")
    with pytest.raises(ValueError, match=r"resnet21"):
        train("resnet21", "cifar10")
    with pytest.raises(ValueError, match=r"sovler"):
        train("odenet20", "cifar10", model_options={"sovler": "rk4"})
    with pytest.raises(TypeError, match=r"solver is list"):
        train("odenet20", "cifar10", model_options={"solver": ["rk4"]})


def test_a_run_is_never_overwritten(tmp_path, finished):
    with pytest.raises(FolderTaken, match=r"not empty. Give another --run-dir, go on with --resume"):
        tiny_run(finished.path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(FolderTaken, match=r"or remove it"):
        tiny_run(tmp_path / "mine")
    with pytest.raises(FolderTaken, match=r"is a file"):
        tiny_run(tmp_path / "mine" / "thesis.txt")
    with pytest.raises(RunError, match=r"cannot be used|cannot be written"):
        tiny_run(tmp_path / "mine" / "thesis.txt" / "run")


def test_a_folder_in_use_is_left_alone(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    with folder.locked(), pytest.raises(RunError, match=r"in use by another process"):
        with RunFolder(folder.path).locked():
            pass
    assert not folder.path.exists(), "nothing was written, nothing stays"


def test_a_full_disk_leaves_the_good_file(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "config.yaml", "good")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match=r"the disk is full: .*run.* --resume"):
        RunFolder(tmp_path).write("config.yaml", "half")
    assert path.read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"], "no temporary file stays"


def test_a_disk_that_fills_up_while_training_keeps_the_last_checkpoint(tmp_path, finished, monkeypatch):
    original = os.fsync

    def full(logits):
        def refuse(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", refuse)
        return logits

    with pytest.raises(RunError, match=r"disk is full"):
        tiny_run(tmp_path / "run", {40: full})
    monkeypatch.setattr(files.os, "fsync", original)
    train(Tiny(), resume=tmp_path / "run", progress=False)
    assert same_weights(tmp_path / "run", finished.path)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    run = tiny_run(tmp_path / "run", epochs=1)
    text = (run.path / "config.yaml").read_text().replace("format: 1", "format: 9")
    (run.path / "config.yaml").write_text(text)
    with pytest.raises(RunError, match=r"format 9, and this resode reads format 1"):
        train(Tiny(), resume=run.path)


# Getting a network back


def test_a_loaded_network_is_the_trained_one(tmp_path, digits):
    run = train("odenet20", "digits", "smoke", updates=3, run_dir=tmp_path / "run", progress=False)
    images = next(iter(plain_batches(digits)))[0][:8]
    expected = run.network(images)
    for source in (run.path, run.path / "weights.safetensors", run.path / "checkpoints" / "last.safetensors"):
        network = load(source)
        assert not network.training
        torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-5)


def test_a_network_of_ones_own_is_passed_in(finished, digits):
    with pytest.raises(RunError, match=r"network of your own, .*Tiny. Pass its constructor"):
        load(finished.path)
    network = load(finished.path, model=Tiny)
    assert score(network, plain_batches(digits)).accuracy == finished.summary["test_accuracy"]
    with pytest.raises(RunError, match=r"do not fit"):
        load(finished.path, model="odenet20")


def test_foreign_weights_need_a_name(tmp_path):
    save_file(build("resnet20").state_dict(), tmp_path / "foreign.safetensors")
    with pytest.raises(RunError, match=r"does not say which network"):
        load(tmp_path / "foreign.safetensors")
    assert (
        sum(p.numel() for p in load(tmp_path / "foreign.safetensors", model="resnet20").parameters())
        == 269_722
    )


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


def test_nothing_is_unpickled(tmp_path):
    content = pickle.dumps(Bomb())
    for name in ("weights.pt", "weights.ckpt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RunError, match=r"unpickling them could run any code; nothing was run"):
            load(tmp_path / name)
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"no sound safetensors file"):
        load(tmp_path / "weights.safetensors")


def test_a_missing_run_lists_those_nearby(finished):
    with pytest.raises(NoSuchRun, match=r"does not exist. Runs nearby: .*undisturbed"):
        load(finished.path.parent / "undistrubed")
    with pytest.raises(NoSuchRun, match=r"no config.yaml"):
        load(finished.path.parent)


def test_tensors_survive_packing_to_the_bit(tmp_path):
    tensors = {
        "half": torch.randn(3, 2).bfloat16(),
        "count": torch.tensor(5),
        "empty": torch.zeros(0),
        "turned": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "flag": torch.tensor([True, False]),
    }
    (tmp_path / "x.safetensors").write_bytes(pack(tensors, {"a": [1.5, None, "η"]}))
    back, about = unpack(tmp_path / "x.safetensors")
    assert about == {"a": [1.5, None, "η"]}
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def test_yaml_reads_numbers_as_everyone_writes_them(tmp_path):
    (tmp_path / "c.yaml").write_text("a: 1e-4\nb: 5E3\nc: 0.1\nd: 10\ne: '1e-4'\nf: rk4\n")
    assert read_yaml(tmp_path / "c.yaml") == {"a": 1e-4, "b": 5e3, "c": 0.1, "d": 10, "e": "1e-4", "f": "rk4"}
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    (tmp_path / "code.yaml").write_text("a: !!python/object/apply:os.system ['true']\n")
    for name, message in (("list", "must hold settings"), ("bad", "is no YAML"), ("code", "is no YAML")):
        with pytest.raises(RunError, match=message):
            read_yaml(tmp_path / f"{name}.yaml")


# Evaluation


def test_a_score_is_the_mean_over_all_images(digits):
    network = build("odenet20", in_channels=1)
    loader = plain_batches(digits)
    result = score(network, loader)
    assert network.training, "the mode is put back"
    network.eval()
    with torch.no_grad():
        logits = torch.cat([network(images) for images, _ in loader])
    hits = (logits.argmax(1) == digits.test_labels).sum().item()
    assert result.accuracy == hits / 360 and result.images == 360
    assert result.loss == pytest.approx(cross_entropy(logits, digits.test_labels).item(), rel=1e-5)
    assert result.nfe == 7
    with pytest.raises(ValueError, match=r"no images"):
        score(network, [])


def test_adaptive_solvers_count_the_mean_over_samples(digits):
    network = build("odenet20", in_channels=1, solver="dopri5")
    few = list(plain_batches(digits, limit=4))
    assert score(network, few).nfe >= 7 * 6


def test_only_stacks_change_their_solver():
    with pytest.raises(ValueError, match=r"this network has none"):
        set_solver(Tiny(), "rk4")
    network = build("odenet20", in_channels=1)
    set_solver(network, "rk4", 3)
    assert {(s.solver, s.substeps) for s in network.stacks()} == {("rk4", 3)}
    with pytest.raises(ValueError, match=r"rk5"):
        set_solver(network, "rk5")


def sorted_images(per_class):
    """Images of three classes, one class after another; an image's value is its class."""
    labels = torch.arange(3).repeat_interleave(per_class)
    images = (80 * labels).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    return ImageData("own", "sorted", images, labels, images, labels, tuple("abc"), (0.3,), (0.25,))


def test_a_few_images_are_taken_evenly_from_a_sorted_set(digits):
    """30 of 3·200 are every twentieth: ten of each class. All of them stay in their order."""
    labels = torch.cat([y for _, y in plain_batches(sorted_images(200), "train", limit=30)])
    assert labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    images = torch.cat([x for x, _ in plain_batches(digits, "train", limit=100)])
    assert images.shape == (100, 1, 8, 8)
    labels = torch.cat([y for _, y in plain_batches(digits, "train", limit=10**6)])
    assert torch.equal(labels, digits.train_labels)


@pytest.mark.parametrize(("count", "sizes"), [(1200, [400, 400, 400]), (700, [350, 350]), (10**6, [450] * 4)])
def test_batch_norm_meets_all_classes_in_each_of_equal_batches(count, sizes):
    """Three classes, each a third, whatever the order on the disk: within 5σ = 5·√(350·2/9) = 44 images."""
    batches = calibration_batches(sorted_images(600), count)
    got = [y for _, y in batches]
    assert [len(y) for y in got] == sizes
    for labels in got:
        assert (labels.bincount(minlength=3) - len(labels) / 3).abs().max() < 44 * (len(labels) / 350) ** 0.5
    assert all(map(torch.equal, got, [y for _, y in batches]))  # the same for every solver
    with pytest.raises(ValueError, match=r"count must be a whole number of at least 1, got 0"):
        calibration_batches(sorted_images(600), 0)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("model", ["odenet20", "resnet20"])
def test_a_compiled_update_is_the_eager_one(tmp_path, model):
    """The first update moves w by lr·g·(1 + 0.9): equal moves, equal gradients.

    To 1 %: a ReLU of resnet20 that rounding puts on the other side of its kink changes a kernel's gradient by
    0.3 % (eager against float64; 1e-6 where none does).
    """
    settings = {"data": "digits", "recipe": "smoke", "updates": 1, "progress": False}
    eager, compiled = (
        train(model, run_dir=tmp_path / name, compile=name == "compiled", **settings)
        for name in ("eager", "compiled")
    )
    assert compiled.summary["train_loss"] == pytest.approx(eager.summary["train_loss"], rel=1e-5)
    assert compiled.metrics["nfe"] == eager.metrics["nfe"]
    torch.manual_seed(0)
    start = build(model, in_channels=1)
    moves = [
        {name: weight - w0 for (name, w0), weight in zip(start.named_parameters(), ws, strict=True)}
        for ws in (eager.network.parameters(), compiled.network.parameters())
    ]
    for name, move in moves[0].items():
        assert 0 < move.norm() and (moves[1][name] - move).norm() < 0.01 * move.norm(), name
    assert read_yaml(tmp_path / "compiled" / "config.yaml")["compile"] is True


class MinusSquare(nn.Module):
    """J = −2x, so that the state at which it is linearized shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x * x


def test_step_limits_are_those_of_each_block_at_its_own_state():
    """x₀ = (1, 2) and (1, −2); F₀ = diag(−2, −5)x, η = 0.2 in two substeps; Euler in F₀ alone has limit 0.4.

    Each substep of 0.1 multiplies x by (0.8, 0.5), so x₁ = (0.64, ±0.5), where F₁ = −x² has λ = −1.28, ∓1:
    the first sample allows 2/1.28, the second has a growing mode.
    """
    diagonal = nn.Linear(2, 2, bias=False)
    diagonal.weight.data = torch.diag(torch.tensor([-2.0, -5.0]))
    network = nn.Sequential(ResidualStack([diagonal, MinusSquare()], step_size=0.2, substeps=2))
    (stage,) = block_limits(network, torch.tensor([[1.0, 2.0], [1.0, -2.0]]), ["euler", "rk4"])
    assert (stage.name, stage.shape, stage.solver) == ("0", (2,), "euler")
    assert stage.steps == pytest.approx([0.1, 0.1])
    euler0, rk0, euler1, rk1 = stage.rows
    assert (euler0.step, rk0.step) == pytest.approx((2 / 5, 2.785293563405282 / 5), rel=1e-6)
    assert (euler0.growing, euler0.limiting_eigenvalue, euler0.within) == (0, pytest.approx(-5), True)
    assert (euler1.step, euler1.growing) == (0, 1)
    assert (euler1.decaying_step, rk1.decaying_step) == pytest.approx(
        (2 / 1.28, 2.785293563405282 / 1.28), rel=1e-6
    )
    assert euler1.limiting_eigenvalue == pytest.approx(-1.28, rel=1e-6)
    assert sorted(stage.spectra[1].real.ravel()) == pytest.approx([-0.128, -0.128, -0.1, 0.1], rel=1e-6)
    assert network[0].fields[0].weight.dtype == torch.float32, "the network itself is not changed"
    network[0].step_size = 0.9
    (coarse,) = block_limits(network, torch.tensor([[1.0, 2.0]]), ["euler"])
    assert not coarse.rows[0].within, "0.45 is beyond 0.4"


def test_states_too_large_for_a_dense_spectrum_go_without_the_jacobian():
    """relu at ones is the identity: every mode grows at rate 1, so Euler decays at no step."""
    network = nn.Sequential(ResidualStack([nn.ReLU()], step_size=0.1))
    (stage,) = block_limits(network, torch.ones(1, 5000), ["euler"])
    (row,) = stage.rows
    assert stage.shape == (5000,) and row.step == 0 and row.growing > 0 and not row.complete
    with pytest.raises(ValueError, match=r"this network has no ResidualStack"):
        next(block_limits(nn.Sequential(nn.ReLU()), torch.ones(1, 2), ["euler"]))


# What is left to the machine


def test_auto_is_resolved_and_stored(digits):
    cpu = torch.device("cpu")
    recipe = resolve(make_recipe("paper"), digits, build("resnet20", in_channels=1), cpu)
    assert (recipe.crop_padding, recipe.flip, recipe.warmup_updates) == (1, False, 0)
    assert recipe.precision == choose_precision(cpu) in ("32", "bf16")
    assert resolve(make_recipe("paper"), digits, build("resnet110"), cpu).warmup_updates == 400
    assert resolve(make_recipe("fast", flip=True), digits, build("resnet20"), cpu).flip is True


@pytest.mark.parametrize(
    ("vendor", "flags", "precision"),
    [
        ("AuthenticAMD", "avx512f avx512_bf16", "bf16"),
        ("AuthenticAMD", "avx2", "32"),
        ("GenuineIntel", "avx512f avx512_bf16", "32"),
        ("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile", "bf16"),
        ("", "", "32"),
    ],
)
def test_auto_takes_the_faster_precision(vendor, flags, precision, monkeypatch):
    from resode.training import plan

    monkeypatch.setattr(plan, "_cpu_info", {"vendor_id": vendor, "flags": flags}.__getitem__)
    assert choose_precision(torch.device("cpu")) == precision


def test_devices_are_checked():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("tpu", "gpu", "meta"):
        with pytest.raises(ValueError, match=r"device must be auto, cpu, cuda"):
            choose_device(name)
    with pytest.raises(ValueError, match=r"devices, got 'cuda:99'"):
        choose_device("cuda:99")
