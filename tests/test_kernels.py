"""Solves by rows: the formulas are the field and its adjoint, the kernel's steps are the eager ones.

Formulas are evaluated in Python, so that all but a few tests build no C++.
"""

import gc
import logging
import weakref

import numpy as np
import pytest
import torch
from problems import van_der_pol
from torch import nn

from resode import SolverError, odeint
from resode.solve import kept
from resode.solve.adaptive import Adaptive
from resode.solve.control import Control
from resode.solve.kernels import solve as by_rows
from resode.solve.kernels.rows import derivatives
from resode.solve.step import Counted
from resode.tableaus import METHODS

# torch's own, while it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.autograd.function:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

DOUBLE = torch.float64
ROWS, ENTRIES = 5, 3
INFIX = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow, "lt": torch.lt,
    "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne, "and": torch.logical_and,
    "or": torch.logical_or, "not": torch.logical_not, "where": torch.where,
    "as_number": lambda a: a.to(DOUBLE),
}  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def capture(field, x, t, per_sample=True):
    """The kernel of a field, not compiled, and the tensors that it is called with."""
    found = []

    def backend(graph, examples):
        kernel = by_rows._Kernel(graph, examples, METHODS["dopri5"], per_sample)

        def run(*inputs):
            found.append((kernel, inputs))
            return graph(*inputs)

        return run

    torch.compile(by_rows._field(), backend=backend, fullgraph=True)(field, t, x.view_as(x))
    return found[0]


def evaluated(kernel, inputs, wanted, bars=None):
    """The numbers `wanted` of the kernel's formulas, each (rows,)."""
    values = []
    rows = inputs[kernel.x_at].detach().reshape(kernel.rows, -1)
    for op, *args in kernel.formulas.nodes:
        match op:
            case "number":
                value = torch.full((kernel.rows,), args[0], dtype=DOUBLE)
            case "t":
                t = torch.zeros(()) if kernel.t_at is None else inputs[kernel.t_at]  # at hand, if not used
                value = t.reshape(-1).expand(kernel.rows)
            case "x":
                value = rows[:, args[0]]
            case "bar":
                value = bars[:, args[0]]
            case "shared":
                value = inputs[args[0]].detach().reshape(-1)[args[1]].expand(kernel.rows)
            case "own":
                source, offset, stride = args
                value = inputs[source].detach().reshape(-1)[offset + stride * torch.arange(kernel.rows)]
            case _:
                call = INFIX.get(op) or getattr(torch, op)
                value = call(*(values[i] for i in args))
        values.append(value)
    return torch.stack([values[i] for i in wanted], -1)


def check(field, x, t=0.7, per_sample=True):
    """The formulas give the field, and their adjoint gives what autograd gives."""
    x = x.clone().requires_grad_()
    t = (
        torch.full((len(x), *(1,) * (x.ndim - 1)), t, dtype=DOUBLE)
        if per_sample
        else torch.tensor(t, dtype=DOUBLE)
    )
    kernel, inputs = capture(field, x, t, per_sample)
    expected = field(t, x)
    value = evaluated(kernel, inputs, kernel.field)
    assert torch.allclose(value.reshape(expected.shape), expected, rtol=1e-12, atol=1e-13)
    bars = draw(kernel.rows, kernel.n, seed=9)
    f = kernel.formulas
    f.largest = 10**6
    back = derivatives(f, kernel.field, [f.add("bar", i) for i in range(kernel.n)])
    moving = [i for i in inputs if i.requires_grad]
    leaves = [x if i is inputs[kernel.x_at] else i for i in moving]
    wanted = torch.autograd.grad(expected, leaves, bars.reshape(expected.shape), allow_unused=True)
    pulled = {leaf: evaluated(kernel, inputs, [bar], bars)[:, 0] for leaf, bar in back.items()}
    for tensor, right in zip(moving, wanted, strict=True):
        found = torch.zeros(tensor.numel(), dtype=DOUBLE)
        for leaf, bar in pulled.items():
            kind, *where = f.nodes[leaf]
            if kind == "x" and tensor is inputs[kernel.x_at]:
                found.reshape(kernel.rows, -1)[:, where[0]] += bar
            elif kind == "shared" and tensor is inputs[where[0]]:
                found[where[1]] += bar.sum()
            elif kind == "own" and tensor is inputs[where[0]]:
                found[where[1] + where[2] * torch.arange(kernel.rows)] += bar
        right = torch.zeros_like(tensor) if right is None else right
        assert torch.allclose(found.reshape(right.shape), right, rtol=1e-11, atol=1e-12)
    return kernel


