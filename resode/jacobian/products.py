r"""Products of a field's Jacobians with vectors, without forming J: one graph of F, kept, for all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from resode.jacobian.linearize import Field


class Products:
    r"""J_s = ∂F/∂x at each row s of x, as an operator on vectors (rows, n), one for each row.

    F is evaluated once, on all rows, and its graph is kept: `transposed` is one backward pass over it,
    `forward` a backward pass through that pass, because forward derivatives are missing from many custom
    functions; where that is missing it is a forward derivative, and where that is missing too a central
    difference, right to about five digits in float32 and ten in float64. Products run in x's dtype, in full
    float32 on devices that would round it (TF32).

    Args:
        field: as `resode.jacobian.linearize.check_field` demands; it is not checked again.
        x: states, shape (rows, *state).

    Example:
        >>> p = Products(lambda x: x * x.flip(1), torch.tensor([[1.0, 2.0]]))  # J = [[2, 1], [2, 1]]
        >>> p.transposed(torch.tensor([[1.0, 0.0]])), p.forward(torch.tensor([[1.0, 0.0]]))
        (tensor([[2., 1.]]), tensor([[2., 2.]]))
    """

    def __init__(self, field: Field, x: Tensor) -> None:
        self.count = 0  # products of one vector a row
        self._field = field
        with torch.inference_mode(False), torch.enable_grad(), full_precision():
            self._x = x.detach().clone().requires_grad_()
            self._y = field(self._x)
        self._direction: Tensor | None = None
        self._pulled: Tensor | None = None
        self._twice = True  # whether the backward pass can itself be differentiated
        self._ahead = True  # whether F has a forward derivative

    def transposed(self, v: Tensor) -> Tensor:
        """Jᵀv (rows, n) of v (rows, n)."""
        self.count += 1
        if not self._y.requires_grad:
            return torch.zeros_like(v)
        with torch.inference_mode(False), full_precision():
            (product,) = torch.autograd.grad(
                self._y,
                self._x,
                v.reshape(self._x.shape).to(self._y.dtype),
                retain_graph=True,
                allow_unused=True,
            )
        return torch.zeros_like(v) if product is None else product.reshape(v.shape).to(v.dtype)

    def forward(self, v: Tensor) -> Tensor:
        """Jv (rows, n) of v (rows, n)."""
        self.count += 1
        if not self._y.requires_grad:
            return torch.zeros_like(v)
        direction = v.reshape(self._x.shape).to(self._x.dtype)
        with torch.inference_mode(False), torch.enable_grad(), full_precision():
            if self._twice:
                try:
                    return self._backward_twice(direction).reshape(v.shape).to(v.dtype)
                except RuntimeError:  # a function that can be differentiated only once
                    self._twice = False
            if self._ahead:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own first use of jvp
                        product = torch.func.jvp(self._field, (self._x.detach(),), (direction,))[1]
                    return product.detach().reshape(v.shape).to(v.dtype)
                except (RuntimeError, NotImplementedError):  # nor forward
                    self._ahead = False
        with torch.no_grad(), full_precision():
            return self._difference(direction.flatten(1)).reshape(v.shape).to(v.dtype)

    def _difference(self, direction: Tensor) -> Tensor:
        """Central differences of F along each row's direction (rows, n)."""
        x = self._x.detach().flatten(1)
        size = direction.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        step = torch.finfo(x.dtype).eps ** (1 / 3) * x.norm(dim=1, keepdim=True).clamp_min(1.0) / size
        ahead, behind = (
            self._field((x + sign * step * direction).reshape(self._x.shape)).flatten(1) for sign in (1, -1)
        )
        return (ahead - behind) / (2 * step)

    def _backward_twice(self, direction: Tensor) -> Tensor:
        """uᵀJ is linear in u, and its derivative along u is J."""
        if self._pulled is None:
            self._direction = torch.zeros_like(self._y).requires_grad_()
            (self._pulled,) = torch.autograd.grad(
                self._y, self._x, self._direction, create_graph=True, allow_unused=True
            )
        if self._pulled is None:  # y does not depend on x
            return torch.zeros_like(direction)
        assert self._direction is not None
        product = None
        if self._pulled.requires_grad:
            (product,) = torch.autograd.grad(
                self._pulled, self._direction, direction, retain_graph=True, allow_unused=True
            )
        if product is None:  # linear in u, and yet without a derivative in it
            raise RuntimeError("the field's backward pass cannot be differentiated")
        return product


@contextmanager
def full_precision() -> Iterator[None]:
    """Within it float32 products are float32's: no TF32, no bf16, no autocast."""
    matmul = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    devices = {"cpu", torch.get_default_device().type} | ({"cuda"} if torch.cuda.is_available() else set())
    contexts = [torch.autocast(device, enabled=False) for device in devices if device != "meta"]
    for context in contexts:
        context.__enter__()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
        for context in reversed(contexts):
            context.__exit__(None, None, None)
