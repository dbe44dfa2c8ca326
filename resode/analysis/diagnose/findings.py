r"""From what was measured to what is wrong: rules in the order of harm, and silence where none applies.

Faults of one place (a number that is not finite, statistics, a shortcut, dead units, an idle or a strong
branch) come before those of the whole depth, which they cause. Every threshold was fitted on one half of a
clinic of healthy and broken networks and is reported on the other: `python -m tests.benchmarks.clinic`.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from resode.analysis.diagnose.measures import BlockMeasures, Measures, NormMeasures, WeightMeasures
from resode.results import Result

WHOLE = "whole network"

CAUSES = (
    "non-finite",
    "norm-statistics",
    "no-shortcut",
    "scaled-shortcut",
    "subtracted-branch",
    "stiff",
    "overstep",
    "dead",
    "idle",
    "strong-block",
    "collapse",
    "explosion",
    "vanishing",
    "learning-rate",
)
"""In this order where one place shows several: the earlier explains the later."""

CONSEQUENCES = ("norm-statistics", "dead", "strong-block", "collapse")
"""Causes that another fault before them in the forward pass may bring about."""


@dataclass(frozen=True)
class Finding(Result):
    """One thing that is wrong.

    Args:
        block: the name of a module, or "whole network".
        cause: one of `resode.analysis.diagnose.findings.CAUSES`.
        text: what is wrong there, in a sentence.
        advice: what to do; tried on such networks.
        evidence: the numbers that it rests on, by name.
    """

    block: str
    cause: str
    text: str
    advice: str
    evidence: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.block}: {self.cause}. {self.text} {self.advice}"


@dataclass(frozen=True)
class Thresholds:
    """Where a measure stops being ordinary.

    Args:
        variance: of the inputs over a batch norm's running variance, 0.9 quantile of the channels.
        never_updated: how far off statistics that were never updated may be: variances as a ratio.
        shortcut: relative difference of a shortcut's factor from its siblings'.
        dead: share of units at 0.
        idle: branch gain relative to the median.
        strong: branch gain relative to the median; twice that for the first block.
        strong_gain: gain relative to the median that goes with it.
        strong_output: ‖F‖ or ‖F‖/‖x‖ relative to its median that goes with it: a gain alone is large behind a
            norm where the state is small.
        jump: branch gain relative to the siblings right before and after.
        weights: of a layer relative to those at the same place in its siblings.
        sigma: largest singular value relative to the median; twice that for the first block.
        alone: branch gain in networks with too few blocks for a median.
        whole: largest singular value of the whole depth; its inverse is the least.
        state_growth: ‖x_L‖/‖x_0‖.
        grows: ‖x_L‖/‖x_0‖ that goes with `whole`: behind norms the state stays, and at the start of a network
            with batch norm the gradient grows by a fifth a layer, which training bears; and branches that end
            with a norm grow a state from embeddings of 0.02 some 100 times.
        normed: largest singular value of the whole depth where the state does not grow so.
        gradient_ratio: first over last layer's gradient in networks without shortcuts, and its inverse.
        collapse: how different the samples still are, relative to the inputs.
        heavy: weights relative to the median of all layers, in networks without shortcuts.
        heavy_gain: output over input, in size, that goes with it.
        through_time: gradient at the first time step over that at the last.
        surprised: loss over that of equal logits, from which logits that are alike are wrong.
        learning_rate: lr over its limit.
    """

    variance: float = 100.0
    never_updated: float = 10.0
    shortcut: float = 0.2
    dead: float = 0.995
    idle: float = 1e-3
    strong: float = 6.0
    strong_gain: float = 1.08
    strong_output: float = 3.0
    jump: float = 2.5
    weights: float = 8.0
    sigma: float = 8.0
    alone: float = 30.0
    whole: float = 1e3
    state_growth: float = 1e3
    grows: float = 300.0
    normed: float = 1e5
    gradient_ratio: float = 1e4
    collapse: float = 1e-3
    heavy: float = 12.0
    heavy_gain: float = 6.0
    through_time: float = 1e3
    surprised: float = 10.0
    learning_rate: float = 10.0


THRESHOLDS = Thresholds()

FEWEST = 4  # blocks from which a median tells what is usual
_NORMED = 0.02  # median deviation of log ‖F‖ of siblings up to which a norm sets it
_FREE = 0.1  # how little a branch depends on ‖x‖ behind a norm


def findings(m: Measures) -> list[Finding]:
    """What is wrong with the network that was measured, without its solver and its learning rate."""
    if m.non_finite is not None:
        return [_non_finite(m.non_finite)]
    t = THRESHOLDS
    local = [*_norm_statistics(m, t), *_shortcuts(m, t), *_dead(m, t), *_idle(m, t), *_strong(m, t)]
    local += [*_heavy(m, t), *_through_time(m, t), *_flat_head(m, t), *_switched_off(m, t)]
    return first_causes(m, local) or _whole(m, t)


def first_causes(m: Measures, local: Iterable[Finding]) -> list[Finding]:
    """Faults of one place in the order of the forward pass, without what an earlier one may have caused.

    A strong block disturbs the statistics and activations after it, and never those before.
    """
    ordered = sorted(in_order(local), key=lambda f: m.order.get(f.block, -1))
    return [f for i, f in enumerate(ordered) if i == 0 or f.cause not in CONSEQUENCES]


def in_order(found: Iterable[Finding]) -> list[Finding]:
    """By cause, most harmful first; the first finding of a place alone."""
    kept: dict[str, Finding] = {}
    for f in sorted(found, key=lambda f: CAUSES.index(f.cause)):
        kept.setdefault(f.block if f.block != WHOLE else f"{WHOLE} {f.cause}", f)
    return list(kept.values())


def _non_finite(place: tuple[str, str]) -> Finding:
    block, what = place
    if what.startswith("the weights"):
        advice = "Load weights of before, or initialise this module anew and train on."
    elif "reach" in what:
        advice = (
            "It overflows, because the state or the weights had exploded before: look at a checkpoint of "
            "before, or at fresh weights."
        )
    elif what in ("the inputs", "the targets"):
        advice = (
            "Look for NaN and infinity in the data, and for a division by a deviation of 0 in their making."
        )
    elif what.startswith("the gradient"):
        advice = (
            "Look right after it for a function whose derivative is infinite at 0 (sqrt, norm, log, "
            "division): add "
            "an ε under it."
        )
    else:
        advice = (
            "Its inputs and its weights are finite: look there for log, sqrt or a division without an ε, and "
            "for an overflow (float16: take bfloat16 or float32)."
        )
    return Finding(block or WHOLE, "non-finite", f"The first number that is not finite is in {what}.", advice)


def _norm_statistics(m: Measures, t: Thresholds) -> list[Finding]:
    advice = (
        "Measure its statistics anew: some 20 training batches through the model in training mode, "
        "without updates"
    )
    unseen = [
        n for n in m.norms if n.untouched and (n.trained or _factor(n.variance_ratio) > t.never_updated)
    ]
    if len(unseen) > 1 and len(unseen) > 0.5 * len(m.norms):
        return [
            Finding(
                WHOLE,
                "norm-statistics",
                f"{len(unseen)} of {len(m.norms)} batch norms have never seen a batch: their statistics are "
                f"the 0 and 1 that they were made with, and the inputs' variance at {unseen[0].name} is "
                f"{unseen[0].variance_ratio:.3g}.",
                f"{advice}.",
                {"variance_ratio": unseen[0].variance_ratio},
            )
        ]
    return [
        Finding(
            n.name,
            "norm-statistics",
            f"Its running variance "
            f"{'was never updated' if n in unseen else 'does not belong to these inputs'}: their "
            f"variance is {n.variance_ratio:.3g} times that.",
            f"{advice}; if these are no training inputs, compare how both are normalised.",
            {"variance_ratio": n.variance_ratio, "offset": n.offset},
        )
        for n in m.norms
        if n in unseen or n.variance_ratio > t.variance
    ]


def _factor(ratio: float) -> float:
    """How far a ratio is from 1, at least 1."""
    return max(ratio, 1 / max(ratio, 1e-30))


def _shortcuts(m: Measures, t: Thresholds) -> list[Finding]:
    found = []
    known = [b for b in m.blocks if math.isfinite(b.shortcut)]
    usual = statistics.median(b.shortcut for b in known) if len(known) >= 3 else 1.0
    siblings = "in its siblings" if len(known) >= 3 else "in a residual block"
    for b in known:
        off = abs(b.shortcut - usual) > t.shortcut * abs(usual)
        if off and abs(b.shortcut) < 1e-3:
            found.append(_no_shortcut(b.name, f"Its shortcut is multiplied by {b.shortcut:.3g}", usual))
        elif off:
            found.append(
                Finding(
                    b.name,
                    "scaled-shortcut",
                    f"Its shortcut is {b.shortcut:.3g}·x, and {usual:.3g}·x {siblings}.",
                    f"Make it {usual:.3g}·x, and train on where it was trained so.",
                    {"factor": b.shortcut, "usual": usual},
                )
            )
    for b, verb, usual_verb in _subtracted(m):
        found.append(
            Finding(
                b.name,
                "subtracted-branch",
                f"It {verb}s F(x), and its siblings {usual_verb} it.",
                f"Write x {'+' if usual_verb == 'add' else '−'} F(x), and train on where it was trained so.",
                {"factor": b.factor},
            )
        )
    return found + _without_shortcut(m)


def _subtracted(m: Measures) -> list[tuple[BlockMeasures, str, str]]:
    """Few blocks whose sign differs from that of the others; learned factors differ in size too."""
    if len(m.blocks) < 3 or len({f"{abs(b.factor):.6g}" for b in m.blocks}) > 1:
        return []
    words = {True: "add", False: "subtract"}
    usual = sum(b.factor > 0 for b in m.blocks) > 0.5 * len(m.blocks)
    odd = [b for b in m.blocks if (b.factor > 0) != usual]
    return [(b, words[not usual], words[usual]) for b in odd] if len(odd) <= 0.25 * len(m.blocks) else []


def _no_shortcut(name: str, what: str, usual: float) -> Finding:
    shown = "x" if usual == 1 else f"{usual:.3g}·x"
    return Finding(
        name,
        "no-shortcut",
        f"{what}: the state and its gradient pass through F alone.",
        f"Give it the shortcut of its siblings, {shown} + F(x), and train on where it was trained so.",
        {"factor": 0.0},
    )


def _without_shortcut(m: Measures) -> list[Finding]:
    """Modules that keep their input's shape and hold fewer additions than their siblings of one class."""
    classes: dict[str, list[tuple[str, float]]] = {}
    blocks = [b.name for b in m.blocks]
    for name, kind, additions, keeps in m.siblings:
        if kind == "Sequential":  # of layers, as the branches of a loop, and not of blocks
            kind = re.sub(r"\d+", "*", name)
            keeps = keeps and not any(b.startswith(f"{name}.") for b in blocks)
        if keeps and not any(n.startswith(f"{name}.") for n in m.detached):
            classes.setdefault(kind, []).append((name, additions))
    found = []
    for members in classes.values():
        usual, times = Counter(n for _, n in members).most_common(1)[0]
        # A group of blocks without shortcuts is made so, as the last one of some networks.
        whole = {_container(name) for name, n in members if n >= usual}
        odd = [name for name, n in members if n < usual and _container(name) in whole]
        if len(members) >= 3 and times > 0.5 * len(members) and 0 < len(odd) <= max(1, 0.25 * len(members)):
            found += [
                _no_shortcut(name, "It has no shortcut, and its siblings have one", 1.0) for name in odd
            ]
    return found


