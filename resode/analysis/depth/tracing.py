r"""Which tensors a network adds to which: its residual additions, found without changing it.

A forward pass is watched twice over. Autograd's graph tells what depends on what: at a residual addition
y = S(x) + F(x) every path from the input to y leads through x (x dominates y), and one of the two addends
comes from x through fewer weights than the other. A torch function mode sees the additions happen, and so
gives their tensors, their order, and the module that was running.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resode.analysis.depth.couplings import Coupling, couplings
from resode.analysis.depth.graph import ValueGraph
from resode.analysis.depth.stream_modules import stream_modules
from resode.analysis.depth.watching import Recorder, Sum, Value, value_of, watching
from resode.blocks import ODEBlock, ResidualStack
from resode.calls import ModuleCall, call, mapped, matching, tensors_in
from resode.jacobian.places import Place

_SOLVING = (ResidualStack, ODEBlock)
_READS = re.compile(  # the state as it is: the next layer, or a head
    r"Conv|[Aa]ddmm|Mm|[Bb]mm|Mv|Linear|View|Reshape|Transpose|Permute|Mean|Sum|Pool|Select|Slice|Clone|Cat"
    r"|^T$|queeze|Expand|Unbind|Index|ToCopy"
)


@dataclass(eq=False)
class Addition:
    """One residual addition y = S(x) + ηF(x), with its tensors and its place in autograd's graph.

    Args:
        name: the module in which it happens, numbered where there are several.
        module: the module's own name.
        kind: of the shortcut S: "identity", "parameter-free", "projection" or "gated".
        step_size: η ≥ 0, where F's output is multiplied by a number; else 1.
        factor: η with the sign that the graph's branch at at_field has in the sum.
        after: the operation on y that follows, such as an activation; "" where y is read as it is, or by the
            network's head, a final norm for one.
        number: which addition of the forward pass it is; of several (a coupling) the last.
        shortcuts: for each addition of the pass that makes it up, its number, and the number and operand of
            the addition in which its S(x) is an operand.
        x: the state that both branches start from; `shortcut` S(x), `increment` ηF(x), `y` their sum.
        at_x, at_shortcut, at_field, at_y: their places in the graph; at_field is that of F(x), or None where
            y is a sum of several branches, or a state of several parts.
        inactive: share of units at exactly 0 in each activation with a dead zone within F.
        branch: the module that computes F, of those that `module` calls; `module` itself where it does so.
    """

    name: str
    module: str
    kind: str
    step_size: float
    factor: float
    after: str
    number: int
    shortcuts: dict[int, tuple[int, int]]
    x: Tensor
    shortcut: Tensor
    increment: Tensor
    y: Tensor
    at_x: Place
    at_shortcut: Place
    at_field: Place | None
    at_y: Place
    inactive: list[float] = field(default_factory=list)
    branch: str = ""

    @property
    def keeps_shape(self) -> bool:
        """Whether y has x's shape."""
        return self.x.shape == self.y.shape


@dataclass(eq=False)
class Trace:
    """A forward pass: what came out, and the residual additions in their order.

    Args:
        output: of the model.
        inputs: the floating-point ones, with gradients.
        additions: the residual additions.
        refused: additions to a state that are no residual block of it: the module, and why.
        detached: modules that ran, with weights that want gradients and get none from the output.
        outside: modules with weight matrices or kernels that lie within no addition's branch or shortcut.
        numbers: of all additions of two tensors from each module's first call to the end of its last.
    """

    output: Any
    inputs: list[Tensor]
    additions: list[Addition]
    refused: list[tuple[str, str]] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    detached: list[str] = field(default_factory=list)
    numbers: dict[str, range] = field(default_factory=dict)


