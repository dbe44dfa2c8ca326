"""The import directions: tableaus at the bottom, the command line on top."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "resode"

# What each room may import of resode; its own files are always allowed.
MAY_IMPORT = {
    "checks": set(),
    "tables": {"checks"},
    "results": set(),
    "progress": set(),
    "modes": set(),
    "symbols": set(),
    "calls": set(),
    "whole_blocks": {"checks"},
    "tableaus": set(),
    "formulas": set(),
    "state_dicts": set(),
    "stability": {"tableaus"},
    "jacobian": {"tableaus", "stability"},
    "solve": {"tableaus", "stability", "jacobian"},
    "fields": {"formulas"},
    "shortcuts": {"formulas"},
    "blocks": {"solve", "tableaus", "formulas", "state_dicts"},
    "networks": {"blocks", "fields", "shortcuts", "formulas", "state_dicts"},
    "analysis": {"tableaus", "stability", "jacobian", "solve", "blocks", "formulas"},
    "plots": {"tableaus", "stability"},
    "explorer": {"tableaus", "stability"},
    "training": {"networks", "analysis", "blocks", "solve", "jacobian", "stability", "tableaus", "plots"},
    "__main__": {"cli"},
}
EVERYWHERE = {
    "calls",
    "checks",
    "tables",
    "modes",
    "progress",
    "results",
    "symbols",
    "whole_blocks",
}  # import none but each other
ON_TOP = {"cli", "__init__"}  # may import everything
LAZY = {"analysis": {"plots"}}  # inside a function only: a result's .plot()
QUESTIONS = ["steps", "depth", "rest", "diagnose", "swap"]  # of analysis; each may import those before it


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    """(module of resode, whether at the top of the file) for every import in it."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            pytest.fail(f"{path}: relative import; write it from resode on")
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "resode":
            names = [f"resode.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            parts = name.split(".")
            if parts[0] in ("resode", "theory"):
                yield (parts[1] if parts[0] == "resode" and parts[1:] else parts[0]), id(node) in top
            elif parts[0] == "matplotlib":
                yield "matplotlib", id(node) in top


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = room(path)
    if here in ON_TOP:
        return
    assert here in MAY_IMPORT, (
        f"{here} is no room of the layout; add it to MAY_IMPORT with what it may import"
    )
    for name, at_top in imports(path):
        if name == "matplotlib":
            assert here == "plots", f"{path.name} imports matplotlib; figures are drawn in plots.py"
            continue
        allowed = MAY_IMPORT[here] | EVERYWHERE | {here} | (set() if at_top else LAZY.get(here, set()))
        assert name in allowed, f"{here} imports {name}; it may import {sorted(allowed)}"


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_build_on_those_before_them(question):
    for path in (PACKAGE / "analysis" / question).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            other = name.removeprefix("resode.analysis.").split(".")[0]
            if name.startswith("resode.analysis") and other in QUESTIONS:
                assert QUESTIONS.index(other) <= QUESTIONS.index(question), f"{path} imports {name}"


def test_the_check_sees_a_wrong_arrow(tmp_path):
    """The check itself: an import of the command line from below is found."""
    file = tmp_path / "x.py"
    file.write_text("from resode.cli import main\nimport matplotlib.pyplot\n")
    assert list(imports(file)) == [("cli", True), ("matplotlib", True)]


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """The modules of resode that a file imports anywhere: in functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known) or {node.module or ""}
    return found & known


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that reach themselves, each circle once."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*way, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_no_module_imports_itself_around_a_corner():
    """Imports inside functions and for types count too: they only hide a circle.

    Left out are figures, which know every result's type and are drawn on demand, and the command line.
    """
    names = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    graph = {
        name: imported_modules(path, set(names)) - {name}
        for name, path in names.items()
        if not name.startswith(("resode.plots", "resode.cli")) and name != "resode"
    }
    assert circles(graph) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]


def test_solving_waits_for_nothing_else():
    """Figures, analyses, training, torchdiffeq and scipy's large parts are loaded when first asked for."""
    program = (
        "import sys, torch, resode; resode.odeint(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]));"
        "print(*(set(sys.modules) & {'torchdiffeq', 'scipy.optimize', 'scipy.integrate', 'matplotlib',"
        "'lightning', 'resode.analysis', 'resode.training', 'resode.networks'}), sep=', ')"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == ""


LINES, NESTING, VALUES, IN_ORDER = 80, 4, 4, 8
# Graphs that are compiled or differentiated pass tensors alone, in order; these belong to them.
GRAPHS = {
    "solve/compiled.py",
    "solve/checkpoint.py",
    "solve/gradient.py",
    "solve/implicit/gradient.py",
    "solve/control.py",
    "solve/adaptive.py",
}


def nesting(node, depth=0):
    """How deep conditions, loops and contexts stand in each other; elif is no deeper than if."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        chained = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        inner = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try) and not chained
        deepest = max(deepest, nesting(child, depth + inner))
    return deepest


def oversized(text: str, graph: bool = False) -> list[str]:
    """Functions that are too long (without their docstring), too deep, or pass too much at once."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            start = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno - 1
            lines, deep = node.end_lineno - start, nesting(node)
            found += [f"{node.name}: {lines} lines"] * (lines > LINES)
            found += [f"{node.name}: nested {deep} deep"] * (deep > NESTING)
        if graph:
            continue
        if (
            isinstance(node, ast.Return)
            and isinstance(node.value, ast.Tuple)
            and len(node.value.elts) > VALUES
        ):
            found.append(f"line {node.lineno}: returns {len(node.value.elts)} values")
        if isinstance(node, ast.Call) and len(node.args) > IN_ORDER:
            found.append(f"line {node.lineno}: {len(node.args)} arguments by position")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_stay_readable(path):
    assert oversized(path.read_text(), str(path.relative_to(PACKAGE)) in GRAPHS) == []


def test_an_oversized_function_is_found():
    deep = "def f(x):\n" + "".join(f"{' ' * (4 * i)}if x:\n" for i in range(1, 6)) + " " * 24 + "x = 1\n"
    assert oversized(deep) == ["f: nested 5 deep"]
    assert oversized("def f():\n" + "    x = 1\n" * 80) == ["f: 81 lines"]
    assert oversized("def f():\n    return 1, 2, 3, 4, 5\n") == ["line 2: returns 5 values"]
    assert oversized("f(1, 2, 3, 4, 5, 6, 7, 8, 9)") == ["line 1: 9 arguments by position"]
