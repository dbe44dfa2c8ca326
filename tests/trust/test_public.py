"""Every public name has a row, and its law holds, or a rule refuses, under drawn dtypes, layouts, sizes and modes."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trust import rows, surface, table

EXAMPLES = int(os.environ.get("TRUST_EXAMPLES", "1"))

VARIANTS = st.builds(
    rows.Variant,
    dtype=st.sampled_from(rows.DTYPES),
    layout=st.sampled_from(rows.LAYOUTS),
    batch=st.sampled_from((0, 1, 2, 5)),
    size=st.sampled_from((1, 2, 4, 7)),
    train=st.booleans(),
    grad=st.sampled_from(rows.GRADS),
    seed=st.integers(0, 1000),
)


def test_every_public_name_has_a_row():
    assert table.missing() == []


def test_the_public_surface_is_as_written_down():
    """A change that users will meet: `make surface` writes it down, and the changelog tells of it."""
    assert surface.differences() == []


@pytest.mark.parametrize("name", sorted(row.name for row in table.rows(slow=EXAMPLES > 1)))
def test_the_law_holds_as_it_stands(name):
    outcome = rows.attempt(rows.ROWS[name], rows.PLAIN)
    assert outcome.held, outcome.said


@pytest.mark.skipif(EXAMPLES == 1, reason="`make trust` draws variants (TRUST_EXAMPLES=40)")
@pytest.mark.parametrize("name", sorted(row.name for row in table.rows(slow=False)))
@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(variant=VARIANTS)
def test_a_result_keeps_its_law_or_a_rule_refuses(name, variant):
    rows.attempt(rows.ROWS[name], variant)


@pytest.mark.parametrize(
    "broken",
    [lambda **_: [][0], lambda **_: torch.zeros(2) @ torch.zeros(3), lambda **_: None, lambda x: x.add_(1)],
    ids=["an index", "torch's own", "its law fails", "its argument changed"],
)
def test_a_fault_is_found(broken, monkeypatch):
    """The check itself, on functions that do what none may."""

    def make(v):
        def law(found):
            assert found is not None

        return rows.Case({"x": torch.zeros(2)}, law)

    monkeypatch.setattr(rows, "resolve", lambda name: broken)
    with pytest.raises(rows.Broken):
        rows.attempt(rows.Row("resode.nothing", make), rows.PLAIN)
