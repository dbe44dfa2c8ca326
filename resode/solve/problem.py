"""What a user passes to a solve: checked, and brought to a state that is one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.checks import warn_user
from resode.solve.control import Callbacks, Tolerance
from resode.solve.options import SolveSettings
from resode.solve.step import all_finite

State = Tensor | tuple[Tensor, ...]

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def check_state(y0: Any) -> None:
    """Refuses a y0 that is no finite floating or complex tensor, or tuple of them of one dtype and device."""
    parts = y0 if isinstance(y0, tuple) else (y0,)
    if not parts:
        raise ValueError("y0 must hold at least one tensor, got an empty tuple.")
    for y in parts:
        if not isinstance(y, Tensor):
            raise TypeError(f"y0 must be a tensor or a tuple of tensors, got {type(y).__name__}.")
        if not (y.is_floating_point() or y.is_complex()):
            raise TypeError(
                f"y0 must be floating or complex, got {y.dtype}. Convert it with y0.float() or .double()."
            )
        if not all_finite(y):
            raise ValueError("y0 must be finite; it holds an infinity or NaN.")
    if len({y.dtype for y in parts}) != 1 or len({y.device for y in parts}) != 1:
        raise ValueError(
            "the tensors of y0 must share one dtype and device, "
            f"got {[(str(y.dtype), str(y.device)) for y in parts]}."
        )


def check_times(t: Any, is_event: bool = False) -> None:
    """Refuses a t that is no strictly monotone, finite, floating vector."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t must be a floating tensor of times, got {got}.")
    if t.ndim != 1 or len(t) == 0:
        raise ValueError(f"t must be one-dimensional with at least one time, got shape {tuple(t.shape)}.")
    if is_event and len(t) != 2:
        raise ValueError(
            f"with event_fn, t must hold two times, the start and one for the direction; got {len(t)}."
        )
    times = t.detach().double().cpu().numpy()
    if not np.isfinite(times).all():
        raise ValueError("t must be finite; it holds an infinity or NaN.")
    steps = np.diff(times)
    if not ((steps > 0).all() or (steps < 0).all()):
        bad = int(((steps <= 0) if steps[0] > 0 else (steps >= 0)).nonzero()[0][0])
        raise ValueError(
            f"t must be strictly increasing or strictly decreasing; t[{bad}]={times[bad]:g} is followed "
            f"by t[{bad + 1}]={times[bad + 1]:g}."
        )


def check_per_sample(y0: State, is_event: bool = False) -> None:
    """Refuses a state without a batch of samples in front."""
    if isinstance(y0, tuple):
        raise ValueError("per_sample=True needs one tensor with the batch first, got a tuple of tensors.")
    if y0.ndim < 2 or y0.shape[0] == 0:
        raise ValueError(
            "per_sample=True needs a state of shape (batch, *state) with at least one sample and two "
            f"dimensions, got {tuple(y0.shape)}."
        )
    if is_event:
        raise ValueError(
            "event_fn stops the whole solve, so per_sample=True has no meaning with it; "
            "set per_sample=False, or solve the samples one by one."
        )


def flatten(y0: tuple[Tensor, ...]) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """A tuple state as one vector, and the way back for states of shape (…, n)."""
    shapes, sizes = [y.shape for y in y0], [y.numel() for y in y0]

    def split(y: Tensor) -> tuple[Tensor, ...]:
        parts = y.split(sizes, dim=-1)
        return tuple(p.reshape(y.shape[:-1] + s) for p, s in zip(parts, shapes, strict=True))

    return torch.cat([y.reshape(-1) for y in y0]), split


def flat_field(
    func: Callable[..., Any], split: Callable[[Tensor], tuple[Tensor, ...]]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The field of a tuple state on the state as one vector."""

    def flat(t: Tensor, y: Tensor) -> Tensor:
        parts = split(y)
        dy = func(t, parts)
        if not isinstance(dy, tuple | list) or [d.shape for d in dy] != [p.shape for p in parts]:
            got = [tuple(d.shape) for d in dy] if isinstance(dy, tuple | list) else type(dy).__name__
            raise ValueError(
                "a field must keep the state's shape: got a tuple of shapes "
                f"{[tuple(p.shape) for p in parts]}, F(x) gave {got}."
            )
        return torch.cat([d.reshape(-1) for d in dy])

    return flat


def flat_tolerance(name: str, value: Any, y0: State) -> Tolerance | None:
    """A tolerance for the state as one tensor: a number, or a tensor that broadcasts to it."""
    if isinstance(value, tuple | list) and isinstance(y0, tuple):
        if len(value) != len(y0):
            raise ValueError(
                f"{name} must have one entry a tensor of y0, which has {len(y0)}; it has {len(value)}."
            )
        real = y0[0].dtype.to_real()
        return torch.cat(
            [
                torch.as_tensor(v, dtype=real, device=y.device).expand(y.shape).reshape(-1)
                for v, y in zip(value, y0, strict=True)
            ]
        )
    if isinstance(value, tuple | list):
        raise TypeError(f"{name} may be a tuple only where y0 is one; got {type(value).__name__}.")
    if isinstance(value, Tensor) and value.ndim:
        shape = (sum(y.numel() for y in y0),) if isinstance(y0, tuple) else tuple(y0.shape)
        try:
            fits = torch.broadcast_shapes(value.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name} must broadcast to the state, of shape {shape}; it has shape {tuple(value.shape)}."
            )
        first = y0[0] if isinstance(y0, tuple) else y0
        return value.to(first.device, first.dtype.to_real())
    return value


def largest_rms(parts: tuple[Tensor, ...]) -> Tensor:
    """The norm of a tuple state: the largest root mean square of its tensors."""
    return torch.stack([p.abs().square().mean().sqrt() for p in parts if p.numel()]).max()


def callbacks_of(
    func: Any, settings: SolveSettings, suffix: str, split: Callable[[Tensor], Any] | None
) -> Callbacks | None:
    """The callbacks that func has as attributes, for states as one tensor; None without any.

    Raises:
        ValueError: there are some, and each sample would have its own steps.
    """
    found: dict[str, Any] = {name: getattr(func, name + suffix, None) for name in CALLBACKS}
    found = {name: call for name, call in found.items() if callable(call)}
    if not found:
        return None
    if settings.per_sample and not suffix:
        raise ValueError(
            f"{', '.join(found)} would be called once a step, and per_sample=True gives each sample its own "
            "steps; set per_sample=False, or remove them."
        )
    unused = [name + suffix for name in found if name != "callback_step"]
    if settings.fixed and unused:
        warn_user(f"fixed steps are neither accepted nor rejected: {unused} are not called.")

    def on_state(call: Any) -> Any:
        as_given = (lambda y: y) if split is None else split
        return lambda t, y, dt: call(t, as_given(y), dt)

    names = {"callback_step": "step", "callback_accept_step": "accept", "callback_reject_step": "reject"}
    return Callbacks(**{names[name]: on_state(call) for name, call in found.items()})
