"""Checkpoints and data sets as people have them: each is loaded, or refused by its name."""

import functools
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from cifar_files import (
    CLASSES,
    arrays,
    binary_files,
    encode,
    hundred_files,
    kaggle_files,
    load,
    make_folder,
    make_tar,
    png_files,
    python_files,
)
from safetensors.torch import save_file
from torch import nn

from resode.networks import build, load_weights
from resode.training.data import DataError, load_data


@functools.cache
def trained(name, **options):
    """A network with weights of its own; the same for every test."""
    torch.manual_seed(1)
    return build(name, **dict(options)).state_dict()


def to(pattern, replacement=""):
    """Renames every entry."""
    return lambda weights: {name.replace(pattern, replacement): value for name, value in weights.items()}


def prefixed(prefix):
    return lambda weights: {prefix + name: value for name, value in weights.items()}


def lightning(weights):
    """LightningModule with a network and a weighted loss, as its checkpoint callback stores it."""
    state = {f"model.{name}": value for name, value in weights.items()} | {"loss_fn.weight": torch.ones(10)}
    return {
        "state_dict": state,
        "epoch": 3,
        "hyper_parameters": {"lr": 0.1},
        "pytorch-lightning_version": "2.5",
    }


def kuangliu(weights):
    """{"net": …} of a DataParallel model, beside an accuracy; `linear`, `shortcut`."""
    renamed = to("fc.", "linear.")(to("downsample", "shortcut")(weights))
    return {"net": prefixed("module.")(renamed), "acc": 95.4, "epoch": 199}


def resnetv2(weights):
    """timm's names: stages from 0, `norm`, a last layer of 1×1."""
    found = {}
    for name, value in weights.items():
        other = name.replace("conv1.weight", "stem.conv.weight") if name.startswith("conv1") else name
        for group in range(1, 5):
            other = other.replace(f"layer{group}.", f"stages.{group - 1}.blocks.")
        other = other.replace(".shortcut.0.", ".downsample.conv.").replace(".bn", ".norm")
        other = other.replace("fc.", "head.fc.") if other.startswith("fc.") else other
        other = "norm." + other[3:] if other.startswith("bn.") else other
        found[other] = value[:, :, None, None] if other == "head.fc.weight" else value
    return found


def transformers(weights):
    found = {}
    for name, value in weights.items():
        part, *rest = name.split(".")
        if part in ("conv1", "bn1"):
            kind = "convolution" if part == "conv1" else "normalization"
            other = ".".join(["resnet.embedder.embedder", kind, *rest])
        elif part == "fc":
            other = f"classifier.1.{rest[0]}"
        else:
            block, what, *end = rest
            place = f"resnet.encoder.stages.{int(part[-1]) - 1}.layers.{block}"
            if what == "downsample":
                other = ".".join([place, "shortcut", ("convolution", "normalization")[int(end[0])], *end[1:]])
            else:
                kind = "convolution" if what.startswith("conv") else "normalization"
                other = ".".join([place, "layer", str(int(what[-1]) - 1), kind, *end])
        found[other] = value
    return found


SMALL = ("resnet18", {"stem": "small", "num_classes": 10, "width": 8})
IMAGENET = ("resnet18", {"num_classes": 10, "width": 8})
CHECKPOINTS = {
    "torchvision": (IMAGENET, lambda weights: weights),
    "kuangliu": (SMALL, kuangliu),
    "chenyaofo": (("resnet8", {"shortcut": "B"}), to("linear.", "fc.")),
    "akamaster": (("resnet8", {}), lambda w: {"state_dict": prefixed("module.")(w), "best_prec1": 91.7}),
    "timm's resnetv2": (("resnetv2_18", {"num_classes": 10, "width": 8}), resnetv2),
    "transformers": (IMAGENET, transformers),
    "lightning": (("resnet8", {}), lightning),
    **{
        f"prefix {prefix}": (("resnet8", {}), prefixed(prefix))
        for prefix in ("net.", "backbone.", "encoder.", "resnet.", "model.net.", "module.backbone.")
    },
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_are_loaded(case, suffix, tmp_path):
    """Into a network with other weights; every entry is then the trained one's."""
    (name, options), store = CHECKPOINTS[case]
    weights = trained(name, **options)
    content, path = store(weights), tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(content, path)
    else:
        inner = content.get("state_dict", content.get("net", content))
        save_file({name: value.clone() for name, value in inner.items()}, path)
    found = load_weights(build(name, **options), path).state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in found.items())


def with_number(path):
    torch.save({"state_dict": trained("resnet8"), "best_acc": np.float64(91.7)}, path)


def npz(path):
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(2))


def script(path):
    torch.jit.script(nn.Linear(2, 2)).save(path)


