"""The halves of a step: the EMA, accumulation over processes, and the layout of memory."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from accelerate import Accelerator
from ranks import Training, weights
from safetensors.torch import load_file

from koala.data.latents import LatentSet
from koala.distill.config import Compiled
from koala.distill.data import load as load_batches
from koala.distill.job import checkpoints
from koala.distill.train import StopSignal, build_task, load_teacher, train
from koala.distill.trainer import Trainer
from koala.teacher.shape import read_json

CPU = torch.device("cpu")


def make(job: object) -> tuple[Trainer, list]:
    """A trainer of a job and the micro-batches of its first two steps."""
    task = build_task(job, load_teacher(job, with_vae=False))
    trainer = Trainer(task, job.config, Accelerator(cpu=True))
    latents = LatentSet(job.latents)
    batches = load_batches(
        latents, latents.buckets, job.config, task.text.tokenize, 1000, trainer.micro_batch, 0, 1, 0, CPU
    )
    return trainer, [list(next(batches)) for _ in range(2)]


def step(trainer: Trainer, micro_batches: list) -> None:
    for index, batch in enumerate(micro_batches, start=1):
        trainer.backward(batch, last=index == trainer.accumulate)
    trainer.update(1e-3)


def test_what_is_released_is_the_ema_not_the_last_weights(make_job: Callable) -> None:
    job = make_job(steps=3)
    train(job, StopSignal())
    last = checkpoints(job.state)[-1]
    ema, raw = load_file(last / "ema.safetensors"), load_file(last / "student.safetensors")
    released = weights(job.state)
    assert released.keys() == ema.keys()
    assert all(torch.equal(released[name], ema[name]) for name in ema)
    assert any(not torch.equal(released[name], raw[name]) for name in raw)
    config, built = (read_json(folder / "unet" / "config.json") for folder in (job.state, job.student))
    assert config == built, "a path of this machine goes with the weights"


def test_the_ema_follows_the_weights_by_its_decay(make_job: Callable) -> None:
    """EMA <- d EMA + (1 - d) w, with diffusers' warm-up of d: (1 + n) / (10 + n) at step n, at most the decay."""
    job = make_job(ema_decay=0.15)
    trainer, steps = make(job)
    parameters = list(trainer.student.parameters())
    expected = [parameter.detach().clone() for parameter in parameters]
    for index, micro_batches in enumerate(steps):
        step(trainer, micro_batches)
        decay = 0 if index == 0 else min((1 + index) / (10 + index), 0.15)
        expected = [decay * old + (1 - decay) * new.detach() for old, new in zip(expected, parameters, strict=True)]
    for shadow, wanted in zip(trainer.ema.shadow_params, expected, strict=True):
        torch.testing.assert_close(shadow, wanted)
    assert any(not torch.equal(a, b) for a, b in zip(trainer.ema.shadow_params, parameters, strict=True))


def test_an_offloaded_ema_is_the_same(make_job: Callable) -> None:
    found = []
    for offload in (False, True):
        trainer, steps = make(make_job(machine={"ema_offload": offload}))
        for micro_batches in steps:
            step(trainer, micro_batches)
        found.append([shadow.clone() for shadow in trainer.ema.shadow_params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_non_finite_gradient_leaves_weights_and_ema_as_they_were(make_job: Callable) -> None:
    trainer, steps = make(make_job())
    step(trainer, steps[0])
    before = [tensor.detach().clone() for tensor in (*trainer.student.parameters(), *trainer.ema.shadow_params)]
    trainer.backward(steps[1][0], last=True)
    next(trainer.student.parameters()).grad.fill_(float("nan"))
    assert math.isnan(trainer.update(1e-3))
    after = [*trainer.student.parameters(), *trainer.ema.shadow_params]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_lie_in_memory_as_the_machine_says(make_job: Callable, channels_last: bool) -> None:
    """Weights of both U-Nets, the EMA and the gradients; and the losses are those of the other layout."""
    trainer, steps = make(make_job(machine={"channels_last": channels_last}))
    step(trainer, steps[0])
    losses = trainer.backward(steps[1][0], last=False)
    task = trainer._wrapped
    for unet in (task.student, task.teacher):
        weight = unet.down_blocks[1].resnets[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last
        assert weight.is_contiguous() is not channels_last
    gradient = task.student.down_blocks[1].resnets[0].conv1.weight.grad
    assert gradient.is_contiguous(memory_format=torch.channels_last) is channels_last
    plain, plain_steps = make(make_job("plain"))
    step(plain, plain_steps[0])
    for name, loss in plain.backward(plain_steps[1][0], last=False).items():
        assert losses[name].item() == pytest.approx(loss.item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("sharded", [False, True])
def test_gradients_are_reduced_once_a_step(make_job: Callable, sharded: bool) -> None:
    """Two processes, two micro-batches a step: only the last one meets the other process."""
    job = make_job(steps=2, machine={"checkpoint_every": 100})
    training = Training(job, 2, sharded, environment={"KOALA_TEST_COUNT_REDUCTIONS": str(job.state / "reductions")})
    training.wait()
    assert training.counts() == [2]
    for rank in range(2):
        counts = [int(line) for line in (job.state / f"reductions-{rank}").read_text().split()]
        # Reductions during each micro-batch of two steps: none in the first of each.
        assert len(counts) == 4
        assert counts[0] == counts[2] == 0
        assert counts[1] > 0
        assert counts[3] > 0


def test_all_that_is_compiled_has_static_shapes(make_job: Callable) -> None:
    """With automatic dynamic shapes a second bucket would compile every layer anew, for symbolic sizes."""
    from torch._dynamo.utils import counters

    seen: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        seen.append(any(isinstance(value, torch.SymInt) for value in inputs))
        return graph.forward

    from koala.distill import hooks

    job = make_job()
    task = build_task(job, load_teacher(job, with_vae=False))
    hooks.compile_modules(task.student, get_args(Compiled), backend=backend)
    counters.clear()
    torch._dynamo.reset()
    latents = LatentSet(job.latents)
    batches = load_batches(latents, latents.buckets, job.config, task.text.tokenize, 1000, 2, 0, 1, 0, CPU)
    shapes = set()
    for micro_batches in batches:
        batch = next(micro_batches)
        list(micro_batches)
        if batch.latents.shape not in shapes:
            shapes.add(batch.latents.shape)
            task(batch)
        if len(shapes) == 2:
            break
    assert len(shapes) == 2
    assert seen
    assert not any(seen)


def test_training_leaves_the_process_its_signal_handlers(make_job: Callable, tmp_path: Path) -> None:
    import signal

    from koala.distill.train import main

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    main(make_job(steps=1).write())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
