"""Steps of a size that is given: equal ones, or along a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.solve.dense import hermite
from resode.solve.host import moves, plain
from resode.solve.states import States
from resode.solve.step import Field, Time, explicit_step, rk_step
from resode.tableaus import ButcherTableau

Take = Callable[..., tuple[list[Tensor], Tensor]]
"""What takes a step, as `explicit_step` does."""

INTERPOLATIONS = ("linear", "cubic")


def equal_steps(tableau: ButcherTableau, f: Field, t: Time, x: Tensor, h: Time, n: int) -> Tensor:
    """The state after n steps of size h from (t, x)."""
    for i in range(n):
        x = rk_step(tableau, f, t + i * h, x, h)
    return x


def steps_between(
    start: float, end: float, step_size: float | None, n_steps: int | None, eps: float = 2.0**-52
) -> int:
    """How many equal steps to take: `n_steps`, or as few as keep each at most `step_size`.

    A quotient within rounding of a whole number counts as that number: 1 / 0.1 is 10 steps.
    """
    if n_steps is not None:
        return n_steps
    if step_size is None:
        return 1
    quotient = abs(end - start) / step_size
    return max(1, math.ceil(quotient * (1 - 4 * eps)))


def within(s: Time, low: Any, high: Any) -> Time:
    """The time s moved into [low, high], with the gradient of s; low and high floats, or tensors like s."""
    if isinstance(s, Tensor):
        return s - (s.detach() - s.detach().clamp(low, high))
    return min(max(s, low), high)


def opened(start: float, end: float, dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest time strictly between start and end.

    Each is a neighbour of its end in `dtype`, in which a field is given its time.
    """
    low, high = sorted((start, end))
    ends = torch.tensor([low, high], dtype=dtype)
    inner = torch.nextafter(ends, ends.flip(0))
    return float(inner[0]), float(inner[1])


@dataclass(frozen=True)
class Grid:
    """torchdiffeq's way to take fixed steps: along a grid, outputs interpolated between its points.

    Args:
        constructor: from (f, x, t) to the grid, which starts at t[0] and ends at t[-1].
        interp: "linear" or "cubic" between the grid's points.
        perturb: evaluate F just inside each step rather than at its ends, for fields that jump there.
    """

    constructor: Callable[[Field, Tensor, Tensor], Tensor]
    interp: str = "linear"
    perturb: bool = False

    def between(
        self, f: Field, s: Tensor | float, start: Time, x: Tensor, k0: Tensor, end: Time, x1: Tensor
    ) -> Tensor:
        """The state at s in a step from (start, x), slope k0, to (end, x1)."""
        fraction = (s - start) / (end - start)
        if self.interp == "linear":
            return x + fraction * (x1 - x)
        return hermite(fraction, end - start, x, k0, x1, f(end, x1))


def grid_of_size(step_size: float) -> Callable[[Any, Any, Tensor], Tensor]:
    """A grid constructor: steps of `step_size` from t[0], the last one cut short at t[-1]."""

    def constructor(f: Any, x: Any, t: Tensor) -> Tensor:
        start, end = plain(t)[[0, -1]].tolist()
        n = steps_between(start, end, step_size, None, torch.finfo(t.dtype).eps)
        offsets = torch.arange(n, dtype=t.dtype, device=t.device) * math.copysign(step_size, end - start)
        return torch.cat([t[0] + offsets, t[-1:]])

    return constructor


def fixed_solve(
    tableau: ButcherTableau,
    f: Field,
    x: Tensor,
    t: Tensor,
    *,
    step_size: float | None,
    n_steps: int | None,
    callback: Callable[[Tensor, Tensor, Tensor], object] | None = None,
    perturb: bool = False,
    advance: Callable[..., Tensor] = equal_steps,
    take: Take = explicit_step,
) -> tuple[States, int]:
    """States at every t, shape (T,), and the number of steps taken.

    The steps are floats unless t asks for a gradient: then the discrete solution is differentiated
    in t as it is in x. `advance` takes equal steps, as `equal_steps` does, and `take` those that a callback
    or perturb ask to see one by one.
    """
    times: list[float] = plain(t).tolist()
    path, total = States(len(times), x), 0
    path.append(x)
    for i in range(len(times) - 1):
        if times[i] == times[i + 1] and not moves(t):
            path.append(x)
            continue
        n = steps_between(times[i], times[i + 1], step_size, n_steps)
        start, span = (t[i], t[i + 1] - t[i]) if moves(t) else (times[i], times[i + 1] - times[i])
        if callback is None and not perturb:
            x = advance(tableau, f, start, x, span / n, n)
        else:
            for j in range(n):
                at = start + j * (span / n)
                x, _ = one_step(tableau, f, at, x, span / n, callback, perturb, take)
        path.append(x)
        total += n
    return path, total


