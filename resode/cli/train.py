"""resode train."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from resode.checks import known
from resode.cli.terminal import command, flag, separated
from resode.training.recipe import RECIPES, SETTINGS, Recipe, make_recipe

_MODEL, _RUN, _RECIPE = "Network and data", "Run", "Recipe: any of its settings"


def recipe_flags(function: Callable[..., None]) -> Callable[..., None]:
    """A flag for every setting of a recipe, in the place of **chosen: its kind and help are the field's."""
    signature = inspect.signature(function, eval_str=True)
    *parameters, _ = signature.parameters.values()
    for setting in fields(Recipe):
        kind = str(setting.type).removesuffix(" | None")
        option = flag(setting.metadata["help"], _RECIPE)
        hint = Annotated[{"int": int, "float": float, "bool": bool}.get(kind, str) | None, option]
        parameters.append(
            inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
        )
    function.__signature__ = signature.replace(parameters=parameters)
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def recipe_settings(chosen: dict[str, Any]) -> dict[str, Any]:
    """The settings that the flags ask for; those of several numbers are given as 0.5,0.75."""
    kinds = {setting.name: str(setting.type) for setting in fields(Recipe)}
    found = {}
    for name, value in chosen.items():
        if value is not None and kinds[name].startswith("tuple"):
            value = separated(value, int if "int" in kinds[name] else float, f"--{name.replace('_', '-')}")
        if value is not None:
            found[name] = value
    return found


@command(
    "resode train",
    "resode train --model odenet20 --solver rk4 --epochs 10",
    "resode train --model resnet20 --data cifar10 --data-dir PATH --epochs 3",
    "resode train --resume runs/odenet20-digits-…",
    "resode train --resume runs/demo --epochs 40 --lr 0.02 --run-dir runs/longer",
    "resode train --config runs/demo/config.yaml --seed 1",
    "resode train --eval-solver rk4 --eval-substeps 2 --refine-at 10",
    "torchrun --nproc-per-node 2 -m resode train --model resnet20 --data cifar10",
)
@recipe_flags
def train(
    model: Annotated[str | None, flag("Name, or package.module:function. Default odenet20.", _MODEL)] = None,
    data: Annotated[
        str | None, flag("digits, cifar10, cifar100 or cifar100_coarse. Default digits.", _MODEL)
    ] = None,
    data_dir: Annotated[Path | None, flag("Where CIFAR-10 lies; else RESODE_DATA.", _MODEL)] = None,
    download: Annotated[bool, flag("Fetch CIFAR-10 where it is missing.", _MODEL, "--download")] = False,
    solver: Annotated[str | None, flag("Method of every ResidualStack.", _MODEL)] = None,
    substeps: Annotated[int | None, flag("Solver steps a block.", _MODEL)] = None,
    option: Annotated[list[str] | None, flag("NAME=VALUE for the network; repeatable.", _MODEL)] = None,
    run_dir: Annotated[Path | None, flag("New run folder. Default runs/<model>-<data>-<time>.", _RUN)] = None,
    resume: Annotated[Path | None, flag("Go on with a run; with other settings, as a new one.", _RUN)] = None,
    config: Annotated[Path | None, flag("Settings from a YAML file; flags win.", _RUN)] = None,
    device: Annotated[str | None, flag("auto, cpu, cuda, cuda:N or mps. Default auto.", _RUN)] = None,
    quiet: Annotated[bool, flag("Print nothing but errors.", _RUN, "--quiet")] = False,
    recipe: Annotated[
        str | None, flag(f"{', '.join(RECIPES)}. Default fast, or digits on digits.", _RECIPE)
    ] = None,
    step_limits: Annotated[
        bool, typer.Option("--step-limits", help="Record and draw every group's step limits as it trains.")
    ] = False,
    logger: Annotated[str | None, flag("tensorboard, wandb, or csv: every update's loss.", _RUN)] = None,
    **chosen: Any,
) -> None:
    """Train a network into a run folder."""
    names = {"model": model, "data": data, "data_dir": data_dir, "device": device, "recipe": recipe}
    flags = {name: value for name, value in names.items() if value is not None} | recipe_settings(chosen)
    if download:
        flags["download"] = True
    settings = chosen_settings(flags, network_options(option, solver, substeps), config)

    from resode.training.monitor import FILE, StepLimits
    from resode.training.run import train as train_network

    step_limits = step_limits or (resume is not None and (resume / FILE).exists())
    settings["callbacks"] = [StepLimits()] if step_limits else []
    train_network(resume=resume, run_dir=run_dir, progress=not quiet, logger=logger, **settings)


