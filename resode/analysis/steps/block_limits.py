"""The ηλ constraint in a trained network: what limits the step of every block, at real images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from resode.analysis.steps.blocks import block_groups
from resode.jacobian.linearize import check_field
from resode.jacobian.spectrum import SpectrumOptions, spectrum
from resode.progress import Progress
from resode.results import Result
from resode.stability.function import amplification
from resode.stability.limits import bounds, plain
from resode.stability.spectra import Spectrum, limits


@dataclass(frozen=True)
class BlockLimit:
    """The step limit of one block under one solver, over all samples.

    Args:
        block: its number in the group, from 0.
        solver: the method's name.
        step: the least step limit of the samples; 0 where a mode grows.
        growing: the largest number of growing modes, Re λ > 0, that a sample has; of those found.
        decaying_step: the least limit over the other modes.
        limiting_eigenvalue: the λ that sets it.
        within: whether the network's own step is within it.
        amplification: largest |R(hλ)| over the eigenvalues and samples, growing modes included.
        converged: whether `step` rests on converged eigenvalues in every sample.
        exact: whether `decaying_step` is known; else it is an upper bound, inf where none is known.
        complete: whether all eigenvalues were computed; else more modes than `growing` may grow.
        estimate: what the eigenvalues as they were found allow: `decaying_step` without its certainty.
    """

    block: int
    solver: str
    step: float
    growing: int
    decaying_step: float
    limiting_eigenvalue: complex
    within: bool
    amplification: float = float("nan")
    converged: bool = True
    exact: bool = True
    complete: bool = True
    estimate: float = float("nan")


@dataclass(frozen=True, repr=False)
class GroupLimits(Result):
    """The step limits of one group.

    Args:
        name: the group's name in the network.
        shape: of a state, without the batch.
        solver: the group's own method.
        steps: the length h of a solver step in each block, η over the substeps.
        rows: a `BlockLimit` for every block and solver.
        spectra: eigenvalues times the block's step, hλ, of every block, of all samples: complex arrays;
            the outer ones where a state has more than 1,024 entries.
    """

    name: str
    shape: tuple[int, ...]
    solver: str
    steps: list[float]
    rows: list[BlockLimit]
    spectra: list[np.ndarray]


def block_limits(
    network: nn.Module,
    images: Tensor,
    solvers: Sequence[str],
    *,
    blocks: str | None = None,
    budget: int = SpectrumOptions.budget,
    progress: bool = True,
) -> Iterator[GroupLimits]:
    """Step limits of every block, at the states that images reach there.

    Each field is linearized in evaluation mode at the state before its block: in float64 with all eigenvalues
    where a state has up to 1,024 entries, else in float32 with the outer ones, sought without the Jacobian.

    Args:
        network: any with blocks, see `block_groups`; it is not changed.
        images: normalised, shape (samples, C, H, W).
        solvers: explicit methods' names.
        blocks: names of the modules that are the blocks, see `block_groups`.
        budget: products a sample for large states.
        progress: say on a terminal how far it is, after two seconds.

    Yields:
        The groups, in the network's order, each when it is done.

    Raises:
        ValueError: the network has no blocks, or a block couples samples or changes its input.
    """
    network = copy.deepcopy(network).eval()
    wide = any(p.dtype == torch.float64 for p in network.parameters())
    network, images = (network.double(), images.double()) if wide else (network.float(), images.float())
    options = SpectrumOptions(budget=budget)
    for group in block_groups(network, images, blocks):
        group.check_finite()
        rows, spectra = [], []
        with Progress(group.name, progress) as say:
            blocks_of = zip(group.fields, group.states, group.steps, strict=True)
            for block, (field, x, step) in enumerate(blocks_of):
                say(f"eigenvalues of block {block}, the last is {len(group.fields) - 1}")
                limits, eigenvalues = _block_limits(field, x, solvers, step, block, options)
                rows += limits
                spectra.append(step * eigenvalues)
        yield GroupLimits(group.name, group.shape, group.solver, group.steps, rows, spectra)


def _block_limits(
    field: nn.Module, x: Tensor, solvers: Sequence[str], step: float, block: int, options: SpectrumOptions
) -> tuple[list[BlockLimit], np.ndarray]:
    """One block's limits under each solver, and its eigenvalues."""
    if x[0].numel() <= options.dense_up_to:
        field, x = copy.deepcopy(field).double(), x.double()
    check_field(field, x)
    found = spectrum(field, x, options, solvers)
    rows = [block_limit(found, solver, step, block) for solver in solvers]
    return rows, found.values[found.trusted]


def block_limit(found: Spectrum, solver: str, step: float, block: int) -> BlockLimit:
    """The least limits over the samples of one block's spectrum."""
    limit = limits(found, solver)
    found_steps = plain(limit.decaying_step)
    steps, decaying, exact = bounds(limit)
    worst = int(np.argmin(found_steps))
    return BlockLimit(
        block=block,
        solver=solver,
        step=float(steps.min()),
        growing=max(len(modes) for modes in limit.growing),
        decaying_step=float(decaying.min()),
        limiting_eigenvalue=complex(plain(limit.decaying_eigenvalue)[worst]),
        within=bool(step <= found_steps[worst]),
        amplification=float(amplification(solver, step * found.values[found.trusted]).max()),
        converged=bool(plain(limit.converged).all()),
        exact=bool(exact.all()),
        complete=bool(found.complete.all()),
        estimate=float(found_steps[worst]),
    )
