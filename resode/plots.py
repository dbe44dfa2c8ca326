"""Every figure's style. The only module that imports matplotlib.

Figures are matplotlib Figure objects without a global state, so they can be drawn in threads and without a
display. Functions that take `path` write the figure there, in the format its ending names.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from resode.checks import check_number, checked, described
from resode.stability import (
    eigenvalue_step_limit,
    imaginary_stability_interval,
    real_stability_interval,
    stability_function,
)
from resode.stability.intervals import rays_of_tableau
from resode.stability.limits import StepLimit, as_counted, checked_spectrum, rounding
from resode.stability.unstable_rays import Complexes
from resode.tableaus import ButcherTableau, get_tableau

Method = str | ButcherTableau
Path = str | PathLike[str] | None

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7A5C00", "#5D3A9B", "#4D4D4D")
"""Lines and regions, in order; told apart with any colour vision (Okabe & Ito)."""
STABLE, UNSTABLE = "#1B1B1B", "#D55E00"
DASHES = ("-", "--", "-.", ":")


@checked
def stability_region(
    method_or_methods: Method | Sequence[Method],
    eigenvalues: Any = None,
    step_size: float = 1.0,
    ax: Axes | None = None,
) -> Axes:
    """Draw where |R(z)| ≤ 1, for one method or several, with z = ηλ of a spectrum over it.

    Eigenvalues are dots where the (first) method is stable and crosses where it is not. For each method a
    ring marks the eigenvalue that leaves its region first as η grows, and the legend gives the limit.

    Args:
        method_or_methods: names in METHODS or tableaus.
        eigenvalues: λ (1/time), any shape; tensor, array or sequence.
        step_size: η > 0.
        ax: where to draw; a new figure if None.

    Returns:
        The axes; `.figure.savefig(path)` writes the picture.

    Raises:
        ValueError: an unknown method, none, or a step size that is not positive.

    Example:
        >>> ax = stability_region(["euler", "rk4"], [-2.0, -5.0], step_size=0.5)
        >>> ax.get_xlabel()
        'Re ηλ'
    """
    tableaus = _tableaus(method_or_methods)
    check_number("step_size", step_size, above=0)
    lam, tau = (None, None) if eigenvalues is None else _counted(eigenvalues)
    z = None if lam is None else lam * step_size
    left, right, bottom, top = _window(tableaus, z)
    own = ax is None
    if ax is None:
        ax = _axes_beside_legend((right - left) / (top - bottom))
    x, y = np.linspace(left, right, 700), np.linspace(bottom, top, 700)
    grid = torch.as_tensor(x + 1j * y[:, None])
    handles = []
    for i, tableau in enumerate(tableaus):
        size = stability_function(tableau, grid).abs().clamp(max=2.0).numpy()
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        ax.contourf(x, y, size, levels=[0.0, 1.0], colors=[colour], alpha=0.16, zorder=1)
        ax.contour(x, y, size, levels=[1.0], colors=[colour], linestyles=dash, linewidths=1.6, zorder=2)
        handles.append(Line2D([], [], color=colour, linestyle=dash, linewidth=1.6, label=tableau.name))
    ax.axhline(0, color="0.6", linewidth=0.7, zorder=0)
    ax.axvline(0, color="0.6", linewidth=0.7, zorder=0)
    if z is not None:
        limits = [eigenvalue_step_limit(lam, t, tolerance=tau) for t in tableaus]
        handles += _draw_spectrum(ax, tableaus, z, limits, step_size)
    ax.set_aspect("equal")
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_xlabel("Re ηλ")
    ax.set_ylabel("Im ηλ")
    ax.set_title("Stable where |R(ηλ)| ≤ 1" + ("" if z is None else f"; η = {step_size:.4g}"), fontsize=11)
    # Outside the axes, so that it covers nothing: beside them in a figure of its own, else below.
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    if not own:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}
    ax.legend(handles=handles, fontsize=8.5, frameon=False, **place)
    return ax


def _draw_spectrum(
    ax: Axes, tableaus: list[ButcherTableau], z: Complexes, limits: list[StepLimit], step_size: float
) -> list[Line2D]:
    """Dots, crosses and rings; their entries in the legend."""
    first = tableaus[0].name
    stable = stability_function(tableaus[0], torch.as_tensor(z)).abs().numpy() <= 1 + 1e-12
    many = len(z) > 200
    size = 9 if many else 26
    handles = []
    for mask, marker, colour, word in ((stable, "o", STABLE, "stable"), (~stable, "X", UNSTABLE, "unstable")):
        if mask.any():
            ax.scatter(
                z[mask].real,
                z[mask].imag,
                s=size * (1.0 if marker == "o" else 1.9),
                marker=marker,
                color=colour,
                edgecolors="white",
                linewidths=0.3 if many else 0.6,
                alpha=0.75 if many else 1.0,
                zorder=4,
            )
            label = f"{word} with {first} ({int(mask.sum())})"
            style: dict[str, Any] = {"linestyle": "", "marker": marker, "color": colour}
            style["markeredgecolor"] = "white"
            handles.append(Line2D([], [], markersize=7, label=label, **style))
    for i, (tableau, limit) in enumerate(zip(tableaus, limits, strict=True)):
        if math.isinf(limit.step):
            handles.append(Line2D([], [], linestyle="", label=f"{tableau.name}: no step is too large"))
            continue
        ring = {
            "marker": "o",
            "markersize": 12 + 4 * i,
            "markerfacecolor": "none",
            "markeredgecolor": COLOURS[i % len(COLOURS)],
            "markeredgewidth": 1.8,
            "linestyle": "",
        }
        where = np.array([limit.limiting_eigenvalue, np.conj(limit.limiting_eigenvalue)]) * step_size
        where = where[np.abs(z[:, None] - where).min(axis=0) <= 1e-6 * np.abs(z).max()]
        ax.plot(where.real, where.imag, zorder=5, **ring)
        label = f"limits {tableau.name}: η ≤ {limit.step:.4g}"
        if limit.step == 0:
            label = f"{tableau.name}: no small η is stable"
            if 0 < limit.decaying_step < math.inf:
                label += f"\n(η ≤ {limit.decaying_step:.4g} without growing modes)"
        handles.append(Line2D([], [], label=label, **{**ring, "markersize": 9}))
    return handles


def _window(tableaus: list[ButcherTableau], z: Complexes | None) -> tuple[float, float, float, float]:
    """Limits of the axes: the regions around 0 with what lies close by, and every ηλ, with a margin."""
    angles: Complexes = np.exp(1j * np.linspace(0, np.pi, 181)[1:-1])
    corners: list[complex] = [0.4]
    for tableau in tableaus:
        if not tableau.explicit:
            corners += [-5 + 5j, 6 + 5j]
            continue
        exits = rays_of_tableau(tableau).unstable(angles)[..., 0]  # where a stable interval ends, or inf
        reach = exits[angles.real < 0, 0].max()
        row, column = np.nonzero(exits <= 1.4 * reach)
        corners += [*(exits[row, column] * angles[row]), -real_stability_interval(tableau)]
    points: Complexes = np.array(corners if z is None else [*corners, *z], dtype=np.complex128)
    left, right = points.real.min(), points.real.max()
    top = np.abs(points.imag).max()
    margin = 0.08 * max(right - left, 2 * top)
    right = max(right + margin, 0.22 * (right - left))
    return left - margin, right, -top - margin, top + margin


@checked
def amplification(method_or_methods: Method | Sequence[Method], path: Path = None) -> Figure:
    """Draw |R| along the negative real and the positive imaginary axis, for one method or several.

    The end of each stability interval is marked. On the imaginary axis |R| − 1 may be very small, so a third
    panel shows its modulus on a logarithmic scale, drawn thick where |R| > 1.

    Example:
        >>> len(amplification(["euler", "rk4"]).axes)
        3
    """
    tableaus = _tableaus(method_or_methods)
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    real, imaginary, excess = figure.subplots(1, 3)
    bounded = [t for t in tableaus if math.isfinite(real_stability_interval(t))]
    length = 1.3 * max([real_stability_interval(t) for t in bounded], default=6.0)
    height = 1.3 * max([imaginary_stability_interval(t) for t in bounded] + [2.0])
    for i, tableau in enumerate(tableaus):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.7}
        for ax, direction, extent, interval in (
            (real, -1.0, length, real_stability_interval(tableau)),
            (imaginary, 1j, height, imaginary_stability_interval(tableau)),
        ):
            r = np.linspace(0, extent, 1201)
            size = stability_function(tableau, torch.as_tensor(r * direction + 0j)).abs().numpy()
            ax.plot(r, size, label=tableau.name, **style)
            if 0 < interval < extent:
                ax.plot([interval], [1], marker="o", markersize=5, color=style["color"], zorder=4)
            if ax is imaginary:
                for above in (True, False):
                    shown = np.where((size > 1) == above, np.abs(size - 1), np.nan)
                    width = 2.0 if above else 0.8
                    label = tableau.name if above else None
                    excess.semilogy(r, shown, label=label, **{**style, "linewidth": width})
    for ax, name in ((real, "r, z = −r"), (imaginary, "r, z = ir")):
        ax.axhline(1, color="0.5", linewidth=0.8)
        ax.set(xlabel=name, ylabel="|R(z)|", ylim=(0, 1.8), xlim=(0, None))
    real.set_title("Along the negative real axis", fontsize=11)
    imaginary.set_title("Along the imaginary axis", fontsize=11)
    excess.set_title("How far from 1 (thick: |R| > 1)", fontsize=11)
    excess.set(xlabel="r, z = ir", ylabel="||R(z)| − 1|", ylim=(1e-15, 3), xlim=(0, None))
    real.legend(fontsize=8.5)
    return _finished(figure, path)


@checked
def transient_growth(growth: Any, path: Path = None) -> Figure:
    """Draw ‖R(ηJ)ⁿ‖₂ over the step n, for one result of `resode.analysis.transient_growth` or several.

    Example:
        >>> from resode.analysis import transient_growth as measure
        >>> figure = transient_growth(measure([[-1.0, 10.0], [0.0, -2.0]], 0.1))
        >>> figure.axes[0].get_xlabel()
        'step n'
    """
    results: Sequence[Any] = growth if isinstance(growth, list | tuple) and growth else [growth]
    for result in results:
        _check_made("growth", result, "resode.analysis.transient_growth", "norms", "step_size")
    ax = _axes((6.2, 3.9))
    for i, result in enumerate(results):
        norms = np.asarray(_plain(result.norms)).reshape(-1, np.shape(result.norms)[-1])
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
        for j, row in enumerate(norms):
            peak = int(np.argmax(row))
            label = f"{result.method}, η = {result.step_size:.4g}: peak {row[peak]:.4g} at step {peak}"
            if len(norms) > 1:
                label = (
                    f"{result.method}, η = {result.step_size:.4g} ({len(norms)} matrices)" if j == 0 else None
                )
            ax.semilogy(np.arange(len(row)), row, linewidth=1.6, label=label, **style)
            ax.plot([peak], [row[peak]], marker="o", markersize=5, color=style["color"])
    ax.axhline(1, color="0.5", linewidth=0.8)
    ax.set(xlabel="step n", ylabel="‖R(ηJ)ⁿ‖₂", xlim=(0, None), ylim=(max(ax.get_ylim()[0], 1e-3), None))
    ax.set_title("Growth before decay", fontsize=11)
    ax.legend(fontsize=8.5)
    return _finished(ax.figure, path)


@checked
def edge(check: Any, path: Path = None) -> Figure:
    """Draw the simulation on either side of a step limit, a result of `theory.measures.edge.edge_check`.

    Example:
        >>> from theory.measures.edge import edge_check
        >>> len(edge(edge_check("rk4", [-2.0, -5.0])).axes[0].lines)
        3
    """
    _check_made("check", check, "theory.measures.edge.edge_check", "below", "growth")
    ax = _axes((6.2, 3.9))
    for step, path_, colour, word in (
        (check.below, check.decay, COLOURS[0], "below"),
        (check.above, check.growth, UNSTABLE, "above"),
    ):
        if step is not None:
            label = f"η = {step:.6g}, just {word}"
            height = np.maximum(path_, 1e-300)
            ax.semilogy(np.arange(len(path_)), height, color=colour, linewidth=1.7, label=label)
    ax.axhline(1, color="0.5", linewidth=0.8)
    ax.set(xlabel="step n", ylabel="largest |x|", xlim=(0, None))
    ax.set_title(f"{check.method} on either side of its limit η = {check.limit:.10g}", fontsize=11)
    ax.legend(fontsize=8.5)
    return _finished(ax.figure, path)


@checked
def bifurcation(result: Any, path: Path = None) -> Figure:
    """Draw where the orbits of a scalar map settle, over the step size: `resode.analysis.rest.bifurcation`.

    Example:
        >>> from resode.analysis import bifurcation as measure
        >>> eta = torch.linspace(1.5, 3.0, 200, dtype=torch.float64)
        >>> bifurcation(measure(lambda x: x * (1 - x), eta, x0=0.1)).axes[0].get_xlabel()
        'step size η'
    """
    _check_made("result", result, "resode.analysis.bifurcation", "orbits", "step_sizes")
    orbits = np.asarray(_plain(result.orbits))
    steps = np.broadcast_to(np.asarray(_plain(result.step_sizes))[:, None], orbits.shape)
    ax = _axes((7.2, 4.4))
    keep = np.isfinite(orbits)
    ax.plot(steps[keep], orbits[keep], ",", color=STABLE, alpha=0.35, rasterized=True)
    ax.set(xlabel="step size η", ylabel="x after the transient", xlim=(steps.min(), steps.max()))
    ax.set_title(f"Where x ← {result.solver}'s step of size η settles", fontsize=11)
    return _finished(ax.figure, path)


@checked
def training_curves(metrics: Mapping[str, Sequence[float]], path: Path = None) -> Figure:
    """Draw a run's loss, error, learning rate and F evaluations over its epochs.

    Args:
        metrics: columns of metrics.csv: epoch, lr, train_loss, train_accuracy, test_loss, test_accuracy;
            validation_loss, validation_accuracy where images were held out; eval_loss, eval_accuracy where
            another solver was tried; nfe, nfe_backward, which are drawn unless all are 0.
        path: where to write the figure.

    Raises:
        ValueError: no epochs, a column that is missing, or columns of several lengths.

    Example:
        >>> columns = {"epoch": [1, 2], "lr": [0.1, 0.0]}
        >>> columns |= {f"{split}_loss": [2.0, 1.0] for split in ("train", "test")}
        >>> columns |= {f"{split}_accuracy": [0.5, 0.9] for split in ("train", "test")}
        >>> [ax.get_title() for ax in training_curves(columns | {"nfe": [7, 7]}).axes]
        ['loss', 'error, %', 'learning rate', 'F evaluations']
    """
    needed = ["epoch", "lr", "test_accuracy", *(f"{s}_accuracy" for s in _SPLITS if f"{s}_loss" in metrics)]
    missing = [name for name in needed if name not in metrics]
    lengths = {name: len(column) for name, column in metrics.items()}
    if missing or not lengths["epoch"] or len(set(lengths.values())) > 1:
        raise ValueError(
            "metrics must hold columns epoch, lr and test_accuracy, all of one length and with at least one "
            f"epoch: {'there is no ' + missing[0] if missing else f'got lengths {lengths}'}."
        )
    solved = any(value > 0 for value in metrics.get("nfe", ()))
    figure = Figure(figsize=(12.8 if solved else 9.6, 3.4), layout="constrained")
    loss, error, rate, *rest = figure.subplots(1, 4 if solved else 3)
    epochs = metrics["epoch"]
    marker = "o" if len(epochs) <= 30 else ""
    shared: dict[str, Any] = {"marker": marker, "markersize": 3.2, "linewidth": 1.6}
    for split, colour in _SPLITS.items():
        if f"{split}_loss" not in metrics:
            continue
        style = shared | {"color": colour, "label": "test, other solver" if split == "eval" else split}
        loss.plot(epochs, metrics[f"{split}_loss"], **style)
        error.plot(epochs, [100 * (1 - share) for share in metrics[f"{split}_accuracy"]], **style)
    rate.plot(epochs, metrics["lr"], color="0.45", **shared)
    last = 100 * (1 - metrics["test_accuracy"][-1])
    place: dict[str, Any] = {"xytext": (0, 9), "textcoords": "offset points", "ha": "right", "fontsize": 9}
    place["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    error.annotate(f"{last:.2f} %", (epochs[-1], last), color=_SPLITS["test"], **place)
    error.legend(frameon=False)
    for ax in rest:
        columns = {"nfe": "forward", "nfe_backward": "again, backward", "eval_nfe": "forward, other solver"}
        for i, (name, label) in enumerate(columns.items()):
            values = metrics.get(name, ())
            if any(value > 0 for value in values):
                ax.plot(epochs, values, color=COLOURS[i], label=label, **shared)
        ax.legend(frameon=False)
    for ax, title in zip(figure.axes, ("loss", "error, %", "learning rate", "F evaluations"), strict=False):
        ax.set_title(title, fontsize=11)
        ax.set(xlabel="epoch", ylim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return _finished(figure, path)


_SPLITS = {"train": COLOURS[0], "validation": COLOURS[2], "test": UNSTABLE, "eval": COLOURS[3]}


@checked
def comparison(compared: Any, path: Path = None) -> Figure:
    """Draw the errors of several runs over their epochs, one colour a configuration.

    Thick lines are means over the seeds, as far as every run has come; thin ones are the runs.

    Args:
        compared: of `resode.training.compare.compare`.
        path: where to write the figure.
    """
    _check_made("compared", compared, "resode.compare", "rows")
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    ax = figure.subplots()
    handles = []
    for i, row in enumerate(compared.rows):
        runs = [run for run in row.runs if run.epochs]
        colour, marker = COLOURS[i % len(COLOURS)], _MARKERS[i // len(COLOURS) % len(_MARKERS)]
        for split, dash in (("test", "-"), ("train", (0, (4, 2)))):
            style: dict[str, Any] = {"color": colour, "linestyle": dash}
            curves = [[100 * (1 - share) for share in run.metrics[f"{split}_accuracy"]] for run in runs]
            if len(curves) > 1:
                for run, curve in zip(runs, curves, strict=True):
                    ax.plot(run.metrics["epoch"], curve, linewidth=0.7, alpha=0.45, **style)
            if not curves:
                continue
            shared = min(map(len, curves))
            mean = np.mean([curve[:shared] for curve in curves], axis=0)
            style |= {"marker": marker if shared <= 30 else "", "markersize": 3.2}
            ax.plot(range(1, shared + 1), mean, linewidth=1.9, **style)
        seeds = f" ({len(runs)} runs)" if len(runs) > 1 else "" if runs else " (no epoch yet)"
        label = "\n".join(textwrap.wrap(row.name + seeds, 34))
        handles.append(
            Line2D([], [], color=colour, marker=marker, markersize=3.2, linewidth=1.9, label=label)
        )
    handles += [
        Line2D([], [], color="0.35", label="test images"),
        Line2D([], [], color="0.35", linestyle=(0, (4, 2)), label="training, augmented"),
    ]
    ax.set_title("error, %", fontsize=11)
    ax.set(xlabel="epoch", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside right upper")
    return _finished(figure, path)


_MARKERS = ("o", "s", "^", "D", "v", "P")


@checked
def swap_accuracy(report: Any, path: Path = None) -> Figure:
    """Draw the same weights' accuracy and drift against the solver's step, and blocks' distance from an ODE.

    Filled dots are the accuracy with batch norm's statistics measured anew, open ones that as it is; where
    there is nothing to measure anew, all are filled.

    Args:
        report: of `resode.swap_report`; an adaptive solver, which chooses its steps, is a level line.
        path: where to write the figure.
    """
    _check_made("report", report, "resode.swap_report", "rows", "distances")
    figure = Figure(figsize=(13.2 if report.distances else 9.6, 3.9), layout="constrained")
    accuracy, drift, *more = figure.subplots(1, 3 if report.distances else 2)
    recalibrated = any(row.accuracy_recalibrated is not None for row in report.rows)
    solvers = list(dict.fromkeys(row.solver for row in report.rows))
    for i, solver in enumerate(solvers):
        rows = [row for row in report.rows if row.solver == solver]
        colour = COLOURS[i % len(COLOURS)]
        _against_step(accuracy, rows, [100 * row.kept for row in rows], colour, solver)
        if recalibrated:
            _against_step(accuracy, rows, [100 * row.accuracy for row in rows], colour)
        _against_step(drift, rows, [row.logit_drift for row in rows], colour, solver)
    if recalibrated:
        accuracy.plot([], [], "o:", color=STABLE, markerfacecolor="none", label="not recalibrated")
    steps = sorted({row.step_size for row in report.rows if row.step_size is not None})
    titles = (
        "accuracy, recalibrated, %" if recalibrated else "accuracy, %",
        "drift of the logits, as it is, relative",
    )
    for ax, title in zip((accuracy, drift), titles, strict=True):
        ax.set_title(title, fontsize=11)
        if steps:
            ax.set_xlabel("step size (finer to the right)")
            ax.set_xscale("log", base=2)
            ax.set_xlim(steps[-1] * 1.25, steps[0] / 1.25)
            ax.set_xticks(steps, [f"{step:g}" for step in steps])
            ax.xaxis.set_minor_locator(NullLocator())
    low = min(100 * min(row.accuracy, row.kept) for row in report.rows)
    accuracy.set_ylim(max(0, low - 5), 101.5)
    drift.set_ylim(0, None)
    for ax in more:
        ax.bar(range(1, len(report.distances) + 1), [d.distance for d in report.distances], color=COLOURS[0])
        ax.set_title("distance from an ODE, as trained", fontsize=11)
        ax.set_xlabel("block")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right center")
    return _finished(figure, path)


def _against_step(
    ax: Axes, rows: Sequence[Any], values: Sequence[float], colour: str, label: str = ""
) -> None:
    """One solver's line; without a label it is the fainter of two. The row as trained has a second ring."""
    style: dict[str, Any] = {"color": colour, "linewidth": 1.7 if label else 1.1}
    if rows[0].step_size is None:
        dashes = (0, (5, 2)) if label else (0, (1, 2))
        ax.axhline(values[0], linestyle=dashes, label=f"{label}, adaptive" if label else None, **style)
        return
    face: dict[str, Any] = {} if label else {"markerfacecolor": "none", "linestyle": ":"}
    ax.plot(
        [row.step_size for row in rows],
        values,
        marker="o",
        markersize=5,
        label=label or None,
        **style,
        **face,
    )
    ring = {"markersize": 13, "markerfacecolor": "none", "markeredgewidth": 1.8, "linestyle": ""}
    for row, value in zip(rows, values, strict=True):
        if row.as_trained and label:
            ax.plot([row.step_size], [value], "o", color=colour, label="as trained", **ring)


