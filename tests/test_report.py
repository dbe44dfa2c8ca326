"""The commands profile and report: what they print, write and refuse; the page on a phone's screen."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from resode.analysis.depth.profile import DepthProfile, DepthRow
from resode.analysis.steps.block_limits import BlockLimit, GroupLimits
from resode.cli import app
from resode.networks import build
from resode.training.folder import RunFolder
from resode.training.report import _profile_tables


def resode(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a narrow odenet20 on digits, as a run leaves it, with markup in its name."""
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "<b>&demo")
    options = {"in_channels": 1, "width": 4}
    torch.manual_seed(0)
    network = build("odenet20", **options)
    folder.write_config(
        {"format": 1, "model": "odenet20", "model_options": options, "data": "digits", "data_dir": None}
        | {"recipe": "<img src=x onerror=alert(1)>"}
    )
    splits = {f"{s}_{n}": 0.5 for s in ("train", "test") for n in ("loss", "accuracy")}
    others = {"images_per_second": 100.0, "nfe": 7.0, "seconds": 1.0}
    folder.write_metrics([{"epoch": i, "lr": 0.1, **splits, **others} for i in (1, 2)])
    folder.write_summary({"test_accuracy": 0.5, "parameters": 17_000, "nfe": 7.0})
    about = {"model": "odenet20", "own": False, "options": options, "data": "digits"}
    folder.write_weights(network.state_dict(), about)
    return folder.path


def test_profile_of_a_run(run):
    result = resode("profile", run, "--samples", 6, "--spectra", 1)
    assert result.exit_code == 0, result.output
    for name in ("layer1.0[0]", "layer2.0", "layer3.1[1]"):
        assert name in result.output
    assert (run / "figures" / "profile.png").stat().st_size > 20_000
    lines = (run / "figures" / "profile.csv").read_text().splitlines()
    assert len(lines) == 10 and lines[0].startswith("name,kind,shape,step_size")


def test_diagnosis_of_a_run_and_of_anyones_network(run, tmp_path, monkeypatch):
    """Piped, the page has 80 columns; the verdict is its first line."""
    result = resode("diagnose", run, "--solvers", "rk4,midpoint", "--lr", "0.1")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("VERDICT") and all(len(line) <= 80 for line in lines if "figures" not in line)
    assert "midpoint" in result.output and "its limit" in result.output
    assert (run / "figures" / "diagnosis.png").stat().st_size > 10_000
    assert len((run / "figures" / "diagnosis.csv").read_text().splitlines()) == 10
    (tmp_path / "own.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    result = resode("diagnose", "--model", "own:net", "--shape", "5", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("VERDICT  nothing unusual (no residual addition, 2 layers, 32 samples).")


def test_profile_of_anyones_network(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Block(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.f = nn.Linear(5, 5)\n"
        "    def forward(self, x):\n"
        "        return x + self.f(x).tanh()\n"
        "def net():\n"
        "    return nn.Sequential(*(Block() for _ in range(3)))\n"
    )
    monkeypatch.chdir(tmp_path)
    result = resode("profile", "--model", "mine:net", "--shape", "5", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "out" / "profile.csv").read_text().splitlines()) == 4
    import mine

    save_file(mine.net().state_dict(), tmp_path / "w.safetensors")
    arguments = ("profile", "--model", "mine:net", "--weights", tmp_path / "w.safetensors", "--shape", "5")
    assert resode(*arguments).exit_code == 0
    assert (tmp_path / "figures" / "profile.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["profile"], ["--model NAME", "give a run"]),
        (["profile", "nowhere"], ["no run nowhere"]),
        (["profile", "--model", "resnet20"], ["--shape 3,32,32"]),
        (["profile", "--model", "plain20", "--shape", "3,8,8"], ["no residual block was found", "blocks="]),
        (["profile", "--model", "resnet20", "--shape", "3,x"], ["--shape", "whole numbers"]),
        (
            ["profile", "--model", "resnet20", "--shape", "3,8,8", "--solver", "rk5"],
            ["rk5", "Did you mean rk4"],
        ),
        (["profile", "--model", "resnet21", "--shape", "3,8,8"], ["resnet20 and resnet26"]),
        (["profile", "--model", "resnet20", "--shape", "3,8,8", "--blocks", "x*"], ["names no module"]),
        (["diagnose"], ["--model NAME", "give a run"]),
        (["diagnose", "--model", "resnet20", "--shape", "3,8,8", "--solvers", "rk5"], ["Did you mean rk4"]),
        (["report", "nowhere"], ["no run nowhere"]),
        (["report"], ["RUN"]),
    ],
)
def test_wrong_usage(arguments, words):
    result = resode(*arguments)
    assert result.exit_code == 2, result.output
    assert all(word in " ".join(result.output.split()) for word in words), result.output


