"""A forward pass as it happens: additions, scalings, dead units, and the module that is running."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from resode.analysis.depth.sums import IN_PLACE, WatchesAdditions, signed_alpha
from resode.calls import ModuleCall, hooked, recorded, tensors_in

Value = tuple[Any, int]
"""A tensor's place in autograd's graph: the node that made it, and which of the node's outputs it is."""

_SCALINGS = ("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply")
_DIVISIONS = ("div", "__truediv__", "div_", "__itruediv__", "divide", "true_divide")
_SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split")
_DEAD_ZONE = re.compile(
    r"^_?(relu6?_?|threshold_?|hardtanh_?|hardswish_?|softshrink|hardshrink|clamp(_min)?_?)$"
)


def value_of(tensor: Tensor) -> Value:
    """Where a tensor lies in the graph; its node is None where it has no gradient."""
    return tensor.grad_fn, tensor.output_nr


@dataclass(eq=False)
class Sum:
    """An addition as it happened: the module's call that it is in, and the operands' places."""

    number: int
    module: str
    call: int
    sign: float
    operands: tuple[Tensor, Tensor]
    result: Tensor


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
        numbers: of the additions of two tensors from each module's first call to the end of its last.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.running: list[tuple[str, int]] = [("", 0)]
        self.calls = 0
        self.numbers: dict[str, range] = {}
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

    def enter(self, name: str, *called: Any) -> None:
        """A module is called."""
        self.calls += 1
        self.running.append((name, self.calls))
        self.numbers.setdefault(name, range(self.count, self.count))

    def leave(self, name: str, *called: Any) -> None:
        """It is done."""
        self.running.pop()
        self.numbers[name] = range(self.numbers[name].start, self.count)

    def overwrote_saved(self) -> bool:
        """Whether something that gradients need was overwritten; the list ends here."""
        found = any(tensor._version != version for tensor, version in self.saved)
        self.saved.clear()
        return found

    def start(self, tensor: Tensor) -> None:
        """An input, from which gradients are wanted."""
        self.roots.add(value_of(tensor))
        self.keep(tensor)

    def keep(self, tensor: Tensor, where: str | None = None) -> None:
        """Remember a tensor and where it was first seen: in the module that is running, or in another."""
        place = value_of(tensor)
        if place[0] is not None and place not in self.values:
            self.values[place] = tensor.detach()
            self.where[place] = self.running[-1][0] if where is None else where
            self.layouts[place] = tensor.shape, tensor.stride(), int(tensor.storage_offset())

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
        around = self.running[-1][0].rpartition(".")[0]
        for tensor in tensors_in(args):
            self.keep(tensor, around)
        if (IN_PLACE.match(name) or kwargs.get("inplace")) and isinstance(args[0], Tensor):
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
        if type(result) is tuple or type(result) is list:
            views = [self._first_view(t) if isinstance(t, Tensor) else t for t in result]
            return views if type(result) is list else tuple(views)
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
        if IN_PLACE.match(name):
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
            sign = signed_alpha(name, kwargs)
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
                          alpha=signed_alpha(name, kwargs)).to(view.dtype)  # fmt: skip
        view.view_as(view).copy_(total)
        self.sources[value_of(view)] = [value_of(total)]
        self.keep(view)
        return total, total if name.startswith("__") else view


def _is_view(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.grad_fn is not None and tensor._is_view()


def _slices(whole: Tensor, parts: Any) -> Any:
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


def _noting(saved: list[tuple[Tensor, int]]) -> Callable[[Tensor], Tensor]:
    """Notes what gradients will need, and its version.

    The graph keeps this function and what it returns, and the recorder keeps the graph: so neither may hold
    the recorder or a grad_fn, or nothing would ever be freed. Autograd joins what it gets to the graph again.
    """

    def note(tensor: Tensor) -> Tensor:
        saved.append((tensor, tensor._version))
        return tensor.detach()

    return note


@contextmanager
def watching(
    model: nn.Module,
    inputs: Sequence[Tensor],
    blocks: set[str] | None,
    *,
    copies: bool = False,
) -> Iterator[Recorder]:
    """Watch what the model does within it; `copies` keeps what gradients need from being overwritten."""
    recorder = Recorder(model)
    saving = saved_tensors_hooks(
        (lambda t: t.detach().clone()) if copies else _noting(recorder.saved), lambda t: t
    )
    for tensor in inputs:
        recorder.start(tensor)
    modules = dict(model.named_modules())
    with (
        hooked(modules, recorder.enter, recorder.leave, always=True),
        recorded({name: modules[name] for name in blocks or ()}, copies=True) as recorder.modules,
        torch.inference_mode(False),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),  # the fused kernels have no second derivative
        saving,
        recorder,
    ):
        yield recorder
