"""Which network a checkpoint is of, by the names and shapes in it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from resode.networks.imagenet import IMAGENET_BLOCKS
from resode.networks.names import renamed, usual_name

_LEAST = 0.5
"""Share of common entries below which a network is not called near."""


def nearest(weights: Mapping[str, Any]) -> str:
    """What to build for these weights, exactly or nearly, as a sentence; empty where nothing is near.

    Example:
        >>> from resode.networks import build
        >>> nearest(build("resnet20", num_classes=7).state_dict())
        " These weights fit build('resnet20', num_classes=7)."
    """
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    best, share, options = "", 0.0, {}
    for name, tried in _candidates(tensors):
        own = _shapes(name, tuple(tried.items()))
        first = next(key for key, value in own.items() if value.ndim > 1)
        last = next((key for key in ("fc.weight", "linear.weight") if key in own), "")
        found = {key: tuple(value.shape) for key, value in renamed(tensors, own).items()}
        wanted = {key: tuple(value.shape) for key, value in own.items()}

        def free(
            shapes: Mapping[str, tuple[int, ...]], first: str = first, last: str = last
        ) -> dict[str, Any]:
            """Shapes but for the images' channels and the classes, which are options."""
            bias = last.replace("weight", "bias")
            return {
                key: shape[:1] + shape[2:] if key == first else shape[1:] if key in (last, bias) else shape
                for key, shape in shapes.items()
                if "num_batches" not in key
            }

        ours, theirs = free(wanted), free(found)
        common = sum(theirs.get(key) == shape for key, shape in ours.items())
        score = common / len(ours.keys() | theirs.keys())
        if score > share:
            best, share, options = name, score, dict(tried)
            if last in found and found[last][:1] != wanted[last][:1]:
                options["num_classes"] = found[last][0]
            if len(found.get(first, ())) == 4 and found[first][1] != wanted[first][1]:
                options["in_channels"] = found[first][1]
    if share <= _LEAST:
        return ""
    call = f"build({best!r}{''.join(f', {key}={value!r}' for key, value in options.items())})"
    if share == 1:
        return f" These weights fit {call}."
    return f" The nearest network is {call}, which has {share:.0%} of all entries in common with them."


def _candidates(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and options to try: networks whose groups have the nearest numbers of blocks."""
    from resode.networks.registry import available, find

    if any(".highway." in name for name in weights):
        yield "highway19", {}
    fields = [int(found[1]) for name in weights if (found := re.match(r"layer1\.0\.fields\.(\d+)\.", name))]
    if fields:
        yield f"odenet{6 * max(fields) + 8}", {}
        return
    blocks: dict[int, int] = {}
    for name in weights:
        if found := re.match(r"layer(\d+)\.(\d+)\.", usual_name(name)):
            group, block = int(found[1]), int(found[2])
            blocks[group] = max(blocks.get(group, 0), block + 1)
    groups = tuple(blocks.get(group, 0) for group in range(1, 5))
    depth = 6 * groups[0] + 2
    names = dict.fromkeys(
        [*available(), *(f"{kind}{depth}" for kind in ("resnet", "preact", "plain") if groups[0])]
    )
    away = {name: sum(abs(a - b) for a, b in zip(groups, _groups(name), strict=True)) for name in names}
    for name, distance in away.items():
        if distance > min(away.values()):
            continue
        yield name, {}
        options = find(name).options
        if options.get("shortcut") == "A":
            yield name, {"shortcut": "B"}
        if options.get("stem") == "imagenet":
            yield name, {"stem": "small"}


def _groups(name: str) -> tuple[int, int, int, int]:
    """Blocks of a named network's four groups, 0 where it has none; told without building it."""
    found = re.match(r"(\D+?)_?(\d+)", name)
    if found is None:  # networks without numbered depth, which have no groups
        return (0, 0, 0, 0)
    family, depth = found[1], int(found[2])
    imagenet = family in ("resnet", "seresnet", "resnetv", "plain", "resnext", "wide_resnet")
    if family == "resnetv":
        depth = int(re.sub(r"\D", "", name.partition("_")[2]))
    if imagenet and depth in IMAGENET_BLOCKS and (depth not in (26, 200) or name.endswith("d")):
        return IMAGENET_BLOCKS[depth][1]
    if family in ("residual_mlp", "plain_mlp", "highway", "fitnet"):
        return (0, 0, 0, 0)
    n = (depth - 2) // 9 if family == "preact" and depth >= 164 else (depth - 2) // 6
    return (n, n, n, 0)


@functools.lru_cache(maxsize=64)
def _shapes(name: str, options: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
    """Entries of a network on the meta device."""
    from resode.networks.registry import find

    with torch.device("meta"):
        return find(name)(**dict(options)).state_dict()
