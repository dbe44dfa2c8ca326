"""Samples with intervals, outputs and events of their own, beside torchode and single solves.

    python -m tests.benchmarks.own_times [--rounds N] [--force]

256 Van der Pol oscillators, μ = 2, dopri5 at tolerance 1e-6 in float64, each over an interval of its own (a start
in [0, 1], a length in [2, 10]) with 50 outputs in it. All ways in one process, in turns; torchode (1.0.1) is left
out where it is not installed. The state's error is against dopri8 at 1e-12.
"""

import argparse
import warnings

import torch

from resode import odeint, odeint_event
from tests.benchmarks.speed import D, starts, torchode, van_der_pol
from tests.benchmarks.timing import in_turns, refuse_a_loaded_machine, rows, table

B, T, TOL = 256, 50, 1e-6


def own_times() -> torch.Tensor:
    """(T, B)."""
    generator = torch.Generator().manual_seed(1)
    start, length = torch.rand(2, B, generator=generator, dtype=D)
    return start + (2 + 8 * length) * torch.linspace(0, 1, T, dtype=D)[:, None]


def falls_through_zero(t, y):
    """One number a sample: the position, less a level that rises with the time."""
    return y[..., 0] - 0.01 * t.reshape(y.shape[:-1])


def ways(y0: torch.Tensor, t: torch.Tensor) -> dict:
    def ours(**how):
        return lambda: odeint(van_der_pol, y0, t, per_sample=True, rtol=TOL, atol=TOL, **how)

    def one_by_one():
        return torch.stack([odeint(van_der_pol, y0[i], t[:, i], rtol=TOL, atol=TOL) for i in range(B)], 1)

    found = {"own times, eager": ours(), "own times, compiled": ours(compile=True), "one by one": one_by_one}
    if torchode is not None:
        term = torchode.ODETerm(van_der_pol)
        control = torchode.IntegralController(atol=TOL, rtol=TOL, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
        problem = torchode.InitialValueProblem(y0=y0, t_eval=t.T.contiguous())
        found["torchode"] = lambda: solver.solve(problem).ys.transpose(0, 1)
    return found


def equal_to_single_solves(y0: torch.Tensor, t: torch.Tensor) -> None:
    """Prints how far one call is from 256 single ones: outputs, event times and states there."""
    found = ways(y0, t)
    apart = (found["own times, eager"]() - found["one by one"]()).abs().max()
    print(f"outputs: one call and {B} single solves differ by {apart:.1e}")
    how = dict(event_fn=falls_through_zero, rtol=TOL, atol=TOL)
    times, states = odeint_event(van_der_pol, y0, t[0], per_sample=True, **how)
    alone = [odeint_event(van_der_pol, y0[i], t[0, i], **how) for i in range(B)]
    apart = max(abs(times[i] - time) for i, (time, _) in enumerate(alone))
    apart_states = max((states[1, i] - y[1]).abs().max() for i, (_, y) in enumerate(alone))
    print(f"events: times differ by {apart:.1e}, states there by {apart_states:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--force", action="store_true", help="measure on a loaded machine")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    refuse_a_loaded_machine(arguments.force)
    y0, t = starts(B), own_times()
    with torch.no_grad():
        equal_to_single_solves(y0, t)
        exact = odeint(van_der_pol, y0, t, method="dopri8", rtol=1e-12, atol=1e-12, per_sample=True)
        found = ways(y0, t)
        errors = {name: float((solve() - exact).square().mean().sqrt()) for name, solve in found.items()}
        del found["one by one"]  # a hundred times slower; it was there for the states
        seconds = in_turns(found, arguments.rounds)
    over = {name: "torchode" for name in found if name.startswith("own") and "torchode" in found}
    bars = {"own times, eager": 1.0, "own times, compiled": 0.5}
    print(table(rows("256 own intervals", seconds, over, bars, errors)))


if __name__ == "__main__":
    main()
