r"""
B4 · The identity is easy
=========================

**Claim.** A residual block is the identity where its weights are 0. With a soft threshold

.. math:: F(x) = \operatorname{sign}(z)\,\max(|z| - \tau, 0), \qquad z = G(x),

it is so in a whole neighbourhood: to the bit, wherever :math:`|G(x)| \le \tau`. Counting the entries that
the blocks change gives a *virtual depth*. For standard normal z a block changes the share
:math:`\operatorname{erfc}(\tau/\sqrt2)` of them.

**Assumptions.** Euler steps. For the share, a branch G with orthonormal rows and standard normal states.

**Not claimed.** That small weights alone give the identity: without the threshold any weight but 0 changes
the state, if by little. Nor that a plain block has it for nothing: driven to 0 it gives 0, and loses the
state.

**Source.** Hardt & Ma (2017), arXiv:1611.04231, on the identity; Donoho, *De-noising by soft-thresholding*
(1995); Zhao et al., *Deep Residual Shrinkage Networks* (2020).

The picture: the distance from the identity as weights shrink; the share by threshold; blocks of a trained
stack.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode import ResidualStack
from resode.fields import MLPField, SoftThresholdField
from resode.training.data.datasets import load_data
from resode.training.fit import fit
from theory.measures.virtual_depth import virtual_depth
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least

torch.manual_seed(shifted(0))

# %%
# Prediction and measurement: weights to zero
# -------------------------------------------
# The last layer of G is multiplied by s. The dead zone is reached at :math:`s = \tau / \max|G(x)|`, which one
# evaluation of G at s = 1 predicts; half a thousandth on either side decides.
width, threshold = 64, 0.05
x = torch.randn(100, width)
branch = MLPField(width)
last = branch.fc2.weight.detach().clone()
largest = branch(x).abs().max().item()


def distance(field, scale):
    """Largest change that a block makes, with G's last layer scaled."""
    branch.fc2.weight.data.copy_(scale * last)
    with torch.no_grad():
        return (ResidualStack(field, depth=1)(x) - x).abs().max().item()


soft = SoftThresholdField(branch, threshold=threshold)
edge = threshold / largest
scales = [edge * 2.0**k for k in range(-6, 5)]
shrinking = {
    "soft threshold": [distance(soft, s) for s in scales],
    "bare": [distance(branch, s) for s in scales],
}
inside, outside = distance(soft, edge * 0.9995), distance(soft, edge * 1.0005)
bare_inside, at_zero = distance(branch, edge * 0.9995), distance(branch, 0.0)
plain_at_zero = torch.relu(branch(x)).abs().max().item()  # the plain block σ(F(x)), its weights still 0

# %%
# The share by threshold
# ----------------------
samples = torch.randn(200 if FAST else 2000, width)
rotation = nn.Linear(width, width, bias=False)
nn.init.orthogonal_(rotation.weight)
thresholds = [0.25 * k for k in range(1, 13)]


def share(tau):
    stack = ResidualStack(SoftThresholdField(rotation, threshold=tau), depth=1)
    with torch.no_grad():
        return virtual_depth(stack(samples, return_path=True)[1]).depth.mean().item()


shares = [share(tau) for tau in thresholds]
normal = [math.erfc(tau / math.sqrt(2)) for tau in thresholds]
errors = [math.sqrt(p * (1 - p) / samples.numel()) for p in normal]

# %%
# A trained stack
# ---------------
# Sixteen blocks on the digits, with thresholds that stay as they are set. The count by bits must be what the
# fields say of themselves.
digits = load_data("digits")
images, unseen = (
    (pixels.flatten(1) / 255 - digits.mean[0]) / digits.std[0]
    for pixels in (digits.train_images, digits.test_images)
)
depth, size = 16, 32


def trained(tau):
    torch.manual_seed(shifted(1))
    fields = [SoftThresholdField(MLPField(size), threshold=tau) for _ in range(depth)]
    for field in fields:
        field.threshold.requires_grad_(False)
    stack = ResidualStack(fields, step_size=0.25)
    model = nn.Sequential(nn.Linear(64, size), stack, nn.Linear(size, 10))
    options = {"steps": 80 if FAST else 500, "batch_size": 128, "learning_rate": 3e-3, "seed": shifted(1)}
    fit(model, images, digits.train_labels, weight_decay=0.01, **options)
    with torch.no_grad():
        path = stack(model[0](unseen), return_path=True)[1]
        right = (model[2](path[-1]).argmax(1) == digits.test_labels).double().mean()
    own = torch.stack([f.active_share(s) for f, s in zip(fields, path[:-1], strict=True)])
    return virtual_depth(path), own, right


set_to = [0.0, 2.0] if FAST else [0.0, 0.5, 1.0, 2.0]
runs = [trained(tau) for tau in set_to]
disagreement = max((found.shares - own).abs().mean().item() for found, own, _ in runs)

# %%
# Figure
# ------
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for name, values in shrinking.items():
    left.plot(scales, values, "o-", label=name)
left.set_xscale("log", base=2)
left.set_yscale("symlog", linthresh=1e-4)
left.axvline(edge, color="k", ls=":", label="τ / max|G|")
left.set(
    title="largest change as weights shrink",
    xlabel="scale of the last layer",
    ylabel="|y − x|",
    ylim=(-1e-4, 1),
)
middle.errorbar(thresholds, shares, errors, fmt="o", label="measured")
middle.plot(thresholds, normal, "k:", label="erfc(τ/√2)")
middle.set(title="share of entries that a block changes", xlabel="τ")
for tau, (found, _, score) in zip(set_to, runs, strict=True):
    label = f"τ = {tau:g}: {found.depth.mean():.1f} of {depth}, {score:.0%} right"
    right.plot(range(1, depth + 1), found.shares.mean(1), "o-", label=label)
right.set(title="trained stacks: virtual depth", xlabel="block", ylabel="share changed", ylim=(0, 1.04))
for axis, corner in ((left, "upper left"), (middle, "upper right"), (right, "lower right")):
    axis.legend(fontsize=8, loc=corner)

# %%
# Verdict
# -------
# Inside the dead zone the equality is to the bit, so without tolerance; outside float32 rounds states of
# about 4 to 5e-7. The shares' tolerance is four standard errors of independent entries, for the worst of
# twelve.
agree("weights 0: largest change", 0.0, at_zero)
agree("inside the dead zone: largest change", 0.0, inside)
agree("just outside it: largest change, max|G| − τ", 0.0005 * threshold, outside, atol=5e-7)
at_least("without threshold, the same weights: largest change", threshold / 2, bare_inside)
agree("plain block at weights 0: largest output", 0.0, plain_at_zero)
worst = max(abs(m - p) / e for m, p, e in zip(shares, normal, errors, strict=True))
agree("share against erfc, worst in standard errors", 0.0, worst, atol=4)
agree("share at τ = 1", math.erfc(1 / math.sqrt(2)), shares[3], atol=4 * errors[3])
agree("trained: count by bits against the fields' own, mean", 0.0, disagreement, atol=1e-5)
saved = runs[0][0].depth.mean() - runs[-1][0].depth.mean()
at_least("trained: blocks of virtual depth saved by τ = 2", 2.0, saved)
at_least("trained: right answers at the least virtual depth", 0.85, runs[-1][2])
