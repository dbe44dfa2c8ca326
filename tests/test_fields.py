"""Fields: their formulas, what they promise about their Jacobians, and what they refuse."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from resode.fields import (
    ACTIVATIONS,
    MONOTONE,
    AntisymmetricField,
    BottleneckField,
    ConvField,
    HamiltonianField,
    MLPField,
    ParabolicField,
    SoftThresholdField,
    SqueezeExcitation,
    make_conv,
    make_norm,
)

IMAGE_FIELDS = [ConvField, BottleneckField]
STABLE_FIELDS = [AntisymmetricField, ParabolicField, HamiltonianField]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def jacobian(field, x):
    """dF/dx of one state x, shape (n, n)."""
    return torch.func.jacrev(field)(x).reshape(x.numel(), x.numel())


def test_conv_field_is_its_formula():
    field = ConvField(8)
    for bn in (field.bn1, field.bn2):
        nn.init.uniform_(bn.weight, 0.5, 2.0)
        nn.init.uniform_(bn.bias, -1.0, 1.0)
    x = torch.randn(4, 8, 5, 5)
    out = x
    for bn, conv in ((field.bn1, field.conv1), (field.bn2, field.conv2)):
        out = F.batch_norm(out, None, None, bn.weight, bn.bias, training=True)
        out = F.conv2d(out.clamp(min=0), conv.weight, padding=1)
    assert torch.equal(field(x), out)


def test_bottleneck_field_is_its_formula():
    field = BottleneckField(8, norm="none", activation="tanh")
    x = torch.randn(4, 8, 5, 5)
    out = F.conv2d(x.tanh(), field.conv1.weight, field.conv1.bias)
    out = F.conv2d(out.tanh(), field.conv2.weight, field.conv2.bias, padding=1)
    out = F.conv2d(out.tanh(), field.conv3.weight, field.conv3.bias)
    assert field.conv2.weight.shape == (2, 2, 3, 3)
    assert torch.equal(field(x), out)


def test_convolution_weights_of_basic_and_bottleneck_as_by_formula():
    """9(C·C + C²) = 1,179,648 against C·M + 9M² + M·C = 69,632 at C = 256, M = 64."""

    def conv_weights(field):
        return sum(m.weight.numel() for m in field.modules() if isinstance(m, nn.Conv2d))

    assert conv_weights(ConvField(256)) == 1_179_648
    assert conv_weights(BottleneckField(256)) == 69_632


@pytest.mark.parametrize("field_class", IMAGE_FIELDS)
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_image_fields_keep_the_shape_and_leave_x_alone(field_class, norm, activation):
    field = field_class(8, norm=norm, activation=activation)
    x = torch.randn(3, 8, 5, 7)
    before = x.clone()
    assert field(x).shape == x.shape
    assert torch.equal(x, before)


@pytest.mark.parametrize("field_class", IMAGE_FIELDS)
def test_only_batch_norm_couples_samples(field_class):
    x = torch.randn(3, 8, 5, 5)
    for norm, coupled in (("batch", True), ("group", False), ("none", False)):
        field = field_class(8, norm=norm)
        together, alone = field(x)[:1], field(x[:1])
        assert (not torch.allclose(together, alone, atol=1e-3)) == coupled


@pytest.mark.parametrize("field_class", IMAGE_FIELDS)
def test_zero_init_last_is_zero_but_not_dead(field_class):
    field = field_class(8, zero_init_last=True)
    x = torch.randn(2, 8, 4, 4)
    out = field(x)
    assert torch.count_nonzero(out) == 0
    (out * torch.randn_like(out)).sum().backward()
    last = field.conv2 if field_class is ConvField else field.conv3
    assert last.weight.grad is not None and last.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("field_class", IMAGE_FIELDS)
def test_wrong_channels_name_both_shapes(field_class):
    with pytest.raises(ValueError, match=r"\(batch, 8, height, width\).*got x \(2, 16, 4, 4\)"):
        field_class(8)(torch.zeros(2, 16, 4, 4))
    with pytest.raises(ValueError, match=r"\(8, 4, 4\)"):
        field_class(8)(torch.zeros(8, 4, 4))


def test_convolutions_start_with_he_variance():
    """2 / fan-out with norms, 2 / fan-in without, over 36,864 weights: known to about 0.7 %."""
    for norm, fan in (("batch", 9 * 128), ("group", 9 * 128), ("none", 9 * 32)):
        conv = make_conv(32, 128, 3, norm=norm)
        assert conv.weight.var().item() == pytest.approx(2 / fan, rel=0.03)
        assert (conv.bias is None) == (norm != "none")
        assert conv.bias is None or not conv.bias.any()


@settings(deadline=None, max_examples=50, derandomize=True)
@given(channels=st.integers(1, 700))
def test_group_norm_divides_the_channels(channels):
    groups = make_norm("group", channels).num_groups
    assert channels % groups == 0 and groups <= 32
    assert groups == 1 or channels // groups >= 4


def test_squeeze_excitation_scales_channels_of_a_sample():
    se = SqueezeExcitation(8)
    x = torch.rand(2, 8, 3, 3) + 0.5
    gate = se(x) / x
    assert torch.allclose(gate, gate.mean((2, 3), keepdim=True).expand_as(gate), atol=1e-6)
    assert ((gate > 0) & (gate < 1)).all()
    field = ConvField(8, norm="none", squeeze_excitation=True)
    plain = ConvField(8, norm="none")
    plain.load_state_dict({k: v for k, v in field.state_dict().items() if not k.startswith("se.")})
    assert torch.equal(field(x), field.se(plain(x)))


def test_mlp_field_is_its_formula():
    field = MLPField(6, hidden=10)
    x = torch.randn(3, 2, 6)
    hidden = (x @ field.fc1.weight.T + field.fc1.bias).clamp(min=0)
    assert torch.allclose(field(x), hidden @ field.fc2.weight.T + field.fc2.bias, atol=1e-6)
    assert torch.count_nonzero(MLPField(6, zero_init_last=True)(x)) == 0
    with pytest.raises(ValueError, match=r"\(\*batch, 6\): got x \(3, 5\)"):
        field(torch.zeros(3, 5))


def test_mlp_field_keeps_the_second_moment():
    """He's W₁ doubles the moment that relu halves; W₂ doubles it once more: E F² = 2 E x²."""
    x = torch.randn(64, 512)
    ratios = [(MLPField(512)(x).square().mean() / x.square().mean()).item() for _ in range(8)]
    assert sum(ratios) / len(ratios) == pytest.approx(2.0, rel=0.05)


