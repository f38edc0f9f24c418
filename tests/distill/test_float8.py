"""A teacher in float8: near its bfloat16 self, compiled or not, half as large, and what a student is trained by."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from pydantic import ValidationError
from torch import nn

from koala.config import load
from koala.distill import checkpoint, float8, history
from koala.distill.capture import compile_layers
from koala.distill.config import DistillConfig
from koala.distill.float8 import Float8Linear
from koala.distill.loop import train
from koala.distill.memory import estimate
from koala.errors import KoalaError


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_near_that_of_float32_row_by_row(bias: bool) -> None:
    """Tokens and channels of very different size each keep their own precision."""
    torch.manual_seed(0)
    exact = nn.Linear(32, 48, bias=bias)
    with torch.no_grad():
        exact.weight *= torch.logspace(-3, 3, 48)[:, None]
    x = torch.randn(2, 7, 32) * torch.logspace(-2, 4, 7)[:, None]
    wanted = exact(x)
    found = Float8Linear(exact.bfloat16())(x)
    assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
    largest = x.norm(dim=-1)[..., None] * exact.weight.norm(dim=-1) + (exact.bias.abs() if bias else 0)
    error = (found.float() - wanted).abs() / largest
    assert (error < 0.02).all() and (error > 1e-4).any()


def test_zeros_stay_zeros() -> None:
    layer = Float8Linear(nn.Linear(16, 16, bias=False))
    assert not layer(torch.zeros(3, 16)).any()


def unet(folder) -> nn.Module:
    return StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.bfloat16, use_safetensors=True).unet


def forward(model: nn.Module) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    width = model.config.cross_attention_dim

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16()

    added = {"text_embeds": noise(2, width // 2), "time_ids": torch.zeros(2, 6)}
    with torch.inference_mode():
        return model(noise(2, 4, 8, 8), 10, noise(2, 5, width), added_cond_kwargs=added).sample


def test_a_teacher_stays_near_itself(tiny_teacher) -> None:
    model = unet(tiny_teacher)
    plain = forward(model)
    float8.convert(model)
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    # Of each transformer layer: four of both attentions, two of the feed-forward; none elsewhere.
    transformer_layers = sum(type(module).__name__ == "BasicTransformerBlock" for module in model.modules())
    assert len(layers) == 10 * transformer_layers > 0
    turned = forward(model)
    error = (turned - plain).float().norm() / plain.float().norm()
    assert 0 < error < 0.05
    compile_layers(model, backend="aot_eager")
    torch.testing.assert_close(forward(model), turned, rtol=0.02, atol=0.02)


def test_it_takes_little_more_than_half_the_memory(workspace) -> None:
    params = load(profile="sdxl")
    recipe = params.distill.model_copy(update={"teacher_float8": True})
    plain = estimate(params, "koala-700m")
    turned = estimate(params.model_copy(update={"distill": recipe}), "koala-700m")
    assert 0.5 < turned.teacher / plain.teacher < 0.6
    assert turned.weights == plain.weights


def test_it_needs_bfloat16() -> None:
    recipe = {"launch": "x", "steps": 1, "batch_size": 1, "micro_batch": 1, "learning_rate": 1, "checkpoint_every": 1}
    with pytest.raises(ValidationError, match="set teacher_dtype to bfloat16"):
        DistillConfig(**recipe, validate_every=1, teacher_float8=True)


def test_a_student_is_trained_by_it_and_goes_on(distillable, change_params, tmp_path) -> None:
    recipe = {"teacher_dtype": "bfloat16", "steps": 4, "checkpoint_every": 2, "log_every": 1, "validate_every": 100}
    curves = {}
    for name, turned in (("plain", False), ("turned", True), ("cut", True)):
        change_params(distill={**recipe, "teacher_float8": turned})
        work = tmp_path / name
        work.mkdir()
        train(load(), "koala-700m", work, None)
        if name == "cut":
            shutil.rmtree(work / "unet")
            shutil.rmtree(checkpoint.checkpoints(work)[-1])
            train(load(), "koala-700m", work, None)
        curves[name] = history.read(work)
    assert curves["cut"] == curves["turned"]
    for plain, turned in zip(curves["plain"], curves["turned"], strict=True):
        assert plain["loss/output"] != turned["loss/output"]
        assert turned["loss/output"] == pytest.approx(plain["loss/output"], rel=0.05)


def test_training_does_not_start_where_it_cannot_run(distillable, change_params, tmp_path, monkeypatch) -> None:
    change_params(distill={"teacher_dtype": "bfloat16", "teacher_float8": True})
    monkeypatch.setattr(float8, "possible", lambda _: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(KoalaError, match="A100 is older"):
        train(load(), "koala-700m", tmp_path, None)


def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(KoalaError, match=r"capability 8\.9 or more \(Ada, Hopper\); A100 is older: set it to false"):
        float8.check(torch.device("cuda"))
    float8.check(torch.device("cpu"))
