"""The tiny teacher: its tokenizer, its parts, and going on after it was cut."""

from pathlib import Path

import pytest
import torch

from koala.demo import shapes, teacher
from koala.demo.config import FitConfig, TinyTeacherConfig

FIT = FitConfig(steps=2, batch_size=2, learning_rate=1e-3)
CONFIG = TinyTeacherConfig(kind="tiny", pictures=8, unet_channels=(16, 32, 32), text_width=32, vae=FIT, unet=FIT)


class Recorder:
    def metrics(self, values: dict[str, float], step: int) -> None:
        assert all(value == value for value in values.values())


def test_every_word_of_a_caption_is_one_token_and_captions_fit() -> None:
    tokenizer = teacher.build_tokenizer()
    for attributes in shapes.ALL_ATTRIBUTES:
        for phrase in shapes.PHRASES:
            caption = shapes.describe(attributes, phrase)
            ids = tokenizer(caption).input_ids
            assert len(ids) == len(caption.split()) + 2 <= teacher.TOKENS
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption


def test_scaled_latents_have_unit_spread() -> None:
    torch.manual_seed(0)
    pictures = torch.stack([teacher.to_tensor(shapes.draw(shapes.sample_scene(0, index), 32)) for index in range(8)])
    vae = teacher.fit_vae(CONFIG, pictures, Recorder())
    assert teacher.encode(vae, pictures).std().item() == pytest.approx(1, rel=1e-4)


def test_a_cut_run_keeps_the_vae_that_it_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teacher, "fit_unet", dies)
        teacher.train(CONFIG, Recorder())
    monkeypatch.setattr(teacher, "fit_vae", dies)
    folder = teacher.train(CONFIG, Recorder())
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (folder / "text_encoder_2").is_dir()
