"""What a step-limit penalty costs and brings: `python -m tests.benchmarks.step_penalty [--weight 4 --margin 0.25]`.

odenet20 on the digits, Euler, the recipe `digits`, without and with the penalty: test accuracy, and for every
block at test images, by dense eigenvalues, the largest |1 + hλ|, growing modes, and the limit of the others.
"""

import argparse
import tempfile
import time

import torch

import resode
from resode.analysis import StepLimitPenalty
from resode.training.evaluate import images_of, plain_batches
from resode.training.stages import stage_limits


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weight", type=float, default=4.0)
    parser.add_argument("--margin", type=float, default=0.25)
    parser.add_argument("--samples", type=int, default=2, help="test images to look at")
    parser.add_argument("--only", choices=("without", "with"))
    given = parser.parse_args()
    for name in ("without", "with"):
        if given.only not in (None, name):
            continue
        penalty = StepLimitPenalty("euler", given.margin, weight=given.weight) if name == "with" else None
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            run = resode.train("odenet20", "digits", run_dir=f"{folder}/run", penalty=penalty, progress=False)
            seconds = time.perf_counter() - begun
            images = next(iter(plain_batches(images_of(run.path), limit=given.samples)))[0]
        print(f"{name} penalty: test accuracy {100 * run.summary['test_accuracy']:.2f} %, {seconds:.0f} s")
        for stage in stage_limits(run.network, images, ["euler"]):
            for row in stage.rows:
                print(
                    f"  {stage.name} block {row.block}: largest |1 + hλ| {row.amplification:.4f}, "
                    f"growing {row.growing}, limit of the others {row.decaying_step:.4f}, "
                    f"{'inside' if row.inside else 'outside'}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
