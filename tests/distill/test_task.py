"""The objective as a module: its terms, and that each reaches the student and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from koala.data.latents import LatentSet
from koala.demo.images import Shapes
from koala.distill.config import Compiled
from koala.distill.data import Batch
from koala.distill.data import load as load_batches
from koala.distill.features import FeaturePair
from koala.distill.hooks import compile_modules
from koala.distill.launch_settings import micro_batch
from koala.distill.task import DistillTask
from koala.distill.text import TextConditioner
from koala.distill.train import assemble, build_task, load_teacher
from koala.teacher.config import FitConfig, TinyTeacher
from koala.teacher.tiny import build_pipeline
from koala.unet.blocks import StudentRule, keep
from koala.unet.reference import RULES
from koala.unet.student import build_student

CPU = torch.device("cpu")


Make = Callable[..., tuple[DistillTask, Batch]]


@pytest.fixture
def make(make_job: Callable) -> Make:
    """Make a task of a small recipe and its first micro-batch."""

    def made(student: str = "koala-1b", machine: dict | None = None, **changes: object) -> tuple[DistillTask, Batch]:
        job = make_job(student=student, machine={"micro_batch": 4, **(machine or {})}, **changes)
        task = build_task(job, load_teacher(job, with_vae=False))
        size = micro_batch(job.config, 1)
        latents = LatentSet(job.latents)
        batches = load_batches(latents, latents.buckets, job.config, task.text.tokenize, 1000, size, 0, 1, 0, CPU)
        return task, next(next(batches))

    return made


def test_terms_are_named_by_stage_and_finite(make: Make) -> None:
    task, batch = make()
    terms = task(batch)
    assert list(terms) == [
        "task",
        "output",
        *(f"feature/{stage}" for stage in ("DW2", "DW3", "Mid", "UP1", "UP2", "DW1", "UP3")),
    ]
    assert all(term.ndim == 0 and torch.isfinite(term) for term in terms.values())


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(make: Make) -> None:
    """With a student of all the teacher's blocks, output and feature terms vanish and the task term does not.

    Not to an exact zero: with and without gradients some processors round otherwise.
    """
    from koala.distill.features import feature_pairs
    from koala.unet.blocks import teacher_stages

    task, batch = make()
    copy = type(task.teacher).from_config(task.teacher.config)
    copy.load_state_dict(task.teacher.state_dict())
    pairs = feature_pairs("koala", teacher_stages(task.teacher.config))
    own = DistillTask(copy, task.teacher, task.text, task.scheduler, pairs, task.config)
    terms = own(batch)
    assert terms.pop("task") > 0.1
    assert all(term < 1e-6 for term in terms.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_feature_reaches_the_student(make: Make, checkpointing: bool) -> None:
    """Each stage's feature term has a gradient in that stage; the teacher and the text encoders have none."""
    task, batch = make(machine={"gradient_checkpointing": checkpointing})
    terms = task(batch)
    paths = {
        "DW2": "down_blocks.1",
        "DW3": "down_blocks.2",
        "Mid": "mid_block",
        "UP1": "up_blocks.0",
        "UP2": "up_blocks.1",
    }
    for stage, path in paths.items():
        task.zero_grad()
        terms[f"feature/{stage}"].backward(retain_graph=True)
        gradient = sum(p.grad.abs().sum() for p in task.student.get_submodule(path).parameters() if p.grad is not None)
        assert gradient > 0, stage
    assert all(p.grad is None for module in (task.teacher, task.text) for p in module.parameters())


@pytest.mark.parametrize(
    "how",
    [
        {"gradient_checkpointing": True},
        {"compile": ["BasicTransformerBlock"]},
        {"compile": get_args(Compiled)},
        {"compile": get_args(Compiled), "gradient_checkpointing": True},
    ],
)
def test_how_it_is_computed_leaves_the_gradient_as_it_is(make: Make, how: dict) -> None:
    """Checkpointed and compiled, module by module, with hooks inside what is compiled."""
    plain = gradients(make())
    task, batch = make(machine=how)
    if "compile" in how:
        for unet in (task.student, task.teacher):
            compile_modules(unet, how["compile"], backend="aot_eager")  # inductor's kernels would take a minute
    for _ in range(2):  # the second step runs what the first compiled
        for name, gradient in gradients((task, batch)).items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)


def test_the_teacher_computes_in_its_own_type(make: Make) -> None:
    """Autocast is the student's: a teacher in float32 stays exact beside it, whose features come in half precision."""
    task, batch = make()
    plain = task(batch)
    seen = {}
    for name, unet in (("teacher", task.teacher), ("student", task.student)):
        unet.conv_in.register_forward_hook(lambda _module, _inputs, out, name=name: seen.update({name: out}))
    expected = []
    task.teacher.register_forward_hook(lambda _module, _inputs, out: expected.append(out.sample))
    task(batch)
    with torch.autocast("cpu", torch.bfloat16):
        terms = task(batch)
    assert seen["teacher"].dtype == torch.float32
    assert seen["student"].dtype == torch.bfloat16
    assert torch.equal(*expected)
    assert {term.dtype for term in terms.values()} == {torch.float32}
    for name, term in terms.items():
        assert term.item() == pytest.approx(plain[name].item(), rel=0.05, abs=1e-3)


def gradients(made: tuple[DistillTask, Batch]) -> dict[str, torch.Tensor]:
    task, batch = made
    task.zero_grad()
    sum(task(batch).values()).backward()
    return {name: parameter.grad for name, parameter in task.student.named_parameters()}