def stacked(t, y):
    a, b, c = y.unbind(-1)
    return torch.stack([b * t.reshape(-1) if t.ndim else b * t, -a * c, a / (1 + c * c)], -1)


def written(t, y):
    d = torch.zeros_like(y)
    d[:, 0] = y[:, 1]
    d[..., 1:] = -y[:, :2]
    return d


def masked(t, y):
    return torch.where((y > 0) & ~(y > 1) | (y < -1), y * y, (y > 0.5) + 2 * y)


MATRIX = draw(ENTRIES, ENTRIES, seed=1).requires_grad_()
WIDE = draw(ENTRIES, 2, seed=2).requires_grad_()
BIAS = draw(ENTRIES, seed=3).requires_grad_()
OWN = draw(ROWS, 1, seed=4).requires_grad_()
OWN_FLAT = draw(ROWS, seed=5).requires_grad_()
SQUARE = draw(ROWS, ROWS, seed=6).requires_grad_()
NET = nn.Sequential(nn.Linear(ENTRIES, 4), nn.Tanh(), nn.Linear(4, ENTRIES)).double()

FIELDS = {
    "arithmetic": lambda t, y: 2 - y * t + y / 3 - (1 - y) ** 2 + 1 / (2 + y * y),
    "trigonometry": lambda t, y: y.sin() + y.cos() * y.tan() + y.atan() + y.tanh() + (0.3 * y.tanh()).asin()
    - (0.3 * y.tanh()).acos() + y.sinh() - y.cosh() + y.erf(),
    "exponentials": lambda t, y: (-y * y).exp() + y.abs().log1p() + y.sigmoid() + (2 + y.tanh()).log() - y.expm1(),
    "powers": lambda t, y: y**3 + (1 + y * y) ** 0.5 - (1 + y * y) ** -0.5 + (1 + y * y) ** 1.7 + y.square() ** y.sin()
    + (1 + y * y).rsqrt() + (2 + y.sin()).reciprocal() + (1 + y * y).sqrt(),
    "kinks": lambda t, y: y.relu() + y.clamp(-0.5, 0.7) + y.clamp(min=0.1) + torch.maximum(y, -y) * y.sign()
    + torch.minimum(y, 0.2 * y) + y.abs(),
    "activations": lambda t, y: nn.functional.silu(y) + nn.functional.gelu(y) + nn.functional.softplus(y)
    + nn.functional.leaky_relu(y) + nn.functional.elu(y) + nn.functional.hardtanh(y),
    "masks": masked,
    "sums": lambda t, y: y * y.sum(-1, keepdim=True) - y.mean(1, keepdim=True) + (y > 0).sum(-1, keepdim=True, dtype=DOUBLE),
    "columns": stacked,
    "written in place": written,
    "matrix": lambda t, y: torch.tanh(y @ MATRIX + BIAS) - y @ WIDE @ WIDE.T,
    "network": lambda t, y: NET(y) * t.cos(),
    "rows' own": lambda t, y: OWN * y - OWN_FLAT[:, None] * y.sin() + BIAS,
    "square of each row's own": lambda t, y: y + (SQUARE.sum(1) * OWN_FLAT)[:, None],
    "order": lambda t, y: y[:, [2, 0, 1]].transpose(0, 1).permute(1, 0),
    "cut": lambda t, y: torch.cat([y[:, 1:], -y[:, :1]], 1) + torch.stack(y.split(1, -1), 1).squeeze(-1),
    "views": lambda t, y: y.T.contiguous().T.reshape(len(y), -1).view(-1, 3)[:, None, :].expand(-1, 2, 3)[:, 1],
    "no operation of the state": lambda t, y: 0 * y + BIAS,
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_formulas_are_the_field_and_its_adjoint(name):
    assert check(FIELDS[name], draw(ROWS, ENTRIES)).rows == ROWS


@pytest.mark.parametrize("name", ["columns", "matrix", "rows' own"])
def test_one_step_for_all_goes_by_rows_too(name):
    assert check(FIELDS[name], draw(ROWS, ENTRIES), per_sample=False).rows == ROWS


def test_a_coupled_state_is_one_row():
    assert check(lambda t, y: y - y.mean(0), draw(2, 3), per_sample=False).rows == 1
    assert check(lambda t, y: -y.sum() * y, draw(3), per_sample=False).n == 3


def test_a_matrix_as_long_as_the_batch_is_still_one_for_all():
    """Three rows of three entries: only the way in which it is used tells whose the matrix is."""
    assert check(lambda t, y: y @ MATRIX, draw(3, 3)).rows == 3
    kernel = check(lambda t, y: y * MATRIX, draw(3, 3))
    assert any(op == "own" for op, *_ in kernel.formulas.nodes)


UNARY = [
    torch.sin,
    torch.tanh,
    torch.sigmoid,
    torch.relu,
    torch.abs,
    torch.square,
    lambda a: (1 + a * a).sqrt(),
]
BINARY = [
    torch.add,
    torch.sub,
    torch.mul,
    lambda a, b: a / (1 + b * b),
    torch.maximum,
    lambda a, b: torch.where(a > b, a, b),
]


def random_field(rng):
    """A tree of operations of the state, the time, weights and the rows' own numbers."""
    choices = rng.integers(0, 2**31, 40).tolist()

    def field(t, y):
        pick = iter(choices)
        values = [y, t, BIAS, OWN, y[:, [1, 2, 0]], y @ MATRIX, y.sum(-1, keepdim=True)]
        for _ in range(8):
            if next(pick) % 3:
                a, b = values[next(pick) % len(values)], values[next(pick) % len(values)]
                values.append(BINARY[next(pick) % len(BINARY)](a, b))
            else:
                values.append(UNARY[next(pick) % len(UNARY)](values[next(pick) % len(values)]))
        return values[-1] + values[-2] + 0 * y

    return field


@pytest.mark.parametrize("seed", range(12))
def test_formulas_of_random_fields(seed):
    check(random_field(np.random.default_rng(seed)), draw(ROWS, ENTRIES, seed=seed))


# What a kernel does not take.


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, bar):
        return bar


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros((), dtype=DOUBLE))

    def forward(self, t, y):
        self.calls += 1
        return -y


