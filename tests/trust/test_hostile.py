"""Arguments that came up as bare errors once, each refused by a rule, or right: by kind, a small case for each."""

import math

import pytest
import torch
from torch import nn

import resode
from resode import plots
from resode.checks import NoKernel, checked
from resode.tableaus import ButcherTableau
from resode.training.data.batches import Batches
from resode.training.fit import fit

HEUN = {"name": "heun", "a": ((0, 0), (1, 0)), "b": (0.5, 0.5), "c": (0, 1)}


@pytest.mark.parametrize("part", ["stages", "explicit", "fsal"])
def test_what_is_derived_is_compared_with_numbers(part):
    for wrong in (torch.ones(2), "2", 0.5):
        with pytest.raises(TypeError, match=rf"'heun'.*{part}"):
            ButcherTableau(**{**HEUN, part: wrong})


PARTS = ["a", "b", "c", "b_error", "interpolant", "dense_a", "recurrence", "recurrence_weights"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, "1", None, 1j, [1]])
def test_coefficients_are_finite_real_numbers(part, bad):
    """Also nan, which differs from no sum by more than a tolerance."""
    rows = part in ("a", "interpolant", "dense_a", "recurrence")
    given = ((bad, 0), (1, 0)) if rows else (bad, 1)
    finite = bad in (math.inf,) or bad != bad
    with pytest.raises(ValueError if finite else TypeError, match=rf"'heun'.*{part}"):
        ButcherTableau(**{**HEUN, part: given})
    for wrong in (3, "text", torch.ones(2, 2), object()):
        with pytest.raises(TypeError, match=rf"'heun'.*{part}"):
            ButcherTableau(**{**HEUN, part: wrong})


@pytest.mark.parametrize(
    ("draw", "by"),
    [
        (plots.transient_growth, "resode.analysis.transient_growth"),
        (plots.edge, "theory.measures.edge.edge_check"),
        (plots.bifurcation, "resode.analysis.bifurcation"),
        (plots.comparison, "resode.compare"),
        (plots.swap_accuracy, "resode.swap_report"),
        (plots.cobweb, "resode.analysis.cobweb"),
        (plots.phase_portrait, "resode.analysis.phase_portrait"),
        (plots.depth_profile, "resode.profile_depth"),
        (plots.block_gains, "resode.diagnose"),
        (lambda x: plots.step_limits([x]), "resode.training.monitor.StepLimits"),
        (lambda x: plots.group_spectra([x], "rk4"), "block_limits"),
    ],
)
@pytest.mark.parametrize("wrong", [None, 3, "text", {}, torch.ones(2), nn.Identity()], ids=repr)
def test_figures_name_what_they_draw(draw, by, wrong):
    with pytest.raises(TypeError, match=rf"{by} gives"):
        draw(wrong)


def test_figures_of_nothing():
    row = {"epoch": [1.0], "lr": [0.1], "test_accuracy": [0.5], "test_loss": [1.0]}
    assert plots.training_curves(row)
    for wrong, words in (
        ({}, "no epoch"),
        ({name: [] for name in row}, "lengths"),
        (row | {"lr": [0.1, 0.2]}, "lengths"),
        (row | {"train_loss": [1.0]}, "no train_accuracy"),
    ):
        with pytest.raises(ValueError, match=words):
            plots.training_curves(wrong)
    assert plots.step_limits([])  # of a run without a record: axes without lines
    with pytest.raises(ValueError, match="at least one"):
        plots.group_spectra([], "rk4")


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": "0"}, ValueError, "seed"),
        ({"learning_rate": 0}, ValueError, "learning_rate"),
        ({"learning_rate": 1j}, ValueError, "learning_rate"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"x": torch.tensor(1.0)}, ValueError, "dimension of samples"),
        ({"loss_fn": lambda y, t: None}, ValueError, "a scalar"),
        ({"loss_fn": lambda y, t: y}, ValueError, "a scalar"),
        ({"target": torch.ones(3, 1) * 1j}, TypeError, "real numbers"),
        ({"model": nn.Linear(1, 1).half()}, TypeError, "float16"),
    ],
)
def test_what_a_fit_takes(changed, error, words):
    given = {"model": nn.Linear(1, 1), "x": torch.ones(3, 1), "target": torch.ones(3, 1), "steps": 1}
    with pytest.raises(error, match=words):
        fit(**(given | changed))


