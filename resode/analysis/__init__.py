"""Analyses of fields and networks, one file each: any callable F, any network."""

from resode.analysis.bifurcation import Bifurcation, bifurcation
from resode.analysis.cost import count
from resode.analysis.linearize import jacobian
from resode.analysis.max_step import max_stable_step, step_limit
from resode.analysis.nonnormal import (
    TransientGrowth,
    contraction_step,
    logarithmic_norm,
    transient_growth,
)
from resode.analysis.operator_norm import bound_operator_norm, operator_norm
from resode.analysis.penalty import StepLimitPenalty

__all__ = [
    "Bifurcation",
    "StepLimitPenalty",
    "TransientGrowth",
    "bifurcation",
    "bound_operator_norm",
    "contraction_step",
    "count",
    "jacobian",
    "logarithmic_norm",
    "max_stable_step",
    "operator_norm",
    "step_limit",
    "transient_growth",
]
