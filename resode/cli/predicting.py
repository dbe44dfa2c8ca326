"""resode predict."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from resode.cli.terminal import command, fits, flag, say, table
from resode.cli.train import own_model
from resode.tables import printable


@command(
    "resode predict runs/demo digit.png",
    "resode predict runs/demo photos/*.jpg --resize --top 1",
    "resode predict runs/demo images.npy --csv > predictions.csv",
)
def predict(
    run: Annotated[
        Path, typer.Argument(help="Run folder or weights file.", metavar="RUN", show_default=False)
    ],
    images: Annotated[
        list[Path],
        typer.Argument(help="PNG, JPEG, .npy and .npz files.", metavar="IMAGES...", show_default=False),
    ],
    top: Annotated[int, typer.Option(help="How many classes.", min=1)] = 3,
    resize: Annotated[bool, typer.Option("--resize", help="Bring images to the network's size.")] = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Comma-separated values, as in a pipe, instead of a table.")
    ] = False,
    model: Annotated[str | None, flag("For a network of your own: package.module:function.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Name what is in images of your own.

    The likeliest classes with their probabilities. Arrays hold uint8 images, (N, C, H, W) or (N, H, W, C).
    """
    from resode.training.predict import predict as predict_classes

    found = predict_classes(run, images, top=top, resize=resize, model=own_model(model), device=device)
    if as_csv or not sys.stdout.isatty():
        text = found.to_csv()  # into a pipe as it is
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        for note in found.notes:
            typer.echo(printable(note), err=True)
        return
    ranks = [text for rank in range(1, top + 1) for text in (f"{rank}.", "%")]
    wide = [
        [row.image, *(t for pair in zip(row.classes, _percent(row.probabilities), strict=True) for t in pair)]
        for row in found.rows
    ]
    if fits(["image", *ranks], wide):
        table(["image", *ranks], wide)
    else:
        long = [
            [row.image if not rank else "", f"{rank + 1}. {name}", share]
            for row in found.rows
            for rank, (name, share) in enumerate(zip(row.classes, _percent(row.probabilities), strict=True))
        ]
        table(["image", "class", "%"], long, words=("class",))
    for note in found.notes:
        say(note)


def _percent(shares: tuple[float, ...]) -> list[str]:
    return [f"{100 * share:.1f}" for share in shares]
