"""Which modules of a network solve, and with what: read, set, and set for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resode.blocks.ode_block import ODEBlock
from resode.blocks.stack import ResidualStack
from resode.tableaus import ButcherTableau


def solving_modules(network: nn.Module) -> list[ResidualStack | ODEBlock]:
    """The blocks of a network that a solver advances, in the network's order."""
    return [module for module in network.modules() if isinstance(module, ResidualStack | ODEBlock)]


def named_stacks(network: nn.Module) -> dict[str, ResidualStack]:
    """The stacks among them, whose solver can be swapped, by their names."""
    return {name: module for name, module in network.named_modules() if isinstance(module, ResidualStack)}


def stacks_of(network: nn.Module) -> list[ResidualStack]:
    """The same without names."""
    return list(named_stacks(network).values())


def block_name(name: str, stack: ResidualStack, index: int) -> str:
    """What a block of the stack of this name is called: its field's name, or the stack's if all share one."""
    return name if stack.shared else f"{name}.fields.{index}".removeprefix(".")


class Scaled(nn.Module):
    """Every channel of F, dimension 1, times its factor (or the one factor): learned steps of either sign."""

    factors: Tensor

    def __init__(self, field: nn.Module, factors: Tensor) -> None:
        super().__init__()
        self.field = field
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        """F(x) times the factors."""
        return self.field(x) * self.factors.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 2))


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


def with_step(stack: ResidualStack, index: int, x: Tensor) -> tuple[nn.Module, float]:
    """A block's F as `field_at_start`, and its η ≥ 0; a learnt step's sign and channels go to F."""
    field = field_at_start(stack, index, x)
    if stack.step_sizes is None:
        return field, stack.step_size
    eta = stack.step_sizes[index].detach()
    if eta.ndim:
        return Scaled(field, eta.clone()), 1.0
    return (field, eta.item()) if eta >= 0 else (Scaled(field, torch.full((1,), -1.0).to(eta)), -eta.item())


def set_solver(
    network: nn.Module, solver: str | ButcherTableau | None = None, substeps: int | None = None
) -> None:
    """Let other solvers advance a network's blocks, with the same weights.

    Args:
        network: with at least one `ResidualStack`.
        solver: a method's name, or a tableau; None leaves it.
        substeps: solver steps a block; None leaves them.

    Raises:
        ValueError: no such method, substeps below 1, or no block that a solver advances.

    Example:
        >>> stack = ResidualStack(nn.Linear(2, 2), depth=3)
        >>> set_solver(nn.Sequential(stack), "rk4", 2)
        >>> stack.solver, stack.substeps
        ('rk4', 2)
    """
    stacks = stacks_of(network)
    if not stacks:
        raise ValueError(
            "only the blocks of a ResidualStack can change their solver, and this network has none. "
            "Take an ODE-ResNet, such as odenet20, or resode.convert."
        )
    for stack in stacks:
        if solver is not None:
            stack.solver = solver
        if substeps is not None:
            stack.substeps = substeps


@contextmanager
def other_solver(
    network: nn.Module, solver: str | ButcherTableau | None, substeps: int | None = None
) -> Iterator[None]:
    """Lets another solver advance a network's blocks for a while; then all is as it was, counts too."""
    stacks = stacks_of(network)
    before = [(stack.tableau, stack.substeps, stack.stats, stack.evaluations) for stack in stacks]
    try:
        set_solver(network, solver, substeps)
        yield
    finally:
        for stack, (own, steps, stats, evaluations) in zip(stacks, before, strict=True):
            stack.solver, stack.substeps = own, steps
            stack.stats, stack.evaluations = stats, evaluations
