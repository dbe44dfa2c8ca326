"""The table of stored training curves: what is written from runs is what the page reads."""

import pytest

from resode.training.folder import RunFolder
from theory import degradation


def test_table_from_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(degradation, "TABLE", tmp_path / "results" / "degradation.csv")
    monkeypatch.setattr(RunFolder, "read_config", lambda self: {"model": self.path.name})
    for name, accuracy in (("plain20", 0.9), ("resnet20", 0.95)):
        (tmp_path / name).mkdir()
        others = {"images_per_second": 100.0, "nfe": 0.0, "seconds": 1.0}
        rows = [
            {"epoch": e, "train_accuracy": accuracy, "test_accuracy": accuracy - 0.1 * e, **others}
            for e in (1, 2)
        ]
        RunFolder(tmp_path / name).write_metrics(rows)
    assert degradation.main([str(tmp_path / "plain20"), str(tmp_path / "resnet20")]) == 0
    found = degradation.read(degradation.TABLE)
    assert list(found) == ["plain20", "resnet20"]
    assert found["plain20"]["epoch"] == [1, 2]
    assert found["plain20"]["train_error"] == pytest.approx([10, 10])
    assert found["resnet20"]["test_error"] == pytest.approx([15, 25])


def test_without_a_table_nothing_is_measured(tmp_path, capsys):
    assert degradation.read(tmp_path / "none.csv") == {}
    assert degradation.main([]) == 2
    assert "name the run folders" in capsys.readouterr().err
