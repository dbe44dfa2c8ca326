r"""Step limits of fields with large states: from the outer spectrum, checked on the step map R(ηJ) itself.

The first exit from a stability region is an outer matter: where no mode grows, the eigenvalue that sets the
limit is the largest of R(ηJ), and Krylov spaces find it first. Two things they cannot know, and both are
said: nothing is certain that was not seen, so a limit is `converged` or not, never certified; and where many
modes grow, eigenvalues that barely decay may lie anywhere near the imaginary axis, so that the limit of the
decaying modes is an upper bound for methods, such as Euler, whose region leaves that axis at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from resode.analysis.steps.contraction import apply, contraction_steps_of, logarithmic_norms_of
from resode.analysis.steps.outlook import DEFLATED, Judge, Outlook, rough_exits, rounding
from resode.checks import warn_user
from resode.jacobian.krylov import KrylovSchur, Ritz, outermost
from resode.jacobian.linearize import Field
from resode.jacobian.matrices import DENSE_LIMIT, check_precision
from resode.jacobian.products import Products, full_precision
from resode.stability import eigenvalue_step_limit
from resode.stability.limits import StepLimit, like
from resode.stability.rays import Complexes, Floats
from resode.tableaus import METHODS, ButcherTableau

SPACE = 160
"""Vectors of a Krylov space, where memory allows."""

MEMORY = 2**30
"""Bytes that the Krylov spaces of the samples treated together may take."""

BUDGET = 1200
"""Products a sample before it is given up."""

_LOOK = 40  # vectors between two looks at the Ritz values
_LARGE = 4096  # entries of a state from which reading the basis costs more than a product
_STRIDE = 4
_MARGIN = 1e-2  # relative distance from the limit at which the step map is checked
_POWERS = 16  # of the step map, before its own Ritz values are looked at
_STEPS = 8
_AMPLE = 100.0  # times 1/‖J‖: more than any method's contraction limit
_RIGHT = 40  # products for a right eigenvector


@dataclass
class Spectrum:
    """The outer spectrum of one sample, and every method's limit.

    Args:
        ritz: the last Ritz values.
        outlooks: one a method.
        residual: ‖wᵀJ − λwᵀ‖₂ of the limiting eigenvalue and its unit left eigenvector, one a method.
        condition: 1/|w*v| of it, one a method; nan where not asked for.
        products: with J or its transpose.
    """

    ritz: Ritz
    outlooks: list[Outlook]
    residual: list[float]
    condition: list[float]
    products: int

    @property
    def trusted(self) -> Complexes:
        """The Ritz values that have converged to a thousandth of the largest."""
        return self.ritz.values[self.ritz.errors <= 1e-3 * self.ritz.scale]


def outer_spectra(
    field: Field,
    x: Tensor,
    tableaus: Sequence[ButcherTableau],
    *,
    k: int = 6,
    rtol: float | None = None,
    budget: int = BUDGET,
    growth: tuple[int, float] | None = None,
    conditions: bool = False,
    verify: bool = True,
    warn: bool = True,
) -> list[Spectrum]:
    """The outer spectrum of each sample, sought until every method's limit has settled.

    Args:
        field: as checked by `check_field`.
        x: states, shape (batch, *state); taken in parts that fit into MEMORY.
        tableaus: explicit methods.
        k: eigenvalues that limit the step, and largest ones, to keep when a space is cut back.
        rtol: relative accuracy of the limits; None for 1e-6 in float64 and 1e-4 in float32.
        budget: products a sample; a warning tells of samples that did not converge within it.
        growth: as in `eigenvalue_step_limit`.
        conditions: whether to find the right eigenvectors, for the condition numbers.
        verify: whether to check the limits on the step map.
        warn: whether to warn of samples that did not converge.

    Raises:
        ValueError: a method is implicit, x's dtype too coarse, or J not finite.
    """
    for tableau in tableaus:
        if not tableau.explicit:
            names = ", ".join(name for name, t in METHODS.items() if t.explicit)
            raise ValueError(
                f"without the Jacobian, limits are checked on the step map, and {tableau.name} is implicit: "
                f"its map solves equations. Valid: {names}; or take states of up to {DENSE_LIMIT} entries "
                "and matrix_free=False."
            )
    if rtol is None:
        rtol = 1e-6 if x.dtype == torch.float64 else 1e-4
    wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    n = x[0].numel()
    eps = torch.finfo(x.dtype).eps
    check_precision(rounding(n, eps), n, eps)
    size_of = 8 if wide == torch.float64 else 4
    space = max(24, min(SPACE, budget, n, MEMORY // (n * size_of)))
    rows = max(1, MEMORY // ((space + 24) * n * size_of))
    found: list[Spectrum] = []
    with full_precision():
        for first in range(0, len(x), rows):
            here = x[first : first + rows]
            part = _Part(field, here, first, tableaus, space, wide, k, rtol, growth, conditions, verify)
            found += part.solve(budget)
    lost = sum(not all(o.converged for o in s.outlooks) for s in found)
    if lost and warn:
        warn_user(
            f"no convergence within {budget} products in {lost} of {len(found)} samples: their step limits "
            "are upper bounds, from the eigenvalues found. Raise budget= or rtol=.",
            RuntimeWarning,
        )
    return found


class _Part:
    """Samples whose Krylov spaces are in memory together."""

    def __init__(
        self,
        field: Field,
        x: Tensor,
        first: int,
        tableaus: Sequence[ButcherTableau],
        space: int,
        wide: torch.dtype,
        k: int,
        rtol: float,
        growth: tuple[int, float] | None,
        conditions: bool,
        verify: bool,
    ) -> None:
        self.first = first  # its first sample's number in the batch
        self.conditions, self.verify = conditions, verify
        self.pairs: dict[int, list[tuple[Tensor, Tensor] | None]] = {}
        self.field, self.x, self.tableaus = field, x, tableaus
        self.k, self.rtol = k, rtol
        self.n = x[0].numel()
        self.judge = Judge(self.n, torch.finfo(x.dtype).eps, rtol, growth, patient=self.n <= space)
        self.space = space
        self.wide = wide
        self.generator = torch.Generator().manual_seed(22)
        self.found: dict[int, Spectrum] = {}

    def _random(self, rows: int) -> Tensor:
        noise = torch.randn(rows, self.n, generator=self.generator, dtype=self.wide)
        return noise.to(self.x.device)

    def solve(self, budget: int) -> list[Spectrum]:
        """Every sample's spectrum, in order."""
        active = list(range(len(self.x)))
        products = Products(self.field, self.x)
        large = self.n > _LARGE
        start = self._random(len(active))
        krylov = KrylovSchur(products.transposed, start, self.space, _STRIDE if large else 1)
        before: dict[tuple[int, int], list[float]] = {}
        krylov.grow(2 * _LOOK if large else 0)
        while True:
            krylov.grow(_LOOK)
            self._check_finite(krylov, active)
            ritz = [krylov.ritz(row) for row in range(len(active))]
            outlooks = [
                self._look(r, sample, before, krylov.whole) for r, sample in zip(ritz, active, strict=True)
            ]
            last = products.count >= budget or krylov.whole
            ready = [row for row, some in enumerate(outlooks) if last or all(self._enough(o) for o in some)]
            if ready and self.verify:
                self._verify(krylov, active, ritz, outlooks, ready)
            for row in ready:
                if last or all(self._enough(o) for o in outlooks[row]):
                    self._keep(krylov, active[row], row, ritz[row], outlooks[row], products.count)
            left = [row for row, sample in enumerate(active) if sample not in self.found]
            if not left:
                break
            if len(left) < 0.7 * len(active):
                krylov.select(left)
                ritz, active = [ritz[row] for row in left], [active[row] for row in left]
                count = products.count
                products = Products(self.field, self.x[active])
                products.count = count
                krylov.product = products.transposed
            if krylov.used == krylov.size:
                krylov.cut(2 * (krylov.size // 4), self._wanted)
        found = [self.found[sample] for sample in range(len(self.x))]
        if self.conditions:
            self._right_eigenvectors()
        return found

    def _check_finite(self, krylov: KrylovSchur, active: list[int]) -> None:
        finite = torch.isfinite(krylov.images[:, : krylov.used]).flatten(1).all(1)
        if not finite.all():
            bad = [active[row] for row in torch.nonzero(~finite).flatten().tolist()]
            raise ValueError(
                f"a Jacobian must be finite: products with that of sample {self.first + bad[0]} are not "
                f"({len(bad)} such samples here). F may have an infinite slope there, as sqrt at 0, or its "
                "derivative may overflow."
            )

    @staticmethod
    def _enough(outlook: Outlook) -> bool:
        """Whether nothing is left to seek."""
        return outlook.converged and (outlook.settled or outlook.hopeless)

    def _wanted(self, row: int, values: Complexes) -> np.ndarray:
        """The order in which eigenvalues are kept when a space is cut back."""
        upper = values.imag >= 0  # each pair once
        large = np.argsort(np.where(upper, -np.abs(values), np.inf), kind="stable")[: self.k]
        binding: list[int] = []
        for tableau in self.tableaus:  # each has its own; growing modes limit none of them
            exits = np.where(upper & (values.real <= 0), rough_exits(values, tableau), np.inf)
            binding += exits.argsort(kind="stable")[: self.k].tolist()
        order = outermost(values)
        return np.array(list(dict.fromkeys([*binding, *large, *order])))

    def _look(
        self, ritz: Ritz, sample: int, before: dict[tuple[int, int], list[float]], whole: bool
    ) -> list[Outlook]:
        """What the Ritz values say of every method."""
        found = []
        for number, tableau in enumerate(self.tableaus):
            past = before.setdefault((sample, number), [])
            outlook = self.judge.outlook(ritz, tableau, past, whole)
            past.append(outlook.estimate)
            found.append(outlook)
        return found

    def _keep(
        self, krylov: KrylovSchur, sample: int, row: int, ritz: Ritz, outlooks: list[Outlook], count: int
    ) -> None:
        indices = [o.fastest if o.fastest >= 0 else o.mode for o in outlooks]
        residual = [float(ritz.residuals[i]) if i >= 0 else float("nan") for i in indices]
        estimates = [float(ritz.conditions[i]) if i >= 0 else float("nan") for i in indices]
        several = [
            i >= 0 and (np.abs(ritz.values - ritz.values[i]) <= 1e3 * krylov.eps * ritz.scale).sum() > 1
            for i in indices
        ]
        for place, i in enumerate(indices):
            if several[place]:
                estimates[place] = krylov.condition(row, ritz.values[i])
        self.found[sample] = Spectrum(ritz, outlooks, residual, estimates, count)
        if self.conditions:
            self.pairs[sample] = [
                None if i < 0 or more else self._pair(krylov, row, ritz, i)
                for i, more in zip(indices, several, strict=True)
            ]

    def _pair(self, krylov: KrylovSchur, row: int, ritz: Ritz, index: int) -> tuple[Tensor, Tensor]:
        """The left eigenvector, and a vector near the right one.

        The right eigenvector is orthogonal to every other left one. With those that are known projected
        out, little is left for a Krylov space of J to do.
        """
        w = krylov.vector(row, ritz.vectors[:, [index]])[0]
        value = ritz.values[index]
        own = np.minimum(abs(ritz.values - value), abs(ritz.values - value.conj())) <= 1e-9 * ritz.scale
        others = np.flatnonzero((ritz.errors <= 1e-2 * ritz.scale) & ~own & (ritz.values.imag >= 0))
        start = w.real + w.imag
        if len(others):
            v = krylov.vector(row, ritz.vectors[:, others])
            q, _ = torch.linalg.qr(
                torch.cat([v.real, v.imag[torch.as_tensor(ritz.values[others].imag > 0)]]).T
            )
            rest = start - q @ (q.T @ start)
            start = rest if rest.norm() > 1e-6 * start.norm() else start
        return w, start / start.norm()

    def _verify(
        self,
        krylov: KrylovSchur,
        active: list[int],
        ritz: list[Ritz],
        outlooks: list[list[Outlook]],
        ready: list[int],
    ) -> None:
        """Check the limits of the rows that are ready on the step map, just below and just above."""
        for number, tableau in enumerate(self.tableaus):
            some = {row: outlooks[row][number] for row in ready}
            rows = [
                r for r, o in some.items() if o.error <= self.rtol and 0 < o.decaying < np.inf and o.mode >= 0
            ]
            if not rows:
                continue
            products = Products(self.field, self.x[[active[row] for row in rows]])
            vectors = torch.cat(
                [
                    krylov.vector(r, ritz[r].vectors[:, [some[r].mode]]).to(self.wide.to_complex())
                    for r in rows
                ]
            )
            eta = torch.tensor([[some[r].decaying] for r in rows], dtype=torch.float64, device=self.x.device)
            below, above = (
                self._factor(products, tableau, eta * factor, vectors)
                for factor in (1 - _MARGIN, 1 + _MARGIN)
            )
            bound = float(self.judge.bound) ** 0.5
            bad = set()
            for i, row in enumerate(rows):
                noise = ritz[row].errors[some[row].mode] * some[row].decaying
                noise += 1e3 * torch.finfo(self.x.dtype).eps
                if below[i] > bound + noise or above[i] < bound - noise:
                    bad.add(row)
            alone = [row for row in rows if len(some[row].modes) <= DEFLATED]
            if alone:
                bad |= self._others(krylov, active, ritz, outlooks, number, alone, bound)
            for row in bad:
                some[row].settled = False
                if some[row].fastest < 0:
                    some[row].converged = False

    @staticmethod
    def _factor(products: Products, tableau: ButcherTableau, eta: Tensor, vectors: Tensor) -> Floats:
        """|v*R(ηJ)v| / v*v of every row."""
        image = apply(products.transposed, tableau, eta, vectors)
        quotient = (vectors.conj() * image).sum(1) / (vectors.conj() * vectors).sum(1).real
        return quotient.abs().double().cpu().numpy()

    def _others(
        self,
        krylov: KrylovSchur,
        active: list[int],
        ritz: list[Ritz],
        outlooks: list[list[Outlook]],
        number: int,
        rows: list[int],
        bound: float,
    ) -> set[int]:
        """Rows in which some mode beside the growing ones is amplified by the step map just below the limit.

        A fresh random vector goes through the map many times, and a small Krylov space of the map says what
        has come out on top.
        """
        tableau = self.tableaus[number]
        products = Products(self.field, self.x[[active[row] for row in rows]])
        steps = [[(1 - _MARGIN) * outlooks[row][number].decaying] for row in rows]
        eta = torch.tensor(steps, dtype=torch.float64, device=self.x.device)
        growing: dict[int, Tensor] = {}
        for i, row in enumerate(rows):
            modes = outlooks[row][number].modes
            if len(modes):
                v = krylov.vector(row, ritz[row].vectors[:, modes])
                u, sizes, _ = torch.linalg.svd(torch.cat([v.real, v.imag]).T, full_matrices=False)
                growing[i] = u[:, sizes > 1e-8 * sizes[0]].to(self.wide)

        def without(v: Tensor) -> Tensor:
            for i, q in growing.items():
                v[i] -= q @ (q.T @ v[i])
            return v

        def mapped(v: Tensor) -> Tensor:
            return without(apply(products.transposed, tableau, eta, v))

        v = without(self._random(len(rows)))
        for _ in range(_POWERS):
            v = mapped(v)
            v = v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.wide).tiny)
        small = KrylovSchur(mapped, v, _STEPS)
        small.grow(_STEPS)
        found = [small.ritz(i) for i in range(len(rows))]
        return {
            row
            for row, r in zip(rows, found, strict=True)
            if (np.abs(r.values) - np.minimum(r.errors, 10 * r.residuals) > bound + 1e-3).any()
        }

    def _right_eigenvectors(self) -> None:
        """1/|w*v| by right eigenvectors v, each from a small Krylov space of J."""
        for number in range(len(self.tableaus)):
            pairs = [self.pairs[sample][number] for sample in range(len(self.x))]
            noise = self._random(1)[0]
            products = Products(self.field, self.x)
            start = torch.stack([noise if pair is None else pair[1].to(self.wide) for pair in pairs])
            krylov = KrylovSchur(products.forward, start, min(self.space, _RIGHT))
            krylov.grow(krylov.size)
            for sample, pair in enumerate(pairs):
                spectrum = self.found[sample]
                o = spectrum.outlooks[number]
                if pair is None:
                    continue
                value = spectrum.ritz.values[o.fastest if o.fastest >= 0 else o.mode]
                ritz = krylov.ritz(sample)
                near = int(np.abs(ritz.values - value).argmin())
                if ritz.residuals[near] > 0.1 * max(abs(value), 1e-3 * ritz.scale):
                    continue
                v = krylov.vector(sample, ritz.vectors[:, [near]])[0]
                w = pair[0]
                overlap = float((w * v).sum().abs() / (w.norm() * v.norm()))  # wᵀJ = λwᵀ: no conjugate
                spectrum.condition[number] = 1 / overlap if overlap > 2.0**-52 else float("inf")


