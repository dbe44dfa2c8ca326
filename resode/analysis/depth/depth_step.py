"""Which step for how many blocks: where a network's whole Jacobian reaches a given gain."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from resode.analysis.depth.lesion import branch_factors, scaling
from resode.analysis.depth.losses import batch_of
from resode.analysis.depth.sums import ScaledBranches
from resode.analysis.depth.tracing import Addition, trace
from resode.blocks import ResidualStack
from resode.calls import call, mapped
from resode.checks import check_number, checked
from resode.jacobian.lanczos import random_start, singular_values
from resode.jacobian.places import Place
from resode.jacobian.products import JacobianProducts
from resode.modes import evaluating

_CHANGE = 0.25  # of log σ between two steps tried: what is narrower than that is not looked for
_RTOL = 1e-4  # of the step that is found


@checked
def depth_step(
    model: nn.Module, x: Any, gain: float = 10.0, *, smallest: float = 1e-9, largest: float = 1e3
) -> float:
    r"""The first step η > 0 at which a perturbation can come out of the blocks `gain` times as large.

    σ_max(∂x_L/∂x_0) of the worst sample, x_0 the state before the first block and x_L that after the last,
    starts from 1 at η = 0 and is followed upwards; it need not be monotone, so it is the first crossing that
    counts. Equal blocks allow η ∝ 1/L, random ones more.

    Args:
        model: a ResidualStack, whose step size η is; or any residual network (a stack with learnt steps,
            too), where η multiplies every branch and 1 is the network as it is. It runs in evaluation mode
            and is left as it is.
        x: states or inputs, as in `resode.profile_depth`; the answer is their worst one's.
        gain: above 1.
        smallest: the least step tried.
        largest: where the search ends.

    Returns:
        η, to a relative 1e-4; inf where no step up to `largest` reaches the gain, and 0 where the shortcuts
        alone do, as projections can.

    Raises:
        ValueError: a gain of 1 or less; a model without residual blocks; outputs that are infinite or nan
            whatever the step.
        TypeError: no nn.Module, or states of a stack that are no floating-point tensor.

    Note:
        The steps tried are so close that log σ changes by a quarter at most between them. One costs a pass
        and some 20 products with the Jacobian and its transpose.

    Source:
        Golub & Kahan (1965) for σ_max; on stability in depth and η against L, Haber & Ruthotto, Inverse
        Problems 34 (2018), and Marion et al., Scaling ResNets in the Large-depth Regime (2022).

    Example:
        >>> growth = nn.Linear(2, 2, bias=False)
        >>> _ = growth.weight.data.copy_(torch.eye(2))     # F(x) = x, so σ = (1 + η)^L
        >>> stack = ResidualStack(growth, depth=20)
        >>> round(depth_step(stack, torch.ones(1, 2)), 3), round(10 ** (1 / 20) - 1, 3)
        (0.122, 0.122)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"depth_step takes a ResidualStack or a network, got {type(model).__name__}.")
    check_number("gain", gain, above=1)  # where σ_max starts from at η = 0
    with evaluating(model):
        if isinstance(model, ResidualStack) and model.step_sizes is None:
            return _first_crossing(_of_stack(model, x), math.log(gain), smallest, largest)
        return _first_crossing(_of_model(model, x), math.log(gain), smallest, largest)


