"""What CIFAR-10 and CIFAR-100 are: their files, sums, classes and labels, as their home page gives them.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009);
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_HOME = "https://www.cs.toronto.edu/~kriz/"

PUBLISHED_MD5 = {
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
}
"""MD5 of the official archives, by file name."""

_TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_GROUPS = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
_COARSE = tuple(_GROUPS)  # in alphabetical order, as the labels are
_GROUP_OF = {fine: coarse for coarse, names in _GROUPS.items() for fine in names.split()}
_FINE = tuple(sorted(_GROUP_OF))

COARSE_OF_FINE = tuple(_COARSE.index(_GROUP_OF[name]) for name in _FINE)
"""CIFAR-100's coarse label, 0 to 19, of each of its fine labels 0 to 99."""


@dataclass(frozen=True)
class Cifar:
    """One CIFAR and one way to label it.

    Args:
        name: what `load_data` calls it.
        title: what figures call it.
        classes: in the order of the labels.
        batches: for the "binary" and the "python" version, the training files, then the test file.
        folders: of the unpacked official archives.
        keys: of the labels in a pickled batch, in the order in which a binary record has them.
        label: which of these it takes.
        aliases: other names that a class folder may have, and their labels.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    batches: Mapping[str, tuple[str, ...]]
    folders: tuple[str, str]
    keys: tuple[str, ...]
    label: int
    aliases: Mapping[str, int]

    @property
    def number(self) -> int:
        """10 or 100."""
        return len(_FINE) if len(self.keys) == 2 else len(_TEN)

    @property
    def archives(self) -> tuple[str, str]:
        """Names of the official archives, the binary one first."""
        return f"cifar-{self.number}-binary.tar.gz", f"cifar-{self.number}-python.tar.gz"

    @property
    def url(self) -> str:
        """Where the official binary version is."""
        return _HOME + self.archives[0]

    @property
    def formats(self) -> str:
        """What may be read, as a sentence for messages."""
        return (
            "Accepted are an image folder (train/<class>/*.jpg, .jpeg or *.png and test/<class>/... or val/, "
            "classes by name or by number; or Kaggle's train/ with trainLabels.csv), as it is or packed as "
            f".tar, .tar.xz, .tar.gz, .tgz, .tar.bz2 or .zip; {self.archives[0]} or its folder "
            f"{self.folders[0]}; {self.archives[1]} or its folder {self.folders[1]}; or a folder that holds "
            "one of these."
        )

    def label_of(self, folder: str) -> int | None:
        """The label that a class folder stands for by its name or number; None for another folder."""
        if folder.isascii() and folder.isdigit():
            return int(folder) if int(folder) < len(self.classes) else None
        return self._labels.get(_plain(folder))

    @cached_property
    def _labels(self) -> dict[str, int]:
        named = {name: label for label, name in enumerate(self.classes)} | dict(self.aliases)
        return {_plain(name): label for name, label in named.items()}


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_").replace(" ", "_")


def _hundred(name: str, title: str, label: int, aliases: Mapping[str, int]) -> Cifar:
    batches = {"binary": ("train.bin", "test.bin"), "python": ("train", "test")}
    folders = ("cifar-100-binary", "cifar-100-python")
    keys = ("coarse_labels", "fine_labels")
    return Cifar(name, title, (_COARSE, _FINE)[label], batches, folders, keys, label, aliases)


_PARTS = range(1, 6)
CIFARS = {
    "cifar10": Cifar(
        "cifar10",
        "CIFAR-10",
        _TEN,
        {
            "binary": (*(f"data_batch_{i}.bin" for i in _PARTS), "test_batch.bin"),
            "python": (*(f"data_batch_{i}" for i in _PARTS), "test_batch"),
        },
        ("cifar-10-batches-bin", "cifar-10-batches-py"),
        ("labels",),
        0,
        {},
    ),
    "cifar100": _hundred("cifar100", "CIFAR-100", 1, {}),
    "cifar100_coarse": _hundred(
        "cifar100_coarse", "CIFAR-100, 20 classes", 0, dict(zip(_FINE, COARSE_OF_FINE, strict=True))
    ),
}
"""Name -> `Cifar`."""
