"""The command `resode`: train, evaluate, predict, diagnose, swap, stability, profile, report and others.

Lightning and matplotlib, which take seconds to import, are imported by the commands that need them.
"""

from __future__ import annotations

from typing import Annotated

try:
    import typer

    from resode.cli.terminal import app, say
except ModuleNotFoundError as error:
    raise SystemExit(f"the command resode needs {error.name}: pip install 'resode[train]'") from error

from resode.cli import inspecting, predicting, sweeping, train, trained

__all__ = ["app", "inspecting", "main", "predicting", "sweeping", "train", "trained"]


def main() -> None:
    """Run the command line."""
    app(prog_name="resode")


def _version(value: bool) -> None:
    if value:
        import resode

        say(f"resode {resode.__version__}")
        raise typer.Exit


@app.callback(epilog="Examples:  resode train  ·  resode swap runs/demo  ·  resode stability rk4 dopri5")
def _resode(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Residual networks as dynamical systems: train them, change their solver, see what limits their step."""
