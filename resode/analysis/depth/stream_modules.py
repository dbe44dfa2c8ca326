"""Which modules mix the streams of a state, by what they say of themselves."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

COUNTS = ("streams", "num_residual_streams", "num_streams", "n_streams")
"""Attributes that say how many streams a module's state has."""

BRANCHES = ("branch", "block", "fn", "layer", "sublayer", "f")
"""Names of the child that is F."""


def count_and_branch(
    module: nn.Module, streams: int | None = None, branch: str | None = None
) -> tuple[int | None, str | None]:
    """How many streams a module has, and the name of its branch; None for what it does not tell."""
    counts = [getattr(module, key) for key in COUNTS if type(getattr(module, key, None)) is int]
    children = dict(module.named_children())
    child = next((key for key in ((branch,) if branch else BRANCHES) if key in children), None)
    return (streams if streams is not None else counts[0] if counts else None), child


def stream_modules(model: nn.Module) -> Iterator[str]:
    """Names of the modules that tell both."""
    for name, module in model.named_modules():
        if None not in count_and_branch(module):
            yield name
