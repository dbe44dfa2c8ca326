"""What a run measures as it goes: evaluations of F, memory, figures, TensorBoard."""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from resode import plots
from resode.cli import app
from resode.training import memory
from resode.training.loggers import TensorBoard
from resode.training.loop import Interrupted
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


def short_run(path, **settings):
    """Two epochs of two updates, or as many updates as asked for."""
    length = {} if "updates" in settings else {"epochs": 2}
    settings = {"batch_size": 600, "progress": False} | length | settings
    return train("odenet20", "digits", "smoke", run_dir=path, **settings)


def test_evaluations_on_the_way_back_are_counted(tmp_path, capsys):
    """3 + 2 + 2 blocks, heun2's two stages; a checkpoint evaluates each once more to go back."""
    options = {"solver": "heun2", "gradient": "checkpoint"}
    with pytest.raises(Interrupted):
        short_run(tmp_path / "run", model_options=options, callbacks=[Stop(3)])
    run = train(resume=tmp_path / "run")
    assert run.metrics["nfe"] == [14, 14]
    assert run.metrics["nfe_backward"] == [14, 14], "the interrupted epoch's first update is not forgotten"
    assert run.summary["nfe_backward"] == 14
    assert "14 F evaluations and 14 on the way back" in capsys.readouterr().out
    assert short_run(tmp_path / "kept", updates=1).metrics["nfe_backward"] == [0], "activations were kept"


def test_peak_memory_is_printed_and_stored(tmp_path, capsys):
    run = short_run(tmp_path / "run", updates=1, progress=True)
    size = json.loads((tmp_path / "run" / "summary.json").read_text())["peak_memory_bytes"]
    assert size == run.summary["peak_memory_bytes"]
    text = Path("/proc/self/status").read_text()
    status = {k: v for k, _, v in (line.partition(":") for line in text.splitlines())}
    now = 1024 * int(status["VmHWM"].split()[0])  # the kernel's own figure of the peak
    assert 0.9 * now <= size <= now
    printed = capsys.readouterr().out
    assert f"peak memory {size / 2**20:,.0f} MiB of the whole process" in printed
    assert "images/s" in printed


def test_a_gpu_is_asked_for_its_own_peak(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    gpu = torch.device("cuda", 0)
    memory.forget_peak(gpu)
    assert (asked, memory.peak_memory(gpu)) == ([gpu], 5)
    monkeypatch.setattr(memory, "resource", None)
    assert memory.peak_memory(torch.device("cpu")) is None


def columns(**more):
    found = {"epoch": [1, 2], "lr": [0.1, 0.0], "nfe": [0.0, 0.0], "nfe_backward": [0.0, 0.0]}
    for split in ("train", "test"):
        found |= {f"{split}_loss": [2.0, 1.0], f"{split}_accuracy": [0.5, 0.9]}
    return found | more


def test_the_curves_show_evaluations_where_there_are_any():
    assert [ax.get_title() for ax in plots.training_curves(columns()).axes][2:] == ["learning rate"]
    solved = columns(nfe=[7, 14], eval_loss=[2.0, 3.0], eval_accuracy=[0.5, 0.8], eval_nfe=[28, 56])
    _, error, _, evaluations = plots.training_curves(solved).axes
    assert [line.get_label() for line in error.get_lines()] == ["train", "test", "test, other solver"]
    assert list(error.get_lines()[2].get_ydata()) == pytest.approx([50, 20])
    assert {line.get_label(): list(line.get_ydata()) for line in evaluations.get_lines()} == {
        "forward": [7, 14],
        "forward, other solver": [28, 56],
    }


class Writer:
    """Stands for torch's SummaryWriter."""

    made: list[Writer] = []  # noqa: RUF012

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.log_dir, self.purge_step, self.scalars, self.closed = log_dir, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_every_epoch_once_also_of_a_resumed_run(tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", [])
    with pytest.raises(Interrupted):
        short_run(tmp_path / "run", callbacks=[TensorBoard(), Stop(3)])
    run = train(resume=tmp_path / "run", callbacks=[TensorBoard()], progress=False)
    first, second = Writer.made
    assert first.log_dir == str(tmp_path / "run" / "tensorboard")
    assert second.purge_step == 0 and second.closed
    assert [s for s in first.scalars if s[0] == "loss/train"] == [
        ("loss/train", run.metrics["train_loss"][0], 2)
    ]
    for name, column in (
        ("loss/train", "train_loss"),
        ("learning rate", "lr"),
        ("F evaluations/forward", "nfe"),
    ):
        assert [s[1:] for s in second.scalars if s[0] == name] == list(
            zip(run.metrics[column], (2, 4), strict=True)
        )


def test_a_missing_tensorboard_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    result = CliRunner().invoke(app, ["train", "--logger", "tensorboard", "--run-dir", str(tmp_path / "run")])
    assert result.exit_code == 1 and "pip install 'resode[tensorboard]'" in result.output
    assert not (tmp_path / "run").exists()
