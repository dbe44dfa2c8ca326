r"""Trouble that the solver makes: steps that add growth which the field has not, and stiff fields.

A fixed step oversteps where it amplifies a perturbation of the state and eight times finer steps do not. An
adaptive solver is held by stiffness where its steps are as long as its stability region allows at the field's
fastest mode, and thousands of them are needed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resode.analysis.diagnose.findings import Finding
from resode.analysis.diagnose.measures import MANY, Measures
from resode.analysis.steps.limit import max_stable_step
from resode.blocks import ODEBlock, ResidualStack
from resode.blocks.solving import block_name, with_step
from resode.calls import call, hooked
from resode.solve import SolverError

_SAMPLES = 2
_FINER = 8
_GROWS = 2.0  # a perturbation, in one block, and so much more than under finer steps
_ROUNDS = 30  # of the power iteration
_RKL_STEPS = 32  # within 1 % on the stiff networks of the clinic, where 8 and 16 are not always

Field = Callable[[Tensor], Tensor]


def solver_findings(model: nn.Module, x: Any, m: Measures) -> list[Finding]:
    """Blocks that overstep, most growth first, and blocks that are stiff.

    Args:
        model: in evaluation mode.
        x: inputs of the model, a few samples.
        m: its measures.
    """
    solving = {n: s for n, s in model.named_modules() if isinstance(s, ResidualStack | ODEBlock)}
    if not solving:
        return []
    states: dict[str, Tensor] = {}

    def keep(name: str, args: tuple[Tensor, ...], kwargs: Any) -> None:
        states.setdefault(name, args[0].detach().clone())

    with torch.no_grad(), hooked(solving, before=keep):
        try:
            call(model, x)
        except SolverError:
            pass
    found: list[tuple[float, Finding]] = []
    for name, state in states.items():
        module, state = solving[name], state[:_SAMPLES]
        if isinstance(module, ResidualStack) and not module.tableau.adaptive:
            found += _oversteps(name, module, state)
        elif (stiff := _stiff(name, module, state, m)) is not None:
            found.append(stiff)
    ordered = sorted(found, key=lambda pair: -pair[0])
    return list({f.block: f for _, f in reversed(ordered)}.values())[::-1][:3]  # a shared block once


def _oversteps(name: str, stack: ResidualStack, x: Tensor) -> list[tuple[float, Finding]]:
    found = []
    substeps = stack.substeps
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i in range(stack.depth):
            if not bool(x.isfinite().all()):
                break
            after, gain = _gain(lambda y, i=i: stack.advance(i, y), x, generator)
            if not gain < _GROWS:
                stack.substeps = substeps * _FINER
                try:
                    _, finer = _gain(lambda y, i=i: stack.advance(i, y), x, generator)
                finally:
                    stack.substeps = substeps
                if not gain < _GROWS * finer:
                    found.append((gain, _overstep(name, stack, i, x, gain, finer)))
            x = after
    return found


def _gain(phi: Field, x: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Φ(x), and the gain of a small random perturbation, the largest of the samples."""
    v = torch.randn(x.shape, generator=generator).to(x)
    size = float(x.norm()) / x.numel() ** 0.5
    epsilon = torch.finfo(x.dtype).eps ** 0.4 * (size if size > 0 else 1.0)
    y = phi(torch.cat([x, x + epsilon * v]))
    plain, moved = y.chunk(2)
    gains = (moved - plain).flatten(1).norm(dim=1) / (epsilon * v.flatten(1).norm(dim=1))
    return plain, float(gains.max()) if bool(gains.isfinite().all()) else math.inf


def _overstep(name: str, stack: ResidualStack, i: int, x: Tensor, gain: float, finer: float) -> Finding:
    field, eta = with_step(stack, i, x)
    block, h, eigenvalue = block_name(name, stack, i), eta / stack.substeps, fastest_mode(field, x)
    if not eigenvalue < 0:
        substeps = _FINER * stack.substeps
        return Finding(
            block,
            "overstep",
            f"A step of {h:.4g} with {stack.solver} amplifies a perturbation {gain:.3g} times, and {_FINER} "
            f"times finer steps {finer:.3g}.",
            f"Take {substeps} substeps.",
            {"gain": gain, "finer": finer, "step": h, "substeps": float(substeps)},
        )
    limit = float(max_stable_step(eigenvalues=torch.tensor([eigenvalue]).double(), solver=stack.tableau))
    times = max(2, math.ceil(h / limit)) if limit > 0 else _FINER
    numbers = {"eigenvalue": eigenvalue, "limit": limit, "step": h, "gain": gain, "finer": finer}
    return Finding(
        block,
        "overstep",
        f"A step of {h:.4g} with {stack.solver} amplifies a perturbation "
        f"{f'{gain:.3g} times' if gain < math.inf else 'beyond what numbers hold'}"
        f"{f', and finer steps {finer:.3g}' if finer < gain else ''}: its mode λ = {eigenvalue:.4g} decays, "
        f"and allows steps up to {limit:.4g}.",
        f"Take {times * stack.substeps} substeps, or a step_size of {0.9 * limit * stack.substeps:.3g}, or a "
        "method with a larger stability region.",
        numbers | {"substeps": float(times * stack.substeps)},
    )


