"""Rows of tableaus, solving, stability and the Jacobian's analyses: laws with a closed form."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import torch
from torch import nn

import resode
from trust.rows import RECORDS, Case, Variant, row


def times(v: Variant, n: int = 3, end: float = 1.0) -> torch.Tensor:
    return torch.linspace(0, end, n, dtype=torch.float32 if v.dtype.itemsize < 8 else torch.float64)


def tight(v: Variant) -> dict[str, float]:
    """Tolerances that the variant's dtype resolves."""
    return {"rtol": max(1e-10, v.tolerance / 100), "atol": max(1e-12, v.tolerance / 100)}


def flow(v: Variant, a: torch.Tensor, y: torch.Tensor, t: float) -> torch.Tensor:
    """exp(tA) y, by torch's own exponential."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    return y.detach().to(wide) @ torch.linalg.matrix_exp(t * a.detach().to(wide)).T


def linear_solve(v: Variant, name: str, **more) -> Case:
    a, y0 = v.matrix(), v.tensor(v.batch, v.size)

    def law(y):
        assert y.dtype == v.dtype and y.shape == (3, v.batch, v.size)
        v.close(y[-1], flow(v, a, y0, 1.0), 10)

    return Case({"func": lambda t, y: y @ a.T, "y0": y0, "t": times(v), **tight(v), **more}, law)


@row("resode.odeint")
def _(v: Variant) -> Case:
    return linear_solve(v, "odeint")


@row("resode.odeint_adjoint")
def _(v: Variant) -> Case:
    return linear_solve(v, "odeint_adjoint", adjoint_params=())


@row("resode.odeint_event")
def _(v: Variant) -> Case:
    """y' = −y from 2 is 1 at ln 2."""

    def law(found):
        v.close(found[0], math.log(2), 10)
        v.close(found[1][-1], torch.ones(1), 10)

    y0 = torch.full((1,), 2.0, dtype=v.dtype)
    start = torch.tensor(0.0, dtype=torch.float64 if v.dtype.itemsize >= 8 else torch.float32)
    return Case(
        {"func": lambda t, y: -y, "y0": y0, "t0": start, "event_fn": lambda t, y: y.real - 1, **tight(v)}, law
    )


@row("resode.solve_ivp")
def _(v: Variant) -> Case:
    a, y0 = v.matrix(), v.tensor(v.batch, v.size)

    def law(s):
        assert s.status == 0 and s.y.shape[1:] == y0.shape and float(s.t[-1]) == 1.0
        v.close(s.y[-1], flow(v, a, y0, 1.0), 10)
        v.close(s(0.4), flow(v, a, y0, 0.4), 100)

    return Case({"func": lambda t, y: y @ a.T, "t_span": (0.0, 1.0), "y0": y0, **tight(v)}, law)


@row("resode.steps")
def _(v: Variant) -> Case:
    a, y0 = v.matrix(), v.tensor(v.batch, v.size)

    def law(found):
        kept = list(found)
        assert kept[0].start == 0 and kept[-1].time == 1
        assert all(one.time == two.start for one, two in itertools.pairwise(kept))
        v.close(kept[-1].state, flow(v, a, y0, 1.0), 10)

    return Case({"func": lambda t, y: y @ a.T, "y0": y0, "t_span": (0.0, 1.0), **tight(v)}, law)


@row("resode.ODEBlock")
def _(v: Variant) -> Case:
    a, x = v.matrix(), v.tensor(v.batch, v.size)

    def law(block):
        v.close(block(x), flow(v, a, x, 1.0), 10)

    return Case({"func": lambda t, y: y @ a.T, **tight(v)}, law)


@row("resode.ResidualStack")
def _(v: Variant) -> Case:
    """x ← x + ηF(x), to the bit."""
    fields = [v.module(nn.Linear(v.size, v.size)) for _ in range(3)]
    x = v.tensor(v.batch, v.size)

    def law(stack):
        by_hand = x
        for layer in fields:
            by_hand = by_hand + 0.3 * layer(by_hand)
        assert torch.equal(stack(x), by_hand)
        stack.solver = "rk4"
        assert stack(x).shape == x.shape and stack.stats.nfe == 12
        assert stack.refine(2).depth == 6

    return Case({"fields": fields, "step_size": 0.3}, law)