def _container(name: str) -> str:
    """The list that a block is in: its name up to its last number."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1]]) if numbers else ""


def _dead(m: Measures, t: Thresholds) -> list[Finding]:
    off = sum(b.ratio == 0 for b in m.blocks) > 0.5 * len(m.blocks)  # branches that start at 0 are not dead
    shares = [(b.name, b.dead) for b in m.blocks if b.dead > t.dead and not (off and b.ratio == 0)]
    within = tuple(f"{b.name}." for b in m.blocks)
    outside = [d for d in m.dead_layers if d.share > t.dead and not d.name.startswith(within)]
    shares += [(d.layer, d.share) for d in outside]
    return [
        Finding(
            name,
            "dead",
            f"{_percent(share)} of the units behind an activation are 0 at all inputs, and get no gradient.",
            "Set the bias of the layer before the activation to 0, or initialise that layer anew, and train "
            "on.",
            {"share": share},
        )
        for name, share in shares[:5]
    ]


def _percent(share: float) -> str:
    return "All" if share == 1 else f"{100 * share:.4g} %"


def siblings_of(m: Measures, b: BlockMeasures) -> list[BlockMeasures]:
    """Blocks of the same class and place within it; all blocks where those are too few."""
    known = [c for c in m.blocks if math.isfinite(c.branch_gain)]
    own = [c for c in known if c.sibling == b.sibling]
    return own if len(own) >= FEWEST else known


def usual_branch_gain(m: Measures, b: BlockMeasures) -> float:
    """The median gain of its siblings' branches, nan where there are too few."""
    known = siblings_of(m, b)
    return statistics.median(c.branch_gain for c in known) if len(known) >= FEWEST else math.nan


