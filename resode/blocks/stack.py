"""A stack of residual blocks that any Runge-Kutta method advances."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from resode.blocks.frozen import (
    FrozenDuringStep,
    FrozenStatistics,
    checkpoints,
    draw_scale,
    evaluate,
    moving_norms,
    probability,
    refuse_batch_norm,
    refuse_dropout,
    refuse_graphs,
    refuse_low_precision,
    takes_time,
)
from resode.calls import kind_of
from resode.checks import check_whole, checked, did_you_mean, one_of
from resode.formulas import Cost, Shape, cost_of
from resode.solve.adaptive import Progress, adaptive_solve
from resode.solve.control import Control
from resode.solve.fixed import equal_steps
from resode.solve.implicit.steps import ImplicitStep, steps_by
from resode.solve.options import NATIVE, tolerances
from resode.solve.result import NewtonNotConverged, NonFiniteState, Stats
from resode.solve.step import Counted, all_finite
from resode.state_dicts import Checked
from resode.symbols import one_module
from resode.tableaus import METHODS, ON_DEMAND, ButcherTableau, on_demand
from resode.whole_blocks import first_time, warned

WEIGHTS = ("constant", "linear")
GRADIENTS = ("autograd", "checkpoint")
LEARN_STEP = (False, True, "block", "channel")


class ResidualStack(Checked):
    r"""A stack of residual blocks, advanced by any Runge-Kutta method.

    With `solver="euler"` and `substeps=1` it is the pre-activation ResNet x ← x + ηF_l(x), to the bit.

    Args:
        fields: one module shared by `depth` blocks, or a sequence of modules, one a block. Each is
            called as F(x), keeps x's shape, and must not change x in place. One whose forward has two
            required positional arguments is called as F(t, x), t the depth time in x's real dtype: lη at
            block l's start, 0-D, or (B, 1, …, 1) where each sample has its own steps.
        depth: the number of blocks L for a shared field; for a sequence its length, or None.
        solver: a method's name in resode.METHODS, or a tableau. bosh3, fehlberg45, dopri5, tsit5, dopri8,
            sdirk2, trbdf2, kvaerno3, kvaerno5 and radau5 control their steps' error and stop at every
            block's end. Implicit ones solve for their stages by Newton's method, each sample its own; the
            gradient is that of the solution, and keeps no iteration.
        step_size: η, the depth time of a block; positive (any finite number with `learn_step`).
        learn_step: make η a parameter, `step_sizes`, that starts from step_size: "block" (or True) one
            of each block, shape (L,); "channel" one of each channel (dimension 1 of x) of each block,
            (L, channels). A start at 0 is ReZero or SkipInit, a small one with "channel" LayerScale.
        channels: of x, for learn_step="channel"; where None, as the fields' first layer says.
        substeps: equal steps within a block; for adaptive solvers the fewest.
        weights: "constant": F_l on the whole of its block, every stage included. "linear": the
            parameters are nodes at lη with straight lines between them; the last block's are held.
        rtol: relative tolerance of an adaptive solver's step, per entry.
        atol: absolute tolerance likewise, in x's unit.
        per_sample: an adaptive solver gives each sample of the batch (dimension 0) its own step, so
            that an answer does not depend on its neighbours; False takes one step for the batch.
        gradient: "autograd" keeps every activation, "checkpoint" keeps the inputs of some √L segments
            and evaluates each again on the way back; torch.compile chooses for itself what to keep.
        stochastic_depth: the probability to drop a block for a sample in training, one for all or a
            sequence with one a block. With Φ(x) what the solver makes of x in the block, x becomes
            x + (Φ(x) − x) m / (1 − p), where m is 0 or 1, drawn once a block call and sample: on
            average Φ(x), whatever the solver and its substeps.
        check_finite: look at the state after every step of a fixed-step solver, and raise NonFiniteState
            with the block and the step where it is not finite; adaptive solvers always do.

    Raises:
        ValueError, TypeError: an argument is wrong; the message says the rule and what came.

    Note:
        Train-mode batch normalisation updates its running statistics once a block, at the first
        stage, whatever the solver; in evaluation the statistics are interpolated as the weights are.
        torch's Dropout is refused in training where a block takes more than one stage, because its mask
        would change within a step; `StochasticDepth` in a field holds its mask through the block.

    Source:
        E, Commun. Math. Stat. 5 (2017); Haber & Ruthotto, Inverse Problems 34 (2018);
        Chen et al., Neural Ordinary Differential Equations (2018). ReZero: Bachlechner et al. (2020),
        arXiv:2003.04887; SkipInit: De & Smith (2020), arXiv:2002.10444; LayerScale: Touvron et al.
        (2021), arXiv:2103.17239; stochastic depth: Huang et al. (2016), arXiv:1603.09382.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> stack = ResidualStack([nn.Linear(4, 4) for _ in range(3)], step_size=0.1)
        >>> x = torch.randn(2, 4)
        >>> euler = stack(x)
        >>> stack.solver = "rk4"                   # the same weights
        >>> stack(x).shape, stack.stats.nfe
        (torch.Size([2, 4]), 12)
    """

    @checked
    def __init__(
        self,
        fields: nn.Module | Sequence[nn.Module],
        *,
        depth: int | None = None,
        solver: str | ButcherTableau = "euler",
        step_size: float = 1.0,
        learn_step: bool | str = False,
        channels: int | None = None,
        substeps: int = 1,
        weights: str = "constant",
        rtol: float = 1e-3,
        atol: float = 1e-4,
        per_sample: bool = True,
        gradient: str = "autograd",
        stochastic_depth: float | Sequence[float] = 0.0,
        check_finite: bool = False,
    ):
        super().__init__()
        shared = isinstance(fields, nn.Module) and not isinstance(fields, nn.ModuleList)
        listed = not shared and isinstance(fields, Iterable)
        modules: list[Any] = list(fields) if listed else [fields]  # type: ignore[arg-type]
        if not modules or not all(isinstance(m, nn.Module) for m in modules):
            kinds = ", ".join(sorted({type(m).__name__ for m in modules})) or "an empty sequence"
            raise TypeError(f"fields must be an nn.Module or a non-empty sequence of them, got {kinds}.")
        if shared and depth is None:
            hint = _parts_of(fields)
            raise ValueError(f"a shared field needs depth, the number of blocks that use it.{hint}")
        if depth is not None:
            depth = check_whole("depth", depth, 1)
        if not shared and depth not in (None, len(modules)):
            raise ValueError(
                f"depth={depth} and {len(modules)} fields disagree: leave depth out, "
                "or pass the one module itself (not in a list) to share it."
            )
        one_of("weights", weights, WEIGHTS)
        one_of("gradient", gradient, GRADIENTS)
        one_of("learn_step", learn_step, LEARN_STEP)
        if channels is not None and learn_step != "channel":
            raise ValueError(
                "channels says how many steps a block learns, and so needs learn_step='channel'."
            )
        if weights == "linear":
            _check_same_structure(modules)
        self.fields = nn.ModuleList(modules)
        self.shared = shared
        self.depth: int = depth if shared else len(modules)  # type: ignore[assignment]
        self.learn_step = "block" if learn_step is True else learn_step
        self.step_sizes = None
        self.step_size = step_size
        if learn_step:
            each = () if self.learn_step == "block" else (_channels(modules[0], channels),)
            self.step_sizes = nn.Parameter(torch.full((self.depth, *each), self.step_size))
        self.stochastic_depth = _drop_rates(stochastic_depth, self.depth)
        self.weights = weights
        self.rtol, self.atol = tolerances(torch.float64, rtol, atol)
        self.per_sample = bool(per_sample)
        self.check_finite = bool(check_finite)
        self.timed = tuple(map(takes_time, modules))
        """Which of `fields` are called with the depth time."""
        if any(self.timed) and self.learn_step == "channel":
            raise ValueError(
                "a field of (t, x) needs one depth time, and learn_step='channel' learns one a channel: "
                "take learn_step='block', or fields of x."
            )
        self.gradient = gradient
        self.solver = solver
        self.substeps = substeps
        self.stats: Stats | None = None
        self.evaluations: list[int] | None = None
        """How often the last call evaluated each block's field, on the whole batch."""

    @property
    def solver(self) -> str:
        """The method's name; assign another to swap it in place, weights and state_dict unchanged."""
        return self._tableau.name

    @solver.setter
    def solver(self, name: str | ButcherTableau) -> None:
        self._tableau = solver_method(name)
        self.evaluations = None

    @property
    def tableau(self) -> ButcherTableau:
        """The method itself, which its name need not tell of one that was designed or made by hand."""
        return self._tableau

    @property
    def step_size(self) -> float:
        """η, the depth time of a block; where it is learnt, where it started from, and then not to be set."""
        return self._step_size

    @step_size.setter
    def step_size(self, eta: float) -> None:
        if self.step_sizes is not None:
            raise ValueError("this stack learns its steps: set the parameter step_sizes, or build it anew.")
        if isinstance(eta, bool | str) or not hasattr(eta, "__float__"):
            raise TypeError(f"step_size must be a number, got {eta!r}.")
        if not math.isfinite(eta) or (eta <= 0 and not self.learn_step):
            raise ValueError(
                f"step_size must be positive and finite (0 or less only with learn_step=True), got {eta}."
            )
        self._step_size = float(eta)

    @property
    def substeps(self) -> int:
        """Equal steps within a block; for adaptive solvers the fewest."""
        return self._substeps

    @substeps.setter
    def substeps(self, n: int) -> None:
        self._substeps = check_whole("substeps", n, 1)

    def __len__(self) -> int:
        """The number of blocks."""
        return self.depth

    def __iter__(self) -> Iterator[nn.Module]:
        """The field of every block, in order; a shared one as often as it is used."""
        return (self.field(index) for index in range(self.depth))

    def __getitem__(self, index: int) -> nn.Module:
        """The field of block `index`; negative numbers count from the end."""
        if isinstance(index, slice):
            raise TypeError(
                "a stack gives the field of one block, stack[l]; for several write list(stack)[a:b]."
            )
        whole = check_whole("the block", index)
        return self.field(whole + self.depth if whole < 0 else whole)

    def field(self, index: int) -> nn.Module:
        """The field F_l of block l, 0 ≤ l < depth."""
        if not 0 <= index < self.depth:
            raise IndexError(f"block {index} of a stack of {self.depth}: blocks are 0 to {self.depth - 1}.")
        return self.fields[0 if self.shared else index]

    @one_module
    def forward(self, x: Tensor, return_path: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The state after the last block.

        Args:
            x: state, shape (B, *state), floating.
            return_path: also give the state before every block and after the last.

        Returns:
            x_L of x's shape, or (x_L, path) with path of shape (L + 1, *x.shape).

        Raises:
            ValueError, TypeError: F changes the state's shape, dtype or device.
            SolverError: an adaptive solver can't go on; NewtonNotConverged where an implicit block has no
            solution, as where ηλ = 1 for an eigenvalue λ of the field, which it names.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating tensor, got {kind_of(x)}.")
        self._check(x)
        path, cost = [x], _Cost()
        if self._tableau.adaptive or not self._tableau.explicit:
            refuse_graphs(
                f"{self.solver} {'iterates' if not self._tableau.explicit else 'chooses its steps'} by"
            )
        elif self.check_finite:
            refuse_graphs("check_finite=True looks at", "Set the stack's check_finite = False")
        with warned(self.fields) if first_time(self) else nullcontext():
            if checkpoints(self.gradient):
                # L/k inputs and, one segment at a time, k blocks that save some 4 states an evaluation.
                size = max(1, round(math.sqrt(self.depth / (4 * len(self._tableau.b) * self.substeps))))
                for first in range(0, self.depth, size):
                    path += self._checkpointed(
                        range(self.depth)[first : first + size], path[-1], cost, return_path
                    )
            else:
                path += self._through(range(self.depth), x, cost, return_path)
        x = path[-1]
        if not torch.compiler.is_exporting():
            self.stats = cost.finish(whole=not self.per_sample)
            self.evaluations = cost.evaluations
        return (x, torch.stack(path)) if return_path else x

    def advance(self, index: int, x: Tensor) -> Tensor:
        """The state after block `index` alone, from the state x before it; of x's shape."""
        self._check(x)
        self.field(index)  # which says where there is no such block
        return self._through(range(index, index + 1), x, _Cost(), False)[0]

    def refine(self, k: int) -> ResidualStack:
        """A stack of k times the blocks and η/k, over the same depth time.

        Weights, and batch-norm statistics, are copied ("constant") or lie on the lines between the
        nodes ("linear"); a shared field stays one, with k times the depth. As k grows, the result
        approaches the flow at the solver's order where the field is smooth. Each block keeps the
        probability of stochastic depth of the one it came from.

        Args:
            k: how many blocks each becomes, at least 1.

        Returns:
            A new stack; this one is unchanged.
        """
        k = check_whole("k", k, 1)
        origins = [index for index in range(self.depth) for _ in range(k)]
        finer = self._rebuilt(origins, self.step_size / k)
        if self.step_sizes is not None:
            steps = (self.step_sizes.detach() / k).repeat_interleave(k, 0)
            finer.step_sizes = nn.Parameter(steps, self.step_sizes.requires_grad)
        if self.weights == "linear" and not self.shared:
            with torch.no_grad():
                for index, field in enumerate(finer.fields):
                    left, part = divmod(index, k)
                    start, end = self._nodes(left, statistics=True)
                    for name, value in _node(field, statistics=True).items():
                        value.copy_(torch.lerp(start[name], end[name], part / k))
        return finer

    def coarsen(self, k: int) -> ResidualStack:
        """A stack of every k-th block with step kη, over the same depth time; it undoes `refine(k)`.

        Each new block has the weights, and batch-norm statistics, of the first of the k that it stands
        for; learnt steps are added up. After `refine(k)` the weights are the old ones to the bit, the step
        sizes to rounding.

        Args:
            k: how many blocks become one; it divides the depth.

        Returns:
            A new stack; this one is unchanged.

        Raises:
            ValueError: k does not divide the depth.
        """
        k = check_whole("k", k, 1)
        if self.depth % k:
            raise ValueError(
                f"a stack of {self.depth} blocks is coarsened by a whole number that divides {self.depth}, "
                f"got k={k}."
            )
        coarser = self._rebuilt(list(range(0, self.depth, k)), self.step_size * k)
        if self.step_sizes is not None:
            sizes = self.step_sizes.detach()
            coarser.step_sizes = nn.Parameter(
                sizes.unflatten(0, (-1, k)).sum(1), self.step_sizes.requires_grad
            )
        return coarser

    def cost(self, shape: Shape) -> Cost:
        """Parameters and multiply-adds for samples of this shape, by the fields' formulas.

        F counts as often as the solver evaluates it: depth · substeps · stages for fixed steps, and as
        in the last call for an adaptive solver.

        Args:
            shape: of one sample, without the batch.

        Raises:
            ValueError: an adaptive or implicit solver, and no call since it was set.
            TypeError: a field without formula; see `resode.formulas.cost_of`.

        Example:
            >>> from resode.fields import ConvField
            >>> stack = ResidualStack(ConvField(16, norm="group"), depth=3, solver="rk4")
            >>> stack.cost((16, 32, 32)).macs == 3 * 4 * (2 * 9 * 16 * 16) * 32 * 32
            True
        """
        evaluations = self.evaluations
        if not self._tableau.adaptive and self._tableau.explicit:
            evaluations = [self.substeps * (self._tableau.b_row[-1][0] + 1)] * self.depth
        if evaluations is None:
            raise ValueError(
                f"how often {self.solver} evaluates a field depends on the state: call the stack first, "
                "or set a fixed-step solver."
            )
        costs = {field: cost_of(field, shape) for field in self.fields}
        parameters = sum(cost.parameters for cost in costs.values())
        parameters += 0 if self.step_sizes is None else self.step_sizes.numel()
        macs = sum(costs[self.field(index)].macs * n for index, n in enumerate(evaluations))
        return Cost(parameters, macs, shape)

    def _rebuilt(self, origins: list[int], step_size: float) -> ResidualStack:
        """A copy whose blocks have copies of the fields of these blocks."""
        fields = nn.ModuleList(copy.deepcopy(self.fields[i]) for i in ([0] if self.shared else origins))
        other = copy.deepcopy(self, {id(self.fields): fields})  # which takes these for the fields' copies
        other.stats = other.evaluations = None
        other.depth, other._step_size = len(origins), step_size
        other.timed = tuple(map(takes_time, fields))
        other.stochastic_depth = tuple(self.stochastic_depth[index] for index in origins)
        return other

    def _nodes(self, index: int, statistics: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is interpolated, at the start and the end of block `index`; the last block's is held."""
        following = self.field(min(index + 1, self.depth - 1))
        return _node(self.field(index), statistics), _node(following, statistics)

    def _check(self, x: Tensor) -> None:
        if not self._tableau.adaptive:
            return
        refuse_low_precision(self.solver, x.dtype)
        if self.per_sample and (x.ndim < 2 or len(x) == 0):
            raise ValueError(
                "per_sample=True needs x of shape (batch, *state) with at least one sample, got "
                f"{tuple(x.shape)}; add the batch dimension or set per_sample=False."
            )
        if self.per_sample and self.weights == "linear" and not self.shared:
            raise ValueError(
                f"weights='linear' changes F within a block, so {self.solver} can't give each sample its own "
                "time; set per_sample=False, or use a fixed-step solver."
            )

    def _through(self, blocks: range, x: Tensor, cost: _Cost, every: bool) -> list[Tensor]:
        """The states after each of the blocks, or after the last one alone."""
        states = []
        for index in blocks:
            p = self.stochastic_depth[index]
            x = self._advance(index, x, cost, draw_scale(p, x) if p and self.training else None)
            states = [*states, x] if every else [x]
        return states

    def _advance(self, index: int, x: Tensor, cost: _Cost, scale: Tensor | None) -> Tensor:
        """The state after block `index`; what it took is added to `cost`."""
        tableau, n = self._tableau, self.substeps
        several = tableau.adaptive or len(tableau.b) > 1 or n > 1 or not tableau.explicit
        eta = self._step(index, x)
        # For fixed steps s is a depth time from the block's start on; else the fraction of the block.
        fractions = tableau.adaptive or self.weights == "linear"
        clock = partial(self._time, index, eta if fractions else 1.0) if self._is_timed(index) else None
        f = self._field(index, several, None if several else scale, clock)
        field = Counted(f, several)

        def scaled(s: Any, y: Tensor) -> Tensor:
            """ηF over the fraction s of the block, from 0 to 1."""
            return eta * field(s, y)

        take: ImplicitStep | None = None
        try:
            if not tableau.adaptive:
                cost.steps += n
                advance: Callable[..., Tensor] = equal_steps
                if not tableau.explicit:
                    fractions = fractions or isinstance(eta, Tensor)
                    take = ImplicitStep(tableau, self.per_sample and x.ndim > 1)
                    advance = steps_by(take)
                g, h = (scaled, 1 / n) if fractions else (field, eta / n if n > 1 else eta)
                if self.check_finite:
                    y = self._checked_steps(index, g, x, h, advance)
                else:
                    y = advance(tableau, g, 0.0, x, h, n)
            else:
                [y], cost.progress = adaptive_solve(
                    tableau,
                    scaled,
                    x,
                    [0.0, 1.0],
                    Control(self.rtol, self.atol, max_step=1 / n, per_sample=self.per_sample),
                    cost.progress,
                )
        except NewtonNotConverged as error:
            error.args = (f"block {index} ({type(self.field(index)).__name__}): {error}",)
            raise
        finally:
            cost.evaluations.append(field.calls)
            if take is not None:
                cost.implicit = cost.implicit + take.total
        return y if scale is None or not several else x + scale * (y - x)

    def _checked_steps(
        self,
        index: int,
        f: Callable[[Any, Tensor], Tensor],
        x: Tensor,
        h: Any,
        advance: Callable[..., Tensor],
    ) -> Tensor:
        """As `equal_steps`, looking at the state after each."""
        for i in range(self.substeps):
            before, x = x, advance(self._tableau, f, i * h, x, h, 1)
            if not all_finite(x):
                entry = (~torch.isfinite(x.detach())).nonzero()[0].tolist()
                cause = "" if all_finite(before) else " The state was not finite before it."
                value, kind = x.detach()[tuple(entry)].item(), type(self.field(index)).__name__
                raise NonFiniteState(
                    f"block {index} ({kind}), step {i + 1} of {self.substeps}: the state is {value} at entry "
                    f"{entry}.{cause} Check the weights of this block's field, or take a smaller step.",
                    sample=entry[0] if entry else None,
                )
        return x

    def _is_timed(self, index: int) -> bool:
        """Whether the field of a block takes the depth time."""
        return self.timed[0 if self.shared else index]

    def _time(self, index: int, unit: Any, s: Any, x: Tensor) -> Tensor:
        """The depth time at s units from the start of a block, as a field takes it."""
        start: Any = index * self._step_size
        if self.step_sizes is not None:
            start = self.step_sizes[:index].sum().to(x.dtype)
        time = start + unit * s
        return torch.as_tensor(time, dtype=x.dtype.to_real(), device=x.device)

    def _step(self, index: int, x: Tensor) -> Any:
        """η of block `index`: a number, or a tensor that broadcasts to x."""
        if self.step_sizes is None:
            return self.step_size
        eta = self.step_sizes[index].to(x.dtype)
        if eta.ndim == 0:
            return eta
        if x.ndim < 2 or x.shape[1] != len(eta):
            raise ValueError(
                f"this stack learns one step for each of {len(eta)} channels, dimension 1 of the state: "
                f"got x {tuple(x.shape)}. Build it with channels= those of x."
            )
        return eta.reshape(-1, *[1] * (x.ndim - 2))

    def _checkpointed(self, blocks: range, x: Tensor, cost: _Cost, every: bool) -> list[Tensor]:
        """As `_through`, keeping the input alone; the way back goes through the blocks again."""
        progress, ran = cost.progress, False

        def through(x: Tensor) -> list[Tensor]:
            nonlocal ran
            if not ran:
                ran = True
                return self._through(blocks, x, cost, every)
            repeat = _Cost(progress)
            try:
                return self._through(blocks, x, repeat, every)
            finally:  # checkpointing leaves by an exception once it has what it needs
                if cost.result is not None:
                    cost.result.nfe_backward += sum(repeat.evaluations)

        norms = [norm for index in blocks for norm in moving_norms(self.field(index))]
        return checkpoint(
            through, x, use_reentrant=False, context_fn=lambda: (nullcontext(), FrozenStatistics(norms))
        )

    def _field(
        self,
        index: int,
        several: bool,
        scale: Tensor | None,
        clock: Callable[[Any, Tensor], Tensor] | None = None,
    ) -> Callable[[Any, Tensor], Any]:
        """F_l of (s, state), times `scale`; one block call's. With a clock F_l takes the time of s too."""
        module = self.field(index)
        nodes = self._nodes(index) if self.weights == "linear" and not self.shared else None
        held = None
        if several and module.training:
            refuse_dropout(module, self.solver)
            if not self._tableau.explicit:
                refuse_batch_norm(module, self.solver)
            held = FrozenDuringStep(module)

        def f(s: Any, y: Tensor) -> Any:
            t = None if clock is None else clock(s, y)
            with nullcontext() if held is None else held.evaluation():
                if nodes is None or (isinstance(s, float) and s == 0):  # a stage at the node itself
                    dy = evaluate(module, y, index, t=t)
                else:
                    between = {
                        name: torch.lerp(p, nodes[1][name], _like(s, p)) for name, p in nodes[0].items()
                    }
                    dy = evaluate(module, y, index, between, t)
            return dy if scale is None else dy * scale

        return f

    def extra_repr(self) -> str:
        """What the module prints of itself beside its fields."""
        step = f"learned by {self.learn_step}" if self.learn_step else f"{self.step_size:g}"
        shared = ", shared field" if self.shared else ""
        return (
            f"depth={self.depth}{shared}, solver={self.solver!r}, step_size={step}, substeps={self.substeps}"
        )


class _Cost:
    """What a pass through a stack has taken so far, and where its adaptive solver stands."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.evaluations: list[int] = []
        self.steps = 0
        self.implicit: Any = 0  # the four counts of an implicit method in fixed steps, (4, B)
        self.progress = progress
        self.result: Stats | None = None

    def finish(self, whole: bool) -> Stats:
        """The statistics of the pass; a later recomputation adds to their nfe_backward."""
        if self.progress is None:
            self.result = Stats(sum(self.evaluations), self.steps, self.steps, 0)
            if not isinstance(self.implicit, int):
                counts = torch.from_numpy(self.implicit)
                names = ("n_jacobians", "n_factorisations", "n_newton", "n_linear")
                for name, row in zip(
                    names, counts if counts.shape[1] > 1 else counts[:, 0].tolist(), strict=True
                ):
                    setattr(self.result, name, row)
        elif whole:
            self.result = self.progress.stats().item()
        else:
            self.result = self.progress.stats()
        return self.result


def _node(field: nn.Module, statistics: bool) -> dict[str, Tensor]:
    """What weights="linear" interpolates of a field: parameters, and statistics that batch norms use.

    Those that a call would move are taken along with `statistics` only.
    """
    node: dict[str, Tensor] = dict(field.named_parameters())
    for name, module in field.named_modules():
        if isinstance(module, _BatchNorm) and (statistics or not module.training):
            for key in ("running_mean", "running_var"):
                value = getattr(module, key)
                if value is not None:
                    node[f"{name}.{key}" if name else key] = value
    return node


def _drop_rates(p: float | Sequence[float], depth: int) -> tuple[float, ...]:
    """The probability to drop each block."""
    rates = tuple(p) if isinstance(p, Iterable) and not isinstance(p, str) else (p,) * depth
    if len(rates) != depth:
        raise ValueError(
            f"stochastic_depth must be one probability, or one a block: got {len(rates)} for {depth} blocks."
        )
    return tuple(probability("stochastic_depth", rate) for rate in rates)


def _channels(field: nn.Module, channels: int | None) -> int:
    """The number of channels of a field's state: as given, or as its first layer that says so."""
    if channels is None:
        names = ("channels", "width", "size", "in_channels", "in_features", "num_features", "num_channels")
        found = (getattr(m, name, None) for m in field.modules() for name in names)
        channels = next((n for n in found if isinstance(n, int)), None)
        if channels is None:
            raise ValueError("learn_step='channel' needs channels=, the size of dimension 1 of the state.")
    return check_whole("channels", channels, 1)


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
        pairs = zip_longest(modules[0].named_modules(), module.named_modules())
        for one, other in pairs:
            kinds = [
                "nothing" if m is None else f"{type(m[1]).__name__}({m[1].extra_repr()})"
                for m in (one, other)
            ]
            if kinds[0] != kinds[1]:
                name = (one or other)[0]
                raise ValueError(
                    "weights='linear' takes one field with parameters that change in depth, so all must have "
                    f"the same layers: block {index} has {kinds[1]} where block 0 has {kinds[0]}"
                    f"{f' ({name})' if name else ''}."
                )


def _like(s: Any, p: Tensor) -> Any:
    return s.to(p.dtype) if isinstance(s, Tensor) else s


def _parts_of(module: Any) -> str:
    """What else was meant by a sequence that is a module."""
    if not isinstance(module, nn.Sequential):
        return ""
    return (
        f" An nn.Sequential is one field: for a block for each of its {len(module)} children, if these are "
        "branches F(x) without the shortcut, pass list(sequential). Whole blocks that add x themselves are "
        "made stacks of by resode.convert."
    )


def solver_method(solver: Any) -> ButcherTableau:
    """The method of this name, or a tableau as it is; a ValueError for anything else."""
    if isinstance(solver, ButcherTableau):
        return solver
    tableau = METHODS.get(solver) or on_demand(solver) if isinstance(solver, str) else None
    if tableau is None:
        raise ValueError(
            f"solver must be one of {', '.join(NATIVE)}, or {ON_DEMAND} with S stages; got {solver!r}."
            f"{did_you_mean(solver, NATIVE)}"
        )
    return tableau
