"""Modules that stand where a converted network's blocks stood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resode.blocks import ResidualStack
from resode.calls import ModuleCall, flat


class Whole(nn.Module):
    """M(x) written as x + (M(x) − x)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same as the module gives."""
        return x + (self.module(x, *args, **kwargs) - x)


class Branch(nn.Module):
    """F(x) of a branch that reads more than x: the context that its block was last called with.

    Tensors of the context that have a row a sample are cut or repeated for an x of fewer or more rows.
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.context: tuple[Any, ...] = ()
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        """F(x) in the context as it is."""
        return self.branch(x, *[self._for_rows_of(x, c) for c in self.context])

    def _for_rows_of(self, x: Tensor, c: Any) -> Any:
        if not isinstance(c, Tensor) or not c.ndim or len(c) != self.rows or len(x) == self.rows:
            return c
        return torch.cat([c] * -(-len(x) // self.rows))[: len(x)]

    def __getstate__(self) -> dict[str, Any]:
        held = tuple(c.detach() if isinstance(c, Tensor) else c for c in self.context)
        return {**self.__dict__, "context": held}  # tensors with a graph can't be copied


class HandOver(nn.Module):
    """The place of a block whose stack stands further on: it notes the context and passes the state."""

    def __init__(self, fields: Sequence[nn.Module], counts: Sequence[int]) -> None:
        super().__init__()
        self.fields, self.counts = tuple(fields), tuple(counts)  # a tuple: these are the stack's children

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """The state as it came."""
        for field, n in zip(self.fields, self.counts, strict=True):
            if isinstance(field, Branch):
                field.context, context = context[:n], context[n:]
                field.rows = len(x)
        return x


class Advance(HandOver):
    """A stack whose fields read a context."""

    def __init__(self, stack: ResidualStack, fields: Sequence[nn.Module], counts: Sequence[int]) -> None:
        super().__init__(fields, counts)
        self.stack = stack

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """The state after the stack."""
        return self.stack(super().forward(x, *context))


class Rewritten(nn.Module):
    """A module whose forward was written anew, called as it was."""

    def __init__(self, name: str, owner: nn.Module, call: ModuleCall, graph: nn.Module) -> None:
        super().__init__()
        own = {k: v for k, v in vars(owner).items() if k not in self.__dict__ and not k.startswith("_")}
        self.__dict__.update(own)  # what others read of it
        leaves, nested = call.leaves()
        self.nested = str(nested)  # the thing itself cannot be copied everywhere
        self.plain = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self.written_of = f"{type(owner).__name__} {name}".strip()
        self.graph = graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original gives; a ValueError for a call of another form."""
        leaves, nested = flat(args, kwargs)
        if str(nested) != self.nested and len(args) == 1 and isinstance(args[0], Mapping) and not kwargs:
            leaves, nested = flat((), dict(args[0]))
        plain = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        if str(nested) != self.nested or plain != self.plain:
            raise ValueError(
                f"{self.written_of} was converted for a call of another form: its arguments that are no "
                "tensors are part of the graph. Convert again with an x that leads to the same call."
            )
        return self.graph(*[leaf for leaf in leaves if isinstance(leaf, Tensor)])
