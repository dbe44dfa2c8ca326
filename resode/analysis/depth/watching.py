"""A forward pass as it happens: additions, scalings, dead units, and the module that is running."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Value = tuple[Any, int]
"""A tensor's place in autograd's graph: the node that made it, and which of the node's outputs it is."""

_ADD = {"add": 1, "__add__": 1, "__radd__": 1, "add_": 1, "__iadd__": 1}
_SUBTRACT = {"sub": -1, "__sub__": -1, "subtract": -1, "sub_": -1, "__isub__": -1}
_ADDITIONS = _ADD | _SUBTRACT
_IN_PLACE = re.compile(r"^(__i\w+__|[a-z]\w*[a-z0-9]_)$")
_SCALINGS = ("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply")
_DIVISIONS = ("div", "__truediv__", "div_", "__itruediv__", "divide", "true_divide")
_SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split")
_SILENT = ("__get__", "__set__", "dim", "size", "requires_grad_")
_DEAD_ZONE = re.compile(
    r"^_?(relu6?_?|threshold_?|hardtanh_?|hardswish_?|softshrink|hardshrink|clamp(_min)?_?)$"
)


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


def value_of(tensor: Tensor) -> Value:
    """Where a tensor lies in the graph; its node is None where it has no gradient."""
    return tensor.grad_fn, tensor.output_nr


