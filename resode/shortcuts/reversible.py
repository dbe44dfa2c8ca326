r"""Blocks with an inverse: additive couplings and momentum.

    coupling   b ← b + F(a),  a ← a + G(b)                  (Gomez et al. 2017)
    momentum   v ← γv + (1 − γ)F(x),  x ← x + v             (Sander et al. 2021)

Both are undone exactly, in exact arithmetic. With rounding the inverse multiplies errors: by 1/γ a block in
momentum's v, so that no inverse exists beyond some depth, while outputs computed from it again agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resode.checks import check_number, checked
from resode.formulas import Cost, Shape, cost_of
from resode.symbols import one_node


class NotInvertible(ArithmeticError):
    """Rounding has eaten the inverse; the message says by how much and what to do."""


class _Reversible(nn.Module):
    """An inverse that measures its own error."""

    def _inverse(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def inverse(self, y: Tensor, tol: float = 1e-3) -> Tensor:
        """The state before, from the state after.

        It is computed twice, from y and from y moved by one rounding of each entry; the difference is what
        rounding makes of the inverse.

        Args:
            y: what `forward` gave.
            tol: the largest relative error that is accepted.

        Raises:
            NotInvertible: the error is larger.
        """
        check_number("tol", tol, above=0)
        x = self._inverse(y)
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, y.shape, generator=generator).to(y) * 2 - 1
        other = self._inverse(y * (1 + torch.finfo(y.dtype).eps * signs))
        error = ((x - other).norm() / x.norm()).item()
        if not error <= tol:
            raise NotInvertible(
                f"the inverse has a relative error of {error:.1g} by rounding alone, above {tol:g}. Take "
                f"fewer blocks, float64, {self._remedy()} or keep the states instead."
            )
        return x

    def _remedy(self) -> str:
        return "branches of a smaller slope"


class AdditiveCoupling(_Reversible):
    r"""Two halves of a state that add to each other: b ← b + F(a), then a ← a + G(b).

    On a' = λb, b' = λa with F = G = z it is [[1 + z², z], [z, 1]] on (a, b), of determinant 1: it keeps
    volume, is stable for imaginary z up to 2 and grows for every real z ≠ 0.

    Args:
        f, g: F and G, of states of half the size, keeping their shape.
        dim: along which x is cut in halves.

    Shapes:
        x, even in dimension dim -> the same.

    Raises:
        ValueError: x is odd in that dimension.

    Source:
        Gomez et al. (2017), The Reversible Residual Network, arXiv:1707.04585.

    Example:
        >>> block = AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> x = torch.ones(1, 4)
        >>> torch.allclose(block.inverse(block(x)), x)
        True
    """

    @checked
    def __init__(self, f: nn.Module, g: nn.Module, *, dim: int = 1) -> None:
        super().__init__()
        self.f, self.g, self.dim = f, g, dim

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _check_even(x, self.dim)
        halves = x.chunk(2, self.dim)
        return halves[0], halves[1]

    def forward(self, x: Tensor) -> Tensor:
        """The state after, shape of x."""
        a, b = self._halves(x)
        b = b + self.f(a)
        a = a + self.g(b)
        return torch.cat((a, b), self.dim)

    def _inverse(self, y: Tensor) -> Tensor:
        a, b = self._halves(y)
        a = a - self.g(b)
        b = b - self.f(a)
        return torch.cat((a, b), self.dim)

    def step_matrix(self, z: complex | float) -> Tensor:
        """The block on (a, b) where F and G multiply by z; complex, (2, 2)."""
        return torch.tensor([[1 + z * z, z], [z, 1]], dtype=torch.complex128)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        dim = self.dim if self.dim < 0 else self.dim - 1  # a sample has no batch dimension
        half = list(shape)
        half[dim] //= 2
        parts = [cost_of(part, tuple(half)) for part in (self.f, self.g)]
        return Cost(0, 0, shape).beside(*parts)


@one_node
def _check_even(x: Tensor, dim: int) -> None:
    if x.shape[dim] % 2:
        raise ValueError(f"a coupling cuts dimension {dim} in halves: got x {tuple(x.shape)}.")


@checked
def invertible_depth(gamma: float, dtype: torch.dtype = torch.float32, tol: float = 1e-3) -> float:
    r"""Blocks of momentum γ that can be undone: the L with ε γ⁻ᴸ = tol; 0 for γ = 0, inf for γ = 1.

    Args:
        gamma: γ, the momentum, from 0 to 1.
        dtype: of the state, whose rounding is ε.
        tol: relative error of the recovered state that is allowed.

    Example:
        >>> [int(invertible_depth(0.9, dtype)) for dtype in (torch.float32, torch.float64)]
        [85, 276]
    """
    check_number("gamma", gamma, least=0, most=1)
    check_number("tol", tol, above=0)
    if gamma in (0, 1):
        return math.inf if gamma else 0.0
    return max(0.0, math.log(tol / torch.finfo(dtype).eps) / -math.log(gamma))


class MomentumStack(_Reversible):
    r"""Residual blocks with a velocity: v ← γv + (1 − γ)F_l(x), x ← x + v, from v = 0.

    γ = 0 is the residual network. On x' = λx with z = ηλ a block is [[1 + (1 − γ)z, γ], [(1 − γ)z, γ]] on
    (x, v), of determinant γ: stable for real z down to −2(1 + γ)/(1 − γ).

    The state after the last block is (x, v) side by side in dimension 1: `forward` gives x alone,
    `states` both, which the inverse needs.

    Args:
        branches: F_0 … F_{L−1}, keeping the state's shape.
        gamma: γ, 0 ≤ γ < 1.

    Shapes:
        x (batch, features, …) -> the same.

    Raises:
        NotInvertible: (on `inverse`) more blocks than `invertible_depth` has for γ, the dtype and tol.

    Source:
        Sander et al. (2021), Momentum Residual Neural Networks, arXiv:2102.07870.

    Example:
        >>> network = MomentumStack([nn.Linear(2, 2) for _ in range(3)], gamma=0.5)
        >>> x = torch.ones(1, 2)
        >>> torch.allclose(network.inverse(network.states(x))[:, :2], x, atol=1e-5)
        True
    """

    @checked
    def __init__(self, branches: Sequence[nn.Module], gamma: float = 0.9) -> None:
        super().__init__()
        if not len(branches):
            raise ValueError("a stack needs at least one branch: got none.")
        self.branches = nn.ModuleList(branches)
        self.gamma = check_number("gamma", gamma, least=0, below=1)

    def forward(self, x: Tensor) -> Tensor:
        """The state x after the last block."""
        return self.states(x).chunk(2, 1)[0]

    def states(self, x: Tensor) -> Tensor:
        """(x, v) after the last block, side by side in dimension 1."""
        v = torch.zeros_like(x)
        for branch in self.branches:
            v = self.gamma * v + (1 - self.gamma) * branch(x)
            x = x + v
        return torch.cat((x, v), 1)

    def inverse(self, y: Tensor, tol: float = 1e-3) -> Tensor:
        """(x, v) before the first block from `states`' result; v is 0 there, to rounding."""
        most = invertible_depth(self.gamma, y.dtype, tol)
        if len(self.branches) > most:
            raise NotInvertible(
                f"each block's inverse divides v by γ = {self.gamma:g}, so that of {len(self.branches)} "
                f"blocks multiplies rounding by {self.gamma:g}^-{len(self.branches)}: in {y.dtype} at most "
                f"{int(most)} blocks can be undone to {tol:g}. Keep a state every {max(1, int(most))} "
                "blocks, or take a larger γ."
            )
        return super().inverse(y, tol)

    def _inverse(self, y: Tensor) -> Tensor:
        x, v = y.chunk(2, 1)
        for branch in reversed(self.branches):
            x = x - v
            v = (v - (1 - self.gamma) * branch(x)) / self.gamma
        return torch.cat((x, v), 1)

    def _remedy(self) -> str:
        return "a larger γ"

    def step_matrix(self, z: complex | float) -> Tensor:
        """One block on (x, v) where F multiplies by z; complex, (2, 2)."""
        g = self.gamma
        return torch.tensor([[1 + (1 - g) * z, g], [(1 - g) * z, g]], dtype=torch.complex128)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        parts = [cost_of(branch, shape) for branch in self.branches]
        return Cost(0, 0, shape).beside(*parts)
