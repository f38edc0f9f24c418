"""The stage `encode`: kept images to latents of the teacher's VAE, each with the crop, size and flip it was encoded with.

Shard by shard: a shard of kept images is done when its parquet file stands in the resume folder, which is written last.
"""

import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from koala.console import progress
from koala.data.config import EncodeConfig
from koala.data.latents import COLUMNS
from koala.data.shards import Sample, read_shard, shards
from koala.errors import KoalaError
from koala.provenance import data_hash
from koala.tracking import hash_tags
from koala.work import finish, resume_folder

if TYPE_CHECKING:
    from koala.config import Params
    from koala.tracking import StageRun

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Crop:
    """How an image was fitted to a bucket: resized to cover it, and cut at `top`, `left` of the resized image (px)."""

    bucket: Size
    top: int
    left: int
    flipped: bool


def run(params: "Params", run: "StageRun") -> None:
    """Encode every kept shard, and put latents and captions at `params.out("encode")`."""
    config = params.encode
    kept, teacher = params.need("filter"), params.need("teacher")
    inputs = {"filter": data_hash(kept), "teacher": data_hash(teacher)}
    run.tags(hash_tags(filter=kept, teacher=teacher))
    work = resume_folder("encode", config=config.model_dump(mode="json"), inputs=inputs)
    vae = AutoencoderKL.from_pretrained(teacher, subfolder="vae", use_safetensors=True, local_files_only=True)
    vae = vae.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    _check_buckets(config, vae)
    files = shards(kept)
    for file in progress(files, "encode"):
        if not (work / f"{file.stem}.parquet").is_file():
            encode_shard(file, work, vae, config)

    rows = sum(pq.read_metadata(file).num_rows for file in work.glob("*.parquet"))
    stats = {"samples": rows, "shards": len(files), "latent_std": _spread(work)}
    (work / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    run.metrics(stats)
    finish(work, params.out("encode"))


@torch.no_grad()
def encode_shard(file: Path, folder: Path, vae: AutoencoderKL, config: EncodeConfig) -> None:
    """Write the latents of one shard, a file for each bucket, then its parquet: means of the posterior, scaled."""
    waiting: dict[Size, list[tuple[Sample, Crop, Tensor, Size]]] = defaultdict(list)
    rows: list[dict[str, object]] = []
    latents: dict[Size, list[Tensor]] = defaultdict(list)

    def flush(bucket: Size) -> None:
        batch = waiting.pop(bucket)
        pixels = torch.stack([pixels for *_, pixels, _ in batch]).to(vae.device, vae.dtype)
        encoded = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        for (sample, crop, _, original), latent in zip(batch, encoded, strict=True):
            rows.append(_row(sample, crop, original, _file(file, bucket), len(latents[bucket])))
            latents[bucket].append(latent.to("cpu", getattr(torch, config.dtype)))

    for sample in read_shard(file):
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
        crop, pixels = fit(image, sample.key, config)
        original = (int(sample.meta["original_height"]), int(sample.meta["original_width"]))
        waiting[crop.bucket].append((sample, crop, pixels, original))
        if len(waiting[crop.bucket]) == config.batch_size:
            flush(crop.bucket)
    for bucket in list(waiting):
        flush(bucket)

    for bucket, tensors in latents.items():
        save_file({"latents": torch.stack(tensors)}, folder / _file(file, bucket))
    rows.sort(key=lambda row: str(row["key"]))
    partial = folder / f"{file.stem}.partial"
    pq.write_table(pa.Table.from_pylist(rows, COLUMNS), partial)
    partial.rename(folder / f"{file.stem}.parquet")


def fit(image: Image.Image, key: str, config: EncodeConfig) -> tuple[Crop, Tensor]:
    """Resize an image to cover the bucket nearest in aspect, and cut: the crop, and pixels 3 x H x W in -1..1.

    Where the cut falls and whether the image is flipped follow from the seed and the sample's key.
    """
    random = np.random.default_rng((config.seed, *key.encode()))
    height, width = bucket = nearest_bucket(image.height / image.width, config.buckets)
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    spare_height, spare_width = size[1] - height, size[0] - width
    if config.crop == "center":
        top, left = spare_height // 2, spare_width // 2
    else:
        top, left = int(random.integers(spare_height + 1)), int(random.integers(spare_width + 1))
    flipped = bool(random.random() < config.flip_probability)
    image = image.crop((left, top, left + width, top + height))
    if flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = spare_width - left
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    return Crop(bucket, top, left, flipped), pixels


def nearest_bucket(aspect: float, buckets: Sequence[Size]) -> Size:
    """The bucket whose height over width is nearest to `aspect`, by their ratio."""
    return min(buckets, key=lambda bucket: abs(np.log(aspect * bucket[1] / bucket[0])))


def _row(sample: Sample, crop: Crop, original: Size, file: str, row: int) -> dict[str, object]:
    return {
        "key": sample.key,
        "caption": sample.caption,
        "file": file,
        "row": row,
        "bucket_height": crop.bucket[0],
        "bucket_width": crop.bucket[1],
        "original_height": original[0],
        "original_width": original[1],
        "crop_top": crop.top,
        "crop_left": crop.left,
        "flipped": crop.flipped,
    }


def _file(shard: Path, bucket: Size) -> str:
    return f"{shard.stem}-{bucket[0]}x{bucket[1]}.safetensors"


def _check_buckets(config: EncodeConfig, vae: AutoencoderKL) -> None:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    for height, width in config.buckets:
        if height % factor or width % factor:
            raise KoalaError(f"encode.buckets has {height} x {width}: sides must be multiples of the VAE's {factor} px")


def _spread(folder: Path) -> float:
    """The latents' standard deviation (near 1 where the VAE's scaling factor fits the data), from one file."""
    from safetensors.torch import load_file

    file = next(iter(sorted(folder.glob("*.safetensors"))))
    return float(load_file(file)["latents"].float().std())
