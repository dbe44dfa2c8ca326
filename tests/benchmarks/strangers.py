"""Networks that a user might bring, written when the rules were done: healthy ones left alone, broken ones named.

    python -m tests.benchmarks.strangers [WORD …]

With words only networks whose names hold one of them. Each broken one has one fault of known place, and one or
more causes that are right to say; "a sentence" is a note that tells of it without an alarm.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.nn.utils import parametrizations

from resode import ODEBlock, diagnose
from resode.networks import build
from tests.clinic.networks import LN, Chain, MeanHead, Residual, Tokens, data, flat, mlp, pooled, train
from tests.foreign_networks import GPT

W = 32
WHOLE = "whole network"


@dataclass
class Stranger:
    """A network, what it is given, and for a broken one its culprit and what may be said of it."""

    model: nn.Module
    x: Any = None
    target: Any = None
    culprit: str = ""
    causes: tuple[str, ...] = ()
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.x is None:
            self.x, self.target = data("digits").look()

    def broken(self, culprit: str, *causes: str) -> Stranger:
        self.culprit, self.causes = culprit, causes
        return self


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


# ------------------------------------------------------------------------------------------------ networks


class Gated(nn.Module):
    """SwiGLU behind RMSNorm, as in language models of 2023 on."""

    def __init__(self, width: int = W):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)
        self.sign, self.skip = 1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.down(f.silu(self.gate(h)) * self.up(h))
        return self.skip * x + self.sign * h if self.skip != 1 or self.sign != 1 else x + h


class SelfAttention(nn.Module):
    """torch's own multi-head attention, in front of which a norm stands."""

    def __init__(self, width: int = W):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attention(h, h, h, need_weights=False)[0]


def llama(depth: int = 5) -> nn.Module:
    return Chain(
        Tokens(W), [part for _ in range(depth) for part in (SelfAttention(), Gated())], MeanHead(W, True)
    )


class ResidualConv(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.skip = 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(f.silu(self.norm1(x)))
        h = self.conv2(f.silu(self.norm2(h)))
        return x + h if self.skip == 1 else self.skip * x + h


class ResidualUNet(nn.Module):
    """Residual blocks at two resolutions, joined by concatenation; a picture for a picture."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.stem, self.out = nn.Conv2d(1, c, 3, padding=1), nn.Conv2d(c, 1, 3, padding=1)
        self.down = nn.ModuleList([ResidualConv(c), ResidualConv(c)])
        self.shrink, self.grow = nn.Conv2d(c, c, 2, 2), nn.ConvTranspose2d(c, c, 2, 2)
        self.middle = nn.ModuleList([ResidualConv(c) for _ in range(3)])
        self.join = nn.Conv2d(2 * c, c, 1)
        self.up = nn.ModuleList([ResidualConv(c), ResidualConv(c)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.down:
            x = block(x)
        y = self.shrink(x)
        for block in self.middle:
            y = block(y)
        x = self.join(torch.cat([x, self.grow(y)], 1))
        for block in self.up:
            x = block(x)
        return self.out(x)


class Denoiser(nn.Module):
    """A diffusion model's: takes a picture and a time, and its last layer starts at 0."""

    def __init__(self, c: int = 16, depth: int = 5):
        super().__init__()
        self.stem, self.out = nn.Conv2d(1, c, 3, padding=1), nn.Conv2d(c, 1, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(1, c), nn.SiLU(), nn.Linear(c, c))
        self.blocks = nn.ModuleList([ResidualConv(c) for _ in range(depth)])
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.stem(x) + self.time(t)[:, :, None, None]
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Reader(nn.Module):
    """Rows of a digit through a GRU or an LSTM."""

    def __init__(self, cell: Callable[..., nn.RNNBase] = nn.GRU, layers: int = 2):
        super().__init__()
        self.rnn, self.out = cell(8, W, layers, batch_first=True), nn.Linear(W, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x.squeeze(1))[0][:, -1])


class Tied(nn.Module):
    """One block again and again."""

    def __init__(self, block: nn.Module, times: int):
        super().__init__()
        self.stem, self.block, self.out, self.times = flat(), block, nn.Linear(W, 10), times

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(self.times):
            x = self.block(x)
        return self.out(x)


