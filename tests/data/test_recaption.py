"""New captions by image-to-text models of several classes, tiny and random; what a broken image and a kill cost."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from captioner import LAYERS, VISION, WORDS, blip
from PIL import Image
from pydantic import ValidationError

from koala.data import manifest
from koala.data.captions.captioner import Captioner
from koala.data.captions.config import RecaptionConfig, RecaptionMachine
from koala.data.recaption import COLUMNS, recaption
from koala.data.shards import Sample, ShardWriter
from koala.errors import KoalaError
from koala.run import STATE, NoRun


def vit_gpt2(folder: Path, teacher: Path) -> None:
    """An encoder and a decoder, with an image processor and a tokenizer, but no processor of both."""
    from transformers import AutoTokenizer, GPT2Config, VisionEncoderDecoderModel, ViTConfig, ViTImageProcessor
    from transformers import VisionEncoderDecoderConfig as Both

    tokenizer = AutoTokenizer.from_pretrained(teacher / "tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    decoder = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer), n_positions=64, **ids)
    model = VisionEncoderDecoderModel(Both.from_encoder_decoder_configs(ViTConfig(**VISION), decoder))
    model.generation_config.decoder_start_token_id = tokenizer.bos_token_id
    model.config.decoder_start_token_id = tokenizer.bos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def llava(folder: Path, teacher: Path) -> None:
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(teacher / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(**LAYERS, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=128)
    vision = CLIPVisionConfig(**VISION)
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, vision_feature_layer=-1)
    ).save_pretrained(folder)
    size = {"shortest_edge": 32}
    LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} answer",
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Path]:
    """A folder of each class of models."""
    folders = {}
    for make in (blip, vit_gpt2, llava):
        torch.manual_seed(0)
        folders[make.__name__] = tmp_path_factory.mktemp(make.__name__)
        make(folders[make.__name__], tiny_teacher)
    return folders


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def kept(out: Path) -> Path:
    """Seven samples in shards of three; the fifth cannot be decoded."""
    with ShardWriter(Path("kept"), 3) as writer:
        for number in range(7):
            image = b"<html>" if number == 4 else png(picture(number))
            writer.write(Sample(f"{number:09d}", image, "png", f"an old caption {number}", {}))
    return Path("kept")


@pytest.fixture
def recipe(models: dict[str, Path]) -> Callable[..., RecaptionConfig]:
    def make(machine: dict[str, Any] | None = None, **fields: Any) -> RecaptionConfig:
        values = {"model": str(models["blip"]), "revision": "abc", "max_tokens": 8}
        return RecaptionConfig(
            **values | fields, machine=RecaptionMachine(**{"batch_size": 2, "threads": 2} | (machine or {}))
        )

    return make


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_a_model_of_the_hub_is_pinned() -> None:
    with pytest.raises(
        ValidationError, match="us/blip is no folder here, and its revision on the Hub must be a commit"
    ):
        RecaptionConfig(model="us/blip")
    assert RecaptionConfig(model="us/blip", revision="0" * 40).revision


def test_without_a_model_nothing_is_made_or_looked_at(out: Path, recorder: Any) -> None:
    recaption(RecaptionConfig(), Path("nothing"), out, recorder)
    assert {file.name for file in out.iterdir()} == {"stats.json", "manifest.json"}
    assert json.loads((out / "stats.json").read_text()) == {"samples": 0, "captioned": 0, "words": 0.0}


def test_each_image_gets_a_caption_of_its_own(out: Path, kept: Path, recipe, models, recorder: Any) -> None:
    recaption(recipe(), kept, out, recorder)
    assert sorted(file.name for file in out.glob("*.parquet")) == [f"0000{shard}.parquet" for shard in range(3)]
    assert pq.read_schema(out / "00000.parquet").equals(COLUMNS)
    found = rows(out)
    assert [row["key"] for row in found] == [f"{number:09d}" for number in range(7)]
    assert {row["model"] for row in found} == {f"{models['blip']}@abc"}
    assert found[4]["caption"] is None
    one_by_one = Captioner(recipe())
    for number in (0, 1, 2, 3, 5, 6):
        assert found[number]["caption"] == (one_by_one.captions([picture_of(kept, number)])[0] or None)
    captions = [row["caption"] for row in found if row["caption"]]
    assert len(captions) > 3
    assert all(set(caption.split()) <= {word.lower() for word in WORDS} for caption in captions)
    stats = json.loads((out / "stats.json").read_text())
    assert stats["samples"] == 7
    assert stats["captioned"] == len(captions)
    assert stats["words"] == pytest.approx(sum(len(caption.split()) for caption in captions) / len(captions), abs=1e-3)
    assert recorder.logged["captioned"] == len(captions)


def picture_of(kept: Path, number: int) -> Image.Image:
    from koala.data.shards import read_shards

    samples = {sample.key: sample for sample in read_shards(kept)}
    return Image.open(io.BytesIO(samples[f"{number:09d}"].image)).convert("RGB")


def test_captions_end_at_their_most_tokens(recipe) -> None:
    few = Captioner(recipe(max_tokens=2)).captions([picture(1)])
    many = Captioner(recipe(max_tokens=20)).captions([picture(1)])
    assert len(few[0].split()) <= 2 < len(many[0].split()) <= 20


def test_an_encoder_and_a_decoder_without_a_processor_of_both(recipe, models: dict[str, Path]) -> None:
    captioner = Captioner(recipe(model=str(models["vit_gpt2"])))
    images = [picture(number) for number in range(3)]
    together = captioner.captions(images)
    assert together == [captioner.captions([image])[0] for image in images]
    assert all(together)
    with pytest.raises(KoalaError, match="is a VisionEncoderDecoderModel, which takes no prompt: leave it out"):
        Captioner(recipe(model=str(models["vit_gpt2"]), prompt="what is it?"))


def test_a_chat_model_is_asked_by_its_template_and_the_question_is_no_caption(recipe, models: dict[str, Path]) -> None:
    prompt = "describe the image"
    captioner = Captioner(recipe(model=str(models["llava"]), prompt=prompt))
    asked = captioner._tokenizer.decode(captioner._inputs([picture(0)])["input_ids"][0]).replace("</w>", " ")
    assert "<image><image>describe the image answer" in asked
    together = captioner.captions([picture(number) for number in range(3)])
    assert together == [captioner.captions([picture(number)])[0] for number in range(3)]
    assert all(together)
    assert all(prompt not in caption for caption in together)


def test_what_is_finished_is_not_captioned_again(out: Path, kept: Path, recipe, monkeypatch) -> None:
    """A run that dies in its second shard leaves the first."""
    seen = []
    caption = Captioner.captions

    def dies(self: Captioner, images: Any) -> list[str]:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(images))
        return caption(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "captions", dies)
        with pytest.raises(KeyboardInterrupt):
            recaption(recipe(), kept, out, NoRun())
    assert seen == [2, 1]
    assert [file.name for file in out.glob("*.parquet")] == ["00000.parquet"]
    first = (out / "00000.parquet").stat().st_mtime_ns
    with pytest.raises(KoalaError, match="work of another recipe"):
        recaption(recipe(max_tokens=7), kept, out, NoRun())
    recaption(recipe(), kept, out, NoRun())
    assert (out / "00000.parquet").stat().st_mtime_ns == first
    Path("whole").mkdir()
    recaption(recipe(), kept, Path("whole"), NoRun())
    assert rows(out) == rows(Path("whole"))


def test_an_image_that_changed_under_its_manifest_is_named(out: Path, kept: Path, recipe) -> None:
    manifest.write(kept)
    shard = kept / "00001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"an old caption 5", b"a new caption 5!"))
    with pytest.raises(KoalaError, match=r"00001.tar has another content than manifest.json says"):
        recaption(recipe(), kept, out, NoRun())
    assert [file.name for file in out.glob("*.parquet")] == ["00000.parquet"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_two_processes_give_what_one_gives(out: Path, kept: Path, recipe) -> None:
    recaption(recipe(machine={"processes": 2}), kept, out, NoRun())
    Path("one").mkdir()
    recaption(recipe(), kept, Path("one"), NoRun())
    assert rows(out) == rows(Path("one"))


def test_a_model_that_cannot_be_had_is_one_line(
    out: Path, kept: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = "cannot load .* as a AutoModelForImageTextToText for recaption.model"
    for folder in (str(tiny_clip), "nowhere"):
        with pytest.raises(KoalaError, match=line):
            recaption(RecaptionConfig(model=folder), kept, out, NoRun())
        shutil.rmtree(out / STATE)


def test_settings_without_a_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"name a model under recaption\.model"):
        RecaptionConfig(prompt="describe it")
