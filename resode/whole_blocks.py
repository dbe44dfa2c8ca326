"""A whole block given where its branch is wanted: F(x) = x + G(x), which a step would add to x again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resode.calls import hooked
from resode.checks import warn_user

_ADDS = ("add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__", "sub_", "__isub__", "subtract")
_WEIGHTED = re.compile(r"^(conv\w*|_conv\w*|linear|bilinear|\w*mm|\w*matmul\w*|mv|einsum)$")
_RELUS = ("relu", "relu_")


class _Watch(TorchFunctionMode):
    """Which results are an input of a field with factor 1 plus something, and whether weights are used."""

    def __init__(self) -> None:
        super().__init__()
        self.input: Any = None
        self.sums: list[Tensor] = []
        self.weighted = False

    def start(self, x: Any) -> None:
        """A field is called with x."""
        self.input, self.sums, self.weighted = x, [], False

    def whole(self, y: Any) -> bool:
        """Whether what it returned, up to a ReLU, is x plus a term with weights."""
        return self.weighted and any(y is s for s in self.sums)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if _WEIGHTED.match(name) or any(isinstance(a, nn.Parameter) and a.ndim > 1 for a in args):
            self.weighted = True
        if name in _ADDS and len(args) > 1 and all(isinstance(a, Tensor) for a in args[:2]):
            second = args[1] is self.input and "sub" not in name and kwargs.get("alpha", 1) == 1
            if args[0] is self.input or second:
                self.sums.append(result)
        elif name in _RELUS and any(args[0] is s for s in self.sums):
            self.sums.append(result)
        return result


def _warn(what: str, how: str) -> None:
    warn_user(
        f"{what} returns its own input plus a term with weights, F(x) = x + G(x), as a whole residual block "
        f"does. A field is the branch alone: a step adds ηF(x) to x itself. If x is not part of F, {how}"
    )


def called(field: Callable[[Tensor], Any], x: Tensor) -> Any:
    """F(x), with a warning where F looks like a whole block.

    Example:
        >>> import warnings
        >>> w = torch.eye(2)
        >>> with warnings.catch_warnings(record=True) as found:
        ...     warnings.simplefilter("always")
        ...     for f in (lambda x: x + x @ w, lambda x: x @ w - x, lambda x: x - x**3):
        ...         _ = called(f, torch.ones(1, 2))
        >>> len(found)
        1
    """
    with _Watch() as watch:
        watch.start(x)
        y = field(x)
    if watch.whole(y):
        _warn("the field", "pass G, for example as lambda x: block(x) - x.")
    return y


@contextmanager
def warned(fields: Iterable[nn.Module]) -> Iterator[None]:
    """Within it the fields' calls are looked at, and the first that looks like a whole block is warned of."""
    found: list[str] = []
    watch, blocks = _Watch(), dict(enumerate(fields))

    def before(i: int, args: Any, kwargs: Any) -> None:
        watch.start(args[-1] if args else None)  # of (t, x) the state

    def after(i: int, args: Any, kwargs: Any, y: Any) -> None:
        if watch.whole(y):
            found.append(f"block {i}, {type(blocks[i]).__name__},")

    with hooked(blocks, before, after), watch:
        yield
    if found:
        _warn(
            found[0],
            "give a module whose forward returns G(x): the layers of the branch, without the addition.",
        )


def first_time(owner: Any) -> bool:
    """Whether this is the first time that an object is asked about, outside compilation and export."""
    if torch.compiler.is_compiling() or getattr(owner, "_looked_at", False):
        return False
    owner._looked_at = True
    return True
