"""Multiply-adds as `resode.analysis.count` has them, against fvcore's count of the same pass.

    python -m tests.benchmarks.counted          counted.txt beside this holds the last whole table

Needs fvcore, timm, torchvision and transformers, in a folder of their own on PYTHONPATH. Of fvcore's operators
convolutions and matrix products are compared, as `count` has no others; a fused attention, which fvcore leaves out,
is counted by a formula given to it here: two products of L queries with S keys and values.
"""

from __future__ import annotations

import importlib
import math
import warnings
from typing import Any

import torch
from torch import nn

from resode.analysis import count
from resode.networks import build
from tests.benchmarks.zoo import (
    BOTH,
    DECODER,
    GPT,
    TEXT,
    VISION,
    beside_cpu_torch,
    timm,
    torchvision,
    transformers,
)

PRODUCTS = ("conv", "linear", "addmm", "matmul", "bmm", "baddbmm", "einsum", "attention")


def ours(name: str, *, size: int = 32, **options: Any) -> tuple[nn.Module, torch.Tensor]:
    """A network of resode and an input."""
    return build(name, **options), torch.randn(1, 3, size, size)


NETWORKS: list[tuple[Any, str, dict[str, Any]]] = [
    (ours, "resnet20", {}),
    (ours, "preact164", {}),
    (ours, "resnext50_32x4d", {"size": 64}),
    (ours, "odenet20", {"solver": "rk4", "substeps": 2}),
    (torchvision, "resnet50", {"size": 224}),
    (torchvision, "mobilenet_v3_large", {"size": 224}),
    (torchvision, "efficientnet_b0", {"size": 224}),
    (torchvision, "densenet121", {}),
    (torchvision, "swin_t", {}),
    (torchvision, "vit_b_32", {"image_size": 64}),
    (torchvision, "r2plus1d_18", {"size": 32, "frames": 4, "part": "models.video"}),
    (timm, "vit_tiny_patch16_224", {"size": 224}),
    (timm, "convnextv2_atto", {}),
    (timm, "cait_xxs24_224", {"img_size": 64}),
    (timm, "mixer_s32_224", {"size": 224}),
    (timm, "res2net50_26w_4s", {}),
    (timm, "xcit_nano_12_p16_224", {"img_size": 64}),
    (transformers, "Bert", TEXT),
    (transformers, "GPT2", GPT),
    (transformers, "Llama", {**DECODER, "attn_implementation": "eager"}),
    (transformers, "Bart", {**BOTH, "inputs": "both"}),
    (transformers, "ViT", {**VISION, "inputs": "pixels"}),
]


class Keywords(nn.Module):
    """A network called with a mapping, for fvcore, which gives positional arguments."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All outputs, as what leads to none of them is left out of a graph."""
        found = self.network(**dict(zip(self.names, values, strict=True)))
        return tuple(value for value in found.to_tuple() if isinstance(value, torch.Tensor))


def attention(inputs: list[Any], outputs: list[Any]) -> dict[str, float]:
    """L·S·(E + E_v) a head: Qᵀ K, and its softmax times V."""
    q, k, v = (list(value.type().sizes()) for value in inputs[:3])
    return {"attention": math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])}


def theirs(model: nn.Module, x: Any) -> tuple[int, list[str]]:
    """fvcore's multiply-adds, and what operators with products it knows nothing of."""
    analysis_of = importlib.import_module("fvcore.nn").FlopCountAnalysis
    if isinstance(x, dict):
        model, x = Keywords(model, list(x)), tuple(x.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = analysis_of(model.eval(), x).unsupported_ops_warnings(False)
        analysis.uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        analysis.set_op_handle("aten::scaled_dot_product_attention", attention)
        found = analysis.by_operator()
        unknown = [
            name for name in analysis.unsupported_ops() if any(p in name for p in ("mm", "conv", "attention"))
        ]
    return round(sum(found[name] for name in PRODUCTS)), unknown


def main() -> None:
    beside_cpu_torch()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # one operator, which fvcore cannot look into
    equal = 0
    print(f"{'package':13}{'network':25}{'count':>17}{'fvcore':>17}")
    for make, name, options in NETWORKS:
        torch.manual_seed(0)
        model, x = make(name, **options)
        own = count(model, x).macs
        with torch.no_grad():
            other, unknown = theirs(model, x)
        equal += own == other
        mark = "" if own == other else f"  differs by {own - other:,}"
        mark += f"  fvcore leaves out {', '.join(unknown)}" if unknown else ""
        print(f"{make.__name__:13}{name:25}{own:17,}{other:17,}{mark}", flush=True)
    print(f"{equal} of {len(NETWORKS)} equal; torch {torch.__version__}")


if __name__ == "__main__":
    main()
