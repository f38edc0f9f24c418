"""Metrics against values worked out by hand."""

import gc
import shutil
import weakref
from http.server import BaseHTTPRequestHandler
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from koala.demo import shapes
from koala.demo.attributes import Attributes, attribute_accuracy
from koala.demo.prompts import ShapesPrompts
from koala.errors import KoalaError
from koala.evaluate import extractors
from koala.evaluate.extractors import Clip, Questions, clip, dino, forget, questions
from koala.evaluate.metrics.b_vqa import BVqa
from koala.evaluate.metrics.clip_score import ClipScore
from koala.evaluate.metrics.cmmd import Cmmd, discrepancy
from koala.evaluate.metrics.dino_cosine import DinoCosine
from koala.evaluate.metrics.fd_dinov2 import FdDinov2, frechet_distance
from koala.evaluate.metrics.hps_v21 import HpsV21
from koala.evaluate.metrics.pick_score import PickScore
from koala.evaluate.metrics.psnr import Psnr, agreement
from koala.evaluate.prompts import Prompt, seeded_prompts
from koala.evaluate.statistics import Resamples


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
    assert agreement(gray, gray) == pytest.approx([78.13] * 2, abs=0.01)  # equal images: finite


def test_clip_embeds_in_batches_as_it_does_one_by_one(tiny_clip) -> None:
    prompts = seeded_prompts(ShapesPrompts(), 40, 0)
    texts = [prompt.text for prompt in prompts]
    images = [shapes.draw(shapes.sample_scene(0, index), 32) for index in range(40)]
    extractor = clip(str(tiny_clip), None)
    vectors, text_vectors = extractor.images(images), extractor.texts(texts)
    assert vectors.shape == text_vectors.shape == (40, 8)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(40), abs=1e-5)
    assert vectors[35] == pytest.approx(extractor.images(images[35:36])[0], abs=1e-5)
    assert text_vectors[35] == pytest.approx(extractor.texts(texts[35:36])[0], abs=1e-5)
    expected = 100 * np.clip((vectors * text_vectors).sum(axis=1), 0, None)
    score = ClipScore(model=str(tiny_clip)).measure(images, prompts, None)
    assert score == {"clip_score": pytest.approx(expected, abs=1e-4)}


def test_clip_score_never_counts_below_zero(tiny_clip, monkeypatch) -> None:
    monkeypatch.setattr(Clip, "images", lambda self, images: np.array([[1.0, 0.0], [0.0, 1.0]]))
    monkeypatch.setattr(Clip, "texts", lambda self, texts: np.array([[0.6, 0.8], [0.0, -1.0]]))
    prompts = seeded_prompts(ShapesPrompts(), 2, 0)
    assert ClipScore(model=str(tiny_clip)).measure([], prompts, None)["clip_score"] == [60, 0]


def test_pick_score_is_the_cosine_by_the_models_own_scale(tiny_clip, drawn, monkeypatch) -> None:
    import torch

    images, prompts = drawn
    metric = PickScore(model=str(tiny_clip))
    extractor = clip(str(tiny_clip), None)
    cosines = (extractor.images(images) * extractor.texts([prompt.text for prompt in prompts])).sum(axis=1)
    assert metric.measure(images, prompts, None)["pick_score"] == pytest.approx(np.exp(2.6592) * cosines, abs=1e-3)
    with torch.no_grad():
        extractor._model.logit_scale.fill_(1.0)  # the model that is held
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
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


def test_dino_compares_images_of_the_same_number(tiny_dino, drawn) -> None:
    from transformers import BitImageProcessor, Dinov2Model

    images, prompts = drawn
    metric = DinoCosine(model=tiny_dino)
    assert metric.measure(images, prompts, None) == {}
    assert metric.measure(images, prompts, images)["dino_cosine"] == pytest.approx([1] * 6, abs=1e-5)
    found = metric.measure(images, prompts, images[::-1])["dino_cosine"]
    whole = {"size": {"height": 28, "width": 28}, "do_center_crop": False}
    inputs = BitImageProcessor.from_pretrained(tiny_dino)(images=[images[1], images[4]], **whole, return_tensors="pt")
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
    one, other = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[-1.0, 0.0], [0.0, 1.0]])
    near, far = np.exp(-2 / 200), np.exp(-4 / 200)
    expected = 1000 * ((2 + 2 * near) / 4 + (2 + 2 * near) / 4 - 2 * (far + 2 * near + 1) / 4)
    assert discrepancy(one, other, ["a", "b"]).value == pytest.approx(expected, rel=1e-5)
    assert discrepancy(one, one, ["a", "b"]).value == pytest.approx(0, abs=1e-6)


