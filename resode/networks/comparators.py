"""The networks without shortcuts that residual ones were first compared with: maxout, NIN, DSN, FitNet.

Layers, kernels, pooling and dropout are those of the authors' own definitions. What their training had
beside them (whitened images, limits on the norms of kernels, weights that start within 0.005 of zero) is
no part of a network here: images, initialization and penalty are those of the recipe that trains all.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from resode.blocks.frozen import probability
from resode.checks import check_number, check_whole
from resode.fields import make_conv, make_norm
from resode.formulas import Cost, Shape, chain, cost_of
from resode.networks.common import Style, advance, check_images
from resode.state_dicts import Checked
from resode.symbols import one_node


class Maxout(nn.Module):
    """The largest of each k consecutive channels or features: (batch, k·C, …) to (batch, C, …).

    Args:
        pieces: k, at least 2.

    Source:
        Goodfellow et al. (2013), arXiv:1302.4389.

    Example:
        >>> Maxout(2)(torch.tensor([[1.0, 3.0, -2.0, -5.0]]))
        tensor([[ 3., -2.]])
    """

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.pieces = check_whole("pieces", pieces, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The maxima, shape (batch, C, …)."""
        return x.unflatten(1, (-1, self.pieces)).amax(2)

    def cost(self, shape: Shape) -> Cost:
        """Nothing: comparisons are not counted."""
        return Cost(0, 0, (shape[0] // self.pieces, *shape[1:]))


def maxout_conv(in_channels: int, channels: int, size: int, padding: int, norm: str) -> nn.Sequential:
    """A convolution to twice the channels, norm, and the larger of each two.

    The larger of two independent normals of variance s has the second moment s: half of He's variance keeps
    the state's.
    """
    conv = make_conv(in_channels, 2 * channels, size, norm=norm)
    conv.padding = (padding, padding)
    with torch.no_grad():
        if not conv.weight.is_meta:
            conv.weight *= math.sqrt(0.5)
    return nn.Sequential(conv, make_norm(norm, 2 * channels), Maxout(2))


class MaxoutNet(Checked):
    """Maxout network for small images: three maxout convolutions, a maxout layer of 500 units, linear.

    96 channels of 8×8, 192 of 8×8 and 192 of 5×5, each the larger of two, pooled over 4×4, 4×4 and 2×2 at
    stride 2; windows at the border may reach beyond it.

    Args:
        num_classes, in_channels: outputs, and channels of the images. image_size: their height and width.
        hidden_pieces: linear pieces of the 500 units: 5 in the authors' definition. With 2 the network is
        the
            teacher of 9 M parameters that the FitNets' paper counts.
        norm: before each convolution's maximum; the original has none.
        dropout, input_dropout: probabilities, before every layer but the first, and on the images.
        gradient: see `Style`.

    Source:
        Goodfellow et al. (2013), arXiv:1302.4389, and the authors' definition for augmented CIFAR-10.

    Example:
        >>> MaxoutNet(image_size=8)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        hidden_pieces: int = 5,
        norm: str = "none",
        dropout: float = 0.5,
        input_dropout: float = 0.2,
        gradient: str = "autograd",
    ) -> None:
        super().__init__()
        Style(norm=norm, gradient=gradient)  # checks
        self.in_channels, self.gradient = check_whole("in_channels", in_channels, 1), gradient
        self.image_size = check_whole("image_size", image_size, 1)
        p = probability("dropout", dropout)
        self.drop = nn.Dropout(probability("input_dropout", input_dropout))

        def group(c_in: int, c_out: int, size: int, padding: int, window: int) -> nn.Sequential:
            pool = nn.MaxPool2d(window, 2, ceil_mode=True)
            return nn.Sequential(maxout_conv(c_in, c_out, size, padding, norm), pool, nn.Dropout(p))

        self.layers = nn.Sequential(
            group(in_channels, 96, 8, 4, 4), group(96, 192, 8, 3, 4), group(192, 192, 5, 3, 2)
        )
        features = math.prod(_map(self, self.layers, image_size, 8))
        units = nn.Linear(features, 500 * check_whole("hidden_pieces", hidden_pieces, 2))
        self.hidden = nn.Sequential(units, Maxout(hidden_pieces), nn.Dropout(p))
        self.linear = nn.Linear(500, check_whole("num_classes", num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_channels, image_size, image_size)."""
        check_images(x, self.in_channels)
        check_size(x, self.image_size)
        x = advance(self.layers, self.drop(x), self.gradient)  # (B, 192, 5, 5) at 32×32
        return self.linear(self.hidden(x.flatten(1)))

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        images = chain(shape, self.layers)
        return images.then(chain((math.prod(images.shape),), self.hidden, self.linear))


class NetworkInNetwork(Checked):
    """Network in network for small images: three convolutions, each with a perceptron of 1×1 ones behind it.

    192 channels of 5×5, then 160 and 96; 192 of 5×5, 192, 192; 192 of 3×3, 192 and one channel a class,
    whose mean over the pixels is its logit. A ReLU follows every convolution, the last one included.
    Between the groups 3×3 max pooling of stride 2, whose windows may reach beyond the border, and dropout.

    Args:
        num_classes, in_channels: outputs, and channels of the images, of 4×4 pixels or more.
        norm: after every convolution but the last; the original has none.
        dropout: probability, after each pooling.
        gradient: see `Style`.

    Source:
        Lin, Chen & Yan (2014), arXiv:1312.4400, and the authors' definition for CIFAR-10.

    Example:
        >>> NetworkInNetwork()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    last_activation: type[nn.Module] = nn.ReLU

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        norm: str = "none",
        dropout: float = 0.5,
        gradient: str = "autograd",
    ) -> None:
        super().__init__()
        Style(norm=norm, gradient=gradient)  # checks
        self.in_channels, self.gradient = check_whole("in_channels", in_channels, 1), gradient
        classes, p = check_whole("num_classes", num_classes, 1), probability("dropout", dropout)

        def after(channels: int) -> tuple[nn.Module, nn.Module]:
            return make_norm(norm, channels), nn.ReLU()

        def group(c_in: int, size: int, middle: int, c_out: int, *end: nn.Module) -> nn.Sequential:
            """Its first layer, which a companion reads, and all that follows."""
            first = make_conv(c_in, 192, size, norm=norm)
            second = make_conv(192, middle, 1, norm=norm)
            third = make_conv(middle, c_out, 1, norm=norm if end else "none")
            end = (*after(c_out), *end) if end else (self.last_activation(),)
            return nn.Sequential(first, nn.Sequential(*after(192), second, *after(middle), third, *end))

        def pool() -> tuple[nn.Module, nn.Module]:
            return nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(p)

        self.layers = nn.Sequential(
            group(in_channels, 5, 160, 96, *pool()),
            group(96, 5, 192, 192, *pool()),
            group(192, 3, 192, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_channels, H, W)."""
        check_images(x, self.in_channels)
        check_pooled(x, 4)
        x = advance(self.layers, x, self.gradient)  # (B, num_classes, 8, 8) at 32×32
        return x.mean((2, 3))

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        images = chain(shape, self.layers)
        return Cost(images.parameters, images.macs, images.shape[:1])


class DeeplySupervisedNet(NetworkInNetwork):
    r"""Deeply supervised network: network in network, a companion classifier at each group's first layer.

    A companion is linear in what its convolution gives, divided by the root of the number of its features
    (the authors learn it at a thousandth of the rate instead: it reads up to 196,608 features at once), and
    has the squared hinge loss of one class against the rest, :math:`\ell_m = \mathrm{mean}\, \sum_k \max(0,
    1 - y_k s_k)^2`, :math:`y_k = \pm 1`. While the network trains, :math:`\alpha (1 - t) \sum_m [\ell_m -
    \gamma]_+` is added to its loss, t the share of the run that is done: companions lead at first and have
    no part in the end. They take no part in evaluation.

    Args:
        num_classes, in_channels, norm, dropout, gradient: as in `NetworkInNetwork`; here no ReLU follows
        the
            last convolution.
        image_size: height and width of the images.
        companion_weight: α, at least 0.
        companion_threshold: γ, at least 0, below which a companion is content.

    Source:
        Lee et al. (2015), arXiv:1409.5185, and the authors' definition for CIFAR-10.

    Example:
        >>> model = DeeplySupervisedNet(image_size=8)
        >>> logits, loss = model.with_companion_loss(torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]), 0.5)
        >>> logits.shape, bool(loss > 0)
        (torch.Size([2, 10]), True)
    """

    last_activation = nn.Identity

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        norm: str = "none",
        dropout: float = 0.5,
        companion_weight: float = 0.1,
        companion_threshold: float = 0.0,
        gradient: str = "autograd",
    ) -> None:
        super().__init__(
            num_classes=num_classes, in_channels=in_channels, norm=norm, dropout=dropout, gradient=gradient
        )
        self.image_size = check_whole("image_size", image_size, 1)
        check_number("companion_weight", companion_weight, least=0)
        check_number("companion_threshold", companion_threshold, least=0)
        self.companion_weight, self.companion_threshold = companion_weight, companion_threshold
        _map(self, self.layers, image_size, 4)
        shape, sizes = (in_channels, image_size, image_size), []
        for group in self.layers:
            sizes.append(math.prod(cost_of(group[0], shape).shape))  # pyright: ignore[reportIndexIssue]
            shape = cost_of(group, shape).shape
        self.companions = nn.ModuleList(nn.Linear(size, num_classes) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_channels, image_size, image_size)."""
        check_images(x, self.in_channels)
        check_size(x, self.image_size)
        return super().forward(x)

    def with_companions(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the three companions' scores, each (batch, num_classes)."""
        check_images(x, self.in_channels)
        check_size(x, self.image_size)
        scores = []
        for group, companion in zip(self.layers, self.companions, strict=True):
            first, rest = group  # pyright: ignore[reportGeneralTypeIssues]
            x = first(x)
            features = x.flatten(1)
            scores.append(companion(features / features.shape[1] ** 0.5))
            x = advance(nn.Sequential(rest), x, self.gradient)
        return x.mean((2, 3)), scores

    def with_companion_loss(self, x: Tensor, labels: Tensor, done: float | Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, num_classes), and what the companions add to the loss, a number.

        Args:
            x: images (batch, in_channels, image_size, image_size).
            labels: classes (batch,), int64.
            done: t, the share of the run that is done, 0 to 1.

        Raises:
            ValueError: the network is in evaluation mode, where companions have no part.
        """
        if not self.training:
            raise ValueError(
                "companions teach a network while it trains, and this one is in evaluation mode: call "
                "train() first, or take the logits alone, network(x)."
            )
        logits, scores = self.with_companions(x)
        losses = torch.stack([squared_hinge(s.float(), labels) for s in scores])
        return logits, self.companion_weight * (1 - done) * (losses - self.companion_threshold).relu().sum()

    def cost(self, shape: Shape) -> Cost:
        """Multiply-adds of an evaluation for samples of this shape; the companions' parameters count."""
        return super().cost(shape).beside(Cost(sum(p.numel() for p in self.companions.parameters()), 0, ()))


class FitNet(Checked):
    """FitNet of 19 layers for small images: 17 thin maxout convolutions of 3×3, a maxout layer, linear.

    Three groups: 32, 32, 32, 48 and 48 channels; six times 80; six times 128; each channel the larger of
    two. 2×2 max pooling between the groups, the largest pixel of each map at the end, 500 maxout units,
    linear.

    Args:
        num_classes, in_channels: outputs, and channels of the images.
        hidden_pieces: linear pieces of the 500 units. With 2 the network has the 2.5 M parameters and 382 M
            multiplications that the paper counts; the authors' definition says 5, which makes 2.74 M.
        norm: before each convolution's maximum; the original has none.
        dropout: probability, before the last layer; 0 in the authors' definition.
        gradient: see `Style`.

    Source:
        Romero et al. (2015), arXiv:1412.6550, and the authors' definition for CIFAR-10. The paper trains it
        towards a teacher's hidden layer first (hints); here it learns from the labels alone.

    Example:
        >>> FitNet()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        hidden_pieces: int = 2,
        norm: str = "none",
        dropout: float = 0.0,
        gradient: str = "autograd",
    ) -> None:
        super().__init__()
        Style(norm=norm, gradient=gradient)  # checks
        self.in_channels, self.gradient = check_whole("in_channels", in_channels, 1), gradient

        def group(*channels: int) -> nn.Sequential:
            return nn.Sequential(*(maxout_conv(*pair, 3, 1, norm) for pair in pairwise(channels)))

        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.layer1 = group(in_channels, 32, 32, 32, 48, 48)
        self.layer2 = group(48, *(6 * (80,)))
        self.layer3 = group(80, *(6 * (128,)))
        units = nn.Linear(128, 500 * check_whole("hidden_pieces", hidden_pieces, 2))
        self.hidden = nn.Sequential(units, Maxout(hidden_pieces), nn.Dropout(probability("dropout", dropout)))
        self.linear = nn.Linear(500, check_whole("num_classes", num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_channels, H, W)."""
        check_images(x, self.in_channels)
        x = advance(self.layer1, x, self.gradient)  # (B, 48, H, W)
        x = advance(self.layer2, self.pool(x), self.gradient)  # (B, 80, H/2, W/2)
        x = advance(self.layer3, self.pool(x), self.gradient)  # (B, 128, H/4, W/4)
        return self.linear(self.hidden(x.amax((2, 3))))

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        images = chain(shape, self.layer1, self.pool, self.layer2, self.pool, self.layer3)
        return images.then(chain(images.shape[:1], self.hidden, self.linear))


def squared_hinge(scores: Tensor, labels: Tensor) -> Tensor:
    """Squared hinge loss of each class against the rest, summed over classes, averaged over samples.

    Example:
        >>> squared_hinge(torch.tensor([[2.0, 0.0], [0.0, -1.0]]), torch.tensor([0, 0]))
        tensor(1.)
    """
    signs = 2 * nn.functional.one_hot(labels, scores.shape[1]).to(scores.dtype) - 1
    return (1 - signs * scores).relu().square().sum(1).mean()


@one_node
def check_size(x: Tensor, size: int) -> None:
    """Raise a ValueError unless images x are size×size."""
    if tuple(x.shape[2:]) != (size, size):
        raise ValueError(
            f"this network has a layer of fixed size and takes images of {size}×{size} pixels: got "
            f"{tuple(x.shape)}. Build it with image_size= the images' height and width."
        )


@one_node
def check_pooled(x: Tensor, least: int) -> None:
    """Raise a ValueError where nothing of images x would be left after pooling."""
    if min(x.shape[2:]) < least:
        raise ValueError(
            f"this network pools twice and takes images of {least}×{least} pixels or more: got "
            f"{tuple(x.shape)}."
        )


def _map(network: nn.Module, layers: nn.Sequential, size: int, least: int) -> Shape:
    """The shape of what the layers make of an image; a ValueError where nothing would be left of it."""
    if size < least:
        raise ValueError(
            f"a {type(network).__name__} pools its images away below {least}×{least} pixels: got "
            f"image_size={size}."
        )
    channels = network.in_channels
    return chain((channels, size, size), layers).shape  # pyright: ignore[reportArgumentType]
