"""A run as one HTML file: diagnosis, curves, solver swap, stability and depth profile, nothing fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resode import plots
from resode.analysis.depth.profile import DepthProfile, profile_depth
from resode.analysis.depth.tracing import trace
from resode.analysis.diagnose.diagnose import diagnose
from resode.analysis.steps.block_limits import block_limits
from resode.analysis.swap.report import SwapReport, swap_report
from resode.blocks import ResidualStack
from resode.blocks.solving import stacks_of
from resode.blocks.statistics import tracked_norms
from resode.checks import check_whole, checked
from resode.tableaus import METHODS
from resode.tables import short, short_complex
from resode.training.data.datasets import ImageData
from resode.training.evaluate import calibration_batches, images_of, load, plain_batches
from resode.training.folder import RunFolder
from resode.training.plan import Model

DENSE_STATE = 1024
"""Entries of a state up to which a report computes all eigenvalues of a block."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bad: #c0392b; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { width: 100%; min-width: 46rem; height: auto; background: white; border-radius: 4px; }
.said td { white-space: normal; text-align: left; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { background: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .6rem; padding: 0; }
.facts div { background: var(--soft); border-radius: 6px; padding: .5rem .7rem; overflow-wrap: anywhere; }
.facts b { display: block; font-size: 1.15rem; } .bad { color: var(--bad); }
p, li { overflow-wrap: anywhere; } details { margin: .8rem 0; }
"""


@checked
def write_report(
    run: str | Path,
    path: str | Path | None = None,
    *,
    samples: int = 16,
    model: Model | None = None,
    data: str | ImageData | None = None,
    data_dir: str | Path | None = None,
) -> Path:
    """Write one self-contained HTML file about a run.

    Args:
        run: a run folder.
        path: the file; RUN/report.html if None.
        samples: test images for the profile; the swap table takes 64 times as many.
        model: for a network of one's own, as in `resode.load`.
        data: another data set than the run's.
        data_dir: where its data lies, where that changed.

    Returns:
        The file's path.

    Raises:
        NoSuchRun, RunError: as `resode.load`.
        ValueError: samples below 1.
    """
    check_whole("samples", samples, 1)
    folder = RunFolder.open(run)
    network = load(run, model=model)
    images = images_of(run, data, data_dir)
    x, target = next(iter(plain_batches(images, limit=samples)))
    summary, config = folder.read_summary() or {}, folder.read_config()
    stacks = stacks_of(network)
    parts = [_diagnosis(network, images), _facts(summary, stacks), _curves(folder)]
    if stacks:
        normed = bool(tracked_norms(network))
        calibration = calibration_batches(images, min(2000, len(images.train_images))) if normed else False
        shown = plain_batches(images, limit=64 * samples)
        parts.append(_swap(swap_report(network, shown, recalibrate=calibration)))
        parts.append(_stability(network, x[:2]))
    parts.append(_profile(network, x, target))
    parts.append(_settings(config))
    title = f"{config.get('model', 'network')} on {config.get('data', 'its data')}"
    page = _page(title, Path(run).name, "\n".join(parts))
    if path is None:
        return folder.write("report.html", page)
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)


def _page(title: str, run: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1><p>Run <code>{escape(run)}</code></p>\n{body}\n</body></html>\n"
    )


def _figure(figure: Any, alt: str) -> str:
    """A figure as a picture within the page; on a narrow screen it keeps its size and scrolls."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    code = base64.b64encode(buffer.getvalue()).decode()
    return f'<div class="wide"><img src="data:image/png;base64,{code}" alt="{escape(alt)}"></div>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(_text(v))}</td>" for v in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _text(value: Any) -> str:
    if isinstance(value, complex):
        return short_complex(value)
    if isinstance(value, float):
        return short(value, 4)
    return str(value)


def _diagnosis(network: nn.Module, images: ImageData) -> str:
    x, target = next(iter(plain_batches(images, limit=32)))
    found = diagnose(network, x, target)
    figure = _figure(found.plot(), "gain of a perturbation by block") if found.rows else ""
    said = f'<div class="said">{found._repr_html_()}</div>'
    return f"<h2>Diagnosis</h2>{said}<details><summary>Blocks</summary>{figure}</details>"


def _facts(summary: dict[str, Any], stacks: list[ResidualStack]) -> str:
    names = {
        "test_accuracy": "test accuracy",
        "epochs": "epochs",
        "parameters": "parameters",
        "images_per_second": "images/s",
        "nfe": "F evaluations",
    }
    known = {label: summary[key] for key, label in names.items() if summary.get(key) is not None}
    if "test accuracy" in known:
        known["test accuracy"] = f"{100 * known['test accuracy']:.2f} %"
    if stacks:
        known["solver"] = ", ".join(dict.fromkeys(stack.solver for stack in stacks))
    cells = "".join(
        f"<div><b>{escape(_text(v) if not isinstance(v, int) else f'{v:,}')}</b>{escape(k)}</div>"
        for k, v in known.items()
    )
    unfinished = "" if summary else "<p>This run has not finished.</p>"
    return f'{unfinished}<div class="facts">{cells}</div>'


def _curves(folder: RunFolder) -> str:
    path = folder.path / "metrics.csv"
    metrics = folder.read_metrics() if path.exists() else {}
    if not metrics:
        return "<h2>Training</h2><p>No epoch has ended yet.</p>"
    last = {name: values[-1] for name, values in metrics.items()}
    return (
        "<h2>Training</h2>"
        + _figure(plots.training_curves(metrics), "loss, error and learning rate over the epochs")
        + f"<details><summary>Last epoch</summary>{_table(['figure', 'value'], last.items())}</details>"
    )


def _swap(report: SwapReport) -> str:
    columns = [
        "solver",
        "substeps",
        "forecast",
        "accuracy %",
        "recalibrated %",
        "logit drift",
        "F evaluations",
        "",
    ]
    if all(r.accuracy_recalibrated is None for r in report.rows):
        columns.remove("recalibrated %")
    rows = [
        [
            r.solver,
            "adaptive" if r.substeps is None else r.substeps,
            r.forecast,
            f"{100 * r.accuracy:.2f}",
            *([] if r.accuracy_recalibrated is None else [f"{100 * r.accuracy_recalibrated:.2f}"]),
            r.logit_drift,
            r.nfe,
            "as trained" if r.as_trained else "",
        ]
        for r in report.rows
    ]
    return (
        "<h2>The same weights under other solvers</h2>"
        "<p>A network that has learnt an ODE keeps its accuracy under every finer solver; one that has "
        "learnt its own solver's steps does not. The forecast was made from unlabelled images; "
        f"recalibrated means batch norm's statistics measured anew at {report.calibration}.</p>"
        f"<p><b>{escape(report.causes())}</b></p>"
        + _figure(plots.swap_accuracy(report), "accuracy and drift over the step size")
        + _table(columns, rows)
        + _critical(report)
        + _distances(report)
    )


def _distances(report: SwapReport) -> str:
    """How far each block is from the flow of its own F."""
    if not report.distances:
        return (
            f"<p>Distance from an ODE: {escape(report.distances_note)}</p>" if report.distances_note else ""
        )
    rows = [[d.block, d.distance] for d in report.distances]
    return (
        f"<p>{escape(report.about_distances())} Near 0 every finer solver does the same.</p>"
        f"<details><summary>Blocks</summary>{_table(['block', 'distance'], rows)}</details>"
    )


def _critical(report: SwapReport) -> str:
    try:
        steps = report.critical_steps()
    except ValueError:  # trained with other substeps than these
        return ""
    trained = {row.solver for row in report.rows if row.as_trained}
    shown = ", ".join(
        f"{solver} {step:g}" if step else f"{solver} {'only as trained' if solver in trained else 'none'}"
        for solver, step in steps.items()
    )
    return (
        f"<p>Largest step that keeps the accuracy within a point, as all finer ones do: {escape(shown)}.</p>"
    )


def _stability(network: nn.Module, x: torch.Tensor) -> str:
    """Spectra of the groups over the stability regions, where their states are small enough."""
    text = "<h2>Stability</h2>"
    sizes = [a.x[0].numel() for a in trace(network, x[:1]).additions]
    if not sizes or max(sizes) > DENSE_STATE:
        return text + (
            f"<p>States of up to {max(sizes, default=0):,} entries: all of their eigenvalues are not "
            "computed here. The limits below rest on the outermost ones.</p>"
        )
    names = list(
        dict.fromkeys([*(s.solver for s in network.modules() if isinstance(s, ResidualStack)), "rk4"])
    )
    methods = [name for name in names if name in METHODS]
    groups = list(block_limits(network, x, methods))
    rows = [
        [f"{s.name}, block {r.block}", r.solver, r.step, r.growing, r.decaying_step, r.limiting_eigenvalue,
         "yes" if r.within else "no"]
        for s in groups
        for r in s.rows
    ]  # fmt: skip
    columns = ["block", "solver", "limit", "growing modes", "limit without them", "set by λ", "within it"]
    picture = _figure(plots.group_spectra(groups, methods), "eigenvalues over the stability regions")
    told = (
        "<p>For experts. What another solver costs is foretold by the forecast above, not by these limits: "
        "they belong to infinitely many steps, and each block takes one.</p>"
    )
    return text + told + picture + _table(columns, rows)


def _profile(network: nn.Module, x: torch.Tensor, target: torch.Tensor) -> str:
    try:
        profile = profile_depth(network, x, target)
    except ValueError as error:
        return f"<h2>Depth profile</h2><p>{escape(str(error))}</p>"
    return "<h2>Depth profile</h2>" + _profile_tables(profile)


def _profile_tables(profile: DepthProfile) -> str:
    columns = {
        "block": "name", "shortcut": "kind", "η": "step_size", "‖x‖": "state_norm", "‖ηF‖/‖x‖": "ratio",
        "dead": "inactive", "gradient": "gradient", "identity part": "identity_gradient",
        "residual part": "residual_gradient", "max Re λ": "rightmost", "limit": "step_limit",
        "decaying limit": "decaying_step", "largest |R(ηλ)|": "growth", "σ min": "sigma_min",
        "σ max": "sigma_max", "ε": "epsilon", "F with −g": "boosting", "Δ loss without": "loss_change",
    }  # fmt: skip
    rows = [[getattr(r, field) for field in columns.values()] for r in profile.rows]
    groups = _table(
        ["group", "blocks", "‖∏(I+ηJ)‖", "∏(1+ε)", "∏(1−ε)", "without shortcuts at most"],
        [[f"{s.first} … {s.last}", s.blocks, s.norm, s.upper, s.lower, s.plain] for s in profile.groups],
    )
    return (
        f"<p>{len(profile.rows)} residual additions at {profile.samples} test images.</p>"
        + _figure(plots.depth_profile(profile), "features, gradients and limits over depth")
        + _table(list(columns), rows)
        + (f"<h3>Gain through a group</h3>{groups}" if profile.groups else "")
    )


def _settings(config: dict[str, Any]) -> str:
    rows = [(name, value) for name, value in config.items() if not isinstance(value, dict)]
    for name, value in config.items():
        if isinstance(value, dict):
            rows += [(f"{name}.{key}", item) for key, item in value.items()]
    return f"<h2>Settings</h2><details><summary>All</summary>{_table(['setting', 'value'], rows)}</details>"
