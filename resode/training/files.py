"""Files that are whole or not there: atomic writing, tensors with a checksum, settings in YAML.

Tensors are stored as safetensors, so nothing here is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

MAX_DEPTH = 32
"""How deep a YAML file of settings may be nested; a run's own is 2 deep."""


class RunError(RuntimeError):
    """A run folder cannot be used, or a run could not go on."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """By the message that it has: some kinds make theirs from other arguments."""
        return _error_again, (type(self), str(self), vars(self))


def _error_again(kind: type[RunError], message: str, about: Mapping[str, Any]) -> RunError:
    error = kind.__new__(kind, message)
    vars(error).update(about)
    return error


class SettingsError(RunError):
    """A file of settings is missing or holds something else."""

    exit_code = 2


class DamagedFile(RunError):
    """A file of a run is cut short, was changed, or is none of its kind."""


def write_atomically(path: Path, content: bytes | str) -> Path:
    """Write a file beside its place, then move it there in one step; on an OSError nothing has changed."""
    content = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    return path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """For writers that want a path: they get one beside it, which is moved there when they are done.

    Raises:
        RunError: the file cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        raise unusable(path.parent, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """A safetensors file with `about` and a checksum over both in its header."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(dict(about), ensure_ascii=False)
    return save(plain, metadata={"resode": text, "sha256": _checksum(plain, text)})


def unpack(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a safetensors file; the header is empty where resode did not write it.

    Raises:
        DamagedFile: it is cut short, was changed, or is no safetensors file.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    text = metadata.get("resode")
    if text is None:
        return tensors, {}
    if metadata.get("sha256") != _checksum(tensors, text):
        raise DamagedFile(f"{path} does not match its checksum: it was changed after it was written.")
    return tensors, read_json(text, path)


def read_header(path: str | Path) -> dict[str, Any]:
    """What `unpack` gives beside the tensors, without reading or checking them.

    Raises:
        DamagedFile: there is none, or it is no safetensors file.
    """
    with _opened(path) as file:
        return read_json((file.metadata() or {}).get("resode", "{}"), path)


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFile(f"{path} is no sound safetensors file: {error}.") from error


def read_json(text: str, path: str | Path) -> Any:
    """What a text in a file says; a DamagedFile where it is no JSON, or nested beyond Python's own bound."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # nested beyond what Python's stack holds
        raise DamagedFile(f"{path} is no sound JSON file: {error}.") from error


_INT = "tag:yaml.org,2002:int"
_PLAIN_INT = re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)$")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everyone writes it, and 1:10 is text, not 70 in base 60."""


# add_implicit_resolver copies the parent's table first, so SafeLoader stays as it was.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


for _first, _kinds in _Loader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_first] = [
        (tag, _PLAIN_INT if tag == _INT else pattern) for tag, pattern in _kinds
    ]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping a YAML file holds.

    Raises:
        SettingsError: there is no such file, it is no YAML, or it holds something else than settings.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):  # one after the other, before anything is built
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
                what = "an alias (*name)" if depth <= MAX_DEPTH else "more"
                raise SettingsError(
                    f"{path} holds {what}, and settings are nested at most {MAX_DEPTH} deep and written out."
                )
        content = yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings could not be read from {path}: {error}.") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is no YAML: {error}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(
            f"{path} must hold settings as `name: value` lines, got {type(content).__name__}."
        )
    return content


def unusable(path: Path, error: OSError) -> RunError:
    """What to do about an operating system's refusal to use a run folder."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"the disk is full: {path} could not be written ({error.strerror}). What was written before is "
            f"kept. Free some space; a run that has begun goes on with --resume {path}."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RunError(
            f"{path} cannot be written ({error.strerror}). Give a --run-dir in a folder of yours, "
            "or change its permissions."
        )
    return RunError(
        f"{path} cannot be used as a run folder: {error.strerror or error}. Give another --run-dir."
    )


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
