"""Small data sets in every layout and container that CIFAR-10 comes in, for the tests."""

import functools
import hashlib
import io
import pickle
import struct
import tarfile
import zipfile

import numpy as np
from PIL import Image

from resode.training.data import cifar
from resode.training.data.cifar_tables import CIFARS, COARSE_OF_FINE


def load(path, name="cifar10"):
    """Decodes without a cache."""
    return cifar.decode(cifar.find_source(path, CIFARS[name]), CIFARS[name])


CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


PER_CLASS = {"train": 5, "test": 2}  # 50 and 20 images: ten a binary batch


@functools.cache
def arrays(split):
    """Random images, labels in order, so that every format stores them in the same order."""
    rng = np.random.default_rng(1 if split == "train" else 2)
    labels = np.repeat(np.arange(10), PER_CLASS[split])
    return rng.integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8), labels


def encode(image, format_="PNG", mode="RGB"):
    out = io.BytesIO()
    picture = Image.fromarray(image.transpose(1, 2, 0)) if isinstance(image, np.ndarray) else image
    picture.convert(mode).save(out, format_)
    return out.getvalue()


@functools.cache
def png_files():
    """Name -> content, as an image folder has them."""
    files = {}
    for split in PER_CLASS:
        for i, (image, label) in enumerate(zip(*arrays(split), strict=True)):
            files[f"{split}/{CLASSES[label]}/{i:04d}.png"] = encode(image)
    return files


def binary_files():
    def records(split):
        images, labels = arrays(split)
        return np.concatenate((labels[:, None].astype(np.uint8), images.reshape(len(labels), -1)), axis=1)

    parts = [(f"data_batch_{i + 1}.bin", part) for i, part in enumerate(np.split(records("train"), 5))]
    return {name: part.tobytes() for name, part in [*parts, ("test_batch.bin", records("test"))]}


def python_files(dump=None):
    dump = dump or (lambda batch: pickle.dumps(batch, protocol=4))

    def batch(images, labels):
        return dump(
            {b"data": images.reshape(len(images), -1), b"labels": labels.tolist(), b"batch_label": b"?"}
        )

    images, labels = arrays("train")
    parts = zip(np.split(images, 5), np.split(labels, 5), strict=True)
    files = {f"data_batch_{i + 1}": batch(*part) for i, part in enumerate(parts)}
    return {**files, "test_batch": batch(*arrays("test"))}


