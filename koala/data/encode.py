"""The stage `encode`: images as latents of the teacher's VAE, each with its crop, size and flip.

Works shard by shard. A shard is finished when its parquet file is in `out`, which is written last: a killed run resumes
after the last finished shard. The format is described in koala.data.latents.

Worker processes decode images ahead of the VAE, in the shards' order, so that the latents do not depend on their number.
Each forward pass has the same number of images, the last of a bucket filled up: a latent follows from its image alone, not from
those beside it. So what an earlier run has encoded (koala.data.earlier) is taken over as it is.
Where there are several GPUs, a process for each encodes its share of the shards.
"""

import hashlib
import io
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from koala.console import progress, say
from koala.data import earlier, manifest
from koala.data.config import EncodeConfig
from koala.data.decode import DecodeConfig, UnusableError, normalised
from koala.data.earlier_latents import EarlierLatents, earlier_latents
from koala.data.executor import share, use_gpu
from koala.data.latents import write_shard
from koala.data.shards import Place, Sample, index, shards
from koala.errors import KoalaError
from koala.run import STATE, Run

Size = tuple[int, int]
"""Height and width in pixels."""
Encoder = Callable[[Tensor], Tensor]
"""Makes latents, N x 4 x h x w, of pixels, N x H x W x 3 in uint8. It need not wait for its device."""
_NOT_FINITE = "the latent is not finite"
_MOST_PIXELS = 2**27  # of a resized image: 400 MB. A strip of one pixel would fill the memory.
_IN_COLUMNS = ("key", "caption", "url", "sha256")


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


@dataclass(frozen=True)
class Prepared:
    """A sample that a worker has decoded and fitted, or could not."""

    row: dict[str, Any]
    """Its row of `koala.data.latents.RECORD`, without `file` and `row`."""
    pixels: np.ndarray | None
    """H x W x 3 in uint8; None where `row` has an error, or the latent is known."""
    latent: Tensor | None = None
    """4 x h x w, where an earlier run has encoded the image."""


