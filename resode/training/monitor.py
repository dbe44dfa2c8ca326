"""Watching a run: what it does to the stability of a network's blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from resode.analysis.depth.losses import LossFunction
from resode.analysis.diagnose.diagnose import diagnose
from resode.analysis.diagnose.page import Diagnosis
from resode.analysis.steps.block_limits import BlockLimit, block_limit
from resode.analysis.steps.blocks import block_groups
from resode.checks import check_number, check_whole, checked
from resode.jacobian.linearize import check_field
from resode.jacobian.spectrum import SpectrumOptions, spectrum
from resode.modes import evaluating, own_random_state
from resode.tableaus import explicit_tableau
from resode.tables import read_records, records_text
from resode.training.files import DamagedFile, replacing

FILE = "step_limits.csv"
"""Where a run folder keeps the records."""


class Callback(Protocol):
    """What a training loop calls; `loop` is a `resode.training.loop.TrainingLoop`."""

    def after_update(self, loop: Any) -> None:
        """After each update of the weights."""

    def after_run(self, loop: Any) -> None:
        """After the last one."""


@dataclass(frozen=True)
class GroupRecord:
    """One group of a network after one update.

    Args:
        update: updates done.
        group: its name.
        solver: the method.
        step: the length h of its steps, the longest of its blocks.
        growing: the most growing modes that were found in a block.
        decaying_step: the least limit over the other modes of a block, as far as they were found.
        amplification: the largest |R(hλ)| of a block, growing modes included: at most 1 inside the region.
        exact: whether `decaying_step` is exact; else it is an upper bound, inf where none is known.
        estimate: what the eigenvalues that were found allow, without a claim; it is what is drawn.
    """

    update: int
    group: str
    solver: str
    step: float
    growing: int
    decaying_step: float
    amplification: float
    exact: bool = False
    estimate: float = float("nan")


class StepLimits:
    """Records each group's growing modes and step limits while a network trains, and draws them at the end.

    Every block is linearized in evaluation mode at the states that fixed images reach, and the outer
    eigenvalues of its Jacobian are estimated from a small Krylov space: enough to watch, no converged limits.
    The network and the random state stay as they were, so that the training is the same to the bit.

    Args:
        images: to watch the states of, in the network's input format; None for the first test images.
        every: updates between two records; None for as often as `share` of the time allows.
        solvers: methods; None for each group's own.
        samples: of the images to use.
        vectors: dimensions of the Krylov space.
        share: of the training time, with `every=None`.

    Raises:
        ValueError: a number out of its range, or an implicit or unknown method.

    Example:
        >>> import torch
        >>> from resode import ResidualStack
        >>> stack = ResidualStack([nn.Linear(4, 4)], solver="rk4")
        >>> watch = StepLimits(torch.ones(2, 4))
        >>> watch.record(stack, update=0)
        >>> watch.records[0].solver, watch.records[0].group
        ('rk4', '')
    """

    @checked
    def __init__(
        self,
        images: Tensor | None = None,
        *,
        every: int | None = None,
        solvers: Sequence[str] | None = None,
        samples: int = 1,
        vectors: int = 24,
        share: float = 0.04,
    ) -> None:
        if every is not None:
            check_whole("every", every, 1)
        check_whole("samples", samples, 1)
        check_whole("vectors", vectors, 2)
        check_number("share", share, above=0, below=1)
        if isinstance(solvers, str):
            raise TypeError(
                f"solvers must be a sequence of methods' names, got {solvers!r}: put it in a list."
            )
        for name in solvers or ():
            explicit_tableau(name, "watching takes")
        self.images = images
        self.every, self.solvers, self.samples = every, solvers, samples
        self.vectors, self.share = vectors, share
        self.records: list[GroupRecord] = []
        self.costs: list[float] = []  # seconds a record
        self._begun: float | None = None

    def check(self, network: nn.Module, images: Tensor) -> None:
        """That there are blocks to watch, before anything is trained; a ValueError where there are none."""
        images = images if self.images is None else self.images
        with own_random_state(images.device):
            block_groups(network, images[: self.samples])

    def after_update(self, loop: Any) -> None:
        """Record, where it is time to."""
        now = time.perf_counter()
        if self._begun is None:
            self._begun = now
            self._take_up(loop)
        if self.images is None:
            self.images = next(iter(loop.held_out["test"]))[0][: self.samples]
        if self.every is not None:
            due = loop.update % self.every == 0
        else:  # what the last one took is what the next one will take; the first one may take a second
            next_one = min(self.costs, default=0.02)
            due = self.seconds + next_one <= self.share * (now - self._begun)
        if due:
            self.record(loop.network, loop.update)
            loop.folder.write(FILE, self.to_csv())

    def after_run(self, loop: Any) -> None:
        """Draw the figure into the run folder, beside step_limits.csv."""
        if not self.records:
            if self.images is None:  # nothing was left to train
                return
            self.record(loop.network, loop.update)  # a short run shall have one record at least
            loop.folder.write(FILE, self.to_csv())
        from resode import plots

        with replacing(loop.folder.figures / "step_limits.png") as path:
            plots.step_limits(self.records, path)

    def _take_up(self, loop: Any) -> None:
        """Keep the records of a resumed run up to where it goes on."""
        path = loop.folder.path / FILE
        if self.records or not path.exists():
            return
        try:
            found = read_records(GroupRecord, path)
        except ValueError as error:
            raise DamagedFile(f"{path} is no sound table of step limits: {error}. Remove it.") from error
        self.records = [record for record in found if record.update < loop.update]

    @property
    def seconds(self) -> float:
        """What recording took."""
        return sum(self.costs)

    def record(self, network: nn.Module, update: int) -> None:
        """Add a record of every group."""
        if self.images is None:
            raise ValueError("there are no images to watch: pass images= to StepLimits.")
        begun = time.perf_counter()
        options = SpectrumOptions(budget=self.vectors, search=True, check=False)
        with own_random_state(self.images.device), evaluating(network):
            for group in block_groups(network, self.images[: self.samples]):
                solvers = self.solvers or [group.solver]
                found: list[list[BlockLimit]] = [[] for _ in solvers]
                for block, (field, x, step) in enumerate(
                    zip(group.fields, group.states, group.steps, strict=True)
                ):
                    if not self.records:
                        check_field(field, x)
                    some = spectrum(field, x, options, solvers)
                    for number, solver in enumerate(solvers):
                        found[number].append(block_limit(some, solver, step, block))
                for solver, rows in zip(solvers, found, strict=True):
                    self.records.append(
                        GroupRecord(
                            update=update,
                            group=group.name,
                            solver=solver,
                            step=max(group.steps),
                            growing=max(row.growing for row in rows),
                            decaying_step=min(row.decaying_step for row in rows),
                            amplification=max(row.amplification for row in rows),
                            exact=all(row.exact for row in rows),
                            estimate=min(row.estimate for row in rows),
                        )
                    )
        self.costs.append(time.perf_counter() - begun)

    def to_csv(self) -> str:
        """The records, one row each."""
        return records_text(GroupRecord, self.records)

    def plot(self, path: str | None = None) -> Any:
        """Draw them over the updates; see `resode.plots.step_limits`."""
        from resode import plots

        return plots.step_limits(self.records, path)


class Watch:
    """Step limits and diagnoses of a network that is trained in a loop of one's own.

    Call it after each update. The network, its mode and the random state stay as they were. For Lightning's
    Trainer there is `resode.training.callbacks.TrainerWatch`.

    Args:
        images: fixed inputs, in the network's format, whose states are watched.
        target: their targets, for the diagnosis's gradients; None for none.
        every: updates between two records of the step limits; None for none.
        diagnose_every: updates between two diagnoses; None for none.
        lr: what the diagnosis compares with the largest stable learning rate; None for nothing.
        loss_fn: of the network's output and the target; None for the diagnosis's own.

    Raises:
        ValueError: nothing is watched, or a number is out of its range.

    Example:
        >>> import torch
        >>> from resode import ResidualStack
        >>> stack = ResidualStack([nn.Linear(4, 4), nn.Linear(4, 4)])
        >>> watch = Watch(torch.ones(2, 4), every=2)
        >>> for update in range(4):
        ...     _ = watch(stack, update)
        >>> [record.update for record in watch.step_limits.records]
        [0, 2]
    """

    @checked
    def __init__(
        self,
        images: Tensor,
        target: Tensor | None = None,
        *,
        every: int | None = 100,
        diagnose_every: int | None = None,
        lr: float | None = None,
        loss_fn: LossFunction | None = None,
    ) -> None:
        if every is None and diagnose_every is None:
            raise ValueError("there is nothing to watch: give every=, diagnose_every= or both.")
        for name, value in (("every", every), ("diagnose_every", diagnose_every)):
            if value is not None:
                check_whole(name, value, 1)
        self.every, self.diagnose_every = every, diagnose_every
        self.images, self.target, self.lr, self.loss_fn = images, target, lr, loss_fn
        self.step_limits = StepLimits(images, every=every)
        self.diagnoses: list[tuple[int, Diagnosis]] = []

    def __call__(self, network: nn.Module, update: int) -> Diagnosis | None:
        """Look at the network where it is time to.

        Args:
            network: as it is after the update.
            update: the number of updates made.

        Returns:
            The diagnosis that was made, if any; its `findings` are empty where nothing is unusual.
        """
        if self.every is not None and update % self.every == 0:
            self.step_limits.record(network, update)
        if self.diagnose_every is None or update % self.diagnose_every:
            return None
        with own_random_state(self.images.device):
            found = diagnose(network, self.images, self.target, loss_fn=self.loss_fn, lr=self.lr)
        self.diagnoses.append((update, found))
        return found
