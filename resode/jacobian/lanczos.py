r"""Lanczos methods for a batch of operators at once: singular values, and the top of symmetric operators.

A product takes vectors (rows, n) and gives A_s v_s for every row s: one call of a batched field's vjp or jvp
serves all samples. Bases are kept and orthogonalized, twice where little is left, so that nothing is lost to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]

_KEPT = 0.1  # of a vector's length, above which one pass makes it orthogonal to ten roundings
_LOOK = 5  # steps between two looks at the largest singular value


@dataclass
class TopPair:
    """The largest eigenvalue of symmetric operators, as far as it was found.

    Args:
        value: θ, shape (rows,), float64.
        vector: its unit vectors, (rows, n), float64.
        residual: ‖Av − θv‖, (rows,).
        size: the largest modulus of a Ritz value, (rows,).
    """

    value: Tensor
    vector: Tensor
    residual: Tensor
    size: Tensor


def largest(
    product: Operator, start: Tensor, rtol: float, *, products: int = 192, vectors: int = 32
) -> TopPair:
    """The largest eigenvalue of a symmetric operator in each row.

    Lanczos with full orthogonalization, started again from what it has found where its room is full.

    Args:
        product: A v (rows, n) of v (rows, n), A symmetric.
        start: first vectors (rows, n), in whose dtype products are taken.
        rtol: wanted residual, relative to the largest Ritz value's modulus.
        products: at most.
        vectors: of a basis, at most.

    Example:
        >>> a = torch.diag(torch.tensor([1.0, 2.0, -3.0]))
        >>> float(largest(lambda v: v @ a, torch.ones(1, 3), 1e-6).value)
        2.0...
    """
    tiny = torch.finfo(torch.float64).tiny
    x, done = start.double(), 0
    while True:
        found, count = _cycle(product, x, start.dtype, rtol, min(vectors, start.shape[1], products - done))
        x, done = found.vector, done + count
        enough = bool((found.residual <= rtol * found.size.clamp_min(tiny)).all())
        if enough or done >= products or count == start.shape[1]:
            return found


def _cycle(product: Operator, x: Tensor, dtype: torch.dtype, rtol: float, size: int) -> tuple[TopPair, int]:
    """The top from one basis of up to `size` vectors, and how many it took."""
    stride = 1 if len(x) == 1 else 4  # vectors between two looks
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(torch.float64).tiny
    basis = torch.zeros(len(x), size + 1, x.shape[1], dtype=torch.float64, device=x.device)
    projected = torch.zeros(len(x), size, size, dtype=torch.float64, device=x.device)
    basis[:, 0] = x / x.norm(dim=1, keepdim=True).clamp_min(tiny)
    j = 0
    while True:
        w = product(basis[:, j].to(dtype)).double()
        basis[:, j + 1], column, rest = orthogonalized(w, basis[:, : j + 1], eps)
        projected[:, j, : j + 1] = projected[:, : j + 1, j] = column
        j += 1
        if j % stride and j < size:
            continue
        absent = torch.diag_embed((basis[:, :j].norm(dim=2) < 0.5).double())  # past an invariant space
        theta, y = torch.linalg.eigh(projected[:, :j, :j] - 1e300 * absent)
        residual = rest * y[:, -1, -1].abs()
        if j == size or bool((residual <= rtol * theta[:, -1].abs()).all() | (rest == 0).all()):
            moduli = torch.where(theta > -1e299, theta.abs(), 0.0).amax(1)
            return TopPair(theta[:, -1], (y[:, None, :, -1] @ basis[:, :j])[:, 0], residual, moduli), j


def orthogonalized(w: Tensor, basis: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors w (rows, n) freed of a basis (rows, j, n) and normalized, their coordinates, what was left.

    Where rounding alone is left, the basis spans an invariant space, and the vector is 0.
    """
    size = norm = w.norm(dim=1)
    column = torch.zeros(basis.shape[:2], dtype=w.dtype, device=w.device)
    for _ in range(2):
        h = (basis @ w[..., None])[..., 0]
        w = torch.baddbmm(w[:, None], h[:, None], basis, alpha=-1)[:, 0]
        column += h
        before, norm = norm, w.norm(dim=1)
        if bool((norm >= _KEPT * before).all()):  # what rounding left of the basis is not blown up
            break
    norm = torch.where(norm > 8 * eps * size, norm, 0.0)
    return w / torch.where(norm > 0, norm, 1.0)[:, None] * (norm > 0)[:, None], column, norm