def trace(
    model: nn.Module, x: Any, blocks: str | Sequence[str] | None = None, *, streams: bool = False
) -> Trace:
    """Run the model once and find its residual additions.

    Args:
        model: in eval mode; it is not changed.
        x: a tensor, a tuple of positional arguments, or a mapping of keyword arguments (a mapping is passed
            as one argument where forward has no parameters of these names).
        blocks: patterns of module names (* and ? stand for anything): take these modules' M(x) as
            x + (M(x) − x) instead of tracing additions.
        streams: take modules that mix the streams of a state likewise, where no addition of theirs is found.

    Raises:
        ValueError: nothing in the output depends on a floating-point input or an embedding; `blocks` names
            no module, or one that changes the shape.
    """
    _refuse_adaptive(model)
    inputs: list[Tensor] = []
    given = _with_gradients(x, inputs)
    names = set(stream_modules(model)) if streams and blocks is None else matching(model, blocks)
    with watching(model, inputs, names) as recorder:
        output = call(model, given)
    if recorder.overwrote_saved():
        inputs.clear()
        given = _with_gradients(x, inputs)
        with watching(model, inputs, names, copies=True) as recorder:
            output = call(model, given)
    for tensor in tensors_in(output):
        recorder.keep(tensor)
    outputs = [value_of(t) for t in tensors_in(output) if t.grad_fn is not None]
    if not outputs:
        raise ValueError(
            "no part of the model's output depends on its input by autograd: give a floating-point input, or "
            "let the embedding's weights require gradients; and remove .detach() or torch.no_grad() from it."
        )
    found = _Finder(ValueGraph(outputs, recorder))
    if blocks is not None:
        return Trace(output, inputs, _named(found.module_blocks()))
    additions = _named(found.with_modules(found.additions()))
    return Trace(
        output, inputs, additions, found.refused(), found.outside(), found.detached(), recorder.numbers
    )


def _refuse_adaptive(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, _SOLVING):
            continue
        if module.tableau.adaptive and (isinstance(module, ResidualStack) or module.n_steps is None):
            instead = "n_steps=" if isinstance(module, ODEBlock) else "stack.solver = 'rk4'"
            raise ValueError(
                f"{module.solver} takes steps of its own in {name or 'the model'}, so its blocks are no "
                f"additions: choose fixed steps for the profile, with {instead}."
            )


def _with_gradients(x: Any, found: list[Tensor]) -> Any:
    """The same inputs; floating-point ones are copies that gradients come back to."""

    def copied(t: Tensor) -> Tensor:
        if t.is_complex():
            raise TypeError(f"complex states are not supported: got {t.dtype}. Use real and imaginary parts.")
        if not t.is_floating_point():
            return t
        with torch.inference_mode(False), torch.enable_grad():
            found.append(t.detach().clone().requires_grad_().clone())
        return found[-1]

    return mapped(x, copied)


