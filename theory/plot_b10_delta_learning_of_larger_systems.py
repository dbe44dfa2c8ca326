r"""
B10 · Delta learning of larger systems
======================================

**Claim.** A correction to a cheap model that is learnt *per unit*, as a sum over a system's units, carries
over to systems larger than any that it was learnt from; a total that is learnt does not. Chains of n units
have the energy

.. math:: E = \sum_i e(s_i) + \sum_{i<j} \frac{1}{\lvert i - j \rvert}, \qquad
   \text{cheap: the second sum, which is known}.

Learnt from fragments of 1 to 4 units with cubic polynomials of :math:`s_i`, summed over the units, the
correction :math:`e - p` that is left has mean 0 and rms :math:`\rho`, and a system of n units the error

.. math:: \frac{\text{rms error}}{n} = \frac{\rho}{\sqrt n} \quad\text{(correction)}, \qquad
   \Bigl(H_{n-1} - \frac{n-1}{n}\Bigr) - \bar c \quad\text{(total)},

with :math:`H` the harmonic numbers and :math:`\bar c = \sum_k k\,C_k / \sum_k k^2` the mean interaction
:math:`C_k` of the fragments a unit: the one falls with n, the other grows like :math:`\ln n`.

**Assumptions.** The cheap model holds what reaches far; what is missing is local. As many fragments of
every size; s uniform on [0, 1].

**Not claimed.** That delta learning carries over as such. Two cases do not: where the *cheap model* is the
local part, the interaction is left to learn, and the correction has the error of the total; and where the
correction is learnt as a number for the system, from means over its units, it stays that of a fragment,
whose mean size is 5/2: at n units :math:`1 - 5/(2n)` of the correction is missing.

**Source.** Ramakrishnan et al., *J. Chem. Theory Comput.* 11 (2015) 2087, on learnt corrections; Behler &
Parrinello, *Phys. Rev. Lett.* 98 (2007) 146401, on energies as sums over atoms; the sums: by hand.

The picture: error a unit by the size of the system for the four learners; predictions beside measurements.
"""

import math

import matplotlib.pyplot as plt
import torch

from resode.fields import KnownPlusLearned
from theory.measures.learning_curve import LeastSquares
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

torch.set_default_dtype(torch.float64)
fragments, sizes = (1, 2, 3, 4), (4, 8, 12, 16)
each, tests, draws = (200, 400, 6) if FAST else (400, 1000, 12)
largest = max(sizes)

# %%
# Chains of units
# ---------------
# A system is a row of s, and of a mask that says which units are there: shape (systems, 2, 16).


def systems(n, count, generator):
    s = torch.rand(count, largest, generator=generator)
    there = (torch.arange(largest) < n).double().expand(count, largest)
    return torch.stack((s * there, there), 1)


def local(x):
    """The sum of e(s) = 1 + sin(4s) over a system's units."""
    s, there = x.unbind(1)
    return ((1 + (4 * s).sin()) * there).sum(1, keepdim=True)


distance = (torch.arange(largest)[:, None] - torch.arange(largest)).abs().double()
inverse = torch.where(distance > 0, 1 / distance.clamp(min=1), 0.0).triu()


def interaction(x):
    """The sum of 1/|i − j| over a system's pairs."""
    there = x[:, 1]
    return torch.einsum("bi,ij,bj->b", there, inverse, there)[:, None]


def expensive(x):
    return local(x) + interaction(x)


def per_unit(x):
    """Features of a sum over units: the sums of 1, s, s², s³."""
    s, there = x.unbind(1)
    return torch.stack([(s**k * there).sum(1) for k in range(4)], 1)


def of_the_mean(x):
    """Features of the system: the means of 1, s, s², s³ over its units."""
    return per_unit(x) / x[:, 1].sum(1, keepdim=True)


def nothing(x):
    return torch.zeros(len(x), 1)


# %%
# Prediction
# ----------
# ρ is the distance of e from the cubic polynomials, by quadrature with 40 Gauss points; the total's error
# by the sums over the fragments.


