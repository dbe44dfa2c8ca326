"""The explorer's page: one HTML file that evaluates R(z) itself and fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from resode.explorer.spectra import NamedSpectrum
from resode.stability import stability_coefficients, stability_properties
from resode.stability.recurrences import RecurrenceRays
from resode.tableaus import METHODS, ButcherTableau, get_tableau

EXAMPLE = NamedSpectrum("example", 1.0, (-1.0 + 0j, -0.2 + 1j, -0.2 - 1j))
"""What the page shows where nothing is given."""

_SCRIPTS = ("stability.js", "stepping.js", "page.js", "plane.js", "texts.js", "pictures.js", "controls.js")


def explorer_page(
    spectra: Sequence[NamedSpectrum] = (),
    *,
    title: str = "Stability explorer",
    source: str = "",
    methods: Sequence[str | ButcherTableau] = ("euler", "rk4"),
) -> str:
    """A page that shows eigenvalues times the step over the stability regions of any methods.

    Args:
        spectra: of every block, in the order of depth; three eigenvalues as an example where there are none.
        title: of the page.
        source: a line that says where the eigenvalues are from.
        methods: names or tableaus, drawn at first; all of METHODS can be chosen.

    Returns:
        HTML. It has no remote reference, and a policy under which nothing but its own script runs.

    Raises:
        ValueError: an unknown method, or none.

    Example:
        >>> page = explorer_page([NamedSpectrum("block 0", 0.5, (-2 + 1j, -2 - 1j))], title="<b>")
        >>> "<title>&lt;b&gt;</title>" in page
        True
    """
    tableaus = [get_tableau(method) for method in methods]
    if not tableaus:
        raise ValueError("the page needs at least one method to draw, such as euler.")
    every = list(dict.fromkeys([*METHODS.values(), *tableaus]))
    spectra = list(spectra) or [EXAMPLE]
    data = {
        "title": title,
        "source": source,
        "depth": len(spectra) if len(spectra) > 1 else 20,
        "shown": [tableau.name for tableau in tableaus],
        "methods": [_method(tableau) for tableau in every],
        "blocks": [
            {
                "name": s.name,
                "step": s.step,
                "re": [z.real for z in s.eigenvalues],
                "im": [z.imag for z in s.eigenvalues],
            }
            for s in spectra
        ],
    }
    style = _part("page.css")
    script = "\n".join(_part(name).removeprefix('"use strict";\n') for name in _SCRIPTS)
    script = f'"use strict";\n{script}'
    return Template(_part("page.html")).substitute(
        title=escape(title),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        # "<" would end the element that holds the data, whatever else a name contains
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    )


def _part(name: str) -> str:
    return (files("resode.explorer") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """How a Content-Security-Policy names an element's text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _method(tableau: ButcherTableau) -> dict[str, Any]:
    """A method's coefficients: of R, and of its steps."""
    found = stability_properties(tableau)
    method: dict[str, Any] = {
        "name": tableau.name,
        "order": tableau.order,
        "stages": len(tableau.b),
        "explicit": bool(tableau.explicit),
        "real": _finite(found.real_interval),
        "imaginary": _finite(found.imaginary_interval),
        "aStable": found.letters.startswith("A"),
    }
    if tableau.recurrence is not None:
        rays = RecurrenceRays(tableau)
        return method | {
            "rows": tableau.recurrence_rows,
            "weights": tableau.recurrence_sum,
            "reach": rays.reach,
        }
    numerator, denominator = stability_coefficients(tableau)
    return method | {
        "a": [[str(c) for c in row] for row in tableau.a],
        "b": [str(c) for c in tableau.b],
        "p": [_number(c) for c in numerator],
        "q": [_number(c) for c in denominator],
    }


def _number(c: Any) -> str:
    """A coefficient as a fraction where that is short, else as a float."""
    text = str(c)
    return text if len(text) <= 40 else repr(float(c))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
