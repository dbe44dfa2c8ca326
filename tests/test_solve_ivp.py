"""`solve_ivp` beside scipy's, on a pendulum; dense output, events, layout, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp as scipy_solve_ivp

import resode
from resode import METHODS, solve_ivp

DOUBLE = torch.float64
EXPLICIT = [name for name, tableau in METHODS.items() if tableau.explicit]


def pendulum(t, y, k=1.0):
    return torch.stack([y[1], -k * torch.sin(y[0])])


START = torch.tensor([1.0, 0.0], dtype=DOUBLE)


def exact(span, **kwargs):
    return scipy_solve_ivp(lambda t, y: [y[1], -np.sin(y[0])], span, [1.0, 0.0], method="DOP853", rtol=1e-12,
                           atol=1e-12, dense_output=True, **kwargs)  # fmt: skip


@pytest.mark.parametrize("span", [(0.0, 6.0), (6.0, 0.0)])
@pytest.mark.parametrize("method", EXPLICIT)
def test_dense_output_is_as_accurate_as_the_steps(method, span):
    order = METHODS[method].order
    n = {1: 20000, 2: 3000, 3: 1500}.get(order, 500)
    kw = dict(n_steps=n) if not METHODS[method].adaptive else dict(rtol=1e-8, atol=1e-8)
    s = solve_ivp(pendulum, span, START, method, **kw)
    reference = exact(span).sol
    times = torch.linspace(0, 6, 31, dtype=DOUBLE)
    wrong = (s(times) - torch.from_numpy(reference(times.numpy()).T)).abs().max().item()
    at_steps = np.abs(s.y.numpy() - reference(s.t.numpy()).T).max()
    assert wrong < 3 * at_steps + 1e-8
    assert at_steps < {1: 5e-3, 2: 1e-4}.get(order, 1e-6)
    assert s.y.shape == (len(s.t), 2) and (s.t[0], s.t[-1]) == span and (s.status, s.success) == (0, True)
    assert torch.allclose(s(s.t[len(s.t) // 2]), s.y[len(s.t) // 2], atol=1e-12), (
        "dense output meets the steps"
    )


def test_a_scipy_users_call():
    """Positional method and t_eval, args, RK45; the same numbers as scipy within tolerance."""
    t_eval = np.linspace(0, 5, 11)
    s = solve_ivp(pendulum, (0, 5), START, "RK45", t_eval, args=(1.3,), rtol=1e-6, atol=1e-9)
    reference = scipy_solve_ivp(lambda t, y, k: [y[1], -k * np.sin(y[0])], (0, 5), [1.0, 0.0], "RK45", t_eval,
                                args=(1.3,), rtol=1e-6, atol=1e-9)  # fmt: skip
    assert np.array_equal(s.t.numpy(), reference.t)
    assert np.abs(s.y.numpy().T - reference.y).max() < 2e-5
    assert s.stats.nfe < 1.3 * reference.nfev
    assert "end" in s.message


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8", "rk4"])
def test_events_as_scipys(method):
    def rising(t, y):
        return y[0]

    rising.direction = 1

    def slow(t, y):
        return y[1] - 0.3

    slow.terminal, slow.direction = 2, -1
    kw = dict(n_steps=2000) if method == "rk4" else dict(rtol=1e-8, atol=1e-8)
    s = solve_ivp(pendulum, (0.0, 30.0), START, method, events=[rising, slow], **kw)
    r = exact((0.0, 30.0), events=[rising, slow])
    assert s.status == r.status == 1
    assert float(s.t[-1]) == pytest.approx(r.t[-1], abs=2e-6)
    for ours, theirs, y in zip(s.t_events, r.t_events, s.y_events, strict=True):
        assert np.abs(ours.numpy() - theirs).max() < 2e-6
        assert y.shape == (len(ours), 2)
    assert s.y_events[0][:, 0].abs().max() < 1e-7
    assert torch.equal(s.y[-1], s.y_events[1][-1])
    with pytest.raises(ValueError, match=r"from 0 to 13\.0"):
        s(14.0)


def test_gradients_reach_y0_and_parameters():
    k, y0 = torch.tensor(1.3, dtype=DOUBLE, requires_grad=True), START.clone().requires_grad_()

    def ends(y0, k):
        s = solve_ivp(pendulum, (0.0, 2.0), y0, args=(k,), rtol=1e-10, atol=1e-10)
        return s.y[-1], s(0.77)

    assert torch.autograd.gradcheck(ends, (y0, k), atol=1e-6)


def test_states_of_every_kind():
    s = solve_ivp(lambda t, y: 1j * y, (0, 1), torch.ones(2, 1, dtype=torch.complex128))
    assert s.y.shape[1:] == (2, 1) and abs(s.y[-1, 0, 0].item() - complex(math.cos(1), math.sin(1))) < 1e-7
    s = solve_ivp(lambda t, y: -y, (0, 1), torch.tensor(1.0))
    assert s.y.dtype == torch.float32 and s.t.dtype == DOUBLE and s(1.0).shape == ()
    rates = torch.tensor([[1.0], [30.0]], dtype=DOUBLE)
    s = solve_ivp(
        lambda t, y: -rates * y, (0, 1), torch.ones(2, 1, dtype=DOUBLE), t_eval=[0, 0.5, 1.0], per_sample=True
    )
    assert torch.allclose(s.y[..., 0], torch.exp(-rates[:, 0] * s.t[:, None]), atol=1e-7)
    assert s.stats.nfe.shape == (2,) and s.stats.nfe[1] > s.stats.nfe[0]
    # A sample whose first attempts are rejected while the other's are kept: its start is still its start.
    rates = torch.tensor([[0.01], [1000.0]], dtype=DOUBLE)
    s = solve_ivp(lambda t, y: -rates * y, (0, 1), torch.ones(2, 1, dtype=DOUBLE), t_eval=[0, 1e-4, 1.0],
                  per_sample=True, first_step=0.1)  # fmt: skip
    assert torch.allclose(s.y[..., 0], torch.exp(-rates[:, 0] * s.t[:, None]), atol=1e-7)


def test_steps_can_be_limited_or_given():
    s = solve_ivp(pendulum, (0, 1), START, max_step=0.05, first_step=0.01)
    assert s.t[1] == 0.01 and s.t.diff().max() <= 0.05 + 1e-12
    s = solve_ivp(pendulum, (0, 1), START, "rk4", step_size=0.3)
    assert torch.allclose(s.t, torch.linspace(0, 1, 5, dtype=DOUBLE)) and s.stats.n_steps == 4
    assert s.stats.nfe == 4 * 4 + 1, "four stages a step; F at the end is the next step's first"
    assert solve_ivp(pendulum, (0, 1), START, dense_output=False).sol is None
    with pytest.warns(UserWarning, match="rk4 takes one step over t_span"):
        solve_ivp(pendulum, (0, 1), START, "rk4")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(t_span=(0, math.inf)), ValueError, "only an event with terminal=True can end"),
        (dict(t_span=(0, 1, 2)), ValueError, "two times, the start and the end"),
        (dict(t_span=torch.tensor([0.0, 1.0], requires_grad=True)), ValueError, "no gradient; use odeint"),
        (dict(y0=[1.0]), TypeError, r"y0\[0\] is a float"),
        (dict(y0={"a": START, "b": START.float()}), ValueError, r"y0\['b'\] torch.float32"),
        (dict(y0={"a": START}, func=lambda t, y: -y["a"]), ValueError, "of the state's structure"),
        (dict(controller="pdi"), ValueError, "controller must be one of"),
        (dict(controller=(0.0, 2.5, 0.0)), ValueError, "can't be stable.*grow by 1.5 a step"),
        (dict(controller=(0.0, 1.0)), ValueError, "three finite numbers"),
        (dict(on_max_steps="go"), ValueError, "on_max_steps must be one of raise, stop"),
        (dict(method="Radau"), ValueError, "unknown method 'Radau'"),
        (dict(method="implicit_adams"), ValueError, "torchdiffeq's, use it with odeint"),
        (dict(t_eval=[0.5, 0.2]), ValueError, "times in order"),
        (dict(t_eval=[0.5, 2.0]), ValueError, "within t_span, 0 to 1; it runs from 0.5 to 2"),
        (dict(per_sample=True, y0=torch.ones(2, 1)), ValueError, "give t_eval, no events"),
        (dict(method="rk4", n_steps=5, max_step=0.1), ValueError, "steer adaptive steps"),
        (dict(max_step=-1.0), ValueError, "max_step must be positive"),
        (dict(func=lambda t, y: y * y, y0=torch.ones(1), t_span=(0, 3)), resode.SolverError, "t="),
        (dict(func=lambda t, y: -50 * y**3, y0=torch.ones(1), method="euler", n_steps=9), resode.NonFiniteState, "t="),
    ],
)  # fmt: skip
def test_wrong_arguments_say_the_rule(change, error, message):
    arguments = dict(func=pendulum, t_span=(0, 1), y0=START)
    with pytest.raises(error, match=message):
        solve_ivp(**{**arguments, **change})


def test_a_solution_without_steps_says_how_to_keep_them():
    with pytest.raises(ValueError, match="dense_output=True"):
        solve_ivp(pendulum, (0, 1), START, dense_output=False)(0.5)
