"""Residual networks as dynamical systems.

A ResNet block x + ηF(x) is one forward-Euler step of dx/dt = F(x): the solver can be swapped, the
step has a limit that the Jacobian's eigenvalues set, and depth becomes time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from resode import networks
from resode.analysis.curvature import max_learning_rate
from resode.analysis.depth.depth_step import depth_step
from resode.analysis.depth.profile import DepthProfile, profile_depth
from resode.analysis.diagnose.diagnose import diagnose
from resode.analysis.diagnose.findings import Finding
from resode.analysis.diagnose.forecast import Forecast
from resode.analysis.diagnose.page import Diagnosis
from resode.analysis.rest.classify import Classification, classify
from resode.analysis.rest.fixed_points import FixedPoints, find_fixed_points, find_several_fixed_points
from resode.analysis.steps.limit import max_stable_step, step_limit
from resode.analysis.steps.penalty import StepLimitPenalty
from resode.analysis.swap.convert import convert
from resode.analysis.swap.modified import distance_from_ode, modified_field
from resode.analysis.swap.proof import SwapProof
from resode.analysis.swap.report import SwapReport, swap_report
from resode.blocks import ODEBlock, ResidualStack
from resode.solve import (
    MaxStepsReached,
    NonFiniteField,
    NonFiniteState,
    Solution,
    SolverError,
    SolverStep,
    Stats,
    StepSizeUnderflow,
    odeint,
    odeint_adjoint,
    odeint_event,
    solve_ivp,
    steps,
)
from resode.stability import (
    StepLimit,
    imaginary_stability_interval,
    real_stability_interval,
    stability_function,
)
from resode.tableaus import METHODS, ButcherTableau

if TYPE_CHECKING:
    from resode import plots
    from resode.training.compare import compare
    from resode.training.evaluate import load
    from resode.training.run import train

__version__ = "0.1.0"

# What needs matplotlib or the extra `train` is imported when it is first asked for.
_LAZY = {
    "compare": "resode.training.compare",
    "load": "resode.training.evaluate",
    "plots": "resode.plots",
    "train": "resode.training.run",
}

__all__ = [
    "METHODS",
    "ButcherTableau",
    "Classification",
    "DepthProfile",
    "Diagnosis",
    "Finding",
    "FixedPoints",
    "Forecast",
    "MaxStepsReached",
    "NonFiniteField",
    "NonFiniteState",
    "ODEBlock",
    "ResidualStack",
    "Solution",
    "SolverError",
    "SolverStep",
    "Stats",
    "StepLimit",
    "StepLimitPenalty",
    "StepSizeUnderflow",
    "SwapProof",
    "SwapReport",
    "classify",
    "compare",
    "convert",
    "depth_step",
    "diagnose",
    "distance_from_ode",
    "find_fixed_points",
    "find_several_fixed_points",
    "imaginary_stability_interval",
    "load",
    "max_learning_rate",
    "max_stable_step",
    "modified_field",
    "networks",
    "odeint",
    "odeint_adjoint",
    "odeint_event",
    "plots",
    "profile_depth",
    "real_stability_interval",
    "solve_ivp",
    "stability_function",
    "step_limit",
    "steps",
    "swap_report",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'resode' has no attribute {name!r}")
    module = import_module(_LAZY[name])
    return module if name == "plots" else getattr(module, name)
