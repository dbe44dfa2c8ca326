"""Watching a network that Lightning's Trainer trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from resode.checks import warn_user
from resode.training.files import replacing
from resode.training.monitor import FILE, Watch


class TrainerWatch(pl.Callback):
    """Step limits and diagnoses in Lightning's Trainer: `Trainer(callbacks=[TrainerWatch(images)])`.

    What the last record says goes to the Trainer's logger, the whole table to step_limits.csv in its log
    folder at the end. A diagnosis that finds something warns.

    Args:
        images: fixed inputs, as for `resode.training.monitor.Watch`; moved to the module's device.
        target: likewise.
        network: what is watched of the LightningModule, such as `lambda module: module.net`; None for itself.
        **options: of `Watch`: every, diagnose_every, lr, loss_fn.
    """

    def __init__(
        self,
        images: Tensor,
        target: Tensor | None = None,
        *,
        network: Callable[[pl.LightningModule], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        self.watch = Watch(images, target, **options)
        self._network = network
        self._seen = -1  # the last global step: with accumulated gradients several batches have one

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the images where the network is."""
        watch, device = self.watch, pl_module.device
        watch.images = watch.images.to(device)
        watch.step_limits.images = watch.images
        watch.target = None if watch.target is None else watch.target.to(device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the network where it is time to, in the first process."""
        update = trainer.global_step
        if not trainer.is_global_zero or update == self._seen:
            return
        self._seen = update
        before = len(self.watch.step_limits.records)
        found = self.watch(pl_module if self._network is None else self._network(pl_module), update)
        figures: dict[str, float] = {}
        for record in self.watch.step_limits.records[before:]:
            figures[f"growing modes/{record.group}"] = float(record.growing)
            figures[f"decaying step/{record.group}"] = record.estimate
        if figures and trainer.logger is not None:
            trainer.logger.log_metrics(figures, update)
        if found is not None and not found.ok:
            warn_user(f"after update {update}: {found.findings[0].text} {found.findings[0].advice}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the table of step limits into the log folder, where there is one."""
        if not trainer.is_global_zero or not self.watch.step_limits.records or trainer.log_dir is None:
            return
        Path(trainer.log_dir).mkdir(parents=True, exist_ok=True)
        with replacing(Path(trainer.log_dir) / FILE) as path:
            path.write_text(self.watch.step_limits.to_csv(), encoding="utf-8")
