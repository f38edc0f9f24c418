"""The benchmarks as a user runs them, at the size of tests, and the parts that their figures rest on."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from koala.bench import infer, infer_worker, runner, train, train_worker
from koala.bench.device import Stopwatch, matmul_peak
from koala.bench.models import random_pipeline, random_sdxl
from koala.bench.plain import PlainTrainer, load
from koala.distill.config import DistillConfig, DistillMachine
from koala.errors import KoalaError
from koala.params import load as load_params
from koala.teacher.shape import SDXL_TEXT_PARAMETERS
from koala.unet.blocks import keep
from koala.unet.cost import unet_cost
from koala.unet.reference import SDXL
from koala.unet.student import build_student

CPU = torch.device("cpu")
STUDENT = "koala-700m"


def koala(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [Path(sys.executable).with_name("koala"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.usefixtures("forked")
def test_train_measures_both_recipes_and_says_where_time_went(workspace: Path) -> None:
    said = koala(
        "bench",
        "train",
        STUDENT,
        "--profile",
        "smoke",
        "--machine",
        "cpu",
        "--steps",
        "2",
        "--rounds",
        "1",
        "--out",
        "a/raw.json",
        "--plot",
        "a/plot.png",
    )
    assert said.returncode == 0, said.stderr
    found = json.loads(Path("a/raw.json").read_text())
    plain, ours = found["rows"]
    assert (plain["name"], ours["name"]) == ("plain", "koala")
    for row in (plain, ours):
        assert row["images_per_second"] == pytest.approx(2 * row["batch_size"] / sum(row["step_seconds"]))
        parts = row["seconds_per_image"]
        assert set(parts) == {"data", "encoders", "teacher", "student", "backward", "optimizer"}
        # All of a step belongs to a part.
        assert sum(parts.values()) == pytest.approx(1 / row["images_per_second"], rel=0.1)
        assert row["peak_bytes"] > 2**20
    assert plain["flops_per_image"] == ours["flops_per_image"] == flops_of_a_step()
    assert f"{ours['images_per_second'] / plain['images_per_second']:.2f} x" in said.stdout
    assert found["where"]["torch"] == torch.__version__
    assert found["settings"]["profile"] == "smoke"
    assert Path("a/plot.png").stat().st_size > 1000


def flops_of_a_step() -> int:
    params = load_params()
    models = random_pipeline(params.recipe.teacher, CPU, torch.float32)
    student = build_student(models.unet, params.student(STUDENT).unet)
    return unet_cost(models.unet.config, 8).flops + 3 * unet_cost(student.config, 8).flops


def test_the_floor_at_sdxl_size_is_the_published_one(workspace: Path) -> None:
    """14.87 TFLOP an image for KOALA-700M at 1024 px, 17.06 for KOALA-1B."""
    from koala.unet.student import student_config

    params = load_params(profile="sdxl")
    for name, floor in ((STUDENT, 14.87), ("koala-1b", 17.06)):
        student = student_config(SDXL, keep(SDXL, params.student(name).unet))
        flops = unet_cost(SDXL, 128).flops + 3 * unet_cost(student, 128).flops
        assert flops / 1e12 == pytest.approx(floor, abs=0.01)


def test_ablate_turns_one_setting_at_a_time(
    workspace: Path, change_params: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    asked = []

    def run(module: str, spec: dict) -> runner.Figures:
        asked.append((spec["name"], spec["changes"]))
        if spec["name"] == "plain" and spec["changes"]["micro_batch"] > 2:
            return runner.OUT_OF_MEMORY
        return figures(spec["changes"]["micro_batch"])

    monkeypatch.setattr(runner, "run", run)
    train.bench(STUDENT, "smoke", "cpu", 4, 2, 1, ablate=True, out=None, plot=None)
    assert asked == [
        ("plain", {"batch_size": 4, "micro_batch": 4}),
        ("plain", {"batch_size": 4, "micro_batch": 2}),  # out of memory with four
        ("koala", {"batch_size": 4, "micro_batch": 4}),
        (
            "koala, compile BasicTransformerBlock",
            {"compile": ("BasicTransformerBlock",), "batch_size": 4, "micro_batch": 4},
        ),
        ("koala, channels_last true", {"channels_last": True, "batch_size": 4, "micro_batch": 4}),
        ("koala, gradient_checkpointing true", {"gradient_checkpointing": True, "batch_size": 4, "micro_batch": 4}),
        ("koala, deterministic true", {"deterministic": True, "batch_size": 4, "micro_batch": 4}),
    ]
    printed = capsys.readouterr().out
    assert "| plain " in printed
    assert "2.00 x" in printed
    change_params(distill={"teacher_dtype": "bfloat16"})
    train.bench(STUDENT, "smoke", "cpu", None, 2, 1, ablate=True, out=None, plot=None)
    assert asked[-1] == ("koala, teacher_float8 true", {"teacher_float8": True, "batch_size": 8, "micro_batch": 4})
    assert "4.0%" in printed  # four times 10^9 of 10^11 a second


def figures(micro_batch: int) -> runner.Figures:
    return {
        "micro_batch": micro_batch,
        "buckets": [[32, 32]],
        "images_per_second": float(micro_batch),
        "flops_per_image": 10**9,
        "matmul_flops_per_second": 1e11,
        "peak_bytes": None,
        "seconds_per_image": {"teacher": 0.1},
        "precision": "no",
        "where": {"device": "a machine"},
    }


def test_infer_measures_a_step_a_generation_and_memory(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Narrow U-Nets of SDXL's depths in this process: at full width a test would take minutes."""
    narrow = {**SDXL, "block_out_channels": (32, 64, 64), "attention_head_dim": (1, 2, 2)}
    monkeypatch.setattr(infer, "SDXL", narrow)
    monkeypatch.setattr(runner, "run", lambda _, spec: infer_worker.measure(**spec))
    monkeypatch.setattr(
        "koala.bench.models._CLIP_L", {"num_hidden_layers": 1, "hidden_size": 768, "num_attention_heads": 12}
    )
    monkeypatch.setattr(
        "koala.bench.models._CLIP_G",
        {"num_hidden_layers": 1, "hidden_size": 1280, "num_attention_heads": 20, "projection_dim": 1280},
    )
    batches = []

    def count(module: nn.Module, inputs: tuple, _output: object) -> None:
        if isinstance(module, UNet2DConditionModel):
            batches.append(len(inputs[0]))

    counting = register_module_forward_hook(count)
    infer.bench(["sdxl", STUDENT], 64, 2, None, False, Path("raw.json"), Path("plot.png"))
    counting.remove()
    # For each U-Net a step four times, the first as a warm-up, a generation of one step, and one of two; all with guidance.
    assert batches == [2] * 2 * (4 + 1 + 2)
    found = json.loads(Path("raw.json").read_text())
    teacher, student = found["rows"]
    assert student["parameters"] < teacher["parameters"]
    assert min(row[part] for row in found["rows"] for part in ("step_seconds", "generation_seconds", "peak_bytes")) > 0
    printed = capsys.readouterr().out
    assert f"{teacher['step_seconds'] / student['step_seconds']:.2f} x" in printed
    assert Path("plot.png").stat().st_size > 1000