def odd_weights(m: Measures) -> dict[str, list[tuple[WeightMeasures, float]]]:
    """Layers by block, with the size of their weights over the median of those at the same place."""
    places: dict[str, list[WeightMeasures]] = {}
    for w in m.weights:
        places.setdefault(w.place, []).append(w)
    found: dict[str, list[tuple[WeightMeasures, float]]] = {}
    for layers in places.values():
        usual = statistics.median(w.size for w in layers)
        if usual > 0 and len({w.block for w in layers}) >= FEWEST:
            for w in layers:
                found.setdefault(w.block, []).append((w, w.size / usual))
    return found


def _switched_off(m: Measures, t: Thresholds) -> list[Finding]:
    """Layers of a network without shortcuts whose weights are nothing beside those at the same place."""
    places: dict[str, list[WeightMeasures]] = {}
    for w in m.weights:
        places.setdefault(re.sub(r"\d+", "*", w.name), []).append(w)
    last = m.layers[-1].name if m.layers else ""
    found = []
    for layers in places.values() if not m.blocks else ():
        usual = statistics.median(w.size for w in layers)
        found += [
            Finding(
                w.name,
                "idle",
                f"Its weights are {w.size / usual:.2g} times those of its siblings: it passes nothing on "
                "that depends on its input.",
                "Initialise it anew and train on.",
                {"weights": w.size / usual},
            )
            for w in layers
            if len(layers) >= FEWEST and w.size < t.idle * usual and w.name != last
        ]
    return found