@checked
def group_spectra(groups: Sequence[Any], methods: Method | Sequence[Method], path: Path = None) -> Figure:
    """Draw the eigenvalues hλ of a network's blocks over the methods' stability regions, one panel a group.

    Args:
        groups: of `resode.analysis.steps.block_limits.block_limits`, at least one with spectra.
        methods: names in METHODS, or tableaus.
        path: where to write the figure.
    """
    for group in groups:
        _check_made(
            "each of groups", group, "resode.analysis.steps.block_limits.block_limits", "spectra", "shape"
        )
    shown = [group for group in groups if group.spectra]
    if not shown:
        raise ValueError("groups must hold at least one with spectra: there is nothing to draw.")
    figure = Figure(figsize=(1.9 + 3.0 * len(shown), 4.3), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharex=True, sharey=True)[0]
    everything = np.concatenate([np.ravel(z) for group in shown for z in group.spectra])
    left, right, bottom, top = _window(_tableaus(methods), everything)
    handles: dict[str, Any] = {}
    for ax, group in zip(panels, shown, strict=True):
        stability_region(methods, ax=ax)
        legend = ax.get_legend()
        if legend is not None:
            handles |= {
                text.get_text(): line for text, line in zip(legend.texts, legend.legend_handles, strict=True)
            }
            legend.remove()
        for i, z in enumerate(group.spectra):
            colour = _BLOCKS[i % len(_BLOCKS)]
            handles[f"block {i}"] = ax.scatter(
                z.real, z.imag, s=7, color=colour, alpha=0.6, linewidths=0, zorder=4
            )
        ax.set(
            xlim=(left, right), ylim=(bottom, top), xlabel="Re hλ", ylabel="Im hλ" if ax is panels[0] else ""
        )
        ax.set_title(f"{group.name}, states {'×'.join(map(str, group.shape))}", fontsize=10.5)
    regions = [name for name in handles if not name.startswith("block ")]
    names = regions + sorted(
        (name for name in handles if name not in regions), key=lambda name: int(name[6:])
    )
    figure.legend(
        [handles[n] for n in names], names, frameon=False, loc="outside right center", markerscale=2.2
    )
    figure.suptitle("Step times eigenvalue, hλ, of every block, over the regions |R(z)| ≤ 1", fontsize=11)
    return _finished(figure, path)


