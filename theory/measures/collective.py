r"""What the first update of all blocks together does, against that of one block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resode.analysis.depth.losses import LossFunction, sample_losses
from resode.blocks import ResidualStack


@dataclass(frozen=True, eq=False)
class FirstUpdate:
    """One step of gradient descent from where a stack is.

    Args:
        gradients: of the mean loss in each block's parameters, flat, shape (L, n).
        spread: the largest ‖G_l − mean‖ / ‖mean‖ over the blocks; 0 where all gradients are 0.
        together: ‖change of the stack's output‖ where all blocks are updated.
        alone: the same where one block is updated, shape (L,).
        ratio: together / mean of alone; nan where nothing moves.
    """

    gradients: Tensor
    spread: float
    together: float
    alone: Tensor
    ratio: float


def first_update(
    stack: ResidualStack,
    x: Tensor,
    target: Any = None,
    *,
    learning_rate: float,
    head: Callable[[Tensor], Any] | None = None,
    loss_fn: LossFunction | None = None,
) -> FirstUpdate:
    r"""Gradients of all blocks, and how far the output moves under them: all at once, and each alone.

    For linear blocks I + W_l at W_l = 0 all gradients are one matrix G, and the updated map is (I − ηG)^L: to
    first order L times what one block does. The stack is left as it was.

    Args:
        stack: with a field of its own for every block, of parameters of the same shapes; in eval mode.
        x: states before it, shape (batch, *state). A batch of unit vectors shows the end-to-end map of
            linear blocks.
        target: of the loss; see `resode.analysis.depth.losses.sample_losses`.
        learning_rate: η.
        head: from the last states to predictions; None takes the states themselves.
        loss_fn: another loss, one number a sample, or a mean over samples.

    Raises:
        ValueError: a shared field, or blocks whose parameters differ in shape.

    Source:
        Hardt & Ma, Identity Matters in Deep Learning (2017), arXiv:1611.04231; Bartlett, Helmbold & Long
        (2018), arXiv:1802.06093, on gradient descent from the identity.

    Example:
        >>> from torch import nn
        >>> fields = [nn.Linear(2, 2, bias=False) for _ in range(8)]
        >>> for field in fields:
        ...     _ = nn.init.zeros_(field.weight)
        >>> stack = ResidualStack(fields).double()
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> round(first_update(stack, x, 2 * x, learning_rate=1e-6).ratio, 4)
        8.0
    """
    if stack.shared:
        raise ValueError("blocks that share a field have no gradients of their own: give each its field.")
    fields = [stack.field(i) for i in range(stack.depth)]
    trained = [[p for p in field.parameters() if p.requires_grad] for field in fields]
    shapes = [[p.shape for p in some] for some in trained]
    if any(found != shapes[0] for found in shapes) or not shapes[0]:
        raise ValueError("all blocks must have parameters to train, of the same shapes in every block.")
    with torch.inference_mode(False), torch.enable_grad():
        output = stack(x)
        prediction = output if head is None else head(output)
        loss = sample_losses(prediction, target, loss_fn, len(x)).mean()
        parameters = [p for some in trained for p in some]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    count = len(shapes[0])
    blocks = [found[i * count : (i + 1) * count] for i in range(stack.depth)]
    gradients = torch.stack([torch.cat([g.flatten() for g in block]) for block in blocks])
    mean = gradients.mean(0)
    spread = (gradients - mean).norm(dim=1).max() / mean.norm() if bool(gradients.any()) else torch.zeros(())

    @torch.no_grad()
    def moved(updated: range) -> Tensor:
        """‖change of the output‖ under the update of these blocks."""
        chosen = [(p, g) for i in updated for p, g in zip(trained[i], blocks[i], strict=True)]
        saved = [p.clone() for p, _ in chosen]
        for p, g in chosen:
            p -= learning_rate * g
        try:
            return (stack(x) - output).norm()
        finally:
            for (p, _), value in zip(chosen, saved, strict=True):
                p.copy_(value)

    together = moved(range(stack.depth))
    alone = torch.stack([moved(range(i, i + 1)) for i in range(stack.depth)])
    ratio = float(together / alone.mean()) if bool(alone.any()) else float("nan")
    return FirstUpdate(gradients, float(spread), float(together), alone, ratio)
