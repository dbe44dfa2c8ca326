"""Swaps of the solver in trained stacks, with what they cost: the truth of the forecast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from resode import ResidualStack
from resode.analysis.diagnose.forecast import Forecast, forecast
from resode.blocks.solving import other_solver
from tests.clinic.networks import HEALTHY, accuracy, data, healthy

SOLVERS = ("euler", "midpoint", "rk4")
SUBSTEPS = (1, 2)


@dataclass(frozen=True)
class Swap:
    """A trained network under another solver.

    Args:
        name: of the network, the method and its substeps.
        origin: the network's name.
        foretold: from 16 inputs without labels.
        lost: accuracy on the test images, before less after.
    """

    name: str
    origin: str
    foretold: Forecast
    lost: float


def swaps() -> Iterator[Swap]:
    """Every trained healthy network with stacks under the other solvers."""
    for origin, spec in HEALTHY.items():
        model, d = healthy(origin), data(spec.task)
        stacks = [m for m in model.modules() if isinstance(m, ResidualStack)]
        if not stacks or not spec.updates:
            continue
        before = accuracy(model, d)
        for solver in SOLVERS:
            for n in SUBSTEPS:
                if (solver, n) == (stacks[0].solver, stacks[0].substeps):
                    continue
                foretold = forecast(model, d.test_x[:16], solver, n)
                with other_solver(model, solver, n):
                    after = accuracy(model, d)
                yield Swap(f"{origin} under {solver}×{n}", origin, foretold, before - after)
