"""Compiled functions, one for each field and each choice of settings, kept from call to call."""

from __future__ import annotations

import re
import types
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

SMALL = 2**16
"""States up to this many entries are served by C++ between the kernels."""

_KEPT: weakref.WeakKeyDictionary[Any, dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()


def key_of(func: Callable[..., Any]) -> Any:
    """What compiled functions are kept for: a module, or the code that functions of one text share."""
    if isinstance(func, torch.nn.Module):
        return func
    code = getattr(func, "__code__", None) or getattr(getattr(func, "__func__", None), "__code__", None)
    return type(func) if code is None else code


def compiled_for(
    make: Callable[..., Callable[..., Any]],
    key: Any,
    x: Tensor,
    *settings: Any,
    backend: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """`make(*settings)`, compiled for states like x, one for each field and each choice of settings.

    Args:
        make: gives the function.
        key: the field, see `key_of`.
        x: a state.
        settings: what `make` is given.
        backend: what compiles its graphs, in place of torch's own; it must take all that a field does to be
            in the graph, so other effects are refused.
    """
    options: dict[str, Any] = {"guard_filter_fn": _guards_of_the_field}
    if x.device.type == "cpu" and backend is None:
        # Small states spend their time between kernels, and in vectors that a short last dimension leaves
        # mostly empty.
        options["cpp_wrapper"] = x.numel() <= SMALL
        if x.ndim and x.shape[-1] < 8:
            options["cpp.simdlen"] = 1
    key_of_function = (make, *settings, tuple(options.items()), _global_hooks())
    kept = _KEPT.setdefault(key, {})
    if key_of_function not in kept:
        function = make(*settings)
        # Compiled graphs are kept by code object, a few for each: every field gets a code object of its own.
        own = types.FunctionType(
            function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
        )
        kind: dict[str, Any] = {"options": options} if backend is None else {"backend": backend}
        kept[key_of_function] = partial(
            _looking, torch.compile(own, fullgraph=True, **kind), backend is not None
        )
    return kept[key_of_function]


def _looking(compiled: Callable[..., Any], pure: bool, *args: Any) -> Any:
    """compiled(*args), seeing hooks of modules that have come or gone since, which torch skips by default.

    With `pure`, a function that changes objects of Python, as by counting its calls, is refused.
    """
    from torch._dynamo import config as dynamo  # seconds, which only who compiles should spend

    settings: dict[str, Any] = {"skip_nnmodule_hook_guards": False}
    if pure:
        settings["side_effect_replay_policy"] = "error"
    before = {name: getattr(dynamo, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(dynamo, name, value)
        return compiled(*args)
    finally:
        for name, value in before.items():
            setattr(dynamo, name, value)


def _global_hooks() -> tuple[int, ...]:
    """Which hooks all modules have, at which no guard looks; a hook's number is never given again."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return tuple(n for kind in kinds for n in getattr(torch.nn.modules.module, f"_global_{kind}"))


def _guards_of_the_field(guards: Sequence[Any]) -> list[bool]:
    """Which guards to check at a call: not those of our own method and control, which can't change."""
    return [re.match(r"(tableau|control|rule)(\W|$)", guard.name) is None for guard in guards]
