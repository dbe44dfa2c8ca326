"""A check of the step limit by simulation, which anyone can repeat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from resode.stability.limits import checked_spectrum, eigenvalue_step_limit
from resode.tableaus import ButcherTableau, get_tableau

_ROUNDING = 1e-13  # of one simulated step


@dataclass(frozen=True, eq=False)
class EdgeCheck:
    """What a simulation shows on either side of the step limit.

    Args:
        method: the method's name.
        limit: the step limit of the spectrum.
        below: step size just below it, or None where the limit is 0.
        above: step size just above it, or None where the limit is inf.
        decay: largest |x_i| after 0, 1, …, N steps of size `below`, from x_i = 1; None as above.
        growth: the same for steps of size `above`.
    """

    method: str
    limit: float
    below: float | None
    above: float | None
    decay: np.ndarray | None
    growth: np.ndarray | None

    @property
    def holds(self) -> bool:
        """Whether nothing grew below the limit, and something did above it."""
        bounded = self.decay is None or bool(self.decay.max() <= 1 + _ROUNDING * len(self.decay))
        return bounded and (self.growth is None or bool(self.growth[-1] > 1 + _ROUNDING * len(self.growth)))

    def plot(self, path: str | None = None) -> Any:
        """Draw both simulations; see `resode.plots.edge`."""
        from resode import plots

        return plots.edge(self, path)

    def __str__(self) -> str:
        lines = [f"{self.method}: step limit {self.limit:.12g}"]
        for name, step, path in (("below", self.below, self.decay), ("above", self.above, self.growth)):
            if step is not None and path is not None:
                lines.append(
                    f"  {name}, step {step:.6g}: largest |x| {path[-1]:.6g} after {len(path) - 1} steps, "
                    f"largest on the way {path.max():.6g}"
                )
        return "\n".join(lines)


def edge_check(
    method: str | ButcherTableau, eigenvalues: Any, *, margin: float = 1e-3, n_steps: int = 1000
) -> EdgeCheck:
    """Simulate x' = diag(λ)x just below and just above the step limit, by the method's stages.

    It solves the stages k_i = λ(x + η Σ_j a_ij k_j) in each step and knows nothing of R, so it is a check of
    the limit that stands on the tableau alone.

    Args:
        method: a name in METHODS, or a tableau.
        eigenvalues: λ (1/time), shape (n,).
        margin: relative distance of the two steps from the limit; less above it where the next stable
            interval is nearer than that. Where the limit is 0 the step lies in the middle of what is
            unstable, if that is bounded, and is at most 1/(2·max|λ|); where it is inf, the step is
            1/(margin·max|λ|).
        n_steps: number of steps.

    Raises:
        ValueError: as `eigenvalue_step_limit`, or a batch of spectra, or no positive margin or n_steps.

    Example:
        >>> check = edge_check("rk4", [-2.0, -5.0])
        >>> check.holds
        True
        >>> print(check)
        rk4: step limit 0.557058712681
          below, step 0.556502: largest |x| 0.0149951 after 1000 steps, largest on the way 1
          above, step 0.557616: largest |x| 66.5958 after 1000 steps, largest on the way 66.5958
    """
    tableau = get_tableau(method)
    limit = eigenvalue_step_limit(eigenvalues, tableau)
    if np.ndim(limit.step):
        raise ValueError(
            f"edge_check takes one spectrum of shape (n,), got a batch of {np.size(limit.step)}."
        )
    if not (0 < margin < 1 and n_steps >= 1):
        raise ValueError(f"margin must lie in (0, 1) and n_steps be at least 1, got {margin} and {n_steps}.")
    lam = checked_spectrum(eigenvalues)[0]
    largest = float(np.abs(lam).max())
    next_stable = min((a for a, _ in limit.intervals if a > limit.step), default=math.inf)
    below, above = limit.step * (1 - margin), limit.step * (1 + margin)
    if limit.step == 0:
        below, above = None, 0.5 / largest
    elif math.isinf(limit.step):
        below, above = 1 / margin / (largest or 1.0), None
    if above is not None:
        above = min(above, (limit.step + next_stable) / 2)
    return EdgeCheck(
        method=tableau.name,
        limit=limit.step,
        below=below,
        above=above,
        decay=None if below is None else _largest_modulus(tableau, lam, below, n_steps),
        growth=None if above is None else _largest_modulus(tableau, lam, above, n_steps),
    )


def _largest_modulus(tableau: ButcherTableau, lam: np.ndarray, step: float, n_steps: int) -> np.ndarray:
    """max_i |x_i| after 0 … n_steps steps on x' = diag(λ)x from x = 1, stages solved in each."""
    a, b = np.array(tableau.a, dtype=float), np.array(tableau.b, dtype=float)
    try:
        inverse = np.linalg.inv(np.eye(len(b)) - step * lam[:, None, None] * a)
    except np.linalg.LinAlgError:  # a pole of R
        return np.array([1.0] + [math.inf] * n_steps)
    x, path = np.ones(len(lam), dtype=complex), [1.0]
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(n_steps):
            stages = (inverse @ (lam * x)[:, None, None].repeat(len(b), axis=1))[..., 0]
            x = x + step * stages @ b
            path.append(float(np.abs(x).max()))
    return np.nan_to_num(np.array(path), nan=math.inf, posinf=math.inf)  # overflow
