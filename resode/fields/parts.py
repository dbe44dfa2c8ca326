"""What fields are made of: activations, norms, convolutions, squeeze-excitation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resode.checks import check_whole, checked, one_of
from resode.formulas import Cost, Shape, chain

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
"""Activations by name. ReLU limits a solver's order; gelu, silu, softplus and tanh are smooth."""

MONOTONE = ("relu", "elu", "softplus", "tanh")
"""Activations whose slope is nowhere negative, which the stable fields rely on."""

NORMS = ("batch", "group", "none")
"""Normalizations by name; `make_norm` says what each is."""


@checked
def make_activation(name: str) -> nn.Module:
    """The activation called `name` in ACTIVATIONS, never in place."""
    return ACTIVATIONS[one_of("activation", name, ACTIVATIONS)]()


@checked
def make_norm(kind: str, channels: int) -> nn.Module:
    """Normalization of images (batch, channels, height, width).

    Args:
        kind: "batch" is BatchNorm2d; "group" is GroupNorm, which never couples samples, with the
            most groups that divide the channels, at most 32 and of at least 4 channels each;
            "none" passes the state through.
        channels: channels of the state.

    Raises:
        ValueError: unknown kind, or channels < 1.

    Source:
        Ioffe & Szegedy (2015), arXiv:1502.03167; Wu & He (2018), arXiv:1803.08494.

    Example:
        >>> make_norm("group", 16).num_groups, make_norm("group", 640).num_groups
        (4, 32)
    """
    check_whole("channels", channels, 1)
    if one_of("norm", kind, NORMS) == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        most = max(1, min(32, channels // 4))
        return nn.GroupNorm(max(g for g in range(1, most + 1) if channels % g == 0), channels)
    return nn.Identity()


@checked
def make_conv(
    in_channels: int, out_channels: int, size: int, stride: int = 1, *, norm: str, groups: int = 1
) -> nn.Conv2d:
    """A size×size convolution that keeps the resolution at stride 1, with He's initialization.

    The weights' variance is 2 / fan-out, as in the residual networks' published code. Without norms
    (norm "none") it is 2 / fan-in, which keeps the state's second moment from layer to layer, and the
    convolution has a bias, zero at first, which a norm would supply.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        size: of the kernel.
        stride: of the kernel.
        norm: what follows: "none" or a norm's name.
        groups: of channels.

    Source:
        He et al. (2015), Delving Deep into Rectifiers, arXiv:1502.01852.
    """
    conv = nn.Conv2d(
        in_channels, out_channels, size, stride, padding=size // 2, groups=groups, bias=norm == "none"
    )
    if not conv.weight.is_meta:  # there is nothing to fill, and torch pretends slowly
        fan = "fan_in" if norm == "none" else "fan_out"
        nn.init.kaiming_normal_(conv.weight, mode=fan, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class SqueezeExcitation(nn.Module):
    r"""Gates every channel by the whole image: x ⊙ sigmoid(W₂ relu(W₁ mean(x) + b₁) + b₂).

    Args:
        channels: channels of x (batch, channels, height, width).
        reduction: channels per unit of the hidden layer, whose units are rounded to a multiple of eight.

    Source:
        Hu et al. (2018), arXiv:1709.01507; the rounding as in timm, whose weights fit.

    Example:
        >>> SqueezeExcitation(16)(torch.ones(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    @checked
    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        units = check_whole("channels", channels, 1) / check_whole("reduction", reduction, 1)
        hidden = max(8, int(units + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The gated images, shape of x."""
        mean = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * torch.sigmoid(self.fc2(self.act(self.fc1(mean))))

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return Cost(0, 0, shape).beside(chain((shape[0], 1, 1), self.fc1, self.fc2))
