r"""
B2 · The unrolled sum
=====================

**Claim.** With identity shortcuts and nothing after the addition the state is a sum over all blocks,

.. math:: x_L = x_0 + \sum_l \eta\,F_l(x_l),

exactly. So one block taken away leaves all other terms in place, if on changed inputs, and a trained residual
network hardly notices; a plain network, :math:`x_L = F_L \circ \dots \circ F_1(x_0)`, loses everything.

**Assumptions.** The sum needs no training. The lesions are of networks trained on the digits, and counted in
wrong answers on images not trained on.

**Not claimed.** That it holds for every ResNet. A ReLU after the addition (the post-activation network)
breaks the sum, and at a change of width it has no meaning; pre-activation networks satisfy it within each
stage. The terms are not independent: :math:`F_l` still depends on all blocks before it.

**Source.** Veit, Wilber & Belongie, *Residual Networks Behave Like Ensembles of Relatively Shallow Networks*
(2016), arXiv:1605.06431; Greff, Srivastava & Schmidhuber (2017), arXiv:1612.07771.

The picture: the sum's error in three networks; wrong answers without one block, and with two blocks swapped.
"""

import matplotlib.pyplot as plt
import torch

from resode.analysis import lesion_study, reordering_study
from resode.networks import PlainMLP, ResidualMLP, build
from resode.training.data.datasets import load_data
from resode.training.fit import fit
from theory.measures.unrolled import unrolled_sum
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

# %%
# Prediction
# ----------
# The sum misses by rounding, 1e-15, or, with a ReLU after the addition, by a share of the state. A network
# that has lost everything guesses: 90 % wrong.
#
# Measurement: the sum
# --------------------
# In float64: a residual perceptron, the stages of a pre-activation and of a post-activation ResNet-20.
torch.manual_seed(shifted(0))
pictures = torch.randn(4, 1, 8, 8, dtype=torch.float64)
sums = {
    "perceptron": unrolled_sum(ResidualMLP(30, in_features=64).double().eval(), pictures),
    "pre-activation": unrolled_sum(build("odenet20", in_channels=1).double().eval(), pictures),
    "post-activation": unrolled_sum(build("resnet20", in_channels=1).double().eval(), pictures),
}

# %%
# Two trained networks
# --------------------
# Equal depth, width and updates. A lesion takes one block away; of the plain network its input goes on
# instead.
digits = load_data("digits")
images, unseen = (
    (pixels.flatten(1) / 255 - digits.mean[0]) / digits.std[0]
    for pixels in (digits.train_images, digits.test_images)
)
target, depth = digits.test_labels, 8


def wrong(z, labels):
    return (z.argmax(1) != labels).double()


def trained(kind, seed):
    torch.manual_seed(shifted(seed))
    model = kind(depth, in_features=64, width=32)
    options = {"batch_size": 128, "learning_rate": 2e-3, "seed": shifted(seed)}
    fit(model, images, digits.train_labels, steps=150 if FAST else 600, **options)
    return model.eval()


def study(kind, blocks):
    """Wrong answers: of the networks, without each block, and with each pair of neighbours swapped."""
    own, lesions, swaps = [], [], []
    options = {"blocks": blocks, "loss_fn": wrong, "batch_size": 360}
    for seed in range(1 if FAST else 4):
        model = trained(kind, seed)
        own.append(wrong(model(unseen), target).mean())
        lesions.append(torch.tensor([s.loss for s in lesion_study(model, unseen, target, **options)]))
        swapped = reordering_study(model, unseen, target, max_pairs=depth - 1, **options)
        swaps.append(torch.tensor([s.loss for s in swapped]))
    return torch.stack(own).mean(), torch.stack(lesions), torch.stack(swaps)


residual_own, residual_lesions, residual_swaps = study(ResidualMLP, None)
plain_own, plain_lesions, plain_swaps = study(PlainMLP, "blocks.*")

# %%
# Figure
# ------
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for position, runs in enumerate(sums.values()):
    left.semilogy([position + 0.2 * i for i in range(len(runs))], [max(r.error, 1e-17) for r in runs], "o")
left.set_xticks(range(3), sums)
left.set(title="error of the sum, by stage", ylabel="relative to the state", ylim=(1e-17, 2))
pairs = ((residual_lesions, residual_own, "residual", "o-"), (plain_lesions, plain_own, "plain", "s--"))
for lesions, own, name, style in pairs:
    [line] = middle.plot(range(1, depth + 1), lesions.mean(0), style, label=name)
    middle.axhline(own, color=line.get_color(), lw=0.7, ls=":")
for swaps, name, style in ((residual_swaps, "residual", "o-"), (plain_swaps, "plain", "s--")):
    right.plot(range(1, depth), swaps.mean(0), style, label=name)
middle.set(title="without one block (dotted: whole network)", xlabel="block", ylabel="share of wrong answers")
right.set(title="two neighbours swapped", xlabel="first of them")
for axis in (middle, right):
    axis.axhline(0.9, color="gray", lw=0.5)
    axis.set_ylim(0, 1)
    axis.legend()

# %%
# Verdict
# -------
# Rounding of 30 additions in float64 is 1e-15. Chance answers 90 % wrong: the plain network is taken as
# broken above half of that on average, the residual one as whole below a quarter of it.
worst = {name: max(run.error for run in runs) for name, runs in sums.items()}
agree("error of the sum, residual perceptron", 0.0, worst["perceptron"], atol=1e-14)
agree("error of the sum, stages of the pre-activation network", 0.0, worst["pre-activation"], atol=1e-14)
broken = min(run.error for run in sums["post-activation"])
at_least("error of the sum, stages with a ReLU after the addition", 0.01, broken)
agree("stages that the changes of width cut the network into", 3, len(sums["pre-activation"]))
at_most("wrong answers of the whole networks", 0.15, max(residual_own, plain_own))
at_most("residual: wrong answers without one block, mean", 0.225, residual_lesions.mean())
at_least("plain: wrong answers without one block, mean", 0.45, plain_lesions.mean())
at_most("residual: wrong answers with neighbours swapped, mean", 0.225, residual_swaps.mean())
at_least("plain: wrong answers with neighbours swapped, mean", 0.45, plain_swaps.mean())
