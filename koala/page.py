"""Parts of a report as one HTML file: nothing is fetched, nothing runs, and text from outside is shown as text.

file.write_text(page("Filter", ["<h1>Filter</h1>", table(("rule", "samples"), rows)]), encoding="utf-8")
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 224
"""Longer side of a thumbnail, px."""
_PIXEL_ART = 96  # px: a smaller image is enlarged pixel by pixel
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1080px; padding: 0 1rem; color: #1b1b1b; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .8rem 0; } th { text-align: right; font-weight: 600; vertical-align: bottom; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #eee; text-align: right; }
td { white-space: nowrap; } tr > :first-child { text-align: left; }
img { max-width: 100%; image-rendering: auto; } .note { color: #555; }
"""


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """Return the document: `parts` are its HTML, `style` is CSS beside the house's own."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of text."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def thumbnail(image: "Image", text: str, form: Literal["PNG", "JPEG"] = "PNG") -> str:
    """Return an image of at most `THUMBNAIL` px, with its alternative text. A tiny one is enlarged, and a PNG always."""
    from PIL import Image

    longer = max(image.size)
    tiny = longer < _PIXEL_ART
    factor = THUMBNAIL // longer if tiny else min(1.0, THUMBNAIL / longer)
    size = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
    how = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
    form = "PNG" if tiny else form
    content = io.BytesIO()
    image.convert("RGB").resize(size, how).save(content, form)
    return embedded(content.getvalue(), text, form)


def embedded(content: bytes, text: str, form: Literal["PNG", "JPEG"] = "PNG") -> str:
    """Return an encoded image with its alternative text."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(text)}" src="data:image/{form.lower()};base64,{data}">'
