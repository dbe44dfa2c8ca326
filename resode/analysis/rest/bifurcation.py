"""What a scalar map settles to as its step size grows: fixed points, cycles, chaos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resode.checks import check_number, check_whole, checked
from resode.results import Result
from resode.solve.step import rk_step
from resode.tableaus import ButcherTableau, explicit_tableau


@dataclass(frozen=True, eq=False, repr=False)
class Bifurcation(Result):
    """Where orbits settle, by step size.

    Args:
        solver: the method's name.
        step_sizes: η, shape (m,).
        orbits: states after the transient, shape (m, keep); not finite where an orbit diverges.
    """

    solver: str
    step_sizes: Tensor
    orbits: Tensor

    def periods(self, tol: float = 1e-6) -> Tensor:
        """The period that each orbit has settled to, int64, shape (m,); 0 where it has none that fits twice.

        It is the smallest p with |x_{n+p} − x_n| ≤ tol·(1 + max|x|) throughout the kept states: 1 at a fixed
        point, 0 in chaos, where an orbit diverges, and where the transient was too short.

        Args:
            tol: positive; a cycle whose points lie closer together counts as one of a shorter period.

        Raises:
            ValueError: tol is not positive, or one state alone was kept.

        Example:
            >>> eta = torch.tensor([1.9, 2.2, 2.5, 2.84, 3.0], dtype=torch.float64)
            >>> bifurcation(lambda x: x * (1 - x), eta, x0=0.1).periods().tolist()
            [1, 2, 4, 3, 0]
        """
        keep = self.orbits.shape[1]
        check_number("tol", tol, above=0)
        if keep < 2:
            raise ValueError("a period shows in two states or more: keep=1 was asked of the orbits.")
        bound = tol * (1 + self.orbits.abs().amax(1))
        found = torch.zeros(len(self.orbits), dtype=torch.int64, device=self.orbits.device)
        for p in range(keep // 2, 0, -1):
            apart = (self.orbits[:, p:] - self.orbits[:, :-p]).abs().amax(1)
            found[apart <= bound] = p  # nan is never
        return found

    def plot(self, path: str | None = None) -> Any:
        """Draw the diagram; see `resode.plots.bifurcation`."""
        from resode import plots

        return plots.bifurcation(self, path)


@checked
def bifurcation(
    field: Callable[[Tensor], Tensor],
    step_sizes: Tensor,
    x0: float,
    *,
    solver: str | ButcherTableau = "euler",
    transient: int = 1000,
    keep: int = 200,
) -> Bifurcation:
    r"""Iterate x ← (one step of size η) on x' = F(x) for each η, and keep the states after a transient.

    Euler on F = x(1 − x) is the logistic family: a fixed point until η = 2, then a cycle of 2, of 4 from
    η = √6, and chaos at η = 3.

    Args:
        field: F, elementwise on a tensor of scalars.
        step_sizes: η > 0, shape (m,), floating-point.
        x0: the state that every orbit starts from.
        solver: an explicit method's name, or its tableau.
        transient: steps that are dropped.
        keep: steps that are kept.

    Raises:
        ValueError: step sizes not positive or not of shape (m,); transient < 0, keep < 1; an implicit solver.

    Source:
        May, Simple mathematical models with very complicated dynamics, Nature 261 (1976).

    Example:
        >>> eta = torch.tensor([1.9, 2.2], dtype=torch.float64)
        >>> bifurcation(lambda x: x * (1 - x), eta, x0=0.1, keep=4).orbits
        tensor([[1.0000, 1.0000, 1.0000, 1.0000],
                [1.1628, 0.7462, 1.1628, 0.7462]], dtype=torch.float64)
    """
    tableau = explicit_tableau(solver, "a map needs")
    if step_sizes.ndim != 1 or not len(step_sizes) or not bool((step_sizes > 0).all()):
        raise ValueError(f"step_sizes must be positive, shape (m,): got shape {tuple(step_sizes.shape)}.")
    check_whole("transient", transient, 0)
    check_whole("keep", keep, 1)
    x, kept = torch.full_like(step_sizes, x0), []
    with torch.no_grad():
        for n in range(transient + keep):
            x = rk_step(tableau, lambda t, x: field(x), 0.0, x, step_sizes)
            if n >= transient:
                kept.append(x)
    return Bifurcation(solver=tableau.name, step_sizes=step_sizes, orbits=torch.stack(kept, dim=1))
