"""How a problem is to be solved: method, tolerances and options, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from resode.checks import WrongNumber, check_whole, described, did_you_mean, one_of, warn_user
from resode.solve.control import MAX_STEPS, Callbacks, Control, Tolerance, controller_filter
from resode.solve.fixed import INTERPOLATIONS, Grid, grid_of_size
from resode.solve.foreign import foreign_methods, foreign_options
from resode.tableaus import METHODS, ON_DEMAND, ButcherTableau, on_demand

NATIVE = tuple(METHODS)
EXPLICIT = tuple(name for name, tableau in METHODS.items() if tableau.explicit)
"""The methods solved here; torchdiffeq's others are passed on to it."""

ADAPTIVE_OPTIONS = (
    "first_step", "min_step", "max_step", "max_num_steps", "step_t", "jump_t", "norm", "dtype", "safety",
    "ifactor", "dfactor", "controller",
)  # fmt: skip
FIXED_OPTIONS = ("step_size", "grid_constructor", "interp", "perturb")


@dataclass(frozen=True)
class SolveSettings:
    """How to solve, for a state that is one tensor.

    Args:
        method: a tableau, or the name of a method that torchdiffeq solves.
        rtol: relative tolerance, a number or a tensor that broadcasts to the state; None for the default.
        atol: absolute tolerance likewise.
        options: the method's options; a norm takes the state and gives a number.
        step_size: the largest of equal steps, or None.
        n_steps: equal steps between consecutive t, or None.
        max_steps: attempted steps over the whole solve.
        per_sample: each sample its own steps.
        checkpoint: run pieces again on the way back rather than keep them.
        compile_for: what compiled steps are kept for; None to take them one operation at a time.
    """

    method: ButcherTableau | str
    rtol: Tolerance | None = None
    atol: Tolerance | None = None
    options: dict[str, Any] = field(default_factory=dict)
    step_size: float | None = None
    n_steps: int | None = None
    max_steps: int = MAX_STEPS
    per_sample: bool = False
    checkpoint: bool = False
    compile_for: Any = None

    @property
    def fixed(self) -> bool:
        """Whether the steps are given rather than controlled (False for torchdiffeq's methods)."""
        given = self.step_size is not None or self.n_steps is not None
        return isinstance(self.method, ButcherTableau) and (given or not self.method.adaptive)

    def check(self) -> None:
        """Refuses what no solve could mean.

        Raises:
            ValueError: an unknown or impossible option or step.
        """
        _check_steps(self.step_size, self.n_steps)
        check_whole("max_steps", self.max_steps, 1)
        if isinstance(self.method, str):
            if self.per_sample or self.n_steps is not None:
                raise ValueError(
                    f"{self.method!r} is solved by torchdiffeq, which has no per_sample and no n_steps; "
                    f"use one of {', '.join(NATIVE)}, or step_size."
                )
            _check_known(self.options, foreign_options(self.method), self.method)
            return
        if not self.fixed:
            hint = " As arguments, step_size and n_steps make it take fixed steps."
            _check_known(self.options, ADAPTIVE_OPTIONS, self.method.name, hint)
            return
        if "norm" in self.options:
            warn_user(f"{self.method.name} takes fixed steps, which no norm steers.")
        known = (*FIXED_OPTIONS, "norm")
        _check_known(self.options, known, f"{self.method.name} with fixed steps")
        given = [name for name in ("step_size", "n_steps") if getattr(self, name) is not None]
        given += [f"options[{name!r}]" for name in ("step_size", "grid_constructor") if name in self.options]
        if len(given) > 1:
            raise ValueError(f"the steps must be given in one way only, got {' and '.join(given)}.")

    def grid(self) -> Grid | None:
        """The grid that options ask for; None where steps are equal between outputs."""
        interp, perturb = self.options.get("interp", "linear"), bool(self.options.get("perturb", False))
        one_of("interp", interp, INTERPOLATIONS)
        if "grid_constructor" in self.options:
            return Grid(self.options["grid_constructor"], interp, perturb)
        if "step_size" in self.options:
            size = float(self.options["step_size"])
            _check_steps(size, None)
            return Grid(grid_of_size(size), interp, perturb)
        return None

    def control(self, y0: Tensor, callbacks: Callbacks | None) -> Control:
        """The control of error-controlled steps for states like y0."""
        rtol, atol = tolerances(y0.dtype, self.rtol, self.atol)
        o, positive = self.options, _Positive(self.options)
        limit = o.get("max_num_steps")
        if limit is not None and int(limit) < 1:
            raise ValueError(f"max_num_steps must be at least 1, got {limit}.")
        norm = o.get("norm")
        low, high = positive("min_step", 0.0, zero=True), positive("max_step", math.inf)
        if low > high:
            raise ValueError(f"min_step must not be above max_step, got {low:g} and {high:g}.")
        dtype = o.get("dtype", torch.float64)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and torch.finfo(dtype).bits >= 32):
            raise ValueError(f"dtype is that of times, torch.float32 or torch.float64; got {dtype}.")
        shrink, grow = positive("dfactor", 0.2), positive("ifactor", 10.0)
        if shrink > 1 or grow < 1:
            raise ValueError(
                f"dfactor must be at most 1 and ifactor at least 1, got {shrink:g} and {grow:g}."
            )
        return Control(
            rtol=rtol,
            atol=atol,
            max_steps=self.max_steps if limit is None else int(limit),
            per_output=limit is not None,
            first_step=positive("first_step", 0.0) or None,
            min_step=low,
            max_step=high,
            safety=positive("safety", 0.9),
            shrink=shrink,
            grow=grow,
            filter=controller_filter(o.get("controller", "pi")),
            norm=None if norm is None else _measured(norm, self.per_sample),
            per_sample=self.per_sample,
            dtype=torch.promote_types(dtype, y0.dtype.to_real()),
            callbacks=callbacks,
        )

    def stops(self) -> tuple[list[float], list[float]]:
        """Times that a step must end at, and those of them at which the field jumps."""
        jumps = _times("jump_t", self.options.get("jump_t"))
        stops = _times("step_t", self.options.get("step_t")) + jumps
        if len(set(stops)) < len(stops):
            raise ValueError("step_t and jump_t must not hold a time twice, alone or between them.")
        return stops, jumps


