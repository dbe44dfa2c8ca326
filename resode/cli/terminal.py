"""The command's side of a terminal: tables that fit it or stay whole in a pipe, errors, exit codes."""

from __future__ import annotations

import inspect
import io
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from resode.checks import did_you_mean, lacks_memory
from resode.tables import printable

TRAIN_EXTRA = ("lightning", "sklearn", "PIL", "safetensors", "yaml")
"""What the extra `train` installs, besides what the command itself is made of."""

ALONE = 10.0
"""Seconds that a process waits for the first one to tell the error that both met."""

PIPE_WIDTH = 400
"""Columns where nobody's terminal folds a line: piped tables are as wide as their contents."""


def console() -> Console:
    """Standard output: coloured in a terminal, plain in a pipe."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def say(text: str = "", style: str | None = None) -> None:
    """Print a line; in a terminal it is folded at words."""
    console().print(Text(printable(text), style=style or ""), soft_wrap=not sys.stdout.isatty())


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[str] = ()) -> None:
    """Print rows under their columns' names; closer together where the terminal is narrow.

    The first column, and those that hold words and may be folded, are flush left, the others flush right.
    """
    rows = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    target = console()
    roomy = fits(columns, rows)
    needed = [_widest(row[number] for row in rows) for number in range(len(columns))]
    for number, name in enumerate(columns):
        if name in words:
            needed[number] = _widest(word for row in rows for word in row[number].split())
    target.width = max(target.width, sum(needed) + len(columns) - 1)  # else digits are cut
    widths = _cramped(columns, needed, target.width)
    grid = Table(box=None, pad_edge=False, padding=(0, 2 if roomy else 1, 0, 0))
    for name, least, width in zip(columns, needed, widths, strict=True):
        grid.add_column(
            name,
            justify="left" if name == columns[0] or name in words else "right",
            no_wrap=roomy and name not in words,
            min_width=least,  # a name may be folded, a number never
            width=width,
            overflow="fold",
            header_style="bold",
        )
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    if target.is_terminal:
        target.print(grid, crop=False)
        return
    with target.capture() as printed:
        target.print(grid)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))


def _cramped(columns: Sequence[str], needed: Sequence[int], width: int) -> list[int | None]:
    """Widths of columns whose names must be folded within their words; all None where they need not."""
    headed = [max(least, _widest(name.split())) for name, least in zip(columns, needed, strict=True)]
    spare = width - sum(needed) - len(columns) + 1
    if sum(headed) - sum(needed) <= spare:
        return [None] * len(columns)
    widths = [max(1, least) for least in needed]
    for _ in range(spare):
        short = [wanted - given for wanted, given in zip(headed, widths, strict=True)]
        widths[short.index(max(short))] += 1
    return list(widths)


def _widest(texts: Iterable[str]) -> int:
    return max(map(len, texts), default=0)


def fits(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether a table is no wider than standard output, its columns two apart."""
    needed = sum(max(len(row[i]) for row in (columns, *rows)) + 2 for i in range(len(columns))) - 2
    return needed <= console().width


def figures_of(source: Path | None) -> Path:
    """Where the figures of a run folder, or of a weights file, go; here without."""
    return Path() if source is None else (source if source.is_dir() else source.parent) / "figures"


def store(folder: Path, name: str, found: Any, *, figure: bool = True) -> None:
    """Write a result's table, and its figure, into a folder, and say where they are."""
    from resode.training.files import replacing

    folder.mkdir(parents=True, exist_ok=True)
    said = f"\ntable  {folder / name}.csv"
    with replacing(folder / f"{name}.csv") as path:
        found.to_csv(path)
    if figure:
        with replacing(folder / f"{name}.png") as path:
            found.plot(path)
        said = f"\nfigure {folder / name}.png{said}"
    say(said)


def complain(message: str) -> None:
    """Print an error to standard error, folded at words in a terminal."""
    errors = Console(stderr=True, highlight=False)
    errors.print(Text.assemble(("error: ", "bold red"), printable(message)), soft_wrap=not errors.is_terminal)


