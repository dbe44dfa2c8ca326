"""Parts of the solvers' room by their formulas: what steers steps, interpolants, grids, options, why a solve failed."""

import math

import numpy as np
import pytest
import torch

from resode.solve import states as states_module
from resode.solve.control import Control, controller_filter, decide, next_step, plan, rms
from resode.solve.dense import Step, hermite, interpolate
from resode.solve.diagnosis import explain, number, spectrum
from resode.solve.failures import (
    Standing,
    field_not_finite,
    newton_failed,
    nothing_finite,
    step_underflow,
    too_many_steps,
)
from resode.solve.fixed import (
    Grid,
    checked_grid,
    fixed_solve,
    grid_of_size,
    grid_solve,
    opened,
    own_steps,
    steps_between,
    within,
)
from resode.solve.options import SolveSettings, resolve_method, tolerances
from resode.solve.result import (
    MaxStepsReached,
    NewtonNotConverged,
    NonFiniteField,
    NonFiniteState,
    Stats,
    StepSizeUnderflow,
)
from resode.solve.states import States
from resode.solve.step import (
    Counted,
    all_finite,
    as_stage,
    combine,
    explicit_step,
    increment,
    rk_step,
    stages,
)
from resode.tableaus import METHODS, get_tableau

DOUBLE = torch.float64


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=DOUBLE)


# -- what steers steps -----------------------------------------------------------------------------


def test_controllers_by_their_gains():
    """β₁ = P + I + D, β₂ = −P − 2D, β₃ = D; those whose steps would swing are refused."""
    assert controller_filter("i") == (1.0, 0.0, 0.0) and controller_filter("pi") == pytest.approx(
        (0.85, -0.2, 0.0)
    )
    assert controller_filter("pid") == pytest.approx((1 / 18, 1 / 9, 1 / 18))
    assert controller_filter((0.5, 0.25, 0.0)) == (0.75, -0.5, 0.0)
    assert controller_filter((0.0, 1.9, 0.0)) == (1.9, 0.0, 0.0)
    for gains in ((0.0, 2.0, 0.0), (0.0, 2.1, 0.0), (0.0, 0.0, 0.0)):  # |1 − I| ≥ 1
        with pytest.raises(ValueError, match="can't be stable"):
            controller_filter(gains)
    for bad in ((1.0, 2.0), "pi35", (1.0, math.nan, 0.0), 3.0, ("a", "b", "c")):
        with pytest.raises(ValueError, match="controller"):
            controller_filter(bad)


def test_norms():
    x = double(3, 4, 0, 0).reshape(2, 2)
    assert float(rms(x, False)) == 2.5 and rms(x, True).tolist() == pytest.approx([5 / 2**0.5, 0.0])
    assert float(rms(torch.zeros(0), False)) == 0
    assert Control(1e-3, 1e-6).measure(x) == 2.5 and Control(1, 1, norm=lambda x: x.sum()).measure(x) == 7
    assert (
        Control(1, 1, max_step=2.0).longest == pytest.approx(2.0) and Control(1, 1, max_step=2.0).longest > 2
    )


@pytest.mark.parametrize("forward", [1.0, -1.0])
def test_the_next_attempt(forward):
    """A step within 1 % of the end is stretched to it, up to max_step; at the end nothing is left."""
    time, end = np.array([0.0, 0.0, 0.0, 2.0]) * forward, np.full(4, 2.0) * forward
    step = np.array([0.5, 1.99, 3.0, 1.0])
    attempt = plan(np, time, step, end, forward, Control(1, 1))
    assert attempt.size.tolist() == [0.5, 2.0, 2.0, 0.0] and (attempt.end * forward).tolist() == [
        0.5,
        2.0,
        2.0,
        2.0,
    ]
    assert attempt.reaches.tolist() == [False, True, True, True] and attempt.active.tolist() == [
        True,
        True,
        True,
        False,
    ]
    attempt = plan(np, time, np.array([0.5, 1.97, 1.0, 1.0]), end, forward, Control(1, 1, max_step=1.99))
    assert attempt.reaches.tolist() == [False, False, False, True] and attempt.size[1] == 1.97


CONTROL = Control(1, 1, safety=0.9, shrink=0.2, grow=5.0, filter=(1.0, 0.0, 0.0))


