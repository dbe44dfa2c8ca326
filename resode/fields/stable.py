"""Fields that promise the sign of Re λ, for every eigenvalue λ of their Jacobian and every weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from resode.checks import check_number, check_whole, checked, one_of
from resode.fields.parts import MONOTONE, make_activation
from resode.formulas import Cost, Shape
from resode.symbols import one_node


class StableField(nn.Module):
    """A field of operators K: matrices, or with `kernel_size` convolutions that keep the resolution."""

    def __init__(self, size: int, *, kernel_size: int | None, activation: str) -> None:
        super().__init__()
        self.size = check_whole("size", size, 1)
        if kernel_size is not None and check_whole("kernel_size", kernel_size, 1) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that the resolution is kept: got {kernel_size}.")
        self.kernel_size = kernel_size
        one_of(
            "a stable field's activation (it needs a slope that is nowhere negative)", activation, MONOTONE
        )
        self.act = make_activation(activation)

    def _operator(self, size: int) -> tuple[nn.Parameter, nn.Parameter]:
        """K with a norm near 1 and its bias, 0."""
        kernel = () if self.kernel_size is None else (self.kernel_size, self.kernel_size)
        weight = torch.randn(size, size, *kernel)
        return nn.Parameter(weight / (2 * math.sqrt(weight[0].numel()))), nn.Parameter(torch.zeros(size))

    def _cost(self, shape: Shape, size: int, applied: int, count: int = 1) -> Cost:
        """`count` operators of `size` channels with a bias each, `applied` times all told."""
        weights = size * size * (1 if self.kernel_size is None else self.kernel_size**2)
        positions = math.prod(shape[:-1] if self.kernel_size is None else shape[1:])
        return Cost(count * (weights + size), applied * weights * positions, shape)

    def extra_repr(self) -> str:
        """Size and kernel, for print, and for what asks whether two fields are alike."""
        return f"{self.size}" if self.kernel_size is None else f"{self.size}, kernel_size={self.kernel_size}"

    def _check(self, x: Tensor) -> None:
        _check_state(x, self.size, self.kernel_size is not None, type(self).__name__)


@one_node
def _check_state(x: Tensor, size: int, images: bool, name: str) -> None:
    if images:
        right, shape = x.ndim == 4 and x.shape[1] == size, f"(batch, {size}, height, width)"
    else:
        right, shape = x.ndim >= 1 and x.shape[-1] == size, f"(*batch, {size})"
    if not right:
        raise ValueError(
            f"{name} acts on states of shape {shape}: got x {tuple(x.shape)}. "
            "Build the field with the size of x, and with kernel_size for images only."
        )


@one_node
def _apply(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Kx + b."""
    if weight.ndim == 2:
        return nn.functional.linear(x, weight, bias)
    return nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


@one_node
def _transpose(weight: Tensor) -> Tensor:
    """The weight of Kᵀ; for a zero-padded convolution the flipped kernel with the channels exchanged."""
    return weight.T if weight.ndim == 2 else weight.transpose(0, 1).flip(2, 3)


class AntisymmetricField(StableField):
    r"""F(x) = σ((K − Kᵀ − γI)x + b): Re λ ≤ 0, and Re λ = 0 at γ = 0.

    With D = diag σ' ≥ 0 the Jacobian D(K − Kᵀ − γI) has the eigenvalues of D^½(K − Kᵀ − γI)D^½, whose
    symmetric part is −γD. At γ = 0 no step of Euler's is stable; rk4 is up to |ηλ| = 2.83.

    Args:
        size: features (the last dimension) or, with kernel_size, channels of the state.
        kernel_size: None for a matrix K, odd for a convolution.
        gamma: damping γ ≥ 0.
        activation: σ, a name in MONOTONE.

    Shapes:
        x (*batch, size) or (batch, size, height, width) -> F(x), the same.

    Raises:
        ValueError: gamma < 0, an even kernel, a σ that is not monotone, or another size of x.

    Source:
        Haber & Ruthotto (2017), arXiv:1705.03341; Chang et al. (2019), arXiv:1902.09689.

    Example:
        >>> field = AntisymmetricField(4).double()
        >>> J = torch.func.jacrev(field)(torch.ones(4, dtype=torch.float64))
        >>> bool(torch.linalg.eigvals(J).real.abs().max() < 1e-12)
        True
    """

    @checked
    def __init__(
        self, size: int, *, kernel_size: int | None = None, gamma: float = 0.0, activation: str = "tanh"
    ) -> None:
        super().__init__(size, kernel_size=kernel_size, activation=activation)
        check_number("gamma", gamma, least=0)
        self.gamma = gamma
        self.weight, self.bias = self._operator(size)

    def forward(self, x: Tensor) -> Tensor:
        """F(x), shape of x."""
        self._check(x)
        z = _apply(self.weight - _transpose(self.weight), x, self.bias)
        return self.act(z - self.gamma * x if self.gamma else z)

    def extra_repr(self) -> str:
        """Size and damping, for print."""
        return f"{super().extra_repr()}, gamma={self.gamma:g}"

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return self._cost(shape, self.size, 1)


