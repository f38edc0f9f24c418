"""Intervals against values worked out by hand and against the truth of drawn data; power against published figures."""

from statistics import NormalDist

import numpy as np
import pytest

from koala.evaluate.statistics import (
    _tail,
    by_category,
    estimate,
    power,
    prompts_needed,
    ratio,
    resampled_means,
    resolvable,
    share,
    yes_no_spread,
)


def test_two_prompts_resample_as_worked_out_by_hand() -> None:
    """Prompt a has the values 1 and 3, b has 8. Draws: aa (mean 2), ab and ba (mean 12 / 3 = 4), bb (mean 8)."""
    means = resampled_means(["a", "b", "a"], np.array([[1.0, 8.0, 3.0]]), 20_000)[0]
    assert set(np.round(means, 9)) == {2, 4, 8}
    shares = [np.isclose(means, value).mean() for value in (2, 4, 8)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.015)


def test_a_prompts_seeds_stay_together() -> None:
    """Its images are all right or all wrong: a resample of 4 prompts of 50 images has a mean of quarters."""
    prompts = [text for text in "abcd" for _ in range(50)]
    means = resampled_means(prompts, np.array([[float(text in "ab") for text in prompts]]), 2000)[0]
    assert set(means) == {0, 0.25, 0.5, 0.75, 1}


def test_models_are_resampled_by_the_same_draws() -> None:
    """Prompts differ widely and models by exactly 1: the difference is certain, the scores are not."""
    hard = np.random.default_rng(0).normal(50, 10, 30)
    scores = {"teacher": {"s": list(hard)}, "after": {"s": list(hard - 1)}}
    models, compared = estimate([str(number) for number in range(30)], scores, ["s"])
    assert compared["difference_from_teacher/s"].interval == pytest.approx((-1, -1))
    low, high = models["after"]["s"].interval
    assert high - low > 5
    share = compared["share_of_teacher/s"]
    assert share.value == pytest.approx((hard.mean() - 1) / hard.mean())
    assert share.interval == pytest.approx((share.value, share.value), abs=0.003)


def test_an_estimates_figures_are_in_order_and_its_bounds_are_one_sided() -> None:
    values = np.random.default_rng(1).normal(10, 2, 400)
    models, compared = estimate([str(number) for number in range(400)], {"teacher": {"s": values}}, [])
    assert compared == {}
    found, error = models["teacher"]["s"], values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.interval == pytest.approx((found.value - 1.96 * error, found.value + 1.96 * error), abs=0.02)
    assert found.bounds == pytest.approx((found.value - 1.645 * error, found.value + 1.645 * error), abs=0.02)


def test_the_memory_of_draws_is_bounded_and_changes_nothing() -> None:
    prompts, values = [str(number % 7) for number in range(20)], np.random.default_rng(0).random((3, 20))
    whole = resampled_means(prompts, values, 100)
    assert whole.shape == (3, 100)
    for at_once in (1, 7, 50):
        assert resampled_means(prompts, values, 100, at_once=at_once) == pytest.approx(whole, rel=1e-12)
    assert not np.allclose(resampled_means(prompts, values, 100, seed=1), whole)


def test_there_is_no_share_of_nothing() -> None:
    assert ratio(1.0, 0.0) == 0
    # Of draws, what is 0 takes the least: a share of 1 / 0 is no smaller than 1 / 4.
    assert list(ratio(np.array([1.0, 2.0, 0.0]), np.array([0.0, 4.0, 0.0]))) == [0.25, 0.5, 0]
    models, compared = estimate(["a", "b"], {"teacher": {"s": [0, 0]}, "after": {"s": [1, 0]}}, ["s"])
    assert compared["share_of_teacher/s"].value == 0
    assert compared["share_of_teacher/s"].interval == (0, 0)
    assert models["after"]["s"].interval == (0, 1)


def test_one_prompt_leaves_no_interval_and_no_score_no_estimate() -> None:
    models, _ = estimate(["a", "a"], {"teacher": {"s": [1, 2]}}, [])
    assert models["teacher"]["s"].interval == (1.5, 1.5)
    assert estimate(["a"], {"teacher": {}, "after": {}}, []) == ({"teacher": {}, "after": {}}, {})


