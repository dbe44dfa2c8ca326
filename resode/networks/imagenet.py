"""Residual networks for ImageNet, post- and pre-activation, with torchvision's module names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from resode.checks import check_whole, checked
from resode.fields import make_activation, make_norm
from resode.formulas import Cost, Shape, chain
from resode.networks.common import IMAGENET, Style, advance, check_images, head, make_stem
from resode.networks.resnet import (
    BasicBlock,
    Block,
    Bottleneck,
    PlainBlock,
    PreActBlock,
    PreActBottleneck,
    group_of,
)
from resode.state_dicts import Checked

IMAGENET_BLOCKS: dict[int, tuple[type[Block], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    26: (Bottleneck, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    200: (Bottleneck, (3, 24, 36, 3)),
}
"""Depth -> block and blocks a group of the ImageNet networks; basic blocks exist without shortcut too."""


class ImageNetResNet(Checked):
    """Post-activation network for ImageNet: 7×7 stem, four groups, fc; torchvision's module names.

    Args:
        depth: 18 or 34 (basic blocks), 26, 50, 101, 152 or 200 (bottlenecks, stride in the 3×3).
        cardinality: groups of a bottleneck's 3×3 convolution (ResNeXt).
        group_width: channels of one such group in the first group of blocks; 128 with one group is a wide
            network.
        num_classes, in_channels: outputs, and channels of the images.
        width: channels of the first group's 3×3 convolutions; they double from group to group.
        style: what its blocks have in common; shortcut "none" gives the plain network, of basic blocks
            only, stem "small" keeps the resolution, for images such as CIFAR's, and stem "deep" with
            shortcut "D" is timm's resnet…d.

    Source:
        He et al. (2015), arXiv:1512.03385, table 1; the stride's place as in torchvision. Xie et al. (2017),
        arXiv:1611.05431 (ResNeXt); Zagoruyko & Komodakis (2016), arXiv:1605.07146 (wide); He et al. (2019),
        arXiv:1812.01187 (D); Hu et al. (2018), arXiv:1709.01507 (squeeze-excitation).

    Example:
        >>> import torch
        >>> ImageNetResNet(18, num_classes=7)(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 7])
    """

    @checked
    def __init__(
        self,
        depth: int = 50,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        cardinality: int = 1,
        group_width: int = 64,
        style: Style = IMAGENET,
    ) -> None:
        super().__init__()
        block, counts = _blocks(depth)
        if style.shortcut == "none":
            if block is not BasicBlock:
                raise ValueError(f"plain ImageNet networks have 18 or 34 layers: got {depth}.")
            block = PlainBlock
        make: Callable[..., nn.Module] = block
        if (cardinality, group_width) != (1, 64):
            if block is not Bottleneck:
                raise ValueError(
                    "cardinality and group_width are of bottlenecks' 3×3 convolutions; networks of 18 and "
                    f"34 layers have none: got {cardinality} and {group_width} with {depth} layers."
                )
            check_whole("cardinality", cardinality, 1)
            make = partial(
                Bottleneck, cardinality=cardinality, group_width=check_whole("group_width", group_width, 1)
            )
        drops = style.drops(sum(counts))
        e, w = block.expansion, check_whole("width", width, 1)
        self.in_channels, self.gradient = check_whole("in_channels", in_channels, 1), style.gradient
        self.conv1, self.maxpool = make_stem(in_channels, w, style)
        self.bn1 = make_norm(style.norm, w)
        self.act = make_activation(style.activation)
        self.layer1 = group_of(make, e, counts[0], w, w, 1, style, drops)
        self.layer2 = group_of(make, e, counts[1], e * w, 2 * w, 2, style, drops)
        self.layer3 = group_of(make, e, counts[2], e * 2 * w, 4 * w, 2, style, drops)
        self.layer4 = group_of(make, e, counts[3], e * 4 * w, 8 * w, 2, style, drops)
        self.fc = nn.Linear(e * 8 * w, check_whole("num_classes", num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_channels, H, W)."""
        check_images(x, self.in_channels)
        x = self.act(self.bn1(self.conv1(x)))  # (B, w, H/2, W/2)
        x = self.maxpool(x)  # (B, w, H/4, W/4)
        x = advance(self.layer1, x, self.gradient)  # (B, ew, H/4, W/4)
        x = advance(self.layer2, x, self.gradient)  # (B, 2ew, H/8, W/8)
        x = advance(self.layer3, x, self.gradient)  # (B, 4ew, H/16, W/16)
        x = advance(self.layer4, x, self.gradient)  # (B, 8ew, H/32, W/32)
        x = x.mean((2, 3))  # (B, 8ew)
        return self.fc(x)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        groups = (self.conv1, self.bn1, self.maxpool, self.layer1, self.layer2, self.layer3, self.layer4)
        return head(chain(shape, *groups), self.fc)


