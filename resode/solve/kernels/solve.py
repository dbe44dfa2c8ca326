"""Solves by rows: the field's graph, its kernel, and the call.

torch.compile captures the field and says, call by call, whether what it captured still holds; what it calls
in the field's place carries every row to its end in one call of compiled C++.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter

from resode.solve.adaptive import Adaptive, Progress, adaptive_solve
from resode.solve.control import NUMPY, Control
from resode.solve.host import is_transformed, moves
from resode.solve.kept import compiled_for
from resode.solve.kernels.rows import LARGEST, NotByRows, Reader, Value, derivatives
from resode.solve.kernels.source import interpolates, source
from resode.solve.step import Counted
from resode.tableaus import ButcherTableau

LOG = logging.getLogger("resode.compile")
"""Says at level INFO why a field is solved by graphs of steps and not by rows."""

LONGEST = 64
"""Rows of more entries are left to torch's own kernels."""


aten = torch.ops.aten
DECOMPOSED = [aten.silu, aten.gelu, aten.softplus, aten.leaky_relu, aten.elu, aten.hardtanh]
"""Operations that are read as several others."""


UNDIFFERENTIATED = {"detach", "detach_", "requires_grad_", "register_hook"}
"""What formulas would follow a gradient through; torch's private functions are taken for such, too."""


class _Job(ctypes.Structure):
    """What `solve.cpp` is given, field by field."""

    _fields_ = [
        *((name, kind) for kind, names in (
            (ctypes.c_long, "rows outputs own_outputs max_steps threads shared_step"),
            (ctypes.c_double, "forward rtol atol min_step max_step longest safety shrink grow"),
            (ctypes.c_double, "b1 b2 b3 power"),
            (ctypes.c_void_p, "x k0 state end at path inputs path_bar x_end_bar x_bar inputs_bar"),
        ) for name in names.split()),
    ]  # fmt: skip


class ByRows(NamedTuple):
    """Where a solve came: at its end, or where a row could not go on."""

    path: Tensor  # the states at the outputs, (T, *x.shape)
    x: Tensor
    k0: Tensor  # the field there, without gradient
    state: Tensor  # as `compiled.attempt` has it, (7, B)


@dataclass
class _Request:
    """A solve as it starts, on its way through the captured field to the kernel."""

    tableau: ButcherTableau
    field: Counted
    control: Control
    progress: Progress
    time: np.ndarray  # (B,), as the next
    end: np.ndarray
    outputs: np.ndarray  # (T,), or each sample's own, (B, T)
    forward: float
    k0: Tensor
    found: ByRows | None = None

    def clocks(self) -> np.ndarray:
        """Time, step, errors, whether rejected, accepted and rejected, at the start: (7, B)."""
        p = self.progress
        rows = [self.time, p.step, *p.errors, np.zeros_like(p.step), p.n_accepted, p.n_rejected]
        return np.stack(rows).astype(np.float64)

    def repeated(self, x: Tensor) -> list[Tensor]:
        """The states at the outputs and the end, by torch's own operations, with any derivatives."""
        inner = np.broadcast_to(np.atleast_2d(self.outputs), (len(self.time), self.outputs.shape[-1]))
        times = np.concatenate([self.time[:, None], inner, self.end[:, None]], 1).T
        times = times if self.outputs.ndim > 1 else times[:, 0]
        return adaptive_solve(self.tableau, self.field, x, times, self.control, self.progress)[0]


_REQUEST: ContextVar[_Request] = ContextVar("request")
_REFUSED: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