@pytest.mark.parametrize("prompts", [12, 60])
def test_intervals_cover_the_truth_as_often_as_they_say(prompts: int) -> None:
    """Of 600 drawn evaluations, whose images of one prompt are alike, 95 % of intervals and of bounds hold the truth."""
    random, seeds, trials = np.random.default_rng(5), 4, 600
    texts = [str(number) for number in range(prompts) for _ in range(seeds)]
    held, lower, upper = {"s": 0, "share": 0}, 0, 0
    for _ in range(trials):
        hard = np.repeat(random.normal(0, 1, prompts), seeds)  # of a prompt, for both models
        own = np.repeat(random.normal(0, 1, prompts), seeds)  # of a prompt, for the student
        teacher = 20 + hard + random.normal(0, 0.5, len(texts))
        after = 18 + hard + own + random.normal(0, 0.5, len(texts))
        models, compared = estimate(texts, {"teacher": {"s": teacher}, "after": {"s": after}}, ["s"], resamples=1000)
        score, share = models["after"]["s"], compared["share_of_teacher/s"]
        held["s"] += score.interval[0] <= 18 <= score.interval[1]
        held["share"] += share.interval[0] <= 0.9 <= share.interval[1]
        lower += share.bounds[0] <= 0.9
        upper += share.bounds[1] >= 0.9
    for count in (*held.values(), lower, upper):
        assert count / trials == pytest.approx(0.95, abs=0.025), (held, lower, upper)


def test_the_percentile_is_expanded_for_few_prompts() -> None:
    """Student's quantiles from a table: 2.262 for 9 degrees of freedom, 2.045 for 29."""
    for prompts, quantile in ((10, 2.262), (30, 2.045)):
        expected = NormalDist().cdf(-quantile * (prompts / (prompts - 1)) ** 0.5)
        assert _tail(0.025, prompts) == pytest.approx(expected, rel=0.02)
    assert _tail(0.025, 10**6) == pytest.approx(0.025, rel=1e-3)


@pytest.mark.parametrize(("prompts", "expected"), [(270, 0.41), (1000, 0.86), (2000, 0.99)])
def test_power_of_a_yes_no_score(prompts: int, expected: float) -> None:
    """To see a loss of 2 %."""
    assert power(0.98, yes_no_spread(0.98), prompts) == pytest.approx(expected, abs=0.01)
    assert resolvable(0.98, yes_no_spread(0.98), prompts) == (expected >= 0.8)


def test_power_is_what_drawn_evaluations_give() -> None:
    """A student as good as its teacher, 5 % of pairs discordant, judged by the gate's own lower bound."""
    random, prompts, trials = np.random.default_rng(3), 400, 300
    texts, passed = [str(number) for number in range(prompts)], 0
    for _ in range(trials):
        which = random.choice(4, prompts, p=[0.925, 0.025, 0.025, 0.025])
        teacher, after = np.isin(which, (0, 1)), np.isin(which, (0, 2))
        _, compared = estimate(texts, {"teacher": {"s": teacher}, "after": {"s": after}}, ["s"], resamples=500)
        passed += compared["share_of_teacher/s"].bounds[0] >= 0.97
    assert passed / trials == pytest.approx(power(0.97, yes_no_spread(0.97), prompts), abs=0.08)


def test_power_of_other_scores() -> None:
    """CLIP score: 100 prompts see a loss of 2 % with a power of 0.80, 200 with 0.96."""
    assert power(0.98, 0.08, 100) == pytest.approx(0.80, abs=0.01)
    assert power(0.98, 0.08, 200) == pytest.approx(0.96, abs=0.015)
    assert prompts_needed(0.98, 0.08) == 99
    assert resolvable(0.98, 0.08, 99)
    assert not resolvable(0.98, 0.08, 98)


def test_categories_are_compared_by_themselves_the_worst_first() -> None:
    prompts, categories = ["a", "b", "c", "d", "e"], ["x", "x", "y", "y", ""]
    scores = {"teacher": {"s": [1, 1, 2, 2, 9]}, "after": {"s": [1, 1, 1, 2, 0]}, "before": {"s": [0] * 5}}
    found = by_category(prompts, categories, scores, ["s"])
    assert [(row.category, row.images, row.teacher, row.student, row.share) for row in found] == [
        ("y", 2, 2, 1.5, 0.75),
        ("x", 2, 1, 1, 1),
    ]
    assert found[1].interval == (1, 1)
    assert found[0].interval[0] < 0.75 < found[0].interval[1]
    assert by_category(prompts, [""] * 5, scores, ["s"]) == []


def test_a_model_that_is_hardly_ever_right_can_be_beaten() -> None:
    """In an eighth of the resamples it is never right."""
    weak = [1.0, 1.0] + [0.0] * 48
    assert share([str(number) for number in range(50)], [1.0] * 50, weak).bounds[0] > 5


def test_a_share_is_paired() -> None:
    """The same noise in both models cancels: the interval of the share is that of the difference alone."""
    random = np.random.default_rng(0)
    hard = random.uniform(1, 9, 200)
    kept = share([str(number) for number in range(200)], list(0.9 * hard), list(hard))
    assert kept.value == pytest.approx(0.9)
    assert kept.interval == pytest.approx((0.9, 0.9))