class WatchesAdditions(TorchFunctionMode):
    """Shows every addition of two tensors, fused ones (lerp, addcmul, addmm, a stack's sum) as sums.

    Additions are numbered as they come, with and without gradients alike, so that the number names the same
    one in another pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.stacked: dict[int, tuple[Tensor, int, list[Tensor], int]] = {}  # with its version and dimension

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _SILENT:
            return func(*args, **kwargs)
        if name in self._UNFUSED and "out" not in kwargs:
            result = self._UNFUSED[name](self, name.endswith("_"), *args, **kwargs)
            if result is not None:
                return result
        if name in ("sum", "mean") and args and id(args[0]) in self.stacked:
            result = self._stack_sum(name, *args, **kwargs)
            if result is not None:
                return result
        operands = _two_tensors(name, args, kwargs)
        if operands is not None:
            number, self.count = self.count, self.count + 1
            return self.addition(number, name, func, args, kwargs, operands)
        result = self.other(name, func, args, kwargs)
        if name == "stack" and args and len(args[0]) > 1:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % result.ndim
            self.stacked[id(result)] = result, result._version, list(args[0]), dim
        return result

    def addition(self, number: int, name: str, func: Any, args: Any, kwargs: Any, operands: Any) -> Any:
        """An addition of two tensors; returns its result."""
        raise NotImplementedError

    def other(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Any other operation; returns its result."""
        return func(*args, **kwargs)

    def _do(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__torch_function__(func, (), args, kwargs)

    def _add(self, in_place: bool, a: Tensor, b: Tensor, alpha: Any = 1) -> Tensor:
        return self._do(Tensor.add_ if in_place else torch.add, a, b, alpha=alpha)

    def _lerp(self, in_place: bool, input: Tensor, end: Tensor, weight: Any) -> Any:
        return self._add(in_place, input, self._do(torch.mul, self._do(torch.sub, end, input), weight))

    def _addcmul(self, in_place: bool, input: Tensor, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
        return self._add(in_place, input, self._do(torch.mul, tensor1, tensor2), value)

    def _addcdiv(self, in_place: bool, input: Tensor, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
        return self._add(in_place, input, self._do(torch.div, tensor1, tensor2), value)

    def _addmm(self, in_place: bool, input: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1):
        if beta == 0 or input.ndim < a.ndim:  # a bias, or nothing at all
            return None
        if beta != 1:
            input = self._do(Tensor.mul_ if in_place else torch.mul, input, beta)
        return self._add(in_place, input, self._do(torch.matmul, a, b), alpha)

    def _stack_sum(self, name: str, stack: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any):
        kept, version, parts, along = self.stacked[id(stack)]
        if isinstance(dim, tuple | list) and len(dim) == 1:
            [dim] = dim
        if not isinstance(dim, int) or kwargs or dim % kept.ndim != along or kept._version != version:
            return None
        total = parts[0]
        for part in parts[1:]:
            total = self._add(False, total, part)
        if name == "mean":
            total = self._do(torch.div, total, len(parts))
        return self._do(torch.unsqueeze, total, along) if keepdim else total

    _UNFUSED: ClassVar[dict[str, Any]] = {
        name + end: function
        for name, function in {"lerp": _lerp, "addcmul": _addcmul, "addcdiv": _addcdiv, "addmm": _addmm,
                               "baddbmm": _addmm}.items()
        for end in ("", "_")
    }  # fmt: skip


@dataclass(eq=False)
class Sum:
    """An addition as it happened: the module's call that it is in, and the operands' places."""

    number: int
    module: str
    call: int
    sign: float
    operands: tuple[Tensor, Tensor]
    result: Tensor


@dataclass(eq=False)
class ModuleCall:
    """What went into a module and what came out, with their places."""

    name: str
    x: Tensor
    y: Tensor
    at_x: Value
    at_y: Value


class Recorder(WatchesAdditions):
    """Keeps what a forward pass did.

    Args:
        model: whose module calls are followed.

    Attributes:
        sums: additions of two tensors, by the place of their result.
        sources: what a view that was added to in place has its entries from.
        values: the tensors that were seen; `where`, the module that was running; `layouts`, their shape,
            strides and offset.
        scales: results of a multiplication by a number, with the number.
        inactive: results of an activation with a dead zone, with the share of units at exactly 0.
        roots: where gradients end: the inputs, and embeddings.
        modules: calls of the modules that were asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.running: list[tuple[str, int]] = [("", 0)]
        self.calls = 0
        self.sums: dict[Value, Sum] = {}
        self.sources: dict[Value, list[Value]] = {}
        self.values: dict[Value, Tensor] = {}
        self.where: dict[Value, str] = {}
        self.layouts: dict[Value, tuple[torch.Size, tuple[int, ...], int]] = {}
        self.scales: dict[Value, float] = {}
        self.inactive: dict[Value, float] = {}
        self.roots: set[Value] = set()
        self.modules: list[ModuleCall] = []
        self.views: dict[Any, Tensor] = {}
        self.saved: list[tuple[Tensor, int]] = []

    def attach(self, blocks: set[str] | None) -> list[Any]:
        """Follow the model's modules; returns the hooks, to be removed."""
        hooks = []
        for name, module in self.model.named_modules():
            hooks.append(module.register_forward_pre_hook(self._entering(name)))
            hooks.append(module.register_forward_hook(self._leaving, always_call=True))
            if blocks is not None and name in blocks:
                hooks.append(module.register_forward_hook(self._block(name), with_kwargs=True))
        return hooks

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.calls += 1
            self.running.append((name, self.calls))

        return hook

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
            copies = x.detach().clone(), y.detach().clone()
            self.modules.append(ModuleCall(name, *copies, value_of(x), value_of(y)))

        return hook

    def saving(self, tensor: Tensor) -> Tensor:
        """What gradients will need, and its version."""
        self.saved.append((tensor, tensor._version))
        return tensor

    def overwrote_saved(self) -> bool:
        """Whether something that gradients need was overwritten; the list ends here."""
        found = any(tensor._version != version for tensor, version in self.saved)
        self.saved.clear()
        return found

    def start(self, tensor: Tensor) -> None:
        """An input, from which gradients are wanted."""
        self.roots.add(value_of(tensor))
        self.keep(tensor)

    def keep(self, tensor: Tensor) -> None:
        """Remember a tensor and where it was first seen."""
        place = value_of(tensor)
        if place[0] is not None and place not in self.values:
            self.values[place] = tensor.detach()
            self.where[place] = self.running[-1][0]
            self.layouts[place] = tensor.shape, tensor.stride(), tensor.storage_offset()

    def other(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Any operation but an addition."""
        self._before(name, args, kwargs)
        result = self._one_of_each(name, args, func(*args, **kwargs))
        for tensor in tensors_in(result):
            self.keep(tensor)
            place = value_of(tensor)
            if place[0] is None:
                continue
            if name in _SCALINGS and (scale := _number(args)) is not None:
                self.scales[place] = scale
            elif name in _DIVISIONS and (divisor := _divisor(args, kwargs)):
                self.scales[place] = 1 / divisor
            elif _DEAD_ZONE.match(name):
                self.inactive[place] = float((tensor.detach() == 0).double().mean())
            elif name == "embedding":
                self.roots.add(place)
        return result

    def _before(self, name: str, args: Any, kwargs: Any) -> None:
        """Operands that no function returned (after x[i] = …), and copies of what is overwritten."""
        for tensor in tensors_in(args):
            self.keep(tensor)
        if (_IN_PLACE.match(name) or kwargs.get("inplace")) and isinstance(args[0], Tensor):
            place = value_of(args[0])
            if place in self.values:
                self.values[place] = args[0].detach().clone()

    def _one_of_each(self, name: str, args: Any, result: Any) -> Any:
        """The result, where a view of the same entries was taken before that one: one value, one place.

        Parts of chunk and split are slices, each a node of its own, which may be added to in place.
        """
        if name in _SPLITS and isinstance(result, tuple | list) and len(result) > 1 and _is_view(result[0]):
            result = _slices(args[0], result)
        if isinstance(result, Tensor):
            return self._first_view(result)
        if type(result) in (tuple, list):
            return type(result)(self._first_view(t) if isinstance(t, Tensor) else t for t in result)
        return result

    def _first_view(self, view: Tensor) -> Tensor:
        if not _is_view(view):
            return view
        source = view.grad_fn.next_functions  # type: ignore[union-attr]
        key = source, view.shape, view.stride(), view.storage_offset(), view.dtype
        found = self.views.setdefault(key, view)
        return view if found.grad_fn is None or found.grad_fn.next_functions != source else found

    def addition(self, number: int, name: str, func: Any, args: Any, kwargs: Any, operands: Any) -> Any:
        """Keep the operands, their places and the result."""
        self._before(name, args, kwargs)
        a, b = (t.detach() for t in operands)
        if _IN_PLACE.match(name):
            a = a.clone()
            if _is_view(args[0]):
                total, result = self._into_view(name, args, kwargs)
            else:
                total = result = func(*args, **kwargs)
        else:
            total = result = func(*args, **kwargs)
        place = value_of(total)
        if place[0] is not None:
            self.keep(total)
            sign = _ADDITIONS[name] * _alpha(kwargs)
            module, call = self.running[-1]
            copy = total.detach().clone()  # an activation in place may follow
            self.sums[place] = Sum(number, module, call, sign, (a, b), copy)
        return result

    def _into_view(self, name: str, args: Any, kwargs: Any) -> tuple[Tensor, Any]:
        """An addition in place to a view: a sum of its own, which is then copied into the view.

        Autograd would hide it in the graph of the tensor that is viewed. The copy goes to a second view of
        the same entries: torch fails where the first one's own node is wanted in a backward pass.
        """
        view = args[0]
        total = torch.add(view, args[1] if len(args) > 1 else kwargs["other"],
                          alpha=_ADDITIONS[name] * kwargs.get("alpha", 1)).to(view.dtype)  # fmt: skip
        view.view_as(view).copy_(total)
        self.sources[value_of(view)] = [value_of(total)]
        self.keep(view)
        return total, total if name.startswith("__") else view


def _is_view(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.grad_fn is not None and tensor._is_view()


def _slices(whole: Tensor, parts: Sequence[Tensor]) -> Any:
    """The parts of a split as slices."""
    sizes = zip(whole.shape, *(p.shape for p in parts), strict=True)
    cut = [d for d, (n, *own) in enumerate(sizes) if sum(own) == n and max(own) < n]
    if len(cut) != 1:
        return parts
    found, start = [], 0
    for p in parts:
        found.append(whole.narrow(cut[0], start, p.shape[cut[0]]))
        start += p.shape[cut[0]]
    return type(parts)(found)


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


class ScaledBranches(WatchesAdditions):
    """Runs a forward pass in which chosen additions give S(x) + c·ηF(x) instead of S(x) + ηF(x).

    Args:
        factors: c, by the number of the addition.
        shortcuts: by the number of the addition in which S(x) is an operand: which operand, and the number
            of the addition that it is S(x) of.
    """

    def __init__(self, factors: Mapping[int, float], shortcuts: Mapping[int, tuple[int, int]]) -> None:
        super().__init__()
        self.factors, self.shortcuts = factors, shortcuts
        self.kept: dict[int, Tensor] = {}

    def addition(self, number: int, name: str, func: Any, args: Any, kwargs: Any, operands: Any) -> Any:
        """The addition, with its branch scaled where that is asked for."""
        if number in self.shortcuts:
            operand, owner = self.shortcuts[number]
            self.kept[owner] = operands[operand].detach().clone()
        result = func(*args, **kwargs)
        if number not in self.factors:
            return result
        shortcut, c = self.kept.pop(number), self.factors[number]
        with torch.no_grad():
            edited = (
                shortcut.expand_as(result).clone() if c == 0 else torch.lerp(shortcut, result.detach(), c)
            )
        if _IN_PLACE.match(name):
            with torch.no_grad():
                result.copy_(edited)
            return result
        return edited.requires_grad_(result.requires_grad)


@contextmanager
def watching(
    model: nn.Module, inputs: Sequence[Tensor], blocks: set[str] | None, *, copies: bool = False
) -> Iterator[Recorder]:
    """Watch what the model does within it; `copies` keeps what gradients need from being overwritten."""
    recorder = Recorder(model)
    saving = saved_tensors_hooks(torch.clone if copies else recorder.saving, lambda t: t)
    for tensor in inputs:
        recorder.start(tensor)
    hooks = recorder.attach(blocks)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),  # the fused kernels have no second derivative
            saving,
            recorder,
        ):
            yield recorder
    finally:
        for hook in hooks:
            hook.remove()
