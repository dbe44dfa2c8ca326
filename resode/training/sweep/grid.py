"""The points of a grid: what is given as text or values, checked, each with a name and what `train` takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from math import prod
from typing import Any

from torch import nn

from resode.checks import known
from resode.networks import NETWORKS
from resode.networks.registry import find
from resode.training.data import ImageData
from resode.training.plan import Plan, model_name
from resode.training.recipe import SETTINGS, Recipe

MOST_POINTS = 10_000
"""More than that is a slip of the keyboard: seed=0:1000000."""

LONGEST_NAME = 200
"""Bytes of a folder's name; file systems take 255."""

ARGUMENTS = ("model", "data", "recipe")
"""What a grid may vary besides a recipe's settings and a network's options."""

OF_ALL = ("data_dir", "download", "device", "step_limits", "logger", "jobs", "threads", "engine", "address")
"""What is one for all runs of a sweep, and so no key of a grid."""

_KINDS = {setting.name: str(setting.type) for setting in fields(Recipe)}
_UNFIT = re.compile(r"[^-\w.+]")
"""What stands in no folder's name."""

_RANGE = re.compile(r"(-?\d+):(-?\d+)(?::(-?\d+))?")


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
        name: of its run folder: its place in the grid.
        values: what it has of each of the grid's keys.
        arguments: of `resode.train`, without its folder and device.
        plan: what they ask for.
    """

    name: str
    values: dict[str, Any]
    arguments: dict[str, Any]
    plan: Plan


def plain_value(text: str) -> Any:
    """A number, True or False where the text is one, else the text.

    Example:
        >>> plain_value("3"), plain_value("1e-3"), plain_value("true"), plain_value("rk4")
        (3, 0.001, True, 'rk4')
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_pairs(pairs: Iterable[str]) -> dict[str, list[Any]]:
    """A grid as the command line has it: KEY=VALUES, a key once.

    Example:
        >>> read_pairs(["solver=euler,rk4", "seed=0:3", "milestones=0.3/0.6,0.5/0.75"])
        {'solver': ['euler', 'rk4'], 'seed': [0, 1, 2], 'milestones': [(0.3, 0.6), (0.5, 0.75)]}
    """
    grid: dict[str, list[Any]] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not equals or not key:
            raise ValueError(f"a grid is given as KEY=VALUES, got {pair!r}. For example --grid seed=0:5.")
        if key in grid:
            raise ValueError(f"{key} stands in the grid twice. Write its values once: {key}=A,B,C.")
        grid[key] = values_of(key, text)
    return grid


def values_of(key: str, text: str) -> list[Any]:
    """The values that a text names: with commas between them, or a:b and a:b:c as Python's range."""
    if key not in ARGUMENTS and (found := _RANGE.fullmatch(text.strip())):
        start, stop, step = (int(part) for part in (found[1], found[2], found[3] or "1"))
        if step == 0:
            raise ValueError(f"{key}={text}: the step of a range is not 0.")
        values = range(start, stop, step)
        _check_size(key, len(values))
        return list(values)
    return [_read(key, part.strip()) for part in text.split(",") if part.strip()]


def _read(key: str, text: str) -> Any:
    """A value as its key has it; numbers of a setting of several have / between them."""
    kind = _KINDS.get(key, "str" if key in ARGUMENTS else "")
    if kind.endswith("| None") and text.lower() == "none":
        return None
    if kind.startswith("tuple"):
        parts = [] if text.lower() == "none" else text.split("/")
        return tuple(plain_value(part) for part in parts)
    return text if kind.startswith("str") else plain_value(text)


def points(grid: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Point]:
    """Every combination of a grid's values, checked as `resode.train` checks its arguments.

    Args:
        grid: keys, with dashes or underscores, to their values: any iterable, or text as `values_of` reads.
        settings: what all runs have in common: `model`, `data`, `recipe`, `data_dir`, `model_options`,
            settings of a recipe, options of the network.

    Raises:
        ValueError, TypeError: a key that is none or stands twice, no values or one twice, values that
            contradict each other.

    Example:
        >>> [point.name for point in points({"solver": ["euler", "rk4"], "seed": range(2)}, {})]
        ['solver=euler,seed=0', 'solver=euler,seed=1', 'solver=rk4,seed=0', 'solver=rk4,seed=1']
    """
    common = {**settings, **settings.get("model_options", {})}
    common.pop("model_options", None)
    lists = _lists(grid)
    for key in lists:
        if key in OF_ALL:
            raise ValueError(
                f"{key} is one for all runs of a sweep, and no key of its grid. Set it beside it."
            )
        if key in common:
            raise ValueError(
                f"{key} is varied by the grid and set to {common[key]!r} for all runs. Leave one of them out."
            )
    _check_size("the grid", prod(map(len, lists.values())))
    models = lists.get("model", [common.get("model", "odenet20")])
    valid = _valid_keys(models)
    for key in (*lists, *common):
        if valid is not None and key != "data_dir":
            known("setting or option", key, valid)
    found = [_point(dict(zip(lists, values, strict=True)), common) for values in product(*lists.values())]
    folders: dict[str, str] = {}
    for point in found:  # some file systems know no capitals
        if point.name.casefold() in folders:
            raise ValueError(
                f"two points of the grid would have one folder: {folders[point.name.casefold()]} and "
                f"{point.name}. Write their values in other words."
            )
        folders[point.name.casefold()] = point.name
    return found


