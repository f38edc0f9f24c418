"""The command `koala generate`: pictures from any model of SDXL's kind, as a grid."""

from pathlib import Path
from typing import TYPE_CHECKING

from koala import pipeline
from koala.console import progress, say
from koala.grid import grid, tiles

if TYPE_CHECKING:
    from PIL.Image import Image


def generate(
    models: list[str], prompt: str, seed: int, count: int, steps: int, guidance: float, dtype: str, out: Path
) -> None:
    """Draw `count` pictures of `prompt` with seeds from `seed` on, and write them as one grid to `out` (PNG).

    One model: the pictures side by side. Several: seeds down, models across. Raises KoalaError for a model that cannot be
    loaded.
    """
    drawn: dict[str, list[Image]] = {}
    for model in models:
        loaded = pipeline.load(model, dtype)
        images: list[Image] = []
        for number in progress(range(count), f"generate {model}"):
            images += pipeline.draw(loaded, [(prompt, seed + number)], steps, guidance)
        drawn[model] = images
    if len(models) == 1:
        sheet = tiles(drawn[models[0]], across=min(count, 4))
    else:
        sheet = grid([f"{prompt} (seed {seed + number})" for number in range(count)], drawn)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    say(f"{count} picture{'s' * (count > 1)} of each model in {out}")
