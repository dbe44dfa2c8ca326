"""Recipes: every setting is checked, and the learning rate is the published one at every update."""

import math
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resode.training.recipe import RECIPES, Recipe, make_recipe


def test_paper_is_he_et_al():
    """He et al. (2016), 4.2: 0.1, divided by 10 at 32k and 48k of 64k updates, weight decay on everything."""
    paper = RECIPES["paper"]
    total = paper.length(batches=390)
    assert total == 64_000
    assert (paper.batch_size, paper.momentum, paper.nesterov) == (128, 0.9, False)
    assert (paper.weight_decay, paper.decay_norms, paper.label_smoothing) == (1e-4, True, 0.0)
    rates = {u: paper.learning_rate(u, total) for u in (0, 31_999, 32_000, 47_999, 48_000, 63_999)}
    assert rates == pytest.approx(
        {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 1e-3, 63_999: 1e-3}
    )


def test_paper_warms_up_at_a_tenth():
    """For 110 layers the paper trains the first 400 updates at 0.01."""
    warm = make_recipe("paper", warmup_updates=400)
    assert [warm.learning_rate(u, 64_000) for u in (0, 399, 400)] == pytest.approx([0.01, 0.01, 0.1])


def test_fast_is_one_cycle_nesterov_without_decay_of_norms():
    fast = RECIPES["fast"]
    assert (fast.schedule, fast.lr, fast.nesterov, fast.momentum) == ("onecycle", 0.2, True, 0.9)
    assert (fast.weight_decay, fast.decay_norms, fast.label_smoothing, fast.batch_size) == (
        5e-4,
        False,
        0.1,
        128,
    )


def test_one_cycle_peaks_once_and_ends_at_zero():
    recipe = make_recipe("fast", rise=0.25)
    rates = [recipe.learning_rate(u, 1000) for u in range(1001)]
    assert rates[0] == pytest.approx(0.2 * recipe.warmup_factor)
    assert max(rates) == rates[250] == 0.2
    assert rates[:251] == sorted(rates[:251])
    assert rates[250:] == sorted(rates[250:], reverse=True)
    assert rates[625] == pytest.approx(0.1), "half-way down half a cosine is half the peak"
    assert rates[1000] == pytest.approx(0.0, abs=1e-15)


def test_cosine_starts_after_a_linear_warm_up():
    recipe = make_recipe("fast", schedule="cosine", warmup_updates=100, warmup_factor=0.1, lr=1.0)
    rates = [recipe.learning_rate(u, 1100) for u in (0, 50, 100, 600, 1100)]
    assert rates == pytest.approx([0.1, 0.55, 1.0, 0.5, 0.0])


def test_constant_is_constant():
    recipe = make_recipe("fast", schedule="constant", lr=0.3)
    assert {recipe.learning_rate(u, 7) for u in range(7)} == {0.3}


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from(["onecycle", "cosine", "step", "constant"]),
    st.integers(2, 5000),
    st.floats(1e-4, 10),
    st.floats(0, 0.9),
    st.integers(0, 1),
)
def test_rate_stays_within_its_bounds(schedule, total, lr, rise, warm):
    warmup = 0 if schedule == "onecycle" else warm * (total // 2)
    recipe = replace(RECIPES["fast"], schedule=schedule, lr=lr, rise=rise, warmup_updates=warmup)
    rates = [recipe.learning_rate(u, total) for u in range(total)]
    assert all(0 < rate <= lr * (1 + 1e-12) for rate in rates)


def test_length_counts_updates_or_epochs():
    assert make_recipe("fast", epochs=3).length(batches=390) == 1170
    assert make_recipe("fast", updates=5).length(batches=390) == 5


def test_epochs_and_updates_replace_each_other():
    assert (make_recipe("paper", epochs=3).epochs, make_recipe("paper", epochs=3).updates) == (3, None)
    assert (make_recipe("fast", updates=9).epochs, make_recipe("fast", updates=9).updates) == (None, 9)


def test_a_recipe_is_frozen():
    with pytest.raises(FrozenInstanceError):
        RECIPES["fast"].lr = 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epoch": 3}, ["'epoch'", "Did you mean epochs", "weight_decay"]),
        ({"epochs": 3, "updates": 5}, ["exactly one of epochs and updates", "epochs=3", "updates=5"]),
        ({"epochs": None}, ["exactly one of epochs and updates"]),
        ({"epochs": 0}, ["epochs must be at least 1", "got 0"]),
        ({"batch_size": 0}, ["batch_size must be at least 1"]),
        ({"lr": 0.0}, ["lr must be above 0", "0.0"]),
        ({"lr": -1}, ["lr must be above 0"]),
        ({"lr": math.nan}, ["lr must be finite"]),
        ({"lr": math.inf}, ["lr must be finite"]),
        ({"momentum": 1.5}, ["momentum must be at least 0 and at most 1", "1.5"]),
        ({"momentum": 0}, ["nesterov needs a momentum", "nesterov=False"]),
        ({"label_smoothing": 1.0}, ["label_smoothing"]),
        (
            {"schedule": "onecycel"},
            ["onecycle, cosine, step, constant", "'onecycel'", "Did you mean onecycle"],
        ),
        ({"precision": "fp16"}, ["precision must be one of auto, 32, bf16", "'fp16'"]),
        ({"warmup_updates": 5}, ["one-cycle", "rise"]),
        ({"milestones": (0.75, 0.5)}, ["milestones are rising shares"]),
        ({"milestones": (32_000,)}, ["milestones are rising shares", "32000"]),
        ({"seed": -1}, ["seed must be at least 0"]),
        ({"crop_padding": -1}, ["crop_padding must be at least 0"]),
        ({"validation": -1}, ["validation must be at least 0"]),
    ],
)
def test_a_wrong_value_says_the_rule_and_what_came(changes, words):
    with pytest.raises(ValueError) as error:
        make_recipe("fast", **changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"epochs": 3.0}, "epochs must be int, got 3.0 (float)"),
        ({"epochs": True}, "epochs must be int"),
        ({"lr": "0.1"}, "lr must be float, got '0.1' (str)"),
        ({"nesterov": 1}, "nesterov must be bool"),
        ({"schedule": 3}, "schedule must be text"),
        ({"milestones": 0.5}, "milestones must be a list of numbers"),
        ({"milestones": ["a"]}, "milestones must be float"),
        ({"seed": None}, "seed must be int, got None"),
    ],
)
def test_a_wrong_type_says_the_right_one(changes, word):
    with pytest.raises(TypeError) as error:
        make_recipe("fast", **changes)
    assert word in str(error.value)


