r"""Products of Jacobians with vectors, without forming J: one graph of F, kept, for all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from resode.jacobian.linearize import Field
from resode.jacobian.places import Place, pulled_back


class JacobianProducts:
    r"""J_s = ∂F/∂x at each row s of x, as an operator on vectors (rows, n), one for each row.

    F is evaluated once, on all rows, and its graph is kept: `vjp` is one backward pass over it, `jvp` a
    backward pass through that pass, because forward derivatives are missing from many custom functions;
    where that is missing it is a forward derivative, and where that is missing too a central difference,
    right to about five digits in float32 and ten in float64. Products run in x's dtype, in full float32 on
    devices that would round it (TF32).

    Args:
        field: as `resode.jacobian.linearize.check_field` demands; it is not checked again.
        x: states, shape (rows, *state).

    Example:
        >>> p = JacobianProducts(lambda x: x * x.flip(1), torch.tensor([[1.0, 2.0]]))  # J = [[2, 1], [2, 1]]
        >>> p.vjp(torch.tensor([[1.0, 0.0]])), p.jvp(torch.tensor([[1.0, 0.0]]))
        (tensor([[2., 1.]]), tensor([[2., 2.]]))
    """

    def __init__(self, field: Field, x: Tensor) -> None:
        self.field: Field | None = field
        with torch.inference_mode(False), torch.enable_grad(), full_precision():
            self.x = x.detach().clone().requires_grad_()
            self.y = field(self.x)
        self._ends: tuple[Any, Any] = self.y, self.x
        self._set(len(x), 1.0, constant=not self.y.requires_grad)

    @classmethod
    def between(
        cls, at_y: Place, at_x: Place, y: Tensor, x: Tensor, batch: int, factor: float = 1.0
    ) -> JacobianProducts:
        """Products with `factor` times the Jacobian between two places of a graph that is kept.

        J leads from x to y, whose batch may be the second dimension. No field is at hand there, so that
        `jvp` raises a RuntimeError where a function can be differentiated only once.
        """
        self = cls.__new__(cls)
        self.field, self.x, self.y, self._ends = None, x, y, (at_y, at_x)
        self._set(batch, factor, constant=False)
        return self

    def _set(self, batch: int, factor: float, *, constant: bool) -> None:
        self.count = 0  # products of one vector a row
        self._batch, self._factor, self._constant = batch, factor, constant
        self._same = self.field is None and self._ends[0] == self._ends[1]
        self._direction: Tensor | None = None
        self._pulled: Tensor | None = None
        self._twice = True  # whether the backward pass can itself be differentiated
        self._ahead = self.field is not None  # whether F has a forward derivative

    @property
    def value(self) -> Tensor:
        """F(x), shape (rows, n)."""
        return rows(self.y.detach(), self._batch)

    def pulled_back(self, u: Tensor) -> Tensor:
        """Jᵀu for u of y's shape, of x's shape."""
        if self._same:
            return self._factor * u
        if self._constant:
            return torch.zeros_like(self.x, requires_grad=False)
        with torch.inference_mode(False), full_precision():
            return self._factor * self._pull(u.to(self.y.dtype))

    def _pull(self, u: Tensor, *, create_graph: bool = False) -> Tensor:
        """Autograd's gradient at x of u at y."""
        at_y, at_x = self._ends
        if self.field is None:
            return pulled_back(at_y, at_x, u, create_graph=create_graph)
        (product,) = torch.autograd.grad(
            at_y, at_x, u, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return torch.zeros_like(self.x, requires_grad=False) if product is None else product

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀu (rows, n) of u (rows, m)."""
        self.count += 1
        return rows(self.pulled_back(self._shaped(u, self.y)), self._batch).to(u.dtype)

    def jvp(self, v: Tensor) -> Tensor:
        """Jv (rows, m) of v (rows, n)."""
        self.count += 1
        if self._same:
            return self._factor * v
        if self._constant:
            return torch.zeros_like(v)
        direction = self._shaped(v, self.x).to(self.x.dtype)
        with torch.inference_mode(False), torch.enable_grad(), full_precision():
            product = self._along(direction)
        return self._factor * rows(product.detach(), self._batch).to(v.dtype)

    def _along(self, direction: Tensor) -> Tensor:
        """J times a direction of x's shape, by the first way that there is."""
        if self._twice:
            try:
                return self._backward_twice(direction)
            except RuntimeError:  # a function that can be differentiated only once
                if self.field is None:
                    raise
                self._twice = False
        assert self.field is not None
        if self._ahead:
            try:
                with warnings.catch_warnings():  # torch's own first use of jvp warns of its own parts
                    warnings.simplefilter("ignore", DeprecationWarning)
                    warnings.simplefilter("ignore", FutureWarning)
                    return torch.func.jvp(self.field, (self.x.detach(),), (direction,))[1]
            except (RuntimeError, NotImplementedError):  # nor forward
                self._ahead = False
        with torch.no_grad():
            return self._difference(self.field, direction)

    def _difference(self, field: Field, direction: Tensor) -> Tensor:
        """Central differences of F along each row's direction."""
        x, along = self.x.detach().flatten(1), direction.flatten(1)
        size = along.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        step = torch.finfo(x.dtype).eps ** (1 / 3) * x.norm(dim=1, keepdim=True).clamp_min(1.0) / size
        ahead, behind = (
            field((x + sign * step * along).reshape(self.x.shape)).flatten(1) for sign in (1, -1)
        )
        return ((ahead - behind) / (2 * step)).reshape(self.y.shape)

    def _backward_twice(self, direction: Tensor) -> Tensor:
        """uᵀJ is linear in u, and its derivative along u is J."""
        if self._direction is None or self._pulled is None:
            self._direction = torch.zeros_like(self.y).requires_grad_()
            self._pulled = self._pull(self._direction, create_graph=True)
        if not self._pulled.requires_grad and not self._pulled.any():  # y does not depend on x
            return torch.zeros_like(self.y, requires_grad=False)
        product = None
        if self._pulled.requires_grad:
            (product,) = torch.autograd.grad(
                self._pulled, self._direction, direction, retain_graph=True, allow_unused=True
            )
        if product is None:  # linear in u, and yet without a derivative in it
            raise RuntimeError("the field's backward pass cannot be differentiated")
        return product

    def _shaped(self, flat: Tensor, like: Tensor) -> Tensor:
        """Rows (rows, n) in the shape of a tensor."""
        for dim in range(min(2, like.ndim)):
            if like.shape[dim] == self._batch:
                return flat.reshape(like.movedim(dim, 0).shape).movedim(0, dim)
        return flat.reshape(like.shape)


class Combination:
    """Products with Σ c_i A_i, where A_i are products at hand.

    Args:
        parts: pairs (c_i, A_i); None for the identity.
    """

    def __init__(self, *parts: tuple[float, Any]) -> None:
        self.parts, self.count = parts, 0

    def vjp(self, u: Tensor) -> Tensor:
        """Σ c_i A_iᵀu (rows, n) of u (rows, m)."""
        self.count += 1
        return torch.stack([c * (u if a is None else a.vjp(u)) for c, a in self.parts]).sum(0)

    def jvp(self, v: Tensor) -> Tensor:
        """Σ c_i A_i v (rows, m) of v (rows, n)."""
        self.count += 1
        return torch.stack([c * (v if a is None else a.jvp(v)) for c, a in self.parts]).sum(0)


def rows(t: Tensor, batch: int) -> Tensor:
    """A tensor as one row a sample, shape (batch, n); a single row where no dimension is the batch.

    Example:
        >>> rows(torch.zeros(4, 2, 3), 2).shape
        torch.Size([2, 12])
    """
    for dim in range(min(2, t.ndim)):
        if t.shape[dim] == batch:
            return t.movedim(dim, 0).reshape(batch, -1)
    return t.reshape(1, -1)


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
