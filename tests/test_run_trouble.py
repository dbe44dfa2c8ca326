"""What a run keeps and says when something goes wrong, and which of its weights are the best."""

from __future__ import annotations

import re
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from run_tools import Stop
from safetensors.torch import load_file
from torch import nn

from resode.blocks import ResidualStack
from resode.networks import build
from resode.training.compare import compare
from resode.training.data.datasets import load_data
from resode.training.divergence import why_diverged
from resode.training.evaluate import evaluate, load, read_weights
from resode.training.files import DamagedFile, RunError, SettingsError, pack, unpack
from resode.training.folder import FolderTaken, RunFolder
from resode.training.run import train

pytestmark = pytest.mark.usefixtures("blank_curves")


def small_run(path: Path, **settings):
    return train(children.Small, "digits", "smoke", run_dir=path, progress=False, **settings)


# The best weights


def test_the_best_weights_are_chosen_by_validation_and_survive_a_resume(tmp_path):
    """Evaluated on their own they have the accuracy of the epoch that the summary names."""
    seen = {}

    class Keep:
        def after_update(self, loop):
            if loop.index == len(loop.batches):
                seen[loop.epoch + 1] = {n: v.clone() for n, v in loop.network.state_dict().items()}

        def after_run(self, loop):
            pass

    # So large a rate that the accuracy goes up and down; the lengths end before the schedule's fine end.
    settings = {"validation": 200, "epochs": 4, "schedule": "constant", "lr": 1.5, "weight_decay": 0.0}
    whole = small_run(tmp_path / "whole", callbacks=[Keep()], **settings)
    accuracies = whole.metrics["validation_accuracy"]
    best = int(np.argmax(accuracies)) + 1
    summary = whole.summary
    assert (summary["best_epoch"], summary["best_validation_accuracy"]) == (best, max(accuracies))
    assert summary["best_test_accuracy"] == whole.metrics["test_accuracy"][best - 1]
    file = whole.path / "checkpoints" / "best.safetensors"
    tensors, about = unpack(file)
    assert (about["best_epoch"], about["validation_accuracy"]) == (best, max(accuracies))
    assert all(torch.equal(value, seen[best][name]) for name, value in tensors.items())
    assert evaluate(file, model=children.Small).accuracy == summary["best_test_accuracy"]

    stop = Stop(19 * min(best, 3) + 5, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path / "run", callbacks=[stop], **settings)
    run = train(children.Small, resume=tmp_path / "run", progress=False)
    assert run.summary["best_epoch"] == best
    one, two = (load_file(p / "checkpoints" / "best.safetensors") for p in (whole.path, run.path))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_a_validation_split_there_is_no_best(tmp_path):
    """The test images choose nothing."""
    run = small_run(tmp_path / "run", epochs=1)
    assert not (run.path / "checkpoints" / "best.safetensors").exists()
    assert not any("best" in name for name in run.summary)


# Divergence


