"""Gradients through the steps in little memory: pieces of the solve are run again on the way back.

A piece keeps its start alone. Pieces of 1, 2, 3, … steps make √(2S) starts of S steps and hold at most
√(2S) steps at a time; for S known, pieces of √S do.

Source:
    Chen, Xu, Zhang & Guestrin, Training Deep Nets with Sublinear Memory Cost (2016).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from resode.solve.adaptive import Adaptive, Progress
from resode.solve.control import NUMPY, Control
from resode.solve.dense import interpolate
from resode.solve.fixed import equal_steps
from resode.solve.result import Stats
from resode.solve.step import Counted, Field, Time
from resode.tableaus import ButcherTableau


@dataclass
class Recomputation:
    """Runs pieces, and once more when their gradient is asked for; those calls of f are `nfe_backward`.

    Args:
        f: the field, which counts.
        stats: of the whole solve, once they are known.
    """

    f: Counted
    stats: Stats | None = field(default=None)

    def __call__(self, piece: Callable[..., Any], *tensors: Any) -> Any:
        """What piece(again, *tensors) gives, again being whether it runs a second time."""
        again = False

        def run(*tensors: Any) -> Any:
            nonlocal again
            before, second, again = self.f.calls, again, True
            try:
                return piece(second, *tensors)
            finally:
                if second:
                    assert self.stats is not None
                    self.stats.nfe_backward += self.f.calls - before
                    self.f.calls = before

        return checkpoint(run, *tensors, use_reentrant=False)

    def check(self, t: Tensor, x: Tensor) -> None:
        """Refuses a field that gives something else the second time.

        Raises:
            ValueError: it draws from a generator of its own, or depends on how often it was called.
        """
        devices = [x.device] if x.is_cuda else []
        results = []
        for _ in range(2):
            with torch.no_grad(), torch.random.fork_rng(devices):
                results.append(self.f(t, x))
        first, second = results
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max()), equal_nan=True):
            raise ValueError(
                "gradient='checkpoint' evaluates the field again on the way back, and it gave another result "
                "at the same time and state: it has random or other state of its own. Draw from torch's "
                "default generator, which is set back, or take gradient='autograd'."
            )


def checkpointed_solve(
    tableau: ButcherTableau,
    again: Recomputation,
    f: Field,
    x: Tensor,
    times: Sequence[float] | np.ndarray,
    control: Control,
    resume: Progress | None,
) -> tuple[list[Tensor], Progress]:
    """As `adaptive_solve`, in pieces."""
    at = np.asarray(times, NUMPY[control.dtype])
    solve = Adaptive(tableau, f, x, at[0], at[-1], control, resume)
    outputs = at[1:-1].T  # (T,), or each sample's own, (B, T)
    path, n, calls = [x] * outputs.shape[-1], 1, 0
    while ((solve.end - solve.time) * solve.forward > 0).any():
        begin = copy.copy(solve)

        def piece(second: bool, x: Tensor, k0: Tensor, begin: Adaptive = begin, n: int = n) -> Any:
            nonlocal solve, calls
            part = copy.copy(begin)
            part.x, part.k0 = x, k0
            if second:
                part.control = replace(control, callbacks=None)
            steps = list(islice(part.steps(), n))
            low, high = (part.forward * s[:, None] for s in (begin.time, part.time))
            within = (part.forward * outputs > low) & (part.forward * outputs <= high)  # (B, T)
            asked = np.flatnonzero(within.any(0))
            wanted = part.forward * np.clip(part.forward * outputs[..., asked], low, high)
            values, new_calls = interpolate(tableau, f, steps, wanted, part.forward, control.per_sample)
            if not second:
                solve, calls = part, calls + new_calls
            masks = torch.from_numpy(within[:, asked]).to(x.device)
            return part.x, part.k0, asked.tolist(), values, masks

        x, k0, asked, values, masks = again(piece, solve.x, solve.k0)
        solve.x, solve.k0 = x, k0
        for j, value, mask in zip(asked, values, masks.unbind(1), strict=True):
            path[j] = torch.where(mask.view(solve.column), value, path[j])
        n += 1
    return [*path, solve.x], replace(solve.progress, nfe=solve.progress.nfe + calls)


def checkpointed_steps(
    again: Recomputation, advance: Callable[..., Tensor] = equal_steps
) -> Callable[..., Tensor]:
    """A function like `equal_steps`, in pieces of √n steps."""

    def in_pieces(tableau: ButcherTableau, f: Field, t: Time, x: Tensor, h: Time, n: int) -> Tensor:
        size, done = math.isqrt(n - 1) + 1, 0
        while done < n:
            steps = min(size, n - done)

            def piece(second: bool, x: Tensor, begin: Time = t + done * h, steps: int = steps) -> Tensor:
                return advance(tableau, f, begin, x, h, steps)

            x = again(piece, x)
            done += steps
        return x

    return in_pieces
