"""The solvers' answers against exact solutions, and every wrong argument against its message."""

import math

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import pair, pair_exact, riccati, riccati_exact, van_der_pol

import resode
from resode import METHODS, odeint
from resode.solve.foreign import foreign_methods

EXPLICIT = [name for name, tableau in METHODS.items() if tableau.explicit]
ADAPTIVE = [name for name in EXPLICIT if METHODS[name].adaptive]
DOUBLE = torch.float64


def times(*values, **kwargs):
    return torch.tensor(values, dtype=DOUBLE, **kwargs)


@pytest.mark.parametrize("method", EXPLICIT)
def test_observed_order_is_the_declared_order(method):
    """Nonlinear and non-autonomous on purpose: x' = Ax cannot see the condition Σ b c² = 1/3."""
    y0 = pair_exact(0.0)
    n = 4 if method == "dopri8" else 32
    errors = [
        (odeint(pair, y0, times(0.0, 2.0), method=method, n_steps=k)[-1] - pair_exact(2.0)).abs().max()
        for k in (n, 2 * n)
    ]
    assert math.log2(errors[0] / errors[1]) >= METHODS[method].order - 0.2


@pytest.mark.parametrize("method", EXPLICIT)
def test_fixed_steps_cost_what_the_tableau_says(method):
    """s calls a step; a last stage that only the next step needs is not evaluated."""
    tableau = METHODS[method]
    _, stats = odeint(riccati, times(1.0), times(0.0, 1.0, 2.0), method=method, n_steps=3, return_stats=True)
    assert stats.nfe == 6 * (tableau.stages - tableau.fsal)
    assert (stats.n_steps, stats.n_accepted, stats.n_rejected) == (6, 6, 0)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_error_follows_the_tolerance(method, per_sample):
    """Every output, between steps too, within 100 times the tolerance; and it shrinks with it."""
    t = torch.linspace(0, 2, 23, dtype=DOUBLE)
    y0 = torch.linspace(0.5, 1.5, 5, dtype=DOUBLE)[:, None]
    exact = riccati_exact(t[:, None, None], y0)
    errors = []
    for tol in (1e-4, 1e-8):
        y = odeint(riccati, y0, t, method=method, rtol=tol, atol=tol, per_sample=per_sample)
        errors.append(float((y - exact).abs().max()))
        assert errors[-1] < 100 * tol
    assert errors[1] < errors[0] / 100


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_sample_does_not_depend_on_its_neighbours(method):
    y0 = torch.linspace(-2, 2, 14, dtype=DOUBLE).reshape(7, 2)
    t = torch.linspace(0, 3, 9, dtype=DOUBLE)
    options = dict(method=method, rtol=1e-6, atol=1e-6, per_sample=True, return_stats=True)
    together, stats = odeint(van_der_pol, y0, t, **options)
    for i in range(len(y0)):
        alone, one = odeint(van_der_pol, y0[i : i + 1], t, **options)
        assert torch.allclose(together[:, i : i + 1], alone, rtol=0, atol=1e-9)
        assert stats.n_accepted[i] == one.n_accepted[0]
        assert stats.n_steps[i] == stats.n_accepted[i] + stats.n_rejected[i]
    assert len(set(stats.n_steps.tolist())) > 1, "the samples should need different steps"


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_way_back_leads_to_the_start(method, per_sample):
    """Decreasing t solves the same equation; func is never asked outside [t0, t1], to the last bit."""
    seen = []

    def field(t, y):
        seen.append((float(t.min()), float(t.max())))
        return riccati(t, y)

    y0 = torch.ones(2, 1, dtype=DOUBLE)
    steps = dict(rtol=1e-9, atol=1e-9) if METHODS[method].adaptive else dict(n_steps=700)
    there = odeint(field, y0, times(0.1, 0.8), method=method, per_sample=per_sample, **steps)
    back = odeint(field, there[-1], times(0.8, 0.1), method=method, per_sample=per_sample, **steps)
    assert torch.allclose(back[-1], y0, rtol=0, atol=2e-3 if method == "euler" else 2e-6)
    assert min(low for low, _ in seen) >= 0.1
    assert max(high for _, high in seen) <= 0.8


