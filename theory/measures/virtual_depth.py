r"""How much of a network's depth a state really passes: where blocks are the identity to the bit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class VirtualDepth:
    """What blocks change.

    Args:
        shares: of each sample's entries that block l changes, shape (L, batch).
        depth: Σ shares over the blocks, shape (batch,): the number of whole blocks that a sample passes.
    """

    shares: Tensor
    depth: Tensor


def virtual_depth(path: Tensor) -> VirtualDepth:
    r"""Share of entries with x_{l+1} ≠ x_l, to the bit, for every block, and their sum over the depth.

    In the dead zone |G(x)| ≤ τ of `resode.fields.SoftThresholdField` the block is exactly the identity. An
    increment below the state's rounding counts as none, because it is none.

    Args:
        path: states x_0 … x_L, shape (L + 1, batch, *state), as `ResidualStack(x, return_path=True)` gives.

    Raises:
        ValueError: fewer than two states.

    Example:
        >>> import torch
        >>> path = torch.tensor([[[0.0, 1.0]], [[0.0, 1.5]], [[0.0, 1.5]]])
        >>> found = virtual_depth(path)
        >>> found.shares.flatten().tolist(), found.depth.tolist()
        ([0.5, 0.0], [0.5])
    """
    if path.ndim < 3 or len(path) < 2:
        raise ValueError(
            "a path holds the states before and after every block, shape (L + 1, batch, *state), L ≥ 1: got "
            f"{tuple(path.shape)}."
        )
    shares = (path[1:] != path[:-1]).flatten(2).double().mean(2)
    return VirtualDepth(shares, shares.sum(0))
