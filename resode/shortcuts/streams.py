r"""Residual streams: a state of n copies that blocks read, write and mix.

    u = Σ_j h_j x_j,    y_i = Σ_j A_ij x_j + β_i F(u)

The residual block is n = 1 with A = h = β = 1. Over many blocks the state without the branches is
∏ A x: it dies or grows unless ∏ A stays bounded, which a doubly stochastic A guarantees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resode.checks import check_whole, checked
from resode.formulas import Cost, Shape, cost_of
from resode.shortcuts.doubly_stochastic import doubly_stochastic
from resode.symbols import one_node


@checked
@one_node
def to_streams(x: Tensor, streams: int) -> Tensor:
    """Copies of a state: x (batch, *features) -> (batch, streams, *features).

    Example:
        >>> to_streams(torch.zeros(2, 3), 4).shape
        torch.Size([2, 4, 3])
    """
    check_whole("streams", streams, 1)
    return x[:, None].expand(-1, streams, *x.shape[1:]).clone()


@checked
def from_streams(x: Tensor) -> Tensor:
    """The mean of the streams: x (batch, streams, *features) -> (batch, *features)."""
    return x.mean(1)


@dataclass(frozen=True)
class Mixing:
    """How a block reads, mixes and writes its streams.

    Args:
        read: h, shape (..., n).
        mix: A, shape (..., n, n), a row for each stream that comes out.
        write: β, shape (..., n).
    """

    read: Tensor
    mix: Tensor
    write: Tensor

    def step_matrix(self, z: complex | float) -> Tensor:
        """G(z) = A + zβhᵀ: one block on streams of x' = λx with a branch F = ηλ, z = ηλ; complex (..., n, n).

        It is the streams' stability function: the step is stable while no eigenvalue of G exceeds 1.
        """
        outer = self.write[..., :, None] * self.read[..., None, :]
        return self.mix + z * outer


class HyperConnection(nn.Module):
    r"""A residual block on n streams: it reads a mixture, mixes the streams and writes to each.

    Static, h, A and β are parameters. Dynamic, a bounded function of the state is added to each, one for
    every sample: s tanh(norm(x)·W), from each stream's features (dimension 2, averaged over the others) after
    division by their root mean square. Manifold-constrained, h = σ(·), β = 2σ(·) and A is doubly stochastic
    (rows and columns sum to 1 within 1e-6), so that ‖A‖₂ = 1 and so is that of any product of such A.

    At the start A is the identity (to 1e-3 a row where it is constrained), β = 1 and Σh = 1: streams that
    are copies of one x stay copies of x + F(x).

    Args:
        branch: F, of states (batch, *features), keeping their shape.
        streams: n.
        dynamic: let the weights depend on the state; needs `features`.
        manifold: constrain them.
        features: size of dimension 2 of the state, (batch, streams, features, …).
        read: the stream that an unconstrained block reads at the start, counted around n, so that a block's
            number may stand here; constrained ones read all alike.

    Shapes:
        x (batch, streams, *features) -> y, the same.

    Raises:
        ValueError: streams < 1, a dynamic block without `features`, or (on the call) another number of
            streams.

    Source:
        Zhu et al. (2024), Hyper-Connections, arXiv:2409.19606; Xie et al. (2025), mHC,
        arXiv:2512.24880.

    Example:
        >>> block = HyperConnection(nn.Linear(3, 3), streams=4, manifold=True)
        >>> block(torch.ones(2, 4, 3)).shape
        torch.Size([2, 4, 3])
        >>> block.mixing().mix.sum(0).detach()             # columns, as rows, sum to 1
        tensor([1.0000, 1.0000, 1.0000, 1.0000])
    """

    @checked
    def __init__(
        self,
        branch: nn.Module,
        streams: int = 4,
        dynamic: bool = False,
        manifold: bool = False,
        *,
        features: int | None = None,
        read: int = 0,
    ) -> None:
        super().__init__()
        n = check_whole("streams", streams, 1)
        self.branch, self.streams, self.dynamic, self.manifold = branch, n, bool(dynamic), bool(manifold)
        check_whole("read", read)
        if self.manifold:
            start = torch.full((n,), -math.log(n - 1) if n > 1 else 8.0)
            self.read = nn.Parameter(start)  # σ(read) = 1/n
            self.mix = nn.Parameter(8.0 * torch.eye(n))  # e⁻⁸ = 3e-4 beside the diagonal
            self.write = nn.Parameter(torch.zeros(n))  # 2σ(0) = 1
        else:
            self.read = nn.Parameter(torch.eye(n)[read % n])
            self.mix = nn.Parameter(torch.eye(n))
            self.write = nn.Parameter(torch.ones(n))
        if self.dynamic:
            if features is None:
                raise ValueError(
                    "a dynamic block reads its state's features: give features=, the size of dimension 2 of "
                    "(batch, streams, features, …)."
                )
            self.features: int | None = check_whole("features", features, 1)
            self.weight = nn.Parameter(torch.zeros(n + 2, features))  # h, A's columns, β of each stream
            self.scale = nn.Parameter(torch.full((3,), 0.01))
        else:
            self.features = None

    def mixing(self, x: Tensor | None = None) -> Mixing:
        """h, A and β: (n,), (n, n), (n,), or with a leading batch for a dynamic block's state x."""
        read, mix, write = self.read, self.mix, self.write
        if self.dynamic:
            if x is None:
                raise ValueError(
                    "a dynamic block's weights are those of a state: give x (batch, streams, …)."
                )
            seen = torch.tanh(_normed(x, self.features or 0) @ self.weight.to(x.dtype).mT)  # (B, n, n + 2)
            scale = self.scale.to(x.dtype)
            read = read + scale[0] * seen[..., 0]
            mix = mix + scale[1] * seen[..., 1:-1].mT  # what stream j says of its way to i stands in column j
            write = write + scale[2] * seen[..., -1]
        if self.manifold:
            return Mixing(torch.sigmoid(read), doubly_stochastic(mix), 2 * torch.sigmoid(write))
        return Mixing(read, mix, write)

    def forward(self, x: Tensor) -> Tensor:
        """The streams after the block, shape of x."""
        _check_streams(x, self.streams)
        mixing = self.mixing(x if self.dynamic else None)
        return _written(mixing.mix, x, mixing.write, self.branch(_read(mixing.read, x)))

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of shape (streams, *features), by formula."""
        n, size = self.streams, _size(shape[1:])
        own = Cost(2 * n + n * n, (n * n + n) * size, shape)
        if self.dynamic:
            features = self.features or 0
            own = Cost(own.parameters + (n + 2) * features + 3, own.macs + n * (n + 2) * features, shape)
        return own.beside(cost_of(self.branch, shape[1:]))

    def extra_repr(self) -> str:
        """Streams and kind, for print."""
        return f"streams={self.streams}, dynamic={self.dynamic}, manifold={self.manifold}"


def _size(shape: Shape) -> int:
    return int(torch.Size(shape).numel())


@one_node
def _check_streams(x: Tensor, streams: int) -> None:
    if x.ndim < 3 or x.shape[1] != streams:
        raise ValueError(
            f"this block takes states of {streams} streams, (batch, {streams}, *features): got x "
            f"{tuple(x.shape)}. Make them of one state by to_streams(x, streams); streams folded into the "
            f"batch cannot be told from it: unfold them, x.unflatten(0, (-1, {streams}))."
        )


@one_node
def _normed(x: Tensor, features: int) -> Tensor:
    """Features of each stream, averaged over positions, over their root mean square; (B, n, features)."""
    if x.shape[2] != features:
        raise ValueError(
            f"this dynamic block was built for features={features}: got x {tuple(x.shape)} with {x.shape[2]} "
            "in dimension 2."
        )
    mean = x.flatten(3).mean(3) if x.ndim > 3 else x
    return mean * torch.rsqrt(mean.square().mean(-1, keepdim=True) + 1e-6)


@one_node
def _read(read: Tensor, x: Tensor) -> Tensor:
    """Σ_j h_j x_j, with one h for all samples or one for each."""
    return (read.to(x.dtype)[..., None, :] @ x.flatten(2)).reshape(x.shape[0], *x.shape[2:])


@one_node
def _written(mix: Tensor, x: Tensor, write: Tensor, residual: Tensor) -> Tensor:
    """A x + βF(u), as an addition of two terms."""
    mixed = (mix.to(x.dtype) @ x.flatten(2)).reshape(x.shape)
    weights = write.to(x.dtype).reshape(*([1] if write.ndim == 1 else []), *write.shape, *[1] * (x.ndim - 2))
    return mixed + weights * residual[:, None]


@one_node
def _check_features(x: Tensor, features: int) -> None:
    if x.ndim < 2 or x.shape[1] != features:
        raise ValueError(
            f"this network takes states (batch, {features}, …): got x {tuple(x.shape)}. "
            "Build it with features= those of dimension 1."
        )


@one_node
def _attended(values: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_i α_i v_i and α, (B, l + 1), of values (B, l + 1, features, …)."""
    seen = values.flatten(3).mean(3) if values.ndim > 3 else values
    seen = seen * torch.rsqrt(seen.square().mean(-1, keepdim=True) + 1e-6)
    row = torch.softmax((seen @ query.to(values.dtype)[:, None])[..., 0], 1)
    read = (row[:, None] @ values.flatten(2)).reshape(values.shape[0], *values.shape[2:])
    return read, row


