"""Analyses of fields and networks, one file each: any callable F, any network."""

from resode.analysis.alignment import BoostingAlong, boosting_along, class_means, correction_along
from resode.analysis.bifurcation import Bifurcation, bifurcation
from resode.analysis.classify import Classification, classify
from resode.analysis.collective import FirstUpdate, first_update
from resode.analysis.conflict import GradientConflict, gradient_conflict
from resode.analysis.cost import count
from resode.analysis.curvature import largest_hessian_eigenvalue, max_learning_rate
from resode.analysis.depth import DepthProfile, DepthRow, profile_depth
from resode.analysis.fixed_points import FixedPoints, find_fixed_points, find_several_fixed_points
from resode.analysis.gradients import ProductNorm, gradient_norms, product_norm
from resode.analysis.learning_curve import (
    LearningCurve,
    LeastSquares,
    PiecewiseLinear,
    learning_curve,
)
from resode.analysis.lesion import Lesion, lesion_study, reordering_study, step_scan
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
from resode.analysis.recovery import recovery
from resode.analysis.scan import (
    StabilityLoss,
    cobweb,
    lyapunov_exponents,
    phase_portrait,
    stability_losses,
)
from resode.analysis.unrolled import UnrolledSum, unrolled_sum
from resode.analysis.virtual_depth import VirtualDepth, virtual_depth

__all__ = [
    "Bifurcation",
    "BoostingAlong",
    "Classification",
    "DepthProfile",
    "DepthRow",
    "FirstUpdate",
    "FixedPoints",
    "GradientConflict",
    "LearningCurve",
    "LeastSquares",
    "Lesion",
    "PiecewiseLinear",
    "ProductNorm",
    "StabilityLoss",
    "StepLimitPenalty",
    "TransientGrowth",
    "UnrolledSum",
    "VirtualDepth",
    "bifurcation",
    "boosting_along",
    "bound_operator_norm",
    "class_means",
    "classify",
    "cobweb",
    "contraction_step",
    "correction_along",
    "count",
    "find_fixed_points",
    "find_several_fixed_points",
    "first_update",
    "gradient_conflict",
    "gradient_norms",
    "jacobian",
    "largest_hessian_eigenvalue",
    "learning_curve",
    "lesion_study",
    "logarithmic_norm",
    "lyapunov_exponents",
    "max_learning_rate",
    "max_stable_step",
    "operator_norm",
    "phase_portrait",
    "product_norm",
    "profile_depth",
    "recovery",
    "reordering_study",
    "stability_losses",
    "step_limit",
    "step_scan",
    "transient_growth",
    "unrolled_sum",
    "virtual_depth",
]