class Buffered(Counting):
    def forward(self, t, y):
        self.seen += 1
        return -y


def without_gradient(t, y):
    with torch.no_grad():
        slope = y.cos()
    return -slope * y


def hooked(t, y):
    slope = y.sin()
    slope.register_hook(lambda bar: 2 * bar)
    return -slope


LIST, LARGE = [], draw(60, 60)


def listing(t, y):
    LIST.append(1)
    return -y


REFUSED = {
    "samples mixed": (lambda t, y: y - y.mean(0), "sample"),
    "a sample picked": (lambda t, y: y - y[:1], "sample"),
    "samples turned": (lambda t, y: y.flip(0), "flip"),
    "told apart": (lambda t, y: y * torch.arange(5.0, dtype=DOUBLE)[:, None], "arange"),
    "a branch": (lambda t, y: -y if y.sum() > 0 else y, "Data-dependent"),
    "a break": (lambda t, y: torch.from_numpy(np.array(y.detach().tolist())), ""),
    "random": (lambda t, y: -y * torch.rand_like(y), "rand"),
    "dropout": (lambda t, y: -nn.functional.dropout(y), ""),
    "a gradient of its own": (lambda t, y: -Straight.apply(y), "autograd_function_apply"),
    "no gradient within": (without_gradient, "_set_grad_enabled"),
    "a part without gradient": (lambda t, y: -y * y.detach().cos(), "detach"),
    "data": (lambda t, y: -y * y.data.cos(), "_get_data_attr"),
    "a hook": (hooked, "register_hook"),
    "counted calls": (Counting(), "side effects"),
    "a buffer that changes": (Buffered(), ""),
    "a list that grows": (listing, "side effects"),
    "unknown": (lambda t, y: torch.special.bessel_j0(y), "bessel_j0 is not known"),
    "another dtype": (lambda t, y: (y.float() * 2).double(), "dtype"),
    "a large row": (lambda t, y: y.sin(), "more than 64"),
    "many operations": (lambda t, y: y @ LARGE, "more than 1000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_left_to_graphs_of_steps_with_the_reason_once(name, caplog, monkeypatch):
    field, reason = REFUSED[name]
    x = draw(5, {"a large row": 65, "many operations": 60}.get(name, 3)).requires_grad_()
    monkeypatch.setattr(by_rows._Kernel, "library", property(lambda _: pytest.fail("it was built")))
    counts = dict(vars(field)) if isinstance(field, Counting) else None
    with caplog.at_level(logging.INFO, "resode.compile"):
        for _ in range(2):
            solve = Adaptive(
                METHODS["dopri5"], Counted(field), x, 0.0, 1.0, Control(1e-6, 1e-6, per_sample=True)
            )
            assert by_rows.solve_by_rows(solve, np.zeros(0), kept.key_of(field)) is None
    said = [record.message for record in caplog.records if record.name == "resode.compile"]
    assert len(said) == 1 and reason in said[0]
    if counts is not None:  # two to choose the first step, and none by the capture
        assert field.calls - counts["calls"] in (0, 4)
        assert float(field.seen) in (0, 4)


@pytest.mark.parametrize(
    ("x", "control", "reason"),
    [
        (draw(5, 2).to(torch.complex128), {}, "complex128"),
        (draw(5, 2).to(torch.bfloat16), {}, "bfloat16"),
        (draw(5, 2), {"norm": lambda x: x.abs().amax(1)}, "norm"),
        (draw(5, 2), {"rtol": torch.tensor([1e-3, 1e-6], dtype=DOUBLE)}, "by entry"),
        (draw(5, 2), {"per_output": True}, "max_steps"),
        (draw(5, 2), {"dtype": torch.float32}, "times"),
        (draw(5, 2), "autocast", "autocast"),
        (draw(5, 2), "dopri8", "further stages"),
    ],
)
def test_solves_that_do_not_go_by_rows(x, control, reason):
    method = control if control == "dopri8" else "dopri5"
    options = {} if isinstance(control, str) else control
    settings = Control(**{"rtol": 1e-3, "atol": 1e-3, "per_sample": True, "first_step": 0.1} | options)
    with torch.autocast("cpu", enabled=control == "autocast"):
        solve = Adaptive(METHODS[method], Counted(lambda t, y: -y), x, 0.0, 1.0, settings)
        assert reason in by_rows.why_not(solve, np.array([0.5]))


# What a kernel does: C++, built once for each field below.


class Ensemble(nn.Module):
    """Van der Pol's systems, each with its own μ; a weight, a time and a kink that all share."""

    def __init__(self, rows=5, dtype=DOUBLE):
        super().__init__()
        self.mu = nn.Parameter(1 + draw(rows, 1, seed=7).to(dtype).sigmoid())
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2], dtype=dtype))
        self.scale = 1.0

    def forward(self, t, y):
        x, v = y[:, :1], y[:, 1:]
        return (
            torch.cat([v, self.mu * (1 - x * x) * v - x], 1) * self.scale
            + self.weight * torch.sin(t) * y.relu()
        )


