"""The mutation tests' own parts: the interval of a share, statements by line, and the list of equivalents."""

import ast

import pytest

from tests.trust import mutants


def test_wilsons_interval():
    """Of 0 in 10, z²/(10 + z²); of 90 in 100 as printed in tables."""
    assert mutants.wilson(0, 10) == pytest.approx((0.0, 1.96**2 / (10 + 1.96**2)))
    assert mutants.wilson(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)


def test_statements_by_line():
    source = "def f(x,\n      y):\n    if x:\n        return (x +\n                y)\n    return 0\n"
    table = mutants.statements(ast.parse(source))
    assert [table[line] for line in range(1, 7)] == [(1, 2, ".f")] * 2 + [
        (3, 3, ".f"),
        (4, 5, ".f"),
        (4, 5, ".f"),
        (6, 6, ".f"),
    ]


def test_equivalents_name_lines_that_are_there():
    entries = mutants.equivalents()
    assert all(reason.endswith(".") for reason in entries.values())
    for entry in mutants.entries():
        lines = [line.strip() for line in (mutants.ROOT / entry["module"]).read_text().splitlines()]
        assert entry["before"] in lines, entry["name"]


def test_mutants_have_names_of_their_own():
    """A name is a hash of a statement and a place in it, so that none occurs twice."""
    pytest.importorskip("cosmic_ray")
    [path] = mutants.sources("tableaus")
    places = mutants.of_module(path)
    names = [mutant.name for place in places for mutant in place]
    assert len(names) == len(set(names)) > 1000
