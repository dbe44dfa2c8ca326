"""Losses sample by sample, and batches in parts, for any network's input and output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as f

from resode.calls import mapped, tensors_in
from resode.checks import described

LossFunction = Callable[[Any, Any], Tensor]


def batch_of(x: Any) -> int:
    """The number of samples: dimension 0 of the first tensor.

    Raises:
        ValueError: there is none.
    """
    first = next(tensors_in(x), None)
    if first is None or not first.ndim or not len(first):
        raise ValueError(
            "x must hold at least one tensor of shape (batch, …) with at least one sample: got "
            f"{type(x).__name__}."
        )
    return len(first)


def part(x: Any, start: int, stop: int, batch: int) -> Any:
    """Samples start to stop of every tensor that has the batch as dimension 0."""
    return mapped(x, lambda t: t[start:stop] if t.ndim and len(t) == batch else t)


def is_loader(x: Any) -> bool:
    """Whether this gives batches one after another: a DataLoader, a generator, a list of pairs."""
    if isinstance(x, list):
        return bool(x) and all(isinstance(item, tuple) for item in x)
    return isinstance(x, Iterable) and not isinstance(x, Tensor | Mapping | tuple | str)


def batches(x: Any, target: Any, device: torch.device | None) -> Iterator[tuple[Any, Any]]:
    """(x, target) as they are, or one batch of a loader after another, on a device.

    A batch is a pair (x, target), or x alone: a tensor, a mapping, or a sequence of one.
    """
    if not is_loader(x):
        yield x, target
        return
    if target is not None:
        raise ValueError("a loader's batches hold their targets, (x, target): leave target= out.")
    empty = True
    for batch in x:
        empty = False
        if isinstance(batch, tuple | list) and len(batch) <= 2:
            some, wanted = (*batch, None)[:2]
        else:
            some, wanted = batch, None
        yield mapped(some, lambda t: t.to(device)), mapped(wanted, lambda t: t.to(device))
    if empty:
        raise ValueError("the loader gave no batches; it must hold at least one, (x, target).")


def parts(x: Any, target: Any, size: int) -> Iterator[tuple[Any, Any, int]]:
    """(x, target, samples) in pieces of at most `size` samples."""
    batch = batch_of(x)
    for start in range(0, batch, size):
        stop = min(start + size, batch)
        yield part(x, start, stop, batch), part(target, start, stop, batch), stop - start


def prediction(output: Any) -> Tensor:
    """The tensor that a loss acts on: `logits` where the output has them, else its first tensor."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    first = next(tensors_in(output), None)
    if first is None:
        raise TypeError(f"the model's output holds no tensor: got {type(output).__name__}.")
    return first


def sample_losses(output: Any, target: Any, loss_fn: LossFunction | None, batch: int) -> Tensor:
    """The loss of each sample, shape (batch,).

    Without a loss function: cross entropy for integer targets (classes in dimension 1, or in the last one
    for sequences (batch, length, classes)), mean squared error for others, ½‖z‖² without a target.

    `loss_fn(output, target)` gives one number a sample, or a scalar that is a mean over samples.

    Raises:
        TypeError: complex losses or outputs; a target that is no tensor.
        ValueError: shapes that do not fit.

    Example:
        >>> sample_losses(torch.zeros(2, 4), torch.tensor([0, 1]), None, 2)
        tensor([1.3863, 1.3863])
    """
    if loss_fn is not None:
        value = loss_fn(output, target)
        if not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(f"a loss is a tensor of real numbers: loss_fn gave {described(value)}.")
        if value.ndim == 0:
            return value.expand(batch)
        if value.shape != (batch,):
            raise ValueError(
                f"loss_fn must give a scalar or one number a sample, shape ({batch},): got "
                f"{tuple(value.shape)}."
            )
        return value
    z = prediction(output)
    if z.is_complex():
        raise TypeError(f"a loss is a real number, and the output is {z.dtype}: pass loss_fn= for it.")
    if target is None:
        return 0.5 * z.reshape(batch, -1).square().sum(1)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, or loss_fn= given with it: got {type(target).__name__}.")
    target = target.to(z.device)
    if target.is_floating_point():
        if target.shape != z.shape:
            raise ValueError(
                f"a target of numbers has the output's shape {tuple(z.shape)}: got {tuple(target.shape)}."
            )
        return (z - target).square().reshape(batch, -1).mean(1)
    if target.ndim == z.ndim - 1 and target.shape == z.shape[:-1]:
        z = z.movedim(-1, 1)
    if target.ndim != z.ndim - 1 or target.shape != z.shape[:1] + z.shape[2:]:
        raise ValueError(
            f"classes of shape {tuple(target.shape)} do not fit an output of shape {tuple(z.shape)}. "
            "Pass loss_fn= for another loss."
        )
    return f.cross_entropy(z, target, reduction="none").reshape(batch, -1).mean(1)
