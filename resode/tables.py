"""Tables: comma-separated values written and read, numbers in short, columns of plain text."""

from __future__ import annotations

import csv
import io
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

Row = TypeVar("Row")


def short(value: float, digits: int = 3) -> str:
    """A real number in a table's cell; '-' where there is none.

    Example:
        >>> short(0.12345), short(float("nan")), short(float("inf"))
        ('0.123', '-', '∞')
    """
    return "-" if math.isnan(value) else "∞" if value == math.inf else f"{value:.{digits}g}"


def short_complex(value: complex, digits: int = 4) -> str:
    """A number, or a pair of conjugate ones; '-' where there is none.

    Example:
        >>> short_complex(-2), short_complex(0.5 - 3j)
        ('-2', '0.5 ± 3i')
    """
    value = complex(value)
    return short(value.real, digits) + (f" ± {abs(value.imag):.{digits}g}i" if value.imag else "")


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first names with commas between them, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def printable(text: str) -> str:
    r"""Text as a terminal may have it: characters that steer one are written out.

    Names of classes and files are others' words, and an escape sequence in them could clear the screen, set
    its title or hide what follows.

    Example:
        >>> print(printable("cat\x1b[2J"))
        cat\x1b[2J
    """
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in _STEERING else ascii(char)[1:-1]
        for char in text
    )


_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control and format characters (text direction too), halves, and separators."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What spreadsheets take for the start of a formula; see OWASP's "CSV injection"."""


def _cell(value: Any) -> Any:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, str) and value.startswith(_FORMULA) and not _is_number(value):
        return "'" + value
    return "" if value is None else value


def _is_number(text: str) -> bool:
    try:
        complex(text)
    except ValueError:
        return False
    return True


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    r"""A table as comma-separated values, numbers to the last digit; what is None stays empty.

    Shapes are written 3x8x8; text that a spreadsheet would take for a formula gets an apostrophe before it.

    Example:
        >>> csv_text(["step", "limit"], [[1, 0.5], [2, None]])
        'step,limit\n1,0.5\n2,\n'
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(map(_cell, columns))
    table.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def records_text(kind: type, records: Iterable[Any]) -> str:
    """Dataclass objects as comma-separated values, under the fields' names, complex ones' _real and _imag."""
    columns: dict[str, tuple[str, str]] = {}
    for field in fields(kind):
        parts = ("real", "imag") if field.type in (complex, "complex") else ("",)
        columns |= {f"{field.name}_{part}".rstrip("_"): (field.name, part) for part in parts}
    cells = list(columns.values())
    rows = ([_part(getattr(record, name), part) for name, part in cells] for record in records)
    return csv_text(list(columns), rows)


def _part(value: Any, part: str) -> Any:
    return getattr(complex(value), part) if part else value


def read_csv(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns' names of a table, and its rows by them; a ValueError where rows are of several lengths."""
    with open(path, newline="", encoding="utf-8") as file:
        try:
            columns, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
        except csv.Error as error:
            raise ValueError(str(error)) from error
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns):
            raise ValueError(f"row {number} has {len(row)} cells under {len(columns)} columns")
    return columns, [dict(zip(columns, row, strict=True)) for row in rows]


def read_records(kind: type[Row], path: str | Path, added: Mapping[str, Any] | None = None) -> list[Row]:
    """What `records_text` wrote, as objects again; fields are str, int, float, bool, or these or None.

    Other columns, or a cell that is none of its column, are a ValueError; older files may lack all `added`.
    """
    hints, names = get_type_hints(kind), [field.name for field in fields(kind)]  # type: ignore[arg-type]
    columns, rows = read_csv(path)
    added = added or {}
    if columns not in (names, [name for name in names if name not in added]):
        raise ValueError(f"its columns must be {', '.join(names)}, and are {', '.join(columns) or 'none'}")
    found = []
    for number, row in enumerate(rows, 1):
        try:
            values = {name: _value(text, hints[name]) for name, text in row.items()}
            found.append(kind(**{**added, **values}))
        except (KeyError, ValueError) as error:
            raise ValueError(f"row {number}: {', '.join(row.values())} ({error})") from None
    return found


def _value(text: str, hint: Any) -> Any:
    kinds = get_args(hint) or (hint,)
    if not text and NoneType in kinds:
        return None
    kind = kinds[0]
    if kind is str and text.startswith(tuple("'" + start for start in _FORMULA)):
        return text[1:]
    return {"True": True, "False": False}[text] if kind is bool else kind(text)


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    r"""Lines of text: the first `words` columns flush left, the others flush right.

    Example:
        >>> print("\n".join(plain_table(["solver", "order"], [["euler", "1"], ["rk4", "4"]])))
        solver  order
        euler       1
        rk4         4
    """
    table = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < words else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
