"""What every result does at a prompt and in a notebook: short repr, text as HTML, table as a data frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from html import escape
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch

_WIDE = 16
"""Entries of a state up to which each is a column of its own."""

_LINE = 120
"""Characters of a result's repr."""

_SHOWN = 20
"""Rows of a table in a notebook."""


class Result:
    """A dataclass that a function of the library returns.

    Its frame has a row for each of `rows`, where it has them, or for each entry of the first dimension of
    its tensors and lists; numbers that belong to all of them stand in every row.
    """

    _columns: ClassVar[tuple[str, ...]] = ()
    """The fields that make the frame; all that are as long as the first one that is long, where empty."""

    def __repr__(self) -> str:
        kind = type(self)
        if kind.__str__ is not object.__str__:
            line = self._headline()
            return f"<{kind.__name__}: {line if len(line) <= _LINE else line[: _LINE - 1] + '…'}>"
        parts = (f"{f.name}={_brief(getattr(self, f.name))}" for f in fields(self) if f.repr)  # type: ignore[arg-type]
        return f"{kind.__name__}({', '.join(parts)})"

    def _headline(self) -> str:
        """What a prompt shows of a result that has a text."""
        return next(iter(str(self).splitlines()), "").strip()

    def _repr_html_(self) -> str:
        """Its text where it has one, else its table: what a notebook shows."""
        if type(self).__str__ is not object.__str__:
            return f'<div style="overflow-x:auto"><pre>{escape(str(self))}</pre></div>'
        table = self._table()
        rows = list(zip(*table.values(), strict=True))
        head = "".join(f"<th>{escape(name)}</th>" for name in table)
        cells = ("".join(f"<td>{escape(_brief(cell))}</td>" for cell in row) for row in rows[:_SHOWN])
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        more = f"<p>… {len(rows) - _SHOWN} more rows</p>" if len(rows) > _SHOWN else ""
        return f'<div style="overflow-x:auto"><table><tr>{head}</tr>{body}</table>{more}</div>'

    def to_dataframe(self) -> Any:
        """Its table as a pandas DataFrame, pandas being imported only now.

        Returns:
            DataFrame: a row a block, solver, sample, time or whatever the result is a list of.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ModuleNotFoundError as error:
            instead = "to_csv writes the same table" if hasattr(self, "to_csv") else "the fields hold it all"
            raise ModuleNotFoundError(
                f"to_dataframe needs {error.name}: pip install pandas. Without it, {instead}.",
                name=error.name,
            ) from None
        return pandas.DataFrame(self._table())

    def _table(self) -> dict[str, list[Any]]:
        """Columns of equal length."""
        rows = getattr(self, "rows", None)
        if rows is not None:
            return _of_records(rows)
        names = self._columns or tuple(f.name for f in fields(self))  # type: ignore[arg-type]
        columns: dict[str, Any] = {}
        for name in names:
            columns |= _parts(name, _plain(getattr(self, name)))
        length = next((len(c) for c in columns.values() if isinstance(c, list)), 1)
        return {
            name: column if isinstance(column, list) else [column] * length
            for name, column in columns.items()
            if not isinstance(column, list) or len(column) == length
        }


def _of_records(records: Sequence[Any]) -> dict[str, list[Any]]:
    """A column a field; of a field that is a dataclass itself, one for each of its fields."""
    columns: dict[str, list[Any]] = {}
    for number, record in enumerate(records):
        cells: dict[str, Any] = {}
        for f in fields(record):
            value = _plain(getattr(record, f.name))
            if isinstance(value, list | tuple) and any(is_dataclass(part) for part in value):
                continue  # records of its own
            if is_dataclass(value):
                cells |= {f"{f.name}_{g.name}": _plain(getattr(value, g.name)) for g in fields(value)}
            else:
                cells[f.name] = value
        for name in {**columns, **cells}:  # what is None in one record may be several numbers in the next
            columns.setdefault(name, [None] * number).append(cells.get(name))
    return columns


def _plain(value: Any) -> Any:
    """Tensors as arrays, arrays of no dimension as numbers."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().resolve_conj().resolve_neg()
        value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _parts(name: str, value: Any) -> dict[str, Any]:
    """A field as columns: lists where it holds one entry a row, else the one value of all rows."""
    if isinstance(value, np.ndarray):
        flat = value.reshape(len(value), -1) if value.size else value.reshape(len(value), 0)
        if value.ndim == 1:
            return {name: value.tolist()}
        if flat.shape[1] <= _WIDE:
            return {f"{name}_{i}": flat[:, i].tolist() for i in range(flat.shape[1])}
        return {name: list(value)}
    if isinstance(value, tuple | list):
        parts = [_plain(part) for part in value]
        if parts and all(isinstance(part, np.ndarray) for part in parts):  # a state of several tensors
            return {k: v for i, part in enumerate(parts) for k, v in _parts(f"{name}{i}", part).items()}
        return {name: parts}
    return {} if is_dataclass(value) or isinstance(value, dict) else {name: value}


def _brief(value: Any) -> str:
    """A field in short: numbers to six digits, tensors as their shape, long lists as their length."""
    value = _plain(value)
    if isinstance(value, np.ndarray):
        return f"<{value.dtype} of shape {value.shape}>"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, complex):
        return f"{value:.6g}"
    if isinstance(value, list | tuple) and (len(value) > 6 or any(is_dataclass(v) for v in value)):
        return f"<{len(value)} of {type(value[0]).__name__}>" if value else repr(value)
    if isinstance(value, list | tuple):
        ends = "[]" if isinstance(value, list) else "()"
        return f"{ends[0]}{', '.join(map(_brief, value))}{ends[1]}"
    text = repr(value)
    return text if len(text) <= 60 and " object at 0x" not in text else f"<{type(value).__name__}>"
