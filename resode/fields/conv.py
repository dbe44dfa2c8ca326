"""Convolutional fields on images (batch, channels, height, width), pre-activation."""

from __future__ import annotations

from torch import Tensor, nn

from resode.checks import check_whole, checked
from resode.fields.parts import SqueezeExcitation, make_activation, make_conv, make_norm
from resode.formulas import Cost, Shape, chain
from resode.symbols import one_node


class ImageField(nn.Module):
    """Checks the channels that a convolutional field was built for."""

    channels: int

    def _check(self, x: Tensor) -> None:
        _check_images(x, self.channels, type(self).__name__)


@one_node
def _check_images(x: Tensor, channels: int, name: str) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{name} acts on images of shape (batch, {channels}, height, width): "
            f"got x {tuple(x.shape)}. Build the field with the channels of x, or change them "
            "between groups of blocks (resode.shortcuts)."
        )


class ConvField(ImageField):
    r"""Two 3×3 convolutions: F(x) = conv(σ(norm(conv(σ(norm(x)))))).

    x + F(x) is the basic pre-activation block, and the Euler step of size 1 on dx/dt = F(x).

    Args:
        channels: channels of the state, kept.
        norm: "batch", "group" or "none", see `make_norm`.
        activation: σ, a name in ACTIVATIONS.
        squeeze_excitation: gate F's channels at its end.
        zero_init_last: start the last convolution at 0, so that F = 0 and the block is the identity.

    Shapes:
        x (batch, channels, height, width) -> F(x), the same.

    Raises:
        ValueError: an unknown name, or x with other channels (on the call).

    Source:
        He et al. (2016), Identity Mappings in Deep Residual Networks, arXiv:1603.05027, fig. 1b.

    Example:
        >>> import torch
        >>> field = ConvField(16, norm="group")
        >>> field(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    @checked
    def __init__(
        self,
        channels: int,
        *,
        norm: str = "batch",
        activation: str = "relu",
        squeeze_excitation: bool = False,
        zero_init_last: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.bn1 = make_norm(norm, channels)
        self.conv1 = make_conv(channels, channels, 3, norm=norm)
        self.bn2 = make_norm(norm, channels)
        self.conv2 = make_conv(channels, channels, 3, norm=norm)
        self.act = make_activation(activation)
        self.se = SqueezeExcitation(channels) if squeeze_excitation else nn.Identity()
        if zero_init_last:
            nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """F(x), shape of x."""
        self._check(x)
        out = self.conv1(self.act(self.bn1(x)))
        out = self.conv2(self.act(self.bn2(out)))
        return self.se(out)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return chain(shape, self.bn1, self.conv1, self.bn2, self.conv2, self.se)


class BottleneckField(ImageField):
    r"""1×1 down, 3×3, 1×1 up, each after norm and activation: the bottleneck pre-activation block's F.

    Args:
        channels: channels of the state, kept.
        expansion: the 3×3 convolution has channels / expansion channels.
        norm, activation, squeeze_excitation, zero_init_last: as in `ConvField`.

    Shapes:
        x (batch, channels, height, width) -> F(x), the same.

    Raises:
        ValueError: channels not divisible by expansion, an unknown name, or x with other channels
            (on the call).

    Source:
        He et al. (2016), arXiv:1603.05027.

    Example:
        >>> import torch
        >>> field = BottleneckField(64)
        >>> field.conv2.weight.shape, field(torch.zeros(2, 64, 8, 8)).shape
        (torch.Size([16, 16, 3, 3]), torch.Size([2, 64, 8, 8]))
    """

    @checked
    def __init__(
        self,
        channels: int,
        *,
        expansion: int = 4,
        norm: str = "batch",
        activation: str = "relu",
        squeeze_excitation: bool = False,
        zero_init_last: bool = False,
    ) -> None:
        super().__init__()
        if check_whole("channels", channels, 1) % check_whole("expansion", expansion, 1):
            raise ValueError(
                f"a bottleneck's channels must be a multiple of its expansion: got {channels}, {expansion}."
            )
        self.channels = channels
        middle = channels // expansion
        self.bn1 = make_norm(norm, channels)
        self.conv1 = make_conv(channels, middle, 1, norm=norm)
        self.bn2 = make_norm(norm, middle)
        self.conv2 = make_conv(middle, middle, 3, norm=norm)
        self.bn3 = make_norm(norm, middle)
        self.conv3 = make_conv(middle, channels, 1, norm=norm)
        self.act = make_activation(activation)
        self.se = SqueezeExcitation(channels) if squeeze_excitation else nn.Identity()
        if zero_init_last:
            nn.init.zeros_(self.conv3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """F(x), shape of x."""
        self._check(x)
        out = self.conv1(self.act(self.bn1(x)))
        out = self.conv2(self.act(self.bn2(out)))
        out = self.conv3(self.act(self.bn3(out)))
        return self.se(out)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        parts = (self.bn1, self.conv1, self.bn2, self.conv2, self.bn3, self.conv3, self.se)
        return chain(shape, *parts)
