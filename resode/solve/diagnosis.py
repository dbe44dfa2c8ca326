"""Why a solve failed: the eigenvalue of the field's Jacobian that limits the step.

Computed after the failure only, and only where the state has few entries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from resode.solve.host import hides_samples
from resode.solve.step import Field
from resode.tableaus import ButcherTableau

MAX_ENTRIES = 256
STIFF_SOLVER = 'method="kvaerno5" or "radau5", which are implicit and have no such limit'


def spectrum(f: Field, time: Any, x: Tensor, sample: int | None) -> Tensor | None:
    """Eigenvalues of ∂F/∂x, complex (n,); None where they can't be had.

    Args:
        f: the field.
        time: as f takes it.
        x: the state.
        sample: of which row of the state, where it is a batch; None for the whole.
    """
    if hides_samples(x):
        return None
    x = x.detach()
    row = x if sample is None else x[sample]
    row = torch.view_as_real(row) if x.is_complex() else row
    if not 0 < row.numel() <= MAX_ENTRIES or not torch.isfinite(row).all():
        return None

    def field(row: Tensor) -> Tensor:
        y = torch.view_as_complex(row) if x.is_complex() else row
        if sample is None:
            dy = f(time, y)
        else:
            dy = f(time, torch.cat([x[:sample], y[None], x[sample + 1 :]]))[sample]
        return torch.view_as_real(dy) if x.is_complex() else dy

    try:
        with torch.enable_grad():
            if not field(row.requires_grad_()).requires_grad:
                return None
        jacobian = torch.autograd.functional.jacobian(field, row.detach())
        matrix = jacobian.reshape(row.numel(), row.numel()).double().cpu()
        return torch.linalg.eigvals(matrix) if torch.isfinite(matrix).all() else None
    except Exception:  # whatever a field may raise, the failure that is being explained comes first
        return None


def explain(
    tableau: ButcherTableau, eigenvalues: Tensor | None, step: float, left: float
) -> tuple[str, str, complex | None]:
    """What kind of failure the spectrum shows, as text.

    Args:
        tableau: the method.
        eigenvalues: from `spectrum`.
        step: the size of the step that was tried, ≥ 0.
        left: the time between here and the end, > 0.

    Returns:
        kind: "stiff", "growing", "smooth" (stability allows far longer steps) or "unknown"; the sentence
        for the message, empty where unknown; the eigenvalue it names.
    """
    if eigenvalues is None:
        return "unknown", "", None
    from resode.stability import eigenvalue_step_limit

    limit = eigenvalue_step_limit(eigenvalues, tableau)
    stable = float(limit.decaying_step)
    fastest = complex(eigenvalues[eigenvalues.real.argmax()])
    growth = fastest.real * max(step, min(left, 1e3 * step))
    if math.isfinite(stable) and stable > 0 and step > 0.3 * stable and left > 10 * stable:
        binding = _binding(eigenvalues, tableau)
        text = f"stiff: λ ≈ {number(binding)}; {tableau.name} needs steps below {number(stable)}"
        return "stiff", text, binding
    if growth > 3 and fastest.real * left > 30:
        text = (
            f"growing: λ ≈ {number(fastest)}, so differences grow e-fold every {number(1 / fastest.real)} "
            "and the state may blow up in finite time"
        )
        return "growing", text, fastest
    if math.isfinite(stable) and stable > 0:
        binding = _binding(eigenvalues, tableau)
        text = f"not stiff: λ ≈ {number(binding)} allows {tableau.name} steps up to {number(stable)}"
        return "smooth", text, binding
    return "smooth", "not stiff: no eigenvalue of the field limits the steps", None


def _binding(eigenvalues: Tensor, tableau: ButcherTableau) -> complex:
    """The decaying eigenvalue that leaves the stability region first."""
    from resode.stability import eigenvalue_step_limit

    decaying = eigenvalues[eigenvalues.real <= 0]
    if len(decaying) == 0:
        decaying = eigenvalues
    limit = eigenvalue_step_limit(decaying, tableau)
    return complex(limit.limiting_eigenvalue) if math.isfinite(limit.step) else complex(decaying[0])


def number(value: complex) -> str:
    """A number in three digits, as −1e6 or −0.5 ± 3i.

    Example:
        >>> number(-1e6), number(3.3066e-6), number(-0.5 + 3j)
        ('−1e6', '3.31e-6', '−0.5 ± 3i')
    """
    value = complex(value)
    if abs(value.imag) > 1e-9 * abs(value):
        return f"{number(value.real)} ± {number(abs(value.imag))}i"
    text = f"{value.real:.3g}"
    mantissa, e, exponent = text.partition("e")
    return mantissa.replace("-", "−") + (f"e{int(exponent)}" if e else "")