@checked
def step_limits(records: Sequence[Any], path: Path = None) -> Figure:
    """Draw what training does to a network's step limits: amplification, growing modes, limits by update.

    Args:
        records: of `resode.training.monitor.StepLimits`.
        path: where to write the figure.
    """
    for record in records:
        _check_made(
            "each of records", record, "resode.training.monitor.StepLimits", "update", "amplification"
        )
    figure = Figure(figsize=(10.4, 3.7), layout="constrained")
    sizes, growing, limits = figure.subplots(1, 3)
    lines = list(dict.fromkeys((record.group, record.solver) for record in records))
    several = len({solver for _, solver in lines}) > 1
    for i, (group, solver) in enumerate(lines):
        rows = [r for r in records if (r.group, r.solver) == (group, solver)]
        updates = [r.update for r in rows]
        label = (group or "stack") + (f", {solver}" if several else "")
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.6, "marker": "o"}
        style |= {"markersize": 3.2, "label": label}
        sizes.plot(updates, [r.amplification for r in rows], **style)
        growing.plot(updates, [r.growing for r in rows], **style)
        limits.plot(updates, [r.estimate / r.step for r in rows], **style)
    for ax, bound in ((sizes, 1.0), (limits, 1.0)):
        ax.axhline(bound, color=UNSTABLE, linewidth=1, linestyle=(0, (4, 2)))
    limits.set_yscale("log")
    titles = {
        sizes: "largest |R(hλ)| of a block",
        growing: "growing modes found",
        limits: "limit of the others, in steps h",
    }
    for ax, title in titles.items():
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("update")
        if len({record.update for record in records}) == 1:
            ax.set_xticks([records[0].update])
        else:
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    growing.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*sizes.get_legend_handles_labels(), frameon=False, loc="outside right center")
    return _finished(figure, path)


