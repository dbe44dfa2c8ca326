r"""
A9 · Dense and attention blocks
===============================

**Claim.** A dense block's layer, which puts new channels behind the old ones, and a transformer's two
blocks are residual blocks, with the same split of the gradient and the same step analysis. A dense layer is

.. math:: z \mapsto \binom{x}{F(x)} = \begin{pmatrix} I & 0 \\ 0 & 0 \end{pmatrix} z + E\,F(x), \qquad
          \frac{\partial L}{\partial x} = g_x + J^\top g_F,

an Euler step of 1 in a state whose last channels are still empty, with the Jacobian :math:`I + N`, :math:`N
= EJ`. New channels never act on old ones, so :math:`N^2 = 0`: all eigenvalues are 1, no step is too large
for them, and what a layer does is growth without eigenvalues (A2, C4),

.. math:: \sigma_{\max}(I + N) = \frac a2 + \sqrt{1 + \frac{a^2}{4}}, \qquad a = \lVert J \rVert_2 .

A transformer's pre-norm block is :math:`x + F(\mathrm{LN}(x))`, F attention or a perceptron. As the norm
sees the direction of a token alone, :math:`J(cx) = J(x)/c`: where the tokens are twice as long, every
eigenvalue is half as large, and the largest stable step twice as long.

**Assumptions.** LayerNorm's :math:`\epsilon` is negligible. One sample of a transformer is all its tokens.

**Not claimed.** That a *post-norm* block, :math:`\mathrm{LN}(x + F(x))`, has the highway: the gradient
meets the norm's Jacobian first, which loses two directions in every token, the mean and the token itself.
Nor that each token has a split of its own: attention couples them, and the blocks on the diagonal of J
alone give another gradient.

**Source.** Huang et al., *Densely Connected Convolutional Networks* (2017), arXiv:1608.06993; Vaswani et
al. (2017), arXiv:1706.03762; Xiong et al., *On Layer Normalization in the Transformer Architecture* (2020),
arXiv:2002.04745.

The picture: both parts of the gradient by block for both kinds; growth of a dense layer by the size of its
weights; step limits of a transformer's blocks by the length of its tokens.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from resode.analysis import gradient_parts, jacobian, product_norm, step_limit
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

torch.set_default_dtype(torch.float64)
torch.manual_seed(shifted(0))
batch, channels, growth, pixels, layers = (2, 3, 2, 3, 4) if FAST else (4, 6, 4, 4, 6)
tokens, width, heads, depth = (4, 8, 2, 6) if FAST else (6, 16, 4, 12)
draws = 3

# %%
# Two kinds of networks
# ---------------------
# Both written out here, as their papers have them; the library knows neither.


class DenseLayer(nn.Module):
    """New channels, from those that are filled."""

    def __init__(self, filled):
        super().__init__()
        self.filled = filled
        self.conv = nn.Conv2d(filled, growth, 3, padding=1)

    def forward(self, x):
        return self.conv(x.relu())

    def in_state(self, z):
        """E F(x): zero but in the channels that it fills."""
        new = self(z[:, : self.filled])
        behind = z.shape[1] - self.filled - growth
        return nn.functional.pad(new, (0, 0, 0, 0, self.filled, behind))


class Attention(nn.Module):
    """Softmax attention over all tokens, behind a LayerNorm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / math.sqrt(width / heads)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


def perceptron():
    return nn.Sequential(
        nn.LayerNorm(width, eps=1e-12), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    )


def autograd(function, x, g):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x, g)[0]


