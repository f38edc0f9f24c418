"""Plots of counts, and images laid out in sheets and grids. Text from the web is shown literally, never as TeX."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

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
    axes.set_yticks(range(len(counts)), list(counts))
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(unit)
    axes.set_title(title)
    return figure


def histogram(
    edges: Sequence[float], counts: Mapping[str, Sequence[int]], lines: Sequence[float], title: str
) -> "Figure":
    """Plot counts of samples by a value: the bars of each name of `counts` on those of the names before it.

    Args:
        edges: Ends of the bins.
        counts: Name -> samples in each bin.
        lines: Values that are marked.
        title: What the value is.
    """
    from matplotlib.figure import Figure

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
    axes.set_title(title, fontsize="medium", loc="left", parse_math=False)
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
    font = ImageFont.load_default(_SHEET_LINE_HEIGHT - 2)
    for index, (image, text) in enumerate(images):
        row, column = divmod(index, across)
        x, y = _MARGIN + column * width, _MARGIN + row * height
        scale = _SHEET_CELL / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        sheet.paste(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), (x, y))
        for line, words in enumerate(_wrap(text[:400], _SHEET_CELL, font)[:_SHEET_LINES]):
            pen.text((x, y + _SHEET_CELL + 2 + line * _SHEET_LINE_HEIGHT), words, "black", font)
    return sheet


def grid(prompts: Sequence[str], columns: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Lay out images of one size: a row per prompt, with its text, and a column per label of `columns`."""
    side = next(iter(columns.values()))[0].width
    enlarge = max(1, -(-_SMALLEST_CELL // side))
    cell = side * enlarge
    font = ImageFont.load_default(13)
    step = cell + _MARGIN
    titles = ["\n".join(_wrap(label, cell, font)) for label in columns]
    header = 2 * _MARGIN + 16 * max(title.count("\n") + 1 for title in titles)
    sheet = Image.new("RGB", (_TEXT_WIDTH + step * len(columns) + _MARGIN, header + step * len(prompts)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(zip(titles, columns.values(), strict=True)):
        left = _TEXT_WIDTH + step * column
        pen.multiline_text((left, _MARGIN), title, "black", font, spacing=3)
        for row, image in enumerate(images):
            sheet.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (left, header + step * row))
    for row, prompt in enumerate(prompts):
        lines = _wrap(prompt, _TEXT_WIDTH - 2 * _MARGIN, font)[: cell // 16]
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


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """Split text into lines of at most `width` pixels, longer words excepted."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
