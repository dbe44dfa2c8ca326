"""The 25 non-stiff DETEST problems: error against tolerance, and evaluations, beside two other libraries.

    python -m tests.benchmarks.detest            prints the tables
    python -m tests.benchmarks.detest --write    puts them into docs/solvers.md

Problems: Hull, Enright, Fellen & Sedgwick, Comparing Numerical Methods for Ordinary Differential
Equations, SIAM J. Numer. Anal. 9 (1972); all over 0 ≤ t ≤ 20.
"""

import sys
import warnings
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchdiffeq
from scipy.integrate import solve_ivp
from scipy.special import jv, jvp

from resode import odeint

D = torch.float64
TIMES = torch.linspace(0, 20, 21, dtype=D)
OURS = ("bosh3", "fehlberg45", "dopri5", "tsit5", "dopri8")
COLUMNS = (
    *(("resode", name) for name in OURS),
    *(("torchdiffeq", name) for name in ("bosh3", "dopri5", "dopri8")),
    *(("scipy", name) for name in ("RK23", "RK45", "DOP853")),
)
TOLERANCES = (1e-3, 1e-6, 1e-9)
THIRD_ORDER = ("bosh3", "RK23")  # not run at 1e-9, where they take hundreds of thousands of steps


def vector(*entries):
    return torch.stack([torch.as_tensor(e, dtype=D) for e in entries])


def b4(t, y):
    r = (y[0] ** 2 + y[1] ** 2).sqrt()
    return vector(-y[1] - y[0] * y[2] / r, y[0] - y[1] * y[2] / r, y[0] / r)


def linear(matrix):
    matrix = torch.tensor(matrix, dtype=D)
    return lambda t, y: matrix @ y


def chain(rates):
    """Radioactive decay: y_i decays at rates[i] into y_{i+1}; the last one is stable."""
    n = len(rates) + 1
    return linear(np.diag([*(-r for r in rates), 0.0]) + np.diag(rates, -1)), unit(n)


def diffusion(n):
    return linear(np.diag([-2.0] * n) + np.diag([1.0] * (n - 1), 1) + np.diag([1.0] * (n - 1), -1)), unit(n)


def unit(n):
    return [1.0] + [0.0] * (n - 1)


G, SUN = 2.95912208286, 1.00000597682
PLANETS = torch.tensor(
    [0.000954786104043, 0.000285583733151, 0.0000437273164546, 0.0000517759138449, 0.00000277777777778],
    dtype=D,
)
OUTER = [
    3.42947415189, 3.35386959711, 1.35494901715, 6.64145542550, 5.97156957878, 2.18231499728,
    11.2630437207, 14.6952576794, 6.27960525067, -30.1552268759, 1.65699966404, 1.43785752721,
    -21.1238353380, 28.4465098142, 15.3882659679,
    -0.557160570446, 0.505696783289, 0.230578543901, -0.415570776342, 0.365682722812, 0.169143213293,
    -0.325325669158, 0.189706021964, 0.0877265322780, -0.0240476254170, -0.287659532608, -0.117219543175,
    -0.176860753121, -0.216393453025, -0.0148647893090,
]  # fmt: skip


def five_bodies(t, y):
    """Jupiter to Pluto about the sun, in heliocentric coordinates."""
    x, v = y.reshape(2, 5, 3)
    between = x[None] - x[:, None]  # [i, j] from i to j
    cubed = between.norm(dim=-1) ** 3 + torch.eye(5, dtype=D)
    r3 = x.norm(dim=-1, keepdim=True) ** 3
    pull = (PLANETS[None, :, None] * between / cubed[..., None]).sum(1)
    indirect = PLANETS[:, None] * x / r3
    a = G * (-(SUN + PLANETS[:, None]) * x / r3 + pull - (indirect.sum(0) - indirect))
    return torch.cat([v.reshape(-1), a.reshape(-1)])


def kepler(t, y):
    r3 = (y[0] ** 2 + y[1] ** 2) ** 1.5
    return vector(y[2], y[3], -y[0] / r3, -y[1] / r3)