def test_agrees_with_torchdiffeq_where_both_have_the_method():
    """The same coefficients: equal steps give equal states; its rk4 is the 3/8 rule."""
    y0 = times(1.0, -0.5)
    t = torch.linspace(0, 2, 11, dtype=DOUBLE)
    for ours, theirs in [("euler", "euler"), ("midpoint", "midpoint"), ("rk4_38", "rk4")]:
        expected = torchdiffeq.odeint(van_der_pol, y0, t, method=theirs)
        assert torch.allclose(
            odeint(van_der_pol, y0, t, method=ours, n_steps=1), expected, rtol=1e-13, atol=1e-13
        )
    assert not torch.allclose(
        odeint(van_der_pol, y0, t, method="rk4", n_steps=1), torchdiffeq.odeint(van_der_pol, y0, t, method="rk4"),
        rtol=1e-7,
    )  # fmt: skip
    # Not dopri8: theirs ends on an interpolant of order 4, ours on a step.
    for method, tol in [("bosh3", 1e-6), ("dopri5", 1e-9)]:
        expected = torchdiffeq.odeint(van_der_pol, y0, t, method=method, rtol=tol, atol=tol)
        got = odeint(van_der_pol, y0, t, method=method, rtol=tol, atol=tol)
        assert torch.allclose(got[-1], expected[-1], rtol=0, atol=100 * tol)


def test_other_methods_go_to_torchdiffeq():
    y0, t = times(1.0), torch.linspace(0, 1, 21, dtype=DOUBLE)
    y, stats = odeint(riccati, y0, t, method="implicit_adams", return_stats=True)
    capped = {"max_order": 4}  # theirs climbs to 12 and fails on long grids
    assert torch.equal(y, torchdiffeq.odeint(riccati, y0, t, method="implicit_adams", options=capped))
    assert stats.nfe > 20 and stats.n_steps is None
    assert "implicit_adams" in foreign_methods()
    # In float32 too its own tolerances hold, which are finer than those of the methods here.
    y0, t = y0.float(), t.float()
    expected = torchdiffeq.odeint(riccati, y0, t, method="fehlberg2")
    assert torch.equal(odeint(riccati, y0, t, method="fehlberg2"), expected)


@pytest.mark.parametrize("options", [dict(method="rk4", n_steps=2), {}, dict(per_sample=True)])
def test_a_field_that_changes_the_state_in_place_is_refused(options):
    """It would change the step's start under the solver: a wrong result without a word."""
    for y0 in (torch.ones(2, 1), (torch.ones(2), torch.ones(1))):
        if isinstance(y0, tuple) and "per_sample" in options:
            continue

        def field(t, y):
            return y.mul_(-1) if isinstance(y, torch.Tensor) else tuple(p.mul_(-1) for p in y)

        with pytest.raises(ValueError, match="changed y in place"):
            odeint(field, y0, torch.tensor([0.0, 1.0]), **options)


