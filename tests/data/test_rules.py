"""Rules of captions and blank images, each with what breaks it and what is near to breaking it."""

import io

import pytest
from PIL import Image, ImageDraw

from koala.data.config import FilterConfig
from koala.data.judge import judge
from koala.data.rules.base import Rule, View
from koala.data.rules.blank import Blank
from koala.data.rules.boilerplate import Boilerplate
from koala.data.rules.characters import Characters
from koala.data.rules.control import Control
from koala.data.rules.language import Language
from koala.data.rules.markup import Markup
from koala.data.rules.personal import Personal
from koala.data.rules.repetition import Repetition
from koala.data.rules.urls import Urls
from koala.data.shards import Sample

TITLE = "Red Fox In Deep Snow Wall Art"


def broken(rule: Rule, caption: str, image: Image.Image | None = None) -> str | None:
    stream = io.BytesIO()
    (image or Image.new("RGB", (8, 8))).save(stream, "PNG")
    found: str | None = judge(Sample("0", stream.getvalue(), "png", caption, {}), FilterConfig(rules=(rule,)))["rule"]
    return found


@pytest.mark.parametrize(
    ("rule", "name", "bad", "good"),
    [
        (Characters(at_least=5), "short_caption", ["a fox"[:4]], ["a fox"]),
        (Characters(at_most=5), "long_caption", ["a foxy"], ["a fox"]),
        (
            Repetition(),
            "repetition",
            ["red red red shoe", "big red shoe big red shoe big red shoe"],
            ["a very very red shoe", "the cat on the mat in the house of the man"],
        ),
        (Control(), "control", ["a\x00b", "\u202egnp.exe", "b\ufffdse"], ["a\tb\n", "👩\u200d🚀 in space", "café"]),
        (
            Markup(),
            "markup",
            ["a <b>fox</b>", "cats &amp; dogs", "[url=x]fox[/url]", "[fox](https://x.org)", "{{name}}"],
            ["I <3 foxes", "a < b and b > a", "AT&T tower", "a fox [left] (right)"],
        ),
        (
            Urls(),
            "urls",
            ["see https://x.org/a", "www.foxes.de", "by photos.example.com"],
            ["a photo.in the park", "version 2.0 of the U.S. map", "the .com boom"],
        ),
        (
            Boilerplate(),
            "boilerplate",
            [
                "IMG_2041",
                "DSC 0123",
                "fox.JPG",
                "Untitled",
                "image 3",
                "A fox | Shutterstock",
                "Sale: 50% off",
                "© 2019 A. Fox",
            ],
            [
                "a picture of an image of a fox",
                "untitled road in the hills",
                "a logo on a wall",
                "stock market in 1929",
            ],
        ),
        (
            Personal(),
            "personal",
            [
                "write to jo.fox@mail.example.org",
                "call 555-123-4567 now",
                "+49 30 1234567",
                "Tel: 030/123 45".replace("/", " "),
            ],
            [
                "1920-1080 wallpaper",
                "ISBN 978-3-16-148410-0",
                "from 1914-1918",
                "@fox on the roof",
                "price 2,345,678.90",
            ],
        ),
        (
            Language(),
            "language",
            [
                "ein roter Fuchs sitzt im tiefen Schnee",
                "красная лиса сидит в снегу",
                "雪の中に座る赤い狐",
                "สุนัขจิ้งจอกสีแดง",
            ],
            # The second to fifth are captions of Tux Paint's stamps.
            [
                "a red fox sits in the deep snow",
                "A double decker bus.",
                "A European coin of 20 cents (0.20 €).",
                "Pedestrian Crossing (“PED XING”).",
                "Cent sign. 100 cents make 1 dollar.",
                "roter Fuchs im",
            ],
        ),
    ],
)
def test_a_rule_drops_the_bad_and_keeps_the_good(rule: Rule, name: str, bad: list[str], good: list[str]) -> None:
    assert {caption: broken(rule, caption) for caption in bad} == dict.fromkeys(bad, name)
    assert {caption: broken(rule, caption) for caption in good} == dict.fromkeys(good)


def test_blank_images_are_dropped_and_a_page_with_a_line_is_kept() -> None:
    page = Image.new("RGB", (400, 500), "white")
    assert broken(Blank(), "", page) == "blank"
    assert str(Blank().measure(Sample("0", b"", "png", "", {}), View(page))["entropy"]) == "0.0"  # not -0
    ImageDraw.Draw(page).text((40, 40), "one line of text that stands here", "black", font_size=22)
    assert broken(Blank(), "", page) is None


def test_the_language_is_told() -> None:
    row = judge(Sample("0", b"", "png", "ein roter Fuchs sitzt im Schnee", {}), FilterConfig(rules=(Language(),)))
    assert row["language"] == "de"
    assert row["language_probability"] < 0.5


def test_capitals_do_not_change_the_language() -> None:
    config = FilterConfig(rules=(Language(),))
    title, sentence = (judge(Sample("0", b"", "png", text, {}), config) for text in (TITLE, TITLE.lower()))
    assert title["language_probability"] == sentence["language_probability"] > 0.2