def ellipse(e):
    return kepler, [1 - e, 0.0, 0.0, ((1 + e) / (1 - e)) ** 0.5]


PROBLEMS = {
    "A1": (lambda t, y: -y, [1.0]),
    "A2": (lambda t, y: -(y**3) / 2, [1.0]),
    "A3": (lambda t, y: y * torch.cos(t), [1.0]),
    "A4": (lambda t, y: y / 4 * (1 - y / 20), [1.0]),
    "A5": (lambda t, y: (y - t) / (y + t), [4.0]),
    "B1": (lambda t, y: vector(2 * (y[0] - y[0] * y[1]), -(y[1] - y[0] * y[1])), [1.0, 3.0]),
    "B2": (linear([[-1, 1, 0], [1, -2, 1], [0, 1, -1]]), [2.0, 0.0, 1.0]),
    "B3": (lambda t, y: vector(-y[0], y[0] - y[1] ** 2, y[1] ** 2), [1.0, 0.0, 0.0]),
    "B4": (b4, [3.0, 0.0, 0.0]),
    "B5": (lambda t, y: vector(y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]), [0.0, 1.0, 1.0]),
    "C1": chain([1.0] * 9),
    "C2": chain([float(i) for i in range(1, 10)]),
    "C3": diffusion(10),
    "C4": diffusion(51),
    "C5": (five_bodies, OUTER),
    **{f"D{i}": ellipse(e) for i, e in enumerate((0.1, 0.3, 0.5, 0.7, 0.9), 1)},
    "E1": (
        lambda t, y: vector(y[1], -(y[1] / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * y[0])),
        [float(jv(0.5, 1)), float(jvp(0.5, 1))],
    ),
    "E2": (lambda t, y: vector(y[1], (1 - y[0] ** 2) * y[1] - y[0]), [2.0, 0.0]),
    "E3": (lambda t, y: vector(y[1], y[0] ** 3 / 6 - y[0] + 2 * torch.sin(2.78535 * t)), [0.0, 0.0]),
    "E4": (lambda t, y: vector(y[1], 0.032 - 0.4 * y[1] ** 2), [30.0, 0.0]),
    "E5": (lambda t, y: vector(y[1], (1 + y[1] ** 2).sqrt() / (25 - t)), [0.0, 0.0]),
}


def solve(library: str, method: str, name: str, tol: float, atol: float | None = None):
    """States at TIMES, and the evaluations they took."""
    f, start = PROBLEMS[name]
    atol = tol if atol is None else atol
    y0, calls = torch.tensor(start, dtype=D), 0

    def counted(t, y):
        nonlocal calls
        calls += 1
        return f(t, y)

    with torch.no_grad():
        if library == "scipy":

            def outside(t, y):
                return counted(torch.tensor(t, dtype=D), torch.from_numpy(y)).numpy()

            result = solve_ivp(outside, (0, 20), start, method, TIMES.numpy(), rtol=tol, atol=atol)
            return torch.from_numpy(result.y.T), calls
        solver = odeint if library == "resode" else torchdiffeq.odeint
        return solver(counted, y0, TIMES, method=method, rtol=tol, atol=atol), calls


def reference(name: str):
    return solve("scipy", "DOP853", name, 1e-12, 1e-13)[0]


def error(y, exact) -> float:
    """Largest |y − exact| / (1 + |exact|) over entries and times: what rtol = atol bounds in one step."""
    return float(((y - exact).abs() / (1 + exact.abs())).max())


def at_equal_error(name: str, method: str, exact: torch.Tensor, tol: float = 1e-6) -> tuple[int, int, float]:
    """torchdiffeq's evaluations at a tolerance, ours at the loosest one that is as exact, and that one.

    Of tolerances a quarter of a decade apart; errors jump about, so all those of the decade below must be as
    exact too: no tolerance is taken for its luck.
    """
    y, theirs = solve("torchdiffeq", method, name, tol)
    wanted = error(y, exact)
    found: list[tuple[int, float]] = []
    for k in range(12, -13, -1):
        loose = tol * 10 ** (k / 4)
        y, ours = solve("resode", method, name, loose)
        found = [*found, (ours, loose)] if error(y, exact) <= wanted else []
        if len(found) == 5:
            return theirs, *found[0]
    raise AssertionError(f"no tolerance down to {loose:.1g} is as exact as torchdiffeq on {name}")