_BLOCKS = ("#1B1B1B", "#009E73", "#CC79A7", "#5D3A9B", "#56B4E9", "#7A5C00")


def _check_made(name: str, value: Any, by: str, *fields: str) -> None:
    """Refuse what is no result of the function whose results are drawn."""
    missing = [field for field in fields if not hasattr(value, field)]
    if missing:
        raise TypeError(f"{name} must be what {by} gives: got {described(value)}, without {missing[0]!r}.")


def _tableaus(method_or_methods: Method | Sequence[Method]) -> list[ButcherTableau]:
    single = isinstance(method_or_methods, str | ButcherTableau)
    methods = [method_or_methods] if single else list(method_or_methods)
    if not methods:
        raise ValueError("give at least one method; resode.METHODS holds them by name.")
    return [get_tableau(m) for m in methods]


def _plain(values: Any) -> Any:
    return values.detach().cpu().resolve_conj().numpy() if isinstance(values, torch.Tensor) else values


def _counted(eigenvalues: Any) -> tuple[Complexes, np.ndarray]:
    """One flat spectrum as the step limit counts it, and its τ."""
    values, eps = checked_spectrum(eigenvalues)
    tau = np.array(rounding(values.size, eps) * np.abs(values).max())
    return as_counted(values.ravel(), tau), tau


