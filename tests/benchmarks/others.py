"""What resode does where findings/ shows what others do: the same problems, and torchdiffeq and SciPy beside them.

    python -m tests.benchmarks.others          prints a line a row of "What the others really do"

The scripts in findings/ install the other libraries and run them; this runs with what the tests need. The row on the
ends of solves is here alone, because it takes SciPy and torchdiffeq over the 25 DETEST problems.
"""

import copy
import warnings
from statistics import median

import numpy as np
import torch
import torchdiffeq
from scipy.integrate import solve_ivp
from torch import nn

import resode
from resode.analysis.curvature import largest_hessian_eigenvalue
from tests.benchmarks.detest import PROBLEMS

F64 = torch.float64
SPAN = torch.tensor([0.0, 1.0], dtype=F64)


def times_of_stages() -> str:
    """The order of rk4 on x' = cos 3t."""
    errors = []
    for n in (32, 64):
        x = resode.odeint(
            lambda t, x: torch.cos(3 * t) + 0 * x, torch.ones(1).double(), SPAN, method="rk4", n_steps=n
        )
        errors.append(abs(x[-1].item() - 1 - np.sin(3) / 3))
    return f"halving rk4's step on x' = cos 3t divides the error by {errors[0] / errors[1]:.2f}"


def adams() -> str:
    """y' = −y over [0, 10] with outputs 0.1 apart."""
    t = torch.linspace(0, 10, 101, dtype=F64)
    y = resode.odeint(lambda t, y: -y, torch.ones(1).double(), t, method="explicit_adams")[-1].item()
    return f"explicit_adams gives y(10) = {y:.6g}; truth {np.exp(-10):.6g}"


def outputs_between_steps() -> str:
    """y'' = −y over [0, 10] at 12 times."""
    t = torch.linspace(0, 10, 12, dtype=F64)
    exact, parts = torch.stack([torch.sin(t), torch.cos(t)], 1), []
    for method, tol in (("bosh3", 1e-6), ("dopri5", 1e-9), ("dopri8", 1e-9)):
        y = resode.odeint(
            lambda t, y: torch.stack([y[1], -y[0]]), exact[0], t, method=method, rtol=tol, atol=tol
        )
        parts.append(f"{method} {(y - exact).abs().max().item() / tol:.3g}")
    return "error over tolerance of y'' = -y: " + ", ".join(parts)


def ends_of_solves(tol: float = 1e-6) -> str:
    """The state at t = 20 alone, over the tolerance, of dopri5 in three libraries; and the latest time asked for."""
    errors: dict[str, list[float]] = {"torchdiffeq": [], "scipy": [], "resode": []}
    for f, start in PROBLEMS.values():

        def on_arrays(t, y, f=f):
            return f(torch.tensor(t, dtype=F64), torch.from_numpy(y)).numpy()

        exact = solve_ivp(on_arrays, (0, 20), start, "DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
        given = torch.tensor(start, dtype=F64), 20 * SPAN
        found = {
            library.__name__: library.odeint(f, *given, method="dopri5", rtol=tol, atol=tol)[-1].numpy()
            for library in (torchdiffeq, resode)
        }
        found["scipy"] = solve_ivp(on_arrays, (0, 20), start, "RK45", rtol=tol, atol=tol).y[:, -1]
        for name, y in found.items():
            errors[name].append(float((abs(y - exact) / (1 + abs(exact))).max()) / tol)
    latest = {}
    for library in (torchdiffeq, resode):
        asked: list[float] = []
        library.odeint(
            lambda t, y, asked=asked: (asked.append(t.item()), -y)[1], torch.ones(1).double(), SPAN
        )
        latest[library.__name__] = round(max(asked), 3)
    worst = max(a / b for a, b in zip(errors["torchdiffeq"], errors["scipy"], strict=True))
    return (
        f"dopri5, error over tolerance {tol:g} at the end, median of 25: "
        + ", ".join(f"{name} {median(e):.3g}" for name, e in errors.items())
        + f"; torchdiffeq's over SciPy's at most {worst:.3g}; y' = -y over [0, 1] asks for times up to {latest}"
    )


def crossings() -> str:
    """The event (y − 2.5)(y − 5) on y' = 1."""
    ends = [
        resode.odeint_event(lambda t, y: torch.ones_like(y), torch.zeros(1).double(), SPAN[0], method=method,
                            event_fn=lambda t, y: (y - 2.5) * (y - 5))[0].item()
        for method in ("tsit5", "dopri5", "dopri8")
    ]  # fmt: skip
    return f"(y - 2.5)(y - 5) ends at {ends}"


def kinks() -> str:
    """The linear data of findings/torchcde-kinks-of-linear-data.sh, as a field of t."""
    plain, told = [], []
    for n, seed in ((10, 0), (20, 1), (50, 2)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, n, 2, generator=generator, dtype=F64)[0]
        a = torch.randn(2, 3, 3, generator=generator, dtype=F64) / 2
        steps = x.diff(dim=0)

        def field(t, z, a=a, steps=steps):
            return torch.einsum("c,cij,j->i", steps[min(max(int(t), 0), len(steps) - 1)], a, z)

        start = exact = torch.ones(3, dtype=F64)
        for step in steps:
            exact = torch.linalg.matrix_exp(torch.einsum("c,cij->ij", step, a)) @ exact
        for options, into in (({}, plain), ({"jump_t": list(range(1, n - 1))}, told)):
            z = resode.odeint(field, start, torch.tensor([0.0, n - 1.0], dtype=F64), rtol=1e-4, atol=1e-6,
                              options=options)[-1]  # fmt: skip
            into.append(round(((z - exact).norm() / exact.norm()).item() / 1e-4, 1))
    return f"relative error over 1e-4 along linear data: {plain} as it is, {told} with jump_t"


def fixed_point() -> str:
    """z = 0.99 z + 0.02, as the field −0.01 z + 0.02."""
    found = resode.find_fixed_points(lambda z: -0.01 * z + 0.02, torch.zeros(1, 1, dtype=F64))
    return f"the fixed point of 0.99 z + 0.02: {found.points.flatten().tolist()}, steps {found.iterations.flatten().tolist()}"


def intervals() -> str:
    """Imaginary stability intervals."""
    names = ("tsit5", "dopri8", "dopri5", "rk4")
    return "imaginary intervals " + str({name: resode.imaginary_stability_interval(name) for name in names})


def hessians() -> str:
    """The network of findings/pyhessian-eval-mode.sh."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).train()
    data = torch.randn(64, 5) * 3 + 2, torch.randint(3, (64,))
    values = {
        name: round(largest_hessian_eigenvalue(m, nn.CrossEntropyLoss(), data, tol=1e-6), 4)
        for name, m in (("training", model), ("evaluation", copy.deepcopy(model).eval()))
    }
    return f"largest Hessian eigenvalue {values}; model.training stays {model.training}"


ROWS = (
    times_of_stages, adams, outputs_between_steps, ends_of_solves, crossings, kinks, fixed_point, intervals, hessians,
)  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for row in ROWS:
        print(f"resode, {row.__name__.replace('_', ' ')}: {row()}", flush=True)
