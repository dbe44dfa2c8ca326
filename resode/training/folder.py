"""The run folder: all that a run leaves behind, written so that no half file ever replaces a good one.

    RUN/config.yaml            resolved settings; `resode train --config RUN/config.yaml` repeats the run
        metrics.csv            one row an epoch; train_loss is what was minimised, label smoothing included
        weights.safetensors    the network's state_dict, with its name and options in the header
        summary.json           the figures of the finished run
        checkpoints/           last and previous: everything a resumed run needs; with a validation split,
                               best: the weights of the epoch with the highest validation accuracy, the first
                               of equals; after a divergence, diverged: the state that failed
        figures/

The files themselves are read and written by `resode.training.files`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from resode.tables import csv_text, read_csv
from resode.training.files import (
    DamagedFile,
    RunError,
    SettingsError,
    pack,
    read_header,
    read_json,
    read_yaml,
    unpack,
    unusable,
    write_atomically,
)

try:
    import fcntl
except ImportError:  # Windows has no such locks; two processes in one folder go unnoticed there
    fcntl = None

FORMAT = 1
"""Version of the run folder; a newer one is refused."""


LOCK = ".lock"
"""Held by the process that writes into a run folder."""


_UNFINISHED = re.compile(r"\.[\w-]+\.(yaml|csv|json|safetensors)\.\w{8}|\.[\w-]+-\d+\.(png|csv)")
"""Names of files that were being written when their process was killed; see `resode.training.files`."""


_MEASURED = ("epoch", "train_accuracy", "test_accuracy", "images_per_second", "nfe", "seconds")
"""Columns that every metrics.csv has."""


class NoSuchRun(RunError):
    """There is no run folder or weights file where one was named.

    Args:
        path: what was named.
    """

    exit_code = 2

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        what = (
            "is not a run folder: it has no config.yaml"
            if path.is_dir()
            else "is a file, not a run folder"
            if path.is_file()
            else "does not exist"
        )
        found = sorted(
            {
                str(c.parent)
                for place in (path, path.parent, Path("runs"))
                for c in place.glob("*/config.yaml")
            }
        )
        listed = f"Runs nearby: {', '.join(found[:8])}." if found else "Train one with resode train."
        super().__init__(f"no run {path}: it {what}. {listed}")


class FolderTaken(RunError):
    """A new run was to be written into a folder that holds something."""

    exit_code = 2


class FolderInUse(RunError):
    """Another process is writing into the folder."""


@contextmanager
def exclusive(path: Path, message: str) -> Iterator[None]:
    """Holds a lock file, removed afterwards; a FolderInUse with this message where another process has it."""
    try:
        file = path.open("w")
    except OSError as error:
        raise unusable(path.parent, error) from error
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FolderInUse(message) from error
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def remove_unfinished(files: Iterable[Path]) -> None:
    """Remove those that were being written when their process was killed."""
    for left in filter(_unfinished, files):
        with suppress(OSError):
            left.unlink()


@dataclass(frozen=True)
class Checkpoint:
    """Everything a resumed run needs: named tensors, and counters and settings that JSON can hold."""

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix.`, without it."""
        start = prefix + "."
        return {name[len(start) :]: value for name, value in self.tensors.items() if name.startswith(start)}


