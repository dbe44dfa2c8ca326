"""Kill a training process 20 times at random moments, resume it each time, and compare the weights to the bit.

    python tests/benchmarks/kills.py [KILLS]

The network has batch norm and dropout; the run has momentum, augmentation, a moving average and a validation
split. SIGKILL comes at a uniformly random time after the process started, imports aside, up to twice what it
takes to reach the first checkpoint: so it meets starting, restoring, updates, evaluation and writing.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import children

MODEL = ("train", "--model", "children:Small")
SETTINGS = ("--option", "norm=batch", "--option", "dropout=0.2", "--recipe", "smoke")
SETTINGS += ("--ema", 0.9, "--validation", 200)


def compare(kills: int, folder: Path, epochs: int, seed: int = 0) -> list[str]:
    """Lines that say where the runs were killed; an AssertionError where one differs from the undisturbed run."""
    whole = folder / "whole"
    arguments = (*MODEL, *SETTINGS, "--epochs", epochs)
    children.ended([children.start(print)])  # the server has imported all
    begun = time.perf_counter()
    process = children.start(children.command, *arguments, "--run-dir", whole, said=folder / "whole.txt")
    while not (whole / "checkpoints" / "last.safetensors").exists():
        assert process.is_alive(), (folder / "whole.txt").read_text()
        time.sleep(0.002)
    longest = 2 * (time.perf_counter() - begun)
    assert children.ended([process]) == [0], (folder / "whole.txt").read_text()
    lines = []
    runs = children.kill_until(kills, folder, arguments, MODEL, longest, seed)
    for path, where in runs:
        for name in ("weights", "checkpoints/last"):
            one, two = (load_file(p / f"{name}.safetensors") for p in (whole, path))
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one), f"{path}: {name}"
        assert not [p for p in path.rglob(".*") if p.is_file()], f"{path}: half files were left"
        lines.append(f"killed {len(where)} times ({', '.join(where)}), then finished: the same to the bit")
    return lines


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        begun = time.perf_counter()
        count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
        found = compare(count, Path(name), epochs=40)
        print("\n".join(found))
        print(
            f"{count} kills, {len(found)} runs, torch {torch.__version__}, {time.perf_counter() - begun:.0f} s"
        )