def apart(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


# %%
# Prediction
# ----------
# The gradient's two parts sum to autograd's through the concatenation and through the whole transformer; of
# a dense layer the growth is known from the norm of its Jacobian.


def predicted_growth(a):
    return a / 2 + math.sqrt(1 + a * a / 4)


# %%
# Measurement: a dense block
# --------------------------
# Autograd differentiates the block as a chain of concatenations. The split runs backward layer by layer, in
# the padded state.
dense_error, first_bits = 0.0, 0
for _ in range(draws):
    block = [DenseLayer(channels + i * growth) for i in range(layers)]
    x = torch.randn(batch, channels, pixels, pixels)

    def concatenated(x, block=block):
        for layer in block:
            x = torch.cat((x, layer(x)), 1)
        return x

    out = concatenated(x)
    first_bits += int((out[:, :channels] != x).sum())
    z = nn.functional.pad(x, (0, 0, 0, 0, 0, layers * growth))
    states = [z]
    for layer in block:
        states.append(states[-1] + layer.in_state(states[-1]))
    g = torch.randn_like(out)
    gradient, dense_parts = g, []
    for layer, state in zip(reversed(block), reversed(states[:-1]), strict=True):
        parts = gradient_parts(layer.in_state, state, gradient)
        dense_parts.insert(0, (float(parts.identity.norm()), float(parts.residual.norm())))
        gradient = parts.total
    dense_error = max(dense_error, apart(gradient[:, :channels], autograd(concatenated, x, g)))

# %%
# Its Jacobian, formed: the square of N, its eigenvalues, the largest singular value, the step limit.
one = block[1]
state = states[1][:1]
n_matrix = jacobian(one.in_state, state)[0]
a = float(torch.linalg.matrix_norm(torch.autograd.functional.jacobian(
    lambda x: one(x[None])[0], state[0, : one.filled]
).flatten(0, 2).flatten(1), 2))  # fmt: skip
dense_growth = float(product_norm([one.in_state], state).norm)
nilpotent = float((n_matrix @ n_matrix).abs().max())
dense_limit = step_limit(n_matrix).step
determinant = float(torch.linalg.det(torch.eye(len(n_matrix)) + n_matrix))
scales = torch.logspace(-1, 1, 9).tolist()
by_scale = [float(product_norm([lambda z, s=s: s * one.in_state(z)], state).norm) for s in scales]

# %%
# A pre-norm transformer
# ----------------------
transformer_error, own_token_error = 0.0, []
for _ in range(draws):
    blocks = [make() for _ in range(depth // 2) for make in (Attention, perceptron)]
    x = torch.randn(batch, tokens, width)

    def through(x, blocks=blocks):
        for field in blocks:
            x = x + field(x)
        return x

    path = [x]
    for field in blocks:
        path.append((path[-1] + field(path[-1])).detach())
    g = torch.randn_like(x)
    gradient, parts_by_block = g, []
    for field, state in zip(reversed(blocks), reversed(path[:-1]), strict=True):
        parts = gradient_parts(field, state, gradient)
        parts_by_block.insert(0, (float(parts.identity.norm()), float(parts.residual.norm())))
        gradient = parts.total
    transformer_error = max(transformer_error, apart(gradient, autograd(through, x, g)))
    whole = jacobian(blocks[0], x).reshape(batch, tokens, width, tokens, width)
    own = torch.einsum("btd,btdte->bte", g, whole)
    own_token_error.append(apart(g + own, autograd(lambda x, f=blocks[0]: x + f(x), x, g)))

# %%
# Post-norm: the directions that LayerNorm's Jacobian loses in a token, counted by its singular values.
norm = nn.LayerNorm(width, eps=1e-12)
values = torch.linalg.svdvals(jacobian(norm, torch.randn(20, width)))
lost = (values < 1e-9 * values[:, :1]).sum(1)

# %%
# Steps: the eigenvalues and the limit of the decaying modes, where the tokens are c times as long.
lengths = (1.0, 2.0, 8.0)
limits = {kind: [] for kind in ("attention", "perceptron")}
eigenvalue_error = 0.0
for kind, field in zip(limits, blocks[:2], strict=True):
    at_one = torch.linalg.eigvals(jacobian(field, x[:1])[0])
    for c in lengths:
        limits[kind].append(float(step_limit(field, c * x[:1]).decaying_step))
        spectrum = torch.linalg.eigvals(jacobian(field, c * x[:1])[0])
        gap = (c * spectrum[:, None] - at_one[None]).abs()
        eigenvalue_error = max(eigenvalue_error, float(gap.amin(1).max() / at_one.abs().max()))

# Euler's limit by hand: min of -2 Re λ / |λ|² over the modes that decay.
by_hand = {}
for kind, field in zip(limits, blocks[:2], strict=True):
    spectrum = torch.linalg.eigvals(jacobian(field, x[:1])[0])
    decaying = spectrum[spectrum.real < -1e-9]
    by_hand[kind] = float((-2 * decaying.real / decaying.abs() ** 2).min())

# %%
# Figure
# ------
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for name, parts, style in (("dense", dense_parts, "o"), ("transformer", parts_by_block, "s")):
    for number, (which, line) in enumerate((("identity", "-"), ("residual", "--"))):
        left.semilogy(
            range(1, len(parts) + 1), [p[number] for p in parts], style + line, label=f"{name}: {which} part"
        )
left.set(title="the gradient's two parts", xlabel="layer or block", ylabel="norm")
middle.loglog([s * a for s in scales], by_scale, "o", label="measured")
fine = torch.logspace(math.log10(scales[0] * a), math.log10(scales[-1] * a), 50).tolist()
middle.loglog(fine, [predicted_growth(v) for v in fine], "k:", label="a/2 + √(1 + a²/4)")
middle.set(title="growth in a dense layer", xlabel="a = ‖J‖₂", ylabel="largest singular value")
for kind, found in limits.items():
    right.loglog(lengths, found, "o-", base=2, label=kind)
right.loglog(lengths, [by_hand["attention"] * c for c in lengths], "k:", base=2, label="proportional")
right.set(
    title="step limit of a transformer's block", xlabel="length of the tokens", ylabel="η, decaying modes"
)
for axis in (left, middle, right):
    axis.legend(fontsize=8)

# %%
# Verdict
# -------
# Chains of float64 products: some tens of machine ε a layer.
agree("dense block: gradient by the split less autograd's, worst draw", 0, dense_error, atol=1e-13)
agree("dense block: entries of x that the output does not hold to the bit", 0, first_bits)
agree("dense layer: N², largest entry", 0, nilpotent, atol=1e-14)
agree("dense layer: determinant of I + N", 1, determinant, atol=1e-12)
agree("dense layer: largest singular value", predicted_growth(a), dense_growth, rtol=1e-10)
agree("  and with weights ten times as large", predicted_growth(10 * a), by_scale[-1], rtol=1e-10)
agree("dense layer: step limit, 1 over it", 0, 1 / float(dense_limit), atol=1e-12)
agree("transformer: gradient by the split less autograd's, worst draw", 0, transformer_error, atol=1e-13)
at_least("  error where each token has its own Jacobian alone, least draw", 0.01, min(own_token_error))
agree("LayerNorm: directions lost in a token, fewest", 2, int(lost.min()))
agree("  and most", 2, int(lost.max()))
agree("tokens c times as long: c times the eigenvalues, worst relative gap", 0, eigenvalue_error, atol=1e-6)
for kind, found in limits.items():
    agree(f"{kind}: step limit of the decaying modes, by hand", by_hand[kind], found[0], rtol=1e-6)
    agree("  over it where tokens are 8 times as long", 8, found[-1] / found[0], rtol=1e-5)
at_most("identity part over residual part, least block, so that there is something to split", 1e4, max(
    i / r for i, r in parts_by_block
))  # fmt: skip