def choose(
    errors,
    keep,
    control=CONTROL,
    past=((1.0, 1.0), (1.0, 1.0)),
    rejected=False,
    reaches=False,
    size=0.5,
    step=0.5,
    order=2,
):
    errors, keep = np.array(errors, dtype=float), np.array(keep)
    n = len(errors)
    full = lambda v: np.full(n, v)  # noqa: E731
    attempt = plan(np, full(0.0), full(size), full(10.0), 1.0, Control(1, 1))._replace(reaches=full(reaches))
    return next_step(
        np, attempt, errors, full(step), np.array(past)[:, :n], keep, full(rejected), order, control
    )


def test_the_next_step_is_what_the_error_allows():
    """h · 0.9 · e^(−1/p), between a fifth and five times; after a rejection it does not grow."""
    step, error = choose([0.25, 4.0], [True, False])
    assert step.tolist() == pytest.approx([0.5 * 0.9 * 2, 0.5 * 0.9 / 2]) and error.tolist() == [0.25, 4.0]
    assert choose([1e-9, 1e9], [True, False])[0].tolist() == pytest.approx([2.5, 0.1])
    assert choose([0.0], [True])[1].tolist() == [1e-10]
    assert choose([0.25], [True], rejected=True)[0].tolist() == [0.5]
    assert choose([4.0], [True], rejected=True)[0].tolist() == pytest.approx([0.225])
    assert choose([0.25], [True], order=4)[0].tolist() == pytest.approx([0.45 * 2**0.5])


def test_a_controller_remembers_two_errors():
    """e_n^(−β₁/p) e_{n−1}^(−β₂/p) e_{n−2}^(−β₃/p); a rejected step shrinks by its own error alone."""
    control = Control(1, 1, filter=(0.6, -0.2, 0.1), safety=1.0, grow=9.0)
    step, _ = choose([0.25, 4.0], [True, False], control, past=((0.5, 0.5), (0.125, 0.125)))
    assert step[0] == pytest.approx(0.5 * 0.25**-0.3 * 0.5**0.1 * 0.125**-0.05) and step[1] == pytest.approx(
        0.25
    )


def test_a_step_cut_short_by_the_end_keeps_the_one_before():
    assert choose([0.25], [True], reaches=True, size=0.1, step=2.0)[0].tolist() == [2.0]
    assert choose([4.0], [False], reaches=True, size=0.1, step=2.0)[0].tolist() == pytest.approx([0.045])
    assert choose([1e-9], [True], Control(1, 1, max_step=0.7))[0].tolist() == [0.7]
    assert choose([1e9], [False], Control(1, 1, min_step=0.3))[0].tolist() == [0.3]


def judged(errors, control=CONTROL, time=0.0, size=0.5, rejected=False, end=10.0):
    errors = np.array(errors, dtype=float)
    n = len(errors)
    full = lambda v: np.full(n, v)  # noqa: E731
    attempt = plan(np, full(time), full(size), full(end), 1.0, control)
    return decide(np, attempt, errors, full(time), full(size), np.ones((2, n)), full(rejected), 2, control)


def test_which_steps_are_kept():
    found = judged([0.5, 1.0, 1.01])
    assert found.keep.tolist() == [True, True, False] and found.refused.tolist() == [False, False, True]
    assert not found.failed.any() and not found.stuck.any()
    assert found.errors.tolist() == [[0.5, 1.0, 1.0], [1.0, 1.0, 1.0]] and found.rejected.tolist() == [
        False,
        False,
        True,
    ]
    kept = judged([7.0], Control(1, 1, min_step=0.497, filter=(1.0, 0, 0)))
    assert kept.keep.all(), "a step that is not above min_step, to 1 %, is kept"
    assert not judged([7.0], Control(1, 1, min_step=0.4, filter=(1.0, 0, 0))).keep.any()


def test_where_one_sample_fails_no_other_takes_its_step():
    found = judged([0.5, math.inf, math.nan])
    assert found.failed.tolist() == found.refused.tolist() == [False, True, True] and not found.keep.any()
    assert found.step.tolist() == pytest.approx([0.5, 0.1, 0.1]) and found.rejected.tolist() == [
        False,
        True,
        True,
    ]
    at_end = judged([math.inf], time=10.0)
    assert not at_end.failed.any() and not at_end.refused.any()


def test_where_no_smaller_step_is_left():
    """Four units of the time's last place; or min_step, where the field fails there."""
    tiny = 2.0**-52
    assert (
        judged([1e30], time=1.0, size=8 * tiny).stuck.all()
        and not judged([1e30], time=1.0, size=200 * tiny).stuck.any()
    )
    assert judged([0.5], time=1.0, size=tiny / 4, end=2.0).stuck.all(), "a step that does not move the time"
    assert judged([math.nan], Control(1, 1, min_step=0.5)).stuck.all() and not judged([math.nan]).stuck.any()


