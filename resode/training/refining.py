"""A network that gets deeper while it trains: every stack with twice the blocks at half the step."""

from __future__ import annotations

import copy

import torch
from torch import nn

from resode.blocks import ResidualStack
from resode.blocks.solving import stacks_of
from resode.checks import checked

_REFUSED = (
    "only the blocks of a ResidualStack can be refined, and this network has none. "
    "Take an ODE-ResNet, such as odenet20."
)


@checked
def refinable(network: nn.Module) -> list[ResidualStack]:
    """A network's stacks.

    Raises:
        ValueError: it has none, or is one itself: then nothing holds it that could hold a finer one.
    """
    if isinstance(network, ResidualStack):
        raise ValueError("a stack is refined within a network, and this one is all of it: wrap it.")
    stacks = stacks_of(network)
    if not stacks:
        raise ValueError(_REFUSED)
    return stacks


@checked
def refine(network: nn.Module, times: int = 1) -> None:
    """Put `stack.refine(2)` in the place of every stack of a network, so many times.

    In evaluation mode and with constant weights, the network then computes what it would have with twice
    the substeps.

    Args:
        network: with at least one `ResidualStack`; it is changed.
        times: how often the blocks are doubled.

    Raises:
        ValueError: the network has no stacks.

    Example:
        >>> network = nn.Sequential(ResidualStack([nn.Linear(2, 2)], step_size=1.0))
        >>> refine(network, 2)
        >>> network[0].depth, network[0].step_size
        (4, 0.25)
    """
    for _ in range(times):
        finer = {stack: stack.refine(2) for stack in refinable(network)}
        for module in list(network.modules()):
            for name, child in module._modules.items():
                if isinstance(child, ResidualStack) and child in finer:
                    setattr(module, name, finer[child])


@checked
def refined_momentum(network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """A refined copy of a network with momentum in the place of its weights.

    Refining is linear in the weights, so the finer network's weights move on as the coarse one's did: the
    momentum is refined as they are. Restarted at 0 instead, it would take 1/(1 − momentum) updates to grow
    again.

    Args:
        network: before it is refined; it is not changed.
        optimizer: its SGD; a weight that has no momentum yet gets 0.
    """
    moving = copy.deepcopy(network)
    with torch.no_grad():
        for weight, momentum in zip(network.parameters(), moving.parameters(), strict=True):
            buffer = optimizer.state[weight].get("momentum_buffer") if weight in optimizer.state else None
            momentum.zero_() if buffer is None else momentum.copy_(buffer)
    refine(moving)
    return moving