class AttentionResidual(nn.Module):
    r"""Branches that read a learnt average of all that was before them.

        u_l = Σ_{i ≤ l} α_{li} v_i,   v_{l+1} = F_l(u_l),   α_l = softmax_i(w_l · v_i/rms(v_i)),   v_0 = x

    and the last w gives the output. The plain residual network has α_{li} = 1, a sum; here each row of α
    sums to 1, and w = 0 at the start makes it a mean. The gain of the direct way from v_i to u_l is α_{li}.

    Args:
        branches: F_0 … F_{L−1}, keeping the state's shape.
        features: size of dimension 1 of the state, (batch, features, …).

    Shapes:
        x (batch, features, …) -> the same.

    Raises:
        ValueError: no branch, or (on the call) another size of dimension 1.

    Source:
        Kimi Team (2026), Attention Residuals, github.com/MoonshotAI/Attention-Residuals.

    Example:
        >>> network = AttentionResidual([nn.Linear(3, 3), nn.Linear(3, 3)], features=3)
        >>> network.attention(torch.ones(2, 3))[0]          # at the start each reads a mean
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.3333, 0.3333, 0.3333]])
    """

    @checked
    def __init__(self, branches: list[nn.Module], features: int) -> None:
        super().__init__()
        if not len(branches):
            raise ValueError("an attention residual needs at least one branch: got none.")
        self.branches = nn.ModuleList(branches)
        self.features = check_whole("features", features, 1)
        self.query = nn.Parameter(torch.zeros(len(self.branches) + 1, features))

    def _pass(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        _check_features(x, self.features)
        values, rows, read = [x], [], x
        for number in range(len(self.branches) + 1):
            attended = _attended(torch.stack(values, 1), self.query[number])
            read = attended[0]
            rows.append(attended[1])
            if number < len(self.branches):
                values.append(self.branches[number](read))
        return read, rows

    def forward(self, x: Tensor) -> Tensor:
        """The last read, shape of x."""
        return self._pass(x)[0]

    @torch.no_grad()
    def attention(self, x: Tensor) -> Tensor:
        """The graph over depth: α (batch, L + 1, L + 1), 0 above the diagonal; rows sum to 1."""
        rows = self._pass(x)[1]
        return torch.stack([nn.functional.pad(row, (0, len(rows) - row.shape[1])) for row in rows], 1)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        branches = [cost_of(branch, shape) for branch in self.branches]
        reads, size = sum(range(1, len(branches) + 2)), _size(shape)
        own = Cost(self.query.numel(), reads * (size + self.features), shape)
        return own.beside(*branches)
