"""A grid of runs in one folder: finished ones are kept, the others trained, wherever it was left."""

from __future__ import annotations

import os
import pickle
import signal
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from resode.checks import check_number, check_whole, one_of
from resode.tables import csv_text, read_csv
from resode.training.compare import Comparison, compare
from resode.training.data import ImageData, load_data
from resode.training.files import RunError, read_yaml, replacing, unusable, write_atomically
from resode.training.folder import RunFolder, check_format, exclusive, remove_unfinished
from resode.training.loggers import LOGGERS, logger_callback
from resode.training.plan import Model, check_data_place, choose_device
from resode.training.processes import Interrupted, interruption
from resode.training.recipe import Recipe
from resode.training.run import check_plan
from resode.training.sweep.grid import Point, differences, own_of, points, text_of
from resode.training.sweep.live import LiveTable
from resode.training.sweep.local import LocalEngine
from resode.training.sweep.worker import Outcome, Task

SETTINGS_FILE, TABLE, LOG, LOCK = "sweep.yaml", "sweep.csv", "sweep.log", ".sweep.lock"
"""A sweep's own files, beside its runs' folders."""

FORMAT = 1
"""Version of sweep.yaml; a newer one is refused."""

ENGINES = ("local", "ray")


class Engine(Protocol):
    """What trains the runs."""

    @property
    def free(self) -> int:
        """How many more tasks it takes."""
        ...

    def submit(self, task: Task) -> None:
        """Take a task."""

    def running(self) -> list[int]:
        """Numbers of the tasks that are being trained."""
        ...

    def outcomes(self, seconds: float) -> list[Outcome]:
        """What has ended since; waits so long for the first one."""
        ...

    def stop(self) -> list[Outcome]:
        """Have the runs save where they are; what has ended meanwhile."""
        ...

    def close(self) -> None:
        """Let everything go."""


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep.

    Args:
        name: of its folder within the sweep's.
        values: what it has of each of the grid's keys.
        path: its folder.
        status: "finished" or "failed".
        error: why it failed; None where it has not.
        summary: its figures, see `resode.training.run.Summary`; empty where it has not finished.
    """

    name: str
    values: Mapping[str, Any]
    path: Path
    status: str
    error: str | None
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """The runs of a grid.

    Args:
        path: their folder.
        runs: one for each point of the grid, in its order; the last key varies fastest.
        comparison: of the runs that have finished, see `resode.compare`; None where none has.
    """

    path: Path
    runs: tuple[SweptRun, ...]
    comparison: Comparison | None

    @property
    def failed(self) -> tuple[SweptRun, ...]:
        """The runs that failed."""
        return tuple(run for run in self.runs if run.status == "failed")

    def to_csv(self, path: str | Path | None = None) -> str:
        """The runs as comma-separated values, one row each: the grid's keys, then what came of it.

        Args:
            path: where to write it too.

        Returns:
            The text.
        """
        keys = list(dict.fromkeys(key for run in self.runs for key in run.values))
        figures = dict.fromkeys(name for run in self.runs for name in run.summary)
        figures = [name for name in figures if name not in (*keys, "model_options")]
        rows = [
            [
                run.name,
                *(_cell(run.values.get(key)) for key in keys),
                run.status,
                run.error,
                *(run.summary.get(name) for name in figures),
            ]
            for run in self.runs
        ]
        text = csv_text(["run", *keys, "status", "error", *figures], rows)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        counts = {s: sum(run.status == s for run in self.runs) for s in ("finished", "failed")}
        told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return f"sweep of {len(self.runs)} runs in {self.path}: {told}"


def _cell(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else text_of(value)


def sweep(
    folder: str | Path,
    grid: Mapping[str, Any] | None = None,
    *,
    model: Model | None = None,
    data: str | ImageData | None = None,
    recipe: str | Recipe | None = None,
    model_options: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    download: bool = False,
    device: str = "auto",
    step_limits: bool = False,
    logger: str | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    retries: int = 2,
    engine: str = "local",
    address: str | None = None,
    gpus: float | None = None,
    progress: bool = True,
    **settings: Any,
) -> Sweep:
    """Train a run for every point of a grid, each in a folder of its own, named by its place.

    Called again it goes on: finished runs are kept, one that was interrupted, by a kill too, goes on from its
    last checkpoint, one that failed is tried again. A run ends with the weights that `resode.train` gives
    with as many threads, to the bit. One that fails, because it diverges for example, is recorded, and the
    others go on.

    The folder gets sweep.yaml (the grid and settings), sweep.csv (a row a run), compare.csv and compare.png.

    Args:
        folder: of the sweep; a run's is folder/NAME, such as folder/solver=rk4,seed=0.
        grid: keys to their values; a key is `model`, `data`, `recipe`, a setting of `Recipe` or an option of
            the network, and the values are a list, a range, or text: "euler,rk4", "0:5" as Python's range.
            None for the grid and the settings of the sweep that the folder holds.
        model: of all runs; one of one's own is a class or function in a module, which the processes import.
        data: of all runs, as for `resode.train`.
        recipe: likewise.
        model_options: likewise.
        data_dir: likewise.
        download: likewise.
        device: likewise; with several GPUs each process has its own.
        step_limits: record every run's step limits, see `resode.training.monitor.StepLimits`.
        logger: of every run: "tensorboard", "wandb" or "csv", as for `resode.train`.
        jobs: runs at once, each in a process of its own, which imports everything once; None for a GPU each,
            else for the cores divided by the threads.
        threads: of a run; None for what the sweep began with, at first the cores divided by the jobs.
        retries: how often a run is tried again whose process was killed.
        engine: "local" or "ray": a Ray cluster, see `address`.
        address: of the cluster, such as "auto" or "10.0.0.1:6379"; None for one of this machine alone.
        gpus: that a run takes of a Ray cluster; None for none, or for 1 where the device is a GPU.
        progress: whether to print what happens.
        **settings: of `Recipe` or of the network, of all runs: epochs=3, width=8, ….

    Returns:
        The runs, also those that failed.

    Raises:
        ValueError, TypeError: an unknown key, values that contradict each other, or a run in the folder that
            is another one; before anything is trained.
        RunError: another sweep is at work in the folder, it cannot be written, or the disk is full.
        Interrupted: Ctrl-C or SIGTERM came; every run has saved where it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
        ...     done = sweep(folder, {"solver": ["euler", "rk4"], "seed": range(3)}, epochs=3)
    """
    for name, value, least in (("jobs", jobs, 1), ("threads", threads, 1), ("retries", retries, 0)):
        if value is not None:
            check_whole(name, value, least)
    one_of("engine", engine, ENGINES)
    if logger is not None:
        logger_callback(one_of("logger", logger, LOGGERS))  # its package is missed before anything runs
    places = _Places.of(engine, address, device, gpus, retries)
    one = {
        "model": model,
        "data": data,
        "recipe": recipe,
        "model_options": model_options,
        "data_dir": data_dir,
    }
    common = {name: value for name, value in one.items() if value is not None} | settings
    place = Path(folder)
    stored = _stored(place)
    if grid is None:
        grid, common = _going_on(place, stored, common)
    found = points(grid, common)
    for point in found:
        check_data_place(point.plan.data, data_dir, download)
    _check_importable(found)
    _check_with_data(place, [found[number] for number in _open_points(place, found)], download)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(place, error) from error
    busy = f"another sweep is at work in {place}. Wait for it, or stop it."
    with exclusive(place / LOCK, busy):
        remove_unfinished(place.glob(".*"))
        todo = _Todo(place, found, _open_points(place, found))
        if todo.open:
            places = places.divided(jobs, threads or stored.get("threads"), len(todo.open))
            _write(place / SETTINGS_FILE, _settings_text(grid, common, places.threads))
            shared = {"step_limits": step_limits, "download": download, "logger": logger}
            with LiveTable(progress, place, [found[n].name for n in todo.open], len(found)) as table:
                _train_all(todo, places, table, shared)
        return _result(todo)


@dataclass
class _Todo:
    """The points of a sweep, which of them are to be trained, and what became of those that failed."""

    folder: Path
    points: list[Point]
    open: list[int]
    errors: dict[int, str] = field(default_factory=dict)


def _stored(folder: Path) -> dict[str, Any]:
    """What sweep.yaml holds; empty where there is none."""
    path = folder / SETTINGS_FILE
    if (folder / "config.yaml").exists():
        raise ValueError(f"{folder} is the folder of a run. Give the sweep another one.")
    if not path.exists():
        return {}
    stored = read_yaml(path)
    check_format(path, stored.pop("format", None))
    return stored


def _going_on(
    folder: Path, stored: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The grid and the settings of the sweep in a folder; a model or data set of one's own is given again."""
    if not stored:
        raise ValueError(
            f"there is no sweep in {folder} to go on with. Give it a grid, such as solver=euler,rk4 and "
            "seed=0:5."
        )
    own = {
        name: value
        for name, value in given.items()
        if name in ("model", "data") and not isinstance(value, str)
    }
    if changed := [name for name in given if name not in own and given[name] != stored.get(name)]:
        raise ValueError(
            f"a sweep that goes on keeps its settings, got {', '.join(changed)}. Leave them out, or give the "
            "grid again with another folder."
        )
    common = {name: value for name, value in stored.items() if name not in ("grid", "threads", "own")}
    for name in stored.get("own", ()):
        if name not in own:
            raise ValueError(
                f"the sweep in {folder} has a {name} of your own, {stored['own'][name]}. Pass it again."
            )
    return dict(stored["grid"]), common | own