def _idle(m: Measures, t: Thresholds) -> list[Finding]:
    found = []
    weights = odd_weights(m)
    for b in m.blocks:
        usual = usual_branch_gain(m, b)
        small = min(weights.get(b.name, []), key=lambda pair: pair[1], default=None)
        alike = [c for c in m.blocks if c.sibling == b.sibling and c.branch_gain < t.idle * min(usual, 1.0)]
        adapters = len(alike) > 1 and 2 * len(alike) > sum(c.sibling == b.sibling for c in m.blocks)
        if usual > 0 and b in alike and not adapters:  # which start at 0, all of their kind
            text = f"Its branch passes on {b.branch_gain:.2g} of a perturbation, the median {usual:.2g}"
        elif small is not None and small[1] < t.idle:
            text = f"The weights of {small[0].name} are {small[1]:.2g} times those of its siblings"
        else:
            continue
        found.append(
            Finding(
                b.name,
                "idle",
                f"{text}: it adds nothing that depends on its input.",
                "Initialise its last layer anew (its scale, where it has one) and train on, or remove the "
                "block.",
                {"branch_gain": b.branch_gain, "usual": usual},
            )
        )
    return found + _detached(m)


def _detached(m: Measures) -> list[Finding]:
    """Weights that no gradient reaches, though it reaches those at the same place of their siblings."""

    def place(name: str) -> str:
        return re.sub(r"\d+", "*", name)

    still = _without_gradient(m)
    times = Counter(place(name) for name in m.order)
    cut = Counter(place(name) for name in {*m.detached, *still})
    odd = [n for n in m.detached if times[place(n)] >= FEWEST and cut[place(n)] <= 0.25 * times[place(n)]]
    blocks = dict.fromkeys(_numbered(name) for name in odd)
    layers = [n for n in still if times[place(n)] >= FEWEST and cut[place(n)] <= 0.25 * times[place(n)]]
    blocks |= dict.fromkeys(_common(layers, _numbered(name)) for name in layers if name not in m.detached)
    return [
        Finding(
            name,
            "idle",
            "No gradient reaches its weights, and it reaches those of its siblings.",
            "Look for detach(), no_grad() or .data on its way to the output, or for a gate that is 0 (the "
            "router's weights of an expert: initialise them anew), and train on without it.",
        )
        for name in blocks
    ]


