"""What a sweep says while it runs: a line for every run that has ended, and in a terminal what runs now."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from resode.tables import printable, read_csv


class LiveTable:
    """Reports the progress of a sweep to standard output, unless it shall not show.

    Args:
        show: whether to print at all.
        folder: of the sweep.
        names: of its runs.
        total: runs of the sweep, with those that were finished before.
    """

    def __init__(self, show: bool, folder: Path, names: list[str], total: int) -> None:
        self.console = Console(highlight=False, quiet=not show)
        self.folder, self.names = folder, names
        self.total, self.failed, self.done = total, 0, total - len(names)
        self.begun: dict[int, float] = {}
        self._start, self._done_before = time.monotonic(), self.done
        self._live = Live(console=self.console, transient=True, auto_refresh=False) if show else None

    def __enter__(self) -> LiveTable:
        if self._live is not None and self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        """Print a line; in a terminal it is folded at words, above what moves."""
        terminal = self.console.is_terminal
        self.console.print(Text(printable(text), style=style), soft_wrap=not terminal)

    def finished(self, number: int, summary: Mapping[str, Any]) -> None:
        """A run has come to its end."""
        self.done += 1
        self.begun.pop(number, None)
        figures = f"{100 * summary['test_accuracy']:.2f} %  {summary['seconds']:.1f} s"
        self.say(f"{self._count()}  {self.names[number]}  {figures}")

    def failed_run(self, number: int, error: str) -> None:
        """A run has failed for good."""
        self.failed += 1
        self.begun.pop(number, None)
        self.say(f"{self._count()}  {self.names[number]}  failed: {first_sentence(error)}", "red")

    def _count(self) -> str:
        width = len(str(self.total))
        return f"{self.done + self.failed:>{width}}/{self.total}"

    def running(self, numbers: list[int]) -> None:
        """Show what runs now."""
        now = time.monotonic()
        self.begun = {number: self.begun.get(number, now) for number in numbers}
        if self._live is None or not self.console.is_terminal:
            return
        grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        grid.add_column("running", overflow="fold", header_style="bold")
        for name in ("epoch", "test %", "s"):
            grid.add_column(name, justify="right", no_wrap=True, header_style="bold")
        for number, begun in self.begun.items():
            epoch, accuracy = _last_epoch(self.folder / self.names[number] / "metrics.csv")
            grid.add_row(Text(printable(self.names[number])), epoch, accuracy, f"{now - begun:.0f}")
        self._live.update(Group(grid, Text(self._line(now), style="bold")), refresh=True)

    def _line(self, now: float) -> str:
        waiting = self.total - self.done - self.failed - len(self.begun)
        line = f"{self.done} of {self.total} done, {self.failed} failed, {waiting} waiting"
        ended = self.done + self.failed - self._done_before
        if ended >= max(1, len(self.begun)):
            left = (now - self._start) / ended * (self.total - self.done - self.failed)
            line += f", about {left:.0f} s left" if left < 100 else f", about {left / 60:.0f} min left"
        return line


def first_sentence(text: str) -> str:
    """What a line says of an error; the rest, its advice, stands in sweep.csv."""
    return text.partition(". ")[0].rstrip(".")


def _last_epoch(path: Path) -> tuple[str, str]:
    """Epochs done, and the last one's test accuracy in per cent; '-' before the first one."""
    try:
        _, rows = read_csv(path)
        return rows[-1]["epoch"], f"{100 * float(rows[-1]['test_accuracy']):.2f}"
    except (OSError, ValueError, LookupError):
        return "-", "-"
