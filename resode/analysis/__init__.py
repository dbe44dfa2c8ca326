"""Analyses of fields and networks, one file each: any callable F, any network."""

from resode.analysis.alignment import BoostingAlong, boosting_along, class_means, correction_along
from resode.analysis.bifurcation import Bifurcation, bifurcation
from resode.analysis.classify import Classification, classify
from resode.analysis.collective import FirstUpdate, first_update
from resode.analysis.conflict import GradientConflict, gradient_conflict
from resode.analysis.convergence import DepthConvergence, depth_convergence
from resode.analysis.cost import count
from resode.analysis.curvature import QuadraticModel, largest_hessian_eigenvalue, max_learning_rate
from resode.analysis.depth import DepthProfile, DepthRow, profile_depth
from resode.analysis.fixed_points import FixedPoints, find_fixed_points, find_several_fixed_points
from resode.analysis.gains import BlockGains, block_gains, gradient_norms
from resode.analysis.gradients import (
    GradientParts,
    ProductNorm,
    gradient_parts,
    loss_gradient_norms,
    product_norm,
    shortcut_matrix,
)
from resode.analysis.highways import HighwayGradients, highway_gradients
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
from resode.analysis.variation import total_variation
from resode.analysis.virtual_depth import VirtualDepth, virtual_depth

__all__ = [
    "Bifurcation",
    "BlockGains",
    "BoostingAlong",
    "Classification",
    "DepthConvergence",
    "DepthProfile",
    "DepthRow",
    "FirstUpdate",
    "FixedPoints",
    "GradientConflict",
    "GradientParts",
    "HighwayGradients",
    "LearningCurve",
    "LeastSquares",
    "Lesion",
    "PiecewiseLinear",
    "ProductNorm",
    "QuadraticModel",
    "StabilityLoss",
    "StepLimitPenalty",
    "TransientGrowth",
    "UnrolledSum",
    "VirtualDepth",
    "bifurcation",
    "block_gains",
    "boosting_along",
    "bound_operator_norm",
    "class_means",
    "classify",
    "cobweb",
    "contraction_step",
    "correction_along",
    "count",
    "depth_convergence",
    "find_fixed_points",
    "find_several_fixed_points",
    "first_update",
    "gradient_conflict",
    "gradient_norms",
    "gradient_parts",
    "highway_gradients",
    "jacobian",
    "largest_hessian_eigenvalue",
    "learning_curve",
    "lesion_study",
    "logarithmic_norm",
    "loss_gradient_norms",
    "lyapunov_exponents",
    "max_learning_rate",
    "max_stable_step",
    "operator_norm",
    "phase_portrait",
    "product_norm",
    "profile_depth",
    "recovery",
    "reordering_study",
    "shortcut_matrix",
    "stability_losses",
    "step_limit",
    "step_scan",
    "total_variation",
    "transient_growth",
    "unrolled_sum",
    "virtual_depth",
]
