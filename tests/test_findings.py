"""The rules of a diagnosis, on measures made by hand: each threshold from both sides, and what is said and advised."""

import math
from dataclasses import replace

import pytest

from resode.analysis.diagnose.diagnose import too_fast
from resode.analysis.diagnose.findings import (
    WHOLE,
    Finding,
    block_scores,
    findings,
    first_causes,
    in_order,
    odd_weights,
    strength,
    usual_branch_gain,
)
from resode.analysis.diagnose.measures import (
    BlockMeasures,
    DeadMeasures,
    LayerMeasures,
    Measures,
    NormMeasures,
    RecurrenceMeasures,
    WeightMeasures,
)
from resode.analysis.diagnose.page import Training

NAN, INF = math.nan, math.inf


def block(i: int, **values) -> BlockMeasures:
    """An ordinary block; the sizes of ‖F‖ differ, as no norm ends the branches."""
    b = BlockMeasures(
        f"blocks.{i}", f"blocks.{i}", "Block", "identity", True, 1.0, 1.0,
        gain=1.1, branch_gain=0.5, sigma=1.5, radial=0.5, ratio=0.5, size=1.5**i, growth=1.1, dead=0.1, gradient=1.0,
    )  # fmt: skip
    return replace(b, **values)


def residual(n: int = 6, odd: dict[int, dict] | None = None, **values) -> Measures:
    """A healthy network of n blocks, but for what is odd by block and what else is given."""
    blocks = [block(i, **(odd or {}).get(i, {})) for i in range(n)]
    healthy = dict(whole_gain=3.0, whole_sigma=10.0, state_growth=2.0, spread=(1.0, 0.9, 0.8))
    order = {b.name: i for i, b in enumerate(blocks)}
    return Measures(8, 8, blocks=blocks, **{"order": order, **healthy, **values})


def plain(n: int = 6, odd: dict[int, dict] | None = None, **values) -> Measures:
    """A healthy network of n layers without shortcuts."""
    healthy = dict(gradient=1.0, size=1.0, spread=1.0, gain=1.0)
    layers = [LayerMeasures(f"layers.{i}", **{**healthy, **(odd or {}).get(i, {})}) for i in range(n)]
    order = {layer.name: i for i, layer in enumerate(layers)}
    return Measures(8, 8, layers=layers, **{"order": order, "spread": (1.0, NAN, 1.0), **values})


def weights(sizes: list[float], within: str = "blocks") -> list[WeightMeasures]:
    owner = (lambda i: f"blocks.{i}") if within else (lambda i: "")
    return [
        WeightMeasures(f"{within or 'layers'}.{i}{'.fc' if within else ''}", owner(i), "*", size)
        for i, size in enumerate(sizes)
    ]


def told(m: Measures) -> list[tuple[str, str]]:
    return [(f.block, f.cause) for f in findings(m)]


def only(m: Measures) -> Finding:
    [found] = findings(m)
    return found


def test_ordinary_measures_are_left_alone():
    assert told(residual()) == told(residual(3)) == told(residual(1)) == told(plain()) == told(plain(1)) == []
    assert told(Measures(1, 1)) == []


# -- places that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("the weights: bias of head", "weights of before"),
        ("the output of f, whose inputs and weights reach 1e+20", "had exploded before"),
        ("the inputs", "NaN and infinity in the data"),
        ("the targets", "NaN and infinity in the data"),
        ("the gradient at the output of f", "infinite at 0"),
        ("the output of f", "log, sqrt or a division"),
    ],
)
def test_what_is_not_finite_is_told_alone(what, words):
    m = residual(odd={1: dict(dead=1.0)}, non_finite=("f", what))
    found = only(m)
    assert (found.block, found.cause) == ("f", "non-finite") and words in found.advice and what in found.text
    m.non_finite = ("", what)
    assert only(m).block == WHOLE


# -- batch norm's statistics -----------------------------------------------------------------------


