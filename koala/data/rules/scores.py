"""The rule `scores`."""

from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View
from koala.data.shards import Sample


class Scores(Rule):
    """Scores of the table or of a scorer. Drops as `score.COLUMN`. A score that is missing or not a number breaks the rule."""

    kind: Literal["scores"] = "scores"
    """Name of the rule."""
    at_least: dict[str, float] = Field(default_factory=dict)
    """Least value of each column."""
    at_most: dict[str, float] = Field(default_factory=dict)
    """Greatest value of each column."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return the columns that have a bound."""
        return {column: sample.number(column) for column in self.bounds()}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of each column."""
        columns = [*self.at_least, *self.at_most]
        return {column: (self.at_least.get(column), self.at_most.get(column)) for column in columns}

    def reason(self, value: str, low: bool) -> str:
        """Return `score.COLUMN`."""
        return f"score.{value}"