def _axes(size: tuple[float, float]) -> Axes:
    return Figure(figsize=size, layout="constrained").subplots()


def _axes_beside_legend(ratio: float) -> Axes:
    """Axes of this ratio of width to height in a figure that leaves room for a legend to their right."""
    height = min(4.9, 5.6 / ratio)
    width, left, below = height * ratio, 0.7, 0.6
    figure = Figure(figsize=(left + width + 3.0, below + height + 0.4))
    total_width, total_height = figure.get_size_inches()
    return figure.add_axes(
        (left / total_width, below / total_height, width / total_width, height / total_height)
    )


def _finished(figure: Any, path: Path) -> Figure:
    """The same style for every axes; written to `path` if there is one."""
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="0.92", linewidth=0.8, zorder=0)
        ax.set_axisbelow(True)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


@checked
def cobweb(web: Any, path: Path = None) -> Figure:
    """Draw a scalar map, the diagonal, and the staircase of an orbit: `resode.analysis.rest.scan.cobweb`.

    Example:
        >>> from resode.analysis.rest.scan import cobweb as measure
        >>> cobweb(measure(lambda x: x * (1 - x), 0.1, 2.5)).axes[0].get_ylabel()
        'next x'
    """
    _check_made("web", web, "resode.analysis.cobweb", "orbit", "step_size")
    ax = _axes((5.0, 4.6))
    x, y, orbit = (np.asarray(_plain(values)) for values in (web.x, web.y, web.orbit))
    ax.plot(x, y, color=COLOURS[0], linewidth=1.8, label=f"{web.solver}'s step, η = {web.step_size:g}")
    ax.plot(x, x, color="0.5", linewidth=0.9, label="x")
    stairs = np.repeat(orbit, 2)
    ax.plot(stairs[:-1], np.r_[stairs[0], stairs[2:]], color=UNSTABLE, linewidth=0.9, label="orbit")
    ax.set(xlabel="x", ylabel="next x", xlim=(x.min(), x.max()))
    ax.legend(frameon=False, fontsize=8.5)
    return _finished(ax.figure, path)


