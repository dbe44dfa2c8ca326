"""Faults of known place and cause, each made in a healthy network."""

from __future__ import annotations

import itertools
import math
import random
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resode import ODEBlock, SolverError
from resode.fields import MLPField
from resode.fields.conv import ConvField
from resode.networks.perceptron import PlainMLP
from resode.networks.resnet import BasicBlock, PreActBlock
from tests.clinic.networks import (
    HEALTHY,
    LN,
    Chain,
    Dense,
    Gated,
    Loop,
    Reader,
    Recurrent,
    Residual,
    data,
    flat,
    healthy,
    mlp,
    plain,
    residual_mlps,
    settle,
    stack_net,
)
from tests.foreign_networks import GPTBlock, HFBasicLayer

BLOCKS = (Residual, BasicBlock, PreActBlock, HFBasicLayer, GPTBlock, MLPField, ConvField)
WHOLE = "whole network"


@dataclass
class Broken:
    """A network with one fault.

    Args:
        name: of the fault and the healthy network.
        model: in evaluation mode.
        task: of its data.
        culprit: the module's name, or "whole network".
        causes: what may be said of it, best first.
        lr: the learning rate to diagnose, where that is the fault.
        origin: the healthy network's name, or "" for one that is built so.
    """

    name: str
    model: nn.Module
    task: str
    culprit: str
    causes: tuple[str, ...]
    lr: float | None = None
    origin: str = ""

    @property
    def cause(self) -> str:
        return self.causes[0]


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, BLOCKS)]


def branch_layers(block: nn.Module) -> list[nn.Module]:
    """The modules with weights on the branch, in their order."""
    skip: set[nn.Module] = set()
    for part in ("downsample", "shortcut", "post"):
        if isinstance(own := getattr(block, part, None), nn.Module):
            skip |= set(own.modules())
    return [
        m for m in block.modules() if m not in skip and isinstance(getattr(m, "weight", None), nn.Parameter)
    ]


def last_layer(block: nn.Module) -> nn.Module:
    layers = branch_layers(block)
    if isinstance(
        block, BasicBlock | PreActBlock | ConvField
    ):  # declared as they are called, but for PreActBlock
        return block.bn2 if isinstance(block, BasicBlock) else block.conv2
    if isinstance(block, Residual):
        return [m for m in layers if m in set(block.branch.modules())][-1]
    return layers[-1]


def tail(block: nn.Module) -> list[nn.Module]:
    """The layers whose outputs are the branch's: two in a GPT block."""
    return [block.proj, block.out] if isinstance(block, GPTBlock) else [last_layer(block)]


@torch.no_grad()
def scaled(block: nn.Module, c: float) -> None:
    for layer in tail(block):
        layer.weight.mul_(c)
        if layer.bias is not None:
            layer.bias.mul_(c)


Fault = Callable[[nn.Module, random.Random], str | None]


def _pick(model: nn.Module, rng: random.Random, wanted: Callable[[nn.Module], bool] = lambda m: True):
    found = [(n, m) for n, m in blocks_of(model) if wanted(m)]
    return (
        rng.choice(found)
        if len(found) >= 4 or (found and wanted is not None and len(found) >= 3)
        else (None, None)
    )


def strong(model, rng, c=15.0):
    name, block = _pick(model, rng)
    if name:
        scaled(block, c)
    return name


def noisy(model, rng):
    """A block's weights replaced by noise, ten times as large."""
    name, block = _pick(model, rng, lambda m: not any(isinstance(x, _BatchNorm) for x in m.modules()))
    if name:
        for layer in tail(block):
            w = layer.weight.data
            generator = torch.Generator().manual_seed(rng.randrange(1000))
            w.copy_(torch.randn(w.shape, generator=generator) * max(float(w.std()), 0.05) * 15)
    return name


def idle(model, rng):
    name, block = _pick(model, rng)
    if name:
        scaled(block, 1e-7)
    return name


