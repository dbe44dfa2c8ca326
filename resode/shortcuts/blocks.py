r"""Shortcuts S: how the state passes a block, y = S(x) + F(x).

Where a block keeps its state's shape the shortcut is the identity, and the block an Euler step.
Where channels or resolution change S must change them too; all of the linear ones send the gradient
back as Sᵀg. Stride s maps height n to ⌈n / s⌉, odd sizes included, as a padded 3×3 convolution of
that stride does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from resode.checks import check_number, check_whole, checked, one_of
from resode.formulas import Cost, Shape, chain, cost_of
from resode.symbols import one_node

SHORTCUTS = ("A", "B", "C", "D", "gated", "input_gated")
"""Kinds that `make_shortcut` knows."""


@one_node
def _check_images(name: str, x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{name} takes images of shape (batch, {channels}, height, width): got x {tuple(x.shape)}. "
            "Build it with the channels of x."
        )


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        check_whole(name, value, 1)


class PadShortcut(nn.Module):
    r"""Option A, free of parameters: every stride-th pixel, then channels of zeros.

    Args:
        in_channels: channels of x.
        out_channels: channels of S(x), at least in_channels.
        stride: step over rows and columns.
        zeros: where the new channels stand: "around" (half before, the larger half after the old
            ones) as in the widespread CIFAR checkpoints, or all of them "behind".

    Shapes:
        x (batch, in_channels, H, W) -> (batch, out_channels, ⌈H/stride⌉, ⌈W/stride⌉).

    Raises:
        ValueError: fewer channels out than in, which needs a projection, or x with other channels.

    Source:
        He et al. (2015), Deep Residual Learning for Image Recognition, arXiv:1512.03385, section 3.3.

    Example:
        >>> x = torch.arange(9.0).reshape(1, 1, 3, 3)
        >>> PadShortcut(1, 2, stride=2, zeros="behind")(x)
        tensor([[[[0., 2.],
                  [6., 8.]],
        <BLANKLINE>
                 [[0., 0.],
                  [0., 0.]]]])
    """

    @checked
    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, *, zeros: str = "around"
    ) -> None:
        super().__init__()
        _check_sizes(in_channels=in_channels, out_channels=out_channels, stride=stride)
        if out_channels < in_channels:
            raise ValueError(
                f"shortcut A adds channels of zeros and cannot drop channels: got {in_channels} in, "
                f"{out_channels} out. Use a projection (B)."
            )
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride
        self.zeros = one_of("zeros", zeros, ("around", "behind"))
        new = out_channels - in_channels
        before = new // 2 if zeros == "around" else 0
        self.before, self.behind = before, new - before

    def forward(self, x: Tensor) -> Tensor:
        """S(x)."""
        _check_images("shortcut A", x, self.in_channels)
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, self.before, self.behind))

    def cost(self, shape: Shape) -> Cost:
        """No parameters and no multiply-adds; with the shape of S(x)."""
        return Cost(0, 0, (self.out_channels, *(-(-n // self.stride) for n in shape[1:])))

    def extra_repr(self) -> str:
        """Sizes, for print."""
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}, zeros={self.zeros!r}"


class ProjectionShortcut(nn.Sequential):
    r"""Option B: a strided 1×1 convolution, S(x) = Wx, with normalization after it where asked.

    Option C has one in every block. Option D is average_pool=True: the stride is taken by averaging
    stride×stride pixels (those that exist, at an odd edge), so that none is skipped. W starts with
    He's variance. The parts are named "0", "1", … in the order of their use.

    Args:
        in_channels, out_channels: channels of x and of S(x), any.
        stride: step over rows and columns.
        norm: makes the normalization of out_channels, such as nn.BatchNorm2d; None leaves W bare.
        average_pool: option D.

    Shapes:
        x (batch, in_channels, H, W) -> (batch, out_channels, ⌈H/stride⌉, ⌈W/stride⌉).

    Raises:
        ValueError: a size below 1, or x with other channels (on the call).

    Source:
        He et al. (2015), arXiv:1512.03385, section 3.3; bare in He et al. (2016), arXiv:1603.05027;
        D in He et al. (2019), Bag of Tricks, arXiv:1812.01187.

    Example:
        >>> ProjectionShortcut(16, 24, 2, norm=nn.BatchNorm2d)(torch.ones(2, 16, 7, 7)).shape
        torch.Size([2, 24, 4, 4])
    """

    @checked
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        norm: Callable[[int], nn.Module] | None = None,
        average_pool: bool = False,
    ) -> None:
        _check_sizes(in_channels=in_channels, out_channels=out_channels, stride=stride)
        pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        conv = nn.Conv2d(in_channels, out_channels, 1, 1 if average_pool else stride, bias=False)
        if not conv.weight.is_meta:  # there is nothing to fill, and torch pretends slowly
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(
            *([pool] if average_pool else []), conv, *([] if norm is None else [norm(out_channels)])
        )
        self.in_channels = in_channels

    def forward(self, input: Tensor) -> Tensor:
        """S(x)."""
        _check_images("a projection shortcut", input, self.in_channels)
        return super().forward(input)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return chain(shape, *self)


class GatedShortcut(nn.Module):
    """S(x) = αx with one learnable number α.

    Args:
        alpha: α at the start; 1 is the identity.

    Source:
        He et al. (2016), arXiv:1603.05027, section 3.1 (constant scaling).

    Example:
        >>> GatedShortcut(0.5)(torch.ones(2, 3)).tolist()
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """

    @checked
    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        check_number("alpha", alpha)
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def forward(self, x: Tensor) -> Tensor:
        """αx, shape and dtype of x."""
        return self.alpha.to(x.dtype) * x

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return Cost(1, 0, shape)


class InputGatedShortcut(nn.Module):
    r"""S(x) = α(x) x with one gate a sample, α(x) = sigmoid(w·mean(x) + b).

    The mean is over the pixels; a state (batch, channels) is its own mean. w starts at 0.

    Args:
        channels: of x, its dimension 1.
        alpha: α at the start, between 0 and 1.

    Shapes:
        x (batch, channels, *pixels) -> the same.

    Source:
        He et al. (2016), arXiv:1603.05027, section 3.1 (shortcut-only gating).

    Example:
        >>> InputGatedShortcut(3, alpha=0.5)(torch.ones(2, 3, 4, 4))[0, 0, 0, 0].item()
        0.5
    """

    @checked
    def __init__(self, channels: int, *, alpha: float = 0.9) -> None:
        super().__init__()
        _check_sizes(channels=channels)
        check_number("alpha", alpha, above=0, below=1)
        self.channels = channels
        self.score = nn.Linear(channels, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, math.log(alpha / (1 - alpha)))

    def gate(self, x: Tensor) -> Tensor:
        """α(x), shape (batch, 1, …, 1)."""
        gate = torch.sigmoid(self.score(_mean(x, self.channels)))  # (B, 1)
        return _beside(gate, x)

    def forward(self, x: Tensor) -> Tensor:
        """α(x) x, shape of x."""
        return self.gate(x).to(x.dtype) * x

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return Cost(self.channels + 1, self.channels, shape)


@one_node
def _mean(x: Tensor, channels: int) -> Tensor:
    """Mean over the pixels, (batch, channels)."""
    if x.ndim < 2 or x.shape[1] != channels:
        raise ValueError(
            f"a gated shortcut takes states of shape (batch, {channels}, …): "
            f"got x {tuple(x.shape)}. Build it with the channels of x."
        )
    return x.reshape(*x.shape[:2], -1).mean(2)


@one_node
def _beside(gate: Tensor, x: Tensor) -> Tensor:
    """One number a sample, (batch, 1), as it multiplies x."""
    return gate.reshape(-1, *[1] * (x.ndim - 1))


class HighwayShortcut(nn.Module):
    r"""y = T ⊙ F + (1 − T) ⊙ x with the transform gate T = sigmoid(Wx + b).

    As T → 1 the shortcut closes: the gradient through L of them is ∏(1 − T).

    Args:
        size: features (the last dimension) or, with kernel_size, channels of x.
        kernel_size: None for a matrix W, odd for a convolution.
        bias: b at the start; negative carries the state through.

    Shapes:
        x and F, (*batch, size) or (batch, size, H, W) -> y, the same.

    Source:
        Srivastava et al. (2015), Training Very Deep Networks, arXiv:1507.06228.

    Example:
        >>> highway = HighwayShortcut(3, bias=-2.0)
        >>> x = torch.zeros(1, 3)                       # T = sigmoid(-2) = 0.1192
        >>> highway(x, torch.ones(1, 3)).detach()
        tensor([[0.1192, 0.1192, 0.1192]])
    """

    @checked
    def __init__(self, size: int, *, kernel_size: int | None = None, bias: float = -2.0) -> None:
        super().__init__()
        _check_sizes(size=size)
        if kernel_size is None:
            transform = nn.Linear(size, size)
        else:
            _check_sizes(kernel_size=kernel_size)
            if kernel_size % 2 == 0:
                raise ValueError(
                    f"kernel_size must be odd, so that the resolution is kept: got {kernel_size}."
                )
            transform = nn.Conv2d(size, size, kernel_size, padding=kernel_size // 2)
        if not transform.weight.is_meta:
            nn.init.xavier_uniform_(transform.weight)
        nn.init.constant_(cast(Tensor, transform.bias), check_number("bias", bias))
        self.transform = transform

    def gate(self, x: Tensor) -> Tensor:
        """T, shape of x."""
        return torch.sigmoid(self.transform(x))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """y, shape of x, from the state and the block's F."""
        t = self.gate(x)
        return t * residual + (1 - t) * x

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return cost_of(self.transform, shape)


