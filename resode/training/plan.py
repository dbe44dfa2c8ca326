"""What a run shall do, and what it was done with: the settings and the record in config.yaml."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resode.checks import known
from resode.networks import build
from resode.training.data.cifar_tables import CIFARS
from resode.training.data.datasets import DATASETS, ImageData
from resode.training.files import RunError
from resode.training.folder import FORMAT
from resode.training.recipe import DEEP_LAYERS, SETTINGS, Recipe, make_recipe

Model = str | nn.Module | Callable[..., nn.Module]
"""A name that `resode.networks.build` knows, a network, or a function that makes one."""


@dataclass(frozen=True)
class Plan:
    """What shall be trained, on what, and how, before the machine and the data have had their say."""

    model: Model
    options: dict[str, Any]
    data: str | ImageData
    data_dir: str | None
    recipe_name: str
    recipe: Recipe
    record: dict[str, Any] | None = None  # of the run that is resumed

    @classmethod
    def new(
        cls,
        model: Model | None,
        data: str | ImageData | None,
        recipe: str | Recipe | None,
        options: Mapping[str, Any] | None,
        data_dir: str | Path | None,
        settings: dict[str, Any],
    ) -> Plan:
        """What the arguments of `train` ask for."""
        model = "odenet20" if model is None else model
        data = "digits" if data is None else data
        _check_kinds(model, data)
        if isinstance(data, str):
            known("data set", data, DATASETS)
        if recipe is None:
            recipe = "digits" if data == "digits" else "fast"
        options = dict(options or {})
        for name, value in options.items():
            if not isinstance(value, str | int | float | bool | None):
                raise TypeError(
                    f"model_options are stored with the run, so each is text, a number, True, False or None: "
                    f"{name} is {type(value).__name__}. Build the network yourself and pass it as model."
                )
        if isinstance(model, str):
            with torch.device("meta"):
                build(model, **options)  # a misspelt name or option is found before any image is decoded
        return cls(
            model,
            options,
            data,
            None if data_dir is None else str(Path(data_dir).resolve()),
            recipe if isinstance(recipe, str) else "own",
            make_recipe(recipe, **settings),
        )

    @classmethod
    def stored(
        cls,
        config: Mapping[str, Any],
        model: Model | None,
        data: str | ImageData | None,
        data_dir: str | Path | None,
        given: Mapping[str, Any],
    ) -> Plan:
        """What config.yaml asks for, with a model or data set of one's own given again."""
        if changed := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"a resumed run keeps the settings it was started with, got {', '.join(changed)}. "
                "Leave them out, or start a new run."
            )
        _check_kinds(model, data)
        needed = ("model", "model_options", "data", "data_dir", "recipe", "record")
        wrong = [f"no {name}" for name in needed if name not in config]
        wrong += [f"unknown {name}" for name in config if name not in {"format", *needed, *SETTINGS}]
        if not wrong and not isinstance(config["record"], dict):
            wrong = ["record is no mapping"]
        if wrong:
            raise RunError(
                f"config.yaml of this run does not hold the settings of one: {', '.join(wrong)}. It was "
                "changed; put back what the run wrote, or train again."
            )
        record = config["record"]
        for what, was_own, value in (
            ("model", record["own_model"], model),
            ("data", record["own_data"], data),
        ):
            if was_own and (value is None or isinstance(value, str)):
                raise RunError(
                    f"the run trained a {what} of your own, {config[what]}. Pass it again as {what}."
                )
            if not was_own and value is not None and value != config[what]:
                raise ValueError(f"a resumed run keeps its {what}: it has {config[what]}, got {value}.")
        return cls(
            config["model"] if model is None else model,
            dict(config["model_options"]),
            config["data"] if data is None else data,
            config["data_dir"] if data_dir is None else str(data_dir),
            config["recipe"],
            Recipe.of(config),
            record,
        )

    @property
    def data_name(self) -> str:
        """The data set's short name."""
        return self.data if isinstance(self.data, str) else self.data.name

    def default_run_dir(self) -> Path:
        """runs/<model>-<data>-<time>."""
        model = model_name(self.model).replace(":", ".")
        data = re.sub(r"[^\w.-]", "-", self.data_name)
        return Path("runs") / f"{model}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"


