r"""Backward error analysis: the field whose exact flow a stack of blocks follows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from resode.analysis.swap.bseries import Tree, modified_coefficient, symmetry, trees
from resode.blocks import ResidualStack
from resode.blocks.solving import block_name, named_stacks, other_solver
from resode.calls import hooked
from resode.checks import check_whole, checked, warn_user
from resode.jacobian.linearize import check_field
from resode.jacobian.products import first_jvp
from resode.modes import evaluating
from resode.solve import odeint
from resode.tableaus import ButcherTableau

LARGEST_TREE = 10
"""Vertices of the largest trees: p + order is at most this."""

_KINKS = re.compile(
    r"^_?(relu6?|leaky_relu|prelu|rrelu|threshold|hardtanh|hardswish|hardsigmoid|softshrink|hardshrink|clamp\w*"
    r"|abs|maximum|minimum|(adaptive_)?max_pool\dd\w*)_?$"
)

State = tuple[Tensor, ...]


class ModifiedField:
    r"""The field F̃ whose flow the blocks of a stack are steps of, as far as its series goes.

    Called as g(x) where all blocks share one field of x, else as g(t, x), with t the depth time: from lη to
    (l + 1)η it is block l's. With learnt steps, which may differ by channel, t counts blocks and g is that
    of ηF.

    Args:
        stack: under a method with fixed steps; its weights are read when g is called.
        order: how many corrections beyond F.
    """

    def __init__(self, stack: ResidualStack, order: int) -> None:
        self.stack, self.order = stack, order
        self.tableau = stack.tableau
        self.shared = stack.shared and stack.step_sizes is None and not any(stack.timed)
        self.span = 1.0 if stack.step_sizes is not None else stack.step_size
        self._checked: set[int] = set()

    def __call__(self, *args: Any) -> Tensor:
        """F̃(x) or F̃(t, x), of x's shape."""
        if len(args) != (1 if self.shared else 2):
            form = "g(x), its blocks share one field" if self.shared else "g(t, x), its blocks have their own"
            raise TypeError(f"this modified field is called as {form}: got {len(args)} arguments.")
        if self.shared:
            return self.block(0)(*args)
        t, x = args
        if isinstance(t, Tensor) and t.numel() != 1:
            raise ValueError(f"t is one depth time for all samples: got shape {tuple(t.shape)}.")
        place = float(t) / self.span
        index = min(max(int(place + 1e-9), 0), self.stack.depth - 1)
        return self.block(index)(x, place - index)

    def block(self, index: int) -> Callable[..., Tensor]:
        """Block `index`'s F̃, of (x, s): s from 0 to 1 is the part of the block, read by weights="linear"."""
        stack, n = self.stack, self.stack.substeps
        inner = _field_of(stack, index)  # IndexError beyond the last
        h = self.span / n
        scaled = stack.step_sizes is not None
        moving = (stack.weights == "linear" and not stack.shared) or stack._is_timed(index)

        def field(state: State) -> State:
            y = inner(state[1] / self.span if moving else 0.0, state[0])
            y = stack._step(index, state[0]) * y if scaled else y
            return (y, torch.ones_like(state[1])) if moving else (y,)

        def modified(x: Tensor, s: Tensor | float = 0.0) -> Tensor:
            self._check(index, x)
            time = torch.as_tensor(s, dtype=x.dtype, device=x.device) * self.span
            state = (x, time) if moving else (x,)
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                return modified_value(field, state, self.tableau, h, self.order)[0]

        return modified

    def flow(self, x: Tensor, *, n_steps: int | None = None, rtol: float | None = None) -> Tensor:
        """Where F̃ leads to over the stack's whole depth time, solved block by block with dopri8.

        Args:
            x: states, shape (batch, *state).
            n_steps: steps a block; None leaves them to the solver.
            rtol: its tolerance, relative and absolute; 1e-10 in float64, 1e-6 in float32.

        Returns:
            The state at the end, of x's shape: what the stack itself gives, but for the series' rest.
        """
        fine = rtol or (1e-10 if x.dtype == torch.float64 else 1e-6)
        settings: dict[str, Any] = {"rtol": fine, "atol": fine} if n_steps is None else {"n_steps": n_steps}
        times = torch.tensor([0.0, self.span], dtype=x.dtype, device=x.device)
        with torch.no_grad():
            for index in range(self.stack.depth):
                g = self.block(index)

                def field(t: Tensor, y: Tensor, g: Callable[..., Tensor] = g) -> Tensor:
                    return g(y, t / self.span)

                x = odeint(field, x, times, method="dopri8", **settings)[-1]
        return x

    def _check(self, index: int, x: Tensor) -> None:
        """Once a block: whether F has derivatives, and whether they say anything."""
        if index in self._checked or _transformed(x):
            return
        module = field_at_start(self.stack, index, x)
        check_field(module, x)
        if not self._checked:
            found = kinks(module, x)
            if found:
                warn_user(
                    f"F has kinks ({', '.join(found)}), where it has no derivatives: the "
                    "modified field holds between kinks, and a step across one does not follow it. Compare "
                    "modified_field(stack).flow(x) with stack(x), or use a smooth activation (tanh, GELU)."
                )
        self._checked.add(index)


