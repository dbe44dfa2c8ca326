r"""
C5 · One constraint, three uses
===============================

**Claim.** Gradient descent :math:`x \leftarrow x - \eta\nabla f(x)` is a residual block with
:math:`F = -\nabla f`. The step of a network in depth, the step of an ODE solver and the learning rate are
therefore held by the same :math:`\eta\lambda` constraint; with the Hessian's largest eigenvalue,

.. math:: |1 - \eta\lambda| < 1 \text{ for all } \lambda > 0 \quad\Longleftrightarrow\quad
          0 < \eta < \frac{2}{\lambda_{\max}}.

**Assumptions.** A quadratic loss, or any loss close to a minimum; all data in every update, no momentum (with
momentum β the limit is :math:`2(1 + \beta)/\lambda_{\max}`).

**Not claimed.** That training above the limit diverges where the loss is not quadratic, as is often said.
Networks started with a rate 1.3 times their limit do not: within some updates each has moved to where the
Hessian allows the rate, and stays near the edge of stability while the loss keeps falling.

**Source.** Polyak, *Some methods of speeding up the convergence of iteration methods*, USSR Comput. Math. 4
(1964); Cohen, Kaur, Li, Kolter & Talwalkar, *Gradient descent on neural networks typically occurs at the edge
of stability* (2021), arXiv:2103.00065.

**The picture** shows the three uses on one quadratic, training on the quadratic model of a trained network's
loss just below and above its limit, and real networks above their first limit.
"""

# %%
# **Set-up.** A quadratic, :math:`f = \frac12 x^T H x` with eigenvalues 1, 3 and 8, as a field, as an ODE and
# as a loss.

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import resode
from resode.networks import build
from resode.training.data.datasets import load_data
from theory.measures.quadratic import QuadraticModel
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

DOUBLE = torch.float64
torch.manual_seed(shifted(0))
rotation = torch.linalg.qr(torch.randn(3, 3, dtype=DOUBLE)).Q
hessian = rotation @ torch.diag(torch.tensor([1.0, 3.0, 8.0], dtype=DOUBLE)) @ rotation.T
steepest = rotation[:, 2]
updates = 100 if FAST else 200


class Bowl(nn.Module):
    """−∇f as a field; its weights w as a model with the loss f(w)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(steepest.clone())

    def forward(self, x):
        return -x @ hessian if x is not None else self.w


def loss_of(w, _):
    return w @ hessian @ w / 2


# %%
# **Prediction.** 2/8, and for the network 2/λ from all eigenvalues of its Hessian, formed row by row below.

limit = 2 / 8

# %%
# **Measurement.** The three limits, and the three paths at 1 % below and above.


def three_paths(eta):
    """‖x‖ after each step: a stack's blocks, a solver's steps, and an optimizer's updates."""
    stack = resode.ResidualStack(Bowl(), depth=updates, step_size=eta)
    t = torch.arange(updates + 1, dtype=DOUBLE) * eta
    bowl = Bowl()
    optimizer, weights = torch.optim.SGD(bowl.parameters(), lr=eta), [steepest]
    with torch.no_grad():
        blocks = stack(steepest[None], return_path=True)[1][:, 0]
        steps = resode.odeint(lambda t, x: -hessian @ x, steepest, t, method="euler", n_steps=1)
    for _ in range(updates):
        optimizer.zero_grad()
        loss_of(bowl(None), None).backward()
        optimizer.step()
        weights.append(bowl.w.detach().clone())
    return [path.norm(dim=1) for path in (blocks, steps, torch.stack(weights))]


paths = {c: three_paths(c * limit) for c in (0.99, 1.01)}
as_depth = float(resode.max_stable_step(Bowl(), torch.zeros(1, 3, dtype=DOUBLE))[0].detach())
as_ode = resode.max_stable_step(-hessian)
as_rate = resode.max_learning_rate(Bowl(), loss_of, (None, None))

# %%
# Residual perceptrons on 200 digits with a squared loss, each trained by plain gradient descent at 1.3 times
# its limit at the start. They start in places of very different sharpness: limits differ by a factor of five.

data = load_data("digits")
x = (data.train_images[:200].flatten(1).to(DOUBLE) / 255 - 0.3) / 3
y = nn.functional.one_hot(data.train_labels[:200], 10).to(DOUBLE)
seeds = 6


def squared(output, target):
    return (output - target).square().sum(1).mean()


