"""Files from folders, archives and the network that nobody vouches for.

Archives are read file by file in memory, never unpacked to the paths that they name. A member's name
is checked before anything of it is read, and its size before anything of it is decompressed.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import http.client
import io
import lzma
import os
import secrets
import stat
import struct
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# The real archives stay below: 60,024 members, 184 MB in all, 154 MB a batch, 4 kB a picture; 350,002
# members on Kaggle, where 290,000 pictures are there against cheating.
MAX_MEMBERS = 400_000
MAX_TOTAL = 2 << 30
_MAX_READ = 256 << 20

# By the bytes that a file starts with.
_PACKED = {b"\xfd7zXZ\x00": lzma.open, b"\x1f\x8b": gzip.open, b"BZh": bz2.open}
_NOT_READ = {
    b"7z\xbc\xaf'\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"(\xb5/\xfd": "packed with zstd",
    b"PAR1": "a Parquet table",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"MATLAB": "a MATLAB file",
}
_READ_ERRORS = (
    tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, struct.error, OSError, EOFError,
    ValueError, OverflowError, RuntimeError, NotImplementedError, MemoryError, LookupError,
)  # fmt: skip


class DataError(ValueError):
    """A data set that is missing, damaged, unsafe or of another kind; the message says what to do."""


def read_files(source: Path, limit: Callable[[str], int], accepted: str) -> Iterator[tuple[str, bytes]]:
    """The wanted files of a folder or archive, one after the other.

    Args:
        source: a folder, or a .tar (plain, xz, gzip or bzip2) or .zip archive, told by how the file starts.
        limit: gives the most bytes that a file may have by its name, such as "train/cat/1.png"; 0 leaves
            it unread.
        accepted: a sentence for messages that says what may be read.

    Yields:
        (name, content), in the archive's order or sorted in a folder, hard links of a tar last; names have
        forward slashes.

    Raises:
        DataError: a member of an archive points outside it, is a symbolic link or a device, or a hard link
            to what is no file of the archive; something is larger than its limit; or the archive is
            truncated, damaged or of another kind.
    """
    try:
        if source.is_dir():
            yield from _read_folder(source, limit)
            return
        with source.open("rb") as file:
            start = file.read(6)
        foreign = next((kind for mark, kind in _NOT_READ.items() if start.startswith(mark)), None)
        if foreign is not None:
            raise DataError(
                f"{source} is {foreign}, which is not read. Unpack it and pass the folder. {accepted}"
            )
        if start[:2] == b"PK":
            yield from _read_zip(source, limit)
        else:
            opener = next((opener for mark, opener in _PACKED.items() if start.startswith(mark)), open)
            yield from _read_tar(source, limit, opener)
    except DataError:
        raise
    except _READ_ERRORS as error:
        raise DataError(
            f"{source} could not be read to its end: {type(error).__name__}: {error}. "
            f"It is truncated, damaged or of another kind; get it again. {accepted}"
        ) from error


class _Budget:
    """Counts members and bytes by their headers, before anything is unpacked."""

    def __init__(self, source: Path) -> None:
        self.source, self.members, self.total = source, 0, 0

    def admit(self, name: str, size: int, limit: int) -> None:
        self.members += 1
        self.total += size
        if size < 0 or self.members > MAX_MEMBERS or self.total > MAX_TOTAL:
            raise DataError(
                f"A data set has at most {MAX_MEMBERS:,} files and {MAX_TOTAL >> 20} MiB unpacked; "
                f"{self.source} passes that at {name!r}. Pass an archive of the data set alone."
            )
        if limit and size > limit:
            raise DataError(
                f"{name!r} in {self.source} may have at most {limit:,} bytes; it has {size:,}. "
                "It is no part of the data set: remove it."
            )


def walk(folder: Path, prefix: str = "", depth: int = 6) -> Iterator[tuple[str, Path]]:
    """Files up to `depth` levels down, in order; the bound also ends loops of links."""
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_file():
            yield prefix + entry.name, Path(entry.path)
        elif entry.is_dir() and depth > 1:
            yield from walk(Path(entry.path), f"{prefix}{entry.name}/", depth - 1)


def _read_folder(folder: Path, limit: Callable[[str], int]) -> Iterator[tuple[str, bytes]]:
    budget = _Budget(folder)
    for name, path in walk(folder):
        most = limit(name)
        if most:
            budget.admit(name, path.stat().st_size, most)
            yield name, path.read_bytes()


def _read_zip(source: Path, limit: Callable[[str], int]) -> Iterator[tuple[str, bytes]]:
    budget = _Budget(source)
    with zipfile.ZipFile(source) as archive:
        for info in archive.infolist():
            name = _safe_name(info.filename, source)
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _unsafe(info.filename, source, "a link or device")
            most = 0 if info.is_dir() else limit(name)
            budget.admit(name, info.file_size, most)
            if most:
                yield name, archive.read(info)  # reads file_size bytes at most, then compares the CRC


class _Stream(io.RawIOBase):
    """What tarfile reads from: bounds each read, and remembers the last one.

    A header may claim any size for the names and attributes that follow it, and tarfile reads them in
    one piece; it also takes a damaged header for the end of the archive.
    """

    def __init__(self, raw: Any) -> None:
        self.raw, self.last = raw, b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        self.last = self.raw.read(size)
        return self.last

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.raw.seek(offset, whence)

    def tell(self) -> int:
        return self.raw.tell()


def _read_tar(
    source: Path, limit: Callable[[str], int], opener: Callable[..., Any]
) -> Iterator[tuple[str, bytes]]:
    budget = _Budget(source)
    sizes: dict[str, int] = {}
    links: dict[str, list[str]] = {}  # file -> the wanted names that are hard links to it
    first: dict[str, str] = {}  # any name of a file -> the name under which its content stands
    for info, name, read in _tar_members(source, opener):
        if info.islnk():
            target = first.get(_safe_name(info.linkname, source))
            if target is None:
                raise _unsafe(
                    info.name, source, f"a link to {info.linkname!r}, no file that stands before it"
                )
            first[name], size = target, sizes[target]
        else:
            target, size = name, info.size
            if not info.isdir():
                first[name], sizes[name] = name, size
        most = 0 if info.isdir() else limit(name)
        budget.admit(name, size, most)
        if most and info.islnk():
            links.setdefault(target, []).append(name)
        elif most:
            yield name, read()
    if links:  # once more: packed files are not read backwards
        for info, name, read in _tar_members(source, opener):
            if name in links and not info.islnk():
                content = read()
                yield from ((linked, content) for linked in links.pop(name))


def _tar_members(
    source: Path, opener: Callable[..., Any]
) -> Iterator[tuple[tarfile.TarInfo, str, Callable[[], bytes]]]:
    """Every member's header, name and a function that reads it, up to the archive's very end."""
    with opener(source, "rb") as raw:
        stream = _Stream(raw)
        for info in tarfile.TarFile(fileobj=stream):
            name = _safe_name(info.name, source)
            if not (info.isdir() or info.isreg() or info.islnk()) or info.issparse():
                raise _unsafe(info.name, source, "a symbolic link, device or sparse file")

            def read(info: tarfile.TarInfo = info, name: str = name) -> bytes:
                stream.seek(info.offset_data)
                content = stream.read(info.size)
                if len(content) < info.size:
                    raise EOFError(f"{name!r} ends after {len(content)} of {info.size} bytes")
                return content

            yield info, name, read
        if stream.last != bytes(tarfile.BLOCKSIZE):
            raise EOFError("the archive ends without its end mark")
        for _ in range(_MAX_READ >> 16):  # to the end, where gzip and xz keep their checksums
            rest = stream.read(1 << 16)
            if not rest:
                return
            if any(rest):
                break
        raise tarfile.ReadError("more follows after the archive's end mark")


def _safe_name(name: str, source: Path) -> str:
    """A member's name without "./" and with forward slashes; refuses what points outside the archive."""
    slashed = name.replace("\\", "/")
    parts = [part for part in slashed.split("/") if part not in ("", ".")]
    if slashed.startswith("/") or ".." in parts or (parts and parts[0][1:2] == ":"):
        raise _unsafe(name, source, "which points outside the archive")
    return "/".join(parts)


