"""The report as one HTML file."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from koala.evaluate import page
from koala.evaluate.prompts import Prompt
from koala.evaluate.statistics import OfCategory

PROMPTS = [
    Prompt('a <script>alert(1)</script> cat" onerror="x', 5),
    Prompt("a dog & a cow", 6),
    Prompt("a dog & a cow", 7),
]
COST = {
    "teacher": {
        "unet_parameters": 2_567_463_684,
        "unet_flops": 6e12,
        "step_ms": 20.04,
        "image_ms": 1234.4,
        "disk_bytes": 7e9,
    },
    "after": {"unet_parameters": 782_000_000, "unet_flops": 2e12, "step_ms": 9, "image_ms": 600, "disk_bytes": 3.2e9},
}
CATEGORIES = [
    OfCategory("a <b>", "score", 2, 0.5, 0.4, 0.8, (0.712, 0.9)),
    OfCategory("counts", "score", 1, 0.5, 0.6, 1.2, (1, 1.4)),
]
GREY = {"teacher": 10, "before": 20, "after": 30}
VALUES = {
    "teacher": {"score": [0.5, 0.9, 0.9]},
    "before": {"score": [0.1, 0.1, 0.1]},
    "after": {"score": [0.75, 0.8, 0.1], "agreement_db": [1.0, 2.0, 3.0]},
}


class Parsed(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append(data.strip())

    def images(self) -> list[Image.Image]:
        sources = [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in sources]


@pytest.fixture
def written(tmp_path: Path) -> str:
    plots = tmp_path / "plots"
    plots.mkdir()
    for name, side in (("grid", 7), ("curves", 8), ("attributes", 9)):
        Image.new("RGB", (side, side)).save(plots / f"{name}.png")
    images = {
        model: [Image.new("RGB", (32, 16), (grey, number, 0)) for number in range(3)] for model, grey in GREY.items()
    }
    table = (["model", "score"], [["teacher", "76.7% (50.0-90.0)"], ["koala after", "55.0% (40.0-75.0)"]])
    file = tmp_path / "report.html"
    page.write(
        file, "koala", table, VALUES, COST, CATEGORIES, "score", images, PROMPTS, plots, {"sampler": "Euler", "seed": 5}
    )
    return file.read_text()


def test_costs_that_were_measured_are_shown(written: str) -> None:
    rows = re.findall(r"<tr>(.*?)</tr>", written)
    assert "<td>ms of an image, with text encoders and VAE</td><td>1,234</td><td>600</td>" in rows
    assert "<td>MB of weights on disk</td><td>7,000.0</td><td>3,200.0</td>" in rows
    assert "GiB of memory" not in written


def test_categories_are_shown(written: str) -> None:
    rows = re.findall(r"<tr>(.*?)</tr>", written)
    assert "<td>a &lt;b&gt;</td><td>score</td><td>2</td><td>0.5</td><td>0.4</td><td>80.0% (71.2-90.0)</td>" in rows
    assert written.index("a &lt;b&gt;") < written.index("counts")


def test_the_page_fetches_nothing_and_runs_nothing(written: str) -> None:
    parsed = Parsed(written)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in parsed.tags}
    assert all(
        str(attributes["src"]).startswith("data:image/png;base64,") for tag, attributes in parsed.tags if tag == "img"
    )
    assert not re.search(r"https?://", written)
    assert "default-src 'none'" in written
    assert any("a <script>alert(1)</script> cat" in words for words in parsed.words)  # as text
    assert {frozenset(attributes) for tag, attributes in parsed.tags if tag == "img"} == {frozenset(("alt", "src"))}


def test_the_page_holds_figures_plots_and_what_they_depend_on(written: str) -> None:
    parsed = Parsed(written)
    for words in ("76.7% (50.0-90.0)", "sampler", "Euler", "attributes"):
        assert words in parsed.words
    assert [image.size for image in parsed.images()[-3:]] == [(7, 7), (8, 8), (9, 9)]


def test_prompts_are_ranked_by_their_mean_difference_with_the_images_of_each_model(written: str) -> None:
    parsed = Parsed(written)
    differences = [words for words in parsed.words if re.fullmatch(r"[+-]0\.\d+", words)]
    assert differences == ["-0.45", "+0.25"]  # the worst and the best; the two seeds of a prompt are one
    assert "1 of 2 prompts are below the teacher." in parsed.words
    assert "koala before distillation" in parsed.words
    shown = [image.convert("RGB").getpixel((0, 0)) for image in parsed.images()[:6]]
    assert shown == [(grey, 2, 0) for grey in GREY.values()] + [(grey, 0, 0) for grey in GREY.values()]
    assert parsed.images()[0].size == (224, 112)
    assert "seed 7" in parsed.words


def test_without_a_score_of_which_more_is_better_there_is_no_ranking(tmp_path: Path) -> None:
    images = {model: [Image.new("RGB", (8, 8))] * 3 for model in GREY}
    (tmp_path / "plots").mkdir()
    page.write(tmp_path / "r.html", "koala", ([], []), VALUES, COST, [], None, images, PROMPTS, tmp_path / "plots", {})
    assert "Worst" not in (tmp_path / "r.html").read_text()
    assert "By category" not in (tmp_path / "r.html").read_text()
