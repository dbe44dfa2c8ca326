"""CIFAR-10 and CIFAR-100 as they lie on disk: image folders, binary and pickled batches, packed or not.

Nothing in the files is trusted: pictures show their size before they are decoded, and pickles build
nothing but the arrays, lists and dictionaries that a batch consists of.
"""

from __future__ import annotations

import csv
import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resode.training.data.archives import DataError, read_files, walk
from resode.training.data.cifar_tables import COARSE_OF_FINE, PUBLISHED_MD5, Cifar
from resode.training.data.pickles import StandIn, load_pickle
from resode.training.data.pictures import read_picture

_SPLITS = {"train": "train", "training": "train"} | dict.fromkeys(
    ("test", "testing", "val", "valid", "validation"), "test"
)
_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
_ARCHIVE_SUFFIXES = (".tar", ".tar.xz", ".txz", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".zip")
_LEFT_BY_SYSTEMS = (
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found", "icon\r",
)  # fmt: skip
_LABELS_FILE = "trainlabels.csv"
_WRAPPERS = 2  # folders around train/ and test/

# Far above the real ones: 154 MB a batch (CIFAR-100's only one), 4 kB a picture, 600 kB of labels.
_MAX_BATCH = 256 << 20
_MAX_PICTURE = 1 << 20
_MAX_LABELS = 8 << 20


class Decoded(NamedTuple):
    """A data set as arrays: images uint8 (N, 3, 32, 32), labels int64 (N,), and what figures call it."""

    title: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class _Member(NamedTuple):
    """What a file's name says about it; `layout` must be the same for all files of a data set."""

    layout: tuple[str, str]  # kind ("binary", "python" or some "pictures") and the folder around it
    file: str
    split: str = ""  # as the folder is called
    label: int | None = None  # None where the name does not say it


