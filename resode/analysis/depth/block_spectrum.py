"""Eigenvalues, step limits and singular values of one residual block, from products with its Jacobian."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resode.analysis.depth.gradients import FieldProducts, block_products, rows
from resode.analysis.depth.tracing import Addition
from resode.blocks import ResidualStack
from resode.jacobian.arnoldi import random_start, ritz_values, singular_values
from resode.jacobian.field_products import Products
from resode.stability import eigenvalue_step_limit, stability_function
from resode.tableaus import ButcherTableau, get_tableau

DENSE = 256
"""Entries of a state up to which a block's Jacobian is formed."""

_STEPS = 160
_SINGULAR_STEPS = 40
_ENTRIES = 2**26  # of a Krylov basis; wider states get fewer steps


@dataclass
class BlockSpectrum:
    """Fields of a `DepthRow`, and what is missing among them."""

    values: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def block_spectrum(
    a: Addition, model: nn.Module, batch: int, tableau: ButcherTableau | None, place: int
) -> BlockSpectrum:
    """Spectrum, step limit and singular values of a traced block.

    Args:
        a: the addition, its graph kept.
        model: where it was traced.
        batch: samples of the trace.
        tableau: the method whose step limit is wanted; None for the block's own.
        place: which addition of its module it is.
    """
    result = BlockSpectrum()
    stack = model.get_submodule(a.module)
    own = stack.solver if isinstance(stack, ResidualStack) else "euler"
    tableau = get_tableau(own) if tableau is None else tableau
    result.values["solver"] = tableau.name
    try:
        _singular(a, batch, result)
        if a.keeps_shape:
            _eigenvalues(a, model, batch, tableau, place, result)
        else:
            result.note = "changes shape: no eigenvalues"
    except RuntimeError as error:  # of autograd: no second derivative
        result.note = f"not measured: {str(error).splitlines()[0]}"
    return result


def _singular(a: Addition, batch: int, result: BlockSpectrum) -> None:
    flat = rows(a.x, batch)
    start = random_start(len(flat), flat.shape[1], a.x)
    rows_out = rows(a.y, batch).shape[1]
    outer, outer_left = _values(block_products(a, batch), start, rows_out)
    inner, inner_left = _values(FieldProducts(a, batch), start, rows_out)
    result.values["sigma_max"] = float(outer[:, 0].max())
    result.values["sigma_min"] = float(outer[:, -1].min())
    result.values["epsilon"] = float(inner[:, 0].max())
    settled = bool((outer_left[:, 0] <= 1e-2 * outer[:, 0]).all())
    settled &= bool((inner_left[:, 0] <= 1e-2 * inner[:, 0].clamp_min(1e-30)).all())
    result.values["converged"] = settled


