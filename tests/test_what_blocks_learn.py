"""Conflict, collective updates, unrolled sums, lesions, virtual depth, recovery: against known cases."""

import math

import pytest
import torch
from torch import nn

from resode import ResidualStack
from resode.analysis import jacobian, lesion_study, loss_gradient_norms, reordering_study
from resode.fields import MLPField, SoftThresholdField
from resode.networks import PlainMLP, ResidualMLP, build
from theory.measures.collective import first_update
from theory.measures.conflict import gradient_conflict
from theory.measures.recovery import recovery
from theory.measures.unrolled import unrolled_sum
from theory.measures.virtual_depth import virtual_depth


def linear(matrix):
    field = nn.Linear(len(matrix), len(matrix), bias=False).double()
    field.weight.data.copy_(torch.as_tensor(matrix))
    return field


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Conflict


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.34, 0.7])
def test_cosines_of_a_symmetric_field_are_the_closed_form(alpha):
    """g_l = (1 + αλ)^(L − l) v, entry by entry; the last block turns at 1 / mean|λ| = 1/3."""
    stack = ResidualStack(linear([[-1.0, 0.0], [0.0, -5.0]]), depth=3, step_size=alpha)
    found = gradient_conflict(stack, torch.ones(1, 2).double(), loss_fn=lambda z, _: z.sum(1))
    factor = torch.tensor([1 - alpha, 1 - 5 * alpha], dtype=torch.float64)
    for block in range(3):
        after = factor ** (2 - block)
        expected = nn.functional.cosine_similarity(after, factor * after, dim=0)
        assert found.cosine[block, 0] == pytest.approx(expected.item(), abs=1e-12)
    assert found.turning_step[-1, 0] == pytest.approx(1 / 3)
    assert (found.cosine[-1, 0] < 0) == (alpha > 1 / 3)


def test_a_rotation_never_conflicts():
    stack = ResidualStack(linear([[0.0, -1.0], [1.0, 0.0]]), depth=2, step_size=7.0)
    found = gradient_conflict(stack, random(3, 2))
    assert torch.allclose(found.cosine, torch.full((2, 3), 1 / math.sqrt(50), dtype=torch.float64))
    assert (found.turning_step > 1e12).all()


def test_slope_and_sign_on_a_nonlinear_stack():
    """The slope is autograd's for learnt steps; the sign of the cosine is that of 1 + α·rayleigh."""
    torch.manual_seed(0)
    fields = [MLPField(6, activation="tanh").double() for _ in range(4)]
    stack = ResidualStack(fields, step_size=0.7, learn_step=True).double()
    x, head = random(5, 6), nn.Linear(6, 3).double()
    target = torch.tensor([0, 1, 2, 0, 1])
    found = gradient_conflict(stack, x, target, head=head)
    nn.functional.cross_entropy(head(stack(x)), target, reduction="sum").backward()
    assert torch.allclose(found.slope, stack.step_sizes.grad, atol=1e-12)
    assert ((found.cosine > 0) == (1 + 0.7 * found.rayleigh > 0)).all()
    path = stack(x, return_path=True)[1].detach()
    dense = jacobian(fields[-1], path[-2])
    logits = head(path[-1]).detach()
    v = (logits.softmax(1) - nn.functional.one_hot(target, 3)) @ head.weight.detach()
    quotient = torch.einsum("bi,bij,bj->b", v, dense, v) / v.square().sum(1)
    assert torch.allclose(found.rayleigh[-1], quotient, atol=1e-10)


def test_conflict_needs_euler_steps():
    with pytest.raises(ValueError, match="belong to Euler steps"):
        gradient_conflict(ResidualStack(MLPField(2), depth=2, solver="rk4"), torch.ones(1, 2))


# Collective update


def stack_of(depth, scale=0.0, n=3):
    return ResidualStack([linear(scale * random(n, n, seed=i)) for i in range(depth)])


@pytest.mark.parametrize("depth", [1, 2, 8, 32])
def test_first_update_of_linear_blocks_is_the_binomial(depth):
    """(I − ηG)^L − I against −ηG, G = (M − T)xxᵀ/N of ½‖·‖² at M = I."""
    x, target = random(5, 3, seed=90), random(5, 3, seed=91)
    found = first_update(
        stack_of(depth), x, target, learning_rate=0.1, loss_fn=lambda z, t: 0.5 * (z - t).square().sum(1)
    )
    gradient = (x - target).T @ x / 5
    assert torch.allclose(found.gradients, gradient.flatten().expand(depth, 9), atol=1e-13)
    identity = torch.eye(3, dtype=torch.float64)
    one, all_ = -0.1 * gradient, torch.linalg.matrix_power(identity - 0.1 * gradient, depth) - identity
    assert found.ratio == pytest.approx(float((x @ all_.T).norm() / (x @ one.T).norm()), rel=1e-10)
    assert found.spread < 1e-14


