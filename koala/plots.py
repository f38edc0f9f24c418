"""Plots of counts, and images laid out in sheets and grids. Text from the web is shown literally, never as TeX.

All text is drawn with matplotlib's own DejaVu Sans, so that equal content gives equal bytes whatever fonts a machine has.
"""

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Pixels.
_MARGIN = 6
_SHEET_CELL, _SHEET_LINES, _SHEET_LINE_HEIGHT = 160, 3, 13
_SMALLEST_CELL = 96  # smaller images are enlarged, pixel by pixel, to be visible
_TEXT_WIDTH = 190
_SERIES = ("#2a6f97", "#e07a5f")
"""Colours of a histogram's series, which also those tell apart who do not see red from green."""


def bars(counts: Mapping[str, int], unit: str, title: str) -> "Figure":
    """Plot one horizontal bar per name, the first at the top, with its count."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.3 * len(counts)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(range(len(counts)), list(counts.values()))
    axes.bar_label(drawn, padding=3)
    axes.set_yticks(range(len(counts)), list(map(drawable, counts)))
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(unit)
    axes.set_title(title)
    return figure


def histogram(
    edges: Sequence[float], counts: Mapping[str, Sequence[int]], lines: Sequence[float], title: str, whole: bool = False
) -> "Figure":
    """Plot counts of samples by a value: the bars of each name of `counts` on those of the names before it.

    Args:
        edges: Ends of the bins.
        counts: Name -> samples in each bin.
        lines: Values that are marked.
        title: What the value is.
        whole: Whether only whole numbers are marked on its axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.2, 2.4), layout="constrained", dpi=150)
    axes = figure.subplots()
    below = [0] * (len(edges) - 1)
    for (name, series), colour in zip(counts.items(), _SERIES, strict=False):
        axes.stairs(
            [a + b for a, b in zip(below, series, strict=True)],
            edges,
            baseline=below,
            fill=True,
            color=colour,
            label=name,
        )
        below = [a + b for a, b in zip(below, series, strict=True)]
    for line in lines:
        axes.axvline(line, color="#1b1b1b", linewidth=1.2, linestyle="--")
    axes.set_title(drawable(title), fontsize="medium", loc="left", parse_math=False)
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(labelsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize="small", borderpad=0, handlelength=1)
    return figure


def contact_sheet(images: Sequence[tuple[Image.Image, str]], across: int = 8) -> Image.Image:
    """Lay out images of any size as thumbnails, `across` in a row, each with its text below."""
    rows = -(-len(images) // across)
    width = _SHEET_CELL + _MARGIN
    height = _SHEET_CELL + _SHEET_LINES * _SHEET_LINE_HEIGHT + 2 * _MARGIN
    sheet = Image.new("RGB", (across * width + _MARGIN, rows * height + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(_font_file(), _SHEET_LINE_HEIGHT - 3)
    for index, (image, text) in enumerate(images):
        row, column = divmod(index, across)
        x, y = _MARGIN + column * width, _MARGIN + row * height
        scale = _SHEET_CELL / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        sheet.paste(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), (x, y))
        for line, words in enumerate(_wrap(drawable(text[:400]), _SHEET_CELL, font)[:_SHEET_LINES]):
            pen.text((x, y + _SHEET_CELL + 2 + line * _SHEET_LINE_HEIGHT), words, "black", font)
    return sheet


def grid(prompts: Sequence[str], columns: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Lay out images of one size: a row per prompt, with its text, and a column per label of `columns`."""
    side = next(iter(columns.values()))[0].width
    enlarge = max(1, -(-_SMALLEST_CELL // side))
    cell = side * enlarge
    font = ImageFont.truetype(_font_file(), 12)
    step = cell + _MARGIN
    titles = ["\n".join(_wrap(drawable(label), cell, font)) for label in columns]
    header = 2 * _MARGIN + 16 * max(title.count("\n") + 1 for title in titles)
    sheet = Image.new("RGB", (_TEXT_WIDTH + step * len(columns) + _MARGIN, header + step * len(prompts)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(zip(titles, columns.values(), strict=True)):
        left = _TEXT_WIDTH + step * column
        pen.multiline_text((left, _MARGIN), title, "black", font, spacing=3)
        for row, image in enumerate(images):
            sheet.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (left, header + step * row))
    for row, prompt in enumerate(prompts):
        lines = _wrap(drawable(prompt), _TEXT_WIDTH - 2 * _MARGIN, font)[: cell // 16]
        pen.multiline_text((_MARGIN, header + step * row + _MARGIN), "\n".join(lines), "black", font, spacing=3)
    return sheet


def tiles(images: Sequence[Image.Image], across: int) -> Image.Image:
    """Lay out images of one size, `across` in a row."""
    width, height = images[0].size
    enlarge = max(1, -(-_SMALLEST_CELL // width))
    width, height = width * enlarge, height * enlarge
    rows = -(-len(images) // across)
    sheet = Image.new("RGB", (across * (width + _MARGIN) + _MARGIN, rows * (height + _MARGIN) + _MARGIN), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, across)
        place = (_MARGIN + column * (width + _MARGIN), _MARGIN + row * (height + _MARGIN))
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
    return sheet


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Split text into lines of at most `width` pixels: between words, and within one that is longer, such as a path."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def drawable(text: str) -> str:
    """Return text with the names of the scripts that the font lacks in their place, `(Hiragana)`: it would draw boxes."""
    words = []
    for script, letters in groupby(text, _missing):
        words.append(f"({script.title()})" if script else "".join(letters))
    return "".join(words)


def _missing(character: str) -> str | None:
    """Return the script of a character that the font lacks, which its name begins with."""
    if ord(character) in _characters() or character.isspace():
        return None
    return unicodedata.name(character, "?").partition(" ")[0]


@cache
def _characters() -> Collection[int]:
    """Return the characters of the font."""
    from matplotlib.ft2font import FT2Font

    return FT2Font(_font_file()).get_charmap().keys()


def _font_file() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