def test_the_discrepancy_of_resamples_is_that_of_their_images(monkeypatch) -> None:
    """Three prompts, one of two images: each draw, but for the centring, is the figure of the vectors that it repeats."""
    random = np.random.default_rng(0)
    one, other = (vectors / np.linalg.norm(vectors, axis=1)[:, None] for vectors in random.normal(size=(2, 4, 5)))
    prompts = ["a", "b", "a", "c"]
    monkeypatch.setattr("koala.evaluate.metrics.cmmd._ROWS", 3)  # in blocks
    found = discrepancy(one, other, prompts)
    drawn = []
    for times in np.concatenate(list(Resamples(prompts).draws(1000))):
        rows = np.repeat(np.arange(4), times[[0, 1, 0, 2]])
        a, b = one[rows], other[rows]
        kernels = [np.exp(-((x[:, None] - y[None]) ** 2).sum(axis=2) / 200).mean() for x, y in ((a, a), (b, b), (a, b))]
        drawn.append(1000 * (kernels[0] + kernels[1] - 2 * kernels[2]))
    assert found.draws == pytest.approx(drawn - np.mean(drawn) + found.value, rel=1e-4)
    assert np.mean(found.draws) == pytest.approx(found.value)


def test_dino_sees_the_borders_of_an_image(tiny_dino) -> None:
    plain, framed = Image.new("RGB", (64, 48)), Image.new("RGB", (64, 48), (255, 255, 255))
    framed.paste(Image.new("RGB", (60, 44)), (2, 2))
    assert DinoCosine(model=tiny_dino).measure([framed], [Prompt("a", 0)], [plain])["dino_cosine"][0] < 0.999


def test_sets_are_compared_with_the_teachers(tiny_dino, tiny_clip, drawn) -> None:
    images, prompts = drawn
    for metric, name in (
        (FdDinov2(model=tiny_dino), "fd_dinov2"),
        (Cmmd(model=str(tiny_clip)), "cmmd"),
    ):
        assert metric.measure(images, prompts, images) == {}
        assert metric.measure_set(images, prompts, None) == {}
        assert metric.measure_set(images, prompts, images)[name].value == pytest.approx(0, abs=1e-3)
        figure = metric.measure_set(images[:3], prompts[:3], images[3:])[name]
        assert figure.value > 1e-3
        assert (figure.draws is not None) == metric.columns[name].interval
        forget()


def test_one_model_is_held_and_an_image_is_embedded_once(tiny_dino, tiny_clip, drawn, monkeypatch) -> None:
    images, prompts = drawn
    other = images[::-1]
    forget()
    loaded, embedded = [], []
    load, tokens = extractors._load, extractors.Dino._class_tokens
    monkeypatch.setattr(extractors, "_load", lambda *asked: (loaded.append(asked[0]), load(*asked))[1])
    monkeypatch.setattr(
        extractors.Dino, "_class_tokens", lambda self, batch: (embedded.append(len(batch)), tokens(self, batch))[1]
    )
    for metric in (DinoCosine(model=tiny_dino), FdDinov2(model=tiny_dino)):
        for reference in (None, images):
            metric.measure(other, prompts, reference)
            metric.measure_set(other, prompts, reference)
    assert loaded == ["Dinov2Model"]
    assert embedded == [6, 6]
    held = weakref.ref(dino(tiny_dino, None))
    clip(str(tiny_clip), None)
    gc.collect()
    assert held() is None
    forget()
    assert extractors._held == {}