# Soft threshold.


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    z=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8),
    tau=st.floats(0, 5, width=32),
)
def test_soft_threshold_is_its_formula(z, tau):
    x = torch.tensor([z], dtype=torch.float64)
    field = SoftThresholdField(nn.Identity(), threshold=tau).double()
    expected = x.sign() * (x.abs() - tau).clamp(min=0)
    assert torch.allclose(field(x), expected, rtol=0, atol=1e-14)
    assert field.active_share(x).item() == pytest.approx((x.abs() > tau).double().mean().item(), abs=1e-12)


def test_block_is_the_identity_to_the_bit_in_the_dead_zone():
    branch = MLPField(16)
    x = torch.randn(32, 16)
    tau = branch(x).abs().median().item()
    field = SoftThresholdField(branch, threshold=tau)
    dead = branch(x).abs() <= tau
    assert 0.4 < dead.float().mean() < 0.6
    assert torch.equal((x + 0.3 * field(x))[dead], x[dead])
    assert (field(x)[~dead] != 0).all()


def test_threshold_is_learnt_by_its_gradient():
    """dF/dτ = −sign(z) where active, 0 in the dead zone; one τ a channel when asked."""
    x = torch.tensor([[[[2.0]], [[-3.0]], [[0.1]]]])  # (1, 3, 1, 1)
    field = SoftThresholdField(nn.Identity(), threshold=1.0, channels=3)
    field(x).sum().backward()
    assert field.threshold.grad.tolist() == [-1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="at least 0"):
        SoftThresholdField(nn.Identity(), threshold=-1.0)


# Stable by construction.


STABLE_STATES = [({}, (12,)), ({"kernel_size": 3}, (1, 4, 3, 5))]
"""Options and the shape of one state, for a matrix and for a convolution."""


