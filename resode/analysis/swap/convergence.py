r"""How a network's output settles as its depth grows: the order at which it approaches the flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from resode.checks import check_whole, checked
from resode.results import Result


@dataclass(frozen=True, repr=False)
class DepthConvergence(Result):
    """Errors by depth.

    Args:
        depths: L, increasing.
        errors: of each depth, the root mean square over the samples of ‖x_L − reference‖₂; without a
            reference ‖x_L − x_L'‖₂ with L' the next depth, so that the last depth has none.
        slopes: ln(e / e') / ln(L' / L) from each depth to the next, the order between the two.
        order: the slope of the straight line through all (ln L, −ln e), by least squares; inf where an error
            is 0, nan where one is not finite.
    """

    depths: list[int]
    errors: list[float]
    slopes: list[float]
    order: float


@checked
def depth_convergence(
    make: Callable[[int], Callable[[Tensor], Tensor]],
    x: Tensor,
    depths: Sequence[int],
    *,
    reference: Tensor | None = None,
) -> DepthConvergence:
    r"""Observed order of convergence in depth, the p of ‖x_L − x(T)‖ ≈ C L^{−p}.

    Against a reference, or by the change from each depth to the next where none is known: with depths that
    double, the change falls at the same order.

    Args:
        make: gives the network of depth L, such as
            `lambda L: ResidualStack(field, depth=L, step_size=T / L)` or `lambda L: stack.refine(L // 4)`.
        x: states, shape (batch, *state); float64, or rounding shows early.
        depths: increasing; two or more, three without a reference.
        reference: the limit x(T), of the outputs' shape.

    Returns:
        DepthConvergence.

    Raises:
        ValueError: depths that are too few, not whole or not increasing; outputs or a reference of another
            shape than the first output's.

    Source:
        Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, II.3 and II.4.

    Example:
        >>> from torch import nn
        >>> from resode import ResidualStack
        >>> class Decay(nn.Module):
        ...     def forward(self, x):
        ...         return -x
        >>> x = torch.ones(1, 1, dtype=torch.float64)
        >>> found = depth_convergence(
        ...     lambda n: ResidualStack(Decay(), depth=n, step_size=1 / n), x, [64, 128], reference=x / math.e
        ... )
        >>> round(found.order, 2)  # Euler's
        1.0
    """
    found = list(depths)
    least = 3 if reference is None else 2
    for depth in found:
        check_whole("each of depths", depth, 1)
    if len(found) < least or any(a >= b for a, b in pairwise(found)):
        raise ValueError(
            f"depths must be {least} or more increasing whole numbers"
            f"{' (a reference makes two do)' if reference is None else ''}, got {found}."
        )
    with torch.no_grad():
        outputs = [make(depth)(x) for depth in found]
    limits = outputs[1:] if reference is None else [reference] * len(outputs)
    for y in (*outputs, *limits):
        if y.shape != outputs[0].shape:
            raise ValueError(
                f"the outputs and the reference must have one shape: got {tuple(y.shape)} beside "
                f"{tuple(outputs[0].shape)} at depth {found[0]}."
            )
    errors = [_distance(y, limit) for y, limit in zip(outputs, limits, strict=False)]
    logs = [-_log(error) for error in errors]
    places = [math.log(n) for n in found[: len(errors)]]
    slopes = [(d - c) / (b - a) for (a, b), (c, d) in zip(pairwise(places), pairwise(logs), strict=True)]
    return DepthConvergence(found, errors, slopes, _slope(places, logs))


def _distance(y: Tensor, other: Tensor) -> float:
    """Root mean square over the samples of the norm of the difference."""
    return float((y - other).flatten(1).double().square().sum(1).mean().sqrt())


def _log(error: float) -> float:
    """The logarithm of an error; −inf at 0, nan where the error is not finite."""
    if not math.isfinite(error):
        return math.nan
    return math.log(error) if error > 0 else -math.inf


def _slope(x: list[float], y: list[float]) -> float:
    """Of the least-squares line; nan where a y is, else inf where one is."""
    if any(map(math.isnan, y)):
        return math.nan
    if math.inf in y:
        return math.inf
    centre = sum(x) / len(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x)
