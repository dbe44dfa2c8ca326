"""Containers that are truncated, damaged or made to attack are refused, with the member named."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import time
import zipfile

import numpy as np
import pytest
from cifar_files import LAYOUTS, MAKERS, arrays, encode, load, make_tar, make_zip, png_files, without
from hypothesis import given, settings
from hypothesis import strategies as st

from resode.training.data import archives, cifar
from resode.training.data.cifar_tables import CIFARS
from resode.training.data.datasets import DataError


def test_a_file_that_is_no_archive(tmp_path):
    for content in (b"", b"hello", bytes(10240), b"PK\x03\x04", b"BZh91AY&SY", b"\xfd7zXZ\x00", b"\x1f\x8b"):
        (tmp_path / "c.tar").write_bytes(content)
        with pytest.raises(DataError, match="Accepted are an image folder"):
            load(tmp_path / "c.tar")


@pytest.mark.parametrize("layout", ["pictures", "binary"])
@pytest.mark.parametrize("container", ["tar", "tar.xz", "tar.gz", "zip"])
def test_a_truncated_archive_is_refused_wherever_it_ends(container, layout, tmp_path):
    """tarfile takes a file that ends between two members for a whole one; the end mark tells."""
    path = MAKERS[container](tmp_path, LAYOUTS[layout]())
    whole = path.read_bytes()
    used = len(whole.rstrip(b"\0")) if container == "tar" else len(whole)
    cuts = [int(used * share) for share in (0.01, 0.3, 0.5, 0.77, 0.99)] + [used - 1]
    if container == "tar":
        with tarfile.open(path) as tar:
            offsets = [member.offset for member in tar]
        cuts += [offsets[1], offsets[-1], offsets[-1] + 100, offsets[-1] + 512, (used + 511) // 512 * 512]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"read to its end.*truncated"):
            load(path)


def test_a_damaged_header_is_no_end(tmp_path):
    """tarfile stops silently at a header whose checksum is wrong; half the pictures would be missing."""
    path = make_tar(tmp_path / "c.tar", {**png_files(), **{f"x{i}/train/a": b"" for i in range(3)}})
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        header = tar.getmembers()[-2].offset
    content[header : header + 4] = b"oops"
    path.write_bytes(content)
    with pytest.raises(DataError, match="without its end mark"):
        load(path)
    content[header : header + 512] = bytes(512)  # an end mark in the middle
    path.write_bytes(content)
    with pytest.raises(DataError, match="more follows after"):
        load(path)


@pytest.mark.parametrize("container", ["tar.xz", "tar.gz", "tar.bz2"])
def test_checksums_at_the_end_are_compared(container, tmp_path):
    """The tar is whole after its end mark, but the checksum of what was unpacked comes last."""
    path = MAKERS[container](tmp_path, png_files())
    content = bytearray(path.read_bytes())
    content[{"tar.gz": -8, "tar.xz": -40, "tar.bz2": -3}[container]] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="truncated, damaged"):
        load(path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Archives to damage: {(container, layout): path}."""
    layouts = ("pictures", "python protocol 2", "python 2", "python protocol 5")
    pairs = [(container, layout) for container in ("tar", "tar.xz", "tar.gz", "zip") for layout in layouts]
    return {pair: MAKERS[pair[0]](tmp_path_factory.mktemp("packed"), LAYOUTS[pair[1]]()) for pair in pairs}


@settings(deadline=None, max_examples=150, derandomize=True)
@given(draw=st.data())
def test_damage_gives_data_or_a_data_error(draw, packed):
    """Any bytes anywhere: the reader gives arrays or DataError, never another exception."""
    path = packed[draw.draw(st.sampled_from(sorted(packed)))]
    content = bytearray(path.read_bytes())
    value = draw.draw(st.binary(min_size=1, max_size=6))
    at = draw.draw(st.integers(0, len(content) - 1))
    content[at : at + len(value)] = value
    broken = path.with_name("broken")
    broken.write_bytes(content)
    try:
        decoded = cifar.decode(broken, CIFARS["cifar10"])
    except DataError:
        return
    assert decoded.train_images.shape[1:] == (3, 32, 32)


@pytest.mark.parametrize(
    "name", ["../evil.png", "train/../../evil.png", "/etc/evil.png", "..\\evil.png", "C:/e.png"]
)
@pytest.mark.parametrize("container", ["tar", "tar.xz", "zip"])
def test_members_outside_the_archive_are_refused(container, name, tmp_path):
    path = MAKERS[container](tmp_path, {**png_files(), name: b"x"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"below its own root.*evil|below its own root.*C:/e.png") as caught:
        load(path)
    assert repr(name) in str(caught.value) and "outside" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before  # nothing unpacked, nothing cached


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"]
)
@pytest.mark.parametrize("name", ["train/cat/0000.png", "somewhere/else"])
def test_links_and_devices_are_refused(name, kind, tmp_path):
    def edit(info):
        if info.name == name:
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    path = make_tar(tmp_path / "c.tar", {name: b"", **without(png_files(), name)}, edit=edit)
    why = (
        "points outside the archive"
        if kind == tarfile.LNKTYPE
        else f"{name!r}, a symbolic link, device or sparse"
    )
    with pytest.raises(DataError, match=why):
        load(path)


