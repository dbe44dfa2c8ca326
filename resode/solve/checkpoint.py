"""Gradients through the steps in little memory: pieces of the solve are run again on the way back.

A piece keeps its start alone. Pieces of 1, 2, 3, … steps make √(2S) starts of S steps and hold at most
√(2S) steps at a time; for S known, pieces of √S do.

Source:
    Chen, Xu, Zhang & Guestrin, Training Deep Nets with Sublinear Memory Cost (2016).
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph as keeps_graph
from torch.autograd import Variable
from torch.utils.checkpoint import checkpoint

from resode.modes import own_random_state
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

    The graph of a piece holds this object weakly and the solution's last node holds it, where Python's
    collector sees it: a field that keeps its own solution is then no more than a cycle of Python objects. A
    gradient that can be differentiated again needs the pieces when the solution is gone: they then hold it.

    Args:
        f: the field, which counts.
        stats: of the whole solve, once they are known.
        pieces: all that were run.
        owners: for each, one function that gives this object, or None where it is gone.
    """

    f: Counted
    stats: Stats | None = None
    pieces: list[Callable[..., Any]] = field(default_factory=list)
    owners: list[list[Callable[[], Any]]] = field(default_factory=list)

    def __call__(self, piece: Callable[..., Any], *tensors: Any) -> Any:
        """What piece(second, *tensors) gives, second being whether it runs a second time."""
        ran, number, owner = False, len(self.pieces), [weakref.ref(self)]
        self.pieces.append(piece)
        self.owners.append(owner)

        def run(*tensors: Any) -> Any:
            nonlocal ran
            second, ran, recomputation = ran, True, owner[0]()
            assert recomputation is not None
            return recomputation.run(number, second, *tensors)

        return checkpoint(run, *tensors, use_reentrant=False)

    def run(self, number: int, second: bool, *tensors: Any) -> Any:
        """The piece of a number, counted."""
        if second and self.stats is None:
            raise ValueError(
                "gradient='checkpoint' keeps nothing that a gradient taken within the field could use, and "
                "func calls torch.autograd.grad. Take gradient='autograd' or 'adjoint'."
            )
        before = self.f.calls
        try:
            return self.pieces[number](second, *tensors)
        finally:
            if second and self.stats is not None:
                self.stats.nfe_backward += self.f.calls - before
                self.f.calls = before

    def outlive(self) -> None:
        """Lets the pieces hold this object, for a gradient of the gradient."""
        for owner in self.owners:
            owner[0] = lambda: self

    def finish(self, path: Tensor, stats: Stats) -> Tensor:
        """The whole solution, which now holds what the way back needs."""
        self.stats = stats
        return _Holding.apply(self, path)

    def check(self, t: Tensor, x: Tensor) -> None:
        """Refuses a field that gives something else the second time.

        Raises:
            ValueError: it draws from a generator of its own, or depends on how often it was called.
        """
        results = []
        for _ in range(2):
            with own_random_state(x.device):  # not without gradients: the field may take one of its own
                results.append(self.f(t, x).detach())
        first, second = results
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max()), equal_nan=True):
            raise ValueError(
                "gradient='checkpoint' evaluates the field again on the way back, and it gave another result "
                "at the same time and state: it has random or other state of its own. Draw from torch's "
                "default generator, which is set back, or take gradient='autograd'."
            )


class _Holding(torch.autograd.Function):
    """A tensor as it is; its node of the graph holds an object till a way back that frees the graph."""

    @staticmethod
    def forward(ctx: Any, held: object, x: Tensor) -> Tensor:
        ctx.held = held
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            ctx.held.outlive()
        if not keeps_graph():
            Variable._execution_engine.queue_callback(partial(setattr, ctx, "held", None))
        return None, grads[0]


def checkpointed_solve(
    tableau: ButcherTableau,
    recomputation: Recomputation,
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
        # The graph keeps the piece, so the piece must keep nothing that holds the graph: no state with it.
        begin, ends = copy.copy(solve), []
        begin.x, begin.k0 = begin.x.detach(), begin.k0.detach()

        def piece(second: bool, x: Tensor, k0: Tensor, begin: Adaptive, n: int, ends: list[Any]) -> Any:
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
                ends += [part, new_calls]
            masks = torch.from_numpy(within[:, asked]).to(x.device)
            return part.x, part.k0, asked.tolist(), values, masks

        x, k0, asked, values, masks = recomputation(
            partial(piece, begin=begin, n=n, ends=ends), solve.x, solve.k0
        )
        solve, new_calls = ends
        ends.clear()
        calls += new_calls
        solve.x, solve.k0 = x, k0
        for j, value, mask in zip(asked, values, masks.unbind(1), strict=True):
            path[j] = torch.where(mask.view(solve.column), value, path[j])
        n += 1
    return [*path, solve.x], replace(solve.progress, nfe=solve.progress.nfe + calls)


def checkpointed_steps(
    recomputation: Recomputation, advance: Callable[..., Tensor] = equal_steps
) -> Callable[..., Tensor]:
    """A function like `equal_steps`, in pieces of √n steps."""

    def in_pieces(tableau: ButcherTableau, f: Field, t: Time, x: Tensor, h: Time, n: int) -> Tensor:
        size, done = math.isqrt(n - 1) + 1, 0
        while done < n:
            steps = min(size, n - done)

            def piece(second: bool, x: Tensor, begin: Time = t + done * h, steps: int = steps) -> Tensor:
                return advance(tableau, f, begin, x, h, steps)

            x = recomputation(piece, x)
            done += steps
        return x

    return in_pieces
