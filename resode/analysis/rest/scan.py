r"""A solver's map as its step grows: loss of stability, cycles, Lyapunov exponents, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # whose submodules are loaded when first named
import torch
from torch import Tensor

from resode.analysis.rest.classify import classify
from resode.analysis.rest.fixed_points import find_fixed_points, find_several_fixed_points
from resode.checks import check_number, check_whole, checked
from resode.jacobian.linearize import Field, check_field, dense_jacobian
from resode.results import Result
from resode.solve.step import rk_step
from resode.stability import eigenvalue_step_limit, stability_function
from resode.tableaus import ButcherTableau, explicit_tableau, get_tableau

_NEAR = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class StabilityLoss(Result):
    """Where a fixed point or a cycle of a solver's map stops being stable as the step grows.

    Args:
        step_size: η.
        period: 1 for a fixed point, else the length of the cycle.
        kind: "flip" where a multiplier passes −1 (for Euler at ηλ = −2), "fold" where it passes 1,
            "rotation" where a complex pair leaves the unit circle.
        multiplier: the one of largest modulus there, an eigenvalue of the derivative of `period` steps.
        points: the fixed point or cycle, shape (period, *state).
    """

    step_size: float
    period: int
    kind: str
    multiplier: complex
    points: Tensor


def _map(field: Field, tableau: ButcherTableau, h: float) -> Field:
    check_number("step_size", h, above=0)
    return lambda x: rk_step(tableau, lambda t, x: field(x), 0.0, x, h)


@checked
def stability_losses(
    field: Field, x0: Tensor, max_step: float, *, solver: str | ButcherTableau = "euler", max_period: int = 4
) -> list[StabilityLoss]:
    r"""Follow a fixed point, and the cycles that double from it, to the steps where each loses stability.

    The first loss is the step limit of F's eigenvalues at the fixed point. From a flip on, the cycle of twice
    the period is followed until its own multiplier leaves the unit circle, and so on.

    Args:
        field: F, as in `find_fixed_points`, smooth.
        x0: a start near a fixed point that is stable for the flow, shape (1, *state), float64: a cycle's
            multiplier needs its digits.
        max_step: the largest η to look at.
        solver: an explicit method's name, or its tableau.
        max_period: the longest cycle to follow, a power of 2.

    Returns:
        The losses, by growing step; empty where there is none up to `max_step`.

    Raises:
        ValueError: no fixed point near x0, or one that the flow itself leaves.

    Source:
        Kuznetsov, Elements of Applied Bifurcation Theory, 3rd ed. (2004), chapter 4.

    Example:
        >>> start = torch.tensor([[0.8]], dtype=torch.float64)
        >>> for loss in stability_losses(lambda x: x * (1 - x), start, 3.0, max_period=2):
        ...     print(loss.period, loss.kind, round(loss.step_size, 6))
        1 flip 2.0
        2 flip 2.44949
    """
    tableau = explicit_tableau(solver, "a map needs")
    if len(x0) != 1:
        raise ValueError(
            f"one fixed point is followed: x0 must have shape (1, *state), got {tuple(x0.shape)}."
        )
    if isinstance(x0, Tensor) and x0.dtype == torch.float32:
        raise TypeError("cycles are followed in float64, got x0 of torch.float32: give x0.double().")
    check_number("max_step", max_step, above=0)
    found = find_fixed_points(field, x0)
    if not found.converged.all():
        raise ValueError(f"no fixed point was found from x0: max|F| is {float(found.residual):.3g} at best.")
    point = found.points.detach()
    eigenvalues = torch.linalg.eigvals(dense_jacobian(field, point)[0].double())
    limit = eigenvalue_step_limit(eigenvalues, tableau)
    if limit.step == 0:
        raise ValueError(
            "a fixed point that the flow leaves is stable at no step: "
            f"λ = {complex(limit.limiting_eigenvalue):.6g}. Start near another one."
        )
    if limit.step > max_step:
        return []
    z = torch.tensor(limit.step * complex(limit.limiting_eigenvalue), dtype=torch.complex128)
    losses = [_loss(float(limit.step), complex(stability_function(tableau, z)), point)]
    width = limit.step / 2
    while losses[-1].kind == "flip" and 2 * losses[-1].period <= max_period:
        following = _double(field, tableau, losses[-1], width, max_step)
        if following is None:
            break
        width = following.step_size - losses[-1].step_size
        losses.append(following)
    return losses


def _loss(step: float, multiplier: complex, points: Tensor) -> StabilityLoss:
    kind = "rotation" if abs(multiplier.imag) > _NEAR else "flip" if multiplier.real < 0 else "fold"
    return StabilityLoss(step, len(points), kind, multiplier, points)


def _double(
    field: Field, tableau: ButcherTableau, before: StabilityLoss, width: float, max_step: float
) -> StabilityLoss | None:
    """The loss of the cycle of twice the period that is born at a flip."""
    period, increment = 2 * before.period, width / 100
    h = before.step_size + increment / 10
    x = before.points[:1] + 1e-2 * (1 + before.points.abs().max())
    step = _map(field, tableau, h)
    with torch.no_grad():
        for _ in range(4000 * period):
            x = step(x)
    cycle = _cycle(field, tableau, h, x, period)
    if cycle is None or _apart(cycle[1]) < _NEAR:
        return None  # the cycle is born unstable, on the other side
    last, ahead = (h, cycle[1]), increment / 10
    while last[0] < max_step and ahead > 1e-9 * max_step:
        h = min(last[0] + ahead, max_step)
        cycle = _cycle(field, tableau, h, last[1][:1], period)
        if cycle is None or float((cycle[1][0] - last[1][0]).norm()) > 0.3 * _apart(last[1]):
            ahead /= 2  # Newton's method has left the cycle
            continue
        if abs(cycle[0]) > 1:
            start = last[1][:1]

            def excess(h: float, start: Tensor = start) -> float:
                inside = _cycle(field, tableau, h, start, period)
                return math.nan if inside is None else abs(inside[0]) - 1

            at = float(scipy.optimize.brentq(excess, last[0], h, xtol=1e-12, rtol=1e-13))
            final = _cycle(field, tableau, at, start, period)
            assert final is not None
            return _loss(at, *final)
        last, ahead = (h, cycle[1]), min(1.3 * ahead, increment)
    return None


def _apart(points: Tensor) -> float:
    """How far a cycle's points are from those half a period later; 0 where its period is shorter."""
    half = len(points) // 2
    return float((points[half:] - points[:half]).flatten(1).norm(dim=1).min())