def _without_gradient(m: Measures) -> list[str]:
    """Layers whose output's gradient is 0, after one that has a gradient: depth does that the other way."""
    most: dict[str, float] = {}
    for layer in m.layers:
        most[layer.name] = max(most.get(layer.name, 0.0), layer.gradient)
    found, before = [], 0.0
    for name, gradient in most.items():
        if before > 0 and gradient == 0:
            found.append(name)
        before = max(before, gradient)
    return found


def _common(names: Sequence[str], block: str) -> str:
    """The innermost module that holds all of these that lie in a block."""
    parts = [n.split(".") for n in names if n.startswith(f"{block}.")]
    shared = [p[0] for p in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*parts, strict=False))]
    return ".".join(shared) or block


def _numbered(name: str) -> str:
    """The module up to its first number: the block of a list."""
    parts = name.split(".")
    return ".".join(parts[: next((i for i, p in enumerate(parts) if p.isdigit()), len(parts) - 1) + 1])


def _strong(m: Measures, t: Thresholds) -> list[Finding]:
    """The strongest block: after it the medians are no longer the network's own."""
    weights = odd_weights(m)
    calls = Counter(b.name for b in m.blocks)
    alone = {n for n, k in calls.items() if 2 * k > len(m.blocks) >= FEWEST}  # called again and again
    scores = [
        (b, strength(m, b, t, weights))
        for b in m.blocks
        if math.isfinite(b.branch_gain) and b.name not in alone
    ]
    most = max((score for _, score in scores), default=0.0)
    if not most > 1:
        return []
    b = next(b for b, score in scores if score >= max(1.0, most / 2))  # what follows may be as strong by it
    usual = usual_branch_gain(m, b)
    scale = usual / b.branch_gain if usual > 0 else 1 / b.branch_gain
    times = f"{b.branch_gain:.3g}" + (f", {b.branch_gain / usual:.3g} times the median" if usual > 0 else "")
    large = max(weights.get(b.name, []), key=lambda pair: pair[1], default=None)
    heavy = large is not None and large[1] > t.weights
    which = (
        f" The weights of {large[0].name} are {large[1]:.3g} times those of its siblings."
        if large is not None and heavy
        else ""
    )
    return [
        Finding(
            b.name,
            "strong-block",
            f"Its branch amplifies a random perturbation by {times}; the block's largest singular value is "
            f"at least {b.sigma:.3g}.{which}",
            f"Multiply its branch by {scale:.2g} (its last layer's weights) and train on.",
            {"branch_gain": b.branch_gain, "usual": usual, "sigma": b.sigma, "scale": scale},
        )
    ]


