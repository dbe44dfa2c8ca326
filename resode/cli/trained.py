"""What a trained network does: evaluate, swap, stability; and what there is: methods, models."""

from __future__ import annotations

import sys
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Any

import typer

from resode.checks import did_you_mean, known
from resode.cli.terminal import command, figures_of, flag, say, separated, store, table
from resode.cli.train import network_options, own_model
from resode.solve.options import EXPLICIT
from resode.tableaus import METHODS, MOST_STAGES, ON_DEMAND, get_tableau, on_demand
from resode.tables import short, short_complex

_Run = Annotated[Path, typer.Argument(help="Run folder or weights file.", metavar="RUN", show_default=False)]
_OwnModel = Annotated[str | None, flag("For a network of your own: package.module:function.")]
_Data = Annotated[str | None, flag("Another data set than the run's.")]
_DataDir = Annotated[Path | None, flag("Where its data lies, where that changed.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]


@command("resode evaluate runs/demo", "resode evaluate runs/demo --solver rk4 --substeps 2")
def evaluate(
    run: _Run,
    solver: Annotated[str | None, flag("Method instead of the run's.")] = None,
    substeps: Annotated[int | None, flag("Solver steps a block instead of the run's.")] = None,
    model: _OwnModel = None,
    data: _Data = None,
    data_dir: _DataDir = None,
    device: _Device = "auto",
) -> None:
    """Measure a network on the test images."""
    from resode.training.evaluate import evaluate as score_run

    score = score_run(
        run, data, solver=solver, substeps=substeps, model=own_model(model), data_dir=data_dir, device=device
    )
    table(
        ["test images", "accuracy %", "loss", "F evaluations", "images/s"],
        [
            [
                f"{score.images:,}",
                f"{100 * score.accuracy:.2f}",
                f"{score.loss:.4f}",
                f"{score.nfe:g}",
                f"{score.images / score.seconds:,.0f}",
            ]
        ],
    )


@command(
    "resode swap runs/demo",
    "resode swap runs/demo --solvers euler,rk4 --substeps 1,8 --calibration-images 500",
)
def swap(
    run: _Run,
    solvers: Annotated[str, typer.Option(help="Methods, with commas.")] = "euler,midpoint,rk4,dopri5",
    substeps: Annotated[str, typer.Option(help="Solver steps a block, with commas.")] = "1,2,4",
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate/--no-recalibrate", help="Also with batch-norm statistics of the new solver."
        ),
    ] = True,
    calibration_images: Annotated[
        int | None, flag("Training images that these are measured at. Default 2000.")
    ] = None,
    limit: Annotated[int | None, flag("Only so many test images, of all classes.")] = None,
    model: _OwnModel = None,
    data: _Data = None,
    data_dir: _DataDir = None,
    device: _Device = "auto",
) -> None:
    """Change the solver, keep the weights.

    What is foretold from unlabelled images, and the accuracy, drift of the logits and F evaluations of a
    trained network under other solvers and steps.
    """
    from resode.training.evaluate import calibration_batches, images_of, load, plain_batches
    from resode.training.files import replacing

    methods = _methods(separated(solvers, str, "--solvers"), EXPLICIT)
    counts = separated(substeps, int, "--substeps")
    if calibration_images is not None and not recalibrate:
        raise ValueError(
            f"--calibration-images {calibration_images} says at what to recalibrate. Leave it out, or "
            "--no-recalibrate."
        )
    network = load(run, model=own_model(model), device=device)
    images = images_of(run, data, data_dir)
    place = next(network.parameters()).device

    from resode.analysis.diagnose.forecast import INPUTS
    from resode.analysis.swap.report import swap_report
    from resode.blocks.statistics import tracked_norms

    normed = recalibrate and bool(tracked_norms(network))
    count = min(2000, len(images.train_images)) if calibration_images is None else calibration_images
    result = swap_report(
        network,
        plain_batches(images, "test", place, limit),
        solvers=tuple(methods),
        substeps=tuple(counts),
        recalibrate=calibration_batches(images, count, place) if normed else False,
    )
    recalibrated = ["recalibrated %"] if normed else []
    columns = ["solver", "steps", "forecast", "accuracy %", *recalibrated, "drift", "F calls"]
    table(columns, [_swap_row(row) for row in result.rows])
    if any(row.as_trained for row in result.rows):
        say("* as trained")
    say(f"\n{' '.join(result.causes().split())}")
    which = "recalibrated accuracy (resode diagnose foretells it as it is)" if normed else "accuracy"
    say(f"\nforecast: of the {which}, from {INPUTS} images and no label.")
    say("steps: of the solver in a block; a method with error control takes its own.")
    say("drift: how far the logits moved, relative to their size, from those of the trained solver.")
    say(f"\n{result.about_distances()}")
    if result.distances:
        table(["furthest blocks", "distance"], result.furthest())
    store(figures_of(run), "swap", result)
    blocks = figures_of(run) / "swap-blocks.csv"
    with replacing(blocks) as path:
        result.distances_to_csv(path)
    say(f"       {blocks}")


