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
        config=params.distill.model_dump(mode="json"),
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
        _launch(params, run, student, work)

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


def _launch(params: "Params", run: "StageRun", student: str, work: Path) -> None:
    """Run the training processes to their end, and pass SIGTERM and Ctrl-C on to them."""
    from koala.distill.loop import COMPLAINT, RUN_ID, WORK

    config = Path(params.distill.launch)
    if not config.is_file():
        raise KoalaError(f"distill.launch names {config}, which is not there: choose one of infra/accelerate/")
    (work / COMPLAINT).unlink(missing_ok=True)
    # The processes of one machine share its cores; accelerate would do the same, and warn of it.
    threads = max((os.cpu_count() or 1) // int(yaml.safe_load(config.read_text())["num_processes"]), 1)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--quiet"]
    command += ["--num_cpu_threads_per_process", str(threads), "-m", "koala.distill.loop", student]
    process = subprocess.Popen(command, env={**os.environ, WORK: str(work), RUN_ID: run.id})

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


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
