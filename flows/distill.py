"""The flow `distill`: a task for each stage of DVC's graph that a student needs.

    python -m flows.distill koala-700m koala-1b           # here and now, without a server: what `make demo` runs
    prefect deployment run distill/koala-700m --watch     # on the worker that `make serve` starts

The stages run one after another, in one worktree: each may take all of the machine, and DVC locks what it writes. A task
keeps no cache and no result, since DVC is the cache: a stage that is up to date costs about a second.

With `pools`, each stage runs on a machine of the pool that dvc.yaml names for it (flows/pools.py).
"""

import argparse
import atexit
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from prefect import flow, get_run_logger, settings, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run as current
from prefect.states import Completed, Failed
from prefect.tasks import Task
from prefect.utilities.urls import url_for

from flows.branches import BranchError, fast_forward
from flows.lost import close_lost_runs, close_runs_of_ended_flows, label
from flows.pools import bring_back, run_in_pool
from flows.pools import commit as clean_commit
from flows.promote import propose
from flows.report import make_artifacts, show_report
from flows.repro import reproduce
from flows.services import HOME, Service, ServiceError, free_port, prefect_server
from flows.stage import after_the_end, state_of
from flows.stages import LAST_STAGE, LOCK, PipelineError, Stage, machine, pipeline, profile, students
from flows.why import why
from koala import tracking
from koala.console import say
from koala.provenance import git_commit

RETRY_DELAYS = [10.0, 60.0]
_UI = "http://127.0.0.1:4200"  # of `make serve`


class StageError(Exception):
    """A stage failed. Its text is one line: the stage, and the last line of its output."""


def run_name() -> str:
    """Name the current flow run after its student, the commit and its cause: `distill koala-700m 1a2b3c4: schedule`."""
    parameters = current.get_parameters()
    return _name(parameters["student"], parameters.get("commit"), why(parameters["because"]))


def _name(student: str, commit: str | None, because: str) -> str:
    found, _, dirty = (commit or git_commit() or "").partition("-")
    what = " ".join(filter(None, ["distill", student, found[:7] + (f"-{dirty}" if dirty else "")]))
    return f"{what}: {because}"


@flow(
    name="distill",
    flow_run_name=run_name,
    on_cancellation=[after_the_end],
    on_crashed=[after_the_end],
    persist_result=False,
)
def distill(student: str, pools: bool = False, commit: str | None = None, because: str = "") -> State[Any]:
    """Bring a student's release up to date with the code, the parameters and the data.

    pools: run each stage on a machine of its pool, not in this checkout.
    commit: what to run, as `watch` asks; left out: what this checkout holds. Without pools, the checkout goes forward to it.
    because: what started this, in words; left out: what Prefect knows of it. It decides nothing.
    """
    flow_run = str(current.get_id())
    label(flow_run)
    close_runs_of_ended_flows()
    because = why(because)
    try:
        if commit and not pools:
            fast_forward(commit)
        at = (commit or clean_commit()) if pools else None
        stages = pipeline(f"{LAST_STAGE}@{student}")
        params = {
            "student": student,
            "profile": profile(),
            "machine": machine(),
            "commit": at or git_commit() or "unknown",
        }
        name = _name(student, commit, because)
        page = url_for("flow-run", flow_run)
        tags = {"because": because, tracking.DESCRIPTION: f"[{name}]({page})" if page else ""}
        with tracking.flow_run(f"koala-{profile()}", name, flow_run, params, tags) as run:
            if pools and LOCK.is_file():  # from it, a stage knows what it made in the last flow
                run.artifact(LOCK)
            _run_all(stages, flow_run, run.id, at)
            if pools:
                bring_back(f"evaluate@{student}", flow_run, run.id, show=get_run_logger().info)
            make_artifacts(student, stages, run)
        if asked := propose(student, f"koala-{profile()}", run.id):
            get_run_logger().info(f"{student} is a candidate: the run `{asked}` waits for an answer")
    except (PipelineError, StageError, BranchError) as error:
        return Failed(message=str(error))  # one line, where an exception would bring a traceback
    return Completed(message=f"{student} is up to date")


