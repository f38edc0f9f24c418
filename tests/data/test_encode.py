"""Images to latents: fitting to buckets, what is told of it, and going on after a kill."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from koala.data import encode as stage
from koala.data.config import EncodeConfig, EncodeMachine
from koala.data.encode import fit, nearest_bucket
from koala.data.latents import LatentSet
from koala.data.shards import Sample, ShardWriter
from koala.errors import KoalaError
from koala.run import NoRun

BUCKETS = ((32, 32), (32, 64), (64, 32))


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
        assert crop.top == 0
        assert 0 <= crop.left <= 16
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
    assert crop.bucket == (32, 64)
    assert pixels.shape == (3, 32, 64)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of a pipeline folder as the stage reads: a VAE with random weights."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        sample_size=32,
    )
    folder = tmp_path_factory.mktemp("teacher")
    vae.save_pretrained(folder / "vae", safe_serialization=True)
    return folder


CONFIG = EncodeConfig(buckets=((32, 32), (32, 64)), crop="center", dtype="float32", machine=EncodeMachine(batch_size=3))


def png(size: tuple[int, int], colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images in three shards, every third one twice as wide as high."""
    folder = tmp_path_factory.mktemp("kept")
    with ShardWriter(folder, shard_size=5) as writer:
        for number in range(12):
            size = (64, 32) if number % 3 == 0 else (32, 32)
            meta = {"original_width": size[0] * 2, "original_height": size[1] * 2}
            image = png(size, (20 * number, 100, 50))
            writer.write(Sample(f"{number:09d}", image, "png", f"caption {number}", meta))
    return folder


def test_encoded_samples_are_the_vaes_latents(kept: Path, teacher: Path, out: Path, recorder: Any) -> None:
    stage.encode(CONFIG, kept, teacher, out, recorder)
    data = LatentSet(out)
    assert len(data) == 12
    assert {bucket: len(rows) for bucket, rows in data.buckets.items()} == {
        (32, 32): 8,
        (32, 64): 4,
    }
    number = data.captions(range(12)).index("caption 3")
    sample = data[number]
    assert sample.time_ids == (64, 128, 0, 0, 32, 64)
    vae = AutoencoderKL.from_pretrained(teacher, subfolder="vae", use_safetensors=True)
    pixels = torch.tensor([60, 100, 50]).view(3, 1, 1).expand(3, 32, 64) / 127.5 - 1
    with torch.no_grad():
        wanted = vae.encode(pixels[None]).latent_dist.mode()[0] * vae.config.scaling_factor
    torch.testing.assert_close(sample.latent, wanted, rtol=1e-4, atol=1e-5)
    assert recorder.logged["samples"] == 12
    assert recorder.logged["shards"] == 3

    # A second call on the finished folder.
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir() if file.name != "stats.json"}
    stats = (out / "stats.json").read_bytes()
    stage.encode(CONFIG, kept, teacher, out, NoRun())
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir() if file.name != "stats.json"} == before
    assert (out / "stats.json").read_bytes() == stats


def test_finished_shards_are_not_encoded_again(
    kept: Path, teacher: Path, out: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies at its third shard leaves two; the next does only what is missing."""
    done = []
    whole = stage.encode_shard

    def dies(file: Path, *rest) -> None:
        if file.stem == "00002" and len(done) == 2:
            done.append("died")
            raise KeyboardInterrupt
        done.append(file.stem)
        whole(file, *rest)

    monkeypatch.setattr(stage, "encode_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        stage.encode(CONFIG, kept, teacher, out, recorder)
    stage.encode(CONFIG, kept, teacher, out, recorder)
    assert done == ["00000", "00001", "died", "00002"]
    assert len(LatentSet(out)) == 12


def test_a_bucket_that_the_vae_does_not_divide_is_refused(kept: Path, teacher: Path, out: Path) -> None:
    with pytest.raises(KoalaError, match="30 x 32: sides must be multiples of the VAE's 4 px"):
        stage.encode(EncodeConfig(buckets=((30, 32),)), kept, teacher, out, NoRun())


# Shards that a user made.


def tar(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as shard:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return file.parent


def test_shards_of_a_users_own_are_encoded(teacher: Path, out: Path) -> None:
    """Made with `tar`: folders, no metadata, a caption missing."""
    red, blue = png((40, 32), (255, 0, 0)), png((80, 40), (0, 0, 255))
    folder = tar(Path("mine", "a.tar"), {"./x/1.png": red, "./x/1.txt": b"a red square", "./y/1.png": blue})
    stage.encode(CONFIG, folder, teacher, out, NoRun())
    data = LatentSet(out)
    assert data.keys([0, 1]) == ["./x/1", "./y/1"]
    assert data.captions([0, 1]) == ["a red square", ""]
    assert [data[index].time_ids for index in (0, 1)] == [(32, 40, 0, 4, 32, 32), (40, 80, 0, 0, 32, 64)]


def test_shards_without_samples_are_one_line(teacher: Path, out: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(KoalaError, match=r"^empty holds no shards \(\.tar\)"):
        stage.encode(CONFIG, Path("empty"), teacher, out, NoRun())
    folder = tar(Path("captions", "a.tar"), {"1.txt": b"no image"})
    with pytest.raises(KoalaError, match=r"^the shards of captions hold no images"):
        stage.encode(CONFIG, folder, teacher, out, NoRun())


def test_an_image_that_is_none_is_named(teacher: Path, out: Path) -> None:
    folder = tar(Path("mine", "a.tar"), {"1.png": b"<html>"})
    with pytest.raises(
        KoalaError, match=r"^cannot decode the image 1 of mine/a\.tar \(UnidentifiedImageError\): filter"
    ):
        stage.encode(CONFIG, folder, teacher, out, NoRun())


# The VAE.


@pytest.mark.parametrize(
    ("stored", "force_upcast", "loaded"),
    [("float16", False, "float16"), ("float16", True, "float32"), ("bfloat16", True, "bfloat16")],
)
def test_the_vae_is_loaded_in_its_own_type(
    teacher: Path, tmp_path: Path, stored: str, force_upcast: bool, loaded: str
) -> None:
    vae = stage.load_vae(teacher)
    assert vae.dtype == torch.float32
    vae.register_to_config(force_upcast=force_upcast)
    vae.to(getattr(torch, stored)).save_pretrained(tmp_path / "vae")
    assert stage.load_vae(tmp_path).dtype == getattr(torch, loaded)
