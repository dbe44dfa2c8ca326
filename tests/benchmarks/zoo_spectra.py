"""Seven blocks of other packages' networks, drawn by lot: what the depth profile finds against dense float64 Jacobians.

    python -m tests.benchmarks.zoo_spectra [--seed 0] [--blocks 7]      zoo_spectra.txt holds the last whole table

The branch F of each kind is written here by hand from the package's own layers, and its Jacobian at the state that
a hook finds before it is formed in float64. The profile's figures are of the float32 network as users have it, at the
addition that tracing finds (`resode.profile_depth` has a row for each). Differences are over the largest modulus, and over the largest singular value: of the rightmost eigenvalue, of the worst of
rightmost, leftmost and largest, of σ_max and of σ_min. Up to 1,024 entries of a state the profile forms the Jacobian; with
--twice, images of twice the size, it seeks the step limit by products, and a note says where it is not found.
Needs torchvision, timm and transformers on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from resode.analysis.depth.block_spectrum import block_spectrum
from resode.analysis.depth.tracing import trace
from resode.jacobian.spectrum import SpectrumOptions
from tests.benchmarks.zoo import DECODER, GPT, beside_cpu_torch, timm, torchvision, transformers

Field = Callable[[Tensor], Tensor]


def basic(block: Any) -> Field:
    """torchvision's BasicBlock, before its ReLU."""
    return lambda x: block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))


def bottleneck(block: Any) -> Field:
    """torchvision's Bottleneck, before its ReLU."""

    def field(x: Tensor) -> Tensor:
        y = torch.relu(block.bn1(block.conv1(x)))
        y = torch.relu(block.bn2(block.conv2(y)))
        return block.bn3(block.conv3(y))

    return field


def of_attention(block: Any) -> Field:
    """timm's attention half of a transformer block."""
    return lambda x: block.ls1(block.attn(block.norm1(x)))


def channels(block: Any) -> Field:
    """timm's mixer over channels."""
    return lambda x: block.mlp_channels(block.norm2(x))


def tokens(block: Any) -> Field:
    """timm's mixer over tokens."""
    return lambda x: block.mlp_tokens(block.norm1(x).transpose(1, 2)).transpose(1, 2)


# Package, name, options, the blocks' container, how many additions a block has and which of them, F, first block
KINDS: list[tuple[Any, str, dict[str, Any], str, int, int, Callable[[Any], Field], int]] = [
    (torchvision, "resnet18", {"size": 16}, "layer1", 1, 0, basic, 0),
    (torchvision, "resnet34", {"size": 16}, "layer2", 1, 0, basic, 1),
    (torchvision, "resnet50", {"size": 8}, "layer1", 1, 0, bottleneck, 1),
    (torchvision, "resnext50_32x4d", {"size": 16}, "layer3", 1, 0, bottleneck, 1),
    (torchvision, "mobilenet_v2", {"size": 32}, "features", 1, 0, lambda b: b.conv, 9),
    (torchvision, "convnext_tiny", {"size": 16}, "features.5", 1, 0,
     lambda b: lambda x: b.layer_scale * b.block(x), 0),
    (timm, "vit_tiny_patch16_224", {"img_size": 32}, "blocks", 2, 0, of_attention, 0),
    (timm, "vit_tiny_patch16_224", {"img_size": 32}, "blocks", 2, 1, lambda b: lambda x: b.ls2(b.mlp(b.norm2(x))), 0),
    (timm, "mixer_s32_224", {"img_size": 32}, "blocks", 2, 0, tokens, 0),
    (timm, "mixer_s32_224", {"img_size": 32}, "blocks", 2, 1, channels, 0),
    (timm, "resmlp_12_224", {"img_size": 16}, "blocks", 2, 1,
     lambda b: lambda x: b.ls2 * b.mlp_channels(b.norm2(x)), 0),
    (transformers, "GPT2", GPT, "h", 2, 1, lambda b: lambda x: b.mlp(b.ln_2(x)), 0),
    (transformers, "Llama", DECODER, "layers", 2, 1, lambda b: lambda x: b.mlp(b.post_attention_layernorm(x)), 0),
]  # fmt: skip


