"""Several processes that train one network together, as torchrun starts them, or one process alone.

torchrun tells each process its rank by environment variables. The first process, rank 0, reads and writes the
run folder, evaluates and prints; the gradients are averaged by DDP (`loop.make_fabric`). What the processes
agree on besides goes through a group of its own on the CPU, so that no update waits for a device.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from resode.checks import checked
from resode.training.files import RunError

T = TypeVar("T")

_OF_THE_NETWORK = re.compile(r"gloo|nccl|peer|socket|process ?group|store", re.IGNORECASE)


class LostProcess(RunError):
    """Another process of the run ended, and this one cannot go on alone."""

    def __init__(self, error: BaseException) -> None:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        super().__init__(
            "another process of this run ended, so this one stops too; the last checkpoint is sound. "
            f"Go on with --resume and as many processes as before, or fewer. ({first})"
        )


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and has saved where it was.

    Args:
        message: what was saved, and how to go on.
        signum: the signal that asked.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class FailedElsewhere(RunError):
    """What another process met, told in this one.

    Args:
        message: of that process's error.
        exit_code: of the command.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Processes:
    """The processes of a run, seen from one of them.

    Args:
        rank: this one's number, from 0.
        size: how many there are.
        local_rank: this one's number on its machine.
        local_size: how many this machine has.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    _group: Any = field(default=None, repr=False)
    _pending: tuple[Any, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def found(cls, environment: Mapping[str, str] | None = None) -> Processes:
        """What torchrun's environment variables say; this process alone where there are none.

        Raises:
            RunError: they contradict each other.

        Example:
            >>> Processes.found({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            ...                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}).rank
            1
            >>> Processes.found({}).size
            1
        """
        environment = os.environ if environment is None else environment
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not {*names, "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            return cls()
        try:
            rank, size, local_rank, local_size = (int(environment[name]) for name in names)
        except ValueError:
            rank, size, local_rank, local_size = 0, 0, 0, 0
        if not (0 <= local_rank < local_size <= size and 0 <= rank < size):
            raise RunError(
                "torchrun's variables contradict each other: "
                f"{', '.join(f'{name}={environment[name]}' for name in names)}. Start the run with torchrun, "
                "or unset them."
            )
        return cls(rank, size, local_rank, local_size)

    @property
    def first(self) -> bool:
        """Whether this is the process that reads, writes and prints."""
        return self.rank == 0

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Connects the processes, by NCCL on GPUs and by gloo elsewhere, unless they are connected already.

        Raises:
            LostProcess: one of them did not come.
        """
        if self.size == 1:
            yield
            return
        begun = not dist.is_initialized()
        with losing():
            if begun:
                backend = "nccl" if device.type == "cuda" else "gloo"
                dist.init_process_group(backend, store=_next_store(), rank=self.rank, world_size=self.size)
            self._group = dist.new_group(backend="gloo")
        yield
        with losing():
            dist.barrier(group=self._group)
        dist.destroy_process_group(None if begun else self._group)
        self._group = None  # its threads end with it: one that outlives Python's end would abort the process

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where one process fails inside, all fail: with their own error, or with the first one's message."""
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except LostProcess:
            raise
        except Exception as met:
            error = met
        told: list[tuple[str, int] | None] = [None] * self.size
        own = None
        if error is not None:
            usage = isinstance(error, ValueError | TypeError)
            own = (str(error) or type(error).__name__, getattr(error, "exit_code", 2 if usage else 1))
        with losing():
            dist.all_gather_object(told, own, group=self._group)
        if error is not None:
            raise error
        for rank, other in enumerate(told):
            if other is not None:
                name = "" if rank == 0 else f"process {rank} of {self.size}: "
                raise FailedElsewhere(name + other[0], other[1])

    def from_first(self, action: Callable[[], T]) -> T:
        """What an action gives that the first process alone carries out; its failure is everyone's."""
        result: list[Any] = [None]
        with self.together():
            if self.first:
                result[0] = action()
        if self.size > 1:
            with losing():
                dist.broadcast_object_list(result, src=0, group=self._group)
        return result[0]

    def gathered(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with losing():
                dist.all_gather_object(values, value, group=self._group)
        return values

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes, on the CPU: in float64, or in int64 as it is."""
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
        if self.size > 1:
            value = value.clone()
            with losing():
                dist.all_reduce(value, group=self._group)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, on the CPU, in float64."""
        return self.total(value.double()) / self.size

    def agreed(self, stop: int, look: bool, *, now: bool = False) -> tuple[int, bool]:
        """Whether any process was asked to stop, and whether the first one wants to look at the losses.

        Called once an update. Among several processes the answer is what was asked one update ago, so that
        nobody waits for it, and it is the same in all of them.

        Args:
            stop: the signal that came here, 0 for none.
            look: whether it is time to look.
            now: wait for this very question's answer.
        """
        if self.size == 1:
            return stop, look
        answer = (0, 0)
        with losing():
            if self._pending is not None:
                work, votes = self._pending
                work.wait()
                answer = (int(votes[0]), int(votes[1]))
            votes = torch.tensor([stop, int(look and self.first)])
            work = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._pending = (work, votes)
            if now:
                self._pending = None
                work.wait()  # type: ignore[union-attr]
                answer = (max(answer[0], int(votes[0])), max(answer[1], int(votes[1])))
        return answer[0], bool(answer[1])

    def share_state(self, module: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        if self.size > 1:
            with losing(), torch.no_grad():
                for value in module.state_dict().values():
                    whole = value.detach().contiguous()
                    dist.broadcast(whole, src=0)
                    value.copy_(whole)


_meetings = itertools.count()


@functools.cache
def _store() -> Any:
    """Where the processes find each other: stays while this process does."""
    return next(rendezvous("env://"))[0]


def _next_store() -> Any:
    """A place of its own in it, for this meeting of the processes.

    A process at the next run would otherwise meet the last run's store, which ends under it, or,
    started by torchrun, whose store stays, the last run's addresses.
    """
    return PrefixStore(f"resode {next(_meetings)}", _store())


@contextmanager
def losing() -> Iterator[None]:
    """Says of a broken connection between processes what it means."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and not _OF_THE_NETWORK.search(str(error)):
            raise
        raise LostProcess(error) from error


@checked
def synchronise_norms(network: nn.Module) -> Callable[[], None]:
    """Let a network's batch norms take their statistics over the batches of all processes.

    Args:
        network: changed in place; the weights are shared with the layers that were there.

    Returns:
        What puts the former layers back, with the weights and statistics of now.

    Raises:
        ValueError: it has no batch norm.
    """
    found = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    ]
    if not found:
        raise ValueError("sync_batch_norm changes batch norms, and this network has none. Leave it out.")
    for parent, name, child in found:
        setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))

    def restore() -> None:
        for parent, name, child in found:
            child.train(getattr(parent, name).training)
            setattr(parent, name, child)

    return restore


@contextmanager
def interruption(*, insist: bool = True) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one interrupts at once, if it insists.

    torchrun repeats signals by itself, and kills after 30 s. The list that it yields stays empty outside the
    main thread, where Python sets no handlers.
    """
    asked: list[int] = []

    def ask(signum: int, frame: object) -> None:
        if asked and insist:
            raise KeyboardInterrupt
        asked.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    except LostProcess:
        before[signal.SIGTERM] = signal.SIG_IGN  # torchrun ends the others: they shall first say why
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
