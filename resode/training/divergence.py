"""Whether a run diverged because a block's step leaves its solver's stability region: the ηλ constraint."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from resode.analysis.steps.blocks import BlockGroup, block_groups
from resode.analysis.steps.limit import DENSE_STATE, step_limit
from resode.analysis.steps.matrix_free import outer_spectra
from resode.analysis.steps.outlook import amplification
from resode.blocks import ResidualStack
from resode.jacobian.linearize import jacobian
from resode.jacobian.matrices import all_eigenvalues
from resode.tableaus import ButcherTableau, get_tableau

SAMPLES = 2
"""Images whose states are looked at."""

_FAR = 2.0  # a decaying mode that one step multiplies by so much is far outside
_FINER = 10.0  # how much smaller the logits must be with steps inside the limit
_SUBSTEPS = 64  # the finest that is tried
_VECTORS = 32  # of the Krylov space, for large states


@dataclass(frozen=True)
class Overstep:
    """A block whose step is far outside its solver's stability region.

    Args:
        group: the stack's name in the network.
        block: its number in the stack, from 0.
        solver: the method.
        step: the length h of its steps, η over the substeps.
        limit: the largest h with |R(sλ)| ≤ 1 for 0 ≤ s ≤ h.
        eigenvalue: λ, the decaying mode that grows most.
        growth: |R(hλ)|.
        substeps: with which the step is within the limit, as a multiple of now.
    """

    group: str
    block: int
    solver: str
    step: float
    limit: float
    eigenvalue: complex
    growth: float
    substeps: int

    def __str__(self) -> str:
        e = self.eigenvalue
        value = f"{e.real:.4g}" if abs(e.imag) < 1e-6 * abs(e) else f"{e.real:.4g}{e.imag:+.4g}i"
        return (
            f"The step leaves the solver's stability region in block {self.block} of "
            f"{self.group or 'the stack'}: a step of {self.step:.4g} with {self.solver} multiplies a mode of "
            f"eigenvalue {value}, which decays, by {self.growth:.4g}; the step limit is {self.limit:.4g}. "
            f"Take {self.substeps} times the substeps, a smaller step_size, or a solver with a larger region."
        )


def find_overstep(network: nn.Module, state: Mapping[str, Tensor], images: Tensor) -> Overstep | None:
    """The block that oversteps most, where that is why a network's outputs explode.

    Of each block with a solver of fixed steps, the eigenvalues λ of F's Jacobian are found at the states that
    images reach, in evaluation mode. A block oversteps where a decaying mode (Re λ < 0) is multiplied by
    |R(hλ)| ≥ 2 in a step. That is the cause only if shorter steps help: with as many substeps as the limit
    asks for, the logits must be 10 times smaller.

    Args:
        network: with a `ResidualStack` or several, or any other; it is not changed.
        state: its weights and buffers, finite.
        images: normalised, shape (B, C, H, W); the first two are used.

    Returns:
        The block, or None where the constraint is not the cause, or nothing can be found out.

    Example:
        >>> from resode import ResidualStack
        >>> field = nn.Linear(2, 2, bias=False)
        >>> _ = field.weight.data.copy_(-20 * torch.eye(2))
        >>> network = ResidualStack(field, depth=4, step_size=0.5)
        >>> found = find_overstep(network, network.state_dict(), torch.ones(2, 2))
        >>> found.block, round(found.limit, 6), found.growth
        (0, 0.1, 9.0)
    """
    if not any(isinstance(module, ResidualStack) for module in network.modules()):
        return None
    network = copy.deepcopy(network).cpu().float().eval()
    network.load_state_dict({name: value.cpu() for name, value in state.items()})
    images = images[:SAMPLES].detach().cpu().float()
    try:
        worst = _worst(_oversteps(network, images))
        return worst if worst is not None and _finer_helps(network, images, worst.substeps) else None
    except (ValueError, RuntimeError, ArithmeticError, np.linalg.LinAlgError):
        return None  # no fields that can be linearized, or states that are not finite


def _oversteps(network: nn.Module, images: Tensor) -> Iterator[Overstep]:
    """Those of all blocks with fixed steps, in the network's order."""
    for group in block_groups(network, images):
        tableau = get_tableau(group.solver)
        if tableau.adaptive or not tableau.explicit:
            continue
        found = (_overstep(group, block, tableau) for block in range(len(group.fields)))
        yield from (overstep for overstep in found if overstep is not None)


def _worst(oversteps: Iterable[Overstep]) -> Overstep | None:
    """The one whose growth is largest, the first of those that rounding alone tells apart."""
    worst = None
    for overstep in oversteps:
        if worst is None or overstep.growth > worst.growth * (1 + 1e-6):
            worst = overstep
    return worst


def _overstep(group: BlockGroup, block: int, tableau: ButcherTableau) -> Overstep | None:
    field, x, step = group.fields[block], group.states[block], group.steps[block]
    if not bool(x.isfinite().all()):
        return None
    if x[0].numel() <= DENSE_STATE:
        eigenvalues = all_eigenvalues(jacobian(copy.deepcopy(field).double(), x.double()).numpy()).ravel()
    else:
        spectra = outer_spectra(field, x, [tableau], budget=_VECTORS, verify=False, warn=False)
        eigenvalues = np.concatenate([s.ritz.values for s in spectra])
    decaying = eigenvalues[eigenvalues.real < 0]
    if not len(decaying):
        return None
    growths = amplification(step * decaying, tableau)
    most = int(np.argmax(growths))
    if growths[most] < _FAR:
        return None
    limit = float(step_limit(eigenvalues=decaying[most : most + 1], solver=group.solver).step)
    substeps = math.ceil(step / limit) if limit > step / _SUBSTEPS else _SUBSTEPS
    mode = complex(decaying[most])
    return Overstep(group.name, block, group.solver, step, limit, mode, float(growths[most]), substeps)


def _finer_helps(network: nn.Module, images: Tensor, substeps: int) -> bool:
    """Whether the logits are much smaller with shorter steps; the network keeps them."""
    sizes = []
    with torch.no_grad():
        for factor in (1, substeps):
            for module in network.modules():
                if isinstance(module, ResidualStack):
                    module.substeps *= factor
            sizes.append(float(network(images).abs().max()))
    coarse, fine = sizes
    return math.isfinite(fine) and not coarse < _FINER * fine
