"""Eigenvalues for the explorer, and the tables that hold them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resode.tables import csv_text

MOST = 50_000
"""Eigenvalues that a page takes: a browser draws them in some tens of milliseconds."""

COLUMNS = ("block", "step", "real", "imaginary")
_PROFILE = ("rightmost", "leftmost", "largest", "limiting_eigenvalue", "growth_eigenvalue")
_NAMES = {
    "real": ("real", "re", "real part"),
    "imaginary": ("imaginary", "imag", "im", "imaginary part"),
    "block": ("block", "name"),
    "step": ("step", "step_size", "eta", "η"),
}


@dataclass(frozen=True)
class NamedSpectrum:
    """Eigenvalues λ of one block.

    Args:
        name: of the block.
        step: its step size η > 0.
        eigenvalues: λ (1/time), not times the step.
    """

    name: str
    step: float
    eigenvalues: tuple[complex, ...]


def spectra_of(groups: Iterable[Any]) -> list[NamedSpectrum]:
    """The eigenvalues of every block, of the groups that `resode.analysis.steps.block_limits` gives."""
    return [
        NamedSpectrum(f"{group.name} block {number}", step, tuple((scaled / step).tolist()))
        for group in groups
        for number, (step, scaled) in enumerate(zip(group.steps, group.spectra, strict=True))
    ]


def spectra_text(spectra: Iterable[NamedSpectrum]) -> str:
    """The spectra as a table with the columns block, step, real and imaginary."""
    return csv_text(COLUMNS, ([s.name, s.step, z.real, z.imag] for s in spectra for z in s.eigenvalues))


def read_spectra(path: str | Path) -> list[NamedSpectrum]:
    r"""The eigenvalues of a table of comma-separated values.

    Args:
        path: a table with the columns real and imaginary, and block and step where there are several; two
            columns of numbers without a head; or the table of a depth profile, of whose blocks it holds the
            outer eigenvalues.

    Returns:
        A spectrum for every block, in the table's order.

    Raises:
        ValueError: no such table, or a cell that is no number; the message names the line.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "eigenvalues.csv").write_text("real,imaginary\n-1,2\n-1,-2\n")
        ...     read_spectra(Path(folder, "eigenvalues.csv"))
        [NamedSpectrum(name='eigenvalues', step=1.0, eigenvalues=((-1+2j), (-1-2j)))]
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: name a table of eigenvalues, or a run.")
    try:
        lines = _lines(path)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text: eigenvalues come as comma-separated values.") from None
    except csv.Error as error:
        raise ValueError(f"{path} is no table of comma-separated values: {error}.") from None
    if not lines:
        raise ValueError(f"{path} is empty: it must hold the columns real and imaginary.")
    head = [cell.strip().lower() for cell in lines[0][1]]
    if all(map(_is_number, head)) and len(head) == 2:
        head = ["real", "imaginary"]
    else:
        lines = lines[1:]
    places = {key: _place(head, names) for key, names in _NAMES.items()}
    found: dict[str, tuple[float, list[complex]]] = {}
    for line, cells in lines:
        if len(cells) != len(head):
            raise ValueError(f"{path} line {line}: {len(cells)} cells under {len(head)} columns.")
        where = f"{path} line {line}"
        name = path.stem if places["block"] is None else cells[places["block"]]
        step = 1.0 if places["step"] is None else _value(where, "step", cells[places["step"]])
        if step <= 0:
            raise ValueError(f"{where}: a step must be above 0, got {step:g}.")
        known = found.setdefault(name, (step, []))
        if known[0] != step:
            raise ValueError(
                f"{where}: block {name!r} has the steps {known[0]:g} and {step:g}; it can have one."
            )
        known[1].extend(_eigenvalues(where, head, cells, places))
    count = sum(len(values) for _, values in found.values())
    if not count:
        raise ValueError(f"{path} holds no eigenvalue.")
    if count > MOST:
        raise ValueError(
            f"{path} holds {count:,} eigenvalues, and a page takes {MOST:,}. Leave some blocks out."
        )
    return [NamedSpectrum(name, step, tuple(values)) for name, (step, values) in found.items() if values]


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """The rows that hold something, with the number of the line on which each ends."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        return [(reader.line_num, row) for row in reader if row]


def _place(head: Sequence[str], names: Sequence[str]) -> int | None:
    return next((head.index(name) for name in names if name in head), None)


def _eigenvalues(
    where: str, head: Sequence[str], cells: Sequence[str], places: dict[str, int | None]
) -> list[complex]:
    """What one row holds: one eigenvalue, or those of a block that a depth profile names."""
    re, im = places["real"], places["imaginary"]
    if re is not None and im is not None:
        return [complex(_value(where, "real", cells[re]), _value(where, "imaginary", cells[im]))]
    named = [name for name in _PROFILE if f"{name}_real" in head and f"{name}_imag" in head]
    if not named:
        raise ValueError(
            f"{where.rsplit(' line ', 1)[0]} has the columns {', '.join(head)}: eigenvalues need "
            "real and imaginary (and block and step where there are several)."
        )
    values = []
    for name in named:
        pair = [cells[head.index(f"{name}_{part}")] for part in ("real", "imag")]
        if not any(
            cell.strip().lower() in ("", "nan") for cell in pair
        ):  # that of a block without eigenvalues
            x, y = (_value(where, name, cell) for cell in pair)
            values += [complex(x, y), complex(x, -y)] if y else [complex(x, 0.0)]
    return list(dict.fromkeys(values))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _value(where: str, column: str, cell: str) -> float:
    if not _is_number(cell) or not math.isfinite(float(cell)):
        raise ValueError(f"{where}: {cell[:40]!r} in column {column} is no finite number.")
    return float(cell)
