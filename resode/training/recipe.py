"""How a network is trained: one frozen, validated object with every setting.

`Recipe` holds the settings, `RECIPES` the named starting points, and `make_recipe` lays changes over one of
them. The learning rate is a pure function of the update, so a resumed run needs no schedule state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from resode.checks import check_number, checked, known, one_of
from resode.solve.options import NATIVE

SCALED_FROM = 128
"""The batch that a scaled learning rate is given for."""

DEEP_LAYERS = 110
"""From this many convolutional and linear layers on, `paper` warms up (He et al. 2016, section 4.2)."""


_OF_A_SCHEDULE = {"rise": "onecycle", "milestones": "step", "gamma": "step"}


def _setting(
    default: Any,
    help: str = "",
    *,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A setting, its range or choices, and what the command line says of its flag."""
    about = {"help": help or f"{', '.join(choices)}.", "least": least, "most": most, "choices": choices}
    return field(default=default, metadata=about)


def _typed(name: str, kind: str, value: Any) -> Any:
    """The value as its field declares it; whole numbers pass for floats, lists for tuples."""
    if value is None and kind.endswith("| None"):
        return None
    kind = kind.removesuffix(" | None")
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind == "str" and isinstance(value, str):
        return value
    if name == "precision" and value == 32 and not isinstance(value, bool):
        return "32"  # how YAML reads it
    if kind.startswith("tuple") and isinstance(value, list | tuple):
        return tuple(_typed(name, "int" if "int" in kind else "float", item) for item in value)
    wanted = "a list of numbers" if kind.startswith("tuple") else {"str": "text"}.get(kind, kind)
    raise TypeError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__}).")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a training run.

    Args:
        epochs: passes over the training images, or None where `updates` gives the length.
        updates: optimizer steps, or None where `epochs` gives the length; exactly one of the two is set.
        batch_size: images per update.
        lr: the largest learning rate of the schedule.
        scale_lr: multiply `lr` by batch_size/128, the linear rule for large batches (Goyal et al. 2017,
            arXiv:1706.02677); it needs a warm-up or the one-cycle schedule's rise.
        momentum: of SGD; 0 for none.
        nesterov: Nesterov's form of the momentum.
        weight_decay: L2 penalty, added to the gradient as λw.
        decay_norms: whether parameters of one dimension or none (norm scales, biases, steps) decay too.
        schedule: of the learning rate, set per update: "onecycle" (a rise, then half a cosine to 0),
            "cosine" (to 0), "step" or "constant".
        rise: share of a one-cycle run in which the rate rises.
        milestones: shares of a step run at which the rate is multiplied by `gamma`.
        gamma: that factor.
        warmup_updates: updates before the schedule starts (not with one-cycle, which has its rise);
            None: 400 where the network has 110 convolutional and linear layers or more, else 0.
        warmup_factor: share of `lr` at which the warm-up, or the rise, starts.
        warmup_shape: "linear" from there to `lr`, or "constant" there until the warm-up ends.
        label_smoothing: share of the target spread over all classes.
        ema: decay, an update, of the exponential moving average of weights and norm statistics that is
            evaluated and kept; 0 for the weights themselves.
        crop_padding: zeros around an image before it is cropped at random, in pixels; 0 for no cropping,
            None for the data set's own.
        flip: mirror half the images; None for the data set's own (a mirrored digit is no digit).
        cutout: side in pixels of a square at a random place of each image that becomes the mean colour; the
            part of it beyond the border is lost. 0 for none.
        precision: "32", "bf16" (F under bfloat16 autocast; states, norms and weights in float32) or "auto"
            (whichever the device computes faster).
        channels_last: store images and kernels with channels innermost.
        compile: compile what an update computes with torch.compile, on a GPU into a CUDA graph. The first
            update waits for the compiler.
        sync_batch_norm: take batch statistics over the whole batch where several GPUs have a part each.
        seed: of the initial weights, the order of the images and their augmentation.
        validation: training images held out and reported after every epoch.
        swap_proof: draw a solver anew for each batch in the second half of the run, so that the network keeps
            its accuracy under other solvers; see `resode.SwapProof`.
        eval_solver: method of every `ResidualStack` under which the test images are evaluated a second
            time after every epoch; None for once, as trained.
        eval_substeps: its steps a block; None for those of the network.
        refine_at: epochs, counted from 1, from each of which on the network has twice the blocks at half
            the step; in the first epoch it is as it was built.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: a setting out of range, or two that contradict each other.

    Example:
        >>> recipe = make_recipe("paper", lr=0.05)
        >>> recipe.updates, recipe.milestones, recipe.weight_decay
        (64000, (0.5, 0.75), 0.0001)
        >>> [round(recipe.learning_rate(u, 64_000), 6) for u in (0, 31_999, 32_000, 48_000)]
        [0.05, 0.05, 0.005, 0.0005]
    """

    epochs: int | None = _setting(15, "Passes over the training images.", least=1)
    updates: int | None = _setting(None, "Length in updates instead.", least=1)
    batch_size: int = _setting(128, "Images per update.", least=1)
    lr: float = _setting(0.2, "Largest learning rate.")
    scale_lr: bool = _setting(False, "That rate times batch/128.")
    momentum: float = _setting(0.9, "Of SGD.", least=0, most=1)
    nesterov: bool = _setting(True, "Nesterov's momentum.")
    weight_decay: float = _setting(5e-4, "L2 penalty.", least=0)
    decay_norms: bool = _setting(False, "Also on norms and biases.")
    schedule: str = _setting("onecycle", choices=("onecycle", "cosine", "step", "constant"))
    rise: float = _setting(0.3, "Share of a one-cycle run that rises.", least=0, most=0.99)
    milestones: tuple[float, ...] = _setting((0.5, 0.75), "Shares where the step schedule falls: 0.5,0.75.")
    gamma: float = _setting(0.1, "Factor at a milestone.", least=0, most=1)
    warmup_updates: int | None = _setting(0, "Updates of warm-up.", least=0)
    warmup_factor: float = _setting(0.04, "Share of lr that it starts at.", least=0, most=1)
    warmup_shape: str = _setting("linear", choices=("linear", "constant"))
    label_smoothing: float = _setting(0.1, "Share spread over all classes.", least=0, most=0.99)
    ema: float = _setting(0.0, "Decay of the weights' moving average; 0 for none.", least=0, most=0.9999)
    crop_padding: int | None = _setting(None, "Pixels an image is shifted by; 0 for none.", least=0)
    flip: bool | None = _setting(None, "Mirror half the images.")
    cutout: int = _setting(0, "Side of a square that each image loses; 0 for none.", least=0)
    precision: str = _setting("auto", choices=("auto", "32", "bf16"))
    channels_last: bool = _setting(True, "Memory order of images.")
    compile: bool = _setting(False, "Compile the update; CUDA graphs on a GPU.")
    sync_batch_norm: bool = _setting(False, "Batch norms over all GPUs.")
    seed: int = _setting(0, "Of weights, order and augmentation.", least=0, most=2**63 - 1)
    validation: int = _setting(0, "Training images held out.", least=0)
    swap_proof: bool = _setting(
        False, "Draw a solver for each batch, so that other solvers keep the accuracy."
    )
    eval_solver: str | None = _setting(None, "Test accuracy also under this method.")
    eval_substeps: int | None = _setting(None, "Its steps a block.", least=1)
    refine_at: tuple[int, ...] = _setting(
        (), "Epochs from which on there are twice the blocks at half the step: 5,10."
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            name, about = setting.name, setting.metadata
            value = _typed(name, str(setting.type), getattr(self, name))
            object.__setattr__(self, name, value)
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_number(name, value, least=about["least"], most=about["most"])
            if about["choices"]:
                one_of(name, value, about["choices"])
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}. Rates of 0.01 to 0.4 are usual for SGD.")
        if (self.epochs is None) == (self.updates is None):
            raise ValueError(
                f"a run's length is given by exactly one of epochs and updates, got epochs={self.epochs}, "
                f"updates={self.updates}. Set the other to None."
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0, got momentum=0. Set nesterov=False.")
        if self.schedule == "onecycle" and self.warmup_updates:
            raise ValueError(
                f"the one-cycle schedule has its own rise, so warmup_updates must be 0, got "
                f"{self.warmup_updates}. Change rise, or take schedule='cosine' or 'step'."
            )
        if self.scale_lr and self.schedule != "onecycle" and not self.warmup_updates:
            raise ValueError(
                "scale_lr takes a rate that large batches only bear after a warm-up, got warmup_updates="
                f"{self.warmup_updates} and schedule={self.schedule!r}. Set warmup_updates to those of some "
                "five epochs, or take schedule='onecycle', which has its rise."
            )
        if any(not 0 < m < 1 for m in self.milestones) or list(self.milestones) != sorted(
            set(self.milestones)
        ):
            raise ValueError(
                f"milestones are rising shares of the run, each between 0 and 1, got {self.milestones}. "
                "Half and three quarters of the run are (0.5, 0.75)."
            )

        if self.eval_solver is not None:
            one_of("eval_solver", self.eval_solver, NATIVE)
        if self.eval_substeps is not None and self.eval_solver is None:
            raise ValueError(
                f"eval_substeps belongs to eval_solver, got eval_substeps={self.eval_substeps} and no "
                "eval_solver. Name it, also where it is the network's own."
            )
        if list(self.refine_at) != sorted({epoch for epoch in self.refine_at if epoch > 1}):
            raise ValueError(
                f"refine_at takes rising epochs from 2 on, got {self.refine_at}. For a network that is finer "
                "from the start take a deeper one with a smaller step_size."
            )

        if self.refine_at and self.sync_batch_norm:
            raise ValueError(
                "refine_at makes new batch norms as it trains, which sync_batch_norm does not reach. "
                "Leave one of them out, or take norm='group'."
            )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Recipe:
        """The recipe among the settings that a file holds; a setting that is missing has its default."""
        return cls(**{name: value for name, value in config.items() if name in SETTINGS})

    def length(self, batches: int) -> int:
        """How many updates the run makes when an epoch has that many batches."""
        return self.updates if self.updates is not None else (self.epochs or 0) * batches

    @property
    def peak(self) -> float:
        """The largest learning rate: `lr`, scaled to the batch where the recipe says so."""
        return self.lr * self.batch_size / SCALED_FROM if self.scale_lr else self.lr

    def learning_rate(self, update: int, total: int) -> float:
        """The learning rate of update 0 … total − 1.

        Args:
            update: updates made so far.
            total: updates of the whole run.

        Returns:
            The rate, in (0, peak]; a cosine ends just above 0.
        Source:
            He et al. (2016) for "step", Loshchilov & Hutter (2017) for "cosine", Smith & Topin (2019)
            for "onecycle".
        """
        peak = self.peak
        warmup = self.rise * total if self.schedule == "onecycle" else (self.warmup_updates or 0)
        if update < warmup:
            if self.warmup_shape == "constant" and self.schedule != "onecycle":
                return peak * self.warmup_factor
            return peak * (self.warmup_factor + (1 - self.warmup_factor) * update / warmup)
        if self.schedule == "step":
            passed = sum(update >= round(m * total) for m in self.milestones)
            return peak * self.gamma**passed
        if self.schedule == "constant":
            return peak
        return peak * 0.5 * (1 + math.cos(math.pi * (update - warmup) / (total - warmup)))

    @property
    def other_solver(self) -> str:
        """What tables call the solver that tests are repeated under; empty without one."""
        substeps = f"×{self.eval_substeps}" if self.eval_substeps else ""
        return f"{self.eval_solver}{substeps}" if self.eval_solver else ""

    def describe(self) -> str:
        """The settings a reader wants to see first, on one line."""
        length = f"{self.epochs} epochs" if self.epochs is not None else f"{self.updates:,} updates"
        momentum = f"{'Nesterov ' if self.nesterov else ''}SGD {self.momentum:g}" if self.momentum else "SGD"
        return (
            f"{length} of batch {self.batch_size}, {momentum}, {self.schedule} lr {self.peak:g}, "
            f"weight decay {self.weight_decay:g}"
        )


SETTINGS = tuple(setting.name for setting in fields(Recipe))
"""The names of a recipe's settings."""

