"""The table of claims: what the command prints and the docs' gallery shows."""

from __future__ import annotations

from collections.abc import Sequence

from theory.verdict import Line

COLUMNS = ("claim", "figure", "predicted", "measured", "verdict", "seconds")


def rows(claim: str, lines: Sequence[Line], seconds: float, holds: bool = True) -> list[tuple[str, ...]]:
    """A page's rows, one a compared figure, and one that FAILS where it stopped without comparing."""
    table = []
    for line in lines:
        rule = "" if line.rule.startswith("within") else f" ({line.rule})"
        verdict = "holds" if line.holds else "FAILS"
        predicted = f"{line.predicted:.6g}{rule}"
        table.append((claim, line.what, predicted, f"{line.measured:.6g}", verdict, f"{seconds:.1f}"))
    if not holds and all(line.holds for line in lines):  # it went wrong elsewhere
        table.append((claim, "", "", "", "FAILS", f"{seconds:.1f}"))
    return table