class ImageNetPreActResNet(Checked):
    """Pre-activation network for ImageNet: bare 7×7 stem, four groups, a last norm and σ, fc.

    timm's resnetv2 with batch norm; `load_weights` takes its names.

    Args:
        depth: 18 or 34 (basic blocks), 50, 101 or 152 (bottlenecks, stride in the 3×3).
        num_classes, in_channels: outputs, and channels of the images.
        width: channels of the first group's 3×3 convolutions; they double from group to group.
        style: what its blocks have in common; projections are bare.

    Source:
        He et al. (2016), arXiv:1603.05027; the stride's place and the last norm as in timm.

    Example:
        >>> import torch
        >>> ImageNetPreActResNet(18, num_classes=7)(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 7])
    """

    @checked
    def __init__(
        self,
        depth: int = 50,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        style: Style = IMAGENET,
    ) -> None:
        super().__init__()
        post, counts = _blocks(depth)
        if style.shortcut == "none":
            raise ValueError(
                "a pre-activation network is a sum over its shortcuts and cannot do without: choose another "
                "shortcut, or a plain network."
            )
        block = PreActBlock if post is BasicBlock else PreActBottleneck
        drops = style.drops(sum(counts))
        e, w = block.expansion, check_whole("width", width, 1)
        self.in_channels, self.gradient = check_whole("in_channels", in_channels, 1), style.gradient
        self.conv1, self.maxpool = make_stem(in_channels, w, style)
        self.layer1 = group_of(block, e, counts[0], w, w, 1, style, drops)
        self.layer2 = group_of(block, e, counts[1], e * w, 2 * w, 2, style, drops)
        self.layer3 = group_of(block, e, counts[2], e * 2 * w, 4 * w, 2, style, drops)
        self.layer4 = group_of(block, e, counts[3], e * 4 * w, 8 * w, 2, style, drops)
        self.bn = make_norm(style.norm, e * 8 * w)
        self.act = make_activation(style.activation)
        self.fc = nn.Linear(e * 8 * w, check_whole("num_classes", num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_channels, H, W)."""
        check_images(x, self.in_channels)
        x = self.maxpool(self.conv1(x))  # (B, w, H/4, W/4)
        x = advance(self.layer1, x, self.gradient)  # (B, ew, H/4, W/4)
        x = advance(self.layer2, x, self.gradient)  # (B, 2ew, H/8, W/8)
        x = advance(self.layer3, x, self.gradient)  # (B, 4ew, H/16, W/16)
        x = advance(self.layer4, x, self.gradient)  # (B, 8ew, H/32, W/32)
        x = self.act(self.bn(x)).mean((2, 3))  # (B, 8ew)
        return self.fc(x)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        groups = (self.conv1, self.maxpool, self.layer1, self.layer2, self.layer3, self.layer4, self.bn)
        return head(chain(shape, *groups), self.fc)


def _blocks(depth: int) -> tuple[type[Block], tuple[int, int, int, int]]:
    if depth not in IMAGENET_BLOCKS:
        depths = ", ".join(map(str, IMAGENET_BLOCKS))
        raise ValueError(f"ImageNet networks have {depths} layers: got {depth!r}.")
    return IMAGENET_BLOCKS[depth]
