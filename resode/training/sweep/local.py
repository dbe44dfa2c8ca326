"""Runs on this machine: processes that import torch once, and train one run after another."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

from resode.training.files import RunError
from resode.training.sweep.worker import Outcome, Task

STOPPING = 60.0
"""Seconds that runs have to save where they are when the sweep is asked to stop."""


_PROGRAM = "import sys; from resode.training.sweep.worker import serve; serve(*map(int, sys.argv[1:]))"


@dataclass
class _Slot:
    """One process, what it is connected by, and what it trains."""

    connection: Connection
    device: str
    ready: bool = False
    task: Task | None = None


class LocalEngine:
    """Trains tasks in processes of this machine.

    Args:
        devices: of each process; as many run at once.
        threads: of each process.
        log: a file for what they print.

    Raises:
        RunError: the system has no connected processes (Windows).
    """

    def __init__(self, devices: list[str], threads: int, log: Path) -> None:
        if not hasattr(socket, "AF_UNIX"):
            raise RunError("a sweep on this system needs engine='ray': local processes need Unix.")
        self.threads = threads
        self.log = log
        self._file: IO[bytes] = log.open("ab")
        self._slots: list[_Slot] = []
        self._servers: list[subprocess.Popen[bytes]] = []
        self._stopping = False
        groups = [devices] if sys.platform == "linux" else [[device] for device in devices]
        for group in groups:
            self._slots += self._started(group)

    def _started(self, devices: list[str]) -> list[_Slot]:
        pairs = [socket.socketpair() for _ in devices]
        theirs = [their.fileno() for _, their in pairs]
        count = str(self.threads)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # else CUDA is begun before the processes part
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), count),
        }
        server = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, count, *map(str, theirs)],
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=self._file,
            pass_fds=theirs,
            env=environment,
            start_new_session=True,  # Ctrl-C comes to this process alone, which tells the others once
        )
        self._servers.append(server)
        for _, their in pairs:
            their.close()
        return [
            _Slot(Connection(ours.detach()), device) for (ours, _), device in zip(pairs, devices, strict=True)
        ]

    @property
    def free(self) -> int:
        """How many more tasks it takes."""
        return sum(slot.task is None for slot in self._slots)

    def submit(self, task: Task) -> None:
        """Take a task, where there is a free process."""
        slot = next(slot for slot in self._slots if slot.task is None)
        slot.task = Task(**{**vars(task), "device": slot.device})
        with suppress(OSError):  # a process that has gone is found by `outcomes`
            slot.connection.send(slot.task)

    def running(self) -> list[int]:
        """Numbers of the tasks that are being trained."""
        return [slot.task.number for slot in self._slots if slot.task is not None]

    def outcomes(self, seconds: float) -> list[Outcome]:
        """What has ended since; waits so long for the first one.

        Raises:
            RunError: a process could not begin.
        """
        found = []
        for connection in wait([slot.connection for slot in self._slots], seconds):
            slot = next(slot for slot in self._slots if slot.connection is connection)
            try:
                message: Any = slot.connection.recv()
            except (EOFError, OSError):
                found += self._lost(slot)
                continue
            if isinstance(message, Outcome):
                slot.task = None
                found.append(message)
            else:
                slot.ready = True
        return found

    def _lost(self, slot: _Slot) -> list[Outcome]:
        """A process has gone: another one takes its place."""
        if not slot.ready and not self._stopping:
            raise RunError(
                f"a process of the sweep could not begin; {self.log} says why: {self._last_line()}"
            )
        slot.connection.close()
        self._slots.remove(slot)
        if not self._stopping:
            self._slots += self._started([slot.device])
        if slot.task is None:
            return []
        return [
            Outcome(
                slot.task.number, "its process was killed (by the system, where memory ran out)", lost=True
            )
        ]

    def _last_line(self) -> str:
        with suppress(OSError):
            lines = self.log.read_text(errors="replace").strip().splitlines()
            return lines[-1] if lines else "nothing."
        return "nothing."

    def stop(self) -> list[Outcome]:
        """Have the runs save where they are, and wait for it; none begins after it."""
        self._stopping = True
        for slot in self._slots:
            if slot.task is not None:
                with suppress(OSError):
                    slot.connection.send("stop")
        found: list[Outcome] = []
        until = time.monotonic() + STOPPING
        while self.running() and (left := until - time.monotonic()) > 0:
            with suppress(RunError):
                found += self.outcomes(left)
        return found

    def close(self) -> None:
        """End the processes: they go with their connections."""
        for slot in self._slots:
            slot.connection.close()
        for server in self._servers:
            try:
                server.wait(5)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
                server.wait()
        self._file.close()
        with suppress(OSError):
            if not self.log.stat().st_size:
                self.log.unlink()
