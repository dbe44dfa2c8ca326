r"""Where in a step an event lies, and the gradient of its time: one for all, or each sample its own.

An event is a zero of c(t, y), or a time at which a c of booleans flips. Every step is looked at in eighths,
so that two zeros within a step are seen where an eighth's end lies between them; the first is taken. At the
event time τ, c(τ, y(τ)) = 0 gives, with ċ = ∂c/∂t + ∂c/∂y · f,

    dτ = − dc / ċ,        dy(τ) = dy|_τ fixed + f(τ, y) dτ,

where dc is the change of c at fixed time, through y and through the parameters of c. With per_sample every
number here is one a sample, (B,), and a sample stays at its event while others go on; the one event of a
coupled state is the case B = 1.

Source:
    Chen, Amos & Nickel, Learning Neural Event Functions for Ordinary Differential Equations (2021);
    Oliveira & Takahashi, An Enhancement of the Bisection Method Average Performance Preserving Minmax
    Optimality, ACM TOMS 47 (2020): the search for the zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resode.jacobian.products import first_jvp
from resode.solve.host import decided, is_transformed, moves, plain
from resode.solve.native import as_column

Event = Callable[[Tensor, Any], Any]
"""c(t, y), one number, of a 0-D t and the state; or (B,), of t of shape (B, 1, …, 1) and a batch."""

ON_VALUES = (
    "a solve ends where the event's value says",
    "Solve the batch in one call: odeint_event with per_sample=True gives each sample its own event.",
)

PARTS = 8
"""An event's sign is looked at this often within a step."""


def from_start(event_fn: Callable[..., Any], t0: Tensor, y0: Any, per_sample: bool) -> Event:
    """An event that starts positive and first reaches 0 where an entry of event_fn does; one number, or (B,).

    It is 0 from the start where an entry is.

    Args:
        event_fn: of (t, y), a tensor; one number a sample, (B,), where per_sample.
        t0: the start, 0-D, or with per_sample each sample's own, (B,).
        y0: the state there.
        per_sample: whether each sample has its own event.

    Raises:
        TypeError, ValueError: event_fn gives something else, or no finite tensor at the start.
    """

    def event(t: Tensor, y: Any) -> Tensor:
        c = event_fn(t, y)
        if not isinstance(c, Tensor):
            raise TypeError(f"event_fn must return a tensor, got {type(c).__name__}.")
        if per_sample and c.shape != y.shape[:1]:
            raise ValueError(
                f"with per_sample=True event_fn must return one number a sample, shape ({len(y)},), got "
                f"{tuple(c.shape)}. t has shape {tuple(t.shape)} there: t.reshape(-1) goes with y[:, 0]."
            )
        return signed(c)

    with torch.no_grad():
        first = event(as_column(t0, y0, per_sample), y0)
    values = np.array(decided(first, *ON_VALUES), float)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"event_fn must be finite and not empty at t[0]; got {values.tolist()} at "
            f"t={float(plain(t0).reshape(-1)[0]):.9g}. Give one that is finite at the start, not NaN."
        )
    # Where it is 0 the solve ends there, whatever the sign.
    signs = torch.from_numpy(np.where(values < 0, -1, 1)).to(first.device)
    if per_sample:
        return lambda t, y: event(t, y) * signs
    return lambda t, y: torch.min(event(t, y) * signs)


def signed(c: Tensor) -> Tensor:
    """An event's values; of booleans 1 and −1, whose zero is where they flip.

    Raises:
        TypeError: they are complex, and have no sign.
    """
    if c.is_complex():
        raise TypeError(f"an event must return real numbers, whose sign counts; got {c.dtype}.")
    return 2 * c.to(torch.int8) - 1 if c.dtype == torch.bool else c


def numbers(event: Event, time: np.ndarray, y: Tensor, per_sample: bool = False) -> np.ndarray:
    """The event's values at times (B,), on the host, without gradient, (B,).

    Raises:
        TypeError, ValueError: it gives something else, or NaN.
    """
    with torch.no_grad():
        c = event(column(time, y, per_sample), y)
    if isinstance(c, Tensor):
        if c.numel() != len(time):
            raise ValueError(
                f"an event must return one number, got a tensor of shape {tuple(c.shape)}. Give every "
                "entry an event of its own; odeint_event takes them together."
            )
        c = decided(signed(c).reshape(-1), *ON_VALUES)
    else:
        c = [2 * c - 1 if isinstance(c, bool) else c]
    try:
        values = np.array([float(value) for value in c])
    except (TypeError, ValueError):
        raise TypeError(f"an event must return one number, or yes or no; got {c[0]!r}.") from None
    if np.isnan(values).any():
        i = int(np.isnan(values).argmax())
        raise ValueError(
            f"event_fn must return numbers, got NaN at t={float(time[i]):.9g}{which(i, per_sample)}. "
            "Keep it defined past the event."
        )
    return values