def _lists(grid: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The grid's keys to lists of plain values."""
    if not isinstance(grid, Mapping) or not grid:
        raise ValueError(
            f"a grid maps keys to their values, such as {{'solver': ['euler', 'rk4'], 'seed': range(5)}}, "
            f"got {grid!r}."
        )
    lists: dict[str, list[Any]] = {}
    for name, given in grid.items():
        key = str(name).replace("-", "_")
        if key in lists:
            raise ValueError(f"{key} stands in the grid twice. Write its values once.")
        if isinstance(given, str):
            given = values_of(key, given)
        if not isinstance(given, Iterable) or isinstance(given, Mapping | nn.Module):
            raise TypeError(f"the values of {key} must be a list, got {given!r}. Write {key}: [{given!r}].")
        values = [value.item() if hasattr(value, "item") else value for value in given]
        values = [tuple(value) if isinstance(value, list) else value for value in values]
        if not values:
            raise ValueError(f"{key} has no values in the grid. Give at least one, or leave it out.")
        if twice := [value for number, value in enumerate(values) if value in values[:number]]:
            raise ValueError(f"{key} has the value {twice[0]!r} twice in the grid. Write it once.")
        lists[key] = values
    return lists


def _check_size(what: str, count: int) -> None:
    if count > MOST_POINTS:
        raise ValueError(f"a sweep has at most {MOST_POINTS:,} runs, {what} asks for {count:,}. Split it.")


def _valid_keys(models: Sequence[Any]) -> list[str] | None:
    """What a grid over these models may vary; None where a model takes any option."""
    options: list[str] = []
    for model in models:
        if isinstance(model, str):
            options += find(model).options
        elif isinstance(model, nn.Module):
            raise TypeError(
                f"a sweep makes a network for each of its runs, got one, {type(model).__name__}. Pass its "
                "class, or a function that makes it."
            )
        elif callable(model):
            taken = inspect.signature(model).parameters.values()
            if any(p.kind is p.VAR_KEYWORD for p in taken):
                return None
            options += [p.name for p in taken]
    return [*ARGUMENTS, *SETTINGS, *dict.fromkeys(options)]


def _point(values: dict[str, Any], common: Mapping[str, Any]) -> Point:
    arguments: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in {**common, **values}.items():
        place = arguments if key in (*ARGUMENTS, *SETTINGS, "data_dir") else options
        place[key] = value
    name = _name(values)
    try:
        plan = Plan.new(
            arguments.get("model"),
            arguments.get("data"),
            arguments.get("recipe"),
            options,
            arguments.get("data_dir"),
            {key: value for key, value in arguments.items() if key in SETTINGS},
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error
    return Point(name, values, arguments | ({"model_options": options} if options else {}), plan)


def _name(values: Mapping[str, Any]) -> str:
    name = ",".join(f"{key}={_UNFIT.sub('-', text_of(value))}" for key, value in values.items())
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"a run is named by its place in the grid, and {name[:60]}… has more than {LONGEST_NAME} bytes. "
            "Take fewer keys, or shorter values."
        )
    return name


def text_of(value: Any) -> str:
    """A value as names and tables have it.

    Example:
        >>> text_of(1.0), text_of(1e-3), text_of((0.5, 0.75)), text_of(None), text_of(True)
        ('1', '0.001', '0.5+0.75', 'none', 'true')
    """
    if isinstance(value, tuple):
        return "+".join(map(text_of, value)) or "none"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if callable(value):
        return model_name(value)  # type: ignore[arg-type]
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    return str(value)


def differences(point: Point, config: Mapping[str, Any]) -> list[str]:
    """In what a stored run is not that of a point; what a run decided for itself is no difference."""
    plan = point.plan
    options = dict(NETWORKS[plan.model].options) if isinstance(plan.model, str) else {}
    asked: dict[str, Any] = {"model": model_name(plan.model), "data": plan.data_name}
    asked |= {f"option {name}": value for name, value in (options | plan.options).items()}
    stored = {"model": config.get("model"), "data": config.get("data")}
    stored |= {f"option {k}": v for k, v in (options | dict(config.get("model_options") or {})).items()}
    recipe = Recipe.of(config)
    for name in SETTINGS:
        if (value := getattr(plan.recipe, name)) not in (None, "auto") or name in ("epochs", "updates"):
            asked[name], stored[name] = value, getattr(recipe, name)
    return [
        f"{name.removeprefix('option ')} {text_of(stored.get(name))} (asked for: {text_of(asked.get(name))})"
        for name in dict.fromkeys((*asked, *stored))
        if asked.get(name) != stored.get(name)
    ]


def own_of(grid: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, str]:
    """What no file can hold, by its name: a model, a data set or a recipe of one's own."""
    own = {
        name: value.name if isinstance(value, ImageData) else model_name(value)
        for name, value in common.items()
        if name in ("model", "data") and not isinstance(value, str)
    }
    lists = {
        key: values_of(key, values) if isinstance(values, str) else values for key, values in grid.items()
    }
    if any(not isinstance(value, str) for key in ARGUMENTS for value in lists.get(key, ())):
        own["grid"] = ", ".join(text_of(value) for key in ARGUMENTS for value in lists.get(key, ()))
    return own
