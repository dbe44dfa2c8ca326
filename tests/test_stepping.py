"""Step by step: `steps`, endless and empty spans, states of several tensors, pickles, step controllers."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from problems import van_der_pol

import resode
from resode import odeint, odeint_adjoint, odeint_event, solve_ivp
from resode.solve.control import CONTROLLERS, controller_filter

DOUBLE = torch.float64
ONE = torch.ones(1, dtype=DOUBLE)


def times(*values):
    return torch.tensor(values, dtype=DOUBLE)


def decay(t, y):
    return -y


# --- endless and empty spans, repeated outputs ---------------------------------------------------------------


def half(t, y):
    return y[0] - 0.5


half.terminal = True


@pytest.mark.parametrize("how", [{}, dict(method="dopri8"), dict(method="rk4", step_size=0.01)])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_endless_span_ends_at_a_terminal_event(how, sign):
    solution = solve_ivp(lambda t, y: -sign * y, (0, sign * math.inf), ONE, events=half, **how)
    assert solution.status == 1 and solution.t[-1].item() == pytest.approx(sign * math.log(2), abs=1e-7)
    assert solution.y[-1].item() == pytest.approx(0.5, abs=1e-12)
    wanted = [0.0, sign * 0.25, sign * 0.25, sign * 9.0]
    some = solve_ivp(lambda t, y: -sign * y, (0, sign * math.inf), ONE, events=half, t_eval=wanted, **how)
    assert some.t.tolist() == wanted[:3]
    assert torch.allclose(some.y[:, 0], torch.exp(-some.t.abs()), atol=1e-7)


@pytest.mark.parametrize("how", [{}, dict(method="dopri8"), dict(method="rk4", step_size=0.01)])
def test_a_span_without_length_gives_the_start(how):
    solution = solve_ivp(decay, (1, 1), ONE, **how)
    assert solution.t.tolist() == [1.0] and torch.equal(solution.y, ONE[None]) and solution.status == 0
    assert torch.equal(solution(1.0), ONE)
    repeated = solve_ivp(decay, (1, 1), ONE, t_eval=[1.0, 1.0], **how)
    assert repeated.t.tolist() == [1.0, 1.0] and torch.equal(repeated.y, ONE.expand(2, 1))


def test_an_endless_span_needs_an_end():
    with pytest.raises(ValueError, match="terminal=True"):
        solve_ivp(decay, (0, math.inf), ONE)
    with pytest.raises(ValueError, match="needs step_size"):
        solve_ivp(decay, (0, math.inf), ONE, "rk4", n_steps=4, events=half)
    with pytest.raises(resode.MaxStepsReached, match="no terminal event"):
        solve_ivp(lambda t, y: y, (0, math.inf), ONE, "rk4", step_size=0.1, max_steps=20, events=half)


# --- max_steps as an end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("t_eval", [None, [0.0, 0.001, 50.0]])
def test_max_steps_can_end_the_solve_with_a_status(t_eval):
    solution = solve_ivp(decay, (0, 50), ONE, max_steps=5, on_max_steps="stop", t_eval=t_eval, rtol=1e-9)
    assert solution.status == -1 and not solution.success and "max_steps=5" in solution.message
    assert solution.stats.n_steps == 5 and 0.001 < solution.t[-1] < 50
    assert torch.allclose(solution.y[:, 0], torch.exp(-solution.t), atol=1e-8)
    assert solution(solution.t[-1] / 2).item() == pytest.approx(math.exp(-solution.t[-1] / 2), abs=1e-8)
    with pytest.raises(resode.MaxStepsReached):
        solve_ivp(decay, (0, 50), ONE, max_steps=5)


# --- steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bosh3", "fehlberg45", "dopri5", "tsit5", "dopri8"])
def test_steps_give_time_state_error_and_the_solution_between(method):
    last, n = 0.0, 0
    for step in resode.steps(decay, ONE, (0.0, 3.0), method, rtol=1e-6, atol=1e-6):
        assert step.start == last and step.time > last and 0 <= step.error <= 1
        assert step.state.item() == pytest.approx(math.exp(-step.time), abs=1e-5)
        middle = (step.start + step.time) / 2
        assert step(middle).item() == pytest.approx(math.exp(-middle), abs=1e-5)
        with pytest.raises(ValueError, match="dense output holds"):
            step(step.time + 0.1)
        last, n = step.time, n + 1
    assert last == 3.0 and n > 1


def test_steps_go_on_only_when_asked():
    calls = []

    def field(t, y):
        calls.append(float(t))
        return -y

    going = resode.steps(field, ONE, (0.0, math.inf))
    next(going)
    seen = len(calls)
    assert seen < 12
    next(going)
    assert len(calls) > seen


def test_fixed_steps_and_structures_and_gradients():
    y0 = {"x": ONE.clone().requires_grad_(), "rest": (2 * ONE,)}

    def field(t, y):
        return {"x": -y["x"], "rest": (0 * y["x"],)}

    *_, last = resode.steps(field, y0, (0, 1), "rk4", n_steps=20)
    assert last.error is None and last.time == 1.0 and last.state["rest"][0].item() == 2
    (grad,) = torch.autograd.grad(last.state["x"].sum(), y0["x"])
    assert grad.item() == pytest.approx(math.exp(-1), abs=1e-6)
    assert last(0.97)["x"].item() == pytest.approx(math.exp(-0.97), abs=1e-6)


# --- states of several tensors -------------------------------------------------------------------------------

NESTED = {
    "x": torch.ones(2, dtype=DOUBLE),
    "rest": [torch.zeros(3, 1, dtype=DOUBLE), (torch.tensor(2.0).double(),)],
}


def nested(t, y):
    """x' = −x, its integral beside it, and a constant; the keys come in another order than the state's."""
    return {"rest": [y["x"][0] * torch.ones(3, 1, dtype=DOUBLE), (0 * y["x"].sum(),)], "x": -y["x"]}


class Nested(torch.nn.Module):
    def forward(self, t, y):
        return nested(t, y)


def check_nested(y, t):
    assert list(y) == ["x", "rest"] and isinstance(y["rest"], list) and isinstance(y["rest"][1], tuple)
    assert torch.allclose(y["x"], torch.exp(-t)[:, None].expand(-1, 2), atol=1e-6)
    assert torch.allclose(y["rest"][0], (1 - torch.exp(-t))[:, None, None].expand(-1, 3, 1), atol=1e-6)
    assert torch.equal(y["rest"][1][0], torch.full(t.shape, 2.0, dtype=DOUBLE))


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
@pytest.mark.parametrize(
    "how", [{}, dict(method="rk4", n_steps=40), dict(rtol={"x": 1e-8, "rest": [1e-8, (1e-8,)]})]
)
def test_odeint_takes_lists_dicts_and_nested_tuples(solve, how):
    t = times(0.0, 0.5, 2.0)
    check_nested(solve(Nested(), NESTED, t, **how), t)


def test_solve_ivp_takes_them_with_events_and_dense_output():
    def crosses(t, y):
        return y["x"][0] - 0.25

    solution = solve_ivp(nested, (0, 2), NESTED, events=crosses)
    check_nested(solution.y, solution.t)
    assert solution.t_events[0].item() == pytest.approx(math.log(4), abs=1e-7)
    check_nested(solution.y_events[0], solution.t_events[0])
    check_nested(solution(times(0.1, 1.9)), times(0.1, 1.9))
    assert solution(0.3)["rest"][0].shape == (3, 1)


def test_an_events_gradient_passes_through_a_structure():
    """x' = −x from x₀ reaches 1/2 at ln 2x₀: derivative 1/x₀; the integral beside it is then x₀ − 1/2."""
    x0 = torch.tensor([3.0, 1.0], dtype=DOUBLE, requires_grad=True)
    y0 = {**NESTED, "x": x0}
    time, y = odeint_event(nested, y0, times(0.0)[0], event_fn=lambda t, y: y["x"][0] - 0.5)
    assert time.item() == pytest.approx(math.log(6), abs=1e-7)
    assert torch.autograd.grad(time, x0, retain_graph=True)[0][0].item() == pytest.approx(1 / 3, abs=1e-6)
    assert torch.autograd.grad(y["rest"][0][1, 0, 0], x0)[0][0].item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    "field, message",
    [
        (lambda t, y: {"x": -y["x"]}, r"structure.*F\(x\) gave a dict \(\['x'\] \(2,\)\)"),
        (lambda t, y: -y["x"], "structure.*gave a Tensor"),
        (lambda t, y: {**nested(t, y), "x": y["x"][:1]}, r"shape.*\(2,\).*gave \[\(1,\)"),
        (lambda t, y: {**nested(t, y), "x": None}, "NoneType"),
    ],
)
def test_a_derivative_of_another_structure_is_refused(field, message):
    for solve in (lambda: odeint(field, NESTED, times(0.0, 1.0)), lambda: solve_ivp(field, (0, 1), NESTED)):
        with pytest.raises(ValueError, match=message):
            solve()