def own_steps(
    tableau: ButcherTableau,
    f: Field,
    x: Tensor,
    t: Tensor,
    *,
    step_size: float | None,
    n_steps: int | None,
    advance: Callable[..., Tensor] = equal_steps,
) -> tuple[States, np.ndarray]:
    """As `fixed_solve`, where every sample has its own times: t of shape (T, B); the steps are counted (B,).

    A sample that needs fewer steps between two outputs than others waits at the second: its step is 0.
    """
    real, column = x.dtype.to_real(), (-1,) + (1,) * (x.ndim - 1)
    t = t.to(x.device)
    path, total = States(len(t), x), np.zeros(t.shape[1], np.int64)
    path.append(x)
    for start, end in pairwise(t):
        if not moves(t) and torch.equal(start, end):
            path.append(x)
            continue
        ends = zip(plain(start).tolist(), plain(end).tolist(), strict=True)
        n = np.array([steps_between(a, b, step_size, n_steps) for a, b in ends])
        begin, h = start.view(column), ((end - start) / torch.from_numpy(n).to(start)).view(column)
        if (n == n[0]).all():
            x = advance(tableau, f, begin, x, h.to(real), int(n[0]))
        else:
            count = torch.from_numpy(n).to(x.device).view(column)
            for j in range(n.max()):
                size = torch.where(j < count, h, 0.0)
                x = advance(tableau, f, begin + count.clamp(max=j) * h, x, size.to(real), 1)
        path.append(x)
        total += n
    return path, total


def grid_solve(
    tableau: ButcherTableau,
    f: Field,
    x: Tensor,
    t: Tensor,
    grid: Grid,
    callback: Callable[[Tensor, Tensor, Tensor], object] | None = None,
    take: Take = explicit_step,
) -> tuple[States, int]:
    """States at every t, shape (T,), T ≥ 2, and the number of steps taken along the grid."""
    points = checked_grid(grid.constructor(f, x, t), t)
    nodes: Sequence[Time] = list(points) if moves(points) else points.tolist()
    outputs: Sequence[Time] = list(t) if moves(t) else t.tolist()
    forward = 1 if t[-1] > t[0] else -1
    path, done = States(len(t), x), 1
    path.append(x)
    for start, end in pairwise(nodes):
        x1, k0 = one_step(tableau, f, start, x, end - start, callback, grid.perturb, take)
        while done < len(outputs) and (end - outputs[done]) * forward >= 0:
            s = outputs[done]
            path.append(x1 if s == end else grid.between(f, s, start, x, k0, end, x1))
            done += 1
        x = x1
    return path, len(nodes) - 1


def one_step(
    tableau: ButcherTableau,
    f: Field,
    start: Time,
    x: Tensor,
    h: Time,
    callback: Callable[[Tensor, Tensor, Tensor], object] | None = None,
    perturb: bool = False,
    take: Take = explicit_step,
) -> tuple[Tensor, Tensor]:
    """The state one step later, and F at the step's start."""
    if callback is not None:
        real = x.dtype.to_real()
        callback(torch.as_tensor(start, dtype=real), x, torch.as_tensor(h, dtype=real).abs())
    g = f
    if perturb:
        first, last = (float(plain(s)) if isinstance(s, Tensor) else s for s in (start, start + h))
        low, high = opened(first, last, x.dtype.to_real())

        def inside(s: Time, y: Tensor) -> Tensor:
            return f(within(s, low, high), y)

        g = inside

    k0 = None if tableau.explicit else g(start, x)
    k, x1 = take(tableau, g, [start + c * h if c else start for c in tableau.stage_times], x, h, k0)
    return x1, k[0] if k0 is None else k0


def checked_grid(points: Any, t: Tensor) -> Tensor:
    """What a grid constructor returned, refused where it is no grid for the times t."""
    if not isinstance(points, Tensor) or points.ndim != 1 or len(points) < 2:
        got = f"shape {tuple(points.shape)}" if isinstance(points, Tensor) else type(points).__name__
        raise ValueError(f"grid_constructor must return a tensor of shape (n,), n ≥ 2, got {got}.")
    path, t, points = points, plain(t), plain(points)
    steps = points.diff() * (1 if t[-1] > t[0] else -1)
    if points[0] != t[0] or points[-1] != t[-1] or not (steps > 0).all():
        raise ValueError(
            f"grid_constructor must return a grid that runs strictly from t[0]={float(t[0]):g} to "
            f"t[-1]={float(t[-1]):g}; got one from {float(points[0]):g} to {float(points[-1]):g}"
            f"{'' if (steps > 0).all() else ', not monotone'}."
        )
    return path
