"""Mutation testing: which small faults of five packages would the tests see?

    python -m tests.trust.mutants tableaus --count 200 --seed 0

draws mutants at random, runs for each the tests that execute its line, fastest first and up to the first failure, and
prints the score with Wilson's interval of 95 %. Results are kept as they come in .mutants/, so that a stopped campaign
goes on where it was; `--retry` runs the survivors again, after tests were added, `--show` prints them.

The mutations are cosmic-ray's. Two things are left to this file. A draw: places in the code, then one mutation
of each, in the order of a hash of the place's own text, so that an edit elsewhere leaves the draw as it was; nothing in
annotations, no operator that any test would kill where it is only reached (+ becomes no <<), and nothing whose
bytecode is the original's. And a run: torch takes seconds to import, so that each mutant is a fork of a process that
has it, in which the mutated source is what `import` finds. No file is changed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
import tomllib
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import sqrt
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / ".mutants"
EQUIVALENTS = Path(__file__).with_name("equivalents.toml")

SOLVES = """odeint solve_ivp stepping events own_events own_times dropin adjoint checkpoint implicit errors
    stack_time solve_parts""".split()
# Each package: its sources, and the test files besides its own doctests, the nearest first.
PACKAGES = {
    "tableaus": ("tableaus.py", ["tableaus", "stability", "stabilised", "design", "odeint", "implicit"]),
    "stability": (
        "stability",
        "stability step_limit stabilised design one_answer tableaus stability_parts".split(),
    ),
    "jacobian": (
        "jacobian",
        "matrix_free step_limit one_answer implicit jacobian_parts".split(),
    ),
    "diagnose": ("analysis/diagnose", ["diagnose", "findings", "measures", "diagnosis_page"]),
    "solve": ("solve", SOLVES),
}


@dataclass(frozen=True)
class Mutant:
    """One change at one place; `name` is a hash of what it changes, not of where it stands."""

    name: str
    module: str  # path from ROOT
    operator: str
    occurrence: int
    line: int
    before: str
    after: str
    code: str = ""  # the module's source with the change


def sources(package: str) -> list[Path]:
    place = ROOT / "resode" / PACKAGES[package][0]
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


def test_files(package: str) -> list[str]:
    own = [str(path.relative_to(ROOT)) for path in sources(package) if ">>>" in path.read_text()]
    return [f"tests/test_{name}.py" for name in PACKAGES[package][1]] + own


def operators() -> dict[str, type]:
    """cosmic-ray's operators without arguments, less those that any test would kill where it is only reached."""
    from cosmic_ray.operators.provider import OperatorProvider

    provider, kept = OperatorProvider(), {}
    kinds = [{"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}, {"BitOr", "BitAnd", "BitXor"}]
    kinds += [{"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"}, {"Is", "IsNot"}]
    for name in provider:
        pair = re.fullmatch(r"Replace(?:Binary|Comparison)Operator_(\w+)_(\w+)", name)
        if pair and not any(set(pair.groups()) <= kind for kind in kinds):
            continue
        if name.startswith("ReplaceUnaryOperator") and not name.endswith(("Delete_USub", "Delete_Not")):
            continue
        if not provider[name].arguments():
            kept[name] = provider[name]
    return kept


def outside(tree: ast.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where nothing is drawn: annotations, which no run reads."""
    notes = [node.annotation for node in ast.walk(tree) if isinstance(node, ast.arg | ast.AnnAssign)]
    notes += [node.returns for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [
        ((note.lineno, note.col_offset), (note.end_lineno or 0, note.end_col_offset or 0))
        for note in notes
        if note
    ]


def statements(tree: ast.Module) -> dict[int, tuple[int, int, str]]:
    """For each line the innermost statement (of a compound one: its head): first line, last line, qualified name."""
    found: dict[int, tuple[int, int, str]] = {}

    def walk(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = f"{name}.{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else name
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
                first = getattr(child, "lineno", None) or child.pattern.lineno  # type: ignore[attr-defined]
                body = getattr(child, "body", None)
                last = max(first, body[0].lineno - 1) if body else child.end_lineno  # type: ignore[attr-defined]
                found.update(dict.fromkeys(range(first, last + 1), (first, last, inner)))
            walk(child, inner)

    walk(tree, "")
    return found


def of_module(path: Path) -> list[list[Mutant]]:
    """The mutants of a file, by place."""
    from cosmic_ray.ast import ast_nodes, get_ast

    source = path.read_text()
    module, lines = str(path.relative_to(ROOT)), source.splitlines()
    tree, nodes = ast.parse(source), list(ast_nodes(get_ast(source)))
    within, forbidden = statements(tree), outside(tree)
    places: dict[tuple, list[Mutant]] = {}
    seen: dict[str, int] = {}
    for operator, kind in operators().items():
        instance, occurrence = kind(), -1
        for node in nodes:
            for start, end in instance.mutation_positions(node):
                occurrence += 1
                if any(first <= start < last for first, last in forbidden):
                    continue
                first, last, function = within.get(start[0], (start[0], start[0], ""))
                text = " ".join(line.strip() for line in lines[first - 1 : last])
                ahead = len("".join(line.strip() for line in lines[first - 1 : start[0] - 1])) + start[1]
                indent = len(lines[start[0] - 1]) - len(lines[start[0] - 1].lstrip())
                key = f"{module}|{function}|{text}|{ahead - indent}|{operator}"
                seen[key] = seen.get(key, -1) + 1  # the same statement again, or the operator's second choice
                name = hashlib.sha256(f"{key}|{seen[key]}".encode()).hexdigest()[:12]
                before = lines[start[0] - 1].strip()
                places.setdefault((start, end), []).append(
                    Mutant(name, module, operator, occurrence, start[0], before, "")
                )
    return [places[place] for place in sorted(places)]


def mutated(mutant: Mutant) -> str | None:
    """The module's source with the fault, or None where it is none: no Python, or the same bytecode."""
    from cosmic_ray.mutating import mutate_code

    source = (ROOT / mutant.module).read_text()
    code = mutate_code(source, operators()[mutant.operator](), mutant.occurrence)
    try:
        same = code is None or _bytecode(code) == _bytecode(source)
    except (SyntaxError, SyntaxWarning):
        return None
    return None if same else code


def essence(code: CodeType) -> tuple:
    """What the compiler makes of a source, without the places in it; last the constants, with the code in them."""
    constants = [
        essence(c) if isinstance(c, CodeType) else (type(c).__name__, repr(c)) for c in code.co_consts
    ]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return (code.co_code, code.co_flags, code.co_exceptiontable, *names, tuple(constants))


def _bytecode(source: str) -> tuple:
    return essence(compile(source, "module", "exec", dont_inherit=True))


def draw(package: str, count: int, seed: int) -> list[Mutant]:
    """`count` mutants at different places, each place as likely as any other; kept, as it takes a while."""
    text = "".join(path.read_text() for path in sources(package)) + " ".join(operators())
    kept = STORE / f"{package}.{count}.{seed}.{hashlib.sha256(text.encode()).hexdigest()[:12]}.draw.json"
    if not kept.exists():
        drawn = _drawn(package, count, seed)
        kept.write_text(json.dumps([asdict(mutant) for mutant in drawn]))
    return [Mutant(**row) for row in json.loads(kept.read_text())]


def _drawn(package: str, count: int, seed: int) -> list[Mutant]:
    def order(*words: object) -> str:
        return hashlib.sha256("|".join(map(str, (seed, *words))).encode()).hexdigest()

    places = [place for path in sources(package) for place in of_module(path)]
    places.sort(key=lambda place: order(min(mutant.name for mutant in place)))
    drawn: list[Mutant] = []
    seen = set()  # `not a is b` and `a is not b` are one mutant of two places
    for place in places:
        for mutant in sorted(place, key=lambda mutant: order(mutant.name)):
            code = mutated(mutant)
            if code is not None and (key := (mutant.module, _bytecode(code))) not in seen:
                seen.add(key)
                pairs = zip((ROOT / mutant.module).read_text().splitlines(), code.splitlines(), strict=False)
                before, after = next((old, new) for old, new in pairs if old != new)
                drawn.append(replace(mutant, before=before.strip(), after=after.strip(), code=code))
                break
        if len(drawn) == count:
            break
    return drawn


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share k/n: the p with |k/n − p| ≤ z √(p(1 − p)/n)."""
    centre, half = (k + z * z / 2) / (n + z * z), z * sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return centre - half, centre + half


def entries() -> list[dict[str, str]]:
    """What is left out, as it stands in the file."""
    return tomllib.loads(EQUIVALENTS.read_text()).get("mutant", [])


@cache
def equivalents() -> dict[str, str]:
    """Reasons by name, of mutants that no test can tell from the original."""
    return {entry["name"]: entry["reason"] for entry in entries()}


def summary(package: str, drawn: list[Mutant], results: dict[str, dict]) -> str:
    """One row of docs/results.md."""
    judged = [mutant for mutant in drawn if mutant.name in results]
    real = [results[mutant.name]["status"] for mutant in judged if mutant.name not in equivalents()]
    caught = sum(status in ("killed", "timed out") for status in real)
    low, high = wilson(caught, len(real)) if real else (0.0, 1.0)
    counts = " | ".join(str(real.count(status)) for status in ("killed", "timed out", "survived", "no test"))
    share = f"{100 * caught / max(1, len(real)):.1f} % ({100 * low:.1f}–{100 * high:.1f})"
    return f"| {package} | {len(judged)} | {len(judged) - len(real)} | {counts} | {share} |"


def stored(package: str) -> dict[str, dict]:
    path = STORE / f"{package}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["name"]: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], prog="python -m tests.trust.mutants")
    parser.add_argument(
        "packages", nargs="+", choices=[*PACKAGES, "all"], metavar="PACKAGE", help=", ".join(PACKAGES)
    )
    parser.add_argument("--count", type=int, default=200, help="mutants to draw of each package")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of clean tests a mutant may take")
    parser.add_argument("--retry", action="store_true", help="run survivors again")
    parser.add_argument(
        "--show", action="store_true", help="print the survivors and the score of what is stored"
    )
    parser.add_argument(
        "--tests", nargs="+", help="of these files alone, as stability_parts; its own doctests too"
    )
    parser.add_argument("--only", help="run the mutants whose name begins so")
    parser.add_argument("--control", action="store_true", help="no fault: each mutant's tests must pass")
    options = parser.parse_args()
    packages = list(PACKAGES) if "all" in options.packages else options.packages
    STORE.mkdir(exist_ok=True)
    for package in packages:
        drawn = draw(package, options.count, options.seed)
        PACKAGES[package] = (PACKAGES[package][0], options.tests or PACKAGES[package][1])
        if not options.show:
            campaign(package, drawn, options)
        results = stored(package)
        if options.show:
            for mutant in drawn:
                row = results.get(mutant.name, {"status": "not run"})
                if row["status"] in ("survived", "no test") and mutant.name not in equivalents():
                    print(
                        f"\n{mutant.name} {mutant.module}:{mutant.line} {mutant.operator} [{row['status']}]"
                    )
                    print(f"  - {mutant.before}\n  + {mutant.after}")
        print(summary(package, drawn, results), flush=True)


def campaign(package: str, drawn: list[Mutant], options: argparse.Namespace) -> None:
    """Runs what has no result yet, or is asked for again, and writes each result as it comes."""
    from tests.trust import mutant_runs as runs

    known = stored(package)
    if options.control:  # the original for every mutant: a test that fails has no say
        todo = [replace(mutant, code="") for mutant in drawn]
    elif options.only:
        todo = [mutant for mutant in drawn if mutant.name.startswith(options.only)]
    else:
        again = ("survived", "no test") if options.retry else ()
        todo = [m for m in drawn if m.name not in known or known[m.name]["status"] in again]
        todo = [m for m in todo if m.name not in known or m.name not in equivalents()]
    file = STORE / (f"{package}.control.jsonl" if options.control else f"{package}.jsonl")
    runs.run(package, todo, options.budget, file)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
