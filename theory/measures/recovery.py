r"""How much of the input is left in deep features, for a linear reader."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def recovery(features: Tensor, inputs: Tensor, *, ridge: float = 1e-6, train_share: float = 0.5) -> float:
    r"""Coefficient of determination R² of inputs read linearly from features, on samples not used to fit.

    Both are centred; the reader C minimizes ‖ΦC − X‖² + ridge·σ²‖C‖² on the first samples, in float64, with σ
    the largest singular value of Φ, so that features of any size count alike. 1 is full recovery; 0 no better
    than the mean.

    Args:
        features: Φ, shape (N, …).
        inputs: X, shape (N, …).
        ridge: relative; a feature direction below √ridge of the largest is taken as lost.
        train_share: of the samples that the reader is fitted to.

    Raises:
        ValueError: other numbers of samples, fewer than four, or a share not within (0, 1).

    Source:
        Alain & Bengio, Understanding intermediate layers using linear classifier probes (2016),
        arXiv:1610.01644, on linear probes.

    Example:
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> mixing = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.5], [1.0, 0.0, 1.0]])
        >>> round(recovery(x @ mixing, x), 3), recovery(torch.ones(100, 3), x) < 0.05
        (1.0, True)
    """
    if len(features) != len(inputs) or len(inputs) < 4 or not 0 < train_share < 1:
        raise ValueError(
            "recovery needs at least four samples, as many features as inputs, a share between 0 and 1: got "
            f"{len(features)}, {len(inputs)} and {train_share}."
        )
    phi, x = features.flatten(1).double(), inputs.flatten(1).double()
    count = min(max(round(train_share * len(x)), 2), len(x) - 2)
    centre, middle = phi[:count].mean(0), x[:count].mean(0)
    u, s, vh = torch.linalg.svd(phi[:count] - centre, full_matrices=False)
    if not bool(torch.isfinite(s).all()):
        return float("nan")
    largest = s[0] if s[0] > 0 else torch.ones(())
    scaled = s / largest  # in units of the largest, so that tiny features do not underflow
    weights = scaled / (scaled.square() + ridge)
    solution = vh.T @ (weights[:, None] * (u.T @ (x[:count] - middle))) / largest
    left = x[count:] - middle - (phi[count:] - centre) @ solution
    return 1 - float(left.square().sum() / (x[count:] - x[count:].mean(0)).square().sum())
