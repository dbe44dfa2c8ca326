r"""
C11 · A solver drawn for each batch
===================================

**Claim.** A network trained with one solver learns that solver's steps, truncation errors included. Where
each batch draws its solver s from a few, with :math:`z_s` the logits under s, the loss that training lowers
is, to second order in their spread,

.. math::

   \mathbb E_s\, L(z_s) = L(\bar z) + \tfrac12\, \mathbb E_s\, (z_s - \bar z)^\top H (z_s - \bar z) + \ldots,
   \qquad \bar z = \mathbb E_s z_s,\quad H = \operatorname{diag}(p) - p p^\top .

The second term is a penalty on what the solvers disagree about, in the loss's own metric. By backward error
analysis (C9) they follow the flows of :math:`F + c_s\, h F'F + \ldots`, with :math:`c = -\frac12` for Euler,
:math:`-\frac14` for its two half steps and 0 for midpoint: all of the spread is one vector to leading order,
what the logits see of the first correction. It is also what they see of the distance from an ODE. So drawing
drives that out, and every finer solver, drawn or not, then gives the same.

**Assumptions.** The spread is small enough for its square to tell. F is smooth. Solvers of different order
or step are drawn; two of one order with the same step would agree on the wrong field.

**Not claimed.** That the states follow the flow more closely by as much: what the loss does not see costs
nothing and stays. The distance from an ODE in the states' own norm hardly falls.

**Source.** Ott et al., *ResNet After All?* (ICLR 2021), for networks that learn their solver's steps; Bishop,
Neural Computation 7 (1995), for noise in training as a penalty; Hairer, Lubich & Wanner, *Geometric Numerical
Integration* (2006), IX.

**The picture** shows, over seeds, the penalty, the distance from an ODE and the points lost under rk4: when
the drawing begins, and at the end of the run with Euler alone and with a solver drawn for each batch.
"""

# %%
# **Set-up.** Eight Euler blocks with tanh at η = 2 on the digits. Half of the run is Euler's; from there two
# copies go on, one with Euler, the other with a solver drawn from Euler, two half steps and midpoint.

import copy
from statistics import mean, stdev

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode import SwapProof, distance_from_ode, modified_field
from resode.blocks.solving import other_solver
from resode.networks import build
from resode.training.data.datasets import load_data
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

SEEDS, UPDATES = (4, 250) if FAST else (8, 400)
SOLVERS = (("euler", 1), ("euler", 2), ("midpoint", 1))


def vectors(images):
    return (images.flatten(1).float() / 255 - 0.3) / 0.37


data = load_data("digits")
images, labels = vectors(data.train_images), data.train_labels
test, targets = vectors(data.test_images), data.test_labels


