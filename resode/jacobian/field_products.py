"""Products of a field's Jacobian with vectors, for every sample of a batch, without forming it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Field = Callable[[Tensor], Tensor]


class Products:
    """J v and Jᵀ v at states x, from one evaluation of the field.

    jvp is the derivative of vjp, which is linear in its direction; where F has no second derivative in
    autograd, central differences take its place.

    Args:
        field: F, rows of a batch not interacting.
        x: states, shape (batch, *state), floating-point.

    Example:
        >>> products = Products(lambda x: x * x.flip(1), torch.tensor([[1.0, 2.0]]))
        >>> products.jvp(torch.tensor([[1.0, 0.0]])), products.vjp(torch.tensor([[1.0, 0.0]]))
        (tensor([[2., 2.]]), tensor([[2., 1.]]))
    """

    def __init__(self, field: Field, x: Tensor) -> None:
        self.field, self.shape = field, x.shape
        with torch.inference_mode(False), torch.enable_grad():
            self.x = x.detach().clone().requires_grad_()
            self.y = field(self.x)
        self.value = self.y.detach().reshape(len(x), -1)
        self._forward: tuple[Tensor, Tensor] | None = None
        self._differences = False

    def vjp(self, v: Tensor) -> Tensor:
        """Jᵀv for v (batch, n), same shape."""
        if not self.y.requires_grad:
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(
            self.y, self.x, v.reshape(self.shape), retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(v) if product is None else product.reshape(v.shape)

    def jvp(self, v: Tensor) -> Tensor:
        """J v for v (batch, n), same shape."""
        if not self.y.requires_grad:
            return torch.zeros_like(v)
        if self._differences:
            return self._difference(v)
        if self._forward is None:
            with torch.inference_mode(False), torch.enable_grad():
                u = torch.zeros_like(self.y).requires_grad_()
                (h,) = torch.autograd.grad(self.y, self.x, u, create_graph=True, allow_unused=True)
            if h is None:
                return torch.zeros_like(v)
            self._forward = u, h
        u, h = self._forward
        try:
            (product,) = torch.autograd.grad(
                h, u, v.reshape(self.shape), retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            if "not implemented" not in str(error) and "does not require grad" not in str(error):
                raise
            self._differences = True
            return self._difference(v)
        return torch.zeros_like(v) if product is None else product.reshape(v.shape)

    def _difference(self, v: Tensor) -> Tensor:
        size = v.norm(dim=1, keepdim=True)
        x = self.x.detach().reshape(v.shape)
        root = torch.finfo(v.dtype).eps ** (1 / 3)
        step = root * (1 + x.norm(dim=1, keepdim=True)) / torch.where(size > 0, size, 1.0)
        with torch.no_grad():
            ahead, behind = (
                self.field((x + s * step * v).reshape(self.shape)).reshape(v.shape) for s in (1, -1)
            )
        return (ahead - behind) / (2 * step)
