"""Argument checks with one wording, and warnings that point at the user's line."""

from __future__ import annotations

import difflib
import math
import re
import sys
import warnings
from collections.abc import Iterable
from typing import Any

# Between the library and its caller: a module's call, a hook of the way back, a context.
_NOT_THE_USER = ("resode", "torch", "torchdiffeq", "contextlib", "functools")


class WrongNumber(TypeError, ValueError):
    """An argument that should be a number is something else; to be caught as either of its parents."""


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
    number = value.__index__()
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
    number = float(value)
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
