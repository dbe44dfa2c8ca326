"""The command: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from resode.cli import app, terminal
from resode.tableaus import METHODS


def resode(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A few updates of odenet20 on digits."""
    path = tmp_path_factory.mktemp("runs") / "demo"
    result = resode("train", "--recipe", "smoke", "--updates", 6, "--solver", "euler", "--run-dir", path)
    assert result.exit_code == 0, result.output
    return path


def columns(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]


# Wrong usage: exit code 2, and the valid names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["trian"],
            ["no command 'trian'", "Did you mean train", "evaluate, swap, stability, methods, models"],
        ),
        (["--verbos"], ["no option --verbos", "--version"]),
        (["train", "--epoch", "3"], ["no option --epoch", "Did you mean --epochs", "--weight-decay"]),
        (["train", "--epochs", "three"], ["--epochs", "integer"]),
        (["train", "--epochs", "0"], ["epochs must be at least 1"]),
        (["train", "--epochs", "3", "--updates", "3"], ["exactly one of epochs and updates"]),
        (["train", "--model", "odenet21"], ["odenet20 and odenet26"]),
        (["train", "--model", "odnet20"], ["odnet20", "odenet20", "resnet56"]),
        (["train", "--model", "nowhere:net"], ["package.module:function", "nowhere"]),
        (["train", "--model", "resode.networks:nothing"], ["package.module:function", "nothing"]),
        (["train", "--model", ":nothing"], ["package.module:function", ":nothing"]),
        (["train", "--model", "resode:networks"], ["package.module:function", "module"]),
        (["train", "--data-dir", "images"], ["neither data_dir nor download, got data_dir images"]),
        (
            ["train", "--data", "cifra10"],
            ["no data set 'cifra10'", "Did you mean cifar10", "digits, cifar10"],
        ),
        (["train", "--recipe", "quick"], ["no recipe 'quick'", "digits, fast, paper, smoke"]),
        (["train", "--solver", "rk5"], ["rk5", "rk4", "dopri5"]),
        (["train", "--substeps", "0"], ["substeps"]),
        (["train", "--option", "shortcat=B"], ["shortcat", "shortcut"]),
        (["train", "--option", "shortcut"], ["NAME=VALUE"]),
        (["train", "--milestones", "half"], ["--milestones takes numbers", "'half'"]),
        (["train", "--precision", "16"], ["auto, 32, bf16"]),
        (["train", "--device", "gpu"], ["auto, cpu, cuda"]),
        (["train", "--config", "nothing.yaml"], ["nothing.yaml"]),
        (["train", "--resume", "nothing"], ["no run nothing"]),
        (["evaluate", "nothing"], ["no run nothing"]),
        (["evaluate"], ["RUN"]),
        (["swap", "nothing"], ["no run nothing"]),
        (["stability", "rk5"], ["neither a run nor a method", "Did you mean rk4", "dopri5"]),
        (["stability", "rk4", "rk5"], ["no method 'rk5'", "rk4"]),
        (["stability", "rk4", "--samples", "0"], ["--samples"]),
        (["stability", "rk4", "--blocks", "layer*"], ["--blocks", "for a run", "rk4 are methods"]),
    ],
)
def test_wrong_usage_lists_what_is_right(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = resode(*arguments)
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output
    assert "Traceback" not in result.output
    assert result.output.count("error: ") == 1
    assert list(tmp_path.rglob("*")) == [], "nothing was written"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "RUN", "--solver", "rk5"], ["rk5", "rk4"]),
        (["evaluate", "RUN", "--data", "mnist"], ["mnist", "digits"]),
        (["swap", "RUN", "--solvers", "euler,rk5"], ["no method 'rk5'"]),
        (["swap", "RUN", "--solvers", "gauss4"], ["gauss4", "implicit"]),
        (["swap", "RUN", "--substeps", "1,x"], ["--substeps takes whole numbers"]),
        (["swap", "RUN", "--limit", "0"], ["limit must be a whole number of at least 1"]),
        (["stability", "RUN", "--solvers", "rk5"], ["no method 'rk5'"]),
        (["stability", "RUN", "--solvers", ""], ["--solvers needs at least one"]),
        (["stability", "RUN", "rk4"], ["one run at a time"]),
        (["train", "--run-dir", "RUN"], ["is never overwritten", "--resume"]),
        (["train", "--resume", "RUN", "--lr", "0.1"], ["ends later than its parent stands", "more epochs"]),
        (["train", "--config", "RUN/config.yaml", "--recipe", "paper"], ["--recipe changes nothing"]),
        (["train", "--config", "RUN/config.yaml", "--gamma", "0.5"], ["gamma belongs to the step schedule"]),
        (["train", "--resume", "RUN", "--data-dir", "images"], ["neither data_dir nor download"]),
    ],
)
def test_wrong_usage_of_a_run(arguments, words, run):
    result = resode(*(argument.replace("RUN", str(run)) for argument in arguments))
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output


