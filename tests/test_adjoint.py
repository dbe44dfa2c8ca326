"""The adjoint's gradients against autograd's through the steps, and against finite differences."""

import pytest
import torch
import torchdiffeq
from torch import nn

import resode
from resode import METHODS, odeint, odeint_adjoint, odeint_event

DOUBLE = torch.float64
ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive and tableau.explicit]
TIGHT = dict(rtol=1e-10, atol=1e-10)


class Field(nn.Module):
    """Nonlinear, non-autonomous, with a parameter that nothing uses and one without gradient."""

    def __init__(self, n=2):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(n, n, generator=generator, dtype=DOUBLE) * 0.7)
        self.bias = nn.Parameter(torch.randn(n, generator=generator, dtype=DOUBLE))
        self.unused = nn.Parameter(torch.ones(3, dtype=DOUBLE))
        self.frozen = nn.Parameter(torch.ones(n, dtype=DOUBLE), requires_grad=False)

    def forward(self, t, y):
        return torch.tanh(y @ self.weight.T + self.bias * torch.cos(3 * t)) * self.frozen


def inputs(*times):
    y0 = torch.tensor([[0.4, -0.3], [1.0, 0.2], [-0.7, 0.5]], dtype=DOUBLE, requires_grad=True)
    return y0, torch.tensor(times, dtype=DOUBLE, requires_grad=True)


def loss(y):
    weights = torch.arange(1, y.numel() + 1, dtype=DOUBLE).reshape(y.shape).sin()
    return (weights * y).sum() + y.square().sum()


def gradients(solve, field, y0, t):
    parameters = [field.weight, field.bias, field.unused]
    return torch.autograd.grad(loss(solve(field, y0, t)), [y0, t, *parameters])


