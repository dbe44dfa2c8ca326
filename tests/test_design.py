"""Methods made for a spectrum: the largest steps that theory knows, rounding, fields, stacks, and what is refused."""

import math

import numpy as np
import pytest
import torch

import resode
from resode import ResidualStack, design_method, max_stable_step, odeint
from resode.stability.optimal import rounding_growth
from tests.benchmarks.optimal import chebyshev, negative_axis, solved

DOUBLE = torch.float64
CIRCLE = -1 + np.exp(1j * np.linspace(0, np.pi, 60))


def step_of(values, *args, **settings):
    return float(max_stable_step(eigenvalues=values, solver=design_method(values, *args, **settings)))


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8, 12])
def test_the_negative_axis_is_held_up_to_2s2(stages):
    """Chebyshev's polynomials T_s(1 + z/s²) are the optimum."""
    assert step_of([-1.0], stages) == pytest.approx(2 * stages**2, rel=1e-6)


@pytest.mark.parametrize("stages", [1, 2, 3, 6, 10])
def test_the_disc_is_held_up_to_s(stages):
    """(1 + z/s)^s, s Euler steps, is the optimum (Jeltsch & Nevanlinna 1981)."""
    assert step_of(CIRCLE, stages) == pytest.approx(stages, rel=1e-5)


@pytest.mark.parametrize(
    ("stages", "order"), [(2, 1), (3, 1), (3, 2), (4, 1), (5, 2), (8, 1), (9, 2), (13, 2)]
)
def test_the_imaginary_axis_is_held_up_to_s_less_1(stages, order):
    """Of order 1, and of order 2 where s is odd (Kinnmark & Gray 1984; Vichnevetsky 1983)."""
    assert step_of([1j], stages, order) == pytest.approx(stages - 1, rel=1e-5)


OPTIMA = [  # by tests.benchmarks.optimal
    (negative_axis(), 4, 2, "12.0467661892151902523172608218"),
    (negative_axis(), 8, 2, "51.5226859830920392368280060915"),
    (negative_axis(), 12, 2, "117.274763971012398700275940211"),
    (chebyshev(10), 4, 1, "0.42584063615823581657947174364"),
    (chebyshev(10), 6, 2, "0.673199087481967172629898678767"),
    (chebyshev(20), 8, 1, "0.269676043869543274278559720439"),
    (chebyshev(20), 8, 2, "0.257005444241375605073311718664"),
]


@pytest.mark.parametrize(("values", "stages", "order", "optimum"), OPTIMA)
def test_designs_reach_the_optimum(values, stages, order, optimum):
    """Within 1e-6, the margin by which |R| stays below 1; never above."""
    step = step_of(values, stages, order)
    assert step <= float(optimum) * (1 + 1e-9) and step == pytest.approx(float(optimum), rel=1e-6)


def test_the_optimum_by_50_digits_is_the_one_above():
    assert solved(negative_axis(), 4, 2)[0] == pytest.approx(float(OPTIMA[0][3]), rel=1e-14)


@pytest.mark.parametrize("values", [[-1.0], [1j], CIRCLE, chebyshev(20), [-0.01, -1, -30, -0.5 + 6j]])
def test_no_point_of_a_ray_lies_outside(values):
    """By values of R, densely, up to the step; and it is left soon after."""
    values = np.asarray(values, dtype=complex)
    method = design_method(values, 7, 1, damping=0.01)
    step = float(max_stable_step(eigenvalues=values, solver=method))
    shares = np.linspace(0, 1, 20001)[:, None]
    sizes = resode.stability_function(method, torch.from_numpy(step * shares * values)).abs()
    assert sizes.max() <= 1 + 1e-12
    beyond = resode.stability_function(method, torch.from_numpy(1.02 * step * shares * values)).abs()
    assert beyond.max() > 1
    z = torch.from_numpy(0.98 * step * shares * values)  # |R| comes from 0.99 to 1 just before the step's end
    sizes = resode.stability_function(method, z).abs()
    assert sizes[z.abs() > 2].max() < 0.9901


@pytest.mark.parametrize(
    ("values", "stages", "order"),
    [([-1.0], 40, 1), ([-1.0], 20, 2), ([1j], 21, 2), (CIRCLE, 10, 1), (chebyshev(20), 20, 2)],
)
def test_rounding_grows_no_faster_than_rkcs(values, stages, order):
    """s² times a few at worst; and a step in float32 is right to that many roundings, by a diagonal field."""
    values = np.asarray(values, dtype=complex)
    method = design_method(values, stages, order)
    step = float(max_stable_step(eigenvalues=values, solver=method))
    z = step * np.linspace(0, 1, 400)[:, None] * values
    growth = rounding_growth(method, z.reshape(-1))
    assert growth <= 6 * stages**2
    assert 0 <= min(method.stage_times) + 1e-12 and max(method.stage_times) <= 1 + 1e-12
    scale = torch.from_numpy(z.reshape(-1)).to(torch.complex64)  # what both precisions hold alike
    ends = []
    for dtype in (torch.float32, DOUBLE):
        re, im = scale.real.to(dtype), scale.imag.to(dtype)

        def field(t, y, re=re, im=im):
            return torch.stack([re * y[0] - im * y[1], im * y[0] + re * y[1]])

        y0 = torch.ones(2, len(scale), dtype=dtype)
        ends.append(odeint(field, y0, torch.tensor([0.0, 1.0], dtype=dtype), method=method, n_steps=1)[-1])
    assert (ends[0] - ends[1]).abs().max() < min(growth * 2.0**-23, 5e-4)


