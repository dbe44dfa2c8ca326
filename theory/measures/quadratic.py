"""A network's loss, replaced by its second-order Taylor polynomial."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from resode.analysis.curvature import Hessian, Loss, check_modes, kept


class QuadraticModel(nn.Module):
    r"""A loss's second-order Taylor polynomial around a network's present weights, to be trained itself.

    q(d) = L + gᵀd + ½ dᵀHd with g the gradient and H the Hessian at the weights: gradient descent on q
    multiplies its deviation along an eigenvector of H by 1 − ηλ an update, as Euler does with F = −∇q.

    Args:
        model: its parameters that require gradients are the variables; it is not changed.
        loss_fn: `loss_fn(model(x), target)`, a scalar.
        data: (x, target).

    Attributes:
        displacement: d, the one parameter, flat, in the order of `model.parameters()`; starts at 0.
        loss: L, a float.
        gradient: g, shape of d.

    Raises:
        ValueError: as `max_learning_rate`.

    Example:
        >>> model = nn.Linear(1, 1, bias=False).double()
        >>> _ = nn.init.zeros_(model.weight)
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> quadratic = QuadraticModel(model, nn.MSELoss(), (x, x))  # 5/2 (w − 1)² at w = 0
        >>> quadratic().backward()
        >>> quadratic.loss, quadratic.displacement.grad
        (2.5, tensor([-5.], dtype=torch.float64))
    """

    def __init__(self, model: nn.Module, loss_fn: Loss, data: tuple[Any, Any]) -> None:
        super().__init__()
        check_modes(model, None)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("no parameter of the model requires a gradient: there is no Hessian to look at.")
        with kept(model), sdpa_kernel(SDPBackend.MATH):
            self._hessian = Hessian(model, loss_fn, data, parameters, None)
            with torch.no_grad():
                self.loss = float(loss_fn(model(data[0]), data[1]))
        assert self._hessian.gradient is not None
        self.gradient = torch.cat([g.detach().flatten() for g in self._hessian.gradient])
        self.displacement = nn.Parameter(torch.zeros_like(self.gradient))

    def forward(self) -> Tensor:
        """q(d), a scalar with the gradient g + Hd."""
        d = self.displacement.detach()
        with sdpa_kernel(SDPBackend.MATH):
            curved = self._hessian.product(d).detach()
        value = self.loss + self.gradient @ d + d @ curved / 2
        return value + (self.gradient + curved) @ (self.displacement - d)  # 0, but for its gradient
