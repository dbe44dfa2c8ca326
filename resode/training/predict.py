"""What a trained network sees in images of one's own: picture files or arrays, and the likeliest classes."""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from resode.checks import checked
from resode.results import Result
from resode.tables import csv_text
from resode.training.data import Batches
from resode.training.data.archives import DataError
from resode.training.data.pictures import read_picture
from resode.training.evaluate import EVALUATION_BATCH, load, read_weights
from resode.training.files import RunError
from resode.training.plan import Model, choose_device


@dataclass(frozen=True)
class Prediction:
    """What a network sees in one image.

    Args:
        image: the file, with the image's number in brackets where it holds several.
        classes: the likeliest classes, best first.
        probabilities: theirs: softmax of the logits, 0 to 1. A network's own confidence, not calibrated.
    """

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Predictions(Result):
    """What a network sees in several images.

    Args:
        rows: one an image.
        notes: how images were changed to fit the network: colours, size, transparency.
    """

    rows: tuple[Prediction, ...]
    notes: tuple[str, ...]

    def to_csv(self) -> str:
        """A line for every image and class: image, rank, class, probability."""
        lines = [
            (row.image, rank, name, f"{share:.6f}")
            for row in self.rows
            for rank, (name, share) in enumerate(zip(row.classes, row.probabilities, strict=True), start=1)
        ]
        return csv_text(["image", "rank", "class", "probability"], lines)


@dataclass(frozen=True)
class _Wanted:
    """What images must be like."""

    channels: int
    height: int
    width: int
    resize: bool


@dataclass(frozen=True)
class _Image:
    """An image as it was found, and what has been done to it."""

    name: str
    pixels: np.ndarray  # uint8 (H, W, C)
    changes: tuple[str, ...] = ()


@checked
def predict(
    run: str | Path,
    images: Sequence[str | Path] | np.ndarray | Tensor,
    *,
    top: int = 3,
    resize: bool = False,
    model: Model | None = None,
    device: str = "auto",
) -> Predictions:
    """The likeliest classes of images, normalised as the run's own were.

    Args:
        run: a run folder, one of its checkpoints or its weights file.
        images: PNG and JPEG files, .npy and .npz files, or an array: uint8, values 0 to 255, of shape
            (N, C, H, W), (N, H, W, C), or without N for one image; (N, H, W) and (H, W) are grey.
        top: how many classes.
        resize: bring images to the network's size, bicubic, without keeping their ratio of width to height.
        model: for a network of one's own, as in `resode.load`.
        device: as for `train`.

    Raises:
        ValueError: no images, too many classes, or images of another size and no `resize`.
        DataError: a file cannot be read, or holds something else than images.
        RunError: the run does not say what it was trained on.

    Example:
        >>> import tempfile
        >>> from resode import train
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = train("odenet20", "digits", "smoke", updates=1, run_dir=folder + "/run", progress=False)
        ...     found = predict(run.path, np.zeros((2, 8, 8), np.uint8), top=2)
        >>> [row.image for row in found.rows], len(found.rows[0].classes)
        (['[0]', '[1]'], 2)
    """
    about = read_weights(Path(run))[1]
    missing = [name for name in ("shape", "mean", "std", "classes") if name not in about]
    if missing:
        raise RunError(
            f"{run} does not say what images it was trained on ({', '.join(missing)}). Take a run's folder."
        )
    _check_shape(run, about["shape"])
    classes = about["classes"]
    if not 1 <= top <= len(classes):
        raise ValueError(f"top must be 1 to {len(classes)}, the network's number of classes; got {top}.")
    wanted = _Wanted(*about["shape"], resize=resize)
    found = [_fitted(image, wanted) for image in _read(images, wanted)]
    place = choose_device(device)
    network = load(run, model=model, device=device)
    batches = Batches(
        torch.from_numpy(np.stack([image.pixels.transpose(2, 0, 1) for image in found])),
        torch.zeros(len(found), dtype=torch.int64),
        EVALUATION_BATCH,
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        train=False,
        device=place,
    )
    with torch.inference_mode():
        shares = torch.cat([network(x).double().softmax(dim=1).cpu() for x, _ in batches])
    values, indices = shares.topk(top, dim=1)
    rows = [
        Prediction(image.name, tuple(str(classes[i]) for i in best), tuple(probabilities))
        for image, best, probabilities in zip(found, indices.tolist(), values.tolist(), strict=True)
    ]
    changes = Counter(change for image in found for change in image.changes)
    notes = [f"{'1 image was' if n == 1 else f'{n:,} images were'} {what}." for what, n in changes.items()]
    return Predictions(tuple(rows), tuple(notes))


MAX_IMAGES = 100_000
"""In one file; the largest test sets have half as many."""

MAX_BYTES = 2 << 30
"""Of an array's pixels."""

MAX_PIXELS = 1 << 24
"""Numbers in one image that a network may ask for, 4096 x 4096 grey ones."""


def _check_shape(run: str | Path, shape: Any) -> None:
    whole = isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    if not whole or math.prod(shape) > MAX_PIXELS:
        raise RunError(
            f"{run} names images of shape {shape!r}, and that must be three whole numbers (C, H, W) with at "
            f"most {MAX_PIXELS:,} values. The file was changed, or is of another program."
        )


