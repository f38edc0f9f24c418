"""The stage `encode`: images as latents of the teacher's VAE, each with its crop, size and flip.

Works shard by shard. A shard is finished when its parquet file is in `out`, which is written last: a killed run resumes
after the last finished shard. The format is described in koala.data.latents.
"""

import io
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from koala.console import progress
from koala.data.config import EncodeConfig
from koala.data.latents import COLUMNS
from koala.data.shards import Sample, read_shard, shards
from koala.errors import KoalaError
from koala.run import Run

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Crop:
    """How an image was fitted to a bucket: resized to cover it, then cropped."""

    bucket: Size
    """Size of the crop."""
    top: int
    """Pixels of the resized image above the crop."""
    left: int
    """Pixels to the left of the crop, after the flip."""
    flipped: bool
    """Whether the image was mirrored horizontally."""


def encode(config: EncodeConfig, kept: Path, teacher: Path, out: Path, run: Run) -> None:
    """Encode every shard of `kept` with the VAE of `teacher`; shards already in `out` are left as they are.

    Any webdataset shards will do: a sample is an image, its caption (.txt) and, if known, its original size (.json).
    Raises KoalaError if there is no sample, an image cannot be decoded, or the VAE does not divide a bucket.
    """
    files = shards(kept)
    if not files:
        raise KoalaError(f"{kept} holds no shards (.tar): run `dvc repro filter` again, or name another folder")
    vae = load_vae(teacher)
    _check_buckets(config, vae)
    pending = [file for file in files if not (out / f"{file.stem}.parquet").is_file()]
    for file in progress(pending, "encode: shards", total=len(files), done=len(files) - len(pending)):
        encode_shard(file, out, vae, config)

    rows = sum(pq.read_metadata(file).num_rows for file in out.glob("*.parquet"))
    if not rows:
        raise KoalaError(f"the shards of {kept} hold no images (.jpg, .png or .webp): nothing to encode")
    stats = {"samples": rows, "shards": len(files), "latent_std": _latent_std(out)}
    (out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    run.metrics(stats)


def load_vae(teacher: Path) -> AutoencoderKL:
    """Load the VAE of a pipeline folder in the type of its weights, on the GPU if there is one.

    A VAE that overflows in float16 (`force_upcast` in its configuration: SDXL's own) is loaded in float32.
    """
    vae = AutoencoderKL.from_pretrained(
        teacher, subfolder="vae", torch_dtype=_stored_type(teacher / "vae"), use_safetensors=True, local_files_only=True
    )
    if vae.dtype == torch.float16 and vae.config.force_upcast:
        vae = vae.float()
    return vae.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _stored_type(folder: Path) -> torch.dtype:
    """Return the floating-point type of a model's weights on disk."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            tensor: Tensor = weights.get_tensor(next(iter(weights.keys())))
            return tensor.dtype
    return torch.float32


@torch.no_grad()
def encode_shard(file: Path, folder: Path, vae: AutoencoderKL, config: EncodeConfig) -> None:
    """Write the latents of one shard (means of the posterior, scaled): a file per bucket, then the shard's parquet.

    Raises KoalaError if an image cannot be decoded.
    """
    waiting: dict[Size, list[tuple[Sample, Crop, Tensor, Size]]] = defaultdict(list)
    rows: list[dict[str, object]] = []
    latents: dict[Size, list[Tensor]] = defaultdict(list)

    def flush(bucket: Size) -> None:
        batch = waiting.pop(bucket)
        pixels = torch.stack([pixels for *_, pixels, _ in batch]).to(vae.device, vae.dtype)
        encoded = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        for (sample, crop, _, original), latent in zip(batch, encoded, strict=True):
            rows.append(_row(sample, crop, original, _latents_file(file, bucket), len(latents[bucket])))
            latents[bucket].append(latent.to("cpu", getattr(torch, config.dtype)))

    for sample in read_shard(file):
        image = _decode(sample, file)
        crop, pixels = fit(image, sample.key, config)
        waiting[crop.bucket].append((sample, crop, pixels, _original_size(sample, image)))
        if len(waiting[crop.bucket]) == config.machine.batch_size:
            flush(crop.bucket)
    for bucket in list(waiting):
        flush(bucket)

    for bucket, tensors in latents.items():
        save_file({"latents": torch.stack(tensors)}, folder / _latents_file(file, bucket))
    rows.sort(key=lambda row: str(row["key"]))
    unfinished = folder / f"{file.stem}.part"
    pq.write_table(pa.Table.from_pylist(rows, COLUMNS), unfinished)
    os.replace(unfinished, folder / f"{file.stem}.parquet")


def _decode(sample: Sample, file: Path) -> Image.Image:
    try:
        return Image.open(io.BytesIO(sample.image)).convert("RGB")
    except Exception as error:  # Pillow's decoders raise anything on broken bytes
        raise KoalaError(
            f"cannot decode the image {sample.key} of {file} ({type(error).__name__}): filter the shards first"
        ) from None


def _original_size(sample: Sample, image: Image.Image) -> Size:
    """Return the size before the download resized the image; the image's own if not recorded."""
    height, width = sample.meta.get("original_height"), sample.meta.get("original_width")
    return (int(height), int(width)) if height and width else (image.height, image.width)


def fit(image: Image.Image, key: str, config: EncodeConfig) -> tuple[Crop, Tensor]:
    """Resize an image to cover its bucket and crop it. Return the crop, and pixels 3 x H x W in -1..1.

    The random crop and flip are a function of the seed and the sample's key.
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
    """Return the bucket whose height over width has the smallest ratio to `aspect`."""
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


def _latents_file(shard: Path, bucket: Size) -> str:
    return f"{shard.stem}-{bucket[0]}x{bucket[1]}.safetensors"


def _check_buckets(config: EncodeConfig, vae: AutoencoderKL) -> None:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    for height, width in config.buckets:
        if height % factor or width % factor:
            raise KoalaError(f"encode.buckets has {height} x {width}: sides must be multiples of the VAE's {factor} px")


def _latent_std(folder: Path) -> float:
    """Return the standard deviation of one file's latents: near 1 if the VAE's scaling factor fits the data."""
    file = min(folder.glob("*.safetensors"))
    return float(load_file(file)["latents"].float().std())