def norm(i: int, ratio: float = 1.0, untouched: bool = False, trained: bool = True) -> NormMeasures:
    return NormMeasures(f"norms.{i}", untouched, trained, ratio, 2 * ratio, 0.25)


@pytest.mark.parametrize(("ratio", "found"), [(99.0, 0), (101.0, 1), (1e-9, 0)])
def test_a_variance_too_small_for_these_inputs(ratio, found):
    """One-sided: a running variance that is too large is common in healthy networks."""
    m = residual(norms=[norm(0), norm(1, ratio), norm(2)])
    assert told(m) == [("norms.1", "norm-statistics")] * found
    if found:
        assert "does not belong to these inputs" in only(m).text and "variance is 101 times" in only(m).text
        assert only(m).evidence == {"variance_ratio": 101.0, "offset": 0.25}


@pytest.mark.parametrize(
    ("ratio", "trained", "found"),
    [(9.9, False, 0), (10.1, False, 1), (0.101, False, 0), (0.099, False, 1), (1.0, True, 1)],
)
def test_statistics_that_were_never_updated(ratio, trained, found):
    """Beside trained weights always a fault, beside fresh ones where they are ten times off."""
    m = residual(norms=[norm(0), norm(1, ratio, untouched=True, trained=trained), norm(2)])
    assert told(m) == [("norms.1", "norm-statistics")] * found
    if found:
        assert "was never updated" in only(m).text


def test_most_norms_never_updated_are_one_finding():
    unseen = [norm(0), *(norm(i, 0.05 * i, untouched=True) for i in (1, 2))]
    found = only(residual(norms=unseen))
    assert (found.block, found.evidence) == (WHOLE, {"variance_ratio": 0.05})
    assert "2 of 3 batch norms" in found.text and "norms.1 is 0.05" in found.text
    half = [norm(0), norm(3), *unseen[1:]]
    assert told(residual(norms=half)) == [("norms.1", "norm-statistics")], (
        "half are not most; and the first in order"
    )
    assert told(residual(norms=unseen[1:2])) == [("norms.1", "norm-statistics")], "one alone has a name"


# -- shortcuts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "cause"),
    [(0.81, None), (0.79, "scaled-shortcut"), (1.19, None), (1.21, "scaled-shortcut"), (-1.0, "scaled-shortcut"),
     (0.0, "no-shortcut"), (9e-4, "no-shortcut"), (-9e-4, "no-shortcut"), (1.1e-3, "scaled-shortcut"), (NAN, None)],
)  # fmt: skip
@pytest.mark.parametrize("n", [2, 3, 6])
def test_a_shortcut_against_its_siblings(factor, cause, n):
    """Against their median from three on, against x below."""
    m = residual(n, {1: dict(shortcut=factor)})
    assert told(m) == ([("blocks.1", cause)] if cause else [])
    if cause == "scaled-shortcut":
        found = only(m)
        assert found.evidence == {"factor": factor, "usual": 1.0}
        assert f"{factor:.3g}·x, and 1·x in {'a residual block' if n == 2 else 'its siblings'}" in found.text
    elif cause:
        assert "x + F(x)" in only(m).advice and f"multiplied by {factor:.3g}" in only(m).text


def test_siblings_may_all_have_another_factor():
    odd = {i: dict(shortcut=0.5) for i in range(6)}
    assert told(residual(odd=odd)) == []
    assert told(residual(2, odd)) == [("blocks.0", "scaled-shortcut"), ("blocks.1", "scaled-shortcut")]
    found = only(residual(odd=odd | {2: dict(shortcut=1.0)}))
    assert "1·x, and 0.5·x in its siblings" in found.text and "Make it 0.5·x" in found.advice
    assert "0.5·x + F(x)" in only(residual(odd=odd | {2: dict(shortcut=0.0)})).advice


