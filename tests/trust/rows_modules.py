"""Rows of modules: fields, shortcuts and networks. Each has one law for all, and one of its own where it has one."""

from __future__ import annotations

import copy
import functools
import io
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import resode
from trust.rows import RECORDS, Case, Variant, row


def sound(
    v: Variant, module: nn.Module, *inputs: torch.Tensor, shape: tuple[int, ...], mixes: bool = False
) -> Any:
    """What every module keeps: shape, dtype, finite figures, samples apart, gradients, state_dict, copies."""
    v.module(module)
    kept = copy.deepcopy(module)
    y = module(*inputs)
    assert y.shape == shape and y.dtype == v.dtype, (y.shape, y.dtype)
    assert y.isfinite().all()
    if v.train:
        return y
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    for value in kept.parameters():
        value.data.zero_()
    kept.load_state_dict(torch.load(file))
    assert torch.equal(kept.eval()(*inputs), y), "a module with the same state_dict answers otherwise"
    if v.batch > 1 and not mixes:  # no sample depends on another
        flipped = module(*(x.flip(0) if x.dim() > 1 else x for x in inputs))
        v.close(flipped, y.flip(0), 10)
    if v.grad == "gradient" and y.numel():
        (gradient,) = torch.autograd.grad(y.abs().sum(), inputs[-1], retain_graph=True)
        assert gradient.isfinite().all() and gradient.shape == inputs[-1].shape
    return y


@functools.cache
def scratch() -> tempfile.TemporaryDirectory:
    """Kept while the process lives."""
    return tempfile.TemporaryDirectory()


Own = Callable[[Variant, nn.Module, torch.Tensor, torch.Tensor], None]


def module_row(
    name: str,
    shape: Callable[[Variant], tuple[int, ...]],
    own: Own | None = None,
    to: Callable[[Variant], tuple[int, ...]] | None = None,
    timed: bool = False,
    **arguments: Any,
) -> None:
    """A row of a module that takes x of `shape` to `to`; arguments may be functions of the variant."""

    @row(name)
    def _(v: Variant) -> Case:
        x = v.tensor(*shape(v))
        given = {n: value(v) if callable(value) else value for n, value in arguments.items()}

        def law(module):
            inputs = (torch.tensor(0.5, dtype=x.real.dtype), x) if timed else (x,)
            y = sound(v, module, *inputs, shape=(to or shape)(v))
            if own is not None and not v.train:
                own(v, module, x, y)

        return Case(given, law, changes=tuple(given))


def flat(v: Variant) -> tuple[int, ...]:
    return (v.batch, v.size)


def even(v: Variant) -> tuple[int, ...]:
    return (v.batch, 2 * v.size)


def images(v: Variant) -> tuple[int, ...]:
    return (v.batch, 4 * v.size, 5, 3)


def size(v: Variant) -> int:
    return v.size


def channels(v: Variant) -> int:
    return 4 * v.size


def layers(v: Variant) -> list[nn.Module]:
    return [nn.Linear(v.size, v.size) for _ in range(3)]


