"""What is known of public lists: their repository on the Hub, their files, and the names of their columns.

A preset fills in what a profile's `source` leaves out. docs/data.md says where each was looked up. Keep this module light to
import: it is read with params.yaml.
"""

from collections.abc import Mapping
from typing import Any, Literal

Preset = Literal["laion-aesthetics", "laion-pop", "ye-pop", "coyo-700m", "datacomp", "cc12m"]

_ON_HUB = ("location", "files")
"""Fields that say where a list is on the Hub: they mean nothing for one's own copy of it."""

PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "laion-aesthetics": {
        "location": "laion/laion2B-en-aesthetic",
        "files": ("*.parquet",),
        "url_column": "URL",
        "caption_column": "TEXT",
    },
    "laion-pop": {
        "location": "laion/laion-pop",
        "files": ("laion_pop.parquet",),
        "url_column": "url",
        "caption_column": "cogvlm_caption",
    },
    "ye-pop": {
        "location": "Ejafa/ye-pop",
        "files": ("images/*/*.json",),
        "url_column": "url",
        "caption_column": "cogvlm_caption",
    },
    "coyo-700m": {
        "location": "kakaobrain/coyo-700m",
        "files": ("data/*.parquet",),
        "url_column": "url",
        "caption_column": "text",
    },
    "datacomp": {
        "location": "mlfoundations/datacomp_1b",
        "files": ("*.parquet",),
        "url_column": "url",
        "caption_column": "text",
    },
    # Google's cc12m.tsv has no header and no quotes; the Hub's conversion to parquet has these names.
    "cc12m": {
        "location": "google-research-datasets/conceptual_12m",
        "files": ("default/train/*.parquet",),
        "columns": ("image_url", "caption"),
        "quoted": False,
        "url_column": "image_url",
        "caption_column": "caption",
    },
}


def filled_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section `source` with what its preset knows under what it says itself."""
    known = PRESETS.get(values.get("preset"), {})  # type: ignore[arg-type]
    away = values.get("kind") != "hub"
    return {**{name: value for name, value in known.items() if not (away and name in _ON_HUB)}, **values}
