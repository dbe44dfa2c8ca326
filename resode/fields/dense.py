"""The field of a residual perceptron, on the last dimension."""

from __future__ import annotations

from torch import Tensor, nn

from resode.checks import check_whole, checked
from resode.fields.parts import make_activation
from resode.formulas import Cost, Shape, chain
from resode.symbols import one_node


@one_node
def check_width(x: Tensor, width: int, name: str) -> None:
    """A ValueError unless x is (*batch, width)."""
    if x.ndim < 1 or x.shape[-1] != width:
        raise ValueError(
            f"{name} acts on states of shape (*batch, {width}): got x {tuple(x.shape)}. "
            "Build the field with the width of x."
        )


class MLPField(nn.Module):
    r"""Two layers: F(x) = W₂ σ(W₁x + b₁) + b₂.

    Args:
        width: features of the state, its last dimension.
        hidden: features between the layers; width where None.
        activation: σ, a name in ACTIVATIONS.
        zero_init_last: start W₂ at 0, so that F = 0 and the block is the identity.

    Weights start with He's variance 2 / fan-in, biases at 0.

    Shapes:
        x (*batch, width) -> F(x), the same.

    Raises:
        ValueError: an unknown name, or x of another width (on the call).

    Example:
        >>> import torch
        >>> MLPField(64, hidden=128)(torch.zeros(3, 64)).shape
        torch.Size([3, 64])
    """

    @checked
    def __init__(
        self, width: int, *, hidden: int | None = None, activation: str = "relu", zero_init_last: bool = False
    ) -> None:
        super().__init__()
        self.width = check_whole("width", width, 1)
        hidden = width if hidden is None else check_whole("hidden", hidden, 1)
        self.fc1 = nn.Linear(width, hidden)
        self.act = make_activation(activation)
        self.fc2 = nn.Linear(hidden, width)
        for layer in (self.fc1, self.fc2):
            if not layer.weight.is_meta:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        if zero_init_last:
            nn.init.zeros_(self.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """F(x), shape of x."""
        check_width(x, self.width, "MLPField")
        return self.fc2(self.act(self.fc1(x)))

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return chain(shape, self.fc1, self.fc2)