def test_an_unknown_recipe_lists_the_valid_ones():
    with pytest.raises(
        ValueError, match=r"no recipe 'papre'\. Did you mean paper\? Valid: digits, fast, paper"
    ):
        make_recipe("papre")


def test_yaml_numbers_are_taken_as_meant():
    """YAML reads 32 as a number and 1 as an int, and knows no tuples."""
    recipe = make_recipe("fast", precision=32, lr=1, schedule="step", milestones=[0.5])
    assert (recipe.precision, recipe.lr, recipe.milestones) == ("32", 1.0, (0.5,))
    assert isinstance(recipe.lr, float)


def test_every_setting_is_documented():
    text = Recipe.__doc__ or ""
    for field in fields(Recipe):
        assert f"\n        {field.name}: " in text, field.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 0.2}, r"gamma belongs to the step schedule and does nothing with onecycle, got gamma=0.2"),
        ({"milestones": [0.3]}, r"milestones belongs to the step schedule"),
        ({"schedule": "cosine", "rise": 0.1}, r"rise belongs to the onecycle schedule .* with cosine"),
        ({"warmup_shape": "constant"}, r"warmup_shape belongs to a warm-up, .*'onecycle'.*got .*'constant'"),
        ({"schedule": "step", "warmup_factor": 0.5}, r"warmup_factor belongs .*warmup_updates=0, got .*=0.5"),
    ],
)
def test_a_setting_of_another_schedule_is_refused(changes, message):
    """But a run's record, which names every setting, is not: asdict of any recipe gives that recipe."""
    with pytest.raises(ValueError, match=message):
        make_recipe("fast", **changes)
    own = Recipe(schedule="cosine", rise=0.1, gamma=0.3)
    assert make_recipe("fast", **asdict(own)) == own
    assert make_recipe("paper", gamma=0.2).gamma == 0.2
    assert make_recipe("fast", warmup_factor=0.5).warmup_factor == 0.5, "the rise starts there"
    assert make_recipe("fast", schedule="step", warmup_updates=9, warmup_shape="constant").warmup_updates == 9


def test_the_rate_scales_with_the_batch_where_asked():
    """0.2 for 128 images is 1.6 for 1,024, at the peak after 30 of 100 updates."""
    recipe = make_recipe("fast", batch_size=1024, scale_lr=True)
    assert recipe.learning_rate(30, 100) == pytest.approx(1.6)
    assert recipe.learning_rate(0, 100) == pytest.approx(0.04 * 1.6)
    assert make_recipe("fast", batch_size=1024).learning_rate(30, 100) == pytest.approx(0.2)
    assert "lr 1.6" in recipe.describe()
    with pytest.raises(ValueError, match=r"only bear after a warm-up, got warmup_updates=None"):
        make_recipe("paper", scale_lr=True)
    assert make_recipe("paper", batch_size=256, scale_lr=True, warmup_updates=500).peak == pytest.approx(0.2)
