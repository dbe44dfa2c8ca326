#!/usr/bin/env bash
# diffrax 0.7.2: Dopri8's dense output is of order 6 between steps, two less than its steps.
#
# A guess: the interpolation of a method of order 8 is of order 7, as that of SciPy's DOP853 is.
# Behaviour: with constant steps on a smooth nonlinear problem, halving the step divides the error at the ends of steps
# by some 2^8 and the one in their middle by some 2^6.
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
import numpy as np

jax.config.update("jax_enable_x64", True)


def solve(n, where):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: jnp.array([y[1], -jnp.sin(y[0])])), diffrax.Dopri8(), 0.0, 4.0, 4.0 / n,
        jnp.array([1.0, 0.0]), saveat=diffrax.SaveAt(dense=True), stepsize_controller=diffrax.ConstantStepSize(),
    )
    return np.array(jax.vmap(solution.evaluate)(jnp.array([4.0 * (k + where) / n for k in range(n)])))


def order(where):
    # the truth by steps 16 times finer, at their ends, where the method is of order 8
    errors = []
    for n in (8, 16):
        truth = solve(64 * n, 0.0)[[round(64 * (k + where)) for k in range(n)]]
        errors.append(np.abs(solve(n, where) - truth).max())
    return np.log2(errors[0] / errors[1])


ends, middle = order(63 / 64), order(0.5)
between = [order(w) for w in (0.25, 0.5, 0.75)]
print(f"diffrax {diffrax.__version__} Dopri8: order in the middle of steps {middle:.2f}; at quarters {between}")
assert 5.5 < min(between) < 6.6
PYTHON
