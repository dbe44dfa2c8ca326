"""Several processes train what one process would: the same batches in parts, one log, nothing lost."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import children
import pytest
import torch
from run_tools import FILES
from safetensors.torch import load_file

from resode.training.data import Batches, load_data
from resode.training.files import RunError
from resode.training.folder import RunFolder
from resode.training.processes import Processes, synchronise_norms
from resode.training.run import train

SMALL = ("train", "--model", "children:Small", "--recipe", "smoke")


def run_on(size: int, path: Path, *settings: object) -> list[str]:
    """Train into a folder; what each process said."""
    arguments = (*SMALL, "--run-dir", path, *settings)
    return said_by(start_on(size, path, *arguments), path)


def start_on(size: int, path: Path, *arguments: object) -> list:
    said = Path(f"{path}-said")
    said.mkdir(exist_ok=True)
    if size == 1:
        return [children.start(children.command, *arguments, said=said / "0")]
    return children.start_together(size, children.command, *arguments, said=said)


def said_by(processes: list, path: Path, codes: tuple[int, ...] | None = None) -> list[str]:
    found = children.ended(processes)
    said = [(Path(f"{path}-said") / str(rank)).read_text() for rank in range(len(processes))]
    assert tuple(found) == (codes or (0,) * len(processes)), "\n".join(said)
    return said


def wait_for(path: Path, processes: list) -> None:
    begun = time.monotonic()
    while not path.exists():
        assert all(p.is_alive() for p in processes) and time.monotonic() - begun < 300
        time.sleep(0.005)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """‖a − b‖/‖a‖ of all entries as one vector."""
    assert a.keys() == b.keys()
    one, two = (torch.cat([d[name].double().flatten() for name in a]) for d in (a, b))
    return float((one - two).norm() / one.norm())


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "weights.safetensors")


class Recorder:
    """Gradients and weights after every update."""

    def __init__(self, path: str) -> None:
        self.path, self.found = path, []

    def after_update(self, loop) -> None:
        named = dict(loop.network.named_parameters())
        gradients = {name: value.grad.clone() for name, value in named.items()}
        self.found.append((gradients, {name: value.detach().clone() for name, value in named.items()}))

    def after_run(self, loop) -> None:
        torch.save(self.found, self.path)


def train_recorded(path: str, model: str, updates: int, ema: float) -> None:
    """Twice in one process: the second run connects the processes again."""
    train(
        children.Small if model == "small" else model,
        "digits",
        "smoke",
        run_dir=path,
        model_options={"norm": "group"},
        callbacks=[Recorder(path + ".pt")],
        updates=updates,
        crop_padding=0,
        ema=ema,
    )
    network = train(children.Small(), "digits", "smoke", run_dir=path + "-again", updates=2).network
    rank = os.environ.get("RANK", "0")
    torch.save(network.state_dict(), f"{path}-again-{rank}.pt")


# One process or several: the same


@pytest.mark.parametrize(("model", "updates", "ema"), [("small", 8, 0.5), ("odenet20", 3, 0.0)])
def test_two_processes_do_what_one_does(tmp_path, model, updates, ema):
    """Float32 sums of a batch in two halves differ by some ε = 6e-8: gradients, loss and weights to 2e-6.

    The small network is smooth. In odenet20 a ReLU may switch by such a difference, so it is compared early.
    """
    found = {}
    for size in (1, 2):
        path = str(tmp_path / str(size))
        said = Path(path + "-said")
        if size == 1:
            processes = [children.start(train_recorded, path, model, updates, ema)]
        else:
            processes = children.start_together(size, train_recorded, path, model, updates, ema, said=said)
        assert children.ended(processes) == [0] * size
        found[size] = torch.load(path + ".pt")
    assert len(found[1]) == len(found[2]) == updates
    for (gradients, state), (gradients2, state2) in zip(found[1], found[2], strict=True):
        assert 0 <= distance(gradients, gradients2) < 2e-6
        assert distance(state, state2) < 1e-6
    assert distance(weights(tmp_path / "1"), weights(tmp_path / "2")) < 1e-6
    rows = [RunFolder(tmp_path / str(size)).read_metrics() for size in (1, 2)]
    for name in ("train_loss", "test_loss"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-6)
    for name in ("epoch", "update", "lr", "train_accuracy", "test_accuracy", "nfe"):
        assert rows[1][name] == rows[0][name], name
    again = [torch.load(tmp_path / f"2-again-{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(again[0][name], again[1][name]) for name in again[0])


def meet(times: int) -> None:
    processes = Processes.found()
    for k in range(times):
        with processes.joined(torch.device("cpu")):
            assert processes.gathered((k, processes.rank)) == [(k, 0), (k, 1)]


@pytest.mark.parametrize("whose", ["the first process's store", "torchrun's store"])
def test_processes_meet_again_and_again(tmp_path, whose):
    """One may be at the next run while the other still leaves the last one; torchrun's store outlives both."""
    if whose == "torchrun's store":
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    else:
        place = {}
    processes = children.start_together(2, meet, 25, said=tmp_path / "said", **place)
    assert children.ended(processes, 120) == [0, 0], (tmp_path / "said" / "1").read_text()


