r"""Shortcuts S: how the state passes a block, y = S(x) + F(x).

Where a block keeps its state's shape the shortcut is the identity, and the block an Euler step.
Where channels or resolution change S must change them too (`blocks`). A state may also be several streams
that are mixed (`streams`), or two halves that add to each other and can be undone (`reversible`); `runs`
makes a row of equal blocks of any of them.
"""

from resode.shortcuts.blocks import (
    SHORTCUTS,
    GatedShortcut,
    HighwayShortcut,
    InputGatedShortcut,
    PadShortcut,
    ProjectionShortcut,
    make_shortcut,
)
from resode.shortcuts.doubly_stochastic import doubly_stochastic
from resode.shortcuts.reversible import AdditiveCoupling, MomentumStack, NotInvertible, invertible_depth
from resode.shortcuts.runs import RUN_SHORTCUTS, FromStreams, ToStreams, make_run
from resode.shortcuts.streams import (
    AttentionResidual,
    HyperConnection,
    Mixing,
    from_streams,
    to_streams,
)

__all__ = [
    "RUN_SHORTCUTS",
    "SHORTCUTS",
    "AdditiveCoupling",
    "AttentionResidual",
    "FromStreams",
    "GatedShortcut",
    "HighwayShortcut",
    "HyperConnection",
    "InputGatedShortcut",
    "Mixing",
    "MomentumStack",
    "NotInvertible",
    "PadShortcut",
    "ProjectionShortcut",
    "ToStreams",
    "doubly_stochastic",
    "from_streams",
    "invertible_depth",
    "make_run",
    "make_shortcut",
    "to_streams",
]
