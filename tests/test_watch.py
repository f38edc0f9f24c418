"""The filter's report beside the champion's: what counts as far."""

from typing import Any

import pytest

from koala.watch import FilterLimits, drift

THEN: dict[str, Any] = {
    "samples": 1000,
    "kept": 800,
    "dropped": {"words": 150, "blank": 50},
    "caption_words": {"10": 400, "20": 400},
    "values": {"aesthetic": {"mean": 5.0, "deviation": 0.4}},
}
ALL = FilterLimits(shares=0.05, caption_words=0.1, values=0.5)


def test_a_report_is_not_far_from_itself_or_from_one_of_another_size() -> None:
    assert drift(ALL, THEN, THEN) == []
    smaller = {"samples": 100, "kept": 80, "dropped": {"words": 15, "blank": 5}, "caption_words": {"15": 80}}
    assert drift(ALL, {**THEN, **smaller}, THEN) == []


@pytest.mark.parametrize(
    ("changed", "limits", "near", "lines"),
    [
        (
            {"kept": 700, "dropped": {"words": 130, "blank": 50, "aspect": 120}},
            {"shares": 0.05},
            {"shares": 0.13},
            ["kept: 80.0% -> 70.0% of the samples", "dropped by aspect: 0.0% -> 12.0% of the samples"],
        ),
        (
            {"caption_words": {"10": 100, "20": 700}},
            {"caption_words": 0.2},
            {"caption_words": 0.3},
            ["words of a caption: 15.0 -> 18.8"],
        ),
        (
            {"values": {"aesthetic": {"mean": 4.7, "deviation": 9}, "nsfw": {"mean": 1, "deviation": 1}}},
            {"values": 0.7},
            {"values": 0.8},
            ["mean of aesthetic: 5 -> 4.7"],
        ),
        ({"values": {}}, {"values": 0.1}, {"values": 0.1}, []),
    ],
)
def test_what_is_beyond_its_limit_is_told(
    changed: dict[str, Any], limits: dict[str, float], near: dict[str, float], lines: list[str]
) -> None:
    assert drift(FilterLimits(**limits), {**THEN, **changed}, THEN) == lines
    assert drift(FilterLimits(**near), {**THEN, **changed}, THEN) == []
    assert drift(FilterLimits(), {**THEN, **changed}, THEN) == []
