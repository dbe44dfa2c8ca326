r"""The depth profile of any residual network: features, gradients and eigenvalues, block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from resode.analysis.depth.alignment import boosting, class_means, cosine, error_correction
from resode.analysis.depth.block_spectrum import BlockSpectrum, block_spectrum
from resode.analysis.depth.gradients import EdgeProducts, rows, split_gradient
from resode.analysis.depth.lesion import run_edited
from resode.analysis.depth.losses import LossFunction, batch_of, part, parts, prediction, sample_losses
from resode.analysis.depth.tracing import Addition, Trace, call, tensors_in, trace
from resode.jacobian.arnoldi import random_start, singular_values
from resode.tableaus import ButcherTableau, get_tableau
from resode.tables import plain_table, records_text, short, short_complex

NAN = math.nan

_GROWS = 1.01  # |R(ηλ)| from which a step counts as too large


@dataclass(frozen=True)
class DepthRow:
    """One residual addition y = S(x) + ηF(x); numbers are means over the samples where not said otherwise.

    Norms are Euclidean over a sample's entries. nan stands where a quantity does not exist: `note` says why.

    Args:
        name: the module in which the addition happens.
        kind: of the shortcut: "identity", "parameter-free", "projection" or "gated".
        shape: of y, without the batch.
        step_size: η.
        after: the operation that follows, such as "Relu"; a block with one is no Euler step. "" where the
            next layer, a pooling or several operations read y.
        state_norm: ‖x‖.
        ratio: ‖ηF(x)‖ / ‖x‖.
        inactive: share of units at exactly 0 behind F's activations with a dead zone.
        gradient: ‖∂L/∂x‖, of each sample's own loss; with all paths from x.
        identity_gradient: ‖Sᵀg‖, g the gradient at y.
        residual_gradient: ‖ηJᵀg‖.
        gradient_cosine: of the angle between those two.
        split_error: ‖Sᵀg + ηJᵀg − ∂L/∂x‖ / ‖∂L/∂x‖ over all samples; not small where x is used elsewhere.
        next_cosine: of the angle between the gradients at this block's x and at the next one's.
        correction: cosine of F(x) with x_L − x, x_L the last state of this shape.
        class_correction: the same with the mean of x_L over the other samples of the class.
        boosting: cosine of F(x) with −g.
        solver: the method that the limits are of.
        rightmost: of F's Jacobian J, the eigenvalue of largest real part in any sample (1/time). Where the
            shortcut is not the identity, y − x takes F's place.
        leftmost: of smallest real part.
        largest: of largest modulus.
        step_limit: largest stable step of the solver, the least over the samples; 0 where a mode grows.
        decaying_step: the same over the eigenvalues that do not grow.
        limiting_eigenvalue: the λ that sets it.
        growth: the largest |R(ηλ)| among the eigenvalues that do not grow; above 1 the step is too large.
        growth_eigenvalue: its λ.
        sigma_min: smallest singular value of the block's Jacobian S' + ηJ in any sample.
        sigma_max: the largest.
        epsilon: ‖ηJ‖₂; every singular value lies in [1 − ε, 1 + ε] where S is the identity.
        converged: whether the outermost eigenvalues and singular values have settled to 1e-2.
        loss_change: the mean loss without this block (y = S(x)) less that of the network.
        output_change: ‖z' − z‖ / ‖z‖ of the outputs without this block, over all samples.
        note: what could not be measured.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    step_size: float
    after: str
    state_norm: float
    ratio: float
    inactive: float
    gradient: float
    identity_gradient: float
    residual_gradient: float
    gradient_cosine: float
    split_error: float
    next_cosine: float
    correction: float
    class_correction: float
    boosting: float
    solver: str = ""
    rightmost: complex = NAN
    leftmost: complex = NAN
    largest: complex = NAN
    step_limit: float = NAN
    decaying_step: float = NAN
    limiting_eigenvalue: complex = NAN
    growth: float = NAN
    growth_eigenvalue: complex = NAN
    sigma_min: float = NAN
    sigma_max: float = NAN
    epsilon: float = NAN
    converged: bool = True
    loss_change: float = NAN
    output_change: float = NAN
    note: str = ""


