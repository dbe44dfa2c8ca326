"""Small healthy networks of many kinds, trained in seconds on digits or on sequences, or fresh.

Where the environment variable RESODE_CLINIC names a folder, trained weights are kept there.
"""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as f

from resode import ODEBlock, ResidualStack, convert
from resode.fields import MLPField
from resode.networks import build
from resode.networks.perceptron import PlainMLP, ResidualMLP
from resode.training.data.datasets import load_data
from tests.foreign_networks import GPT, HFResNet

WIDTH = 32


class Residual(nn.Module):
    """y = post(cx ± s·F(norm(x))): a residual block whose parts can be broken one by one.

    Args:
        branch: F.
        norm: before F, or None.
        scale: s, a number, or a parameter of shape (1,) or (width,).
        post: after the sum, or None.
    """

    def __init__(self, branch, norm=None, scale=1.0, post=None, factor=1.0):
        super().__init__()
        self.branch, self.norm, self.post, self.scale = branch, norm, post, scale
        self.factor, self.sign = factor, 1

    def forward(self, x):
        h = self.branch(x if self.norm is None else self.norm(x))
        if isinstance(self.scale, nn.Parameter) or self.scale != 1:
            h = self.scale * h
        if self.factor is None:
            y = h
        else:
            s = x if self.factor == 1 else self.factor * x
            y = s + h if self.sign > 0 else s - h
        return y if self.post is None else self.post(y)


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (p.reshape(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        return self.out(f.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))


class Chain(nn.Module):
    """stem, blocks, head."""

    def __init__(self, stem, blocks, head):
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.Sequential(*blocks), head

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class Tokens(nn.Module):
    """An 8×8 picture as 16 patches of 2×2, embedded with their positions."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(0.1 * torch.randn(16, width))

    def forward(self, x):
        return self.embed(x).flatten(2).transpose(1, 2) + self.position


class MeanHead(nn.Module):
    def __init__(self, width, norm=False):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.out = nn.Linear(width, 10)

    def forward(self, x):
        return self.out(self.norm(x).mean(1))


def mlp(width=WIDTH, hidden=None, act=nn.ReLU, last=1.0, norms=False):
    """W₂ σ(W₁x) with He's start, the last layer times `last`."""
    hidden = hidden or width
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, width)
    nn.init.kaiming_normal_(first.weight, nonlinearity="relu")
    nn.init.kaiming_normal_(second.weight, nonlinearity="linear")
    second.weight.data *= last
    for layer in (first, second):
        nn.init.zeros_(layer.bias)
    if norms:
        return nn.Sequential(first, nn.BatchNorm1d(hidden), act(), second, nn.BatchNorm1d(width))
    return nn.Sequential(first, act(), second)


def flat(width=WIDTH):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width))


def conv(channels, norm, act=nn.ReLU):
    def layer():
        return nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    return nn.Sequential(norm(channels), act(), layer(), norm(channels), act(), layer())


def pooled(channels):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def group(channels):
    return nn.GroupNorm(4, channels)


def transformer(depth, width=WIDTH, post=False, scale=None, act=nn.GELU):
    blocks = []
    for _ in range(depth):
        for branch in (
            Attention(width),
            nn.Sequential(nn.Linear(width, 2 * width), act(), nn.Linear(2 * width, width)),
        ):
            norm = nn.LayerNorm(width)
            s = 1.0 if scale is None else nn.Parameter(torch.full((width,), scale))
            blocks.append(Residual(branch, None if post else norm, s, norm if post else None))
    return Chain(Tokens(width), blocks, MeanHead(width, norm=not post))


class Mixer(nn.Module):
    """Mixing over the 16 tokens."""

    def __init__(self, width):
        super().__init__()
        self.mix = mlp(16)

    def forward(self, x):
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