def _heavy(m: Measures, t: Thresholds) -> list[Finding]:
    """A layer of a network without shortcuts, its last one apart, which an output's unit may scale."""
    sizes = {w.name: w.size for w in m.weights}
    layers = list(dict.fromkeys(layer.name for layer in m.layers if layer.name in sizes))
    if m.blocks or len(layers) < 3:
        return []
    usual = statistics.median(sizes.values())
    gains = {layer.name: layer.gain for layer in m.layers}
    odd = [
        n
        for n in layers[:-1]
        if sizes[n] > t.heavy * max(usual, 1.0) and gains[n] > t.heavy_gain  # 1 keeps a unit's variance
    ]
    if not odd:
        return []
    times = sizes[odd[0]] / usual
    return [
        Finding(
            odd[0],
            "strong-block",
            f"Its weights are {times:.3g} times the median of all layers, and its output is "
            f"{gains[odd[0]]:.3g} times as large as its input.",
            f"Multiply its weights by {1 / times:.2g} and train on.",
            {"weights": times, "gain": gains[odd[0]], "scale": 1 / times},
        )
    ]


def _through_time(m: Measures, t: Thresholds) -> list[Finding]:
    return [
        Finding(
            r.name,
            "explosion",
            f"The gradient of its last output is {r.ratio:.2g} times as large at the first of {r.steps} time "
            f"steps as at the last.",
            "Start its recurrent weights orthogonal (nn.init.orthogonal_(layer.weight_hh_l0)), clip the "
            "gradient's norm, and train on.",
            {"gradient_ratio": r.ratio, "steps": float(r.steps)},
        )
        for r in m.recurrences
        if r.ratio > t.through_time
    ]


def _flat_head(m: Measures, t: Thresholds) -> list[Finding]:
    """Logits that are alike for all inputs, and wrong: a head whose bias drowns what its weights say."""
    before, last, after = m.spread
    before = last if m.blocks else m.layers[-2].spread if len(m.layers) > 1 else before
    wrong = m.classes > 1 and m.loss > t.surprised * math.log(m.classes)
    if not (m.layers and after < t.collapse * before and wrong):
        return []
    return [
        Finding(
            m.layers[-1].name,
            "collapse",
            f"The logits differ by {after:.2g} of their size from input to input, and what it reads by "
            f"{before:.2g}; the loss is {m.loss:.3g}, and {math.log(m.classes):.3g} where all are equal.",
            "Set its bias to 0 (or initialise it anew) and train on.",
            {"spread": after, "spread_before": before, "loss": m.loss},
        )
    ]


