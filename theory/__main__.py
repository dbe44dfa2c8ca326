"""Run the claims' pages and print one table: `python -m theory [ID …]`; RESODE_FAST=1 takes their small size.

`--seeds N` runs every page under N shifts of all its seeds instead, and prints under how many it holds;
RESODE_SEED_SHIFT=K takes the shift K alone.

Exit codes: 0 where every claim holds, 1 where one does not, 2 for a name that no page has or a table that
cannot be written. What a page has no stored results for, it says with the commands that make them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import re
import runpy
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from rich.console import Console
from rich.table import Table

from theory import seeds, verdict
from theory.table import COLUMNS, rows


def _numbered(path: Path) -> tuple[str, int]:
    """A page's letter and number, so that C10 comes after C9."""
    claim = path.stem.split("_")[1]
    return claim[0], int(claim[1:])


PAGES = {
    path.stem.split("_")[1].upper(): path
    for path in sorted(Path(__file__).parent.glob("plot_*_*.py"), key=_numbered)
}
"""Claim to page: A1 … C11."""

NOT_MEASURED = re.compile(r"^.*not measured.*(?:\n  .*)*", flags=re.M)
"""How a page prints what it has no stored results for: a line that says so, commands indented below."""


def run(path: Path, show: bool) -> tuple[str, float, list[str]]:
    """Runs a page: "holds" or what went wrong, its seconds, and what was not measured; closes figures."""
    import matplotlib.pyplot as plt

    verdict.LINES.clear()
    dtype = torch.get_default_dtype()
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
        torch.set_default_dtype(dtype)
    return result, time.perf_counter() - begun, NOT_MEASURED.findall(said.getvalue())


def chosen(names: list[str]) -> list[str]:
    """The claims called so, by their id or their page's name; all of them where none is named."""
    known = {path.stem.upper(): claim for claim, path in PAGES.items()} | {claim: claim for claim in PAGES}
    unknown = [name for name in names if Path(name).stem.upper() not in known]
    if unknown:
        valid = ", ".join(f"{claim} ({path.stem})" for claim, path in PAGES.items())
        print(f"error: no claim {', '.join(map(repr, unknown))}. Valid: {valid}.", file=sys.stderr)
        raise SystemExit(2)
    return list(dict.fromkeys(known[Path(name).stem.upper()] for name in names)) or list(PAGES)


def writable(path: str) -> bool:
    """Whether a table can be written there, asked before minutes of work; what stands there stays."""
    try:
        open(path, "a").close()
    except OSError as error:
        print(
            f"error: --csv {path}: {error.strerror}. Name a file in a folder that is there.", file=sys.stderr
        )
        return False
    return True


def under_shifts(claims: list[str], count: int, show: bool) -> int:
    """Runs pages under shifts 0 … count − 1 of all seeds; prints how many hold, and why the others fail."""
    shown, failed, own = Table("claim", "holds", "seconds, mean"), [], seeds.SHIFT
    for claim in claims:
        results = []
        for seeds.SHIFT in range(count):
            result, seconds, _ = run(PAGES[claim], show)
            results.append((result, seconds))
            if result != "holds":
                failed.append(f"{claim}, shift {seeds.SHIFT}: {result}")
        held = sum(result == "holds" for result, _ in results)
        shown.add_row(claim, f"{held} of {count}", f"{sum(s for _, s in results) / count:.1f}")
    seeds.SHIFT = own
    Console(width=None if sys.stdout.isatty() else 140).print(shown)
    for line in failed:
        print(line, file=sys.stderr)
    total = len(claims) * count
    print(f"{total - len(failed)} of {total} hold.")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m theory", description=__doc__.splitlines()[0])
    parser.add_argument(
        "claims", nargs="*", metavar="ID", help=f"of {', '.join(PAGES)}; all where none is named"
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--csv", metavar="PATH", help="also write the table there")
    either.add_argument("--seeds", type=int, metavar="N", help="under N shifts of all seeds: how many hold")
    parser.add_argument("--show", action="store_true", help="print what the pages print")
    options = parser.parse_args(arguments)
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds must be a whole number of at least 1: got {options.seeds}")
    claims = chosen(options.claims)
    if options.seeds is not None:
        return under_shifts(claims, options.seeds, options.show)
    if options.csv is not None and not writable(options.csv):
        return 2
    shown, kept, failed, absent = Table(*COLUMNS), [], [], []
    for claim in claims:
        if sys.stderr.isatty():
            print(f"{claim} …", end="\r", file=sys.stderr, flush=True)
        result, seconds, lacking = run(PAGES[claim], options.show)
        absent += [(claim, text) for text in lacking]
        table = rows(claim, verdict.LINES, seconds, result == "holds")
        kept += table
        for number, row in enumerate(table):
            shown.add_row(*(row if number == 0 else ("", *row[1:-1], "")))
        if result != "holds":
            failed.append((claim, result))
    Console(width=None if sys.stdout.isatty() else 140).print(shown)
    if options.csv is not None:
        with open(options.csv, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([COLUMNS, *kept])
    for claim, result in absent + failed:
        print(f"{claim}: {result}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
