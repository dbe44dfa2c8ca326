"""Every layout gives the same arrays; wrong files are named; pickles and pictures are not trusted."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from cifar_files import (
    LAYOUTS,
    MAKERS,
    Call,
    arrays,
    assert_all_there,
    binary_files,
    encode,
    hundred_files,
    hundred_labels,
    kaggle_files,
    load,
    make_tar,
    md5,
    png_files,
    python2_dump,
    python_files,
    without,
)
from PIL import Image

from resode.training.data import cifar
from resode.training.data.cifar_tables import CIFARS, COARSE_OF_FINE
from resode.training.data.datasets import DataError


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", MAKERS)
def test_every_format_gives_the_same_arrays(layout, container, tmp_path):
    found = load(MAKERS[container](tmp_path, LAYOUTS[layout]()))
    assert_all_there(found)
    assert found.title == ("CIFAR-10 (image folder)" if "pictures" in layout else "CIFAR-10")


@pytest.mark.parametrize("name", ["c.tar.xz", "c.TAR.XZ", "c.bin"])
def test_an_archive_is_told_by_its_content(name, tmp_path):
    assert_all_there(load(make_tar(tmp_path / name, png_files(), "w:xz")))


def test_jpegs_are_decoded_as_pillow_does_and_named(tmp_path):
    files = {name.replace(".png", ".jpeg"): encode(Image.open(io.BytesIO(png)), "JPEG")
             for name, png in png_files().items()}  # fmt: skip
    found = load(make_tar(tmp_path / "c.tar", files))
    expected = [np.asarray(Image.open(io.BytesIO(files[name]))) for name in sorted(files) if "train" in name]
    assert np.array_equal(found.train_images, np.stack(expected).transpose(0, 3, 1, 2))
    assert found.title == "CIFAR-10 (JPEG copy)"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_become_rgb(mode, tmp_path):
    """Grey becomes three equal channels; the alpha channel is opaque here."""
    with Image.open(io.BytesIO(png_files()["train/cat/0015.png"])) as original:
        picture = original.convert(mode)
    found = load(
        make_tar(tmp_path / "c.tar", {**png_files(), "train/cat/0015.png": encode(picture, mode=mode)})
    )
    assert np.array_equal(found.train_images[15].transpose(1, 2, 0), np.asarray(picture.convert("RGB")))
    if mode in ("RGBA", "P"):
        return
    assert np.array_equal(found.train_images[15, 0], found.train_images[15, 2])


def test_a_transparent_palette_becomes_rgb_without_a_warning(tmp_path):
    """Pillow warns when a palette with alpha per colour becomes RGB at once; 128/255 of it are on white."""
    picture = Image.new("P", (32, 32), 1)
    picture.putpalette([9, 9, 9, 10, 20, 30])
    out = io.BytesIO()
    picture.save(out, "PNG", transparency=bytes([0, 128]))
    found = load(make_tar(tmp_path / "c.tar", {**png_files(), "train/cat/0015.png": out.getvalue()}))
    assert found.train_images[15, :, 0, 0].tolist() == [132, 137, 142]


BIG = Image.new("RGB", (64, 48))


SMALL = BIG.resize((32, 32))


BLACK = np.zeros((1, 3072), np.uint8)


def pictures_and(name, content):
    return {**png_files(), name: content}


def binary_and(name, content):
    return {**binary_files(), name: content}


def pickled_test_batch(batch):
    return {**python_files(), "test_batch": pickle.dumps(batch)}


WRONG = {
    "class missing": (without(png_files(), "test/ship"), r"test/ must hold.*has none of ship"),
    "no test pictures": (without(png_files(), "test/"), r"test/ must hold.*none of airplane, automobile"),
    "unknown class": (pictures_and("train/lion/1.png", b"x"), r"'train/lion/1.png'.*in 'lion'"),
    "wrong size": (pictures_and("train/cat/b.png", encode(BIG)), r"32x32.*'train/cat/b.png'.*is 64x48"),
    "unreadable": (pictures_and("test/dog/b.jpg", b"no picture"), r"'test/dog/b.jpg'.*could not be read"),
    "cut picture": (
        pictures_and("test/dog/b.png", encode(arrays("test")[0][0])[:900]),
        r"'test/dog/b.png'.*could not be read",
    ),
    "other format": (
        pictures_and("test/dog/b.png", encode(SMALL, "GIF")),
        r"'test/dog/b.png'.*as a PNG or JPEG",
    ),
    "no picture's name": (pictures_and("test/dog/b.webp", b"x"), r"'test/dog/b.webp'.*something else"),
    "no class folder": (pictures_and("train/b.png", b"x"), r"without class folders .*'train/b.png'"),
    "no class folder of tests": (
        pictures_and("test/b.png", b"x"),
        r"test/<class>/, not at 'test/b.png'",
    ),
    "too deep": (pictures_and("train/cat/dog/b.png", b"x"), r"not at 'train/cat/dog/b.png'"),
    "too deep by far": (pictures_and("train/a/b/cat/b.png", b"x"), r"not at 'train/a/b/cat/b.png'"),
    "two test folders": (pictures_and("val/cat/b.png", encode(SMALL)), r"has test/ and val/"),
    "names and numbers": (
        {name.replace("train/cat", "train/3"): data for name, data in png_files().items()},
        "pictures in numbered folders in the top folder .* and pictures in the top",
    ),
    "two roots": (
        pictures_and("more/train/cat/b.png", encode(SMALL)),
        r"one data set; it holds pictures in more \('more/train/cat/b.png'\) and pictures in the",
    ),
    "two kinds": ({**png_files(), **binary_files()}, r"binary in the top folder .* and pictures in the top"),
    "foreign": (
        {"setup.py": b"x", "pkg/test/test_a.py": b"x"},
        r"neither pictures nor batches|No CIFAR-10 was found",
    ),
    "imagenet": ({"train/n01440764/1.JPEG": b"x"}, r"in 'n01440764'"),
    "cifar-100": (
        {"cifar-100-binary/train.bin": b"x", "cifar-100-binary/test.bin": b"x"},
        "neither|No CIFAR-10",
    ),
    "a huge picture": (pictures_and("test/dog/b.png", bytes((1 << 20) + 1)), r"at most 1,048,576 bytes"),
    "batch missing": (without(binary_files(), "batch_3"), r"lacks data_batch_3.bin"),
    "tests missing": (without(python_files(), "test"), r"lacks test_batch"),
    "cut batch": (binary_and("data_batch_2.bin", bytes(30729)), r"3073.*has 30,729, 9 records and 3072"),
    "empty batch": (binary_and("data_batch_2.bin", b""), r"has 0, 0 records and 0"),
    "label 10": (binary_and("test_batch.bin", b"\x0a" + bytes(3072)), r"0 to 9.*has 10.*another data set"),
    "a list": (pickled_test_batch([1]), r"pickled dictionary, not list"),
    "no data": (pickled_test_batch({b"labels": [1]}), r"uint8 array.*has none"),
    "another shape": (pickled_test_batch({b"data": BLACK[:, :3], b"labels": [1]}), r"has uint8 \(1, 3\)"),
    "another dtype": (
        pickled_test_batch({b"data": BLACK.astype(np.int32), b"labels": [1]}),
        r"has int32 \(1, 3072\)",
    ),
    "floats": (pickled_test_batch({b"data": BLACK / 1, b"labels": [1]}), r"dtype 'f8', not of whole numbers"),
    "fine labels": (
        pickled_test_batch({b"data": BLACK, b"fine_labels": [1]}),
        r"labels, a list, tuple or array of whole",
    ),
    "labels of text": (
        pickled_test_batch({b"data": BLACK, b"labels": ["1"]}),
        r"labels, a list, tuple or array of whole",
    ),
    "other count": (pickled_test_batch({b"data": BLACK, b"labels": [1, 2]}), r"has 2 and 1"),
    "no images": (pickled_test_batch({b"data": BLACK[:0], b"labels": []}), r"has 0 and 0"),
    "negative label": (pickled_test_batch({b"data": BLACK, b"labels": [-1]}), r"0 to 9.*has -1"),
    "endless label": (
        pickled_test_batch({b"data": BLACK, b"labels": [2**80]}),
        r"has 1208925819614629174706176",
    ),
}


@pytest.mark.parametrize("container", ["tar.gz", "zip", "folder"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named(case, container, tmp_path):
    files, message = WRONG[case]
    with pytest.raises(DataError, match="(?s)" + message):
        load(MAKERS[container](tmp_path, files))


def png_of_size(width, height):
    """A PNG whose header claims a size that its data do not have."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + encode(arrays("test")[0][0])[33:]


