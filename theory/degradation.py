"""Collect the training curves that the page on degradation reads: `python -m theory.degradation RUN …`.

Every RUN is a finished run folder of `resode train`. The table gets one row a model and epoch, with errors in
percent: of the training images as they were met (augmented, while the network still changed), and of the test
images after the epoch.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from resode.training.folder import RunFolder

TABLE = Path(__file__).parents[1] / "docs" / "results" / "degradation.csv"
COLUMNS = ("model", "epoch", "train_error", "test_error")


def curves(run: Path) -> list[tuple[str, int, float, float]]:
    """The rows of one run."""
    folder = RunFolder(run)
    metrics, model = folder.read_metrics(), str(folder.read_config()["model"])
    columns = zip(metrics["epoch"], metrics["train_accuracy"], metrics["test_accuracy"], strict=True)
    return [(model, int(e), round(100 - 100 * a, 3), round(100 - 100 * b, 3)) for e, a, b in columns]


def read(path: Path = TABLE) -> dict[str, dict[str, list[float]]]:
    """The stored columns of every model; {} where there is no table."""
    if not path.exists():
        return {}
    models: dict[str, dict[str, list[float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            columns = models.setdefault(row["model"], {name: [] for name in COLUMNS[1:]})
            for name, values in columns.items():
                values.append(float(row[name]))
    return models


def main(runs: list[str]) -> int:
    """The command."""
    if not runs:
        print("error: name the run folders: python -m theory.degradation RUN …", file=sys.stderr)
        return 2
    rows = [row for run in runs for row in curves(Path(run))]
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(rows)
    print(f"{len(rows)} rows of {len(runs)} runs in {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
