r"""
A6 · Pre- against post-activation
=================================

**Claim.** One scalar layer, a weight :math:`w \sim N(0, s^2)` and a symmetric input x. With
:math:`y_A = x + \mathrm{relu}(wx)` (nothing after the addition) and :math:`y_B = \mathrm{relu}(x + wx)`,

.. math:: \frac{E[(dy_A/dx)^2]}{E[(dy_B/dx)^2]} = \frac{(2 + s^2)/2}{(1 + s^2)/2}
          = \frac{2 + s^2}{1 + s^2} > 1.

**Assumptions.** One layer; x symmetric. :math:`y_A` stands in for pre-activation,
:math:`x + w\,\mathrm{relu}(x)`: their moments agree for symmetric x, and differ for positive x.

**Not claimed.** That the ratio compounds to :math:`((2 + s^2)/(1 + s^2))^L` with depth. A post-activation
block hands on :math:`x \ge 0`, and for positive x another law holds,

.. math:: E[(dy_A/dx)^2] = 1 + s\sqrt{2/\pi} + s^2/2, \qquad
          E[(dy_B/dx)^2] = (1 + s^2)\,\Phi(1/s) + s\,\varphi(1/s),

with φ and Φ the normal density and distribution. In wide stacks a pre-activation block multiplies the second
moment by :math:`1 + s^2/2`, and the first post-activation block by :math:`(1 + s^2)/2`, because half of its
units are on; in all later blocks far more than half are, and a unit that was on tends to stay so. From
then on both grow alike.

**Source.** The order of activation: He, Zhang, Ren & Sun, *Identity Mappings in Deep Residual Networks*,
2016, `arXiv:1603.05027 <https://arxiv.org/abs/1603.05027>`_. The moments are integrals of a normal density,
done here; the wide limit is that of Poole et al., *Exponential expressivity in deep neural networks*, 2016.

The picture shows the ratio of one layer, and by depth the naive power beside what wide stacks do.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.utils import skip_init

from resode import ResidualStack
from theory.measures.gains import gradient_norms
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

s_values, depths, wide_depths = (0.1, 0.5, 1.0, 2.0), (1, 2, 4, 6), (1, 2, 4, 8)
samples, units, width, nets = (50_000, 50_000, 128, 20) if FAST else (2_000_000, 400_000, 512, 20)
generator = torch.Generator().manual_seed(shifted(0))
F64 = torch.float64


def normal(*shape):
    return torch.randn(*shape, dtype=F64, generator=generator)


def mean(values):
    """The mean, and its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def ratio(a, b):
    """A quotient of two independent means, and its standard error to first order."""
    return a[0] / b[0], a[0] / b[0] * math.hypot(a[1] / a[0], b[1] / b[0])


# %%
# Prediction: moments of one layer, for symmetric and for positive x
# ------------------------------------------------------------------


def moments(s, inputs):
    """E[(dy_A/dx)²] and E[(dy_B/dx)²]."""
    if inputs == "symmetric":
        return (2 + s**2) / 2, (1 + s**2) / 2
    density = math.exp(-((1 / s) ** 2) / 2) / math.sqrt(2 * math.pi)
    distribution = (1 + math.erf(1 / s / math.sqrt(2))) / 2
    return 1 + s * math.sqrt(2 / math.pi) + s**2 / 2, (1 + s**2) * distribution + s * density


# %%
# Measurement: Monte Carlo over weights and inputs
# ------------------------------------------------
# Every row of the batch is a scalar network with weights of its own.

LAYERS = {
    "A": lambda w: lambda x: x + torch.relu(w * x),
    "B": lambda w: lambda x: torch.relu(x + w * x),
    "pre": lambda w: lambda x: x + w * torch.relu(x),
}


def measured(kind, s, inputs, layers=1):
    """E[(dx_L/dx)²] of a scalar chain with independent weights, and its standard error."""
    x = normal(samples, 1) if inputs == "symmetric" else normal(samples, 1).abs()
    blocks = [LAYERS[kind](s * normal(samples, 1)) for _ in range(layers)]
    return mean(gradient_norms(blocks, x, torch.ones_like(x))[0] ** 2)


ratios = {
    (s, inputs): ratio(measured("A", s, inputs), measured("B", s, inputs))
    for s in s_values
    for inputs in ("symmetric", "positive")
}
pre = {inputs: measured("pre", 1.0, inputs) for inputs in ("symmetric", "positive")}

# %%
# Scalar chains by depth, s = 1/2
# -------------------------------
# After the first block B is positive or dead: its moment is the symmetric one, then powers of the positive.
# The fourth powers, E[u⁴; u > 0] of u = 1 + w, do likewise, and give the error of a mean of so many squares.

first, later = moments(0.5, "symmetric")[1], moments(0.5, "positive")[1]
chain_law = {depth: first * later ** (depth - 1) for depth in depths}
chain = {depth: measured("B", 0.5, "symmetric", depth)[0] for depth in depths}
first4 = (1 + 6 * 0.5**2 + 3 * 0.5**4) / 2
density, distribution = math.exp(-2) / math.sqrt(2 * math.pi), (1 + math.erf(math.sqrt(2))) / 2  # at 1/s = 2
later4 = 2 * first4 * distribution + (0.5 + 5 * 0.5**3) * density
chain_error = {
    depth: math.sqrt((first4 * later4 ** (depth - 1) - law**2) / samples) for depth, law in chain_law.items()
}

