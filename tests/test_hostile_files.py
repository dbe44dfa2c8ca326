"""Small files that ask for much memory, or speak to a terminal: refused by what they declare, before it is made."""

from __future__ import annotations

import contextlib
import io
import tempfile
import tracemalloc
import unicodedata
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from resode.cli import app
from resode.cli.terminal import report, table
from resode.networks import build, load_weights, read_weights
from resode.tables import csv_text, read_csv, read_records, records_text
from resode.training.data.archives import DataError
from resode.training.evaluate import load
from resode.training.files import DamagedFile, RunError, SettingsError, pack, read_header, read_yaml
from resode.training.folder import FORMAT, RunFolder
from resode.training.predict import MAX_IMAGES, predict
from resode.training.progress import Progress
from resode.training.run import train

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


def test_names_from_files_do_not_steer_a_terminal(tmp_path):
    """A class called so would clear the screen, set the window's title, or turn the line around."""
    steering = ["\x1b[2J\x1b]0;title\x07", "\x9b31m", "a\u202eb", "line\u2028two", "tab\rover"]
    path = weights_file(tmp_path / "w.safetensors", classes=[*steering, *"fghij"])
    np.save(tmp_path / "image\x1b[7m.npy", np.zeros((1, 8, 8), np.uint8))
    arguments = ["predict", str(path), *map(str, tmp_path.glob("*.npy")), "--top", "10"]
    piped = CliRunner().invoke(app, arguments)
    assert piped.exit_code == 0 and steering[0] in piped.output, "a pipe gets the names as they are"
    missing = CliRunner().invoke(app, ["predict", str(path), str(tmp_path / "no\x1b[2J.npy")])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        table(["class"], [[name] for name in steering])
    for output in (said.getvalue(), missing.output):
        assert not any(unicodedata.category(c) in ("Cc", "Cf", "Zl") and c != "\n" for c in output)
        assert "\\x1b[" in output
    progress = Progress(True, 1)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        progress.say(f"on {steering[0]}")
    assert said.getvalue() == "on \\x1b[2J\\x1b]0;title\\x07\n"


@given(st.text(), st.floats(allow_nan=False))
def test_text_is_no_formula_in_a_spreadsheet(text, number):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.csv"
        name = text.replace("\0", "").replace("\r", "")
        file.write_text(csv_text(["name", "value"], [[name, number]]), encoding="utf-8", newline="")
        (row,) = read_csv(file)[1]
        assert float(row["value"]) == number
        if name[:1] in ("=", "+", "-", "@", "\t"):
            assert row["name"][0] == "'" or is_number(name)
        assert row["name"].removeprefix("'") == name.removeprefix("'")


def is_number(text: str) -> bool:
    try:
        return bool(complex(text) or True)
    except ValueError:
        return False


def test_a_formulas_apostrophe_is_taken_off_again(tmp_path):
    @dataclass
    class Named:
        name: str

    rows = [Named(name) for name in ("=SUM(A1)", "+x", "-y", "@z", "'quoted", "plain", "-1.5")]
    (tmp_path / "t.csv").write_text(records_text(Named, rows), encoding="utf-8")
    assert (tmp_path / "t.csv").read_text().splitlines()[1] == "'=SUM(A1)"
    assert [row.name for row in read_records(Named, tmp_path / "t.csv")] == [row.name for row in rows]


def test_a_lack_of_memory_is_told_as_one(tmp_path, capsys):
    """What oneDNN and torch's allocator raise, from a network that fails so."""

    class Large(nn.Module):
        def forward(self, x):
            raise RuntimeError("could not create a primitive")

    with pytest.raises(RuntimeError, match="could not create"):
        train(
            nn.Sequential(Large(), nn.Linear(2, 2)),
            "digits",
            "smoke",
            run_dir=tmp_path / "run",
            progress=False,
        )
    assert report(RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. can't allocate memory")) == 1
    assert report(RuntimeError("could not create a primitive descriptor")) == 1
    assert capsys.readouterr().err.count("there is not enough memory for this. Take smaller batches") == 2


@pytest.mark.parametrize("at", range(8, 400, 28))
def test_a_damaged_file_of_weights_is_refused(tmp_path, at):
    """Bytes of a torch file's directory, which stands at its end, changed: zipfile's errors are no message."""
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(2)}, path)
    content = bytearray(path.read_bytes())
    content[-at : -at + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    try:
        found = read_weights(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert torch.equal(found["w"], torch.ones(2))


@pytest.mark.parametrize("content", ["80027d7101580c732d", "806a4ac3", "802e7265", "80027d7100580100000077"])
def test_a_damaged_pickle_of_weights_is_refused(tmp_path, content):
    """Found by fuzzing: torch's reader ends with struct.error, LookupError and others."""
    (tmp_path / "w.pt").write_bytes(bytes.fromhex(content))
    with pytest.raises(
        ValueError, match=r"w\.pt is damaged, or not what torch\.save makes|w\.pt holds other"
    ):
        read_weights(tmp_path / "w.pt")