@row("resode.ButcherTableau")
def _(v: Variant) -> Case:
    def law(method):
        assert method.explicit and method.stages == 2
        assert resode.stability_function(method, torch.tensor([1j])).item() == 0.5 + 1j

    entries = {"a": ((0, 0), (1, 0)), "b": (0.5, 0.5), "c": (0, 1)}
    return Case({"name": "heun_again", **entries, "order": 2, "source": "Heun (1900)"}, law)


@row("resode.stability_function")
def _(v: Variant) -> Case:
    z = v.tensor(v.batch, v.size)

    def law(growth):
        assert growth.dtype == z.dtype
        v.close(growth, 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24)

    wide = v.dtype.to_complex() if v.dtype.itemsize >= 4 else v.dtype  # real ones are refused
    z = z.to(wide if v == Variant(dtype=v.dtype) else v.dtype)
    return Case({"method": "rk4", "z": z}, law)


def interval_row(name: str, value: float) -> None:
    @row(name)
    def _(v: Variant) -> Case:
        return Case({"method": "rk4"}, lambda found: v.close(found, value))


interval_row("resode.real_stability_interval", 2.785293563405282)
interval_row("resode.imaginary_stability_interval", 8**0.5)


@row("resode.stability.stable_intervals")
def _(v: Variant) -> Case:
    def law(found):
        assert found == ((0.0, 2.0),)

    return Case({"method": "euler", "direction": -1.0}, law)


@row("resode.stability.stability_coefficients")
def _(v: Variant) -> Case:
    def law(found):
        assert [float(c) for c in found[0]] == [1, 0.5, 1 / 12] and [float(c) for c in found[1]] == [
            1,
            -0.5,
            1 / 12,
        ]

    return Case({"method": "gauss4"}, law)


@row("resode.stability.stability_properties")
def _(v: Variant) -> Case:
    def law(found):
        assert found.letters == "A, L, I" and found.order == 5 and found.stages == 3

    return Case({"method": "radau5"}, law)


@row("resode.stability.eigenvalue_step_limit")
def _(v: Variant) -> Case:
    """Euler's limit of λ is −2 Re λ/|λ|²; of several the least."""
    values = [complex(-1 - i, i) for i in range(v.size)]

    def law(limit):
        v.close(limit.step, min(-2 * z.real / abs(z) ** 2 for z in values))

    return Case({"eigenvalues": values, "method": "euler"}, law)


def limit_row(name: str, step) -> None:
    @row(name)
    def _(v: Variant) -> Case:
        """Euler on a symmetric J: 2/|λ|max."""
        a = v.matrix()
        a = v.laid((a + a.mH) / 2)

        def law(found):
            values = torch.linalg.eigvalsh(a.to(torch.complex128 if a.is_complex() else torch.float64))
            v.close(step(found), 2 / values.abs().max(), 10)

        return Case({"field_or_jacobian": a}, law)


limit_row("resode.max_stable_step", lambda found: found)
limit_row("resode.step_limit", lambda found: found.step)


@row("resode.analysis.contraction_step")
def _(v: Variant) -> Case:
    return Case({"jacobian": [[-2.0, 0.0], [0.0, -5.0]]}, lambda found: v.close(found, 0.4))


@row("resode.analysis.logarithmic_norm")
def _(v: Variant) -> Case:
    a = v.matrix()

    def law(found):
        wide = a.to(torch.complex128 if a.is_complex() else torch.float64)
        v.close(found, torch.linalg.eigvalsh((wide + wide.mH) / 2).max(), 10)

    return Case({"jacobian": a}, law)


@row("resode.analysis.transient_growth")
def _(v: Variant) -> Case:
    a = v.matrix()

    def law(found):
        wide = a.to(torch.complex128 if a.is_complex() else torch.float64)
        step = torch.eye(v.size, dtype=wide.dtype) + 0.1 * wide
        norms = [torch.linalg.matrix_norm(torch.linalg.matrix_power(step, n), 2) for n in range(6)]
        v.close(torch.as_tensor(found.norms)[:6], torch.stack(norms), 10)

    return Case({"jacobian": a, "step_size": 0.1, "n_steps": 5}, law)


@row("resode.analysis.map_limit")
def _(v: Variant) -> Case:
    """Euler's own map: 1 + ηλ."""
    return Case(
        {"step_matrix": lambda z: np.array([[1 + z]]), "eigenvalue": -4.0}, lambda found: v.close(found, 0.5)
    )