class _AtTime(nn.Module):
    """A field F(t, x) at one time."""

    def __init__(self, field: nn.Module, t: Tensor) -> None:
        super().__init__()
        self.field, self.t = field, t

    def forward(self, x: Tensor) -> Tensor:
        """F(x) at that time."""
        return self.field(self.t, x)


def field_at_start(stack: ResidualStack, index: int, x: Tensor) -> nn.Module:
    """Block `index`'s F(x); of an F(t, x) that at the block's start."""
    field = stack.field(index)
    return _AtTime(field, stack._time(index, 0.0, 0.0, x)) if stack._is_timed(index) else field


def _field_of(stack: ResidualStack, index: int) -> Callable[[Any, Tensor], Tensor]:
    """Block `index`'s F of the part of the block that has passed, from 0 to 1, and the state."""

    def time(s: Any, y: Tensor) -> Tensor:
        return stack._time(index, stack._step(index, y), s, y)

    return stack._field(index, True, None, time if stack._is_timed(index) else None)


def _transformed(x: Any) -> bool:
    """Whether it is a tensor within torch.func.jvp and the like, whose values can't be asked for."""
    functorch: Any = vars(torch._C)["_functorch"]
    return isinstance(x, Tensor) and functorch.is_functorch_wrapped_tensor(x)


