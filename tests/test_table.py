"""The queue behind the published table: it goes on where it stopped, and stores what was measured alone."""

import csv

import pytest

from resode.training.loop import Interrupted
from tests.benchmarks import table
from theory import degradation


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


def test_what_is_stored_is_what_the_page_on_degradation_reads(tmp_path, monkeypatch):
    """The curves of one seed and the longest budget that all four have ended; other runs are kept apart."""
    stored, page = tmp_path / "errors.csv", tmp_path / "page.md"
    monkeypatch.setattr(table, "STORED", stored)
    monkeypatch.setattr(table, "PAGE", page)
    monkeypatch.setattr(degradation, "TABLE", tmp_path / "degradation.csv")
    page.write_text("Before.\n\n<!-- table -->\nold\n<!-- end of the table -->\n\nAfter.\n")
    out = tmp_path / "runs"
    for name in table.FIRST:
        for epochs, done in ((1, 1), (2, 2), (9, 3)):  # nine epochs have not ended
            about = {"run": f"{name}-e{epochs}-s0", "model": name, "seed": 0, "epochs": epochs}
            errors = {"train_error": 20.0 + epochs, "test_error": 30.0, "seconds": 1.0}
            out.mkdir(exist_ok=True)
            table.write(out / "errors.csv", [{**about, **errors, "epoch": e + 1} for e in range(done)])
    assert table.main(["--out", str(out), "--store"]) == 0
    found = degradation.read(degradation.TABLE)
    assert set(found) == set(table.FIRST) and found["plain56"]["train_error"] == [22.0, 22.0]
    text = page.read_text()
    assert text.startswith("Before.") and text.endswith("After.\n") and "old" not in text
    assert "| `plain20` | 20 | 269,722 |  | 30.00 | 2, 1 |" in text


def test_without_stored_curves_nothing_is_read(tmp_path):
    assert degradation.read(tmp_path / "none.csv") == {}
