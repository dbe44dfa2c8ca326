r"""Which tensors a network adds to which: its residual additions, found without changing it.

A forward pass is watched twice over. Autograd's graph tells what depends on what: at a residual addition
y = S(x) + F(x) every path from the input to y leads through x (x dominates y), and one of the two addends
comes from x through fewer weights than the other. A torch function mode sees the additions happen, and so
gives their tensors, their order, and the module that was running.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from resode.blocks import ODEBlock, ResidualStack
from resode.tableaus import METHODS

_SOLVING = (ResidualStack, ODEBlock)
_ADD = {"add": 1, "__add__": 1, "__radd__": 1, "add_": 1, "__iadd__": 1}
_SUBTRACT = {"sub": -1, "__sub__": -1, "subtract": -1, "sub_": -1, "__isub__": -1}
_ADDITIONS = _ADD | _SUBTRACT
_IN_PLACE = ("add_", "__iadd__", "sub_", "__isub__")
_SCALINGS = ("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply")
_DIVISIONS = ("div", "__truediv__", "div_", "__itruediv__", "divide", "true_divide")
_DEAD_ZONE = re.compile(
    r"^_?(relu6?_?|threshold_?|hardtanh_?|hardswish_?|softshrink|hardshrink|clamp(_min)?_?)$"
)
_READS = re.compile(  # the state as it is: the next layer, or a head
    r"Conv|[Aa]ddmm|Mm|[Bb]mm|Mv|Linear|View|Reshape|Transpose|Permute|Mean|Sum|Pool|Select|Slice|Clone|Cat"
    r"|^T$|queeze|Expand|Unbind|Index|ToCopy"
)
_WEIGHTED = re.compile(r"Conv(?!ert)|[Aa]ddmm|Mm|[Bb]mm|Mv|Linear|ScaledDot|Rnn|Attention")


@dataclass(eq=False)
class Addition:
    """One residual addition y = S(x) + ηF(x), with its tensors and its place in autograd's graph.

    Args:
        name: the module in which it happens, numbered where there are several.
        module: the module's own name.
        kind: of the shortcut S: "identity", "parameter-free", "projection" or "gated".
        step_size: η ≥ 0, where F's output is multiplied by a number; else 1.
        factor: η with the sign that the graph's branch at at_field has in the sum.
        after: the operation on y that follows, such as an activation; "" where y is read as it is.
        number: which addition of the forward pass it is.
        leaf: (number, operand) of the addition in which S(x) is an operand.
        x: the state that both branches start from; `shortcut` S(x), `increment` ηF(x), `y` their sum.
        at_x, at_shortcut, at_field, at_y: their edges in the graph; at_field is that of F(x), or None where
            y is a sum of several branches.
        inactive: share of units at exactly 0 in each activation with a dead zone within F.
    """

    name: str
    module: str
    kind: str
    step_size: float
    factor: float
    after: str
    number: int
    leaf: tuple[int, int]
    x: Tensor
    shortcut: Tensor
    increment: Tensor
    y: Tensor
    at_x: GradientEdge
    at_shortcut: GradientEdge
    at_field: GradientEdge | None
    at_y: GradientEdge
    inactive: list[float] = field(default_factory=list)

    @property
    def keeps_shape(self) -> bool:
        """Whether y has x's shape."""
        return self.x.shape == self.y.shape


@dataclass(eq=False)
class Trace:
    """A forward pass: what came out, and the residual additions in their order."""

    output: Any
    inputs: list[Tensor]
    additions: list[Addition]


def trace(model: nn.Module, x: Any, blocks: str | Sequence[str] | None = None) -> Trace:
    """Run the model once and find its residual additions.

    Args:
        model: in eval mode; it is not changed.
        x: a tensor, a tuple of positional arguments, or a mapping of keyword arguments (a mapping is passed
            as one argument where forward has no parameters of these names).
        blocks: patterns of module names (* and ? stand for anything): take these modules' M(x) as
            x + (M(x) − x) instead of tracing additions.

    Raises:
        ValueError: nothing in the output depends on a floating-point input or an embedding; `blocks` names
            no module, or one that changes the shape.
    """
    _refuse_adaptive(model)
    inputs: list[Tensor] = []
    given = _with_gradients(x, inputs)
    with _watched(model, inputs, blocks) as recorder:
        output = call(model, given)
    outputs = [t for t in tensors_in(output) if t.grad_fn is not None]
    if not outputs:
        raise ValueError(
            "no part of the model's output depends on its input by autograd: give a floating-point input, or "
            "let the embedding's weights require gradients; and remove .detach() or torch.no_grad() from it."
        )
    graph = _Graph([t.grad_fn for t in outputs], recorder)
    found = _named(graph.module_blocks() if blocks is not None else graph.additions())
    return Trace(output, inputs, found)


