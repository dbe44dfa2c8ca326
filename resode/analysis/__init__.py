"""Analyses of fields and networks, by the question that they answer: any callable F, any network."""

from resode.analysis.cost import count
from resode.analysis.curvature import largest_hessian_eigenvalue, max_learning_rate
from resode.analysis.depth.alignment import BoostingAlong, boosting_along, class_means, correction_along
from resode.analysis.depth.gradients import (
    GradientParts,
    ProductNorm,
    gradient_parts,
    loss_gradient_norms,
    product_norm,
    shortcut_matrix,
)
from resode.analysis.depth.lesion import Lesion, lesion_study, reordering_study, step_scan
from resode.analysis.depth.profile import DepthProfile, DepthRow, profile_depth
from resode.analysis.depth.streams import (
    DepthAttention,
    StreamProfile,
    depth_attention,
    map_limit,
    stream_mixing,
)
from resode.analysis.diagnose.findings import Finding
from resode.analysis.diagnose.forecast import Forecast, forecast
from resode.analysis.diagnose.page import Diagnosis, DiagnosisRow, Training, Whole
from resode.analysis.operator_norm import bound_operator_norm, operator_norm
from resode.analysis.rest.bifurcation import Bifurcation, bifurcation
from resode.analysis.rest.classify import Classification, classify
from resode.analysis.rest.fixed_points import FixedPoints, find_fixed_points, find_several_fixed_points
from resode.analysis.rest.scan import (
    StabilityLoss,
    cobweb,
    lyapunov_exponents,
    phase_portrait,
    stability_losses,
)
from resode.analysis.steps.limit import max_stable_step, step_limit
from resode.analysis.steps.nonnormal import (
    TransientGrowth,
    contraction_step,
    logarithmic_norm,
    transient_growth,
)
from resode.analysis.steps.penalty import StepLimitPenalty
from resode.analysis.swap.convergence import DepthConvergence, depth_convergence
from resode.jacobian.linearize import jacobian

__all__ = [
    "Bifurcation",
    "BoostingAlong",
    "Classification",
    "DepthAttention",
    "DepthConvergence",
    "DepthProfile",
    "DepthRow",
    "Diagnosis",
    "DiagnosisRow",
    "Finding",
    "FixedPoints",
    "Forecast",
    "GradientParts",
    "Lesion",
    "ProductNorm",
    "StabilityLoss",
    "StepLimitPenalty",
    "StreamProfile",
    "Training",
    "TransientGrowth",
    "Whole",
    "bifurcation",
    "boosting_along",
    "bound_operator_norm",
    "class_means",
    "classify",
    "cobweb",
    "contraction_step",
    "correction_along",
    "count",
    "depth_attention",
    "depth_convergence",
    "find_fixed_points",
    "find_several_fixed_points",
    "forecast",
    "gradient_parts",
    "jacobian",
    "largest_hessian_eigenvalue",
    "lesion_study",
    "logarithmic_norm",
    "loss_gradient_norms",
    "lyapunov_exponents",
    "map_limit",
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
    "stream_mixing",
    "transient_growth",
]
