r"""What a diagnosis rests on: states, statistics, gains and gradients, in a few passes, without eigenvalues.

The gain of a random perturbation u through a block y = S(x) + ηF(x) is ‖(S' + ηJ)ᵀu‖ / ‖u‖: for white u its
mean square is the mean square of the singular values, forwards and backwards alike, so one backward pass over
the block is a probe. Every sample has its own u.
"""

from __future__ import annotations

import copy
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _BatchNorm

from resode.analysis.depth.gradients import block_products, split_gradient
from resode.analysis.depth.losses import LossFunction, batch_of, part, parts, prediction, sample_losses
from resode.analysis.depth.tracing import Addition, Trace, trace
from resode.blocks import ODEBlock, ResidualStack
from resode.blocks.solving import block_name
from resode.calls import call, hooked, mapped, tensors_in, within
from resode.jacobian.places import Place, gradients_at
from resode.jacobian.products import JacobianProducts, rows
from resode.solve import SolverError
from resode.tables import listed

NAN = math.nan

SAMPLES = 8
"""Samples whose Jacobians are probed, the first ones."""

MANY = 300
"""Evaluations of a block from which an adaptive solver is held by stiffness, or by a rough field."""

_HUGE = 1e15  # from which products overflow in float32
_PROBES = 2
_ROUNDS = 3  # of the power iteration for a block's largest singular value
_WHOLE_ROUNDS = 5  # for the whole depth
_ENTRIES = 2**27  # of activations at once
_PATIENCE = 5.0  # seconds after which progress is shown


@dataclass(frozen=True)
class NormMeasures:
    """A batch norm against what comes to it.

    Args:
        name: the module's.
        untouched: whether its running statistics are those that it was made with, 0 and 1.
        trained: whether its weights are not those that it was made with.
        variance_ratio: per channel, variance of these inputs over the running one; the 0.9 quantile.
        largest_ratio: of any channel.
        offset: |mean of these inputs − running mean| in running standard deviations, median of channels.
    """

    name: str
    untouched: bool
    trained: bool
    variance_ratio: float
    largest_ratio: float
    offset: float


@dataclass
class BlockMeasures:
    """One residual addition; norms and gains are root mean squares over the samples.

    Args:
        name: of the module that is the block.
        label: of the addition, numbered where its module holds several.
        sibling: its module's class and which of the module's additions it is.
        kind: of the shortcut, see `resode.analysis.depth.tracing.Addition`.
        keeps_shape: whether y has x's shape.
        shortcut: c where S(x) = c·x, nan where it is something else.
        factor: η with the sign that F has in the sum.
        gain: ‖(S' + ηJ)ᵀu‖ / ‖u‖.
        branch_gain: ‖ηJᵀu‖ / ‖u‖.
        sigma: largest singular value of S' + ηJ, from below, in the worst sample.
        radial: how much F depends on ‖x‖, √n |cos| of x and Jᵀu: near 1, and near 0 behind a norm, whose J is
            as 1/‖x‖.
        ratio: ‖ηF(x)‖ / ‖x‖.
        size: ‖ηF(x)‖ / √n.
        growth: ‖y‖ / ‖x‖.
        dead: the largest share of units at 0 behind one of F's activations with a dead zone, nan without one.
        gradient: ‖∂L/∂x‖.
    """

    name: str
    label: str
    sibling: str
    kind: str
    keeps_shape: bool
    shortcut: float
    factor: float
    gain: float = NAN
    branch_gain: float = NAN
    sigma: float = NAN
    radial: float = NAN
    ratio: float = NAN
    size: float = NAN
    growth: float = NAN
    dead: float = NAN
    gradient: float = NAN


@dataclass(frozen=True)
class WeightMeasures:
    """The weight matrix or kernel of a layer.

    Args:
        name: the layer's.
        block: the block's, "" outside of all.
        place: the layer's name with numbers in the block's name left open: the same for all siblings.
        size: root mean square of the weights times the root of the inputs of a unit: the gain of an input of
            independent entries.
    """

    name: str
    block: str
    place: str
    size: float


