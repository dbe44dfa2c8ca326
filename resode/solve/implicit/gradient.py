r"""Gradients of the solution of an equation, by the implicit function theorem.

Where y = G(y, θ), dy = (I − ∂G/∂y)⁻¹ ∂G/∂θ dθ, whatever iteration found y: a gradient v of y goes on to G's
value as the solution of the adjoint equation

    u = v + (∂G/∂y)ᵀ u,

and from there to all that G takes, what the user's field closes over included. Second derivatives need y in
its place within G: so the solution ŷ with its gradient is put into G once more,

    y = ŷ + (I − ∂G/∂y)⁻¹ (G(ŷ, θ) − ŷ),

a step of Newton's method that changes nothing but the derivatives. The gradient that ŷ gets in the first way
back is v − u + (∂G/∂y)ᵀ u = 0, and goes no further.

Source:
    Bai, Kolter & Koltun, Deep Equilibrium Models (2019), for the way back without the iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resode.checks import warn_user
from resode.jacobian.gmres import gmres
from resode.solve.implicit.systems import DENSE, jacobian_rows, without_hooks

Equation = Callable[..., Tensor]
"""G(y, *tensors) of y's shape (B, n); row i depends on row i of y alone."""


def implicit(equation: Equation, y: Tensor, *tensors: Tensor) -> Tensor:
    """The solution y of y = G(y, *tensors), with its gradients; they can be differentiated once more.

    Args:
        equation: G. Tensors of the user's that it closes over get gradients too.
        y: the solution, (B, n), found without a graph.
        *tensors: what else G takes that may have a graph.
    """
    first, link = _once(equation, y, *tensors), _Link()
    if not first.requires_grad:
        return y
    with torch.enable_grad():
        again = _Gate.apply(link, first)
        return _Implicit.apply(equation, link, equation(again, *tensors), again, *tensors)


def _once(equation: Equation, y: Tensor, *tensors: Tensor) -> Tensor:
    """As `implicit`, but for first derivatives alone."""
    with torch.enable_grad():
        value = equation(y.detach(), *tensors)
        return _Implicit.apply(equation, None, value, y.detach(), *tensors) if value.requires_grad else y


class _Link:
    """What a way back tells from a solution to the one within its equation: the size of its gradient."""

    size = 0.0


class _Implicit(torch.autograd.Function):
    """y, whose gradient v goes on to G's value as u = v + (∂G/∂y)ᵀ u, and to y within G as v − u."""

    @staticmethod
    def forward(
        ctx: Any, equation: Equation, link: _Link | None, value: Tensor, y: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.equation, ctx.link = equation, link
        solution = y.clone()
        ctx.save_for_backward(solution, *tensors)
        ctx.set_materialize_grads(False)
        return solution

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (v,), (y, *tensors) = grads, ctx.saved_tensors
        none = [None] * len(tensors)
        if v is None:
            return None, None, None, None, *none
        u = _adjoint_solution(ctx.equation, v.detach(), y.detach(), [x.detach() for x in tensors])
        if ctx.link is None:
            if torch.is_grad_enabled() and v.requires_grad:
                raise RuntimeError(
                    "implicit steps can be differentiated twice, and this is a third time; take an explicit "
                    "method."
                )
            return None, None, u, None, *none
        ctx.link.size = float(v.detach().abs().max()) if v.numel() else 0.0
        if torch.is_grad_enabled():
            u = _once(_Adjoint(ctx.equation), u, v, y, *tensors)
        return None, None, u, v - u, *none


class _Gate(torch.autograd.Function):
    """y as it is; a gradient that is 0 but for rounding ends here."""

    @staticmethod
    def forward(ctx: Any, link: _Link, y: Tensor) -> Tensor:
        ctx.link = link
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (v,) = grads
        eps = torch.finfo(v.dtype).eps
        if not v.numel() or float(v.detach().abs().max()) <= eps**0.75 * ctx.link.size:
            return None, None
        return None, v


class _Adjoint:
    """The equation u = v + (∂G/∂y)ᵀ u, as a function of (u, v, y, *tensors)."""

    def __init__(self, equation: Equation):
        self.equation = equation

    def __call__(self, u: Tensor, v: Tensor, y: Tensor, *tensors: Tensor) -> Tensor:
        y = y if y.requires_grad else y.detach().requires_grad_()
        value = self.equation(y, *tensors)
        if not value.requires_grad:
            return v
        (product,) = torch.autograd.grad(value, y, u, create_graph=True, allow_unused=True)
        return v if product is None else v + product


def _adjoint_solution(equation: Equation, v: Tensor, y: Tensor, tensors: list[Tensor]) -> Tensor:
    """The solution u = (I − ∂G/∂y)⁻ᵀ v, (B, n)."""
    with torch.inference_mode(False), torch.enable_grad(), without_hooks():
        y = y.requires_grad_()
        value = equation(y, *tensors)
        if not value.requires_grad:
            return v
        if y.shape[1] <= 2 * DENSE:
            matrices = -jacobian_rows(value, y).mT
            matrices.diagonal(dim1=-2, dim2=-1).add_(1)
            return torch.linalg.solve_ex(matrices, v)[0].detach()

        def product(u: Tensor) -> Tensor:
            (back,) = torch.autograd.grad(value, y, u, retain_graph=True, allow_unused=True)
            return u if back is None else u - back.detach()

        goal = 100 * torch.finfo(v.dtype).eps
        u, residual = gmres(product, v, tol=goal)
    worst = float(residual.max())
    if worst > goal**0.5:
        warn_user(
            f"the gradient of an implicit step is off: GMRES left a residual of {worst:.1e} of the "
            f"right-hand side in {int((residual > goal**0.5).sum())} of {len(v)} samples, where {goal:.0e} "
            "was asked for. Take smaller steps, so that I − ηJ is better conditioned, or float64."
        )
    return u
