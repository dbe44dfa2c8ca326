"""Pages as notebooks: a page's Python blocks become cells that run, what lies between them text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n.*?^```\n)?", flags=re.S | re.M)
_ONLY_HERE = re.compile(r"^```\{raw\} html\n.*?^```\n", flags=re.S | re.M)  # what is a page's alone
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]+\)")  # to a page of the site, which lies elsewhere


def cells(page: Path) -> list[dict[str, Any]]:
    """The notebook's cells; what a block prints is left out, because the cell will print it."""
    text = _ONLY_HERE.sub("", page.read_text(encoding="utf-8"))
    found: list[tuple[str, str]] = []
    end = 0
    for block in _BLOCK.finditer(text):
        found += [("markdown", text[end : block.start()]), ("code", block["code"])]
        end = block.end()
    found.append(("markdown", text[end:]))
    return [_cell(number, kind, part) for number, (kind, part) in enumerate(found) if part.strip()]


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    source = text.strip() if kind == "code" else _LINK.sub(r"\1", text.strip())
    cell = {
        "cell_type": kind,
        "id": f"cell-{number}",
        "metadata": {},
        "source": source.splitlines(keepends=True),
    }
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def write(page: Path, place: Path) -> None:
    """Write a page as a notebook (nbformat 4.5)."""
    notebook = {
        "cells": cells(page),
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    place.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