class Equilibrium(nn.Module):
    """z = tanh(Wz + Ux), iterated from 0."""

    def __init__(self, gain: float, activation: Callable[[Tensor], Tensor] = torch.tanh):
        super().__init__()
        self.u, self.w, self.out = nn.Linear(64, W), nn.Linear(W, W), nn.Linear(W, 10)
        nn.init.orthogonal_(self.w.weight, gain)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.u(x.flatten(1))
        z = torch.zeros_like(x)
        for _ in range(30):
            z = self.activation(self.w(z) + x)
        return self.out(z)


class Experts(nn.Module):
    """A residual mixture of experts: of all, weighted, or of the first choice."""

    def __init__(self, experts: int = 4, hard: bool = False):
        super().__init__()
        self.norm, self.router = LN(W), nn.Linear(W, experts)
        self.experts, self.hard = nn.ModuleList([mlp(act=nn.GELU) for _ in range(experts)]), hard

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        p = self.router(h).softmax(-1)
        if not self.hard:
            return x + sum(p[:, i, None] * e(h) for i, e in enumerate(self.experts))
        weight, choice = p.max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = choice == i
            if chosen.any():
                y[chosen] = weight[chosen, None] * expert(h[chosen])
        return x + y


class Variational(nn.Module):
    """An autoencoder with exp(½ log σ²) of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(64, W), nn.ReLU(), nn.Linear(W, 8))
        self.decode = nn.Sequential(nn.Linear(4, W), nn.ReLU(), nn.Linear(W, 64))

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encode(x).chunk(2, 1)
        return self.decode(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))


class Graph(nn.Module):
    """Takes nodes and their neighbours' matrix."""

    def __init__(self, depth: int = 4):
        super().__init__()
        self.stem, self.out = nn.Linear(8, W), nn.Linear(W, 3)
        self.layers = nn.ModuleList([nn.Linear(W, W) for _ in range(depth)])

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + f.relu(layer(adjacency @ x))
        return self.out(x.mean(1))


class Masked(nn.Module):
    """A small BERT: takes input_ids and attention_mask, and gives a mapping."""

    def __init__(self, depth: int = 4):
        super().__init__()
        self.embed = nn.Embedding(20, W)
        layer = [nn.TransformerEncoderLayer(W, 4, 2 * W, 0.1, batch_first=True) for _ in range(depth)]
        self.layers, self.head = nn.ModuleList(layer), nn.Linear(W, 20)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=attention_mask == 0)
        return {"logits": self.head(x)}


class Towers(nn.Module):
    """Two towers, normalised and compared."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Sequential(flat(), *[Residual(mlp(), LN(W)) for _ in range(3)]) for _ in range(2)
        )
        self.temperature = nn.Parameter(torch.tensor(2.6))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.temperature.exp() * f.normalize(self.a(a), dim=1) @ f.normalize(self.b(b), dim=1).T


class Adapted(nn.Module):
    """A linear layer that is frozen, with a low rank beside it that starts at 0."""

    def __init__(self, layer: nn.Linear, rank: int = 4):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(x))


class Inverted(nn.Module):
    """MobileNet's block: wide in the middle, a convolution of each channel, ReLU6, no activation at its end."""

    def __init__(self, c: int = 8):
        super().__init__()
        wide = 4 * c
        self.conv = nn.Sequential(
            nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, c, 1, bias=False), nn.BatchNorm2d(c),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class DenseLayer(nn.Module):
    def __init__(self, c: int, growth: int = 8):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(c), nn.Conv2d(c, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(f.relu(self.norm(x)))], 1)


class Tasks(nn.Module):
    """One of three heads in use."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(flat(), *[Residual(mlp(), LN(W)) for _ in range(4)])
        self.heads = nn.ModuleDict({n: nn.Linear(W, 10) for n in ("digit", "writer", "style")})

    def forward(self, x: Tensor) -> Tensor:
        return self.heads["digit"](self.body(x))


def mobile(depth: int = 5) -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    return Chain(stem, [Inverted() for _ in range(depth)], pooled(8))


def dense(depth: int = 4) -> nn.Module:
    return Chain(
        nn.Conv2d(1, 8, 3, padding=1), [DenseLayer(8 + 8 * i) for i in range(depth)], pooled(8 + 8 * depth)
    )


def vgg() -> nn.Module:
    """Convolutions without norms, with torch's own start."""
    sizes = [1, 16, 16, 32, 32]
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, W), nn.ReLU(), nn.Linear(W, 10)
    )


