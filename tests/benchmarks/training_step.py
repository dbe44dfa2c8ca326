"""A training step of resnet20 beside a plain loop and a bare one: `python -m tests.benchmarks.training_step`.

One process, in turn, by rounds:
  plain    written by hand here: an NCHW float32 resnet20, torch's ordinary SGD, ready-made float images
  resode   what `resode train --recipe fast` does in an epoch: images cropped, mirrored and normalized from
           uint8, moving average of the weights, tallies, Lightning's Fabric
  compiled the same with --compile
  bare     resode's network, precision, memory format and fused SGD; ready-made images, and nothing else
Ratios are medians over the rounds of times in one round. `--solvers` compares odenet20 under rk4 and Euler's method,
`--kinds` precisions and memory formats.
Run it on a machine that does nothing else.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu

from resode.networks import build
from resode.training.data.datasets import ImageData
from resode.training.folder import RunFolder
from resode.training.loop import TrainingLoop, make_fabric
from resode.training.plan import choose_precision, resolve
from resode.training.processes import Processes
from resode.training.progress import Progress
from resode.training.recipe import make_recipe
from resode.training.run import _batches
from resode.training.task import ClassificationTask

CPU = torch.device("cpu")


class PlainBlock(nn.Module):
    """relu(S(x) + F(x)) with option A's shortcut: every other pixel, and zeros for the new channels."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.new = stride, outside - inside

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.new:
            x = pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2)
            )
        return relu(x + y)


def plain_resnet(blocks: int = 3) -> nn.Sequential:
    """He et al.'s ResNet of 6n + 2 layers in plain torch."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inside = 16
    for outside in (16, 32, 64):
        for _ in range(blocks):
            layers.append(PlainBlock(inside, outside, 2 if outside != inside else 1))
            inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def random_images(count: int) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 10
    names = tuple("0123456789")
    return ImageData(
        "random", "random", images, labels, images[:10], labels[:10], names, (0.5,) * 3, (0.25,) * 3, 4, True
    )


def plain_steps(images: Tensor, labels: Tensor, batch: int) -> Callable[[], None]:
    torch.manual_seed(0)
    network = plain_resnet().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def steps() -> None:
        total = 0.0
        order = torch.randperm(len(labels))
        for start in range(0, len(labels), batch):
            chosen = order[start : start + batch]
            loss = cross_entropy(network(images[chosen]), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

    return steps


def bare_steps(
    images: Tensor,
    labels: Tensor,
    batch: int,
    bf16: bool,
    *,
    compile: bool = False,
    model: str = "resnet20",
    options: Mapping[str, Any] | None = None,
) -> Callable[[], None]:
    """The same network and kernels with images that are ready on its device, and nothing else."""
    device = images.device
    torch.manual_seed(0)
    network = build(model, **(options or {})).to(device, memory_format=torch.channels_last).train()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(network(x).float(), y, label_smoothing=0.1)

    if compile:
        loss_of = torch.compile(loss_of, mode="default" if device.type == "cpu" else "reduce-overhead")
    weights = list(network.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": 5e-4},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, fused=True)
    ready = [
        (x.to(memory_format=torch.channels_last), y)
        for x, y in zip(images.split(batch), labels.split(batch), strict=True)
    ]

    def steps() -> None:
        for x, y in ready:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = loss_of(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return steps


def resode_steps(
    data: ImageData,
    batch: int,
    precision: str,
    folder: str,
    *,
    compile: bool,
    model: str = "resnet20",
    options: Mapping[str, Any] | None = None,
    device: torch.device = CPU,
) -> Callable[[], None]:
    """An epoch's updates, by the loop that `resode train` runs."""
    torch.manual_seed(0)
    network = build(model, **(options or {})).to(device)
    recipe = make_recipe(
        "fast", batch_size=batch, precision=precision, lr=0.01, epochs=10_000, compile=compile
    )
    recipe = resolve(recipe, data, network, device)
    network = network.to(memory_format=torch.channels_last)
    training, held_out = _batches(data, recipe, device, Processes())
    updates = recipe.length(len(training))
    loop = TrainingLoop(
        make_fabric(device, recipe.precision),
        ClassificationTask(network, recipe, updates),
        training,
        held_out,
        folder=RunFolder.create(Path(folder) / f"run{compile}"),
        about={"model": model},
        progress=Progress(False, 1),
    )

    def steps() -> None:
        loop._updates([])
        loop.epoch += 1
        loop._start_tally()

    return steps


Contestants = Mapping[str, Callable[[], None]]
Ratio = tuple[str, str, float | None]
"""One over the other, and what it is to be at most."""


