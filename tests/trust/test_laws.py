"""Laws that hold whatever the numbers are: of step limits, of solves, and of stacks."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import resode
from resode import ResidualStack, max_stable_step, odeint, odeint_adjoint

EXAMPLES = int(os.environ.get("TRUST_EXAMPLES", "3"))
DOUBLE = torch.float64
drawn = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
METHODS = st.sampled_from(("euler", "midpoint", "heun3", "rk4", "dopri5"))
SEEDS, SIZES = st.integers(0, 10_000), st.integers(1, 6)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stable(seed: int, n: int) -> torch.Tensor:
    """Eigenvalues left of −0.3, so that every method has a positive limit that rounding does not decide."""
    a = torch.randn(n, n, generator=generator(seed), dtype=DOUBLE)
    return a - (torch.linalg.matrix_norm(a, 2) + 0.3) * torch.eye(n, dtype=DOUBLE)


def orthogonal(seed: int, n: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=DOUBLE))[0]


@drawn
@given(SEEDS, SIZES, METHODS, st.floats(0.01, 100))
def test_a_faster_field_has_a_shorter_step(seed, n, method, factor):
    """h(cJ) = h(J)/c, and J, Jᵀ and QJQᵀ have the eigenvalues of J."""
    a, q = stable(seed, n), orthogonal(seed + 1, n)
    h = max_stable_step(a, solver=method)
    assert max_stable_step(factor * a, solver=method) == pytest.approx(h / factor, rel=1e-6)
    assert max_stable_step(a.T, solver=method) == pytest.approx(h, rel=1e-6)
    assert max_stable_step(q @ a @ q.T, solver=method) == pytest.approx(h, rel=1e-6)


@drawn
@given(SEEDS, SIZES, SIZES, METHODS)
def test_of_two_systems_beside_each_other_the_stiffer_limits(seed, n, m, method):
    a, b = stable(seed, n), 3 * stable(seed + 1, m)
    both = max_stable_step(torch.block_diag(a, b), solver=method)
    assert both == pytest.approx(min(max_stable_step(x, solver=method) for x in (a, b)), rel=1e-6)


@pytest.mark.parametrize("n", [3, 8, 33])
@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_matrices_of_known_spectrum(n, method):
    """The heat equation's −4 sin²(kπ/2(n+1)); a circulant's exp(2πik/n) − 1, on which Euler's limit is 1."""
    heat = torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1) - 2 * torch.eye(n)
    largest = 4 * torch.sin(torch.tensor(n * torch.pi / (2 * (n + 1)), dtype=DOUBLE)) ** 2
    expected = resode.real_stability_interval(method) / largest.item()
    assert max_stable_step(heat.double(), solver=method) == pytest.approx(expected, rel=1e-9)
    upwind = torch.eye(n, dtype=DOUBLE).roll(1, 0) - torch.eye(n, dtype=DOUBLE)
    if method == "euler":  # λ = 0 is kept, and the others lie on the circle about −1
        assert max_stable_step(upwind - 1e-3 * torch.eye(n, dtype=DOUBLE)) <= 1 + 1e-6
        assert max_stable_step(upwind - 1e-3 * torch.eye(n, dtype=DOUBLE)) > 0.9


@drawn
@given(SEEDS, SIZES, st.sampled_from(("dopri5", "tsit5", "dopri8", "kvaerno5")))
def test_back_again(seed, n, method):
    """The flow from 0 to 1 and back to 0 is the identity."""
    a = stable(seed, n)
    a = a / torch.linalg.matrix_norm(a, 2)
    x = torch.randn(2, n, generator=generator(seed), dtype=DOUBLE)
    span = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    there = odeint(lambda t, y: torch.tanh(y @ a.T), x, span, method=method, rtol=1e-9, atol=1e-11)[-1]
    back = odeint(lambda t, y: torch.tanh(y @ a.T), there, span.flip(0), method=method, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(back[-1], x, rtol=1e-6, atol=1e-6)


class Field(nn.Module):
    """tanh(Wx), for solves with (t, x) and stacks with x."""

    def __init__(self, seed: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(n, n, generator=generator(seed), dtype=DOUBLE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight.T)


@drawn
@given(SEEDS, SIZES, st.permutations(range(5)))
def test_samples_do_not_know_their_order(seed, n, order):
    x = torch.randn(5, n, generator=generator(seed), dtype=DOUBLE)
    block = resode.ODEBlock(lambda t, y: torch.tanh(y) - y, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(block(x[list(order)]), block(x)[list(order)], rtol=1e-12, atol=1e-14)


def stack(seed: int, n: int, **options) -> ResidualStack:
    return ResidualStack([Field(seed + i, n) for i in range(4)], step_size=0.25, **options)


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


@drawn
@given(SEEDS, SIZES, METHODS)
def test_a_checkpoint_has_autograds_gradient(seed, n, method):
    x = torch.randn(3, n, generator=generator(seed), dtype=DOUBLE)
    found = [gradients(stack(seed, n, solver=method, gradient=g), x) for g in ("autograd", "checkpoint")]
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


@drawn
@given(SEEDS, SIZES, METHODS)
def test_a_state_dict_is_all_there_is(seed, n, method):
    x = torch.randn(3, n, generator=generator(seed), dtype=DOUBLE)
    one, two = stack(seed, n, solver=method), stack(seed + 100, n, solver=method)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(one(x), two(x))


@drawn
@given(SEEDS, SIZES, st.sampled_from(("euler", "midpoint", "heun3", "rk4")))  # dopri5 chooses its own steps
def test_refined_and_coarsened_is_the_same_stack(seed, n, method):
    """Two halves of a block with its own field are two substeps; coarsening takes them together again."""
    x = torch.randn(3, n, generator=generator(seed), dtype=DOUBLE)
    plain = stack(seed, n, solver=method)
    fine = plain.refine(2)
    assert torch.equal(fine.coarsen(2)(x), plain(x))
    halves = stack(seed, n, solver=method, substeps=2)
    torch.testing.assert_close(fine(x), halves(x), rtol=1e-12, atol=1e-14)


@drawn
@given(SEEDS, SIZES)
def test_the_adjoint_has_autograds_gradient(seed, n):
    x = torch.randn(2, n, generator=generator(seed), dtype=DOUBLE)
    span, found = torch.tensor([0.0, 1.0], dtype=DOUBLE), []
    for solve in (odeint, odeint_adjoint):
        field = resode.fields.Autonomous(Field(seed, n))
        start = x.clone().requires_grad_()
        y = solve(field, start, span, rtol=1e-10, atol=1e-12)[-1]
        found.append(torch.autograd.grad(y.square().sum(), [start, *field.parameters()]))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{}, {"gradient": "checkpoint"}, {"solver": "rk4"}, {"solver": "kvaerno3"}]
)
def test_the_same_call_gives_the_same_bits(options):
    """Of every way to solve, with its gradients; per sample too."""
    x = torch.randn(6, 5, generator=generator(3), dtype=DOUBLE)
    first, second = (gradients(stack(3, 5, **options), x) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "kvaerno5", "radau5", "rk4"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_solve_again_gives_the_same_bits(method, per_sample):
    steps = {"n_steps": 7} if method == "rk4" else {}
    x = torch.randn(4, 3, generator=generator(4), dtype=DOUBLE)
    span = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    first, second = (
        odeint(lambda t, y: torch.sin(3 * y) - y, x, span, method=method, per_sample=per_sample, **steps)
        for _ in range(2)
    )
    assert torch.equal(first, second)
