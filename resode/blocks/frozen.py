"""What a block holds still while a solver evaluates its field several times."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from resode.calls import mixed_dtypes
from resode.checks import check_number, checked
from resode.symbols import one_module


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

    @checked
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = probability("p", p)
        self.masks: dict[nn.Module, Tensor] | None = None

    @one_module
    def forward(self, residual: Tensor) -> Tensor:
        """F or 0, sample by sample, shape of F."""
        if not self.training or self.p == 0:
            return residual
        scale = None if self.masks is None else self.masks.get(self)
        if scale is None or scale.shape[0] != residual.shape[0]:
            scale = draw_scale(self.p, residual)
            if self.masks is not None:
                self.masks[self] = scale
        return residual * scale.to(residual.dtype)

    def extra_repr(self) -> str:
        """The probability, for print."""
        return f"p={self.p:g}"


class FrozenDuringStep:
    """What keeps a field in training one field for one block call, however often a solver evaluates it.

    A batch norm that normalised every stage by its own batch would make F another function at each of them,
    and none of those would be the one that evaluation mode meets. So the batch statistics of the first
    evaluation serve all others, gradients through them included, and the running statistics move there alone.
    Masks of `StochasticDepth` are drawn there too.

    Args:
        field: in training.
        own_statistics: let every evaluation normalise by its own batch. For the adjoint equation, which
            solves the field anew on its way back and could not differentiate statistics of the way there.
    """

    def __init__(self, field: nn.Module, own_statistics: bool = False):
        modules = list(field.modules())
        self.norms = [
            m for m in modules if isinstance(m, _BatchNorm) and (m.training or m.running_var is None)
        ]
        self.drops = [m for m in modules if isinstance(m, StochasticDepth) and m.training and m.p > 0]
        self.masks: dict[nn.Module, Tensor] = {}
        self.own_statistics = own_statistics
        self.statistics: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {norm: [] for norm in self.norms}
        self.first = True

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """One evaluation of the field."""
        first, self.first = self.first, False
        before = [vars(norm).get("forward") for norm in self.norms]
        for drop in self.drops:
            drop.masks = self.masks
        try:
            if self.own_statistics:
                with nullcontext() if first else FrozenStatistics(self.norms):
                    yield
                return
            for norm in self.norms:
                vars(norm)["forward"] = (self._measuring if first else self._holding)(norm)
            yield
        finally:
            for drop in self.drops:
                drop.masks = None
            for norm, forward in zip(self.norms, before, strict=True):
                vars(norm).pop("forward", None)
                if forward is not None:
                    vars(norm)["forward"] = forward

    def _measuring(self, norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
        """The norm as it is, which also notes the statistics of each of its calls."""
        forward = norm.forward

        def measure(x: Tensor) -> Tensor:
            y = forward(x)
            self.statistics[norm].append(batch_statistics(norm, x))
            return y

        return measure

    def _holding(self, norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
        """The norm with the statistics of the first evaluation, call by call."""
        noted = iter(self.statistics[norm])

        def hold(x: Tensor) -> Tensor:
            mean, variance = next(noted)
            scale = torch.rsqrt(variance + norm.eps)
            scale = scale if norm.weight is None else scale * norm.weight
            shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
            shape = (-1, *[1] * (x.ndim - 2))
            return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)

        return hold


def batch_statistics(norm: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x (B, C, …) by channel, over all processes if synchronised."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [0, *range(2, x.ndim)]
    if not (isinstance(norm, nn.SyncBatchNorm) and dist.is_initialized()):
        variance, mean = torch.var_mean(wide, dims, correction=0)
        return mean, variance
    from torch.distributed.nn.functional import all_reduce  # costs too much for `import resode`

    count = wide.new_full((1,), x.numel() / x.shape[1])
    sums = torch.cat([wide.sum(dims), wide.square().sum(dims), count])
    sums = all_reduce(sums, group=norm.process_group or dist.group.WORLD)
    mean, square = (sums[:-1] / sums[-1]).chunk(2)
    return mean, square - mean.square()


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


def takes_time(field: nn.Module) -> bool:
    """Whether a module is a field of (t, x): its forward has two required positional arguments.

    Raises:
        TypeError: it takes the time last, or more than these two.

    Example:
        >>> takes_time(nn.Linear(2, 2))
        False
    """
    try:
        parameters = inspect.signature(field.forward).parameters.values()
    except (TypeError, ValueError):  # a compiled or scripted forward may have none
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
    if len(needed) > 2 or (
        len(needed) == 2 and needed[1] in ("t", "time") and needed[0] not in ("t", "time")
    ):
        raise TypeError(
            f"a field is F(x), or F(t, x) with the depth time first: {type(field).__name__}.forward takes "
            f"{', '.join(needed)}. Wrap it in an nn.Module that does."
        )
    return len(needed) == 2


def evaluate(
    field: nn.Module, y: Tensor, index: int, values: dict[str, Tensor] | None = None, t: Tensor | None = None
) -> Any:
    """F(y), or F(t, y) where a time is given, with other parameters where `values` has them.

    Raises:
        ValueError: it changes y in place. A compiled graph can't tell, and lets F change a copy.
    """

    def call(y: Tensor) -> Any:
        inputs = (y,) if t is None else (t, y)
        return field(*inputs) if values is None else torch.func.functional_call(field, values, inputs)

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
        if mixed := mixed_dtypes(raised, field, y):
            raise mixed from raised
        raise
    if y._version != version:
        raise ValueError(error)
    return dy


FIXED_STEPS_CAN = (
    "Fixed explicit steps can: an ODEBlock with n_steps=, or a ResidualStack with a solver without error "
    "control, such as rk4"
)


def refuse_graphs(what: str, instead: str = FIXED_STEPS_CAN) -> None:
    """Refuses to be exported where the values of the state decide; a compiled graph ends here.

    Args:
        what: does so, as "rk4 chooses its steps by".
        instead: what to take.

    Raises:
        ValueError: under torch.export.
    """
    if torch.compiler.is_compiling():
        reason = f"{what} the values of the state, which no graph can hold. {instead}"
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            raise ValueError(f"{reason}.")
        torch._dynamo.graph_break(msg=reason)


def refuse_low_precision(solver: str, dtype: torch.dtype) -> None:
    """Raise a TypeError for states that an adaptive solver can't tell an error in."""
    if torch.finfo(dtype).bits < 32:
        raise TypeError(
            f"{solver} can't control an error in {dtype}; keep the state in float32 "
            "(under autocast F alone runs in a lower precision), or use a fixed-step solver."
        )


def refuse_batch_norm(module: nn.Module, solver: str) -> None:
    """Raise a ValueError where an implicit step would have statistics of its iterates."""
    for name, m in module.named_modules():
        if isinstance(m, _BatchNorm) and (m.training or m.running_var is None):
            raise ValueError(
                f"{type(m).__name__} ({name or 'the field itself'}) normalises by the batch's own "
                f"statistics, and {solver} evaluates the field at iterates of Newton's method, which have "
                "none. Take a norm within each sample (norm='group') or none, an explicit solver, or "
                "evaluation mode."
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
