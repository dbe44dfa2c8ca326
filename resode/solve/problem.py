"""What a user passes to a solve: checked, and brought to a state that is one tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)

from resode.calls import kind_of, mixed_dtypes
from resode.checks import warn_user
from resode.solve.control import Callbacks, Tolerance
from resode.solve.host import decided
from resode.solve.options import SolveSettings
from resode.solve.step import all_finite

State = Tensor | tuple[Any, ...] | list[Any] | dict[Any, Any]
"""A tensor, or tensors of one dtype in tuples, lists and dicts, nested at will (torch's pytrees)."""

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def check_state(y0: Any) -> None:
    """Refuses a y0 that is no finite floating or complex tensor, or several of one dtype and device."""
    leaves = [(f"y0{keystr(path)}", y) for path, y in tree_flatten_with_path(y0)[0]]
    if not leaves:
        raise ValueError(f"y0 must hold at least one tensor, got an empty {type(y0).__name__}.")
    for name, y in leaves:
        if not isinstance(y, Tensor):
            raise TypeError(
                f"y0 must be a tensor, or tensors in tuples, lists and dicts; {name} is a {kind_of(y)}."
            )
        if not (y.is_floating_point() or y.is_complex()):
            raise TypeError(
                f"y0 must be floating or complex, got {y.dtype} as {name}. Convert it with {name}.double()."
            )
        if not all_finite(y):
            raise ValueError(f"y0 must be finite; {name} holds an infinity or NaN.")
    if len({(y.dtype, y.device) for _, y in leaves}) != 1:
        raise ValueError(
            "the tensors of y0 must share one dtype and device, got "
            f"{', '.join(f'{name} {y.dtype} on {y.device}' for name, y in leaves)}."
        )


def checked_args(args: Any) -> tuple[Any, ...]:
    """Further arguments of func, refused where they are no tuple or list; () for None.

    Example:
        >>> checked_args([1.5])
        (1.5,)
    """
    if args is None:
        return ()
    if not isinstance(args, tuple | list):
        raise TypeError(
            f"args must be a tuple of func's further arguments, got {type(args).__name__}. For a single one "
            "write args=(value,)."
        )
    return tuple(args)


OWN_TIMES = (
    "Solve the batch in one call: t of shape (T, B) with per_sample=True gives each sample its own times."
)


def check_field(func: Any, args: tuple[Any, ...] = ()) -> None:
    """Refuses a func that cannot be called as func(t, y, *args), by its signature where it has one.

    Example:
        >>> check_field(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        TypeError: func is called as func(t, y), and Linear.forward takes input alone. Wrap it,
        lambda t, y: func(y); or take resode.ResidualStack, whose fields are F(x).
    """
    if torch.compiler.is_compiling() or not callable(func):
        return
    module = isinstance(func, nn.Module)
    code = getattr(type(func).forward if module else func, "__code__", None)
    if code is not None and code.co_argcount == 2 + len(args) + module and not code.co_kwonlyargcount:
        return  # a signature takes 30 µs
    try:
        parameters = inspect.signature(func.forward if module else func).parameters.values()
    except (TypeError, ValueError):  # compiled, or written in C
        return
    kinds = [p.kind for p in parameters]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed, given = sum(p.default is p.empty for p in named), 2 + len(args)
    if needed <= given and (given <= len(named) or inspect.Parameter.VAR_POSITIONAL in kinds):
        return
    kind = type(func).__name__
    name = f"{kind}.forward" if module else getattr(func, "__name__", kind)
    takes = ", ".join(p.name for p in named) or "nothing"
    called = f"func is called as func(t, y{', *args' if args else ''})"
    if needed > given:
        raise TypeError(f"{called}, and {name} takes {takes}. Pass the others by args=, or wrap it.")
    if len(named) == 1:
        raise TypeError(
            f"{called}, and {name} takes {takes} alone. Wrap it, lambda t, y: func(y); or take "
            "resode.ResidualStack, whose fields are F(x)."
        )
    further = "1 further argument" if len(args) == 1 else f"{len(args)} further arguments"
    raise TypeError(f"{called}, with {further}, and {name} takes {takes}.")


def of_one_dtype(func: Any, y: Tensor) -> Any:
    """func; where its weights have another dtype than the state, one that says so where that fails."""
    weights = next(func.parameters(), None) if isinstance(func, nn.Module) else None
    if weights is None or weights.dtype == y.dtype or torch.compiler.is_compiling():
        return func

    def explained(*inputs: Any) -> Any:
        try:
            return func(*inputs)
        except RuntimeError as error:
            if mixed := mixed_dtypes(error, func, y):
                raise mixed from error
            raise

    return explained


def check_times(t: Any, is_event: bool = False, batch: int | None = None) -> None:
    """Refuses a t that is no monotone, finite, floating vector, or (T, batch) of each sample's own times."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t must be a floating tensor of times, got {got}.")
    own = batch is not None and t.ndim == 2
    if len(t.shape) == 0 or len(t) == 0 or not (own or t.ndim == 1):
        also = "" if batch is None else f", or of shape (T, {batch})"
        raise ValueError(
            f"t must be one-dimensional with at least one time{also}, got shape {tuple(t.shape)}."
        )
    if own and t.shape[1] != batch:
        raise ValueError(
            f"t of shape (T, B) holds each sample's own times: the state has {batch} samples, "
            f"t {t.shape[1]} columns."
        )
    if is_event and len(t) != 2:
        raise ValueError(
            f"with event_fn, t must hold two times, the start and one for the direction; got {len(t)}."
        )
    times = np.array(decided(t, "the solver goes by the values of t", OWN_TIMES), np.float64)
    if not np.isfinite(times).all():
        raise ValueError("t must be finite; it holds an infinity or NaN.")
    steps = np.diff(times, axis=0) if own else np.diff(times)[:, None]
    ups, downs = np.atleast_1d((steps > 0).any(0), (steps < 0).any(0))  # of each column
    if (ups & downs).any():
        i = int(np.argmax(ups & downs))
        row = times.reshape(len(times), -1)[:, i]
        first = steps[:, i][steps[:, i] != 0][0]
        bad = int(np.argmax(steps[:, i] * first < 0))
        which = f" of sample {i}" if own else ""
        raise ValueError(
            f"t must be increasing or decreasing; t[{bad}]={row[bad]:g}{which} is followed "
            f"by t[{bad + 1}]={row[bad + 1]:g}."
        )
    if ups.any() and downs.any():
        raise ValueError(
            f"all samples must go in one direction of time: sample {int(np.argmax(ups))} goes forward, "
            f"sample {int(np.argmax(downs))} back. Solve them in two calls."
        )
    if is_event and not np.all(ups | downs):
        raise ValueError("with event_fn, the second time gives the direction and must differ from the first.")


def check_per_sample(y0: State) -> None:
    """Refuses a state without a batch of samples in front."""
    if not isinstance(y0, Tensor):
        raise ValueError(
            f"per_sample=True needs one tensor with the batch first, got a {type(y0).__name__} of tensors."
        )
    if y0.ndim < 2 or y0.shape[0] == 0:
        raise ValueError(
            "per_sample=True needs a state of shape (batch, *state) with at least one sample and two "
            f"dimensions, got {tuple(y0.shape)}."
        )


@dataclass(frozen=True)
class Split:
    """The way back from a state as one vector, (…, n), to the structure that was given.

    Args:
        shapes: of its tensors.
        structure: how they are nested.
    """

    shapes: tuple[torch.Size, ...]
    structure: TreeSpec

    def __reduce__(self) -> Any:
        # By an example: torch's structures do not pickle without a warning.
        return _split_of, (self(torch.zeros(sum(s.numel() for s in self.shapes))),)

    def __call__(self, y: Tensor) -> Any:
        """The tensors, each (…, *shape), in their structure."""
        parts = y.split([s.numel() for s in self.shapes], dim=-1)
        whole = [p.reshape(y.shape[:-1] + s) for p, s in zip(parts, self.shapes, strict=True)]
        return tree_unflatten(whole, self.structure)


def flatten(y0: State) -> tuple[Tensor, Split]:
    """A state of several tensors as one vector, and the way back."""
    leaves, structure = tree_flatten(y0)
    return torch.cat([y.reshape(-1) for y in leaves]), Split(tuple(y.shape for y in leaves), structure)


def _split_of(y0: State) -> Split:
    return flatten(y0)[1]


def leaves_like(y: Any, structure: TreeSpec) -> list[Any]:
    """The tensors of y in the order of `structure`; a dict's keys may come in another.

    Raises:
        ValueError: y has another structure.
    """
    if isinstance(y, list) and structure.type is tuple:
        y = tuple(y)  # as torchdiffeq lets it pass
    return structure.flatten_up_to(y)


@dataclass(frozen=True)
class FlatField:
    """The field of a state of several tensors, on the state as one vector.

    Args:
        func: the field of (t, y), y in its structure.
        split: from the vector to it.
    """

    func: Callable[..., Any]
    split: Split

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """func(t, y) as one vector."""
        parts = self.split(y)
        dy = self.func(t, parts)
        try:
            given = leaves_like(dy, self.split.structure)
        except ValueError:
            raise ValueError(
                "a field must give a derivative of the state's structure: the state is "
                f"{_outline(parts)}, F(x) gave {_outline(dy)}."
            ) from None
        got = [tuple(d.shape) if isinstance(d, Tensor) else type(d).__name__ for d in given]
        if got != [tuple(s) for s in self.split.shapes]:
            raise ValueError(
                f"a field must keep the state's shape: got a {type(parts).__name__} of shapes "
                f"{[tuple(s) for s in self.split.shapes]}, F(x) gave {got}."
            )
        if {d.dtype for d in given} != {y.dtype} and not torch.is_autocast_enabled(y.device.type):
            raise TypeError(  # torch.cat would promote what a single tensor is refused for
                f"a field must keep the state's dtype: the state is {y.dtype}, F(x) gave "
                f"{[d.dtype for d in given]}. Convert the field's parameters and constants with .to(x.dtype)."
            )
        return torch.cat([d.reshape(-1) for d in given])


def _outline(y: Any) -> str:
    """The structure of a state: its tensors by their shapes."""
    named = tree_flatten_with_path(y)[0]
    kinds = [tuple(d.shape) if isinstance(d, Tensor) else type(d).__name__ for _, d in named]
    parts = [f"{keystr(path)} {kind}".strip() for (path, _), kind in zip(named, kinds, strict=True)]
    return f"a {type(y).__name__} ({', '.join(parts)})"


def flat_tolerance(name: str, value: Any, y0: State) -> Tolerance | None:
    """A tolerance for the state as one tensor: a number, or a tensor that broadcasts to it."""
    if isinstance(value, tuple | list | dict):
        if isinstance(y0, Tensor):
            raise TypeError(f"{name} may be a {type(value).__name__} only where y0 is one; y0 is a tensor.")
        leaves, structure = tree_flatten(y0)
        try:
            given = leaves_like(value, structure)
        except ValueError:
            raise ValueError(
                f"{name} must have one entry a tensor of y0, in its structure, which has {len(leaves)}; "
                f"it has {len(tree_leaves(value))}."
            ) from None
        real = leaves[0].dtype.to_real()
        return torch.cat(
            [
                torch.as_tensor(v, dtype=real, device=y.device).expand(y.shape).reshape(-1)
                for v, y in zip(given, leaves, strict=True)
            ]
        )
    if isinstance(value, Tensor) and value.ndim:
        leaves = tree_flatten(y0)[0]
        shape = tuple(y0.shape) if isinstance(y0, Tensor) else (sum(y.numel() for y in leaves),)
        try:
            fits = torch.broadcast_shapes(value.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name} must broadcast to the state, of shape {shape}; it has shape {tuple(value.shape)}."
            )
        return value.to(leaves[0].device, leaves[0].dtype.to_real())
    return value


def largest_rms(parts: Any) -> Tensor:
    """The norm of a state of several tensors: the largest root mean square of one."""
    return torch.stack([p.abs().square().mean().sqrt() for p in tree_leaves(parts) if p.numel()]).max()


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
