"""Intervals of scores by a paired bootstrap over prompts, and the number of prompts that a verdict needs.

A resample draws whole prompts, with all their seeds, since images of one prompt are not independent. All models are resampled
by the same draws, so that what makes a prompt hard for both cancels in their difference and in their ratio.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from koala.evaluate.config import DIFFERENCE, SHARE

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95
"""Of an interval, which leaves out 2.5 % on each side, and of a bound, which leaves out 5 % on its own side."""

RESAMPLES = 10_000
TEACHER, STUDENT = "teacher", "after"

_SEED = 0
_AT_ONCE = 2_000_000  # draws in memory, each of 8 bytes
_POWER = (
    0.8  # of the verdicts on a student as good as its teacher that must let it pass: below, the rule decides nothing
)
# A yes/no score is assumed to be near 95 %, with 5 % of pairs in which one model is right and the other is not.
_RIGHT, _DISCORDANT = 0.95, 0.05

Scores = Mapping[str, Sequence[float]]
"""Name of a score -> its value of each image."""


@dataclass(frozen=True)
class Estimate:
    """A figure with what its prompts leave open."""

    value: float
    """The figure of all images."""

    interval: tuple[float, float]
    """Two-sided 95 % interval."""

    bounds: tuple[float, float]
    """One-sided bounds of 95 % each: it is at least the first; it is at most the second."""


def estimate(
    prompts: Sequence[str], scores: Mapping[str, Scores], shared: Iterable[str], resamples: int = RESAMPLES
) -> tuple[dict[str, dict[str, Estimate]], dict[str, Estimate]]:
    """Return each model's mean scores, and the student's beside its teacher's.

    Args:
        prompts: The prompt of each image; images of equal prompts are resampled together.
        scores: Model -> score -> value of each image.
        shared: Scores to compare; the models `TEACHER` and `STUDENT` have them.
        resamples: Draws of the prompts.

    Returns:
        Model -> score -> its mean; and the ratio and the difference of the means of `STUDENT` and `TEACHER`, by the names
        `share_of_teacher/SCORE` and `difference_from_teacher/SCORE`.
    """
    import numpy as np

    names = [(model, score) for model in scores for score in scores[model]]
    values = np.array([scores[model][score] for model, score in names], dtype=float).reshape(len(names), len(prompts))
    means = dict(zip(names, values.mean(axis=1), strict=True))
    draws = dict(zip(names, resampled_means(prompts, values, resamples), strict=True))
    count = len(set(prompts))
    models: dict[str, dict[str, Estimate]] = {model: {} for model in scores}
    for model, score in names:
        models[model][score] = from_draws(means[model, score], draws[model, score], count)
    compared = {}
    for score in shared:
        ours, theirs = (STUDENT, score), (TEACHER, score)
        kept = from_draws(ratio(means[ours], means[theirs]), ratio(draws[ours], draws[theirs]), count)
        compared[f"{SHARE}/{score}"] = kept
        difference = from_draws(means[ours] - means[theirs], draws[ours] - draws[theirs], count)
        compared[f"{DIFFERENCE}/{score}"] = difference
    return models, compared


@dataclass(frozen=True)
class OfCategory:
    """A score on the prompts of one category."""

    category: str
    score: str
    images: int
    """Images of each model."""
    teacher: float
    student: float
    share: float
    """The student's mean over its teacher's."""
    interval: tuple[float, float]
    """Two-sided 95 % interval of the share."""


def by_category(
    prompts: Sequence[str], categories: Sequence[str], scores: Mapping[str, Scores], shared: Sequence[str]
) -> list[OfCategory]:
    """Return the student beside its teacher in each category, the worst first; nothing where there are no categories.

    Args:
        prompts: The prompt of each image.
        categories: Its category, empty for none.
        scores: As `estimate` takes them.
        shared: Scores to compare.
    """
    found = []
    for category in sorted({category for category in categories if category}):
        numbers = [number for number, each in enumerate(categories) if each == category]
        own = [prompts[number] for number in numbers]
        for score in shared:
            ours, theirs = ([scores[model][score][number] for number in numbers] for model in (STUDENT, TEACHER))
            kept = share(own, ours, theirs)
            means = sum(theirs) / len(numbers), sum(ours) / len(numbers)
            found.append(OfCategory(category, score, len(numbers), *means, kept.value, kept.interval))
    return sorted(found, key=lambda each: (shared.index(each.score), each.share))


def share(prompts: Sequence[str], ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Return the ratio of the means of two models' scores.

    Args:
        prompts: The prompt of each image.
        ours: The value of each image of a model.
        theirs: Those of the model that it is compared with, of the same prompts and seeds.
    """
    import numpy as np

    values = np.array([ours, theirs], dtype=float)
    (our_draws, their_draws), (our_mean, their_mean) = resampled_means(prompts, values), values.mean(axis=1)
    return from_draws(ratio(our_mean, their_mean), ratio(our_draws, their_draws), len(set(prompts)))


