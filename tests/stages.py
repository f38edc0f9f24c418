"""Every stage of the data path on a few tiny inputs: what tests of full disks and of kills run, here or in another process."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from koala.data.config import EncodeConfig, EncodeMachine, FilterConfig, NearDuplicates
from koala.data.rules.words import Words
from koala.data.shards import Sample, ShardWriter, read_shard
from koala.run import NoRun

STAGES = ("source", "score", "filter", "recaption", "encode")
"""Those that work in one process. The download is tested by itself."""
ROWS = 2_000
IMAGES = 40


def make_inputs(folder: Path, teacher: Path, clip: Path, captioner: Path) -> Path:
    """Write what the stages read to `folder`."""
    (folder / "scores").mkdir()
    for name, model in (("teacher", teacher), ("clip", clip), ("captioner", captioner)):
        (folder / name).symlink_to(model)
    rows = [f"https://example.com/{n}.jpg,a picture of number {n},{n % 10}" for n in range(ROWS)]
    (folder / "list.csv").write_text("\n".join(["url,caption,aesthetic", *rows]))
    with ShardWriter(folder / "images", 8) as writer:
        for number in range(IMAGES):
            pixels = np.random.default_rng(number // 2).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize(
                (32, 48 - number % 2), Image.Resampling.BICUBIC
            )  # pairs of near duplicates
            stream = io.BytesIO()
            picture.save(stream, "PNG")
            meta = {"url": f"https://example.com/{number}.png"}
            writer.write(Sample(f"{number:09d}", stream.getvalue(), "png", f"a picture of number {number}", meta))
    return folder


def run(stage: str, inputs: Path, out: Path) -> None:
    """Run a stage over the inputs."""
    images = inputs / "images"
    if stage == "source":
        from koala.data.source import source
        from koala.data.tables import TableSource

        config = TableSource(kind="file", location=str(inputs / "list.csv"), score_columns=("aesthetic",))
        source(config, out=out, run=NoRun())
    elif stage == "score":
        from koala.data.score import score
        from koala.data.scores.clip_similarity import ClipSimilarity
        from koala.data.scores.config import Embedder, ScoreConfig

        embedder = Embedder(model=str(inputs / "clip"))
        score(ScoreConfig(embedder=embedder, scorers=(ClipSimilarity(),)), images, out, NoRun())
    elif stage == "filter":
        from koala.data.filter import filter

        config = FilterConfig(rules=(Words(),), near_duplicates=NearDuplicates(), shard_size=6)
        filter(config, images, inputs / "scores", out, NoRun())
    elif stage == "recaption":
        from koala.data.captions.config import RecaptionConfig
        from koala.data.recaption import recaption

        recaption(RecaptionConfig(model=str(inputs / "captioner"), max_tokens=4), images, out, NoRun())
    else:
        from koala.data.encode import encode

        machine = EncodeMachine(batch_size=3)
        config = EncodeConfig(buckets=((32, 32), (48, 32)), flip_probability=0.5, machine=machine)
        encode(config, images, inputs / "teacher", out, NoRun())


def digests(folder: Path) -> dict[str, str]:
    """Return the hash of each file in a folder."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def samples(stage: str, out: Path) -> list[str]:
    """Return what a stage has made something of: the URLs of a table, or the keys of samples, as often as they stand there."""
    if stage == "filter":
        return [key for file in sorted(out.glob("verdicts/*.parquet")) for key in _column(file, "key")]
    column = "url" if stage == "source" else "key"
    return [value for file in sorted(out.glob("*.parquet")) for value in _column(file, column)]


def everything(stage: str) -> list[str]:
    """Return what `samples` must be."""
    if stage == "source":
        return [f"https://example.com/{n}.jpg" for n in range(ROWS)]
    return [f"{n:09d}" for n in range(IMAGES)]


def kept(out: Path) -> Iterator[str]:
    """Yield the keys of the samples in a folder's shards."""
    for shard in sorted(out.glob("*.tar")):
        yield from (sample.key for sample in read_shard(shard))


def _column(file: Path, name: str) -> list[str]:
    found: list[str] = pq.read_table(file, columns=[name])[name].to_pylist()
    return found
