"""Loggers: where a run's figures go besides its folder's own metrics.csv.

TensorBoard and Weights & Biases are imported when they are asked for; a logger object of Lightning's kind is
taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from resode.checks import did_you_mean
from resode.tables import csv_text, read_csv
from resode.training.monitor import Callback

LOGGERS = ("tensorboard", "wandb", "csv")
"""Those that have a name."""

UPDATES = "updates.csv"
"""Where the logger "csv" writes, in the run's folder."""


class Logger(Protocol):
    """What Lightning's loggers have: `lightning.pytorch.loggers`, `lightning.fabric.loggers`."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record figures at an update."""

    def finalize(self, status: str) -> None:
        """Write what is left."""


def logger_callback(logger: str | Logger) -> Callback:
    """What hands a run's figures to a logger, named or given.

    Raises:
        ValueError: no logger has that name.
        TypeError: the object is none.
        ModuleNotFoundError: its package is not installed; the message says how to install it.
    """
    if isinstance(logger, str):
        kinds = {"tensorboard": TensorBoard, "wandb": WandB, "csv": UpdateTable}
        if logger not in kinds:
            raise ValueError(
                f"no logger {logger!r}.{did_you_mean(logger, LOGGERS)} Valid: {', '.join(LOGGERS)}, or an "
                "object with log_metrics and finalize, as Lightning's loggers have."
            )
        return kinds[logger]()
    if not callable(getattr(logger, "log_metrics", None)) or not callable(getattr(logger, "finalize", None)):
        raise TypeError(
            f"logger must be {', '.join(LOGGERS)} or an object with log_metrics and finalize, as Lightning's "
            f"loggers have, got {logger!r} ({type(logger).__name__})."
        )
    return OwnLogger(logger)


class _Rows:
    """Hands every epoch's metrics on, each once; a row comes with the first update after its epoch."""

    def __init__(self) -> None:
        self._written = 0

    def after_update(self, loop: Any) -> None:
        """Hand on the epochs that have ended since."""
        if self._written < len(loop.rows):
            self._hand_on(loop)

    def after_run(self, loop: Any) -> None:
        """Hand on the rest."""
        self._hand_on(loop)

    def _hand_on(self, loop: Any) -> None:
        for row in loop.rows[self._written :]:
            figures: dict[str, float] = {
                str(_TAGS.get(k, k)): v for k, v in row.items() if k not in ("epoch", "update") and v == v
            }
            self.write(figures, row["update"])
        self._written = len(loop.rows)

    def write(self, figures: dict[str, float], update: int) -> None:
        """Record an epoch's figures."""
        raise NotImplementedError


class OwnLogger(_Rows):
    """A logger of Lightning's kind; a resumed run hands it all of its rows again.

    Args:
        logger: with `log_metrics(metrics, step)` and `finalize(status)`.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self.logger = logger

    def after_run(self, loop: Any) -> None:
        """Hand on the rest, and end."""
        super().after_run(loop)
        self.logger.finalize("success")

    def write(self, figures: dict[str, float], update: int) -> None:
        """Record an epoch's figures."""
        self.logger.log_metrics(figures, update)


class TensorBoard(_Rows):
    """Writes every epoch's metrics for TensorBoard into RUN/tensorboard: `tensorboard --logdir RUN`.

    A row appears with the first update after its epoch; a resumed run writes all of its rows again, which
    TensorBoard shows once.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError(
                "--logger tensorboard needs the package tensorboard, which is not installed: "
                "pip install 'resode[tensorboard]'",
                name="tensorboard",
            ) from error
        super().__init__()
        self._open = SummaryWriter
        self._writer: Any = None

    def after_update(self, loop: Any) -> None:
        """Write the epochs that have ended since."""
        if self._writer is None:
            # What a run wrote before it was resumed is purged from step 0 on, and stands in loop.rows.
            self._writer = self._open(str(loop.folder.path / "tensorboard"), purge_step=0)
        super().after_update(loop)

    def after_run(self, loop: Any) -> None:
        """Write the rest."""
        if self._writer is not None:
            super().after_run(loop)
            self._writer.close()

    def write(self, figures: dict[str, float], update: int) -> None:
        """Record an epoch's figures."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, update)
        self._writer.flush()


class WandB(_Rows):
    """Writes every epoch's metrics to Weights & Biases, by the settings of its own environment variables.

    The project is WANDB_PROJECT, else resode; the run is named as its folder, and a resumed run goes on in
    it.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            self._wandb: Any = import_module("wandb")
        except ImportError as error:
            raise ModuleNotFoundError(
                "--logger wandb needs the package wandb, which is not installed: pip install 'resode[wandb]'",
                name="wandb",
            ) from error
        self._run: Any = None

    def after_update(self, loop: Any) -> None:
        """Write the epochs that have ended since."""
        if self._run is None:
            self._begin(loop.folder.path, loop.settings)
        super().after_update(loop)

    def _begin(self, path: Path, settings: Mapping[str, Any]) -> None:
        told = json.dumps([path.name, settings], sort_keys=True)
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "resode"),
            name=path.name,
            dir=str(path),
            config={name: value for name, value in settings.items() if name != "record"},
            id=hashlib.sha256(told.encode()).hexdigest()[
                :16
            ],  # of the run's beginning: it stays when resumed
            resume="allow",
        )

    def after_run(self, loop: Any) -> None:
        """Write the rest, and end."""
        if self._run is not None:
            super().after_run(loop)
            self._run.finish()

    def write(self, figures: dict[str, float], update: int) -> None:
        """Record an epoch's figures."""
        self._run.log(figures, step=update)


class UpdateTable:
    """Writes every update's loss and learning rate into RUN/updates.csv, at the end of each epoch."""

    def after_update(self, loop: Any) -> None:
        """Add the epoch that just ends."""
        if loop.index < loop.steps:
            return
        path, first = loop.folder.path / UPDATES, loop.update - loop.index
        rows: list[Sequence[Any]] = []
        if path.exists():  # of a run that was resumed, perhaps from before the last row
            rows = [list(row.values()) for row in read_csv(path)[1] if int(row["update"]) <= first]
        for number, loss in enumerate(loop.losses[: loop.index].tolist()):
            lr = loop.recipe.learning_rate(first + number, loop.total)
            rows.append([loop.epoch + 1, first + number + 1, loss, lr])
        loop.folder.write(UPDATES, csv_text(["epoch", "update", "loss", "lr"], rows))

    def after_run(self, loop: Any) -> None:
        """All is written."""


_TAGS: dict[str, str] = {
    f"{split}_{what}": f"{what}/{split}"
    for split in ("train", "validation", "test", "eval")
    for what in ("loss", "accuracy")
}
_TAGS |= {"lr": "learning rate", "images_per_second": "images per second", "nfe": "F evaluations/forward"}
_TAGS |= {"nfe_backward": "F evaluations/backward", "eval_nfe": "F evaluations/eval"}
