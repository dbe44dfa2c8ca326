"""Parts of a diagnosis: stiff blocks from measures made by hand, what is watched and how, edges of its arguments."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import resode
from resode.analysis.diagnose import measures
from resode.analysis.diagnose.diagnose import diagnose
from resode.analysis.diagnose.measures import Measures, _precise, _radial, _Watcher, measure
from resode.analysis.diagnose.solver import _overstep, fastest_mode, solver_findings, stiff_advice
from resode.solve import SolverError
from tests.test_findings import only, plain, residual, told


class Decay(nn.Module):
    """F(x) = −rate·x, also of (t, x)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, *args):
        return -self.rate * args[-1]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def look(model: nn.Module, x, target=None) -> Measures:
    return measure(model.eval(), x, target, None, None, 0)


def stiff(rate: float, *, evaluations=None, error=None, t=(0.0, 1.0), name: str = "0"):
    """The findings of x' = −rate·x in an adaptive block, given what a forward pass is said to have met."""
    model = nn.Sequential(resode.ODEBlock(Decay(rate), t=t, solver="dopri5"))
    m = Measures(2, 2)
    m.evaluations = {} if evaluations is None else {"0": [evaluations]}
    m.solver_error = None if error is None else (name, error)
    return solver_findings(model.eval(), 1e-8 * normal(2, 3), m)


# -- stiff blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [(0.0, 1.0), (1.0, 0.0), (0.0, 2.0)])
def test_steps_as_long_as_stability_allows(t):
    """dopri5 takes six evaluations a step, first same as last, and |λ|·T/4 steps where its region ends at 3.3 of −hλ.

    360 evaluations are 60 steps: held below |λ|·T = 4·360, whichever way time runs.
    """
    span = abs(t[1] - t[0])
    sign = 1.0 if t[1] > t[0] else -1.0
    [found] = stiff(sign * 1400 / span, evaluations=360, t=t)
    assert (found.block, found.cause) == ("0", "stiff")
    assert found.evidence == {
        "eigenvalue": pytest.approx(-1400 / span, rel=1e-4), "evaluations": 360.0, "span": span,
    }  # fmt: skip
    assert "360 evaluations" in found.text and f"of {span:.3g} and holds dopri5's" in found.text
    assert found.advice == stiff_advice(-found.evidence["eigenvalue"] * span) and "rkl2_" in found.advice
    assert stiff(sign * 1480 / span, evaluations=360, t=t) == [], "so many steps are not stability's"
    assert stiff(-sign * 10 / span, evaluations=360, t=t) == [], "nor where the mode grows"


def test_few_evaluations_are_no_trouble():
    assert stiff(1000.0, evaluations=300) == [] and len(stiff(1000.0, evaluations=301)) == 1
    error = SolverError("gave up")
    assert stiff(1000.0, error=error, name="another") == [], "it was another block that gave up"
    assert len(stiff(1000.0, evaluations=301, error=error, name="another")) == 1
    assert stiff(1000.0) == []


def test_a_solver_that_gave_up_at_a_decaying_mode():
    """Its evaluations are unknown: 0."""
    [found] = stiff(900.0, error=SolverError("gave up"))
    assert found.cause == "stiff" and found.text.endswith("it gave up.")
    assert found.evidence["evaluations"] == 0.0
    assert found.evidence["eigenvalue"] == pytest.approx(-900, rel=1e-4)


@pytest.mark.parametrize(("eigenvalue", "cause"), [(3 + 1j, "explosion"), (0j, "stiff"), (1j, "stiff"), (None, "stiff")])  # fmt: skip
def test_a_solver_that_gave_up_where_nothing_decays(eigenvalue, cause):
    """A mode that grows ends in finite time, which no method passes; else the tolerance is what can be changed."""
    [found] = stiff(-2.0, error=SolverError("too many steps at t=0.5", eigenvalue=eigenvalue))
    assert found.cause == cause and found.text == "dopri5 gave up: too many steps at t=0.5"
    if cause == "explosion":
        assert found.evidence == {"eigenvalue": 3.0} and "bound the field" in found.advice
    else:
        assert "Loosen rtol (it is 0.001) and atol (0.0001)" in found.advice


