"""The ηλ constraint in a trained network: what limits the step of every block, at real images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from resode.analysis.steps.blocks import block_groups
from resode.analysis.steps.limit import DENSE_STATE, step_limit
from resode.analysis.steps.matrix_free import BUDGET, outer_spectra
from resode.analysis.steps.outlook import amplification
from resode.jacobian.linearize import check_field, jacobian
from resode.jacobian.matrices import all_eigenvalues
from resode.tableaus import get_tableau


@dataclass(frozen=True)
class BlockLimit:
    """The step limit of one block under one solver, over all samples.

    Args:
        block: its number in the stage, from 0.
        solver: the method's name.
        step: the least step limit of the samples; 0 where a mode grows.
        growing: the largest number of growing modes, Re λ > 0, that a sample has; of those found.
        decaying_step: the least limit over the other modes.
        limiting_eigenvalue: the λ that sets it.
        inside: whether the network's own step is within it.
        amplification: largest |R(hλ)| over the eigenvalues and samples, growing modes included.
        converged: whether `step` rests on converged eigenvalues in every sample.
        exact: whether `decaying_step` is known; else it is an upper bound.
        complete: whether all eigenvalues were computed; else more modes than `growing` may grow.
    """

    block: int
    solver: str
    step: float
    growing: int
    decaying_step: float
    limiting_eigenvalue: complex
    inside: bool
    amplification: float = float("nan")
    converged: bool = True
    exact: bool = True
    complete: bool = True


@dataclass(frozen=True)
class GroupLimits:
    """The step limits of one stage.

    Args:
        name: the stage's name in the network.
        shape: of a state, without the batch.
        solver: the stage's own method.
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
    budget: int = BUDGET,
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

    Yields:
        The stages, in the network's order, each when it is done.

    Raises:
        ValueError: the network has no blocks, or a block couples samples or changes its input.
    """
    network = copy.deepcopy(network).float().eval()
    for stage in block_groups(network, images.float(), blocks):
        rows, spectra = [], []
        for block, (field, x, step) in enumerate(zip(stage.fields, stage.states, stage.steps, strict=True)):
            limits, eigenvalues = _block_limits(field, x, solvers, step, block, budget)
            rows += limits
            spectra.append(step * eigenvalues)
        yield GroupLimits(stage.name, stage.shape, stage.solver, stage.steps, rows, spectra)


def _block_limits(
    field: nn.Module, x: Tensor, solvers: Sequence[str], step: float, block: int, budget: int
) -> tuple[list[BlockLimit], np.ndarray]:
    """One block's limits under each solver, and its eigenvalues."""
    if x[0].numel() <= DENSE_STATE:
        eigenvalues = all_eigenvalues(jacobian(copy.deepcopy(field).double(), x.double()).numpy())
        return [_dense_limit(block, solver, eigenvalues, step) for solver in solvers], eigenvalues
    check_field(field, x)
    tableaus = [get_tableau(solver) for solver in solvers]
    spectra = outer_spectra(field, x, tableaus, budget=budget)
    found = []
    for number, solver in enumerate(solvers):
        outlooks = [s.outlooks[number] for s in spectra]
        worst = min(range(len(outlooks)), key=lambda i: outlooks[i].decaying)
        o = outlooks[worst]
        found.append(
            BlockLimit(
                block=block,
                solver=solver,
                step=min(o.step for o in outlooks),
                growing=max(len(o.growing) for o in outlooks),
                decaying_step=o.decaying,
                limiting_eigenvalue=complex(spectra[worst].ritz.values[o.mode] if o.mode >= 0 else np.nan),
                inside=step <= o.decaying,
                amplification=max(_amplification(solver, step * s.ritz.values) for s in spectra),
                converged=all(o.converged for o in outlooks),
                exact=all(o.settled for o in outlooks),
                complete=False,
            )
        )
    return found, np.concatenate([s.trusted for s in spectra])


def _amplification(solver: str, z: np.ndarray) -> float:
    """Largest |R(z)|."""
    return float(amplification(z, get_tableau(solver)).max())


def _dense_limit(block: int, solver: str, eigenvalues: np.ndarray, step: float) -> BlockLimit:
    """The least limits over the samples, whose eigenvalues are the rows (samples, n)."""
    limit = step_limit(eigenvalues=eigenvalues, solver=solver)
    worst = int(np.argmin(limit.decaying_step))
    decaying = eigenvalues[worst][~np.isin(eigenvalues[worst], limit.growing[worst])]
    limiting = (
        step_limit(eigenvalues=decaying, solver=solver).limiting_eigenvalue if len(decaying) else np.nan
    )
    decaying_step = float(limit.decaying_step[worst])
    return BlockLimit(
        block=block,
        solver=solver,
        step=float(np.min(limit.step)),
        growing=max(len(modes) for modes in limit.growing),
        decaying_step=decaying_step,
        limiting_eigenvalue=complex(limiting),
        inside=step <= decaying_step,
        amplification=_amplification(solver, step * eigenvalues),
    )
