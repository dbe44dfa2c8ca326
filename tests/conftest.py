"""Tests hold for other draws too: RESODE_SEED_SHIFT=K adds 1000·K to every seed given to torch and numpy.

What is shifted is the library's own seeds as well as the tests'. Child processes keep theirs, and so do doctests and
the pages' examples, which print what they draw: `RESODE_SEED_SHIFT=3 pytest tests`.
"""

import getpass
import os
import tempfile

import numpy as np
import pytest
import torch

# Torch 2.13 keeps compiled graphs under a key that does not name the processor's instructions, and compiles what it
# finds for those of the moment: loops in steps of AVX2's 8 floats that store AVX-512's 16 write beyond their arrays.
_COMPILED = f"torchinductor_{getpass.getuser()}_{torch.__version__}_{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), _COMPILED))

collect_ignore = ["clinic", "trust/fuzz.py"]  # of the name of a benchmark; needs atheris

AS_WRITTEN = {(torch, "manual_seed"): torch.manual_seed, (torch, "Generator"): torch.Generator}
AS_WRITTEN |= {(np.random, "default_rng"): np.random.default_rng}
SHIFT = 1000 * int(os.environ.get("RESODE_SEED_SHIFT", "0"))


def shift_seeds() -> None:
    """Wraps where seeds go in; before tests are imported, because some draw at import."""
    seed_all, generator, rng = torch.manual_seed, torch.Generator, np.random.default_rng

    class Shifted(generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(seed + SHIFT)

    torch.manual_seed = lambda seed: seed_all(seed + SHIFT)
    torch.Generator = Shifted
    np.random.default_rng = lambda seed=None: rng(seed + SHIFT if isinstance(seed, int) else seed)


@pytest.fixture
def seeds_as_written(monkeypatch):
    """No shift, for what stands printed with the draw that it shows."""
    for (module, name), own in AS_WRITTEN.items():
        monkeypatch.setattr(module, name, own)


if SHIFT:
    shift_seeds()
