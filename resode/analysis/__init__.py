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

__all__ = [
    "Bifurcation",
    "TransientGrowth",
    "bifurcation",
    "contraction_step",
    "count",
    "jacobian",
    "logarithmic_norm",
    "max_stable_step",
    "step_limit",
    "transient_growth",
]
