"""One answer to "which step is safe?": every way gives the same figure, or a bound that holds."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from resode import ResidualStack, find_fixed_points, max_stable_step, profile_depth, step_limit
from resode.analysis import classify
from resode.analysis.steps.block_limits import block_limits
from resode.jacobian.matrices import evened
from resode.jacobian.spectrum import SpectrumOptions, spectrum
from resode.stability.limits import rounding
from resode.stability.spectra import limits
from tests.benchmarks.one_answer import ALLOWED, Attention, Skewed, Symmetric, every_way, matrices

F64 = torch.float64
BOTH = pytest.mark.parametrize("dtype", [torch.float32, F64])


def linear(matrix):
    return lambda x: x @ matrix.T


def of(matrix, **options):
    """The step limit of a matrix as a field that is not formed."""
    return step_limit(
        linear(matrix), torch.zeros(1, len(matrix), dtype=matrix.dtype), matrix_free=True, **options
    )


def convolutional(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1)]
    return nn.Sequential(*layers)


def damped(field: nn.Module, c: float) -> nn.Module:
    class Damped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field

        def forward(self, x):
            return self.field(x) - c * x

    return Damped()


@pytest.mark.parametrize("kind", ["convolutional", "damped", "dense", "attention", "skewed"])
def test_every_public_way_on_a_block(kind):
    """Dense float64 eigenvalues are the truth; in float32 the axis may be too near, then a bound holds."""
    torch.manual_seed(3)
    field, x = {
        "convolutional": (convolutional(0), torch.randn(2, 4, 7, 7)),
        "damped": (damped(convolutional(1), 1.0), torch.randn(2, 4, 7, 7)),
        "dense": (Symmetric(24), torch.randn(2, 24)),
        "attention": (Attention(16), torch.randn(2, 5, 16)),
        "skewed": (damped(Skewed(convolutional(2), 4, 1.0), 1.0), torch.randn(2, 4, 6, 6)),
    }[kind]
    field = field.eval()
    for solver in ("euler", "rk4"):
        for dtype, allowed in ALLOWED.items():
            f, at = field.to(dtype), x.to(dtype)
            found = every_way(f, at, solver)
            truth = step_limit(field.double(), x.double(), solver=solver)
            field.to(dtype)
            for way, (step, sure, slow, slow_sure) in found.items():
                for value, fine, true in (
                    (step, sure, float(truth.step.min())),
                    (slow, slow_sure, float(truth.decaying_step.min())),
                ):
                    if math.isnan(value):
                        continue
                    close = value == true or abs(value / true - 1) <= allowed
                    assert close if fine else value >= true * (1 - allowed), (way, solver, dtype, value, true)


def test_structured_matrices_in_small(capsys):
    """Two of each kind: no converged figure is more than 1e-3 off, normal ones are converged."""
    with warnings.catch_warnings():
        assert matrices(20, largest=160) == 0
    assert "20 matrices" in capsys.readouterr().out


@BOTH
def test_a_tridiagonal_toeplitz_matrix(dtype):
    """λ = −2 + 2√0.26 cos(kπ/166), κ about 1e61: 0.66233 in any dtype, said to be ill-conditioned."""
    n = 165
    j = torch.diag(torch.full((n,), -2.0)) + torch.diag(torch.full((n - 1,), 1.3), 1)
    j = (j + torch.diag(torch.full((n - 1,), 0.2), -1)).to(dtype)
    truth = 2 / (2 + 2 * math.sqrt(0.26) * math.cos(math.pi / (n + 1)))
    for limit in (step_limit(j), of(j)):
        assert float(limit.step) == pytest.approx(truth, rel=1e-5)
        assert not limit.converged and "condition number" in str(limit)


@BOTH
def test_a_triangular_matrix(dtype):
    """Its diagonal, whatever the couplings."""
    generator = torch.Generator().manual_seed(0)
    j = torch.triu(torch.randn(300, 300, generator=generator, dtype=F64), 1) / 300**0.5
    j = (j - torch.diag(torch.linspace(1, 2, 300, dtype=F64))).to(dtype)
    for limit in (step_limit(j), of(j)):
        assert float(limit.step) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("n", [24, 60, 262])
def test_a_turned_jordan_block(n):
    """True limit 4. Rounding scatters λ = −½ over a disc: no figure, and no growth, is claimed."""
    q, _ = np.linalg.qr(np.random.default_rng(n).normal(size=(n, n)))
    limit = step_limit(q @ (-0.5 * np.eye(n) + np.diag(np.ones(n - 1), 1)) @ q.T)
    assert not limit.converged and math.isinf(limit.error)
    assert "not known" in str(limit) and "condition number" in str(limit)
    assert "no small step is stable" not in str(limit)


@pytest.mark.parametrize("kind", ["cycle", "permutation", "orthogonal"])
@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_eigenvalues_on_a_circle(kind, solver):
    """No Krylov space finds them among 1,100 others, but the ones that it has seen are a bound."""
    n = 1100
    generator = torch.Generator().manual_seed(1)
    q = {
        "cycle": lambda: torch.eye(n).roll(1, 0),
        "permutation": lambda: torch.eye(n)[torch.randperm(n, generator=generator)],
        "orthogonal": lambda: torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))[0].float(),
    }[kind]()
    x = torch.zeros(1, n)
    with pytest.warns(RuntimeWarning, match="no convergence within 320 products"):
        found = spectrum(linear(q - torch.eye(n)), x, SpectrumOptions(budget=320), [solver])
    limit = limits(found, solver)
    truth = {"euler": 1.0, "rk4": 2.785293563405282 / 2}[solver]
    assert found.normal.all()
    assert truth * (1 - 1e-4) <= float(limit.step) <= 1.2 * truth
    assert not limit.converged.any() and "≤" in str(limit)


@pytest.mark.parametrize("free", [False, True])
def test_a_mode_beside_the_axis_gives_a_bound(free):
    """λ = −rτ ± iω, 0.003 < r < 3, in float32: Euler's limit is 2rτ/|λ|², and what is said is not below it.

    0 stands where rounding of J, 4ε‖J‖, may have made the mode: it moves λ by κ times as much, and the step by
    twice that over ω² at most, here 1e-5/‖J‖ and less. The eigenvectors are orthonormal, or of κ about 2.
    """
    rng, n, near, zeros = np.random.default_rng(0), 40, [], 0
    for case in range(40):
        lam = -rng.uniform(0.2, 1, n // 2) + 1j * rng.uniform(0.05, 1, n // 2)
        lam[0] = -rounding(n, 2.0**-23) * 10 ** rng.uniform(-2.5, 0.5) + 1j * 10 ** rng.uniform(-1.7, 0)
        v = np.eye(n) + case % 2 * 0.3 * rng.normal(size=(n, n)) / n**0.5
        v = np.linalg.qr(rng.normal(size=(n, n)))[0] @ v
        rotations = scipy.linalg.block_diag(*([[z.real, z.imag], [-z.imag, z.real]] for z in lam))
        j = v @ rotations @ np.linalg.inv(v)
        norm = np.linalg.norm(j, 2)
        truth = float((-2 * lam.real / np.abs(lam) ** 2).min())
        limit = of(torch.as_tensor(j, dtype=torch.float32)) if free else step_limit(j.astype(np.float32))
        step = float(limit.step)
        if limit.converged and step == 0:
            zeros += 1
            assert truth * norm <= 1e-5 and -lam.real.max() <= 2 * 4 * 2.0**-23 * norm * np.linalg.cond(v)
        elif limit.converged:
            assert step == pytest.approx(truth, rel=1e-3)
        else:
            assert step >= truth * (1 - 1e-3) and "≤" in str(limit)
            near.append(step / truth)
    assert len(near) > 5 and min(near) < 1.5, "some of the bounds are those of the mode itself"
    assert zeros, "and some modes cannot be told from the axis"


@BOTH
@pytest.mark.parametrize("free", [False, True])
def test_what_never_decays_allows_no_step(dtype, free):
    """Oscillators, turning skew fields and masses on springs: 0 is the figure of Euler's limit, no bound."""
    rng = np.random.default_rng(0)
    a, stiff = rng.normal(size=(60, 60)), rng.normal(size=(20, 20))
    mass = np.block(
        [[np.zeros((20, 20)), np.eye(20)], [-stiff @ stiff.T / 20 - np.eye(20), np.zeros((20, 20))]]
    )
    for j in (np.array([[0.0, 1.0], [-1.0, 0.0]]), a - a.T, mass):
        matrix = torch.as_tensor(j, dtype=dtype)
        limit = of(matrix) if free else step_limit(matrix)
        assert limit.converged and float(limit.step) == 0.0


