"""The tiny teacher: its tokenizer, its parts, and resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from koala.demo import shapes
from koala.demo.images import Shapes
from koala.run import STATE
from koala.teacher import tiny
from koala.teacher.config import TOKENS, FitConfig, TinyTeacher
from koala.teacher.teacher import teacher

FIT = FitConfig(steps=2, batch_size=2, learning_rate=1e-3)
CONFIG = TinyTeacher(images=Shapes(count=8), unet_channels=(16, 32, 32), text_width=32, vae=FIT, unet=FIT)


def test_every_word_of_a_caption_is_one_token_and_captions_fit() -> None:
    tokenizer = tiny.build_tokenizer(CONFIG)
    assert len(tokenizer) == CONFIG.text_config()["vocab_size"]
    for attributes in shapes.ALL_ATTRIBUTES:
        for phrase in shapes.PHRASES:
            caption = shapes.describe(attributes, phrase)
            ids = tokenizer(caption).input_ids
            assert len(ids) == len(caption.split()) + 2 <= TOKENS
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption


def test_images_are_the_scenes_of_their_captions() -> None:
    images = Shapes(count=20, seed=3)
    for index, (image, caption) in enumerate(zip(images.images(48), images.captions(), strict=True)):
        scene = shapes.sample_scene(3, index)
        assert image.tobytes() == shapes.draw(scene, 48).tobytes()
        assert caption == shapes.caption(scene, 3, index)
        assert caption in set(images.sentences())


def test_scaled_latents_have_unit_spread(recorder: Any) -> None:
    torch.manual_seed(0)
    images = torch.stack([tiny.to_tensor(shapes.draw(shapes.sample_scene(0, index), 32)) for index in range(8)])
    vae = tiny.fit_vae(CONFIG, images, recorder)
    assert tiny.encode(vae, images).std().item() == pytest.approx(1, rel=1e-4)
    assert all(value == value for value in recorder.logged.values())


@pytest.mark.parametrize("size", [4, 5, 1])
def test_halves_give_the_gradients_of_the_whole_batch(size: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    inputs, targets = torch.randn(size, 3), torch.randn(size, 2)

    def loss_of(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        return loss, 10 * loss

    expected = loss_of(model, inputs, targets)[0]
    expected.backward()
    gradient = model.weight.grad.clone()
    with tiny.Halves(model) as halves:
        for _ in range(2):  # nothing of the first stays in the second
            model.zero_grad()
            loss, ten = halves.backward(loss_of, inputs, targets)
            assert loss == pytest.approx(expected.item(), rel=1e-5)
            assert ten == pytest.approx(10 * expected.item(), rel=1e-5)
            torch.testing.assert_close(model.weight.grad, gradient)
        with torch.no_grad():
            model.weight.mul_(2)  # a step of the optimizer reaches both
        model.zero_grad()
        halves.backward(loss_of, inputs, targets)
        found = model.weight.grad.clone()
    model.zero_grad()
    loss_of(model, inputs, targets)[0].backward()
    torch.testing.assert_close(found, model.weight.grad)


def test_an_interrupted_run_keeps_the_vae_and_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Any
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    whole, out = tmp_path / "whole", tmp_path / "out"
    whole.mkdir()
    out.mkdir()
    teacher(CONFIG, out=whole, run=type(recorder)())
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "fit_unet", dies)
        with pytest.raises(KeyboardInterrupt):
            teacher(CONFIG, out=out, run=recorder)
    torch.manual_seed(12345)  # as another process has it
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "fit_vae", dies)
        teacher(CONFIG, out=out, run=recorder)
    assert (out / "text_encoder_2").is_dir()
    assert not (out / STATE).exists()
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        expected = load_file(whole / file)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(out / file).items())
    for name in ("unet", "vae", "text_encoder"):  # no folder of this machine is in the teacher
        assert (out / name / "config.json").read_bytes() == (whole / name / "config.json").read_bytes()
    assert recorder.steps == {"vae_loss": [0], "vae_psnr": [0], "unet_loss": [0]}
    assert all(value == value for value in recorder.logged.values())

    # Finished is finished: neither part is trained again.
    monkeypatch.setattr(tiny, "train", dies)
    teacher(CONFIG, out=out, run=recorder)


def test_steps_that_were_logged_before_are_not_logged_again(recorder: Any) -> None:
    torch.manual_seed(0)
    images = torch.zeros(8, 3, 32, 32)
    recorder.metrics({"vae_loss": 1.0}, step=0)
    tiny.fit_vae(CONFIG, images, recorder)
    assert recorder.steps == {"vae_loss": [0]}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"unet_depths": (0, 1)}, "unet_channels has 3 levels, unet_depths 2: give both a number for each level"),
        ({"unet_channels": (16, 24, 32)}, "multiple of 16"),
        ({"unet_channels": (), "unet_depths": ()}, "unet_channels"),
        ({"vae_channels": (12, 16)}, "multiple of 8"),
    ],
)
def test_sizes_that_make_no_teacher_are_refused(changes: dict[str, tuple[int, ...]], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        TinyTeacher(**(dict(CONFIG) | changes))
