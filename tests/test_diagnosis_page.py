"""The first page of a diagnosis, and the parts of one, from numbers that are given."""

import math

import pytest
import torch
from torch import nn

import resode
from resode.analysis.diagnose.findings import Finding
from resode.analysis.diagnose.forecast import KEEPS, LOSES, Forecast, drift, forecast, verdict
from resode.analysis.diagnose.measures import Measures
from resode.analysis.diagnose.page import Diagnosis, DiagnosisRow, Training, Whole
from resode.analysis.diagnose.solver import fastest_mode, solver_findings, stiff_advice
from resode.tableaus import get_tableau


def row(i: int, branch_gain: float = 0.5, cause: str = "") -> DiagnosisRow:
    return DiagnosisRow(f"blocks.{i}", 1.0, 1.5, branch_gain, 2.0, 1.1, 0.25, cause)


def page(**given) -> list[str]:
    parts = dict(findings=[], whole=None, swap={}, training=None, rows=[], samples=8)
    return Diagnosis(**{**parts, **given}).page(400).splitlines()


def test_a_page_of_nothing_and_of_one():
    assert (
        page(samples=1, layers=1)[0] == "VERDICT  nothing unusual (no residual addition, 1 layer, 1 sample)."
    )
    assert page(layers=1200)[0].endswith("(no residual addition, 1,200 layers, 8 samples).")
    assert page(rows=[row(0)])[0].endswith("(1 residual addition, 8 samples).")
    assert page(rows=[row(0), row(1)], samples=1)[0].endswith("(2 residual additions, 1 sample).")
    assert page()[1:] == [
        "WHOLE    no residual block adds a branch to the state that it starts from.",
        "BLOCKS   no branch's gain to compare.",
        "SWAP     no ResidualStack, so no solver to swap.",
        "TRAIN    give a target and lr= (--lr) to judge a learning rate.",
    ]
    assert page(notes=("One.", "Two."))[5:] == ["NOTES    One.", "         Two."]


@pytest.mark.parametrize("n", [1, 5, 6, 8])
def test_five_findings_and_how_many_more(n):
    found = [Finding(f"b{i}", "idle", f"Text {i}.", f"Do {i}.") for i in range(n)]
    lines = page(findings=found)
    want = [x for i in range(min(n, 5)) for x in (f"b{i}: idle. Text {i}.", f"→ Do {i}.")]
    want += [f"… and {n - 5} more, in .findings."] if n > 5 else []
    assert [line[9:] for line in lines[: len(want)]] == want
    assert lines[0].startswith("VERDICT  b0") and lines[1].startswith(" " * 9 + "→")
    assert lines[len(want)].startswith("WHOLE")


def test_lines_of_the_whole_and_of_the_learning_rate():
    whole = Whole(3.25, 12.5, 1.75, (0.001, 1000.0))
    assert page(whole=whole)[1] == "WHOLE    gain 3.25, at most 12.5 (usual 0.001 to 1000); ‖x_L‖/‖x_0‖ 1.75."
    for lr, words in (
        (0.8, "lr 0.8 is 2 times its limit 0.4"),
        (0.4, "1 times"),
        (0.1, "lr 0.1 is 0.25 of its limit 0.4"),
    ):
        assert words in page(training=Training(lr, 0.4, lr / 0.4))[4]


def test_lines_of_the_blocks():
    gains = [0.2, 0.9, math.nan, 0.4, 0.3]
    rows = [row(i, g) for i, g in enumerate(gains)]
    line = "branch gains 0.2 to 0.9, median 0.4; none of 5 stands out."
    assert page(rows=rows)[2] == "BLOCKS   " + line
    rows[1] = row(1, 0.9, "idle")
    assert page(rows=rows)[2:4] == [
        "BLOCKS   " + line.replace("none", "1"),
        "         blocks.1: idle; gain 1.5, branch 0.9",
    ]
    many = [row(i, 0.5, "idle") for i in range(7)]
    lines = page(rows=many)
    assert "7 of 7 stand out" in lines[2] and "blocks.4" in lines[7] and lines[8].startswith("SWAP")


