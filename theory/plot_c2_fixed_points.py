r"""
C2 · Fixed points
=================

**Claim.** Where :math:`F(x^*) = 0`, every later block leaves the state alone, whatever the solver:

.. math:: F(x^*) = 0 \;\Rightarrow\; x^* + \eta \sum_i b_i k_i = x^*, \qquad
          \text{because every stage is } k_i = F(x^*) = 0 .

The converse holds for Euler, where :math:`x + \eta F(x) = x` says :math:`F(x) = 0`. It does **not** hold
for methods of several stages, whose stages can cancel: such a fixed point of the stack is no rest of the
field, and is called spurious.

**Assumptions.** The field is the same in all later blocks. In the page's counterexample,
:math:`F = x(1 - x)`, the midpoint method rests where :math:`F(x + \tfrac\eta2 F(x)) = 0`: at the zeros 0
and 1, and also at :math:`2/\eta` and :math:`1 + 2/\eta`.

**Not claimed.** That a fixed point is approached (that is C3), or that these searches find all there are.
The popular form "the network's fixed points are the field's" fails in practice, not only on paper: at
:math:`\eta = 2.5` the spurious point 0.8 is stable under midpoint, its multiplier being
:math:`1 + \eta - \eta^2/2 = 0.375`. A deep stack ends there, where :math:`F = 0.16`.

**Source.** Iserles, Peplow & Stuart, *A unified approach to spurious solutions introduced by time
discretisation*, SIAM J. Numer. Anal. 28 (1991).

**The picture** shows a trajectory that stops at a fixed point of a two-layer field under every solver, where
midpoint's map on :math:`x(1 - x)` rests, by step size, and deep stacks that end at a spurious point.
"""

# %%
# **Set-up.** A two-layer field on eight numbers with some damping, and the logistic one.

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import resode
from resode.fields import MLPField
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

DOUBLE = torch.float64
EXPLICIT = [name for name, tableau in resode.METHODS.items() if tableau.explicit]
ETA, RK4_ETA = 2.5, 3.0
DEPTH = 20 if FAST else 100


class Damped(nn.Module):
    """F(x) = f(x)/2 − x, with f a two-layer network: few modes outgrow the damping."""

    def __init__(self, width):
        super().__init__()
        self.inner = MLPField(width, activation="tanh").double()

    def forward(self, x):
        return self.inner(x) / 2 - x


class Logistic(nn.Module):
    def forward(self, x):
        return x * (1 - x)


torch.manual_seed(shifted(0))
field, logistic = Damped(8), Logistic()
nn.init.normal_(field.inner.fc1.bias, std=0.3)
start = 2 * torch.randn(10, 8, dtype=DOUBLE)
line = torch.tensor([0.2, 0.3, 0.5, 1.2, 1.4], dtype=DOUBLE)[:, None]

# %%
# **Prediction.** Zero change; 0, 1, 2/η and 1 + 2/η for midpoint. For RK4 the rests are the real roots of a
# polynomial of degree 16, the map composed with numpy's polynomials.

midpoint_rests = sorted([0.0, 1.0, 2 / ETA, 1 + 2 / ETA])
h, x = RK4_ETA, np.polynomial.Polynomial([0.0, 1.0])
k1 = x * (1 - x)
k2 = (x + h / 2 * k1) * (1 - x - h / 2 * k1)
k3 = (x + h / 2 * k2) * (1 - x - h / 2 * k2)
k4 = (x + h * k3) * (1 - x - h * k3)
roots = (k1 + 2 * k2 + 2 * k3 + k4).roots()
rk4_rests = np.sort(roots[np.abs(roots.imag) < 1e-6].real)

# %%
# **Measurement.** Rests of the field by Newton's method; one block from each, and many from those that
# are stable (elsewhere rounding grows, see C3), under every explicit solver; then the rests of the solvers'
# maps, by deflation.

found = resode.find_fixed_points(field, start)
rest = found.points[found.converged].detach()
stable = rest[resode.classify(field, rest, solver="euler", step_size=0.2).solver_stable]


def stack(field, solver, step_size, depth=100):
    return resode.ResidualStack(field, depth=depth, solver=solver, step_size=step_size)


def change(solver, x, depth):
    """The largest change of an entry over so many blocks of η = 0.2."""
    with torch.no_grad():
        return float((stack(field, solver, 0.2, depth)(x) - x).abs().max())


