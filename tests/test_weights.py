"""Other people's weights, in the formats in which they are published, and what is refused."""

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from resode import ResidualStack
from resode.networks import WeightsMismatch, build, load_weights, read_weights


def norm(channels):
    return {
        "weight": (channels,),
        "bias": (channels,),
        "running_mean": (channels,),
        "running_var": (channels,),
        "num_batches_tracked": (),
    }


def published(blocks, widths, stem, expansion, head, classes):
    """Names and shapes of a published ResNet, written from its format: torchvision's, timm's, the CIFAR one's."""
    shapes = {"conv1.weight": (widths[0], 3, stem, stem)}
    shapes |= {f"bn1.{key}": shape for key, shape in norm(widths[0]).items()}
    before = widths[0]
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
        for i in range(count):
            at, out = f"layer{stage}.{i}", width * expansion
            sizes = [(width, before, 3), (width, width, 3)]
            if expansion == 4:
                sizes = [(width, before, 1), (width, width, 3), (out, width, 1)]
            for j, (c_out, c_in, k) in enumerate(sizes, 1):
                shapes[f"{at}.conv{j}.weight"] = (c_out, c_in, k, k)
                shapes |= {f"{at}.bn{j}.{key}": shape for key, shape in norm(c_out).items()}
            if head == "fc" and before != out:
                shapes[f"{at}.downsample.0.weight"] = (out, before, 1, 1)
                shapes |= {f"{at}.downsample.1.{key}": shape for key, shape in norm(out).items()}
            before = out
    shapes |= {f"{head}.weight": (classes, before), f"{head}.bias": (classes,)}
    return {
        name: torch.zeros(shape) if "num_" in name else torch.rand(shape) for name, shape in shapes.items()
    }


def cifar_checkpoint(n=3):
    """As the widespread option-A checkpoints are: DataParallel's prefix, no counters, beside an accuracy."""
    weights = published((n, n, n), (16, 32, 64), 3, 1, "linear", 10)
    weights = {f"module.{name}": value for name, value in weights.items() if "num_batches" not in name}
    return {"state_dict": weights, "best_prec1": 91.73, "epoch": 199}


def zipped_or_old(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=path.suffix != ".old")
    return path


@pytest.mark.parametrize("suffix", [".th", ".old"])
def test_cifar_checkpoints_of_option_a(tmp_path, suffix):
    checkpoint = cifar_checkpoint()
    model = load_weights(build("resnet20"), zipped_or_old(tmp_path / f"resnet20{suffix}", checkpoint))
    state = model.state_dict()
    for name, value in checkpoint["state_dict"].items():
        assert torch.equal(state[name.removeprefix("module.")], value)
    assert all(int(value) == 0 for name, value in state.items() if name.endswith("num_batches_tracked"))


def test_cifar_checkpoints_of_option_b():
    """Their projections are `shortcut.0` and `.1`."""
    model = build("resnet20", shortcut="B")
    weights = {name.replace("downsample", "shortcut"): v for name, v in model.state_dict().items()}
    assert any("shortcut" in name for name in weights)
    load_weights(build("resnet20", shortcut="B"), weights)


