"""Argument checks in one wording, and warnings that point at the line which called the library."""

import inspect
import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

import resode
from resode.checks import WrongType, check_number, check_whole, checked, one_of, warn_user


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_whole_numbers_of_any_library_pass(value):
    found = check_whole("n", value, 1)
    assert found == 3 and type(found) is int


@pytest.mark.parametrize("value", [True, 3.0, "3", None, math.nan])
def test_what_is_no_whole_number_is_refused_with_the_name(value):
    for error in (TypeError, ValueError):
        with pytest.raises(error, match=r"n must be a whole number of at least 1, got"):
            check_whole("n", value, 1)


@pytest.mark.parametrize(
    ("value", "bounds", "words"),
    [
        (0, {"above": 0}, "above 0"),
        (-1e-9, {"least": 0}, "at least 0"),
        (1.0, {"least": 0, "below": 1}, "at least 0 and below 1"),
        (2, {"most": 1}, "at most 1"),
        (math.inf, {}, "finite"),
        (math.nan, {"least": 0}, "finite"),
        (True, {}, "number"),
        ("1", {}, "number"),
        (1j, {}, "number"),
    ],
)
def test_numbers_out_of_bounds_say_the_bounds(value, bounds, words):
    with pytest.raises(ValueError, match=rf"share must be .*{words}"):
        check_number("share", value, **bounds)


def test_choices_keep_true_and_one_apart():
    assert one_of("learn_step", True, (False, True, "block")) is True
    with pytest.raises(ValueError, match=r"learn_step must be one of False, True, block; got 1"):
        one_of("learn_step", 1, (False, True, "block"))
    with pytest.raises(ValueError, match=r"Did you mean block\?"):
        one_of("learn_step", "blok", (False, True, "block"))


class Decay(nn.Module):
    def forward(self, x):
        return -x


class Slope(nn.Module):
    """−x³ − w, whose zero at w = 0 is singular."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return -(x**3) - self.w


ONE = torch.ones(2, 1)
T = torch.tensor([0.0, 1.0])


def twisted():
    torch.manual_seed(0)
    return nn.Linear(300, 300)


def singular_gradient():
    found = resode.find_fixed_points(Slope(), torch.full((1, 1), 1e-3, dtype=torch.float64), tol=1e-6)
    return found.points.sum().backward()


def poor_curvature():
    torch.manual_seed(0)
    model = nn.Linear(30, 1)
    return resode.max_learning_rate(
        model, nn.MSELoss(), (torch.randn(60, 30), torch.randn(60, 1)), max_iter=2
    )


CALLS = {
    "odeint": lambda: resode.odeint(lambda t, y: -y, ONE, T, method="rk4"),
    "odeint clamps": lambda: resode.odeint(lambda t, y: -y, ONE, T, rtol=1e-12),
    "odeint compiles": lambda: resode.odeint(
        lambda t, y: -y, ONE, T, method="rk4", n_steps=2, options={"norm": torch.max}
    ),
    "solve_ivp": lambda: resode.solve_ivp(lambda t, y: -y, (0.0, 1.0), ONE, method="rk4"),
    "ResidualStack": lambda: resode.ResidualStack(Decay(), depth=2, solver="dopri5", rtol=1e-20),
    "step_limit": lambda: resode.step_limit(twisted(), torch.ones(1, 300), k=4, budget=30, matrix_free=True),
    "a gradient": singular_gradient,
    "max_learning_rate": poor_curvature,
}


@pytest.mark.parametrize("name", CALLS)
def test_warnings_point_at_the_line_that_called(name):
    """However deep in the library, and through a module's call or a hook of the way back."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CALLS[name]()
    lines, first = inspect.getsourcelines(CALLS[name])
    assert caught and {warning.filename for warning in caught} == {__file__}
    for warning in caught:
        assert first <= warning.lineno < first + len(lines), warning.message


def test_a_warning_without_a_caller_still_comes():
    with pytest.warns(RuntimeWarning, match="told"):
        warn_user("told", RuntimeWarning)


@pytest.mark.parametrize(
    ("value", "refused"),
    [(2, 0), (2.0, 0), (np.int64(2), 0), (0.5, 1), (math.nan, 1), (math.inf, 1), (1j, 1), (torch.tensor(2), 0), (torch.tensor(0.5), 1)],
)  # fmt: skip
def test_whole_numbers_where_a_call_fails(value, refused):
    """A function that fails on 0.5 says that it takes a whole number; on 2 its own error comes through."""

    @checked
    def fails(count: int) -> None:
        raise_from_inside = [][0]
        return raise_from_inside

    with pytest.raises(WrongType if refused else IndexError):
        fails(value)


@pytest.mark.parametrize(
    ("value", "refused"),
    [([1.0, 2], 0), ((1.0,), 0), (torch.ones(3), 0), (torch.tensor(1.0), 1), (torch.ones(2, 3), 1), ([None], 1), (["a"], 1)],
)  # fmt: skip
def test_entries_of_sequences_where_a_call_fails(value, refused):
    @checked
    def fails(factors: Sequence[float]) -> None:
        return [][0]

    with pytest.raises(WrongType if refused else IndexError):
        fails(value)
