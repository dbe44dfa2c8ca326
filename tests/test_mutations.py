"""Pages fail where what they rest on is broken; `python -m theory.mutations` tries all, in minutes."""

import pytest

import resode
from resode.analysis import depth
from theory import mutations


def test_every_page_has_a_mutation():
    assert {m.claim for m in mutations.MUTATIONS} == set(mutations.PAGES)


@pytest.mark.parametrize("claim", ["A2", "B5", "B10", "C3"])
def test_a_broken_function_is_noticed(claim, capsys):
    assert mutations.main([claim]) == 0
    assert "is caught" in capsys.readouterr().out


def test_a_mutation_that_nothing_notices_is_told(monkeypatch, capsys):
    kept = mutations.Mutation("A2", "resode.analysis:product_norm", "nothing", lambda f: f)
    monkeypatch.setattr(mutations, "MUTATIONS", [kept])
    assert mutations.main(["A2"]) == 1
    said = capsys.readouterr().out
    assert "HOLDS" in said and "0 of 1 mutations caught" in said


def test_functions_are_whole_again():
    """In every module that holds them, in classes and properties too."""
    before = resode.max_stable_step, depth.gradients.product_norm
    for mutation in mutations.MUTATIONS:
        with mutation.applied():
            pass
    assert (resode.max_stable_step, depth.gradients.product_norm) == before
    broken = mutations.Mutation("C3", "resode:max_stable_step", "twice", mutations.scaled(2.0))
    with broken.applied():
        assert resode.max_stable_step(eigenvalues=[-1.0]) == pytest.approx(4)
    assert resode.max_stable_step(eigenvalues=[-1.0]) == pytest.approx(2)
