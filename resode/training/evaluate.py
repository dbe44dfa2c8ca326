"""A trained network again: load it, and measure it on images, under the solver it has or another one."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from resode import networks
from resode.blocks import ODEBlock, ResidualStack
from resode.blocks.solving import set_solver, solving_modules
from resode.checks import check_whole, checked, known, one_of
from resode.modes import evaluating
from resode.results import Result
from resode.training.data import Batches, ImageData, load_data
from resode.training.data.datasets import DATASETS
from resode.training.files import RunError, unpack
from resode.training.folder import NoSuchRun, RunFolder, check_format
from resode.training.plan import Model, choose_device, make_network, model_name
from resode.training.refining import refine

EVALUATION_BATCH = 500
"""Images at once where no gradients are kept."""


@dataclass(frozen=True)
class Score(Result):
    """How a network does on some images.

    Args:
        accuracy: share recognised, 0 to 1.
        loss: mean cross entropy.
        nfe: calls of fields F in a forward pass, summed over the network's solving blocks; the mean over
            samples where each has its own steps.
        images: how many there were.
        seconds: that it took.
    """

    accuracy: float
    loss: float
    nfe: float
    images: int
    seconds: float


@checked
def load(run: str | Path, *, model: Model | None = None, device: str = "cpu") -> nn.Module:
    """A trained network, from its run folder or weights file.

    No objects are unpickled and no code is imported by a name in a file: weights are tensors alone, and a
    network of one's own is passed in.

    Args:
        run: a run folder, one of its checkpoints, or a weights file: safetensors, or torch's with a state
            dict in it; see `resode.networks.load_weights` for what others' may look like.
        model: what the weights belong to where the file does not say it: a name, a network or its
            constructor.
        device: where the network goes.

    Returns:
        The network, in evaluation mode.

    Raises:
        NoSuchRun: there is no such run.
        RunError: the file is damaged, or belongs to another network.
    """
    tensors, about = read_weights(Path(run))
    options = about.get("options", {})
    named = model is None
    if model is None:
        if "model" not in about:
            raise RunError(f"{run} does not say which network it belongs to. Pass its name as model.")
        if about["own"]:
            raise RunError(
                f"{run} belongs to a network of your own, {about['model']}. Pass its constructor as model."
            )
        model = str(about["model"])
    elif not isinstance(model, str):
        options = about.get("options", {}) if about.get("own") else {}
    times = about.get("refined", 0)
    if about:
        _check_size(run, tensors, str(model) if named else None, options, times)
    network = make_network(model, options)
    if times:
        refine(network, times)
    try:
        if about:
            network.load_state_dict(tensors)
        else:  # of others, who wrap and name them in their ways
            networks.load_weights(network, tensors)
    except RuntimeError as error:
        raise RunError(f"the weights in {run} do not fit {model_name(model)}: {error}.") from error
    return network.to(choose_device(device)).eval()


def _check_size(
    run: str | Path, tensors: Mapping[str, Tensor], model: str | None, options: Any, refined: Any
) -> None:
    """A RunError where a file's header asks for a network that its tensors cannot fill.

    It is made without memory first, and only if its depth and its widths can be those of the tensors.
    """
    blocks, entries = len(tensors), sum(value.numel() for value in tensors.values())
    problem = None
    if not isinstance(options, dict) or type(refined) is not int or refined < 0:
        problem = f"options {options!r} and refined {refined!r} are none"
    elif blocks < 2**refined if refined < 64 else True:
        problem = f"refined {refined} times, a stack has at least 2^{refined} tensors"
    elif wide := [f"{n} {v}" for n, v in options.items() if isinstance(v, int) and abs(v) > max(entries, 64)]:
        problem = f"{', '.join(wide)} {'is' if len(wide) == 1 else 'are'} more"
    elif model is not None:
        deep = [
            number for number in map(int, re.findall(r"\d{1,18}", model)) if number > 10 * max(blocks, 64)
        ]
        if deep:
            problem = f"a {model} has more"
        else:
            with torch.device("meta"):
                needed = sum(value.numel() for value in make_network(model, options).state_dict().values())
            if needed > 2 * entries:
                problem = f"its header asks for {needed:,}"
    if problem:
        raise RunError(
            f"{run} does not hold the network that it names: it has {blocks:,} tensors, {entries:,} numbers "
            f"in all, and {problem}. It was changed, or is of another program."
        )


@checked
def evaluate(
    run: str | Path | nn.Module,
    data: str | ImageData | None = None,
    *,
    solver: str | None = None,
    substeps: int | None = None,
    model: Model | None = None,
    data_dir: str | Path | None = None,
    device: str = "auto",
) -> Score:
    """Accuracy on the test images, under the run's solver or another one.

    Args:
        run: a run folder, a weights file, or a network (its solver stays changed).
        data: the data set; None for the run's own.
        solver: a method for every `ResidualStack`; None for the run's own.
        substeps: solver steps a block; None for the run's own.
        model: as for `load`.
        data_dir: as for `train`; None for the run's own.
        device: as for `train`.

    Returns:
        The score, in float32.
    """
    if isinstance(run, nn.Module):
        if data is None:
            raise ValueError("a network comes without images: pass data, such as 'digits' or an ImageData.")
        network = run.to(choose_device(device))
    else:
        network = load(run, model=model, device=device)
    images = images_of(run, data, data_dir)
    if solver is not None or substeps is not None:
        set_solver(network, solver, substeps)
    return score(network, plain_batches(images, device=choose_device(device)))


def images_of(
    run: str | Path | nn.Module, data: str | ImageData | None = None, data_dir: str | Path | None = None
) -> ImageData:
    """The data set given, or else the one that a run was trained on."""
    if isinstance(data, ImageData):
        return data
    if isinstance(run, nn.Module):
        about, config = {}, {}
    else:
        _, about = read_weights(Path(run))
        places = [place for place in (Path(run), *Path(run).parents[:2]) if (place / "config.yaml").is_file()]
        config = RunFolder(places[0]).read_config() if places else {}
    name = data or about.get("data")
    if name is None:
        raise RunError(f"{run} does not say which data set it was trained on. Pass its name as data.")
    return load_data(known("data set", name, DATASETS), data_dir or config.get("data_dir"))


def plain_batches(
    data: ImageData, split: str = "test", device: torch.device | str = "cpu", limit: int | None = None
) -> Batches:
    """Images of a data set in their order, normalised and otherwise as they are.

    Some data sets lie sorted by class, so that a few images (up to `limit`) are evenly spaced over the split,
    "test" or "train".
    """
    one_of("split", split, ("test", "train"))
    if limit is not None:
        check_whole("limit", limit, 1)
    images, labels = (
        (data.test_images, data.test_labels) if split == "test" else (data.train_images, data.train_labels)
    )
    if limit is not None and limit < len(images):
        spaced = torch.arange(limit) * len(images) // limit
        images, labels = images[spaced], labels[spaced]
    return Batches(images, labels, EVALUATION_BATCH, mean=data.mean, std=data.std, train=False, device=device)


@checked
def calibration_batches(data: ImageData, count: int, device: torch.device | str = "cpu") -> Batches:
    """Training images to measure batch-norm statistics at: at random, cropped and mirrored as in training.

    Batches in the order of a sorted data set would each hold one class, and miss the variance between them.

    Args:
        data: the data set.
        count: how many images, at most all.
        device: where the batches are made.

    Returns:
        Batches of nearly equal size, at most 500: normalised images float32 (B, C, H, W), labels int64 (B,);
        the same ones at every pass.

    Raises:
        ValueError: count below 1.

    Example:
        >>> from resode.training.data.datasets import load_data
        >>> [len(labels) for _, labels in calibration_batches(load_data("digits"), 700)]
        [350, 350]
    """
    check_whole("count", count, 1)
    chosen = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))[:count]
    batches = -(-len(chosen) // EVALUATION_BATCH)
    return Batches(
        data.train_images[chosen],
        data.train_labels[chosen],
        -(-len(chosen) // batches),  # nearly equal ones, as each counts the same
        mean=data.mean,
        std=data.std,
        train=True,
        crop_padding=data.crop_padding,
        flip=data.flip,
        device=device,
        drop_last=False,
    )


@checked
def score(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Evaluate a network as it is, in evaluation mode and float32.

    Args:
        network: from images (B, C, H, W) to logits (B, classes).
        batches: of images (B, C, H, W), normalised as in training, and labels (B,) int64.

    Returns:
        The score; the network's mode is as it was.

    Raises:
        ValueError: there are no images.
    """
    solving = solving_modules(network)
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    evaluations: list[Tensor] = []
    images = 0
    begun = time.perf_counter()
    with evaluating(network), torch.inference_mode():
        for inputs, labels in batches:
            logits = network(inputs).float()
            losses.append(cross_entropy(logits, labels, reduction="sum").double())
            hits.append((logits.argmax(dim=1) == labels).sum())
            evaluations.append(torch.as_tensor(evaluations_of_last_call(solving) * len(labels)))
            images += len(labels)
    if not images:
        raise ValueError("there are no images to evaluate on: the batches are empty.")
    return Score(
        accuracy=int(torch.stack(hits).sum()) / images,
        loss=float(torch.stack(losses).sum()) / images,
        nfe=float(torch.stack(evaluations).double().sum()) / images,
        images=images,
        seconds=time.perf_counter() - begun,
    )


