"""Faults that users of solvers report, each with the right value from a closed form."""

import gc
import importlib
import math
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian as autograd_hessian
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import resode
from resode import ODEBlock, ResidualStack, odeint, odeint_adjoint, odeint_event, solve_ivp
from resode.solve.events import roots

DOUBLE = torch.float64
ONE = torch.ones(1, dtype=DOUBLE)
SPAN = torch.tensor([0.0, 1.0], dtype=DOUBLE)
E1 = math.exp(-1)


def scalar(value, **kwargs):
    return torch.tensor(value, dtype=DOUBLE, **kwargs)


def decay(t, y):
    return -y


def unit(t, y):
    return torch.ones_like(y)


def steps(method):
    return (
        dict(method=method, step_size=0.01)
        if method == "rk4"
        else dict(method=method, rtol=1e-10, atol=1e-12)
    )


# Events

SIGNS = {
    "greater": lambda t, y: y[0] > 0.5,
    "less": lambda t, y: y[0] < 0.5,
    "integer": lambda t, y: (y[0] > 0.5).long(),
    "relu": lambda t, y: torch.relu(y[0] - 0.5),
    "clamp": lambda t, y: (y[0] - 0.5).clamp(min=0),
    "step": lambda t, y: torch.sign(y[0] - 0.5),
}


@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
@pytest.mark.parametrize("event", SIGNS.values(), ids=SIGNS)
def test_an_event_is_found_by_its_sign_alone(event, method, interface):
    """y' = −y from 1 is 1/2 at ln 2, however flat the function is before or after."""
    kw = dict(adjoint_params=()) if interface is odeint_adjoint else {}
    t, y = odeint_event(
        decay, ONE, scalar(0.0), event_fn=event, odeint_interface=interface, **steps(method), **kw
    )
    assert t.item() == pytest.approx(math.log(2), abs=1e-9) and y[-1].item() == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("event", SIGNS.values(), ids=SIGNS)
def test_so_it_is_in_solve_ivp(event):
    s = solve_ivp(decay, (0, 5), ONE, rtol=1e-10, atol=1e-12, events=event)
    assert s.t_events[0].tolist() == pytest.approx([math.log(2)], abs=1e-8)


@pytest.mark.parametrize("power", [1, 3, 5, 9])
def test_a_zero_of_higher_order(power):
    event = lambda t, y: (y[0] - 2.5) ** power  # noqa: E731
    y0 = scalar([0.0], requires_grad=True)
    t, y = odeint_event(unit, y0, scalar(0.0), event_fn=event)
    # (y − 2.5)⁹ is below the smallest number's square root only within 1e-17 of the zero.
    assert t.item() == pytest.approx(2.5, abs=1e-12)
    # An earlier start comes earlier by as much: the zero of order p has the slope of that of order 1.
    dt, dy = torch.autograd.grad(t, y0, retain_graph=True)[0], torch.autograd.grad(y[-1].sum(), y0)[0]
    assert dt.item() == pytest.approx(-1, abs=1e-6) and dy.item() == pytest.approx(0, abs=1e-6)
    assert solve_ivp(unit, (0, 5), y0.detach(), events=event).t_events[0].item() == pytest.approx(
        2.5, abs=1e-12
    )


@pytest.mark.parametrize("rate", [1e-13, -1e-13, 1e-30, -1e-200, 1.0])
def test_a_slow_event_keeps_the_sign_of_its_gradient(rate):
    """On y' = 1, y = 1 is reached one later for each unit of y0, whatever the event is multiplied by."""
    y0 = scalar([0.0], requires_grad=True)
    t, _ = odeint_event(unit, y0, scalar(0.0), event_fn=lambda t, y: rate * (y - 1))
    assert t.item() == pytest.approx(1, abs=1e-12)
    assert torch.autograd.grad(t, y0)[0].item() == pytest.approx(-1, abs=1e-9)


def test_relu_has_the_gradient_of_what_it_cuts():
    y0 = ONE.clone().requires_grad_()
    t, y = odeint_event(
        decay, y0, scalar(0.0), event_fn=lambda t, y: torch.relu(y - 0.5), rtol=1e-10, atol=1e-12
    )
    dt, dy = torch.autograd.grad(t, y0, retain_graph=True)[0], torch.autograd.grad(y[-1].sum(), y0)[0]
    assert dt.item() == pytest.approx(1, abs=1e-8) and dy.item() == pytest.approx(0, abs=1e-8)  # t = ln(2 y0)