def _swap_row(row: Any) -> list[str]:
    recalibrated = [] if row.accuracy_recalibrated is None else [f"{100 * row.accuracy_recalibrated:.2f}"]
    return [
        row.solver + "*" * row.as_trained,
        "own" if row.substeps is None else str(row.substeps),
        row.forecast,
        f"{100 * row.accuracy:.2f}",
        *recalibrated,
        f"{row.logit_drift:.3f}",
        f"{row.nfe:.4g}",
    ]


def _is_method(name: str) -> bool:
    return name in METHODS or on_demand(name) is not None


def _methods(names: list[str], valid: tuple[str, ...] = tuple(METHODS)) -> list[str]:
    """The names, all of which must be valid methods."""
    for name in names:
        if on_demand(name) is not None:
            continue
        if name in METHODS and name not in valid:
            raise ValueError(
                f"{name} is an implicit method; a stack takes explicit ones. Valid: {', '.join(valid)}."
            )
        known("method", name, valid)
    return names


@command(
    "resode stability rk4 dopri5",
    "resode stability rk4 dopri5 --figure regions.png",
    "resode stability runs/demo --solvers euler,rk4 --samples 4",
)
def stability(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD...|RUN]", help="Methods, or one run.")
    ] = None,
    solvers: Annotated[str, typer.Option(help="For a run: methods, with commas.")] = "euler,rk4",
    samples: Annotated[int, typer.Option(help="For a run: test images to look at.", min=1)] = 4,
    figure: Annotated[Path | None, flag("Where to draw; for a run RUN/figures/stability.png.")] = None,
    blocks: Annotated[
        str | None, flag("For a run: the modules that are its blocks, such as 'layer*.*'.")
    ] = None,
    model: _OwnModel = None,
    data: _Data = None,
    data_dir: _DataDir = None,
) -> None:
    """Find what limits the step.

    For methods: order, stability intervals and letters. For a run: the step limits of every block at real
    images, from the eigenvalues of its Jacobian there: all of them for states of up to 1,024 entries, the
    outer ones for larger states.
    """
    names = what or list(METHODS)
    of_run = {"--blocks": blocks, "--model": model, "--data": data, "--data-dir": data_dir}
    if len(names) == 1 and not _is_method(names[0]):
        if not Path(names[0]).exists():
            close = did_you_mean(names[0], METHODS)
            raise ValueError(
                f"{names[0]} is neither a run nor a method.{close} Methods: "
                f"{', '.join(METHODS)}, {ON_DEMAND}. "
                f"Runs: {', '.join(_runs()) or 'none here'}."
            )
        return _run_stability(
            Path(names[0]),
            separated(solvers, str, "--solvers"),
            samples,
            figure,
            blocks,
            model,
            data,
            data_dir,
        )
    places = [name for name in names if not _is_method(name) and Path(name).exists()]
    if places:
        raise ValueError(f"one run at a time, and no methods beside it (--solvers): got {', '.join(names)}.")
    methods = _methods(names)
    if given := [flag for flag, value in of_run.items() if value is not None]:
        raise ValueError(f"{', '.join(given)}: for a run, and {', '.join(names[:3])} are methods.")
    return _method_stability(methods, figure)


