r"""
C10 · Products of mixing matrices
=================================

**Claim.** A network whose state is n streams, :math:`y_i = \sum_j A_{ij} x_j + \beta_i F(u)`, passes
its first state on, beside all branches, as :math:`\prod A_l\, x_0`. With unconstrained matrices near
the identity this grows or dies exponentially in the depth: for :math:`A = I + \sigma G`, G with
independent standard normal entries, at the mean rate

.. math:: \lambda = \tfrac12\, \mathrm{E} \ln\bigl((1 + \sigma g)^2 + \sigma^2 \chi^2_{n-1}\bigr)
   \approx \tfrac{n-2}{2}\, \sigma^2

a block, positive from three streams on and negative for one. Where every A is doubly stochastic, the
norm of the product is 1 at any depth, because :math:`\|A\|_2 \le 1` and :math:`A \mathbb{1} =
\mathbb{1}`. That holds as far as the sums do: matrices whose rows alone sum to 1 have a product that tends to
:math:`\mathbb{1} \pi^T`, of norm :math:`\sqrt n\, \|\pi\|_2 > 1`.

**Assumptions.** Matrices of different blocks are independent, in the first part; any doubly stochastic
matrices in the second; the same matrix in every block in the third.

**Not claimed.** That the constraint helps training. It bounds what passes beside the branches, and
nothing of what they add. Nor that no stream is lost: a product of doubly stochastic matrices tends to
the mean of all streams, so the n streams hold the same after a while.

**Source.** Zhu et al., *Hyper-Connections* (2024), arXiv:2409.19606; Xie et al., *mHC* (2025),
arXiv:2512.24880; Sinkhorn & Knopp (1967). The rate is Furstenberg's exponent of isotropic factors.

**The picture** shows the norm of the product against the depth for free and for doubly stochastic
matrices, how one and four streams spread, and what twenty sweeps of Sinkhorn and Knopp leave of a
column sum.
"""

# %%
# **Set-up.** A thousand blocks, σ = 1/10.

import math

import matplotlib.pyplot as plt
import torch
from scipy import integrate, stats
from torch import nn

from resode.analysis import map_limit, stream_mixing
from resode.shortcuts import HyperConnection, doubly_stochastic
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

depth, sigma = 1000, 0.1
draws = 100 if FAST else 400
generator = torch.Generator().manual_seed(shifted(0))


def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# %%
# **Prediction.** The rate by quadrature, for one and for four streams; its standard deviation a block is that
# of the same logarithm.


def moments(n):
    """Mean and variance of ln‖Ax‖/‖x‖ for A = I + σG."""

    def value(g, c):
        return 0.5 * math.log((1 + sigma * g) ** 2 + sigma**2 * c)

    def mean(power):
        if n == 1:
            return integrate.quad(lambda g: value(g, 0.0) ** power * stats.norm.pdf(g), -8, 8, limit=200)[0]
        inner = stats.chi2(n - 1)
        grid = inner.ppf((torch.arange(200).double().numpy() + 0.5) / 200)  # midpoints of equal shares
        return sum(
            integrate.quad(lambda g, c=c: value(g, c) ** power * stats.norm.pdf(g), -8, 8)[0] for c in grid
        ) / len(grid)

    first = mean(1)
    return first, mean(2) - first**2


predicted = {n: moments(n) for n in (1, 4)}

# %%
# **Measurement.** ln‖∏A x‖ of many draws.

paths = {}
for n in (1, 4):
    x = normal(draws, n, 1)
    x = x / x.norm(dim=1, keepdim=True)
    logs = torch.zeros(draws, dtype=torch.float64)
    kept = []
    for _ in range(depth):
        x = x + sigma * normal(draws, n, n) @ x
        size = x.norm(dim=1, keepdim=True)
        logs = logs + size.flatten().log()
        x = x / size
        kept.append(logs)
    paths[n] = torch.stack(kept)

# %%
# Doubly stochastic matrices of random logits, wide apart, and a network of blocks that has them.

product = torch.eye(4, dtype=torch.float64)
norms = []
for _ in range(depth):
    product = doubly_stochastic(3 * normal(4, 4)) @ product
    norms.append(float(torch.linalg.matrix_norm(product, 2)))

