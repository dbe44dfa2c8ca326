"""Argument checks with one wording, and warnings that point at the user's line."""

from __future__ import annotations

import difflib
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dis import opmap
from functools import partial, wraps
from inspect import Parameter, signature
from numbers import Number
from pathlib import Path
from types import FunctionType, NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

# Between the library and its caller: a module's call, a hook of the way back, a context.
_NOT_THE_USER = ("resode", "torch", "torchdiffeq", "contextlib", "functools")


class WrongType(TypeError, ValueError):
    """An argument is of another type than its annotation's; to be caught as either of its parents."""


class WrongNumber(WrongType):
    """An argument that should be a number is something else."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function; where it fails on an argument of another type than annotated, the error says so.

    What works is not looked at, and an error that the library raises itself comes through as it is. Numbers
    are numpy's and one-element tensors too, sequences arrays and tensors.

    Example:
        >>> @checked
        ... def square(x: float) -> float:
        ...     return x**2
        >>> square([1])
        Traceback (most recent call last):
        resode.checks.WrongType: square takes x as a number, got [1] (list).
    """
    compiling, blame = torch.compiler.is_compiling, partial(_blame, function)

    def call(*arguments, **named):
        try:
            return function(*arguments, **named)
        except Exception as error:
            if not compiling():
                blame(error, arguments, named)
            raise

    # As if it stood in the function's module: doctest passes over what has other globals.
    own = FunctionType(call.__code__, function.__globals__, call.__name__, closure=call.__closure__)
    return wraps(function)(own)