def descended(seed):
    """A network, its loss before every update, and its limit over the rate before every hundredth."""
    torch.manual_seed(shifted(seed))
    network = build("residual_mlp2", in_features=64, width=8, activation="tanh").double()
    rate = 1.3 * resode.max_learning_rate(network, squared, (x, y))
    optimizer, losses, limits = torch.optim.SGD(network.parameters(), lr=rate), [], []
    for update in range(301 if FAST else 801):
        if update % 100 == 0:
            limits.append(resode.max_learning_rate(network, squared, (x, y), tol=1e-2) / rate)
        optimizer.zero_grad()
        loss = squared(network(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    return network, losses, limits


networks, losses, limits = zip(*(descended(seed) for seed in range(seeds)), strict=True)
network, losses, limits = networks[0], np.array(losses), np.array(limits)  # (seeds, updates), (seeds, …)

# %%
# The first one's limit then, from Hessian-vector products, beside that of the whole Hessian; and training on
# the quadratic model of the loss, 1 % below and above it. A network's Hessian has negative eigenvalues too,
# along which the model falls without bound whatever the rate: training stays in the span of the eigenvectors
# :math:`v_i` with :math:`\lambda_i > 0`, up to those that rounding leaves undecided. There every update
# multiplies the deviation from the lowest point along :math:`v_i` by :math:`1 - \eta\lambda_i`, and the
# model's loss is
#
# .. math:: L + \sum_i \frac{\lambda_i}{2}\bigl((1 - \eta\lambda_i)^{2n} a_i^2 - r_i^2\bigr),
#
# with :math:`r_i = -g \cdot v_i / \lambda_i` the lowest point and :math:`a_i` the deviation at the start.

names = [name for name, _ in network.named_parameters()]
sizes = [p.numel() for p in network.parameters()]


def loss_at(flat):
    pieces = zip(names, flat.split(sizes), network.parameters(), strict=True)
    weights = {name: piece.reshape(p.shape) for name, piece, p in pieces}
    return squared(torch.func.functional_call(network, weights, (x,)), y)


whole = torch.autograd.functional.hessian(
    loss_at, torch.cat([p.detach().flatten() for p in network.parameters()])
)
eigenvalues, vectors = np.linalg.eigh(whole.numpy())
sharpest, direction = float(eigenvalues[-1]), torch.as_tensor(vectors[:, -1])
from_products = resode.max_learning_rate(network, squared, (x, y))
with_momentum = resode.max_learning_rate(network, squared, (x, y), momentum=0.9)


upward = torch.as_tensor(vectors[:, eigenvalues > 1e-6 * sharpest])  # (parameters, eigenvectors)
positive = torch.as_tensor(eigenvalues[eigenvalues > 1e-6 * sharpest])


def on_quadratic_model(eta):
    """Deviation along the steepest direction, and the model's loss, by update; and the loss predicted."""
    model = QuadraticModel(network, squared, (x, y))
    lowest = -(model.gradient @ upward) / positive
    rest, start = float(lowest[-1]), torch.zeros_like(lowest)
    start[-1] = rest + 0.1
    factors = (1 - eta * positive) ** (2 * (updates - 1))
    law = model.loss + float((positive / 2 * (factors * (start - lowest) ** 2 - lowest**2)).sum())
    with torch.no_grad():
        model.displacement += upward @ start
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    deviations, values = [], []
    for _ in range(updates):
        optimizer.zero_grad()
        value = model()
        value.backward()
        model.displacement.grad = upward @ (upward.T @ model.displacement.grad)
        deviations.append(abs(float(model.displacement.detach() @ direction) - rest))
        values.append(float(value.detach()))
        optimizer.step()
    return np.array(deviations), np.array(values), law


sides = {c: on_quadratic_model(c * 2 / sharpest) for c in (0.99, 1.01)}

# %%
# **Figure.**

figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
for c, colour in ((0.99, "#0072B2"), (1.01, "#D55E00")):
    for path, style, use in zip(
        paths[c], ("-", "--", ":"), ("blocks", "solver steps", "updates"), strict=True
    ):
        axes[0].semilogy(path, style, color=colour, label=f"η = {c:g}·2/8, {use}")
    axes[1].semilogy(sides[c][0], color=colour, label=f"η = {c:g}·2/λ_max")
axes[0].margins(y=0.4)  # room for the legend
axes[0].set(xlabel="step", ylabel="‖x‖", title="A quadratic: three uses, one path")
axes[1].set(
    xlabel="update", ylabel="deviation, steepest direction", title="Quadratic model of a trained network"
)
axes[2].plot(losses.T, color="black", linewidth=0.7, label=["loss"] + (seeds - 1) * ["_"])
axes[2].plot(
    range(0, losses.shape[1], 100),
    limits.T,
    "o-",
    color="#009E73",
    linewidth=0.7,
    markersize=3,
    label=["2/λ_max over η"] + (seeds - 1) * ["_"],
)
axes[2].axhline(1, color="#009E73", linewidth=0.7)
axes[2].set(xlabel="update", ylim=(0, 2), title="The networks themselves, at 1.3 of their limits")
for ax in axes:
    ax.legend(fontsize=8, loc="upper right" if ax is axes[2] else "upper left")

# %%
# **Verdict.** On a quadratic along an eigenvector all is closed form; the tolerances are rounding and that of
# the eigenvalue. Networks end at 0.9 to 1.4 of their limit: a few per cent to either side of the edge, or,
# from an unusually sharp start, somewhat beyond, in flatter places, whence they come back slowly. Six of them
# average to 1.1 with a standard error of 0.06.

for name, found in (("depth", as_depth), ("an ODE solver", as_ode), ("learning", as_rate)):
    agree(f"largest step of {name}, λ_max = 8", limit, found, rtol=1e-6)
for c, (blocks, steps, weights) in paths.items():
    law = updates * math.log(abs(1 - 8 * c * limit))
    for name, path in (("blocks", blocks), ("solver steps", steps), ("updates", weights)):
        agree(f"ln ‖x‖ after {updates} {name} at {c:g} of the limit", law, float(path[-1].log()), rtol=1e-6)
agree("trained network's limit, from products and from all of H", 2 / sharpest, from_products, rtol=1e-6)
agree("with momentum 0.9", 2 * 1.9 / sharpest, with_momentum, rtol=1e-6)
for c, (deviations, values, predicted) in sides.items():
    law = (updates - 1) * math.log(abs(1 - 2 * c))
    measured = math.log(deviations[-1] / deviations[0])
    agree(f"ln deviation on the quadratic model at {c:g} of the limit", law, measured, rtol=1e-5)
    agree("  and its loss there, from all eigenvalues", predicted, values[-1], rtol=1e-6, atol=1e-6)
agree("networks' limit at the start over their rate", 1 / 1.3, limits[:, 0].mean(), rtol=0.02)
at_most("yet their loss, last over first, mean", 0.5, (losses[:, -1] / losses[:, 0]).mean())
at_least("because the limit has moved: 2/λ_max over η, mean", 0.85, limits[:, -1].mean())
at_most("and no further than to the edge", 1.3, limits[:, -1].mean())
