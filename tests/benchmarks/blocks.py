"""Convergence in depth, a thousand blocks, cost and memory: python -m tests.benchmarks.blocks [--write].

With --write the tables go to docs/blocks.md, which holds nothing else.
"""

import argparse
import copy
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from resode import METHODS, ResidualStack, odeint
from resode.analysis import count
from resode.fields import AntisymmetricField, HamiltonianField, ParabolicField
from resode.networks import build

PAGE = Path(__file__).parents[2] / "docs" / "blocks.md"
SOLVERS = ("euler", "midpoint", "heun2", "kutta3", "rk4")
WIDTH, DEPTH_TIME = 4, 2.0


# Convergence in depth: the error in the state at the depth time 2, as the depth L grows and η = 2 / L.


def field(activation: type[nn.Module], seed: int = 0) -> nn.Sequential:
    """Two layers, of a few units of strength, in float64."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(WIDTH, 8), activation(), nn.Linear(8, WIDTH)).double()
    with torch.no_grad():
        for p in layers.parameters():
            p *= 1.5
    return layers


def states() -> Tensor:
    """Eight states."""
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def slope(stacks: dict[int, ResidualStack], solver: str, exact: Tensor) -> float:
    """−d log error / d log depth between the first and the last depth."""
    errors = {}
    for depth, stack in stacks.items():
        stack.solver, stack.substeps = solver, 1
        errors[depth] = float((stack(states()) - exact).norm())
    (first, e), (last, f) = min(errors.items()), max(errors.items())
    return math.log(e / f) / math.log(last / first)


@torch.no_grad()
def finely(stack: ResidualStack, steps: int = 8192) -> Tensor:
    """What the stack's own equation gives, by rk4 with many steps."""
    stack = copy.deepcopy(stack)
    stack.solver, stack.substeps = "rk4", steps // stack.depth
    return stack(states())


def shared(activation: type[nn.Module], depths: Sequence[int]) -> Callable[[str], float]:
    """One field for all blocks."""
    stacks = {L: ResidualStack(field(activation), depth=L, step_size=DEPTH_TIME / L) for L in depths}
    exact = finely(stacks[depths[-1]])
    return lambda solver: slope(stacks, solver, exact)


