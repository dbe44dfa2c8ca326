"""The blocks of any network as fields, with the states that come to them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from resode.blocks import ResidualStack
from resode.blocks.solving import named_stacks, with_step
from resode.calls import ModuleCall, recorded, tensors_in, within
from resode.jacobian.products import full_precision
from resode.modes import evaluating
from resode.tableaus import METHODS, ButcherTableau

_BLOCK_CLASS = re.compile(r"block|bottleneck", re.IGNORECASE)


@dataclass(frozen=True)
class BlockGroup:
    """Blocks that act one after the other on states of one shape.

    Args:
        name: the stack's, or the first block's, name in the network.
        method: its own; Euler's for a block x + F(x) that is no `ResidualStack`'s.
        steps: the length h of a solver step in each block: η over the substeps.
        fields: F of every block, of a field of (t, x) at the block's start; where its η is learned for each
            channel, or negative, times η or −1.
        states: the states before each block, shape (samples, *state).
    """

    name: str
    method: ButcherTableau
    steps: list[float]
    fields: list[nn.Module]
    states: list[Tensor]

    @property
    def solver(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a state, without the batch."""
        return tuple(self.states[0].shape[1:])

    def check_finite(self) -> None:
        """Name the first block whose states or whose F there are not finite."""
        for block, (field, x) in enumerate(zip(self.fields, self.states, strict=True)):
            with torch.no_grad():
                what = "states before" if not x.isfinite().all() else "F in"
                if what == "states before" or not field(x).isfinite().all():
                    raise ValueError(
                        f"step limits belong to finite states: the {what} block {block} of "
                        f"{self.name or 'the stack'} hold inf or nan, the first in the network. Look for it "
                        "in the weights and the images."
                    )


class Increment(nn.Module):
    """F(x) = block(x) − x, the field whose Euler step of length 1 is block; of a tuple the first counts."""

    def __init__(self, call: ModuleCall) -> None:
        super().__init__()
        self.block, self.call = call.module, call

    def forward(self, x: Tensor) -> Tensor:
        """block(x) − x."""
        return next(tensors_in(self.call.again(x))) - x


def block_groups(network: nn.Module, images: Tensor, blocks: str | None = None) -> list[BlockGroup]:
    """The blocks of any network, with the states that images reach before each of them.

    Those are the blocks of its `ResidualStack`s; where it has none, the modules that keep their input's shape
    and whose class is named a block or a bottleneck, each taken for an Euler step of length 1. A block within
    a block is part of its F, unless the outer one only calls blocks one after the other. A module that is
    called several times is a block each time. So `blocks="layer*.*"` takes a ResNet's blocks, although it
    matches their convolutions too.

    Args:
        network: evaluated in evaluation mode, and left as it was.
        images: in the network's dtype, shape (samples, C, H, W).
        blocks: names of the modules to take instead, such as "layer*.*" (as a shell matches names).

    Raises:
        ValueError: no images; there are no such blocks, or one takes a second tensor for every sample.
    """
    if not len(images):
        raise ValueError(f"step limits belong to states: give at least one image, got {tuple(images.shape)}.")
    with evaluating(network), torch.no_grad(), full_precision():
        stacks = named_stacks(network)
        if not stacks or blocks is not None:
            return _blocks_of(network, images, blocks)
        found = []
        with recorded(stacks, copies=True) as calls:
            network(images)
        for call in calls:
            stack, x = call.module, call.x
            assert isinstance(stack, ResidualStack) and x is not None
            _, path = stack(x, return_path=True)
            pairs = [with_step(stack, i, path[i]) for i in range(stack.depth)]
            fields, steps = [field for field, _ in pairs], [eta / stack.substeps for _, eta in pairs]
            found.append(BlockGroup(call.name, stack.tableau, steps, fields, list(path[:-1])))
        return found


def _blocks_of(network: nn.Module, images: Tensor, pattern: str | None) -> list[BlockGroup]:
    """Blocks by name or by the name of their class, grouped by the shape of their states."""
    named = {
        name: module
        for name, module in network.named_modules()
        if (fnmatchcase(name, pattern) if pattern else _BLOCK_CLASS.search(type(module).__name__)) and name
    }
    with recorded(named, copies=True) as calls:
        network(images)
    groups: list[BlockGroup] = []
    for call in _outermost([call for call in calls if call.keeps_shape]):
        assert call.x is not None
        _check_arguments(call, len(call.x))
        if not groups or groups[-1].shape != tuple(call.x.shape[1:]):
            groups.append(BlockGroup(call.name, METHODS["euler"], [], [], []))
        groups[-1].steps.append(1.0)
        groups[-1].fields.append(Increment(call))
        groups[-1].states.append(call.x)
    if groups:
        return groups
    which = f"module named {pattern}" if pattern else "ResidualStack and no module whose class is a block"
    classes = sorted({type(module).__name__ for module in network.modules()})
    raise ValueError(
        f"step limits belong to blocks that keep the state's shape: this network has no {which} that does. "
        f"Name them with blocks=, such as 'layer*.*'; its modules are {', '.join(classes)}."
    )


def _outermost(calls: list[ModuleCall]) -> list[ModuleCall]:
    """Without the parts of other blocks, and without what only calls blocks one after the other."""

    def parts(outer: ModuleCall) -> list[ModuleCall]:
        return [call for call in calls if call.name != outer.name and within(call.name, outer.name)]

    def chains(outer: ModuleCall) -> bool:
        reached, before = {outer.at_x}, 0
        while len(reached) > before:
            before = len(reached)
            reached |= {part.at_y for part in parts(outer) if part.at_x in reached}
        return outer.at_y in reached and bool(parts(outer))

    blocks = [call for call in calls if not chains(call)]
    inner = {part.name for outer in blocks for part in parts(outer)}
    return [call for call in blocks if call.name not in inner]


def _check_arguments(call: ModuleCall, samples: int) -> None:
    leaves, place, _ = call.beside()
    for i, value in enumerate(leaves):
        if i != place and isinstance(value, Tensor) and value.ndim and len(value) == samples > 1:
            raise ValueError(
                f"a block's F depends on its state alone: {call.name} takes a second tensor, of shape "
                f"{tuple(value.shape)}, for each of the {samples} samples. Look at one sample, or wrap the "
                "block so that it holds that tensor."
            )
