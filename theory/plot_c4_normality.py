r"""
C4 · Normality
==============

**Claim.** For a non-normal :math:`J`, eigenvalues inside the stability region do not stop transient growth:
:math:`\|R(\eta J)^n\|_2` can rise before it decays. Two quantities bound it, the logarithmic norm
:math:`\mu_2 = \lambda_{\max}((J + J^T)/2)` and the contraction limit:

.. math:: \|e^{tJ}\|_2 \le e^{t\mu_2}, \qquad
          \|(I + \eta J)^n\|_2 \le (1 + 2\eta\mu_2 + \eta^2\|J\|_2^2)^{n/2}, \qquad
          \|R(\eta J)\|_2 \le 1 \Rightarrow \|R(\eta J)^n\|_2 \le 1 .

From below, no peak is under the Kreiss constant
:math:`K = \sup_{|z| > 1} (|z| - 1)\|(zI - R(\eta J))^{-1}\|_2`, and from above none exceeds :math:`e\,m K`
for m × m matrices.

**Assumptions.** The Jacobian is the same in all blocks (linear, or close to a fixed point).

**Not claimed.** The popular form, "spectral radius below 1, so perturbations shrink": for the 2×2 example
they grow 2.8-fold first, at a tenth of the step limit. Nor that a positive :math:`\mu_2` means growth in the
end.

**Source.** Dahlquist (1958); Trefethen & Embree, *Spectra and Pseudospectra* (2005), chapters 14 and 18;
Hairer, Nørsett & Wanner, *Solving Ordinary Differential Equations I*, I.10.

**The picture** shows the growth and its bounds for two matrices, and for a block trained on digits.
"""

# %%
# **Set-up.** Two 2×2 Jacobians with eigenvalues −1 and −2, one far from normal and one near; and a
# network with antisymmetric, damped blocks, whose eigenvalues all have Re λ ≤ 0 whatever it learns, trained
# on digits.

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import resode
from resode.analysis import contraction_step, jacobian, logarithmic_norm, transient_growth
from resode.fields import AntisymmetricField
from resode.training.data.datasets import load_data
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

far, near = np.array([[-1.0, 10.0], [0.0, -2.0]]), np.array([[-1.0, 1.0], [0.0, -2.0]])
eta, n_steps = 0.1, 60


