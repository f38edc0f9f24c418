"""The filter's report, from verdicts made by hand."""

import base64
import io
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from data import verdicts as made
from data.verdicts import colour, verdict
from PIL import Image

from koala.data.filter_report import report
from koala.data.tally import Bounds, tally
from koala.errors import KoalaError

BOUNDS: Bounds = {"words": (3, 20), "aesthetic": (5.0, None)}


class Parsed(HTMLParser):
    """The report's tags, its words, and its figures under their headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.figures: dict[str, list[dict[str, Any]]] = {}
        self._heading = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("h2", "h3"):
            self._heading = ""
        if tag == "figure":
            self.figures.setdefault(self._heading, []).append(
                {"class": dict(attrs)["class"], "colour": None, "words": []}
            )
        if tag == "img" and self.figures.get(self._heading):
            content = base64.b64decode(str(dict(attrs)["src"]).partition("base64,")[2])
            self.figures[self._heading][-1]["colour"] = Image.open(io.BytesIO(content)).convert("RGB").getpixel((0, 0))

    def handle_data(self, data: str) -> None:
        if not data.strip():
            return
        self.words.append(data)
        if self.tags[-1][0] in ("h2", "h3") and not self._heading:
            self._heading = data
        elif self.figures.get(self._heading):
            self.figures[self._heading][-1]["words"].append(data)


def reported(folder: Path, *shards: list[dict[str, Any]], **options: Any) -> tuple[dict[str, Any], Parsed]:
    rows, images = made.write(folder, shards, **options)
    summary = report(rows, images, BOUNDS, folder / "out")
    assert summary == json.loads((folder / "out/report.json").read_text())
    return summary, Parsed((folder / "out/report.html").read_text())


def table(parsed: Parsed, name: str, folder: Path) -> list[list[str]]:
    """The cells of the table under a heading, without its bars."""
    section = (folder / "out/report.html").read_text().partition(f'id="{name}"')[2].partition("<h2")[0]
    return [
        re.findall(r"<td>(?:<bdi>)?(.*?)(?:</bdi>)?</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", section)[1:]
    ]


def test_counts_are_those_of_all_shards(tmp_path: Path) -> None:
    first = [verdict(0), verdict(1, "few_words", words=1.0), verdict(2, "few_words", words=2.0)]
    second = [verdict(3, words=5.0), verdict(4, "score.aesthetic", aesthetic=4.0), verdict(5)]
    summary, parsed = reported(tmp_path, first, second)
    assert summary == {
        "samples": 6,
        "kept": 3,
        "kept_share": 0.5,
        "dropped": {"few_words": 2, "score.aesthetic": 1},
        "duplicate_groups": 0,
        "bounds": {"words": [3, 20], "aesthetic": [5.0, None]},
        "values": {"words": {"mean": 3.66667, "deviation": 0.942809}, "size": {"mean": 48.0, "deviation": 0.0}},
        "caption_words": {"3": 2, "5": 1},
    }
    assert table(parsed, "funnel", tmp_path) == [
        ["downloaded", "", "", "6"],
        ["few_words", "2", "33.33%", "4"],
        ["score.aesthetic", "1", "16.67%", "3"],
        ["kept", "", "", "3"],
    ]
    plots = {file.name for file in (tmp_path / "out/plots").iterdir()}
    assert plots == {"funnel.png", "values.png", "kept.png", "just_passed.png", "dropped.png"}
    assert not list((tmp_path / "out").glob("state/*"))


def test_a_histogram_counts_every_sample_that_has_the_value(tmp_path: Path) -> None:
    kept = [verdict(number, aesthetic=5 + number / 1000, words=3.0 + number % 4) for number in range(600)]
    dropped = [verdict(600 + number, "score.aesthetic", aesthetic=4 + number / 100) for number in range(100)]
    odd = [
        verdict(700, aesthetic=1e12),
        verdict(701, aesthetic=float("nan")),
        verdict(702),
        verdict(703, "x", words=2.0),
    ]
    rows, _ = made.write(tmp_path, [kept + dropped + odd])
    with tally(rows, tmp_path / "scratch") as of:
        found = of.histograms(BOUNDS)
    scores = found["aesthetic"]
    assert (sum(scores.kept), sum(scores.dropped)) == (601, 100)
    assert scores.edges[-1] < 6, "one outlier does not decide the range"
    assert scores.kept[-1] > 0
    below = [count for edge, count in zip(scores.edges[1:], scores.kept, strict=True) if edge <= 5]
    assert sum(below) == 0
    words = found["words"]
    assert words.whole
    assert dict(zip(words.edges, words.kept, strict=False)) == {2.5: 153, 3.5: 150, 4.5: 150, 5.5: 150}
    assert words.dropped[0] == 101, "one of them beyond the range"
    assert set(found) == {"words", "size", "aesthetic"}


def test_what_just_passed_is_nearest_to_the_bound_and_kept(tmp_path: Path) -> None:
    rows = [verdict(number, aesthetic=5 + number / 10) for number in range(20)]
    rows += [verdict(20, "blocklist", aesthetic=5.0), verdict(21, "score.aesthetic", aesthetic=4.99)]
    rows += [verdict(22, words=18.0), verdict(23, words=19.0), verdict(24, "many_words", words=21.0)]
    _, parsed = reported(tmp_path, rows)
    shown = parsed.figures["aesthetic at least 5"]
    assert [figure["words"][0] for figure in shown] == [f"aesthetic {5 + number / 10:.4g}" for number in range(8)]
    assert [figure["colour"] for figure in shown] == [colour(number) for number in range(8)]
    at_most = [figure["words"][0] for figure in parsed.figures["words at most 20"]]
    assert at_most == ["words 19", "words 18", *["words 3"] * 6]


def test_dropped_samples_are_shown_by_rule_with_what_they_broke(tmp_path: Path) -> None:
    first = [verdict(0), verdict(1), verdict(2, "few_words", words=1.0, aesthetic=2.0)]
    second = [verdict(3, "undecodable"), verdict(4), verdict(5, "few_words", words=2.0)]
    _, parsed = reported(tmp_path, first, second, broken=[3])
    (broken,) = parsed.figures["undecodable: 1"]
    assert broken["colour"] is None
    assert broken["words"][0] == "cannot be decoded"
    few = {figure["words"][2]: figure for figure in parsed.figures["few_words: 2"]}
    assert few["000000002"]["words"][0] == "words 1, aesthetic 2"
    assert few["000000002"]["colour"] == colour(2)
    assert few["000000005"]["colour"] == colour(5)


def test_a_duplicate_group_shows_the_kept_one_first(tmp_path: Path) -> None:
    rows = [
        verdict(0, "near_duplicate", group=7, dhash=0b0111),
        verdict(1, "duplicate_image", group=7, dhash=0b0100),
        verdict(2, group=7, dhash=0b0100),
        verdict(3, group=9),
        verdict(4, "duplicate_url", group=9),
        verdict(5),
    ]
    summary, parsed = reported(tmp_path, rows)
    assert summary["duplicate_groups"] == 2
    assert list(parsed.figures)[-3:-1] == ["3 samples, group 7", "2 samples, group 9"], "the largest first"
    seven = parsed.figures["3 samples, group 7"]
    assert [figure["colour"] for figure in seven] == [colour(2), colour(0), colour(1)]
    assert [figure["words"][0] for figure in seven] == ["kept", "near_duplicate, 2 bits", "duplicate_image, 0 bits"]
    assert [figure["class"] for figure in seven] == ["kept original", "dropped", "dropped"]
    assert parsed.figures["2 samples, group 9"][1]["words"][0] == "duplicate_url"


def test_text_from_the_web_stays_text(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=http://evil.test/x>'
    rows = [
        verdict(0, caption=evil, url=f"https://{evil}", license=evil, language=evil),
        verdict(1, "few_words", caption="a \u202e b \x1b[31m c\x00", url='javascript:alert("1")', license=evil),
    ]
    _, parsed = reported(tmp_path, rows)
    names = {tag for tag, _ in parsed.tags}
    assert not {"script", "link", "iframe", "object", "form"} & names
    assert all(str(of["src"]).startswith("data:image/") for tag, of in parsed.tags if tag == "img")
    assert all(str(of["href"]).startswith("#") for tag, of in parsed.tags if tag == "a")
    assert not [of for _, of in parsed.tags if any(name.startswith("on") for name in of)]
    assert parsed.words.count(evil) >= 3
    text = (tmp_path / "out/report.html").read_text()
    assert not {"\u202e", "\x1b", "\x00"} & set(text)
    assert "default-src 'none'" in text


def test_hosts_languages_and_licences_are_counted(tmp_path: Path) -> None:
    rows = [
        verdict(0, url="https://A.example/x", language="en", license="CC0"),
        verdict(1, "few_words", url="http://user:word@a.example:8080/y?z=b.example", language="en", license="CC0"),
        verdict(2, url="https://b.example", language=None, license="CC BY"),
        verdict(3, url="", language="de"),
    ]
    _, parsed = reported(tmp_path, rows)
    assert table(parsed, "hosts", tmp_path) == [
        ["a.example", "2", "1", "50.0%"],
        ["b.example", "1", "1", "100.0%"],
        ["not known", "1", "1", "100.0%"],
    ]
    assert [row[0] for row in table(parsed, "languages", tmp_path)] == ["en", "de", "not known"]
    assert [row[0] for row in table(parsed, "licences", tmp_path)] == ["CC0", "CC BY", "not known"]


def test_what_nobody_knows_has_no_section(tmp_path: Path) -> None:
    _, parsed = reported(tmp_path, [verdict(0), verdict(1)])
    shown = [str(of["id"]) for tag, of in parsed.tags if tag == "h2"]
    assert shown == ["funnel", "measured-values", "hosts", "just-passed", "kept"]


def test_the_same_verdicts_give_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the order of their rows, and whatever an earlier call left."""
    rows = [verdict(number, "few_words" if number % 3 else None, words=float(number % 7)) for number in range(200)]
    shuffled = random.Random(0).sample(rows, len(rows))
    for name, order in (("a", rows), ("b", shuffled)):
        made.write(tmp_path / name, [order])
        (tmp_path / name / "out/plots").mkdir(parents=True)
        (tmp_path / name / f"out/plots/{name}.png").write_bytes(b"of an earlier call")
        report(tmp_path / name / "verdicts", tmp_path / name / "images", BOUNDS, tmp_path / name / "out")
    a, b = ({file.name: file.read_bytes() for file in (tmp_path / name / "out").rglob("*.*")} for name in ("a", "b"))
    assert a == b
    assert "report.html" in a


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "it's [12] *?"
    folder.mkdir()
    made.write(tmp_path / "it's 1 of others", [[verdict(number) for number in range(5)]])
    assert reported(folder, [verdict(0), verdict(1)])[0]["samples"] == 2


def test_shards_without_samples_have_a_report(tmp_path: Path) -> None:
    summary, _ = reported(tmp_path, [])
    assert (summary["samples"], summary["kept"], summary["dropped"]) == (0, 0, {})


def test_no_verdicts_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "verdicts").mkdir()
    with pytest.raises(KoalaError, match="holds no verdicts: run `dvc repro filter` again"):
        report(tmp_path / "verdicts", tmp_path, {}, tmp_path)
