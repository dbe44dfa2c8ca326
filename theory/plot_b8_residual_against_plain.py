r"""
B8 · Residual against plain perceptrons
=======================================

**Claim.** A residual perceptron, :math:`x + W_2\,\sigma(W_1 x)`, keeps its gradient and its input at any
depth, and stays trainable; a plain one, :math:`\sigma(W_2\,\sigma(W_1 x))`, of the same layers loses all
three. With He's variance, and :math:`1/L` of it in :math:`W_2` of the residual one,

.. math:: \mathbb E\,\frac{\lVert g_0\rVert^2}{\lVert g_L\rVert^2} = \Bigl(1 + \frac2L\Bigr)^{L} < e^2
   \quad\text{(residual)},\qquad
   \mathbb E\,\log\frac{\lVert g_0\rVert^2}{\lVert g_L\rVert^2} \approx -\frac52 \cdot \frac{2L}{n}
   \quad\text{(plain, width } n).

**Assumptions.** Networks as they are initialized; ReLU; gradients independent of the activations, as the two
formulas take them. One budget is the same number of updates of the same batches, with learning rate
:math:`\min(10^{-2}/\sqrt L,\ 10^{-1}/L)` for both kinds: all blocks together move :math:`L` times as far as
one (B6).

**Not claimed.** That plain gradients vanish on average. He's variance keeps :math:`\mathbb E\lVert
g\rVert^2` at any depth: it is the *typical* gradient that vanishes, its logarithm drifts down and spreads,
and rare networks make up for it. Nor that a residual network trains at any rate: with :math:`10^{-2}/\sqrt L`
one of 300 blocks is left at a loss of 1.6 after the same updates. Nor that no other initialization or
normalization trains plain nets.

**Source.** He et al. (2015), arXiv:1502.01852; Hanin & Nica, *Products of many large random matrices and
gradients in deep neural networks* (2018), arXiv:1812.05994; Hanin & Rolnick (2018), arXiv:1803.01719.

The picture: the gradient at the first block, the loss through training, the input read back, and the loss
by depth.
"""

import math

import matplotlib.pyplot as plt
import torch

from resode.analysis import loss_gradient_norms
from resode.networks import PlainMLP, ResidualMLP
from resode.training.data.datasets import load_data
from resode.training.fit import fit
from theory.measures.recovery import recovery
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

digits = load_data("digits")
images = (digits.train_images.flatten(1).double() / 255 - digits.mean[0]) / digits.std[0]
labels = digits.train_labels
width = 64
kinds = {"residual": ResidualMLP, "plain": PlainMLP}
depths = [2, 15, 100] if FAST else [2, 10, 30, 100, 300, 1000]
trained_depths = [2, 15, 100] if FAST else [2, 10, 30, 100, 300]
networks = 4


def network(kind, depth, seed):
    torch.manual_seed(shifted(seed))
    return kinds[kind](depth, in_features=64, width=width).double().eval()


# %%
# Prediction
# ----------
# The two formulas of the claim. How much of the input can be read back, and how deep a network still trains,
# no formula says: half of the variance and less than half of chance's loss stand for keeping them.
#
# Measurement: gradients and inputs of untrained networks
# -------------------------------------------------------
# In float64, because the plain gradients leave float32's range.
log_gains = {kind: torch.zeros(len(depths), networks) for kind in kinds}
gains = {kind: torch.zeros(len(depths), networks) for kind in kinds}
read_back = {kind: [] for kind in kinds}
for kind in kinds:
    for i, depth in enumerate(depths):
        for seed in range(networks):
            model = network(kind, depth, seed)
            blocks = list(model.stack.fields if kind == "residual" else model.blocks)
            norms = loss_gradient_norms(model, [*blocks, model.linear], images[:16], labels[:16])
            squares = (norms[0] / norms[-1]) ** 2
            gains[kind][i, seed], log_gains[kind][i, seed] = squares.mean(), squares.log().mean()
        with torch.no_grad():
            features = (model.stack if kind == "residual" else model.blocks)(model.input(images[:600]))
        read_back[kind].append(recovery(features, images[:600]))

