r"""Which stages of a tableau are to be solved for together.

A is block lower triangular. A block of one stage without diagonal entry is explicit, one with it a stage of
a diagonally implicit method, and a fully implicit method is one block. With A_b the block on the diagonal and
A_b = V Λ V⁻¹, the linear systems of Newton's method fall apart into one of the state's size for every
eigenvalue λ of A_b,

    (I − h A_b ⊗ J)⁻¹ = (V ⊗ I) diag((I − hλJ)⁻¹) (V⁻¹ ⊗ I),

of which one of every complex pair is enough: the result is real.

Source:
    Butcher, BIT 16 (1976); Hairer & Wanner, Solving Ordinary Differential Equations II, IV.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from resode.tableaus import ButcherTableau, Row

_WORST = 1e6  # condition number of V beyond which eigenvectors do not serve


@dataclass(frozen=True, eq=False)
class StageBlock:
    """Stages first … stop − 1 of a tableau.

    Attributes:
        first: the first stage.
        stop: the one after the last.
        a: A_b, (m, m).
        before: of every stage, its coefficients on the stages before the block.
        eigenvalues: λ of A_b, (l,): the real ones, and those with positive imaginary part.
        to_modes: rows of V⁻¹ for them, (l, m).
        to_stages: columns of V, (m, l), doubled where they stand for a pair.
        predictor: weights of the stages before it that extrapolate a single implicit stage.
    """

    first: int
    stop: int
    a: np.ndarray
    before: tuple[Row, ...]
    eigenvalues: Any
    to_modes: np.ndarray
    to_stages: np.ndarray
    predictor: Row

    @property
    def is_explicit(self) -> bool:
        """Whether the stage needs the stages before it alone."""
        return len(self.a) == 1 and bool(self.a[0, 0] == 0)

    @property
    def filter(self) -> float:
        """The real eigenvalue that is largest, 0 without one."""
        real = self.eigenvalues.real[self.eigenvalues.imag == 0]
        return float(real.max(initial=0.0))


@lru_cache(maxsize=256)
def stage_blocks(tableau: ButcherTableau) -> tuple[StageBlock, ...]:
    """The smallest blocks that A falls into, in order.

    Raises:
        ValueError: a block whose eigenvectors do not span its space; no published method has one.

    Example:
        >>> from resode.tableaus import METHODS
        >>> [(b.first, b.stop, b.is_explicit) for b in stage_blocks(METHODS["trapezoid"])]
        [(0, 1, True), (1, 2, False)]
        >>> [len(b.eigenvalues) for b in stage_blocks(METHODS["radau5"])]
        [2]
    """
    a = np.array(tableau.a, dtype=float)
    blocks, first = [], 0
    while first < len(a):
        stop = first + 1
        while a[first:stop, stop:].any():  # a stage of the block that needs a later one
            stop += 1
        blocks.append(_block(tableau, a, first, stop))
        first = stop
    return tuple(blocks)


def _block(tableau: ButcherTableau, a: np.ndarray, first: int, stop: int) -> StageBlock:
    own = a[first:stop, first:stop]
    values: Any
    vectors: Any
    values, vectors = np.linalg.eig(own)
    if np.linalg.cond(vectors) > _WORST:
        raise ValueError(
            f"tableau {tableau.name!r}: stages {first} to {stop - 1} are solved for together by the "
            "eigenvectors of their block of A, which has too few."
        )
    values = np.where(abs(values.imag) < 1e-12 * abs(values), values.real, values)
    one_of_each = values.imag >= 0
    before = tuple(tuple((j, float(a[i, j])) for j in range(first) if a[i, j]) for i in range(first, stop))
    double = np.where(values.imag > 0, 2.0, 1.0)
    parts = (values, np.linalg.inv(vectors).T, vectors * double)
    values, to_modes, to_stages = (part[..., one_of_each] for part in parts)
    if not values.imag.any():
        values, to_modes, to_stages = values.real, to_modes.real, to_stages.real
    predictor = _extrapolation(tableau.stage_times, first) if stop - first == 1 else ()
    return StageBlock(first, stop, own, before, values, to_modes.T, to_stages, predictor)


def lagrange(nodes: Sequence[float], at: Any) -> list[list[Any]]:
    """Weights of the values at some nodes in the polynomial through them, at each of some points."""
    weights = []
    for x in at:
        row = [x * 0 + 1 for _ in nodes]
        for j, r in enumerate(nodes):
            for s in nodes:
                if s != r:
                    row[j] = row[j] * (x - s) / (r - s)
        weights.append(row)
    return weights


def _extrapolation(times: tuple[float, ...], stage: int) -> Row:
    """A stage from those before it: the last one at the same time, or a parabola through three of them."""
    same = [j for j in range(stage) if abs(times[j] - times[stage]) < 1e-12]
    if same:
        return ((same[-1], 1.0),)
    chosen: list[int] = []
    for j in range(stage):
        if all(abs(times[j] - times[i]) > 1e-3 for i in chosen) and len(chosen) < 3:
            chosen.append(j)
    (weights,) = lagrange([times[j] for j in chosen], [times[stage]])
    return tuple(zip(chosen, map(float, weights), strict=True))
