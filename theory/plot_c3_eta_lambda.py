r"""
C3 · The ηλ constraint
======================

**Claim.** Near a fixed point with Jacobian :math:`J`, one Euler block multiplies the eigenvector of
:math:`\lambda` by :math:`1 + \eta\lambda`. The stack is asymptotically stable there if

.. math:: |1 + \eta\lambda| < 1 \text{ for every } \lambda:\qquad -2 < \eta\lambda < 0 \text{ (real)},\qquad
          \eta < -\frac{2\,\mathrm{Re}\,\lambda}{|\lambda|^2} \text{ (complex)},

and unstable if one factor exceeds 1. Where some :math:`\mathrm{Re}\,\lambda \ge 0`, no positive
:math:`\eta` is stable for Euler. For any Runge–Kutta method the factor is :math:`R(\eta\lambda)`, its
stability function.

**Assumptions.** :math:`F` is differentiable at the fixed point. All else is linear algebra: no normality is
needed for what happens in the end (for what happens before, see C4).

**Not claimed.** That the largest :math:`|\lambda|` decides: :math:`-0.1 \pm i` has modulus 1.005, and Euler
diverges on it from :math:`\eta = 0.198` on, not from :math:`2/|\lambda| = 1.99`. Nor that a nonlinear stack
goes to infinity above the limit: it leaves the fixed point, and can end on a cycle.

**Source.** Hairer & Wanner, *Solving Ordinary Differential Equations II*, 2nd ed. (1996), IV.2; Haber &
Ruthotto, *Stable architectures for deep neural networks*, Inverse Problems 34 (2018).

**The picture** shows real stacks of Euler's and RK4's just below and just above the limit, and the growth of
one step along the real axis for every explicit method, with the predicted edges.
"""

# %%
# **Set-up.** A linear field with eigenvalues −2 and −5 that is not normal, so that only they can decide.

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import resode
from theory.verdict import FAST, agree, at_least, at_most

DOUBLE = torch.float64
EXPLICIT = [name for name, tableau in resode.METHODS.items() if tableau.explicit]
depth = 1000 if FAST else 4000


class Field(nn.Module):
    """F(x) = Jx, or J tanh(x), which has the same Jacobian at 0."""

    def __init__(self, matrix, activation=None):
        super().__init__()
        self.matrix, self.activation = torch.as_tensor(matrix, dtype=DOUBLE), activation or nn.Identity()

    def forward(self, x):
        return self.activation(x) @ self.matrix.T


basis = torch.tensor([[1.0, 0.8], [0.0, 0.6]], dtype=DOUBLE)  # eigenvectors
real = Field(basis @ torch.diag(torch.tensor([-2.0, -5.0], dtype=DOUBLE)) @ torch.linalg.inv(basis))
spiral = Field([[-1.0, 2.0], [-2.0, -1.0]])  # −1 ± 2i
slow = Field([[-0.1, 1.0], [-1.0, -0.1]])  # −0.1 ± i
centre = Field([[0.0, 1.0], [-1.0, 0.0]])  # ± i
saddle = Field([[-1.0, 0.0], [0.0, 0.5]])


def path(field, step_size, solver="euler", start=basis[:, 1]):
    """‖x‖ after each block, from an eigenvector by default."""
    stack = resode.ResidualStack(field, depth=depth, solver=solver, step_size=step_size)
    with torch.no_grad():
        return stack(start[None], return_path=True)[1].flatten(1).norm(dim=1)


# %%
# **Prediction.** From the formulas above. RK4 leaves :math:`|R| \le 1` on the negative real axis at the root
# of :math:`(R(z) - 1)/z = 1 + z/2 + z^2/6 + z^3/24`, −2.785293563405.

roots = np.roots([1 / 24, 1 / 6, 1 / 2, 1])
edge = -float(roots[np.isreal(roots)][0].real)
limits = {"euler": 2 / 5, "rk4": edge / 5}
factors = {"euler": lambda z: 1 + z, "rk4": lambda z: 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24}

# %%
# **Measurement.** The library's limits, and what stacks do one thousandth below and above them.

found = {solver: resode.max_stable_step(real.matrix, solver=solver) for solver in limits}
at_state = resode.max_stable_step(Field(real.matrix, nn.Tanh()), torch.zeros(1, 2, dtype=DOUBLE))
sides = {s: [path(real, c * limit, s) for c in (0.999, 1.001)] for s, limit in limits.items()}

# %%
# For every explicit method: one step of :math:`x' = zx` over unit time, for many z at once. The edge is the
# first z at which the state has grown, narrowed down from grid to grid; no stability function is used.


def growth(method, z):
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    return resode.odeint(lambda t, x: z * x, torch.ones_like(z), t, method=method, n_steps=1)[1].abs()