def put_into_use(model: nn.Module) -> None:
    """Scales that start near 0 switched on, statistics and gains away from their start."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "layer_scale" in name or name.rpartition(".")[2] in ("ls1", "ls2", "gamma"):
                parameter.fill_(0.5)
            elif parameter.ndim == 1 and name.endswith("weight"):
                parameter.mul_(0.8 + 0.4 * torch.rand_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2)


def jacobian(field: Field, x: Tensor) -> Tensor:
    """∂F/∂x of one sample, dense, (n, n)."""
    rows = torch.autograd.functional.jacobian(field, x, vectorize=False)
    return rows.reshape(x.numel(), x.numel())


def compared(kind: tuple, lot: random.Random, twice: bool) -> str:
    """A line of the table."""
    make, name, options, container, additions, place, branch, first = kind
    torch.manual_seed(lot.randrange(10**6))
    if twice:
        options = {k: 2 * v if k in ("size", "img_size") else v for k, v in options.items()}
    size = options.get("size") or options.get("img_size")
    if make is timm:  # zoo's input is of `size`
        options = {**options, "size": size}
    model, x = make(name, **options)
    model.eval()
    put_into_use(model)
    blocks = dict(model.get_submodule(container).named_children())
    names = [n for n in blocks if int(n) >= first]
    if name == "mobilenet_v2":
        names = [n for n in names if getattr(blocks[n], "use_res_connect", False)]
    at = lot.choice(names)
    place_name = f"{container}.{at}"
    begun = time.process_time()
    found = [a for a in trace(model, x).additions if f"{a.module}.".startswith(f"{place_name}.")]
    assert len(found) == additions, [a.name for a in found]
    spectrum = block_spectrum(found[place], model, 1, None, 0)
    row = SimpleNamespace(**spectrum.values)
    seconds = time.process_time() - begun

    wide = copy.deepcopy(model).double()
    module = wide.get_submodule(place_name)
    states: list[Tensor] = []
    field = branch(module)
    module.register_forward_pre_hook(lambda m, args: states.append(args[0].detach()))
    wide(**{k: v for k, v in x.items()}) if isinstance(x, dict) else wide(x.double())
    state = states[0]
    if place:  # the first addition comes before
        others = {"vit_tiny_patch16_224": of_attention, "mixer_s32_224": tokens}
        if name in others:
            state = state + others[name](module)(state)
        else:
            state = after_attention(name, module, wide, x, state)
    jac = jacobian(field, state.detach())
    eigenvalues = torch.linalg.eigvals(jac)
    sigma = torch.linalg.svdvals(jac + torch.eye(len(jac), dtype=jac.dtype))
    scale = eigenvalues.abs().max()
    off = []
    for got, key in (
        (row.rightmost, eigenvalues.real),
        (row.leftmost, -eigenvalues.real),
        (row.largest, eigenvalues.abs()),
    ):
        best = eigenvalues[key >= key.max() - 1e-9 * scale]
        off.append(float((best - got).abs().min().minimum((best.conj() - got).abs().min()) / scale))
    top = float(sigma[0])
    off_sigma = [abs(row.sigma_max - top) / top, abs(row.sigma_min - float(sigma[-1])) / top]
    way = "formed" if len(jac) <= SpectrumOptions.dense_up_to else "products"
    return (
        f"{make.__name__:13}{name:23}{found[place].name:14}{len(jac):7}  {way:9}{row.rightmost.real:8.4f}"
        f"{row.sigma_max:9.4f}{off[0]:10.1e}{max(off):10.1e}{off_sigma[0]:10.1e}{off_sigma[1]:10.1e}"
        f"{seconds:8.1f}  {'; '.join(spectrum.notes)}"
    )


def after_attention(name: str, module: Any, wide: Any, x: Any, state: Tensor) -> Tensor:
    """The state between the two additions of a block, as the norm of the second meets it."""
    norm = {"resmlp_12_224": "norm2", "GPT2": "ln_2", "Llama": "post_attention_layernorm"}[name]
    seen: list[Tensor] = []
    handle = getattr(module, norm).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    wide(**x) if isinstance(x, dict) else wide(x.double())
    handle.remove()
    return seen[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--twice", action="store_true", help="images of twice the size")
    given = parser.parse_args()
    beside_cpu_torch()
    torch.set_num_threads(1)
    lot = random.Random(given.seed)
    print(
        f"{'package':13}{'network':23}{'block':14}{'states':>7}  {'way':9}{'right λ':>8}{'σ max':>9}"
        f"{'λ off':>10}{'any λ':>10}{'σ off':>10}{'σ min':>10}{'seconds':>8}"
    )
    for kind in lot.sample(KINDS, given.blocks):
        print(compared(kind, lot, given.twice), flush=True)
    print(f"torch {torch.__version__}, seed {given.seed}")


if __name__ == "__main__":
    main()