def strength(
    m: Measures,
    b: BlockMeasures,
    t: Thresholds = THRESHOLDS,
    weights: dict[str, list[tuple[WeightMeasures, float]]] | None = None,
) -> float:
    """How strong a block is against its siblings: above 1 an outlier.

    By its gain or its largest singular value, where what its branch adds is an outlier too; or by the weights
    of one of its layers.
    """
    known = siblings_of(m, b)
    branch = statistics.median(c.branch_gain for c in known)
    if len(known) < FEWEST or not branch > 0:  # none to compare with, or most branches are switched off
        return b.branch_gain / t.alone

    def times(measure: str) -> float:
        values = [v for c in known if math.isfinite(v := getattr(c, measure))]
        usual = statistics.median(values) if values else 0.0
        return getattr(b, measure) / usual if usual > 0 and math.isfinite(getattr(b, measure)) else 0.0

    own = sum(c.sibling == b.sibling for c in known) >= FEWEST
    allowed = 2.0 if b.name == m.blocks[0].name or not own else 1.0
    sizes = [math.log(c.size) for c in known if c.size > 0]
    spread = statistics.median(abs(s - statistics.median(sizes)) for s in sizes) if sizes else math.inf
    # A norm at the end of each branch makes the sizes equal; ‖F‖/‖x‖ then tells of the state alone.
    # Behind one at its start a gain is as 1/‖x‖, and the size tells whether the branch is strong.
    by_size = spread < _NORMED or b.radial < _FREE
    output = (times("size") if by_size else max(times("size"), times("ratio"))) / t.strong_output
    jump = _jump(known, b) / t.jump
    by_gain = min(times("branch_gain") / t.strong, times("gain") / t.strong_gain, output, jump)
    by_sigma = min(times("sigma") / t.sigma, output, jump)
    most = max((ratio for _, ratio in (weights or {}).get(b.name, [])), default=0.0)
    by_weights = min(most / t.weights, times("branch_gain") / 2)
    return max(by_gain / allowed, by_sigma / allowed, by_weights)


def _jump(known: Sequence[BlockMeasures], b: BlockMeasures) -> float:
    """A branch's gain over that of the next siblings before and after it: with depth gains change slowly."""
    at = next(i for i, c in enumerate(known) if c is b)
    before = next((c for c in reversed(known[:at]) if c.name != b.name), None)
    after = next((c for c in known[at:] if c.name != b.name), None)
    most = max((c.branch_gain for c in (before, after) if c is not None), default=0.0)
    return b.branch_gain / most if most > 0 else math.inf


def _whole(m: Measures, t: Thresholds) -> list[Finding]:
    found = [*_collapse(m, t)]
    if m.blocks:
        found += _gain_of_whole(m, t)
    elif len(m.layers) > 2:
        found += _gradients_of_layers(m, t)
    return found


def _collapse(m: Measures, t: Thresholds) -> list[Finding]:
    before, after, _ = m.spread
    if not m.blocks and len(m.layers) > 1:
        after = m.layers[-2].spread
    if not after < t.collapse * before:
        return _alike(m)
    wide = [n for n in m.norms if n.variance_ratio < 1 / t.never_updated]
    if len(wide) > 0.5 * len(m.norms):
        return [_unsettled(wide, len(m.norms), after)]
    advice = (
        "Start the blocks' last layers at 0 or divide them by √L, so that the first state is kept."
        if m.blocks
        else "Give it shortcuts, x + F(x), or batch norm before the activations; or fewer layers."
    )
    spreads = [before, *(layer.spread for layer in m.layers)]
    drops = [b / a if a > 0 else 0.0 for a, b in pairwise(spreads)]
    where = ""
    if drops and min(drops) < t.collapse**0.5:  # in one layer, not from layer to layer
        name = m.layers[drops.index(min(drops))].name
        where, advice = f", most of it in {name}", f"Initialise {name} anew, and train on."
    return [
        Finding(
            WHOLE,
            "collapse",
            f"Different inputs come out as one state: they differ by {after:.2g} of its size at the end, "
            f"and by "
            f"{before:.2g} at the start{where}.",
            advice,
            {"spread": after, "spread_of_inputs": before},
        )
    ]


def _unsettled(wide: Sequence[NormMeasures], norms: int, spread: float) -> Finding:
    """A running variance that is too large alone is common in healthy networks; here nothing is left."""
    least = min(n.variance_ratio for n in wide)
    return Finding(
        WHOLE,
        "norm-statistics",
        f"Different inputs come out as one state (they differ by {spread:.2g} of its size): {len(wide)} of "
        f"{norms} batch norms divide by a running variance up to {1 / max(least, 1e-30):.2g} times theirs.",
        "Measure their statistics anew: some 20 training batches through the model in training mode, without "
        "updates, with momentum=None (their mean).",
        {"spread": spread, "variance_ratio": least},
    )


