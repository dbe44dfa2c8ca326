r"""Where a field rests: F(x*) = 0, for a batch of starts, and where a solver's map rests.

A zero of F is a fixed point of every solver. A multi-stage method can rest elsewhere too, where its stages
cancel: such a point is named spurious.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from resode.checks import check_number, check_whole, checked, warn_user
from resode.jacobian.gmres import gmres
from resode.jacobian.lanczos import random_start
from resode.jacobian.linearize import Field, check_field, dense_jacobian
from resode.jacobian.matrices import DENSE_LIMIT
from resode.jacobian.products import JacobianProducts
from resode.results import Result
from resode.solve.step import combine, stages
from resode.tableaus import ButcherTableau, explicit_tableau, get_tableau

SMALL = 128
"""Entries of a state up to which its Jacobian is formed and factorized."""

_HALVINGS = 12
_PICARD = 20  # steps
_EPISODES = 9
_ENTRIES = 2**26  # of Jacobians or Krylov bases at once
_FACTORS = 8  # samples whose large Jacobian stays factorized
_SAME = 1e-6  # distance, relative to 1 + ‖x‖, at which two points are one


@dataclass(frozen=True, eq=False, repr=False)
class FixedPoints(Result):
    """What `find_fixed_points` found, one a start, or `find_several_fixed_points`, without repetition.

    Args:
        points: x*, shape (batch, *state). Differentiable in what F depends on, by the implicit function
            theorem; where `converged` is False, the best point reached.
        residual: ‖F(x*)‖₂, unscaled, shape (batch,); with a solver that of its slope (x⁺ − x)/η.
        converged: max|F(x*)| ≤ tol and a Newton step of at most √tol·(1 + ‖x*‖), bool, shape (batch,). F is
            small in places where no zero is near, as exp(−x) is at 24.
        iterations: Newton steps, shape (batch,).
        spurious: with a solver: whether its map rests there although F is not 0 near by; else None.
        solver: the method's name; None for F itself.
        step_size: η, or None.
    """

    points: Tensor
    residual: Tensor
    converged: Tensor
    iterations: Tensor
    spurious: Tensor | None = None
    solver: str | None = None
    step_size: float | None = None

    def __len__(self) -> int:
        return len(self.points)

    def __str__(self) -> str:
        of = "F" if self.solver is None else f"{self.solver}'s map, η = {self.step_size:g}"
        head = f"{int(self.converged.sum())} of {len(self)} converged to a fixed point of {of}"
        lines = []
        for i, x in enumerate(self.points.detach()):
            if i == 12:
                lines.append(f"  … and {len(self) - i} more")
                break
            shown = ", ".join(f"{float(v):.6g}" for v in x.flatten()[:6])
            more = ", …" if x.numel() > 6 else ""
            word = "" if self.converged[i] else "  not converged"
            if self.spurious is not None and self.spurious[i]:
                word = "  spurious: no zero of F"
            lines.append(f"  ({shown}{more})  residual {float(self.residual[i]):.1e}{word}")
        return "\n".join([head, *lines])


@checked
def find_fixed_points(
    field: Field,
    x0: Tensor,
    *,
    tol: float | None = None,
    max_iter: int = 100,
    solver: str | ButcherTableau | None = None,
    step_size: float | None = None,
    known: Tensor | None = None,
) -> FixedPoints:
    r"""Solve F(x) = 0 from each start, by Newton's method with a line search.

    States of up to 128 entries are solved with their Jacobian, larger ones by GMRES on products with it.
    Where no step along Newton's direction lowers ‖F‖, damped Picard steps x ← x + θF(x), forwards or
    backwards, lead on. Each sample moves and stops by its own figures. Only rounding differs between a batch
    and a sample alone (torch's products and solves of another shape sum in another order), and where Newton's
    path is chaotic, far from any zero or where J is singular, that can end at another fixed point.

    Args:
        field: F, a callable that keeps the state's shape; modules in eval mode, rows not interacting.
        x0: starts, shape (batch, *state), float32 or float64.
        tol: bound on max|F(x*)|, and its root on the length of a Newton step there relative to 1 + ‖x*‖;
            1e-10 in float64, 1e-5 in float32.
        max_iter: Newton steps.
        solver: an explicit method's name or tableau: find fixed points of its step of size `step_size`.
        step_size: η > 0, together with `solver`.
        known: points to stay away from, shape (k, *state): deflation multiplies F by
            ∏(1 + 1/‖x − x_i‖²), which leaves no zero there.

    Returns:
        FixedPoints. A sample that does not converge is no exception; see `converged`. The gradient of
        `points` solves with the transposed Jacobian in the backward pass, and warns where that fails; it is
        itself a constant: for second derivatives (create_graph=True) it warns too.

    Raises:
        TypeError, ValueError: as `resode.jacobian.linearize.check_field`; a dtype other than float32 and
            float64 (split a complex state into its parts); a solver without a step or the reverse.

    Source:
        Knoll & Keyes, J. Comput. Phys. 193 (2004); Farrell, Birkisson & Funke, SIAM J. Sci. Comput. 37
        (2015) for deflation; Bai, Kolter & Koltun, Deep Equilibrium Models (2019) for the gradient.

    Example:
        >>> found = find_fixed_points(lambda x: x * (1 - x), torch.tensor([[0.8], [-0.1]]).double())
        >>> found.points.round(decimals=6).tolist(), found.converged.tolist()
        ([[1.0], [0.0]], [True, True])
        >>> print(find_fixed_points(lambda x: x * (1 - x), torch.tensor([[1.6]]).double(),
        ...                         solver="midpoint", step_size=1.2))
        1 of 1 converged to a fixed point of midpoint's map, η = 1.2
          (1.66667)  residual ...  spurious: no zero of F
    """
    residual, tableau, tol = _checked(field, x0, tol, max_iter, solver, step_size)
    if known is not None:
        known = torch.as_tensor(known, dtype=x0.dtype, device=x0.device)
        if known.shape[1:] != x0.shape[1:]:
            raise ValueError(f"known must be points of shape (k, {tuple(x0.shape[1:])}), got {known.shape}.")
    search = _Search(residual, x0, tol, known)
    search.run(max_iter)
    points, value = search.x, search.f
    spurious = None
    if tableau is not None:
        spurious = search.converged & _no_zero_near(field, points, tol)
    return FixedPoints(
        points=_differentiable(residual, points, search.converged),
        residual=value.reshape(len(x0), -1).norm(dim=1),
        converged=search.converged,
        iterations=search.iterations,
        spurious=spurious,
        solver=None if tableau is None else tableau.name,
        step_size=step_size,
    )


@checked
def find_several_fixed_points(
    field: Field,
    x0: Tensor,
    *,
    max_points: int = 32,
    attempts: int = 3,
    tol: float | None = None,
    max_iter: int = 100,
    solver: str | ButcherTableau | None = None,
    step_size: float | None = None,
) -> FixedPoints:
    r"""Different fixed points, by deflation: each one found is removed before the starts are tried again.

    Where nothing new is found, the starts are moved at random (with a fixed seed) and tried again. That every
    fixed point has been found is not proved.

    Args:
        field: as in `find_fixed_points`.
        x0: starts, shape (batch, *state); one is often enough.
        max_points: stop at so many.
        attempts: rounds in vain after which the search ends.
        tol: as in `find_fixed_points`, and so the others.
        max_iter: Newton steps.
        solver: a method whose map is meant.
        step_size: its step.

    Returns:
        FixedPoints with points of shape (k, *state), all converged, in the order found; k may be 0.

    Example:
        >>> field = lambda x: x * (1 - x) * (x - 3)
        >>> found = find_several_fixed_points(field, torch.tensor([[0.4]], dtype=torch.float64))
        >>> sorted(round(abs(float(x)), 6) for x in found.points)
        [0.0, 1.0, 3.0]
    """
    check_whole("max_points", max_points, 1)
    check_whole("attempts", attempts, 1)
    _checked(field, x0, tol, max_iter, solver, step_size)
    options: dict[str, Any] = {"tol": tol, "max_iter": max_iter, "solver": solver, "step_size": step_size}
    known, iterations = x0[:0], []
    starts, vain = x0, 0
    while len(known) < max_points and vain < attempts:
        with torch.no_grad():
            found = find_fixed_points(field, starts, known=known if len(known) else None, **options)
            news, taken = found.points[found.converged], found.iterations[found.converged]
        before = len(known)
        for point, steps in zip(news, taken, strict=True):
            if not _among(point, known) and len(known) < max_points:
                known = torch.cat([known, point[None]])
                iterations.append(int(steps))
        if len(known) == before:
            vain += 1
            starts = _moved(x0, known, vain)
    if not len(known):
        residual = torch.zeros(0, dtype=x0.dtype, device=x0.device)
        none = torch.zeros(0, dtype=torch.bool, device=x0.device)
        return FixedPoints(known, residual, none, none.long(), none if solver else None)
    final = find_fixed_points(field, known, **options)
    return replace(final, iterations=torch.tensor(iterations, device=x0.device))


def _checked(
    field: Field, x0: Any, tol: float | None, max_iter: int, solver: Any, step_size: Any
) -> tuple[Field, ButcherTableau | None, float]:
    """The function whose zeros are sought, the solver's tableau, and the tolerance."""
    if isinstance(x0, Tensor) and x0.is_complex():
        raise TypeError(
            "a complex state has no real Jacobian: let F act on its real and imaginary parts "
            f"(torch.view_as_real), got x0 of {x0.dtype}."
        )
    check_field(field, x0)
    if x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"fixed points are found in float32 or float64, got x0 of {x0.dtype}.")
    check_whole("max_iter", max_iter, 1)
    if tol is None:
        tol = 1e-10 if x0.dtype == torch.float64 else 1e-5
    check_number("tol", tol, above=0)
    if (solver is None) != (step_size is None):
        raise ValueError(
            "a solver's map needs its step: give solver= and step_size= together, or neither for F."
        )
    if solver is None:
        return field, None, tol
    return solver_slope(field, solver, step_size), get_tableau(solver), tol


