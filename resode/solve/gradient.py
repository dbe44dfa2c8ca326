r"""Gradients by the adjoint equation: memory that does not grow with the number of steps.

With a(t) = ∂L/∂y(t), going back in time from the last output to the first,

    dy/dt = f(t, y),        da/dt = −aᵀ ∂f/∂y,        dg/dt = −aᵀ ∂f/∂θ,

where a jumps by ∂L/∂y(t_i) at every output, g(t_0) is the gradient of the parameters θ, a(t_0) that of
y0, ∂L/∂t_i = f(t_i, y_i) · ∂L/∂y_i, and ∂L/∂t_0 = −f(t_0, y0) · a(t_0). The state is solved again on the
way back and set to the stored one at every output. The gradient is that of the exact solution, to the
backward solve's tolerance; it is not the exact gradient of the discrete one.

Source:
    Pontryagin et al. (1962); Chen et al., Neural Ordinary Differential Equations (2018);
    seminorm: Kidger, Chen & Lyons, "Hey, that's not an ODE" (2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from resode.solve.control import Callbacks
from resode.solve.events import Event
from resode.solve.native import solve
from resode.solve.options import SolveSettings
from resode.solve.result import SolverError, Stats
from resode.solve.step import as_stage
from resode.solve.to_event import solve_to_event
from resode.tableaus import ButcherTableau

GRADIENTS = ("autograd", "checkpoint", "adjoint")


@dataclass(frozen=True)
class WayBack:
    """What `odeint_adjoint` is told of the solve back in time; None for what the way forward does."""

    rtol: float | None = None
    atol: float | None = None
    method: str | ButcherTableau | None = None
    options: dict[str, Any] | None = None
    params: Iterable[Tensor] | None = None


@dataclass
class Adjoint:
    """A solve whose gradient comes by the adjoint equation.

    Args:
        func: the field of (t, y), y one tensor.
        settings: the method forward.
        back: the method on the way back; its norm, if any, takes (t, y, a, *parameters).
        params: what else gets a gradient.
        callbacks: told of the steps forward.
        callbacks_back: told of the steps back, with the state (0, y, a, *parameters).
        state_norm: the norm of a state, for the default norm of the way back.
    """

    func: Callable[..., Any]
    settings: SolveSettings
    back: SolveSettings
    params: tuple[Tensor, ...]
    callbacks: Callbacks | None
    callbacks_back: Callbacks | None
    state_norm: Callable[[Tensor], Any]
    stats: Stats | None = None

    def forward(self) -> Callable[..., Any]:
        """The field without gradient, evaluated with one where it asks for it, as a Hamiltonian's does."""
        takes_gradients = False

        def field(t: Tensor, y: Tensor) -> Any:
            nonlocal takes_gradients
            if not takes_gradients:
                try:
                    return self.func(t, y)
                except RuntimeError as error:
                    if "does not require grad" not in str(error):
                        raise
                    takes_gradients = True
            if torch.is_grad_enabled() and y.requires_grad:  # for the Jacobian of an implicit step
                return self.func(t, y)
            with torch.enable_grad():
                dy = self.func(t, y.detach().requires_grad_())
            return dy.detach() if isinstance(dy, Tensor) else dy

        return field

    def solve(self, y0: Tensor, t: Tensor) -> tuple[Tensor, Stats]:
        """The states at t, (T, *y0.shape), and the cost; its nfe_backward grows on the way back."""
        path, _ = _Solve.apply(self, None, y0, t, *self.params)
        assert self.stats is not None
        return path, self.stats

    def solve_to_event(self, y0: Tensor, t: Tensor, event: Event) -> tuple[Tensor, Tensor, Stats]:
        """The event's time, the states at t[0] and there, and the cost."""
        path, event_t = _Solve.apply(self, event, y0, t, *self.params)
        assert self.stats is not None
        return event_t, path, self.stats


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: Adjoint, event: Event | None, y0: Tensor, t: Tensor, *params: Tensor) -> Any:
        t_free = t.detach()
        if event is None:
            path, job.stats = solve(job.forward(), y0, t_free, job.settings, job.callbacks)
            times = event_t = t_free
        else:
            event_t, path, job.stats = solve_to_event(
                job.forward(), y0, t_free, job.settings, event, job.callbacks
            )
            times = torch.stack([t_free[0], event_t])
        event_t = event_t.clone()
        ctx.job, ctx.stats, ctx.is_event = job, job.stats, event is not None
        ctx.mark_non_differentiable(event_t)
        ctx.save_for_backward(path, times, *params)
        return path, event_t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        path, times, *params = ctx.saved_tensors
        y0, t, params = _backward(
            ctx.job, ctx.stats, path, times, params, grads[0], ctx.needs_input_grad[3], ctx.is_event
        )
        return None, None, y0, t, *params


