r"""How gradients travel through residual blocks: the two parts at each block, and products of Jacobians.

With y = S(x) + F(x) and g the loss gradient at y, the gradient at x is Sᵀg + Jᵀg: the identity part, which
no depth can take away where S is the identity, and the residual part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resode.analysis.depth.losses import LossFunction, sample_losses
from resode.analysis.depth.tracing import Addition
from resode.blocks import ResidualStack
from resode.blocks.frozen import FrozenStatistics, moving_norms
from resode.calls import hooked
from resode.checks import checked
from resode.jacobian.krylov import KrylovSchur
from resode.jacobian.lanczos import random_start, singular_values
from resode.jacobian.linearize import Field, check_field
from resode.jacobian.products import Combination, JacobianProducts, rows
from resode.results import Result


@checked
def loss_gradient_norms(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    x: Any,
    target: Any = None,
    *,
    loss_fn: LossFunction | None = None,
) -> Tensor:
    r"""‖∂loss/∂x_l‖ at the inputs x_l of some of a network's modules, of each sample's own loss.

    It takes one backward pass, for networks of any depth, residual or plain; with all paths from x_l.

    Args:
        model: in eval mode.
        blocks: modules of it, each used once: `model.stack.fields`, `model.blocks`.
        x: inputs of the model, shape (batch, …).
        target: of the loss; see `resode.analysis.depth.losses.sample_losses`.
        loss_fn: another loss, one number a sample, or a mean over samples.

    Returns:
        Norms, shape (len(blocks), batch).

    Raises:
        ValueError: a module that was not used exactly once.

    Example:
        >>> first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        >>> for layer in (first, second):
        ...     _ = layer.weight.data.copy_(2 * torch.eye(2))
        >>> model = nn.Sequential(first, second)
        >>> loss_gradient_norms(model, list(model), torch.tensor([[3.0, 4.0]])).flatten()  # of ½‖4x‖²
        tensor([80., 40.])
    """
    seen: list[list[Tensor]] = [[] for _ in blocks]

    def keep(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[number].append(args[0])

    with hooked(dict(enumerate(blocks)), before=keep), torch.inference_mode(False), torch.enable_grad():
        given = x.detach().clone().requires_grad_() if isinstance(x, Tensor) else x
        output = model(given)
    used = [len(kept) for kept in seen]
    if used != [1] * len(blocks):
        odd = next(i for i, n in enumerate(used) if n != 1)
        raise ValueError(
            f"every block must be used once in a pass: blocks[{odd}] was used {used[odd]} times."
        )
    batch = seen[0][0].shape[0]
    losses = sample_losses(output, target, loss_fn, batch)
    found = torch.autograd.grad(losses.sum(), [kept[0] for kept in seen])
    return torch.stack([rows(g, batch).norm(dim=1) for g in found])


def block_products(a: Addition, batch: int) -> JacobianProducts:
    """Products with the block's Jacobian S' + ηJ."""
    return JacobianProducts.between(a.at_y, a.at_x, a.y, a.x, batch)


def shortcut_products(a: Addition, batch: int) -> JacobianProducts:
    """Products with the shortcut's Jacobian S'."""
    return JacobianProducts.between(a.at_shortcut, a.at_x, a.shortcut, a.x, batch)


def increment_products(a: Addition, batch: int) -> JacobianProducts | Combination:
    """Products with ηJ, the Jacobian of a block's increment, also where it has no edge of its own."""
    if a.at_field is not None and a.increment.shape == a.y.shape:
        return JacobianProducts.between(a.at_field, a.at_x, a.increment, a.x, batch, a.factor)
    return Combination((1.0, block_products(a, batch)), (-1.0, shortcut_products(a, batch)))


def split_gradient(a: Addition, g: Tensor) -> tuple[Tensor, Tensor]:
    """Identity part Sᵀg and residual part ηJᵀg, each of x's shape, of the gradient g at a traced y."""
    identity = shortcut_products(a, 1).pulled_back(_sum_to(g, a.shortcut))
    if a.at_field is not None:
        field = JacobianProducts.between(a.at_field, a.at_x, a.increment, a.x, 1, a.factor)
        return identity, field.pulled_back(_sum_to(g, a.increment))
    return identity, block_products(a, 1).pulled_back(g) - identity


@dataclass(frozen=True, eq=False, repr=False)
class GradientParts(Result):
    """The gradient at a block's input, by the two ways that it took.

    Args:
        identity: Sᵀg, along the shortcut, of x's shape; g itself where S is the identity.
        residual: ηJᵀg, through F, likewise.
    """

    identity: Tensor
    residual: Tensor

    @property
    def total(self) -> Tensor:
        """Sᵀg + ηJᵀg, the gradient at x."""
        return self.identity + self.residual


