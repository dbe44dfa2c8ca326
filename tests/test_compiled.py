"""Compiled steps give the eager result, are kept, and say why where they can't be had."""

import pytest
import torch
from problems import van_der_pol
from torch import nn

from resode import MaxStepsReached, SolverError, odeint
from resode.solve import compiled

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
    monkeypatch.setattr(compiled, "_KEPT", type(compiled._KEPT)())
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
