"""The flow `distill`: a task for each stage of DVC's graph that a student needs.

    python -m flows.distill koala-700m koala-1b           # here and now, without a server: what `make demo` runs
    prefect deployment run distill/koala-700m --watch     # on the worker that `make serve` starts

The stages run one after another, in one worktree: each may take all of the machine, and DVC locks what it writes. A task
keeps no cache and no result, since DVC is the cache: a stage that is up to date costs about a second.
"""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from prefect import Flow, flow, get_run_logger, settings, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.runtime import flow_run as current
from prefect.states import Completed, Failed
from prefect.tasks import Task

from flows.report import make_artifacts, print_report
from flows.repro import clean_up, reproduce
from flows.stages import PipelineError, Stage, pipeline, profile
from koala import tracking

RETRY_DELAYS = [10.0, 60.0]


class StageFailed(Exception):
    """A stage failed. Its text is one line: the stage, and what it said last."""


def after_the_end(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """The hook for a run that was cancelled or that died; the worker runs it, since the run's own process is gone."""
    clean_up(str(flow_run.id))


@flow(name="distill", on_cancellation=[after_the_end], on_crashed=[after_the_end], persist_result=False)
def distill(student: str) -> State[Any]:
    """Bring a student's release up to date with the code, the parameters and the data."""
    flow_run = str(current.get_id())
    try:
        stages = pipeline(f"publish@{student}")
        with tracking.flow_run(f"koala-{profile()}", f"distill {student}", flow_run) as run:
            _run_all(stages, flow_run, run.id)
            make_artifacts(student, stages, run)
    except (PipelineError, StageFailed) as error:
        return Failed(message=str(error))  # one line, where an exception would bring a traceback
    return Completed(message=f"{student} is up to date")


def _run_all(stages: list[Stage], flow_run: str, parent_run: str) -> None:
    done: dict[str, State[Any]] = {}
    for stage in stages:
        upstream = [done[name] for name in stage.upstream]
        state = stage_task(stage)(stage.name, flow_run, parent_run, wait_for=upstream, return_state=True)
        if not state.is_completed():
            raise StageFailed(f"{stage.name}: {state.message}")
        done[stage.name] = state


def worth_another_try(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Not after a signal, which someone sent, nor after an error that the user must mend."""
    return state.name == "Failed"


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=worth_another_try)
def run_stage(stage: str, flow_run: str, parent_run: str) -> State[Any]:
    """Run one stage by DVC, its output in the run's log."""
    outcome = reproduce(stage, flow_run, parent_run, show=get_run_logger().info)
    if outcome.status == 0:
        return Completed()
    name = "Stopped" if outcome.stopped else "Refused" if outcome.mendable else "Failed"
    return Failed(name=name, message=outcome.complaint)


def stage_task(stage: Stage) -> Task[..., Any]:
    """The task of a stage: named after it, tried again as often as dvc.yaml says."""
    return run_stage.with_options(
        name=stage.name, task_run_name=stage.name, retries=stage.retries, retry_delay_seconds=RETRY_DELAYS
    )


# From here on: the flow run by hand.


def main() -> int:
    """Run the flow for each student, one after another, and say what came out. Exit status 2: something must be mended."""
    parser = argparse.ArgumentParser(prog="python -m flows.distill", description=distill.description)
    parser.add_argument("students", nargs="+", metavar="STUDENT", help="a student of params.yaml, such as koala-700m")
    parser.add_argument("--profile", help="refuse to run unless params.yaml names this profile")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leave by the way that cleans up
    try:
        pipelines = {student: pipeline(f"publish@{student}") for student in arguments.students}
        if arguments.profile not in (None, profile()):
            return _complain(
                f"params.yaml says `profile: {profile()}`: this wants `profile: {arguments.profile}` there"
            )
        with _server():
            for student in pipelines:
                state = distill(student, return_state=True)
                if not state.is_completed():
                    return _complain(f"{state.message}")
    except PipelineError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain("stopped: the same command goes on from where it was")
    logging.getLogger("prefect").setLevel(logging.WARNING)  # that the temporary server stops need not be the last word
    for student, stages in pipelines.items():
        print_report(student, stages)
    print("See all runs: make serve, then http://127.0.0.1:4200 (Prefect) and http://127.0.0.1:5000 (MLflow)")
    return 0


def _complain(line: str) -> int:
    print(f"distill: {line}", file=sys.stderr)
    return 2


@contextmanager
def _server() -> Iterator[None]:
    """The Prefect server that keeps the runs: one that is up already, or a temporary one over the same database."""
    if "PREFECT_API_URL" in os.environ or _is_served(settings.get_current_settings()):
        yield
    else:
        temporary = {settings.PREFECT_API_URL: None, settings.PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True}
        with settings.temporary_settings(temporary):
            yield


def _is_served(ours: settings.Settings) -> bool:
    """Whether `make serve` of this very checkout is up: SQLite serves one server, so a second would get in its way."""
    try:
        with urlopen(f"{ours.api.url}/admin/settings", timeout=2) as answer:
            return Path(json.load(answer)["home"]) == ours.home.resolve()
    except (URLError, ValueError, KeyError, TimeoutError):
        return False


if __name__ == "__main__":
    sys.exit(main())
