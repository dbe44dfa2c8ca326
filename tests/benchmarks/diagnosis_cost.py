"""What a diagnosis costs, in forward and backward passes of its inputs.

    python -m tests.benchmarks.diagnosis_cost

A pass is the multiply-adds of one forward and backward pass of all inputs through the network; seconds are
those of a diagnosis over those of a pass.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resode import diagnose
from resode.networks import build
from resode.networks.perceptron import ResidualMLP


def cases() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """By name: a network and its inputs."""
    torch.manual_seed(0)
    pictures = torch.randn(32, 3, 32, 32)
    return {
        "resnet20, 32 images": (build("resnet20").eval(), pictures),
        "odenet20, 32 images": (build("odenet20").eval(), pictures),
        "200 dense blocks": (ResidualMLP(200, in_channels=1, image_size=8).eval(), torch.randn(32, 1, 8, 8)),
    }


def one_pass(model: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward of all inputs, with gradients of the inputs and the weights."""
    model(x.clone().requires_grad_()).square().sum().backward()
    model.zero_grad()


def passes(model: nn.Module, x: torch.Tensor) -> float:
    """Multiply-adds of a diagnosis over those of one forward and backward pass."""

    def counted(what: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            what()
        return counter.get_total_flops()

    return counted(lambda: diagnose(model, x)) / counted(lambda: one_pass(model, x))


def main() -> None:
    """A line a network."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name, (model, x) in cases().items():
        seconds = []
        for what in (lambda m=model, x=x: one_pass(m, x), lambda m=model, x=x: diagnose(m, x)):
            what()
            begun = time.process_time()
            what()
            seconds.append(time.process_time() - begun)
        print(
            f"{name:24}{passes(model, x):6.1f} passes{seconds[1] / seconds[0]:8.1f} times the time",
            flush=True,
        )


if __name__ == "__main__":
    main()
