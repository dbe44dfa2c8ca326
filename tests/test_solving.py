"""Batches against single samples, coupled systems, and fields that are stiff, chaotic or not smooth."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import van_der_pol

import resode
from resode import METHODS, odeint, odeint_adjoint

DOUBLE = torch.float64
ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
EXPLICIT = [name for name, tableau in METHODS.items() if tableau.explicit]


def times(*values):
    return torch.tensor(values, dtype=DOUBLE)


def oscillators(t, y):
    """Van der Pol's equation, each row with a stiffness of its own in the last entry."""
    return torch.cat([van_der_pol(t, y[:, :2], y[:, 2]), 0 * y[:, 2:]], -1)


def test_a_batch_of_256_equals_its_samples_one_by_one():
    generator = torch.Generator().manual_seed(0)
    y0 = torch.rand(256, 3, generator=generator, dtype=DOUBLE) * torch.tensor([4.0, 4.0, 3.0]) - torch.tensor(
        [2.0, 2, 0]
    )
    t = times(0.0, 0.4, 1.0)
    kw = dict(rtol=1e-5, atol=1e-5, per_sample=True, return_stats=True)
    together, stats = odeint(oscillators, y0, t, **kw)
    alone, counts = zip(*(odeint(oscillators, row, t, **kw) for row in y0.split(1)), strict=True)
    assert (together - torch.cat(alone, 1)).abs().max() < 1e-9
    assert torch.equal(stats.n_accepted, torch.cat([s.n_accepted for s in counts]))
    assert torch.equal(stats.nfe, torch.cat([s.nfe for s in counts]))
    assert stats.n_steps.max() > 2 * stats.n_steps.min(), "the samples should differ"


def test_a_hard_neighbour_neither_steers_nor_stops_an_easy_sample():
    rates = torch.tensor([[1.0], [3000.0]], dtype=DOUBLE)

    def field(t, y):
        return -rates[: len(y)] * (y - torch.cos(t))

    y0, t = torch.zeros(2, 1, dtype=DOUBLE), times(0.0, 1.0)
    both, stats = odeint(field, y0, t, per_sample=True, rtol=1e-6, atol=1e-6, return_stats=True)
    alone, one = odeint(field, y0[:1], t, per_sample=True, rtol=1e-6, atol=1e-6, return_stats=True)
    assert torch.equal(both[:, :1], alone) and stats.nfe[0] == one.nfe[0]
    assert stats.nfe[1] > 20 * stats.nfe[0]


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("end", [1.5, -1.5])
def test_a_coupled_system_is_its_matrix_exponential(method, end):
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(12, 12, generator=generator, dtype=DOUBLE)
    y0 = torch.randn(12, generator=generator, dtype=DOUBLE)
    y = odeint(lambda t, y: matrix @ y, y0, times(0.0, end / 3, end), method=method, rtol=1e-7, atol=1e-7)
    for s, state in zip((end / 3, end), y[1:], strict=True):
        exact = torch.linalg.matrix_exp(matrix * s) @ y0
        assert (state - exact).norm() / exact.norm() < 3e-5


@pytest.mark.parametrize("method", [m for m in ADAPTIVE if METHODS[m].explicit])
def test_a_stiff_field_costs_what_its_stability_interval_says(method):
    """y' = −λ(y − cos t): after the transient the steps settle at the real stability interval over λ."""
    rate = 500.0
    _, stats = odeint(lambda t, y: -rate * (y - torch.cos(t)), times(0.0), times(0.0, 4.0), method=method,
                      rtol=1e-4, atol=1e-4, return_stats=True)  # fmt: skip
    expected = 4 * rate / resode.real_stability_interval(method)
    assert 0.8 * expected < stats.n_accepted < 1.8 * expected


def test_a_chaotic_field_follows_the_reference_until_errors_have_grown():
    """Lorenz: errors grow like e^{0.9t}; at tolerance 1e-9 two methods agree to 1e-5 up to t = 8."""

    def lorenz(t, y):
        a, b, c = y.unbind(-1)
        return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)

    y0, t = torch.ones(3, dtype=DOUBLE), times(0.0, 3.0, 8.0)
    a, b = (odeint(lorenz, y0, t, method=m, rtol=1e-9, atol=1e-9) for m in ("dopri5", "dopri8"))
    assert (a[1] - b[1]).abs().max() < 1e-6 and (a[2] - b[2]).abs().max() < 1e-5


