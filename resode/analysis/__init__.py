"""Analyses of fields and networks, one file each: any callable F, any network."""

from resode.analysis.bifurcation import Bifurcation, bifurcation
from resode.analysis.classify import Classification, classify
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
    product_norm,
    shortcut_matrix,
)
from resode.analysis.highways import HighwayGradients, highway_gradients
from resode.analysis.lesion import reordering_study, step_scan
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
from resode.analysis.scan import (
    StabilityLoss,
    cobweb,
    lyapunov_exponents,
    phase_portrait,
    stability_losses,
)
from resode.analysis.variation import total_variation

__all__ = [
    "Bifurcation",
    "BlockGains",
    "Classification",
    "DepthConvergence",
    "DepthProfile",
    "DepthRow",
    "FixedPoints",
    "GradientParts",
    "HighwayGradients",
    "ProductNorm",
    "QuadraticModel",
    "StabilityLoss",
    "StepLimitPenalty",
    "TransientGrowth",
    "bifurcation",
    "block_gains",
    "bound_operator_norm",
    "classify",
    "cobweb",
    "contraction_step",
    "count",
    "depth_convergence",
    "find_fixed_points",
    "find_several_fixed_points",
    "gradient_norms",
    "gradient_parts",
    "highway_gradients",
    "jacobian",
    "largest_hessian_eigenvalue",
    "logarithmic_norm",
    "lyapunov_exponents",
    "max_learning_rate",
    "max_stable_step",
    "operator_norm",
    "phase_portrait",
    "product_norm",
    "profile_depth",
    "reordering_study",
    "shortcut_matrix",
    "stability_losses",
    "step_limit",
    "step_scan",
    "total_variation",
    "transient_growth",
]