def fastest_mode(field: Field, x: Tensor) -> float:
    """The eigenvalue of largest modulus of F's Jacobian at x, where it is real: power iteration in float64.

    The largest in modulus over the samples; nan where it is complex, or no derivative is there.
    """
    if isinstance(field, nn.Module):
        field = copy.deepcopy(field).double()
    x = x.double()
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
    value = torch.full((len(x),), math.nan)
    before = value
    with torch.no_grad():
        for _ in range(_ROUNDS):
            v = v / v.flatten(1).norm(dim=1).clamp_min(1e-300).reshape(-1, *[1] * (x.ndim - 1))
            epsilon = 1e-5 * (1 + float(x.abs().max()))
            product = (field(x + epsilon * v) - field(x - epsilon * v)) / (2 * epsilon)
            before, value = value, (v * product).flatten(1).sum(1)
            v = product
    settled = (value - before).abs() <= 0.05 * value.abs()
    if not bool(settled.any()):
        return math.nan
    known = value[settled]
    return float(known[known.abs().argmax()])


def _stiff(name: str, module: Any, x: Tensor, m: Measures) -> tuple[float, Finding] | None:
    failed = m.solver_error is not None and m.solver_error[0] == name
    calls = m.evaluations.get(name, [0])
    if not failed and max(calls) <= MANY:
        return None
    index = calls.index(max(calls)) if calls else 0
    field, span = _field_of(module, index, x)
    eigenvalue = fastest_mode(field, x)
    block = (
        block_name(name, module, index) if isinstance(module, ResidualStack) else name
    ) or "whole network"
    tableau = module.tableau
    evaluations = max(calls)
    steps = evaluations / max(1, len(tableau.b) - 1)
    held = eigenvalue < 0 and (failed or steps * 6 > -eigenvalue * span / 4)
    if not held:
        if not failed:
            return None
        assert m.solver_error is not None
        error = m.solver_error[1]
        text, mode = f"{module.solver} gave up: {error}", error.eigenvalue
        if mode is not None and mode.real > 0:  # it blows up in finite time, which no solver can pass
            return math.inf, Finding(block, "explosion", text, _BOUND, {"eigenvalue": mode.real})
        looser = (
            f"Loosen rtol (it is {module.rtol:g}) and atol ({module.atol:g}), or make the field smoother."
        )
        return math.inf, Finding(block, "stiff", text, looser, {})
    return float(evaluations), Finding(
        block,
        "stiff",
        f"Its mode λ = {eigenvalue:.4g} decays within {-1 / eigenvalue:.2g} of {span:.3g} and holds "
        f"{module.solver}'s "
        f"steps short: " + ("it gave up." if failed else f"{evaluations:,} evaluations."),
        stiff_advice(-eigenvalue * span),
        {"eigenvalue": eigenvalue, "evaluations": float(evaluations), "span": span},
    )


_BOUND = "End the interval before that time, or bound the field, as by a tanh behind its last layer."


def stiff_advice(stiffness: float) -> str:
    """The method to take for |λ|·T = stiffness, and what it costs."""
    # rkl2's interval is (s² + s − 2)/2, and only odd s damp; a twentieth more, because λ is an estimate
    stages = math.ceil(math.sqrt(2.25 + 2.1 * stiffness / _RKL_STEPS) - 0.5)
    stages = max(3, stages + (stages % 2 == 0))
    return (
        f"Take solver='rkl2_{stages}', a stabilised method, with {_RKL_STEPS} steps (n_steps, or substeps of "
        f"a stack): {_RKL_STEPS * stages:,} evaluations; or an implicit one, whose few steps each solve a "
        "system."
    )


def _field_of(module: Any, index: int, x: Tensor) -> tuple[Field, float]:
    """F of a block, of the state alone, and the depth time that it takes."""
    if isinstance(module, ResidualStack):
        return with_step(module, index, x)
    start, end = module.t
    func = copy.deepcopy(module.func)
    func = func.double() if isinstance(func, nn.Module) else func
    sign = 1.0 if end > start else -1.0
    return (lambda y: sign * func(torch.tensor(start, dtype=torch.float64), y)), abs(end - start)