@checked
def gradient_parts(
    field: Field, x: Tensor, g: Tensor, *, shortcut: Field | None = None, step_size: float = 1.0
) -> GradientParts:
    r"""The gradient at the input of y = S(x) + ηF(x), split into Sᵀg and ηJᵀg.

    S and F are differentiated apart, each alone. Nothing may follow the addition: behind an activation g is
    the gradient at the sum, not at the block's output.

    Args:
        field: F, any callable; modules in either mode. Train-mode batch norm couples the samples, and the
            parts are then those of the whole batch; running statistics stay as they are.
        x: states, shape (batch, *state), floating-point.
        g: the gradient at y, of y's shape.
        shortcut: S, any callable; None for the identity.
        step_size: η.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: g has not the shape of F(x) and S(x).

    Source:
        He, Zhang, Ren & Sun, Identity Mappings in Deep Residual Networks (2016), arXiv:1603.05027, eq. 5.

    Example:
        >>> x, g = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 5.0]])
        >>> parts = gradient_parts(torch.relu, x, g)
        >>> parts.identity.tolist(), parts.residual.tolist(), parts.total.tolist()
        ([[3.0, 5.0]], [[3.0, 0.0]], [[6.0, 5.0]])
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}.")
    if shortcut is None and g.shape != x.shape:
        raise ValueError(
            f"g is the gradient at x + F(x), so it has x's shape: got x {tuple(x.shape)}, "
            f"g {tuple(g.shape)}. Where F changes the shape, give the shortcut that does so too."
        )
    identity = g.clone() if shortcut is None else _gradient_at("S(x)", shortcut, x, g)
    return GradientParts(identity, step_size * _gradient_at("F(x)", field, x, g))


def _gradient_at(name: str, f: Field, x: Tensor, g: Tensor) -> Tensor:
    """The gradient at x of f alone, of x's shape."""
    norms = moving_norms(f) if isinstance(f, nn.Module) else []
    with torch.inference_mode(False), torch.enable_grad(), FrozenStatistics(norms):
        state = x.detach().clone().requires_grad_()
        y = f(state)
        if y.shape != g.shape:
            raise ValueError(
                f"g is the gradient at S(x) + F(x), so it has their shape: got {name} {tuple(y.shape)}, "
                f"g {tuple(g.shape)}."
            )
        if not y.requires_grad:
            return torch.zeros_like(x)
        (product,) = torch.autograd.grad(y, state, g, allow_unused=True)
    return torch.zeros_like(x) if product is None else product


