"""The published CIFAR-10 table and the degradation curves, trained under one budget, unattended and resumable.

    python -m tests.benchmarks.table --data PATH --out FOLDER --epochs 10
    python -m tests.benchmarks.table --data PATH --out FOLDER --epochs 3 --only resnet20 resnet56 --seeds 0 1 2
    python -m tests.benchmarks.table --out FOLDER --store

One recipe for all: `fast` without its moving average, so that an epoch's figures are those of one network. The networks
without shortcuts, that were published before batch norm, get one (option norm=batch): at this learning rate some of them diverge
without. A run is a folder FOLDER/NAME-eEPOCHS-sSEED; stopped at any moment, the same command goes on where it was, and finished
runs are not repeated. After every epoch the training error (clean training images, in evaluation mode) and the test error are
written to FOLDER/errors.csv. --store puts these into docs/results/ and the table into docs/published-table.md.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from resode.networks import NETWORKS
from resode.training.data.datasets import load_data
from resode.training.evaluate import plain_batches, score
from resode.training.files import RunError, replacing
from resode.training.run import train
from theory import degradation

ROOT = Path(__file__).parents[2]
STORED = ROOT / "docs" / "results" / "cifar10-errors.csv"
PAGE = ROOT / "docs" / "published-table.md"
COLUMNS = ("run", "model", "seed", "epochs", "epoch", "train_error", "test_error", "seconds")
NORMED = {"norm": "batch"}


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Args:
        name: of the row and of its runs.
        model: a name of `resode.networks`.
        layers: as published.
        published: test error on CIFAR-10, percent; None for what was not published.
        options: of the network.
        settings: of the recipe, beside those that all have.
        trained: whether the queue has it.
    """

    name: str
    model: str
    layers: int
    published: float | None
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = True


TABLE = [
    Entry("maxout", "maxout", 5, 9.38, NORMED),
    Entry("nin", "nin", 9, 8.81, NORMED),
    Entry("dsn", "dsn", 9, 8.22, NORMED),
    Entry("fitnet19", "fitnet19", 19, 8.39, NORMED),
    Entry("highway19", "highway19", 19, 7.54, NORMED),
    Entry("resnet20", "resnet20", 20, 8.75),
    Entry("resnet32", "resnet32", 32, 7.51),
    Entry("resnet44", "resnet44", 44, 7.17),
    Entry("resnet56", "resnet56", 56, 6.97),
    Entry("resnet110", "resnet110", 110, 6.43, trained=False),
    Entry("resnet1202", "resnet1202", 1202, 7.93, trained=False),
    Entry("plain20", "plain20", 20, None),
    Entry("plain56", "plain56", 56, None),
    Entry("odenet20-euler", "odenet20", 20, None),
    Entry("odenet20-rk4", "odenet20", 20, None, {"solver": "rk4"}),
    Entry("odenet20-swap-proof", "odenet20", 20, None, settings={"swap_proof": True}),
]
"""The rows in the order in which they are printed."""

FIRST = ("plain20", "plain56", "resnet20", "resnet56")
"""What is trained before all others: the degradation curves."""


def queue(only: Sequence[str] | None = None) -> list[Entry]:
    """The rows in the order in which they are trained: the curves, then the cheapest first."""
    known = {entry.name: entry for entry in TABLE}
    if only:
        return [known[name] for name in only]
    rest = [entry for entry in TABLE if entry.trained and entry.name not in FIRST]
    rest.sort(key=lambda entry: NETWORKS[entry.model](**entry.options).cost((3, 32, 32)).macs)
    return [*(known[name] for name in FIRST), *rest]


class Errors:
    """A callback that writes both errors after the last update of every epoch."""

    def __init__(self, path: Path, about: Mapping[str, Any], batches: Sequence[Iterable[Any]]) -> None:
        self.path, self.about, self.batches = path, about, batches

    def after_update(self, loop: Any) -> None:
        if loop.index < loop.steps:
            return
        train_error, test_error = (round(100 - 100 * score(loop.kept, b).accuracy, 3) for b in self.batches)
        row = {**self.about, "epoch": loop.epoch + 1, "train_error": train_error, "test_error": test_error}
        row["seconds"] = round(loop.seconds + loop.epoch_seconds, 1)
        write(self.path, [row])

    def after_run(self, loop: Any) -> None:
        pass


def read(path: Path) -> list[dict[str, str]]:
    """The rows that are there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows; one of the same run and epoch gives way to its successor."""
    kept = {(row["run"], str(row["epoch"])): row for row in [*read(path), *rows]}
    with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(kept.values())