class Decay(nn.Module):
    """F(x) = −ax: one eigenvalue, −a."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.a * x


class Stiff(nn.Module):
    """Eight blocks of η = 1; with a = 12 forward Euler multiplies by 1 − 12 in each."""

    def __init__(self, rates: tuple[float, ...], solver: str = "euler") -> None:
        super().__init__()
        self.stack = ResidualStack([Decay(a) for a in rates], step_size=1.0, solver=solver)
        self.out = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.stack(x).flatten(1))


def test_a_divergence_by_too_large_a_step_names_block_and_limit(tmp_path):
    """a = 12 in block 2: λ = −12, |1 − 12| = 11, limit 2/12; the others are inside with a = 1.5."""
    torch.manual_seed(0)
    network = Stiff((1.5, 1.5, 12.0, 11.0, 11.0, 11.0, 11.0, 11.0))
    with pytest.raises(RunError) as error:
        train(network, "digits", "smoke", run_dir=tmp_path / "run", progress=False)
    message = str(error.value)
    assert "in epoch 1" in message and "The state that failed is in" in message
    assert "A step of 1 with euler amplifies a perturbation 11 times" in message
    assert "λ = -12 decays, and allows steps up to 0.1667. Take 6 substeps" in message
    assert "tenth" not in message
    file = tmp_path / "run" / "checkpoints" / "diverged.safetensors"
    tensors, about = unpack(file)
    assert "loss became" in about["what"] or "no longer finite" in about["what"]
    assert not all(t.isfinite().all() for t in tensors.values())
    assert {n for n in tensors if n.startswith("network.")} == {f"network.{n}" for n in network.state_dict()}


def test_a_divergence_by_the_learning_rate_blames_no_step(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(RunError) as error:
        train(
            Stiff((0.5,) * 8), "digits", "smoke", run_dir=tmp_path / "run", progress=False, lr=1e30, ema=0.9
        )
    message = str(error.value)
    assert "times its limit" in message and "substeps" not in message
    tensors, _ = unpack(tmp_path / "run" / "checkpoints" / "diverged.safetensors")
    assert any(name.startswith("average.") for name in tensors)


@pytest.mark.parametrize(
    ("solver", "a", "blamed"),
    [
        ("euler", 12.0, True),
        ("euler", 1.9, False),  # |1 − 1.9| < 1
        ("rk4", 2.7, False),  # within 2.785
        ("rk4", 6.0, True),  # |R(−6)| = 1 − 6 + 18 − 36 + 54 = 31
        ("euler", -2.0, False),  # the flow itself grows, and shorter steps do too
        ("dopri5", 12.0, False),  # chooses its steps by itself
    ],
)
def test_a_step_is_blamed_where_shorter_ones_help(solver, a, blamed):
    network = Stiff((a,) * 8, solver)
    found = why_diverged(network, network.state_dict(), torch.ones(3, 1, 8, 8), torch.arange(3), 1e-9)
    assert (found is not None and found.cause == "overstep") == blamed
    if found and solver == "rk4" and blamed:
        assert found.evidence["gain"] == pytest.approx(31, rel=1e-3)
        assert found.evidence["limit"] == pytest.approx(2.785293563405282 / 6, rel=1e-6)
    assert network.stack.substeps == 1


def test_networks_in_order_blame_nothing():
    """Fresh ones with batch norm, whose statistics no batch has met; training takes the batch's own."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    plain = build("resnet20", in_channels=1)
    assert why_diverged(plain, plain.state_dict(), x, y, 1e-9) is None
    bounded = build("odenet20", in_channels=1)  # batch norm inside F
    assert why_diverged(bounded, bounded.state_dict(), x, y, 1e-9) is None


def test_sixty_blocks_without_norm_are_told_of_their_depth(tmp_path):
    """Each block doubles the second moment: a hundredth of the rate dies too, and η = 1/√60 trains."""

    def network(eta: float) -> nn.Module:
        torch.manual_seed(0)
        blocks = []
        for _ in range(60):
            first, second = nn.Linear(32, 32), nn.Linear(32, 32)
            nn.init.kaiming_normal_(first.weight, nonlinearity="relu")
            nn.init.kaiming_normal_(second.weight, nonlinearity="linear")
            blocks.append(nn.Sequential(first, nn.ReLU(), second))
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), ResidualStack(blocks, step_size=eta), nn.Linear(32, 10)
        )

    for lr in (0.02, 0.0002):
        with pytest.raises(RunError) as error:
            train(network(1.0), "digits", "smoke", run_dir=tmp_path / f"{lr}", progress=False, lr=lr)
        message = str(error.value)
        assert "60 blocks amplify a perturbation" in message and "tenth" not in message
        assert "Multiply each branch by 1/√60 = 0.13 (step_size in a ResidualStack)" in message
        eta = float(re.search(r"With every branch times (\S+) the depth's gain is 10", message)[1])
        assert 0.05 < eta < 0.5
    train(network(60**-0.5), "digits", "smoke", run_dir=tmp_path / "again", progress=False, lr=0.02)