def resolve(recipe: Recipe, data: ImageData, network: nn.Module, device: torch.device) -> Recipe:
    """The recipe with everything decided that it left to the data, the network and the machine."""
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules())
    warmup = recipe.warmup_updates
    if warmup is None:
        warmup = 400 if layers >= DEEP_LAYERS and recipe.schedule != "onecycle" else 0
    return replace(
        recipe,
        warmup_updates=warmup,
        crop_padding=data.crop_padding if recipe.crop_padding is None else recipe.crop_padding,
        flip=data.flip if recipe.flip is None else recipe.flip,
        precision=choose_precision(device) if recipe.precision == "auto" else recipe.precision,
    )


def _check_kinds(model: Any, data: Any) -> None:
    """A TypeError for a model or data set of another kind; None is what a resumed run leaves out."""
    if not (model is None or isinstance(model, str | nn.Module) or callable(model)):
        raise TypeError(
            "model must be a name, a network or a function that makes one, got "
            f"{model!r} ({type(model).__name__})."
        )
    if not (data is None or isinstance(data, str | ImageData)):
        raise TypeError(
            f"data must be {', '.join(DATASETS)} or an ImageData, got {data!r} ({type(data).__name__})."
        )


def check_data_place(data: str | ImageData, data_dir: str | Path | None, download: bool) -> None:
    """A ValueError where a place is named for data that have none."""
    if (isinstance(data, str) and data in CIFARS) or not (data_dir or download):
        return
    what = "digits come with scikit-learn" if data == "digits" else "an ImageData is in memory"
    raise ValueError(
        f"{what}, so it takes neither data_dir nor download, got "
        f"{f'data_dir {data_dir}' if data_dir else 'download'}. Leave it out, or ask for {', '.join(CIFARS)}."
    )


def choose_precision(device: torch.device) -> str:
    """What "auto" means: "bf16" where that is the faster one, else "32".

    On a CPU bf16 wins with matrix units (AMX), and on AMD's with AVX-512 bf16: resnet20's training step
    reached 1,561 images/s against 1,129 in float32 on two cores of a Zen 5. Intel's without AMX have the
    instructions, but lose by them: 358 images/s against 487 on two cores of an Emerald Rapids.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    if device.type == "cpu":
        flags = set(_cpu_info("flags").split())
        amd = _cpu_info("vendor_id") == "AuthenticAMD"
        return "bf16" if "amx_bf16" in flags or (amd and "avx512_bf16" in flags) else "32"
    return "32"


def make_network(model: Model, options: Mapping[str, Any] | None = None) -> nn.Module:
    """The network that a name, a constructor or a network stands for."""
    if isinstance(model, str):
        return build(model, **(options or {}))
    if isinstance(model, nn.Module):
        if options:
            raise ValueError(
                f"a finished network takes no options, got {', '.join(options)}. Pass its constructor."
            )
        return model
    try:
        network = model(**(options or {}))
    except TypeError as error:
        raise TypeError(
            f"{model_name(model)} must make a network when it is called with its options, got "
            f"{', '.join(options or {}) or 'none'}: {error}."
        ) from error
    if not isinstance(network, nn.Module):
        raise TypeError(f"{model_name(model)} must return a torch.nn.Module, got {type(network).__name__}.")
    return network


def model_name(model: Model) -> str:
    """What a run calls its model: the name, or where the code stands."""
    if isinstance(model, str):
        return model
    place = type(model) if isinstance(model, nn.Module) else model
    return f"{place.__module__}:{getattr(place, '__qualname__', type(place).__qualname__)}"


def count_parameters(network: nn.Module) -> int:
    """Trained parameters."""
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


def make_config(
    plan: Plan, recipe: Recipe, data: ImageData, network: nn.Module, device: torch.device
) -> dict[str, Any]:
    """What config.yaml holds: the settings that repeat the run, and under `record` what it met."""
    cpu = _cpu_info("model name") or platform.processor() or platform.machine()
    settings = asdict(recipe) | {"milestones": list(recipe.milestones), "refine_at": list(recipe.refine_at)}
    return {
        "format": FORMAT,
        "model": model_name(plan.model),
        "model_options": plan.options,
        "data": plan.data_name,
        "data_dir": plan.data_dir,
        "recipe": plan.recipe_name,
        **settings,
        "record": {
            "own_model": not isinstance(plan.model, str),
            "own_data": not isinstance(plan.data, str),
            "title": data.title,
            "train_images": len(data.train_labels),
            "test_images": len(data.test_labels),
            "images_checksum": data.checksum(),
            "parameters": count_parameters(network),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "lightning": _version("lightning"),
            "resode": _version("resode"),
            "commit": _commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit resode runs from, with -dirty where files were changed; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe"]
    command += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _cpu_info(key: str) -> str:
    """The first such line of Linux's cpuinfo; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
