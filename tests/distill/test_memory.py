"""The estimate of training's memory, against what tensors really take, and what is made of it."""

import json
from dataclasses import asdict

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from koala.config import load
from koala.data.latents import LatentSet
from koala.distill import memory
from koala.distill.batches import load as load_batches
from koala.distill.loop import build_task, main
from koala.distill.memory import GIB, LiveBytes, advice, estimate, step_peak
from koala.errors import KoalaError

STUDENT = "koala-700m"


def test_live_bytes_are_those_of_tensors_that_live() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[:10]
        assert live.now == 4000
        b = a + 1
        assert live.now == 8000
        del a
        assert live.now == 8000  # the view keeps it
        del view, b
        assert live.now == 0
    assert live.peak == 8000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_on_meta_tensors_is_that_of_real_ones(distillable, change_params, checkpointing: bool) -> None:
    change_params(
        distill={"gradient_checkpointing": checkpointing, "micro_batch": 4, "batch_size": 4},
        encode={"buckets": [[32, 32]]},
    )
    params = load()
    teacher = StableDiffusionXLPipeline.from_pretrained(params.out("teacher"), use_safetensors=True)
    task = build_task(params, STUDENT, teacher)
    data = LatentSet(params.out("encode"))
    batches = load_batches(data, params.distill, task.text.tokenize, 1000, 0, 1, 0, torch.device("cpu"))
    batch = next(next(batches))
    while batch.latents.shape[-1] != 8:
        batch = next(next(batches))
    task.text = memory._Text(task.teacher.config)  # encoders live apart from the step's peak
    real = step_peak(task, batch, bf16=False)
    assert memory.estimate(params, STUDENT).activations == pytest.approx(real, rel=0.05)


def activations(**changes: object) -> float:
    params = load(profile="sdxl")
    recipe = params.distill.model_copy(update={"micro_batch": 1, "gradient_checkpointing": True, **changes})
    return estimate(params.model_copy(update={"distill": recipe}), STUDENT).activations / GIB


def test_what_saves_memory_is_seen_to(workspace) -> None:
    one = activations()
    assert activations(gradient_checkpointing=False) > 2 * one
    assert 1.2 * one < activations(micro_batch=2) < 2 * one


def test_the_presets_fit_their_cards(workspace) -> None:
    assert estimate(load(profile="sdxl-24gb"), STUDENT).total < 21 * GIB
    assert 24 * GIB < estimate(load(profile="sdxl"), STUDENT).total < 72 * GIB


def test_static_parts_follow_from_the_counts(workspace) -> None:
    found = estimate(load(profile="sdxl"), STUDENT)
    count = 782_822_724
    assert (found.weights, found.gradients, found.optimizer, found.average) == (
        4 * count,
        4 * count,
        8 * count,
        4 * count,
    )
    assert found.teacher == 2 * 2_567_463_684


def test_inspect_training(workspace, capsys) -> None:
    memory.show(STUDENT, "sdxl-24gb", as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed["total"]
        == estimate(load(profile="sdxl-24gb"), STUDENT).total
        == sum(printed[name] for name in asdict(estimate(load(profile="sdxl-24gb"), STUDENT)))
    )
    assert printed["fits_gib"]["24"] and not printed["fits_gib"]["11"]
    memory.show(STUDENT, None, as_json=False)
    assert "fits a card of 8 GiB" in capsys.readouterr().out
    with pytest.raises(KoalaError, match="no student 'x'"):
        memory.show("x", None, False)


def test_advice_names_what_costs_least_first(workspace) -> None:
    recipe = load(profile="sdxl").distill
    assert advice(recipe) == "set distill.gradient_checkpointing to true"
    recipe = recipe.model_copy(update={"gradient_checkpointing": True})
    assert advice(recipe) == "set distill.micro_batch to 4"
    recipe = recipe.model_copy(update={"micro_batch": 1, "ema_offload": True, "optimizer": "adamw-8bit"})
    assert "several GPUs" in advice(recipe)


def test_out_of_memory_is_one_line_with_the_estimate_and_what_to_change(distillable, monkeypatch, tmp_path) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("koala.distill.loop.build_task", full)
    monkeypatch.setenv("KOALA_WORK", str(tmp_path))
    with pytest.raises(SystemExit) as left:
        main(STUDENT)
    assert left.value.code == 2
    line = (tmp_path / "complaint").read_text()
    assert "\n" not in line and "GiB a device (weights" in line and "set distill.teacher_dtype to bfloat16" in line
