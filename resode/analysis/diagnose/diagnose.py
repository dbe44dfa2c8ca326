r"""Why does a network diverge, learn nothing or break under another solver, and what helps?"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resode.analysis.curvature import max_learning_rate
from resode.analysis.depth.losses import LossFunction, batch_of, is_loader, part, sample_losses
from resode.analysis.depth.tracing import tensors_in
from resode.analysis.diagnose.findings import THRESHOLDS, WHOLE, Finding, block_scores, findings
from resode.analysis.diagnose.forecast import Forecast, forecast
from resode.analysis.diagnose.measures import SAMPLES, Measures, measure
from resode.analysis.diagnose.page import Diagnosis, DiagnosisRow, Training, Whole
from resode.analysis.diagnose.solver import solver_findings
from resode.blocks import ResidualStack
from resode.blocks.frozen import FrozenStatistics
from resode.checks import checked
from resode.modes import evaluating
from resode.progress import Progress
from resode.tableaus import get_tableau

_PRODUCTS = 8  # with the loss's Hessian, for the learning rate's limit


@checked
def diagnose(
    model: nn.Module,
    x: Any,
    target: Any = None,
    *,
    loss_fn: LossFunction | None = None,
    lr: float | None = None,
    solvers: str | Sequence[str] = ("rk4",),
    blocks: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Diagnosis:
    r"""What is wrong with a network, if anything: on one page, with advice.

    It costs a few forward and backward passes and needs no eigenvalue. It looks for numbers that are not
    finite; at batch norm's statistics against these inputs; at shortcuts against their siblings; for dead
    activations, branches that pass nothing on, and blocks that amplify a perturbation far more than the
    others; at the whole depth's gain, the solver's steps and the learning rate. Of several faults of one
    place the first in the forward pass comes first. Networks without shortcuts are looked at too.

    Args:
        model: any network; looked at in evaluation mode and put back into its own.
        x: inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments; dimension 0
            of every tensor is the batch. Some 32 of the inputs that it is used for are enough.
        target: for the loss: classes, or numbers of the output's shape. Without it ½‖output‖² is taken.
        loss_fn: another loss, `loss_fn(output, target)`, a mean over samples or one number a sample.
        lr: the learning rate of plain gradient descent or SGD that is to be judged, with `target`.
        solvers: a method, or several, that a `ResidualStack` may be swapped to, for the forecast.
        blocks: names of modules to take as blocks instead of tracing, as in `resode.profile_depth`.
        seed: of the random perturbations.
        progress: say on a terminal how far it is, after two seconds.

    Returns:
        Diagnosis; print it, `.findings`, `.ok`, `.to_csv(path)`, `.plot(path)`.

    Raises:
        TypeError: a model that is no module, complex inputs, lr that is no number.
        ValueError: no samples; an output that does not depend on the input; an unknown solver; shapes that do
            not go together.

    Example:
        >>> from resode.networks import build
        >>> _ = torch.manual_seed(0)
        >>> model = build("odenet20", in_channels=1, width=4, norm="group")
        >>> found = diagnose(model, torch.randn(8, 1, 8, 8))
        >>> found.ok, found.whole.usual
        (True, (0.001, 1000.0))
        >>> with torch.no_grad():
        ...     _ = model.layer2[1].fields[0].conv2.weight.mul_(100)
        >>> diagnose(model, torch.randn(8, 1, 8, 8)).findings[0].cause
        'strong-block'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if lr is not None and (isinstance(lr, bool) or not isinstance(lr, int | float) or not lr > 0):
        raise ValueError(f"lr must be a positive number, got {lr!r}.")
    solvers = [solvers] if isinstance(solvers, str) else list(solvers)
    for name in solvers:
        get_tableau(name)
    model = _within(model)
    _check_inputs(x)
    samples = batch_of(x)
    training = "The model was" if model.training else "Parts of the model were"
    modes = any(module.training for module in model.modules())
    notes = [f"{training} in training mode; it was looked at in evaluation mode."] if modes else []
    if samples == 1:
        notes.append("One sample alone: how much the samples differ is unknown.")
    some = part(x, 0, min(SAMPLES, samples), samples)
    with evaluating(model), Progress("diagnosis", progress) as say:
        m = measure(model, x, target, loss_fn, blocks, seed)
        say("what the measures tell")
        found = findings(m)
        if m.non_finite is None or "reach" in m.non_finite[1]:  # an overflow, which a step may have brought
            found = _with_solver(found, solver_findings(model, some, m))
        finite = m.non_finite is None and m.solver_error is None
        say("forecasts of a swap")
        swap = _forecasts(model, x, solvers) if finite else {}
    training = None
    if lr is not None and target is not None and finite:
        training = _training(model, some, part(target, 0, min(SAMPLES, samples), samples), loss_fn, float(lr))
        explained = any(f.cause in ("explosion", "overstep", "strong-block") for f in found)
        if training.ratio > THRESHOLDS.learning_rate and not explained:  # which bring the limit down
            found.append(too_fast(training))
    return Diagnosis(
        findings=found,
        whole=_whole(m),
        swap=swap,
        training=training,
        rows=_rows(m, found),
        samples=samples,
        solver=", ".join(dict.fromkeys(s.solver for s in model.modules() if isinstance(s, ResidualStack))),
        layers=len(m.layers),
        notes=tuple(notes + m.notes),
    )


