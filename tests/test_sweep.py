"""Sweeps: grids refused or named, runs equal to single ones to the bit, whatever happens on the way."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import time
import types
from pathlib import Path

import children
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from resode.cli import app
from resode.tables import read_csv
from resode.training.files import RunError, read_yaml
from resode.training.folder import RunFolder
from resode.training.run import train
from resode.training.sweep import sweep
from resode.training.sweep.grid import differences, plain_value, points, read_pairs, values_of
from resode.training.sweep.worker import Outcome, Task

SHORT = {"recipe": "smoke", "width": 2, "updates": 3, "batch_size": 32}
"""Of a run of a tenth of a second."""


def names(grid: dict, **settings) -> list[str]:
    return [point.name for point in points(grid, settings)]


def test_a_grid_is_the_product_of_its_values_the_last_key_fastest():
    assert names({"solver": "euler,rk4", "seed": "0:2"}) == [
        "solver=euler,seed=0",
        "solver=euler,seed=1",
        "solver=rk4,seed=0",
        "solver=rk4,seed=1",
    ]
    assert (
        names({"step-size": [0.5, 1.0]}) == names({"step_size": "0.5,1"}) == ["step_size=0.5", "step_size=1"]
    )
    assert values_of("seed", "4:0:-2") == [4, 2]
    assert [plain_value(text) for text in ("1e-3", "True", "rk4", "-2")] == [0.001, True, "rk4", -2]


def test_a_point_is_what_train_is_called_with():
    (point,) = points({"substeps": [2], "lr": [0.2]}, {"model": "odenet8", "width": 4, "epochs": 3})
    assert point.arguments == {
        "model": "odenet8",
        "epochs": 3,
        "lr": 0.2,
        "model_options": {"width": 4, "substeps": 2},
    }
    assert (point.plan.recipe.lr, point.plan.recipe.epochs) == (0.2, 3)


def test_text_becomes_what_its_setting_is():
    assert read_pairs(["milestones=0.3/0.6,none", "warmup-updates=none,5", "precision=32"]) == {
        "milestones": [(0.3, 0.6), ()],
        "warmup_updates": [None, 5],
        "precision": ["32"],
    }


REFUSED = [
    ({"sover": ["rk4"]}, {}, r"no setting or option 'sover'. Did you mean solver"),
    ({"solver": ["rk5"]}, {}, r"solver=rk5: .* must be one of euler, .* got 'rk5'"),
    ({"seed": [0, 0]}, {}, r"seed has the value 0 twice"),
    ({"seed": []}, {}, r"seed has no values"),
    ({"seed": "0:99999"}, {}, r"at most 10,000 runs, seed asks for 99,999"),
    ({"seed": "0:200", "width": "1:200"}, {}, r"at most 10,000 runs, the grid asks for 39,800"),
    ({"seed": "0:5:0"}, {}, r"the step of a range is not 0"),
    ({"seed": 3}, {}, r"values of seed must be a list, got 3. Write seed: \[3\]"),
    ({}, {}, r"a grid maps keys to their values"),
    ({"seed": [0]}, {"seed": 1}, r"seed is varied by the grid and set to 1 for all runs"),
    ({"solver": ["rk4"]}, {"model_options": {"solver": "euler"}}, r"solver is varied by the grid and set to"),
    ({"epochs": [1]}, {"updates": 5}, r"epochs=1: .*exactly one of epochs and updates"),
    ({"lr": [0.1, -1]}, {}, r"lr=-1: lr must be above 0"),
    ({"lr": ["fast"]}, {}, r"lr=fast: lr must be float"),
    ({"device": ["cpu"]}, {}, r"device is one for all runs of a sweep"),
    ({"model": ["resnet20", "odenet20"], "solver": ["rk4"]}, {}, r"model=resnet20,.* has no option 'solver'"),
    ({"eval_substeps": [2]}, {}, r"eval_substeps belongs to eval_solver"),
    ({"lr": [0.1]}, {"width": 4, "wdth": 4}, r"no setting or option 'wdth'. Did you mean width"),
    ({"model": [torch.nn.Linear(2, 2)]}, {}, r"makes a network for each of its runs"),
    ({"batch_size": [64, 5000]}, {}, r"batch_size=5000: a batch cannot be larger than the data"),
    ({"crop_padding": [1, 8]}, {}, r"crop_padding=8: .* less than the image's side"),
]


@pytest.mark.parametrize(("grid", "settings", "said"), REFUSED)
def test_what_is_wrong_with_a_grid_is_said_before_anything_runs(tmp_path, grid, settings, said):
    with pytest.raises((ValueError, TypeError), match=said):
        sweep(tmp_path / "sweep", grid, progress=False, **settings)
    assert not (tmp_path / "sweep").exists()


def test_the_command_refuses_them_too(tmp_path):
    for pair in ("seed", "=3", "seed=0:2"):
        result = CliRunner().invoke(app, ["sweep", str(tmp_path / "x"), "--grid", pair, "--grid", "seed=1"])
        assert result.exit_code == 2
    assert "seed stands in the grid twice" in result.output
    result = CliRunner().invoke(app, ["sweep", str(tmp_path / "x")])
    assert result.exit_code == 2 and "no sweep in" in result.output


def test_two_sweeps_on_one_folder_are_refused(tmp_path):
    with (tmp_path / ".sweep.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=r"another sweep is at work in .*Wait for it, or stop it"):
            sweep(tmp_path, {"seed": [0]}, progress=False)


def test_ranges_in_a_file_are_ranges(tmp_path):
    """YAML 1.1 reads 1:10 as 70, in base 60."""
    (tmp_path / "grid.yaml").write_text("grid:\n  seed: 1:10\n  lr: [0.1, 1e-2]\n")
    stored = read_yaml(tmp_path / "grid.yaml")["grid"]
    assert names(stored)[::17] == ["seed=1,lr=0.1", "seed=9,lr=0.01"]


def test_a_file_holds_a_grid_and_settings_and_flags_win(tmp_path, monkeypatch):
    (tmp_path / "grid.yaml").write_text("grid:\n  seed: 0:2\nepochs: 10\nwidth: 8\nsolver: rk4\n")
    got = {}

    def instead(folder, grid, **settings):
        got.update(settings, grid=grid)
        raise RunError("enough")

    monkeypatch.setattr("resode.training.sweep.sweep", instead)
    CliRunner().invoke(
        app, ["sweep", "x", "--config", str(tmp_path / "grid.yaml"), "--epochs", "3", "--jobs", "2"]
    )
    assert got["grid"] == {"seed": "0:2"} and got["jobs"] == 2
    assert (got["epochs"], got["width"], got["model_options"]) == (3, 8, {"solver": "rk4"})


def weights(path: Path) -> str:
    """Equal where all the tensors are, to the bit; the file's header has no order of its own."""
    with safe_open(str(path / "weights.safetensors"), framework="pt") as file:
        return file.metadata()["sha256"]


