"""Metrics against values worked out by hand."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from koala.demo import shapes
from koala.demo.attributes import Attributes, attribute_accuracy
from koala.demo.prompts import ShapesPrompts
from koala.errors import KoalaError
from koala.evaluate.extractors import Clip, Questions, forget
from koala.evaluate.metrics.b_vqa import BVqa
from koala.evaluate.metrics.clip_score import ClipScore
from koala.evaluate.metrics.cmmd import Cmmd, discrepancy
from koala.evaluate.metrics.dino_cosine import DinoCosine
from koala.evaluate.metrics.fd_dinov2 import FdDinov2, frechet_distance
from koala.evaluate.metrics.pick_score import PickScore
from koala.evaluate.metrics.psnr import Psnr, agreement
from koala.evaluate.prompts import Prompt, seeded_prompts


def test_attribute_accuracy_counts_each_attribute_and_all_of_them() -> None:
    asked = [shapes.Attributes("large", "red", "circle", "white")] * 4
    seen = [
        shapes.Attributes("large", "red", "circle", "white"),
        shapes.Attributes("small", "red", "circle", "white"),
        shapes.Attributes("small", "blue", "circle", "white"),
        None,
    ]
    answers = iter(seen)
    measured = attribute_accuracy([Image.new("RGB", (4, 4))] * 4, asked, lambda _: next(answers))
    expected = {
        "size": [1, 0, 0, 0],
        "colour": [1, 1, 0, 0],
        "shape": [1, 1, 1, 0],
        "background": [1, 1, 1, 0],
        "all": [1, 0, 0, 0],
        "nothing": [0, 0, 0, 1],
    }
    assert measured == {f"attributes/{name}": values for name, values in expected.items()}
    assert set(measured) == set(Attributes().names())


def test_drawn_images_have_all_attributes_right() -> None:
    scenes = [shapes.sample_scene(3, index) for index in range(40)]
    images = [shapes.draw(scene, 32) for scene in scenes]
    assert attribute_accuracy(images, [scene.attributes for scene in scenes])["attributes/all"] == [1] * 40
    prompts = [Prompt(shapes.describe(scene.attributes), 0) for scene in scenes]
    measured = Attributes().measure(images, prompts, None)
    assert measured["attributes/all"] == [1] * 40
    assert measured["attributes/nothing"] == [0] * 40
    # The same images for other prompts: the metric reads what each prompt asks for.
    assert np.mean(Attributes().measure(images[1:], prompts[:-1], None)["attributes/all"]) < 0.5


def test_attributes_have_a_plot_of_all_models() -> None:
    names = ("size", "colour", "shape", "background", "all")
    values = {f"attributes/{name}": 0.5 for name in names}
    plot = Attributes().plots({"teacher": values, "student": values})["attributes"]
    assert len(plot.axes[0].patches) == 2 * len(names)


def test_agreement_is_each_images_psnr() -> None:
    gray = [Image.new("RGB", (4, 4), (100, 100, 100))] * 2
    other = [Image.new("RGB", (4, 4), (110, 110, 110)), Image.new("RGB", (4, 4), (101, 101, 101))]
    expected = pytest.approx([10 * np.log10(255**2 / 100), 10 * np.log10(255**2)], rel=1e-5)
    assert agreement(other, gray) == expected
    prompts = seeded_prompts(ShapesPrompts(), 2, 0)
    assert Psnr().measure(other, prompts, gray) == {"agreement_db": expected}
    assert Psnr().measure(gray, prompts, None) == {}  # the teacher does not follow itself


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory, tiny_teacher):
    """A CLIP model with random weights, a few numbers wide, in a folder."""
    import torch
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher / "tokenizer")
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = layers | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = layers | {"image_size": 32, "patch_size": 16}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_clip_embeds_in_batches_as_it_does_one_by_one(tiny_clip) -> None:
    prompts = seeded_prompts(ShapesPrompts(), 40, 0)
    texts = [prompt.text for prompt in prompts]
    images = [shapes.draw(shapes.sample_scene(0, index), 32) for index in range(40)]
    clip = Clip(str(tiny_clip), "main")
    vectors, text_vectors = clip.images(images), clip.texts(texts)
    assert vectors.shape == text_vectors.shape == (40, 8)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(40), abs=1e-5)
    assert vectors[35] == pytest.approx(clip.images(images[35:36])[0], abs=1e-5)
    assert text_vectors[35] == pytest.approx(clip.texts(texts[35:36])[0], abs=1e-5)
    expected = 100 * np.clip((vectors * text_vectors).sum(axis=1), 0, None)
    score = ClipScore(model=str(tiny_clip), revision="main").measure(images, prompts, None)
    assert score == {"clip_score": pytest.approx(expected, abs=1e-4)}


def test_clip_score_never_counts_below_zero(tiny_clip, monkeypatch) -> None:
    monkeypatch.setattr(Clip, "images", lambda self, images: np.array([[1.0, 0.0], [0.0, 1.0]]))
    monkeypatch.setattr(Clip, "texts", lambda self, texts: np.array([[0.6, 0.8], [0.0, -1.0]]))
    prompts = seeded_prompts(ShapesPrompts(), 2, 0)
    assert ClipScore(model=str(tiny_clip), revision="main").measure([], prompts, None)["clip_score"] == [60, 0]


def test_pick_score_is_the_cosine_by_the_models_own_scale(tiny_clip, drawn, monkeypatch) -> None:
    import torch

    images, prompts = drawn
    metric = PickScore(model=str(tiny_clip), revision="main")
    clip = Clip(str(tiny_clip), "main")
    cosines = (clip.images(images) * clip.texts([prompt.text for prompt in prompts])).sum(axis=1)
    assert metric.measure(images, prompts, None)["pick_score"] == pytest.approx(np.exp(2.6592) * cosines, abs=1e-3)
    with torch.no_grad():
        clip._model.logit_scale.fill_(1.0)  # the model that `load` keeps
    assert metric.measure(images, prompts, None)["pick_score"] == pytest.approx(np.exp(1) * cosines, abs=1e-3)
    forget()


@pytest.fixture
def drawn():
    """Six drawn images with their prompts."""
    scenes = [shapes.sample_scene(3, index) for index in range(6)]
    prompts = [Prompt(shapes.describe(scene.attributes), index) for index, scene in enumerate(scenes)]
    return [shapes.draw(scene, 32) for scene in scenes], prompts


@pytest.fixture(scope="module")
def tiny_dino(tmp_path_factory):
    """A DINOv2 model with random weights in a folder."""
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


def test_dino_compares_images_of_the_same_number(tiny_dino, drawn) -> None:
    from transformers import BitImageProcessor, Dinov2Model

    images, prompts = drawn
    metric = DinoCosine(model=tiny_dino, revision="main")
    assert metric.measure(images, prompts, None) == {}
    assert metric.measure(images, prompts, images)["dino_cosine"] == pytest.approx([1] * 6, abs=1e-5)
    found = metric.measure(images, prompts, images[::-1])["dino_cosine"]
    inputs = BitImageProcessor.from_pretrained(tiny_dino)(images=[images[1], images[4]], return_tensors="pt")
    tokens = Dinov2Model.from_pretrained(tiny_dino).eval()(**inputs).last_hidden_state[:, 0].detach().numpy()
    expected = tokens[0] @ tokens[1] / np.linalg.norm(tokens[0]) / np.linalg.norm(tokens[1])
    assert found[1] == pytest.approx(expected, abs=1e-4)
    assert found[1] == pytest.approx(found[4], abs=1e-5)
    assert found[1] < 0.9999


def test_the_frechet_distance_of_known_gaussians() -> None:
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2. And a case whose covariances do not commute, by another route."""
    random = np.random.default_rng(0)
    white = random.standard_normal((4000, 3))
    white = (white - white.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    one = white * [1, 2, 3] + [0, 0, 1]
    other = white * [2, 2, 1] + [3, 0, 0]
    assert frechet_distance(one, other) == pytest.approx(9 + 1 + 1 + 0 + 4, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    turned = white @ np.array([[1, 2, 0], [0, 1, 0], [1, 0, 3.0]])
    first, second = np.cov(one, rowvar=False), np.cov(turned, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(first @ second).real).sum()
    expected = (one.mean(0) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root
    assert frechet_distance(one, turned) == pytest.approx(expected, rel=1e-6)
    few = random.standard_normal((4, 16))  # fewer images than features
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_the_discrepancy_of_known_vectors() -> None:
    one, other = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[-1.0, 0.0]])
    near, far = np.exp(-2 / 200), np.exp(-4 / 200)
    expected = 1000 * ((2 + 2 * near) / 4 + 1 - 2 * (far + near) / 2)
    assert discrepancy(one, other) == pytest.approx(expected, rel=1e-9)
    assert discrepancy(one, one) == pytest.approx(0, abs=1e-9)


def test_sets_are_compared_with_the_teachers(tiny_dino, tiny_clip, drawn) -> None:
    images, prompts = drawn
    for metric, name in (
        (FdDinov2(model=tiny_dino, revision="main"), "fd_dinov2"),
        (Cmmd(model=str(tiny_clip), revision="main"), "cmmd"),
    ):
        assert metric.measure(images, prompts, images) == {}
        assert metric.measure_set(images, prompts, None) == {}
        assert metric.measure_set(images, prompts, images)[name] == pytest.approx(0, abs=1e-3)
        assert metric.measure_set(images[:3], prompts[:3], images[3:])[name] > 1e-3
        forget()


@pytest.fixture(scope="module")
def tiny_blip(tmp_path_factory):
    """A BLIP model that answers questions, with random weights, in a folder."""
    import torch
    from transformers import BertTokenizerFast, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "yes", "no", "a", "red", "circle", "small", "?"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = layers | {
        "vocab_size": len(words),
        "encoder_hidden_size": 16,
        "bos_token_id": 5,
        "pad_token_id": 0,
        "sep_token_id": 3,
        "max_position_embeddings": 16,
    }
    model = BlipForQuestionAnswering(
        BlipConfig(text_config=text, vision_config=layers | {"image_size": 16, "patch_size": 8})
    )
    model.text_decoder.cls.predictions.decoder.weight.data.mul_(20)  # answers that differ
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}  # larger than the model's own: positions are interpolated
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(folder)
    return str(folder)