def test_a_comparison_has_no_gradient_and_says_so_when_it_is_asked_for():
    t, y = odeint_event(decay, ONE.clone().requires_grad_(), scalar(0.0), event_fn=SIGNS["greater"])
    for value in (t, y[-1].sum()):
        with pytest.raises(ValueError, match=r"no gradient: event_fn does not change.*a comparison"):
            value.backward(retain_graph=True)


@pytest.mark.parametrize(
    "kw", [{}, dict(method="rk4", step_size=4.0), dict(method="dopri8"), dict(method="bosh3")]
)
def test_of_several_zeros_in_a_step_the_first_is_taken(kw):
    """One step holds both zeros of (y − 2.5)(y − 5), so that the event has one sign at its ends."""
    event = lambda t, y: (y[0] - 2.5) * (y[0] - 5)  # noqa: E731
    t, y = odeint_event(unit, 0 * ONE, scalar(0.0), event_fn=event, **kw)
    assert t.item() == pytest.approx(2.5, abs=1e-12) and y[-1].item() == pytest.approx(2.5, abs=1e-12)
    t, _ = odeint_event(unit, 7 * ONE, scalar(7.0), event_fn=event, reverse_time=True, **kw)
    assert t.item() == pytest.approx(5, abs=1e-12)


def test_solve_ivp_lists_all_zeros_in_order_and_by_direction():
    def event(t, y):
        return (y[0] - 2.5) * (y[0] - 5) * (y[0] - 6)  # negative at 0: rises, falls, rises

    found = {}
    for direction in (-1, 0, 1):
        event.direction = direction
        found[direction] = solve_ivp(unit, (0, 10), 0 * ONE, events=event).t_events[0].tolist()
    assert found[0] == pytest.approx([2.5, 5, 6], abs=1e-12)
    assert found[1] == pytest.approx([2.5, 6], abs=1e-12) and found[-1] == pytest.approx([5], abs=1e-12)
    event.direction, event.terminal = 0, 2
    s = solve_ivp(unit, (0, 10), 0 * ONE, events=event)
    assert s.status == 1 and s.t[-1].item() == pytest.approx(5, abs=1e-12)


def test_an_event_that_is_zero_at_the_start():
    """`odeint_event` ends there, as torchdiffeq; `solve_ivp` counts it by the way it goes on, as scipy."""
    t, y = odeint_event(unit, 0 * ONE, scalar(0.0), event_fn=lambda t, y: y)
    assert t.item() == 0 and y.tolist() == [[0], [0]]

    def event(t, y):
        return y[0] * (y[0] - 3)  # falls from 0, rises through 3

    for direction, times in [(0, [0, 3]), (-1, [0]), (1, [3])]:
        event.direction = direction
        assert solve_ivp(unit, (0, 5), 0 * ONE, events=event).t_events[0].tolist() == pytest.approx(times)


def test_the_search_takes_as_many_evaluations_as_halving_at_most():
    """An interval of 1 holds 2⁵² numbers around 1/2, so 52 halvings and one more; a smooth zero takes some ten."""
    functions = {
        "jump": lambda s: 1.0 if s < 0.3 else -1.0,
        "flat": lambda s: max(0.3 - s, 0.0),
        "ninth": lambda s: (0.3 - s) ** 9,
        "infinite": lambda s: math.inf if s < 0.3 else -1.0,
        "tiny": lambda s: 1e-300 * (0.3 - s),
        "smooth": lambda s: math.exp(-s) - math.exp(-0.3),
    }
    for name, f in functions.items():
        calls = []

        def counted(s, f=f, calls=calls):
            calls.append(s.item())
            return np.array([f(s.item())])

        ends = (np.array([s]) for s in (0.0, 1.0, f(0.0), f(1.0)))
        assert roots(counted, *ends).item() == pytest.approx(0.3, abs=1e-15)
        assert len(calls) <= (14 if name == "smooth" else 60), name


@pytest.mark.parametrize(
    ("attribute", "value"), [("terminal", -1), ("terminal", 3.5), ("terminal", "yes"), ("terminal", math.nan)]
)
def test_terminal_is_a_number_of_zeros(attribute, value):
    event = lambda t, y: y[0] - 0.5  # noqa: E731
    setattr(event, attribute, value)
    with pytest.raises(ValueError, match="terminal must be True, False or the number of zeros"):
        solve_ivp(decay, (0, 3), ONE, events=event)