def _check_importable(found: list[Point]) -> None:
    """The processes get a model or data set of one's own by its name in a module, or as it is."""
    for point in found:
        for what in ("model", "data"):
            thing = point.arguments.get(what)
            if getattr(thing, "__module__", None) == "__main__" and callable(thing):
                raise ValueError(
                    f"the processes of a sweep import its {what}, and {thing.__qualname__} stands in the "
                    "program itself. Put it into a module of its own, and import it from there."
                )
        try:
            pickle.dumps(point.arguments)
        except Exception as error:
            raise ValueError(
                f"{point.name}: the processes of a sweep must be able to import its model and data, got "
                f"{type(error).__name__}: {error}. Take a class or a function of a module."
            ) from error


def _open_points(folder: Path, found: list[Point]) -> list[int]:
    """Numbers of the points whose runs have not finished; a ValueError where one's folder has another run."""
    open_points = []
    for number, point in enumerate(found):
        place = folder / point.name
        if not (place / "config.yaml").exists():
            open_points.append(number)
            continue
        run = RunFolder(place)
        try:
            config, finished = run.read_config(), run.read_summary() is not None
            other = differences(point, config)
        except (RunError, TypeError, ValueError):  # damaged: the run itself says how, when it goes on
            open_points.append(number)
            continue
        if other:
            raise ValueError(
                f"{place} holds another run, with {'; '.join(other)}. Give the sweep another folder, or "
                "remove that one."
            )
        if not finished:
            open_points.append(number)
    return open_points


