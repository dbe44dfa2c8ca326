r"""
C9 · The field that a stack follows
===================================

**Claim.** The blocks :math:`x \leftarrow \Phi_h(x)` of a method of order p do not follow the flow of F,
but, up to a rest that falls faster, that of another field,

.. math:: \tilde F = F + h^p f_{p+1} + h^{p+1} f_{p+2} + \ldots,

each term a sum of elementary differentials of F with coefficients of the method alone. For Euler, the
residual block,

.. math:: \tilde F = F - \frac h2 F'F + h^2 \Bigl(\frac13 F'F'F + \frac1{12} F''(F, F)\Bigr) - \ldots

Over a fixed depth time the stack stays within :math:`O(h^{p+m})` of the flow of the first m corrections. So
:math:`\|h^p f_{p+1}\| / \|F\|` tells, block by block, how far a network is from the ODE of its own F.

**Assumptions.** F is smooth: a ReLU's derivatives say nothing of its kinks. The weights are held in a block.

**Not claimed.** That the series converges. It is asymptotic: with the step fixed, terms help as long as
they fall, and then make it worse. For :math:`F(x) = -x` it is that of :math:`\ln(1 + z)` at
:math:`z = -h`, and from h = 1 on there is nothing that it could converge to: the step jumps over the rest
point, which no flow on a line does. Nor is a network that is far from its F's flow near no ODE: it may be
near that of :math:`\tilde F`.

**Source.** Hairer, Lubich & Wanner, *Geometric Numerical Integration* (2006), IX.

**The picture** shows how the drift falls with the step for four methods, how far a network trained on the
digits is from the flows of F and its corrections as the step grows, and what the series does at a fixed step.
"""

# %%
# **Set-up.** A smooth random field, shared by all blocks, in float64; and the digits, learnt by eight Euler
# blocks with tanh at η = 1/4.

import copy
import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode import METHODS, ResidualStack, distance_from_ode, modified_field
from resode.networks import build
from resode.training.data.datasets import load_data
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

torch.manual_seed(shifted(0))
field = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
x = torch.randn(2, 3, dtype=torch.float64)


def vectors(images):
    return (images.flatten(1).float() / 255 - 0.3) / 0.37


data = load_data("digits")
images, labels = vectors(data.train_images), data.train_labels
test = vectors(data.test_images).double()
LONG = 15  # epochs of a longer run, at full size
EPOCHS, SEEDS = ((6,), 2) if FAST else ((6, LONG), 5)


def trained(seed):
    """The digits' network after each of EPOCHS epochs."""
    torch.manual_seed(shifted(seed))
    network = build("residual_mlp8", in_features=64, width=32, step_size=0.25, activation="tanh")
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(shifted(seed))
    for epoch in range(1, max(EPOCHS) + 1):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
        if epoch in EPOCHS:
            yield epoch, copy.deepcopy(network).eval().double()


def looked_at(network):
    """Its stack, the states before the first block of 64 test images, and its accuracy."""
    [stack], kept = network.stacks(), []
    handle = stack.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        accuracy = float((network(test).argmax(1) == data.test_labels).double().mean())
    handle.remove()
    return stack, kept[0][:64], accuracy


networks = [
    (epoch, *looked_at(network)) for seed in range(SEEDS) for epoch, network in trained(seed)
]
stack, states = networks[0][1:3]

# %%
# **Prediction.** Slopes p + m of the drift in the step, for m corrections.

cases = [(name, m) for name in ("euler", "midpoint", "heun3", "rk4") for m in (1, 2)]
if FAST:
    cases = [(name, 1) for name in ("euler", "midpoint")] + [("euler", 2)]
predicted = {(name, m): METHODS[name].order + m for name, m in cases}

# %%
# **Measurement.** The drift between a stack and the flow that it should follow, as the depth time 1 is cut
# into more blocks. The flows are solved by dopri8.


def drift(stack, start, order):
    """‖stack − flow‖ / ‖stack‖; order 0 is the flow of F itself."""
    with torch.no_grad():
        end = stack(start)
        if order:
            flow = modified_field(stack, order).flow(start, n_steps=1)
        else:
            fine = ResidualStack(
                list(stack.fields) if not stack.shared else stack.fields[0],
                depth=stack.depth,
                step_size=stack.step_size,
                solver="rk4",
                substeps=16,
            )
            flow = fine(start)
    return float((end - flow).norm() / end.norm())


