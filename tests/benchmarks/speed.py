"""Solving beside other libraries: `make bench`, or `python -m tests.benchmarks.speed [--write]`.

All ways of a case run in one process, in turns; a ratio is of medians of the same rounds. Libraries that are
not installed are left out and said so; diffrax runs in an environment of its own (--diffrax PYTHON).
"""

import argparse
import json
import math
import re
import subprocess
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchdiffeq
from torch import nn

import resode
from resode import ResidualStack, odeint
from resode.fields import ConvField
from resode.solve.step import rk_step
from tests.benchmarks.timing import Row, in_turns, machine, refuse_a_loaded_machine, rows, table, to_json

try:
    import torchode
except ImportError:
    torchode = None
try:
    from torchdyn.numerics import odeint as torchdyn_odeint
except ImportError:
    torchdyn_odeint = None

D = torch.float64
PAGE = Path(__file__).parents[2] / "docs" / "speed.md"


def van_der_pol(t, y):
    x, v = y[..., 0], y[..., 1]
    return torch.stack((v, 2 * (1 - x * x) * v - x), -1)


def starts(batch: int) -> torch.Tensor:
    return 1.5 * torch.randn(batch, 2, generator=torch.Generator().manual_seed(0), dtype=D)


def torchode_solver(tol: float):
    term = torchode.ODETerm(van_der_pol)
    controller = torchode.IntegralController(atol=tol, rtol=tol, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller)
    return lambda y0, t: solver.solve(
        torchode.InitialValueProblem(y0=y0, t_eval=t.expand(len(y0), -1))
    ).ys.transpose(0, 1)


def peers(tol: float) -> dict:
    """Each library's way to solve from y0 over t."""
    found = {
        "torchdiffeq": lambda y0, t: torchdiffeq.odeint(
            van_der_pol, y0, t, method="dopri5", rtol=tol, atol=tol
        )
    }
    if torchode is not None:
        found["torchode"] = torchode_solver(tol)
    if torchdyn_odeint is not None:
        found["torchdyn"] = lambda y0, t: torchdyn_odeint(
            van_der_pol, y0, t, solver="dopri5", rtol=tol, atol=tol
        )[1]
    return found


def ours(tol: float, method: str = "dopri5") -> dict:
    """resode's ways."""
    return {
        f"{'per sample' if per_sample else 'whole'}, {'compiled' if compile else 'eager'}": (
            lambda y0, t, per_sample=per_sample, compile=compile: odeint(
                van_der_pol, y0, t, method=method, rtol=tol, atol=tol, per_sample=per_sample, compile=compile
            )
        )
        for per_sample in (True, False)
        for compile in (False, True)
    }


def small_systems(rounds: int, diffrax: str | None) -> list[Row]:
    """256 Van der Pol systems, μ = 2, 200 outputs over [0, 10], tolerance 1e-6, float64."""
    y0, t, tol = starts(256), torch.linspace(0, 10, 200, dtype=D), 1e-6
    exact = odeint(van_der_pol, y0, t, method="dopri8", rtol=1e-12, atol=1e-12)
    solvers = {**peers(tol), **ours(tol)}
    errors = {name: float((solve(y0, t) - exact).square().mean().sqrt()) for name, solve in solvers.items()}
    known = [name for name in ("torchode", "torchdiffeq") if name in solvers]
    rival = known[0]
    over = {"per sample, eager": rival, "per sample, compiled": rival,
            "whole, eager": "torchdiffeq", "whole, compiled": "torchdiffeq"}  # fmt: skip
    bars = {
        "per sample, eager": 0.55,
        "per sample, compiled": 0.12,
        "whole, eager": 0.65,
        "whole, compiled": 0.2,
    }
    found = []
    with torch.no_grad():
        seconds = in_turns(
            {name: lambda solve=solve: solve(y0, t) for name, solve in solvers.items()}, rounds
        )
    found += rows("256 Van der Pol systems", seconds, over, bars, errors)
    peer = by_diffrax(diffrax, y0, t, tol, rounds, exact) if diffrax else None
    if peer:
        found += beside(peer, "", seconds, errors, {"per sample": 1.0, "whole": 0.8})

    start = y0.clone().requires_grad_()
    seconds = in_turns(
        {
            name: lambda solve=solve: torch.autograd.grad(solve(start, t).square().sum(), start)
            for name, solve in solvers.items()
            if name != "torchdyn"
        },
        rounds,
    )
    over = {name: known for name in ours(tol)}
    bars = {
        "per sample, eager": 0.8,
        "per sample, compiled": 0.4,
        "whole, eager": 0.8,
        "whole, compiled": 0.4,
    }
    found += rows("256 Van der Pol systems, gradient to y0", seconds, over, bars)
    if peer:
        found += beside(peer, ", gradient", seconds, {}, {"per sample": 0.6, "whole": 0.8})
    return found


