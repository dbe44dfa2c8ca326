"""Networks whose graph `torch.fx` draws: what depends on a tensor's shape is one node of it.

`torch.fx.symbolic_trace` calls a network with symbols that have no shape, so an `if` on one fails. A check
becomes a call in the graph, made when the graph runs and with the same message; so does a module that
decides by what it sees, such as a solver's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.fx import Proxy

Called = TypeVar("Called", bound=Callable[..., Any])


def one_node(function: Called) -> Called:
    """A function of tensors, numbers and text that is a single node where any of them is a symbol."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        symbol = next((value for value in (*args, *kwargs.values()) if isinstance(value, Proxy)), None)
        if symbol is None:
            return function(*args, **kwargs)
        return symbol.tracer.create_proxy("call_function", call, args, kwargs)

    return call  # pyright: ignore[reportReturnType]


def one_module(forward: Called) -> Called:
    """A module's forward that is a single node, the module's call, where its input is a symbol."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        symbol = next((value for value in (*args, *kwargs.values()) if isinstance(value, Proxy)), None)
        if symbol is None:
            return forward(self, *args, **kwargs)
        path = symbol.tracer.path_of_module(self)  # pyright: ignore[reportAttributeAccessIssue]
        if not path:
            raise TypeError(
                f"a {type(self).__name__} is one node of a graph, and here it is the whole: trace a network "
                "around it, such as torch.nn.Sequential(module)."
            )
        return symbol.tracer.create_proxy("call_module", path, args, kwargs)

    return call  # pyright: ignore[reportReturnType]