def test_spread_of_gradients_is_proportional_to_the_start():
    x = random(5, 3, seed=90)
    one, tenth = (first_update(stack_of(4, s), x, 2 * x, learning_rate=1e-6).spread for s in (1e-4, 1e-5))
    assert one / tenth == pytest.approx(10, rel=1e-2)


def test_two_layers_at_zero_are_a_saddle_and_the_stack_is_left_alone():
    fields = [MLPField(3).double() for _ in range(3)]
    for field in fields:
        nn.init.zeros_(field.fc1.weight)
        nn.init.zeros_(field.fc2.weight)
        field.fc1.bias.requires_grad_(False)
    stack = ResidualStack(fields)
    x = random(4, 3)
    found = first_update(stack, x, 2 * x, learning_rate=0.1, loss_fn=lambda z, t: (z - t).square().sum(1))
    assert not found.gradients[:, :18].any()  # of both matrices; the last bias still moves
    assert torch.equal(stack(x), x)
    with pytest.raises(ValueError, match="share a field"):
        first_update(ResidualStack(linear(torch.eye(3)), depth=2), x, learning_rate=1.0)


# Unrolled sums and lesions


def test_sum_is_exact_without_a_relu_after_it_and_not_with_one():
    torch.manual_seed(0)
    images = torch.randn(2, 1, 8, 8).double()
    pre = unrolled_sum(build("odenet20", in_channels=1).double().eval(), images)
    assert [run.blocks for run in pre] == [3, 2, 2] and max(run.error for run in pre) < 1e-14
    assert all(run.after == "" for run in pre)
    post = unrolled_sum(build("resnet20", in_channels=1).double().eval(), images)
    assert min(run.error for run in post) > 1e-3
    assert all(run.after for run in post)


def test_lesion_of_residual_and_plain_networks():
    """x ← 2x thrice: without a block half is left, residual or plain."""

    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.scale * x

    plain = nn.Sequential(*(Double() for _ in range(3))).eval()
    x, target = torch.ones(4, 2), torch.full((4, 2), 8.0)
    found = lesion_study(plain, x, target, blocks="*")
    assert [s.name for s in found] == ["0", "1", "2"]
    assert [s.loss for s in found] == [16.0] * 3 and [s.output_change for s in found] == [0.5] * 3
    swapped = reordering_study(plain, x, target, blocks="*")
    assert [s.change for s in swapped] == [0.0] * 3
    with pytest.raises(ValueError, match="no residual block"):
        lesion_study(nn.Linear(2, 2).eval(), x)


def test_lesions_take_the_share_of_wrong_answers():
    torch.manual_seed(0)
    model, x = ResidualMLP(3, in_features=4, width=8, num_classes=3).eval(), torch.randn(10, 4)
    right = model(x).argmax(1)
    found = lesion_study(model, x, right, loss_fn=lambda z, t: (z.argmax(1) != t).double())
    assert len(found) == 3 and all(s.loss == s.change == round(10 * s.loss) / 10 for s in found)


# Virtual depth


def test_virtual_depth_is_the_fields_own_share_and_the_gaussian_tail():
    """|z| > τ for standard normal z with probability erfc(τ/√2)."""
    field = SoftThresholdField(nn.Identity(), threshold=1.5)
    x = random(200, 400)
    path = ResidualStack(field, depth=1)(x, return_path=True)[1].detach()
    found = virtual_depth(path)
    assert torch.equal(found.shares[0], field.active_share(x))
    p = math.erfc(1.5 / math.sqrt(2))
    assert found.depth.mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / x.numel()))
    with pytest.raises(ValueError, match="before and after"):
        virtual_depth(x)


# Recovery and gradients


def test_recovery_of_what_is_lost_and_what_is_kept():
    x = random(400, 4)
    assert recovery(x @ random(4, 4, seed=1), x) > 0.999
    assert recovery(1e-30 * x, x) > 0.999
    assert recovery(x[:, :1], x) == pytest.approx(0.25, abs=0.05)  # one of four independent directions
    assert recovery(torch.zeros(400, 2), x) == pytest.approx(0.0, abs=0.05)
    with pytest.raises(ValueError, match="at least four samples"):
        recovery(x[:5], x)


def test_loss_gradient_norms_are_autograds_for_residual_and_plain():
    torch.manual_seed(0)
    for model in (ResidualMLP(3, in_features=4, width=8), PlainMLP(3, in_features=4, width=8)):
        blocks = list(model.stack.fields) if isinstance(model, ResidualMLP) else list(model.blocks)
        x, target = torch.randn(5, 4), torch.arange(5)
        found = loss_gradient_norms(model.eval(), blocks, x, target)
        assert found.shape == (3, 5)
        state = model.input(x).detach().requires_grad_()
        after = model.stack(state) if isinstance(model, ResidualMLP) else model.blocks(state)
        nn.functional.cross_entropy(model.linear(after), target, reduction="sum").backward()
        assert torch.allclose(found[0], state.grad.norm(dim=1), rtol=1e-5)
    with pytest.raises(ValueError, match="used once"):
        loss_gradient_norms(model, [nn.Linear(1, 1)], x)
