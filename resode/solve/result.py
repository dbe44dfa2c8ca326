"""What a solve gives back besides the state: its statistics and its typed errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from resode.results import Result


@dataclass(repr=False)
class Stats(Result):
    """What a solve cost.

    Every entry is an int, or a (B,) int64 tensor when each of B samples has its own step. Steps are
    None where torchdiffeq did the solving, because it does not say.

    Args:
        nfe: calls of the field; per sample, those made while that sample was under way.
        n_steps: attempted steps, n_accepted + n_rejected.
        n_accepted: steps that were kept.
        n_rejected: steps whose error estimate was above the tolerance.
        nfe_backward: calls of the field while gradients came back (recomputation), beyond nfe.
        n_jacobians: Jacobians of an implicit method; each counts as one call of the field in nfe, whatever
            the backward passes that it takes.
        n_factorisations: of the matrices I − hλJ of an implicit method.
        n_newton: iterations of Newton's method.
        n_linear: products with a Jacobian that GMRES took, for states too large to factor.

    Example:
        >>> Stats(nfe=8, n_steps=2, n_accepted=2, n_rejected=0).nfe
        8
    """

    nfe: int | Tensor
    n_steps: int | Tensor | None
    n_accepted: int | Tensor | None
    n_rejected: int | Tensor | None
    nfe_backward: int = 0
    n_jacobians: int | Tensor = 0
    n_factorisations: int | Tensor = 0
    n_newton: int | Tensor = 0
    n_linear: int | Tensor = 0

    def item(self) -> Stats:
        """The statistics of the only sample, as ints."""
        counts = {name: value if value is None else int(value) for name, value in vars(self).items()}
        return Stats(**counts)  # type: ignore[arg-type]


class SolverError(RuntimeError):
    """A solve could not go on. The message names the time as ``t=``.

    Args:
        message: the rule, what came, what to do.
        time: where in t the solve stood.
        step_size: the step it tried or wanted; 0 before the first.
        sample: which sample of the batch, where each has its own step.
        eigenvalue: of the field's Jacobian there, the one that the message names; None where no
            Jacobian was affordable (states above 256 entries) or none limits the step.

    Example:
        >>> import torch, resode
        >>> try:
        ...     resode.odeint(lambda t, y: -1e6 * y, torch.ones(1, dtype=torch.float64),
        ...                   torch.tensor([0.0, 1.0]), max_steps=100)
        ... except resode.SolverError as error:
        ...     print(round(error.eigenvalue.real))
        -1000000
    """

    def __init__(
        self,
        message: str,
        *,
        time: float | None = None,
        step_size: float | None = None,
        sample: int | None = None,
        eigenvalue: complex | None = None,
    ):
        super().__init__(message)
        self.time, self.step_size, self.sample, self.eigenvalue = time, step_size, sample, eigenvalue


class StepSizeUnderflow(SolverError):
    """The tolerance asks for a step below what the time's precision resolves."""


class MaxStepsReached(SolverError):
    """`max_steps` attempted steps did not reach the end."""


class NewtonNotConverged(SolverError):
    """Newton's method did not find the stages of an implicit step.

    Args:
        message: as of every SolverError, with what follows it.
        residual: the last correction, over what was asked of it.
        rate: what the last iteration left of the correction before; at least 1 where they grew.
    """

    # With defaults, because a pickle is made anew from the message alone, and gets the figures afterwards.
    def __init__(self, message: str, *, residual: float = math.nan, rate: float = math.nan, **about: Any):
        super().__init__(message, **about)
        self.residual, self.rate = residual, rate


class NonFiniteState(SolverError):
    """The state became infinite or NaN."""


class NonFiniteField(SolverError):
    """The field returned an infinity or NaN at a finite state."""
