r"""Step limits of fields with large states: from the outer spectrum, checked on the step map R(ηJ) itself.

The first exit from a stability region is an outer matter: where no mode grows, the eigenvalue that sets the
limit is the largest of R(ηJ), and Krylov spaces find it first. Two things they cannot know, and both are
said: nothing is certain that was not seen, so a limit is `converged` or not, never certified; and where many
modes grow, eigenvalues that barely decay may lie anywhere near the imaginary axis, so that the limit of the
decaying modes is an upper bound for methods, such as Euler, whose region leaves that axis at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.analysis.krylov import KrylovSchur, Operator, Ritz, outermost
from resode.analysis.linearize import Field
from resode.analysis.products import Products
from resode.stability import eigenvalue_step_limit, imaginary_stability_interval, stability_coefficients
from resode.stability.intervals import ray_polynomials
from resode.stability.limits import StepLimit, allowed_growth, as_counted
from resode.stability.rays import Complexes, Floats
from resode.tableaus import ButcherTableau

SPACE = 160
"""Vectors of a Krylov space, where memory allows."""

MEMORY = 2**30
"""Bytes that the Krylov spaces of the samples treated together may take."""

BUDGET = 1200
"""Products a sample before it is given up."""

_LOOK = 40  # vectors between two looks at the Ritz values
_MARGIN = 1e-2  # relative distance from the limit at which the step map is checked
_DEFLATED = 24  # growing modes that are taken out one by one
_POWERS = 16  # of the step map, before its own Ritz values are looked at
_STEPS = 8


@dataclass
class Outlook:
    """What the Ritz values of one sample say of one method's step.

    Args:
        step, limiting, growing, decaying: as in `StepLimit`, over what is trusted.
        mode: index of the Ritz value that sets `decaying`, -1 if none does.
        fastest: index of the fastest growing one, -1 if none grows.
        error: relative error of `decaying`, by first-order perturbation.
        converged: whether `step` rests on eigenvalues found to tolerance.
        outer: whether no decaying eigenvalue inside the spectrum's hull could limit the step further.
        settled: whether `decaying` was found to tolerance too.
        modes: indices of the growing Ritz values.
    """

    step: float
    limiting: complex
    growing: Complexes
    decaying: float
    mode: int
    fastest: int
    error: float
    converged: bool
    outer: bool
    settled: bool
    modes: np.ndarray = field(repr=False)


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
    rtol: float | None = None,
    budget: int = BUDGET,
    growth: tuple[int, float] | None = None,
    conditions: bool = False,
) -> list[Spectrum]:
    """The outer spectrum of each sample, sought until every method's limit has settled.

    Args:
        field: as checked by `check_field`.
        x: states, shape (batch, *state); taken in parts that fit into MEMORY.
        tableaus: explicit methods.
        rtol: relative accuracy of the limits; None for 1e-6 in float64 and 1e-4 in float32.
        budget: products a sample; a warning tells of samples that did not converge within it.
        growth: as in `eigenvalue_step_limit`.
        conditions: whether to find the right eigenvectors, for the condition numbers.
    """
    if rtol is None:
        rtol = 1e-6 if x.dtype == torch.float64 else 1e-4
    wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    n = x[0].numel()
    size_of = 8 if wide == torch.float64 else 4
    space = max(24, min(SPACE, budget, n, MEMORY // (n * size_of)))
    rows = max(1, MEMORY // ((space + 24) * n * size_of))
    found: list[Spectrum] = []
    for first in range(0, len(x), rows):
        part = _Part(field, x[first : first + rows], tableaus, space, wide, rtol, growth)
        found += part.solve(budget, conditions)
    lost = sum(not all(o.converged for o in s.outlooks) for s in found)
    if lost:
        warnings.warn(
            f"no convergence within {budget} products in {lost} of {len(found)} samples: their step limits are "
            "upper bounds, from the eigenvalues found. Raise budget=, or rtol=.",
            RuntimeWarning,
            stacklevel=5,
        )
    return found


class _Part:
    """Samples whose Krylov spaces are in memory together."""

    def __init__(
        self,
        field: Field,
        x: Tensor,
        tableaus: Sequence[ButcherTableau],
        space: int,
        wide: torch.dtype,
        rtol: float,
        growth: tuple[int, float] | None,
    ) -> None:
        self.field, self.x, self.tableaus, self.growth = field, x, tableaus, growth
        self.rtol = rtol
        self.n = x[0].numel()
        self.space = space
        self.wide = wide
        self.generator = torch.Generator().manual_seed(22)
        self.found: dict[int, Spectrum] = {}

    def _random(self, rows: int) -> Tensor:
        noise = torch.randn(rows, self.n, generator=self.generator, dtype=self.wide)
        return noise.to(self.x.device)

    def solve(self, budget: int, conditions: bool) -> list[Spectrum]:
        """Every sample's spectrum, in order."""
        active = list(range(len(self.x)))
        products = Products(self.field, self.x)
        krylov = KrylovSchur(products.transposed, self._random(len(active)), self.space)
        before: dict[tuple[int, int], list[float]] = {}
        krylov.grow(_LOOK)
        while True:
            krylov.grow(_LOOK)
            ritz = [krylov.ritz(row) for row in range(len(active))]
            outlooks = [self._look(r, sample, before) for r, sample in zip(ritz, active, strict=True)]
            last = products.count >= budget or krylov.whole
            ready = [
                row for row, some in enumerate(outlooks) if last or all(self._enough(o) for o in some)
            ]
            if ready:
                self._verify(krylov, products, active, ritz, outlooks, ready, last)
                for row in ready:
                    some = outlooks[row]
                    if last or all(self._enough(o) for o in some):
                        self._keep(krylov, active[row], row, ritz[row], some, products.count)
            left = [row for row, sample in enumerate(active) if sample not in self.found]
            if not left:
                break
            if krylov.used == krylov.size:
                orders = {row: r for row, r in enumerate(ritz)}
                krylov.cut(2 * (krylov.size // 4), lambda row, values: self._wanted(orders[row], values))
                if len(left) < 0.7 * len(active):
                    krylov.select(left)
                    count, active = products.count, [active[row] for row in left]
                    products = Products(self.field, self.x[active])
                    products.count = count
                    krylov.product = products.transposed
        found = [self.found[sample] for sample in range(len(self.x))]
        if conditions:
            self._conditions(found)
        return found

    @staticmethod
    def _enough(outlook: Outlook) -> bool:
        """Nothing is left to seek; where too many modes grow, the decaying ones cannot be told apart."""
        hopeless = outlook.fastest >= 0 and not outlook.outer and len(outlook.modes) > _DEFLATED
        return outlook.converged and (outlook.settled or hopeless)

    def _wanted(self, ritz: Ritz, values: Complexes) -> np.ndarray:
        order = outermost(values)
        exits = np.stack([self._exits(values, t, ritz.scale) for t in self.tableaus]).min(axis=0)
        binding = np.argsort(exits, kind="stable")[:4]
        return np.array(list(dict.fromkeys([*binding, *order])))

    def _tau(self, scale: float) -> float:
        return 8 * self.n**0.5 * torch.finfo(self.x.dtype).eps * scale

    def _exits(self, values: Complexes, tableau: ButcherTableau, scale: float) -> Floats:
        """First exit of each eigenvalue; inf where it limits nothing."""
        lam = as_counted(values, np.float64(self._tau(scale)))
        exits = np.full(len(lam), np.inf)
        some = lam != 0
        if some.any():
            unstable = ray_polynomials(tableau, allowed_growth(self.growth)).unstable(lam[some])
            exits[some] = unstable[:, 0, 0] if unstable.shape[1] else np.inf
        return exits

    def _look(self, ritz: Ritz, sample: int, before: dict[tuple[int, int], list[float]]) -> list[Outlook]:
        """What the Ritz values say of every method."""
        found = []
        for number, tableau in enumerate(self.tableaus):
            past = before.setdefault((sample, number), [])
            outlook = self._outlook(ritz, tableau, past)
            past.append(outlook.decaying)
            found.append(outlook)
        return found

    def _outlook(self, ritz: Ritz, tableau: ButcherTableau, past: list[float]) -> Outlook:
        tau = self._tau(ritz.scale)
        errors = ritz.conditions * (ritz.residuals + 4 * torch.finfo(self.x.dtype).eps * ritz.scale)
        values = ritz.values
        counted = as_counted(values, np.float64(tau))
        exits = self._exits(values, tableau, ritz.scale)
        growing = counted.real > 0
        sure = values.real > tau + errors
        slow = np.where(growing, np.inf, exits)
        mode = int(slow.argmin()) if np.isfinite(slow).any() else -1
        error, decaying = 0.0, float("inf")
        if mode >= 0:
            decaying = float(slow[mode])
            error = self._spread(values[mode], errors[mode], tableau, ritz.scale, decaying)
            still = len(past) >= 2 and all(abs(p - decaying) <= 0.1 * self.rtol * decaying for p in past[-2:])
            if still and ritz.residuals[mode] <= 1e-2 * ritz.scale:  # a cluster: its edge stands, its members mix
                error = min(error, 0.3 * self.rtol)
        known = error <= self.rtol
        if not known:  # what still holds: no more than the eigenvalues allow that have been found
            firm = slow[errors <= self.rtol * np.abs(values)]
            decaying = min(decaying, float(firm.min(initial=np.inf))) if len(firm) else decaying
        fastest = int(np.where(sure, values.real, -np.inf).argmax()) if sure.any() else -1
        if fastest >= 0:
            rightmost = values.real.max() <= values[fastest].real + errors[fastest]
            converged = bool(rightmost and errors[fastest] <= self.rtol**0.5 * abs(values[fastest]))
            step, limiting = (0.0 if self.growth is None else float(exits[sure].min())), values[fastest]
            step = min(step, decaying)
            height = _axis_height(values)
            outer = imaginary_stability_interval(tableau) >= 0.98 * decaying * height or height == 0
            settled = known and (outer or bool((sure == growing).all()))
        else:
            step, limiting = decaying, counted[mode] if mode >= 0 else complex("nan")
            converged = settled = bool(known and not growing.any())
            outer = True
        if limiting == limiting:
            limiting = complex(limiting.real, abs(limiting.imag))
        modes = np.flatnonzero(growing)
        listed = values[sure][np.argsort(-values[sure].real)]
        return Outlook(
            step, limiting, listed, decaying, mode, fastest, error, converged, outer, settled, modes
        )

    def _spread(
        self, value: complex, error: float, tableau: ButcherTableau, scale: float, decaying: float
    ) -> float:
        """Relative change of an exit where the eigenvalue moves by its error."""
        if decaying == 0:
            return 0.0
        around = value + error * np.array([1, -1, 1j, -1j])
        moved = self._exits(around, tableau, scale)
        return float(np.abs(moved - decaying).max() / decaying)

    def _keep(
        self, krylov: KrylovSchur, sample: int, row: int, ritz: Ritz, outlooks: list[Outlook], count: int
    ) -> None:
        indices = [o.fastest if o.fastest >= 0 else o.mode for o in outlooks]
        residual = [float(ritz.residuals[i]) if i >= 0 else float("nan") for i in indices]
        estimates = [float(ritz.conditions[i]) if i >= 0 else float("nan") for i in indices]
        spectrum = Spectrum(ritz, outlooks, residual, estimates, count)
        self.found[sample] = spectrum
        columns = ritz.vectors[:, [max(i, 0) for i in indices]]
        self.left = getattr(self, "left", {}) | {sample: krylov.vector(row, columns)}

    def _verify(
        self,
        krylov: KrylovSchur,
        products: Products,
        active: list[int],
        ritz: list[Ritz],
        outlooks: list[list[Outlook]],
        ready: list[int],
        last: bool,
    ) -> None:
        """Check the limits of the rows that are ready on the step map, just below and just above."""
        for number, tableau in enumerate(self.tableaus):
            limits = np.ones(len(active))
            vectors = self._random(len(active)).to(torch.complex64 if self.wide == torch.float32 else torch.complex128)
            checked = []
            for row in ready:
                o = outlooks[row][number]
                if o.mode < 0 or not 0 < o.decaying < np.inf:
                    continue
                limits[row] = o.decaying
                vectors[row] = krylov.vector(row, ritz[row].vectors[:, [o.mode]])[0].to(vectors.dtype)
                checked.append(row)
            if not checked:
                continue
            eta = torch.as_tensor(limits, device=self.x.device)[:, None]
            sizes = []
            for factor in (1 - _MARGIN, 1 + _MARGIN):
                image = _step(products.transposed, tableau, eta * factor, vectors)
                quotient = (vectors.conj() * image).sum(1) / (vectors.conj() * vectors).sum(1).real
                sizes.append(quotient.abs().double().cpu().numpy())
            bound = float(allowed_growth(self.growth)) ** 0.5
            bad = set()
            for row in checked:
                o = outlooks[row][number]
                noise = ritz[row].errors[o.mode] * o.decaying + 1e3 * torch.finfo(self.x.dtype).eps
                if sizes[0][row] > bound + noise or sizes[1][row] < bound - noise:
                    bad.add(row)
            alone = [row for row in checked if not outlooks[row][number].outer or outlooks[row][number].fastest < 0]
            alone = [row for row in alone if len(outlooks[row][number].modes) <= _DEFLATED]
            if alone:
                bad |= self._others(krylov, products, ritz, outlooks, number, eta * (1 - _MARGIN), alone, bound)
            for row in bad:
                o = outlooks[row][number]
                o.settled = False
                if o.fastest < 0:
                    o.converged = False

    def _others(
        self,
        krylov: KrylovSchur,
        products: Products,
        ritz: list[Ritz],
        outlooks: list[list[Outlook]],
        number: int,
        eta: Tensor,
        rows: list[int],
        bound: float,
    ) -> set[int]:
        """Rows in which some mode beside the growing ones is amplified by the step map just below the limit.

        A fresh random vector goes through the map many times, and a small Krylov space of the map says what
        has come out on top.
        """
        tableau = self.tableaus[number]
        growing: dict[int, Tensor] = {}
        for row in rows:
            modes = outlooks[row][number].modes
            if len(modes):
                v = krylov.vector(row, ritz[row].vectors[:, modes])
                u, s, _ = torch.linalg.svd(torch.cat([v.real, v.imag]).T, full_matrices=False)
                growing[row] = u[:, s > 1e-8 * s[0]].to(self.wide)

        def mapped(v: Tensor) -> Tensor:
            image = _step(products.transposed, tableau, eta, v)
            for row, q in growing.items():
                image[row] -= q @ (q.T @ image[row])
            return image

        v = self._random(len(eta))
        for row, q in growing.items():
            v[row] -= q @ (q.T @ v[row])
        for _ in range(_POWERS):
            v = mapped(v)
            v = v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.wide).tiny)
        small = KrylovSchur(mapped, v, _STEPS)
        small.grow(_STEPS)
        bad = set()
        for row in rows:
            found = small.ritz(row)
            excess = np.abs(found.values) - found.errors - bound
            if (excess > 1e-3).any():
                bad.add(row)
        return bad

    def _conditions(self, found: list[Spectrum]) -> None:
        """1/|w*v| by right eigenvectors, from a Krylov space of J that starts at the left ones."""
        for number in range(len(self.tableaus)):
            values = np.array(
                [
                    s.ritz.values[o.fastest if o.fastest >= 0 else o.mode]
                    if max(o.fastest, o.mode) >= 0
                    else np.nan
                    for s in found
                    for o in [s.outlooks[number]]
                ]
            )
            if np.isnan(values).all():
                continue
            left = torch.stack([self.left[sample][number] for sample in range(len(found))])
            products = Products(self.field, self.x)
            start = (left.real + left.imag).to(self.wide)
            krylov = KrylovSchur(products.forward, start, min(self.space, 3 * _LOOK))
            try:
                krylov.grow(krylov.size)
            except (RuntimeError, NotImplementedError):
                return  # F has no forward derivative: the estimate within the space stays
            for row, spectrum in enumerate(found):
                if np.isnan(values[row]):
                    continue
                ritz = krylov.ritz(row)
                near = int(np.abs(ritz.values - values[row]).argmin())
                if ritz.residuals[near] > 0.1 * max(abs(values[row]), 1e-3 * ritz.scale):
                    continue
                v = krylov.vector(row, ritz.vectors[:, [near]])[0]
                w = left[row]
                overlap = float((w * v).sum().abs() / (w.norm() * v.norm()))  # wᵀJ = λwᵀ: no conjugate
                spectrum.condition[number] = 1 / overlap if overlap > 2.0**-52 else float("inf")