def chosen_settings(
    flags: dict[str, Any], options: dict[str, Any], config: Path | None, *, grid: bool = False
) -> dict[str, Any]:
    """What `resode.train` is called with: the settings of a file, and the flags over them.

    A file with a grid may hold what a sweep does besides, and options of the network among its settings.
    """
    stored = {} if config is None else _read(config, flags, grid)
    options = stored.pop("model_options", {}) | options
    for given, other in (("epochs", "updates"), ("updates", "epochs")):
        if given in flags:
            stored.pop(other, None)
    settings = stored | flags
    if options:
        settings["model_options"] = options
    if "model" in settings:
        settings["model"] = own_model(settings["model"])
    return settings


_KINDS = {"model": str, "data": str, "data_dir": str, "download": bool, "device": str, "recipe": str}
_STORED = [*_KINDS, "model_options", "solver", "substeps", *SETTINGS]


def _read(config: Path, flags: dict[str, Any], grid: bool) -> dict[str, Any]:
    """The settings in a file: a few of one's own, or all of a run's config.yaml."""
    from resode.training.files import read_yaml
    from resode.training.folder import check_format

    stored = read_yaml(config)
    if "format" in stored:
        check_format(config, stored.pop("format"))
        stored.pop("checksum", None)  # a copy of a run's settings may be changed
    record = stored.pop("record", None)
    if not isinstance(record, dict | None):
        raise ValueError(f"{config}: record is what a run stores about itself, got {record!r}. Leave it out.")
    for name in () if grid else stored:
        known("setting", name, _STORED, f"{config}: ")
    for name, kind in _KINDS.items():
        if stored.get(name) is None:
            stored.pop(name, None)
        elif not isinstance(stored[name], kind):
            wanted = "true or false" if kind is bool else "text"
            raise ValueError(f"{config}: {name} must be {wanted}, got {stored[name]!r}.")
    if ":" in stored.get("model", "") and "model" not in flags:
        raise ValueError(
            f"{config} names code to run, {stored['model']}, and a file of settings runs none: if you trust "
            f"it, pass --model {stored['model']}."
        )
    if record:
        recipe = stored.pop("recipe", None)  # where the run started from; every setting stands beside it
        if recipe in RECIPES:
            stored["recipe"] = recipe
        if "recipe" in flags:
            raise ValueError(
                f"--recipe changes nothing beside {config}, which has every setting. Leave it out."
            )
        if record.get("own_data"):
            raise ValueError(f"{config} is of a data set of your own. Train on it with resode.train.")
        make_recipe(Recipe.of(stored), **{name: flags[name] for name in SETTINGS if name in flags})
    options = stored.setdefault("model_options", {})
    if not isinstance(options, dict):
        raise ValueError(f"{config}: model_options must be `name: value` lines, got {options!r}.")
    options |= {name: stored.pop(name) for name in ("solver", "substeps") if name in stored}
    return stored


def own_model(name: str | None) -> Any:
    """A network's name as it is, or the function that package.module:function names."""
    if name is None or ":" not in name:
        return name
    place, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(import_module(place), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--model package.module:function must name a function, got {name}: {error}."
        ) from error
    if not callable(found):
        raise ValueError(
            f"--model package.module:function must name a function, got {name}: {type(found).__name__}."
        )
    return found


def network_options(
    pairs: list[str] | None, solver: str | None = None, substeps: int | None = None
) -> dict[str, Any]:
    """Options of the network, from NAME=VALUE and the flags that have names of their own."""
    from resode.training.sweep.grid import plain_value

    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--option takes NAME=VALUE, got {pair!r}. For example --option shortcut=B.")
        options[name] = plain_value(value)
    return options | {k: v for k, v in (("solver", solver), ("substeps", substeps)) if v is not None}
