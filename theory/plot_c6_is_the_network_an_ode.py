r"""
C6 · Is the network an ODE?
===========================

**Claim.** A stack can always be *written* as a discretized ODE. It *behaves* as one only if its function does
not depend on how the equation is solved: swapping the solver or shortening the step must keep its accuracy,

.. math:: \mathrm{accuracy}(\text{solver}', \eta') \approx \mathrm{accuracy}(\text{solver}, \eta)
          \quad \text{for every finer one.}

Each trained network has a critical step: the largest at which a solver, as at all shorter steps, keeps it.

**Assumptions.** The weights stay as they are. Statistics of batch norm belong to the solver that they were
measured under; a swap of a network that has them is compared with and without measuring them again.

**Not claimed.** The popular form, "a residual network is an ODE". The counterexample is the network trained
with Euler at η = 2 below: solved more accurately it gets worse, because it has learnt Euler's error. The same
blocks trained with RK4 keep their accuracy under every finer solver, and so does Euler at a quarter of the
step. Nor is a kept accuracy a kept function: the logits of both move by some percent.

**Source.** Ott, Katiyar, Hennig & Tiemann, *ResNet after all? Neural ODEs and their numerical solution*
(2021), arXiv:2007.15386.

**The picture** shows accuracy over solver and step of three networks on the digits, and below it, where their
tables are stored, that of ODE-ResNets of 20 layers on CIFAR-10 trained with Euler and with RK4: of these the
latter alone keeps its accuracy.
"""

# %%
# **Set-up.** Residual perceptrons with ReLU over the same depth time, 8: four blocks of η = 2, or sixteen of
# η = 1/2.

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import resode
import theory
from resode.networks import build
from resode.training.data.datasets import load_data
from theory.seeds import shifted
from theory.verdict import FAST, agree, at_least, at_most

data = load_data("digits")


def vectors(images):
    return (images.flatten(1).float() / 255 - 0.3) / 0.37


x, y = vectors(data.train_images), data.train_labels
test = [(vectors(data.test_images), data.test_labels)]


