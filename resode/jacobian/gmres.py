r"""GMRES on products with a matrix that is never formed, for a batch of matrices at once."""

from __future__ import annotations

import torch
from torch import Tensor

from resode.jacobian.lanczos import Operator, orthogonalized


def gmres(
    product: Operator, b: Tensor, *, tol: float, steps: int = 60, restarts: int = 5
) -> tuple[Tensor, Tensor]:
    """Solve A x = b for every sample by restarted GMRES.

    It stops where ‖b − Ax‖ / ‖b‖ ≤ tol in every sample, and starts anew after so many steps. Returned are x
    and that residual, shape (batch,), 0 where b is 0.

    Source:
        Saad & Schultz, SIAM J. Sci. Stat. Comput. 7 (1986).

    Example:
        >>> x, residual = gmres(lambda v: v * torch.tensor([2.0, 4.0]), torch.ones(1, 2), tol=1e-6)
        >>> x, bool(residual < 1e-6)
        (tensor([[0.5000, 0.2500]]), True)
    """
    x, r = torch.zeros_like(b), b
    size = b.norm(dim=1)
    goal = tol * size
    previous = torch.full_like(size, torch.inf)
    for _ in range(restarts):
        norm = r.norm(dim=1)
        if bool(((norm <= goal) | (norm > 0.9 * previous)).all()):
            break
        previous = norm
        x = x + _cycle(product, r, goal, min(steps, b.shape[1]))
        r = b - product(x)
    return x, torch.where(size > 0, r.norm(dim=1) / size, 0.0)


def _cycle(product: Operator, r: Tensor, goal: Tensor, steps: int) -> Tensor:
    """The correction in r's Krylov space that leaves the least residual; each sample stops on its own."""
    batch, n = r.shape
    eps = torch.finfo(r.dtype).eps
    basis = torch.zeros(batch, steps + 1, n, dtype=r.dtype, device=r.device)
    size = r.norm(dim=1, keepdim=True)
    basis[:, 0] = r / torch.where(size > 0, size, 1.0)
    largest = torch.zeros_like(size[:, 0])  # entry of the Hessenberg matrix
    triangle = torch.zeros(batch, steps, steps, dtype=r.dtype, device=r.device)
    cosine, sine = torch.zeros(2, batch, steps, dtype=r.dtype, device=r.device)
    right = torch.zeros(batch, steps + 1, dtype=r.dtype, device=r.device)
    right[:, 0] = size[:, 0]
    used = torch.full((batch,), steps, device=r.device)
    used[right[:, 0] <= goal] = 0
    for j in range(steps):
        basis[:, j + 1], column, rest = orthogonalized(product(basis[:, j]), basis[:, : j + 1], eps)
        h = torch.cat([column, rest[:, None]], 1)
        largest = torch.maximum(largest, h.abs().amax(1))
        for i in range(j):  # earlier Givens rotations
            a, b = h[:, i].clone(), h[:, i + 1].clone()
            h[:, i] = cosine[:, i] * a + sine[:, i] * b
            h[:, i + 1] = cosine[:, i] * b - sine[:, i] * a
        length = torch.hypot(h[:, j], h[:, j + 1])
        usable = length > 8 * eps * largest
        safe = torch.where(usable, length, 1.0)
        cosine[:, j] = torch.where(usable, h[:, j] / safe, 1.0)
        sine[:, j] = torch.where(usable, h[:, j + 1] / safe, 0.0)
        triangle[:, :j, j], triangle[:, j, j] = h[:, :j], length
        used = torch.where((used > j) & ~usable, j, used)  # a singular matrix: nothing more to gain
        right[:, j + 1] = -sine[:, j] * right[:, j]
        right[:, j] = cosine[:, j] * right[:, j]
        used = torch.where((used > j) & (right[:, j + 1].abs() <= goal), j + 1, used)
        if bool((used <= j + 1).all()):
            break
    idle = torch.arange(steps, device=r.device) >= used[:, None]
    triangle = torch.where(idle[:, :, None] | idle[:, None, :], 0.0, triangle) + torch.diag_embed(
        idle.to(r.dtype)
    )
    y = torch.linalg.solve_triangular(
        triangle, torch.where(idle, 0.0, right[:, :steps])[..., None], upper=True
    )
    return (basis[:, :steps].transpose(1, 2) @ y)[..., 0]
