"""Solves by rows: the field's graph, its kernel, and the call.

torch.compile captures the field and says, call by call, whether what it captured still holds; what it calls
in the field's place carries every row to its end in one call of compiled C++.
"""

from __future__ import annotations

import ctypes
import logging
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from resode.solve.adaptive import Adaptive, adaptive_solve
from resode.solve.host import is_transformed
from resode.solve.kernels.rows import LARGEST, NotByRows, Reader, Value, derivatives
from resode.solve.kernels.source import interpolates, source

LOG = logging.getLogger("resode.compile")
"""Says at level INFO why a field is solved by graphs of steps and not by rows."""

LONGEST = 64
"""Rows of more entries are left to torch's own kernels."""


class _Job(ctypes.Structure):
    """What `solve.cpp` is given, field by field."""

    _fields_ = [
        *((name, ctypes.c_long) for name in
          ("rows", "outputs", "own_outputs", "max_steps", "threads", "shared_step")),
        *((name, ctypes.c_double) for name in
          ("forward", "rtol", "atol", "min_step", "max_step", "longest", "safety", "shrink", "grow", "b1", "b2",
           "b3", "power")),
        *((name, ctypes.c_void_p) for name in
          ("x", "k0", "state", "end", "at", "path", "inputs", "path_bar", "x_end_bar", "x_bar", "inputs_bar")),
    ]  # fmt: skip


class _Request:
    """A solve, on its way through the captured field to the kernel, and what came of it."""

    def __init__(self, solve: Adaptive, outputs: np.ndarray):
        self.solve, self.outputs = solve, outputs
        self.begin, self.time, self.k0 = solve.progress, solve.time, solve.k0.detach()
        self.path: Tensor | None = None

    def clocks(self) -> np.ndarray:
        """Time, step, errors, whether rejected, accepted and rejected, at the start: (7, B)."""
        p = self.begin
        rows = [self.time, p.step, *p.errors, np.zeros_like(p.step), p.n_accepted, p.n_rejected]
        return np.ascontiguousarray(np.stack(rows).astype(np.float64))

    def repeated(self, x: Tensor) -> list[Tensor]:
        """The states at the outputs and the end, by torch's own operations, with any derivatives."""
        solve, at = self.solve, np.atleast_2d(self.outputs)
        times = np.concatenate([self.time[:, None], np.broadcast_to(at, (len(self.time), at.shape[1])), solve.end[:, None]], 1)
        times = times.T if self.outputs.ndim > 1 else times[0]
        return adaptive_solve(solve.tableau, solve.f, x, times, solve.control, self.begin)[0]


_CURRENT: list[_Request] = []
_KEPT: weakref.WeakKeyDictionary[Any, dict[Any, Callable[..., Any] | None]] = weakref.WeakKeyDictionary()


