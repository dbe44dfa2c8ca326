"""Run the claims' pages and print one table: `python -m theory [ID …]`; RESODE_FAST=1 takes their small size.

Exit codes: 0 where every claim holds, 1 where one does not, 2 for a name that no page has.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import runpy
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

from rich.console import Console
from rich.table import Table

from theory import verdict

PAGES = {path.stem.split("_")[1].upper(): path for path in sorted(Path(__file__).parent.glob("plot_*_*.py"))}
"""Claim to page: A1 … C8."""


def run(path: Path, show: bool) -> tuple[str, float]:
    """Runs a page: "holds" or what went wrong, and its seconds; its figures are closed again."""
    import matplotlib.pyplot as plt

    verdict.LINES.clear()
    begun = time.perf_counter()
    said = io.StringIO()
    try:
        with contextlib.nullcontext() if show else contextlib.redirect_stdout(said):
            runpy.run_path(str(path), run_name="__page__")
        result = "holds" if verdict.LINES else "compares nothing"
    except (verdict.Disagreement, verdict.MissingResult) as error:
        result = str(error)
    except Exception:
        result = traceback.format_exc(limit=-3)
    finally:
        plt.close("all")
    return result, time.perf_counter() - begun


def chosen(names: list[str]) -> list[str]:
    """The claims called so; all of them where none is named."""
    for name in names:
        if name.upper() not in PAGES:
            valid = ", ".join(f"{claim} ({path.stem})" for claim, path in PAGES.items())
            print(f"error: no claim {name!r}. Valid: {valid}.", file=sys.stderr)
            raise SystemExit(2)
    return [name.upper() for name in names] or list(PAGES)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m theory", description=__doc__.splitlines()[0])
    parser.add_argument(
        "claims", nargs="*", metavar="ID", help=f"of {', '.join(PAGES)}; all where none is named"
    )
    parser.add_argument("--show", action="store_true", help="print what the pages print")
    options = parser.parse_args(arguments)
    table = Table("claim", "figure", "predicted", "measured", "verdict", "seconds")
    failed = []
    for claim in chosen(options.claims):
        result, seconds = run(PAGES[claim], options.show)
        for number, line in enumerate(verdict.LINES):
            first = (claim, f"{seconds:.1f}") if number == 0 else ("", "")
            predicted = f"{line.predicted:.6g}" + (
                "" if line.rule.startswith("within") else f" ({line.rule})"
            )
            holds = "holds" if line.holds else "FAILS"
            table.add_row(first[0], line.what, predicted, f"{line.measured:.6g}", holds, first[1])
        if result != "holds":
            if not verdict.LINES:
                table.add_row(claim, "", "", "", "FAILS", f"{seconds:.1f}")
            failed.append((claim, result))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for claim, result in failed:
        print(f"{claim}: {result}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