def test_a_derivative_of_another_dtype_is_refused_as_that_of_one_tensor_is():
    """torch.cat would make float64 of it, with the rounding of float32."""
    field = lambda t, y: {**nested(t, y), "x": -y["x"].float()}  # noqa: E731
    for solve in (lambda: odeint(field, NESTED, times(0.0, 1.0)), lambda: solve_ivp(field, (0, 1), NESTED)):
        with pytest.raises(
            TypeError, match=r"keep the state's dtype: the state is torch.float64.*torch.float32"
        ):
            solve()


def test_mixed_dtypes_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"y0\['a'\] torch.float32 on cpu, y0\['b'\]\[0\] torch.float64 on cpu"
    ):
        odeint(decay, {"a": torch.ones(1), "b": [ONE]}, times(0.0, 1.0))


# --- pickles -------------------------------------------------------------------------------------------------


def scaled(t, y, rate):
    return -rate * y


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
def test_a_solution_pickles_where_its_function_does(method):
    how = dict(step_size=0.1) if method == "rk4" else {}
    solution = solve_ivp(scaled, (0, 2), ONE, method, args=(0.5,), **how)
    again = pickle.loads(pickle.dumps(solution))
    assert torch.equal(again.y, solution.y) and torch.equal(again(1.234), solution(1.234))
    tree = pickle.loads(pickle.dumps(solve_ivp(nested, (0, 2), NESTED)))
    check_nested(tree(times(0.7)), times(0.7))


