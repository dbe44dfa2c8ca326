r"""
B11 · A smoother objective
==========================

**Claim.** At the same loss, reached by the same training, the objective of a deep residual network is
smoother than that of a plain one of the same layers: the largest eigenvalue of its Hessian is several times
smaller, and a random step of a fifth of every unit's weights raises the loss much less. With two blocks
there is no such difference: it comes with depth.

**Assumptions.** Perceptrons on the digits, as in B8: He's variance, ReLU, the same optimizer, rate and
batches. Compared where either first has a loss below 0.3.

**Not claimed.** The popular form, that shortcuts make the objective smooth. Two figures against it. For
linear layers the two objectives are *one function*, moved by the identity,

.. math:: \mathcal L_\text{residual}(W_1, \dots, W_L) = \mathcal L_\text{plain}(I + W_1, \dots, I + W_L),

with the same Hessian at corresponding weights; for numbers at the minimum its largest eigenvalue is
:math:`L`, for both. And at the initial weights the deep *residual* network has the larger eigenvalue: a
plain one is flat there because no gradient comes through (B8). Smooth is where training leads, not the
function.

**Source.** Li et al., *Visualizing the Loss Landscape of Neural Nets* (2018), arXiv:1712.09913 (steps in
the scale of each unit's weights); Hardt & Ma, *Identity Matters in Deep Learning* (2017), arXiv:1611.04231.

The picture: the largest eigenvalue by depth, at the initial weights and at the same loss; the loss along
random directions for the deepest pair.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode.analysis import largest_hessian_eigenvalue
from resode.networks import PlainMLP, ResidualMLP
from resode.training.data.datasets import load_data
from resode.training.fit import fit
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

digits = load_data("digits")
some = 150 if FAST else 300
images = ((digits.train_images.flatten(1) / 255 - digits.mean[0]) / digits.std[0])[:some]
labels = digits.train_labels[:some]
kinds = {"residual": ResidualMLP, "plain": PlainMLP}
depths, seeds = ((2, 8), 7) if FAST else ((2, 6, 10), 7)
initial_depths = (20,) if FAST else (2, 6, 20)
width, products = 32, 20
loss_fn = nn.CrossEntropyLoss()
sizes = (0.05, 0.1, 0.2)

# %%
# Prediction
# ----------
# Linear layers first: chains of L numbers, the loss ½(x·∏w − x)² at x = 2, whose Hessian at w = 1 is
# 4·11ᵀ with the eigenvalue 4L; and of matrices, by both objectives at corresponding weights.


class Chain(nn.Module):
    """A product of matrices, or of I + W."""

    def __init__(self, weights, shift):
        super().__init__()
        self.weights, self.shift = nn.ParameterList(weights), shift

    def forward(self, x):
        for w in self.weights:
            x = x @ (w + self.shift * torch.eye(len(w), dtype=w.dtype)).T
        return x


def half_square(y, target):
    return (y - target).square().sum() / 2 / len(y)


F64 = torch.float64
length, n = 10, 3
two = torch.full((1, 1), 2.0, dtype=F64)
numbers = [
    largest_hessian_eigenvalue(
        Chain([torch.full((1, 1), 1.0 - shift, dtype=F64) for _ in range(length)], shift),
        half_square,
        (two, two),
    )
    for shift in (0.0, 1.0)
]
generator = torch.Generator().manual_seed(shifted(0))
x, target = torch.randn(2, 20, n, dtype=F64, generator=generator)
steps = [0.3 * torch.randn(n, n, dtype=F64, generator=generator) for _ in range(4)]
residual_chain = Chain([w.clone() for w in steps], 1.0)
plain_chain = Chain([torch.eye(n, dtype=F64) + w for w in steps], 0.0)
chains = [largest_hessian_eigenvalue(c, half_square, (x, target)) for c in (residual_chain, plain_chain)]


def dense_largest(chain):
    """The same by torch's own dense Hessian in all weights."""

    def loss(*weights):
        y = x
        for w in weights:
            y = y @ (w + chain.shift * torch.eye(n, dtype=F64)).T
        return half_square(y, target)

    blocks = torch.autograd.functional.hessian(loss, tuple(w.detach() for w in chain.weights))
    rows = [torch.cat([b.reshape(n * n, n * n) for b in row], 1) for row in blocks]
    return float(torch.linalg.eigvalsh(torch.cat(rows)).max())


# %%
# Measurement
# -----------


def level(network):
    with torch.no_grad():
        return float(loss_fn(network(images), labels))