def trained(depth, solver, seed):
    """A perceptron trained with Adam."""
    torch.manual_seed(shifted(seed))
    options = {"in_features": 64, "width": 32, "solver": solver, "step_size": 8 / depth}
    network, generator = (
        build(f"residual_mlp{depth}", **options),
        torch.Generator().manual_seed(shifted(seed)),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(6 if FAST else 15):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    return network.eval()


# %%
# **Prediction.** Finer solvers keep the accuracy of what was trained with a small error, and lose that of
# what was trained with a large one. F is evaluated as often as blocks, substeps and stages say.

stages = {"euler": 1, "midpoint": 2, "rk4": 4}
tolerance = 0.03  # eleven of the 360 test images

# %%
# **Measurement.** The same weights under other solvers and steps, for several networks of each kind:
# accuracies are means over them.

seeds = 5


def mean_report(found):
    """One report with the mean of every figure."""
    rows = []
    for row, *others in zip(*(report.rows for report in found), strict=True):
        mean = {
            name: sum(getattr(other, name) for other in (row, *others)) / len(found)
            for name in ("accuracy", "logit_drift", "nfe")
        }
        rows.append(dataclasses.replace(row, **mean))
    return resode.SwapReport(rows)


runs = {"Euler, η = 2": (4, "euler"), "RK4, η = 2": (4, "rk4"), "Euler, η = 1/2": (16, "euler")}
reports, by_hand = {}, {}
for name, (depth, solver) in runs.items():
    found, own = [], []
    for seed in range(seeds):
        network = trained(depth, solver, seed)
        found.append(resode.swap_report(network, test, solvers=(*stages, "dopri5"), substeps=(1, 2, 4, 8)))
        with torch.no_grad():  # also that the report puts the network's own solver back
            own.append(float((network(test[0][0]).argmax(1) == test[0][1]).double().mean()))
    reports[name], by_hand[name] = mean_report(found), sum(own) / seeds
    steps = reports[name].critical_steps(tolerance)
    print(f"trained with {name}, mean of {seeds}\n{reports[name]}\ncritical steps: {steps}\n")


def accuracy(name, solver, substeps):
    rows = reports[name].rows
    return next(row.accuracy for row in rows if (row.solver, row.substeps) == (solver, substeps))


# %%
# CIFAR-10 takes hours, so its tables are stored. Finer means more evaluations of F than as trained.

folder = Path(theory.__file__).parents[1] / "docs" / "results"
stored = {}
for solver, epochs in (("euler", 15), ("rk4", 4)):
    path = folder / f"swap-odenet20-{solver}.csv"
    if path.exists():
        stored[f"odenet20 on CIFAR-10, {solver}"] = report = resode.SwapReport.from_csv(path)
        print(f"odenet20 on CIFAR-10, trained with {solver}\n{report}")
        print(f"critical steps: {report.critical_steps(0.01)}\n")
    else:
        print(
            f"odenet20 on CIFAR-10, trained with {solver}: not measured. These commands do:\n"
            f"  resode train --model odenet20 --solver {solver} --data cifar10 --data-dir PATH --recipe fast "
            f"--epochs {epochs} --run-dir runs/{solver}\n"
            f"  resode swap runs/{solver} --limit 5000 --recalibrate --calibration-images 1000\n"
            f"  cp runs/{solver}/figures/swap.csv docs/results/{path.name}\n"
        )

# %%
# **Figure.**

panels = {f"Digits, trained with {name}": report for name, report in reports.items()}
panels |= {f"{name}\n(dashed: recalibrated)": report for name, report in stored.items()}
rows = 2 if stored else 1
figure, axes = plt.subplots(
    rows, 3, figsize=(13, 4 * rows), layout="constrained", squeeze=False, sharey="row"
)
for ax in axes.flat[len(panels) :]:
    ax.set_axis_off()
for ax, (title, report) in zip(axes.flat, panels.items(), strict=False):
    for solver in stages:
        line = [row for row in report.rows if row.solver == solver]
        steps = [row.step_size for row in line]
        [curve] = ax.plot(steps, [100 * row.accuracy for row in line], "o-", label=solver)
        if line[0].accuracy_recalibrated is not None:
            again = [100 * row.accuracy_recalibrated for row in line]
            ax.plot(steps, again, ".--", color=curve.get_color())
    for row in report.rows:
        if row.as_trained:
            ax.plot(
                row.step_size, 100 * row.accuracy, "ko", markersize=12, fillstyle="none", label="as trained"
            )
        if row.step_size is None:
            ax.axhline(100 * row.accuracy, color="black", linestyle=":", label=f"{row.solver}, adaptive")
    ax.set(title=title, xlabel="solver's step", ylabel="test accuracy, %")
    ax.set_xscale("log", base=2)
    ax.legend(fontsize=8)

# %%
# **Verdict.** 3 % are eleven of the 360 test images. What Euler's network loses differs by 0.06 to 0.09 from
# network to network, and what the others lose by 0.007, so that the means lie three of their standard errors
# and more away from the bound. On CIFAR-10 half a percent are 25 of 5,000 images. What makes the difference
# there is the solver that was trained with: RK4's step was already near the flow, which finer solvers only
# confirm; Euler's error was part of what was learnt (the one was trained for 4 epochs, the other for 15;
# after 5 Euler's loses 17 points too). The statistics of batch norm are another matter: they are kept of the
# first stage, and RK4's other stages meet other states. That costs RK4 and all that is finer alike, and
# recalibration gives it back.

for name, report in reports.items():
    depth, solver = runs[name]
    wrong = max(
        abs(row.nfe - depth * row.substeps * stages[row.solver]) for row in report.rows if row.substeps
    )
    agree(f"{name}: F evaluations, worst difference from blocks · substeps · stages", 0, wrong)
    own = accuracy(name, solver, 1)
    agree(f"{name}: accuracy as trained, of the networks themselves", by_hand[name], own, atol=1e-12)
    at_least(f"{name}: accuracy as trained", 0.9, accuracy(name, solver, 1))
coarse, exact, short = runs
for solver, substeps in (("euler", 8), ("rk4", 1), ("rk4", 8), ("dopri5", None)):
    where = f"{solver}, {'adaptive' if substeps is None else f'η/{substeps}'}"
    lost = accuracy(coarse, "euler", 1) - accuracy(coarse, solver, substeps)
    at_least(f"trained with {coarse}: accuracy lost under {where}", tolerance, lost)
for solver, substeps in (("midpoint", 8), ("rk4", 2), ("rk4", 8), ("dopri5", None)):
    where = f"{solver}, {'adaptive' if substeps is None else f'η/{substeps}'}"
    at_most(
        f"trained with {exact}: lost under {where}",
        tolerance,
        accuracy(exact, "rk4", 1) - accuracy(exact, solver, substeps),
    )
    at_most(
        f"trained with {short}: lost under {where}",
        tolerance,
        accuracy(short, "euler", 1) - accuracy(short, solver, substeps),
    )
critical = {name: report.critical_steps(tolerance) for name, report in reports.items()}
agree(f"critical step of RK4, trained with {coarse}: at none is it an ODE", 0.0, critical[coarse]["rk4"])
agree(f"critical step of RK4, trained with {exact}: as trained", 2.0, critical[exact]["rk4"])
at_most(f"critical step of Euler, trained with {exact}: below 2", 1.0, critical[exact]["euler"])
for name, report in stored.items():
    trained_row = next(row for row in report.rows if row.as_trained)
    agree(f"{name}: F evaluations as trained, 7 blocks", 7 * stages[trained_row.solver], trained_row.nfe)
    lost = max(trained_row.accuracy - row.accuracy for row in report.rows if row.nfe > trained_row.nfe)
    if trained_row.solver == "rk4":
        at_most(f"{name}: accuracy lost under every finer solver", 0.005, lost)
    else:
        at_least(f"{name}: accuracy lost under the worst finer solver", 0.05, lost)
