r"""What a network is without a block, with blocks in another order, and with longer or shorter steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from resode.analysis.depth.losses import LossFunction, batch_of, parts, prediction, sample_losses
from resode.analysis.depth.sums import ScaledBranches
from resode.analysis.depth.tracing import Addition, trace
from resode.calls import call, tensors_in
from resode.checks import checked
from resode.progress import Progress
from resode.results import Result

Edits = Sequence[tuple[Addition, float]]
"""Blocks, and what their ηF is multiplied by."""


def run_edited(model: nn.Module, x: Any, edits: Edits) -> Any:
    """The model's output with ηF multiplied by c for each (addition, c) of a trace; 0 removes a block.

    Samples may be others than the traced ones.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for a, c in edits:
            if not a.shortcuts:  # a module, not an addition
                hook = model.get_submodule(a.module).register_forward_hook(_scaled(c))
                stack.callback(hook.remove)
        stack.enter_context(scaling(ScaledBranches(*branch_factors(edits))))
        return call(model, x)


def branch_factors(edits: Edits) -> tuple[dict[int, float], dict[int, tuple[int, int]]]:
    """What `ScaledBranches` takes for (addition, c) pairs."""
    factors = {number: c for a, c in edits for number in a.shortcuts}
    return factors, {leaf: (side, n) for a, _ in edits for n, (leaf, side) in a.shortcuts.items()}


@contextmanager
def scaling(mode: ScaledBranches) -> Iterator[None]:
    """Within it additions are the mode's, numbered as in a trace: attention runs unfused, as it did there."""
    with unfused_attention(), mode:
        yield


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Attention as matrix products; torch's encoder layers in one call, which no mode sees into, are off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _scaled(c: float) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = next(tensors_in(args))
        if isinstance(output, Tensor):
            return x + c * (output - x)
        return (x + c * (output[0] - x), *output[1:])

    return hook


def evaluated(
    model: nn.Module,
    x: Any,
    target: Any,
    edits: Edits = (),
    loss_fn: LossFunction | None = None,
    size: int = 32,
) -> tuple[float, Tensor]:
    """The mean loss over the samples, and the outputs, with blocks edited; in parts of `size` samples."""
    total, outputs = 0.0, []
    for some, wanted, count in parts(x, target, size):
        output = run_edited(model, some, edits)
        total += float(sample_losses(output, wanted, loss_fn, count).double().sum())
        outputs.append(prediction(output).double())
    return total / batch_of(x), torch.cat(outputs)


@dataclass(frozen=True)
class Lesion(Result):
    """A network without one of its blocks.

    Args:
        name: of the block.
        loss: mean loss without it.
        change: loss less the network's own.
        output_change: ‖z' − z‖ / ‖z‖ of the outputs, over all samples.
    """

    name: str
    loss: float
    change: float
    output_change: float


