"""`resode.diagnose`: silence for healthy networks, the right place and cause for broken ones."""

import copy
import math

import pytest
import torch
from torch import nn

import resode
from resode.analysis.diagnose import measures
from resode.analysis.diagnose.findings import CAUSES, WHOLE
from resode.networks import build
from tests.clinic import faults
from tests.clinic.networks import HEALTHY, Residual, data, healthy, mlp, residual_mlps
from tests.clinic.treatments import repaired

QUICK = [name for name, spec in HEALTHY.items() if spec.updates == 0 and name not in faults.LONG]
TRAINED = (
    "pre-norm mlp 8",
    "batch-norm mlp 6",
    "rezero 16",
    "stack euler",
    "plain 4",
    "converted pre-norm mlp 8",
)


@pytest.mark.parametrize("name", [*QUICK, *TRAINED])
def test_healthy_networks_are_left_alone(name):
    x, y = data(HEALTHY[name].task).look()
    found = resode.diagnose(healthy(name), x, y)
    assert found.ok, str(found)
    assert str(found).startswith("VERDICT  nothing unusual")
    assert len(found.page(200).splitlines()) == 5


PATIENTS = [
    ("pre-norm mlp 8", "branch ×15"),
    ("batch-norm mlp 6", "branch ×40"),
    ("pre-norm mlp 8", "branch of noise"),
    ("rezero 16", "branch ×1e-7"),
    ("pre-norm mlp 8", "weights ×1e-7 behind a bias"),
    ("batch-norm mlp 6", "running variance ×1e-5"),
    ("batch-norm mlp 6", "batch norm never updated"),
    ("plain 4", "nan weight"),
    ("pre-norm mlp 8", "log of negative numbers"),
    ("pre-norm mlp 8", "root at 0"),
    ("pre-norm mlp 8", "no shortcut"),
    ("gpt fresh 8", "no shortcut in a GPT"),
    ("norm-free fresh 8", "shortcut ×0"),
    ("norm-free fresh 8", "shortcut ×3"),
    ("norm-free fresh 8", "subtracted branch"),
    ("pre-norm mlp 8", "dead ReLU"),
    ("plain 4", "dead layer"),
]


@pytest.mark.parametrize(("origin", "fault"), PATIENTS, ids=[f"{f} in {o}" for o, f in PATIENTS])
def test_a_fault_is_found_where_it_was_made(origin, fault):
    """Made in a healthy network by one change, so that place and cause are known."""
    patient = faults.make(fault, origin)
    x, y = data(patient.task).look()
    found = resode.diagnose(patient.model, x, y)
    assert not found.ok
    first = found.findings[0]
    assert faults.named_right(patient, first.block), f"{patient.culprit}: {found}"
    assert first.cause in patient.causes, str(found)


@pytest.mark.parametrize("name", [name for name in faults.BUILT if name not in faults.LONG])
def test_networks_built_wrong_are_told_why(name):
    patient = faults.built(name)
    x, y = data(patient.task).look()
    first = resode.diagnose(patient.model, x, y, lr=patient.lr).findings[0]
    assert faults.named_right(patient, first.block), str(first)
    assert first.cause in patient.causes, str(first)


@pytest.mark.parametrize("name", [name for name, (*_, cause) in faults.BUILT.items() if cause == "stiff"])
def test_the_method_for_a_stiff_block_is_cheaper_and_as_good(name):
    """Half of the evaluations or less, and outputs within 1 %."""
    patient = faults.built(name)
    found = resode.diagnose(patient.model, *data(patient.task).look())
    better, now, half = repaired(patient, found.findings[0])
    assert better, f"{now:g} evaluations for {half:g}"


def test_a_learning_rate_is_judged_against_its_limit():
    """L = 5/2 (w − 1)² has λ_max = 5, so the limit is 2/5 (the loss here is the mean of squares)."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    found = resode.diagnose(model, x, x, lr=8.0)
    assert found.training.limit == pytest.approx(0.4, rel=1e-6)
    assert [f.cause for f in found.findings] == ["learning-rate"]
    assert resode.diagnose(model, x, x, lr=0.2).ok


def test_the_gains_are_those_of_the_jacobian():
    """F = cQ with an orthogonal Q: the branch's gain is c for every u, and σ ≤ 1 + c."""
    q = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    blocks = []
    for c in (0.1, 0.2, 0.4):
        layer = nn.Linear(16, 16, bias=False)
        layer.weight.data = c * q
        blocks.append(Residual(layer))
    found = resode.diagnose(nn.Sequential(*blocks), torch.randn(4, 16))
    assert [r.branch_gain for r in found.rows] == pytest.approx([0.1, 0.2, 0.4], rel=1e-4)
    assert all(r.gain < r.sigma <= 1 + r.branch_gain + 1e-5 for r in found.rows)


def test_the_model_comes_back_as_it_was():
    model = healthy("batch-norm mlp 6").train()
    before = copy.deepcopy(model.state_dict())
    x, y = data("digits").look()
    found = resode.diagnose(model, x, y, lr=0.01)
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert "training mode" in str(found)