def test_networks_without_a_solver_are_diagnosed_when_they_diverge(tmp_path):
    """Sixty blocks x + W₂ relu(W₁x); the folder, which has no weights, says that its run diverged."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), *[Doubling() for _ in range(60)], nn.Linear(32, 10)
    )
    with pytest.raises(RunError, match="60 blocks amplify a perturbation") as error:
        train(network, "digits", "smoke", run_dir=tmp_path / "run", progress=False, lr=0.02)
    assert "tenth" not in str(error.value)
    with pytest.raises(RunError, match="it diverged in its first epoch"):
        read_weights(tmp_path / "run")


class Doubling(nn.Module):
    """Doubles the second moment of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu")
        nn.init.kaiming_normal_(self.second.weight, nonlinearity="linear")

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


# Files of other times, other data, and full disks


def test_weights_and_checkpoints_of_a_newer_format_are_refused(tmp_path):
    run = small_run(tmp_path / "run", epochs=1)
    for name in ("checkpoints/last", "weights"):
        file = run.path / f"{name}.safetensors"
        tensors, about = unpack(file)
        file.write_bytes(pack(tensors, about | {"format": 2}))
    with pytest.raises(RunError, match=r"last.safetensors has format 2, and this resode reads format 1"):
        train(children.Small, resume=run.path, progress=False)
    with pytest.raises(RunError, match=r"weights.safetensors has format 2"):
        load(run.path, model=children.Small)
    with pytest.raises(RunError, match=r"format 2"):
        read_weights(run.path / "checkpoints" / "last.safetensors")


def test_changed_images_are_found_by_their_checksum(tmp_path):
    """One pixel of one image, the numbers of images as before."""
    digits = load_data("digits")
    small_run(tmp_path / "run", epochs=1)
    images = digits.train_images.clone()
    images[700, 0, 3, 3] ^= 1
    changed = replace(digits, train_images=images)
    assert changed.checksum() != digits.checksum() == load_data("digits").checksum()
    config = RunFolder.open(tmp_path / "run").read_config()
    assert config["record"]["images_checksum"] == digits.checksum()
    own = train(children.Small, digits, "smoke", run_dir=tmp_path / "own", epochs=1, progress=False)
    with pytest.raises(
        RunError, match=r"not those that the run was started on: their checksum was crc32 \w{8}"
    ):
        train(children.Small, changed, resume=own.path, progress=False)


