r"""Residual blocks as solver steps: `ResidualStack` and `ODEBlock`.

A stack of pre-activation residual blocks x ← x + ηF_l(x), l = 0 … L−1, is forward Euler with step η
on dx/dt = F(t, x) over the depth time [0, Lη], where F(t, ·) = F_l for lη ≤ t < (l+1)η. Any other
method of `resode.METHODS` solves the same equation with the same weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from resode.solve.adaptive import Progress, adaptive_solve
from resode.solve.control import Control
from resode.solve.fixed import equal_steps
from resode.solve.gradient import GRADIENTS as SOLVE_GRADIENTS
from resode.solve.odeint import odeint
from resode.solve.options import NATIVE, tolerances
from resode.solve.result import Stats
from resode.solve.step import Counted
from resode.tableaus import METHODS, ButcherTableau

WEIGHTS = ("constant", "linear")
GRADIENTS = ("autograd", "checkpoint")


class ResidualStack(nn.Module):
    r"""A stack of residual blocks, advanced by any Runge-Kutta method.

    With `solver="euler"` and `substeps=1` it is the pre-activation ResNet x ← x + ηF_l(x), to the bit.

    Args:
        fields: one module shared by `depth` blocks, or a sequence of modules, one a block. Each is
            called as F(x), keeps x's shape, and must not change x in place.
        depth: the number of blocks L for a shared field; for a sequence its length, or None.
        solver: an explicit method's name in resode.METHODS. bosh3, fehlberg45, dopri5, tsit5 and
            dopri8 control their steps' error and stop at every block's end.
        step_size: η, the depth time of a block; positive (any finite number with `learn_step`).
        learn_step: make η a parameter of each block, `step_sizes`, starting from step_size; a start
            at 0 is ReZero.
        substeps: equal steps within a block; for adaptive solvers the fewest.
        weights: "constant": F_l on the whole of its block, every stage included. "linear": the
            parameters are nodes at lη with straight lines between them; the last block's are held.
        rtol: relative tolerance of an adaptive solver's step, per entry.
        atol: absolute tolerance likewise, in x's unit.
        per_sample: an adaptive solver gives each sample of the batch (dimension 0) its own step, so
            that an answer does not depend on its neighbours; False takes one step for the batch.
        gradient: "autograd" keeps every activation, "checkpoint" keeps each block's input and
            evaluates the block again on the way back.

    Raises:
        ValueError, TypeError: an argument is wrong; the message says the rule and what came.

    Note:
        Train-mode batch normalisation updates its running statistics once a block, at the first
        stage, whatever the solver. torch's Dropout is refused in training where a block takes more
        than one stage, because its mask would change within a step.

    Source:
        E, Commun. Math. Stat. 5 (2017); Haber & Ruthotto, Inverse Problems 34 (2018);
        Chen et al., Neural Ordinary Differential Equations (2018).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> stack = ResidualStack([nn.Linear(4, 4) for _ in range(3)], step_size=0.1)
        >>> x = torch.randn(2, 4)
        >>> euler = stack(x)
        >>> stack.solver = "rk4"                   # the same weights
        >>> stack(x).shape, stack.stats.nfe
        (torch.Size([2, 4]), 12)
    """

    def __init__(
        self,
        fields: nn.Module | Sequence[nn.Module],
        *,
        depth: int | None = None,
        solver: str = "euler",
        step_size: float = 1.0,
        learn_step: bool = False,
        substeps: int = 1,
        weights: str = "constant",
        rtol: float = 1e-3,
        atol: float = 1e-4,
        per_sample: bool = True,
        gradient: str = "autograd",
    ):
        super().__init__()
        shared = isinstance(fields, nn.Module) and not isinstance(fields, nn.ModuleList)
        modules: list[Any] = [fields] if shared else list(fields)  # type: ignore[arg-type]
        if not modules or not all(isinstance(m, nn.Module) for m in modules):
            kinds = ", ".join(sorted({type(m).__name__ for m in modules})) or "an empty sequence"
            raise TypeError(f"fields must be an nn.Module or a non-empty sequence of them, got {kinds}.")
        if shared and depth is None:
            raise ValueError("a shared field needs depth, the number of blocks that use it.")
        if depth is not None and (not isinstance(depth, int) or isinstance(depth, bool) or depth < 1):
            raise ValueError(f"depth must be an integer of at least 1, got {depth!r}.")
        if not shared and depth not in (None, len(modules)):
            raise ValueError(
                f"depth={depth} and {len(modules)} fields disagree: leave depth out, "
                "or pass the one module itself (not in a list) to share it."
            )
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}; got {weights!r}.")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}; got {gradient!r}.")
        if not math.isfinite(step_size) or (step_size <= 0 and not learn_step):
            raise ValueError(
                "step_size must be positive and finite (0 or less only with learn_step=True), "
                f"got {step_size}."
            )
        if weights == "linear":
            _check_same_structure(modules)
        self.fields = nn.ModuleList(modules)
        self.shared = shared
        self.depth: int = depth if shared else len(modules)  # type: ignore[assignment]
        self.step_size = float(step_size)
        self.learn_step = bool(learn_step)
        self.step_sizes = nn.Parameter(torch.full((self.depth,), self.step_size)) if learn_step else None
        self.weights = weights
        self.rtol, self.atol = tolerances(torch.float64, rtol, atol)
        self.per_sample = bool(per_sample)
        self.gradient = gradient
        self.solver = solver
        self.substeps = substeps
        self.stats: Stats | None = None

    @property
    def solver(self) -> str:
        """The method's name; assign another to swap it in place, weights and state_dict unchanged."""
        return self._tableau.name

    @solver.setter
    def solver(self, name: str) -> None:
        self._tableau = _explicit(name)

    @property
    def substeps(self) -> int:
        """Equal steps within a block; for adaptive solvers the fewest."""
        return self._substeps

    @substeps.setter
    def substeps(self, n: int) -> None:
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"substeps must be an integer of at least 1, got {n!r}.")
        self._substeps = n

    def block(self, index: int) -> nn.Module:
        """The field F_l of block l, 0 ≤ l < depth."""
        if not 0 <= index < self.depth:
            raise IndexError(f"block {index} of a stack of {self.depth}: blocks are 0 to {self.depth - 1}.")
        return self.fields[0 if self.shared else index]

    def forward(self, x: Tensor, return_path: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The state after the last block.

        Args:
            x: state, shape (B, *state), floating.
            return_path: also give the state before every block and after the last.

        Returns:
            x_L of x's shape, or (x_L, path) with path of shape (L + 1, *x.shape).

        Raises:
            ValueError, TypeError: F changes the state's shape, dtype or device.
            SolverError: an adaptive solver can't go on.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}.")
        self._check(x)
        path, cost = [x], _Cost()
        for index in range(self.depth):
            if self.gradient == "checkpoint" and torch.is_grad_enabled():
                x = self._checkpointed(index, x, cost)
            else:
                x = self._advance(index, x, cost)
            if return_path:
                path.append(x)
        if not torch.compiler.is_exporting():
            self.stats = cost.finish(whole=not self.per_sample)
        return (x, torch.stack(path)) if return_path else x

    def refine(self, k: int) -> ResidualStack:
        """A stack of k times the blocks and η/k, over the same depth time.

        Weights, and batch-norm statistics, are copied ("constant") or lie on the lines between the
        nodes ("linear"); a shared field stays one, with k times the depth. As k grows, the result
        approaches the flow at the solver's order where the field is smooth.

        Args:
            k: how many blocks each becomes, at least 1.

        Returns:
            A new stack; this one is unchanged.
        """
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"a stack is refined into a whole number of blocks a block, got k={k!r}.")
        finer = copy.deepcopy(self)
        finer.stats = None
        finer.depth = self.depth * k
        finer.step_size = self.step_size / k
        if self.step_sizes is not None:
            finer.step_sizes = nn.Parameter((self.step_sizes.detach() / k).repeat_interleave(k))
        if not self.shared:
            fields = [copy.deepcopy(field) for field in self.fields for _ in range(k)]
            if self.weights == "linear":
                for index, field in enumerate(fields):
                    left, part = divmod(index, k)
                    nodes = self._nodes(left)
                    with torch.no_grad():
                        for name, parameter in field.named_parameters():
                            parameter.copy_(torch.lerp(nodes[0][name], nodes[1][name], part / k))
            finer.fields = nn.ModuleList(fields)
        return finer

    def _nodes(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters at the start and the end of block `index`; the last block's are held."""
        following = self.block(min(index + 1, self.depth - 1))
        return dict(self.block(index).named_parameters()), dict(following.named_parameters())

    def _check(self, x: Tensor) -> None:
        if not self._tableau.adaptive:
            return
        if torch.finfo(x.dtype).bits < 32:
            raise TypeError(
                f"{self.solver} can't control an error in {x.dtype}; keep the state in float32 "
                "(under autocast F alone runs in a lower precision), or use a fixed-step solver."
            )
        if self.per_sample and x.ndim < 2:
            raise ValueError(
                f"per_sample=True needs x of shape (batch, *state), got {tuple(x.shape)}; "
                "add the batch dimension or set per_sample=False."
            )
        if self.per_sample and self.weights == "linear":
            raise ValueError(
                f"weights='linear' changes F within a block, so {self.solver} can't give each sample its own "
                "time; set per_sample=False, or use a fixed-step solver."
            )

    def _advance(self, index: int, x: Tensor, cost: _Cost) -> Tensor:
        """The state after block `index`; what it took is added to `cost`."""
        tableau, n = self._tableau, self.substeps
        several = tableau.adaptive or len(tableau.b) > 1 or n > 1
        field = Counted(self._field(index, several))
        eta = self.step_size if self.step_sizes is None else self.step_sizes[index].to(x.dtype)

        def scaled(s: Any, y: Tensor) -> Tensor:
            """ηF over the fraction s of the block, from 0 to 1."""
            return eta * field(s, y)

        try:
            if not tableau.adaptive:
                cost.steps += n
                if self.weights == "linear":
                    return equal_steps(tableau, scaled, 0.0, x, 1 / n, n)
                return equal_steps(tableau, field, 0.0, x, eta / n if n > 1 else eta, n)
            [y], cost.progress = adaptive_solve(
                tableau,
                scaled,
                x,
                [0.0, 1.0],
                Control(self.rtol, self.atol, max_step=1 / n, per_sample=self.per_sample),
                cost.progress,
            )
            return y
        finally:
            cost.calls += field.calls

    def _checkpointed(self, index: int, x: Tensor, cost: _Cost) -> Tensor:
        """As `_advance`, keeping the block's input alone; the way back evaluates the block again."""
        before, again = copy.copy(cost), False

        def advance(x: Tensor) -> Tensor:
            nonlocal again
            if not again:
                again = True
                return self._advance(index, x, cost)
            repeat = copy.copy(before)
            try:
                return self._advance(index, x, repeat)
            finally:  # checkpointing leaves by an exception once it has what it needs
                if cost.result is not None:
                    cost.result.nfe_backward += repeat.calls - before.calls

        norms = _norms(self.block(index))
        return checkpoint(
            advance, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(norms))
        )

    def _field(self, index: int, several: bool) -> Callable[[Any, Tensor], Any]:
        """F_l of (fraction of the block, state), whose running statistics move at the first call only."""
        module = self.block(index)
        norms: list[_BatchNorm] = []
        if several and module.training:
            norms = _norms(module)
            _refuse_dropout(module, self.solver)
        nodes = self._nodes(index) if self.weights == "linear" and not self.shared else None
        first = True

        def f(s: Any, y: Tensor) -> Any:
            nonlocal first
            watch = not torch.compiler.is_compiling() and not y.is_inference()
            version = y._version if watch else 0
            with nullcontext() if first or not norms else _frozen_statistics(norms):
                first = False
                if nodes is None:
                    dy = module(y)
                else:
                    between = {
                        name: torch.lerp(p, nodes[1][name], _like(s, p)) for name, p in nodes[0].items()
                    }
                    dy = torch.func.functional_call(module, between, (y,))
            if watch and y._version != version:
                raise ValueError(
                    f"a field must not change the state in place; {type(module).__name__} of block {index} "
                    "does. Its first operation is probably ReLU(inplace=True): use inplace=False there."
                )
            return dy

        return f

    def extra_repr(self) -> str:
        """What the module prints of itself beside its fields."""
        step = "learned" if self.learn_step else f"{self.step_size:g}"
        shared = ", shared field" if self.shared else ""
        return (
            f"depth={self.depth}{shared}, solver={self.solver!r}, step_size={step}, substeps={self.substeps}"
        )


