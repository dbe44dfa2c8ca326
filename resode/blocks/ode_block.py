"""A layer of continuous depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resode.blocks.frozen import (
    FrozenDuringStep,
    refuse_batch_norm,
    refuse_dropout,
    refuse_graphs,
    refuse_low_precision,
)
from resode.blocks.stack import solver_method
from resode.calls import kind_of
from resode.checks import checked, one_of
from resode.solve.fixed import equal_steps
from resode.solve.gradient import GRADIENTS
from resode.solve.odeint import odeint
from resode.solve.options import tolerances
from resode.solve.problem import CALLBACKS, check_field
from resode.solve.result import Stats
from resode.solve.step import as_stage
from resode.symbols import one_module
from resode.tableaus import ButcherTableau


class ODEBlock(nn.Module):
    """The state at t[1] of dx/dt = func(t, x), x(t[0]) the input: a layer of continuous depth.

    Args:
        func: the field, `func(t, x)` -> dx/dt of x's shape; usually an nn.Module. With an adaptive
            solver and `per_sample`, t has shape (B, 1, …, 1), else it is 0-D.
        t: start and end of the depth time.
        solver: a method's name in resode.METHODS, or a tableau.
        rtol: relative tolerance of an adaptive solver's step, per entry.
        atol: absolute tolerance likewise, in x's unit.
        n_steps: equal steps from t[0] to t[1]; makes every solver take fixed steps, and is needed by
            those without error control.
        per_sample: an adaptive solver gives each sample of the batch (dimension 0) its own step.
        gradient: "autograd", through the solver's steps, or "adjoint", which keeps no steps and is
            approximate; func is an nn.Module then. See `resode.odeint_adjoint`.

    Raises:
        ValueError: an argument is wrong; the message says the rule and what came. torch's Dropout in
            func, in training, where the solve takes more than one evaluation.

    Note:
        Train-mode batch normalisation in func normalises every evaluation of a call by the batch statistics
        of the first, which alone moves its running statistics (with "adjoint" each by its own);
        `StochasticDepth` draws its mask once a call.

    Source:
        Chen et al., Neural Ordinary Differential Equations (2018).

    Example:
        >>> block = ODEBlock(lambda t, x: -x, solver="rk4", n_steps=10)
        >>> block(torch.ones(1, 1))
        tensor([[0.3679]])
    """

    @checked
    def __init__(
        self,
        func: Callable[[Tensor, Tensor], Tensor],
        *,
        t: tuple[float, float] = (0.0, 1.0),
        solver: str | ButcherTableau = "dopri5",
        rtol: float = 1e-3,
        atol: float = 1e-4,
        n_steps: int | None = None,
        per_sample: bool = True,
        gradient: str = "autograd",
    ):
        super().__init__()
        start, end = (float(s) for s in t)
        if not (math.isfinite(start) and math.isfinite(end)) or start == end:
            raise ValueError(f"t must be two different finite times, got {t}.")
        one_of("gradient", gradient, GRADIENTS)
        check_field(func)
        self.func = func
        self.t = (start, end)
        self.rtol, self.atol = tolerances(torch.float64, rtol, atol)
        self.n_steps = n_steps
        self.per_sample = bool(per_sample)
        self.gradient = gradient
        self.solver = solver
        self.stats: Stats | None = None

    @property
    def solver(self) -> str:
        """The method's name; assign another to swap it in place."""
        return self._tableau.name

    @solver.setter
    def solver(self, name: str | ButcherTableau) -> None:
        tableau = solver_method(name)
        if not tableau.adaptive and self.n_steps is None:
            raise ValueError(
                f"{tableau.name} takes fixed steps: give n_steps, the number of steps from t[0] to t[1]."
            )
        self._tableau = tableau

    @property
    def tableau(self) -> ButcherTableau:
        """The method itself."""
        return self._tableau

    @one_module
    def forward(self, x: Tensor) -> Tensor:
        """The state at t[1], of x's shape (B, *state)."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a floating tensor, got {kind_of(x)}.")
        fixed, implicit = self.n_steps is not None, not self._tableau.explicit
        func = self.func
        if not fixed and x.is_floating_point():
            refuse_low_precision(self.solver, x.dtype)
        if isinstance(func, nn.Module) and func.training:
            if not fixed or self.n_steps != 1 or len(self._tableau.b) > 1 or implicit:
                refuse_dropout(func, self.solver)
            if implicit:
                refuse_batch_norm(func, self.solver)
            func = _Once(func, self.gradient == "adjoint")
        if not fixed or implicit:
            refuse_graphs(f"{self.solver} {'iterates' if implicit else 'chooses its steps'} by")
        elif torch.compiler.is_exporting() or (torch.compiler.is_compiling() and self.gradient != "adjoint"):
            return self._in_a_graph(func, x)
        y, self.stats = odeint(
            func,
            x,
            torch.tensor(self.t, dtype=torch.float64, device=x.device),
            method=self._tableau,
            n_steps=self.n_steps,
            rtol=None if fixed else self.rtol,
            atol=None if fixed else self.atol,
            per_sample=self.per_sample and (implicit or not fixed),
            gradient=self.gradient,
            return_stats=True,
        )
        return y[-1]

    def _in_a_graph(self, func: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """The fixed steps alone: what torch.compile and torch.export can follow."""
        assert self.n_steps is not None
        (start, end), n, dtype = self.t, self.n_steps, x.real.dtype

        def field(s: Any, x: Tensor) -> Tensor:
            s = min(max(s, min(start, end)), max(start, end))
            return as_stage(func(torch.full((), s, dtype=dtype, device=x.device), x), x)

        if not torch.compiler.is_exporting():
            self.stats = Stats(n * (self._tableau.b_row[-1][0] + 1), n, n, 0)
        return equal_steps(self._tableau, field, start, x, (end - start) / n, n)

    def extra_repr(self) -> str:
        """What the module prints of itself beside its field."""
        steps = "" if self.n_steps is None else f", n_steps={self.n_steps}"
        return f"t={self.t}, solver={self.solver!r}{steps}"


class _Once(nn.Module):
    """A field in training for one block call: one set of batch statistics, masks that are held."""

    def __init__(self, func: nn.Module, adjoint: bool):
        super().__init__()
        self.func = func
        self.once = FrozenDuringStep(func, own_statistics=adjoint)
        for name in CALLBACKS:
            for callback in (name, f"{name}_adjoint"):
                if hasattr(func, callback):
                    setattr(self, callback, getattr(func, callback))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """func(t, x)."""
        with self.once.evaluation():
            return self.func(t, x)
