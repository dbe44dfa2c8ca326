"""Rows of training, run folders, data and figures."""

from __future__ import annotations

import functools
import math
import pickle
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import resode
from trust.rows import RECORDS, Case, Variant, row

OPTIONS = {"model_options": {"width": 2, "norm": "group"}, "progress": False}


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    """Kept while the process lives."""
    return tempfile.TemporaryDirectory()


def fresh() -> str:
    return tempfile.mkdtemp(dir=folder().name) + "/run"


@functools.cache
def finished(seed: int = 0) -> Path:
    """A small run that calls read and leave alone."""
    from resode.training.run import train

    return train("odenet8", "digits", "smoke", updates=2, seed=seed, run_dir=fresh(), **OPTIONS).path


@functools.cache
def digits():
    from resode.training.data import load_data

    return load_data("digits")


@row("resode.train", slow=True)
def _(v: Variant) -> Case:
    def law(run):
        assert run.path.is_dir() and len(run.metrics["train_loss"]) == 1
        assert set(run.network.state_dict()) == set(resode.load(run.path).state_dict())

    call = {"model": "odenet8", "data": "digits", "recipe": "smoke", "run_dir": fresh(), **OPTIONS}
    return Case(call | {"updates": 1}, law)


@row("resode.load")
def _(v: Variant) -> Case:
    def law(network):
        assert not network.training and network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)

    return Case({"run": finished()}, law)


@row("resode.compare")
def _(v: Variant) -> Case:
    def law(found):
        (one,) = found.rows
        assert len(one.runs) == 2 and one.test_error.std >= 0 and str(found)

    return Case({"runs": [finished(0), finished(1)]}, law)


@row("resode.training.evaluate.evaluate")
def _(v: Variant) -> Case:
    def law(score):
        assert score.images == 360 and 0 <= score.accuracy <= 1 and math.isfinite(score.loss)

    return Case({"run": finished()}, law)


@row("resode.training.evaluate.calibration_batches")
def _(v: Variant) -> Case:
    def law(batches):
        assert [len(labels) for _, labels in batches] == [350, 350]

    return Case({"data": digits(), "count": 700}, law)


@row("resode.training.evaluate.score")
def _(v: Variant) -> Case:
    network = v.network()
    x, y = v.tensor(5, v.size).detach(), torch.arange(5) % 3

    def law(score):
        network.eval()
        assert score.images == 5 and score.accuracy == int((network(x).argmax(1) == y).sum()) / 5

    return Case({"network": network, "batches": [(x, y)]}, law)


@row("resode.training.fit.fit")
def _(v: Variant) -> Case:
    x = torch.tensor([[0.0], [1.0], [2.0]], dtype=v.dtype)
    model = nn.Linear(1, 1).to(v.dtype)

    def law(losses):
        assert losses.shape == (20,) and not losses.requires_grad
        v.close(model.weight, [[3.0]], 1e4)

    call = {"model": model, "x": x, "target": 3 * x - 1, "steps": 20, "method": "lbfgs"}
    return Case(call, law, changes=("model",))


@row("resode.training.predict.predict")
def _(v: Variant) -> Case:
    def law(found):
        assert [one.image for one in found.rows] == ["[0]", "[1]"]
        assert all(sum(one.probabilities) <= 1 + 1e-6 for one in found.rows)

    return Case({"run": finished(), "images": np.zeros((2, 8, 8), np.uint8)}, law)


@row("resode.training.report.write_report", slow=True)
def _(v: Variant) -> Case:
    def law(path):
        assert path.read_text(encoding="utf-8").startswith("<!doctype html>")

    return Case({"run": finished(), "path": Path(fresh() + ".html"), "samples": 4}, law)


@row("resode.training.recipe.make_recipe")
def _(v: Variant) -> Case:
    def law(recipe):
        assert recipe.epochs == 3 and recipe.lr == 0.5

    return Case({"base": "fast", "epochs": 3, "lr": 0.5}, law)


@row("resode.training.recipe.Recipe")
def _(v: Variant) -> Case:
    def law(recipe):
        assert recipe.learning_rate(0, 10) <= 0.5

    return Case({"epochs": 3, "lr": 0.5}, law)


@row("resode.training.refining.refinable")
def _(v: Variant) -> Case:
    network = v.network()

    def law(found):
        assert [type(one).__name__ for one in found] == ["ResidualStack"]

    return Case({"network": network}, law)


@row("resode.training.refining.refine")
def _(v: Variant) -> Case:
    network = v.network()

    def law(_):
        assert network[0].depth == 12 and network[0].step_size == 0.05

    return Case({"network": network, "times": 2}, law, changes=("network",))


@row("resode.training.refining.refined_momentum")
def _(v: Variant) -> Case:
    """With all momenta 1, the refined momenta of blocks are copies."""
    network = v.network()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)

    def law(moved):
        assert moved[0].depth == 6
        for value in moved.parameters():
            v.close(value, torch.ones_like(value))

    return Case({"network": network, "optimizer": optimizer}, law)


@row("resode.training.divergence.why_diverged")
def _(v: Variant) -> Case:
    field = nn.Linear(8, 8, bias=False)
    field.weight.data.copy_(-20 * torch.eye(8))
    network = resode.ResidualStack(field, depth=4, step_size=0.5).to(v.dtype)

    def law(found):
        assert v.dtype.is_complex or found.cause == "overstep"

    call = {
        "network": network,
        "state": dict(network.state_dict()),
        "images": torch.ones(2, 8, dtype=v.dtype),
    }
    return Case(call | {"labels": torch.tensor([0, 1]), "lr": 0.1}, law)


