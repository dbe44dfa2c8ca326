"""The README's Python examples run, and say the truth."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_every_python_example_runs_and_holds_what_it_says():
    torch.manual_seed(0)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    # The swap: three solutions of one equation, the finer ones close to each other.
    coarse = (names["euler"] - names["dopri5"]).norm()
    assert (names["rk4"] - names["dopri5"]).norm() < 0.05 * coarse
    resode, jacobian = names["resode"], names["jacobian"]
    assert resode.max_stable_step(jacobian) == pytest.approx(0.4, abs=1e-7)
    assert resode.max_stable_step(jacobian, solver="rk4") == pytest.approx(2.785293563405 / 5, rel=1e-7)
    assert names["limit"].step.shape == (4,)
    assert str(names["model"].cost((3, 224, 224))) in README.read_text()
    assert names["y"].shape == (11, 3, 2) and names["stats"].nfe.shape == (3,)


def test_every_picture_of_the_readme_is_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text()):
        assert (README.parent / path).stat().st_size > 10_000