class Page(HTMLParser):
    """Tags, and every attribute that could fetch something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(run) -> Path:
    result = resode("report", run, "--samples", 4)
    assert result.exit_code == 0, result.output
    return run / "report.html"


def test_report_is_one_file_with_everything(page):
    text = page.read_text()
    parsed = Page(text)
    assert parsed.tags.count("img") == 5 and all(
        r.startswith("data:image/png;base64,") for r in parsed.references
    )
    assert "script" not in parsed.tags and "link" not in parsed.tags and "b" in parsed.tags
    assert not re.search(r"url\(|https?:|@import", text)
    for heading in (
        "Training",
        "The same weights under other solvers",
        "Stability",
        "Depth profile",
        "Settings",
    ):
        assert heading in parsed.text
    for word in (
        "layer1.0[0]",
        "dopri5",
        "decaying limit",
        "Largest step that keeps",
        "<b>&demo",
        "<img src=x onerror=alert(1)>",
    ):
        assert word in parsed.text, word
    assert "<b>&demo" not in text and "onerror=alert(1)>" not in text, "names are escaped"


@pytest.mark.parametrize(
    ("name", "content"),
    [("metrics.csv", "epoch,lr\n1,oops\n"), ("metrics.csv", "epoch\n1,2\n"), ("summary.json", '{"a": 1')],
)
def test_report_of_a_damaged_run_names_the_file(run, tmp_path, name, content):
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (damaged / name).write_text(content)
    result = resode("report", damaged)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert f"{name} is no sound" in " ".join(result.output.split())


def test_report_begins_with_the_diagnosis(page):
    """What is wrong, if anything, before any curve: five headings, the verdict first."""
    text = Page(page.read_text()).text
    places = [text.index(word) for word in ("VERDICT", "WHOLE", "BLOCKS", "SWAP", "TRAIN", "Training")]
    assert places == sorted(places)
    assert "Stability" in text[places[-1] :]


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no headless Chromium here")
def test_report_in_a_browser_on_a_phones_screen(page, tmp_path):
    """412 pixels wide, in a frame: nothing hangs over the edge but what scrolls, and the pictures are drawn."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe src="file://{quote(str(page))}" width="412" height="900"></iframe><script>'
        "onload=()=>{const d=document.querySelector('iframe').contentDocument;const e=d.documentElement;"
        "const pictures=[...d.images].every(i=>i.complete&&i.naturalWidth>100);"
        "const boxes=[...d.querySelectorAll('.wide,p,li,h1,h2,.facts')]"
        ".every(i=>i.getBoundingClientRect().right<=e.clientWidth+1);"
        "document.body.setAttribute('data-probe',"
        "[e.clientWidth,e.scrollWidth,pictures,boxes,d.images.length].join(' '))}</script>"
    )
    common = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    dom = subprocess.run(
        [*common, "--allow-file-access-from-files", "--dump-dom", f"file://{frame}"],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    width, scroll, pictures, boxes, count = re.search(r'data-probe="([^"]*)"', dom)[1].split()
    assert int(scroll) <= int(width) <= 412 and (pictures, boxes, count) == ("true", "true", "5")
    shot = tmp_path / "shot.png"
    subprocess.run(
        [*common, "--window-size=500,2400", "--hide-scrollbars", f"--screenshot={shot}", f"file://{quote(str(page))}"],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape[0] >= 2000 and pixels.std() > 10


def test_bounds_are_printed_as_bounds():
    """Of eigenvalues that have not converged, in the page as at a prompt: never as figures."""
    numbers = [1.0, "", *[0.5] * 12]
    row = DepthRow(
        "b", "identity", (4,), *numbers, step_limit=0.3, decaying_step=0.7, converged=False, exact=False
    )
    profile = DepthProfile([row], [], 1.0, 2, True)
    assert profile.table()[1][0][9:11] == ["≤ 0.3", "≤ 0.7"]
    assert "<td>≤ 0.3</td><td>≤ 0.7</td>" in _profile_tables(profile)
    limit = BlockLimit(
        0, "rk4", 0.3, 2, 0.7, -1 + 2j, True, 0.9, converged=False, exact=False, complete=False
    )
    _, [cells] = GroupLimits("layer1", (4,), "euler", [1.0], [limit], []).table()
    assert cells == ["0", "rk4", "0.3 ?", "≥ 2", "≤ 0.7", "-1 ± 2i", "0.9", "?"]
