"""What a step-limit penalty costs and brings: `python -m tests.benchmarks.step_penalty [--seeds 5] [--choose]`.

odenet20 on the digits, Euler, the recipe `digits`, without and with the penalty: test accuracy over seeds, and for
every block at test images, by dense eigenvalues, the largest |1 + hλ|, growing modes, and the limit of the others.

`--choose` prints instead what weight and margin were chosen by: accuracy on 200 images held out of the training set,
and the largest |1 + hλ| at training images, of one seed (100) that is not among those compared.
"""

import argparse
import statistics
import tempfile
import time

import torch

import resode
from resode.analysis import StepLimitPenalty
from resode.analysis.steps.block_limits import block_limits
from resode.training.evaluate import images_of, plain_batches


def trained(penalty: StepLimitPenalty | None, split: str, samples: int, **settings):
    """A run, and the rows of its blocks at some images of a split."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        run = resode.train(
            "odenet20", "digits", run_dir=f"{folder}/run", penalty=penalty, progress=False, **settings
        )
        seconds = time.perf_counter() - begun
        images = next(iter(plain_batches(images_of(run.path), split, limit=samples)))[0]
    rows = [row for stage in block_limits(run.network, images, ["euler"]) for row in stage.rows]
    return run, rows, seconds


def choose(samples: int) -> None:
    print(
        "| weight | margin | validation % | blocks within their limit | largest abs(1 + hλ) |\n| --- | --- | --- | --- | --- |"
    )
    for weight, margin in ((0.0, 0.0), (1.0, 0.25), (4.0, 0.1), (4.0, 0.25), (4.0, 0.5), (16.0, 0.25)):
        penalty = StepLimitPenalty("euler", margin, weight=weight) if weight else None
        run, rows, _ = trained(penalty, "train", samples, seed=100, validation=200)
        print(
            f"| {weight:g} | {margin:g} | {100 * run.summary['validation_accuracy']:.2f} "
            f"| {sum(row.within for row in rows)} of {len(rows)} "
            f"| {max(row.amplification for row in rows):.4f} |",
            flush=True,
        )


def compare(seeds: int, weight: float, margin: float, samples: int) -> None:
    accuracies: dict[str, list[float]] = {}
    print(
        "| seed | penalty | test % | blocks within their limit | limit of the decaying modes | largest abs(1 + hλ) | growing "
        "| seconds |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for seed in range(seeds):
        for name in ("without", "with"):
            penalty = StepLimitPenalty("euler", margin, weight=weight) if name == "with" else None
            run, rows, seconds = trained(penalty, "test", samples, seed=seed)
            accuracies.setdefault(name, []).append(100 * run.summary["test_accuracy"])
            limits = [row.decaying_step for row in rows]
            print(
                f"| {seed} | {name} | {accuracies[name][-1]:.2f} "
                f"| {sum(row.within for row in rows)} of {len(rows)} "
                f"| {min(limits):.3g} to {max(limits):.3g} | {max(row.amplification for row in rows):.4f} "
                f"| {min(row.growing for row in rows)} to {max(row.growing for row in rows)} | {seconds:.0f} |",
                flush=True,
            )
    means = {name: statistics.mean(values) for name, values in accuracies.items()}
    differences = [b - a for a, b in zip(accuracies["without"], accuracies["with"], strict=True)]
    spread = f" ± {statistics.stdev(differences):.2f}" if seeds > 1 else ""
    print(
        f"mean test accuracy {means['without']:.2f} % without, {means['with']:.2f} % with; paired difference "
        f"{statistics.mean(differences):+.2f}{spread} points"
    )


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weight", type=float, default=4.0)
    parser.add_argument("--margin", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2, help="images to look at")
    parser.add_argument("--choose", action="store_true", help="weight and margin, on held-out images")
    given = parser.parse_args()
    if given.choose:
        choose(given.samples)
    else:
        compare(given.seeds, given.weight, given.margin, given.samples)


if __name__ == "__main__":
    main()