def why_not(solve: Adaptive, outputs: np.ndarray) -> str | None:
    """Why a solve can't go by rows, whatever its field; None where it can."""
    tableau, control, x = solve.tableau, solve.control, solve.x
    checks = {
        "the state is not on the CPU": x.device.type != "cpu",
        f"the state is {x.dtype}": x.dtype not in (torch.float32, torch.float64),
        "times are not float64": control.dtype != torch.float64,
        "a norm of one's own": control.norm is not None,
        "tolerances by entry": any(isinstance(tol, Tensor) and tol.numel() > 1 for tol in (control.rtol, control.atol)),
        f"{tableau.name} takes further stages for outputs": outputs.shape[-1] > 0 and not interpolates(tableau),
        "torch.func's transforms": is_transformed(),
        "an empty state": x.numel() == 0,
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def solve_by_rows(
    solve: Adaptive, outputs: np.ndarray, key: Any, hooks: tuple[int, ...]
) -> tuple[Tensor, np.ndarray] | None:
    """Takes the solve to its end: states at the outputs, (T, *x.shape), and its state, (7, B); None where it can't.

    Args:
        solve: at its start.
        outputs: times, (T,) or each sample's own, (B, T).
        key: what the captured field is kept for.
        hooks: the hooks that the field has.
    """
    x = solve.x
    reason = why_not(solve, outputs)
    if reason is not None:
        LOG.info("solved by graphs of steps: %s", reason)
        return None
    kept = _KEPT.setdefault(key, {})
    wanted = (solve.tableau, solve.per_sample, tuple(x.shape), x.dtype, hooks)
    if wanted not in kept:
        kept[wanted] = _captured(solve.tableau, solve.per_sample)
    run = kept[wanted]
    if run is None:
        return None
    request = _Request(solve, outputs)
    _CURRENT.append(request)
    try:
        end = run(solve.f.f, solve.as_times(solve.time[None])[0], x)  # type: ignore[attr-defined]
    except Exception as error:
        kept[wanted] = None
        LOG.info("solved by graphs of steps: %s", _first_line(error))
        return None
    finally:
        _CURRENT.pop()
    assert request.path is not None
    solve.x, solve.k0 = end, request.end_k0
    return request.path, request.state


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None and not isinstance(error, NotByRows):
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _captured(tableau: Any, per_sample: bool) -> Callable[..., Any]:
    def capture(graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        return _Kernel(graph, examples, tableau, per_sample)

    def field(f: Any, t: Tensor, x: Tensor) -> Any:
        return f(t, x)

    # Captured graphs are kept by code object, a few for each.
    own = types.FunctionType(field.__code__.replace(), field.__globals__, field.__name__, None, field.__closure__)
    return torch.compile(own, backend=capture, fullgraph=True)


class _Kernel:
    """What stands in the captured field's place: called with its inputs, it solves the current request."""

    def __init__(self, graph: fx.GraphModule, examples: list[Any], tableau: Any, per_sample: bool):
        places = {_source_name(node): i for i, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
        self.x_at, self.t_at = places.get("L['x']"), places.get("L['t']")
        if self.x_at is None:
            raise NotByRows("it does not depend on the state")
        if not all(isinstance(e, Tensor) for e in examples):
            raise NotByRows("it takes inputs that are no tensors")
        x = examples[self.x_at]
        if any(e.dtype != x.dtype and (e.ndim or e.requires_grad or not e.is_floating_point()) for e in examples):
            raise NotByRows("its tensors have several dtypes")
        for node in graph.graph.find_nodes(op="call_method", target="item"):
            node.replace_all_uses_with(node.args[0])  # a number that changed between calls came as a tensor
        graph.recompile()
        self.tableau, self.per_sample = tableau, per_sample
        self.needs_gradient = [bool(e.requires_grad) for e in examples]
        with torch.no_grad():
            lowered = make_fx(
                torch.func.functionalize(graph, remove="mutations"), tracing_mode="fake", _allow_non_fake_inputs=True
            )(*[torch.empty(e.shape, dtype=x.dtype) for e in examples])
        by_rows = [0] if per_sample else ([0] if x.ndim > 1 and x.shape[0] > 1 else [])
        reasons = []
        for axis in [*by_rows, *([None] if not per_sample else [])]:
            try:
                self._read(lowered, examples, axis)
                break
            except NotByRows as reason:
                reasons.append(reason)
        else:
            raise reasons[0]
        self.library = self._built()

    def _read(self, lowered: fx.GraphModule, examples: list[Any], axis: int | None) -> None:
        x = examples[self.x_at]  # type: ignore[index]
        self.rows = 1 if axis is None else x.shape[0]
        self.n = x.numel() // self.rows
        if self.n > LONGEST:
            raise NotByRows(f"a row has {self.n} entries, more than {LONGEST}")
        if axis is not None and self.rows < 2:
            axis = None  # a batch of one is one row, with nothing to mix
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
                shape = example.shape
                own = axis is not None and example.ndim > 0
                values.append(Value(np.broadcast_to(t, (1, *shape[1:]) if own else shape), -example.ndim if own else None))
            else:
                offsets = np.arange(example.numel(), dtype=np.int64).reshape(tuple(example.shape))
                values.append(Value(offsets, None, i))
        names = [node.name for node in lowered.graph.find_nodes(op="placeholder")]
        result = reader.result(lowered, dict(zip(names, values, strict=True)))
        found = np.broadcast_to(reader._loaded(result, None if axis is None else -x.ndim), row_shape)
        self.formulas, self.field = f, [reader._as_number(int(i)) for i in found.reshape(-1)]

    def _built(self) -> ctypes.CDLL:
        from torch._inductor.codecache import CppCodeCache

        f, back = self.formulas, None
        if any(self.needs_gradient):
            f.largest = 10 * LARGEST
            back = derivatives(f, self.field, [f.add("bar", i) for i in range(self.n)])
            wanted = {i for i, needs in enumerate(self.needs_gradient) if needs}
            back = {i: bar for i, bar in back.items() if f.nodes[i][0] == "x" or f.nodes[i][1] in wanted}
        leaves = [[node[1:] for node in f.nodes if node[0] == kind] for kind in ("shared", "own")]
        name = {torch.float32: "float", torch.float64: "double"}[_CURRENT[-1].solve.x.dtype]
        text = source(self.tableau, f, self.field, back, name, tuple(leaves))
        return CppCodeCache.load(text)  # type: ignore[return-value]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor]:
        request = _CURRENT[-1]
        path, end = _ByRows.apply(self, request, *inputs)
        request.path = path
        return (end,)

    def forward(self, request: _Request, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The states at the outputs and at the end."""
        x = inputs[self.x_at].detach()
        request.state, request.end_k0 = request.clocks(), request.k0.clone(memory_format=torch.contiguous_format)
        end = x.clone(memory_format=torch.contiguous_format)
        path = torch.empty(request.outputs.shape[-1], *x.shape, dtype=x.dtype)
        job, held = self._job(request, inputs, state=request.state, x=end, k0=request.end_k0, path=path)
        self.library.forward(ctypes.byref(job))
        del held
        return path, end

    def backward(self, request: _Request, inputs: Sequence[Tensor], bars: Sequence[Tensor]) -> list[Tensor | None]:
        """The cotangents of the inputs, from those of the states at the outputs and at the end."""
        found = [torch.zeros(i.shape, dtype=i.dtype) if needs else None
                 for i, needs in zip(inputs, self.needs_gradient, strict=True)]  # fmt: skip
        x = inputs[self.x_at].detach().contiguous()
        found[self.x_at] = x_bar = torch.zeros(x.shape, dtype=x.dtype)
        addresses = (ctypes.c_void_p * len(found))(*(0 if b is None else b.data_ptr() for b in found))
        path_bar, end_bar = (bar.contiguous() for bar in bars)
        job, held = self._job(
            request, inputs, state=request.clocks(), x=x, k0=request.k0.contiguous(), path_bar=path_bar,
            x_end_bar=end_bar, x_bar=x_bar, inputs_bar=addresses,
        )  # fmt: skip
        self.library.backward(ctypes.byref(job))
        del held
        return found

    def _job(self, request: _Request, inputs: Sequence[Tensor], **places: Any) -> tuple[_Job, Any]:
        """What the kernel is given, and what must outlive the call."""
        solve, outputs, control = request.solve, request.outputs, request.solve.control
        first, second, third = (b / solve.tableau.order for b in control.filter)
        end = np.ascontiguousarray(solve.end, np.float64)
        at = np.ascontiguousarray(outputs, np.float64)
        flat = [i.detach().to(inputs[self.x_at].dtype).contiguous() for i in inputs]
        addresses = (ctypes.c_void_p * max(len(flat), 1))(*(i.data_ptr() for i in flat))
        job = _Job(
            self.rows, outputs.shape[-1], int(outputs.ndim > 1), min(control.max_steps, 2**62), torch.get_num_threads(),
            int(not self.per_sample), solve.forward, float(control.rtol), float(control.atol), control.min_step,
            control.max_step, control.longest, control.safety, control.shrink, control.grow, first, second, third,
            1 / solve.tableau.order,
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


def _source_name(node: fx.Node) -> str:
    given = node.meta.get("grapharg")
    return "" if given is None else given.source.name

