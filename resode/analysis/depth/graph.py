"""Autograd's graph as a graph of values: what is computed from what, through how many weights."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from resode.analysis.depth.watching import Recorder, Value
from resode.jacobian.places import Place

_WEIGHTED = re.compile(r"Conv(?!ert)|[Aa]ddmm|Mm|[Bb]mm|Mv|Linear|ScaledDot|Rnn|Attention")


class ValueGraph:
    """The part of autograd's graph between the inputs and the output, with dominators.

    A node with several outputs is as many values. x dominates y where every path from an input to y leads
    through x.

    Args:
        outputs: the values to be explained.
        recorder: what was seen of the forward pass.

    Attributes:
        order: the values that depend on an input, each after all that it depends on.
        at: the place of each in that order.
        readers: the values computed from each.
        dominator: the nearest one; None stands before all inputs.
    """

    def __init__(self, outputs: Iterable[Value], recorder: Recorder) -> None:
        self.recorder = recorder
        self.outputs = list(outputs)
        self.data: dict[Value, bool] = {}
        self.order = self._reaching()
        self.at = {value: i for i, value in enumerate(self.order)}
        self.readers: dict[Value, list[Value]] = {}
        for value in self.order:
            for other in self.before(value):
                self.readers.setdefault(other, []).append(value)
        self.dominator = self._dominators()

    def _sources(self, value: Value) -> list[Value]:
        if value in self.recorder.roots:
            return []
        found: Any = self.recorder.sources.get(value) or value[0].next_functions
        return [(node, i) for node, i in found if node is not None]

    def before(self, value: Value) -> list[Value]:
        """What a value is computed from, as far as it depends on an input."""
        return [v for v in self._sources(value) if self.data.get(v, False)]

    def _reaching(self) -> list[Value]:
        order: list[Value] = []
        stack = [(value, False) for value in self.outputs]
        while stack:
            value, done = stack.pop()
            if value in self.data and not done:
                continue
            if done:
                sources = self._sources(value)
                self.data[value] = value in self.recorder.roots or any(self.data.get(v) for v in sources)
                if self.data[value]:
                    order.append(value)
                continue
            self.data[value] = False
            stack.append((value, True))
            stack += [(v, False) for v in self._sources(value) if v not in self.data]
        return order

    def _dominators(self) -> dict[Value | None, Any]:
        depth: dict[Value | None, int] = {None: 0}
        result: dict[Value | None, Any] = {}
        for value in self.order:
            common: Any = None
            for count, other in enumerate(self.before(value)):
                nearest: Any = other
                if count == 0:
                    common = nearest
                while common != nearest:
                    if depth[common] >= depth[nearest]:
                        common = result[common]
                    else:
                        nearest = result[nearest]
            result[value] = common
            depth[value] = depth[common] + 1
        return result

    def fork(self, value: Value) -> Value | None:
        """The nearest dominator that was seen."""
        found = self.dominator[value]
        while found is not None and found not in self.recorder.values:
            found = self.dominator[found]
        return found

    def place(self, values: Sequence[Value], tensors: Sequence[Tensor], dim: int = 0) -> Place:
        """The place of a state that lies in these values."""
        order = sorted(range(len(values)), key=lambda i: self.at.get(values[i], 0))
        tied = any(p in self.between([], [q]) for p, q in itertools.permutations(values, 2))
        edges = tuple(GradientEdge(*v) for v in values)
        return Place(edges, tuple(t.shape for t in tensors), dim, tuple(order) if tied else ())

    def dominates(self, x: Value, y: Value) -> bool:
        """Whether every path from an input to y leads through x."""
        found = self.dominator[y]
        while found is not None and self.at[found] > self.at[x]:
            found = self.dominator[found]
        return found == x

    def weight(self, value: Value) -> int:
        """1 where an operation has weights, or is a product of states, else 0."""
        node = value[0]
        name = node.name()
        if _WEIGHTED.search(name) or isinstance(node, torch.autograd.function.BackwardCFunction):
            return 1
        learned = any(not self.data.get(v, False) for v in self._sources(value))
        return int(learned and name.startswith("MulBackward") and value not in self.recorder.scales)

    def between(self, starts: Iterable[Value], ends: Iterable[Value]) -> set[Value]:
        """The values that the ends are computed from and that come after the first start, ends included.

        No start is among them, and nothing before one is looked at.
        """
        starts = set(starts)
        first = min((self.at[v] for v in starts), default=-1)
        found = {v for v in ends if v not in starts and v in self.at}
        todo = list(found)
        while todo:
            for other in self.before(todo.pop()):
                if other not in starts and other not in found and self.at[other] > first:
                    found.add(other)
                    todo.append(other)
        return found

    def weights(self, start: Value, end: Value) -> tuple[int, int]:
        """The fewest and the most weighted operations on a path from `start` to `end`; 0 without a path."""
        found: dict[Value, tuple[int, int]] = {start: (0, 0)}
        for value in sorted(self.between([start], [end]), key=self.at.__getitem__):
            own = self.weight(value)
            sources = [found[v] for v in self.before(value) if v in found]
            if sources:
                found[value] = (own + min(s[0] for s in sources), own + max(s[1] for s in sources))
        return found.get(end, (0, 0))

    def avoids(self, start: Value, gate: Value) -> bool:
        """Whether an output depends on `start` other than through `gate`."""
        seen, todo = {start, gate}, [start]
        ends = set(self.outputs)
        while todo:
            value = todo.pop()
            if value in ends:
                return True
            for reader in self.readers.get(value, []):
                if reader not in seen:
                    seen.add(reader)
                    todo.append(reader)
        return False

    def cut(self, x: Value, y: Value) -> bool:
        """Whether y reads x in parts alone: views without common entries, at least two of them."""
        region = self.between([x], [y])
        parts = [v for v in self.readers.get(x, []) if v in region]
        return len(parts) > 1 and self.are_parts(x, parts)

    def are_parts(self, x: Value, parts: Sequence[Value]) -> bool:
        """Whether values are views of some of x's entries, without common ones."""
        layouts = self.recorder.layouts
        if any(not _VIEW.search(v[0].name()) or v not in layouts for v in parts) or x not in layouts:
            return False
        sizes = [layouts[v][0].numel() for v in parts]
        if max(sizes) >= layouts[x][0].numel() or sum(sizes) > layouts[x][0].numel():
            return False
        return len(torch.cat([_entries(*layouts[v]) for v in parts]).unique()) == sum(sizes)

    def parameters(self, values: Iterable[Value]) -> set[int]:
        """The ids of the parameters that are used to compute these values from others."""
        found, seen = set(), set()
        todo = [v for value in values for v in self._sources(value) if not self.data.get(v, False)]
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            if hasattr(value[0], "variable"):
                found.add(id(value[0].variable))
            else:
                todo += self._sources(value)
        return found


_VIEW = re.compile(r"Slice|Split|Select|Narrow|Unbind|AsStrided|View|Alias")


def _entries(shape: torch.Size, strides: tuple[int, ...], offset: int) -> Tensor:
    """The places in its storage of a view's entries."""
    found = torch.full((1,), offset)
    for size, stride in zip(shape, strides, strict=True):
        found = (found[:, None] + stride * torch.arange(size)).flatten()
    return found
