r"""ODE-ResNets: pre-activation networks whose equal blocks are one solve a group.

A group opens with a discrete transition block where the shape changes; all its other blocks are the
fields F_l of one `resode.ResidualStack`, dx/dt = F_l(x) for t in [lη, (l+1)η). With Euler and η = 1
the network is the pre-activation ResNet of the same depth to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from resode.blocks import ResidualStack
from resode.checks import check_whole, checked
from resode.fields import ConvField, make_activation, make_norm
from resode.formulas import Cost, Shape, chain
from resode.networks.common import SMALL, Style, check_images, head, make_drop, make_stem
from resode.networks.resnet import PreActBlock, blocks_a_group
from resode.state_dicts import Checked


class Transition(PreActBlock):
    """The discrete block between two groups, S(x) + F(x); under autocast the state keeps its precision."""

    def forward(self, x: Tensor) -> Tensor:
        """S(x) + F(x), in x's dtype."""
        return super().forward(x).to(x.dtype)


class ODENet(Checked):
    """ODE-ResNet for small images, of a pre-activation ResNet's widths: stem, three groups, linear.

    Args:
        depth: 6n + 2 layers: n fields in the first group, a transition and n − 1 fields in each of the
            others.
        num_classes: outputs.
        in_channels: channels of the images.
        width: channels of the first group; the second has twice, the third four times as many.
        style: what its fields have in common; the shortcut "A", "B" or "D" is the transitions'.
        solver, step_size, substeps, learn_step, weights, rtol, atol, per_sample: of every stack, see
            `resode.ResidualStack`; η = `step_size` in units of one block. The style's stochastic depth is
            the stacks' own, with a mask for each sample and block.

    Raises:
        ValueError: a wrong depth, a shortcut that isn't the identity inside a group, or what
            `ResidualStack` refuses.

    Source:
        Weinan E (2017), A Proposal on Machine Learning via Dynamical Systems; Haber & Ruthotto (2017),
        arXiv:1705.03341; Chen et al. (2018), Neural Ordinary Differential Equations, arXiv:1806.07366.

    Example:
        >>> import torch
        >>> model = ODENet(20, solver="rk4")
        >>> model(torch.zeros(2, 3, 32, 32)).shape, [stack.depth for stack in model.stacks()]
        (torch.Size([2, 10]), [3, 2, 2])
        >>> for stack in model.stacks():
        ...     stack.solver = "euler"
    """

    @checked
    def __init__(
        self,
        depth: int = 20,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        style: Style = SMALL,
        solver: str = "euler",
        step_size: float = 1.0,
        substeps: int = 1,
        learn_step: bool | str = False,
        weights: str = "constant",
        rtol: float = 1e-3,
        atol: float = 1e-4,
        per_sample: bool = True,
    ) -> None:
        super().__init__()
        if style.shortcut not in ("A", "B", "D"):
            raise ValueError(
                "an ODE-ResNet's shortcut is the identity wherever the shape is kept: its transitions take "
                f"'A', 'B' or 'D', got {style.shortcut!r}."
            )
        n = blocks_a_group(depth, 6, 2)
        rates = style.drop_rates(3 * n)

        def stack(channels: int, rates: list[float]) -> Iterator[nn.Module]:
            """One stack, or nothing where a group has no block but its transition."""
            fields = [
                ConvField(
                    channels,
                    norm=style.norm,
                    activation=style.activation,
                    squeeze_excitation=style.squeeze_excitation,
                    zero_init_last=style.starts_at_zero,
                )
                for _ in rates
            ]
            if fields:
                yield ResidualStack(
                    fields,
                    solver=solver,
                    step_size=step_size,
                    substeps=substeps,
                    learn_step=learn_step,
                    weights=weights,
                    rtol=rtol,
                    atol=atol,
                    per_sample=per_sample,
                    gradient=style.gradient,
                    stochastic_depth=rates,
                )

        def transition(channels: int, rate: float) -> nn.Module:
            return Transition(channels, 2 * channels, 2, style, make_drop(rate))

        w = check_whole("width", width, 1)
        self.in_channels = check_whole("in_channels", in_channels, 1)
        self.conv1, self.pool = make_stem(in_channels, w, style)
        self.layer1 = nn.Sequential(*stack(w, rates[:n]))
        self.layer2 = nn.Sequential(transition(w, rates[n]), *stack(2 * w, rates[n + 1 : 2 * n]))
        self.layer3 = nn.Sequential(transition(2 * w, rates[2 * n]), *stack(4 * w, rates[2 * n + 1 :]))
        self.bn = make_norm(style.norm, 4 * w)
        self.act = make_activation(style.activation)
        self.linear = nn.Linear(4 * w, check_whole("num_classes", num_classes, 1))

    def stacks(self) -> list[ResidualStack]:
        """The groups' stacks, to read or to set: `for stack in model.stacks(): stack.solver = "rk4"`."""
        return [m for m in self.modules() if isinstance(m, ResidualStack)]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_channels, H, W)."""
        check_images(x, self.in_channels)
        x = self.pool(self.conv1(x)).to(self.conv1.weight.dtype)  # (B, w, H, W); only F is autocast
        x = self.layer1(x)  # (B, w, H, W)
        x = self.layer2(x)  # (B, 2w, H/2, W/2)
        x = self.layer3(x)  # (B, 4w, H/4, W/4)
        x = self.act(self.bn(x))
        x = x.mean((2, 3))  # (B, 4w)
        return self.linear(x)

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape; F's as often as the solver evaluates it."""
        groups = (self.conv1, self.pool, self.layer1, self.layer2, self.layer3, self.bn)
        return head(chain(shape, *groups), self.linear)


@checked
def preact_names(model: ODENet) -> dict[str, str]:
    """The name of every parameter and buffer of `model` in the pre-activation ResNet of its depth.

    With it weights go from one to the other. Learnt step sizes have no counterpart and are left out.

    Example:
        >>> from resode.networks import build
        >>> odenet, preact = build("odenet20"), build("preact20")
        >>> weights, names = odenet.state_dict(), preact_names(odenet)
        >>> names["layer2.1.fields.0.conv1.weight"]
        'layer2.1.conv1.weight'
        >>> preact.load_state_dict({names[name]: value for name, value in weights.items()})
        <All keys matched successfully>
    """
    stacks = [name for name, module in model.named_modules() if isinstance(module, ResidualStack)]
    names = {}
    for name in model.state_dict():
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        if stack is None:
            names[name] = name
        elif name.startswith(f"{stack}.fields."):
            layer, position = stack.split(".")
            index, rest = name.removeprefix(f"{stack}.fields.").split(".", 1)
            names[name] = f"{layer}.{int(position) + int(index)}.{rest}"
    return names