@dataclass(frozen=True)
class LayerMeasures:
    """One call of a module with a weight matrix or kernel, in the order of the forward pass.

    Args:
        name: the module's.
        gradient: ‖∂L/∂y‖ at its output.
        size: ‖y‖ / √n at its output.
        spread: how much the samples differ there, ‖y − mean‖ / ‖y‖.
        gain: that size over its input's.
    """

    name: str
    gradient: float
    size: float
    spread: float
    gain: float


@dataclass(frozen=True)
class RecurrenceMeasures:
    """One of torch's recurrent layers, whose time steps are no modules.

    Args:
        name: the module's.
        kind: its class.
        steps: of time.
        ratio: the gradient of the last output at the first time step's input over that at the last one's.
    """

    name: str
    kind: str
    steps: int
    ratio: float


@dataclass(frozen=True)
class DeadMeasures:
    """An activation with a dead zone.

    Args:
        name: the module's.
        layer: the module with weights before it, itself where none is.
        share: of its units at 0.
    """

    name: str
    layer: str
    share: float


@dataclass
class Measures:
    """A network at a few inputs.

    Args:
        samples: how many were looked at; `probed` of them with Jacobians.
        non_finite: where a number that is not finite appears first: (module, what it is in).
        solver_error: what a solver that gave up says, and its module.
        norms: its batch norms.
        blocks: its residual additions.
        layers: its weighted layers.
        weights: its layers, without those whose outputs a norm divides by their size (within a block a batch
            norm).
        recurrences: its recurrent layers.
        alike: layers whose units all hold the same weights, not 0.
        detached: modules that ran, and whose weights get no gradient from the outputs.
        siblings: (module, class, additions within it a call, whether it keeps its input's shape).
        dead_layers: activations that are modules, each with the layer before it.
        whole_gain: gain of a random perturbation from the first block's x to the last block's y.
        whole_sigma: its largest singular value, from below, in the worst sample.
        state_growth: ‖x_L‖ / ‖x_0‖ in the worst sample.
        spread: how the samples differ, ‖z − mean‖ / ‖z‖: (inputs, last state, outputs).
        loss: mean loss.
        classes: how many the targets tell apart, 0 where they are no classes.
        evaluations: of F, for each block of each module that solves: {module: [evaluations]}.
        order: modules as they return in the forward pass: {module: place}.
        notes: what could not be measured.
    """

    samples: int
    probed: int
    non_finite: tuple[str, str] | None = None
    solver_error: tuple[str, SolverError] | None = None
    norms: list[NormMeasures] = field(default_factory=list)
    blocks: list[BlockMeasures] = field(default_factory=list)
    layers: list[LayerMeasures] = field(default_factory=list)
    weights: list[WeightMeasures] = field(default_factory=list)
    recurrences: list[RecurrenceMeasures] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)
    detached: list[str] = field(default_factory=list)
    siblings: list[tuple[str, str, float, bool]] = field(default_factory=list)
    dead_layers: list[DeadMeasures] = field(default_factory=list)
    whole_gain: float = NAN
    whole_sigma: float = NAN
    state_growth: float = NAN
    spread: tuple[float, float, float] = (NAN, NAN, NAN)
    loss: float = NAN
    classes: int = 0
    evaluations: dict[str, list[int]] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def measure(
    model: nn.Module,
    x: Any,
    target: Any,
    loss_fn: LossFunction | None,
    blocks: str | Sequence[str] | None,
    seed: int,
) -> Measures:
    """Everything that the findings rest on, of a model in evaluation mode; arguments as `resode.diagnose`."""
    samples = batch_of(x)
    found = Measures(samples, 0)
    found.non_finite = _bad_weights(model)
    if found.non_finite is not None:
        return found
    watcher = _Watcher(model)
    activations = watcher.run(x, samples)
    found.norms, found.dead_layers = watcher.norm_measures(), watcher.dead_shares()
    found.evaluations, found.order = watcher.evaluations, watcher.order
    found.non_finite, found.solver_error = watcher.non_finite, watcher.solver_error
    if found.non_finite is not None and not _finite(x):
        found.non_finite = "", "the inputs"
    if found.non_finite is not None or found.solver_error is not None:
        return found
    found.probed = max(1, min(SAMPLES, samples, _ENTRIES // max(1, activations)))
    if max((n for calls in found.evaluations.values() for n in calls), default=0) > MANY:
        found.notes.append(
            "The blocks were not looked at: no few fixed steps take the place of the solver's."
        )
        return found
    with _precise(model, watcher) as precise:
        some = _floating(part(x, 0, found.probed, samples), precise)
        _measure_blocks(found, precise, some, part(target, 0, found.probed, samples), loss_fn, blocks, seed)
    found.siblings = [
        (name, kind, sum(within(b.name, name) for b in found.blocks) / watcher.calls[name], keeps)
        for name, (kind, keeps) in watcher.shapes.items()
        if not any(
            isinstance(model.get_submodule(n), _SOLVING) for n in _around(name)
        )  # each calls as it needs
    ]
    found.weights = _weights(model, found, watcher.leaves)
    if (unrun := _unrun(model, watcher)) is not None:
        found.notes.append(unrun)
    found.alike = [n for n in dict.fromkeys(watcher.leaves) if _same_units(model.get_submodule(n))]
    return found


def _weights(model: nn.Module, found: Measures, leaves: Sequence[str]) -> list[WeightMeasures]:
    """Sizes of the matrices and kernels, in the order of the forward pass."""
    after = dict(pairwise(leaves))
    measured = []
    for name in dict.fromkeys(leaves):
        module = model.get_submodule(name)
        if not isinstance(module, _WEIGHTED):
            continue
        block = next((b.name for b in found.blocks if b.name and within(name, b.name)), "")
        follows = after.get(name, "")
        norm = model.get_submodule(follows) if follows else None
        if isinstance(norm, _BatchNorm) and block and within(follows, block):
            continue
        if not block and "Norm" in type(norm).__name__ and _owner(name) == _owner(follows):
            continue
        w = module.weight.detach()
        place = re.sub(r"\d+", "*", block) + name[len(block) :] + "×".join(map(str, w.shape[2:]))
        size = float(w.double().square().mean().sqrt()) * max(1, w[:1].numel()) ** 0.5
        measured.append(WeightMeasures(name, block, place, size))
    return measured


def _unrun(model: nn.Module, watcher: _Watcher) -> str | None:
    """A sentence on modules with weights of a list that no sample reached, as experts that no gate chose."""
    idle, of = [], 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(m) for m in module}) > 1:
            continue
        members = [
            f"{name}.{n}".removeprefix(".")
            for n, m in module.named_children()
            if any(True for _ in m.parameters())
        ]
        missing = [n for n in members if n not in watcher.order]
        if len(members) >= 3 and 0 < len(missing) < len(members):
            idle, of = idle + missing, of + len(members)
    if not idle:
        return None
    return (
        f"No sample reached {listed(idle)}, of {of} modules in the same lists: nothing is known "
        "of them, and no gradient trains them. An expert that stays so under many samples is dead."
    )


