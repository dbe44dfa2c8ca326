r"""The depth profile of any residual network: features, gradients and eigenvalues, block by block."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from resode.analysis.depth.alignment import class_means, cosine
from resode.analysis.depth.block_spectrum import BlockSpectrum, block_spectrum
from resode.analysis.depth.gradients import split_gradient
from resode.analysis.depth.lesion import run_edited
from resode.analysis.depth.losses import (
    LossFunction,
    batch_of,
    batches,
    part,
    parts,
    prediction,
    sample_losses,
)
from resode.analysis.depth.tracing import Addition, Trace, trace
from resode.calls import call, tensors_in
from resode.checks import check_whole, checked
from resode.jacobian.lanczos import random_start, singular_values
from resode.jacobian.products import JacobianProducts, rows
from resode.jacobian.spectrum import SpectrumOptions, formed
from resode.progress import Progress
from resode.results import Result
from resode.tableaus import ButcherTableau, get_tableau
from resode.tables import plain_table, records_text, short

NAN = math.nan

_SPLIT = 1e-2  # split error from which it is printed


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
        converged: whether both limits are exact, and singular values known to 1e-2.
        exact: whether `decaying_step` is exact; else it is an upper bound, or `note` says that none is known.
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
    exact: bool = True
    loss_change: float = NAN
    output_change: float = NAN
    note: str = ""

    @property
    def decaying(self) -> str:
        """`decaying_step` as it is printed: a figure, or a bound with its sign."""
        return ("" if self.exact or self.decaying_step != self.decaying_step else "≤ ") + short(
            self.decaying_step
        )


@dataclass(frozen=True)
class GroupGradient:
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


@dataclass(frozen=True, repr=False)
class DepthProfile(Result):
    """What `profile_depth` found.

    Args:
        rows: one `DepthRow` a residual addition, in the order of the forward pass.
        groups: gains through runs of equal shape.
        loss: mean loss of the network.
        samples: how many were looked at.
        has_target: whether the loss is that of a target.
        refused: additions to a state that are no residual block: the module, and why.
        outside: modules with weight matrices or kernels within no residual addition, as a stem or a head.
    """

    rows: list[DepthRow]
    groups: list[GroupGradient]
    loss: float
    samples: int
    has_target: bool
    refused: list[tuple[str, str]] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def to_csv(self, path: str | Path) -> None:
        """Write the rows as CSV, under their field names; of eigenvalues NAME_real and NAME_imag."""
        Path(path).write_text(records_text(DepthRow, self.rows), encoding="utf-8")

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw it; see `resode.plots.depth_profile`."""
        from resode import plots

        return plots.depth_profile(self, path)

    def _headline(self) -> str:
        return f"{len(self.rows)} residual additions, {self.samples} samples"

    def __str__(self) -> str:
        columns = ["block", "kind", "η", "‖x‖", "‖F‖/‖x‖", "dead", "grad", "id·res", "max Re λ", "limit"]
        columns += ["decaying", "growth", "σ min", "σ max", "Δ loss" if self.has_target else "Δ output"]
        table = []
        for r in self.rows:
            effect = r.loss_change if self.has_target else r.output_change
            numbers = (r.step_size, r.state_norm, r.ratio, r.inactive, r.gradient, r.gradient_cosine)
            limits = (("" if r.converged or r.step_limit == 0 else "≤ ") + short(r.step_limit), r.decaying)
            last = (r.growth, r.sigma_min, r.sigma_max, effect)
            cells = [*map(short, numbers), short(complex(r.rightmost).real), *limits, *map(short, last)]
            table.append([r.name, r.kind, *cells])
        lines = plain_table(columns, table, words=2)
        solvers = ", ".join(dict.fromkeys(r.solver for r in self.rows if r.solver)) or "no solver"
        lines.append(f"{len(self.rows)} residual additions, {self.samples} samples, limits for {solvers}")
        for s in self.groups:
            gain = f"‖∏(I+ηJ)‖ = {s.norm:.4g}" if s.norm == s.norm else "‖∏(I+ηJ)‖ not measured,"
            bound = f"≤ ∏(1+ε) = {s.upper:.4g}" if s.exact else "(activations between)"
            lines.append(f"{s.first} … {s.last}: {gain} {bound}; without shortcuts ≤ {s.plain:.3g}")
        lines += [
            f"{r.name}: split error {r.split_error:.2g}: the state is read outside this block too, so that "
            "the identity and the residual part are not its whole gradient"
            for r in self.rows
            if r.split_error > _SPLIT
        ]
        lines += [f"{name}: no residual block, since {why}" for name, why in self.refused]
        if self.outside:
            lines.append(f"weights outside every addition: {_listed(self.outside)}")
        return "\n".join(lines)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