@pytest.mark.parametrize(
    ("signs", "odd"),
    [("+++-", [3]), ("---+", [3]), ("++--", []), ("++-", []), ("+-", []), ("++++++--", [6, 7]), ("+++++--", []), ("++++", [])],
)  # fmt: skip
def test_a_sign_unlike_the_others(signs, odd):
    """A quarter of at least three blocks, at most; three cannot have so few."""
    m = residual(len(signs), {i: dict(factor=1.0 if s == "+" else -1.0) for i, s in enumerate(signs)})
    assert told(m) == [(f"blocks.{i}", "subtracted-branch") for i in odd]
    if odd:
        own, usual, sign = ("subtracts", "add", "+") if signs[0] == "+" else ("adds", "subtract", "−")
        found = findings(m)[0]
        assert (
            f"It {own} F(x), and its siblings {usual} it" in found.text and f"x {sign} F(x)" in found.advice
        )
        assert found.evidence == {"factor": m.blocks[odd[0]].factor}
    m.blocks[0].factor *= 1.5  # learned factors
    assert told(m) == []


def test_a_block_that_holds_fewer_additions_than_its_siblings():
    def siblings(additions, kind="Block", name="blocks.{}", keeps=True):
        return [(name.format(i), kind, n, keeps) for i, n in enumerate(additions)]

    assert told(residual(siblings=siblings([2, 2, 1, 2]))) == [("blocks.2", "no-shortcut")]
    assert "It has no shortcut" in only(residual(siblings=siblings([2, 2, 1, 2]))).text
    assert told(residual(siblings=siblings([1, 1, 0]))) == [("blocks.2", "no-shortcut")], "one of three"
    assert told(residual(siblings=siblings([1, 0]))) == [], "too few to compare"
    assert told(residual(siblings=siblings([2, 2, 1, 1]))) == [], "half are no exception"
    assert told(residual(siblings=siblings([2, 2, 2, 2, 1, 1]))) == [], "a third neither"
    assert told(residual(9, siblings=siblings([2] * 6 + [1, 1]))) == [
        ("blocks.6", "no-shortcut"),
        ("blocks.7", "no-shortcut"),
    ]
    assert told(residual(siblings=siblings([2, 2, 3, 2]))) == [], "more than usual is no fault"
    assert told(residual(siblings=siblings([2, 2, 1, 2], keeps=False))) == [], "a shortcut could not be x"
    assert told(residual(siblings=siblings([2, 2, 1, 2]), detached=["blocks.2.fc"])) == [], (
        "cut off, and told elsewhere"
    )
    # Sequentials are siblings by place, and lists of blocks are none.
    layers = [("branches.0", "Sequential", 1.0, True), ("branches.1", "Sequential", 1.0, True),
              ("branches.2", "Sequential", 0.0, True), ("other", "Sequential", 0.0, True)]  # fmt: skip
    assert told(residual(siblings=layers)) == [("branches.2", "no-shortcut")]
    lists = [(f"groups.{i}", "Sequential", n, True) for i, n in enumerate((3.0, 3.0, 2.0))]
    m = residual(siblings=lists)
    for i, b in enumerate(m.blocks):
        b.name = f"groups.{i // 2}.{i % 2}"
    assert told(m) == []


# -- dead units ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "found"), [(0.994, None), (0.9951, "99.51 %"), (1.0, "All")])
def test_dead_units(share, found):
    for m in (residual(odd={2: dict(dead=share)}), plain(dead_layers=[DeadMeasures("act", "fc", share)])):
        if found:
            assert only(m).cause == "dead" and only(m).text.startswith(f"{found} of the units")
            assert only(m).evidence == {"share": share}
            assert only(m).block in ("blocks.2", "fc")
        else:
            assert told(m) == []


