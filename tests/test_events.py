"""Events: times in closed form, their gradients, every way to step, and what is refused."""

import math

import pytest
import torch
import torchdiffeq
from torch import nn

import resode
from resode import METHODS, odeint, odeint_adjoint, odeint_event

DOUBLE = torch.float64
EXPLICIT = [name for name, tableau in METHODS.items() if tableau.explicit]


def scalar(value, **kwargs):
    return torch.tensor(value, dtype=DOUBLE, **kwargs)


def steps(method, **more):
    return dict(rtol=1e-8, atol=1e-8) if METHODS[method].adaptive else dict(step_size=more.get("h", 0.01))


class Fall(nn.Module):
    """Height and speed under gravity; from h at rest the ground is reached after √(2h/g)."""

    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(scalar(9.81))

    def forward(self, t, y):
        return torch.stack([y[1], -self.g])


@pytest.mark.parametrize("method", EXPLICIT)
def test_a_fall_ends_on_the_ground(method):
    """The motion is quadratic in t, so every method of order 2 is exact, and the event's time to rounding."""
    t, y = odeint(Fall(), torch.stack([scalar(10.0), scalar(0.0)]), scalar([1.0, 2.0]),
                  event_fn=lambda t, y: y[0], method=method, **steps(method, h=0.005))  # fmt: skip
    expected = 1 + math.sqrt(20 / 9.81)
    assert t.ndim == 0 and t.dtype == DOUBLE and y.shape == (2, 2)
    assert t.item() == pytest.approx(expected, abs=0.01 if method == "euler" else 1e-12)
    assert y[1, 0].item() == pytest.approx(0, abs=1e-12)
    assert torch.equal(y[0].detach(), scalar([10.0, 0.0]))


@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "rk4"])
def test_gradients_of_the_events_time_and_state(method, interface):
    """τ = √(2h/g): ∂τ/∂h = 1/√(2gh), ∂τ/∂g = −τ/(2g), ∂τ/∂t0 = 1; the speed −√(2gh): ∂/∂h = −√(g/2h)."""
    fall, h, t0 = Fall(), scalar(10.0, requires_grad=True), scalar(0.5, requires_grad=True)
    y0 = torch.stack([h, scalar(0.0)])
    kw = steps(method)
    t, y = odeint_event(
        fall, y0, t0, event_fn=lambda t, y: y[0], odeint_interface=interface, method=method, **kw
    )
    tau, g = math.sqrt(20 / 9.81), 9.81
    grads = torch.autograd.grad(t, [h, fall.g, t0], retain_graph=True)
    assert [x.item() for x in grads] == pytest.approx([1 / math.sqrt(20 * g), -tau / (2 * g), 1.0], abs=1e-6)
    dh, dg = torch.autograd.grad(y[-1, 1], [h, fall.g], retain_graph=True)
    assert [dh.item(), dg.item()] == pytest.approx([-math.sqrt(g / 20), -math.sqrt(5 / g)], abs=1e-6)
    (ground,) = torch.autograd.grad(y[-1, 0], [h])
    assert ground.item() == pytest.approx(0, abs=1e-7), "the height at the event stays 0"


