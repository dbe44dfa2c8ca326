"""The Van der Pol case in diffrax, run by speed.py in an environment of its own: prints seconds as JSON."""

import json
import sys
import time

import numpy as np


def main() -> None:
    import diffrax  # of this script's own environment
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    given = np.load(sys.argv[1])
    y0, t, tol = jnp.asarray(given["y0"]), jnp.asarray(given["t"]), float(given["tol"])
    rounds = int(sys.argv[2])

    def field(t, y, args):
        return jnp.stack([y[1], 2 * (1 - y[0] ** 2) * y[1] - y[0]])

    @jax.jit
    @jax.vmap
    def solve(y0):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Dopri5(), t[0], t[-1], None, y0, saveat=diffrax.SaveAt(ts=t),
            stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol), max_steps=4096,
        ).ys  # fmt: skip

    start = time.perf_counter()
    y = solve(y0).block_until_ready()
    first, seconds = time.perf_counter() - start, []
    for _ in range(rounds):
        start = time.perf_counter()
        solve(y0).block_until_ready()
        seconds.append(time.perf_counter() - start)
    np.save(sys.argv[3], np.asarray(y).swapaxes(0, 1))
    print(
        json.dumps(
            {"first": first, "seconds": seconds, "version": diffrax.__version__, "jax": jax.__version__}
        )
    )


if __name__ == "__main__":
    main()
