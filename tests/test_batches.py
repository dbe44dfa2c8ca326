"""Batches are exact: normalization, every crop a window, and (seed, epoch) decides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resode.training.data import Batches, ImageData

MEAN, STD = (0.49, 0.48, 0.45), (0.247, 0.243, 0.262)


def random_images(count, channels=3, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count)  # a label tells which image it is


def batches_of(images, labels, batch_size=64, **options):
    options = {"mean": MEAN[: images.shape[1]], "std": STD[: images.shape[1]], "train": True, **options}
    return Batches(images, labels, batch_size, **options)


def pixels(batch, mean=MEAN, std=STD):
    """Back to 0..255, which must be whole numbers to rounding."""
    channels = batch.shape[1]
    mean, std = (torch.tensor(v[:channels], dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
    values = (batch.double() * std + mean) * 255
    assert (values - values.round()).abs().max() < 1e-3
    return values.round().to(torch.uint8)


def windows(image, padding, flip):
    """Every image that augmentation may make of this one: {(mirrored, down, right): pixels}."""
    height, width = image.shape[1:]
    found = {}
    for mirrored in (False, True) if flip else (False,):
        padded = np.pad(
            image.numpy()[..., :: -1 if mirrored else 1], ((0, 0), (padding,) * 2, (padding,) * 2)
        )
        for down in range(2 * padding + 1):
            for right in range(2 * padding + 1):
                found[mirrored, down, right] = padded[
                    :, down : down + height, right : right + width
                ].tobytes()
    return found


def test_evaluation_is_exact_normalization_in_order():
    """(x/255 − mean)/std to float32's rounding, whatever augmentation is named."""
    images, labels = random_images(150)
    batches = batches_of(images, labels, train=False, crop_padding=4, flip=True)
    out = list(batches)
    assert [len(y) for _, y in out] == [64, 64, 22] and len(batches) == 3
    assert torch.equal(torch.cat([y for _, y in out]), labels)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    expected = (images.double() / 255 - mean) / std
    got = torch.cat([x for x, _ in out])
    assert got.dtype == torch.float32
    assert (got.double() - expected).abs().max() < 1e-6


def test_every_crop_is_a_window_and_all_windows_are_as_likely():
    """162 windows, 4,050 images: 25 each expected; χ² with 161 degrees of freedom is 161 ± 18."""
    images, labels = random_images(81, height=6, width=6, seed=1)
    names = [{value: key for key, value in windows(image, 4, True).items()} for image in images]
    assert all(len(found) == 162 for found in names)  # no two windows of an image are alike
    counts = dict.fromkeys(names[0].values(), 0)
    for x, y in batches_of(
        images.repeat(50, 1, 1, 1), labels.repeat(50), 50, crop_padding=4, flip=True, seed=5
    ):
        for image, label in zip(pixels(x), y, strict=True):
            counts[names[label][image.numpy().tobytes()]] += 1
    assert sum(counts.values()) == 4050
    assert sum((n - 25) ** 2 / 25 for n in counts.values()) < 161 + 5 * 18
    mirrored = sum(n for (flipped, _, _), n in counts.items() if flipped)
    assert abs(mirrored - 2025) < 4 * 32  # σ = √(4050/4) = 32


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    channels=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    padding=st.integers(0, 3),
    flip=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(-3, 2**40),
)
def test_augmentation_of_any_shape(channels, height, width, padding, flip, channels_last, seed):
    images, labels = random_images(13, channels, height, width)
    options = {"crop_padding": padding, "flip": flip, "channels_last": channels_last, "seed": seed}
    batches = batches_of(images, labels, 5, drop_last=False, **options)
    seen = []
    for x, y in batches:
        assert x.is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        for image, label in zip(pixels(x), y, strict=True):
            assert image.numpy().tobytes() in windows(images[label], padding, flip).values()
            seen.append(int(label))
    assert sorted(seen) == list(range(13))


def test_order_and_augmentation_are_a_function_of_seed_and_epoch():
    images, labels = random_images(200)

    def epoch(seed, number, **options):
        batches = batches_of(images, labels, seed=seed, crop_padding=4, flip=True, **options)
        batches.set_epoch(number)
        return batches, [*batches]

    def same(one, other):
        return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True))

    batches, reference = epoch(7, 3)
    assert same(reference, [*batches])  # the same again
    batches.set_epoch(4)
    following = [*batches]
    assert not same(reference, following)
    assert same(following, epoch(7, 4)[1])  # a run that resumes in epoch 4
    assert not same(reference, epoch(8, 3)[1])
    assert same(reference, epoch(7, 3, channels_last=False)[1])
    batches.set_epoch(3)
    torch.rand(17)
    first, second = iter(batches), iter(batches)  # two at once do not disturb each other
    next(second)
    assert same(reference, [*first])


