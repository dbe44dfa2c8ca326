"""One answer to "which step is safe?": every public way, on networks' blocks and on structured matrices.

    python -m tests.benchmarks.one_answer            # both tables
    python -m tests.benchmarks.one_answer blocks     # 60 blocks × 2 methods × every public way
    python -m tests.benchmarks.one_answer matrices   # 400 structured matrices, dense and matrix-free

A figure must be the truth to 1e-6 in float64 and to 1e-3 in float32, a bound must hold; the truth of a block is
its dense float64 spectrum. Blocks with an eigenvalue within 1e3·τ of the imaginary axis have no sharp limit of
decaying modes and are counted apart. The command ends with an error where something does not hold.

It takes an hour of one core. `--kept FILE` writes each answer there as it comes and does not ask again for those
that are there: a run that was stopped goes on. Ways that form one J to the bit share its eigenvalues.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

import resode
from resode import ResidualStack, profile_depth, step_limit
from resode.analysis import max_stable_step
from resode.analysis.steps.block_limits import block_limits
from resode.analysis.steps.blocks import block_groups
from resode.jacobian.linearize import dense_jacobian
from resode.jacobian.matrices import eigenvalues_with_errors
from resode.jacobian.outer import Row
from resode.jacobian.spectrum import SpectrumOptions, matrix_spectrum, spectrum
from resode.networks import build
from resode.stability import eigenvalue_step_limit
from resode.stability.limits import rounding
from resode.stability.spectra import limits
from resode.training.evaluate import images_of, plain_batches
from resode.training.monitor import StepLimits

SOLVERS = ("euler", "rk4")
ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-3}
TWO_STATES = 512
"""Entries of a state up to which a block is asked at two of them; beyond, at one."""


@dataclass(frozen=True)
class Answer:
    """What one way says of one matrix or block.

    Args:
        kind: of the matrix or block.
        size: rows of J.
        dtype: "float32" or "float64".
        solver: whose step limit it is.
        way: that was asked.
        sure: whether it is said to be exact.
        value: the step limit, or that of the decaying modes.
        truth: what it should be.
        near: whether an eigenvalue lies so near to the imaginary axis that no limit is sharp.
        condition: of the eigenvectors, κ(V); of matrices only.
        exact: the truth where float64's rounding alone counts as 0, times max|λ|; of blocks only.
    """

    kind: str
    size: int
    dtype: str
    solver: str
    way: str
    sure: bool
    value: float
    truth: float
    near: bool
    condition: float = math.nan
    exact: float = 0.0

    @property
    def off(self) -> float:
        """Relative difference from the truth; 0 where both are 0 or infinite."""
        a, b = self.value, self.truth
        return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))

    @property
    def holds(self) -> bool:
        """Whether a figure is the truth, and a bound no less; near the axis to 1e-3, and no step is called 0."""
        if self.near and self.sure and self.value == 0 and self.exact > 1e-5:
            return False
        allowed = 1e-3 if self.near else ALLOWED[getattr(torch, self.dtype)]
        return self.off <= allowed if self.sure else self.value >= self.truth * (1 - allowed)


def asked(
    subjects: Iterable[Any],
    ask: Callable[[Any], list[Answer]],
    count: int,
    seconds: float,
    kept: Path | None,
) -> list[list[Answer]]:
    """The answers about every subject; those that a file keeps are taken from there, by their number."""
    begun, known, found = time.perf_counter(), {}, []
    if kept is not None and kept.exists():
        for line in kept.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            known[record["number"]] = [Answer(**a) for a in record["answers"]]
    for number, subject in enumerate(subjects):
        if len(found) >= count or time.perf_counter() - begun > seconds:
            break
        if number not in known:
            with warnings.catch_warnings(), eigenvalues_once():
                warnings.simplefilter("ignore", RuntimeWarning)
                known[number] = ask(subject)
            if kept is not None:
                with open(kept, "a", encoding="utf-8") as stream:
                    record = {"number": number, "answers": [asdict(a) for a in known[number]]}
                    print(json.dumps(record), file=stream)
        found.append(known[number])
    return found


@contextlib.contextmanager
def eigenvalues_once() -> Iterator[None]:
    """All eigenvalues of a matrix are computed once, whoever asks for them."""
    found: dict[tuple, Row] = {}

    def once(matrix: np.ndarray, eps: float) -> Row:
        key = hashlib.sha256(np.ascontiguousarray(matrix)).hexdigest(), eps
        if key not in found:
            found[key] = eigenvalues_with_errors(matrix, eps)
        return found[key]

    with mock.patch("resode.jacobian.spectrum.eigenvalues_with_errors", once):
        yield


# -- structured matrices -----------------------------------------------------------------------------


@dataclass
class Structured:
    """A matrix with its true limits.

    Args:
        kind: its structure.
        matrix: (n, n), float64.
        eigenvalues: known in closed form; None for those of a dense routine.
        condition: of its eigenvectors, κ(V).
    """

    kind: str
    matrix: np.ndarray
    eigenvalues: np.ndarray | None = None

    @property
    def condition(self) -> float:
        """κ₂ of the eigenvectors, each of length 1."""
        m = self.matrix
        if np.linalg.norm(m @ m.T - m.T @ m) <= 1e-12 * np.linalg.norm(m) ** 2:
            return 1.0
        return float(np.linalg.cond(np.linalg.eig(m)[1]))


def structured(count: int, largest: int = 1000, seed: int = 0) -> Iterator[Structured]:
    """Matrices of order 100 to `largest`, mostly small ones, of ten kinds in turn."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        n = int(100 * (largest / 100) ** (rng.random() ** 4))
        yield KINDS[i % len(KINDS)](n, rng)


