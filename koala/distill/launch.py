"""The stage `distill`: starts the training processes, and makes a pipeline folder of what they leave."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import yaml

from koala.console import say
from koala.distill.history import write_curves
from koala.errors import KoalaError
from koala.provenance import data_hash, git_commit
from koala.tracking import hash_tags
from koala.work import finish, resume_folder

if TYPE_CHECKING:
    from koala.config import Params
    from koala.tracking import StageRun

_SECONDS_TO_SAVE = 20


def work_folder(params: "Params", student: str) -> Path:
    """Where this student's training keeps its state, as long as neither its inputs nor its parameters change."""
    return resume_folder(
        f"distill/{student}",
        learnt=params.distill.learnt(),
        inputs={name: data_hash(folder) for name, folder in _inputs(params, student).items()},
    )


def _inputs(params: "Params", student: str) -> dict[str, Path]:
    return {
        "encode": params.need("encode"),
        "teacher": params.need("teacher"),
        "student": params.need("student", student),
    }


def run(params: "Params", run: "StageRun", student: str) -> None:
    """Distil, and put the trained pipeline, its provenance and its curves at `params.out("distill", student)`.

    Raises KoalaError where the launch configuration is missing or asks for devices that are not there, and SystemExit with
    the training's own status where that stopped.
    """
    work = work_folder(params, student)
    run.tags(hash_tags(**_inputs(params, student)))
    if not (work / "unet").is_dir():
        _tell_of_others(work, params)
        _launch(params, student, work, run.id)

    pipeline = work / "pipeline"
    shutil.rmtree(pipeline, ignore_errors=True)
    shutil.copytree(params.need("student", student), pipeline, ignore=shutil.ignore_patterns("unet"))
    shutil.copytree(work / "unet", pipeline / "unet")
    write_curves(work, pipeline)
    provenance = {
        "student": student,
        "profile": params.profile,
        "commit": git_commit(),
        "run_id": run.id,
        "rule": params.student(student).model_dump(mode="json"),
        "distill": params.distill.model_dump(mode="json"),
        "data_hash": {name: data_hash(folder) for name, folder in _inputs(params, student).items()},
    }
    (pipeline / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    run.artifact(pipeline / "provenance.json")
    run.artifact(pipeline / "curves.png")

    finish(pipeline, params.out("distill", student))
    shutil.rmtree(work)


def join(params: "Params", student: str, machine_rank: int) -> None:
    """Run this machine's part of a training that another machine, of rank 0, runs as its stage.

    The folder is on a disk that the machines share. Raises as `run` does.
    """
    _launch(params, student, work_folder(params, student), "", machine_rank)


def _launch(params: "Params", student: str, work: Path, run_id: str, machine_rank: int = 0) -> None:
    """Run the training processes of this machine to their end, and pass SIGTERM and Ctrl-C on to them."""
    from koala.distill.loop import COMPLAINT, RUN_ID, WORK

    config = Path(params.distill.launch)
    if not config.is_file():
        raise KoalaError(f"distill.launch names {config}, which is not there: choose one of infra/accelerate/")
    settings = yaml.safe_load(config.read_text())
    machines = int(settings.get("num_machines") or 1)
    if machine_rank >= machines:
        raise KoalaError(
            f"{config} has {machines} machines, ranks 0 to {machines - 1}: there is no rank {machine_rank}"
        )
    if machine_rank == 0:
        (work / COMPLAINT).unlink(missing_ok=True)
    # The processes of one machine share its cores; accelerate would do the same, and warn of it.
    threads = max((os.cpu_count() or 1) * machines // int(settings["num_processes"]), 1)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--quiet"]
    command += ["--num_cpu_threads_per_process", str(threads)]
    command += ["--machine_rank", str(machine_rank)] if machines > 1 else []
    process = subprocess.Popen(
        [*command, "-m", "koala.distill.loop", student], env={**os.environ, WORK: str(work), RUN_ID: run_id}
    )

    def trainers() -> list[psutil.Process]:
        return [other for other in psutil.process_iter() if _environment(other).get(WORK) == str(work)]

    def stop(*_: object) -> None:
        # accelerate's launcher does not pass the signal on, and may be gone before the processes that it started.
        for trainer in trainers():
            with contextlib.suppress(psutil.NoSuchProcess):
                trainer.terminate()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        process.wait()
        psutil.wait_procs(trainers(), timeout=_SECONDS_TO_SAVE)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if (work / COMPLAINT).is_file():
        raise KoalaError((work / COMPLAINT).read_text())
    if not (work / "unet").is_dir():
        # A signal's negative number as a shell gives it.
        sys.exit(128 - process.returncode if process.returncode < 0 else process.returncode or 1)


def _tell_of_others(work: Path, params: "Params") -> None:
    """Unfinished training of this student under another configuration is not gone on with: say so, and how it differs."""
    from koala.distill.checkpoint import checkpoints, difference, read_state

    for folder in sorted(work.parent.iterdir()):
        saved = checkpoints(folder)
        if folder != work and saved:
            state = read_state(saved[-1])
            differs = difference(state["learnt"], params.distill.learnt())
            say(
                f"distill: {folder} holds step {state['step']} of a run with "
                f"{'other ' + differs if differs else 'other inputs (teacher, data or student)'}: it is not gone on with; "
                "restore that to do so, or remove the folder"
            )


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
