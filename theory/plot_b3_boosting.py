r"""
B3 · Boosting
=============

**Claim.** Read the state after every block by the network's own linear head, :math:`z_l = w^\top x_l`. Then
a block adds :math:`w^\top F_l(x_l)` to the prediction, and in a trained network this aligns with the
negative gradient of the loss in it, as a weak learner of gradient boosting does:

.. math:: \cos\angle\Bigl(w^\top F_l(x_l),\; -\frac{\partial L}{\partial z}(z_l)\Bigr) > 0.

Where :math:`L` is convex in :math:`z`, the loss after the block is at least :math:`L(z_l) + \frac{\partial
L}{\partial z} \cdot w^\top F_l(x_l)`: **only** a block with a positive cosine can lower it.

**Assumptions.** Cross entropy on the digits, a linear head, identity shortcuts with nothing after the
addition. The untrained control has expectation 0 in every block by the symmetry of its last layer's
weights.

**Not claimed.** That every block aligns well, or alike: early blocks work on features that the head does
not read. Nor that blocks were trained one after another, as boosting would.

**Source.** Huang, Ash, Langford & Schapire, *Learning Deep ResNet Blocks Sequentially using Boosting
Theory*, ICML (2018); Veit, Wilber & Belongie, NIPS (2016).

The picture: the cosine by block of trained and untrained networks; the loss by depth; drops against first
order.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import one_hot

from resode.analysis import boosting_along
from resode.networks import ResidualMLP
from resode.training.data.datasets import load_data
from resode.training.fit import fit
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

# %%
# Set-up
# ------
digits = load_data("digits")
images, unseen = (
    (pixels.flatten(1) / 255 - digits.mean[0]) / digits.std[0]
    for pixels in (digits.train_images, digits.test_images)
)
labels, target = digits.train_labels, digits.test_labels
depth, width = 8, 32


def network(seed):
    torch.manual_seed(shifted(seed))
    return ResidualMLP(depth, in_features=64, width=width).eval()


def along(net):
    with torch.no_grad():
        path = net.stack(net.input(unseen), return_path=True)[1]
    return boosting_along(path, net.linear, target), path


# %%
# Prediction
# ----------
# Untrained networks average to 0; trained ones lie above it, beyond the spread of networks, in every block.
# And no block lowers the loss by more than its first order, whatever the sample.
#
# Measurement
# -----------
# Mean cosines by block, over the test images.
control = torch.stack([along(network(seed))[0].cosine.nanmean(1) for seed in range(30)])
nets = [network(seed) for seed in range(100, 106)]
for net in nets:
    fit(net, images, labels, steps=60 if FAST else 200, batch_size=128, learning_rate=2e-3, seed=shifted(0))
found = [along(net)[0] for net in nets]
trained = torch.stack([one.cosine.nanmean(1) for one in found])

# %%
# The same in closed form for one network: the descent direction of cross entropy is onehot − softmax, the
# increment of a linear head :math:`w^\top F`.
path = along(nets[0])[1]
with torch.no_grad():
    steps = [nets[0].stack.field(block)(path[block]) @ nets[0].linear.weight.T for block in range(depth)]
    descent = one_hot(target, 10) - nets[0].linear(path[:-1]).softmax(2)
by_hand = torch.nn.functional.cosine_similarity(torch.stack(steps), descent, dim=2)

# %%
# The inequality, sample by sample and block by block.
drops = torch.cat([one.losses[:-1] - one.losses[1:] for one in found])
first_order = torch.cat([one.first_order for one in found])
falls_against = ((drops > 1e-6) & (first_order > 0)).sum()

# %%
# Figure
# ------
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
blocks = range(1, depth + 1)
for cosines, label in ((control, "untrained"), (trained, "trained")):
    left.errorbar(blocks, cosines.mean(0), cosines.std(0), fmt="o-", capsize=3, label=label)
left.axhline(0, color="gray", lw=0.5)
left.set(title="alignment with the descent direction", xlabel="block", ylabel="cosine")
untrained = along(network(0))[0]
for one, label in ((untrained, "untrained"), (found[0], "trained")):
    middle.plot(range(depth + 1), one.losses.mean(1), "o-", label=label)
middle.set(
    title="loss of the state read by the head", xlabel="after block", ylabel="cross entropy", yscale="log"
)
right.plot(-first_order.flatten()[::7], drops.flatten()[::7], ".", ms=2)
right.axline((0, 0), slope=1, color="k", lw=0.7, label="bound")
right.set(title="what a block lowers the loss by", xlabel="to first order", ylabel="drop of the loss")
for axis in (left, middle, right):
    axis.legend()

# %%
# Verdict
# -------
# The control's tolerance is three standard errors over its 30 networks; in every block the mean of the six
# trained ones must lie more than three standard errors of the difference higher. Float32 leaves 1e-5 in sums
# of losses.
mean, error = control.mean(), control.mean(1).std() / 30**0.5
agree("untrained: mean cosine over 30 networks", 0.0, mean, atol=3 * error)
agree("cosine against the closed form, worst sample", 0.0, (by_hand - found[0].cosine).abs().max(), atol=1e-4)
error = (control.var(0) / len(control) + trained.var(0) / len(nets)).sqrt()
rise = (trained.mean(0) - control.mean(0)) / error
at_least("trained: cosine over the control's in standard errors, least block", 3, rise.min())
at_most("drop of the loss beyond first order, worst sample", 1e-5, (drops + first_order).max())
at_most("blocks and samples that lower the loss against the gradient", 0, falls_against)
total = torch.stack([one.losses[0] - one.losses[-1] for one in found]).mean()
at_least("trained: loss lowered from first state to last", 0.5, total)