def singular_values(
    product: Operator, transposed: Operator, start: Tensor, steps: int, rtol: float = 0.0
) -> tuple[Tensor, Tensor]:
    r"""Approximate singular values from a random start, by Golub and Kahan's bidiagonalization.

    Args:
        product: v (batch, n) to A v (batch, m).
        transposed: u (batch, m) to Aᵀu (batch, n).
        start: random vectors, shape (batch, n).
        steps: products with each; min(m, n) of them give all.
        rtol: end once the residual of every largest value is at most this part of it.

    Returns:
        (values, residuals), shape (batch, k), values descending: the first converge to the largest from
        below, the last to the smallest from above. The residual is ‖Aᵀu − σv‖ of the unit vectors.

    Source:
        Golub & Kahan, SIAM J. Numer. Anal. 2 (1965).

    Example:
        >>> a = torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
        >>> values, _ = singular_values(lambda v: v @ a.T, lambda u: u @ a, torch.ones(1, 2), 2)
        >>> values
        tensor([[3.0000, 0.5000]])
    """
    steps = min(steps, start.shape[1])
    v = start / start.norm(dim=1, keepdim=True)
    right = start.new_empty(len(start), steps, start.shape[1])
    left = right[:0]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for k in range(steps):
        right[:, k] = v
        image = product(v)
        if k == 0:
            left = image.new_empty(len(image), min(steps, image.shape[1]), image.shape[1])
        left[:, k], alpha = _orthogonal(image, left[:, :k])
        v, beta = _orthogonal(transposed(left[:, k]), right[:, : k + 1])
        alphas.append(alpha)
        betas.append(beta)
        last = k + 1 in (steps, left.shape[2])
        if last or (rtol and (k + 1) % _LOOK == 0):
            values, residuals = _of_bidiagonal(alphas, betas, whole=k + 1 == left.shape[2])
            if last or bool((residuals[:, 0] <= rtol * values[:, 0]).all()):
                return values, residuals
    raise AssertionError("at least one step")


def _of_bidiagonal(alphas: list[Tensor], betas: list[Tensor], whole: bool) -> tuple[Tensor, Tensor]:
    """Singular values of B, UᵀA = B (v_1 … v_{k+1})ᵀ with α on its diagonal and β above it, and residuals."""
    bidiagonal = torch.nn.functional.pad(torch.diag_embed(torch.stack(alphas, 1)), (0, 1))
    bidiagonal = bidiagonal + torch.diag_embed(torch.stack(betas, 1), offset=1)[:, :-1]
    if whole:  # no row of A is left: B has its singular values
        values = torch.linalg.svdvals(bidiagonal)
        return values, torch.zeros_like(values)
    vectors, values, _ = torch.linalg.svd(bidiagonal[..., :-1])
    return values, betas[-1][:, None] * vectors[:, -1].abs()


def _orthogonal(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors w freed of the basis and normalized, and their lengths.

    Where nothing is left, the basis spans an invariant space: another vector goes on from there, length 0.
    """
    eps = 4 * torch.finfo(w.dtype).eps
    free, _, norm = orthogonalized(w, basis, eps)
    if bool((norm == 0).any()):
        noise = orthogonalized(random_start(*w.shape, like=w, seed=basis.shape[1] + 1), basis, eps)[0]
        free = torch.where((norm == 0)[:, None], noise, free)
    return free, norm


def random_start(batch: int, n: int, like: Tensor, seed: int = 0) -> Tensor:
    """Normal random vectors (batch, n), the same row for every sample, so that none depends on the others."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(1, n, generator=generator, dtype=torch.float64)
    return row.to(dtype=like.dtype, device=like.device).expand(batch, n).clone()