@checked
def phase_portrait(portrait: Any, path: Path = None) -> Figure:
    """Draw the flow of a one- or two-dimensional field and its fixed points, filled where stable.

    Example:
        >>> from resode.analysis.rest.scan import phase_portrait as measure
        >>> phase_portrait(measure(lambda x: x * (1 - x), (-0.5, 1.5))).axes[0].get_ylabel()
        'F(x)'
    """
    _check_made("portrait", portrait, "resode.analysis.phase_portrait", "axes", "slopes")
    ax = _axes((5.6, 4.6))
    if len(portrait.axes) == 1:
        x, slope = portrait.axes[0], portrait.slopes[:, 0]
        ax.plot(x, slope, color=COLOURS[0], linewidth=1.8)
        ax.axhline(0, color="0.5", linewidth=0.8)
        shown = slice(2, None, 4)
        ax.quiver(x[shown], 0 * x[shown], np.sign(slope[shown]), 0 * x[shown], scale=28, width=0.006)
        ax.set(xlabel="x", ylabel="F(x)")
        heights = np.zeros(len(portrait.points))
    else:
        x, y = portrait.axes
        speed = np.log1p(np.linalg.norm(portrait.slopes, axis=-1)).T
        u, v = portrait.slopes[..., 0].T, portrait.slopes[..., 1].T
        ax.streamplot(x, y, u, v, color=speed, cmap="Blues", linewidth=0.9, density=1.3, arrowsize=0.8)
        for part, colour in ((u, COLOURS[1]), (v, COLOURS[2])):
            ax.contour(x, y, part, levels=[0.0], colors=[colour], linewidths=1.1, linestyles="--")
        ax.set(xlabel="x₁", ylabel="x₂")
        heights = portrait.points[:, 1]
    for point, height, kind in zip(portrait.points, heights, portrait.kinds, strict=True):
        face = STABLE if kind.startswith("stable") else "white"
        ax.plot([point[0]], [height], "o", markersize=7, color=STABLE, markerfacecolor=face, zorder=5)
        place: dict[str, Any] = {"xytext": (6, 6), "textcoords": "offset points", "fontsize": 8.5}
        ax.annotate(kind, (point[0], height), **place)
    return _finished(ax.figure, path)


