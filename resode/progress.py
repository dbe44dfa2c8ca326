"""How far a long call is: one line on standard error, in a terminal or a notebook."""

from __future__ import annotations

import sys
import time
from types import TracebackType

AFTER = 2.0
"""Seconds of work before anything is shown."""


class Progress:
    """One line that says how far a call is, from `AFTER` seconds on, and goes at its end.

    In a file or a pipe nothing is written.

    Args:
        what: the call, in a word.
        shown: False for silence.

    Example:
        >>> with Progress("profile") as progress:
        ...     progress("block 1 of 9")
    """

    def __init__(self, what: str, shown: bool = True):
        self.what, self.shown = what, shown and _watched()
        self.begun, self.width = time.monotonic(), 0

    def __enter__(self) -> Progress:
        return self

    def __call__(self, text: str) -> None:
        """Say it, in place of what stood there."""
        if self.shown and time.monotonic() - self.begun >= AFTER:
            line = f"{self.what}: {text}"
            sys.stderr.write(f"\r{line.ljust(self.width)}")
            sys.stderr.flush()
            self.width = len(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.width:
            sys.stderr.write(f"\r{' ' * self.width}\r")
            sys.stderr.flush()


def _watched() -> bool:
    """Whether somebody looks at standard error: in a terminal, or below a notebook's cell."""
    return sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in type(sys.stderr).__module__)
