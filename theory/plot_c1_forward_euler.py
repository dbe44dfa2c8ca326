r"""
C1 · Forward Euler
==================

**Claim.** :math:`x_{l+1} = x_l + \eta F(x_l)` is forward Euler for :math:`dx/dt = F(x)`. As
:math:`\eta \to 0` with :math:`L\eta = T` fixed, the stack converges to the flow, at the solver's order p:

.. math:: \|x_L - x(T)\| = O(\eta^p), \quad p = 1 \text{ (Euler)},\ 2 \text{ (midpoint)},\ 4 \text{ (RK4)},

where F is smooth and the weights are shared or the stack is refined.

**Assumptions.** F has p continuous derivatives, in the state and, where the weights change in depth, within
every block.

**Not claimed.** That a better solver always gives a higher order; there are two ways to lose it. Sampling a
smooth :math:`\theta(t)` at the start of every block gives order 1 with constant weights and at most 2 with
linear ones, whatever the solver, because the solver then solves another equation to its order (sampled in the
middle of blocks, constant weights give 2). And a ReLU, whose slope jumps where a trajectory crosses it,
limits the order to 2.

**Source.** Hairer, Nørsett & Wanner, *Solving Ordinary Differential Equations I*, 2nd ed. (1993), II.3; E, *A
proposal on machine learning via dynamical systems*, Commun. Math. Stat. 5 (2017).

**The picture** shows the error against the step: each slope is an order.
"""

# %%
# **Set-up.** An oscillator with a limit cycle, :math:`r' = ar(1 - r^2),\ \varphi' = w`: nonlinear and smooth,
# with two weights and a flow in closed form. And :math:`x' = 1 - 2\,\mathrm{relu}(x)`, which has one too.

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

import resode
from resode.analysis import depth_convergence
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least

DOUBLE = torch.float64
T = 2.0
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4}
depths = [32, 64, 128] if FAST else [32, 64, 128, 256]


class Oscillator(nn.Module):
    def __init__(self, a, w):
        super().__init__()
        self.a, self.w = (nn.Parameter(torch.tensor(v, dtype=DOUBLE)) for v in (a, w))

    def forward(self, x):
        turned = torch.stack((-x[:, 1], x[:, 0]), 1)
        return self.a * (1 - x.square().sum(1, keepdim=True)) * x + self.w * turned


class Kinked(nn.Module):
    def forward(self, x):
        return 1 - 2 * torch.relu(x)


def exact(x, a, w):
    """The oscillator's flow, with a and w the integrals of its weights over the time."""
    r2 = x.square().sum(1, keepdim=True)
    c, s = math.cos(w), math.sin(w)
    turned = x @ torch.tensor([[c, s], [-s, c]], dtype=DOUBLE)
    return turned / (r2 + (1 - r2) * math.exp(-2 * a)).sqrt()


generator = torch.Generator().manual_seed(shifted(0))
r, angle = torch.rand(2, 200, generator=generator, dtype=DOUBLE)
x0 = (0.5 + r)[:, None] * torch.stack((torch.cos(6.28 * angle), torch.sin(6.28 * angle)), 1)
negative = -torch.linspace(0.1, 1.5, 2001, dtype=DOUBLE)[:, None]  # crosses 0 at t = −x

# %%
# **Prediction.** The orders above, and the limits: flows in closed form.

weights = [(1.0, 2.0), (0.5, 3.0), (1.5, -1.0), (1.0, 1.0)]  # of a stack that is refined
flow = exact(x0, 1.0 * T, 2.0 * T)
flow_of_stack = x0
for a, w in weights:
    flow_of_stack = exact(flow_of_stack, a * T / 4, w * T / 4)
flow_in_time = exact(x0, T + (1 - math.cos(T)) / 2, 2 * T + math.sin(T))
flow_kinked = (1 - torch.exp(-2 * (T + negative))) / 2

# %%
# **Measurement.** Stacks of growing depth over the same depth time.


def sampled(solver, weights="constant", offset=0.0):
    """Stacks whose block l has the weights a = 1 + sin(t)/2, w = 2 + cos(t) at t = (l + offset)η."""

    def make(depth):
        times = [(block + offset) * T / depth for block in range(depth)]
        fields = [Oscillator(1 + math.sin(t) / 2, 2 + math.cos(t)) for t in times]
        return resode.ResidualStack(fields, solver=solver, step_size=T / depth, weights=weights)

    return depth_convergence(make, x0, depths, reference=flow_in_time)


def shared(field, solver, x, reference):
    def make(depth):
        return resode.ResidualStack(field, depth=depth, solver=solver, step_size=T / depth)

    return depth_convergence(make, x, depths, reference=reference)


def refined(solver):
    stack = resode.ResidualStack([Oscillator(a, w) for a, w in weights], solver=solver, step_size=T / 4)
    return depth_convergence(lambda depth: stack.refine(depth // 4), x0, depths, reference=flow_of_stack)


smooth = {solver: shared(Oscillator(1.0, 2.0), solver, x0, flow) for solver in ORDERS}
finer = {solver: refined(solver) for solver in ORDERS}
lost = {
    "euler, constant": (1, sampled("euler")),
    "rk4, constant": (1, sampled("rk4")),
    "rk4, linear": (2, sampled("rk4", "linear")),
    "rk4, constant, middle": (2, sampled("rk4", offset=0.5)),
}
kinked = {solver: shared(Kinked(), solver, negative, flow_kinked) for solver in ORDERS}

# %%
# **Figure.**

figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained", sharey=True)
panels = (
    ("Shared smooth field", smooth),
    ("Four blocks, refined", finer),
    ("θ(t) sampled block by block", {name: found for name, (_, found) in lost.items()}),
    ("A ReLU field", kinked),
)
for ax, (title, group) in zip(axes, panels, strict=True):
    for name, found in group.items():
        eta = [T / depth for depth in found.depths]
        ax.loglog(eta, found.errors, "o-", label=f"{name}: order {found.order:.2f}")
    ax.set_xscale("log", base=2)
    ax.set(title=title, xlabel="step size η")
    ax.legend(fontsize=8, loc="lower right")
axes[0].set_ylabel("‖x_L − x(T)‖, root mean square")

# %%
# **Verdict.** At these steps the next power of η bends a slope by less than a tenth, or 0.15 where the
# leading term is small (samples in the middle). A ReLU's error depends on where in its step each crossing
# falls, which the mean over 2,001 states leaves at a few hundredths.

for solver, order in ORDERS.items():
    at_least(f"{solver}: order with a shared smooth field", order - 0.1, smooth[solver].order)
    at_least(f"{solver}: order of a refined stack", order - 0.1, finer[solver].order)
for name, (order, found) in lost.items():
    agree(f"{name}: order where θ(t) is sampled", order, found.order, atol=0.15)
agree("rk4: order with a ReLU", 2, kinked["rk4"].order, atol=0.15)