def half_idle(model, rng):
    """One of a block's two parallel branches."""
    name, block = _pick(model, rng, lambda m: isinstance(m, GPTBlock) and m.parallel)
    if name:
        with torch.no_grad():
            for p in block.out.parameters():
                p.mul_(1e-7)
    return name


def constant(model, rng):
    """Weights collapsed behind a bias that hides it."""
    name, block = _pick(model, rng, lambda m: all(x.bias is not None for x in tail(m)))
    if name:
        with torch.no_grad():
            for layer in tail(block):
                layer.weight.mul_(1e-7)
                layer.bias.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.5)
    return name


def small_variance(model, rng):
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    if not norms:
        return None
    name, norm = rng.choice(norms)
    norm.running_var.mul_(1e-5)
    return name


def never_updated(model, rng):
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    for _, norm in norms:
        norm.reset_running_stats()
    far = [n for n, m in norms]
    return (WHOLE if len(far) > 1 else far[0]) if far else None


def nan_weight(model, rng):
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    name, layer = rng.choice(layers)
    layer.weight.data.flatten()[rng.randrange(layer.weight.numel())] = math.nan
    return name


class Log(nn.Module):
    """log x, or log max(x, ε)."""

    least = 0.0

    def forward(self, x):
        return torch.log(x.clamp_min(self.least) if self.least else x)


class RootAtZero(nn.Module):
    """√(x where x > 0), or √(ε + …)."""

    least = 0.0

    def forward(self, x):
        return torch.sqrt(torch.abs(x * (x > 0)) + self.least)


def log_of_negative(model, rng):
    name, block = _pick(model, rng, lambda m: isinstance(m, Residual))
    if name:
        block.branch = nn.Sequential(block.branch, Log())
    return name


def infinite_slope(model, rng):
    """A finite output whose gradient is 0·∞."""
    name, block = _pick(model, rng, lambda m: isinstance(m, Residual))
    if name:
        block.branch = nn.Sequential(block.branch, RootAtZero())
    return name


class Times(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, x):
        return self.c * x


def _shortcut(model, rng, c):
    def has_one(m):
        own = getattr(m, "downsample", getattr(m, "shortcut", None))
        return isinstance(m, Residual) or (
            isinstance(own, nn.Module) and not list(own.parameters()) and "Pad" not in type(own).__name__
        )

    name, block = _pick(model, rng, has_one)
    if isinstance(block, Residual):
        block.factor = None if c is None else block.factor * c
    elif name:
        setattr(block, "downsample" if hasattr(block, "downsample") else "shortcut", Times(c or 0.0))
    return name


def no_shortcut(model, rng):
    return _shortcut(model, rng, None)


def zeroed_shortcut(model, rng):
    return _shortcut(model, rng, 0.0)


def gpt_without_shortcut(model, rng):
    name, block = _pick(model, rng, lambda m: isinstance(m, GPTBlock) and not m.parallel)
    if name:
        block.forward = types.MethodType(
            lambda self, x: self.attend(self.ln_1(x)) + self.mlp(self.ln_2(x)), block
        )
    return name


def half_shortcut(model, rng):
    return _shortcut(model, rng, 0.4)


def triple_shortcut(model, rng):
    return _shortcut(model, rng, 3.0)


def subtracted(model, rng):
    name, block = _pick(
        model, rng, lambda m: isinstance(m, Residual) and not isinstance(m.scale, nn.Parameter)
    )
    if name:
        block.sign = -1
    return name


def subtracted_resnet(model, rng):
    name, block = _pick(model, rng, lambda m: isinstance(m, PreActBlock | BasicBlock))
    if name:

        def forward(self, x):
            s, r = self.branches(x)
            return s - r if isinstance(self, PreActBlock) else self.act(s - r)

        block.forward = types.MethodType(forward, block)
    return name