def _cycle(
    field: Field, tableau: ButcherTableau, h: float, x: Tensor, period: int
) -> tuple[complex, Tensor] | None:
    """The cycle near x by Newton's method on `period` steps: its largest multiplier, and its points."""
    step = _map(field, tableau, h)
    n = x[0].numel()
    one = torch.eye(n, dtype=x.dtype, device=x.device)
    for _ in range(30):
        points, derivative, y = [], one, x
        for _ in range(period):
            points.append(y)
            derivative = dense_jacobian(step, y)[0] @ derivative
            with torch.no_grad():
                y = step(y)
        gap = (y - x).flatten()
        if not bool(torch.isfinite(gap).all()):
            return None
        if float(gap.abs().max()) <= 1e-13 * (1 + float(x.abs().max())):
            multipliers = torch.linalg.eigvals(derivative.double())
            return complex(multipliers[multipliers.abs().argmax()]), torch.cat(points)
        x = x - torch.linalg.lstsq(derivative - one, gap[:, None]).solution.reshape(x.shape)
    return None


@checked
def lyapunov_exponents(
    field: Field | Sequence[Field],
    x0: Tensor,
    step_size: float = 1.0,
    *,
    solver: str | ButcherTableau = "euler",
    n_steps: int | None = None,
    transient: int = 0,
) -> Tensor:
    r"""Mean growth rates of perturbations per step of the depth map, x ← (one step of size η), by QR.

    With D_l the step's derivative at x_l and Q_0 = I, D_l Q_l = Q_{l+1} R_{l+1}: the exponents are the means
    of log |r_ii|. For a chaotic map the first is positive; for a network of blocks they say how the depth
    that it has stretches and flattens.

    Args:
        field: F, used in every step; or a sequence of them, one a block, each used once.
        x0: states, shape (batch, *state), of up to a few hundred entries.
        step_size: η.
        solver: an explicit method's name, or its tableau.
        n_steps: steps that are averaged; 1,000 for one field, all blocks for a sequence.
        transient: steps before them.

    Returns:
        Exponents in nats per step, largest first in general, shape (batch, n); nan where an orbit diverges.

    Raises:
        ValueError: an implicit solver; n_steps or a transient beside a sequence of fields.

    Source:
        Benettin, Galgani, Giorgilli & Strelcyn, Meccanica 15 (1980).

    Example:
        >>> x0 = torch.rand(50, 1, generator=torch.Generator().manual_seed(0)).double()
        >>> found = lyapunov_exponents(lambda x: x * (1 - x), x0, 3.0, transient=100)
        >>> abs(float(found.mean()) - math.log(2)) < 1e-2
        True
    """
    tableau = explicit_tableau(solver, "a map needs")
    if not callable(field) or isinstance(field, Sequence):
        fields = list(field)
        if n_steps is not None or transient:
            raise ValueError("a sequence of fields is passed once: leave out n_steps and transient.")
        if not fields:
            raise ValueError("field must be a callable, or a non-empty sequence of them; got an empty one.")
    else:
        count = check_whole("n_steps", 1000 if n_steps is None else n_steps, 1)
        check_whole("transient", transient, 0)
        fields = [field] * (transient + count)
    check_field(fields[0], x0)
    batch, n = len(x0), x0[0].numel()
    x = x0.detach()
    frame = torch.eye(n, dtype=x.dtype, device=x.device).expand(batch, n, n)
    total, counted = torch.zeros(batch, n, dtype=x.dtype, device=x.device), len(fields) - transient
    for number, f in enumerate(fields):
        step = _map(f, tableau, step_size)
        if number >= transient:
            frame, triangle = torch.linalg.qr(torch.nan_to_num(dense_jacobian(step, x)) @ frame)
            total += torch.diagonal(triangle, dim1=1, dim2=2).abs().log()
        with torch.no_grad():
            x = step(x)
    lost = ~torch.isfinite(x).flatten(1).all(1)
    return torch.where(lost[:, None], torch.nan, total / counted)