def encode(config: EncodeConfig, kept: Path, teacher: Path, out: Path, run: Run) -> None:
    """Encode every shard of `kept` with the VAE of `teacher`; shards already in `out` are left as they are.

    Images that an earlier run has encoded are not encoded again. Any webdataset shards will do: a sample is an image, its caption
    (.txt) and, if known, its metadata (.json). A sample that cannot be encoded is a row with its `error` in the shard's parquet
    file.
    Raises KoalaError if there is no sample, a shard is damaged, no image can be encoded, or the VAE does not divide a bucket.
    """
    files = shards(kept)
    if not files:
        raise KoalaError(f"{kept} holds no shards (.tar): run `dvc repro filter` again, or name another folder")
    manifest.check(kept)
    manifest.resume(out, config, kept, teacher / "vae")
    _check_buckets(config, teacher)
    pending = [file for file in files if not (out / f"{file.stem}.parquet").is_file()]
    done = sum(pq.read_metadata(out / f"{file.stem}.parquet").num_rows for file in files if file not in pending)
    machine = config.machine
    processes = machine.processes or max(torch.cuda.device_count(), 1)
    known = earlier_latents(out, processes) if pending else None
    with share(partial(_encode_share, out, teacher, config, known), pending, processes, machine.engine) as encoded:
        for _ in progress(encoded, "encode", total=done + _count(pending), done=done, unit="images"):
            pass

    stats = _summarise(out, [out / f"{file.stem}.parquet" for file in files])
    if not stats["samples"]:
        if not stats["failed"]:
            raise KoalaError(f"the shards of {kept} hold no images (.jpg, .png or .webp): nothing to encode")
        worst, count = next(iter(stats["errors"].items()))
        raise KoalaError(
            f"none of the {stats['failed']} images of {kept} could be encoded; most often: {worst} ({count})"
        )
    if stats["failed"]:
        causes = ", ".join(f"{error} ({count})" for error, count in stats["errors"].items())
        say(f"encode: {stats['failed']} images could not be encoded: {causes}; see `error` in {out}/*.parquet")
    (out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    run.metrics({name: value for name, value in stats.items() if name != "errors"})
    reused = earlier.reused(out / STATE)
    run.metrics({"reused": reused, "new": stats["samples"] - reused})
    say(f"encode: {stats['samples']} images, {reused} of them taken over from the last run")
    manifest.write(out, kept, teacher / "vae")
    shutil.rmtree(out / STATE, ignore_errors=True)


def _count(files: Sequence[Path]) -> int:
    """Return the samples of some shards by their manifest; without one, as if each had as many as the first."""
    if not files:
        return 0
    if found := manifest.read(files[0].parent):
        return sum(found.files[file.name].samples for file in files)
    return len(index(files[0])) * len(files)


def _summarise(out: Path, tables: Sequence[Path]) -> dict[str, Any]:
    errors: Counter[str] = Counter()
    rows = 0
    for table in tables:
        found = pq.read_table(table, columns=["error"])["error"].to_pylist()
        rows += len(found)
        errors.update(error for error in found if error is not None)
    samples = rows - errors.total()
    return {
        "samples": samples,
        "failed": errors.total(),
        "errors": dict(sorted(errors.items(), key=lambda item: (-item[1], item[0]))),
        "shards": len(tables),
        "latent_std": _latent_std(out) if samples else 0.0,
    }


# The VAE.


def load_vae(teacher: Path, dtype: str | None = None) -> AutoencoderKL:
    """Load the VAE of a pipeline folder, on the GPU if there is one.

    Its type, where none is given, is that of its weights; float32 for a VAE in float16 that overflows there (`force_upcast`
    in its configuration: SDXL's own).

    Raises:
        KoalaError: float16 is asked of a VAE that overflows in it.
    """
    stored = _stored_type(teacher / "vae")
    vae = AutoencoderKL.from_pretrained(
        teacher,
        subfolder="vae",
        torch_dtype=getattr(torch, dtype) if dtype else stored,
        use_safetensors=True,
        local_files_only=True,
    )
    if vae.dtype == torch.float16 and vae.config.force_upcast:
        if dtype:
            raise KoalaError(
                "encode.vae_dtype: this VAE overflows in float16 (force_upcast): take bfloat16, or a VAE that is safe in float16"
            )
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


def encoder(vae: AutoencoderKL, config: EncodeConfig) -> Encoder:
    """Return the function that encodes: means of the posterior, scaled."""

    @torch.no_grad()
    def run(pixels: Tensor) -> Tensor:
        height, width = pixels.shape[1:3]
        vae.use_tiling = config.tile_above is not None and height * width > config.tile_above
        values = pixels.to(vae.device, non_blocking=True).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        encoded: Tensor = vae.encode(values.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
        return encoded

    return run


def _encode_share(
    out: Path, teacher: Path, config: EncodeConfig, known: EarlierLatents | None, files: Sequence[Path], rank: int
) -> Iterator[None]:
    """Encode shards with a VAE of this process's own, on the GPU of its rank. Yield once for each sample."""
    use_gpu(rank)
    yield from encode_shards(files, out, encoder(load_vae(teacher, config.vae_dtype), config), config, known)


# One process: decode workers, then the encoder.


def encode_shards(
    files: Sequence[Path], out: Path, encode: Encoder, config: EncodeConfig, known: EarlierLatents | None = None
) -> Iterator[None]:
    """Encode shards one after another and write each when it is whole; images that are `known` are not encoded.

    Yield once for each sample.

    Raises KoalaError if a shard is damaged or a worker dies.
    """
    workers = config.machine.workers
    loader = DataLoader(
        _Preparation(config, known),
        sampler=_Work(files),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=max(2, -(-2 * config.machine.batch_size // workers)) if workers else None,
    )
    work = _ShardWork(encode, config)
    items = iter(loader)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise KoalaError(
                "a worker of encode was killed, for its memory perhaps: lower encode.workers of the machine; "
                "finished shards are kept"
            ) from None
        if isinstance(item, KoalaError):
            raise item
        if isinstance(item, Path):
            work.write(item, out)
        else:
            work.add(item)
            yield


class _ShardWork:
    """The samples of one shard on their way through the encoder."""

    def __init__(self, encode: Encoder, config: EncodeConfig) -> None:
        self._encode, self._config = encode, config
        self._start()

    def _start(self) -> None:
        self._waiting: dict[Size, list[Prepared]] = defaultdict(list)
        self._running: tuple[list[Prepared], Tensor] | None = None
        self._rows: list[dict[str, Any]] = []
        self._latents: dict[str, Tensor] = {}
        self._reused = 0

    def add(self, sample: Prepared) -> None:
        """Take a sample in; encode its bucket's batch where that is full."""
        self._rows.append(sample.row)
        if sample.latent is not None:
            self._latents[sample.row["key"]] = sample.latent
            self._reused += 1
        elif sample.pixels is not None:
            bucket = sample.pixels.shape[:2]
            self._waiting[bucket].append(sample)
            if len(self._waiting[bucket]) == self._config.machine.batch_size:
                self._submit(self._waiting.pop(bucket))

    def _submit(self, batch: list[Prepared]) -> None:
        """Start to encode a batch, then take what the batch before it gave: a GPU has always one ahead."""
        images = [sample.pixels for sample in batch if sample.pixels is not None]
        # A batch of another size is computed by other kernels, whose last digits differ.
        images += [images[0]] * (self._config.machine.batch_size - len(images))
        pixels = torch.from_numpy(np.stack(images))
        encoded = self._encode(pixels.pin_memory() if torch.cuda.is_available() else pixels)
        self._settle()
        self._running = (batch, encoded)

    def _settle(self) -> None:
        """Take the latents of the batch that runs."""
        if self._running is None:
            return
        batch, encoded = self._running
        self._running = None
        encoded = encoded[: len(batch)].to("cpu", getattr(torch, self._config.dtype))
        for sample, latent in zip(batch, encoded, strict=True):
            if bool(torch.isfinite(latent).all()):
                self._latents[sample.row["key"]] = latent
            else:
                sample.row["error"] = _NOT_FINITE

    def write(self, shard: Path, out: Path) -> None:
        """Encode what is left of the shard, and write it."""
        for bucket in list(self._waiting):
            self._submit(self._waiting.pop(bucket))
        self._settle()
        latents: dict[str, list[Tensor]] = defaultdict(list)
        for row in self._rows:
            if row["error"] is None:
                row["file"] = f"{shard.stem}-{row['bucket_height']}x{row['bucket_width']}.safetensors"
                row["row"] = len(latents[row["file"]])
                latents[row["file"]].append(self._latents[row["key"]])
        earlier.note_reused(out / STATE, shard.stem, self._reused)
        write_shard(out, shard.stem, self._rows, latents)
        self._start()


class _Work(Sampler[Place | Path]):
    """The places of all samples, shard by shard, each shard's file behind its samples."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __iter__(self) -> Iterator[Place | Path]:
        for file in self._files:
            yield from index(file)
            yield file


class _Preparation(Dataset[Any]):
    """What workers do: prepare a sample, or compare a shard that was read with its manifest."""

    def __init__(self, config: EncodeConfig, known: EarlierLatents | None) -> None:
        self._config = config
        self._known = known

    def __getitem__(self, work: Place | Path) -> Prepared | Path | KoalaError:
        if isinstance(work, Place):
            return prepare(work, self._config, self._known)
        try:
            manifest.verify(work)
        except KoalaError as error:
            return error
        return work


def _as_it_is(item: Any) -> Any:
    return item


def prepare(place: Place, config: EncodeConfig, known: EarlierLatents | None = None) -> Prepared:
    """Read, decode and fit a sample; of one that is `known`, take the latent."""
    try:
        sample = place.read()
    except KoalaError:
        return Prepared({"key": place.key, "error": "its metadata are no JSON object"}, None)
    row = _of_metadata(sample)
    if known and (found := known.find(row["identity"])):
        placement, latent = found
        return Prepared(row | placement, None, latent)
    try:
        image = Image.open(io.BytesIO(normalised(sample.image, DecodeConfig()))).convert("RGB")
    except UnusableError as error:
        return Prepared(row | {"error": str(error)}, None)
    except Exception:  # Pillow's decoders raise anything on broken bytes
        return Prepared(row | {"error": "cannot be decoded"}, None)
    try:
        crop, fitted = fit(image, row["identity"], config)
    except UnusableError as error:
        return Prepared(row | {"error": str(error)}, None)
    height, width = sample.recorded_size or (image.height, image.width)
    row |= {
        "bucket_height": crop.bucket[0],
        "bucket_width": crop.bucket[1],
        "original_height": height,
        "original_width": width,
        "crop_top": crop.top,
        "crop_left": crop.left,
        "flipped": crop.flipped,
    }
    return Prepared(row, np.asarray(fitted))


def _of_metadata(sample: Sample) -> dict[str, Any]:
    """Return the columns that do not depend on the pixels."""
    others = {name: value for name, value in sample.meta.items() if name not in _IN_COLUMNS}
    return {
        "key": sample.key,
        "caption": sample.caption,
        "url": sample.text("url"),
        "sha256": sample.text("sha256"),
        "identity": _identity(sample),
        "meta": json.dumps(others, sort_keys=True),
        "error": None,
    }


def _identity(sample: Sample) -> str:
    """Return the hash of all in a sample from which its latent and placement follow: the image, and its recorded size."""
    digest = hashlib.sha256(sample.image)
    digest.update(json.dumps(sample.recorded_size).encode())
    return digest.hexdigest()


def fit(image: Image.Image, identity: str, config: EncodeConfig) -> tuple[Crop, Image.Image]:
    """Resize an image to cover its bucket and crop it. Return the crop, and the image of the bucket's size.

    The random crop and flip are a function of the seed and the sample's identity, wherever it stands in the list.
    Raises UnusableError for an image that is far longer than its bucket.
    """
    random = np.random.default_rng((config.seed, *identity.encode()))
    height, width = bucket = nearest_bucket(image.height / image.width, config.buckets)
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size[0] * size[1] > _MOST_PIXELS:
        raise UnusableError("too long for its bucket")
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
    return Crop(bucket, top, left, flipped), image


def nearest_bucket(aspect: float, buckets: Sequence[Size]) -> Size:
    """Return the bucket whose height over width has the smallest ratio to `aspect`."""
    return min(buckets, key=lambda bucket: abs(np.log(aspect * bucket[1] / bucket[0])))


def _check_buckets(config: EncodeConfig, teacher: Path) -> None:
    factor = 2 ** (len(json.loads((teacher / "vae" / "config.json").read_text())["block_out_channels"]) - 1)
    for height, width in config.buckets:
        if height % factor or width % factor:
            raise KoalaError(f"encode.buckets has {height} x {width}: sides must be multiples of the VAE's {factor} px")


def _latent_std(folder: Path) -> float:
    """Return the standard deviation of one file's latents: near 1 if the VAE's scaling factor fits the data."""
    file = min(folder.glob("*.safetensors"))
    return float(load_file(file)["latents"].float().std())