@checked
def shortcut_matrix(shortcut: Field, x: Tensor) -> Tensor:
    r"""A linear shortcut as a matrix: S(x) = S x, found by evaluating it on every unit state.

    No derivative is taken, so Sᵀg is there to compare a gradient with. A constant that is added (of a norm
    in evaluation mode) is left out.

    Args:
        shortcut: S, a callable on states (batch, *state); modules in eval mode.
        x: states at which S must agree with its matrix, shape (batch, *state), not 0.

    Returns:
        S, shape (m, n) for states of n entries, in the order of `x[0].flatten()`; dtype and device of x.

    Raises:
        TypeError, ValueError: x is no batch of floating-point states, or S is not linear (a gate that
            depends on x).

    Example:
        >>> shortcut_matrix(lambda x: x[:, ::2], torch.ones(1, 4))  # every second entry
        tensor([[1., 0., 0., 0.],
                [0., 0., 1., 0.]])
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}.")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"x must have shape (batch, *state) with at least one entry, got {tuple(x.shape)}.")
    n = x[0].numel()
    with torch.no_grad():
        constant = shortcut(torch.zeros_like(x[:1])).flatten(1)
        units = torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, *x.shape[1:])
        matrix = (shortcut(units).flatten(1) - constant).T.contiguous()
        y = shortcut(x).flatten(1) - constant
        error = (y - x.flatten(1) @ matrix.T).abs().amax()
        if not error <= torch.finfo(x.dtype).eps ** 0.5 * y.abs().amax():
            raise ValueError(
                f"a shortcut has a matrix only where it is linear: S(x) is off by {float(error):.2g} from "
                "the matrix of the unit states. Call .eval() on it; a gate that depends on x has none."
            )
    return matrix


def _sum_to(g: Tensor, addend: Tensor) -> Tensor:
    """The gradient of an addend that was broadcast."""
    return g if g.shape == addend.shape else g.sum_to_size(addend.shape)


@dataclass(frozen=True, eq=False, repr=False)
class ProductNorm(Result):
    r"""The gradient's gain through a whole stack, against what single blocks tell.

    Args:
        norm: ‖∏(I + ηJ_l)‖₂ of each sample, shape (batch,).
        smallest: σ_min of the product, likewise (an estimate from above).
        upper: ∏(1 + ‖ηJ_l‖₂), which norm never exceeds.
        lower: ∏ max(0, 1 − ‖ηJ_l‖₂), which smallest never falls below.
        uniform: (1 + r)^L with r = max ‖ηJ_l‖₂.
        plain: ‖∏ ηJ_l‖₂, the same blocks without their shortcuts.
        plain_bound: ∏ ‖ηJ_l‖₂.
        block_norms: ‖ηJ_l‖₂, shape (batch, L).
        radii: ρ(ηJ_l), estimated, shape (batch, L). (1 + ρ)^L bounds the norm for normal J_l only.
        residual: of the norm's singular vectors, relative to it.
    """

    _columns = ("norm", "smallest", "upper", "lower", "plain", "plain_bound")

    norm: Tensor
    smallest: Tensor
    upper: Tensor
    lower: Tensor
    uniform: Tensor
    plain: Tensor
    plain_bound: Tensor
    block_norms: Tensor
    radii: Tensor
    residual: Tensor


@checked
def product_norm(
    fields: ResidualStack | Sequence[Field], x: Tensor, *, step_size: float = 1.0, steps: int = 60
) -> ProductNorm:
    r"""‖∏(I + ηJ_l)‖₂ along the states x ← x + ηF_l(x), by singular values from a random start, unformed.

    Args:
        fields: F_0 … F_{L−1}, callables in eval mode that keep the shape; or a ResidualStack under Euler,
            whose step sizes are taken.
        x: states before the first block, shape (batch, *state).
        step_size: η, for callables.
        steps: products with the Jacobian and with its transpose, for each norm.

    Raises:
        TypeError, ValueError: as `resode.jacobian.linearize.check_field`; a stack whose blocks are no Euler
            steps.

    Source:
        Golub & Kahan (1965); Halko, Martinsson & Tropp, SIAM Review 53 (2011) on random starts.

    Example:
        >>> found = product_norm([lambda x: 0.05 * x] * 100, torch.ones(1, 3, dtype=torch.float64))
        >>> round(float(found.norm), 3), f"{float(found.plain):.1e}"  # 1.05^100 and 0.05^100
        (131.501, '7.9e-131')
    """
    etas = [step_size] * len(fields) if not isinstance(fields, ResidualStack) else []
    if isinstance(fields, ResidualStack):
        if fields.solver != "euler" or fields.substeps != 1 or fields.weights != "constant":
            raise ValueError(
                "a product of I + ηJ belongs to Euler steps with one field a block: set solver='euler' and "
                f"substeps=1, got {fields.solver}, {fields.substeps}, weights={fields.weights!r}."
            )
        sizes = fields.step_sizes
        etas = [fields.step_size] * fields.depth if sizes is None else sizes.detach().tolist()
        fields = [fields.field(i) for i in range(fields.depth)]
    if not len(fields):
        raise ValueError("fields must hold at least one block.")
    batch, n = len(x), x[0].numel()
    products: list[JacobianProducts] = []
    state = x.detach()
    for f, eta in zip(fields, etas, strict=True):
        check_field(f, state)
        products.append(JacobianProducts(f, state))
        state = (state + eta * products[-1].value.reshape(state.shape)).detach()

    def through(v: Tensor, shortcut: float, *, transposed: bool) -> Tensor:
        pairs = list(zip(products, etas, strict=True))
        for p, eta in reversed(pairs) if transposed else pairs:
            v = shortcut * v + eta * (p.vjp(v) if transposed else p.jvp(v))
        return v

    start = random_start(batch, n, x)
    sigma, left = _singular(lambda v, t: through(v, 1.0, transposed=t), start, steps)
    plain, _ = _singular(lambda v, t: through(v, 0.0, transposed=t), start, min(steps, 20))
    norms, radii = [], []
    for p, eta in zip(products, etas, strict=True):
        own, _ = _singular(lambda v, t, p=p, eta=eta: eta * (p.vjp(v) if t else p.jvp(v)), start, steps)
        norms.append(own[:, 0])
        space = KrylovSchur(p.vjp, start, min(steps, n))
        space.grow(space.size)
        radii.append([abs(eta) * np.abs(space.ritz(row).values).max() for row in range(batch)])
    sizes = torch.stack(norms, 1)
    return ProductNorm(
        norm=sigma[:, 0],
        smallest=sigma[:, -1],
        upper=(1 + sizes).prod(1),
        lower=(1 - sizes).clamp_min(0).prod(1),
        uniform=(1 + sizes.amax(1)) ** len(norms),
        plain=plain[:, 0],
        plain_bound=sizes.prod(1),
        block_norms=sizes,
        radii=torch.as_tensor(np.array(radii).T).to(x),
        residual=left[:, 0] / sigma[:, 0].clamp_min(torch.finfo(x.dtype).tiny),
    )


def _singular(product: Callable[[Tensor, bool], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    return singular_values(lambda v: product(v, False), lambda u: product(u, True), start, steps)
