r"""The norm of a convolution as an operator, with its padding, stride and input size, and a bound on it.

`torch.nn.utils.parametrizations.spectral_norm` divides by the norm of the kernel reshaped to a matrix, which
is another number: a 3×3 convolution with that norm 1 can stretch an image by up to 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from resode.checks import check_number, check_whole, checked
from resode.jacobian.lanczos import largest
from resode.jacobian.products import full_precision

_ITERATIONS = 20  # of a bounded norm in a call, at most; five as a rule
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@checked
def operator_norm(conv: nn.Module, input_shape: Sequence[int], *, rtol: float = 1e-6) -> float:
    r"""‖A‖₂ = max ‖Ax‖₂/‖x‖₂ of the linear part A of a convolution on inputs of one shape.

    By Lanczos on AᵀA. Bias is left out; padding of every mode, stride, dilation and groups count as they are.

    Args:
        conv: an `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` or `nn.Linear`.
        input_shape: of one input without the batch: (channels, height, width).
        rtol: relative residual of the singular pair; the norm is right to about its square.

    Raises:
        TypeError, ValueError: another module, or a shape that it does not take.

    Example:
        >>> conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        >>> _ = nn.init.constant_(conv.weight, 1 / 9)  # the mean over 3×3 pixels
        >>> round(operator_norm(conv, (1, 32, 32)), 3), round(operator_norm(conv, (1, 4, 4)), 3)
        (0.994, 0.762)
    """
    shape = _checked(conv, input_shape)
    with torch.no_grad():
        weight = _weight(conv)
        start = torch.ones(1, *shape, dtype=weight.dtype, device=weight.device)
        generator = torch.Generator().manual_seed(24)
        start += torch.randn(start.shape, generator=generator, dtype=weight.dtype).to(weight.device)
    top = largest(lambda v: _gram(conv, weight, v, shape), start.flatten(1), rtol)
    return max(float(top.value[0]), 0.0) ** 0.5


@checked
def bound_operator_norm(conv: nn.Module, input_shape: Sequence[int], bound: float = 1.0) -> nn.Module:
    r"""Keep a convolution's operator norm at `bound` or below, whatever an optimizer does to its weights.

    The weights become W·min(1, bound/σ), σ = ‖A(W)‖₂ by power iteration that goes on from call to call in
    training, started here from a converged singular vector; gradients flow through σ. While updates push
    against the bound the iteration lags, and the norm lies up to 4 % above it; more where an update changes
    the weights wholly. In evaluation mode σ is iterated no further. Remove it with
    `torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")`.

    Args:
        conv: as for `operator_norm`; changed in place.
        input_shape: of one input without the batch.
        bound: the largest norm.

    Returns:
        conv.

    Raises:
        TypeError, ValueError: as `operator_norm`; a bound that is not positive.

    Source:
        Miyato et al., Spectral normalization for GANs (2018), for the iteration along with training; here it
        is the convolution that is iterated, as in Gouk et al., Regularisation of neural networks by enforcing
        Lipschitz continuity (2021).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> conv = bound_operator_norm(nn.Conv2d(4, 4, 3, padding=1), (4, 8, 8), bound=0.5)
        >>> round(operator_norm(conv, (4, 8, 8)), 4)
        0.5
    """
    shape = _checked(conv, input_shape)
    check_number("bound", bound, above=0)
    parametrize.register_parametrization(conv, "weight", _Bounded(conv, shape, bound))
    return conv


class _Bounded(nn.Module):
    """W to W·min(1, bound/σ(W))."""

    vector: Tensor

    def __init__(self, conv: nn.Module, shape: tuple[int, ...], bound: float) -> None:
        super().__init__()
        self._conv = (conv,)  # in a tuple: not a child of its own parameter
        self.shape, self.bound = shape, bound
        weight = _weight(conv)
        start = torch.randn(1, *shape, dtype=weight.dtype, device=weight.device).flatten(1)
        found = largest(lambda v: _gram(conv, weight, v, shape), start, 1e-4).vector
        self.register_buffer("vector", found.reshape(1, *shape).to(weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        """The weights within the bound."""
        if self.training:
            with torch.no_grad():
                # Some of every direction, so that one which has come up since is not missed.
                generator = torch.Generator().manual_seed(24)
                noise = torch.randn(self.vector.shape, generator=generator, dtype=self.vector.dtype)
                self.vector.add_(noise.to(self.vector.device) * 0.1 / noise.norm())
                size = 0.0
                for count in range(_ITERATIONS):
                    v = _gram(self._conv[0], weight.detach(), self.vector.flatten(1), self.shape)
                    before, size = size, float(v.norm())
                    v = v / max(size, torch.finfo(v.dtype).tiny)
                    self.vector.copy_(v.reshape(self.vector.shape))
                    if count >= 4 and abs(size - before) <= 1e-3 * size:
                        break
        sigma = _apply(self._conv[0], weight, self.vector.clone()).norm()
        return weight * (self.bound / sigma.clamp_min(1e-12)).clamp(max=1.0)


def _checked(conv: nn.Module, input_shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(conv, (*_CONVOLUTIONS, nn.Linear)):
        raise TypeError(f"an operator norm is that of an nn.Conv or nn.Linear, got {type(conv).__name__}.")
    shape = tuple(check_whole("a size of input_shape", size, 1) for size in input_shape)
    linear = isinstance(conv, nn.Linear)
    channels, want = (conv.in_features, 1) if linear else (conv.in_channels, conv.weight.ndim - 1)
    place = -1 if linear else 0
    if len(shape) != want or shape[place] != channels:
        raise ValueError(
            f"input_shape is that of one input without the batch: {want} sizes, {channels} of them features "
            f"or channels; got {shape}."
        )
    return shape


def _weight(conv: nn.Module) -> Tensor:
    weight = conv.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _apply(conv: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """The linear part at other weights."""
    if isinstance(conv, nn.Linear):
        return nn.functional.linear(x, weight)
    return conv._conv_forward(x, weight, None)  # pyright: ignore[reportCallIssue]


def _gram(conv: nn.Module, weight: Tensor, v: Tensor, shape: tuple[int, ...]) -> Tensor:
    """AᵀAv (1, n) of v (1, n), by a product and its derivative."""
    with torch.enable_grad(), full_precision():
        x = v.detach().reshape(1, *shape).requires_grad_()
        y = _apply(conv, weight, x)
        (product,) = torch.autograd.grad(y, x, y.detach())
    return product.flatten(1)
