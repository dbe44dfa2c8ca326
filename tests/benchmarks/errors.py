"""Every error of a solve that can't go on, as users see it: python -m tests.benchmarks.errors."""

import math
import warnings

import torch

from resode import ODEBlock, SolverError, odeint, odeint_event

D = torch.float64
ONE, SPAN = torch.ones(1, dtype=D), torch.tensor([0.0, 1.0], dtype=D)


def jump(t, y):
    return torch.where(y > 0.5, -torch.ones_like(y), torch.ones_like(y)) * 1e3


def growing_batch(t, y):
    return y * y


def rough(t, y):
    return 1e12 * torch.randn(y.shape, generator=rough.generator, dtype=D)


def raising(t, y):
    raise KeyError("weights")


CASES = {
    "MaxStepsReached, stiff": lambda: odeint(lambda t, y: -1e6 * (y - torch.cos(t)), ONE, SPAN, max_steps=1000),
    "MaxStepsReached, not stiff": lambda: odeint(
        lambda t, y: torch.stack([y[1], -400 * y[0]]), torch.ones(2, dtype=D), SPAN * 100, max_steps=200
    ),
    "MaxStepsReached, per sample": lambda: odeint(
        lambda t, y: -torch.tensor([[1.0], [1e5]], dtype=D) * (y - 1 / (1 + t)), torch.zeros(2, 1, dtype=D), SPAN,
        max_steps=500, per_sample=True,
    ),
    "MaxStepsReached, no Jacobian (300 entries)": lambda: odeint(
        lambda t, y: -1e6 * y, torch.ones(300, dtype=D), SPAN, max_steps=100
    ),
    "StepSizeUnderflow, discontinuity": lambda: odeint(rough, ONE, SPAN + 1, max_steps=5000),
    "MaxStepsReached, sliding along a jump": lambda: odeint(jump, ONE, SPAN, max_steps=300),
    "StepSizeUnderflow, blow-up": lambda: odeint(lambda t, y: y * y, ONE, SPAN * 2),
    "blow-up of one sample": lambda: odeint(
        growing_batch, torch.tensor([[0.1], [1.0]], dtype=D), SPAN * 2, rtol=1e-3, atol=1e-3, per_sample=True
    ),
    "blow-up of an exponential": lambda: odeint(lambda t, y: torch.exp(y), ONE, SPAN * 2, rtol=1e-3, atol=1e-3),
    "NonFiniteState, Euler's step too long": lambda: odeint(
        lambda t, y: -100.0 * y, ONE, SPAN * 300, method="euler", step_size=0.1
    ),
    "NonFiniteState, rk4, blow-up": lambda: odeint(lambda t, y: y**3, ONE * 3, SPAN, method="rk4", n_steps=40),
    "NonFiniteState, per sample": lambda: odeint(
        lambda t, y: y**3, torch.tensor([[0.1], [30.0]], dtype=D), SPAN, method="rk4", n_steps=40, per_sample=True
    ),
    "NonFiniteField, at the start": lambda: odeint(lambda t, y: 1 / (y - 1), torch.tensor([0.0, 1.0]).double(), SPAN),
    "NonFiniteField, edge of the domain": lambda: odeint(lambda t, y: -torch.sqrt(y) - 1, ONE, SPAN),
    "NonFiniteState, before an event": lambda: odeint_event(
        lambda t, y: y * y, ONE, SPAN[0], event_fn=lambda t, y: y - 1e300, method="euler", step_size=0.1
    ),
    "MaxStepsReached, no event": lambda: odeint_event(
        lambda t, y: -y, ONE, SPAN[0], event_fn=lambda t, y: y + 1, method="rk4", step_size=0.1, max_steps=50
    ),
    "no event, adaptive": lambda: odeint_event(
        lambda t, y: torch.cos(t) + 0 * y, ONE, SPAN[0], event_fn=lambda t, y: y + 1, max_steps=50
    ),
    "a field that raises": lambda: odeint(raising, ONE, SPAN),
    "in a block": lambda: ODEBlock(lambda t, x: x * x, t=(0.0, 3.0), rtol=1e-2)(torch.ones(2, 1, dtype=D)),
    "on the way back": lambda: backward(),
}  # fmt: skip


def backward():
    y0 = torch.tensor([1.0], dtype=D, requires_grad=True)

    class Decay(torch.nn.Module):
        def forward(self, t, y):
            return -40 * y

    from resode import odeint_adjoint

    # Backwards the decay is growth, and the way back is asked for far more than the way there.
    y = odeint_adjoint(
        Decay(), y0, SPAN, rtol=1e-2, atol=1e-2, max_steps=60, adjoint_rtol=1e-13, adjoint_atol=1e-20
    )
    y.sum().backward()


def messages() -> dict[str, BaseException]:
    """The error of every case."""
    found = {}
    for name, case in CASES.items():
        rough.generator = torch.Generator().manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = case()
        except (SolverError, ValueError, TypeError, KeyError) as error:
            found[name] = error
        else:
            raise AssertionError(f"{name}: no error, {result}")
    return found


if __name__ == "__main__":
    for name, error in messages().items():
        place = ""
        if isinstance(error, SolverError):
            step = math.nan if error.step_size is None else error.step_size
            place = f"\n  .time={error.time} .step_size={step:.3g} .sample={error.sample} .eigenvalue={error.eigenvalue}"
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
        print(f"{name}\n  {type(error).__name__}: {error}{notes}{place}\n")
