r"""Residual networks, plain networks without their shortcuts, and the highway network.

    post-activation   y = σ(S(x) + F(x)),   F = norm conv σ norm conv          (He et al. 2015)
    pre-activation    y = S(x) + F(x),      F = conv σ norm conv σ norm        (He et al. 2016)
    plain             y = σ(F(x))
    highway           y = T(x) ⊙ F(x) + (1 − T(x)) ⊙ x                         (Srivastava et al. 2015)

Only the pre-activation block with S = identity is an Euler step of dx/dt = F(x); a post-activation
block, which rectifies the sum, is none. Module names are those under which others publish weights:
torchvision's for ImageNet (…, fc), the widespread option-A ones for CIFAR (…, linear).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from resode.checks import check_whole, checked
from resode.fields import make_activation, make_conv, make_norm
from resode.formulas import Cost, Shape, chain, cost_of
from resode.networks.common import (
    SMALL,
    Style,
    advance,
    check_images,
    head,
    make_stem,
    probability,
)
from resode.shortcuts import (
    RUN_SHORTCUTS,
    SHORTCUTS,
    HighwayShortcut,
    ProjectionShortcut,
    make_run,
)

# Blocks. Images (B, C_in, H, W) become (B, expansion·channels, H/stride, W/stride).
from resode.state_dicts import Checked


class BasicBlock(nn.Module):
    """Two 3×3 convolutions, post-activation: σ(S(x) + F(x))."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, style: Style, drop: nn.Module) -> None:
        super().__init__()
        self.conv1 = make_conv(in_channels, channels, 3, stride, norm=style.norm)
        self.bn1 = make_norm(style.norm, channels)
        self.conv2 = make_conv(channels, channels, 3, norm=style.norm)
        self.bn2 = make_norm(style.norm, channels)
        self.se = style.make_se(channels)
        self.drop = drop
        self.act = make_activation(style.activation)
        # others' name for the shortcut, also where it is the identity
        self.downsample = style.make_shortcut(in_channels, channels, stride, bare=False)
        if style.starts_at_zero:
            _zero(self.bn2, self.conv2)

    def residual(self, x: Tensor) -> Tensor:
        """F(x)."""
        out = self.act(self.bn1(self.conv1(x)))
        return self.drop(self.se(self.bn2(self.conv2(out))))

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """S(x) and F(x), the two addends."""
        return self.downsample(x), self.residual(x)

    def forward(self, x: Tensor) -> Tensor:
        """σ(S(x) + F(x))."""
        shortcut, residual = self.branches(x)
        return self.act(shortcut + residual)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        residual = chain(shape, self.conv1, self.bn1, self.conv2, self.bn2, self.se)
        return residual.beside(cost_of(self.downsample, shape))


class PlainBlock(BasicBlock):
    """A basic block without its shortcut: σ(F(x))."""

    def forward(self, x: Tensor) -> Tensor:
        """σ(F(x))."""
        return self.act(self.residual(x))