def _refuse_adaptive(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, _SOLVING):
            continue
        if METHODS[module.solver].adaptive and (isinstance(module, ResidualStack) or module.n_steps is None):
            instead = "n_steps=" if isinstance(module, ODEBlock) else "stack.solver = 'rk4'"
            raise ValueError(
                f"{module.solver} takes steps of its own in {name or 'the model'}, so its blocks are no "
                f"additions: choose fixed steps for the profile, with {instead}."
            )


def call(model: nn.Module, x: Any) -> Any:
    """The model's output for a tensor, a tuple of arguments, or a mapping."""
    if isinstance(x, Mapping):
        parameters = inspect.signature(model.forward).parameters
        return model(**x) if any(name in parameters for name in x) else model(x)
    return model(*x) if isinstance(x, tuple | list) else model(x)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings (Hugging Face's outputs are mappings)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def _with_gradients(x: Any, found: list[Tensor]) -> Any:
    """The same inputs; floating-point ones are copies that gradients come back to."""
    if isinstance(x, Tensor):
        if x.is_complex():
            raise TypeError(f"complex states are not supported: got {x.dtype}. Use real and imaginary parts.")
        if not x.is_floating_point():
            return x
        with torch.inference_mode(False), torch.enable_grad():
            found.append(x.detach().clone().requires_grad_().clone())
        return found[-1]
    if isinstance(x, Mapping):
        return {name: _with_gradients(item, found) for name, item in x.items()}
    if isinstance(x, tuple | list):
        return tuple(_with_gradients(item, found) for item in x)
    return x


@contextmanager
def _watched(model: nn.Module, inputs: list[Tensor], blocks: Any) -> Iterator[_Recorder]:
    recorder = _Recorder(model)
    for tensor in inputs:
        recorder.keep(tensor)
        recorder.roots.append(tensor.grad_fn)
    hooks = recorder.attach(_matching(model, blocks))
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),  # the fused kernels have no second derivative
            recorder,
        ):
            yield recorder
    finally:
        for hook in hooks:
            hook.remove()


def _matching(model: nn.Module, blocks: str | Sequence[str] | None) -> set[str] | None:
    if blocks is None:
        return None
    patterns = [blocks] if isinstance(blocks, str) else list(blocks)
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for pattern in patterns:
        expression = re.escape(pattern).replace(r"\*", r"[^.]*").replace(r"\?", "[^.]")
        matching = {name for name in names if re.fullmatch(expression, name)}
        if not matching:
            shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
            raise ValueError(f"blocks={pattern!r} names no module of the model. Its modules: {shown}.")
        found |= matching
    return found


@dataclass(eq=False)
class _Call:
    """An addition as it happened."""

    number: int
    module: str
    sign: float
    operands: tuple[Tensor, Tensor]
    result: Tensor


@dataclass(eq=False)
class _ModuleCall:
    name: str
    x: Tensor
    y: Tensor
    at_x: GradientEdge
    at_y: GradientEdge


