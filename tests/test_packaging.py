"""What is released: one version everywhere, an archive with all that the README names, links that lead somewhere."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import resode

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
HOOK = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]


def test_one_version():
    version = PROJECT["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert resode.__version__ == version == str(citation["version"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(citation["date-released"]))
    for page in (README, (ROOT / "docs" / "api-stability.md").read_text()):
        (cited,) = re.findall(r"@software\{resode,.*?\n\}", page, flags=re.S)
        assert f"version = {{{version}}}" in cited and f"date    = {{{citation['date-released']}}}" in cited


def test_the_archive_holds_what_the_readme_names():
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    named = {
        *LINK.findall(README),
        "Makefile",
        "constraints.txt",
        "theory",
        *re.findall(r"`(docs/[\w/.-]+)`", README),
    }
    named.discard("docs/_build/html")
    assert all((ROOT / place).exists() for place in {*named, *included})
    assert not [place for place in named if place.split("/")[0] not in included]
    assert "readme" in PROJECT["project"]["dynamic"]


def test_an_index_page_has_no_link_to_a_file():
    text = README
    for change in HOOK["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    assert LINK.findall(README) and not LINK.findall(text) and "](" in README
    assert "![" not in text and "docs/solvers.md says which" in text


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    made = ("gallery/", "_generated")  # by the build
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for place in LINK.findall(text):
        assert any(part in place for part in made) or (page.parent / place).exists(), (
            f"{page.name} links to {place}"
        )
