"""The front door: `odeint` and its kin, torchdiffeq's signatures with resode's solvers behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from resode.checks import checked, one_of, warn_user
from resode.solve.compiled import COMPILED_OPTIONS
from resode.solve.control import MAX_STEPS
from resode.solve.events import from_start, with_event_gradient
from resode.solve.gradient import GRADIENTS, Adjoint, WayBack, adjoint_params
from resode.solve.host import followed
from resode.solve.kept import key_of
from resode.solve.native import solve
from resode.solve.options import SolveSettings, resolve_method
from resode.solve.problem import (
    FlatField,
    State,
    callbacks_of,
    check_field,
    check_per_sample,
    check_state,
    check_times,
    checked_args,
    flat_tolerance,
    flatten,
    largest_rms,
    leaves_like,
    of_one_dtype,
)
from resode.solve.to_event import solve_to_event
from resode.tableaus import ButcherTableau


@checked
def odeint(
    func: Callable[..., Any],
    y0: State,
    t: Tensor,
    *,
    rtol: Any = None,
    atol: Any = None,
    method: str | ButcherTableau | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    step_size: float | None = None,
    n_steps: int | None = None,
    max_steps: int = MAX_STEPS,
    per_sample: bool = False,
    gradient: str = "autograd",
    compile: bool = False,
    return_stats: bool = False,
) -> Any:
    r"""Solve dy/dt = func(t, y), y(t[0]) = y0, at the times t.

    Args:
        func: `func(t, y, *args)` -> dy/dt of y's shape. t is a 0-D tensor in the state's real dtype;
            with `per_sample` it has shape (B, 1, …, 1), so that `t * y` means the same. Its attributes
            callback_step, callback_accept_step and callback_reject_step, where it has them, are called
            with (t, y, step size) at every step; fixed steps know the first one only.
        y0: the state at t[0]: a float or complex tensor of any shape, or tensors of one dtype in tuples,
            lists and dicts, nested at will; func gives its derivative in the same structure.
        t: times, shape (T,), T ≥ 1, increasing or decreasing, floating; times may repeat. With
            `per_sample` also each sample's own, (T, B), all in one direction.
        rtol: relative tolerance of a step's error, for adaptive methods; 1e-7 for float64 states,
            1e-6 for float32. Finer than the dtype resolves, it is clamped with a warning. A tensor is
            per entry of the state, a tuple, list or dict like y0 per tensor.
        atol: absolute tolerance likewise, in the state's unit; 1e-9 and 1e-8.
        method: a name in resode.METHODS or a tableau; "dopri5" by default. bosh3, fehlberg45, dopri5,
            tsit5 and dopri8 are adaptive, the other explicit ones take fixed steps. "rk4" is the
            classic method; torchdiffeq's "rk4" is "rk4_38" here. Other names go to torchdiffeq.
        options: torchdiffeq's, with its meaning. Adaptive: first_step, min_step, max_step,
            max_num_steps (between two outputs), step_t, jump_t (times to end a step at; at jump_t the
            field jumps, and is evaluated on either side of it only), norm (of the error over the
            tolerance: state -> number), dtype (of times), safety, ifactor, dfactor, and controller: "i",
            "pi" (the default), "pi34", "pi42", "h211pi", "pid", or (pcoeff, icoeff, dcoeff) as diffrax and
            torchode name them. Fixed: step_size or
            grid_constructor (a grid over [t[0], t[-1]]), interp ("linear" or "cubic" between its points),
            perturb (evaluate just inside each step).
        event_fn: `event_fn(t, y)` -> tensor; the solve ends where an entry first changes sign or reaches
            0 (of booleans, flips), at once where one is 0 at the start. Pairs of zeros within an eighth of
            a step can be missed. t = (start, any later or earlier time, for the direction). With per_sample
            it returns (B,), and each sample ends at its own event.
        args: further arguments of func.
        step_size: the largest of equal steps between consecutive t, in t's unit; makes every explicit
            method take fixed steps.
        n_steps: the number of equal steps between consecutive t; likewise.
        max_steps: attempted steps (of each sample) over the whole solve, for adaptive methods.
        per_sample: dimension 0 of the state is the batch and each sample has its own time and step.
            The rows must not interact: func(t, y)[i] may depend on y[i] alone.
        gradient: "autograd" through the solver's steps; "checkpoint" the same gradient at one more solve and
            in memory that grows with the square root of the steps; "adjoint" as `odeint_adjoint`, in
            constant memory, up to the tolerance.
        compile: take steps as compiled graphs (torch.compile): seconds at the first call with a field, then
            several times faster where the field is small. Kept for the field across calls, times,
            tolerances and batch sizes; equal to the eager result but for rounding. On the CPU, small systems
            whose rows don't mix are carried to the end in one call of generated C++. A field that can't be
            compiled, an option or callback that compiled steps don't know, fixed steps of an implicit method,
            or an implicit method on more than 16 entries (of a sample) is solved without, with a
            warning.
        return_stats: also give the `Stats`.

    Returns:
        The states at t, shape (T, *y0.shape) (in y0's structure), or (states, Stats). They have
        gradients for y0, t (of adaptive steps to second order) and what func uses; a module's unused
        parameters get 0. With event_fn (time,
        states at t[0] and at that time), the time 0-D and without gradient; see `odeint_event`.

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
    one_of("gradient", gradient, GRADIENTS)
    adjoint = WayBack() if gradient == "adjoint" else None
    settings = SolveSettings(
        method=resolve_method(method),
        rtol=rtol,
        atol=atol,
        options=dict(options or {}),
        step_size=step_size,
        n_steps=n_steps,
        max_steps=max_steps,
        per_sample=per_sample,
        checkpoint=gradient == "checkpoint",
    )
    return _odeint(func, y0, t, settings, event_fn, args, adjoint, compile=compile, return_stats=return_stats)


@checked
def odeint_adjoint(
    func: Callable[..., Any],
    y0: State,
    t: Tensor,
    *,
    rtol: Any = None,
    atol: Any = None,
    method: str | ButcherTableau | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., Any] | None = None,
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_method: str | ButcherTableau | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    args: Sequence[Any] = (),
    step_size: float | None = None,
    n_steps: int | None = None,
    max_steps: int = MAX_STEPS,
    per_sample: bool = False,
    return_stats: bool = False,
) -> Any:
    r"""As `odeint`, with gradients by the adjoint equation: memory does not grow with the steps.

    The gradient is that of the exact solution up to the tolerance of the solve that goes back, and not
    of the discrete one: at loose tolerances it differs from `odeint`'s. It goes to y0, every t, func's
    parameters (0 for unused ones) and tensors in args; it can't be differentiated again.

    Args:
        func: an nn.Module, or any callable with adjoint_params. Its attributes
            callback_step_adjoint (accept_step, reject_step) are told of the steps back.
        y0: as for `odeint`, as the next six.
        t: times.
        rtol: relative tolerance forward.
        atol: absolute tolerance forward.
        method: the method forward.
        options: its options.
        event_fn: solve until an event.
        adjoint_rtol: relative tolerance of the way back; rtol (its least entry) where None.
        adjoint_atol: absolute tolerance likewise.
        adjoint_method: the method of the way back; method where None.
        adjoint_options: its options; those of method without the norm where None. The norm is
            "seminorm" (leave the parameters' gradients out of the step control), or a function of
            (t, y, a, *parameters), with y and a as several tensors each for a tuple state.
        adjoint_params: what gets a gradient beside y0, t and args; func's parameters where None.
        args: further arguments of func; tensors among them get gradients.
        step_size: the largest of equal steps, forward and back.
        n_steps: equal steps between consecutive t, forward and back.
        max_steps: attempted steps forward, and between two outputs on the way back.
        per_sample: as for `odeint`; the way back takes one step for the whole batch.
        return_stats: also give the `Stats`.

    Returns:
        As `odeint`. `stats.nfe_backward` is filled on the way back.

    Raises:
        ValueError, TypeError, SolverError: as `odeint`; func is no module and has no adjoint_params.

    Source:
        Chen et al., Neural Ordinary Differential Equations (2018).

    Example:
        >>> import torch, resode
        >>> field = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(field.weight, -1.0)
        >>> class Decay(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = field
        ...     def forward(self, t, y):
        ...         return self.linear(y)
        >>> y = resode.odeint_adjoint(Decay(), torch.ones(1), torch.tensor([0.0, 1.0]))
        >>> y[-1].sum().backward()
        >>> field.weight.grad  # d e^w / dw at w = −1
        tensor([[0.3679]])
    """
    adjoint = WayBack(adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, adjoint_params)
    settings = SolveSettings(
        method=resolve_method(method),
        rtol=rtol,
        atol=atol,
        options=dict(options or {}),
        step_size=step_size,
        n_steps=n_steps,
        max_steps=max_steps,
        per_sample=per_sample,
    )
    return _odeint(func, y0, t, settings, event_fn, args, adjoint, return_stats=return_stats)