def test_a_solution_of_a_local_function_says_which_part_does_not():
    solution = solve_ivp(lambda t, y: -y, (0, 2), ONE)
    with pytest.raises(pickle.PicklingError, match=r"keeps func, which can't be pickled.*dense_output=False"):
        pickle.dumps(solution)
    solution.sol = None
    assert torch.equal(pickle.loads(pickle.dumps(solution)).y, solution.y)
    assert copy.deepcopy(solve_ivp(lambda t, y: -y, (0, 2), ONE))(1.0).item() == pytest.approx(math.exp(-1))


# --- controllers ---------------------------------------------------------------------------------------------


def rejections(controller, method, field, y0, end, tol):
    _, stats = odeint(field, y0, times(0.0, end), method=method, rtol=tol, atol=tol, return_stats=True,
                      options={} if controller is None else {"controller": controller})  # fmt: skip
    return stats.n_rejected, stats.n_steps


def test_published_coefficients():
    """β₁, β₂, β₃ of Söderlind's table (times the order): PI.4.2, H211PI, H312PID; and Hairer's 0.17 and 0.04."""
    published = {
        "i": (1, 0, 0),
        "pi": (0.17 * 5, -0.04 * 5, 0),
        "pi34": (0.7, -0.4, 0),
        "pi42": (0.6, -0.2, 0),
        "h211pi": (1 / 6, 1 / 6, 0),
        "pid": (1 / 18, 1 / 9, 1 / 18),
    }
    assert set(published) == set(CONTROLLERS)
    for name, filter in published.items():
        assert controller_filter(name) == pytest.approx(filter, abs=1e-15)
        assert controller_filter(CONTROLLERS[name]) == controller_filter(name)


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
@pytest.mark.parametrize("controller", ["pi", "pi34", "pi42"])
def test_at_the_stability_limit_pi_is_refused_where_the_elementary_controller_swings(method, controller):
    """y' = −λ (y − cos t) and a stiff oscillator: 942 refused of 6,894 steps by "i", 17 of 5,977 by "pi"."""

    def stiff(c):
        return sum(
            rejections(c, method, lambda t, y, r=r: -r * (y - torch.cos(t)), times(0.0), 4.0, 1e-4)[0]
            for r in (300.0, 500.0, 800.0)
        )

    assert stiff(controller) < 0.1 * stiff("i")
    oscillator = (method, lambda t, y: van_der_pol(t, y, 30.0), times(2.0, 0.0), 30.0, 1e-4)
    assert rejections(controller, *oscillator)[0] < 0.4 * rejections("i", *oscillator)[0]


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_the_digital_filters_make_smoother_sequences_of_steps(method):
    """Lotka and Volterra's cycle: the mean change of log h_{n+1}/h_n from a step to the next."""

    def cycle(t, y):
        return torch.stack([2 * (y[0] - y[0] * y[1]), y[0] * y[1] - y[1]])

    def roughness(c):
        walk = resode.steps(cycle, times(1.0, 3.0), (0.0, 20.0), method, rtol=1e-8, atol=1e-8, controller=c)
        h = torch.tensor([step.time - step.start for step in walk], dtype=DOUBLE)[3:-1]
        return h.log().diff().diff().abs().mean().item()

    assert roughness("h211pi") < 0.6 * roughness("i")
    assert roughness("pid") < 0.4 * roughness("i")