def test_a_failed_run_is_1(tmp_path, run):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", "/proc/nothing/run"):
        result = resode("train", "--run-dir", folder)
        assert result.exit_code == 1 and "Give " in result.output and "Traceback" not in result.output
    missing = resode(
        "train", "--data", "cifar10", "--data-dir", tmp_path / "none", "--run-dir", tmp_path / "run"
    )
    assert missing.exit_code == 1 and "Traceback" not in missing.output
    assert not (tmp_path / "run").exists()
    (tmp_path / "weights.safetensors").write_bytes(b"PK\x03\x04 no tensors")
    damaged = resode("evaluate", tmp_path / "weights.safetensors")
    assert damaged.exit_code == 1 and "no sound safetensors file" in damaged.output


def test_debug_keeps_the_traceback():
    with pytest.raises(ValueError, match="odenet21"):
        CliRunner().invoke(app, ["train", "--model", "odenet21", "--debug"], catch_exceptions=False)


# What commands print


def test_help_shows_examples_and_every_setting():
    text = resode("train", "--help").output
    assert "resode train --resume" in text
    for name in ("--epochs", "--recipe", "--lr", "--precision", "--config", "--run-dir", "--no-flip"):
        assert name in text
    for command in ("evaluate", "swap", "stability", "methods", "models"):
        result = resode(command, "--help")
        assert result.exit_code == 0 and f"resode {command}" in result.output


def test_version():
    from resode import __version__

    assert resode("--version").output.strip() == f"resode {__version__}"


def test_methods_lists_all():
    rows = columns(resode("methods").output)
    assert [row[0] for row in rows[1:]] == [*METHODS, "rkc1_S", "rkc2_S", "rkl1_S", "rkl2_S"]
    assert rows[-1][:4] == ["rkl2_S", "2", "S, 2 to 1000", "fixed steps"]
    assert rows[1 + list(METHODS).index("dopri5")][:4] == ["dopri5", "5", "7", "adaptive"]
    assert rows[1 + list(METHODS).index("gauss4")][3] == "implicit, fixed steps"


def test_models_prints_a_networks_groups():
    output = resode("models", "resnet50").output
    assert re.search(r"layer3\s+14×14\s+1024\s+6\s+7,098,368\s+1,464,336,384", output)
    assert re.search(r"all\s+1000\s+16\s+25,557,032\s+4,089,184,256", output)
    output = resode("models", "maxout", "--image-size", "8", "--option", "in_channels=1").output
    assert "a sample is 1×8×8" in output
    for arguments, message in (
        (["models", "resnet21"], "6n + 2"),
        (["models", "resnet20", "--option", "widht=3"], "Did you mean width"),
        (["models", "--image-size", "8"], "name it"),
        (["models", "maxout", "--image-size", "7"], "below 8×8"),
    ):
        result = resode(*arguments)
        assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_models_lists_parameters():
    output = resode("models").output
    assert re.search(r"^resnet1202 +19,421,274 ", output, re.MULTILINE)
    assert "odenet… has 6n + 2 layers" in output


def test_stability_of_methods(tmp_path):
    """Real and imaginary intervals: Hairer & Wanner II, IV.2; rk4 2.785294 and 2√2."""
    result = resode("stability", "euler", "rk4", "radau5", "--figure", tmp_path / "regions.png")
    assert columns(result.output)[1:4] == [
        ["euler", "1", "1", "2", "0", "–"],
        ["rk4", "4", "4", "2.785", "2.828", "–"],
        ["radau5", "5", "3", "∞", "∞", "A, L, I"],
    ]
    assert columns(resode("stability", "rkl2_30").output)[1] == ["rkl2_30", "2", "30", "464", "0", "–"]
    assert (tmp_path / "regions.png").stat().st_size > 10_000


def test_piped_output_is_whole_and_plain(run):
    adaptive = ["swap", run, "--limit", 4, "--solvers", "euler,dopri5", "--substeps", 1]
    for arguments in (["methods"], ["models"], adaptive):
        output = resode(*arguments).output
        assert "…" not in output.replace("… has", "") and "\x1b" not in output
        assert all(line == line.rstrip() for line in output.splitlines())
    rows = columns(output)
    assert rows[2][:2] == ["dopri5", "own"]
    assert float(rows[2][-1]) >= 7 * 6, "at least one step of six stages in each block"


