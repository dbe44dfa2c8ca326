r"""What layers cost, by formula: parameters, and multiply-adds of one sample.

A K_h×K_w convolution takes H_out·W_out·C_in·C_out·K_h·K_w / groups multiply-adds, a linear layer
in·out at every position. That is all that is counted: no biases, norms, activations, pooling,
additions, gates or zero-padding, as in the published figures (a resnet50 at 224×224 has 4.089·10⁹, and
a resnet20 with option A 40.55·10⁶ at 32×32). Twice as many floating-point operations are meant where
others write FLOPs.

A layer of torch has its formula here; a module of resode has a method `cost(shape)`.
`resode.analysis.count` finds the same figures by running the module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

Shape = tuple[int, ...]

_FREE = (nn.Identity, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, _DropoutNd)


@dataclass(frozen=True)
class Cost:
    """Parameters and multiply-adds.

    Args:
        parameters: how many there are, each counted once.
        macs: multiply-adds of convolutions and linear layers for one sample.
        shape: of the output for one sample, without the batch.

    Example:
        >>> print(Cost(269722, 40551040, (10,)))
        269,722 parameters, 40.55 M multiply-adds a sample
    """

    parameters: int
    macs: int
    shape: Shape

    def then(self, following: Cost) -> Cost:
        """This, and after it what reads its output."""
        return Cost(self.parameters + following.parameters, self.macs + following.macs, following.shape)

    def beside(self, *others: Cost) -> Cost:
        """This, and beside it what reads the same input; the output is this one's."""
        parameters = self.parameters + sum(other.parameters for other in others)
        return Cost(parameters, self.macs + sum(other.macs for other in others), self.shape)

    def evaluated(self, times: int) -> Cost:
        """This, evaluated so many times with the same parameters."""
        return Cost(self.parameters, times * self.macs, self.shape)

    def __str__(self) -> str:
        if self.macs >= 1e9:
            macs = f"{self.macs / 1e9:.3f} G"
        else:
            macs = f"{self.macs / 1e6:.2f} M" if self.macs >= 1e6 else f"{self.macs:,}"
        return f"{self.parameters:,} parameters, {macs} multiply-adds a sample"


def cost_of(module: nn.Module, shape: Shape) -> Cost:
    """The cost of a module by formula.

    Args:
        module: a module of resode, or one of torch's layers; their sequences. Layers that several of
            its modules have in common count in each; the fields of a ResidualStack may be the same.
        shape: of one sample of its input, without the batch: (channels, height, width) or (features,).

    Raises:
        TypeError: there is no formula for it.

    Example:
        >>> cost_of(nn.Conv2d(3, 16, 3, stride=2, padding=1), (3, 32, 32))
        Cost(parameters=448, macs=110592, shape=(16, 16, 16))
    """
    own = getattr(module, "cost", None)
    if callable(own):
        return cast(Cost, own(shape))
    if isinstance(module, nn.Sequential):
        return chain(shape, *module)
    if isinstance(module, nn.Conv2d):
        return _convolution(module, shape)
    if isinstance(module, nn.Linear):
        weights = module.in_features * module.out_features
        bias = 0 if module.bias is None else module.out_features
        positions = math.prod(shape[:-1])
        return Cost(weights + bias, positions * weights, (*shape[:-1], module.out_features))
    if isinstance(module, _BatchNorm):
        return Cost(2 * module.num_features if module.affine else 0, 0, shape)
    if isinstance(module, nn.GroupNorm):
        return Cost(2 * module.num_channels if module.affine else 0, 0, shape)
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        dilation = getattr(module, "dilation", 1)
        windows = module.kernel_size, module.stride, module.padding, dilation, module.ceil_mode
        return Cost(0, 0, (shape[0], *_windows(shape[1:], *windows)))
    if isinstance(module, _FREE):
        return Cost(0, 0, shape)
    raise TypeError(
        f"there is no formula for the cost of a {type(module).__name__}; give it a method "
        "cost(shape) -> Cost, or count it with resode.analysis.count(module, x)."
    )


def chain(shape: Shape, *modules: nn.Module) -> Cost:
    """The cost of modules that read one another's output, the first one an input of `shape`."""
    total = Cost(0, 0, shape)
    for module in modules:
        total = total.then(cost_of(module, total.shape))
    return total


def _convolution(conv: nn.Conv2d, shape: Shape) -> Cost:
    size = math.prod(conv.kernel_size)
    weights = conv.in_channels // conv.groups * conv.out_channels * size
    same, padding = conv.padding == "same", (0, 0) if conv.padding == "valid" else conv.padding
    out = shape[1:] if same else _windows(shape[1:], conv.kernel_size, conv.stride, padding, conv.dilation)
    bias = 0 if conv.bias is None else conv.out_channels
    return Cost(weights + bias, weights * math.prod(out), (conv.out_channels, *out))


def _windows(
    sizes: Shape, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool = False
) -> Shape:
    """Windows that fit; in ceil mode also one that only begins inside."""

    def pair(value: Any) -> Shape:
        return tuple(value) if isinstance(value, tuple | list) else (value, value)

    out = []
    for n, k, s, p, d in zip(sizes, *map(pair, (kernel, stride, padding, dilation)), strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        count = (-(-room // s) if ceil_mode else room // s) + 1
        out.append(count - (ceil_mode and (count - 1) * s >= n + p))
    return tuple(out)
