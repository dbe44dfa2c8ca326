r"""
B6 · Linear residual blocks move together
=========================================

**Claim.** A deep linear residual network :math:`x_L = (I + W_L)\cdots(I + W_1)\,x` starts at :math:`W_l =
0`. There every block has the *same* gradient :math:`G`, and the first update moves the end-to-end map
:math:`M` by

.. math:: (I - \eta G)^L - I = -L\,\eta\, G + O(\eta^2),

:math:`L` times as far as one block's update alone. So the largest stable learning rate falls as :math:`1/L`.

**Assumptions.** One matrix a block; :math:`L\,\eta\lVert G\rVert \ll 1`. For starts of size
:math:`\varepsilon` the gradients differ by :math:`O(\varepsilon)`.

**Not claimed.** That it holds for residual branches in general. With *two* matrices a block, both at zero,
the start is a saddle: every weight gradient is 0 and nothing moves. With the last one at zero alone, as is
usual, the gradients differ from block to block. And for large steps the factor is not :math:`L`.

**Source.** Hardt & Ma, *Identity Matters in Deep Learning* (2017), arXiv:1611.04231; Bartlett, Helmbold &
Long (2018), arXiv:1802.06093.

The picture: the collective factor by depth; the gradients' spread by size of the start; the factor at large
steps.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode import ResidualStack, max_learning_rate
from theory.measures.collective import first_update
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least

torch.set_default_dtype(torch.float64)
torch.manual_seed(shifted(0))

# %%
# Set-up and prediction
# ---------------------
# Inputs x, targets Tx, and the loss :math:`\tfrac12 \lVert Mx - Tx\rVert^2` on average. By hand
# :math:`G = (M - T)\,C` at M = I, with C the mean of :math:`x x^\top`.
width = 6
x = torch.randn(40, width)
target = x @ (torch.eye(width) + 0.5 * torch.randn(width, width)).T
gradient = (x - target).T @ x / len(x)


def stack(depth, scale):
    torch.manual_seed(shifted(1))
    fields = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    for field in fields:
        nn.init.normal_(field.weight, std=scale) if scale else nn.init.zeros_(field.weight)
    return ResidualStack(fields)


def half_square(z, t):
    return 0.5 * (z - t).square().sum(1)


def update(stack, learning_rate=1e-7):
    return first_update(stack, x, target, learning_rate=learning_rate, loss_fn=half_square)


# %%
# Measurement
# -----------
depths = [2, 8, 32, 128]
at_zero = [update(stack(depth, 0.0)) for depth in depths]
scales = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
spreads = [update(stack(8, scale)).spread for scale in scales]
slope = float(torch.tensor(spreads[-3] / spreads[-1]).log10()) / 2

# %%
# Large steps, against the binomial: the whole map moves by :math:`(I - \eta G)^L - I`.
rates = torch.logspace(-5, -0.5, 6 if FAST else 25).tolist()
large = torch.tensor([update(stack(32, 0.0), rate).ratio for rate in rates])
one = [x @ (-rate * gradient).T for rate in rates]
whole = [
    x @ (torch.linalg.matrix_power(torch.eye(width) - rate * gradient, 32) - torch.eye(width)).T
    for rate in rates
]
binomial = torch.tensor([float(w.norm() / o.norm()) for w, o in zip(whole, one, strict=True)])


# %%
# Two matrices a block: both at zero, and the last one alone.
class TwoLayers(nn.Module):
    def __init__(self, zeros):
        super().__init__()
        self.first, self.last = (nn.Linear(width, width, bias=False) for _ in range(2))
        for layer in zeros(self):
            nn.init.zeros_(layer.weight)

    def forward(self, x):
        return self.last(self.first(x))


saddle = update(ResidualStack([TwoLayers(lambda f: (f.first, f.last)) for _ in range(8)]))
usual = update(ResidualStack([TwoLayers(lambda f: (f.last,)) for _ in range(8)]))

# %%
# The largest stable learning rate, where the identity is the solution: :math:`2 / (L\,\lambda_{\max}(C))`.
largest = torch.linalg.eigvalsh(x.T @ x / len(x))[-1].item()


def mean_half_square(z, t):
    return half_square(z, t).mean()


limits = {depth: max_learning_rate(stack(depth, 0.0), mean_half_square, (x, x)) for depth in (2, 8, 32)}

# %%
# Figure
# ------
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
left.loglog(depths, [found.ratio for found in at_zero], "o", label="measured")
left.loglog(depths, depths, "k:", label="L")
left.set(title="all blocks' update against one's", xlabel="depth L", ylabel="ratio of changes")
middle.loglog(scales, spreads, "o", label="measured, L = 8")
middle.loglog(scales, [spreads[-1] / scales[-1] * s for s in scales], "k:", label="slope 1")
middle.set(title="difference of the blocks' gradients", xlabel="size of the start", ylabel="relative spread")
right.semilogx(rates, large, "o", label="measured, L = 32")
right.loglog(rates, binomial, "k:", label="(I − ηG)^L − I")
right.set(title="large steps are not L times one", xlabel="learning rate", ylabel="ratio of changes")
for axis in (left, middle, right):
    axis.legend()

# %%
# Verdict
# -------
# At a rate of 1e-7 the second order adds about :math:`L\,\eta\lVert G\rVert`, below 1e-4; the subtraction
# of outputs leaves rounding of 1e-9. The slope is taken over two decades of small starts.
for depth, found in zip(depths, at_zero, strict=True):
    agree(f"collective factor, L = {depth}", depth, found.ratio, rtol=1e-3)
away = (at_zero[-1].gradients - gradient.flatten()).abs().max()
agree("gradients of 128 blocks against (I − T)C, worst", 0.0, away, atol=1e-11)
agree("spread at zero", 0.0, at_zero[-1].spread, atol=1e-12)
agree("slope of the spread in the size of the start", 1.0, slope, atol=0.01)
agree("large steps against the binomial, worst relative", 0.0, (large / binomial - 1).abs().max(), atol=1e-6)
at_least("large steps: distance of the factor from L = 32, at its largest", 5, (large - 32).abs().max())
agree("two layers at zero: largest gradient, exactly", 0.0, saddle.gradients.abs().max())
at_least("last layer at zero: spread of the gradients", 0.5, usual.spread)
for depth, limit in limits.items():
    agree(f"largest stable learning rate, L = {depth}", 2 / (depth * largest), limit, rtol=1e-6)