class ParabolicField(StableField):
    r"""F(x) = −Kᵀσ(Kx + b): every λ is real and ≤ 0, as in a heat equation.

    The Jacobian −KᵀDK, D = diag σ' ≥ 0, is symmetric and negative semidefinite; Euler is stable for
    η ≤ 2/‖K‖² where σ' ≤ 1.

    Args:
        size, kernel_size, activation: as in `AntisymmetricField`.

    Source:
        Ruthotto & Haber (2020), Deep Neural Networks Motivated by Partial Differential Equations,
        arXiv:1804.04272.

    Example:
        >>> field = ParabolicField(4).double()
        >>> J = torch.func.jacrev(field)(torch.ones(4, dtype=torch.float64))
        >>> bool(torch.linalg.eigvalsh(J).max() < 1e-12)
        True
    """

    @checked
    def __init__(self, size: int, *, kernel_size: int | None = None, activation: str = "tanh") -> None:
        super().__init__(size, kernel_size=kernel_size, activation=activation)
        self.weight, self.bias = self._operator(size)

    def forward(self, x: Tensor) -> Tensor:
        """F(x), shape of x."""
        self._check(x)
        return -_apply(_transpose(self.weight), self.act(_apply(self.weight, x, self.bias)))

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return self._cost(shape, self.size, 2)


class HamiltonianField(StableField):
    r"""With the state in halves (p, q): F = (K₁ᵀσ(K₁q + b₁), −K₂ᵀσ(K₂p + b₂)), every λ imaginary.

    The Jacobian is [[0, A], [−B, 0]] with A, B symmetric and positive semidefinite, so λ² is an
    eigenvalue of −AB, real and ≤ 0. No step of Euler's is stable; rk4 is up to |ηλ| = 2.83.

    With leapfrog=η the second half is K₂ᵀσ(K₂(p + ηṗ) + b₂) and x + ηF(x) the symplectic leapfrog block
    (p first, then q at the new p), stable up to |ηλ| = 2 at one F a block. F itself then depends on η: a
    stack with another step or solver, such as a refined one, is leapfrog no more until its fields'
    `leapfrog` is set anew (to 0 for Runge-Kutta methods).

    Args:
        size: features or channels of the whole state, even; each half has size / 2.
        kernel_size, activation: as in `AntisymmetricField`.
        leapfrog: 0, or the η ≥ 0 of an Euler stack that is to be leapfrog.

    Raises:
        ValueError: an odd size, or as `AntisymmetricField`.

    Source:
        Haber & Ruthotto (2017), arXiv:1705.03341; Chang et al. (2018), arXiv:1709.03698.

    Example:
        >>> field = HamiltonianField(4).double()
        >>> J = torch.func.jacrev(field)(torch.ones(4, dtype=torch.float64))
        >>> bool(torch.linalg.eigvals(J).real.abs().max() < 1e-6)
        True
    """

    @checked
    def __init__(
        self, size: int, *, kernel_size: int | None = None, activation: str = "tanh", leapfrog: float = 0.0
    ) -> None:
        super().__init__(size, kernel_size=kernel_size, activation=activation)
        if size % 2:
            raise ValueError(f"a Hamiltonian state has two halves: size must be even, got {size}.")
        check_number("leapfrog", leapfrog, least=0)
        self.leapfrog = leapfrog
        self.weight1, self.bias1 = self._operator(size // 2)
        self.weight2, self.bias2 = self._operator(size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """F(x), shape of x."""
        self._check(x)
        dim = -1 if self.kernel_size is None else 1
        p, q = x.chunk(2, dim)
        dp = _apply(_transpose(self.weight1), self.act(_apply(self.weight1, q, self.bias1)))
        if self.leapfrog:
            p = p + self.leapfrog * dp
        dq = -_apply(_transpose(self.weight2), self.act(_apply(self.weight2, p, self.bias2)))
        return torch.cat((dp, dq), dim)

    def extra_repr(self) -> str:
        """Size and the leapfrog's step, for print."""
        return f"{super().extra_repr()}, leapfrog={self.leapfrog:g}"

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return self._cost(shape, self.size // 2, 4, count=2)