@checked
def lesion_study(
    model: nn.Module,
    x: Any,
    target: Any = None,
    *,
    blocks: str | Sequence[str] | None = None,
    loss_fn: LossFunction | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> list[Lesion]:
    """Run the network without each of its blocks in turn; weights are not changed.

    Args:
        model: in eval mode.
        x: inputs, as in `resode.profile_depth`.
        target: of the loss.
        blocks: names of modules to take as blocks instead of the residual additions, with * for any part of
            a name; without such a module its input goes on. This is the lesion of a plain network.
        loss_fn: another loss, one number a sample or a mean over samples; it need not be differentiable, so
            that the share of wrong answers will do.
        batch_size: samples at once.
        progress: say on a terminal how far it is, after two seconds.

    Raises:
        ValueError: the model has no residual block, or `blocks` names none.

    Source:
        Veit, Wilber & Belongie, Residual Networks Behave Like Ensembles of Relatively Shallow Networks
        (2016).

    Example:
        >>> from resode import ResidualStack
        >>> field = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(field.weight, 1.0)
        >>> stack = ResidualStack(field, depth=3).eval()  # 2³ = 8, without a block 4
        >>> [round(s.output_change, 6) for s in lesion_study(stack, torch.ones(2, 1))]
        [0.5, 0.5, 0.5]
    """
    traced = trace(model, next(iter(parts(x, None, 2)))[0], blocks).additions
    if not traced:
        raise ValueError("no residual block was found to remove. Name the blocks with blocks=.")
    measure = _against(model, x, target, loss_fn, batch_size)
    found = []
    with Progress("lesions", progress) as say:
        for number, a in enumerate(traced, 1):
            say(f"without {a.name}, {number} of {len(traced)}")
            found.append(Lesion(a.name, *measure([(a, 0.0)])))
    return found


@dataclass(frozen=True, repr=False)
class StepScan(Result):
    """The loss of a network whose residual branches are all multiplied by c.

    Args:
        factors: c; 1 is the network as it is.
        losses: mean losses.
        critical_factor: the smallest c above 1 at which the loss exceeds that at 1 by more than `rise`; inf
            where none of the factors does.
        rise: relative.
    """

    factors: list[float]
    losses: list[float]
    critical_factor: float
    rise: float


@checked
def step_scan(
    model: nn.Module,
    x: Any,
    target: Any,
    factors: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0),
    *,
    rise: float = 0.5,
    loss_fn: LossFunction | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> StepScan:
    """The critical step: how far every block's step can be lengthened before the loss gives way.

    Args:
        model: in eval mode.
        x: inputs, as in `resode.profile_depth`.
        target: of the loss.
        factors: what every step is multiplied by; 1 is always among them.
        rise: the loss gives way where it exceeds its value at 1 by this share.
        loss_fn: as in `lesion_study`.
        batch_size: samples at once.
        progress: say on a terminal how far it is, after two seconds.

    Raises:
        ValueError: the model has no residual block.

    Example:
        >>> from resode import ResidualStack
        >>> field = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(field.weight, -1.0)
        >>> stack = ResidualStack(field, depth=4, step_size=0.5).eval()  # |1 − c/2| < 1 up to c = 4
        >>> x = torch.ones(2, 1)
        >>> step_scan(stack, x, torch.zeros(2, 1), (1.0, 3.5, 4.5)).critical_factor
        3.5
    """
    traced = trace(model, next(iter(parts(x, None, 2)))[0]).additions
    if not traced:
        raise ValueError("no residual block was found, so there is no step to scale.")
    wanted = sorted({1.0, *map(float, factors)})
    losses = []
    with Progress("steps", progress) as say:
        for c in wanted:
            say(f"times {c:g}, {len(losses) + 1} of {len(wanted)}")
            losses.append(evaluated(model, x, target, [(a, c) for a in traced], loss_fn, batch_size)[0])
    base = losses[wanted.index(1.0)]
    broken = [c for c, v in zip(wanted, losses, strict=True) if c > 1 and not v <= base + rise * abs(base)]
    return StepScan(wanted, losses, min(broken, default=float("inf")), rise)


@dataclass(frozen=True)
class Reordering(Result):
    """A network with two of its blocks swapped.

    Args:
        container: the module that holds them.
        first: one block's place in it.
        second: the other's.
        loss: mean loss; `change` against the network as it is.
        change: loss less the network's own.
        output_change: ‖z' − z‖ / ‖z‖ over all samples.
    """

    container: str
    first: int
    second: int
    loss: float
    change: float
    output_change: float


@checked
def reordering_study(
    model: nn.Module,
    x: Any,
    target: Any = None,
    *,
    max_pairs: int = 20,
    blocks: str | Sequence[str] | None = None,
    loss_fn: LossFunction | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> list[Reordering]:
    """Swap pairs of like blocks and measure what that does; nearest neighbours first.

    Blocks are like where they lie in one `nn.Sequential` or `nn.ModuleList`, are of one class, and have
    parameters of the same shapes, and where residual additions happen in or around them. The order is put
    back afterwards.

    Args:
        model: in eval mode.
        x: inputs, as in `resode.profile_depth`.
        target: of the loss.
        max_pairs: how many pairs are tried.
        blocks: names of modules to take as blocks instead of the residual additions, as in `lesion_study`.
        loss_fn: as in `lesion_study`.
        batch_size: samples at once.
        progress: say on a terminal how far it is, after two seconds.

    Raises:
        ValueError: there are no two like residual blocks.

    Source:
        Veit, Wilber & Belongie, Residual Networks Behave Like Ensembles of Relatively Shallow Networks
        (2016).

    Example:
        >>> from resode import ResidualStack
        >>> _ = torch.manual_seed(0)
        >>> stack = ResidualStack([nn.Linear(2, 2) for _ in range(3)], step_size=0.1).eval()
        >>> [(s.first, s.second) for s in reordering_study(stack, torch.randn(4, 2))]
        [(0, 1), (1, 2), (0, 2)]
    """
    traced = trace(model, next(iter(parts(x, None, 2)))[0], blocks).additions
    names = {a.module for a in traced}
    pairs: list[tuple[str, int, int]] = []
    for name, container in model.named_modules():
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            continue
        parent = name.rpartition(".")[0]
        if not any(n == parent or n.startswith(f"{name}." if name else "") for n in names):
            continue
        kinds = [_kind(child) for child in container]
        pairs += [
            (name, i, j)
            for i in range(len(kinds))
            for j in range(i + 1, len(kinds))
            if kinds[i] == kinds[j] and kinds[i][1] and _residual(name, parent, i, names)
        ]
    if not pairs:
        raise ValueError("no two residual blocks of one kind lie in one Sequential or ModuleList.")
    pairs.sort(key=lambda p: p[2] - p[1])
    measure = _against(model, x, target, loss_fn, batch_size)
    found = []
    with Progress("reordering", progress) as say:
        for number, (name, i, j) in enumerate(pairs[:max_pairs], 1):
            say(f"pair {number} of {min(max_pairs, len(pairs))}")
            with _swapped(model.get_submodule(name), i, j):
                found.append(Reordering(name, i, j, *measure(())))
    return found


def _residual(container: str, parent: str, index: int, names: set[str]) -> bool:
    """Whether an addition happens in the child, or in the stack whose fields the container holds."""
    child = f"{container}.{index}" if container else str(index)
    return parent in names or any(n == child or n.startswith(child + ".") for n in names)


def _kind(module: nn.Module) -> tuple[type, tuple[Any, ...]]:
    return type(module), tuple((n, tuple(p.shape)) for n, p in module.named_parameters())


@contextmanager
def _swapped(container: Any, i: int, j: int) -> Iterator[None]:
    container[i], container[j] = container[j], container[i]
    try:
        yield
    finally:
        container[i], container[j] = container[j], container[i]


def _against(
    model: nn.Module, x: Any, target: Any, loss_fn: LossFunction | None, size: int
) -> Callable[[Edits], tuple[float, float, float]]:
    """A function of edits: the loss, and how far it and the outputs are from those of the model as it is."""
    base, before = evaluated(model, x, target, (), loss_fn, size)

    def measure(edits: Edits) -> tuple[float, float, float]:
        loss, after = evaluated(model, x, target, edits, loss_fn, size)
        return loss, loss - base, float((after - before).norm() / before.norm())

    return measure
