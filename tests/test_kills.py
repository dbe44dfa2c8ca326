"""SIGKILL at random moments: a resumed run ends with the weights of an undisturbed one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from kills import compare


def test_killed_runs_end_with_the_same_weights(tmp_path):
    """Four kills here; `python tests/benchmarks/kills.py` does twenty."""
    lines = compare(4, tmp_path, epochs=8, seed=1)
    assert sum(int(line.split()[1]) for line in lines) == 4