def test_b_vqa_is_the_product_of_yes_over_the_chunks(tiny_blip, drawn) -> None:
    from transformers import BlipForQuestionAnswering, BlipProcessor

    images, _ = drawn
    questions = Questions(tiny_blip, "main")
    one, other = questions.yes(images[0], ["a red circle?", "a small?"])
    assert 0 < one < 1
    # Padding beside a longer question must not change an answer.
    assert questions.yes(images[0], ["a small?"])[0] == pytest.approx(other, abs=1e-5)
    # By the model's own forward pass for training, whose loss holds the same first word.
    processor = BlipProcessor.from_pretrained(tiny_blip)
    model = BlipForQuestionAnswering.from_pretrained(tiny_blip).eval()
    inputs = processor(images=images[0], text="a red circle?", return_tensors="pt")
    generated = model.generate(
        **inputs, interpolate_pos_encoding=True, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
    )
    yes, no = generated.logits[0][0, [6, 7]].exp().tolist()
    assert one == pytest.approx(yes / (yes + no), abs=1e-4)

    metric = BVqa(model=tiny_blip, revision="main")
    prompts = [Prompt("a red circle, a small", 0, chunks=("a red circle", "a small")), Prompt("a small", 1)]
    values = metric.measure([images[0], images[0]], prompts, None)["b_vqa"]
    assert values == pytest.approx([one * other, other], abs=1e-5)
    with pytest.raises(ValueError, match="needs prompts with noun chunks"):
        metric.check(ShapesPrompts())
    forget()


@pytest.mark.parametrize("kind", [ClipScore, PickScore, BVqa, DinoCosine])
def test_a_model_that_cannot_be_had_is_said_in_one_line(kind, tmp_path, drawn) -> None:
    images, prompts = drawn
    with pytest.raises(KoalaError, match=r"cannot load .* at abc as a \w+ for evaluate\.metrics \(OSError\): check"):
        kind(model=str(tmp_path), revision="abc").measure(images, prompts, images)


def test_pickled_weights_are_not_read(tiny_dino, tmp_path, drawn) -> None:
    import torch
    from safetensors.torch import load_file

    images, prompts = drawn
    folder = Path(shutil.copytree(tiny_dino, tmp_path / "pickled"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(KoalaError, match="that it holds safetensors"):
        DinoCosine(model=str(folder), revision="main").measure(images, prompts, images)
