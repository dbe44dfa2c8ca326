"""Runs that go on from another one with other settings, and loggers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from resode.blocks import ResidualStack
from resode.cli import app
from resode.tables import read_csv
from resode.training.files import RunError
from resode.training.folder import RunFolder
from resode.training.loggers import logger_callback
from resode.training.loop import Interrupted
from resode.training.monitor import Watch
from resode.training.run import train


class Stop:
    """Interrupts a run after so many updates."""

    def __init__(self, update: int) -> None:
        self.update = update

    def after_update(self, loop) -> None:
        if loop.update == self.update:
            os.kill(os.getpid(), signal.SIGINT)

    def after_run(self, loop) -> None:
        pass


def start(path: Path, **settings):
    """Updates of half the images, at a constant rate, in an epoch two of them."""
    settings = {"epochs": 1, "batch_size": 600, "schedule": "constant", "lr": 0.05} | settings
    return train(
        "odenet8", "digits", "smoke", run_dir=path, progress=False, model_options={"width": 2}, **settings
    )


def weights(path: Path) -> str:
    """Equal where all the tensors are, to the bit."""
    with safe_open(str(path / "weights.safetensors"), framework="pt") as file:
        return file.metadata()["sha256"]


@pytest.fixture
def parent(tmp_path):
    return start(tmp_path / "run")


def test_an_extended_run_is_the_longer_one_to_the_bit(tmp_path, parent):
    """At a constant rate nothing else differs; the parent stays as it is."""
    before = weights(parent.path)
    longer = train(resume=parent.path, epochs=3, progress=False)
    assert longer.path == tmp_path / "run-2"
    assert weights(longer.path) == weights(start(tmp_path / "straight", epochs=3).path)
    assert (
        longer.metrics["epoch"] == [1, 2, 3]
        and longer.metrics["train_loss"][0] == parent.metrics["train_loss"][0]
    )
    record = RunFolder(longer.path).read_config()["record"]
    assert (record["parent"], record["parent_epoch"]) == (str(parent.path), 1)
    assert weights(parent.path) == before and RunFolder(parent.path).read_config()["epochs"] == 1
    assert train(resume=parent.path, epochs=2, progress=False).path == tmp_path / "run-3"


def test_another_learning_rate_holds_from_there_on_also_after_an_interruption(tmp_path, parent):
    changed = {"epochs": 3, "lr": 0.01, "progress": False}
    whole = train(resume=parent.path, run_dir=tmp_path / "whole", **changed)
    assert whole.metrics["lr"] == [0.05, 0.01, 0.01]
    with pytest.raises(Interrupted):  # in its first epoch, its third update
        train(resume=parent.path, run_dir=tmp_path / "stopped", callbacks=[Stop(3)], **changed)
    train(resume=tmp_path / "stopped", progress=False)
    assert weights(tmp_path / "stopped") == weights(whole.path)


def test_what_cannot_change_in_the_middle_is_refused(tmp_path, parent):
    for settings, said in (
        ({"batch_size": 300}, r"keeps its batch_size: .*run has batch_size=600"),
        ({"seed": 3, "epochs": 2}, r"keeps its seed"),
        ({"lr": 0.01}, r"ends later than its parent stands: .* has done 2 updates \(1 epochs\)"),
        ({"epoch": 3}, r"no setting 'epoch'. Did you mean epochs"),
    ):
        with pytest.raises(ValueError, match=said):
            train(resume=parent.path, progress=False, **settings)
        assert not (tmp_path / "run-2").exists()
    (parent.path / "checkpoints" / "last.safetensors").unlink()
    with pytest.raises(RunError, match=r"has no checkpoint to go on from"):
        train(resume=parent.path, progress=False, epochs=2)


def test_the_command_extends_a_run(tmp_path, parent):
    arguments = ["train", "--resume", str(parent.path), "--epochs", "2", "--run-dir", str(tmp_path / "more")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"goes on from {parent.path}, after update 2 of now 4" in result.output


class Recorder:
    """A logger of Lightning's kind."""

    def __init__(self) -> None:
        self.rows, self.status = [], None

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append((step, metrics))

    def finalize(self, status: str) -> None:
        self.status = status


def test_a_logger_gets_every_epoch_once(tmp_path):
    recorder = Recorder()
    run = start(tmp_path / "run", epochs=2, logger=recorder)
    assert [step for step, _ in recorder.rows] == [2, 4]
    assert [row["loss/test"] for _, row in recorder.rows] == run.metrics["test_loss"]
    assert recorder.status == "success"


