r"""The Hessian of a loss: its largest eigenvalue, and the learning rate that it allows.

Gradient descent x ← x − η∇L(x) is a residual step with F = −∇L: it is stable where η < 2/λ_max.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from resode.checks import check_number, check_whole, checked, warn_user
from resode.jacobian.lanczos import largest

Loss = Callable[[Any, Any], Tensor]

_BASIS_BYTES = 2**30


@checked
def max_learning_rate(
    model: nn.Module,
    loss_fn: Loss,
    data: tuple[Any, Any],
    momentum: float = 0.0,
    *,
    nesterov: bool = False,
    batch_size: int | None = None,
    tol: float = 1e-8,
    max_iter: int = 300,
) -> float:
    r"""Largest stable learning rate of gradient descent on a quadratic with this Hessian.

    2/λ_max; with momentum β 2(1 + β)/λ_max, with Nesterov's 2(1 + β)/((1 + 2β)λ_max). Above it the steepest
    direction grows; below it that is so for a quadratic loss, and for others near a minimum.

    Args:
        model: its parameters that require gradients are the variables; in the mode in which it is trained.
        loss_fn: `loss_fn(model(x), target)`, a scalar.
        data: (x, target).
        momentum: β of heavy-ball momentum as in torch.optim.SGD, 0 ≤ β < 1.
        nesterov: Nesterov's momentum, as torch's.
        batch_size: samples at once, for a loss that is a mean over samples; None takes all.
        tol: residual of the eigenvalue relative to the largest; at least 64 ε of the parameters' dtype.
        max_iter: Hessian-vector products.

    Returns:
        η; inf where the Hessian has no positive eigenvalue.

    Raises:
        ValueError: momentum out of range, a loss that is no scalar, nothing to train, dropout that is active,
            train-mode batch norm or a loss that is no mean together with batch_size, or a Hessian that is not
            finite.

    Source:
        Polyak, USSR Comput. Math. 4 (1964); Cohen et al., Gradient Descent on Neural Networks Typically
        Occurs at the Edge of Stability (2021).

    Example:
        >>> model = nn.Linear(1, 1, bias=False).double()
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> max_learning_rate(model, nn.MSELoss(), (x, x))  # L = 5/2 (w − 1)², L'' = 5
        0.4
    """
    check_number("momentum", momentum, least=0, below=1)
    steepest = largest_hessian_eigenvalue(
        model, loss_fn, data, batch_size=batch_size, tol=tol, max_iter=max_iter
    )
    if steepest <= 0:
        return math.inf
    factor = 2 * (1 + momentum) / ((1 + 2 * momentum) if nesterov else 1)
    return factor / steepest


@checked
def largest_hessian_eigenvalue(
    model: nn.Module,
    loss_fn: Loss,
    data: tuple[Any, Any],
    *,
    batch_size: int | None = None,
    tol: float = 1e-8,
    max_iter: int = 300,
) -> float:
    """λ_max of the loss's Hessian in the trainable parameters, by Lanczos on Hessian-vector products.

    Errors as `max_learning_rate`; warns where the residual is above `tol` after `max_iter` products.

    Args:
        model: in the mode in which it is looked at.
        loss_fn: `loss_fn(model(x), target)`, a number.
        data: (x, target).
        batch_size: samples at once; None for all.
        tol: residual relative to λ_max at which it ends.
        max_iter: products at most.

    Example:
        >>> model = nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
        >>> round(largest_hessian_eigenvalue(model, nn.MSELoss(), (x, torch.zeros(2, 1).double())), 9)
        9.0
    """
    check_whole("max_iter", max_iter, 1)
    check_modes(model, batch_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient: there is no Hessian to look at.")
    with kept(model), sdpa_kernel(SDPBackend.MATH):
        hessian = Hessian(model, loss_fn, data, parameters, batch_size)
        start = hessian.start()
        goal = max(tol, 64 * torch.finfo(start.dtype).eps)
        room = max(8, min(max_iter, _BASIS_BYTES // (8 * len(start))))
        top = largest(
            lambda v: hessian.product(v[0])[None], start[None], goal, products=max_iter, vectors=room
        )
        value, residual = float(top.value[0]), float(top.residual[0])
    if residual > goal * float(top.size[0]):
        warn_user(
            f"the largest Hessian eigenvalue {value:.6g} has a residual of {residual:.1e} after {max_iter} "
            "products; raise max_iter.",
            RuntimeWarning,
        )
    return value


class Hessian:
    """Hessian-vector products of a loss over the whole data, in parts where asked for."""

    def __init__(
        self, model: nn.Module, loss_fn: Loss, data: Any, parameters: list[Any], size: int | None
    ) -> None:
        if not isinstance(data, tuple | list) or len(data) != 2:
            raise ValueError("data must be the pair (x, target).")
        self.model, self.loss_fn, self.parameters = model, loss_fn, parameters
        x, target = data
        self.parts: list[tuple[Any, Any, float]] = [(x, target, 1.0)]
        if size is not None:
            check_whole("batch_size", size, 1)
            if not isinstance(x, Tensor) or not isinstance(target, Tensor):
                raise ValueError("only tensors x and target can be taken in parts.")
            pieces = zip(x.split(size), target.split(size), strict=True)
            self.parts = [(a, b, len(a) / len(x)) for a, b in pieces]
            if len(self.parts) > 1 and size > 1:
                self._check_mean(*self.parts[0][:2])
        self.gradient = self._gradient(*self.parts[0][:2]) if len(self.parts) == 1 else None

    def _check_mean(self, x: Tensor, target: Tensor) -> None:
        """Parts add up to the whole only for a loss that is a mean over samples."""
        half = len(x) // 2
        with torch.no_grad():
            whole, first, rest = (
                float(self.loss_fn(self.model(x[rows]), target[rows]))
                for rows in (slice(None), slice(half), slice(half, None))
            )
        mean = (half * first + (len(x) - half) * rest) / len(x)
        if abs(whole - mean) > 1e-3 * max(abs(whole), abs(first), abs(rest)):
            raise ValueError(
                "batch_size needs a loss that is a mean over samples, and this one is not: it is "
                f"{whole:.6g} on {len(x)} samples, and its mean over their halves is {mean:.6g}. "
                "Leave out batch_size, or take reduction='mean'."
            )

    def start(self) -> Tensor:
        n = sum(p.numel() for p in self.parameters)
        first = self.parameters[0]
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(n, generator=generator, dtype=torch.float64)
        return v.to(dtype=first.dtype, device=first.device)

    def _gradient(self, x: Any, target: Any) -> list[Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            loss = self.loss_fn(self.model(x), target)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"loss_fn(model(x), target) must be a scalar tensor, got {came}.")
            found = torch.autograd.grad(
                loss.reshape(()), self.parameters, create_graph=True, allow_unused=True
            )
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.parameters, strict=True)]

    def product(self, v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        pieces = [
            piece.reshape(p.shape)
            for piece, p in zip(v.split([p.numel() for p in self.parameters]), self.parameters, strict=True)
        ]
        for x, target, weight in self.parts:
            gradient = self.gradient or self._gradient(x, target)
            curved = [(g, piece) for g, piece in zip(gradient, pieces, strict=True) if g.requires_grad]
            if not curved:
                continue
            found = torch.autograd.grad(
                [g for g, _ in curved],
                self.parameters,
                [piece for _, piece in curved],
                retain_graph=self.gradient is not None,
                allow_unused=True,
            )
            flat = [
                (torch.zeros_like(p) if h is None else h).flatten()
                for h, p in zip(found, self.parameters, strict=True)
            ]
            total += weight * torch.cat(flat)
        if not bool(torch.isfinite(total).all()):
            raise ValueError(
                "the Hessian holds inf or nan: look for them in x, target, the weights and the loss."
            )
        return total


def check_modes(model: nn.Module, batch_size: int | None) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"a Hessian needs a loss that is not random: {type(module).__name__} ({name}) is active. "
                "Call .eval(), or set its p to 0."
            )
        if batch_size is not None and isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"{type(module).__name__} ({name}) takes statistics of the whole batch, so it can't be taken "
                "in parts: leave out batch_size, or call .eval()."
            )


@contextmanager
def kept(model: nn.Module) -> Any:
    """Buffers, such as running statistics, are put back."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


__all__: Sequence[str] = ["largest_hessian_eigenvalue", "max_learning_rate"]