def solver_slope(field: Field, solver: str | ButcherTableau, step_size: Any) -> Field:
    """Φ(x) = Σ b_i k_i, the slope of one step: x⁺ = x + ηΦ(x). Zero where the solver's map rests.

    Example:
        >>> solver_slope(lambda x: x * (1 - x), "midpoint", 1.0)(torch.tensor([[2.0]]))
        tensor([[0.]])
    """
    tableau = explicit_tableau(solver, "fixed points of a map are found for")
    h = check_number("step_size", step_size, above=0)

    def slope(x: Tensor) -> Tensor:
        k = stages(tableau, lambda t, x: field(x), [0.0] * len(tableau.b), x, h)
        return combine(torch.zeros_like(x), 1.0, tableau.b_row, k)

    return slope


def _moved(x0: Tensor, known: Tensor, attempt: int) -> Tensor:
    """Other starts: around the given ones, and around the middle of what is known, ever wider."""
    copies = 8 if x0[0].numel() <= SMALL else 1
    wide = 1 + x0.abs().mean() + (2 * known.std() if known.numel() > 1 else 0)
    noise = [random_start(1, x0[0].numel(), x0, 1000 * attempt + i) for i in range(copies * len(x0))]
    centre = x0.repeat(copies, *(1,) * (x0.ndim - 1))
    if len(known):
        centre[: len(centre) // 2] = known.mean(0)
    return centre + torch.cat(noise).reshape(centre.shape) * wide * attempt


def _among(point: Tensor, known: Tensor) -> bool:
    if not len(known):
        return False
    distance = (known - point).flatten(1).norm(dim=1)
    return bool((distance <= _SAME * (1 + point.norm())).any())


class _Search:
    """Newton's method on a batch; every sample moves and stops on its own."""

    def __init__(self, residual: Field, x0: Tensor, tol: float, known: Tensor | None) -> None:
        self.residual, self.tol, self.known = residual, tol, known
        self.x = x0.detach().clone()
        if known is not None:
            self._leave_known()
        batch = len(x0)
        self.f = self._evaluate(self.x)
        self.start = self.x.flatten(1).clone(), self.f
        self.last = torch.zeros_like(self.f)  # Newton's direction where a sample converged
        self.converged = torch.zeros(batch, dtype=torch.bool, device=x0.device)
        self.stuck = ~torch.isfinite(self.f).all(1)
        self.iterations = torch.zeros(batch, dtype=torch.long, device=x0.device)
        self.factors: dict[int, tuple[Tensor, Tensor]] = {}
        self.episodes, self.creeping = torch.zeros_like(self.iterations), torch.zeros_like(self.iterations)

    def run(self, max_iter: int) -> None:
        for _ in range(max_iter + 1):
            self._settle()
            active = torch.nonzero(~(self.converged | self.stuck)).flatten()
            if not len(active):
                break
            open_ = active[self.iterations[active] < max_iter]
            if not len(open_):
                break
            self._step(open_)
        self._polish()

    def _settle(self) -> None:
        near = self.f.abs().amax(1) <= self.tol
        if self.known is not None:
            distance = (self.x[:, None] - self.known[None]).flatten(2).norm(dim=2).amin(1)
            old = near & (distance <= _SAME * (1 + self.x.flatten(1).norm(dim=1)))
            self.stuck |= old
            near &= ~old
        which = torch.nonzero(near & ~self.converged & ~self.stuck).flatten()
        if len(which):
            self.last[which] = direction = self._direction(which)
            reach = self.tol**0.5 * (1 + self.x[which].flatten(1).norm(dim=1))
            self.converged[which] = direction.norm(dim=1) <= reach

    def _evaluate(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.residual(x).reshape(len(x), -1)

    def _leave_known(self) -> None:
        """Deflation has a pole at a known point; a start there is moved aside."""
        assert self.known is not None
        distance = (self.x[:, None] - self.known[None]).flatten(2).norm(dim=2).amin(1)
        here = distance <= 1e-3 * (1 + self.x.flatten(1).norm(dim=1))
        if here.any():
            n = self.x[0].numel()
            aside = random_start(int(here.sum()), n, self.x, 5).reshape(-1, *self.x.shape[1:])
            size = (1 + self.x[here].flatten(1).norm(dim=1)) / n**0.5
            self.x[here] += 0.1 * aside * size.reshape(-1, *(1,) * (self.x.ndim - 1))

    def _deflation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of m(x) = ∏(1 + 1/‖x − x_i‖²) and its gradient, (batch,) and (batch, n)."""
        if self.known is None:
            return torch.zeros_like(x.flatten(1)[:, 0]), torch.zeros_like(x.flatten(1))
        apart = (x[:, None] - self.known[None]).flatten(2)
        square = (apart**2).sum(2).clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
        gradient = (-2 * apart / (square * (1 + square))[..., None]).sum(1)
        return torch.log1p(1 / square).sum(1), gradient

    def _step(self, which: Tensor) -> None:
        x, f = self.x[which], self.f[which]
        self.iterations[which] += 1
        direction = self._direction(which)
        log_m, slope = self._deflation(x)
        if self.known is not None:
            along = (slope * direction).sum(1, keepdim=True)
            along = torch.where((1 - along).abs() > 1e-8, along, 0.0)
            direction = direction / (1 - along)  # Newton's direction for mF, by a rank-one update
        size = f.norm(dim=1)
        alpha = torch.ones_like(size)
        waiting = torch.isfinite(direction).all(1)
        for _ in range(_HALVINGS + 1):
            trial = (x.flatten(1) + alpha[:, None] * direction).reshape(x.shape)
            rows = torch.nonzero(waiting).flatten()
            if not len(rows):
                break
            value = self._evaluate(trial[rows])
            gain = value.norm(dim=1) * torch.exp(self._deflation(trial[rows])[0] - log_m[rows])
            good = torch.isfinite(gain) & (gain <= (1 - 1e-4 * alpha[rows]) * size[rows])
            taken = rows[good]
            self.x[which[taken]], self.f[which[taken]] = trial[taken], value[good]
            waiting[taken] = False
            alpha[rows[~good]] *= 0.5
        moved = torch.isfinite(direction).all(1) & ~waiting
        creeps = moved & (alpha <= 2.0**-4)
        self.creeping[which] = torch.where(creeps, self.creeping[which] + 1, 0)
        lost = torch.nonzero(~moved | (self.creeping[which] >= 3)).flatten()
        if len(lost):
            self._escape(which[lost], direction[lost])

    def _direction(self, which: Tensor) -> Tensor:
        """Newton's direction, some samples at a time where all of them would take too much memory."""
        return torch.cat([self._direction_of(part) for part in which.split(_at_once(self.f.shape[1]))])

    def _direction_of(self, which: Tensor) -> Tensor:
        """Newton's direction; a factorization that GMRES once needed serves it from then on."""
        x, f = self.x[which], self.f[which]
        if f.shape[1] <= SMALL:
            return newton_direction(self.residual, x, f)
        keys = which.tolist()

        def prepared(v: Tensor) -> Tensor:
            if not any(key in self.factors for key in keys):
                return v
            rows = [
                torch.linalg.lu_solve(*self.factors[key], r[:, None])[:, 0] if key in self.factors else r
                for key, r in zip(keys, v, strict=True)
            ]
            return torch.stack(rows)

        products = JacobianProducts(self.residual, x)
        direction, left = gmres(lambda v: products.jvp(prepared(v)), -f, tol=1e-3)
        direction = prepared(direction)
        for i in torch.nonzero(~(left <= 0.1)).flatten().tolist() if f.shape[1] <= DENSE_LIMIT else []:
            matrix = dense_jacobian(self.residual, x[i : i + 1])
            direction[i] = -solve_dense(matrix, f[i : i + 1])[0]
            lu, pivots, info = torch.linalg.lu_factor_ex(matrix[0])
            if int(info) == 0 and (keys[i] in self.factors or len(self.factors) < _FACTORS):
                self.factors[keys[i]] = lu, pivots
        return direction

    def _escape(self, which: Tensor, direction: Tensor) -> None:
        """Where Newton's method is stuck: along the flow, against it, or Newton's whole step, in turn.

        The flow leads to what attracts it, its reverse to what repels it. It is followed from the start where
        Newton's steps went far away, as they do where F saturates.
        """
        turn = self.episodes[which] % 3
        self.episodes[which] += 1
        self.creeping[which] = 0
        x, f = self.x[which].flatten(1), self.f[which]
        start, at_start = (value[which] for value in self.start)
        far = (x.norm(dim=1) > 10 * (1 + start.norm(dim=1)))[:, None] & (turn < 2)[:, None]
        x, f = torch.where(far, start, x), torch.where(far, at_start, f)
        reach = 10 * (1 + x.norm(dim=1))
        length = torch.nan_to_num(direction).norm(dim=1)
        leap = torch.nan_to_num(direction) * (reach / length.clamp_min(1e-30)).clamp_max(1.0)[:, None]
        damping = torch.ones_like(reach)
        for k in range(2 * _PICARD):  # backwards twice as far, past where it went forwards
            theta = (0.2 * (1 + x.norm(dim=1)) / f.norm(dim=1).clamp_min(1e-30)).clamp_max(0.5) * damping
            drift = theta[:, None] * torch.where((turn == 0)[:, None], f, -f)
            idle = torch.where(turn == 0, k >= _PICARD, (turn == 2) & (k > 0))
            move = torch.where((turn == 2)[:, None], leap, drift) * ~idle[:, None]
            trial = x + move
            value = self._evaluate(trial.reshape(self.x[which].shape))
            fine = torch.isfinite(value).all(1, keepdim=True)
            damping = torch.where((value * f).sum(1) < 0, 0.5 * damping, damping)
            x, f = torch.where(fine, trial, x), torch.where(fine, value, f)
        given_up = self.episodes[which] > _EPISODES
        kept = which[~given_up]
        self.x[kept], self.f[kept] = x[~given_up].reshape(self.x[kept].shape), f[~given_up]
        self.stuck[which[given_up]] = True

    def _polish(self) -> None:
        """One more Newton step where it brings F still closer to 0."""
        done = torch.nonzero(self.converged & (self.f.abs().amax(1) > 0)).flatten()
        if not len(done):
            return
        x, f = self.x[done], self.f[done]
        trial = (x.flatten(1) + self.last[done]).reshape(x.shape)
        value = self._evaluate(trial)
        closer = torch.isfinite(value).all(1) & (value.norm(dim=1) < f.norm(dim=1))
        apart = (trial - x).flatten(1).norm(dim=1) <= 1e-3 * (1 + x.flatten(1).norm(dim=1))
        take = closer & apart
        self.x[done[take]], self.f[done[take]] = trial[take], value[take]


def _at_once(n: int) -> int:
    """Samples whose Jacobians, or Krylov bases, are held together."""
    return max(1, _ENTRIES // (n * (n if n <= SMALL else 61)))


def newton_direction(residual: Field, x: Tensor, f: Tensor) -> Tensor:
    """−J⁻¹f (batch, n) with the Jacobian formed; the least-squares one of least norm where J is singular."""
    return -solve_dense(dense_jacobian(residual, x), f)


def solve_dense(matrix: Tensor, right: Tensor) -> Tensor:
    """A⁻¹b of every sample (batch, n, n) and (batch, n); least squares of least norm where A is singular."""
    solution, info = torch.linalg.solve_ex(matrix, right[..., None])
    solution = solution[..., 0]
    bad = (info != 0) | ~torch.isfinite(solution).all(1)
    if bad.any():
        rows = torch.nonzero(bad & torch.isfinite(matrix).flatten(1).all(1)).flatten()
        solution[bad] = torch.nan
        if len(rows):
            solution[rows] = (torch.linalg.pinv(matrix[rows]) @ right[rows][..., None])[..., 0]
    return solution


def _no_zero_near(field: Field, points: Tensor, tol: float) -> Tensor:
    """Whether F has no zero at a point; F is solved for again where it is not within tol."""
    value = field(points.detach()).detach().flatten(1).abs().amax(1)
    result = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    doubtful = torch.nonzero(value > tol).flatten()
    if len(doubtful):
        search = _Search(field, points[doubtful], tol, None)
        search.run(50)
        moved = (search.x - points[doubtful]).flatten(1).norm(dim=1)
        near = moved <= tol**0.5 * (1 + points[doubtful].flatten(1).norm(dim=1))
        result[doubtful] = ~(search.converged & near)
    return result


def _differentiable(residual: Field, points: Tensor, converged: Tensor) -> Tensor:
    """The points with the implicit function theorem's gradient: dx* = −J⁻¹ ∂F/∂θ dθ."""
    if not torch.is_grad_enabled():
        return points
    value = residual(points.detach().clone())
    if not value.requires_grad:
        return points

    def backward(g: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # under create_graph=True
            warn_user(
                "the gradient of a fixed point is differentiable once: with create_graph=True what it "
                "depends on is left out of second derivatives.",
                RuntimeWarning,
            )
        with torch.no_grad():
            return _implicit(residual, points, converged, g)

    change = value - value.detach()  # 0, with the graph of F's parameters
    change.register_hook(backward)
    return points + change


def _implicit(residual: Callable[[Tensor], Tensor], x: Tensor, converged: Tensor, g: Tensor) -> Tensor:
    """−J⁻ᵀg, with a warning where it is not to be had."""
    flat = g.reshape(len(g), -1)
    tol = torch.finfo(flat.dtype).eps ** 0.75
    at_once = _at_once(flat.shape[1])
    pieces = zip(x.split(at_once), flat.split(at_once), strict=True)
    parts = [_transposed_solve(residual, some, right, tol) for some, right in pieces]
    solution, left = (torch.cat(values) for values in zip(*parts, strict=True))
    size = flat.norm(dim=1)
    bad = (left > 1e4 * tol * size) & (size > 0)
    lost = ~converged & (size > 0)
    if bool((bad | lost).any()):
        warn_user(
            f"the gradient of a fixed point solves with F's transposed Jacobian: {int(bad.sum())} of "
            f"{len(bad)} solves did not converge, and {int(lost.sum())} samples are no fixed points. "
            "Their gradients are not to be trusted: where J is singular, the point does not depend on the "
            "parameters smoothly.",
            RuntimeWarning,
        )
    return -solution.reshape(g.shape)


def _unsettled(residual: Field, x: Tensor, matrix: Tensor, flat: Tensor, w: Tensor) -> Tensor:
    """‖g − Jᵀw‖ one Newton step further, where that is over a tenth of ‖g‖: x is next to a singular J.

    At a double zero F is within its tolerance long before x is the zero, and J there is not yet singular.
    """
    with torch.no_grad():
        value = residual(x).reshape(len(x), -1)
    step = torch.nan_to_num(solve_dense(matrix.mT, value))
    other = dense_jacobian(residual, x - step.reshape(x.shape)).mT
    left = torch.nan_to_num((flat - (other @ w[..., None])[..., 0]).norm(dim=1), nan=torch.inf)
    return torch.where(left > 0.1 * flat.norm(dim=1), left, 0.0)


def _transposed_solve(residual: Field, x: Tensor, flat: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """J⁻ᵀg of each sample, and ‖g − Jᵀw‖ of what was found."""
    if flat.shape[1] <= SMALL:
        matrix = dense_jacobian(residual, x).mT
        solution = torch.nan_to_num(solve_dense(matrix, flat))
        left = (flat - (matrix @ solution[..., None])[..., 0]).norm(dim=1)
        left = torch.maximum(left, _unsettled(residual, x, matrix, flat, solution))
    else:
        products = JacobianProducts(residual, x)
        solution, relative = gmres(products.vjp, flat, tol=tol, restarts=10)
        for i in (
            torch.nonzero(relative > 100 * tol).flatten().tolist() if flat.shape[1] <= DENSE_LIMIT else []
        ):
            solution[i] = solve_dense(dense_jacobian(residual, x[i : i + 1]).mT, flat[i : i + 1])[0]
        left = (flat - products.vjp(solution)).norm(dim=1)
    return solution, left
