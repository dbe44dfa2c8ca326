r"""The gradient through highway layers T(x) ⊙ F(x) + (1 − T(x)) ⊙ x, and the share that shortcuts carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from resode.jacobian.linearize import Field


class Highway(Protocol):
    """What mixes a state with F's output, such as `resode.shortcuts.HighwayShortcut`."""

    def gate(self, x: Tensor) -> Tensor:
        """T(x), of x's shape or one that broadcasts to it."""
        ...

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """T(x) ⊙ F + (1 − T(x)) ⊙ x."""
        ...


@dataclass(frozen=True, eq=False)
class HighwayGradients:
    """The gradient at the state before every highway layer and after the last.

    Args:
        gates: T_l(x_l), shape (L, *x.shape).
        carry: what came along the shortcuts alone, ∏(1 − T_k) ⊙ g over the layers behind, (L + 1, *x.shape).
        total: the whole gradient, along every path, likewise.
    """

    gates: Tensor
    carry: Tensor
    total: Tensor


def highway_gradients(layers: Sequence[tuple[Field, Highway]], x: Tensor, g: Tensor) -> HighwayGradients:
    r"""Send a gradient back through highway layers: along the shortcuts alone, and along every path.

    For `carry` F's output and the gates are held as the constants that they were in the forward pass; what
    the total has beyond it went through an F or a gate at least once.

    Args:
        layers: pairs (F_l, highway_l); F_l keeps the state's shape.
        x: x_0, shape (batch, *state), floating-point.
        g: the gradient at x_L, of x's shape.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: no layer, g of another shape, or a layer that is not T ⊙ F + (1 − T) ⊙ x.

    Source:
        Srivastava, Greff & Schmidhuber, Training Very Deep Networks (2015), arXiv:1507.06228, eq. 2 and 3.

    Example:
        >>> from resode.shortcuts import HighwayShortcut
        >>> highway = HighwayShortcut(2, bias=0.0)
        >>> _ = torch.nn.init.zeros_(highway.transform.weight)  # T = 1/2 everywhere
        >>> found = highway_gradients([(torch.negative, highway)] * 3, torch.ones(1, 2), torch.ones(1, 2))
        >>> found.carry[0].tolist(), found.total[0].tolist()
        ([[0.125, 0.125]], [[0.0, 0.0]])
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}.")
    if not len(layers):
        raise ValueError("layers must hold at least one pair (field, highway).")
    if g.shape != x.shape:
        raise ValueError(
            f"highway layers keep the state's shape, so g has x's: got x {tuple(x.shape)}, "
            f"g {tuple(g.shape)}."
        )
    gates: list[Tensor] = []
    with torch.inference_mode(False), torch.enable_grad():
        states = [x.detach().clone().requires_grad_()]
        carried = [x.detach().clone().requires_grad_()]
        for number, (field, highway) in enumerate(layers):
            residual, gate = field(states[-1]), highway.gate(states[-1])
            states.append(highway(states[-1], residual))
            held, t = residual.detach(), gate.detach()
            carried.append(t * held + (1 - t) * carried[-1])
            _check_mixture(number, states[-1], carried[-1])
            gates.append(t.expand_as(x))
        total = torch.autograd.grad(states[-1], states, g)
        carry = torch.autograd.grad(carried[-1], carried, g)
    return HighwayGradients(torch.stack(gates), torch.stack(carry), torch.stack(total))


def _check_mixture(number: int, y: Tensor, mixture: Tensor) -> None:
    error = (y.detach() - mixture.detach()).abs().amax()
    if not error <= torch.finfo(y.dtype).eps ** 0.5 * (1 + mixture.detach().abs().amax()):
        raise ValueError(
            f"layer {number} is no highway layer: its output differs from T ⊙ F + (1 − T) ⊙ x by "
            f"{float(error):.2g}. Give highways such as resode.shortcuts.HighwayShortcut, in eval mode."
        )