def column(s: np.ndarray, y: Tensor, per_sample: bool) -> Tensor:
    """Numbers (B,) as a field of y takes its time: 0-D, or (B, 1, …, 1) per sample, in y's real dtype."""
    s = s if per_sample else s.reshape(())
    return as_column(torch.from_numpy(np.asarray(s)).to(y.device, y.dtype.to_real()), y, per_sample)


def which(i: int, per_sample: bool) -> str:
    """The sample in words, where each has its own event."""
    return f", sample {i}" if per_sample else ""


@dataclass
class Within:
    """A step of each sample, B = 1 for a coupled state, as the search for events within it needs it.

    Args:
        begin: where it starts, (B,).
        end: where it ends, (B,); the start again for a sample that did not take it.
        x: the state at the start.
        k0: F there.
        x_end: the state at the end.
        exact: the states at times within, (B,), by the solver's own steps or interpolant.
        per_sample: whether the states are a batch.
        k1: F at the end, where it is known.
    """

    begin: np.ndarray
    end: np.ndarray
    x: Tensor
    k0: Tensor
    x_end: Tensor
    exact: Callable[[Within, np.ndarray], Tensor]
    per_sample: bool = False
    k1: Tensor | None = None

    def __post_init__(self):
        batch = len(self.begin)
        self.part = np.zeros(batch, int)  # in which rough states have the event, from 0 on
        # Times before and after the event, and the exact values there; NaN where not looked for yet.
        self.around = np.full((4, batch), np.nan)

    def of(self, s: np.ndarray) -> Tensor:
        """Numbers (B,) as factors of the states."""
        return column(s, self.x, self.per_sample)

    def time(self, part: np.ndarray | int) -> np.ndarray:
        """Where parts of the step end, (B,)."""
        inner = self.begin + part / PARTS * (self.end - self.begin)
        return np.where(np.equal(part, PARTS), self.end, inner)

    def state(self, time: np.ndarray) -> Tensor:
        """The states at times (B,) within; at the steps' ends, those there."""
        if (at_end := time == self.end).all():
            return self.x_end
        inner = self.exact(self, time)
        return torch.where(self.of(at_end) != 0, self.x_end, inner) if at_end.any() else inner

    @cached_property
    def states(self) -> list[Tensor]:
        """The states at the parts' ends, those between by a polynomial through both with their slopes."""
        with torch.no_grad():
            h, s = self.of(self.end - self.begin), torch.arange(1, PARTS, dtype=torch.float64) / PARTS
            if self.k1 is None:
                rows, known = [1 - s**2, s - s**2, s**2], [self.x, h * self.k0, self.x_end]
            else:
                rows = [(1 + 2 * s) * (1 - s) ** 2, s * (1 - s) ** 2, s**2 * (3 - 2 * s), s**3 - s**2]
                known = [self.x, h * self.k0, self.x_end, h * self.k1]
            inner = torch.stack(rows, 1).to(self.x) @ torch.stack(known).reshape(len(known), -1)
            return [self.x, *inner.reshape(-1, *self.x.shape), self.x_end]

    def bracket(self, values: Callable[..., np.ndarray], part: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Around the falls to 0 that rough states have in parts (B,), of the samples marked, as `around`.

        Args:
            values: of times (B,) and states, (B,).
            part: from 0 on.
            mask: (B,).
        """
        a, b = part, part + 1

        def at(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            time = self.time(part)
            return time, values(time, self.state(time))

        (time_b, after), on = at(b), mask
        while (on := on & (after > 0) & (b < PARTS)).any():
            a, b = np.where(on, b, a), b + on
            time_b, after = at(b)
        (time_a, before), on = at(a), mask
        while (on := on & (before <= 0) & (a > 0)).any():
            time_b, after, a = np.where(on, time_a, time_b), np.where(on, before, after), a - on
            time_a, before = at(a)
        return np.stack([time_a, time_b, before, after])

    def zeros(self, values: Callable[..., np.ndarray], around: np.ndarray) -> np.ndarray:
        """The times of zeros within brackets, (B,), to rounding."""
        return roots(lambda s: values(s, self.state(s)), *around)

    def merged(self, other: Within, mask: np.ndarray) -> Within:
        """These steps, but another's for the samples marked."""
        if mask.all():
            return other
        marked = self.of(mask) != 0
        pairs = [(vars(other)[name], vars(self)[name]) for name in ("begin", "end", "x", "k0", "x_end")]
        begin, end = (np.where(mask, *pair) for pair in pairs[:2])
        x, k0, x_end = (torch.where(marked, *pair) for pair in pairs[2:])
        step = Within(begin, end, x, k0, x_end, other.exact, self.per_sample)
        step.part = np.where(mask, other.part, self.part)
        step.around = np.where(mask, other.around, self.around)
        return step


def roots(
    values: Callable[[np.ndarray], np.ndarray],
    a: np.ndarray,
    b: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
) -> np.ndarray:
    """Times at which functions that are before > 0 at a and after ≤ 0 at b come to be ≤ 0, (B,), to rounding.

    Only their signs are relied on, so a zero of any order, a jump and a function that stays 0 are found in as
    many evaluations as by halving, and one more; a smooth simple zero in few. (The ITP method, with κ₁ = 0.2
    over the width, κ₂ = 2 and n₀ = 1.)

    Args:
        values: the functions at a time of each, (B,).
        a: where they are positive.
        b: where they are not; a itself where nothing is looked for.
        before: their values at a.
        after: their values at b.
    """
    a, b, before, after = a.copy(), b.copy(), before.copy(), after.copy()
    tiny = 4 * 2.0**-52 * np.maximum(abs(a), abs(b)).clip(min=2.0**-1000)
    width = abs(b - a)
    slack = tiny * 2.0 ** np.ceil(np.log2((width / tiny).clip(min=1.0)))
    flat, at_zero = np.zeros(len(a), bool), np.zeros(len(a), bool)
    done = width <= tiny
    while not done.all():
        size = abs(b - a)
        middle = a + 0.5 * (b - a)
        with np.errstate(all="ignore"):
            s = a + (b - a) * (before / (before - after))
            shift = 0.2 * size * size / width  # towards the middle, past the zero: both ends then close in
            s = np.where(shift >= abs(middle - s), middle, s + np.copysign(shift, middle - s))
            reach = (slack - 0.5 * size).clip(min=0.0)
            s = np.where(abs(s - middle) > reach, middle + np.copysign(reach, s - middle), s)
            straight = (after < 0) & np.isfinite(before) & np.isfinite(after)
        s = np.where(straight, s, middle)
        s = np.where((s == a) | (s == b), middle, s)
        # An exact zero is the one looked for, unless the function is 0 before it, too.
        s = np.where(at_zero, b + np.copysign(np.minimum(tiny, 0.5 * size), a - b), s)
        done = done | (s == a) | (s == b)
        s = np.where(done, b, s)
        c = values(s)
        up = ~done & (c > 0)
        down = ~done & ~up
        done = done | (at_zero & up)
        flat = flat | (at_zero & down)
        slack = np.where(at_zero, slack, 0.5 * slack)
        a, before = np.where(up, s, a), np.where(up, c, before)
        b, after = np.where(down, s, b), np.where(down, c, after)
        at_zero = down & (c == 0) & ~flat
        done = done | (abs(b - a) <= tiny)
    return b


class _WithoutGradient(torch.autograd.Function):
    """Passes tensors on; asking for the gradient of the samples marked is an error."""

    @staticmethod
    def forward(none: Tensor, *tensors: Tensor) -> Any:
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.none = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        for grad in grads:
            if grad is not None and (grad[ctx.none] != 0).any():
                raise ValueError(
                    "the event's time has no gradient: event_fn does not change along the solution there, as "
                    "a comparison, an integer or a constant does not. Give a function that passes through 0, "
                    "such as y - 0.5 for y > 0.5, or detach the event's time and state."
                )
        return None, *grads


def with_event_gradient(
    func: Callable[..., Any], event: Event, event_t: Tensor, y: Any, start: Tensor
) -> tuple[Tensor, Any]:
    """The event's time and state, as they were, with the implicit function's derivatives to second order.

    Args:
        func: the field of (t, y).
        event: one number, or with event_t of shape (B,) each sample's own.
        event_t: the event's time, 0-D, or each sample's own, (B,).
        y: the state there, a tensor or a tuple, differentiable at fixed time.
        start: t[0], of event_t's shape.
    """
    parts: Sequence[Tensor] = y if isinstance(y, tuple) else (y,)

    def rebuild(parts: Sequence[Tensor]) -> Any:
        return tuple(parts) if isinstance(y, tuple) else parts[0]

    def beside(s: Tensor, p: Tensor) -> Tensor:  # a number a sample as a factor of its state
        return s.view(-1, *[1] * (p.ndim - 1)) if s.ndim else s

    real = parts[0].dtype.to_real()
    time, began = (s.detach().to(parts[0].device, real) for s in (event_t, start))
    if not any(map(moves, parts)) and not moves(event(beside(time, parts[0]), y)):
        return event_t, y  # nobody asks for a gradient, which event_fn need not have
    slope = func(beside(time, parts[0]), y)
    slopes = [d.detach() for d in (slope if isinstance(y, tuple) else (slope,))]
    way = time - began
    # Where c has no slope at its zero, as relu(y) and (y − 1)³ have none, it is taken a little before.
    unit = torch.copysign(16 * torch.finfo(real).eps * torch.maximum(time.abs(), way.abs()), way)
    shift, rate = torch.zeros_like(time), torch.zeros_like(time)
    for factor in (0.0, 1.0, 64.0):
        s = time - factor * unit
        found = _rate(event, s, [p - beside(time - s, p) * d for p, d in zip(parts, slopes, strict=True)],
                      slopes, rebuild, beside)  # fmt: skip
        shift, rate = torch.where(rate == 0, factor * unit, shift), torch.where(rate == 0, found, rate)
        if (rate != 0).all():
            break
    none = (rate == 0) & (way != 0)
    if none.any() and torch.is_grad_enabled() and any(p.requires_grad for p in parts):
        event_t, *parts = _WithoutGradient.apply(none, event_t, *parts)
    still = rate == 0
    if still.all():
        return event_t, rebuild(parts)
    at = [p - beside(shift, p) * d for p, d in zip(parts, slopes, strict=True)]

    def moved(time: Tensor, parts: Sequence[Tensor], dt: Tensor) -> Any:
        """The state dt later, with derivatives to second order in dt: a step of the midpoint rule."""
        k = slope if isinstance(slope, tuple) else (slope,)
        half = [p + 0.5 * beside(dt, p) * d for p, d in zip(parts, k, strict=True)]
        k = func(beside(time + 0.5 * dt, parts[0]), rebuild(half))
        k = k if isinstance(k, tuple) else (k,)
        return rebuild([p + beside(dt, p) * d for p, d in zip(parts, k, strict=True)])

    # Newton's method from the event's time, whose steps are 0 and have derivatives: the first is right to
    # first order in what the solution depends on, the second to second order.
    dt = torch.zeros_like(time)
    for state in (lambda dt: rebuild(at), lambda dt: moved(time - shift, at, dt)):
        change = event(beside(time - shift + dt, parts[0]), state(dt))
        dt = dt - torch.where(still, 0.0, (change - change.detach()) / torch.where(still, 1.0, rate)).to(dt)
    return event_t + dt.to(event_t), moved(time, parts, dt)


def _rate(
    event: Event,
    time: Tensor,
    parts: Sequence[Tensor],
    slopes: Sequence[Tensor],
    rebuild: Callable[[Sequence[Tensor]], Any],
    beside: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The event's change in time along the solution, ċ, of time's shape, without gradient."""
    at_time = beside(time, parts[0])
    if any(map(is_transformed, parts)):
        first_jvp()
        ones = torch.ones_like(at_time)
        moving = torch.func.jvp(
            lambda s, *at: event(s, rebuild(at)) + 0.0 * s.reshape(time.shape),
            (at_time, *parts),
            (ones, *slopes),
        )
        return moving[1].detach()
    with torch.enable_grad():
        s, at = at_time.clone().requires_grad_(), [p.detach().requires_grad_() for p in parts]
        value = event(s, rebuild(at))
        if not value.requires_grad:
            return torch.zeros_like(time)
        try:
            rate, *rates = torch.autograd.grad(
                value.sum(), (s, *at), allow_unused=True, materialize_grads=True
            )
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            return torch.zeros_like(time)  # as heaviside and other jumps, of which torch has no derivative
    along = [(r.conj() * d).real for r, d in zip(rates, slopes, strict=True)]
    return rate.reshape(time.shape) + sum(c.reshape(*time.shape, -1).sum(-1) for c in along)