class Bottleneck(nn.Module):
    """1×1 down, 3×3 (which takes the stride), 1×1 up to four times the channels; post-activation.

    The 3×3 has channels · group_width/64 · cardinality channels in `cardinality` groups (ResNeXt).
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        style: Style,
        drop: nn.Module,
        *,
        cardinality: int = 1,
        group_width: int = 64,
    ) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        inner = channels * group_width // 64 * cardinality
        if not inner:
            raise ValueError(
                f"groups of {group_width} channels at a width of 64 have none at {channels}: take a width of "
                f"at least {-(-64 // group_width)}."
            )
        self.conv1 = make_conv(in_channels, inner, 1, norm=style.norm)
        self.bn1 = make_norm(style.norm, inner)
        self.conv2 = make_conv(inner, inner, 3, stride, norm=style.norm, groups=cardinality)
        self.bn2 = make_norm(style.norm, inner)
        self.conv3 = make_conv(inner, out_channels, 1, norm=style.norm)
        self.bn3 = make_norm(style.norm, out_channels)
        self.se = style.make_se(out_channels)
        self.drop = drop
        self.act = make_activation(style.activation)
        self.downsample = style.make_shortcut(in_channels, out_channels, stride, bare=False)
        if style.starts_at_zero:
            _zero(self.bn3, self.conv3)

    def residual(self, x: Tensor) -> Tensor:
        """F(x)."""
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        return self.drop(self.se(self.bn3(self.conv3(out))))

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """S(x) and F(x), the two addends."""
        return self.downsample(x), self.residual(x)

    def forward(self, x: Tensor) -> Tensor:
        """σ(S(x) + F(x))."""
        shortcut, residual = self.branches(x)
        return self.act(shortcut + residual)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        parts = (self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3, self.se)
        return chain(shape, *parts).beside(cost_of(self.downsample, shape))


class PreActBlock(nn.Module):
    """Two 3×3 convolutions, pre-activation: S(x) + F(x).

    A projection reads what F's first convolution reads, σ(norm(x)), and is bare; every other shortcut
    reads x. With the identity the block is `resode.fields.ConvField`'s Euler step to the bit.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, style: Style, drop: nn.Module) -> None:
        super().__init__()
        self.bn1 = make_norm(style.norm, in_channels)
        self.conv1 = make_conv(in_channels, channels, 3, stride, norm=style.norm)
        self.bn2 = make_norm(style.norm, channels)
        self.conv2 = make_conv(channels, channels, 3, norm=style.norm)
        self.act = make_activation(style.activation)
        self.se = style.make_se(channels)
        self.drop = drop
        self.shortcut = style.make_shortcut(in_channels, channels, stride, bare=True)
        if style.starts_at_zero:
            nn.init.zeros_(self.conv2.weight)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """S(x) and F(x), the two addends."""
        pre = self.act(self.bn1(x))
        shortcut = self.shortcut(pre if isinstance(self.shortcut, ProjectionShortcut) else x)
        out = self.conv1(pre)
        out = self.conv2(self.act(self.bn2(out)))
        return shortcut, self.drop(self.se(out))

    def forward(self, x: Tensor) -> Tensor:
        """S(x) + F(x)."""
        shortcut, residual = self.branches(x)
        return shortcut + residual

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        residual = chain(shape, self.bn1, self.conv1, self.bn2, self.conv2, self.se)
        return residual.beside(cost_of(self.shortcut, shape))


