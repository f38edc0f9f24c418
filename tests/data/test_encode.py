"""Images to latents: fitting to buckets, what is told of it, and going on after a kill."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from koala.config import load
from koala.data import encode
from koala.data.config import EncodeConfig
from koala.data.encode import fit, nearest_bucket
from koala.data.latents import LatentSet
from koala.data.shards import Sample, ShardWriter
from koala.errors import KoalaError

BUCKETS = ((32, 32), (32, 64), (64, 32))


class Recorder:
    def __getattr__(self, _: str):
        return lambda *args, **kwargs: None


def test_nearest_bucket_is_by_ratio() -> None:
    assert [nearest_bucket(aspect, BUCKETS) for aspect in (1.0, 1.4, 1.45, 0.6, 0.75)] == [
        (32, 32),
        (32, 32),
        (64, 32),
        (32, 64),
        (32, 32),
    ]


def test_crop_is_where_it_says() -> None:
    """A picture whose columns are numbered by their brightness, cut at the place that the crop names."""
    ramp = Image.fromarray(np.tile(np.arange(48, dtype=np.uint8) * 5, (32, 1))).convert("RGB")
    for crop_kind in ("center", "random"):
        crop, pixels = fit(ramp, "k1", EncodeConfig(buckets=((32, 32),), crop=crop_kind))
        assert crop.top == 0 and 0 <= crop.left <= 16
        torch.testing.assert_close((pixels[0, 0] + 1) * 127.5, torch.arange(crop.left, crop.left + 32) * 5.0)
    assert fit(ramp, "k1", EncodeConfig(buckets=((32, 32),)))[0].left == 8


def test_flip_mirrors_and_the_crop_is_told_in_the_mirrored_image() -> None:
    ramp = Image.fromarray(np.tile(np.arange(48, dtype=np.uint8) * 5, (32, 1))).convert("RGB")
    config = EncodeConfig(buckets=((32, 32),), crop="random", flip_probability=1.0)
    crop, pixels = fit(ramp, "k1", config)
    assert crop.flipped
    torch.testing.assert_close((pixels[0, 0] + 1) * 127.5, torch.arange(47 - crop.left, 15 - crop.left, -1) * 5.0)


def test_a_small_image_is_enlarged_to_cover_its_bucket() -> None:
    crop, pixels = fit(Image.new("RGB", (20, 10), "red"), "k", EncodeConfig(buckets=BUCKETS))
    assert crop.bucket == (32, 64) and pixels.shape == (3, 32, 64)


@pytest.fixture
def kept(workspace: Path, tiny_teacher: Path, change_params) -> Path:
    import io
    import shutil

    change_params(encode={"buckets": [[32, 32], [32, 64]], "batch_size": 3})
    params = load()
    shutil.copytree(tiny_teacher, params.out("teacher"))
    with ShardWriter(params.out("filter"), shard_size=5) as writer:
        for number in range(12):
            file = io.BytesIO()
            size = (64, 32) if number % 3 == 0 else (32, 32)
            Image.new("RGB", size, (20 * number, 100, 50)).save(file, "PNG")
            meta = {"original_width": size[0] * 2, "original_height": size[1] * 2}
            writer.write(Sample(f"{number:09d}", file.getvalue(), "png", f"caption {number}", meta))
    return workspace


def test_encoded_samples_are_the_vaes_latents(kept: Path) -> None:
    from diffusers import AutoencoderKL

    params = load()
    encode.run(params, Recorder())
    data = LatentSet(params.out("encode"))
    assert len(data) == 12 and {bucket: len(rows) for bucket, rows in data.buckets.items()} == {
        (32, 32): 8,
        (32, 64): 4,
    }
    number = data.captions(range(12)).index("caption 3")
    sample = data[number]
    assert sample.time_ids == (64, 128, 0, 0, 32, 64)
    vae = AutoencoderKL.from_pretrained(params.out("teacher"), subfolder="vae", use_safetensors=True)
    pixels = torch.tensor([60, 100, 50]).view(3, 1, 1).expand(3, 32, 64) / 127.5 - 1
    with torch.no_grad():
        wanted = vae.encode(pixels[None]).latent_dist.mode()[0] * vae.config.scaling_factor
    torch.testing.assert_close(sample.latent, wanted, rtol=1e-4, atol=1e-5)


def test_finished_shards_are_not_encoded_again(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies at its third shard leaves two; the next does only what is missing."""
    params, done = load(), []
    whole = encode.encode_shard

    def dies(file: Path, *rest) -> None:
        if file.stem == "00002" and len(done) == 2:
            done.append("died")
            raise KeyboardInterrupt
        done.append(file.stem)
        whole(file, *rest)

    monkeypatch.setattr(encode, "encode_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        encode.run(params, Recorder())
    encode.run(params, Recorder())
    assert done == ["00000", "00001", "died", "00002"]
    assert len(LatentSet(params.out("encode"))) == 12


def test_a_bucket_that_the_vae_does_not_divide_is_refused(kept: Path, change_params) -> None:
    change_params(encode={"buckets": [[30, 32]]})
    with pytest.raises(KoalaError, match="30 x 32: sides must be multiples of the VAE's 4 px"):
        encode.run(load(), Recorder())
