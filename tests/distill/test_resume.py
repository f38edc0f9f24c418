"""Training that was cut, or is shared by processes otherwise, ends as training that was not."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from koala.config import load
from koala.distill import checkpoint, history
from koala.distill.loop import train
from koala.errors import KoalaError

STUDENT = "koala-700m"
ONE, TWO, SHARDED = (f"infra/accelerate/{name}.yaml" for name in ("cpu", "cpu-two", "fsdp2-cpu"))
GOLDEN = Path(__file__).with_name("golden.json")


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


def alike(a: Path, b: Path) -> None:
    """The same curve and weights, but for fp32 rounding."""
    for name, tensor in weights(b).items():
        torch.testing.assert_close(weights(a)[name], tensor, rtol=1e-3, atol=1e-4)  # a fifth of one step
    for ours, theirs in zip(history.read(a), history.read(b), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def start(work: Path, config: str = ONE, *options: str) -> subprocess.Popen:
    work.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        *(options or ("--main_process_port", "0")),
        "--quiet",
    ]
    environment = {**os.environ, "KOALA_WORK": str(work), "KOALA_RUN_ID": "", "OMP_NUM_THREADS": "1"}
    with (work / "said").open("a") as said:
        command += ["-m", "koala.distill.loop", STUDENT]
        return subprocess.Popen(command, env=environment, start_new_session=True, stderr=said)


def processes(work: Path) -> list[int]:
    """How many took part in each run of the folder, as they said."""
    return [int(count) for count in re.findall(r"distill: (\d+) processes", (work / "said").read_text())]


def kill_after(process: subprocess.Popen, work: Path, step: int, how: int, within: float = 30) -> None:
    """Send a signal to the launcher and all that it started as soon as the history shows a step."""
    for _ in range(1200):
        rows = history.read(work)
        if rows and rows[-1]["step"] >= step:
            break
        assert process.poll() is None
        time.sleep(0.05)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(how)
    process.wait(within)
    _, alive = psutil.wait_procs(family, timeout=within)
    assert not alive


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


@pytest.mark.timeout(400)
def test_two_processes_that_were_killed_go_on_to_the_same_bits(recipe, tmp_path) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    kill_after(start(cut, TWO), cut, 5, signal.SIGKILL)
    assert start(cut, TWO).wait(120) == 0
    assert start(whole, TWO).wait(120) == 0
    assert processes(cut) == [2, 2] and processes(whole) == [2]
    assert same(weights(cut), weights(whole))
    assert history.read(cut) == history.read(whole)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("first", "then"), [(SHARDED, ONE), (ONE, TWO)])
def test_another_number_of_processes_goes_on(recipe, tmp_path, first: str, then: str) -> None:
    """Sharded over two, then whole on one, and the other way round: the curve of training that was not cut."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    kill_after(start(cut, first), cut, 5, signal.SIGKILL)
    assert start(cut, then).wait(120) == 0
    assert start(whole).wait(120) == 0
    assert processes(cut) == [1 if first == ONE else 2, 1 if then == ONE else 2]
    alike(cut, whole)


def test_sigterm_in_the_middle_of_a_step_saves_and_leaves_within_ten_seconds(recipe, tmp_path, change_params) -> None:
    """Of 14 micro-batches a step, so that the signal falls into one: the step is left, and done again by the next run."""
    change_params(distill={"steps": 4, "batch_size": 28, "micro_batch": 2, "checkpoint_every": 100})
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = start(cut)
    kill_after(process, cut, 2, signal.SIGTERM, within=10)
    (saved,) = checkpoint.checkpoints(cut)
    assert saved.name in ("step-00000002", "step-00000003")
    assert not (cut / "unet").exists()
    assert start(cut).wait(120) == 0
    assert start(whole).wait(120) == 0
    assert same(weights(cut), weights(whole))


def test_a_checkpoint_of_another_configuration_is_refused_with_the_difference(recipe, tmp_path, change_params) -> None:
    work = tmp_path / "work"
    work.mkdir()
    train(load(), STUDENT, work, None)
    shutil.rmtree(work / "unet")
    change_params(
        distill={"learning_rate": 1.0e-4, "micro_batch": 4, "checkpoint_every": 3}
    )  # the last two are no matter
    with pytest.raises(KoalaError, match=r"distill\.learning_rate 0\.0005 \(now 0\.0001\): restore"):
        train(load(), STUDENT, work, None)
    assert len(checkpoint.checkpoints(work)) == 2


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


def test_deterministic_kernels_are_asked_for_before_training(recipe, tmp_path, change_params) -> None:
    change_params(distill={"deterministic": True, "steps": 1})
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        train(load(), STUDENT, tmp_path, None)
        assert torch.are_deterministic_algorithms_enabled()
        # Where torch only warns, flash attention's backward keeps its own order.
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_only_the_last_checkpoints_are_kept(recipe, tmp_path) -> None:
    tmp_path.joinpath("work").mkdir()
    train(load(), STUDENT, tmp_path / "work", None)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "work")] == ["step-00000006", "step-00000008"]


@pytest.mark.timeout(400)
def test_two_processes_equal_one(recipe, tmp_path) -> None:
    """The same global batch gives the same curve within fp32 rounding, whoever computes it, sharded or not."""
    one, two, sharded = tmp_path / "one", tmp_path / "two", tmp_path / "sharded"
    for work, config in ((one, ONE), (two, TWO), (sharded, SHARDED)):
        assert start(work, config).wait(200) == 0
    assert processes(one) == [1] and processes(two) == [2] and processes(sharded) == [2]
    alike(two, one)
    alike(sharded, one)


@pytest.mark.timeout(300)
def test_two_machines_equal_one_process(recipe, tmp_path) -> None:
    """Two launchers that meet over loopback, as on two machines with a shared disk."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert start(one).wait(120) == 0
    machines = [start(two, "infra/accelerate/two-nodes-cpu.yaml", "--machine_rank", rank) for rank in "01"]
    assert [machine.wait(200) for machine in machines] == [0, 0]
    assert processes(two) == [2]
    alike(two, one)


def test_moments_of_eight_bits_go_on_to_the_same_bits(recipe, tmp_path, change_params) -> None:
    pytest.importorskip("bitsandbytes")
    change_params(distill={"optimizer": "adamw-8bit"})
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for work in (cut, whole):
        work.mkdir()
        train(load(), STUDENT, work, None)
    shutil.rmtree(cut / "unet")
    shutil.rmtree(checkpoint.checkpoints(cut)[-1])
    train(load(), STUDENT, cut, None)
    assert same(weights(cut), weights(whole))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_moments_of_eight_bits_need_their_library(recipe, tmp_path, change_params) -> None:
    change_params(distill={"optimizer": "adamw-8bit"})
    with pytest.raises(KoalaError, match="needs bitsandbytes: `pip install bitsandbytes`"):
        train(load(), STUDENT, tmp_path, None)


def test_the_curve_is_where_it_was(recipe, tmp_path, change_params) -> None:
    """Golden: a change of the loop, the losses, the data's order or the noise that moves the curve shows here.

    Where it is meant to move, write golden.json anew: run this test with KOALA_GOLDEN=write.
    """
    change_params(distill={"ema_decay": 0.9, "min_snr_gamma": 5.0, "warmup": 2})
    train(load(), STUDENT, tmp_path, None)
    rows = history.read(tmp_path)
    if os.environ.get("KOALA_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(rows) == len(golden) == 8
    for row, wanted in zip(rows, golden, strict=True):
        assert row == pytest.approx(wanted, rel=2e-4)
