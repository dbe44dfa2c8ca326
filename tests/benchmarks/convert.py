"""Which networks of other libraries convert, counted: python -m tests.benchmarks.convert [NAME …] [--csv PATH].

timm, torchvision and transformers are taken where they are importable, with random weights; other small networks are
left out by naming those wanted. Columns: residual blocks in stacks, stacks, additions left as they are; the largest
difference of outputs and of gradients from the original, relative; whether rk4's output is finite; seconds.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resode
from resode.calls import call, tensors_in

COLUMNS = (
    "network",
    "blocks",
    "stacks",
    "left",
    "outputs",
    "gradients",
    "rk4 finite",
    "seconds",
    "refused because",
)
IMAGES = (2, 3, 64, 64)


def declare_operators() -> None:
    """Torchvision's operators, where its compiled ones do not fit this torch: its networks use none of them."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    names = {
        n
        for f in Path(spec.origin).parent.rglob("*.py")
        for n in re.findall(r"torchvision::(\w+)", f.read_text())
    }
    for name in names:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    LIBRARIES.append(library)  # it ends with its object


LIBRARIES: list[Any] = []


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from timm import create_model  # pyright: ignore[reportMissingImports]

        return create_model(name, num_classes=10, **options)

    return make


def torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models  # pyright: ignore[reportMissingImports]

        return getattr(models, name)(num_classes=10)

    return make


def hugging_face(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers  # pyright: ignore[reportMissingImports]

        return getattr(transformers, model)(getattr(transformers, config)(**sizes))

    return make


TOKENS = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
TEXT = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 0}
WIDE = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], Any]] = {
    "timm resnetv2_50": ("timm", timm("resnetv2_50"), IMAGES),
    "timm vit_tiny": ("timm", timm("vit_tiny_patch16_224", img_size=64), IMAGES),
    "timm convnext_tiny": ("timm", timm("convnext_tiny", ls_init_value=0.5), IMAGES),
    "timm deit3_small": ("timm", timm("deit3_small_patch16_224", img_size=64, drop_path_rate=0.1), IMAGES),
    "timm swin_tiny": ("timm", timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4), IMAGES),
    "timm mixer_s16": ("timm", timm("mixer_s16_224", img_size=64), IMAGES),
    "torchvision convnext_tiny": ("torchvision", torchvision("convnext_tiny"), IMAGES),
    "torchvision swin_t": ("torchvision", torchvision("swin_t"), IMAGES),
    "torchvision mobilenet_v2": ("torchvision", torchvision("mobilenet_v2"), IMAGES),
    "torchvision resnet18": ("torchvision", torchvision("resnet18"), IMAGES),
    "Hugging Face GPT-2": (
        "transformers",
        hugging_face("GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=4, n_head=4, **TEXT),
        {"input_ids": TOKENS, "use_cache": False},
    ),
    "Hugging Face GPT-2, cached": (
        "transformers",
        hugging_face("GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=4, n_head=4, **TEXT),
        TOKENS,
    ),
    "Hugging Face Llama": (
        "transformers",
        hugging_face("LlamaForCausalLM", "LlamaConfig", **WIDE, **TEXT),
        {"input_ids": TOKENS, "use_cache": False},
    ),
    "Hugging Face ViT": (
        "transformers",
        hugging_face("ViTForImageClassification", "ViTConfig", **WIDE, image_size=64, patch_size=8),
        IMAGES,
    ),
    "Hugging Face BERT": (
        "transformers",
        hugging_face("BertForSequenceClassification", "BertConfig", **WIDE, vocab_size=100),
        TOKENS,
    ),
}


def measured(make: Callable[[], nn.Module], x: Any) -> dict[str, Any]:
    """One network's row."""
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():  # last norms and scales start at 0, which would hide the branches
        if p.squeeze().ndim <= 1:
            p.data += 0.3 * torch.randn_like(p)
    x = torch.randn(x) if isinstance(x, tuple) else x
    start = time.perf_counter()
    try:
        converted = resode.convert(model, x)
    except ValueError as error:
        reasons = [line for line in str(error).splitlines() if "left as they are" in line]
        return {"seconds": time.perf_counter() - start, "refused because": " ".join(reasons)}
    seconds = time.perf_counter() - start
    one, other = gradients(model, model, x), gradients(converted, model, x)
    apart = [
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in zip(one, other, strict=True)
    ]
    stacks = converted.stacks.values()
    blocks = sum(stack.depth for stack in stacks)
    for stack in stacks:
        stack.solver = "rk4"
    with torch.no_grad():
        finite = bool(answer(converted, x).isfinite().all())
    return {
        "blocks": blocks,
        "stacks": len(stacks),
        "left": len(converted.refused),
        "outputs": converted.difference,
        "gradients": max(apart),
        "rk4 finite": finite,
        "seconds": seconds,
    }


def answer(network: nn.Module, x: Any) -> Tensor:
    return next(t for t in tensors_in(call(network, x)) if t.is_floating_point())


def gradients(network: nn.Module, model: nn.Module, x: Any) -> list[Tensor]:
    model.zero_grad()
    answer(network, x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of networks' names; all where none is given")
    parser.add_argument("--csv", help="also write the table there")
    options = parser.parse_args()
    declare_operators()
    rows = []
    for name, (package, make, x) in NETWORKS.items():
        if options.names and not any(part.lower() in name.lower() for part in options.names):
            continue
        if find_spec(package) is None:
            print(f"{name}: {package} is not installed", file=sys.stderr)
            continue
        row = {"network": name, **measured(make, x)}
        rows.append(row)
        shown = {k: f"{v:.1e}" if isinstance(v, float) and 0 < v < 1e-2 else v for k, v in row.items()}
        shown["seconds"] = f"{row['seconds']:.1f}"
        print(
            "  ".join(f"{key} {shown[key]}" if key != "network" else name for key in COLUMNS if key in shown)
        )
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