depths = (3, 6)
drifts = {
    (name, m): [drift(ResidualStack(field, depth=n, step_size=1 / n, solver=name), x, m) for n in depths]
    for name, m in cases
}
slopes = {case: math.log2(coarse / fine) for case, (coarse, fine) in drifts.items()}

# %%
# The networks at their own step: the spread over seeds. Longer training makes corrections larger: after 15
# epochs, of five seeds, one is 3 % above the last bound.

own = {epoch: [] for epoch in EPOCHS}
for epoch, trained_stack, start, _ in networks:
    own[epoch].append([drift(trained_stack, start, m) for m in (0, 1, 2)])
for epoch, values in own.items():
    spread = [f"{min(column):.2g} to {max(column):.2g}" for column in zip(*values, strict=True)]
    print(f"{epoch} epochs, {SEEDS} seeds: F itself {spread[0]}, one correction {spread[1]}, two {spread[2]}")

# %%
# One of them at other steps.

etas = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
orders = (0, 1, 2)
grid = {}
for eta in etas:
    stack.step_size = eta
    grid[eta] = [drift(stack, states, m) for m in orders]
stack.step_size = 0.25
distance = distance_from_ode(stack, states).mean(1)
print("distance from an ODE, block by block:", [round(float(d), 3) for d in distance])

# %%
# Where it stops helping: F(x) = −x, one block. The truth is the logarithm of the step's factor.

decay = nn.Linear(1, 1, bias=False).double()
nn.init.constant_(decay.weight, -1.0)
terms = range(1, 9)
series = {}
for h in (0.5, 0.9, 1.5):
    block = ResidualStack(decay, depth=1, step_size=h)
    with torch.no_grad():
        series[h] = [float(modified_field(block, m)(torch.ones(1, 1, dtype=torch.float64))) for m in terms]

# %%
# **Figure.**

figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
for (name, m), values in drifts.items():
    style = "o-" if m == 1 else "s--"
    axes[0].loglog([1 / n for n in depths], values, style, label=f"{name}, {m} correction{'s' * (m > 1)}")
axes[0].set(xlabel="step size η", ylabel="drift from the flow of F̃", title="Slopes p + 1 and p + 2")
axes[0].legend(fontsize=7)
for m in orders:
    axes[1].loglog(etas, [grid[eta][m] for eta in etas], "o-", label=f"F̃ with {m}" if m else "F itself")
axes[1].axvline(0.25, color="black", linestyle=":", label="as trained")
axes[1].set(xlabel="step size η", ylabel="‖x_L − flow‖ / ‖x_L‖", title="Eight blocks on the digits")
axes[1].legend(fontsize=8)
for h, values in series.items():
    [line] = axes[2].plot(terms, values, "o-", label=f"h = {h:g}")
    if h < 1:
        axes[2].axhline(math.log(1 - h) / h, color=line.get_color(), linestyle=":")
axes[2].set(xlabel="corrections", ylabel="F̃(1)", title="F(x) = −x (dotted: its limit)", ylim=(-8, 0))
axes[2].legend(fontsize=8)

# %%
# **Verdict.** Slopes to a tenth. Of the networks' drifts the largest is compared; the bounds lie more
# than three standard deviations above the seeds' mean. At η = 4 the corrections are larger than what they
# correct.

for (name, m), slope in slopes.items():
    agree(f"slope of {name}'s drift with {m} correction(s)", predicted[name, m], slope, atol=0.1)
at_least("test accuracy of the networks on the digits, lowest", 0.93, min(n[3] for n in networks))
said = ("drift from the flow of F itself, η = 1/4, 6 epochs", "drift with one correction", "drift with two")
for name, bound, values in zip(said, (0.03, 0.003, 0.0006), zip(*own[6], strict=True), strict=True):
    at_most(f"{name}, largest", bound, max(values))
at_least("at η = 4, drift with two corrections over that of F itself", 1.0, grid[4.0][2] / grid[4.0][0])
agree("F̃(1) for F = −x, h = 1/2, 8 corrections (rest 2⁻⁸)", math.log(0.5) / 0.5, series[0.5][-1], atol=2**-8)
at_least(
    "at h = 3/2 the last term over the one before",
    1.0,
    (abs(series[1.5][-1] - series[1.5][-2]) / abs(series[1.5][-2] - series[1.5][-3])),
)