def _axis_height(values: Complexes) -> float:
    """Where the hull of a spectrum crosses the imaginary axis; 0 if it does not."""
    right, left = values[values.real > 0], values[values.real < 0]
    if not len(right) or not len(left):
        return 0.0
    a, b = right[:, None], left[None, :]
    share = a.real / (a.real - b.real)
    return float((np.abs(a.imag) + share * (np.abs(b.imag) - np.abs(a.imag))).max())


def _step(product: Operator, tableau: ButcherTableau, eta: Tensor, v: Tensor) -> Tensor:
    """R(ηA)v (rows, n) for an explicit method, by Horner's rule; η (rows, 1)."""
    if v.is_complex():
        return torch.complex(_step(product, tableau, eta, v.real), _step(product, tableau, eta, v.imag))
    coefficients = [float(c) for c in stability_coefficients(tableau)[0]]
    eta = eta.to(v.dtype)
    total = coefficients[-1] * v
    for c in coefficients[-2::-1]:
        total = c * v + eta * product(total)
    return total


def matrix_free_limit(
    spectra: list[Spectrum], number: int, tableau: ButcherTableau, like_x: Tensor, **more: Any
) -> StepLimit:
    """One method's `StepLimit` over all samples."""
    outlooks = [s.outlooks[number] for s in spectra]
    real = like_x.dtype if like_x.dtype in (torch.float32, torch.float64) else torch.get_default_dtype()

    def tensor(values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=like_x.device)

    intervals = []
    for s, o in zip(spectra, outlooks, strict=True):
        known = s.trusted if len(s.trusted) else s.ritz.values
        intervals.append(eigenvalue_step_limit(known, tableau, tolerance=1e-6 * s.ritz.scale).intervals if o.fastest < 0 else [])
    return StepLimit(
        step=tensor([o.step for o in outlooks], real),
        limiting_eigenvalue=tensor([o.limiting for o in outlooks], real.to_complex()),
        intervals=intervals,
        growing=[tensor(o.growing, real.to_complex()) for o in outlooks],
        decaying_step=tensor([o.decaying for o in outlooks], real),
        residual=tensor([s.residual[number] for s in spectra], real),
        condition=tensor([s.condition[number] for s in spectra], real),
        converged=tensor([o.converged for o in outlooks], torch.bool),
        method=tableau.name,
        decaying_converged=tensor([o.settled for o in outlooks], torch.bool),
        error=tensor([o.error for o in outlooks], real),
        **more,
    )
