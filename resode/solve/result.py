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
    """A solve could not go on. The message names the time as ``t=``."""


class StepSizeUnderflow(SolverError):
    """The tolerance asks for a step below what the time's precision resolves."""


class MaxStepsReached(SolverError):
    """`max_steps` attempted steps did not reach the end."""


class NonFiniteState(SolverError):
    """The state became infinite or NaN."""


class NonFiniteField(SolverError):
    """The field returned an infinity or NaN at a finite state."""
