"""A fault at each of a run's writes: the error is told, no half file takes a name, and the run can go on."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from pathlib import Path

import children
import pytest
import torch
from safetensors.torch import load_file

from resode.training.compare import compare
from resode.training.files import RunError
from resode.training.folder import RunFolder
from resode.training.run import train

FAULTS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "input/output": errno.EIO, "quota": errno.EDQUOT}
CALLS = {"open": (tempfile, "mkstemp"), "sync": (os, "fsync"), "move": (os, "replace")}
EXAMPLES = min(int(os.environ.get("TRUST_EXAMPLES", "1")), 10)


@pytest.fixture(autouse=True)
def blank_curves(monkeypatch):
    from resode import plots

    monkeypatch.setattr(plots, "training_curves", lambda metrics, path: Path(path).write_bytes(b""))


def small_run(path: Path, **settings):
    return train(children.Small, "digits", "smoke", run_dir=path, epochs=2, progress=False, **settings)


class Failing:
    """The n-th call of a function fails as the system would; n = 0 only counts."""

    def __init__(self, monkeypatch, call: str, number: int, code: int) -> None:
        self.module, self.name = CALLS[call]
        self.own, self.number, self.code, self.calls = getattr(self.module, self.name), number, code, 0
        monkeypatch.setattr(self.module, self.name, self)

    def __call__(self, *arguments, **named):
        self.calls += 1
        if self.calls == self.number:
            raise OSError(self.code, os.strerror(self.code))
        return self.own(*arguments, **named)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run, and how often it makes each call."""
    with pytest.MonkeyPatch.context() as patch:
        from resode import plots

        patch.setattr(plots, "training_curves", lambda metrics, path: Path(path).write_bytes(b""))
        counters = {call: Failing(patch, call, 0, 0) for call in CALLS}
        run = small_run(tmp_path_factory.mktemp("whole") / "run")
    return run, {call: counter.calls for call, counter in counters.items()}


def places(most: int) -> list[float]:
    """Where in a run to fail: all over it."""
    return [(i + 0.5) / most for i in range(most)]


@pytest.mark.parametrize("fault", list(FAULTS)[: 1 if EXAMPLES == 1 else None])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("place", places(EXAMPLES))
def test_a_fault_at_a_write_loses_nothing(tmp_path, whole, call, fault, place, monkeypatch):
    run, counted = whole
    assert counted[call] > 5
    number = 1 + int(place * counted[call])
    with monkeypatch.context() as patch:
        failing = Failing(patch, call, number, FAULTS[fault])
        try:
            small_run(tmp_path / "run")
        except RunError as error:
            assert os.strerror(FAULTS[fault]) in str(error), "the message says what the system said"
        assert failing.calls >= number, "the fault was met"
    left = (
        [path.name for path in (tmp_path / "run").rglob(".*") if path.is_file()]
        if (tmp_path / "run").exists()
        else []
    )
    assert set(left) <= {".lock"}
    begun = (tmp_path / "run" / "config.yaml").exists()
    if begun:
        train(children.Small, resume=tmp_path / "run", progress=False)
    else:
        small_run(tmp_path / "run")
    one, two = (load_file(path / "weights.safetensors") for path in (run.path, tmp_path / "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert compare([tmp_path / "run"]).rows[0].epoch == 2


@pytest.mark.parametrize("back", [-3600.0, -1e9])
def test_a_clock_that_goes_back_changes_no_figure_but_the_times(tmp_path, whole, back, monkeypatch):
    begun = time.time()
    own = time.time
    monkeypatch.setattr(time, "time", lambda: own() + (back if own() > begun + 0.05 else 0))
    run = small_run(tmp_path / "run")
    timed = ("seconds", "images_per_second")
    for name, column in whole[0].metrics.items():
        if name not in timed and "seconds" not in name:
            assert column == run.metrics[name], name
    assert all(value >= 0 for value in run.metrics["seconds"])


@pytest.mark.parametrize(
    "name", ["checkpoints/last.safetensors", "metrics.csv", "summary.json", "config.yaml"]
)
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
def test_a_damaged_file_is_named_or_healed(tmp_path, whole, name, damage):
    """No figure of a damaged folder is taken for a sound one's."""
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(whole[0].path, folder)
    file = folder / name
    content = file.read_bytes()
    half = len(content) // 2
    if damage == "gone":
        file.unlink()
    else:
        flipped = content[:half] + bytes([content[half] ^ 0x01]) + content[half + 1 :]
        file.write_bytes({"cut": content[:half], "flipped": flipped, "empty": b""}[damage])
    try:
        (found,) = compare([folder]).rows
        sound = found.test_error is None or found.test_error.mean == pytest.approx(
            1 - whole[0].metrics["test_accuracy"][-1]
        )
        assert sound, "a figure that the run never measured"
    except RunError as error:
        assert str(folder) in str(error)
    try:
        RunFolder(folder).read_checkpoint()
    except RunError as error:
        assert "Train again" in str(error) or str(folder) in str(error)