def sharpness(network):
    return largest_hessian_eigenvalue(network, loss_fn, (images, labels), tol=5e-2, max_iter=products)


def rises(network, seed):
    """By how much steps of random directions, in the scale of every unit's weights, raise the loss."""
    generator = torch.Generator().manual_seed(shifted(seed))
    weights = [p for p in network.parameters() if p.ndim > 1]
    here, kept, found = level(network), [p.detach().clone() for p in weights], []
    for size in sizes:
        total = 0.0
        for _ in range(4):
            for p, w in zip(weights, kept, strict=True):
                step = torch.randn(w.shape, generator=generator)
                p.data = w + size * step * w.norm(dim=1, keepdim=True) / step.norm(dim=1, keepdim=True)
            total += level(network) - here
        found.append(total / 4)
    for p, w in zip(weights, kept, strict=True):
        p.data = w
    return found


def measured(kind, depth, seed):
    """Loss and λ where the loss is below 0.3, and the rises there."""
    torch.manual_seed(shifted(seed))
    network, updates = kinds[kind](depth, in_features=64, width=width), 0
    while level(network) > 0.3 and updates < 320:
        options = {"batch_size": 64, "learning_rate": 0.02 / depth, "seed": shifted(seed + updates)}
        fit(network, images, labels, steps=4, **options)
        updates += 4
    return [level(network), sharpness(network), *rises(network, seed)]


def initial(kind, depth, seed):
    """λ at the initial weights."""
    torch.manual_seed(shifted(seed))
    return sharpness(kinds[kind](depth, in_features=64, width=width))


found = {
    kind: torch.tensor([[measured(kind, depth, seed) for seed in range(seeds)] for depth in depths])
    for kind in kinds
}  # (depths, seeds, [loss, λ, rises])
start = {
    kind: torch.tensor([[initial(kind, depth, seed) for seed in range(24)] for depth in initial_depths])
    for kind in kinds
}
ratio = (found["plain"][..., 1] / found["residual"][..., 1]).log()
at_start = (start["residual"] / start["plain"]).log()
rise = found["plain"][..., -1].clamp(min=1e-3).log() - found["residual"][..., -1].clamp(min=1e-3).log()


def below(values):
    """The mean less three standard errors."""
    return float(values.mean() - 3 * values.std() / math.sqrt(len(values)))


# %%
# Figure
# ------
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for kind, style in (("residual", "o-"), ("plain", "s--")):
    for axis, values, at in ((left, start[kind], initial_depths), (middle, found[kind][..., 1], depths)):
        logs = values.log10()
        axis.errorbar(at, logs.mean(1), logs.std(1), fmt=style, capsize=3, label=kind)
        axis.set_xticks(at)
    along = found[kind][-1, :, 2:].mean(0)
    right.plot([0, *sizes], [0, *along.tolist()], style, label=f"{kind}, {depths[-1]} blocks")
left.set(title="at the initial weights", xlabel="blocks", ylabel="log10 of the largest eigenvalue")
middle.set(title="where the loss is 0.3", xlabel="blocks")
right.set(
    title="along random directions there", xlabel="step, share of a unit's weights", ylabel="rise of the loss"
)
right.set_yscale("symlog", linthresh=0.1)
for axis in (left, middle, right):
    axis.legend(fontsize=8)

# %%
# Verdict
# -------
# Exact in float64 for the chains. Ratios are those of pairs with the same seed, in logarithms, at three
# standard errors over the seeds.
agree("numbers: largest eigenvalue of the plain chain, 4L", 4 * length, numbers[0], rtol=1e-7)
agree("  and of the residual one at w = 0", 4 * length, numbers[1], rtol=1e-7)
agree("matrices: residual at W less plain at I + W, relative", 0, chains[0] / chains[1] - 1, atol=1e-7)
agree("  the largest eigenvalue by the dense Hessian", dense_largest(residual_chain), chains[0], rtol=1e-7)
at_least(
    f"λ plain over residual at the same loss, {depths[-1]} blocks, ln less 3 standard errors",
    0,
    below(ratio[-1]),
)
at_most("  with two blocks, mean ln", math.log(2.5), ratio[0].mean())
at_least(
    "  how much more a random step of 0.2 raises it, ln less 3 standard errors", math.log(2), below(rise[-1])
)
at_least(
    "at the initial weights, 20 blocks: λ residual over plain, ln less 3 standard errors",
    0,
    below(at_start[-1]),
)
at_most("residual: highest loss that is compared", 0.31, found["residual"][..., 0].max())