def test_whose_units_are_dead():
    """A layer within a block is the block's; branches that all start at 0 are not dead; five are enough."""
    inside = [DeadMeasures("blocks.2.act", "blocks.2.fc", 1.0)]
    assert told(residual(dead_layers=inside)) == []
    zero = {i: dict(ratio=0.0, dead=1.0) for i in range(4)}
    assert told(residual(odd=zero)) == []
    assert told(residual(odd={i: zero[i] for i in range(3)}))[0] == ("blocks.0", "dead"), "half are not most"
    many = [DeadMeasures(f"act.{i}", f"fc.{i}", 1.0) for i in range(7)]
    m = plain(dead_layers=many, order={f"fc.{i}": i for i in range(7)})
    assert [f.block for f in findings(m)] == ["fc.0"], "what follows a dead layer may be dead by it"


# -- idle branches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usual", "own", "found"),
    [(0.5, 5.1e-4, 0), (0.5, 4.9e-4, 1), (5.0, 1.1e-3, 0), (5.0, 0.9e-3, 1), (0.5, 0.0, 1), (0.0, 0.0, 0)],
)
def test_a_branch_that_passes_nothing_on(usual, own, found):
    m = residual(odd={i: dict(branch_gain=own if i == 2 else usual) for i in range(6)})
    assert told(m) == [("blocks.2", "idle")] * found
    if found:
        assert only(m).evidence == {"branch_gain": own, "usual": usual}
        assert f"{own:.2g} of a perturbation, the median {usual:.2g}" in only(m).text


def test_kinds_of_branches_that_all_start_at_zero_are_adapters():
    odd = {i: dict(branch_gain=0.0, sibling="Adapter") for i in (1, 3)}
    assert told(residual(8, odd)) == []
    assert told(residual(8, odd | {5: dict(sibling="Adapter"), 6: dict(sibling="Adapter")})) == [
        ("blocks.1", "idle"),
        ("blocks.3", "idle"),
    ], "half of a kind are not most"
    assert told(residual(8, {1: odd[1]})) == [("blocks.1", "idle")], "one alone is no kind"


@pytest.mark.parametrize(("size", "found"), [(1.1e-3, 0), (0.9e-3, 1)])
def test_weights_that_are_nothing_beside_their_siblings(size, found):
    sizes = [1.0, 1.0, size, 1.0, 1.0]
    m = residual(5, weights=weights(sizes))
    assert told(m) == [("blocks.2", "idle")] * found
    if found:
        assert f"The weights of blocks.2.fc are {size:.2g} times those of its siblings" in only(m).text
    m = plain(5, weights=weights(sizes, ""))
    assert told(m) == [("layers.2", "idle")] * found
    if found:
        assert only(m).evidence == {"weights": size}
    sizes = [1.0, 1.0, 1.0, 1.0, size]
    assert told(plain(5, weights=weights(sizes, ""))) == [], "a last layer may start at 0"
    assert told(plain(5, weights=weights([1.0, 1.0, size], ""))) == [], "three are too few to tell"
    assert len(odd_weights(residual(5, weights=weights(sizes)))) == 5
    assert odd_weights(residual(5, weights=weights([1.0, 1.0, 1.0]))) == {}
    assert odd_weights(residual(5, weights=weights([0.0] * 5))) == {}


def test_weights_that_no_gradient_reaches():
    names = [f"blocks.{i}.{part}" for i in range(6) for part in ("a", "b")]
    order = {name: i for i, name in enumerate(names)}
    cut = residual(order=order, detached=["blocks.3.a", "blocks.3.b"])
    assert told(cut) == [("blocks.3", "idle")] and "No gradient reaches" in only(cut).text
    assert told(residual(order=order, detached=["blocks.1.a", "blocks.3.a"])) == [], (
        "two of six are no exception"
    )
    few = {name: i for name, i in order.items() if int(name.split(".")[1]) < 3}
    assert told(residual(3, order=few, detached=["blocks.1.a"])) == [], "three are too few to tell"
    grads = {i: dict(gradient=0.0 if i == 3 else 1.0) for i in range(6)}
    assert told(plain(odd=grads)) == [("layers.3", "idle")]
    assert told(plain(odd={0: dict(gradient=0.0)})) == [(WHOLE, "vanishing")], (
        "before a cut no layer is to blame"
    )


# -- strong blocks ---------------------------------------------------------------------------------

