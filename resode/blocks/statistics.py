"""Batch-norm statistics measured anew, without touching a weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resode.blocks.ode_block import ODEBlock
from resode.blocks.stack import ResidualStack
from resode.modes import evaluating


def tracked_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that have running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]


@torch.no_grad()
def measure_statistics(model: nn.Module, inputs: Iterable[Tensor], *, every_evaluation: bool = False) -> None:
    """Replace the running statistics of every batch norm by plain averages over these inputs.

    Everything else is in evaluation mode meanwhile, and in the mode that it was in afterwards.

    Args:
        model: changed in place: the running statistics alone, under its solvers of now.
        inputs: batches, each counting the same, on the model's device.
        every_evaluation: take the statistics over all evaluations of a field by its solver, so that other
            solvers than the one it was trained with meet what they see; else as training takes them, at the
            first evaluation of a block call.

    Raises:
        ValueError: there are no inputs.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> measure_statistics(norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        >>> norm.running_mean, norm.training
        (tensor([4.]), True)
    """
    norms = tracked_norms(model)
    momenta = [norm.momentum for norm in norms]
    saved = statistics_of(norms)
    count = 0
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average
                norm.train()
            if not every_evaluation:
                for field in _fields(model):  # one set of statistics a call where F is in training
                    field.training = True
            for x in inputs:
                model(x)
                count += 1
        if not count:
            raise ValueError("statistics are measured at inputs, and there are none: the batches are empty.")
    except BaseException:
        put_back(norms, saved)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _fields(model: nn.Module) -> Iterator[nn.Module]:
    """What solvers evaluate in a model."""
    for block in model.modules():
        if isinstance(block, ResidualStack):
            yield from block.fields
        elif isinstance(block, ODEBlock) and isinstance(block.func, nn.Module):
            yield block.func


def statistics_of(norms: list[_BatchNorm]) -> list[dict[str, Tensor]]:
    """Copies of the norms' buffers, for `put_back`."""
    return [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]


@torch.no_grad()
def put_back(norms: list[_BatchNorm], saved: list[dict[str, Tensor]]) -> None:
    """Give norms the buffers that they had."""
    for norm, buffers in zip(norms, saved, strict=True):
        for name, value in norm.named_buffers():
            value.copy_(buffers[name])