def test_lines_of_a_swap():
    swap = {
        "rk4": Forecast(0.5, "f.1", 0.125, "loses"),
        "euler": Forecast(0.0, "", 0.0, "keeps"),
        "heun2": Forecast(0.1, "", 0.0, "keeps"),
    }
    assert page(swap=swap, solver="euler")[3:6] == [
        "SWAP     rk4 as it is loses accuracy (drift 0.5; f.1 0.125).",
        "         euler: as it is.",
        "         heun2 as it is keeps accuracy (drift 0.1).",
    ]


def test_folding_and_html():
    found = Diagnosis([Finding("a<b", "idle", "word " * 40, "do")], None, {}, None, [], 8)
    for width, most in ((80, 80), (40, 40), (24, 24), (5, 24)):
        lines = found.page(width).splitlines()
        assert max(map(len, lines)) <= most and max(map(len, lines)) > most - 10
        assert [
            line[:9].strip() for line in lines if line[:9].strip()
        ] == "VERDICT WHOLE BLOCKS SWAP TRAIN".split()
    html = found._repr_html_()
    assert (
        html.startswith("<table><tr><th")
        and html.count("<tr>") == 5
        and "a&lt;b: idle." in html
        and "<br>→ do</td>" in html
    )
    assert str(found) == found.page(80)


# -- forecast --------------------------------------------------------------------------------------


def test_verdicts_of_a_drift():
    assert [verdict(d) for d in (0.0, KEEPS, KEEPS + 1e-9, LOSES, LOSES + 1e-9, math.nan)] == [
        "keeps", "keeps", "may lose", "may lose", "loses", "loses",
    ]  # fmt: skip
    assert (KEEPS, LOSES) == (0.25, 0.45)
    assert drift(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])) == 0.75
    assert math.isnan(drift(torch.ones(2), torch.zeros(2)))


def test_a_forecast_of_stacks_called_twice_and_of_many_inputs():
    """x' = −x in steps of 1: Euler's 0 against rk4's 3/8, and a block with half of that step."""
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    first.weight.data, second.weight.data = -0.25 * torch.eye(3), -0.5 * torch.eye(3)
    stack = resode.ResidualStack([first, second])
    model = nn.Sequential(stack, stack)
    maps = {
        s: [float(resode.stability_function(s, torch.tensor([z + 0j])).real) for z in (-0.25, -0.5)]
        for s in ("euler", "rk4")
    }
    found = forecast(model, torch.randn(100, 3), "rk4")
    defects = [r / e - 1 for r, e in zip(maps["rk4"], maps["euler"], strict=True)]
    total = (maps["rk4"][0] * maps["rk4"][1] / (maps["euler"][0] * maps["euler"][1])) ** 2 - 1
    assert found.worst_block == "0.fields.1" and found.defect == pytest.approx(max(defects), rel=1e-4)
    assert found.drift == pytest.approx(total, rel=1e-4)
    seen = []
    stack.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    forecast(model, torch.randn(100, 3), "rk4")
    assert set(seen) == {64}
    finer = forecast(model, torch.randn(100, 3), "euler", substeps=2)
    assert finer.drift == pytest.approx(
        ((1 - 0.125) ** 2 * (1 - 0.25) ** 2 / (0.75 * 0.5)) ** 2 - 1, rel=1e-4
    )
    assert stack.solver == "euler" and stack.substeps == 1
    with pytest.raises(ValueError, match="this model holds none"):
        forecast(nn.Linear(2, 2), torch.zeros(1, 2), "rk4")


def test_a_forecast_of_states_that_overflow_or_vanish():
    blowing = nn.Linear(2, 2, bias=False)
    blowing.weight.data = 1e20 * torch.eye(2)
    found = forecast(nn.Sequential(resode.ResidualStack(blowing, depth=1)), torch.ones(4, 2), "rk4")
    assert not math.isfinite(found.defect) and found.worst_block == "0" and found.verdict == "loses"
    still = nn.Linear(2, 2, bias=False)
    still.weight.data = -torch.eye(2)
    found = forecast(resode.ResidualStack(still, depth=1), torch.ones(4, 2), "rk4")
    assert found.defect == 0 and math.isnan(found.drift), "nothing is left to compare with"


