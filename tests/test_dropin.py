"""torchdiffeq's own examples with the import changed, and its options with its meaning."""

import itertools
import math

import pytest
import torch
import torchdiffeq
from problems import riccati, van_der_pol
from torch import nn

import resode
from resode import odeint

DOUBLE = torch.float64
Y0 = torch.tensor([1.0, -0.5], dtype=DOUBLE)


def times(*values):
    return torch.tensor(values, dtype=DOUBLE)


def readme(library):
    """The calls of torchdiffeq's README, as they stand there."""
    odeint, odeint_event = library.odeint, library.odeint_event
    adjoint = library.odeint_adjoint

    class Func(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor([[-0.1, 2.0], [-2.0, -0.1]]))

        def forward(self, t, y):
            return (y**3) @ self.a

    func, y0, t = Func(), torch.tensor([[2.0, 0.0]]), torch.linspace(0.0, 3.0, 20)
    results = [odeint(func, y0, t, rtol=1e-6, atol=1e-7)]
    results.append(adjoint(func, y0, t, rtol=1e-6, atol=1e-7, adjoint_options=dict(norm="seminorm")))
    results[-1].square().mean().backward()
    results.append(func.a.grad)
    results.append(odeint(func, y0, t, method="midpoint", options=dict(step_size=0.05)))
    event_t, solution = odeint_event(func, y0, t[0], event_fn=lambda t, y: y[0, 0] - 1.0, odeint_interface=odeint,
                                     atol=1e-7, rtol=1e-6)  # fmt: skip
    return [*results, event_t, solution]