def test_an_event_of_solve_ivp_is_one_number():
    with pytest.raises(ValueError, match=r"one number, got a tensor of shape \(2,\)"):
        solve_ivp(decay, (0, 3), torch.ones(2), events=lambda t, y: y - 0.5)


@pytest.mark.parametrize("value", [None, "x", 1j, torch.tensor([1j]), [0.1, 0.2]])
def test_an_event_of_solve_ivp_is_a_real_number(value):
    with pytest.raises(TypeError, match=r"must return (one number, or yes|real numbers)"):
        solve_ivp(decay, (0, 3), ONE, events=lambda t, y: value)


@pytest.mark.parametrize("events", ["abc", {"a": 1}, [None], 3])
def test_events_are_functions(events):
    with pytest.raises(TypeError, match=r"events must be a function of \(t, y\)"):
        solve_ivp(decay, (0, 3), ONE, events=events)
    with pytest.raises(TypeError, match=r"event_fn must be a function of \(t, y\)"):
        odeint_event(decay, ONE, scalar(0.0), event_fn=events)


@pytest.mark.parametrize("direction", ["down", math.nan, None, [1]])
def test_direction_is_a_number(direction):
    event = lambda t, y: y[0] - 0.5  # noqa: E731
    event.direction = direction
    with pytest.raises(ValueError, match="direction must be a number: above 0 to count rises"):
        solve_ivp(decay, (0, 3), ONE, events=event)


# Fields and their arguments

BUFFER = torch.zeros(2, 1, dtype=DOUBLE)


def into_out(t, y):
    return torch.neg(y, out=BUFFER)


def into_entries(t, y):
    for i in range(2):
        BUFFER[i] = -y[i]
    return BUFFER


def into_numpy(t, y):
    np.negative(y.numpy(), out=BUFFER.numpy())
    return BUFFER


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("field", [into_out, into_entries, into_numpy])
@pytest.mark.parametrize("kw", [
    dict(method="dopri5"), dict(method="dopri8"), dict(method="bosh3"), dict(method="tsit5"), dict(per_sample=True),
    dict(method="rk4", n_steps=40), dict(method="rk4", options={"step_size": 0.02}), dict(method="heun3", step_size=0.01),
])  # fmt: skip
def test_a_field_may_write_into_one_buffer(kw, field, mode):
    with mode():
        y = odeint(field, torch.ones(2, 1, dtype=DOUBLE), SPAN, **kw)
    assert y[-1].flatten().tolist() == pytest.approx([E1, E1], abs=2e-6)


def test_so_it_may_in_solve_ivp_with_events_and_in_a_stack():
    s = solve_ivp(into_out, (0, 1), torch.ones(2, 1, dtype=DOUBLE), events=lambda t, y: y[0] - 0.5)
    assert s.y[-1, 0].item() == pytest.approx(E1, abs=1e-7)
    assert s.t_events[0].item() == pytest.approx(math.log(2), abs=1e-6)

    class Field(nn.Module):
        def forward(self, x):
            return into_out(None, x)

    for solver in ("rk4", "dopri5"):
        stack = ResidualStack(Field(), depth=20, step_size=0.05, solver=solver, rtol=1e-8, atol=1e-8)
        with torch.no_grad():
            assert stack(torch.ones(2, 1, dtype=DOUBLE))[0].item() == pytest.approx(E1, abs=1e-6)


def test_two_buffers_in_turn_are_refused_and_constants_are_not():
    pair, calls = [torch.zeros(1, dtype=DOUBLE) for _ in range(2)], []

    def in_turn(t, y):
        calls.append(t)
        return torch.neg(y, out=pair[len(calls) % 2])

    with pytest.raises(ValueError, match=r"took turns.*dy.clone\(\)"):
        odeint(in_turn, ONE, SPAN)
    up, down = scalar([1.0]), scalar([-1.0])
    y = odeint(lambda t, y: up if t < 0.5 else down, 0 * ONE, SPAN, options={"jump_t": [0.5]})
    assert y[-1].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("way", ["autograd", "adjoint", "event", "ivp"])
