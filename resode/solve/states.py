"""States along a solve, gathered in little memory."""

from __future__ import annotations

import mmap

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
        self.count, self.whole, self.like = 0, None, like.detach()
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

    def listed(self) -> list[Tensor]:
        """All of them, one by one."""
        if self.whole is not None:
            return [*self.whole[: self.count].unbind(0)]
        return [*(x for block in self.blocks for x in block.unbind(0)), *self.parts]

    def room(self, n: int) -> Tensor:
        """A tensor for the next n states, to be filled in any order and then given to `take`."""
        if self.whole is not None:
            return self.whole[self.count : self.count + n]
        return self.like.new_empty((n, *self.like.shape))

    def take(self, room: Tensor) -> None:
        """Adds the states in a room that was filled."""
        if self.whole is not None and room.data_ptr() == self.whole[self.count :].data_ptr():
            self.count += len(room)
            return
        for x in room.unbind(0):
            self.append(x)

    def stacked(self) -> Tensor:
        """All of them, (count, *x.shape); they are then held there alone."""
        if self.whole is not None:
            return self.whole[: self.count]
        if not self.blocks or not all(map(_is_bare, self.parts)):
            return torch.stack(self.listed())
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

    A step is held until 4 MB of them are; then each sample's states at the outputs that lie behind it are
    made and put in their places, however far the others have come.

    Args:
        tableau: the method that takes the steps.
        f: the field.
        outputs: times from the start on, in order: (T,), or each sample's own, (T, B).
        forward: 1, or −1 where time decreases.
        per_sample: whether the states are batches of samples with steps of their own.
        path: where the states go, in the outputs' order.
    """

    def __init__(
        self,
        tableau: ButcherTableau,
        f: Field,
        outputs: np.ndarray,
        forward: float,
        per_sample: bool,
        path: States,
    ):
        self.tableau, self.f, self.forward, self.per_sample = tableau, f, forward, per_sample
        self.outputs, self.path, self.steps = outputs, path, list[Step]()
        self.calls = self.held = 0
        self.done = np.zeros(1, np.int64)  # outputs whose states were made, (B,)
        # (T, *x.shape), for samples that pass an output at steps of their own.
        self.places: Tensor | None = None

    def add(self, step: Step) -> None:
        """Notes another step that the solve has taken."""
        self.steps.append(step)
        if not _is_bare(step.x_end):
            return  # the graph holds the steps anyway, and one pass is faster
        self.held += _size(step)
        if self.held > HELD:
            self._make()

    def end_at(self, time: float) -> None:
        """Leaves out the outputs after a time, where the solve has ended."""
        self.outputs = self.outputs[(self.outputs - time) * self.forward <= 0]

    def left(self) -> int:
        """How many outputs have no state yet."""
        return len(self.outputs) - int(self.done.min())

    def finish(self, *ends: tuple[Tensor, np.ndarray]) -> None:
        """Makes the states at all outputs that are left.

        Args:
            *ends: states and each sample's time of them, which outputs of its own may meet.
        """
        n, outputs = len(self.outputs), self.outputs
        held_once = self.places is not None or self.path.whole is not None
        if not self.per_sample or not n:
            self._make(at_end=True)
        elif held_once and all(_is_bare(s.x_end) for s in self.steps):
            self._make(at_end=True)
            places = self.path.room(n) if self.places is None else self.places
            for state, times in ends if outputs.ndim > 1 else ():
                rows, samples = (torch.from_numpy(i).to(state.device) for i in (outputs == times).nonzero())
                places[rows, samples] = state[samples]
            self.path.take(places)
        else:  # in one pass
            states = [ends[0][0]] * n if ends else []
            if self.steps:
                states, self.calls = interpolate(
                    self.tableau, self.f, self.steps, outputs.T, self.forward, True
                )
            for y in with_ends(states, outputs.T, *ends):
                self.path.append(y)

    def _make(self, at_end: bool = False) -> None:
        """The states at the outputs behind the steps held, a few at a time; the steps are then let go."""
        steps, self.steps, self.held = self.steps, [], 0
        if not steps:
            return
        x, end, forward, last = steps[0].x, steps[-1].end, self.forward, len(self.outputs) - 1
        done = np.broadcast_to(self.done, end.shape)
        ahead = np.full_like(done, last + 1) if at_end else passed(self.outputs, end, forward, done)
        self.done = ahead
        n, columns = int((ahead - done).max()), np.arange(len(end))
        each = x.numel() * x.element_size() + 64 * len(end)  # of a state, and of where each sample finds it
        many = max(1, HELD // 4 // each) if _is_bare(x) else max(n, 1)
        for first in range(0, n, many):
            rows = done + np.arange(first, min(n, first + many))[:, None]  # (S, B) of outputs
            asked = rows < ahead
            rows = rows.clip(max=last)
            times = self.outputs[rows] if self.outputs.ndim == 1 else self.outputs[rows, columns]
            # A sample that passed fewer of them than another makes do with its end.
            times = np.where(asked, times, end)
            states, calls = interpolate(self.tableau, self.f, steps, times.T, forward, self.per_sample)
            self.calls += calls
            if not self.per_sample:
                for y in states:
                    self.path.append(y)
                continue
            if self.places is None:
                self.places = self.path.room(len(self.outputs))
            if asked.all() and (rows == rows[:, :1]).all():
                self.places[rows[0, 0] : rows[-1, 0] + 1] = torch.stack(states)
                continue
            slots, samples = (torch.from_numpy(i).to(x.device) for i in asked.nonzero())
            to = torch.from_numpy(rows[asked]).to(x.device)
            self.places[to, samples] = torch.stack(states)[slots, samples]


def passed(outputs: np.ndarray, time: np.ndarray, forward: float, done: np.ndarray) -> np.ndarray:
    """How many outputs lie at each sample's time or before, (B,).

    Args:
        outputs: in order, (T,) or each sample's own, (T, B).
        time: of each sample, (B,).
        forward: 1, or −1 where time decreases.
        done: so many do, (B,), at least.
    """
    if outputs.ndim == 1:
        return (forward * outputs).searchsorted(forward * time, "right")
    columns, last = np.arange(len(time)), len(outputs) - 1
    while last >= 0:
        more = (done <= last) & (forward * outputs[done.clip(max=last), columns] <= forward * time)
        if not more.any():
            break
        done = done + more
    return done


def with_ends(path: list[Tensor], outputs: np.ndarray, *ends: tuple[Tensor, np.ndarray]) -> list[Tensor]:
    """The states at the outputs, those of the ends where a sample's own, (B, T), lie there.

    Args:
        path: the states, one an output.
        outputs: (B, T); (T,) lie between the ends.
        *ends: states and each sample's time of them, (B,).
    """
    if outputs.ndim > 1:
        for state, times in ends:
            for j in np.flatnonzero((hit := outputs == times[:, None]).any(0)):
                mask = torch.from_numpy(hit[:, j]).to(state.device).view(-1, *(1,) * (state.ndim - 1))
                path[j] = torch.where(mask, state, path[j])
    return path


def _size(step: Step) -> int:
    """The bytes that a step holds."""
    return step.x.numel() * step.x.element_size() * (len(step.k) + 2)


def _is_bare(x: Tensor) -> bool:
    """Whether a tensor is numbers alone, with no gradient, and none of torch.func's or torch.export's."""
    return not x.requires_grad and address(x) is not None
