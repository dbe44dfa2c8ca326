"""Measured figures in the docs can be had again: each names its command, and what it ran on."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
COMMAND = re.compile(
    r"(python -m (theory|tests)\b|\bmake \w|\bresode (train|swap|compare|report|profile|sweep)\b)"
)
MACHINE = re.compile(r"EPYC|Xeon|H200")
VERSION = re.compile(r"\btorch \d+\.\d+")
NUMBER = re.compile(r"\|\s*[−-]?\d[\d.,]*( ?(×|s|ms|%|MiB))?\s*\|")


def sections(page: str) -> dict[str, str]:
    """What stands before the first heading of second rank under "", and each section by its heading."""
    first, *others = re.split(r"(?m)^## ", (DOCS / page).read_text(encoding="utf-8"))
    return {"": first} | {part.splitlines()[0]: part for part in others}


def measured(page: str) -> list[str]:
    """The sections with a table of numbers."""
    return [
        name
        for name, text in sections(page).items()
        if sum(bool(NUMBER.search(line)) for line in text.splitlines() if line.startswith("|")) >= 2
    ]


RESULTS = measured("results.md")


@pytest.mark.parametrize("section", RESULTS)
def test_results_name_command_machine_and_versions(section):
    """The machine and the versions stand in the section, or hold for the page where it says nothing."""
    text, head = sections("results.md")[section], sections("results.md")[""]
    assert COMMAND.search(text), "no command"
    assert MACHINE.search(text) or MACHINE.search(head), "no machine"
    assert VERSION.search(text) or VERSION.search(head), "no version of torch"


@pytest.mark.parametrize(
    ("page", "section"),
    [
        (page, name)
        for page in ("comparison.md", "solvers.md", "published-table.md")
        for name in measured(page)
    ],
)
def test_tables_elsewhere_name_their_command(page, section):
    if section == "What each has":  # read in sources, not measured
        return
    assert COMMAND.search(sections(page)[section])


def test_there_are_sections_to_look_at():
    """The rule itself: it finds the tables, and a section without a command is seen."""
    assert len(RESULTS) > 10 and "Digits" in RESULTS
    assert not COMMAND.search("| rk4 | 3.1 s |\nmeasured on an AMD EPYC")
