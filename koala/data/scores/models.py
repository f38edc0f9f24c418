"""The models of a recipe of scores, over batches of samples: each image is decoded ahead, and computed once."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from koala.data.ahead import batches_ahead
from koala.data.picture import open_picture
from koala.data.scores.base import EmbeddingScorer, ImageScorer
from koala.data.scores.config import ScoreConfig
from koala.data.scores.known import Known
from koala.data.shards import Sample

UNDECODABLE = b"undecodable"
"""Name, in a table's metadata, of its number of images that cannot be decoded."""
_EMBEDDING = "embedding"


@dataclass(frozen=True)
class _Picture:
    """A decoded image, as the models take it."""

    image: Image.Image
    prepared: Any
    """The embedder's input, or None where there is no embedder."""


@dataclass(frozen=True)
class _Batch:
    """Samples with the hashes of their images. Images of which something is unknown are being decoded, by hash."""

    samples: Sequence[Sample]
    hashes: Sequence[bytes]
    decoded: Mapping[bytes, Future[_Picture | None]]


@dataclass(frozen=True)
class _Row:
    sample: Sample
    sha256: bytes
    values: dict[str, Any]
    """Scores, and the embedding, by name; empty if the image cannot be decoded."""


class Models:
    """The models of a recipe, loaded."""

    def __init__(self, config: ScoreConfig, threads: ThreadPoolExecutor, known: Known) -> None:
        """Load them. `threads` decode images; `known` remembers what is computed of them. Raises KoalaError as the models do."""
        self._config, self._threads, self._known = config, threads, known
        self._embedder: Any = None
        parts: dict[str, Any] = {}
        if config.embedder:
            from koala.data.scores.embedder import ClipEmbedder

            self._embedder = ClipEmbedder(config.embedder)
            parts[_EMBEDDING] = config.embedder
        parts |= {scorer.kind: scorer for scorer in config.scorers if isinstance(scorer, ImageScorer)}
        # What is remembered is named by the parameters that it was computed with.
        self._parts = {name: _short(f"{name} {part.model_dump_json()}") for name, part in parts.items()}
        self._of_images = {scorer.kind: scorer.load() for scorer in config.scorers if isinstance(scorer, ImageScorer)}
        self._of_embeddings = {
            scorer.kind: scorer.load(self._embedder) for scorer in config.scorers if isinstance(scorer, EmbeddingScorer)
        }

    def score(self, samples: Iterator[Sample]) -> pa.Table:
        """Return the table of a shard: a row for each sample, the scores in the order of the recipe."""
        batches = batches_ahead(samples, self._config.machine.batch_size, self._start)
        rows = [row for batch in batches for row in self._rows(batch)]
        columns = {
            "key": pa.array([row.sample.key for row in rows], pa.string()),
            "sha256": pa.array([row.sha256 for row in rows], pa.binary(32)),
        }
        for scorer in self._config.scorers:
            values = np.array([row.values.get(scorer.kind, np.nan) for row in rows], np.float32)
            columns[scorer.kind] = pa.array(values, mask=np.isnan(values))
        if self._embedder and self._config.keep_embeddings:
            nothing = np.zeros(self._embedder.width, np.float16)
            # Zeros where there is none: pyarrow does not read back a parquet file with nulls among lists of a fixed size.
            vectors = [row.values.get(_EMBEDDING, nothing) for row in rows]
            flat = pa.array(np.concatenate([nothing[:0], *vectors]))
            columns[_EMBEDDING] = pa.FixedSizeListArray.from_arrays(flat, len(nothing))
        undecodable = sum(not row.values for row in rows)
        return pa.table(columns).replace_schema_metadata({UNDECODABLE: str(undecodable)})

    def _start(self, samples: Sequence[Sample]) -> _Batch:
        hashes = [hashlib.sha256(sample.image).digest() for sample in samples]
        lacking = {each for images in self._lacking(hashes).values() for each in images}
        contents = {found: sample.image for found, sample in zip(hashes, samples, strict=True) if found in lacking}
        decoded = {found: self._threads.submit(self._open, content) for found, content in contents.items()}
        return _Batch(samples, hashes, decoded)

    def _open(self, content: bytes) -> _Picture | None:
        image = open_picture(content)
        if image is None:
            return None
        return _Picture(image, self._embedder.prepare(image) if self._embedder else None)

    def _lacking(self, hashes: Sequence[bytes]) -> dict[str, list[bytes]]:
        """Return, by the name of each part, the images of which it is not known."""
        found = self._known.find(hashes, self._parts.values())
        images = list(dict.fromkeys(hashes))
        return {name: [each for each in images if (each, part) not in found] for name, part in self._parts.items()}

    def _rows(self, batch: _Batch) -> list[_Row]:
        opened = {each: decoded.result() for each, decoded in batch.decoded.items()}
        pictures = {each: picture for each, picture in opened.items() if picture is not None}
        # Asked again: an earlier batch may have computed what was unknown when this one was read.
        alike: dict[tuple[bytes, ...], list[str]] = {}
        for name, images in self._lacking(batch.hashes).items():
            alike.setdefault(tuple(each for each in images if each in pictures), []).append(name)
        for todo, names in alike.items():
            if todo:
                self._compute(names, todo, [pictures[each] for each in todo])

        known = self._known.find(batch.hashes, self._parts.values())
        rows = [
            _Row(
                sample,
                each,
                {name: _value(name, known[each, part]) for name, part in self._parts.items() if (each, part) in known},
            )
            for sample, each in zip(batch.samples, batch.hashes, strict=True)
        ]
        self._score_embeddings([row for row in rows if _EMBEDDING in row.values])
        return rows

    def _compute(self, names: Sequence[str], hashes: Sequence[bytes], pictures: Sequence[_Picture]) -> None:
        """Compute parts of images, and remember them."""
        images = [picture.image for picture in pictures]  # one list for all: readers of text know it again
        for name in names:
            if name == _EMBEDDING:
                values = self._embedder.images([picture.prepared for picture in pictures])
            else:
                values = np.asarray(self._of_images[name](images), np.float32)
            part = self._parts[name]
            self._known.add({(each, part): value.tobytes() for each, value in zip(hashes, values, strict=True)})

    def _score_embeddings(self, rows: Sequence[_Row]) -> None:
        """Set the scores that follow from embeddings."""
        if not rows:
            return
        embeddings = np.stack([row.values[_EMBEDDING] for row in rows]).astype(np.float32)
        captions = [row.sample.caption for row in rows]
        for name, function in self._of_embeddings.items():
            for row, value in zip(rows, function(embeddings, captions), strict=True):
                row.values[name] = value


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _value(name: str, remembered: bytes) -> Any:
    """Return an embedding, D in float16, or a score."""
    return np.frombuffer(remembered, np.float16) if name == _EMBEDDING else np.frombuffer(remembered, np.float32)[0]
