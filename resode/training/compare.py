"""Several runs in one table and one figure; runs that differ in their seed alone are one configuration."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resode.checks import checked
from resode.networks import NETWORKS
from resode.results import Result
from resode.tables import csv_text
from resode.training.files import DamagedFile, RunError
from resode.training.folder import RunFolder
from resode.training.recipe import SETTINGS, Recipe

_ASIDE = ("seed", "eval_solver", "eval_substeps")
"""Settings that make no other configuration: they change a run's luck, or only what is measured."""


@dataclass(frozen=True)
class ComparedRun:
    """One run, as far as it went.

    Args:
        path: its folder.
        seed: its seed.
        finished: whether it came to its end.
        planned: epochs of the whole run, its last one perhaps cut short; None where its settings give its
            length in updates, and no epoch has ended.
        metrics: the columns of metrics.csv; empty where no epoch has ended.
        device: what it was trained on, with how many threads.
    """

    path: Path
    seed: int
    finished: bool
    planned: int | None
    metrics: Mapping[str, Sequence[float]]
    device: str

    @property
    def epochs(self) -> int:
        """Epochs that have ended."""
        return len(self.metrics.get("epoch", ()))


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over runs.

    Args:
        mean: over the runs.
        std: the sample's standard deviation (n − 1 in the denominator); None for one run.
    """

    mean: float
    std: float | None


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seed alone.

    Args:
        name: the model, and the settings in which the compared configurations differ.
        runs: all of them, in the order given.
        parameters: of the network.
        counted: the runs that the figures are of: those that have finished; where none has, all with an
            epoch.
        epoch: the figures' epoch: the last one, or the last one that all counted runs have reached; 0
            where none has ended.
        test_error, train_error: share of images not recognised, 0 to 1; None where no epoch has ended. The
            training error is of augmented images and of the weights as they moved through the epoch.
        seconds: of the whole run up to that epoch, evaluation included.
        images_per_second: of training, the mean over the epochs.
        nfe: calls of fields F in a forward pass, in the last epoch.
    """

    name: str
    runs: tuple[ComparedRun, ...]
    parameters: int | None
    counted: tuple[ComparedRun, ...]
    epoch: int
    test_error: Spread | None = None
    train_error: Spread | None = None
    seconds: Spread | None = None
    images_per_second: Spread | None = None
    nfe: Spread | None = None


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Several configurations side by side.

    Args:
        rows: one a configuration, in the order in which they were first given.
        notes: what a reader of the table must know: runs that have not finished, or are left out because
            their files are no longer what a run writes; the same seed twice, different devices.
    """

    rows: tuple[Configuration, ...]
    notes: tuple[str, ...]

    def to_csv(self, path: str | Path | None = None) -> str:
        """The table as comma-separated values, means and standard deviations in columns of their own.

        Args:
            path: where to write it too.

        Returns:
            The text.
        """
        figures = ("test_error", "train_error", "seconds", "images_per_second", "nfe")
        columns = [column for name in figures for column in (name, f"{name}_std")]
        head = ["configuration", "runs", "counted", "finished", "epoch", "parameters"]
        rows = []
        for row in self.rows:
            spreads = [getattr(row, name) for name in figures]
            values = [value for s in spreads for value in ((s.mean, s.std) if s else (None, None))]
            finished = sum(run.finished for run in row.runs)
            first = (row.name, len(row.runs), len(row.counted), finished, row.epoch, row.parameters)
            rows.append([*first, *values])
        text = csv_text([*head, *columns], rows)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the errors over the epochs; see `resode.plots.comparison`."""
        from resode import plots

        return plots.comparison(self, path)


@checked
def compare(runs: Iterable[str | Path]) -> Comparison:
    """Lay runs side by side; those that differ in their seed alone are one configuration.

    The figures are the last epoch's, never those of the epoch that did best on the test images.

    Args:
        runs: run folders, finished or not.

    Raises:
        ValueError: no runs, or one of them twice.
        NoSuchRun: one is no run folder.
        RunError: no run's files are what a run writes; where some are not, they are left out and noted.

    Example:
        >>> import tempfile
        >>> from resode import train
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = [f"{folder}/{seed}" for seed in (0, 1)]
        ...     for seed, path in enumerate(paths):
        ...         options = {"seed": seed, "run_dir": path, "progress": False}
        ...         run = train(data="digits", recipe="smoke", updates=1, **options)
        ...     (row,) = compare(paths).rows
        >>> row.name, len(row.runs), row.epoch
        ('odenet20', 2, 1)
    """
    if isinstance(runs, str | Path):
        raise ValueError(f"compare takes several runs, got one path, {runs}. Put it in a list.")
    paths = [Path(run) for run in runs]
    if not paths:
        raise ValueError("there is nothing to compare: give at least one run folder.")
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{path} is given more than once. Name each run once.")
    found: dict[tuple[Any, ...], list[ComparedRun]] = {}
    settings: dict[tuple[Any, ...], dict[str, Any]] = {}
    sizes: dict[tuple[Any, ...], int | None] = {}
    left_out: list[RunError] = []
    for path in paths:
        folder = RunFolder.open(path)
        try:
            of_run, run, parameters = _read(folder)
        except RunError as error:
            left_out.append(error)
            continue
        key = tuple(sorted((name, repr(value)) for name, value in of_run.items() if name != "recipe"))
        found.setdefault(key, []).append(run)
        settings.setdefault(key, of_run)
        sizes[key] = parameters or sizes.get(key)
    if not found:
        raise left_out[0]
    names = _names(list(settings.values()))
    rows = [
        _configuration(name, members, sizes[key])
        for name, (key, members) in zip(names, found.items(), strict=True)
    ]
    return Comparison(tuple(rows), (*(f"A run is left out: {error}" for error in left_out), *_notes(rows)))