def spectrum(v: Variant, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    if v.dtype.itemsize < 4 or not len(x) or v.grad == "inference":
        return None
    J = resode.analysis.jacobian(module, x.detach())
    return torch.linalg.eigvals(J)


def imaginary(v, module, x, y):
    """Antisymmetric and Hamiltonian fields neither grow nor decay."""
    values = spectrum(v, module, x)
    if values is not None and not v.dtype.is_complex:
        assert values.real.abs().max() < 1e-3 * max(1, values.abs().max())


def decaying(v, module, x, y):
    values = spectrum(v, module, x)
    if values is not None and not v.dtype.is_complex:
        assert values.real.max() < 100 * v.tolerance


def undone(v, module, x, y):
    """Reversible blocks give their input back."""
    if v.dtype.itemsize >= 4:
        v.close(module.inverse(y), x, 100)


def kept_mean(v, module, x, y):
    v.close(y, x.unsqueeze(1).expand_as(y))


module_row("resode.fields.AntisymmetricField", flat, imaginary, size=size)
module_row("resode.fields.HamiltonianField", even, imaginary, size=lambda v: 2 * v.size)
module_row("resode.fields.ParabolicField", flat, decaying, size=size)
module_row("resode.fields.MLPField", flat, width=size)
module_row("resode.fields.ConvField", images, channels=channels, norm="group")
module_row("resode.fields.BottleneckField", images, channels=channels)
module_row("resode.fields.SqueezeExcitation", images, channels=channels)
module_row("resode.fields.TimeMLPField", flat, timed=True, width=size)
module_row("resode.fields.TimeConvField", images, timed=True, channels=channels)
module_row("resode.fields.Autonomous", flat, timed=True, field=lambda v: nn.Linear(v.size, v.size))
module_row("resode.fields.Augmented", flat, block=lambda v: nn.Linear(v.size + 2, v.size + 2), extra=2)
module_row(
    "resode.fields.SoftThresholdField", flat, branch=lambda v: nn.Linear(v.size, v.size), threshold=0.1
)
module_row("resode.blocks.StochasticDepth", flat, lambda v, m, x, y: v.close(y, x), p=0.5)
module_row("resode.shortcuts.AdditiveCoupling", even, undone, f=lambda v: nn.Linear(v.size, v.size), g=lambda v: nn.Linear(v.size, v.size))  # fmt: skip
module_row("resode.shortcuts.AttentionResidual", flat, branches=layers, features=size)
module_row("resode.shortcuts.FromStreams", lambda v: (v.batch, 3, v.size), to=flat)
module_row("resode.shortcuts.ToStreams", flat, kept_mean, to=lambda v: (v.batch, 3, v.size), streams=3)
module_row("resode.shortcuts.GatedShortcut", flat, lambda v, m, x, y: v.close(y, m.alpha * x), alpha=0.5)
module_row("resode.shortcuts.HyperConnection", lambda v: (v.batch, 3, v.size), branch=lambda v: nn.Linear(v.size, v.size), streams=3, manifold=True)  # fmt: skip
module_row("resode.shortcuts.InputGatedShortcut", images, channels=channels)
module_row("resode.shortcuts.MomentumStack", flat, branches=layers)
module_row("resode.shortcuts.PadShortcut", images, to=lambda v: (v.batch, 8 * v.size, 3, 2), in_channels=channels, out_channels=lambda v: 8 * v.size, stride=2)  # fmt: skip
module_row("resode.shortcuts.ProjectionShortcut", images, to=lambda v: (v.batch, 3, 3, 2), in_channels=channels, out_channels=3, stride=2)  # fmt: skip

PICTURES = {"in_channels": 1, "num_classes": 5}


def network_row(name: str, pixels: int = 8, slow: bool = False, **arguments: Any) -> None:
    @row(name, slow=slow, hostile=not slow)
    def _(v: Variant) -> Case:
        x = v.tensor(v.batch, 1, pixels, pixels)

        def law(network):
            sound(v, network, x, shape=(v.batch, 5))

        return Case(arguments | PICTURES, law)


network_row("resode.networks.CifarResNet", depth=8, width=2)
network_row("resode.networks.ODENet", depth=8, width=2, solver="rk4")
network_row("resode.networks.PreActResNet", blocks=1, widths=(2, 2, 4, 4))
network_row("resode.networks.HighwayNet", slow=True)
network_row("resode.networks.ImageNetResNet", pixels=32, slow=True, depth=18, width=2)
network_row("resode.networks.ImageNetPreActResNet", pixels=32, slow=True, depth=18, width=2)
network_row("resode.networks.ResidualMLP", depth=3, width=4, image_size=8)
network_row("resode.networks.PlainMLP", depth=3, width=4, image_size=8)


@row("resode.networks.build")
def _(v: Variant) -> Case:
    x = v.tensor(v.batch, 1, 8, 8)
    return Case({"name": "odenet8", **PICTURES, "width": 2}, lambda net: sound(v, net, x, shape=(v.batch, 5)))


@row("resode.networks.find")
def _(v: Variant) -> Case:
    def law(network):
        assert network.parameter_count() == 269_722

    return Case({"name": "resnet20"}, law)


@row("resode.networks.available")
def _(v: Variant) -> Case:
    def law(names):
        assert "odenet20" in names and all(resode.networks.find(name).name == name for name in names)

    return Case({}, law)


@row("resode.networks.load_weights")
def _(v: Variant) -> Case:
    model, other = (v.module(resode.networks.build("odenet8", **PICTURES, width=2)) for _ in range(2))
    x = v.tensor(v.batch, 1, 8, 8)

    def law(loaded):
        assert loaded is model and torch.equal(model.eval()(x), other.eval()(x))

    wrapped = {f"module.{name}": value for name, value in other.state_dict().items()}
    return Case({"model": model, "source": {"state_dict": wrapped, "epoch": 3}}, law, changes=("model",))


@row("resode.networks.read_weights")
def _(v: Variant) -> Case:
    state = v.module(nn.Linear(v.size, 3)).state_dict()
    path = f"{tempfile.mkdtemp(dir=scratch().name)}/weights.pt"
    torch.save(state, path)

    def law(found):
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)

    return Case({"path": path}, law)


@row("resode.networks.preact_names")
def _(v: Variant) -> Case:
    model = v.module(resode.networks.build("odenet20", width=2))

    def law(names):
        other = resode.networks.build("preact20", width=2)
        other.to(v.dtype).load_state_dict({names[n]: value for n, value in model.state_dict().items()})

    return Case({"model": model}, law)


