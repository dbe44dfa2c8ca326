"""The front door: `odeint`, torchdiffeq's signature with resode's solvers behind it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from resode.solve.adaptive import adaptive_solve
from resode.solve.fixed import fixed_solve
from resode.solve.result import NonFiniteState, Stats
from resode.solve.step import Field, as_stage
from resode.tableaus import METHODS, ButcherTableau

NATIVE = tuple(name for name, tableau in METHODS.items() if tableau.explicit)
"""The methods solved here; torchdiffeq's others are passed on to it."""

MAX_STEPS = 100_000

State = Tensor | tuple[Tensor, ...]


class Counted:
    """A field that counts its calls and refuses results that are no derivative of the state."""

    def __init__(self, f: Callable[[Any, Tensor], Any]):
        self.f = f
        self.calls = 0

    def __call__(self, t: Any, x: Tensor) -> Tensor:
        """f(t, x), in x's dtype."""
        self.calls += 1
        return as_stage(self.f(t, x), x)


def odeint(
    func: Callable[..., Any],
    y0: State,
    t: Tensor,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | ButcherTableau | None = None,
    options: dict[str, Any] | None = None,
    args: Sequence[Any] = (),
    step_size: float | None = None,
    n_steps: int | None = None,
    max_steps: int = MAX_STEPS,
    per_sample: bool = False,
    return_stats: bool = False,
) -> Any:
    r"""Solve dy/dt = func(t, y), y(t[0]) = y0, at the times t.

    Args:
        func: `func(t, y, *args)` -> dy/dt of y's shape. t is a 0-D tensor in the state's real dtype;
            with `per_sample` it has shape (B, 1, …, 1), so that `t * y` means the same.
        y0: the state at t[0]: a float or complex tensor of any shape, or a tuple of tensors of one dtype.
        t: times, shape (T,), T ≥ 1, strictly increasing or decreasing, floating.
        rtol: relative tolerance of a step's error, for adaptive methods; 1e-7 for float64 states,
            1e-6 for float32. Finer than the dtype resolves, it is clamped with a warning.
        atol: absolute tolerance likewise, in the state's unit; 1e-9 and 1e-8.
        method: a name in resode.METHODS or a tableau; "dopri5" by default. bosh3, fehlberg45, dopri5,
            tsit5 and dopri8 are adaptive, the other explicit ones take fixed steps. "rk4" is the
            classic method; torchdiffeq's "rk4" is "rk4_38" here. Other names go to torchdiffeq.
        options: passed to torchdiffeq with its methods; resode's own take none.
        args: further arguments of func.
        step_size: the largest step, in t's unit; makes every explicit method take fixed steps.
        n_steps: the number of equal steps between consecutive t; likewise.
        max_steps: attempted steps (of each sample) over the whole solve, for adaptive methods.
        per_sample: dimension 0 of the state is the batch and each sample has its own time and step.
            The rows must not interact: func(t, y)[i] may depend on y[i] alone.
        return_stats: also give the `Stats`.

    Returns:
        The states at t, shape (T, *y0.shape) (a tuple of them for a tuple), or (states, Stats).

    Raises:
        ValueError, TypeError: an argument is wrong; the message says the rule and what came.
        SolverError: the solve can't go on; StepSizeUnderflow, MaxStepsReached, NonFiniteState,
            NonFiniteField name the time.

    Source:
        Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, II.1 and II.4.

    Example:
        >>> import torch, resode
        >>> y = resode.odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]),
        ...                   method="rk4", n_steps=10)
        >>> y[-1]
        tensor([0.3679])
        >>> y, stats = resode.odeint(lambda t, y: -y, torch.ones(3, 1), torch.tensor([0.0, 1.0]),
        ...                          per_sample=True, return_stats=True)
        >>> stats.n_rejected
        tensor([0, 0, 0])
    """
    _check_state(y0)
    _check_times(t)
    if args:
        inner = func
        func = lambda t, y: inner(t, y, *args)  # noqa: E731
    if isinstance(y0, tuple):
        if per_sample:
            raise ValueError("per_sample=True needs one tensor with the batch first, got a tuple of tensors.")
        func, y0, restore = _flatten(func, y0)
    else:
        restore = None
    tableau = _method(method)
    if isinstance(tableau, str):
        result, stats = _torchdiffeq(
            func, y0, t, rtol, atol, tableau, options, step_size, n_steps, per_sample
        )
    else:
        if options:
            raise ValueError(
                f"{tableau.name} takes no options, got {sorted(options)}. Use the arguments step_size, "
                "n_steps, rtol, atol and max_steps."
            )
        fixed = step_size is not None or n_steps is not None or not tableau.adaptive
        if fixed:
            _check_steps(step_size, n_steps)
            if step_size is None and n_steps is None and len(t) == 2:
                warnings.warn(
                    f"{tableau.name} takes one step from t[0] to t[1]; give n_steps or step_size.",
                    stacklevel=2,
                )
            result, stats = _fixed(func, y0, t, tableau, step_size, n_steps, per_sample)
        else:
            result, stats = _adaptive(func, y0, t, tableau, rtol, atol, max_steps, per_sample)
    if restore is not None:
        result = restore(result)
    return (result, stats) if return_stats else result


