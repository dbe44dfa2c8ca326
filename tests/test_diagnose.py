"""`resode.diagnose`: silence for healthy networks, the right place and cause for broken ones."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import resode
from resode.analysis.diagnose import measures
from resode.analysis.diagnose.findings import CAUSES, WHOLE, findings
from resode.networks import build
from tests.clinic import faults
from tests.clinic.networks import HEALTHY, LN, Reader, Residual, data, healthy, mlp, residual_mlps
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


def test_a_diagnosis_of_a_healthy_network_is_five_lines_on_a_terminal():
    assert (
        len(resode.diagnose(healthy("pre-norm mlp 8"), data("digits").look()[0]).page(80).splitlines()) == 5
    )


def test_branches_behind_a_norm_do_not_depend_on_the_size_of_the_state():
    """F(cx) = F(x) makes Jx = 0, so x and Jᵀu are orthogonal; for a linear F their cosine is as 1/√n."""
    linear, normed = residual_mlps(6, act=nn.Identity), residual_mlps(6, LN)
    x = torch.randn(8, 1, 8, 8)
    free = [b.radial for b in measures.measure(normed.eval(), x, None, None, None, 0).blocks]
    bound = [b.radial for b in measures.measure(linear.eval(), x, None, None, None, 0).blocks]
    assert max(free) < 0.02
    assert min(bound) > 0.3


def test_a_small_state_behind_a_norm_is_no_strong_block():
    """J is as 1/‖x‖ there: at small inputs the first block has several times the gain of the others."""
    torch.manual_seed(0)
    model = residual_mlps(5, LN).eval()
    model.stem[1].bias.data.zero_()
    x = data("digits").look()[0]
    gains = [r.branch_gain for r in resode.diagnose(model, 0.1 * x).rows]
    assert gains[0] > 5 * sorted(gains)[2]
    assert resode.diagnose(model, 0.1 * x).ok


def test_the_gradient_through_time_of_a_linear_recurrence():
    """hₜ = W hₜ₋₁ + U xₜ with W = cQ passes on c a step, seven times; relu keeps positive states."""
    for c, found in ((1.0, None), (4.0, "explosion")):
        model = Reader(nonlinearity="relu")
        with torch.no_grad():
            for p in model.rnn.parameters():
                p.fill_(0.0)
            model.rnn.weight_hh_l0.copy_(c * torch.eye(32))
            model.rnn.weight_ih_l0.copy_(torch.eye(32, 8))
        x = torch.rand(4, 1, 8, 8) + 0.1
        [r] = measures.measure(model, x, None, None, None, 0).recurrences
        assert (r.name, r.kind, r.steps) == ("rnn", "RNN", 8)
        assert r.ratio == pytest.approx(c**7, rel=1e-4)
        causes = [f.cause for f in resode.diagnose(model, x).findings]
        assert causes == ([found] if found else [])


def test_what_is_forgotten_through_time_is_said_and_no_alarm():
    model = Reader(nonlinearity="tanh")
    model.rnn.weight_hh_l0.data.mul_(1e-3)
    found = resode.diagnose(model, torch.randn(4, 1, 8, 8))
    assert found.ok
    assert "at the first of 8 time steps" in str(found).replace("\n         ", " ")


class Experts(nn.Module):
    """Of four experts the first choice."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(32, 4)
        self.experts = nn.ModuleList([mlp() for _ in range(4)])

    def forward(self, x):
        weight, choice = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (chosen := choice == i).any():
                y[chosen] = weight[chosen, None] * expert(x[chosen])
        return x + y


def test_an_expert_that_no_sample_reaches_is_told_without_an_alarm():
    torch.manual_seed(0)
    block = Experts()
    block.router.weight.data.mul_(0.1)
    block.router.bias.data.copy_(torch.tensor([0.0, 0.0, -100.0, 0.0]))
    found = resode.diagnose(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), block), torch.randn(64, 1, 8, 8))
    assert found.ok
    assert any("2.experts.2" in note and "2.experts.1" not in note for note in found.notes)


def test_of_two_towers_the_one_that_leads_to_the_last_block_is_looked_at():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = residual_mlps(3), residual_mlps(3)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    torch.manual_seed(0)
    found = resode.diagnose(Towers(), tuple(torch.randn(2, 4, 1, 8, 8)))
    assert found.ok, str(found)
    assert found.whole.gain > 1


def test_adapters_that_start_at_zero_are_not_idle():
    class Adapted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.a, self.b = layer, nn.Linear(32, 4), nn.Linear(4, 32)
            nn.init.zeros_(self.b.weight)
            nn.init.zeros_(self.b.bias)

        def forward(self, x):
            return self.layer(x) + self.b(self.a(x))

    torch.manual_seed(0)
    model = residual_mlps(6, LN)
    for block in (model.blocks[1], model.blocks[4]):
        block.branch[2] = Adapted(block.branch[2])
    assert resode.diagnose(model, torch.randn(8, 1, 8, 8)).ok


def test_bad_data_is_named_and_no_layer_is():
    model = residual_mlps(4)
    x = torch.randn(4, 1, 8, 8)
    x[1, 0, 2, 3] = math.nan
    first = resode.diagnose(model, x).findings[0]
    assert (first.block, first.cause) == (WHOLE, "non-finite") and "in the inputs" in first.text
    target = torch.full((4, 10), math.inf)
    assert "in the targets" in resode.diagnose(model, torch.randn(4, 1, 8, 8), target).findings[0].text


