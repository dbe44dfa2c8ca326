"""Data sets as one uint8 tensor each.

A CIFAR is decoded once and kept in a cache; see `load_data` for where it is looked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.checks import checked, warn_user
from resode.training.data import cifar
from resode.training.data.archives import DataError, fetch, replacing
from resode.training.data.batches import check_images
from resode.training.data.cifar_tables import CIFARS, PUBLISHED_MD5, Cifar

__all__ = ["DATASETS", "DataError", "ImageData", "load_data"]

DATASETS: tuple[str, ...] = ("digits", *CIFARS)
"""Names that `load_data` knows."""

_CACHE_VERSION = 2  # raise it when decoding or the cache's contents change


@dataclass(frozen=True, eq=False)
class ImageData:
    """Training and test images of one data set, as stored: uint8, not normalized.

    Args:
        name: the data set's name in DATASETS, or one's own.
        title: what figures and tables call it.
        train_images: uint8, shape (N, C, H, W), values 0 to 255; a tensor, or an array that becomes one.
        train_labels: int64, shape (N,), indices into `classes`; or an array, list or tuple of whole numbers.
        test_images: uint8, shape (M, C, H, W).
        test_labels: int64, shape (M,).
        classes: the classes' names in the order of the labels.
        mean: per channel, of the training images scaled to [0, 1].
        std: per channel, the standard deviation of the same.
        crop_padding: how many black pixels a random crop may shift an image by.
        flip: whether a mirrored image is still one of its class.

    Raises:
        ValueError: the parts disagree in shape, dtype or number, a label stands for no class, or the test
            images are of a class that no training image is of; the message names the part.
    """

    name: str
    title: str
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("name", "title"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, got {getattr(self, name)!r}.")
        # Plain numbers and tuples, also of arrays and tensors: a run's files hold them.
        for name in ("classes", "mean", "std"):
            given = getattr(self, name)
            values = given.tolist() if hasattr(given, "tolist") else given
            if not isinstance(values, list | tuple):
                raise TypeError(f"{name} must be a sequence, got {given!r} ({type(given).__name__}).")
            if name != "classes":
                values = [float(value) for value in values]
                if not np.isfinite(values).all():
                    raise ValueError(f"{name} must be finite in every channel, got {tuple(values)}.")
            object.__setattr__(self, name, tuple(values))
        for part in ("train_images", "train_labels", "test_images", "test_labels"):
            object.__setattr__(self, part, _tensor(getattr(self, part)))
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            check_images(images, labels, self.mean, self.std, f"{split} ")
            if images.shape[1:] != self.train_images.shape[1:]:
                raise ValueError(
                    "training and test images must have one shape (C, H, W): got "
                    f"{tuple(self.train_images.shape[1:])} and {tuple(images.shape[1:])}."
                )
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= len(self.classes):
                raise ValueError(
                    f"{split} labels must be 0 to {len(self.classes) - 1}, indices into the "
                    f"{len(self.classes)} classes: got {low} to {high}."
                )

        strange = sorted(set(self.test_labels.unique().tolist()) - set(self.train_labels.unique().tolist()))
        if strange:
            raise ValueError(
                "every class of the test images must be among the training images: of "
                f"{', '.join(str(self.classes[label]) for label in strange[:8])} there are none. Move some "
                "over, or leave these test images out."
            )

    def checksum(self) -> str:
        """A checksum of all images and labels, "crc32 1a2b3c4d"."""
        found = 0
        for values in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            found = zlib.crc32(values.cpu().contiguous().numpy().data, found)
        return f"crc32 {found:08x}"  # with a word: YAML takes 91e61998 for a number


def _tensor(values: Any) -> Any:
    """Whole numbers as a tensor, labels of any width as int64; everything else as it is, to be refused."""
    if isinstance(values, list | tuple | np.ndarray):
        array = np.asarray(values)
        if array.dtype.kind in "iu" and array.size:
            return torch.from_numpy(np.array(array if array.ndim > 1 else array.astype(np.int64)))
    return values


@checked
def load_data(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    cache_dir: str | Path | None = None,
) -> ImageData:
    """A data set by name, in memory.

    "digits" are scikit-learn's 1,797 handwritten digits, 8x8 and grey: every fifth one of a class is
    a test image (360), the others (1,437) are for training. "cifar10" are 60,000 colour pictures of
    32x32 in ten classes, "cifar100" as many in a hundred classes, "cifar100_coarse" the same pictures with
    their twenty coarse labels; read from an image folder, the official binary or the official python
    version, as a folder or packed, or from Kaggle's train/ and trainLabels.csv, of which every fifth
    picture of a class is then a test image. Pictures are decoded as `predict` decodes them: upright, and
    on white where they are transparent. They are decoded once and then read from the cache, which is
    renewed when the source's path, size or modification time changes.

    Args:
        name: one of DATASETS.
        data_dir: where a CIFAR lies: an archive, its unpacked folder, or a folder that holds either.
            None takes the environment variable RESODE_DATA. Digits come with scikit-learn and refuse one.
        download: fetch the official binary version into `data_dir` (without one, into the cache) unless
            it is there already.
        cache_dir: where decoded images are kept; None takes the environment variable RESODE_CACHE,
            or else `resode` in the user's cache folder. Digits need none.

    Returns:
        The images, their labels, and how to normalize and augment them.

    Raises:
        DataError: the name is unknown, or an option has no meaning for it; or the data are
            missing, damaged, unsafe or of another kind.
        ImportError: the extra `train` is not installed.

    Source:
        Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009); the digits are the test
        part of Alpaydin & Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998).

    Example:
        >>> data = load_data("digits")
        >>> data.train_images.shape, data.train_images.dtype, len(data.test_labels)
        (torch.Size([1437, 1, 8, 8]), torch.uint8, 360)
    """
    if name not in DATASETS:
        raise DataError(f"data set must be one of {', '.join(DATASETS)}: got {name!r}.")
    if name == "digits":
        if data_dir is not None or download:
            raise DataError(
                "digits come with scikit-learn and take neither data_dir nor download. "
                f"Leave them out, or ask for {', '.join(CIFARS)}."
            )
        return _digits()
    kind = CIFARS[name]
    cache = _cache_folder(cache_dir)
    given = data_dir or os.environ.get("RESODE_DATA") or (cache if download else None)
    if given is None:
        raise DataError(
            f"{name} must be given: pass --data-dir (data_dir), set the environment variable RESODE_DATA, or "
            f"pass --download (download=True) to fetch it. {kind.formats}"
        )
    path = Path(given).expanduser()
    try:
        try:
            source = cifar.find_source(path, kind)
        except DataError:
            if not download:
                raise
            source = path / kind.archives[0]
            fetch(kind.url, source, PUBLISHED_MD5[source.name])
        return _load_cifar(source, cache, kind)
    except OSError as error:
        raise DataError(f"{path} could not be read: {error}. {kind.formats}") from error


def _digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits are scikit-learn's, which is not installed: pip install 'resode[train]'"
        ) from error
    bunch: Any = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]  # (1797, 1, 8, 8), 0..16 before
    labels = bunch.target.astype(np.int64)
    by_class = np.argsort(labels, kind="stable")
    test = np.sort(by_class[::5])
    train = np.setdiff1d(by_class, test)  # sorted
    mean, std = _channel_statistics(images[train])
    return ImageData(
        "digits",
        "digits (scikit-learn)",
        torch.from_numpy(images[train]),
        torch.from_numpy(labels[train]),
        torch.from_numpy(images[test]),
        torch.from_numpy(labels[test]),
        classes=tuple("0123456789"),
        mean=mean,
        std=std,
        crop_padding=1,
        flip=False,
    )


def _channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of values scaled to [0, 1], from exact counts of 0..255."""
    levels = np.arange(256) / 255
    mean, std = [], []
    for channel in np.moveaxis(images, 1, 0):
        share = np.bincount(channel.ravel(), minlength=256) / channel.size
        mean.append(float(share @ levels))
        std.append(float(np.sqrt(share @ (levels - mean[-1]) ** 2)))
    return tuple(mean), tuple(std)


