"""Encode your own folder of images into latents of a teacher's VAE, without DVC, MLflow or params.yaml.

    python examples/encode_images.py my-images my-sdxl latents --bucket 1024x1024 --bucket 1152x896

`my-images` holds images, each with its caption in a text file of the same name; `my-sdxl` is a pipeline folder.
"""

import argparse
import tempfile
from pathlib import Path

from koala.data.config import EncodeConfig
from koala.data.encode import encode
from koala.data.shards import Sample, ShardWriter
from koala.run import NoRun

FORMATS = (".jpg", ".jpeg", ".png", ".webp")


def write_shards(images: Path, shards: Path) -> int:
    """Write images and captions to webdataset shards. Return how many there are."""
    files = sorted(file for file in images.iterdir() if file.suffix.lower() in FORMATS)
    with ShardWriter(shards, 1000) as writer:
        for index, file in enumerate(files):
            caption = file.with_suffix(".txt").read_text().strip()
            writer.write(Sample(f"{index:09d}", file.read_bytes(), file.suffix[1:].lower(), caption, {}))
    return len(files)


def main() -> None:
    """Read the command line, write shards, encode them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bucket", action="append", help="HEIGHTxWIDTH in pixels; may be repeated")
    arguments = parser.parse_args()
    buckets = [tuple(map(int, bucket.split("x"))) for bucket in arguments.bucket or ["1024x1024"]]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as kept:
        write_shards(arguments.images, Path(kept))
        encode(
            EncodeConfig(buckets=buckets), kept=Path(kept), teacher=arguments.teacher, out=arguments.out, run=NoRun()
        )


if __name__ == "__main__":
    main()
