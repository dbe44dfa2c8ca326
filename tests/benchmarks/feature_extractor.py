"""torchvision's feature extractor on our networks: the same features as a hook sees.

    python -m tests.benchmarks.feature_extractor

Needs torchvision, which is none of the project's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from resode.networks import build
from tests.benchmarks.zoo import beside_cpu_torch

CASES = {
    "resnet20": ("layer1.2.act", "layer3"),
    "preact20": ("layer1", "layer2.0"),
    "odenet20": ("layer1", "layer3"),
    "wide_resnet10_2": ("layer2",),
    "highway19": ("layer2",),
    "resnet18": ("layer1.1", "layer4"),
    "resnetv2_18": ("layer1.1", "layer4"),
    "resnext50_32x4d": ("layer1", "layer3.5"),
    "plain20": ("layer2",),
    "residual_mlp8": ("stack",),
}


def main() -> None:
    """Prints a line a network."""
    beside_cpu_torch()
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    for name, nodes in CASES.items():
        model = build(name, width=16).eval() if "res" in name and "mlp" not in name else build(name).eval()
        x = torch.randn(2, 3, 32, 32)
        seen: dict[str, torch.Tensor] = {}
        plain = [node for node in nodes if not node.endswith(".act")]  # an activation that serves twice

        def keep(node: str, seen: dict[str, torch.Tensor] = seen) -> Callable[..., None]:
            return lambda module, inputs, output: seen.update({node: output})

        hooks = [model.get_submodule(node).register_forward_hook(keep(node)) for node in plain]
        model(x)
        for hook in hooks:
            hook.remove()
        found = extraction.create_feature_extractor(model, list(nodes))(x)
        assert all(torch.equal(found[node], seen[node]) for node in plain)
        print(f"{name:<16} {'  '.join(f'{node} {tuple(value.shape)}' for node, value in found.items())}")


if __name__ == "__main__":
    main()
