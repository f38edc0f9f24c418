"""Progress as a log shows it."""

import pytest

from koala import console


def test_a_log_shows_a_bar_the_count_and_an_estimate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds an item, three of eight done before: each line counts them, and estimates from the new ones alone."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    assert list(console.progress("abcde", "distill", total=8, done=3)) == list("abcde")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"distill [{'#' * 12}{'-' * 12}] 4/8, 0:40 left"
    assert lines[-1] == f"distill [{'#' * 24}] 8/8, 0:00 left"
    assert len(lines) == 5


def test_a_log_is_not_flooded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100_000))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock) / 100)
    list(console.progress(range(5000), "encode"))
    assert len(capsys.readouterr().err.splitlines()) == 5
