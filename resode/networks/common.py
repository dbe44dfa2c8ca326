"""What all networks share: the style of their blocks, the stem, and how blocks are run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from resode.blocks.frozen import FrozenStatistics, StochasticDepth, checkpoints, moving_norms, probability
from resode.checks import check_whole, one_of
from resode.fields import (
    ACTIVATIONS,
    NORMS,
    SqueezeExcitation,
    make_activation,
    make_conv,
    make_norm,
)
from resode.formulas import Cost, cost_of
from resode.shortcuts import RUN_SHORTCUTS, SHORTCUTS, make_shortcut
from resode.symbols import one_node


@dataclass(frozen=True)
class Style:
    """What all blocks of a network have in common.

    Args:
        shortcut: a kind of `resode.shortcuts.make_shortcut`, or "none" for a plain network; or of
            `resode.shortcuts.make_run`, which joins a group's blocks of one shape (others pad, as in "A").
        norm: "batch", "group" or "none".
        activation: a name in `resode.fields.ACTIVATIONS`.
        zero_init_last: start every F at 0: the last norm (post-activation) or the last convolution
            (pre-activation). None does so only without norms, where nothing else bounds a deep sum.
        stochastic_depth: probability to drop the last block's F in training, falling linearly to
            the first one's.
        squeeze_excitation: gate the channels at the end of every F.
        streams: of a "hyper…" shortcut; None for 4.
        stem: "small" (3×3), "imagenet" (7×7 of stride 2, then max pooling) or "deep" (three 3×3, the first of
            stride 2, with norms and σ between them, then max pooling).
        gradient: "autograd", or "checkpoint" to keep a few states only and compute every block once more
            on the way back.
    """

    shortcut: str = "A"
    norm: str = "batch"
    activation: str = "relu"
    zero_init_last: bool | None = None
    stochastic_depth: float = 0.0
    squeeze_excitation: bool = False
    streams: int | None = None
    stem: str = "small"
    gradient: str = "autograd"

    def __post_init__(self) -> None:
        one_of("shortcut", self.shortcut, (*SHORTCUTS, *RUN_SHORTCUTS, "none"))
        if self.streams is not None:
            check_whole("streams", self.streams, 1)
            if not self.shortcut.startswith("hyper"):
                raise ValueError(
                    f"streams are of a 'hyper…' shortcut, and {self.shortcut!r} has none: leave streams out, "
                    f"or choose one of {', '.join(repr(k) for k in RUN_SHORTCUTS if k.startswith('hyper'))}."
                )
        one_of("norm", self.norm, NORMS)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("stem", self.stem, ("small", "imagenet", "deep"))
        one_of("gradient", self.gradient, ("autograd", "checkpoint"))
        probability("stochastic_depth", self.stochastic_depth)
        for name in ("zero_init_last", "squeeze_excitation"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name == "squeeze_excitation"):
                raise ValueError(f"{name} must be True or False: got {value!r}.")
        if self.shortcut == "none" and (self.zero_init_last or self.stochastic_depth):
            raise ValueError(
                "zero_init_last and stochastic_depth turn a block into its shortcut, and a plain network "
                "(shortcut 'none') has none: leave them out or choose another shortcut."
            )

    @property
    def starts_at_zero(self) -> bool:
        """Whether every F starts at 0."""
        if self.zero_init_last is None:
            return self.norm == "none" and self.shortcut != "none"
        return self.zero_init_last

    def make_shortcut(self, in_channels: int, out_channels: int, stride: int, *, bare: bool) -> nn.Module:
        """The shortcut of one block; a bare projection has no norm of its own."""
        if self.shortcut == "none":
            return nn.Identity()
        norm = None if bare or self.norm == "none" else partial(make_norm, self.norm)
        kind = "A" if self.shortcut in RUN_SHORTCUTS else self.shortcut
        return make_shortcut(kind, in_channels, out_channels, stride, norm=norm)

    def make_se(self, channels: int) -> nn.Module:
        """Squeeze-excitation, if asked for."""
        return SqueezeExcitation(channels) if self.squeeze_excitation else nn.Identity()

    def drop_rates(self, blocks: int) -> list[float]:
        """The probability to drop each of the network's blocks, from the first to the last."""
        return [self.stochastic_depth * i / blocks for i in range(1, blocks + 1)]

    def drops(self, blocks: int) -> Iterator[nn.Module]:
        """Stochastic depth for each of the network's blocks, from the first to the last."""
        return (make_drop(p) for p in self.drop_rates(blocks))


def make_drop(p: float) -> nn.Module:
    """Stochastic depth, where there is any."""
    return StochasticDepth(p) if p else nn.Identity()


SMALL = Style()
"""The style of the CIFAR networks."""

IMAGENET = Style(shortcut="B", stem="imagenet")
"""The style of the ImageNet networks."""


def advance(blocks: nn.Sequential, x: Tensor, gradient: str = "autograd") -> Tensor:
    """The state after the blocks.

    With "checkpoint" a segment of k blocks keeps its input alone and is computed again for the
    gradient, without counting the batch a second time in the running statistics. L blocks then hold
    L/k states and, one segment at a time, 6k more (what a block of two convolutions saves), which is
    least at k = √(L/6).
    """
    if not checkpoints(gradient) or isinstance(x, Proxy):  # a graph says nothing of what to keep
        return blocks(x)
    k = max(1, round(math.sqrt(len(blocks) / 6)))
    for start in range(0, len(blocks), k):
        segment = blocks[start : start + k]
        x = checkpoint(segment, x, use_reentrant=False, context_fn=partial(_contexts, segment))
    return x


@one_node
def check_images(x: Tensor, in_channels: int) -> None:
    """Raise a ValueError unless x is (batch, in_channels, H, W)."""
    if x.ndim != 4 or x.shape[1] != in_channels:
        raise ValueError(
            f"this network takes images of shape (batch, {in_channels}, height, width): got "
            f"{tuple(x.shape)}. Build it with in_channels= the channels of the images."
        )


def head(images: Cost, linear: nn.Linear) -> Cost:
    """The cost of a network with a linear layer on the mean over its last images' pixels."""
    return images.then(cost_of(linear, images.shape[:1]))


def _contexts(
    segment: nn.Module,
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), FrozenStatistics(moving_norms(segment))


def make_stem(in_channels: int, width: int, style: Style) -> tuple[nn.Module, nn.Module]:
    """The first convolution (three of them in the deep stem) and the pooling after it."""
    if style.stem == "small":
        return make_conv(in_channels, width, 3, norm=style.norm), nn.Identity()
    pool = nn.MaxPool2d(3, 2, padding=1)
    if style.stem == "imagenet":
        return make_conv(in_channels, width, 7, 2, norm=style.norm), pool
    half = max(1, width // 2)
    sizes = ((in_channels, half, 2), (half, half, 1))
    layers = [
        layer
        for c_in, c_out, stride in sizes
        for layer in (
            make_conv(c_in, c_out, 3, stride, norm=style.norm),
            make_norm(style.norm, c_out),
            make_activation(style.activation),
        )
    ]
    return nn.Sequential(*layers, make_conv(half, width, 3, norm=style.norm)), pool