one_block = {solver: change(solver, rest, 1) for solver in EXPLICIT}
many = {solver: change(solver, stable[:4], DEPTH) for solver in EXPLICIT}


def rests(solver, step_size):
    """Fixed points of the solver's map on x(1 − x), in order, and which of them are spurious."""
    options = {"solver": solver, "step_size": step_size, "attempts": 1}
    found = resode.find_several_fixed_points(logistic, line[2:4], **options)
    order = found.points[:, 0].argsort()
    return found.points[order, 0].tolist(), found.spurious[order].tolist()


by_solver = {"euler": rests("euler", ETA), "midpoint": rests("midpoint", ETA), "rk4": rests("rk4", RK4_ETA)}
spurious = torch.tensor([[2 / ETA]], dtype=DOUBLE)
kind = resode.classify(logistic, spurious, solver="midpoint", step_size=ETA)
with torch.no_grad():
    ends, paths = stack(logistic, "midpoint", ETA)(0.72 + 0.04 * line, return_path=True)
print(kind)

# %%
# **Figure.**

figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
with torch.no_grad():
    for solver in ("euler", "midpoint", "rk4"):
        for x0, style in ((start[:1], "-"), (rest[:1], ":")):
            states = stack(field, solver, 0.5)(x0, return_path=True)[1]
            away = (states - states[-1]).flatten(1).norm(dim=1) + 1e-17
            axes[0].semilogy(away, style, label=f"{solver}, from {'x*' if style == ':' else 'elsewhere'}")
axes[0].set(
    xlabel="block", ylabel="distance from the last state", title="A two-layer field under three solvers"
)
axes[0].legend(fontsize=7)
steps, many_starts = (
    np.linspace(0.8, 4, 3 if FAST else 24),
    torch.linspace(-0.5, 4, 12, dtype=DOUBLE)[:, None],
)
for step in steps:
    of_map = resode.find_fixed_points(logistic, many_starts, solver="midpoint", step_size=float(step))
    for odd, style in ((False, "o"), (True, "x")):
        points = of_map.points[of_map.converged & (of_map.spurious == odd), 0]
        axes[1].plot([step] * len(points), points, style, color="#D55E00" if odd else "#0072B2", markersize=5)
fine = np.linspace(0.8, 4, 100)
axes[1].plot(fine, 2 / fine, ":", fine, 1 + 2 / fine, ":", color="#D55E00")
axes[1].set(xlabel="step size η", ylabel="x", title="Midpoint's rests on x(1 − x): zeros (o), spurious (x)")
axes[2].plot(paths[:25, :, 0], color="#0072B2", linewidth=0.8)
axes[2].axhline(2 / ETA, color="#D55E00", linestyle=":", label="2/η = 0.8, where F = 0.16")
axes[2].axhline(1, color="black", linestyle=":", label="1, where F = 0")
axes[2].set(xlabel="block", ylabel="x", title=f"Midpoint stacks at η = {ETA:g}")
axes[2].legend()

# %%
# **Verdict.** A residual of 1e-15 moves a state by no more in a block; 1e-12 leaves room for other machines.

at_least(f"starts that found a fixed point, of {len(start)}", 5, int(found.converged.sum()))
at_most("residual ‖F(x*)‖₂ there (float64)", 1e-10, float(found.residual[found.converged].max()))
at_most(f"change by one block at x*, worst of {len(EXPLICIT)} solvers", 1e-12, max(one_block.values()))
at_least("rests that are stable for Euler", 1, len(stable))
at_most(f"change over {DEPTH} blocks there, worst of all solvers", 1e-12, max(many.values()))
for solver, wanted, extra in (
    ("euler", [0.0, 1.0], 0),
    ("midpoint", midpoint_rests, 2),
    ("rk4", rk4_rests, 2),
):
    points, odd = by_solver[solver]
    agree(f"{solver}: rests on x(1 − x)", len(wanted), len(points))
    agree(f"{solver}: how many of them are spurious", extra, sum(odd))
    for value, point, is_odd in zip(wanted, points, odd, strict=True):
        agree(f"{solver}: the {'spurious' if is_odd else 'true'} rest", value, point, atol=1e-7)
agree("midpoint's multiplier at 2/η (float64)", 1 + ETA - ETA**2 / 2, float(kind.growth[0]), atol=1e-9)
agree("where midpoint's stacks end", 2 / ETA, float(ends.mean()), atol=1e-9)
at_least("and |F| there, no rest of the field", 0.159, float(logistic(ends).abs().min()))