# %%
# Wide stacks by depth, s = 1
# ---------------------------
# As the width grows, units become independent: each follows :math:`x_{l+1} = \mathrm{relu}(x_l + s q_l \xi)`,
# with :math:`q_l` the root mean square of all. On the way back, a unit whose mask is D gets
# :math:`v_l^2 = D\,v_{l+1}^2 + s^2 E[D\,v_{l+1}^2]`: its own share, if it was on, and its part of everyone's.
# So D is followed unit by unit: for a crowd of independent units, with no network and no derivative.

crowd, on = normal(units), []
for _ in range(max(wide_depths)):
    after = crowd + crowd.square().mean().sqrt() * normal(units)
    on.append(after > 0)
    crowd = torch.relu(after)


def post_law(depth):
    """E of the squared gradient before `depth` post-activation blocks of infinite width, s = 1."""
    v = torch.ones(units, dtype=F64)
    for mask in reversed(on[:depth]):
        v = mask * v + (mask * v).mean()
    return float(v.mean())


laws = {depth: (1.5**depth, post_law(depth)) for depth in wide_depths}


# %%
# Measured in real stacks: ``ResidualStack`` is pre-activation; rectified after every block, it is not.


def linear():
    layer = skip_init(nn.Linear, width, width, bias=False, dtype=F64)
    layer.weight = nn.Parameter(normal(width, width) / math.sqrt(width))
    return layer


def pre_stack(depth):
    return [ResidualStack([nn.Sequential(nn.ReLU(), linear()) for _ in range(depth)])]


def post_stack(depth):
    return [nn.Sequential(ResidualStack([linear()]), nn.ReLU()) for _ in range(depth)]


def gain(make, depth):
    """E[‖gradient‖² / ‖g‖²] over random nets of this depth, and its standard error."""
    inputs = normal(nets, 2, 8, width)
    squares = [gradient_norms(make(depth), x, g)[0] ** 2 / g.square().sum(1) for x, g in inputs]
    return mean(torch.stack(squares).mean(1))


wide = {depth: (gain(pre_stack, depth), gain(post_stack, depth)) for depth in wide_depths}

# %%
# Figure
# ------

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
fine = [0.05 * k for k in range(1, 50)]
for inputs, mark in (("symmetric", "o"), ("positive", "s")):
    left.plot(fine, [moments(v, inputs)[0] / moments(v, inputs)[1] for v in fine], "k:", lw=1)
    values, errors = zip(*(ratios[v, inputs] for v in s_values), strict=True)
    left.errorbar(
        s_values, values, [3 * e for e in errors], fmt=mark, label=f"{inputs} x, ± 3 standard errors"
    )
left.set(xlabel="s", ylabel="E[(dy_A/dx)²] / E[(dy_B/dx)²]", title="one scalar layer")
left.legend()
right.semilogy(wide_depths, [1.5**d for d in wide_depths], "k--", label="naive power of one layer's ratio")
right.semilogy(wide_depths, [laws[d][0] / laws[d][1] for d in wide_depths], "k:", label="wide limit")
values, errors = zip(*(ratio(*wide[d]) for d in wide_depths), strict=True)
right.errorbar(wide_depths, values, [3 * e for e in errors], fmt="o", label=f"stacks of width {width}")
right.set(xlabel="blocks L", ylabel="gradient², pre- over post-activation", title="wide stacks, s = 1")
right.set_yscale("log", base=2)
right.legend()

# %%
# Verdict
# -------
# Four standard errors of each Monte Carlo mean: with twenty of them one beyond three is no surprise (5 %),
# one beyond four is (0.1 %). A chain's squared gradient is a product, so skewed that the spread of a sample
# is no measure of its mean's error: there the law gives the error too.

for (s, inputs), (value, error) in ratios.items():
    a, b = moments(s, inputs)
    agree(f"s = {s}, {inputs} x: ratio of the moments", a / b, value, atol=4 * error)
for inputs, moment, what in (("symmetric", 1.5, "1 + s²/2, as y_A"), ("positive", 2, "1 + s², y_A has 2.3")):
    value, error = pre[inputs]
    agree(f"x + w·relu(x), s = 1, {inputs} x: {what}", moment, value, atol=4 * error)
for depth in depths:
    what = f"scalar chain of {depth} layers: E[(dx_L/dx)²] of B"
    agree(what, chain_law[depth], chain[depth], atol=4 * chain_error[depth])
at_least("  6 layers over the power of the first", 2, chain[6] / first**6)

# %%
# Wide stacks also differ from their limit by terms that grow as L² and fall as 1/width (post-activation the
# more so, because its states all point into one orthant): L²/(3 width) is allowed for that.

for depth in wide_depths:
    (a, da), (b, db) = wide[depth]
    allowed = depth**2 / (3 * width)
    agree(f"pre-activation, {depth} blocks: (1 + s²/2)^L", laws[depth][0], a, rtol=allowed, atol=4 * da)
    agree(f"post-activation, {depth} blocks: wide limit", laws[depth][1], b, rtol=allowed, atol=4 * db)
at_most("8 blocks: the ratio over the naive power", 0.1, wide[8][0][0] / wide[8][1][0] / 1.5**8)
