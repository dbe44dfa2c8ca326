"""Each sample its own event, of any kind: as right as the single one, against closed forms."""

import math

import pytest
import torch

from resode import odeint_event

DOUBLE = torch.float64
Y0 = torch.tensor([[1.0], [2.0], [30.0], [0.7]], dtype=DOUBLE)
WAYS = [
    dict(rtol=1e-10, atol=1e-12),
    dict(method="dopri8", rtol=1e-10, atol=1e-12),
    dict(method="fehlberg45", rtol=1e-10, atol=1e-12),
    dict(method="rk4", step_size=0.01),
]


def name(way):
    return way.get("method", "dopri5")


def start(*values):
    return torch.tensor(values or [0.0], dtype=DOUBLE)


def decay(t, y):
    return -y


def unit(t, y):
    return torch.ones_like(y)


def own(func, y0, t0, event, **how):
    return odeint_event(func, y0, t0, event_fn=event, per_sample=True, **how)


SIGNS = {
    "greater": lambda t, y: y[:, 0] > 0.5,
    "less": lambda t, y: y[:, 0] < 0.5,
    "integer": lambda t, y: (y[:, 0] > 0.5).long(),
    "relu": lambda t, y: torch.relu(y[:, 0] - 0.5),
    "clamp": lambda t, y: (y[:, 0] - 0.5).clamp(min=0),
    "step": lambda t, y: torch.sign(y[:, 0] - 0.5),
    "infinite": lambda t, y: torch.where(y[:, 0] > 0.5, 3.0, -math.inf),
}


@pytest.mark.parametrize("way", WAYS, ids=name)
@pytest.mark.parametrize("event", SIGNS.values(), ids=SIGNS)
def test_an_event_is_found_by_its_sign_alone(event, way):
    """y' = −y from y₀ is 1/2 at ln 2y₀, however flat the function is before or after."""
    times, path = own(decay, Y0, start(), event, **way)
    assert torch.allclose(times, torch.log(2 * Y0[:, 0]), rtol=0, atol=1e-8)
    assert torch.allclose(path[1], torch.full_like(Y0, 0.5), rtol=0, atol=1e-8)


