"""What a block holds still while a solver evaluates its field several times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from resode.checks import check_number


def probability(what: str, value: object) -> float:
    """`value` if it is a number from 0 to less than 1; otherwise a ValueError."""
    return check_number(what, value, least=0, below=1)


def draw_scale(p: float, x: Tensor) -> Tensor:
    """1 / (1 − p) with probability 1 − p, else 0, for each sample of x: shape (B, 1, …, 1), mean 1."""
    precise = torch.promote_types(x.dtype, torch.float32)
    keep = torch.empty(x.shape[0], *[1] * (x.ndim - 1), device=x.device, dtype=precise)
    return (keep.bernoulli_(1 - p) / (1 - p)).to(x.dtype)


class StochasticDepth(nn.Module):
    """Drops a block's F for whole samples in training: F / (1 − p) with probability 1 − p, else 0.

    Inside the field of a `ResidualStack` or an `ODEBlock` the mask is drawn once a block call and held
    through all stages and substeps.

    Args:
        p: the probability to drop, 0 ≤ p < 1.

    Source:
        Huang et al. (2016), Deep Networks with Stochastic Depth, arXiv:1603.09382.

    Example:
        >>> StochasticDepth(0.5).eval()(torch.ones(1, 2))
        tensor([[1., 1.]])
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = probability("p", p)
        self.held: dict[nn.Module, Tensor] | None = None

    def forward(self, residual: Tensor) -> Tensor:
        """F or 0, sample by sample, shape of F."""
        if not self.training or self.p == 0:
            return residual
        scale = None if self.held is None else self.held.get(self)
        if scale is None or scale.shape[0] != residual.shape[0]:
            scale = draw_scale(self.p, residual)
            if self.held is not None:
                self.held[self] = scale
        return residual * scale.to(residual.dtype)

    def extra_repr(self) -> str:
        """The probability, for print."""
        return f"p={self.p:g}"


class FrozenDuringStep:
    """The batch norms and masks of a field in training, for one block call.

    Args:
        field: running statistics move at its first evaluation only; masks of `StochasticDepth` are
            drawn then and used again.
        statistics: see to the running statistics; otherwise to the masks alone.
    """

    def __init__(self, field: nn.Module, statistics: bool = True):
        self.norms = moving_norms(field) if statistics else []
        self.drops = [m for m in field.modules() if isinstance(m, StochasticDepth) and m.training and m.p > 0]
        self.masks: dict[nn.Module, Tensor] = {}
        self.first = True

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """One evaluation of the field."""
        for drop in self.drops:
            drop.held = self.masks
        try:
            if self.first:
                self.first = False
                yield
            else:
                with FrozenStatistics(self.norms):
                    yield
        finally:
            for drop in self.drops:
                drop.held = None


def checkpoints(gradient: str) -> bool:
    """Whether to keep inputs alone and compute again: torch.compile decides that for itself."""
    return gradient == "checkpoint" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def moving_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms whose running statistics a call would move."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]


class FrozenStatistics:
    """Within it, batch norms use the batch's statistics and leave the running ones alone.

    By momentum 0 rather than without running statistics, so that a recomputation for checkpointing
    saves the same tensors as the first evaluation did. It can be entered again, as each backward pass
    through a graph that is kept recomputes.
    """

    def __init__(self, norms: list[_BatchNorm]):
        self.norms = norms

    def __enter__(self) -> None:
        self.saved = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def evaluate(field: nn.Module, y: Tensor, index: int, values: dict[str, Tensor] | None = None) -> Any:
    """F(y), with other parameters where `values` has them.

    Raises:
        ValueError: it changes y in place. A compiled graph can't tell, and lets F change a copy.
    """

    def call(y: Tensor) -> Any:
        return field(y) if values is None else torch.func.functional_call(field, values, (y,))

    if torch.compiler.is_compiling():
        return call(y.clone())  # which Inductor removes where F does not write to it
    error = (
        f"a field must not change the state in place; {type(field).__name__} of block {index} does. "
        "Its first operation is probably ReLU(inplace=True): use inplace=False there."
    )
    if y.is_inference():  # which keeps no version
        with torch.inference_mode(False):
            y = y.clone()
    version = y._version
    try:
        dy = call(y)
    except RuntimeError as raised:
        if "leaf Variable that requires grad is being used in an in-place" in str(raised):
            raise ValueError(error) from raised
        raise
    if y._version != version:
        raise ValueError(error)
    return dy


def refuse_low_precision(solver: str, dtype: torch.dtype) -> None:
    """Raise a TypeError for states that an adaptive solver can't tell an error in."""
    if torch.finfo(dtype).bits < 32:
        raise TypeError(
            f"{solver} can't control an error in {dtype}; keep the state in float32 "
            "(under autocast F alone runs in a lower precision), or use a fixed-step solver."
        )


def refuse_dropout(module: nn.Module, solver: str) -> None:
    """Raise a ValueError where a field in training holds a Dropout of torch's."""
    for name, m in module.named_modules():
        attention = isinstance(m, nn.MultiheadAttention) and m.dropout > 0
        if m.training and (attention or (isinstance(m, _DropoutNd) and m.p > 0)):
            raise ValueError(
                f"{type(m).__name__} ({name or 'the field itself'}) draws a new mask at every stage, so "
                f"{solver} would solve no equation in training. Use stochastic depth, put Dropout between "
                "stacks, or train with Euler and substeps=1."
            )
