"""The table of a network's groups: the published one of ImageNet, and sums that are the whole."""

import pytest
import torch

from resode.networks import NETWORKS, architecture, build


@pytest.mark.parametrize(
    ("name", "blocks", "expansion"),
    [
        ("resnet18", (2, 2, 2, 2), 1),
        ("resnet34", (3, 4, 6, 3), 1),
        ("resnet50", (3, 4, 6, 3), 4),
        ("resnet101", (3, 4, 23, 3), 4),
        ("resnet152", (3, 8, 36, 3), 4),
    ],
)
def test_the_published_table_of_imagenet(name, blocks, expansion):
    """He et al. (2015), table 1: output sizes, blocks, channels; each group's weights and multiply-adds by hand.

    A group's first block strides: in torchvision's place, the 3×3 of a bottleneck, so that its 1×1 before
    still sees the larger image.
    """
    with torch.device("meta"):
        groups = {g.name: g for g in architecture(build(name), (3, 224, 224))}
    assert groups["conv1"].cost.shape == (64, 112, 112) and groups["maxpool"].cost.shape == (64, 56, 56)
    before = 64
    for number, (count, size, w) in enumerate(
        zip(blocks, (56, 28, 14, 7), (64, 128, 256, 512), strict=True), 1
    ):
        group, out = groups[f"layer{number}"], expansion * w
        assert (group.cost.shape, group.blocks) == ((out, size, size), count)
        weights, norms, macs = 0, 0, 0
        for i in range(count):
            c_in, seen = (before, size if number == 1 else 2 * size) if i == 0 else (out, size)
            layers = (
                [(9, c_in, w, size), (9, w, w, size)]
                if expansion == 1
                else [(1, c_in, w, seen), (9, w, w, size), (1, w, out, size)]
            )
            if c_in != out:
                layers.append((1, c_in, out, size))
            weights += sum(k * a * b for k, a, b, _ in layers)
            norms += sum(2 * b for _, _, b, _ in layers)
            macs += sum(k * a * b * s * s for k, a, b, s in layers)
        assert (group.cost.parameters, group.cost.macs) == (weights + norms, macs)
        before = out
    assert groups["fc"].cost.shape == (1000,)


@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in ("resnet1202", "preact1001")])
def test_groups_add_up_to_the_network(name):
    size = 224 if NETWORKS[name].options["num_classes"] == 1000 else 32
    with torch.device("meta"):
        model = build(name).train()
        groups, total = architecture(model, (3, size, size)), model.cost((3, size, size))
    assert sum(g.cost.parameters for g in groups) == total.parameters
    assert sum(g.cost.macs for g in groups) == total.macs
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_blocks_are_those_of_the_name():
    expected = {"resnet20": 9, "plain20": 9, "preact164": 54, "odenet20": 9, "highway19": 14}
    for name, blocks in {**expected, "residual_mlp8": 8, "nin": 0}.items():
        with torch.device("meta"):
            assert sum(g.blocks for g in architecture(build(name), (3, 32, 32))) == blocks, name