class Loop(nn.Module):
    """Branches in a list, added in one forward: x + F_i(x), or what stands for it at block `odd`."""

    def __init__(self, depth, odd=None, step=None):
        super().__init__()
        self.stem, self.out = flat(), nn.Linear(WIDTH, 10)
        self.branches = nn.ModuleList([nn.Sequential(LN(WIDTH), mlp(act=nn.GELU)) for _ in range(depth)])
        self.odd, self.step = odd, step

    def forward(self, x):
        x = self.stem(x)
        for i, branch in enumerate(self.branches):
            x = x + branch(x) if i != self.odd else self.step(x, branch(x))
        return self.out(x)


class Recurrent(nn.Module):
    """A cell of one's own, unrolled: h = h + η tanh(Wh + Ux), or without the shortcut."""

    def __init__(self, steps, eta=0.3, gain=1.0, act=torch.tanh, shortcut=True):
        super().__init__()
        self.u, self.w, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.w.weight.data *= gain
        self.steps, self.eta, self.act, self.shortcut = steps, eta, act, shortcut

    def forward(self, x):
        rows = x.squeeze(1)
        h = torch.zeros(len(rows), WIDTH)
        for t in range(self.steps):
            new = self.act(self.w(h) + self.u(rows[:, t % 8]))
            h = h + self.eta * new if self.shortcut else new
        return self.out(h)


class Reader(nn.Module):
    """Rows of the picture, so many times over, through torch's own recurrent layer."""

    def __init__(self, gain=None, cell=None, nonlinearity="relu", times=1):
        super().__init__()
        self.times = times
        self.rnn = (
            cell(8, WIDTH, batch_first=True) if cell else nn.RNN(8, WIDTH, 1, nonlinearity, batch_first=True)
        )
        if gain is not None:
            nn.init.orthogonal_(self.rnn.weight_hh_l0, gain)
        self.out = nn.Linear(WIDTH, 10)

    def forward(self, x):
        return self.out(self.rnn(x.squeeze(1).repeat(1, self.times, 1))[0][:, -1])


class UNet(nn.Module):
    """Two resolutions, joined by concatenation."""

    def __init__(self, c=8):
        super().__init__()
        self.down, self.deep = self.layer(1, c), self.layer(c, 2 * c)
        self.rise, self.up = nn.ConvTranspose2d(2 * c, c, 2, 2), self.layer(2 * c, c)
        self.out = nn.Conv2d(c, 10, 1)

    @staticmethod
    def layer(i, o):
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())

    def forward(self, x):
        a = self.down(x)
        b = self.deep(f.max_pool2d(a, 2))
        return self.out(self.up(torch.cat([self.rise(b), a], 1))).mean((2, 3))


