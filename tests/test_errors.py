"""Every failure of a solve: its type, what it names, and whether its advice is true."""

import pytest
import torch
from benchmarks.errors import CASES, messages

import resode
from resode import METHODS, SolverError, odeint
from resode.solve.diagnosis import explain, number, spectrum

DOUBLE = torch.float64
ONE, SPAN = torch.ones(1, dtype=DOUBLE), torch.tensor([0.0, 1.0], dtype=DOUBLE)


@pytest.fixture(scope="module")
def errors():
    return messages()


@pytest.mark.parametrize("name", CASES)
def test_every_error_is_of_its_type_and_names_time_and_step(name, errors):
    error = errors[name]
    kind = name.split(",")[0]
    if kind.startswith(("MaxSteps", "StepSize", "NonFinite")):
        assert type(error).__name__ == kind
    if isinstance(error, SolverError):
        assert "t=" in str(error) and error.time is not None and error.step_size is not None
        assert f"t={error.time:.9g}" in str(error)
        assert ("sample" in str(error)) == (error.sample is not None)


def test_a_stiff_field_is_called_so_and_the_step_it_needs_is_the_stability_limit(errors):
    """dopri5's real stability interval is 3.3066."""
    error = errors["MaxStepsReached, stiff"]
    assert error.eigenvalue == pytest.approx(-1e6)
    assert "stiff: λ ≈ −1e6; dopri5 needs steps below 3.31e-6" in str(error)
    assert 'Try method="kvaerno5" or "radau5"' in str(error)


@pytest.mark.parametrize("method", ["kvaerno5", "radau5"])
def test_the_advice_for_a_stiff_field_works(method):
    def field(t, y):
        return -1e6 * (y - torch.cos(t))

    y = odeint(field, ONE, SPAN, method=method, max_steps=100, rtol=1e-6, atol=1e-6)
    assert y[-1].item() == pytest.approx(0.5403023, abs=1e-4)


def test_the_sample_that_limits_is_named_with_its_own_eigenvalue(errors):
    error = errors["MaxStepsReached, per sample"]
    assert error.sample == 1 and error.eigenvalue == pytest.approx(-1e5)
    blowing = errors["blow-up of one sample"]
    assert blowing.sample == 1 and blowing.eigenvalue.real > 1e6 and "growing" in str(blowing)


def test_accuracy_is_not_mistaken_for_stiffness_nor_the_reverse(errors):
    error = errors["MaxStepsReached, not stiff"]
    assert "not stiff: λ ≈ 0 ± 20i allows dopri5 steps up to" in str(error)
    assert "λ" not in str(errors["MaxStepsReached, no Jacobian (300 entries)"])


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_fixed_steps_outside_the_region_are_told_the_limit_and_inside_they_work(method):
    limit = resode.real_stability_interval(method) / 100

    def field(t, y):
        return -100 * y

    with pytest.raises(resode.NonFiniteState, match=f"stiff: λ ≈ −100; {method} needs steps below") as raised:
        odeint(field, ONE, SPAN * 200, method=method, step_size=limit * 1.5)
    assert float(str(raised.value).split("below ")[1].split(". ")[0]) == pytest.approx(limit, rel=5e-3)
    assert odeint(field, ONE, SPAN * 20, method=method, step_size=limit * 0.95)[-1].abs().item() < 1


def test_the_spectrum_of_one_sample_of_complex_and_of_constant_fields():
    matrix = torch.tensor([[0.0, 2.0], [-2.0, -1.0]], dtype=DOUBLE)

    def field(t, y):
        return torch.stack([y[0] @ matrix.T, 5 * y[1]])

    x, t = torch.ones(2, 2, dtype=DOUBLE), torch.zeros(2, 1, dtype=DOUBLE)
    assert sorted(spectrum(field, t, x, 0).imag.tolist()) == pytest.approx([-(3.75**0.5), 3.75**0.5])
    assert spectrum(field, t, x, 1).real.tolist() == pytest.approx([5.0, 5.0])
    values = spectrum(lambda t, y: (-3 + 4j) * y, t[:1], torch.ones(1, 1, dtype=torch.complex128), 0)
    assert sorted(values.imag.tolist()) == pytest.approx(
        [-4.0, 4.0]
    ) and values.real.tolist() == pytest.approx([-3, -3])
    assert spectrum(lambda t, y: torch.ones_like(y), t, x, 0) is None
    assert spectrum(lambda t, y: y.sum().item() * y, t, x * torch.nan, 0) is None
    assert spectrum(lambda t, y: 1 / 0, t, x, 0) is None
    assert spectrum(field, t, torch.ones(2, 257, dtype=DOUBLE), 0) is None


def test_what_a_spectrum_explains():
    dopri5 = METHODS["dopri5"]
    values = torch.tensor([-1000.0 + 0j, -1.0])
    assert explain(dopri5, values, 0.0033, 1.0)[0] == "stiff"
    assert explain(dopri5, values, 1e-6, 1.0)[0] == "smooth"
    assert explain(dopri5, values, 0.0033, 0.01)[0] == "smooth", "a few steps from the end nothing is stiff"
    assert explain(dopri5, torch.tensor([1e6 + 0j]), 1e-7, 1.0)[0] == "growing"
    assert explain(dopri5, torch.zeros(2, dtype=torch.complex128), 1e-7, 1.0)[::2] == ("smooth", None)
    assert explain(dopri5, None, 1.0, 1.0) == ("unknown", "", None)
    assert number(-1e6) == "−1e6" and number(2.0) == "2" and number(-0.25 + 1e-3j) == "−0.25 ± 0.001i"


def test_errors_keep_their_places_when_pickled():
    import pickle

    error = resode.MaxStepsReached("at t=1", time=1.0, step_size=0.5, sample=3, eigenvalue=-2 + 1j)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.time, again.step_size, again.sample, again.eigenvalue) == (
        "at t=1",
        1.0,
        0.5,
        3,
        -2 + 1j,
    )