def equal_errors(exact: dict[str, torch.Tensor]) -> str:
    """Two tables of `at_equal_error` of all problems: together, and dopri8 one by one."""
    lines = [
        "### Evaluations at torchdiffeq's error, its tolerance 1e-6",
        "",
        "| | median, torchdiffeq | median, resode | sum, torchdiffeq | sum, resode | fewer on |",
        "|---" * 6 + "|",
    ]
    for method in ("bosh3", "dopri5", "dopri8"):
        rows = [at_equal_error(name, method, exact[name]) for name in PROBLEMS]
        theirs, ours, tolerances = zip(*rows, strict=True)
        fewer = sum(b < a for a, b in zip(theirs, ours, strict=True))
        lines.append(
            f"| {method} | {median(theirs)} | {median(ours)} | {sum(theirs)} | {sum(ours)} | {fewer} of 25 |"
        )
    lines += ["", "dopri8 (the last) one by one, with resode's tolerance:", ""]
    for first in range(0, len(PROBLEMS), 13):
        part = slice(first, first + 13)
        columns = [list(PROBLEMS)[part], theirs[part], ours[part], [f"{t:.1e}" for t in tolerances[part]]]
        heads = ("problem", "torchdiffeq", "resode", "at tolerance")
        for head, column in zip(heads, columns, strict=True):
            lines.append(f"| {head} | " + " | ".join(map(str, column)) + " |")
            lines += ["|---" * (len(column) + 1) + "|"] if head == "problem" else []
        lines.append("")
    return "\n".join(lines).rstrip()


def tables() -> str:
    exact = {name: reference(name) for name in PROBLEMS}
    results = {}
    for tol in TOLERANCES:
        for library, method in COLUMNS:
            if tol == 1e-9 and method in THIRD_ORDER:
                continue
            for name in PROBLEMS:
                y, calls = solve(library, method, name, tol)
                results[tol, library, method, name] = error(y, exact[name]) / tol, calls
    head = "| " + " | ".join(f"{library} {method}" for library, method in COLUMNS) + " |"
    rule = "|---" * (len(COLUMNS) + 1) + "|"
    parts = []
    for tol, index, title in ((1e-6, 0, "Largest error / tolerance, tolerance 1e-6"),
                              (1e-6, 1, "Evaluations, tolerance 1e-6")):  # fmt: skip
        lines = [f"### {title}", "", "| problem " + head, rule]
        for name in PROBLEMS:
            row = [results[tol, *column, name][index] for column in COLUMNS]
            lines.append(
                f"| {name} | " + " | ".join(f"{x:.3g}" if index == 0 else str(x) for x in row) + " |"
            )
        parts.append("\n".join(lines))
    lines = ["### Median of the 25: error / tolerance (evaluations)", "", "| tolerance " + head, rule]
    for tol in TOLERANCES:
        row = []
        for column in COLUMNS:
            pairs = [results.get((tol, *column, name)) for name in PROBLEMS]
            known = [p for p in pairs if p is not None]
            row.append(
                f"{median(p[0] for p in known):.3g} ({median(p[1] for p in known):.0f})" if known else "–"
            )
        lines.append(f"| {tol:g} | " + " | ".join(row) + " |")
    parts.append("\n".join(lines))
    parts.append(equal_errors(exact))
    return "\n\n".join(parts)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    text = tables()
    print(text)
    if "--write" in sys.argv:
        page = Path(__file__).parents[2] / "docs" / "solvers.md"
        before, _, _ = page.read_text().partition("<!-- detest -->")
        page.write_text(f"{before}<!-- detest -->\n\n{text}\n")