@torch.no_grad()
def dead(model, rng):
    """A bias that keeps a ReLU at 0."""

    def has(m):
        return isinstance(m, Residual) and any(isinstance(x, nn.ReLU) for x in m.branch.modules())

    name, block = _pick(model, rng, has)
    if name:
        layers = [m for m in block.branch.modules() if isinstance(m, nn.Linear | _BatchNorm | nn.GroupNorm)]
        relu = [m for m in block.branch.modules() if not list(m.children())]
        before = [
            m for m in relu[: next(i for i, m in enumerate(relu) if isinstance(m, nn.ReLU))] if m in layers
        ]
        before[-1].bias.sub_(1e3)
    return name


@torch.no_grad()
def dead_layer(model, rng):
    """The same in a network without shortcuts."""
    if blocks_of(model) or not isinstance(model, Chain):
        return None
    relus = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.Sequential) and len(m) > 1 and isinstance(m[-1], nn.ReLU)
    ]
    if not relus:
        return None
    name, layer = rng.choice(relus)
    layer[-2].bias.sub_(1e3)
    return name


@torch.no_grad()
def heavy_layer(model, rng):
    """One layer ×100 in a network without shortcuts, neither its last one nor one before a norm."""
    shortcuts = any(isinstance(m, Gated | ODEBlock) for m in model.modules())
    if blocks_of(model) or shortcuts or not isinstance(model, Chain | PlainMLP | nn.Sequential | Dense):
        return None
    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    layers = [
        (n, m)
        for (n, m), (_, after) in itertools.pairwise(leaves)
        if isinstance(m, nn.Linear | nn.Conv2d) and "Norm" not in type(after).__name__
    ]
    if len(layers) < 3:
        return None
    name, layer = rng.choice(layers)
    layer.weight.mul_(100)
    return name


@torch.no_grad()
def head_bias(model, rng):
    """A bias that drowns the logits."""
    heads = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 10]
    if not heads:
        return None
    name, head = heads[-1]
    head.bias.normal_(std=1e5, generator=torch.Generator().manual_seed(rng.randrange(1000)))
    return name


LOCAL: dict[str, tuple[tuple[str, ...], Fault]] = {
    "branch ×15": (("strong-block",), strong),
    "branch ×40": (("strong-block",), lambda m, r: strong(m, r, 40.0)),
    "branch of noise": (("strong-block",), noisy),
    "branch ×1e-7": (("idle",), idle),
    "half of two branches ×1e-7": (("idle",), half_idle),
    "weights ×1e-7 behind a bias": (("idle",), constant),
    "running variance ×1e-5": (("norm-statistics",), small_variance),
    "batch norm never updated": (("norm-statistics",), never_updated),
    "nan weight": (("non-finite",), nan_weight),
    "log of negative numbers": (("non-finite",), log_of_negative),
    "root at 0": (("non-finite",), infinite_slope),
    "no shortcut": (("no-shortcut",), no_shortcut),
    "shortcut ×0": (("no-shortcut",), zeroed_shortcut),
    "no shortcut in a GPT": (("no-shortcut",), gpt_without_shortcut),
    "shortcut ×0.4": (("scaled-shortcut",), half_shortcut),
    "shortcut ×3": (("scaled-shortcut",), triple_shortcut),
    "subtracted branch": (("subtracted-branch",), subtracted),
    "subtracted branch of a ResNet": (("subtracted-branch",), subtracted_resnet),
    "dead ReLU": (("dead", "idle"), dead),
    "dead layer": (("dead", "collapse"), dead_layer),
    "weights ×100": (("strong-block",), heavy_layer),
    "head's bias ×1e5": (("collapse",), head_bias),
}


PLAIN = ("plain", "resode plain", "converted")
EVERYWHERE = (
    "running variance ×1e-5",
    "batch norm never updated",
    "nan weight",
    "dead layer",
    "weights ×100",
    "head's bias ×1e5",
)
FILLING = ("branch of noise", "weights ×1e-7 behind a bias")
"""They fill a branch, which is no fault where all others are 0."""