def _fixed(
    func: Callable[..., Any],
    y0: Tensor,
    t: Tensor,
    tableau: ButcherTableau,
    step_size: float | None,
    n_steps: int | None,
    per_sample: bool,
) -> tuple[Tensor, Stats]:
    real = y0.dtype.to_real()
    if per_sample:
        _check_per_sample(y0)
    shape = (y0.shape[0],) + (1,) * (y0.ndim - 1) if per_sample else ()
    low, high = sorted(t.detach()[[0, -1]].tolist())

    def field(s: float | Tensor, y: Tensor) -> Any:
        # The last stage's time may lie beyond the end by a rounding; func never sees that.
        if isinstance(s, Tensor):
            s = s - (s.detach() - s.detach().clamp(low, high))
            return func(s.to(y.device, real).expand(shape), y)
        return func(torch.full(shape, min(max(s, low), high), dtype=real, device=y.device), y)

    counted = Counted(field)
    path, n = fixed_solve(tableau, counted, y0, t, step_size=step_size, n_steps=n_steps)
    result = torch.stack(path)
    if not torch.isfinite(result[-1]).all():
        first = next(i for i, y in enumerate(path) if not torch.isfinite(y).all())
        raise NonFiniteState(
            f"the state is infinite or NaN at t={float(t[first]):.9g}: {tableau.name}'s step is outside its "
            "stability region, or the field blows up. Take a smaller step (resode.max_stable_step tells "
            "the largest) or check the field."
        )
    counts: list[Any] = [counted.calls, n, n, 0]
    if per_sample:
        counts = [torch.full((y0.shape[0],), c, dtype=torch.int64, device=y0.device) for c in counts]
    return result, Stats(*counts)


def _adaptive(
    func: Callable[..., Any],
    y0: Tensor,
    t: Tensor,
    tableau: ButcherTableau,
    rtol: float | None,
    atol: float | None,
    max_steps: int,
    per_sample: bool,
) -> tuple[Tensor, Stats]:
    rtol, atol = tolerances(y0.dtype, rtol, atol)
    real = y0.dtype.to_real()
    if per_sample:
        _check_per_sample(y0)
        counted = Counted(lambda s, y: func(s.to(real), y))
        field: Field = counted
        start = y0
    else:
        counted = Counted(lambda s, y: func(s.to(real), y))

        field = lambda s, y: counted(torch.as_tensor(s).reshape(()), y[0])[None]  # noqa: E731
        start = y0[None]

    def at(s: Tensor) -> Tensor:
        return s.detach().to(y0.device, torch.float64).expand((start.shape[0],) + (1,) * (start.ndim - 1))

    if t.requires_grad:
        # The steps are held fixed; ∂y/∂t_i = f(t_i, y_i), and moving t_0 moves the start back along f.
        start = start - field(at(t[0]), start) * _zero_with_gradient(t[0], real)
    if len(t) == 1:
        zero = torch.zeros(start.shape[0], dtype=torch.int64)
        path, stats = [start], Stats(zero + counted.calls, zero, zero, zero)
    else:
        later, progress = adaptive_solve(
            tableau, field, start, t.detach().tolist(), rtol=rtol, atol=atol, max_steps=max_steps
        )
        path, stats = [start, *later], progress.stats()
    if t.requires_grad:
        path = [y + field(at(s), y) * _zero_with_gradient(s, real) for s, y in zip(t, path, strict=True)]
    result = torch.stack(path)
    if per_sample:
        return result, stats
    return result[:, 0], replace(stats.item(), nfe=counted.calls)


