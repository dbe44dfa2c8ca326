"""Networks by name: `build("resnet20", num_classes=100)`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from resode.checks import checked, did_you_mean, warn_user
from resode.networks.common import IMAGENET, SMALL, Style
from resode.networks.comparators import DeeplySupervisedNet, FitNet, MaxoutNet, NetworkInNetwork
from resode.networks.imagenet import IMAGENET_BLOCKS, ImageNetPreActResNet, ImageNetResNet
from resode.networks.odenet import ODENet
from resode.networks.perceptron import PlainMLP, ResidualMLP
from resode.networks.resnet import BasicBlock, CifarResNet, HighwayNet, PreActResNet


@dataclass(frozen=True)
class Network:
    """A named network; calling it constructs it.

    Args:
        name: how users ask for it.
        description: one line.
        options: every option with its default.
        construct: what makes it from these options.

    Example:
        >>> network = NETWORKS["resnet20"]
        >>> network.options["shortcut"], network.parameter_count(), network.parameter_count(shortcut="B")
        ('A', 269722, 272474)
    """

    name: str
    description: str
    options: Mapping[str, Any]
    construct: Callable[..., nn.Module] = field(repr=False)

    def __call__(self, **options: Any) -> nn.Module:
        """The network with these options; an unknown one is a ValueError."""
        for option in options:
            if option not in self.options:
                raise ValueError(
                    f"{self.name} has no option {option!r}.{did_you_mean(option, self.options)} "
                    f"Its options are {', '.join(self.options)}."
                )
        return self.construct(**options)

    def parameter_count(self, **options: Any) -> int:
        """How many parameters it has with these options, found without allocating them."""
        with torch.device("meta"):
            return sum(p.numel() for p in self(**options).parameters())


def _network(
    name: str,
    description: str,
    constructor: Callable[..., nn.Module],
    *numbers: int,
    style: Style | None = None,
    fixed: Iterable[str] = (),
) -> Network:
    """A network whose options are the constructor's keywords and, with a style, the style's fields.

    `numbers` are the constructor's positional arguments; options in `fixed` can't be chosen.
    """
    parameters = inspect.signature(constructor).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "style"}
    styles = [] if style is None else [f.name for f in dataclasses.fields(style) if f.name not in fixed]
    options |= {option: getattr(style, option) for option in styles}

    def construct(**given: Any) -> nn.Module:
        if style is None:
            return constructor(*numbers, **given)
        chosen = {option: given.pop(option) for option in styles if option in given}
        return constructor(*numbers, style=dataclasses.replace(style, **chosen), **given)

    return Network(name, description, options, construct)


# Families: a name with one or two numbers in it -> Network.


@dataclass(frozen=True)
class Family:
    """All networks whose names differ in their numbers.

    Args:
        prefix: the name before the numbers.
        rule: which depths there are, in words.
        has: whether there is a network of this depth.
        make: the network from its name and numbers.
        widths: a second number, the factor on the widths, follows after an underscore.
    """

    prefix: str
    rule: str
    has: Callable[[int], bool]
    make: Callable[..., Network]
    widths: bool = False

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """The numbers in `name`, or None where it is not of this family."""
        number = "([1-9][0-9]*)"
        match = re.fullmatch(f"{self.prefix}{number}" + (f"_{number}" if self.widths else ""), name)
        return None if match is None else tuple(map(int, match.groups()))

    def nearest(self, depth: int) -> list[int]:
        """The closest depths that exist, below and above."""
        below = next((d for d in range(depth, 0, -1) if self.has(d)), None)
        above = next(d for d in range(depth, depth + 1000) if self.has(d))
        return [above] if below is None else [below, above]


def _resnet(name: str, depth: int) -> Network:
    return _network(name, "ResNet for small images (He et al. 2015)", CifarResNet, depth, style=SMALL)


def _plain(name: str, depth: int) -> Network:
    return _network(
        name,
        "plain network: the ResNet without its shortcuts",
        CifarResNet,
        depth,
        style=dataclasses.replace(SMALL, shortcut="none"),
        fixed=_ABOUT_SHORTCUTS,
    )


def _preact(name: str, depth: int) -> Network:
    bottleneck = depth >= 164

    def construct(
        *, num_classes: int = 10, in_channels: int = 3, width: int = 16, style: Style = SMALL
    ) -> PreActResNet:
        return PreActResNet(
            (depth - 2) // (9 if bottleneck else 6),
            bottleneck=bottleneck,
            widths=(width, width, 2 * width, 4 * width),
            num_classes=num_classes,
            in_channels=in_channels,
            style=style,
        )

    blocks = "bottleneck" if bottleneck else "basic"
    style = dataclasses.replace(SMALL, shortcut="B" if bottleneck else "A")
    return _network(name, f"pre-activation ResNet, {blocks} blocks (He et al. 2016)", construct, style=style)


def _wide_resnet(name: str, depth: int, factor: int) -> Network:
    def construct(
        *, num_classes: int = 10, in_channels: int = 3, width: int = 16, style: Style = SMALL
    ) -> PreActResNet:
        w = factor * width
        return PreActResNet(
            (depth - 4) // 6,
            widths=(width, w, 2 * w, 4 * w),
            num_classes=num_classes,
            in_channels=in_channels,
            style=style,
        )

    style = dataclasses.replace(SMALL, shortcut="B")
    description = f"wide pre-activation ResNet, {factor} times the channels (Zagoruyko & Komodakis 2016)"
    return _network(name, description, construct, style=style)


def _odenet(name: str, depth: int) -> Network:
    return _network(
        name,
        "ODE-ResNet: the pre-activation ResNet's equal blocks as one solve a group",
        ODENet,
        depth,
        style=SMALL,
    )


def _residual_mlp(name: str, depth: int) -> Network:
    return _network(name, "residual perceptron, as many blocks as its name says", ResidualMLP, depth)


def _plain_mlp(name: str, depth: int) -> Network:
    return _network(name, "the residual perceptron without its shortcuts", PlainMLP, depth)


_ABOUT_SHORTCUTS = ("shortcut", "streams", "zero_init_last", "stochastic_depth")


def _every(period: int, offset: int) -> Callable[[int], bool]:
    return lambda depth: depth > offset and (depth - offset) % period == 0


def _preact_depth(depth: int) -> bool:
    return _every(9, 2)(depth) if depth >= 164 else _every(6, 2)(depth)


FAMILIES = (
    Family("resnet", "6n + 2 layers (or the ImageNet depths 18, 34, 50, 101, 152)", _every(6, 2), _resnet),
    Family("preact", "6n + 2 layers below 164, 9n + 2 (bottleneck) from 164", _preact_depth, _preact),
    Family("plain", "6n + 2 layers (or the ImageNet depths 18, 34)", _every(6, 2), _plain),
    Family("odenet", "6n + 2 layers", _every(6, 2), _odenet),
    Family(
        "wide_resnet", "6n + 4 layers, an underscore, the widths' factor", _every(6, 4), _wide_resnet, True
    ),
    Family("residual_mlp", "any number of blocks", lambda depth: True, _residual_mlp),
    Family("plain_mlp", "any number of blocks", lambda depth: True, _plain_mlp),
)
"""The rules by which further names are networks; `find` goes through them in this order."""


_NO_OWN_NAME = (26, 200)
"""ImageNet depths that are 6n + 2 too, and that torchvision has not: "resnet26" is the CIFAR network."""


def _single() -> dict[str, Network]:
    """The networks whose names stand alone; they come before a family's."""
    found = [
        _network("highway19", "highway network (Srivastava et al. 2015)", HighwayNet),
        _network("maxout", "maxout network, no shortcuts (Goodfellow et al. 2013)", MaxoutNet),
        _network("nin", "network in network, no shortcuts (Lin et al. 2014)", NetworkInNetwork),
        _network("dsn", "deeply supervised network, companion losses (Lee et al. 2015)", DeeplySupervisedNet),
        _network("fitnet19", "thin deep maxout network, no shortcuts (Romero et al. 2015)", FitNet),
    ]

    def add(name: str, description: str, depth: int, *, style: Style = IMAGENET, **bottleneck: int) -> None:
        network = _network(name, description, ImageNetResNet, depth, style=style)
        options = {**network.options, **bottleneck}
        found.append(
            dataclasses.replace(network, options=options, construct=partial(network.construct, **bottleneck))
        )

    deep = dataclasses.replace(IMAGENET, stem="deep", shortcut="D")
    gated = dataclasses.replace(IMAGENET, squeeze_excitation=True)
    for depth, (block, _) in IMAGENET_BLOCKS.items():
        if depth not in _NO_OWN_NAME:
            add(f"resnet{depth}", "ResNet for ImageNet (He et al. 2015)", depth)
            add(
                f"seresnet{depth}",
                "ResNet for ImageNet, squeeze-excitation (Hu et al. 2018)",
                depth,
                style=gated,
            )
            pre = "pre-activation ResNet for ImageNet, batch norm (He et al. 2016)"
            found.append(_network(f"resnetv2_{depth}", pre, ImageNetPreActResNet, depth, style=IMAGENET))
            found.append(
                _network(f"resnetv2_{depth}d", f"{pre}, deep stem", ImageNetPreActResNet, depth, style=deep)
            )
        add(
            f"resnet{depth}d",
            "ResNet for ImageNet, deep stem, pooled shortcuts (He et al. 2019)",
            depth,
            style=deep,
        )
        if block is BasicBlock:
            style = dataclasses.replace(IMAGENET, shortcut="none")
            description = "plain network: the ImageNet ResNet without its shortcuts"
            found.append(
                _network(
                    f"plain{depth}", description, ImageNetResNet, depth, style=style, fixed=_ABOUT_SHORTCUTS
                )
            )
    for depth in (50, 101):
        add(f"wide_resnet{depth}_2", "ResNet for ImageNet, twice the inner channels", depth, group_width=128)
    for depth, cardinality, width in ((50, 32, 4), (101, 32, 8), (101, 64, 4)):
        description = f"ResNeXt for ImageNet, {cardinality} groups of {width} channels (Xie et al. 2017)"
        add(
            f"resnext{depth}_{cardinality}x{width}d",
            description,
            depth,
            cardinality=cardinality,
            group_width=width,
        )
    return {network.name: network for network in found}


