"""What a run says while it trains: a bar in a terminal, and one plain line an epoch everywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from resode.tables import printable

_COLUMNS = "{epoch:>7}{loss:>8}{train:>9}{test:>8}{lr:>9}{rate:>10}{seconds:>9}"  # 60 wide


class Progress:
    """Reports the progress of a run of so many epochs to standard output, unless it shall not show."""

    def __init__(self, show: bool, epochs: int) -> None:
        self.show = show
        self.epochs = epochs
        self.other = ""  # another solver that the test images are evaluated under
        self.console = Console(highlight=False)
        self._bar: rich.progress.Progress | None = None

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line."""
        if not self.show:
            return
        text = printable(text)
        if self.console.is_terminal:
            self.console.print(text, style=style, markup=False)  # folded at words
            return
        try:
            print(text, flush=True)
        except BrokenPipeError:  # nobody reads on; the run goes on
            self.show = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    @property
    def _wide(self) -> int:
        """Columns of the other solver's figures."""
        return len(self.other) + 4

    def heading(self) -> None:
        """Print the head of the table of epochs."""
        names = {"loss": "loss", "train": "train %", "test": "test %", "lr": "lr", "rate": "images/s"}
        other = f"{self.other + ' %':>{self._wide}}" if self.other else ""
        self.say(_COLUMNS.format(epoch="epoch", seconds="seconds", **names) + other, style="bold")

    def batch(self, epoch: int, done: int, of: int, loss: float, rate: float) -> None:
        """Move the bar, in a terminal."""
        if not self.show or not self.console.is_terminal:
            return
        if self._bar is None:
            self._bar = rich.progress.Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task("", total=of)
        words = f"epoch {epoch}  loss {loss:.3f}  {rate:,.0f} images/s"
        self._bar.update(self._bar.task_ids[0], completed=done, total=of, description=words)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Print an epoch's figures."""
        self.close()
        self.say(
            _COLUMNS.format(
                epoch=f"{row['epoch']}/{self.epochs}",
                loss=f"{row['train_loss']:.3f}",
                train=f"{100 * row['train_accuracy']:.1f}",
                test=f"{100 * row['test_accuracy']:.1f}",
                lr=f"{row['lr']:.3g}",
                rate=f"{row['images_per_second']:,.0f}",
                seconds=f"{row['seconds']:.1f}",
            )
            + (f"{100 * row['eval_accuracy']:>{self._wide}.1f}" if self.other else "")
        )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