def _of_stack(stack: ResidualStack, x: Tensor) -> Callable[[float], float]:
    """Log σ_max of the stack with the step η."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        came = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"a stack's states must be a floating-point tensor, got {came}.")
    if x.ndim < 2 or not len(x):
        raise ValueError(
            f"x must have shape (batch, *state) with at least one sample, got {tuple(x.shape)}. Add the "
            "batch dimension to a single state with x[None]."
        )

    def size(eta: float) -> float:
        if eta == 0:
            return 0.0
        before = stack.step_size
        stack.step_size = eta
        try:
            with torch.inference_mode(False), torch.enable_grad():
                start = x.detach().clone().requires_grad_().clone()
                return _log_gain(start, stack(start), len(x))
        finally:
            stack.step_size = before

    return size


def _of_model(model: nn.Module, x: Any) -> Callable[[float], float]:
    """Log σ_max from the first block's state to the last one's, every branch multiplied by η."""
    additions = trace(model, x).additions
    if not additions:
        raise ValueError("no residual block was found, so no step multiplies a branch.")

    def size(eta: float) -> float:
        mode = _Ends(additions, eta)
        with torch.inference_mode(False), torch.enable_grad(), scaling(mode):
            call(model, mapped(x, mode.seen))  # the state may be an input
        if mode.start is None or mode.end is None:
            raise ValueError(
                "the state before the first block is made anew in each pass: is the model random?"
            )
        return _log_gain(mode.start, mode.end, batch_of(x))

    return size


class _Ends(ScaledBranches):
    """Scales every branch, and keeps the state before the first block and that after the last.

    The first has not met a branch, so it is known by its value: the first tensor that equals it.
    """

    def __init__(self, additions: list[Addition], eta: float) -> None:
        super().__init__(*branch_factors([(a, eta) for a in additions]))
        self.first, self.last = additions[0].x, additions[-1].number
        self.start: Tensor | None = None
        self.end: Tensor | None = None

    def addition(self, number: int, name: str, func: Any, args: Any, kwargs: Any, operands: Any) -> Any:
        """The addition, with its branch scaled."""
        result = self.seen(super().addition(number, name, func, args, kwargs, operands))
        if number == self.last:
            self.end = result
        return result

    def other(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Any other operation."""
        return self.seen(super().other(name, func, args, kwargs))

    def seen(self, value: Any) -> Any:
        """The value, or a start for gradients in its place where it is the first state."""
        same = self.start is None and isinstance(value, Tensor) and value.shape == self.first.shape
        if not same or not value.is_floating_point() or not torch.equal(value.detach(), self.first):
            return value
        self.start = value.detach().clone().requires_grad_().clone()
        return self.start


def _log_gain(start: Tensor, end: Tensor, batch: int) -> float:
    """Log σ_max of ∂end/∂start in the worst sample; inf where it is not finite."""
    if not torch.isfinite(end).all():
        return math.inf
    if not end.requires_grad:
        return -math.inf
    places = [Place((GradientEdge(t.grad_fn, t.output_nr),), (t.shape,)) for t in (end, start)]  # type: ignore[arg-type]
    products = JacobianProducts.between(places[0], places[1], end, start, batch)
    first = random_start(batch, start.numel() // batch, start)
    values, _ = singular_values(products.jvp, products.vjp, first, 80, rtol=1e-3)
    largest = float(values[:, 0].max())
    return math.log(largest) if 0 < largest < math.inf else math.inf if largest != 0 else -math.inf


def _first_crossing(size: Callable[[float], float], level: float, smallest: float, largest: float) -> float:
    """The first η at which size(η) ≥ level, from below, by steps over which it changes by _CHANGE at most."""
    eta, at = 0.0, size(0.0)
    if at == math.inf or size(smallest) == math.inf:
        raise ValueError(
            "the state after the last block is infinite or nan whatever the step, so no gain is measured: "
            "look for such weights or inputs; resode.diagnose names the first place."
        )
    if at >= level:
        return 0.0
    step = 1e-3
    while eta < largest:
        ahead = min(eta + step, largest)
        there = size(ahead)
        fine = step <= max(smallest, _RTOL * eta)
        if not fine and (abs(there - at) > _CHANGE or there == math.inf):
            step /= 2
            continue
        if there >= level:
            return _bisected(size, level, eta, ahead)
        calm = abs(there - at) < _CHANGE / 2
        eta, at = ahead, there
        step = min(step * (2 if calm else 1), max(eta / 2, 1e-3))
    return math.inf


def _bisected(size: Callable[[float], float], level: float, low: float, high: float) -> float:
    while high - low > _RTOL * high:
        middle = (low + high) / 2
        low, high = (low, middle) if size(middle) >= level else (middle, high)
    return high
