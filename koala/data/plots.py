"""Plots of counts, and sheets of pictures. Text from the web is drawn as it stands, never read as mathematics."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL, LINES, LINE_HEIGHT, MARGIN = 160, 3, 13, 6  # pixels; lines of text below a picture


def bars(counts: Mapping[str, int], unit: str, title: str) -> "Figure":
    """Horizontal bars, one a name, the first at the top, each with its count."""
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


def histogram(counts: Mapping[int, int], unit: str, title: str) -> "Figure":
    """Upright bars over whole numbers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(list(counts), list(counts.values()))
    axes.set_xlabel(unit)
    axes.set_ylabel("samples")
    axes.set_title(title)
    return figure


def sheet(pictures: Sequence[tuple[Image.Image, str]], columns: int = 8) -> Image.Image:
    """Pictures in rows, each with its text below."""
    rows = -(-len(pictures) // columns)
    width, height = CELL + MARGIN, CELL + LINES * LINE_HEIGHT + 2 * MARGIN
    canvas = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(LINE_HEIGHT - 2)
    for number, (picture, text) in enumerate(pictures):
        x, y = MARGIN + number % columns * width, MARGIN + number // columns * height
        scale = CELL / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        canvas.paste(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), (x, y))
        for line, words in enumerate(_wrap(text, font, CELL)[:LINES]):
            pen.text((x, y + CELL + 2 + line * LINE_HEIGHT), words, "black", font)
    return canvas


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels (a single longer word excepted)."""
    lines: list[str] = []
    for word in text[:400].split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
