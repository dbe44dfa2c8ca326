"""Runs: train a network into a run folder, get it back, evaluate it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from resode.blocks.solving import other_solver, solving_modules
from resode.checks import checked, lacks_memory
from resode.modes import evaluating, own_random_state
from resode.networks import find
from resode.results import Result
from resode.solve import SolverError
from resode.tableaus import get_tableau
from resode.training.data import Batches, ImageData, load_data
from resode.training.evaluate import EVALUATION_BATCH, evaluate, load, plain_batches
from resode.training.files import RunError, replacing
from resode.training.folder import RunFolder
from resode.training.loggers import Logger, logger_callback
from resode.training.memory import forget_peak, peak_memory
from resode.training.monitor import Callback, StepLimits
from resode.training.parent import Parent
from resode.training.plan import (
    Model,
    Plan,
    check_data_place,
    choose_device,
    count_parameters,
    make_config,
    make_network,
    model_name,
    resolve,
)
from resode.training.processes import Processes, synchronise_norms
from resode.training.recipe import Recipe
from resode.training.refining import refinable

__all__ = ["Run", "Summary", "evaluate", "load", "train"]

if TYPE_CHECKING:  # Lightning takes seconds to import
    from resode.training.loop import TrainingLoop
    from resode.training.progress import Progress


class Summary(TypedDict):
    """The figures of a finished run, as summary.json holds them; accuracies are shares, 0 to 1.

    Those of images held out, and of another solver, are there where the recipe asks for them.
    """

    model: str
    model_options: dict[str, Any]
    data: str
    recipe: str
    parameters: int
    epochs: int
    updates: int
    test_accuracy: float
    test_loss: float
    train_accuracy: float
    train_loss: float
    images_per_second: float
    nfe: float
    nfe_backward: float
    peak_memory_bytes: int | None
    seconds: float
    device: str
    precision: str
    seed: int
    validation_accuracy: NotRequired[float]
    best_epoch: NotRequired[int]
    best_validation_accuracy: NotRequired[float]
    best_test_accuracy: NotRequired[float]
    eval_solver: NotRequired[str]
    eval_accuracy: NotRequired[float]


@dataclass(frozen=True, repr=False)
class Run(Result):
    """A finished run.

    Args:
        path: its folder.
        network: trained, in evaluation mode, on the device it was trained on.
        recipe: the settings, resolved.
        summary: its figures.
        metrics: the columns of metrics.csv, one entry an epoch; NaN where nothing was measured.
    """

    path: Path
    network: nn.Module
    recipe: Recipe
    summary: Summary
    metrics: dict[str, list[float]]

    def _table(self) -> dict[str, Any]:
        """An epoch a row."""
        return dict(self.metrics)


@checked
def train(
    model: Model | None = None,
    data: str | ImageData | None = None,
    recipe: str | Recipe | None = None,
    *,
    model_options: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    data_dir: str | Path | None = None,
    download: bool = False,
    device: str = "auto",
    resume: str | Path | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    logger: str | Logger | None = None,
    penalty: Callable[[nn.Module, Tensor], Tensor] | None = None,
    **settings: Any,
) -> Run:
    """Train a network on labelled images, and store the run in a folder of its own.

    A run interrupted at any moment goes on with `resume=` and ends with the weights it would have had, to
    the bit, on the same device with as many threads. The global random state is as it was afterwards.

    Under torchrun every process calls this with the same arguments, computes its share of every batch, and
    returns the same run: `batch_size` is of all processes together.

    Args:
        model: a name ("odenet20" where None), a network (trained in place), or a function called with
            `model_options` that makes one; images (B, C, H, W) in, logits (B, classes) out.
        data: "digits" (where None), "cifar10", "cifar100", "cifar100_coarse", or an `ImageData` of one's own.
        recipe: a name in RECIPES or a `Recipe`; None for "digits" on the digits and "fast" elsewhere.
        model_options: of the model, such as `{"solver": "rk4", "substeps": 2}`.
        run_dir: the run's folder; None for runs/<model>-<data>-<time>.
        data_dir: where CIFAR-10 lies; None for the environment variable RESODE_DATA.
        download: fetch CIFAR-10 where it is not there.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1" or "mps".
        resume: a run's folder. Without settings the run goes on in it, to its end. With settings, such as
            epochs=40 or lr=0.01, a new run goes on from its last checkpoint with these; `run_dir` is the new
            run's, and its config.yaml names the parent. A model or data set of one's own is given again.
        progress: whether to print what happens.
        callbacks: called after every update and after the run, such as `resode.training.monitor.StepLimits`;
            given again to a resumed run.
        logger: "tensorboard", "wandb" or "csv" (every update's loss, in updates.csv), or an object with
            `log_metrics` and `finalize`, as Lightning's loggers have; given again to a resumed run.
        penalty: of the network and the images of a batch, added to the loss, such as
            `resode.analysis.StepLimitPenalty`; given again to a resumed run.
        **settings: of `Recipe`, over those of `recipe`: epochs=3, lr=0.1, ….

    Returns:
        The finished run.

    Raises:
        ValueError, TypeError: a wrong or contradictory setting; the message lists the valid ones.
        RunError: the folder cannot be used, or the loss became infinite or NaN.
        Interrupted: Ctrl-C or SIGTERM came; a checkpoint was saved first.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = train("odenet20", "digits", "smoke", updates=2, run_dir=folder + "/run", progress=False)
        >>> len(run.metrics["train_loss"])
        1
    """
    _check_installed()
    watching = [*callbacks, *([] if logger is None else [logger_callback(logger)])]
    processes = Processes.found()
    place = choose_device(device) if processes.size == 1 else device_of(device, processes)
    with processes.joined(place):
        parent = None
        if resume is not None:
            given = {"recipe": recipe, "model_options": model_options}
            folder = RunFolder(resume)
            config = processes.from_first(lambda: RunFolder.open(resume).read_config())
            with processes.together():
                plan = Plan.stored(config, model, data, data_dir, given)
                check_data_place(plan.data, data_dir, download)
                _check_same_penalty((plan.record or {}).get("penalty"), _penalty_name(penalty))
            if settings or run_dir is not None:
                parent = processes.from_first(lambda: Parent.of(folder))
                with processes.together():
                    plan = parent.changed(plan, settings)
                place_of_it = run_dir or parent.next_folder()
                folder = processes.from_first(lambda: RunFolder.create(place_of_it))
        else:
            with processes.together():
                plan = Plan.new(model, data, recipe, model_options, data_dir, settings)
                check_data_place(plan.data, data_dir, download)
            folder = processes.from_first(lambda: RunFolder.create(run_dir or plan.default_run_dir()))
        with ExitStack() as locks:
            processes.from_first(lambda: locks.enter_context(folder.locked()))
            asked = _Request(
                plan=plan,
                folder=folder,
                device=place,
                processes=processes,
                download=download,
                resumed=resume is not None and parent is None,
                show=progress,
                callbacks=watching,
                parent=parent,
                penalty=penalty,
            )
            return _train(asked)


def _check_installed() -> None:
    """Lightning takes seconds to import, which is left to the loop; that it is there is found out before."""
    for name in ("lightning", "rich"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"training needs {name}: pip install 'resode[train]'", name=name)


@dataclass(frozen=True)
class _Request:
    """What `train` was called with, once its plan, folder and device are found."""

    plan: Plan
    folder: RunFolder
    device: torch.device
    processes: Processes
    download: bool
    resumed: bool
    show: bool
    callbacks: Sequence[Callback]
    penalty: Callable[[nn.Module, Tensor], Tensor] | None
    parent: Parent | None = None


@dataclass(frozen=True)
class _Job:
    """What a run is made of, checked: its recipe is resolved, its network on the device."""

    asked: _Request
    data: ImageData
    network: nn.Module
    options: dict[str, Any]  # of the model, with what the data say
    recipe: Recipe
    training: Batches
    held_out: dict[str, Batches]

    @property
    def updates(self) -> int:
        """Of the whole run."""
        return self.recipe.length(len(self.training))

    @property
    def epochs(self) -> int:
        """Of the whole run, the last one perhaps shorter."""
        return -(-self.updates // len(self.training))


def _train(asked: _Request) -> Run:
    """Build everything the loop needs, run it, and write what a finished run leaves."""
    processes, folder = asked.processes, asked.folder
    forget_peak(asked.device)
    data = _load(asked.plan, asked.download, processes)
    with own_random_state(asked.device):
        with processes.together():
            job = _prepared(asked, data)
            _check_job(job)
            restore_norms = _synchronised(job.network, job.recipe, asked.device, processes)
        if processes.rank:  # its own dropout; the weights are the first one's
            torch.manual_seed(job.recipe.seed + processes.rank)
        with closing(_loop(job)) as loop:
            progress = loop.progress
            for line in _heading(job):
                progress.say(line)
            if asked.resumed:
                _take_up(job, loop)
            else:
                config = make_config(asked.plan, job.recipe, data, job.network, asked.device)
                config["record"] |= {"penalty": _penalty_name(asked.penalty), "processes": processes.size}
                _begin(job, loop, config)
            loop.settings = processes.from_first(folder.read_config)
            progress.heading()
            for row in loop.rows:
                progress.epoch(row)
            try:
                loop.run()
            finally:
                restore_norms()
        job.network.eval()
        summary, metrics = processes.from_first(lambda: _finish(job, loop.rows, progress))
    return Run(folder.path, job.network, job.recipe, summary, metrics)


def _prepared(asked: _Request, data: ImageData) -> _Job:
    """The network, the resolved recipe and the batches."""
    plan, device = asked.plan, asked.device
    _check_same_data(plan.record, data)
    torch.manual_seed(plan.recipe.seed)
    options = dict(plan.options)
    if isinstance(plan.model, str):
        options = _of_images(plan.model, data) | options
    network = make_network(plan.model, options).to(device)
    recipe = resolve(plan.recipe, data, network, device)
    if recipe.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _check_output(network, data, device)
    if not count_parameters(network):
        raise ValueError(
            f"there is nothing to train: {model_name(plan.model)} has no parameter that requires a "
            "gradient. Give it one, or call requires_grad_() on those to train."
        )
    training, held_out = _batches(data, recipe, device, asked.processes)
    return _Job(asked, data, network, options, recipe, training, held_out)


def _of_images(name: str, data: ImageData) -> dict[str, int]:
    """The options of a network by name that the images decide."""
    channels, height, width = data.train_images.shape[1:]
    options = {"in_channels": channels, "num_classes": len(data.classes)}
    if "image_size" in find(name).options and height == width:
        options["image_size"] = height
    return options


def _check_job(job: _Job) -> None:
    if (job.recipe.warmup_updates or 0) >= job.updates:
        raise ValueError(
            f"the warm-up must end before the run does: warmup_updates {job.recipe.warmup_updates}, "
            f"the run has {job.updates} updates. Train longer or warm up less."
        )
    _check_stacks(job.network, job.recipe, job.data, job.asked.device, job.epochs)
    for callback in job.asked.callbacks:
        if isinstance(callback, StepLimits):
            callback.check(job.network, next(iter(job.held_out["test"]))[0])


def check_plan(plan: Plan, data: ImageData, folder: RunFolder) -> None:
    """What `train` would refuse before the first update, found on the CPU; nothing is trained or written.

    Raises:
        ValueError, TypeError: as those of `train`.
    """
    _check_installed()
    cpu = torch.device("cpu")
    asked = _Request(
        plan, folder, cpu, Processes(), download=False, resumed=False, show=False, callbacks=(), penalty=None
    )
    with own_random_state(cpu):
        _check_job(_prepared(asked, data))


def _loop(job: _Job) -> TrainingLoop:
    """The loop that trains it, before its first update."""
    from resode.training.loop import TrainingLoop, make_fabric  # Lightning takes seconds to import
    from resode.training.progress import Progress
    from resode.training.task import ClassificationTask

    asked, data, recipe = job.asked, job.data, job.recipe
    about = {
        "model": model_name(asked.plan.model),
        "own": not isinstance(asked.plan.model, str),
        "options": job.options,
        "data": asked.plan.data_name,
        "title": data.title,
        "shape": tuple(data.train_images.shape[1:]),
        "classes": data.classes,
        "mean": data.mean,
        "std": data.std,
    }
    progress = Progress(asked.show and asked.processes.first, job.epochs)
    progress.other = recipe.other_solver
    return TrainingLoop(
        make_fabric(asked.device, recipe.precision, asked.processes),
        ClassificationTask(job.network, recipe, job.updates, asked.penalty),
        job.training,
        job.held_out,
        folder=asked.folder,
        about=about,
        progress=progress,
        callbacks=asked.callbacks,
        processes=asked.processes,
    )


def _begin(job: _Job, loop: TrainingLoop, config: dict[str, Any]) -> None:
    """Write the settings of a new run; one that has a parent begins with its checkpoint."""
    processes, folder, parent = job.asked.processes, job.asked.folder, job.asked.parent
    if parent is not None:
        config["record"] |= {"parent": str(parent.path.resolve()), "parent_epoch": parent.epoch}
        loop.restore(parent.checkpoint)
        parent.check_length(job.updates, loop.update)
        processes.from_first(lambda: folder.write_checkpoint(parent.checkpoint))  # no run without it
        loop.progress.say(f"goes on from {parent.path}, after update {loop.update} of now {job.updates}")
    processes.from_first(lambda: folder.write_config(config))


def _take_up(job: _Job, loop: TrainingLoop) -> None:
    """Go on where the stored run stopped."""
    processes, say = job.asked.processes, loop.progress.say
    before = (job.asked.plan.record or {}).get("processes", 1)
    if before != processes.size:
        say(
            f"started on {before} process{'es' if before > 1 else ''}, going on with "
            f"{processes.size}: the same batches in other parts"
        )
    checkpoint, damaged = processes.from_first(job.asked.folder.read_checkpoint)
    if damaged:
        say(f"{damaged} Going on from the checkpoint before.")
    if checkpoint:
        loop.restore(checkpoint)
    say(f"resuming after update {loop.update} of {job.updates}")


def device_of(name: str, processes: Processes) -> torch.device:
    """The device of one of several processes: its own GPU, or the CPU."""
    place = choose_device(name)
    if place.type == "mps" or place.index is not None:
        raise ValueError(
            f"each of several processes takes its own device, so it is 'auto', 'cpu' or 'cuda', got {name!r}."
        )
    if place.type == "cpu":
        return place
    if processes.local_size > torch.cuda.device_count():
        raise ValueError(
            f"this machine has {torch.cuda.device_count()} GPUs for {processes.local_size} processes. Start "
            "as many as there are GPUs (torchrun --nproc-per-node), or pass device='cpu'."
        )
    return torch.device("cuda", processes.local_rank)


def _load(plan: Plan, download: bool, processes: Processes) -> ImageData:
    """The images; the first process of a machine fetches and decodes them, the others read its cache."""
    data = plan.data
    for turn in (True, False):
        with processes.together():
            if isinstance(data, str) and (processes.local_rank == 0) == turn:
                data = load_data(data, plan.data_dir, download=download)
    assert isinstance(data, ImageData)
    return data


def _synchronised(
    network: nn.Module, recipe: Recipe, device: torch.device, processes: Processes
) -> Callable[[], None]:
    """Batch norms over all processes where the recipe asks for it; what undoes it."""
    if not recipe.sync_batch_norm:
        return lambda: None
    if processes.size == 1 or device.type != "cuda":
        raise ValueError(
            "sync_batch_norm takes statistics over several processes' GPUs: this run has "
            f"{processes.size} process{'es' if processes.size > 1 else ''} on {device.type}. Leave it out, "
            "start the run with torchrun on GPUs, or take norm='group', which needs no statistics."
        )
    return synchronise_norms(network)


def _penalty_name(penalty: Any) -> str | None:
    """What config.yaml calls a penalty: its repr where it has one of its own, else its name."""
    if penalty is None or type(penalty).__repr__ is not object.__repr__:
        return None if penalty is None else getattr(penalty, "__qualname__", repr(penalty))
    return type(penalty).__qualname__


def _check_same_penalty(stored: str | None, given: str | None) -> None:
    if stored != given:
        raise ValueError(
            f"a resumed run keeps its penalty: it has {stored or 'none'}, got {given or 'none'}. "
            "Pass the same one as penalty=."
        )


def _batches(
    data: ImageData, recipe: Recipe, device: torch.device, processes: Processes
) -> tuple[Batches, dict[str, Batches]]:
    """The training batches, and those only looked at: "test", and "validation" where images are held out."""
    images, labels = data.train_images, data.train_labels
    common: dict[str, Any] = {"mean": data.mean, "std": data.std, "device": device}
    common["channels_last"] = recipe.channels_last
    held_out: dict[str, Batches] = {}
    if recipe.validation:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(recipe.seed))
        kept, left = order[recipe.validation :], order[: recipe.validation]
        held_out["validation"] = Batches(images[left], labels[left], EVALUATION_BATCH, train=False, **common)
        images, labels = images[kept], labels[kept]
    if recipe.batch_size > len(labels):
        raise ValueError(
            f"a batch cannot be larger than the data: batch_size {recipe.batch_size}, {data.title} has "
            f"{len(labels)} training images"
            + (f" after {recipe.validation} were held out." if recipe.validation else ".")
            + (" Take a smaller batch_size." if len(labels) else " Hold out fewer (validation).")
        )
    height, width = images.shape[2:]
    if (recipe.crop_padding or 0) >= min(height, width):
        raise ValueError(
            "crop_padding must be less than the image's side, or nothing of it may be left: got "
            f"{recipe.crop_padding}, images of {height}×{width} pixels. An eighth of the side is usual."
        )
    training = Batches(
        images,
        labels,
        recipe.batch_size,
        train=True,
        crop_padding=recipe.crop_padding or 0,
        flip=bool(recipe.flip),
        cutout=recipe.cutout,
        seed=recipe.seed,
        share=(processes.rank, processes.size),
        **common,
    )
    held_out["test"] = Batches(data.test_images, data.test_labels, EVALUATION_BATCH, train=False, **common)
    return training, held_out


def _check_output(network: nn.Module, data: ImageData, device: torch.device) -> None:
    """The network must turn a few images into as many rows of logits."""
    images = next(iter(plain_batches(data, device=device, limit=2)))[0]
    try:
        with evaluating(network), torch.no_grad():
            logits = network(images)
    except SolverError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        if lacks_memory(error):
            raise
        raise ValueError(
            f"a classifier of {data.title} takes float32 images {tuple(images.shape)}, and this network "
            f"fails with them: {type(error).__name__}: {error}"
        ) from error
    wanted = (len(images), len(data.classes))
    if not isinstance(logits, torch.Tensor) or logits.shape != wanted:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"a classifier of {data.title} turns images {tuple(images.shape)} into logits {wanted}, got "
            f"{got}. Give its last layer {len(data.classes)} outputs."
        )


def _check_stacks(
    network: nn.Module, recipe: Recipe, data: ImageData, device: torch.device, epochs: int
) -> None:
    """What the recipe asks of the network's stacks must be possible, before anything is trained."""
    if recipe.compile:
        # Each stop of its loop ends a graph: odenet8 of width 4 was not through its first update in 240 s.
        free = [m.solver for m in solving_modules(network) if getattr(m, "n_steps", None) is None]
        if adaptive := [solver for solver in free if get_tableau(solver).adaptive]:
            raise ValueError(
                f"compile needs solvers of fixed steps, got {adaptive[0]}, which chooses its steps as it "
                "goes: the compiler would take many minutes. Leave compile out, or take a solver such as rk4."
            )
    if recipe.refine_at:
        refinable(network)
        if recipe.refine_at[-1] > epochs:
            raise ValueError(
                f"refine_at must be epochs of the run, which has {epochs}: got {recipe.refine_at}. Train "
                "longer or refine earlier."
            )
    if recipe.eval_solver is not None:
        with other_solver(network, recipe.eval_solver, recipe.eval_substeps):
            _check_output(network, data, device)


def _check_same_data(record: Mapping[str, Any] | None, data: ImageData) -> None:
    """A resumed run must meet the images it was started on."""
    if record is None:
        return
    then = (record["title"], record["train_images"], record["test_images"])
    now = (data.title, len(data.train_labels), len(data.test_labels))
    if then != now:
        raise RunError(
            f"the run was started on {then[0]} with {then[1]:,} training and {then[2]:,} test images, and "
            f"finds {now[0]} with {now[1]:,} and {now[2]:,}. Point --data-dir at the data it was started on."
        )
    was, found = record.get("images_checksum"), data.checksum()
    if was not in (None, found):
        raise RunError(
            f"the images or labels of {data.title} are not those that the run was started on: their checksum "
            f"was {was} and is {found}. Point --data-dir at the data it was started on, or train again."
        )


def _heading(job: _Job) -> list[str]:
    """What is trained on what, how and where."""
    plan, recipe, data, device = job.asked.plan, job.recipe, job.data, job.asked.device
    processes = job.asked.processes
    options = ", ".join(f"{name} {value}" for name, value in plan.options.items())
    threads = torch.get_num_threads()
    place = f"cpu with {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else str(device)
    if processes.size > 1:
        place = f"{processes.size} processes, each on {place if device.type == 'cpu' else 'its own GPU'}"
    return [
        f"{model_name(plan.model)}{f' ({options})' if options else ''} on {data.title}",
        f"{count_parameters(job.network):,} parameters; {len(data.train_labels) - recipe.validation:,} "
        f"training and {len(data.test_labels):,} test images",
        f"recipe {plan.recipe_name}: {recipe.describe()}",
        f"{place}, {recipe.precision}{', channels-last' if recipe.channels_last else ''}, seed {recipe.seed}",
        f"run folder {job.asked.folder.path}",
        "",
    ]


def _finish(
    job: _Job, rows: list[dict[str, Any]], progress: Progress
) -> tuple[Summary, dict[str, list[float]]]:
    """Write the summary and the figures of a run that has come to its end; the summary and the metrics."""
    from resode import plots

    folder, summary = job.asked.folder, _summary(job, rows)
    folder.write_metrics(rows)  # as the checkpoint has them, whatever became of the file since
    folder.write_summary(summary)
    metrics = folder.read_metrics()
    figure = folder.figures / "training.png"
    with replacing(figure) as path:
        plots.training_curves(metrics, path)
    for line in _ending(job, summary, rows[-1]):
        progress.say(line)
    progress.say(f"curves  {figure}")
    return summary, metrics


def _summary(job: _Job, rows: list[dict[str, Any]]) -> Summary:
    """The figures of summary.json."""
    plan, recipe, device = job.asked.plan, job.recipe, job.asked.device
    last = rows[-1]
    images = _images(rows, recipe)
    training_seconds = sum(n / row["images_per_second"] for n, row in zip(images, rows, strict=True))
    summary: Summary = {
        "model": model_name(plan.model),
        "model_options": plan.options,
        "data": job.data.title,
        "recipe": plan.recipe_name,
        "parameters": count_parameters(job.network),
        "epochs": last["epoch"],
        "updates": last["update"],
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "train_accuracy": last["train_accuracy"],
        "train_loss": last["train_loss"],
        "images_per_second": sum(images) / training_seconds,
        "nfe": last["nfe"],
        "nfe_backward": last["nfe_backward"],
        "peak_memory_bytes": peak_memory(device),
        "seconds": last["seconds"],
        "device": str(device),
        "precision": recipe.precision,
        "seed": recipe.seed,
    }
    if recipe.validation:
        best = max(rows, key=lambda row: row["validation_accuracy"])  # the first of equals
        summary["validation_accuracy"] = last["validation_accuracy"]
        summary["best_epoch"] = best["epoch"]
        summary["best_validation_accuracy"] = best["validation_accuracy"]
        summary["best_test_accuracy"] = best["test_accuracy"]
    if recipe.eval_solver is not None:
        summary["eval_solver"], summary["eval_accuracy"] = recipe.other_solver, last["eval_accuracy"]
    return summary


def _ending(job: _Job, summary: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    """What is printed of a finished run, a line each."""
    recipe, folder = job.recipe, job.asked.folder
    lines = [
        "",
        f"test accuracy {100 * last['test_accuracy']:.2f} % after {last['seconds']:.0f} s, "
        f"{summary['images_per_second']:,.0f} images/s"
        + (f", {last['nfe']:g} F evaluations" if last["nfe"] else "")
        + (f" and {summary['nfe_backward']:g} on the way back" if summary["nfe_backward"] else ""),
    ]
    if recipe.validation:
        lines.append(
            f"best on validation: epoch {summary['best_epoch']}, "
            f"{100 * summary['best_validation_accuracy']:.2f} %; its test accuracy "
            f"{100 * summary['best_test_accuracy']:.2f} %"
        )
        lines.append(f"best    {folder.best}")
    if summary["peak_memory_bytes"] is not None:
        place = "of tensors on the GPU" if job.asked.device.type == "cuda" else "of the whole process"
        lines.append(f"peak memory {summary['peak_memory_bytes'] / 2**20:,.0f} MiB {place}")
    if recipe.eval_solver is not None:
        accuracy = 100 * last["eval_accuracy"]
        lines.append(f"under {recipe.other_solver} {accuracy:.2f} %, {last['eval_nfe']:g} F evaluations")
    return [*lines, f"weights {folder.weights}"]


def _images(rows: list[dict[str, Any]], recipe: Recipe) -> list[int]:
    """Training images of each epoch."""
    ends = [row["update"] for row in rows]
    return [recipe.batch_size * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