class Damped(nn.Module):
    """F(x) − λ x on the first half of the features."""

    def __init__(self, net, rate):
        super().__init__()
        self.net, self.rate = net, rate

    def forward(self, x):
        mask = torch.zeros(x.shape[1], dtype=x.dtype)
        mask[: len(mask) // 2] = self.rate
        return self.net(x) - mask * x


class DampedInTime(Damped):
    def forward(self, t, x):
        return super().forward(x)


def _damped(solver, depth, eta, rate, which=None, substeps=1):
    def build():
        model = stack_net(solver, depth, substeps, eta)
        for i, f in enumerate(model[1].fields):
            if which is None or i == which:
                model[1].fields[i] = Damped(f, rate)
        return model

    return build


def _ode(rate, solver="dopri5", shared=True):
    def build():
        net = mlp(32, act=nn.Tanh, last=0.3)
        return nn.Sequential(flat(), ODEBlock(DampedInTime(net, rate), solver=solver), nn.Linear(32, 10))

    return build


def _constant_stem(depth, norm=None):
    def build():
        model = residual_mlps(depth, norm) if depth else plain(4)
        model.stem[1].weight.data.zero_()
        model.stem[1].bias.data.normal_()
        return model

    return build


def _odd(step):
    return lambda: Loop(6, 3, step)


def _alike():
    model = plain(4)
    for p in model.parameters():
        p.data.fill_(0.01)
    return model


BUILT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "60 blocks without norm": (lambda: residual_mlps(60), WHOLE, "explosion"),
    "40 blocks, gelu": (lambda: residual_mlps(40, act=nn.GELU), WHOLE, "explosion"),
    "100 blocks, wide": (lambda: residual_mlps(100, width=64), WHOLE, "explosion"),
    "stack of 60": (lambda: stack_net(depth=60, eta=1.0, act="relu"), WHOLE, "explosion"),
    "plain, four times He": (lambda: plain(20, gain=8.0), WHOLE, "explosion"),
    "plain 30, a tenth": (lambda: plain(30, gain=0.2), WHOLE, "vanishing"),
    "plain tanh 40": (lambda: plain(40, nn.Tanh, gain=0.3), WHOLE, "vanishing"),
    "plain sigmoid 12": (lambda: plain(12, nn.Sigmoid, gain=1.0), WHOLE, "vanishing collapse"),
    "shortcuts ×0.5, 16": (lambda: residual_mlps(16, factor=0.5, last=0.1), WHOLE, "vanishing"),
    "shortcuts ×0.3, 12": (lambda: residual_mlps(12, factor=0.3, last=0.1), WHOLE, "vanishing"),
    "constant stem": (_constant_stem(8, LN), WHOLE, "collapse"),
    "constant stem, no norm": (_constant_stem(6), WHOLE, "collapse"),
    "constant stem, plain": (_constant_stem(0), WHOLE, "collapse"),
    "euler oversteps in all": (_damped("euler", 8, 0.5, 8.0), "1", "overstep"),
    "euler oversteps in block 3": (_damped("euler", 8, 0.5, 14.0, 3), "1.fields.3", "overstep"),
    "rk4 oversteps": (_damped("rk4", 6, 0.5, 9.0), "1", "overstep"),
    "midpoint ×2 oversteps in 1": (_damped("midpoint", 6, 1.0, 12.0, 1, 2), "1.fields.1", "overstep"),
    "dopri5 on λ = −5000": (_ode(5000.0), "1", "stiff"),
    "dopri5 on λ = −1500": (_ode(1500.0), "1", "stiff"),
    "tsit5 on λ = −3000": (_ode(3000.0, "tsit5"), "1", "stiff"),
    "branch detached": (_odd(lambda x, f: x + f.detach()), "branches.3", "idle"),
    "state detached": (_odd(lambda x, f: x.detach() + f), "branches.3", "no-shortcut"),
    "no addition": (_odd(lambda x, f: f), "branches.3", "no-shortcut"),
    "state twice": (_odd(lambda x, f: x + x + f), "branches.3", "scaled-shortcut"),
    "minus in a loop": (_odd(lambda x, f: x - f), "branches.3", "subtracted-branch"),
    "equal weights": (_alike, WHOLE, "collapse"),
    "recurrent, explodes": (lambda: Recurrent(40, 1.0, 6.0, torch.relu, False), WHOLE, "explosion"),
    "nn.RNN explodes": (lambda: Reader(3.0, times=4), "rnn", "explosion"),
    "recurrent, vanishes": (lambda: Recurrent(40, 1.0, 0.3, torch.tanh, False), WHOLE, "vanishing"),
    "200 mild blocks": (lambda: residual_mlps(200, last=0.25), WHOLE, "explosion"),
    "stiff block of a stack": (_damped("dopri5", 3, 0.5, 4000.0, 1), "1.fields.1", "stiff"),
}  # fmt: skip