@checked
def odeint_event(
    func: Callable[..., Any],
    y0: State,
    t0: Tensor,
    *,
    event_fn: Callable[..., Any],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> Any:
    r"""Solve until event_fn(t, y) has an entry that changes sign; its time has a gradient.

    Args:
        func: as for `odeint`.
        y0: the state at t0.
        t0: the start, one time; with per_sample also each sample's own, (B,).
        event_fn: `event_fn(t, y)` -> tensor of any shape, differentiable at the event. Its parameters
            get gradients too. With per_sample=True each sample has its own event: it returns (B,), for t of
            shape (B, 1, …, 1), and a sample stays at its event while others go on.
        reverse_time: go back in time.
        odeint_interface: `odeint` or `odeint_adjoint`.
        **kwargs: theirs, such as method, rtol, atol, options, args.

    Returns:
        The event's time, 0-D or (B,), and the states at t0 and there, (2, *y0.shape) or a tuple of them; both
        with first and second derivatives as the event's time moves. With return_stats also the Stats.

    Raises:
        MaxStepsReached: no event.

    Source:
        Chen, Amos & Nickel, Learning Neural Event Functions for Ordinary Differential Equations (2021).

    Example:
        >>> import torch, resode
        >>> fall = lambda t, y: torch.stack([y[1], torch.tensor(-9.81).double()])
        >>> height = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
        >>> t, y = resode.odeint_event(fall, torch.stack([height, 0 * height]), torch.tensor(0.0).double(),
        ...                            event_fn=lambda t, y: y[0])
        >>> t.item(), torch.autograd.grad(t, height)[0].item()  # √(2h/g), 1/√(2gh)
        (1.42784..., 0.07139...)
    """
    per_sample = bool(kwargs.get("per_sample", False))
    if not callable(event_fn):
        raise TypeError(f"event_fn must be a function of (t, y), got {event_fn!r}.")
    if not isinstance(t0, Tensor) or not (t0.numel() == 1 or (per_sample and t0.ndim == 1)):
        got = f"shape {tuple(t0.shape)}" if isinstance(t0, Tensor) else type(t0).__name__
        own = ", or with per_sample one a sample, (B,)" if per_sample else ""
        raise TypeError(f"t0 must be a tensor with one time{own}, got {got}.")
    start = t0.reshape(()) if t0.numel() == 1 else t0
    way = start.detach().abs().clamp(min=1.0)  # 1 alone may be below the rounding of a large time
    t = torch.stack([start, start.detach() + (-way if reverse_time else way)])
    result = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    stats = None
    if kwargs.get("return_stats"):
        result, stats = result
    event_t, path = result
    args = checked_args(kwargs.get("args"))
    field = (lambda t, y: func(t, y, *args)) if args else func
    leaves, structure = tree_flatten(path)
    last: Any = leaves[0][-1] if isinstance(path, Tensor) else tuple(p[-1] for p in leaves)
    if isinstance(path, Tensor):
        event = from_start(event_fn, start.detach().to(event_t), y0, per_sample)
    else:

        def on_structure(call: Callable[..., Any]) -> Callable[..., Any]:
            return lambda t, parts: call(t, tree_unflatten(list(parts), structure))

        given = on_structure(field)
        field = lambda t, parts: tuple(leaves_like(given(t, parts), structure))  # noqa: E731
        event = from_start(on_structure(event_fn), start.detach().to(event_t), tuple(tree_leaves(y0)), False)
    event_t, last = with_event_gradient(field, event, event_t, last, start.expand(event_t.shape))
    ends = (last,) if isinstance(path, Tensor) else last
    leaves = [torch.cat([p[:-1], y[None]]) for p, y in zip(leaves, ends, strict=True)]
    path = tree_unflatten(leaves, structure)
    return ((event_t, path), stats) if stats is not None else (event_t, path)


def _odeint(
    func: Callable[..., Any],
    y0: State,
    t: Tensor,
    settings: SolveSettings,
    event_fn: Callable[..., Any] | None,
    args: Sequence[Any],
    adjoint: WayBack | None,
    *,
    compile: bool = False,
    return_stats: bool,
) -> Any:
    """Checks, makes the state one tensor, solves, and gives back what was asked for."""
    args = checked_args(args)
    check_field(func, args)
    tableau, options, checkpoint = settings.method, settings.options, settings.checkpoint
    if followed() and (checkpoint or adjoint is not None):
        raise TypeError(
            f"gradient={'checkpoint' if checkpoint else 'adjoint'!r} has a way back of its own, which "
            "torch.func's transforms and forward mode do not follow; take gradient='autograd' under them."
        )
    check_state(y0)
    per_sample = settings.per_sample
    if per_sample:
        check_per_sample(y0)
    check_times(t, event_fn is not None, len(y0) if per_sample else None)
    rtol, atol = flat_tolerance("rtol", settings.rtol, y0), flat_tolerance("atol", settings.atol, y0)
    settings = replace(settings, rtol=rtol, atol=atol)
    settings.check()
    _warn_of_a_single_step(settings, t, event_fn is not None)
    state, split = (y0, None) if isinstance(y0, Tensor) else flatten(y0)
    if adjoint is not None and (t.ndim > 1 or (per_sample and event_fn is not None)):
        raise ValueError(
            "the adjoint goes back in one time for all: with each sample's own times or event take "
            "gradient='autograd' or 'checkpoint'."
        )
    if adjoint is None:
        params, state = (), _reached_by(func, state)
    else:
        params = adjoint_params(func, adjoint.params, args)
    callbacks = callbacks_of(func, settings, "", split)
    if checkpoint:
        _check_checkpoint(settings, event_fn)
        settings = replace(settings, checkpoint=torch.is_grad_enabled())
    if compile and _compiles(settings, callbacks, event_fn):
        settings = replace(settings, compile_for=key_of(func))
    told = of_one_dtype(func, state)
    field = (lambda t, y: told(t, y, *args)) if args else told
    event = None
    if event_fn is not None:
        event = from_start(event_fn, t.detach()[0].to(state.device, state.dtype.to_real()), y0, per_sample)
    if split is not None:
        field = FlatField(field, split)
        settings = _norm_on_tuples(settings, split)
        if event is not None:
            whole = event

            def on_parts(t: Tensor, y: Tensor) -> Tensor:
                return whole(t, split(y))

            event = on_parts

    if adjoint is None:
        if event is None:
            event_t, (path, stats) = None, solve(field, state, t, settings, callbacks)
        else:
            event_t, path, stats = solve_to_event(field, state, t, settings, event, callbacks)
    else:
        back = _way_back(settings, tableau, options, adjoint, split)
        callbacks_back = callbacks_of(func, back, "_adjoint", None)
        norm = settings.options.get("norm") or (lambda y: y.abs().square().mean().sqrt())
        job = Adjoint(field, settings, back, params, callbacks, callbacks_back, norm)
        if event is None:
            event_t, (path, stats) = None, job.solve(state, t)
        else:
            event_t, path, stats = job.solve_to_event(state, t, event)
    result = path if split is None else split(path)
    if event_t is not None:
        result = (event_t, result)
    return (result, stats) if return_stats else result


def _reached_by(func: Any, y: Tensor) -> Tensor:
    """The state y + 0, with gradient 0 for all parameters of func, so that unused ones have a gradient."""
    if not (isinstance(func, nn.Module) and torch.is_grad_enabled()):
        return y
    params = [torch.view_as_real(p) if p.is_complex() else p for p in func.parameters() if p.requires_grad]
    return y + sum(p.reshape(-1)[:0].sum().to(y.device, y.dtype) for p in params) if params else y


def _warn_of_a_single_step(settings: SolveSettings, t: Tensor, is_event: bool) -> None:
    given = settings.step_size is not None or settings.n_steps is not None or settings.grid() is not None
    if settings.fixed and not given and len(t) == 2 and not is_event:
        warn_user(
            f"{settings.method.name} takes one step from t[0] to t[1]; give n_steps or step_size.",  # type: ignore[union-attr]
        )


def _check_checkpoint(settings: SolveSettings, event_fn: Any) -> None:
    reason = "event_fn" if event_fn is not None else None
    if isinstance(settings.method, str):
        reason = f"{settings.method!r}, which torchdiffeq solves"
    elif settings.fixed and set(settings.options) - {"norm"}:
        reason = f"options {sorted(settings.options)} (give n_steps or step_size as arguments)"
    if reason:
        raise ValueError(f"gradient='checkpoint' does not go with {reason}; take 'autograd' or 'adjoint'.")


def _compiles(settings: SolveSettings, callbacks: Any, event_fn: Any) -> bool:
    """Whether compiled steps can do what is asked; a warning where they can't."""
    known = () if settings.fixed else COMPILED_OPTIONS
    reasons = [f"options[{name!r}]" for name in settings.options if name not in known]
    if isinstance(settings.method, ButcherTableau) and not settings.method.explicit and settings.fixed:
        reasons.append(f"fixed steps of {settings.method.name}, which is implicit")
    reasons += ["callbacks"] if callbacks is not None else []
    reasons += ["forward mode and torch.func's transforms"] if followed() else []
    reasons += ["event_fn"] if event_fn is not None else []
    reasons += ["gradient='checkpoint'"] if settings.checkpoint and not settings.fixed else []
    reasons += [f"{settings.method!r}, which torchdiffeq solves"] if isinstance(settings.method, str) else []
    if reasons:
        warn_user(
            f"compile=True has no effect with {', '.join(reasons)}; compiled steps know the options "
            f"{', '.join(COMPILED_OPTIONS)} of adaptive methods, and none of fixed steps.",
        )
    return not reasons


def _norm_on_tuples(settings: SolveSettings, split: Callable[[Tensor], Any]) -> SolveSettings:
    """`settings` with its norm, or the one of tuples, taking the state as one vector."""
    if settings.fixed:
        return settings
    norm = settings.options.get("norm") or largest_rms
    return replace(settings, options={**settings.options, "norm": lambda y: norm(split(y))})


def _way_back(
    settings: SolveSettings,
    tableau: ButcherTableau | str,
    options: dict[str, Any],
    adjoint: WayBack,
    split: Callable[[Tensor], Any] | None,
) -> SolveSettings:
    """How the adjoint equation is solved: as the forward one where nothing else is said."""
    given, method = adjoint.options, tableau
    if adjoint.method is not None:
        method = resolve_method(adjoint.method)
    if given is None:
        if method is not tableau and options:
            raise ValueError(
                "with an adjoint_method of its own, adjoint_options must be given too: "
                "options hold for method only."
            )
        given = {name: value for name, value in options.items() if name != "norm"}
    given = dict(given)
    norm = given.get("norm")
    if norm is not None and norm != "seminorm" and not callable(norm):
        raise ValueError(f'the norm in adjoint_options must be "seminorm" or a function, got {norm!r}.')
    if callable(norm) and split is not None:
        given["norm"] = lambda parts: norm(
            (parts[0], *tree_leaves(split(parts[1])), *tree_leaves(split(parts[2])), *parts[3:])
        )
    pair = []
    for name in ("rtol", "atol"):
        value = getattr(adjoint, name)
        value = getattr(settings, name) if value is None else float(value)
        pair.append(float(value.min()) if isinstance(value, Tensor) else value)
    back = replace(
        settings, method=method, rtol=pair[0], atol=pair[1], options=given, per_sample=False, compile_for=None
    )
    back.check()
    return back
