"""resode sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from resode.cli.inspecting import print_comparison
from resode.cli.terminal import command, flag, say
from resode.cli.train import chosen_settings, network_options, own_model, recipe_flags, recipe_settings
from resode.training.recipe import RECIPES

_MODEL, _SWEEP, _RECIPE = "Network and data, of all runs", "Sweep", "Recipe of all runs: any of its settings"


@command(
    "resode sweep runs/grid --grid solver=euler,rk4 --grid step_size=0.5,1 --grid seed=0:5 --epochs 10",
    "resode sweep runs/grid                    # go on after an interruption, try again what failed",
    "resode sweep runs/widths --grid width=4,8,16 --grid lr=0.05,0.1 --model resnet20 --jobs 2",
    "resode sweep runs/file --config sweep.yaml",
    "resode sweep runs/grid --grid seed=0:50 --engine ray --address 10.0.0.1:6379",
)
@recipe_flags
def sweep(
    folder: Annotated[
        Path, typer.Argument(help="Folder of the sweep.", metavar="FOLDER", show_default=False)
    ],
    grid: Annotated[
        list[str] | None,
        flag(
            "KEY=A,B,C or KEY=START:STOP; a flag of train, or an option of the network. Repeatable.", _SWEEP
        ),
    ] = None,
    config: Annotated[Path | None, flag("Grid and settings from a YAML file; flags win.", _SWEEP)] = None,
    jobs: Annotated[
        int | None, flag("Runs at once. Default: one a GPU, or the cores by --threads.", _SWEEP)
    ] = None,
    threads: Annotated[int | None, flag("Threads of a run. Default: the cores by --jobs.", _SWEEP)] = None,
    retries: Annotated[
        int, typer.Option(help="Of a run whose process was killed.", rich_help_panel=_SWEEP)
    ] = 2,
    engine: Annotated[str, typer.Option(help="local or ray.", rich_help_panel=_SWEEP)] = "local",
    address: Annotated[str | None, flag("Of a Ray cluster: auto, or HOST:PORT.", _SWEEP)] = None,
    gpus: Annotated[float | None, flag("GPUs of a Ray cluster that a run takes.", _SWEEP)] = None,
    device: Annotated[str | None, flag("auto, cpu, cuda, cuda:N or mps. Default auto.", _SWEEP)] = None,
    quiet: Annotated[bool, flag("Print nothing but errors.", _SWEEP, "--quiet")] = False,
    model: Annotated[str | None, flag("Name, or package.module:function. Default odenet20.", _MODEL)] = None,
    data: Annotated[
        str | None, flag("digits, cifar10, cifar100 or cifar100_coarse. Default digits.", _MODEL)
    ] = None,
    data_dir: Annotated[Path | None, flag("Where CIFAR-10 lies; else RESODE_DATA.", _MODEL)] = None,
    download: Annotated[bool, flag("Fetch CIFAR-10 where it is missing.", _MODEL, "--download")] = False,
    solver: Annotated[str | None, flag("Method of every ResidualStack.", _MODEL)] = None,
    substeps: Annotated[int | None, flag("Solver steps a block.", _MODEL)] = None,
    option: Annotated[list[str] | None, flag("NAME=VALUE for the network; repeatable.", _MODEL)] = None,
    step_limits: Annotated[
        bool, typer.Option("--step-limits", help="Record and draw every group's step limits of every run.")
    ] = False,
    logger: Annotated[
        str | None, flag("Of every run: tensorboard, wandb, or csv: every update's loss.", _SWEEP)
    ] = None,
    recipe: Annotated[
        str | None, flag(f"{', '.join(RECIPES)}. Default fast, or digits on digits.", _RECIPE)
    ] = None,
    **chosen: Any,
) -> None:
    """Train a run for every point of a grid, several at once.

    Finished runs are kept; one that was interrupted goes on, one that failed is tried again. The exit code is
    1 where a run has failed.
    """
    from resode.training.sweep import sweep as sweep_runs
    from resode.training.sweep.grid import read_pairs

    names = {"model": model, "data": data, "data_dir": data_dir, "device": device, "recipe": recipe}
    flags = {name: value for name, value in names.items() if value is not None} | recipe_settings(chosen)
    if download:
        flags["download"] = True
    settings = chosen_settings(flags, network_options(option, solver, substeps), config, grid=True)
    of_file = {name: settings.pop(name, None) for name in ("grid", "threads", "own")}
    pairs = read_pairs(grid or [])
    if "model" in pairs:
        pairs["model"] = [own_model(name) for name in pairs["model"]]
    wanted = pairs or of_file["grid"]
    if threads is None and of_file["threads"] is not None:
        threads = of_file["threads"]
    found = sweep_runs(
        folder,
        wanted,
        step_limits=step_limits,
        logger=logger,
        jobs=jobs,
        threads=threads,
        retries=retries,
        engine=engine,
        address=address,
        gpus=gpus,
        progress=not quiet,
        **settings,
    )
    if not quiet:
        _print(found)
    if found.failed:
        raise typer.Exit(1)


def _print(found: Any) -> None:
    from resode.training.sweep.live import first_sentence

    say()
    if found.comparison is not None:
        print_comparison(found.comparison)
        say()
    for run in found.failed:
        say(f"{run.name} failed: {first_sentence(run.error)}", "red")
    say(str(found))
    if found.comparison is not None:
        say(f"figure {found.path / 'compare.png'}")
    say(f"table  {found.path / 'sweep.csv'}, a row a run")
