"""Eigenvalues, step limits and singular values of one residual block, from products with its Jacobian."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resode.analysis.depth.gradients import block_products, increment_products
from resode.analysis.depth.tracing import Addition
from resode.blocks import ResidualStack
from resode.jacobian.lanczos import random_start, singular_values
from resode.jacobian.products import Combination, rows
from resode.jacobian.spectrum import SpectrumOptions, formed, matrix_spectrum, spectrum
from resode.stability.function import amplification
from resode.stability.limits import bounds, plain
from resode.stability.spectra import Spectrum, limits
from resode.tableaus import ButcherTableau, get_tableau

_STEPS = 40  # of a bidiagonalization
_ENTRIES = 2**26  # of its bases; wider states get fewer steps
_DENSE = SpectrumOptions.dense_up_to


@dataclass
class BlockSpectrum:
    """Fields of a `DepthRow`, and what is missing among them."""

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def block_spectrum(
    a: Addition, model: nn.Module, batch: int, tableau: ButcherTableau | None, place: int
) -> BlockSpectrum:
    """Spectrum, step limit and singular values of a traced block, the `place`-th addition of its module.

    The limit is that of the tableau, or of the block's own method.
    """
    result = BlockSpectrum()
    stack = model.get_submodule(a.module)
    own = stack.tableau if isinstance(stack, ResidualStack) else get_tableau("euler")
    tableau = own if tableau is None else tableau
    result.values["solver"] = tableau.name
    sizes = rows(a.x, batch).shape[1], rows(a.y, batch).shape[1]
    increment = (
        formed(increment_products(a, batch), rows(a.x, batch), sizes[1]) if max(sizes) <= _DENSE else None
    )
    try:
        _singular(a, batch, increment, result)
    except RuntimeError as error:  # of autograd: no second derivative
        result.values["converged"] = False
        result.notes.append(f"singular values not measured: {str(error).splitlines()[0]}")
    if a.keeps_shape:
        _eigenvalues(a, batch, increment, _OwnField.of(a, model, place), tableau, result)
    else:
        result.notes.append("changes shape: no eigenvalues")
    return result


def _singular(a: Addition, batch: int, increment: Tensor | None, result: BlockSpectrum) -> None:
    """σ of S' + ηJ, and ‖ηJ‖₂: all of them where ηJ was formed, else the outermost."""
    if increment is not None:
        block = _block_matrix(a, batch, increment)
        outer, inner = (torch.linalg.svdvals(m.double()) for m in (block, increment))
        settled = True
    else:
        flat = rows(a.x, batch)
        start = random_start(len(flat), flat.shape[1], a.x)
        steps = max(8, min(_STEPS, _ENTRIES // start.numel()))
        found = [
            singular_values(p.jvp, p.vjp, start, steps, rtol)
            for p, rtol in ((block_products(a, batch), 0.0), (increment_products(a, batch), 1e-3))
        ]
        (outer, _), (inner, _) = found
        settled = all(bool((left[:, 0] <= 1e-2 * s[:, 0].clamp_min(1e-30)).all()) for s, left in found)
    result.values["sigma_max"] = float(outer[:, 0].max())
    result.values["sigma_min"] = float(outer[:, -1].min())
    result.values["epsilon"] = float(inner[:, 0].max())
    result.values["converged"] = settled


def _block_matrix(a: Addition, batch: int, increment: Tensor) -> Tensor:
    """S' + ηJ of every sample."""
    if a.kind == "identity":
        return increment + torch.eye(increment.shape[1], dtype=increment.dtype, device=increment.device)
    return formed(block_products(a, batch), rows(a.x, batch), increment.shape[1])


@dataclass
class _OwnField:
    """F of a block of a `ResidualStack` that a solver evaluates more than once a step, and its step."""

    field: nn.Module
    step: float

    @staticmethod
    def of(a: Addition, model: nn.Module, place: int) -> _OwnField | None:
        """The field behind an addition, where that is no Euler step of it."""
        stack = model.get_submodule(a.module)
        if not isinstance(stack, ResidualStack) or stack.weights != "constant" or stack.solver == "euler":
            return None
        block = place // stack.substeps
        if block >= stack.depth or a.kind != "identity":
            return None
        eta = stack.step_size if stack.step_sizes is None else float(stack.step_sizes[block].detach())
        return _OwnField(stack.field(block), eta / stack.substeps)


def _eigenvalues(
    a: Addition,
    batch: int,
    increment: Tensor | None,
    own: _OwnField | None,
    tableau: ButcherTableau,
    result: BlockSpectrum,
) -> None:
    """The spectrum of F, of y − x where the shortcut is not the identity; its limits under the method."""
    eta, flat = a.step_size, rows(a.x, batch)
    options = SpectrumOptions(check=False)
    if own is not None:
        eta, found = own.step, spectrum(own.field, a.x, options, [tableau])
    elif a.kind != "identity":
        if increment is not None:
            one = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
            found = matrix_spectrum(_block_matrix(a, batch, increment) - one)
        else:
            found = spectrum(
                Combination((1.0, block_products(a, batch)), (-1.0, None)), flat, options, [tableau]
            )
    elif increment is not None:
        found = matrix_spectrum(increment / (eta or 1.0))
    else:
        products = Combination((1.0 / (eta or 1.0), increment_products(a, batch)))
        found = spectrum(products, flat, options, [tableau])
    result.values |= _measures(found, tableau, eta)
    result.values["converged"] &= result.values.pop("settled")
    result.notes += result.values.pop("notes")


def _measures(found: Spectrum, tableau: ButcherTableau, eta: float) -> dict[str, Any]:
    """What a `DepthRow` says of eigenvalues: the worst over the samples."""
    limit = limits(found, tableau)
    steps, decaying, exact = bounds(limit)
    known = found.values[found.trusted]
    slow = found.values[found.trusted & (found.values.real <= found.tau)]
    sizes = amplification(tableau, eta * slow)
    worst = int(decaying.argmin())
    notes = []
    if not exact.all():
        notes.append("the limit of decaying modes is an upper bound")
    if np.isinf(plain(limit.error)).any():
        condition = float(np.nanmax(plain(limit.condition)))
        notes[:] = [
            f"eigenvalues are ill-conditioned or not found (condition {condition:.2g}): no limit is known"
        ]
    return {
        "rightmost": complex(known[known.real.argmax()]),
        "leftmost": complex(known[known.real.argmin()]),
        "largest": complex(known[np.abs(known).argmax()]),
        "step_limit": float(steps.min()),
        "decaying_step": float(decaying[worst]),
        "limiting_eigenvalue": complex(plain(limit.decaying_eigenvalue)[worst]),
        "growth": float(sizes.max(initial=0.0)),
        "growth_eigenvalue": complex(slow[sizes.argmax()]) if len(slow) else complex("nan"),
        "step_size": eta,
        "exact": bool(exact.all()),
        "settled": bool(exact.all() and np.asarray(plain(limit.converged)).all()),
        "notes": notes,
    }
