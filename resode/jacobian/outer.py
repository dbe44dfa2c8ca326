r"""The outer eigenvalues of large Jacobians, sought until every method's limit has settled.

The first exit from a stability region is an outer matter: where no mode grows, the eigenvalue that sets the
limit is the largest of R(ηJ), and Krylov spaces find it first. Two things they cannot know, and both are
said: nothing is certain that was not seen, so a limit is `converged` or not, never certified; and where
modes grow, eigenvalues that barely decay may lie anywhere near the imaginary axis, so that the limit of the
decaying modes is an upper bound for methods, such as Euler, whose region leaves that axis at once.

A small residual alone proves nothing where J is far from normal: pseudo-eigenvalues have one too. So the
eigenvalues that set a limit are checked by both of their eigenvectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.checks import check_number, check_whole
from resode.jacobian.krylov import KrylovSchur, Ritz, outermost
from resode.stability.limits import allowed_growth, first_exits, rays_of
from resode.stability.spectra import ROUNDINGS, FirstExits, Spectrum
from resode.stability.unstable_rays import Complexes, Floats
from resode.tableaus import ButcherTableau

SPACE = 160
"""Vectors of a Krylov space, where memory allows."""

MEMORY = 2**30
"""Bytes that the Krylov spaces of the samples treated together may take."""

_LOOK = 40  # vectors between two looks at the Ritz values
_LOOKS = 6  # without a change, after which Ritz values that might yet move past the limit are let be
_LARGE = 4096  # entries of a state from which reading the basis costs more than a product
_STRIDE = 4
_MARGIN = 4.0  # of a search's errors: a condition number may turn out so much larger with right eigenvectors
_RIGHT = 60  # products for right eigenvectors


@dataclass(frozen=True)
class SpectrumOptions:
    """How eigenvalues are sought.

    Args:
        k: eigenvalues that limit the step, and largest ones, to hold on to where J is not formed.
        rtol: relative accuracy of step limits; None for 1e-6 in float64, 1e-4 in float32.
        budget: products a sample, where J is not formed.
        least: products a sample before a search may end, where more is wanted than what limits a step.
        growth: as in `resode.stability.eigenvalue_step_limit`.
        dense_up_to: entries of a state up to which J is formed.
        search: whether to seek outer eigenvalues first, whatever the size; J is formed, within
            `dense_up_to`, where they do not decide.
        check: whether to check what was found by a search by both eigenvectors, and to warn where limits did
            not converge; without it a search is a quick look.

    Raises:
        ValueError: a number out of range.
    """

    k: int = 6
    rtol: float | None = None
    budget: int = 1200
    growth: tuple[int, float] | None = None
    dense_up_to: int = 1024
    search: bool = False
    check: bool = True
    least: int = 0

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("budget", 1), ("dense_up_to", 0)):
            check_whole(name, getattr(self, name), least=least)
        if self.rtol is not None:
            check_number("rtol", self.rtol, above=0, below=1)
        allowed_growth(self.growth)

    def accuracy(self, eps: float) -> float:
        """The relative accuracy of step limits, of a J in a dtype of this spacing."""
        return self.rtol or (1e-6 if eps <= 2.0**-52 else max(1e-4, 8 * eps))


@dataclass
class Row:
    """What was found of one sample.

    Args:
        values, errors, residuals, conditions: as in `Spectrum`, shape (m,).
        scale: ‖J‖₂, about.
        complete, normal: as in `Spectrum`.
        products: that it took.
        steady: as in `Spectrum`.
        left: left eigenvectors of the values that set a limit, by index, until they are checked.
        known: left eigenvectors of other values, real and imaginary parts, orthonormal, (n, r).
    """

    values: Complexes
    errors: Floats
    residuals: Floats
    conditions: Floats
    scale: float
    complete: bool = False
    normal: bool = False
    products: int = 0
    steady: bool = False
    left: dict[int, Tensor] | None = None
    known: Tensor | None = None


def gathered(
    rows: Sequence[Row], n: int, eps: float, rtol: float, growth: Any, origin: Any = None
) -> Spectrum:
    """One `Spectrum` of single samples, filled up with nan."""
    width = max(len(r.values) for r in rows)

    def padded(name: str) -> Any:
        parts = [getattr(r, name) for r in rows]
        return np.array([np.pad(p, (0, width - len(p)), constant_values=np.nan) for p in parts])

    return Spectrum(
        **{name: padded(name) for name in ("values", "errors", "residuals", "conditions")},
        scale=np.array([r.scale for r in rows]),
        n=n,
        eps=eps,
        shape=(len(rows),),
        origin=origin,
        complete=np.array([r.complete for r in rows]),
        normal=np.array([r.normal for r in rows]),
        steady=np.array([r.steady for r in rows]),
        growth=growth,
        rtol=rtol,
        products=max(r.products for r in rows),
    )


def outer_rows(
    products_of: Callable[[list[int]], Any],
    x: Tensor,
    options: SpectrumOptions,
    tableaus: Sequence[ButcherTableau],
    eps: float,
) -> list[Row]:
    """The outer eigenvalues of each sample, in parts that fit into MEMORY.

    Args:
        products_of: the samples' numbers to an object with `jvp`, `vjp` and `count` for them.
        x: shape (batch, n), of the dtype and on the device that products take.
        options: how they are sought.
        tableaus: the methods whose limits are to settle.
        eps: spacing of J's dtype.
    """
    n, size = x.shape[1], x.element_size()
    space = max(24, min(SPACE, options.budget, n, MEMORY // (n * size)))
    step = max(1, MEMORY // ((space + 24) * n * size))
    found: list[Row] = []
    for first in range(0, len(x), step):
        part = _Part(products_of, x, range(len(x))[first : first + step], options, tableaus, eps)
        found += part.solve(min(space, n))
    return found


class _Part:
    """Samples whose Krylov spaces are in memory together."""

    def __init__(
        self,
        products_of: Callable[[list[int]], Any],
        x: Tensor,
        samples: Sequence[int],
        options: SpectrumOptions,
        tableaus: Sequence[ButcherTableau],
        eps: float,
    ) -> None:
        self.products_of, self.x, self.samples = products_of, x, samples
        self.options, self.tableaus, self.eps, self.rtol = options, tableaus, eps, options.accuracy(eps)
        self.n = x.shape[1]
        self.generator = torch.Generator().manual_seed(22)
        self.found: dict[int, Row] = {}
        self.past: dict[int, list[Floats]] = {sample: [] for sample in samples}  # estimates, one a method
        self.normal = dict.fromkeys(samples, False)

    def _random(self, rows: int) -> Tensor:
        noise = torch.randn(rows, self.n, generator=self.generator, dtype=self.x.dtype)
        return noise.to(self.x.device)

    def solve(self, space: int) -> list[Row]:
        """Every sample's outer eigenvalues, in order, from spaces of so many vectors."""
        active = list(self.samples)
        products = self.products_of(active)
        large = self.n > _LARGE
        krylov = KrylovSchur(products.vjp, self._random(len(active)), space, _STRIDE if large else 1)
        krylov.grow(2 * _LOOK if large else 0)
        if self.options.check:
            self._test_normality(products, active)
        while True:
            krylov.grow(_LOOK)
            self._check_finite(krylov, active)
            ritz = [krylov.ritz(row) for row in range(len(active))]
            spectrum = self._spectrum(ritz, active, krylov.whole, products.count)
            exits = self._look(spectrum, active)
            last = products.count >= self.options.budget or krylov.whole
            enough = np.logical_and.reduce([e.converged & (e.settled | e.hopeless) for e in exits])
            enough &= products.count >= self.options.least
            for row in np.flatnonzero(enough | last):
                self._keep(krylov, active[row], int(row), ritz[row], spectrum, exits)
            left = [row for row, sample in enumerate(active) if sample not in self.found]
            if not left:
                break
            if len(left) < 0.7 * len(active):
                krylov.select(left)
                active, count = [active[row] for row in left], products.count
                products = self.products_of(active)
                products.count = count
                krylov.product = products.vjp
            if krylov.used == krylov.size:
                krylov.cut(2 * (krylov.size // 4), self._wanted)
        if self.options.check:
            self._check_right_eigenvectors(space)
        return [self.found[sample] for sample in self.samples]

    def _check_finite(self, krylov: KrylovSchur, active: list[int]) -> None:
        finite = torch.isfinite(krylov.images[:, : krylov.used]).flatten(1).all(1)
        finite &= torch.isfinite(krylov.largest[:, 0])
        if not finite.all():
            bad = [active[row] for row in torch.nonzero(~finite).flatten().tolist()]
            raise ValueError(
                f"a Jacobian must be finite: products with that of sample {bad[0]} are not ({len(bad)} such "
                "samples here), or too large to be squared. F may have an infinite slope there, as sqrt "
                "at 0, or its derivative may overflow."
            )

    def _test_normality(self, products: Any, active: list[int]) -> None:
        """Whether JJᵀv = JᵀJv for a random v, to rounding: then residuals bound the errors."""
        v = self._random(len(active))
        try:
            one, other = products.jvp(products.vjp(v)), products.vjp(products.jvp(v))
        except RuntimeError:  # without a second derivative there is no Jv
            return
        apart = (one - other).double().norm(dim=1)
        size = 0.5 * (one.double().norm(dim=1) + other.double().norm(dim=1))
        for sample, normal in zip(active, (apart <= 64 * self.eps * size).tolist(), strict=True):
            self.normal[sample] = normal

    def _spectrum(self, ritz: list[Ritz], active: list[int], whole: bool, count: int) -> Spectrum:
        rows = []
        for r, sample in zip(ritz, active, strict=True):
            normal = self.normal[sample]
            with np.errstate(invalid="ignore", over="ignore"):
                factor = np.ones_like(r.conditions) if normal else r.conditions
                errors = factor * (r.residuals + ROUNDINGS * self.eps * r.scale)
            errors = errors if normal or not self.options.check else _MARGIN * errors
            rows.append(Row(r.values, errors, r.residuals, r.conditions, r.scale, whole, normal, count))
        return gathered(rows, self.n, self.eps, self.rtol, self.options.growth)

    def _look(self, spectrum: Spectrum, active: list[int]) -> list[FirstExits]:
        """Every method's exits, after a note of which rows have not changed for long."""
        exits = [FirstExits(spectrum, tableau) for tableau in self.tableaus]
        for row, sample in enumerate(active):
            past, now = self.past[sample], np.array([e.estimate[row] for e in exits])

            def unchanged(looks: int, part: float, past: Any = past, now: Any = now) -> bool:
                before = past[-looks:]
                with np.errstate(invalid="ignore"):
                    return len(before) == looks and all((np.abs(p - now) <= part * now).all() for p in before)

            spectrum.steady[row] = unchanged(_LOOKS, self.rtol)
            if self.normal[sample] and unchanged(2, 0.1 * self.rtol):
                # The edge of a cluster whose members mix: the hull's is found before any of them is.
                for mode in {int(e.mode[row]) for e in exits}:
                    if spectrum.residuals[row, mode] <= 1e-2 * spectrum.scale[row]:
                        spectrum.errors[row, mode] = self.eps * spectrum.scale[row]
            past.append(now)
        return [FirstExits(spectrum, tableau) for tableau in self.tableaus]

    def _wanted(self, row: int, values: Complexes) -> np.ndarray:
        """The order in which eigenvalues are kept when a space is cut back."""
        upper = values.imag >= 0  # each pair once
        k = self.options.k
        large = np.argsort(np.where(upper, -np.abs(values), np.inf), kind="stable")[:k]
        binding: list[int] = []
        for tableau in self.tableaus:  # each has its own; growing modes limit none of them
            rays = rays_of(tableau, self.options.growth)
            exits = np.where(upper & (values.real <= 0), first_exits(rays, values), np.inf)
            binding += exits.argsort(kind="stable")[:k].tolist()
        return np.array(list(dict.fromkeys([*binding, *large, *outermost(values)])))

    def _keep(
        self,
        krylov: KrylovSchur,
        sample: int,
        row: int,
        ritz: Ritz,
        spectrum: Spectrum,
        exits: list[FirstExits],
    ) -> None:
        """One sample's result, and the left eigenvectors of what sets its limits."""
        margin = 1.0 if self.normal[sample] or not self.options.check else _MARGIN
        found = Row(
            ritz.values,
            spectrum.errors[row] / margin,
            ritz.residuals,
            np.ones_like(ritz.conditions) if self.normal[sample] else ritz.conditions.copy(),
            ritz.scale,
            complete=krylov.whole,
            normal=self.normal[sample],
            products=spectrum.products,
            steady=bool(spectrum.steady[row]),
        )
        self.found[sample] = found
        if found.normal or krylov.whole or not self.options.check:
            return
        modes: set[int] = {int(e.mode[row]) for e in exits if np.isfinite(e.estimate[row])}
        modes |= {int(e.fastest[row]) for e in exits if e.unstable[row]}
        found.left = {}
        for i in sorted(modes):
            near: Any = np.abs(ritz.values - ritz.values[i])
            if (near <= 1e3 * krylov.eps * ritz.scale).sum() > 1:
                found.conditions[i] = krylov.condition(row, ritz.values[i])
            else:
                found.left[i] = krylov.vector(row, ritz.vectors[:, [i]])[0]
        # A right eigenvector is orthogonal to every other left one: with those projected out, little is left.
        chosen = ritz.values[list(modes)]
        apart: Any = np.abs(ritz.values[:, None] - np.concatenate([chosen, chosen.conj()]))
        others = (ritz.errors <= 1e-2 * ritz.scale) & (apart > 1e-9 * ritz.scale).all(axis=1)
        others: Any = np.flatnonzero(others & (ritz.values.imag >= 0))
        if len(others):
            v = krylov.vector(row, ritz.vectors[:, others])
            turning = torch.as_tensor(ritz.values[others].imag > 0)
            found.known = torch.linalg.qr(torch.cat([v.real, v.imag[turning]]).T)[0]

    def _check_right_eigenvectors(self, space: int) -> None:
        """Condition numbers 1/|w*v| with right eigenvectors v, from a small Krylov space of J."""
        samples = [sample for sample in self.samples if self.found[sample].left]
        if not samples:
            return
        starts = []
        for sample in samples:
            row = self.found[sample]
            assert row.left is not None
            start = torch.stack([w.real + w.imag for w in row.left.values()]).sum(0)
            if row.known is not None:
                rest = start - row.known @ (row.known.T @ start)
                start = rest if rest.norm() > 1e-6 * start.norm() else start
            starts.append(start / start.norm())
        products = self.products_of(samples)
        start = torch.stack(starts).to(self.x.dtype)
        try:
            krylov = KrylovSchur(products.jvp, start, min(space, _RIGHT))
            ritz: list[Ritz] = []
            while krylov.used < krylov.size:
                krylov.grow(_RIGHT // 3)
                ritz = [krylov.ritz(place) for place in range(len(samples))]
                if all(self._found_right(self.found[s], r) for s, r in zip(samples, ritz, strict=True)):
                    break
        except RuntimeError:  # without a second derivative: what the left space says stands
            return
        for place, (sample, r) in enumerate(zip(samples, ritz, strict=True)):
            row = self.found[sample]
            assert row.left is not None
            for i, w in row.left.items():
                near, condition = self._nearest(row, i, r), np.inf
                if near is not None:
                    v = krylov.vector(place, r.vectors[:, [near]])[0]
                    overlap = float((w * v).sum().abs() / (w.norm() * v.norm()))  # wᵀJ = λwᵀ: no conjugate
                    condition = 1 / overlap if overlap > 2.0**-52 else np.inf
                row.conditions[i] = condition
                rounded = ROUNDINGS * self.eps * row.scale
                row.errors[i] = max(row.errors[i], condition * (row.residuals[i] + rounded))
            row.products += products.count
            row.left = row.known = None

    @staticmethod
    def _nearest(row: Row, i: int, ritz: Ritz, part: float = 0.1) -> int | None:
        """Index of the Ritz value of J that is one of Jᵀ's, found to `part`; None where there is none yet."""
        near = int(np.abs(ritz.values - row.values[i]).argmin())
        found = ritz.residuals[near] <= part * max(abs(row.values[i]), 1e-3 * ritz.scale)
        return near if found else None

    def _found_right(self, row: Row, ritz: Ritz) -> bool:
        """Whether every eigenvalue that sets a limit has its right eigenvector."""
        return all(self._nearest(row, i, ritz, 1e-3) is not None for i in row.left or {})
