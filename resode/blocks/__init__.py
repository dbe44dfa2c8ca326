r"""Residual blocks as solver steps: `ResidualStack` and `ODEBlock`.

A stack of pre-activation residual blocks x ← x + ηF_l(x), l = 0 … L−1, is forward Euler with step η
on dx/dt = F(t, x) over the depth time [0, Lη], where F(t, ·) = F_l for lη ≤ t < (l+1)η. Any other
method of `resode.METHODS` solves the same equation with the same weights.
"""

from resode.blocks.frozen import StochasticDepth
from resode.blocks.ode_block import ODEBlock
from resode.blocks.stack import ResidualStack

__all__ = ["ODEBlock", "ResidualStack", "StochasticDepth"]
