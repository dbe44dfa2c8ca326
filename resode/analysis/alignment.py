r"""What residual branches point at: the correction that remains, and the loss's descent."""

from __future__ import annotations

import torch
from torch import Tensor

from resode.analysis.gradients import rows


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


def error_correction(increment: Tensor, x: Tensor, target: Tensor, batch: int) -> Tensor:
    """Cosine between a block's increment and what is left to its target, t − x, shape (batch,).

    With t the stage's last state the last block's is 1 by definition, so a class mean says more.

    Source:
        Greff, Srivastava & Schmidhuber, Highway and Residual Networks Learn Unrolled Iterative Estimation
        (2017).

    Example:
        >>> x, target = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> error_correction(torch.tensor([[1.0, 0.0]]), x, target, 1)
        tensor([1.])
    """
    return cosine(increment, target - x, batch)


def boosting(increment: Tensor, gradient: Tensor, batch: int) -> Tensor:
    """Cosine between a block's increment and the negative loss gradient at its output, shape (batch,).

    Source:
        Huang, Ash, Langford & Schapire, Learning Deep ResNet Blocks Sequentially using Boosting Theory
        (2018).

    Example:
        >>> boosting(torch.tensor([[1.0, 0.0]]), torch.tensor([[-2.0, 0.0]]), 1)
        tensor([1.])
    """
    return cosine(increment, -gradient, batch)