@pytest.mark.parametrize(
    ("name", "blocks", "expansion"),
    [("resnet18", (2, 2, 2, 2), 1), ("resnet34", (3, 4, 6, 3), 1), ("resnet50", (3, 4, 6, 3), 4)],
)
def test_imagenet_weights_of_torchvision_and_timm(name, blocks, expansion, tmp_path):
    weights = published(blocks, (64, 128, 256, 512), 7, expansion, "fc", 1000)
    save_file(weights, tmp_path / "model.safetensors")
    model = load_weights(build(name), tmp_path / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert len(model.state_dict()) == len(weights)


def test_timms_average_pool_and_squeeze_excitation_variants():
    """resnet…d has the pool first in `downsample`; se.fc1 and se.fc2 are 1×1 convolutions."""
    model = build("resnet18", shortcut="D", squeeze_excitation=True)
    names = set(model.state_dict())
    assert {"layer2.0.downsample.1.weight", "layer2.0.downsample.2.running_mean"} <= names
    assert model.layer1[0].se.fc1.weight.ndim == 4


def test_a_compiled_models_names_are_taken():
    source = build("resnet8")
    compiled = {f"_orig_mod.{name}": value for name, value in source.state_dict().items()}
    model = load_weights(build("resnet8"), compiled)
    assert torch.equal(model.linear.weight, source.linear.weight)


@pytest.mark.parametrize(
    "prefix", ["model.", "module.model.", "model.module.", "_orig_mod.module.", "module.module."]
)
def test_prefixes_are_taken_off_in_any_order(prefix):
    source = build("resnet8")
    weights = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    assert torch.equal(load_weights(build("resnet8"), weights).linear.weight, source.linear.weight)


@pytest.mark.parametrize("name", ["module", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_prefix_that_is_a_networks_own_stays(name, prefix):
    def network():
        return nn.ModuleDict({name: build("resnet8")})

    source = network().state_dict()
    model = load_weights(network(), {f"{prefix}{key}": value for key, value in source.items()})
    assert torch.equal(model[name].linear.weight, source[f"{name}.linear.weight"])


def test_averaged_weights_and_wrapped_wrappers():
    """AveragedModel counts its updates beside the weights; without averages the weights themselves count."""
    source = build("resnet8")
    averaged = torch.optim.swa_utils.AveragedModel(source).state_dict()
    assert "n_averaged" in averaged
    zeros = {name: torch.zeros_like(value) for name, value in source.state_dict().items()}
    for content in (
        averaged,
        {"model_ema": averaged, "epoch": 3},
        {"state_dict": source.state_dict(), "state_dict_ema": zeros},
        {"net": {"state_dict": source.state_dict()}, "acc": 95.0},
    ):
        assert torch.equal(load_weights(build("resnet8"), content).linear.weight, source.linear.weight)


def test_what_is_no_tensor_or_without_memory_does_not_fit():
    """Nothing is changed, also where a numpy array or a tensor on the meta device has the right shape."""
    model = build("resnet8")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = build("resnet8").state_dict()
    for wrong, reason in ((other["linear.bias"].numpy(), "no tensor"), (torch.zeros(10).to("meta"), "meta")):
        with pytest.raises(
            WeightsMismatch, match=rf"Of another shape \(1\): linear.bias .*{reason}.*not \(10,\)"
        ):
            load_weights(model, {**other, "linear.bias": wrong})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="CifarResNet is on the meta device"):
        load_weights(build("resnet8").to("meta"), other)


def test_names_that_are_no_text_are_unexpected():
    model = build("resnet8")
    with pytest.raises(WeightsMismatch, match=r"Unexpected \(1\): 3\."):
        model.load_state_dict({**model.state_dict(), 3: torch.zeros(1)})


@pytest.mark.parametrize("module", [lambda: build("resnet8"), lambda: ResidualStack([nn.Linear(2, 2)] * 2)])
@pytest.mark.parametrize("load", [load_weights, lambda module, weights: module.load_state_dict(weights)])
def test_weights_that_do_not_fit_are_listed_shortest_name_first(module, load):
    model = module()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {name: value + 1 for name, value in before.items() if "weight" not in name or "conv" in name}
    biases = [name for name in weights if name.endswith("bias")][:2]
    weights |= {name: torch.zeros(7) for name in biases}
    weights |= {"zz": torch.zeros(1), "a.long.name": torch.zeros(1)}
    missing = sorted((name for name in before if name not in weights), key=lambda name: (len(name), name))
    with pytest.raises(WeightsMismatch) as error:
        load(model, weights)
    message = str(error.value)
    assert isinstance(error.value, ValueError) and isinstance(error.value, RuntimeError)
    assert f"Missing ({len(missing)}): {', '.join(missing)}." in message
    assert "Unexpected (2): zz, a.long.name." in message
    shape = tuple(before[min(biases, key=lambda name: (len(name), name))].shape)
    assert f"Of another shape (2): {min(biases, key=lambda n: (len(n), n))} (7,), not {shape};" in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
        "all or nothing"
    )


def test_long_lists_are_cut_after_the_shortest():
    with pytest.raises(WeightsMismatch, match=r"Missing \(97\): .*bn1\.bias, .*… and \d+ more\. Unexpected"):
        load_weights(build("resnet20"), {"bins.weight": torch.zeros(1)})


def test_torchs_loose_loading_stays():
    model = build("resnet8")
    result = model.load_state_dict({"linear.bias": torch.ones(10), "other": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["other"] and model.linear.bias.eq(1).all()
    with pytest.raises(WeightsMismatch, match="shape"):
        model.load_state_dict({"linear.bias": torch.ones(3)}, strict=False)


def test_a_wrong_number_of_classes_says_so():
    with pytest.raises(WeightsMismatch, match=r"linear\.bias \(10,\), not \(100,\)"):
        load_weights(build("resnet20", num_classes=100), cifar_checkpoint())


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("form", ["pickle", "zip", "old", "in a state dict"])
def test_objects_are_never_unpickled(tmp_path, monkeypatch, form):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    path = tmp_path / f"weights.{form.replace(' ', '')}"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"linear.weight": Bomb()}))
    elif form == "in a state dict":
        torch.save({**cifar_checkpoint(), "extra": Bomb()}, path)
    else:
        zipped_or_old(path, Bomb())
    with pytest.raises(ValueError, match="could run any code; nothing was run"):
        load_weights(build("resnet20"), path)
    assert not (tmp_path / "exploded").exists()


def test_whole_modules_and_arguments_are_objects_too(tmp_path):
    for content in (nn.Linear(2, 2), {"state_dict": {}, "args": argparse.Namespace(lr=0.1)}):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(ValueError, match="other objects than tensors"):
            read_weights(tmp_path / "model.pt")


def test_damaged_files_are_refused(tmp_path):
    whole = zipped_or_old(tmp_path / "whole.pt", cifar_checkpoint()).read_bytes()
    old = zipped_or_old(tmp_path / "whole.old", cifar_checkpoint()).read_bytes()
    cases = {
        "half.pt": (whole[: len(whole) // 2], "damaged"),
        "half.old": (old[: len(old) // 2], "damaged"),
        "text.pt": (b"<html>404</html>", "neither a safetensors nor a torch file"),
        "empty.pt": (b"", "neither"),
        "half.safetensors": (b"\xff\0\0\0\0\0\0\0{", "no sound safetensors file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="is a folder"):
        read_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        read_weights(tmp_path / "none.pt")
