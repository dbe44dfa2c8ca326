"""Residual networks as dynamical systems.

A ResNet block x + ηF(x) is one forward-Euler step of dx/dt = F(x): the solver can be swapped, the
step has a limit that the Jacobian's eigenvalues set, and depth becomes time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from resode.blocks import ODEBlock, ResidualStack
from resode.solve import (
    MaxStepsReached,
    NewtonNotConverged,
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
    from resode import networks, plots
    from resode.analysis.curvature import max_learning_rate
    from resode.analysis.depth.depth_step import depth_step
    from resode.analysis.depth.profile import DepthProfile, profile_depth
    from resode.analysis.diagnose.diagnose import diagnose
    from resode.analysis.diagnose.findings import Finding
    from resode.analysis.diagnose.forecast import Forecast
    from resode.analysis.diagnose.page import Diagnosis
    from resode.analysis.rest.classify import Classification, classify
    from resode.analysis.rest.fixed_points import FixedPoints, find_fixed_points, find_several_fixed_points
    from resode.analysis.steps.design import design_method
    from resode.analysis.steps.limit import max_stable_step, step_limit
    from resode.analysis.steps.penalty import StepLimitPenalty
    from resode.analysis.swap.convert import convert
    from resode.analysis.swap.modified import distance_from_ode, modified_field
    from resode.analysis.swap.proof import SwapProof
    from resode.analysis.swap.report import SwapReport, swap_report
    from resode.training.compare import compare
    from resode.training.evaluate import load
    from resode.training.run import train
    from resode.training.sweep import sweep

__version__ = "0.2.0"

# Imported when it is first asked for, so that solving doesn't wait for analyses, figures and training.
_LAZY = {
    "resode.analysis.curvature": ("max_learning_rate",),
    "resode.analysis.depth.depth_step": ("depth_step",),
    "resode.analysis.diagnose.diagnose": ("diagnose",),
    "resode.analysis.diagnose.findings": ("Finding",),
    "resode.analysis.diagnose.forecast": ("Forecast",),
    "resode.analysis.diagnose.page": ("Diagnosis",),
    "resode.analysis.swap.convert": ("convert",),
    "resode.analysis.swap.modified": ("distance_from_ode", "modified_field"),
    "resode.analysis.depth.profile": ("DepthProfile", "profile_depth"),
    "resode.analysis.rest.classify": ("Classification", "classify"),
    "resode.analysis.rest.fixed_points": ("FixedPoints", "find_fixed_points", "find_several_fixed_points"),
    "resode.analysis.steps.design": ("design_method",),
    "resode.analysis.steps.limit": ("max_stable_step", "step_limit"),
    "resode.analysis.steps.penalty": ("StepLimitPenalty",),
    "resode.analysis.swap.proof": ("SwapProof",),
    "resode.analysis.swap.report": ("SwapReport", "swap_report"),
    "resode.training.compare": ("compare",),
    "resode.training.evaluate": ("load",),
    "resode.training.run": ("train",),
    "resode.training.sweep": ("sweep",),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}
_ROOMS = ("analysis", "fields", "networks", "plots", "shortcuts", "training")

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
    "NewtonNotConverged",
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
    "design_method",
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
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"resode.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'resode' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if not _HOME[name].startswith("resode.training"):
            raise
        raise ModuleNotFoundError(
            f"resode.{name} needs {error.name}: pip install 'resode[train]'", name=error.name
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