def tridiagonal(n: int, rng: np.random.Generator) -> Structured:
    """Toeplitz (a, −2, c), λ = −2 + 2√(ac) cos(kπ/(n+1)); far from normal as a/c is far from 1."""
    a, c = rng.uniform(0.2, 1.3, 2) if rng.random() < 0.5 else (0.6, 0.6 * (1 + 10 / n * rng.random()))
    m = np.diag(np.full(n, -2.0)) + np.diag(np.full(n - 1, c), 1) + np.diag(np.full(n - 1, a), -1)
    return Structured(
        "tridiagonal", m, -2 + 2 * np.sqrt(a * c) * np.cos(np.arange(1, n + 1) * np.pi / (n + 1))
    )


def toeplitz(n: int, rng: np.random.Generator) -> Structured:
    """Symmetric and banded."""
    row = np.zeros(n)
    k = int(rng.integers(2, 6))
    row[:k] = rng.normal(size=k) / k
    return Structured("symmetric Toeplitz", scipy.linalg.toeplitz(row) - 3 * np.eye(n))


def circulant(n: int, rng: np.random.Generator) -> Structured:
    """Normal, λ by the Fourier transform."""
    column = np.zeros(n)
    k = int(rng.integers(2, 6))
    column[:k] = rng.normal(size=k) / k
    column[0] -= 2
    return Structured("circulant", scipy.linalg.circulant(column), np.fft.fft(column))


def permutation(n: int, rng: np.random.Generator) -> Structured:
    """P − I: a circle of eigenvalues through 0."""
    return Structured("permutation", np.eye(n)[rng.permutation(n)] - np.eye(n))


def orthogonal(n: int, rng: np.random.Generator) -> Structured:
    """Q − I, Q orthogonal."""
    return Structured("orthogonal", np.linalg.qr(rng.normal(size=(n, n)))[0] - np.eye(n))


def grcar(n: int, rng: np.random.Generator) -> Structured:
    """Grcar's Toeplitz matrix, shifted to the left: exponentially far from normal."""
    m = np.eye(n) - np.diag(np.ones(n - 1), -1) + sum(np.diag(np.ones(n - k), k) for k in (1, 2, 3))
    return Structured("Grcar", m - rng.uniform(3, 5) * np.eye(n))


def companion(n: int, rng: np.random.Generator) -> Structured:
    """Of xⁿ − c, moved to the left: λ + 2 on a circle."""
    c = rng.uniform(0.5, 1.5)
    m = np.diag(np.ones(n - 1), -1)
    m[0, -1] = c
    roots = c ** (1 / n) * np.exp(2j * np.pi * np.arange(n) / n)
    return Structured("companion", m - 2 * np.eye(n), roots - 2)


def jordan(n: int, rng: np.random.Generator) -> Structured:
    """A Jordan block of −½ or less, in turned coordinates in every other case."""
    value = -rng.uniform(0.5, 2)
    m = value * np.eye(n) + np.diag(np.ones(n - 1), 1)
    if rng.random() < 0.5:
        q = np.linalg.qr(rng.normal(size=(n, n)))[0]
        m = q @ m @ q.T
    return Structured("Jordan", m, np.full(n, value))


