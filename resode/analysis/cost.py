"""What any module costs, counted while it runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resode.formulas import Cost
from resode.modes import evaluating


def count(model: nn.Module, x: Tensor) -> Cost:
    """Parameters, and the multiply-adds of one forward pass in evaluation mode, a sample.

    Counted are the convolutions and matrix products that torch executes, each multiplication with its
    addition as one; nothing else, see `resode.formulas`. What is evaluated several times, such as the
    field of an ODE, counts as often. An adaptive solver evaluates a batch until its last sample has
    arrived.

    Args:
        model: any module; its training mode is put back afterwards.
        x: a batch of inputs, shape (B, …), B ≥ 1. On the meta device (both) nothing is computed.

    Returns:
        The cost, with the shape of one sample's output.

    Raises:
        ValueError: an empty batch.

    Example:
        >>> print(count(nn.Linear(3, 4), torch.zeros(2, 3)))
        16 parameters, 12 multiply-adds a sample
    """
    if x.ndim < 1 or len(x) == 0:
        raise ValueError(f"x must be a batch of at least one sample: got shape {tuple(x.shape)}.")
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = model(x)
    parameters = sum(p.numel() for p in model.parameters())
    macs, rest = divmod(counter.get_total_flops() // 2, len(x))
    assert not rest, "all samples take the same operations"
    return Cost(parameters, macs, tuple(y.shape[1:]))
