r"""
A2 · Product bound
==================

**Claim.** The gradient through L residual blocks is multiplied by :math:`\prod (I + J_l)`, through L plain
ones by :math:`\prod J_l`. For *normal* :math:`J_l` of spectral radius at most r,

.. math:: \Big\| \prod_{l=1}^{L} (I + J_l) \Big\|_2 \le (1 + r)^L, \qquad
          \Big\| \prod_{l=1}^{L} J_l \Big\|_2 \le r^L,

and for any :math:`J_l` with :math:`\|J_l\|_2 \le \varepsilon < 1` the smallest singular value of
:math:`\prod (I + J_l)` is at least :math:`(1 - \varepsilon)^L`.

**Assumptions.** Normality (:math:`J J^\top = J^\top J`) is what makes the norm equal to the spectral
radius.

**Not claimed.** The popular form leaves normality out, and is wrong: the nilpotent blocks
:math:`\begin{pmatrix}0&a\\0&0\end{pmatrix}` and their transposes, in turn, have r = 0, yet their residual
product grows like :math:`\mu^L`, :math:`\mu = a/2 + \sqrt{1 + a^2/4}`, and their plain product is
:math:`a^L`. Nor does the upper bound rule out vanishing: with :math:`J = -0.9\,I` it allows :math:`1.9^L`
while :math:`0.1^L` is left. Only the lower bound excludes that, and it falls with L too. Nor is :math:`(1 +
\varepsilon)^L` "nearly linear", :math:`1 + \varepsilon L`: it is within :math:`(\varepsilon L)^2 / 2` of
that, relatively, which is small for :math:`\varepsilon L \ll 1` alone. At :math:`\varepsilon = 0.05` and
:math:`L = 100` the one is 131.5, the other 6.

**Source.** Horn & Johnson, *Matrix Analysis*, 2nd ed. 2013, sections 2.5 (normal matrices) and 7.3; for the
gradient of plain chains Pascanu, Mikolov & Bengio, *On the difficulty of training recurrent neural
networks*, ICML 2013.

The picture shows the gain by depth between its two bounds, beside plain chains and the counterexample.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode import ResidualStack
from resode.analysis import product_norm
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

r, L = 0.05, 100
n, width, short, depths = (4, 6, 20, (10,)) if FAST else (12, 16, 100, (1, 4, 10, 20, 40, 70))
generator = torch.Generator().manual_seed(shifted(0))
F64 = torch.float64


def linear(matrix):
    """The field F(x) = Jx."""
    return lambda x: x @ matrix.T


def random_normal():
    """QΛQᵀ, Q random orthogonal, Λ rotations scaled by at most r, one by r itself: normal, with ρ = r."""
    q = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator)).Q
    size, angle = torch.rand(2, n // 2, dtype=F64, generator=generator) * torch.tensor([[r], [2 * torch.pi]])
    size[0] = r
    pairs = [
        s * torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]], dtype=F64)
        for s, a in zip(size, angle, strict=True)
    ]
    return q @ torch.block_diag(*pairs) @ q.T


signs = torch.diag(torch.tensor([1.0, -1.0], dtype=F64))
nilpotent = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64)
chains = {
    "J = diag(r, −r)": [linear(r * signs)] * L,
    "random normal J": [linear(random_normal()) for _ in range(L)],
    "nilpotent, a = 0.05": [linear(r * nilpotent), linear(r * nilpotent.T)] * (short // 2),
    "nilpotent, a = 1": [linear(nilpotent), linear(nilpotent.T)] * (short // 2),
    "J = −0.9 I": [linear(-0.9 * signs.abs())] * short,
}

# %%
# Prediction
# ----------


def mu(a):
    """The growth of the nilpotent chain a block: (I + N)ᵀ(I + N) has the largest eigenvalue μ²."""
    return a / 2 + (1 + a**2 / 4) ** 0.5


upper, lower, plain_upper = 1.05**100, 0.95**100, 0.05**100

# %%
# Measurement: singular values of the product, which is never formed
# ------------------------------------------------------------------


def measured(name, depth=L):
    return product_norm(chains[name][:depth], torch.ones(1, n if "random" in name else 2, dtype=F64))


gains = {name: measured(name) for name in chains}

# %%
# "Nearly linear", tried with chains of J = εI at L = 100: the norm over 1 + εL, less 1.

excess = {
    e: float(product_norm([linear(e * signs.abs())] * L, torch.ones(1, 2, dtype=F64)).norm) / (1 + e * L) - 1
    for e in (1e-5, 1e-4, 1e-3, 0.05)
}

# %%
# A stack that is not linear has other Jacobians at every state; the bounds hold with their norms, which are
# at most those of the weights, because tanh is nowhere steeper than 1. (Nor are they far below: its slope
# is above a fifth where ``abs(z) < 1.4``.)

torch.manual_seed(shifted(0))
fields = [nn.Sequential(nn.Linear(width, width), nn.Tanh()).double() for _ in range(short)]
stack = ResidualStack(fields, step_size=0.05).eval()
real = product_norm(stack, torch.randn(2, width, dtype=F64, generator=generator))
weight_norms = torch.stack([0.05 * torch.linalg.matrix_norm(f[0].weight.detach(), 2) for f in fields])

# %%
# Figure
# ------

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
depth = torch.arange(L + 1, dtype=F64)
left.fill_between(depth, (1 - r) ** depth, (1 + r) ** depth, alpha=0.15, label="(1−r)^L to (1+r)^L")
left.plot(depth, mu(r) ** depth, "k:", lw=1, label="μ^L, a = 0.05")
right.plot(depth, r**depth, "k:", lw=1, label="r^L")
for name, mark in (("J = diag(r, −r)", "^"), ("random normal J", "o"), ("nilpotent, a = 0.05", "s")):
    found = {d: measured(name, d) for d in depths} | {len(chains[name]): gains[name]}
    left.plot(list(found), [float(f.norm) for f in found.values()], mark, label=name)
    left.plot(list(found), [float(f.smallest) for f in found.values()], mark, color="gray", ms=3)
    right.plot(list(found), [float(f.plain) for f in found.values()], mark, label=name)
left.set(yscale="log", xlabel="blocks L", ylabel="‖∏(I + J)‖₂, and σ_min in gray", title="residual chains")
right.set(yscale="log", xlabel="blocks L", ylabel="‖∏J‖₂", title="plain chains")
left.legend(fontsize=8)
right.legend(fontsize=8)

# %%
# Verdict
# -------
# A product of 100 factors in float64 is right to about 100 machine ε, 2e-14; the least singular value of
# the ill-conditioned ones to less. Bounds carry the same rounding.

rounding = 1 + 1e-12
tight = gains["J = diag(r, −r)"]
agree("J = diag(r, −r): norm, 1.05^100", upper, tight.norm, rtol=1e-12)
agree("  the same, to the nine digits in print", 131.501258, tight.norm, atol=5e-7)
agree("  smallest singular value, 0.95^100", lower, tight.smallest, rtol=1e-10)
agree("  plain, 0.05^100", plain_upper, tight.plain, rtol=1e-12)
agree("random normal J: spectral radius", r, gains["random normal J"].radii.max(), rtol=1e-10)
at_most("  norm at most (1+r)^L", upper * rounding, gains["random normal J"].norm)
at_least("  smallest singular value at least (1−r)^L", lower / rounding, gains["random normal J"].smallest)
at_most("  plain at most r^L", plain_upper * rounding, gains["random normal J"].plain)
for a in (0.05, 1.0):
    found = gains[f"nilpotent, a = {a:g}"]
    at_most(f"nilpotent, a = {a:g}: spectral radius", 1e-7, found.radii.max())
    agree("  norm, μ^L where the popular bound is 1", mu(a) ** short, found.norm, rtol=1e-10)
    agree("  plain, a^L where the popular bound is 0", a**short, found.plain, rtol=1e-10)
for e in (1e-5, 1e-4):
    series = (e * L) ** 2 / 2 * (1 - 1 / L)
    agree(f"J = {e:g} I: norm over 1 + εL, less 1: the next term", series, excess[e], rtol=2 * e * L)
agree("J = 0.05 I: norm over 1 + εL, which is 6", 131.501258 / 6, 1 + excess[0.05], rtol=1e-8)
agree("J = −0.9 I: norm, 0.1^L where 1.9^L is allowed", 0.1**short, gains["J = −0.9 I"].norm, rtol=1e-10)
at_most("tanh stack: norm over ∏(1+ε)", rounding, (real.norm / real.upper).max())
at_least("  smallest singular value over ∏(1−ε)", 1 / rounding, (real.smallest / real.lower).min())
at_most("  largest ε over the weights' norm, η‖W‖₂", rounding, (real.block_norms / weight_norms).max())
at_least("  and the least, so that these are its blocks", 0.2, (real.block_norms / weight_norms).min())
at_most("  largest ε, below 1", 0.999, real.block_norms.max())
