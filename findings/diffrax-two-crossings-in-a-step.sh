#!/usr/bin/env bash
# diffrax 0.7.2: an event that crosses zero twice within a step is not seen, with a root finder and without.
#
# A guess: on y' = 1 from 0, with the event (y - 2.5)(y - 5) and a root finder, the solve ends at t = 2.5: the
# solution is a polynomial that the dense output has exactly, and adaptive steps or the root finder look between.
# Behaviour: only the signs at the ends of steps are compared. A step grows past both zeros, the solve runs to t1 =
# 20, and its result is success, as if there had been no event; the event y - 2.5 alone is found at 2.5 to rounding.
# It is so for Tsit5, Dopri5 and Dopri8.
#
# Installs jax==0.8.1 diffrax==0.7.2 numpy==2.3.5 in a temporary folder, and fails where the behaviour is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.8.1 diffrax==0.7.2 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import diffrax
import jax
import jax.numpy as jnp
import optimistix

jax.config.update("jax_enable_x64", True)


def end(solver, event):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: jnp.ones_like(y)), solver, 0.0, 20.0, None, jnp.zeros(1),
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
        event=diffrax.Event(lambda t, y, args, **kwargs: event(y[0]), optimistix.Newton(1e-10, 1e-10)),
    )
    return float(solution.ts[-1]), solution.result == diffrax.RESULTS.successful


for solver in (diffrax.Tsit5(), diffrax.Dopri5(), diffrax.Dopri8()):
    one, _ = end(solver, lambda y: y - 2.5)
    two, success = end(solver, lambda y: (y - 2.5) * (y - 5))
    print(f"diffrax {diffrax.__version__} {type(solver).__name__}: y - 2.5 ends at {one:.6g}, (y - 2.5)(y - 5) at {two:.6g}, "
          f"successful: {bool(success)}")
    assert abs(one - 2.5) < 1e-9 and two == 20 and success
PYTHON