class ODEBlock(nn.Module):
    """The state at t[1] of dx/dt = func(t, x), x(t[0]) the input: a layer of continuous depth.

    Args:
        func: the field, `func(t, x)` -> dx/dt of x's shape; usually an nn.Module. With an adaptive
            solver and `per_sample`, t has shape (B, 1, …, 1), else it is 0-D.
        t: start and end of the depth time.
        solver: an explicit method's name in resode.METHODS.
        rtol: relative tolerance of an adaptive solver's step, per entry.
        atol: absolute tolerance likewise, in x's unit.
        n_steps: equal steps from t[0] to t[1]; makes every solver take fixed steps, and is needed by
            those without error control.
        per_sample: an adaptive solver gives each sample of the batch (dimension 0) its own step.
        gradient: "autograd", through the solver's steps, or "adjoint", which keeps no steps and is
            approximate; func is an nn.Module then. See `resode.odeint_adjoint`.

    Raises:
        ValueError: an argument is wrong; the message says the rule and what came.

    Source:
        Chen et al., Neural Ordinary Differential Equations (2018).

    Example:
        >>> block = ODEBlock(lambda t, x: -x, solver="rk4", n_steps=10)
        >>> block(torch.ones(1, 1))
        tensor([[0.3679]])
    """

    def __init__(
        self,
        func: Callable[[Tensor, Tensor], Tensor],
        *,
        t: tuple[float, float] = (0.0, 1.0),
        solver: str = "dopri5",
        rtol: float = 1e-3,
        atol: float = 1e-4,
        n_steps: int | None = None,
        per_sample: bool = True,
        gradient: str = "autograd",
    ):
        super().__init__()
        start, end = (float(s) for s in t)
        if not (math.isfinite(start) and math.isfinite(end)) or start == end:
            raise ValueError(f"t must be two different finite times, got {t}.")
        if gradient not in SOLVE_GRADIENTS:
            raise ValueError(f"gradient must be one of {', '.join(SOLVE_GRADIENTS)}; got {gradient!r}.")
        self.func = func
        self.t = (start, end)
        self.rtol, self.atol = tolerances(torch.float64, rtol, atol)
        self.n_steps = n_steps
        self.per_sample = bool(per_sample)
        self.gradient = gradient
        self.solver = solver
        self.stats: Stats | None = None

    @property
    def solver(self) -> str:
        """The method's name; assign another to swap it in place."""
        return self._tableau.name

    @solver.setter
    def solver(self, name: str) -> None:
        tableau = _explicit(name)
        if not tableau.adaptive and self.n_steps is None:
            raise ValueError(
                f"{name} takes fixed steps: give n_steps, the number of steps from t[0] to t[1]."
            )
        self._tableau = tableau

    def forward(self, x: Tensor) -> Tensor:
        """The state at t[1], of x's shape (B, *state)."""
        t = torch.tensor(self.t, dtype=torch.float64, device=x.device)
        fixed = self.n_steps is not None
        y, self.stats = odeint(
            self.func,
            x,
            t,
            method=self._tableau,
            n_steps=self.n_steps,
            rtol=None if fixed else self.rtol,
            atol=None if fixed else self.atol,
            per_sample=self.per_sample and not fixed,
            gradient=self.gradient,
            return_stats=True,
        )
        return y[-1]

    def extra_repr(self) -> str:
        """What the module prints of itself beside its field."""
        steps = "" if self.n_steps is None else f", n_steps={self.n_steps}"
        return f"t={self.t}, solver={self.solver!r}{steps}"


