"""A field as formulas of one row of its state.

Where F(t, x)[i] depends on x[i] alone, as with samples that share nothing, F is a list of formulas of the
entries of one row. They are read off the graph of the field's operations, in which the batch has one axis
that every operation must leave alone; an operation that mixes rows, or is not known here, is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

LARGEST = 1_000
"""More operations a row take long to compile, and gain little over torch's own kernels."""

aten = torch.ops.aten


class NotByRows(Exception):
    """Why a field can't be written as formulas of one row."""


class Formulas:
    """Operations on numbers, each kept once: a number is an index into `nodes`, (operation, arguments…).

    The leaves are ("number", value), ("t",), ("x", i), ("shared", input, offset) for an entry of a tensor
    that all rows share, and ("own", input, offset, stride) for one of each row's own, at
    offset + stride · row.
    """

    def __init__(self, largest: int = LARGEST) -> None:
        self.largest = largest
        self.nodes: list[tuple[Any, ...]] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def add(self, *node: Any) -> int:
        """The number of an operation."""
        if node not in self._known:
            if len(self.nodes) >= self.largest:
                raise NotByRows(f"it takes more than {self.largest} operations a row")
            self._known[node] = len(self.nodes)
            self.nodes.append(node)
        return self._known[node]

    def number(self, value: float) -> int:
        """A constant."""
        return self.add("number", float(value))

    def value_of(self, i: int) -> float | None:
        """The constant that i is, if it is one."""
        return self.nodes[i][1] if self.nodes[i][0] == "number" else None

    def plus(self, a: int, b: int) -> int:
        """The sum, where 0 adds nothing."""
        if self.value_of(a) == 0:
            return b
        return a if self.value_of(b) == 0 else self.add("add", a, b)

    def times(self, a: int, b: int) -> int:
        """The product, where 1 changes nothing and 0, as the factor of an adjoint, is 0."""
        for one, other in ((a, b), (b, a)):
            if self.value_of(one) == 1:
                return other
            if self.value_of(one) == 0:
                return one
        return self.add("mul", a, b)


@dataclass
class Value:
    """A tensor of the graph: its numbers in one row, with length 1 along the axis of the rows."""

    numbers: np.ndarray  # of Formulas, or offsets into the input `source`
    axis: int | None = None  # of the rows, counted from the end (−1 the last); None for none
    source: int | None = None

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return self.numbers.ndim

    def dim(self, d: int) -> int:
        """Dimension d counted from the front; the rows' own may not be asked for."""
        d = d % max(self.ndim, 1)
        if self.axis is not None and d == self.ndim + self.axis:
            raise NotByRows("it mixes samples, or picks one")
        return d


UNARY = {
    name: getattr(aten, name).default
    for name in (
        "neg", "sin", "cos", "tan", "exp", "log", "sqrt", "tanh", "sigmoid", "abs", "sign", "atan", "asin",
        "acos", "sinh", "cosh", "erf", "expm1", "log1p", "reciprocal", "rsqrt",
    )
}  # fmt: skip
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
TRUTHS = {*COMPARISONS, "and", "or", "not"}
"""Operations whose result is true or false."""


