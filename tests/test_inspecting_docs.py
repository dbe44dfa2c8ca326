"""The examples of docs/inspecting.md run, and print what stands beside them."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs" / "inspecting.md"


def test_every_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S):
        exec(compile(block, PAGE.name, "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("3 of 3 converged") and printed.count("saddle, unstable") == 3
    assert "1 flip 2.0\n2 flip 2.44948974" in printed and "4 flip 2.5440903" in printed
    assert {p.name for p in tmp_path.iterdir()} == {
        "cobweb.png",
        "portrait.png",
        "profile.csv",
        "profile.png",
    }


def test_decisions_stay_short():
    for path in (PAGE.parent / "decisions").glob("*.md"):
        assert len(path.read_text().splitlines()) <= 20, path.name