def test_a_disk_that_takes_half_a_checkpoint_keeps_the_one_before(tmp_path):
    """The system refuses, in the middle of the file, what is longer than half a checkpoint."""
    whole = small_run(tmp_path / "whole", epochs=3)
    last = whole.path / "checkpoints" / "last.safetensors"
    size = last.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill:
        def after_update(self, loop):
            if loop.update == 50:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))

        def after_run(self, loop):
            pass

    try:
        with pytest.raises(RunError, match=r"File too large"):
            small_run(tmp_path / "run", epochs=3, callbacks=[Fill()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoint, damaged = RunFolder.open(tmp_path / "run").read_checkpoint()
    assert damaged is None and checkpoint is not None and checkpoint.state["epoch"] == 2
    assert [p for p in (tmp_path / "run").rglob(".*") if p.is_file()] == []
    train(children.Small, resume=tmp_path / "run", progress=False)
    one, two = (load_file(p / "weights.safetensors") for p in (whole.path, tmp_path / "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_folder_that_another_process_uses_is_left_to_it(tmp_path):
    path = tmp_path / "run"
    arguments = ("train", "--model", "children:Small", "--recipe", "smoke", "--epochs", 400)
    process = children.start(children.command, *arguments, "--run-dir", path, said=tmp_path / "said.txt")
    begun = time.monotonic()
    while not (path / "checkpoints" / "last.safetensors").exists():
        assert process.is_alive() and time.monotonic() - begun < 300
        time.sleep(0.005)
    with pytest.raises(RunError, match=r"in use by another process"):
        train(children.Small, resume=path, progress=False)
    assert process.is_alive()
    process.kill()
    process.join()
    with RunFolder.open(path).locked():  # the lock went with its process
        pass


def test_what_a_killed_process_was_writing_is_cleared(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    for name in (
        ".config.yaml.a1b2c3d4",
        "checkpoints/.new.safetensors.x_y_z_12",
        "figures/.training-42.png",
    ):
        (folder.path / name).write_bytes(b"half")
    (folder.path / ".mine").write_text("kept")
    with pytest.raises(FolderTaken):
        RunFolder.create(folder.path)
    (folder.path / ".mine").unlink()
    again = RunFolder.create(folder.path)
    again.write("config.yaml", "format: 1\n")
    (folder.path / ".mine").write_text("kept")
    with again.locked():
        assert {p.name for p in again.path.rglob("*") if p.is_file()} == {".lock", ".mine", "config.yaml"}


@pytest.mark.parametrize(
    ("name", "text", "resumed", "message"),
    [
        ("metrics.csv", "epoch,test_accuracy\n1,0.5\n", None, "no column train_accuracy"),
        ("metrics.csv", "\udcff", None, "no sound table"),
        ("summary.json", "[1]", None, "it holds a list"),
        (
            "config.yaml",
            "format: 1\nmodel: odenet8\n",
            "model_options was {'width': 2} and is absent",
            "data was digits",
        ),
        ("config.yaml", "CONFIGlrr: 3\n", "lrr was absent and is 3", None),
    ],
)
def test_changed_files_are_named_and_those_written_again_heal(tmp_path, name, text, resumed, message):
    """A resumed run writes metrics and summary from its checkpoint; its settings it cannot do without."""
    options = {"model_options": {"width": 2}, "updates": 1, "progress": False}
    train("odenet8", "digits", "smoke", run_dir=tmp_path / "run", **options)
    file = tmp_path / "run" / name
    was = file.read_text()
    file.write_text(text.replace("CONFIG", was), errors="surrogateescape")
    if message is not None:
        with pytest.raises(DamagedFile if resumed is None else SettingsError, match=message):
            compare([tmp_path / "run"])
    if resumed is not None:
        with pytest.raises(RunError, match=resumed):
            train(resume=tmp_path / "run", progress=False)
    else:
        train(resume=tmp_path / "run", progress=False)
        assert compare([tmp_path / "run"]).rows[0].epoch == 1


def test_a_resumed_run_keeps_its_settings(tmp_path):
    """An edited rate or seed is refused, with the stored and the found value; comments and order are free."""
    options = {"model_options": {"width": 2}, "updates": 1, "progress": False}
    train("odenet8", "digits", "smoke", run_dir=tmp_path / "run", lr=0.1, **options)
    file = tmp_path / "run" / "config.yaml"
    was = file.read_text()
    for old, new, told in (
        ("lr: 0.1\n", "lr: 0.9\n", "lr was 0.1 and is 0.9"),
        ("seed: 0\n", "seed: 7\n", "seed was 0 and is 7"),
        ("width: 2", "width: 4", "model_options was {'width': 2} and is {'width': 4}"),
        ("train_images: 1437", "train_images: 1438", "its checksum differs"),
    ):
        assert old in was
        file.write_text(was.replace(old, new))
        with pytest.raises(SettingsError, match=re.escape(told)) as error:
            train(resume=tmp_path / "run", progress=False)
        assert error.value.exit_code == 2
        file.write_text(re.sub(r"\nchecksum: \w+", "", was.replace(old, new)))  # its checksum removed too
        if "checksum" not in told:
            with pytest.raises(SettingsError, match=re.escape(told)):
                train(resume=tmp_path / "run", progress=False)
    file.write_text("# mine\n" + was.replace("lr: 0.1\n", "lr: 0.10\n"))
    train(resume=tmp_path / "run", progress=False)
