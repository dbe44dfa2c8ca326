r"""How much a function goes up and down on an interval."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from resode.jacobian.linearize import Field


def total_variation(
    f: Field,
    interval: tuple[float, float] = (0.0, 1.0),
    *,
    knots: Iterable[float] | Tensor = (),
    samples: int = 1024,
    dtype: torch.dtype = torch.float64,
) -> float:
    r"""TV(f) = sup Σ‖f(x_{i+1}) − f(x_i)‖₂ over the partitions of an interval, on one fine partition.

    The partition has the interval's ends, `samples` equal pieces, and the knots inside. The sum is exact for
    a scalar f that is monotone between the points, so for a piecewise-linear one whose knots are given, as a
    ReLU network's are; for any other it approaches TV from below (a smooth one at second order).

    Args:
        f: any callable on points of shape (n, 1), giving (n, …).
        interval: its ends (a, b), a < b.
        knots: points at which f turns; those outside the interval are left out.
        samples: equal pieces beside the knots, at least 1.
        dtype: of the points.

    Returns:
        TV(f), in f's unit.

    Raises:
        ValueError: an interval without length, fewer than one piece, infinite knots or values, or f giving
            another number of rows.

    Source:
        Jordan (1881); Rudin, Principles of Mathematical Analysis (3rd ed. 1976), 6.23 for the vector case.

    Example:
        >>> total_variation(lambda x: (x - 0.3).abs(), knots=[0.3], samples=1)  # down by 0.3, up by 0.7
        1.0
    """
    a, b = interval
    if not (math.isfinite(a) and math.isfinite(b) and a < b):
        raise ValueError(f"interval must be (a, b) with a < b, both finite: got {interval}.")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a whole number of at least 1: got {samples!r}.")
    inside = torch.as_tensor(knots if isinstance(knots, Tensor) else list(knots), dtype=dtype).flatten()
    if not torch.isfinite(inside).all():
        raise ValueError("knots must be finite.")
    inside = inside[(a < inside) & (inside < b)]
    points = torch.cat([torch.linspace(a, b, samples + 1, dtype=dtype), inside]).unique()[:, None]
    with torch.no_grad():
        values = f(points)
    if values.ndim < 1 or len(values) != len(points):
        raise ValueError(
            f"f must give one row a point: got points {tuple(points.shape)}, f {tuple(values.shape)}."
        )
    if not torch.isfinite(values).all():
        raise ValueError("f must be finite on the interval; it holds inf or nan.")
    return float(values.reshape(len(points), -1).diff(dim=0).norm(dim=1).sum())
