r"""
B1 · Error correction
=====================

**Claim.** In a trained residual network every block moves the state towards the target representation
:math:`t`: the cosine

.. math:: \cos\angle\bigl(F_l(x_l),\; t - x_l\bigr)

rises by training, in every block, over that of the same network untrained.

**Assumptions.** The target is known and does not depend on the weights. Here it is a fixed code for every
class of the digits, and the stack is trained to end there. Then the untrained control has expectation 0 in
every block, because a last layer :math:`W_2` and its negative are as likely.

**Not claimed.** That a positive cosine shows learning. The popular form takes :math:`t = x_L`, or a class's
mean of it, and :math:`x_L` *contains* the increments: the last block then has cosine 1 by definition, and
an untrained network looks as if it corrected errors too. The page measures both.

**Source.** Greff, Srivastava & Schmidhuber, *Highway and Residual Networks Learn Unrolled Iterative
Estimation* (2017), arXiv:1612.07771; Jastrzębski et al. (2018), arXiv:1710.04773.

The picture: the cosine by block through training, beside the control; the popular form; the distance left.
"""

from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode import ResidualStack
from resode.analysis import class_means, correction_along
from resode.fields import MLPField
from resode.training.data.datasets import load_data
from resode.training.fit import fit
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least

# %%
# Set-up
# ------
# Eight blocks of step 1/4 on 32 features, and orthogonal codes of the ten classes.
digits = load_data("digits")
images = (digits.train_images.flatten(1) / 255 - digits.mean[0]) / digits.std[0]
labels = digits.train_labels
depth, width = 8, 32
codes = 5 * torch.linalg.qr(torch.randn(width, 10, generator=torch.Generator().manual_seed(shifted(0))))[0].T


def network(seed):
    torch.manual_seed(shifted(seed))
    stack = ResidualStack([MLPField(width) for _ in range(depth)], step_size=0.25)
    return nn.Sequential(nn.Linear(64, width), stack)


def path_of(net):
    """States x_0 … x_L of test images."""
    unseen = (digits.test_images.flatten(1) / 255 - digits.mean[0]) / digits.std[0]
    with torch.no_grad():
        return net[1](net[0](unseen), return_path=True)[1]


target = codes[digits.test_labels]

# %%
# Prediction
# ----------
# Untrained networks average to 0 in every block; with :math:`t = x_L` the last block has 1. How far training
# lifts the cosine, no formula says: the claim is that it does, in every block, beyond the networks' spread.
#
# Measurement
# -----------
# The mean cosine of every block, of untrained networks and through training.
control = torch.stack([correction_along(path_of(network(seed)), target).mean(1) for seed in range(40)])
updates = [0, 10, 30, 100] if FAST else [0, 10, 30, 100, 300]
nets = [network(seed) for seed in range(100, 106)]
through = []
for before, wanted in pairwise([0, *updates]):
    for net in nets if wanted else []:
        options = {"batch_size": 128, "learning_rate": 3e-3, "seed": shifted(before)}
        fit(net, images, codes[labels], steps=wanted - before, **options)
    each = torch.stack([correction_along(path_of(net), target).mean(1) for net in nets])  # (6, depth)
    through.append(each.mean(0))

# %%
# The popular form, on the same networks: the target is the mean of x_L over the other images of the class.


def popular(net):
    path = path_of(net)
    return correction_along(path, class_means(path[-1], digits.test_labels)).mean(1)


untrained_popular = torch.stack([popular(network(seed)) for seed in range(10)])
last = torch.stack([correction_along(path_of(net), path_of(net)[-1])[-1] for net in nets])

# %%
# Figure
# ------
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
blocks = range(1, depth + 1)
for count, cosines, shade in zip(updates, through, torch.linspace(0.8, 0, len(updates)), strict=True):
    left.plot(blocks, cosines, "o-", color=str(float(shade)), label=f"{count} updates")
left.fill_between(
    blocks, *torch.quantile(control, torch.tensor([0.1, 0.9]), dim=0), alpha=0.3, label="untrained"
)
left.set(title="towards the class's code", xlabel="block", ylabel="cosine of F(x) with t − x")
middle.plot(blocks, untrained_popular.mean(0), "s--", label="untrained")
middle.plot(blocks, popular(nets[0]), "ko-", label=f"{updates[-1]} updates")
middle.set(title="popular form: towards the class mean of x_L", xlabel="block")
for name, some, style in (("untrained", network(100), "s--"), (f"{updates[-1]} updates", nets[0], "ko-")):
    distance = (target - path_of(some)).norm(dim=2).mean(1)
    right.plot(range(depth + 1), distance, style, label=name)
right.set(title="distance to the code", xlabel="after block", ylabel="mean of |t − x|")
for axis in (left, middle, right):
    axis.legend(fontsize=8)
    axis.axhline(0, color="gray", lw=0.5)

# %%
# Verdict
# -------
# The control's tolerance is three standard errors over its 40 networks; in every block the mean of the six
# trained ones must lie more than three standard errors of the difference higher. One line says nothing of
# networks: that the last cosine is 1 with t = x_L holds whatever the blocks have learnt. It checks the
# function, and is why the popular form proves nothing.
mean, error = control.mean(), control.mean(1).std() / 40**0.5
agree("untrained: mean cosine over 40 networks", 0.0, mean, atol=3 * error)
rise = through[-1] - control.mean(0)
error = (control.var(0) / len(control) + each.var(0) / len(nets)).sqrt()
at_least("trained: rise over the control in standard errors, least block", 3, (rise / error).min())
at_least(
    "trained: mean cosine above that after a tenth of the updates", through[-3].mean(), through[-1].mean()
)
agree("no claim, by definition: cosine of the last block with t = x_L", 1.0, last.min(), atol=1e-5)
at_least("popular form: mean cosine of untrained networks, far from 0", 0.2, untrained_popular.mean())