def _alike(m: Measures) -> list[Finding]:
    """Layers whose units all hold the same weights: they compute one number, and get one gradient."""
    if len(m.alike) < 2 or len(m.alike) < 0.5 * len({layer.name for layer in m.layers}):
        return []
    return [
        Finding(
            WHOLE,
            "collapse",
            f"All units of {m.alike[0]}, and of {len(m.alike) - 1} more layers, hold the same weights: they "
            "compute one number, and training keeps them equal.",
            "Initialise the layers randomly, as reset_parameters() does.",
            {"layers": float(len(m.alike))},
        )
    ]


def _gain_of_whole(m: Measures, t: Thresholds) -> list[Finding]:
    sigma = m.whole_gain if math.isnan(m.whole_sigma) else m.whole_sigma
    depth = len(m.blocks)
    numbers = {"sigma": sigma, "gain": m.whole_gain, "state_growth": m.state_growth, "blocks": float(depth)}
    explodes = sigma > (t.whole if m.state_growth > t.grows else t.normed)
    if explodes or m.state_growth > t.state_growth:
        return [
            Finding(
                WHOLE,
                "explosion",
                f"{depth} blocks amplify a perturbation "
                f"{'more than 1e38' if sigma == math.inf else f'up to {sigma:.3g}'} times and the state "
                f"{m.state_growth:.3g} times; no single block stands out.",
                f"Multiply each branch by 1/√{depth} = {depth**-0.5:.2g} (step_size in a ResidualStack). Its "
                "last layer started at 0, or a norm before it, helps too, at a smaller learning rate; a "
                "smaller learning rate alone does not.",
                numbers,
            )
        ]
    if sigma < 1 / t.whole:
        factors = [b.shortcut for b in m.blocks if math.isfinite(b.shortcut)]
        scaled = factors and statistics.median(factors) < 0.9
        return [
            Finding(
                WHOLE,
                "vanishing",
                f"{depth} blocks leave at most {sigma:.3g} of a perturbation, and so of the gradient.",
                (
                    f"Their shortcuts are {statistics.median(factors):.3g}·x: make them x, and train on."
                    if scaled
                    else "Give each block the shortcut x, with nothing on it."
                ),
                numbers,
            )
        ]
    return []


def _gradients_of_layers(m: Measures, t: Thresholds) -> list[Finding]:
    first, last = m.layers[0].gradient, m.layers[-2].gradient
    if not last > 0 or not math.isfinite(first):
        return []
    ratio = first / last
    numbers = {"gradient_ratio": ratio, "layers": float(len(m.layers))}
    if 1 / t.gradient_ratio <= ratio <= t.gradient_ratio:
        return []
    grows = ratio > 1
    return [
        Finding(
            WHOLE,
            "explosion" if grows else "vanishing",
            f"Without shortcuts the gradient is {ratio:.2g} times as large at the first of {len(m.layers)} "
            f"layers as at the last.",
            "Give it shortcuts, x + F(x), with the last layer of each F divided by the root of their "
            "number; or "
            "start the layers with He's variance (2/n for ReLU, 1/n for tanh) and batch norm between.",
            numbers,
        )
    ]


def block_scores(m: Measures, found: Sequence[Finding]) -> list[tuple[BlockMeasures, str]]:
    """Every block with the cause that was found there, or an empty string."""
    causes = {f.block: f.cause for f in reversed(found)}
    result = []
    for b in m.blocks:
        owner = next((name for name in causes if b.name == name or b.name.startswith(name + ".")), None)
        inner = next((name for name in causes if name.startswith(b.name + ".")), None)
        result.append((b, causes.get(owner or inner or "", "")))
    return result
