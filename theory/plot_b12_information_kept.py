r"""
B12 · Information kept
======================

**Claim.** What early blocks know is still there in deep ones. Where :math:`\eta\,\mathrm{Lip}(F) = q < 1` a
residual block has an inverse, and :math:`x = y - \eta F(x)`, iterated, finds its input with an error that
falls by q or more at each turn; so every state of a stack is recovered from its last one. Read by a linear
map, early features are found in deep ones at least as well as by the identity,

.. math:: R^2(x_l \mid x_L) \;\ge\;
   1 - \frac{\sum \lVert x_L - x_l - m \rVert^2}{\sum \lVert x_l - \bar x_l\rVert^2},

m the mean of the difference, because the identity is one of the maps that the best reader could be. Plain
networks of the same layers lose their early features with depth.

**Assumptions.** The bound holds on the samples that the reader is fitted to; on others it is compared with
what the fit loses between them, which vanishes with many samples a feature.

**Not claimed.** That a residual block cannot lose information: with :math:`F(x) = -x` it maps all states to
one, and no reader finds anything. Nor that a plain network loses it at once: two blocks keep most. Nor that
what is lost for a linear reader is lost for all.

**Source.** Behrmann et al., *Invertible Residual Networks* (2019), arXiv:1811.00995, theorem 1; Alain &
Bengio (2016), arXiv:1610.01644, on linear readers.

The picture: R² of the states of every block, read from the last one, before and after training; the error
of the inverse by turns.
"""

import math
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode import ResidualStack
from resode.fields import MLPField
from resode.networks import PlainMLP, ResidualMLP
from resode.training.data.datasets import load_data
from resode.training.fit import fit
from theory.measures.recovery import recovery
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

digits = load_data("digits")
images = (digits.train_images.flatten(1).double() / 255 - digits.mean[0]) / digits.std[0]
labels = digits.train_labels
kinds = {"residual": ResidualMLP, "plain": PlainMLP}
depth, width, networks, updates = (16, 32, 4, 30) if FAST else (24, 48, 6, 60)

# %%
# Prediction: the inverse
# -----------------------
# Weights scaled so that the product of the layers' norms is q/η: tanh is nowhere steeper than 1.
q, blocks, turns = 0.5, 10, 40
torch.manual_seed(shifted(0))
fields = []
for _ in range(blocks):
    field = MLPField(width, activation="tanh").double()
    for layer in (field.fc1, field.fc2):
        layer.weight.data *= math.sqrt(q) / torch.linalg.matrix_norm(layer.weight.data, 2)
    fields.append(field)
stack = ResidualStack(fields).double()

# %%
# Measurement: the inverse
# ------------------------
with torch.no_grad():
    path = stack(images[:200] @ torch.eye(64, width, dtype=torch.float64), return_path=True)[1]

    def backward(y, field, turns):
        """x from y = x + F(x), and the error's norms on the way where x is known."""
        x = y
        for _ in range(turns):
            x = y - field(x)
        return x

    state, recovered = path[-1], []
    for field in reversed(fields):
        state = backward(state, field, turns)
        recovered.insert(0, state)
    inverse_error = max(
        float((found - x).norm() / x.norm()) for found, x in zip(recovered, path[:-1], strict=True)
    )
    by_turn = [float((backward(path[1], fields[0], k) - path[0]).norm()) for k in range(12)]
contraction = max(b / a for a, b in pairwise(by_turn) if a > 1e-10)
cancelled = ResidualStack([nn.Linear(width, width, bias=False).double()])
cancelled.fields[0].weight.data.copy_(-torch.eye(width))
with torch.no_grad():
    gone = recovery(cancelled(path[0]), path[0])

# %%
# Measurement: linear readers
# ---------------------------
# The states behind every block, of networks before and after the same training, read from the last one.


def path_of(kind, network):
    with torch.no_grad():
        x = network.input(images)
        if kind == "residual":
            return network.stack(x, return_path=True)[1]
        states = [x]
        for block in network.blocks:
            states.append(block(states[-1]))
        return torch.stack(states)


def read_back(path):
    return [recovery(path[-1], state) for state in path]


def by_identity(path):
    """The bound, on the half that a reader is fitted to."""
    half = path[:, : round(path.shape[1] / 2)]
    apart = half[-1] - half
    apart = apart - apart.mean(1, keepdim=True)
    return 1 - apart.square().sum((1, 2)) / (half - half.mean(1, keepdim=True)).square().sum((1, 2))


found = {(kind, when): [] for kind in kinds for when in ("untrained", "trained")}
bounds, fitted = [], []
for seed in range(networks):
    for kind, make in kinds.items():
        torch.manual_seed(shifted(seed))
        network = make(depth, in_features=64, width=width).double()
        path = path_of(kind, network)
        found[kind, "untrained"].append(read_back(path))
        if kind == "residual":
            half = path[:, : path.shape[1] // 2]
            bounds.append(by_identity(path))
            twice = [torch.cat((state, state)) for state in half]  # fitted and judged on the same samples
            fitted.append([recovery(twice[-1], state) for state in twice])
        options = {"batch_size": 128, "learning_rate": 0.1 / depth, "seed": shifted(seed)}
        network.float()
        fit(network, images.float(), labels, steps=updates, **options)
        found[kind, "trained"].append(read_back(path_of(kind, network.double())))
read = {key: torch.tensor(values) for key, values in found.items()}  # (networks, depth + 1)
bound, in_sample = torch.stack(bounds), torch.tensor(fitted)


def error(values):
    return float(values.std() / math.sqrt(len(values)))


# %%
# Figure
# ------
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for (kind, when), values in read.items():
    style = ("o" if kind == "residual" else "s") + ("-" if when == "trained" else "--")
    left.errorbar(range(depth + 1), values.mean(0), values.std(0), fmt=style, ms=3, label=f"{kind}, {when}")
left.plot(bound.mean(0).clamp(min=-0.05), "k:", label="identity as the reader, residual, untrained")
left.set(
    title="read from the last state",
    xlabel="state behind block",
    ylabel="R² on other images",
    ylim=(-0.1, 1.05),
)
left.legend(fontsize=8)
right.semilogy(by_turn, "o", label="measured")
right.semilogy([by_turn[0] * q**k for k in range(12)], "k:", label="q to the power of the turns")
right.set(title="inverse of a block", xlabel="turns of x ← y − F(x)", ylabel="error")
right.legend(fontsize=8)

# %%
# Verdict
# -------
# The inverse to rounding; bounds on R² to the reader's ridge, 1e-6 of the features' largest variance; what
# hangs on networks with three standard errors.
agree("inverse of ten blocks: worst relative error of a state", 0, inverse_error, atol=1e-10)
at_most("  largest factor of the error a turn, q", q, contraction)
at_least("  and no less than a hundredth of it, so that there was something to invert", q / 100, contraction)
agree("F(x) = −x: R² of the lost input", 0, gone, atol=0.05)
at_least(
    "residual, untrained: R² in sample less the identity's, least state", -1e-3, (in_sample - bound).min()
)
first = {key: values[:, 0] for key, values in read.items()}
for when in ("untrained", "trained"):
    values = first["residual", when]
    at_least(
        f"residual, {when}: R² of the first state, less 3 standard errors",
        0.5,
        values.mean() - 3 * error(values),
    )
    apart = first["residual", when] - first["plain", when]
    at_least("  more than plain, less 3 standard errors", 0.2, apart.mean() - 3 * error(apart))
late = read["plain", "untrained"][:, -3]
at_least(
    "plain, untrained: R² two blocks before the end, less 3 standard errors",
    0.5,
    late.mean() - 3 * error(late),
)