@row("resode.fields.append_time")
def _(v: Variant) -> Case:
    x = v.tensor(v.batch, v.size)

    def law(y):
        assert y.shape == (v.batch, v.size + 1) and torch.equal(y[:, :-1], x)
        assert (y[:, -1] == torch.tensor(0.5, dtype=v.dtype)).all()

    return Case({"t": 0.5, "x": x, "dim": -1}, law)


@row("resode.fields.KnownPlusLearned")
def _(v: Variant) -> Case:
    x = v.tensor(v.batch, v.size)
    learned = resode.fields.TimeMLPField(v.size, zero_init_last=True).to(v.dtype)
    t = torch.tensor(0.0, dtype=x.real.dtype)
    return Case({"known": lambda t, x: -x, "learned": learned}, lambda field: v.close(field(t, x), -x))


@row("resode.fields.make_activation")
def _(v: Variant) -> Case:
    x = v.tensor(v.batch, v.size)

    def law(made):
        v.close(made(x), torch.tanh(x))

    return Case({"name": "tanh"}, law)


@row("resode.fields.make_conv")
def _(v: Variant) -> Case:
    x = v.tensor(*images(v))

    def law(conv):
        sound(v, conv, x, shape=(v.batch, 3, 5, 3))

    return Case({"in_channels": 4 * v.size, "out_channels": 3, "size": 3, "norm": "batch"}, law)


@row("resode.fields.make_norm")
def _(v: Variant) -> Case:
    x = v.tensor(*images(v))

    def law(norm):
        sound(v, norm, x, shape=x.shape)

    return Case({"kind": "group", "channels": 4 * v.size}, law)


@row("resode.shortcuts.HighwayShortcut")
def _(v: Variant) -> Case:
    """Between x and F: y = Tf + (1 − T)x with T in (0, 1)."""
    x, f = v.tensor(v.batch, v.size), v.tensor(v.batch, v.size, add=1)

    def law(highway):
        y = v.module(highway)(x, f)
        assert y.shape == x.shape and y.dtype == v.dtype
        if not v.dtype.is_complex:
            slack = 10 * v.tolerance
            assert ((y >= torch.minimum(x, f) - slack) & (y <= torch.maximum(x, f) + slack)).all()

    return Case({"size": v.size}, law)


@row("resode.shortcuts.doubly_stochastic")
def _(v: Variant) -> Case:
    def law(matrix):
        ones = torch.ones(v.size)
        v.close(matrix.sum(0), ones, 10)
        v.close(matrix.sum(1), ones, 10)
        assert (matrix >= 0).all()

    return Case({"logits": v.tensor(v.size, v.size, scale=2.0)}, law)


@row("resode.shortcuts.to_streams")
def _(v: Variant) -> Case:
    x = v.tensor(v.batch, v.size)
    return Case({"x": x, "streams": 3}, lambda y: v.close(y, x.unsqueeze(1).expand(v.batch, 3, v.size)))


@row("resode.shortcuts.from_streams")
def _(v: Variant) -> Case:
    x = v.tensor(v.batch, 3, v.size)
    return Case({"x": x}, lambda y: v.close(y, x.mean(1)))


@row("resode.shortcuts.invertible_depth")
def _(v: Variant) -> Case:
    def law(found):
        assert abs(found - 85) < 1

    return Case({"gamma": 0.9, "dtype": torch.float32}, law)


@row("resode.shortcuts.make_run")
def _(v: Variant) -> Case:
    x = v.tensor(v.batch, v.size)

    def law(run):
        sound(v, run, x, shape=x.shape)

    return Case({"kind": "hyper", "branches": layers(v), "features": v.size}, law, changes=("branches",))


@row("resode.shortcuts.make_shortcut")
def _(v: Variant) -> Case:
    x = v.tensor(*images(v))

    def law(made):
        sound(v, made, x, shape=(v.batch, 8 * v.size, 3, 2))

    return Case({"kind": "B", "in_channels": 4 * v.size, "out_channels": 8 * v.size, "stride": 2}, law)


RECORDS |= {
    "resode.networks": "resode.networks.build",
    "resode.fields.ACTIVATIONS": "resode.fields.make_activation",
    "resode.fields.MONOTONE": "resode.fields.make_activation",
    "resode.fields.NORMS": "resode.fields.make_norm",
    "resode.networks.FAMILIES": "resode.networks.find",
    "resode.networks.NETWORKS": "resode.networks.find",
    "resode.networks.Family": "resode.networks.find",
    "resode.networks.Network": "resode.networks.find",
    "resode.networks.Style": "resode.networks.build",
    "resode.networks.WeightsMismatch": "resode.networks.load_weights",
    "resode.shortcuts.RUN_SHORTCUTS": "resode.shortcuts.make_run",
    "resode.shortcuts.SHORTCUTS": "resode.shortcuts.make_shortcut",
    "resode.shortcuts.Mixing": "resode.shortcuts.HyperConnection",
    "resode.shortcuts.NotInvertible": "resode.shortcuts.MomentumStack",
}
