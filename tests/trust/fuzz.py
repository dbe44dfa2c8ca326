"""Coverage-guided fuzzing of what reads files: archives, weights, checkpoints, settings, figures, pickled batches.

    python -m tests.trust.fuzz MINUTES [FOLDER]      needs atheris

Every reader has the errors that it promises. Any other is written down with the bytes that made it, and the
fuzzer goes on; FOLDER keeps the corpus (a later call goes on from it) and `found.json`.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["resode.training", "resode.tables", "resode.networks.weights", "yaml"]
):
    from resode.networks.weights import read_weights
    from resode.tables import read_csv
    from resode.training.data.archives import DataError, read_files
    from resode.training.data.pickles import load_pickle
    from resode.training.files import RunError, pack, read_header, read_yaml, unpack
    from resode.training.folder import RunFolder

import numpy as np
import torch

PLACE = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def _file(name: str, content: bytes) -> Path:
    path = PLACE / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def _archive(content: bytes) -> None:
    for _ in read_files(_file("data", content), lambda name: 1 << 20, "A tar or zip."):
        pass


def _folder(name: str, read: Callable[[RunFolder], object]) -> Callable[[bytes], None]:
    def target(content: bytes) -> None:
        _file(f"run-{name}/config.yaml", content if name == "config.yaml" else b"format: 1\n")
        path = _file(f"run-{name}/{name}", content)
        read(RunFolder(path.parent))

    return target


TARGETS: dict[str, tuple[Callable[[bytes], object], tuple[type[Exception], ...]]] = {
    "archive": (_archive, (DataError,)),
    "checkpoint": (lambda b: unpack(_file("w.safetensors", b)), (RunError,)),
    "header": (lambda b: read_header(_file("h.safetensors", b)), (RunError,)),
    "weights": (lambda b: read_weights(_file("w.pt", b)), (ValueError,)),
    "settings": (lambda b: read_yaml(_file("s.yaml", b)), (RunError,)),
    "config": (_folder("config.yaml", lambda f: f.read_config()), (RunError,)),
    "metrics": (_folder("metrics.csv", lambda f: f.read_metrics()), (RunError,)),
    "summary": (_folder("summary.json", lambda f: f.read_summary()), (RunError,)),
    "table": (lambda b: read_csv(_file("t.csv", b)), (ValueError,)),
    "batch": (lambda b: load_pickle(b), (Exception,)),
}
NAMES = list(TARGETS)


def seeds() -> list[bytes]:
    """A sound small file for every reader, after the byte that chooses it."""
    tar, packed, saved = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        info = tarfile.TarInfo("train/a.png")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("train/a.png", b"abc")
    torch.save({"w": torch.ones(2)}, saved)
    weights = pack({"w": torch.ones(2)}, {"format": 1, "rows": []})
    config = b"format: 1\nmodel: odenet8\nrecipe: {lr: 1e-4}\n"
    metrics = b"epoch,train_accuracy,test_accuracy,images_per_second,nfe,seconds\n1,0.5,0.5,10,3,\n"
    import pickle

    batch = pickle.dumps({b"data": np.zeros((1, 3), np.uint8), b"labels": [1]}, 2)
    examples = [("archive", tar.getvalue()), ("archive", packed.getvalue()), ("weights", saved.getvalue())]
    examples += [("checkpoint", weights), ("header", weights), ("settings", config), ("config", config)]
    examples += [
        ("metrics", metrics),
        ("table", metrics),
        ("summary", b'{"accuracy": 0.5}'),
        ("batch", batch),
    ]
    return [bytes([NAMES.index(name)]) + content for name, content in examples]


class Fuzzer:
    """Counts what came of every input, and keeps the unexpected."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.file, self.begun, self.seconds = folder / "found.json", time.monotonic(), 60 * minutes
        self.outcomes: Counter[str] = Counter()
        self.unexpected: dict[str, str] = {}

    def one(self, data: bytes) -> None:
        if not data:
            return
        name = NAMES[data[0] % len(NAMES)]
        target, promised = TARGETS[name]
        try:
            target(data[1:])
            self.outcomes[f"{name}: read"] += 1
        except promised:
            self.outcomes[f"{name}: refused"] += 1
        except Exception as error:
            self.outcomes[f"{name}: unexpected"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{name}: {type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
            self.unexpected.setdefault(key, data.hex()[:4000])
        if sum(self.outcomes.values()) % 500 == 0:
            self.write()

    def write(self) -> None:
        minutes = (time.monotonic() - self.begun) / 60
        self.file.write_text(
            json.dumps({"minutes": minutes, "inputs": self.outcomes, "unexpected": self.unexpected}, indent=1)
        )


def main() -> None:
    warnings.simplefilter("ignore")
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else ".trust/fuzz")
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed{number}").write_bytes(seed)
    fuzzer = Fuzzer(folder, minutes)
    fuzzer.write()
    limits = [f"-max_total_time={int(60 * minutes)}", "-max_len=8192", "-rss_limit_mb=4096", "-timeout=20"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, "-print_final_stats=1", "-verbosity=1"], fuzzer.one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
