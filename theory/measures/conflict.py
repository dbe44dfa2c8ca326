r"""Whether neighbouring blocks' gradients pull apart, and what a block's step is worth to the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from resode.analysis.depth.alignment import cosine
from resode.analysis.depth.losses import LossFunction, sample_losses
from resode.blocks import ResidualStack
from resode.jacobian.products import JacobianProducts


@dataclass(frozen=True, eq=False)
class GradientConflict:
    r"""Gradients before and after every block x + αF(x) of a stack.

    With v the gradient after it and J the Jacobian of F, the gradient before it is v + αJᵀv, and the two turn
    against each other where α vᵀJv < −‖v‖².

    Args:
        cosine: of the angle between the two, shape (L, batch).
        rayleigh: vᵀJv / ‖v‖² (1/time), shape (L, batch), from F alone.
        slope: ∂loss/∂α of every block, Σ vᵀF over the samples, shape (L,).
    """

    cosine: Tensor
    rayleigh: Tensor
    slope: Tensor

    @property
    def turning_step(self) -> Tensor:
        """The α above which gradients conflict at this v and J: −1/rayleigh; inf where none does."""
        safe = torch.where(self.rayleigh < 0, self.rayleigh, -1.0)
        return torch.where(self.rayleigh < 0, -1 / safe, torch.inf)


def gradient_conflict(
    stack: ResidualStack,
    x: Tensor,
    target: Any = None,
    *,
    head: Callable[[Tensor], Any] | None = None,
    loss_fn: LossFunction | None = None,
) -> GradientConflict:
    r"""Cosines between the loss gradients at consecutive states of a stack of Euler steps.

    Args:
        stack: in eval mode, under Euler with one field a block.
        x: states before it, shape (batch, *state).
        target: of the loss; see `resode.analysis.depth.losses.sample_losses`.
        head: from the last states to predictions; None takes the states themselves.
        loss_fn: another loss, one number a sample, or a mean over samples.

    Raises:
        ValueError: a stack whose blocks are no Euler steps.

    Source:
        Balduzzi et al., The Shattered Gradients Problem (2017), arXiv:1702.08591, on correlations between
        gradients; the criterion is one line of algebra.

    Example:
        >>> from torch import nn
        >>> field = nn.Linear(2, 2, bias=False)
        >>> _ = field.weight.data.copy_(-2 * torch.eye(2))
        >>> stack = ResidualStack(field, depth=2, step_size=0.75)      # 1 + αλ = −1/2
        >>> found = gradient_conflict(stack, torch.ones(1, 2))
        >>> found.cosine.flatten().tolist(), found.turning_step.flatten().tolist()
        ([-1.0, -1.0], [0.5, 0.5])
    """
    if stack.solver != "euler" or stack.substeps != 1 or stack.weights != "constant":
        raise ValueError(
            "gradients between blocks x + αF(x) belong to Euler steps with one field a block: set "
            f"solver='euler' and substeps=1, got {stack.solver}, {stack.substeps}, weights={stack.weights!r}."
        )
    if stack.learn_step == "channel":
        raise ValueError("a stack with one step a channel has no single α a block: learn one a block.")
    batch = len(x)
    etas = [stack.step_size] * stack.depth if stack.step_sizes is None else stack.step_sizes.detach().tolist()
    with torch.inference_mode(False), torch.enable_grad():
        states, increments = [x.detach().clone().requires_grad_()], []
        for i, eta in enumerate(etas):
            increments.append(stack.field(i)(states[-1]))
            states.append(states[-1] + eta * increments[-1])
        output = states[-1] if head is None else head(states[-1])
        losses = sample_losses(output, target, loss_fn, batch)
        gradients = torch.autograd.grad(losses.sum(), states)
    cosines, quotients, slopes = [], [], []
    for i, (before, after) in enumerate(pairwise(gradients)):
        v = after.reshape(batch, -1)
        pulled = JacobianProducts(stack.field(i), states[i].detach()).vjp(v)
        cosines.append(cosine(before, after, batch))
        quotients.append((pulled * v).sum(1) / v.square().sum(1))
        slopes.append((after * increments[i].detach()).sum())
    return GradientConflict(torch.stack(cosines), torch.stack(quotients), torch.stack(slopes))