# -- steps that are too long -----------------------------------------------------------------------


@pytest.mark.parametrize("state", ["zero", "wide"])
def test_a_step_is_judged_at_any_state(state):
    """Euler with step 1 on x' = −3.1x multiplies by −2.1: at 0, and where 100,000 entries share the perturbation."""
    model = nn.Sequential(resode.ResidualStack(Decay(3.1), depth=1, step_size=1.0))
    x = torch.zeros(2, 3) if state == "zero" else normal(2, 50_000)
    [found] = solver_findings(model.eval(), x, Measures(2, 2))
    assert found.cause == "overstep" and found.evidence["gain"] == pytest.approx(2.1, rel=1e-2)


def test_a_mode_of_zero_has_no_limit_to_name():
    stack = resode.ResidualStack(Decay(0.0), depth=1, step_size=1.0, substeps=2)
    found = _overstep("0", stack, 0, normal(2, 3), 5.0, 1.0)
    assert "eigenvalue" not in found.evidence and found.advice == "Take 16 substeps."


def test_the_fastest_mode_far_from_zero():
    """The difference quotient's step goes with the state, whose rounding at 1e12 is 1e-4."""
    x = 1e12 * (1 + normal(2, 3).abs())
    assert fastest_mode(Decay(3.0), x) == pytest.approx(-3.0, rel=1e-6)


# -- the plain forward pass ------------------------------------------------------------------------


def watched(model: nn.Module, x, samples: int) -> tuple[_Watcher, int]:
    watcher = _Watcher(model.eval())
    return watcher, watcher.run(x, samples)


@pytest.mark.parametrize("samples", [1, 2, 33, 64])
def test_activations_of_one_sample(samples):
    """5 and 2 numbers, however many samples the last part holds."""
    assert watched(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), normal(samples, 3), samples)[1] == 7


def test_inputs_are_taken_in_parts_of_four_million_numbers():
    """At most 32 samples, and 2²² numbers: 16 samples of 2¹⁸."""
    sizes: list[int] = []

    class Size(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return x[:, :1]

    watched(Size(), torch.zeros(20, 2**18, dtype=torch.bool), 20)
    watched(Size(), torch.zeros(40, 2), 40)
    assert sizes == [16, 4, 32, 8]


def test_a_solver_that_gives_up_is_named_and_nothing_more_is_asked():
    """y' = 1000 y² + 1 has no solution that long; the stack around it goes on and is not to blame."""

    class Blowing(nn.Module):
        def forward(self, t, y):
            return 1e3 * y * y + 1

    inner = resode.ODEBlock(Blowing(), solver="dopri5")
    m = look(nn.Sequential(nn.Linear(2, 2), inner), 1 + normal(3, 2).abs())
    assert m.solver_error is not None and m.solver_error[0] == "1"
    assert isinstance(m.solver_error[1], SolverError) and m.blocks == [] and m.layers == []
    nested = nn.Sequential(resode.ResidualStack(nn.Sequential(inner, nn.Linear(2, 2)), depth=1))
    name = look(nested, 1 + normal(3, 2).abs()).solver_error[0]
    assert nested.get_submodule(name) is inner, "the innermost"


def test_a_models_own_error_comes_through_unless_something_is_not_finite():
    class Demanding(nn.Module):
        def forward(self, x):
            if not bool(x.isfinite().all()):
                raise ValueError("finite inputs, please")
            if bool((x > 100).any()):
                raise ValueError("small inputs, please")
            return x

    class Root(nn.Module):
        def forward(self, x):
            return x.sqrt()

    model = nn.Sequential(Root(), Demanding())
    with pytest.raises(ValueError, match="small inputs"):
        look(model, torch.full((2, 2), 1e6))
    assert look(model, -torch.ones(2, 2)).non_finite == ("0", "the output of 0")


def test_a_container_is_not_blamed_for_its_childrens_weights():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.fc.weight.data.fill_(1e16)

        def forward(self, x):
            return self.fc(1e-20 * x).sum(1).sub(1e3).log()

    assert look(Outer(), torch.ones(2, 2)).non_finite == ("", "the output of the model")


def test_what_a_model_keeps_of_the_forward_pass_can_be_trained_with():
    """A table made at the first call, as rotary positions are, is no inference tensor afterwards."""

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.table = nn.Linear(3, 3), None

        def forward(self, x):
            if self.table is None:
                self.table = torch.linspace(0, 1, 3)
            return self.fc(x) * self.table

    model, x = Cached(), normal(4, 3)
    assert len(look(model, x).layers) == 1 and not model.table.is_inference()
    model(x).sum().backward()
    another = Cached()
    with torch.inference_mode():
        assert len(look(another, x).layers) == 1, "whatever mode it is asked in"


def test_an_activation_of_ones_own_that_has_weights_is_not_before_itself():
    class ReLU(nn.ReLU):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    m = look(nn.Sequential(nn.Linear(3, 4), ReLU(), nn.Linear(4, 2)), normal(5, 3))
    assert [(d.name, d.layer) for d in m.dead_layers] == [("1", "0")]


# -- what is measured ------------------------------------------------------------------------------


@pytest.mark.parametrize(("evaluations", "steps"), [(6, 1), (12, 1), (13, 2), (95, 8), (500, 8)])
def test_fixed_steps_stand_in_for_adaptive_ones(evaluations, steps):
    """rk4's, a step for each twelve evaluations, one to eight; blocks with steps of their own keep them."""
    own = resode.ODEBlock(Decay(1.0), solver="dopri5", n_steps=3)
    model = nn.Sequential(
        resode.ResidualStack(Decay(1.0), depth=2, solver="dopri5"), resode.ODEBlock(Decay(1.0)), own
    )
    watcher = SimpleNamespace(evaluations={"0": [6, evaluations], "1": [evaluations], "2": [500]})
    with _precise(model, watcher):  # type: ignore[arg-type]
        assert (model[0].solver, model[0].substeps) == ("rk4", steps)
        assert (model[1].solver, model[1].n_steps) == ("rk4", steps)
        assert (own.solver, own.n_steps) == ("dopri5", 3)
    assert (model[0].solver, model[0].substeps) == ("dopri5", 1)
    assert (model[1].solver, model[1].n_steps) == ("dopri5", None)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.GRU(2, 2)])