def trained(entry: Entry, seed: int, options: argparse.Namespace, batches: Sequence[Iterable[Any]]) -> str:
    """Train one run, or what is left of it; a line about how it ended."""
    name = f"{entry.name}-e{options.epochs}-s{seed}"
    folder = options.out / name
    if (folder / "summary.json").exists():
        return f"{name}: was finished"
    about = {"run": name, "model": entry.name, "seed": seed, "epochs": options.epochs}
    callbacks = [Errors(options.out / "errors.csv", about, batches)]
    begun = time.perf_counter()
    place = None if options.data == "digits" else options.data
    try:
        if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
            train(resume=folder, data_dir=place, callbacks=callbacks, progress=options.progress)
        else:
            if folder.exists():  # stopped before its first epoch ended
                for path in sorted(folder.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
            train(
                entry.model,
                "digits" if place is None else "cifar10",
                "fast",
                model_options=dict(entry.options),
                run_dir=folder,
                data_dir=place,
                callbacks=callbacks,
                progress=options.progress,
                **{"epochs": options.epochs, "seed": seed, "ema": 0.0, **options.settings, **entry.settings},
            )
    except RunError as error:
        return f"{name}: failed. {error}"
    last = [row for row in read(options.out / "errors.csv") if row["run"] == name][-1]
    seconds = time.perf_counter() - begun
    return (
        f"{name}: training error {last['train_error']} %, test error {last['test_error']} %, {seconds:.0f} s"
    )


def last_errors(rows: Sequence[Mapping[str, str]]) -> dict[str, list[tuple[int, float]]]:
    """Row of the table to (epochs, test error) of its finished runs."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["epoch"] == row["epochs"]:
            found.setdefault(row["model"], []).append((int(row["epochs"]), float(row["test_error"])))
    return found


def lines(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The table in Markdown: as published, and as measured where it was."""
    found = last_errors(rows)
    head = "| network | layers | parameters | published error, % | measured here, % | epochs, seeds |"
    text = [head, "| --- | --- | --- | --- | --- | --- |"]
    for entry in TABLE:
        parameters = NETWORKS[entry.model].parameter_count(**entry.options)
        runs = found.get(entry.name, [])
        longest = [error for epochs, error in runs if epochs == max(e for e, _ in runs)] if runs else []
        if longest:
            spread = f" ± {stdev(longest):.2f}" if len(longest) > 1 else ""
            measured, budget = f"{mean(longest):.2f}{spread}", f"{max(e for e, _ in runs)}, {len(longest)}"
        else:
            measured, budget = "not measured", f"`--only {entry.name}`"
        published = "" if entry.published is None else f"{entry.published:.2f}"
        cells = (f"`{entry.name}`", entry.layers, f"{parameters:,}", published, measured, budget)
        text.append("| " + " | ".join(map(str, cells)) + " |")
    return text


def placed(page: str, table: Sequence[str]) -> str:
    """The page with the table between its two marks."""
    begin, end = "<!-- table -->\n", "<!-- end of the table -->"
    before, _, rest = page.partition(begin)
    return before + begin + "\n" + "\n".join(table) + "\n\n" + end + rest.partition(end)[2]


def store(out: Path) -> int:
    """Into docs/: all errors, the degradation curves of finished runs of the longest budget, and the table."""
    write(STORED, read(out / "errors.csv"))
    rows = read(STORED)
    done = {row["run"]: int(row["epochs"]) for row in rows if row["epoch"] == row["epochs"]}
    budgets = {e for e in done.values() if all(done.get(f"{name}-e{e}-s0") == e for name in FIRST)}
    if budgets:
        runs = {f"{name}-e{max(budgets)}-s0" for name in FIRST}
        first = [row for row in rows if row["run"] in runs]
        with degradation.TABLE.open("w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(degradation.COLUMNS)
            table.writerows((r["model"], r["epoch"], r["train_error"], r["test_error"]) for r in first)
    PAGE.write_text(placed(PAGE.read_text(encoding="utf-8"), lines(rows)), encoding="utf-8")
    print(f"{len(rows)} rows in {STORED}, {len(done)} finished runs")
    return 0


def setting(text: str) -> tuple[str, Any]:
    """NAME=NUMBER, of the recipe."""
    name, _, value = text.partition("=")
    return name, float(value) if "." in value else int(value)


def main(arguments: list[str] | None = None, said: Callable[[str], Any] = print) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.table", description=__doc__)
    parser.add_argument(
        "--data", default=os.environ.get("RESODE_DATA"), help="CIFAR-10, or digits for a trial"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=[entry.name for entry in TABLE], metavar="NAME")
    parser.add_argument(
        "--clean-images", type=int, default=10_000, help="for the training error, evenly spaced"
    )
    parser.add_argument("--set", dest="settings", type=setting, nargs="+", default=[], metavar="NAME=NUMBER")
    parser.add_argument("--progress", action="store_true", help="print every epoch")
    parser.add_argument("--store", action="store_true", help="train nothing; put what is there into docs/")
    options = parser.parse_args(arguments)
    options.settings = dict(options.settings)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.store:
        return store(options.out)
    if options.data is None:
        parser.error("--data PATH, or the environment variable RESODE_DATA, must say where CIFAR-10 is")
    images = load_data("digits") if options.data == "digits" else load_data("cifar10", data_dir=options.data)
    batches = [plain_batches(images, "train", limit=options.clean_images), plain_batches(images)]
    for seed in options.seeds:
        for entry in queue(options.only):
            said(trained(entry, seed, options, batches))
    return 0


if __name__ == "__main__":
    sys.exit(main())