torch.manual_seed(shifted(1))
blocks = [HyperConnection(nn.Linear(8, 8), 4, manifold=True) for _ in range(50 if FAST else 200)]
for block in blocks:
    nn.init.normal_(block.mix, std=3)
    nn.init.normal_(block.branch.weight, std=0.03)
profile = stream_mixing(nn.Sequential(*blocks), torch.randn(2, 4, 8))
whole = torch.linalg.matrix_power(profile.products()[-1], depth // len(blocks))

# %%
# Twenty sweeps, rows last, in every block the same matrix: of slowly converging logits.

logits = torch.tensor([[0.0, 0, -9, -9], [0, 0, -9, -9], [0, 0, 0, -9], [0, 0, 0, 0]], dtype=torch.float64)
swept = logits.exp()
for _ in range(20):
    swept = swept / swept.sum(0, keepdim=True)
    swept = swept / swept.sum(1, keepdim=True)
values, vectors = torch.linalg.eig(swept.T)
pi = vectors[:, (values - 1).abs().argmin()].real
pi = pi / pi.sum()
power = torch.linalg.matrix_power(swept, 100 * depth)
exact = doubly_stochastic(logits)

# %%
# **Figure.**

figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
layers = range(1, depth + 1)
for n, colour in ((1, "C0"), (4, "C1")):
    axes[0].plot(layers, paths[n].mean(1), color=colour, label=f"free, {n} stream{'s' * (n > 1)}")
    axes[0].plot(layers, [predicted[n][0] * layer for layer in layers], ":", color="black")
axes[0].plot(layers, [math.log(v) for v in norms], color="C2", label="doubly stochastic, 4 streams")
axes[0].set(xlabel="blocks", ylabel="ln of the norm (mean)", title="Product of A (dotted: predicted)")
axes[0].legend(fontsize=8)
axes[1].hist([paths[n][-1].numpy() for n in (1, 4)], bins=30, label=["1 stream", "4 streams"])
axes[1].set(xlabel=f"ln‖∏A x‖ after {depth} blocks", ylabel="draws", title="Free matrices")
axes[1].legend(fontsize=8)
axes[2].bar([i - 0.2 for i in range(4)], swept.sum(0).numpy(), 0.4, label="20 sweeps")
axes[2].bar([i + 0.2 for i in range(4)], exact.sum(0).numpy(), 0.4, label="to 1e-6")
axes[2].axhline(1, color="black", linewidth=0.8)
axes[2].set(xlabel="column", ylabel="sum", title="Slowly converging logits")
axes[2].legend(fontsize=8)

# %%
# **Verdict.** Four standard errors of the mean for the rates; 1e-3 for the norm.

for n in (1, 4):
    rate, variance = predicted[n]
    error = 4 * math.sqrt(depth * variance / draws)
    agree(
        f"mean ln‖∏A x‖, {n} stream(s), {depth} blocks", depth * rate, float(paths[n][-1].mean()), atol=error
    )
at_most("one stream dies: mean ln of its norm", -3.0, float(paths[1][-1].mean()))
at_least("four grow: mean ln of their norm", 7.0, float(paths[4][-1].mean()))
agree(f"norm of the product of {depth} doubly stochastic matrices", 1.0, norms[-1], atol=1e-3)
agree("its least norm on the way", 1.0, min(norms), atol=1e-3)
agree(
    f"the same of a network's blocks, {depth} of them",
    1.0,
    float(torch.linalg.matrix_norm(whole, 2).max()),
    atol=1e-3,
)
at_most("worst row or column sum of its blocks, less 1", 1e-6, max(*profile.row_error, *profile.column_error))
at_least("twenty sweeps: worst column sum, less 1", 0.02, float((swept.sum(0) - 1).abs().max()))
agree(
    "norm of the power of a swept matrix, √n‖π‖",
    2 * float(pi.norm()),
    float(torch.linalg.matrix_norm(power, 2)),
    rtol=1e-3,
)
agree("‖A‖₂ of the exact one", 1.0, float(torch.linalg.matrix_norm(exact, 2)), atol=1e-6)
mixing = HyperConnection(nn.Identity(), 4, manifold=True).double().mixing()
agree("step limit of streams on λ = −1, as of Euler", 2.0, map_limit(mixing.step_matrix), rtol=1e-3)