def _within(model: nn.Module) -> nn.Module:
    """The model that can be looked into: what was compiled, and weights that take gradients."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile, which no mode sees into
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a scripted model cannot be looked into: pass the module that it was scripted from.")
    weights = [*model.parameters(), *model.buffers()]
    if any(w.is_meta for w in weights):
        raise ValueError("the model's weights are on the meta device and hold no values: load them first.")
    if any(w.is_inference() for w in weights):
        with torch.inference_mode(False):
            return copy.deepcopy(model)
    return model


def _check_inputs(x: Any) -> None:
    if is_loader(x):
        raise TypeError(
            "x must be one batch, a tensor, a tuple of arguments or a mapping of keywords: got "
            f"{type(x).__name__}. Of a loader's batch pass the inputs as x and the targets as target."
        )
    if any(t.is_complex() for t in tensors_in(x)):
        raise TypeError("complex inputs are not supported: give real and imaginary parts.")


def _with_solver(found: list[Finding], solver: list[Finding]) -> list[Finding]:
    """A step that is too long for a decaying mode explains growth, and the block that grows.

    Without such a mode it is the strong block that makes the step too long.
    """
    known = [f for f in solver if f.cause == "stiff" or "eigenvalue" in f.evidence]
    if not known:
        return found or solver
    explained = {"strong-block", "explosion", "collapse", "vanishing"}
    return known + [f for f in found if f.cause not in explained]


def _forecasts(model: nn.Module, x: Any, solvers: Sequence[str]) -> dict[str, Forecast]:
    if not any(isinstance(module, ResidualStack) for module in model.modules()):
        return {}
    return {name: forecast(model, x, name) for name in solvers}


def _training(model: nn.Module, x: Any, target: Any, loss_fn: Any, lr: float) -> Training:
    """Lr against 2/λ_max, with the batch statistics that training would take."""

    def loss(output: Any, wanted: Any) -> torch.Tensor:
        return sample_losses(output, wanted, loss_fn, batch_of(x)).mean()

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(FrozenStatistics(norms))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", RuntimeWarning)  # a limit to two digits is enough here
        for norm in norms:
            norm.train()
        limit = max_learning_rate(model, loss, (x, target), tol=1e-2, max_iter=_PRODUCTS)
    return Training(lr, limit, lr / limit if limit > 0 else math.inf)


def too_fast(t: Training) -> Finding:
    """A learning rate beyond its limit."""
    return Finding(
        WHOLE,
        "learning-rate",
        f"lr {t.lr:.3g} is {t.ratio:.3g} times its limit {t.limit:.3g}, beyond which the steepest direction "
        f"of the loss grows.",
        f"Start with {t.limit / 2:.2g}, or with a warm-up to {t.limit:.2g}.",
        {"lr": t.lr, "limit": t.limit, "ratio": t.ratio},
    )


def _whole(m: Measures) -> Whole | None:
    if not m.blocks:
        return None
    return Whole(m.whole_gain, m.whole_sigma, m.state_growth, (1 / THRESHOLDS.whole, THRESHOLDS.whole))


def _rows(m: Measures, found: Sequence[Finding]) -> list[DiagnosisRow]:
    return [
        DiagnosisRow(b.label, b.shortcut, b.gain, b.branch_gain, b.sigma, b.growth, b.gradient, cause)
        for b, cause in block_scores(m, found)
    ]
