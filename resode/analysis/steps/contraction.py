r"""Logarithmic norm and contraction limit of large Jacobians, by Lanczos on products with J and Jᵀ."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from resode.jacobian.lanczos import Operator, largest
from resode.jacobian.linearize import Field
from resode.jacobian.outer import MEMORY
from resode.jacobian.products import JacobianProducts, full_precision
from resode.stability import stability_coefficients
from resode.stability.function import stability_product
from resode.stability.limits import StepLimit, plain
from resode.stability.spectra import Spectrum
from resode.stability.unstable_rays import Floats
from resode.tableaus import ButcherTableau

_AMPLE = 100.0  # times 1/‖J‖: more than any method's contraction limit
_ROUNDS = 12  # cuts of the contraction limit


def contraction_limits(
    field: Field, x: Tensor, tableau: ButcherTableau, limit: StepLimit, spectrum: Spectrum
) -> tuple[Floats, Floats]:
    """μ₂ and the contraction limit of every sample under an explicit method, from products with J and Jᵀ."""
    n = x[0].numel()
    spectral, scales, tau = plain(limit.step).astype(float), spectrum.scale, spectrum.tau[:, 0]
    wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    rows = max(1, MEMORY // (80 * n * 8))
    rates, contraction = np.zeros(len(x)), np.zeros(len(x))
    generator = torch.Generator().manual_seed(23)
    rtol = max(1e-4, 1e3 * torch.finfo(x.dtype).eps)
    with full_precision():
        for first in range(0, len(x), rows):
            part = slice(first, min(first + rows, len(x)))
            products = JacobianProducts(field, x[part])
            start = torch.randn(len(x[part]), n, generator=generator, dtype=wide).to(x.device)
            mu = largest(lambda v, J=products: (J.vjp(v) + J.jvp(v)) / 2, start, 1e-2)  # from below, to 1e-4
            rates[part] = mu.value.cpu().numpy()
            quiet = np.flatnonzero((rates[part] <= tau[part]) & (spectral[part] > 0))
            for i in quiet + first:
                if scales[i] == 0:
                    contraction[i] = np.inf
                    continue
                # Where no eigenvalue limits it, or none was found that does, a multiple of 1/‖J‖ is enough.
                above = np.minimum(spectral[i : i + 1], _AMPLE / scales[i])
                one = JacobianProducts(field, x[i : i + 1])
                contraction[i] = contraction_steps_of(one, tableau, above, start[i - first][None], rtol)[0]
    return rates, contraction


def contraction_steps_of(
    products: JacobianProducts, tableau: ButcherTableau, spectral: Floats, start: Tensor, rtol: float
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
                return apply(products.vjp, tableau, at, apply(products.jvp, tableau, at, v))

            top = largest(squared, u.to(start.dtype), max(rtol, 1e-6))
            u, above = top.vector, top.value.cpu().numpy() > 1 + 2 * rtol
            if not above.any():
                break
            exits = _first_exits(products, tableau, u.to(start.dtype), fraction * h)
            h = np.where(above, np.minimum(h, exits), h)
    return h


def _first_exits(products: JacobianProducts, tableau: ButcherTableau, u: Tensor, below: Floats) -> Floats:
    """The first h ≤ `below` beyond which ‖R(hJ)u‖ > ‖u‖, from the powers J^k u."""
    if tableau.recurrence is not None:
        return _halved(products, tableau, u, below)
    coefficients = np.array([float(c) for c in stability_coefficients(tableau)[0]])
    powers = [u]
    for _ in coefficients[1:]:
        powers.append(products.jvp(powers[-1]))
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


def _halved(products: JacobianProducts, tableau: ButcherTableau, u: Tensor, below: Floats) -> Floats:
    """As `_first_exits`, by halving: of several crossings any one."""
    low, high, size = np.zeros_like(below), below.copy(), u.norm(dim=1)
    for _ in range(24):
        middle = (low + high) / 2
        at = torch.as_tensor(middle, device=u.device)[:, None]
        above = (apply(products.jvp, tableau, at, u).norm(dim=1) > size * (1 + 1e-6)).cpu().numpy()
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return low


def apply(product: Operator, tableau: ButcherTableau, eta: Tensor, v: Tensor) -> Tensor:
    """R(ηA)v (rows, n) for an explicit method; η (rows, 1), v real or complex."""
    if v.is_complex():
        return torch.complex(apply(product, tableau, eta, v.real), apply(product, tableau, eta, v.imag))
    eta = eta.to(v.dtype)
    return stability_product(tableau, lambda x: eta * product(x), v)