STRONG = dict(branch_gain=0.5 * 6.1, gain=1.1 * 1.09, ratio=0.5 * 3.1)


@pytest.mark.parametrize(
    ("change", "found"),
    [({}, 1), (dict(branch_gain=0.5 * 5.9), 0), (dict(gain=1.1 * 1.07), 0), (dict(ratio=0.5 * 2.9), 0),
     (dict(ratio=0.5, size=3.1), 1), (dict(ratio=0.5, size=2.9), 0),
     (dict(radial=0.09), 0), (dict(radial=0.11), 1), (dict(radial=0.09, size=3.1), 1), (dict(branch_gain=NAN), 0)],
)  # fmt: skip
def test_a_block_far_stronger_than_its_siblings(change, found):
    """By its branch's gain (6 medians), with its gain (1.08) and ‖F‖ or ‖F‖/‖x‖ (3), of which behind a norm ‖F‖ counts."""
    m = residual(7, {3: STRONG | change})
    for b, size in zip(m.blocks, (0.5, 0.8, 1.0, change.get("size", 1.0), 1.0, 1.2, 2.0), strict=True):
        b.size = size
    assert told(m) == [("blocks.3", "strong-block")] * found
    if found:
        usual = 0.5
        own = m.blocks[3].branch_gain
        assert usual_branch_gain(m, m.blocks[3]) == usual
        assert only(m).evidence == {"branch_gain": own, "usual": usual, "sigma": 1.5, "scale": usual / own}
        assert f"by {own:.3g}, {own / usual:.3g} times the median" in only(m).text
        assert (
            f"Multiply its branch by {usual / own:.2g}" in only(m).advice and "weights of" not in only(m).text
        )


def test_what_makes_a_block_strong():
    """A jump from the siblings beside it; twice as much for the first block, and against other kinds of blocks."""
    near = 0.5 * 6.1 / 2.4
    assert told(residual(odd={3: STRONG, 2: dict(branch_gain=near)})) == []
    assert told(residual(odd={3: STRONG, 4: dict(branch_gain=near)})) == []
    assert told(residual(odd={3: STRONG, 4: dict(branch_gain=0.5 * 6.1 / 2.6)})) == [
        ("blocks.3", "strong-block")
    ]
    assert told(residual(odd={0: STRONG})) == []
    twice = dict(branch_gain=0.5 * 12.2, gain=1.1 * 2.2, ratio=0.5 * 6.2)
    assert told(residual(odd={0: twice})) == [("blocks.0", "strong-block")]
    assert told(residual(odd={3: STRONG | dict(sibling="Other")})) == []
    assert told(residual(odd={3: twice | dict(sibling="Other")})) == [("blocks.3", "strong-block")]
    assert told(residual(odd={3: STRONG, 5: STRONG})) == [("blocks.3", "strong-block")], (
        "the first, which may cause the rest"
    )
    called = {i: dict(name="blocks.0", **(STRONG if i == 3 else {})) for i in range(4)}
    assert told(residual(6, called)) == [], "one that is called most of the time"


def test_a_block_is_strong_by_its_largest_singular_value_or_by_its_weights():
    strong = dict(sigma=1.5 * 8.1, ratio=0.5 * 3.1, branch_gain=0.5 * 2.6)
    assert told(residual(odd={3: strong})) == [("blocks.3", "strong-block")]
    assert told(residual(odd={3: strong | dict(sigma=1.5 * 7.9)})) == []
    assert told(residual(odd={3: strong | dict(branch_gain=0.5 * 2.4)})) == []
    assert told(residual(odd={3: strong | dict(ratio=0.5 * 2.9)})) == []
    sizes = [1.0, 1.0, 1.0, 8.1, 1.0, 1.0]
    heavy = residual(odd={3: dict(branch_gain=0.5 * 2.1)}, weights=weights(sizes))
    assert told(heavy) == [("blocks.3", "strong-block")]
    assert "The weights of blocks.3.fc are 8.1 times those of its siblings" in only(heavy).text
    assert told(residual(odd={3: dict(branch_gain=0.5 * 1.9)}, weights=weights(sizes))) == []
    assert (
        told(
            residual(
                odd={3: dict(branch_gain=0.5 * 2.1)}, weights=weights([7.9 if s > 2 else s for s in sizes])
            )
        )
        == []
    )