class PreActBottleneck(nn.Module):
    """1×1 down, 3×3 (which takes the stride), 1×1 up to four times the channels; pre-activation.

    With the identity the block is `resode.fields.BottleneckField`'s Euler step to the bit.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, style: Style, drop: nn.Module) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.bn1 = make_norm(style.norm, in_channels)
        self.conv1 = make_conv(in_channels, channels, 1, norm=style.norm)
        self.bn2 = make_norm(style.norm, channels)
        self.conv2 = make_conv(channels, channels, 3, stride, norm=style.norm)
        self.bn3 = make_norm(style.norm, channels)
        self.conv3 = make_conv(channels, out_channels, 1, norm=style.norm)
        self.act = make_activation(style.activation)
        self.se = style.make_se(out_channels)
        self.drop = drop
        self.shortcut = style.make_shortcut(in_channels, out_channels, stride, bare=True)
        if style.starts_at_zero:
            nn.init.zeros_(self.conv3.weight)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """S(x) and F(x), the two addends."""
        pre = self.act(self.bn1(x))
        shortcut = self.shortcut(pre if isinstance(self.shortcut, ProjectionShortcut) else x)
        out = self.conv1(pre)
        out = self.conv2(self.act(self.bn2(out)))
        out = self.conv3(self.act(self.bn3(out)))
        return shortcut, self.drop(self.se(out))

    def forward(self, x: Tensor) -> Tensor:
        """S(x) + F(x)."""
        shortcut, residual = self.branches(x)
        return shortcut + residual

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        parts = (self.bn1, self.conv1, self.bn2, self.conv2, self.bn3, self.conv3, self.se)
        return chain(shape, *parts).beside(cost_of(self.shortcut, shape))


Block = BasicBlock | Bottleneck | PreActBlock | PreActBottleneck


class Branch(nn.Module):
    """F alone of a block, for a run of blocks that does not add it to x; shape of x."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """F(x)."""
        return self.block.branches(x)[1]

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return cost_of(self.block, shape)


class HighwayLayer(nn.Module):
    """A 3×3 convolution F = σ(norm(conv(x))) mixed with the state: T ⊙ F + (1 − T) ⊙ x."""

    def __init__(self, channels: int, norm: str, activation: str, gate_bias: float) -> None:
        super().__init__()
        self.conv = make_conv(channels, channels, 3, norm=norm)
        self.bn = make_norm(norm, channels)
        self.act = make_activation(activation)
        self.highway = HighwayShortcut(channels, kernel_size=3, bias=gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        """T ⊙ F + (1 − T) ⊙ x, shape of x."""
        return self.highway(x, self.act(self.bn(self.conv(x))))

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return chain(shape, self.conv, self.bn).beside(cost_of(self.highway, shape))


# Networks.


class CifarResNet(Checked):
    """Post-activation network for small images: 3×3 stem, three groups of basic blocks, linear.

    Args:
        depth: 6n + 2 layers, n blocks a group.
        num_classes: outputs.
        in_channels: channels of the images.
        width: channels of the first group; the second has twice, the third four times as many.
        style: what its blocks have in common; shortcut "none" gives the plain network.

    Source:
        He et al. (2015), arXiv:1512.03385, section 4.2.

    Example:
        >>> import torch
        >>> CifarResNet(20)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    @checked
    def __init__(
        self,
        depth: int = 20,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        style: Style = SMALL,
    ) -> None:
        super().__init__()
        n = blocks_a_group(depth, 6, 2)
        block = PlainBlock if style.shortcut == "none" else BasicBlock
        drops = style.drops(3 * n)
        self.in_channels, self.gradient = check_whole("in_channels", in_channels, 1), style.gradient
        self.conv1, self.pool = make_stem(in_channels, check_whole("width", width, 1), style)
        self.bn1 = make_norm(style.norm, width)
        self.act = make_activation(style.activation)
        self.layer1 = group_of(block, block.expansion, n, width, width, 1, style, drops)
        self.layer2 = group_of(block, block.expansion, n, width, 2 * width, 2, style, drops)
        self.layer3 = group_of(block, block.expansion, n, 2 * width, 4 * width, 2, style, drops)
        self.linear = nn.Linear(4 * width, check_whole("num_classes", num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_channels, H, W)."""
        check_images(x, self.in_channels)
        x = self.act(self.bn1(self.conv1(x)))  # (B, width, H, W)
        x = self.pool(x)
        x = advance(self.layer1, x, self.gradient)  # (B, width, H, W)
        x = advance(self.layer2, x, self.gradient)  # (B, 2 width, H/2, W/2)
        x = advance(self.layer3, x, self.gradient)  # (B, 4 width, H/4, W/4)
        x = x.mean((2, 3))  # (B, 4 width)
        return self.linear(x)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        groups = (self.conv1, self.bn1, self.pool, self.layer1, self.layer2, self.layer3)
        return head(chain(shape, *groups), self.linear)


class PreActResNet(Checked):
    """Pre-activation network for small images: stem without norm, three groups, a last norm and σ, linear.

    Args:
        blocks: blocks a group, n.
        bottleneck: bottleneck blocks with four times the channels instead of basic ones.
        widths: channels of the stem and of the 3×3 convolutions in the three groups.
        num_classes, in_channels: outputs, and channels of the images.
        style: what its blocks have in common; projections are bare.

    Source:
        He et al. (2016), arXiv:1603.05027.

    Example:
        >>> import torch
        >>> PreActResNet(3)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    @checked
    def __init__(
        self,
        blocks: int,
        *,
        bottleneck: bool = False,
        widths: Sequence[int] = (16, 16, 32, 64),
        num_classes: int = 10,
        in_channels: int = 3,
        style: Style = SMALL,
    ) -> None:
        super().__init__()
        n = check_whole("blocks", blocks, 1)
        if style.shortcut == "none":
            raise ValueError(
                "a pre-activation network is a sum over its shortcuts and cannot do without: choose "
                f"{', '.join(map(repr, (*SHORTCUTS, *RUN_SHORTCUTS)))}, or a plain network."
            )
        block = PreActBottleneck if bottleneck else PreActBlock
        drops = style.drops(3 * n)
        w0, w1, w2, w3 = (check_whole("width", w, 1) for w in widths)
        c1, c2, c3 = (block.expansion * w for w in (w1, w2, w3))
        self.in_channels, self.gradient = check_whole("in_channels", in_channels, 1), style.gradient
        self.conv1, self.pool = make_stem(in_channels, w0, style)
        self.layer1 = group_of(block, block.expansion, n, w0, w1, 1, style, drops)
        self.layer2 = group_of(block, block.expansion, n, c1, w2, 2, style, drops)
        self.layer3 = group_of(block, block.expansion, n, c2, w3, 2, style, drops)
        self.bn = make_norm(style.norm, c3)
        self.act = make_activation(style.activation)
        self.linear = nn.Linear(c3, check_whole("num_classes", num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_channels, H, W)."""
        check_images(x, self.in_channels)
        x = self.pool(self.conv1(x))  # (B, w0, H, W)
        x = advance(self.layer1, x, self.gradient)  # (B, c1, H, W)
        x = advance(self.layer2, x, self.gradient)  # (B, c2, H/2, W/2)
        x = advance(self.layer3, x, self.gradient)  # (B, c3, H/4, W/4)
        x = self.act(self.bn(x))
        x = x.mean((2, 3))  # (B, c3)
        return self.linear(x)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        groups = (self.conv1, self.pool, self.layer1, self.layer2, self.layer3, self.bn)
        return head(chain(shape, *groups), self.linear)


class HighwayNet(Checked):
    """Highway network of 19 layers for small images.

    Three groups of 32, 80 and 128 channels, each a plain 3×3 convolution and then 4, 5 and 5 highway
    layers, max pooling between them; a 1×1 convolution to 100 channels, mean over pixels, linear.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        norm, activation, gradient: see `Style`; the original has no norm.
        gate_bias: the gates' bias at the start; negative lets the state through.
        dropout: probability, on the images, after each pooling and before the last layer.

    Source:
        Srivastava et al. (2015), arXiv:1507.06228, section 4.1 and the authors' network definition.

    Example:
        >>> import torch
        >>> HighwayNet()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    @checked
    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        norm: str = "none",
        activation: str = "relu",
        gate_bias: float = -2.0,
        dropout: float = 0.2,
        gradient: str = "autograd",
    ) -> None:
        super().__init__()
        Style(norm=norm, activation=activation, gradient=gradient)  # checks
        self.in_channels, self.gradient = check_whole("in_channels", in_channels, 1), gradient
        self.drop = nn.Dropout(probability("dropout", dropout))
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.act = make_activation(activation)

        def group(channels: int, width: int, highways: int) -> nn.Sequential:
            return nn.Sequential(
                make_conv(channels, width, 3, norm=norm),
                make_norm(norm, width),
                make_activation(activation),
                *(HighwayLayer(width, norm, activation, gate_bias) for _ in range(highways)),
            )

        self.layer1 = group(in_channels, 32, 4)
        self.layer2 = group(32, 80, 5)
        self.layer3 = group(80, 128, 5)
        self.conv = make_conv(128, 100, 1, norm="none")
        self.linear = nn.Linear(100, check_whole("num_classes", num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_channels, H, W)."""
        check_images(x, self.in_channels)
        x = advance(self.layer1, self.drop(x), self.gradient)  # (B, 32, H, W)
        x = advance(self.layer2, self.drop(self.pool(x)), self.gradient)  # (B, 80, H/2, W/2)
        x = advance(self.layer3, self.drop(self.pool(x)), self.gradient)  # (B, 128, H/4, W/4)
        x = self.act(self.conv(x)).mean((2, 3))  # (B, 100)
        return self.linear(self.drop(x))

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        groups = (self.layer1, self.pool, self.layer2, self.pool, self.layer3, self.conv)
        return head(chain(shape, *groups), self.linear)


def group_of(
    block: Callable[..., nn.Module],
    expansion: int,
    count: int,
    in_channels: int,
    channels: int,
    stride: int,
    style: Style,
    drops: Iterator[nn.Module],
) -> nn.Sequential:
    """`count` blocks, of which the first changes channels and resolution.

    With a shortcut of `make_run` those that keep the shape are one run.
    """
    state = expansion * channels
    if style.shortcut not in RUN_SHORTCUTS:
        first = block(in_channels, channels, stride, style, next(drops))
        rest = [block(state, channels, 1, style, next(drops)) for _ in range(count - 1)]
        return nn.Sequential(first, *rest)
    changes = in_channels != state or stride != 1
    first = [block(in_channels, channels, stride, style, next(drops))] if changes else []
    if count == len(first):
        return nn.Sequential(*first)
    parts = 2 if style.shortcut == "coupling" else 1  # of the state, each with a branch of its own
    if state % (parts * expansion):
        raise ValueError(f"a coupling cuts the channels in halves: take an even width, got {channels}.")
    width = channels // parts
    branches = [
        Branch(block(expansion * width, width, 1, style, drop))  # pyright: ignore[reportArgumentType]
        for drop in [next(drops) for _ in range(count - len(first))]
        for _ in range(parts)
    ]
    rectified = isinstance(branches[0].block, BasicBlock | Bottleneck)
    after = make_activation(style.activation) if rectified else None
    run = make_run(style.shortcut, branches, state, streams=style.streams or 4, after=after)
    return nn.Sequential(*first, *run)


def _zero(norm: nn.Module, conv: nn.Conv2d) -> None:
    """Start norm(conv(·)) at 0, by the norm's scale where it has one."""
    nn.init.zeros_(conv.weight if isinstance(norm, nn.Identity) else norm.weight)  # pyright: ignore


def blocks_a_group(depth: int, period: int, offset: int) -> int:
    """The n of a depth of period·n + offset layers; a ValueError for any other depth."""
    n, rest = divmod(check_whole("depth", depth, 1) - offset, period)
    if rest or n < 1:
        raise ValueError(f"depth must be {period}n + {offset} with n of at least 1: got {depth}.")
    return n
