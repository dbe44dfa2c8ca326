"""Names in other people's checkpoints: what stands around the weights, and what they are called here.

ImageNet ResNets have torchvision's and timm's names as they are. CIFAR ResNets with option A have the
widespread checkpoints' names, which come with a `module.` in front (of a model trained in
DataParallel), beside an accuracy, and without num_batches_tracked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "state_dict_ema", "model_ema")
_PREFIXES = (
    "module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.", "resnet.",
)  # fmt: skip
_BESIDE = re.compile(r"(^|_)(loss|losses|criterion|criteria|metric|metrics|acc|accuracy)(_|\d|$)")
"""First parts of the names of what Lightning modules hold beside their network."""


def unwrapped(content: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict, out of a checkpoint and without prefixes that all names share and `own` has not."""
    while wrapper := next((w for w in _WRAPPERS if isinstance(content.get(w), Mapping)), None):
        content = content[wrapper]
    weights = {str(name): value for name, value in content.items()}
    if any(name.startswith("module.") for name in weights):
        weights.pop("n_averaged", None)  # AveragedModel's counter
    if any(name.startswith(_PREFIXES) for name in weights):
        heads = {name.partition(".")[0] for name in own}
        weights = {
            name: value
            for name, value in weights.items()
            if name.partition(".")[0] in heads or not _BESIDE.search(name.partition(".")[0])
        }
    while weights and not any(name in own for name in weights):
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in weights)), None)
        if prefix is None:
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


# transformers' ResNetForImageClassification, with or without its own "resnet."; then timm's resnetv2.
_FOREIGN = (
    (r"^(resnet\.)?embedder\.embedder\.convolution\.", "conv1."),
    (r"^(resnet\.)?embedder\.embedder\.normalization\.", "bn1."),
    (r"^(resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"layer{\2}.\3."),
    (r"\.layer\.(\d+)\.convolution\.", r".conv{\1}."),
    (r"\.layer\.(\d+)\.normalization\.", r".bn{\1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"layer{\1}.\2."),
    (r"^(layer.*\d\.)norm(\d)\.", r"\1bn\2."),
    (r"^stem\.conv\.", "conv1."),
    (r"^stem\.conv1\.", "conv1.0."),
    (r"^stem\.norm1\.", "conv1.1."),
    (r"^stem\.conv2\.", "conv1.3."),
    (r"^stem\.norm2\.", "conv1.4."),
    (r"^stem\.conv3\.", "conv1.6."),
    (r"^norm\.", "bn."),
)
_LAST = re.compile(r"^(fc|linear|classifier|classifier\.1|head\.fc)\.(weight|bias)$")


def renamed(weights: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under the names that `own` has; a name of its own is never changed."""
    last = next((match[1] for name in own if (match := _LAST.match(name))), None)
    found = {name_here(name, own, last): value for name, value in weights.items()}
    if len(found) < len(weights):
        return dict(weights)  # two names for one: the message shows them as they came
    for name, value in found.items():
        wanted = own.get(name)
        if isinstance(value, Tensor) and isinstance(wanted, Tensor) and value.ndim == 4 and wanted.ndim == 2:
            found[name] = (
                value[:, :, 0, 0] if value.shape[2:] == (1, 1) else value
            )  # a last layer as 1×1 conv
    return found


def usual_name(name: str) -> str:
    """A name of transformers' or of timm's resnetv2 as torchvision would have it; others as they are."""
    for pattern, replacement in _FOREIGN:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"\{(\d+)\}", lambda number: str(int(number[1]) + 1), name)  # counted from 0 there


def name_here(name: str, own: Mapping[str, Any], last: str | None) -> str:
    """What the entry of a checkpoint is called in `own`, whose last layer is called `last`; else `name`."""
    if name in own:
        return name
    match = _LAST.match(name)
    if match and last is not None and f"{last}.{match[2]}" in own:
        return f"{last}.{match[2]}"
    other = usual_name(name)
    for before, after in (
        ("", ""),
        (".shortcut.", ".downsample."),
        (".downsample.", ".shortcut."),
        (".downsample.conv.", ".shortcut.0."),
        (".downsample.conv.", ".shortcut.1."),  # after the pooling of shortcut D
    ):
        candidate = other.replace(before, after) if before else other
        if candidate in own:
            return candidate
    return name
