"""All rows together, as `tests/trust/test_public.py` and the campaign take them."""

from __future__ import annotations

import importlib

from trust.rows import RECORDS, ROWS, Row
from trust.surface import places

for name in ("rows_solving", "rows_modules", "rows_networks", "rows_training"):
    importlib.import_module(f"trust.{name}")


def missing() -> list[str]:
    """Public names without a row, or whose row is another's that does not exist."""
    wanted = places()
    bare = [name for name in wanted if name not in ROWS and name not in RECORDS]
    return (
        bare
        + [name for name in {*ROWS, *RECORDS} if name not in wanted]
        + [f"{name}: no row {by}" for name, by in RECORDS.items() if by not in ROWS]
    )


def rows(slow: bool = True) -> list[Row]:
    return [row for row in ROWS.values() if slow or not row.slow]