def by_diffrax(python: str, y0, t, tol: float, rounds: int, exact) -> dict:
    """What diffrax takes for the same solves, in its own process: not in turns."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "given.npz", Path(folder) / "y.npz"
        np.savez(given, y0=y0.numpy(), t=t.numpy(), tol=tol)
        script = Path(__file__).with_name("diffrax_peer.py")
        done = subprocess.run(
            [python, str(script), str(given), str(rounds), str(result)],
            capture_output=True, text=True, check=True, env={"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"},
        )  # fmt: skip
        told = json.loads(done.stdout.splitlines()[-1])
        told["errors"] = {
            way: float(
                (torch.from_numpy(np.load(result)[way.replace(" ", "_")]) - exact).square().mean().sqrt()
            )
            for way in ("per sample", "whole")
        }
    return told


def beside(peer: dict, what: str, seconds: dict, errors: dict, bars: dict) -> list[Row]:
    """Rows of compiled solves over diffrax's: one for each way of choosing steps."""
    found = []
    for way, bar in bars.items():
        theirs, own = f"{way}, diffrax {peer['version']} (jitted, max_steps 512)", f"{way}, compiled"
        both = {theirs: peer["seconds"][way + what], own: seconds[own]}
        known = {theirs: peer["errors"][way], own: errors[own]} if errors else {}
        found += rows(
            f"256 Van der Pol systems{what}, beside diffrax", both, {own: theirs}, {own: bar}, known
        )
    return found


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))

    def forward(self, t, y):
        return self.net(y)


def network_field(rounds: int) -> list[Row]:
    """An MLP field 64 → 128 → 64, tanh, batch 128, float32."""
    torch.manual_seed(0)
    field, y0, t = MLP(), torch.randn(128, 64), torch.tensor([0.0, 1.0])
    case, tol = "MLP field, adaptive 1e-6, end state", dict(rtol=1e-6, atol=1e-6)
    exact = odeint(field.double(), y0.double(), t, method="dopri8", rtol=1e-11, atol=1e-11)[-1]
    field.float()
    ways = {
        "torchdiffeq": lambda: torchdiffeq.odeint(field, y0, t, method="dopri5", **tol),
        **{
            f"{'per sample' if per else 'whole'}, {'compiled' if c else 'eager'}": (
                lambda per=per, c=c: odeint(field, y0, t, compile=c, per_sample=per, **tol)
            )
            for per in (False, True)
            for c in (False, True)
        },
    }
    over = {name: "torchdiffeq" for name in ways if name != "torchdiffeq"}
    with torch.no_grad():
        errors = {name: float((solve()[-1] - exact).square().mean().sqrt()) for name, solve in ways.items()}
        found = rows(case, in_turns(ways, rounds), over, {"whole, compiled": 0.4}, errors)

    def backward(y):
        return torch.autograd.grad(y[-1].sum(), list(field.parameters()))

    for ours_name, theirs, evaluations in (("euler", "euler", 32), ("rk4_38", "rk4", 128)):
        fixed = {
            "torchdiffeq": lambda m=theirs: torchdiffeq.odeint(
                field, y0, t, method=m, options={"step_size": 1 / 32}
            ),
            "eager": lambda m=ours_name: odeint(field, y0, t, method=m, n_steps=32),
            "compiled": lambda m=ours_name: odeint(field, y0, t, method=m, n_steps=32, compile=True),
        }

        def alone(n=evaluations):
            y = y0
            for _ in range(n):
                y = field(t, y)  # the evaluations and nothing else
            return y[None]

        def by_hand(m=ours_name):
            y = y0
            for _ in range(32):
                y = rk_step(resode.METHODS[m], field, t[0], y, 1 / 32)  # one step and nothing else
            return y[None]

        over = {"eager": "torchdiffeq", "compiled": "torchdiffeq", "a bare loop of steps": "torchdiffeq"}
        ways = {**fixed, "a bare loop of steps": by_hand, "the evaluations alone": alone}
        with torch.no_grad():
            seconds = in_turns(ways, rounds)
        case = f"MLP field, 32 fixed steps of {ours_name}"
        found += rows(case, seconds, over, {"eager": 0.87, "compiled": 0.62})
        over = {"eager": "the evaluations alone", "a bare loop of steps": "the evaluations alone"}
        found += [r for r in rows(f"{case}, over the evaluations", seconds, over, {"eager": 1.05}) if r.ratio]
        seconds = in_turns(
            {name: lambda solve=solve: backward(solve()) for name, solve in fixed.items()}, rounds
        )
        over = {"eager": "torchdiffeq", "compiled": "torchdiffeq"}
        found += rows(f"{case}, with backward", seconds, over, {"compiled": 0.7})
    return found


