"""Training images a second, beside a bare loop and a DataLoader's: `python -m tests.benchmarks.throughput`.

One process; for each network in turn, by rounds:
  resode      what `resode train --recipe fast` does in an epoch, in the device's faster precision
  bare        the same network, precision, memory format and compilation; ready images, and nothing else
  dataloader  the same network in float32 NCHW, eager; crops and mirrors one image at a time in workers
A round is an epoch over as many random images as `--images` says. `--json` keeps what was measured, after
every network, so that a run may be cut into calls: what the file holds of the same settings is left out.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader, Dataset

from resode.checks import choose_device
from resode.networks import build
from resode.training.data.datasets import ImageData
from resode.training.plan import choose_precision
from tests.benchmarks.training_step import bare_steps, random_images, resode_steps

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet20": ("resnet20", {}),
    "odenet20, Euler": ("odenet20", {}),
    "odenet20, RK4": ("odenet20", {"solver": "rk4"}),
    "resnet18, 3×3 stem": ("resnet18", {"stem": "small", "num_classes": 10}),
}
AIMS = {"resnet20": 100_000, "resnet18, 3×3 stem": 40_000}  # images/s on one NVIDIA H200


class OneByOne(Dataset):
    """Images cropped, mirrored and normalized one at a time, as in most training scripts."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.train_labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = pad(self.data.train_images[index], (4, 4, 4, 4))
        down, right = torch.randint(9, (2,)).tolist()
        image = image[:, down : down + 32, right : right + 32]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return (image.float() / 255 - 0.5) / 0.25, self.data.train_labels[index]


def dataloader_steps(
    data: ImageData, batch: int, model: str, options: dict[str, Any], device: torch.device, workers: int
) -> Callable[[], None]:
    """An epoch of the loop that most people write."""
    torch.manual_seed(0)
    network = build(model, **options).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    loader = DataLoader(
        OneByOne(data),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )

    def steps() -> None:
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            loss = cross_entropy(network(x), y, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return steps


def described(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def measure(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Images a second of the three loops, and their ratios, medians over the rounds."""
    model, settings = NETWORKS[name]
    batch, precision = options.batch, choose_precision(device)
    data = random_images(options.images // batch * batch)
    ready = ((data.train_images.float() / 255 - 0.5) / 0.25).to(device), data.train_labels.to(device)
    bf16 = precision == "bf16"
    with tempfile.TemporaryDirectory() as folder:
        loops = {
            "resode": resode_steps(
                data,
                batch,
                precision,
                folder,
                compile=options.compile,
                model=model,
                options=settings,
                device=device,
            ),
            "bare": bare_steps(*ready, batch, bf16, compile=options.compile, model=model, options=settings),
            "dataloader": dataloader_steps(data, batch, model, settings, device, options.workers),
        }
        rates: dict[str, list[float]] = {loop: [] for loop in loops}
        for number in range(options.rounds + 1):
            for loop, steps in loops.items():
                begun = time.perf_counter()
                steps()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if number:  # the first round warms up and compiles
                    rates[loop].append(len(data.train_labels) / (time.perf_counter() - begun))
    ratios = {
        other: statistics.median(a / b for a, b in zip(rates["resode"], rates[other], strict=True))
        for other in ("bare", "dataloader")
    }
    return {
        "precision": precision,
        "images_per_second": {loop: statistics.median(some) for loop, some in rates.items()},
        "ratio": ratios,
        "torch": str(torch.__version__),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--images", type=int, default=50_000, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=8, help="processes of the DataLoader")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    options = parser.parse_args()
    device = choose_device(options.device)
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    print(f"{'network':<22}{'resode':>10}{'bare':>10}{'DataLoader':>12}{'/bare':>8}{'/DataLoader':>13}  aim")
    for name in options.networks:
        settings = {
            "network": name,
            "batch": options.batch,
            "images": options.images,
            "rounds": options.rounds,
        }
        settings |= {"workers": options.workers, "compiled": options.compile, "device": described(device)}
        row = next((row for row in known if settings.items() <= row.items()), None)
        if row is None:
            row = settings | measure(name, options, device)
            known.append(row)
            if options.json:
                options.json.write_text(json.dumps(known, indent=1))
        rates, ratio = row["images_per_second"], row["ratio"]
        print(
            f"{name:<22}{rates['resode']:>10,.0f}{rates['bare']:>10,.0f}{rates['dataloader']:>12,.0f}"
            f"{ratio['bare']:>8.3f}{ratio['dataloader']:>13.2f}  "
            + ("/bare at least 0.95" + (f", {AIMS[name]:,} images/s on an H200" if name in AIMS else ""))
        )


if __name__ == "__main__":
    main()
