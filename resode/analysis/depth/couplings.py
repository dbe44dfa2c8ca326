r"""Additive couplings: a state that is cut into streams, which add to each other and meet again.

With x = (a, b) the coupling b ← b + f(a) changes one stream by the others. As a map of the whole state it is
the identity plus a nilpotent term, whatever f is; two of them, as in a reversible block, are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from resode.analysis.depth.graph import ValueGraph
from resode.analysis.depth.watching import Sum, Value

StreamSum = tuple[Value, Sum, int]
"""An addition to a stream: its result's place, the addition, and the operand that is the stream."""


@dataclass(frozen=True, eq=False)
class Coupling:
    """Consecutive additions to streams of one state, in one call of a module, each stream once at most.

    Args:
        before: the streams' values before the first addition; the state itself where that is read whole.
        after: the streams' values after the last one.
        dim: along which the streams lie side by side.
        sums: the additions.
        meeting: where the streams come together.
    """

    before: list[Value]
    after: list[Value]
    dim: int
    sums: list[StreamSum]
    meeting: Value | None


@dataclass(frozen=True, eq=False)
class _Stream:
    """One part of a cut state: its first value and the additions to it, in order."""

    start: Value
    sums: list[StreamSum]

    def at(self, number: int) -> Value:
        """Its value before the addition of that number."""
        return next((v for v, s, _ in reversed(self.sums) if s.number < number), self.start)


def couplings(graph: ValueGraph) -> list[Coupling]:
    """The additive couplings of a forward pass, in their order."""
    found: list[Coupling] = []
    used: set[Value] = set()
    sides: dict[Value, int] = {}
    for meeting, joined in _meetings(graph):
        streams = [_stream(graph, v, sides) for v in joined]
        known = [s for s in streams if s is not None]
        if len(known) < len(streams) or not any(s.sums for s in known):
            continue
        known.sort(key=lambda s: graph.recorder.layouts.get(s.start, ((), (), 0))[2])
        dim = _cut_dimension(graph, [s.start for s in known])
        groups = [] if dim is None else _groups(graph, known)
        if dim is None or any(v in used for group in groups for v, _, _ in group):
            continue
        closed = [_closed(graph, known, group, dim, meeting) for group in groups]
        if all(c is not None for c in closed):
            found += [c for c in closed if c is not None]
            used |= {v for group in groups for v, _, _ in group}
    found += _written(graph, sides, used)
    return sorted(found, key=lambda c: c.sums[0][1].number)


def _written(graph: ValueGraph, sides: dict[Value, int], used: set[Value]) -> Iterator[Coupling]:
    """Couplings in place: what is added to a part of x is written into x, x[:, c:] += f(x[:, :c])."""
    for z in reversed(graph.order):
        if not z[0].name().endswith("CopySlices") or z not in graph.recorder.values:
            continue
        for v in graph.before(z):
            while v in graph.recorder.sources:
                [v] = graph.before(v)
            if v not in graph.recorder.sums or v in used or (stream := _stream(graph, v, sides)) is None:
                continue
            [x] = graph.before(stream.start)
            own = stream.sums[-1]
            shapes = {graph.recorder.layouts[u][0] for u in (x, z) if u in graph.recorder.layouts}
            fits = len(shapes) == 1 and graph.are_parts(x, [stream.start]) and graph.dominates(x, z)
            if fits and len(stream.sums) == 1 and not graph.dominates(stream.start, v):
                used.add(v)
                yield Coupling([x], [z], 0, [own], None)


def _meetings(graph: ValueGraph) -> Iterator[tuple[Value | None, list[Value]]]:
    """Values that come together: as the outputs, in a concatenation, in a sum; the latest first."""
    if len(set(graph.outputs)) > 1:
        yield None, list(dict.fromkeys(graph.outputs))
    for value in reversed(graph.order):
        if value[0].name().startswith(("CatBackward", "StackBackward")) or value in graph.recorder.sums:
            sources = graph.before(value)
            if len(sources) > 1:
                yield value, sources


def _stream(graph: ValueGraph, value: Value, sides: dict[Value, int]) -> _Stream | None:
    """Back through the additions that lead to a value, to what they started from; None where that is no part.

    `sides` remembers which operand of an addition is the stream.
    """
    sums: list[StreamSum] = []
    while value in graph.recorder.sums:
        sources, fork = graph.before(value), graph.fork(value)
        if len(sources) != 2 or fork is None:
            return None
        if value not in sides:
            fewest = [graph.weights(fork, v)[0] for v in sources]
            sides[value] = int(fewest[1] < fewest[0])
        sums.append((value, graph.recorder.sums[value], sides[value]))
        value = sources[sides[value]]
    return _Stream(value, sums[::-1]) if len(graph.before(value)) == 1 else None


def _cut_dimension(graph: ValueGraph, parts: list[Value]) -> int | None:
    """Along which dimension the parts of one state may lie side by side; None where they are none."""
    sources = {graph.before(v)[0] for v in parts}
    if len(sources) != 1 or len(set(parts)) != len(parts):
        return None
    [x] = sources
    if not graph.are_parts(x, parts):
        return None
    whole, shapes = graph.recorder.layouts[x][0], [graph.recorder.layouts[v][0] for v in parts]
    if sum(s.numel() for s in shapes) != whole.numel():
        return None
    if all(s == shapes[0] and len(s) < len(whole) for s in shapes):  # unbind
        return len(shapes[0]) - 1
    cut = [d for d, n in enumerate(whole) if any(len(s) != len(whole) or s[d] != n for s in shapes)]
    return cut[0] if len(cut) == 1 else None


def _groups(graph: ValueGraph, streams: list[_Stream]) -> list[list[StreamSum]]:
    """The additions of what other streams give, by the call that they are in."""
    owner = {v: i for i, s in enumerate(streams) for v, _, _ in s.sums}
    mixing = []
    for stream in streams:
        for v, s, side in stream.sums:
            if not graph.dominates(stream.at(s.number), v) and (side == 0 or s.sign == 1):
                mixing.append((v, s, side))
    groups: list[list[StreamSum]] = []
    for item in sorted(mixing, key=lambda m: m[1].number):
        last = groups[-1] if groups else []
        if last and last[-1][1].call == item[1].call and owner[item[0]] not in {owner[v] for v, _, _ in last}:
            last.append(item)
        else:
            groups.append([item])
    return groups


def _closed(
    graph: ValueGraph, streams: list[_Stream], group: list[StreamSum], dim: int, meeting: Value | None
) -> Coupling | None:
    """The coupling, where the streams after it come from those before it and from nothing else."""
    first, last = group[0][1].number, group[-1][1].number + 1
    before, after = ([s.at(number) for s in streams] for number in (first, last))
    found = Coupling(before, after, dim, group, meeting)
    candidates = [found]
    if before == [s.start for s in streams]:
        candidates.append(replace(found, before=graph.before(streams[0].start)))
    for coupling in candidates:
        region = graph.between(coupling.before, coupling.after)
        sources = {v for value in region for v in graph.before(value)}
        weighted = any(graph.weight(v) for v in region)
        if weighted and not region & graph.recorder.roots and sources <= region | set(coupling.before):
            return coupling
    return None