def gauss_points(count=40):
    """Nodes and weights on [0, 1], from the eigenvalues of Legendre's tridiagonal matrix."""
    k = torch.arange(1, count)
    off = k / (4 * k**2 - 1.0).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (nodes + 1) / 2, vectors[0] ** 2


node, weight = gauss_points()
value = 1 + (4 * node).sin()
root = weight.sqrt()[:, None]
powers = torch.stack([node**k for k in range(4)], 1)
cubic = powers @ torch.linalg.lstsq(root * powers, root * value[:, None]).solution
rho = float(((value - cubic[:, 0]) ** 2 @ weight).sqrt())
mean_local = float(value @ weight)


def harmonic(n):
    return sum(1 / k for k in range(1, n + 1))


def pairs(n):
    """The interaction of n units."""
    return n * harmonic(n - 1) - (n - 1)


absorbed = sum(k * pairs(k) for k in fragments) / sum(k**2 for k in fragments)
predicted = {
    "correction": [rho / math.sqrt(n) for n in sizes],
    "total": [abs(pairs(n) / n - absorbed) for n in sizes],
    "correction to the local part": [abs(pairs(n) / n - absorbed) for n in sizes],
    "correction of the mean": [mean_local * abs(1 - 2.5 / n) for n in sizes],
}

# %%
# Measurement
# -----------
# Each learner gets the same fragments; the errors are those of other systems of every size.
learners = {
    "correction": (interaction, per_unit),
    "total": (nothing, per_unit),
    "correction to the local part": (local, per_unit),
    "correction of the mean": (interaction, of_the_mean),
}
errors = {name: torch.zeros(draws, len(sizes)) for name in learners}
for draw in range(draws):
    generator = torch.Generator().manual_seed(shifted(draw))
    x = torch.cat([systems(n, each, generator) for n in fragments])
    unseen = [systems(n, tests, generator) for n in sizes]
    for name, (cheap, features) in learners.items():
        learnt = KnownPlusLearned(cheap, LeastSquares(x, expensive(x) - cheap(x), features))
        for i, n in enumerate(sizes):
            apart = (learnt(unseen[i]) - expensive(unseen[i])) / n
            errors[name][draw, i] = apart.square().mean().sqrt()

# %%
# Figure
# ------
figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
for (name, found), mark in zip(errors.items(), "os^v", strict=True):
    axis.errorbar(sizes, found.mean(0), found.std(0), fmt=mark, mfc="none", capsize=3, label=name)
    axis.plot(sizes, predicted[name], "k:", lw=1)
axis.plot([], "k:", label="predicted")
axis.set(
    yscale="log", xlabel="units of the system", ylabel="rms error a unit", title="learnt from 1 to 4 units"
)
axis.set_xticks(sizes)
axis.legend(fontsize=8)

# %%
# Verdict
# -------
# The correction's rms over 400 (1,000) systems scatters by 1/√(2·400), 4 %, in one draw, so by 1.5 % (0.7
# %) in the mean; four learnt coefficients add less than one per cent. The totals' errors are means, with
# the spread of learnt coefficients: 1 %.
mean = {name: found.mean(0) for name, found in errors.items()}
for i, n in enumerate(sizes):
    agree(
        f"correction a unit: error a unit at {n}",
        predicted["correction"][i],
        mean["correction"][i],
        rtol=0.06,
    )
for name in ("total", "correction to the local part"):
    for i, n in list(enumerate(sizes))[1:]:
        agree(f"{name}: error a unit at {n}", predicted[name][i], mean[name][i], rtol=0.02)
for i, n in list(enumerate(sizes))[1:]:
    agree(
        f"correction of the mean: error a unit at {n}",
        predicted["correction of the mean"][i],
        mean["correction of the mean"][i],
        rtol=0.1,
    )
ratio = mean["total"][-1] / mean["correction"][-1]
at_least("total over correction at 16 units", 20, ratio)
at_most(
    "correction: error a unit at 16 units over that at 4", 0.6, mean["correction"][-1] / mean["correction"][0]
)