class Commands(TyperGroup):
    """The commands, with errors as one message and an exit code: 2 for wrong usage, 1 for a failed run."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line; with --debug errors keep their traceback."""
        given = kwargs.pop("args", None)
        arguments = sys.argv[1:] if given is None else list(given)
        debug = "--debug" in arguments
        kwargs["args"] = [argument for argument in arguments if argument != "--debug"]
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # η where the terminal's encoding has none
        try:
            code = super().main(*args, **(kwargs | {"standalone_mode": False}))
        except Exception as error:
            if debug:
                raise
            _speaks(error)
            code = report(error)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an interruption is told here, because Typer would only give its exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interruption:
            if _speaks(interruption):
                complain(str(interruption) or "interrupted.")
            raise typer.Exit(128 + getattr(interruption, "signum", 2)) from interruption


def _speaks(error: BaseException) -> bool:
    """Whether this process tells an error: of several that torchrun started, the first one does.

    It ends by that, and torchrun then ends the others; one that is still there was alone with its error.
    """
    from resode.training.processes import LostProcess, Processes

    try:
        first = Processes.found().first
    except Exception:
        return True
    if first or isinstance(error, LostProcess):
        return True
    if isinstance(error, KeyboardInterrupt):
        time.sleep(1)
        return False
    time.sleep(ALONE)
    return True


def report(error: Exception) -> int:
    """Print what went wrong and what to do; the exit code."""
    usage = typer.BadParameter.__mro__[1]  # UsageError, which Typer does not export
    if isinstance(error, usage):
        complain(_usage_message(error))
        return 2
    if isinstance(error, ModuleNotFoundError) and "pip install 'resode[" in str(error):
        complain(str(error))
        return 1
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in TRAIN_EXTRA:
        complain(f"this command needs {error.name}: pip install 'resode[train]'")
        return 1
    from resode.training.data.archives import DataError
    from resode.training.files import RunError

    if isinstance(error, RunError):
        complain(str(error))
        return error.exit_code
    if isinstance(error, DataError):  # a ValueError, but of the data, not of the command line
        complain(str(error))
        return 1
    if isinstance(error, ValueError | TypeError):
        complain(str(error))
        return 2
    if isinstance(error, OSError):
        complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.")
        return 1
    if lacks_memory(error):
        complain(
            "there is not enough memory for this. Take smaller batches (--batch-size), fewer images "
            "(--limit), --option gradient=checkpoint in training, or a smaller network. "
            f"({type(error).__name__}: {error})"
        )
        return 1
    complain(f"{type(error).__name__}: {error} (--debug shows where.)")
    return 1


def _usage_message(error: Any) -> str:
    """A usage error with the valid choices: options of the command, or commands."""
    message = error.format_message()
    command = error.ctx.command if error.ctx else None
    if command and hasattr(error, "possibilities"):  # no such option
        options = sorted(
            option for p in command.get_params(error.ctx) for option in p.opts if option.startswith("--")
        )
        message = f"no option {error.option_name}.{did_you_mean(error.option_name, options)}"
        return f"{message} Valid: {', '.join(options)}."
    if isinstance(command, TyperGroup) and message.startswith("No such command"):
        name = message.split("'")[1]
        commands = command.list_commands(error.ctx)
        return f"no command {name!r}.{did_you_mean(name, commands)} Valid: {', '.join(commands)}."
    return message


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Rich's panels cut options short where they have less room.
    rich_markup_mode="rich" if sys.stdout.isatty() and get_terminal_size().columns >= 100 else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as a command, with examples below its docstring."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        text = f"{inspect.getdoc(function)}\n\n\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)
        return app.command(help=text)(function)

    return register


def flag(help: str, panel: str | None = None, *names: str) -> Any:
    """An option without a default to show; its name is the parameter's, or the names given."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


def separated(text: str, kind: type, flag: str) -> list[Any]:
    """The values between the commas of an option."""
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        words = {int: "whole numbers", float: "numbers"}.get(kind, "names")
        raise ValueError(f"{flag} takes {words} with commas between, got {text!r}.") from None
