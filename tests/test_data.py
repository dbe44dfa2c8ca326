"""The digits, where CIFAR-10 is looked for, its download and its cache."""

import functools
import http.server
import io
import os
import pickle
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
from cifar_files import (
    CLASSES,
    MAKERS,
    Call,
    arrays,
    assert_all_there,
    binary_files,
    encode,
    make_folder,
    make_tar,
    make_zip,
    md5,
    png_files,
)

from resode.training.data import cifar
from resode.training.data import datasets as data
from resode.training.data.cifar_tables import Cifar
from resode.training.data.datasets import DATASETS, DataError, ImageData, load_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    """No test but the one of the real archive touches the user's cache or reads the user's data."""
    if "real" not in request.node.name:
        monkeypatch.setenv("RESODE_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("RESODE_DATA", raising=False)


def load(path):
    return load_data("cifar10", path)


def test_digits_are_split_stratified_and_scaled():
    """Every fifth of 1,797 in class order is 360, and each class gives a fifth of its own, ±1."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    digits = load_data("digits")
    assert digits.train_images.shape == (1437, 1, 8, 8) and digits.test_images.shape == (360, 1, 8, 8)
    assert digits.train_images.dtype == torch.uint8 and digits.train_labels.dtype == torch.int64
    whole = np.bincount(bunch.target)
    held = np.bincount(digits.test_labels)
    assert np.all(np.abs(held - whole / 5) < 1)
    assert held.tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]

    def rows(images, labels):
        return sorted(
            map(tuple, np.column_stack((np.asarray(images).reshape(len(labels), -1), labels)).tolist())
        )

    both = (
        torch.cat((digits.train_images, digits.test_images)),
        torch.cat((digits.train_labels, digits.test_labels)),
    )
    levels = np.rint(np.arange(17) * 255 / 16)  # 0..16 -> 0..255
    assert rows(*both) == rows(levels[bunch.images.astype(int)], bunch.target)
    scaled = digits.train_images.double() / 255
    assert digits.mean == pytest.approx([scaled.mean().item()], rel=1e-12)
    assert digits.std == pytest.approx([scaled.std(correction=0).item()], rel=1e-12)
    assert digits.classes == tuple("0123456789")
    assert (digits.name, digits.title) == ("digits", "digits (scikit-learn)")
    assert (digits.crop_padding, digits.flip) == (1, False)
    assert torch.equal(digits.test_images, load_data("digits").test_images)


def test_names_and_options_that_mean_nothing_are_refused(tmp_path):
    assert DATASETS == ("digits", "cifar10", "cifar100", "cifar100_coarse")
    with pytest.raises(DataError, match="one of digits, cifar10, cifar100, cifar100_coarse: got 'mnist'"):
        load_data("mnist")
    with pytest.raises(DataError, match="neither data_dir nor download"):
        load_data("digits", tmp_path)
    with pytest.raises(DataError, match="neither data_dir nor download"):
        load_data("digits", download=True)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    path = make_tar(tmp_path / "c.tar", png_files())
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'resode\[train\]'"):
        load_data("digits")
    with pytest.raises(ImportError, match=r"pip install 'resode\[train\]'"):
        load(path)


def test_a_folder_is_searched_for_the_data(tmp_path, monkeypatch):
    """An unpacked folder, one folder below, or an archive; official names and "cifar10" come first."""
    make_folder(tmp_path / "a" / "cifar-10-batches-bin", binary_files())
    assert_all_there(load(tmp_path / "a"))
    make_folder(tmp_path / "b" / "pictures", png_files())
    assert_all_there(load(str(tmp_path / "b")))
    (tmp_path / "c").mkdir()
    make_tar(tmp_path / "c" / "cifar10-jpeg.tar.xz", png_files(), "w:xz")
    make_tar(tmp_path / "c" / "cifar-100-python.tar.gz", {"cifar-100-python/train": b"x"}, "w:gz")
    (tmp_path / "c" / "README.md").write_text("read me")
    (tmp_path / "c" / "test").mkdir()  # a project's own folder is no half of a data set
    assert_all_there(load(tmp_path / "c"))
    monkeypatch.setenv("RESODE_DATA", str(tmp_path / "c"))
    assert_all_there(load_data("cifar10"))
    with pytest.raises(DataError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")  # what is passed comes before the environment
    make_zip(tmp_path / "c" / "my_cifar10.zip", png_files())
    with pytest.raises(DataError, match=r"several.*cifar10-jpeg.tar.xz, my_cifar10.zip.*the one to read"):
        load_data("cifar10")


def test_missing_data_say_what_is_accepted(tmp_path, monkeypatch):
    accepted = r"image folder.*\.tar\.xz.*cifar-10-binary\.tar\.gz.*cifar-10-python\.tar\.gz"
    with pytest.raises(DataError, match=r"RESODE_DATA, or pass --download.*" + accepted):
        load_data("cifar10")
    with pytest.raises(DataError, match="nowhere does not exist.*" + accepted):
        load(tmp_path / "nowhere")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="No CIFAR-10 was found.*holds notes.txt.*" + accepted):
        load(tmp_path / "a")
    monkeypatch.setenv("RESODE_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match="gone does not exist"):
        load_data("cifar10")
    assert issubclass(DataError, ValueError)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path/"www" on this machine, and counts what is asked for."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

        def do_GET(self):
            if "cut" not in self.path:
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
            self.log_message()

    (tmp_path / "www").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{httpd.server_port}"
        yield tmp_path / "www", url, requests
        httpd.shutdown()
        thread.join()


def test_download_fetches_once_and_checks(server, tmp_path, monkeypatch):
    www, url, requests = server
    name = "cifar-10-binary.tar.gz"
    path = make_tar(www / name, binary_files(), "w:gz")
    monkeypatch.setattr(Cifar, "url", f"{url}/{name}")
    target = tmp_path / "new" / "folder"
    with pytest.raises(DataError, match="must have the published MD5"):
        load_data("cifar10", target, download=True)
    assert list(target.iterdir()) == []  # nothing that failed is kept
    monkeypatch.setitem(cifar.PUBLISHED_MD5, name, md5(path.read_bytes()))
    assert_all_there(load_data("cifar10", target, download=True))
    assert [entry.name for entry in target.iterdir()] == [name]
    assert len(requests) == 2
    assert_all_there(load_data("cifar10", target, download=True))
    assert_all_there(load(target))
    assert len(requests) == 2  # it is there already
    assert_all_there(load_data("cifar10", download=True))  # without a folder: into the cache
    assert (tmp_path / "cache" / name).is_file() and len(requests) == 3


def test_a_download_that_fails_leaves_nothing(server, tmp_path, monkeypatch):
    _, url, _ = server
    for address, message in [
        (f"{url}/missing", "HTTPError.*404"),
        (f"{url}/cut", "IncompleteRead|published MD5"),
        ("http://127.0.0.1:9/x", "URLError"),  # nobody listens on the discard port
    ]:
        monkeypatch.setattr(Cifar, "url", address)
        with pytest.raises(DataError, match=message):
            load_data("cifar10", tmp_path / "d", download=True)
        assert list((tmp_path / "d").iterdir()) == []


def test_download_leaves_a_damaged_archive_to_its_owner(tmp_path, monkeypatch):
    """An archive that was passed by path is read, never replaced."""
    monkeypatch.setattr(Cifar, "url", "http://127.0.0.1:9/x")
    (tmp_path / "c.tar").write_bytes(b"x")
    with pytest.raises(DataError, match="read to its end"):
        load_data("cifar10", tmp_path / "c.tar", download=True)


@pytest.fixture
def decodings(monkeypatch):
    """The sources that were decoded, in order."""
    found, decode = [], cifar.decode
    monkeypatch.setattr(cifar, "decode", lambda source, kind: found.append(source) or decode(source, kind))
    return found


@pytest.mark.parametrize("container", ["tar.xz", "folder"])
def test_decoded_once_and_again_when_the_source_changes(container, tmp_path, decodings):
    path = MAKERS[container](tmp_path, png_files())
    first, second = load(path), load(path)
    assert len(decodings) == 1
    for found in (first, second):
        assert_all_there(found)
        assert (found.name, found.title) == ("cifar10", "CIFAR-10 (image folder)")
        assert (found.classes, found.crop_padding, found.flip) == (CLASSES, 4, True)
        scaled = found.train_images.double() / 255
        assert found.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), rel=1e-12)
        assert found.std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    changed = {**png_files(), "train/cat/0015.png": encode(arrays("test")[0][0])}
    if container == "folder":
        (path / "train/cat/0015.png").write_bytes(changed["train/cat/0015.png"])
        os.utime(path / "train/cat/0015.png", ns=(1, 1))
    else:
        MAKERS[container](tmp_path, changed)
        os.utime(path, ns=(1, 1))
    assert torch.equal(load(path).train_images[15], torch.from_numpy(arrays("test")[0][0]))
    assert len(decodings) == 2
    os.utime(path / "train/cat/0016.png" if container == "folder" else path, ns=(2, 2))
    load(path)
    assert len(decodings) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1  # one file a source, no rubbish


def test_a_new_file_in_a_folder_and_another_path_are_noticed(tmp_path, decodings):
    path = make_folder(tmp_path / "c", png_files())
    load(path)
    (path / "train/cat/more.png").write_bytes(encode(arrays("test")[0][0]))
    assert len(load(path).train_labels) == 51
    (path / "README").write_text("not part of it")
    load(path)
    assert len(decodings) == 2
    shutil.copytree(path, tmp_path / "d")
    load(tmp_path / "d")
    assert len(decodings) == 3 and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_new_format_version_decodes_again(tmp_path, decodings, monkeypatch):
    path = make_tar(tmp_path / "c.tar", png_files())
    load(path)
    monkeypatch.setattr(data, "_CACHE_VERSION", data._CACHE_VERSION + 1)
    load(path)
    load(path)
    assert len(decodings) == 2


def test_a_damaged_cache_is_remade(tmp_path, decodings):
    """Cut, emptied, overwritten, a flipped bit in the pixels (the checksum tells), a pickle."""
    path = make_tar(tmp_path / "c.tar", png_files())
    load(path)
    [file] = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    objects = io.BytesIO()
    np.save(objects, np.array([None]), allow_pickle=True)
    others = io.BytesIO()
    np.savez(others, key=np.load(file)["key"], train_images=np.zeros(3))
    broken = [whole[:1000], whole[:-1], b"", b"rubbish" * 99, bytes(flipped), pickle.dumps(Call(eval, "1/0"))]
    for count, content in enumerate([*broken, objects.getvalue(), others.getvalue()], start=2):
        file.write_bytes(content)
        assert_all_there(load(path))
        assert len(decodings) == count
        assert_all_there(load(path))
        assert len(decodings) == count


def test_an_unwritable_cache_only_warns(tmp_path):
    path = make_tar(tmp_path / "c.tar", png_files())
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match=r"cannot be kept.*cache_dir or RESODE_CACHE") as caught:
        found = load_data("cifar10", path, cache_dir=tmp_path / "file" / "cache")
    assert_all_there(found)
    assert caught[0].filename == __file__  # it points at the caller


def test_where_the_cache_is(tmp_path, monkeypatch):
    """The argument, then RESODE_CACHE, then XDG_CACHE_HOME/resode, then ~/.cache/resode."""
    path = make_tar(tmp_path / "c.tar", png_files())
    load_data("cifar10", path, cache_dir=str(tmp_path / "mine"))
    load(path)
    monkeypatch.delenv("RESODE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load(path)
    for folder in ("mine", "cache", "xdg/resode", "home/.cache/resode"):
        assert [entry.suffix for entry in (tmp_path / folder).iterdir()] == [".npz"]


@pytest.mark.slow
def test_the_real_archive(monkeypatch):
    """50,000 and 10,000 images, 5,000 and 1,000 a class; mean and deviation as known, JPEG or not."""
    if not os.environ.get("RESODE_DATA"):
        pytest.skip("RESODE_DATA is not set; it names the folder or archive of CIFAR-10")
    found = load_data("cifar10")
    assert found.title in ("CIFAR-10", "CIFAR-10 (JPEG copy)", "CIFAR-10 (image folder)")
    assert found.train_images.shape == (50_000, 3, 32, 32) and found.test_images.shape == (10_000, 3, 32, 32)
    assert found.train_images.dtype == torch.uint8
    assert found.train_labels.bincount().tolist() == [5000] * 10
    assert found.test_labels.bincount().tolist() == [1000] * 10
    assert found.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)
    assert found.std == pytest.approx([0.2470, 0.2435, 0.2616], abs=4e-3)
    monkeypatch.setattr(cifar, "decode", None)  # the second time it comes from the cache
    assert torch.equal(found.train_images, load_data("cifar10").train_images)


def test_an_image_data_takes_arrays_lists_and_tuples():
    images = np.zeros((2, 1, 4, 4), np.uint8)
    ways = [(0, 1), [0, 1], np.array([0, 1], np.uint8), np.array([0, 1]), torch.tensor([0, 1])]
    for labels in ways:
        found = ImageData("mine", "Mine", images, labels, images, labels, ("a", "b"), (0.0,), (1.0,))
        assert found.train_labels.dtype == torch.int64 and found.test_labels.tolist() == [0, 1]
        assert found.train_images.dtype == torch.uint8
    with pytest.raises(TypeError, match="train labels must be an int64 tensor: got list"):
        ImageData("mine", "Mine", images, ["a", "b"], images, [0, 1], ("a", "b"), (0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"test labels must be 0 to 1.*got 0 to 2"):
        ImageData("mine", "Mine", images, [0, 1], images, [0, 2], ("a", "b"), (0.0,), (1.0,))
    with pytest.raises(
        ValueError, match=r"every class of the test images must be among the training.* of b there"
    ):
        ImageData("mine", "Mine", images, [0, 0], images, [0, 1], ("a", "b"), (0.0,), (1.0,))
