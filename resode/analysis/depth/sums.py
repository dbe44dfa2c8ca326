"""Additions of two tensors as they happen, fused ones as the sums that they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ADD = {"add": 1, "__add__": 1, "__radd__": 1, "add_": 1, "__iadd__": 1}
_SUBTRACT = {"sub": -1, "__sub__": -1, "subtract": -1, "sub_": -1, "__isub__": -1}
_ADDITIONS = _ADD | _SUBTRACT
IN_PLACE = re.compile(r"^(__i\w+__|[a-z]\w*[a-z0-9]_)$")
_SILENT = ("__get__", "__set__", "dim", "size", "requires_grad_")


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
        return func(*args, **kwargs)

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

    def _addmm(
        self, in_place: bool, input: Tensor, *matrices: Tensor, beta: Any = 1, alpha: Any = 1, **named: Tensor
    ) -> Any:
        a, b = (*matrices, *named.values())
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


def _two_tensors(name: str, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
    """The operands where this is an addition of two tensors of some size."""
    if name not in _ADDITIONS or not args:
        return None
    other = args[1] if len(args) > 1 else kwargs.get("other")
    if not isinstance(args[0], Tensor) or not isinstance(other, Tensor):
        return None
    return (args[0], other) if args[0].ndim and other.ndim else None


def signed_alpha(name: str, kwargs: Any) -> float:
    """What the second operand is multiplied by in an addition or subtraction."""
    alpha = kwargs.get("alpha", 1)
    return _ADDITIONS[name] * float(alpha.detach() if isinstance(alpha, Tensor) else alpha)


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
            self.kept[owner] = operands[operand].clone()
        result = func(*args, **kwargs)
        if number not in self.factors:
            return result
        shortcut, c = self.kept.pop(number).expand_as(result), self.factors[number]
        in_place = IN_PLACE.match(name)
        whole = result.clone() if in_place else result
        edited = shortcut.clone() if c == 0 else torch.lerp(shortcut, whole, c)
        return result.copy_(edited) if in_place else edited
