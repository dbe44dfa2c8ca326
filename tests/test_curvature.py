"""The largest Hessian eigenvalue and the learning rate that it allows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from resode import max_learning_rate
from resode.analysis import largest_hessian_eigenvalue
from theory.measures.quadratic import QuadraticModel

F64 = torch.float64


def small_net(batch_norm=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(6)] if batch_norm else []
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3)).double()


def data():
    torch.manual_seed(1)
    return torch.randn(20, 4, dtype=F64), torch.randint(3, (20,))


def dense_hessian(model, loss_fn, x, target):
    names, parameters = zip(*model.named_parameters(), strict=True)
    flat = torch.cat([p.detach().flatten() for p in parameters])

    def loss(v):
        pieces = v.split([p.numel() for p in parameters])
        values = {n: q.reshape(p.shape) for n, q, p in zip(names, pieces, parameters, strict=True)}
        return loss_fn(functional_call(model, values, (x,)), target)

    return torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_against_a_dense_hessian(batch_size):
    model, loss_fn, (x, target) = small_net(), nn.CrossEntropyLoss(), data()
    expected = float(torch.linalg.eigvalsh(dense_hessian(model, loss_fn, x, target))[-1])
    found = largest_hessian_eigenvalue(model, loss_fn, (x, target), batch_size=batch_size)
    assert found == pytest.approx(expected, rel=1e-8)
    assert max_learning_rate(model, loss_fn, (x, target)) == pytest.approx(2 / expected, rel=1e-8)


def quadratic(eigenvalues):
    """L = ½ Σ λ_i w_i², a model whose output is √λ ⊙ w."""

    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(len(eigenvalues), dtype=F64))

        def forward(self, x):
            return x * self.w

    root = torch.tensor(eigenvalues, dtype=F64).sqrt()
    return Weights(), lambda y, target: 0.5 * ((y - target) ** 2).sum(), (root, torch.zeros_like(root))


@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.5, False), (0.9, True), (0.5, True)]
)
def test_gradient_descent_diverges_just_above_and_converges_just_below(momentum, nesterov):
    model, loss_fn, pair = quadratic([5.0, 2.0, 0.3])
    limit = max_learning_rate(model, loss_fn, pair, momentum, nesterov=nesterov)
    assert limit == pytest.approx(2 * (1 + momentum) / ((1 + 2 * momentum) if nesterov else 1) / 5, rel=1e-12)
    for factor, ends in ((0.99, "small"), (1.01, "large")):
        with torch.no_grad():
            model.w.fill_(1.0)
        optimizer = torch.optim.SGD(model.parameters(), factor * limit, momentum, nesterov=nesterov)
        for _ in range(3000):
            optimizer.zero_grad()
            loss = loss_fn(model(pair[0]), pair[1])
            loss.backward()
            optimizer.step()
        assert (loss.item() < 1e-6) if ends == "small" else (loss.item() > 1e6)


def test_nothing_limits_a_linear_loss():
    model = nn.Linear(2, 1).double()
    assert max_learning_rate(model, lambda y, t: y.sum(), (torch.ones(3, 2, dtype=F64), None)) == math.inf


def test_the_model_stays_as_it_was():
    model = small_net(batch_norm=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    largest_hessian_eigenvalue(model, nn.CrossEntropyLoss(), data())
    assert model.training and all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_attention_has_second_derivatives_here():
    """The fused kernels of attention have none."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=F64)
    assert largest_hessian_eigenvalue(layer, nn.MSELoss(), (x, torch.zeros_like(x)), tol=1e-4) > 0


def test_float32_does_as_well_as_it_can():
    """The default tolerance is finer than float32 resolves; that is no reason to warn."""
    model, loss_fn, (x, target) = small_net(), nn.CrossEntropyLoss(), data()
    expected = largest_hessian_eigenvalue(model, loss_fn, (x, target))
    found = largest_hessian_eigenvalue(model.float(), loss_fn, (x.float(), target))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_basis_that_starts_again(monkeypatch):
    """Eight vectors of memory, 63 parameters: the same eigenvalue after some restarts."""
    model, loss_fn, pair = small_net(), nn.CrossEntropyLoss(), data()
    expected = largest_hessian_eigenvalue(model, loss_fn, pair)
    monkeypatch.setattr("resode.analysis.curvature._BASIS_BYTES", 1)
    assert largest_hessian_eigenvalue(model, loss_fn, pair) == pytest.approx(expected, rel=1e-8)


def test_too_few_products_warn():
    with pytest.warns(RuntimeWarning, match="raise max_iter"):
        largest_hessian_eigenvalue(small_net(), nn.CrossEntropyLoss(), data(), max_iter=3)


def test_what_would_give_a_wrong_rate_is_refused():
    """A sum taken in parts would be off by the number of parts; nan has no eigenvalue; 0 products say nothing."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(12, 3).double(), torch.randn(12, 2).double()
    with pytest.raises(ValueError, match="a mean over samples, and this one is not"):
        max_learning_rate(model, nn.MSELoss(reduction="sum"), (x, y), batch_size=5)
    with pytest.raises(ValueError, match="holds inf or nan"):
        max_learning_rate(model, nn.MSELoss(), (x * math.nan, y))
    with pytest.raises(ValueError, match="max_iter must be"):
        max_learning_rate(model, nn.MSELoss(), (x, y), max_iter=0)


def test_bad_input():
    model, pair = small_net(), data()
    with pytest.raises(ValueError, match="momentum"):
        max_learning_rate(model, nn.CrossEntropyLoss(), pair, momentum=1.0)
    with pytest.raises(ValueError, match="scalar"):
        max_learning_rate(model, nn.CrossEntropyLoss(reduction="none"), pair)
    with pytest.raises(ValueError, match="Dropout"):
        max_learning_rate(
            nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double(), nn.CrossEntropyLoss(), pair
        )
    with pytest.raises(ValueError, match="whole batch"):
        max_learning_rate(small_net(batch_norm=True), nn.CrossEntropyLoss(), pair, batch_size=5)
    with pytest.raises(ValueError, match="no parameter"):
        max_learning_rate(small_net().requires_grad_(False), nn.CrossEntropyLoss(), pair)
    with pytest.raises(ValueError, match="pair"):
        max_learning_rate(model, nn.CrossEntropyLoss(), pair[0])


def test_a_quadratic_model_is_the_taylor_polynomial():
    """Value and gradient against the dense Hessian; third derivatives make the rest, at most ‖d‖³."""
    model, loss_fn, (x, target) = small_net(), nn.CrossEntropyLoss(), data()
    before = [p.detach().clone() for p in model.parameters()]
    hessian = dense_hessian(model, loss_fn, x, target)
    quadratic = QuadraticModel(model, loss_fn, (x, target))
    assert [name for name, _ in quadratic.named_parameters()] == ["displacement"]
    loss = loss_fn(model(x), target)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert quadratic.loss == pytest.approx(float(loss.detach()), rel=1e-15)
    assert float(quadratic().detach()) == quadratic.loss
    d = torch.randn(len(gradient), dtype=F64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        quadratic.displacement.copy_(d)
    value = quadratic()
    value.backward()
    expected = float(loss.detach()) + float(gradient @ d) + float(d @ hessian @ d) / 2
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(quadratic.displacement.grad, gradient + hessian @ d, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_quadratic_model_says_what_it_needs():
    frozen = small_net().requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        QuadraticModel(frozen, nn.CrossEntropyLoss(), data())
    with pytest.raises(ValueError, match="scalar"):
        QuadraticModel(small_net(), nn.CrossEntropyLoss(reduction="none"), data())
