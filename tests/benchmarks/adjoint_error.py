"""How wrong the adjoint's gradient is by tolerance: `python -m tests.benchmarks.adjoint_error [--write]`."""

import re
import sys
from pathlib import Path

import torch
from torch import nn

from resode import odeint

PAGE = Path(__file__).parents[2] / "docs" / "speed.md"


class Field(nn.Module):
    """A stiff-ish field of a trained network's size of slopes: σ(W) up to 4."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)).double()

    def forward(self, t, y):
        return 4 * self.net(y) - y


def gradient(field: Field, gradient: str, tol: float) -> torch.Tensor:
    y0, t = (
        torch.ones(16, 8, dtype=torch.float64) * torch.linspace(-1, 1, 16).double()[:, None],
        torch.tensor([0.0, 1.0]),
    )
    y = odeint(field, y0, t, gradient=gradient, rtol=tol, atol=tol)
    return torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(y[-1].square().sum(), list(field.parameters()))]
    )


def table() -> str:
    torch.manual_seed(0)
    field = Field()
    exact = gradient(field, "autograd", 1e-10)
    text = "| tolerance | adjoint | autograd | checkpoint |\n|---|---|---|---|\n"
    for tol in (1e-2, 1e-3, 1e-4, 1e-6, 1e-8):
        errors = [gradient(field, kind, tol) - exact for kind in ("adjoint", "autograd", "checkpoint")]
        text += (
            f"| {tol:.0e} | " + " | ".join(f"{float(e.norm() / exact.norm()):.1e}" for e in errors) + " |\n"
        )
    return text


if __name__ == "__main__":
    found = table()
    print(found)
    if "--write" in sys.argv:
        page = PAGE.read_text()
        page = re.sub(
            r"(<!-- adjoint -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}\n{found}\n{m[2]}", page, flags=re.S
        )
        PAGE.write_text(page)