def train_and_leave(path: str) -> None:
    """Say what is still connected when the group ends."""
    end = torch.distributed.destroy_process_group

    def told(*arguments: object) -> None:
        reducers = [o for o in gc.get_objects() if isinstance(o, torch.nn.parallel.DistributedDataParallel)]
        print("connected:", sum("reducer" in vars(o) for o in reducers), "of", len(reducers))
        end(*arguments)

    torch.distributed.destroy_process_group = told
    kept = []  # a callback may keep the loop, and with it the module that connects the processes
    callback = SimpleNamespace(after_update=lambda loop: None, after_run=kept.append)
    train(children.Small(), "digits", "smoke", run_dir=path, updates=2, callbacks=[callback])


def test_reducers_end_before_their_group(tmp_path):
    """The other way around some 4 of 100 processes never ended, on a busy machine (torch 2.13.0)."""
    path = str(tmp_path / "run")
    processes = children.start_together(2, train_and_leave, path, said=Path(path + "-said"))
    first, second = said_by(processes, Path(path))
    assert "connected: 0 of 1" in first and "connected: 0 of" in second


def test_there_is_one_log_and_one_folder(tmp_path):
    """With batch norm: every process ends with the first one's statistics."""
    first, second = run_on(2, tmp_path / "run", "--option", "norm=batch", "--updates", 25)
    assert second == ""
    assert "2 processes, each on cpu with 1 thread" in first and "batch of 64" not in first
    assert first.count("1/2") == first.count("2/2") == 1
    files = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert files == FILES
    assert RunFolder.open(tmp_path / "run").read_config()["record"]["processes"] == 2
    assert [p.name for p in tmp_path.iterdir()].count("run") == 1


