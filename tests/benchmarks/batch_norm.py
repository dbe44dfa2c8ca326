"""What batch norm's statistics cost a network trained with a solver of several stages.

    python -m tests.benchmarks.batch_norm --seeds 5

runs `resode train --solver rk4 --epochs 6` (odenet20 on the digits, default width) under several seeds and prints the
test accuracy as evaluated, with the statistics measured anew at the training images, and the difference, with means and
standard errors.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev

import resode
from resode import swap_report
from resode.training.data import load_data
from resode.training.evaluate import plain_batches


def measured(seed: int, solver: str, epochs: int) -> tuple[float, float]:
    """Test accuracy in percent: as evaluated, and recalibrated."""
    data = load_data("digits")
    with tempfile.TemporaryDirectory() as folder:
        run = resode.train(
            model_options={"solver": solver},
            epochs=epochs,
            seed=seed,
            run_dir=Path(folder) / "run",
            progress=False,
        )
    training = list(plain_batches(data, "train"))
    [row] = swap_report(run.network, plain_batches(data), [solver], [1], recalibrate=training).rows
    return 100 * row.accuracy, 100 * row.kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="at least two")
    parser.add_argument("--solver", default="rk4")
    parser.add_argument("--epochs", type=int, default=6)
    given = parser.parse_args()
    print("| seed | as evaluated, % | recalibrated, % | difference |\n| --- | --- | --- | --- |")
    rows = []
    for seed in range(given.seeds):
        own, kept = measured(seed, given.solver, given.epochs)
        rows.append((own, kept, own - kept))
        print(f"| {seed} | {own:.2f} | {kept:.2f} | {own - kept:+.2f} |", flush=True)
    cells = [
        f"{mean(column):.2f} ± {stdev(column) / given.seeds**0.5:.2f}" for column in zip(*rows, strict=True)
    ]
    print(f"| mean | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