def dropped() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for i in (64, 128, 128):
        layers += [nn.Linear(i, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def normed() -> nn.Module:
    def layer() -> nn.Module:
        return parametrizations.spectral_norm(nn.Conv2d(16, 16, 3, padding=1))

    blocks = [Residual(nn.Sequential(nn.ReLU(), layer(), nn.ReLU(), layer())) for _ in range(5)]
    return Chain(nn.Conv2d(1, 16, 3, padding=1), blocks, pooled(16))


def rezero(depth: int = 16) -> nn.Module:
    blocks = [Residual(mlp(), scale=nn.Parameter(torch.zeros(1))) for _ in range(depth)]
    return Chain(flat(), blocks, nn.Linear(W, 10))


def layerscale(depth: int = 12) -> nn.Module:
    blocks = [Residual(mlp(act=nn.GELU), LN(W), nn.Parameter(torch.full((W,), 1e-6))) for _ in range(depth)]
    return Chain(flat(), blocks, nn.Sequential(LN(W), nn.Linear(W, 10)))


def norm_free(depth: int = 10) -> nn.Module:
    """Fixup-like: branches whose last layers start at 0, without norms."""
    return Chain(flat(), [Residual(mlp(last=0.0)) for _ in range(depth)], nn.Linear(W, 10))


def pinn() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(2, W), nn.Tanh()]
    for _ in range(4):
        layers += [nn.Linear(W, W), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(W, 1))


class Field(nn.Module):
    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.net, self.rate = mlp(act=nn.Tanh, last=0.5), rate

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x) - self.rate * torch.cat([x[:, : W // 2], 0 * x[:, W // 2 :]], 1)


def node(rate: float = 0.0) -> nn.Module:
    return nn.Sequential(flat(), ODEBlock(Field(rate)), nn.Linear(W, 10))


def trained(model: nn.Module, updates: int = 150, lr: float = 3e-3) -> nn.Module:
    train(model, data("digits"), updates, lr)
    return model.eval()


def fitted(model: nn.Module, x: Any, y: Tensor, updates: int = 200, lr: float = 3e-3) -> nn.Module:
    """By squared errors."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(updates):
        value = f.mse_loss(model(*x) if isinstance(x, tuple) else model(x), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return model.eval()


# ------------------------------------------------------------------------------------------------- healthy


def years() -> Stranger:
    """Regression of numbers near 2000 by a small MLP."""
    x = torch.randn(256, 6)
    y = 2000 + 10 * x[:, :1]
    model = nn.Sequential(nn.Linear(6, W), nn.ReLU(), nn.Linear(W, W), nn.ReLU(), nn.Linear(W, 1))
    nn.init.constant_(model[4].bias, 2000.0)  # type: ignore[arg-type]
    return Stranger(fitted(model, x, y), x[:32], y[:32])


def raw_pixels() -> Stranger:
    """Inputs from 0 to 255, and trained on them."""
    d = data("digits")
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, W), nn.ReLU(), nn.Linear(W, W), nn.ReLU(), nn.Linear(W, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for i in range(200):
        rows = slice(64 * i % 1024, 64 * i % 1024 + 64)
        value = f.cross_entropy(model(96 * d.x[rows] + 78), d.y[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return Stranger(model, 96 * d.test_x[:32] + 78, d.test_y[:32])


def few_updates() -> Stranger:
    """Batch norm after ten batches at momentum 0.1: a third of its statistics is still the start."""
    model = build("resnet20", in_channels=1, width=8)
    train(model, data("digits"), 10, 1e-3)
    return Stranger(model)


def finetuned() -> Stranger:
    model = trained(llama(3))
    for p in model.parameters():
        p.requires_grad_(False)
    model.head.out = nn.Linear(W, 10)  # type: ignore[union-attr]
    return Stranger(model)


def low_rank() -> Stranger:
    model = trained(llama(3))
    for p in model.parameters():
        p.requires_grad_(False)
    for block in model.blocks[1::2]:  # type: ignore[index]
        block.down = Adapted(block.down)
    return Stranger(model)


def pruned() -> Stranger:
    """Nine tenths of the weights at 0, the smallest ones, and trained on."""
    model = trained(Chain(flat(128), [Residual(mlp(128), LN(128)) for _ in range(4)], nn.Linear(128, 10)))
    for m in model.modules():
        if isinstance(m, nn.Linear):
            w = m.weight.data
            w[w.abs() < w.abs().quantile(0.9)] = 0
    return Stranger(trained(model, 50, 1e-3))


def graph() -> tuple[Tensor, Tensor]:
    a = (torch.rand(32, 6, 6) < 0.4).float() + torch.eye(6)
    return torch.randn(32, 6, 8), a / a.sum(-1, keepdim=True)


def sentences() -> dict[str, Tensor]:
    mask = (torch.arange(10) < torch.randint(4, 11, (16, 1))).long()
    return {"input_ids": torch.randint(1, 20, (16, 10)) * mask, "attention_mask": mask}


def denoiser() -> Stranger:
    return Stranger(Denoiser(), (data("digits").test_x[:32], torch.rand(32, 1)))


def unet() -> Stranger:
    d = data("digits")
    model = fitted(ResidualUNet(), d.x[:64] + torch.randn(64, 1, 8, 8), d.x[:64], 80)
    return Stranger(model, d.test_x[:32], d.test_x[:32])


def points() -> Stranger:
    x = 2 * torch.rand(256, 2) - 1
    y = torch.sin(math.pi * x[:, :1]) * torch.exp(-x[:, 1:])
    return Stranger(fitted(pinn(), x, y), x[:32], y[:32])


def policy() -> Stranger:
    """A fresh actor whose last layer starts a hundred times smaller."""
    model = nn.Sequential(nn.Linear(17, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 6))
    model[4].weight.data *= 0.01
    return Stranger(model, torch.randn(32, 17))


def brighter() -> Stranger:
    """Trained statistics, and pictures of twice the contrast."""
    model = trained(build("resnet20", in_channels=1, width=8), 100)
    return Stranger(model, 2 * data("digits").test_x[:32], data("digits").test_y[:32])


def sequence_model() -> Stranger:
    """A GPT as GPT-2 starts it: weights of 0.02, those that end a branch divided by √(2L)."""
    model = GPT(6, W)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02 / (12**0.5 if "proj" in name or ".out" in name else 1))
    return Stranger(model, *data("sequences").look())


HEALTHY: dict[str, Callable[[], Stranger]] = {
    "regression of years, small MLP": years,
    "pixels of 0–255, trained so": raw_pixels,
    "residual U-Net, trained": unet,
    "denoiser of (x, t), last layer 0": denoiser,
    "GRU of two layers, trained": lambda: Stranger(trained(Reader(), 250)),
    "LSTM, fresh": lambda: Stranger(Reader(nn.LSTM, 1)),
    "GPT as GPT-2 starts it": sequence_model,
    "SwiGLU and RMSNorm, trained": lambda: Stranger(trained(llama())),
    "fine-tuned, the rest frozen": finetuned,
    "low-rank adapters, fresh": low_rank,
    "resnet20, brighter pictures": brighter,
    "resnet20, ten updates": few_updates,
    "ReZero, fresh": lambda: Stranger(rezero()),
    "LayerScale 1e-6, fresh": lambda: Stranger(layerscale()),
    "Fixup-like, trained": lambda: Stranger(trained(norm_free())),
    "one block 12 times": lambda: Stranger(trained(Tied(Residual(mlp(last=0.3), LN(W)), 12))),
    "equilibrium, contracting": lambda: Stranger(trained(Equilibrium(0.7))),
    "experts, weighted": lambda: Stranger(
        trained(nn.Sequential(flat(), Experts(), Experts(), nn.Linear(W, 10)))
    ),
    "experts, first choice": lambda: Stranger(
        trained(nn.Sequential(flat(), *[Experts(hard=True) for _ in range(4)], nn.Linear(W, 10)))
    ),
    "variational autoencoder": lambda: Stranger(
        Variational(), data("digits").test_x[:32], data("digits").test_x[:32].flatten(1)
    ),
    "graph and neighbours": lambda: Stranger(Graph(), graph()),
    "BERT with a mask, as a mapping": lambda: Stranger(Masked(), sentences()),
    "two towers": lambda: Stranger(
        Towers(), (data("digits").test_x[:32], data("digits").test_x[:32].flip(-1))
    ),
    "spectral norms, trained": lambda: Stranger(trained(normed())),
    "MobileNet's blocks, trained": lambda: Stranger(trained(mobile())),
    "dense blocks, trained": lambda: Stranger(trained(dense())),
    "VGG without norms, trained": lambda: Stranger(trained(vgg())),
    "dropout and batch norm, trained": lambda: Stranger(trained(dropped())),
    "nine tenths pruned": pruned,
    "three heads, one in use": lambda: Stranger(trained(Tasks())),
    "tanh network of a PDE": points,
    "actor of small last layer": policy,
    "neural ODE": lambda: Stranger(trained(node(), 80)),
}


# -------------------------------------------------------------------------------------------------- broken


@torch.no_grad()
def times(s: Stranger, layer: str, c: float, *causes: str, culprit: str = "") -> Stranger:
    """A stranger one of whose layers is multiplied."""
    for p in s.model.get_submodule(layer).parameters(recurse=False):
        p.mul_(c)
    return s.broken(culprit or layer, *causes)


@torch.no_grad()
def bias(s: Stranger, layer: str, value: float, culprit: str, *causes: str) -> Stranger:
    s.model.get_submodule(layer).bias.fill_(value)  # type: ignore[union-attr]
    return s.broken(culprit, *causes)


def put(s: Stranger, module: str, culprit: str, causes: tuple[str, ...], **values: Any) -> Stranger:
    for name, value in values.items():
        setattr(s.model.get_submodule(module), name, value)
    return s.broken(culprit, *causes)


def scaled_pixels() -> Stranger:
    """Pictures of 0–255 for batch norm that met normalised ones."""
    s = Stranger(trained(mobile()))
    s.x = 96 * s.x + 78
    return s.broken("stem.1", "norm-statistics")


def missing_variance() -> Stranger:
    """A checkpoint without running variances, loaded as 0."""
    s = Stranger(trained(mobile()))
    s.model.get_submodule("blocks.2.conv.4").running_var.zero_()  # type: ignore[operator]
    return s.broken("blocks.2.conv.4", "norm-statistics", "non-finite")


def nan_in_gru() -> Stranger:
    s = Stranger(trained(Reader(), 20))
    s.model.rnn.weight_ih_l0.data[3, 3] = math.nan  # type: ignore[union-attr]
    return s.broken("rnn", "non-finite")


def exploding_gru() -> Stranger:
    s = Stranger(Reader(functools.partial(nn.RNN, nonlinearity="relu"), 1))
    nn.init.orthogonal_(s.model.rnn.weight_hh_l0, 6.0)  # type: ignore[union-attr]
    return s.broken("rnn", "explosion")


def detached() -> Stranger:
    s = Stranger(trained(llama()))
    block = s.model.blocks[5]  # type: ignore[index]
    down = block.down
    block.down = Calls(lambda h: down(h).detach())
    return s.broken("blocks.5", "idle", "no-shortcut")


def branch_alone() -> Stranger:
    s = Stranger(trained(Chain(flat(), [Residual(mlp(), LN(W)) for _ in range(6)], nn.Linear(W, 10))))
    return put(s, "blocks.4", "blocks.4", ("no-shortcut",), factor=None)


def zero_temperature() -> Stranger:
    """Scores of attention beyond what float32 holds."""
    s = Stranger(trained(llama(3)))
    s.model.blocks[2].attention.in_proj_weight.data *= 1e25  # type: ignore[index]
    return s.broken("blocks.2.attention", "non-finite")


def overflowing_noise() -> Stranger:
    s = HEALTHY["variational autoencoder"]()
    s.model.encode[3].bias.data[4:] = 500.0  # type: ignore[index]
    return s.broken("decode.0", "non-finite")


def constant_feature() -> Stranger:
    """A feature of standard deviation 0, divided by it."""
    x = torch.randn(32, 6)
    x[:, 2] = 1.0
    net = nn.Sequential(
        Calls(lambda x: (x - x.mean(0)) / x.std(0)), nn.Linear(6, W), nn.ReLU(), nn.Linear(W, 2)
    )
    return Stranger(net, x).broken("0", "non-finite")


def alike_tokens() -> Stranger:
    """An embedding whose rows are all the same."""
    s = Stranger(GPT(4, W), *data("sequences").look())
    name = next(n for n, m in s.model.named_modules() if isinstance(m, nn.Embedding))
    embedding = s.model.get_submodule(name)
    embedding.weight.data[:] = embedding.weight.data[:1]  # type: ignore[index]
    return s.broken(WHOLE, "collapse")


def zero_layer() -> Stranger:
    """A layer loaded as 0."""
    s = Stranger(trained(vgg()))
    return times(s, "4", 0.0, "dead", "collapse", "idle")


def growing_tied() -> Stranger:
    return Stranger(Tied(Residual(mlp()), 40)).broken(WHOLE, "explosion")


def half() -> Stranger:
    s = Stranger(Chain(flat(), [Residual(mlp(last=0.3)) for _ in range(5)], nn.Linear(W, 10)).half())
    s.model.get_submodule("blocks.1.branch.2").weight.data *= 3e4  # type: ignore[operator]
    s.x = 100 * s.x.half()
    return s.broken("blocks.1.branch", "non-finite", "strong-block")


def silent_expert() -> Stranger:
    """Of four weighted experts one that the router gives nothing to, by its bias."""
    blocks = [Experts() for _ in range(4)]
    s = Stranger(trained(nn.Sequential(flat(), *blocks, nn.Linear(W, 10))))
    s.model[2].router.bias.data[1] = -1e3  # type: ignore[index]
    return s.broken("2.experts.1", "idle", "a sentence")


def unchosen_expert() -> Stranger:
    s = HEALTHY["experts, first choice"]()
    for block in s.model[1:5]:  # type: ignore[index]
        block.router.weight.data.div_(3)
        block.router.bias.data.zero_()
    s.model[2].router.bias.data[1] = -1e3  # type: ignore[index]
    return s.broken("2.experts.1", "a sentence")


def head_bias() -> Stranger:
    s = Stranger(trained(Tasks()))
    nn.init.normal_(s.model.get_submodule("heads.digit").bias, std=1e5)  # type: ignore[arg-type]
    return s.broken("heads.digit", "collapse")


def identical() -> Stranger:
    s = Stranger(vgg())
    for p in s.model.parameters():
        p.data.fill_(0.02)
    return s.broken(WHOLE, "collapse")


def sigmoids() -> Stranger:
    layers = [m for _ in range(14) for m in (nn.Linear(W, W), nn.Sigmoid())]
    return Stranger(nn.Sequential(flat(), *layers, nn.Linear(W, 10))).broken(WHOLE, "vanishing", "collapse")


def hot() -> Stranger:
    s = Stranger(Chain(flat(), [Residual(mlp(), LN(W)) for _ in range(4)], nn.Linear(W, 10)))
    s.lr = 100.0
    return s.broken(WHOLE, "learning-rate")


def no_batches() -> Stranger:
    """Trained, and its statistics never updated: momentum 0."""
    model = mobile()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0
    return Stranger(trained(model)).broken(WHOLE, "norm-statistics")


BROKEN: dict[str, Callable[[], Stranger]] = {
    "NaN in a GRU": nan_in_gru,
    "RNN of relu, orthogonal ×6": exploding_gru,
    "SwiGLU ×30": lambda: times(
        Stranger(trained(llama())), "blocks.5.down", 30, "strong-block", culprit="blocks.5"
    ),
    "SwiGLU ×1e-8": lambda: times(
        Stranger(trained(llama())), "blocks.3.down", 1e-8, "idle", culprit="blocks.3"
    ),
    "RMSNorm of 0": lambda: times(Stranger(trained(llama())), "blocks.7.norm", 0, "idle", culprit="blocks.7"),
    "RMSNorm ×40": lambda: times(
        Stranger(trained(llama())), "blocks.7.norm", 40, "strong-block", culprit="blocks.7"
    ),
    "SwiGLU subtracted": lambda: put(
        Stranger(trained(llama())), "blocks.5", "blocks.5", ("subtracted-branch",), sign=-1.0
    ),
    "SwiGLU's state halved": lambda: put(
        Stranger(trained(llama())), "blocks.5", "blocks.5", ("scaled-shortcut",), skip=0.5
    ),
    "SwiGLU detached": detached,
    "scores of attention overflow": zero_temperature,
    "U-Net's middle ×25": lambda: times(unet(), "middle.1.conv2", 25, "strong-block", culprit="middle.1"),
    "U-Net's state doubled": lambda: put(unet(), "up.1", "up.1", ("scaled-shortcut",), skip=2.0),
    "U-Net's block idle": lambda: times(unet(), "down.1.conv2", 1e-7, "idle", culprit="down.1"),
    "denoiser's conv ×50": lambda: times(
        denoiser(), "blocks.2.conv2", 50, "strong-block", culprit="blocks.2"
    ),
    "branch without its shortcut": branch_alone,
    "MobileNet's block dead": lambda: bias(
        Stranger(trained(mobile())), "blocks.3.conv.4", -50.0, "blocks.3", "dead", "idle"
    ),
    "0–255 for normalised statistics": scaled_pixels,
    "a running variance of 0": missing_variance,
    "statistics never updated": no_batches,
    "one block of 40, no norm": growing_tied,
    "equilibrium that expands": lambda: Stranger(Equilibrium(3.0, f.relu)).broken(WHOLE, "explosion"),
    "graph layer ×40": lambda: times(Stranger(Graph(6), graph()), "layers.2", 40, "strong-block"),
    "BERT's layer ×30": lambda: times(
        Stranger(Masked(6), sentences()), "layers.2.linear2", 30, "strong-block", culprit="layers.2"
    ),
    "VGG's conv ×60": lambda: times(Stranger(trained(vgg())), "2", 60, "strong-block"),
    "VGG's conv at 0": zero_layer,
    "dense layer ×1e-8": lambda: times(
        Stranger(trained(dense(6))), "blocks.2.conv", 1e-8, "idle", culprit="blocks.2"
    ),
    "bias of the head": head_bias,
    "noise overflows": overflowing_noise,
    "division by a deviation of 0": constant_feature,
    "embedding of equal rows": alike_tokens,
    "equal weights": identical,
    "14 sigmoids": sigmoids,
    "float16 overflows": half,
    "expert of gate 0": silent_expert,
    "expert that no sample reaches": unchosen_expert,
    "learning rate 100": hot,
    "stiff neural ODE": lambda: Stranger(node(3000.0)).broken("1", "stiff"),
}


def main(words: list[str]) -> None:
    """A line a network, and how many were right."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    begun = time.monotonic()
    alarmed = [0, 0]
    for name, make in HEALTHY.items():
        if words and not any(w in name for w in words):
            continue
        torch.manual_seed(0)
        s = make()
        found = diagnose(s.model.eval(), s.x, s.target)
        alarmed[0] += not found.ok
        alarmed[1] += 1
        said = "; ".join(found.notes) if found.ok else f"ALARMED {found.findings[0]}"
        print(f"{name:36}{len(found.rows):>4} additions  {said}", flush=True)
    right = [0, 0, 0]
    for name, make in BROKEN.items():
        if words and not any(w in name for w in words):
            continue
        torch.manual_seed(0)
        s = make()
        found = diagnose(s.model.eval(), s.x, s.target, lr=s.lr)
        if found.ok:
            place, cause = ("", "a sentence") if s.culprit in " ".join(found.notes) else ("", "nothing")
            place = s.culprit if cause == "a sentence" else ""
        else:
            place, cause = found.findings[0].block, found.findings[0].cause
        near = place == s.culprit or place.startswith(f"{s.culprit}.") or s.culprit.startswith(f"{place}.")
        for i, value in enumerate((True, bool(place) and near, cause in s.causes)):
            right[i] += value
        mark = "" if near and place and cause in s.causes else "  WRONG"
        print(f"{name:36}{s.culprit}: {place or '-'} {cause}{mark}", flush=True)
    print(f"\nhealthy alarmed: {alarmed[0]} of {alarmed[1]}")
    print(f"broken: block right {right[1]}, cause right {right[2]} of {right[0]}")
    print(f"torch {torch.__version__}, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
