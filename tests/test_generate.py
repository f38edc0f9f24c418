"""Loading models and generating images with them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from koala import generate
from koala.errors import KoalaError
from koala.evaluate.config import SamplingConfig

SAMPLING = SamplingConfig(steps=2, guidance=2.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder: give a model folder"),
        ("./nowhere", "there is no folder ./nowhere"),
        ("../nowhere/else", "there is no folder ../nowhere/else"),
        ("~/nowhere", "there is no folder ~/nowhere"),
        ("a/b/c", "there is no folder a/b/c"),
        ("here/nowhere", "there is no folder here/nowhere"),  # its first part exists
        ("some/model.safetensors", "there is no file some/model.safetensors"),
        ("model.safetensors", "there is no file model.safetensors"),
        ("nowhere", "there is no model at nowhere: give a model folder, a .safetensors file, or owner/name"),
        ("owner/na me", "there is no model at owner/na me"),
        ("here", "cannot load a model of SDXL's kind from here: the folder has no model_index.json"),
        ("here/model.ckpt", "cannot load a model from here/model.ckpt, which is not a .safetensors file"),
    ],
)
def test_a_model_that_is_none_is_said_in_one_line(tmp_path, monkeypatch, model, message) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("here/model.ckpt").touch()
    with pytest.raises(KoalaError) as caught:
        generate.check_model(model)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    with pytest.raises(KoalaError, match=r"there is no|cannot load"):
        generate.load(model)


def test_a_name_of_the_hub_passes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    generate.check_model("stabilityai/stable-diffusion-xl-base-1.0")
    generate.check_model("owner/name.with-dots_and")


@pytest.mark.parametrize(("kind", "dtype"), [("cuda", "float16"), ("cpu", "float32")])
def test_default_dtype_is_the_devices(monkeypatch, kind, dtype) -> None:
    monkeypatch.setattr(generate, "device", lambda: torch.device(kind))
    assert generate.default_dtype() == dtype


def test_dtype_of_a_loaded_pipeline(tiny_teacher) -> None:
    expected = torch.float16 if torch.cuda.is_available() else torch.float32
    assert generate.load(tiny_teacher).unet.dtype == expected
    assert generate.load(tiny_teacher, "bfloat16").unet.dtype == torch.bfloat16


def test_a_folder_without_safetensors_is_refused(tiny_teacher, tmp_path) -> None:
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "pickled"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(KoalaError, match="cannot load a model of SDXL's kind from") as caught:
        generate.load(folder)
    assert "\n" not in str(caught.value)


def test_no_model_is_watermarked(tiny_teacher, tmp_path, monkeypatch) -> None:
    """diffusers does so where invisible-watermark is installed, unless told otherwise: a file's images beside a folder's."""
    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import save_file

    asked = {}
    pipeline = generate.load(tiny_teacher)
    load = lambda _, **options: (asked.update(options), pipeline)[1]  # noqa: E731
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_single_file", load)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    assert generate.load(tmp_path / "foreign.safetensors").watermark is None
    assert asked["add_watermarker"] is False


def test_a_tokenizer_without_words_is_refused(tiny_teacher, tmp_path) -> None:
    """transformers makes one of two tokens, which generates from the empty prompt."""
    for part in ("tokenizer", "tokenizer_2"):
        folder = Path(shutil.copytree(tiny_teacher, tmp_path / part))
        (folder / part / "tokenizer.json").unlink()
        with pytest.raises(KoalaError, match=rf"{part} has no vocabulary"):
            generate.load(folder)


def test_a_cut_text_encoder_is_one_line(tiny_teacher, tmp_path) -> None:
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "cut"))
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(KoalaError, match=r"cannot load a model of SDXL's kind from .*cut: Error while deserializing"):
        generate.load(folder)


def test_a_scheduler_that_needs_another_package_is_one_line(tiny_teacher, tmp_path) -> None:
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "other"))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverSDEScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(KoalaError, match="DPMSolverSDEScheduler requires the torchsde library") as caught:
        generate.load(folder)
    assert "\n" not in str(caught.value)


def test_an_image_depends_on_its_prompt_and_seed_only(tiny_teacher) -> None:
    pipeline = generate.load(tiny_teacher, "float32")
    prompts = [("a large red circle on a white background", 3), ("a small blue square on a black background", 4)]
    together = generate.generate(pipeline, prompts, SAMPLING)
    (alone,) = generate.generate(pipeline, prompts[1:], SAMPLING)
    (other,) = generate.generate(pipeline, [(prompts[1][0], 5)], SAMPLING)
    pixels = [np.asarray(image, int) for image in (together[1], alone, other)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1 < np.abs(pixels[0] - pixels[2]).max()


def test_a_negative_prompt_and_a_size_change_the_image(tiny_teacher) -> None:
    pipeline = generate.load(tiny_teacher, "float32")
    prompt = [("a large red circle on a white background", 3)]
    (plain,) = generate.generate(pipeline, prompt, SAMPLING)
    (negative,) = generate.generate(pipeline, prompt, SAMPLING, "a small blue square on a black background")
    (sized,) = generate.generate(pipeline, prompt, SAMPLING, size=(48, None))
    assert np.abs(np.asarray(plain, int) - np.asarray(negative, int)).max() > 1
    assert sized.size == (plain.width, 48)
