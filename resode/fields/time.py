"""Fields that see the depth time, F(t, x), for `odeint` and `ODEBlock`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resode.checks import check_whole, checked, one_of
from resode.fields.conv import ImageField
from resode.fields.dense import check_width
from resode.fields.parts import make_activation, make_conv, make_norm
from resode.formulas import Cost, Shape, cost_of
from resode.symbols import one_node


@checked
@one_node
def append_time(t: Tensor | float, x: Tensor, dim: int) -> Tensor:
    """X with the time t as one more feature or channel in dimension `dim`.

    Args:
        t: a number, 0-D, or one entry a sample, (batch, 1, …, 1): what solvers give a field.
        x: state.
        dim: where; its size grows by one.

    Example:
        >>> append_time(0.5, torch.zeros(2, 3), -1)
        tensor([[0.0000, 0.0000, 0.0000, 0.5000],
                [0.0000, 0.0000, 0.0000, 0.5000]])
    """
    shape = list(x.shape)
    shape[dim] = 1
    return torch.cat((x, torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(shape)), dim)


class TimeMLPField(nn.Module):
    r"""Two layers that see the time: F(t, x) = W₂ [σ(W₁ [x, t] + b₁), t] + b₂.

    For `odeint` and `ODEBlock`, which call a field as F(t, x).

    Args:
        width, hidden, activation, zero_init_last: as in `MLPField`.

    Raises:
        ValueError: as in `MLPField`.

    Example:
        >>> TimeMLPField(2, hidden=16, activation="tanh")(torch.tensor(0.5), torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    @checked
    def __init__(
        self, width: int, *, hidden: int | None = None, activation: str = "tanh", zero_init_last: bool = False
    ) -> None:
        super().__init__()
        self.width = check_whole("width", width, 1)
        hidden = width if hidden is None else check_whole("hidden", hidden, 1)
        self.act = make_activation(activation)
        self.fc1 = nn.Linear(width + 1, hidden)
        self.fc2 = nn.Linear(hidden + 1, width)
        if zero_init_last:
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """F(t, x), shape of x."""
        check_width(x, self.width, "TimeMLPField")
        hidden = self.act(self.fc1(append_time(t, x, -1)))
        return self.fc2(append_time(t, hidden, -1))

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        hidden = cost_of(self.fc1, (*shape[:-1], shape[-1] + 1))
        return hidden.then(cost_of(self.fc2, (*shape[:-1], self.fc2.in_features)))


class TimeConvField(ImageField):
    r"""Two 3×3 convolutions that see the time as a channel.

    F(t, x) = conv [σ(norm(conv [σ(norm(x)), t])), t].

    For `odeint` and `ODEBlock`. Batch norm is not offered: its statistics would mix times.

    Args:
        channels, activation, zero_init_last: as in `ConvField`.
        norm: "group" or "none".

    Raises:
        ValueError: as in `ConvField`.

    Source:
        Chen et al., Neural Ordinary Differential Equations (2018), the MNIST network.

    Example:
        >>> TimeConvField(8)(torch.tensor(0.5), torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    @checked
    def __init__(
        self, channels: int, *, norm: str = "group", activation: str = "relu", zero_init_last: bool = False
    ) -> None:
        super().__init__()
        norm = one_of("norm", norm, ("group", "none"))
        self.channels = check_whole("channels", channels, 1)
        self.bn1 = make_norm(norm, channels)
        self.conv1 = make_conv(channels + 1, channels, 3, norm=norm)
        self.bn2 = make_norm(norm, channels)
        self.conv2 = make_conv(channels + 1, channels, 3, norm=norm)
        self.act = make_activation(activation)
        if zero_init_last:
            nn.init.zeros_(self.conv2.weight)

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """F(t, x), shape of x."""
        self._check(x)
        out = self.conv1(append_time(t, self.act(self.bn1(x)), 1))
        return self.conv2(append_time(t, self.act(self.bn2(out)), 1))

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        timed = (shape[0] + 1, *shape[1:])
        norms = (cost_of(self.bn1, shape), cost_of(self.bn2, shape))
        return cost_of(self.conv2, timed).beside(cost_of(self.conv1, timed), *norms)


class Autonomous(nn.Module):
    """A field F(x) as one of (t, x) that ignores the time, for `odeint` and `ODEBlock`.

    Example:
        >>> from resode.fields import MLPField
        >>> Autonomous(MLPField(2))(torch.tensor(0.5), torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    @checked
    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """F(x)."""
        return self.field(x)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return cost_of(self.field, shape)