def _backward(
    job: Adjoint,
    stats: Stats,
    path: Tensor,
    times: Tensor,
    params: Sequence[Tensor],
    grad: Tensor,
    wants_t: bool,
    is_event: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Gradients of y0, t and the parameters."""
    y0, n = path[0], len(times)
    real = y0.dtype.to_real()
    shape = (y0.shape[0],) + (1,) * (y0.ndim - 1) if job.settings.per_sample else ()
    pack, unpack = _packing([y0, y0, *params], real)
    calls = 0

    def field(t: Tensor, z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        y, a = unpack(z)[:2]
        for_jacobian = torch.is_grad_enabled() and z.requires_grad  # of an implicit step
        with torch.enable_grad():
            y = y if for_jacobian else y.detach().requires_grad_()
            dy = as_stage(job.func(t.to(real).expand(shape), y), y)
            if dy.requires_grad:
                back = torch.autograd.grad(
                    dy,
                    (y, *params),
                    a,
                    allow_unused=True,
                    materialize_grads=True,
                    create_graph=for_jacobian,
                )
            else:
                back = [torch.zeros_like(p) for p in (y, *params)]
        return pack([dy if for_jacobian else dy.detach(), *(-g for g in back)])

    def slope(i: int) -> Tensor:
        nonlocal calls
        calls += 1
        with torch.no_grad():
            return job.forward()(times[i].to(y0.device, real).expand(shape), path[i])

    settings = _back(job, unpack)
    told = _unpacked(job.callbacks_back, unpack, y0)
    grad_t = torch.zeros_like(times) if wants_t else None
    a, gathered = grad[-1], [torch.zeros_like(p) for p in params]
    for i in range(n - 1, 0, -1):
        if grad_t is not None:
            grad_t[i] = (grad[i].conj() * slope(i)).real.sum()
        if times[i] != times[i - 1]:  # an event may lie at the start
            z = pack([path[i], a, *gathered])
            try:
                way, _ = solve(field, z, times[[i, i - 1]], settings, told)
            except SolverError as error:
                error.add_note(
                    "resode: this was the adjoint's solve back in time; gradient='autograd' needs none."
                )
                raise
            _, a, *gathered = unpack(way[-1])
        if i == 1 and grad_t is not None:
            grad_t[0] = -(a.conj() * slope(0)).real.sum()
        a = a + grad[i - 1]
    stats.nfe_backward += calls
    if is_event and grad_t is not None:
        grad_t = torch.stack([grad_t[0], torch.zeros_like(grad_t[0])])
    return a, grad_t, [g.to(p.dtype) for g, p in zip(gathered, params, strict=True)]


def _packing(
    like: Sequence[Tensor], real: torch.dtype
) -> tuple[Callable[[Sequence[Tensor]], Tensor], Callable[[Tensor], list[Tensor]]]:
    """Tensors as one real vector, and back; complex ones by real and imaginary part."""
    shapes = [p.shape for p in like]
    sizes = [p.numel() * (2 if p.is_complex() else 1) for p in like]
    kinds = [p.is_complex() for p in like]

    def pack(parts: Sequence[Tensor]) -> Tensor:
        flat = [torch.view_as_real(p.resolve_conj()) if p.is_complex() else p for p in parts]
        return torch.cat([p.reshape(-1).to(like[0].device, real) for p in flat])

    def unpack(z: Tensor) -> list[Tensor]:
        parts = z.split(sizes)
        return [
            torch.complex(*p.reshape(*s, 2).unbind(-1)) if c else p.reshape(s)
            for p, s, c in zip(parts, shapes, kinds, strict=True)
        ]

    return pack, unpack


def _back(job: Adjoint, unpack: Callable[[Tensor], list[Tensor]]) -> SolveSettings:
    """The backward method with its norm on the packed state: all parts, or "seminorm", or the user's."""
    settings = job.back
    if settings.fixed:
        return settings
    norm, zero = settings.options.get("norm"), torch.zeros(())
    state_norm = job.state_norm

    def measured(z: Tensor) -> Any:
        parts = unpack(z)
        if callable(norm):
            return norm((zero.to(z), *parts))
        numbers = [state_norm(parts[0]), state_norm(parts[1])]
        if norm != "seminorm":
            numbers += [p.abs().square().mean().sqrt() for p in parts[2:] if p.numel()]
        return torch.stack([torch.as_tensor(x, dtype=z.dtype, device=z.device) for x in numbers]).max()

    return replace(settings, options={**settings.options, "norm": measured})


def _unpacked(
    callbacks: Callbacks | None, unpack: Callable[[Tensor], list[Tensor]], y0: Tensor
) -> Callbacks | None:
    if callbacks is None:
        return None
    zero = torch.zeros((), dtype=y0.dtype.to_real(), device=y0.device)

    def told(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda t, z, dt: call(t, (zero, *unpack(z)), dt)

    return Callbacks(told(callbacks.step), told(callbacks.accept), told(callbacks.reject))


def _parameters(module: nn.Module) -> list[Tensor]:
    """A module's parameters; of a replica that DataParallel made, what it has in their place."""
    copies = [p for m in module.modules() for p in getattr(m, "_former_parameters", {}).values()]
    return [*module.parameters(), *copies]


def adjoint_params(func: Any, given: Any, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """What gets a gradient besides y0 and t: the given, or func's parameters, and all that is in args.

    Raises:
        ValueError: func is no nn.Module, so that its parameters can't be seen.
        TypeError: something given is no tensor.
    """
    if given is None:
        if not isinstance(func, nn.Module):
            raise ValueError(
                f"the adjoint's gradients reach the parameters of an nn.Module only, and func is a "
                f"{type(func).__name__}. Make it a module, name its parameters with "
                "odeint_adjoint(..., adjoint_params=(...)), or () if it has none."
            )
        given = _parameters(func)
    params = [*given]
    for leaf in tree_leaves(args):
        params += (
            [leaf] if isinstance(leaf, Tensor) else _parameters(leaf) if isinstance(leaf, nn.Module) else []
        )
    for p in params:
        if not isinstance(p, Tensor):
            raise TypeError(f"adjoint_params must be tensors, got {type(p).__name__}.")
    return tuple(p for p in dict.fromkeys(params) if p.requires_grad)
