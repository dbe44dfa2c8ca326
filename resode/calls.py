"""How a network and its modules are called: with what, in which order, and which modules a pattern names."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def call(model: nn.Module, x: Any) -> Any:
    """The model's output for a tensor, a tuple of arguments, or a mapping."""
    if isinstance(x, Mapping):
        parameters = inspect.signature(model.forward).parameters
        takes = (
            inspect.Parameter.VAR_KEYWORD in {p.kind for p in parameters.values()} and len(parameters) == 1
        )
        return model(**x) if takes or any(name in parameters for name in x) else model(x)
    if not isinstance(x, tuple | list):
        return model(x)
    try:
        inspect.signature(model.forward).bind(*x)
    except TypeError as error:
        raise TypeError(
            f"x is a {type(x).__name__} of {len(x)}, so the model is called with {len(x)} arguments, and its "
            f"forward says: {error}. Pass a pair of inputs and targets as two arguments, and one argument "
            "alone as it is."
        ) from error
    return model(*x)


def kind_of(x: Any) -> str:
    """What came where a floating tensor was wanted, and what to do about it.

    Example:
        >>> import torch
        >>> kind_of(torch.ones(1, dtype=torch.int64)), kind_of(None)
        ('torch.int64: convert it with x.float()', 'NoneType')
    """
    if isinstance(x, Tensor):
        return f"{x.dtype}: convert it with x.float()" if not x.is_complex() else str(x.dtype)
    array = hasattr(x, "__array__") or isinstance(x, list | tuple)
    name = f"{'numpy.' if type(x).__module__ == 'numpy' else ''}{type(x).__name__}"
    dtype = getattr(x, "dtype", None)
    of = "" if dtype is None else f" of {dtype}"
    return f"{name}{of}{': convert it with torch.as_tensor(x)' if array else ''}"


def mixed_dtypes(error: Exception, field: Any, x: Tensor) -> TypeError | None:
    r"""What to say where torch refused a field because its weights have another dtype than the state.

    Example:
        >>> import torch
        >>> x, field = torch.ones(1, 2, dtype=torch.float64), nn.Linear(2, 2)
        >>> print(mixed_dtypes(RuntimeError("mat1 and mat2 must have the same dtype"), field, x))
        a field and its state have one dtype: Linear has float32 weights, the state is float64. Convert
        the state, x.to(torch.float32), or the field, field.to(torch.float64).
    """
    if not isinstance(field, nn.Module) or not _MIXED.search(str(error)):
        return None
    dtypes = {p.dtype for p in field.parameters() if p.is_floating_point()} - {x.dtype}
    if not dtypes:
        return None
    weights, state = (str(d).removeprefix("torch.") for d in (dtypes.pop(), x.dtype))
    return TypeError(
        f"a field and its state have one dtype: {type(field).__name__} has {weights} weights, the state is "
        f"{state}. Convert the state, x.to(torch.{weights}), or the field, field.to(torch.{state})."
    )


_MIXED = re.compile(r"same dtype|should be the same|scalar type")
"""In what torch says of a matrix product, a convolution and other operations."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings (Hugging Face's outputs are mappings) and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for member in dataclasses.fields(value):
            yield from tensors_in(getattr(value, member.name))


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Nested tuples, lists (as tuples) and mappings with every tensor changed.

    Example:
        >>> import torch
        >>> mapped([1, {"x": torch.ones(2)}], torch.neg)
        (1, {'x': tensor([-1., -1.])})
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(item, change) for name, item in value.items()}
    return tuple(mapped(item, change) for item in value) if isinstance(value, tuple | list) else value


def is_floating(value: Any) -> bool:
    """Whether a value is a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def within(name: str, outer: str | Iterable[str] | None) -> bool:
    """Whether a module is another, or one of several, or lies within; all do in the model "", and in None.

    Example:
        >>> within("layer1.0.conv", "layer1"), within("layer10", ["layer1", "layer2"])
        (True, False)
    """
    if outer is None:
        return True
    outers = [outer] if isinstance(outer, str) else outer
    return any(not o or name == o or name.startswith(o + ".") for o in outers)


def matching(model: nn.Module, blocks: str | Sequence[str] | None) -> set[str] | None:
    """The names of the modules that patterns (* and ? stand for anything but a dot) name; None for None.

    Raises:
        ValueError: a pattern that names none; the message lists modules.
    """
    if blocks is None:
        return None
    patterns = [blocks] if isinstance(blocks, str) else list(blocks)
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for pattern in patterns:
        expression = re.escape(pattern).replace(r"\*", r"[^.]*").replace(r"\?", "[^.]")
        matching = {name for name in names if re.fullmatch(expression, name)}
        if not matching:
            shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
            raise ValueError(f"blocks={pattern!r} names no module of the model. Its modules: {shown}.")
        found |= matching
    return found