def _values(products: Any, start: Tensor, rows_out: int) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and their residuals: of a small Jacobian all, else the outermost."""
    if max(start.shape[1], rows_out) <= DENSE:
        values = torch.linalg.svdvals(_matrix(products.vjp, start, rows_out).double())
        return values, torch.zeros_like(values)
    return singular_values(products.jvp, products.vjp, start, _affordable(_SINGULAR_STEPS, start))


def _matrix(vjp: Any, like: Tensor, rows_out: int) -> Tensor:
    """The Jacobian (batch, m, n), row by row."""
    one = torch.eye(rows_out, dtype=like.dtype, device=like.device)
    return torch.stack([vjp(e.expand(len(like), rows_out)) for e in one], 1)


def _affordable(steps: int, start: Tensor) -> int:
    return max(8, min(steps, _ENTRIES // start.numel()))


def _eigenvalues(
    a: Addition, model: nn.Module, batch: int, tableau: ButcherTableau, place: int, result: BlockSpectrum
) -> None:
    eta, vjp = a.step_size, _field_vjp(a, model, batch, place)
    if a.kind != "identity":  # what is added to x is y − x
        block = block_products(a, batch)

        def product(u: Tensor) -> Tensor:
            return block.vjp(u) - u
    elif vjp is not None:
        module: Any = model.get_submodule(a.module)
        sizes = module.step_sizes
        steps = module.step_size if sizes is None else float(sizes[place // module.substeps].detach())
        eta = steps / module.substeps
        product = vjp
    else:
        scale = eta if eta != 0 else 1.0
        own = FieldProducts(a, batch)

        def product(u: Tensor) -> Tensor:
            return own.vjp(u) / scale

    flat = rows(a.x, batch)
    n = flat.shape[1]
    if n <= DENSE:
        spectra = torch.linalg.eigvals(_matrix(product, flat, n).double()).cpu().numpy()
        errors = np.full(spectra.shape, 0.0)
        settled = True
    else:
        start = random_start(len(flat), n, flat)
        values, left = ritz_values(product, start, _affordable(_STEPS, start))
        spectra, errors = values.cpu().numpy().astype(np.complex128), left.double().cpu().numpy()
        settled = bool(_outer_settled(spectra, errors))
    eps = float(torch.finfo(flat.dtype).eps)
    samples = [_sample(s, e, eps, n, tableau, eta) for s, e in zip(spectra, errors, strict=True)]
    everything: Any = np.concatenate([s["values"] for s in samples])
    worst = min(samples, key=lambda s: s["decaying"])
    grows = max(samples, key=lambda s: s["growth"])
    result.values |= {
        "rightmost": complex(everything[everything.real.argmax()]),
        "leftmost": complex(everything[everything.real.argmin()]),
        "largest": complex(everything[np.abs(everything).argmax()]),
        "step_limit": min(s["step"] for s in samples),
        "decaying_step": worst["decaying"],
        "limiting_eigenvalue": worst["limiting"],
        "growth": grows["growth"],
        "growth_eigenvalue": grows["growing"],
        "step_size": eta,
        "converged": result.values["converged"] and settled,
    }
    if not settled:
        result.note = "some outermost eigenvalues have not settled"


def _field_vjp(a: Addition, model: nn.Module, batch: int, place: int) -> Any:
    """Products with F's own Jacobian where F is a field that a solver evaluates more than once a step."""
    stack = model.get_submodule(a.module)
    if not isinstance(stack, ResidualStack) or stack.weights != "constant" or stack.solver == "euler":
        return None
    if place // stack.substeps >= stack.depth:
        return None
    return Products(stack.field(place // stack.substeps), a.x).vjp


def _outer_settled(spectra: Any, errors: Any) -> bool:
    """Whether the rightmost, the leftmost and the largest Ritz value of each sample have settled."""
    for values, error in zip(spectra, errors, strict=True):
        size = np.nanmax(np.abs(values))
        for key in (values.real, -values.real, np.abs(values)):
            if error[np.nanargmax(key)] > 1e-2 * size:
                return False
    return True


def _sample(
    values: Any, errors: Any, eps: float, n: int, tableau: ButcherTableau, eta: float
) -> dict[str, Any]:
    """The limits of one spectrum; of Ritz values those that have settled to 1e-2 of the largest."""
    keep = np.isfinite(values.real) & np.isfinite(values.imag)
    values, errors = values[keep], errors[keep]
    size = float(np.abs(values).max(initial=0.0))
    settled = errors <= 1e-2 * size
    values = values[settled] if settled.any() else values
    values = values[np.abs(values) > 4 * eps**0.5 * size]  # as good as 0: its sign is rounding's
    tau = 8 * n**0.5 * eps * size
    if not len(values):
        values = np.zeros(1, dtype=np.complex128)
    limit = eigenvalue_step_limit(values, tableau, tolerance=tau)
    decaying = values[values.real <= tau]
    decaying_step, limiting, growth, growing = float("inf"), complex("nan"), 0.0, complex("nan")
    if len(decaying):
        own = eigenvalue_step_limit(decaying, tableau, tolerance=tau)
        decaying_step, limiting = float(own.step), complex(own.limiting_eigenvalue)
        sizes = stability_function(tableau, torch.as_tensor(eta * decaying)).abs().numpy()
        growth, growing = float(sizes.max()), complex(decaying[sizes.argmax()])
    return {
        "values": values,
        "step": float(limit.step),
        "decaying": decaying_step,
        "limiting": limiting,
        "growth": growth,
        "growing": growing,
    }