def triangular(n: int, rng: np.random.Generator) -> Structured:
    """Eigenvalues on the diagonal, couplings from weak to strong."""
    values = -np.linspace(0.5, rng.uniform(1, 3), n)
    m = np.triu(rng.normal(size=(n, n)), 1) * 10 ** rng.uniform(-4, 0) / math.sqrt(n)
    return Structured("triangular", m + np.diag(values), values)


def random_shifted(n: int, rng: np.random.Generator) -> Structured:
    """Normal random entries, moved to the left of the axis."""
    return Structured("random", rng.normal(size=(n, n)) / math.sqrt(n) - 1.5 * np.eye(n))


KINDS = (tridiagonal, toeplitz, circulant, permutation, orthogonal, grcar, companion, jordan, triangular)
KINDS += (random_shifted,)


def ask_matrix(m: Structured) -> list[Answer]:
    """Dense and matrix-free, in both dtypes, under both methods."""
    values = np.linalg.eigvals(m.matrix) if m.eigenvalues is None else m.eigenvalues
    condition, answers = m.condition, []
    for dtype in ALLOWED:
        j = torch.as_tensor(m.matrix, dtype=dtype)
        x = torch.zeros(1, len(j), dtype=dtype)
        tau = rounding(len(j), torch.finfo(dtype).eps) * np.abs(values).max()
        near = bool(np.abs(values.real)[np.abs(values) > tau].min(initial=np.inf) <= 1e3 * tau)
        spectra = {  # of which step_limit takes its figures
            "dense": matrix_spectrum(j),
            "matrix-free": spectrum(lambda x, j=j: x @ j.T, x, SpectrumOptions(search=True), SOLVERS),
        }
        for solver in SOLVERS:
            truth = float(eigenvalue_step_limit(values, solver, tolerance=tau).step)
            for way, found in spectra.items():
                limit = limits(found, solver)
                sure = bool(np.all(np.asarray(limit.converged)))
                step = float(np.ravel(limit.step)[0])
                name = str(dtype)[6:]
                answers.append(Answer(m.kind, len(j), name, solver, way, sure, step, truth, near, condition))
    return answers