def evaluations_of_last_call(solving: Iterable[ResidualStack | ODEBlock]) -> float | Tensor:
    """Calls of F in the last forward pass, as a number; a 0-D tensor on the device where samples differ."""
    total: float | Tensor = 0
    for module in solving:
        stats = module.stats
        if stats is not None:
            total = total + (stats.nfe.double().mean() if isinstance(stats.nfe, Tensor) else stats.nfe)
    return total


def recomputations_of_last_call(solving: Iterable[ResidualStack | ODEBlock]) -> int:
    """Calls of F on the way back from the last forward pass; none where the activations were kept."""
    return sum(module.stats.nfe_backward for module in solving if module.stats is not None)


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A state_dict and what it belongs to, from a run folder, a checkpoint or a weights file."""
    if path.is_dir():
        folder = RunFolder.open(path)
        if not folder.weights.exists() and folder.diverged.exists():
            raise RunError(
                f"{path} has no weights: it diverged in its first epoch. The state that failed is in "
                f"{folder.diverged}; start anew with another recipe or network in another folder."
            )
        if not folder.weights.exists():
            raise RunError(
                f"{path} has no weights yet: its first epoch did not end. Go on with --resume {path}."
            )
        path = folder.weights
    elif not path.exists():
        raise NoSuchRun(path)
    elif path.suffix != ".safetensors":
        try:
            return networks.read_weights(path), {}
        except ValueError as error:
            raise RunError(str(error)) from error
    tensors, about = unpack(path)
    if about:
        check_format(path, about.get("format"))
    if "rows" in about:  # a checkpoint: the network is one part of it
        start = "average.module." if "average.n_averaged" in tensors else "network."
        tensors = {
            name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)
        }
    return tensors, about