# A run


def test_train_prints_a_line_an_epoch_and_stores_the_run(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["model_options"] == {"solver": "euler"} and summary["updates"] == 6
    assert (run / "figures" / "training.png").stat().st_size > 10_000


def test_quiet_says_nothing(tmp_path):
    result = resode("train", "--recipe", "smoke", "--updates", 1, "--quiet", "--run-dir", tmp_path / "run")
    assert (result.exit_code, result.output) == (0, "")


def test_a_stored_config_repeats_the_run_to_the_bit(run, tmp_path):
    again = resode("train", "--config", run / "config.yaml", "--run-dir", tmp_path / "again")
    assert again.exit_code == 0, again.output
    one, two = load_file(run / "weights.safetensors"), load_file(tmp_path / "again" / "weights.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_flags_win_over_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "model: odenet20\nsolver: rk4\nrecipe: smoke\nepochs: 1\nlr: 5e-2\nbatch_size: 256\n"
    )
    result = resode(
        *("train", "--config", tmp_path / "mine.yaml", "--lr", 0.01, "--updates", 2, "--substeps", 2),
        *("--run-dir", tmp_path / "run"),
    )
    assert result.exit_code == 0, result.output
    from resode.training.folder import RunFolder

    config = RunFolder(tmp_path / "run").read_config()
    assert (config["lr"], config["updates"], config["epochs"]) == (0.01, 2, None)
    assert (config["batch_size"], config["model_options"]) == (256, {"solver": "rk4", "substeps": 2})
    (tmp_path / "mine.yaml").write_text("learning_rate: 0.1\n")
    wrong = resode("train", "--config", tmp_path / "mine.yaml")
    assert wrong.exit_code == 2 and "no setting 'learning_rate'" in wrong.output and "lr" in wrong.output


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("model: 3", 2, "model must be text, got 3"),
        ("data: [digits]", 2, "data must be text, got ['digits']"),
        ("recipe: 5", 2, "recipe must be text, got 5"),
        ("data: cifar10\ndata_dir: 5", 2, "data_dir must be text, got 5"),
        ('data: cifar10\ndownload: "no"', 2, "download must be true or false, got 'no'"),
        ("device: [cpu]", 2, "device must be text, got ['cpu']"),
        ("record: 5", 2, "record is what a run stores"),
        ("format: 99", 1, "has format 99, and this resode reads format 1"),
    ],
)
def test_a_file_of_other_kinds_is_refused(tmp_path, monkeypatch, text, code, message):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    result = resode("train", "--config", "mine.yaml", "--updates", 1)
    assert result.exit_code == code and message in result.output, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n"
        "def small(width=4):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    trained = resode(
        *("train", "--model", "mynets:small", "--option", "width=8", "--recipe", "smoke", "--updates", 3),
        *("--run-dir", "run"),
    )
    assert trained.exit_code == 0, trained.output
    assert json.loads(Path("run/summary.json").read_text())["parameters"] == 65 * 8 + 9 * 10
    assert resode("evaluate", "run").exit_code == 1
    assert resode("evaluate", "run", "--model", "mynets:small").exit_code == 0
    refused = resode("swap", "run", "--model", "mynets:small")
    assert refused.exit_code == 2 and "ResidualStack" in refused.output
    config = resode("train", "--config", "run/config.yaml")
    assert config.exit_code == 2 and "pass --model mynets:small" in config.output
    for record in ("", "record: {own_model: false}\n"):
        Path("other.yaml").write_text("model: touching:file\nmodel_options: {path: touched}\n" + record)
        Path("touching.py").write_text("from pathlib import Path\nPath('touched').touch()\n")
        given = resode("train", "--config", "other.yaml")
        assert given.exit_code == 2 and "a file of settings runs none" in given.output
        assert not Path("touched").exists() and "touching" not in sys.modules
    command = Path("run/config.yaml").read_text().splitlines()[0]
    assert "run/config.yaml --model MODULE:FUNCTION` repeats" in command


def test_evaluate_prints_the_accuracy_of_the_summary(run):
    summary = json.loads((run / "summary.json").read_text())
    rows = columns(resode("evaluate", run).output)
    assert rows[1][:2] == ["360", f"{100 * summary['test_accuracy']:.2f}"] and rows[1][3] == "7"
    rows = columns(resode("evaluate", run / "weights.safetensors", "--solver", "rk4", "--substeps", 2).output)
    assert rows[1][3] == "56"