@row("resode.training.monitor.StepLimits")
def _(v: Variant) -> Case:
    stack = v.module(resode.ResidualStack([nn.Linear(4, 4)], solver="rk4"))

    def law(watch):
        watch.record(stack, update=0)
        assert watch.records[0].solver == "rk4"

    return Case({"images": v.tensor(2, 4).detach()}, law)


@row("resode.training.data.load_data")
def _(v: Variant) -> Case:
    def law(data):
        assert data.checksum() == digits().checksum()

    return Case({"name": "digits"}, law)


@row("resode.training.data.Batches")
def _(v: Variant) -> Case:
    data = digits()

    def law(batches):
        again = [x for x, _ in batches]
        assert all(torch.equal(x, y) for x, (y, _) in zip(again, batches, strict=True))

    call = {"images": data.train_images[:30], "labels": data.train_labels[:30], "batch_size": 8}
    return Case(call | {"mean": data.mean, "std": data.std, "train": True, "crop_padding": 1}, law)


@row("resode.training.data.ImageData")
def _(v: Variant) -> Case:
    data = digits()
    names = "name title train_images train_labels test_images test_labels classes mean std".split()

    def law(made):
        assert made.checksum() == data.checksum()

    return Case({name: getattr(data, name) for name in names}, law)


@row("resode.training.processes.Processes", hostile=False)
def _(v: Variant) -> Case:
    def law(alone):
        assert alone.size == 1 and alone.rank == 0

    return Case({}, law)


@row("resode.training.processes.synchronise_norms")
def _(v: Variant) -> Case:
    network = v.module(nn.Sequential(nn.Linear(v.size, v.size), nn.BatchNorm1d(v.size)))

    def law(undo):
        undo()
        assert "forward" not in vars(network[1])

    return Case({"network": network}, law, changes=("network",))


def message_row(name: str, **arguments) -> None:
    @row(name, hostile=False)
    def _(v: Variant) -> Case:
        """An error that crosses processes says the same there."""

        def law(error):
            assert str(pickle.loads(pickle.dumps(error))) == str(error)

        return Case(arguments, law)


message_row("resode.training.processes.FailedElsewhere", message="the disk is full", exit_code=1)
message_row("resode.training.processes.LostProcess", error=RuntimeError("Connection closed by peer"))


# Figures


def drawn(figure) -> None:
    import matplotlib.pyplot as plt

    figure = getattr(figure, "figure", figure)
    figure.canvas.draw()
    plt.close(figure)


def figure_row(name: str, make, **arguments) -> None:
    @row(f"resode.plots.{name}")
    def _(v: Variant) -> Case:
        """It can be drawn."""
        return Case({**arguments, **make()}, drawn)


def profile():
    v = Variant()
    return resode.profile_depth(v.network(), v.tensor(2, 4), torch.tensor([0, 1]))


def stack_records():
    v = Variant()
    watch = resode.training.monitor.StepLimits(v.tensor(2, 4))
    watch.record(v.stack(), update=0)
    watch.record(v.stack(), update=5)
    return watch.records


def swapped():
    v = Variant()
    return resode.swap_report(v.network(), [(v.tensor(6, 4), torch.arange(6) % 3)], ["euler", "rk4"], [1])


def logistic(x):
    return x * (1 - x)


def orbits():
    return resode.analysis.bifurcation(logistic, torch.tensor([1.9, 2.2]).double(), 0.1, keep=4)


def growth():
    return resode.analysis.transient_growth([[-1.0, 10.0], [0.0, -2.0]], 0.1)


figure_row("stability_region", lambda: {"method_or_methods": "rk4", "eigenvalues": [-1.0 + 1j]})
figure_row("amplification", lambda: {"method_or_methods": ["euler", "rk4"]})
figure_row("transient_growth", lambda: {"growth": growth()})
figure_row("bifurcation", lambda: {"result": orbits()})
figure_row("training_curves", lambda: {"metrics": {"epoch": [1.0, 2.0], "train_loss": [1.0, 0.5], "test_accuracy": [0.5, 0.6], "train_accuracy": [0.5, 0.6], "lr": [0.1, 0.1]}})  # fmt: skip
figure_row("comparison", lambda: {"compared": resode.compare([finished(0), finished(1)])})
figure_row("swap_accuracy", lambda: {"report": swapped()})
figure_row("step_limits", lambda: {"records": stack_records()})
figure_row("cobweb", lambda: {"web": resode.analysis.cobweb(logistic, 0.1, 1.0, n_steps=3)})
figure_row(
    "phase_portrait", lambda: {"portrait": resode.analysis.phase_portrait(logistic, (-0.5, 1.5), points=11)}
)
figure_row("depth_profile", lambda: {"profile": profile()})
figure_row("block_gains", lambda: {"diagnosis": resode.diagnose(Variant().network(), Variant().tensor(2, 4))})


RECORDS |= {
    "resode.plots": "resode.plots.stability_region",
    "resode.plots.edge": "resode.plots.stability_region",
    "resode.plots.group_spectra": "resode.plots.stability_region",
    "resode.training.compare.ComparedRun": "resode.compare",
    "resode.training.compare.Spread": "resode.compare",
    "resode.training.compare.Configuration": "resode.compare",
    "resode.training.compare.Comparison": "resode.compare",
    "resode.training.data.DATASETS": "resode.training.data.load_data",
    "resode.training.data.DataError": "resode.training.data.load_data",
    "resode.training.evaluate.Score": "resode.training.evaluate.evaluate",
    "resode.training.monitor.Callback": "resode.train",
    "resode.training.monitor.GroupRecord": "resode.training.monitor.StepLimits",
    "resode.training.predict.Prediction": "resode.training.predict.predict",
    "resode.training.predict.Predictions": "resode.training.predict.predict",
    "resode.training.run.Run": "resode.train",
    "resode.training.run.Summary": "resode.train",
}