# -- the solver's steps ----------------------------------------------------------------------------


class Decay(nn.Module):
    def __init__(self, rates):
        super().__init__()
        self.rates = torch.tensor(rates)

    def forward(self, x):
        return -self.rates.to(x.dtype) * x


def test_the_fastest_mode_of_linear_fields():
    """Power iteration: the eigenvalue of largest modulus, nan where it is a complex pair."""
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    assert fastest_mode(Decay([3.0, 1.0]), x) == pytest.approx(-3.0, rel=1e-5)
    assert fastest_mode(Decay([1.0, -3.0]), x) == pytest.approx(3.0, rel=1e-5)
    turn = torch.tensor([[1.0, 2.0], [-4.0, 1.0]], dtype=torch.float64)  # 1 ± 2.83i, and not normal
    assert math.isnan(fastest_mode(lambda y: y @ turn, x))
    assert math.isnan(fastest_mode(lambda y: 0 * y, x)) or fastest_mode(lambda y: 0 * y, x) == 0
    cubic = torch.tensor([[0.1, 0.1], [2.0, 2.0]], dtype=torch.float64)  # of −y³ the slope −3y²
    assert fastest_mode(lambda y: -(y**3), cubic) == pytest.approx(-12.0, rel=1e-4), (
        "over the samples the largest"
    )


@pytest.mark.parametrize("stiffness", [1.0, 100.0, 5e3, 2e5])
def test_the_method_advised_for_a_stiff_block_reaches_its_mode(stiffness):
    """32 steps of rkl2 with an odd number of stages: the interval holds |λ|T/32 and a twentieth, two stages fewer do not."""
    words = stiff_advice(stiffness)
    stages = int(words.split("rkl2_")[1].split("'")[0])
    assert (
        stages % 2 == 1
        and stages >= 3
        and "with 32 steps" in words
        and f"{32 * stages:,} evaluations" in words
    )
    need = 1.05 * stiffness / 32
    assert resode.real_stability_interval(f"rkl2_{stages}") >= need * (1 - 1e-9)
    if stages > 3:
        assert ((stages - 2) ** 2 + (stages - 2) - 2) / 2 < need
    assert get_tableau(f"rkl2_{stages}").order == 2


@pytest.mark.parametrize(("rate", "found"), [(2.9, False), (3.1, True)])
def test_a_step_that_amplifies_what_decays(rate, found):
    """Euler with step 1: |1 − λ| from 2 on, at λ = 3; eight times finer it decays."""
    stack = resode.ResidualStack(Decay([rate, rate]), depth=2, step_size=1.0)
    model = nn.Sequential(stack)
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(1))
    told = solver_findings(model.eval(), x, Measures(2, 2))
    assert [f.cause for f in told] == ["overstep"] * found
    if found:
        [f] = told
        assert f.evidence["eigenvalue"] == pytest.approx(-rate, rel=1e-4) and f.evidence["step"] == 1.0
        assert f.evidence["gain"] == pytest.approx(rate - 1, rel=1e-2) and f.evidence[
            "finer"
        ] == pytest.approx((1 - rate / 8) ** 8, rel=5e-2)
        assert f.evidence["limit"] == pytest.approx(2 / rate, rel=1e-4) and f.evidence["substeps"] == 2
        assert "Take 2 substeps" in f.advice and f"step_size of {1.8 / rate:.3g}" in f.advice
    assert stack.substeps == 1


def test_growth_that_finer_steps_have_too_is_the_fields():
    stack = resode.ResidualStack(Decay([-2.0, -2.0]), depth=1, step_size=1.0)
    assert solver_findings(nn.Sequential(stack).eval(), torch.randn(2, 2), Measures(2, 2)) == []