def test_the_csv_logger_writes_every_update_once_also_of_a_resumed_run(tmp_path):
    with pytest.raises(Interrupted):
        start(tmp_path / "run", epochs=2, logger="csv", callbacks=[Stop(3)])
    run = train(resume=tmp_path / "run", logger="csv", progress=False)
    columns, rows = read_csv(tmp_path / "run" / "updates.csv")
    assert columns == ["epoch", "update", "loss", "lr"]
    assert [(row["epoch"], row["update"]) for row in rows] == [("1", "1"), ("1", "2"), ("2", "3"), ("2", "4")]
    losses = torch.tensor([float(row["loss"]) for row in rows], dtype=torch.float64)
    assert losses.view(2, 2).mean(dim=1).tolist() == pytest.approx(run.metrics["train_loss"], rel=1e-12)
    assert {row["lr"] for row in rows} == {"0.05"}


def test_what_is_no_logger_is_refused():
    with pytest.raises(ValueError, match=r"no logger 'tensorbord'. Did you mean tensorboard"):
        logger_callback("tensorbord")
    with pytest.raises(TypeError, match=r"an object with log_metrics and finalize"):
        logger_callback(3)


def test_wandb_is_asked_for_the_run_again(tmp_path, monkeypatch):
    """The same id when it is resumed, another one of another run; a missing package says how to get it."""
    begun = []

    class Run:
        def __init__(self) -> None:
            self.logged, self.ended = [], False

        def log(self, figures, step) -> None:
            self.logged.append(step)

        def finish(self) -> None:
            self.ended = True

    def init(**arguments):
        begun.append((arguments, Run()))
        return begun[-1][1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(Interrupted):
        start(tmp_path / "run", epochs=2, logger="wandb", callbacks=[Stop(3)])
    train(resume=tmp_path / "run", logger="wandb", progress=False)
    start(tmp_path / "other", logger="wandb")
    (first, _), (again, run), (other, _) = begun
    assert first["id"] == again["id"] != other["id"]
    assert (first["project"], first["name"], first["resume"]) == ("resode", "run", "allow")
    assert run.logged == [2, 4] and run.ended
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'resode\[wandb\]'"):
        start(tmp_path / "third", logger="wandb")


def blocks() -> ResidualStack:
    torch.manual_seed(0)
    return ResidualStack([torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(3)])


def test_a_loop_of_ones_own_is_watched_and_left_as_it_is():
    """Δ of Euler's limit for F = −4x is 1/2: the record says so, and a step of 1 is outside."""
    stack = ResidualStack([torch.nn.Linear(4, 4, bias=False)])
    torch.nn.init.eye_(stack.fields[0].weight).data.mul_(-4)
    watch = Watch(torch.ones(2, 4), every=2, diagnose_every=3)
    state, before = torch.get_rng_state(), stack.training
    told = [watch(stack, update) for update in range(5)]
    assert [record.update for record in watch.step_limits.records] == [0, 2, 4]
    assert watch.step_limits.records[0].decaying_step == pytest.approx(0.5, rel=1e-5)
    assert [found is not None for found in told] == [True, False, False, True, False]
    assert [update for update, _ in watch.diagnoses] == [0, 3]
    assert torch.equal(torch.get_rng_state(), state) and stack.training is before
    with pytest.raises(ValueError, match="nothing to watch"):
        Watch(torch.ones(2, 4), every=None)


@pytest.mark.filterwarnings("ignore")  # Lightning's, about loaders and its own imports
def test_lightnings_trainer_is_watched(tmp_path):
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    from resode.training.callbacks import TrainerWatch

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = blocks()

        def training_step(self, batch, index):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 4)), batch_size=2)
    watch = TrainerWatch(torch.ones(2, 4), network=lambda module: module.net, every=2, diagnose_every=4)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        callbacks=[watch],
        log_every_n_steps=1,
        **quiet,
    )
    trainer.fit(Module(), data)
    assert [record.update for record in watch.watch.step_limits.records] == [2, 4]
    assert [update for update, _ in watch.watch.diagnoses] == [4]
    (table,) = tmp_path.rglob("step_limits.csv")
    assert len(read_csv(table)[1]) == 2
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert any(name.startswith("decaying step/") for name in read_csv(metrics)[0])


def test_without_the_extra_its_name_is_said():
    """As the command says it."""
    program = (
        "import sys; sys.modules['yaml'] = sys.modules['safetensors'] = None\nimport resode\n"
        "for name in ('load', 'sweep', 'train', 'compare'):\n"
        "    try: getattr(resode, name)\n    except ModuleNotFoundError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = told.stdout.splitlines()
    assert [line.split(" needs ")[0] for line in lines] == [
        f"resode.{n}" for n in ("load", "sweep", "train", "compare")
    ]
    assert all(line.endswith(": pip install 'resode[train]'") for line in lines)


@pytest.mark.parametrize("package", ["lightning", "rich"])
def test_training_without_a_package_says_so_first(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"training needs {package}: pip install 'resode\[train\]'"
    ):
        start(tmp_path / "run")
    assert not (tmp_path / "run").exists()
