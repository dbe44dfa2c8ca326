"""Weights that others have trained, from safetensors or torch files, never by unpickling objects.

ImageNet ResNets have torchvision's and timm's names as they are. CIFAR ResNets with option A have the
widespread checkpoints' names, which come with a `module.` in front (of a model trained in
DataParallel), beside an accuracy, and without num_batches_tracked.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from resode.state_dicts import WeightsMismatch, mismatch

Module = TypeVar("Module", bound=nn.Module)

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def load_weights(model: Module, source: str | Path | Mapping[str, Any]) -> Module:
    """Put weights into a network, strictly: every name must be there, and none too many.

    Args:
        model: the network, changed in place; nothing is changed where the weights do not fit.
        source: a safetensors or torch file, or a state dict. It may be wrapped as
            {"state_dict": …} beside other entries (or "model", "net", …; averaged weights, as in
            "model_ema", are taken where there are no others), and every name may begin with `module.`
            (DataParallel, AveragedModel), `_orig_mod.` (torch.compile) and `model.`, in any order.
            `num_batches_tracked`, which old files lack, may be missing: those counters stay as they
            are. Projections called `shortcut` are the `downsample` of here.

    Returns:
        The network.

    Raises:
        WeightsMismatch: a ValueError that lists the missing, the unexpected and the mis-shaped names,
            among these what is no tensor or has no memory (on the meta device).
        ValueError: the network is on the meta device; or the file is neither format, is damaged, or holds
            other objects than weights; they are not unpickled.
        FileNotFoundError: there is no such file.
        ImportError: a safetensors file, and the package safetensors is not installed.

    Example:
        >>> from resode.networks import build
        >>> trained = {f"module.{name}": value for name, value in build("resnet20").state_dict().items()}
        >>> model = load_weights(build("resnet20"), {"state_dict": trained, "best_prec1": 91.7})
        >>> torch.equal(model.linear.weight, trained["module.linear.weight"])
        True
    """
    own = model.state_dict()
    if any(value.is_meta for value in own.values() if isinstance(value, Tensor)):
        raise ValueError(
            f"this {type(model).__name__} is on the meta device and has no memory for weights: give it some "
            "first, as by model.to_empty(device='cpu')."
        )
    weights = _unwrapped(source if isinstance(source, Mapping) else read_weights(source), own)
    weights = _renamed(weights, own)
    for name, value in own.items():
        if name.endswith(".num_batches_tracked"):
            weights.setdefault(name, value)
    problem = mismatch(model, weights)
    if problem:
        raise WeightsMismatch(problem)
    model.load_state_dict(weights)
    return model


def read_weights(path: str | Path) -> dict[str, Any]:
    """What a safetensors or torch file holds, on the CPU; told apart by its first bytes.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `load_weights`.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a safetensors or torch file in it.")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":  # eight bytes of length, then JSON
        return _safetensors(path)
    if start[:2] != b"PK" and start[:1] != b"\x80":  # a zip file, or a pickle
        raise ValueError(f"{path} is neither a safetensors nor a torch file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are refused in the next lines
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds other objects than tensors, numbers and text, and unpickling them could run any "
            "code; nothing was run. Store the state_dict alone, with safetensors.torch.save_file."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged, or not what torch.save makes of a state dict: {error}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a state dict, and holds a {type(content).__name__}.")
    return content


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path} needs the package safetensors: pip install safetensors.") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no sound safetensors file: {error}.") from error


def _unwrapped(content: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state dict, out of a checkpoint and without prefixes that all names share and `own` has not."""
    while wrapper := next((w for w in _WRAPPERS if isinstance(content.get(w), Mapping)), None):
        content = content[wrapper]
    weights = {str(name): value for name, value in content.items()}
    if any(name.startswith("module.") for name in weights):
        weights.pop("n_averaged", None)  # AveragedModel's counter
    while weights and not any(name in own for name in weights):
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in weights)), None)
        if prefix is None:
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _renamed(weights: dict[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """The option-B projections of CIFAR checkpoints, block.shortcut.0, under the name that `own` has."""

    def name_here(name: str) -> str:
        other = name.replace(".shortcut.", ".downsample.")
        return other if name not in own and other in own else name

    return {name_here(name): value for name, value in weights.items()}
