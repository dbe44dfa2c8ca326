"""How a solver's map loses stability as its step grows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from resode.analysis import cobweb, lyapunov_exponents, phase_portrait, stability_losses

F64 = torch.float64


def logistic(x):
    return x * (1 - x)


START = torch.tensor([[0.8]], dtype=F64)


def test_eulers_flips_on_the_logistic_field():
    """With x = y(1+η)/η the map is r = 1 + η's logistic one: flips at r = 3 and r = 1 + √6, then 3.544090."""
    losses = stability_losses(logistic, START, 3.0, max_period=4)
    assert [(loss.period, loss.kind) for loss in losses] == [(1, "flip"), (2, "flip"), (4, "flip")]
    assert losses[0].step_size == 2.0
    assert losses[1].step_size == pytest.approx(math.sqrt(6), abs=1e-9)
    assert losses[2].step_size == pytest.approx(2.5440903595519, abs=1e-8)
    assert all(abs(loss.multiplier + 1) < 1e-9 for loss in losses)
    x = losses[1].points
    torch.testing.assert_close(x[:1] + math.sqrt(6) * logistic(x[:1]), x[1:], atol=1e-9, rtol=0)


def test_rk4_flips_nowhere_on_it_but_folds():
    """R = 1 at ηλ = −2.785293563405: a multiplier passes 1, not −1."""
    losses = stability_losses(logistic, START, 3.0, solver="rk4")
    assert len(losses) == 1 and losses[0].kind == "fold"
    assert losses[0].step_size == pytest.approx(2.785293563405, abs=1e-11)


def test_a_spiral_leaves_by_rotation():
    """λ = −1 ± 2i: |1 + ηλ| = 1 at η = −2 Re λ/|λ|² = 2/5."""
    matrix = torch.tensor([[-1.0, 2.0], [-2.0, -1.0]], dtype=F64)
    [loss] = stability_losses(lambda x: x @ matrix.T, torch.zeros(1, 2, dtype=F64), 1.0)
    assert loss.kind == "rotation" and loss.step_size == pytest.approx(0.4, rel=1e-14)


def test_lyapunov_exponents():
    """ln 2 at η = 3 (r = 4); negative on a cycle; ln|R(ηλ)| for a linear field."""
    x0 = torch.rand(100, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    chaos = lyapunov_exponents(logistic, x0, 3.0, n_steps=1000, transient=100)
    assert float(chaos.mean()) == pytest.approx(math.log(2), abs=1e-2)
    assert float(lyapunov_exponents(logistic, x0[:4], 2.2, n_steps=300, transient=100).max()) < -0.1
    matrix = torch.tensor([[-1.0, 5.0], [0.0, -0.3]], dtype=F64)
    linear = lyapunov_exponents(lambda x: x @ matrix.T, torch.ones(1, 2, dtype=F64), 0.5, n_steps=400)
    np.testing.assert_allclose(sorted(linear[0].tolist()), [math.log(0.5), math.log(0.85)], atol=2e-2)


def test_lyapunov_exponents_of_blocks():
    """Blocks cI: the exponents are the mean of log(1 + c) over them."""
    blocks = [lambda x, c=c: c * x for c in (0.1, 0.2, 0.3)]
    expected = sum(math.log(1 + c) for c in (0.1, 0.2, 0.3)) / 3
    torch.testing.assert_close(
        lyapunov_exponents(blocks, torch.ones(2, 3, dtype=F64)), torch.full((2, 3), expected, dtype=F64)
    )
    modules = nn.ModuleList([nn.Linear(3, 3).double() for _ in range(2)])
    assert lyapunov_exponents(list(modules), torch.ones(1, 3, dtype=F64)).shape == (1, 3)


def test_pictures(tmp_path):
    web = cobweb(logistic, 0.1, 2.5)
    assert len(web.orbit) == 61 and float(web.orbit[1]) == pytest.approx(0.1 + 2.5 * 0.09)
    web.plot(str(tmp_path / "web.png"))
    portrait = phase_portrait(lambda x: torch.stack([x[:, 1], -x[:, 0] - 0.5 * x[:, 1]], 1), (-2, 2), (-2, 2))
    assert portrait.kinds == ["stable spiral"]
    portrait.plot(str(tmp_path / "flow.png"))
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("web", "flow"))


def test_bad_input():
    with pytest.raises(TypeError, match="float64"):
        stability_losses(lambda x: x * (1 - x), torch.tensor([[0.8]]), 3.0)
    with pytest.raises(ValueError, match="above 0"):
        lyapunov_exponents(lambda x: -x, torch.ones(1, 1), -1.0)
    with pytest.raises(ValueError, match="above 0"):
        cobweb(lambda x: -x, 0.1, 0.0)
    with pytest.raises(ValueError, match="the flow leaves"):
        stability_losses(logistic, torch.tensor([[0.1]], dtype=F64) * 0, 3.0)
    with pytest.raises(ValueError, match="no fixed point"):
        stability_losses(lambda x: x * x + 1, START, 3.0)
    with pytest.raises(ValueError, match="implicit"):
        lyapunov_exponents(logistic, START, solver="radau5")
    with pytest.raises(ValueError, match="leave out n_steps"):
        lyapunov_exponents([logistic], START, n_steps=3)
    with pytest.raises(ValueError, match="one or two intervals"):
        phase_portrait(logistic)