class _Finder:
    """Tells the residual additions among all that a graph holds."""

    def __init__(self, graph: ValueGraph) -> None:
        self.graph = graph
        self.recorder: Recorder = graph.recorder
        self.inside: set[Value] = set()
        self.ends: set[Value] = set()

    def additions(self) -> list[Addition]:
        """Every residual addition, in the order of the forward pass."""
        coupled = couplings(self.graph)
        mixing = {v for c in coupled for v, _, _ in c.sums} | {c.meeting for c in coupled}
        found: dict[Value, Addition] = {}
        for value in self.graph.order:
            record = self.recorder.sums.get(value)
            if record is None or value in mixing or len(self.graph.before(value)) != 2:
                continue
            fork = self.graph.fork(value)
            addition = None if fork is None else self._addition(value, record, fork, found)
            if addition is None and fork is not None and (state := self._unfolded(fork, record)) is not None:
                addition = self._addition(value, record, state, found)
            if addition is None and (state := self._joined(value)) is not None:
                addition = self._addition(value, record, state, found)
            if addition is not None:
                found[value] = addition
        result = [*self._last_of_steps(found), *map(self._coupling, coupled)]
        forks = {(e.node, e.output_nr) for a in result for e in a.at_x.edges}
        for value, a in found.items():
            if a.after and self._is_of_head(a, value, forks):
                a.after = ""
        for a in result:
            starts, ends = ([(e.node, e.output_nr) for e in at.edges] for at in (a.at_x, a.at_y))
            self.inside |= self.graph.between(starts, ends)
            self.ends |= {*starts, *ends}
        return sorted(result, key=lambda a: a.number)

    def _unfolded(self, fork: Value, record: Sum) -> Value | None:
        """The state of the sum's shape that a fork is a view of, as of flattened features."""
        seen, start = self.recorder.values, fork
        while seen[fork].shape != record.result.shape:
            before = self.graph.before(fork)
            if len(before) != 1 or before[0] not in seen or self.graph.weight(fork):
                return None
            if seen[before[0]].numel() != seen[fork].numel():
                return None
            [fork] = before
        return None if fork == start else fork

    def _joined(self, value: Value) -> Value | None:
        """The addend that the other one is computed from, though nothing dominates the addition.

        So it is where F reads something else too, as a decoder's attention reads the encoder. The addend
        must lead nowhere but to the addition: a stream of a coupling leads to other streams too.
        """
        for short, long in itertools.permutations(self.graph.before(value)):
            seen = short in self.recorder.values
            if seen and self.graph.weights(short, long)[0] >= 1 and not self.graph.avoids(short, value):
                return short
        return None

    def _addition(
        self, value: Value, record: Sum, fork: Value, found: dict[Value, Addition]
    ) -> Addition | None:
        operands = self.graph.before(value)
        weights = [self.graph.weights(fork, v) for v in operands]
        side = 0 if weights[0] <= weights[1] else 1
        if side == 1 and record.sign != 1:
            return None  # F(x) − x is no residual step
        x, shortcut = self.recorder.values[fork], record.operands[side]
        merged = found.get(operands[side])
        if merged is not None and not self._is_sum_of(
            merged, operands[side], fork, weights[1 - side][0], record
        ):
            merged = None
        kind = merged.kind if merged else self._kind(value, record, fork, side, weights)
        if kind is None:
            return None
        if kind == "identity" and x.shape != shortcut.shape:
            kind = "parameter-free"
        elif kind == "parameter-free" and x.shape == shortcut.shape and torch.equal(x, shortcut):
            kind = "identity"  # a view, a copy, 0 + x
        sign = record.sign if side == 0 else 1.0
        increment, branch, eta = record.operands[1 - side], operands[1 - side], sign
        at_shortcut = self.graph.place([operands[side]], [shortcut])
        shortcuts = {record.number: (record.number, side)}
        if sign != 1:
            increment = sign * increment
        at_field = None
        if merged is not None:
            shortcut, eta, at_shortcut = merged.shortcut, 1.0, merged.at_shortcut
            shortcuts = {record.number: next(iter(merged.shortcuts.values()))}
            increment = record.result - shortcut
            found.pop(operands[side])
        else:
            branch, eta = self._unscaled(branch, eta)
            at_field = self.graph.place([branch], [increment])
        return Addition(
            name=record.module,
            module=record.module,
            kind=kind,
            step_size=abs(eta),
            factor=eta,
            after=self._after(value),
            number=record.number,
            shortcuts=shortcuts,
            x=shortcut if kind == "identity" else x,
            shortcut=shortcut,
            increment=increment,
            y=record.result,
            at_x=self.graph.place([fork], [x]),
            at_shortcut=at_shortcut,
            at_field=at_field,
            at_y=self.graph.place([value], [record.result]),
            inactive=self._inactive([fork], [value]),
            branch=self._branch(branch, record.module),
        )

    def _branch(self, value: Value, module: str) -> str:
        """The module with weights, called by another, that computed a value, or what it is scaled from."""
        while (name := self._called(self.recorder.where.get(value, module), module)) is None:
            before = self.graph.before(value)
            if len(before) != 1 or self.graph.weight(value):
                return module
            [value] = before
        return name

    def _called(self, where: str, module: str) -> str | None:
        """Of the modules that one calls, that which holds another, where it has weights; lists are none."""
        start = f"{module}." if module else ""
        parts = where.removeprefix(start).split(".")
        if where == module or not where.startswith(start):
            return None
        for n in range(1, len(parts) + 1):
            called = self.recorder.model.get_submodule(start + ".".join(parts[:n]))
            if not isinstance(called, nn.ModuleList | nn.ModuleDict):
                return start + ".".join(parts[:n]) if any(True for _ in called.parameters()) else None
        return None

    def _is_sum_of(self, merged: Addition, value: Value, fork: Value, fewest: int, record: Sum) -> bool:
        """Whether a branch is added to a sum of branches from the same x that nothing else reads."""
        same = merged.at_x.edges[0].node is fork[0] and merged.at_x.edges[0].output_nr == fork[1]
        within = self._solving(record.module)
        return same and fewest >= 1 - within and (within or len(self.graph.readers[value]) == 1)

    def _kind(
        self, value: Value, record: Sum, fork: Value, side: int, weights: list[tuple[int, int]]
    ) -> str | None:
        """The kind of the shortcut, or None where this is no residual addition."""
        short, long = weights[side], weights[1 - side]
        operand = self.graph.before(value)[side]
        if operand == fork and (long[1] >= 1 or self._solving(record.module)):
            return "identity"
        if self.graph.cut(fork, value):
            return None  # from one part of x to another: see couplings
        if short[1] == 0 and long[1] >= 1:
            return "parameter-free"
        shapes = self.recorder.values[fork].shape, record.operands[side].shape, record.result.shape
        if short[0] == 0 and long[0] >= 1 and len(set(shapes)) == 1 and self._gated(operand, fork):
            return "gated"
        if short == (1, 1) and long[0] >= 2 and len(shapes[0]) == len(shapes[2]):
            return "projection"
        return None

    def _gated(self, value: Value, x: Value) -> bool:
        """Whether a value is x times something, up to views."""
        gates = 0
        while value != x:
            sources = self.graph.before(value)
            if len(sources) == 2 and value[0].name().startswith("MulBackward"):
                gates += 1
                value = min(sources, key=lambda v: self.graph.weights(x, v) if v != x else (-1, -1))
            elif len(sources) == 1 and not self.graph.weight(value):
                [value] = sources
            else:
                return False
        return gates > 0

    def _after(self, value: Value) -> str:
        readers = self.graph.readers.get(value, [])
        if len(readers) != 1:
            return ""
        name = re.sub(r"Backward\d*$", "", readers[0][0].name())
        return "" if _READS.search(name) else name

    def _is_of_head(self, a: Addition, value: Value, forks: set[Value]) -> bool:
        """Whether what follows a sum stands outside of its module, and leads to no further block's state."""
        [reader] = self.graph.readers[value]
        where = self.recorder.where.get(reader, "")
        if f"{where}.".startswith(f"{a.module}." if a.module else ""):
            return False
        while reader not in forks:
            readers = self.graph.readers.get(reader, [])
            if len(readers) != 1 or self.graph.weight(readers[0]):
                return True
            [reader] = readers
        return False

    def _unscaled(self, value: Value, eta: float) -> tuple[Value, float]:
        """F's own place, before multiplications by numbers other than 0."""
        while self.recorder.scales.get(value, 0.0) != 0 and len(self.graph.before(value)) == 1:
            eta, [value] = eta * self.recorder.scales[value], self.graph.before(value)
        return value, eta

    def _inactive(self, starts: Sequence[Value], ends: Sequence[Value]) -> list[float]:
        """The shares of dead units between a state and an addition."""
        region = self.graph.between(starts, ends) - set(ends)
        return [self.recorder.inactive[v] for v in region if v in self.recorder.inactive]

    def _solving(self, module: str) -> bool:
        return isinstance(self.recorder.model.get_submodule(module), _SOLVING)

    def _last_of_steps(self, found: dict[Value, Addition]) -> list[Addition]:
        """Without the stages' states within a solver's step, which add to the same x as the step's end."""
        last: dict[Place, int] = {}
        for a in found.values():
            if self._solving(a.module):
                last[a.at_x] = max(last.get(a.at_x, -1), a.number)
        return [a for a in found.values() if not self._solving(a.module) or last[a.at_x] == a.number]

    def _coupling(self, c: Coupling) -> Addition:
        """An additive coupling, as a block of the whole state."""

        def tensors(values: list[Value]) -> list[Tensor]:
            sums = self.recorder.sums
            return [sums[v].result if v in sums else self.recorder.values[v] for v in values]

        before, after = tensors(c.before), tensors(c.after)
        at_x = self.graph.place(c.before, before, c.dim)
        at_y = self.graph.place(c.after, after, c.dim)
        _, last, _ = c.sums[-1]
        found = _whole(last.module, last.number, (at_x.join(before), at_x), (at_y.join(after), at_y))
        found.shortcuts = {r.number: (r.number, side) for _, r, side in c.sums}
        found.inactive = self._inactive(c.before, c.after)
        return found

    def refused(self) -> list[tuple[str, str]]:
        """Additions of a branch with weights to a state, outside all blocks, that are no blocks, and why."""
        found: dict[str, str] = {}
        for value, record in self.recorder.sums.items():
            fork = self.graph.fork(value) if value in self.graph.at else None
            if fork is None or value in self.inside or len(self.graph.before(value)) != 2:
                continue
            short, long = sorted(self.graph.weights(fork, v) for v in self.graph.before(value))
            if short[0] > 0 or long[0] < 1:
                continue
            why = "its branch reads more than the state that it is added to"
            if self.graph.cut(fork, value):
                why = "it adds to one part of a cut state what comes from others, and these never meet again"
            found.setdefault(record.module or "model", why)
        for value in self.graph.order:
            own = isinstance(value[0], torch.autograd.function.BackwardCFunction)
            if own and value not in self.inside:
                why = f"{type(value[0]).__name__} is a gradient of its own, which hides what is added"
                found.setdefault(self.recorder.where.get(value) or "model", why)
        return list(found.items())

    def outside(self) -> list[str]:
        """Modules that own weights of two or more dimensions, none of which lie within an addition."""
        used = self.graph.parameters(self.inside)
        ran = {self.recorder.where[v] for v in self.inside if v in self.recorder.where}
        names = []
        for name, module in self.recorder.model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
            if own and name not in ran and not any(id(p) in used for p in own):
                names.append(re.sub(r"\.parametrizations\..*", "", name) or "model")
        return list(dict.fromkeys(names))

    def detached(self) -> list[str]:
        """Modules that ran and own weights that want gradients, none of which the output depends on."""
        used = self.graph.parameters(self.graph.order)
        ran = {where for v, where in self.recorder.where.items() if v not in self.recorder.roots}
        return [
            name
            for name, module in self.recorder.model.named_modules()
            if name in ran
            and (own := [p for p in module.parameters(recurse=False) if p.requires_grad])
            and not any(id(p) in used for p in own)
        ]

    def with_modules(self, additions: list[Addition]) -> list[Addition]:
        """The additions, and modules that were asked for and have none of their own, in their order."""
        have = {a.module for a in additions}
        whole = [m for m in self.module_blocks(strict=False) if m.module not in have]
        if not whole:
            return additions
        for m in whole:
            starts, ends = ([(e.node, e.output_nr) for e in at.edges] for at in (m.at_x, m.at_y))
            self.inside |= self.graph.between(starts, ends)
        within = tuple(f"{m.module}." for m in whole)
        kept = [a for a in additions if not a.module.startswith(within)]
        last = {
            id(a): max(self.graph.at.get((e.node, e.output_nr), 0) for e in a.at_y.edges)
            for a in [*kept, *whole]
        }
        return sorted([*kept, *whole], key=lambda a: last[id(a)])

    def module_blocks(self, *, strict: bool = True) -> list[Addition]:
        """The modules that were asked for, as x + (M(x) − x); what is no block is refused, or passed over."""
        calls = [m for m in self.recorder.modules if strict or (m.keeps_shape and m.differentiable)]
        return [self._module_block(-1 - i, m) for i, m in enumerate(calls)]

    def _module_block(self, number: int, m: ModuleCall) -> Addition:
        m.check_shape()
        assert m.x is not None and m.y is not None
        if not m.differentiable:
            raise ValueError(f"block {m.name} has no differentiable input and output.")
        at_x, at_y = self.graph.place([m.at_x], [m.x]), self.graph.place([m.at_y], [m.y])
        found = _whole(m.name, number, (m.x, at_x), (m.y, at_y))
        found.inactive = self._inactive([m.at_x], [m.at_y]) if m.at_y in self.graph.at else []
        return found


def _whole(module: str, number: int, x: tuple[Tensor, Place], y: tuple[Tensor, Place]) -> Addition:
    """A map of the whole state as x + (y − x)."""
    return Addition(
        name=module,
        module=module,
        kind="identity",
        step_size=1.0,
        factor=1.0,
        after="",
        number=number,
        shortcuts={},
        x=x[0],
        shortcut=x[0],
        increment=y[0] - x[0],
        y=y[0],
        at_x=x[1],
        at_shortcut=x[1],
        at_field=None,
        at_y=y[1],
    )


def _named(found: list[Addition]) -> list[Addition]:
    """Names with a number where a module holds several additions."""
    count: dict[str, int] = {}
    for a in found:
        count[a.module] = count.get(a.module, 0) + 1
    seen: dict[str, int] = {}
    for a in found:
        i = seen[a.module] = seen.get(a.module, -1) + 1
        a.name = (a.module or "model") + (f"[{i}]" if count[a.module] > 1 else "")
    return found
