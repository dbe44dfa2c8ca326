"""Why a run diverged: the whole depth's gain, a step that its solver does not bear, or the learning rate."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from resode.analysis.depth.depth_step import depth_step
from resode.analysis.diagnose.diagnose import diagnose, too_fast
from resode.analysis.diagnose.findings import Finding
from resode.blocks.statistics import measure_statistics, tracked_norms
from resode.checks import checked

SAMPLES = 8
"""Images that are looked at."""

BLAMED = ("non-finite", "overstep", "stiff", "explosion", "strong-block", "learning-rate")
"""Causes that make training diverge, the first of which is told."""


@checked
def why_diverged(
    network: nn.Module, state: Mapping[str, Tensor], images: Tensor, labels: Tensor, lr: float
) -> Finding | None:
    """What `resode.diagnose` finds in the last good state that makes training diverge.

    The depth and the solver are looked at first: a depth that explodes dies at any learning rate.

    Args:
        network: any; it is not changed.
        state: its weights and buffers, finite.
        images: normalised, shape (B, C, H, W); the first eight are used.
        labels: their classes, shape (B,).
        lr: the learning rate at which it diverged.

    Returns:
        The first cause, or None where nothing is found or the network cannot be looked at.

    Example:
        >>> import torch
        >>> from resode import ResidualStack
        >>> field = nn.Linear(8, 8, bias=False)
        >>> _ = field.weight.data.copy_(-20 * torch.eye(8))
        >>> network = ResidualStack(field, depth=4, step_size=0.5)
        >>> found = why_diverged(network, network.state_dict(), torch.ones(2, 8), torch.tensor([0, 1]), 0.1)
        >>> found.cause, round(found.evidence["limit"], 6), round(found.evidence["gain"], 2)
        ('overstep', 0.1, 9.0)
    """
    network = copy.deepcopy(network).cpu().float()
    network.load_state_dict({name: value.cpu() for name, value in state.items()})
    x, y = images[:SAMPLES].detach().cpu().float(), labels[:SAMPLES].cpu()
    try:
        if tracked_norms(network):  # training normalises by the batch's own statistics
            measure_statistics(network, [images.detach().cpu().float()])
        found = diagnose(network, x, y, lr=lr, solvers=())
    except (ValueError, TypeError, RuntimeError, ArithmeticError):
        return None  # it takes other inputs, or cannot be differentiated
    first = next((f for cause in BLAMED for f in found.findings if f.cause == cause), None)
    if first is None and found.training is not None and found.training.ratio > 1:
        return too_fast(found.training)
    return _with_depth_step(first, network, x) if first is not None and first.cause == "explosion" else first


def _with_depth_step(f: Finding, network: nn.Module, x: Tensor) -> Finding:
    """An explosion's advice with the factor on every branch at which the depth's gain is 10."""
    try:
        eta = depth_step(network, x[:2])
    except (ValueError, RuntimeError, ArithmeticError):  # no residual blocks, or no second derivative
        return f
    said = f"{f.advice} With every branch times {eta:.2g} the depth's gain is 10 (resode.depth_step)."
    return replace(f, advice=said, evidence=f.evidence | {"depth_step": eta})