def _read(images: Any, wanted: _Wanted) -> list[_Image]:
    """The images as they are, of files or an array."""
    if isinstance(images, Tensor):
        images = images.cpu().numpy()
    if isinstance(images, np.ndarray):
        found = _of_array("", images, wanted)
    elif isinstance(images, str | Path):
        raise ValueError(f"predict takes several images, got one path, {images}. Put it in a list.")
    else:
        found = [image for file in images for image in _of_file(Path(file), wanted)]
    if not found:
        raise ValueError("there are no images: give at least one file, .png, .jpg, .npy or .npz.")
    return found


def _of_file(file: Path, wanted: _Wanted) -> list[_Image]:
    if file.is_dir():
        raise DataError(f"{file} is a folder. Name the files in it, such as {file}/*.png.")
    if not file.exists():
        raise DataError(f"{file} does not exist. Name picture files, or an .npy or .npz array.")
    if file.suffix.lower() in (".npy", ".npz"):
        found = _of_array(str(file), _load(file), wanted)
        if not found:
            raise DataError(f"{file} holds no images: its first dimension is 0.")
        return found
    picture = read_picture(file.read_bytes(), str(file))
    return [_Image(str(file), picture.pixels, picture.changes)]


def _load(file: Path) -> np.ndarray:
    """The array of an .npy file, or the only one (or the one called images) of an .npz file."""
    try:
        if not zipfile.is_zipfile(file):
            with file.open("rb") as stream:
                _check_header(file, stream)
            return np.load(file, allow_pickle=False)
        with zipfile.ZipFile(file) as archive, np.load(file, allow_pickle=False) as content:
            names = content.files
            chosen = names if len(names) == 1 else [name for name in names if name == "images"]
            if chosen:
                with archive.open(f"{chosen[0]}.npy") as stream:
                    _check_header(file, stream)
                return content[chosen[0]]
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many kinds
        raise DataError(f"{file} could not be read as an array: {type(error).__name__}: {error}.") from error
    raise DataError(
        f"{file} must hold one array, or one called images: it holds {', '.join(names) or 'nothing'}."
    )


def _check_header(file: Path, stream: IO[bytes]) -> None:
    """A DataError where an array is larger than any set of images, before memory is taken for it."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(stream)
    number, size = (shape[0] if len(shape) > 3 else 1), math.prod(shape) * kind.itemsize
    if number > MAX_IMAGES or size > MAX_BYTES:
        raise DataError(
            f"{file} declares {number:,} images and {size:,} bytes: at most {MAX_IMAGES:,} images and "
            f"{MAX_BYTES >> 20:,} MiB are read at once. Split it into several files."
        )


def _of_array(source: str, array: np.ndarray, wanted: _Wanted) -> list[_Image]:
    """Every image of an array; which dimension is which, its sizes and the network's say."""
    what = source or "the array"
    if array.dtype != np.uint8:
        raise DataError(
            f"images must be uint8, values 0 to 255: {what} is {array.dtype}. Of shares from 0 to 1, take "
            "(255 * x).round().astype('uint8')."
        )
    shape, known = array.shape, {1, 3, wanted.channels}
    first = (wanted.channels, wanted.height, wanted.width)
    if array.ndim == 2:  # one grey image
        array = array[None, :, :, None]
    elif array.ndim == 3 and shape == first:
        array = array.transpose(1, 2, 0)[None]
    elif array.ndim == 3 and shape[1:] == first[1:] and wanted.channels == 1:
        array = array[..., None]
    elif array.ndim == 3:  # (H, W, C), (C, H, W) or grey (N, H, W)
        array = (
            array[None]
            if shape[2] in known
            else array.transpose(1, 2, 0)[None]
            if shape[0] in known
            else array[..., None]
        )
    elif array.ndim == 4 and (shape[1:] == first or (shape[3] not in known and shape[1] in known)):
        array = array.transpose(0, 2, 3, 1)
    elif array.ndim != 4 or shape[3] not in known:
        raise DataError(
            f"an array of images has shape (N, C, H, W), (N, H, W, C), or without N for one image, with "
            f"{' or '.join(map(str, sorted(known)))} channels; (N, H, W) and (H, W) are grey: "
            f"{what} has {shape}."
        )
    return [_Image(f"{source}[{number}]", pixels) for number, pixels in enumerate(array)]


def _fitted(image: _Image, wanted: _Wanted) -> _Image:
    """The image with the network's channels and size."""
    pixels, changes = image.pixels, list(image.changes)
    height, width, channels = pixels.shape
    if channels == 3 and wanted.channels == 1:
        grey = pixels @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's
        pixels = np.rint(grey).astype(np.uint8)[..., None]
        changes.append("turned from colour to grey")
    elif channels == 1 and wanted.channels == 3:
        pixels = pixels.repeat(3, axis=2)
        changes.append("grey, and went in as three equal colours")
    elif channels != wanted.channels:
        raise DataError(
            f"the network takes images of {wanted.channels} channels: {image.name} has {channels}."
        )
    if (height, width) != (wanted.height, wanted.width):
        size = f"{wanted.width}×{wanted.height}"
        if not wanted.resize:
            raise DataError(
                f"the network was trained on images of {size} pixels: {image.name} has {width}×{height}. "
                "Cut it out of them, or ask for them to be resized (--resize, resize=True)."
            )
        if not pixels.size:
            raise DataError(f"{image.name} has no pixels: {width}×{height}.")
        planes = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float()
        planes = interpolate(planes, (wanted.height, wanted.width), mode="bicubic", antialias=True)
        pixels = planes[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        kept = height * wanted.width == width * wanted.height
        changes.append(f"resized to {size}{'' if kept else ', with other proportions'}")
    return _Image(image.name, pixels, tuple(changes))