def resampled_means(
    prompts: Sequence[str], values: "np.ndarray", resamples: int = RESAMPLES, seed: int = _SEED, at_once: int = _AT_ONCE
) -> "np.ndarray":
    """Return the means of S series of N values over resamples of the prompts: S x `resamples`.

    Args:
        prompts: The prompt of each of the N values.
        values: S x N.
        resamples: Each draws as many prompts as there are, with replacement, by the same draws for all series.
        seed: Of the draws.
        at_once: Draws in memory at once. It does not change the result.
    """
    import numpy as np

    drawn = Resamples(prompts, seed, at_once)
    sums = np.array([np.bincount(drawn.group, weights=series) for series in values])
    sums = sums.reshape(len(values), len(drawn.sizes))
    means = [(times @ sums.T / (times @ drawn.sizes)[:, None]).T for times in drawn.draws(resamples)]
    return np.concatenate(means, axis=1)


class Resamples:
    """Resamples of the prompts, by the same draws wherever the prompts are the same."""

    def __init__(self, prompts: Sequence[str], seed: int = _SEED, at_once: int = _AT_ONCE) -> None:
        """Group images by their prompts. Arguments as of `resampled_means`."""
        import numpy as np

        _, self.group = np.unique(np.asarray(prompts), return_inverse=True)
        """Number of the prompt of each image, N."""
        self.sizes = np.bincount(self.group)
        """Images of each prompt, P."""
        self._seed, self._at_once = seed, at_once

    def draws(self, resamples: int) -> "Iterator[np.ndarray]":
        """Yield how often each prompt is drawn, R x P at a time, until there are `resamples` rows."""
        import numpy as np

        random, count = np.random.default_rng(self._seed), len(self.sizes)
        step = max(1, self._at_once // count)
        for first in range(0, resamples, step):
            yield random.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - first))


def ratio(one: "np.ndarray | float", other: "np.ndarray | float") -> "np.ndarray":
    """Return one / other; 0 where all of the other is 0, of which there is no share.

    A draw in which the other is 0 takes its least positive draw: the share is no smaller, and a model that is hardly ever right
    can be beaten.
    """
    import numpy as np

    one, other = np.broadcast_arrays(np.asarray(one, dtype=float), np.asarray(other, dtype=float))
    least = np.where(other > 0, other, np.inf).min()
    share: np.ndarray = one / np.where(other == 0, least, other)
    return share


def from_draws(value: "np.ndarray | float", draws: "np.ndarray", prompts: int) -> Estimate:
    """Return a figure with its interval and bounds.

    Args:
        value: The figure of all images.
        draws: The figure over resamples of the prompts.
        prompts: Number of different prompts.
    """
    import numpy as np

    two_sided, one_sided = _tail((1 - CONFIDENCE) / 2, prompts), _tail(1 - CONFIDENCE, prompts)
    low, lower, upper, high = np.quantile(draws, [two_sided, one_sided, 1 - one_sided, 1 - two_sided])
    return Estimate(float(value), (float(low), float(high)), (float(lower), float(upper)))


def _tail(share: float, prompts: int) -> float:
    """Return the share of resamples to leave out on one side so that `share` is left out of the truth.

    Resamples of few prompts spread too little. The percentile is expanded for it (Hesterberg 2015, "What Teachers Should Know
    about the Bootstrap", section 4.4), with Student's quantile by its expansion (Abramowitz and Stegun 26.7.5).
    """
    free = prompts - 1
    if free == 0:
        return 0.0  # all resamples are equal
    z = NormalDist().inv_cdf(share)
    student = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return NormalDist().cdf(math.sqrt(prompts / free) * student)


def power(at_least: float, spread: float, prompts: int) -> float:
    """Return how probably a student as good as its teacher passes: the lower bound of its share reaches `at_least`.

    By the normal approximation. It takes a prompt's seeds for one image, since nothing is known of how they agree.

    Args:
        at_least: The share of the teacher's score that the student must keep.
        spread: Standard deviation, over prompts, of the student's value less its teacher's, as a share of the teacher's mean.
        prompts: Number of different prompts.
    """
    normal = NormalDist()
    return normal.cdf((1 - at_least) * math.sqrt(prompts) / spread - normal.inv_cdf(CONFIDENCE))


def resolvable(at_least: float, spread: float, prompts: int) -> bool:
    """Return whether a student as good as its teacher passes in 80 of 100 evaluations or more (see `power`)."""
    return power(at_least, spread, prompts) >= _POWER


def prompts_needed(at_least: float, spread: float) -> int:
    """Return the least number of prompts by which a share of `at_least`, below 1, is resolvable (see `power`)."""
    normal = NormalDist()
    return math.ceil((spread * (normal.inv_cdf(CONFIDENCE) + normal.inv_cdf(_POWER)) / (1 - at_least)) ** 2)


def yes_no_spread(at_least: float) -> float:
    """Return the spread of a yes/no score near 95 %, with 5 % of pairs discordant, as many for either model.

    It is the standard deviation of `student - at_least x teacher`, whose mean decides whether the share is reached.
    """
    one_right = _DISCORDANT / 2
    squares = one_right * (1 + at_least**2) + (_RIGHT - one_right) * (1 - at_least) ** 2
    return math.sqrt(squares - (_RIGHT * (1 - at_least)) ** 2) / _RIGHT