@pytest.mark.parametrize(
    "features", ["koala", [{"kind": "cross_attention"}, {"kind": "feed_forward"}, {"kind": "residual"}]]
)
def test_the_gradient_of_every_pair_is_that_of_finite_differences(make: Make, features) -> None:
    """Along the gradient itself, a pair's loss changes by the gradient's length."""
    whole, batch = make("koala-700m", features=features)
    whole.student.double()
    parameters = list(whole.student.parameters())
    torch.manual_seed(0)
    with torch.no_grad():  # away from the teacher, whose first blocks it shares to the bit
        for parameter in parameters:
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0
    for pair in whole.pairs:
        task = DistillTask(whole.student, whole.teacher, whole.text, whole.scheduler, (pair,), whole.config)

        def loss(task: DistillTask = task, pair: FeaturePair = pair) -> torch.Tensor:
            return task(batch)[f"feature/{pair.stage}"]

        start = loss()
        direction = torch.autograd.grad(start, parameters, allow_unused=True, materialize_grads=True)
        length = torch.stack([part.norm() for part in direction]).norm()
        assert length > 0, pair
        reach = 0.01 * start.item() / length.item()  # a step that changes the loss by about 2 %
        values = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                for parameter, part in zip(parameters, direction, strict=True):
                    parameter += sign * reach * part / length
                values.append(loss().item())
        assert (values[0] - values[1]) / (2 * reach) == pytest.approx(length.item(), rel=0.02), pair


@pytest.mark.parametrize("rule", ["ssd-1b", "vega", "bk-base", "custom"])
def test_students_of_any_rule_learn(rule: str, recipe, tmp_path) -> None:
    """From a narrow teacher of SDXL's own depths; BK-SDM's features as well as KOALA's."""
    custom = StudentRule(down_pairs=(0, 1), up_pairs=(0, 1, 2), mid="drop", depth={"DW2": 1, "UP1": "3/10", "UP2": 2})
    teacher = deep_teacher()
    own = RULES.get(rule, custom)
    stages = keep(teacher.unet.config, own)
    config = recipe(features="bk-sdm" if rule == "bk-base" else "koala")
    student = build_student(teacher.unet, own).train()
    task = assemble(student, teacher.unet, TextConditioner(teacher), teacher.scheduler.config, stages, config)
    random = torch.Generator().manual_seed(0)
    batch = Batch(
        samples=torch.arange(2),
        latents=torch.randn(2, 4, 8, 8, generator=random),
        noise=torch.randn(2, 4, 8, 8, generator=random),
        timesteps=torch.tensor([100, 900]),
        tokens=task.text.tokenize(["a large red circle"] * 2),
        keep=torch.tensor([True, False]),
        time_ids=torch.tensor([[32, 32, 0, 0, 32, 32]] * 2),
    )
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = sum(task(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    student.save_pretrained(tmp_path)
    assert type(student).from_pretrained(tmp_path, use_safetensors=True).num_parameters() == student.num_parameters()


def deep_teacher() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    fit = FitConfig(steps=1, batch_size=1, learning_rate=1e-3)
    config = TinyTeacher(
        images=Shapes(count=8), unet_channels=(16, 16, 32), unet_depths=(0, 2, 10), text_width=16, vae=fit, unet=fit
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
    )
    return build_pipeline(config, vae)


def test_a_dropped_caption_is_the_pipelines_own_unconditional_input(make: Make, tiny_teacher: Path) -> None:
    task, _ = make()
    teacher = StableDiffusionXLPipeline.from_pretrained(tiny_teacher, use_safetensors=True)
    caption = "a large red circle on a white background"
    states, pooled = task.text(task.text.tokenize([caption, caption]), torch.tensor([True, False]))
    wanted, no_states, wanted_pooled, no_pooled = teacher.encode_prompt(caption, device="cpu")
    torch.testing.assert_close(states, torch.cat([wanted, no_states]))
    torch.testing.assert_close(pooled, torch.cat([wanted_pooled, no_pooled]))


def test_without_zeros_the_unconditional_input_is_the_empty_prompt(tiny_teacher: Path) -> None:
    teacher = StableDiffusionXLPipeline.from_pretrained(tiny_teacher, use_safetensors=True)
    teacher.register_to_config(force_zeros_for_empty_prompt=False)
    text = TextConditioner(teacher)
    states, pooled = text(text.tokenize(["a large red circle"]), torch.tensor([False]))
    _, no_states, _, no_pooled = teacher.encode_prompt("a large red circle", device="cpu")
    torch.testing.assert_close(states, no_states)
    torch.testing.assert_close(pooled, no_pooled)


def test_a_teacher_of_velocity_has_its_student_predict_velocity(make: Make) -> None:
    """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x (Salimans and Ho 2022, appendix D): the error of a student that says 0."""
    task, batch = make()
    task.scheduler.register_to_config(prediction_type="v_prediction")
    with torch.no_grad():
        task.student.conv_out.weight.zero_()
        task.student.conv_out.bias.zero_()
        terms = task(batch)
    alpha = task.scheduler.alphas_cumprod[batch.timesteps][:, None, None, None]
    velocity = alpha.sqrt() * batch.noise - (1 - alpha).sqrt() * batch.latents
    torch.testing.assert_close(terms["task"], velocity.square().mean())
