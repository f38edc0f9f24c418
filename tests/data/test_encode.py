"""Images to latents: fitting to buckets, what is told of it, and going on after a kill."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from koala.data import encode as stage
from koala.data.config import EncodeConfig, EncodeMachine
from koala.data.encode import fit, nearest_bucket
from koala.data.latents import LatentSet
from koala.data.shards import Sample, ShardWriter, shards
from koala.errors import KoalaError
from koala.run import EARLIER, STATE, NoRun

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
        crop, image = fit(ramp, "k1", EncodeConfig(buckets=((32, 32),), crop=crop_kind))
        assert crop.top == 0
        assert 0 <= crop.left <= 16
        assert np.array_equal(np.asarray(image)[0, :, 0], np.arange(crop.left, crop.left + 32) * 5)
    assert fit(ramp, "k1", EncodeConfig(buckets=((32, 32),)))[0].left == 8


def test_flip_mirrors_and_the_crop_is_told_in_the_mirrored_image() -> None:
    ramp = Image.fromarray(np.tile(np.arange(48, dtype=np.uint8) * 5, (32, 1))).convert("RGB")
    config = EncodeConfig(buckets=((32, 32),), crop="random", flip_probability=1.0)
    crop, image = fit(ramp, "k1", config)
    assert crop.flipped
    assert np.array_equal(np.asarray(image)[0, :, 0], np.arange(47 - crop.left, 15 - crop.left, -1) * 5)


def test_a_small_image_is_enlarged_to_cover_its_bucket() -> None:
    crop, image = fit(Image.new("RGB", (20, 10), "red"), "k", EncodeConfig(buckets=BUCKETS))
    assert crop.bucket == (32, 64)
    assert image.size == (64, 32)


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
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir() if file.suffix != ".json"}
    stats, listed = ((out / name).read_bytes() for name in ("stats.json", "manifest.json"))
    stage.encode(CONFIG, kept, teacher, out, NoRun())
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir() if file.suffix != ".json"} == before
    assert ((out / "stats.json").read_bytes(), (out / "manifest.json").read_bytes()) == (stats, listed)


def test_finished_shards_are_not_encoded_again(
    kept: Path, teacher: Path, out: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies at its third shard leaves two; the next does only what is missing."""
    made: list[str] = []
    whole = stage.write_shard

    def dies(folder: Path, name: str, *rest: Any) -> None:
        if name == "00002" and len(made) == 2:
            made.append("died")
            raise KeyboardInterrupt
        made.append(name)
        whole(folder, name, *rest)

    monkeypatch.setattr(stage, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        stage.encode(CONFIG, kept, teacher, out, recorder)
    stage.encode(CONFIG, kept, teacher, out, recorder)
    assert made == ["00000", "00001", "died", "00002"]
    assert len(LatentSet(out)) == 12


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("machine", [{"workers": 1}, {"workers": 3}, {"workers": 1, "processes": 2}])
def test_the_bytes_do_not_depend_on_workers_and_processes(
    kept: Path, teacher: Path, out: Path, machine: dict[str, int]
) -> None:
    config = CONFIG.model_copy(update={"flip_probability": 0.5})
    for name in ("alone", "shared"):
        Path(name).mkdir()
    stage.encode(config, kept, teacher, Path("alone"), NoRun())
    stage.encode(
        config.model_copy(update={"machine": EncodeMachine(batch_size=3, **machine)}),
        kept,
        teacher,
        Path("shared"),
        NoRun(),
    )
    assert content(Path("alone")) == content(Path("shared"))


def test_what_is_known_of_a_sample_travels_with_it(teacher: Path, out: Path) -> None:
    with ShardWriter(Path("mine"), 10) as writer:
        meta = {"url": "https://x/1.png", "sha256": "ab", "licence": "CC0", "aesthetic": 5.5, "original_width": "?"}
        writer.write(Sample("1", png((32, 32), (1, 2, 3)), "png", "a", meta))
        writer.write(Sample("2", png((32, 32), (1, 2, 3)), "png", "b", {"url": "https://\ud800"}))
    stage.encode(CONFIG, Path("mine"), teacher, out, NoRun())
    first, second = pq.read_table(out / "00000.parquet").to_pylist()
    assert (first["url"], first["sha256"], first["caption"]) == ("https://x/1.png", "ab", "a")
    assert json.loads(first["meta"]) == {"licence": "CC0", "aesthetic": 5.5, "original_width": "?"}
    assert first["original_width"] == 32
    assert (second["url"], second["sha256"]) == ("https://?", None)
    assert "url" not in pa.ipc.open_file(out / "00000.arrow").schema.names


def test_latents_of_images_that_were_made_anew_are_not_taken_for_finished(kept: Path, teacher: Path, out: Path) -> None:
    shutil.copytree(kept, "images")
    stage.encode(CONFIG, Path("images"), teacher, out, NoRun())
    before = content(out)
    with ShardWriter(Path("images"), shard_size=5) as writer:
        for number in range(12):
            writer.write(Sample(f"{number:09d}", png((32, 32), (1, 20 * number, 50)), "png", "another", {}))
    with pytest.raises(KoalaError, match="out holds work of another recipe or on other inputs, which is not resumed"):
        stage.encode(CONFIG, Path("images"), teacher, out, NoRun())
    assert content(out) == before


def test_a_bucket_that_the_vae_does_not_divide_is_refused(kept: Path, teacher: Path, out: Path) -> None:
    with pytest.raises(KoalaError, match="30 x 32: sides must be multiples of the VAE's 4 px"):
        stage.encode(EncodeConfig(buckets=((30, 32),)), kept, teacher, out, NoRun())


# A list that has changed.


def of_list(folder: Path, numbers: list[int]) -> Path:
    """The images of a list in shards of 5, under the keys of their places."""
    with ShardWriter(folder, shard_size=5) as writer:
        for place, number in enumerate(numbers):
            size = (64, 32) if number % 3 == 0 else (40, 32)
            meta = {"original_width": size[0] * 2, "original_height": size[1] * 2}
            image = png(size, (12 * number, 100, 50)) if number != 4 else b"<html>"
            writer.write(Sample(f"{place:09d}", image, "png", f"caption {number}", meta))
    return folder


def offer(out: Path, earlier: Path) -> None:
    """As the runner does."""
    (out / STATE).mkdir(parents=True)
    (out / STATE / EARLIER).symlink_to(earlier.resolve())


@pytest.mark.parametrize("workers", [0, 2])
def test_of_a_changed_list_only_new_images_meet_the_vae(
    teacher: Path, out: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch, workers: int, capsys: Any
) -> None:
    """One row went, two came, all others have another place: the bytes are those of a run from nothing."""
    machine = EncodeMachine(batch_size=3, workers=workers)
    config = CONFIG.model_copy(update={"crop": "random", "flip_probability": 0.5, "machine": machine})
    encoded: list[np.ndarray] = []
    build = stage.encoder

    def counting(*arguments: Any) -> Any:
        inner = build(*arguments)

        def run(pixels: torch.Tensor) -> torch.Tensor:
            encoded.extend(pixels.numpy())
            return inner(pixels)

        return run

    monkeypatch.setattr(stage, "encoder", counting)
    old = of_list(Path("old"), list(range(14)))
    new = of_list(Path("new"), [14, 0, 1, 3, 4, 5, 6, 7, 8, 15, 9, 10, 11, 12, 13])
    for name in ("before", "anew"):
        Path(name).mkdir()
    stage.encode(config, old, teacher, Path("before"), NoRun())
    stage.encode(config, new, teacher, Path("anew"), NoRun())
    encoded.clear()
    offer(out, Path("before"))
    stage.encode(config, new, teacher, out, recorder)
    assert content(out) == content(Path("anew"))
    # A batch is filled up by its own images.
    assert {int(pixels[0, 0, 0]) for pixels in encoded} == {12 * 14, 12 * 15}
    assert (recorder.logged["reused"], recorder.logged["new"]) == (12, 2)
    assert "encode: 14 images, 12 of them taken over from the last run" in capsys.readouterr().err


def test_an_image_of_another_recorded_size_is_not_taken_over(teacher: Path, out: Path, recorder: Any) -> None:
    for folder, side in (("old", 64), ("new", 100)):
        with ShardWriter(Path(folder), shard_size=5) as writer:
            meta = {"original_width": side, "original_height": side}
            writer.write(Sample("000000000", png((32, 32), (1, 2, 3)), "png", "a caption", meta))
    Path("before").mkdir()
    stage.encode(CONFIG, Path("old"), teacher, Path("before"), NoRun())
    offer(out, Path("before"))
    stage.encode(CONFIG, Path("new"), teacher, out, recorder)
    assert pq.read_table(out / "00000.parquet")["original_width"].to_pylist() == [100]
    assert recorder.logged["reused"] == 0


def test_a_shard_that_was_damaged_is_encoded_anew(teacher: Path, out: Path, recorder: Any, capsys: Any) -> None:
    old, new = of_list(Path("old"), [0, 1, 2, 3, 5, 6, 7]), of_list(Path("new"), [0, 1, 2, 3, 5, 6, 7, 8])
    for name in ("before", "anew"):
        Path(name).mkdir()
    stage.encode(CONFIG, old, teacher, Path("before"), NoRun())
    stage.encode(CONFIG, new, teacher, Path("anew"), NoRun())
    damaged = Path("before", "00000-32x32.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"oops")
    offer(out, Path("before"))
    stage.encode(CONFIG, new, teacher, out, recorder)
    assert content(out) == content(Path("anew"))
    assert (recorder.logged["reused"], recorder.logged["new"]) == (2, 6)
    assert "a shard of the last run is made anew: before/00000-32x32.safetensors" in capsys.readouterr().err.replace(
        f"{out / STATE / EARLIER}", "before"
    )


def test_a_manifest_of_the_last_run_that_is_broken_stops_nobody(teacher: Path, out: Path, capsys: Any) -> None:
    kept = of_list(Path("old"), [0, 1])
    Path("before").mkdir()
    stage.encode(CONFIG, kept, teacher, Path("before"), NoRun())
    Path("before", "manifest.json").write_text("{")
    offer(out, Path("before"))
    stage.encode(CONFIG, kept, teacher, out, NoRun())
    assert len(LatentSet(out)) == 2
    assert "nothing is taken over from the last run" in capsys.readouterr().err


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


BAD = {
    "a page": (b"<html>", "no image"),
    "nothing": (b"", "no image"),
    "cut": (png((32, 32), (9, 9, 9))[:60], "cannot be decoded"),
    "too large": (png((6000, 5000), (0, 0, 0)), "too many pixels"),
    "a strip": (png((200_000, 1), (0, 0, 0)), "too long for its bucket"),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_counted_row(teacher: Path, out: Path, recorder: Any, workers: int, capsys: Any) -> None:
    members = {f"{name}.png": content for name, (content, _) in BAD.items()}
    members |= {"no json.png": png((32, 32), (0, 0, 0)), "no json.json": b"{", "good.png": png((32, 32), (0, 0, 0))}
    folder = tar(Path("mine", "a.tar"), members)
    config = CONFIG.model_copy(update={"machine": EncodeMachine(batch_size=3, workers=workers)})
    stage.encode(config, folder, teacher, out, recorder)
    rows = {row["key"]: row for row in pq.read_table(out / "a.parquet").to_pylist()}
    wanted = {name: why for name, (_, why) in BAD.items()} | {
        "no json": "its metadata are no JSON object",
        "good": None,
    }
    assert {key: row["error"] for key, row in rows.items()} == wanted
    assert len(LatentSet(out)) == recorder.logged["samples"] == 1
    assert recorder.logged["failed"] == 6
    assert json.loads((out / "stats.json").read_text())["errors"]["no image"] == 2
    assert "encode: 6 images could not be encoded: no image (2)" in capsys.readouterr().err


def test_where_no_image_can_be_encoded_the_stage_stops(teacher: Path, out: Path) -> None:
    folder = tar(Path("mine", "a.tar"), {"1.png": b"<html>"})
    with pytest.raises(KoalaError, match=r"^none of the 1 images of mine could be encoded; most often: no image \(1\)"):
        stage.encode(CONFIG, folder, teacher, out, NoRun())


def test_a_latent_that_is_not_finite_is_a_counted_row(kept: Path, out: Path) -> None:
    def overflows(pixels: torch.Tensor) -> torch.Tensor:
        latents = torch.zeros(len(pixels), 4, *(side // 4 for side in pixels.shape[1:3]))
        latents[pixels[:, 0, 0, 0] == 40] = torch.inf
        return latents

    assert len(list(stage.encode_shards(shards(kept), out, overflows, CONFIG))) == 12
    rows = [row for number in range(3) for row in pq.read_table(out / f"0000{number}.parquet").to_pylist()]
    assert [row["key"] for row in rows if row["error"] == "the latent is not finite"] == ["000000002"]
    data = LatentSet(out)
    assert len(data) == 11
    assert [data[index].latent.shape for index in range(11)].count((4, 8, 8)) == 7


def test_a_worker_that_is_killed_is_one_line(
    kept: Path, teacher: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "prepare", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    config = CONFIG.model_copy(update={"machine": EncodeMachine(workers=1)})
    with pytest.raises(KoalaError, match=r"^a worker of encode was killed, .*: lower encode\.workers"):
        stage.encode(config, kept, teacher, out, NoRun())


def _encode(*arguments: Any) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    stage.encode(*arguments, NoRun())


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_again_and_again_it_ends_with_the_same_bytes(kept: Path, teacher: Path, out: Path, workers: int) -> None:
    """SIGKILL after each count of shards, and in between."""
    config = CONFIG.model_copy(update={"machine": EncodeMachine(batch_size=3, workers=workers)})
    context, random = multiprocessing.get_context("fork"), np.random.default_rng(0)
    Path("whole").mkdir()
    for folder, kills in ((out, (0, 0, 1, 2)), (Path("whole"), ())):
        for finished in (*kills, None):
            process = context.Process(target=_encode, args=(config, kept, teacher, folder))
            process.start()
            if finished is not None:
                while process.is_alive() and len(list(out.glob("*.parquet"))) <= finished:
                    time.sleep(0.001)
                time.sleep(random.random() / 100)
                process.kill()
            process.join(60)
        assert process.exitcode == 0
    assert content(out) == content(Path("whole"))


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


def test_the_type_in_which_the_vae_computes_can_be_chosen(teacher: Path, tmp_path: Path) -> None:
    assert stage.load_vae(teacher, "bfloat16").dtype == torch.bfloat16
    vae = stage.load_vae(teacher)
    vae.register_to_config(force_upcast=True)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(KoalaError, match=r"encode\.vae_dtype: this VAE overflows in float16"):
        stage.load_vae(tmp_path, "float16")


def test_only_large_buckets_are_encoded_in_tiles(teacher: Path) -> None:
    vae, pixels = stage.load_vae(teacher), torch.randint(256, (1, 64, 64, 3), dtype=torch.uint8)
    small, large = (stage.encoder(vae, CONFIG.model_copy(update={"tile_above": above})) for above in (4096, 4095))
    whole = stage.encoder(vae, CONFIG)(pixels)
    assert torch.equal(small(pixels), whole)
    tiled = large(pixels)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