LONG = ("200 mild blocks", "pre-norm fresh 200")
"""Networks that take too long for every run of the tests."""

RATES = ("pre-norm mlp 8", "norm-free 12, 1/√L", "plain 4", "tanh 10", "stack euler", "wide 256")
"""Networks that diverge, fresh, at a learning rate of SGD that is 50 times one at which they train."""


def make(fault: str, origin: str, seed: int = 0) -> Broken | None:
    """A fault in a healthy network, at a place drawn by its names; None where it does not fit."""
    causes, change = LOCAL[fault]
    if origin.startswith(PLAIN) and fault not in EVERYWHERE:
        return None
    if origin in LONG and fault != "branch ×15":
        return None
    if origin == "zero-init fresh 30" and fault in FILLING:
        return None
    model = healthy(origin)
    culprit = change(model, random.Random(f"{fault} {origin} {seed}"))
    if culprit is None:
        return None
    return Broken(f"{fault}: {origin}", model.eval(), HEALTHY[origin].task, culprit, causes, None, origin)


def built(name: str, seed: int = 0) -> Broken:
    """A network that is built wrong, with its batch norms settled."""
    build, culprit, causes = BUILT[name]
    torch.manual_seed(seed)
    model = build()
    if "stiff" not in causes:
        settle(model, data("digits"))
    return Broken(name, model.eval(), "digits", culprit, tuple(causes.split()))


def too_fast(name: str, seed: int = 0) -> Broken:
    """A fresh network with a learning rate of SGD at which it diverges."""
    torch.manual_seed(seed)
    return Broken(
        f"lr 30: {name}", HEALTHY[name].build().eval(), "digits", WHOLE, ("learning-rate",), 30.0, name
    )


def broken(seed: int = 0) -> Iterator[Broken]:
    """Every fault in every healthy network that it fits, and those that are built so."""
    for fault in LOCAL:
        for origin in HEALTHY:
            if (patient := make(fault, origin, seed)) is not None:
                yield patient
    for name in BUILT:
        yield built(name, seed)
    for name in RATES:
        yield too_fast(name, seed)


def named_right(b: Broken, block: str) -> bool:
    """The culprit itself, a module within it, or the block that holds it."""
    if block == b.culprit:
        return True
    if WHOLE in (block, b.culprit):
        return b.culprit == WHOLE and b.cause == "norm-statistics"  # any of the norms
    return block.startswith(b.culprit + ".") or (b.culprit.startswith(block + ".") and len(block) > 0)


def output_change(b: Broken) -> float:
    """How far the fault moved the outputs of the network that it was made in; nan for others."""
    if not b.origin or b.lr is not None:
        return math.nan
    x, _ = data(b.task).look()
    try:
        with torch.no_grad():
            before, after = (_logits(m, x) for m in (healthy(b.origin), b.model))
    except (SolverError, ValueError):
        return math.inf
    size = float((after - before).norm() / before.norm())
    return size if math.isfinite(size) else math.inf


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    z = model(x)
    return (z["logits"] if isinstance(z, dict) else z).double()


__all__ = ["BLOCKS", "BUILT", "LOCAL", "Broken", "broken", "field", "named_right", "output_change"]
