"""Progress as a log shows it."""

from types import SimpleNamespace

import pytest

from koala import console


def test_a_log_shows_a_bar_the_count_and_an_estimate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds an item, three of eight done before: each line counts them, and estimates from the new ones alone."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(
        console, "time", SimpleNamespace(monotonic=lambda: float(next(clock)))
    )  # other threads have clocks too
    assert list(console.progress("abcde", "distill", total=8, done=3)) == list("abcde")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"distill [{'#' * 12}{'-' * 12}] 4/8, 0:40 left"
    assert lines[-1] == f"distill [{'#' * 24}] 8/8, 0:00 left"
    assert len(lines) == 5


def test_a_slow_first_item_does_not_spoil_the_estimate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute for the first item, which compiles, and ten seconds for each of the rest."""
    clock = iter([0, *range(60, 1000, 10)])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    list(console.progress("abcd", "distill"))
    lefts = [line.split(", ")[-1] for line in capsys.readouterr().err.splitlines()]
    assert lefts == ["3:00 left", "0:20 left", "0:10 left", "0:00 left"]


def test_an_item_counts_as_what_it_stands_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of images after 20 seconds each: the first line knows a rate, where an image at a time it knew one of 1/1000."""
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    list(console.progress([1000, 1000], "download", total=4000, done=2000, unit="images", size=int))
    first, last = capsys.readouterr().err.splitlines()
    assert first.endswith("3000/4000, 50.0 images/s, 0:20 left")
    assert last.endswith("4000/4000, 50.0 images/s, 0:00 left")


def test_a_log_is_not_flooded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100_000))
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock) / 100))
    list(console.progress(range(5000), "encode"))
    assert len(capsys.readouterr().err.splitlines()) == 5
