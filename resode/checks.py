"""Argument checks with one wording, and warnings that point at the user's line."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from typing import Any


def check_whole(name: str, value: Any, least: int | None = None) -> int:
    """The value as an int, where it is a whole number of at least `least`.

    Raises:
        TypeError: not an integer (a bool is none).
        ValueError: below `least`.

    Example:
        >>> check_whole("depth", 3, 1)
        3
    """
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    number = value.__index__()
    if least is not None and number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return number


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """' Did you mean x or y?' where a valid name is close, else an empty string."""
    close = difflib.get_close_matches(str(name), list(valid), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def one_of(name: str, value: Any, valid: Iterable[str]) -> Any:
    """The value, where it is one of the valid ones.

    Raises:
        ValueError: it is not; the message lists them.
    """
    names = list(valid)
    if value not in names:
        raise ValueError(
            f"{name} must be one of {', '.join(names)}; got {value!r}.{did_you_mean(value, names)}"
        )
    return value


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called the library, however deep inside it this is."""
    level, frame = 1, sys._getframe(0)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("resode", "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level if frame is not None else 2)