def test_cells_of_cudnn_are_left_out_where_there_are_any(model):
    before = torch.backends.cudnn.enabled
    with _precise(model, SimpleNamespace(evaluations={})):  # type: ignore[arg-type]
        assert torch.backends.cudnn.enabled == (before and not isinstance(model, nn.GRU))
    assert torch.backends.cudnn.enabled == before


def test_half_precision_is_measured_in_single():
    """A turn by 3 in float16: gain 3, from products in float32."""
    layer = nn.Linear(8, 8, bias=False)
    layer.weight.data = 3 * torch.linalg.qr(normal(8, 8))[0]
    m = look(nn.Sequential(layer).half(), normal(4, 8).half())
    assert m.layers[0].gain == pytest.approx(3, rel=1e-3) and layer.weight.dtype == torch.float16


def test_losses_and_layers_that_have_no_gradient():
    """A network of bare parameters, a frozen layer of constants, a detached loss: measured without what is missing."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.unused = nn.Parameter(torch.ones(3)), nn.ReLU()

        def forward(self, x):
            return x * self.weight

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.positions = nn.Linear(3, 3), nn.Linear(2, 3).requires_grad_(False)

        def forward(self, x):
            return self.fc(x) + self.positions(torch.ones(1, 2))

    assert look(Bare(), normal(4, 3)).layers == []
    assert [layer.name for layer in look(Constant(), normal(4, 3)).layers] == ["fc"]
    detached = measure(nn.Linear(3, 3), normal(4, 3), None, lambda y, t: y.detach().sum(1), None, 0)
    assert detached.layers == [] and math.isnan(detached.loss) and detached.non_finite is None


def test_the_last_state_is_the_last_blocks():
    """The second block takes the state back: x + (1 − x) is the same for every sample."""

    class Plus(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.fc.weight.data, self.fc.bias.data = rate * torch.eye(3), torch.ones(3)

        def forward(self, x):
            return x + self.fc(x)

    m = look(nn.Sequential(Plus(0.5), Plus(-1.0)), normal(6, 3))
    assert m.spread[0] > 0.5 and m.spread[1] == pytest.approx(0, abs=1e-6)


def test_a_gradient_along_the_state():
    """√n |cos|: √3 along it, 0 across, whatever the lengths."""
    x = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 7.0]])
    assert _radial(x, 5 * x) == pytest.approx(math.sqrt(3))
    assert _radial(x, torch.tensor([[0.0, 1.0, -1.0], [0.1, 0.2, 0.0]])) == pytest.approx(0, abs=1e-6)
    assert _radial(x, torch.tensor([[0.0, 1.0, -1.0], [0.0, 0.0, -0.1]])) == pytest.approx(math.sqrt(1.5))
    assert math.isnan(_radial(x, x[:, :2]))


# -- rules -----------------------------------------------------------------------------------------


def idle(m: Measures) -> list[str]:
    return [block for block, cause in told(m) if cause == "idle"]


def test_layers_that_no_gradient_reaches_are_few():
    """One of eight is an exception; two of six are how the network is made, and three have no siblings to tell."""
    cut = dict(gradient=0.0)
    assert idle(plain(8, {3: cut})) == ["layers.3"]
    assert idle(plain(8, {3: cut, 4: cut})) == ["layers.3", "layers.4"]
    assert idle(plain(6, {3: cut, 4: cut})) == [] == idle(plain(3, {2: cut}))


@pytest.mark.parametrize("factor", [0.5, 1e-3])
def test_signs_of_blocks_that_are_scaled(factor):
    """The sign is compared, however small the factor."""
    for signs in ((1, 1, 1, -1), (-1, -1, -1, 1)):
        m = residual(4, {i: dict(factor=factor * sign) for i, sign in enumerate(signs)})
        assert told(m) == [("blocks.3", "subtracted-branch")]


def test_where_no_number_of_additions_is_usual():
    siblings = [(f"blocks.{i}", "Block", n, True) for i, n in enumerate((2, 3, 1))]
    assert told(residual(siblings=siblings)) == []
    siblings = [(f"blocks.{i}", "Block", n, True) for i, n in enumerate((1, 1, 0))]
    assert "its siblings, x + F(x)," in only(residual(siblings=siblings)).advice


# -- arguments and notes ---------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0, -0.1, math.nan, True, "0.1", 1j])
def test_a_learning_rate_is_a_positive_number(lr):
    with pytest.raises(ValueError, match="lr must be a positive number"):
        diagnose(nn.Linear(2, 2), torch.ones(3, 2), lr=lr)


def test_what_was_in_training_mode_is_said():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    words = "in training mode; it was looked at in evaluation mode."
    x = normal(3, 2)
    assert diagnose(model.train(), x).notes[:1] == (f"The model was {words}",)
    assert diagnose(model.eval(), x).notes == ()
    model[1].train()
    assert diagnose(model, x).notes == (f"Parts of the model were {words}",)
    assert model[1].training and not model.training


@pytest.mark.parametrize(("lr", "target", "judged"), [(0.1, True, True), (None, True, False), (0.1, False, False)])  # fmt: skip
def test_a_learning_rate_needs_a_target(lr, target, judged):
    """Of ½‖Wx‖² with orthonormal inputs every curvature is the same, so that the limit is exact: 2·4/1."""
    layer = nn.Linear(4, 4, bias=False)
    found = diagnose(
        layer, torch.eye(4), torch.zeros(4, 4) if target else None, loss_fn=lambda y, t: 0.5 * y.square().sum(1), lr=lr
    )  # fmt: skip
    assert (found.training is not None) == judged
    if judged:
        assert found.training.limit == pytest.approx(8.0, rel=0.02) and found.training.lr == 0.1


def test_a_model_with_weights_of_its_own_is_not_copied():
    """Only weights made in inference mode are; else hooks and ties of the model itself are met."""
    model, met = nn.Sequential(nn.Linear(2, 2)), []
    model.register_forward_hook(lambda module, args, output: met.append(module))
    diagnose(model, normal(3, 2))
    assert met and all(module is model for module in met)
    assert measures.MANY == 300
