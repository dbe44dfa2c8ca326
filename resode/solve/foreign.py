"""torchdiffeq, for the methods that are not solved here: imported when one is first asked for.

The only place that reads torchdiffeq's private parts, whose releases differ under one version number;
pyproject.toml bounds the version.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor

from resode.solve.control import Callbacks
from resode.solve.step import Counted
from resode.tableaus import METHODS


def _solvers() -> dict[str, Any]:
    from torchdiffeq._impl.odeint import SOLVERS

    return SOLVERS


def foreign_methods() -> list[str]:
    """The names that go to torchdiffeq: the installed release's, without those solved here."""
    return [name for name in _solvers() if name not in METHODS]


def stops_at_events(method: str) -> bool:
    """Whether torchdiffeq's method can end at an event."""
    return hasattr(_solvers()[method], "integrate_until_event")


def foreign_options(method: str) -> list[str]:
    """The options that torchdiffeq's method takes, from its constructors."""
    names = ["norm"]
    for cls in _solvers()[method].__mro__[:-1]:
        names += inspect.signature(cls.__init__).parameters
    inner = {"self", "func", "y0", "rtol", "atol", "args", "kwargs", "unused_kwargs"}
    return [name for name in dict.fromkeys(names) if name not in inner]


def foreign_solve(
    counted: Counted,
    y0: Tensor,
    t: Tensor,
    callbacks: Callbacks | None,
    *,
    method: str,
    options: dict[str, Any],
    **rest: Any,
) -> Any:
    """What torchdiffeq.odeint gives; `rest` are further arguments of it: rtol, atol, event_fn."""
    import torchdiffeq

    if callbacks is not None:
        for name in ("step", "accept", "reject"):
            call, suffix = getattr(callbacks, name), "step" if name == "step" else f"{name}_step"
            if call is not Callbacks().step:
                setattr(counted, f"callback_{suffix}", call)
    with warnings.catch_warnings():
        # torchdiffeq only warns of an option that this method does not know.
        warnings.filterwarnings("error", message=".*[Uu]nexpected arguments")
        # torchdiffeq gives scipy a min_step whether or not scipy's solver has one.
        warnings.filterwarnings("ignore", message=".*arguments have no effect")
        try:
            return torchdiffeq.odeint(counted, y0, t, method=method, options=options, **rest)
        except UserWarning as warning:
            if "nexpected arguments" not in str(warning):
                raise
            raise ValueError(f"unknown options for {method!r}: {warning}") from None