@pytest.mark.parametrize("options", [dict(method="euler"), dict(method="tsit5"), dict(per_sample=True)])
def test_unused_parameters_get_zero(options):
    """Even where the field uses none, is complex, or t holds one time."""
    field = torch.nn.Module()
    field.a = torch.nn.Parameter(torch.ones(2, 3))
    field.b = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    field.forward = lambda t, y: -y
    for t in ([0.0], [0.0, 0.5, 1.0]):
        y = odeint(field, torch.ones(2, 1), torch.tensor(t), **options)
        grads = torch.autograd.grad(y.sum(), [field.a, field.b])
        assert all(
            torch.equal(g, torch.zeros_like(p)) for g, p in zip(grads, field.parameters(), strict=True)
        )


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", ["euler", "rk4", "bosh3", "dopri5", "fehlberg45"])
def test_gradients_of_state_times_and_parameters(method, per_sample):
    y0 = torch.tensor([[0.4, -0.3], [1.0, 0.2]], dtype=DOUBLE, requires_grad=True)
    t = times(0.0, 0.3, 0.7, requires_grad=True)
    rate = times(0.7, requires_grad=True)
    steps = dict(rtol=1e-8, atol=1e-8) if METHODS[method].adaptive else dict(n_steps=4)

    def solve(y0, t, rate):
        return odeint(lambda s, y: torch.tanh(rate * y) * torch.cos(s), y0, t, method=method,
                      per_sample=per_sample, **steps)  # fmt: skip

    assert torch.autograd.gradcheck(solve, (y0, t, rate), eps=1e-6, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_states_of_every_kind(method):
    steps = dict(rtol=1e-9, atol=1e-9) if method == "dopri5" else dict(n_steps=200)
    t = times(0.0, 1.0)
    scalar = odeint(lambda t, y: -y, torch.tensor(1.0, dtype=DOUBLE), t, method=method, **steps)
    assert scalar.shape == (2,) and float(scalar[-1]) == pytest.approx(math.exp(-1), abs=1e-8)
    spin = odeint(lambda t, y: 1j * y, torch.ones(1, dtype=torch.complex128), t, method=method, **steps)
    assert complex(spin[-1, 0]) == pytest.approx(complex(math.cos(1), math.sin(1)), abs=1e-8)
    a, b = odeint(lambda t, y: (y[1].reshape(1), -y[0].reshape(1, 1)), (times(0.0), times(1.0).reshape(1, 1)), t,
                  method=method, **steps)  # fmt: skip
    assert a.shape == (2, 1) and b.shape == (2, 1, 1)
    assert (float(a[-1]), float(b[-1])) == pytest.approx((math.sin(1), math.cos(1)), abs=1e-8)
    single = odeint(
        lambda t, y: -y,
        torch.ones(1, dtype=torch.float32),
        t,
        method=method,
        **(steps if method == "rk4" else {}),
    )
    assert single.dtype == torch.float32 and float(single[-1]) == pytest.approx(math.exp(-1), abs=1e-5)
    assert odeint(lambda t, y: -y, times(2.0), times(0.5), method=method).tolist() == [[2.0]]


def test_args_reach_the_field_and_step_size_is_the_largest_step():
    y, stats = odeint(lambda t, y, a, b: a * y + b, times(1.0), times(0.0, 1.0), method="rk4", args=(0.0, 2.0),
                      step_size=0.3, return_stats=True)  # fmt: skip
    assert float(y[-1]) == pytest.approx(3.0)
    assert stats.n_steps == 4, "four steps of 0.25, the fewest that are at most 0.3"
    assert (
        odeint(riccati, times(1.0), times(0.0, 1.0), method="euler", step_size=0.1, return_stats=True)[
            1
        ].n_steps
        == 10
    )


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    start=st.floats(-3, 3),
    spans=st.lists(st.floats(0.01, 0.5), min_size=1, max_size=4),
    backward=st.booleans(),
    method=st.sampled_from(ADAPTIVE),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    per_sample=st.booleans(),
)
def test_linear_growth_for_any_shape_time_and_dtype(shape, start, spans, backward, method, dtype, per_sample):
    """y' = −y/2 from any state, at any increasing or decreasing times."""
    sign = -1.0 if backward else 1.0
    t = torch.tensor([start, *(start + sign * sum(spans[: i + 1]) for i in range(len(spans)))], dtype=DOUBLE)
    y0 = torch.linspace(1, 2, math.prod(shape), dtype=dtype).reshape(shape)
    y = odeint(lambda t, y: -y / 2, y0, t, method=method, per_sample=per_sample, rtol=1e-5, atol=1e-5)
    exact = y0.double() * torch.exp(-(t - t[0]) / 2).reshape(-1, *[1] * len(shape))
    assert y.shape == (len(t), *shape) and y.dtype == dtype
    assert torch.allclose(y.double(), exact, rtol=1e-3, atol=1e-4)


