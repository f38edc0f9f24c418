"""Starts the training processes of one machine, follows what they write, and stops them when told to."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from koala.distill import launch_settings
from koala.distill.config import DistillConfig
from koala.distill.job import COMPLAINT, UNET
from koala.errors import KoalaError

JOB = "KOALA_JOB"
"""Environment variable of every training process: the job's file. By it they are found when they must stop."""
_SECONDS_TO_SAVE = 20
_POLL_SECONDS = 0.5


def launch(config: DistillConfig, job: Path, machine_rank: int = 0, follow: Callable[[], None] = lambda: None) -> None:
    """Run this machine's training processes to their end, and pass SIGTERM and Ctrl-C on to them.

    `follow` is called every half second, and once at the end. Raises KoalaError for what the user must fix, and SystemExit
    with the training's own status where that stopped.
    """
    settings = launch_settings.check(config)
    if machine_rank >= settings.machines:
        raise KoalaError(
            f"{config.machine.launch} has {settings.machines} machines, ranks 0 to {settings.machines - 1}: "
            f"there is no rank {machine_rank}"
        )
    state = job.parent
    if machine_rank == 0:
        (state / COMPLAINT).unlink(missing_ok=True)
    process = subprocess.Popen(_command(config, settings, job, machine_rank), env={**os.environ, JOB: str(job)})
    with _passing_signals_on(job):
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
                follow()
        finally:
            psutil.wait_procs(_ranks(job), timeout=_SECONDS_TO_SAVE)
        follow()
    if (state / COMPLAINT).is_file():
        raise KoalaError((state / COMPLAINT).read_text())
    # The stage, on the machine of rank 0, may have taken the U-Net away before another machine looks.
    trained = (state / UNET).is_dir() if machine_rank == 0 else process.returncode == 0
    if not trained:
        # The negative number of a signal, as a shell gives it.
        sys.exit(128 - process.returncode if process.returncode < 0 else process.returncode or 1)


def _command(
    config: DistillConfig, settings: launch_settings.LaunchSettings, job: Path, machine_rank: int
) -> list[str]:
    # The processes of one machine share its cores; accelerate would do the same, and warn of it.
    threads = os.environ.get("OMP_NUM_THREADS") or max(
        (os.cpu_count() or 1) * settings.machines // settings.processes, 1
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config.machine.launch, "--quiet"]
    command += ["--num_cpu_threads_per_process", str(threads)]
    if settings.machines > 1:
        command += ["--machine_rank", str(machine_rank)]
    else:
        command += ["--main_process_port", "0"]  # a free one: two trainings on one machine do not meet
    return [*command, "-m", "koala.distill.train", str(job)]


@contextmanager
def _passing_signals_on(job: Path) -> Iterator[None]:
    """Pass SIGTERM and Ctrl-C on to the ranks: accelerate's launcher does not, and may be gone before them."""

    def stop(*_: object) -> None:
        for rank in _ranks(job):
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.terminate()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ranks(job: Path) -> list[psutil.Process]:
    """Return the training processes of a job, by their environment; the launcher is among them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(JOB) == str(job) and process.pid != os.getpid():
                found.append(process)
    return found