# -- steps -----------------------------------------------------------------------------------------


def test_combinations():
    x, k = double(1.0, 2.0), [double(1.0, 0.0), double(0.0, 3.0)]
    for h in (0.5, torch.tensor(0.5, dtype=DOUBLE)):
        assert combine(x, h, ((0, 2.0), (1, -1.0)), k).tolist() == [2.0, 0.5] and combine(
            x, h, ((1, 1.0),), k
        ).tolist() == [1.0, 3.5]
        assert combine(x, h, (), k) is x and combine(x, h, ((1, 2.0),), k).tolist() == [1.0, 5.0]
        assert increment(h, ((0, 2.0), (1, -1.0)), k).tolist() == [1.0, -1.5]


@pytest.mark.parametrize("name", [n for n, t in METHODS.items() if t.explicit])
def test_stages_and_a_step_by_hand(name):
    """k_i = f(t + c_i h, x + h Σ a_ij k_j): on a field that knows the time, with tensors for steps too."""
    tableau, f = METHODS[name], lambda t, x: torch.sin(2 * x) + t * t
    x, t, h = double(0.3, -1.0), 0.7, 0.25
    k = []
    for row, c in zip(tableau.a, tableau.c, strict=True):
        k.append(
            f(t + float(c) * h, x + h * sum((float(a) * s for a, s in zip(row, k, strict=False)), 0 * x))
        )
    want = x + h * sum(float(b) * s for b, s in zip(tableau.b, k, strict=True))
    times = [t + float(c) * h for c in tableau.c]
    found = stages(tableau, f, times, x, h)
    assert len(found) == tableau.stages - (tableau.b[-1] == 0), "what only the next step needs is not taken"
    for a, b in zip(found, k, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(rk_step(tableau, f, t, x, h), want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        rk_step(tableau, f, t, x, torch.tensor(h, dtype=DOUBLE)), want, rtol=1e-13, atol=1e-13
    )
    calls = Counted(f)
    explicit_step(tableau, calls, times, x, h, k[0])
    assert calls.calls == len(found) - 1, "k_1 was given"


def test_what_a_field_may_return():
    x = torch.zeros(2, 3)
    for bad, error, words in (
        (3.0, TypeError, "must return a tensor"),
        (torch.zeros(2), ValueError, r"x \(2, 3\), F\(x\) \(2,\)"),
        (x.double(), TypeError, "x is torch.float32, F"),
        (torch.zeros(2, 3, device="meta"), ValueError, "on cpu, F"),
    ):
        with pytest.raises(error, match=words):
            as_stage(bad, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert as_stage(x.bfloat16(), x).dtype == torch.float32
    assert all_finite(torch.zeros(0)) and all_finite(x) and all_finite(x + 0j)
    assert not all_finite(torch.tensor([1.0, math.inf])) and not all_finite(
        torch.tensor([complex(1, -math.inf)])
    )
    assert not all_finite(torch.tensor([1.0, math.nan]))


# -- dense output ----------------------------------------------------------------------------------


def test_hermites_cubic_is_exact_for_cubics():
    p = lambda t: 1 - 2 * t + 3 * t**2 - 0.5 * t**3  # noqa: E731
    dp = lambda t: -2 + 6 * t - 1.5 * t**2  # noqa: E731
    x0, h = 0.4, 0.6
    for s in (0.0, 0.3, 0.9, 1.0):
        parts = (double(v) for v in (p(x0), dp(x0), p(x0 + h), dp(x0 + h)))
        assert float(hermite(s, h, *parts)) == pytest.approx(p(x0 + s * h), rel=1e-13)


@pytest.mark.parametrize("name", ["bosh3", "dopri5", "tsit5", "fehlberg45", "dopri8"])
@pytest.mark.parametrize("forward", [1.0, -1.0])
def test_states_between_the_ends_of_steps(name, forward):
    """y' = y cos t in two steps, outputs in any order, against e^{sin t}: within the method's own error."""
    tableau, f = (
        METHODS[name],
        lambda t, y: (
            y
            * torch.cos(
                torch.as_tensor(t, dtype=DOUBLE).reshape(-1, *[1] * (y.ndim - 1))
                if y.ndim > 1
                else torch.as_tensor(t, dtype=DOUBLE)
            )
        ),
    )
    steps, x, t, h = [], double(1.0, 2.0), 0.0, 0.2 * forward
    for _ in range(2):
        k, x1 = explicit_step(tableau, f, [t + float(c) * h for c in tableau.c], x, h)
        end = t + h
        k = [*k, f(end, x1)]
        steps.append(Step(np.array([t]), np.array([end]), x, k, x1))
        x, t = x1, end
    outputs = forward * np.array([0.3, 0.05, 0.2, 0.4, 0.0])
    found, calls = interpolate(tableau, f, steps, outputs, forward, False)
    want = np.exp(np.sin(outputs))
    tolerance = {"bosh3": 2e-4, "dopri8": 1e-10}.get(name, 3e-7)
    np.testing.assert_allclose(
        torch.stack(found).numpy(), want[:, None] * np.array([1.0, 2.0]), rtol=tolerance
    )
    assert calls == {"fehlberg45": 5 * 5, "dopri8": 2 * len(tableau.dense_rows)}.get(name, 0)
    assert interpolate(tableau, f, steps, np.zeros(0), forward, False) == ([], 0)
    assert steps[0].slopes[0] is steps[0].k[0] and steps[0].slopes[1] is steps[0].k[-1]


# -- steps of a given size -------------------------------------------------------------------------


def test_how_many_equal_steps():
    assert (
        steps_between(0, 1, 0.1, None) == 10
        and steps_between(0, 1, 0.3, None) == 4
        and steps_between(1, 0, 0.5, None) == 2
    )
    assert (
        steps_between(0, 1, 2.0, None) == 1
        and steps_between(0, 1, None, None) == 1
        and steps_between(0, 1, 0.1, 3) == 3
    )
    assert (
        steps_between(0, 0.7, 0.1, None) == 7
        and steps_between(0, 0.701, 0.1, None) == 8
        and steps_between(1, 1, 0.1, None) == 1
    )


def test_times_within_bounds():
    assert [within(s, 1.0, 2.0) for s in (0.5, 1.5, 2.5)] == [1.0, 1.5, 2.0]
    s = double(0.5, 1.5, 2.5).requires_grad_()
    moved = within(s, 1.0, 2.0)
    assert moved.tolist() == [1.0, 1.5, 2.0]
    assert torch.autograd.grad(moved.sum(), s)[0].tolist() == [1.0, 1.0, 1.0]
    low, high = opened(2.0, 1.0, DOUBLE)
    assert low == 1 + 2.0**-52 and high == 2 - 2.0**-52


@pytest.mark.parametrize("forward", [1.0, -1.0])
def test_a_grid_of_a_size_and_what_lies_between(forward):
    """Steps of 0.4 from 0 to 1, the last one short; outputs by lines, or by cubics of the ends' slopes."""
    t = forward * double(0.0, 0.5, 0.7, 1.0)
    points = grid_of_size(0.4)(None, None, t)
    torch.testing.assert_close(points, forward * double(0.0, 0.4, 0.8, 1.0))
    f = lambda t, y: 2.0 * torch.as_tensor(t, dtype=DOUBLE) + 0 * y  # noqa: E731
    x = double(0.0)
    euler = [0.0, 0.0, forward * 0.4 * 0.8 * forward, 0.0]
    euler[3] = euler[2] + 0.2 * 1.6
    path, n = grid_solve(METHODS["euler"], f, x, t, Grid(grid_of_size(0.4)))
    assert n == 3
    want = np.interp([0.0, 0.5, 0.7, 1.0], [0.0, 0.4, 0.8, 1.0], euler)
    np.testing.assert_allclose(path.stacked()[:, 0], want, atol=1e-12)
    path, _ = grid_solve(METHODS["midpoint"], f, x, t, Grid(grid_of_size(0.4), "cubic"))
    np.testing.assert_allclose(path.stacked()[:, 0], t.numpy() ** 2, atol=1e-12)


@pytest.mark.parametrize(
    "bad",
    [
        3.0,
        torch.zeros(2, 2),
        double(0.0),
        double(0.0, 0.5, 0.4, 1.0),
        double(0.1, 1.0),
        double(0.0, 0.9),
        double(0.0, 0.5, 0.5, 1.0),
    ],
)
def test_what_is_no_grid(bad):
    with pytest.raises(ValueError, match="grid_constructor must return"):
        checked_grid(bad, double(0.0, 1.0))


def test_fixed_steps_are_counted_and_told():
    f = lambda t, y: -y  # noqa: E731
    t, x = double(0.0, 1.0, 1.0, 1.5), double(1.0)
    path, total = fixed_solve(METHODS["euler"], f, x, t, step_size=0.5, n_steps=None)
    assert total == 3 and path.stacked()[:, 0].tolist() == [1.0, 0.25, 0.25, 0.125]
    seen = []
    told, total = fixed_solve(
        METHODS["euler"],
        f,
        x,
        t,
        step_size=None,
        n_steps=2,
        callback=lambda *a: seen.append([float(v) for v in a]),
    )
    assert (
        total == 4
        and [s[0] for s in seen] == [0.0, 0.5, 1.0, 1.25]
        and [s[2] for s in seen] == [0.5, 0.5, 0.25, 0.25]
    )
    assert told.stacked()[:, 0].tolist() == [1.0, 0.25, 0.25, 0.25 * 0.75**2]
    times = []
    fixed_solve(
        METHODS["heun2"],
        lambda t, y: (times.append(t), -y)[1],
        x,
        double(0.0, 1.0),
        step_size=None,
        n_steps=1,
        perturb=True,
    )
    assert times == [opened(0.0, 1.0, DOUBLE)[0], opened(0.0, 1.0, DOUBLE)[1]], "just inside of the step"


def test_samples_with_their_own_times_wait_for_each_other():
    f = lambda t, y: -y  # noqa: E731
    t = double(0.0, 0.0, 1.0, 0.5, 1.0, 2.0).reshape(3, 2)
    path, total = own_steps(
        METHODS["euler"], f, torch.ones(2, 1, dtype=DOUBLE), t, step_size=0.5, n_steps=None
    )
    assert total.tolist() == [3, 4] or total.tolist() == [2 + 1, 1 + 3]
    np.testing.assert_allclose(path.stacked()[..., 0], [[1, 1], [0.25, 0.5], [0.25, 0.5 * 0.5**3]])


# -- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "large", "held"), [(0, 2**24, 2**22), (7, 0, 2**22), (0, 2**24, 0), (0, 2**24, 40)]
)
@pytest.mark.parametrize("gradient", [False, True])
def test_states_are_stacked_in_order(monkeypatch, n, large, held, gradient):
    """Into one tensor, into blocks, or as they are where they carry a gradient, also from some state on."""
    monkeypatch.setattr(states_module, "LARGE", large)
    monkeypatch.setattr(states_module, "HELD", held)
    states = States(n, double(0.0, 0.0))
    rows = [double(i, -i) for i in range(7)]
    for i, row in enumerate(rows):
        states.append(row.requires_grad_() if gradient and i >= 4 else row)
    stacked = states.stacked()
    torch.testing.assert_close(stacked, torch.stack(rows))
    assert stacked.requires_grad == gradient and states.count == 7


# -- options ---------------------------------------------------------------------------------------


def settings(method="dopri5", **given) -> SolveSettings:
    return SolveSettings(resolve_method(method), **given)


def test_methods_by_name():
    assert resolve_method(None) is METHODS["dopri5"] and resolve_method("rkc2_5") is get_tableau("rkc2_5")
    assert (
        resolve_method(METHODS["rk4"]) is METHODS["rk4"]
        and resolve_method("explicit_adams") == "explicit_adams"
    )
    with pytest.raises(ValueError, match=r"unknown method 'rk9'.*dopri5.*rkc1_S.*explicit_adams"):
        resolve_method("rk9")
    assert (
        not settings().fixed
        and settings("rk4").fixed
        and settings(n_steps=2).fixed
        and settings(step_size=0.1).fixed
    )
    assert not settings("explicit_adams", step_size=0.1).fixed


@pytest.mark.parametrize(
    ("given", "words"),
    [(dict(step_size=0.1, n_steps=2), "not both"), (dict(step_size=0.0), "positive and finite"), (dict(step_size=math.inf), "positive"),
     (dict(step_size=-1.0), "positive"), (dict(n_steps=0), "n_steps"), (dict(max_steps=0), "max_steps"), (dict(options={"interp": "linear"}), "unknown options"),
     (dict(method="rk4", options={"safety": 1.0}), "unknown options .*rk4 with fixed steps"), (dict(method="rk4", step_size=0.1, options={"step_size": 0.1}), "one way only"),
     (dict(method="explicit_adams", n_steps=3), "torchdiffeq"), (dict(method="explicit_adams", per_sample=True), "torchdiffeq")],
)  # fmt: skip
def test_settings_that_mean_nothing(given, words):
    with pytest.raises(ValueError, match=words):
        settings(**given).check()


def test_settings_that_mean_something():
    for given in (
        dict(),
        dict(step_size=0.1),
        dict(n_steps=1),
        dict(max_steps=1),
        dict(method="rk4", options={"step_size": 0.1}),
    ):
        settings(**given).check()
    assert settings("rk4").grid() is None
    grid = settings("rk4", options={"step_size": 0.1, "interp": "cubic", "perturb": True}).grid()
    assert grid is not None and grid.interp == "cubic" and grid.perturb
    constructor = lambda f, x, t: t  # noqa: E731
    assert settings("rk4", options={"grid_constructor": constructor}).grid().constructor is constructor
    with pytest.raises(ValueError, match="interp"):
        settings("rk4", options={"interp": "square"}).grid()
    assert settings(options={"step_t": [0.5], "jump_t": double(0.25, 1.0)}).stops() == (
        [0.5, 0.25, 1.0],
        [0.25, 1.0],
    )
    for bad in ({"step_t": [0.5, 0.5]}, {"step_t": [0.5], "jump_t": [0.5]}, {"jump_t": [math.inf]}):
        with pytest.raises(ValueError, match="_t must"):
            settings(options=bad).stops()


def test_the_control_that_options_ask_for():
    y0 = double(1.0)
    c = settings(max_steps=7).control(y0, None)
    assert (c.rtol, c.atol, c.max_steps, c.per_output, c.first_step, c.min_step, c.max_step) == (
        1e-7,
        1e-9,
        7,
        False,
        None,
        0.0,
        math.inf,
    )
    assert (c.safety, c.shrink, c.grow, c.dtype) == (0.9, 0.2, 10.0, DOUBLE) and c.filter == pytest.approx(
        (0.85, -0.2, 0.0)
    )
    options = dict(
        max_num_steps=9,
        first_step=0.1,
        min_step=0.01,
        max_step=0.5,
        safety=0.8,
        dfactor=0.5,
        ifactor=2.0,
        controller="i",
        dtype=torch.float32,
    )
    c = settings(options=options).control(y0.float(), None)
    assert (c.max_steps, c.per_output, c.first_step, c.min_step, c.max_step, c.safety, c.shrink, c.grow) == (
        9,
        True,
        0.1,
        0.01,
        0.5,
        0.8,
        0.5,
        2.0,
    )
    assert c.dtype == torch.float32 and c.filter == (1.0, 0.0, 0.0) and (c.rtol, c.atol) == (1e-6, 1e-8)
    settings(options=dict(min_step=0.5, max_step=0.5, dfactor=1.0, ifactor=1.0, max_num_steps=1)).control(
        y0, None
    )
    for bad in (dict(max_num_steps=0), dict(min_step=0.6, max_step=0.5), dict(dtype=torch.float16), dict(dtype=torch.int64), dict(dfactor=1.1), dict(ifactor=0.9),
                dict(safety=0.0), dict(first_step=-1.0), dict(min_step=-0.1), dict(max_step=0.0), dict(safety=math.nan)):  # fmt: skip
        with pytest.raises(ValueError):
            settings(options=bad).control(y0, None)


def test_tolerances_for_a_dtype():
    assert tolerances(DOUBLE, None, None) == (1e-7, 1e-9) and tolerances(torch.complex128, None, None) == (
        1e-7,
        1e-9,
    )
    assert tolerances(DOUBLE, 0.1, 0.0) == (0.1, 0.0)
    with pytest.warns(UserWarning, match=r"rtol=1e-08 is finer than torch\.float32"):
        r, _ = tolerances(torch.float32, 1e-8, 1e-8)
    assert r == 4 * torch.finfo(torch.float32).eps
    each = double(1e-3, 1e-20)
    with pytest.warns(UserWarning, match="finer"):
        r, _ = tolerances(DOUBLE, each, 1e-8)
    assert r.tolist() == [1e-3, 4 * 2.0**-52]
    for rtol, atol in (
        (-1.0, 1.0),
        (0.0, 0.0),
        (math.inf, 1.0),
        (1.0, math.nan),
        (double(1.0, 0.0), double(1.0, 0.0)),
        (double(1.0).requires_grad_(), 1.0),
    ):
        with pytest.raises(ValueError, match="not both zero"):
            tolerances(DOUBLE, rtol, atol)


# -- why a solve failed ----------------------------------------------------------------------------


def test_numbers_in_words():
    assert [number(v) for v in (-1e6, 3.3066e-6, 0.5, 1 - 2j, 1e-20 + 1j, 2 + 1e-12j)] == [
        "−1e6",
        "3.31e-6",
        "0.5",
        "1 ± 2i",
        "1e-20 ± 1i",
        "2",
    ]


def test_eigenvalues_of_a_field():
    a = double(0.0, 1.0, -2.0, -3.0).reshape(2, 2)  # −1 and −2
    f = lambda t, x: x @ a.T  # noqa: E731
    x = double(1.0, 1.0)
    assert sorted(spectrum(f, 0.0, x, None).real.tolist()) == pytest.approx([-2, -1])
    batch = torch.stack([x, 2 * x, 3 * x])
    scaled = lambda t, x: (x @ a.T) * double(1.0, 2.0, 3.0)[:, None]  # noqa: E731
    assert sorted(spectrum(scaled, 0.0, batch, 1).real.tolist()) == pytest.approx([-4, -2])
    turning = lambda t, x: 2j * x  # noqa: E731
    assert sorted(
        spectrum(turning, 0.0, torch.ones(1, dtype=torch.complex128), None).imag.tolist()
    ) == pytest.approx([-2, 2])
    assert (
        spectrum(f, 0.0, double(1.0, math.nan), None) is None
        and spectrum(lambda t, x: 0 * x, 0.0, torch.zeros(0), None) is None
    )
    assert spectrum(lambda t, x: -x, 0.0, torch.ones(256, dtype=DOUBLE), None) is not None
    assert spectrum(lambda t, x: -x, 0.0, torch.ones(257, dtype=DOUBLE), None) is None
    assert (
        spectrum(lambda t, x: x.detach(), 0.0, x, None) is None
        and spectrum(lambda t, x: 1 / 0, 0.0, x, None) is None
    )


@pytest.mark.parametrize(
    ("values", "step", "left", "kind", "eigenvalue"),
    [([-1000.0, -1.0], 0.0009, 1.0, "stiff", -1000), ([-1000.0, -1.0], 0.0005, 1.0, "smooth", -1000), ([-1000.0], 0.0009, 0.019, "smooth", -1000),
     ([-1000.0], 0.0009, 0.021, "stiff", -1000), ([50.0], 0.1, 1.0, "growing", 50), ([50.0], 0.1, 0.5, "smooth", None), ([29.0], 1.0, 1.0, "smooth", None),
     ([31.0], 1.0, 1.0, "growing", 31), ([2.9], 1.0, 100.0, "growing", 2.9), ([0.4], 1e-3, 100.0, "smooth", None), ([0.0], 1.0, 1.0, "smooth", None), (None, 1.0, 1.0, "unknown", None)],
)  # fmt: skip
def test_what_eigenvalues_explain(values, step, left, kind, eigenvalue):
    """Stiff: the step is near the limit (from 0.3 of it on) and ten of them do not suffice; growing: e^30 before the end."""
    scale = {0.0009: 0.35, 0.0005: 0.25}.get(step)
    if scale:  # shares of heun2's limit 2/1000
        step = scale * 0.002
    found = explain(
        METHODS["heun2"], None if values is None else torch.tensor(values, dtype=torch.complex128), step, left
    )
    assert found[0] == kind and (
        found[2] == pytest.approx(eigenvalue)
        if (eigenvalue is not None and kind != "smooth") or eigenvalue == -1000
        else True
    )
    if kind == "stiff":
        assert found[1] == "stiff: λ ≈ −1e3; heun2 needs steps below 0.002"
    if kind == "growing":
        assert (
            f"λ ≈ {number(eigenvalue)}, so differences grow e-fold every {number(1 / eigenvalue)}" in found[1]
        )
    if kind == "smooth":
        assert found[1].startswith("not stiff: ") and (
            ("allows heun2 steps up to 0.002" in found[1]) == (eigenvalue == -1000)
        )


def standing(f, step=0.1, end=1.0, x=None, sample=None, several=False, method="heun2") -> Standing:
    x = double(1.0) if x is None else x
    return Standing(METHODS[method], f, 0.0, x, sample, 0.25, step, end, several)


def decay(rate):
    return lambda t, x: -rate * x


def test_errors_of_a_solve_that_could_not_go_on():
    stiff, smooth, growing, unknown = (
        standing(f, s)
        for f, s in (
            (decay(1000.0), 0.001),
            (decay(1.0), 1e-3),
            (decay(-100.0), 0.1),
            (lambda t, x: x.detach(), 0.1),
        )
    )
    for at, words, eigenvalue in (
        (stiff, "steps below 0.002. Try method=", -1000), (smooth, "the tolerance asks for shorter ones", -1), (growing, "End the interval before", 100),
        (unknown, "or, if it is stiff, try method=", None)):  # fmt: skip
        error = too_many_steps(at, 50)
        assert (
            isinstance(error, MaxStepsReached)
            and words in str(error)
            and "max_steps=50 attempted steps ended at t=0.25, with a step of" in str(error)
        )
        assert "before 1." in str(error) and error.eigenvalue == (
            None if eigenvalue is None else pytest.approx(eigenvalue)
        )
        assert (error.time, error.step_size, error.sample) == (0.25, at.step, None)
    assert "without an event. Check event_fn's sign" in str(
        too_many_steps(standing(decay(1.0), end=math.inf), 50)
    )
    for at, words in (
        (stiff, "Try method="),
        (growing, "end the interval before"),
        (smooth, "so the field is discontinuous there"),
        (unknown, "the field is discontinuous or stiff there"),
    ):
        error = step_underflow(at)
        assert isinstance(error, StepSizeUnderflow) and words in str(error) and error.time == 0.25
    row = standing(decay(1.0), x=torch.ones(3, 1, dtype=DOUBLE), sample=2, several=True)
    assert (
        "t=0.25, sample 2, with a step of 0.1" in str(row)
        and step_underflow(row).sample == 2
        and row.own.shape == (1,)
    )
    assert (
        field_not_finite(row, double(0.0, 0.0, math.nan)[:, None])
        .args[0]
        .startswith(
            "the field is not finite at t=0.25, sample 2, before the first step: F(x) holds nan at entry [0]"
        )
    )


def test_errors_where_nothing_is_finite():
    bad = [double(math.inf)]
    edge = nothing_finite(standing(decay(1.0)), bad)
    assert isinstance(edge, NonFiniteField) and "holds inf at entry [0] at a finite state" in str(edge)
    assert isinstance(nothing_finite(standing(decay(1.0)), [double(0.0)]), NonFiniteState)
    assert isinstance(nothing_finite(standing(decay(1.0), x=double(1.1e6)), bad), NonFiniteState)
    assert isinstance(nothing_finite(standing(decay(1.0), x=double(0.9e6)), bad), NonFiniteField)
    blowing = nothing_finite(standing(decay(-100.0)), bad)
    assert isinstance(blowing, NonFiniteState) and "Growing: λ ≈ 100" in str(blowing)


def test_errors_of_newtons_method():
    """I − ηγJ is near singular where ηλ = 1 for implicit Euler, to a tenth; backwards where ηλ = −1."""
    for rate, named in ((-9.2, True), (-8.8, False), (-10.8, True), (-11.2, False), (10.0, False)):
        error = newton_failed(standing(decay(rate), method="implicit_euler"), 7.0, 0.9)
        assert isinstance(error, NewtonNotConverged) and ("near singular" in str(error)) is named
        assert (error.residual, error.rate) == (
            7.0,
            0.9,
        ) and "7 times what was asked, 0.9 times the one before" in str(error)
        assert error.eigenvalue == (pytest.approx(-rate) if named else None)
    assert "the step times λ is 1, near 1" in str(
        newton_failed(standing(decay(-10.0), method="implicit_euler"), 7.0, 0.9)
    )
    assert "near singular" in str(
        newton_failed(standing(decay(10.0), method="implicit_euler", end=-1.0), 7.0, 0.9)
    )
    halved = str(newton_failed(standing(decay(-20.0), method="implicit_midpoint"), math.inf, math.inf))
    assert (
        "0.5 times the step times λ is 1" in halved
        and "correction was not finite. The" in halved
        and "jump_t" in halved
    )
    assert "Take shorter steps" in str(
        newton_failed(standing(decay(1.0), method="implicit_euler"), 7.0, 0.9, fixed=True)
    )


def test_statistics_of_the_only_sample():
    one = Stats(nfe=torch.tensor([8]), n_steps=None, n_accepted=torch.tensor([2]), n_rejected=0).item()
    assert one == Stats(8, None, 2, 0)
