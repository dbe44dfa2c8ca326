"""States in a kept autograd graph, of one tensor or of several, and what is pulled back to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


@dataclass(frozen=True)
class Place:
    """Where a state lies in autograd's graph: the edges of its parts, side by side along a dimension.

    Args:
        edges: one of each part; nearly always one.
        shapes: the parts'.
        dim: along which they lie.
        order: the parts, each after all that it is computed from; () where none is computed from another.
    """

    edges: tuple[GradientEdge, ...]
    shapes: tuple[torch.Size, ...]
    dim: int = 0
    order: tuple[int, ...] = ()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The state whose parts these are."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), self.dim)

    def cut(self, state: Tensor) -> tuple[Tensor, ...]:
        """The parts of a state."""
        if len(self.edges) == 1:
            return (state,)
        return state.split([shape[self.dim] for shape in self.shapes], self.dim)

    def gradient(self, found: Sequence[Tensor | None], like: Tensor, *, create_graph: bool = False) -> Tensor:
        """The gradient at the state, from autograd's at its parts (None for 0).

        Autograd's gradient at a part p holds that which comes through a part q computed from it, and the
        parts of a state are free: with q's own gradient g, (∂q/∂p)ᵀg is taken off, the latest part first.
        """
        zeros = (like.new_zeros(shape) for shape in self.shapes)
        parts = [z if g is None else g for g, z in zip(found, zeros, strict=True)]
        for i in reversed(range(len(self.order) - 1)):
            p, later = self.order[i], self.order[i + 1 :]
            [through] = torch.autograd.grad(
                [self.edges[q] for q in later],
                [self.edges[p]],
                [parts[q] for q in later],
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
            parts[p] = parts[p] if through is None else parts[p] - through
        return self.join(parts)


def gradients_at(y: Tensor | Place, places: Sequence[Place], u: Tensor | None = None) -> list[Tensor]:
    """The gradients of a number y, or of u at a place y, at several places, in one pass."""
    edges = [edge for place in places for edge in place.edges]
    if isinstance(y, Tensor):
        ends, seeds, like = y, None, y
    else:
        assert u is not None
        ends, seeds, like = y.edges, y.cut(u), u
    with torch.enable_grad():
        found = iter(torch.autograd.grad(ends, edges, seeds, retain_graph=True, allow_unused=True))
    return [place.gradient([next(found) for _ in place.edges], like) for place in places]


def pulled_back(at_y: Place, at_x: Place, u: Tensor, *, create_graph: bool = False) -> Tensor:
    """The gradient at x of u at y, of the shape of x; 0 where y does not depend on it."""
    found = torch.autograd.grad(
        at_y.edges, at_x.edges, at_y.cut(u), retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return at_x.gradient(found, u, create_graph=create_graph)
