r"""
A7 · Cost of a bottleneck
=========================

**Claim.** A convolution :math:`K_h \times K_w` takes
:math:`H_{out} W_{out} C_{in} C_{out} K_h K_w` multiply-adds. So at every position, and in weights,

.. math:: \text{basic: } 9\,(C_{in} C_{out} + C_{out}^2), \qquad
          \text{bottleneck: } C_{in} C_{mid} + 9\,C_{mid}^2 + C_{mid} C_{out},

and at equal outer width a bottleneck is cheaper: with 256 channels outside and 64 inside, 69,632 against
1,179,648, one to 16.9.

**Assumptions.** Both blocks keep the resolution; convolutions alone are counted, without biases, norms and
activations, as in the published figures.

**Not claimed.** That bottlenecks are cheap as such. The comparison that decides between networks is at equal
*inner* width: a basic block of 64 channels costs 73,728, within 6 % of the bottleneck around the same 64, and
a resnet50, with bottlenecks, more than a resnet34. Nor that seconds follow multiply-adds: a bottleneck's
states are four times as wide, and its 1×1 convolutions are bound by memory.

**Source.** He, Zhang, Ren & Sun, *Deep Residual Learning for Image Recognition*, 2015, fig. 5 and table 1,
`arXiv:1512.03385 <https://arxiv.org/abs/1512.03385>`_.

The picture shows both costs against the outer width, and the networks of the paper.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode.analysis import count
from resode.fields import BottleneckField, ConvField
from resode.networks import build
from theory.verdict import FAST, agree, at_least

image = 7 if FAST else 14
widths = (64, 128, 256) if FAST else (16, 32, 64, 128, 256, 512)

# %%
# Prediction: the formulas
# ------------------------


def basic(c_in, c_out):
    return 9 * (c_in * c_out + c_out**2)


def bottleneck(c_in, c_mid, c_out):
    return c_in * c_mid + 9 * c_mid**2 + c_mid * c_out


def layer(h_out, w_out, c_in, c_out, k_h, k_w):
    return h_out * w_out * c_in * c_out * k_h * k_w


# %%
# Measurement: the real modules, counted while they run
# -----------------------------------------------------
# ``count`` sees the convolutions that torch executes; weights are counted one by one. On the meta device
# nothing is computed, only shapes are.


def measured(make, channels, size=image):
    """Multiply-adds a position, and weights of the convolutions."""
    with torch.device("meta"):
        module, x = make(), torch.zeros(1, channels, size, size)
    weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))
    return count(module, x).macs / size**2, weights


basics = {c: measured(lambda c=c: ConvField(c), c) for c in widths}
bottlenecks = {c: measured(lambda c=c: BottleneckField(c), c) for c in widths}

with torch.device("meta"):
    odd = count(nn.Conv2d(6, 10, (3, 5), stride=(2, 1), bias=False), torch.zeros(1, 6, 17, 12))
    names = (
        ("resnet34", "resnet50") if FAST else ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    )
    networks = {name: build(name) for name in names}
    costs = {name: count(net, torch.zeros(1, 3, 224, 224)) for name, net in networks.items()}
    groups = {
        index: count(getattr(networks["resnet34"], f"layer{index}")[1], torch.zeros(1, c, s, s)).macs
        for index, (c, s) in enumerate([(64, 56), (128, 28), (256, 14), (512, 7)], 1)
    }

# %%
# A block that changes the width is counted too: the first of a group, with an option-A shortcut that costs
# nothing, from 16 to 32 channels and from 32 × 32 to 16 × 16 pixels.

with torch.device("meta"):
    widening = count(build("resnet20").layer2[0], torch.zeros(1, 16, 32, 32)).macs / 16**2

# %%
# Figure
# ------

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
left.loglog(widths, [basic(c, c) for c in widths], "k:", lw=1, label="formula")
left.loglog(widths, [bottleneck(c, c // 4, c) for c in widths], "k:", lw=1)
left.loglog(widths, [basics[c][0] for c in widths], "o", label="basic, counted")
left.loglog(widths, [bottlenecks[c][0] for c in widths], "s", label="bottleneck, counted")
left.annotate("", (256, 69632), (256, 1179648), arrowprops={"arrowstyle": "<->"})
left.text(240, 280000, "16.9 to 1", ha="right")
left.annotate("", (256, 69632), (64, 73728), arrowprops={"arrowstyle": "<->", "color": "tab:red"})
left.text(128, 85000, "equal inner width", ha="center", color="tab:red")
left.set(xlabel="outer channels", ylabel="multiply-adds a position", title="one block")
left.set_xticks(widths, widths)
left.minorticks_off()
left.legend()
macs = [costs[name].macs / 1e9 for name in costs]
colours = ["tab:blue" if name in ("resnet18", "resnet34") else "tab:orange" for name in costs]
bars = right.bar(list(costs), macs, color=colours)
right.bar_label(bars, fmt="%.2f")
right.margins(y=0.12)
right.set(ylabel="10⁹ multiply-adds at 224 × 224", title="basic blocks (blue) and bottlenecks (orange)")

# %%
# Verdict
# -------
# Whole numbers agree exactly; the published ones to their last digit.

agree("basic, 256 channels: 9·2·256²", 1_179_648, basics[256][0])
agree("  its weights", 1_179_648, basics[256][1])
agree("bottleneck, 256 outside, 64 inside", 69_632, bottlenecks[256][0])
agree("  its weights", 69_632, bottlenecks[256][1])
agree("  basic over bottleneck, 16.9", 16.9, basics[256][0] / bottlenecks[256][0], atol=0.05)
for c in widths:
    agree(f"basic, {c} channels: formula", basic(c, c), basics[c][0])
    agree(f"bottleneck, {c} channels: formula", bottleneck(c, c // 4, c), bottlenecks[c][0])
agree("a 3×5 convolution of strides 2 and 1", layer(8, 8, 6, 10, 3, 5), odd.macs)
agree("basic block from 16 to 32 channels", basic(16, 32), widening)
inner = basics[64][0] / bottlenecks[256][0]
agree("equal inner width 64: basic over bottleneck", 73_728 / 69_632, inner, rtol=1e-15)
agree("resnet34: a block's cost in group 4 over group 1", 1, groups[4] / groups[1])
agree("resnet34 at 224 × 224, 10⁹ as published", 3.664, costs["resnet34"].macs / 1e9, atol=5e-4)
agree("resnet50, stride in the 3×3, 10⁹ as published", 4.089, costs["resnet50"].macs / 1e9, atol=5e-4)
at_least("  bottlenecks over basic blocks, two networks", 1, costs["resnet50"].macs / costs["resnet34"].macs)