def find_source(path: Path, kind: Cifar) -> Path:
    """The archive or folder to read: `path` itself, or the one data set that lies in this folder.

    Args:
        path: an archive, the folder of an unpacked one, or a folder that holds either.
        kind: the data set looked for.

    Raises:
        DataError: there is nothing there, nothing that is recognised, or no way to choose.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(
            f"{kind.title} is read from a folder or an archive: {path} does not exist. {kind.formats}"
        )
    if _looks_like_data(path, kind):
        return path
    for name in kind.folders:
        if (path / name).is_dir():
            return path / name
    entries = sorted(path.iterdir())
    found = [
        entry
        for entry in entries
        if (entry.is_file() and entry.name.lower().endswith(_ARCHIVE_SUFFIXES))
        or (entry.is_dir() and _looks_like_data(entry, kind))
    ]
    for name in kind.archives:
        if path / name in found:
            return path / name
    if not found:
        below = [entry for folder in entries if folder.is_dir() for entry in sorted(folder.iterdir())]
        found = [entry for entry in below if entry.is_dir() and _looks_like_data(entry, kind)]
    if not found and any(entry.is_dir() and entry.name.casefold() in _SPLITS for entry in entries):
        return path  # half a data set: reading it says which half is missing
    pattern = rf"cifar[-_ ]?{kind.number}(?!0)"
    named = [entry for entry in found if re.search(pattern, entry.name, re.IGNORECASE)]
    choice = named or found
    if not choice:
        seen = ", ".join(entry.name for entry in entries[:8]) or "nothing"
        raise DataError(f"No {kind.title} was found in {path}, which holds {seen}. {kind.formats}")
    if len(choice) > 1:
        raise DataError(
            f"{path} holds several archives or folders that may be {kind.title}: "
            f"{', '.join(entry.name for entry in choice)}. Pass the path of the one to read."
        )
    return choice[0]


def _looks_like_data(folder: Path, kind: Cifar) -> bool:
    if any((folder / name).is_file() for names in kind.batches.values() for name in names):
        return True
    entries = {entry.name.casefold(): entry for entry in folder.iterdir()}
    splits = {_SPLITS[name] for name, entry in entries.items() if name in _SPLITS and entry.is_dir()}
    return len(splits) == 2 or ("train" in splits and _LABELS_FILE in entries)


def fingerprint(source: Path, kind: Cifar) -> list[list[Any]]:
    """Names, sizes in bytes and modification times in ns: what tells a changed source from the same one."""
    if source.is_file():
        files = [("", source)]
    else:
        files = [(name, path) for name, path in walk(source) if _member(name, source, kind)]
    states = [(name, path.stat()) for name, path in files]
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def decode(source: Path, kind: Cifar) -> Decoded:
    """Reads a whole data set into memory, pictures in the order of class and file name.

    Args:
        source: an archive or folder, as `find_source` gives it.
        kind: which data set it is, and which of its labels are wanted.

    Returns:
        The images and labels. Batches keep their own order.

    Raises:
        DataError: the source is damaged, unsafe, incomplete or of another kind.
        ImportError: pictures need Pillow, which is not installed.
    """
    _check_md5(source)
    layouts: dict[tuple[str, str], str] = {}  # and the first file of each
    unread: list[str] = []
    batches: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    pictures = _Pictures(source, kind)
    seen: set[str] = set()
    parse = {"binary": _binary_batch, "python": _python_batch}
    for name, content in read_files(
        source, partial(_limit, source=source, kind=kind, unread=unread), kind.formats
    ):
        member = _member(name, source, kind)
        assert member is not None  # _limit leaves everything else unread
        version = member.layout[0]
        layouts.setdefault(member.layout, name)
        if name in seen:
            raise DataError(f"Every file may appear once: {source} holds {name!r} twice. Pack it again.")
        seen.add(name)
        if len(layouts) > 1:
            places = " and ".join(
                sorted(f"{k} in {top or 'the top folder'} ({file!r})" for (k, top), file in layouts.items())
            )
            raise DataError(f"{source} must hold one data set; it holds {places}. {kind.formats}")
        if version in parse:
            batches[member.file] = parse[version](content, f"{name!r} in {source}", kind)
        else:
            pictures.add(name, member, content)
    if not layouts:
        raise DataError(f"{source} holds neither pictures nor batches of {kind.title}. {kind.formats}")
    [(version, _)] = layouts
    if unread and version != _UNSORTED:
        raise DataError(f"Pictures lie in test/<class>/, not at {unread[0]!r} as in {source}. {kind.formats}")
    if version not in parse:
        return pictures.decoded()
    files = kind.batches[version]
    missing = [name for name in files if name not in batches]
    if missing:
        raise DataError(
            f"{kind.title}'s {version} version has the files {', '.join(files)}; {source} lacks "
            f"{', '.join(missing)}. Fetch or unpack it again."
        )
    images, labels = zip(*(batches[name] for name in files), strict=True)
    return Decoded(
        kind.title, np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1]
    )


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


def _member(name: str, source: Path, kind: Cifar) -> _Member | None:
    """What a file is by its name, None for what is no part of a data set (a README, say)."""
    parts = name.split("/")
    if any(part.startswith(".") or part.casefold() in _LEFT_BY_SYSTEMS for part in parts):
        return None
    for version, names in kind.batches.items():
        if parts[-1] in names and len(parts) <= 1 + _WRAPPERS:
            return _Member((version, "/".join(parts[:-1])), parts[-1])
    if parts[-1].casefold() == _LABELS_FILE and len(parts) <= 1 + _WRAPPERS:
        return _Member((_UNSORTED, "/".join(parts[:-1])), parts[-1])
    inner = range(min(_WRAPPERS + 1, len(parts) - 1))
    depth = next((i for i in inner if parts[i].casefold() in _SPLITS), None)
    if depth is None:
        return None
    return _picture_member(name, parts, depth, source, kind)


def _picture_member(name: str, parts: list[str], depth: int, source: Path, kind: Cifar) -> _Member | None:
    """A picture by its place below train/ or test/, which is parts[depth]."""
    split, top, inside = parts[depth], "/".join(parts[:depth]), parts[depth + 1 :]
    is_picture = parts[-1].lower().endswith(_PICTURE_SUFFIXES)
    labels = [kind.label_of(folder) for folder in inside[:-1]]
    if not is_picture and (not labels or labels[-1] is None):
        return None
    if not labels:
        return _Member((_UNSORTED, top), inside[0], split)
    if len(labels) > 2 or (len(labels) == 2 and labels[0] not in (None, labels[1])):
        raise DataError(f"Pictures lie in {split}/<class>/, not at {name!r} as in {source}. {kind.formats}")
    if labels[-1] is None:
        raise DataError(
            f"A class folder has one of {kind.title}'s names, {', '.join(kind.classes)}, or a number from "
            f"0 to {len(kind.classes) - 1}: {name!r} in {source} lies in {inside[-2]!r}. Rename or remove "
            "that folder."
        )
    if not is_picture:
        raise DataError(
            f"A class folder holds {', '.join(_PICTURE_SUFFIXES)} files alone: {name!r} in {source} is "
            "something else. Convert or remove it."
        )
    numbered = inside[-2].isdigit()
    layout = ("pictures in numbered folders" if numbered else "pictures", top)
    return _Member(layout, "/".join(inside), split, labels[-1])


_UNSORTED = "pictures without class folders"


def _limit(name: str, source: Path, kind: Cifar, unread: list[str]) -> int:
    """The most bytes that a member may have; 0 leaves it unread, and adds a picture to `unread`."""
    member = _member(name, source, kind)
    if member is None:
        return 0
    if member.layout[0] in kind.batches:
        return _MAX_BATCH
    if not member.split:
        return _MAX_LABELS
    # Kaggle's 300,000 test pictures have no labels that were ever published.
    if member.label is None and _SPLITS[member.split.casefold()] == "test":
        unread.append(name)
        return 0
    return _MAX_PICTURE


# ---------------------------------------------------------------------------------------------
# Pictures


class _Pictures:
    """The pictures of a folder or archive as they come, and their labels as soon as these are known."""

    def __init__(self, source: Path, kind: Cifar) -> None:
        self.source, self.kind = source, kind
        self.found: dict[str, list[tuple[int | None, str, bytes]]] = {"train": [], "test": []}
        self.splits: dict[str, str] = {}  # "train" or "test" -> what its folder is called
        self.formats: set[str] = set()
        self.labels: dict[str, int] | None = None

    def add(self, name: str, member: _Member, content: bytes) -> None:
        where = f"{name!r} in {self.source}"
        if not member.split:
            self.labels = _kaggle_labels(content, where, self.kind)
            return
        split = _SPLITS[member.split.casefold()]
        if self.splits.setdefault(split, member.split) != member.split:
            raise DataError(
                f"One folder holds the {split} pictures: {self.source} has {self.splits[split]}/ and "
                f"{member.split}/. Pass a folder or archive with one of them."
            )
        picture = read_picture(content, where, (_SIDE, _SIDE))
        pixels = np.broadcast_to(picture.pixels, (_SIDE, _SIDE, 3)).tobytes()  # grey is three equal colours
        self.found[split].append((member.label, member.file, pixels))
        self.formats.add(picture.format)

    def decoded(self) -> Decoded:
        title = f"{self.kind.title} ({'JPEG copy' if 'JPEG' in self.formats else 'image folder'})"
        train, test = self.found["train"], self.found["test"]
        if self.labels is not None:
            title = f"{self.kind.title} (Kaggle's training pictures, every fifth held out)"
            train, test = self._held_out(self.labels)
        elif any(label is None for label, _, _ in train):
            loose = next(file for label, file, _ in train if label is None)
            raise DataError(
                f"Pictures lie in train/<class>/, not at {self.splits['train'] + '/' + loose!r} as in "
                f"{self.source}, where no trainLabels.csv says what they show. {self.kind.formats}"
            )
        return Decoded(title, *self._stack(train, "train"), *self._stack(test, "test"))

    def _held_out(self, labels: dict[str, int]) -> tuple[list[Any], list[Any]]:
        """Labelled training and test pictures: every fifth of a class, in order of number, is a test."""
        pictures = {Path(file).stem: pixels for _, file, pixels in self.found["train"]}
        for of, names, others in (
            ("picture without a label", pictures, labels),
            ("label without a picture", labels, pictures),
        ):
            alone = sorted(set(names) - set(others), key=_by_number)
            if alone:
                raise DataError(
                    f"trainLabels.csv must have one line for each picture of train/: {self.source} has "
                    f"{len(alone):,} {of if len(alone) == 1 else of.replace(' ', 's ', 1)}, such as "
                    f"{alone[0]!r}. Get both again."
                )
        train, test = [], []
        counts = [0] * len(self.kind.classes)
        for name in sorted(labels, key=_by_number):
            label = labels[name]
            held = counts[label] % 5 == 4
            (test if held else train).append((label, f"{int(name):012d}", pictures[name]))
            counts[label] += 1
        return train, test

    def _stack(self, pictures: list[Any], split: str) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, 3, 32, 32) and labels (N,), in the order of class and file name."""
        labels = np.array(sorted(label for label, _, _ in pictures), dtype=np.int64)
        there = set(labels.tolist())
        missing = [name for label, name in enumerate(self.kind.classes) if label not in there]
        if missing:
            raise DataError(
                f"{self.splits.get(split, split)}/ must hold at least one picture of each of the "
                f"{len(self.kind.classes)} classes: {self.source} has none of {', '.join(missing)} there. "
                f"{self.kind.formats}"
            )
        pixels = np.frombuffer(b"".join(pixels for _, _, pixels in sorted(pictures)), dtype=np.uint8)
        return np.ascontiguousarray(pixels.reshape(-1, _SIDE, _SIDE, 3).transpose(0, 3, 1, 2)), labels


