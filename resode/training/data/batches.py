"""Batches that are cropped, mirrored and normalized whole.

The images stay on the device and none is touched alone, so that data costs little beside a training step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resode.checks import check_whole, checked


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
        >>> from resode.training.data import load_data
        >>> data = load_data("digits")
        >>> batches = Batches(data.train_images, data.train_labels, 128, mean=data.mean, std=data.std,
        ...                   train=True, crop_padding=data.crop_padding)
        >>> batches.set_epoch(3)
        >>> len(batches), next(iter(batches))[0].shape
        (11, torch.Size([128, 1, 8, 8]))
    """

    @checked
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
        check_images(images, labels, mean, std)
        check_whole("batch_size", batch_size, 1)
        check_whole("crop_padding", crop_padding, 0)
        check_whole("cutout", cutout, 0)
        if cutout > min(images.shape[2:]):
            raise ValueError(
                f"cutout hides part of an image, so its side is at most {min(images.shape[2:])} pixels here: "
                f"got {cutout}. Half the side of the image, 16 on CIFAR-10, is usual."
            )
        check_whole("seed", seed)
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
        check_whole("epoch", epoch, 0)
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


def check_images(images: Any, labels: Any, mean: Any, std: Any, of: str = "") -> None:
    """Refuse images and labels that are no data set, naming the part.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that disagree.
    """
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
