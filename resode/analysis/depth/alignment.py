r"""What residual branches point at: the correction that remains, and the loss's descent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from resode.analysis.depth.losses import LossFunction, sample_losses
from resode.checks import checked
from resode.jacobian.products import rows
from resode.results import Result


def cosine(a: Tensor, b: Tensor, batch: int) -> Tensor:
    """The cosine of the angle between two tensors, sample by sample, shape (batch,); nan where one is 0.

    Example:
        >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), 1)
        tensor([0.7071])
    """
    dtype = a.dtype
    a, b = rows(a, batch).double(), rows(b, batch).double()
    sizes = a.norm(dim=1) * b.norm(dim=1)
    return ((a * b).sum(1) / torch.where(sizes > 0, sizes, torch.nan)).to(dtype)


@checked
def class_means(states: Tensor, labels: Tensor) -> Tensor:
    """For each sample the mean state of the other samples of its class; nan where it is the only one.

    Args:
        states: shape (batch, *state).
        labels: int, shape (batch,).

    Example:
        >>> class_means(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]))
        tensor([[3.],
                [1.],
                [nan]])
    """
    flat = states.flatten(1)
    same = (labels[:, None] == labels[None]).to(flat.dtype)
    same.fill_diagonal_(0)
    count = same.sum(1, keepdim=True)
    return (same @ flat / torch.where(count > 0, count, torch.nan)).reshape(states.shape)


@checked
def correction_along(path: Tensor, target: Tensor) -> Tensor:
    r"""Cosine of every block's increment x_{l+1} − x_l with what is left to the target, t − x_l.

    An untrained block whose last layer has a symmetric distribution has expectation 0 for a target that does
    not depend on its weights; for one that does, such as x_L or a class mean of it, it has not.

    Args:
        path: states x_0 … x_L, shape (L + 1, batch, *state), as `ResidualStack(x, return_path=True)` gives.
        target: t, shape (batch, *state), or (L, batch, *state) with one a block.

    Returns:
        Cosines, shape (L, batch); nan where a block adds nothing or nothing is left.

    Raises:
        ValueError: fewer than two states, or shapes that do not fit.

    Source:
        Greff, Srivastava & Schmidhuber, Highway and Residual Networks Learn Unrolled Iterative Estimation
        (2017).

    Example:
        >>> path = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, -1.0]]])
        >>> correction_along(path, torch.tensor([[2.0, 0.0]]))
        tensor([[1.],
                [0.]])
    """
    _check_path(path)
    if target.shape not in (path.shape[1:], (len(path) - 1, *path.shape[1:])):
        raise ValueError(
            f"the target must have the state's shape {tuple(path.shape[1:])}, or one such for each of "
            f"{len(path) - 1} blocks: got {tuple(target.shape)}."
        )
    targets = target.expand(len(path) - 1, *path.shape[1:])
    pairs = zip(pairwise(path), targets, strict=True)
    return torch.stack([cosine(y - x, t - x, path.shape[1]) for (x, y), t in pairs])


@dataclass(frozen=True, eq=False, repr=False)
class BoostingAlong(Result):
    """What every block of a path does to the prediction z_l = head(x_l).

    Args:
        cosine: of z_{l+1} − z_l with −∂loss/∂z at z_l, shape (L, batch); nan where one is 0.
        first_order: ∂loss/∂z · (z_{l+1} − z_l), shape (L, batch).
        losses: at z_0 … z_L, shape (L + 1, batch).
    """

    cosine: Tensor
    first_order: Tensor
    losses: Tensor


@checked
@torch.no_grad()
def boosting_along(
    path: Tensor, head: Callable[[Tensor], Any], target: Any = None, *, loss_fn: LossFunction | None = None
) -> BoostingAlong:
    r"""How far every block's increment of the prediction follows the negative gradient of the loss in it.

    The states in between are read by the head of the last one, z_l = head(x_l), so that a linear head with
    weights w gives z_{l+1} − z_l = wᵀηF_l(x_l). For a loss that is convex in z, as cross entropy and squares
    are, loss(z_{l+1}) − loss(z_l) ≥ `first_order`: a block whose cosine is negative can only raise the loss.

    Args:
        path: states x_0 … x_L, shape (L + 1, batch, *state).
        head: from states (batch, *state) to predictions (batch, …); in eval mode.
        target: classes or numbers, as in `resode.analysis.depth.losses.sample_losses`.
        loss_fn: another loss, one number a sample, or a mean over samples.

    Raises:
        ValueError: fewer than two states.

    Source:
        Huang, Ash, Langford & Schapire, Learning Deep ResNet Blocks Sequentially using Boosting Theory
        (2018).

    Example:
        >>> path = torch.tensor([[[0.0]], [[1.0]], [[0.5]]])        # towards 3, then away from it
        >>> found = boosting_along(path, lambda x: x, torch.tensor([[3.0]]))
        >>> found.cosine.flatten(), found.losses.flatten()
        (tensor([ 1., -1.]), tensor([9.0000, 4.0000, 6.2500]))
    """
    _check_path(path)
    batch = path.shape[1]
    predictions, gradients, losses = [], [], []
    for x in path:
        z = head(x).detach().requires_grad_()
        with torch.enable_grad():
            loss = sample_losses(z, target, loss_fn, batch)
            (gradient,) = torch.autograd.grad(loss.sum(), z)
        predictions.append(z.detach())
        gradients.append(gradient)
        losses.append(loss.detach())
    steps = [after - before for before, after in pairwise(predictions)]
    pairs = list(zip(steps, gradients, strict=False))
    return BoostingAlong(
        cosine=torch.stack([cosine(step, -g, batch) for step, g in pairs]),
        first_order=torch.stack([(step * g).reshape(batch, -1).sum(1) for step, g in pairs]),
        losses=torch.stack(losses),
    )


def _check_path(path: Tensor) -> None:
    if path.ndim < 3 or len(path) < 2:
        raise ValueError(
            "a path holds the states before and after every block, shape (L + 1, batch, *state), L ≥ 1: got "
            f"{tuple(path.shape)}."
        )