def test_an_overflow_in_single_precision_says_what_was_reached():
    model = residual_mlps(4)
    for block in model.blocks:
        block.branch[2].weight.data.mul_(1e20)
    first = resode.diagnose(model, torch.randn(4, 1, 8, 8)).findings[0]
    assert first.cause == "non-finite" and "reach" in first.text and "exploded before" in first.advice


def test_frozen_embeddings_hide_no_block():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 32).requires_grad_(False)
            self.blocks = nn.Sequential(*[Residual(mlp(), LN(32)) for _ in range(3)])

        def forward(self, input_ids, **options):
            return dataclasses.make_dataclass("Out", ["logits"])(self.blocks(self.embed(input_ids)))

    model = Reading()
    found = resode.diagnose(model, {"input_ids": torch.randint(9, (4, 5))})
    assert len(found.rows) == 3
    assert not model.embed.weight.requires_grad


def test_inputs_that_are_no_batch_are_refused_with_what_to_do():
    model, x = residual_mlps(2), torch.randn(4, 1, 8, 8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 2)
    with pytest.raises(TypeError, match="must be one batch"):
        resode.diagnose(model, loader)
    with pytest.raises(TypeError, match="complex"):
        resode.diagnose(model, x.to(torch.complex64))
    with pytest.raises(TypeError, match="a pair of inputs and targets as two arguments"):
        resode.diagnose(model, (x, torch.zeros(4)))
    with pytest.raises(ValueError, match="got str"):
        resode.diagnose(model, "x")
    with pytest.raises(ValueError, match="not its loss"):
        resode.diagnose(nn.Sequential(model, MeanOfAll()), x)
    with pytest.raises(ValueError, match="meta device"):
        resode.diagnose(residual_mlps(2).to("meta"), x)
    assert set(resode.diagnose(nn.Linear(2, 2), torch.zeros(2, 2), solvers="rk4").swap) == set()


class MeanOfAll(nn.Module):
    def forward(self, x):
        return x.mean()


def test_weights_made_in_inference_mode_are_looked_at():
    with torch.inference_mode():
        model = residual_mlps(3)
    assert len(resode.diagnose(model, torch.randn(4, 1, 8, 8)).rows) == 3


def test_a_depth_explodes_where_its_state_grows_or_by_far():
    """Behind norms the state stays and the gradient grows by a fifth a layer, which training bears."""
    m = measures.measure(residual_mlps(5).eval(), torch.randn(8, 1, 8, 8), None, None, None, 0)
    for sigma, growth, explodes in (
        (8e3, 2.0, False),
        (8e3, 100.0, False),
        (8e3, 500.0, True),
        (1e6, 2.0, True),
        (10.0, 2e3, True),
    ):
        m.whole_sigma, m.state_growth = sigma, growth
        assert [f.cause for f in findings(m)] == (["explosion"] if explodes else [])


def test_a_group_of_blocks_without_shortcuts_is_made_so():
    """The last group of some networks has none; one block without among others of its list is a fault."""
    torch.manual_seed(0)
    groups = [nn.Sequential(*[Residual(mlp(last=0.5)) for _ in range(3)]) for _ in range(3)]
    last = nn.Sequential(Residual(mlp(), factor=None))
    x = torch.randn(8, 32)
    assert resode.diagnose(nn.Sequential(*groups, last), x).ok
    groups[1][2].factor = None
    first = resode.diagnose(nn.Sequential(*groups, last), x).findings[0]
    assert (first.block, first.cause) == ("1.2", "no-shortcut")


def test_an_overflow_that_the_steps_bring_is_laid_to_them():
    """x' = −300x in rk4's steps of 1: R(−300) = 3.3e8 a block, where the flow decays."""
    stack = resode.ResidualStack(Scale(-300.0), depth=60, solver="rk4")
    first = resode.diagnose(nn.Sequential(nn.Linear(8, 8), stack), torch.randn(4, 8)).findings[0]
    assert (first.block, first.cause) == ("1", "overstep"), str(first)


class Scale(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        return self.rate * x


class Squared(nn.Module):
    """y' = 1000 y² + 1 from y > 0 is infinite before t = 0.001/y."""

    def __init__(self, bounded: bool) -> None:
        super().__init__()
        self.bounded = bounded

    def forward(self, t, y):
        return torch.tanh(1e3 * y * y + 1) if self.bounded else 1e3 * y * y + 1


def test_a_field_that_blows_up_is_no_stiff_one():
    """Its mode grows where the solver gives up; the advice, a bounded field, leaves nothing to be said."""
    x = torch.rand(8, 2, generator=torch.Generator().manual_seed(0)) + 1
    found = resode.diagnose(nn.Sequential(resode.ODEBlock(Squared(False), solver="dopri5")), x)
    (first, *_) = found.findings
    assert (first.block, first.cause) == ("0", "explosion") and first.evidence["eigenvalue"] > 1e3
    assert "blow up in finite time" in first.text and "bound the field" in first.advice
    assert not resode.diagnose(nn.Sequential(resode.ODEBlock(Squared(True), solver="dopri5")), x).findings
