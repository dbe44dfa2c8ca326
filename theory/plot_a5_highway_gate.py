r"""
A5 · Highway gate
=================

**Claim.** A highway layer mixes F with the state by a learnt gate T,

.. math:: y = T(x) \odot F(x) + (1 - T(x)) \odot x.

Along the shortcuts alone, the gradient through L layers is multiplied by :math:`\prod (1 - T_l)`; with
constant gates :math:`T = \mathrm{sigmoid}(b)` that is :math:`(1 - \mathrm{sigmoid}(b))^L`. As T → 1 it goes
to 0, and what is left is a plain network.

**Assumptions.** For the closed form the gates do not depend on x (their weights are 0); F is free.

**Not claimed.** That the whole gradient vanishes with the shortcuts'. The path through F survives: where F
turns the plane by 90°, the layer's Jacobian is :math:`(1 - t) I + tK` with singular values
:math:`\sqrt{(1-t)^2 + t^2}`, so the whole gradient is *least at t = 1/2* and whole again at t = 1. With an F
that contracts, :math:`F = \rho K`, ρ < 1, it goes to :math:`\rho^L`: depth kills it as in any plain network.
And a residual block, x + F(x), has no gate to close.

**Source.** Srivastava, Greff & Schmidhuber, *Training Very Deep Networks*, 2015,
`arXiv:1507.06228 <https://arxiv.org/abs/1507.06228>`_.

The picture shows both paths at depth 100 against the gates' bias, beside a residual network of the same F.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode.fields import MLPField
from resode.shortcuts import HighwayShortcut
from theory.measures.gains import gradient_norms
from theory.measures.highways import highway_gradients
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least

L, width, finer = 100, 128, 2 if FAST else 4
biases = [-b / finer for b in range(6 * finer + 1)] + [1.0, 2.0, 3.0]
torch.manual_seed(shifted(0))
F64 = torch.float64
x, g = torch.randn(2, 4, 2, dtype=F64)


def quarter_turn(x):
    """F(x) = Kx, the plane turned by 90°."""
    return torch.stack([-x[:, 1], x[:, 0]], 1)


def constant_gate(bias):
    highway = HighwayShortcut(2, bias=bias).double()
    nn.init.zeros_(highway.transform.weight)
    return highway


def sizes(gradient):
    """‖gradient‖ at the first layer's input over ‖g‖, the first sample's."""
    return float(gradient[0, 0].norm() / gradient[-1, 0].norm())


# %%
# Prediction
# ----------


def predicted(bias, rho=1.0):
    """The gain of L layers along the shortcuts, and along all paths."""
    t = 1 / (1 + math.exp(-bias))
    return (1 - t) ** L, math.hypot(1 - t, rho * t) ** L


# %%
# Measurement: constant gates, biases 0 to −6 and beyond
# ------------------------------------------------------

carry, total, contracting = {}, {}, {}
for bias in biases:
    gate = constant_gate(bias)
    found = highway_gradients([(quarter_turn, gate)] * L, x, g)
    carry[bias], total[bias] = sizes(found.carry), sizes(found.total)
    found = highway_gradients([(lambda x: 0.9 * quarter_turn(x), gate)] * L, x, g)
    contracting[bias] = sizes(found.total)
residual = float((gradient_norms([lambda x: x + quarter_turn(x) / L] * L, x, g)[0] / g.norm(dim=1))[0])

# %%
# Gates that depend on x, and a random F
# --------------------------------------
# Here the shortcuts' gradient is still the product of the gates, whatever the rest does.

layers = [(MLPField(width, activation="tanh").double(), HighwayShortcut(width).double()) for _ in range(L)]
state, ones = torch.randn(3, width, dtype=F64), torch.ones(3, width, dtype=F64)
random = highway_gradients(layers, state, ones)
product = (1 - random.gates).prod(0)
product_error = ((random.carry[0] - product).abs() / product).max()
survival = float((random.total[0].norm(dim=1) / random.carry[0].norm(dim=1)).log().mean().exp())

# %%
# Figure
# ------

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
fine = [b / 20 for b in range(-120, 61)]
left.semilogy(fine, [predicted(b)[0] for b in fine], "k:", lw=1, label="predicted")
left.semilogy(fine, [predicted(b)[1] for b in fine], "k:", lw=1)
left.semilogy(fine, [predicted(b, 0.9)[1] for b in fine], "k:", lw=1)
left.semilogy(biases, [carry[b] for b in biases], "o", ms=4, label="shortcuts alone, ∏(1 − T)")
left.semilogy(biases, [total[b] for b in biases], "s", ms=4, label="all paths, F a rotation")
left.semilogy(biases, [contracting[b] for b in biases], "^", ms=4, label="all paths, F = 0.9 of it")
left.axhline(residual, color="tab:red", ls="--", label="residual net, x + F(x)/L")
left.set(ylim=(1e-40, 1e3), xlabel="gate bias b", ylabel="‖gradient‖ / ‖g‖", title=f"{L} constant gates")
left.legend(fontsize=8)
right.semilogy(random.carry.norm(dim=2).mean(1), label="shortcuts alone")
right.semilogy(random.total.norm(dim=2).mean(1), label="all paths")
right.set(xlabel="layer", ylabel="mean ‖gradient‖", title="gates that depend on x, bias −2, random F")
right.legend()

# %%
# Verdict
# -------
# 100 factors in float64, each right to a few machine ε, and the sigmoid with them: 1e-12. How much more
# survives along all paths of the random layers is a product of 100 gains: its logarithm is near ln 32 and
# varies by 0.2 from network to network at this width (by 0.55 at width 16), so that ln 10 lies more than five
# times that below.

for bias in (0.0, -2.0, -4.0, -6.0, 3.0):
    alone, whole = predicted(bias)
    agree(f"b = {bias:+g}: along the shortcuts, (1 − sigmoid b)^100", alone, carry[bias], rtol=1e-12)
    agree("  along all paths, ((1 − t)² + t²)^50", whole, total[bias], rtol=1e-12)
worst = max(abs(carry[b] / predicted(b)[0] - 1) for b in biases)
agree(f"all {len(biases)} biases: largest relative error, shortcuts", 0, worst, atol=1e-12)
worst = max(abs(contracting[b] / predicted(b, 0.9)[1] - 1) for b in biases)
agree("F = 0.9 K: largest relative error, all paths", 0, worst, atol=1e-12)
at_least("b = 0: all paths over the shortcuts alone, 2^50", 0.999 * 2.0**50, total[0.0] / carry[0.0])
agree("residual net x + Kx/L: (1 + 1/L²)^50", (1 + 1 / L**2) ** (L / 2), residual, rtol=1e-12)
agree("gates of x: shortcuts' gradient over ∏(1 − T), less 1", 0, product_error, atol=1e-12)
at_least("  all paths over the shortcuts alone, geometric mean of the samples", 10, survival)
