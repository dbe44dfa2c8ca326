"""Compiled steps give the eager result, are kept, and say why where they can't be had."""

import numpy as np
import pytest
import torch
from problems import van_der_pol
from torch import nn

from resode import MaxStepsReached, SolverError, odeint
from resode.solve import compiled, kept
from resode.solve.implicit.compiled import LARGEST, UNROLLED, Factors

# torch's own, while it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

DOUBLE = torch.float64
T = torch.linspace(0, 3, 20, dtype=DOUBLE)


def start(batch=5, dtype=DOUBLE):
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE).to(dtype)


@pytest.fixture
def traced(monkeypatch):
    """Graphs run operation by operation: all of it but the code generation, in a tenth of the time."""
    real, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile(f, fullgraph, options):
        options = {"guard_filter_fn": options["guard_filter_fn"]}  # the others are the code generator's
        return real(f, fullgraph=fullgraph, backend=backend, options=options)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(compiled, "solve_by_rows", lambda *_: None)
    monkeypatch.setattr(kept, "_KEPT", type(kept._KEPT)())
    torch._dynamo.reset()
    return graphs


class Net(nn.Module):
    """Knows the time, and is smooth."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(2, 2, generator=generator, dtype=DOUBLE))

    def forward(self, t, y):
        return torch.tanh(y @ self.weight) * torch.cos(t) - 0.3 * y


@pytest.mark.parametrize("per_sample", [False, True])
def test_generated_code_gives_the_eager_result_and_cost(per_sample):
    kw = dict(rtol=1e-6, atol=1e-6, per_sample=per_sample, return_stats=True)
    expected, cost = odeint(van_der_pol, start(), T, **kw)
    y, stats = odeint(van_der_pol, start(), T, compile=True, **kw)
    assert torch.allclose(y, expected, rtol=1e-10, atol=1e-11)
    assert [str(v) for v in vars(stats).values()] == [str(v) for v in vars(cost).values()]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", ["bosh3", "fehlberg45", "dopri5", "tsit5", "dopri8"])
def test_results_gradients_and_cost_are_the_eager_ones(traced, method, per_sample):
    field = Net()
    for t in (T, torch.tensor([1.0, -0.5], dtype=DOUBLE)):
        found = []
        for compile in (False, True):
            y0, times = start().requires_grad_(), t.clone().requires_grad_()
            y, stats = odeint(field, y0, times, method=method, rtol=1e-5, atol=1e-6, per_sample=per_sample,
                              compile=compile, return_stats=True)  # fmt: skip
            found.append((y.detach(), *torch.autograd.grad(y.sin().sum(), [y0, times, field.weight])))
            found[-1] += (torch.as_tensor(stats.nfe), torch.as_tensor(stats.n_steps))
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)
    assert traced


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_fixed_steps(traced, method):
    """21 steps: whole graphs of several steps, and single ones for the rest."""
    field, found = Net(), []
    for compile in (False, True):
        y0, times = start().requires_grad_(), T[:3].clone().requires_grad_()
        y, stats = odeint(field, y0, times, method=method, n_steps=21, compile=compile, return_stats=True)
        found.append((y.detach(), *torch.autograd.grad(y.sin().sum(), [y0, times, field.weight])))
        found[-1] += (torch.as_tensor(stats.nfe),)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(*found, strict=True))


def test_graphs_are_kept_across_calls_times_tolerances_and_batch_sizes(traced):
    def solve(batch, t, tol, dtype=DOUBLE):
        # A new function object each time, as lambdas in a loop are.
        return odeint(
            lambda t, y: -(y**3), start(batch, dtype), t, rtol=tol, atol=tol, per_sample=True, compile=True
        )

    solve(5, T, 1e-6)
    assert len(traced) == 1
    solve(5, T * 2, 1e-6), solve(5, T + 1, 1e-4)
    assert len(traced) == 1, "times and tolerances are inputs"
    solve(7, T, 1e-6)
    assert len(traced) == 2, "once more, with the batch size left open"
    solve(9, T[:7], 1e-5), solve(30, T, 1e-6)
    assert len(traced) == 2
    assert solve(5, T.float(), 1e-4, torch.float32).dtype == torch.float32
    assert len(traced) == 3


class Controlled(nn.Module):
    """With attributes that are called as the solver's own constants are."""

    def __init__(self):
        super().__init__()
        self.control, self.tableau = True, nn.Linear(2, 2).double()

    def forward(self, t, y):
        return (-y if self.control else 0.5 * y) + torch.tanh(self.tableau(y))


