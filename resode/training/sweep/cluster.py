"""Runs on a Ray cluster: tasks that Ray tries again where a worker is lost, results in the sweep's folder.

A worker that sees the folder (shared storage) trains in it, so that one that takes over goes on from the last
checkpoint. Elsewhere it trains in a folder of its own, and the files come back with the result.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from resode.training.files import RunError, unusable
from resode.training.sweep.worker import Outcome, Task, run_task

ANSWERING = 10.0
"""Seconds that an address has to take a connection."""

JOINING = 60.0
"""Seconds that what took it has to show that it is a Ray cluster."""

STOPPING = 60.0
"""Seconds that runs have to save where they are when the sweep is asked to stop."""

MARK = ".sweep.ray"
"""By this file's words a worker knows whether the folder that it sees is the sweep's."""

_PROBE = "import sys, ray; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False)"


class RayEngine:
    """Trains tasks on a Ray cluster.

    Args:
        folder: of the sweep.
        address: of the cluster; None for one of this machine, begun here.
        jobs: runs at once, on a cluster that is begun here.
        threads: cores that a run takes.
        gpus: that a run takes.
        retries: how often a task is tried again whose worker was lost.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        RunError: the address does not answer in ten seconds, or not as Ray in a minute.
    """

    def __init__(
        self, folder: Path, *, address: str | None, jobs: int, threads: int, gpus: float, retries: int
    ) -> None:
        try:
            ray: Any = import_module("ray")
        except ImportError as error:
            raise ModuleNotFoundError(
                "engine='ray' needs the package ray, which is not installed: pip install 'resode[sweep]'",
                name="ray",
            ) from error
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            if address not in (None, "auto", "local"):
                check_answers(str(address))
            self._join(address, jobs * threads)
        self._folder = folder
        self._mark = secrets.token_hex(16)
        try:
            (folder / MARK).write_text(self._mark)
        except OSError as error:
            raise unusable(folder, error) from error
        self._begin = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=retries)(train_there).remote
        self._threads = threads
        whole = ray.cluster_resources()
        room = [whole.get("CPU", 1) / threads, *([whole.get("GPU", 0) / gpus] if gpus else [])]
        self._most = 2 * max(1, int(min(room)))  # as many wait there as are trained
        self._tasks: dict[Any, Task] = {}

    def _join(self, address: str | None, cores: int) -> None:
        begun = {"num_cpus": cores, "include_dashboard": False} if address in (None, "local") else {}
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            self._ray.init(
                address or "local",
                logging_level="ERROR",
                log_to_driver=False,
                runtime_env={"env_vars": environment},
                **begun,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunError(
                f"there is no Ray cluster at {address}: {str(error).splitlines()[0]} Start one with ray "
                "start --head, or leave the address out for one of this machine."
            ) from error

    @property
    def free(self) -> int:
        """How many more tasks it takes."""
        return max(0, self._most - len(self._tasks))

    def submit(self, task: Task) -> None:
        """Take a task."""
        self._tasks[self._begin(task, self._threads, self._mark)] = task

    def running(self) -> list[int]:
        """Numbers of the tasks that are being trained, or wait for a worker."""
        return [task.number for task in self._tasks.values()]

    def outcomes(self, seconds: float) -> list[Outcome]:
        """What has ended since; waits so long for the first one."""
        if not self._tasks:
            return []
        ready, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=seconds)
        if ready:
            ready, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        return [self._ended(reference) for reference in ready]

    def _ended(self, reference: Any) -> Outcome:
        task = self._tasks.pop(reference)
        try:
            outcome, files = self._ray.get(reference)
        except self._ray.exceptions.TaskCancelledError:
            return Outcome(task.number, "it was stopped before it began", lost=True)
        except self._ray.exceptions.RayError as error:  # after all retries
            first = (str(error).strip() or "no reason given").splitlines()[0]
            return Outcome(task.number, f"its Ray worker was lost: {type(error).__name__}, {first}")
        if files is not None:
            _unpack(files, Path(task.path))
        return outcome

    def stop(self) -> list[Outcome]:
        """Have the runs save where they are, and wait for it."""
        for reference in self._tasks:
            self._ray.cancel(reference, force=False)  # an interrupt in the worker
        found: list[Outcome] = []
        until = time.monotonic() + STOPPING
        while self._tasks and (left := until - time.monotonic()) > 0:
            found += self.outcomes(left)
        return found

    def close(self) -> None:
        """Let the cluster go, which ends where it was begun here."""
        for reference in self._tasks:
            with suppress(Exception):
                self._ray.cancel(reference, force=True)
        with suppress(OSError):
            (self._folder / MARK).unlink()
        if self._own:
            self._ray.shutdown()


def train_there(task: Task, threads: int, mark: str) -> tuple[Outcome, bytes | None]:
    """On a worker: train in the sweep's folder where it is seen, else in one whose files are returned."""
    import torch

    torch.set_num_threads(threads)
    path = Path(task.path)
    with suppress(OSError):
        if (path.parent / MARK).read_text() == mark:
            return run_task(task), None
    with tempfile.TemporaryDirectory() as place:
        there = Path(place) / path.name
        outcome = run_task(replace(task, path=str(there)))
        return outcome, _packed(there)


def _packed(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return buffer.getvalue()


def _unpack(files: bytes, folder: Path) -> None:
    """Put a run's files in its folder's place, in one step."""
    new = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        with zipfile.ZipFile(io.BytesIO(files)) as archive:
            archive.extractall(new)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
    except OSError as error:
        raise unusable(folder, error) from error


def check_answers(address: str, *, connecting: float = ANSWERING, joining: float = JOINING) -> None:
    """A RunError where an address does not answer, or not as a Ray cluster, in so many seconds."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"the address of a Ray cluster is auto, HOST:PORT or ray://HOST:PORT, got {address!r}."
        )
    advice = "Start Ray there (ray start --head), or give the address that it printed."
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=connecting).close()
    except OSError as error:
        raise RunError(
            f"{address} does not answer ({error.strerror or error}; it had {connecting:g} s). {advice}"
        ) from error
    probe = [sys.executable, "-P", "-c", _PROBE, address]  # a failure there can end the process
    try:
        told = subprocess.run(probe, capture_output=True, text=True, timeout=joining, check=False)
    except subprocess.TimeoutExpired as error:
        raise RunError(
            f"{address} takes connections, but shows in {joining:g} s no Ray cluster. {advice}"
        ) from error
    if told.returncode:
        why = [line for line in told.stderr.splitlines() if "Error" in line]
        raise RunError(
            f"{address} takes connections, but this process cannot join it as a Ray cluster "
            f"({why[-1].strip() if why else 'it gives no reason'}). A cluster with tokens wants Ray's own "
            f"environment variables here too (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH). {advice}"
        )