def test_a_block_without_others_to_compare():
    """Below four blocks, or where most branches are switched off, its own gain counts: 30."""
    for n, odd in ((3, {}), (6, {i: dict(branch_gain=0.0) for i in range(6) if i != 1})):
        m = residual(n, odd | {1: dict(branch_gain=31.0)})
        assert told(m) == [("blocks.1", "strong-block")]
        assert strength(m, m.blocks[1]) == pytest.approx(31 / 30)
        assert f"Multiply its branch by {1 / 31:.2g}" in only(m).advice
        assert told(residual(n, odd | {1: dict(branch_gain=29.0)})) == []


def test_equal_sizes_are_a_norms_and_tell_alone():
    """Where a norm ends each branch the sizes are equal, and ‖F‖/‖x‖ tells of the state."""
    m = residual(odd={3: STRONG})
    for b in m.blocks:
        b.size = 1.0
    assert told(m) == []
    m.blocks[3].size = 3.1
    assert told(m) == [("blocks.3", "strong-block")]


@pytest.mark.parametrize(
    ("size", "gain", "n", "found"),
    [(12.1, 6.1, 5, 1), (11.9, 6.1, 5, 0), (12.1, 5.9, 5, 0), (12.1, 6.1, 2, 0)],
)
def test_a_heavy_layer_of_a_network_without_shortcuts(size, gain, n, found):
    sizes = [1.0, size, 1.0, 1.0, 1.0][:n]
    m = plain(n, {1: dict(gain=gain)}, weights=weights(sizes, ""))
    assert told(m) == [("layers.1", "strong-block")] * found
    if found:
        assert only(m).evidence == {"weights": size, "gain": gain, "scale": 1 / size}
        assert f"{size:.3g} times the median" in only(m).text and f"by {1 / size:.2g}" in only(m).advice
        small = plain(n, {1: dict(gain=gain)}, weights=weights([0.1, 0.1 * size, 0.1, 0.1, 0.1], ""))
        assert told(small) == [], "1 keeps a unit's variance, below nothing is heavy"
        last = plain(n, {4: dict(gain=gain)}, weights=weights([1.0, 1.0, 1.0, 1.0, size], ""))
        assert told(last) == [], "an output's unit may scale the last layer"


# -- time, heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "found"), [(990.0, 0), (1010.0, 1), (NAN, 0)])
def test_the_gradient_through_time(ratio, found):
    m = plain(recurrences=[RecurrenceMeasures("rnn", "RNN", 8, ratio)])
    assert told(m) == [("rnn", "explosion")] * found
    if found:
        assert only(m).evidence == {"gradient_ratio": ratio, "steps": 8.0} and "of 8 time" in only(m).text


@pytest.mark.parametrize(
    ("after", "loss", "classes", "found"),
    [
        (0.9e-3, 24.0, 10, 1),
        (1.1e-3, 24.0, 10, 0),
        (0.9e-3, 22.0, 10, 0),
        (0.9e-3, 24.0, 1, 0),
        (0.9e-3, NAN, 10, 0),
    ],
)
def test_a_head_whose_logits_are_alike_and_wrong(after, loss, classes, found):
    """Against ten times the loss of equal logits, 10 log 10 = 23.03."""
    layers = [LayerMeasures(n, 1.0, 1.0, 1.0, 1.0) for n in ("fc", "head")]
    m = residual(layers=layers, spread=(1.0, 1.0, after), loss=loss, classes=classes)
    assert told(m) == [("head", "collapse")] * found
    if found:
        assert only(m).evidence == {"spread": after, "spread_before": 1.0, "loss": loss}
        assert "2.3 where all are equal" in only(m).text
    m = Measures(8, 8, layers=layers, spread=(9.0, NAN, after), loss=loss, classes=classes)
    assert told(m) == [("head", "collapse")] * found, "without blocks against the layer before"