@checked
def make_shortcut(
    kind: str,
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    *,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Module:
    """The shortcut of a block by the name of its kind.

    Where the state keeps its shape A, B and D are the identity, C is a projection, "gated" is αx and
    "input_gated" α(x)x. Where it changes, these two and A pad with zeros, B and C project, D projects
    after average pooling.

    Args:
        kind: one of SHORTCUTS.
        in_channels: channels of x.
        out_channels: channels of S(x).
        stride: step over rows and columns.
        norm: of projections, as in `ProjectionShortcut`.

    Raises:
        ValueError: unknown kind, a size below 1, or option A with fewer channels out than in.

    Example:
        >>> make_shortcut("A", 16, 16), make_shortcut("A", 16, 32, 2)
        (Identity(), PadShortcut(16, 32, stride=2, zeros='around'))
    """
    one_of("shortcut", kind, SHORTCUTS)
    _check_sizes(in_channels=in_channels, out_channels=out_channels, stride=stride)
    same = in_channels == out_channels and stride == 1
    if kind == "C" or (kind in ("B", "D") and not same):
        return ProjectionShortcut(in_channels, out_channels, stride, norm=norm, average_pool=kind == "D")
    if not same:
        return PadShortcut(in_channels, out_channels, stride)
    if kind == "input_gated":
        return InputGatedShortcut(in_channels)
    return GatedShortcut() if kind == "gated" else nn.Identity()