def _by_number(name: str) -> tuple[int, str]:
    return (int(name) if name.isascii() and name.isdigit() else -1, name)


def _kaggle_labels(content: bytes, where: str, kind: Cifar) -> dict[str, int]:
    """Label of each picture, from lines "id,label" below a heading of these words."""
    try:
        lines = list(csv.reader(content.decode("utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} must be a table of text, and is none: {error}. Get it again.") from error
    if not lines or [word.strip().lower() for word in lines[0]] != ["id", "label"]:
        raise DataError(
            f"{where} must have the columns id and label: it has {lines[0] if lines else 'nothing'}."
        )
    labels: dict[str, int] = {}
    for row, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        name, label = (line[0], kind.label_of(line[1].strip())) if len(line) == 2 else ("", None)
        if label is None or not name.isdigit() or not name.isascii() or name in labels:
            raise DataError(
                f"Each line of {where} holds a picture's number, once, and one of {kind.title}'s classes "
                f"({', '.join(kind.classes)}): line {row} is {','.join(line)!r}. Get it again."
            )
        labels[name] = label
    return labels


# ---------------------------------------------------------------------------------------------
# Batches


def _binary_batch(content: bytes, where: str, kind: Cifar) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label (CIFAR-100: coarse and fine) and 3,072 pixels, red before green before blue."""
    before = len(kind.keys)
    count, rest = divmod(len(content), before + _PIXELS)
    if rest or not count:
        raise DataError(
            f"A binary batch is made of records of {before + _PIXELS} bytes: {where} has {len(content):,}, "
            f"{count} records and {rest} bytes over. It is truncated or no batch: fetch or unpack it again."
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(count, before + _PIXELS)
    return _checked(records[:, before:], list(records[:, :before].T), where, kind)


def _python_batch(content: bytes, where: str, kind: Cifar) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dictionary with data, uint8 (N, 3072), and labels, N whole numbers."""
    try:
        batch = load_pickle(content)
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(
            f"{where} must be a pickle of arrays, bytes, strings, lists, dictionaries and whole numbers "
            f"alone, and was refused: {type(error).__name__}: {error}. Get it from the data set's home page."
        ) from error
    if not isinstance(batch, dict):
        raise DataError(f"{where} must be a pickled dictionary, not {type(batch).__name__}. {kind.formats}")
    data, *labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", *kind.keys))
    data = data.array if isinstance(data, StandIn) else None
    if data is None or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS:
        raise DataError(
            f"A pickled batch has data, a uint8 array (N, {_PIXELS}): {where} has "
            f"{'none' if data is None else f'{data.dtype} {data.shape}'}. Fetch or unpack it again."
        )
    return _checked(
        data, [_numbers(k, v, where, kind) for k, v in zip(kind.keys, labels, strict=True)], where, kind
    )


def _numbers(key: str, values: Any, where: str, kind: Cifar) -> np.ndarray:
    """Labels as they are pickled: a list, a tuple or an array of whole numbers."""
    if isinstance(values, StandIn) and values.array is not None and values.array.ndim == 1:
        return values.array
    if not isinstance(values, list | tuple) or not all(type(label) is int for label in values):
        raise DataError(
            f"A pickled batch has {key}, a list, tuple or array of whole numbers: {where} has none. "
            f"{kind.formats}"
        )
    return np.array(values, dtype=object)


def _checked(
    data: np.ndarray, labels: list[np.ndarray], where: str, kind: Cifar
) -> tuple[np.ndarray, np.ndarray]:
    """Images and the wanted labels; `labels` has those of every key."""
    counts = (1 + max(COARSE_OF_FINE), len(COARSE_OF_FINE)) if len(labels) == 2 else (kind.number,)
    for key, values, classes in zip(kind.keys, labels, counts, strict=True):
        if len(values) != len(data) or not len(data):
            raise DataError(
                f"A batch has as many {key} as images: {where} has {len(values)} and {len(data)}."
            )
        outside = [label for label in values.tolist() if not 0 <= label < classes]
        if outside:
            raise DataError(
                f"{key.replace('_', ' ').capitalize()} are 0 to {classes - 1}: {where} has {outside[0]}. It "
                f"is damaged or another data set; fetch {kind.title} again."
            )
    whole = [values.astype(np.int64) for values in labels]
    if len(whole) == 2 and not np.array_equal(np.array(COARSE_OF_FINE)[whole[1]], whole[0]):
        raise DataError(
            f"Coarse labels are those of the fine ones' groups: {where} has others. It is damaged or another "
            f"data set; fetch {kind.title} again."
        )
    return data.reshape(-1, 3, _SIDE, _SIDE).copy(), whole[kind.label]
