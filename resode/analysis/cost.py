"""What any module costs, counted while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resode.analysis.depth.lesion import unfused_attention
from resode.analysis.depth.losses import batch_of
from resode.calls import call, tensors_in
from resode.checks import checked
from resode.formulas import Cost
from resode.modes import evaluating


@checked
def count(model: nn.Module, x: Any) -> Cost:
    """Parameters, and the multiply-adds of one forward pass in evaluation mode, a sample.

    Counted are the convolutions and matrix products that torch executes, those within attention and
    recurrent layers too, each multiplication with its addition as one; nothing else, see `resode.formulas`.
    What is evaluated several times, such as the field of an ODE, counts as often. An adaptive solver
    evaluates a batch until its last sample has arrived.

    Args:
        model: any module; its training mode is put back afterwards.
        x: a batch of inputs, shape (B, …), B ≥ 1; a tuple of positional arguments or a mapping of keyword
            arguments likewise. On the meta device (both) nothing is computed. Where the model itself says
            batch_first=False, the batch is dimension 1.

    Returns:
        The cost, with the shape of one sample's output (of the first tensor, where there are several). The
        multiply-adds are a mean, rounded, where samples take different operations.

    Raises:
        ValueError: an empty batch.

    Example:
        >>> print(count(nn.Linear(3, 4), torch.zeros(2, 3)))
        16 parameters, 12 multiply-adds a sample
        >>> print(count(nn.LSTM(32, 16, batch_first=True), torch.zeros(2, 50, 32)))
        3,200 parameters, 153,600 multiply-adds a sample
    """
    first = next(tensors_in(x), None)
    if first is None or first.ndim < 1 or 0 in first.shape[:1]:
        came = "no tensor" if first is None else f"shape {tuple(first.shape)}"
        raise ValueError(f"x must be a batch of at least one sample: got {came}.")
    late = getattr(model, "batch_first", True) is False and first.ndim == 3
    batch = first.shape[1] if late else batch_of(x)
    counter = FlopCounterMode(display=False, custom_mapping=_RECURRENT)
    # what is fused counts nothing
    with evaluating(model), torch.no_grad(), unfused_attention(), _without_gradients(model), counter:
        y = next(tensors_in(call(model, x)))
    parameters = sum(p.numel() for p in model.parameters())
    shape = (*y.shape[:1], *y.shape[2:]) if late else y.shape[1:]
    return Cost(parameters, round(counter.get_total_flops() / 2 / batch), tuple(shape))


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient meanwhile.

    torch's counter watches modules' inputs that do, and fails at a view of a parameter, such as a class
    token's `expand`, where no graph is kept.
    """
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _recurrent(x: Any, *weights: Any) -> int:
    """Of a recurrent layer: each matrix meets every step of every sample once."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


def _mkldnn_rnn(x: Any, w0: Any, w1: Any, *args: Any, **kwargs: Any) -> int:
    return _recurrent(x, w0, w1)


def _cudnn_rnn(x: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    return _recurrent(x, *weights)


_RECURRENT = {torch.ops.aten.mkldnn_rnn_layer: _mkldnn_rnn, torch.ops.aten._cudnn_rnn: _cudnn_rnn}
