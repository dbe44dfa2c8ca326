"""A stiff problem in diffrax's Kvaerno5, run by stiff.py in an environment of its own: prints the result as JSON."""

import importlib.util
import json
import sys
import time
import types
from pathlib import Path


def main() -> None:
    import diffrax  # of this script's own environment
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    sys.modules.setdefault(
        "torch", types.ModuleType("torch")
    ).Tensor = object  # the problems name its type alone
    path = Path(__file__).with_name("stiff_problems.py")
    spec = importlib.util.spec_from_file_location("stiff_problems", path)
    problems = importlib.util.module_from_spec(spec)
    sys.modules["stiff_problems"] = problems
    spec.loader.exec_module(problems)
    if sys.argv[1] == "robertsons":
        return robertsons(problems, float(sys.argv[2]), float(sys.argv[3]))
    name, rtol, atol = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    every = [problems.ROBERTSON, problems.VAN_DER_POL, *problems.DETEST]
    problem = next(p for p in every if p.name == name)
    t = jnp.linspace(0, problem.end, 11)

    def field(t, y, args):
        return jnp.stack([jnp.asarray(x, float) for x in problem.parts(t, *y, exp=jnp.exp, sin=jnp.sin)])

    @jax.jit
    def solve(y0):
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Kvaerno5(), 0.0, problem.end, None, y0, saveat=diffrax.SaveAt(ts=t),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol), max_steps=100_000,
        )  # fmt: skip
        return found.ys, found.stats["num_steps"]

    y0 = jnp.asarray(problem.start, float)
    y, steps = jax.block_until_ready(solve(y0))
    begin = time.perf_counter()
    jax.block_until_ready(solve(y0))
    print(json.dumps({"y": y.tolist(), "steps": int(steps), "seconds": time.perf_counter() - begin}))


def robertsons(problems, rtol: float, atol: float) -> None:
    """All systems of `robertson_rates` at once to t = 40, the fastest of some settings: bounds, loops, controllers."""
    import diffrax
    import jax
    import jax.numpy as jnp

    rates, y0 = jnp.asarray(problems.robertson_rates()), jnp.array([1.0, 0.0, 0.0])
    best = None

    def field(t, y, args):
        return jnp.stack(problems.robertson_of(args, *y))

    checkpointed, forward = diffrax.RecursiveCheckpointAdjoint(), diffrax.ForwardMode()
    pi = dict(pcoeff=0.4, icoeff=0.3)
    for most, adjoint, gains in (
        (512, checkpointed, {}),
        (4096, checkpointed, {}),
        (None, forward, {}),
        (None, forward, pi),
    ):

        @jax.jit
        @jax.vmap
        def solve(rates, most=most, adjoint=adjoint, gains=gains):
            found = diffrax.diffeqsolve(
                diffrax.ODETerm(field), diffrax.Kvaerno5(),
                0.0, 40.0, None, y0, args=rates, saveat=diffrax.SaveAt(t1=True), max_steps=most,
                adjoint=adjoint, stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, **gains),
            )  # fmt: skip
            return found.ys[-1], found.stats["num_steps"]

        try:
            y, steps = jax.block_until_ready(solve(rates))
        except Exception:  # more steps are needed
            continue
        for _ in range(8):
            begin, spent = time.perf_counter(), time.process_time()
            jax.block_until_ready(solve(rates))
            seconds, spent = time.perf_counter() - begin, time.process_time() - spent
            if best is None or seconds < best["seconds"]:
                best = {"y": y.tolist(), "steps": float(steps.mean()), "seconds": seconds, "processor": spent}
    print(json.dumps(best))


if __name__ == "__main__":
    main()
