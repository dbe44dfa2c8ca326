"""What `import resode` adds to `import torch`, in processor time: `python -m tests.benchmarks.import_time`.

Fresh interpreters in turns, each with its compiled files in place; the bar is 1.1 of torch's own time.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

BAR = 1.1
PROGRAM = "import time; begun = time.process_time(); import {}; print(time.process_time() - begun)"


def seconds(module: str, cache: str) -> float:
    """Processor time of one import, in an interpreter of its own."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", PROGRAM.format(module)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as cache:
        pairs = [(seconds("torch", cache), seconds("resode", cache)) for _ in range(rounds + 1)][1:]
    torch_alone, with_resode = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    ratio = with_resode / torch_alone
    print(f"import torch   {torch_alone:.3f} s\nimport resode  {with_resode:.3f} s (torch with it)")
    print(
        f"ratio {ratio:.3f} of medians over {rounds} rounds, {ratios[0]:.3f} to {ratios[-1]:.3f}; bar {BAR}"
    )
    raise SystemExit(ratio > BAR)


if __name__ == "__main__":
    main()
