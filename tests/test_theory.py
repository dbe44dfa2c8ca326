"""Every claim has a page that holds, and `python -m theory` tells one that does not."""

import csv
import os
import re
from pathlib import Path

import pytest

os.environ["RESODE_FAST"] = "1"  # before theory.verdict reads it

from theory import __main__ as command
from theory import seeds, verdict

CLAIMS = [
    *(f"A{n}" for n in range(1, 10)),
    *(f"B{n}" for n in range(1, 14)),
    *(f"C{n}" for n in range(1, 12)),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    assert verdict.FAST
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_every_claim_has_a_page():
    assert list(command.PAGES) == CLAIMS


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_claim_holds(claim):
    result, _, _ = command.run(command.PAGES[claim], show=False)
    assert result == "holds"
    assert len(verdict.LINES) >= 3


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_page_has_its_parts(claim):
    """Said before anything runs: the claim and its limits; then predicted, measured, drawn and compared."""
    text = command.PAGES[claim].read_text()
    said, body = text.split('"""', 2)[1:]
    assert re.search(rf"^{claim} · .+\n=+$", said, flags=re.M)
    for part in ("Claim", "Assumptions", "Not claimed", "Source"):
        assert said.count(f"**{part}.**") == 1, part
    assert "picture" in said
    for part in ("Prediction", "Measurement", "Figure", "Verdict"):
        heading = rf"^# (?:\*\*{part}\b|.*\b{part}\b.*\n# -+$)"
        assert re.search(heading, body, flags=re.M | re.I), part
    comments = "".join(re.findall(r"^#.*\n", body, flags=re.M))
    assert not re.search(r"\\\\[a-zA-Z]", comments), "a backslash is written once in a comment's formula"


def page(folder: Path, body: str) -> Path:
    path = folder / "plot_z1_page.py"
    path.write_text(f"from theory.verdict import MissingResult, agree, at_least, at_most\n{body}\n")
    return path


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("agree('x', 1.0, 1.1, atol=0.05)", "does not hold: x: predicted 1 (within 0.05), measured 1.1"),
        ("agree('x', 1.0, float('nan'), atol=9)", "measured nan"),
        ("agree('x', float('nan'), 1.0, atol=9)", "predicted nan"),
        ("at_most('x', 1.0, 1.5)", "at most"),
        ("at_most('x', 1.0, float('nan'))", "measured nan"),
        ("at_least('x', 1.0, 0.5)", "at least"),
        ("raise MissingResult('make it with resode train')", "make it with resode train"),
        ("1 / 0", "ZeroDivisionError"),
        ("pass", "compares nothing"),
    ],
)
def test_a_page_that_does_not_hold_is_told(tmp_path, monkeypatch, capsys, body, said):
    monkeypatch.setattr(command, "PAGES", {"Z1": page(tmp_path, body)})
    assert command.main(["z1", "--csv", str(tmp_path / "claims.csv")]) == 1
    printed = capsys.readouterr()
    assert said in printed.err and "FAILS" in printed.out
    rows = list(csv.reader((tmp_path / "claims.csv").read_text().splitlines()))
    assert rows[-1][4] == "FAILS"


def test_a_page_that_holds(tmp_path, monkeypatch, capsys):
    body = "agree('x', 1.0, 1.01, rtol=0.02)\nat_most('y', 2.0, 2.0)\nat_least('z', 2.0, 2.0)"
    monkeypatch.setattr(command, "PAGES", {"Z1": page(tmp_path, body)})
    assert command.main([]) == 0
    assert capsys.readouterr().out.count("holds") == 3


def test_an_unknown_claim_lists_the_known(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["Z9"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "no claim 'Z9'" in said and all(claim in said for claim in CLAIMS)


def test_a_claim_is_named_by_its_page_too():
    assert command.chosen(["c3", "plot_c3_eta_lambda", "theory/plot_a1_gradient_highway.py"]) == ["C3", "A1"]
    assert command.chosen([]) == CLAIMS


def test_all_unknown_names_are_told_at_once(capsys):
    with pytest.raises(SystemExit):
        command.main(["A1", "Z9", "gradient"])
    assert "no claim 'Z9', 'gradient'. Valid: A1 (plot_a1_gradient_highway), A2" in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_told_before_pages_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "PAGES", {"Z1": page(tmp_path, "1 / 0")})
    for path in (tmp_path / "nowhere" / "claims.csv", tmp_path):
        assert command.main(["--csv", str(path)]) == 2
        said = capsys.readouterr()
        assert f"--csv {path}: " in said.err and "ZeroDivisionError" not in said.err and not said.out


def test_what_a_page_has_no_results_for_is_told_with_the_commands(tmp_path, monkeypatch, capsys):
    body = "print('curves: not measured. Do:\\n  resode train\\n  collect\\nelse')\nagree('x', 1.0, 1.0)"
    monkeypatch.setattr(command, "PAGES", {"Z1": page(tmp_path, body)})
    assert command.main([]) == 0
    assert capsys.readouterr().err == "Z1: curves: not measured. Do:\n  resode train\n  collect\n"


def test_pages_under_shifted_seeds(tmp_path, monkeypatch, capsys):
    """Page Z1 draws under three shifts, and 1000·2 is what it does not hold for."""
    body = "from theory.seeds import shifted\nat_most('seed', 1005, shifted(5))"
    monkeypatch.setattr(command, "PAGES", {"Z1": page(tmp_path, body)})
    monkeypatch.setattr(seeds, "SHIFT", 7)
    assert command.main(["z1", "--seeds", "2"]) == 0
    assert "2 of 2 hold.\n" in capsys.readouterr().out
    assert command.main(["z1", "--seeds", "3"]) == 1
    printed = capsys.readouterr()
    assert "2 of 3 hold.\n" in printed.out
    assert (
        "Z1, shift 2: the claim does not hold: seed: predicted 1005 (at most), measured 2005" in printed.err
    )
    assert seeds.SHIFT == 7
    for wrong in (["--seeds", "0"], ["--seeds", "2", "--csv", "x"]):
        with pytest.raises(SystemExit):
            command.main(wrong)


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_page_draws_by_shifted_seeds_alone(claim):
    text = command.PAGES[claim].read_text()
    assert not re.findall(r"manual_seed\((?!shifted\()", text)
    drawn = re.findall(r"\bseed=(?!shifted\(|seed\b)|default_rng|np\.random", text)
    assert not drawn