_SINGLE = _single()

_LISTED = (
    *(f"resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)),
    *(f"preact{depth}" for depth in (20, 32, 44, 56, 110, 164, 1001)),
    *(f"odenet{depth}" for depth in (20, 32, 44, 56, 110)),
    *(f"plain{depth}" for depth in (20, 32, 44, 56, 110)),
    "wide_resnet28_10",
    *_SINGLE,
    "residual_mlp8",
    "plain_mlp8",
)


class _Networks(Mapping[str, Network]):
    """Name -> Network. It holds every name of every family, and lists those that were published."""

    def __getitem__(self, name: str) -> Network:
        try:
            return find(name)
        except ValueError as error:
            raise KeyError(str(error)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(_LISTED)

    def __len__(self) -> int:
        return len(_LISTED)


NETWORKS: Mapping[str, Network] = _Networks()
"""Name -> `Network`, a constructor with its description, options and number of parameters.

Every name of a family is found ("resnet26" too); iteration gives the published ones.
"""


@checked
def available() -> list[str]:
    """Names of the published networks; `FAMILIES` has the rules for the others."""
    return list(NETWORKS)


@checked
def find(name: str) -> Network:
    """The network called `name`.

    Raises:
        ValueError: there is none; the message says a family's rule and nearest depths, or lists the
            names and suggests the closest.
    """
    if name in _SINGLE:
        return _SINGLE[name]
    for family in FAMILIES:
        numbers = family.numbers(str(name))
        if numbers is None:
            continue
        depth, *rest = numbers
        if family.has(depth):
            return family.make(name, *numbers)
        ends = "".join(f"_{number}" for number in rest)
        nearest = " and ".join(f"{family.prefix}{d}{ends}" for d in family.nearest(depth))
        raise ValueError(f"there is no {name}: {family.prefix}… has {family.rule}. The nearest: {nearest}.")
    rules = "; ".join(f"{family.prefix}… with {family.rule}" for family in FAMILIES)
    raise ValueError(
        f"there is no network {name!r}.{did_you_mean(str(name), _LISTED)} "
        f"Networks: {', '.join(_LISTED)}. Families: {rules}."
    )


@checked
def build(name: str, **options: Any) -> nn.Module:
    """The network called `name`, freshly initialized.

    "resnet26" and "resnet200", which are CIFAR networks here and ImageNet networks in timm, warn.

    Args:
        name: a name in `NETWORKS`, or of a family: resnet…, preact…, odenet…, plain…, wide_resnet…_…,
            residual_mlp…, plain_mlp….
        options: `NETWORKS[name].options` lists them with their defaults; `resode.networks.Style`,
            `ODENet` and the other classes say what they mean.

    Raises:
        ValueError: an unknown name, option or value; the message lists the valid ones.

    Example:
        >>> model = build("odenet20", num_classes=5, in_channels=1, solver="rk4", norm="group")
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 5])
    """
    network = find(name)
    depth = name.removeprefix("resnet")
    if depth in map(str, _NO_OWN_NAME):
        warn_user(
            f"{name} is the network for small images (CIFAR) of {depth} layers here. In timm the name stands "
            f"for one of ImageNet: resode.networks.ImageNetResNet({depth}) or build('{name}d') with its deep "
            "stem."
        )
    return network(**options)