class Linear(nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.matrix = torch.as_tensor(matrix)

    def forward(self, x):
        return x @ self.matrix.T


data = load_data("digits")
x, y = (data.train_images.flatten(1).float() / 255 - 0.3) * 0.3, data.train_labels
torch.manual_seed(shifted(0))
stack = resode.ResidualStack([AntisymmetricField(16, gamma=0.5) for _ in range(4)], step_size=0.5)
network = nn.Sequential(nn.Linear(64, 16), stack, nn.Linear(16, 10))
optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
for _ in range(3 if FAST else 5):
    for rows in torch.randperm(len(x)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
network.eval()
accuracy = float((network(x).argmax(1) == y).double().mean())

# %%
# **Prediction.** The powers of a triangular 2×2 matrix and their norms in closed form;
# :math:`\mu_2 = -3/2 + \sqrt{1/4 + 25}`; the contraction limit of the second matrix, where
# :math:`\det(J + J^T + \eta J^T J) = 7 - 12\eta + 4\eta^2` first vanishes, :math:`3/2 - \sqrt2/2`, below the
# step limit 1 of its eigenvalues.

n = np.arange(n_steps + 1)
a, b = (1 - eta) ** n, (1 - 2 * eta) ** n
squares, determinant = a**2 + b**2 + (10 * (a - b)) ** 2, a * b
norms = np.sqrt((squares + np.sqrt(squares**2 - 4 * determinant**2)) / 2)


def kreiss(step):
    """A lower bound of K: (|z| − 1)‖(zI − step)⁻¹‖₂ on a grid outside the unit circle."""
    radius, angle = np.meshgrid(1 + np.geomspace(1e-3, 3, 60), np.linspace(0, np.pi, 60))
    z = radius * np.exp(1j * angle)
    smallest = np.linalg.svd(z[..., None, None] * np.eye(len(step)) - step, compute_uv=False)[..., -1]
    return float(((radius - 1) / smallest).max())


# %%
# **Measurement.** The library's figures for the matrices; a real stack that starts along the direction that
# grows most; and the trained blocks' Jacobians at the states of 20 digits.

growth = transient_growth(far, eta, n_steps=n_steps)
worst_start = np.linalg.svd(np.linalg.matrix_power(np.eye(2) + eta * far, growth.peak_step))[2][0]
linear = resode.ResidualStack(Linear(far), depth=n_steps, step_size=eta)
with torch.no_grad():
    path = linear(torch.as_tensor(worst_start)[None], return_path=True)[1].flatten(1).norm(dim=1).numpy()
mu, size = logarithmic_norm(far), np.linalg.norm(far, 2)
euler_bound = (1 + 2 * eta * mu + (eta * size) ** 2) ** (n / 2)
times = torch.linspace(0, 6, 61, dtype=torch.float64)
flow = torch.linalg.matrix_norm(
    torch.linalg.matrix_exp(times[:, None, None] * torch.as_tensor(far)), 2
).numpy()

limit = contraction_step(near)
either_side = [float(np.max(transient_growth(near, c * limit).norms[1:])) for c in (0.999, 1.01)]

# %%
# Of the trained blocks' Jacobians whose modes all decay the one that grows most, at half of its step limit.

with torch.no_grad():
    states = stack(network[0](x[:20]), return_path=True)[1]
jacobians = torch.cat([jacobian(stack.field(i), states[i]) for i in range(stack.depth)]).double()
rightmost = torch.linalg.eigvals(jacobians).real.amax(1)
jacobians, rightmost = jacobians[rightmost < -0.02], rightmost[rightmost < -0.02]
halves = resode.max_stable_step(jacobians) / 2
grown = [transient_growth(J, float(h), n_steps=300) for J, h in zip(jacobians, halves, strict=True)]
most = int(np.argmax([float(g.peak) for g in grown]))
J, half, block = jacobians[most].numpy(), float(halves[most]), grown[most]
step = np.eye(16) + half * J
block_norms = np.asarray(block.norms)
mu_block, size_block = float(np.linalg.eigvalsh((J + J.T) / 2)[-1]), np.linalg.norm(J, 2)
block_bound = (1 + 2 * half * mu_block + (half * size_block) ** 2) ** (np.arange(301) / 2)

# %%
# **Figure.**

figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
axes[0].plot(n, norms, color="#0072B2", label="‖(I + ηJ)ⁿ‖, closed form")
axes[0].plot(n, path, ".", color="#D55E00", label="‖x_n‖ of a real stack")
axes[0].plot(n[:12], euler_bound[:12], "--", color="#009E73", label="bound by μ₂ and ‖J‖")
axes[0].axhline(kreiss(np.eye(2) + eta * far), color="black", linestyle=":", label="Kreiss constant")
axes[0].set(xlabel="block n", ylim=(0, 6), title="λ = −1, −2, far from normal, η = 0.1")
for c, colour in ((0.7, "#0072B2"), (1.0, "#009E73"), (1.2, "#D55E00")):
    axes[1].plot(
        transient_growth(near, c * limit, n_steps=20).norms, "o-", color=colour, label=f"{c:g} of the limit"
    )
axes[1].axhline(1, color="black", linewidth=0.6)
axes[1].set(xlabel="block n", title=f"λ = −1, −2, contraction limit {limit:.4f}")
axes[2].plot(block_norms[:100], color="#0072B2", label="‖(I + ηJ)ⁿ‖")
axes[2].plot(block_bound[:100], "--", color="#009E73", label="bound by μ₂ and ‖J‖")
axes[2].axhline(kreiss(step), color="black", linestyle=":", label="Kreiss constant")
axes[2].set(
    xlabel="block n", ylim=(0, 1.5 * block_norms.max()), title="A trained block at half its step limit"
)
for ax in axes:
    ax.legend(fontsize=8)

# %%
# **Verdict.**

agree("step limit of the eigenvalues −1, −2", 1.0, resode.max_stable_step(far), rtol=1e-12)
agree("μ₂ of the 2×2 example", -1.5 + math.sqrt(0.25 + 25), mu, rtol=1e-12)
agree("its peak at a tenth of the limit", norms.max(), growth.peak, rtol=1e-12)
agree("the block where it peaks", int(norms.argmax()), growth.peak_step)
agree("peak of a real stack's state", norms.max(), path.max(), rtol=1e-12)
at_least("that peak is growth", 2.5, path.max())
at_most(
    "‖exp(tJ)‖ over exp(tμ₂), worst (rounding)", 1 + 1e-12, float((flow / np.exp(mu * times.numpy())).max())
)
at_most("‖(I + ηJ)ⁿ‖ over its bound, worst (rounding)", 1 + 1e-12, float((growth.norms / euler_bound).max()))
at_least("peak, from below by Kreiss", kreiss(np.eye(2) + eta * far), growth.peak)
at_most("peak, from above by 2eK", 2 * math.e * kreiss(np.eye(2) + eta * far), growth.peak)
agree("contraction limit of the second", 1.5 - math.sqrt(0.5), limit, rtol=1e-9)
at_most("largest norm 0.1 % below it", 1.0, either_side[0])
at_least("largest norm 1 % above it, with the eigenvalues inside", 1 + 1e-4, either_side[1])
at_least("trained network: accuracy on its images", 0.7, accuracy)
agree("μ₂ of the block that grows most", mu_block, float(logarithmic_norm(J)), rtol=1e-9)
at_least("its μ₂ minus its largest Re λ", 1e-3, mu_block - float(rightmost[most]))
at_least("its peak at half its step limit", 1.5, float(block.peak))
at_most("‖(I + ηJ)ⁿ‖ over its bound, worst (rounding)", 1 + 1e-9, float((block_norms / block_bound).max()))
at_least("its peak, from below by Kreiss", kreiss(step), float(block.peak))
at_most("its peak, from above by 16eK", 16 * math.e * kreiss(step), float(block.peak))
radius = float(np.abs(np.linalg.eigvals(step)).max())
# Up to half of a mode's limit h|λ|² ≤ −Re λ, so that |1 + hλ|² ≤ 1 + h Re λ.
bound = math.sqrt(1 + half * float(rightmost[most]))
at_most("though its step's spectral radius is below 1: √(1 + h·max Re λ)", bound * (1 + 1e-9), radius)