def why_not(solve: Adaptive, outputs: np.ndarray) -> str | None:
    """Why a solve can't go by rows, whatever its field; None where it can."""
    tableau, control, x = solve.tableau, solve.control, solve.x
    checks = {
        "the state is not on the CPU": x.device.type != "cpu",
        f"the state is {x.dtype}, not float32 or float64": x.dtype not in NUMPY,
        f"the state is a {type(x).__name__}": type(x) not in (Tensor, Parameter) or x.layout != torch.strided,
        "times are not float64": control.dtype != torch.float64,
        "there is a norm of one's own": control.norm is not None,
        "there are callbacks": control.callbacks is not None,
        "max_steps is counted from output to output": control.per_output,
        "there are tolerances by entry": any(
            isinstance(tol, Tensor) and tol.numel() > 1 for tol in (control.rtol, control.atol)
        ),
        f"{tableau.name} takes further stages for outputs": outputs.shape[-1] > 0
        and not interpolates(tableau),
        "it is within a transform of torch.func or in forward mode": is_transformed() or moves(x.detach()),
        "torch.autocast is on": torch.is_autocast_enabled("cpu"),
        "the state is empty": x.numel() == 0,
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def solve_by_rows(solve: Adaptive, outputs: np.ndarray, key: Any) -> ByRows | None:
    """Takes the solve to its end in one call of compiled code, or to where a row can't go on.

    Args:
        solve: at its start.
        outputs: times, (T,) or each sample's own, (B, T).
        key: what the captured field is kept for.

    Returns:
        None where the field or the solve is not of the kind that goes by rows; the logger `resode.compile`
        says why at level INFO, once for each field and shape.
    """
    x, f = solve.x, solve.f
    assert isinstance(f, Counted)
    settings = (solve.tableau, solve.per_sample, tuple(x.shape), x.dtype)
    refused = _REFUSED.setdefault(key, set())
    if settings in refused:
        return None
    if (reason := why_not(solve, outputs)) is not None:
        if reason not in refused:
            refused.add(reason)
            LOG.info("solved by graphs of steps, because %s", reason)
        return None
    request = _Request(
        tableau=solve.tableau, field=f, control=solve.control, progress=solve.progress, time=solve.time,
        end=solve.end, outputs=outputs, forward=solve.forward, k0=solve.k0.detach().contiguous(),
    )  # fmt: skip
    token = _REQUEST.set(request)
    try:
        backend = partial(_Kernel, tableau=solve.tableau, per_sample=solve.per_sample)
        run = compiled_for(_field, key, x, *settings, backend=backend)
        # A view, lest the field's own tensors be taken for the state where they are the same object.
        run(f.f, solve.as_times(solve.time[None])[0], x.contiguous().view_as(x))
    except Exception as error:
        refused.add(settings)
        LOG.info("solved by graphs of steps, because %s", _reason(error))
        return None
    finally:
        _REQUEST.reset(token)
    found, request.found = request.found, None  # which lead back to the request by their gradients
    return found


def _reason(error: BaseException) -> str:
    """What the first of nested errors says, in one line."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    said = str(error) if isinstance(error, NotByRows) else f"{type(error).__name__}: {error}"
    return said.split("\n")[0][:300]


_NUMBER = itertools.count()


def _field(*_: Any) -> Callable[[Any, Tensor, Tensor], Any]:
    """The function that is captured, under a name of its own: under one, torch generalises over shapes."""

    def field(f: Any, t: Tensor, x: Tensor) -> Any:
        return f(t, x)

    code = field.__code__.replace(co_name=f"field_{next(_NUMBER)}")
    return types.FunctionType(code, field.__globals__)


class _Kernel:
    """What stands in the captured field's place: called with its inputs, it solves the current request."""

    def __init__(self, graph: fx.GraphModule, examples: list[Any], tableau: Any, per_sample: bool):
        _look_at_captured(graph, examples)
        places = {_source_name(node): i for i, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
        if "L['x']" not in places:
            raise NotByRows("it does not depend on the state")
        self.x_at, self.t_at = places["L['x']"], places.get("L['t']")
        self.x: Tensor = examples[self.x_at]
        if any(
            e.dtype != self.x.dtype and (e.ndim or e.requires_grad or not e.is_floating_point())
            for e in examples
        ):
            raise NotByRows("its tensors have several dtypes")
        for node in graph.graph.find_nodes(op="call_method", target="item"):
            node.replace_all_uses_with(node.args[0])  # a number that changed between calls came as a tensor
            graph.graph.erase_node(node)
        graph.recompile()
        self.tableau, self.per_sample = tableau, per_sample
        self.needs_gradient = [torch.is_grad_enabled() and bool(e.requires_grad) for e in examples]
        with torch.no_grad():
            lowered = make_fx(
                torch.func.functionalize(graph, remove="mutations"),
                tracing_mode="fake",
                decomposition_table=get_decompositions(DECOMPOSED),  # type: ignore[arg-type]
                _allow_non_fake_inputs=True,
            )(*[torch.empty(e.shape, dtype=self.x.dtype) for e in examples])
        reasons: list[NotByRows] = []
        for axis, own in self._readings(examples):
            try:
                self._read(lowered, examples, axis, own)
                break
            except NotByRows as reason:
                reasons.append(reason)
        else:
            raise reasons[0]

    def _readings(self, examples: list[Tensor]) -> Iterator[tuple[int | None, set[int]]]:
        """What to take for the rows, and which inputs for each row's own: all that are as long, or fewer."""
        x = self.x
        if x.ndim and x.shape[0] > 1 and (self.per_sample or x.ndim > 1):
            others = [i for i in range(len(examples)) if i not in (self.x_at, self.t_at)]
            long = {i for i in others if x.shape[0] in examples[i].shape}
            yield 0, long
            for i in sorted(long) if len(long) > 1 else ():
                yield 0, long - {i}
            if long:
                yield 0, set()
        if not self.per_sample or x.shape[0] == 1:
            yield None, set()

    def _read(self, lowered: fx.GraphModule, examples: list[Any], axis: int | None, own: set[int]) -> None:
        x = self.x
        self.rows = 1 if axis is None else x.shape[0]
        self.n = x.numel() // self.rows
        if self.n > LONGEST:
            raise NotByRows(f"a row has {self.n} entries, more than {LONGEST}")
        reader = Reader(None if axis is None else self.rows, x.dtype)
        f = reader.formulas
        row_shape = x.shape if axis is None else (1, *x.shape[1:])
        entries = np.array([f.add("x", i) for i in range(self.n)], np.int64).reshape(row_shape)
        t = np.int64(f.add("t"))
        values = []
        for i, example in enumerate(examples):
            if i == self.x_at:
                values.append(Value(entries, None if axis is None else -x.ndim))
            elif i == self.t_at:
                of_row = axis is not None and example.ndim > 0
                shape = (1, *example.shape[1:]) if of_row else tuple(example.shape)
                values.append(Value(np.broadcast_to(t, shape), -example.ndim if of_row else None))
            elif i in own:
                values.append(reader.own(i, example.shape, list(example.shape).index(self.rows)))
            else:
                offsets = np.arange(example.numel(), dtype=np.int64).reshape(tuple(example.shape))
                values.append(Value(offsets, None, i))
        names = [node.name for node in lowered.graph.find_nodes(op="placeholder")]
        result = reader.result(lowered, dict(zip(names, values, strict=True)))
        found = np.broadcast_to(reader._loaded(result, None if axis is None else -x.ndim), row_shape)
        self.formulas, self.field = f, [reader._as_number(int(i)) for i in found.reshape(-1)]

    @cached_property
    def library(self) -> Any:
        """The compiled kernel; built when it is called, when all else is known to be well."""
        from torch._inductor.codecache import CppCodeCache

        f, back = self.formulas, None
        if any(self.needs_gradient):
            f.largest = 10 * LARGEST
            back = derivatives(f, self.field, [f.add("bar", i) for i in range(self.n)])
            wanted = {(i,) for i, needs in enumerate(self.needs_gradient) if needs}
            back = {i: bar for i, bar in back.items() if f.nodes[i][0] == "x" or f.nodes[i][1:2] in wanted}
        shared, own = ([node[1:] for node in f.nodes if node[0] == kind] for kind in ("shared", "own"))
        name = {torch.float32: "float", torch.float64: "double"}[self.x.dtype]
        text = source(self.tableau, f, self.field, back, name, (shared, own))
        return CppCodeCache.load(text)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor]:
        request = _REQUEST.get()
        missing = (
            i.requires_grad and not needs for i, needs in zip(inputs, self.needs_gradient, strict=True)
        )
        if torch.is_grad_enabled() and any(missing):
            raise NotByRows("a tensor of it needs a gradient that the captured one did not")
        path, end = _ByRows.apply(self, request, *inputs)
        assert request.found is not None
        request.found = request.found._replace(path=path, x=end)
        return (end,)

    def forward(self, request: _Request, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The states at the outputs and at the end."""
        x = inputs[self.x_at].detach()
        state, k0, end = request.clocks(), request.k0.clone(), x.clone()
        path = torch.empty(request.outputs.shape[-1], *x.shape, dtype=x.dtype)
        job, held = self._job(request, inputs, state=state, x=end, k0=k0, path=path)
        self.library.forward(ctypes.byref(job))
        del held
        request.found = ByRows(path, end, k0, torch.from_numpy(state))
        return path, end

    def backward(
        self, request: _Request, inputs: Sequence[Tensor], bars: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The cotangents of the inputs, from those of the states at the outputs and at the end."""
        found = [torch.zeros(i.shape, dtype=i.dtype) if needs else None
                 for i, needs in zip(inputs, self.needs_gradient, strict=True)]  # fmt: skip
        x = inputs[self.x_at].detach()
        found[self.x_at] = x_bar = torch.zeros(x.shape, dtype=x.dtype)
        addresses = (ctypes.c_void_p * len(found))(*(0 if b is None else b.data_ptr() for b in found))
        path_bar, end_bar = (bar.contiguous() for bar in bars)
        job, held = self._job(
            request, inputs, state=request.clocks(), x=x, k0=request.k0, path_bar=path_bar,
            x_end_bar=end_bar, x_bar=x_bar, inputs_bar=addresses,
        )  # fmt: skip
        self.library.backward(ctypes.byref(job))
        del held
        return found

    def _job(self, request: _Request, inputs: Sequence[Tensor], **places: Any) -> tuple[_Job, Any]:
        """What the kernel is given, and what must outlive the call."""
        outputs, control, order = request.outputs, request.control, request.tableau.order
        first, second, third = (b / order for b in control.filter)
        end = np.ascontiguousarray(request.end, np.float64)
        at = np.ascontiguousarray(outputs, np.float64)
        flat = [i.detach().to(inputs[self.x_at].dtype).contiguous() for i in inputs]
        addresses = (ctypes.c_void_p * max(len(flat), 1))(*(i.data_ptr() for i in flat))
        job = _Job(
            rows=self.rows, outputs=outputs.shape[-1], own_outputs=int(outputs.ndim > 1),
            max_steps=min(control.max_steps, 2**62), threads=torch.get_num_threads(),
            shared_step=int(not self.per_sample), forward=request.forward, rtol=float(control.rtol),
            atol=float(control.atol), min_step=control.min_step, max_step=control.max_step,
            longest=control.longest, safety=control.safety, shrink=control.shrink, grow=control.grow,
            b1=first, b2=second, b3=third, power=1 / order,
        )  # fmt: skip
        places |= {"end": end, "at": at, "inputs": addresses}
        for name, place in places.items():
            if isinstance(place, Tensor):
                setattr(job, name, place.data_ptr())
            elif isinstance(place, np.ndarray):
                setattr(job, name, place.ctypes.data)
            else:
                setattr(job, name, ctypes.addressof(place))
        return job, (places, flat)


class _ByRows(torch.autograd.Function):
    """The states at the outputs and the end, as a function of the captured field's inputs."""

    @staticmethod
    def forward(ctx: Any, kernel: _Kernel, request: _Request, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.kernel, ctx.request = kernel, request
        ctx.save_for_backward(*inputs)
        return kernel.forward(request, inputs)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> Any:
        kernel, request, inputs = ctx.kernel, ctx.request, ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, None, *kernel.backward(request, inputs, bars)
        # Asked to be differentiated again: the same steps by torch's operations.
        with torch.enable_grad():
            states = request.repeated(inputs[kernel.x_at])
        wanted = [i for i, needs in zip(inputs, ctx.needs_input_grad[2:], strict=True) if needs]
        cotangents = [*bars[0], bars[1]]
        given = iter(torch.autograd.grad(states, wanted, cotangents, create_graph=True, allow_unused=True))
        return None, None, *(next(given) if needs else None for needs in ctx.needs_input_grad[2:])


def _look_at_captured(graph: fx.GraphModule, examples: Sequence[Any]) -> None:
    """Refuses what formulas, and the adjoint that follows from them, would not know of."""
    if any(type(e) not in (Tensor, Parameter, FakeTensor) or e.layout != torch.strided for e in examples):
        raise NotByRows("it takes inputs other than plain tensors of fixed shapes")
    for node in graph.graph.nodes:
        name = str(getattr(node.target, "__name__", node.target))
        if node.op == "placeholder" and "random" in _source_name(node):
            raise NotByRows("it draws random numbers")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise NotByRows(f"it calls {node.target} (an autograd function, a hook, a checkpoint?)")
        if node.op.startswith("call") and (name.startswith("_") or name in UNDIFFERENTIATED):
            raise NotByRows(f"it calls {name}, which may change its gradient")


def _source_name(node: fx.Node) -> str:
    given = node.meta.get("grapharg")
    return "" if given is None else given.source.name
