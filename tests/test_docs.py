"""The documentation's examples run, and print what stands below them.

A block of Python in a page runs in the page's own namespace, one after the other; where a block of ```text follows
it, that is what it prints: the same words and whole numbers, other numbers within 5 %. `<!-- needs CIFAR-10 -->` above a block leaves it to the reader.
"""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import resode

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(p for p in ROOT.glob("docs/**/*.md") if "_build" not in p.parts)])
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


def run(page: Path, capsys) -> dict:
    """The names that a page's examples leave, having compared what each printed."""
    torch.manual_seed(0)
    names: dict = {"__name__": "__docs__"}
    for block in blocks(page):
        if block["needs"]:
            continue
        line = page.read_text()[: block.start("code")].count("\n")
        exec(compile("\n" * line + block["code"], name(page), "exec"), names)
        printed = capsys.readouterr().out
        if block["printed"] is not None:
            assert same(block["printed"], printed), f"{name(page)}:{line} prints\n{printed}"
    return names


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Examples write into the folder that they run in, and leave torch's settings alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resode, "METHODS", resode.METHODS)
    dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_examples_run_and_print_what_the_page_says(page, capsys):
    assert len(blocks(page)) == page.read_text().count("```python"), "a block is not written as the others"
    run(page, capsys)


@pytest.mark.parametrize(("page", "block"), NEEDING, ids=[f"{name(p)}-{b['needs']}" for p, b in NEEDING])
def test_examples_that_need_more_are_python(page, block):
    """They are read, not run."""
    ast.parse(block["code"])
    pytest.skip(f"{name(page)}: the example needs {block['needs']}")