@checked
def depth_profile(profile: Any, path: Path = None) -> Figure:
    """Draw a depth profile, a result of `resode.profile_depth`: six panels over the blocks.

    Args:
        profile: its rows and groups.
        path: where to write the figure.
    """
    _check_made("profile", profile, "resode.profile_depth", "rows", "has_target")
    rows = profile.rows
    figure = Figure(figsize=(max(9.6, 0.32 * len(rows) + 4), 8.6), layout="constrained")
    effect = {"loss_change": "rise of the loss"} if profile.has_target else {"output_change": "output change"}
    sizes = {"state_norm": "‖x‖", "ratio": "‖ηF‖ / ‖x‖"}
    gradients = {
        "gradient": "whole",
        "identity_gradient": "identity part",
        "residual_gradient": "residual part",
    }
    singular = {"sigma_max": "σ max", "sigma_min": "σ min", "epsilon": "ε = ‖ηJ‖"}
    steps = {"step_size": "η", "decaying_step": "limit, decaying modes", "growth": "largest |R(ηλ)|"}
    cosines = {
        "correction": "F with x_L − x",
        "boosting": "F with −g",
        "next_cosine": "gradients of neighbours",
    }
    cosines |= {"gradient_cosine": "identity and residual part"}
    panels = {
        "size of the state and of the branch": (sizes, True),
        "gradient at the block's input": (gradients, True),
        "singular values of the block's Jacobian": (singular, True),
        "step and its limit": (steps, True),
        "cosines": (cosines, False),
        "without the block": (effect | {"inactive": "share of dead units"}, False),
    }
    for ax, (title, (series, logarithmic)) in zip(figure.subplots(3, 2).ravel(), panels.items(), strict=True):
        _over_blocks(ax, [row.name for row in rows], rows, series, logarithmic=logarithmic)
        ax.set_title(title, fontsize=11)
    return _finished(figure, path)