@pytest.mark.parametrize("times", [(0.0, 0.4, 1.0), (1.0, 0.7, -0.2)], ids=["forward", "back"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adjoint_gradients_are_autograds_at_tight_tolerance(method, per_sample, times):
    tol = dict(rtol=1e-7, atol=1e-7) if method == "bosh3" else TIGHT
    field, (y0, t) = Field(), inputs(*times)
    kw = dict(method=method, per_sample=per_sample, **tol)
    expected = gradients(lambda *a: odeint(*a, **kw), field, y0, t)
    got = gradients(lambda *a: odeint_adjoint(*a, **kw), field, y0, t)
    same = gradients(lambda *a: odeint(*a, gradient="adjoint", **kw), field, y0, t)
    bound = 2e-4 if method == "bosh3" else 1e-6
    for g, e, s in zip(got, expected, same, strict=True):
        assert torch.allclose(g, e, rtol=0, atol=bound)
        assert torch.equal(g, s), "gradient='adjoint' is odeint_adjoint"
    for g in (got, expected):
        assert torch.equal(g[-1], torch.zeros(3, dtype=DOUBLE)), "zero, not None, for the unused"


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_gradcheck_of_state_and_times(method):
    field, (y0, t) = Field(), inputs(0.0, 0.5, 0.8)
    y0 = y0[:2].detach().requires_grad_()

    def solve(y0, t):
        return odeint_adjoint(field, y0, t, method=method, rtol=1e-9, atol=1e-9)

    assert torch.autograd.gradcheck(solve, (y0, t), eps=1e-4, atol=1e-5)


def test_exact_gradients_of_a_decay():
    """y = y0 e^{w(t1 − t0)}: ∂y/∂w = (t1 − t0) y, ∂y/∂t1 = wy, ∂y/∂t0 = −wy, ∂y/∂y0 = e^{w(t1 − t0)}."""
    w = torch.tensor(-0.8, dtype=DOUBLE, requires_grad=True)
    y0 = torch.tensor(1.5, dtype=DOUBLE, requires_grad=True)
    t = torch.tensor([0.2, 1.7], dtype=DOUBLE, requires_grad=True)
    y = odeint_adjoint(lambda t, y: w * y, y0, t, adjoint_params=(w,), **TIGHT)[-1]
    dw, dy, dt = torch.autograd.grad(y, [w, y0, t])
    growth = torch.exp(w * 1.5).detach()
    assert torch.allclose(dw, 1.5 * 1.5 * growth, rtol=1e-8)
    assert torch.allclose(dy, growth, rtol=1e-8)
    assert torch.allclose(dt, w.detach() * 1.5 * growth * torch.tensor([-1.0, 1.0], dtype=DOUBLE), rtol=1e-8)


@pytest.mark.parametrize("options", [dict(n_steps=40), dict(options={"step_size": 0.02, "interp": "cubic"})])
def test_fixed_steps_go_back_by_the_same_method(options):
    field, (y0, t) = Field(), inputs(0.0, 0.4, 1.0)
    expected = gradients(lambda *a: odeint(*a, **TIGHT), field, y0, t)
    got = gradients(lambda *a: odeint_adjoint(*a, method="rk4", **options), field, y0, t)
    assert all(torch.allclose(g, e, rtol=0, atol=2e-6) for g, e in zip(got, expected, strict=True))


def test_agrees_with_torchdiffeqs_adjoint_where_the_steps_are_the_same():
    """Equal coefficients, equal grids, also on the way back: the same numbers (but ∂L/∂t_0, see docs)."""
    field, (y0, t) = Field(), inputs(0.0, 0.4, 1.0)
    options = {"step_size": 0.13}
    for ours, theirs in [("euler", "euler"), ("midpoint", "midpoint"), ("rk4_38", "rk4")]:
        a = gradients(lambda *a, m=ours: odeint_adjoint(*a, method=m, options=options), field, y0, t)
        b = gradients(
            lambda *a, m=theirs: torchdiffeq.odeint_adjoint(*a, method=m, options=options), field, y0, t
        )
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            x, y = (x[1:], y[1:]) if i == 1 else (x, y)
            assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


def test_tuples_complex_and_scalars():
    w = torch.tensor(0.6, dtype=DOUBLE, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE, requires_grad=True)

    def both(solve, func, y0, **kw):
        y0 = tuple(p.detach().requires_grad_() for p in y0)
        state = y0 if len(y0) > 1 else y0[0]
        y = solve(func, state, t, **TIGHT, **kw)
        parts = y if isinstance(y, tuple) else (y,)
        total = sum((p.abs().square() + (p * (1 - 2j)).real).sum() for p in parts)
        return torch.autograd.grad(total, [*y0, t, w])

    def swirl(t, y):
        a, b = y
        return w * b.sum() * torch.ones_like(a) * torch.cos(t), -w * a.reshape(1, 1) * b

    cases = [
        (swirl, (torch.tensor(1.0, dtype=DOUBLE), torch.ones(2, 1, dtype=DOUBLE))),
        (lambda t, y: (1j * w - 0.2 * t) * y.conj() * y, (torch.tensor([1 + 1j, 0.5j], dtype=torch.complex128),)),
        (lambda t, y: w * y * t, (torch.tensor(2.0, dtype=DOUBLE),)),
    ]  # fmt: skip
    for func, y0 in cases:
        expected, got = both(odeint, func, y0), both(odeint_adjoint, func, y0, adjoint_params=(w,))
        assert all(torch.allclose(g, e, rtol=0, atol=1e-7) for g, e in zip(got, expected, strict=True))


def test_tensors_in_args_get_gradients_too():
    w = torch.tensor(0.6, dtype=DOUBLE, requires_grad=True)
    y = odeint_adjoint(lambda t, y, w: w * y, torch.ones(1, dtype=DOUBLE), torch.tensor([0.0, 2.0]).double(),
                       args=(w,), adjoint_params=(), **TIGHT)  # fmt: skip
    (grad,) = torch.autograd.grad(y[-1].sum(), w)
    assert float(grad) == pytest.approx(2 * 2.718281828459045**1.2, rel=1e-8)


def test_the_way_back_has_its_own_method_tolerance_options_and_norm():
    field, (y0, t) = Field(), inputs(0.0, 1.0)
    expected = gradients(lambda *a: odeint(*a, **TIGHT), field, y0, t)
    seen = []

    def norm(parts):
        seen.append([tuple(p.shape) for p in parts])
        return max(p.abs().max() for p in parts)

    calls = {}
    for name, options in [("default", None), ("seminorm", {"norm": "seminorm"}), ("own", {"norm": norm})]:
        y, stats = odeint_adjoint(field, y0, t, return_stats=True, adjoint_method="tsit5", adjoint_rtol=1e-7,
                                  adjoint_atol=1e-7, adjoint_options=options, **TIGHT)  # fmt: skip
        assert stats.nfe_backward == 0
        got = torch.autograd.grad(loss(y), [y0, t, field.weight])
        calls[name] = stats.nfe_backward
        assert all(torch.allclose(g, e, rtol=0, atol=1e-5) for g, e in zip(got, expected, strict=False))
    assert seen[0] == [(), (3, 2), (3, 2), (2, 2), (2,), (3,)]
    assert 0 < calls["seminorm"] <= calls["default"]
    # A tuple state: y and a come as the tuple's tensors each.
    seen.clear()

    def func(t, y):
        return (-y[0], y[1])

    pair = (torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True))
    y = odeint_adjoint(
        func, pair, torch.tensor([0.0, 1.0]), adjoint_params=(), adjoint_options={"norm": norm}
    )
    y[0].sum().backward()
    assert seen[0] == [(), (2,), (), (2,), ()]


def test_the_way_back_needs_no_memory_of_the_steps():
    """Saved for backward: the states at the outputs, t and the parameters; not one of the stages."""
    field, (y0, t) = Field(), inputs(0.0, 1.0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        odeint_adjoint(field, y0, t, **TIGHT)
    assert sum(saved) == 2 * 6 + 2 + 4 + 2 + 3


def test_callbacks_of_both_ways():
    field, (y0, t) = Field(), inputs(0.0, 1.0)
    told = []
    field.callback_step = lambda t, y, dt: told.append(("step", float(t), tuple(y.shape), float(dt)))
    field.callback_accept_step_adjoint = lambda t, y, dt: told.append(("back", float(t), len(y), float(dt)))
    y, stats = odeint_adjoint(field, y0, t, return_stats=True, rtol=1e-4, atol=1e-4)
    assert [kind for kind, *_ in told] == ["step"] * stats.n_steps
    assert told[0][1:3] == (0.0, (3, 2)) and all(dt > 0 for *_, dt in told)
    n = len(told)
    loss(y).backward()
    back = told[n:]
    assert {kind for kind, *_ in back} == {"back"}
    assert back[0][1:3] == (1.0, 6) and back[-1][1] < back[0][1] and all(dt > 0 for *_, dt in back)


def test_event_through_the_adjoint():
    """dy/dt = −wy reaches c at τ = ln(y0/c)/w: ∂τ/∂y0 = 1/(wy0), ∂τ/∂w = −τ/w, ∂τ/∂t0 = 1."""
    w = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    y0 = torch.tensor([2.0], dtype=DOUBLE, requires_grad=True)
    t0 = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    tau, y = odeint_event(lambda t, y: -w * y, y0, t0, event_fn=lambda t, y: y - 1, odeint_interface=odeint_adjoint,
                          adjoint_params=(w,), **TIGHT)  # fmt: skip
    log2 = 0.6931471805599453
    assert tau.item() == pytest.approx(0.3 + 2 * log2, abs=1e-9) and y[-1].item() == pytest.approx(
        1, abs=1e-9
    )
    grads = torch.autograd.grad(tau, [y0, w, t0])
    assert [float(g) for g in grads] == pytest.approx([1.0, -4 * log2, 1.0], abs=1e-7)


def test_a_block_with_the_adjoint():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Field()

        def forward(self, t, x):
            return self.inner(t, x)

    y0, _ = inputs(0.0)
    net, results = Net(), {}
    for gradient in ("autograd", "adjoint"):
        block = resode.ODEBlock(net, rtol=1e-9, atol=1e-9, gradient=gradient)
        results[gradient] = torch.autograd.grad(loss(block(y0)), [y0, net.inner.weight])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*results.values(), strict=True))
    assert block.stats.nfe_backward > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, y, t: odeint_adjoint(lambda t, y: y, y, t), ValueError, "func is a function.*adjoint_params"),
        (lambda f, y, t: odeint(f, y, t, gradient="exact"), ValueError, "one of autograd, checkpoint, adjoint; got 'exact'"),
        (lambda f, y, t: odeint_adjoint(f, y, t, adjoint_method="tsit5", options={"first_step": 0.1}), ValueError,
         "adjoint_options must be given too"),
        (lambda f, y, t: odeint_adjoint(f, y, t, adjoint_options={"nrm": 1}), ValueError, r"unknown options \['nrm'\]"),
        (lambda f, y, t: odeint_adjoint(f, y, t, adjoint_options={"norm": "semi"}), ValueError, '"seminorm" or a function'),
        (lambda f, y, t: odeint_adjoint(f, y, t, adjoint_params=(1.0,)), TypeError, "tensors, got float"),
        (lambda f, y, t: resode.ODEBlock(f, gradient="exact"), ValueError, "autograd, checkpoint, adjoint; got 'exact'"),
    ],
)  # fmt: skip
def test_wrong_arguments_say_the_rule(call, error, message):
    with pytest.raises(error, match=message):
        call(Field(), *inputs(0.0, 1.0))


def test_the_adjoint_cannot_be_differentiated_again():
    y0, t = inputs(0.0, 1.0)
    (g,) = torch.autograd.grad(loss(odeint_adjoint(Field(), y0, t)), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_a_failure_on_the_way_back_says_so():
    class Decay(nn.Module):
        def forward(self, t, y):
            return -40 * y

    y0, t = inputs(0.0, 1.0)
    y = odeint_adjoint(
        Decay(), y0, t, rtol=1e-2, atol=1e-2, max_steps=60, adjoint_rtol=1e-13, adjoint_atol=1e-20
    )
    with pytest.raises(resode.MaxStepsReached) as raised:
        y.sum().backward()
    assert "back in time" in raised.value.__notes__[0]
