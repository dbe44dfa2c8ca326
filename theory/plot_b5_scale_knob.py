r"""
B5 · Scale knob
===============

**Claim.** In :math:`y = x + \alpha F(x)` the number :math:`\alpha` scales the eigenvalues of the block to
:math:`1 + \alpha\lambda(J)`, and the loss falls with it at the rate :math:`dL/d\alpha = v^\top F(x)`, with
:math:`v` the gradient behind the block. The gradients before and behind a block turn against each other
where

.. math:: \alpha\, v^\top J v < -\lVert v\rVert^2 .

So the step at which a block's two gradients turn is read off one backward pass, :math:`\alpha = -\lVert
v\rVert^2 / (v^\top J v)`, before any step of that length is taken.

**Not claimed.** That gradients conflict as :math:`\alpha` grows, whatever :math:`J`. They do along an
eigenvector where :math:`\alpha\lambda` passes -1: there the iteration oscillates, and past -2 it diverges.
For a rotation, :math:`v^\top J v = 0`, the cosine is :math:`1/\sqrt{1 + \alpha^2}`: positive at any
:math:`\alpha`. Nor is the first block to turn known from the eigenvalues alone: it depends on :math:`v`.

**Assumptions.** Euler steps; one :math:`\alpha` for each block.

**Source.** He et al. (2016), arXiv:1603.05027, section 3.1; Bachlechner et al. (2020), arXiv:2003.04887;
Balduzzi et al. (2017), arXiv:1702.08591.

The picture: the cosine by block against :math:`\alpha` for a symmetric field and a rotation; a nonlinear
block; the slope of the loss in every block's step.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode import ResidualStack, max_stable_step
from resode.analysis import jacobian
from resode.fields import MLPField
from theory.measures.conflict import gradient_conflict
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least

torch.set_default_dtype(torch.float64)
torch.manual_seed(shifted(0))

# %%
# Prediction and measurement: a symmetric field
# ---------------------------------------------
# F(x) = Ax with eigenvalues -1 and -5, six blocks, and a loss whose gradient is (1, 1) at the end. By hand
# the gradient before block l is :math:`(1 + \alpha\lambda_i)^{L-l}` in each eigenvector.
eigenvalues = torch.tensor([-1.0, -5.0])
alphas = torch.linspace(0.02, 0.6, 30 if FAST else 117).tolist()
depth = 6


def linear(matrix):
    field = nn.Linear(2, 2, bias=False)
    field.weight.data.copy_(matrix)
    return field


def total(z, _):
    return z.sum(1)


def cosines(matrix, alpha):
    stack = ResidualStack(linear(matrix), depth=depth, step_size=alpha)
    return gradient_conflict(stack, torch.ones(1, 2), loss_fn=total)


def by_hand(alpha):
    factor = 1 + alpha * eigenvalues
    behind = factor ** torch.arange(depth - 1, -1, -1)[:, None]
    return nn.functional.cosine_similarity(behind, behind * factor, dim=1)


symmetric = torch.stack([cosines(torch.diag(eigenvalues), a).cosine[:, 0] for a in alphas])
predicted = torch.stack([by_hand(a) for a in alphas])
rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
turned = torch.stack([cosines(rotation, a).cosine[:, 0] for a in alphas])


def turning(cosine_at, low, high):
    """The α where a cosine changes its sign, by bisection."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cosine_at(middle) > 0 else (low, middle)
    return low


last = turning(lambda a: cosines(torch.diag(eigenvalues), a).cosine[-1, 0], 0.0, 0.6)
single = turning(lambda a: cosines(-2 * torch.eye(2), a).cosine.amin(), 0.0, 0.9)

# %%
# A nonlinear block
# -----------------
# The loss :math:`v^\top y` keeps v, and J is taken at x. Along the eigenvector of the symmetric part of J
# that is most negative the gradients turn at :math:`\alpha = -1/\lambda`; along the most positive they
# never do.
width = 8
field = MLPField(width, activation="tanh")
x = torch.randn(1, width)
dense = jacobian(field, x)[0]
parts, directions = torch.linalg.eigh((dense + dense.T) / 2)


def conflict(v, alpha):
    stack = ResidualStack(field, depth=1, step_size=alpha)
    return gradient_conflict(stack, x, loss_fn=lambda z, _: z @ v).cosine[0, 0]


