"""Implicit methods: reached orders, stiff problems, gradients without Newton's iterations, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import resode
from resode import METHODS, ODEBlock, ResidualStack, odeint
from resode.solve.implicit.blocks import stage_blocks
from resode.solve.implicit.gradient import implicit

DOUBLE = torch.float64
IMPLICIT = [name for name, t in METHODS.items() if not t.explicit]
ADAPTIVE = [name for name in IMPLICIT if METHODS[name].adaptive]


def times(*s):
    return torch.tensor(s, dtype=DOUBLE)


def robertson(t, y, rate=3e7):
    a, b, c = y.unbind(-1)
    slow, fast, back = 0.04 * a, rate * b * b, 1e4 * b * c
    return torch.stack([back - slow, slow - fast - back, fast], -1)


def van_der_pol(mu):
    def field(t, y):
        x, v = y.unbind(-1)
        return torch.stack([v, mu * (1 - x * x) * v - x], -1)

    return field


# --- tableaus


def test_stages_that_are_solved_for_together():
    """A diagonally implicit method goes stage by stage; radau5 has one real eigenvalue and one pair."""
    assert [len(stage_blocks(METHODS[name])) for name in IMPLICIT] == [1, 1, 2, 1, 1, 2, 3, 4, 7]
    (radau,) = stage_blocks(METHODS["radau5"])
    assert sorted(radau.eigenvalues.imag) == pytest.approx([0.0, 0.18494932])
    assert radau.filter == pytest.approx(0.2748888295956773)


@pytest.mark.parametrize("name", IMPLICIT)
def test_modes_give_back_the_block(name):
    """V Λ V⁻¹ = A_b from one eigenvalue of every pair."""
    for block in stage_blocks(METHODS[name]):
        again = np.real(block.to_stages @ np.diag(block.eigenvalues) @ block.to_modes)
        np.testing.assert_allclose(again, block.a, atol=1e-14)


def test_l_stability_of_the_new_methods():
    """R(∞) = 0, and |R| ≤ 1 on the imaginary axis: A-stable, as every pole lies right of it."""
    for name in ("sdirk2", "trbdf2", "kvaerno3", "kvaerno5", "radau5"):
        far = resode.stability_function(name, torch.tensor([-1e12 + 0j, 1e12j], dtype=torch.complex128))
        axis = resode.stability_function(name, 1j * torch.logspace(-3, 5, 2000, dtype=DOUBLE))
        assert far.abs().max() < 1e-9 and axis.abs().max() < 1 + 1e-12
        assert resode.real_stability_interval(name) == math.inf


@pytest.mark.parametrize(
    ("name", "power"), [("radau5", 4), ("sdirk2", 2), ("trbdf2", 3), ("kvaerno3", 3), ("kvaerno5", 5)]
)
def test_the_error_estimate_falls_with_its_power_of_the_step(name, power):
    """Measured on y' = y² by one step of h and of h/2, far from the tolerance."""
    assert METHODS[name].error_power == power
    errors = []
    for h in (0.1, 0.05):
        steps = resode.steps(
            lambda t, y: y * y, times(1.0), (0.0, h), name, rtol=1e-2, atol=1e-2, first_step=h
        )
        errors.append(next(steps).error)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(power, abs=0.5)


# --- orders and stiff problems