def test_the_readmes_examples_give_the_same():
    for ours, theirs in zip(readme(resode), readme(torchdiffeq), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.allclose(ours, theirs, rtol=2e-3, atol=2e-4)


def demo(library, adjoint):
    """examples/ode_demo.py in small: a field learns the cubic spiral from short pieces of it."""
    odeint = library.odeint_adjoint if adjoint else library.odeint
    true_y0, t = torch.tensor([[2.0, 0.0]]), torch.linspace(0.0, 25.0, 1000)
    true_a = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])

    class Lambda(nn.Module):
        def forward(self, t, y):
            return torch.mm(y**3, true_a)

    with torch.no_grad():
        true_y = library.odeint(Lambda(), true_y0, t, method="dopri5")

    class ODEFunc(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
            for m in self.net.modules():
                if isinstance(m, nn.Linear):
                    nn.init.normal_(m.weight, mean=0, std=0.1)
                    nn.init.constant_(m.bias, val=0)

        def forward(self, t, y):
            return self.net(y**3)

    torch.manual_seed(0)
    func = ODEFunc()
    optimizer = torch.optim.RMSprop(func.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        s = torch.randint(0, 990, (20,))
        batch_y0, batch_t = true_y[s], t[:10]
        batch_y = torch.stack([true_y[s + i] for i in range(10)], dim=0)
        optimizer.zero_grad()
        loss = torch.mean(torch.abs(odeint(func, batch_y0, batch_t) - batch_y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("adjoint", [False, True])
def test_the_demos_training_run_is_the_same(adjoint):
    ours, theirs = demo(resode, adjoint), demo(torchdiffeq, adjoint)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert min(ours) > 0


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("t", [torch.linspace(0, 2, 8), torch.linspace(2, -1, 8)], ids=["forward", "back"])
@pytest.mark.parametrize("perturb", [False, True])
def test_step_size_in_options_is_torchdiffeqs_grid(interp, t, perturb):
    t = t.to(DOUBLE).requires_grad_()
    grads = []
    for library, method in [(resode, "rk4_38"), (torchdiffeq, "rk4")]:
        y = library.odeint(van_der_pol, Y0, t, method=method,
                           options={"step_size": 0.17, "interp": interp, "perturb": perturb})  # fmt: skip
        grads.append((y.detach(), *torch.autograd.grad(y.square().sum(), t)))
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(*grads, strict=True))


def test_a_grid_constructor_and_what_it_must_return():
    def grid(f, y, t):
        return torch.cat([t[:1], t[0] + (t[-1] - t[0]) * times(0.1, 0.2, 0.5), t[-1:]])

    for t in (times(0.0, 0.7, 2.0), times(2.0, 0.7, 0.0)):
        a = odeint(van_der_pol, Y0, t, method="midpoint", options={"grid_constructor": grid})
        b = torchdiffeq.odeint(van_der_pol, Y0, t, method="midpoint", options={"grid_constructor": grid})
        assert torch.allclose(a, b, rtol=1e-13)
    for wrong, message in [
        (lambda f, y, t: t[:1], "n ≥ 2"),
        (lambda f, y, t: t[:-1], "from 0 to 1"),
        (lambda f, y, t: torch.cat([t, t[-1:]]), "not monotone"),
        (lambda f, y, t: None, "NoneType"),
    ]:
        with pytest.raises(ValueError, match=message):
            odeint(van_der_pol, Y0, times(0.0, 1.0, 2.0), method="rk4", options={"grid_constructor": wrong})


def test_perturb_keeps_to_one_side_of_a_jump():
    """y' = 0 before t = 1 and 1 from then on; with a step ending at 1 every stage must be on one side."""

    def field(t, y):
        return torch.where(t < 1, 0.0, 1.0) + 0 * y

    for steps in (
        {"options": {"perturb": True, "step_size": 0.5}},
        {"options": {"perturb": True}, "step_size": 0.5},
    ):
        y = odeint(field, times(0.0), times(0.0, 1.0, 2.0), method="rk4", **steps)
        assert y[:, 0].tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-14)
    y = odeint(field, times(0.0), times(0.0, 1.0, 2.0), method="rk4", step_size=0.5)
    assert y[1, 0] > 0, "the last stage at t = 1 already sees the jump"


@pytest.mark.parametrize("back", [False, True])
def test_jump_t_ends_a_step_and_is_approached_from_either_side(back):
    """y = |t − 1| + |t − 1.7|: two jumps of the field; with jump_t exact, in a handful of steps."""

    def field(t, y):
        seen.append(float(t))
        return torch.sign(t - 1) + torch.sign(t - 1.7) + 0 * y

    t = times(0.0, 0.5, 2.0) if not back else times(2.0, 0.5, 0.0)

    def exact(s):
        return abs(s - 1) + abs(s - 1.7)

    costs = []
    for options in ({"jump_t": times(1.0, 1.7)}, {}):
        seen = []
        y, stats = odeint(
            field, times(exact(float(t[0]))), t, rtol=1e-8, atol=1e-8, options=options, return_stats=True
        )
        costs.append(stats.n_steps)
        assert y[:, 0].tolist() == pytest.approx([exact(float(s)) for s in t], abs=1e-5)
        if options:
            assert 1.0 not in seen and 1.7 not in seen
            assert y[-1].item() == pytest.approx(exact(float(t[-1])), abs=1e-12)
    assert costs[0] < costs[1] / 2


def test_step_t_first_step_min_step_max_step():
    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps, self.accepted, self.rejected = [], [], []

        def forward(self, t, y):
            return -y * (1 + 5 * torch.sin(9 * t))

        def callback_step(self, t, y, dt):
            self.steps.append((t.item(), dt.item()))

        def callback_accept_step(self, t, y, dt):
            self.accepted.append((t.item(), dt.item()))

        def callback_reject_step(self, t, y, dt):
            self.rejected.append((t.item(), dt.item()))

    def run(t=(0.0, 2.0), **options):
        func = Told()
        y, stats = odeint(
            func, times(1.0), times(*t), rtol=1e-6, atol=1e-6, options=options, return_stats=True
        )
        exact = math.exp(-(t[-1] - t[0]) + 5 / 9 * (math.cos(9 * t[-1]) - math.cos(9 * t[0])))
        assert y[-1].item() == pytest.approx(exact, rel=1e-4)
        assert len(func.accepted) == stats.n_accepted and len(func.rejected) == stats.n_rejected
        assert sorted(func.accepted + func.rejected) == sorted(func.steps)
        return func

    func = run(first_step=0.3, step_t=times(0.777, 1.5))
    assert func.steps[0] == (0.0, 0.3)
    assert {0.777, 1.5} <= {t for t, _ in func.accepted}
    assert max(dt for _, dt in run(max_step=0.01).accepted) <= 0.01 + 1e-15
    func = run(t=(2.0, 0.0), step_t=times(0.777))
    assert 0.777 in {t for t, _ in func.accepted} and all(dt > 0 for _, dt in func.steps)
    coarse = Told()
    odeint(coarse, times(1.0), times(0.0, 2.0), rtol=1e-12, atol=1e-12, options={"min_step": 0.2, "first_step": 0.2},
           max_steps=100)  # fmt: skip
    assert not coarse.rejected, "a step of min_step is kept whatever its error"
    assert len(coarse.accepted) == 10


def test_max_num_steps_counts_between_two_outputs():
    t = torch.linspace(0, 10, 21, dtype=DOUBLE)
    _, stats = odeint(van_der_pol, Y0, t, options={"max_num_steps": 40}, return_stats=True)
    assert stats.n_steps > 40
    with pytest.raises(resode.MaxStepsReached, match="max_steps=40"):
        odeint(van_der_pol, Y0, t[[0, -1]], options={"max_num_steps": 40})


def test_a_norm_of_ones_own_and_the_norm_of_tuples():
    """A norm that sees the first entry only lets the second be wrong."""

    def field(t, y):
        return torch.stack([-y[0], 60 * torch.cos(60 * t) + 0 * y[1]])

    def run(**o):
        return odeint(field, times(1.0, 0.0), times(0.0, 3.0), rtol=1e-8, atol=1e-8, return_stats=True, **o)

    (all_y, all_stats), (one_y, one_stats) = run(), run(options={"norm": lambda y: y[:1].abs().max()})
    assert one_stats.n_steps < all_stats.n_steps / 3
    assert one_y[-1, 0].item() == pytest.approx(math.exp(-3), abs=1e-7)
    assert abs(one_y[-1, 1].item() - math.sin(180)) > 1e-4 > abs(all_y[-1, 1].item() - math.sin(180))
    # A tuple's norm is the largest of its tensors': 1000 idle entries do not dilute a busy one.
    busy, idle = times(1.0), torch.zeros(1000, dtype=DOUBLE)
    pair = odeint(
        lambda t, y: (riccati(t, y[0]), 0 * y[1]), (busy, idle), times(0.0, 2.0), return_stats=True
    )[1]
    alone = odeint(riccati, busy, times(0.0, 2.0), return_stats=True)[1]
    assert pair.n_steps == alone.n_steps


def test_per_sample_norm_and_tolerances():
    y0 = torch.tensor([[1.0, 2.0], [0.5, -3.0]], dtype=DOUBLE)
    kw = dict(rtol=1e-7, atol=1e-7, per_sample=True, return_stats=True)
    plain, stats = odeint(van_der_pol, y0, times(0.0, 2.0), **kw)
    own, same = odeint(
        van_der_pol, y0, times(0.0, 2.0), options={"norm": lambda y: y.square().mean().sqrt()}, **kw
    )
    assert torch.allclose(plain, own, atol=1e-12) and torch.equal(stats.n_steps, same.n_steps)


def test_tolerances_per_entry_and_per_tensor():
    """A loose tolerance on the fast entry saves steps and costs accuracy there only."""

    def field(t, y):
        return torch.stack([torch.cos(40 * t) + 0 * y[0], -y[1]])

    y0, t = times(0.0, 1.0), times(0.0, 2.0)
    tight, n = odeint(field, y0, t, rtol=1e-9, atol=1e-9, return_stats=True)
    loose, m = odeint(field, y0, t, rtol=1e-9, atol=times(10.0, 1e-9), return_stats=True)
    assert m.n_steps < n.n_steps / 2
    assert tight[-1].tolist() == pytest.approx([math.sin(80) / 40, math.exp(-2)], abs=1e-8)
    assert loose[-1, 1].item() == pytest.approx(math.exp(-2), abs=1e-8)

    def pair(t, y):
        return (torch.cos(40 * t) + 0 * y[0], -y[1])

    both, p = odeint(pair, (y0[:1], y0[1:]), t, rtol=(1e-9, 1e-9), atol=(10.0, 1e-9), return_stats=True)
    assert p.n_steps < n.n_steps / 2 and both[1][-1].item() == pytest.approx(math.exp(-2), abs=1e-8)


def test_the_dtype_of_times():
    """Time in float32 cannot tell 1e6 from 1e6 + 1e-3; in float64, the default, it can."""
    y0 = torch.ones(1)
    t = times(1e6, 1e6 + 0.05)
    y = odeint(lambda t, y: -y, y0, t, rtol=1e-5, atol=1e-5)
    assert y[-1].item() == pytest.approx(math.exp(-0.05), abs=1e-5)
    with pytest.raises(resode.StepSizeUnderflow):
        odeint(
            lambda t, y: -y, y0, t, rtol=1e-5, atol=1e-5, options={"dtype": torch.float32, "first_step": 1e-3}
        )
    y = odeint(lambda t, y: -y, y0, times(0.0, 1.0), options={"dtype": torch.float32})
    assert y[-1].item() == pytest.approx(math.exp(-1), abs=1e-5)


def test_safety_ifactor_and_dfactor_steer_the_steps():
    steps = []

    class Told(nn.Module):
        def forward(self, t, y):
            return riccati(t, y)

        def callback_accept_step(self, t, y, dt):
            steps.append(dt.item())

    def run(**options):
        steps.clear()
        odeint(
            Told(), times(1.0), times(0.0, 5.0), rtol=1e-5, atol=1e-5, options={"first_step": 1e-4, **options}
        )
        return [b / a for a, b in itertools.pairwise(steps)]

    assert max(run()) > 5
    assert max(run(ifactor=2.0)) <= 2 + 1e-9
    assert len(run(safety=0.3)) > 1.5 * len(run())


def test_a_callback_of_fixed_steps():
    class Told(nn.Module):
        def forward(self, t, y):
            return -y

        def callback_step(self, t, y, dt):
            told.append((t.item(), tuple(y.shape), dt.item()))

    for options in ({"n_steps": 4}, {"options": {"step_size": 0.25}}):
        told = []
        odeint(Told(), Y0, times(1.0, 0.0), method="rk4", **options)
        assert told == [(t, (2,), 0.25) for t in (1.0, 0.75, 0.5, 0.25)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(options={"step_size": 0.1}), ValueError, "unknown options.*step_size.*dopri5.*As arguments"),
        (dict(method="rk4", options={"first_step": 0.1}), ValueError, "rk4 with fixed steps; it takes step_size, grid"),
        (dict(method="rk4", n_steps=2, options={"step_size": 0.1}), ValueError, "one way only, got n_steps and options"),
        (dict(method="rk4", options={"interp": "quartic", "step_size": 0.1}), ValueError, "linear, cubic; got 'quartic'"),
        (dict(method="rk4", options={"step_size": -0.1}), ValueError, "step_size must be positive"),
        (dict(options={"first_step": 0.0}), ValueError, "first_step must be positive, got 0"),
        (dict(options={"min_step": 1.0, "max_step": 0.1}), ValueError, "min_step must not be above max_step"),
        (dict(options={"max_num_steps": 0}), ValueError, "at least 1, got 0"),
        (dict(options={"ifactor": 0.5}), ValueError, "ifactor at least 1"),
        (dict(options={"dtype": torch.int64}), ValueError, "torch.float32 or torch.float64; got torch.int64"),
        (dict(options={"jump_t": times(0.5), "step_t": times(0.5)}), ValueError, "must not hold a time twice"),
        (dict(options={"jump_t": times(math.nan)}), ValueError, "jump_t must hold finite times"),
        (dict(max_steps=0), ValueError, "max_steps must be a whole number of at least 1, got 0"),
        (dict(rtol=(1e-3, 1e-3)), TypeError, "a tuple only where y0 is one"),
        (dict(y0=(Y0, Y0), func=lambda t, y: y, rtol=(1e-3,)), ValueError, "which has 2; it has 1"),
        (dict(rtol=torch.ones(3)), ValueError, r"broadcast to the state, of shape \(2,\); it has shape \(3,\)"),
        (dict(atol=torch.ones(2, requires_grad=True)), ValueError, "ask for no gradient"),
        (dict(rtol=times(0.0, 1.0), atol=times(0.0, 1.0)), ValueError, "not both zero"),
        (dict(y0=()), ValueError, "at least one tensor"),
        (dict(func=lambda t, y: (y, y)), TypeError, "got tuple"),
    ],
)  # fmt: skip
def test_wrong_options_say_the_rule(change, error, message):
    with pytest.raises(error, match=message):
        odeint(**{"func": lambda t, y: -y, "y0": Y0, "t": times(0.0, 1.0), **change})


def test_what_steers_nothing_warns_and_callbacks_need_one_step_for_all():
    with pytest.warns(UserWarning, match="no norm steers"):
        odeint(riccati, Y0, times(0.0, 1.0), method="rk4", n_steps=2, options={"norm": torch.max})

    def field(t, y):
        return -y

    field.callback_accept_step = print
    with pytest.warns(UserWarning, match="callback_accept_step.*not called"):
        odeint(field, Y0, times(0.0, 1.0), method="rk4", n_steps=2)
    with pytest.raises(ValueError, match="callback_accept_step would be called once a step"):
        odeint(field, Y0[:, None], times(0.0, 1.0), per_sample=True)


def test_what_func_raises_comes_out_with_a_note_of_where():
    def field(t, y):
        if t > 0.5:
            raise KeyError("weights")
        return -y

    with pytest.raises(KeyError, match="weights") as raised:
        odeint(field, Y0, times(0.0, 1.0))
    assert "func raised this at t=0." in raised.value.__notes__[0]
    assert "shape (2,)" in raised.value.__notes__[0]
