"""A hundred implicit residual blocks on digits beside Euler's: accuracy, time, gradients at large η, memory.

python -m tests.benchmarks.implicit_blocks [--depth 100] [--epochs 8] [--seeds 1]
python -m tests.benchmarks.implicit_blocks --only seeds|cifar

Fields −Kᵀ tanh(Kx + b) (`resode.fields.ParabolicField`), whose logarithmic norm is at most 0, one for each block.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from resode import ResidualStack
from resode.fields import ParabolicField
from resode.training.data import load_data


def network(depth: int, solver: str, step_size: float, width: int = 16, seed: int = 0) -> nn.Sequential:
    """A linear layer, the blocks, a linear layer; the same weights for every solver."""
    torch.manual_seed(seed)
    fields = [ParabolicField(width) for _ in range(depth)]
    stack = ResidualStack(fields, solver=solver, step_size=step_size)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), stack, nn.Linear(width, 10))


def trained(model: nn.Module, data, epochs: int, seed: int = 0) -> tuple[float, float]:
    """The accuracy on the test images, and seconds an epoch."""
    (x, y), (x_test, y_test) = data
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    begin = time.perf_counter()
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(256):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    seconds = (time.perf_counter() - begin) / epochs
    with torch.no_grad():
        return float((model.eval()(x_test).argmax(1) == y_test).float().mean()), seconds


def gradients(depth: int) -> None:
    """The gain of the gradient through the untrained stack, ‖∂L/∂x_0‖ / ‖∂L/∂x_L‖, at η up to 10."""
    print("| η | Euler: state, gain of the gradient | implicit Euler |\n| --- | --- | --- |")
    for eta in (0.1, 1.0, 5.0, 10.0):
        cells = []
        for solver in ("euler", "implicit_euler"):
            stack = network(depth, solver, eta)[2]
            start = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
            end = stack(start)
            direction = torch.randn(end.shape, generator=torch.Generator().manual_seed(2))
            (grad,) = torch.autograd.grad((end * direction).sum(), start)
            cells.append(
                f"{float((end.norm() / start.norm()).detach()):.3g}, {float(grad.norm() / direction.norm()):.3g}"
            )
        print(f"| {eta:g} | {cells[0]} | {cells[1]} |", flush=True)


def memory(depth: int) -> None:
    """Bytes that the graph of a forward pass holds, over Newton iterations of a sample and block."""
    print("| η | Newton iterations a block | MiB held |\n| --- | --- | --- |")
    for eta in (0.01, 1.0, 10.0):
        stack, held = network(depth, "implicit_euler", eta)[2].double(), {}

        def pack(x: torch.Tensor, held=held) -> torch.Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = stack(x.requires_grad_())
        iterations = float(stack.stats.n_newton.double().mean()) / depth
        print(f"| {eta:g} | {iterations:.2f} | {sum(held.values()) / 2**20:.2f} |", flush=True)
        del y


def cifar(images: int = 256, epochs: int = 12) -> None:
    """That implicit blocks train on CIFAR-10: the loss on a few images, η = 1; 1,024 entries, so Newton's systems go by GMRES."""
    data = load_data("cifar10")
    torch.manual_seed(0)
    chosen = torch.randperm(len(data.train_images))[:images]  # they may lie sorted by class
    x, y = data.train_images[chosen].float() / 255 - 0.5, data.train_labels[chosen]

    fields = [ParabolicField(16, kernel_size=3) for _ in range(3)]
    stack = ResidualStack(fields, solver="implicit_euler", step_size=1.0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=4, padding=1), stack, nn.Flatten(), nn.Linear(16 * 64, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(epochs):
        losses = []
        for index in torch.randperm(images).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        print(
            f"CIFAR-10, {images} images, epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}", flush=True
        )


def main() -> None:
    """Prints what it measures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", choices=("seeds", "cifar"), help="one part")
    given = parser.parse_args()
    if given.only == "cifar":
        return cifar()
    if given.only is None:
        gradients(given.depth)
        memory(given.depth)
    data = load_data("digits")
    pairs = [
        (images.float() / 255 - 0.5, labels)
        for images, labels in (
            (data.train_images, data.train_labels),
            (data.test_images, data.test_labels),
        )
    ]
    for seed in range(given.seeds):
        seconds = {}
        for solver in ("euler", "implicit_euler"):
            model = network(given.depth, solver, 0.1, seed=seed)
            accuracy, seconds[solver] = trained(model, pairs, given.epochs, seed)
            ratio = seconds[solver] / seconds["euler"]
            print(f"seed {seed}, {solver}: {100 * accuracy:.2f} %, {seconds[solver]:.2f} s an epoch, {ratio:.1f} of Euler's",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
