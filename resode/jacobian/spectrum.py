r"""Eigenvalues of Jacobians with their errors: all of them, or the outer ones of a J that is not formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.checks import warn_user
from resode.jacobian.krylov import norm_estimate
from resode.jacobian.linearize import Field, dense_jacobian
from resode.jacobian.matrices import DENSE_LIMIT, check_precision, checked_matrices, eigenvalues_with_errors
from resode.jacobian.outer import SPACE, Row, SpectrumOptions, gathered, outer_rows
from resode.jacobian.products import JacobianProducts, full_precision
from resode.stability.limits import rounding
from resode.stability.spectra import ROUNDINGS, FirstExits, Spectrum
from resode.tableaus import ButcherTableau, explicit_tableau, get_tableau

_ENTRIES = 2**26  # of Jacobians that are formed together


def spectrum(
    subject: Field | Any,
    x: Tensor,
    options: SpectrumOptions | None = None,
    methods: Sequence[str | ButcherTableau] = ("euler",),
) -> Spectrum:
    """Eigenvalues of a field's Jacobian at each state, with their errors.

    All of them where a state has up to `dense_up_to` entries. Else the outer ones, sought by products until
    the step limits of the methods have settled.

    Args:
        subject: F, as `resode.jacobian.linearize.check_field` has checked it; or products with square
            Jacobians that are at hand: an object with `jvp`, `vjp` and `count`.
        x: states, shape (batch, *state); for products rows (batch, n) in their dtype.
        options: how they are sought.
        methods: those whose limits end a search.

    Raises:
        ValueError: x's dtype too coarse, a Jacobian that is not finite, an implicit method in a search.

    Example:
        >>> found = spectrum(lambda x: x @ torch.diag(torch.tensor([-2.0, -5.0])), torch.zeros(1, 2))
        >>> found.values.real.tolist(), found.complete.tolist()
        ([[-5.0, -2.0]], [True])
    """
    options = SpectrumOptions() if options is None else options
    n, eps, rtol = x[0].numel(), torch.finfo(x.dtype).eps, options.accuracy(torch.finfo(x.dtype).eps)
    check_precision(rounding(n, eps), n, eps)
    tableaus = [get_tableau(method) for method in methods]
    source = _Source(subject, x)
    with full_precision():
        if n <= options.dense_up_to and not (options.search and n > min(options.budget, SPACE)):
            rows = source.all_eigenvalues(range(len(x)), eps)
        else:
            rows = _searched(source, tableaus, options, rtol)
    found = gathered(rows, n, eps, rtol, options.growth, x)
    if options.check:
        _warn(found, tableaus, options.budget)
    return found


def matrix_spectrum(
    jacobians: Any, options: SpectrumOptions | None = None, eigenvalues: Any = None
) -> Spectrum:
    """The spectrum of matrices, shape (n, n) or (…, n, n), with errors, as `checked_matrices` takes them.

    Of the options `growth` and `rtol` count. Eigenvalues that are known are taken as exact but for rounding.
    """
    options = SpectrumOptions() if options is None else options
    values, eps = checked_matrices(jacobians)
    n = values.shape[-1]
    check_precision(rounding(n, eps), n, eps)
    flat = values.reshape(-1, n, n)
    if eigenvalues is None:
        rows = [eigenvalues_with_errors(m, eps) for m in flat]
    else:
        scales = [norm_estimate(m) for m in flat]
        known = np.full(n, np.nan)
        rows = [
            Row(v, np.full(n, ROUNDINGS * eps * scale), known, known, scale, True)
            for v, scale in zip(np.asarray(eigenvalues).reshape(-1, n), scales, strict=True)
        ]
    found = gathered(rows, n, eps, options.accuracy(eps), options.growth, jacobians)
    return replace(found, shape=values.shape[:-2])


def _searched(
    source: _Source, tableaus: Sequence[ButcherTableau], options: SpectrumOptions, rtol: float
) -> list[Row]:
    """The outer eigenvalues of every sample; all of them where those do not decide and J can be formed."""
    for tableau in tableaus:
        explicit_tableau(
            tableau, f"beyond {DENSE_LIMIT} entries, or without matrix_free=False, a step limit needs"
        )
    x = source.x
    n, eps = x[0].numel(), torch.finfo(x.dtype).eps
    wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    # Where J can be formed, a search that lasts about as long as that is given up.
    can_be_formed = n <= options.dense_up_to and n + SPACE <= options.budget
    budget = min(max(SPACE, n // 2), options.budget - n) if can_be_formed else options.budget
    start = x.detach().flatten(1).to(wide)
    rows = outer_rows(source.products, start, replace(options, budget=budget), tableaus, eps)
    if not can_be_formed:
        return rows
    found = gathered(rows, n, eps, rtol, options.growth)
    settled = np.logical_and.reduce(
        [exits.converged & exits.settled for exits in (FirstExits(found, t) for t in tableaus)]
    )
    open_ = np.flatnonzero(~settled).tolist()
    for i, row in zip(open_, source.all_eigenvalues(open_, eps), strict=True):
        rows[i] = replace(row, products=rows[i].products + n)
    return rows


class _Source:
    """A field, or products that are at hand, at states: where products and matrices come from."""

    def __init__(self, subject: Any, x: Tensor) -> None:
        self.subject, self.x = subject, x
        self.is_field = not hasattr(subject, "vjp")

    def products(self, samples: Sequence[int]) -> Any:
        """Products with the Jacobians of some samples."""
        if self.is_field:
            return JacobianProducts(self.subject, self.x[list(samples)])
        return _Some(self.subject, len(self.x), list(samples))

    def all_eigenvalues(self, samples: Sequence[int], eps: float) -> list[Row]:
        """All eigenvalues of some samples, from the Jacobians themselves."""
        n = self.x[0].numel()
        step = max(1, _ENTRIES // n**2)
        found = []
        for first in range(0, len(samples), step):
            some = list(samples[first : first + step])
            matrices = self.matrices(some)
            values, _ = checked_matrices(matrices)
            found += [eigenvalues_with_errors(m, eps) for m in values]
        return found

    def matrices(self, samples: list[int]) -> Tensor:
        """The Jacobians (samples, n, n)."""
        if self.is_field:
            return dense_jacobian(self.subject, self.x[samples])
        return formed(self.products(samples), self.x[samples].flatten(1))


class _Some:
    """Products for some samples of a batch whose graph is one."""

    def __init__(self, products: Any, batch: int, samples: list[int]) -> None:
        self.products_, self.batch, self.samples, self.count = products, batch, samples, 0

    def _scattered(self, product: Any, v: Tensor) -> Tensor:
        self.count += 1
        if self.samples == list(range(self.batch)):
            return product(v)
        whole = v.new_zeros(self.batch, v.shape[1])
        whole[self.samples] = v
        return product(whole)[self.samples]

    def vjp(self, v: Tensor) -> Tensor:
        return self._scattered(self.products_.vjp, v)

    def jvp(self, v: Tensor) -> Tensor:
        return self._scattered(self.products_.jvp, v)


def formed(products: Any, like: Tensor, rows_out: int | None = None) -> Tensor:
    """The Jacobians (batch, m, n) of products at states (batch, n), row by row; m is n where not given."""
    one = torch.eye(rows_out or like.shape[1], dtype=like.dtype, device=like.device)
    return torch.stack([products.vjp(e.expand(len(like), -1).contiguous()) for e in one], 1)


def _warn(found: Spectrum, tableaus: Sequence[ButcherTableau], budget: int) -> None:
    """Of samples whose limits a search has not found."""
    lost = ~np.logical_and.reduce([FirstExits(found, t).converged for t in tableaus]) & ~found.complete
    if lost.any():
        warn_user(
            f"no convergence within {budget} products in {int(lost.sum())} of {len(lost)} samples: their "
            "step limits are upper bounds, from the eigenvalues found. Raise budget= or rtol=.",
            RuntimeWarning,
        )
