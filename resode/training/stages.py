"""The ηλ constraint in a trained network: what limits the step of every block, at real images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from resode.analysis.linearize import jacobian
from resode.analysis.matrices import DENSE_LIMIT, all_eigenvalues
from resode.analysis.max_step import step_limit
from resode.blocks import ResidualStack


@dataclass(frozen=True)
class BlockLimit:
    """The step limit of one block under one solver, over all samples.

    Args:
        block: its number in the stack, from 0.
        solver: the method's name.
        step: the least step limit of the samples; 0 where a mode grows.
        growing: the largest number of growing modes, Re λ > 0, that a sample has.
        decaying_step: the least limit over the other modes.
        limiting_eigenvalue: the λ that sets it.
        inside: whether the network's own step is within it.
    """

    block: int
    solver: str
    step: float
    growing: int
    decaying_step: float
    limiting_eigenvalue: complex
    inside: bool


@dataclass(frozen=True)
class StageLimits:
    """The step limits of one `ResidualStack`.

    Args:
        name: the stack's name in the network.
        shape: of a state, without the batch.
        solver: the stack's own method.
        steps: the length h of a solver step in each block, η over the substeps.
        rows: a `BlockLimit` for every block and solver; empty where a state is too large.
        spectra: eigenvalues times the block's step, hλ, of every block: (samples, n) complex arrays.
    """

    name: str
    shape: tuple[int, ...]
    solver: str
    steps: list[float]
    rows: list[BlockLimit]
    spectra: list[np.ndarray]


def stage_limits(network: nn.Module, images: Tensor, solvers: Sequence[str]) -> Iterator[StageLimits]:
    """Step limits of every block of every stack, at the states that images reach there.

    Each field is linearized in float64, in evaluation mode, at the state before its block; all eigenvalues
    of the Jacobian are computed. Stages whose states have more than 4,096 entries are given without rows.

    Args:
        network: with at least one `ResidualStack` of constant weights; it is not changed.
        images: normalised, shape (samples, C, H, W).
        solvers: explicit methods' names.

    Yields:
        The stages, in the network's order, each when it is done.

    Raises:
        ValueError: there is no ResidualStack.
    """
    network = copy.deepcopy(network).double().eval()
    stacks = {name: module for name, module in network.named_modules() if isinstance(module, ResidualStack)}
    if not stacks:
        raise ValueError(
            "step limits belong to the blocks of a ResidualStack, and this network has none. "
            "Take an ODE-ResNet, such as odenet20."
        )
    inputs = _inputs(network, list(stacks.values()), images.double())
    for (name, stack), x in zip(stacks.items(), inputs, strict=True):
        etas = [stack.step_size] * stack.depth if stack.step_sizes is None else stack.step_sizes.tolist()
        steps = [eta / stack.substeps for eta in etas]
        shape = tuple(x.shape[1:])
        if x[0].numel() > DENSE_LIMIT:
            yield StageLimits(name, shape, stack.solver, steps, [], [])
            continue
        with torch.no_grad():
            _, path = stack(x, return_path=True)
        rows, spectra = [], []
        for block, step in enumerate(steps):
            eigenvalues = all_eigenvalues(jacobian(stack.block(block), path[block]).numpy())
            spectra.append(step * eigenvalues)
            rows += [_block_limit(block, solver, eigenvalues, step) for solver in solvers]
        yield StageLimits(name, shape, stack.solver, steps, rows, spectra)


def _inputs(network: nn.Module, stacks: list[ResidualStack], images: Tensor) -> list[Tensor]:
    """The state that comes into each stack."""
    found: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[module] = inputs[0].detach()

    hooks = [stack.register_forward_pre_hook(keep) for stack in stacks]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[stack] for stack in stacks]


def _block_limit(block: int, solver: str, eigenvalues: np.ndarray, step: float) -> BlockLimit:
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
    )
