"""Small files that ask for much memory, or speak to a terminal: refused by what they declare, before it is made."""

from __future__ import annotations

import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from resode.networks import build, load_weights
from resode.training.data.archives import DataError
from resode.training.evaluate import load
from resode.training.files import DamagedFile, RunError, SettingsError, pack, read_header, read_yaml
from resode.training.folder import FORMAT, RunFolder
from resode.training.predict import MAX_IMAGES, predict

ABOUT = {
    "format": FORMAT,
    "model": "odenet8",
    "own": False,
    "options": {"width": 2, "in_channels": 1},
    "shape": [1, 8, 8],
    "mean": [0.0],
    "std": [1.0],
    "classes": [str(n) for n in range(10)],
}


def weights_file(path: Path, **changed: object) -> Path:
    network = build("odenet8", width=2, in_channels=1)
    path.write_bytes(pack(network.state_dict(), {**ABOUT, **changed}))
    return path


@contextmanager
def little_memory(most: int = 50 << 20):
    """Python's own and numpy's memory; torch's is bounded by the guards' order, which the messages show."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_the_sound_file_is_read(tmp_path):
    assert load(weights_file(tmp_path / "w.safetensors")) is not None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"refined": 40}, r"refined 40 times, a stack has at least 2\^40 tensors"),
        ({"refined": 10**9}, r"refined 1000000000 times"),
        ({"refined": -1}, r"refined -1 are none"),
        ({"refined": "2"}, r"are none"),
        ({"options": {"width": 1_000_000, "in_channels": 1}}, r"width 1000000 is more"),
        ({"options": {"width": 512, "in_channels": 1}}, r"its header asks for [\d,]+"),
        (
            {"options": {"in_channels": 2**40, "num_classes": 2**40}},
            r"in_channels \d+, num_classes \d+ are more",
        ),
        ({"options": []}, r"options \[\] and refined 0 are none"),
        ({"model": "odenet600000000000002"}, r"a odenet600000000000002 has more"),
    ],
)
def test_a_header_asks_for_no_more_than_its_tensors(tmp_path, changed, message):
    with little_memory(), pytest.raises(RunError, match=message):
        load(weights_file(tmp_path / "w.safetensors", **changed))


@pytest.mark.parametrize("shape", [[1, 10**6, 10**6], [1, 8], [1, 8, -8], "8", [1, 8.0, 8]])
def test_a_header_asks_for_images_of_a_bounded_size(tmp_path, shape):
    path = weights_file(tmp_path / "w.safetensors", shape=shape)
    with pytest.raises(RunError, match=r"three whole numbers \(C, H, W\) with at most 16,777,216"):
        predict(path, np.zeros((1, 8, 8), np.uint8), resize=True)


def test_a_deflated_file_of_weights_is_not_unpacked(tmp_path):
    """Zeros deflate a thousandfold; what torch.save itself writes is read."""
    network = build("odenet8", width=2)
    torch.save(network.state_dict(), tmp_path / "sound.pt")
    load_weights(network, tmp_path / "sound.pt")
    torch.save({"weight": torch.zeros(2_000_000)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
            for name in whole.namelist():
                small.writestr(name, whole.read(name))
    assert (tmp_path / "small.pt").stat().st_size < 20_000
    with (
        little_memory(1 << 20),
        pytest.raises(ValueError, match=r"would take 8,\d+,\d+ bytes, more than 4 times"),
    ):
        load_weights(network, tmp_path / "small.pt")


def test_an_archive_declares_no_more_images_than_are_read(tmp_path):
    path = weights_file(tmp_path / "w.safetensors")
    for number in (MAX_IMAGES + 1, 5):
        np.savez_compressed(tmp_path / "images.npz", np.zeros((number, 1, 8, 8), np.uint8))
        np.save(tmp_path / "images.npy", np.zeros((number, 1, 8, 8), np.uint8))
        for file in ("images.npz", "images.npy"):
            if number == 5:
                assert len(predict(path, [tmp_path / file]).rows) == 5
                continue
            with (
                little_memory(1 << 20),
                pytest.raises(DataError, match=r"declares 100,001 images and 6,4.* 100,000"),
            ):
                predict(path, [tmp_path / file])


def test_settings_and_figures_are_not_nested_without_end(tmp_path):
    deep = 100_000
    (tmp_path / "deep.yaml").write_text("[" * deep + "]" * deep)
    (tmp_path / "alias.yaml").write_text("a: &a [1]\nb: [*a, *a]\n")
    for name, what in (("deep", "more"), ("alias", r"an alias")):
        with pytest.raises(SettingsError, match=rf"{what}.*, and settings are nested at most 32 deep"):
            read_yaml(tmp_path / f"{name}.yaml")
    nested = "[" * deep + "]" * deep
    (tmp_path / "summary.json").write_text(nested)
    with pytest.raises(DamagedFile, match=r"recursion"):
        RunFolder(tmp_path).read_summary()
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", metadata={"resode": nested, "sha256": ""})
    with pytest.raises(DamagedFile, match=r"recursion"):
        read_header(tmp_path / "w.safetensors")
