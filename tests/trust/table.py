"""All rows together, as `tests/trust/test_public.py` and the campaign take them."""

from __future__ import annotations

import importlib
from pathlib import Path

from trust.rows import RECORDS, ROWS, Row
from trust.surface import places

for name in ("rows_solving", "rows_modules", "rows_networks", "rows_training"):
    importlib.import_module(f"trust.{name}")


ELSEWHERE = {
    "resode.explorer.": "test_explorer.py",
    "resode.networks.DeeplySupervisedNet": "test_comparators.py",
    "resode.networks.FitNet": "test_comparators.py",
    "resode.networks.Group": "test_architecture.py",
    "resode.networks.Maxout": "test_comparators.py",
    "resode.networks.NetworkInNetwork": "test_comparators.py",
    "resode.networks.architecture": "test_architecture.py",
    "resode.sweep": "test_sweep.py",
    "resode.training.sweep.": "test_sweep.py",
    "resode.training.callbacks.TrainerWatch": "test_going_on.py",
    "resode.training.loggers.": "test_going_on.py",
    "resode.training.monitor.Watch": "test_going_on.py",
    "resode.training.parent.": "test_going_on.py",
    "resode.training.processes.Interrupted": "test_sweep.py",
}
"""Names, or how they begin, that have no row and are tested in a file of their own."""


def missing() -> list[str]:
    """Public names without a row or a file of tests, or whose row is another's that does not exist."""
    wanted = places()
    tests = Path(__file__).parent.parent
    own = tuple(name for name, file in ELSEWHERE.items() if (tests / file).is_file())
    bare = [name for name in wanted if name not in ROWS and name not in RECORDS and not name.startswith(own)]
    return (
        bare
        + [name for name in {*ROWS, *RECORDS} if name not in wanted]
        + [f"{name}: no row {by}" for name, by in RECORDS.items() if by not in ROWS]
    )


def rows(slow: bool = True) -> list[Row]:
    return [row for row in ROWS.values() if slow or not row.slow]
