"""Runs that go on from another one's checkpoint with other settings: longer, or at another learning rate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from resode.training.files import RunError
from resode.training.folder import Checkpoint, RunFolder
from resode.training.plan import Plan
from resode.training.recipe import make_recipe

KEPT = ("batch_size", "seed", "validation", "ema", "refine_at", "channels_last")
"""Settings that a checkpoint's counters, batches, averages and memory are made with."""


@dataclass(frozen=True)
class Parent:
    """A run that another one goes on from.

    Args:
        path: its folder.
        checkpoint: its last one.
    """

    path: Path
    checkpoint: Checkpoint

    @classmethod
    def of(cls, folder: RunFolder) -> Parent:
        """A run as it stands; a RunError where it has no checkpoint."""
        checkpoint, _ = folder.read_checkpoint()
        if checkpoint is None:
            raise RunError(
                f"{folder.path} has no checkpoint to go on from: none of its epochs has ended. Resume it "
                "without settings, or start a new run with these."
            )
        return cls(folder.path, checkpoint)

    @property
    def epoch(self) -> int:
        """Epochs that it has done."""
        return int(self.checkpoint.state["epoch"])

    def next_folder(self) -> Path:
        """The first free of RUN-2, RUN-3, …: where the new run goes."""
        places = (self.path.with_name(f"{self.path.resolve().name}-{number}") for number in count(2))
        return next(place for place in places if not place.exists())

    def changed(self, plan: Plan, settings: dict[str, Any]) -> Plan:
        """Its plan with other settings from here on.

        Raises:
            ValueError: an unknown setting, or one that cannot change in the middle of a run.
        """
        recipe = make_recipe(plan.recipe, **settings)
        if kept := [name for name in KEPT if getattr(recipe, name) != getattr(plan.recipe, name)]:
            raise ValueError(
                f"a run that goes on keeps its {', '.join(kept)}: {self.path} has "
                f"{', '.join(f'{name}={getattr(plan.recipe, name)}' for name in kept)}. Leave it out, or "
                "start a new run."
            )
        return replace(plan, recipe=recipe)

    def check_length(self, updates: int, done: int) -> None:
        """A ValueError where the new run would have nothing left to do."""
        if updates <= done:
            raise ValueError(
                f"a run that goes on ends later than its parent stands: {self.path} has done {done} updates "
                f"({self.epoch} epochs), and this run shall have {updates}. Give it more epochs."
            )