class _Recorder(TorchFunctionMode):
    """Watches a forward pass: additions, scalings, dead units, and which module is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.running: list[str] = [""]
        self.calls: dict[Any, _Call] = {}
        self.values: dict[Any, tuple[Tensor, int, int]] = {}  # value, its version, output number
        self.scales: dict[Any, float] = {}
        self.inactive: dict[Any, float] = {}
        self.roots: list[Any] = []
        self.modules: list[_ModuleCall] = []
        self.count = 0

    def attach(self, blocks: set[str] | None) -> list[Any]:
        hooks = []
        for name, module in self.model.named_modules():
            hooks.append(module.register_forward_pre_hook(self._entering(name)))
            hooks.append(module.register_forward_hook(self._leaving, always_call=True))
            if blocks is not None and name in blocks:
                hooks.append(module.register_forward_hook(self._block(name), with_kwargs=True))
        return hooks

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda module, args: self.running.append(name)

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()

    def _block(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = next(iter(tensors_in((args, kwargs))), None)
            y = next(iter(tensors_in(output)), None)
            if x is None or y is None or x.grad_fn is None or y.grad_fn is None:
                raise ValueError(f"block {name} has no differentiable input and output.")
            if x.shape != y.shape:
                raise ValueError(
                    f"a block of blocks= must keep the state's shape: {name} maps {tuple(x.shape)} to "
                    f"{tuple(y.shape)}. Leave it out of the pattern."
                )
            edges = GradientEdge(x.grad_fn, x.output_nr), GradientEdge(y.grad_fn, y.output_nr)
            self.modules.append(_ModuleCall(name, x.detach().clone(), y.detach().clone(), *edges))

        return hook

    def keep(self, tensor: Tensor) -> None:
        node = tensor.grad_fn
        if node is not None and node not in self.values:
            self.values[node] = tensor.detach(), tensor._version, tensor.output_nr

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "dim", "size", "requires_grad_"):
            return func(*args, **kwargs)
        operands = _two_tensors(name, args, kwargs)
        if operands is not None:
            return self._addition(name, func, args, kwargs, operands)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            self.keep(tensor)
            node = tensor.grad_fn
            if node is None:
                continue
            if name in _SCALINGS and (scale := _number(args)) is not None:
                self.scales[node] = scale
            elif name in _DIVISIONS and (divisor := _divisor(args, kwargs)):
                self.scales[node] = 1 / divisor
            elif _DEAD_ZONE.match(name):
                self.inactive[node] = float((tensor.detach() == 0).double().mean())
            elif name == "embedding":
                self.roots.append(node)
        return result

    def _addition(self, name: str, func: Any, args: Any, kwargs: Any, operands: tuple[Tensor, Tensor]) -> Any:
        number, self.count = self.count, self.count + 1
        a, b = (t.detach() for t in operands)
        if name in _IN_PLACE:
            a = a.clone()
        result = func(*args, **kwargs)
        node = result.grad_fn
        if node is not None and node.name().startswith(("AddBackward", "SubBackward")):
            sign = _ADDITIONS[name] * _alpha(kwargs)
            self.keep(result)
            copy = result.detach().clone()  # an activation in place may follow
            self.calls[node] = _Call(number, self.running[-1], sign, (a, b), copy)
        return result


def _two_tensors(name: str, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
    """The operands where this is an addition of two tensors of some size."""
    if name not in _ADDITIONS or not args:
        return None
    other = args[1] if len(args) > 1 else kwargs.get("other")
    if not isinstance(args[0], Tensor) or not isinstance(other, Tensor):
        return None
    return (args[0], other) if args[0].ndim and other.ndim else None


def _alpha(kwargs: Any) -> float:
    alpha = kwargs.get("alpha", 1)
    return float(alpha.detach() if isinstance(alpha, Tensor) else alpha)


def _number(args: Any) -> float | None:
    """The number that a tensor is multiplied by, where one operand is a number or has one entry."""
    for operand, other in ((args[0], args[-1]), (args[-1], args[0])):
        if isinstance(operand, int | float):
            return float(operand)
        if isinstance(operand, Tensor) and operand.numel() == 1 and operand.ndim <= 1:
            return float(operand.detach()) if isinstance(other, Tensor) and other.numel() > 1 else None
    return None


def _divisor(args: Any, kwargs: Any) -> float | None:
    """The number that a tensor is divided by, exactly: no rounding mode, and not a number over a tensor."""
    if len(args) != 2 or kwargs or not isinstance(args[0], Tensor) or args[0].numel() < 2:
        return None
    return _number((args[1], args[0]))


class ScaledBranches(TorchFunctionMode):
    """Runs a forward pass in which chosen additions give S(x) + c·ηF(x) instead of S(x) + ηF(x).

    Args:
        edits: (addition, c) pairs of additions found by `trace` in the same pass.
    """

    def __init__(self, edits: Sequence[tuple[Addition, float]]) -> None:
        super().__init__()
        self.leaves = {a.leaf[0]: (a.leaf[1], a.number) for a, _ in edits}
        self.factors = {a.number: c for a, c in edits}
        self.kept: dict[int, Tensor] = {}
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        operands = _two_tensors(name, args, kwargs)
        if operands is None:
            return func(*args, **kwargs)
        number, self.count = self.count, self.count + 1
        if number in self.leaves:
            operand, owner = self.leaves[number]
            self.kept[owner] = operands[operand].detach().clone()
        result = func(*args, **kwargs)
        if number not in self.factors:
            return result
        shortcut, c = self.kept.pop(number), self.factors[number]
        with torch.no_grad():
            edited = (
                shortcut.expand_as(result).clone() if c == 0 else torch.lerp(shortcut, result.detach(), c)
            )
        if name in _IN_PLACE:
            with torch.no_grad():
                result.copy_(edited)
            return result
        return edited.requires_grad_(result.requires_grad)


class _Graph:
    """The part of autograd's graph between the input and the output, with dominators."""

    def __init__(self, outputs: list[Any], recorder: _Recorder) -> None:
        self.recorder = recorder
        self.order = self._reaching(outputs)  # inputs first
        self.consumers: dict[Any, list[Any]] = {}
        for node in self.order:
            for other, _ in self._before(node):
                self.consumers.setdefault(other, []).append(node)
        self.place = {node: i for i, node in enumerate(self.order)}
        self.dominator = self._dominators()

    def _reaching(self, outputs: list[Any]) -> list[Any]:
        """The nodes that depend on an input, each after all it depends on."""
        roots = set(self.recorder.roots)
        self.data: dict[Any, bool] = {}
        order: list[Any] = []
        stack = [(node, False) for node in outputs]
        while stack:
            node, done = stack.pop()
            if node in self.data and not done:
                continue
            if done:
                self.data[node] = node in roots or any(
                    self.data.get(n, False) for n, _ in node.next_functions if n is not None
                )
                if self.data[node]:
                    order.append(node)
                continue
            self.data[node] = False
            stack.append((node, True))
            if node not in roots:
                stack += [(n, False) for n, _ in node.next_functions if n is not None and n not in self.data]
        return order

    def _before(self, node: Any) -> list[tuple[Any, int]]:
        if node in self.recorder.roots:
            return []
        return [(n, i) for n, i in node.next_functions if n is not None and self.data.get(n, False)]

    def _dominators(self) -> dict[Any, Any]:
        """The nearest node through which every path from an input leads; None stands before all inputs."""
        depth: dict[Any, int] = {None: 0}
        result: dict[Any, Any] = {}
        for node in self.order:
            common: Any = None
            for count, (other, _) in enumerate(self._before(node)):
                if count == 0:
                    common = other
                    continue
                while common is not other:
                    if depth[common] >= depth[other]:
                        common = result[common]
                    else:
                        other = result[other]
            result[node] = common
            depth[node] = depth[common] + 1
        return result

    def _weight(self, node: Any) -> int:
        name = node.name()
        if _WEIGHTED.search(name) or isinstance(node, torch.autograd.function.BackwardCFunction):
            return 1
        learned = any(n is not None and not self.data.get(n, False) for n, _ in node.next_functions)
        return int(learned and name.startswith("MulBackward") and node not in self.recorder.scales)

    def _weights(self, start: Any, end: Any) -> tuple[int, int]:
        """The fewest and the most weighted operations on a path from `start` to `end`; 0 without a path."""
        if end is start:
            return 0, 0
        first = self.place[start]
        found: dict[Any, tuple[int, int]] = {start: (0, 0)}
        region, todo = {end}, [end]
        while todo:
            for other, _ in self._before(todo.pop()):
                if other is not start and other not in region and self.place[other] > first:
                    region.add(other)
                    todo.append(other)
        for node in sorted(region, key=self.place.__getitem__):
            own = self._weight(node)
            before = [found[n] for n, _ in self._before(node) if n in found]
            if before:
                found[node] = (own + min(b[0] for b in before), own + max(b[1] for b in before))
        return found.get(end, (0, 0))

    def _fork(self, node: Any) -> Any:
        """The dominator whose value was seen."""
        fork = self.dominator[node]
        while fork is not None and fork not in self.recorder.values:
            fork = self.dominator[fork]
        return fork

    def additions(self) -> list[Addition]:
        """Every residual addition, in the order of the forward pass."""
        found: dict[Any, Addition] = {}
        for node in self.order:
            record = self.recorder.calls.get(node)
            if record is None or len(self._before(node)) != 2:
                continue
            fork = self._fork(node)
            addition = None if fork is None else self._addition(node, record, fork, found)
            if addition is None and (state := self._joined(node)) is not None:
                addition = self._addition(node, record, state, found)
            if addition is not None:
                found[node] = addition
        return sorted(self._last_of_steps(found), key=lambda a: a.number)

    def _joined(self, node: Any) -> Any:
        """The addend that the other one is computed from, though no node dominates the addition.

        So it is where F reads something else too, as a decoder's attention reads the encoder.
        """
        for short, long in itertools.permutations(n for n, _ in node.next_functions):
            if short in self.recorder.values and self._weights(short, long)[0] >= 1:
                return short
        return None

    def _addition(self, node: Any, record: _Call, fork: Any, found: dict[Any, Addition]) -> Addition | None:
        edges = [GradientEdge(n, i) for n, i in node.next_functions]
        weights = [self._weights(fork, edge.node) for edge in edges]
        side = 0 if weights[0] <= weights[1] else 1
        short, long = weights[side], weights[1 - side]
        x = self.recorder.values[fork][0]
        within_stack = isinstance(self._module(record.module), _SOLVING)
        merged = found.get(edges[side].node)
        if merged is not None and merged.at_x.node is fork and long[0] >= 1 - within_stack:
            kind = merged.kind
        elif edges[side].node is fork and (long[1] >= 1 or within_stack):
            kind, merged = "identity", None
        elif short[1] == 0 and long[1] >= 1:
            kind, merged = "parameter-free", None
        elif short[0] == 0 and long[0] >= 1:
            kind, merged = "gated", None
        elif short == (1, 1) and long[0] >= 2 and x.ndim == record.result.ndim:
            kind, merged = "projection", None
        else:
            return None
        shortcut = record.operands[side]
        if kind == "identity" and x.shape != shortcut.shape:
            kind = "parameter-free"
        elif kind == "parameter-free" and x.shape == shortcut.shape and torch.equal(x, shortcut):
            kind = "identity"  # a view, a copy, 0 + x
        if side == 1 and record.sign != 1:
            return None  # F(x) − x is no residual step
        sign = record.sign if side == 0 else 1.0
        increment, at_field, eta, leaf = record.operands[1 - side], edges[1 - side], sign, None
        if sign != 1:
            increment = sign * increment
        if merged is not None:
            shortcut, leaf, at_field, eta = merged.shortcut, merged.leaf, None, 1.0
            increment = record.result - shortcut
            found.pop(edges[side].node)
        elif at_field is not None:
            at_field, eta = self._unscaled(at_field, eta)
        follows = [re.sub(r"Backward\d*$", "", n.name()) for n in self.consumers.get(node, [])]
        return Addition(
            name=record.module,
            module=record.module,
            kind=kind,
            step_size=abs(eta),
            factor=eta,
            after=follows[0] if len(follows) == 1 and not _READS.search(follows[0]) else "",
            number=record.number,
            leaf=leaf or (record.number, side),
            x=shortcut if kind == "identity" else x,
            shortcut=shortcut,
            increment=increment,
            y=record.result,
            at_x=GradientEdge(fork, self.recorder.values[fork][2]),
            at_shortcut=merged.at_shortcut if merged else edges[side],
            at_field=at_field,
            at_y=GradientEdge(node, 0),
            inactive=self._inactive(fork, node),
        )

    def _unscaled(self, edge: GradientEdge, eta: float) -> tuple[GradientEdge, float]:
        """F's own edge, before multiplications by numbers other than 0."""
        while self.recorder.scales.get(edge.node, 0.0) != 0 and len(self._before(edge.node)) == 1:
            [before] = self._before(edge.node)
            eta, edge = eta * self.recorder.scales[edge.node], GradientEdge(*before)
        return edge, eta

    def _inactive(self, fork: Any, node: Any) -> list[float]:
        """The shares of dead units between the fork and the addition."""
        first, seen, todo = self.place[fork], set(), [node]
        while todo:
            for other, _ in self._before(todo.pop()):
                if other is not fork and other not in seen and self.place[other] > first:
                    seen.add(other)
                    todo.append(other)
        return [self.recorder.inactive[n] for n in seen if n in self.recorder.inactive]

    def _module(self, name: str) -> nn.Module:
        return self.recorder.model.get_submodule(name)

    def _last_of_steps(self, found: dict[Any, Addition]) -> list[Addition]:
        """Without the stages' states within a solver's step, which add to the same x as the step's end."""
        last: dict[Any, int] = {}
        for a in found.values():
            if isinstance(self._module(a.module), _SOLVING):
                last[a.at_x.node] = max(last.get(a.at_x.node, -1), a.number)
        return [
            a
            for a in found.values()
            if not isinstance(self._module(a.module), _SOLVING) or last[a.at_x.node] == a.number
        ]

    def module_blocks(self) -> list[Addition]:
        """The modules that were asked for, as x + (M(x) − x)."""
        return [
            Addition(
                name=m.name,
                module=m.name,
                kind="identity",
                step_size=1.0,
                factor=1.0,
                after="",
                number=-1 - i,
                leaf=(-1, 0),
                x=m.x,
                shortcut=m.x,
                increment=m.y - m.x,
                y=m.y,
                at_x=m.at_x,
                at_shortcut=m.at_x,
                at_field=None,
                at_y=m.at_y,
                inactive=self._inactive(m.at_x.node, m.at_y.node) if m.at_y.node in self.place else [],
            )
            for i, m in enumerate(self.recorder.modules)
        ]


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
