"""What a solve gives back besides the state: its statistics and its typed errors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Stats:
    """What a solve cost.

    Every entry is an int, or a (B,) int64 tensor when each of B samples has its own step. Steps are
    None where torchdiffeq did the solving, because it does not say.

    Args:
        nfe: calls of the field; per sample, those made while that sample was under way.
        n_steps: attempted steps, n_accepted + n_rejected.
        n_accepted: steps that were kept.
        n_rejected: steps whose error estimate was above the tolerance.
        nfe_backward: calls of the field while gradients came back (recomputation), beyond nfe.

    Example:
        >>> Stats(nfe=8, n_steps=2, n_accepted=2, n_rejected=0).nfe
        8
    """

    nfe: int | Tensor
    n_steps: int | Tensor | None
    n_accepted: int | Tensor | None
    n_rejected: int | Tensor | None
    nfe_backward: int = 0

    def item(self) -> Stats:
        """The statistics of the only sample, as ints."""
        counts = (self.nfe, self.n_steps, self.n_accepted, self.n_rejected)
        return Stats(*(c if c is None else int(c) for c in counts), self.nfe_backward)  # type: ignore[arg-type]


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


class NonFiniteState(SolverError):
    """The state became infinite or NaN."""


class NonFiniteField(SolverError):
    """The field returned an infinity or NaN at a finite state."""