@pytest.mark.parametrize("options", [dict(per_sample=True), dict(method="rk4", n_steps=3)])
def test_a_field_that_changes_is_compiled_anew(traced, options):
    """Whatever its attributes are called: a graph of the field as it was would be wrong without a word."""
    field, y0 = Controlled(), start()
    for value in (True, False):
        field.control = value
        expected = odeint(field, y0, T[:3], **options)
        assert torch.allclose(odeint(field, y0, T[:3], compile=True, **options), expected, rtol=1e-9)
    with torch.no_grad():
        field.tableau.weight.mul_(2)
    expected = odeint(field, y0, T[:3], **options)
    assert torch.allclose(odeint(field, y0, T[:3], compile=True, **options), expected, rtol=1e-9)


def test_several_attempts_between_two_looks_of_the_host(traced, monkeypatch):
    expected = odeint(van_der_pol, start(), T, per_sample=True)
    monkeypatch.setitem(compiled.WINDOW, "cpu", 3)
    with torch.no_grad():
        assert torch.allclose(
            odeint(van_der_pol, start(), T, per_sample=True, compile=True), expected, rtol=1e-10
        )
    assert len(traced) == 1


def test_attempts_that_passed_no_output_are_dropped(traced, monkeypatch):
    monkeypatch.setattr(compiled, "RECENT", 4)
    expected = odeint(van_der_pol, start(), T[[0, 5, -1]])
    assert torch.allclose(odeint(van_der_pol, start(), T[[0, 5, -1]], compile=True), expected, rtol=1e-10)


def test_a_sample_that_fails_shrinks_alone_and_spoils_no_gradient(traced):
    """sqrt(1 − y²) is not finite beyond 1, where first attempts land."""

    def field(t, y):
        return torch.sqrt(1 - y * y) * 0.9 - 0.5 * y

    found = []
    for compile in (False, True):
        y0 = torch.tensor([[0.0], [0.86]], dtype=DOUBLE, requires_grad=True)
        y, stats = odeint(field, y0, T[[0, 9]] * 4, rtol=1e-3, atol=1e-3, per_sample=True, compile=compile,
                          options={"first_step": 3.0}, return_stats=True)  # fmt: skip
        found.append((y.detach(), *torch.autograd.grad(y.sum(), y0), stats.n_rejected))
    assert found[0][2].max() > 0
    assert all(
        torch.isfinite(a).all() and torch.allclose(a, b, rtol=1e-9) for a, b in zip(*found, strict=True)
    )


@pytest.mark.parametrize("per_sample", [False, True])
def test_failures_are_the_eager_ones(traced, per_sample):
    y0 = torch.ones(2, 1, dtype=DOUBLE)
    for field, options in [
        (lambda t, y: -1e6 * (y - torch.cos(t)), dict(max_steps=200)),
        (lambda t, y: y * y, dict()),
        (lambda t, y: -torch.sqrt(y) - 1, dict()),
    ]:
        messages = []
        for compile in (False, True):
            with pytest.raises(SolverError) as error:
                odeint(field, y0, 2 * T[[0, -1]], per_sample=per_sample, compile=compile, **options)
            messages.append(
                (
                    type(error.value),
                    error.value.eigenvalue is None,
                    str(error.value).split(", with a step")[0],
                )
            )
        assert messages[0] == messages[1]
    assert issubclass(MaxStepsReached, SolverError)


def branching(t, y):
    return -y if y.sum() > 0 else y


class Counting(nn.Module):
    calls = 0

    def forward(self, t, y):
        return -torch.from_numpy(y.detach().numpy())