# -- the whole depth -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "growth", "cause"),
    [(990.0, 310.0, None), (1010.0, 310.0, "explosion"), (1010.0, 290.0, None), (0.99e5, 2.0, None), (1.01e5, 2.0, "explosion"),
     (10.0, 990.0, None), (10.0, 1010.0, "explosion"), (1.01e-3, 1.0, None), (0.99e-3, 1.0, "vanishing"), (INF, 2.0, "explosion")],
)  # fmt: skip
def test_the_gain_of_the_whole_depth(sigma, growth, cause):
    m = residual(16, whole_sigma=sigma, state_growth=growth)
    assert told(m) == ([(WHOLE, cause)] if cause else [])
    if cause:
        found = only(m)
        assert found.evidence == {"sigma": sigma, "gain": 3.0, "state_growth": growth, "blocks": 16.0}
        if cause == "explosion":
            shown = "more than 1e38" if sigma == INF else f"up to {sigma:.3g}"
            assert f"16 blocks amplify a perturbation {shown} times and the state {growth:.3g}" in found.text
            assert "by 1/√16 = 0.25" in found.advice
        else:
            assert "Give each block the shortcut x" in found.advice
    m.whole_sigma, m.whole_gain = NAN, sigma  # of functions that can be differentiated once
    assert told(m) == ([(WHOLE, cause)] if cause else [])


def test_vanishing_by_scaled_shortcuts():
    for factor, words in ((0.89, "Their shortcuts are 0.89·x"), (0.91, "Give each block the shortcut x")):
        m = residual(whole_sigma=1e-4, odd={i: dict(shortcut=factor) for i in range(6)})
        assert words in only(m).advice


@pytest.mark.parametrize(
    ("first", "cause"),
    [
        (0.99e4, None),
        (1.01e4, "explosion"),
        (1.01e-4, None),
        (0.99e-4, "vanishing"),
        (INF, None),
        (NAN, None),
    ],
)
def test_gradients_of_layers_without_shortcuts(first, cause):
    """Of the first layer over the last but the head."""
    m = plain(5, {0: dict(gradient=first), 3: dict(gradient=1.0), 4: dict(gradient=1e9)})
    assert told(m) == ([(WHOLE, cause)] if cause else [])
    if cause:
        assert only(m).evidence == {"gradient_ratio": first, "layers": 5.0}
        assert f"{first:.2g} times as large at the first of 5 layers" in only(m).text
    assert told(plain(2, {0: dict(gradient=first)})) == []
    assert told(plain(5, {0: dict(gradient=first), 3: dict(gradient=0.0), 4: dict(gradient=1.0)})) in (
        [],
        [("layers.3", "idle")],
    )


@pytest.mark.parametrize(("after", "found"), [(2.1e-3, 0), (1.9e-3, 1)])
def test_different_inputs_that_come_out_as_one_state(after, found):
    """A thousandth of the inputs' difference, here 2."""
    m = residual(spread=(2.0, after, 0.5))
    assert told(m) == [(WHOLE, "collapse")] * found
    if found:
        assert only(m).evidence == {"spread": after, "spread_of_inputs": 2.0}
        assert "Start the blocks' last layers at 0" in only(m).advice
    m = plain(
        spread=(2.0, NAN, 0.5), odd={i: dict(spread=2 * (after / 2) ** ((i + 1) / 5)) for i in range(5)}
    )
    assert told(m) == [(WHOLE, "collapse")] * found
    if found:
        assert "Give it shortcuts" in only(m).advice and "most of it" not in only(m).text


