"""How dx/dt = f(t, x) is advanced: one step, fixed steps, error-controlled steps, `odeint`."""

from resode.solve.odeint import odeint
from resode.solve.result import (
    MaxStepsReached,
    NonFiniteField,
    NonFiniteState,
    SolverError,
    Stats,
    StepSizeUnderflow,
)

__all__ = [
    "MaxStepsReached",
    "NonFiniteField",
    "NonFiniteState",
    "SolverError",
    "Stats",
    "StepSizeUnderflow",
    "odeint",
]
