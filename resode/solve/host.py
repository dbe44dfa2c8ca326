"""What the host sees of a tensor, inside torch.func's transforms too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad


def plain(x: Tensor) -> Tensor:
    """The numbers of a tensor alone, without gradient; those of all samples under torch.func.vmap."""
    while is_transformed(x):
        x = _functorch.get_unwrapped(x)
    return x.detach()


FIXED_STEPS_OR_ONE_CALL = (
    "Under vmap take fixed steps (n_steps or step_size), or solve the batch in one call, with "
    "per_sample=True for steps of each sample's own."
)


def decided(x: Tensor, what: str, advice: str = FIXED_STEPS_OR_ONE_CALL) -> Any:
    """The numbers of a tensor on which the host decides, as `tolist` gives them.

    Raises:
        TypeError: under torch.func.vmap they are several; the message says what is decided on them.
    """
    inner = x
    while is_transformed(inner):
        if _functorch.is_batchedtensor(inner):
            raise TypeError(f"{what}, which torch.func.vmap hides. {advice}")
        inner = _functorch.get_unwrapped(inner)
    return x.detach().tolist()


def is_transformed(x: Tensor | None = None) -> bool:
    """Whether this is within a transform of torch.func; of a tensor, whether it is one of its tensors."""
    if torch.compiler.is_compiling():
        return False  # what torch.compile would not follow
    if x is None:
        return _functorch.peek_interpreter_stack() is not None
    return _functorch.is_functorch_wrapped_tensor(x)


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