REFUSED = {
    "a numpy number": (
        with_number,
        r"text: entry 'best_acc' is a numpy.*scalar \(a numpy number\).*nothing was run.*weights_only=False\) gives",
    ),
    "another depth": (
        lambda path: torch.save(trained("resnet14", num_classes=100), path),
        r"These weights fit build\('resnet14', num_classes=100\)\.",
    ),
    "another kind": (
        lambda path: torch.save(trained("preact8"), path),
        r"These weights fit build\('preact8'\)\.",
    ),
    "an ImageNet network": (
        lambda path: torch.save(transformers(trained("resnet18", num_classes=7)), path),
        r"These weights fit build\('resnet18', num_classes=7\)\.",
    ),
    "an ODE network": (
        lambda path: torch.save(trained("odenet14"), path),
        r"These weights fit build\('odenet14'\)\.",
    ),
    "nearly a network": (
        lambda path: torch.save({**trained("resnet14"), "layer1.0.conv1.bias": torch.zeros(16)}, path),
        r"The nearest network is build\('resnet14'\), which has 9\d% of all entries in common",
    ),
    "another loss's weight without a prefix": (
        lambda path: torch.save({**trained("resnet8"), "criterion.weight": torch.ones(10)}, path),
        r"Unexpected \(1\): criterion.weight",
    ),
    "NumPy": (npz, "is a NumPy archive, and weights are read from safetensors or torch files"),
    "Keras": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), r"is an HDF5 file \(Keras\)"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF" + bytes(99)), "is a GGUF file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_checkpoints_are_refused_by_name(case, tmp_path):
    make, message = REFUSED[case]
    make(tmp_path / "weights")
    model = build("resnet8")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "weights")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_program_is_refused_by_name(tmp_path):
    script(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is a TorchScript program"):
        load_weights(build("resnet8"), tmp_path / "model.pt")


def linked(path):
    """A tar in which one picture is a hard link to another, the same in every bit."""
    files = {**png_files(), "train/cat/0016.png": png_files()["train/cat/0016.png"]}
    with tarfile.open(path, "w") as tar:
        for name, content in {"pool/a.png": files.pop("train/cat/0016.png"), **files}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("train/cat/0016.png")
        link.type, link.linkname = tarfile.LNKTYPE, "pool/a.png"
        tar.addfile(link)
    return path


def pictures(edit):
    """The image folder, its files called by other names."""
    return lambda path: make_folder(
        path / "c", {edit(name): content for name, content in png_files().items()}
    )


def number(name):
    return next(name.replace(f"/{c}/", f"/{i}/") for i, c in enumerate(CLASSES) if f"/{c}/" in name)


DATA = {
    "image folder": pictures(lambda name: name),
    "Train/ and Test/": pictures(lambda name: name.capitalize()),
    "val/": pictures(lambda name: name.replace("test/", "val/")),
    "classes 0 to 9": pictures(number),
    "two levels": pictures(lambda name: name.replace("/ship/", "/vehicles/ship/")),
    "rubbish": lambda path: make_folder(
        path / "c",
        {**png_files(), "train/cat/THUMBS.DB": b"x", "test/@eadir/1.png": b"x", "Desktop.ini": b"x"},
    ),
    "tar.bz2": lambda path: make_tar(path / "c.tar.bz2", png_files(), "w:bz2"),
    "hard links": lambda path: linked(path / "c.tar"),
    "binary": lambda path: make_tar(path / "c.tar.gz", binary_files(), "w:gz"),
    "labels in tuples": lambda path: make_folder(
        path / "c", python_files(lambda batch: pickle.dumps({**batch, b"labels": tuple(batch[b"labels"])}))
    ),
    "labels in arrays": lambda path: make_folder(
        path / "c", python_files(lambda batch: pickle.dumps({**batch, b"labels": np.array(batch[b"labels"])}))
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data_sets_are_loaded(case, tmp_path):
    found = load(DATA[case](tmp_path))
    for split in ("train", "test"):
        images, labels = arrays(split)
        assert np.array_equal(getattr(found, f"{split}_images"), images)
        assert np.array_equal(getattr(found, f"{split}_labels"), labels)


@pytest.mark.parametrize(("name", "classes"), [("cifar100", 100), ("cifar100_coarse", 20)])
def test_cifar_100_is_loaded_by_name(name, classes, tmp_path):
    make_tar(tmp_path / "cifar-100.tar.gz", hundred_files("python"), "w:gz")
    found = load_data(name, tmp_path, cache_dir=tmp_path / "cache")
    assert found.name == name and len(found.classes) == classes == len(found.train_labels.unique())


def test_kaggles_layout_is_loaded(tmp_path):
    found = load(make_folder(tmp_path / "c", kaggle_files()[0]))
    assert (len(found.train_labels), len(found.test_labels)) == (40, 10)


def leaving(path):
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("train/cat/1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "../secret.png"
        tar.addfile(link)
    return path


REFUSED_DATA = {
    "7z": (
        lambda path: path.write_bytes(b"7z\xbc\xaf'\x1c" + bytes(99)),
        "is a 7z archive, which is not read",
    ),
    "Parquet": (lambda path: path.write_bytes(b"PAR1" + bytes(99)), "is a Parquet table, which is not read"),
    "a link that leaves": (leaving, r"'../secret.png', which points outside the archive"),
    "a class in one half only": (
        lambda path: make_tar(path, {n: c for n, c in png_files().items() if not n.startswith("test/frog")}),
        "test/ must hold at least one picture of each of the 10 classes: .* none of frog there",
    ),
    "another class in one half": (
        lambda path: make_tar(path, {**png_files(), "test/lion/1.png": encode(arrays("test")[0][0])}),
        "'test/lion/1.png' in .* lies in 'lion'",
    ),
    "labels that do not fit": (
        lambda path: make_tar(path, kaggle_files(lambda lines: lines[:-3])[0]),
        "3 pictures without a label, such as '48'",
    ),
}


@pytest.mark.parametrize("case", REFUSED_DATA)
def test_data_sets_are_refused_by_name(case, tmp_path):
    make, message = REFUSED_DATA[case]
    make(tmp_path / "c.tar")
    with pytest.raises(DataError, match=message):
        load(tmp_path / "c.tar")
