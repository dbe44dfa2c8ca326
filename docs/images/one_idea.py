"""Draws docs/images/one_idea.png: `python docs/images/one_idea.py [PATH]`."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import resode


class Spiral(torch.nn.Module):
    """F(x) = A tanh(x), with eigenvalues −0.5 ± 2i at its fixed point 0."""

    def forward(self, x):
        """F(x), shape of x."""
        return torch.tanh(x) @ torch.tensor([[-0.5, 2.0], [-2.0, -0.5]], dtype=x.dtype)


field, x = Spiral(), torch.tensor([[1.2, 0.4]], dtype=torch.float64)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained", width_ratios=(1.15, 1))
for solver, step, colour, words in (
    ("dopri5", 0.02, "0.55", "the flow of dx/dt = F(x)"),
    ("euler", 0.1, "#0072B2", "Euler, η = 0.1: a ResNet inside the step limit"),
    ("euler", 0.4, "#D55E00", "Euler, η = 0.4: the same weights, outside the limit"),
    ("rk4", 0.4, "#E69F00", "RK4, η = 0.4: the same weights and step"),
):
    stack = resode.ResidualStack(field, depth=round(6 / step), solver=solver, step_size=step)
    path = stack(x, return_path=True)[1][:, 0]
    marker = "" if solver == "dopri5" else "o"
    left.plot(*path.T, color=colour, marker=marker, markersize=3.5, linewidth=1.3, label=words)
left.plot(0, 0, "k+", markersize=10)
left.set(xlabel="x₁", ylabel="x₂", aspect="equal", title="The state after each residual block")
left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, -0.46), frameon=False)
resode.plots.stability_region(["euler", "rk4"], [-0.5 + 2j, -0.5 - 2j], step_size=0.4, ax=right)
right.set_title("η = 0.4: ηλ is outside Euler's region, inside RK4's", fontsize=11)
path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".png")
figure.savefig(path, dpi=150)
