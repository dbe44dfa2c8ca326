"""How dx/dt = f(t, x) is advanced: one step, fixed steps, error-controlled steps, `odeint`."""

from resode.solve.ivp import Solution, solve_ivp
from resode.solve.odeint import odeint, odeint_adjoint, odeint_event
from resode.solve.result import (
    MaxStepsReached,
    NewtonNotConverged,
    NonFiniteField,
    NonFiniteState,
    SolverError,
    Stats,
    StepSizeUnderflow,
)
from resode.solve.stepping import SolverStep, steps

__all__ = [
    "MaxStepsReached",
    "NewtonNotConverged",
    "NonFiniteField",
    "NonFiniteState",
    "Solution",
    "SolverError",
    "SolverStep",
    "Stats",
    "StepSizeUnderflow",
    "odeint",
    "odeint_adjoint",
    "odeint_event",
    "solve_ivp",
    "steps",
]
