"""The blocks of any network as fields, with the states that come to them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from resode.blocks import ResidualStack

_BLOCK_CLASS = re.compile(r"block|bottleneck", re.IGNORECASE)


@dataclass(frozen=True)
class Stage:
    """Blocks that act one after the other on states of one shape.

    Args:
        name: the stack's, or the first block's, name in the network.
        solver: its own method; "euler" for a block x + F(x) that is no `ResidualStack`'s.
        steps: the length h of a solver step in each block: η over the substeps.
        fields: F of every block.
        states: the states before each block, shape (samples, *state).
    """

    name: str
    solver: str
    steps: list[float]
    fields: list[nn.Module]
    states: list[Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a state, without the batch."""
        return tuple(self.states[0].shape[1:])


class Increment(nn.Module):
    """F(x) = block(x) − x: the field whose Euler step of length 1 the block is."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """block(x) − x."""
        return self.block(x) - x


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode within it; afterwards every module is in the mode it was in."""
    before = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def stage_states(network: nn.Module, images: Tensor, blocks: str | None = None) -> list[Stage]:
    """The blocks of any network, with the states that images reach before each of them.

    Those are the blocks of its `ResidualStack`s; where it has none, the modules that keep their input's shape
    and whose class is named a block or a bottleneck, each taken for an Euler step of length 1.

    Args:
        network: evaluated in evaluation mode, and left as it was.
        images: in the network's dtype, shape (samples, C, H, W).
        blocks: names of the modules to take instead, such as "layer*.*" (as a shell matches names).

    Raises:
        ValueError: there are no such blocks.
    """
    with evaluating(network), torch.no_grad():
        stacks = {n: m for n, m in network.named_modules() if isinstance(m, ResidualStack)}
        if stacks and blocks is None:
            inputs = _calls(network, images, list(stacks.values()))
            found = []
            for (name, stack), (x, _) in zip(stacks.items(), inputs, strict=True):
                if x is None:
                    continue
                etas = [stack.step_size] * stack.depth
                etas = etas if stack.step_sizes is None else stack.step_sizes.tolist()
                fields = [stack.block(i) for i in range(stack.depth)]
                _, path = stack(x, return_path=True)
                states = list(path[:-1])
                found.append(Stage(name, stack.solver, [e / stack.substeps for e in etas], fields, states))
            return found
        return _blocks_of(network, images, blocks)


def _blocks_of(network: nn.Module, images: Tensor, pattern: str | None) -> list[Stage]:
    """Blocks by name or by the name of their class, grouped by the shape of their states."""
    named = {
        name: module
        for name, module in network.named_modules()
        if (fnmatchcase(name, pattern) if pattern else _BLOCK_CLASS.search(type(module).__name__)) and name
    }
    stages: list[Stage] = []
    calls = _calls(network, images, list(named.values()))
    for (name, module), (x, y) in zip(named.items(), calls, strict=True):
        if x is None or y is None or y.shape != x.shape:
            continue
        if not stages or stages[-1].shape != tuple(x.shape[1:]):
            stages.append(Stage(name, "euler", [], [], []))
        stages[-1].steps.append(1.0)
        stages[-1].fields.append(Increment(module))
        stages[-1].states.append(x)
    if stages:
        return stages
    which = f"module named {pattern}" if pattern else "ResidualStack and no module whose class is a block"
    classes = sorted({type(module).__name__ for module in network.modules()})
    raise ValueError(
        f"step limits belong to blocks that keep the state's shape: this network has no {which} that does. "
        f"Name them with blocks=, such as 'layer*.*'; its modules are {', '.join(classes)}."
    )


def _calls(
    network: nn.Module, images: Tensor, modules: list[nn.Module]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """What comes into each module, and what it returns, at the images; None for what is no tensor."""
    found: dict[nn.Module, tuple[Tensor | None, Tensor | None]] = {}

    def keep(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        x = inputs[0] if inputs else None
        y = output[0] if isinstance(output, tuple) else output
        found[module] = (
            x.detach().clone() if isinstance(x, Tensor) else None,
            y if isinstance(y, Tensor) else None,
        )

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [found.get(module, (None, None)) for module in modules]