def test_gradcheck_of_the_whole_event():
    def run(y0, t0, level, rate):
        def func(t, y):
            return torch.stack([y[1], -rate * torch.sin(y[0]) - 0.1 * torch.cos(t)])

        return odeint_event(
            func, y0, t0, event_fn=lambda t, y: y[0] ** 2 - level * (1 + 0.1 * t), rtol=1e-10, atol=1e-10
        )

    inputs = [x.requires_grad_() for x in (scalar([0.2, 1.5]), scalar(0.1), scalar(0.7), scalar(0.9))]
    assert torch.autograd.gradcheck(run, inputs, eps=1e-5, atol=1e-6)
    assert torch.autograd.gradgradcheck(run, inputs, eps=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kw", [dict(rtol=1e-11, atol=1e-12), dict(method="rk4", step_size=0.01)], ids=str)
def test_second_derivatives_through_an_event(kw, per_sample):
    """x' = −x from x0 is 1/2 at τ = ln(2 x0), where z' = 2z from 1 is (2 x0)²: −1/x0² and 8, which were both 0."""

    def run(x0):
        y0 = torch.stack([x0, torch.ones_like(x0)])
        y0 = y0.expand(2, 2) if per_sample else y0
        t, y = odeint_event(
            lambda t, y: y * scalar([-1.0, 2.0]),
            y0,
            scalar(0.0),
            event_fn=lambda t, y: y[..., 0] - 0.5,
            per_sample=per_sample,
            **kw,
        )
        return t.sum(), y[-1, ..., 1].sum()

    x0, n = scalar(1.5), 2 if per_sample else 1
    time, state = (lambda x: run(x)[0]), (lambda x: run(x)[1])
    for f, right in ((time, -n / 1.5**2), (state, 8 * n)):
        assert torch.autograd.functional.hessian(f, x0).item() == pytest.approx(right, abs=1e-5)
        assert torch.func.jacrev(torch.func.jacrev(f))(x0).item() == pytest.approx(right, abs=1e-5)


def test_an_event_needs_no_derivative_where_no_gradient_is_asked_for():
    """torch has none of heaviside, and numpy gives none: as in torchdiffeq, both end a solve all the same."""
    zero = scalar(0.0)
    for event in (
        lambda t, y: torch.heaviside(y[0] - 0.5, zero) - 0.5,
        lambda t, y: torch.from_numpy(y.numpy() - 0.5),
    ):
        t, _ = odeint_event(lambda t, y: -y, scalar([1.0]), zero, event_fn=event)
        assert t.item() == pytest.approx(math.log(2), abs=1e-7)
    start = scalar([1.0]).requires_grad_()
    t, _ = odeint_event(
        lambda t, y: -y, start, zero, event_fn=lambda t, y: torch.heaviside(y[0] - 0.5, zero) - 0.5
    )
    with pytest.raises(ValueError, match="no gradient"):
        t.backward()


@pytest.mark.parametrize("options", [{}, {"method": "rk4", "step_size": 0.01}])
def test_back_in_time(options):
    """y' = y from 1 at t = 2 reaches 1/2 at 2 − ln 2."""
    t, y = odeint_event(lambda t, y: y, scalar([1.0]), scalar([2.0]), event_fn=lambda t, y: y - 0.5,
                        reverse_time=True, **options)  # fmt: skip
    assert t.item() == pytest.approx(2 - math.log(2), abs=1e-8)
    assert y[-1].item() == pytest.approx(0.5, abs=1e-12)


def test_tuples_and_several_events_the_first_of_which_counts():
    y0 = (scalar([0.0]), scalar([1.0]))

    def func(t, y):
        return (y[1], -y[0])

    def event(t, y):
        return torch.cat([y[1], y[0] - 0.5])  # cos t = 0 at π/2, sin t = 1/2 at π/6

    t, (s, c) = odeint_event(func, y0, scalar(0.0), event_fn=event)
    assert t.item() == pytest.approx(math.pi / 6, abs=1e-8)
    assert s.shape == c.shape == (2, 1)
    assert (s[-1].item(), c[-1].item()) == pytest.approx((0.5, math.sqrt(0.75)), abs=1e-8)


def test_an_event_at_the_start_ends_there():
    for options in ({}, {"method": "rk4", "step_size": 0.1}):
        t, y = odeint(
            lambda t, y: y, scalar([1.0]), scalar([0.3, 1.0]), event_fn=lambda t, y: y - 1, **options
        )
        assert t.item() == 0.3 and y.tolist() == [[1.0], [1.0]]
        y0 = scalar([1.0], requires_grad=True)  # y' = y reaches 1 at t0 − ln y0, now or a little later
        t, _ = odeint_event(lambda t, y: y, y0, scalar(0.3), event_fn=lambda t, y: y - 1, **options)
        assert t.item() == 0.3 and torch.autograd.grad(t, y0)[0].item() == pytest.approx(-1, abs=1e-9)


def test_a_start_so_late_that_1_is_below_its_rounding():
    late = torch.tensor(1e9)
    for back in (False, True):
        t, _ = odeint_event(lambda t, y: torch.ones_like(y) / 1e9, torch.zeros(1), late, reverse_time=back,
                            event_fn=lambda t, y: y.abs() - 1)  # fmt: skip
        assert t.item() == pytest.approx(0 if back else 2e9, abs=1e3)


def test_an_event_that_only_knows_its_sign_and_an_event_in_time():
    t, y = odeint(lambda t, y: torch.ones_like(y), scalar([0.0]), scalar([0.0, 1.0]),
                  event_fn=lambda t, y: torch.sign(y - 0.7))  # fmt: skip
    assert t.item() == pytest.approx(0.7, abs=1e-12)
    t, y = odeint(lambda t, y: y, torch.ones(1), torch.tensor([0.0, 1.0]), event_fn=lambda t, y: t - 0.25)
    assert y.dtype == torch.float32 and t.item() == pytest.approx(0.25, abs=1e-6)
    assert y[-1].item() == pytest.approx(math.exp(0.25), abs=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("options", [{}, {"step_size": 0.013}, {"step_size": 0.013, "interp": "cubic"}])
def test_agrees_with_torchdiffeq(options, reverse):
    ours, theirs = ("rk4_38", "rk4") if options else ("dopri5", "dopri5")
    fall, results = Fall(), []
    for library, method in [(resode, ours), (torchdiffeq, theirs)]:
        y0 = scalar([10.0, 2.0], requires_grad=True)
        t, y = library.odeint_event(fall, y0, scalar(0.2), event_fn=lambda t, y: y[0], reverse_time=reverse,
                                    method=method, options=options or None, atol=1e-9, rtol=1e-9)  # fmt: skip
        grads = torch.autograd.grad(2 * t + y[-1].sum(), [y0, fall.g])
        results.append(torch.cat([t.detach()[None], y[-1].detach(), grads[0], grads[1][None]]))
    assert torch.allclose(*results, rtol=0, atol=2e-7)


def test_a_ball_that_bounces_loses_a_quarter_of_its_height():
    """Every bounce keeps half the speed: apexes 10, 10/4, …; the n-th flight takes 2 v_n / g."""
    fall, y, t = Fall(), scalar([10.0, 0.0]), scalar(0.0)
    speed, times = math.sqrt(2 * 9.81 * 10), []
    for _ in range(3):
        t, path = odeint_event(fall, y, t, event_fn=lambda t, y: y[0])
        y = torch.stack([path[-1, 0].abs() + 1e-12, -path[-1, 1] / 2])
        times.append(t.item())
    flights = [speed / 9.81, *(2 * speed / 2**n / 9.81 for n in (1, 2))]
    assert times == pytest.approx([sum(flights[: i + 1]) for i in range(3)], abs=1e-7)


def test_statistics_and_torchdiffeqs_methods():
    fall, y0 = Fall(), scalar([10.0, 0.0])
    (t, _), stats = odeint_event(fall, y0, scalar(0.0), event_fn=lambda t, y: y[0], return_stats=True)
    assert stats.n_steps == stats.n_accepted + stats.n_rejected > 0 and stats.nfe > 6 * stats.n_accepted
    assert t.item() == pytest.approx(math.sqrt(20 / 9.81), abs=1e-12)
    t, _ = odeint_event(fall, y0, scalar(0.0), event_fn=lambda t, y: y[0], method="adaptive_heun")
    assert t.item() == pytest.approx(math.sqrt(20 / 9.81), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(t=scalar([0.0, 1.0, 2.0])), ValueError, "t must hold two times.*got 3"),
        (dict(t=scalar([0.0])), ValueError, "two times.*got 1"),
        (dict(event_fn=lambda t, y: 1.0), TypeError, "must return a tensor, got float"),
        (dict(event_fn=lambda t, y: y * math.nan), ValueError, "finite and not empty at t.0.*t=0"),
        (dict(event_fn=lambda t, y: torch.sqrt(y - 0.9)), ValueError, "must return numbers, got NaN at t=0"),
        (dict(per_sample=True, y0=torch.ones(2, 1)), ValueError, "one number a sample"),
        (dict(method="rk4"), ValueError, "rk4 takes fixed steps: to find an event it needs step_size"),
        (dict(method="rk4", n_steps=3), ValueError, "needs step_size"),
        (dict(method="scipy_solver"), ValueError, "can't stop at an event.*adaptive_heun"),
        (dict(event_fn=lambda t, y: y + 1, max_steps=50), resode.MaxStepsReached, "without an event. Check event_fn's sign"),
        (dict(event_fn=lambda t, y: y + 1, method="rk4", step_size=0.1, max_steps=50), resode.MaxStepsReached,
         "50 steps of 0.1 met no event; they ended at t=5"),
        (dict(func=lambda t, y: y * y, event_fn=lambda t, y: y + 1, method="euler", step_size=0.1),
         resode.NonFiniteState, "before an event"),
    ],
)  # fmt: skip
def test_wrong_arguments_and_missing_events_say_the_rule(change, error, message):
    arguments = dict(
        func=lambda t, y: -y, y0=scalar([1.0]), t=scalar([0.0, 1.0]), event_fn=lambda t, y: y - 0.5
    )
    with pytest.raises(error, match=message):
        odeint(**{**arguments, **change})
