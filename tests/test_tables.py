"""Tables that come back as they were written, and what is refused."""

import math
from dataclasses import dataclass

import pytest

from resode.tables import csv_text, read_csv, read_records, records_text, short, short_complex


@dataclass(frozen=True)
class Row:
    name: str
    count: int
    value: float
    maybe: float | None
    good: bool


ROWS = [Row('a, "b"', 3, 0.1 + 0.2, None, True), Row("η", 2**60, math.inf, 1e-300, False)]


def test_records_come_back_to_the_last_digit(tmp_path):
    (tmp_path / "t.csv").write_text(records_text(Row, ROWS), encoding="utf-8")
    assert read_records(Row, tmp_path / "t.csv") == ROWS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "are none"),
        ("name,count\nx,1\n", "are name, count"),
        ("name,count,value,maybe,good\nx,1.5,0,,True\n", r"row 1: x, 1\.5"),
        ("name,count,value,maybe,good\nx,1,0,,yes\n", "row 1"),
        ("name,count,value,maybe,good\nx,1,0\n", "row 1 has 3 cells under 5 columns"),
        ("name,count,value,maybe,good\nx,,0,,True\n", "row 1"),
    ],
)
def test_other_tables_are_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(Row, tmp_path / "t.csv")


def test_cells_and_blank_lines(tmp_path):
    (tmp_path / "t.csv").write_text(csv_text(["shape", "x"], [[(3, 8, 8), None]]) + "\n\n")
    assert read_csv(tmp_path / "t.csv") == (["shape", "x"], [{"shape": "3x8x8", "x": ""}])


def test_numbers_in_short():
    assert [short(math.nan), short(-math.inf), short(12345.6)] == ["-", "-inf", "1.23e+04"]
    assert [short_complex(complex(math.nan)), short_complex(1 - 2j, 2)] == ["-", "1 ± 2i"]
