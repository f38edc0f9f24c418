"""Loading models and generating images with them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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


def test_a_missing_model_is_said_before_torch_is_imported(tmp_path) -> None:
    code = """
import sys
from koala.errors import KoalaError
from koala.evaluate.config import SamplingConfig
from koala.generate import generate_grid
from pathlib import Path
try:
    generate_grid(["nowhere"], "x", 0, 1, SamplingConfig(), None, Path("x.png"))
except KoalaError as error:
    heavy = [name for name in ("torch", "diffusers", "transformers", "numpy", "PIL") if name in sys.modules]
    print(error, heavy)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.startswith("there is no model at nowhere")
    assert result.stdout.strip().endswith("[]")


def test_all_models_are_checked_before_one_is_loaded(tiny_teacher, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(KoalaError, match="there is no folder /nowhere/at/all"):
        generate.generate_grid([str(tiny_teacher), "/nowhere/at/all"], "x", 0, 1, SAMPLING, None, tmp_path / "x.png")


@pytest.mark.parametrize(("kind", "dtype"), [("cuda", "float16"), ("cpu", "float32")])
def test_default_dtype_is_the_devices(monkeypatch, kind, dtype) -> None:
    monkeypatch.setattr(generate, "device", lambda: torch.device(kind))
    assert generate.default_dtype() == dtype


def test_dtype_of_a_loaded_pipeline(tiny_teacher) -> None:
    expected = torch.float16 if torch.cuda.is_available() else torch.float32
    assert generate.load(tiny_teacher).unet.dtype == expected
    assert generate.load(tiny_teacher, "bfloat16").unet.dtype == torch.bfloat16


def test_a_folder_without_safetensors_is_refused(tiny_teacher, tmp_path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "pickled"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(KoalaError, match="cannot load a model of SDXL's kind from") as caught:
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


def test_a_grid_of_one_model_and_of_several(tiny_teacher, tmp_path) -> None:
    one, two = tmp_path / "new" / "one.png", tmp_path / "two.png"
    generate.generate_grid([str(tiny_teacher)], "a large red circle", 1, 3, SAMPLING, None, one)
    assert Image.open(one).size == (3 * 102 + 6, 102 + 6)
    models = [str(tiny_teacher), f"{tiny_teacher}/"]
    generate.generate_grid(models, "a large red circle", 1, 2, SAMPLING, None, two)
    assert Image.open(two).width == 190 + 2 * 102 + 6
