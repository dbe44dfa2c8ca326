"""CIFAR-10 as it lies on disk: image folders, binary batches and pickled batches, packed or not.

Nothing in the files is trusted: pictures show their size before they are decoded, and pickles build
nothing but the arrays, lists and dictionaries that a batch consists of.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resode.training.data.archives import DataError, read_files, walk

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""CIFAR-10's classes in the order of its labels 0 to 9."""

BINARY_ARCHIVE, PYTHON_ARCHIVE = "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"
PUBLISHED_MD5 = {
    BINARY_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530",
    PYTHON_ARCHIVE: "c58f30108f718f92721af3b95e74349a",
}
"""MD5 of the official archives, by file name, as CIFAR-10's home page publishes them."""

FORMATS = (
    "Accepted are an image folder (train/<class>/*.jpg, *.jpeg or *.png and test/<class>/...), as it is or "
    f"packed as .tar, .tar.xz, .tar.gz, .tgz or .zip; {BINARY_ARCHIVE} or its folder cifar-10-batches-bin; "
    f"{PYTHON_ARCHIVE} or its folder cifar-10-batches-py; or a folder that holds one of these."
)

_SPLITS = ("train", "test")
_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
_ARCHIVE_SUFFIXES = (".tar", ".tar.xz", ".txz", ".tar.gz", ".tgz", ".zip")
_BATCHES = {
    "binary": (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    "python": (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
}
_BATCH_FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
_LEFT_BY_SYSTEMS = ("__MACOSX", "Thumbs.db", "desktop.ini")

# Far above the real ones: 31 MB a batch, 4 kB a picture.
_MAX_BATCH = 64 << 20
_MAX_PICTURE = 1 << 20


class Decoded(NamedTuple):
    """A data set as arrays: images uint8 (N, 3, 32, 32), labels int64 (N,), and what figures call it."""

    title: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class _Member(NamedTuple):
    """What a file's name says about it; `layout` must be the same for all files of a data set."""

    layout: tuple[str, str]  # kind ("pictures", "binary" or "python") and the folder around it
    file: str
    split: str = ""
    label: int = -1


def find_source(path: Path) -> Path:
    """The archive or folder to read: `path` itself, or the one data set that lies in this folder.

    Args:
        path: an archive, the folder of an unpacked one, or a folder that holds either.

    Raises:
        DataError: there is nothing there, nothing that is recognised, or no way to choose.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"CIFAR-10 is read from a folder or an archive: {path} does not exist. {FORMATS}")
    if _looks_like_data(path):
        return path
    for name in _BATCH_FOLDERS:
        if (path / name).is_dir():
            return path / name
    entries = sorted(path.iterdir())
    found = [
        entry
        for entry in entries
        if (entry.is_file() and entry.name.lower().endswith(_ARCHIVE_SUFFIXES))
        or (entry.is_dir() and _looks_like_data(entry))
    ]
    for name in PUBLISHED_MD5:
        if path / name in found:
            return path / name
    if not found and any((path / split).is_dir() for split in _SPLITS):
        return path  # half a data set: reading it says which half is missing
    named = [entry for entry in found if re.search(r"cifar[-_ ]?10(?!0)", entry.name, re.IGNORECASE)]
    choice = named or found
    if not choice:
        seen = ", ".join(entry.name for entry in entries[:8]) or "nothing"
        raise DataError(f"No CIFAR-10 was found in {path}, which holds {seen}. {FORMATS}")
    if len(choice) > 1:
        raise DataError(
            f"{path} holds several archives or folders that may be CIFAR-10: "
            f"{', '.join(entry.name for entry in choice)}. Pass the path of the one to read."
        )
    return choice[0]


def _looks_like_data(folder: Path) -> bool:
    batches = (folder / name for names in _BATCHES.values() for name in names)
    return all((folder / split).is_dir() for split in _SPLITS) or any(path.is_file() for path in batches)


def fingerprint(source: Path) -> list[list[Any]]:
    """Names, sizes in bytes and modification times in ns: what tells a changed source from the same one."""
    if source.is_file():
        files = [("", source)]
    else:
        files = [(name, path) for name, path in walk(source) if _member(name, source)]
    states = [(name, path.stat()) for name, path in files]
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def decode(source: Path) -> Decoded:
    """Reads a whole data set into memory, pictures in the order of class and file name.

    Args:
        source: an archive or folder, as `find_source` gives it.

    Returns:
        The images and labels. Batches keep their own order.

    Raises:
        DataError: the source is damaged, unsafe, incomplete or of another kind.
        ImportError: pictures need Pillow, which is not installed.
    """
    _check_md5(source)
    layouts: set[tuple[str, str]] = set()
    batches: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    pictures: dict[str, list[tuple[int, str, bytes]]] = {split: [] for split in _SPLITS}
    formats: set[str] = set()
    seen: set[str] = set()
    parse = {"binary": _binary_batch, "python": _python_batch}
    for name, content in read_files(source, partial(_limit, source=source), FORMATS):
        member = _member(name, source)
        assert member is not None  # _limit leaves everything else unread
        kind = member.layout[0]
        layouts.add(member.layout)
        if name in seen:
            raise DataError(f"Every file may appear once: {source} holds {name!r} twice. Pack it again.")
        seen.add(name)
        if len(layouts) > 1:
            places = " and ".join(
                sorted(f"{k} in {top!r}" if top else f"{k} in the top folder" for k, top in layouts)
            )
            raise DataError(f"{source} must hold one data set; it holds {places}. {FORMATS}")
        if kind == "pictures":
            pixels, format_ = _picture(content, f"{name!r} in {source}")
            pictures[member.split].append((member.label, member.file, pixels))
            formats.add(format_)
        else:
            batches[member.file] = parse[kind](content, f"{name!r} in {source}")
    if not layouts:
        raise DataError(f"{source} holds neither pictures nor batches of CIFAR-10. {FORMATS}")
    kind = layouts.pop()[0]
    if kind == "pictures":
        title = "CIFAR-10 (JPEG copy)" if "JPEG" in formats else "CIFAR-10 (image folder)"
        return Decoded(
            title, *_stack(pictures["train"], source, "train"), *_stack(pictures["test"], source, "test")
        )
    missing = [name for name in _BATCHES[kind] if name not in batches]
    if missing:
        raise DataError(
            f"CIFAR-10's {kind} version has the files {', '.join(_BATCHES[kind])}; {source} lacks "
            f"{', '.join(missing)}. Fetch or unpack it again."
        )
    images, labels = zip(*(batches[name] for name in _BATCHES[kind]), strict=True)
    return Decoded("CIFAR-10", np.concatenate(images[:5]), np.concatenate(labels[:5]), images[5], labels[5])


def _check_md5(source: Path) -> None:
    published = PUBLISHED_MD5.get(source.name) if source.is_file() else None
    if published is None:
        return
    with source.open("rb") as file:
        found = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
    if found != published:
        raise DataError(
            f"{source} must have the MD5 published for {source.name}, {published}; it has {found}. "
            "It is damaged or incomplete: delete it and fetch it again, or rename it if it is your own."
        )


# ---------------------------------------------------------------------------------------------
# Names


def _member(name: str, source: Path) -> _Member | None:
    """What a file is by its name, None for what is no part of a data set (a README, say)."""
    parts = name.split("/")
    if any(part.startswith(".") or part in _LEFT_BY_SYSTEMS for part in parts):
        return None
    for kind, names in _BATCHES.items():
        if parts[-1] in names and len(parts) <= 2:
            return _Member((kind, "/".join(parts[:-1])), parts[-1])
    depth = next((i for i in (0, 1) if len(parts) > i + 1 and parts[i] in _SPLITS), None)
    if depth is None:
        return None
    split, inside = parts[depth], parts[depth + 1 :]
    is_picture = parts[-1].lower().endswith(_PICTURE_SUFFIXES)
    if not is_picture and inside[0] not in CLASSES:
        return None
    if len(inside) != 2:
        raise DataError(f"Pictures lie in {split}/<class>/, not at {name!r} as in {source}. {FORMATS}")
    if inside[0] not in CLASSES:
        raise DataError(
            f"A class folder has one of CIFAR-10's names, {', '.join(CLASSES)}: {name!r} in {source} "
            f"lies in {inside[0]!r}. Rename or remove that folder."
        )
    if not is_picture:
        raise DataError(
            f"A class folder holds {', '.join(_PICTURE_SUFFIXES)} files alone: {name!r} in {source} is "
            "something else. Convert or remove it."
        )
    return _Member(("pictures", "/".join(parts[:depth])), inside[1], split, CLASSES.index(inside[0]))


def _limit(name: str, source: Path) -> int:
    """The most bytes that a member may have; 0 leaves it unread."""
    member = _member(name, source)
    if member is None:
        return 0
    return _MAX_PICTURE if member.layout[0] == "pictures" else _MAX_BATCH


# ---------------------------------------------------------------------------------------------
# Contents


def _picture(content: bytes, where: str) -> tuple[bytes, str]:
    """Pixels of one picture as bytes (32, 32, 3), and its format, "JPEG" or "PNG"."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Pictures are decoded with Pillow, which is not installed: pip install 'resode[train]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
            size, mode, format_ = picture.size, picture.mode, str(picture.format)
            if size == (_SIDE, _SIDE) and mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
                if mode == "P":  # with transparency it converts to RGB by way of RGBA alone
                    picture = picture.convert("RGBA")
                return (picture if mode == "RGB" else picture.convert("RGB")).tobytes(), format_
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise DataError(
            f"{where} must be a JPEG or PNG picture and could not be read: {type(error).__name__}: {error}. "
            "Fetch it again, or remove it."
        ) from error
    if size != (_SIDE, _SIDE):
        raise DataError(
            f"CIFAR-10's pictures are {_SIDE}x{_SIDE} pixels: {where} is {size[0]}x{size[1]}. Resize it."
        )
    raise DataError(f"{where} must be grey or RGB with 8 bits a channel; its mode is {mode!r}. Convert it.")


def _stack(pictures: list[tuple[int, str, bytes]], source: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) and labels (N,), in the order of class and file name."""
    labels = np.array(sorted(label for label, _, _ in pictures), dtype=np.int64)
    missing = [name for label, name in enumerate(CLASSES) if label not in set(labels.tolist())]
    if missing:
        raise DataError(
            f"{split}/ must hold at least one picture of each of the {len(CLASSES)} classes: {source} has "
            f"none of {', '.join(missing)} there. {FORMATS}"
        )
    pixels = np.frombuffer(b"".join(pixels for _, _, pixels in sorted(pictures)), dtype=np.uint8)
    return np.ascontiguousarray(pixels.reshape(-1, _SIDE, _SIDE, 3).transpose(0, 3, 1, 2)), labels


def _binary_batch(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label and 3,072 pixels, red before green before blue."""
    count, rest = divmod(len(content), 1 + _PIXELS)
    if rest or not count:
        raise DataError(
            f"A binary batch is made of records of {1 + _PIXELS} bytes: {where} has {len(content):,}, "
            f"{count} records and {rest} bytes over. It is truncated or no batch: fetch or unpack it again."
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(count, 1 + _PIXELS)
    return _checked(records[:, 1:], records[:, 0], where)


def _python_batch(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dictionary with data, uint8 (N, 3072), and labels, a list of N numbers."""
    try:
        batch = _load_pickle(content)
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(
            f"{where} must be a pickle of arrays, bytes, strings, lists, dictionaries and whole numbers "
            f"alone, and was refused: {type(error).__name__}: {error}. Get it from CIFAR-10's home page."
        ) from error
    if not isinstance(batch, dict):
        raise DataError(f"{where} must be a pickled dictionary, not {type(batch).__name__}. {FORMATS}")
    data, labels = (batch.get(key, batch.get(key.decode())) for key in (b"data", b"labels"))
    data = data.array if isinstance(data, _Array) else None
    if data is None or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS:
        raise DataError(
            f"A pickled batch has data, a uint8 array (N, {_PIXELS}): {where} has "
            f"{'none' if data is None else f'{data.dtype} {data.shape}'}. Fetch or unpack it again."
        )
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"A pickled batch has labels, a list of whole numbers: {where} has none. {FORMATS}")
    return _checked(data, np.array(labels, dtype=object), where)


def _checked(data: np.ndarray, labels: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    if len(labels) != len(data) or not len(data):
        raise DataError(f"A batch has as many labels as images: {where} has {len(labels)} and {len(data)}.")
    outside = [label for label in labels.tolist() if not 0 <= label < len(CLASSES)]
    if outside:
        raise DataError(
            f"Labels are 0 to {len(CLASSES) - 1}: {where} has {outside[0]}. It is damaged or another data "
            "set (CIFAR-100 has 100 classes); fetch CIFAR-10 again."
        )
    return data.reshape(-1, 3, _SIDE, _SIDE).copy(), labels.astype(np.int64)


# ---------------------------------------------------------------------------------------------
# Pickles: stand-ins take the place of every global, so that nothing named in the file is ever called


def _load_pickle(content: bytes) -> Any:
    for opcode, argument, _ in pickletools.genops(content):  # also checks the lengths against the file
        if "PUT" in opcode.name and (argument or 0) > len(content):
            raise pickle.UnpicklingError(f"memo {argument} in {len(content)} bytes")
    return _Unpickler(io.BytesIO(content), encoding="bytes").load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """A fresh stand-in for each admitted global: one that the pickle altered is never met again."""
        if (module, name) == ("numpy", "dtype"):
            return lambda code, align=False, copy=False: _Dtype(code)
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: _encode_latin1(text, encoding)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda subtype, shape, code: _Array()
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return lambda data, dtype, shape, order: _Array().fill(shape, dtype, order == "F", data)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes; `_codecs.encode` itself would run any codec."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


class _Dtype:
    """A whole-number dtype; numpy's own would take flags and fields from the pickle."""

    __slots__ = ("code", "dtype")

    def __init__(self, code: str | bytes) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code
        if not re.fullmatch(r"[iu][1248]", self.code):
            raise pickle.UnpicklingError(f"it holds an array of dtype {self.code!r}, not of whole numbers")
        self.dtype = np.dtype(self.code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if order not in ("|", "<", ">", "=") or state[2:5] != (None, None, None):
            raise pickle.UnpicklingError("it holds an array of a structured dtype")
        self.dtype = np.dtype(order + self.code)


class _Array:
    """An array under construction: an empty one is made first, and its contents follow."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(shape, dtype, fortran, data)

    def fill(self, shape: tuple[int, ...], dtype: _Dtype, fortran: bool, data: bytes) -> _Array:
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError("it holds an array without its bytes")
        self.array = np.frombuffer(data, dtype=dtype.dtype).reshape(shape, order="F" if fortran else "C")
        return self
