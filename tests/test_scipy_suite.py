"""scipy's own tests of `solve_ivp`, with resode's in its place for the methods that both have."""

import importlib

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp as scipys

import resode

suite = importlib.import_module("scipy.integrate._ivp.tests.test_ivp")
OURS = {"RK23": "RK23", "RK45": "RK45", "DOP853": "dopri8"}


def adapted(
    fun, t_span, y0, method="RK45", t_eval=None, dense_output=False, events=None, args=None, **options
):
    """resode's solve_ivp as scipy's: numpy in and out, time last, scipy's default tolerances."""
    name = getattr(method, "__name__", method)
    if name not in OURS:
        return scipys(fun, t_span, y0, method, t_eval, dense_output, events, args=args, **options)
    as_numpy = lambda f: lambda t, y, *a: torch.as_tensor(np.asarray(f(float(t), y.numpy(), *a)))  # noqa: E731
    given = () if events is None else events if isinstance(events, tuple | list) else (events,)
    watched = [as_numpy(event) for event in given]
    for event, own in zip(given, watched, strict=True):
        vars(own).update(vars(event))
    y0 = torch.as_tensor(np.asarray(y0)) + 0.0
    y0 = y0.to(torch.float64) if y0.is_floating_point() else y0
    keep = {k: v for k, v in options.items() if k in ("first_step", "max_step")}
    keep |= {k: torch.as_tensor(options.get(k, v)) for k, v in (("rtol", 1e-3), ("atol", 1e-6))}
    field = as_numpy(
        lambda t, y, *a: np.reshape(fun(t, y, *a), y.shape)
    )  # a vectorized one has a column more
    s = resode.solve_ivp(field, t_span, y0, OURS[name], t_eval, True, watched or None, args, **keep)
    s.t, s.y, s.nfev, s.njev, s.nlu = s.t.numpy(), s.y.numpy().T, s.stats.nfe, 0, 0
    dense, s.sol = s.sol, lambda t: dense(np.asarray(t)).numpy().T
    s.t_events = None if s.t_events is None else [t.numpy() for t in s.t_events]
    s.y_events = None if s.t_events is None else [y.numpy() if len(y) else np.zeros(0) for y in s.y_events]
    return s


NO_THREADS = dict(num_parallel_threads=2)  # leaves LSODA out
CALLS = {
    "test_duplicate_timestamps": [{}],
    "test_integration": [{}],
    "test_integration_complex": [{}],
    "test_events": [NO_THREADS],
    "test_event_terminal_integer": [dict(n_events=3), dict(n_events=4)],
    "test_event_terminal_iv": [{}],
    "test_max_step": [NO_THREADS],
    "test_first_step": [NO_THREADS],
    "test_t_eval": [{}],
    "test_t_eval_dense_output": [{}],
    "test_t_eval_early_event": [{}],
    "test_no_integration": [{}],
    "test_empty": [{}],
    "test_array_rtol": [{}],
    "test_integration_zero_rhs": [dict(method=m, **NO_THREADS) for m in OURS],
    "test_args_single_value": [{}],
    "test_initial_state_finiteness": [dict(f0_fill=np.nan), dict(f0_fill=np.inf)],
    "test_zero_interval": [dict(method=m) for m in OURS],
    "test_tbound_respected_small_interval": [dict(method=m) for m in OURS],
    "test_tbound_respected_larger_interval": [dict(method="RK45")],
    "test_tbound_respected_oscillator": [dict(method="RK45")],
}
WORDS = "the error is of the same type and says the same in other words"
BEYOND = "a time beyond the solve is refused, where scipy extrapolates"
OTHERWISE = {
    "test_duplicate_timestamps": BEYOND,
    "test_no_integration": BEYOND,
    "test_empty": "an infinite t_span needs a terminal event here",
    "test_event_terminal_iv": WORDS,
    "test_args_single_value": WORDS,
    "test_initial_state_finiteness": WORDS,
    "test_t_eval_early_event": "Solution.message has other words, and the empty y is (0, n), not ()",
    "test_array_rtol": "the warning of a tolerance that is too fine has other words",
}
"""The tests that see a difference, which is meant."""


def cases():
    for name, calls in CALLS.items():
        marks = [pytest.mark.xfail(reason=OTHERWISE[name], strict=True)] if name in OTHERWISE else []
        for i, arguments in enumerate(calls):
            yield pytest.param(name, arguments, marks=marks, id=f"{name[5:]}-{i}")


@pytest.mark.parametrize(("name", "arguments"), list(cases()))
def test_scipys_own(name, arguments, monkeypatch):
    monkeypatch.setattr(suite, "solve_ivp", adapted)
    getattr(suite, name)(**arguments)