def _run_all(stages: list[Stage], flow_run: str, parent_run: str, at: str | None) -> None:
    """Run the stages: here, or in their pools at commit `at`. Raises StageError."""
    done: dict[str, State[Any]] = {}
    for stage in stages:
        upstream = [done[name] for name in stage.upstream]
        where = (stage.pool, at) if at else None
        state = stage_task(stage)(stage.name, flow_run, parent_run, where, wait_for=upstream, return_state=True)
        if not state.is_completed():
            raise StageError(f"{stage.name}: {state.message}")
        done[stage.name] = state


def worth_a_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Return False after a signal, which someone sent, and after an error that the user must fix."""
    return state.name == "Failed"


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=worth_a_retry)
def run_stage(stage: str, flow_run: str, parent_run: str, where: tuple[str, str] | None = None) -> State[Any]:
    """Run one stage by DVC, its output in the run's log. where: the pool and the commit, if not in this checkout."""
    if where is None:
        return state_of(reproduce(stage, flow_run, parent_run, show=get_run_logger().info))
    pool, at = where
    ended = run_in_pool(stage, pool, parent_run, at, show=get_run_logger().info)
    return Completed() if ended.is_completed() else Failed(name=ended.name, message=ended.message)


def stage_task(stage: Stage) -> Task[..., Any]:
    """Return a stage's task: named after it, retried as often as dvc.yaml says."""
    return run_stage.with_options(
        name=stage.name, task_run_name=stage.name, retries=stage.retries, retry_delay_seconds=RETRY_DELAYS
    )


# From here on: the flow run by hand.


def main() -> int:
    """Run the flow for each student, one after another, and show the results. Exit status 2: the user must fix something."""
    parser = argparse.ArgumentParser(prog="python -m flows.distill", description=distill.description)
    parser.add_argument("students", nargs="*", metavar="STUDENT", help="a student of params.yaml; left out: all")
    parser.add_argument("--profile", help="refuse to run unless params.yaml names this profile")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # leave by the way that cleans up
    try:
        pipelines = {student: pipeline(f"{LAST_STAGE}@{student}") for student in arguments.students or students()}
        if arguments.profile not in (None, profile()):
            return _refuse(f"params.yaml says `profile: {profile()}`: this wants `profile: {arguments.profile}` there")
        with _server():
            close_lost_runs(distill.name)
            for student in pipelines:
                state = distill(student, return_state=True)
                if not state.is_completed():
                    return _refuse(f"{state.message}")
    except (PipelineError, ServiceError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return _refuse("stopped: run the same command again to resume")
    for student, stages in pipelines.items():
        show_report(student, stages)
    runs = tracking.experiment_page(f"koala-{profile()}")
    say(f"See all runs: make serve, then {_UI}/runs (Prefect) and {runs} (MLflow)")
    return 0


def _refuse(line: str) -> int:
    say(f"distill: {line}")
    return 2


@contextmanager
def _server() -> Iterator[None]:
    """Use the Prefect server that is up already, or a temporary one over the same database.

    Prefect would start a temporary server by itself, but one that survives a SIGKILL of this process.
    """
    if "PREFECT_API_URL" in os.environ or _is_served(settings.get_current_settings()):
        yield
        return
    port = free_port()
    say(f"Starting a temporary Prefect server; its log is {HOME}/server.log")
    server = prefect_server(port)
    # Registered before Prefect's own functions, and so called after them: they send the last lines of the logs.
    atexit.register(_end, server)
    server.wait_until(f"http://127.0.0.1:{port}/api/health")
    api = f"http://127.0.0.1:{port}/api"
    # Links lead to where `make serve` shows the same database.
    with settings.temporary_settings({settings.PREFECT_API_URL: api, settings.PREFECT_UI_URL: _UI}):
        yield


def _end(server: Service) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    server.end()


def _is_served(ours: settings.Settings) -> bool:
    """Return whether `make serve` of this checkout is up. SQLite serves one server, so a second would be in its way."""
    try:
        with urlopen(f"{ours.api.url}/admin/settings", timeout=2) as answer:
            return Path(json.load(answer)["home"]) == ours.home.resolve()
    except (URLError, ValueError, KeyError, TimeoutError):
        return False


if __name__ == "__main__":
    sys.exit(main())
