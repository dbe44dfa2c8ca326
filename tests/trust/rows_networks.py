"""Rows of what asks whole networks: profiles, swaps, diagnosis, losses, cost."""

from __future__ import annotations

import math

import torch
from torch import nn

import resode
from trust.rows import RECORDS, Case, Variant, row


def asked(v: Variant, **more) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    return v.network(**more), v.tensor(v.batch, v.size), torch.arange(v.batch) % 3


@row("resode.profile_depth")
def _(v: Variant) -> Case:
    network, x, y = asked(v)

    def law(profile):
        assert len(profile.rows) == 3 and profile.samples == v.batch
        assert math.isfinite(profile.loss)
        for one in profile.rows:
            assert one.split_error < 100 * v.tolerance and one.solver == "euler" and one.step_size == 0.2

    return Case({"model": network, "x": x, "target": y}, law)


@row("resode.diagnose")
def _(v: Variant) -> Case:
    network, x, y = asked(v)

    def law(found):
        assert found.samples == v.batch and len(found.rows) == 3 and str(found)
        assert found.ok == (not found.findings)

    return Case({"model": network, "x": x, "target": y}, law)


@row("resode.analysis.forecast")
def _(v: Variant) -> Case:
    """The same method with the same steps loses nothing."""
    network, x, _ = asked(v)

    def law(found):
        assert found.verdict == "keeps" and found.drift == 0 and found.defect == 0

    return Case({"model": network, "x": x, "solver": "euler"}, law)


@row("resode.swap_report")
def _(v: Variant) -> Case:
    network, x, y = asked(v)

    def law(report):
        assert [r.nfe for r in report.rows] == [3.0, 12.0] and str(report)
        assert 0 <= report.rows[0].accuracy <= 1

    loader = [(x.detach(), y)]
    return Case({"model": network, "loader": loader, "solvers": ["euler", "rk4"], "substeps": [1]}, law)


@row("resode.convert")
def _(v: Variant) -> Case:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(v.size, v.size), nn.Tanh())

        def forward(self, x):
            return x + self.inner(x)

    network = v.module(nn.Sequential(nn.Linear(v.size, v.size), Block(), Block(), nn.Linear(v.size, 3)))
    x = v.tensor(v.batch, v.size)

    def law(converted):
        assert [stack.depth for stack in converted.stacks.values()] == [2]
        assert torch.equal(converted(x), network(x))

    return Case({"model": network, "x": x}, law)


@row("resode.SwapProof")
def _(v: Variant) -> Case:
    network, x, _ = asked(v)

    def law(proof):
        with proof.batch(3, 4):
            network(x.detach())
        stack = network[0]
        assert (stack.solver, stack.substeps) == ("euler", 1)

    return Case({"network": network}, law)


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).abs().square().mean()