def python2_dump(batch):
    """What Python 2 and its numpy wrote at protocol 2: strings where Python 3 has bytes."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def number(value):
        return b"J" + struct.pack("<i", value)

    values = batch[b"data"]
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        + number(0) + b"\x85" + text(b"b") + b"\x87R"
        b"(" + number(1) + number(values.shape[0]) + number(values.shape[1]) + b"\x86"
        b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
        b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        b"\x89T" + struct.pack("<i", values.size) + values.tobytes() + b"tb"
    )  # fmt: skip
    labels = b"](" + b"".join(map(number, batch[b"labels"])) + b"e"
    return (
        b"\x80\x02}(" + text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels") + labels
        + text(b"data") + array + b"u."
    )  # fmt: skip


def make_tar(path, files, mode="w", edit=None):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if edit:
                edit(info)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


MAKERS = {
    "tar": lambda path, files: make_tar(path / "c.tar", files),
    "tar.xz": lambda path, files: make_tar(path / "c.tar.xz", files, "w:xz"),
    "tar.gz": lambda path, files: make_tar(path / "c.tar.gz", files, "w:gz"),
    "tar.bz2": lambda path, files: make_tar(path / "c.tar.bz2", files, "w:bz2"),
    "tgz": lambda path, files: make_tar(path / "c.tgz", files, "w:gz"),
    "zip": lambda path, files: make_zip(path / "c.zip", files),
    "folder": lambda path, files: make_folder(path / "c", files),
}


LAYOUTS = {
    "pictures": png_files,
    "pictures below one folder": lambda: {f"cifar/{name}": data for name, data in png_files().items()},
    "pictures as ./": lambda: {f"./{name}": data for name, data in png_files().items()},
    "pictures in another order": lambda: dict(reversed(png_files().items())),
    "pictures and rubbish": lambda: {
        "README.md": b"read me", "__MACOSX/train/cat/._0000.png": b"x", "train/.DS_Store": b"x",
        "train/labels.csv": b"1", "train/dog/thumbs.DB": b"x", "test/cat/Desktop.ini": b"x",
        "train/@eaDir/cat/1.png": b"x", "train/ship/@EADIR/1.png": b"x", **png_files(), "other/cat.png": b"x",
    },
    "pictures below two folders": lambda: {f"a/b/{name}": data for name, data in png_files().items()},
    "pictures in Train/ and val/": lambda: {
        name.replace("train", "Train").replace("test", "val"): data for name, data in png_files().items()
    },
    "pictures in numbered folders": lambda: {
        name.replace(f"/{c}/", f"/{i}/"): data for i, c in enumerate(CLASSES)
        for name, data in png_files().items() if f"/{c}/" in name
    },
    "pictures in groups": lambda: {
        name.replace("/ship/", "/vehicles/Ship/"): data for name, data in png_files().items()
    },
    "binary": binary_files,
    "binary below its folder": lambda: {
        "cifar-10-batches-bin/readme.html": b"<html>",
        **{f"cifar-10-batches-bin/{name}": content for name, content in binary_files().items()},
    },
    "python protocol 4": python_files,
    "python protocol 5": lambda: python_files(lambda batch: pickle.dumps(batch, protocol=5)),
    "python protocol 2": lambda: python_files(lambda batch: pickle.dumps(batch, protocol=2)),
    "python protocol 0": lambda: python_files(lambda batch: pickle.dumps(batch, protocol=0)),
    "python with str keys": lambda: python_files(
        lambda batch: pickle.dumps({key.decode(): value for key, value in batch.items()})
    ),
    "python of old numpy": lambda: python_files(
        lambda batch: pickle.dumps(batch, 0).replace(b"numpy._core.", b"numpy.core.")
    ),
    "python 2": lambda: {
        f"cifar-10-batches-py/{name}": content for name, content in python_files(python2_dump).items()
    },
    "python with tuples": lambda: python_files(
        lambda batch: pickle.dumps({**batch, b"labels": tuple(batch[b"labels"])})
    ),
    "python with arrays": lambda: python_files(
        lambda batch: pickle.dumps({**batch, b"labels": np.array(batch[b"labels"])})
    ),
    "python in columns": lambda: python_files(
        lambda batch: pickle.dumps({**batch, b"data": np.asfortranarray(batch[b"data"])})
    ),
}  # fmt: skip


def assert_all_there(found):
    """`found` has what `arrays` made, as tensors or as arrays."""
    for split in PER_CLASS:
        for part, expected in zip(("images", "labels"), arrays(split), strict=True):
            got = np.asarray(getattr(found, f"{split}_{part}"))
            assert got.dtype == expected.dtype and np.array_equal(got, expected)


def without(files, *parts):
    return {name: content for name, content in files.items() if not any(part in name for part in parts)}


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def hundred_labels(count):
    """Fine and coarse labels of CIFAR-100: every class in turn, and its group."""
    fine = np.arange(count) % 100
    return fine, np.array(COARSE_OF_FINE)[fine]


@functools.cache
def hundred_files(version, coarse_shift=0):
    """CIFAR-100's official files with 200 training and 100 test images."""
    files = {}
    for name, count in (("train", 200), ("test", 100)):
        fine, coarse = hundred_labels(count)
        coarse = (coarse + coarse_shift) % 20
        images = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
        records = np.column_stack((coarse, fine, images)).astype(np.uint8)
        files[f"cifar-100-binary/{name}.bin" if version == "binary" else f"cifar-100-python/{name}"] = (
            records.tobytes()
            if version == "binary"
            else pickle.dumps(
                {b"data": images, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}, 2
            )
        )
    return files


def kaggle_files(edit=lambda lines: lines):
    """Kaggle's layout: numbered pictures, a table of their labels, and pictures that nobody labelled."""
    images, labels = arrays("train")
    order = np.random.default_rng(0).permutation(len(labels))
    lines = ["id,label", *(f"{i},{CLASSES[labels[k]]}" for i, k in enumerate(order, start=1))]
    pictures = {f"train/{i}.png": encode(images[k]) for i, k in enumerate(order, start=1)}
    unread = {"test/1.png": b"unread", "sampleSubmission.csv": b"id,label\n1,cat\n"}
    return {**pictures, **unread, "trainLabels.csv": "\n".join(edit(lines)).encode()}, order