def test_no_space_is_needed_for_small_circles():
    """Up to 1,024 entries J itself is formed where the search does not end: exact."""
    limit = step_limit(lambda x: x.roll(1, -1) - x, torch.zeros(1, 300, dtype=F64), matrix_free=True)
    assert limit.converged.all() and float(limit.step) == pytest.approx(1.0, rel=1e-9)


def test_extremes():
    assert max_stable_step(torch.tensor([[-1e300]], dtype=F64)) == pytest.approx(2e-300)
    at = torch.ones(1, 3, dtype=F64)
    assert float(max_stable_step(lambda x: -1e300 * x, at)) == pytest.approx(2e-300)
    with pytest.raises(ValueError, match="too large to be squared"):
        max_stable_step(lambda x: -1e300 * x, torch.ones(1, 2000, dtype=F64))
    assert max_stable_step([[-2, 0], [0, -5]]) == 0.4  # numbers as they are written
    assert max_stable_step([[-1e-300, 0.0], [0.0, -2e-300]]) == pytest.approx(1e300)


def test_a_growing_mode_limits_no_decaying_one():
    """τ is that of the whole spectrum: 3.6e-14 beside 100 counts as 0, also among the decaying ones."""
    network = ResidualStack([nn.Linear(3, 3, bias=False)]).eval().double()
    network.fields[0].weight.data.copy_(torch.diag(torch.tensor([100.0, -2.0, 3.6e-14], dtype=F64)))
    row = next(block_limits(network, torch.ones(1, 3, dtype=F64), ["euler"])).rows[0]
    assert row.limiting_eigenvalue == -2 and row.decaying_step == pytest.approx(1.0) and row.exact