def quadratic(v: Variant) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Linear least squares with inputs 1 and 2: L = 5/2 (w − 1)²."""
    model = nn.Linear(1, 1, bias=False).to(v.dtype)
    x = torch.tensor([[1.0], [2.0]], dtype=v.dtype)
    return model, (x, x)


@row("resode.max_learning_rate")
def _(v: Variant) -> Case:
    model, data = quadratic(v)
    return Case({"model": model, "loss_fn": loss, "data": data}, lambda found: v.close(found, 0.4, 10))


@row("resode.analysis.largest_hessian_eigenvalue")
def _(v: Variant) -> Case:
    model, data = quadratic(v)
    return Case({"model": model, "loss_fn": loss, "data": data}, lambda found: v.close(found, 5.0, 10))


@row("resode.analysis.count")
def _(v: Variant) -> Case:
    network, x, _ = asked(v)

    def law(cost):
        n = v.size
        assert cost.parameters == 3 * (n * n + n) + 3 * n + 3
        assert cost.macs == 3 * n * n + 3 * n

    return Case({"model": network, "x": x}, law)


@row("resode.analysis.lesion_study")
def _(v: Variant) -> Case:
    """Of a stack that doubles: without a block the output is half."""
    field = nn.Linear(1, 1, bias=False)
    nn.init.constant_(field.weight, 1.0)
    stack = resode.ResidualStack(field, depth=3).to(v.dtype).eval()

    def law(found):
        v.close([one.output_change for one in found], [0.5] * 3)

    return Case({"model": stack, "x": torch.ones(v.batch, 1, dtype=v.dtype)}, law)


@row("resode.analysis.reordering_study")
def _(v: Variant) -> Case:
    """Blocks of the same weights can be exchanged."""
    fields = [v.module(nn.Linear(v.size, v.size)) for _ in range(3)]  # of the same weights
    stack = resode.ResidualStack(fields, step_size=0.1).to(v.dtype).eval()

    def law(found):
        assert [(one.first, one.second) for one in found] == [(0, 1), (1, 2), (0, 2)]
        assert all(one.output_change == 0 for one in found)

    return Case({"model": stack, "x": v.tensor(v.batch, v.size)}, law)


@row("resode.analysis.step_scan")
def _(v: Variant) -> Case:
    field = nn.Linear(1, 1, bias=False)
    nn.init.constant_(field.weight, -1.0)
    stack = resode.ResidualStack(field, depth=4, step_size=0.5).to(v.dtype).eval()
    x = torch.ones(max(1, v.batch), 1, dtype=v.dtype)
    call = {"model": stack, "x": x, "target": torch.zeros_like(x), "factors": (1.0, 3.5, 4.5)}
    return Case(call, lambda found: v.close(found.critical_factor, 3.5))


@row("resode.analysis.loss_gradient_norms")
def _(v: Variant) -> Case:
    first, second = (nn.Linear(2, 2, bias=False) for _ in range(2))
    for layer in (first, second):
        layer.weight.data.copy_(2 * torch.eye(2))
    model = nn.Sequential(first, second).to(v.dtype)
    call = {"model": model, "blocks": [first, second], "x": torch.tensor([[3.0, 4.0]], dtype=v.dtype)}
    return Case(call, lambda found: v.close(found.flatten(), [80.0, 40.0]))


@row("resode.analysis.boosting_along")
def _(v: Variant) -> Case:
    path = torch.tensor([[[0.0]], [[1.0]], [[0.5]]], dtype=v.dtype)

    def law(found):
        v.close(found.cosine.flatten(), [1.0, -1.0])
        v.close(found.losses.flatten(), [9.0, 4.0, 6.25])

    call = {"path": path, "head": lambda x: x, "target": torch.tensor([[3.0]], dtype=v.dtype)}
    return Case(call, law)


@row("resode.analysis.correction_along")
def _(v: Variant) -> Case:
    path = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, -1.0]]], dtype=v.dtype)
    target = torch.tensor([[2.0, 0.0]], dtype=v.dtype)
    return Case({"path": path, "target": target}, lambda found: v.close(found.flatten(), [1.0, 0.0]))


@row("resode.analysis.class_means")
def _(v: Variant) -> Case:
    states = torch.tensor([[1.0], [3.0], [5.0]], dtype=v.dtype)

    def law(found):
        v.close(found[:2].flatten(), [3.0, 1.0])
        assert found[2].isnan().all()

    return Case({"states": states, "labels": torch.tensor([0, 0, 1])}, law)


@row("resode.analysis.depth_attention")
def _(v: Variant) -> Case:
    class Mean(nn.Module):
        def forward(self, stack):
            return stack.mean(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = Mean()

        def forward(self, x):
            return self.read(torch.stack([x, x.tanh()]))

    x = v.tensor(max(2, v.batch), v.size + 1)
    return Case({"model": Two(), "x": x}, lambda found: v.close(found.weights, [[0.5, 0.5]], 100))


@row("resode.analysis.stream_mixing")
def _(v: Variant) -> Case:
    blocks = [resode.shortcuts.HyperConnection(nn.Linear(8, 8), 2, manifold=True) for _ in range(3)]
    network = v.module(nn.Sequential(*blocks))

    def law(found):
        assert found.names == ("0", "1", "2")
        for mix in found.mixing:
            v.close(mix.sum(-1), torch.ones(mix.shape[:-1]), 100)

    return Case({"model": network, "x": v.tensor(v.batch, 2, 8)}, law)


@row("resode.analysis.operator_norm")
def _(v: Variant) -> Case:
    conv = nn.Conv2d(1, 1, 1, bias=False).to(v.dtype)
    nn.init.constant_(conv.weight, -3.0)
    return Case({"conv": conv, "input_shape": (1, 5, 4)}, lambda found: v.close(found, 3.0, 10))


@row("resode.analysis.bound_operator_norm")
def _(v: Variant) -> Case:
    conv = v.module(nn.Conv2d(2, 2, 3, padding=1))

    def law(bounded):
        assert resode.analysis.operator_norm(bounded, (2, 5, 4)) <= 0.5 * (1 + 100 * v.tolerance)

    return Case({"conv": conv, "input_shape": (2, 5, 4), "bound": 0.5}, law, changes=("conv",))


RECORDS |= {
    "resode.DepthProfile": "resode.profile_depth",
    "resode.Diagnosis": "resode.diagnose",
    "resode.Finding": "resode.diagnose",
    "resode.Forecast": "resode.analysis.forecast",
    "resode.SwapReport": "resode.swap_report",
    "resode.analysis.BoostingAlong": "resode.analysis.boosting_along",
    "resode.analysis.DepthAttention": "resode.analysis.depth_attention",
    "resode.analysis.DepthRow": "resode.profile_depth",
    "resode.analysis.DiagnosisRow": "resode.diagnose",
    "resode.analysis.Lesion": "resode.analysis.lesion_study",
    "resode.analysis.StreamProfile": "resode.analysis.stream_mixing",
    "resode.analysis.Training": "resode.diagnose",
    "resode.analysis.Whole": "resode.diagnose",
}
