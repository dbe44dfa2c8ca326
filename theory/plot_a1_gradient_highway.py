r"""
A1 · Gradient highway
=====================

**Claim.** The block :math:`y = x + F(x)` with :math:`F(x) = \mathrm{relu}(Wx + b)` has the Jacobian
:math:`I + \mathrm{diag}(\mathrm{relu}'(Wx + b))\,W`, and the gradient :math:`g` at its output reaches its
input in two parts,

.. math:: \frac{\partial L}{\partial x} =
          \underbrace{g}_{\text{identity}} + \underbrace{g^\top J}_{\text{residual}}, \qquad J = F'(x).

Where every unit is off, :math:`J = 0` and the gradient passes unchanged, to the last bit. The same split
holds for every F: dense, convolutional, with batch norm, bottleneck.

**Assumptions.** Nothing follows the addition (pre-activation), and the shortcut is the identity.

**Not claimed.** That the gradient cannot vanish because it contains g. The two parts are vectors, and they
can cancel: with :math:`J = -I` nothing is left. Nor that a post-activation block, relu(x + F(x)), lets g
pass: there g is masked before it is split. Both are measured below.

**Source.** He, Zhang, Ren & Sun, *Identity Mappings in Deep Residual Networks*, ECCV 2016, eq. 5;
`arXiv:1603.05027 <https://arxiv.org/abs/1603.05027>`_.

The picture shows both parts through 40 dense blocks, and that their sum is autograd's gradient to rounding.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode import ResidualStack
from resode.analysis import gradient_parts, jacobian
from resode.fields import BottleneckField, ConvField, MLPField
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

torch.manual_seed(shifted(0))
batch, channels, pixels, width, depth = (2, 8, 6, 32, 40) if FAST else (8, 16, 8, 64, 40)
draws = 3


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def autograd(block, x, g):
    """The gradient at x of ⟨g, block(x)⟩, all at once."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(block(x), x, g)[0]


# %%
# Prediction: the rectified layer, by hand
# ----------------------------------------
# Its parts are :math:`g` and :math:`(g \odot 1_{Wx+b>0})\,W`: no derivative is taken of any code.

layer = nn.Linear(width, width).double()
rectified = nn.Sequential(layer, nn.ReLU())
x, g = normal(2, batch, width)
by_hand = g + (g * (layer(x) > 0)).detach() @ layer.weight.detach()

block = ResidualStack([rectified])  # one block, x + F(x)
hand_error = (autograd(block, x, g) - by_hand).abs().max() / by_hand.abs().max()
part_error = (gradient_parts(rectified, x, g).total - by_hand).abs().max() / by_hand.abs().max()

# %%
# Measurement: four kinds of block
# --------------------------------
# Autograd differentiates the whole block; ``gradient_parts`` differentiates F alone; and a third way forms
# F's Jacobian, row by row, and multiplies :math:`g` by it. (In training batch norm couples the samples, so
# that there is no Jacobian of one sample; the split holds for the batch as a whole.) Each kind is drawn three
# times: the split must hold in all, with something to split on average, as a narrow bottleneck may be dead.

image = (batch, channels, pixels, pixels)
kinds = {
    "dense": (lambda: MLPField(width).eval(), (batch, width)),
    "convolution": (lambda: ConvField(channels, norm="none").eval(), image),
    "batch norm": (lambda: ConvField(channels, norm="batch").eval(), image),
    "bottleneck": (lambda: BottleneckField(channels).eval(), image),
    "batch norm, training": (lambda: ConvField(channels, norm="batch").train(), image),
}
errors, formed, shares = {}, {}, {}
for name, (make, shape) in kinds.items():
    for _ in range(draws):
        field, x, g = make().double(), normal(*shape), normal(*shape)
        parts = gradient_parts(field, x, g)
        whole = autograd(ResidualStack([field]), x, g)
        error = float((parts.total - whole).norm() / whole.norm())
        errors[name] = max(error, errors.get(name, 0.0))
        shares[name] = shares.get(name, 0.0) + float(parts.residual.norm() / parts.identity.norm()) / draws
        if not field.training:
            flat = g.flatten(1) + torch.einsum("bi,bij->bj", g.flatten(1), jacobian(field, x))
            error = float((flat - whole.flatten(1)).norm() / whole.norm())
            formed[name] = max(error, formed.get(name, 0.0))

# %%
# Every unit off, and what the highway does not promise
# -----------------------------------------------------

saturated = nn.Sequential(nn.Linear(width, width), nn.ReLU()).double()
nn.init.constant_(saturated[0].bias, -1e3)
x, g = normal(2, batch, width)
off = ResidualStack([saturated])
changed_bits = int((autograd(off, x, g) != g).sum() + (off(x) != x).sum())

cancelling = nn.Sequential(
    nn.Linear(width, width), nn.ReLU()
).double()  # relu(1000 − x), every unit on: J = −I
cancelling[0].load_state_dict({"weight": -torch.eye(width), "bias": torch.full((width,), 1e3)})
cancelled = float(autograd(ResidualStack([cancelling]), x, g).norm() / g.norm())

masked = autograd(lambda x: torch.relu(x + saturated(x)), x, g)  # post-activation, F = 0
lost = float((masked == 0).double().mean())
negative = float((x < 0).double().mean())

# %%
# Figure
# ------

stack = ResidualStack([MLPField(width) for _ in range(depth)], step_size=1 / depth).double()
_, path = stack(normal(batch, width), return_path=True)
g, identity, residual = normal(batch, width), [], []
for index in reversed(range(depth)):
    parts = gradient_parts(stack.field(index), path[index].detach(), g, step_size=stack.step_size)
    identity.insert(0, float(parts.identity.norm()))
    residual.insert(0, float(parts.residual.norm()))
    g = parts.total

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.semilogy(identity, label="identity part ‖g‖")
left.semilogy(residual, label="residual part ‖ηJᵀg‖")
left.set(xlabel="block", ylabel="norm of the gradient's part", title=f"{depth} dense blocks, η = 1/{depth}")
left.legend()
right.barh(list(formed), list(formed.values()), color="tab:green")
right.axvline(torch.finfo(torch.float64).eps, color="black", ls="--", label="machine ε")
right.set(
    xscale="log",
    xlim=(1e-17, 1e-14),
    xlabel="‖g + gᵀJ − autograd‖ / ‖autograd‖",
    title="J formed: the parts sum",
)
right.legend()

# %%
# Verdict
# -------
# Sums of up to a few thousand products in float64 are right to some tens of machine ε, 2.2e-16: hence 1e-14.

agree("relu layer: autograd less g + gᵀJ by hand", 0, hand_error, atol=1e-14)
agree("relu layer: the parts less g + gᵀJ by hand", 0, part_error, atol=1e-14)
for name, error in errors.items():
    agree(f"{name}: error of the parts' sum, worst draw", 0, error, atol=1e-14)
for name, error in formed.items():
    agree(f"{name}: error of g + gᵀJ, J formed, worst draw", 0, error, atol=1e-14)
at_least(
    "residual part relative to g, mean over draws, of the kind with the least", 0.05, min(shares.values())
)
agree("every unit off: entries of x and g that changed", 0, changed_bits)
at_most("J = −I: gradient left, relative to g", 1e-12, cancelled)
agree("post-activation, F = 0: share of g lost (of x < 0)", negative, lost)