def test_evened_takes_a_diagonal_scaling_back():
    """D⁻¹SD over three decades, S symmetric and irreducible: only D A D⁻¹ = S is balanced."""
    generator = np.random.default_rng(0)
    s = generator.normal(size=(30, 30))
    s = s + s.T
    logs = np.linspace(0, 8, 30)
    found, u = evened(s * np.exp(logs[None] - logs[:, None]))
    np.testing.assert_allclose(found, s, rtol=1e-4)
    np.testing.assert_allclose(u - u[0], logs, atol=1e-4)


# -- fields of every kind ----------------------------------------------------------------------------


def test_hardsigmoid_networks_get_spectra():
    """No second derivative in autograd: eigenvalues by Jᵀ alone, singular values from J itself."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 6), nn.Hardsigmoid(), nn.Linear(6, 6))

        def forward(self, x):
            return x + self.inner(x)

    network = nn.Sequential(Block(), Block()).eval()
    x = torch.randn(2, 6)
    profile = profile_depth(network, x, lesions=False)
    for i, row in enumerate(profile.rows):
        j = torch.func.vmap(torch.func.jacrev(network[i].inner))(x).detach()
        eigenvalues = torch.linalg.eigvals(j.double()).flatten()
        assert row.rightmost.real == pytest.approx(float(eigenvalues.real.max()), abs=1e-5)
        assert row.epsilon == pytest.approx(float(torch.linalg.matrix_norm(j, 2).max()), rel=1e-5)
        x = network[i](x).detach()
    assert "nan" not in str(profile)
    field = nn.Sequential(nn.Linear(200, 200), nn.Hardsigmoid(), nn.Linear(200, 200)).double()
    at = torch.randn(1, 200, dtype=F64)
    free, dense = step_limit(field, at, solver="rk4", matrix_free=True), step_limit(field, at, solver="rk4")
    torch.testing.assert_close(free.decaying_step, dense.decaying_step, rtol=1e-5, atol=0)


def test_nan_weights_are_named():
    network = ResidualStack([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)]).eval()
    network.fields[1].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="F in block 1 of the stack"):
        list(block_limits(network, torch.ones(1, 3), ["euler"]))
    with pytest.raises(ValueError, match="finite"):
        profile_depth(network, torch.ones(1, 3))


def test_a_large_fixed_point_is_classified():
    """1,500 entries, beyond dense: the rightmost eigenvalue by the same search."""
    rates = -torch.linspace(0.5, 3, 1500, dtype=F64)
    point = find_fixed_points(lambda x: rates * x, torch.ones(1, 1500, dtype=F64)).points
    found = classify(lambda x: rates * x, point, solver="euler", step_size=0.5)
    assert found.kind == ["node"] and found.stable.all() and found.converged.all()
    assert complex(found.eigenvalues[0, 0]).real == pytest.approx(-0.5, rel=1e-3)
