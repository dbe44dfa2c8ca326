"""Each sample its own times and its own event: one call equal to single solves, and to closed forms."""

import math

import pytest
import torch
from problems import van_der_pol

from resode import odeint, odeint_adjoint, odeint_event

DOUBLE = torch.float64
B = 256
WAYS = [
    dict(rtol=1e-6, atol=1e-6),
    dict(rtol=1e-6, atol=1e-6, method="dopri8"),
    dict(rtol=1e-5, atol=1e-5, method="fehlberg45"),
    dict(method="rk4", step_size=0.1),
    dict(method="midpoint", n_steps=7),
    dict(rtol=1e-6, atol=1e-6, gradient="checkpoint"),
    dict(method="rk4", step_size=0.1, gradient="checkpoint"),
]


def name(way):
    return "-".join(str(v) for v in way.values() if isinstance(v, str | int)) or "dopri5"


def uniform(*shape, low=0.0, high=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=DOUBLE) * (high - low) + low


def driven(t, y):
    """Van der Pol's oscillator, pushed by a sine of the time: it matters when a sample starts."""
    push = torch.sin(t) * torch.tensor([0.0, 1.0], dtype=DOUBLE)
    return van_der_pol(t, y, 2.0) + push


def driven_float(t, y):
    return driven(t.double(), y.double()).float()


def own_times(n):
    """Starts and spans of their own; one interval of length 0, and outputs that repeat."""
    start, span = uniform(n, seed=1), uniform(n, low=0.0, high=4.0, seed=2)
    span[3] = 0.0
    t = start + span * torch.linspace(0, 1, 6, dtype=DOUBLE)[:, None]
    t[3] = t[2]
    return t


def test_256_intervals_in_one_call_equal_256_single_solves():
    y0, t = uniform(B, 2, low=-2, high=2), own_times(B)
    together, stats = odeint(driven, y0, t, per_sample=True, rtol=1e-6, atol=1e-6, return_stats=True)
    for i in range(B):
        alone, one = odeint(driven, y0[i], t[:, i], rtol=1e-6, atol=1e-6, return_stats=True)
        assert (together[:, i] - alone).abs().max() < 1e-9
        assert one.n_steps == stats.n_steps[i]
    assert stats.n_steps.max() > 3 * stats.n_steps[stats.n_steps > 0].min(), "the samples should differ"


@pytest.mark.parametrize("way", WAYS, ids=name)
@pytest.mark.parametrize("sign", [1, -1])
def test_states_and_gradients_equal_single_solves_forward_and_back(way, sign):
    n = 6
    y0, t, weight = uniform(n, 2, low=-2, high=2), own_times(n), uniform(6, n, 2, seed=4)

    def field(t, y):
        return sign * driven(sign * t, y)

    def solve(y0, t, weight, **how):
        y0, t = y0.clone().requires_grad_(), (sign * t).requires_grad_()
        y = odeint(field, y0, t, **how)
        return y.detach(), *torch.autograd.grad((y * weight).sum(), (y0, t))

    together = solve(y0, t, weight, per_sample=True, **way)
    alone = {k: v for k, v in way.items() if k != "gradient"}
    for i in range(n):
        y, grad_y0, grad_t = solve(y0[i], t[:, i], weight[:, i], **alone)
        assert torch.allclose(together[0][:, i], y, rtol=0, atol=1e-9)
        assert torch.allclose(together[1][i], grad_y0, rtol=0, atol=1e-8)
        assert torch.allclose(together[2][:, i], grad_t, rtol=0, atol=1e-8)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_steps_take_own_times():
    y0, t = uniform(5, 2, low=-2, high=2), own_times(5)
    kw = dict(per_sample=True, rtol=1e-6, atol=1e-6)
    assert torch.allclose(odeint(driven, y0, t, compile=True, **kw), odeint(driven, y0, t, **kw), atol=1e-9)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own look at times
@pytest.mark.parametrize("kw", [dict(n_steps=3), dict(step_size=0.4)], ids=str)
@pytest.mark.parametrize("dtype, tol", [(DOUBLE, 1e-12), (torch.float32, 1e-5)])
def test_compiled_fixed_steps_take_own_times_too(kw, dtype, tol, monkeypatch):
    """A fall back to eager steps would warn, which is an error here."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, fullgraph=True, backend="eager"))
    t, found = own_times(5).to(dtype), []
    for compile in (True, False):
        y0, moved = uniform(5, 2, low=-2, high=2).to(dtype).requires_grad_(), t.clone().requires_grad_()
        y, stats = odeint(driven_float if dtype == torch.float32 else driven, y0, moved, method="rk4", per_sample=True,
                          compile=compile, return_stats=True, **kw)  # fmt: skip
        assert y.dtype == dtype
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (y0, moved)), stats.nfe))
    assert all(torch.allclose(a, b, rtol=0, atol=100 * tol) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("way", [dict(rtol=1e-9, atol=1e-9), dict(method="rk4", n_steps=50)], ids=name)
def test_repeated_and_equal_times_of_one_solve(way):
    """y' = −y: e^(t₀ − t); the gradient of y(t_j) goes to t_j and t_0, not to the twin of t_j."""
    t = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0], dtype=DOUBLE, requires_grad=True)
    y0 = torch.ones(2, dtype=DOUBLE)
    y = odeint(lambda t, y: -y, y0, t, **way)
    assert torch.allclose(y[:, 0], torch.exp(1 - t.detach()), rtol=1e-7)
    (grad,) = torch.autograd.grad(y[3, 0], t)
    assert torch.allclose(grad, math.exp(-1) * torch.tensor([1.0, 0, 0, -1, 0], dtype=DOUBLE), atol=1e-7)
    still = odeint(lambda t, y: -y, y0, torch.ones(3, dtype=DOUBLE), **way)
    assert torch.equal(still, y0.expand(3, 2))