def refined(weights: str, depths: Sequence[int], blocks: int = 4) -> Callable[[str], float]:
    """A stack of four blocks of their own, refined again and again (claim C7)."""
    stack = ResidualStack(
        [field(nn.Tanh, seed) for seed in range(blocks)], step_size=DEPTH_TIME / blocks, weights=weights
    )
    stacks = {L: stack.refine(L // blocks) for L in depths}
    exact = finely(stack)
    return lambda solver: slope(stacks, solver, exact)


def theta(start: Sequence[Tensor], end: Sequence[Tensor], t: float) -> list[Tensor]:
    """Weights that change smoothly with the depth time."""
    return [a + math.sin(1.5 * t) * b for a, b in zip(start, end, strict=True)]


def sampled(weights: str, depths: Sequence[int]) -> Callable[[str], float]:
    """A smooth θ(t), sampled at every block's start: the stack's own equation differs from the limit's."""
    one, other = (list(field(nn.Tanh, seed).parameters()) for seed in (0, 1))
    stacks = {}
    for L in depths:
        fields = [field(nn.Tanh) for _ in range(L)]
        for index, block in enumerate(fields):
            with torch.no_grad():
                for p, value in zip(
                    block.parameters(), theta(one, other, index * DEPTH_TIME / L), strict=True
                ):
                    p.copy_(value)
        stacks[L] = ResidualStack(fields, step_size=DEPTH_TIME / L, weights=weights)
    template = field(nn.Tanh)
    names = [name for name, _ in template.named_parameters()]

    def flow(t: Tensor, x: Tensor) -> Tensor:
        values = dict(zip(names, theta(one, other, float(t)), strict=True))
        return torch.func.functional_call(template, values, (x,))

    with torch.no_grad():
        times = torch.tensor([0.0, DEPTH_TIME], dtype=torch.float64)
        exact = odeint(flow, states(), times, method="rk4", n_steps=2000)[-1]
    return lambda solver: slope(stacks, solver, exact)


CASES: dict[str, tuple[Callable[[Sequence[int]], Callable[[str], float]], str]] = {
    "shared smooth field (tanh)": (lambda depths: shared(nn.Tanh, depths), "the solver's order"),
    'refined, weights "constant"': (lambda depths: refined("constant", depths), "the solver's order"),
    'refined, weights "linear"': (lambda depths: refined("linear", depths), "the solver's order"),
    'sampled θ(t), weights "constant"': (lambda depths: sampled("constant", depths), "1"),
    'sampled θ(t), weights "linear"': (lambda depths: sampled("linear", depths), "at most 2"),
    "shared ReLU field": (lambda depths: shared(nn.ReLU, depths), "limited by the kinks"),
}


# A thousand blocks, 64 wide, each with weights of its own, η = 0.2, small states.

BLOCKS, WIDE, STEP, SCALE = 1000, 64, 0.2, 0.1


class Plain(nn.Module):
    """A layer without shortcut, relu(Wx), with W's variance gain² · 2 / width."""

    def __init__(self, gain: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDE, WIDE) * gain * math.sqrt(2 / WIDE))

    def forward(self, x: Tensor) -> Tensor:
        """relu(Wx)."""
        return torch.relu(x @ self.weight.T)


def stack_of(make: Callable[[], nn.Module], solver: str = "euler") -> nn.Module:
    return ResidualStack([make() for _ in range(BLOCKS)], step_size=STEP, solver=solver)


def plain_of(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(*(make() for _ in range(BLOCKS)))


DEEP: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "antisymmetric, γ = 0, rk4": (lambda: stack_of(lambda: AntisymmetricField(WIDE), "rk4"), "kept"),
    "Hamiltonian, leapfrog": (lambda: stack_of(lambda: HamiltonianField(WIDE, leapfrog=STEP)), "kept"),
    "Hamiltonian, rk4": (lambda: stack_of(lambda: HamiltonianField(WIDE), "rk4"), "kept"),
    "parabolic, Euler": (lambda: stack_of(lambda: ParabolicField(WIDE)), "never grows"),
    "antisymmetric, γ = 0.3, Euler": (
        lambda: stack_of(lambda: AntisymmetricField(WIDE, gamma=0.3)),
        "never grows",
    ),
    "antisymmetric, γ = 0.3, rk4": (
        lambda: stack_of(lambda: AntisymmetricField(WIDE, gamma=0.3), "rk4"),
        "never grows",
    ),
    "antisymmetric, γ = 0, Euler": (lambda: stack_of(lambda: AntisymmetricField(WIDE)), "grows"),
    "plain relu layers, gain 0.9": (lambda: plain_of(lambda: Plain(0.9)), "vanishes"),
    "plain relu layers, gain 1 (He)": (lambda: plain_of(lambda: Plain(1.0)), "vanishes"),
    "plain relu layers, gain 1.1": (lambda: plain_of(lambda: Plain(1.1)), "explodes"),
    "the antisymmetric fields as plain layers": (
        lambda: plain_of(lambda: AntisymmetricField(WIDE)),
        "vanishes",
    ),
}


def through(model: nn.Module, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Least and largest of ‖x_L‖/‖x_0‖ and of ‖gradient in‖/‖gradient out‖ over 32 samples, in float64.

    `step`: of ‖x_{l+1}‖/‖x_l‖ over the blocks too.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    x, g = (torch.randn(32, WIDE, generator=generator, dtype=torch.float64) for _ in range(2))
    path = [(SCALE * x).requires_grad_()]
    if isinstance(model, ResidualStack):
        y, states = model(path[0], return_path=True)
        path += states[1:]
    else:
        for layer in model.children():
            path.append(layer(path[-1]))
        y = path[-1]
    (back,) = torch.autograd.grad(y, path[0], g)
    norms = torch.stack([state.detach().norm(dim=1) for state in path])
    ratios = {
        "state": norms[-1] / norms[0],
        "gradient": back.norm(dim=1) / g.norm(dim=1),
        "step": norms[1:] / norms[:-1],
    }
    return {name: (float(r.min()), float(r.max())) for name, r in ratios.items()}


@torch.no_grad()
def euler_limit(gamma: float, blocks: Sequence[nn.Module]) -> float:
    """η < 2γ / (γ² + ‖K − Kᵀ‖²) for every block: |1 + ηd(−γ ± iω)| < 1 for all slopes 0 < d ≤ 1."""
    norms = [torch.linalg.matrix_norm(m.weight - m.weight.T, 2) for m in blocks]
    return min(2 * gamma / (gamma**2 + float(norm) ** 2) for norm in norms)


COSTED = {
    **{f"resnet{depth}": 32 for depth in (20, 32, 44, 56, 110, 1202)},
    **dict.fromkeys(("preact164", "preact1001", "wide_resnet28_10", "highway19", "odenet20"), 32),
    **{f"resnet{depth}": 224 for depth in (18, 34, 50, 101, 152)},
}


def tables() -> str:
    lines = [
        "# Blocks: convergence in depth, a thousand layers, cost",
        "",
        "Written by `python -m tests.benchmarks.blocks --write`; float64, on the CPU, "
        f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}. "
        "But for memory and time the figures depend on the seeds, hardly on the machine.",
        "",
        "## Convergence in depth",
        "",
        "The error of the last state against the limit of infinite depth falls as depth^(−slope), at a depth "
        f"time of {DEPTH_TIME:g}; slopes between depths 32 and 256. A refined stack (`refine`) "
        "and a shared field keep the solver's order; sampling a smooth θ(t) block by block loses it, because "
        "the weights then lie off by O(η) (constant) or O(η²) (linear), whatever the solver. ReLU's kinks "
        "limit the order too.",
        "",
        "| field and weights | expected | " + " | ".join(f"{s} ({METHODS[s].order})" for s in SOLVERS) + " |",
        "| --- | --- |" + " --- |" * len(SOLVERS),
    ]
    for name, (case, expected) in CASES.items():
        measured = case((32, 64, 128, 256))
        lines.append(f"| {name} | {expected} | " + " | ".join(f"{measured(s):.2f}" for s in SOLVERS) + " |")
    torch.manual_seed(0)
    damped = [AntisymmetricField(WIDE, gamma=0.3) for _ in range(BLOCKS)]
    lines += [
        "",
        "## A thousand blocks",
        "",
        f"{BLOCKS:,} blocks, {WIDE} wide, each with weights of its own as they start, η = {STEP:g}, tanh; 32 "
        f"states with entries of standard deviation {SCALE:g}, least and largest ratio over them: of the state's norm at the end "
        "to that at the start, and of the gradient's norm at the input to that at the output. In the last "
        "column the largest growth of a state in any one block. Euler's limit for γ = 0.3 is "
        f"η = {euler_limit(0.3, damped):.3f}.",
        "",
        "| blocks | expected | state | gradient | largest in one block |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (make, expected) in DEEP.items():
        torch.manual_seed(0)
        ratios = through(make())
        cells = [f"{low:.2g} to {high:.2g}" for low, high in (ratios["state"], ratios["gradient"])]
        lines.append(f"| {name} | {expected} | {' | '.join(cells)} | {ratios['step'][1]:.4f} |")
    lines += [
        "",
        "## Cost",
        "",
        "Parameters and multiply-adds of one image, by formula (`model.cost(shape)`) and by counting "
        "(`resode.analysis.count`), which agree; convolutions and linear layers alone are counted.",
        "",
        "| network | image | parameters | multiply-adds, 10⁶ |",
        "| --- | --- | --- | --- |",
    ]
    for name, size in COSTED.items():
        with torch.device("meta"):
            model = build(name)
            cost = count(model, torch.zeros(1, 3, size, size))
            assert model.cost((3, size, size)) == cost
        lines.append(f"| {name} | {size}×{size} | {cost.parameters:,} | {cost.macs / 1e6:,.2f} |")
    seconds, peak = deep_step()
    lines += [
        "",
        "## Memory",
        "",
        'One training step of resnet1202 with `gradient="checkpoint"`, batch 64 of 32×32, float32, one thread: '
        f"{peak:.2f} GB at the peak of the whole process, {seconds:.0f} s ({processor()}).",
    ]
    return "\n".join(lines) + "\n"


STEP_OF_1202 = """
import resource, time, torch
from resode.networks import build
torch.manual_seed(0), torch.set_num_threads(1)
model = build("resnet1202", gradient="checkpoint")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
start = time.perf_counter()
torch.nn.functional.cross_entropy(model(torch.randn(64, 3, 32, 32)), torch.randint(10, (64,))).backward()
optimizer.step()
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


def deep_step() -> tuple[float, float]:
    """Seconds and peak GB of a training step of resnet1202, batch 64, in a process of its own (Linux)."""
    done = subprocess.run([sys.executable, "-c", STEP_OF_1202], check=True, capture_output=True, text=True)
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def processor() -> str:
    """The processor's name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    text = tables()
    if parser.parse_args().write:
        PAGE.write_text(text, encoding="utf-8")
    print(text)