def _method_stability(names: list[str], figure: Path | None) -> None:
    from resode.stability import stability_properties

    found = [stability_properties(name) for name in names]
    columns = ["method", "order", "stages", "real", "imaginary", "stable"]
    table(
        columns,
        [
            [
                p.name,
                str(p.order),
                str(p.stages),
                short(p.real_interval, 4),
                short(p.imaginary_interval, 4),
                p.letters,
            ]
            for p in found
        ],
    )
    if figure is not None:
        from resode import plots
        from resode.training.files import replacing

        with replacing(figure) as unfinished:
            plots.stability_region(names).figure.savefig(unfinished)  # type: ignore[union-attr]
        say(f"\nfigure {figure}")


def _run_stability(
    run: Path,
    names: list[str],
    samples: int,
    figure: Path | None,
    blocks: str | None,
    model: str | None,
    data: str | None,
    data_dir: Path | None,
) -> None:
    from resode.analysis.steps.block_limits import block_limits
    from resode.explorer import spectra_of, spectra_text
    from resode.training.evaluate import images_of, load, plain_batches
    from resode.training.files import replacing

    methods = _methods(names)
    if not methods:
        raise ValueError("--solvers needs at least one method, such as euler,rk4.")
    network = load(run, model=own_model(model))
    dataset = images_of(run, data, data_dir)
    images = next(iter(plain_batches(dataset, limit=samples)))[0]
    count = "1 test image" if len(images) == 1 else f"{len(images)} test images"
    say(f"{run} at {count} of {dataset.title}; step h = η / substeps")
    groups = []
    for number, group in enumerate(block_limits(network, images, methods, blocks=blocks), start=1):
        size = "×".join(map(str, group.shape))
        steps = sorted(set(group.steps))
        h = f"h = {steps[0]:g}" if len(steps) == 1 else f"h = {steps[0]:.3g} to {steps[-1]:.3g}"
        say()
        say(f"group {number} ({group.name}): states {size}, trained with {group.solver}, {h}", "bold")
        groups.append(group)
        table(
            ["block", "solver", "limit", "growing", "decaying", "set by λ", "largest |R|", "within"],
            [
                [
                    str(row.block),
                    row.solver,
                    short(row.step) + ("" if row.converged else " ?"),
                    ("" if row.complete or not row.growing else "≥ ") + str(row.growing),
                    ("" if row.exact else "≤ ") + short(row.decaying_step),
                    short_complex(row.limiting_eigenvalue, 2),
                    f"{row.amplification:.3g}",
                    ("yes" if row.exact else "?") if row.within else "no",
                ]
                for row in group.rows
            ],
            words=("solver",),
        )
        for line in _verdicts(group, methods):
            say(line)
    say()
    say("limit     the largest stable step at the worst image")
    say("growing   modes with Re λ > 0, which make that limit 0")
    say("decaying  the limit of all other modes, set by λ")
    say("|R|       what a step of h multiplies a mode by, at most; growing modes included")
    say("within    whether the step h is within the limit of the decaying modes")
    if any(not row.complete for group in groups for row in group.rows):
        say("≥ ≤ ?     bounds from the outer eigenvalues, of states too large for all of them")
    more = next(iter(plain_batches(dataset, limit=max(samples, 16))))[0]
    for line in _forecasts(network, more, methods):
        say(line, "bold")
    if groups:
        from resode import plots

        path = figure or figures_of(run) / "stability.png"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as unfinished:
            plots.group_spectra(groups, methods, unfinished)
        say(f"\nfigure {path}")
        eigenvalues = path.with_name("eigenvalues.csv")  # what `resode explore` reads
        with replacing(eigenvalues) as unfinished:
            unfinished.write_text(spectra_text(spectra_of(groups)), encoding="utf-8")
        say(f"table  {eigenvalues}")


def _verdicts(group: Any, methods: list[str]) -> list[str]:
    """The blocks whose step decaying modes do not bear, and the step that all of them do."""
    lines = []
    for name in dict.fromkeys([group.solver, *methods]):
        rows = [row for row in group.rows if row.solver == name]
        if not rows:
            continue
        over = [str(row.block) for row in rows if not row.within]
        least = min(rows, key=lambda row: row.decaying_step)
        allowed = ("" if least.exact else "at most ") + short(least.decaying_step)
        kind = "as trained" if name == group.solver else "would be"
        where = f"in block{'s' if len(over) > 1 else ''} {', '.join(over)}" if over else "nowhere"
        lines.append(f"  {name}, {kind}: over the limit {where}; all blocks allow steps up to {allowed}")
    return lines