def _read(folder: RunFolder) -> tuple[dict[str, Any], ComparedRun, int | None]:
    """What makes a run's configuration, the run, and the network's parameters at its end, or so far."""
    config = folder.read_config()
    summary = folder.read_summary() or {}  # a refined network ends with more than it began with
    try:
        of_run = _settings(config)
        run = _run(folder, config, of_run)
        return of_run, run, summary.get("parameters") or config["record"].get("parameters")
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(
            f"{folder.path / 'config.yaml'} does not hold a run's settings ({type(error).__name__}: {error})."
        ) from error


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a configuration: model, its options, data and recipe, with defaults filled in."""
    record, model = config["record"], config["model"]
    recipe = Recipe.of(config)
    options = dict(config["model_options"])
    if not record["own_model"]:
        options = {**NETWORKS[model].options, **options}
    return {
        "model": model,
        "data": (record["title"], record["train_images"], record["test_images"]),
        "recipe": config["recipe"],
        "penalty": record.get("penalty"),
        **{f"option {name}": value for name, value in options.items()},
        **{name: getattr(recipe, name) for name in SETTINGS if name not in _ASIDE},
    }


def _run(folder: RunFolder, config: Mapping[str, Any], settings: Mapping[str, Any]) -> ComparedRun:
    record = config["record"]
    metrics = folder.read_metrics() if (folder.path / "metrics.csv").exists() else {}
    planned = settings["epochs"]
    if planned is None and metrics:
        a_epoch = (record["train_images"] - settings["validation"]) // settings["batch_size"]
        planned = -(-settings["updates"] // a_epoch)
    threads = record.get("threads")
    return ComparedRun(
        folder.path,
        config["seed"],
        folder.read_summary() is not None,
        planned,
        metrics,
        f"{record.get('device')} with {threads} thread{'' if threads == 1 else 's'}",
    )


def _names(configurations: list[dict[str, Any]]) -> list[str]:
    """The model of each, and what tells it from those it could be taken for."""
    several = len({c["recipe"] for c in configurations}) > 1
    names = []
    for c in configurations:
        parts = [c["model"]]
        if several:
            parts.append(f"recipe {c['recipe']}")
        for name, value in c.items():
            like = "model" if name.startswith("option ") else "recipe"
            if name in ("data", "penalty"):
                others = configurations
            else:  # what differs between models or recipes by default goes without saying
                others = [other for other in configurations if other[like] == c[like]]
            if name in ("model", "recipe") or all(other.get(name) == value for other in others):
                continue
            text = value[0] if name == "data" else _text(value)
            parts.append(text if name == "data" else f"{name.removeprefix('option ')} {text}")
        names.append(", ".join(parts))
    return names


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "/".join(map(_text, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _configuration(name: str, runs: list[ComparedRun], parameters: int | None) -> Configuration:
    counted = [run for run in runs if run.finished and run.epochs] or [run for run in runs if run.epochs]
    if not counted:
        return Configuration(name, tuple(runs), parameters, (), 0)
    last = min(run.epochs for run in counted) - 1

    def spread(column: str) -> Spread:
        values = [run.metrics[column][last] for run in counted]
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def error(split: str) -> Spread:
        accuracy = spread(f"{split}_accuracy")
        return Spread(1 - accuracy.mean, accuracy.std)

    rates = [statistics.harmonic_mean(run.metrics["images_per_second"][: last + 1]) for run in counted]
    return Configuration(
        name,
        tuple(runs),
        parameters,
        tuple(counted),
        last + 1,
        test_error=error("test"),
        train_error=error("train"),
        seconds=spread("seconds"),
        images_per_second=Spread(
            statistics.fmean(rates), statistics.stdev(rates) if len(rates) > 1 else None
        ),
        nfe=spread("nfe"),
    )


def _notes(rows: Sequence[Configuration]) -> list[str]:
    notes = []
    for row in rows:
        for run in row.runs:
            if run.finished:
                continue
            done = f"{run.epochs} of {run.planned} epochs" if run.planned else f"{run.epochs} epochs"
            effect = "" if run in row.counted else " and is not in the table"
            notes.append(f"{run.path} has not finished: it has done {done}{effect}.")
        seeds = [run.seed for run in row.counted]
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            notes.append(
                f"{row.name}: seed {', '.join(map(str, twice))} more than once, so its spread is not that of "
                "independent seeds."
            )
    devices = sorted({run.device for row in rows for run in row.counted})
    if len(devices) > 1:
        notes.append(f"Seconds and images/s are of different devices: {'; '.join(devices)}.")
    return notes
