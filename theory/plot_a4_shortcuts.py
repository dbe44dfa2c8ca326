r"""
A4 · Shortcuts
==============

**Claim.** A shortcut S need not be the identity. Whatever linear map it is, the gradient through it is
:math:`S^\top g`:

====================== ===================================== ==========================================
kind                   :math:`S x`                           :math:`S^\top g`
====================== ===================================== ==========================================
identity               x                                     g
padded (option A)      every other pixel, channels of zeros  those pixels; zero at all the others
projection (option B)  a strided 1×1 convolution, Wx         :math:`W^\top g` at those pixels, else zero
projection (option C)  a 1×1 convolution of stride 1         :math:`W^\top g`
pooled (option D)      2×2 means, then a 1×1 convolution     a quarter of :math:`W^\top g` at all four pixels
gated                  αx, α learnt                          αg, while α itself gets gᵀx
highway, constant gate :math:`(1 - T)\,x`                    :math:`(1 - T)\,g`
====================== ===================================== ==========================================

**Assumptions.** S is linear, and the gradient is that of the shortcut's path alone.

**Not claimed.** That all of them are highways. Option A and B of stride 2 send nothing back to three pixels
in four; α multiplies at every block, so that L of them give :math:`\alpha^L g`; and a gate that depends on x
is not linear: its gradient has a second term, beyond :math:`\alpha(x)\,g`. All three are measured.

**Source.** He, Zhang, Ren & Sun, *Deep Residual Learning for Image Recognition*, 2015, section 3.3,
`arXiv:1512.03385 <https://arxiv.org/abs/1512.03385>`_; *Identity Mappings in Deep Residual Networks*, 2016,
eq. 6 to 8, `arXiv:1603.05027 <https://arxiv.org/abs/1603.05027>`_.

The picture shows where each kind sends a gradient of ones back to, and the gradient through many gates.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode.analysis import gradient_parts, shortcut_matrix
from resode.fields import ConvField
from resode.shortcuts import (
    GatedShortcut,
    HighwayShortcut,
    InputGatedShortcut,
    PadShortcut,
    ProjectionShortcut,
)
from theory.measures.gains import gradient_norms
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least

batch, channels, pixels, depth = (2, 2, 6, 100) if FAST else (8, 4, 8, 100)
torch.manual_seed(shifted(0))
F64 = torch.float64
alpha = 0.875  # exact in binary


def normal(*shape):
    return torch.randn(*shape, dtype=F64)


# %%
# Prediction: Sᵀg written out for each kind
# -----------------------------------------


def pixels_back(g):
    """Every other pixel of an image, the others zero."""
    wide = torch.zeros(*g.shape[:2], pixels, pixels, dtype=F64)
    wide[:, :, ::2, ::2] = g
    return wide


projection = ProjectionShortcut(channels, 2 * channels, 2).double()
same = ProjectionShortcut(channels, channels, 1).double()
pooled = ProjectionShortcut(channels, 2 * channels, 2, average_pool=True).double()


def weight_back(shortcut, g):
    """Wᵀg at every pixel of g, W the shortcut's 1×1 convolution (out, in)."""
    [conv] = [m for m in shortcut.modules() if isinstance(m, nn.Conv2d)]
    return torch.einsum("oi,bohw->bihw", conv.weight.detach()[:, :, 0, 0], g)


class Carry(nn.Module):
    """What a highway layer's gate lets through of x; its gate has bias b and no weights."""

    def __init__(self, bias):
        super().__init__()
        self.highway = HighwayShortcut(channels, kernel_size=1, bias=bias)
        nn.init.zeros_(self.highway.transform.weight)

    def forward(self, x):
        return self.highway(x, torch.zeros_like(x))


carry = Carry(-2.0).double()
kinds = {
    "identity": (nn.Identity(), lambda g: g),
    "padded (A)": (
        PadShortcut(channels, 2 * channels, 2, zeros="behind"),
        lambda g: pixels_back(g[:, :channels]),
    ),
    "projection (B)": (projection, lambda g: pixels_back(weight_back(projection, g))),
    "projection (C)": (same, lambda g: weight_back(same, g)),
    "pooled (D)": (
        pooled,
        lambda g: weight_back(pooled, g).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4,
    ),
    "gated": (GatedShortcut(alpha).double(), lambda g: alpha * g),
    "highway": (carry, lambda g: (1 - 1 / (1 + math.exp(2.0))) * g),
}