def train(network, draws, first, last, generator):
    """Updates first … last − 1 of the run with Adam; solvers are drawn where `draws` is given."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for update in range(first, last):
        rows = torch.randint(len(images), (64,), generator=generator)
        with draws.batch(update, UPDATES) if draws else other_solver(network, None):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    return network


def trained(seed):
    """Networks when the drawing begins, and at the end of both ways."""
    torch.manual_seed(shifted(seed))
    network = build("residual_mlp8", in_features=64, width=32, step_size=2.0, activation="tanh")
    begun = train(network, None, 0, UPDATES // 2, torch.Generator().manual_seed(shifted(seed)))
    result = {"when it begins": begun}
    for way in ("Euler alone", "drawn"):
        other = copy.deepcopy(begun)
        draws = SwapProof(other, seed=seed) if way == "drawn" else None
        result[way] = train(
            other, draws, UPDATES // 2, UPDATES, torch.Generator().manual_seed(shifted(seed + 1))
        )
    return result


# %%
# **Prediction.** The spread costs half its square in the metric H, and midpoint's drift from Euler is twice
# that of two half steps, by their coefficients. Blocks that have the first correction taken out of their F,
# x ← x + η(2F − F̃), move the logits as the flow does, which rk4 is near. The penalty falls where solvers are
# drawn, that drift with it, and what rk4 loses, which is none of those drawn.

predicted_ratio = (-1 / 2 - 0) / (-1 / 2 + 1 / 4)

# %%
# **Measurement.** At the test images, in float64.


def without_correction(stack, x):
    """What the blocks give with their first correction taken out."""
    followed = modified_field(stack, order=1)
    for index in range(stack.depth):
        x = x + stack.step_size * (2 * stack.field(index)(x) - followed.block(index)(x))
    return x


def measured(network):
    network = copy.deepcopy(network).eval().double()
    [stack] = network.stacks()
    kept, logits = [], {}
    handle = stack.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        for solver, n in (*SOLVERS, ("rk4", 1)):
            with other_solver(network, solver, n):
                logits[solver, n] = network(test.double())
        handle.remove()
        handle = stack.register_forward_hook(lambda module, args, output: without_correction(stack, args[0]))
        corrected = network(test.double())
        handle.remove()
    several = torch.stack([logits[s] for s in SOLVERS])
    middle = several.mean(0)
    p, apart = middle.softmax(1), several - middle
    loss = [nn.functional.cross_entropy(z, targets) for z in (*several, middle)]
    own = logits["euler", 1]
    right = {s: float((z.argmax(1) == targets).double().mean()) for s, z in logits.items()}
    return {
        "penalty, measured": float(sum(loss[:-1]) / len(SOLVERS) - loss[-1]),
        "penalty, predicted": 0.5 * float(((p * apart**2).sum(-1) - (p * apart).sum(-1) ** 2).mean()),
        "distance from an ODE": float(distance_from_ode(stack, kept[0][:128]).mean()),
        "drift under rk4": float((logits["rk4", 1] - own).norm() / own.norm()),
        "drift predicted": float((corrected - own).norm() / own.norm()),
        "ratio of drifts": float((logits["midpoint", 1] - own).norm() / (logits["euler", 2] - own).norm()),
        "accuracy, %": 100 * right["euler", 1],
        "points lost under rk4": 100 * (right["euler", 1] - right["rk4", 1]),
    }


runs = [{way: measured(n) for way, n in trained(seed).items()} for seed in range(100, 100 + SEEDS)]
for way in runs[0]:
    print(
        f"{way}: " + ", ".join(f"{name} {mean(run[way][name] for run in runs):.3g}" for name in runs[0][way])
    )

# %%
# **Figure.**

figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
names = ("penalty, measured", "distance from an ODE", "points lost under rk4")
for ax, name in zip(axes, names, strict=True):
    for run in runs:
        begun = run["when it begins"][name]
        ax.plot([0, 1], [begun, run["Euler alone"][name]], "o-", color="#0072B2", alpha=0.6)
        ax.plot([0, 1], [begun, run["drawn"][name]], "s-", color="#D55E00", alpha=0.6)
    ax.set_xticks([0, 1], ["drawing begins", "end of the run"])
    ax.set(title=name, xlim=(-0.3, 1.3), ylim=(min(0, ax.get_ylim()[0]), None))
axes[0].plot([], [], "o-", color="#0072B2", label="Euler alone")
axes[0].plot([], [], "s-", color="#D55E00", label="a solver drawn for each batch")
axes[0].legend(fontsize=8)

# %%
# **Verdict.** The square tells up to a quarter too little where logits differ by a third (Euler alone), and
# less after the drawing, where they are near. Bounds lie three standard errors over the seeds from the means.


def ratio(name):
    """Drawn over Euler alone, the mean over seeds, and its standard error."""
    values = [run["drawn"][name] / run["Euler alone"][name] for run in runs]
    print(f"{name}: {mean(values):.3g} ± {stdev(values) / len(values) ** 0.5:.2g} of Euler alone")
    return mean(values)


def gain(name):
    """Drawn less Euler alone, the mean over seeds, and its standard error."""
    values = [run["drawn"][name] - run["Euler alone"][name] for run in runs]
    print(f"{name}: {mean(values):+.3g} ± {stdev(values) / len(values) ** 0.5:.2g} against Euler alone")
    return mean(values)


for way, tolerance in (("Euler alone", 0.35), ("drawn", 0.25)):
    both = [mean(run[way][f"penalty, {kind}"] for run in runs) for kind in ("predicted", "measured")]
    agree(f"{way}: what the spread of the solvers costs, in nats", *both, rtol=tolerance)
    both = [mean(run[way][name] for run in runs) for name in ("drift predicted", "drift under rk4")]
    agree(f"{way}: drift of the logits under rk4", *both, rtol=0.25)
drifts = mean(run["Euler alone"]["ratio of drifts"] for run in runs)
agree("drift of midpoint over that of two half steps", predicted_ratio, drifts, atol=0.2)
at_most("what the spread costs, drawn over Euler alone", 0.7, ratio("penalty, measured"))
at_most("drift of the logits under rk4, drawn over Euler alone", 0.9, ratio("drift under rk4"))
at_most("distance from an ODE in the states' norm, likewise", 1.1, ratio("distance from an ODE"))
at_most("points lost under rk4, drawn less Euler alone", 0.0, gain("points lost under rk4"))
at_least("accuracy as trained, drawn less Euler alone", -2.5, gain("accuracy, %"))