def test_swap_lists_and_takes_explicit_methods_alone(run):
    for name, reason in (("rk9", "no method 'rk9'"), ("implicit_euler", "implicit_euler is an implicit")):
        result = resode("swap", run, "--solvers", name)
        assert result.exit_code == 2 and reason in result.output and "dopri8" in result.output
        assert "gauss4" not in result.output


@pytest.mark.parametrize("width", [80, 56, 50, 40, 20])
def test_no_terminal_is_too_narrow_for_digits(width, monkeypatch):
    """Names are folded, numbers never; where even these do not fit, the terminal wraps the line."""
    text = io.StringIO()
    screen = Console(file=text, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(terminal, "console", lambda: screen)
    rows = [["midpoint", "2", "may lose", "48.00", "99.00", "0.904", "148.3"], ["own", *"1234567"[1:]]]
    terminal.table(["solver", "steps", "forecast", "accuracy %", "recalibrated %", "drift", "F calls"], rows)
    lines = text.getvalue().splitlines()
    assert [" ".join(line.split()) for line in lines[-2:]] == [" ".join(row) for row in rows]
    assert width < 45 or max(map(len, lines)) <= width


def test_swap_table_and_figure(run):
    """The trained solver's row is the run's own accuracy, with no drift and 7 calls of F."""
    result = resode("swap", run, "--solvers", "euler,rk4", "--substeps", "1,2")
    assert result.exit_code == 0, result.output
    rows = {tuple(row[:2]): row for row in columns(result.output) if row[0].rstrip("*") in METHODS}
    assert list(rows) == [("euler*", "1"), ("euler", "2"), ("rk4", "1"), ("rk4", "2")]
    summary = json.loads((run / "summary.json").read_text())
    accuracy = f"{100 * summary['test_accuracy']:.2f}"
    assert rows["euler*", "1"][2:4] == ["keeps", accuracy]
    assert rows["euler*", "1"][5:] == ["0.000", "7"] and "* as trained" in result.output
    assert "Distance from an ODE" in result.output and "layer1.0.fields.0" in result.output
    assert "swap-blocks.csv" in "".join(result.output.split()) and ".swap" not in result.output
    blocks = list(csv.DictReader((run / "figures" / "swap-blocks.csv").read_text().splitlines()))
    assert len(blocks) == 7 and all(float(row["distance"]) > 0 for row in blocks)
    assert [rows[key][6] for key in (("euler", "2"), ("rk4", "1"), ("rk4", "2"))] == ["14", "28", "56"]
    stored = list(csv.DictReader((run / "figures" / "swap.csv").read_text().splitlines()))
    assert [row["solver"] for row in stored] == ["euler", "euler", "rk4", "rk4"]
    assert (run / "figures" / "swap.png").stat().st_size > 10_000


def test_step_limits_of_a_run(run, tmp_path):
    figure = tmp_path / "spectra.png"
    result = resode("stability", run, "--solvers", "euler,rk4", "--samples", 1, "--figure", figure)
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.output.splitlines() if line.startswith("group")] == [
        "group 1 (layer1.0)",
        "group 2 (layer2.1)",
        "group 3 (layer3.1)",
    ]
    assert "states 16×8×8, trained with euler, h = 1" in result.output
    rows = [row for row in columns(result.output) if len(row) == 8 and row[1] in ("euler", "rk4")]
    assert len(rows) == 2 * (3 + 2 + 2)
    for euler, rk4 in zip(rows[::2], rows[1::2], strict=True):
        assert euler[3] == rk4[3], "growing modes belong to the flow, not to the solver"
        assert float(euler[4]) < float(rk4[4])
        assert (euler[7], rk4[7]) == tuple("yes" if 1 <= float(row[4]) else "no" for row in (euler, rk4))
    assert figure.stat().st_size > 10_000


# Processes: signals and pipes


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", "from resode.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    """In bf16, because Lightning likes to say that it uses it: standard error holds our message alone."""
    settings = ("--recipe", "smoke", "--epochs", 50, "--precision", "bf16")
    process = start("train", *settings, "--run-dir", tmp_path / "run")
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(r" +1/50 ", line):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(
        rf"stopped by SIGINT after update \d+ of 1100.*resode train --resume {tmp_path}/run", errors
    )
    assert "Traceback" not in errors and errors.count("\n") == 1
    assert (tmp_path / "run" / "checkpoints" / "last.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["methods", "train"])
def test_a_closed_pipe_is_no_error(command, tmp_path):
    """A table ends; a run goes on without anyone reading."""
    run = tmp_path / "run"
    options = ("--recipe", "smoke", "--updates", 2, "--run-dir", run) if command == "train" else ()
    process = start(command, *options)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(timeout=60)
    if command == "train":
        assert process.returncode == 0 and (run / "summary.json").exists()