class _Cost:
    """What a pass through a stack has taken so far, and where its adaptive solver stands."""

    def __init__(self) -> None:
        self.calls = 0
        self.steps = 0
        self.progress: Progress | None = None
        self.result: Stats | None = None

    def finish(self, whole: bool) -> Stats:
        """The statistics of the pass; a later recomputation adds to their nfe_backward."""
        if self.progress is None:
            self.result = Stats(self.calls, self.steps, self.steps, 0)
        elif whole:
            self.result = self.progress.stats().item()
        else:
            self.result = self.progress.stats()
        return self.result


def _norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms whose running statistics a call would move."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]


@contextmanager
def _frozen_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    """Within it, batch norms use the batch's statistics and leave the running ones alone.

    By momentum 0 rather than without running statistics, so that a recomputation for checkpointing
    saves the same tensors as the first evaluation did.
    """
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _refuse_dropout(module: nn.Module, solver: str) -> None:
    for name, m in module.named_modules():
        if isinstance(m, _DropoutNd) and m.training and m.p > 0:
            raise ValueError(
                f"{type(m).__name__} ({name or 'the field itself'}) draws a new mask at every stage, so "
                f"{solver} would solve no equation in training. Use stochastic depth, put Dropout between "
                "stacks, or train with Euler and substeps=1."
            )


def _check_same_structure(modules: Sequence[nn.Module]) -> None:
    first = {name: tuple(p.shape) for name, p in modules[0].named_parameters()}
    for index, module in enumerate(modules):
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        if shapes != first:
            odd = sorted(set(first.items()) ^ set(shapes.items()))[0]
            raise ValueError(
                "weights='linear' draws lines between the fields' parameters, so all must have the same: "
                f"block {index} and block 0 differ in {odd[0]} {odd[1]}."
            )


def _like(s: Any, p: Tensor) -> Any:
    return s.to(p.dtype) if isinstance(s, Tensor) else s


def _explicit(name: str) -> ButcherTableau:
    tableau = METHODS.get(name) if isinstance(name, str) else None
    if tableau is None or not tableau.explicit:
        raise ValueError(f"solver must be one of {', '.join(NATIVE)}; got {name!r}.")
    return tableau