def test_the_layer_in_which_the_inputs_differences_go():
    """Below √(1/1000) = 0.032 in one layer."""
    for drop, named in ((0.031, True), (0.033, False)):
        spreads = [1.0, 1.0, drop, drop, 5e-4, 0.5]
        found = only(plain(odd={i: dict(spread=s) for i, s in enumerate(spreads)}))
        assert (found.cause, found.block) == ("collapse", WHOLE)
        if named:
            assert (
                found.advice == "Initialise layers.4 anew, and train on."
                and "most of it in layers.4" in found.text
            )
    spreads = [1.0, 1.0, 1e-4, 1e-4, 1e-4, 0.5]
    assert "layers.2" in only(plain(odd={i: dict(spread=s) for i, s in enumerate(spreads)})).advice


def test_a_state_divided_by_variances_that_are_too_large():
    wide = [norm(0, 0.09), norm(1, 0.01), norm(2)]
    found = only(residual(norms=wide, spread=(1.0, 1e-4, 1.0)))
    assert (found.block, found.cause) == (WHOLE, "norm-statistics")
    assert found.evidence == {"spread": 1e-4, "variance_ratio": 0.01}
    assert "2 of 3 batch norms" in found.text and "up to 1e+02 times theirs" in found.text
    assert only(residual(norms=[*wide, norm(3)], spread=(1.0, 1e-4, 1.0))).cause == "collapse"
    assert (
        only(residual(norms=[norm(0, 0.11), norm(1, 0.01), norm(2)], spread=(1.0, 1e-4, 1.0))).cause
        == "collapse"
    )


def test_layers_whose_units_are_all_the_same():
    found = only(plain(4, alike=["layers.0", "layers.1"]))
    assert (found.block, found.cause, found.evidence) == (WHOLE, "collapse", {"layers": 2.0})
    assert "All units of layers.0, and of 1 more layers" in found.text
    assert told(plain(5, alike=["layers.0", "layers.1"])) == [], "less than half"
    assert told(plain(2, alike=["layers.0"])) == [], "one alone"


# -- order -----------------------------------------------------------------------------------------


def test_what_may_be_caused_by_an_earlier_fault_is_left_out():
    def finding(name, cause):
        return Finding(name, cause, "", "")

    m = Measures(1, 1, order={"a": 0, "b": 1, "c": 2})
    found = [finding("c", "dead"), finding("b", "strong-block"), finding("a", "idle")]
    assert [f.block for f in first_causes(m, found)] == ["a"]
    assert [f.block for f in first_causes(m, [finding("c", "idle"), finding("b", "strong-block")])] == [
        "b",
        "c",
    ]
    assert [f.block for f in first_causes(m, [finding("c", "idle"), finding(WHOLE, "dead")])] == [WHOLE, "c"]
    both = [
        finding("a", "dead"),
        finding("a", "no-shortcut"),
        finding(WHOLE, "vanishing"),
        finding(WHOLE, "collapse"),
    ]
    assert [f.cause for f in in_order(both)] == ["no-shortcut", "collapse", "vanishing"]
    assert str(Finding("a", "idle", "It is.", "Do.")) == "a: idle. It is. Do."


def test_causes_by_block():
    """Of a finding at the block, around it, or within it; the first of several."""
    m = residual(3)
    found = [
        Finding("blocks.0", "idle", "", ""),
        Finding("blocks.1.fc", "dead", "", ""),
        Finding("blocks.0", "dead", "", ""),
    ]
    assert [cause for _, cause in block_scores(m, found)] == ["idle", "dead", ""]
    assert [cause for _, cause in block_scores(m, [Finding("blocks", "stiff", "", "")])] == ["stiff"] * 3


def test_too_fast_a_learning_rate():
    found = too_fast(Training(8.0, 0.4, 20.0))
    assert (found.block, found.cause) == (WHOLE, "learning-rate")
    assert (
        found.text.startswith("lr 8 is 20 times its limit 0.4")
        and "Start with 0.2, or with a warm-up to 0.4" in found.advice
    )
    assert found.evidence == {"lr": 8.0, "limit": 0.4, "ratio": 20.0}
