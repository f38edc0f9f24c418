"""The gate: the rules that a student must meet to be released."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from pydantic import model_validator

from koala.config import Config
from koala.errors import KoalaError
from koala.evaluate.config import COSTS
from koala.evaluate.statistics import Estimate


class Requirement(Config):
    """A rule of the gate. A score meets it where its one-sided 95 % bound does; a cost has none: its value decides."""

    metric: str
    """A score such as `attributes/all`, or a cost: `unet_parameters`, `disk_bytes`, `image_ms`, `peak_bytes`, `speed_up`, ..."""

    of: Literal["teacher", "champion"] | None = None
    """`teacher`, `champion`: judge the student's share of that model's score. The champion is the release of this student that
    stands at the first target; where there is none, the rule is met. Left out: the student's own figure."""

    at_least: float | None = None
    """Least value. The score's lower bound must reach it."""

    at_most: float | None = None
    """Greatest value, in place of `at_least`. The score's upper bound must keep to it."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"the rule for {self.metric} wants either at_least or at_most")
        if self.of and self.metric in COSTS:
            raise ValueError(f"{self.metric} has no share of the {self.of}'s: take out `of: {self.of}`")
        return self

    @property
    def figure(self) -> str:
        """Name of what it judges, as metrics.json has it."""
        return f"share_of_{self.of}/{self.metric}" if self.of else self.metric

    def __str__(self) -> str:
        """Return the rule in words, of characters that MLflow allows in a tag's name."""
        subject = f"{self.metric} of {self.of}" if self.of else self.metric
        return f"{subject} {'at most' if self.at_least is None else 'at least'} {self._limit:.12g}"

    @property
    def _limit(self) -> float:
        limit = self.at_most if self.at_least is None else self.at_least
        assert limit is not None
        return limit


@dataclass(frozen=True)
class Comparison:
    """A student beside the champion."""

    shares: Mapping[str, Estimate]
    """What it has of each of the champion's scores."""
    hindrance: str = ""
    """Why they cannot be compared, where they cannot. No rule is met then."""
    itself: bool = False
    """Whether the champion is this student with this evaluation: the release is sent again, and need not beat itself."""


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a student."""

    rule: Requirement
    value: float | None
    """The figure; None where there is no champion, or one that cannot be compared with."""
    bound: float | None
    """The score's one-sided 95 % bound; None of a cost."""
    hindrance: str = ""
    """Why the rule cannot be judged."""
    itself: bool = False
    """Whether the champion is the student itself, which it need not beat."""

    @property
    def judged(self) -> float | None:
        """Return the figure that decides."""
        return self.value if self.bound is None else self.bound

    @property
    def passed(self) -> bool:
        """Return whether the rule is met; NaN meets none."""
        rule, judged = self.rule, self.judged
        if judged is None:
            return not self.hindrance
        if self.itself:
            return True
        least, most = rule.at_least, rule.at_most
        return (least is None or judged >= least) and (most is None or judged <= most)

    def __str__(self) -> str:
        """Return the rule with its figures: `attributes/all at least 0.97: 0.981, lower bound 0.959`."""
        if self.value is None:
            return f"{self.rule}: {self.hindrance or 'there is none to beat'}"
        which = "upper" if self.rule.at_least is None else "lower"
        bound = "" if self.bound is None else f", {which} bound {_digits(self.bound)}"
        return f"{self.rule}: {_digits(self.value)}{bound}{', of itself' if self.itself else ''}"

    def report(self) -> dict[str, Any]:
        """Return the verdict as JSON-able values."""
        figures = {"value": self.value, "bound": self.bound, "passed": self.passed}
        return {**self.rule.model_dump(mode="json", exclude_none=True), **figures}


def judge(
    metrics: Mapping[str, Any], rules: Sequence[Requirement], champion: Comparison | None = None
) -> list[Verdict]:
    """Return the verdict of every rule.

    Args:
        metrics: Content of metrics.json.
        rules: The rules.
        champion: The student beside the champion; None where there is no champion.

    Raises:
        KoalaError: A rule names what was not measured.
    """
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    figures, bounds = {**metrics["after"], **numbers}, dict(metrics.get("bounds", {}))
    for score, share in champion.shares.items() if champion else ():
        name = Requirement(metric=score, of="champion", at_least=0).figure
        figures[name], bounds[name] = share.value, share.bounds
    verdicts = []
    for rule in rules:
        if rule.of == "champion" and (champion is None or rule.metric not in champion.shares):
            hindrance = champion.hindrance or "the champion was not measured by it" if champion else ""
            verdicts.append(Verdict(rule, None, None, hindrance))
        else:
            itself = rule.of == "champion" and champion is not None and champion.itself
            verdicts.append(replace(_judge(rule, figures, bounds), itself=itself))
    return verdicts


def _judge(rule: Requirement, figures: Mapping[str, float], bounds: Mapping[str, Sequence[float]]) -> Verdict:
    name = rule.figure
    if name not in figures:
        raise KoalaError(f"publish.require names {name!r}, which was not measured: choose from {', '.join(figures)}")
    if name in COSTS:
        return Verdict(rule, figures[name], None)
    if name not in bounds:
        raise KoalaError(f"publish.require: the evaluation gives no bounds of {name}: run `koala evaluate` again")
    lower, upper = bounds[name]
    return Verdict(rule, figures[name], upper if rule.at_least is None else lower)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
