r"""Networks whose state is several streams: how blocks mix them, and what that does over depth.

A block on n streams gives y_i = Σ_j A_ij x_j + β_i F(Σ_j h_j x_j). What passes the blocks beside their
branches is the product of the A; its norm says whether that way dies, grows or stays. Nothing of the
block's code is needed: with its branch silenced, A is the matrix that makes its output of its input,
found at every position by least squares over the features, and the residue says whether there is one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from resode.analysis.depth.losses import batch_of
from resode.analysis.depth.stream_modules import count_and_branch
from resode.calls import ModuleCall, call, hooked, is_floating, matching, recorded, tensors_in
from resode.checks import checked
from resode.modes import evaluating
from resode.results import Result
from resode.tables import csv_text, plain_table, short

_EXACT = 1e-3  # of a mixture, relative; float32 blocks whose streams are nearly alike leave 1e-4
_APART = 1e-3  # streams closer to one another than this are moved by as much


@dataclass(frozen=True, eq=False, repr=False)
class StreamProfile(Result):
    """The mixing of streams, block by block.

    Args:
        names: of the blocks.
        mixing: their A at every position, shape (positions, n, n) each; n = 1 where a block makes and
            averages its streams within itself.
        residue: of each, ‖Y − AX‖/‖Y‖ in the worst position.
    """

    _columns = ("names", "residue")

    names: tuple[str, ...]
    mixing: tuple[Tensor, ...] = field(repr=False)
    residue: tuple[float, ...]

    @property
    def row_error(self) -> tuple[float, ...]:
        """How far a row sum is from 1, in the worst row and position of each block."""
        return tuple((a.sum(-1) - 1).abs().max().item() for a in self.mixing)

    @property
    def column_error(self) -> tuple[float, ...]:
        """The same of the column sums."""
        return tuple((a.sum(-2) - 1).abs().max().item() for a in self.mixing)

    def products(self) -> list[Tensor]:
        """A_l … A_0 after each block l; positions are those of the same number, or the one there is."""
        found: list[Tensor] = []
        for a in self.mixing:
            found.append(a if not found else a @ found[-1])
        return found

    def norms(self) -> list[float]:
        """‖A_l … A_0‖₂ after each block, the largest over the positions."""
        return [torch.linalg.matrix_norm(p, 2).max().item() for p in self.products()]

    def gains(self) -> Tensor:
        """How much of each first stream is left after each block: column norms of the products, (L, n)."""
        return torch.stack([p.norm(dim=-2).mean(0) for p in self.products()])

    def to_csv(self) -> str:
        """A line a block: name, streams, row_error, column_error, norm, residue."""
        columns = ["block", "streams", "row_error", "column_error", "norm", "residue"]
        return csv_text(columns, self._rows())

    def _rows(self) -> list[list[Any]]:
        parts = zip(
            self.names,
            self.mixing,
            self.row_error,
            self.column_error,
            self.norms(),
            self.residue,
            strict=True,
        )
        return [[name, a.shape[-1], *numbers] for name, a, *numbers in parts]

    def _headline(self) -> str:
        return f"{len(self.names)} blocks with several residual streams"

    def __str__(self) -> str:
        heads = ["block", "streams", "rows - 1", "columns - 1", "‖product‖", "residue"]
        rows = [[name, str(n), *(short(v) for v in numbers)] for name, n, *numbers in self._rows()]
        return "\n".join(plain_table(heads, rows))


@checked
def stream_mixing(
    model: nn.Module,
    x: Any,
    *,
    blocks: str | Sequence[str] | None = None,
    streams: int | None = None,
    branch: str | None = None,
) -> StreamProfile:
    """The matrix by which each block mixes its streams, ours or anyone's, at the states that x leads to.

    Args:
        model: any network; it is put in evaluation mode for the while.
        x: its input, as `profile_depth` takes it.
        blocks: names of the blocks, * and ? for a part; None takes the modules that have a number of streams
            (`streams`, `num_residual_streams`, `num_streams`) and a branch.
        streams: how many a state has, where the blocks do not say it.
        branch: name of the child that is F; None takes `branch`, `block`, `fn`, `layer` or `f`.

    Returns:
        The profile. Streams may be dimension 1 of a state or folded into its batch, and features its last
        or its first dimension after that; one matrix a sample and position.

    Raises:
        ValueError: no block, a number of streams that its state cannot have, or a block that is no mixture
            of streams beside its branch.

    Source:
        Xie et al. (2025), arXiv:2512.24880, section 3, for what the product of the A says.

    Example:
        >>> from resode.shortcuts import HyperConnection
        >>> network = nn.Sequential(*[HyperConnection(nn.Linear(8, 8), 2, manifold=True) for _ in range(3)])
        >>> print(stream_mixing(network, torch.randn(4, 2, 8)).names)
        ('0', '1', '2')
    """
    found = _blocks(model, blocks, streams, branch)
    with evaluating(model), torch.no_grad():
        with recorded({name: module for name, (module, _, _) in found.items()}) as calls:
            call(model, x)
        first = {made.name: made for made in reversed(calls)}  # of several calls
        order = [made.name for made in calls if first[made.name] is made]
        results = [_mixing_of(first[name], *found[name][1:], batch_of(x)) for name in order]
    return StreamProfile(tuple(order), tuple(a for a, _ in results), tuple(r for _, r in results))


def _blocks(
    model: nn.Module, blocks: str | Sequence[str] | None, streams: int | None, branch: str | None
) -> dict[str, tuple[nn.Module, str, int]]:
    """Of every block by its name: the module, the name of its branch and the number of streams."""
    named = matching(model, blocks)
    found = {}
    for name, module in model.named_modules():
        if named is not None and name not in named:
            continue
        count, child = count_and_branch(module, streams, branch)
        if named is not None and (count is None or child is None):
            lacks = "number of streams: give streams=" if count is None else "branch: name it, branch="
            raise ValueError(f"{name or 'the model'} tells no {lacks}.")
        if (
            count is not None
            and child is not None
            and (named is not None or count_and_branch(module)[0] is not None)
        ):
            found[name] = module, child, count
    if not found:
        raise ValueError(
            "no block with streams was found: none of the model's modules has a number of streams and a "
            "branch. Name them: blocks='layers.*', streams=4, branch='mlp'."
        )
    return found


def _mixing_of(made: ModuleCall, child: str, n: int, batch: int) -> tuple[Tensor, float]:
    """A at every position, and its residue."""
    name, state = made.name, made.state
    if state is None:
        raise ValueError(f"{name} takes no tensor, so its streams cannot be seen.")
    silent = copy.deepcopy(made.module).double()
    getattr(silent, child).register_forward_hook(lambda m, a, output: _zeros(output))
    wide = state.double()
    spread = _spread(wide, n, batch)
    if spread is not None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(wide.shape, generator=generator, dtype=torch.float64).to(wide)
        wide = wide + spread * wide.std() * noise
    args, kwargs = pytree.tree_map(
        lambda a: wide if a is state else a.double() if is_floating(a) else a, (made.args, made.kwargs)
    )
    out = next(tensors_in(silent(*args, **kwargs)), None)
    if out is None or out.shape != wide.shape:
        raise ValueError(
            f"{name} does not keep its state's shape {tuple(state.shape)}, so it mixes no streams."
        )
    best: tuple[Tensor, float] | None = None
    for before, after in _arranged(wide, out, n, batch):
        a, residue = _least_squares(before, after)
        if best is None or residue < best[1]:
            best = a, residue
        if residue <= _EXACT:
            return a, residue
    if best is None:
        raise ValueError(
            f"{name} has {n} streams, which a state of {tuple(state.shape)} for {batch} samples does "
            "not show: they are neither dimension 1 nor folded into the batch. Give streams=, or a batch of "
            "another size."
        )
    raise ValueError(
        f"beside its branch {child!r} {name} is no mixture of {n} streams: {best[1]:.1g} of its output is "
        "left over. Name the child that is F with branch=, or give streams=."
    )


def _zeros(output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return type(output)(_zeros(o) for o in output) if isinstance(output, tuple | list) else output


def _layouts(x: Tensor, n: int, batch: int) -> list[Tensor]:
    """The state as (samples, n, …): streams in dimension 1, folded into the batch, or one stream."""
    if x.ndim >= 3 and x.shape[0] == batch and x.shape[1] == n:
        return [x]
    if x.shape[0] == batch * n and n > 1:
        return [x.unflatten(0, (batch, n)), x.unflatten(0, (n, batch)).transpose(0, 1)]
    return [x[:, None]] if x.shape[0] == batch else []


def _spread(x: Tensor, n: int, batch: int) -> float | None:
    """How far streams must be moved to be told apart; None where they already can be."""
    for streams in _layouts(x, n, batch):
        flat = streams.flatten(2)
        if flat.shape[1] == 1:
            return None
        s = torch.linalg.svdvals(flat)
        if (s[:, -1] > _APART * s[:, 0]).all():
            return None
    return _APART


def _arranged(x: Tensor, y: Tensor, n: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs as (positions, streams, features), for each way in which they may lie."""
    found = []
    for before, after in zip(_layouts(x, n, batch), _layouts(y, n, batch), strict=True):
        found.append((before.flatten(2), after.flatten(2)))  # one matrix a sample
        if before.ndim > 3:  # one a position, features last or first
            for axes in ((1, -1), (1, 2)):
                pair = [t.movedim(axes, (-2, -1)).flatten(0, -3) for t in (before, after)]
                found.append((pair[0], pair[1]))
    return [(b, a) for b, a in found if b.shape[-1] >= b.shape[-2]]


