r"""Newton's method for the stages k_i = f(t_i, x + h Σ a_ij k_j) of one block, for a batch of states at once.

The unknowns are the stages themselves: with r = F(k) − k, the correction is (I − h A_b ⊗ J) Δ = r. Its size
is measured in the state, as hA_b Δ. Simplified Newton keeps J; its rate θ = ‖Δ⁺‖ / ‖Δ‖ foretells the error
that is left, θ/(1 − θ) ‖Δ‖, which ends the iteration where it is small enough, or where it can't become so
in time.

Source:
    Hairer & Wanner, Solving Ordinary Differential Equations II, IV.8; Deuflhard, Newton Methods for Nonlinear
    Problems (2004), 3.3, for damping by the natural monotonicity test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST = 10  # iterations of simplified Newton, and
DAMPED = 60  # of the damped one, each with a Jacobian of its own
TRUSTED = 1e-2  # what a rate of earlier steps may promise; it counts for less from step to step
SLOW = 1e-3  # a rate above it asks for a new Jacobian at the next step
LEAST = 2.0**-12  # of a correction that damping still tries


@dataclass
class Newton:
    """An iteration under way, each sample (B,) its own.

    Args:
        residual: k, (m, B, n), to F(k) − k; told which samples ask.
        solve: r to Δ.
        size: Δ to its norm over the tolerance, (B,), on the host.
        k: where it starts.
        live: which samples are to be iterated.
        rate: of an iteration before with these systems, (B,), or NaN; it lets a small first correction end
            it.
    """

    residual: Callable[[Tensor, np.ndarray], Tensor]
    solve: Callable[[Tensor], Tensor]
    size: Callable[[Tensor], np.ndarray]
    k: Tensor
    live: np.ndarray
    rate: np.ndarray
    iterations: np.ndarray = field(init=False)
    left: np.ndarray = field(init=False)
    slow: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.iterations = np.zeros(len(self.live), np.int64)
        self.left = np.full(len(self.live), np.inf)  # the last correction's size
        self.slow = np.zeros(len(self.live), bool)  # whether a new Jacobian would be worth it

    def simplified(self) -> np.ndarray:
        """Iterates with one Jacobian; which samples converged, (B,). The others have stages of no meaning."""
        live, done = self.live.copy(), ~self.live
        before, rate = np.full(len(live), np.nan), self.rate.copy()
        for i in range(MOST):
            correction = self.solve(self.residual(self.k, live))
            size = self.size(correction)
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                if i:
                    rate = np.where(live, np.maximum(size / before, 1e-16), rate)
                    self.slow |= live & ~(rate <= SLOW)
                    left = rate / (1 - rate) * size
                    hopeless = ~(rate < 1) | (rate ** (MOST - 1 - i) * left > 1)
                else:
                    rate = np.where(live, np.maximum(rate, TRUSTED) ** 0.8, rate)
                    left = rate * size
                    hopeless = ~np.isfinite(size)
                converged = live & ((size == 0) | ((left <= 1) & (rate < 1)))
            self.k = torch.where(self.chosen(live & ~(hopeless & ~converged)), self.k + correction, self.k)
            self.iterations += live
            self.left = np.where(live, size, self.left)
            done |= converged
            live &= ~converged & ~hopeless
            before = size
            if not live.any():
                break
        self.rate = rate
        return done

    def damped(self, renew: Callable[[Tensor, np.ndarray], None]) -> np.ndarray:
        """Iterates with the Jacobian of every iterate, each correction cut until the next one is smaller.

        Args:
            renew: makes `solve` that of the Jacobian at an iterate's stages.
        """
        live, done = self.live.copy(), ~self.live
        best = np.full(len(live), np.inf)
        residual = self.residual(self.k, live)
        for _ in range(DAMPED):
            renew(self.k, live)
            correction = self.solve(residual)
            size = self.size(correction)
            live &= np.isfinite(size)
            part, open_ = np.where(live, 1.0, 0.0), live.copy()
            k = self.k
            while True:
                k = torch.where(self.chosen(open_), self.k + self.factor(part) * correction, k)
                residual = self.residual(k, open_)
                ahead = self.size(self.solve(residual))
                # At the level of rounding no correction grows smaller.
                good = open_ & ((ahead <= (1 - part / 4) * size) | ((size <= 1) & (ahead <= 10)))
                open_ &= ~good
                if not open_.any() or part[open_].max() < LEAST:
                    break
                part = np.where(open_, part / 2, part)
            live &= ~open_
            self.k = torch.where(self.chosen(live), k, self.k)
            self.iterations += live
            self.left = np.where(live, ahead, self.left)
            converged = live & (ahead <= 1)
            with np.errstate(invalid="ignore", divide="ignore"):
                self.rate = np.where(live, ahead / size, self.rate)
            done |= converged
            live &= ~converged
            best = np.minimum(best, ahead)
            if not live.any():
                break
        return done

    def chosen(self, mask: np.ndarray) -> Tensor:
        """Marks of samples in a shape that selects among stages (m, B, n)."""
        return torch.from_numpy(mask).to(self.k.device)[:, None]

    def factor(self, values: np.ndarray) -> Any:
        """Numbers of samples in a shape that multiplies stages."""
        return torch.from_numpy(values).to(self.k.device, self.k.dtype)[:, None]