def _torchdiffeq(
    func: Callable[..., Any],
    y0: Tensor,
    t: Tensor,
    rtol: float | None,
    atol: float | None,
    method: str,
    options: dict[str, Any] | None,
    step_size: float | None,
    n_steps: int | None,
    per_sample: bool,
) -> tuple[Tensor, Stats]:
    if per_sample or n_steps is not None:
        raise ValueError(
            f"{method!r} is solved by torchdiffeq, which has no per_sample and no n_steps; "
            f"use one of {', '.join(NATIVE)}, or step_size."
        )
    options = dict(options or {})
    if step_size is not None:
        options["step_size"] = step_size
    rtol, atol = tolerances(y0.dtype, rtol, atol)
    counted = Counted(func)
    with warnings.catch_warnings():
        # torchdiffeq only warns of an option it does not know.
        warnings.filterwarnings("error", message=".*[Uu]nexpected arguments")
        try:
            result = torchdiffeq.odeint(counted, y0, t, rtol=rtol, atol=atol, method=method, options=options)
        except UserWarning as warning:
            raise ValueError(f"unknown options for {method!r}: {warning}") from None
    return result, Stats(counted.calls, None, None, None)  # type: ignore[arg-type]


def _method(method: str | ButcherTableau | None) -> ButcherTableau | str:
    """A tableau to solve with here, or the name of one of torchdiffeq's own methods."""
    if method is None:
        return METHODS["dopri5"]
    tableau = METHODS.get(method) if isinstance(method, str) else method
    if isinstance(tableau, ButcherTableau):
        if not tableau.explicit:
            raise ValueError(
                f"{tableau.name!r} is implicit and serves stability analysis only; solve with one of "
                f"{', '.join(NATIVE)}, or implicit_adams for stiff fields."
            )
        return tableau
    others = [name for name in torchdiffeq_methods() if name not in METHODS]
    if method in others:
        return str(method)
    raise ValueError(
        f"unknown method {method!r}; the methods are {', '.join(NATIVE)}, and through the installed "
        f"torchdiffeq {', '.join(others)}."
    )


def torchdiffeq_methods() -> list[str]:
    """The methods of the installed torchdiffeq; releases differ under one version number."""
    from torchdiffeq._impl.odeint import SOLVERS

    return list(SOLVERS)


def tolerances(dtype: torch.dtype, rtol: float | None, atol: float | None) -> tuple[float, float]:
    """Tolerances for a state of `dtype`: the defaults where None, clamped to what it resolves.

    Raises:
        ValueError: negative, not finite, or both zero.

    Example:
        >>> tolerances(torch.float32, None, None)
        (1e-06, 1e-08)
    """
    fine = dtype.to_real() == torch.float64
    rtol = (1e-7 if fine else 1e-6) if rtol is None else float(rtol)
    atol = (1e-9 if fine else 1e-8) if atol is None else float(atol)
    if not (0 <= rtol < float("inf") and 0 <= atol < float("inf")) or rtol == atol == 0:
        raise ValueError(
            f"rtol and atol must be finite, not negative, and not both zero; "
            f"got rtol={rtol:g}, atol={atol:g}."
        )
    finest = 4 * torch.finfo(dtype).eps
    if rtol < finest:
        warnings.warn(
            f"rtol={rtol:g} is finer than {dtype} resolves; {finest:.2g} is used. "
            "Use a float64 state for less.",
            stacklevel=4,
        )
        rtol = finest
    return rtol, atol