def _unsafe(name: str, source: Path, why: str) -> DataError:
    return DataError(
        f"An archive must hold plain files and folders below its own root: {source} holds {name!r}, {why}. "
        "The archive is refused; get it from a source you trust, or pack it again without that member."
    )


# ---------------------------------------------------------------------------------------------
# Writing


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is whole, so that nobody ever reads a part."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as stream:
            yield stream
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def fetch(url: str, target: Path, md5: str) -> None:
    """Downloads `url` to `target`, making its folder, complete and with this MD5 or not at all.

    Raises:
        DataError: the network, the disk or the sum fails; what was there before stays as it was.
    """
    digest = hashlib.md5(usedforsecurity=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file, urllib.request.urlopen(url, timeout=30) as response:
            while (chunk := response.read(1 << 20)) and file.tell() <= MAX_TOTAL:
                digest.update(chunk)
                file.write(chunk)
            if digest.hexdigest() != md5:
                raise DataError(
                    f"{target.name} must have the published MD5 {md5}: {url} gave {digest.hexdigest()}, "
                    f"{file.tell():,} bytes. Nothing was kept; try again."
                )
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{url} could not be fetched into {target.parent}: {type(error).__name__}: {error}. Fetch it "
            "elsewhere and pass its path as data_dir or in RESODE_DATA."
        ) from error
