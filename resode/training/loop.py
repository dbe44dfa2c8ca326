"""The loop over epochs and updates: it can stop anywhere, and go on to the same weights, to the bit.

Nothing in an update waits for the device: losses and hits stay there, and are read once a second at most.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resode.analysis.swap.proof import SwapProof
from resode.blocks.solving import other_solver, solving_modules
from resode.blocks.statistics import measure_statistics
from resode.solve import SolverError
from resode.training.data import Batches
from resode.training.divergence import why_diverged
from resode.training.evaluate import evaluations_of_last_call, recomputations_of_last_call, score
from resode.training.files import RunError, pack
from resode.training.folder import FORMAT, Checkpoint, RunFolder
from resode.training.monitor import Callback
from resode.training.processes import Interrupted, Processes, interruption, losing
from resode.training.progress import Progress
from resode.training.refining import refinable, refine, refined_momentum
from resode.training.task import ClassificationTask

LOOK_EVERY = 1.0
"""Seconds between two looks at the losses on the device."""

AVERAGE_BATCHES = 50
"""Training batches that the statistics of averaged weights are measured on."""


class CompilerFailed(RunError):
    """torch.compile could not compile an update.

    Args:
        error: what it raised; its first line is told.
    """

    def __init__(self, error: Exception) -> None:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        super().__init__(
            f"the update could not be compiled ({first}). Train without compiling (--no-compile, "
            "compile=False); --debug shows what the compiler said."
        )


class TrainingLoop:
    """A run's state, from its first update to its last.

    Args:
        fabric, task: what it is trained on, and what an update is.
        batches: the training images, or the share of them that is this process's.
        held_out: "test", and "validation" where images are held out, to their batches.
        folder: where checkpoints, metrics and weights go.
        about: what the weights belong to, for their header.
        progress: where progress is reported.
        callbacks: called after every update and after the run, in the first process alone.
        processes: those that train together; None for this one alone.
    """

    def __init__(
        self,
        fabric: Fabric,
        task: ClassificationTask,
        batches: Batches,
        held_out: Mapping[str, Iterable[tuple[Tensor, Tensor]]],
        *,
        folder: RunFolder,
        about: dict[str, Any],
        progress: Progress,
        callbacks: Sequence[Callback] = (),
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.callbacks = callbacks if self.processes.first else ()
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
        self.settings: dict[str, Any] = {}  # as config.yaml has them
        self.progress = progress
        self.solving = solving_modules(task.network)
        self.average = (
            AveragedModel(task.network, multi_avg_fn=get_ema_multi_avg_fn(self.recipe.ema), use_buffers=True)
            if self.recipe.ema
            else None
        )

        self.proof = SwapProof(task.network, seed=self.recipe.seed) if self.recipe.swap_proof else None

        self.total = task.updates
        self.epoch = 0  # epochs done
        self.index = 0  # updates done in this epoch
        self.seconds = 0.0  # of the whole run, evaluation included
        self.rows: list[dict[str, Any]] = []  # a row of metrics for every epoch done
        self.losses = torch.zeros(len(batches), device=fabric.device)  # of this epoch's updates
        self._checked = False  # whether every parameter gets a gradient
        self._good: dict[str, Tensor] = {}  # the network when this epoch began, or was resumed
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
        """Train to the end of the recipe; a RunError where that can't be, Interrupted where a signal came."""
        try:
            with interruption(insist=self.processes.size == 1) as asked:
                while self.update < self.total or self.index:
                    self._updates(asked)
                    self._end_epoch()
                    self.save()
                    stop, _ = self.processes.agreed(asked[0] if asked else 0, False, now=True)
                    if stop and self.update < self.total:
                        self._stop(stop)
            for callback in self.callbacks:
                callback.after_run(self)
            self.processes.share_state(self.kept)
            self.network.load_state_dict(self.kept.state_dict())
        finally:
            self.progress.close()

    def close(self) -> None:
        """Let go of the connections between processes; the network stays.

        torch 2.13's reducer ends with Python's lock held: where that is the end of the group's thread too,
        which waits for the lock, the process never ends. So it goes first, while the group is held.
        """
        for module in self.module.modules():
            if isinstance(module, DistributedDataParallel):
                del module.reducer, module.logger

    def _updates(self, asked: list[int]) -> None:
        """The updates of an epoch, from where it stands."""
        due = sum(epoch <= self.epoch + 1 for epoch in self.recipe.refine_at) - self.about.get("refined", 0)
        if due:
            self._refine(due)
            blocks = sum(stack.depth for stack in refinable(self.network))
            self.progress.say(f"refined to {blocks} blocks of {1 / 2 ** self.about['refined']:g} of the step")
        self.batches.set_epoch(self.epoch)
        self.module.train()
        self._good = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        done_before, seconds_before = self.index, self.epoch_seconds
        begun = looked = time.perf_counter()
        for batch in islice(self.batches, self.index, self.steps):
            try:
                self._update(batch)
            except CompilerFailed as error:
                if asked:  # Ctrl-C and `timeout` reach the compiler's processes too
                    raise self._stopped_compiling(asked[0]) from error
                raise
            now = time.perf_counter()
            self.epoch_seconds = seconds_before + now - begun
            stop, look = self.processes.agreed(asked[0] if asked else 0, now - looked > LOOK_EVERY)
            if stop:
                self._check_weights()
                self.save()
                self._stop(stop)
            if look:
                looked = now
                rate = self.recipe.batch_size * (self.index - done_before) / (now - begun)
                self.progress.batch(self.epoch + 1, self.index, self.steps, self.mean_loss(), rate)
        self.mean_loss()  # waits for the device, so that the time is all of the epoch's
        self.epoch_seconds = seconds_before + time.perf_counter() - begun

    def _update(self, batch: tuple[Tensor, Tensor]) -> None:
        """One update of the weights."""
        with losing() if self.processes.size > 1 else nullcontext():
            with _compiling() if self.recipe.compile else nullcontext():
                with self._solver():  # checkpoints are computed again on the way back
                    self._step(batch)
        self.index += 1
        for callback in self.callbacks:
            callback.after_update(self)

    def _step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Forward, backward, and the optimizer's step."""
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
        self._check_all_used()
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.losses[self.index] = result["loss"].detach()
        self.hits += result["correct"]
        self.nfe = self.nfe + evaluations_of_last_call(self.solving)
        self.nfe_backward += recomputations_of_last_call(self.solving)

    def _solver(self) -> AbstractContextManager[None]:
        """The solver that this update is taken with."""
        return nullcontext() if self.proof is None else self.proof.batch(self.update, self.total)

    def _check_all_used(self) -> None:
        """DDP waits for the gradient of every parameter, so it must have come from the first update on."""
        if self.processes.size == 1 or self._checked:
            return
        self._checked = True
        unused = [n for n, p in self.network.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise RunError(
                "several processes can only train parameters that every update uses, and these got no "
                f"gradient: {', '.join(unused[:8])}. Freeze them (requires_grad=False), or train with one "
                "process."
            )

    def mean_loss(self) -> float:
        """Mean loss of this epoch's updates so far, of all processes; a RunError where one is not finite."""
        losses = self._mean_losses().tolist()
        for index, loss in enumerate(losses):
            if not abs(loss) < float("inf"):
                raise self._diverged(f"the loss became {loss}", index)
        return sum(losses) / len(losses)

    def _mean_losses(self) -> Tensor:
        """This epoch's losses so far, averaged over the processes, as float64 on the CPU."""
        return self.processes.mean(self.losses[: self.index])

    def _check_weights(self) -> None:
        """A RunError where a loss or a weight is not finite: no checkpoint of it shall replace a good one."""
        self.mean_loss()
        bad = sum(int(not bool(value.isfinite().all())) for value in self.network.state_dict().values())
        if int(self.processes.total(torch.tensor(bad))):
            raise self._diverged("the weights are no longer finite after the update", self.index - 1)

    def _diverged(self, what: str, index: int) -> RunError:
        update = self.epoch * len(self.batches) + index
        kept = (
            f"The checkpoint of epoch {self.epoch} is kept in {self.folder.path / 'checkpoints'}."
            if self.epoch
            else "No epoch was finished, so there is no checkpoint."
        )
        lower = "" if self.recipe.precision == "32" else " or --precision 32"
        lr = self.recipe.learning_rate(update, self.total)
        advice = f"Try a tenth of that --lr{lower}."
        if self.processes.first:
            kept += self._keep_evidence(what)
            advice = self._advice(lr) or advice
        return RunError(
            f"{what} in epoch {self.epoch + 1}, update {update + 1} of {self.total}, at learning rate "
            f"{lr:.3g}. {advice} {kept}"
        )

    def _advice(self, lr: float) -> str:
        """What the diagnosis of the last good state says, or an empty string."""
        if not self._good:
            return ""
        images, labels = next(iter(self.held_out["test"]))[:2]
        found = why_diverged(self.network, self._good, images, labels, lr)
        return "" if found is None else f"{found.text} {found.advice}"

    def _keep_evidence(self, what: str) -> str:
        """Store the state that failed; a sentence about it."""
        state = {**self.about, "epoch": self.epoch, "index": self.index, "rows": self.rows, "what": what}
        path = self.folder.diverged
        try:
            self.folder.write(f"checkpoints/{path.name}", pack(self._tensors(), {"format": FORMAT, **state}))
        except RunError:
            return ""
        return f" The state that failed is in {path}."

    def _end_epoch(self) -> None:
        """Evaluate, and write the epoch's row of metrics."""
        self._check_weights()
        if self.average is not None and self.update == self.total:
            self._measure_average()
        steps, loss = self.steps, self.mean_loss()
        hits, nfe = int(self.processes.total(self.hits)), float(self.processes.mean(self.nfe))
        row = self.processes.from_first(lambda: self._row(steps, loss, hits, nfe))
        self.seconds = row["seconds"]
        self.rows.append(row)
        self.progress.epoch(row)
        self.epoch += 1
        self._start_tally()
        self.processes.from_first(self._write_epoch)

    def _measure_average(self) -> None:
        """Averaged statistics are of many networks: those of the averaged weights take their place."""
        self.batches.set_epoch(self.epoch)
        some = islice(self.batches, AVERAGE_BATCHES)
        measure_statistics(self.kept, (images.to(self.fabric.device) for images, _ in some))

    def _row(self, steps: int, loss: float, hits: int, nfe: float) -> dict[str, Any]:
        """Evaluate; an epoch's row of metrics."""
        images = steps * self.recipe.batch_size
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "update": self.update,
            "lr": self.recipe.learning_rate(self.update - 1, self.total),
            "train_loss": loss,
            "train_accuracy": hits / images,
        }
        begun = time.perf_counter()
        for name, batches in self.held_out.items():
            result = score(self.kept, batches)
            row |= {f"{name}_loss": result.loss, f"{name}_accuracy": result.accuracy}
        if self.recipe.eval_solver is not None:
            row |= self._under_other_solver()
        return row | {
            "images_per_second": images / self.epoch_seconds,
            "nfe": nfe / steps,
            "nfe_backward": self.nfe_backward / steps,
            "seconds": self.seconds + self.epoch_seconds + time.perf_counter() - begun,
        }

    def _write_epoch(self) -> None:
        self.folder.write_metrics(self.rows)
        self.folder.write_weights(self.kept.state_dict(), self.about)
        accuracies = [row.get("validation_accuracy", -1.0) for row in self.rows]
        if accuracies[-1] > max(accuracies[:-1], default=-1.0):
            about = {**self.about, "best_epoch": len(self.rows), "validation_accuracy": accuracies[-1]}
            self.folder.write(
                f"checkpoints/{self.folder.best.name}",
                pack(self.kept.state_dict(), {"format": FORMAT, **about}),
            )

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

    def _stopped_compiling(self, signum: int) -> Interrupted:
        """Half an update may have been computed, so nothing is saved: the last checkpoint stands."""
        return Interrupted(
            f"stopped by {signal.Signals(signum).name} while update {self.update + 1} of {self.total} was "
            f"compiled; the last checkpoint is kept. Go on with: resode train --resume {self.folder.path}",
            signum,
        )

    def save(self) -> None:
        """Write a checkpoint: weights, momentum, random states, counters and metrics."""
        tensors = self._tensors()
        for rank, states in enumerate(self.processes.gathered(self._random_state())):
            tensors |= {f"random.{_of_rank(name, rank)}": value for name, value in states.items()}
        tensors |= {
            "tally.losses": self._mean_losses().to(self.losses.dtype),
            "tally.hits": self.processes.total(self.hits),
            "tally.nfe": self.processes.mean(self.nfe),
        }
        state = {
            **self.about,
            "settings": {name: value for name, value in self.settings.items() if name != "record"},
            "epoch": self.epoch,
            "index": self.index,
            "seconds": self.seconds,
            "epoch_seconds": self.epoch_seconds,
            "nfe_backward": self.nfe_backward,
            "rows": self.rows,
        }
        self.processes.from_first(lambda: self.folder.write_checkpoint(Checkpoint(tensors, state)))

    def _tensors(self) -> dict[str, Tensor]:
        """Weights, their average, and momentum."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for number, weight in enumerate(self._weights()):
            momentum = self.optimizer.state[weight].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{number}"] = momentum
        return tensors

    def _random_state(self) -> dict[str, Tensor]:
        """Of the generators that this process's networks draw from."""
        states = {"cpu": torch.get_rng_state()}
        if self.fabric.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.fabric.device)
        return states

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
        rank = self.processes.rank
        if _of_rank("cpu", rank) in random:
            torch.set_rng_state(random[_of_rank("cpu", rank)])
        if self.fabric.device.type == "cuda" and _of_rank("cuda", rank) in random:
            torch.cuda.set_rng_state(random[_of_rank("cuda", rank)], self.fabric.device)
        self.epoch, self.index = checkpoint.state["epoch"], checkpoint.state["index"]
        self.seconds, self.epoch_seconds = checkpoint.state["seconds"], checkpoint.state["epoch_seconds"]
        self.nfe_backward = checkpoint.state["nfe_backward"]
        self.rows = checkpoint.state["rows"]
        self.losses[: self.index] = tally["losses"].to(self.losses.device)
        self.hits = (tally["hits"] if rank == 0 else tally["hits"] * 0).to(self.hits.device)
        self.nfe = tally["nfe"]

    def _weights(self) -> list[nn.Parameter]:
        """Every trained parameter, in the optimizer's order."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]


def _of_rank(name: str, rank: int) -> str:
    """What a checkpoint calls a process's part: the first one's as if it were alone."""
    return f"{name}.{rank}" if rank else name


def make_fabric(device: torch.device, precision: str, processes: Processes | None = None) -> Fabric:
    """Lightning's Fabric in "32" or "bf16": on one device, or with DDP on one for each process."""
    options: dict[str, Any] = {"precision": {"32": "32-true", "bf16": "bf16-mixed"}[precision]}
    with _quiet():
        if processes is None or processes.size == 1:
            own = device.index is not None and device.type == "cuda"
            return Fabric(accelerator=device.type, devices=[device.index] if own else 1, **options)
        fabric = Fabric(
            accelerator=device.type,
            devices=processes.local_size,
            num_nodes=processes.size // processes.local_size,
            strategy=DDPStrategy(cluster_environment=_Torchrun()),
            **options,
        )
        fabric.launch()
        return fabric


class _Torchrun(TorchElasticEnvironment):
    """torchrun's variables, whoever set them."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """`Processes.found` has."""


@contextmanager
def _compiling() -> Iterator[None]:
    """Says of the compiler's errors that they are the compiler's."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise CompilerFailed(error) from error
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what Lightning logs about itself: our own heading says it."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)
