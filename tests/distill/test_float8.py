"""A teacher in float8: close to its bfloat16 self, compiled or not, half as large, and usable to train a student."""

import shutil

import pytest
import torch
import torch.distributed as dist
from diffusers import StableDiffusionXLPipeline
from pydantic import ValidationError
from ranks import losses
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from koala.distill import float8
from koala.distill.config import DistillConfig
from koala.distill.float8 import Float8Linear
from koala.distill.hooks import compile_modules
from koala.distill.job import checkpoints
from koala.distill.memory import estimate_for
from koala.distill.train import StopSignal, train
from koala.errors import KoalaError
from koala.params import load
from koala.teacher.shape import SDXL_SHAPE
from koala.unet.blocks import keep
from koala.unet.reference import SDXL
from koala.unet.student import empty_unet


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
    assert found.dtype == torch.bfloat16
    assert found.shape == wanted.shape
    largest = x.norm(dim=-1)[..., None] * exact.weight.norm(dim=-1) + (exact.bias.abs() if bias else 0)
    error = (found.float() - wanted).abs() / largest
    assert (error < 0.02).all()
    assert (error > 1e-4).any()


def test_zeros_stay_zeros() -> None:
    layer = Float8Linear(nn.Linear(16, 16, bias=False))
    assert not layer(torch.zeros(3, 16)).any()


def test_rows_and_channels_of_zeros_leave_the_others_as_they_are() -> None:
    """SDXL's text states of a dropped caption are zeros: torchao's row-wise configuration makes them NaN."""
    torch.manual_seed(0)
    linear, x = nn.Linear(16, 32, bias=False), torch.randn(3, 16)
    whole = Float8Linear(linear)(x)
    with torch.no_grad():
        linear.weight[5] = 0
        x[1] = 0
    found = Float8Linear(linear)(x)
    assert not found[1].any()
    assert not found[:, 5].any()
    whole[1], whole[:, 5] = 0, 0
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("width", [16, 448, 1000])
def test_the_largest_entry_of_a_row_is_kept(width: int) -> None:
    """Scales are float32: in bfloat16 (torchao's) they clip the largest entry of about half the rows."""
    torch.manual_seed(0)
    rows = torch.randn(64, width).bfloat16()
    quantized, scale = float8._quantize(rows)
    assert scale.dtype == torch.float32
    largest = rows.float().abs().amax(-1)
    torch.testing.assert_close((quantized.float() * scale).abs().amax(-1), largest, rtol=1e-6, atol=0)


@pytest.fixture
def one_process() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_data_parallel_training_can_send_it(one_process) -> None:
    """DDP broadcasts every parameter, frozen or not, and gloo cannot send float8."""
    layer = Float8Linear(nn.Linear(16, 32).bfloat16().requires_grad_(False))
    before = layer.weight.clone()
    DistributedDataParallel(nn.ModuleList([nn.Linear(2, 2), layer]))
    assert torch.equal(layer.weight, before)
    assert torch.float8_e4m3fn not in {tensor.dtype for tensor in layer.state_dict().values()}


def unet(folder) -> nn.Module:
    return StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.bfloat16, use_safetensors=True).unet


def forward(model: nn.Module, device: str = "cpu") -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    width = model.config.cross_attention_dim

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16().to(device)

    added = {"text_embeds": noise(2, width // 2), "time_ids": torch.zeros(2, 6, device=device)}
    with torch.inference_mode():
        timesteps = torch.full((2,), 10, device=device)
        return model(noise(2, 4, 8, 8), timesteps, noise(2, 5, width), added_cond_kwargs=added).sample


def distance(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (found - wanted).float().norm() / wanted.float().norm()


def test_a_teacher_stays_near_itself(tiny_teacher) -> None:
    model = unet(tiny_teacher)
    plain = forward(model)
    float8.convert(model)
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    # Of each transformer layer: four of both attentions, two of the feed-forward; none elsewhere.
    transformer_layers = sum(type(module).__name__ == "BasicTransformerBlock" for module in model.modules())
    assert len(layers) == 10 * transformer_layers > 0
    turned = forward(model)
    assert 0 < distance(turned, plain) < 0.05
    compile_modules(model, ["BasicTransformerBlock"], backend="aot_eager")
    torch.testing.assert_close(forward(model), turned, rtol=0.02, atol=0.02)


def test_it_may_lie_channels_last(tiny_teacher) -> None:
    model = unet(tiny_teacher)
    plain = forward(model)
    float8.convert(model)
    model.to(memory_format=torch.channels_last)
    assert 0 < distance(forward(model), plain) < 0.05


def size(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def test_its_memory_is_known_without_its_weights(tiny_teacher) -> None:
    """koala.distill.memory converts it on meta tensors, runs it and adds up its parameters."""
    model = unet(tiny_teacher)
    float8.convert(model)
    without = unet(tiny_teacher).to("meta")
    float8.convert(without)
    assert size(without) == size(model)
    out = forward(without, "meta")
    assert out.is_meta
    assert out.dtype == torch.bfloat16


def test_sdxl_takes_little_more_than_half_the_memory() -> None:
    teacher = empty_unet(SDXL).to(torch.bfloat16)
    plain = size(teacher)
    float8.convert(teacher)
    assert 0.57 < size(teacher) / plain < 0.58


def test_it_needs_bfloat16() -> None:
    with pytest.raises(ValidationError, match="set teacher_dtype to bfloat16"):
        DistillConfig(steps=1, batch_size=1, learning_rate=1, teacher_float8=True)


def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(KoalaError, match=r"capability 8\.9 or more \(Ada, Hopper\); A100 is older: set it to false"):
        float8.check(torch.device("cuda"))
    float8.check(torch.device("cpu"))


def test_the_estimate_knows_that_it_takes_little_more_than_half_the_memory(workspace) -> None:
    params = load(profile="sdxl", machine="gpu-80gb")
    config = params.distill("koala-700m")
    stages = keep(SDXL_SHAPE.unet, params.student("koala-700m").unet)
    plain, converted = (
        estimate_for(config.model_copy(update={"teacher_float8": on}), SDXL_SHAPE, stages, (512, 512))
        for on in (False, True)
    )
    assert 0.5 < converted.teacher / plain.teacher < 0.6
    assert converted.weights == plain.weights


def test_a_student_is_trained_by_it_and_resumes(make_job) -> None:
    curves = {}
    for name, on in (("plain", False), ("converted", True), ("cut", True)):
        job = make_job(name, batch_size=4, steps=4, teacher_dtype="bfloat16", teacher_float8=on)
        train(job, StopSignal())
        if name == "cut":
            shutil.rmtree(job.state / "unet")
            shutil.rmtree(checkpoints(job.state)[-1])
            train(job, StopSignal())
        curves[name] = losses(job.state)
    assert curves["cut"] == curves["converted"]
    for plain, converted in zip(curves["plain"], curves["converted"], strict=True):
        assert plain["loss/output"] != converted["loss/output"]
        assert converted["loss/output"] == pytest.approx(plain["loss/output"], rel=0.05)


def test_training_does_not_start_where_it_cannot_run(make_job, monkeypatch) -> None:
    monkeypatch.setattr(float8, "possible", lambda _: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(KoalaError, match="A100 is older"):
        train(make_job(teacher_dtype="bfloat16", teacher_float8=True), StopSignal())
