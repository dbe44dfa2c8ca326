"""Runs of equal blocks whose state is more than x: streams, halves, a velocity, all that was before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from resode.checks import check_whole, checked, one_of
from resode.formulas import Cost, Shape
from resode.shortcuts.reversible import AdditiveCoupling, MomentumStack
from resode.shortcuts.streams import AttentionResidual, HyperConnection, from_streams, to_streams

_MIXED = ("hyper", "hyper_dynamic", "hyper_manifold", "hyper_manifold_dynamic")

RUN_SHORTCUTS = (*_MIXED, "attention", "coupling", "momentum")
"""Kinds that `make_run` knows."""


class ToStreams(nn.Module):
    """`to_streams` as a module: x (batch, *features) -> (batch, streams, *features).

    Args:
        streams: how many copies.
    """

    @checked
    def __init__(self, streams: int) -> None:
        super().__init__()
        self.streams = check_whole("streams", streams, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Copies of x."""
        return to_streams(x, self.streams)

    def cost(self, shape: Shape) -> Cost:
        """Nothing; with the shape of the streams."""
        return Cost(0, 0, (self.streams, *shape))

    def extra_repr(self) -> str:
        """Streams, for print."""
        return str(self.streams)


class FromStreams(nn.Module):
    """`from_streams` as a module: x (batch, streams, *features) -> (batch, *features)."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean of the streams."""
        return from_streams(x)

    def cost(self, shape: Shape) -> Cost:
        """Nothing; with the shape of one stream."""
        return Cost(0, 0, shape[1:])


@checked
def make_run(
    kind: str,
    branches: Sequence[nn.Module],
    features: int,
    *,
    streams: int = 4,
    after: nn.Module | None = None,
) -> nn.Sequential:
    r"""Blocks in a row, by the name of what carries their state; x (batch, features, …) -> the same.

    "hyper", "hyper_dynamic", "hyper_manifold" and "hyper_manifold_dynamic" are `HyperConnection`s between
    copies and the mean of the streams; at the start they are the residual blocks x + F(x). "attention" is one
    `AttentionResidual`, "momentum" one `MomentumStack` with γ = 0.9, "coupling" an `AdditiveCoupling` for
    every two branches, F and G, which take half the features.

    Args:
        kind: one of RUN_SHORTCUTS.
        branches: keep their state's shape; an even number of them for a coupling.
        features: size of dimension 1 of x.
        streams: of the kinds that have some.
        after: follows each block, as post-activation's σ does; of the kinds with streams alone.

    Raises:
        ValueError: unknown kind, streams < 1, no branch, an odd number of features or branches in a coupling,
            or `after` where a sum has no place for it.

    Example:
        >>> run = make_run("hyper", [nn.Linear(3, 3), nn.Linear(3, 3)], 3, streams=2)
        >>> [type(part).__name__ for part in run]
        ['ToStreams', 'HyperConnection', 'HyperConnection', 'FromStreams']
    """
    one_of("shortcut", kind, RUN_SHORTCUTS)
    if kind in _MIXED:
        blocks: list[nn.Module] = []
        for number, branch in enumerate(branches):
            dynamic, manifold = kind.endswith("dynamic"), "manifold" in kind
            blocks.append(HyperConnection(branch, streams, dynamic, manifold, features=features, read=number))
            blocks += [] if after is None else [after]
        return nn.Sequential(ToStreams(streams), *blocks, FromStreams())
    if after is not None:
        raise ValueError(
            f"shortcut {kind!r} leaves no place for an activation after each sum, which post-activation has: "
            "take a pre-activation network (preact…, wide_resnet…, resnetv2_…), or one of "
            f"{', '.join(map(repr, _MIXED))}."
        )
    if kind == "attention":
        return nn.Sequential(AttentionResidual(list(branches), features))
    if kind == "momentum":
        return nn.Sequential(MomentumStack(branches))
    if features % 2 or len(branches) % 2:
        raise ValueError(
            f"a coupling has two branches on halves of the features: got {len(branches)} branches and "
            f"{features} features. Take even numbers."
        )
    pairs = zip(branches[::2], branches[1::2], strict=True)
    return nn.Sequential(*(AdditiveCoupling(f, g) for f, g in pairs))