@dataclass
class Reader:
    """Reads an aten graph into formulas.

    Args:
        rows: how many rows there are, at least 2; None where the whole state is one row.
        dtype: the state's.
    """

    rows: int | None
    dtype: torch.dtype
    formulas: Formulas = field(default_factory=Formulas)

    def result(self, graph: fx.GraphModule, inputs: dict[str, Value]) -> Value:
        """What the graph gives, with its placeholders' values by name."""
        values: dict[fx.Node, Any] = {}
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = inputs[node.name]
            elif node.op == "get_attr":
                values[node] = self._constant(getattr(graph, str(node.target)))
            elif node.op == "output":
                (out,) = map_arg(node.args[0], values.__getitem__)
                return out
            else:
                args = map_arg(node.args, values.__getitem__)
                kwargs = map_arg(node.kwargs, values.__getitem__)
                values[node] = self._call(node, args, dict(kwargs))
        raise NotByRows("it gives nothing")

    def _constant(self, tensor: Tensor) -> Any:
        if not tensor.dtype.is_floating_point:
            return tensor.numpy(force=True)
        if tensor.numel() > LARGEST:
            raise NotByRows("it holds a large constant")
        numbers = [self.formulas.number(v) for v in tensor.detach().double().reshape(-1).tolist()]
        return Value(np.array(numbers, np.int64).reshape(tuple(tensor.shape)))

    def _call(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        if target is operator.getitem:
            return args[0][args[1]]
        if not isinstance(target, torch._ops.OpOverload) and all(isinstance(a, int) for a in args):
            return target(*args)  # lengths
        name = target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else str(target)
        found = node.meta.get("val")
        indices = bool(args) and isinstance(args[0], np.ndarray)
        if isinstance(found, Tensor) and found.dtype not in (self.dtype, torch.bool) and not indices:
            raise NotByRows(f"{name} has dtype {found.dtype}, the state {self.dtype}")
        if name in UNARY:
            return self._elementwise(name, *args)
        method = getattr(self, f"_op_{name}", None)
        if method is None:
            raise NotByRows(f"{name} is not known by rows")
        try:
            return method(*args, **kwargs)
        except (TypeError, ValueError, IndexError) as error:
            raise NotByRows(f"{name} is not known by rows with these arguments ({error})") from error

    # Numbers

    def _value(self, x: Any) -> Value:
        if isinstance(x, Value):
            return x
        if isinstance(x, (bool, int, float)):
            return Value(np.array(self.formulas.number(x), np.int64))
        raise NotByRows(f"{type(x).__name__} is no number")

    def _loaded(self, value: Value, axis: int | None) -> np.ndarray:
        """A value's numbers, with length 1 along `axis`, in which they may differ from row to row."""
        numbers, source = value.numbers, value.source
        at = None if axis is None or value.axis is not None or -axis > value.ndim else value.ndim + axis
        if at is not None and numbers.shape[at] == self.rows:
            first = numbers.take([0], at)
            if (numbers != first).any():
                raise NotByRows("it tells samples apart by their place in the batch")
            numbers = first
        return numbers if source is None else self._leaves("shared", source, numbers)

    def own(self, source: int, shape: Sequence[int], d: int) -> Value:
        """The input `source`, of which each row has its own part along dimension d."""
        offsets = np.arange(math.prod(shape), dtype=np.int64).reshape(tuple(shape)).take([0], d)
        return Value(self._leaves("own", source, offsets, math.prod(shape[d + 1 :])), d - len(shape))

    def _leaves(self, kind: str, source: int, offsets: np.ndarray, *stride: int) -> np.ndarray:
        if offsets.size > LARGEST:
            raise NotByRows(f"it uses more than {LARGEST} weights")
        loads = [self.formulas.add(kind, source, o, *stride) for o in offsets.reshape(-1).tolist()]
        return np.array(loads, np.int64).reshape(offsets.shape)

    def _elementwise(self, op: str | Callable[..., int], *given: Any) -> Value:
        values = [self._value(x) for x in given]
        axes = {v.axis for v in values if v.axis is not None}
        if len(axes) > 1:
            raise NotByRows("it mixes samples")
        axis = axes.pop() if axes else None
        arrays = [self._loaded(v, axis) for v in values]
        make = op if callable(op) else lambda *a: self.formulas.add(op, *map(self._as_number, a))
        wide = np.broadcast_arrays(*arrays)
        numbers = [make(*map(int, entry)) for entry in zip(*(a.reshape(-1) for a in wide), strict=True)]
        return Value(np.array(numbers, np.int64).reshape(wide[0].shape), axis)

    def _as_number(self, i: int) -> int:
        return self.formulas.add("as_number", i) if self.formulas.nodes[i][0] in TRUTHS else i

    def _op_add(self, a: Any, b: Any, alpha: float = 1) -> Value:
        return self._elementwise("add", a, b if alpha == 1 else self._elementwise("mul", b, alpha))

    def _op_sub(self, a: Any, b: Any, alpha: float = 1) -> Value:
        return self._elementwise("sub", a, b if alpha == 1 else self._elementwise("mul", b, alpha))

    def _op_rsub(self, a: Any, b: Any, alpha: float = 1) -> Value:
        return self._op_sub(b, a, alpha)

    def _op_mul(self, a: Any, b: Any) -> Value:
        return self._elementwise("mul", a, b)

    def _op_div(self, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
        if rounding_mode is not None:
            raise NotByRows("div with rounding is not known by rows")
        return self._elementwise("div", a, b)

    def _op_addcmul(self, x: Any, a: Any, b: Any, value: float = 1) -> Value:
        return self._op_add(x, self._op_mul(a, b), value)

    def _op_pow(self, base: Any, exponent: Any) -> Value:
        if not isinstance(exponent, (int, float)):
            return self._elementwise("pow", base, exponent)
        simple = {0.5: "sqrt", -1: "reciprocal", -0.5: "rsqrt"}.get(exponent)
        if simple:
            return self._elementwise(simple, base)
        if exponent in (1, 2, 3, 4):
            power = base
            for _ in range(int(exponent) - 1):
                power = self._elementwise("mul", power, base)
            return power
        return self._elementwise("pow", base, float(exponent))

    def _op_relu(self, x: Any) -> Value:
        return self._op_where(self._elementwise("le", x, 0.0), 0.0, x)

    def _op_maximum(self, a: Any, b: Any) -> Value:
        return self._elementwise("maximum", a, b)

    def _op_minimum(self, a: Any, b: Any) -> Value:
        return self._elementwise("minimum", a, b)

    def _op_clamp(self, x: Any, min: Any = None, max: Any = None) -> Value:
        if max is not None:
            x = self._op_where(self._elementwise("gt", x, max), max, x)
        return x if min is None else self._op_where(self._elementwise("lt", x, min), min, x)

    def _op_clamp_min(self, x: Any, min: Any) -> Value:
        return self._op_clamp(x, min)

    def _op_clamp_max(self, x: Any, max: Any) -> Value:
        return self._op_clamp(x, None, max)

    def _op_where(self, truth: Any, a: Any, b: Any) -> Value:
        def make(c: int, x: int, y: int) -> int:
            return self.formulas.add("where", self._as_truth(c), self._as_number(x), self._as_number(y))

        return self._elementwise(make, truth, a, b)

    def _as_truth(self, i: int) -> int:
        if self.formulas.nodes[i][0] not in TRUTHS:
            raise NotByRows("it takes numbers for truths")
        return i

    def _op_logical_and(self, a: Any, b: Any) -> Value:
        return self._truths("and", a, b)

    def _op_logical_or(self, a: Any, b: Any) -> Value:
        return self._truths("or", a, b)

    def _op_logical_not(self, a: Any) -> Value:
        return self._truths("not", a)

    _op_bitwise_and, _op_bitwise_or, _op_bitwise_not = _op_logical_and, _op_logical_or, _op_logical_not

    def _truths(self, op: str, *given: Value) -> Value:
        return self._elementwise(lambda *a: self.formulas.add(op, *map(self._as_truth, a)), *given)

    def _op_lt(self, a: Any, b: Any) -> Value:
        return self._elementwise("lt", a, b)

    def _op_le(self, a: Any, b: Any) -> Value:
        return self._elementwise("le", a, b)

    def _op_gt(self, a: Any, b: Any) -> Value:
        return self._elementwise("gt", a, b)

    def _op_ge(self, a: Any, b: Any) -> Value:
        return self._elementwise("ge", a, b)

    def _op_eq(self, a: Any, b: Any) -> Value:
        return self._elementwise("eq", a, b)

    def _op_ne(self, a: Any, b: Any) -> Value:
        return self._elementwise("ne", a, b)

    def _op_sum(
        self, x: Value, dims: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None
    ) -> Value:
        every = range(x.ndim) if not dims else dims
        dims = sorted({x.dim(d) for d in every}, reverse=True)
        numbers = self._loaded(x, None)
        axis = x.axis
        for d in dims:
            total = numbers.take([0], d)
            for i in range(1, numbers.shape[d]):
                total = self._elementwise("add", Value(total), Value(numbers.take([i], d))).numbers
            numbers = total
        if not keepdim:
            before = None if axis is None else x.ndim + axis
            numbers = numbers.squeeze(tuple(dims)) if dims else numbers
            if before is not None:
                axis = before - sum(d < before for d in dims) - numbers.ndim
        return Value(numbers, axis)

    def _op_mean(
        self, x: Value, dims: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None
    ) -> Value:
        total = self._op_sum(x, dims, keepdim)
        return self._elementwise("mul", total, total.numbers.size / x.numbers.size)

    def _op_mm(self, a: Value, b: Value) -> Value:
        if b.axis is not None:
            if a.axis is not None or b.axis != -1:
                raise NotByRows("a product of matrices mixes samples")
            return self._op_transpose(
                self._op_mm(self._op_transpose(b, 0, 1), self._op_transpose(a, 0, 1)), 0, 1
            )
        if a.axis == -1:
            raise NotByRows("a product of matrices mixes samples")
        left, right = self._loaded(a, None), self._loaded(b, None)
        if left.shape[0] * right.size > LARGEST:
            raise NotByRows("its products of matrices are large")
        rows = []
        for row in left:
            rows.append([])
            for column in right.T:
                terms = [self.formulas.add("mul", int(p), int(q)) for p, q in zip(row, column, strict=True)]
                total = terms[0]
                for term in terms[1:]:
                    total = self.formulas.add("add", total, term)
                rows[-1].append(total)
        return Value(np.array(rows, np.int64), a.axis)

    def _op_addmm(self, bias: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> Value:
        product = self._op_mm(a, b)
        product = product if alpha == 1 else self._op_mul(product, alpha)
        return self._op_add(product, bias if beta == 1 else self._op_mul(bias, beta))

    # Shapes

    def _op_select(self, x: Value, d: int, i: int) -> Value:
        d = x.dim(d)
        axis = x.axis
        if axis is not None and d > x.ndim + axis:
            axis += 1
        return Value(x.numbers.take(i, d), axis, x.source)

    def _op_slice(self, x: Value, d: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
        d = d % x.ndim
        start, end = 0 if start is None else start, 2**62 if end is None else end
        if x.axis is not None and d == x.ndim + x.axis:
            if (start, step) == (0, 1) and end >= (self.rows or 0):
                return x
            raise NotByRows("it picks samples")
        at = (slice(None),) * d + (slice(start, end, step),)
        return Value(x.numbers[at], x.axis, x.source)

    def _op_sym_size(self, x: Value, d: int) -> int:
        d = d % x.ndim
        whole = x.axis is not None and d == x.ndim + x.axis
        return (self.rows or 1) if whole else x.numbers.shape[d]

    def _op_unsqueeze(self, x: Value, d: int) -> Value:
        d = d % (x.ndim + 1)
        axis = x.axis
        if axis is not None and d > x.ndim + axis:
            axis -= 1
        return Value(np.expand_dims(x.numbers, d), axis, x.source)

    def _op_squeeze(self, x: Value, dims: Any = None) -> Value:
        own = None if x.axis is None else x.ndim + x.axis
        dims = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
        gone = {d % x.ndim for d in dims}
        gone = tuple(d for d in gone if d != own and x.numbers.shape[d] == 1)
        axis = None if own is None else own - sum(d < own for d in gone) - (x.ndim - len(gone))
        return Value(x.numbers.squeeze(gone), axis, x.source)

    def _op_permute(self, x: Value, dims: Sequence[int]) -> Value:
        order = [d % x.ndim for d in dims]
        axis = None if x.axis is None else order.index(x.ndim + x.axis) - x.ndim
        return Value(x.numbers.transpose(order), axis, x.source)

    def _op_transpose(self, x: Value, a: int, b: int) -> Value:
        order = list(range(x.ndim))
        order[a], order[b] = order[b], order[a]
        return self._op_permute(x, order)

    def _op_t(self, x: Value) -> Value:
        return self._op_permute(x, range(x.ndim)[::-1])

    def _op_expand(self, x: Value, shape: Sequence[int], implicit: bool = False) -> Value:
        front = len(shape) - x.ndim
        own = None if x.axis is None else x.ndim + x.axis + front
        size = [x.numbers.shape[d - front] if d == own or n == -1 else n for d, n in enumerate(shape)]
        return Value(np.broadcast_to(x.numbers, size), x.axis, x.source)

    def _op_view(self, x: Value, shape: Sequence[int]) -> Value:
        if x.axis is None:
            return Value(x.numbers.reshape(tuple(shape)), None, x.source)
        own = x.ndim + x.axis
        before = math.prod(x.numbers.shape[:own])
        shape = list(shape)
        if -1 in shape:
            known = -math.prod(shape)
            shape[shape.index(-1)] = x.numbers.size * (self.rows or 1) // known
        for d, n in enumerate(shape):
            if n == self.rows and math.prod(shape[:d]) == before:
                shape[d] = 1
                return Value(x.numbers.reshape(shape), d - len(shape), x.source)
        raise NotByRows("it reshapes across samples")

    _op__unsafe_view = _op_reshape = _op_view

    def _op_cat(self, values: Sequence[Value], d: int = 0) -> Value:
        axes = {v.axis for v in values if v.axis is not None}
        if len(axes) > 1:
            raise NotByRows("it mixes samples")
        axis = axes.pop() if axes else None
        d = d % values[0].ndim
        if axis is not None and d == values[0].ndim + axis:
            raise NotByRows("it mixes samples")
        return Value(np.concatenate([self._loaded(v, axis) for v in values], d), axis)

    def _op_stack(self, values: Sequence[Value], d: int = 0) -> Value:
        d = d % (values[0].ndim + 1)
        return self._op_cat([self._op_unsqueeze(v, d) for v in values], d)

    def _op_unbind(self, x: Value, d: int = 0) -> list[Value]:
        return [self._op_select(x, d, i) for i in range(x.numbers.shape[x.dim(d)])]

    def _op_split(self, x: Value, size: Any, d: int = 0) -> list[Value]:
        whole = x.numbers.shape[x.dim(d)]
        sizes = [size] * -(-whole // size) if isinstance(size, int) else size
        ends = np.cumsum(sizes)
        return [self._op_slice(x, d, int(e - n), int(e)) for e, n in zip(ends, sizes, strict=True)]

    _op_split_with_sizes = _op_split

    def _op_index(self, x: Value, indices: Sequence[Any]) -> Value:
        asked = [(d, i) for d, i in enumerate(indices) if i is not None]
        if len(asked) != 1 or not isinstance(asked[0][1], np.ndarray) or asked[0][1].ndim != 1:
            raise NotByRows("it picks entries by values")
        d, i = asked[0]
        return Value(x.numbers.take(i, x.dim(d)), x.axis, x.source)

    def _op_select_scatter(self, x: Value, part: Value, d: int, i: int) -> Value:
        return self._written(x, self._op_unsqueeze(part, d), d, slice(i, i + 1 or None))

    def _op_slice_scatter(
        self, x: Value, part: Value, d: int = 0, start: Any = None, end: Any = None, step: int = 1
    ) -> Value:
        own = None if x.axis is None else x.ndim + x.axis
        if d % x.ndim == own or (
            own is None and part.axis is not None and d % x.ndim == part.ndim + part.axis
        ):
            if start in (None, 0) and step == 1 and (end is None or end >= (self.rows or 0)):
                return part
            raise NotByRows("it picks samples")
        return self._written(x, part, d, slice(start, end, step))

    def _written(self, x: Value, part: Value, d: int, where: slice) -> Value:
        axis = x.axis if part.axis is None else part.axis
        numbers, new = self._loaded(x, axis), self._loaded(part, axis)
        d = d % x.ndim
        if axis is not None and d == x.ndim + axis:
            raise NotByRows("it mixes samples")
        numbers = np.array(np.broadcast_to(numbers, x.numbers.shape if axis is None else numbers.shape))
        numbers[(slice(None),) * d + (where,)] = new
        return Value(numbers, axis)

    def _same(self, x: Any, *_: Any, **__: Any) -> Any:
        return x

    _op_clone = _op_alias = _op_detach = _op_lift_fresh_copy = _op_lift_fresh = _op_contiguous = _same

    def _op__to_copy(self, x: Value, **_: Any) -> Value:
        return self._elementwise(self._as_number, x)

    def _op_copy(self, x: Value, new: Value, non_blocking: bool = False) -> Value:
        axis = new.axis if x.axis is None else x.axis
        numbers = self._loaded(new, axis)
        shape = list(x.numbers.shape)
        if axis is not None:
            shape[axis] = 1
        return Value(np.broadcast_to(numbers, shape), axis)

    def _op_full(self, shape: Sequence[int], value: float, **_: Any) -> Value:
        return Value(np.broadcast_to(np.int64(self.formulas.number(value)), tuple(shape)))

    def _op_zeros(self, shape: Sequence[int], **_: Any) -> Value:
        return self._op_full(shape, 0.0)

    def _op_ones(self, shape: Sequence[int], **_: Any) -> Value:
        return self._op_full(shape, 1.0)

    def _op_full_like(self, x: Value, value: float, **_: Any) -> Value:
        return Value(np.broadcast_to(np.int64(self.formulas.number(value)), x.numbers.shape), x.axis)

    def _op_zeros_like(self, x: Value, **_: Any) -> Value:
        return self._op_full_like(x, 0.0)

    def _op_ones_like(self, x: Value, **_: Any) -> Value:
        return self._op_full_like(x, 1.0)

    def _op_empty_like(self, x: Value, **_: Any) -> Value:
        return self._op_full_like(x, math.nan)

    def _op_scalar_tensor(self, value: float, **_: Any) -> Value:
        return self._value(value)


def derivatives(f: Formulas, results: Sequence[int], cotangents: Sequence[int]) -> dict[int, int]:
    """The adjoint of every leaf, Σ cotangent · ∂result/∂leaf, as formulas of it and of the cotangents."""
    adjoint: dict[int, int] = {}

    def pass_on(i: int, bar: int) -> None:
        adjoint[i] = f.plus(adjoint[i], bar) if i in adjoint else bar

    for result, cotangent in zip(results, cotangents, strict=True):
        pass_on(result, cotangent)
    for i in range(max(results, default=-1), -1, -1):
        if i not in adjoint or f.value_of(adjoint[i]) == 0:
            continue
        op, *args = f.nodes[i]
        if op in ("number", "t", "x", "shared", "own", "as_number", *TRUTHS):
            continue
        for argument, bar in _pulled_back(f, op, args, i, adjoint[i]):
            pass_on(argument, bar)
    return {i: bar for i, bar in adjoint.items() if f.nodes[i][0] in ("t", "x", "shared", "own")}


def _pulled_back(f: Formulas, op: str, args: list[int], i: int, bar: int) -> list[tuple[int, int]]:
    """What the cotangent `bar` of number i, op(args), gives each of the arguments."""
    add, one = f.add, f.number(1.0)
    a, b = args[0], args[-1]

    def square(x: int) -> int:
        return add("mul", x, x)

    def zero_where_not(truth: int) -> int:
        return add("where", truth, bar, f.number(0.0))

    if op == "where":
        truth, a, b = args
        return [(a, zero_where_not(truth)), (b, add("where", truth, f.number(0.0), bar))]
    if op in ("maximum", "minimum"):
        # Halves where both are equal, as in torch.
        half = add("where", add("eq", a, b), add("mul", bar, f.number(0.5)), f.number(0.0))
        before = ("gt", "lt") if op == "maximum" else ("lt", "gt")
        return [(x, add("where", add(way, a, b), bar, half)) for x, way in zip((a, b), before, strict=True)]
    if op == "pow":
        down = add("mul", b, add("pow", a, add("sub", b, one)))
        slope = add("where", add("eq", b, f.number(0.0)), f.number(0.0), down)
        exponent = [] if f.value_of(b) is not None else [
            (b, add("where", add("eq", a, f.number(0.0)), f.number(0.0),
                    add("mul", bar, add("mul", i, add("log", a)))))
        ]  # fmt: skip
        return [(a, f.times(bar, slope)), *exponent]
    two_sided: dict[str, Callable[[], list[tuple[int, int]]]] = {
        "add": lambda: [(a, bar), (b, bar)],
        "sub": lambda: [(a, bar), (b, add("neg", bar))],
        "mul": lambda: [(a, f.times(bar, b)), (b, f.times(bar, a))],
        "div": lambda: [(a, add("div", bar, b)), (b, add("neg", add("mul", add("div", bar, b), i)))],
    }
    if op in two_sided:
        return two_sided[op]()
    one_sided: dict[str, Callable[[], int]] = {
        "neg": lambda: f.number(-1.0),
        "sin": lambda: add("cos", a),
        "cos": lambda: add("neg", add("sin", a)),
        "tan": lambda: f.plus(one, square(i)),
        "exp": lambda: i,
        "log": lambda: add("reciprocal", a),
        "sqrt": lambda: add("div", f.number(0.5), i),
        "rsqrt": lambda: add("mul", f.number(-0.5), add("mul", i, square(i))),
        "tanh": lambda: add("sub", one, square(i)),
        "sigmoid": lambda: add("mul", i, add("sub", one, i)),
        "abs": lambda: add("sign", a),
        "sign": lambda: f.number(0.0),
        "atan": lambda: add("reciprocal", f.plus(one, square(a))),
        "asin": lambda: add("rsqrt", add("sub", one, square(a))),
        "acos": lambda: add("neg", add("rsqrt", add("sub", one, square(a)))),
        "sinh": lambda: add("cosh", a),
        "cosh": lambda: add("sinh", a),
        "erf": lambda: add("mul", f.number(2 / math.sqrt(math.pi)), add("exp", add("neg", square(a)))),
        "expm1": lambda: f.plus(i, one),
        "log1p": lambda: add("reciprocal", f.plus(one, a)),
        "reciprocal": lambda: add("neg", square(i)),
    }
    return [(a, f.times(bar, one_sided[op]()))]
