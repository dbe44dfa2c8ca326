"""Other people's networks and ours with the same weights: the largest difference of logits.

    python -m tests.benchmarks.foreign_weights

Needs timm, torchvision and transformers, which are none of the project's: a line says where one is missing.
Weights are random, and so are batch norm's statistics, so that no layer is near the identity; images are
64×64, float64, so that a difference is one of names or of mathematics and not of rounding.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

from resode.networks import ImageNetResNet, build, load_weights
from tests.benchmarks.zoo import beside_cpu_torch

NAMES = {
    "torchvision": ("resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"),
    "timm": (
        "resnet18", "resnet26", "resnet18d", "resnet26d", "resnet34d", "resnet50d", "seresnet18", "seresnet50",
        "resnetv2_18", "resnetv2_34", "resnetv2_50", "resnetv2_50d", "wide_resnet50_2", "resnext50_32x4d",
    ),
    "transformers": ("resnet18", "resnet50"),
}  # fmt: skip


def theirs(package: str, name: str) -> nn.Module:
    """The other package's network, with random weights."""
    module = importlib.import_module(package)
    if package == "torchvision":
        return module.models.get_model(name)
    if package == "timm":
        return module.create_model(name)
    kind = {
        "resnet18": {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
        "resnet50": {},
    }[name]
    return module.ResNetForImageClassification(module.ResNetConfig(num_labels=1000, **kind))


def randomised(network: nn.Module) -> nn.Module:
    """Every parameter and statistic away from 0, 1 and its start."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5)):
                nn.init.uniform_(value, low, high)
            module.running_mean.uniform_(-0.5, 0.5)  # pyright: ignore[reportOptionalMemberAccess]
            module.running_var.uniform_(0.5, 1.5)  # pyright: ignore[reportOptionalMemberAccess]
    return network.double().eval()


def difference(package: str, name: str) -> float:
    """The largest difference of logits over the largest logit."""
    torch.manual_seed(0)
    network = randomised(theirs(package, name))
    own = ImageNetResNet(26) if name == "resnet26" else build(name)
    own = load_weights(own.double(), network.state_dict()).eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        found, expected = own(x), network(x)
    expected = getattr(expected, "logits", expected)
    return ((found - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    """Prints a line a network."""
    for package, names in NAMES.items():
        try:
            beside_cpu_torch()
            version = importlib.import_module(package).__version__
        except ImportError as error:
            print(f"{package}: not there ({error})")
            continue
        for name in names:
            print(f"{package} {version}  {name:<16} {difference(package, name):.1e}", flush=True)


if __name__ == "__main__":
    main()