@row("resode.design_method")
def _(v: Variant) -> Case:
    def law(method):
        v.close(resode.max_stable_step(eigenvalues=[-1.0], solver=method), 2 * 9, 100)

    return Case({"eigenvalues": [-1.0], "stages": 3}, law)


@row("resode.analysis.jacobian")
def _(v: Variant) -> Case:
    a, x = v.matrix(), v.tensor(v.batch, v.size)
    return Case(
        {"field": lambda y: y @ a.T, "x": x}, lambda found: v.close(found, a.expand(v.batch, *a.shape))
    )


@row("resode.find_fixed_points")
def _(v: Variant) -> Case:
    """The zero of Ax + b, which Newton's method reaches in a step."""
    a, b, x0 = v.matrix(), v.tensor(v.size, add=1).detach(), v.tensor(v.batch, v.size)

    def law(found):
        assert found.converged.all()
        v.close(found.points @ a.T, (-b).expand(v.batch, v.size), 100)

    return Case({"field": lambda x: x @ a.T + b, "x0": x0}, law)


@row("resode.find_several_fixed_points")
def _(v: Variant) -> Case:
    x0 = torch.tensor([[0.4]], dtype=v.dtype)

    def law(found):
        assert len(found.points) >= 1
        for point in found.points.flatten():
            assert min(abs(complex(point) - root) for root in (0, 1, 3)) < 100 * v.tolerance

    return Case({"field": lambda x: x * (1 - x) * (x - 3), "x0": x0}, law)


@row("resode.classify")
def _(v: Variant) -> Case:
    x = torch.tensor([[0.0], [1.0]], dtype=v.dtype)

    def law(found):
        assert found.stable.tolist() == [False, True] and found.solver_stable.tolist() == [False, False]

    return Case({"field": lambda x: x * (1 - x), "x": x, "solver": "euler", "step_size": 2.5}, law)


@row("resode.analysis.lyapunov_exponents")
def _(v: Variant) -> Case:
    """Of x ← x + η(−x): log|1 − η|."""
    x0 = v.tensor(v.batch, v.size)

    def law(found):
        v.close(found, torch.full_like(found, math.log(0.5)), 10)

    return Case({"field": lambda x: -x, "x0": x0, "step_size": 0.5, "n_steps": 20}, law)


@row("resode.analysis.bifurcation")
def _(v: Variant) -> Case:
    eta = torch.tensor([1.0, 1.9], dtype=v.dtype)

    def law(found):
        v.close(found.orbits, torch.ones_like(found.orbits), 1000)

    return Case(
        {"field": lambda x: x * (1 - x), "step_sizes": eta, "x0": 0.1, "transient": 300, "keep": 4}, law
    )


@row("resode.analysis.stability_losses")
def _(v: Variant) -> Case:
    start = torch.tensor([[0.8]], dtype=v.dtype)

    def law(found):
        assert found[0].kind == "flip"
        v.close(found[0].step_size, 2.0, 100)

    return Case({"field": lambda x: x * (1 - x), "x0": start, "max_step": 2.2, "max_period": 1}, law)


@row("resode.analysis.cobweb")
def _(v: Variant) -> Case:
    def law(web):
        v.close([float(x) for x in web.orbit], [0.1, 0.19, 0.3439], 1e4)

    return Case({"field": lambda x: x * (1 - x), "x0": 0.1, "step_size": 1.0, "n_steps": 2}, law)


@row("resode.analysis.phase_portrait")
def _(v: Variant) -> Case:
    def law(found):
        assert found.kinds == ["unstable node", "stable node"]

    return Case({"points": 11}, law, order=(lambda x: x * (1 - x), (-0.5, 1.5)))


@row("resode.analysis.product_norm")
def _(v: Variant) -> Case:
    x = v.tensor(v.batch, v.size)

    def law(found):
        v.close(found.norm, torch.full((v.batch,), 1.05**20), 10)

    return Case({"fields": [lambda x: 0.05 * x] * 20, "x": x}, law)


@row("resode.analysis.gradient_parts")
def _(v: Variant) -> Case:
    a, x, g = v.matrix(), v.tensor(v.batch, v.size), v.tensor(v.batch, v.size, add=1)

    def law(parts):
        v.close(parts.identity, g)
        v.close(parts.residual, 0.5 * g @ a.conj())
        v.close(parts.total, parts.identity + parts.residual)

    return Case({"field": lambda y: y @ a.T, "x": x, "g": g, "step_size": 0.5}, law)