def networks(batch: int, steps: int, folder: str) -> tuple[Contestants, Sequence[Ratio]]:
    """resnet20 in plain torch, as resode trains it, compiled, and bare."""
    precision = choose_precision(CPU)
    data = random_images(batch * steps)
    images = (data.train_images.float() / 255 - 0.5) / 0.25
    contestants = {
        "plain": plain_steps(images, data.train_labels, batch),
        "resode": resode_steps(data, batch, precision, folder, compile=False),
        "compiled": resode_steps(data, batch, precision, folder, compile=True),
        "bare": bare_steps(images, data.train_labels, batch, precision == "bf16"),
    }
    return contestants, [
        ("resode", "plain", 0.55),
        ("compiled", "plain", 0.55),
        ("resode", "bare", 1.05),
        ("bare", "plain", None),
    ]


def solvers(batch: int, steps: int, folder: str) -> tuple[Contestants, Sequence[Ratio]]:
    """odenet20 under rk4, four evaluations a block, beside Euler's one; eager and compiled."""
    data, precision = random_images(batch * steps), choose_precision(CPU)
    contestants = {
        f"{solver}{', compiled' if compile else ''}": resode_steps(
            data,
            batch,
            precision,
            f"{folder}/{solver}{compile}",
            compile=compile,
            model="odenet20",
            options={"solver": solver},
        )
        for solver in ("euler", "rk4")
        for compile in (False, True)
    }
    return contestants, [
        ("rk4", "euler", 4.1),
        ("rk4, compiled", "euler, compiled", 3.5),
        ("rk4, compiled", "euler", 3.5),
    ]


def compare(
    contestants: Contestants, ratios_of: Sequence[Ratio], images: int, rounds: int, clock: Callable[[], float]
) -> None:
    """Times of so many images each, in turn, and their ratios."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        names = list(contestants) if number % 2 else list(contestants)[::-1]
        for name in names:
            begun = clock()
            contestants[name]()
            if number:  # the first round warms up
                times[name].append(clock() - begun)
    print(f"precision that auto takes here: {choose_precision(CPU)}; {rounds} rounds of {images} images each")
    for name, seconds in times.items():
        show(name, [images / s for s in seconds])
    for one, other, bar in ratios_of:
        ratios = sorted(a / b for a, b in zip(times[one], times[other], strict=True))
        low, high = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else (ratios[0], ratios[0])
        aim = "" if bar is None else f"  aim: at most {bar}"
        print(
            f"{one + ' / ' + other:<34}{statistics.median(ratios):6.3f}  (quartiles {low:.3f} to {high:.3f}){aim}"
        )


def show(name: str, rates: list[float]) -> None:
    print(f"{name:<24}{statistics.median(rates):6.0f} images/s  ({min(rates):.0f} to {max(rates):.0f})")


def kinds(model: str, batch: int, rounds: int, clock: Callable[[], float]) -> None:
    """Precisions and memory formats, a step of each in turn."""
    every: dict[str, tuple[Callable[[], None], list[float]]] = {}
    for bf16 in (False, True):
        for layout in (torch.contiguous_format, torch.channels_last):
            name = f"{'bf16' if bf16 else 'float32'}, {'NCHW' if layout is torch.contiguous_format else 'channels-last'}"
            every[name] = (one_step(model, bf16, layout, batch), [])
    for number in range(rounds + 1):
        for step, rates in every.values():
            begun = clock()
            step()
            if number:
                rates.append(batch / (clock() - begun))
    for name, (_, rates) in every.items():
        show(name, rates)


def one_step(model: str, bf16: bool, layout: torch.memory_format, batch: int) -> Callable[[], None]:
    torch.manual_seed(0)
    network = build(model).to(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)
    images = torch.randn(batch, 3, 32, 32).to(memory_format=layout)
    labels = torch.randint(10, (batch,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", action="store_true", help="precisions and memory formats instead")
    parser.add_argument("--solvers", action="store_true", help="odenet20 under rk4 and under Euler's method")
    parser.add_argument("--model", default="resnet20", help="of --kinds")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--processor-time", action="store_true", help="instead of wall time: for one thread on a busy machine"
    )
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    threads = torch.get_num_threads()
    print(f"batch {options.batch}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}")
    if options.kinds:
        kinds(options.model, options.batch, options.rounds, clock)
    else:
        with tempfile.TemporaryDirectory() as folder:
            made = (solvers if options.solvers else networks)(options.batch, options.steps, folder)
            compare(*made, options.batch * options.steps, options.rounds, clock)


if __name__ == "__main__":
    main()
