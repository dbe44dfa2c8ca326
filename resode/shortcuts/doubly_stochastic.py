"""Matrices whose rows and columns all sum to 1, from any logits (Sinkhorn & Knopp)."""

from __future__ import annotations

import torch
from torch import Tensor

from resode.checks import checked
from resode.symbols import one_node

TOLERANCE = 1e-6
"""How far a row or column sum may be from 1."""

_SWEEPS, _STEPS, _DAMPING = 10, 60, 1e-13


@checked
@one_node
def doubly_stochastic(logits: Tensor) -> Tensor:
    r"""The doubly stochastic matrix diag(e^f) exp(M) diag(e^g) of logits M.

    Ten sweeps of Sinkhorn and Knopp bring the scalings near; Newton's steps on the convex dual then end the
    slow linear convergence, which after twenty sweeps alone may leave a column sum off by 4e-2. The gradient
    is that of the limit, by one more step from it (implicit function theorem), not of the sweeps.

    Args:
        logits: shape (..., n, n), real and finite.

    Returns:
        Shape and dtype of the logits; rows and columns sum to 1 within 1e-6, up to the rounding of float16
        and bfloat16. Computed in float64: the matrices are small.

    Raises:
        ValueError: no square matrices.
        ArithmeticError: logits so far apart that no scaling is found, or not finite.

    Source:
        Sinkhorn & Knopp (1967), Pacific J. Math. 21; used for residual streams by Xie et al. (2025),
        arXiv:2512.24880.

    Example:
        >>> doubly_stochastic(torch.tensor([[0.0, 3.0], [1.0, 0.0]], dtype=torch.float64))
        tensor([[0.1192, 0.8808],
                [0.8808, 0.1192]], dtype=torch.float64)
    """
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(
            f"a doubly stochastic matrix is square: got logits of shape {tuple(logits.shape)}. "
            "Give (..., n, n), a row for each stream out and a column for each stream in."
        )
    wide = logits.double() if logits.device.type != "mps" else logits.float()  # which has no float64
    with torch.no_grad():
        f, g = _scalings(wide)
    f, g = _step(wide, f, g)
    return torch.exp(wide + f[..., :, None] + g[..., None, :]).to(logits.dtype)


def _scalings(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Scalings f and g, (..., n) each, with which rows and columns sum to 1."""
    f = -torch.logsumexp(logits, -1)
    g = torch.zeros_like(f)
    for _ in range(_SWEEPS):
        g = -torch.logsumexp(logits + f[..., :, None], -2)
        f = -torch.logsumexp(logits + g[..., None, :], -1)
    seen = not (torch.compiler.is_compiling() or logits.is_meta)  # else a fixed number of steps
    for _ in range(_STEPS):
        if seen and _error(logits, f, g) <= TOLERANCE / 2:
            return f, g
        f, g = _step(logits, f, g)
        f = -torch.logsumexp(logits + g[..., None, :], -1)
    if seen:
        error = _error(logits, f, g)
        if not error <= TOLERANCE:
            raise ArithmeticError(
                f"row and column sums of 1 were not reached: {error:.1e} is left over. Logits that differ by "
                f"{float(logits.max() - logits.min()):.3g} are too far apart, or not finite; use float64 or "
                "smaller ones."
            )
    return f, g


def _sums(logits: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = torch.exp(logits + f[..., :, None] + g[..., None, :])
    return p, p.sum(-1), p.sum(-2)


def _error(logits: Tensor, f: Tensor, g: Tensor) -> float:
    _, rows, columns = _sums(logits, f, g)
    return max((rows - 1).abs().max().item(), (columns - 1).abs().max().item())


def _step(logits: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """One Newton step on ΣP − Σf − Σg, convex in (f, g), no longer than 1 in any scaling.

    Its matrix knows nothing of f + c, g − c; a rank-one term fixes that c.
    """
    p, rows, columns = _sums(logits, f, g)
    n = p.shape[-1]
    with torch.no_grad():
        fixed = p.new_full((2 * n,), 1 / (2 * n) ** 0.5)
        fixed[n:] *= -1
        top = torch.cat((torch.diag_embed(rows), p), -1)
        bottom = torch.cat((p.mT, torch.diag_embed(columns)), -1)
        matrix = torch.cat((top, bottom), -2) + torch.outer(fixed, fixed)
        # Where P falls apart into parts that hardly see each other, each has such a c of its own.
        matrix.diagonal(dim1=-2, dim2=-1).add_(_DAMPING if matrix.dtype == torch.float64 else 1e-6)
    rest = torch.cat((1 - rows, 1 - columns), -1)
    change = torch.linalg.solve(matrix, rest[..., None])[..., 0]
    change = change / change.detach().abs().amax(-1, keepdim=True).clamp_min(1)
    return f + change[..., :n], g + change[..., n:]