def trained(field, shape):
    """The field after some gradient steps that ask for growth, F(x) = x."""
    optimizer = torch.optim.SGD(field.parameters(), lr=0.2)
    for _ in range(20):
        x = torch.randn(16, *shape[-3:] if len(shape) > 1 else shape, dtype=torch.float64)
        optimizer.zero_grad()
        (field(x) - x).square().mean().backward()
        optimizer.step()
    return field


@pytest.mark.parametrize("field_class", STABLE_FIELDS)
@pytest.mark.parametrize("activation", MONOTONE)
@pytest.mark.parametrize(("options", "shape"), STABLE_STATES)
def test_sign_of_the_spectrum_is_as_promised(field_class, activation, options, shape):
    size = shape[-1] if len(shape) == 1 else shape[1]
    field = field_class(size, activation=activation, **options).double()
    for stage in ("random", "large", "trained"):
        if stage == "large":
            with torch.no_grad():
                for p in field.parameters():
                    p.copy_(3 * torch.randn_like(p))
        if stage == "trained":
            field = trained(field_class(size, activation=activation, **options).double(), shape)
        J = jacobian(field, torch.randn(shape, dtype=torch.float64))
        eigenvalues, norm = torch.linalg.eigvals(J), torch.linalg.matrix_norm(J, 2).item()
        if field_class is ParabolicField:
            assert torch.allclose(J, J.T, atol=1e-12 * norm)
            assert torch.linalg.eigvalsh(J).max() <= 1e-12 * norm
            assert torch.linalg.eigvalsh(J).min() < -1e-3
        else:
            # a defective zero eigenvalue is known to sqrt(eps) only
            assert eigenvalues.real.abs().max() <= 1e-6 * norm
            assert eigenvalues.imag.abs().max() > 1e-3


@pytest.mark.parametrize(("options", "shape"), STABLE_STATES)
def test_damping_bounds_the_real_part(options, shape):
    """−γ max σ' ≤ Re λ ≤ −γ min σ': the numerical range of D^½(K − Kᵀ − γI)D^½."""
    size = shape[-1] if len(shape) == 1 else shape[1]
    field = AntisymmetricField(size, gamma=0.5, activation="softplus", **options).double()
    x = torch.randn(shape, dtype=torch.float64)
    real = torch.linalg.eigvals(jacobian(field, x)).real
    weights = {name: p.clone() for name, p in field.named_parameters()}
    field.act = nn.Identity()
    slopes = torch.sigmoid(torch.func.functional_call(field, weights, x))  # softplus' = sigmoid
    assert real.max() <= -0.5 * slopes.min() + 1e-12
    assert real.min() >= -0.5 * slopes.max() - 1e-12


@pytest.mark.parametrize(("options", "shape"), STABLE_STATES)
def test_a_damped_field_stays_damped_when_it_is_trained_to_grow(options, shape):
    """Trained towards F(x) = x, whose λ would be 1: no weight gives Re λ > 0."""
    size = shape[-1] if len(shape) == 1 else shape[1]
    field = trained(AntisymmetricField(size, gamma=0.3, **options).double(), shape)
    for _ in range(5):
        J = jacobian(field, torch.randn(shape, dtype=torch.float64))
        real = torch.linalg.eigvals(J).real
        assert -0.3 - 1e-12 <= real.min() and real.max() < 0


def test_hamiltonian_energy_is_conserved():
    """dH/dt = ∇H·F = 0 for H = Σ log cosh(K₁q + b₁) + Σ log cosh(K₂p + b₂), whose σ is tanh."""
    field = HamiltonianField(8).double()
    x = torch.randn(8, dtype=torch.float64, requires_grad=True)
    p, q = x.chunk(2)
    energy = (field.weight1 @ q + field.bias1).cosh().log().sum()
    energy = energy + (field.weight2 @ p + field.bias2).cosh().log().sum()
    (gradient,) = torch.autograd.grad(energy, x)
    f = field(x)
    assert abs((gradient @ f).item()) <= 1e-14 * (gradient.norm() * f.norm()).item() + 1e-15
    assert f.norm() > 0.01