@pytest.fixture
def count(monkeypatch):
    calls, real = [], by_rows._Kernel.forward

    def forward(*args):
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(by_rows._Kernel, "forward", forward)
    return calls


def both(field, y0, t, inputs, **kw):
    """Eager and compiled: the states, the gradients of a function of them, and the counts."""
    found = []
    for compile in (False, True):
        start = y0.clone().requires_grad_()
        times = t.clone().requires_grad_()
        y, stats = odeint(field, start, times, compile=compile, return_stats=True, **kw)
        gradients = torch.autograd.grad(y.sin().sum() + y[1].square().sum(), [start, times, *inputs])
        counts = [torch.as_tensor(v) for v in vars(stats).values() if v is not None]
        found.append((y.detach(), gradients, counts))
    return found


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("times", [[0.0, 0.9, 1.0, 3.0], [0.4, 0.3, 0.0], "own"])
def test_values_gradients_and_counts_are_the_eager_ones(count, per_sample, times):
    """One kernel for all of these, on rows that fill no whole number of vectors.

    A rounding in an error moves the steps after it: in twelve draws up to 2e-10 of the states, 2e-8 of gradients.
    """
    if times == "own":
        if not per_sample:
            pytest.skip("each sample's own times are for steps of its own")
        t = torch.linspace(0, 1, 4, dtype=DOUBLE)[:, None] * (1 + torch.arange(5, dtype=DOUBLE))
    else:
        t = torch.tensor(times, dtype=DOUBLE)
    field = Ensemble()
    (a, ga, na), (b, gb, nb) = both(
        field, draw(5, 2), t, list(field.parameters()), rtol=1e-6, atol=1e-7, per_sample=per_sample
    )
    assert len(count) == 1
    assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)
    for p, q in zip(ga, gb, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-6 * float(p.abs().max()))
    assert all(torch.equal(p, q) for p, q in zip(na, nb, strict=True))


