"""The API pages document every public name, and only what exists.

The pages are read as text, with the rules of Sphinx's autodoc: `automodule` with `:members:` documents a
module's `__all__`, or without one what the module itself defines; never data without a docstring of its own,
which needs `autodata` where it is defined.
"""

import ast
import inspect
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "api"
DIRECTIVE = re.compile(r"^\.\. auto(\w+):: (\S+)\n((?:[ \t]+\S.*\n)*)", flags=re.M)

PACKAGES = (
    "resode",
    *(f"resode.{name}" for name in "analysis blocks explorer fields networks solve stability".split()),
)
MODULES = ("resode.plots", "resode.shortcuts")
TRAINING = "callbacks compare data divergence evaluate fit loggers monitor parent predict processes recipe refining report run sweep"

INTERNAL = {
    "resode.training.evaluate": {
        "evaluations_of_last_call",
        "images_of",
        "plain_batches",
        "read_weights",
        "recomputations_of_last_call",
    },
    "resode.training.processes": {"losing", "interruption"},
    "resode.training.run": {"check_plan"},
}
"""What a module shares with others of the package, and with nobody else."""


def defined(module) -> list[str]:
    """The public classes and functions that a module defines itself."""
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__ == module.__name__
    ]


def public(place: str) -> list[str]:
    module = import_module(place)
    names = getattr(module, "__all__", None) or defined(module)
    return [name for name in names if name not in INTERNAL.get(place, ())]


PUBLIC = [
    (place, name)
    for place in (*PACKAGES, *MODULES, *(f"resode.training.{m}" for m in TRAINING.split()))
    for name in public(place)
]


def members(place: str, options: str) -> set[str]:
    """What automodule documents of a module."""
    text = re.sub(r"\n\s+(?![\s:])", " ", options)
    if not re.search(r"^\s*:members:\s*$", text, flags=re.M):
        return set()
    left_out = re.search(r":exclude-members: (.*)", text)
    excluded = set(re.split(r",\s*", left_out[1].strip())) if left_out else set()
    module = import_module(place)
    wanted = set(getattr(module, "__all__", None) or defined(module))
    assert excluded <= wanted, f"automodule:: {place} leaves out what it would not hold: {excluded - wanted}"
    return {
        name
        for name in wanted - excluded
        if inspect.isclass(thing := getattr(module, name)) or inspect.isroutine(thing)
    }


def directives() -> list[tuple[str, str, str]]:
    found = [
        match.groups()
        for page in sorted(PAGES.glob("*.rst"))
        for match in DIRECTIVE.finditer(page.read_text())
    ]
    assert len(found) == sum(
        len(re.findall(r"^\.\. auto", p.read_text(), flags=re.M)) for p in PAGES.glob("*.rst")
    )
    return found


def home(dotted: str):
    """A documented thing itself; data by where it stands, so that `resode.METHODS` is its tableaus' METHODS."""
    place, name = dotted.rsplit(".", 1)
    thing = getattr(import_module(place), name)
    return f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else id(thing)


def exists(dotted: str) -> bool:
    """Whether a module defines or imports the name, found without running it: Lightning takes seconds."""
    place, name = dotted.rsplit(".", 1)
    if place == "resode.training.loop":
        tree = ast.parse(Path(find_spec(place).origin).read_text(encoding="utf-8"))
        return name in {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    return hasattr(import_module(place), name)


@pytest.fixture(scope="module")
def documented() -> set:
    found = set()
    for kind, target, options in directives():
        if kind == "module":
            found |= {id(import_module(target))} | {home(f"{target}.{n}") for n in members(target, options)}
        elif not target.startswith("resode.training.loop."):
            found.add(home(target))
    return found


@pytest.mark.parametrize("place", sorted({place for place, _ in PUBLIC}))
def test_every_public_name_is_documented(place, documented):
    missing = [name for at, name in PUBLIC if at == place and home(f"{place}.{name}") not in documented]
    assert not missing, f"docs/api documents no {', '.join(missing)} of {place}"


@pytest.mark.parametrize(("kind", "target"), [(k, t) for k, t, _ in directives()])
def test_every_directive_names_what_exists_and_is_of_its_kind(kind, target):
    if kind == "module":
        assert inspect.ismodule(import_module(target))
        return
    assert exists(target)
    if target.startswith("resode.training.loop."):
        return
    place, name = target.rsplit(".", 1)
    thing = getattr(import_module(place), name)
    exception = inspect.isclass(thing) and issubclass(thing, BaseException)
    right = "exception" if exception else "class" if inspect.isclass(thing) else "function"
    assert kind == (right if inspect.isclass(thing) or inspect.isfunction(thing) else "data")


def test_nothing_is_documented_twice():
    """Sphinx would take the second for another thing, and links to either by chance."""
    found = []
    for kind, target, options in directives():
        if kind == "module":
            found += [home(f"{target}.{name}") for name in members(target, options)]
        elif not target.startswith("resode.training.loop."):
            found.append(home(target))
    assert not {thing for thing in found if found.count(thing) > 1}


@pytest.mark.parametrize("place", sorted({place for place, _ in PUBLIC}))
def test_every_public_class_and_function_says_what_it_is(place):
    things = [(name, getattr(import_module(place), name)) for at, name in PUBLIC if at == place]
    bare = [n for n, t in things if (inspect.isclass(t) or inspect.isfunction(t)) and not t.__doc__]
    assert not bare


def test_internal_names_exist():
    for place, names in INTERNAL.items():
        assert names <= set(defined(import_module(place)))


def test_the_commands_page_lists_the_commands():
    """By the files that register them."""
    registered = set()
    for file in (ROOT / "resode" / "cli").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                calls = [d for d in node.decorator_list if isinstance(d, ast.Call)]
                if any(isinstance(d.func, ast.Name) and d.func.id == "command" for d in calls):
                    registered.add(node.name)
    listed = re.findall(r"^   \* - ``resode (\w+)``", (PAGES / "command.rst").read_text(), flags=re.M)
    assert sorted(listed) == sorted(registered)


def test_every_page_is_in_the_index():
    index = (PAGES / "index.rst").read_text()
    pages = {page.stem for page in PAGES.glob("*.rst")} - {"index"}
    assert pages <= set(index.split())