def _check_with_data(folder: Path, found: list[Point], download: bool) -> None:
    """What `train` would refuse when it has seen the images; each combination once, whatever its seed."""
    images: dict[str, ImageData] = {}
    seen = set()
    for point in found:
        key = pickle.dumps({name: value for name, value in point.arguments.items() if name != "seed"})
        if key in seen:
            continue
        seen.add(key)
        data = point.plan.data
        if isinstance(data, str):
            if data not in images:
                images[data] = load_data(data, point.plan.data_dir, download=download)
            data = images[data]
        try:
            check_plan(point.plan, data, RunFolder(folder / point.name))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{point.name}: {error}") from error


@dataclass(frozen=True)
class _Places:
    """Where runs are trained: an engine, and what it gives each of them."""

    engine: str
    address: str | None
    devices: list[str]
    threads: int
    gpus: float
    retries: int

    @classmethod
    def of(cls, engine: str, address: str | None, device: str, gpus: float | None, retries: int) -> _Places:
        """What was asked for, before it is known how many runs there are."""
        if engine == "local":
            if address is not None or gpus is not None:
                raise ValueError("address and gpus belong to engine='ray'. Leave them out, or ask for it.")
            place = choose_device(device)
            devices = [str(place)]
            if place.type == "cuda" and place.index is None:
                devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
            return cls(engine, None, devices, 1, 0, retries)
        if device not in ("auto", "cpu", "cuda") or (gpus and device == "cpu"):
            raise ValueError(
                f"Ray gives each run its GPUs, so device is auto, cpu or cuda: got {device!r}, gpus {gpus}."
            )
        if gpus is None:
            gpus = float(device == "cuda")
        check_number("gpus", gpus, least=0)
        return cls(engine, address, ["cuda" if gpus else "cpu"], 1, gpus, retries)

    def divided(self, jobs: int | None, threads: int | None, runs: int) -> _Places:
        """With a device for each of the runs at once, and the cores divided among them."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if jobs is None:
            gpus = len(self.devices) if self.devices[0] != "cpu" else 0
            jobs = gpus or max(1, cores // (threads or 1))
        jobs = min(jobs, runs)
        devices = [self.devices[number % len(self.devices)] for number in range(jobs)]
        return replace(self, devices=devices, threads=threads or max(1, cores // jobs))

    def start(self, folder: Path) -> Engine:
        """Begin the engine."""
        if self.engine == "local":
            return LocalEngine(self.devices, self.threads, folder / LOG)
        from resode.training.sweep.cluster import RayEngine

        jobs = len(self.devices)
        return RayEngine(
            folder,
            address=self.address,
            jobs=jobs,
            threads=self.threads,
            gpus=self.gpus,
            retries=self.retries,
        )


def _settings_text(grid: Mapping[str, Any], common: Mapping[str, Any], threads: int) -> str:
    """sweep.yaml: what `resode sweep FOLDER` goes on with."""
    plain = dict(common)
    if isinstance(plain.get("recipe"), Recipe):
        plain = asdict(plain.pop("recipe")) | plain
    own = own_of(grid, plain)
    content = {"format": FORMAT, "threads": threads, **({"own": own} if own else {})}
    content |= {name: _plain(value) for name, value in plain.items() if name not in own}
    content["grid"] = {} if "grid" in own else {key: _plain(values) for key, values in grid.items()}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """A value as YAML has it."""
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value.resolve())
    return [_plain(item.item() if hasattr(item, "item") else item) for item in value]


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text)
    except OSError as error:
        raise unusable(path.parent, error) from error


def _train_all(todo: _Todo, places: _Places, table: LiveTable, shared: Mapping[str, Any]) -> None:
    """Train the open points; those that fail are noted, and the others go on."""
    waiting, lost = deque(range(len(todo.open))), Counter[int]()
    table.say(_plan_line(todo))
    engine = places.start(todo.folder)
    try:
        with table, interruption() as asked:
            while waiting or engine.running():
                while waiting and engine.free and not asked:
                    engine.submit(_task(todo, waiting.popleft(), places.devices[0], shared))
                table.running(engine.running())
                for outcome in engine.outcomes(0.5):
                    again = outcome.lost and lost[outcome.number] < places.retries
                    lost[outcome.number] += 1
                    waiting.append(outcome.number) if again else _note(todo, outcome, table)
                if asked:
                    _stopped(todo, engine, table, asked[0])
    finally:
        engine.close()


def _task(todo: _Todo, number: int, device: str, shared: Mapping[str, Any]) -> Task:
    point = todo.points[todo.open[number]]
    return Task(number, str((todo.folder / point.name).resolve()), point.arguments, device, **shared)


def _note(todo: _Todo, outcome: Outcome, table: LiveTable) -> None:
    """A run has ended, for good; a RunError where no other one could fare better."""
    number = todo.open[outcome.number]
    if outcome.error is None:
        summary = RunFolder(todo.folder / todo.points[number].name).read_summary()
        assert summary is not None
        table.finished(outcome.number, summary)
        return
    todo.errors[number] = outcome.error
    table.failed_run(outcome.number, outcome.error)
    if outcome.full:
        raise RunError(
            f"the disk is full, and the sweep stops: {table.done} of {table.total} runs are finished and "
            f"kept. Free some space, and go on with: resode sweep {todo.folder}"
        )


def _stopped(todo: _Todo, engine: Engine, table: LiveTable, signum: int) -> None:
    """Save where the runs are, and say how to go on."""
    for outcome in engine.stop():
        if outcome.error is None:
            _note(todo, outcome, table)
    raise Interrupted(
        f"stopped by {signal.Signals(signum).name}: {table.done} of {table.total} runs are finished, and "
        f"those that had begun have saved where they are. Go on with: resode sweep {todo.folder}",
        signum,
    )


def _plan_line(todo: _Todo) -> str:
    """How many runs there are, and how far they are."""
    names = [todo.points[number].name for number in todo.open]
    begun = sum((todo.folder / name / "config.yaml").exists() for name in names)
    failed: set[str] = set()
    with suppress(OSError, ValueError, KeyError):
        failed = {row["run"] for row in read_csv(todo.folder / TABLE)[1] if row["status"] == "failed"}
    again = len(failed.intersection(names))
    parts = [
        f"{len(todo.points) - len(names)} finished before",
        f"{begun - again} to go on with",
        f"{again} that failed to try again",
        f"{len(names) - max(begun, again)} to begin",
    ]
    return f"{len(todo.points)} runs: " + ", ".join(
        part for part in parts if not part.startswith(("0 ", "-"))
    )


def _result(todo: _Todo) -> Sweep:
    """What the folder holds now; its tables and its figure are written."""
    runs = []
    for number, point in enumerate(todo.points):
        path, error = todo.folder / point.name, todo.errors.get(number)
        summary = None
        if error is None and (path / "config.yaml").exists():
            summary = RunFolder(path).read_summary()
        status = "failed" if summary is None else "finished"
        runs.append(SweptRun(point.name, point.values, path, status, error, summary or {}))
    finished = [run.path for run in runs if run.summary]
    found = Sweep(todo.folder, tuple(runs), compare(finished) if finished else None)
    _write(todo.folder / TABLE, found.to_csv())
    if found.comparison is not None:
        _write(todo.folder / "compare.csv", found.comparison.to_csv())
        with replacing(todo.folder / "compare.png") as path:
            found.comparison.plot(path)
    return found