@pytest.mark.parametrize(("values", "order"), [([-1.0], 1), ([-1.0], 2), ([1j], 2), (CIRCLE, 2)])
def test_orders_on_a_field_that_is_not_linear(values, order):
    method = design_method(values, 5, order)
    assert method.order == order
    y0, t = torch.tensor([0.5], dtype=DOUBLE), torch.tensor([0.0, 1.0], dtype=DOUBLE)
    field = lambda t, y: torch.sin(3 * t) - y * y  # noqa: E731
    exact = odeint(field, y0, t, rtol=1e-12, atol=1e-12)[-1]
    errors = [float((odeint(field, y0, t, method=method, n_steps=n)[-1] - exact).abs()) for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_higher_orders_are_linear_and_say_so():
    with pytest.warns(UserWarning, match="order 4 of a designed method holds for linear fields alone"):
        method = design_method([-1.0], 6, 4)
    assert method.order == 2 and "order 4 on linear fields" in method.source
    y = torch.ones(1, dtype=DOUBLE)
    errors = [
        abs(float(odeint(lambda t, y: -y, y, torch.tensor([0.0, 1.0]).double(), method=method, n_steps=n)[-1]) - math.exp(-1))
        for n in (2, 4)
    ]  # fmt: skip
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.3)


def test_stacks_and_blocks_take_a_designed_method():
    """Gradients are those of the recurrence; at the step's end the stack stays bounded."""
    torch.manual_seed(0)
    field = torch.nn.Linear(6, 6, bias=False).double()
    with torch.no_grad():
        field.weight.copy_(-torch.diag(torch.linspace(0.1, 10, 6)))
    method = design_method(-np.linspace(0.1, 10, 6), 6, 2, damping=0.02)
    step = float(max_stable_step(eigenvalues=-np.linspace(0.1, 10, 6), solver=method))
    stack = ResidualStack(field, depth=4, step_size=step, solver=method)
    x = torch.ones(2, 6, dtype=DOUBLE, requires_grad=True)
    y = stack(x)
    assert y.abs().max() <= 1 and stack.stats.nfe == 24 and stack.solver == "designed2_6"
    torch.autograd.gradcheck(stack, x)
    stack.step_size = 1.3 * step
    assert stack(100 * x).abs().max() > 100


def test_a_field_at_states_gives_its_own_spectrum():
    """All eigenvalues of a small one, over the batch."""
    field = lambda x: -x * torch.tensor([1.0, 4.0], dtype=DOUBLE) - 2 * x**3  # noqa: E731
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=DOUBLE)  # J = −diag(1, 4), −diag(7, 4)
    method = design_method(field, 4, x=x)
    assert float(max_stable_step(eigenvalues=[-7.0], solver=method)) == pytest.approx(32 / 7, rel=1e-5)


@pytest.mark.parametrize("wind", [0.0, 0.6])
def test_what_a_krylov_space_does_not_hold_is_bounded(wind):
    """Diffusion and wind on a ring of 1,400 points: the whole spectrum is known, a search sees its outside alone."""
    n = 1400
    angle = 2 * np.pi * np.arange(n) / n
    exact = 2 * (np.cos(angle) - 1) + 1j * wind * np.sin(angle)

    def field(x):
        right, left = torch.roll(x, -1, -1), torch.roll(x, 1, -1)
        return right - 2 * x + left + wind / 2 * (right - left)

    x = torch.zeros(1, n, dtype=DOUBLE)
    method = design_method(field, 6, x=x)
    best, held = step_of(exact, 6), float(max_stable_step(eigenvalues=exact, solver=method))
    assert 0.85 * best < held <= best * (1 + 1e-5)
    if not wind:
        assert held == pytest.approx(72 / 4, rel=1e-2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: design_method([-1.0, 0.5], 3), ValueError, r"eigenvalues that grow: 1 of 2.*Leave them out"),
        (lambda: design_method([1j], 1), ValueError, r"imaginary axis.*at least 2 stages"),
        (lambda: design_method([1j, -1j], 2, 2), ValueError, r"imaginary axis.*at least 3 stages"),
        (lambda: design_method([0.0, 0.0], 3), ValueError, "all eigenvalues are 0"),
        (lambda: design_method([-1.0], 0), ValueError, "stages must be a whole number of at least 1"),
        (lambda: design_method([-1.0], 61), ValueError, "1 to 60 stages, got 61"),
        (lambda: design_method([-1.0], 2.5), TypeError, "stages must be a whole number"),
        (lambda: design_method([-1.0], 3, 0), ValueError, "order must be a whole number of at least 1"),
        (lambda: design_method([-1.0], 3, 4), ValueError, "order 4 takes at least 4 stages, got 3"),
        (lambda: design_method([-1.0], 3, damping=0.9), ValueError, "from 0 to 0.5"),
        (lambda: design_method([], 3), ValueError, "n ≥ 1"),
        (lambda: design_method([math.nan], 3), ValueError, "finite"),
        (lambda: design_method(torch.sin, 3), TypeError, "needs the states x"),
        (lambda: design_method([-1.0], 3, x=torch.ones(1, 1)), TypeError, "goes with a field"),
    ],
)
def test_what_no_method_can_hold_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()
