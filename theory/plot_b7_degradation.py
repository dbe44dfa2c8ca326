r"""
B7 · Degradation
================

**Claim.** A deeper plain network *trains* worse than a shallower one, though it contains it: the error on
the very images that it is trained on is higher. Residual networks of the same layers do not degrade,

.. math:: E_\text{train}(\text{plain, deep}) > E_\text{train}(\text{plain, shallow}),\qquad
   E_\text{train}(\text{residual, deep}) \le E_\text{train}(\text{residual, shallow}) + \text{spread}.

**Assumptions.** One optimizer and as many updates for all. Two sizes of evidence: perceptrons on the
digits, measured here each time, and the networks of the original experiment on CIFAR-10, plain and residual
with 20 and 56 layers, from stored curves where there are any.

**Not claimed.** That it is overfitting: the *training* error is compared. Nor that it is a lack of
capacity, or that plain networks cannot be trained with other means or more time.

**Source.** He, Zhang, Ren & Sun, *Deep Residual Learning for Image Recognition* (2015), arXiv:1512.03385,
figures 1 and 6.

The picture: training loss of perceptrons by update and by depth; CIFAR-10 curves, or what they need.
"""

import math

import matplotlib.pyplot as plt
import torch

from resode.networks import PlainMLP, ResidualMLP
from resode.training.data.datasets import load_data
from resode.training.fit import fit
from theory import degradation
from theory.seeds import shifted
from theory.verdict import FAST, at_least, at_most

# %%
# **Prediction.** Plain: the deepest loses at least twice as much as the shallowest. Residual: the deepest
# loses no more than the shallowest, within three standard deviations of a run.
#
# **Measurement** on the digits. Perceptrons, depth in blocks of two layers; the error is counted on all
# training images.
digits = load_data("digits")
images = (digits.train_images.flatten(1) / 255 - digits.mean[0]) / digits.std[0]
labels = digits.train_labels
depths = [3, 24] if FAST else [3, 6, 12, 24]
kinds = {"plain": PlainMLP, "residual": ResidualMLP}
updates, seeds = (60, 2) if FAST else (120, 3)


def trained(kind, depth, seed):
    """The loss by update, and the share of training images answered wrong at the end."""
    torch.manual_seed(shifted(seed))
    model = kinds[kind](depth, in_features=64, width=32)
    losses = fit(model, images, labels, steps=updates, batch_size=128, learning_rate=2e-3, seed=shifted(seed))
    with torch.no_grad():
        return losses, (model(images).argmax(1) != labels).double().mean()


runs = {kind: [[trained(kind, depth, seed) for seed in range(seeds)] for depth in depths] for kind in kinds}
losses = {kind: torch.stack([torch.stack([a for a, _ in some]) for some in runs[kind]]) for kind in kinds}
errors = {kind: torch.stack([torch.stack([e for _, e in some]) for some in runs[kind]]) for kind in kinds}
final = {kind: losses[kind][..., -10:].mean(-1) for kind in kinds}  # (depths, seeds)

# %%
# **Measurement** on CIFAR-10. The stored curves come from
#
# .. code-block:: console
#
#    python -m tests.benchmarks.table --data PATH --out FOLDER --epochs 10 \
#        --only plain20 plain56 resnet20 resnet56
#    python -m tests.benchmarks.table --out FOLDER --store
#
# with errors of training images as they are, in evaluation mode. This part can fail only where these curves
# are stored. Without them it says "not measured" and claims nothing.
models = ("plain20", "plain56", "resnet20", "resnet56")
cifar = degradation.read()
missing = [model for model in models if model not in cifar]
if missing:
    print(f"CIFAR-10: not measured. Missing in docs/results/degradation.csv: {', '.join(missing)}.")
    print("  python -m tests.benchmarks.table --data PATH --out FOLDER --only " + " ".join(missing))
    print("  python -m tests.benchmarks.table --out FOLDER --store")

# %%
# **Figure.**

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for kind, style in (("plain", "--"), ("residual", "-")):
    for i, shade in ((0, 0.4), (len(depths) - 1, 1.0)):
        smooth = losses[kind][i].mean(0).unfold(0, 5, 1).mean(1)
        left.plot(
            smooth,
            "C0" + style if kind == "plain" else "C1" + style,
            alpha=shade,
            label=f"{kind}, {depths[i]}",
        )
    spread = final[kind].std(1)
    middle.errorbar(depths, final[kind].mean(1), spread, fmt="o" + style, capsize=3, label=kind)
left.set(title="digits: training loss", xlabel="update", ylabel="cross entropy", yscale="log")
middle.set(title="digits: training loss at the end", xlabel="blocks", xscale="log", yscale="log")
middle.set_xticks(depths, [str(depth) for depth in depths])
middle.set_xticks([], minor=True)
middle.axhline(math.log(10), color="gray", lw=0.5)
for model in models:
    if model in cifar:
        [line] = right.plot(cifar[model]["epoch"], cifar[model]["train_error"], label=f"{model}, train")
        right.plot(cifar[model]["epoch"], cifar[model]["test_error"], "--", color=line.get_color(), lw=0.8)
if missing:
    right.text(0.5, 0.5, "not measured:\n" + "\n".join(missing), ha="center", transform=right.transAxes)
right.set(title="CIFAR-10: error (dashed: test)", xlabel="epoch", ylabel="%")
for axis in (left, middle, right) if cifar else (left, middle):
    axis.legend(fontsize=8)

# %%
# **Verdict.** Plain: the deepest must lose by a factor of two, far beyond the spread over seeds. Residual:
# no more than three standard deviations of a run above the shallowest, and never above a tenth of chance,
# ln 10.
plain, residual = final["plain"].mean(1), final["residual"].mean(1)
at_least(f"plain: training loss, {depths[-1]} blocks to {depths[0]}", 2.0, plain[-1] / plain[0])
rise = (errors["plain"][-1] - errors["plain"][0]).mean()
at_least(f"plain: rise of the training error, {depths[0]} to {depths[-1]} blocks", 0.05, rise)
bound = residual[0] + 3 * final["residual"].std(1).max()
at_most(f"residual: training loss at {depths[-1]} blocks", bound, residual[-1])
at_most(f"residual: training error at {depths[-1]} blocks", 0.05, errors["residual"][-1].mean())
at_least(f"training loss at {depths[-1]} blocks, plain to residual", 5.0, plain[-1] / residual[-1])

# %%
# On CIFAR-10 the last epoch's training errors are compared, in percent; ResNet-56 may be as bad as
# ResNet-20 and no worse.
if not missing:
    last = {model: cifar[model]["train_error"][-1] for model in models}
    at_least("CIFAR-10: training error of plain56 above plain20", last["plain20"], last["plain56"])
    at_most("CIFAR-10: training error of resnet56, at most resnet20's", last["resnet20"], last["resnet56"])