def _forecasts(network: Any, images: Any, methods: list[str]) -> list[str]:
    """What swapping to each method will do, which no limit tells."""
    from resode.analysis.diagnose.forecast import forecast
    from resode.blocks.solving import stacks_of

    stacks = stacks_of(network)
    names = [name for name in methods if stacks and get_tableau(name).explicit]
    found = {name: forecast(network, images, name) for name in names if name != stacks[0].solver}
    return [f"{name} {f.verdict} accuracy: the logits drift by {f.drift:.3g}" for name, f in found.items()]


def _runs() -> list[str]:
    """Run folders here and in runs/."""
    return sorted(
        str(config.parent) for place in ("*", "runs/*") for config in Path().glob(f"{place}/config.yaml")
    )


def _groups(name: str, options: dict[str, Any], image_size: int | None) -> None:
    """Print a network's table by group."""
    import torch

    from resode.checks import check_whole
    from resode.formulas import cost_of
    from resode.networks import architecture, find

    network = find(name)
    classes = options.get("num_classes", network.options["num_classes"])
    size = 224 if image_size is None and classes == 1000 else 32 if image_size is None else image_size
    check_whole("image_size", size, 1)
    if "image_size" in network.options and "in_features" not in options:
        options = {"image_size": size} | options
    with torch.device("meta"):
        model = network(**options)
        channels = options.get("in_channels", network.options["in_channels"])
        shape = (channels, size, size)
        if options.get("in_features") is not None:
            shape = (options["in_features"],)
        groups = architecture(model, shape)

    def row(called: str, blocks: int, cost: Any) -> list[str]:
        places = "×".join(map(str, cost.shape[1:])) if len(cost.shape) > 1 else ""
        return [
            called,
            places,
            str(cost.shape[0]) if cost.shape else "",
            str(blocks) if blocks else "",
            f"{cost.parameters:,}",
            f"{cost.macs:,}",
        ]

    rows = [row(group.name, group.blocks, group.cost) for group in groups]
    total = cost_of(model, shape)
    rows.append(row("all", sum(group.blocks for group in groups), total))
    say(f"{name}: {network.description}; a sample is {'×'.join(map(str, shape))}.\n")
    table(["group", "output", "channels", "blocks", "parameters", "multiply-adds"], rows)


@command("resode methods")
def methods() -> None:
    """List the Runge-Kutta methods."""

    def use(tableau: Any) -> str:
        steps = "adaptive" if tableau.adaptive else "fixed steps"
        return steps if tableau.explicit else f"implicit, {steps}"

    rows = [[m.name, str(m.order), str(m.stages), use(m), m.source] for m in METHODS.values()]
    for family in ON_DEMAND.split(", "):
        example = get_tableau(family.replace("S", "2"))
        rows.append([family, str(example.order), f"S, 2 to {MOST_STAGES}", use(example), example.source])
    wide = not sys.stdout.isatty() or get_terminal_size().columns >= 170
    columns = ["method", "order", "stages", "steps", "source"]
    keep = 5 if wide else 4
    table(columns[:keep], [row[:keep] for row in rows], words=("method", "steps", "source"))


@command(
    "resode models", "resode models resnet50", "resode models resnet20 --option shortcut=B --image-size 64"
)
def models(
    name: Annotated[str | None, typer.Argument(help="A network, to see its groups.", metavar="NAME")] = None,
    option: Annotated[list[str] | None, flag("NAME=VALUE for the network; repeatable.")] = None,
    image_size: Annotated[int | None, flag("Height and width. Default 32, or 224 for ImageNet.")] = None,
) -> None:
    """List the networks and their options, or one network's groups."""
    from resode.networks import FAMILIES, NETWORKS

    if name is not None:
        return _groups(name, network_options(option), image_size)
    if option or image_size is not None:
        raise ValueError("--option and --image-size are of one network: name it, resode models resnet50.")
    rows = [
        [name, f"{network.parameter_count():,}", network.description] for name, network in NETWORKS.items()
    ]
    table(["model", "parameters", "what it is"], rows, words=("model", "what it is"))
    say()
    for family in FAMILIES:
        say(f"{family.prefix}… has {family.rule}.")
    say("\nOptions, with --option NAME=VALUE:")
    for name in ("resnet20", "odenet20"):
        say(f"  {name}: {', '.join(NETWORKS[name].options)}")