class Conv(nn.Module):
    def __init__(self, field: nn.Module):
        super().__init__()
        self.field = field

    def forward(self, t, y):
        return self.field(y)


def convolutions(rounds: int) -> list[Row]:
    """A conv field of 16 channels on 32×32, batch 32, 8 steps of rk4: channels-last here, as given there."""
    torch.manual_seed(0)
    field = Conv(ConvField(16, norm="group"))
    y0, t = torch.randn(32, 16, 32, 32), torch.tensor([0.0, 1.0])
    last = Conv(ConvField(16, norm="group")).to(memory_format=torch.channels_last)
    last.load_state_dict(field.state_dict())
    y0_last = y0.to(memory_format=torch.channels_last)
    ways = {
        "torchdiffeq": lambda: torchdiffeq.odeint(field, y0, t, method="rk4", options={"step_size": 1 / 8})[
            -1
        ],
        "eager, channels-last": lambda: odeint(last, y0_last, t, method="rk4_38", n_steps=8)[-1],
    }
    over = {"eager, channels-last": "torchdiffeq"}
    with torch.no_grad():
        found = rows(
            "conv field, 8 steps of rk4_38", in_turns(ways, rounds), over, {"eager, channels-last": 0.7}
        )

    def backward(solve, field):
        torch.autograd.grad(solve().square().sum(), list(field.parameters()))

    both = {
        "torchdiffeq": lambda: backward(ways["torchdiffeq"], field),
        "eager, channels-last": lambda: backward(ways["eager, channels-last"], last),
    }
    return found + rows(
        "conv field, 8 steps of rk4_38, with backward",
        in_turns(both, rounds),
        over,
        {"eager, channels-last": 0.82},
    )