class RunFolder:
    """A run's files.

    Args:
        path: the folder.

    Raises:
        RunError: it cannot be made, read or written; the message says what to do.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """A new, empty run folder; one that holds anything is refused."""
        folder = cls(path)
        try:
            if folder.path.exists() and not folder.path.is_dir():
                raise FolderTaken(
                    f"a run needs a folder of its own: {path} is a file. Give another --run-dir."
                )
            # Empty folders, the lock and half a file are what a run leaves that was killed before it began.
            if any(f.is_file() and f.name != LOCK and not _unfinished(f) for f in folder.path.rglob("*")):
                known = (folder.path / "config.yaml").exists()
                raise FolderTaken(
                    f"a run is never overwritten: {path} is not empty. Give another --run-dir, "
                    + (f"go on with --resume {path}, or remove it." if known else "or remove it.")
                )
        except OSError as error:
            raise unusable(folder.path, error) from error
        folder._make()
        return folder

    def _make(self) -> None:
        try:
            for name in ("checkpoints", "figures"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unusable(self.path, error) from error

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run folder."""
        folder = cls(path)
        if not (folder.path / "config.yaml").is_file():
            raise NoSuchRun(path)
        folder._make()
        return folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing into the folder; a FolderInUse where one is at it."""
        message = f"{self.path} is in use by another process. Wait for it, or stop it."
        ours = False
        try:
            with exclusive(self.path / LOCK, message):
                ours = True
                remove_unfinished(self.path.rglob(".*"))
                yield
        finally:
            if ours:
                self._discard_if_empty()

    def _discard_if_empty(self) -> None:
        """Leave nothing behind where not even the settings were written."""
        if (self.path / "config.yaml").exists():
            return
        for name in ("checkpoints", "figures", "."):
            with suppress(OSError):
                (self.path / name).rmdir()

    @property
    def figures(self) -> Path:
        """Where figures go."""
        return self.path / "figures"

    @property
    def weights(self) -> Path:
        """The network's weights."""
        return self.path / "weights.safetensors"

    @property
    def best(self) -> Path:
        """The weights that did best on the validation images."""
        return self.path / "checkpoints" / "best.safetensors"

    @property
    def diverged(self) -> Path:
        """The state in which a run failed."""
        return self.path / "checkpoints" / "diverged.safetensors"

    def write(self, name: str, content: bytes | str) -> Path:
        """Write a file of the folder, or leave the one that stood there."""
        try:
            return write_atomically(self.path / name, content)
        except OSError as error:
            raise unusable(self.path, error) from error

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Store the resolved settings, and a checksum over them."""
        plain = dict(config)
        checked = {
            "format": plain.pop("format"),
            "checksum": _digest(config),
            **plain,
        }  # first: not to be cut off
        text = yaml.safe_dump(checked, sort_keys=False, allow_unicode=True)
        own = " --model MODULE:FUNCTION" if config.get("record", {}).get("own_model") else ""
        command = f"resode train --config {self.path / 'config.yaml'}{own}"
        self.write("config.yaml", f"# `{command}` repeats this run.\n{text}")

    def read_config(self) -> dict[str, Any]:
        """The stored settings.

        Raises:
            SettingsError: they are not those that the run wrote; the message names what was changed.
        """
        path = self.path / "config.yaml"
        config = read_yaml(path)
        check_format(path, config.get("format"))
        checksum = config.pop("checksum", None)
        if checksum is not None and checksum == _digest(config):
            return config
        stored = self._last_state().get("settings") or {}
        names = [name for name in {**stored, **config} if name != "record"]
        changed = [
            f"{name} was {stored.get(name, 'absent')} and is {config.get(name, 'absent')}"
            for name in names
            if stored and stored.get(name) != config.get(name)
        ]
        if changed or checksum is not None:  # a run of an older resode has neither
            what = ", ".join(changed) or "its checksum differs"
            raise SettingsError(
                f"{path} was changed after the run wrote it: {what}. A run keeps the settings it was started "
                "with: put back what it wrote, or start a new run with these (--config)."
            )
        return config

    def _last_state(self) -> Mapping[str, Any]:
        """What the newest checkpoint says, its tensors aside; empty where there is none to read."""
        for name in ("last", "previous"):
            with suppress(DamagedFile):
                return read_header(self.path / "checkpoints" / f"{name}.safetensors")
        return {}

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store one row an epoch; a figure that was not measured stays empty."""
        self.write("metrics.csv", _metrics_text(rows))

    def read_metrics(self) -> dict[str, list[float]]:
        """The stored columns; an empty cell is NaN.

        Raises:
            DamagedFile: it is no table of numbers, or not the one that the run wrote, as its summary or
                last checkpoint knows it.
        """
        path = self.path / "metrics.csv"
        try:
            columns, rows = read_csv(path)
            if rows and (missing := [name for name in _MEASURED if name not in columns]):
                raise ValueError(f"it has no column {', '.join(missing)}")
            self._check_metrics(path.read_text(encoding="utf-8"))
            return {name: [float(row[name] or "nan") for row in rows] for name in (columns if rows else [])}
        except ValueError as error:
            raise DamagedFile(
                f"{self.path / 'metrics.csv'} is no sound table of numbers: {error}."
            ) from error

    def _check_metrics(self, text: str) -> None:
        """A ValueError where metrics.csv holds other rows than the rest of the folder says."""
        summary, checksums = self._summary()
        if summary is not None:
            if checksums.get("metrics.csv") not in (None, _digest(text)):
                raise ValueError(
                    "its rows are not those of the finished run: summary.json knows another checksum"
                )
            return
        known = _metrics_text(self._last_state().get("rows", []))
        if not text.startswith(known):  # the row of the epoch that is just ending may follow
            raise ValueError(
                f"its rows are not those of the last checkpoint, which has {known.count(chr(10)) - 1}"
            )

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Store the run's figures, and checksums over them and metrics.csv.

        A figure that is not finite, which JSON has no number for, is stored as null.
        """
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in summary.items()
        }
        checksums = {"summary.json": _digest(plain)}
        metrics = self.path / "metrics.csv"
        if metrics.exists():
            checksums["metrics.csv"] = _digest(metrics.read_text(encoding="utf-8"))
        plain["checksums"] = checksums
        self.write("summary.json", json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """The run's figures, or None while it has not finished."""
        return self._summary()[0]

    def _summary(self) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """The figures, and the checksums beside them."""
        path = self.path / "summary.json"
        if not path.exists():
            return None, {}
        try:
            summary = read_json(path.read_text(encoding="utf-8"), path)
            if not isinstance(summary, dict):
                raise ValueError(f"it holds a {type(summary).__name__}")
            checksums = summary.pop("checksums", {})
            if not isinstance(checksums, dict) or checksums.get("summary.json") not in (
                None,
                _digest(summary),
            ):
                raise ValueError("its figures were changed after the run wrote them")
            return summary, checksums or {}
        except (ValueError, TypeError) as error:
            raise DamagedFile(f"{path} is no sound JSON file: {error}.") from error

    def write_weights(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Store a state_dict and what it belongs to."""
        self.write("weights.safetensors", pack(tensors, {"format": FORMAT, **about}))

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint as the last one; the last one before becomes the previous one."""
        content = pack(checkpoint.tensors, {"format": FORMAT, **checkpoint.state})
        last, previous = (self.path / "checkpoints" / f"{name}.safetensors" for name in ("last", "previous"))
        try:
            new = write_atomically(last.with_name("new.safetensors"), content)
            if last.exists():
                os.replace(last, previous)
            os.replace(new, last)
        except OSError as error:
            raise unusable(self.path, error) from error

    def read_checkpoint(self) -> tuple[Checkpoint | None, str | None]:
        """The newest sound checkpoint (None where there is none), and which damaged file was passed over."""
        damaged = None
        for name in ("last", "previous"):
            path = self.path / "checkpoints" / f"{name}.safetensors"
            if not path.exists():
                continue
            try:
                tensors, state = unpack(path)
            except DamagedFile as error:
                damaged = str(error)
                continue
            check_format(path, state.get("format"))
            return Checkpoint(tensors, state), damaged
        if damaged is not None:
            raise RunError(f"no sound checkpoint is left to go on from: {damaged} Train again.")
        return None, None


def _digest(content: Any) -> str:
    """SHA-256 of plain values, their order in mappings aside."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _metrics_text(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(chain(*rows)))
    return csv_text(columns, ([row.get(name) for name in columns] for row in rows)) if rows else ""


def _unfinished(path: Path) -> bool:
    return _UNFINISHED.fullmatch(path.name) is not None


def check_format(path: Path, found: Any) -> None:
    """A RunError where a file has another format than this resode's."""
    if found != FORMAT:
        raise RunError(
            f"{path} has format {found}, and this resode reads format {FORMAT}. "
            "Install the resode that wrote it (its version stands in config.yaml)."
        )