@pytest.mark.parametrize("side", [33, 10_000, 12_000, 60_000])
def test_a_pictures_size_is_read_before_its_pixels(side, tmp_path, monkeypatch):
    """Pillow is silent, warns or refuses by size; each way nothing is decoded."""
    monkeypatch.setattr("PIL.Image.Image.tobytes", None)
    files = {"train/airplane/0.png": png_of_size(side, side)}
    with pytest.raises(DataError, match=r"train/airplane/0.png"):
        load(make_tar(tmp_path / "c.tar", files))


OBJECTS = np.array([None, {"a": 1}], dtype=object)


MALICIOUS = {
    "os.system": (lambda mark: pickle.dumps(Call(os.system, f"touch {mark}"), 2), "system"),
    "os.system, protocol 4": (lambda mark: pickle.dumps(Call(os.system, f"touch {mark}"), 4), "system"),
    "eval": (lambda mark: pickle.dumps(Call(eval, f"open({str(mark)!r}, 'w')")), "builtins.eval"),
    "eval inside a batch": (
        lambda mark: pickle.dumps({b"data": Call(eval, f"open({str(mark)!r}, 'w')"), b"labels": [1]}),
        "builtins.eval",
    ),
    "python 2 builtins": (lambda mark: b"c__builtin__\neval\n(S'1'\ntR.", "__builtin__.eval"),
    "getattr": (lambda mark: pickle.dumps(Call(getattr, 1, "real")), "builtins.getattr"),
    "a dotted name": (lambda mark: b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", "ndarray.__init__"),
    "numpy.load": (lambda mark: pickle.dumps(Call(np.load, "x")), "numpy.load"),
    "a numpy scalar": (lambda mark: pickle.dumps(np.int64(3)), "scalar"),
    "an object array": (lambda mark: pickle.dumps({b"data": OBJECTS, b"labels": [1, 2]}), "dtype 'O8'"),
    "an object array, protocol 2": (lambda mark: pickle.dumps({b"data": OBJECTS}, 2), "dtype 'O8'"),
    "a structured array": (lambda mark: pickle.dumps(np.zeros(2, "u1,O")), "dtype 'V9'"),
    "a dtype's fields": (
        lambda mark: b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nN(S'a'\nt}I-1\nI-1\nI63\ntb.",
        "structured",
    ),
    "an array without bytes": (
        lambda mark: (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
            b"(I1\n(I1\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\n(lI5\natb."
        ),
        "without its bytes",
    ),
    "another codec": (lambda mark: b"c_codecs\nencode\n(S'x'\nS'zlib'\ntR.", "codec b'zlib'"),
    "the copy registry": (lambda mark: b"ccopy_reg\n_reconstructor\n.", "copy_reg._reconstructor"),
    "a persistent id": (lambda mark: b"Pme\n.", "persistent"),
    "an extension": (lambda mark: b"\x80\x02\x82\x01.", "extension"),
    "a huge memo": (lambda mark: b"\x80\x02]r\xff\xff\xff\x7f.", "memo 2147483647"),
    "a huge memo as text": (lambda mark: b"]p99999999999\n.", "memo 99999999999"),
    "huge bytes": (lambda mark: b"\x80\x04\x8e" + struct.pack("<q", 1 << 40) + b".", "refused"),
    "a huge bytearray": (lambda mark: b"\x80\x05\x96" + struct.pack("<q", 1 << 36) + b".", "refused"),
    "text": (lambda mark: b"hello", "refused"),
    "nothing": (lambda mark: b"", "refused"),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_malicious_pickles_build_nothing(case, tmp_path):
    make, message = MALICIOUS[case]
    mark = tmp_path / "was_here"
    path = make_tar(tmp_path / "c.tar", {"data_batch_1": make(mark), **without(python_files(), "batch_1")})
    with pytest.raises(DataError, match=r"'data_batch_1'.*arrays, bytes, strings(?s:.*)" + message):
        load(path)
    assert not mark.exists()


def test_a_pickle_cannot_alter_the_reader(tmp_path):
    """BUILD sets attributes on whatever is on the stack: here on the stand-ins for numpy's functions."""
    altering = b"cnumpy.core.multiarray\n_reconstruct\n(N}V__setstate__\nI1\nstb0"
    evil = python_files(lambda batch: altering + pickle.dumps(batch, 2))
    load(make_tar(tmp_path / "c.tar", evil))
    assert_all_there(load(make_tar(tmp_path / "d.tar", python_files())))


def test_every_cut_of_a_pickle_is_refused(tmp_path):
    whole = python2_dump({b"data": np.zeros((1, 3072), np.uint8), b"labels": [7]})
    cuts = [*range(200), *range(200, len(whole) - 20, 500), *range(len(whole) - 20, len(whole))]
    for cut in cuts:
        with pytest.raises(DataError):
            cifar._python_batch(whole[:cut], "here", CIFARS["cifar10"])
    assert cifar._python_batch(whole, "here", CIFARS["cifar10"])[1].tolist() == [7]


@pytest.mark.parametrize(
    ("name", "files"), [("cifar-10-binary.tar.gz", binary_files), ("cifar-10-python.tar.gz", python_files)]
)
def test_official_archives_must_have_the_published_sum(name, files, tmp_path, monkeypatch):
    assert cifar.PUBLISHED_MD5 == {
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    }
    path = make_tar(tmp_path / name, files(), "w:gz")
    found = md5(path.read_bytes())
    with pytest.raises(DataError, match=f"{cifar.PUBLISHED_MD5[name]}; it has {found}.*fetch it again"):
        load(tmp_path)
    monkeypatch.setitem(cifar.PUBLISHED_MD5, name, found)
    assert_all_there(load(tmp_path))


@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize("container", ["tar.gz", "folder"])
def test_cifar_100_by_its_fine_and_its_coarse_labels(version, container, tmp_path):
    path = MAKERS[container](tmp_path, hundred_files(version))
    fine, coarse = load(path, "cifar100"), load(path, "cifar100_coarse")
    want = hundred_labels(200)
    assert np.array_equal(fine.train_labels, want[0]) and np.array_equal(coarse.train_labels, want[1])
    assert np.array_equal(fine.train_images, coarse.train_images)
    assert fine.test_images.shape == (100, 3, 32, 32)
    rows = np.random.default_rng(200).integers(0, 256, (200, 3072), dtype=np.uint8)
    assert np.array_equal(fine.train_images.reshape(200, -1), rows)
    assert (fine.title, coarse.title) == ("CIFAR-100", "CIFAR-100, 20 classes")
    with pytest.raises(DataError, match=r"No CIFAR-10 was found|neither pictures nor batches of CIFAR-10"):
        load(path)


def test_cifar_100s_tables():
    """The groups give torchvision's well-known list of coarse labels, whose first ten are these."""
    fine, coarse = CIFARS["cifar100"], CIFARS["cifar100_coarse"]
    assert (len(fine.classes), len(coarse.classes)) == (100, 20)
    assert COARSE_OF_FINE[:10] == (4, 1, 14, 8, 0, 6, 7, 7, 18, 3)
    assert [COARSE_OF_FINE.count(label) for label in range(20)] == [5] * 20
    assert fine.label_of("Sweet-Pepper") == fine.classes.index("sweet_pepper") == 83
    assert (
        coarse.label_of("wolf") == coarse.label_of("large carnivores") == 8 and coarse.label_of("20") is None
    )


def test_coarse_labels_must_be_those_of_the_fine_ones(tmp_path):
    path = make_tar(tmp_path / "c.tar", hundred_files("binary", coarse_shift=1))
    with pytest.raises(DataError, match=r"those of the fine ones' groups: 'cifar-100-binary/train.bin'"):
        load(path, "cifar100")


def test_pictures_of_cifar_100_in_their_groups(tmp_path):
    picture = next(iter(png_files().values()))
    kind = CIFARS["cifar100"]
    groups = [CIFARS["cifar100_coarse"].classes[label] for label in COARSE_OF_FINE]
    files = {
        f"{split}/{group}/{name}/1.png": picture
        for split in ("train", "test")
        for group, name in zip(groups, kind.classes, strict=True)
    }
    path = make_tar(tmp_path / "c.tar", files)
    assert load(path, "cifar100").train_labels.tolist() == list(range(100))
    assert load(path, "cifar100_coarse").test_labels.tolist() == sorted(COARSE_OF_FINE)


@pytest.mark.parametrize("container", ["tar.bz2", "zip", "folder"])
def test_kaggles_training_pictures_with_every_fifth_held_out(container, tmp_path):
    """Five pictures a class: by number the fifth of each is the test."""
    files, order = kaggle_files()
    found = load(MAKERS[container](tmp_path, files))
    images, labels = arrays("train")
    for label in range(10):
        numbered = [k for k in order if labels[k] == label]
        got = found.train_images[found.train_labels == label]
        assert np.array_equal(got, images[numbered[:4]])
        assert np.array_equal(found.test_images[found.test_labels == label][0], images[numbered[4]])
    assert found.title == "CIFAR-10 (Kaggle's training pictures, every fifth held out)"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines[:-1], "one line for each picture.*1 picture without a label, such as '50'"),
        (lambda lines: [*lines, "51,cat", "52,cat"], "2 labels without a picture, such as '51'"),
        (lambda lines: [*lines[:-1], "50,lion"], r"line 51 is '50,lion'"),
        (lambda lines: [*lines, "50,cat"], r"line 52 is '50,cat'"),
        (lambda lines: ["name,class", *lines[1:]], "the columns id and label"),
        (lambda lines: [line.replace("cat", "dog") for line in lines], "has none of cat there"),
    ],
)
def test_labels_that_do_not_fit_kaggles_pictures_are_refused(edit, message, tmp_path):
    files, _ = kaggle_files(edit)
    with pytest.raises(DataError, match=message):
        load(make_tar(tmp_path / "c.tar", files))


def test_loose_pictures_without_a_table_are_refused(tmp_path):
    files, _ = kaggle_files()
    with pytest.raises(DataError, match=r"not at 'train/1.png'.*no trainLabels.csv"):
        load(make_tar(tmp_path / "c.tar", without(files, ".csv")))