def test_the_global_random_state_is_left_alone():
    images, labels = random_images(100)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(batches_of(images, labels, crop_padding=2, flip=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_training_shuffles_and_leaves_out_a_rest():
    images, labels = random_images(150)
    batches = batches_of(images, labels)
    out = torch.cat([y for _, y in batches])
    assert len(batches) == 2 and len(out) == 128 == len(set(out.tolist()))
    assert not torch.equal(out, out.sort().values)
    whole = batches_of(images, labels, drop_last=False)
    assert [len(y) for _, y in whole] == [64, 64, 22]
    assert sorted(torch.cat([y for _, y in whole]).tolist()) == labels.tolist()
    assert len(batches_of(images, labels, train=False, drop_last=True)) == 2
    for x, y in batches:  # no augmentation asked for
        assert torch.equal(pixels(x), images[y])


def test_images_are_not_written_to():
    images, labels = random_images(20, channels=1, height=8, width=8)
    before = images.clone()
    for x, _ in batches_of(images, labels, 10, mean=(0.5,), std=(0.5,), crop_padding=1, flip=True):
        x.zero_()
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 11}, ValueError, "batch_size is 11, there are 10 images"),
        ({"batch_size": 0}, ValueError, "batch_size must be .*at least 1"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be a whole number"),
        ({"crop_padding": -1}, ValueError, "crop_padding must be .*at least 0"),
        ({"seed": "1"}, TypeError, "seed must be a whole number"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "std must be positive"),
        ({"mean": (1.0,)}, ValueError, "each of the 3 channels: got 1 and 3"),
        ({"images": torch.zeros(10, 3, 4, 4)}, TypeError, "uint8.*got torch.float32 tensor"),
        ({"images": np.zeros((10, 3, 4, 4), np.uint8)}, TypeError, "uint8 tensor.*got ndarray"),
        ({"images": torch.zeros(10, 3, 4, dtype=torch.uint8)}, ValueError, r"got \(10, 3, 4\) and \(10,\)"),
        (
            {"images": torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "labels": torch.arange(0)},
            ValueError,
            "at least 1",
        ),
        ({"labels": torch.arange(9)}, ValueError, r"and \(9,\)"),
        ({"labels": torch.arange(10).int()}, TypeError, "int64 tensor: got torch.int32 tensor"),
    ],
)
def test_wrong_arguments_of_batches(options, error, message):
    images, labels = random_images(10, height=4, width=4)
    options = {
        "images": images,
        "labels": labels,
        "batch_size": 2,
        "mean": MEAN,
        "std": STD,
        "train": True,
        **options,
    }
    with pytest.raises(error, match=message):
        Batches(**options)
    batches = batches_of(images, labels, 10)
    with pytest.raises(ValueError, match=r"epoch must be .*at least 0"):
        batches.set_epoch(-1)
    with pytest.raises(TypeError, match="epoch must be a whole number"):
        batches.set_epoch(1.5)


def test_a_last_batch_may_be_all(tmp_path):
    images, labels = random_images(10, height=4, width=4)
    assert [len(y) for _, y in batches_of(images, labels, 10)] == [10]
    assert [len(y) for _, y in batches_of(images, labels, 99, drop_last=False)] == [10]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"test_labels": torch.tensor([2])}, ValueError, r"test labels must be 0 to 1.*got 2 to 2"),
        ({"train_labels": torch.tensor([0, -1])}, ValueError, r"got -1 to 0"),
        ({"train_images": torch.zeros(2, 1, 4, 4)}, TypeError, "train images must be a uint8 tensor"),
        (
            {"test_images": torch.zeros(1, 1, 5, 4, dtype=torch.uint8)},
            ValueError,
            r"\(1, 4, 4\) and \(1, 5, 4\)",
        ),
        ({"std": (0.1, 0.2)}, ValueError, "mean and std"),
    ],
)
def test_one_s_own_image_data_is_checked(change, error, message):
    parts = {
        "name": "mine", "title": "mine", "classes": ("a", "b"), "mean": (0.5,), "std": (0.5,),
        "train_images": torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "train_labels": torch.tensor([0, 1]),
        "test_images": torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "test_labels": torch.tensor([0]),
    }  # fmt: skip
    assert "tensor" not in repr(ImageData(**parts))
    with pytest.raises(error, match=message):
        ImageData(**{**parts, **change})


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_hides_one_square_at_every_place_and_nothing_else(side):
    """The centre is any of 8×6 pixels; what lies in the image of rows c − ⌊s/2⌋ … + s − 1 becomes 0.

    2,400 images: 50 expected for each centre, χ² with 47 degrees of freedom is 47 ± 9.7.
    """
    images, labels = random_images(2400, height=8, width=6)
    plain = batches_of(images, labels, 100, seed=3)
    centres = {}
    for row in range(8):
        for column in range(6):
            mask = np.ones((8, 6), dtype=bool)
            top, left = row - side // 2, column - side // 2
            mask[max(top, 0) : top + side, max(left, 0) : left + side] = False
            centres[mask.tobytes()] = (row, column)
    assert len(centres) == 48
    counts = dict.fromkeys(centres.values(), 0)
    for (x, y), (whole, same) in zip(
        batches_of(images, labels, 100, seed=3, cutout=side), plain, strict=True
    ):
        assert torch.equal(y, same)  # neither order nor crops depend on it
        assert x.is_contiguous(memory_format=torch.channels_last)
        outside = (x != 0).all(dim=1)  # no pixel is the mean's colour by chance
        assert torch.equal(x, whole * outside[:, None])
        for mask in outside:
            counts[centres[mask.numpy().tobytes()]] += 1
    assert sum((n - 50) ** 2 / 50 for n in counts.values()) < 47 + 5 * 9.7


def test_cutout_leaves_evaluation_alone_and_some_of_every_image():
    images, labels = random_images(20, height=8, width=6)
    whole = [x for x, _ in batches_of(images, labels, train=False)]
    assert all(map(torch.equal, whole, [x for x, _ in batches_of(images, labels, train=False, cutout=4)]))
    with pytest.raises(ValueError, match=r"its side is at most 6 pixels here: got 7"):
        batches_of(images, labels, 10, cutout=7)
