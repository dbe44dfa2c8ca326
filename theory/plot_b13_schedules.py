r"""
B13 · Staircase and cosine
==========================

**Claim.** With the noise of batches the loss does not fall below a floor that the learning rate sets, so
that a staircase of rates gives a staircase of losses: it falls where the rate does, within
:math:`1/(\eta\lambda)` updates. For a quadratic of curvature :math:`\lambda` with gradient noise of
variance :math:`s^2`, the mean square of w and its floor are

.. math:: v_{k+1} = (1 - \eta_k \lambda)^2\, v_k + \eta_k^2 s^2, \qquad
   v_\infty = \frac{\eta\, s^2}{\lambda\,(2 - \eta\lambda)},

under any schedule. A cosine has no stairs: its loss falls all along.

**Assumptions.** SGD without momentum for the formula; the run on the digits has the momentum of its recipe.
The two runs differ in the schedule alone: the same weights at first, the same batches, the same largest
rate.

**Not claimed.** That either ends lower. The floor at the end is that of the last rate, and there the
cosine's goes to 0 and the staircase's to a hundredth; which one is lower after a given number of updates
depends on the largest rate. The page compares the ends and asks only that both have learnt.

**Source.** Murata, *A Statistical Study of On-line Learning* (1998); Loshchilov & Hutter, *SGDR* (2017),
arXiv:1608.03983; He et al. (2015), arXiv:1512.03385, section 4.2, for the stairs.

The picture: both schedules; the mean loss of the noisy quadratic; the training loss on the digits.

On CIFAR-10 the same pair is

.. code-block:: console

   for schedule in step cosine; do
       resode train --model resnet20 --data cifar10 --data-dir PATH --recipe fast --ema 0 \
           --schedule $schedule --run-dir runs/$schedule
   done
   resode compare runs/step runs/cosine
"""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode.networks import ResidualMLP
from resode.training.data.datasets import load_data
from resode.training.recipe import make_recipe
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_most

seeds, updates, walkers = (4, 240, 2000) if FAST else (12, 480, 8000)
schedules = {
    name: make_recipe("digits", schedule=name, lr=0.1, warmup_updates=0) for name in ("step", "cosine")
}
rates = {name: [r.learning_rate(k, updates) for k in range(updates)] for name, r in schedules.items()}

# %%
# Prediction
# ----------
# The rates by hand: a tenth at half of the run and at three quarters; half a cosine. The noisy quadratic by
# its recursion, with λ = 2 and s = 1, from w = 1.
curvature, noise = 2.0, 1.0


def by_hand(name, k):
    share = k / updates
    if name == "step":
        return 0.1 * 0.1 ** ((share >= 0.5) + (share >= 0.75))
    return 0.05 * (1 + math.cos(math.pi * share))


def recursion(name):
    values = [1.0]
    for k in range(updates):
        eta = by_hand(name, k)
        values.append((1 - eta * curvature) ** 2 * values[-1] + eta**2 * noise**2)
    return torch.tensor(values)


predicted = {name: recursion(name) for name in schedules}
floor = {eta: eta * noise**2 / (curvature * (2 - eta * curvature)) for eta in (0.1, 0.01)}

# %%
# Measurement: the noisy quadratic
# --------------------------------
# Many walkers take the steps of SGD with the recipe's own rates.
mean_square, spread = {}, {}
for name in schedules:
    generator = torch.Generator().manual_seed(shifted(0))
    w, squares = torch.ones(walkers, dtype=torch.float64), [torch.ones(walkers, dtype=torch.float64)]
    for eta in rates[name]:
        gradient = curvature * w + noise * torch.randn(walkers, generator=generator, dtype=torch.float64)
        w = w - eta * gradient
        squares.append(w.square())
    mean_square[name] = torch.stack([s.mean() for s in squares])
    spread[name] = torch.stack([s.std() for s in squares]) / math.sqrt(walkers)

# %%
# Measurement: one run, two schedules
# -----------------------------------
# A residual perceptron on the digits, with the optimizer of `resode train`: SGD with Nesterov's momentum,
# batches of 8 and a largest rate of 0.01. Its stairs are drawn and not claimed: from seed to seed the fall at
# a milestone varies by as much as it is.
digits = load_data("digits")
images = (digits.train_images.flatten(1) / 255 - digits.mean[0]) / digits.std[0]
labels = digits.train_labels


def trained(recipe, seed):
    """The loss on all training images, ten times in a hundred updates."""
    torch.manual_seed(shifted(seed))
    network = ResidualMLP(4, in_features=64, width=32)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov
    )
    generator, losses = torch.Generator().manual_seed(shifted(seed)), []
    for k in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(k, updates)
        if k % every == 0:
            with torch.no_grad():
                losses.append(float(nn.functional.cross_entropy(network(images), labels)))
        batch = torch.randint(len(images), (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()
    return losses


every = updates // 48
losses = {
    name: torch.tensor([trained(replace(recipe, lr=0.01), seed) for seed in range(seeds)])
    for name, recipe in schedules.items()
}  # (seeds, 48)

# %%
# Figure
# ------
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for name, color in (("step", "C0"), ("cosine", "C1")):
    left.plot(rates[name], color=color, label=name)
    middle.semilogy(mean_square[name], color=color, label=name)
    middle.semilogy(predicted[name], "k:", lw=1)
    at = torch.arange(losses[name].shape[1]) * every
    right.semilogy(at, losses[name].log().mean(0).exp(), color=color, label=name)
middle.semilogy([], "k:", label="recursion")
left.set(title="learning rate", xlabel="update")
middle.set(title="noisy quadratic", xlabel="update", ylabel="mean of w²")
right.set(title="digits: training loss", xlabel="update", ylabel="cross entropy")
for axis in (left, middle, right):
    axis.legend(fontsize=8)
    for share in (0.5, 0.75):
        axis.axvline(share * updates, color="gray", lw=0.5, ls=":")

# %%
# Verdict
# -------
# The walkers' means scatter by their standard errors; over hundreds of updates that are correlated the
# worst of them stays within five.
for name in schedules:
    worst = max(abs(rate - by_hand(name, k)) for k, rate in enumerate(rates[name]))
    agree(f"{name}: rate against the formula, worst update", 0, worst, atol=1e-12)
    off = (mean_square[name] - predicted[name])[1:].abs() / spread[name][1:]
    at_most(f"{name}: mean square against the recursion, worst in standard errors", 5, off.max())
before, after = (int(share * updates) for share in (0.5, 0.75))
error = 4 * float(spread["step"][before])
agree("step: floor before the first milestone", floor[0.1], mean_square["step"][before], atol=error)
agree("  and after it, at a tenth of the rate, from the recursion", predicted["step"][after],
      mean_square["step"][after], atol=4 * float(spread["step"][after]))  # fmt: skip
for name, found in losses.items():
    at_most(f"digits, {name}: loss at the end, a quarter of chance", math.log(10) / 4, found[:, -4:].mean())