def kernel(tableau, theta):
    """The error Σbᵢ(cᵢ − θ)₊ − (1 − θ)²/2 of a step of 1 over a kink at θ where y' bends by 1.

    An error estimate sees what the embedded weights make of the same sum, which may be 0: no tolerance bounds
    the error, but where the steps ended, it is known.
    """
    past = np.maximum(np.array(tableau.c, float) - theta, 0)
    return np.array(tableau.b, float) @ past - (1 - theta) ** 2 / 2


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_kink_is_passed_with_short_steps_and_the_error_of_the_method(method):
    """y' = |sin t| bends by 2 at multiples of π: a step of h over one errs by 2h²·kernel, and by O(h⁴) more.

    The other steps err by what the method's weights make of a sine. Both follow from where the steps ended,
    which depends on rounding; y(10) = 6 + 1 − |cos 10|, signed by the last arch.
    """
    tableau, end = METHODS[method], 10.0
    tol = 1e-7 if tableau.explicit else 1e-5  # sdirk2 would take 5,000 steps
    kinks, smooth, remainder = 0.0, 0.0, 0.0
    for step in resode.steps(
        lambda t, y: torch.sin(t).abs() + 0 * y, times(0.0), (0.0, end), method, rtol=tol, atol=tol
    ):
        h = step.time - step.start
        inside = [k * math.pi for k in (1, 2, 3) if step.start < k * math.pi < step.time]
        for kink in inside:
            kinks += 2 * h**2 * kernel(tableau, (kink - step.start) / h)
            remainder += h**4
        if not inside:
            slopes = np.abs(np.sin(step.start + np.array(tableau.c, float) * h))
            smooth += h * np.array(tableau.b, float) @ slopes - abs(
                math.cos(step.start) - math.cos(step.time)
            )
    error = step.state.item() - (2 * 3 + 1 - math.cos(end - 3 * math.pi))
    assert abs(error - kinks - smooth) < remainder + 1e-11
    assert max(abs(kinks), remainder) > 1e-9, "kinks lie inside steps"
    y, stats = odeint(lambda t, y: torch.sin(t).abs() + 0 * y, times(0.0), times(0.0, end), method=method,
                      rtol=tol, atol=tol, return_stats=True)  # fmt: skip
    assert y[-1].item() == pytest.approx(step.state.item(), abs=1e-11)
    assert stats.n_rejected > 2


def test_a_relu_field_errs_at_its_kinks_as_the_method_does():
    """y' = relu(g), g = sin 5t − y, bends by |5 cos 5t| where g = 0, and forgets with e^{−t} where g > 0.

    At tolerance 1e-6 the errors are 2e-6 to 9e-5. ∂F/∂y is 0 or −1, so that stages within a step of h know of
    a kink's error to O(h): what the kernel does not foretell is a few parts in a hundred.
    """

    def field(t, y):
        return torch.relu(torch.sin(5 * t) - y)

    y0 = times(-1.2, -1.05, -1.0, -0.8, -0.5, 0.0)
    unforeseen, errors = 0.0, []
    for start in y0.split(1):
        fine = list(resode.steps(field, start, (0.0, 3.0), "dopri8", rtol=1e-11, atol=1e-11))
        coarse = list(resode.steps(field, start, (0.0, 3.0), rtol=1e-6, atol=1e-6))

        def g(t, fine=fine):
            return math.sin(5 * t) - next(s for s in fine if s.time >= t)(t).item()

        ends = [0.0, *(s.time for s in fine)]
        crossed = [(a, b) for a, b in itertools.pairwise(ends) if g(a) * g(b) < 0]
        kinks = [scipy.optimize.brentq(g, a, b) for a, b in crossed]
        assert len(kinks) == 4
        foretold = 0.0
        for kink in kinks:
            after = [0.0, *(k - kink for k in kinks if k >= kink), 3.0 - kink]
            active = sum(b - a for a, b in itertools.pairwise(after) if g(kink + (a + b) / 2) > 0)
            step = next(s for s in coarse if s.time >= kink)
            h = step.time - step.start
            bend = h**2 * abs(5 * math.cos(5 * kink)) * kernel(METHODS["dopri5"], (kink - step.start) / h)
            foretold += bend * math.exp(-active)
        errors.append(coarse[-1].state.item() - fine[-1].state.item())
        unforeseen += abs(errors[-1] - foretold)
    assert unforeseen < 0.2 * np.abs(errors).sum()
    assert np.abs(errors).max() > 1e-5, "the estimate does not see them"


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 3), min_size=0, max_size=3),
    start=st.floats(-2, 2),
    span=st.floats(0.05, 1.0),
    backward=st.booleans(),
    method=st.sampled_from(EXPLICIT),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.complex128]),
    time_dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_adjoint_of_decay_for_any_shape_time_and_dtype(
    shape, start, span, backward, method, dtype, time_dtype
):
    """y' = −wy: y1 = e^{−wT} y0, ∂Σ|y1|²/∂w = −2T Σ|y1|²."""
    t = torch.tensor([start, start - span if backward else start + span], dtype=time_dtype)
    w = torch.tensor(0.5, dtype=dtype.to_real(), requires_grad=True)
    y0 = torch.linspace(1, 2, max(math.prod(shape), 1)).to(dtype).reshape(shape).requires_grad_()
    steps = {} if METHODS[method].adaptive else {"n_steps": 200 if METHODS[method].order < 3 else 20}
    tol = 1e-5 if dtype.to_real() == torch.float32 else 1e-7
    y = odeint_adjoint(
        lambda t, y: -w * y, y0, t, adjoint_params=(w,), method=method, rtol=tol, atol=tol, **steps
    )
    assert y.shape == (2, *shape) and y.dtype == dtype
    length = float(t[1] - t[0])
    total = y[-1].abs().square().sum()
    dy, dw = torch.autograd.grad(total, [y0, w])
    close = 5e-3
    assert torch.allclose(y[-1], y0 * math.exp(-0.5 * length), rtol=close)
    assert dw.item() == pytest.approx(-2 * length * total.item(), rel=close, abs=close)
    assert torch.allclose(dy, 2 * math.exp(-length) * y0.detach(), rtol=close)