def test_a_field_may_take_gradients_itself(method, way):
    """The oscillator H = (p² + q²)/2 by Hamilton's equations: q = cos t."""

    class Oscillator(nn.Module):
        def forward(self, t, y):
            (dq, dp) = torch.autograd.grad(y.square().sum() / 2, y, create_graph=True)[0]
            return torch.stack([dp, -dq])

    y0 = scalar([1.0, 0.0], requires_grad=True)
    kw = dict(method="rk4", step_size=0.01) if method == "rk4" else dict(rtol=1e-9, atol=1e-9)
    if way == "event":
        t, y = odeint_event(Oscillator(), y0, scalar(0.0), event_fn=lambda t, y: y[0] - 0.5, **kw)
        assert t.item() == pytest.approx(math.pi / 3, abs=1e-7)
        return
    if way == "ivp":
        y = solve_ivp(Oscillator(), (0, 1), y0, **kw).y
    else:
        solve = odeint_adjoint if way == "adjoint" else odeint
        y = solve(Oscillator(), y0, SPAN, **kw)
    assert y[-1].tolist() == pytest.approx([math.cos(1), -math.sin(1)], abs=1e-7)
    assert torch.autograd.grad(y[-1, 0], y0)[0].tolist() == pytest.approx(
        [math.cos(1), math.sin(1)], abs=1e-6
    )


def test_checkpointing_a_field_that_takes_gradients_is_refused():
    def field(t, y):
        return -torch.autograd.grad(y.square().sum() / 2, y, create_graph=True)[0]

    for kw in (dict(method="rk4", n_steps=4), {}):
        with pytest.raises(
            ValueError, match=r"calls torch.autograd.grad. Take gradient='autograd' or 'adjoint'"
        ):
            odeint(field, ONE.clone().requires_grad_(), SPAN, gradient="checkpoint", **kw)


