"""Look inside: diagnosis and depth profile of any network, a run's report, several runs side by side."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from resode.checks import known
from resode.cli.terminal import command, console, figures_of, fits, flag, say, separated, store, table
from resode.cli.train import own_model
from resode.cli.trained import _methods
from resode.tables import short, short_complex


@command(
    "resode profile runs/demo",
    "resode profile runs/demo --samples 64 --spectra 4",
    "resode profile --model my.module:network --weights my.safetensors --shape 3,224,224",
    "resode profile --model resnet50 --shape 3,64,64 --blocks 'layer?.*'",
)
def profile(
    run: Annotated[Path | None, typer.Argument(help="Run folder or weights file.", metavar="[RUN]")] = None,
    model: Annotated[str | None, flag("A network's name, or package.module:function.")] = None,
    weights: Annotated[Path | None, flag("Its weights (.safetensors); fresh ones without.")] = None,
    data: Annotated[str | None, flag("Data set whose test images are taken.")] = None,
    data_dir: Annotated[Path | None, flag("Where its data lies.")] = None,
    shape: Annotated[str | None, flag("Random inputs of this shape instead, with commas.")] = None,
    samples: Annotated[int, typer.Option(help="Inputs to look at.", min=1)] = 16,
    spectra: Annotated[int, typer.Option(help="Of them, with eigenvalues.", min=0)] = 2,
    solver: Annotated[str | None, flag("Method of the step limits instead of each block's own.")] = None,
    blocks: Annotated[str | None, flag("Names of the modules that are blocks, with * and ?.")] = None,
    lesions: Annotated[bool, typer.Option(help="Also run without each block.")] = True,
    output: Annotated[Path | None, flag("Folder for profile.csv and profile.png.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Profile the depth of any residual network.

    Finds every residual addition by tracing, and reports how features, gradients and eigenvalues travel
    through it, and which block's step is too large.
    """
    from resode.analysis.depth.profile import profile_depth

    if solver is not None:
        _methods([solver])
    network, x, target = _looked_at(run, model, weights, data, data_dir, shape, samples, device)
    found = profile_depth(network, x, target, blocks=blocks, solver=solver, spectra=spectra, lesions=lesions)
    _show(found)
    store(output or figures_of(run or weights), "profile", found)


def _looked_at(
    run: Path | None,
    model: str | None,
    weights: Path | None,
    data: str | None,
    data_dir: Path | None,
    shape: str | None,
    samples: int,
    device: str,
) -> tuple[Any, Any, Any]:
    """The network that a command looks at, its inputs and their classes."""
    from resode.training.evaluate import load
    from resode.training.plan import choose_device, make_network

    if run is not None and weights is not None:
        raise ValueError("give RUN or --weights, not both: a run has weights of its own.")
    if run is None and model is None:
        raise ValueError(
            "give a run, or a network with --model NAME or --model package.module:function (and --weights)."
        )
    source, place, chosen = run or weights, choose_device(device), own_model(model)
    network = make_network(chosen) if source is None else load(source, model=chosen)
    return network.to(place).eval(), *_inputs(source, data, data_dir, shape, samples, place)


def _inputs(
    source: Path | None, data: str | None, data_dir: Path | None, shape: str | None, samples: int, place: Any
) -> tuple[Any, Any]:
    """Test images with their classes, or random inputs without."""
    import torch

    from resode.training.data.datasets import DATASETS, load_data
    from resode.training.evaluate import images_of, plain_batches

    if shape is not None:
        sizes = separated(shape, int, "--shape")
        if not sizes or min(sizes) < 1:
            raise ValueError(f"--shape takes sizes without the batch, such as 3,32,32: got {shape!r}.")
        generator = torch.Generator().manual_seed(0)
        return torch.randn(samples, *sizes, generator=generator).to(place), None
    if source is None and data is None:
        raise ValueError("a network without a run needs inputs: give --data NAME or --shape 3,32,32.")
    if source is None:
        images = load_data(known("data set", str(data), DATASETS), data_dir)
    else:
        images = images_of(source, data, data_dir)
    return next(iter(plain_batches(images, device=place, limit=samples)))


