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

    def path(field, y0):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Dopri5(), t[0], t[-1], None, y0, saveat=diffrax.SaveAt(ts=t),
            stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
            max_steps=512,  # the longest of these solves takes fewer; the default of 4,096 doubles the time
        ).ys  # fmt: skip

    def together(t, y, args):
        return jax.vmap(lambda y: field(t, y, args))(y)

    ways = {
        "per sample": jax.vmap(lambda y0: path(field, y0), out_axes=1),
        "whole": lambda y0: path(together, y0),
    }
    calls = {}
    for way, solve in ways.items():
        calls[way] = jax.jit(solve)
        calls[f"{way}, gradient"] = jax.jit(jax.grad(lambda y0, solve=solve: (solve(y0) ** 2).sum()))
    told = {"version": diffrax.__version__, "jax": jax.__version__, "first": {}, "seconds": {}}
    for name, call in calls.items():
        start = time.perf_counter()
        call(y0).block_until_ready()
        told["first"][name] = time.perf_counter() - start
        told["seconds"][name] = []
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call(y0).block_until_ready()
            told["seconds"][name].append(time.perf_counter() - start)
    np.savez(sys.argv[3], **{way.replace(" ", "_"): np.asarray(calls[way](y0)) for way in ways})
    print(json.dumps(told))


if __name__ == "__main__":
    main()
