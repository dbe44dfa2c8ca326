"""Weights that others have trained, from safetensors or torch files, never by unpickling objects.

What the names in them mean is `names.py`'s; which network they are of, where they do not fit, `nearest.py`'s.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from resode.checks import checked
from resode.networks.names import renamed, unwrapped
from resode.networks.nearest import nearest
from resode.state_dicts import WeightsMismatch, mismatch

Module = TypeVar("Module", bound=nn.Module)


@checked
def load_weights(model: Module, source: str | Path | Mapping[str, Any]) -> Module:
    """Put weights into a network, strictly: every name must be there, and none too many.

    Args:
        model: the network, changed in place; nothing is changed where the weights do not fit.
        source: a safetensors or torch file, or a state dict. It may be wrapped as
            {"state_dict": …} beside other entries (or "model", "net", …; averaged weights, as in
            "model_ema", are taken where there are no others), and every name may begin with `module.`
            (DataParallel, AveragedModel), `_orig_mod.` (torch.compile), `model.`, `net.`, `network.`,
            `backbone.`, `encoder.` and `resnet.`, in any order; a loss's or metric's own entries beside them,
            as Lightning stores, are left out. `num_batches_tracked`, which old files lack, may be missing:
            those counters stay as they are. torchvision's, timm's (resnet, resnetv2), transformers'
            (ResNet) and the widespread CIFAR repositories' names are taken, with the last layer called
            `fc` or `linear`, projections `downsample` or `shortcut`.

    Returns:
        The network.

    Raises:
        WeightsMismatch: a ValueError that lists the missing, the unexpected and the mis-shaped names,
            among these what is no tensor or has no memory (on the meta device), and names the network that
            the weights are of, or the nearest.
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
    given = unwrapped(source if isinstance(source, Mapping) else read_weights(source), own)
    weights = renamed(given, own)
    for name, value in own.items():
        if name.endswith(".num_batches_tracked"):
            weights.setdefault(name, value)
    problem = mismatch(model, weights)
    if problem:
        raise WeightsMismatch(problem + nearest(given))
    model.load_state_dict(weights)
    return model


@checked
def read_weights(path: str | Path) -> dict[str, Any]:
    """What a safetensors or torch file holds, on the CPU; told apart by its first bytes.

    Args:
        path: of the file.

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
    foreign = next((kind for mark, kind in _NOT_READ.items() if start.startswith(mark)), None)
    members = _members(path) if start[:2] == b"PK" else []
    names = [member.filename for member in members]
    unpacked, most = sum(member.file_size for member in members), _RATIO * path.stat().st_size
    if unpacked > most:
        raise ValueError(
            f"{path} would take {unpacked:,} bytes, more than {_RATIO} times its own size ({most:,}), "
            "and torch stores weights unpacked. Nothing was read; get the file from a source you trust."
        )
    if names and all(name.endswith(".npy") for name in names):
        foreign = "a NumPy archive"
    elif any(name.endswith("/constants.pkl") for name in names):
        foreign = "a TorchScript program"
    if foreign:
        raise ValueError(
            f"{path} is {foreign}, and weights are read from safetensors or torch files: make a dictionary "
            "of its tensors, by the program that wrote it, and pass that."
        )
    if start[:2] != b"PK" and start[:1] != b"\x80":  # a zip file, or a pickle
        raise ValueError(f"{path} is neither a safetensors nor a torch file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are refused in the next lines
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds other objects than tensors, numbers and text{_refused(path)}, and unpickling them "
            "could run any code; nothing was run. Store the state_dict alone, with "
            "safetensors.torch.save_file; or, of a file that you trust, pass load_weights what "
            f"torch.load({str(path)!r}, weights_only=False) gives."
        ) from error
    except Exception as error:  # damaged bytes end torch's reader in many ways: struct.error, LookupError, …
        raise ValueError(
            f"{path} is damaged, or not what torch.save makes of a state dict: {error}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a state dict, and holds a {type(content).__name__}.")
    return content


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """What a zip file's directory lists; a ValueError where it is damaged, in any of zipfile's ways."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (
        zipfile.BadZipFile,
        ValueError,
        NotImplementedError,
        OverflowError,
        OSError,
        struct.error,
    ) as error:
        raise ValueError(f"{path} is damaged, or no torch file: {error}. Get it again.") from error


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


_RATIO = 4
"""Bytes at most that a zip file's members may have together, for each of its own; torch.save makes 1."""

_NOT_READ = {b"\x89HDF": "an HDF5 file (Keras)", b"\x93NUMPY": "a NumPy array", b"GGUF": "a GGUF file"}
"""Files of weights that are not read, by the bytes they start with."""

# What torch.load(weights_only=True) builds.
_ADMITTED = ("torch", "collections", "_codecs")


def _refused(path: Path) -> str:
    """Which object of a pickle is none of torch's, and under which name it stands; empty if not found."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                content = archive.read(name)
        else:
            content = path.read_bytes()
        recent: list[str] = []  # texts and the text before each, the entry's name among them
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                words = str(argument).split(" ") if opcode.name == "GLOBAL" else recent[-2:]
                if words[0].split(".")[0] not in _ADMITTED:
                    before = recent if opcode.name == "GLOBAL" else recent[:-2]
                    entry = f"entry {before[-1]!r} " if before else ""
                    number = " (a numpy number)" if words[-1] == "scalar" else ""
                    return f": {entry}is a {'.'.join(words)}{number}"
            elif isinstance(argument, str) and "UNICODE" in opcode.name:
                recent.append(argument)
    except Exception:  # the file is refused anyway; it may be damaged in any way
        pass
    return ""
