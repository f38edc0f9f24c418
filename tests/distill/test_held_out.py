"""Samples that are kept out of training, and the losses on them."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from ranks import Training, losses, same, weights

from koala.data.latents import LatentSet
from koala.distill import data, held_out
from koala.distill.config import Compiled
from koala.distill.job import Job
from koala.distill.train import StopSignal, build_task, load_teacher, train
from koala.distill.trainer import Trainer
from koala.errors import KoalaError

MakeJob = Callable[..., Job]


def indices(buckets: data.Buckets) -> list[int]:
    return sorted(int(index) for found in buckets.values() for index in found)


def held_out_of(rows: list[dict]) -> dict[int, dict[str, float]]:
    return {
        row["step"]: {name: value for name, value in row.items() if name.startswith("held_out")}
        for row in rows
        if "held_out/total" in row
    }


def test_what_is_held_out_never_trains_and_all_else_does(make_job: MakeJob, artifacts) -> None:
    samples = LatentSet(artifacts.latents)
    config = make_job(held_out=6, batch_size=4).config
    trained_on, kept_out = held_out.split(samples, config)
    assert len(indices(kept_out)) == 6
    assert sorted(indices(trained_on) + indices(kept_out)) == list(range(len(samples)))
    assert indices(held_out.split(samples, config)[1]) == indices(kept_out)
    other = config.model_copy(update={"seed": 1})
    assert indices(held_out.split(samples, other)[1]) != indices(kept_out)
    steps = data.load(
        samples,
        trained_on,
        config.model_copy(update={"steps": 40}),
        lambda captions: torch.zeros(len(captions), 2, 4, dtype=torch.long),
        1000,
        micro_batch=4,
        rank=0,
        processes=1,
        start=0,
        device=torch.device("cpu"),
    )
    seen = {int(index) for step in steps for batch in step for index in batch.samples}
    assert not seen & set(indices(kept_out))
    assert len(seen) == len(samples) - 6


def test_training_takes_what_is_not_held_out(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(held_out=6, batch_size=4, steps=1)
    given = []
    load = data.load
    monkeypatch.setattr(
        data,
        "load",
        lambda found, buckets, *rest, **named: (given.append(buckets), load(found, buckets, *rest, **named))[1],
    )
    train(job, StopSignal())
    assert indices(given[0]) == indices(held_out.split(LatentSet(job.latents), job.config)[0])


def test_none_is_held_out_unless_asked_for_and_never_all(make_job: MakeJob, artifacts) -> None:
    samples = LatentSet(artifacts.latents)
    assert held_out.split(samples, make_job().config)[1] == {}
    with pytest.raises(KoalaError, match=r"distill\.held_out 37 leaves none of 37 samples to train on: lower it"):
        held_out.split(samples, make_job(held_out=37).config)


def test_bins_are_equal_or_a_few_step_teachers_timesteps(make_job: MakeJob) -> None:
    names, steps = zip(*held_out.bins(make_job().config, 1000), strict=True)
    assert names == ("t0-249", "t250-499", "t500-749", "t750-999")
    assert [step for steps_of_bin in steps for step in steps_of_bin] == list(range(1000))
    assert held_out.bins(make_job(timesteps=(249, 999)).config, 1000) == [("t249", (249,)), ("t999", (999,))]


@pytest.fixture(scope="module")
def measured(artifacts, recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that measured nine held-out samples at each of its eight steps."""
    config = recipe({"validate_every": 1}, held_out=9, batch_size=4)
    job: Job = artifacts.job(config, tmp_path_factory.mktemp("measured") / "state")
    Training(job).wait()
    return job


