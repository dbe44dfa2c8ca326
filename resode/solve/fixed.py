"""A fixed number of equal steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resode.solve.step import Field, Time, rk_step
from resode.tableaus import ButcherTableau


def equal_steps(tableau: ButcherTableau, f: Field, t: Time, x: Tensor, h: Time, n: int) -> Tensor:
    """The state after n steps of size h from (t, x)."""
    for i in range(n):
        x = rk_step(tableau, f, t + i * h, x, h)
    return x


def steps_between(start: float, end: float, step_size: float | None, n_steps: int | None) -> int:
    """How many equal steps to take: `n_steps`, or as few as keep each at most `step_size`.

    A quotient within rounding of a whole number counts as that number: 1 / 0.1 is 10 steps.
    """
    if n_steps is not None:
        return n_steps
    if step_size is None:
        return 1
    quotient = abs(end - start) / step_size
    return max(1, math.ceil(quotient * (1 - 4 * torch.finfo(torch.float64).eps)))


def fixed_solve(
    tableau: ButcherTableau,
    f: Field,
    x: Tensor,
    t: Tensor,
    *,
    step_size: float | None,
    n_steps: int | None,
) -> tuple[list[Tensor], int]:
    """States at every t, shape (T,), and the number of steps taken.

    The steps are floats unless t asks for a gradient: then the discrete solution is differentiated
    in t as it is in x.
    """
    times: list[float] = t.detach().tolist()
    path = [x]
    total = 0
    for i in range(len(times) - 1):
        n = steps_between(times[i], times[i + 1], step_size, n_steps)
        start, span = (t[i], t[i + 1] - t[i]) if t.requires_grad else (times[i], times[i + 1] - times[i])
        x = equal_steps(tableau, f, start, x, span / n, n)
        path.append(x)
        total += n
    return path, total