@pytest.mark.parametrize("method", IMPLICIT)
def test_fixed_steps_reach_the_order(method):
    """Van der Pol's equation at μ = 1, which sees every order condition."""
    y0, t = times(2.0, 0.0), times(0.0, 1.0)
    exact = odeint(van_der_pol(1.0), y0, t, method="dopri8", rtol=1e-13, atol=1e-13)[-1]
    n = 16 if METHODS[method].order > 3 else 40
    errors = [
        float((odeint(van_der_pol(1.0), y0, t, method=method, n_steps=k * n)[-1] - exact).norm())
        for k in (1, 2)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(METHODS[method].order, abs=0.15)


STIFF_ORDERS = dict(
    implicit_euler=1, implicit_midpoint=2, trapezoid=2, gauss4=2, radau5=3, sdirk2=1, trbdf2=2, kvaerno3=2, kvaerno5=2,
)  # fmt: skip


@pytest.mark.parametrize("method", IMPLICIT)
def test_orders_fall_on_the_prothero_robinson_problem(method):
    """y' = λ(y − sin t) + cos t at λ = −1e6: the order is that of the stages, gauss4's 2 and radau5's 3.

    Over λ where the method is stiffly accurate, so that errors are far smaller there all the same. A stage of
    kvaerno5 lies beyond the step, and the field must be asked there: at the end instead, nothing falls at all.
    Hairer & Wanner, Solving Ordinary Differential Equations II, IV.15.
    """

    def error(n):
        y = odeint(lambda t, y: -1e6 * (y - torch.sin(t)) + torch.cos(t), times(0.0), times(0.0, 1.0),
                   method=method, n_steps=n)  # fmt: skip
        return abs(y[-1].item() - math.sin(1.0))

    errors = error(10), error(20)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(STIFF_ORDERS[method], abs=0.15)
    assert (errors[0] < 1e-6) == (METHODS[method].a[-1] == METHODS[method].b)


@pytest.mark.parametrize(
    ("method", "per_sample"), [("trbdf2", False), ("kvaerno5", False), ("radau5", True), ("kvaerno5", True)]
)
def test_robertson_to_its_rest(method, per_sample):
    """Hairer & Wanner's reference at 1e11, in a number of steps that no explicit method comes near."""
    exact = [0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050]
    y0 = times(1.0, 0.0, 0.0)
    y0 = y0.expand(2, 3) if per_sample else y0
    loose = METHODS[method].order == 2
    with torch.no_grad():
        y, stats = odeint(robertson, y0, times(0.0, 1e11), method=method, rtol=1e-4 if loose else 1e-6,
                          atol=1e-8 if loose else 1e-10, per_sample=per_sample, return_stats=True)  # fmt: skip
    for row in y[-1].reshape(-1, 3):
        assert row[0].item() == pytest.approx(exact[0], rel=0.3 if loose else 3e-3)
        assert row[2].item() == pytest.approx(exact[2], abs=1e-6)
    assert int(torch.as_tensor(stats.n_steps).max()) < 3000
    assert (torch.as_tensor(stats.n_jacobians) <= torch.as_tensor(stats.n_steps)).all()
    assert (torch.as_tensor(stats.n_newton) >= torch.as_tensor(stats.n_accepted)).all()


@pytest.mark.parametrize("method", ["radau5", "kvaerno5"])
def test_each_sample_is_solved_as_if_alone(method):
    """Its steps, counts and result, whatever the neighbours' rates are."""
    rates = times(1e2, 1e5, 3e7)[:, None]

    def field(t, y):
        return robertson(t, y, rates[: len(y), 0])

    y0 = times(1.0, 0.0, 0.0).expand(3, 3).clone()
    settings = dict(method=method, rtol=1e-5, atol=1e-9, return_stats=True)
    with torch.no_grad():
        together, stats = odeint(field, y0, times(0.0, 40.0), per_sample=True, **settings)
        assert len(set(stats.n_steps.tolist())) > 1
        for i, rate in enumerate(rates):
            alone, own = odeint(
                lambda t, y, r=rate: robertson(t, y, r[0]), y0[i], times(0.0, 40.0), **settings
            )
            assert own.n_steps == stats.n_steps[i] and own.n_newton == stats.n_newton[i]
            torch.testing.assert_close(alone[-1], together[-1, i], rtol=1e-9, atol=1e-12)


def test_dense_output_events_and_steps_of_an_implicit_method():
    """Van der Pol at μ = 1000: the event is found where a finer solve has it."""
    found = []
    for rtol in (1e-4, 1e-6):
        s = resode.solve_ivp(van_der_pol(1000.0), (0.0, 2000.0), times(2.0, 0.0), "radau5", rtol=rtol, atol=rtol,
                             events=lambda t, y: y[0])  # fmt: skip
        found.append(s.t_events[0][0].item())
        middle = s.t[10:12].mean()
        assert s.y[11, 0] < s(middle)[0] < s.y[10, 0]  # it falls slowly between
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert 806 < found[1] < 809  # the first fall lies at about 807.1: (3/2 − ln 2) μ and a few


def test_states_too_large_to_factor_go_by_gmres():
    """The heat equation on 300 points, against matrix_exp; 300 entries are above the limit for factors."""
    n = 300
    grid = torch.linspace(0, 1, n, dtype=DOUBLE)

    def field(t, y):
        padded = nn.functional.pad(y, (1, 1))
        return (padded[2:] - 2 * y + padded[:-2]) * 50

    y0 = torch.sin(3 * grid) + grid
    matrix = torch.func.jacrev(lambda y: field(None, y))(y0)
    y, stats = odeint(field, y0, times(0.0, 1.0), method="kvaerno5", rtol=1e-4, atol=1e-4, return_stats=True)
    assert (y[-1] - torch.linalg.matrix_exp(matrix) @ y0).abs().max() < 1e-3
    assert stats.n_linear > 0 and stats.n_factorisations == 0


# --- gradients


def leaves(seed):
    torch.manual_seed(seed)
    y0 = torch.randn(2, 3, dtype=DOUBLE, requires_grad=True)
    p = torch.tensor([0.3, 0.7], dtype=DOUBLE, requires_grad=True)
    return y0, p, times(0.0, 0.4, 1.0).requires_grad_(), torch.randn(2, 3, dtype=DOUBLE)


MATRIX = torch.tensor([[-2.0, 0.5, 0.3], [0.2, -1.5, -0.7], [0.1, 0.9, -2.5]], dtype=DOUBLE)


def scalar(y0, p, t, weight, **settings):
    def field(t, y):
        return 3 * torch.tanh(y @ MATRIX.T * p[0]) + p[1] * torch.sin(t) - y**3

    return (odeint(field, y0, t, **settings) * weight).sum()


@pytest.mark.parametrize("method", IMPLICIT)
@pytest.mark.parametrize("per_sample", [False, True])
def test_first_and_second_derivatives_are_those_of_differences(method, per_sample):
    """In y0, the times and a tensor that the field closes over; for given steps, which differences keep too."""
    y0, p, t, weight = leaves(0)
    settings = dict(method=method, n_steps=3, per_sample=per_sample)

    def gradients(p, create_graph=False):
        return torch.autograd.grad(
            scalar(y0, p, t, weight, **settings), (y0, p, t), create_graph=create_graph
        )

    along, h = torch.randn(2, dtype=DOUBLE), 1e-5
    first = gradients(p, create_graph=True)
    with torch.no_grad():
        ends = [scalar(y0, p + s * h * along, t, weight, **settings) for s in (1, -1)]
    assert (first[1] @ along).item() == pytest.approx(
        ((ends[0] - ends[1]) / (2 * h)).item(), rel=1e-6, abs=1e-8
    )
    (second,) = torch.autograd.grad(sum(g.square().sum() for g in first), p)
    sides = [
        sum(g.square().sum() for g in gradients((p + s * h * along).detach().requires_grad_()))
        for s in (1, -1)
    ]
    assert (second @ along).item() == pytest.approx(
        ((sides[0] - sides[1]) / (2 * h)).item(), rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("method", ["radau5", "kvaerno5"])
def test_gradients_are_those_of_the_variational_equations(method):
    """At tolerance 1e-10, to 1e-6: van der Pol with ∂y/∂y0 solved along, as an ODE of its own, by dopri8."""
    field, t = van_der_pol(5.0), times(0.0, 0.7)

    def variational(t, z):
        y, s = z[:2], z[2:].reshape(2, 2)
        return torch.cat([field(t, y), (torch.func.jacrev(lambda y: field(t, y))(y) @ s).reshape(-1)])

    start = torch.cat([times(2.0, 0.0), torch.eye(2, dtype=DOUBLE).reshape(-1)])
    with torch.no_grad():
        exact = odeint(variational, start, t, method="dopri8", rtol=1e-12, atol=1e-12)[-1, 2:].reshape(2, 2)
    y0 = times(2.0, 0.0).requires_grad_()
    y = odeint(field, y0, t, method=method, rtol=1e-10, atol=1e-10)[-1]
    got = torch.stack([torch.autograd.grad(row, y0, retain_graph=True)[0] for row in y])
    assert ((got - exact).norm() / exact.norm()).item() < 1e-6


@pytest.mark.parametrize("method", ["kvaerno5", "radau5"])
@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_other_ways_back_agree(method, gradient):
    """To the tolerance: their Jacobians are renewed elsewhere, so that Newton ends a little elsewhere."""
    torch.manual_seed(0)

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()

        def forward(self, t, y):
            return self.net(y) - 3 * y

    field, y0 = Field(), torch.randn(2, 3, dtype=DOUBLE, requires_grad=True)
    results = []
    for way in ("autograd", gradient):
        y, stats = odeint(
            field, y0, times(0.0, 0.5), method=method, rtol=1e-6, atol=1e-6, gradient=way, return_stats=True
        )
        results.append(torch.autograd.grad(y[-1].square().sum(), (y0, *field.parameters())))
    assert stats.nfe_backward > 0
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_graph_does_not_hold_newtons_iterations():
    """As many bytes are saved for the way back at a tolerance that takes thrice the iterations."""
    saved, iterations = [], []
    y0 = times(2.0, 0.0).requires_grad_()
    for start in (1.0, 1e-3):  # how far Newton has to go: strongly curved, or nearly linear
        total = 0

        def pack(x):
            nonlocal total
            total += x.numel()
            return x

        field = lambda t, y, s=start: -50 * torch.sinh(s * 2 * y) / s  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            _, stats = odeint(
                field, y0, times(0.0, 1.0), method="implicit_euler", n_steps=4, return_stats=True
            )
        saved.append(total)
        iterations.append(stats.n_newton)
    assert iterations[0] > 1.5 * iterations[1] and saved[0] == saved[1]


def test_a_gradient_that_gmres_does_not_find_is_said_to_be_off():
    """(I − ∂G/∂y)ᵀ a cyclic shift of 600 entries, on which GMRES stands still for 600 products."""
    y, p = torch.zeros(2, 600, dtype=DOUBLE), torch.zeros(2, 600, dtype=DOUBLE, requires_grad=True)
    solution = implicit(lambda y, p: y - torch.roll(y, 1, -1) + p, y, p)
    with pytest.warns(UserWarning, match=r"GMRES left a residual of 1\.0e\+00 .* in 2 of 2 samples"):
        torch.autograd.grad(solution[:, 0].sum(), p)


def test_a_third_derivative_is_refused():
    y0 = times(1.0).requires_grad_()
    y = odeint(lambda t, y: -(y**3), y0, times(0.0, 1.0), method="implicit_euler", n_steps=1)[-1].sum()
    (first,) = torch.autograd.grad(y, y0, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(first.sum(), y0, create_graph=True)


# --- residual blocks


class Monotone(nn.Module):
    """−Wᵀ tanh(Wx + b): its Jacobian is symmetric and has no positive eigenvalue."""

    def __init__(self, n=8):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(n, n) / n**0.5), nn.Parameter(torch.zeros(n))

    def forward(self, x):
        return -torch.tanh(x @ self.w.T + self.b) @ self.w


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_stack_that_dies_under_euler_lives_under_implicit_euler(dtype):
    """η = 5 is far outside Euler's region for these fields; implicit Euler contracts for every η > 0."""
    torch.manual_seed(0)
    stack = ResidualStack([Monotone() for _ in range(20)], step_size=5.0).to(dtype)
    x, other = torch.randn(2, 4, 8, dtype=dtype)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.grad(stack(leaf).sum(), leaf)[0].norm() > 1e3
    stack.solver = "implicit_euler"
    assert (stack(x) - stack(other)).norm() < (x - other).norm()
    for eta in (1.0, 10.0):
        stack.step_size = eta
        y, leaf = stack(x), x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(stack(leaf).sum(), leaf)
        assert torch.isfinite(y).all() and grad.norm() <= (4 * 8) ** 0.5 * (1 + 1e-3)


def test_a_block_solves_its_equation_and_its_gradient_is_the_theorems():
    """x⁺ = x + ηF(x⁺), so ∂x⁺/∂x = (I − ηJ(x⁺))⁻¹."""
    torch.manual_seed(1)
    field, x = Monotone().double(), torch.randn(3, 8, dtype=DOUBLE, requires_grad=True)
    y = ResidualStack([field], solver="implicit_euler", step_size=2.0)(x)
    assert (y - x - 2 * field(y)).abs().max() < 1e-11
    weight = torch.randn(3, 8, dtype=DOUBLE)
    (grad,) = torch.autograd.grad((y * weight).sum(), x)
    j = torch.stack([torch.func.jacrev(lambda v: field(v[None])[0])(row) for row in y.detach()])
    exact = torch.linalg.solve((torch.eye(8, dtype=DOUBLE) - 2 * j).mT, weight)
    torch.testing.assert_close(grad, exact, rtol=1e-9, atol=1e-11)


def test_checkpoints_learnt_steps_and_lines_between_weights():
    torch.manual_seed(2)
    x = torch.randn(4, 8, dtype=DOUBLE)
    for settings in (
        {},
        {"learn_step": "block"},
        {"learn_step": "channel", "channels": 8},
        {"weights": "linear"},
    ):
        stack = ResidualStack(
            [Monotone() for _ in range(4)], solver="trapezoid", step_size=0.5, **settings
        ).double()
        grads = []
        for way in ("autograd", "checkpoint"):
            stack.gradient = way
            grads.append(torch.autograd.grad(stack(x).square().sum(), list(stack.parameters())))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gradient", ["autograd", "checkpoint"])
def test_a_fixed_stack_counts_what_its_implicit_steps_took(gradient):
    """Each sample its own; of a linear field one Jacobian, one factorisation and a Newton iteration or two a block."""
    torch.manual_seed(0)
    field = nn.Linear(6, 6, bias=False).double()
    stack = ResidualStack(field, depth=5, solver="implicit_euler", step_size=0.1, gradient=gradient)
    stack(torch.randn(3, 6, dtype=DOUBLE, requires_grad=True))
    assert stack.stats.n_jacobians.tolist() == stack.stats.n_factorisations.tolist() == [5, 5, 5]
    assert stack.stats.n_newton.shape == (3,) and (stack.stats.n_newton >= 5).all()
    assert stack.stats.n_linear.tolist() == [0, 0, 0]
    stack.per_sample = False
    stack(torch.randn(3, 6, dtype=DOUBLE))
    assert stack.stats.n_jacobians == 5 and 5 <= stack.stats.n_newton <= 15
    stack.solver = "rk4"
    stack(torch.randn(3, 6, dtype=DOUBLE))
    assert stack.stats.n_newton == 0


def test_a_singular_block_names_its_eigenvalue():
    """F(x) = x and η = 1: I − ηJ = 0."""
    field = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        field.weight.copy_(torch.eye(2))
    stack = ResidualStack([nn.Identity(), field], solver="implicit_euler")
    stack.fields[0] = Monotone(2)
    with pytest.raises(resode.NewtonNotConverged, match=r"block 1 \(Linear\).*λ ≈ 1 ") as raised:
        stack(torch.ones(3, 2))
    assert raised.value.eigenvalue == pytest.approx(1) and raised.value.sample == 0
    assert isinstance(raised.value.rate, float) and isinstance(raised.value.residual, float)


def test_an_ode_block_takes_implicit_steps():
    block = ODEBlock(lambda t, x: -1000 * (x - torch.cos(t)), solver="kvaerno5")
    assert block(torch.zeros(2, 1)).flatten().tolist() == pytest.approx([math.cos(1)] * 2, abs=1e-2)
    assert block.stats.n_newton.shape == (2,)
    fixed = ODEBlock(lambda t, x: -x, solver="implicit_midpoint", n_steps=10)
    assert fixed(torch.ones(1, 1)).item() == pytest.approx((0.95 / 1.05) ** 10, rel=1e-5)


# --- what is refused


def field_without_gradient(t, y):
    return (-y).detach() + 0


@pytest.mark.parametrize(
    ("field", "y0", "error", "message"),
    [
        (lambda t, y: 1j * y, torch.ones(1, dtype=torch.complex128), TypeError, "complex"),
        (lambda t, y: -y, torch.ones(1, dtype=torch.float16), TypeError, "keep the state in float32"),
        (field_without_gradient, times(1.0), TypeError, "no gradient though it depends on the state"),
        (lambda t, y: y[:0], times(1.0), ValueError, "must keep the state's shape"),
        (lambda t, y: y * math.nan, times(1.0), resode.SolverError, "finite"),
    ],
)
@pytest.mark.parametrize("settings", [{"method": "kvaerno3"}, {"method": "implicit_euler", "n_steps": 2}])
def test_wrong_problems_say_the_rule(field, y0, error, message, settings):
    if "n_steps" in settings and error is resode.SolverError:
        error, message = resode.NewtonNotConverged, "not finite"
    with pytest.raises(error, match=message):
        odeint(field, y0, times(0.0, 1.0).to(y0.dtype.to_real()), **settings)


def test_a_field_that_no_step_suits_is_said_to_be_so():
    """A jump across which Newton's method finds nothing, at whatever step."""
    with pytest.raises(resode.SolverError, match=r"t=0\.5|Newton"):
        odeint(
            lambda t, y: torch.where(t > 0.5, math.nan, -1.0) * y,
            times(1.0),
            times(0.0, 1.0),
            method="radau5",
        )


def test_train_mode_batch_norm_is_refused_in_implicit_blocks():
    field = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    stack = ResidualStack(field, depth=2, solver="implicit_euler", step_size=0.1)
    with pytest.raises(ValueError, match="norm='group'"):
        stack(torch.randn(3, 4))
    stack.eval()(torch.randn(3, 4))


@pytest.mark.parametrize("options", [{}, {"n_steps": 2}])
def test_a_jacobian_that_is_not_finite_is_named(options):
    """torch.where takes the branch −y, and the gradient of both: NaN at once, though no value is."""

    def field(t, y):
        return torch.where(t < 2, -y, y * math.nan)

    with pytest.raises(resode.SolverError, match=r"its Jacobian holds infinities or NaN.*torch\.where"):
        odeint(field, times(1.0), times(0.0, 1.0), method="sdirk2", **options)


def test_an_empty_state_stays_empty():
    for options in ({}, {"n_steps": 2}):
        assert odeint(lambda t, y: -y, times(), times(0.0, 1.0), method="radau5", **options).shape == (2, 0)


def test_transforms_of_torch_func_are_refused():
    def value(y0):
        return odeint(lambda t, y: -y, y0, times(0.0, 1.0), method="implicit_euler", n_steps=2)[-1].sum()

    with pytest.raises(TypeError, match=r"torch\.func"):
        torch.func.grad(value)(times(1.0))


def test_the_stiff_benchmark_runs_and_radau5_is_beside_scipys():
    """Robertson's problem at 1e-4: an error and a number of steps of the same kind."""
    from tests.benchmarks.stiff import rows
    from tests.benchmarks.stiff_problems import ROBERTSON

    ours, theirs = rows(ROBERTSON, 1e-4, methods=("radau5",), others=("Radau",))
    assert ours[1] < 3 * max(theirs[1], 1.0) and ours[2] < 2 * theirs[2]


def test_problem_e4_rests_at_its_published_end():
    """odeToJava's state at t = 1000 is (20, −20, 0, 0) but for a mode e^(−t/100); with the other sign it is no rest."""
    from tests.benchmarks.stiff_problems import DETEST

    e4 = next(p for p in DETEST if p.name == "E4")
    assert e4.array_field(0.0, np.array([20.0, -20.0, 0.0, 0.0])) == pytest.approx(0, abs=1e-12)
