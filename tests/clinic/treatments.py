"""The first advice of a diagnosis, followed by a program that knows the finding and nothing of the fault."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resode import Finding, ODEBlock, ResidualStack
from tests.clinic.faults import WHOLE, Broken, Log, RootAtZero, Times, tail
from tests.clinic.networks import HEALTHY, Chain, Loop, Residual, accuracy, data, healthy, settle, train

UPDATES = 150
"""Of training after a treatment."""

LOST = 0.02
"""Accuracy that may be missing afterwards."""

LEARNT = 0.6
"""Accuracy on the digits after 150 updates from which a fresh network counts as training (chance: 0.1)."""


def owner(model: nn.Module, name: str, *classes: type) -> nn.Module | None:
    """The module of one of these classes that is named, or holds what is named."""
    parts = name.split(".")
    for n in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:n])) if n else model
        if isinstance(module, classes):
            return module
    return None


@torch.no_grad()
def _anew(module: nn.Module) -> None:
    """A layer's, or a norm's, own initialisation."""
    for m in module.modules():
        reset = getattr(m, "reset_parameters", None)
        if callable(reset):
            reset()


def _non_finite(model: nn.Module, f: Finding) -> None:
    if "weights" in f.text:
        _anew(model.get_submodule(f.block))
        return
    block = owner(model, f.block, Residual)
    for m in block.modules() if block is not None else ():
        if isinstance(m, Log | RootAtZero):
            m.least = 1e-3


def _plain_loop(model: nn.Module) -> bool:
    """x + F(x) in every turn of a loop, where it was something else in one."""
    odd = isinstance(model, Loop) and model.odd is not None
    if isinstance(model, Loop):
        model.odd = None
    return odd


def _shortcut(model: nn.Module, f: Finding) -> None:
    if _plain_loop(model):
        return
    block = model.get_submodule(f.block)
    usual = f.evidence.get("usual", 1.0)
    if isinstance(block, Residual):
        block.factor = usual
    elif "forward" in vars(block):  # patched
        del block.forward
    else:
        for name in ("downsample", "shortcut"):
            if isinstance(getattr(block, name, None), Times):
                setattr(block, name, nn.Identity())


def _sign(model: nn.Module, f: Finding) -> None:
    if _plain_loop(model):
        return
    block = model.get_submodule(f.block)
    if isinstance(block, Residual):
        block.sign = 1
    else:
        del block.forward


@torch.no_grad()
def _alive(model: nn.Module, f: Finding) -> None:
    for m in model.get_submodule(f.block.rsplit(".", 1)[0] if "." in f.block else f.block).modules():
        if isinstance(m, nn.Linear | _BatchNorm) and m.bias is not None and float(m.bias.abs().max()) > 100:
            m.bias.zero_()


def _last_anew(model: nn.Module, f: Finding) -> None:
    if "detach" in f.advice and _plain_loop(model):
        return
    for layer in tail(model.get_submodule(f.block)):
        _anew(layer)


@torch.no_grad()
def _weaker(model: nn.Module, f: Finding) -> None:
    for layer in tail(model.get_submodule(f.block)):
        for p in layer.parameters():
            p.mul_(f.evidence["scale"])


def _deep(model: nn.Module, f: Finding) -> None:
    """Branches times 1/√L; shortcuts where there are none; orthogonal weights through time."""
    if isinstance(layer := model.get_submodule(f.block) if f.block != WHOLE else None, nn.RNNBase):
        nn.init.orthogonal_(layer.weight_hh_l0)
        return
    blocks = [m for m in model.modules() if isinstance(m, Residual)]
    for m in blocks:
        m.scale = len(blocks) ** -0.5
    for stack in [m for m in model.modules() if isinstance(m, ResidualStack)]:
        stack.step_size = stack.step_size * stack.depth**-0.5
    if not blocks and isinstance(model, Chain):
        for i, layer in enumerate(model.blocks):
            _anew(layer)
            model.blocks[i] = Residual(layer, scale=len(model.blocks) ** -0.5)


def _vanishing(model: nn.Module, f: Finding) -> None:
    blocks = [m for m in model.modules() if isinstance(m, Residual)]
    for m in blocks:
        m.factor = 1.0
    if not blocks:
        _deep(model, f)


def _collapse(model: nn.Module, f: Finding) -> None:
    named = re.match(r"Initialise (\S+) anew", f.advice)
    if f.block != WHOLE:
        model.get_submodule(f.block).bias.data.zero_()
    elif named:
        _anew(model.get_submodule(named[1]))
    else:
        _vanishing(model, f)


def _finer(model: nn.Module, f: Finding) -> None:
    stack = owner(model, f.block, ResidualStack)
    assert isinstance(stack, ResidualStack)
    stack.substeps = int(f.evidence["substeps"])


def _stable_method(model: nn.Module, f: Finding) -> None:
    named = re.search(r"solver='(\w+)'.* with ([\d,]+) steps", f.advice)
    module = owner(model, f.block, ResidualStack, ODEBlock)
    assert named and isinstance(module, ResidualStack | ODEBlock)
    steps = int(named[2].replace(",", ""))
    if isinstance(module, ODEBlock):
        module.n_steps = steps
    else:
        module.substeps = steps
    module.solver = named[1]


TREATMENTS: dict[str, Callable[[nn.Module, Finding], None]] = {
    "non-finite": _non_finite,
    "norm-statistics": lambda model, f: None,  # settled below, with the task's training batches
    "no-shortcut": _shortcut,
    "scaled-shortcut": _shortcut,
    "subtracted-branch": _sign,
    "stiff": _stable_method,
    "overstep": _finer,
    "dead": _alive,
    "idle": _last_anew,
    "strong-block": _weaker,
    "collapse": _collapse,
    "explosion": _deep,
    "vanishing": _vanishing,
    "learning-rate": lambda model, f: None,
}


def repaired(b: Broken, f: Finding) -> tuple[bool, float, float]:
    """Whether the advice of a finding helped, the accuracy now, and what was asked for."""
    d = data(b.task)
    if f.cause == "stiff":
        return _cheaper(b, f)
    spec = HEALTHY.get(b.origin)
    trained = spec is not None and spec.updates > 0 and b.lr is None
    wanted = accuracy(healthy(b.origin), d) - LOST if trained else LEARNT
    TREATMENTS[f.cause](b.model, f)
    if f.cause == "norm-statistics":
        settle(b.model, d)
    elif f.cause == "learning-rate":
        train(b.model, d, UPDATES, f.evidence["limit"] / 2, sgd=True)
    elif f.cause in ("explosion", "vanishing") or not trained:
        train(b.model, d, UPDATES, 2e-3)
    else:
        train(b.model, d, UPDATES, spec.lr / 2 if spec else 2e-3)
    now = accuracy(b.model, d)
    return now >= wanted, now, wanted


def _cheaper(b: Broken, f: Finding) -> tuple[bool, float, float]:
    """Whether a stiff block takes half the evaluations or less, for outputs within 1 %; and both counts."""
    x = data(b.task).test_x[:4]
    module = owner(b.model, f.block, ResidualStack, ODEBlock)
    assert isinstance(module, ResidualStack | ODEBlock)
    with torch.no_grad():
        before = b.model(x)
        cost = float(torch.as_tensor(module.stats.nfe).max())  # type: ignore[union-attr]
        TREATMENTS[f.cause](b.model, f)
        after = b.model(x)
    now = float(torch.as_tensor(module.stats.nfe).max())  # type: ignore[union-attr]
    same = float((after - before).norm() / before.norm()) <= 0.01
    return same and now <= cost / 2, now, cost / 2
