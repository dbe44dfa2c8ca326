"""Training that makes a network an ODE: a solver drawn anew for each batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from resode.blocks.solving import other_solver, stacks_of
from resode.checks import check_number, check_whole, checked
from resode.tableaus import get_tableau

Choice = tuple[str, int]


def _checked(choice: Choice) -> Choice:
    """A solver that may be drawn, with its substeps."""
    if not isinstance(choice, tuple | list) or len(choice) != 2:
        raise ValueError(f"choices are pairs (solver, substeps), such as ('midpoint', 1); got {choice!r}.")
    name, n = choice
    tableau = get_tableau(name)
    if not tableau.explicit or tableau.adaptive:
        why = (
            "follows the flow to its tolerance already" if tableau.explicit else "is implicit, and no stack's"
        )
        raise ValueError(f"solvers are drawn among explicit fixed-step ones, got {name!r}, which {why}.")
    return name, check_whole("substeps", n, 1)


class SwapProof:
    r"""Trains a network under several solvers at once, so that a swap costs nothing afterwards.

    A network trained with one solver learns that solver's steps, truncation errors included. Where each batch
    draws its solver, only what the solvers have in common lowers the loss: the flow. In the first part of the
    run, where weights are far from their end, the network's own solver alone is enough and cheaper.

    Args:
        network: holds at least one `ResidualStack`, all with one fixed-step solver and number of substeps.
        start: share of the run after which solvers are drawn, from 0 to below 1.
        choices: (solver, substeps) to draw from, each as likely; None for the network's own, the same with
            twice the substeps, and midpoint.
        seed: of the draws, which are a function of it and the update alone.

    Raises:
        ValueError: no stack, stacks that differ, no choices, an adaptive, implicit or unknown method, or a
            start outside [0, 1).
        TypeError: a method, number of substeps, start or seed of another type.

    Example:
        >>> from resode import ResidualStack
        >>> stack = ResidualStack(nn.Linear(4, 4), depth=3, step_size=0.3)
        >>> proof = SwapProof(stack, start=0.0)
        >>> solvers = set()
        >>> for update in range(20):
        ...     with proof.batch(update, 20):  # forward, backward and the optimizer's step
        ...         solvers.add((stack.solver, stack.substeps))
        >>> sorted(solvers), (stack.solver, stack.substeps)
        ([('euler', 1), ('euler', 2), ('midpoint', 1)], ('euler', 1))
    """

    @checked
    def __init__(
        self,
        network: nn.Module,
        *,
        start: float = 0.5,
        choices: Sequence[Choice] | None = None,
        seed: int = 0,
    ) -> None:
        self.network = network
        came_with = {(stack.solver, stack.substeps) for stack in stacks_of(network)}
        if len(came_with) != 1:
            had = ", ".join(f"{name} with {n} substeps" for name, n in sorted(came_with)) or "none"
            raise ValueError(
                "solvers are drawn for the ResidualStacks of a network, all with one solver and number of "
                f"substeps: this one has {had}. The odenet… networks do."
            )
        self.own = next(iter(came_with))
        solver, substeps = self.own
        if choices is None:
            choices = ((solver, substeps), (solver, 2 * substeps), ("midpoint", substeps))
        self.choices = tuple(map(_checked, choices))
        if not self.choices:
            raise ValueError("choices must hold at least one (solver, substeps), got none.")
        self.start = check_number("start, a share of the run,", start, least=0, below=1)
        self.seed = check_whole("seed", seed, 0)

    def choice(self, update: int, updates: int) -> Choice:
        """The solver and substeps of an update, counted from 0, of a run of so many."""
        if update < self.start * updates:
            return self.own
        state = hashlib.blake2b(f"{self.seed} {update}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(state, "little") >> 1)
        return self.choices[int(torch.randint(len(self.choices), (), generator=generator))]

    @contextmanager
    def batch(self, update: int, updates: int) -> Iterator[None]:
        """The solver of one update within it; the network's own before and afterwards."""
        with other_solver(self.network, *self.choice(update, updates)):
            yield
