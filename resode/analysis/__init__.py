"""Analyses of fields and networks, one file each: any callable F, any network."""

from resode.analysis.bifurcation import Bifurcation, bifurcation
from resode.analysis.classify import Classification, classify
from resode.analysis.fixed_points import FixedPoints, find_fixed_points, find_several_fixed_points
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
    "Classification",
    "FixedPoints",
    "TransientGrowth",
    "bifurcation",
    "classify",
    "contraction_step",
    "find_fixed_points",
    "find_several_fixed_points",
    "jacobian",
    "logarithmic_norm",
    "max_stable_step",
    "step_limit",
    "transient_growth",
]