def test_the_released_weights_are_measured_on_every_held_out_sample(measured: Job) -> None:
    """Beside a mean worked out sample by sample, with the U-Net that the run left."""
    rows = held_out_of(losses(measured.state))
    assert list(rows) == list(range(1, 9))
    assert len({row["held_out/total"] for row in rows.values()}) == 8  # the student changes, the samples do not

    task = build_task(measured, load_teacher(measured, with_vae=False))
    unet = UNet2DConditionModel.from_pretrained(measured.state / "unet", use_safetensors=True)
    task.student.load_state_dict(unet.state_dict())
    samples = LatentSet(measured.latents)
    kept_out = held_out.split(samples, measured.config)[1]
    assert len(kept_out) == 2  # buckets
    expected: dict[str, list[float]] = {}
    for index, (number, (name, timesteps)) in itertools.product(
        indices(kept_out), enumerate(held_out.bins(measured.config, 1000))
    ):
        batch = held_out._batch(samples, np.array([index]), number, timesteps, measured.config, task.text.tokenize)
        assert int(batch.timesteps) in timesteps
        assert bool(batch.keep)
        with torch.no_grad():
            for term, value in task(batch).items():
                expected.setdefault(f"held_out/{term}/{name}", []).append(value.item())
                expected.setdefault(f"held_out/{term}", []).append(value.item())
    last = rows[8]
    assert {name for name in last if "/total" not in name} == set(expected)
    for name, values in expected.items():
        assert len(values) == (36 if name.count("/t") == name.count("/task") else 9), name
        assert last[name] == pytest.approx(np.mean(values), rel=1e-4), name
    terms = {name for name in last if not name.rpartition("/")[2].startswith("t") or name == "held_out/task"}
    assert last["held_out/total"] == pytest.approx(sum(last[name] for name in terms), rel=1e-4)


def test_measuring_leaves_training_as_it_was(measured: Job, make_job: MakeJob) -> None:
    rarely = make_job("rarely", held_out=9, batch_size=4, machine={"validate_every": 100})
    Training(rarely).wait()
    assert same(weights(measured.state), weights(rarely.state))
    assert list(held_out_of(losses(rarely.state))) == [8]
    assert held_out_of(losses(rarely.state))[8] == held_out_of(losses(measured.state))[8]


def test_measuring_leaves_the_training_of_a_sharded_student_as_it_was(make_job: MakeJob) -> None:
    """FSDP keeps what a forward pass without a gradient gathered: the next step would begin with the EMA's weights."""
    jobs = [
        make_job(f"every {interval}", held_out=2, timesteps=(499,), steps=3, machine={"validate_every": interval})
        for interval in (1, 100)
    ]
    for job in jobs:
        Training(job, 2, sharded=True).wait()
    often, rarely = (job.state for job in jobs)
    assert same(weights(often), weights(rarely))
    assert len(held_out_of(losses(often))) == 3


@pytest.mark.parametrize("sharded", [False, True])
def test_processes_share_the_samples(make_job: MakeJob, sharded: bool) -> None:
    """Three timesteps, each of an odd number of micro-batches: the last round has work for one process only."""
    changes = {
        "held_out": 9,
        "batch_size": 4,
        "steps": 2,
        "timesteps": (249, 499, 749),
        "machine": {"validate_every": 1},
    }
    one, two = make_job("one", **changes), make_job("two", **changes)
    for training in (Training(one), Training(two, 2, sharded)):
        training.wait()
    ours, theirs = held_out_of(losses(two.state)), held_out_of(losses(one.state))
    assert list(ours) == [1, 2]
    for step, values in ours.items():
        assert values == pytest.approx(theirs[step], rel=1e-3)


def test_compiled_layers_are_not_measured_with_shapes_of_their_own(make_job: MakeJob, monkeypatch) -> None:
    """The last micro-batch of a bucket is smaller: it must not be compiled for, and counts as it does without compiling."""
    job = make_job(held_out=9, batch_size=4)
    compiled = job.config.model_copy(
        update={"machine": job.config.machine.model_copy(update={"compile": get_args(Compiled)})}
    )
    values = []
    for config in (job.config, compiled):
        task = build_task(job, load_teacher(job, with_vae=False))
        calls: list[int] = []

        def count(graph: torch.fx.GraphModule, _: object, calls: list[int] = calls) -> Callable:
            calls.append(1)
            return graph.forward

        from koala.distill import hooks, trainer

        monkeypatch.setattr(
            trainer, "compile_modules", lambda *what, count=count: hooks.compile_modules(*what, backend=count)
        )
        accelerator = Accelerator(cpu=True)
        samples = LatentSet(job.latents)
        kept_out = held_out.split(samples, config)[1]
        trained = Trainer(task, config, accelerator)
        values.append(held_out.measure(trained, samples, kept_out, config, task.text.tokenize, 1000, accelerator))
        assert not calls
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_the_curves_show_them(measured: Job, tmp_path: Path) -> None:
    from PIL import Image

    from koala.distill import curves

    curves.write(measured.state, tmp_path)
    header = (tmp_path / "curves.csv").read_text().splitlines()[0]
    assert "held_out/task/t0-249" in header
    assert Image.open(tmp_path / "curves.png").height > Image.open(tmp_path / "curves.png").width
