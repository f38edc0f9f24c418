"""The estimate of training's memory, against what tensors really take, and what is made of it."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from koala.data.latents import LatentSet
from koala.distill import memory, train
from koala.distill.data import load as load_batches
from koala.distill.memory import GIB, LiveBytes, MemoryEstimate, advice, estimate, estimate_for, step_peak
from koala.distill.train import build_task, load_teacher
from koala.errors import KoalaError
from koala.inspect import inspect_training
from koala.params import load
from koala.teacher.shape import SDXL_SHAPE
from koala.unet.blocks import keep

STUDENT = "koala-700m"
ROOT = Path(__file__).parents[2]


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
def test_the_peak_on_meta_tensors_is_that_of_real_ones(
    make_job: Callable, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    monkeypatch.chdir(ROOT)
    job = make_job(batch_size=4, machine={"gradient_checkpointing": checkpointing, "micro_batch": 4})
    task = build_task(job, load_teacher(job, with_vae=False))
    data = LatentSet(job.latents)
    batches = load_batches(data, data.buckets, job.config, task.text.tokenize, 1000, 4, 0, 1, 0, torch.device("cpu"))
    batch = next(next(batches))
    while batch.latents.shape[-1] != 16:
        batch = next(next(batches))
    task.text = memory._Text(task.teacher.config)  # encoders live apart from the step's peak
    real = step_peak(task, batch, bf16=False)
    assert estimate(job).activations == pytest.approx(real, rel=0.05)


@cache
def sdxl(machine: str = "gpu-80gb", **changes: object) -> MemoryEstimate:
    """What KOALA-700M's training takes at SDXL's size, with other settings of the machine where they are given."""
    params = load(profile="sdxl", machine=machine)
    config = params.distill(STUDENT)
    config = config.model_copy(update={"machine": config.machine.model_copy(update=changes)})
    return estimate_for(config, SDXL_SHAPE, keep(SDXL_SHAPE.unet, params.student(STUDENT).unet), (1024, 1024))


@pytest.fixture
def without_activations(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MemoryEstimate]:
    """The estimate but for activations, which take a second."""
    monkeypatch.setattr(memory, "step_peak", lambda *_: 0)
    return sdxl.__wrapped__


def test_what_saves_memory_is_seen_to(workspace: Path) -> None:
    one = sdxl(micro_batch=1, gradient_checkpointing=True).activations
    assert sdxl(micro_batch=1).activations > 1.8 * one
    assert 1.2 * one < sdxl(micro_batch=2, gradient_checkpointing=True).activations < 2 * one


def test_what_is_compiled_keeps_less(workspace: Path) -> None:
    """GiB of activations on an H200, at a micro-batch of 8 (docs/benchmarks.md): 24.7 with compiled layers, 20.6 with all."""
    both = ("BasicTransformerBlock", "ResnetBlock2D")
    eager, layers, every = (sdxl(micro_batch=8, compile=classes).activations / GIB for classes in ((), both[:1], both))
    assert eager > 1.05 * layers
    assert 24.7 < layers < 1.15 * 24.7
    assert 20.6 < every < 1.15 * 20.6


def test_the_machines_fit_their_cards(workspace: Path) -> None:
    assert sdxl("gpu-24gb").total * 1.1 < 24 * GIB
    assert 24 * GIB < sdxl("gpu-80gb").total < 72 * GIB
    assert sdxl("8xgpu-24gb").total * 1.1 < 24 * GIB


def test_static_parts_follow_from_the_counts(
    workspace: Path, without_activations: Callable[..., MemoryEstimate]
) -> None:
    found = without_activations()
    count = 782_822_724
    assert (found.weights, found.gradients, found.optimizer, found.ema) == (4 * count, 4 * count, 8 * count, 4 * count)
    assert found.teacher == 2 * 2_567_463_684


def test_sharded_gradients_are_whole_while_micro_batches_accumulate(
    workspace: Path, without_activations: Callable[..., MemoryEstimate]
) -> None:
    count, processes = 782_822_724, 8
    accumulating, alone = (without_activations("8xgpu-24gb", micro_batch=size) for size in (4, 16))
    assert accumulating.gradients == 4 * count
    assert alone.gradients == 4 * (count // processes)
    assert accumulating.weights == alone.weights == 4 * (count // processes)


def test_the_host_holds_models_while_they_load_and_checkpoints_while_they_are_written(
    workspace: Path, without_activations: Callable[..., MemoryEstimate]
) -> None:
    one, offloaded = without_activations(), without_activations(ema_offload=True)
    eight, on_cpu = without_activations("8xgpu-80gb"), without_activations("cpu")
    count = 782_822_724
    assert one.host > 4 * count + 2 * 2_567_463_684
    assert offloaded.host - one.host == 4 * count
    assert eight.host > 6 * one.host
    assert on_cpu.host > on_cpu.total


def test_a_process_takes_what_the_estimate_says_of_the_host(
    make_job: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: Python and its libraries are most of a tiny training."""
    monkeypatch.chdir(ROOT)
    job = make_job()
    train.train(job, train.StopSignal())
    assert estimate(job).host > 0.5 * psutil.Process().memory_info().rss


def test_inspect_training(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_training(STUDENT, "sdxl", "gpu-24gb", as_json=True)
    printed = json.loads(capsys.readouterr().out)
    found = sdxl("gpu-24gb")
    assert printed["total"] == found.total == sum(printed[name] for name in asdict(found) if name != "host")
    assert printed["host"] == found.host
    assert printed["fits_gib"]["24"]
    assert not printed["fits_gib"]["11"]
    inspect_training(STUDENT, None, None, as_json=False)
    shown = capsys.readouterr().out
    assert "fits a card of 8 GiB" in shown
    assert "GiB of the host's memory" in shown
    with pytest.raises(KoalaError, match="no student 'x'"):
        inspect_training("x", None, None, as_json=False)


def test_advice_names_what_costs_least_first(workspace: Path) -> None:
    config = load(profile="sdxl", machine="gpu-80gb").distill(STUDENT)
    assert advice(config) == "set the machine's distill.gradient_checkpointing to true"
    config = config.model_copy(update={"machine": config.machine.model_copy(update={"gradient_checkpointing": True})})
    assert advice(config) == "set the machine's distill.micro_batch to 8"
    smallest = config.machine.model_copy(update={"micro_batch": 1, "ema_offload": True})
    config = config.model_copy(update={"optimizer": "adamw-8bit", "machine": smallest})
    assert "several GPUs" in advice(config)


def test_out_of_memory_is_one_line_with_the_estimate_and_what_to_change(
    make_job: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "build_task", full)
    job = make_job()
    with pytest.raises(SystemExit) as left:
        train.main(job.write())
    assert left.value.code == 2
    line = (job.state / "complaint").read_text()
    assert "\n" not in line
    assert "GiB a device (weights" in line
    assert "set distill.teacher_dtype to bfloat16" in line


def test_every_machine_of_params_yaml_can_train_sdxl(workspace: Path) -> None:
    for machine in yaml.safe_load((ROOT / "params.yaml").read_text())["machines"]:
        assert sdxl(machine).total > 0
