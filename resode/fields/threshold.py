"""A field with a dead zone, where its block is the identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resode.checks import check_number, check_whole, checked
from resode.formulas import Cost, Shape, cost_of
from resode.symbols import one_node


@one_node
def _spread(threshold: Tensor, z: Tensor) -> Tensor:
    """Thresholds of channels, dimension 1 of z, as they stand beside z."""
    return threshold.reshape(-1, *[1] * (z.ndim - 2)).to(z.dtype)


class SoftThresholdField(nn.Module):
    r"""F(x) = sign(z) max(|z| − τ, 0) with z = G(x): exactly 0 where |G(x)| ≤ τ.

    In that dead zone the block x + ηF(x) is the identity to the bit.

    Args:
        branch: G, any field.
        threshold: τ at the start; it is learnt, as |threshold|.
        channels: one τ for each channel (dimension 1 of x); one for all where None.

    Shapes:
        x (batch, *state) -> F(x), the same.

    Raises:
        ValueError: threshold < 0 or not finite, or channels < 1.

    Example:
        >>> field = SoftThresholdField(nn.Identity(), threshold=1.0)
        >>> x = torch.tensor([[-3.0, 0.5, 1.25, 0.0]])
        >>> field(x).tolist(), field.active_share(x).tolist()
        ([[-2.0, 0.0, 0.25, 0.0]], [0.5])
    """

    @checked
    def __init__(self, branch: nn.Module, *, threshold: float = 0.1, channels: int | None = None) -> None:
        super().__init__()
        check_number("threshold", threshold, least=0)
        self.branch = branch
        count = 1 if channels is None else check_whole("channels", channels, 1)
        self.threshold = nn.Parameter(torch.full((count,), float(threshold)))

    def _tau(self, z: Tensor) -> Tensor:
        return _spread(self.threshold.abs(), z)

    def forward(self, x: Tensor) -> Tensor:
        """F(x), shape of x."""
        z = self.branch(x)
        tau = self._tau(z)
        return z - z.clamp(-tau, tau)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        branch = cost_of(self.branch, shape)
        return branch.beside(Cost(len(self.threshold), 0, shape))

    @torch.no_grad()
    def active_share(self, x: Tensor) -> Tensor:
        """Share of each sample's units outside the dead zone, |G(x)| > τ, shape (batch,).

        It calls G once, so take it after `.eval()` where G holds batch norms: in training they would
        count the batch.
        """
        z = self.branch(x)
        return (z.abs() > self._tau(z)).flatten(1).double().mean(1).to(x.dtype)