def test_what_cannot_be_compiled_is_solved_eagerly_with_the_reason(traced):
    y0 = start().abs()
    with pytest.warns(UserWarning, match="without compiling.*[Dd]ata.dependent.*torch.where"):
        y = odeint(branching, y0, T, compile=True)
    assert torch.equal(y, odeint(branching, y0, T))
    with pytest.warns(UserWarning, match="without compiling"):
        y = odeint(branching, y0, T, method="rk4", n_steps=2, compile=True)
    assert torch.equal(y, odeint(branching, y0, T, method="rk4", n_steps=2))
    with pytest.warns(UserWarning, match=r"no effect with options\['jump_t'\]"):
        odeint(van_der_pol, y0, T, options={"jump_t": T[3:4]}, compile=True)
    with pytest.warns(UserWarning, match="no effect with 'fehlberg2', which torchdiffeq solves"):
        odeint(van_der_pol, y0, T, method="fehlberg2", compile=True)


def test_a_field_without_gradient_is_named(traced):
    def detached(t, y):
        return -y.detach()

    with pytest.warns(UserWarning, match="no gradient though the state has one"):
        odeint(detached, start().requires_grad_(), T, compile=True)


def test_an_error_of_the_field_comes_out_as_itself(traced):
    def wrong(t, y):
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        odeint(wrong, start(), T, compile=True)
    with pytest.raises(ValueError, match="must keep the state's shape"):
        odeint(lambda t, y: y[:1], start(), T, compile=True)


# --- implicit methods


class Stiff(nn.Module):
    """A slow curve, y → cos(t + phase), that rows are drawn to at rates up to 1e4, with a weight of its own."""

    def __init__(self, batch=4):
        super().__init__()
        self.rate = nn.Parameter(torch.logspace(1, 4, batch, dtype=DOUBLE))
        self.mix = nn.Parameter(torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=DOUBLE))

    def forward(self, t, y):
        rate = self.rate[: len(y), None] if y.ndim > 1 else self.rate[0]
        return -rate * ((y - torch.cos(t)) @ self.mix) - torch.sin(t) + 0.1 * torch.sin(3 * y)


@pytest.mark.parametrize(
    ("method", "per_sample", "way"),
    [
        ("radau5", True, "gradient"),
        ("trbdf2", False, "gradient"),
        ("sdirk2", True, "back"),
        ("kvaerno5", True, "outputs"),
    ],
)
def test_implicit_results_gradients_and_steps_are_the_eager_ones(traced, method, per_sample, way):
    """Newton's iteration leaves a hundredth of the tolerance a step; the field's slope, 1e4, is in the times' gradient."""
    tol, field, found = 1e-4, Stiff(), []
    t = torch.tensor([0.5, 0.4995], dtype=DOUBLE) if way == "back" else T  # back, what decays grows
    for compile in (False, True):
        y0, times = (1 + 0.1 * start(4)).requires_grad_(), t.clone().requires_grad_()
        with torch.set_grad_enabled(way == "gradient"):
            y, stats = odeint(field, y0, times, method=method, rtol=tol, atol=tol, per_sample=per_sample,
                              compile=compile, return_stats=True)  # fmt: skip
        grads = (
            torch.autograd.grad(y.sin().sum(), [y0, times, *field.parameters()]) if y.requires_grad else ()
        )
        found.append((y.detach(), grads, torch.as_tensor(stats.n_steps).double()))
    (y, grads, steps), (compiled_y, compiled_grads, compiled_steps) = found
    assert float(((y - compiled_y).abs() / (1 + y.abs())).max()) < 5 * tol
    for a, b in zip(grads, compiled_grads, strict=True):
        assert float((a - b).norm()) < 1e-3 * float(a.norm())
    assert float((compiled_steps - steps).abs().max()) <= 0.05 * float(steps.max()) + 1
    assert traced


def test_implicit_gradients_are_those_of_the_steps_that_were_taken(traced):
    """Steps held fixed, finite differences see the derivative that the way back gives: y' = −w(y − cos t)."""
    w, y0 = torch.tensor(50.0, dtype=DOUBLE, requires_grad=True), torch.ones(1, 1, dtype=DOUBLE)

    def end(w):
        return odeint(lambda t, y: -w * (y - torch.cos(t)), y0, T[[0, -1]], method="radau5", rtol=1e-10, atol=1e-10,
                      per_sample=True, compile=True)[-1, 0, 0]  # fmt: skip

    # y = (w² cos t + w sin t)/(1 + w²) + c e^(−wt): at t = 3 the last term is gone.
    t, v = float(T[-1]), float(w.detach())
    c, s = np.cos(t), np.sin(t)
    exact = ((2 * v * c + s) * (1 + v**2) - (v**2 * c + v * s) * 2 * v) / (1 + v**2) ** 2
    (slope,) = torch.autograd.grad(end(w), w)
    assert float(slope) == pytest.approx(exact, rel=1e-6)


