r"""Logarithmic norm and contraction limit of large Jacobians, by Lanczos on products with J and Jᵀ."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from resode.jacobian.krylov import Operator
from resode.jacobian.products import Products
from resode.stability import stability_coefficients
from resode.stability.rays import Floats
from resode.tableaus import ButcherTableau

_VECTORS = 32
_RESTARTS = 6
_ROUNDS = 12  # cuts of the contraction limit


def largest(product: Operator, start: Tensor, rtol: float) -> tuple[Floats, Tensor]:
    """The largest eigenvalue of a symmetric operator in each row, and its unit vector.

    Lanczos with full orthogonalization in float64, started again from what it has found.

    Args:
        product: A v (rows, n) of v (rows, n), A symmetric.
        start: first vectors (rows, n).
        rtol: wanted residual, relative to the largest Ritz value's modulus.

    Example:
        >>> a = torch.diag(torch.tensor([1.0, 2.0, -3.0]))
        >>> float(largest(lambda v: v @ a, torch.ones(1, 3), 1e-6)[0][0])
        2.0...
    """
    rows, n = start.shape
    size = min(_VECTORS, n)
    values, x = np.zeros(rows), start.double()
    for _ in range(_RESTARTS):
        basis = torch.zeros(rows, size + 1, n, dtype=torch.float64, device=start.device)
        images = torch.zeros(rows, size, n, dtype=torch.float64, device=start.device)
        basis[:, 0] = x / x.norm(dim=1, keepdim=True).clamp_min(1e-300)
        for j in range(size):
            w = images[:, j] = product(basis[:, j].to(start.dtype)).double()
            known = basis[:, : j + 1]
            for _ in range(2):
                w = w - ((known @ w[..., None]).transpose(1, 2) @ known)[:, 0]
            norm = w.norm(dim=1, keepdim=True)
            scale = images[:, j].norm(dim=1, keepdim=True)
            basis[:, j + 1] = torch.where(norm > 1e-12 * scale, w / norm.clamp_min(1e-300), 0.0)
        v = basis[:, :size]
        t = v @ images.transpose(1, 2)
        theta, y = torch.linalg.eigh((t + t.transpose(1, 2)) / 2 - 1e300 * _absent(v))
        top = y[:, :, -1:]
        x = (top.transpose(1, 2) @ v)[:, 0]
        residual = ((top.transpose(1, 2) @ images)[:, 0] - theta[:, -1:] * x).norm(dim=1)
        values = theta[:, -1].cpu().numpy()
        if bool((residual <= rtol * theta[:, -1].abs().clamp_min(1e-300)).all()):
            break
    return values, x


def _absent(basis: Tensor) -> Tensor:
    """1 on the diagonal for basis vectors that are 0, past the end of an invariant space."""
    return torch.diag_embed((basis.norm(dim=2) < 0.5).double())


def logarithmic_norms_of(products: Products, start: Tensor, rtol: float) -> Floats:
    """μ₂ (rows,) of the Jacobians, λ_max((J + Jᵀ)/2), from below to about `rtol`²."""
    return largest(lambda v: (products.transposed(v) + products.forward(v)) / 2, start, rtol)[0]


def contraction_steps_of(
    products: Products, tableau: ButcherTableau, spectral: Floats, start: Tensor, rtol: float
) -> Floats:
    """sup{h : ‖R(sJ)‖₂ ≤ 1 for 0 ≤ s ≤ h} (rows,) of Jacobians with μ₂ ≤ 0, an explicit method.

    From the spectral limit downwards: the singular vector u that R(hJ) enlarges most gives the first h at
    which ‖R(hJ)u‖ exceeds 1, which is the next h, until nothing is enlarged there or on the way to it.
    """
    h = spectral.copy()
    u = start
    for fraction in (1.0, 0.75, 0.5, 0.25):
        for _ in range(_ROUNDS):
            at = torch.as_tensor(fraction * h, device=start.device)[:, None]

            def squared(v: Tensor, at: Tensor = at) -> Tensor:
                return apply(products.transposed, tableau, at, apply(products.forward, tableau, at, v))

            sizes, u = largest(squared, u.to(start.dtype), max(rtol, 1e-6))
            above = sizes > 1 + 2 * rtol
            if not above.any():
                break
            exits = _first_exits(products, tableau, u.to(start.dtype), fraction * h)
            h = np.where(above, np.minimum(h, exits), h)
    return h


def _first_exits(products: Products, tableau: ButcherTableau, u: Tensor, below: Floats) -> Floats:
    """The first h ≤ `below` beyond which ‖R(hJ)u‖ > ‖u‖, from the powers J^k u."""
    coefficients = np.array([float(c) for c in stability_coefficients(tableau)[0]])
    powers = [u]
    for _ in coefficients[1:]:
        powers.append(products.forward(powers[-1]))
    k = torch.stack([p.double() for p in powers], dim=1)
    gram = (k @ k.transpose(1, 2)).cpu().numpy() * np.outer(coefficients, coefficients)
    found = below.copy()
    for row, g in enumerate(gram):
        sums = np.array([np.trace(g[::-1], offset) for offset in range(1 - len(g), len(g))])
        polynomial = (sums / g[0, 0])[1:]  # (‖R(hJ)u‖²/‖u‖² − 1)/h, from the constant on
        roots = np.roots(polynomial[::-1])
        real = np.sort(roots.real[(np.abs(roots.imag) <= 1e-9 * np.abs(roots)) & (roots.real > 0)])
        for root in real[real < below[row]]:
            after = np.polyval(polynomial[::-1], root * (1 + 1e-6))
            if after > 0:
                found[row] = root
                break
        if polynomial[0] > 0:
            found[row] = 0.0
    return found


def apply(product: Operator, tableau: ButcherTableau, eta: Tensor, v: Tensor) -> Tensor:
    """R(ηA)v (rows, n) for an explicit method, by Horner's rule; η (rows, 1), v real or complex."""
    if v.is_complex():
        return torch.complex(apply(product, tableau, eta, v.real), apply(product, tableau, eta, v.imag))
    coefficients = [float(c) for c in stability_coefficients(tableau)[0]]
    eta = eta.to(v.dtype)
    total = coefficients[-1] * v
    for c in coefficients[-2::-1]:
        total = c * v + eta * product(total)
    return total