def student():
    """Convolutions, pooling, dropout: as a first course builds it."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10),
    )  # fmt: skip


def generator(width=32):
    """A DCGAN's, fresh, with a head on its pictures."""
    layers = [
        nn.ConvTranspose2d(16, 2 * width, 4, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh(),
    ]  # fmt: skip
    for layer in layers[::3]:
        nn.init.normal_(layer.weight, 0, 0.02)
    noise = nn.Flatten(), nn.Linear(64, 16), nn.Unflatten(1, (16, 1, 1))
    return nn.Sequential(*noise, *layers, nn.Flatten(), nn.Linear(256, 10))


def converted(model):
    """As `ResidualStack`s."""
    return convert(model.eval(), torch.randn(2, 1, 8, 8)).train()


class Gated(nn.Module):
    """A highway block: T·H(x) + (1 − T)·x."""

    def __init__(self, width):
        super().__init__()
        self.h, self.t = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.constant_(self.t.bias, -1.0)

    def forward(self, x):
        t = torch.sigmoid(self.t(x))
        return t * torch.tanh(self.h(x)) + (1 - t) * x


class TimeField(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = mlp(width, act=nn.Tanh, last=0.5)

    def forward(self, t, x):
        return self.net(x)


class Dense(nn.Module):
    """Concatenation instead of addition: nothing residual."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64 + 16 * i, 16) for i in range(4)])
        self.out = nn.Linear(128, 10)

    def forward(self, x):
        x = x.flatten(1)
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return self.out(x)


class Keyword(nn.Module):
    """Takes pixel_values= and gives a mapping, as Hugging Face's networks do."""

    def __init__(self):
        super().__init__()
        self.net = HFResNet()
        self.net.classifier = nn.Linear(12, 10)

    def forward(self, pixel_values):
        return self.net(pixel_values.expand(-1, 3, -1, -1))


def stack_net(solver="euler", depth=8, substeps=1, eta=0.5, shared=False, act="tanh"):
    def field():
        return MLPField(WIDTH, activation=act)

    fields = field() if shared else [field() for _ in range(depth)]
    stack = ResidualStack(
        fields, depth=depth if shared else None, solver=solver, step_size=eta, substeps=substeps
    )
    return nn.Sequential(flat(), stack, nn.Linear(WIDTH, 10))


def plain(depth, act=nn.ReLU, norm=False, gain=2.0):
    layers = []
    for _ in range(depth):
        layer = nn.Linear(WIDTH, WIDTH)
        nn.init.normal_(layer.weight, std=(gain / WIDTH) ** 0.5)
        nn.init.zeros_(layer.bias)
        layers.append(nn.Sequential(layer, *([nn.BatchNorm1d(WIDTH)] if norm else []), act()))
    return Chain(flat(), layers, nn.Linear(WIDTH, 10))


def chain(depth, block, width=WIDTH, norm=False):
    head = nn.Linear(width, 10)
    return Chain(
        flat(width),
        [block(i) for i in range(depth)],
        nn.Sequential(nn.LayerNorm(width), head) if norm else head,
    )


def residual_mlps(
    depth, norm=None, scale=1.0, last=1.0, width=WIDTH, act=nn.ReLU, factor=1.0, post=None, norms=False
):
    def block(i):
        s = nn.Parameter(torch.full((1,), float(scale))) if scale == 0 else scale
        return Residual(
            mlp(width, act=act, last=last, norms=norms), None if norm is None else norm(width), s,
            None if post is None else post(width), factor,
        )  # fmt: skip

    return chain(depth, block, width, norm=norm is not None)


def conv_chain(depth, norm, channels=8):
    stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
    return Chain(stem, [Residual(conv(channels, norm)) for _ in range(depth)], pooled(channels))


def relu_after(width):
    return nn.ReLU()


@dataclass(frozen=True)
class Healthy:
    """A network that is in order.

    Args:
        build: makes it.
        updates: of training; 0 for a fresh one.
        lr: Adam's learning rate.
        task: "digits" or "sequences".
        deep: whether it is a fresh network of many blocks.
    """

    build: Callable[[], nn.Module]
    updates: int = 120
    lr: float = 2e-3
    task: str = "digits"


LN, BN = nn.LayerNorm, nn.BatchNorm1d

HEALTHY: dict[str, Healthy] = {
    "pre-norm mlp 8": Healthy(lambda: residual_mlps(8, LN)),
    "batch-norm mlp 6": Healthy(lambda: residual_mlps(6, BN)),
    "norm-free 12, 1/√L": Healthy(lambda: residual_mlps(12, last=12**-0.5)),
    "rezero 16": Healthy(lambda: residual_mlps(16, scale=0)),
    "zero-init fresh 30": Healthy(lambda: residual_mlps(30, last=0.0), 0),
    "zero-init trained 20": Healthy(lambda: residual_mlps(20, last=0.0)),
    "norm-free fresh 8": Healthy(lambda: residual_mlps(8, last=0.5), 0),
    "norm-free fresh 60, 1/√L": Healthy(lambda: residual_mlps(60, last=60**-0.5), 0),
    "pre-norm fresh 100": Healthy(lambda: residual_mlps(100, LN, last=0.3), 0),
    "wide 256": Healthy(lambda: residual_mlps(4, LN, width=256), 60, 1e-3),
    "post-activation 6": Healthy(lambda: residual_mlps(6, last=0.4, post=relu_after)),
    "batch norm within 10": Healthy(lambda: residual_mlps(10, norms=True, post=relu_after)),
    "scaled by 0.7 everywhere": Healthy(lambda: residual_mlps(8, LN, factor=0.7, scale=0.7)),
    "tanh 10": Healthy(lambda: residual_mlps(10, act=nn.Tanh, last=0.4)),
    "gelu layerscale 12": Healthy(lambda: residual_mlps(12, LN, scale=0.1, act=nn.GELU)),
    "stack euler": Healthy(lambda: stack_net()),
    "stack rk4": Healthy(lambda: stack_net("rk4")),
    "stack midpoint ×2": Healthy(lambda: stack_net("midpoint", substeps=2)),
    "stack shared": Healthy(lambda: stack_net(shared=True)),
    "stack dopri5": Healthy(lambda: stack_net("dopri5", 3), 80),
    "stack fresh": Healthy(lambda: stack_net(depth=20, eta=0.2, act="relu"), 0),
    "ode block": Healthy(lambda: nn.Sequential(flat(), ODEBlock(TimeField(WIDTH)), nn.Linear(WIDTH, 10)), 80),
    "resode mlp 30": Healthy(lambda: ResidualMLP(30, in_channels=1, image_size=8, width=WIDTH)),
    "resode plain mlp 4": Healthy(lambda: PlainMLP(4, in_channels=1, image_size=8, width=WIDTH)),
    "resnet20": Healthy(lambda: build("resnet20", in_channels=1, width=4), 200, 5e-3),
    "preact20": Healthy(lambda: build("preact20", in_channels=1, width=4), 200, 5e-3),
    "odenet20": Healthy(lambda: build("odenet20", in_channels=1, width=4), 200, 5e-3),
    "odenet20 rk4": Healthy(lambda: build("odenet20", in_channels=1, width=4, solver="rk4"), 200, 5e-3),
    "plain20": Healthy(lambda: build("plain20", in_channels=1, width=4), 200, 5e-3),
    "group-norm convolutions": Healthy(lambda: conv_chain(5, group), 200, 5e-3),
    "batch-norm convolutions": Healthy(lambda: conv_chain(5, nn.BatchNorm2d), 200, 5e-3),
    "hugging face resnet": Healthy(Keyword, 80),
    "vit 4": Healthy(lambda: transformer(4), 250),
    "vit 3 layerscale": Healthy(lambda: transformer(3, scale=0.1), 250),
    "vit post-norm 3": Healthy(lambda: transformer(3, post=True), 250),
    "vit fresh 12": Healthy(lambda: transformer(12), 0),
    "mixer": Healthy(
        lambda: Chain(
            Tokens(WIDTH),
            [Residual(Mixer(WIDTH) if i % 2 == 0 else mlp(), LN(WIDTH)) for i in range(6)],
            MeanHead(WIDTH, True),
        ),
        80,
    ),
    "gpt 3": Healthy(lambda: GPT(3, 32), 300, 5e-3, task="sequences"),
    "gpt parallel 4": Healthy(lambda: GPT(4, 32, parallel=True), 300, 5e-3, task="sequences"),
    "gpt fresh 8": Healthy(lambda: GPT(8, 32), 0, task="sequences"),
    "highway 8": Healthy(lambda: chain(8, lambda i: Gated(WIDTH))),
    "plain 4": Healthy(lambda: plain(4)),
    "plain 3 tanh": Healthy(lambda: plain(3, nn.Tanh, gain=1.0)),
    "plain batch norm 8": Healthy(lambda: plain(8, norm=True)),
    "plain fresh 10": Healthy(lambda: plain(10), 0),
    "dense connections": Healthy(Dense),
    "converted pre-norm mlp 8": Healthy(lambda: converted(residual_mlps(8, LN))),
    "converted vit 4": Healthy(lambda: converted(transformer(4)), 250),
    "loop 6": Healthy(lambda: Loop(6)),
    "recurrent 16": Healthy(lambda: Recurrent(16), 200),
    "recurrent 16, no shortcut": Healthy(lambda: Recurrent(16, shortcut=False), 200),
    "nn.RNN, orthogonal": Healthy(lambda: Reader(1.0, times=4), 150),
    "lstm": Healthy(lambda: Reader(cell=nn.LSTM, times=4), 200, 5e-3),
    "gru fresh": Healthy(lambda: Reader(cell=nn.GRU, times=4), 0),
    "u-net": Healthy(UNet, 150),
    "student's": Healthy(student, 150),
    "gan generator": Healthy(generator, 0),
    "post-norm mlp 24": Healthy(lambda: residual_mlps(24, post=LN), 0),
    "pre-norm fresh 200": Healthy(lambda: residual_mlps(200, LN), 0),
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Training and test samples, and the batch that a diagnosis looks at."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def look(self) -> tuple[Tensor, Tensor]:
        return self.test_x[:32], self.test_y[:32]


@functools.cache
def data(task: str) -> Data:
    if task == "sequences":  # the next of a sequence that counts by a step of its own
        generator = torch.Generator().manual_seed(0)
        start, step = torch.randint(11, (2, 1200, 1), generator=generator)
        ids = (start + step * torch.arange(9)) % 11
        return Data(ids[:1000, :8], ids[:1000, 1:], ids[1000:, :8], ids[1000:, 1:])
    images = load_data("digits")
    x, y = (
        (t.float() - 78) / 96 if t.dtype == torch.uint8 else t
        for t in (images.train_images, images.train_labels)
    )
    tx, ty = (
        (t.float() - 78) / 96 if t.dtype == torch.uint8 else t
        for t in (images.test_images, images.test_labels)
    )
    return Data(x, y.long(), tx, ty.long())


def logits(model: nn.Module, x: Tensor) -> Tensor:
    z = model(x)
    return z["logits"] if isinstance(z, dict) else z


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = logits(model, x)
    return f.cross_entropy(z.flatten(0, -2), y.flatten())


def train(
    model: nn.Module, d: Data, updates: int, lr: float, *, seed: int = 0, sgd: bool = False, batch: int = 64
) -> float:
    """Train in place; the mean loss of the last ten updates, inf or nan where it diverged."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr, 0.9) if sgd else torch.optim.Adam(parameters, lr)
    model.train()
    losses = [math.nan]
    for _ in range(updates):
        rows = torch.randint(len(d.x), (batch,), generator=generator)
        value = loss(model, d.x[rows], d.y[rows])
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    model.eval()
    return sum(losses[-10:]) / len(losses[-10:])


@torch.no_grad()
def accuracy(model: nn.Module, d: Data) -> float:
    model.eval()
    return float((logits(model, d.test_x).argmax(-1) == d.test_y).double().mean())


@functools.cache
def _trained(name: str, seed: int) -> nn.Module:
    spec = HEALTHY[name]
    torch.manual_seed(seed)
    model, d = spec.build(), data(spec.task)
    kept = os.environ.get("RESODE_CLINIC")
    place = Path(kept or "", f"{name.replace('/', '-')} {seed}.pt")
    if kept and place.exists():
        model.load_state_dict(torch.load(place))
        return model.eval()
    if spec.updates:
        train(model, d, spec.updates, spec.lr, seed=seed)
    else:
        settle(model, d)
    if kept:
        torch.save(model.state_dict(), place)
    return model.eval()


def healthy(name: str, seed: int = 0) -> nn.Module:
    """A copy of a healthy network, trained where it is one that is."""
    return copy.deepcopy(_trained(name, seed))


@torch.no_grad()
def settle(model: nn.Module, d: Data, batches: int = 20) -> None:
    """Batch norm's statistics measured anew over training batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for i in range(batches):
        model(d.x[64 * i % 1024 : 64 * i % 1024 + 64])
    for norm in norms:
        norm.momentum = 0.1
    model.eval()