def _least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """A with Y = AX, and what is left over, relative, in the worst position."""
    a = torch.linalg.lstsq(x.mT, y.mT).solution.mT
    left = (y - a @ x).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1).clamp_min(1e-300)
    return a, left.max().item()


@dataclass(frozen=True, eq=False, repr=False)
class DepthAttention(Result):
    """What layers read of all that was before them.

    Args:
        names: of the modules that read, in the order of their calls.
        weights: α, shape (readers, sources), means over samples and positions; 0 where there is none yet.
            The gain of the direct way from source i to reader j is α_ji.
        residue: of each reader, what is left over of its output, relative, in the worst position.
    """

    _columns = ("names", "residue")

    names: tuple[str, ...]
    weights: Tensor
    residue: tuple[float, ...]


@checked
def depth_attention(
    model: nn.Module, x: Any, *, readers: str | Sequence[str] | None = None
) -> DepthAttention:
    """The graph of attention over depth: which earlier outputs each layer reads, and how strongly.

    A reader is a module whose only tensor is a stack (sources, batch, …, features) or (batch, sources, …,
    features) and whose output is a weighted mean of the sources: weights that are not negative, sum to 1 and
    leave nothing over.

    Args:
        model: any network; evaluation mode for the while.
        x: its input.
        readers: names of the modules, * and ? for a part; None takes all that are readers.

    Raises:
        ValueError: there is none, or a named one is none.

    Source:
        Kimi Team (2026), Attention Residuals, github.com/MoonshotAI/Attention-Residuals.

    Example:
        >>> class Mean(nn.Module):
        ...     def forward(self, stack):
        ...         return stack.mean(0)
        >>> class Two(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.read = Mean()
        ...     def forward(self, x):
        ...         return self.read(torch.stack([x, x.tanh()]))
        >>> depth_attention(Two(), torch.randn(3, 5)).weights
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    named = matching(model, readers)
    found: list[tuple[str, Tensor, float]] = []

    def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if len(tensors) != 1 or not isinstance(output, Tensor):
            return
        read = _read_of(tensors[0].double(), output.double())
        if read is not None:
            found.append((name, *read))
        elif named is not None:
            raise ValueError(f"{name} gives no weighted mean of a stack: it is no reader of earlier layers.")

    modules = {
        name: module
        for name, module in model.named_modules()
        if (name in named if named is not None else not list(module.children()) or name)
    }
    with evaluating(model), torch.no_grad(), hooked(modules, after=look):
        call(model, x)
    if not found:
        raise ValueError(
            "no module of the model reads a weighted mean of a stack of earlier outputs. Name one: readers=."
        )
    most = max(len(weights) for _, weights, _ in found)
    weights = torch.stack([nn.functional.pad(w, (0, most - len(w))) for _, w, _ in found])
    return DepthAttention(tuple(name for name, *_ in found), weights, tuple(r for *_, r in found))


def _read_of(stack: Tensor, output: Tensor) -> tuple[Tensor, float] | None:
    """Mean weights of the sources, and the residue; None where the output is no mean of them."""
    for dim in (0, 1):
        if stack.ndim != output.ndim + 1 or stack.shape[:dim] + stack.shape[dim + 1 :] != output.shape:
            continue
        x = stack.movedim(dim, -2).flatten(0, -3) if stack.ndim > 2 else stack[None]  # (P, sources, features)
        y = output.flatten(0, -2)[:, None] if output.ndim > 1 else output[None, None]
        if x.shape[1] > x.shape[2]:
            continue
        a, residue = _least_squares(x, y)
        sums = a.sum(-1)
        if residue <= _EXACT and (sums - 1).abs().max() < 1e-2 and a.min() > -1e-2:
            return a[:, 0].mean(0), residue
    return None


@checked
def map_limit(step_matrix: Any, eigenvalue: complex = -1.0, *, most: float = 1e6) -> float:
    r"""The first η at which a step map G(ηλ) has an eigenvalue beyond 1, as `StepLimit` means it.

    Args:
        step_matrix: z -> G(z), (n, n), such as `Mixing.step_matrix`, `MomentumStack.step_matrix`.
        eigenvalue: λ of the branch.
        most: where the search ends, with inf.

    Returns:
        The largest h with ρ(G(sλ)) ≤ 1 (to 1e-9) for all 0 ≤ s ≤ h on a grid of 40 points an octave, then to
        a relative 1e-9 by bisection; 0 where the map grows at once.

    Example:
        >>> from resode.shortcuts import MomentumStack
        >>> round(map_limit(MomentumStack([nn.Identity()], gamma=0.5).step_matrix), 6)   # 2(1 + γ)/(1 − γ)
        6.0
    """

    def grows(h: float) -> bool:
        g = torch.as_tensor(step_matrix(h * complex(eigenvalue)))
        return torch.linalg.eigvals(g.detach().to(torch.complex128)).abs().max().item() > 1 + 1e-9

    low, high = 0.0, 1e-6
    while high <= most and not grows(high):
        low, high = high, high * 2 ** (1 / 40)
    if high > most:
        return math.inf
    if low == 0:
        return 0.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    return low
