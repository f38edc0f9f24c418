"""A teacher's shape, known before its weights are read."""

from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline

from koala.demo.images import Shapes
from koala.errors import KoalaError
from koala.teacher.config import FileTeacher, FitConfig, FolderTeacher, HubTeacher, TinyTeacher
from koala.teacher.shape import SDXL_TEXT_PARAMETERS, clip_parameters, shape_of
from koala.teacher.tiny import build_pipeline, build_vae
from koala.unet.reference import SDXL

FIT = FitConfig(steps=1, batch_size=1, learning_rate=1e-3)
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280}


def test_sdxls_text_encoders_have_the_parameters_that_their_sizes_give() -> None:
    assert clip_parameters(CLIP_L) + clip_parameters(CLIP_G, projection=True) == SDXL_TEXT_PARAMETERS


def test_the_shape_of_a_folder_is_that_of_its_models(tiny_teacher: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_teacher, use_safetensors=True)
    shape = shape_of(tiny_teacher)
    assert shape == FolderTeacher(path=tiny_teacher).shape()
    assert shape.unet["block_out_channels"] == [16, 32, 32]
    assert shape.latent_factor == pipeline.vae_scale_factor
    assert shape.tokens == pipeline.tokenizer.model_max_length
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    assert shape.text_parameters == sum(encoder.num_parameters() for encoder in encoders)


def test_the_shape_of_a_tiny_teacher_is_that_of_what_is_built(tmp_path: Path) -> None:
    config = TinyTeacher(images=Shapes(count=8), unet_channels=(16, 32, 32), text_width=32, vae=FIT, unet=FIT)
    build_pipeline(config, build_vae(config)).save_pretrained(tmp_path)
    said, built = config.shape(), shape_of(tmp_path)
    assert (said.latent_factor, said.tokens, said.text_parameters) == (
        built.latent_factor,
        built.tokens,
        built.text_parameters,
    )
    for name, value in said.unet.items():
        assert built.unet[name] == (list(value) if isinstance(value, tuple) else value)


def test_what_is_not_here_yet_counts_as_sdxl(tiny_teacher: Path) -> None:
    hub = HubTeacher(repository="us/sdxl", revision="0" * 40)
    file = FileTeacher(path=Path("my-sdxl.safetensors"))
    assert hub.shape().unet is file.shape().unet is SDXL
    assert (hub.shape().latent_factor, hub.shape().tokens, hub.shape().text_parameters) == (8, 77, SDXL_TEXT_PARAMETERS)
    assert FileTeacher(path=file.path, config=tiny_teacher).shape() == shape_of(tiny_teacher)


def test_a_folder_that_is_no_pipeline_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(KoalaError, match=r"vae/config\.json is missing: a teacher is a whole pipeline folder"):
        FolderTeacher(path=tmp_path).shape()
