"""What the host sees of a tensor, inside torch.func's transforms too."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad


def plain(x: Tensor) -> Tensor:
    """The numbers of a tensor alone, without gradient; those of all samples under torch.func.vmap."""
    while is_transformed(x):
        x = _functorch.get_unwrapped(x)
    return x.detach()


def bare(x: Tensor) -> Tensor:
    """X without derivatives of any kind; under torch.func.vmap still one of the samples that it hides."""
    if not is_transformed(x):
        return x.detach()
    batched = []
    while is_transformed(x):
        if _functorch.is_batchedtensor(x):
            batched.append((_functorch.maybe_get_bdim(x), _functorch.maybe_get_level(x)))
        x = _functorch.get_unwrapped(x)
    with temporarily_clear_interpreter_stack():  # else an operation here would be that of the transform
        x = x.detach()
    for where in reversed(batched):
        x = _functorch._add_batch_dim(x, *where)
    return x


def derivatives(x: Tensor) -> int:
    """How often x may be differentiated: by each transform that does, in forward mode, twice by autograd."""
    kinds = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    count = sum(level.key() in kinds for level in _functorch.get_interpreter_stack() or ())
    count += forward_ad._current_level >= 0
    while is_transformed(x):
        x = _functorch.get_unwrapped(x)
    return count + 2 * x.requires_grad


FIXED_STEPS_OR_ONE_CALL = (
    "Under vmap take fixed steps (n_steps or step_size), or solve the batch in one call, with "
    "per_sample=True for steps of each sample's own."
)


def decided(x: Tensor, what: str, advice: str = FIXED_STEPS_OR_ONE_CALL) -> Any:
    """The numbers of a tensor on which the host decides, as `tolist` gives them.

    Raises:
        TypeError: under torch.func.vmap they are several; the message says what is decided on them.
    """
    return shown(x, what, advice).tolist()


def shown(x: Tensor, what: str, advice: str = FIXED_STEPS_OR_ONE_CALL) -> Tensor:
    """A tensor whose numbers the host goes by, without gradient; refused as `decided` does."""
    if hides_samples(x):
        raise TypeError(f"{what}, which torch.func.vmap hides. {advice}")
    return x.detach()


def hides_samples(x: Tensor) -> bool:
    """Whether x is one of several samples that torch.func.vmap takes at once."""
    while is_transformed(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def as_array(t: Tensor) -> np.ndarray:
    """Times in double precision on the host; many, (T, B), are not copied where they are so already."""
    if t.ndim > 1 and not followed():
        return t.detach().double().cpu().numpy()
    return np.array(plain(t).tolist(), np.float64)


def is_transformed(x: Tensor | None = None) -> bool:
    """Whether this is within a transform of torch.func; of a tensor, whether it is one of its tensors."""
    if torch.compiler.is_compiling():
        return False  # what torch.compile would not follow
    if x is None:
        return _functorch.peek_interpreter_stack() is not None
    return _functorch.is_functorch_wrapped_tensor(x)


def followed() -> bool:
    """Whether operations are followed beyond autograd: by a transform of torch.func, or in forward mode."""
    return is_transformed() or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)


def moves(t: Tensor) -> bool:
    """Whether a tensor may have a derivative: by autograd, in forward mode or by torch.func."""
    if t.requires_grad or is_transformed(t):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def address(x: Tensor) -> int | None:
    """Where in memory a tensor's values lie; None for one that has no memory of its own."""
    if torch.compiler.is_compiling() or is_transformed(x):
        return None
    return x.data_ptr() or None
