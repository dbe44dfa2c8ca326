"""The documentation's examples run, and print what stands below them.

A block of Python in a page runs in the page's own namespace, one after the other; where a block of ```text follows
it, that is what it prints: the same words and whole numbers, other numbers within 5 %. `<!-- needs CIFAR-10 -->`
above a block leaves it to the reader.
"""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

import resode

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "README.zh.md",
        *(p for p in ROOT.glob("docs/**/*.md") if "_build" not in p.parts),
    ]
)
BLOCK = re.compile(
    r"(?:^<!-- needs (?P<needs>[^>]+) -->\n)?^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```\n)?",
    flags=re.S | re.M,
)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[re.Match]:
    return list(BLOCK.finditer(page.read_text()))


def same(expected: str, printed: str) -> bool:
    """Floats differ with the processor, and training makes more of it; words and whole numbers do not."""
    if NUMBER.sub("#", expected).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(expected), NUMBER.findall(printed), strict=True)
    return all(a == b or ("." in a and float(b) == pytest.approx(float(a), rel=0.05)) for a, b in pairs)


WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]
NEEDING = [(page, block) for page in WITH_CODE for block in blocks(page) if block["needs"]]


def run(page: Path, capsys) -> tuple[dict, str]:
    """The names that a page's examples leave, and all they print, having compared what each printed."""
    torch.manual_seed(
        2026
    )  # a reader's prompt has another seed than 0: a page that prints random figures sets its own
    names: dict = {"__name__": "__docs__"}
    everything = ""
    for block in blocks(page):
        if block["needs"]:
            continue
        line = page.read_text()[: block.start("code")].count("\n")
        exec(compile("\n" * line + block["code"], name(page), "exec"), names)
        printed = capsys.readouterr().out
        everything += printed
        if block["printed"] is not None:
            assert same(block["printed"], printed), f"{name(page)}:{line} prints\n{printed}"
    return names, everything


def check_readme(names: dict, printed: str) -> None:
    """The swap: three solutions of one equation, the finer ones close to each other; and the figures beside it."""
    coarse = (names["euler"] - names["dopri5"]).norm()
    assert (names["rk4"] - names["dopri5"]).norm() < 0.05 * coarse
    jacobian = names["jacobian"]
    assert resode.max_stable_step(jacobian) == pytest.approx(0.4, abs=1e-7)
    assert resode.max_stable_step(jacobian, solver="rk4") == pytest.approx(2.785293563405 / 5, rel=1e-7)
    assert names["limit"].step.shape == (4,)
    assert str(names["model"].cost((3, 224, 224))) in (ROOT / "README.md").read_text()
    assert names["y"].shape == (11, 3, 2) and names["stats"].nfe.shape == (3,)


def check_inspecting(names: dict, printed: str) -> None:
    assert printed.startswith("3 of 3 converged") and printed.count("saddle, unstable") == 3
    assert "1 flip 2.0\n2 flip 2.44948974" in printed and "4 flip 2.5440903" in printed
    assert {p.name for p in Path().iterdir()} == {
        "cobweb.png",
        "diagnosis.png",
        "portrait.png",
        "profile.csv",
        "profile.png",
    }


CHECKS = {"README.md": check_readme, "docs/inspecting.md": check_inspecting}
"""What else must be true after a page's examples."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Examples write into the folder that they run in, and leave torch's settings alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resode, "METHODS", resode.METHODS)
    dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype


@pytest.mark.usefixtures("seeds_as_written")
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_examples_run_and_print_what_the_page_says(page, capsys):
    assert len(blocks(page)) == page.read_text().count("```python"), "a block is not written as the others"
    found = run(page, capsys)
    if name(page) in CHECKS:
        CHECKS[name(page)](*found)


@pytest.mark.parametrize(("page", "block"), NEEDING, ids=[f"{name(p)}-{b['needs']}" for p, b in NEEDING])
def test_examples_that_need_more_are_python(page, block):
    """They are read, not run."""
    ast.parse(block["code"])
    pytest.skip(f"{name(page)}: the example needs {block['needs']}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pictures_and_linked_files_are_there(page):
    """Sphinx checks links within the site; the README and the pictures stand outside it."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for picture, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s#]+)[^)]*\)", prose):
        if "://" in target or "gallery/" in target:
            continue
        path = page.parent / target
        assert path.exists(), f"{name(page)} names {target}"
        assert not picture or path.stat().st_size > 10_000


def test_decisions_stay_short():
    for path in (ROOT / "docs" / "decisions").glob("[0-9]*.md"):
        assert len(path.read_text().splitlines()) <= 20, path.name


def test_the_tutorials_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """The site offers it; its cells are the page's blocks, in a format that Jupyter reads."""
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
    assert spec is not None and spec.loader is not None
    notebooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebooks)
    notebooks.write(ROOT / "docs" / "tutorial.md", tmp_path / "tutorial.ipynb")
    notebook = json.loads((tmp_path / "tutorial.ipynb").read_text())
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__notebook__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) == len(blocks(ROOT / "docs" / "tutorial.md")) >= 8
    for cell in code:
        exec("".join(cell["source"]), names)
    text = "".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    assert ".md)" not in text and "{raw}" not in text and "```text" not in text
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def code_of(page: Path, kinds: str) -> list[str]:
    """The page's blocks of code without their comments."""
    found = re.findall(rf"^```(?:{kinds})\n(.*?)^```\n", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [re.sub(r"\s+#.*$", "", block, flags=re.M).strip() for block in found]


def test_the_chinese_readme_has_the_readmes_commands():
    """Shorter, so that each line of its code is one of the README's, and in its order within a block."""
    lines = [line for block in code_of(ROOT / "README.md", "sh|python") for line in block.splitlines()]
    for block in code_of(ROOT / "README.zh.md", "sh|python"):
        at = 0
        for line in block.splitlines():
            assert line in lines[at:], f"README.md has no longer: {line}"
            at = lines.index(line, at)
    text = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    for term in ("残差块", "前向欧拉法", "恒等快捷连接", "梯度高速公路", "不动点", "稳定域"):
        assert term in text, term


def test_the_chinese_tutorial_has_the_tutorials_examples():
    assert code_of(ROOT / "docs" / "zh" / "tutorial.md", "python|text") == code_of(
        ROOT / "docs" / "tutorial.md", "python|text"
    )
