r"""
A8 · Total variation
====================

**Claim.** On [0, 1] let :math:`y = x + f(x)` and :math:`V = TV(f)`, the total variation of f. Then

.. math:: |1 - V| \le TV(y) \le 1 + V,

and both ends are attained, by :math:`f = cx`: :math:`TV(y) = |1 + c|`, which is :math:`1 + V` for c ≥ 0 and
:math:`|1 - V|` for c ≤ 0. For piecewise-linear f with slopes :math:`s_i` on pieces of length :math:`\ell_i`,
such as a ReLU network's, :math:`V = \sum |s_i|\,\ell_i` and :math:`TV(y) = \sum |1 + s_i|\,\ell_i`.

**Assumptions.** One real input; f of bounded variation. TV of the identity on [0, 1] is 1.

**Not claimed.** That the identity adds its variation, TV(y) = 1 + V: with :math:`f = -x` nothing is left,
TV(y) = 0, although V = 1. Only V < 1 guarantees that some variation is left; and it says nothing of several
inputs, where TV is another notion.

**Source.** The triangle inequality on :math:`TV(f) = \sup \sum |f(x_{i+1}) - f(x_i)|`: Rudin, *Principles of
Mathematical Analysis*, 3rd ed. 1976, chapter 6.

The picture shows random ReLU blocks, a wave of growing height and the lines f = cx between the two bounds.
"""

import math

import matplotlib.pyplot as plt
import torch

from resode import ResidualStack
from resode.fields import MLPField
from theory.measures.variation import total_variation
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

networks, hidden = (10, 8) if FAST else (100, 32)
torch.manual_seed(shifted(0))

# %%
# f = cx: both ends
# -----------------

slopes = [-3, -2, -1, -0.5, 0, 0.5, 2]
lines = {
    c: (total_variation(lambda x, c=c: c * x), total_variation(lambda x, c=c: x + c * x)) for c in slopes
}

# %%
# Prediction and measurement: ReLU blocks
# ---------------------------------------
# Predicted from the slopes on every piece, summed from the weights; measured by evaluating the block x + F(x)
# at its knots.


def relu_field():
    field = MLPField(1, hidden=hidden).double()
    with torch.no_grad():
        field.fc1.bias.copy_(-field.fc1.weight[:, 0] * torch.rand(hidden))  # knots in [0, 1]
        field.fc2.weight.mul_(0.25 + 3 * torch.rand(1))
    return field


def pieces(field):
    """The knots, and the slope and length of every piece."""
    w, b, v = (p.detach().flatten() for p in (field.fc1.weight, field.fc1.bias, field.fc2.weight))
    knots = -b / w
    ends = torch.cat([torch.tensor([0.0, 1.0]).double(), knots]).sort().values
    on = w * ((ends[1:] + ends[:-1]) / 2)[:, None] + b > 0
    return knots, (on * w * v).sum(1), ends.diff()


relu, relu_errors = [], []
for _ in range(networks):
    field = relu_field()
    knots, slope, length = pieces(field)
    block = ResidualStack([field])  # x + F(x)
    measured = [total_variation(f, knots=knots, samples=1) for f in (field, block)]
    predicted = [float((s.abs() * length).sum()) for s in (slope, 1 + slope)]
    relu.append(measured)
    relu_errors += [abs(m - p) / p for m, p in zip(measured, predicted, strict=True)]

# %%
# A wave, :math:`f = a \sin(2\pi x) / 2\pi`
# -----------------------------------------
# V = 2a/π. The block keeps its direction while a ≤ 1, so TV(y) = y(1) − y(0) = 1; beyond, with
# :math:`\cos\varphi = -1/a`, :math:`\int |1 + a \cos 2\pi x|\,dx = (2\varphi - \pi + 2 a \sin\varphi)/\pi`.


def wave(a):
    return lambda x: a * torch.sin(2 * math.pi * x) / (2 * math.pi)


def wave_law(a):
    if a <= 1:
        return 1.0
    phi = math.acos(-1 / a)
    return (2 * phi - math.pi + 2 * a * math.sin(phi)) / math.pi


heights = [0.5, 1.0, 2.0, 5.0]
waves = {
    a: [total_variation(f, samples=4000) for f in (wave(a), lambda x, a=a: x + wave(a)(x))] for a in heights
}

# %%
# Figure
# ------

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
x = torch.linspace(0, 1, 400, dtype=torch.float64)[:, None]
with torch.no_grad():
    left.plot(x, field(x), label=f"f, TV = {relu[-1][0]:.2f}")
    left.plot(x, block(x), label=f"y = x + f, TV = {relu[-1][1]:.2f}")
left.plot(x, x, "k:", lw=1, label="x, TV = 1")
left.set(xlabel="x", title=f"a ReLU block with {hidden} knots")
left.legend()
most = max(v for v, _ in relu + list(lines.values()) + [tuple(w) for w in waves.values()]) * 1.05
v = torch.linspace(0, most, 200)
right.fill_between(v, (1 - v).abs(), 1 + v, alpha=0.15, label="|1 − V| to 1 + V")
right.plot(*zip(*relu, strict=True), ".", label="ReLU blocks")
right.plot(*zip(*waves.values(), strict=True), "s", label="waves")
right.plot(*zip(*lines.values(), strict=True), "^", label="f = cx")
right.set(xlabel="V = TV(f)", ylabel="TV(x + f)", title="both ends are attained")
right.legend()

# %%
# Verdict
# -------
# Sums of a few thousand differences in float64: 1e-12. The waves are sampled at 4,000 points, at second
# order and from below: 1e-6.

for c, (variation, whole) in lines.items():
    agree(f"f = {c:g}x: V", abs(c), variation, atol=1e-12)
    end, name = (1 + abs(c), "1 + V") if c >= 0 else (abs(1 - abs(c)), "|1 − V|")
    agree(f"  TV(y) = |1 + c|, which is {name}", end, whole, atol=1e-12)
agree(f"{networks} ReLU blocks: largest relative error of V and TV(y)", 0, max(relu_errors), atol=1e-11)
at_most("  largest TV(y) / (1 + V)", 1 + 1e-12, max(t / (1 + v) for v, t in relu))
at_least("  smallest TV(y) / |1 − V|", 1 - 1e-12, min(t / abs(1 - v) for v, t in relu))
for a, (variation, whole) in waves.items():
    agree(f"wave, a = {a:g}: V = 2a/π", 2 * a / math.pi, variation, rtol=1e-6)
    agree("  TV(y)", wave_law(a), whole, rtol=1e-6)
