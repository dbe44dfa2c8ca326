r"""
C8 · Too large a step
=====================

**Claim.** Forward Euler on :math:`F(x) = x(1 - x)`, a stack of equal blocks
:math:`x \leftarrow x + \eta x(1 - x)`, is the logistic family. Its fixed point 1 is stable until
:math:`\eta = 2`, then it settles on a cycle of two states, from :math:`\eta = \sqrt 6` on a cycle of four,
and at :math:`\eta = 3` it is chaotic, with Lyapunov exponent

.. math:: \lim_{n \to \infty} \frac1n \sum_{l < n} \ln |1 + \eta (1 - 2 x_l)| = \ln 2 .

With :math:`x = y(1 + \eta)/\eta` it is :math:`y \leftarrow ry(1 - y)`, :math:`r = 1 + \eta`: the figures are
those of that map at :math:`r = 3`, :math:`1 + \sqrt 6` and 4.

**Assumptions.** The field is shared by all blocks; states start in (0, 1].

**Not claimed.** That the flow does any of this: every solution of :math:`dx/dt = x(1 - x)` from there goes
to 1. Nor, as is often said, that every step beyond the cascade of doublings (:math:`\eta = 2.5699\ldots`)
gives chaos: at :math:`\eta = 2.835` the orbit has period 3 and a negative exponent. Another solver has
another diagram: RK4 rests at 1 up to 2.785.

**Source.** May, *Simple mathematical models with very complicated dynamics*, Nature 261 (1976); for the
exponent at :math:`r = 4`, Ott, *Chaos in Dynamical Systems*, 2nd ed. (2002), 2.1–2.2.

**The picture** shows where the stack settles for each step, the Lyapunov exponent below it, and the states of
four stacks block by block.
"""

# %%
# **Set-up.** One field, and real stacks of it.

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

import resode
from resode.analysis import bifurcation, lyapunov_exponents, stability_losses
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_most


class Logistic(nn.Module):
    def forward(self, x):
        return x * (1 - x)


field = Logistic()
spacing = 0.02 if FAST else 0.005
eta = torch.arange(1.5, 3.0, spacing, dtype=torch.float64)
x0 = torch.rand(50, 1, generator=torch.Generator().manual_seed(shifted(0)), dtype=torch.float64)

# %%
# **Prediction.** The multiplier of the fixed point is :math:`1 - \eta`; that of the cycle of two is
# :math:`5 - \eta^2`. They pass −1 at 2 and at :math:`\sqrt 6`. The next doubling is the logistic map's
# :math:`r = 3.5440903595519\ldots`, less 1.

first, second, third = 2.0, math.sqrt(6), 2.5440903595519
exponent = math.log(2)

# %%
# **Measurement.** Three routes to the doublings: the multiplier of the followed cycle, the diagram of where
# orbits settle, and a deep stack. The diagram cannot be finer than its grid.

near_one = torch.full((1, 1), 0.8, dtype=torch.float64)  # from below 1/2 Newton's method goes to 0
losses = stability_losses(field, near_one, 3.0, max_period=4)
diagram = bifurcation(field, eta, 0.1, transient=4000, keep=200)
periods = diagram.periods()
last = [float(eta[periods == p].max()) for p in (1, 2)]


def path(step_size, solver="euler"):
    """The states of a stack of 2,000 blocks, one start."""
    stack = resode.ResidualStack(field, depth=2000, step_size=step_size, solver=solver)
    with torch.no_grad():
        return stack(x0[:1], return_path=True)[1][:, 0, 0]


paths = {step: path(step) for step in (1.9, 2.2, 2.5, 2.835, 3.0)}
distinct = {step: len(torch.unique(states[-60:].round(decimals=6))) for step, states in paths.items()}

# %%
# The exponent is a mean over blocks and starts. At :math:`\eta = 3` the sum telescopes, with
# :math:`3x/4 = \sin^2\theta`, to :math:`n \ln 2` plus the difference of two values of :math:`\ln |\sin|`,
# each with standard deviation :math:`\pi/\sqrt{12}`: this gives the tolerance, five standard errors.

n_steps = 300 if FAST else 1000
chaos = float(lyapunov_exponents(field, x0, 3.0, transient=50, n_steps=n_steps).mean())
error = 5 * math.pi / math.sqrt(6) / n_steps / math.sqrt(len(x0))
window = float(lyapunov_exponents(field, x0, 2.835, transient=500, n_steps=200).max())

# %%
# The exponent over all steps, by the sum above, on the states of the diagram.

curve = (1 + eta[:, None] * (1 - 2 * diagram.orbits)).abs().log().mean(1)

# %%
# **Figure.**

figure, axes = plt.subplots(2, 2, figsize=(11, 6.4), layout="constrained", sharex="col")
axes[0, 0].plot(eta.repeat_interleave(200), diagram.orbits.flatten(), ",", color="black", alpha=0.5)
axes[0, 0].set(ylabel="x after 4,000 blocks", title="Where the stack settles")
axes[1, 0].plot(eta, curve, color="#0072B2", linewidth=0.9)
axes[1, 0].axhline(0, color="black", linewidth=0.6)
axes[1, 0].plot(3, exponent, "o", color="#D55E00", label="ln 2 at η = 3")
axes[1, 0].set(xlabel="step size η", ylabel="per block", ylim=(-2.5, 0.9), title="Lyapunov exponent")
axes[1, 0].legend(loc="lower right")
for at, name in ((first, "2"), (second, "√6")):
    for ax in axes[:, 0]:
        ax.axvline(at, color="#D55E00", linestyle="--", linewidth=0.9)
    axes[0, 0].text(at + 0.01, 0.02, f"η = {name}", color="#D55E00")
for ax, some in zip(axes[:, 1], ((1.9, 2.2, 2.5), (2.835, 3.0)), strict=True):
    for colour, step in zip(("#0072B2", "#E69F00", "#009E73"), some, strict=False):
        ax.plot(paths[step][:60], ".-", linewidth=0.7, color=colour, label=f"η = {step:g}")
    ax.set(ylabel="x", title="State after each block", ylim=(-0.1, 1.6))
    ax.legend(loc="upper right", ncols=3)
axes[1, 1].set_xlabel("block")

# %%
# **Verdict.**

agree("η where the fixed point flips", first, losses[0].step_size, rtol=1e-12)
agree("η where the cycle of two flips", second, losses[1].step_size, rtol=1e-9)
agree("η where the cycle of four flips", third, losses[2].step_size, rtol=1e-8)
agree("last η of the diagram with period 1 (its grid)", first, last[0], atol=1.01 * spacing)
agree("last η of the diagram with period 2 (its grid)", second, last[1], atol=1.01 * spacing)
for step, states in ((1.9, 1), (2.2, 2), (2.5, 4), (2.835, 3)):
    agree(f"states that the stack ends on, η = {step:g}", states, distinct[step])
agree("Lyapunov exponent at η = 3 (5 standard errors)", exponent, chaos, atol=error)
at_most("largest exponent in the window of period 3, η = 2.835: no chaos", 0.0, window)
agree("RK4's stack at η = 2.7 ends at 1 (rounding)", 1.0, float(path(2.7, "rk4")[-1]), atol=1e-9)
