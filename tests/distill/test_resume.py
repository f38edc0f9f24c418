"""Training that was cut and goes on ends with the bits of training that was not."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from koala.config import load
from koala.distill import checkpoint, history
from koala.distill.loop import train

STUDENT = "koala-700m"


def weights(work: Path) -> dict[str, torch.Tensor]:
    return load_file(work / "unet" / "diffusion_pytorch_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def recipe(distillable, change_params) -> None:
    change_params(
        distill={
            "steps": 8,
            "batch_size": 4,
            "micro_batch": 2,
            "checkpoint_every": 2,
            "log_every": 1,
            "validate_every": 100,
        }
    )


def start(work: Path, config: str = "infra/accelerate/cpu.yaml") -> subprocess.Popen:
    work.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "--main_process_port",
        "0",
        "--quiet",
    ]
    environment = {**os.environ, "KOALA_WORK": str(work), "KOALA_RUN_ID": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "-m", "koala.distill.loop", STUDENT], env=environment, start_new_session=True)


def kill_after(process: subprocess.Popen, work: Path, step: int, how: int) -> None:
    """Send a signal to the process group as soon as the history shows a step."""
    for _ in range(1200):
        rows = history.read(work)
        if rows and rows[-1]["step"] >= step:
            break
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, how)
    process.wait(30)


def test_a_run_that_was_killed_goes_on_to_the_same_bits(recipe, tmp_path, change_params) -> None:
    """SIGKILL at a step with no checkpoint of its own: the steps since the last one are done again, to the bit."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = start(cut)
    kill_after(process, cut, 5, signal.SIGKILL)
    assert not (cut / "unet").exists()
    assert start(cut).wait(120) == 0
    assert start(whole).wait(120) == 0
    assert same(weights(cut), weights(whole))
    assert history.read(cut) == history.read(whole)
    assert [row["step"] for row in history.read(whole)] == list(range(1, 9))


def test_sigterm_saves_and_leaves(recipe, tmp_path, change_params) -> None:
    change_params(distill={"steps": 5000, "checkpoint_every": 100_000})
    work = tmp_path / "work"
    process = start(work)
    kill_after(process, work, 3, signal.SIGTERM)  # the launcher ends at once, what it started when it has saved
    deadline = time.monotonic() + 10
    while not checkpoint.checkpoints(work):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (saved,) = checkpoint.checkpoints(work)
    assert int(saved.name.removeprefix("step-")) == history.read(work)[-1]["step"] >= 3


def test_a_kill_while_saving_leaves_the_checkpoints_before(recipe, tmp_path) -> None:
    params = load()
    work, whole = tmp_path / "work", tmp_path / "whole"
    for folder in (work, whole):
        folder.mkdir()
        train(params, STUDENT, folder, None)
    # As if killed while the last checkpoint was being written, before the U-Net was.
    last = checkpoint.checkpoints(work)[-1]
    last.rename(last.with_suffix(".partial"))
    (last.with_suffix(".partial") / "optimizer.safetensors").write_bytes(b"half")
    shutil.rmtree(work / "unet")
    train(params, STUDENT, work, None)
    assert same(weights(work), weights(whole))


def test_only_the_last_checkpoints_are_kept(recipe, tmp_path) -> None:
    tmp_path.joinpath("work").mkdir()
    train(load(), STUDENT, tmp_path / "work", None)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "work")] == ["step-00000006", "step-00000008"]


@pytest.mark.timeout(300)
def test_two_processes_equal_one(recipe, tmp_path, change_params) -> None:
    """The same global batch gives the same curve within fp32 rounding, whoever computes it."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert start(one).wait(120) == 0
    assert start(two, "infra/accelerate/cpu-two.yaml").wait(200) == 0
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-3, atol=2e-5)
    norms = [[row["gradient_norm"] for row in history.read(work)] for work in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