def fall(t, y):
    """Free fall with a drag that is linear in the speed, on (height, speed)."""
    return torch.stack([y[..., 1], -9.81 - 0.3 * y[..., 1]], -1)


def hits(t, y):
    """A floor that rises with the time."""
    return y[..., 0] - 0.1 * t.reshape(y.shape[:-1])


def test_256_events_in_one_call_equal_256_single_solves():
    y0 = torch.stack([uniform(B, low=1, high=30), uniform(B, low=-5, high=5, seed=1)], 1)
    t0 = uniform(B, seed=2)
    times, path = odeint_event(fall, y0, t0, event_fn=hits, per_sample=True, rtol=1e-8, atol=1e-8)
    assert times.shape == (B,) and path.shape == (2, B, 2) and torch.equal(path[0], y0)
    for i in range(B):
        time, states = odeint_event(fall, y0[i], t0[i], event_fn=hits, rtol=1e-8, atol=1e-8)
        assert abs(time - times[i]) < 1e-9 and (states[1] - path[1, i]).abs().max() < 1e-9


@pytest.mark.parametrize("way", [dict(rtol=1e-10, atol=1e-10), dict(method="rk4", step_size=0.01)], ids=name)
def test_event_times_and_their_gradients_are_those_of_the_closed_form(way):
    """y' = −r y from y0 reaches c at t0 + ln(y0/c)/r: derivatives 1 for t0, 1/(r y0) for y0, −ln(y0/c)/r² for r."""
    y0 = torch.tensor([[2.0], [3.0], [7.0], [1.0]], dtype=DOUBLE, requires_grad=True)
    rate = torch.tensor([[1.0], [0.5], [2.0], [1.0]], dtype=DOUBLE, requires_grad=True)
    t0 = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=DOUBLE, requires_grad=True)
    level = torch.ones(4, dtype=DOUBLE, requires_grad=True)
    times, path = odeint_event(lambda t, y: -rate * y, y0, t0, event_fn=lambda t, y: y[:, 0] - level,
                               per_sample=True, **way)  # fmt: skip
    y, r = y0.detach()[:, 0], rate.detach()[:, 0]
    assert torch.allclose(times, t0 + torch.log(y) / r, rtol=0, atol=1e-8)
    assert torch.allclose(path[1, :, 0], level, rtol=0, atol=1e-10)
    grads = torch.autograd.grad(times.sum(), (y0, rate, t0, level), retain_graph=True)
    expected = (1 / (r * y), -torch.log(y) / r**2, torch.ones(4), -1 / r)
    for grad, exact in zip(grads, expected, strict=True):
        assert torch.allclose(grad.reshape(-1), exact.to(DOUBLE), rtol=0, atol=1e-7)
    # The state at the event is the level, whatever the start: its gradient goes to the level alone.
    grads = torch.autograd.grad(path[1].sum(), (y0, rate, t0, level))
    for grad, exact in zip(grads, (0.0, 0.0, 0.0, 1.0), strict=True):
        assert torch.allclose(grad.reshape(-1), torch.full((4,), exact, dtype=DOUBLE), rtol=0, atol=1e-7)


@pytest.mark.parametrize("event", [lambda t, y: y[:, 0] > 0.5, lambda t, y: (y[:, 0] - 0.5) ** 3])
def test_comparisons_and_flat_roots_are_found_to_rounding(event):
    y0 = torch.tensor([[1.0], [2.0], [30.0]], dtype=DOUBLE)
    times, _ = odeint_event(
        lambda t, y: -y, y0, torch.zeros(1, dtype=DOUBLE), event_fn=event, per_sample=True
    )
    # Of a triple root in float64, y can be known to (1e-16)^(1/3) · … only; here it is exact at y = 1/2.
    assert torch.allclose(times, torch.log(2 * y0[:, 0]), rtol=0, atol=2e-6)


def test_a_sample_without_an_event_is_named():
    import resode

    y0 = torch.tensor([[1.0], [-1.0]], dtype=DOUBLE)
    with pytest.raises(resode.MaxStepsReached, match="sample 1"):
        odeint_event(lambda t, y: -y, y0, torch.zeros(1), event_fn=lambda t, y: y[:, 0] - 0.5, per_sample=True,
                     max_steps=50)  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(t=torch.tensor([[0.0, 0.0], [1.0, -1.0]])), "sample 0 goes forward, sample 1 back"),
        (dict(t=torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.5]])), r"t\[1\]=1 of sample 1"),
        (dict(t=torch.zeros(2, 3)), "the state has 2 samples, t 3 columns"),
        (dict(t=torch.zeros(2, 2), per_sample=False), "one-dimensional"),
        (dict(t=torch.zeros(2, 2), options={"jump_t": [0.5]}), "jump_t"),
        (dict(event_fn=lambda t, y: y), r"shape \(2,\), got \(2, 1\)"),
        (dict(event_fn=lambda t, y: y[:, 0] - t), r"shape \(2,\), got"),
        (dict(event_fn=lambda t, y: y[:, 0] * math.nan), "NaN"),
        (dict(event_fn=lambda t, y: y[:, 0], method="rk4"), "needs step_size"),
    ],
)
def test_bad_input_is_refused_with_what_came(change, message):
    problem = dict(t=torch.tensor([0.0, 1.0]), per_sample=True) | change
    with pytest.raises(ValueError, match=message):
        odeint(lambda t, y: -y, torch.ones(2, 1), **problem)


def test_the_adjoint_has_one_time_for_all():
    field = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="one time for all"):
        odeint_adjoint(
            lambda t, y: field(y), torch.ones(2, 1), torch.zeros(2, 2), per_sample=True, adjoint_params=()
        )
