"""How many images, and which of two ways, batch norm's statistics need where a trained run's solver is swapped.

    python -m tests.benchmarks.recalibration runs/proof --images 1000 2000 5000 --limit 5000

A line a solver, number of training images, and way: at the first evaluation of a block call, as training takes
them, or over all evaluations; accuracy, the points lost against the solver as trained with statistics from as many
images, with the standard error of the paired difference, and the drift of the logits on 64 inputs by which
`swap_report` chooses. Then the solver swapped in one stack alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from resode.analysis.diagnose.forecast import drift
from resode.blocks import ResidualStack
from resode.blocks.solving import other_solver, stacks_of
from resode.blocks.statistics import measure_statistics, put_back, tracked_norms
from resode.modes import evaluating
from resode.training.evaluate import calibration_batches, images_of, load, plain_batches


@contextmanager
def measured(network: nn.Module, inputs: list[Tensor], every: bool) -> Iterator[None]:
    """The network with statistics measured at these inputs; its own afterwards."""
    norms = tracked_norms(network)
    own = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    measure_statistics(network, inputs, every_evaluation=every)
    try:
        yield
    finally:
        put_back(norms, own)


@torch.no_grad()
def right(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Which samples are classified right, and 64 spaced logits of the first batch."""
    hits, some = [], None
    with evaluating(network):
        for x, y in batches:
            z = network(x)
            some = z[:: max(1, len(z) // 64)] if some is None else some
            hits.append(z.argmax(1) == y)
    assert some is not None
    return torch.cat(hits).double(), some


def lost(own: Tensor, other: Tensor) -> str:
    """Points lost by `other`, with the standard error of the paired difference."""
    difference = own - other
    return f"{100 * difference.mean():.2f} ± {100 * difference.std() / len(own) ** 0.5:.2f}"


def solver_of(text: str) -> tuple[str, int]:
    """midpoint×2, or midpointx2."""
    name, _, n = text.replace("×", "x").rpartition("x")
    return name, int(n)


@contextmanager
def swapped(network: nn.Module, stacks: list[ResidualStack], solver: str, n: int) -> Iterator[None]:
    """Another solver in these stacks alone."""
    with ExitStack() as held:
        for stack in stacks:
            held.enter_context(other_solver(stack, solver, n))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 2000, 5000])
    parser.add_argument("--limit", type=int, default=5000)
    parser.add_argument("--solvers", nargs="+", default=["midpoint×1", "midpoint×2", "rk4×1"])
    parser.add_argument(
        "--alone", type=int, default=2000, help="images for one stack alone; 0 to leave it out"
    )
    given = parser.parse_args()
    network, images = load(given.run), images_of(given.run)
    batches = list(plain_batches(images, "test", limit=given.limit))
    own, z = right(network, batches)
    print(f"as trained, as it is: {100 * own.mean():.2f} % of {len(own)} images", flush=True)
    print(
        "| solver | images | way | accuracy, % | lost | drift | seconds |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    stacks = stacks_of(network)

    def line(name: str, count: int, way: str, hits: Tensor, base: Tensor, d: float, begun: float) -> None:
        seconds = time.process_time() - begun
        print(
            f"| {name} | {count} | {way} | {100 * hits.mean():.2f} | {lost(base, hits)} | {d:.3f} | {seconds:.0f} |",
            flush=True,
        )

    for count in given.images:
        inputs = [x for x, _ in calibration_batches(images, count)]
        begun = time.process_time()
        with measured(network, inputs, False):
            base, z0 = right(network, batches)
        line("as trained", count, "first", base, own, drift(z0, z), begun)
        for text in given.solvers:
            for every in (False, True):
                begun = time.process_time()
                with swapped(network, stacks, *solver_of(text)), measured(network, inputs, every):
                    hits, other = right(network, batches)
                line(text, count, "all" if every else "first", hits, base, drift(other, z0), begun)
    if not given.alone:
        return
    inputs = [x for x, _ in calibration_batches(images, given.alone)]
    with measured(network, inputs, False):
        base, z0 = right(network, batches)
    names = [name for name, module in network.named_modules() if isinstance(module, ResidualStack)]
    for name, stack in zip(names, stacks, strict=True):
        for every in (False, True):
            begun = time.process_time()
            with swapped(network, [stack], *solver_of(given.solvers[-1])), measured(network, inputs, every):
                hits, other = right(network, batches)
            way = "all" if every else "first"
            line(
                f"{given.solvers[-1]} in {name} alone", given.alone, way, hits, base, drift(other, z0), begun
            )


if __name__ == "__main__":
    main()