def test_what_a_network_takes_is_what_it_is_given():
    """Mappings, several tensors, token ids, one sample, no target, half precision, a shared block."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Residual(mlp(8))

        def forward(self, a, b):
            return self.block(self.block(a + b))

    a, b = torch.randn(2, 4, 8)
    assert len(resode.diagnose(Two(), (a, b)).rows) == 2
    assert len(resode.diagnose(Two(), {"a": a, "b": b}).rows) == 2
    assert resode.diagnose(Two(), (a[:1], b[:1])).ok
    half = residual_mlps(4).bfloat16()
    assert len(resode.diagnose(half, torch.randn(4, 64).bfloat16()).rows) == 4
    assert half.stem[1].weight.dtype == torch.bfloat16
    x, _ = data("sequences").look()
    assert len(resode.diagnose(healthy("gpt fresh 8"), x).rows) == 16


def test_overflow_in_half_precision_is_named():
    model = residual_mlps(4, last=1e4).half()
    first = resode.diagnose(model, 100 * torch.randn(4, 64).half()).findings[0]
    assert first.cause == "non-finite"
    assert "float16" in first.advice


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        resode.diagnose(lambda x: x, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="lr must be a positive number"):
        resode.diagnose(nn.Linear(2, 2), torch.zeros(1, 2), lr=-1.0)
    with pytest.raises(ValueError, match="at least one sample"):
        resode.diagnose(nn.Linear(2, 2), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="unknown method 'rk44'"):
        resode.diagnose(nn.Linear(2, 2), torch.zeros(1, 2), solvers=("rk44",))


def test_a_network_without_anything_deep_is_said_to_be_one():
    found = resode.diagnose(nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(5, 4))
    assert found.ok
    assert found.whole is None
    assert "no residual block" in str(found)
    assert len(found.page(200).splitlines()) == 5


@pytest.mark.parametrize("width", [50, 80])
def test_the_page_fits_its_terminal_and_the_verdict_stands_first(width):
    patient = faults.make("branch ×15", "pre-norm mlp 8")
    page = resode.diagnose(patient.model, data("digits").look()[0]).page(width)
    assert all(len(line) <= width for line in page.splitlines())
    assert page.startswith(f"VERDICT  {patient.culprit}: strong-block.")
    headings = [line.split()[0] for line in page.splitlines() if not line.startswith(" ")]
    assert headings == ["VERDICT", "WHOLE", "BLOCKS", "SWAP", "TRAIN"]


def test_html_and_table(tmp_path):
    patient = faults.make("branch ×15", "pre-norm mlp 8")
    found = resode.diagnose(patient.model, data("digits").look()[0])
    html = found._repr_html_()
    assert "VERDICT" in html and patient.culprit in html and "<script" not in html
    found.to_csv(tmp_path / "rows.csv")
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("block,shortcut,gain,branch_gain")


def test_causes_are_those_of_the_contract():
    assert len(CAUSES) == len(set(CAUSES)) == 14
    assert WHOLE == "whole network"


def test_the_forecast_tells_drift_and_the_worst_block():
    """x' = −x in one step of 1: Euler gives 0, RK4 3/8 of x; in block 0 alone, as block 1 is the identity."""
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    first.weight.data, second.weight.data = -0.5 * torch.eye(4), torch.zeros(4, 4)
    stack = resode.ResidualStack([first, second])
    found = resode.diagnose(stack, torch.randn(8, 4), solvers=("rk4", "euler")).swap
    euler, rk4 = 1 - 0.5, 1 - 0.5 + 0.5**2 / 2 - 0.5**3 / 6 + 0.5**4 / 24
    assert found["rk4"].drift == pytest.approx((rk4 - euler) / euler, rel=1e-5)
    assert found["rk4"].defect == pytest.approx((rk4 - euler) / euler, rel=1e-5)
    assert found["rk4"].worst_block == "fields.0"
    assert found["euler"].drift == 0 and found["euler"].verdict == "keeps"
    assert stack.solver == "euler"


def test_networks_that_are_the_identity_are_not_alarmed():
    model = build("resnet20", in_channels=1, width=4, zero_init_last=True)
    faults.settle(model, data("digits"))
    found = resode.diagnose(model, data("digits").look()[0])
    assert found.ok, str(found)
    assert math.isfinite(found.whole.sigma)


def test_faults_in_converted_networks_are_named_by_field():
    """The fault is made before the conversion; block i of the original is field i of the stack."""
    for fault in ("branch ×15", "branch ×1e-7"):
        patient = faults.make(fault, "pre-norm mlp 8")
        number = patient.culprit.rsplit(".", 1)[1]
        x, _ = data("digits").look()
        first = resode.diagnose(resode.convert(patient.model, x), x).findings[0]
        assert first.cause in (patient.cause, "overstep"), "a branch ×15 is a step that is too long, too"
        assert first.block.endswith(f".fields.{number}"), first


def test_progress_is_shown_on_a_terminal_where_it_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(measures, "_PATIENCE", -1.0)
    x = torch.randn(4, 64)
    resode.diagnose(residual_mlps(4), x)
    assert capsys.readouterr().err == "", "into a file or a pipe nothing is written"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    resode.diagnose(residual_mlps(4), x)
    assert "resode.diagnose: block 4 of 4\n" in capsys.readouterr().err


def test_large_states_are_probed_with_fewer_samples(monkeypatch):
    """So many samples as their activations may take; the first pass still meets all of them."""
    x = torch.randn(12, 64)
    model = residual_mlps(4)
    assert measures.measure(model, x, None, None, None, 0).probed == 8
    monkeypatch.setattr(measures, "_ENTRIES", 300)
    found = measures.measure(model, x, None, None, None, 0)
    assert (found.samples, found.probed) == (12, 1)
    assert [b.gain > 0 for b in found.blocks] == 4 * [True]
