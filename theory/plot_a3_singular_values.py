r"""
A3 · Singular values
====================

**Claim.** If :math:`\|W\|_2 \le \varepsilon`, every singular value of :math:`I + W` lies within ε of 1, and
the eigenvalues of :math:`I + W` are those of W, shifted by 1:

.. math:: |\sigma_i(I + W) - 1| \le \|W\|_2, \qquad \lambda_i(I + W) = 1 + \lambda_i(W).

The first is Weyl's inequality; :math:`W = \pm\varepsilon I` attains it at both ends.

**Assumptions.** None beyond a square W: no symmetry, no normality.

**Not claimed.** The popular form takes the spectral radius :math:`\rho(W)` for the norm, and is wrong: for
:math:`W = \begin{pmatrix}0&a\\0&0\end{pmatrix}` ρ = 0, yet the singular values are
:math:`\sqrt{1 + a^2/4} \pm a/2`. The eigenvalues of a non-normal block say little about how it stretches.
Nor does torch's ``spectral_norm`` of a convolution give ε: it takes the norm of the kernel as a matrix, which
is another number than that of the operator.

**Source.** Weyl 1912; Horn & Johnson, *Matrix Analysis*, 2nd ed. 2013, corollary 7.3.5.

The picture shows all singular values of random and of adversarial blocks between the bounds.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from resode.analysis import bound_operator_norm
from theory.measures.gains import block_gains
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

n, tries, ascent, pixels = (8, 10, 150, 6) if FAST else (24, 60, 600, 10)
epsilon, a = 0.3, 10.0
torch.manual_seed(shifted(0))
F64 = torch.float64


def gains(matrix):
    """What the block x + Wx does; the state does not matter, because F is linear."""
    return block_gains(lambda x: x @ matrix.T, torch.ones(1, len(matrix), dtype=F64))


def scaled(matrix):
    """The matrix with the norm ε."""
    return epsilon * matrix / torch.linalg.matrix_norm(matrix, 2)


# %%
# Prediction: singular values by hand
# -----------------------------------
# All lie in [1 − ε, 1 + ε]. An antisymmetric W of norm ε has the eigenvalue iε, and I + W the singular value
# :math:`\sqrt{1 + \varepsilon^2}`; the nilpotent one those of the claim. A 3×3 kernel of ones, divided by its
# norm 3 as ``spectral_norm`` does, is on m×m pixels an operator of norm
# :math:`(1 + 2\cos(\pi/(m+1)))^2 / 3`, the product of two one-dimensional ones.

turning = math.hypot(1, epsilon)
root = math.sqrt(1 + a**2 / 4)
kernel_norm = (1 + 2 * math.cos(math.pi / (pixels + 1))) ** 2 / 3

# %%
# Measurement: random and structured W, all of norm ε
# ---------------------------------------------------
# Dense, orthogonal, antisymmetric and nilpotent ones, and ±εI, which attain the bounds.

normal = [torch.randn(n, n, dtype=F64) for _ in range(tries)]
families = {
    "random": [scaled(w) for w in normal],
    "orthogonal": [epsilon * torch.linalg.qr(w).Q for w in normal],
    "antisymmetric": [scaled(w - w.T) for w in normal],
    "nilpotent": [scaled(w.triu(1)) for w in normal],
    "+εI": [epsilon * torch.eye(n, dtype=F64)],
    "−εI": [-epsilon * torch.eye(n, dtype=F64)],
}

# %%
# An adversary
# ------------
# Gradient ascent on :math:`\sigma_{max} - \sigma_{min}` over all W of norm ε: it may come close to
# :math:`2\varepsilon`, and never past it.

free = torch.randn(n, n, dtype=F64, requires_grad=True)
adam = torch.optim.Adam([free], lr=0.05)
for _ in range(ascent):
    sigma = torch.linalg.svdvals(torch.eye(n, dtype=F64) + scaled(free))
    adam.zero_grad()
    (sigma[-1] - sigma[0]).backward()
    adam.step()
families["adversary"] = [scaled(free.detach())]

found = {name: [gains(w) for w in matrices] for name, matrices in families.items()}
spread = {name: torch.cat([g.singular_values[0] for g in all_]) for name, all_ in found.items()}

# %%
# Eigenvalues: W with a known spectrum, far from normal
# -----------------------------------------------------
# Pairs x ± iy in a random, not orthogonal basis; those of I + W must be 1 + x ± iy.

x, y = torch.linspace(-1, 1, n // 2, dtype=F64), torch.linspace(0.2, 2, n // 2, dtype=F64)
pairs = [torch.tensor([[u, -v], [v, u]], dtype=F64) for u, v in zip(x, y, strict=True)]
basis = torch.eye(n, dtype=F64) + normal[0].triu(1) / 4
shifted = gains(basis @ torch.block_diag(*pairs) @ torch.linalg.inv(basis)).eigenvalues[0]
upper_half = shifted[shifted.imag > 0]
upper_half = upper_half[upper_half.real.argsort()]
eigenvalue_error = (upper_half - (1 + torch.complex(x, y))).abs().max()

# %%
# The spectral radius bounds nothing; nor does the norm of a kernel
# -----------------------------------------------------------------

nilpotent = gains(torch.tensor([[0.0, a], [0.0, 0.0]], dtype=F64))
ones = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
nn.init.ones_(ones.weight)
kernel = block_gains(spectral_norm(ones).eval(), torch.ones(1, 1, pixels, pixels, dtype=F64))

conv = nn.Conv2d(2, 2, 3, padding=1, bias=False).double()
bounded = bound_operator_norm(conv, (2, pixels, pixels), bound=epsilon).eval()
image = block_gains(bounded, torch.ones(1, 2, pixels, pixels, dtype=F64))
spread["convolution"] = image.singular_values[0]

# %%
# Figure
# ------

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(2, 1))
for row, values in enumerate(spread.values()):
    left.plot(values, torch.full_like(values, row), "|", ms=14)
left.axvspan(1 - epsilon, 1 + epsilon, alpha=0.15, label="[1 − ε, 1 + ε]")
left.set(yticks=range(len(spread)), yticklabels=list(spread), xlabel="singular values of I + W")
left.set_title(f"‖W‖₂ = ε = {epsilon}: all within ε of 1")
left.set_ylim(-1.4, len(spread) - 0.4)
left.legend(loc="lower left")
sizes = torch.linspace(0, a, 50, dtype=F64)
for sign in (1, -1):
    right.plot(sizes, (1 + sizes**2 / 4).sqrt() + sign * sizes / 2, "k-", lw=1)
right.plot([a, a], nilpotent.singular_values[0], "o", label="measured")
right.axhline(1, ls="--", color="tab:red", label="what ρ = 0 would allow")
right.set(yscale="log", xlabel="a", ylabel="singular values", title="W = [[0, a], [0, 0]], ρ(W) = 0")
right.set_ylim(0.07, 60)
right.legend(loc="upper left")

# %%
# Verdict
# -------
# Singular values in float64 carry some n machine ε, about 1e-14. The adversary climbs by first-order steps,
# so a few per cent of 2ε may be missing.

for name, all_ in found.items():
    worst = max(float((g.singular_values - 1).abs().max()) for g in all_)
    at_most(f"{name}: largest |σ − 1|, ε", epsilon + 1e-13, worst)
for name, sign in (("+εI", 1), ("−εI", -1)):
    agree(f"{name}: every σ", 1 + sign * epsilon, spread[name].min(), atol=1e-14)
    agree("  and the largest", 1 + sign * epsilon, spread[name].max(), atol=1e-14)
reached = spread["adversary"].max() - spread["adversary"].min()
at_least("adversary: σ_max − σ_min, 95 % of 2ε", 0.95 * 2 * epsilon, reached)
agree("antisymmetric: largest σ, √(1 + ε²)", turning, spread["antisymmetric"].max(), rtol=1e-13)
agree("eigenvalues of I + W less 1 + λ(W)", 0, eigenvalue_error, atol=1e-10)
at_most("nilpotent: spectral radius", 0, nilpotent.radius)
agree("  largest σ, √(1 + a²/4) + a/2, not 1", root + a / 2, nilpotent.singular_values.max(), rtol=1e-12)
agree("  smallest σ, √(1 + a²/4) − a/2, not 1", root - a / 2, nilpotent.singular_values.min(), rtol=1e-12)
agree("spectral_norm of a kernel: true ‖W‖, not 1", kernel_norm, kernel.norm, rtol=1e-6)
at_most(
    "bounded convolution: largest |σ − 1|, ε", epsilon * (1 + 1e-6), (image.singular_values - 1).abs().max()
)
