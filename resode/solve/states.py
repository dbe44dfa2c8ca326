"""States along a solve, gathered in little memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from resode.solve.dense import Step, interpolate
from resode.solve.host import address
from resode.solve.step import Field
from resode.tableaus import ButcherTableau

LARGE = 2**24
"""So many bytes of states are not held twice."""

HELD = 2**22
"""So many bytes of steps, and of states between them, are made and held at a time."""


class States:
    """States to be stacked, held little more than once where they are large and carry no gradient.

    Where it is known how many there will be they are written into one tensor at once, else into blocks that
    are let go one by one.

    Args:
        n: how many there will be, at most; 0 where it is not known.
        like: a state as they are.
    """

    def __init__(self, n: int, like: Tensor):
        self.parts, self.blocks = list[Tensor](), list[Tensor]()
        self.count, self.whole = 0, None
        if n * like.numel() * like.element_size() > LARGE and _is_bare(like):
            self.whole = like.new_empty((n, *like.shape))

    def append(self, x: Tensor) -> None:
        """Adds a state."""
        if self.whole is not None and _is_bare(x):
            self.whole[self.count] = x
        else:
            if self.whole is not None:
                self.parts, self.whole = list(self.whole[: self.count].unbind(0)), None
            self.parts.append(x)
            if len(self.parts) * x.numel() * x.element_size() > HELD and all(map(_is_bare, self.parts)):
                self.blocks.append(torch.stack(self.parts, out=_mapped(len(self.parts), x)))
                self.parts.clear()
        self.count += 1

    def stacked(self) -> Tensor:
        """All of them, (count, *x.shape); they are then held there alone."""
        if self.whole is not None:
            return self.whole[: self.count]
        if not self.blocks or not all(map(_is_bare, self.parts)):
            return torch.stack([*(x for block in self.blocks for x in block.unbind(0)), *self.parts])
        if self.parts:
            self.blocks.append(torch.stack(self.parts))
            self.parts.clear()
        whole, end = self.blocks[0].new_empty((self.count, *self.blocks[0].shape[1:])), self.count
        while self.blocks:
            block = self.blocks.pop()
            whole[end - len(block) : end] = block
            end -= len(block)
        return whole


def _mapped(n: int, like: Tensor) -> Tensor:
    """An empty tensor for n states, whose memory goes back to the system when it is let go.

    What malloc was given back it may keep, once it has seen blocks as large come and go.
    """
    if like.device.type != "cpu":
        return like.new_empty((n, *like.shape))
    memory = mmap.mmap(-1, n * like.numel() * like.element_size())
    return torch.frombuffer(memory, dtype=like.dtype).view(n, *like.shape)


class Passing:
    """The states at outputs, made while a solve passes them, so that few of its steps are held.

    Args:
        tableau: the method that takes the steps.
        f: the field.
        outputs: times, (T,), in order.
        forward: 1, or −1 where time decreases.
        per_sample: whether the states are batches.
    """

    def __init__(
        self, tableau: ButcherTableau, f: Field, outputs: np.ndarray, forward: float, per_sample: bool
    ):
        self.tableau, self.f, self.forward, self.per_sample = tableau, f, forward, per_sample
        self.outputs, self.steps = outputs, list[Step]()
        self.calls = self.held = 0
        self.limit = HELD

    def add(self, step: Step) -> Iterator[Tensor]:
        """The states that can be made and need not wait, when the solve has taken another step."""
        self.steps.append(step)
        if not _is_bare(step.x_end):
            return  # the graph holds the steps anyway, and one pass is faster
        self.held += _size(step)
        if self.held > self.limit:
            time = (self.forward * step.end).min()  # all samples are at least there
            yield from self._make(int((self.forward * self.outputs).searchsorted(time, "right")))
            self.steps = [s for s in self.steps if (self.forward * s.end > time).any()]
            self.held = sum(map(_size, self.steps))
            self.limit = max(HELD, 2 * self.held)

    def end_at(self, time: float) -> None:
        """Leaves out the outputs after a time, where the solve has ended."""
        self.outputs = self.outputs[(self.outputs - time) * self.forward <= 0]

    def finish(self) -> Iterator[Tensor]:
        """The states at all outputs that are left."""
        yield from self._make(len(self.outputs))

    def _make(self, n: int) -> Iterator[Tensor]:
        """The states at the next n outputs, a few at a time."""
        now, self.outputs = self.outputs[:n], self.outputs[n:]
        if not n:
            return
        x = self.steps[0].x
        many = max(1, HELD // 4 // max(1, x.numel() * x.element_size())) if _is_bare(x) else n
        for part in np.split(now, range(many, n, many)):
            states, calls = interpolate(self.tableau, self.f, self.steps, part, self.forward, self.per_sample)
            self.calls += calls
            yield from states


def _size(step: Step) -> int:
    """The bytes that a step holds."""
    return step.x.numel() * step.x.element_size() * (len(step.k) + 2)


def _is_bare(x: Tensor) -> bool:
    """Whether a tensor is numbers alone, with no gradient, and none of torch.func's or torch.export's."""
    return not x.requires_grad and address(x) is not None
