"""The C++ of a solve by rows: formulas in vector registers, a row to a lane, and the steps around them.

Each lane carries one row from its start to its end, with its own time and step where they are its own, and
takes the next row when it is done. Time and step are doubles, whatever the state's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from resode.solve.kernels.rows import Formulas
from resode.tableaus import ButcherTableau

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|",
         "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}  # fmt: skip

INLINED = 128
"""Fields of so many operations stand in the code of a step; larger ones, once, as a function."""

TEMPLATE = Path(__file__).with_name("solve.cpp")


def interpolates(tableau: ButcherTableau) -> bool:
    """Whether the state within a step is a polynomial of the stages of the step."""
    return not tableau.dense_rows and (tableau.interpolant is not None or tableau.order <= 3)


def source(tableau: ButcherTableau, formulas: Formulas, field: Sequence[int], back: dict[int, int] | None,
           dtype: str, leaves: tuple[list[tuple[int, int]], list[tuple[int, int, int]]]) -> str:  # fmt: skip
    """The text of the kernel.

    Args:
        tableau: an explicit method with an error estimate.
        formulas: of the field, and of its adjoint.
        field: the numbers of its entries.
        back: the adjoints of its leaves, as formulas of cotangents ("bar", i); None for no way back.
        dtype: "float" or "double".
        leaves: the shared and the own entries of inputs, in the order in which the kernel holds them.
    """
    shared, own = leaves
    place = {("shared", *leaf): f"shared[{i}]" for i, leaf in enumerate(shared)}
    place |= {("own", *leaf): f"own[{i}]" for i, leaf in enumerate(own)}
    n = len(field)
    lines = [*_statements(formulas, field, place), *(f"dx[{i}] = n{r};" for i, r in enumerate(field))]
    text = TEMPLATE.read_text()
    pulled: list[str] = []
    if back is not None:
        pulled = _statements(formulas, back.values(), place)
        target = {"x": "xbar", "shared": "sharedbar", "own": "ownbar"}
        for leaf, bar in back.items():
            kind, *where = formulas.nodes[leaf]
            if kind != "t":
                i = where[0] if kind == "x" else (shared if kind == "shared" else own).index(tuple(where))
                pulled.append(f"{target[kind]}[{i}] += n{bar};")
    last = tableau.b_row[-1][0] + 1  # the stages that x⁺ needs, and the index of the one at the step's end
    combinations = [
        f"for (int j = 0; j < N; ++j) GOAL[j] = x[j] + h * ({_weighted('k', row)});"
        for row in [*tableau.a_rows[1:last], tableau.b_row]
    ]
    times = [*(f"times({c!r})" for c in tableau.stage_times[1:last]), "t_end"]
    steps, replay, steps_back = list[str](), list[str](), list[str]()
    for i, (combination, time) in enumerate(zip(combinations, times, strict=True), 1):
        goal, kept = ("x1", "x1") if i == last else ("z", f"z[{i}]")
        steps.append(combination.replace("GOAL", goal))
        steps.append(f"field({time}, {goal}, shared, own, k[{i}]);")
        replay.append(combination.replace("GOAL", kept))
        if i < last:
            replay.append(f"field({time}, {kept}, shared, ownv, k[{i}]);")
        row = tableau.b_row if i == last else tableau.a_rows[i]
        back_ = [
            "{ V zbar[N];",
            f"for (int j = 0; j < N; ++j) zbar[j] = {'xbar[j]' if i == last else 'V(0)'};",
            f"pull({time}, {kept}, shared, ownv, kbar[{i}], zbar, sharedbar, ownbar);",
            "for (int j = 0; j < N; ++j) { const V hz = h * zbar[j];",
            *(f"kbar[{s}][j] = at::vec::fmadd(V({c!r}), hz, kbar[{s}][j]);" for s, c in row),
            f"xbar[j] = {'zbar[j]' if i == last else 'xbar[j] + zbar[j]'}; }} }}",
        ]
        steps_back[:0] = back_
    polynomial, powers, weights = _polynomial(tableau, last)
    filled = {
        "SCALAR": dtype,
        "N_STATE": str(n),
        "N_STAGES": str(last),
        "N_SHARED": str(len(shared)),
        "N_OWN": str(len(own)),
        "SHARED_TABLE": ", ".join(f"{{{i}, {o}}}" for i, o in shared) or "{0, 0}",
        "OWN_TABLE": ", ".join(f"{{{i}, {o}, {s}}}" for i, o, s in own) or "{0, 0, 0}",
        "FIELD": "\n".join(lines),
        "PULL": "\n".join(pulled),
        "STAGES": "\n".join(steps),
        "STAGES_BACK": "\n".join(steps_back),
        "REPLAY": "\n".join(replay),
        "ERROR": _weighted("k", tableau.error_row),
        "POWERS": str(powers),
        "POLYNOMIAL": polynomial,
        "POLYNOMIAL_BACK": weights,
        "INLINE_FIELD": "static INLINE" if len(formulas.nodes) <= INLINED else "static NOT_INLINE",
        "WAY_BACK": str(int(back is not None)),
    }
    for name, value in filled.items():
        text = text.replace(f"@{name}@", value)
    return text


def _weighted(k: str, row: Sequence[tuple[int, float]]) -> str:
    (first, c), *rest = row
    total = f"{k}[{first}][j] * V({c!r})"
    for i, c in rest:
        total = f"at::vec::fmadd({k}[{i}][j], V({c!r}), {total})"
    return total


def _polynomial(tableau: ButcherTableau, last: int) -> tuple[str, int, str]:
    """Coefficients of θ, θ², … of the state within a step: their code, how many, and the way back.

    The state is x + Σ_p θ^p c_p; cotangents of c_p go back to stages, x and x1.
    """
    if tableau.interpolant is not None and not tableau.dense_rows:
        powers = len(tableau.interpolant[0])
        columns = [
            [(i, float(row[p])) for i, row in enumerate(tableau.interpolant) if row[p]] for p in range(powers)
        ]
        code = [f"c[{p}][j] = h * ({_weighted('k', column)});" for p, column in enumerate(columns)]
        back = [
            f"kbar[{i}][j] = at::vec::fmadd(V({c!r}), h * cbar[{p}][j], kbar[{i}][j]);"
            for p, column in enumerate(columns)
            for i, c in column
        ]
        return "\n".join(code), powers, "\n".join(back)
    if tableau.order <= 3:
        code = (
            f"V rise = x1[j] - x[j], s0 = h * k[0][j], s1 = h * k[{last}][j];\n"
            "c[0][j] = s0; c[1][j] = V(3) * rise - V(2) * s0 - s1; c[2][j] = s0 + s1 - V(2) * rise;"
        )
        back = (
            "V rise = V(3) * cbar[1][j] - V(2) * cbar[2][j];\n"
            "xbar[j] = xbar[j] + rise; start[j] = start[j] - rise;\n"
            "kbar[0][j] = kbar[0][j] + h * (cbar[0][j] - V(2) * cbar[1][j] + cbar[2][j]);\n"
            f"kbar[{last}][j] = kbar[{last}][j] + h * (cbar[2][j] - cbar[1][j]);"
        )
        return code, 3, back
    return "c[0][j] = V(0);", 1, ""


def _statements(formulas: Formulas, wanted: Iterable[int], place: dict[tuple, str]) -> list[str]:
    """The formulas that `wanted` needs, one statement each, in order."""
    needed, stack = set[int](), list(wanted)
    while stack:
        i = stack.pop()
        if i not in needed:
            needed.add(i)
            op, *args = formulas.nodes[i]
            if op not in ("number", "t", "x", "shared", "own", "bar"):
                stack += args
    return [f"const V n{i} = {_expression(formulas, i, place)};" for i in sorted(needed)]


def _expression(formulas: Formulas, i: int, place: dict[tuple, str]) -> str:
    op, *args = formulas.nodes[i]
    match op:
        case "number":
            value = args[0]
            special = {"inf": "INFINITY", "-inf": "-INFINITY", "nan": "NAN"}
            return f"V(S({special.get(repr(value), repr(value))}))"
        case "t":
            return "t"
        case "x":
            return f"x[{args[0]}]"
        case "shared":
            return f"V({place[op, *args]})"
        case "own":
            return place[op, *args]
        case "bar":
            return f"bar[{args[0]}]"
        case "where":
            truth, a, b = args
            return f"V::blendv(n{b}, n{a}, n{truth})"
        case "as_number":
            return f"V::blendv(V(0), V(1), n{args[0]})"
        case "not":
            return f"V::blendv(V(0) == V(0), V(0) != V(0), n{args[0]})"
        case "maximum" | "minimum":
            return f"at::vec::{op}(n{args[0]}, n{args[1]})"
        case "sigmoid":
            return f"V(1) / (V(1) + n{args[0]}.neg().exp())"
        case "sign":
            a = f"n{args[0]}"
            return f"V::blendv(V::blendv({a}, V(1), {a} > V(0)), V(-1), {a} < V(0))"
        case "pow":
            return f"n{args[0]}.pow(n{args[1]})"
        case _ if op in INFIX:
            return f"n{args[0]} {INFIX[op]} n{args[1]}"
    return f"n{args[0]}.{op}()"