def _same_units(module: nn.Module) -> bool:
    """Whether every unit of a layer has the weights of the first one."""
    if not isinstance(module, _WEIGHTED) or not isinstance(w := module.weight, nn.Parameter) or len(w) < 2:
        return False
    return bool((w != 0).any() and (w == w[:1]).all())


def _around(name: str) -> Iterator[str]:
    """The names of the modules that hold one."""
    while name:
        name = _owner(name)
        yield name


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _bad_weights(model: nn.Module) -> tuple[str, str] | None:
    """The first weight or statistic that is not finite."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and not bool(value.detach().isfinite().all()):
            owner, _, own = name.rpartition(".")
            if isinstance(value, nn.Parameter) or not _masked(value):
                return owner, f"the weights: {own} of {owner or 'the model'}"
    return None


def _finite(data: Any) -> bool:
    """Whether tensors of data are, but for masks; what a network makes finite of NaN is its own."""
    return all(bool(t.isfinite().all()) or _masked(t) for t in tensors_in(data) if t.is_floating_point())


def _masked(t: Tensor) -> bool:
    """Whether a tensor holds −∞ beside finite numbers alone, as attention masks and masked logits do."""
    return bool(t.isfinite().any()) and not bool((t.isnan() | (t == math.inf)).any())


class _Watcher:
    """One plain forward pass: statistics, shapes, dead units and the first number that is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sums: dict[str, list[Tensor]] = {}
        self.dead: dict[str, list[float]] = {}
        self.before: dict[str, str] = {}
        self.shapes: dict[str, tuple[str, bool]] = {}
        self.evaluations: dict[str, list[int]] = {}
        self.non_finite: tuple[str, str] | None = None
        self.solver_error: tuple[str, SolverError] | None = None
        self.running: list[str] = []
        self.order: dict[str, int] = {}
        self.leaves: list[str] = []
        self.calls: Counter[str] = Counter()
        self.met: set[nn.Module] = set()
        self.activations = 0
        self.count = 1

    def run(self, x: Any, samples: int) -> int:
        """Entries of activations a sample."""
        entries = sum(t.numel() for t in tensors_in(x)) // samples
        size = max(1, min(32, 2**22 // max(1, entries)))
        watched = hooked(dict(self.model.named_modules()), self._enter, self._leave)
        try:
            with watched, torch.inference_mode(False), torch.no_grad():
                for some, _, self.count in parts(x, None, size):
                    self.activations = 0
                    self.leaves.clear()
                    self.calls.clear()
                    self.running.clear()
                    self.met.clear()
                    call(self.model, some)
        except SolverError as error:
            solving = [n for n in self.running if isinstance(self.model.get_submodule(n), _SOLVING)]
            self.solver_error = (solving[-1] if solving else "", error)
        except (ValueError, RuntimeError):
            if self.non_finite is None:  # which solvers and others refuse
                raise
        return self.activations // max(1, self.count)

    def _enter(self, name: str, args: Any, kwargs: Any) -> None:
        self.running.append(name)
        module = self.model.get_submodule(name)
        if isinstance(module, _BatchNorm) and module.running_var is not None and args:
            if module not in self.met:  # a solver's later stages meet other states than the block
                self.met.add(module)
                self._add_statistics(name, args[0])

    def _add_statistics(self, name: str, x: Tensor) -> None:
        values = x.detach().transpose(0, 1).reshape(x.shape[1], -1).double() if x.ndim > 1 else x[:, None]
        sums = [torch.full_like(values[:, 0], values.shape[1]), values.sum(1), values.square().sum(1)]
        before = self.sums.get(name, [0.0] * 3)
        self.sums[name] = [a + b for a, b in zip(before, sums, strict=True)]

    def _leave(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        self.running.pop()
        module = self.model.get_submodule(name)
        self.order.setdefault(name, len(self.order))
        self.calls[name] += 1
        y = next(tensors_in(output), None)
        if y is None:
            return
        leaf = not any(True for _ in module.children())
        first = next(tensors_in(args), None)
        if leaf:
            self.activations += y.numel()
            self.leaves.append(name)
        elif first is not None and name:
            self.shapes[name] = type(module).__name__, first.shape == y.shape
        if self.non_finite is None and y.is_floating_point() and not bool(y.isfinite().all()):
            if not _masked(y):
                values = [*tensors_in(args), *module.parameters(recurse=False)]
                largest = max((float(t.detach().abs().max()) for t in values if t.numel()), default=0.0)
                reach = f", whose inputs and weights reach {largest:.1g}" if largest > _HUGE else ""
                self.non_finite = name, f"the output of {name or 'the model'}{reach}"
        if type(module).__name__ in _DEAD_ZONES:
            self.dead.setdefault(name, []).append(float((y == 0).double().mean()))
            self.before[name] = next((n for n in self.leaves[-2::-1] if self._has_weights(n)), name)
        if isinstance(module, ResidualStack) and module.evaluations is not None:
            self.evaluations[name] = list(module.evaluations)
        elif isinstance(module, ODEBlock) and module.stats is not None:
            self.evaluations[name] = [int(torch.as_tensor(module.stats.nfe).max())]

    def norm_measures(self) -> list[NormMeasures]:
        found = []
        for name, (count, total, squares) in self.sums.items():
            norm = self.model.get_submodule(name)
            assert isinstance(norm, _BatchNorm) and norm.running_var is not None
            assert norm.running_mean is not None
            if float(count[0]) < 2:
                continue
            mean = total / count
            variance = (squares / count - mean.square()).clamp_min(0)
            running = norm.running_var.double() + norm.eps
            ratio = variance / running
            offset = (mean - norm.running_mean.double()).abs() / running.sqrt()
            untouched = bool((norm.running_mean == 0).all() and (norm.running_var == 1).all())
            trained = norm.weight is not None and bool((norm.weight != 1).any() and (norm.weight != 0).any())
            most = float(torch.quantile(ratio, 0.9)) if len(ratio) < 2**20 else float(ratio.median())
            found.append(
                NormMeasures(name, untouched, trained, most, float(ratio.max()), float(offset.median()))
            )
        return found

    def _has_weights(self, name: str) -> bool:
        return any(True for _ in self.model.get_submodule(name).parameters(recurse=False))

    def dead_shares(self) -> list[DeadMeasures]:
        return [DeadMeasures(n, self.before[n], min(shares)) for n, shares in self.dead.items()]


_SOLVING = (ResidualStack, ODEBlock)
_DEAD_ZONES = ("ReLU", "ReLU6", "Hardtanh", "Hardswish", "Threshold", "Softshrink", "Hardshrink")
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


@contextmanager
def _precise(model: nn.Module, watcher: _Watcher) -> Iterator[nn.Module]:
    """The model in float32 at least, with fixed steps where it chose its own: what can be traced."""
    low = any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters())
    chosen = copy.deepcopy(model).float() if low else model
    with ExitStack() as stack:
        for module in chosen.modules():  # through frozen ones nothing could be traced back to token ids
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and not module.weight.requires_grad:
                stack.callback(module.weight.requires_grad_, False)
                module.weight.requires_grad_()
        if any(isinstance(module, nn.RNNBase) for module in chosen.modules()):
            stack.enter_context(
                torch.backends.cudnn.flags(enabled=False)
            )  # whose cells have no gradients here
        for name, module in chosen.named_modules():
            if not isinstance(module, _SOLVING) or not module.tableau.adaptive:
                continue
            if isinstance(module, ODEBlock) and module.n_steps is not None:
                continue
            calls = watcher.evaluations.get(name, [6])
            steps = max(1, min(8, math.ceil(max(calls) / 12)))
            if isinstance(module, ResidualStack):
                stack.callback(_put, module, solver=module.tableau, substeps=module.substeps)
                _put(module, solver="rk4", substeps=steps)
            else:
                stack.callback(_put, module, solver=module.tableau, n_steps=None)
                _put(module, n_steps=steps, solver="rk4")
        yield chosen


def _put(module: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(module, name, value)


def _floating(x: Any, model: nn.Module) -> Any:
    """Inputs of less than 32 bits as the model's own floating-point type."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return mapped(x, lambda t: t.to(dtype) if t.is_floating_point() and t.element_size() < 4 else t)


def _measure_blocks(
    found: Measures, model: nn.Module, x: Any, target: Any, loss_fn: Any, blocks: Any, seed: int
) -> None:
    layers: list[_Layer] = []
    recurrent: dict[str, tuple[nn.RNNBase, Tensor]] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, (*_WEIGHTED, nn.Embedding)):
                hooks.callback(module.register_forward_hook(_keeping(layers, name, found.probed)).remove)
            elif isinstance(module, nn.RNNBase):
                hooks.callback(module.register_forward_hook(_keeping_sequence(recurrent, name)).remove)
        traced = trace(model, x, blocks)
    found.recurrences = [_recurrence(name, *kept) for name, kept in recurrent.items()]
    found.notes += [_forgetful(r) for r in found.recurrences if r.ratio < _FORGETS]
    batch = found.probed
    output = prediction(traced.output)
    held = output.ndim > 0 and (batch in output.shape[:2] or len(output) % batch == 0)
    if not held and batch > 1:
        raise ValueError(
            f"the model's output must hold the {batch} samples as dimension 0: got shape "
            f"{tuple(output.shape)}. Give a model that returns its outputs, not its loss."
        )
    names = block_names(model, traced)
    found.detached = traced.detached
    found.blocks = [
        _static(a, name, _sibling(model, a, name)) for a, name in zip(traced.additions, names, strict=True)
    ]
    _spreads(found, traced, x, target, loss_fn, batch)
    _gradients(found, traced, layers, target, loss_fn)
    if found.non_finite is not None:
        return
    generator = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    for number, (a, b) in enumerate(zip(traced.additions, found.blocks, strict=True)):
        _probe(a, b, batch, generator)
        _show_progress(number + 1, len(found.blocks), started)
    if traced.additions:
        _measure_whole(found, traced, generator)


@dataclass(frozen=True)
class _Layer:
    """A call of a weighted layer: its name, its output and that one's place, and the size of its input."""

    name: str
    place: Place
    y: Tensor
    input_size: float


def _keeping(kept: list[_Layer], name: str, batch: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        positions = isinstance(module, nn.Embedding) and len(output) != batch  # the same for all samples
        if isinstance(output, Tensor) and output.grad_fn is not None and not positions:
            place = Place((GradientEdge(output.grad_fn, output.output_nr),), (output.shape,))
            x = next(tensors_in(args), None)
            kept.append(_Layer(name, place, output.detach(), NAN if x is None else _rms_of(x)))

    return hook


def _keeping_sequence(kept: dict[str, tuple[nn.RNNBase, Tensor]], name: str) -> Callable[..., None]:
    def hook(module: nn.RNNBase, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 3:  # and no packed sequence
            kept[name] = module, args[0].detach()

    return hook


def _recurrence(name: str, module: nn.RNNBase, x: Tensor) -> RecurrenceMeasures:
    """How much of the last output's gradient is left at the first time step, from a state of 0."""
    dim = 1 if module.batch_first else 0
    with torch.enable_grad():
        given = x.clone().requires_grad_()
        last = module(given)[0].select(dim, -1)[:, : module.hidden_size]  # of two directions the forward one
        [gradient] = torch.autograd.grad(last, given, torch.ones_like(last))
    first, own = (float(gradient.select(dim, t).double().norm()) for t in (0, -1))
    return RecurrenceMeasures(name, type(module).__name__, x.shape[dim], first / own if own > 0 else NAN)


def _forgetful(r: RecurrenceMeasures) -> str:
    """No fault by itself: what the last step needs may be near it."""
    other = "" if r.kind in ("LSTM", "GRU") else " An LSTM or a GRU, or h + η F(h), remembers longer."
    return (
        f"{r.name or 'The model'} ({r.kind}): at the first of {r.steps} time steps the gradient of its last "
        f"output is {r.ratio:.1g} times that at the last, so what comes first is hardly learnt from.{other}"
    )


def _rms_of(t: Tensor) -> float:
    return float(t.detach().double().norm()) / max(1, t.numel()) ** 0.5


def block_names(model: nn.Module, traced: Trace) -> list[str]:
    """The module that each addition is: its own, in a `ResidualStack` the field of that block.

    Where a module adds the branches of many in a loop, each addition is its branch's.
    """
    places: dict[str, int] = {}
    totals = Counter(a.module for a in traced.additions)
    names = []
    for a in traced.additions:
        place = places[a.module] = places.get(a.module, -1) + 1
        module = model.get_submodule(a.module)
        name = a.module
        if isinstance(module, ResidualStack) and not module.shared and totals[a.module] % module.depth == 0:
            each = totals[a.module] // module.depth
            name = block_name(a.module, module, place // each)
        elif totals[a.module] > _OWN and not isinstance(module, _SOLVING) and a.branch:
            name = a.branch
        names.append(name or (a.branch or a.name))
    return names


_FORGETS = 1e-10  # ratio of gradients through time
_OWN = 3  # additions that a block holds itself, as a decoder's layer; with more it is a loop over blocks


def _sibling(model: nn.Module, a: Addition, name: str) -> str:
    """The class of its module, with the addition's number where the module holds several."""
    owner = model.get_submodule(a.module if name == a.name else name)
    place = (
        "" if isinstance(owner, _SOLVING) or name != a.module else a.name.removeprefix(a.module or "model")
    )
    return type(owner).__name__ + place


def _static(a: Addition, name: str, sibling: str) -> BlockMeasures:
    """What the forward pass alone tells of a block."""
    x, y = a.x.double(), a.y.double()
    b = BlockMeasures(name, a.name, sibling, a.kind, a.keeps_shape, NAN, a.factor)
    if a.kind == "identity":
        b.shortcut = 1.0
    elif a.kind == "parameter-free" and a.shortcut.shape == a.x.shape:
        s, square = a.shortcut.double(), float(x.square().sum())
        c = float((s * x).sum()) / square if square > 0 else NAN
        if float((s - c * x).norm()) <= 1e-3 * max(abs(c), 1e-3) * square**0.5:
            b.shortcut = c
    b.ratio = _quotient(a.increment.double(), x)
    b.size = float(a.increment.double().square().mean().sqrt())
    b.growth = _quotient(y, x)
    if a.inactive:
        b.dead = max(a.inactive)
    return b


def _quotient(a: Tensor, b: Tensor) -> float:
    """‖a‖ / ‖b‖."""
    size = float(b.norm())
    return float(a.norm()) / size if size > 0 else NAN


def _spreads(found: Measures, traced: Trace, x: Any, target: Any, loss_fn: Any, batch: int) -> None:
    """How different the samples are at the inputs, in the last state and in the output.

    Of classes' logits without what all classes share, which no loss sees.
    """
    given = list(tensors_in(x))  # token ids where there is nothing else
    first = next((t for t in given if t.is_floating_point()), given[0])
    last = traced.additions[-1].y if traced.additions else None
    output = prediction(traced.output).detach()
    if loss_fn is None and isinstance(target, Tensor) and not target.is_floating_point() and output.ndim > 1:
        dim = -1 if target.shape == output.shape[:-1] else 1
        found.classes = output.shape[dim]
        output = output - output.mean(dim, keepdim=True)
    found.spread = tuple(NAN if t is None else spread(t, batch) for t in (first, last, output))  # type: ignore[assignment]


def spread(t: Tensor, batch: int) -> float:
    """‖z − mean over samples‖ / ‖z‖; nan for a single sample."""
    z = rows(t.double(), batch)
    size = float(z.norm())
    return float((z - z.mean(0)).norm()) / size if len(z) > 1 and size > 0 else NAN


def _gradients(found: Measures, traced: Trace, layers: list[_Layer], target: Any, loss_fn: Any) -> None:
    """One backward pass of the loss: gradients at every block's x and every layer's output."""
    batch = found.probed
    with torch.inference_mode(False), torch.enable_grad():
        losses = sample_losses(traced.output, target, loss_fn, batch)
        places = [a.at_x for a in traced.additions] + [layer.place for layer in layers]
        if not losses.requires_grad or not places:
            return
        gradients = gradients_at(losses.sum(), places)
    found.loss = float(losses.detach().mean())
    norms = [float(g.double().norm()) / batch**0.5 for g in gradients]
    for b, norm in zip(found.blocks, norms, strict=False):
        b.gradient = norm
    own = norms[len(found.blocks) :]
    for layer, norm in zip(layers, own, strict=True):
        size = _rms_of(layer.y)
        gain = size / layer.input_size if layer.input_size > 0 else NAN
        found.layers.append(LayerMeasures(layer.name, norm, size, spread(layer.y, batch), gain))
    if found.non_finite is not None:
        return
    if not math.isfinite(found.loss):
        found.non_finite = "", "the loss" if _finite(target) else "the targets"
        return
    names = [b.name for b in found.blocks] + [layer.name for layer in layers]
    infinite = [i for i, g in enumerate(gradients) if not bool(g.isfinite().all())]
    if infinite:  # the backward pass goes from the end, so the last layer with a bad gradient is the first
        in_layers = [i for i in infinite if i >= len(found.blocks)]
        name = names[(in_layers or infinite)[-1]]
        found.non_finite = name, f"the gradient at the output of {name}"


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    u = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    return u.to(device=like.device, dtype=like.dtype)


def _probe(a: Addition, b: BlockMeasures, batch: int, generator: torch.Generator) -> None:
    """The gains of a block and its largest singular value, from below."""
    products = block_products(a, batch)
    gains, branches, radial = [], [], []
    u = torch.zeros_like(a.y)
    for _ in range(_PROBES):
        u = _random(a.y, generator)
        w = products.pulled_back(u)
        gains.append(_quotient(w, u))
        rest = w - b.shortcut * u if math.isfinite(b.shortcut) else split_gradient(a, u)[1]
        branches.append(_quotient(rest, u))
        radial.append(_radial(rows(a.x, batch), rows(rest, batch)))
    b.gain, b.branch_gain, b.radial = _rms(gains), _rms(branches), _rms(radial)
    b.sigma = largest_singular_value(products, u, batch, _ROUNDS)


def _radial(x: Tensor, back: Tensor) -> float:
    """√n |cos| of a state and a gradient at it, root mean square over the samples."""
    if x.shape != back.shape:
        return NAN
    x, back = x.double(), back.double()
    sizes = (x.norm(dim=1) * back.norm(dim=1)).clamp_min(1e-300)
    return float(((x * back).sum(1) / sizes).square().mean().sqrt()) * x.shape[1] ** 0.5


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


def largest_singular_value(products: JacobianProducts, u: Tensor, batch: int, rounds: int) -> float:
    """σ_max of the worst sample from below, by power iteration on JJᵀ from u of y's shape."""
    row = rows(u, batch)
    sigma = torch.zeros(len(row), dtype=row.dtype, device=row.device)
    try:
        for _ in range(rounds):
            row = row / row.norm(dim=1, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
            back = products.vjp(row)
            sigma = back.norm(dim=1)
            row = products.jvp(back / sigma[:, None].clamp_min(torch.finfo(row.dtype).tiny))
        sigma = torch.maximum(sigma, row.norm(dim=1))
    except RuntimeError:  # an operation without a second derivative
        return NAN
    return float(sigma.max())


def _measure_whole(found: Measures, traced: Trace, generator: torch.Generator) -> None:
    """Gains from the first block's x, and from every other one's, to the last block's y.

    First is the first one that leads to the last: of two towers side by side one is looked at.
    """
    last = traced.additions[-1]
    u = _random(last.y, generator)
    backs = gradients_at(last.at_y, [a.at_x for a in traced.additions], u)
    leading = (i for i, back in enumerate(backs) if bool((back != 0).any()))
    at = next(leading, len(backs) - 1)
    first = traced.additions[at]
    found.whole_gain = _quotient(backs[at], u)
    products = JacobianProducts.between(last.at_y, first.at_x, last.y, first.x, found.probed)
    found.whole_sigma = largest_singular_value(products, u, found.probed, _WHOLE_ROUNDS)
    if found.whole_gain == math.inf:  # beyond what the numbers hold
        found.whole_sigma = math.inf
    before, after = (rows(t.double(), found.probed).norm(dim=1) for t in (first.x, last.y))
    found.state_growth = float((after / before.clamp_min(1e-300)).max())


def _show_progress(done: int, total: int, started: float) -> None:
    """A line on the terminal's standard error, where it takes long."""
    if not sys.stderr.isatty() or time.monotonic() - started < _PATIENCE:
        return
    end = "\r" if done < total else "\n"
    print(f"resode.diagnose: block {done} of {total}", end=end, file=sys.stderr, flush=True)
