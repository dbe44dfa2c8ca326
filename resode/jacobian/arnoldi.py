r"""Arnoldi and GMRES on products with a matrix that is never formed, for a batch of matrices at once.

A product takes vectors (batch, n) and gives A_b v_b for every b: one call of a batched field's vjp or jvp
serves all samples. Bases are kept and orthogonalized twice, so that nothing is lost to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def gmres(
    product: Product, b: Tensor, *, tol: float, steps: int = 60, restarts: int = 5
) -> tuple[Tensor, Tensor]:
    """Solve A x = b for every sample by restarted GMRES.

    Args:
        product: v (batch, n) to A v.
        b: right-hand sides, shape (batch, n).
        tol: bound on ‖b − Ax‖ / ‖b‖ of every sample, at which it stops.
        steps: products before a restart.
        restarts: how often at most.

    Returns:
        (x, residual): x of b's shape, and ‖b − Ax‖ / ‖b‖, shape (batch,), 0 where b is 0.

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


def _cycle(product: Product, r: Tensor, goal: Tensor, steps: int) -> Tensor:
    """The correction in r's Krylov space that leaves the least residual; each sample stops on its own."""
    batch = len(r)
    basis, columns = _start(r, steps)
    triangle = torch.zeros(batch, steps, steps, dtype=r.dtype, device=r.device)
    cosine, sine = torch.zeros(2, batch, steps, dtype=r.dtype, device=r.device)
    right = torch.zeros(batch, steps + 1, dtype=r.dtype, device=r.device)
    right[:, 0] = r.norm(dim=1)
    used = torch.full((batch,), steps, device=r.device)
    used[right[:, 0] <= goal] = 0
    for j in range(steps):
        _extend(product, basis, columns, j)
        h = columns[:, : j + 2, j].clone()
        for i in range(j):  # earlier Givens rotations
            a, b = h[:, i].clone(), h[:, i + 1].clone()
            h[:, i] = cosine[:, i] * a + sine[:, i] * b
            h[:, i + 1] = cosine[:, i] * b - sine[:, i] * a
        length = torch.hypot(h[:, j], h[:, j + 1])
        usable = length > 8 * torch.finfo(r.dtype).eps * columns[:, :, : j + 1].abs().amax((1, 2))
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


def _start(first: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Room for an Arnoldi basis (batch, steps + 1, n), its first vector set, and its Hessenberg matrix."""
    batch, n = first.shape
    basis = torch.zeros(batch, steps + 1, n, dtype=first.dtype, device=first.device)
    norm = first.norm(dim=1, keepdim=True)
    basis[:, 0] = torch.where(norm > 0, first / torch.where(norm > 0, norm, 1.0), 0.0)
    return basis, torch.zeros(batch, steps + 1, steps, dtype=first.dtype, device=first.device)


def _extend(product: Product, basis: Tensor, columns: Tensor, j: int) -> None:
    """One Arnoldi step; a basis that spans an invariant space goes on with a zero vector."""
    w = product(basis[:, j])
    size = w.norm(dim=1)
    old = basis[:, : j + 1]
    for _ in range(2):
        h = (old @ w[..., None])[..., 0]
        w = w - (h[:, None] @ old)[:, 0]
        columns[:, : j + 1, j] += h
    norm = w.norm(dim=1)
    norm = torch.where(norm > 8 * torch.finfo(w.dtype).eps * size, norm, 0.0)
    columns[:, j + 1, j] = norm
    basis[:, j + 1] = w / torch.where(norm > 0, norm, 1.0)[:, None] * (norm > 0)[:, None]


def ritz_values(product: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    r"""Approximate eigenvalues by Arnoldi's method, the outermost best.

    Args:
        product: v (batch, n) to A v.
        start: first vectors, shape (batch, n), not 0.
        steps: products; n of them give every eigenvalue that `start` has a part in.

    Returns:
        (values, residuals), complex and real, shape (batch, m): a Ritz value and ‖Av − θv‖ of its unit
        vector, which in a normal matrix bounds its distance from an eigenvalue.

    Source:
        Saad, Numerical Methods for Large Eigenvalue Problems, 2nd ed. (2011), chapter 6.

    Example:
        >>> diagonal = torch.tensor([-3.0, 1.0, 2.0])
        >>> values, _ = ritz_values(lambda v: v * diagonal, torch.ones(1, 3), 3)
        >>> values.real.sort().values.round(decimals=4)
        tensor([[-3.,  1.,  2.]])
    """
    m = min(steps, start.shape[1])
    basis, columns = _start(start, m)
    for j in range(m):
        _extend(product, basis, columns, j)
    square, last = columns[:, :m], columns[:, m, m - 1]
    values, vectors = torch.linalg.eig(square)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    weight = basis[:, :m].norm(dim=2)  # 0 for vectors beyond an invariant space
    lost = (vectors.abs() * (weight == 0)[:, :, None]).sum(1) > 0.5
    residual = last.abs()[:, None] * vectors[:, -1].abs()
    return torch.where(lost, torch.nan, values), torch.where(lost, torch.inf, residual)


def singular_values(
    product: Product, transposed: Product, start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    r"""Approximate singular values from a random start, by Golub and Kahan's bidiagonalization.

    Args:
        product: v (batch, n) to A v (batch, m).
        transposed: u (batch, m) to Aᵀu (batch, n).
        start: random vectors, shape (batch, n).
        steps: products with each; min(m, n) of them give all.

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
    right: list[Tensor] = [start / start.norm(dim=1, keepdim=True)]
    left: list[Tensor] = []
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for _ in range(min(steps, start.shape[1])):
        u, alpha = _orthogonal(product(right[-1]), left)
        left.append(u)
        alphas.append(alpha)
        v, beta = _orthogonal(transposed(u), right)
        right.append(v)
        betas.append(beta)
        if len(left) >= u.shape[1]:
            break
    bidiagonal = torch.diag_embed(torch.stack(alphas, 1))
    if len(betas) > 1:
        bidiagonal = bidiagonal + torch.diag_embed(torch.stack(betas[:-1], 1), offset=1)
    vectors, values, _ = torch.linalg.svd(bidiagonal)
    return values, betas[-1][:, None].abs() * vectors[:, -1].abs()


def _orthogonal(w: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The vectors w freed of the basis and normalized, and their lengths.

    Where nothing is left, the basis spans an invariant space: another vector goes on from there, length 0.
    """
    size = w.norm(dim=1)
    w = _freed(w, basis)
    norm = w.norm(dim=1)
    norm = torch.where(norm > 32 * torch.finfo(w.dtype).eps * size, norm, 0.0)
    ended = (norm == 0)[:, None]
    if bool(ended.any()):
        w = torch.where(ended, _freed(random_start(*w.shape, like=w, seed=len(basis) + 1), basis), w)
    length = w.norm(dim=1, keepdim=True)
    return w / torch.where(length > 0, length, 1.0), norm


def _freed(w: Tensor, basis: list[Tensor]) -> Tensor:
    if basis:
        old = torch.stack(basis, 1)
        for _ in range(2):
            w = w - ((old @ w[..., None]).transpose(1, 2) @ old)[:, 0]
    return w


def random_start(batch: int, n: int, like: Tensor, seed: int = 0) -> Tensor:
    """Normal random vectors (batch, n), the same row for every sample, so that none depends on the others."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(1, n, generator=generator, dtype=torch.float64)
    return row.to(dtype=like.dtype, device=like.device).expand(batch, n).clone()
