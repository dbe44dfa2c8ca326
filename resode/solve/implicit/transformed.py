r"""Implicit stages within torch.func's transforms, which follow torch's own operations and nothing else.

Newton's method finds the solution of y = G(y, θ) on numbers that have lost their derivatives, those of all
that `vmap` hides at once. From there steps of its simplified form,

    y ← y + (I − ∂G/∂y)⁻¹ (G(y, θ) − y),   the matrix held fixed,

change no value, and give y its derivatives: with e the error of y as θ moves, the next one is O(δθ) e, so
that every step adds an order. There are as many as transforms that differentiate.

Source:
    Christianson, Reverse accumulation and attractive fixed points, Optim. Methods Softw. 3 (1994);
    Deuflhard, Newton Methods for Nonlinear Problems (2004), 3.3, for the damping.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vjp, vmap

from resode.solve.host import bare, derivatives, plain
from resode.solve.implicit.newton import DAMPED, LEAST
from resode.solve.implicit.systems import check_attached

LARGEST = 1024
"""Unknowns of a sample up to which the matrix is formed; products with it would need decisions by values."""

_ENTRIES = 2**22  # of the directions that one backward pass takes

Equation = Callable[[Tensor], Tensor]
"""G of y, (B, n), of y's shape; row i depends on row i alone."""


@dataclass
class Found:
    """A solution, and what it took.

    Attributes:
        y: it, (B, n), with its derivatives.
        left: the last correction's size of every sample, (B,), ≤ 1 where it converged.
        jacobians: how many.
        calls: of G.
    """

    y: Tensor
    left: Tensor
    jacobians: int = 0
    calls: int = 0


def solve(equation: Equation, start: Tensor, size: Callable[[Tensor], Tensor]) -> Found:
    """The solution of y = G(y), by damped Newton's method.

    Args:
        equation: G.
        start: where it begins, (B, n).
        size: of a correction, over what is asked of the last one, (B,).

    Raises:
        TypeError: more unknowns than `LARGEST`.
    """
    if start.shape[1] > LARGEST:
        raise TypeError(
            f"within torch.func's transforms an implicit step forms its matrix, for up to {LARGEST} unknowns "
            f"of a sample, and here are {start.shape[1]}. Take torch.autograd.grad or .backward(), which "
            "need none, an explicit method, or per_sample=True where the rows of the state are samples."
        )
    found = Found(bare(start), torch.full((len(start),), torch.inf))
    residual, found.calls = bare(equation(found.y)) - found.y, 1
    for _ in range(DAMPED):
        factors = _factors(equation, found.y)
        correction = torch.linalg.lu_solve(*factors, residual[..., None])[..., 0]
        found.jacobians, found.calls, before = found.jacobians + 1, found.calls + 1, size(correction)
        part = torch.ones_like(before)
        while True:
            y = found.y + part[:, None] * correction
            residual, found.calls = bare(equation(y)) - y, found.calls + 1
            after = size(torch.linalg.lu_solve(*factors, residual[..., None])[..., 0])
            # At the level of rounding no correction grows smaller.
            good = (after <= (1 - part / 4) * before) | ((before <= 1) & (after <= 10))
            if plain(good | (part < LEAST)).all():
                break
            part = torch.where(good, part, part / 2)
        found.y, found.left = y, after
        if not plain(good & (after > 1)).any():
            break
    factors = _factors(equation, found.y)
    for _ in range(derivatives(equation(found.y))):
        residual = equation(found.y) - found.y
        found.y = found.y + torch.linalg.lu_solve(*factors, residual[..., None])[..., 0]
    return found


def jacobian(rows: Equation, x: Tensor) -> Tensor:
    """∂rows/∂x of each row, (B, n, n), without derivatives."""
    batch, n = x.shape
    value, pull, *_ = vjp(rows, x)
    directions = torch.eye(n, dtype=x.dtype, device=x.device)[:, None].expand(n, batch, n)
    (matrix,) = vmap(pull, chunk_size=max(1, _ENTRIES // max(1, batch * n)))(directions)
    if not plain(matrix).any():
        check_attached(lambda y: plain(rows(y)), plain(x), plain(value))
    return bare(matrix).transpose(0, 1)


def _factors(equation: Equation, y: Tensor) -> tuple[Tensor, Tensor]:
    """Those of I − ∂G/∂y."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(torch.eye(y.shape[1]).to(y) - jacobian(equation, y))
    return lu, pivots
