r"""The stability function R(z) of every method, and the largest stable step for a spectrum.

One step of size η on x' = λx multiplies x by R(ηλ). The step is stable while |R(ηλ)| ≤ 1 for every
eigenvalue λ. The step limit is the first exit from that region,

    sup{h : |R(sλ)| ≤ 1 for all 0 ≤ s ≤ h and every λ},

not the largest stable step: a region can be left and entered again, and all stable intervals are listed
beside the limit. R is known exactly, as fractions; exits are roots of polynomials, and no rounding decides
whether there is one.
"""

from resode.stability.function import stability_coefficients, stability_function
from resode.stability.intervals import (
    StabilityProperties,
    imaginary_stability_interval,
    real_stability_interval,
    stability_properties,
    stable_intervals,
)
from resode.stability.limits import StepLimit, eigenvalue_step_limit

__all__ = [
    "StabilityProperties",
    "StepLimit",
    "eigenvalue_step_limit",
    "imaginary_stability_interval",
    "real_stability_interval",
    "stability_coefficients",
    "stability_function",
    "stability_properties",
    "stable_intervals",
]