class _Kinks(TorchFunctionMode):
    """Notes functions with kinks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if _KINKS.match(name):
            self.found.add(name.strip("_"))
        return func(*args, **(kwargs or {}))


def kinks(field: nn.Module, x: Tensor) -> list[str]:
    """The functions with kinks that a field calls, by name."""
    seen = _Kinks()
    with torch.no_grad(), seen:
        field(x)
    return sorted(seen.found)


@checked
def modified_field(stack: ResidualStack, order: int = 1) -> ModifiedField:
    r"""The field whose exact flow a stack follows: backward error analysis of its blocks.

    A step of a method of order p is the flow, after the time h, of F̃ = F + h^p f_{p+1} + h^{p+1} f_{p+2} + …,
    whose terms are elementary differentials of F by exact coefficients: for Euler
    F̃ = F − h/2 F'F + h²(F'F'F/3 + F''(F, F)/12) − … So a network that is far from the flow of its own F is
    near that of another field, as long as the corrections are small.

    Args:
        stack: blocks under a method with fixed steps, in eval mode; of one shared field or one a block, with
            any weights=, substeps and learnt steps.
        order: how many corrections are taken: 1 gives F + h^p f_{p+1}. p + order is at most 10.

    Returns:
        A callable of x's shape, g(x) for a shared field and g(t, x) with the depth time t else; `.block(l)`
        is block l's own, `.flow(x)` solves it over the stack.

    Raises:
        TypeError, ValueError: no ResidualStack; an adaptive solver, which takes steps of its own; an order
            below 1, or beyond what is implemented; when called, what `check_field` refuses.

    Note:
        The series is asymptotic: it gets better with each term only while h‖F'‖ is small, and converges for
        linear fields at most. A field with kinks (ReLU) has no higher derivatives at these: that is said in a
        warning. A tree with m branches at its root takes m nested forward derivatives; rk4 at order 1 has
        nine trees of five vertices, at order 2 twenty more.

    Source:
        Hairer, Lubich & Wanner, Geometric Numerical Integration, IX (2006).

    Example:
        >>> decay = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(decay.weight, -1.0)          # x' = −x; a step is x ← (1 − h) x
        >>> stack = ResidualStack(decay, depth=1, step_size=0.1).double()
        >>> x = torch.ones(1, 1, dtype=torch.float64)
        >>> [round(modified_field(stack, order)(x).item(), 6) for order in (1, 2, 3)]
        [-1.05, -1.053333, -1.053583]
        >>> round(float(torch.tensor(0.9).log() / 0.1), 6)     # its limit, the logarithm
        -1.053605
    """
    if not isinstance(stack, ResidualStack):
        raise TypeError(
            f"a modified field is that of a ResidualStack's steps, got {type(stack).__name__}. "
            "resode.convert(model, x) makes stacks of a network's blocks."
        )
    tableau = stack.tableau
    if tableau.adaptive:
        raise ValueError(
            f"{tableau.name} chooses its own steps, so no one field has them as its flow: set stack.solver "
            "to a method with fixed steps, such as 'rk4'."
        )
    check_whole("order", order, 1)
    if tableau.order + order > LARGEST_TREE:
        raise ValueError(
            f"order counts corrections to {tableau.name}, of order {tableau.order}: at most "
            f"{LARGEST_TREE - tableau.order} are implemented, got {order}."
        )
    return ModifiedField(stack, order)


@checked
def distance_from_ode(stack: ResidualStack, x: Tensor) -> Tensor:
    r"""How far each block is from the flow of its own F: ‖h^p f_{p+1}‖ / ‖F‖ at the states of a pass.

    The first correction of the modified field against F. What it says is an error per depth time: 0.05 means
    that the block goes 5 % another way than the flow does, to leading order; where it is not small, the stack
    is no discretized ODE of F.

    Args:
        stack: as for `modified_field`.
        x: states before the first block, shape (batch, *state).

    Returns:
        Shape (depth, batch); 0 where F and its correction are.

    Raises:
        TypeError, ValueError: as `modified_field`.

    Example:
        >>> stack = ResidualStack(nn.Linear(1, 1, bias=False), depth=2, step_size=0.1)
        >>> _ = nn.init.constant_(stack.field(0).weight, -1.0)
        >>> distance_from_ode(stack, torch.ones(1, 1)).flatten()  # h/2 ‖F'F‖ / ‖F‖
        tensor([0.0500, 0.0500])
    """
    modified = modified_field(stack)
    with torch.no_grad():
        path = stack(x, return_path=True)[1]
        rows = []
        for index in range(stack.depth):
            state = path[index]
            first = _field_of(stack, index)(0.0, state)
            if stack.step_sizes is not None:
                first = stack._step(index, state) * first
            size = first.flatten(1).norm(dim=1)
            change = (modified.block(index)(state) - first).flatten(1).norm(dim=1)
            rows.append(torch.where(change > 0, change / size, 0.0))
    return torch.stack(rows)


@dataclass(frozen=True)
class BlockDistance:
    """How far one block of a network is from the flow of its own F.

    Args:
        block: its field's name in the network; where blocks share a field, the stack's and a number.
        distance: `distance_from_ode`, the mean over samples.
    """

    block: str
    distance: float


def block_distances(model: nn.Module, x: Tensor) -> tuple[list[BlockDistance], str]:
    """`distance_from_ode` of every block of a network, in evaluation mode, at the states that it meets.

    Args:
        model: with stacks anywhere inside; its solvers, modes and statistics stay.
        x: its inputs; each sample counts the same.

    Returns:
        One a block in the network's order, and what is to be said of them: that F has kinks, or why there
        are none (an adaptive solver, a method of an order above 4, whose first correction has hundreds of
        terms, or an F that cannot be differentiated so often).
    """
    stacks = named_stacks(model)
    for stack in stacks.values():
        tableau = stack.tableau
        if tableau.adaptive:
            return [], f"not measured: {tableau.name} follows the flow of F to its tolerance."
        if tableau.order > 4:
            return [], f"not measured: {tableau.name} is of order {tableau.order}, above 4."
    met: dict[str, Tensor] = {}

    def keep(name: str, args: tuple[Tensor, ...], kwargs: Any) -> None:
        met.setdefault(name, args[0].detach())  # of several calls the first

    found, bent = [], set[str]()
    with evaluating(model), other_solver(model, None), warnings.catch_warnings():  # counts are put back
        with hooked(stacks, before=keep), torch.no_grad():
            model(x)
        warnings.simplefilter("ignore", UserWarning)  # kinks are said once, of all blocks
        for name, state in met.items():
            try:
                distances = distance_from_ode(stacks[name], state).mean(1).tolist()
            except (RuntimeError, TypeError, ValueError) as error:
                return (
                    [],
                    f"not measured: {name or 'the stack'} has no derivatives ({str(error).splitlines()[0]})",
                )
            bent |= {
                kink
                for i in range(len(distances))
                for kink in kinks(field_at_start(stacks[name], i, state), state)
            }
            for i, distance in enumerate(distances):
                number = f" block {i}" if stacks[name].shared else ""
                found.append(BlockDistance(f"{block_name(name, stacks[name], i)}{number}".strip(), distance))
    return found, f"F has kinks ({', '.join(sorted(bent))}): it holds between them." if bent else ""


def modified_value(
    field: Callable[[State], State], state: State, tableau: ButcherTableau, h: float, order: int
) -> State:
    """F̃ of one state: F and the trees of p + 1 … p + order vertices."""
    first_jvp()

    @cache
    def differential(tree: Tree) -> State:
        return _derivative(field, state, [differential(child) for child in tree])

    def combined(weights: Mapping[Tree, float]) -> State:
        """Σ c F(τ). Trees that differ in their last subtree alone take one derivative, being linear in it."""
        groups: dict[Tree, dict[Tree, float]] = {}
        for tree, c in weights.items():
            groups.setdefault(tree[:-1], {})[tree[-1]] = c
        terms = []
        for others, lasts in groups.items():
            [(only, c), *more] = lasts.items()
            last = combined(lasts) if more else tuple(c * v for v in differential(only))
            terms.append(_derivative(field, state, [*map(differential, others), last]))
        return tuple(torch.stack(parts).sum(0) for parts in zip(*terms, strict=True))

    total = differential(())
    for size in range(tableau.order + 1, tableau.order + order + 1):
        coefficients = {tree: modified_coefficient(tableau, tree) / symmetry(tree) for tree in trees(size)}
        weights = {tree: h ** (size - 1) * float(b) for tree, b in coefficients.items() if b}
        if weights:
            total = tuple(t + v for t, v in zip(total, combined(weights), strict=True))
    return total


def _derivative(field: Callable[[State], State], state: State, directions: list[State]) -> State:
    """F^(m)(x)[v₁, …, v_m] by nested forward derivatives; F(x) itself without directions."""
    if not directions:
        return field(state)
    *inner, outer = directions

    def lower(y: State) -> State:
        return _derivative(field, y, inner)

    return torch.func.jvp(lower, (state,), (outer,))[1]