class _Positive:
    """Reads positive numbers out of options."""

    def __init__(self, options: dict[str, Any]):
        self.options = options

    def __call__(self, name: str, default: float, *, zero: bool = False) -> float:
        value = self.options.get(name)
        if value is None:
            return default
        value = float(value)
        if not (value > 0 or (zero and value == 0)) or math.isnan(value):
            raise ValueError(f"{name} must be {'at least 0' if zero else 'positive'}, got {value:g}.")
        return value


def _measured(norm: Callable[[Tensor], Any], per_sample: bool) -> Callable[[Tensor], Tensor]:
    """A user's norm of one state as a tensor: of each sample (B,), or 0-D."""

    def one(x: Tensor) -> Tensor:
        return torch.as_tensor(norm(x), device=x.device).abs()

    return (lambda x: torch.stack([one(row) for row in x])) if per_sample else one


def _times(name: str, values: Any) -> list[float]:
    if values is None:
        return []
    times = torch.as_tensor(values, dtype=torch.float64).detach().reshape(-1).tolist()
    if not all(math.isfinite(s) for s in times):
        raise ValueError(f"{name} must hold finite times, got {times}.")
    return [float(s) for s in times]


def _check_known(options: dict[str, Any], known: Sequence[str], method: str, hint: str = "") -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown options {unknown} for {method}; it takes {', '.join(known)}.{hint}")


def _check_steps(step_size: float | None, n_steps: int | None) -> None:
    if step_size is not None and n_steps is not None:
        raise ValueError(
            f"give step_size or n_steps, not both; got step_size={step_size}, n_steps={n_steps}."
        )
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be positive and finite, got {step_size}; t gives the direction.")
    if n_steps is not None:
        check_whole("n_steps", n_steps, 1)


def resolve_method(method: str | ButcherTableau | None) -> ButcherTableau | str:
    """A tableau to solve with here, or the name of one of torchdiffeq's own methods."""
    if method is None:
        return METHODS["dopri5"]
    tableau = METHODS.get(method) or on_demand(method) if isinstance(method, str) else method
    if isinstance(tableau, ButcherTableau):
        return tableau
    others = foreign_methods()
    if method in others:
        return str(method)
    raise ValueError(
        f"unknown method {method!r}.{did_you_mean(method, [*NATIVE, *others])} "
        f"The methods are {', '.join(NATIVE)}, {ON_DEMAND} with S stages, "
        f"and through the installed torchdiffeq {', '.join(others)}."
    )


def tolerances(
    dtype: torch.dtype, rtol: Tolerance | None, atol: Tolerance | None
) -> tuple[Tolerance, Tolerance]:
    """Tolerances for a state of `dtype`: the defaults where None, clamped to what it resolves.

    Raises:
        ValueError: negative, not finite, or both zero.

    Example:
        >>> tolerances(torch.float32, None, None)
        (1e-06, 1e-08)
    """
    fine = dtype.to_real() == torch.float64
    r = (1e-7 if fine else 1e-6) if rtol is None else rtol
    a = (1e-9 if fine else 1e-8) if atol is None else atol
    r, a = _tolerance("rtol", r), _tolerance("atol", a)
    pair = [torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (r, a)]
    valid = all((torch.isfinite(x) & (x >= 0)).all() for x in pair) and not (pair[0] + pair[1] == 0).any()
    if not valid or any(isinstance(x, Tensor) and x.requires_grad for x in (r, a)):
        raise ValueError(
            "rtol and atol must be finite, not negative, and not both zero, and ask for no gradient; "
            f"got rtol={_show(r)}, atol={_show(a)}."
        )
    finest = 4 * torch.finfo(dtype).eps
    if float(pair[0].min()) < finest:
        warn_user(
            f"rtol={float(pair[0].min()):g} is finer than {dtype} resolves; {finest:.2g} is used. "
            "Use a float64 state for less.",
        )
        r = r.clamp(min=finest) if isinstance(r, Tensor) else finest
    return r, a


def _tolerance(name: str, x: Any) -> Tolerance:
    if isinstance(x, Tensor) and x.ndim and x.numel() and x.layout == torch.strided and not x.is_complex():
        return x
    try:
        return float("no number" if isinstance(x, str | bytes | bool) else x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongNumber(f"{name} must be a number, or a tensor of them, got {described(x)}.") from error


def _show(x: Tolerance) -> str:
    if not isinstance(x, Tensor):
        return f"{x:g}"
    return f"a tensor from {float(x.detach().min()):g} to {float(x.detach().max()):g}"
