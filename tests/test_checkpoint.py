"""gradient="checkpoint" is autograd's gradient, in memory that grows with the square root of the steps."""

import math

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from resode import METHODS, ODEBlock, odeint

DOUBLE = torch.float64
EXPLICIT = [name for name, tableau in METHODS.items() if tableau.explicit]
ADAPTIVE = [name for name in EXPLICIT if METHODS[name].adaptive]


class Net(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(p), nn.Linear(16, 2)).double()

    def forward(self, t, y):
        return 2 * self.net(torch.cat([y, t * torch.ones_like(y[..., :1])], -1))


@pytest.fixture
def field():
    torch.manual_seed(0)
    return Net()


def gradients(field, gradient, times, **options):
    y0 = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE, requires_grad=True)
    t = torch.tensor(times, dtype=DOUBLE, requires_grad=True)
    y, stats = odeint(field, y0, t, gradient=gradient, return_stats=True, **options)
    before = stats.nfe_backward
    grads = torch.autograd.grad(y.sin().sum(), [y0, t, *field.parameters()])
    return (y.detach(), *grads), stats.nfe_backward - before


@pytest.mark.parametrize("times", [(0.0, 0.4, 0.9, 2.0), (1.0, -1.0)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", EXPLICIT)
def test_gradients_are_autograds_to_rounding(field, method, per_sample, times):
    options = dict(rtol=1e-5, atol=1e-6) if method in ADAPTIVE else dict(n_steps=7)
    expected, none = gradients(field, "autograd", times, method=method, per_sample=per_sample, **options)
    found, again = gradients(field, "checkpoint", times, method=method, per_sample=per_sample, **options)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)
    assert none == 0 and again > 0


def most_held(run):
    """The most entries that tensors kept for the way back hold at a time, forward and back."""
    held, most = {}, [0]

    class Kept:
        def __init__(self, x):
            self.x = x
            key = x.untyped_storage().data_ptr()
            held[key] = (held.get(key, (0, 0))[0] + 1, x.untyped_storage().nbytes())
            most[0] = max(most[0], sum(size for _, size in held.values()))

        def __del__(self):
            key = self.x.untyped_storage().data_ptr()
            count, size = held[key]
            held[key] = (count - 1, size)
            if count == 1:
                del held[key]

    with saved_tensors_hooks(Kept, lambda kept: kept.x):
        run()
    return most[0]


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_memory_grows_with_the_square_root_of_the_steps(method):
    """Of n steps pieces of about √n are held at a time: 4 × the steps, 2 × the memory, not 4 ×."""
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).double()
    y0 = torch.randn(32, 64, dtype=DOUBLE)

    def held(n, gradient):
        given = dict(n_steps=n) if method == "rk4" else dict(options={"max_step": 1 / n, "first_step": 1 / n})
        t = torch.tensor([0.0, 1.0], dtype=DOUBLE)

        def run():
            y = odeint(lambda t, y: field(y), y0, t, method=method, gradient=gradient, rtol=1.0, **given)
            y.sum().backward()

        return most_held(run)

    full, quarter = held(64, "autograd"), held(64, "checkpoint")
    assert quarter < 0.4 * full
    assert held(256, "checkpoint") < 2.5 * quarter
    assert held(256, "autograd") > 3.5 * full, "so that the test can see it"


def test_random_numbers_are_drawn_again_as_they_were():
    torch.manual_seed(0)
    field = Net(p=0.5)
    found = []
    for gradient in ("autograd", "checkpoint"):
        y0 = torch.ones(3, 2, dtype=DOUBLE, requires_grad=True)
        torch.manual_seed(1)
        y = odeint(
            field, y0, torch.tensor([0.0, 1.0], dtype=DOUBLE), method="rk4", n_steps=6, gradient=gradient
        )
        found.append((y.detach(), *torch.autograd.grad(y.sum(), [y0, *field.parameters()])))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "options", [dict(method="rk4", n_steps=4), dict(method="dopri5"), dict(per_sample=True)]
)
def test_a_field_with_random_state_of_its_own_is_refused(options):
    generator = torch.Generator().manual_seed(0)

    def noisy(t, y):
        return y + torch.randn(y.shape, generator=generator, dtype=y.dtype)

    with pytest.raises(ValueError, match="random or other state of its own"):
        odeint(
            noisy, torch.ones(2, 2, dtype=DOUBLE), torch.tensor([0.0, 1.0]), gradient="checkpoint", **options
        )


def test_what_it_does_not_go_with():
    y0, t = torch.ones(2, dtype=DOUBLE), torch.tensor([0.0, 1.0])
    for options, reason in [
        (dict(event_fn=lambda t, y: y[0]), "event_fn"),
        (dict(method="implicit_adams"), "'implicit_adams', which torchdiffeq solves"),
        (dict(method="rk4", options={"step_size": 0.1}), "step_size"),
    ]:
        with pytest.raises(ValueError, match=f"does not go with.*{reason}"):
            odeint(lambda t, y: -y, y0, t, gradient="checkpoint", **options)


def test_a_block_takes_it(field):
    x = torch.randn(3, 2, dtype=DOUBLE)
    found = []
    for gradient in ("autograd", "checkpoint"):
        block = ODEBlock(field, gradient=gradient, rtol=1e-6, atol=1e-6)
        found.append(torch.autograd.grad(block(x).sum(), list(field.parameters())))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*found, strict=True))
    assert math.isfinite(float(found[0][0].sum()))


def test_without_gradients_nothing_is_checked_or_kept(field):
    with torch.no_grad():
        y, stats = odeint(field, torch.ones(2, 2, dtype=DOUBLE), torch.tensor([0.0, 1.0]), gradient="checkpoint",
                          return_stats=True)  # fmt: skip
    assert not y.requires_grad and stats.nfe_backward == 0


@pytest.mark.parametrize("kw", [dict(rtol=1e-9, atol=1e-9), dict(method="rk4", n_steps=40)], ids=str)
def test_a_second_derivative_outlives_the_solution(kw):
    """y' = −a y² from 1 is 1 / (1 + a) at t = 1: 2 / (1 + a)³, when only the first derivative is held."""

    def end(a):
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        y0 = torch.ones(1, dtype=torch.float64)
        return odeint(lambda t, y: -a * y**2, y0, ends, gradient="checkpoint", **kw)[-1].sum()

    a = torch.tensor(1.0, dtype=torch.float64)
    assert torch.autograd.functional.hessian(end, a).item() == pytest.approx(0.25, abs=1e-6)