def test_float32_and_other_methods(count):
    """Methods whose states within a step come from fewer stages; a state that is one row."""
    t = torch.linspace(0, 2, 9)
    for method, y0, per_sample in [("bosh3", draw(5, 2).float(), True), ("tsit5", draw(2).float(), False)]:
        with torch.no_grad():
            kw = dict(method=method, rtol=1e-4, atol=1e-5, per_sample=per_sample)
            eager, compiled = (odeint(van_der_pol, y0, t, compile=c, **kw) for c in (False, True))
        assert torch.allclose(compiled, eager, rtol=1e-3, atol=1e-3)  # a rounding may change a step
    assert len(count) == 2


def test_what_changes_between_calls_counts(count, monkeypatch):
    """A weight, a number, a row's own parameter, the batch: never those of the first call."""
    field, t = Ensemble(), torch.tensor([0.0, 0.5, 1.0], dtype=DOUBLE)

    def same(y0):
        with torch.no_grad():
            kw = dict(rtol=1e-6, atol=1e-7, per_sample=True)
            a, b = (odeint(field, y0, t, compile=c, **kw) for c in (False, True))
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)
        return a

    before = same(draw(5, 2))
    with torch.no_grad():
        field.mu.mul_(1.5)
        field.weight.add_(1.0)
    assert not torch.allclose(same(draw(5, 2)), before)
    for scale in (1.1, 1.2, 0.9, 1.2):  # from the second on, torch makes it an input of the graph
        field.scale = scale
        same(draw(5, 2))
    gradients = []
    for compile in (False, True):  # of a kernel with inputs that have none: the number
        y = odeint(field, draw(5, 2), t, rtol=1e-6, atol=1e-7, per_sample=True, compile=compile)
        gradients.append(torch.autograd.grad((y[-1] ** 2).sum(), [field.mu, field.weight]))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-8)
    same(draw(5, 4)[:, ::2])  # not contiguous
    assert len(count) >= 5
    start = draw(5, 2)

    def returns(t, y):
        return start - y  # the very tensor that the solve starts from

    with torch.no_grad():
        a, b = (odeint(returns, start, t, per_sample=True, compile=c) for c in (False, True))
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)


def test_failures_are_the_eager_ones(count):
    """The kernel stops where a row can't go on; the eager step there says why."""
    field, t = Ensemble(), torch.tensor([0.0, 0.5, 1.0], dtype=DOUBLE)
    with torch.no_grad():
        for kw in ({"max_steps": 3}, {"min_step": 0.0}):
            found = []
            y0 = draw(5, 2) if "max_steps" in kw else 1e200 * draw(5, 2)
            for compile in (False, True):
                with pytest.raises(SolverError) as raised:
                    odeint(field, y0, t, rtol=1e-9, atol=1e-9, per_sample=True, compile=compile,
                           **({"max_steps": 3} if "max_steps" in kw else {}))  # fmt: skip
                found.append(type(raised.value))
            assert found[0] is found[1]


def test_second_derivatives_are_those_of_the_same_steps(count):
    field, t = Ensemble(), torch.tensor([0.0, 0.3], dtype=DOUBLE)
    found = []
    for compile in (False, True):
        y0 = draw(5, 2).requires_grad_()
        y = odeint(field, y0, t, rtol=1e-6, atol=1e-7, per_sample=True, compile=compile)[-1]
        (slope,) = torch.autograd.grad(y.sin().sum(), y0, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [y0, field.mu]))
    assert len(count) == 1
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


def test_a_solve_lets_go_of_its_states(monkeypatch):
    """No circle of references holds the states until some later collection."""
    held, real = [], by_rows._Kernel.forward

    def forward(kernel, request, inputs):
        held.append(weakref.ref(request))
        return real(kernel, request, inputs)

    monkeypatch.setattr(by_rows._Kernel, "forward", forward)
    field, t = Ensemble(), torch.tensor([0.0, 0.3], dtype=DOUBLE)
    gc.collect()
    gc.disable()
    try:
        y0 = draw(5, 2).requires_grad_()
        y = odeint(field, y0, t, rtol=1e-6, atol=1e-7, per_sample=True, compile=True)
        assert held[0]() is not None
        del y
        assert held[0]() is None
    finally:
        gc.enable()