@pytest.fixture(scope="module")
def tiny_hps(tiny_clip, tmp_path_factory):
    """The weights of `tiny_clip` under open_clip's names, within a module that holds the model as `model`: written by hand."""
    import torch
    from safetensors.torch import load_file, save_file

    own = load_file(tiny_clip / "model.safetensors")
    found = {"model.logit_scale": own["logit_scale"]}
    for tower, prefix in (("text_model", "model."), ("vision_model", "model.visual.")):
        layer, block = f"{tower}.encoder.layers.0", f"{prefix}transformer.resblocks.0"
        for kind in ("weight", "bias"):
            thirds = [own[f"{layer}.self_attn.{each}_proj.{kind}"] for each in "qkv"]
            found[f"{block}.attn.in_proj_{kind}"] = torch.cat(thirds)
            found[f"{block}.attn.out_proj.{kind}"] = own[f"{layer}.self_attn.out_proj.{kind}"]
            found[f"{block}.ln_1.{kind}"] = own[f"{layer}.layer_norm1.{kind}"]
            found[f"{block}.ln_2.{kind}"] = own[f"{layer}.layer_norm2.{kind}"]
            found[f"{block}.mlp.c_fc.{kind}"] = own[f"{layer}.mlp.fc1.{kind}"]
            found[f"{block}.mlp.c_proj.{kind}"] = own[f"{layer}.mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        found[f"model.ln_final.{kind}"] = own[f"text_model.final_layer_norm.{kind}"]
        found[f"model.visual.ln_pre.{kind}"] = own[f"vision_model.pre_layrnorm.{kind}"]
        found[f"model.visual.ln_post.{kind}"] = own[f"vision_model.post_layernorm.{kind}"]
    text, vision = "text_model.embeddings", "vision_model.embeddings"
    found["model.token_embedding.weight"] = own[f"{text}.token_embedding.weight"]
    found["model.positional_embedding"] = own[f"{text}.position_embedding.weight"]
    found["model.text_projection"] = own["text_projection.weight"].T.contiguous()
    found["model.visual.class_embedding"] = own[f"{vision}.class_embedding"]
    found["model.visual.conv1.weight"] = own[f"{vision}.patch_embedding.weight"]
    found["model.visual.positional_embedding"] = own[f"{vision}.position_embedding.weight"]
    found["model.visual.proj"] = own["visual_projection.weight"].T.contiguous()
    folder = tmp_path_factory.mktemp("hps")
    save_file(found, folder / "model.safetensors")
    return folder


def hps(folder: Path, base: Path) -> HpsV21:
    return HpsV21(model=str(folder), base=str(base), base_revision=None)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_hps_is_the_cosine_by_weights_under_open_clips_names(tiny_hps, tiny_clip, tmp_path, drawn, prefix) -> None:
    from safetensors.torch import load_file, save_file

    images, prompts = drawn
    tensors = load_file(tiny_hps / "model.safetensors")
    save_file({prefix + name.removeprefix("model."): tensors[name] for name in tensors}, tmp_path / "model.safetensors")
    cosines = clip(str(tiny_clip), None).cosines(images, [prompt.text for prompt in prompts])
    found = hps(tmp_path, tiny_clip).measure(images, prompts, None)["hps_v21"]
    assert found == pytest.approx(100 * cosines, abs=1e-4)
    assert min(found) < 0  # it has no floor
    forget()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda tensors: tensors.pop("model.ln_final.bias"),
            "1 tensors are missing or unknown, model.ln_final.bias among",
        ),
        (
            lambda tensors: tensors.update(extra=tensors["model.logit_scale"].clone()),
            "1 tensors are missing or unknown, extra",
        ),
        (
            lambda tensors: tensors.update({"model.visual.proj": tensors["model.visual.proj"][:3].contiguous()}),
            r"model.visual.proj has the shape \(3, 8\)",
        ),
    ],
)
def test_every_tensor_of_hps_has_its_place(tiny_hps, tiny_clip, tmp_path, drawn, change, line) -> None:
    from safetensors.torch import load_file, save_file

    images, prompts = drawn
    tensors = load_file(tiny_hps / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(KoalaError, match=line):
        hps(tmp_path, tiny_clip).measure(images, prompts, None)


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
    extractor = questions(tiny_blip, None)
    (one, other), _ = extractor.yes(images[:2], [["a red circle?", "a small?"], ["a small?"]])
    assert 0 < one < 1
    # Neither padding beside a longer question nor the other images of a batch must change an answer.
    assert extractor.yes(images[:1], [["a small?"]]) == [pytest.approx([other], abs=1e-5)]
    asked = [["a small?"], ["a red circle?", "a red?"]] * 6
    batches = extractor.yes((images * 2), asked)
    singly = [extractor.yes([image], [each])[0] for image, each in zip(images * 2, asked, strict=True)]
    assert [len(each) for each in batches] == [1, 2] * 6
    assert list(chain(*batches)) == pytest.approx(list(chain(*singly)), abs=1e-5)
    # By the model's own forward pass for training, whose loss holds the same first word.
    processor = BlipProcessor.from_pretrained(tiny_blip)
    model = BlipForQuestionAnswering.from_pretrained(tiny_blip).eval()
    inputs = processor(images=images[0], text="a red circle?", return_tensors="pt")
    generated = model.generate(
        **inputs, interpolate_pos_encoding=True, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
    )
    yes, no = generated.logits[0][0, [6, 7]].exp().tolist()
    assert one == pytest.approx(yes / (yes + no), abs=1e-4)

    metric = BVqa(model=tiny_blip)
    prompts = [Prompt("a red circle, a small", 0, chunks=("a red circle", "a small")), Prompt("a small", 1)]
    values = metric.measure([images[0], images[0]], prompts, None)["b_vqa"]
    assert values == pytest.approx([one * other, other], abs=1e-5)
    with pytest.raises(ValueError, match="needs prompts with noun chunks"):
        metric.check(ShapesPrompts())
    forget()


def test_b_vqa_asks_about_eight_chunks_at_most(tiny_blip, drawn, monkeypatch) -> None:
    monkeypatch.setattr(Questions, "yes", lambda self, images, asked: [[0.5] * len(each) for each in asked])
    prompts = [Prompt("many", 0, chunks=tuple("abcdefghij")), Prompt("few", 1, chunks=("a", "b"))]
    assert BVqa(model=tiny_blip).measure(drawn[0][:2], prompts, None)["b_vqa"] == [0.5**8, 0.5**2]
    forget()


@pytest.mark.parametrize("kind", [ClipScore, PickScore, BVqa, DinoCosine, HpsV21])
def test_a_model_that_cannot_be_had_is_said_in_one_line(kind, tmp_path, drawn) -> None:
    images, prompts = drawn
    base = {"base": str(tmp_path), "base_revision": None} if kind is HpsV21 else {}
    with pytest.raises(
        KoalaError, match=r"cannot load \S+ as a \w+ for evaluate\.metrics \((OSError|ValueError)\): check"
    ) as error:
        kind(model=str(tmp_path), **base).measure(images, prompts, images)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tensors: {}, r"it lacks \d+ tensors, embeddings"),
        (lambda tensors: {**tensors, "layernorm.bias": tensors["layernorm.bias"][:3].contiguous()}, "RuntimeError"),
        (None, "SafetensorError"),
    ],
)
def test_weights_of_another_model_are_not_filled_up(tiny_dino, tmp_path, drawn, spoil, reason) -> None:
    """transformers would leave missing tensors at random, and the scores with them."""
    from safetensors.torch import load_file, save_file

    images, prompts = drawn
    folder = Path(shutil.copytree(tiny_dino, tmp_path / "other"))
    file = folder / "model.safetensors"
    if spoil:
        save_file(spoil(load_file(file)), file, {"format": "pt"})
    else:
        file.write_bytes(b"no safetensors")
    with pytest.raises(KoalaError, match=rf"as a Dinov2Model for evaluate\.metrics \({reason}"):
        DinoCosine(model=str(folder)).measure(images, prompts, images)


