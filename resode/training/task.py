"""The Lightning module: what one update computes, and with which optimizer.

`loop.py` drives it with Lightning's Fabric. A Trainer can drive it too, but adds 0.5 ms to every update where
Fabric adds 0.1 ms: a tenth of an update at 100,000 images/s in batches of 512.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from resode.training.recipe import Recipe


class ClassificationTask(lightning.LightningModule):
    """Image classification by SGD, with a recipe's loss, optimizer and learning rate.

    A network with a method `with_companion_loss(images, labels, done)` gives its logits and what it adds to
    the loss there, `done` the share of the run that is; see `resode.networks.DeeplySupervisedNet`.

    Args:
        network: from images (B, C, H, W) to logits (B, classes).
        recipe: the settings.
        updates: of the whole run; the learning rate's schedule ends there.
        penalty: of the network and the images of a batch, added to the loss, such as
            `resode.analysis.StepLimitPenalty`.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        updates: int,
        penalty: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.updates = updates
        self.penalty = penalty
        self.taught = getattr(network, "with_companion_loss", None)
        self.done: Tensor  # the share of the run, where a compiled update reads it
        self.register_buffer("done", torch.zeros(()), persistent=False)
        self._result = self._eager_result
        if recipe.compile:
            on_gpu = next(network.parameters()).device.type == "cuda"
            # The function and not the network, so that every other use of it keeps its hooks.
            self._result = torch.compile(self._eager_result, mode="reduce-overhead" if on_gpu else "default")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> dict[str, Tensor]:
        """Mean loss of one batch, and how many of its images were recognised; both stay on the device."""
        loss, correct = self._result(*batch)
        return {"loss": loss, "correct": correct}

    def _eager_result(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        companions = None
        if self.taught is None:
            logits = self.network(images).float()
        else:
            logits, companions = self.taught(images, labels, self.done)
            logits = logits.float()
        loss = cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        if companions is not None:
            loss = loss + companions
        if self.penalty is not None:
            loss = loss + self.penalty(self.network, images)
        with torch.no_grad():
            correct = (logits.argmax(dim=1) == labels).sum()
        return loss, correct

    def configure_optimizers(self) -> torch.optim.SGD:
        """SGD in one fused kernel."""
        recipe = self.recipe
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        # Norm scales, biases and learned steps have one dimension or none.
        spared = [weight for weight in weights if weight.ndim <= 1 and not recipe.decay_norms]
        decayed = [weight for weight in weights if weight.ndim > 1 or recipe.decay_norms]
        groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(
            [group for group in groups if group["params"]],
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            fused=True,
        )

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, update: int) -> None:
        """Give the optimizer the learning rate of an update."""
        rate = self.recipe.learning_rate(update, self.updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if self.taught is not None:
            self.done.fill_(update / self.updates)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """What a Trainer calls before every update."""
        self.set_learning_rate(self.optimizers(use_pl_optimizer=False), self.global_step)  # type: ignore[arg-type]