def matrices(count: int, seconds: float = 1e9, largest: int = 1000, kept: Path | None = None) -> int:
    """Print a table of structured matrices; the number of failures."""
    begun, wrong = time.perf_counter(), 0
    found = asked(structured(count, largest), ask_matrix, count, seconds, kept)
    every = [answer for answers in found for answer in answers]
    for a in every:
        if a.sure and a.off > 1e-3:
            wrong += 1
            print(f"wrong: {a}")
        elif not a.sure and a.condition < 1e3 and not a.near:
            print(f"open: {a}")
    sizes = sorted(answers[0].size for answers in found)
    print(f"\n{len(found)} matrices of order {sizes[0]} to {sizes[-1]}, {time.perf_counter() - begun:.0f} s")
    print("| kind | κ(V) | answers | converged | off at most, float64 | float32 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind in dict.fromkeys(a.kind for a in every):
        own = [a for a in every if a.kind == kind]
        conditions = [a.condition for a in own]
        worst = [
            max((a.off for a in own if a.sure and a.dtype == str(dtype)[6:]), default=0.0)
            for dtype in ALLOWED
        ]
        print(
            f"| {kind} | {min(conditions):.1e} to {max(conditions):.1e} | {len(own)} | "
            f"{sum(a.sure for a in own)} | {worst[0]:.1e} | {worst[1]:.1e} |"
        )
    sharp = [a for a in every if a.sure or not a.near]  # the others have no sharp limit
    normal = [a.sure for a in sharp if a.condition <= 1 + 1e-6]
    good = [a.sure for a in sharp if a.condition < 1e3]
    print(f"normal: {sum(normal)} of {len(normal)} converged; κ(V) < 1e3: {sum(good)} of {len(good)}")
    return wrong + (sum(normal) < len(normal)) + (sum(good) < 0.9 * len(good))


# -- blocks of networks ------------------------------------------------------------------------------


@dataclass
class Block:
    """A field and states to linearize it at.

    Args:
        kind: where it comes from.
        field: F, in float32 and evaluation mode.
        x: states, shape (2, *state).
    """

    kind: str
    field: nn.Module
    x: Tensor


class Attention(nn.Module):
    """Two heads of self-attention over a short sequence, behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.attend(y, y, y, need_weights=False)[0]


class Skewed(nn.Module):
    """D F(D⁻¹x): F's eigenvalues, far from normal."""

    scale: Tensor

    def __init__(self, field: nn.Module, channels: int, decades: float) -> None:
        super().__init__()
        self.field = field
        self.register_buffer("scale", torch.logspace(0, decades, channels)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.field(x / self.scale)


class Symmetric(nn.Module):
    """−Wᵀ tanh(Wx): a symmetric Jacobian."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.tanh(x @ self.weight.T) @ self.weight


def blocks() -> Iterator[Block]:
    """Sixty of them: convolutional ones fresh, trained and with weights × 3, dense ones, attention.

    Of width 8 where the states are images of 8 pixels; those of 10 and 16 pixels, of width 16 and 8 and up to
    2,048 entries, come last.
    """
    torch.manual_seed(0)
    large = []
    for name in ("odenet20", "preact20"):
        digits, images = trained(name)
        fresh, wide = (build(name, in_channels=1, width=width).eval() for width in (8, 16))
        for kind, network, size in (
            ("fresh", fresh, 8),
            ("trained", digits, 8),
            ("weights × 3", tripled(fresh), 8),
        ):
            x = images if kind == "trained" else torch.randn(2, 1, size, size)
            yield from _blocks_of(f"{name} {kind}, {size} px", network, x)
        large += list(_blocks_of(f"{name} fresh, 10 px", wide, torch.randn(2, 1, 10, 10)))[1:2]
        large += list(_blocks_of(f"{name} weights × 3, 16 px", tripled(fresh), torch.randn(2, 1, 16, 16)))[
            2:5
        ]
    for width in (32, 128):
        layers = [nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)]
        yield Block("dense", nn.Sequential(*layers).eval(), torch.randn(2, width))
        yield Block("dense, symmetric", Symmetric(width), torch.randn(2, width))
        yield Block("attention", Attention(width).eval(), torch.randn(2, 6, width))
    for decades in (0.5, 1.0, 2.0, 3.0):
        inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1))
        yield Block(f"skewed by {10**decades:.3g}", Skewed(inner, 8, decades).eval(), torch.randn(2, 8, 6, 6))
    yield from sorted(large, key=lambda block: block.x[0].numel())


def tripled(network: nn.Module) -> nn.Module:
    """A copy of it with three times the weights, gains and biases left."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(3 if weight.ndim > 1 else 1)
    return other


def trained(name: str) -> tuple[nn.Module, Tensor]:
    """A network of width 8 trained on the digits for a few seconds, and two of its test images."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"width": 8}
        run = resode.train(
            name, "digits", epochs=3, seed=0, model_options=options, run_dir=f"{folder}/run", progress=False
        )
        return run.network.eval(), next(iter(plain_batches(images_of(run.path), limit=2)))[0]


def _blocks_of(kind: str, network: nn.Module, images: Tensor) -> Iterator[Block]:
    for group in block_groups(network, images):
        for field, x in zip(group.fields, group.states, strict=True):
            yield Block(kind, field, x)


def every_way(field: nn.Module, x: Tensor, solver: str) -> dict[str, tuple[float, bool, float, bool]]:
    """(step, whether it is exact, limit of decaying modes, whether exact), the least over the samples."""

    def least(limit) -> tuple[float, bool, float, bool]:
        return (
            float(limit.step.min()),
            bool(limit.converged.all()),
            float(limit.decaying_step.min()),
            bool(limit.decaying_converged.all()),
        )

    found = {}
    for way, free in (("dense", False), ("matrix-free", True), ("default", None)):
        if free is False and x[0].numel() > 2048:
            continue
        found[f"step_limit, {way}"] = least(step_limit(field, x, solver=solver, matrix_free=free))
    step = float(max_stable_step(field, x, solver=solver).min())
    found["max_stable_step"] = (step, found["step_limit, default"][1], math.nan, True)
    network = ResidualStack([field], solver=solver).eval()
    row = profile_depth(network, x, solver=solver, spectra=len(x), lesions=False).rows[0]
    found["profile_depth"] = (
        row.step_limit,
        row.converged or row.step_limit == 0,
        row.decaying_step,
        row.exact,
    )
    line = next(block_limits(network, x, [solver])).rows[0]
    found["block_limits"] = (line.step, line.converged, line.decaying_step, line.exact)
    callback = StepLimits(x, solvers=[solver], samples=len(x))
    callback.record(network, 0)
    record = callback.records[0]
    found["callback"] = (math.nan, True, record.decaying_step, record.exact)
    return found


def ask_block(block: Block) -> list[Answer]:
    """Every way, in both dtypes, under both methods: the step limit, and that of the decaying modes."""
    answers = []
    states = block.x[: 2 if block.x[0].numel() <= TWO_STATES else 1]
    exact = copy.deepcopy(block.field).double()
    values = np.linalg.eigvals(dense_jacobian(exact, states.double()).numpy())
    largest = np.abs(values).max(axis=1)
    tau = rounding(values.shape[1], torch.finfo(torch.float64).eps) * largest
    for dtype in ALLOWED:
        near = 1e3 * rounding(values.shape[1], torch.finfo(dtype).eps) * largest
        live = np.abs(values) > near[:, None]  # what counts as 0 limits nothing
        apart = bool((live & (np.abs(values.real) <= near[:, None])).any())
        field, x = (exact, states.double()) if dtype == torch.float64 else (block.field, states)
        for solver in SOLVERS:
            true = eigenvalue_step_limit(values, solver, tolerance=near[:, None] / 1e3)
            sharp = eigenvalue_step_limit(values, solver, tolerance=tau[:, None])
            truths = float(np.min(true.step)), float(np.min(true.decaying_step))
            exact_ones = [float(np.min(s * largest)) for s in (sharp.step, sharp.decaying_step)]
            for way, (step, sure, slow, slow_sure) in every_way(field, x, solver).items():
                given = ((way, sure, step), (f"{way}, decaying", slow_sure, slow))
                for said, truth, known in zip(given, truths, exact_ones, strict=True):
                    answer = Answer(block.kind, values.shape[1], str(dtype)[6:], solver, *said, truth, apart)
                    if not math.isnan(answer.value):
                        answers.append(replace(answer, exact=known))
    return answers


def compare(count: int, seconds: float = 1e9, largest: int = 2048, kept: Path | None = None) -> int:
    """Print a table of blocks; the number of failures."""
    begun, wrong = time.perf_counter(), 0
    some = (block for block in blocks() if block.x[0].numel() <= largest)
    found = asked(some, ask_block, count, seconds, kept)
    rows: dict[tuple, list[int]] = defaultdict(lambda: [0] * 4)
    for a in (answer for answers in found for answer in answers):
        row = rows[a.way, a.dtype, "near the axis" if a.near else "sharp"]
        row[0] += 1
        row[1] += a.sure
        row[2 if a.sure else 3] += not a.holds
        if not a.holds:
            wrong += 1
            print(f"wrong: {a}")
    sizes = sorted(answers[0].size for answers in found)
    print(f"\n{len(found)} blocks of {sizes[0]} to {sizes[-1]} rows, {time.perf_counter() - begun:.0f} s")
    print("| way | dtype | blocks | answers | of which figures | wrong figures | wrong bounds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (way, dtype, kind), (answers, figures, bad, bad_bounds) in sorted(rows.items()):
        print(f"| {way} | {dtype} | {kind} | {answers} | {figures} | {bad} | {bad_bounds} |")
    return wrong


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("blocks", "matrices"))
    parser.add_argument("--count", type=int, help="at most; 60 blocks, 400 matrices")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop each table after so many")
    parser.add_argument("--largest", type=int, help="entries of a state, rows of a matrix")
    parser.add_argument("--kept", type=Path, help="a file of answers for each table, by its first name")
    given = parser.parse_args()
    wrong, kept = 0, given.kept
    if given.what != "matrices":
        own = kept and kept.with_name(f"{kept.name}-blocks.jsonl")
        wrong += compare(given.count or 60, given.seconds, given.largest or 2048, own)
    if given.what != "blocks":
        own = kept and kept.with_name(f"{kept.name}-matrices.jsonl")
        wrong += matrices(given.count or 400, given.seconds, given.largest or 1000, kept=own)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