@dataclass(frozen=True, eq=False, repr=False)
class Cobweb(Result):
    """A scalar map, and an orbit of it: `x` and `y` the graph, `orbit` the states, shape (n + 1,)."""

    solver: str
    step_size: float
    x: Tensor
    y: Tensor
    orbit: Tensor

    def plot(self, path: str | None = None) -> Any:
        """Draw it; see `resode.plots.cobweb`."""
        from resode import plots

        return plots.cobweb(self, path)


@checked
def cobweb(
    field: Field,
    x0: float,
    step_size: float,
    *,
    solver: str | ButcherTableau = "euler",
    n_steps: int = 60,
    window: tuple[float, float] | None = None,
) -> Cobweb:
    """The map x ← (one step of size η) of a one-dimensional field, with an orbit, for a cobweb diagram.

    Args:
        field: F(x) on states (1, 1).
        x0: where the orbit starts.
        step_size: η.
        solver: an explicit method.
        n_steps: of the orbit.
        window: the x between which the map is drawn; None for the orbit's own, and some more.

    Example:
        >>> web = cobweb(lambda x: x * (1 - x), 0.1, 1.0, n_steps=3)
        >>> [round(float(v), 4) for v in web.orbit]
        [0.1, 0.19, 0.3439, 0.5695]
    """
    step = _map(field, explicit_tableau(solver, "a map needs"), step_size)
    x = torch.tensor([[float(x0)]], dtype=torch.float64)
    orbit = [x]
    with torch.no_grad():
        for _ in range(n_steps):
            orbit.append(step(orbit[-1]))
        path = torch.cat(orbit)[:, 0]
        seen = path[torch.isfinite(path) & (path.abs() < 1e6)]
        low, high = window or (float(seen.min()), float(seen.max()))
        margin = 0.0 if window else 0.1 * (high - low) + 1e-9
        grid = torch.linspace(low - margin, high + margin, 400, dtype=torch.float64)[:, None]
        return Cobweb(get_tableau(solver).name, step_size, grid[:, 0], step(grid)[:, 0], path)


@dataclass(frozen=True, eq=False, repr=False)
class PhasePortrait(Result):
    """A one- or two-dimensional field on a grid, with its fixed points.

    Args:
        axes: the grid's coordinates, one array a dimension.
        slopes: F on it, shape (*grid, dimensions).
        points: fixed points in the window, shape (k, dimensions).
        kinds: what each is, with "stable" or "unstable" before it.
    """

    axes: list[np.ndarray]
    slopes: np.ndarray
    points: np.ndarray
    kinds: list[str]

    def plot(self, path: str | None = None) -> Any:
        """Draw it; see `resode.plots.phase_portrait`."""
        from resode import plots

        return plots.phase_portrait(self, path)


@checked
def phase_portrait(
    field: Callable[[Tensor], Tensor], *window: tuple[float, float], points: int = 41
) -> PhasePortrait:
    """The field over a window, one interval (low, high) a dimension, and its fixed points there.

    Raises:
        ValueError: not one or two intervals, or an empty one.

    Example:
        >>> phase_portrait(lambda x: x * (1 - x), (-0.5, 1.5)).kinds
        ['unstable node', 'stable node']
    """
    if len(window) not in (1, 2) or not all(low < high for low, high in window):
        raise ValueError(f"a phase portrait has one or two intervals (low, high), got {window}.")
    axes = [np.linspace(low, high, points) for low, high in window]
    grid = torch.as_tensor(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)).reshape(-1, len(window))
    with torch.no_grad():
        slopes = field(grid).reshape(*(points,) * len(window), len(window)).numpy()
    starts = grid[:: max(1, len(grid) // 25)]
    found = find_several_fixed_points(field, starts, max_points=24).points
    low, high = torch.tensor(window, dtype=found.dtype).T
    inside = found[((found >= low) & (found <= high)).all(1)]
    inside = inside[torch.argsort(inside[:, 0])] if len(inside) else inside
    kinds = []
    if len(inside):
        classes = classify(field, inside)
        words = ["stable" if s else "unstable" for s in classes.stable]
        kinds = [
            kind if kind in ("centre", "degenerate") else f"{word} {kind}"
            for word, kind in zip(words, classes.kind, strict=True)
        ]
    return PhasePortrait(axes, slopes, inside.numpy(), kinds)
