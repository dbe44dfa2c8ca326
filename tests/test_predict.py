"""Images of one's own: every way to store them gives the same probabilities, and what cannot be read is named."""

from __future__ import annotations

import csv
from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from resode.cli import app
from resode.training.data.archives import DataError
from resode.training.data.datasets import load_data
from resode.training.files import RunError
from resode.training.folder import FORMAT, RunFolder
from resode.training.predict import predict

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
SURE = exp(4) / (exp(4) + 2)
"""Of a network with logits 4, 0, 0."""


class Colours(nn.Module):
    """The logits are four times the channels' means, the left half's twice: it sees colours and sides."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x.mean((2, 3))


def write_run(path: Path, shape: tuple[int, ...] = (3, 4, 6), sized: bool = True, **about) -> Path:
    folder = RunFolder.create(path)
    folder.write_config({"format": FORMAT})
    header = {
        "model": "tests:Colours",
        "own": True,
        "options": {},
        "data": "mine",
        "shape": shape if sized else None,
        "classes": ["red", "green", "blue"][: shape[0]],
        "mean": [0.0] * shape[0],
        "std": [1.0] * shape[0],
    }
    folder.write_weights(Colours().state_dict(), {k: v for k, v in (header | about).items() if v is not None})
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run")


def picture(colour, height: int = 4, width: int = 6) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def best(run, images, **options):
    found = predict(run, images, model=Colours, top=1, **options)
    return [(row.image, row.classes[0], pytest.approx(row.probabilities[0])) for row in found.rows]


def test_files_and_arrays_of_every_layout_agree(run, tmp_path):
    stack = np.stack([picture(GREEN), picture(BLUE)])
    Image.fromarray(stack[0]).save(tmp_path / "green.png")
    Image.fromarray(stack[1]).convert("P").save(tmp_path / "blue.png")
    np.save(tmp_path / "last.npy", stack)
    np.savez(tmp_path / "first.npz", images=stack.transpose(0, 3, 1, 2), labels=np.zeros(2))
    np.save(tmp_path / "one.npy", stack[0].transpose(2, 0, 1))
    files = [tmp_path / name for name in ("green.png", "blue.png", "last.npy", "first.npz", "one.npy")]
    assert best(run, files) == [
        (str(files[0]), "green", SURE),
        (str(files[1]), "blue", SURE),
        (f"{files[2]}[0]", "green", SURE),
        (f"{files[2]}[1]", "blue", SURE),
        (f"{files[3]}[0]", "green", SURE),
        (f"{files[3]}[1]", "blue", SURE),
        (f"{files[4]}[0]", "green", SURE),
    ]
    assert best(run, torch.from_numpy(stack[:1])) == [("[0]", "green", SURE)]


def test_probabilities_are_the_softmax_best_first(run):
    (row,) = predict(run, picture((0, 51, 102)), model=Colours).rows  # logits 0, 0.8, 1.6
    whole = 1 + exp(0.8) + exp(1.6)
    assert row.classes == ("blue", "green", "red")
    assert row.probabilities == pytest.approx((exp(1.6) / whole, exp(0.8) / whole, 1 / whole))


def test_images_are_normalised_as_the_run_was(tmp_path):
    run = write_run(tmp_path / "run", mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
    (row,) = predict(run, picture(RED), model=Colours).rows  # ±0.5/0.25: logits 8, −8, −8
    assert row.probabilities[0] == pytest.approx(1 / (1 + 2 * exp(-16)), rel=1e-9)


def test_a_trained_run_predicts_what_it_was_scored_for(tmp_path):
    from resode.training.evaluate import load, plain_batches
    from resode.training.run import train

    train("odenet20", "digits", "smoke", updates=2, run_dir=tmp_path / "run", progress=False)
    digits = load_data("digits")
    found = predict(tmp_path / "run", digits.test_images[::18], top=10)  # 20 of 360
    with torch.no_grad():
        logits = load(tmp_path / "run")(next(iter(plain_batches(digits, limit=20)))[0])
    assert [row.classes[0] for row in found.rows] == [str(i) for i in logits.argmax(1).tolist()]
    assert all(sum(row.probabilities) == pytest.approx(1, abs=1e-12) for row in found.rows)
    assert found.notes == ()


def test_what_is_done_to_images_is_said(tmp_path):
    """Green weighs 0.587 in grey: 150/255 × 4 against the one class there is."""
    run = write_run(tmp_path / "run")
    grey = np.full((4, 6), 200, np.uint8)
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[..., 2] = 255
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 6), 0xFF00, np.uint16)).save(deep)
    clear = tmp_path / "clear.png"
    Image.fromarray(np.dstack([picture(RED), np.full((4, 6), 9, np.uint8)]), "RGBA").save(clear)
    np.save(tmp_path / "grey.npy", grey)
    np.save(tmp_path / "wide.npy", wide)
    files = [deep, clear, tmp_path / "grey.npy", tmp_path / "wide.npy"]
    found = predict(run, files, model=Colours, resize=True)
    assert [row.classes[0] for row in found.rows[1::2]] == ["red", "blue"]
    assert found.rows[0].probabilities == pytest.approx([1 / 3] * 3)
    assert found.rows[3].probabilities[0] == pytest.approx(SURE), (
        "a plain image stays plain when it is resized"
    )
    assert found.notes == (
        "1 image was brought from 16 to 8 bits.",
        "2 images were grey, and went in as three equal colours.",
        "1 image was laid on white where it is transparent.",
        "1 image was resized to 6×4, with other proportions.",
    )
    single = write_run(tmp_path / "grey", (1, 4, 6), classes=["bright", "other"])

    class Two(Colours):
        def forward(self, x):
            return torch.cat([super().forward(x), torch.zeros(len(x), 1)], dim=1)

    stack = np.stack([picture(GREEN), picture(RED)])
    found = predict(single, stack, model=Two, top=2)
    assert found.notes == ("2 images were turned from colour to grey.",)
    levels = [4 * grey / 255 for grey in (150, 76)]  # 0.587 · 255 = 149.7, 0.299 · 255 = 76.2
    assert [row.probabilities[0] for row in found.rows] == pytest.approx(
        [exp(z) / (exp(z) + 1) for z in levels], rel=1e-6
    )
    assert len(predict(single, np.zeros((3, 4, 6), np.uint8), model=Two, top=1).rows) == 3, "three grey ones"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.png", None, "none.png does not exist"),
        ("text.png", b"no picture", "could not be read as a PNG or JPEG picture"),
        ("cut.npy", b"\x93NUMPY", "could not be read as an array"),
        ("pickled.npy", np.array([{}], dtype=object), "could not be read as an array"),
        ("float.npy", np.zeros((4, 6, 3)), "must be uint8, values 0 to 255: .* is float64"),
        ("five.npy", np.zeros((1, 1, 4, 6, 3), np.uint8), r"has \(1, 1, 4, 6, 3\)"),
        ("empty.npy", np.zeros((0, 4, 6, 3), np.uint8), "holds no images"),
        ("two.npz", {"a": np.zeros(1), "b": np.zeros(1)}, "or one called images: it holds a, b"),
        ("small.npy", np.zeros((3, 3, 3), np.uint8), r"of 6×4 pixels: .*small.npy\[0\] has 3×3"),
        ("four.npy", np.zeros((1, 4, 6, 4), np.uint8), "has shape|channels"),
    ],
)
def test_what_cannot_be_read_is_named(run, tmp_path, name, content, words):
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(file, **content)
    elif content is not None:
        np.save(file, content, allow_pickle=True)
    with pytest.raises(DataError, match=words):
        predict(run, [file], model=Colours)


def test_what_a_run_cannot_do_is_said(run, tmp_path):
    image = picture(RED)
    for top in (0, 4):
        with pytest.raises(ValueError, match=r"top must be 1 to 3"):
            predict(run, image, model=Colours, top=top)
    with pytest.raises(ValueError, match=r"there are no images"):
        predict(run, [], model=Colours)
    with pytest.raises(ValueError, match=r"got one path"):
        predict(run, "image.png", model=Colours)
    with pytest.raises(DataError, match=r"is a folder. Name the files in it"):
        predict(run, [tmp_path], model=Colours)
    with pytest.raises(RunError, match=r"does not say what images it was trained on \(shape\)"):
        predict(write_run(tmp_path / "old", sized=False), image, model=Colours)
    with pytest.raises(RunError, match=r"does not say what images it was trained on \(std\)"):
        predict(write_run(tmp_path / "other", std=None), image, model=Colours)


def test_the_command_writes_csv_into_a_pipe(tmp_path):
    from resode.training.run import train

    train("odenet20", "digits", "smoke", updates=1, run_dir=tmp_path / "run", progress=False)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "image.png")
    arguments = ["predict", str(tmp_path / "run"), str(tmp_path / "image.png")]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1 and "--resize" in refused.output and "8×8" in refused.output
    result = CliRunner().invoke(app, [*arguments, "--resize", "--top", "2"])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(result.stdout.splitlines()))
    assert [row["rank"] for row in rows] == ["1", "2"] and rows[0]["image"].endswith("image.png")
    assert result.stderr == "1 image was resized to 8×8.\n"
    wrong = CliRunner().invoke(app, ["predict", str(tmp_path / "run")])
    assert wrong.exit_code == 2 and "IMAGES" in wrong.output
