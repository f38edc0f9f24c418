"""The objective as a module: its terms, and that each reaches the student and nothing else."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from koala.config import load
from koala.data.latents import LatentSet
from koala.distill.batches import Batch
from koala.distill.batches import load as load_batches
from koala.distill.loop import build_task
from koala.distill.task import DistillTask


def make(student: str = "koala-1b", **changes: object) -> tuple[DistillTask, Batch]:
    params = load()
    teacher = StableDiffusionXLPipeline.from_pretrained(params.out("teacher"), use_safetensors=True)
    task = build_task(params, student, teacher)
    (batch, *_) = next(load_batches(LatentSet(params.out("encode")), params.distill, task.text.tokenize, 1000, 0, 1, 0))
    return task, batch


def test_terms_are_named_by_stage_and_finite(distillable) -> None:
    task, batch = make()
    terms = task(batch)
    assert list(terms) == [
        "task",
        "output",
        *(f"feature/{stage}" for stage in ("DW2", "DW3", "Mid", "UP1", "UP2", "DW1", "UP3")),
    ]
    assert all(term.ndim == 0 and torch.isfinite(term) for term in terms.values())


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(distillable) -> None:
    """With a student of all the teacher's blocks, output and feature terms are zero and the task term is not."""
    from koala.distill.features import feature_pairs
    from koala.unet.blocks import teacher_stages

    task, batch = make()
    copy = type(task.teacher).from_config(task.teacher.config)
    copy.load_state_dict(task.teacher.state_dict())
    pairs = feature_pairs("koala", teacher_stages(task.teacher.config))
    own = DistillTask(copy, task.teacher, task.text, task.scheduler, pairs, task.config)
    terms = own(batch)
    assert terms.pop("task") > 0.1
    assert all(term == 0 for term in terms.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_feature_reaches_the_student(distillable, change_params, checkpointing: bool) -> None:
    """Each stage's feature term has a gradient in that stage; the teacher and the text encoders have none."""
    change_params(distill={"gradient_checkpointing": checkpointing})
    task, batch = make()
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


def test_checkpointing_leaves_the_gradient_as_it_is(distillable, change_params) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        task, batch = make()
        sum(task(batch).values()).backward()
        return {name: parameter.grad for name, parameter in task.student.named_parameters()}

    plain = gradients()
    change_params(distill={"gradient_checkpointing": True})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)


def test_a_dropped_caption_is_the_pipelines_own_unconditional_input(distillable) -> None:
    task, _ = make()
    teacher = StableDiffusionXLPipeline.from_pretrained(load().out("teacher"), use_safetensors=True)
    caption = "a large red circle on a white background"
    states, pooled = task.text(task.text.tokenize([caption, caption]), torch.tensor([True, False]))
    wanted, no_states, wanted_pooled, no_pooled = teacher.encode_prompt(caption, device="cpu")
    torch.testing.assert_close(states, torch.cat([wanted, no_states]))
    torch.testing.assert_close(pooled, torch.cat([wanted_pooled, no_pooled]))


def test_without_zeros_the_unconditional_input_is_the_empty_prompt(distillable) -> None:
    teacher = StableDiffusionXLPipeline.from_pretrained(load().out("teacher"), use_safetensors=True)
    teacher.register_to_config(force_zeros_for_empty_prompt=False)
    from koala.distill.conditioning import TextConditioner

    text = TextConditioner(teacher)
    states, pooled = text(text.tokenize(["a large red circle"]), torch.tensor([False]))
    _, no_states, _, no_pooled = teacher.encode_prompt("a large red circle", device="cpu")
    torch.testing.assert_close(states, no_states)
    torch.testing.assert_close(pooled, no_pooled)