def test_leapfrog_block_is_symplectic():
    """Its Jacobian M satisfies MᵀΩM = Ω; Euler's does not."""
    eta, n = 0.5, 6
    leapfrog, euler = HamiltonianField(n, leapfrog=eta).double(), HamiltonianField(n).double()
    euler.load_state_dict(leapfrog.state_dict())
    x = torch.randn(n, dtype=torch.float64)
    p, q = x.chunk(2)
    p = p + eta * leapfrog.weight1.T @ torch.tanh(leapfrog.weight1 @ q + leapfrog.bias1)
    q = q - eta * leapfrog.weight2.T @ torch.tanh(leapfrog.weight2 @ p + leapfrog.bias2)
    assert torch.allclose(x + eta * leapfrog(x), torch.cat((p, q)), atol=1e-14)
    eye, zero = torch.eye(n // 2, dtype=torch.float64), torch.zeros(n // 2, n // 2, dtype=torch.float64)
    omega = torch.cat((torch.cat((zero, eye), 1), torch.cat((-eye, zero), 1)))
    for field, symplectic in ((leapfrog, True), (euler, False)):
        M = torch.eye(n, dtype=torch.float64) + eta * jacobian(field, x)
        assert torch.allclose(M.T @ omega @ M, omega, atol=1e-13) == symplectic


@torch.no_grad()
def test_leapfrog_keeps_the_energy_that_euler_inflates():
    """Over 16 draws Euler's energy grew by e^(3.0 ± 0.8), leapfrog's swung by 2 to 27 % and drifted by 0.2 % at most."""
    eta, n = 0.5, 6
    leapfrog, euler = HamiltonianField(n, leapfrog=eta).double(), HamiltonianField(n).double()
    euler.load_state_dict(leapfrog.state_dict())
    x0 = torch.randn(n, dtype=torch.float64)

    def energies(field):
        x = x0
        for _ in range(1000):
            x = x + eta * field(x)
            p, q = x.chunk(2)
            halves = field.weight1 @ q + field.bias1, field.weight2 @ p + field.bias2
            yield sum(torch.logaddexp(z, -z).sum().item() - len(z) * math.log(2) for z in halves)

    kept, inflated = list(energies(leapfrog)), list(energies(euler))
    assert max(kept) < 1.5 * min(kept)
    assert sum(kept[-200:]) == pytest.approx(sum(kept[:200]), rel=0.01)
    assert inflated[-1] > 2 * inflated[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvField(0), "at least 1"),
        (lambda: ConvField(True), "whole number"),
        (lambda: ConvField(8, norm="bach"), "Did you mean batch"),
        (lambda: ConvField(8, activation="rleu"), "Did you mean relu"),
        (lambda: BottleneckField(10), "multiple of its expansion: got 10, 4"),
        (lambda: MLPField(4, hidden=0), "hidden must be"),
        (lambda: AntisymmetricField(4, gamma=-0.1), "gamma"),
        (lambda: AntisymmetricField(4, gamma=math.nan), "gamma"),
        (lambda: ParabolicField(4, activation="gelu"), "nowhere negative"),
        (lambda: ParabolicField(4, kernel_size=2), "odd"),
        (lambda: HamiltonianField(5), "even"),
        (lambda: HamiltonianField(4, leapfrog=-1.0), "leapfrog must be at least 0"),
        (lambda: ParabolicField(4)(torch.zeros(2, 5)), r"\(\*batch, 4\): got x \(2, 5\)"),
        (lambda: ParabolicField(4, kernel_size=3)(torch.zeros(2, 5, 3, 3)), r"got x \(2, 5, 3, 3\)"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "field",
    [
        ConvField(8, squeeze_excitation=True),
        BottleneckField(8),
        SoftThresholdField(ConvField(8)),
        ParabolicField(8, kernel_size=3),
        HamiltonianField(8, kernel_size=3),
    ],
    ids=lambda field: type(field).__name__,
)
def test_copies_and_memory_formats_give_the_same(field):
    field.eval()
    x = torch.randn(2, 8, 6, 6)
    expected = field(x)
    assert torch.equal(copy.deepcopy(field)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(field))(x), expected)
    nhwc = copy.deepcopy(field).to(memory_format=torch.channels_last)
    assert torch.allclose(nhwc(x.to(memory_format=torch.channels_last)), expected, atol=1e-5)