# %%
# Measurement
# -----------
# The gradient of the shortcut's path by autograd, in a block whose F is a field or, where the shape changes,
# a convolution of stride 2. Beside it a third way: the matrix of S, read off its values at the unit states,
# transposed.

errors, matrix_errors, reached = {}, {}, {}
for name, (shortcut, transposed) in kinds.items():
    x = normal(batch, channels, pixels, pixels)
    y = shortcut(x)
    wider = nn.Conv2d(channels, 2 * channels, 3, 2, padding=1)
    field = (ConvField(channels, norm="none") if y.shape == x.shape else wider).double()
    g = normal(*y.shape)
    path = gradient_parts(field, x, g, shortcut=shortcut).identity
    matrix = shortcut_matrix(shortcut, x)
    expected = transposed(g)
    errors[name] = float((path - expected).norm() / expected.norm())
    by_matrix = (g.flatten(1) @ matrix).reshape(x.shape)
    matrix_errors[name] = float((path - by_matrix).norm() / expected.norm())
    reached[name] = gradient_parts(field, x, torch.ones_like(y), shortcut=shortcut).identity[0, 0]

zeros = {name: float((where == 0).double().mean()) for name, where in reached.items()}

# %%
# The learnt gate: its own gradient, and L of them
# ------------------------------------------------

gate, x, g = GatedShortcut(alpha).double(), normal(100, 5), normal(100, 5)
(alpha_gradient,) = torch.autograd.grad(gate(x), gate.alpha, g)
through = {
    value: gradient_norms([GatedShortcut(value).double()] * depth, x, g)[:, 0] / g[0].norm()
    for value in (0.875, 1.0, 1.125)
}

# %%
# A gate that depends on x
# ------------------------
# :math:`S(x) = \alpha(x)\,x` with :math:`\alpha = \mathrm{sigmoid}(w \cdot x + b)` has the gradient
# :math:`\alpha g + \alpha(1 - \alpha)(g \cdot x)\,w`.

soft = InputGatedShortcut(5, alpha=0.5).double()
nn.init.normal_(soft.score.weight)
whole = gradient_parts(torch.zeros_like, x, g, shortcut=soft).identity
a = torch.sigmoid(x @ soft.score.weight.T + soft.score.bias).detach()
second = a * (1 - a) * (g * x).sum(1, keepdim=True) * soft.score.weight.detach()

# %%
# Figure
# ------

fig, axes = plt.subplots(2, 4, figsize=(12, 5.6), layout="constrained")
*maps, curves = axes.flat
bound = max(float(where.abs().max()) for where in reached.values())
for ax, (name, where) in zip(maps, reached.items(), strict=True):
    image = ax.imshow(where.numpy(), cmap="RdBu", vmin=-bound, vmax=bound)
    ax.set(xticks=[], yticks=[], title=f"{name}\n{zeros[name]:.0%} gets nothing")
fig.colorbar(image, ax=axes[0], shrink=0.8, label="Sᵀ1, first channel")
for value, norms in through.items():
    curves.semilogy(range(depth + 1), norms.flip(0), label=f"α = {value}")
curves.set(xlabel="gated shortcuts passed", ylabel="‖gradient‖ / ‖g‖", title="gates multiply: α^L")
curves.legend()

# %%
# Verdict
# -------
# Sums of at most a few hundred products, in float64: 1e-14.

for name in kinds:
    agree(f"{name}: gradient of the path less Sᵀg", 0, errors[name], atol=1e-14)
    agree("  less the transposed matrix times g", 0, matrix_errors[name], atol=1e-14)
agree("gated: dL/dα, gᵀx", float((g * x).sum()), alpha_gradient, rtol=1e-12)
agree("padded (A): share of pixels without gradient", 0.75, zeros["padded (A)"])
agree("projection (B): the same", 0.75, zeros["projection (B)"])
for name in ("identity", "projection (C)", "pooled (D)", "highway"):
    agree(f"{name}: the same", 0, zeros[name])
for value, norms in through.items():
    agree(f"100 gates of {value}: ‖gradient‖ / ‖g‖", value**100, norms[0], rtol=1e-12)
agree("input gate: error of αg + the second term", 0, (whole - a * g - second).abs().max(), atol=1e-13)
at_least("  error of αg alone, relative", 0.01, (whole - a * g).norm() / whole.norm())