def test_the_default_is_pi_and_the_filters_answers_agree():
    def field(t, y):
        return van_der_pol(t, y, 20.0)

    y0 = times(2.0, 0.0)
    assert rejections(None, "dopri5", field, y0, 20.0, 1e-6) == rejections(
        "pi", "dopri5", field, y0, 20.0, 1e-6
    )
    ends = [
        odeint(field, y0, times(0.0, 20.0), rtol=1e-8, atol=1e-8, options={"controller": c})[-1]
        for c in CONTROLLERS
    ]
    assert max((end - ends[0]).abs().max() for end in ends) < 1e-5


def test_compiled_steps_know_the_controllers_too():
    y0 = torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=DOUBLE)

    def field(t, y):
        return van_der_pol(t, y, 5.0)

    kw = dict(per_sample=True, rtol=1e-6, atol=1e-6, return_stats=True, options={"controller": "pid"})
    # One rule for numpy and torch: the same numbers in, the same numbers out.
    import numpy as np

    from resode.solve.control import Control, decide, plan

    _, stats = odeint(field, y0, times(0.0, 5.0), **kw)
    assert stats.n_steps.min() > 10
    control = Control(1e-6, 1e-6, filter=controller_filter("pid"), min_step=0.01)
    rng = np.random.default_rng(0)
    for _ in range(50):
        time, end = np.zeros(8), rng.uniform(0.0, 1.0, 8) * (rng.uniform(size=8) > 0.2)
        step, errors = rng.uniform(0.005, 0.5, 8), rng.uniform(1e-6, 1, (2, 8))
        error, rejected = 10 ** rng.uniform(-12, 3, 8), rng.uniform(size=8) > 0.5
        error[rng.uniform(size=8) > 0.97] = np.inf
        answers = []
        for xp, a in ((np, np.asarray), (torch, torch.as_tensor)):
            attempt = plan(xp, a(time), a(step), a(end), 1.0, control)
            verdict = decide(xp, attempt, a(error), a(time), a(step), a(errors), a(rejected), 5, control)
            answers.append([torch.as_tensor(v) for v in (*attempt, *verdict)])
        for one, other in zip(*answers, strict=True):
            assert torch.allclose(one.double(), other.double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("wrong", [5, None, ("a", 1, 2), (1, 2), (math.nan, 1, 0), torch.ones(2)])
def test_a_controller_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=r"controller must be one of i, pi.*or three finite numbers"):
        odeint(decay, ONE, times(0.0, 1.0), options={"controller": wrong})


def test_times_that_are_none_are_refused():
    for wrong in ("ab", ["a"], {}):
        with pytest.raises(ValueError, match="t_eval must be a vector of times"):
            solve_ivp(decay, (0, 1), ONE, t_eval=wrong)


def test_a_field_of_zeros_takes_fourteen_evaluations():
    _, stats = odeint(lambda t, y: 0 * y, ONE, times(0.0, 100.0), return_stats=True)
    assert stats.nfe <= 14


# --- dense output of dopri8 ----------------------------------------------------------------------------------


def test_dopri8s_dense_output_is_of_order_7_and_once_continuously_differentiable():
    """One step of h, h/2 and h/4 on a nonlinear field of t: the error within it is of h^8."""

    def field(t, y):
        return torch.stack([y[1] * torch.cos(t), -torch.sin(y[0]) + 0.3 * t])

    y0, errors = times(1.0, 0.3), []
    for h in (0.8, 0.4, 0.2):
        (step,) = resode.steps(field, y0, (0.0, h), "dopri8", rtol=1e3, atol=1e3, first_step=h)
        s = torch.linspace(0, h, 21, dtype=DOUBLE)
        exact = odeint(field, y0, s, method="dopri8", rtol=1e-14, atol=1e-15, step_size=h / 64)
        errors.append((step(s) - exact).abs().max().item())
        e = 1e-6 * h
        assert torch.allclose((step(e) - y0) / e, field(times(0.0)[0], y0), atol=1e-5)
        assert torch.allclose((step.state - step(h - e)) / e, field(times(h)[0], step.state), atol=1e-5)
        # Coefficients of up to 1,400 cancel to weights below 1: their rounding is 1e-13 of h·F.
        assert (step(h) - step.state).abs().max() < 1e-12
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(order > 7.5 for order in orders), (errors, orders)


def test_dopri8s_outputs_take_three_evaluations_a_step_and_none_without_outputs():
    def nfe(t):
        return odeint(lambda t, y: torch.cos(t) * y, ONE, t, method="dopri8", rtol=1e-8, return_stats=True)[1]

    ends, many, early = (
        nfe(times(0.0, 10.0)),
        nfe(torch.linspace(0, 10, 1001).double()),
        nfe(times(0.0, 0.01, 10.0)),
    )
    assert many.n_steps == ends.n_steps and many.nfe == ends.nfe + 3 * many.n_accepted
    assert early.nfe == ends.nfe + 3
