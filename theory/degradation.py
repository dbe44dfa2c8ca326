"""The training curves that the page on degradation reads; `python -m tests.benchmarks.table` stores them.

The table has one row a model and epoch, with errors in percent, in evaluation mode: of training images as
they are, and of the test images.
"""

from __future__ import annotations

import csv
from pathlib import Path

TABLE = Path(__file__).parents[1] / "docs" / "results" / "degradation.csv"
COLUMNS = ("model", "epoch", "train_error", "test_error")


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
