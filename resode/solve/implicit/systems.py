r"""The linear systems (I − h A_b ⊗ J) Δ = r of Newton's method, for a batch of states at once.

Up to `DENSE` entries a state J is formed, and factors of I − hλJ are kept; above, products with J alone are
taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.jacobian.gmres import gmres
from resode.jacobian.products import JacobianProducts
from resode.solve.implicit.blocks import StageBlock

DENSE = 256
"""Entries of a state up to which its Jacobian is formed and factored."""

FORCING = 1e-3
"""Residual that the linear systems of Newton's method are solved to by GMRES, of the right-hand side's."""

_ENTRIES = 2**22  # of the directions that one backward pass takes

Rows = Callable[[Tensor], Tensor]
"""The field at one time, on states as rows: (B, n) to (B, n)."""


def without_hooks() -> Any:
    """Within it no checkpoint sees the graphs that are made and used at once."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def jacobian_rows(y: Tensor, x: Tensor) -> Tensor:
    """∂y/∂x of each row, (B, n, n), for y and x of shape (B, n) whose rows do not interact.

    All of its rows in one backward pass where torch can batch it, else in one pass each.
    """
    batch, n = y.shape
    many = max(1, _ENTRIES // max(1, batch * n))
    parts = []
    for first in range(0, n, many):
        count = min(many, n - first)
        directions = torch.zeros(count, batch, n, dtype=y.dtype, device=y.device)
        directions[torch.arange(count), :, torch.arange(first, first + count)] = 1
        parts.append(_pulled_back(y, x, directions))
    return torch.cat(parts).transpose(0, 1) if parts else y.new_zeros(batch, 0, 0)


def _pulled_back(y: Tensor, x: Tensor, directions: Tensor) -> Tensor:
    settings = dict(retain_graph=True, allow_unused=True)
    if len(directions) > 4:  # fewer are faster one by one
        try:
            (product,) = torch.autograd.grad(y, x, directions, is_grads_batched=True, **settings)
            return torch.zeros_like(directions) if product is None else product
        except RuntimeError:  # a function that torch can't batch
            pass
    products = [torch.autograd.grad(y, x, d, **settings)[0] for d in directions]
    return torch.stack([torch.zeros_like(x) if p is None else p for p in products])


class DenseSystems:
    """Systems with Jacobians that are formed.

    Args:
        jacobians: J of each sample, (B, n, n).
    """

    def __init__(self, jacobians: Tensor):
        self.jacobians = jacobians
        self.factors: dict[Any, tuple[np.ndarray, Tensor, Tensor]] = {}
        self.linear_iterations = 0

    @classmethod
    def at(cls, rows: Rows, x: Tensor) -> DenseSystems:
        """With the Jacobians of a field at states (B, n)."""
        with torch.inference_mode(False), torch.enable_grad(), without_hooks():
            x = x.detach().clone().requires_grad_()
            y = rows(x)
            jacobians = jacobian_rows(y, x) if y.requires_grad else None
        if jacobians is None:
            check_attached(rows, x.detach(), y.detach())
            jacobians = x.new_zeros(len(x), x.shape[1], x.shape[1], requires_grad=False)
        return cls(jacobians.detach())

    def renewed(self, other: DenseSystems, mask: np.ndarray) -> DenseSystems:
        """These systems with the Jacobians of another in the marked samples."""
        if mask.all():
            return other
        chosen = torch.from_numpy(mask).to(self.jacobians.device)
        return DenseSystems(torch.where(chosen[:, None, None], other.jacobians, self.jacobians))

    def factor(self, block: StageBlock, h: np.ndarray) -> np.ndarray:
        """Makes the factors of I − hλJ for steps h, (B,), ready; which samples' are new, (B,)."""
        key = tuple(block.eigenvalues.tolist())
        kept = self.factors.get(key)
        changed = np.ones(len(h), bool) if kept is None else kept[0] != h
        if changed.any():
            values = torch.from_numpy(np.multiply.outer(block.eigenvalues, h)).to(self.jacobians.device)
            dtype = self.jacobians.dtype
            values = values.to(dtype.to_complex() if values.is_complex() else dtype)
            matrices = -values[:, :, None, None] * self.jacobians
            matrices.diagonal(dim1=-2, dim2=-1).add_(1)
            lu, pivots, _ = torch.linalg.lu_factor_ex(matrices)
            self.factors[key] = (h, lu, pivots)
        return changed

    def solve(self, block: StageBlock, right: Tensor) -> Tensor:
        """Δ of right-hand sides (m, B, n), with the factors that `factor` made."""
        _, lu, pivots = self.factors[tuple(block.eigenvalues.tolist())]
        if len(block.a) == 1:
            return torch.linalg.lu_solve(lu, pivots, right[..., None])[..., 0]
        to_modes, to_stages = (
            torch.from_numpy(t).to(lu.device, lu.dtype) for t in (block.to_modes, block.to_stages)
        )
        modes = torch.tensordot(to_modes, right.to(lu.dtype), 1)
        modes = torch.linalg.lu_solve(lu, pivots, modes[..., None])[..., 0]
        stages = torch.tensordot(to_stages, modes, 1)
        return stages.real if stages.is_complex() else stages

    def filtered(self, block: StageBlock, right: Tensor) -> Tensor:
        """(I − hγJ)⁻¹ of rows (B, n), γ the block's real eigenvalue."""
        _, lu, pivots = self.factors[tuple(block.eigenvalues.tolist())]
        at = int(np.flatnonzero(block.eigenvalues == block.filter)[0])
        x = torch.linalg.lu_solve(lu[at], pivots[at], right.to(lu.dtype)[..., None])[..., 0]
        return x.real if x.is_complex() else x


class ProductSystems:
    """Systems with Jacobians that are known by their products alone, solved by GMRES.

    Args:
        rows: the field.
        x: states, (B, n).
    """

    def __init__(self, rows: Rows, x: Tensor):
        with without_hooks():
            self.products = JacobianProducts(rows, x)
        if not self.products.y.requires_grad:
            check_attached(rows, x.detach(), self.products.value)
        self.h: Tensor | None = None
        self.linear_iterations = 0

    def renewed(self, other: ProductSystems, mask: np.ndarray) -> ProductSystems:
        """The other systems: products are not chosen sample by sample."""
        return other

    def factor(self, block: StageBlock, h: np.ndarray) -> np.ndarray:
        """Notes the steps h, (B,); there are no factors."""
        self.h = torch.from_numpy(h).to(self.products.x)[:, None]
        return np.zeros(len(h), bool)

    def solve(self, block: StageBlock, right: Tensor) -> Tensor:
        """Δ of right-hand sides (m, B, n)."""
        m, batch, n = right.shape

        def product(v: Tensor) -> Tensor:
            v = v.reshape(batch, m, n)
            jv = torch.stack([self._jvp(v[:, i]) for i in range(m)], 1)
            a = torch.from_numpy(block.a).to(v)
            return (v - self.h[..., None] * torch.matmul(a, jv)).reshape(batch, m * n)  # type: ignore[index]

        x, _ = gmres(product, right.transpose(0, 1).reshape(batch, m * n), tol=FORCING)
        return x.reshape(batch, m, n).transpose(0, 1)

    def filtered(self, block: StageBlock, right: Tensor) -> Tensor:
        """(I − hγJ)⁻¹ of rows (B, n), γ the block's real eigenvalue."""
        x, _ = gmres(lambda v: v - block.filter * self.h * self._jvp(v), right, tol=FORCING)  # type: ignore[operator]
        return x

    def _jvp(self, v: Tensor) -> Tensor:
        self.linear_iterations += 1
        with without_hooks():
            return self.products.jvp(v)


Systems = DenseSystems | ProductSystems


def systems_at(rows: Rows, x: Tensor) -> Any:
    """Systems with the Jacobians of a field at states (B, n)."""
    return DenseSystems.at(rows, x) if x.shape[1] <= DENSE else ProductSystems(rows, x)


def check_attached(rows: Rows, x: Tensor, y: Tensor) -> None:
    """A result without a graph is right for a constant field only.

    Raises:
        TypeError: the field depends on x, but is detached from it.
    """
    with torch.no_grad():
        moved = rows(0.6180 - 1.3717 * x)
    if not torch.allclose(
        moved, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()) if y.numel() else 0.0, equal_nan=True
    ):
        raise TypeError(
            "an implicit method needs the field's Jacobian, and func's result has no gradient though it "
            "depends on the state. Remove .detach(), .numpy() or torch.no_grad() from func, or take an "
            "explicit method."
        )