def test_a_link_in_a_zip_is_refused(tmp_path):
    info = zipfile.ZipInfo("train/cat/0000.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match=r"'train/cat/0000\.png', a link or device"):
        load(tmp_path / "c.zip")


def test_a_file_twice_is_refused(tmp_path):
    path = make_tar(tmp_path / "c.tar", {**png_files(), "./train/cat/0015.png": encode(arrays("test")[0][0])})
    with pytest.raises(DataError, match=r"'train/cat/0015.png' twice"):
        load(path)


def raw_header(name, kind, size):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        (tarfile.REGTYPE, 3 << 30, "2048 MiB unpacked"),
        (
            tarfile.REGTYPE,
            -512,
            "unpacked|read to its end",
        ),  # would send tarfile back to the same header, for ever
        (tarfile.DIRTYPE, -512, "unpacked|read to its end"),
        (tarfile.XHDTYPE, 1 << 40, "asks for"),  # attributes are read in one piece
        (tarfile.GNUTYPE_LONGNAME, 1 << 40, "asks for"),
        (tarfile.XHDTYPE, -512, "read to its end"),
    ],
)
@pytest.mark.parametrize("packed", [open, gzip.open, lzma.open, bz2.open])
def test_sizes_in_tar_headers_are_not_believed(kind, size, message, packed, tmp_path):
    with packed(tmp_path / "c.tar", "wb") as file:
        file.write(raw_header("big", kind, size) + bytes(10240))
    started = time.perf_counter()
    with pytest.raises(DataError, match=message):
        load(tmp_path / "c.tar")
    assert time.perf_counter() - started < 30


def test_a_flood_of_members_or_of_zeros_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 60)
    monkeypatch.setattr(archives, "_MAX_READ", 1 << 20)
    with pytest.raises(DataError, match="at most 60 files"):
        load(make_tar(tmp_path / "c.tar", png_files()))
    with lzma.open(tmp_path / "d.tar.xz", "wb", preset=0) as file:
        file.write(bytes(16 << 20))  # an empty archive with an endless end
    with pytest.raises(DataError, match="more follows"):
        load(tmp_path / "d.tar.xz")


def test_a_zip_that_lies_about_sizes(tmp_path):
    """The directory says 10 bytes, the data hold 20 MB of zeros: no more than 10 are unpacked."""
    path = make_zip(tmp_path / "c.zip", {"train/cat/0.png": bytes(20 << 20)})
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 20 << 20), struct.pack("<I", 10)))
    with pytest.raises(DataError, match=r"could not be read to its end"):
        load(path)


def linked(path, links, mode="w"):
    """The pictures, and links as (name, what it points to, kind)."""
    with tarfile.open(path, mode) as tar:
        for name, content in png_files().items():
            if name not in [link[0] for link in links]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return path


@pytest.mark.parametrize("mode", ["w", "w:xz", "w:bz2"])
def test_hard_links_inside_a_tar_are_their_files(mode, tmp_path):
    """What a tar of a deduplicated folder holds; a link to a link is the same file."""
    one, two, three = "train/cat/0015.png", "train/cat/0016.png", "test/cat/0006.png"
    found = load(
        linked(tmp_path / "c", [(one, two, tarfile.LNKTYPE), (three, "./" + one, tarfile.LNKTYPE)], mode)
    )
    want, _ = arrays("train")
    assert np.array_equal(found.train_images[15], want[16]) and np.array_equal(
        found.train_images[16], want[16]
    )
    assert np.array_equal(found.test_images[6], want[16]) and len(found.train_labels) == 50


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        ("../../cat.png", tarfile.LNKTYPE, "'../../cat.png', which points outside"),
        ("/etc/passwd", tarfile.LNKTYPE, "'/etc/passwd', which points outside"),
        (
            "train/cat/9999.png",
            tarfile.LNKTYPE,
            "'train/cat/0015.png', a link to 'train/cat/9999.png', no file",
        ),
        (
            "train/cat/0015.png",
            tarfile.LNKTYPE,
            "'train/cat/0015.png', a link to 'train/cat/0015.png', no file",
        ),
        ("../dog/0025.png", tarfile.SYMTYPE, "'train/cat/0015.png', a symbolic link"),
    ],
)
def test_links_that_leave_the_archive_are_refused(target, kind, message, tmp_path):
    with pytest.raises(DataError, match=f"plain files and folders below its own root.*{message}"):
        load(linked(tmp_path / "c.tar", [("train/cat/0015.png", target, kind)]))


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"7z\xbc\xaf'\x1c", "a 7z archive"),
        (b"Rar!\x1a\x07", "a RAR archive"),
        (b"(\xb5/\xfd\x04\x00", "packed with zstd"),
        (b"PAR1\x15\x04", "a Parquet table"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"\x93NUMPY", "a NumPy array"),
        (b"MATLAB 5.0", "a MATLAB file"),
    ],
)
def test_formats_that_are_not_read_are_called_by_name(start, kind, tmp_path):
    (tmp_path / "c").write_bytes(start + bytes(600))
    with pytest.raises(DataError, match=f"is {kind}, which is not read. Unpack it"):
        load(tmp_path / "c")