@pytest.mark.parametrize("way", WAYS, ids=name)
@pytest.mark.parametrize("power", [1, 3, 5, 9])
def test_a_zero_of_higher_order(power, way):
    """y' = 1 reaches 2.5 after 2.5 − y₀, a unit earlier for each unit of y₀, whatever the zero's order."""
    y0 = torch.tensor([[0.0], [1.0], [-3.0]], dtype=DOUBLE, requires_grad=True)
    times, path = own(unit, y0, start(), lambda t, y: (y[:, 0] - 2.5) ** power, **way)
    assert torch.allclose(times, 2.5 - y0[:, 0], rtol=0, atol=1e-12)
    (dt,) = torch.autograd.grad(times.sum(), y0, retain_graph=True)
    assert torch.allclose(dt, -torch.ones_like(y0), rtol=0, atol=1e-5)
    (dy,) = torch.autograd.grad(path[1].sum(), y0)
    assert torch.allclose(dy, torch.zeros_like(y0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "way",
    [
        {},
        dict(method="dopri8"),
        dict(method="bosh3"),
        dict(method="fehlberg45"),
        dict(method="rk4", step_size=4.0),
    ],
    ids=name,
)
def test_of_several_zeros_in_a_step_each_sample_takes_its_first(way):
    """One step holds two zeros of (y − 2.5)(y − 5), so that the event has one sign at its ends, or three."""
    y0 = torch.tensor([[0.0], [1.0], [3.0], [-1.0]], dtype=DOUBLE)

    def event(t, y):
        return (y[:, 0] - 2.5) * (y[:, 0] - 5) * torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=DOUBLE)

    times, path = own(unit, y0, start(), event, **way)
    assert torch.allclose(times, torch.tensor([2.5, 1.5, 2.0, 3.5], dtype=DOUBLE), rtol=0, atol=1e-12)
    assert torch.allclose(path[1, :, 0], torch.tensor([2.5, 2.5, 5.0, 2.5], dtype=DOUBLE), rtol=0, atol=1e-12)
    back, _ = own(unit, 7 + y0, start(0.0, 1.0, 2.0, 3.0), event, reverse_time=True, **way)
    assert torch.allclose(back, torch.tensor([-2.0, -2.0, -3.0, 2.0], dtype=DOUBLE), rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", WAYS, ids=name)
def test_a_sample_whose_event_is_at_its_start_stays_there(way):
    y0 = torch.tensor([[1.0], [0.5], [2.0]], dtype=DOUBLE, requires_grad=True)
    times, path = own(decay, y0, start(3.0, 4.0, 5.0), lambda t, y: y[:, 0] - 0.5, **way)
    assert times[1] == 4 and path[1, 1] == 0.5
    assert torch.allclose(
        times.detach(), torch.tensor([3 + math.log(2), 4, 5 + math.log(4)]).double(), atol=1e-8
    )
    # d(ln 2y₀)/dy₀ = 1/y₀, also where the event is now.
    (dt,) = torch.autograd.grad(times.sum(), y0)
    assert torch.allclose(dt, 1 / y0, rtol=1e-7)
    every, _ = own(decay, 0 * Y0, start(), lambda t, y: y[:, 0], **way)
    assert every.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("rate", [1e-13, -1e-30, -1e-200])
def test_a_slow_event_keeps_its_gradient(rate):
    y0 = torch.zeros(2, 1, dtype=DOUBLE, requires_grad=True)
    times, _ = own(unit, y0, start(), lambda t, y: rate * (y[:, 0] - 1))
    assert torch.allclose(times, torch.ones(2).double(), rtol=0, atol=1e-12)
    assert torch.allclose(torch.autograd.grad(times.sum(), y0)[0], -torch.ones_like(y0), atol=1e-9)


def test_relu_has_the_gradient_of_what_it_cuts_and_a_comparison_none():
    """Sample 0 has an event that passes through 0, sample 1 relu, sample 2 a comparison."""
    y0 = torch.tensor([[1.0], [2.0], [3.0]], dtype=DOUBLE, requires_grad=True)

    def event(t, y):
        c = y[:, 0] - 0.5
        return torch.stack([c[0], torch.relu(c[1]), torch.sign(c[2]).detach()])

    times, path = own(decay, y0, start(), event, rtol=1e-10, atol=1e-12)
    assert torch.allclose(times, torch.log(2 * y0[:, 0]), rtol=0, atol=1e-8)
    (dt,) = torch.autograd.grad(times[:2].sum(), y0, retain_graph=True)
    assert torch.allclose(dt[:, 0], torch.tensor([1.0, 0.5, 0.0], dtype=DOUBLE), rtol=0, atol=1e-8)
    (dy,) = torch.autograd.grad(path[1, :2].sum(), y0, retain_graph=True)
    assert torch.allclose(dy, torch.zeros_like(dy), rtol=0, atol=1e-8)
    for value in (times.sum(), path[1].sum()):
        with pytest.raises(ValueError, match=r"no gradient: event_fn does not change.*a comparison"):
            value.backward(retain_graph=True)


@pytest.mark.parametrize("way", WAYS[::3], ids=name)
def test_a_field_may_take_gradients_itself(way):
    """The oscillator H = (p² + q²)/2 by Hamilton's equations: A cos t is 1/2 at arccos(1/2A)."""

    def field(t, y):
        (grad,) = torch.autograd.grad(y.square().sum() / 2, y, create_graph=True)
        return torch.stack([grad[:, 1], -grad[:, 0]], 1)

    y0 = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=DOUBLE, requires_grad=True)
    times, _ = own(field, y0, start(), lambda t, y: y[:, 0] - 0.5, **way)
    assert torch.allclose(times, torch.arccos(0.5 / y0[:, 0]), rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at the first jvp
@pytest.mark.parametrize("way", WAYS[::3], ids=name)
def test_transforms_of_torch_func(way):
    def times(y0):
        return own(decay, y0, start(), lambda t, y: y[:, 0] - 0.5, **way)[0]

    exact = torch.diag(1 / Y0[:, 0])
    for jacobian in (torch.func.jacrev(times)(Y0), torch.func.jacfwd(times)(Y0)):
        assert torch.allclose(jacobian[:, :, 0], exact, rtol=0, atol=1e-7)
    with pytest.raises(TypeError, match=r"vmap hides.*per_sample=True"):
        torch.func.vmap(times)(Y0[None])


def test_a_complex_state_and_a_state_of_several_dimensions():
    """y' = i y turns: its real part falls through 0 after π/2 less the start's angle."""
    angle = torch.tensor([0.0, 0.3, -1.0], dtype=DOUBLE)
    y0 = torch.polar(torch.ones(3, dtype=DOUBLE), angle)[:, None, None].expand(3, 2, 2).clone()
    times, _ = own(lambda t, y: 1j * y, y0, start(), lambda t, y: y[:, 0, 1].real > 0, rtol=1e-10, atol=1e-12)
    assert torch.allclose(times, math.pi / 2 - angle, rtol=0, atol=1e-8)


@pytest.mark.parametrize("way", [dict(method="rk4", step_size=1.1), dict(rtol=1e-2, atol=1e-2)], ids=name)
def test_at_a_maximum_the_steps_own_states_decide(way):
    """Levels from below to above the first maximum: states between are looked for on a cubic, which is beside
    the steps. Each sample's event is that of its single solve, and some reach their level a turn later."""
    level = torch.linspace(0.9, 1.005, 60, dtype=DOUBLE)

    def field(t, y):
        return torch.stack([y[..., 1] + 0.02 * y[..., 0], -y[..., 0]], -1)

    y0 = torch.tensor([0.0, 0.95], dtype=DOUBLE)
    times, path = own(field, y0.expand(60, 2), start(), lambda t, y: y[:, 0] - level, **way)
    for i in range(60):
        time, y = odeint_event(field, y0, start()[0], event_fn=lambda t, y, c=level[i]: y[0] - c, **way)
        assert abs(time - times[i]) < 1e-10 and (y[1] - path[1, i]).abs().max() < 1e-10
    assert (times < 2).any() and (times > 7).any()


@pytest.mark.parametrize(
    "event, error, message",
    [
        (lambda t, y: y, ValueError, r"shape \(2,\), got \(2, 1\)"),
        (lambda t, y: y.sum(), ValueError, r"shape \(2,\), got \(\)"),
        (lambda t, y: y[:1, 0], ValueError, r"shape \(2,\), got \(1,\)"),
        (lambda t, y: y[:, 0] - t, ValueError, r"shape \(2,\), got \(2, 2\)"),
        (lambda t, y: [1.0, 2.0], TypeError, "must return a tensor, got list"),
        (lambda t, y: y[:, 0] + 0j, TypeError, "real numbers.*complex128"),
        (lambda t, y: torch.sqrt(y[:, 0] - 0.9), ValueError, "NaN at t=0.*sample 0"),
        (lambda t, y: y[:, 0] / 0, ValueError, "finite at the start"),
        # As many numbers as samples, but after the first step.
        (lambda t, y: y[:, 0] if t[0] == 0 else y, ValueError, r"shape \(2,\), got \(2, 1\)"),
    ],
)
def test_bad_events_are_refused_with_what_came(event, error, message):
    with pytest.raises(error, match=message):
        own(decay, torch.ones(2, 1, dtype=DOUBLE), start(), event)


def test_bad_starts_are_refused():
    for t0, message in [
        (torch.zeros(3), "2 samples, t 3 columns"),
        (torch.tensor([0.0, math.nan]), "finite"),
        (torch.zeros(2, 1), "one a sample"),
        (0.0, "one a sample"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            own(decay, torch.ones(2, 1), t0, lambda t, y: y[:, 0] - 0.5)