def _zero_with_gradient(t: Tensor, dtype: torch.dtype) -> Tensor:
    return (t - t.detach()).to(dtype)


def _flatten(
    func: Callable[..., Any], y0: tuple[Tensor, ...]
) -> tuple[Callable[..., Any], Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """A tuple state as one vector, the field on it, and the way back for states of shape (T, n)."""
    shapes, sizes = [y.shape for y in y0], [y.numel() for y in y0]

    def split(y: Tensor) -> tuple[Tensor, ...]:
        parts = y.split(sizes, dim=-1)
        return tuple(p.reshape(*y.shape[:-1], *s) for p, s in zip(parts, shapes, strict=True))

    def flat(t: Tensor, y: Tensor) -> Tensor:
        dy = func(t, split(y))
        if not isinstance(dy, tuple | list) or [d.shape for d in dy] != shapes:
            got = [tuple(d.shape) for d in dy] if isinstance(dy, tuple | list) else type(dy).__name__
            raise ValueError(
                f"a field must keep the state's shape: got a tuple of shapes {[tuple(s) for s in shapes]}, "
                f"F(x) gave {got}."
            )
        return torch.cat([d.reshape(-1) for d in dy])

    return flat, torch.cat([y.reshape(-1) for y in y0]), split


def _check_state(y0: State) -> None:
    parts = y0 if isinstance(y0, tuple) else (y0,)
    for y in parts:
        if not isinstance(y, Tensor):
            raise TypeError(f"y0 must be a tensor or a tuple of tensors, got {type(y).__name__}.")
        if not (y.is_floating_point() or y.is_complex()):
            raise TypeError(
                f"y0 must be floating or complex, got {y.dtype}. Convert it with y0.float() or .double()."
            )
        if not torch.isfinite(y.detach()).all():
            raise ValueError("y0 must be finite; it holds an infinity or NaN.")
    if len({y.dtype for y in parts}) != 1 or len({y.device for y in parts}) != 1:
        raise ValueError(
            "the tensors of y0 must share one dtype and device, "
            f"got {[(str(y.dtype), str(y.device)) for y in parts]}."
        )


def _check_times(t: Tensor) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t must be a floating tensor of times, got {got}.")
    if t.ndim != 1 or len(t) == 0:
        raise ValueError(f"t must be one-dimensional with at least one time, got shape {tuple(t.shape)}.")
    steps = t.detach().diff()
    if not torch.isfinite(t.detach()).all():
        raise ValueError("t must be finite; it holds an infinity or NaN.")
    if not ((steps > 0).all() or (steps < 0).all()):
        bad = int(((steps <= 0) if steps[0] > 0 else (steps >= 0)).nonzero()[0])
        raise ValueError(
            f"t must be strictly increasing or strictly decreasing; t[{bad}]={float(t[bad]):g} is followed "
            f"by t[{bad + 1}]={float(t[bad + 1]):g}."
        )


def _check_steps(step_size: float | None, n_steps: int | None) -> None:
    if step_size is not None and n_steps is not None:
        raise ValueError(
            f"give step_size or n_steps, not both; got step_size={step_size}, n_steps={n_steps}."
        )
    if step_size is not None and not 0 < step_size < float("inf"):
        raise ValueError(f"step_size must be positive and finite, got {step_size}; t gives the direction.")
    if n_steps is not None and (not isinstance(n_steps, int) or n_steps < 1):
        raise ValueError(f"n_steps must be an integer of at least 1, got {n_steps!r}.")


def _check_per_sample(y0: Tensor) -> None:
    if y0.ndim < 2 or y0.shape[0] == 0:
        raise ValueError(
            "per_sample=True needs a state of shape (batch, *state) with at least one sample and two "
            f"dimensions, got {tuple(y0.shape)}."
        )