def test_torchrun_starts_the_command(tmp_path):
    """The real thing, imports and all; the figure is drawn by the first process alone."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "resode",
        "train",
    ]
    settings = ["--recipe", "smoke", "--updates", "2", "--option", "norm=group", "--run-dir", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        command + settings, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("test accuracy") == result.stdout.count("2 processes, each on cpu") == 1
    assert "error" not in result.stderr.lower()
    assert (tmp_path / "run" / "figures" / "training.png").stat().st_size > 1000


def test_shares_make_up_the_batch():
    """Rank r of W gives images rB/W … of the batch that one process gives, to the bit."""
    data = load_data("digits")
    options = {"mean": data.mean, "std": data.std, "train": True, "crop_padding": 1, "seed": 3}
    whole = Batches(data.train_images, data.train_labels, 96, **options)
    parts = [
        Batches(data.train_images, data.train_labels, 96, share=(rank, 3), **options) for rank in range(3)
    ]
    for batches in (whole, *parts):
        batches.set_epoch(2)
    assert [len(p) for p in parts] == [len(whole)] * 3 == [14] * 3
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(images, torch.cat([x for x, _ in shares]))
        assert torch.equal(labels, torch.cat([y for _, y in shares]))
    for settings, message in (
        ({"share": (3, 3)}, r"0 ≤ r < W"),
        ({"share": (0, 5)}, r"5 equal parts, .* batch_size is 96. Take a multiple of 5, such as 100"),
        ({"share": (0, 3), "drop_last": False}, r"the last batch may be smaller"),
    ):
        with pytest.raises(ValueError, match=message):
            Batches(data.train_images, data.train_labels, 96, **(options | settings))


# Stopping and going on


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Two processes, each with its own dropout."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    run_on(2, path, *LONG)
    return path


LONG = ("--option", "dropout=0.2", "--epochs", 12)


@pytest.mark.parametrize("who", ["the second process", "both, twice"])
def test_a_signal_to_any_process_saves_once_and_ends_all(tmp_path, undisturbed, who):
    path = tmp_path / "run"
    processes = start_on(2, path, *SMALL, "--run-dir", path, *LONG)
    wait_for(path / "metrics.csv", processes)
    for process in processes if who == "both, twice" else processes[1:]:
        os.kill(process.pid, signal.SIGTERM)
        if who == "both, twice":
            time.sleep(0.001)
            os.kill(process.pid, signal.SIGTERM)
    first, second = said_by(processes, path, (143, 143))
    assert first.count("all is saved. Go on with: resode train --resume") == 1 and second == ""
    assert not (path / "summary.json").exists()
    first, second = said_by(start_on(2, path, "train", "--model", "children:Small", "--resume", path), path)
    assert "resuming after update" in first and second == ""
    one, two = weights(path), weights(undisturbed)
    assert all(torch.equal(one[name], two[name]) for name in one), "dropout went on where it was, in each"


def test_a_worker_that_dies_is_told_and_nothing_is_lost(tmp_path, undisturbed):
    path = tmp_path / "run"
    processes = start_on(2, path, *SMALL, "--run-dir", path, *LONG)
    wait_for(path / "checkpoints" / "previous.safetensors", processes)
    processes[1].kill()
    first, _ = said_by(processes, path, (1, -9))
    assert "error: another process of this run ended" in first and "--resume" in first
    assert "Traceback" not in first
    checkpoint, damaged = RunFolder.open(path).read_checkpoint()
    assert checkpoint is not None and damaged is None and checkpoint.state["epoch"] >= 2
    said_by(start_on(2, path, "train", "--model", "children:Small", "--resume", path), path)
    one, two = weights(path), weights(undisturbed)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_of_two_processes_goes_on_with_one(tmp_path):
    """The batches are the same, so without dropout and batch norm the weights are too, to rounding."""
    settings = ("--epochs", 12, "--crop-padding", 1)
    run_on(1, tmp_path / "whole", *settings)
    path = tmp_path / "run"
    processes = start_on(2, path, *SMALL, "--run-dir", path, *settings)
    wait_for(path / "metrics.csv", processes)
    os.kill(processes[0].pid, signal.SIGTERM)
    said_by(processes, path, (143, 143))
    (said,) = said_by(start_on(1, path, "train", "--model", "children:Small", "--resume", path), path)
    assert "started on 2 processes, going on with 1" in said
    assert distance(weights(tmp_path / "whole"), weights(path)) < 1e-5


# What is refused, and what fails


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (("--batch-size", 63), 2, "2 equal parts, one for each process: batch_size is 63"),
        (("--sync-batch-norm",), 2, "this run has 2 processes on cpu. Leave it out"),
        (("--option", "spare=true"), 1, "got no gradient: spare.weight, spare.bias. Freeze them"),
        (("--option", "fails=1"), 2, "error: process 1 of 2: no network in process 1"),
        (("--epochs", 0), 2, "epochs must be at least 1"),
        (("--device", "cuda:0"), 2, "devices, got 'cuda:0'"),
        (("--lr", 1e30), 1, "times its limit"),
    ],
)
def test_an_error_is_told_once(tmp_path, settings, code, message):
    """The first process tells it; torchrun, here this test, then ends the one that waits for that."""
    path = tmp_path / "run"
    processes = start_on(2, path, *SMALL, "--run-dir", path, "--updates", 4, *settings)
    assert children.ended(processes[:1]) == [code]
    processes[1].terminate()
    said = said_by(processes, path, (code, -signal.SIGTERM))
    assert said[0].count("error: ") == 1 and message in said[0]
    assert "Traceback" not in said[0] and said[1] == ""
    if code == 2:
        assert not path.exists()


def test_an_error_that_one_process_has_alone_is_told_by_it(tmp_path):
    """No process starts without its network, so the others wait for torchrun."""
    said = tmp_path / "said"
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    arguments = ("train", "--model", "nowhere:net")
    process = children.start(
        children.impatient_command, *arguments, said=said, RANK="1", LOCAL_RANK="1", **common
    )
    assert children.ended([process]) == [2]
    assert "must name a function, got nowhere:net" in said.read_text()


def test_batch_norms_are_synchronised_and_put_back():
    network = children.Small("batch")
    network.layers[1].momentum = 0.3
    before = network.layers[1]
    restore = synchronise_norms(network)
    assert type(network.layers[1]) is torch.nn.SyncBatchNorm and network.layers[1].momentum == 0.3
    assert network.layers[1].weight is before.weight
    network.layers[1].running_mean.add_(1.0)
    network.eval()
    restore()
    assert network.layers[1] is before and not before.training
    assert torch.equal(before.running_mean, torch.ones(8))
    with pytest.raises(ValueError, match=r"this network has none"):
        synchronise_norms(children.Small("group"))


def test_one_process_synchronises_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"this run has 1 process on cpu. Leave it out"):
        train(children.Small("batch"), "digits", "smoke", run_dir=tmp_path / "run", sync_batch_norm=True)
    assert not (tmp_path / "run").exists()


def test_variables_that_contradict_each_other_are_refused():
    good = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    found = Processes.found(good | place)
    assert (found.rank, found.size, found.local_rank, found.local_size) == (1, 4, 1, 2)
    assert not found.first and Processes.found(good).size == 1, "without an address it is another's"
    for name, value in (("RANK", "4"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "1"), ("RANK", "x")):
        with pytest.raises(RunError, match=rf"contradict each other: .*{name}={value}"):
            Processes.found(good | place | {name: value})
