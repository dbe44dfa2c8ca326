r"""
B9 · Delta learning
===================

A residual network learns what is missing from the identity. The same idea works over any other known model.

**Claim.** Let :math:`f` be expensive and :math:`c` a cheap model of it. To learn :math:`\delta = f - c` takes
fewer samples than to learn :math:`f`, where :math:`\delta` is smaller *and* smoother. For straight lines
between samples the two are one number, the curvature: with one random sample in each of :math:`n` equal cells

.. math:: \text{rms error} \to \frac{\operatorname{rms}(f'')}{\sqrt{40}\,n^2},\qquad
   \text{gain in error} = \frac{\operatorname{rms}(f'')}{\operatorname{rms}(\delta'')},\qquad
   \text{gain in samples} = \sqrt{\text{gain in error}}.

In dynamics the cheap model is the part of the equation that is known,
:math:`\dot x = f_\text{known}(x) + F_\theta(x)`.

**Not claimed.** That a small difference is enough. Two cases gain *nothing*: a rough difference, which no
number of samples at hand resolves, has the error :math:`A\sqrt{5/6}` whether learnt alone or within
:math:`f`; and ordinary least squares, a projection, gives the very same prediction where the cheap model
lies in the span of its features.

**Assumptions.** Exact samples; the cheap model costs nothing. The pendulum's network is trained by L-BFGS,
for which no rate is proved: there the page asks for half the ratio of the two right-hand sides' sizes.

**Source.** Ramakrishnan et al., *J. Chem. Theory Comput.* 11 (2015) 2087; Rackauckas et al. (2020),
arXiv:2001.04385; the lines' error: de Boor, *A Practical Guide to Splines* (2001), chapter III.

The picture: errors against samples, with standard errors over the draws, for the three cases and a pendulum.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode import ResidualStack
from resode.fields import KnownPlusLearned, MLPField
from resode.training.fit import fit
from theory.measures.learning_curve import LeastSquares, PiecewiseLinear, learning_curve
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

torch.set_default_dtype(torch.float64)

# %%
# Measurement: a cheap and an expensive function
# ----------------------------------------------
# The cheap model has the fast oscillation right; the difference is small and slow, or small and very fast.


def wave(k, size):
    return lambda x: size * torch.sin(2 * math.pi * k * x)


def one_a_cell(n, generator):
    return (torch.arange(n)[:, None] + torch.rand(n, 1, generator=generator)) / n


def curves(cheap, difference, learner, counts, draws=20 if FAST else 40):
    """The expensive function learnt directly, and as the cheap one plus what is learnt."""

    def expensive(x):
        return cheap(x) + difference(x)

    def delta_learner(x, y):
        return KnownPlusLearned(cheap, learner(x, y - cheap(x)))

    test = (torch.arange(2000)[:, None] + 0.5) / 2000
    return [
        learning_curve(way, expensive, one_a_cell, counts, test, draws=draws, seed=shifted(0))
        for way in (learner, delta_learner)
    ]


counts = [32, 64, 128, 256, 512]
size = 0.2
smooth = curves(wave(4, 1.0), wave(1, size), PiecewiseLinear, counts)
rough = curves(wave(1, 1.0), wave(30011, size), PiecewiseLinear, counts)


def polynomials(x):
    return torch.cat([x**k for k in range(4)], 1)


spanned = curves(
    lambda x: 4 * x**3 - 3 * x, wave(1, size), lambda x, y: LeastSquares(x, y, polynomials), counts
)

# %%
# Prediction: second derivatives by hand
# --------------------------------------
# The two waves of the smooth case are orthogonal, so that their curvatures add in squares.
curvature = [
    math.hypot(4**2, size) * (2 * math.pi) ** 2 / math.sqrt(2),
    size * (2 * math.pi) ** 2 / math.sqrt(2),
]
error_at_512 = [c / math.sqrt(40) / 512**2 for c in curvature]
gain = curvature[0] / curvature[1]

# %%
# A damped pendulum
# -----------------
# Known is the frictionless law; the friction :math:`-0.2\,\omega` is learnt from single steps of 0.1 of the
# motion, by a network within the Runge-Kutta step. A network for the whole right-hand side is its rival. Both
# are judged by paths of 100 steps from states that they have not seen.
friction = 0.2


def frictionless(x):
    return torch.stack((x[:, 1], -x[:, 0].sin()), 1)


def damping(x):
    return torch.stack((torch.zeros_like(x[:, 1]), -friction * x[:, 1]), 1)


class Pendulum(nn.Module):
    def forward(self, x):
        return frictionless(x) + damping(x)


def motion(field, steps):
    return ResidualStack(field, depth=steps, solver="rk4", step_size=0.1)


def learnt_motion(make_field):
    def learner(x, y):
        field = make_field()
        fit(
            motion(field, 1),
            x,
            motion(Pendulum(), 1)(x),
            steps=4 if FAST else 6,
            method="lbfgs",
            loss_fn=in_time,
        )
        return lambda test: motion(field, 100)(test, return_path=True)[1]

    return learner


def in_time(y, target):
    return ((y - target) / 0.1).square().mean()


def states(n, generator):
    return 4 * torch.rand(n, 2, generator=generator) - 2


pendulum_counts = [32] if FAST else [8, 16, 32, 64]
unseen = 0.75 * states(50, torch.Generator().manual_seed(shifted(99)))
pendulum = [
    learning_curve(
        learnt_motion(make),
        lambda x: motion(Pendulum(), 100)(x, return_path=True)[1],
        states,
        pendulum_counts,
        unseen,
        draws=8,
        seed=shifted(0),
    )
    for make in (
        lambda: MLPField(2, hidden=12, activation="tanh"),
        lambda: KnownPlusLearned(frictionless, MLPField(2, hidden=12, activation="tanh")),
    )
]

# %%
# Where the missing part is a matrix, a linear layer finds it to rounding from eight steps.
matrix = nn.Linear(2, 2, bias=False)
eight = states(8, torch.Generator().manual_seed(shifted(0)))
law = motion(KnownPlusLearned(frictionless, matrix), 1)
fit(law, eight, motion(Pendulum(), 1)(eight), steps=10, method="lbfgs", loss_fn=in_time)

# %%
# Figure
# ------
figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
cases = (
    (smooth, "small smooth difference: gains"),
    (rough, "rough difference: gains nothing"),
    (spanned, "cheap model in the span: gains nothing"),
    (pendulum, "damped pendulum, 100 steps: gains"),
)
for axis, (pair, title) in zip(axes.flat, cases, strict=True):
    for curve, label, style in zip(pair, ("all of it", "the difference"), ("o-", "s--"), strict=True):
        axis.errorbar(curve.counts, curve.mean, curve.standard_error, fmt=style, capsize=3, label=label)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="samples n", ylabel="rms error", title=title, yscale="log")
axes[0, 0].plot(counts, [[c / math.sqrt(40) / n**2 for c in curvature] for n in counts], "k:")
axes[0, 0].plot([], "k:", label="predicted")
axes[0, 1].axhline(size * math.sqrt(5 / 6), color="k", ls=":", label="predicted")
axes[0, 1].set(yscale="linear", ylim=(0, 1.5 * size))
axes[1, 0].set(yscale="linear", ylim=(0, 0.02))
for axis in axes.flat:
    axis.legend(title="learnt is")

# %%
# Verdict
# -------
# 20 (40) draws of 512 gaps scatter by about 1 % in the rms error, of 32 gaps by about 5 %. Samples are read
# off the curve, straight in logarithms between its points.
direct, delta = smooth
agree("smooth: error of the function itself at n = 512", error_at_512[0], direct.mean[-1], rtol=0.05)
agree("smooth: error of the difference at n = 512", error_at_512[1], delta.mean[-1], rtol=0.05)
agree("smooth: gain in error", gain, direct.mean[-1] / delta.mean[-1], rtol=0.06)
needed = direct.samples_for(float(delta.mean[0]))
agree(
    "smooth: gain in samples, to do as well as 32 of the difference", math.sqrt(gain), needed / 32, rtol=0.06
)

# %%
# The smooth part that the direct learner must also find is below 1 % of the rough one at n = 32.
direct, delta = rough
agree("rough: error of the difference", size * math.sqrt(5 / 6), delta.mean[-1], rtol=0.05)
agree("rough: gain in error", 1.0, direct.mean[-1] / delta.mean[-1], rtol=0.01)
apart = (spanned[0].errors / spanned[1].errors - 1).abs().max()
agree("least squares: gain in error, any draw and count", 1.0, 1 + apart, atol=1e-9)
at_least("least squares: error, so that there was something to gain", 0.01, spanned[1].mean[-1])

# %%
# The pendulum: half of rms(all of F) / rms(friction) over the states. The gain's logarithm scatters by 0.4
# from draw to draw, so the mean of eight by 0.15, a quarter of its distance from that half.
many = states(10_000, torch.Generator().manual_seed(shifted(1)))
sizes = (Pendulum()(many).norm() / damping(many).norm()).item()
i = pendulum_counts.index(32)
gains = pendulum[0].errors[i] / pendulum[1].errors[i]  # the same samples for both
at_least(
    "pendulum: gain in error from 32 steps, geometric mean of draws", sizes / 2, gains.log().mean().exp()
)
agree("pendulum: friction that a linear layer finds", -friction, matrix.weight[1, 1].item(), atol=1e-6)
at_most("pendulum: the other entries of its matrix", 1e-6, matrix.weight.flatten()[:3].abs().max().item())
