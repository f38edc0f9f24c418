"""Metrics against values worked out by hand."""

import numpy as np
import pytest
from PIL import Image

from koala.demo import shapes
from koala.demo.attributes import Attributes, attribute_accuracy
from koala.demo.prompts import ShapesPrompts
from koala.errors import KoalaError
from koala.evaluate.metrics.clip_score import Clip, ClipScore, clip_score
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


def test_clip_score_never_counts_below_zero() -> None:
    images = np.array([[1.0, 0.0], [0.0, 1.0]])
    texts = np.array([[0.6, 0.8], [0.0, -1.0]])
    assert clip_score([], [], lambda _: images, lambda _: texts) == pytest.approx([60, 0])


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


def test_a_clip_model_that_is_none_is_said_in_one_line(tmp_path) -> None:
    metric = ClipScore(model=str(tmp_path), revision="main")
    with pytest.raises(KoalaError, match=r"cannot load .* for evaluate\.metrics\.clip_score"):
        metric.measure([], [], None)
