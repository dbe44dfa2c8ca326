"""Residual networks as dynamical systems.

A ResNet block x + ηF(x) is one forward-Euler step of dx/dt = F(x): the solver can be swapped, the
step has a limit that the Jacobian's eigenvalues set, and depth becomes time.
"""

from resode.blocks import ODEBlock, ResidualStack
from resode.solve import (
    MaxStepsReached,
    NonFiniteField,
    NonFiniteState,
    SolverError,
    Stats,
    StepSizeUnderflow,
    odeint,
)
from resode.tableaus import METHODS, ButcherTableau

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "ButcherTableau",
    "MaxStepsReached",
    "NonFiniteField",
    "NonFiniteState",
    "ODEBlock",
    "ResidualStack",
    "SolverError",
    "Stats",
    "StepSizeUnderflow",
    "odeint",
]