# ---------------------------------------------------------------------------------------------
# CIFAR's cache


def _cache_folder(cache_dir: str | Path | None) -> Path:
    given = cache_dir or os.environ.get("RESODE_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "resode"


def _load_cifar(source: Path, cache: Path, kind: Cifar) -> ImageData:
    place = str(source.resolve())
    state = json.dumps([_CACHE_VERSION, place, cifar.fingerprint(source, kind)])
    key = hashlib.sha256(state.encode()).hexdigest()
    file = cache / f"{kind.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.npz"
    data = _read_cache(file, key, kind)
    if data is not None:
        return data
    decoded = cifar.decode(source, kind)
    mean, std = _channel_statistics(decoded.train_images)
    arrays: dict[str, Any] = {**decoded._asdict(), "mean": mean, "std": std}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            np.savez(stream, **arrays, key=key)
    except OSError as error:
        warn_user(
            f"the decoded images cannot be kept in {cache} ({error}), so every run decodes them again; "
            "name a folder that can be written with cache_dir or RESODE_CACHE.",
        )
    return _cifar_data(arrays, kind)


def _read_cache(file: Path, key: str, kind: Cifar) -> ImageData | None:
    """The cached data set, or None where there is none, it is of another source, or it is damaged."""
    try:
        # An .npz is a zip file, whose checksums are compared; np.load leaves a damaged one open.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            return _cifar_data({name: stored[name] for name in stored.files if name != "key"}, kind)
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile, zlib.error,
            NotImplementedError, RuntimeError):  # fmt: skip
        return None


def _cifar_data(arrays: dict[str, Any], kind: Cifar) -> ImageData:
    splits = ("train_images", "train_labels", "test_images", "test_labels")
    return ImageData(
        kind.name,
        str(arrays["title"]),
        *(torch.from_numpy(arrays[name]) for name in splits),
        classes=kind.classes,
        mean=tuple(map(float, arrays["mean"])),
        std=tuple(map(float, arrays["std"])),
        crop_padding=4,
        flip=True,
    )


# ---------------------------------------------------------------------------------------------
# Batches