def measured_edge(method):
    low, high = 0.0, 8.0
    for _ in range(4):
        z = torch.linspace(low, high, 2001, dtype=DOUBLE)[1:]
        first = float(z[growth(method, -z) > 1 + 1e-12][0])
        low, high = first - (high - low) / 2000, first
    return high


edges = {method: measured_edge(method) for method in EXPLICIT}
predicted = {method: 5 * resode.max_stable_step(real.matrix, solver=method) for method in EXPLICIT}
worst = max(abs(edges[m] - predicted[m]) / predicted[m] for m in EXPLICIT)

# %%
# **Figure.**

figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
for ax, (solver, both) in zip(axes, sides.items(), strict=False):
    for norms, side, colour in zip(both, ("below", "above"), ("#0072B2", "#D55E00"), strict=True):
        ax.semilogy(norms, color=colour, label=f"0.1 % {side} η = {limits[solver]:.6g}")
    ax.set(xlabel="block", ylabel="‖x‖", title=f"{solver}: a stack with λ = −2, −5")
    ax.legend()
for method in ("euler", "midpoint", "kutta3", "rk4", "dopri5", "dopri8"):
    z = torch.linspace(0, 6, 400, dtype=DOUBLE)
    [line] = axes[2].plot(-z, growth(method, -z), label=method)
    axes[2].plot(-predicted[method], 1, "o", color=line.get_color())
axes[2].set(
    ylim=(0, 1.6), xlabel="ηλ", ylabel="growth of one step", title="Measured growth, predicted edges (dots)"
)
axes[2].legend(fontsize=8, loc="upper right")

# %%
# **Verdict.** Along an eigenvector block n's state is exactly :math:`|R(\eta\lambda)|^n` times the first one.

for solver, limit in limits.items():
    agree(f"η_max of λ = −2, −5 under {solver} (rounding)", limit, found[solver], rtol=1e-12)
    for side, norms, c in zip(("below", "above"), sides[solver], (0.999, 1.001), strict=True):
        law = depth * math.log(abs(factors[solver](-5 * c * limit)))
        measured = math.log(float(norms[-1] / norms[0]))
        agree(f"{solver} 0.1 % {side}: ln ‖x_L‖/‖x_0‖ (rounding)", law, measured, rtol=1e-8)
        if side == "below":
            at_most(f"{solver} 0.1 % below converges: ‖x_L‖/‖x_0‖", 0.2, float(norms[-1] / norms[0]))
        else:
            at_least(f"{solver} 0.1 % above diverges: ‖x_L‖/‖x_0‖", 5.0, float(norms[-1] / norms[0]))
agree("η_max of a field at a state, without its matrix", 2 / 5, float(at_state[0]), rtol=1e-6)
at_most(f"edge of {len(EXPLICIT)} explicit methods: worst relative error (grid)", 1e-8, worst)
agree("η_max of −1 ± 2i under Euler: 2/5", 2 * 1 / 5, resode.max_stable_step(spiral.matrix), rtol=1e-12)
agree("η_max of −0.1 ± i under Euler: 0.2/1.01", 0.2 / 1.01, resode.max_stable_step(slow.matrix), rtol=1e-12)
for name, field, eta in (("−1 ± 2i", spiral, 2 / 5), ("−0.1 ± i", slow, 0.2 / 1.01)):
    below, above = (float(path(field, c * eta)[-1]) for c in (0.99, 1.01))
    at_most(f"{name}, Euler's stack 1 % below: ‖x_L‖/‖x_0‖", 0.99, below)
    at_least(f"{name}, Euler's stack 1 % above: ‖x_L‖/‖x_0‖", 1.01, above)
agree("η_max of ± i under Euler", 0.0, resode.max_stable_step(centre.matrix))
agree(
    "η_max of ± i under RK4: √8",
    math.sqrt(8),
    resode.max_stable_step(centre.matrix, solver="rk4"),
    rtol=1e-12,
)
agree("η_max where one λ is 0.5, under RK4", 0.0, resode.max_stable_step(saddle.matrix, solver="rk4"))
half = math.log(float(path(slow, 0.5)[-1])) / depth
agree(
    "−0.1 ± i at η = 0.5 < 2/|λ|: growth of ln ‖x‖ a block", math.log(math.hypot(0.95, 0.5)), half, rtol=1e-9
)
beyond = path(Field(real.matrix, nn.Tanh()), 1.1 * 2 / 5)
at_least("J tanh(x) 10 % above leaves 0: ‖x_L‖", 0.1, float(beyond[-1]))
at_most("but stays bounded, on a cycle: ‖x_L‖", 10.0, float(beyond[-1]))