RECIPES: dict[str, Recipe] = {
    # He et al. (2016), section 4.2, and its warm-up at 0.01 for 110 layers.
    "paper": Recipe(
        epochs=None,
        updates=64_000,
        lr=0.1,
        nesterov=False,
        weight_decay=1e-4,
        decay_norms=True,
        schedule="step",
        warmup_updates=None,
        warmup_factor=0.1,
        warmup_shape="constant",
        label_smoothing=0.0,
    ),
    # The average over some hundred updates: short against the shortest run, an epoch of 390.
    # Shifts by 2 pixels: 15 epochs are too few to learn from 4, and lose 0.8 points of held-out images in 5.
    "fast": Recipe(ema=0.99, crop_padding=2),
    # For tests: seconds, and the same figures on every machine.
    "smoke": Recipe(epochs=2, batch_size=64, lr=0.1, precision="32"),
    # For 1,437 small images: smaller batches; on 8×8 images bf16 has nothing to gain.
    "digits": Recipe(epochs=20, batch_size=64, precision="32"),
}
"""Named settings to start from; lay changes over one with `make_recipe`."""


@checked
def make_recipe(base: str | Recipe = "fast", **changes: Any) -> Recipe:
    """A recipe with some settings changed.

    Giving `epochs` drops the base's `updates`, and the other way round.

    Args:
        base: a name in RECIPES, or a recipe.
        **changes: settings of `Recipe`.

    Raises:
        ValueError: no such recipe or setting, or settings that contradict each other.
        TypeError: a setting of the wrong type.

    Example:
        >>> make_recipe("paper", epochs=3).updates is None
        True
        >>> make_recipe("fast", epoch=3)
        Traceback (most recent call last):
        ValueError: no setting 'epoch'. Did you mean epochs? Valid: epochs, updates, ...
    """
    if not isinstance(base, str | Recipe):
        raise TypeError(
            f"recipe must be {', '.join(RECIPES)} or a Recipe, got {base!r} ({type(base).__name__})."
        )
    if isinstance(base, str):
        base = RECIPES[known("recipe", base, sorted(RECIPES))]
    for name in changes:
        known("setting", name, SETTINGS)
    for given, other in (("epochs", "updates"), ("updates", "epochs")):
        if changes.get(given) is not None and other not in changes:
            changes[other] = None
    recipe = replace(base, **changes)
    if len(changes) < len(SETTINGS):  # all of them are a run's record, which wishes nothing
        for name, schedule in _OF_A_SCHEDULE.items():
            if getattr(recipe, name) != getattr(base, name) and recipe.schedule != schedule:
                raise ValueError(
                    f"{name} belongs to the {schedule} schedule and does nothing with {recipe.schedule}, got "
                    f"{name}={changes[name]}. Leave it out, or take schedule={schedule!r}."
                )
        for name in ("warmup_factor", "warmup_shape"):
            unused = recipe.warmup_updates == 0 and recipe.schedule != "onecycle"
            unused |= name == "warmup_shape" and recipe.schedule == "onecycle"
            if unused and getattr(recipe, name) != getattr(base, name):
                raise ValueError(
                    f"{name} belongs to a warm-up, and this recipe has none: schedule={recipe.schedule!r}, "
                    f"warmup_updates={recipe.warmup_updates}, got {name}={changes[name]!r}. Leave it out, or "
                    "set warmup_updates with another schedule than onecycle."
                )
    return recipe
