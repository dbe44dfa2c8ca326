"""What blocks point at, against cases whose cosines are known."""

import math

import pytest
import torch
from torch import nn

from resode import ResidualStack
from resode.analysis import boosting_along, class_means, correction_along
from resode.fields import MLPField


def test_a_stack_that_walks_to_its_target_has_cosine_one_in_every_block():
    target = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class Towards(nn.Module):
        def forward(self, x):
            return target - x

    path = ResidualStack(Towards(), depth=4, step_size=0.25)(torch.zeros_like(target), return_path=True)[1]
    assert torch.allclose(correction_along(path, target), torch.ones(4, 5, dtype=torch.float64), atol=1e-12)
    left = (target - path[-1]).norm(dim=1) / target.norm(dim=1)
    assert torch.allclose(left, torch.full((5,), 0.75**4, dtype=torch.float64))


def test_with_the_last_state_as_target_the_last_block_has_cosine_one():
    torch.manual_seed(0)
    path = ResidualStack([MLPField(8) for _ in range(3)])(torch.randn(6, 8), return_path=True)[1].detach()
    cosines = correction_along(path, path[-1])
    assert torch.allclose(cosines[-1], torch.ones(6)) and (cosines[0] < 0.999).all()


def test_one_target_a_block_and_images():
    path = torch.randn(3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    targets = path[:-1] - 2 * (path[1:] - path[:-1])  # behind
    assert torch.allclose(correction_along(path, targets), -torch.ones(2, 2))


def test_untrained_blocks_do_not_point_at_a_fixed_target():
    """E cos = 0, because W₂ and −W₂ are as likely; 400 one-block nets leave 1/√(400·8) of scatter.

    nan where all units of a block are off.
    """
    torch.manual_seed(0)
    x, target = torch.randn(1, 8), torch.randn(1, 8)
    found = torch.cat(
        [
            correction_along(ResidualStack([MLPField(8)])(x, return_path=True)[1].detach(), target)
            for _ in range(400)
        ]
    )
    assert abs(found.nanmean().item()) < 3 / math.sqrt(400 * 8)


def test_boosting_of_softmax_is_its_closed_form():
    """−∂loss/∂z = onehot − softmax(z); the increment of a linear head is wᵀηF."""
    torch.manual_seed(0)
    stack = ResidualStack([MLPField(6) for _ in range(2)], step_size=0.3).double()
    head, target = nn.Linear(6, 4).double(), torch.tensor([0, 3, 1])
    path = stack(torch.randn(3, 6, dtype=torch.float64), return_path=True)[1].detach()
    found = boosting_along(path, head, target)
    for block in range(2):
        with torch.no_grad():
            descent = nn.functional.one_hot(target, 4) - head(path[block]).softmax(1)
            step = 0.3 * stack.field(block)(path[block]) @ head.weight.T
        expected = torch.nn.functional.cosine_similarity(descent, step)
        assert torch.allclose(found.cosine[block], expected, atol=1e-12)
        assert torch.allclose(found.first_order[block], -(descent * step).sum(1), atol=1e-12)
    assert torch.allclose(
        found.losses[-1], nn.functional.cross_entropy(head(path[-1]), target, reduction="none")
    )
    assert (found.losses[1:] - found.losses[:-1] >= found.first_order - 1e-12).all()  # convex
    assert not found.losses.requires_grad


def test_a_block_along_the_gradient_has_cosine_one():
    path = torch.tensor([[[1.0, 2.0]], [[0.5, 1.0]]])
    assert boosting_along(path, lambda x: x).cosine.item() == pytest.approx(1.0)  # of ½‖z‖²


def test_class_means_leave_the_sample_itself_out():
    means = class_means(torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 4.0]]), torch.tensor([1, 1, 1]))
    assert means.tolist() == [[4.0, 3.0], [3.0, 2.0], [2.0, 1.0]]


def test_wrong_shapes_say_so():
    with pytest.raises(ValueError, match="before and after every block"):
        correction_along(torch.zeros(1, 2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must have the state's shape"):
        correction_along(torch.zeros(3, 2, 3), torch.zeros(3, 2, 3))
    with pytest.raises(ValueError, match="before and after every block"):
        boosting_along(torch.zeros(2, 3), nn.Identity())
