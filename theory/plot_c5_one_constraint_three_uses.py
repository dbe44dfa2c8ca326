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

**Not claimed.** That training above the limit diverges where the loss is not quadratic, as is often said. A
network started with a rate 1.3 times its limit does not: within some updates it has moved to where the
Hessian allows the rate, and stays at the edge of stability while the loss keeps falling.

**Source.** Polyak, *Some methods of speeding up the convergence of iteration methods*, USSR Comput. Math. 4
(1964); Cohen, Kaur, Li, Kolter & Talwalkar, *Gradient descent on neural networks typically occurs at the edge
of stability* (2021), arXiv:2103.00065.

**The picture** shows the three uses on one quadratic, training on the quadratic model of a trained network's
loss just below and above its limit, and the real network above its first limit.
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
from theory.verdict import FAST, agree, at_least, at_most

DOUBLE = torch.float64
torch.manual_seed(0)
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
# A residual perceptron on 200 digits with a squared loss, trained by plain gradient descent at a rate that is
# above its limit at the start.

data = load_data("digits")
x = (data.train_images[:200].flatten(1).to(DOUBLE) / 255 - 0.3) / 3
y = nn.functional.one_hot(data.train_labels[:200], 10).to(DOUBLE)
torch.manual_seed(0)
network = build("residual_mlp2", in_features=64, width=8, activation="tanh").double()
rate, losses, rates = 0.06, [], []


def squared(output, target):
    return (output - target).square().sum(1).mean()


optimizer = torch.optim.SGD(network.parameters(), lr=rate)
for update in range(301 if FAST else 801):
    if update % 100 == 0:
        rates.append(resode.max_learning_rate(network, squared, (x, y), tol=1e-2))
    optimizer.zero_grad()
    loss = squared(network(x), y)
    loss.backward()
    losses.append(float(loss.detach()))
    optimizer.step()

# %%
# Its limit then, from Hessian-vector products, beside that of the whole Hessian; and training on the
# quadratic model of the loss, 1 % below and above it. The deviation from the model's stationary point is
# followed along the steepest direction, where every update multiplies it by
# :math:`1 - \eta\lambda_{\max}`.

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


def on_quadratic_model(eta):
    """Deviation along the steepest direction, and the model's loss, by update."""
    model = QuadraticModel(network, squared, (x, y))
    rest = -float(model.gradient @ direction) / sharpest
    with torch.no_grad():
        model.displacement += (rest + 0.1) * direction
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    deviations, values = [], []
    for _ in range(updates):
        optimizer.zero_grad()
        value = model()
        value.backward()
        deviations.append(abs(float(model.displacement.detach() @ direction) - rest))
        values.append(float(value.detach()))
        optimizer.step()
    return np.array(deviations), np.array(values)


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
axes[2].plot(losses, color="black", label="loss")
axes[2].plot(
    range(0, len(losses), 100), np.array(rates) / rate, "o-", color="#009E73", label="2/λ_max over η"
)
axes[2].axhline(1, color="#009E73", linewidth=0.7)
axes[2].set(xlabel="update", ylim=(0, 2), title=f"The network itself, trained at η = {rate:g}")
for ax in axes:
    ax.legend(fontsize=8, loc="upper right" if ax is axes[2] else "upper left")

# %%
# **Verdict.** On a quadratic along an eigenvector all is closed form; the tolerances are rounding and that of
# the eigenvalue.

for name, found in (("depth", as_depth), ("an ODE solver", as_ode), ("learning", as_rate)):
    agree(f"largest step of {name}, λ_max = 8", limit, found, rtol=1e-6)
for c, (blocks, steps, weights) in paths.items():
    law = updates * math.log(abs(1 - 8 * c * limit))
    for name, path in (("blocks", blocks), ("solver steps", steps), ("updates", weights)):
        agree(f"ln ‖x‖ after {updates} {name} at {c:g} of the limit", law, float(path[-1].log()), rtol=1e-6)
agree("trained network's limit, from products and from all of H", 2 / sharpest, from_products, rtol=1e-6)
agree("with momentum 0.9", 2 * 1.9 / sharpest, with_momentum, rtol=1e-6)
for c, (deviations, _) in sides.items():
    law = (updates - 1) * math.log(abs(1 - 2 * c))
    measured = math.log(deviations[-1] / deviations[0])
    agree(f"ln deviation on the quadratic model at {c:g} of the limit", law, measured, rtol=1e-5)
at_least("loss of the quadratic model just above, last over first", 5, sides[1.01][1][-1] / sides[1.01][1][0])
at_most("and just below", 1.0, sides[0.99][1][-1] / sides[0.99][1][0])
at_least("the network's own rate over its first limit", 1.2, rate / rates[0])
at_most("yet its loss, last over first", 0.5, losses[-1] / losses[0])
agree("because its limit has moved to the rate: 2/λ_max over η", 1.0, rates[-1] / rate, atol=0.15)
