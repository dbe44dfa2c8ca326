"""The ηλ constraint in a trained network: what limits the step of every block, at real images."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from resode.analysis.linearize import check_field, jacobian
from resode.analysis.matrices import all_eigenvalues
from resode.analysis.matrix_free import BUDGET, outer_spectra
from resode.analysis.max_step import DENSE_STATE, step_limit
from resode.blocks import ResidualStack
from resode.stability import stability_function
from resode.tableaus import get_tableau

_BLOCK_CLASS = re.compile(r"block|bottleneck", re.IGNORECASE)


@dataclass(frozen=True)
class Stage:
    """Blocks that act one after the other on states of one shape.

    Args:
        name: the stack's, or the first block's, name in the network.
        solver: its own method; "euler" for a block x + F(x) that is no `ResidualStack`'s.
        steps: the length h of a solver step in each block: η over the substeps.
        fields: F of every block.
        states: the states before each block, shape (samples, *state).
    """

    name: str
    solver: str
    steps: list[float]
    fields: list[nn.Module]
    states: list[Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a state, without the batch."""
        return tuple(self.states[0].shape[1:])


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
        exact: whether `growing` and `decaying_step` are complete; else they are bounds.
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


@dataclass(frozen=True)
class StageLimits:
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


class Increment(nn.Module):
    """F(x) = block(x) − x: the field whose Euler step of length 1 the block is."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """block(x) − x."""
        return self.block(x) - x


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode within it; afterwards every module is in the mode it was in."""
    before = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def stage_states(network: nn.Module, images: Tensor, blocks: str | None = None) -> list[Stage]:
    """The blocks of any network, with the states that images reach before each of them.

    Those are the blocks of its `ResidualStack`s; where it has none, the modules that keep their input's shape
    and whose class is named a block or a bottleneck, each taken for an Euler step of length 1.

    Args:
        network: evaluated in evaluation mode, and left as it was.
        images: in the network's dtype, shape (samples, C, H, W).
        blocks: names of the modules to take instead, such as "layer*.*" (as a shell matches names).

    Raises:
        ValueError: there are no such blocks.
    """
    with evaluating(network), torch.no_grad():
        stacks = {n: m for n, m in network.named_modules() if isinstance(m, ResidualStack)}
        if stacks and blocks is None:
            inputs = _calls(network, images, list(stacks.values()))
            found = []
            for (name, stack), (x, _) in zip(stacks.items(), inputs, strict=True):
                if x is None:
                    continue
                etas = [stack.step_size] * stack.depth
                etas = etas if stack.step_sizes is None else stack.step_sizes.tolist()
                fields = [stack.block(i) for i in range(stack.depth)]
                _, path = stack(x, return_path=True)
                states = list(path[:-1])
                found.append(Stage(name, stack.solver, [e / stack.substeps for e in etas], fields, states))
            return found
        return _blocks_of(network, images, blocks)


def _blocks_of(network: nn.Module, images: Tensor, pattern: str | None) -> list[Stage]:
    """Blocks by name or by the name of their class, grouped by the shape of their states."""
    named = {
        name: module
        for name, module in network.named_modules()
        if (fnmatchcase(name, pattern) if pattern else _BLOCK_CLASS.search(type(module).__name__)) and name
    }
    stages: list[Stage] = []
    calls = _calls(network, images, list(named.values()))
    for (name, module), (x, y) in zip(named.items(), calls, strict=True):
        if x is None or y is None or y.shape != x.shape:
            continue
        if not stages or stages[-1].shape != tuple(x.shape[1:]):
            stages.append(Stage(name, "euler", [], [], []))
        stages[-1].steps.append(1.0)
        stages[-1].fields.append(Increment(module))
        stages[-1].states.append(x)
    if stages:
        return stages
    which = f"modules named {pattern}" if pattern else "a ResidualStack, nor modules whose class is a block,"
    classes = sorted({type(module).__name__ for module in network.modules()})
    raise ValueError(
        f"step limits belong to blocks that keep the state's shape: this network has no {which} that do. "
        f"Name them with blocks=, such as 'layer*.*'; its modules are {', '.join(classes)}."
    )


def _calls(
    network: nn.Module, images: Tensor, modules: list[nn.Module]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """What comes into each module, and what it returns, at the images; None for what is no tensor."""
    found: dict[nn.Module, tuple[Tensor | None, Tensor | None]] = {}

    def keep(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        x = inputs[0] if inputs else None
        y = output[0] if isinstance(output, tuple) else output
        found[module] = (
            x.detach().clone() if isinstance(x, Tensor) else None,
            y if isinstance(y, Tensor) else None,
        )

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [found.get(module, (None, None)) for module in modules]


def stage_limits(
    network: nn.Module,
    images: Tensor,
    solvers: Sequence[str],
    *,
    blocks: str | None = None,
    budget: int = BUDGET,
) -> Iterator[StageLimits]:
    """Step limits of every block, at the states that images reach there.

    Each field is linearized in evaluation mode at the state before its block: in float64 with all eigenvalues
    where a state has up to 1,024 entries, else in float32 with the outer ones, sought without the Jacobian.

    Args:
        network: any with blocks, see `stage_states`; it is not changed.
        images: normalised, shape (samples, C, H, W).
        solvers: explicit methods' names.
        blocks: names of the modules that are the blocks, see `stage_states`.
        budget: products a sample for large states.

    Yields:
        The stages, in the network's order, each when it is done.

    Raises:
        ValueError: the network has no blocks, or a block couples samples or changes its input.
    """
    network = copy.deepcopy(network).float().eval()
    for stage in stage_states(network, images.float(), blocks):
        rows, spectra = [], []
        for block, (field, x, step) in enumerate(zip(stage.fields, stage.states, stage.steps, strict=True)):
            limits, eigenvalues = _block_limits(field, x, solvers, step, block, budget)
            rows += limits
            spectra.append(step * eigenvalues)
        yield StageLimits(stage.name, stage.shape, stage.solver, stage.steps, rows, spectra)


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
            )
        )
    return found, np.concatenate([s.trusted for s in spectra])


def _amplification(solver: str, z: np.ndarray) -> float:
    """Largest |R(z)|."""
    return float(stability_function(solver, torch.as_tensor(z)).abs().max())


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