@checked
def block_gains(diagnosis: Any, path: Path = None) -> Figure:
    """Draw the gains of a random perturbation by block, a result of `resode.diagnose`; outliers are marked.

    Args:
        diagnosis: its rows.
        path: where to write the figure.
    """
    _check_made("diagnosis", diagnosis, "resode.diagnose", "rows", "findings")
    rows = diagnosis.rows
    figure = Figure(figsize=(max(6.4, 0.22 * len(rows) + 3), 4.2), layout="constrained")
    ax = figure.subplots()
    series = {"sigma": "σ max, at least", "gain": "block", "branch_gain": "branch"}
    _over_blocks(ax, [row.block for row in rows], rows, series, names=30)
    for i, row in enumerate(rows):
        if row.cause:
            ax.axvspan(i - 0.5, i + 0.5, color="0.85", zorder=0)
            ax.text(i, 1.01, row.cause, transform=ax.get_xaxis_transform(), ha="center", fontsize=8)
    ax.set_ylabel("gain of a perturbation")
    return _finished(figure, path)


def _over_blocks(
    ax: Axes,
    blocks: list[str],
    rows: Sequence[Any],
    series: Mapping[str, str],
    *,
    logarithmic: bool = True,
    names: int = 24,
) -> None:
    """Draw some fields of the rows, with their labels, over the blocks, of which so many are named."""
    for i, (field, label) in enumerate(series.items()):
        values = np.array([float(getattr(row, field)) for row in rows])
        values = np.where(np.isfinite(values) & ((values > 0) | (not logarithmic)), values, np.nan)
        style: dict[str, Any] = {"color": COLOURS[i], "marker": "o", "markersize": 3.6, "linewidth": 1.4}
        ax.plot(np.arange(len(rows)), values, label=label, linestyle=DASHES[i % len(DASHES)], **style)
    if logarithmic:
        ax.set_yscale("log")
    ax.axhline(1 if logarithmic else 0, color="0.6", linewidth=0.7)
    ax.legend(frameon=False, fontsize=8)
    every = max(1, math.ceil(len(rows) / names))
    ax.set_xticks(range(0, len(rows), every), blocks[::every], rotation=60, ha="right", fontsize=7.5)
