"""Evaluation mode for a while, and a random state of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode within it; afterwards every module is in the mode it was in, frozen ones too.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout()).train()
        >>> _ = net[0].eval()
        >>> with evaluating(net):
        ...     net[1].training
        False
        >>> net.training, net[0].training, net[1].training
        (True, False, True)
    """
    before = [(module, module.training) for top in modules for module in top.modules()]
    for top in modules:
        top.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Afterwards torch's random state on the CPU and this device is as it was."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
