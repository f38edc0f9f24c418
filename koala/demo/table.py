"""A URL list of the project's own images, with the faults of the real web in fixed shares.

Keep this module light to import: `ShapesSource` is read with params.yaml.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from koala.data.config import SourceConfig
from koala.errors import KoalaError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FAULT_SHARES = {
    "missing": 0.02,
    "error": 0.01,
    "flaky": 0.01,
    "slow": 0.001,  # each costs a timeout
    "html": 0.01,
    "truncated": 0.01,
    "tiny": 0.01,
    "copy": 0.02,
}
"""Shares of the faults of koala.demo.server, and of copies, in the table."""
BAD_CAPTION_SHARE = 0.03
BAD_CAPTIONS = (
    "{colour}",
    "a {colour} {shape}, more at https://example.com/{index}",
    "a picture named IMG_{index:04d}.jpg",
    "buy now: a {colour} {shape} at half the price",
    "{background} 背景 の 上 に {colour} 図形",
)


class ShapesSource(SourceConfig):
    """Images of koala.demo.shapes, served by koala.demo.server."""

    kind: Literal["shapes"] = "shapes"
    """Name of the kind."""
    location: str
    """Base URL of the server."""
    rows: int = Field(gt=0)
    """Rows of the table; 20 or more, so that each fault occurs."""
    seed: int = 0
    """Series of images, and seed of the faults' places; the server's seed must be the same."""

    def tables(self, dropped: Counter[str]) -> "Iterator[pa.Table]":
        """Yield the whole table. Raises KoalaError if it has too few rows for all faults."""
        yield shapes_table(self)


def shapes_table(config: ShapesSource) -> "pa.Table":
    """Build rows for scenes 0 .. rows-1 of the series `seed`, with faults in fixed shares at places sampled by `seed`.

    Each fault occurs at least once. A copy repeats the image of an earlier good row. Scores are random, around 5.5 of 10.
    """
    import numpy as np
    import pyarrow as pa

    from koala.demo import shapes

    random = np.random.default_rng((config.seed, config.rows))
    urls, captions = [], []
    good: list[int] = []
    for index, kind in enumerate(_kinds(config.rows, random)):
        shown = index
        if kind == "copy":
            shown = int(random.choice(good))
        elif kind == "ok":
            good.append(index)
        scene = shapes.sample_scene(config.seed, shown)
        if kind == "bad caption":
            template = BAD_CAPTIONS[int(random.integers(len(BAD_CAPTIONS)))]
            caption = template.format(index=index, **vars(scene.attributes))
        else:
            caption = shapes.caption(scene, config.seed, shown)
        folder = "ok" if kind == "bad caption" else kind
        urls.append(f"{config.location.rstrip('/')}/{folder}/{shown:05d}.jpg")
        captions.append(caption)
    scores = {column: random.normal(5.5, 1.0, config.rows).clip(0, 10).round(3) for column in config.score_columns}
    return pa.table({"url": urls, "caption": captions} | scores)


def _kinds(rows: int, random: "np.random.Generator") -> list[str]:
    """Return `ok`, a fault or `bad caption` for each row. The first row is good, so that a copy has a row to copy."""
    kinds = [kind for kind, share in FAULT_SHARES.items() for _ in range(math.ceil(share * rows))]
    kinds += ["bad caption"] * math.ceil(BAD_CAPTION_SHARE * rows)
    if len(kinds) >= rows:
        raise KoalaError(f"source.rows: {rows} are too few for a table of shapes; take 20 or more")
    kinds += ["ok"] * (rows - 1 - len(kinds))
    return ["ok", *(kinds[place] for place in random.permutation(len(kinds)))]
