"""Several runs side by side: predicted means and spreads, and runs that have not finished."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from resode.cli import app
from resode.tables import read_csv
from resode.training.compare import compare
from resode.training.files import DamagedFile, SettingsError
from resode.training.folder import FORMAT, Checkpoint, NoSuchRun, RunFolder
from resode.training.recipe import make_recipe


def write_run(
    path: Path,
    errors: list[float],
    *,
    model: str = "odenet20",
    options: dict | None = None,
    recipe: str = "smoke",
    finished: bool = True,
    record: dict | None = None,
    rate: list[float] | None = None,
    **settings,
) -> Path:
    """A run folder with these test errors by epoch; its training error is half of them."""
    resolved = make_recipe(recipe, **settings)
    folder = RunFolder.create(path)
    own = {
        "own_model": False,
        "title": "digits (scikit-learn)",
        "train_images": 1437,
        "test_images": 360,
        "parameters": 269_434,
        "device": "cpu",
        "threads": 1,
    }
    folder.write_config(
        {
            "format": FORMAT,
            "model": model,
            "model_options": options or {},
            "recipe": recipe,
            **asdict(resolved),
            "milestones": list(resolved.milestones),
            "record": own | (record or {}),
        }
    )
    rows = [
        {
            "epoch": number,
            "train_accuracy": 1 - error / 2,
            "test_accuracy": 1 - error,
            "images_per_second": (rate or [100.0] * len(errors))[number - 1],
            "nfe": 7.0,
            "seconds": 10.0 * number,
        }
        for number, error in enumerate(errors, start=1)
    ]
    if rows:
        folder.write_metrics(rows)
    if finished:
        folder.write_summary({"epochs": len(rows)})
    return path


def resode(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_runs_that_differ_in_their_seed_alone_are_one_row(tmp_path):
    """0.1, 0.2 and 0.3: mean 0.2, sample deviation 0.1; the last epoch, not the best one."""
    runs = [
        write_run(tmp_path / str(seed), [0.05, error], seed=seed, rate=[100.0, 300.0])
        for seed, error in enumerate((0.1, 0.2, 0.3))
    ]
    (row,) = compare(runs).rows
    assert (row.name, row.epoch, row.parameters, len(row.counted)) == ("odenet20", 2, 269_434, 3)
    assert row.test_error is not None and row.train_error is not None and row.images_per_second is not None
    assert (row.test_error.mean, row.test_error.std) == (pytest.approx(0.2), pytest.approx(0.1))
    assert (row.train_error.mean, row.train_error.std) == (pytest.approx(0.1), pytest.approx(0.05))
    assert row.seconds is not None and row.seconds.mean == 20
    assert row.images_per_second.mean == pytest.approx(150), "as many images at 100/s as at 300/s"
    assert row.nfe is not None and row.nfe.mean == 7


def test_a_default_spelt_out_is_the_same_configuration(tmp_path):
    runs = [
        write_run(tmp_path / "a", [0.1], seed=0),
        write_run(tmp_path / "b", [0.2], seed=1, options={"solver": "euler"}),
        write_run(tmp_path / "c", [0.2], seed=2, options={"solver": "rk4"}),
    ]
    assert [(row.name, len(row.runs)) for row in compare(runs).rows] == [
        ("odenet20, solver euler", 2),
        ("odenet20, solver rk4", 1),
    ]


def test_names_say_what_differs_and_no_more(tmp_path):
    """paper and fast differ in many settings: their names stand for them."""
    runs = [
        write_run(tmp_path / "a", [0.1], model="resnet20", recipe="fast"),
        write_run(tmp_path / "b", [0.1], model="resnet20", recipe="fast", lr=0.1),
        write_run(tmp_path / "c", [0.1], model="resnet20", recipe="paper"),
        write_run(tmp_path / "d", [0.1], model="plain20", recipe="paper"),
        write_run(tmp_path / "e", [0.1], model="plain20", recipe="paper", record={"title": "CIFAR-10"}),
    ]
    digits = "digits (scikit-learn)"
    assert [row.name for row in compare(runs).rows] == [
        f"resnet20, recipe fast, {digits}, lr 0.2",
        f"resnet20, recipe fast, {digits}, lr 0.1",
        f"resnet20, recipe paper, {digits}",
        f"plain20, recipe paper, {digits}",
        "plain20, recipe paper, CIFAR-10",
    ]


def test_an_unfinished_run_is_named_and_kept_out_of_the_mean(tmp_path):
    runs = [
        write_run(tmp_path / "done", [0.5, 0.1], seed=0),
        write_run(tmp_path / "half", [0.5], seed=1, finished=False),
        write_run(tmp_path / "three", [0.6, 0.4, 0.2], seed=0, epochs=5, finished=False),
        write_run(tmp_path / "two", [0.6, 0.2], seed=1, epochs=5, finished=False),
        write_run(tmp_path / "begun", [], seed=0, epochs=9, finished=False),
    ]
    found = compare(runs)
    done, running, begun = found.rows
    assert done.test_error is not None and (done.test_error.mean, done.test_error.std) == (
        pytest.approx(0.1),
        None,
    )
    assert running.epoch == 2, "the last epoch that both have"
    assert running.test_error is not None and running.test_error.mean == pytest.approx(0.3)
    assert running.test_error.std == pytest.approx(0.2 / sqrt(2))
    assert (begun.epoch, begun.test_error) == (0, None)
    assert [note.removeprefix(str(tmp_path)) for note in found.notes] == [
        "/half has not finished: it has done 1 of 2 epochs and is not in the table.",
        "/three has not finished: it has done 3 of 5 epochs.",
        "/two has not finished: it has done 2 of 5 epochs.",
        "/begun has not finished: it has done 0 of 9 epochs and is not in the table.",
    ]


def test_what_makes_a_spread_or_seconds_doubtful_is_said(tmp_path):
    runs = [
        write_run(tmp_path / "a", [0.1], seed=3),
        write_run(tmp_path / "b", [0.1], seed=3, record={"threads": 2}),
    ]
    twice, devices = compare(runs).notes
    assert "seed 3 more than once" in twice
    assert "cpu with 1 thread; cpu with 2 threads" in devices


def test_the_command_prints_a_table_and_writes_both_files(tmp_path):
    runs = [write_run(tmp_path / f"r{seed}", [0.4, e], seed=seed) for seed, e in enumerate((0.1, 0.2))]
    runs.append(write_run(tmp_path / "rk4", [0.3, 0.25], options={"solver": "rk4"}, rate=[1e3, 1e3]))
    result = resode("compare", *runs, "--out", tmp_path / "new" / "folder")
    assert result.exit_code == 0, result.output
    table = [re.split(r"\s{2,}", line) for line in result.output.splitlines()]
    assert table[0][4:6] == ["test err %", "train err %"]
    euler = ["2", "2", "269,434", "15.00 ± 7.07", "7.50 ± 3.54", "20", "100", "7"]
    assert table[1] == ["odenet20, solver euler", *euler]
    assert table[2][4:] == ["25.00", "12.50", "20", "1,000", "7"]
    stored = list(csv.DictReader((tmp_path / "new" / "folder" / "compare.csv").read_text().splitlines()))
    assert float(stored[0]["test_error"]) == pytest.approx(0.15)
    assert float(stored[0]["test_error_std"]) == pytest.approx(0.1 / sqrt(2))
    assert stored[1]["test_error_std"] == "" and stored[1]["configuration"] == "odenet20, solver rk4"
    assert (tmp_path / "new" / "folder" / "compare.png").stat().st_size > 10_000


def test_one_colour_a_configuration_and_a_line_a_run(tmp_path):
    runs = [write_run(tmp_path / f"r{seed}", [0.4, e], seed=seed) for seed, e in enumerate((0.1, 0.2))]
    runs.append(write_run(tmp_path / "rk4", [0.3], options={"solver": "rk4"}, finished=False))
    runs.append(write_run(tmp_path / "new", [], options={"solver": "heun2"}, finished=False))
    figure = compare(runs).plot()
    lines = figure.axes[0].get_lines()
    assert len(lines) == 2 * (2 + 1) + 2, "test and training: two runs and their mean, one run, no epoch yet"
    assert len({line.get_color() for line in lines}) == 2
    assert list(lines[2].get_ydata()) == pytest.approx([40, 15])


def test_bad_input_is_named(tmp_path):
    run = write_run(tmp_path / "run", [0.1])
    cases = [
        ([run, tmp_path / "." / "run"], 2, "is given more than once"),
        ([run, tmp_path / "none"], 2, f"no run {tmp_path / 'none'}: it does not exist. Runs nearby"),
        ([run, run / "config.yaml"], 2, "is a file, not a run folder"),
        ([], 2, "Missing argument 'RUN...'"),
        ([run, "--out", run / "config.yaml"], 2, "config.yaml cannot be written: File exists"),
    ]
    for arguments, code, words in cases:
        result = resode("compare", *arguments)
        assert (result.exit_code, words in result.output) == (code, True), result.output
    with pytest.raises(ValueError, match=r"at least one run folder"):
        compare([])
    with pytest.raises(ValueError, match=r"several runs, got one path"):
        compare(str(run))
    with pytest.raises(NoSuchRun):
        compare([tmp_path])
    text = (run / "config.yaml").read_text()
    for old, new in (("lr: 0.1", "lr: -1"), ("model: odenet20", "modell: odenet20")):
        assert old in text
        (run / "config.yaml").write_text(text.replace(old, new))
        with pytest.raises(SettingsError, match=r"config.yaml was changed after the run wrote it"):
            compare([run])
        older = re.sub(r"\nchecksum: \w+", "", text.replace(old, new))  # of a resode that wrote none
        (run / "config.yaml").write_text(older)
        with pytest.raises(DamagedFile, match=r"does not hold a run's settings"):
            compare([run])


def _damaged(content: bytes, random: Random) -> Iterator[bytes]:
    """Cut short at random, with one bit flipped, and empty."""
    for _ in range(12):
        yield content[: random.randrange(len(content))]
        place, bit = random.randrange(len(content)), 1 << random.randrange(8)
        yield content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
    yield b""


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", ["metrics.csv", "config.yaml", "summary.json"])
def test_damaged_files_are_never_other_figures(tmp_path, name, finished):
    """Named and left out, or, where a bit was flipped in a comment or an unused word, the same figures."""
    other, whole = write_run(tmp_path / "other", [0.3] * 4), write_run(tmp_path / "run", [0.5, 0.4, 0.2, 0.1])
    if not finished:
        folder = RunFolder.open(whole)
        rows = [{key: float(v) for key, v in row.items()} for row in read_csv(whole / "metrics.csv")[1]]
        settings = {key: value for key, value in folder.read_config().items() if key != "record"}
        folder.write_metrics(rows)
        folder.write_checkpoint(Checkpoint({}, {"rows": rows, "settings": settings}))
        (whole / "summary.json").unlink()
    before = compare([other, whole])
    if not (whole / name).exists():
        return
    content = (whole / name).read_bytes()
    for damaged in _damaged(content, Random(5)):
        (whole / name).write_bytes(damaged)
        found = compare([other, whole])
        if found.rows != before.rows:
            assert found.rows == compare([other]).rows and found.notes[0].startswith("A run is left out: ")
            assert str(whole) in found.notes[0]
            result = resode("compare", whole)
            assert result.exit_code in (1, 2) and "error: " in result.output, result.output
        assert found.rows != before.rows or name != "metrics.csv", damaged
    (whole / name).write_bytes(content)
    assert compare([other, whole]) == before
