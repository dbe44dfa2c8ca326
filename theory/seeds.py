"""The seeds of all pages, in one place: `python -m theory --seeds N` and RESODE_SEED_SHIFT move them.

A page says `torch.manual_seed(shifted(0))`, never a bare number. A claim is about random networks, not about
those of one seed: it must hold under every shift. What a page draws or trains is so many, and its bound so
far away, that three standard errors lie between.
"""

from __future__ import annotations

import os

SHIFT = int(os.environ.get("RESODE_SEED_SHIFT", "0"))
"""By how many thousands all seeds are moved; 0 gives those that the stored figures were drawn with."""


def shifted(seed: int) -> int:
    """A page's seed, moved by the shift.

    Example:
        >>> shifted(3) - 1000 * SHIFT
        3
    """
    return seed + 1000 * SHIFT