@checked
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
    progress: bool = True,
) -> DepthProfile:
    r"""Profile every residual addition of a network: ours or anyone's, of images or of sequences.

    The blocks are found by tracing which tensors are added to which; the model is not changed. A sum of
    branches that all start from one state, and the stages of a Runge-Kutta step, count as one block.

    Args:
        model: in eval mode.
        x: inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments; dimension 0
            of every tensor is the batch. Or a loader of batches (x, target), or of x alone.
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
        progress: say on a terminal how far it is, after two seconds.

    Returns:
        DepthProfile; print it, `.to_csv(path)`, `.plot(path)`.

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
    check_whole("spectra", spectra, 0)
    model = getattr(model, "_orig_mod", model)  # of torch.compile, which no mode sees into
    _check_mode(model)
    check_whole("batch_size", batch_size, 1)
    device = next((p.device for p in model.parameters()), None)
    spectra_found: list[BlockSpectrum] = []
    groups: list[GroupGradient] = []
    pieces: list[_Part] = []
    with torch.inference_mode(False), Progress("profile", progress) as say:
        stream = batches(x, target, device)
        first, wanted = next(stream)
        batch = batch_of(first)
        count = min(spectra, batch)
        for whole, aim in itertools.chain([(first, wanted)], stream):
            for some, own, size in parts(whole, aim, batch_size):
                pieces.append(_profile_part(model, some, own, size, blocks, loss_fn, lesions=lesions))
                say(f"{sum(p.samples for p in pieces)} samples")
        _check_random(model, part(first, 0, min(2, batch), batch))
        if spectra > 0:
            traced = trace(model, part(first, 0, count, batch), blocks, streams=True)
            seen: Counter[str] = Counter()  # additions of each module
            for number, a in enumerate(traced.additions, 1):
                say(f"spectrum of block {number} of {len(traced.additions)}, {a.name}")
                spectra_found.append(block_spectrum(a, model, count, tableau, seen[a.module]))
                seen[a.module] += 1
            groups = _groups(traced, spectra_found, count)
    merged, loss = _merged(pieces)
    found = []
    for i, measures in enumerate(merged):
        spectrum = spectra_found[i].values if spectra_found else {}
        notes = spectra_found[i].notes if spectra_found else []
        found.append(DepthRow(**{**measures, **spectrum}, note="; ".join(notes)))
    samples, has_target = sum(p.samples for p in pieces), wanted is not None
    return DepthProfile(
        found, groups, loss, samples, has_target, pieces[0].traced.refused, pieces[0].traced.outside
    )


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
        second = call(model, x)
    if not all(
        torch.allclose(a, b, equal_nan=True) for a, b in zip(tensors_in(z), tensors_in(second), strict=True)
    ):
        training = [name for name, module in model.named_modules() if module.training]
        raise ValueError(
            "a profile is of the network as it predicts, and this one gives another output each time: call "
            f".eval() on it{f'; {training[0]} is in training mode' if training else ''}."
        )


def _check_finite(model: nn.Module, traced: Trace) -> None:
    """Name the first block that turns finite numbers into others."""

    def finite(*found: Tensor) -> bool:
        return all(bool(torch.isfinite(t).all()) for t in found if t.is_floating_point())

    where = ""
    if not finite(*traced.inputs):
        where = "the input x holds inf or nan"
    for i, a in enumerate(() if where else traced.additions):
        if not finite(a.x, a.y):
            before = f"between {traced.additions[i - 1].name} and" if i else "before the first block,"
            where = f"block {a.name} gives" if finite(a.x) else f"what comes {before} {a.name} gives"
            where += " inf or nan"
            break
    if not where and not finite(*tensors_in(traced.output)):
        where = "what follows the last block gives inf or nan"
    if where:
        state = itertools.chain(model.named_parameters(), model.named_buffers())
        names = [name for name, t in state if not finite(t)]
        of = f"; not finite are {_listed(names)}" if names else "; all weights are finite"
        raise ValueError(f"a profile needs finite numbers, and {where}, the first place in the network{of}.")


@dataclass
class _Part:
    """Sums over the samples of one part."""

    rows: list[dict[str, Any]]
    sums: list[dict[str, Tensor]]
    loss: float
    samples: int
    traced: Trace


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
    traced = trace(model, x, blocks, streams=True)
    additions = traced.additions
    _check_finite(model, traced)
    if not additions:
        refused = "".join(f" {name}: {why}." for name, why in traced.refused)
        raise ValueError(
            "no residual block was found: nothing in this network adds a branch with weights to the state "
            f"that it starts from.{refused} Name the modules that act as blocks with blocks=, for example "
            "blocks='layers.*'."
        )
    losses = sample_losses(traced.output, target, loss_fn, batch)
    at_x, at_y = _gradients(losses.sum(), additions)
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
            "boosting": cosine(a.increment.expand_as(a.y), -at_y[i], batch),
        }
        following = at_x[i + 1] if i + 1 < len(additions) else at_y[i]
        if following.shape == total.shape:
            values["next_cosine"] = cosine(total, following, batch)
        if a.keeps_shape and last.shape == a.x.shape:
            values["correction"] = cosine(a.increment, last - a.x, batch)
            if labels is not None and labels.shape == (batch,) == a.x.shape[:1]:
                means = class_means(last, labels.to(last.device))
                values["class_correction"] = cosine(a.increment, means - a.x, batch)
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
    kept = Trace(None, [], [], traced.refused, traced.outside)  # not its graph
    return _Part(fixed, sums, float(losses.detach().sum()), batch, kept)


def _gradients(loss: Tensor, additions: list[Addition]) -> tuple[list[Tensor], list[Tensor]]:
    """The loss gradients at every x and at every y, in one pass."""
    places = [a.at_x for a in additions] + [a.at_y for a in additions]
    edges = [edge for place in places for edge in place.edges]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True))
    joined = [place.gradient([next(found) for _ in place.edges], loss) for place in places]
    return joined[: len(additions)], joined[len(additions) :]


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


_MEANS = (
    "state_norm ratio inactive gradient identity_gradient residual_gradient gradient_cosine next_cosine "
    "correction class_correction boosting loss_change"
).split()


def _merged(pieces: list[_Part]) -> tuple[list[dict[str, Any]], float]:
    """Means over all samples of all parts, and the mean loss."""
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
            row[key] = float(joined[key].nanmean()) if key in joined else NAN
        row["split_error"] = _ratio(joined["split_squares"], joined["gradient_squares"])
        if "difference_squares" in joined:
            row["output_change"] = _ratio(joined["difference_squares"], joined["output_squares"])
        merged.append(row)
    samples = sum(p.samples for p in pieces)
    return merged, sum(p.loss for p in pieces) / samples


def _ratio(squares: Tensor, of: Tensor) -> float:
    whole = float(of.sum())
    return math.sqrt(float(squares.sum()) / whole) if whole > 0 else 0.0


def _groups(traced: Trace, spectra: list[BlockSpectrum], batch: int) -> list[GroupGradient]:
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


def _gain(run: list[Addition], spectra: list[BlockSpectrum], batch: int) -> GroupGradient:
    first, last = run[0], run[-1]
    products = JacobianProducts.between(last.at_y, first.at_x, last.y, first.x, batch)
    flat = rows(first.x, batch)
    start = random_start(len(flat), flat.shape[1], first.x)
    sizes = [float(s.values.get("epsilon", NAN)) for s in spectra]
    try:
        sigma, _ = singular_values(products.jvp, products.vjp, start, 40)
    except RuntimeError:  # an operation without a second derivative: Jᵀ alone, where J can be formed
        small = flat.shape[1] <= SpectrumOptions.dense_up_to
        sigma = torch.linalg.svdvals(formed(products, flat)) if small else torch.full((1, 1), NAN)
    norm, smallest = float(sigma[:, 0].max()), float(sigma[:, -1].min())
    exact = all(b.at_x == a.at_y for a, b in itertools.pairwise(run))
    return GroupGradient(
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