def test_runs_are_those_of_train_and_a_diverging_one_stops_none(tmp_path, capsys):
    """The weights are equal to the bit, with as many threads; what failed is listed, and tried again."""
    folder = tmp_path / "sweep"
    arguments = [
        "sweep",
        str(folder),
        "--grid",
        "lr=1e30,0.1",
        "--grid",
        "seed=0:2",
        "--jobs",
        "2",
        "--threads",
        "1",
    ]
    arguments += ["--recipe", "smoke", "--updates", "3", "--batch-size", "32", "--option", "width=2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert "4 runs: 4 to begin" in result.output and "2 finished, 2 failed" in result.output
    assert "lr=1e+30,seed=0  failed: the loss became" in result.output
    _, rows = read_csv(folder / "sweep.csv")
    assert [row["run"] for row in rows] == [
        f"lr={lr},seed={seed}" for lr in ("1e+30", "0.1") for seed in (0, 1)
    ]
    assert [row["status"] for row in rows] == ["failed", "failed", "finished", "finished"]
    assert "the loss became" in rows[0]["error"] and not rows[0]["test_accuracy"]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = train(
            data="digits", lr=0.1, seed=1, run_dir=tmp_path / "alone", progress=False, recipe="smoke",
            updates=3, batch_size=32, model_options={"width": 2},
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert weights(folder / "lr=0.1,seed=1") == weights(alone.path)
    assert float(rows[3]["test_loss"]) == alone.summary["test_loss"]

    (folder / "lr=0.1,seed=0" / "mark").touch()  # a run that is trained again would be refused
    found = sweep(folder, progress=True)
    assert "4 runs: 2 finished before, 2 that failed to try again" in capsys.readouterr().out
    assert [run.status for run in found.runs] == ["failed", "failed", "finished", "finished"]
    assert [run.name for run in found.failed] == ["lr=1e+30,seed=0", "lr=1e+30,seed=1"]
    with pytest.raises(ValueError, match=r"lr=0.1,seed=0 holds another run, with updates 3 \(asked for: 4\)"):
        sweep(folder, {"lr": [0.1], "seed": [0]}, **SHORT | {"updates": 4})
    with pytest.raises(ValueError, match=r"keeps its settings, got width"):
        sweep(folder, width=3)


def test_a_killed_sweep_and_a_killed_process_lose_nothing(tmp_path):
    """The sweep dies in its second run; then, resumed, one of its processes dies."""
    folder = tmp_path / "sweep"
    settings = ["--recipe", "smoke", "--epochs", 2, "--option", "width=2", "--jobs", 1, "--threads", 1]
    process = children.start(children.command, "sweep", folder, "--grid", "seed=0:3", *settings)
    until(lambda: (folder / "seed=1" / "config.yaml").exists())
    process.kill()
    process.join()
    assert (folder / "seed=0" / "summary.json").exists()
    process = children.start(children.command, "sweep", folder, said=tmp_path / "said.txt")
    until(lambda: (folder / "seed=2" / "config.yaml").exists())
    os.kill(worker_of(folder / "seed=2"), signal.SIGKILL)
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "said.txt").read_text()
    alone = children.start(
        children.command, "train", "--run-dir", tmp_path / "alone", "--seed", 2, *settings[:-4]
    )
    alone.join(120)
    assert weights(folder / "seed=2") == weights(tmp_path / "alone")
    assert "3 runs: 1 finished before, 1 to go on with, 1 to begin" in (tmp_path / "said.txt").read_text()
    assert not (folder / "sweep.log").exists() and not (folder / ".sweep.lock").exists()


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def worker_of(folder: Path) -> int:
    """The process that holds a run's lock."""
    lock = folder / ".lock"
    for place in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if place.readlink() == lock:
                return int(place.parts[2])
        except OSError:
            continue
    raise AssertionError(f"nobody holds {lock}")


def test_a_full_disk_stops_the_sweep(tmp_path, monkeypatch):
    """As an outcome that says so does; what was finished is kept."""
    from resode.training.sweep import sweeping

    class Full:
        free, closed = 1, False

        def submit(self, task) -> None:
            self.number = task.number

        def running(self) -> list[int]:
            return [0]

        def outcomes(self, seconds: float) -> list[Outcome]:
            return [Outcome(self.number, "the disk is full: no space left", full=True)]

        def close(self) -> None:
            type(self).closed = True

    monkeypatch.setattr(sweeping, "LocalEngine", lambda *_: Full())
    with pytest.raises(
        RunError, match=r"the disk is full, and the sweep stops: 0 of 2 runs are finished and kept"
    ):
        sweep(tmp_path, {"seed": [0, 1]}, progress=False, **SHORT)
    assert Full.closed


def test_settings_that_a_run_decided_for_itself_are_no_difference(tmp_path):
    run = train(data="digits", run_dir=tmp_path / "run", progress=False, recipe="smoke", updates=1)
    (same,) = points({"seed": [0]}, {"recipe": "smoke", "updates": 1})
    (other,) = points({"seed": [0]}, {"recipe": "smoke", "updates": 1, "solver": "rk4"})
    config = RunFolder(run.path).read_config()
    assert differences(same, config) == []
    assert differences(other, config) == ["solver euler (asked for: rk4)"]


def test_a_worker_that_does_not_see_the_folder_returns_its_files(tmp_path):
    """They take the place of what stood there, and are those of a worker that sees it."""
    from resode.training.sweep import cluster

    arguments = {"recipe": "smoke", "updates": 1, "batch_size": 32, "model_options": {"width": 2}}
    for name in ("seen", "returned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / cluster.MARK).write_text("ours")
    task = Task(0, str(tmp_path / "seen" / "run"), arguments, "cpu")
    threads = torch.get_num_threads()
    assert cluster.train_there(task, threads, "ours") == (Outcome(0), None)
    task = Task(0, str(tmp_path / "returned" / "run"), arguments, "cpu")
    outcome, files = cluster.train_there(task, threads, "another sweep's")
    assert outcome == Outcome(0) and not (tmp_path / "returned" / "run").exists()
    (tmp_path / "returned" / "run").mkdir()
    (tmp_path / "returned" / "run" / "half").touch()
    cluster._unpack(files, tmp_path / "returned" / "run")
    assert weights(tmp_path / "returned" / "run") == weights(tmp_path / "seen" / "run")
    assert not (tmp_path / "returned" / "run" / "half").exists()
    assert {p.name for p in (tmp_path / "returned").iterdir()} == {"run", cluster.MARK}


class RayError(Exception):
    pass


class FakeRay(types.SimpleNamespace):
    """One worker that does a task when it is waited for; a task named in `lost` is lost for good."""

    def __init__(self, lost: tuple[int, ...] = ()) -> None:
        cancelled = type("TaskCancelledError", (RayError,), {})
        super().__init__(
            exceptions=types.SimpleNamespace(RayError=RayError, TaskCancelledError=cancelled),
            begun={}, tasks={}, asked={}, lost=lost, cancelled=[], down=False,
        )  # fmt: skip

    def is_initialized(self) -> bool:
        return False

    def init(self, address, **options) -> None:
        self.begun = options | {"address": address}

    def cluster_resources(self) -> dict:
        return {"CPU": 1.0}

    def remote(self, **options):
        self.asked = options

        def begin(function, arguments):
            reference = object()
            self.tasks[reference] = function, arguments
            return reference

        return lambda function: types.SimpleNamespace(remote=lambda *args: begin(function, args))

    def wait(self, references, num_returns, timeout):
        return references[:1], references[1:]

    def get(self, reference):
        function, (task, *rest) = self.tasks[reference]
        if task.number in self.lost:
            raise RayError("the worker died")
        return function(task, *rest)

    def cancel(self, reference, force) -> None:
        self.cancelled.append(reference)

    def shutdown(self) -> None:
        self.down = True


def test_a_ray_cluster_gets_tasks_and_a_lost_one_is_recorded(tmp_path, monkeypatch):
    ray = FakeRay(lost=(1,))
    monkeypatch.setitem(sys.modules, "ray", ray)
    found = sweep(
        tmp_path / "s", {"seed": [0, 1]}, engine="ray", jobs=1, threads=1, retries=3, progress=False, **SHORT
    )
    assert [run.status for run in found.runs] == ["finished", "failed"]
    assert found.failed[0].error == "its Ray worker was lost: RayError, the worker died"
    assert ray.asked == {"num_cpus": 1, "num_gpus": 0, "max_retries": 3}
    assert (ray.begun["address"], ray.begun["num_cpus"], ray.down) == ("local", 1, True)
    assert not (tmp_path / "s" / ".sweep.ray").exists()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'resode\[sweep\]'"):
        sweep(tmp_path / "t", {"seed": [0]}, engine="ray", progress=False, **SHORT)


def test_an_address_that_does_not_answer_is_said_in_time(monkeypatch):
    from resode.training.sweep import cluster

    begun = time.monotonic()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        with pytest.raises(RunError, match=r"does not answer .*it had 2 s\). Start Ray there"):
            cluster.check_answers(f"127.0.0.1:{taken.getsockname()[1]}", connecting=2)
        taken.listen()
        monkeypatch.setattr(cluster, "_PROBE", "import time; time.sleep(60)")
        with pytest.raises(RunError, match=r"takes connections, but shows in 1 s no Ray cluster"):
            cluster.check_answers(f"127.0.0.1:{taken.getsockname()[1]}", connecting=2, joining=1)
        monkeypatch.setattr(cluster, "_PROBE", "raise ConnectionError('no token')")
        with pytest.raises(RunError, match=r"cannot join it .*ConnectionError: no token\). .*RAY_AUTH_MODE"):
            cluster.check_answers(f"127.0.0.1:{taken.getsockname()[1]}", connecting=2, joining=60)
    assert time.monotonic() - begun < 100
    with pytest.raises(ValueError, match=r"HOST:PORT or ray://HOST:PORT, got 'here'"):
        cluster.check_answers("here")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"address": "auto"}, "address and gpus belong to engine='ray'"),
        ({"engine": "dask"}, "engine must be one of local, ray"),
        ({"engine": "ray", "device": "cuda:1"}, "device is auto, cpu or cuda: got 'cuda:1'"),
        ({"logger": "tensorbord"}, "logger must be one of tensorboard, wandb, csv"),
        ({"jobs": 0}, "jobs must be a whole number of at least 1"),
    ],
)
def test_what_an_engine_does_not_take_is_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        sweep(tmp_path / "s", {"seed": [0]}, progress=False, **settings)
    assert not (tmp_path / "s").exists()
