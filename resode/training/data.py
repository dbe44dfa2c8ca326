"""Data sets as one uint8 tensor each, and batches that are cropped, mirrored and normalized whole.

CIFAR-10 is decoded once and kept in a cache; see `load_data` for where it is looked for. `Batches`
keeps the images on the device and touches no image alone, so that data costs little beside a
training step.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resode.training import cifar
from resode.training.archives import DataError, fetch, replacing

__all__ = ["DATASETS", "Batches", "DataError", "ImageData", "load_data"]

DATASETS: tuple[str, ...] = ("digits", "cifar10")
"""Names that `load_data` knows."""

BINARY_URL = f"https://www.cs.toronto.edu/~kriz/{cifar.BINARY_ARCHIVE}"
"""Where `download=True` fetches CIFAR-10's official binary version from."""

_CACHE_VERSION = 1  # raise it when decoding or the cache's contents change


@dataclass(frozen=True, eq=False)
class ImageData:
    """Training and test images of one data set, as stored: uint8, not normalized.

    Args:
        name: the data set's name in DATASETS, or one's own.
        title: what figures and tables call it.
        train_images: uint8, shape (N, C, H, W), values 0 to 255.
        train_labels: int64, shape (N,), indices into `classes`.
        test_images: uint8, shape (M, C, H, W).
        test_labels: int64, shape (M,).
        classes: the classes' names in the order of the labels.
        mean: per channel, of the training images scaled to [0, 1].
        std: per channel, the standard deviation of the same.
        crop_padding: how many black pixels a random crop may shift an image by.
        flip: whether a mirrored image is still one of its class.

    Raises:
        ValueError: the parts disagree in shape, dtype or number; the message names the part.
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
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            _check_images(images, labels, self.mean, self.std, f"{split} ")
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

    def checksum(self) -> str:
        """A checksum of all images and labels, "crc32 1a2b3c4d"."""
        found = 0
        for values in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            found = zlib.crc32(values.cpu().contiguous().numpy().data, found)
        return f"crc32 {found:08x}"  # with a word: YAML takes 91e61998 for a number


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
    32x32 in ten classes, read from an image folder, the official binary or the official python version,
    as a folder or packed. It is decoded once and then read from the cache, which is renewed when the
    source's path, size or modification time changes.

    Args:
        name: one of DATASETS.
        data_dir: where cifar10 lies: an archive, its unpacked folder, or a folder that holds either.
            None takes the environment variable RESODE_DATA. Digits come with scikit-learn and refuse one.
        download: fetch the official binary version into `data_dir` (without one, into the cache) unless
            cifar10 is there already.
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
                "Leave them out, or ask for 'cifar10'."
            )
        return _digits()
    cache = _cache_folder(cache_dir)
    given = data_dir or os.environ.get("RESODE_DATA") or (cache if download else None)
    if given is None:
        raise DataError(
            "cifar10 must be given: pass --data-dir (data_dir), set the environment variable RESODE_DATA, or "
            f"pass --download (download=True) to fetch it. {cifar.FORMATS}"
        )
    path = Path(given).expanduser()
    try:
        try:
            source = cifar.find_source(path)
        except DataError:
            if not download:
                raise
            source = path / cifar.BINARY_ARCHIVE
            fetch(BINARY_URL, source, cifar.PUBLISHED_MD5[source.name])
        return _load_cifar(source, cache)
    except OSError as error:
        raise DataError(f"{path} could not be read: {error}. {cifar.FORMATS}") from error


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
# CIFAR-10's cache


def _cache_folder(cache_dir: str | Path | None) -> Path:
    given = cache_dir or os.environ.get("RESODE_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "resode"


def _load_cifar(source: Path, cache: Path) -> ImageData:
    place = str(source.resolve())
    state = json.dumps([_CACHE_VERSION, place, cifar.fingerprint(source)])
    key = hashlib.sha256(state.encode()).hexdigest()
    file = cache / f"cifar10-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.npz"
    data = _read_cache(file, key)
    if data is not None:
        return data
    decoded = cifar.decode(source)
    mean, std = _channel_statistics(decoded.train_images)
    arrays: dict[str, Any] = {**decoded._asdict(), "mean": mean, "std": std}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            np.savez(stream, **arrays, key=key)
    except OSError as error:
        warnings.warn(
            f"the decoded images cannot be kept in {cache} ({error}), so every run decodes them again; "
            "name a folder that can be written with cache_dir or RESODE_CACHE.",
            stacklevel=3,
        )
    return _cifar_data(arrays)


def _read_cache(file: Path, key: str) -> ImageData | None:
    """The cached data set, or None where there is none, it is of another source, or it is damaged."""
    try:
        # An .npz is a zip file, whose checksums are compared; np.load leaves a damaged one open.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            return _cifar_data({name: stored[name] for name in stored.files if name != "key"})
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile, zlib.error,
            NotImplementedError, RuntimeError):  # fmt: skip
        return None


def _cifar_data(arrays: dict[str, Any]) -> ImageData:
    splits = ("train_images", "train_labels", "test_images", "test_labels")
    return ImageData(
        "cifar10",
        str(arrays["title"]),
        *(torch.from_numpy(arrays[name]) for name in splits),
        classes=cifar.CLASSES,
        mean=tuple(map(float, arrays["mean"])),
        std=tuple(map(float, arrays["std"])),
        crop_padding=4,
        flip=True,
    )


# ---------------------------------------------------------------------------------------------
# Batches


class Batches:
    """One epoch of normalized batches, made whole on the device.

    A training epoch goes through the images in random order; each is shifted by up to `crop_padding`
    pixels within a black border, mirrored with probability 1/2 where `flip`, normalized to
    (x/255 − mean)/std, and loses a square of side `cutout` to zeros (DeVries & Taylor 2017,
    arXiv:1708.04552). Order and augmentation are a function of (seed, epoch) alone: they are the same on
    every device, leave torch's global random numbers alone, and a resumed run repeats them. Call
    `set_epoch` before each epoch; without it every epoch is the first.

    Args:
        images: uint8, shape (N, C, H, W), values 0 to 255; kept on `device`.
        labels: int64, shape (N,).
        batch_size: images a batch.
        mean: per channel, of values in [0, 1].
        std: per channel, positive.
        train: shuffle and augment; False gives every image once, in order and as it is, whatever
            `crop_padding`, `flip` and `cutout` say.
        crop_padding: how many pixels a crop may shift by, ≥ 0.
        flip: mirror half of the images left to right.
        cutout: side of the square in pixels, ≥ 0; its centre may be any pixel, so part of it may lie beyond
            the border.
        seed: of the order and the augmentation.
        device: where images are kept and batches are made.
        channels_last: give batches in channels-last memory format, which is faster for convolutions.
        drop_last: leave out the last batch when it is smaller; None does so in training alone.
        share: (r, W) gives the r-th of W equal parts of every batch, from 0: images rB/W to (r+1)B/W − 1 of
            the B that (0, 1) gives, with the same augmentation.

    Raises:
        TypeError: images or labels are of another dtype, or numbers that must be whole are not.
        ValueError: shapes disagree, a number is out of its range, `drop_last` would leave nothing, or a batch
            has no W equal parts.

    Yields:
        (images, labels): float32 (B/W, C, H, W) and int64 (B/W,).

    Example:
        >>> data = load_data("digits")
        >>> batches = Batches(data.train_images, data.train_labels, 128, mean=data.mean, std=data.std,
        ...                   train=True, crop_padding=data.crop_padding)
        >>> batches.set_epoch(3)
        >>> len(batches), next(iter(batches))[0].shape
        (11, torch.Size([128, 1, 8, 8]))
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        train: bool,
        crop_padding: int = 0,
        flip: bool = False,
        cutout: int = 0,
        seed: int = 0,
        device: str | torch.device = "cpu",
        channels_last: bool = True,
        drop_last: bool | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        _check_images(images, labels, mean, std)
        _check_whole("batch_size", batch_size, 1)
        _check_whole("crop_padding", crop_padding, 0)
        _check_whole("cutout", cutout, 0)
        if cutout > min(images.shape[2:]):
            raise ValueError(
                f"cutout hides part of an image, so its side is at most {min(images.shape[2:])} pixels here: "
                f"got {cutout}. Half the side of the image, 16 on CIFAR-10, is usual."
            )
        _check_whole("seed", seed)
        if min(std) <= 0:
            raise ValueError(f"std must be positive in every channel to divide by it: got {tuple(std)}.")
        self.drop_last = train if drop_last is None else drop_last
        if self.drop_last and batch_size > len(images):
            raise ValueError(
                f"drop_last leaves out a batch that is not full, here all of them: batch_size is "
                f"{batch_size}, there are {len(images)} images. Take a smaller batch_size or drop_last=False."
            )
        part, parts = share
        if not 0 <= part < parts:
            raise ValueError(f"share is (r, W) with 0 ≤ r < W, got {share}.")
        if batch_size % parts or (parts > 1 and not self.drop_last):
            raise ValueError(
                f"every batch must have {parts} equal parts, one for each process: batch_size is {batch_size}"
                + ("" if self.drop_last else ", and the last batch may be smaller (drop_last=False)")
                + f". Take a multiple of {parts}, such as {-(-batch_size // parts) * parts}."
            )
        self.share = share
        self.batch_size, self.train, self.seed, self.epoch = batch_size, train, seed, 0
        self.crop_padding, self.flip, self.cutout = (crop_padding, flip, cutout) if train else (0, False, 0)
        self.channels_last, self.device = channels_last, torch.device(device)
        # Channels last, also where batches are not: then a row of pixels is one run of bytes.
        self._images = images.to(self.device).permute(0, 2, 3, 1).contiguous()
        self._labels = labels.to(self.device)
        pixels = images.shape[2] * images.shape[3]
        self._shift = (torch.tensor(mean, dtype=torch.float64) * 255).float().repeat(pixels).to(self.device)
        self._scale = (torch.tensor(std, dtype=torch.float64) * 255).reciprocal()
        self._scale = self._scale.float().repeat(pixels).to(self.device)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order and augmentation of the next pass; `epoch` is a whole number ≥ 0."""
        _check_whole("epoch", epoch, 0)
        self.epoch = epoch

    def __len__(self) -> int:
        count = len(self._labels)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, padding = len(self._labels), self.crop_padding
        state = hashlib.blake2b(f"{self.seed} {self.epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(state, "little") >> 1)
        order = torch.randperm(count, generator=generator) if self.train else torch.arange(count)
        down, right = torch.randint(2 * padding + 1, (2, count), generator=generator)
        mirrored = torch.randint(2, (count,), generator=generator) if self.flip else torch.zeros_like(order)
        height, width = self._images.shape[1:3]
        row, column = (  # of the middle of each image's cutout
            torch.randint(length, (count,), generator=generator) if self.cutout else torch.zeros_like(order)
            for length in (height, width)
        )
        # One transfer an epoch; column i belongs to the i-th image that is given out.
        plan = torch.stack((order, mirrored, down, right, row, column)).to(self.device)
        part, parts = self.share
        size = self.batch_size // parts
        for start in range(part * size, len(self) * self.batch_size, self.batch_size):
            order, mirrored, down, right, row, column = plan[:, start : start + size]
            images = self._images.index_select(0, order)  # (B, H, W, C)
            images = self._normalize(_crop_and_flip(images, mirrored, down, right, padding, self.flip))
            if self.cutout:
                images.mul_(_outside(row, column, self.cutout, height, width))
            yield images, self._labels.index_select(0, order)

    def _normalize(self, images: Tensor) -> Tensor:
        """(x − 255 mean)/(255 std): uint8 (B, H, W, C) -> float32 (B, C, H, W)."""
        flat = images.reshape(len(images), -1).float()  # a long last axis: three channels vectorize badly
        flat = flat.sub_(self._shift).mul_(self._scale)
        images = flat.view(images.shape).permute(0, 3, 1, 2)
        return images if self.channels_last else images.contiguous()


def _crop_and_flip(
    images: Tensor, mirrored: Tensor, down: Tensor, right: Tensor, padding: int, flip: bool
) -> Tensor:
    """Each image shifted within a black border and mirrored, by one gather of rows of pixels.

    Args:
        images: uint8, shape (B, H, W, C).
        mirrored: 0 or 1 for each image, shape (B,); only where `flip`.
        down: first row of each image's window in the padded image, 0 to 2·padding, shape (B,).
        right: its first column in the same way.
        padding: width of the border in pixels.
        flip: whether any image may be mirrored.

    Returns:
        uint8, shape (B, H, W, C).
    """
    if not (padding or flip):
        return images
    count, height, width, channels = images.shape
    both = torch.cat((images, images.flip(2))) if flip else images
    both = F.pad(both, (0, 0, padding, padding, padding, padding))
    tall, wide = both.shape[1:3]
    # Window p holds the `width` pixels from pixel p on, counted through all padded images; it is a view.
    windows = both.view(-1).unfold(0, width * channels, channels)
    image = mirrored * count + torch.arange(count, device=images.device)
    row = down[:, None] + torch.arange(height, device=images.device)  # (B, H)
    start = (image[:, None] * tall + row) * wide + right[:, None]
    return windows.index_select(0, start.flatten()).view(images.shape)


def _outside(row: Tensor, column: Tensor, side: int, height: int, width: int) -> Tensor:
    """0 in each image's square of that side around its row and column, 1 outside; bool (B, 1, H, W).

    An even side has half a pixel more above and to the left.
    """

    def within(centre: Tensor, length: int) -> Tensor:
        offset = torch.arange(length, device=centre.device) - centre[:, None] + side // 2
        return (offset >= 0) & (offset < side)

    return ~(within(row, height)[:, None, :, None] & within(column, width)[:, None, None, :])


def _check_images(images: Any, labels: Any, mean: Any, std: Any, of: str = "") -> None:
    if not (isinstance(images, Tensor) and images.dtype == torch.uint8):
        raise TypeError(f"{of}images must be a uint8 tensor with values 0 to 255: got {_kind(images)}.")
    if not (isinstance(labels, Tensor) and labels.dtype == torch.int64):
        raise TypeError(f"{of}labels must be an int64 tensor: got {_kind(labels)}.")
    if images.ndim != 4 or labels.shape != images.shape[:1] or not images.numel():
        raise ValueError(
            f"{of}images must have shape (N, C, H, W) and labels (N,), with N at least 1: got "
            f"{tuple(images.shape)} and {tuple(labels.shape)}."
        )
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"mean and std must have one number for each of the {images.shape[1]} channels: got "
            f"{len(mean)} and {len(std)}."
        )


def _kind(value: Any) -> str:
    return f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def _check_whole(name: str, value: Any, least: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number: got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}: got {value}.")
