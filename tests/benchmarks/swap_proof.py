"""What a solver drawn for each batch does to a swap, and what it costs: odenet20 (width 8) on the digits.

    python -m tests.benchmarks.swap_proof --seeds 10

trains with Euler alone and with `swap_proof`, and prints means with standard errors over the seeds: accuracy as
trained, points lost under other solvers (recalibrated, and as it is), and the seconds of training.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import resode
from resode import swap_report
from resode.training.data import load_data
from resode.training.evaluate import plain_batches

SWAPS = (("euler", 2), ("euler", 4), ("midpoint", 1), ("midpoint", 2), ("rk4", 1), ("rk4", 2), ("dopri5", 1))


def measured(seed: int, proof: bool) -> dict[str, float]:
    """The figures of one run."""
    data = load_data("digits")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        run = resode.train(
            "odenet20", "digits", model_options={"width": 8}, epochs=12, seed=seed, swap_proof=proof,
            run_dir=Path(folder) / "run", progress=False,
        )  # fmt: skip
        found = {"processor seconds": time.process_time() - begun}
    batches, training = list(plain_batches(data)), list(plain_batches(data, "train"))
    own = swap_report(run.network, batches, ["euler"], [1], recalibrate=training).rows[0]
    found |= {"accuracy, %": 100 * own.accuracy, "accuracy recalibrated, %": 100 * own.kept}
    for solver, n in SWAPS:
        row = swap_report(run.network, batches, [solver], [n], recalibrate=training).rows[0]
        found[f"points lost under {solver}×{n}, recalibrated"] = 100 * (own.kept - row.kept)
        found[f"points lost under {solver}×{n}, as it is"] = 100 * (own.accuracy - row.accuracy)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = parser.parse_args().seeds
    columns: dict[bool, dict[str, list[float]]] = {False: defaultdict(list), True: defaultdict(list)}
    for seed in range(seeds):
        for proof, column in columns.items():
            for name, value in measured(seed, proof).items():
                column[name].append(value)
    print("| | Euler alone | a solver drawn for each batch |\n| --- | --- | --- |")
    for name in columns[True]:
        cells = [f"{mean(c[name]):.2f} ± {stdev(c[name]) / seeds**0.5:.2f}" for c in columns.values()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
