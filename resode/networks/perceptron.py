r"""Perceptrons of any depth, with and without shortcuts.

    residual   x ← x + ηF(x),      F(x) = W₂ σ(W₁x + b₁) + b₂
    plain      x ← σ(F(x))

Both have a linear layer in, `depth` blocks of two layers and a linear layer out, and equally many
parameters. The residual one is a `resode.ResidualStack`: any solver may advance it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from resode.blocks import ResidualStack
from resode.checks import check_whole, checked, one_of
from resode.fields import MLPField, make_activation
from resode.formulas import Cost, Shape, chain
from resode.networks.common import Style, advance
from resode.state_dicts import Checked
from resode.symbols import one_node


class ResidualMLP(Checked):
    """Residual perceptron: linear, `depth` blocks x + ηF(x), linear.

    W₁ starts with He's variance and W₂ with 1 / depth of it, so that at η = 1 the state's second moment
    grows by about (1 + 2 / depth)^depth < e² from end to end, whatever the depth.

    Args:
        depth: blocks, at least 1.
        num_classes: outputs.
        in_channels: channels of the images, which are flattened.
        image_size: their height and width.
        in_features: size of a flat input; in_channels · image_size² where None.
        width: features of the state.
        hidden: features between F's layers; width where None.
        activation: σ, a name in `resode.fields.ACTIVATIONS`.
        zero_init_last: start W₂ at 0 instead.
        stochastic_depth: probability to drop the last block in training, falling linearly to the first
            one's.
        solver, step_size, substeps, learn_step, weights, rtol, atol, per_sample, gradient: of the
            stack, see `resode.ResidualStack`.

    Example:
        >>> model = ResidualMLP(100, in_channels=1, image_size=8, solver="rk4")
        >>> model(torch.zeros(2, 1, 8, 8)).shape, model.stack.depth
        (torch.Size([2, 10]), 100)
    """

    @checked
    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        in_features: int | None = None,
        width: int = 64,
        hidden: int | None = None,
        activation: str = "relu",
        zero_init_last: bool = False,
        stochastic_depth: float = 0.0,
        solver: str = "euler",
        step_size: float = 1.0,
        substeps: int = 1,
        learn_step: bool | str = False,
        weights: str = "constant",
        rtol: float = 1e-3,
        atol: float = 1e-4,
        per_sample: bool = True,
        gradient: str = "autograd",
    ) -> None:
        super().__init__()
        self.in_features = _features(in_channels, image_size, in_features)
        self.input = nn.Linear(self.in_features, check_whole("width", width, 1))
        fields = [
            MLPField(width, hidden=hidden, activation=activation, zero_init_last=zero_init_last)
            for _ in range(check_whole("depth", depth, 1))
        ]
        with torch.no_grad():
            for field in fields:
                if not field.fc2.weight.is_meta:
                    field.fc2.weight /= math.sqrt(depth)
        self.stack = ResidualStack(
            fields,
            solver=solver,
            step_size=step_size,
            substeps=substeps,
            learn_step=learn_step,
            weights=weights,
            rtol=rtol,
            atol=atol,
            per_sample=per_sample,
            gradient=gradient,
            stochastic_depth=Style(stochastic_depth=stochastic_depth).drop_rates(depth),
        )
        self.linear = nn.Linear(width, check_whole("num_classes", num_classes, 1))

    def stacks(self) -> list[ResidualStack]:
        """The one stack, in a list as `ODENet` gives its own."""
        return [self.stack]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images or vectors (batch, …) of in_features numbers."""
        x = self.input(_flatten(x, self.in_features))  # (B, width)
        x = self.stack(x)  # (B, width)
        return self.linear(x)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape; F's as often as the solver evaluates it."""
        return chain((math.prod(shape),), self.input, self.stack, self.linear)


class PlainMLP(Checked):
    """Plain perceptron: linear, `depth` blocks σ(F(x)) without shortcut, linear.

    Weights start with He's variance, which keeps the state's second moment at any depth.

    Args:
        depth, num_classes, in_channels, image_size, in_features, width, hidden, activation: as in
            `ResidualMLP`.
        gradient: "autograd" or "checkpoint".

    Example:
        >>> PlainMLP(3, in_features=4)(torch.zeros(2, 4)).shape
        torch.Size([2, 10])
    """

    @checked
    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        in_features: int | None = None,
        width: int = 64,
        hidden: int | None = None,
        activation: str = "relu",
        gradient: str = "autograd",
    ) -> None:
        super().__init__()
        self.gradient = one_of("gradient", gradient, ("autograd", "checkpoint"))
        self.in_features = _features(in_channels, image_size, in_features)
        self.input = nn.Linear(self.in_features, check_whole("width", width, 1))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    MLPField(width, hidden=hidden, activation=activation), make_activation(activation)
                )
                for _ in range(check_whole("depth", depth, 1))
            )
        )
        self.linear = nn.Linear(width, check_whole("num_classes", num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images or vectors (batch, …) of in_features numbers."""
        x = self.input(_flatten(x, self.in_features))  # (B, width)
        x = advance(self.blocks, x, self.gradient)  # (B, width)
        return self.linear(x)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by formula."""
        return chain((math.prod(shape),), self.input, self.blocks, self.linear)


def _features(in_channels: int, image_size: int, in_features: int | None) -> int:
    if in_features is not None:
        return check_whole("in_features", in_features, 1)
    return check_whole("in_channels", in_channels, 1) * check_whole("image_size", image_size, 1) ** 2


@one_node
def _flatten(x: Tensor, features: int) -> Tensor:
    """Inputs (batch, …) as (batch, features)."""
    if x.ndim < 2 or math.prod(x.shape[1:]) != features:
        raise ValueError(
            f"this perceptron takes inputs (batch, …) of {features} numbers each: got {tuple(x.shape)}. "
            "Build it with in_channels= and image_size= of the images, or with in_features=."
        )
    return x.reshape(x.shape[0], features)