def field_limit(
    field: Field,
    x: Tensor,
    tableau: ButcherTableau,
    *,
    k: int,
    growth: tuple[int, float] | None,
    rtol: float | None,
    budget: int,
    details: bool,
) -> StepLimit:
    """The step limit of a checked field at each state of x, without its Jacobian."""
    spectra = outer_spectra(
        field, x, [tableau], k=k, growth=growth, rtol=rtol, budget=budget, conditions=details
    )
    limit = limit_of(spectra, 0, tableau, x, growth)
    if not details:
        return limit
    scales = np.array([s.ritz.scale for s in spectra])
    spectral = np.array([s.outlooks[0].step for s in spectra])
    with full_precision():
        rates, contraction = _nonnormality(field, x, tableau, spectral, scales)
    return replace(
        limit, logarithmic_norm=like(x, rates, (len(x),)), contraction_step=like(x, contraction, (len(x),))
    )


def _nonnormality(
    field: Field, x: Tensor, tableau: ButcherTableau, spectral: Floats, scales: Floats
) -> tuple[Floats, Floats]:
    """μ₂ and the contraction limit of every sample."""
    n = x[0].numel()
    eps = torch.finfo(x.dtype).eps
    wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    rows = max(1, MEMORY // (80 * n * 8))
    rates, contraction = np.zeros(len(x)), np.zeros(len(x))
    generator = torch.Generator().manual_seed(23)
    rtol = max(1e-4, 1e3 * eps)
    for first in range(0, len(x), rows):
        part = slice(first, min(first + rows, len(x)))
        products = Products(field, x[part])
        start = torch.randn(len(x[part]), n, generator=generator, dtype=wide).to(x.device)
        rates[part] = logarithmic_norms_of(products, start, 1e-2)
        tau = rounding(n, eps) * scales[part]
        quiet = np.flatnonzero((rates[part] <= tau) & (spectral[part] > 0))
        for i in quiet + first:
            if scales[i] == 0:
                contraction[i] = np.inf
                continue
            # Where no eigenvalue limits it, or none was found that does, some multiple of 1/‖J‖ is enough.
            above = np.minimum(spectral[i : i + 1], _AMPLE / scales[i])
            one = Products(field, x[i : i + 1])
            contraction[i] = contraction_steps_of(one, tableau, above, start[i - first][None], rtol)[0]
    return rates, contraction


def limit_of(
    spectra: list[Spectrum],
    number: int,
    tableau: ButcherTableau,
    x: Tensor,
    growth: tuple[int, float] | None = None,
) -> StepLimit:
    """The `StepLimit` of method `number`, batched over the samples."""
    outlooks = [s.outlooks[number] for s in spectra]
    shape = (len(outlooks),)
    intervals = []
    for s in spectra:
        known = s.trusted if len(s.trusted) else s.ritz.values
        found = eigenvalue_step_limit(known, tableau, tolerance=1e-6 * s.ritz.scale, growth=growth)
        intervals.append(found.intervals)
    values = {
        "step": [o.step for o in outlooks],
        "limiting_eigenvalue": [o.limiting for o in outlooks],
        "decaying_step": [o.decaying for o in outlooks],
        "converged": [o.converged for o in outlooks],
        "decaying_converged": [o.settled for o in outlooks],
        "error": [o.error for o in outlooks],
        "residual": [s.residual[number] for s in spectra],
        "condition": [s.condition[number] for s in spectra],
    }
    return StepLimit(
        intervals=intervals,
        growing=[like(x, o.growing, o.growing.shape) for o in outlooks],
        method=tableau.name,
        **{name: like(x, np.array(value), shape) for name, value in values.items()},
    )