def _show(found: Any) -> None:
    effect = "loss_change" if found.has_target else "output_change"
    names = {
        "η": "step_size",
        "|x|": "state_norm",
        "|F|/|x|": "ratio",
        "dead": "inactive",
        "grad": "gradient",
        "limit": "step_limit",
        "decaying": "decaying_step",
        "|R|": "growth",
        "σ min": "sigma_min",
        "σ max": "sigma_max",
        "effect": effect,
    }
    table(
        ["block", *names, "max Re λ"],
        [
            [r.name, *(short(getattr(r, field)) for field in names.values()), short_complex(r.rightmost)]
            for r in found.rows
        ],
    )
    say()
    say("limit     the largest stable step at the worst sample; 0 where a mode grows (Re λ > 0)")
    say("decaying  the limit of all other modes;  |R|  their largest growth in a step, above 1 too large")
    say(f"effect    of removing the block on the {'loss' if found.has_target else 'output, relative'}")
    for group in found.groups:
        bound = f"at most {group.upper:.4g}" if group.exact else "activations between"
        say(f"{group.first} … {group.last}: the gradient's gain {group.norm:.4g}, {bound}")


@command(
    "resode diagnose runs/demo",
    "resode diagnose runs/demo --solvers rk4,midpoint --lr 0.1",
    "resode diagnose --model my.module:network --weights my.safetensors --shape 3,224,224",
)
def diagnose(
    run: Annotated[Path | None, typer.Argument(help="Run folder or weights file.", metavar="[RUN]")] = None,
    model: Annotated[str | None, flag("A network's name, or package.module:function.")] = None,
    weights: Annotated[Path | None, flag("Its weights (.safetensors); fresh ones without.")] = None,
    data: Annotated[str | None, flag("Data set whose test images are taken.")] = None,
    data_dir: Annotated[Path | None, flag("Where its data lies.")] = None,
    shape: Annotated[str | None, flag("Random inputs of this shape instead, with commas.")] = None,
    samples: Annotated[int, typer.Option(help="Inputs to look at.", min=1)] = 32,
    lr: Annotated[float | None, flag("A learning rate of SGD to judge.")] = None,
    solvers: Annotated[str, typer.Option(help="Methods to foretell a swap to, with commas.")] = "rk4",
    blocks: Annotated[str | None, flag("Names of the modules that are blocks, with * and ?.")] = None,
    output: Annotated[Path | None, flag("Folder for diagnosis.csv and diagnosis.png.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Say what is wrong with a network, if anything, and what to do.

    One page: verdict, whole depth, blocks, what another solver will cost, learning rate. It takes a few
    passes, for any network; exit code 0 whatever is found.
    """
    import resode

    names = _methods(separated(solvers, str, "--solvers"))
    network, x, target = _looked_at(run, model, weights, data, data_dir, shape, samples, device)
    found = resode.diagnose(network, x, target, lr=lr, solvers=names, blocks=blocks)
    say(found.page(console().width if sys.stdout.isatty() else 80))
    store(output or figures_of(run or weights), "diagnosis", found, figure=bool(found.rows))


@command(
    "resode explore",
    "resode explore runs/demo -o demo.html",
    "resode explore eigenvalues.csv --methods rk4,rkl2_8",
    "resode explore --model my.module:network --weights my.safetensors --shape 3,32,32",
)
def explore(
    what: Annotated[
        Path | None, typer.Argument(help="Run folder, weights, or a CSV of eigenvalues.", metavar="[RUN|CSV]")
    ] = None,
    output: Annotated[Path, flag("The file.", None, "-o", "--output")] = Path("explore.html"),
    methods: Annotated[str, typer.Option(help="Drawn at first, with commas.")] = "euler,rk4",
    samples: Annotated[int, typer.Option(help="For a network: inputs to look at.", min=1)] = 1,
    model: Annotated[str | None, flag("A network's name, or package.module:function.")] = None,
    weights: Annotated[Path | None, flag("Its weights (.safetensors); fresh ones without.")] = None,
    data: Annotated[str | None, flag("Data set whose test images are taken.")] = None,
    data_dir: Annotated[Path | None, flag("Where its data lies.")] = None,
    shape: Annotated[str | None, flag("Random inputs of this shape instead, with commas.")] = None,
    blocks: Annotated[str | None, flag("Names of the modules that are blocks, with * and ?.")] = None,
) -> None:
    """Write a page to explore stability with, as one HTML file.

    Stability regions, order stars and growth of any method; drag the step, and the eigenvalues of every block
    move over the region. The table is one of `resode stability`, of `resode profile`, or of two columns real
    and imaginary. Nothing is fetched, and no server is needed.
    """
    from resode.explorer import explorer_page, read_spectra
    from resode.training.files import replacing

    names = _methods(separated(methods, str, "--methods"))
    title, source = "Stability explorer", "An example. Type eigenvalues of your own below."
    spectra = []
    if what is not None and what.suffix.lower() == ".csv":
        of_network = {
            "--model": model,
            "--weights": weights,
            "--data": data,
            "--shape": shape,
            "--blocks": blocks,
        }
        if given := [name for name, value in of_network.items() if value is not None]:
            raise ValueError(f"{', '.join(given)}: for a network, and {what} is a table.")
        spectra, title = read_spectra(what), what.name
        source = f"{sum(len(s.eigenvalues) for s in spectra):,} eigenvalues"
    elif what is not None or model is not None or weights is not None:
        network, x, _ = _looked_at(what, model, weights, data, data_dir, shape, samples, "cpu")
        spectra, source = _spectra(network, x, names, blocks)
        title = what.name if what is not None else str(model or weights)
    with replacing(output) as path:
        path.write_text(explorer_page(spectra, title=title, source=source, methods=names), encoding="utf-8")
    say(f"page {output}")


def _spectra(network: Any, x: Any, methods: list[str], blocks: str | None) -> tuple[list[Any], str]:
    """The eigenvalues of every block at some inputs, and what they are."""
    from resode.analysis.steps.block_limits import block_limits
    from resode.explorer import spectra_of

    groups = list(block_limits(network, x, methods, blocks=blocks))
    outer = "" if all(row.complete for group in groups for row in group.rows) else "the outer "
    spectra = spectra_of(groups)
    count = sum(len(s.eigenvalues) for s in spectra)
    inputs = "one input" if len(x) == 1 else f"{len(x)} inputs"
    return spectra, f"{outer}{count:,} eigenvalues of {len(spectra)} blocks at {inputs}"


@command("resode report runs/demo", "resode report runs/demo --output demo.html")
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN", show_default=False)],
    output: Annotated[Path | None, flag("The file; RUN/report.html without.")] = None,
    samples: Annotated[int, typer.Option(help="Test images for the profile.", min=1)] = 16,
    model: Annotated[str | None, flag("For a network of your own: package.module:function.")] = None,
    data: Annotated[str | None, flag("Another data set than the run's.")] = None,
    data_dir: Annotated[Path | None, flag("Where its data lies, where that changed.")] = None,
) -> None:
    """Write a run as one HTML file.

    Training curves, solver swap, stability and depth profile, with nothing to fetch: it can be sent, and
    read on a phone.
    """
    from resode.training.report import write_report

    path = write_report(run, output, samples=samples, model=own_model(model), data=data, data_dir=data_dir)
    say(f"report {path}")


@command("resode compare runs/plain20 runs/resnet20 runs/odenet20", "resode compare runs/* --out figures")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...", show_default=False)],
    out: Annotated[
        Path | None, flag("Folder for compare.csv and compare.png; here without.", None, "--out", "--output")
    ] = None,
) -> None:
    """Lay runs side by side: one table, one figure.

    Runs that differ in their seed alone are one row, with mean ± standard deviation over the seeds. All
    figures are the last epoch's; training errors are of augmented images.
    """
    from resode.training.compare import compare as compare_runs

    folder = _writable(out or Path())
    found = compare_runs(runs)
    print_comparison(found)
    store(folder, "compare", found)


def print_comparison(found: Any) -> None:
    """The table of several runs, and what its reader must know."""
    columns = ["configuration", "runs", "epoch", "parameters", "test err %", "train err %"]
    columns += ["seconds", "images/s", "F calls"]
    rows = [
        [
            row.name,
            str(len(row.counted)),
            str(row.epoch),
            "-" if row.parameters is None else f"{row.parameters:,}",
            _spread(row.test_error, ".2f", 100),
            _spread(row.train_error, ".2f", 100),
            *(_spread(value, ",.0f", mean=True) for value in (row.seconds, row.images_per_second)),
            _spread(row.nfe, "g", mean=True),
        ]
        for row in found.rows
    ]
    if not fits(columns, rows):  # names as lines of their own, numbers in the table
        for number, row in enumerate(rows, start=1):
            say(f"{number}  {row[0]}")
            row[0] = str(number)
        columns[0] = ""
        say()
    table(columns, rows)
    if found.notes:
        say()
    for note in found.notes:
        say(note)


def _spread(value: Any, form: str, times: float = 1, mean: bool = False) -> str:
    if value is None:
        return "-"
    text = format(times * value.mean, form)
    return text if mean or value.std is None else f"{text} ± {format(times * value.std, form)}"


def _writable(folder: Path) -> Path:
    """The folder, made where it was missing; found out before the work is done."""
    reason = "its permissions forbid it"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = str(error.strerror or error)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--out {folder} cannot be written: {reason}. Name a folder of your own.")
    return folder
