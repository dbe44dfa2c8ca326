"""The tables that the build writes into docs/_generated: the methods, and the claims' figures.

What the claims' pages compare is collected while sphinx-gallery runs them. A page that has not changed is
not run again, so each page's rows are kept.
"""

import csv
import io
import math
import os
import time
from pathlib import Path

import torch

import resode
from theory import table, verdict

OUT = Path(__file__).parent / "_generated"
_begun = 0.0


def collect(gallery_conf, page, when):
    """Called by sphinx-gallery around each page: keeps the rows of one that has run."""
    global _begun
    name = Path(page).stem
    kept = OUT / "claims" / f"{name}.csv"
    if when == "before":
        kept.unlink(missing_ok=True)
        verdict.LINES.clear()
        _begun = time.perf_counter()
        return
    torch.set_default_dtype(torch.float32)  # as each page finds it
    if name.startswith("plot_"):
        link = f":doc:`{name.split('_')[1].upper()} </gallery/{name}>`"
        rows = table.rows(link, verdict.LINES, time.perf_counter() - _begun)
        _write(kept, _csv([row[0], *map(_plain, row[1:])] for row in rows))


def write(app):
    """Called when the gallery has run: writes the tables that the pages include."""
    pages = sorted(path.stem for path in (Path(app.srcdir).parent / "theory").glob("plot_*.py"))
    kept = [path for name in pages if (path := OUT / "claims" / f"{name}.csv").exists()]
    _write(OUT / "claims.csv", "".join(path.read_text() for path in kept) or '"none has run"\n')
    size = "full" if os.environ["RESODE_FAST"] in ("", "0") else "small"
    _write(OUT / "size.txt", f"This table is of the pages' **{size}** size.\n")
    _write(OUT / "methods.csv", _csv(_methods()))


def _methods():
    yield "name", "order", "stages", "kind", "real", "imaginary", "source"
    for name, tableau in resode.METHODS.items():
        kind = "implicit" if not tableau.explicit else "fixed" if tableau.b_error is None else "adaptive"
        intervals = resode.real_stability_interval(name), resode.imaginary_stability_interval(name)
        shown = ("∞" if math.isinf(value) else f"{value:.6g}" for value in intervals)
        yield f"``{name}``", tableau.order, len(tableau.b), kind, *shown, _plain(tableau.source)


def _plain(text):
    """Text as RST that shows it."""
    return "".join(f"\\{c}" if c in "\\`*_|" else c for c in text)


def _csv(rows):
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def _write(path, text):
    """Leaves a file that has not changed as old as it is, so that Sphinx need not read its page again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