def test_generated_code_of_an_implicit_method():
    """One state and two stages one by one, so that the code is short."""
    rate = torch.tensor([1.0, 1e2, 1e4], dtype=DOUBLE)[:, None]
    kw = dict(rtol=1e-6, atol=1e-6, per_sample=True, method="sdirk2", return_stats=True)

    def field(t, y):
        return -rate * (y - torch.cos(t))

    y0 = torch.zeros(3, 1, dtype=DOUBLE)
    expected, cost = odeint(field, y0, T, **kw)
    y, stats = odeint(field, y0, T, compile=True, **kw)
    assert torch.allclose(y, expected, rtol=0, atol=2e-6)
    assert torch.equal(stats.n_accepted, cost.n_accepted)
    assert (stats.n_newton >= stats.n_accepted).all() and (stats.n_jacobians > 0).all()


@pytest.mark.parametrize("n", [1, 2, 3, 6, UNROLLED, UNROLLED + 1])
def test_elimination_is_numpys_solution(n):
    """Several right-hand sides of matrices that need their rows exchanged: zeros on the diagonal, scales apart."""
    rng = np.random.default_rng(n)
    matrices = rng.standard_normal((40, n, n)) * 10.0 ** rng.integers(-6, 7, (40, n, 1))
    if n > 1:
        matrices[:20, range(n), range(n)] = 0
    factors = Factors(torch.from_numpy(matrices).permute(1, 2, 0))
    for _ in range(2):
        right = rng.standard_normal((n, 40))
        expected = np.linalg.solve(matrices, right.T[..., None])[..., 0].T
        bound = 1e3 * np.finfo(float).eps * np.linalg.cond(matrices) * abs(expected).max(0)
        assert (abs(factors.solve(torch.from_numpy(right)).numpy() - expected) <= bound).all()


def test_samples_do_not_wait_for_each_other(traced):
    """A sample at rest takes few steps beside a stiff one, and its result is that of its own solve."""
    field, y0 = Stiff(2), torch.tensor([[1.0, 1.0], [3.0, -2.0]], dtype=DOUBLE)
    kw = dict(method="sdirk2", rtol=1e-4, atol=1e-4, per_sample=True, compile=True)
    both = odeint(field, y0, T, **kw)
    alone = odeint(field, y0[:1], T, **kw)
    assert torch.allclose(both[:, :1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        (lambda t, y: -1e6 * (y - torch.cos(20 * t)), dict(max_steps=5)),
        (lambda t, y: -torch.sqrt(y) - 1, dict()),
    ],
)
def test_failures_of_implicit_steps_are_the_eager_ones(traced, field, options):
    y0, raised = torch.ones(2, 1, dtype=DOUBLE), []
    for compile in (False, True):
        with pytest.raises(SolverError) as error:
            odeint(field, y0, 2 * T[[0, -1]], method="sdirk2", per_sample=True, rtol=1e-4, atol=1e-4, compile=compile,
                   **options)  # fmt: skip
        raised.append((type(error.value), error.value.sample, error.value.time))
    assert raised[0][:2] == raised[1][:2]
    assert raised[0][2] == pytest.approx(raised[1][2], rel=1e-2)


def test_what_compiled_implicit_steps_do_not_take_is_said(traced):
    y0 = start().abs()
    with pytest.warns(UserWarning, match="fixed steps of radau5, which is implicit"):
        odeint(van_der_pol, y0, T[:2], method="radau5", n_steps=2, compile=True)
    with pytest.warns(UserWarning, match=f"implicit method on {LARGEST + 1} entries"):
        odeint(lambda t, y: -y, torch.ones(LARGEST + 1, dtype=DOUBLE), T[:2], method="radau5", compile=True)
    with pytest.warns(UserWarning, match="without compiling"):
        y = odeint(branching, y0, T, method="radau5", compile=True)
    assert torch.equal(y, odeint(branching, y0, T, method="radau5"))
    with pytest.raises(TypeError, match="needs the field's Jacobian"):
        odeint(lambda t, y: -y.detach(), y0, T, method="radau5", compile=True)