@pytest.mark.usefixtures("forked")
def test_what_cannot_be_measured_is_one_line(workspace: Path) -> None:
    for arguments, line in {
        ("train", "koala-2b"): "no student 'koala-2b'",
        ("train", "--profile", "nowhere"): "names the profile 'nowhere'",
        ("train", "--profile", "sdxl"): "needs a CUDA GPU",
        ("infer", "koala-2b"): "no U-Net 'koala-2b' to measure: choose from sdxl,",
        ("infer", "sdxl", "vegas"): "no U-Net 'vegas' to measure",
        ("infer", "--dtype", "half"): "--dtype half: choose one of float32, float16, bfloat16",
        ("infer", "--size", "100"): "--size 100: must be a multiple of 32 pixels",
    }.items():
        said = koala("bench", *arguments)
        assert said.returncode == 2, said.stderr
        assert line in said.stderr
        assert len(said.stderr.splitlines()) == 1


@pytest.mark.usefixtures("forked")
def test_a_measurement_that_fails_says_so(workspace: Path, capfd) -> None:
    with pytest.raises(KoalaError, match="no student 'x'"):
        runner.run(
            "train_worker",
            {"name": "koala", "student": "x", "profile": "smoke", "machine": "cpu", "steps": 1, "changes": {}},
        )
    assert runner.run("train_worker", {"name": "koala"}) == {"failed": 1}
    assert "TypeError" in capfd.readouterr().err