@contextmanager
def hooked(
    modules: Mapping[Any, nn.Module],
    before: Callable[..., None] | None = None,
    after: Callable[..., None] | None = None,
    *,
    always: bool = False,
) -> Iterator[None]:
    """Within it before(key, args, kwargs) and after(key, args, kwargs, output) go with each modules' call.

    Args:
        modules: by any keys.
        before: called before forward.
        after: called after it; with `always` also where forward raises.
        always: see `after`.
    """
    with ExitStack() as hooks:
        for key, module in modules.items():
            if before is not None:

                def enter(module: nn.Module, args: Any, kwargs: Any, key: Any = key) -> None:
                    before(key, args, kwargs)

                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            if after is not None:

                def leave(module: nn.Module, args: Any, kwargs: Any, output: Any, key: Any = key) -> None:
                    after(key, args, kwargs, output)

                handle = module.register_forward_hook(leave, with_kwargs=True, always_call=always)
                hooks.callback(handle.remove)
        yield


Version = tuple[Any, int]
"""What a tensor is at a moment: its place in autograd's graph, or, without gradients, its id and version."""


def version(x: Any) -> Version:
    """The node that made a tensor, and which of its outputs it is; without one, its id and its version.

    An id is the tensor's as long as that is held.
    """
    if not isinstance(x, Tensor) or x.is_inference():
        return id(x), 0
    return (id(x), x._version) if x.grad_fn is None else (x.grad_fn, x.output_nr)


def flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """A call's arguments in a row, and how they were nested."""
    return pytree.tree_flatten((args, dict(sorted(kwargs.items()))))


@dataclass(eq=False)
class ModuleCall:
    """One call of a module, whose state is the first floating-point tensor that it takes.

    Args:
        name: the module's.
        module: the module.
        args: positional arguments, which may have been written into since.
        kwargs: the others, likewise.
        state: the state among them.
        at_x: what the state was before the call.
        x: its copy, where copies were asked for, else the state.
        output: what came out.
        y: the first tensor of the output, or a copy, likewise.
        at_y: what it was after the call.
        count: how often the module was called, where that has been counted.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Tensor | None
    at_x: Version
    x: Tensor | None
    output: Any = None
    y: Tensor | None = None
    at_y: Version = (None, 0)
    count: int = 1

    def leaves(self) -> tuple[list[Any], Any]:
        """The arguments in a row, and how they were nested."""
        return flat(self.args, self.kwargs)

    def tensors(self) -> list[Tensor]:
        """The arguments that are tensors, in a row."""
        return [leaf for leaf in self.leaves()[0] if isinstance(leaf, Tensor)]

    def beside(self) -> tuple[list[Any], int, Any]:
        """The arguments in a row, the place of the state among them, and how they were nested."""
        leaves, nested = pytree.tree_flatten((self.args, self.kwargs))
        return leaves, next(i for i, leaf in enumerate(leaves) if leaf is self.state), nested

    def again(self, x: Tensor) -> Any:
        """The module's output for another state, all else as it was."""
        leaves, place, nested = self.beside()
        args, kwargs = pytree.tree_unflatten([*leaves[:place], x, *leaves[place + 1 :]], nested)
        return self.module(*args, **kwargs)

    @property
    def keeps_shape(self) -> bool:
        """Whether a state comes out as large as it came in."""
        return self.x is not None and self.y is not None and self.x.shape == self.y.shape

    @property
    def differentiable(self) -> bool:
        """Whether both states lie in autograd's graph."""
        return not any(isinstance(source, int) for source, _ in (self.at_x, self.at_y))

    def check_shape(self) -> None:
        """Raise a ValueError where it is no block by itself, as those named by blocks= must be."""
        if self.x is None or self.y is None:
            raise ValueError(f"a module of blocks= must take a state and give a state: {self.name} does not.")
        if self.x.shape != self.y.shape:
            raise ValueError(
                f"a block of blocks= must keep the state's shape: {self.name} maps {tuple(self.x.shape)} to "
                f"{tuple(self.y.shape)}. Leave it out of the pattern."
            )


@contextmanager
def recorded(modules: Mapping[str, nn.Module], *, copies: bool = False) -> Iterator[list[ModuleCall]]:
    """The calls of modules within it, in the order in which they return.

    Args:
        modules: by their names.
        copies: keep copies of states, which the network may write into.
    """
    found: list[ModuleCall] = []
    open_calls: list[ModuleCall] = []

    def kept(x: Tensor | None) -> Tensor | None:
        return x.detach().clone() if copies and x is not None else x

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = next(filter(is_floating, tensors_in((args, kwargs))), None)
        made = ModuleCall(name, modules[name], args, kwargs, state, version(state), kept(state))
        open_calls.append(made)

    def leave(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        made = open_calls.pop()
        y = next(tensors_in(output), None)
        made.output, made.y, made.at_y = output, kept(y), version(y)
        found.append(made)

    with hooked(modules, enter, leave):
        yield found