# %%
# One budget
# ----------
# The loss of the last five of as many batches; trainable is a depth where it is below half of chance, ln 10.
# Networks are trained up to 300 blocks, 600 layers, because deeper ones take longer than a page may.
updates = 20
curves = {kind: {} for kind in kinds}
for kind in kinds:
    for depth in trained_depths:
        rate = min(1e-2 / math.sqrt(depth), 0.1 / depth)
        options = {"batch_size": 128, "learning_rate": rate, "steps": updates, "seed": shifted(0)}
        curves[kind][depth] = fit(network(kind, depth, 0).float(), images.float(), labels, **options)
reached = {kind: [curves[kind][depth][-5:].mean().item() for depth in trained_depths] for kind in kinds}
trainable = {
    kind: max(d for d, loss in zip(trained_depths, reached[kind], strict=True) if loss < math.log(10) / 2)
    for kind in kinds
}

# %%
# Figure
# ------
figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
for kind, style in (("residual", "o-"), ("plain", "s--")):
    mean, spread = log_gains[kind].mean(1) / math.log(10), log_gains[kind].std(1) / math.log(10)
    axes[0, 0].errorbar(depths, mean / 2, spread / 2, fmt=style, capsize=3, label=kind)
    axes[0, 1].plot(curves[kind][trained_depths[-1]], style[1:], label=f"{kind}, depth {trained_depths[-1]}")
    axes[0, 1].plot(
        curves[kind][trained_depths[0]], style[1:], alpha=0.4, label=f"{kind}, depth {trained_depths[0]}"
    )
    axes[1, 0].plot(depths, read_back[kind], style, label=kind)
    axes[1, 1].plot(trained_depths, reached[kind], style, label=f"{kind}: trainable to {trainable[kind]}")
axes[0, 0].plot(depths, [-2.5 * d / width / math.log(10) for d in depths], "k:", label="predicted, plain")
axes[0, 0].set(title="gradient at the first block", ylabel="log10 of |g| there / at the last")
axes[0, 1].set(title="training", xlabel="update", ylabel="loss of the batch")
axes[1, 0].set(title="input read from the last state", ylabel="R² on other images")
axes[1, 1].set(title=f"loss after {updates} updates", ylabel="cross entropy", yscale="log")
axes[1, 1].axhline(math.log(10), color="gray", lw=0.5)
for axis in (axes[0, 0], axes[1, 0], axes[1, 1]):
    axis.set(xlabel="blocks", xscale="log")
for axis in axes.flat:
    axis.legend(fontsize=8)

# %%
# Verdict
# -------
# Tolerances of the gains are three standard errors over the networks. A residual block adds
# :math:`2 v^\top J v` to the square, of variance :math:`8/(Ln)`: 8/n over all. The plain logarithm has the
# variance that the source gives, twice the drift.
for i, depth in list(enumerate(depths))[1:]:
    mean = (1 + 2 / depth) ** depth
    error = mean * math.sqrt(8 / width / networks)
    agree(
        f"residual: mean |g0/gL|² at depth {depth}",
        mean,
        gains["residual"][i].mean(),
        atol=3 * error,
    )
    drift = 2.5 * 2 * depth / width
    error = math.sqrt(2 * drift / networks)
    agree(f"plain: mean log |g0/gL|² at depth {depth}", -drift, log_gains["plain"][i].mean(), atol=3 * error)
deepest = depths[-1]
at_least(f"residual: R² of the input at depth {deepest}", 0.5, read_back["residual"][-1])
at_most(f"plain: R² of the input at depth {deepest}", 0.2, read_back["plain"][-1])
deepest = trained_depths[-1]
agree("residual: trainable depth, the deepest that is trained", deepest, trainable["residual"])
at_most("plain: trainable depth", deepest / 5, trainable["plain"])
at_least(
    f"loss under one budget at depth {deepest}, plain to residual",
    2.0,
    reached["plain"][-1] / reached["residual"][-1],
)