def test_what_failed_is_a_row_and_the_others_stand(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def run(module: str, spec: dict) -> runner.Figures:
        return {"failed": 1} if spec["name"] == "plain" else figures(4)

    monkeypatch.setattr(runner, "run", run)
    train.bench(STUDENT, "smoke", "cpu", None, 2, 2, ablate=False, out=None, plot=None)
    printed = capsys.readouterr().out
    assert "| plain  | failed, status 1 |" in printed
    assert "1.00 x" in printed
    monkeypatch.setattr(runner, "run", lambda *_: runner.OUT_OF_MEMORY)
    with pytest.raises(KoalaError, match="nothing could be measured"):
        train.bench(STUDENT, "smoke", "cpu", None, 2, 1, ablate=False, out=None, plot=None)


def test_a_smaller_micro_batch_still_divides_the_batch(workspace: Path, change_params, monkeypatch) -> None:
    """What does not divide would run fewer images than it is credited with."""
    change_params(distill={"batch_size": 18}, machine={"micro_batch": 9})
    tried = []

    def run(module: str, spec: dict) -> runner.Figures:
        tried.append(spec["changes"]["micro_batch"])
        return runner.OUT_OF_MEMORY if tried[-1] > 3 else figures(tried[-1])

    monkeypatch.setattr(runner, "run", run)
    train.bench(STUDENT, "smoke", "cpu", None, 2, 1, ablate=False, out=None, plot=None)
    assert tried == [9, 6, 3] * 2


def test_the_median_run_counts() -> None:
    runs = [{"speed": 3}, runner.OUT_OF_MEMORY, {"speed": 1}, {"speed": 2}]
    assert runner.median(runs, "speed") == {"speed": 2}
    assert runner.median(runs[:3], "speed") == {"speed": 1}
    assert runner.median([runner.OUT_OF_MEMORY], "speed") == runner.OUT_OF_MEMORY


def test_a_stopwatch_gives_time_to_names() -> None:
    class Slow(nn.Module):
        def forward(self) -> None:
            time.sleep(0.05)

    watch, module = Stopwatch(), Slow()
    watch.around(module, "before", "slow")
    begin = time.perf_counter()
    for _ in range(2):
        time.sleep(0.1)  # belongs to nothing
        watch.start()
        time.sleep(0.02)
        module()
        watch.mark("after")
    whole = time.perf_counter() - begin
    found = watch.seconds()
    assert list(found) == ["before", "slow", "after"]
    assert found["slow"] >= 0.1
    assert found["before"] >= 0.04 > found["after"]
    assert sum(found.values()) <= whole - 0.2


def test_peak_memory_is_what_was_held_at_once() -> None:
    """64 MiB that passed before the restart do not count; 16 that stay and 32 that passed after it do."""
    code = """
import torch
from koala.bench.device import PeakMemory
torch.ones(2**20).sum()  # what torch takes at its first sum
memory = PeakMemory()
stays = torch.ones(2**22)
torch.ones(2**24)
memory.restart()
torch.ones(2**23)
print(memory.bytes())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    if said == "None":
        pytest.skip("this system does not tell a process its peak")
    assert int(said) / 2**20 == pytest.approx(48, abs=4)


def test_the_peak_is_a_rate() -> None:
    assert 1e8 < matmul_peak(torch.float32) < 1e15


def test_sdxls_other_parts_have_its_sizes() -> None:
    """Against the counts of the published text encoders and VAE."""
    models = random_sdxl({**SDXL, "block_out_channels": (32, 64, 64)}, torch.device("meta"), torch.float16)
    text = sum(encoder.num_parameters() for encoder in (models.text_encoder, models.text_encoder_2))
    assert text == SDXL_TEXT_PARAMETERS
    assert models.vae.num_parameters() == 83_653_863
    assert {part.dtype for part in (models.unet, models.vae, models.text_encoder_2)} == {torch.float16}


def test_a_step_whose_gradient_is_not_finite_is_no_measurement(workspace: Path, change_params) -> None:
    """It is faster than one that trains."""
    change_params(distill={"learning_rate": 1e30, "warmup": 0})
    with pytest.raises(KoalaError, match=r"koala: the gradient of step \d is not finite"):
        train_worker.measure("koala", STUDENT, "smoke", "cpu", steps=2, changes={})


def test_ours_is_measured_over_two_buckets(workspace: Path, change_params, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second bucket that would compile anew must not pass unseen."""
    change_params(encode={"buckets": [[32, 32], [32, 64], [64, 32]]})
    seen = set()
    original = train_worker.Trainer.backward

    def backward(self, batch, last):
        seen.add(tuple(batch.latents.shape[-2:]))
        return original(self, batch, last)

    monkeypatch.setattr(train_worker.Trainer, "backward", backward)
    figures = train_worker.measure("koala", STUDENT, "smoke", "cpu", steps=1, changes={})
    assert seen == {(8, 8), (8, 16)}
    assert figures["buckets"] == [[32, 32], [32, 64]]
    assert len(figures["warm_up_seconds"]) == 4


def test_the_plain_recipe_learns(workspace: Path) -> None:
    """A baseline that did not train would be none: its weights move, and its EMA follows."""
    params = load_params()
    machine = DistillMachine(micro_batch=2)
    config = DistillConfig(steps=2, batch_size=4, learning_rate=1e-3, ema_decay=0.9, machine=machine)
    models = random_pipeline(params.recipe.teacher, CPU, torch.float32)
    rule = params.student(STUDENT).unet
    student = build_student(models.unet, rule)
    blocks = [stage.path for stage in keep(models.unet.config, rule)]
    trainer = PlainTrainer(models, student, blocks, config, CPU, torch.float32)
    before = [parameter.clone() for parameter in student.parameters()]
    steps = 0
    for micro_batches in load(models.text_encoder.config, 32, config):
        for index, batch in enumerate(micro_batches, start=1):
            assert batch[0].shape == (2, 3, 32, 32)
            trainer.backward(batch, last=index == trainer.accumulate)
        assert index == trainer.accumulate == 2
        gradients = [parameter.grad for parameter in student.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert trainer.update(1e-3) > 0
        steps += 1
    assert steps == 2
    assert all(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True) if a.numel() > 64)
    assert all(
        parameter.grad is None
        for module in (trainer.teacher, trainer.text, trainer.vae)
        for parameter in module.parameters()
    )


@pytest.mark.usefixtures("forked")
def test_the_search_for_duplicates_is_measured_at_each_size(workspace: Path) -> None:
    done = koala("bench", "duplicates", "--pictures", "400", "--pictures", "2000")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["400", "2,000"]
    assert all(float(row[2]) < 5 and float(row[3]) == float(row[4]) == 1 and 0.05 < float(row[5]) < 2 for row in rows)


def test_reading_is_measured_beside_webdataset(tmp_path: Path) -> None:
    """All readers give the same samples, each once: ours all whole batches, the peers the rest too."""
    from koala.bench import read

    read._prepare(tmp_path, 200)
    for name, count in (("koala", 192), ("webdataset", 200)):
        batches = list(read._READERS[name](tmp_path, 2))
        captions = [caption for _, captions in batches for caption in captions]
        assert len(captions) == len(set(captions)) == count
        assert all(latents.shape[1:] == (4, 128, 128) and latents.dtype == torch.float16 for latents, _ in batches)
    assert read._decode(tmp_path, 4, 1)["samples_per_second"] > 0


def test_captions_are_not_loaded(tmp_path: Path) -> None:
    """50 MB of them, and their order, in a few."""
    from koala.bench import read

    assert read._memory(tmp_path / "many", 100_000)["private_bytes"] < 20e6