@dataclass(frozen=True)
class StageGradient:
    """The gradient's gain through consecutive blocks of one shape, worst over the samples.

    Args:
        first: name of the first block.
        last: name of the last.
        blocks: how many.
        norm: ‖∏(I + ηJ_l)‖₂, with whatever follows the additions (activations) in between.
        smallest: its smallest singular value, estimated from above.
        upper: ∏(1 + ε_l).
        lower: ∏ max(0, 1 − ε_l).
        uniform: (1 + max ε)^L.
        plain: ∏ ε_l, which bounds the same blocks without shortcuts.
        exact: whether nothing follows the additions, so that the bounds must hold.
    """

    first: str
    last: str
    blocks: int
    norm: float
    smallest: float
    upper: float
    lower: float
    uniform: float
    plain: float
    exact: bool


@dataclass(frozen=True)
class DepthProfile:
    """What `profile_depth` found.

    Args:
        rows: one `DepthRow` a residual addition, in the order of the forward pass.
        stages: gains through runs of equal shape.
        loss: mean loss of the network.
        samples: how many were looked at.
        has_target: whether the loss is that of a target.
    """

    rows: list[DepthRow]
    stages: list[StageGradient]
    loss: float
    samples: int
    has_target: bool

    def to_csv(self, path: str | Path) -> None:
        """Write the rows as CSV, under their field names."""
        Path(path).write_text(records_text(DepthRow, self.rows), encoding="utf-8")

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw it; see `resode.plots.depth_profile`."""
        from resode import plots

        return plots.depth_profile(self, path)

    def diagnosis(self) -> list[str]:
        """What is wrong, worst first: blocks whose step is too large, and what would be safe."""
        bad = sorted((r for r in self.rows if r.growth > _GROWS), key=lambda r: -r.growth)
        found = []
        for r in bad:
            text = (
                f"{r.name}: η = {r.step_size:.4g} is too large for {r.solver}: λ = "
                f"{short_complex(r.growth_eigenvalue)} grows by {r.growth:.4g} a step; decaying modes need "
                f"η ≤ {r.decaying_step:.4g} (set by λ = {short_complex(r.limiting_eigenvalue)})"
            )
            if r.after:
                text += f"; {r.after} follows, so this is no Euler step and the limit is a guide"
            found.append(text + ".")
        return found

    def __str__(self) -> str:
        columns = ["block", "kind", "η", "‖x‖", "‖F‖/‖x‖", "dead", "grad", "id·res", "max Re λ", "limit"]
        columns += ["decaying", "growth", "σ min", "σ max", "Δ loss" if self.has_target else "Δ output"]
        table = []
        for r in self.rows:
            effect = r.loss_change if self.has_target else r.output_change
            numbers = (r.step_size, r.state_norm, r.ratio, r.inactive, r.gradient, r.gradient_cosine)
            more = (complex(r.rightmost).real, r.step_limit, r.decaying_step, r.growth)
            last = (r.sigma_min, r.sigma_max, effect)
            table.append([r.name, r.kind, *(short(v) for v in (*numbers, *more, *last))])
        lines = plain_table(columns, table, words=2)
        solvers = ", ".join(dict.fromkeys(r.solver for r in self.rows if r.solver)) or "no solver"
        lines.append(f"{len(self.rows)} residual additions, {self.samples} samples, limits for {solvers}")
        for s in self.stages:
            gain = f"‖∏(I+ηJ)‖ = {s.norm:.4g}"
            bound = f"≤ ∏(1+ε) = {s.upper:.4g}" if s.exact else "(activations between)"
            lines.append(f"{s.first} … {s.last}: {gain} {bound}; without shortcuts ≤ {s.plain:.3g}")
        return "\n".join(lines + self.diagnosis()[:5])


def profile_depth(
    model: nn.Module,
    x: Any,
    target: Any = None,
    *,
    blocks: str | Sequence[str] | None = None,
    solver: str | ButcherTableau | None = None,
    loss_fn: LossFunction | None = None,
    spectra: int = 2,
    lesions: bool = True,
    batch_size: int = 32,
) -> DepthProfile:
    r"""Profile every residual addition of a network: ours or anyone's, of images or of sequences.

    The blocks are found by tracing which tensors are added to which; the model is not changed. A sum of
    branches that all start from one state, and the stages of a Runge-Kutta step, count as one block.

    Args:
        model: in eval mode.
        x: inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments; dimension 0
            of every tensor is the batch.
        target: for the loss: classes (batch,), or (batch, length) for sequences, or numbers of the output's
            shape. Without it gradients are those of ½‖output‖², and effects those on the output.
        blocks: names of modules to take as blocks instead of tracing, with * for any part of a name:
            "layer?.*". Their output less their input counts as F.
        solver: the method whose step limits are wanted; None for each block's own, which is Euler but in a
            `ResidualStack` under another one.
        loss_fn: another loss, `loss_fn(output, target)`, a mean over samples or one number a sample.
        spectra: samples whose Jacobians are looked at, the first ones; 0 leaves that out.
        lesions: run the network once without each block.
        batch_size: samples at once; more are taken in parts.

    Returns:
        DepthProfile; print it, `.to_csv(path)`, `.plot(path)`, `.diagnosis()`.

    Raises:
        ValueError: training mode, a random output, no residual block found, shapes that do not fit.
        TypeError: complex inputs; a model that is no module.

    Example:
        >>> from resode.networks import build
        >>> _ = torch.manual_seed(0)
        >>> model = build("odenet20", in_channels=1).eval()
        >>> profile = profile_depth(model, torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), spectra=0)
        >>> len(profile.rows), profile.rows[3].name, profile.rows[3].kind
        (9, 'layer2.0', 'parameter-free')
        >>> max(row.split_error for row in profile.rows) < 1e-5
        True
    """
    tableau = None if solver is None else get_tableau(solver)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(spectra, bool) or not isinstance(spectra, int) or spectra < 0:
        raise ValueError(f"spectra must be a number of samples, at least 0, got {spectra!r}.")
    model = getattr(model, "_orig_mod", model)  # of torch.compile, which no mode sees into
    _check_mode(model)
    batch = batch_of(x)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    spectra_found: list[BlockSpectrum] = []
    stages: list[StageGradient] = []
    with torch.inference_mode(False):
        pieces = [
            _profile_part(model, some, wanted, size, blocks, loss_fn, lesions=lesions)
            for some, wanted, size in parts(x, target, batch_size)
        ]
        _check_random(model, part(x, 0, min(2, batch), batch))
        if spectra > 0:
            count = min(spectra, batch)
            traced = trace(model, part(x, 0, count, batch), blocks)
            places = _numbered(traced.additions)
            spectra_found = [block_spectrum(a, model, count, tableau, i) for i, a in places]
            stages = _stages(traced, spectra_found, count)
    merged = _merged(pieces)
    found = []
    for i, measures in enumerate(merged.rows):
        spectrum = spectra_found[i].values if spectra_found else {}
        notes = [spectra_found[i].note] if spectra_found and spectra_found[i].note else []
        found.append(DepthRow(**{**measures, **spectrum}, note="; ".join(notes)))
    return DepthProfile(found, stages, merged.loss, batch, target is not None)


def _numbered(additions: list[Addition]) -> list[tuple[int, Addition]]:
    """Each addition with its place among those of its module."""
    seen: dict[str, int] = {}
    result = []
    for a in additions:
        result.append((seen.get(a.module, 0), a))
        seen[a.module] = seen.get(a.module, 0) + 1
    return result


def _check_mode(model: nn.Module) -> None:
    for name, module in model.named_modules():
        random = isinstance(module, _DropoutNd) and module.training and module.p > 0
        coupled = isinstance(module, _BatchNorm) and module.training
        if random or coupled or (not name and module.training):
            raise ValueError(
                "a profile is of the network as it predicts, and this one is in training mode"
                f"{f' ({type(module).__name__} {name})' if name else ''}: call .eval() on it."
            )


def _check_random(model: nn.Module, x: Any) -> None:
    """Refuse a model whose output is random, as with a custom module in training mode."""
    with torch.no_grad():
        state = torch.get_rng_state()
        z = call(model, x)
        if torch.equal(state, torch.get_rng_state()):
            return
        again = call(model, x)
    if not all(
        torch.allclose(a, b, equal_nan=True) for a, b in zip(tensors_in(z), tensors_in(again), strict=True)
    ):
        training = [name for name, module in model.named_modules() if module.training]
        raise ValueError(
            "a profile is of the network as it predicts, and this one gives another output each time: call "
            f".eval() on it{f'; {training[0]} is in training mode' if training else ''}."
        )


@dataclass
class _Part:
    """Sums over the samples of one part."""

    rows: list[dict[str, Any]]
    sums: list[dict[str, Tensor]]
    loss: float
    samples: int


def _profile_part(
    model: nn.Module,
    x: Any,
    target: Any,
    batch: int,
    blocks: Any,
    loss_fn: LossFunction | None,
    *,
    lesions: bool,
) -> _Part:
    """The profile of a few samples, without the spectra."""
    traced = trace(model, x, blocks)
    additions = traced.additions
    if not additions:
        raise ValueError(
            "no residual block was found: nothing in this network adds a branch with weights to the state "
            "that it starts from. Name the modules that act as blocks with blocks=, for example "
            "blocks='layers.*'."
        )
    losses = sample_losses(traced.output, target, loss_fn, batch)
    edges = [e for a in additions for e in (a.at_x, a.at_y)]
    with torch.enable_grad():
        gradients = torch.autograd.grad(losses.sum(), edges, retain_graph=True, allow_unused=True)
    at_x = [torch.zeros_like(a.x) if g is None else g for a, g in zip(additions, gradients[::2], strict=True)]
    at_y = [
        torch.zeros_like(a.y) if g is None else g for a, g in zip(additions, gradients[1::2], strict=True)
    ]
    ends = _ends(additions)
    z = prediction(traced.output).detach()
    labels = target if isinstance(target, Tensor) and not target.is_floating_point() else None
    fixed, sums = [], []
    for i, a in enumerate(additions):
        identity, residual = split_gradient(a, at_y[i])
        total = at_x[i]
        last = additions[ends[i]].y
        values: dict[str, Tensor] = {
            "state_norm": _norm(a.x, batch),
            "ratio": _norm(a.increment.expand_as(a.y), batch) / _norm(a.x, batch),
            "gradient": _norm(total, batch),
            "identity_gradient": _norm(identity, batch),
            "residual_gradient": _norm(residual, batch),
            "gradient_cosine": cosine(identity, residual, batch),
            "split_squares": _norm(identity + residual - total, batch) ** 2,
            "gradient_squares": _norm(total, batch) ** 2,
            "boosting": boosting(a.increment.expand_as(a.y), at_y[i], batch),
        }
        following = at_x[i + 1] if i + 1 < len(additions) else at_y[i]
        if following.shape == total.shape:
            values["next_cosine"] = cosine(total, following, batch)
        if a.keeps_shape and last.shape == a.x.shape:
            values["correction"] = error_correction(a.increment, a.x, last, batch)
            if labels is not None and labels.shape == (batch,) == a.x.shape[:1]:
                means = class_means(last, labels.to(last.device))
                values["class_correction"] = error_correction(a.increment, a.x, means, batch)
        if a.inactive:
            values["inactive"] = torch.full((batch,), sum(a.inactive) / len(a.inactive))
        if lesions:
            with torch.no_grad():
                output = run_edited(model, x, [(a, 0.0)])
                changed = sample_losses(output, target, loss_fn, batch)
                if target is not None or loss_fn is not None:
                    values["loss_change"] = changed - losses.detach()
                difference = prediction(output) - z
                values["difference_squares"] = difference.reshape(batch, -1).norm(dim=1) ** 2
                values["output_squares"] = z.reshape(batch, -1).norm(dim=1) ** 2
        sums.append(values)
        fixed.append(
            {
                "name": a.name,
                "kind": a.kind,
                "shape": tuple(a.y.shape[1:]),
                "step_size": a.step_size,
                "after": a.after,
            }
        )
    return _Part(fixed, sums, float(losses.detach().sum()), batch)


def _norm(t: Tensor, batch: int) -> Tensor:
    return rows(t, batch).norm(dim=1)


def _ends(additions: list[Addition]) -> list[int]:
    """For each addition the last one of the run of equal shapes that it belongs to."""
    ends = list(range(len(additions)))
    for i in reversed(range(len(additions) - 1)):
        following = additions[i + 1]
        if following.keeps_shape and following.x.shape == additions[i].y.shape:
            ends[i] = ends[i + 1]
    return ends


@dataclass
class _Merged:
    rows: list[dict[str, Any]]
    loss: float


_MEANS = (
    "state_norm ratio inactive gradient identity_gradient residual_gradient gradient_cosine next_cosine "
    "correction class_correction boosting loss_change"
).split()


def _merged(pieces: list[_Part]) -> _Merged:
    """Means over all samples of all parts."""
    first = pieces[0]
    if any([r["name"] for r in p.rows] != [r["name"] for r in first.rows] for p in pieces):
        raise ValueError(
            "the network adds other tensors for other samples; profile them one batch at a time."
        )
    merged = []
    for i, fixed in enumerate(first.rows):
        joined = {
            key: torch.cat([torch.atleast_1d(p.sums[i][key]).double().cpu() for p in pieces])
            for key in first.sums[i]
        }
        row = dict(fixed)
        for key in _MEANS:
            row[key] = _mean(joined[key]) if key in joined else NAN
        row["split_error"] = _ratio(joined["split_squares"], joined["gradient_squares"])
        if "difference_squares" in joined:
            row["output_change"] = _ratio(joined["difference_squares"], joined["output_squares"])
        merged.append(row)
    samples = sum(p.samples for p in pieces)
    return _Merged(merged, sum(p.loss for p in pieces) / samples)


def _mean(values: Tensor) -> float:
    known = values[~torch.isnan(values)]
    return float(known.mean()) if len(known) else NAN


def _ratio(squares: Tensor, of: Tensor) -> float:
    whole = float(of.sum())
    return math.sqrt(float(squares.sum()) / whole) if whole > 0 else 0.0


def _stages(traced: Trace, spectra: list[BlockSpectrum], batch: int) -> list[StageGradient]:
    """The gain through every run of at least two identity blocks of one shape."""
    additions = traced.additions
    found, start = [], 0
    while start < len(additions):
        stop = start
        while stop + 1 < len(additions) and _joined(additions[stop], additions[stop + 1]):
            stop += 1
        run = additions[start : stop + 1]
        if len(run) > 1 and run[0].kind == "identity":
            found.append(_gain(run, spectra[start : stop + 1], batch))
        start = stop + 1
    return found


def _joined(a: Addition, b: Addition) -> bool:
    return a.kind == b.kind == "identity" and a.y.shape == b.x.shape


def _gain(run: list[Addition], spectra: list[BlockSpectrum], batch: int) -> StageGradient:
    first, last = run[0], run[-1]
    products = EdgeProducts(last.at_y, first.at_x, last.y, first.x, batch)
    flat = rows(first.x, batch)
    start = random_start(len(flat), flat.shape[1], first.x)
    sizes = [float(s.values.get("epsilon", NAN)) for s in spectra]
    try:
        sigma, _ = singular_values(products.jvp, products.vjp, start, 40)
        norm, smallest = float(sigma[:, 0].max()), float(sigma[:, -1].min())
    except RuntimeError:
        norm = smallest = NAN  # an operation without a second derivative
    exact = all(b.at_x == a.at_y for a, b in pairwise(run))
    return StageGradient(
        first=first.name,
        last=last.name,
        blocks=len(run),
        norm=norm,
        smallest=smallest,
        upper=math.prod(1 + e for e in sizes),
        lower=math.prod(max(0.0, 1 - e) for e in sizes),
        uniform=(1 + max(sizes)) ** len(run),
        plain=math.prod(sizes),
        exact=exact,
    )
