"""The loop over epochs and updates: it can stop anywhere, and go on to the same weights, to the bit.

Nothing in an update waits for the device: losses and hits stay there, and are read once a second at most.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resode.solve import SolverError
from resode.training.data import Batches
from resode.training.evaluate import (
    evaluations_of_last_call,
    other_solver,
    recomputations_of_last_call,
    score,
    solving_modules,
)
from resode.training.files import RunError
from resode.training.folder import Checkpoint, RunFolder
from resode.training.monitor import Callback
from resode.training.progress import Progress
from resode.training.refining import refinable, refine, refined_momentum
from resode.training.task import ClassificationTask

LOOK_EVERY = 1.0
"""Seconds between two looks at the losses on the device."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and has saved where it was.

    Args:
        message: what was saved, and how to go on.
        signum: the signal that asked.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class TrainingLoop:
    """A run's state, from its first update to its last.

    Args:
        fabric: device and precision.
        task: network, loss, optimizer and schedule.
        batches: the training images.
        held_out: "test", and "validation" where images are held out, to their batches.
        folder: where checkpoints, metrics and weights go.
        about: what the weights belong to, for their header.
        progress: where progress is reported.
        callbacks: called after every update and after the run.
    """

    def __init__(
        self,
        fabric: Fabric,
        task: ClassificationTask,
        batches: Batches,
        held_out: Mapping[str, Iterable[tuple[Tensor, Tensor]]],
        folder: RunFolder,
        about: dict[str, Any],
        progress: Progress,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.callbacks = callbacks
        self.fabric = fabric
        self.recipe = task.recipe
        self.network = task.network
        self.task = task
        with _quiet():
            self.module, self.optimizer = fabric.setup(task, task.configure_optimizers())
        self.batches = batches
        self.held_out = held_out
        self.folder = folder
        self.about = about
        self.progress = progress
        self.solving = solving_modules(task.network)
        self.average = (
            AveragedModel(task.network, multi_avg_fn=get_ema_multi_avg_fn(self.recipe.ema), use_buffers=True)
            if self.recipe.ema
            else None
        )

        self.total = task.updates
        self.epoch = 0  # epochs done
        self.index = 0  # updates done in this epoch
        self.seconds = 0.0  # of the whole run, evaluation included
        self.rows: list[dict[str, Any]] = []  # a row of metrics for every epoch done
        self.losses = torch.zeros(len(batches), device=fabric.device)  # of this epoch's updates
        self._start_tally()

    def _start_tally(self) -> None:
        """Forget the epoch before; `losses` is written over."""
        self.index = 0
        self.hits = torch.zeros((), dtype=torch.int64, device=self.fabric.device)
        self.nfe = torch.zeros((), dtype=torch.float64)
        self.nfe_backward = 0
        self.epoch_seconds = 0.0  # of this epoch's updates

    @property
    def kept(self) -> nn.Module:
        """The network that is evaluated and stored: the average where the recipe asks for one."""
        return self.network if self.average is None else self.average.module

    @property
    def update(self) -> int:
        """Updates done in the whole run, whose last epoch may be cut short."""
        return min(self.total, self.epoch * len(self.batches) + self.index)

    @property
    def steps(self) -> int:
        """Updates of this epoch: all its batches, or what is left of the run."""
        return min(len(self.batches), self.total - self.epoch * len(self.batches))

    def run(self) -> None:
        """Train to the end of the recipe.

        Raises:
            RunError: the loss or the weights are no longer finite, or a file could not be written.
            Interrupted: SIGINT or SIGTERM came; a checkpoint was saved first.
        """
        try:
            with interruption() as asked:
                while self.update < self.total or self.index:
                    self._updates(asked)
                    self._end_epoch()
                    self.save()
                    if asked and self.update < self.total:
                        self._stop(asked[0])
            for callback in self.callbacks:
                callback.after_run(self)
            self.network.load_state_dict(self.kept.state_dict())
        finally:
            self.progress.close()

    def _updates(self, asked: list[int]) -> None:
        """The updates of an epoch, from where it stands."""
        due = sum(epoch <= self.epoch + 1 for epoch in self.recipe.refine_at) - self.about.get("refined", 0)
        if due:
            self._refine(due)
            blocks = sum(stack.depth for stack in refinable(self.network))
            self.progress.say(f"refined to {blocks} blocks of {1 / 2 ** self.about['refined']:g} of the step")
        self.batches.set_epoch(self.epoch)
        self.module.train()
        done_before, seconds_before = self.index, self.epoch_seconds
        begun = looked = time.perf_counter()
        for batch in islice(self.batches, self.index, self.steps):
            self._update(batch)
            now = time.perf_counter()
            self.epoch_seconds = seconds_before + now - begun
            if asked:
                self._check_weights()
                self.save()
                self._stop(asked[0])
            if now - looked > LOOK_EVERY:
                looked = now
                rate = self.recipe.batch_size * (self.index - done_before) / (now - begun)
                self.progress.batch(self.epoch + 1, self.index, self.steps, self.mean_loss(), rate)
        self.mean_loss()  # waits for the device, so that the time is all of the epoch's
        self.epoch_seconds = seconds_before + time.perf_counter() - begun

    def _update(self, batch: tuple[Tensor, Tensor]) -> None:
        """One update of the weights."""
        self.task.set_learning_rate(self.optimizer, self.update)
        try:
            with self.fabric.autocast():  # Fabric's wrapper enters it in forward alone
                result = self.module.training_step(batch, self.index)
        except SolverError as error:
            raise self._diverged(f"the solver gave up ({error})", self.index) from error
        except (ValueError, TypeError, IndexError) as error:  # of the network, so not of the settings
            where = f"epoch {self.epoch + 1}, update {self.update + 1} of {self.total}"
            raise RunError(f"the network failed in {where}: {type(error).__name__}: {error}") from error
        self.optimizer.zero_grad()
        self.fabric.backward(result["loss"])
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.losses[self.index] = result["loss"].detach()
        self.hits += result["correct"]
        self.nfe = self.nfe + evaluations_of_last_call(self.solving)
        self.nfe_backward += recomputations_of_last_call(self.solving)
        self.index += 1
        for callback in self.callbacks:
            callback.after_update(self)

    def mean_loss(self) -> float:
        """Mean loss of this epoch's updates so far; a RunError where one is not finite."""
        losses = self.losses[: self.index].tolist()
        for index, loss in enumerate(losses):
            if not abs(loss) < float("inf"):
                raise self._diverged(f"the loss became {loss}", index)
        return sum(losses) / len(losses)

    def _check_weights(self) -> None:
        """A RunError where a loss or a weight is not finite: no checkpoint of it shall replace a good one."""
        self.mean_loss()
        if not all(bool(value.isfinite().all()) for value in self.network.state_dict().values()):
            raise self._diverged("the weights are no longer finite after the update", self.index - 1)

    def _diverged(self, what: str, index: int) -> RunError:
        update = self.epoch * len(self.batches) + index
        kept = (
            f"The checkpoint of epoch {self.epoch} is kept in {self.folder.path / 'checkpoints'}."
            if self.epoch
            else "No epoch was finished, so there is no checkpoint."
        )
        lower = "" if self.recipe.precision == "32" else " or --precision 32"
        return RunError(
            f"{what} in epoch {self.epoch + 1}, update {update + 1} of {self.total}, at learning rate "
            f"{self.recipe.learning_rate(update, self.total):.3g}. Try a tenth of that --lr{lower}. {kept}"
        )

    def _end_epoch(self) -> None:
        """Evaluate, and write the epoch's row of metrics."""
        self._check_weights()
        steps, loss = self.steps, self.mean_loss()
        images = steps * self.recipe.batch_size
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "update": self.update,
            "lr": self.recipe.learning_rate(self.update - 1, self.total),
            "train_loss": loss,
            "train_accuracy": int(self.hits) / images,
        }
        begun = time.perf_counter()
        for name, batches in self.held_out.items():
            result = score(self.kept, batches)
            row |= {f"{name}_loss": result.loss, f"{name}_accuracy": result.accuracy}
        if self.recipe.eval_solver is not None:
            row |= self._under_other_solver()
        self.seconds += self.epoch_seconds + time.perf_counter() - begun
        row |= {
            "images_per_second": images / self.epoch_seconds,
            "nfe": float(self.nfe) / steps,
            "nfe_backward": self.nfe_backward / steps,
            "seconds": self.seconds,
        }
        self.rows.append(row)
        self.progress.epoch(row)
        self.epoch += 1
        self._start_tally()
        self.folder.write_metrics(self.rows)
        self.folder.write_weights(self.kept.state_dict(), self.about)

    def _under_other_solver(self) -> dict[str, float]:
        """The test images again, under the recipe's `eval_solver`; NaN where it gives up."""
        recipe, nothing = self.recipe, float("nan")
        try:
            with other_solver(self.kept, recipe.eval_solver, recipe.eval_substeps):
                result = score(self.kept, self.held_out["test"])
        except SolverError:
            return {"eval_loss": nothing, "eval_accuracy": nothing, "eval_nfe": nothing}
        return {"eval_loss": result.loss, "eval_accuracy": result.accuracy, "eval_nfe": result.nfe}

    def _refine(self, times: int) -> None:
        """Double the blocks so many times; weights, their average and their momentum as they were."""
        self.optimizer.zero_grad()
        for _ in range(times):
            moving = refined_momentum(self.network, self.optimizer)
            refine(self.network)
            if self.average is not None:
                refine(self.average.module)
            del self.module, self.optimizer
            with _quiet():
                self.module, self.optimizer = self.fabric.setup(self.task, self.task.configure_optimizers())
            for weight, momentum in zip(self.network.parameters(), moving.parameters(), strict=True):
                if weight.requires_grad and self.recipe.momentum:
                    own = torch.empty_like(weight).copy_(momentum.detach())  # in its order, as in `restore`
                    self.optimizer.state[weight]["momentum_buffer"] = own
        self.solving = solving_modules(self.network)
        self.about = {**self.about, "refined": self.about.get("refined", 0) + times}

    def _stop(self, signum: int) -> None:
        path = self.folder.path
        raise Interrupted(
            f"stopped by {signal.Signals(signum).name} after update {self.update} of {self.total}; all "
            f"is saved. Go on with: resode train --resume {path}",
            signum,
        )

    def save(self) -> None:
        """Write a checkpoint: weights, momentum, random states, counters and metrics."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for number, weight in enumerate(self._weights()):
            momentum = self.optimizer.state[weight].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{number}"] = momentum
        tensors["random.cpu"] = torch.get_rng_state()
        if self.fabric.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.fabric.device)
        tensors |= {"tally.losses": self.losses[: self.index], "tally.hits": self.hits, "tally.nfe": self.nfe}
        state = {
            **self.about,
            "epoch": self.epoch,
            "index": self.index,
            "seconds": self.seconds,
            "epoch_seconds": self.epoch_seconds,
            "nfe_backward": self.nfe_backward,
            "rows": self.rows,
        }
        self.folder.write_checkpoint(Checkpoint(tensors, state))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was written.

        Raises:
            RunError: it belongs to another network.
        """
        if times := checkpoint.state.get("refined", 0):
            self._refine(times)
        try:
            self.network.load_state_dict(checkpoint.part("network"))
            if self.average is not None:
                self.average.load_state_dict(checkpoint.part("average"))
        except RuntimeError as error:
            raise RunError(
                f"the checkpoint in {self.folder.path} belongs to another network than "
                f"{self.about['model']}: {error}. Resume it with the model it was trained with."
            ) from error
        momenta = checkpoint.part("momentum")
        for number, weight in enumerate(self._weights()):
            if str(number) in momenta:
                # The fused SGD reads its buffers in memory order: they must lie as the weight does.
                momentum = torch.empty_like(weight).copy_(momenta[str(number)])
                self.optimizer.state[weight]["momentum_buffer"] = momentum
        random, tally = checkpoint.part("random"), checkpoint.part("tally")
        torch.set_rng_state(random["cpu"])
        if self.fabric.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.fabric.device)
        self.epoch, self.index = checkpoint.state["epoch"], checkpoint.state["index"]
        self.seconds, self.epoch_seconds = checkpoint.state["seconds"], checkpoint.state["epoch_seconds"]
        self.nfe_backward = checkpoint.state.get("nfe_backward", 0)
        self.rows = checkpoint.state["rows"]
        self.losses[: self.index] = tally["losses"].to(self.losses.device)
        self.hits = tally["hits"].to(self.hits.device)
        self.nfe = tally["nfe"]

    def _weights(self) -> list[nn.Parameter]:
        """Every trained parameter, in the optimizer's order."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]


def make_fabric(device: torch.device, precision: str) -> Fabric:
    """Lightning's Fabric on one device, in "32" or "bf16"."""
    with _quiet():
        return Fabric(
            accelerator=device.type,
            devices=1 if device.index is None or device.type != "cuda" else [device.index],
            precision={"32": "32-true", "bf16": "bf16-mixed"}[precision],  # type: ignore[arg-type]
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what Lightning logs about itself: our own heading says it."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def interruption() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one interrupts at once.

    Yields:
        The signals that came. It stays empty outside the main thread, where Python sets no handlers.
    """
    asked: list[int] = []

    def ask(signum: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