def test_a_revision_that_the_hub_lacks_is_said_in_one_line(as_hub, tmp_path, monkeypatch, drawn) -> None:
    """Over HTTP: the revision that is named is the one that is asked for."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    as_hub(Hub)
    images, prompts = drawn
    commit = "a" * 40
    metric = DinoCosine(model="owner/dino", revision=commit)
    with pytest.raises(KoalaError, match=rf"cannot load owner/dino at {commit} as a Dinov2Model .* \(OSError\)"):
        metric.measure(images, prompts, images)
    assert {path.split("/")[4] for path in asked if "/resolve/" in path} == {commit}
    asked.clear()
    with pytest.raises(
        KoalaError, match=rf"cannot find owner/dino at {commit} .*, for evaluate.metrics \(RevisionNotFound"
    ):
        metric.find()
    assert asked == [f"/owner/dino/resolve/{commit}/config.json"]


def test_a_model_is_looked_for_before_images_are_generated(as_hub, tiny_dino, tiny_clip, tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            there = self.path.endswith("/config.json")
            self.send_response(200 if there else 404)
            self.send_header(*(("X-Repo-Commit", "a" * 40) if there else ("X-Error-Code", "EntryNotFound")))
            self.send_header("ETag", '"x"')
            self.send_header("Content-Length", "2" if there else "0")
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    as_hub(Hub)
    ClipScore(model="owner/clip", revision="a" * 40).find()
    DinoCosine(model=tiny_dino).find()
    with pytest.raises(KoalaError, match=r"owner/hps at a+ \(evaluate.metrics\) has no model.safetensors"):
        HpsV21(model="owner/hps", revision="a" * 40, base=str(tiny_clip)).find()
    with pytest.raises(KoalaError, match=r"there is no folder /no/base \(evaluate.metrics\)"):
        HpsV21(model=str(tiny_clip), base="/no/base").find()
    (tmp_path / "empty").mkdir()
    with pytest.raises(KoalaError, match=r"empty \(evaluate.metrics\) has no config.json"):
        PickScore(model=str(tmp_path / "empty")).find()


def test_a_folder_that_is_not_there_and_a_hub_that_does_not_answer_are_one_line(tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    for model in ("/no/such/model", "nowhere"):
        with pytest.raises(
            KoalaError, match=f"there is no folder {model} .*: give that of a model, or a Hub repository"
        ):
            PickScore(model=model).find()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/{revision}/{filename}")
    with pytest.raises(KoalaError, match=r"cannot find owner/clip at a+ on the Hugging Face Hub, .*ConnectError"):
        PickScore(model="owner/clip", revision="a" * 40).find()


def test_pickled_weights_are_not_read(tiny_dino, tmp_path, drawn) -> None:
    import torch
    from safetensors.torch import load_file

    images, prompts = drawn
    folder = Path(shutil.copytree(tiny_dino, tmp_path / "pickled"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(KoalaError, match="that it holds safetensors"):
        DinoCosine(model=str(folder)).measure(images, prompts, images)
