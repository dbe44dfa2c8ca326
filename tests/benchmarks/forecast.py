"""How well the forecast of a solver swap foretells what the swap loses, on networks that it was not fitted on.

    python -m tests.benchmarks.forecast --csv docs/results/swap-forecast.csv

trains small networks on the digits with many recipes (some minutes), swaps each one's solver, and prints for two
halves of them: the AUC of the drift for "loses more than 5 points of its recalibrated accuracy", how often "loses"
was said of a swap that lost less, and the table by verdict. The thresholds come from the clinic's networks.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import resode
from resode import ResidualStack, SwapProof, swap_report
from resode.fields import MLPField
from resode.training.data import load_data
from resode.training.evaluate import plain_batches

SWAPS = (("euler", 1), ("euler", 2), ("midpoint", 1), ("heun2", 1), ("rk4", 1), ("rk4", 2), ("dopri5", None))
LOST = 0.05

# (in the first half, kind, network options, recipe)
NETWORKS: list[tuple[bool, str, dict[str, Any], dict[str, Any]]] = [
    (True, "conv", {"width": 8}, {"epochs": 12, "seed": 0}),
    (True, "conv", {"width": 8}, {"epochs": 3, "seed": 1}),
    (True, "conv", {"width": 4}, {"epochs": 12, "seed": 2}),
    (True, "conv", {"width": 8, "norm": "group"}, {"epochs": 12, "seed": 3}),
    (True, "conv", {"width": 8, "solver": "rk4"}, {"epochs": 6, "seed": 4}),
    (True, "conv", {"width": 8, "solver": "midpoint"}, {"epochs": 8, "seed": 5}),
    (True, "conv", {"width": 8}, {"epochs": 8, "seed": 6, "swap_proof": True}),
    (True, "conv", {"width": 8}, {"epochs": 12, "seed": 7, "lr": 0.02}),
    (True, "mlp", {"step_size": 0.25}, {"seed": 8}),
    (True, "mlp", {"step_size": 1.0}, {"seed": 9}),
    (True, "mlp", {"step_size": 1.0, "proof": True}, {"seed": 10}),
    (True, "mlp", {"step_size": 0.05}, {"seed": 11}),
    (False, "conv", {"width": 8}, {"epochs": 16, "seed": 20}),
    (False, "conv", {"width": 12}, {"epochs": 6, "seed": 21, "schedule": "cosine", "lr": 0.1}),
    (False, "conv", {"width": 4}, {"epochs": 5, "seed": 22, "weight_decay": 5e-3}),
    (False, "conv", {"width": 6, "norm": "group"}, {"epochs": 8, "seed": 23}),
    (False, "conv", {"width": 8, "norm": "none"}, {"epochs": 8, "seed": 24, "lr": 0.02}),
    (False, "conv", {"width": 6, "solver": "heun2"}, {"epochs": 6, "seed": 25}),
    (False, "conv", {"width": 6, "solver": "rk4"}, {"epochs": 5, "seed": 26, "lr": 0.05}),
    (False, "conv", {"width": 6}, {"epochs": 10, "seed": 27, "swap_proof": True}),
    (False, "conv", {"width": 8}, {"epochs": 8, "seed": 28, "ema": 0.98}),
    (False, "conv", {"width": 8, "step_size": 0.5}, {"epochs": 8, "seed": 29}),
    (False, "mlp", {"step_size": 0.5}, {"seed": 30}),
    (False, "mlp", {"step_size": 1.0, "activation": "relu"}, {"seed": 31}),
    (False, "mlp", {"step_size": 0.5, "proof": True}, {"seed": 32}),
    (False, "mlp", {"step_size": 0.1, "activation": "relu"}, {"seed": 33}),
    (False, "converted", {"of": "resnet"}, {"seed": 40}),
    (False, "converted", {"of": "resnet", "lr": 1e-2}, {"seed": 41}),
    (False, "converted", {"of": "vit"}, {"seed": 42}),
    (False, "converted", {"of": "mlp"}, {"seed": 43}),
    (False, "converted", {"of": "mlp", "lr": 1e-2}, {"seed": 44}),
]


class PreActivation(nn.Module):
    """He et al. (2016b): x + conv(relu(bn(conv(relu(bn(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(torch.relu(self.norm1(x)))
        return x + self.conv2(torch.relu(self.norm2(h)))


class Transformer(nn.Module):
    """A block of a ViT: attention and a perceptron, each behind a layer norm and added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Perceptron(nn.Module):
    """x + W₂ relu(W₁ norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Mean(nn.Module):
    """Over the tokens, or the pixels, of (B, n, width) or (B, width, n, n)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1) if x.ndim == 3 else x.mean((2, 3))


class Tokens(nn.Module):
    """Sixteen patches of 2 × 2 pixels, with places: (B, 1, 8, 8) to (B, 16, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, stride=2)
        self.place = nn.Parameter(0.1 * torch.randn(16, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x).flatten(2).transpose(1, 2) + self.place


def converted(options: dict[str, Any], seed: int) -> nn.Module:
    """A network written without resode, trained for some seconds with Adam, then converted."""
    torch.manual_seed(seed)
    model = {
        "resnet": lambda: nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), *[PreActivation(12) for _ in range(4)],
            nn.BatchNorm2d(12), nn.ReLU(), Mean(), nn.Linear(12, 10),
        ),
        "vit": lambda: nn.Sequential(
            Tokens(24), *[Transformer(24) for _ in range(3)], nn.LayerNorm(24), Mean(), nn.Linear(24, 10)
        ),
        "mlp": lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), *[Perceptron(32) for _ in range(6)], nn.LayerNorm(32), nn.Linear(32, 10)
        ),
    }[options["of"]]()  # fmt: skip
    adam(model, options.get("lr", 3e-3), 400)
    model.eval()
    return resode.convert(model, next(iter(plain_batches(load_data("digits"))))[0][:4])


def perceptron(options: dict[str, Any], seed: int) -> nn.Module:
    """A residual perceptron of eight blocks on the digits' pixels, trained for some seconds with Adam."""
    torch.manual_seed(seed)
    options = dict(options)
    proof = options.pop("proof", False)
    fields = [MLPField(32, hidden=32, activation=options.get("activation", "tanh")) for _ in range(8)]
    stack = ResidualStack(fields, step_size=options["step_size"])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), stack, nn.Linear(32, 10))
    adam(model, 3e-3, 600, SwapProof(model, seed=seed) if proof else None)
    return model.eval()


def adam(model: nn.Module, lr: float, updates: int, draws: SwapProof | None = None) -> None:
    """Train on the digits, 128 at a time."""
    data = load_data("digits")
    optimizer = torch.optim.Adam(model.parameters(), lr)
    x = torch.cat([images for images, _ in plain_batches(data, "train")])
    y = data.train_labels
    for update in range(updates):
        rows = torch.randint(len(x), (128,))
        with nullcontext() if draws is None else draws.batch(update, updates):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def trained(kind: str, options: dict[str, Any], recipe: dict[str, Any]) -> nn.Module:
    """The network, in evaluation mode."""
    if kind == "mlp":
        return perceptron(options, recipe["seed"])
    if kind == "converted":
        return converted(options, recipe["seed"])
    with tempfile.TemporaryDirectory() as folder:
        run = resode.train(
            "odenet20",
            "digits",
            model_options=options,
            run_dir=Path(folder) / "run",
            progress=False,
            **recipe,
        )
    return run.network.eval()


def auc(scores: list[float], positive: list[bool]) -> float:
    """Share of pairs of a positive and a negative one that the scores order rightly; ties count half."""
    above = [(a > b) + 0.5 * (a == b) for a, p in zip(scores, positive, strict=True) if p
             for b, q in zip(scores, positive, strict=True) if not q]  # fmt: skip
    return sum(above) / len(above) if above else float("nan")


def swaps(network: nn.Module) -> list[dict[str, Any]]:
    """What each swap foretold and lost."""
    data = load_data("digits")
    batches = [(x, y) for x, y in plain_batches(data)]
    training = [(x, y) for x, y in plain_batches(data, "train", limit=500)]
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    found = []
    own = None
    for solver, n in (
        next((m.solver, m.substeps) for m in network.modules() if isinstance(m, ResidualStack)),
        *SWAPS,
    ):
        report = swap_report(network, batches, [solver], [n or 1], recalibrate=training if normed else False)
        row = report.rows[0]
        if own is None:
            own = row.kept
            continue
        if row.as_trained:
            continue
        drift = row.logit_drift if row.drift_recalibrated is None else row.drift_recalibrated
        found.append({
            "swap": f"{solver}x{n or 1}", "forecast": row.forecast, "drift": drift, "defect": row.defect,
            "drift_as_is": row.logit_drift, "lost": own - row.kept, "lost_as_is": own - row.accuracy,
        })  # fmt: skip
    return found


def summary(rows: list[dict[str, Any]]) -> str:
    """The figures of one half."""
    lost = [row["lost"] > LOST for row in rows]
    said = [row["forecast"] for row in rows]
    false = sum(s == "loses" and not bad for s, bad in zip(said, lost, strict=True))
    table = Counter((s, "loses" if bad else "keeps") for s, bad in zip(said, lost, strict=True))
    lines = [
        f"{len(rows)} swaps of {len({row['network'] for row in rows})} networks, {sum(lost)} lose more than 5 points",
        f"AUC of the drift {auc([row['drift'] for row in rows], lost):.3f}, of the worst block's defect "
        f"{auc([row['defect'] for row in rows], lost):.3f}",
        f"false 'loses': {false} of {lost.count(False)} swaps that lose less",
    ]
    for verdict in ("keeps", "may lose", "loses"):
        lines.append(
            f"  said {verdict:<9} {table[verdict, 'keeps']:4d} kept {table[verdict, 'loses']:4d} lost"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, help="where to write a line for each swap")
    arguments = parser.parse_args()
    rows = []
    for number, (first, kind, options, recipe) in enumerate(NETWORKS):
        settings = " ".join(f"{k}={v}" for k, v in {**options, **recipe}.items())
        for row in swaps(trained(kind, options, recipe)):
            rows.append(
                {"half": "first" if first else "second", "network": f"{number} {kind} {settings}", **row}
            )
        print(f"{number + 1} of {len(NETWORKS)}: {kind} {settings}: "
              + ", ".join(f"{r['swap']} {r['forecast']} {r['drift']:.3f} {100 * r['lost']:.1f}" for r in rows
                          if r["network"].startswith(f"{number} ")), flush=True)  # fmt: skip
    for half in ("first", "second"):
        print(f"\n{half}\n{summary([row for row in rows if row['half'] == half])}")
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
