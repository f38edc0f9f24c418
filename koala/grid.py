"""Grids of pictures: prompts down, models across, the same seed along a row."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

_SMALLEST_CELL = 96  # px: smaller pictures are enlarged, pixel by pixel, so that a person can see them
_MARGIN = 6
_TEXT_WIDTH = 190


def grid(prompts: Sequence[str], columns: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """One picture of many: a row for each prompt with its text, a column for each label of `columns`."""
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
    """Pictures of one size side by side, `across` in a row."""
    width, height = images[0].size
    enlarge = max(1, -(-_SMALLEST_CELL // width))
    width, height = width * enlarge, height * enlarge
    rows = -(-len(images) // across)
    sheet = Image.new("RGB", (across * (width + _MARGIN) + _MARGIN, rows * (height + _MARGIN) + _MARGIN), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, across)
        place = (_MARGIN + column * (width + _MARGIN), _MARGIN + row * (height + _MARGIN))
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
    return sheet


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _wrap(text: str, width: int, font: Font) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
