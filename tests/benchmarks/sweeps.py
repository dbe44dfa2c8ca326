"""A sweep against the loop of a shell: its time, and whether kills change a weight.

`python -m tests.benchmarks.sweeps FOLDER`: 24 digits runs one command after another (solver × step × seed), the
same as one sweep, a sweep killed at random times and resumed, and with --ray one on a Ray cluster of this machine
whose worker is killed. Processor times of all processes stand beside the wall's, which says little under load.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

from safetensors.torch import load_file

GRID = {"solver": ["euler", "rk4"], "step_size": ["0.5", "1"], "seed": [str(seed) for seed in range(6)]}
SETTINGS = ["--recipe", "smoke", "--device", "cpu"]
RESODE = [sys.executable, "-m", "resode"]


def pairs() -> list[str]:
    return [part for key, values in GRID.items() for part in ("--grid", f"{key}={','.join(values)}")]


def names() -> list[str]:
    return [
        ",".join(f"{k}={v}" for k, v in zip(GRID, point, strict=True)) for point in product(*GRID.values())
    ]


def measured(action) -> tuple[float, float]:
    """Seconds on the wall, and of all processors, that an action's child processes took."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    action()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begun, used


def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run([*RESODE, *arguments], check=check, stdout=subprocess.DEVNULL)


def loop(folder: Path, points: list[str]) -> None:
    """What a shell would do."""
    for name in points:
        values = dict(pair.split("=") for pair in name.split(","))
        run(
            "train", *SETTINGS, "--run-dir", str(folder / name), "--seed", values["seed"],
            "--solver", values["solver"], "--option", f"step_size={values['step_size']}",
        )  # fmt: skip


def contents(folder: Path, name: str) -> tuple:
    """What a run comes to: its weights, and every figure that is no time or memory."""
    tensors = load_file(str(folder / name / "weights.safetensors"))
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].contiguous().numpy().tobytes())
    summary = json.loads((folder / name / "summary.json").read_text())
    for key in ("seconds", "images_per_second", "peak_memory_bytes", "checksums"):
        summary.pop(key)
    return digest.hexdigest(), json.dumps(summary, sort_keys=True)


def different(one: Path, other: Path) -> list[str]:
    return [name for name in names() if contents(one, name) != contents(other, name)]


def killed(folder: Path, kills: int, longest: float, seed: int, *extra: str) -> list[str]:
    """Sweep into a folder, killing the process after random times; what stood there each time."""
    draws, told = random.Random(seed), []
    arguments = [*pairs(), *SETTINGS, *extra]
    while len(told) < kills:
        process = subprocess.Popen([*RESODE, "sweep", str(folder), *arguments], stdout=subprocess.DEVNULL)
        delay = draws.uniform(0, longest)
        try:
            process.wait(delay)
            told.append(f"ended by itself within {delay:.0f} s")
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = len(list(folder.glob("*/summary.json")))
        begun = len(list(folder.glob("*/config.yaml"))) - done
        told.append(f"after {delay:.1f} s: {done} finished, {begun} begun")
        if (folder / "sweep.yaml").exists():
            arguments = list(extra)
    run("sweep", str(folder), *arguments)
    return told


def on_ray(folder: Path) -> str:
    """Sweep on a Ray cluster of two workers, killing one of them in the middle; what it was at."""
    arguments = [*pairs(), *SETTINGS, "--engine", "ray", "--jobs", "2", "--threads", "1"]
    process = subprocess.Popen([*RESODE, "sweep", str(folder), *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.05)
        if len(list(folder.glob("*/summary.json"))) < len(names()) // 3:
            continue
        for lock in folder.glob("*/.lock"):
            if (lock.parent / "checkpoints" / "last.safetensors").exists() and (worker := holder(lock)):
                os.kill(worker, signal.SIGKILL)
                process.wait()
                return f"{lock.parent.name}, between its epochs"
    return "nothing: it ended before"


def holder(lock: Path) -> int | None:
    """The process that has a file open."""
    for place in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if place.readlink() == lock.resolve():
                return int(place.parts[2])
        except OSError:
            continue
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument(
        "--longest", type=float, default=60.0, help="seconds that a sweep lives before a kill"
    )
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()
    folder = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    load = os.getloadavg()[0]
    print(f"{len(names())} runs, {os.cpu_count()} cores, load {load:.1f}", flush=True)
    jobs = ("--jobs", "2", "--threads", "1")
    loops = measured(lambda: loop(folder / "loop", names()))
    print(f"loop   {loops[0]:7.1f} s, {loops[1]:7.1f} s of processors", flush=True)
    swept = measured(lambda: run("sweep", str(folder / "sweep"), *pairs(), *SETTINGS, *jobs))
    print(f"sweep  {swept[0]:7.1f} s, {swept[1]:7.1f} s of processors", flush=True)
    print(f"ratio  {swept[0] / loops[0]:7.3f}  , {swept[1] / loops[1]:7.3f}", flush=True)
    print("different from single runs:", different(folder / "loop", folder / "sweep") or "none", flush=True)
    for line in killed(folder / "killed", options.kills, options.longest, 0, *jobs):
        print("killed", line, flush=True)
    print("different from single runs:", different(folder / "loop", folder / "killed") or "none", flush=True)
    if options.ray:
        print("Ray, a worker killed at", on_ray(folder / "ray"), flush=True)
        print("different from single runs:", different(folder / "loop", folder / "ray") or "none", flush=True)


if __name__ == "__main__":
    main()