measured_turn = turning(lambda a: conflict(directions[:, 0], a), 0.0, 10.0)
many = torch.logspace(-1.3, 1.3, 20 if FAST else 80).tolist()
never = torch.stack([conflict(directions[:, -1], a) for a in many])
falls = torch.stack([conflict(directions[:, 0], a) for a in many])


# The same turns read at a tiny step, from v and J alone: along that eigenvector, and along random
# directions.
def read_off(v):
    stack = ResidualStack(field, depth=1, step_size=1e-3)
    return float(gradient_conflict(stack, x, loss_fn=lambda z, _: z @ v).turning_step[0, 0])


read_turn, read_never = read_off(directions[:, 0]), read_off(directions[:, -1])
some = [directions[:, 0] + 0.05 * torch.randn(width) for _ in range(5)]
read_error = max(abs(read_off(v) / turning(lambda a, v=v: conflict(v, a), 0.0, 10.0) - 1) for v in some)

# By autograd's own function: ``jacobian`` takes a field, and warns of a whole block.
block = torch.autograd.functional.jacobian(lambda x: x + 0.3 * field(x[None])[0], x[0])
block_eigenvalues = torch.linalg.eigvals(block)
expected = 1 + 0.3 * torch.linalg.eigvals(dense)
apart = (block_eigenvalues[:, None] - expected[None]).abs().amin(1).max()

# %%
# The slope in every step of a stack of twelve, against autograd's for learnt steps.
stack = ResidualStack([MLPField(width) for _ in range(12)], step_size=0.3, learn_step=True).double()
head, inputs, target = nn.Linear(width, 4), torch.randn(32, width), torch.randint(4, (32,))
found = gradient_conflict(stack, inputs, target, head=head)
nn.functional.cross_entropy(head(stack(inputs)), target, reduction="sum").backward()
slopes = stack.step_sizes.grad

# %%
# Figure
# ------
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for block in (1, 3, 6):
    left.plot(alphas, symmetric[:, block - 1], label=f"block {block} of 6")
left.plot(alphas, turned[:, 0], "k--", label="rotation")
for alpha, text in ((1 / 5, "αλ = −1"), (2 / 5, "αλ = −2")):
    left.axvline(alpha, color="gray", ls=":")
    left.text(alpha, -0.95, f" {text}", fontsize=8)
left.set(title="symmetric field, λ = −1 and −5", xlabel="α", ylabel="cosine of neighbouring gradients")
middle.semilogx(many, falls, label="v: most negative")
middle.semilogx(many, never, label="v: most positive")
middle.axvline(-1 / parts[0].item(), color="k", ls=":", label="predicted turn")
middle.set(title="one nonlinear block, v along two parts of J", xlabel="α")
right.plot(range(1, 13), slopes, "o", mfc="none", label="autograd")
right.plot(range(1, 13), found.slope, "x", label="vᵀF")
right.set(title="slope of the loss in a block's α", xlabel="block")
for axis in (left, middle, right):
    axis.axhline(0, color="gray", lw=0.5)
    axis.legend(fontsize=8, loc="lower left" if axis is middle else "best")

# %%
# Verdict
# -------
# Everything is float64 and exact to rounding; the turns are bisected to 1e-11.
agree(
    "symmetric: cosines against the closed form, worst", 0.0, (symmetric - predicted).abs().max(), atol=1e-11
)
agree("one eigenvalue -2: α where the gradients turn", 1 / 2, single, atol=1e-9)
agree(
    "one eigenvalue -2: α where the iteration diverges", 1.0, max_stable_step(-2 * torch.eye(2)), atol=1e-12
)
agree("eigenvalues -1, -5, v = (1, 1): α where the last block turns", 1 / 3, last, atol=1e-9)
agree("rotation at α = 0.6: cosine", 1 / math.sqrt(1.36), turned[-1, 0], atol=1e-12)
agree("nonlinear: α where the gradients turn", -1 / parts[0].item(), measured_turn, rtol=1e-8)
agree("  the same read off one pass, turning_step", -1 / parts[0].item(), read_turn, rtol=1e-10)
agree("  along five random directions: read over bisected, less 1, worst", 0.0, read_error, atol=1e-8)
agree("  one over it along the positive direction, which never turns", 0.0, 1 / read_never)
at_least("nonlinear, positive direction: least cosine up to α = 20", 0.0, never.min())
agree("eigenvalues of the block are 1 + αλ, worst", 0.0, apart, atol=1e-12)
agree(
    "dL/dα against autograd, worst relative", 0.0, ((found.slope - slopes) / slopes).abs().max(), atol=1e-10
)