@row("resode.analysis.shortcut_matrix")
def _(v: Variant) -> Case:
    x = v.tensor(1, v.size)
    return Case({"shortcut": lambda x: 3 * x, "x": x}, lambda found: v.close(found, 3 * torch.eye(v.size)))


@row("resode.modified_field")
def _(v: Variant) -> Case:
    """x ← (1 − h)x follows x' = −(1 + h/2 + …)x."""
    decay = nn.Linear(1, 1, bias=False)
    nn.init.constant_(decay.weight, -1.0)
    stack = resode.ResidualStack(decay, depth=1, step_size=0.1).to(v.dtype)

    def law(modified):
        v.close(modified(torch.ones(1, 1, dtype=v.dtype)), [[-1.05]])

    return Case({"stack": stack, "order": 1}, law)


@row("resode.distance_from_ode")
def _(v: Variant) -> Case:
    field = v.module(nn.Linear(v.size, v.size, bias=False))
    stack = resode.ResidualStack(field, depth=2, step_size=0.1).to(v.dtype)
    x = v.tensor(v.batch, v.size)

    def law(found):
        assert found.shape == (2, v.batch)
        f = field(x)
        v.close(found[0], 0.05 * field(f).norm(dim=1) / f.norm(dim=1), 10)

    return Case({"stack": stack, "x": x}, law)


@row("resode.depth_step")
def _(v: Variant) -> Case:
    growth = nn.Linear(2, 2, bias=False)
    growth.weight.data.copy_(torch.eye(2))
    stack = resode.ResidualStack(growth, depth=20).to(v.dtype)
    return Case(
        {"model": stack, "x": torch.ones(1, 2, dtype=v.dtype)},
        lambda found: v.close(found, 10 ** (1 / 20) - 1, 1e3),
    )


@row("resode.analysis.depth_convergence")
def _(v: Variant) -> Case:
    x = v.tensor(v.batch, v.size)

    class Decay(nn.Module):
        def forward(self, x):
            return -x

    def make(n):
        return resode.ResidualStack(Decay(), depth=n, step_size=1 / n)

    def law(found):
        assert v.dtype.itemsize < 4 or abs(found.order - 1) < 0.1

    return Case({"make": make, "x": x, "depths": [16, 32], "reference": x.detach() / math.e}, law)


@row("resode.StepLimitPenalty")
def _(v: Variant) -> Case:
    w = torch.tensor([[-3.0, 0.0], [0.0, -1.0]], dtype=v.dtype)

    def law(penalty):
        v.close(penalty.of_field(lambda x: x @ w.T, torch.ones(1, 2, dtype=v.dtype), step=1.0), 0.1625, 10)

    return Case({"solver": "euler", "margin": 0.1, "vectors": 2}, law)


def failure_row(name: str) -> None:
    @row(name, hostile=False)
    def _(v: Variant) -> Case:
        """A pickled error is the same error."""
        more = {"residual": 0.5, "rate": 2.0} if name.endswith("NewtonNotConverged") else {}

        def law(error):
            again = pickle.loads(pickle.dumps(error))
            assert type(again) is type(error) and str(again) == str(error) == "at t=1" and again.time == 1.0
            assert isinstance(error, resode.SolverError)

        return Case({"message": "at t=1", "time": 1.0, "step_size": 0.5, "sample": 3, **more}, law)


for (
    failure
) in "MaxStepsReached NewtonNotConverged NonFiniteField NonFiniteState SolverError StepSizeUnderflow".split():
    failure_row(f"resode.{failure}")

RECORDS |= {
    "resode.METHODS": "resode.stability_function",
    "resode.Classification": "resode.classify",
    "resode.FixedPoints": "resode.find_fixed_points",
    "resode.Solution": "resode.solve_ivp",
    "resode.SolverStep": "resode.steps",
    "resode.Stats": "resode.ResidualStack",
    "resode.StepLimit": "resode.step_limit",
    "resode.analysis.Bifurcation": "resode.analysis.bifurcation",
    "resode.analysis.DepthConvergence": "resode.analysis.depth_convergence",
    "resode.analysis.GradientParts": "resode.analysis.gradient_parts",
    "resode.analysis.ProductNorm": "resode.analysis.product_norm",
    "resode.analysis.StabilityLoss": "resode.analysis.stability_losses",
    "resode.analysis.TransientGrowth": "resode.analysis.transient_growth",
    "resode.stability.StabilityProperties": "resode.stability.stability_properties",
}