ONE, SPAN = torch.ones(1), torch.tensor([0.0, 1.0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(t=torch.tensor([0.0, 1.0, 0.5])), ValueError, r"t\[1\]=1 is followed by t\[2\]=0.5"),
        (dict(t=torch.tensor([0.0, 1.0, 0.5])), ValueError, "must be increasing"),
        (dict(t=torch.tensor([])), ValueError, "at least one time"),
        (dict(t=torch.tensor([[0.0, 1.0]])), ValueError, r"shape \(1, 2\)"),
        (dict(t=torch.tensor([0.0, math.inf])), ValueError, "t must be finite"),
        (dict(t=torch.tensor([0, 1])), TypeError, "floating tensor of times, got torch.int64"),
        (dict(y0=torch.ones(1, dtype=torch.int64)), TypeError, "floating or complex, got torch.int64"),
        (dict(y0=torch.tensor([math.nan])), ValueError, "y0 must be finite"),
        (dict(y0=[1.0]), TypeError, r"y0\[0\] is a float"),
        (dict(method="rk5"), ValueError, "unknown method 'rk5'.*euler.*implicit_adams"),
        (dict(options={"step": 1}), ValueError, r"unknown options \['step'\] for dopri5; it takes first_step, "),
        (dict(method="implicit_adams", options={"max_ordr": 3}), ValueError, "max_ordr"),
        (dict(method="implicit_adams", n_steps=3), ValueError, "solved by torchdiffeq"),
        (dict(rtol=-1.0), ValueError, "not negative"),
        (dict(rtol=0.0, atol=0.0), ValueError, "not both zero"),
        (dict(step_size=0.0), ValueError, "step_size must be positive"),
        (dict(step_size=0.1, n_steps=1), ValueError, "not both"),
        (dict(n_steps=0), ValueError, "at least 1, got 0"),
        (dict(n_steps=2.5), ValueError, "whole number of at least 1, got 2.5"),
        (dict(per_sample=True), ValueError, r"got \(1,\)"),
        (dict(per_sample=True, y0=(ONE, ONE)), ValueError, "got a tuple"),
        (dict(y0=(ONE, ONE.double())), ValueError, "share one dtype"),
        (dict(func=lambda t, y: y[:0]), ValueError, r"got x \(1,\), F\(x\) \(0,\)"),
        (dict(func=lambda t, y: y.double()), TypeError, "x is torch.float32, F.x. torch.float64"),
        (dict(func=lambda t, y: 1.0), TypeError, "must return a tensor of the state's shape, got float"),
        (dict(func=lambda t, y: y / 0), resode.NonFiniteField, "t=0"),
        (dict(func=lambda t, y: y * y, t=torch.tensor([0.0, 2.0])), resode.SolverError, r"t=1(\.0|,)|t=0\.99"),
        (dict(func=lambda t, y: -1e4 * y, max_steps=20), resode.MaxStepsReached, "max_steps=20.*t=0.0"),
        (dict(func=lambda t, y: 100 * y * y, method="euler", n_steps=50), resode.NonFiniteState, "t=1,.*: euler"),
    ],
)  # fmt: skip
def test_wrong_arguments_and_failed_solves_say_what_came_and_what_to_do(change, error, message):
    arguments = {"func": lambda t, y: -y, "y0": ONE, "t": SPAN, **change}
    with pytest.raises(error, match=message):
        odeint(**arguments)


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match="stepsize"):
        odeint(riccati, ONE, SPAN, stepsize=0.1)


def test_a_discontinuity_that_no_step_resolves_is_named():
    """Noise of size 1 can't be integrated to 1e-9 by any step."""
    generator = torch.Generator().manual_seed(0)
    with pytest.raises((resode.StepSizeUnderflow, resode.MaxStepsReached), match="t="):
        odeint(
            lambda t, y: 1e6 * torch.randn(y.shape, generator=generator, dtype=DOUBLE),
            times(1.0),
            times(0.0, 1.0),
            max_steps=300,
        )


def test_one_samples_blow_up_is_named_and_its_infinities_touch_no_other_gradient():
    y0 = torch.tensor([[0.1], [1.0]], dtype=DOUBLE)
    with pytest.raises(resode.SolverError, match="sample 1"):
        odeint(lambda t, y: y * y, y0, times(0.0, 2.0), rtol=1e-2, atol=1e-2, per_sample=True)
    y0.requires_grad_()
    # A first step of sample 1 leaves the root's domain and is NaN; it is repeated with a shorter one.
    y = odeint(lambda t, y: -torch.sqrt(y) * 30, y0, times(0.0, 0.018), rtol=1e-4, atol=1e-4, per_sample=True)
    exact = (y0.sqrt() - 15 * 0.018) ** 2
    assert torch.allclose(y[-1], exact, atol=1e-3)
    (gradient,) = torch.autograd.grad(y[-1].sum(), y0)
    assert torch.allclose(gradient, 1 - 15 * 0.018 / y0.detach().sqrt(), atol=1e-2)


def test_a_tolerance_finer_than_the_dtype_is_clamped_with_a_warning():
    with pytest.warns(UserWarning, match="rtol=1e-12 is finer than torch.float32 resolves; 4.8e-07"):
        odeint(riccati, ONE, SPAN, rtol=1e-12)


def test_a_fixed_method_without_a_step_warns_of_its_single_step():
    with pytest.warns(UserWarning, match="rk4 takes one step"):
        odeint(riccati, ONE, SPAN, method="rk4")
