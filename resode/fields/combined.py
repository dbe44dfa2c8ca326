"""Fields and blocks made of others: on an augmented state, and on top of what is known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from resode.checks import check_whole, checked
from resode.formulas import Cost, Shape, cost_of
from resode.symbols import one_node


class Augmented(nn.Module):
    """A block on the state with zeros appended, so that trajectories of the state itself may cross.

    Args:
        block: acts on states with `extra` more features or channels: an ODEBlock or a stack.
        extra: how many are appended.
        dim: where.
        keep: give them back too; otherwise they are cut off at the end.

    Source:
        Dupont, Doucet & Teh, Augmented Neural ODEs (2019), arXiv:1904.01681.

    Example:
        >>> from resode.fields import MLPField
        >>> Augmented(MLPField(5), extra=3)(torch.zeros(4, 2)).shape
        torch.Size([4, 2])
    """

    @checked
    def __init__(self, block: nn.Module, *, extra: int, dim: int = 1, keep: bool = False) -> None:
        super().__init__()
        self.block = block
        self.extra = check_whole("extra", extra, 1)
        self.dim = dim
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        """The block's result for [x, 0], of x's shape, or with `extra` more where `keep`."""
        y = self.block(_append_zeros(x, self.extra, self.dim))
        return y if self.keep else y.narrow(self.dim, 0, x.shape[self.dim])

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        dim = self.dim if self.dim < 0 else self.dim - 1  # a sample has no batch dimension
        longer = list(shape)
        longer[dim] += self.extra
        cost = cost_of(self.block, tuple(longer))
        return cost if self.keep else Cost(cost.parameters, cost.macs, shape)


@one_node
def _append_zeros(x: Tensor, extra: int, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = extra
    return torch.cat((x, x.new_zeros(shape)), dim)


@one_node
def _check_shapes(known: Tensor, learned: Tensor) -> None:
    if known.shape != learned.shape:
        raise ValueError(
            "the known and the learned part must have one shape: "
            f"got {tuple(known.shape)} and {tuple(learned.shape)}."
        )


class KnownPlusLearned(nn.Module):
    r"""F = known + learned: what is known of the equation, and a network for the rest.

    Args:
        known: a function or module of what the field is called with, (t, x) or (x).
        learned: a field called likewise. With zero_init_last it starts at F = known.

    Raises:
        ValueError: the two give different shapes (on the call).

    Source:
        Rackauckas et al., Universal Differential Equations for Scientific Machine Learning (2020).

    Example:
        >>> from resode.fields import TimeMLPField
        >>> field = KnownPlusLearned(lambda t, x: -x, TimeMLPField(2, zero_init_last=True))
        >>> field(0.0, torch.ones(1, 2)).detach()
        tensor([[-1., -1.]])
    """

    @checked
    def __init__(self, known: Callable[..., Tensor], learned: nn.Module) -> None:
        super().__init__()
        self.known = known
        self.learned = learned

    def forward(self, *inputs: Tensor) -> Tensor:
        """Known and learned part together, shape of the state."""
        known, learned = self.known(*inputs), self.learned(*inputs)
        _check_shapes(known, learned)
        return known + learned

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula; a function counts nothing."""
        learned = cost_of(self.learned, shape)
        return learned.beside(cost_of(self.known, shape)) if isinstance(self.known, nn.Module) else learned
