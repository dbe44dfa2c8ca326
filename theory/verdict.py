"""What a page says at its end: predicted beside measured, and an error where they disagree.

A page calls `agree`, `at_most` and `at_least`; each prints one line, keeps it in `LINES` for the table of
`python -m theory`, and raises `Disagreement` where the claim does not hold.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

FAST = os.environ.get("RESODE_FAST", "") not in ("", "0")
"""Whether pages run their small size, as the tests do: under 8 s each instead of 60."""


class Disagreement(AssertionError):
    """A measured figure is not what the claim predicts."""


class MissingResult(RuntimeError):
    """A page needs the stored result of a long run; the message says which command makes it."""


@dataclass(frozen=True)
class Line:
    """One compared figure.

    Args:
        what: the quantity, in words.
        predicted: what the claim says.
        measured: what came out.
        rule: how the two must relate, with the tolerance.
        holds: whether they do.
    """

    what: str
    predicted: float
    measured: float
    rule: str
    holds: bool


LINES: list[Line] = []
"""The figures that the running page has compared."""


def agree(what: str, predicted: float, measured: float, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """The measured figure is the predicted one, |measured − predicted| ≤ atol + rtol·|predicted|.

    Raises:
        Disagreement: it is not, or one of the two is not a number.
    """
    bound = atol + rtol * abs(predicted)
    _keep(what, predicted, measured, f"within {bound:.2g}", abs(measured - predicted) <= bound)


def at_most(what: str, bound: float, measured: float) -> None:
    """The measured figure is at most the bound.

    Raises:
        Disagreement: it is larger, or not a number.
    """
    _keep(what, bound, measured, "at most", measured <= bound)


def at_least(what: str, bound: float, measured: float) -> None:
    """The measured figure is at least the bound.

    Raises:
        Disagreement: it is smaller, or not a number.
    """
    _keep(what, bound, measured, "at least", measured >= bound)


def _keep(what: str, predicted: float, measured: float, rule: str, holds: bool) -> None:
    predicted, measured = float(predicted), float(measured)
    holds = bool(holds) and not math.isnan(measured)
    line = Line(what, predicted, measured, rule, holds)
    LINES.append(line)
    text = f"{what}: predicted {predicted:.10g} ({rule}), measured {measured:.10g}"
    if not holds:
        raise Disagreement(f"the claim does not hold: {text}.")
    print(f"{text}: holds")
