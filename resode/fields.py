r"""Fields F: what a residual block adds to its state, x + ηF(x).

A field keeps the state's shape, so that it can be the right-hand side of dx/dt = F(x) and any
solver can advance it. It begins with its own normalization and activation (pre-activation), never
in place: the state that comes in stays as it is.

Convolutions act on images (batch, channels, height, width), dense fields on the last dimension.
The stable fields at the end promise the sign of Re λ, for every eigenvalue λ of their Jacobian and
every weight, by their form alone.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
"""Activations by name. ReLU limits a solver's order; gelu, silu, softplus and tanh are smooth."""

MONOTONE = ("relu", "elu", "softplus", "tanh")
"""Activations whose slope is nowhere negative, which the stable fields rely on."""

NORMS = ("batch", "group", "none")
"""Normalizations by name; `make_norm` says what each is."""


def one_of(what: str, value: object, valid: Collection[str]) -> str:
    """`value` if it is among `valid`; otherwise a ValueError that lists them and suggests the closest."""
    if isinstance(value, str) and value in valid:
        return value
    close = difflib.get_close_matches(str(value), list(valid), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{what} must be one of {', '.join(map(repr, valid))}: got {value!r}.{hint}")


def positive(what: str, value: object) -> int:
    """`value` if it is a whole number of at least 1; otherwise a ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1: got {value!r}.")
    return value


def make_activation(name: str) -> nn.Module:
    """The activation called `name` in ACTIVATIONS, never in place."""
    return ACTIVATIONS[one_of("activation", name, ACTIVATIONS)]()


def make_norm(kind: str, channels: int) -> nn.Module:
    """Normalization of images (batch, channels, height, width).

    Args:
        kind: "batch" is BatchNorm2d; "group" is GroupNorm, which never couples samples, with the
            most groups that divide the channels, at most 32 and of at least 4 channels each;
            "none" passes the state through.
        channels: channels of the state.

    Raises:
        ValueError: unknown kind, or channels < 1.

    Source:
        Ioffe & Szegedy (2015), arXiv:1502.03167; Wu & He (2018), arXiv:1803.08494.

    Example:
        >>> make_norm("group", 16).num_groups, make_norm("group", 640).num_groups
        (4, 32)
    """
    positive("channels", channels)
    if one_of("norm", kind, NORMS) == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        most = max(1, min(32, channels // 4))
        return nn.GroupNorm(max(g for g in range(1, most + 1) if channels % g == 0), channels)
    return nn.Identity()


def make_conv(in_channels: int, out_channels: int, size: int, stride: int = 1, *, norm: str) -> nn.Conv2d:
    """A size×size convolution that keeps the resolution at stride 1, with He's initialization.

    The weights' variance is 2 / fan-out, as in the residual networks' published code. Without norms
    (norm "none") it is 2 / fan-in, which keeps the state's second moment from layer to layer, and the
    convolution has a bias, zero at first, which a norm would supply.

    Source:
        He et al. (2015), Delving Deep into Rectifiers, arXiv:1502.01852.
    """
    conv = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=norm == "none")
    if not conv.weight.is_meta:  # there is nothing to fill, and torch pretends slowly
        fan = "fan_in" if norm == "none" else "fan_out"
        nn.init.kaiming_normal_(conv.weight, mode=fan, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class SqueezeExcitation(nn.Module):
    r"""Gates every channel by the whole image: x ⊙ sigmoid(W₂ relu(W₁ mean(x) + b₁) + b₂).

    Args:
        channels: channels of x (batch, channels, height, width).
        reduction: channels per unit of the hidden layer, which has at least 4 units.

    Source:
        Hu et al. (2018), arXiv:1709.01507.

    Example:
        >>> SqueezeExcitation(16)(torch.ones(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(positive("channels", channels) // positive("reduction", reduction), 4)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The gated images, shape of x."""
        mean = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * torch.sigmoid(self.fc2(self.act(self.fc1(mean))))


class _ImageField(nn.Module):
    """Checks the channels that a convolutional field was built for."""

    channels: int

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"{type(self).__name__} acts on images of shape (batch, {self.channels}, height, width): "
                f"got x {tuple(x.shape)}. Build the field with the channels of x, or change them "
                "between stages (resode.shortcuts)."
            )


class ConvField(_ImageField):
    r"""Two 3×3 convolutions: F(x) = conv(σ(norm(conv(σ(norm(x)))))).

    x + F(x) is the basic pre-activation block, and the Euler step of size 1 on dx/dt = F(x).

    Args:
        channels: channels of the state, kept.
        norm: "batch", "group" or "none", see `make_norm`.
        activation: σ, a name in ACTIVATIONS.
        squeeze_excitation: gate F's channels at its end.
        zero_init_last: start the last convolution at 0, so that F = 0 and the block is the identity.

    Shapes:
        x (batch, channels, height, width) -> F(x), the same.

    Raises:
        ValueError: an unknown name, or x with other channels (on the call).

    Source:
        He et al. (2016), Identity Mappings in Deep Residual Networks, arXiv:1603.05027, fig. 1b.

    Example:
        >>> field = ConvField(16, norm="group")
        >>> field(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        *,
        norm: str = "batch",
        activation: str = "relu",
        squeeze_excitation: bool = False,
        zero_init_last: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.bn1 = make_norm(norm, channels)
        self.conv1 = make_conv(channels, channels, 3, norm=norm)
        self.bn2 = make_norm(norm, channels)
        self.conv2 = make_conv(channels, channels, 3, norm=norm)
        self.act = make_activation(activation)
        self.se = SqueezeExcitation(channels) if squeeze_excitation else nn.Identity()
        if zero_init_last:
            nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """F(x), shape of x."""
        self._check(x)
        out = self.conv1(self.act(self.bn1(x)))
        out = self.conv2(self.act(self.bn2(out)))
        return self.se(out)


class BottleneckField(_ImageField):
    r"""1×1 down, 3×3, 1×1 up, each after norm and activation: the bottleneck pre-activation block's F.

    Args:
        channels: channels of the state, kept.
        expansion: the 3×3 convolution has channels / expansion channels.
        norm, activation, squeeze_excitation, zero_init_last: as in `ConvField`.

    Shapes:
        x (batch, channels, height, width) -> F(x), the same.

    Raises:
        ValueError: channels not divisible by expansion, an unknown name, or x with other channels
            (on the call).

    Source:
        He et al. (2016), arXiv:1603.05027.

    Example:
        >>> field = BottleneckField(64)
        >>> field.conv2.weight.shape, field(torch.zeros(2, 64, 8, 8)).shape
        (torch.Size([16, 16, 3, 3]), torch.Size([2, 64, 8, 8]))
    """

    def __init__(
        self,
        channels: int,
        *,
        expansion: int = 4,
        norm: str = "batch",
        activation: str = "relu",
        squeeze_excitation: bool = False,
        zero_init_last: bool = False,
    ) -> None:
        super().__init__()
        if positive("channels", channels) % positive("expansion", expansion):
            raise ValueError(
                f"a bottleneck's channels must be a multiple of its expansion: got {channels}, {expansion}."
            )
        self.channels = channels
        middle = channels // expansion
        self.bn1 = make_norm(norm, channels)
        self.conv1 = make_conv(channels, middle, 1, norm=norm)
        self.bn2 = make_norm(norm, middle)
        self.conv2 = make_conv(middle, middle, 3, norm=norm)
        self.bn3 = make_norm(norm, middle)
        self.conv3 = make_conv(middle, channels, 1, norm=norm)
        self.act = make_activation(activation)
        self.se = SqueezeExcitation(channels) if squeeze_excitation else nn.Identity()
        if zero_init_last:
            nn.init.zeros_(self.conv3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """F(x), shape of x."""
        self._check(x)
        out = self.conv1(self.act(self.bn1(x)))
        out = self.conv2(self.act(self.bn2(out)))
        out = self.conv3(self.act(self.bn3(out)))
        return self.se(out)


class MLPField(nn.Module):
    r"""Two layers: F(x) = W₂ σ(W₁x + b₁) + b₂.

    Args:
        width: features of the state, its last dimension.
        hidden: features between the layers; width where None.
        activation: σ, a name in ACTIVATIONS.
        zero_init_last: start W₂ at 0, so that F = 0 and the block is the identity.

    Weights start with He's variance 2 / fan-in, biases at 0.

    Shapes:
        x (*batch, width) -> F(x), the same.

    Raises:
        ValueError: an unknown name, or x of another width (on the call).

    Example:
        >>> MLPField(64, hidden=128)(torch.zeros(3, 64)).shape
        torch.Size([3, 64])
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        activation: str = "relu",
        zero_init_last: bool = False,
    ) -> None:
        super().__init__()
        self.width = positive("width", width)
        hidden = width if hidden is None else positive("hidden", hidden)
        self.fc1 = nn.Linear(width, hidden)
        self.act = make_activation(activation)
        self.fc2 = nn.Linear(hidden, width)
        for layer in (self.fc1, self.fc2):
            if not layer.weight.is_meta:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        if zero_init_last:
            nn.init.zeros_(self.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """F(x), shape of x."""
        if x.ndim < 1 or x.shape[-1] != self.width:
            raise ValueError(
                f"MLPField acts on states of shape (*batch, {self.width}): got x {tuple(x.shape)}. "
                "Build the field with the width of x."
            )
        return self.fc2(self.act(self.fc1(x)))


class SoftThresholdField(nn.Module):
    r"""F(x) = sign(z) max(|z| − τ, 0) with z = G(x): exactly 0 where |G(x)| ≤ τ.

    In that dead zone the block x + ηF(x) is the identity to the bit.

    Args:
        branch: G, any field.
        threshold: τ at the start; it is learnt, as |threshold|.
        channels: one τ for each channel (dimension 1 of x); one for all where None.

    Shapes:
        x (batch, *state) -> F(x), the same.

    Raises:
        ValueError: threshold < 0 or not finite, or channels < 1.

    Example:
        >>> field = SoftThresholdField(nn.Identity(), threshold=1.0)
        >>> x = torch.tensor([[-3.0, 0.5, 1.25, 0.0]])
        >>> field(x).tolist(), field.active_share(x).tolist()
        ([[-2.0, 0.0, 0.25, 0.0]], [0.5])
    """

    def __init__(self, branch: nn.Module, *, threshold: float = 0.1, channels: int | None = None) -> None:
        super().__init__()
        if not 0 <= threshold < math.inf:
            raise ValueError(f"threshold must be finite and at least 0: got {threshold!r}.")
        self.branch = branch
        count = 1 if channels is None else positive("channels", channels)
        self.threshold = nn.Parameter(torch.full((count,), float(threshold)))

    def _tau(self, z: Tensor) -> Tensor:
        return self.threshold.abs().reshape(-1, *[1] * (z.ndim - 2)).to(z.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """F(x), shape of x."""
        z = self.branch(x)
        tau = self._tau(z)
        return z - z.clamp(-tau, tau)

    @torch.no_grad()
    def active_share(self, x: Tensor) -> Tensor:
        """Share of each sample's units outside the dead zone, |G(x)| > τ, shape (batch,)."""
        z = self.branch(x)
        return (z.abs() > self._tau(z)).flatten(1).double().mean(1).to(x.dtype)


class _StableField(nn.Module):
    """A field of operators K: matrices, or with `kernel_size` convolutions that keep the resolution."""

    def __init__(self, size: int, *, kernel_size: int | None, activation: str) -> None:
        super().__init__()
        self.size = positive("size", size)
        if kernel_size is not None and positive("kernel_size", kernel_size) % 2 == 0:
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

    def _check(self, x: Tensor) -> None:
        if self.kernel_size is None:
            right, shape = x.ndim >= 1 and x.shape[-1] == self.size, f"(*batch, {self.size})"
        else:
            right, shape = x.ndim == 4 and x.shape[1] == self.size, f"(batch, {self.size}, height, width)"
        if not right:
            raise ValueError(
                f"{type(self).__name__} acts on states of shape {shape}: got x {tuple(x.shape)}. "
                "Build the field with the size of x, and with kernel_size for images only."
            )


def _apply(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Kx + b."""
    if weight.ndim == 2:
        return nn.functional.linear(x, weight, bias)
    return nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def _transpose(weight: Tensor) -> Tensor:
    """The weight of Kᵀ; for a zero-padded convolution the flipped kernel with the channels exchanged."""
    return weight.T if weight.ndim == 2 else weight.transpose(0, 1).flip(2, 3)


class AntisymmetricField(_StableField):
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

    def __init__(
        self, size: int, *, kernel_size: int | None = None, gamma: float = 0.0, activation: str = "tanh"
    ) -> None:
        super().__init__(size, kernel_size=kernel_size, activation=activation)
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma must be finite and at least 0, since it damps: got {gamma!r}.")
        self.gamma = gamma
        self.weight, self.bias = self._operator(size)

    def forward(self, x: Tensor) -> Tensor:
        """F(x), shape of x."""
        self._check(x)
        z = _apply(self.weight - _transpose(self.weight), x, self.bias)
        return self.act(z - self.gamma * x if self.gamma else z)


class ParabolicField(_StableField):
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

    def __init__(self, size: int, *, kernel_size: int | None = None, activation: str = "tanh") -> None:
        super().__init__(size, kernel_size=kernel_size, activation=activation)
        self.weight, self.bias = self._operator(size)

    def forward(self, x: Tensor) -> Tensor:
        """F(x), shape of x."""
        self._check(x)
        return -_apply(_transpose(self.weight), self.act(_apply(self.weight, x, self.bias)))


class HamiltonianField(_StableField):
    r"""With the state in halves (p, q): F = (K₁ᵀσ(K₁q + b₁), −K₂ᵀσ(K₂p + b₂)), every λ imaginary.

    The Jacobian is [[0, A], [−B, 0]] with A, B symmetric and positive semidefinite, so λ² is an
    eigenvalue of −AB, real and ≤ 0. No step of Euler's is stable; rk4 is up to |ηλ| = 2.83.

    With leapfrog=η the second half is K₂ᵀσ(K₂(p + ηṗ) + b₂) and x + ηF(x) the symplectic leapfrog block
    (p first, then q at the new p), stable up to |ηλ| = 2 at one F a block. F itself then depends on η.

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

    def __init__(
        self, size: int, *, kernel_size: int | None = None, activation: str = "tanh", leapfrog: float = 0.0
    ) -> None:
        super().__init__(size, kernel_size=kernel_size, activation=activation)
        if size % 2:
            raise ValueError(f"a Hamiltonian state has two halves: size must be even, got {size}.")
        if not 0 <= leapfrog < math.inf:
            raise ValueError(f"leapfrog is the stack's step size, finite and at least 0: got {leapfrog!r}.")
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


def append_time(t: Tensor | float, x: Tensor, dim: int) -> Tensor:
    """X with the time t as one more feature or channel in dimension `dim`.

    Args:
        t: a number, 0-D, or one entry a sample, (batch, 1, …, 1): what solvers give a field.
        x: state.
        dim: where; its size grows by one.

    Example:
        >>> append_time(0.5, torch.zeros(2, 3), -1)
        tensor([[0.0000, 0.0000, 0.0000, 0.5000],
                [0.0000, 0.0000, 0.0000, 0.5000]])
    """
    shape = list(x.shape)
    shape[dim] = 1
    return torch.cat((x, torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(shape)), dim)


class TimeMLPField(nn.Module):
    r"""Two layers that see the time: F(t, x) = W₂ [σ(W₁ [x, t] + b₁), t] + b₂.

    For `odeint` and `ODEBlock`, which call a field as F(t, x).

    Args:
        width, hidden, activation, zero_init_last: as in `MLPField`.

    Raises:
        ValueError: as in `MLPField`.

    Example:
        >>> TimeMLPField(2, hidden=16, activation="tanh")(torch.tensor(0.5), torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self, width: int, *, hidden: int | None = None, activation: str = "tanh", zero_init_last: bool = False
    ) -> None:
        super().__init__()
        self.width = positive("width", width)
        hidden = width if hidden is None else positive("hidden", hidden)
        self.act = make_activation(activation)
        self.fc1 = nn.Linear(width + 1, hidden)
        self.fc2 = nn.Linear(hidden + 1, width)
        if zero_init_last:
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """F(t, x), shape of x."""
        if x.ndim < 1 or x.shape[-1] != self.width:
            raise ValueError(
                f"TimeMLPField acts on states of shape (*batch, {self.width}): got x {tuple(x.shape)}. "
                "Build the field with the width of x."
            )
        hidden = self.act(self.fc1(append_time(t, x, -1)))
        return self.fc2(append_time(t, hidden, -1))


class TimeConvField(_ImageField):
    r"""Two 3×3 convolutions that see the time as a channel.

    F(t, x) = conv [σ(norm(conv [σ(norm(x)), t])), t].

    For `odeint` and `ODEBlock`. Batch norm is not offered: its statistics would mix times.

    Args:
        channels, activation, zero_init_last: as in `ConvField`.
        norm: "group" or "none".

    Raises:
        ValueError: as in `ConvField`.

    Source:
        Chen et al., Neural Ordinary Differential Equations (2018), the MNIST network.

    Example:
        >>> TimeConvField(8)(torch.tensor(0.5), torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self, channels: int, *, norm: str = "group", activation: str = "relu", zero_init_last: bool = False
    ) -> None:
        super().__init__()
        norm = one_of("norm", norm, ("group", "none"))
        self.channels = positive("channels", channels)
        self.bn1 = make_norm(norm, channels)
        self.conv1 = make_conv(channels + 1, channels, 3, norm=norm)
        self.bn2 = make_norm(norm, channels)
        self.conv2 = make_conv(channels + 1, channels, 3, norm=norm)
        self.act = make_activation(activation)
        if zero_init_last:
            nn.init.zeros_(self.conv2.weight)

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """F(t, x), shape of x."""
        self._check(x)
        out = self.conv1(append_time(t, self.act(self.bn1(x)), 1))
        return self.conv2(append_time(t, self.act(self.bn2(out)), 1))


class Autonomous(nn.Module):
    """A field F(x) as one of (t, x) that ignores the time, for `odeint` and `ODEBlock`.

    Example:
        >>> Autonomous(MLPField(2))(torch.tensor(0.5), torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """F(x)."""
        return self.field(x)


class Augmented(nn.Module):
    """A block on the state with zeros appended, so that trajectories of the state itself may cross.

    Args:
        block: acts on states with `extra` more features or channels: an ODEBlock or a stack.
        extra: how many are appended.
        dim: where.
        keep: give them back too; otherwise they are cut off at the end.

    Source:
        Dupont, Doucet & Teh, Augmented Neural ODEs (2019), arXiv:1904.01681.

    Example:
        >>> Augmented(MLPField(5), extra=3)(torch.zeros(4, 2)).shape
        torch.Size([4, 2])
    """

    def __init__(self, block: nn.Module, *, extra: int, dim: int = 1, keep: bool = False) -> None:
        super().__init__()
        self.block = block
        self.extra = positive("extra", extra)
        self.dim = dim
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        """The block's result for [x, 0], of x's shape, or with `extra` more where `keep`."""
        shape = list(x.shape)
        shape[self.dim] = self.extra
        y = self.block(torch.cat((x, x.new_zeros(shape)), self.dim))
        return y if self.keep else y.narrow(self.dim, 0, x.shape[self.dim])


class KnownPlusLearned(nn.Module):
    r"""F = known + learned: what is known of the equation, and a network for the rest.

    Args:
        known: a function or module of what the field is called with, (t, x) or (x).
        learned: a field called likewise. With zero_init_last it starts at F = known.

    Raises:
        ValueError: the two give different shapes (on the call).

    Source:
        Rackauckas et al., Universal Differential Equations for Scientific Machine Learning (2020).

    Example:
        >>> field = KnownPlusLearned(lambda t, x: -x, TimeMLPField(2, zero_init_last=True))
        >>> field(0.0, torch.ones(1, 2)).detach()
        tensor([[-1., -1.]])
    """

    def __init__(self, known: Callable[..., Tensor], learned: nn.Module) -> None:
        super().__init__()
        self.known = known
        self.learned = learned

    def forward(self, *inputs: Tensor) -> Tensor:
        """Known and learned part together, shape of the state."""
        known, learned = self.known(*inputs), self.learned(*inputs)
        if known.shape != learned.shape:
            raise ValueError(
                "the known and the learned part must have one shape: "
                f"got {tuple(known.shape)} and {tuple(learned.shape)}."
            )
        return known + learned
