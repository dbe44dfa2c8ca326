"""Training in processes of their own, which tests may kill: forked from a server that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resode.training.folder import RunFolder

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["children", "resode.cli", "resode.training.loop", "resode.plots", "sklearn.datasets"]
)


class Small(nn.Module):
    """Convolutions with a norm, smooth, and dropout where asked."""

    def __init__(
        self, norm: str = "group", dropout: float = 0.0, fails: str = "", spare: bool = False
    ) -> None:
        super().__init__()
        if os.environ.get("RANK") == str(fails):
            raise ValueError(f"no network in process {fails}")
        self.spare = nn.Linear(2, 2) if spare else None
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, stride=2),
            nn.GroupNorm(2, 8) if norm == "group" else nn.BatchNorm2d(8),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(8 * 16, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def command(*arguments: object) -> None:
    """The command line, in this process."""
    from resode.cli import main

    sys.argv = ["resode", *map(str, arguments)]
    os.chdir(Path(__file__).parent)
    main()


def impatient_command(*arguments: object) -> None:
    """The command line, where a process waits for no other one to tell its error."""
    from resode.cli import terminal

    terminal.ALONE = 0.0
    command(*arguments)


def kill_until(
    kills: int, folder: Path, arguments: tuple, resume: tuple, longest: float, seed: int
) -> list[tuple[Path, list[str]]]:
    """Train into folder/0, folder/1, …, killing the process after random times, until so many were killed.

    Args:
        kills: how many.
        folder: where the runs go.
        arguments: of a new run, without --run-dir.
        resume: of one that goes on, without --resume.
        longest: seconds that a process lives at most; uniformly distributed, from its start.
        seed: of those times.

    Returns:
        Every run with where it was killed: "update 44" of the checkpoint at that time, or "before the start".
    """
    delays = random.Random(seed)
    runs: list[tuple[Path, list[str]]] = []
    done = 0
    finished = True
    while done < kills or not finished:
        if finished:
            runs.append((folder / str(len(runs)), []))
        path, where = runs[-1]
        begun = (path / "config.yaml").exists()
        process = start(
            command,
            *((*resume, "--resume", path) if begun else (*arguments, "--run-dir", path)),
            said=folder / f"{path.name}.txt",
        )
        process.join(delays.uniform(0, longest) if done < kills else 120)
        finished = process.exitcode is not None
        if finished:
            assert process.exitcode == 0, (folder / f"{path.name}.txt").read_text()
            continue
        process.kill()
        process.join()
        done += 1
        last, _ = RunFolder(path).read_checkpoint() if begun else (None, None)
        where.append("before its first epoch" if last is None else f"after epoch {last.state['epoch']}")
    return runs


def start(target: Callable[..., None], *arguments: Any, said: Path | None = None, **environment: str) -> Any:
    """A process that runs a function; what it prints goes into a file."""
    process = _context.Process(target=_run, args=(target, arguments, said, environment))
    process.start()
    return process


def start_together(
    size: int, target: Callable[..., None], *arguments: Any, said: Path, **place: str
) -> list[Any]:
    """As torchrun would start them, with these variables besides; each prints into said/<rank>."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said.mkdir(exist_ok=True)
    common = {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    } | place
    return [
        start(
            target,
            *arguments,
            said=said / str(rank),
            **{name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()},
        )
        for rank in range(size)
    ]


def ended(processes: list[Any], seconds: float = 300) -> list[int | None]:
    """The processes' exit codes; negative where a signal ended them."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"a process was still there after {seconds} s")
    return [process.exitcode for process in processes]


def _run(target: Callable[..., None], arguments: tuple, said: Path | None, environment: dict) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    from resode import plots

    plots.training_curves = lambda metrics, path: Path(path).write_bytes(b"")  # half a second a run
    out = open(said or os.devnull, "w", buffering=1)
    for stream in (1, 2):
        os.dup2(out.fileno(), stream)
    sys.stdout = sys.stderr = out
    try:
        target(*arguments)
    except Exception:
        traceback.print_exc()
        raise