def held_at_most(run) -> int:
    """The most bytes that tensors of the CPU's allocator hold above the start, by the profiler's memory events."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = most = 0
    for _, size in sorted(memory_events(recorded)):
        held += size
        most = max(most, held)
    return most


def memory_events(recorded) -> list[tuple[int, int]]:
    """(time, bytes) of every allocation and release."""
    found, stack = [], list(recorded.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack += event.children
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return found


def depth(rounds: int) -> list[Row]:
    """54 conv blocks of 16 channels on 32×32, batch 64: autograd against checkpoint."""
    torch.manual_seed(0)
    stack = ResidualStack([ConvField(16) for _ in range(54)])
    x = torch.randn(64, 16, 32, 32)

    def run(gradient: str):
        stack.gradient = gradient
        return torch.autograd.grad(stack(x).square().mean(), list(stack.parameters()))

    grads, memory = {}, {}
    for gradient in ("autograd", "checkpoint"):
        grads[gradient] = run(gradient)
        memory[gradient] = held_at_most(lambda g=gradient: run(g))
    scale = max(float(g.abs().max()) for g in grads["autograd"])
    difference = max(float((a - b).abs().max()) for a, b in zip(*grads.values(), strict=True)) / scale
    ratio = memory["checkpoint"] / memory["autograd"]
    ways = {gradient: lambda g=gradient: run(g) for gradient in memory}
    found = rows("54 conv blocks, batch 64, gradient", in_turns(ways, rounds), {"checkpoint": "autograd"},
                 {"checkpoint": 1.4})  # fmt: skip
    peak = Row("54 conv blocks, tensors held at most (MB in the column of ms)", "checkpoint",
               memory["checkpoint"] / 1e6, math.nan, math.nan, f"autograd's {memory['autograd'] / 1e6:.0f} MB",
               ratio, 0.27, difference)  # fmt: skip
    return [*found, peak]


def autonomous(field: nn.Module, t, y):
    return field(y)


def growth(rounds: int) -> list[Row]:
    """How the times grow with batch and state, without gradient."""
    found = []
    for batch in (1, 16, 256, 4096):
        y0, t, tol = starts(batch), torch.linspace(0, 10, 50, dtype=D), 1e-6
        solvers = {"torchdiffeq": peers(tol)["torchdiffeq"], **ours(tol)}
        with torch.no_grad():
            seconds = in_turns({n: partial(s, y0, t) for n, s in solvers.items()}, max(3, rounds // 3))
        over = {name: "torchdiffeq" for name in ours(tol)}
        found += rows(f"{batch} Van der Pol systems, 50 outputs", seconds, over)
    for width in (16, 256, 1024):
        torch.manual_seed(0)
        field = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        y0, t = torch.randn(32, width), torch.tensor([0.0, 1.0])
        call = partial(autonomous, field)
        ways = {
            "torchdiffeq": lambda call=call, y0=y0, t=t: torchdiffeq.odeint(
                call, y0, t, rtol=1e-5, atol=1e-5
            ),
            "whole, eager": lambda call=call, y0=y0, t=t: odeint(call, y0, t, rtol=1e-5, atol=1e-5),
            "per sample, eager": lambda call=call, y0=y0, t=t: odeint(
                call, y0, t, rtol=1e-5, atol=1e-5, per_sample=True
            ),
        }
        with torch.no_grad():
            seconds = in_turns(ways, max(3, rounds // 3))
        over = {"whole, eager": "torchdiffeq", "per sample, eager": "torchdiffeq"}
        found += rows(f"MLP field {width} → {width} → {width}, batch 32, tolerance 1e-5", seconds, over)
    return found


def depths() -> list[Row]:
    """How tensors held grow with depth."""
    found = []
    for blocks in (8, 32, 128):
        torch.manual_seed(0)
        stack = ResidualStack([ConvField(8) for _ in range(blocks)])
        x, memory = torch.randn(8, 8, 16, 16), {}
        for gradient in ("autograd", "checkpoint"):
            stack.gradient = gradient
            memory[gradient] = held_at_most(lambda s=stack, x=x: s(x).square().mean().backward())
        ratio = memory["checkpoint"] / memory["autograd"]
        found.append(Row(f"{blocks} conv blocks, tensors held at most (MB in the column of ms)", "checkpoint",
                         memory["checkpoint"] / 1e6, math.nan, math.nan,
                         f"autograd's {memory['autograd'] / 1e6:.1f} MB", ratio))  # fmt: skip
    return found


def precision(path: Path, rounds: int) -> None:
    """Error against time over tolerances: every adaptive method, and every library."""
    from matplotlib.figure import Figure

    y0, t = starts(256), torch.linspace(0, 10, 200, dtype=D)
    exact = odeint(van_der_pol, y0, t, method="dopri8", rtol=1e-13, atol=1e-13)
    curves: dict[str, list[tuple[float, float]]] = {}
    for tol in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
        ways = dict(peers(tol))
        for method in ("bosh3", "fehlberg45", "dopri5", "tsit5", "dopri8"):
            if method != "bosh3" or tol >= 1e-6:
                ways[f"resode {method}"] = ours(tol, method)["per sample, eager"]
        ways["resode dopri5, compiled"] = ours(tol)["per sample, compiled"]
        ways["resode tsit5, compiled"] = ours(tol, "tsit5")["per sample, compiled"]
        with torch.no_grad():
            seconds = in_turns({n: lambda s=s: s(y0, t) for n, s in ways.items()}, max(3, rounds // 4))
        for name, solve in ways.items():
            error = float((solve(y0, t) - exact).square().mean().sqrt())
            curves.setdefault(name, []).append((error, sorted(seconds[name])[len(seconds[name]) // 2] * 1e3))
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    for name, points in curves.items():
        style = "-" if name.startswith("resode") else "--"
        ax.loglog(*zip(*points, strict=True), style, marker="o" if "compiled" in name else ".", label=name)
    ax.invert_xaxis()
    ax.set(
        xlabel="rms error (right is better)",
        ylabel="milliseconds",
        title="256 Van der Pol systems, 200 outputs",
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/speed.md")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--figure", type=Path, help="draw error against time")
    parser.add_argument("--growth", action="store_true", help="measure growth with batch and state too")
    parser.add_argument("--diffrax", help="the Python of an environment that has diffrax")
    parser.add_argument("--force", action="store_true", help="measure on a loaded machine too")
    parser.add_argument("--only", help="a part: systems, mlp, conv or depth")
    options = parser.parse_args()
    refuse_a_loaded_machine(options.force)
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.set_num_threads(1)
    for library, name in ((torchode, "torchode"), (torchdyn_odeint, "torchdyn")):
        if library is None:
            print(f"{name} is not installed: its rows are left out (see tests/benchmarks/peers.txt)")
    parts = {
        "systems": lambda: small_systems(options.rounds, options.diffrax),
        "mlp": lambda: network_field(options.rounds),
        "conv": lambda: convolutions(max(5, options.rounds // 2)),
        "depth": lambda: depth(3),
    }
    found = [row for name, part in parts.items() if options.only in (None, name) for row in part()]
    if options.growth:
        found += growth(options.rounds) + depths()
    text = (
        f"{machine()}; resode {resode.__version__}, torchdiffeq {torchdiffeq.__version__}.\n\n{table(found)}"
    )
    print(text)
    if options.json:
        to_json(found, options.json)
    if options.figure:
        precision(options.figure, options.rounds)
    if options.write:
        page = PAGE.read_text()
        page = re.sub(
            r"(<!-- speed -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}\n{text}\n{m[2]}", page, flags=re.S
        )
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