class Decay(nn.Module):
    """−y, by a weight of −1; dy(1)/dw = e⁻¹."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False, dtype=DOUBLE)
        nn.init.constant_(self.linear.weight, -1.0)

    def forward(self, t, y, *modules):
        for module in modules:
            y = module(y)
        return y if modules else self.linear(y)


def test_the_adjoint_reaches_replicas_and_modules_in_args(monkeypatch):
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        replicate, "_broadcast_coalesced_reshape", lambda ts, devices, detach=False: [[t.clone() for t in ts] for _ in devices]
    )  # fmt: skip
    module = Decay()
    for replica in replicate.replicate(module, [0, 1]):
        assert not list(replica.parameters())
        module.zero_grad()
        odeint_adjoint(replica, ONE, SPAN)[-1].sum().backward()
        assert module.linear.weight.grad.item() == pytest.approx(E1, abs=1e-6)
    for args in ((module.linear,), (nn.Identity(), module.linear)):
        module.zero_grad()
        odeint_adjoint(Decay(), ONE, SPAN, args=args)[-1].sum().backward()
        assert module.linear.weight.grad.item() == pytest.approx(E1, abs=1e-6)


HELD = {
    "module": lambda module: (module, ()),
    "closure": lambda module: (lambda t, y: module(t, y), ()),
    "method": lambda module: (module.forward, ()),
    "args": lambda module: (lambda t, y, m: m(t, y), (module,)),
}


@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
@pytest.mark.parametrize("kw", [{}, dict(method="rk4", n_steps=20)])
def test_compiled_steps_see_hooks_that_come_and_go(kw, held, monkeypatch):
    """Wherever the field keeps the module, and those of all modules too."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, fullgraph=True, backend="eager"))
    module = Decay()
    field, args = held(module)

    def end():
        with torch.no_grad():
            return odeint(field, ONE, SPAN, args=args, compile=True, **kw)[-1].item()

    def twice(m, i, out):
        return 2 * out if m is module.linear else None

    assert end() == pytest.approx(E1, abs=1e-6)
    for register in (
        module.linear.register_forward_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        hook = register(twice)
        try:
            assert end() == pytest.approx(math.exp(-2), abs=1e-5)
        finally:
            hook.remove()
        assert end() == pytest.approx(E1, abs=1e-6)


@pytest.mark.parametrize("args", [0, -1, 1.5, torch.tensor(2.0), "no"])
def test_args_are_a_tuple(args):
    for solve in (odeint, odeint_adjoint, solve_ivp):
        times = (0, 1) if solve is solve_ivp else SPAN
        first = (
            (lambda t, y, a=1: -a * y, ONE, times)
            if solve is not solve_ivp
            else (lambda t, y, a=1: -a * y, times, ONE)
        )
        with pytest.raises(TypeError, match=r"args must be a tuple.*args=\(value,\)"):
            solve(*first, args=args)
    assert odeint(lambda t, y, a: -a * y, ONE, SPAN, args=(0,))[-1].item() == 1


# Steps, times and sizes


@pytest.mark.parametrize("end", [1.0, 1.005, 1.009, 1.05])
def test_no_step_exceeds_max_step(end):
    s = solve_ivp(decay, (0, end), ONE, max_step=0.1, first_step=0.1, rtol=1e-3)
    assert s.t.diff().max().item() <= 0.1 * (1 + 1e-12) + 1e-15
    assert len(s.t) - 1 == math.ceil(round(end / 0.1, 9)), "and rounding makes no sliver of a step"


def test_times_are_read_to_their_own_rounding():
    """0.1 in float32 is 0.1 + 1.5e-9, and the same time."""
    times = torch.linspace(0, 0.1, 5)
    s = solve_ivp(decay, (0, 0.1), torch.ones(1), t_eval=times)
    assert s.y[-1].item() == pytest.approx(math.exp(-0.1), abs=1e-6) and s.t[-1].item() == 0.1
    assert s(times)[-1].item() == pytest.approx(math.exp(-0.1), abs=1e-6)
    assert solve_ivp(decay, (0, 0.1), torch.ones(1), t_eval=times.numpy()).t[-1].item() == 0.1
    s = solve_ivp(decay, torch.tensor([0.1, 0.7]), torch.ones(1), t_eval=[0.1, 0.7])
    assert s.y[-1].item() == pytest.approx(math.exp(-0.6), abs=1e-6)
    for outside in ([0.0, 0.1 + 1e-9], torch.tensor([0.0, 0.1 + 1e-6])):
        with pytest.raises(ValueError, match="within t_span"):
            solve_ivp(decay, (0, 0.1), torch.ones(1), t_eval=outside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("size", [1e19, 1e25, 1e30])
@pytest.mark.parametrize("per_sample", [False, True])
def test_large_states_are_solved(dtype, size, per_sample):
    """Their squares overflow in float32."""
    y0 = torch.full((3, 4), size).to(dtype)
    low = dtype == torch.bfloat16
    kw = dict(rtol=0.05, atol=1e-3) if low else dict(rtol=1e-5, atol=1e-6)
    y = odeint(decay, y0, torch.tensor([0.0, 1.0]), per_sample=per_sample, **kw)[-1]
    assert (y / size).real.float().flatten().tolist() == pytest.approx([E1] * 12, rel=0.1 if low else 1e-4)
    pair = (
        odeint(lambda t, y: (-y[0], -y[1]), (y0, y0), torch.tensor([0.0, 1.0]), **kw)[0][-1]
        if not per_sample
        else y
    )
    assert (pair / size).real.float().flatten().tolist() == pytest.approx([E1] * 12, rel=0.1 if low else 1e-4)


def test_a_state_that_diverges_is_a_typed_error_in_every_way():
    grow = nn.Linear(4, 4, bias=False)
    nn.init.eye_(grow.weight)
    grow.weight.data *= 300
    x = torch.full((2, 4), 1e20)
    with torch.no_grad():
        for call in (
            lambda: odeint(lambda t, y: grow(y), x, torch.tensor([0.0, 1.0]), max_steps=500),
            lambda: odeint(lambda t, y: grow(y), x, torch.tensor([0.0, 1.0]), max_steps=500, per_sample=True),
            lambda: ODEBlock(lambda t, y: grow(y))(x),
            lambda: ResidualStack(grow, depth=2, solver="dopri5")(x),
            lambda: odeint(lambda t, y: torch.full_like(y, math.inf), x, torch.tensor([0.0, 1.0])),
        ):
            with pytest.raises(resode.SolverError, match="t="):
                call()


@pytest.mark.parametrize(
    "kw",
    [
        {},
        dict(per_sample=True),
        dict(method="dopri8"),
        dict(method="bosh3"),
        dict(method="bosh3", compile=True),
    ],
)
def test_a_field_that_overflows_ends_the_solve_where_it_does(kw, monkeypatch):
    """200 y in float32 is infinite from y = 1.7e36 on, at t = 0.417: steps from there on that leave the state as it
    is by rounding, and so do not fail, must not go on for ever."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, fullgraph=True, backend="eager"))
    with pytest.raises(resode.NonFiniteState, match="a field that overflows") as caught:
        odeint(lambda t, y: 200 * y, torch.ones(2, 1), SPAN.float(), max_steps=3000, **kw)
    assert caught.value.time == pytest.approx(math.log(torch.finfo(torch.float32).max / 200) / 200, rel=0.04)


def test_explicit_adams_is_of_order_four_and_has_a_step_limit():
    t = torch.linspace(0, 10, 101, dtype=DOUBLE)
    assert odeint(decay, ONE, t, method="explicit_adams")[-1].item() == pytest.approx(math.exp(-10), abs=1e-6)
    for method in ("implicit_adams", "fixed_adams"):
        y = odeint(decay, ONE, t, method=method)[-1].item()
        assert y == pytest.approx(math.exp(-10), rel=1e-4), "order 12 is 95 % off"
    # Real interval of the fourth-order method 3/10: at z = −3/10 the root ζ = −1 solves 2 = 0.3·160/24.
    assert resode.max_stable_step(torch.tensor([[-1.0]]), solver="explicit_adams") == pytest.approx(
        0.3, abs=1e-9
    )
    for eigenvalue in (-1, 1j, -1 + 1j, -0.1 + 1j):
        h = resode.max_stable_step(eigenvalues=[eigenvalue], solver="explicit_adams")
        for share, stable in ((0.98, True), (1.02, False)):
            x, z = [1.0, 1.0, 1.0, 1.0], share * h * eigenvalue
            for _ in range(4000):
                x = [*x[1:], x[-1] + z / 24 * (55 * x[-1] - 59 * x[-2] + 37 * x[-3] - 9 * x[-4])]
            assert (abs(x[-1]) < 10) == stable
    limit = resode.step_limit(eigenvalues=[1.0, -4.0], solver="explicit_adams")
    assert limit.step == 0 and limit.decaying_step == pytest.approx(0.075, abs=1e-9)


def test_listed_times_are_doubles():
    """0.1 is no float32: jumps, outputs and steps of a perturbed grid lie where they are named."""
    seen = []

    def field(t, y):
        seen.append(t.item())
        return torch.ones_like(y)

    odeint(field, ONE, SPAN, options={"jump_t": [0.1]})
    assert min(abs(t - 0.1) for t in seen) < 1e-16
    seen.clear()
    odeint(field, ONE, SPAN, method="rk4", options={"step_size": 0.1, "perturb": True})
    assert max(abs(10 * t - round(30 * t) / 3) for t in seen if abs(30 * t - round(30 * t)) < 1e-6) < 1e-14
    s = solve_ivp(field, (0, 1), ONE, t_eval=[0.1, 0.7])
    assert s.t.tolist() == [0.1, 0.7] and s(0.7).item() == s.y[1].item()


# torch.func and torch.export

WAYS = {
    "rk4": dict(method="rk4", n_steps=5),
    "size": dict(method="euler", step_size=0.1),
    "grid": dict(method="rk4_38", options=dict(step_size=0.1, interp="cubic", perturb=True)),
    "dopri5": {},
    "dopri8": dict(method="dopri8"),
}
TURN = scalar([[0.0, 1.0], [-1.0, -0.1]])
Y0, V = scalar([1.0, 0.3]), scalar([0.2, -0.5])
TIMES = torch.linspace(0, 1, 4, dtype=DOUBLE)


FORWARD = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated"
)  # torch's own, at the first jvp


@FORWARD
@pytest.mark.parametrize("kw", WAYS.values(), ids=WAYS)
def test_transforms_of_torch_func(kw):
    """Against autograd, which other tests hold against closed forms."""

    def end(y):
        return odeint(lambda t, y: torch.sin(y @ TURN.T) * (1 + t), y, TIMES, **kw)[-1]

    def loss(y):
        return end(y).square().sum()

    by_autograd = jacobian(end, Y0)
    fine = dict(rtol=0, atol=1e-12)
    assert torch.allclose(grad(loss)(Y0), jacobian(loss, Y0), **fine)
    assert torch.allclose(jacrev(end)(Y0), by_autograd, **fine)
    assert torch.allclose(jacfwd(end)(Y0), by_autograd, **fine)
    assert torch.allclose(jvp(end, (Y0,), (V,))[1], by_autograd @ V, **fine)
    assert torch.allclose(hessian(loss)(Y0), autograd_hessian(loss, Y0), **fine)

    def ends_at(s):
        return odeint(lambda t, y: -y * t, ONE, torch.stack([0 * s, s]), **kw)[-1, 0]

    s = scalar(1.0)
    for slope in (grad(ends_at)(s), jvp(ends_at, (s,), (torch.ones_like(s),))[1]):
        assert torch.allclose(slope, jacobian(ends_at, s), **fine)
    both = torch.stack([Y0, 2 * Y0])
    if not kw or kw["method"] == "dopri8":
        with pytest.raises(TypeError, match=r"vmap hides.*n_steps or step_size.*per_sample=True"):
            vmap(end)(both)
        return
    assert torch.allclose(vmap(end)(both), torch.stack([end(Y0), end(2 * Y0)]), **fine)
    assert torch.allclose(vmap(grad(loss))(both), torch.stack([jacobian(loss, y) for y in both]), **fine)


@pytest.mark.parametrize("kw", WAYS.values(), ids=WAYS)
def test_functional_call_and_ensembles(kw):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def loss(weights):
        return odeint(lambda t, y: functional_call(net, weights, (y,)), Y0, TIMES, **kw)[-1].square().sum()

    weights = {name: p.detach() for name, p in net.named_parameters()}
    plain = odeint(lambda t, y: net(y), Y0, TIMES, **kw)[-1].square().sum()
    expected = torch.autograd.grad(plain, list(net.parameters()))
    for found, known in zip(grad(loss)(weights).values(), expected, strict=True):
        assert torch.allclose(found, known, rtol=0, atol=1e-12)
    if kw and kw["method"] != "dopri8":
        pair = {name: torch.stack([p, 2 * p]) for name, p in weights.items()}
        both = torch.stack([loss(weights), loss({name: 2 * p for name, p in weights.items()})])
        assert torch.allclose(vmap(loss)(pair), both, rtol=0, atol=1e-12)


@FORWARD
def test_what_the_transforms_do_not_follow_says_so():
    for gradient in ("checkpoint", "adjoint"):

        def end(y, gradient=gradient):
            return odeint(Decay(), y, SPAN, method="rk4", n_steps=3, gradient=gradient)[-1].sum()

        with pytest.raises(TypeError, match=f"gradient='{gradient}' has a way back of its own.*'autograd'"):
            grad(end)(ONE)
    with pytest.raises(TypeError, match=r"goes by the values of t.*shape \(T, B\)"):
        vmap(lambda s: odeint(decay, ONE, torch.stack([0 * s, s]), method="rk4", n_steps=3))(torch.ones(2))
    t = grad(lambda y: odeint_event(decay, y, scalar(0.0), event_fn=lambda t, y: y - 0.5)[0])(ONE)
    assert t.item() == pytest.approx(1, abs=1e-6)  # t = ln(2 y0)
    with pytest.raises(TypeError, match=r"vmap hides\. Solve the batch in one call.*its own event"):
        vmap(lambda y: odeint_event(decay, y, scalar(0.0), event_fn=lambda t, y: y - 0.5, **steps("rk4"))[0])(
            torch.stack([ONE, ONE])
        )


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, t, x):
        return self.net(x) * (1 + t)


@pytest.mark.parametrize("strict", [False, True])
def test_a_block_of_fixed_steps_is_exported(strict):
    torch.manual_seed(0)
    x, more = torch.randn(2, 3), torch.randn(5, 3)
    for solver in ("rk4", "dopri5"):
        block = ODEBlock(Field(), solver=solver, n_steps=3).eval()
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},), strict=strict)
        assert torch.allclose(program.module()(more), block(more), atol=1e-6)
        graph = torch.compile(block, fullgraph=True, backend="eager")
        assert torch.allclose(graph(x), block(x), atol=1e-6)
        assert block.stats.nfe == {"rk4": 12, "dopri5": 18}[solver]


@pytest.mark.filterwarnings("ignore")  # the exporter's own, many
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_block_of_fixed_steps_goes_to_onnx(solver):
    """What onnxruntime computes from the file, of a batch of another size too."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    session = pytest.importorskip("onnxruntime").InferenceSession
    torch.manual_seed(0)
    x, more, sizes = torch.randn(2, 3), torch.randn(5, 3), ({0: torch.export.Dim("batch", min=2)},)
    stack = ResidualStack(nn.Linear(3, 3), depth=4, solver="rk4", step_size=0.3)
    for block in (ODEBlock(Field(), solver=solver, n_steps=3).eval(), stack.eval()):
        program = torch.onnx.export(block, (x,), dynamo=True, dynamic_shapes=sizes, verbose=False)
        run = session(program.model_proto.SerializeToString())
        (y,) = run.run(None, {run.get_inputs()[0].name: more.numpy()})
        assert torch.allclose(torch.from_numpy(y), block(more), atol=1e-5)
    with pytest.raises(
        torch.onnx.OnnxExporterError, match=r"dopri5 chooses its steps by the values.*n_steps="
    ):
        torch.onnx.export(ODEBlock(Field()).eval(), (x,), dynamo=True, verbose=False)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own look at a state
@pytest.mark.parametrize(
    "block", [ODEBlock(Field()), ResidualStack(nn.Linear(3, 3), depth=2, solver="dopri5")]
)
def test_chosen_steps_are_refused_in_a_graph_and_taken_beside_it(block):
    x = torch.randn(2, 3)
    message = "dopri5 chooses its steps by the values of the state.*ODEBlock with n_steps=.*rk4"
    with pytest.raises(ValueError, match=message):
        torch.export.export(block, (x,), strict=False)
    with pytest.raises(Exception, match=message):
        torch.compile(block, fullgraph=True, backend="eager")(x)
    assert torch.allclose(torch.compile(block, backend="eager")(x), block(x))


@pytest.mark.parametrize("strict", [False, True])
def test_a_check_of_values_is_refused_in_a_graph(strict):
    stack = ResidualStack(nn.Linear(3, 3), depth=2, check_finite=True)
    with pytest.raises(
        Exception, match=r"check_finite=True looks at the values of the state.*check_finite = False"
    ):
        torch.export.export(stack, (torch.randn(2, 3),), strict=strict)


# Memory


class Watched(nn.Module):
    """A field that notes the states it is given, and may keep its solution."""

    def __init__(self, keep):
        super().__init__()
        self.linear, self.keep, self.seen, self.kept = nn.Linear(2, 2).double(), keep, [], None

    def forward(self, t, y):
        self.seen.append(weakref.ref(y))
        return torch.tanh(self.linear(y))

    def solve(self, **kw):
        y = odeint(
            self,
            torch.ones(3, 2, dtype=DOUBLE),
            torch.linspace(0, 5, 7, dtype=DOUBLE),
            gradient="checkpoint",
            **kw,
        )
        self.kept = y if self.keep else None
        return y


@pytest.mark.parametrize("kw", [{}, dict(per_sample=True), dict(method="rk4", n_steps=9)])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_leave_nothing_behind(keep, back, kw):
    field = Watched(keep)
    y = field.solve(**kw)
    if back:
        y.sum().backward()
    seen, module = field.seen, weakref.ref(field)
    del y, field
    gc.collect()
    assert module() is None and not any(state() is not None for state in seen) and len(seen) > 50


def test_a_checkpointed_solution_gives_its_gradient_again_and_its_second_derivative():
    torch.manual_seed(0)
    field, found = nn.Linear(2, 2).double(), {}
    for gradient in ("autograd", "checkpoint"):
        y = odeint(lambda t, y: torch.tanh(field(y)), torch.ones(3, 2, dtype=DOUBLE), SPAN, gradient=gradient)
        loss = y.square().sum()
        once = torch.autograd.grad(loss, field.weight, retain_graph=True)[0]
        again = torch.autograd.grad(loss, field.weight, create_graph=True)[0]
        found[gradient] = (once, again, torch.autograd.grad(again.square().sum(), field.weight)[0])
    for a, b in zip(*found.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


PEAK = """
import threading, time, torch, resode
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
t, y0 = torch.linspace(0, 10, 400, dtype=torch.float64), torch.linspace(1, 2, 20_000, dtype=torch.float64)
rates = torch.linspace(0.5, 20, 20_000, dtype=torch.float64)
f = lambda t, y: torch.sin(3 * t) - rates * y
small = torch.ones(3, dtype=torch.float64)
resode.solve_ivp(lambda t, y: -y, (0, 1), small, t_eval=[0, 1]), resode.odeint(lambda t, y: -y, small, t)
start, peak, on = resident(), [0], [True]
def watch():
    while on[0]:
        peak[0] = max(peak[0], resident()); time.sleep(5e-4)
thread = threading.Thread(target=watch); thread.start()
y = CALL
on[0] = False; thread.join()
print((peak[0] - start) / (y.numel() * 8))
"""
CALLS = {
    "odeint": "resode.odeint(f, y0, t, rtol=1e-4, atol=1e-6)",
    "fixed": "resode.odeint(f, y0, t, method='rk4', n_steps=1)",
    "ivp": "resode.solve_ivp(f, (0, 10), y0, 'bosh3', t, False, rtol=1e-2, atol=1e-4).y",
    "every step's": "resode.solve_ivp(f, (0, 40), y0, dense_output=False, rtol=1e-5, atol=1e-6).y",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_result_is_held_once(call):
    """Beside the result (60 to 90 MB) some steps and states between them; three times the result before."""
    run = subprocess.run([sys.executable, "-c", PEAK.replace("CALL", call)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.5