@pytest.mark.parametrize("device", ["gpu", "", "cuda:99", "meta", 3, None, b"cpu"])
def test_devices_that_are_not_there(device):
    with pytest.raises((ValueError, TypeError), match="device"):
        images, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
        Batches(images, labels, 2, mean=(0.0,), std=(1.0,), train=False, device=device)


def test_empty_batches():
    """Refused where there is nothing to measure; a shortcut of no samples is no samples."""
    none = torch.zeros(0, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="at least one entry"):
        resode.analysis.product_norm([torch.tanh], none)
    with pytest.raises(ValueError, match="at least one sample"):
        resode.analysis.depth_convergence(lambda n: torch.tanh, none, [1, 2, 4])
    gate = resode.shortcuts.InputGatedShortcut(4)
    assert gate(torch.zeros(0, 4, 3, 2)).shape == (0, 4, 3, 2) and gate(torch.zeros(0, 4)).shape == (0, 4)
    network = nn.Sequential(resode.ResidualStack(nn.Linear(4, 4), depth=2), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="at least one sample"):
        resode.swap_report(network, [(none.float(), torch.zeros(0, dtype=torch.long))], ["rk4"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_singular_values_of_sixteen_bits_are_taken_in_single(dtype):
    """Torch has no SVD of them: 1.05³ within what the dtype resolves in 3 products, 0.05³ without shortcuts."""
    x = torch.ones(2, 3, dtype=dtype)
    found = resode.analysis.product_norm([lambda x: 0.05 * x] * 3, x)
    torch.testing.assert_close(found.norm, torch.full((2,), 1.05**3), rtol=0.02, atol=0)
    assert found.radii.dtype == torch.float32
    assert resode.depth_step(nn.Sequential(resode.ResidualStack(nn.Linear(3, 3), depth=4)).to(dtype), x) > 0


def test_dtypes_that_torch_has_no_operation_for():
    """What torch says of its kernel becomes what to do; either parent catches it."""

    @checked
    def triangle(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(x)[1]

    assert issubclass(NoKernel, TypeError) and issubclass(NoKernel, NotImplementedError)
    with pytest.raises(NoKernel, match=r"triangle needs an operation .* for Half numbers: take float32"):
        triangle(torch.eye(2, dtype=torch.float16))


def test_losses_are_real():
    """½ z² of complex z would be no size of it."""
    layers = [nn.Linear(2, 2, dtype=torch.complex64)]
    x = torch.ones(3, 2, dtype=torch.complex64)
    with pytest.raises(TypeError, match="pass loss_fn="):
        resode.analysis.loss_gradient_norms(nn.Sequential(*layers), layers, x)
    with pytest.raises(TypeError, match="loss_fn gave"):
        resode.analysis.loss_gradient_norms(
            nn.Sequential(*layers), layers, x, torch.ones(3), loss_fn=lambda y, t: y.sum()
        )
    with pytest.raises(TypeError, match="logits must be real"):
        resode.shortcuts.doubly_stochastic(x[:2])


@pytest.mark.parametrize("ask", [resode.profile_depth, resode.max_learning_rate])
def test_inference_mode_is_named_where_gradients_are_needed(ask):
    with torch.inference_mode():
        network = nn.Sequential(resode.ResidualStack(nn.Linear(4, 4), depth=2), nn.Linear(4, 3)).eval()
        x, y = torch.ones(2, 4), torch.tensor([0, 1])
        with pytest.raises(RuntimeError, match=r"torch.inference_mode\(\) makes has no gradients"):
            if ask is resode.profile_depth:
                ask(network, x, y)
            else:
                ask(network, nn.functional.cross_entropy, (x, y))


def test_gradients_are_taken_under_no_grad():
    """The norms of a loss's gradient are the same whether gradients are on or off."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    model, x = nn.Sequential(first, second), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    want = resode.analysis.loss_gradient_norms(model, list(model), x)
    with torch.no_grad():
        assert torch.equal(resode.analysis.loss_gradient_norms(model, list(model), x), want)