def _blame(function: Any, error: Exception, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """A WrongType where an error came up from inside, and an argument is none of its annotation."""
    if _is_raised_here(error):
        return
    parameters = signature(function).parameters
    in_order = [name for name, p in parameters.items() if p.kind in _IN_ORDER]
    for name, value in (dict(zip(in_order, arguments, strict=False)) | dict(named)).items():
        hint = _hint(function, parameters[name]) if name in parameters else Any
        if hint is not Any and not _is_one(value, hint):
            message = f"{_called(function)} takes {name} as {_words(hint)}, got {described(value)}."
            raise WrongType(message) from error


def _is_raised_here(error: Exception) -> bool:
    """Whether a `raise` of the library made the error, which then has a rule in it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("resode"):
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == opmap["RAISE_VARARGS"]


_IN_ORDER = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def _hint(function: Any, parameter: Parameter) -> Any:
    """What an annotation means; Any where it names what is imported for type checkers alone."""
    kind, hint = parameter.kind, parameter.annotation
    if kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) or hint is Parameter.empty:
        return Any
    try:
        return eval(hint, function.__globals__) if isinstance(hint, str) else hint
    except NameError:
        return Any


def _is_one(value: Any, hint: Any) -> bool:
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        return any(_is_one(value, part) for part in get_args(hint))
    if origin in (float, int, complex):
        if isinstance(value, Tensor | np.ndarray):
            return (
                value.size == 1
                if isinstance(value, np.ndarray)
                else value.numel() == 1 and _has_values(value)
            )
        return isinstance(value, Number | np.generic) or hasattr(type(value), "__index__")
    if origin is bool:
        return isinstance(value, bool | np.bool_)
    if origin is Tensor:
        return isinstance(value, Tensor) and _has_values(value)
    if origin in (Sequence, Iterable, list, tuple) or getattr(origin, "__name__", "") == "Iterable":
        return hasattr(value, "__iter__") and not isinstance(value, str | bytes | Mapping | type)
    if origin is Callable or getattr(origin, "__name__", "") == "Callable":
        return callable(value)
    if not isinstance(origin, type) or getattr(origin, "_is_protocol", False):
        return True
    return isinstance(value, origin)


def _has_values(x: Tensor) -> bool:
    return x.layout == torch.strided and x.device.type != "meta"


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        words = dict.fromkeys(map(_words, get_args(hint)))
        return " or ".join(words)
    origin = get_origin(hint) or hint
    return _WORDS.get(origin) or f"a {getattr(origin, '__name__', origin)}"


_WORDS: dict[Any, str] = {
    float: "a number", int: "a whole number", complex: "a number", bool: "True or False", str: "text",
    Path: "a path", NoneType: "None", Tensor: "a dense tensor with values", nn.Module: "a torch module",
    Callable: "a function", Sequence: "a sequence", Iterable: "a sequence", Mapping: "a mapping",
}  # fmt: skip


def _called(function: Any) -> str:
    return str(function.__qualname__).removesuffix(".__init__").rpartition(".")[2]


def described(value: Any) -> str:
    """What came, in a few words for a message; its type where that may be what is wrong."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} ({value.dtype}, {value.layout}, {value.device})"
    text = repr(value).partition("\n")[0]
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({type(value).__name__})"


def check_whole(name: str, value: Any, least: int | None = None) -> int:
    """The value as an int, where it is a whole number of at least `least`.

    Raises:
        WrongNumber: not an integer (a bool is none).
        ValueError: below `least`.

    Example:
        >>> check_whole("depth", 3, 1)
        3
    """
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        at_least = "" if least is None else f" of at least {least}"
        raise WrongNumber(f"{name} must be a whole number{at_least}, got {value!r}.")
    try:
        number = value.__index__()
    except TypeError as error:  # a tensor or an array has the method, and is none
        raise WrongNumber(f"{name} must be a whole number, got {described(value)}.") from error
    if least is not None and number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return number


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """The value as a float, where it is finite and within the bounds that are given.

    Args:
        name: of the argument, for the message.
        value: a real number; a bool or a string is none.
        least: the smallest value allowed.
        above: what the value must exceed, instead.
        most: the largest value allowed.
        below: what the value must stay under, instead.

    Raises:
        WrongNumber: not a number.
        ValueError: infinite, nan, or out of bounds.

    Example:
        >>> check_number("momentum", 0, least=0, below=1)
        0.0
    """
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    words = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise WrongNumber(f"{name} must be a number{words and ' ' + words}, got {value!r}.")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # of several numbers, or complex
        raise WrongNumber(
            f"{name} must be a number{words and ' ' + words}, got {described(value)}."
        ) from error
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite{words and ' and ' + words}, got {value!r}.")
    exact = value if isinstance(value, int) else number  # 2⁶³ − 1 is 2⁶³ as a float
    inside = (
        (least is None or exact >= least)
        and (above is None or exact > above)
        and (most is None or exact <= most)
        and (below is None or exact < below)
    )
    if not inside:
        raise ValueError(f"{name} must be {words}, got {value!r}.")
    return number


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """' Did you mean x or y?' where a valid name is close, else an empty string."""
    close = difflib.get_close_matches(str(name).lower(), list(valid), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def known(kind: str, name: str, valid: Iterable[str], where: str = "") -> str:
    """The name of a method, recipe, setting, …, where there is one called so.

    Raises:
        ValueError: there is none; the message lists them, after `where` it was asked for.
    """
    names = list(valid)
    if name not in names:
        raise ValueError(f"{where}no {kind} {name!r}.{did_you_mean(name, names)} Valid: {', '.join(names)}.")
    return name


def one_of(name: str, value: Any, valid: Iterable[Any]) -> Any:
    """The value, where it is one of the valid ones.

    Raises:
        ValueError: it is not; the message lists them.
    """
    names = list(valid)
    if not any(isinstance(value, type(known)) and value == known for known in names):
        words = [str(known) for known in names]
        raise ValueError(
            f"{name} must be one of {', '.join(words)}; got {value!r}.{did_you_mean(value, words)}"
        )
    return value


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called the library, however deep inside it this is."""
    level, frame = 1, sys._getframe(0)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level if frame is not None else 2)


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: Python's, or one of torch's many.

    Example:
        >>> lacks_memory(RuntimeError("could not create a primitive"))  # all that oneDNN says
        True
    """
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|could not create a (primitive|memory)"
)
"""In the errors of torch's CPU allocator, of oneDNN and of CUDA."""
