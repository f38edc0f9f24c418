"""What is drawn of text from the web."""

import warnings
from pathlib import Path

from PIL import Image

from koala import plots

BLANK = Image.new("RGB", (8, 8), "white")


def test_scripts_that_the_font_lacks_are_named_in_place_of_boxes() -> None:
    shown = "Café, Ёлка, Ωμέγα, 10 € “x”, שלום مرحبا"
    assert plots.drawable(shown) == shown
    assert plots.drawable("Q ミツバチ bee") == "Q (Katakana) bee"
    assert plots.drawable("ตัวอักษร N.") == "(Thai) N."
    assert plots.drawable("a\n\U000f0000") == "a\n(?)"


def test_two_accents_are_two_drawings() -> None:
    one, two = (plots.contact_sheet([(BLANK, text)]).tobytes() for text in ("é", "è"))
    assert one != two
    one, two = (plots.grid([text], {"x": [BLANK]}).tobytes() for text in ("é", "è"))
    assert one != two


def test_names_in_any_script_are_plotted_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.bars({"ライセンス": 3}, "samples", "").savefig(tmp_path / "bars.png")
        plots.histogram([0, 1], {"kept": [1]}, [], "美学").savefig(tmp_path / "histogram.png")


def test_an_axis_of_whole_numbers_has_whole_marks() -> None:
    (axes,) = plots.histogram([-0.5, 0.5], {"kept": [1]}, [], "urls", whole=True).axes
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_counts_have_whole_marks() -> None:
    (axes,) = plots.histogram([0, 1], {"kept": [15]}, [], "language_probability").axes  # 2.5 would be shown as 2
    assert all(tick == round(tick) for tick in axes.get_yticks())


def test_a_heading_longer_than_its_column_is_broken_and_leaves_the_next_alone() -> None:
    sheet = plots.grid(["a"], {"artifacts/demo/release/koala-700m": [BLANK], "": [BLANK]})
    assert sheet.crop((0, 0, sheet.width - 102, sheet.height)).convert("L").getextrema()[0] == 0
    assert sheet.crop((sheet.width - 102, 0, sheet.width, sheet.height)).getextrema() == ((255, 255),) * 3
