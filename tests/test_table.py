"""The queue behind the published table: it goes on where it stopped, and stores what was measured alone."""

import csv

import pytest

from resode.training.loop import Interrupted
from tests.benchmarks import table


@pytest.fixture
def tiny(monkeypatch):
    entry = table.Entry("tiny", "resnet8", 8, 12.5, {"width": 4})
    monkeypatch.setattr(table, "TABLE", [entry])
    monkeypatch.setattr(table, "FIRST", ("tiny",))


def run(folder, *more):
    said = []
    arguments = ["--data", "digits", "--out", str(folder), "--epochs", "2", "--clean-images", "100", *more]
    assert table.main(arguments, said.append) == 0
    return said, list(csv.DictReader((folder / "errors.csv").read_text().splitlines()))


def test_a_stopped_queue_goes_on_to_the_same_errors(tiny, tmp_path, monkeypatch):
    said, whole = run(tmp_path / "whole")
    assert said[0].startswith("tiny-e2-s0: training error") and [row["epoch"] for row in whole] == ["1", "2"]
    assert run(tmp_path / "whole")[0] == ["tiny-e2-s0: was finished"]

    after, updates = table.Errors.after_update, []

    def stop(self, loop):
        after(self, loop)
        updates.append(1)
        if len(updates) == 18:  # in the second epoch, of 12 updates
            loop.save()
            raise Interrupted("stopped", 15)

    monkeypatch.setattr(table.Errors, "after_update", stop)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts")
    monkeypatch.setattr(table.Errors, "after_update", after)
    _, parts = run(tmp_path / "parts")
    for a, b in zip(whole, parts, strict=True):
        assert {**a, "seconds": ""} == {**b, "seconds": ""}


def test_errors_are_those_of_the_images_as_they_are(tiny, tmp_path):
    """The stored test error is the run's own; the training error is not that of the augmented images."""
    _, rows = run(tmp_path)
    metrics = list(csv.DictReader((tmp_path / "tiny-e2-s0" / "metrics.csv").read_text().splitlines()))
    for row, epoch in zip(rows, metrics, strict=True):
        assert float(row["test_error"]) == pytest.approx(100 - 100 * float(epoch["test_accuracy"]), abs=1e-3)


def test_the_table_says_what_was_not_measured():
    row = {"model": "resnet20", "epochs": "10", "epoch": "10", "test_error": "17.0"}
    rows = [row, {**row, "test_error": "18.0"}, {**row, "epochs": "3", "epoch": "3", "test_error": "30"}]
    rows.append({**row, "model": "resnet32", "epoch": "9"})  # did not end
    text = {line.split("`")[1]: line for line in table.lines(rows) if "`" in line}
    assert text["resnet20"] == "| `resnet20` | 20 | 269,722 | 8.75 | 17.50 ± 0.71 | 10, 2 |"
    assert "not measured | `--only resnet32` |" in text["resnet32"]
    assert [e.published for e in table.TABLE if e.published] == [
        9.38, 8.81, 8.22, 8.39, 7.54, 8.75, 7.51, 7.17, 6.97, 6.43, 7.93
    ]  # fmt: skip


def test_the_page_has_the_stored_table():
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.placed(page, table.lines(table.read(table.STORED))) == page


def test_the_curves_are_trained_first_and_then_the_cheapest():
    names = [entry.name for entry in table.queue()]
    assert names[:4] == ["plain20", "plain56", "resnet20", "resnet56"] and names[-1] == "maxout"
    assert "resnet110" not in names and len(names) == len(set(names)) == len(table.TABLE) - 2
