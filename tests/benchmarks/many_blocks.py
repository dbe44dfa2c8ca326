"""Convolutional blocks to find step limits of: random, trained, damped, far from normal, and clustered."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import resode
from resode.analysis import jacobian
from resode.analysis.steps.blocks import block_groups
from resode.fields import ConvField
from resode.training.evaluate import images_of, plain_batches

SHAPES = ((4, 6, 6), (8, 6, 6), (8, 8, 8), (16, 4, 4), (16, 8, 8))


@dataclass
class Block:
    """A field and a state to linearize it at.

    Args:
        kind: where it comes from.
        field: F, in float64 and evaluation mode.
        x: one state, shape (1, C, H, W).
    """

    kind: str
    field: Any
    x: Tensor


class Damped(nn.Module):
    """F(x) − c x: every eigenvalue is moved to the left by c."""

    def __init__(self, field: nn.Module, c: float) -> None:
        super().__init__()
        self.field, self.c = field, c

    def forward(self, x: Tensor) -> Tensor:
        return self.field(x) - self.c * x


class Skewed(nn.Module):
    """D F(D⁻¹x) with channel scales D over `decades`: F's eigenvalues, far from normal."""

    def __init__(self, field: nn.Module, channels: int, decades: float) -> None:
        super().__init__()
        self.field = field
        self.register_buffer(
            "scale", torch.logspace(0, decades, channels, dtype=torch.float64)[:, None, None]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.field(x / self.scale)


class Clustered(nn.Module):
    """−2x + εF(x): every eigenvalue within about ε of −2."""

    def __init__(self, field: nn.Module, width: float) -> None:
        super().__init__()
        self.field, self.width = field, width

    def forward(self, x: Tensor) -> Tensor:
        return self.width * self.field(x) - 2 * x


def trained_blocks(model: str = "odenet20", epochs: int = 20, seed: int = 0) -> list[Block]:
    """The blocks of an ODE-ResNet trained on the digits, at states that test images reach."""
    with tempfile.TemporaryDirectory() as folder:
        run = resode.train(model, "digits", epochs=epochs, seed=seed, run_dir=f"{folder}/run", progress=False)
        images = next(iter(plain_batches(images_of(run.path), limit=8)))[0]
    found = []
    for stage in block_groups(run.network.double(), images.double()):
        for block, state in zip(stage.fields, stage.states, strict=True):
            found += [Block("trained", block, state[i : i + 1]) for i in range(len(images))]
    return found


def rightmost(block: Block) -> float:
    """max Re λ of its Jacobian."""
    return float(torch.linalg.eigvals(jacobian(block.field, block.x)[0]).real.max())


def random_block(seed: int) -> Block:
    """A convolutional field of random weights and batch-norm statistics, at a random state."""
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES[seed % len(SHAPES)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norm = ("batch", "group", "none")[seed % 3]
        activation = ("relu", "gelu", "tanh")[seed // 3 % 3]
        field = ConvField(shape[0], norm=norm, activation=activation).double()
    field.train()
    with torch.no_grad():
        field(torch.randn(32, *shape, generator=generator, dtype=torch.float64))
        for weight in field.parameters():
            weight.mul_(0.5 + torch.rand((), generator=generator, dtype=torch.float64))
    x = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
    return Block("random", field.eval(), x)


def varied(base: Iterator[Block]) -> Iterator[Block]:
    """Each base block as one of six kinds, in turn: as it is, damped, barely damped, skewed, clustered."""
    for i, block in enumerate(base):
        channels = block.x.shape[1]
        kind = i % 6
        if kind in (0, 1):
            yield block
        elif kind == 2:
            yield Block(
                f"{block.kind}, damped", Damped(block.field, 1.2 * max(rightmost(block), 0.1)), block.x
            )
        elif kind == 3:
            few = sorted(torch.linalg.eigvals(jacobian(block.field, block.x)[0]).real.tolist())[-4]
            yield Block(f"{block.kind}, few growing", Damped(block.field, few), block.x)
        elif kind == 4:
            damped = Damped(block.field, 1.2 * max(rightmost(block), 0.1))
            yield Block(f"{block.kind}, skewed", Skewed(damped, channels, 3.0), block.x)
        else:
            yield Block(f"{block.kind}, clustered", Clustered(block.field, 10.0 ** -(i // 6 % 5)), block.x)
