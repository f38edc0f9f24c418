"""Training that was interrupted, or is shared by processes otherwise, ends as training that was not."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ranks import Training, alike, losses, same, weights

from koala.distill import checkpoint
from koala.distill.job import Job, checkpoints
from koala.distill.train import StopSignal, train
from koala.errors import KoalaError

GOLDEN = Path(__file__).with_name("golden.json")
MakeJob = Callable[..., Job]


def run(job: Job) -> None:
    """Train in this process."""
    train(job, StopSignal())


def resume(job: Job) -> None:
    """Train on from the checkpoint before the last."""
    shutil.rmtree(job.state / "unet")
    shutil.rmtree(checkpoints(job.state)[-1])
    run(job)


def test_a_run_that_was_killed_resumes_to_the_same_bits(make_job: MakeJob, uncut: Path) -> None:
    """SIGKILL at a step without a checkpoint: the steps since the last one are repeated, to the bit."""
    job = make_job()
    Training(job).kill_after(5)
    assert not (job.state / "unet").exists()
    Training(job).wait()
    assert same(weights(job.state), weights(uncut))
    assert losses(job.state) == losses(uncut)
    assert [row["step"] for row in losses(uncut)] == list(range(1, 9))


def test_two_processes_that_were_killed_resume_to_the_same_bits(make_job: MakeJob) -> None:
    cut, whole = make_job("cut"), make_job("whole")
    Training(cut, 2).kill_after(5)
    resumed, uncut = Training(cut, 2), Training(whole, 2)
    resumed.wait()
    uncut.wait()
    assert resumed.counts() == [2, 2]
    assert uncut.counts() == [2]
    assert same(weights(cut.state), weights(whole.state))
    assert losses(cut.state) == losses(whole.state)


@pytest.mark.parametrize(("first", "then"), [((2, True), (1, False)), ((1, False), (2, False))])
def test_another_number_of_processes_resumes(
    make_job: MakeJob, uncut: Path, first: tuple[int, bool], then: tuple[int, bool]
) -> None:
    """Sharded over two, then whole on one, and one, then two: the curve of training that was not interrupted."""
    job = make_job()
    Training(job, *first).kill_after(5)
    resumed = Training(job, *then)
    resumed.wait()
    assert resumed.counts() == [first[0], then[0]]
    alike(job.state, uncut)


def test_sigterm_in_the_middle_of_a_step_saves_and_exits(make_job: MakeJob) -> None:
    """Of 14 micro-batches a step, so that the signal falls into one: the step is left to the next run."""
    sizes = {"steps": 4, "batch_size": 28, "machine": {"micro_batch": 2, "checkpoint_every": 100}}
    cut, whole = make_job("cut", **sizes), make_job("whole", **sizes)
    training = Training(cut)
    training.wait_for(2)
    training.signal(signal.SIGTERM)
    assert training.statuses(10) == [128 + signal.SIGTERM]
    (saved,) = checkpoints(cut.state)
    assert saved.name in ("step-00000002", "step-00000003")
    assert not (cut.state / "unet").exists()
    Training(cut).wait()
    Training(whole).wait()
    assert same(weights(cut.state), weights(whole.state))


def test_sigterm_to_one_of_two_processes_stops_both_once_the_state_is_saved(make_job: MakeJob) -> None:
    """Ranks that left before rank 0 had written would have the launcher kill it in the middle."""
    job = make_job(steps=200, machine={"checkpoint_every": 1000})
    training = Training(job, 2, environment={"KOALA_TEST_SLOW_SAVE": "2"})
    training.wait_for(2)
    os.kill(training.ranks[1].pid or 0, signal.SIGTERM)
    training.ranks[1].join(30)
    assert checkpoints(job.state), "rank 1 left before rank 0 had saved"
    assert training.statuses() == [128 + signal.SIGTERM] * 2


def test_bad_steps_end_all_processes_once_the_state_is_saved(make_job: MakeJob) -> None:
    job = make_job(learning_rate=1e30, warmup=0, steps=50, machine={"max_bad_steps": 2, "checkpoint_every": 1000})
    training = Training(job, 2, environment={"KOALA_TEST_SLOW_SAVE": "2"})
    training.ranks[1].join(60)
    assert checkpoints(job.state), "rank 1 left before rank 0 had saved"
    assert training.statuses() == [2, 2]
    assert "2 steps in a row with a non-finite gradient" in (job.state / "complaint").read_text()


def test_a_kill_while_saving_leaves_the_checkpoints_before(make_job: MakeJob, uncut: Path) -> None:
    job = make_job()
    shutil.copytree(uncut, job.state, dirs_exist_ok=True)
    # As if killed while the last checkpoint was being written, before the U-Net was.
    last = checkpoints(job.state)[-1]
    last.rename(last.with_suffix(".partial"))
    (last.with_suffix(".partial") / "optimizer.safetensors").write_bytes(b"half")
    shutil.rmtree(job.state / "unet")
    Training(job).wait()
    assert same(weights(job.state), weights(uncut))


def test_a_checkpoint_is_never_replaced(make_job: MakeJob) -> None:
    """Stopped right after it was resumed, training has nothing new to save. A kill while it did could leave no checkpoint."""
    job, stop = make_job(machine={"keep_checkpoints": 1}), StopSignal()
    stop.received = True
    written = []
    for _ in range(2):
        with pytest.raises(SystemExit):
            train(job, stop)
        (saved,) = checkpoints(job.state)
        written.append({file.name: file.stat().st_ino for file in saved.iterdir()})
    assert written[0] == written[1]


def test_channels_last_resumes_to_the_same_bits(make_job: MakeJob) -> None:
    """Optimizer states take the strides of their weights: fused AdamW pairs them by place in memory."""
    cut, whole = make_job("cut", machine={"channels_last": True}), make_job("whole", machine={"channels_last": True})
    run(whole)
    run(cut)
    resume(cut)
    assert same(weights(cut.state), weights(whole.state))
    assert losses(cut.state) == losses(whole.state)


def test_restored_states_have_the_strides_of_their_weights(make_job: MakeJob) -> None:
    from accelerate import Accelerator

    from koala.distill.train import build_task, load_teacher
    from koala.distill.trainer import Trainer

    job = make_job(steps=2, machine={"channels_last": True})
    run(job)
    trainer = Trainer(build_task(job, load_teacher(job, with_vae=False)), job.config, Accelerator(cpu=True))
    checkpoint.load(checkpoints(job.state)[-1], trainer.student, trainer.optimizer, trainer.ema)
    convolution = trainer.student.down_blocks[1].resnets[0].conv1.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert not convolution.is_contiguous()
    for parameter in trainer.student.parameters():
        states = trainer.optimizer.state[parameter]
        assert states["exp_avg"].stride() == states["exp_avg_sq"].stride() == parameter.stride()


def test_more_steps_of_a_constant_rate_continue_a_finished_run(make_job: MakeJob) -> None:
    whole = make_job("whole", schedule="constant")
    run(whole)
    extended = make_job("extended", schedule="constant", steps=4)
    run(extended)
    shutil.rmtree(extended.state / "unet")
    run(make_job("extended", schedule="constant"))
    assert same(weights(extended.state), weights(whole.state))
    assert losses(extended.state) == losses(whole.state)
    with pytest.raises(KoalaError, match=r"a run of 8 steps already: set distill.steps to 8 or more"):
        run(make_job("extended", schedule="constant", steps=6))


def test_deterministic_kernels_are_asked_for_before_training(make_job: MakeJob) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        run(make_job(steps=1, machine={"deterministic": True}))
        assert torch.are_deterministic_algorithms_enabled()
        # Where torch only warns, flash attention's backward keeps its own order.
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_only_the_last_checkpoints_are_kept(uncut: Path) -> None:
    assert [path.name for path in checkpoints(uncut)] == ["step-00000006", "step-00000008"]


def test_two_processes_equal_one(make_job: MakeJob, uncut: Path) -> None:
    """The same global batch gives the same curve within fp32 rounding, whoever computes it. Sharded: in test_launch.py."""
    job = make_job()
    training = Training(job, 2)
    training.wait()
    assert training.counts() == [2]
    alike(job.state, uncut)


def test_8bit_states_resume_to_the_same_bits(make_job: MakeJob) -> None:
    pytest.importorskip("bitsandbytes")
    for channels_last in (False, True):
        options = {"optimizer": "adamw-8bit", "machine": {"channels_last": channels_last}}
        cut, whole = make_job(f"cut-{channels_last}", **options), make_job(f"whole-{channels_last}", **options)
        run(whole)
        run(cut)
        resume(cut)
        assert same(weights(cut.state), weights(whole.state))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_8bit_states_need_their_library(make_job: MakeJob) -> None:
    with pytest.raises(KoalaError, match="needs bitsandbytes: `pip install bitsandbytes`"):
        run(make_job(optimizer="adamw-8bit"))


def test_the_curve_is_where_it_was(make_job: MakeJob) -> None:
    """Golden: a change of the loop, the losses, the data's order or the noise that moves the curve shows here.

    Where it is meant to move, write golden.json anew: run this test with KOALA_GOLDEN=write.
    """
    job = make_job(batch_size=4, min_snr_gamma=5.0, warmup=2, ema_decay=0.9)
    run(job)
    rows = losses(job.state)
    if os.environ.get("KOALA_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(rows) == len(golden) == 8
    for row, wanted in zip(rows, golden, strict=True):
        assert row == pytest.approx(wanted, rel=2e-4)
