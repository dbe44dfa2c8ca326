"""What a sweep's processes do: import everything once, then train one run after another."""

from __future__ import annotations

import errno
import os
import queue
import signal
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from resode.training.files import RunError
from resode.training.folder import FolderInUse
from resode.training.monitor import StepLimits
from resode.training.run import train

PATIENCE = 10.0
"""Seconds that a run waits for its folder: a process that was killed may still be at it for a moment."""


@dataclass(frozen=True)
class Task:
    """A run to make, or to go on with.

    Args:
        number: of the point in its sweep.
        path: of the run's folder.
        arguments: of `resode.train`, for a new run.
        device: it is trained on.
        step_limits: whether they are recorded.
        download: whether the data may be fetched.
        logger: its name, as for `resode.train`.
    """

    number: int
    path: str
    arguments: dict[str, Any]
    device: str
    step_limits: bool = False
    download: bool = False
    logger: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Args:
        number: of the point in its sweep.
        error: why it failed; None where it is finished.
        lost: its process ended under it, or was told to stop; it may be tried again.
        full: the disk is full, so that no other run would fare better.
    """

    number: int
    error: str | None = None
    lost: bool = False
    full: bool = False


def run_task(task: Task) -> Outcome:
    """Train it; whatever goes wrong is told, and nothing raised."""
    try:
        _train(task)
    except KeyboardInterrupt as interruption:
        return Outcome(task.number, str(interruption) or "interrupted", lost=True)
    except Exception as error:
        cause = error.__cause__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        message = str(error) if isinstance(error, RunError | ValueError) else ""
        return Outcome(task.number, message or f"{type(error).__name__}: {error}", full=full)
    return Outcome(task.number)


def _train(task: Task) -> None:
    path = Path(task.path)
    callbacks = [StepLimits()] if task.step_limits else []
    common: dict[str, Any] = {
        "device": task.device,
        "progress": False,
        "callbacks": callbacks,
        "logger": task.logger,
    }
    given_up = time.monotonic() + PATIENCE
    while True:
        try:
            if (path / "config.yaml").exists():
                own = {
                    k: v
                    for k, v in task.arguments.items()
                    if k in ("model", "data") and not isinstance(v, str)
                }
                train(
                    resume=path,
                    data_dir=task.arguments.get("data_dir"),
                    download=task.download,
                    **own,
                    **common,
                )
            else:
                train(run_dir=path, download=task.download, **task.arguments, **common)
            return
        except FolderInUse:
            if time.monotonic() > given_up:
                raise
            time.sleep(0.1)


def serve(threads: int, *places: int) -> None:
    """A process for each of these file descriptors, which tasks come from and outcomes go to.

    On Linux they are forked from this one, which has imported everything and computed nothing.
    """
    import lightning.fabric  # noqa: F401
    import sklearn.datasets  # noqa: F401

    from resode import plots  # noqa: F401
    from resode.training import loop  # noqa: F401

    if len(places) == 1:
        _work(threads, places[0])
        return
    for place in places:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # no thread of ours runs
            child = os.fork()
        if child == 0:
            for other in set(places) - {place}:
                os.close(other)
            _work(threads, place)
            os._exit(0)
    for place in places:
        os.close(place)
    for _ in places:
        os.wait()


def _work(threads: int, place: int) -> None:
    """Do the tasks that come, until the connection ends."""
    torch.set_num_threads(threads)
    inbox = _Inbox(Connection(place))
    inbox.connection.send("ready")
    while (task := inbox.tasks.get()) is not None:
        inbox.connection.send(run_task(task))


@dataclass
class _Inbox:
    """Listens while the main thread trains: where the sweep's process has gone, this one goes too."""

    connection: Connection
    tasks: queue.Queue[Task | None] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                message = self.connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # a run's folder bears to be left at any moment
            except Exception:  # a model that this process cannot import
                traceback.print_exc()
                os._exit(1)
            if message == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                self.tasks.put(message)
