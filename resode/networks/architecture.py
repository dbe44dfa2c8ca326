"""A network's table of parts: output size, blocks, parameters and multiply-adds of every group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from resode.blocks import ResidualStack
from resode.formulas import Cost, Shape, cost_of
from resode.networks.resnet import HighwayLayer, PlainBlock


@dataclass(frozen=True)
class Group:
    """Parts of a network that follow one another.

    Args:
        name: of the first part.
        blocks: how many residual, highway or plain blocks are in it; a part without any has 0.
        cost: parameters, multiply-adds of one sample, and the output's shape without the batch.
    """

    name: str
    blocks: int
    cost: Cost


def architecture(network: nn.Module, shape: Shape) -> list[Group]:
    """A network's parts in the order in which a sample of this shape goes through them.

    Norms, activations and dropout belong to the part before them. Parts that no sample goes through
    (companion classifiers) come last, with their parameters. Parameters and multiply-adds add up to
    `network.cost(shape)`.

    Args:
        network: one of `resode.networks`, left as it is.
        shape: of a sample: (channels, height, width) or (features,).

    Example:
        >>> from resode.networks import build
        >>> for group in architecture(build("resnet18"), (3, 224, 224))[:3]:
        ...     print(group.name, group.cost.shape, group.blocks, group.cost.parameters, group.cost.macs)
        conv1 (64, 112, 112) 0 9536 118013952
        maxpool (64, 56, 56) 0 0 0
        layer1 (64, 56, 56) 2 147968 462422016
    """
    groups: list[Group] = []
    seen: set[str] = set()

    def record(name: str, part: nn.Module, inputs: tuple[Any, ...]) -> None:
        cost = cost_of(part, tuple(inputs[0].shape[1:]))
        if name in seen:  # a part that is used again has its parameters once
            cost = replace(cost, parameters=0)
        seen.add(name)
        last = groups[-1] if groups else None
        if last is not None and cost.macs == 0 and math.prod(cost.shape) == math.prod(last.cost.shape):
            groups[-1] = Group(last.name, last.blocks, last.cost.then(cost))
        elif cost.macs or cost.parameters or cost.shape != tuple(inputs[0].shape[1:]):
            groups.append(Group(name, count_blocks(part), cost))

    hooks = [part.register_forward_pre_hook(partial(record, name)) for name, part in _parts(network)]
    device = next(network.parameters()).device
    try:
        with torch.no_grad(), torch.device(device):
            was = network.training
            network.eval()(torch.zeros(1, *shape))
            network.train(was)
    finally:
        for hook in hooks:
            hook.remove()
    for name, part in _parts(network):
        left = sum(p.numel() for p in part.parameters())
        if name not in seen and left:
            groups.append(Group(name, 0, Cost(left, 0, ())))
    return groups


def _parts(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Its children, and those of a sequence that holds all its groups."""
    for name, part in network.named_children():
        if name == "layers":
            yield from ((f"{name}.{index}", group) for index, group in part.named_children())
        else:
            yield name, part


def count_blocks(part: nn.Module) -> int:
    """Residual, highway and plain blocks in a part: those of a stack, a run, a sequence."""
    if isinstance(part, ResidualStack):
        return part.depth
    if hasattr(part, "branches") or isinstance(part, HighwayLayer | PlainBlock):
        return 1
    return sum(count_blocks(child) for child in part.children())
