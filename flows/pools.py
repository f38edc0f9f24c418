"""The parent's side of pools: stages started on other machines, and what they made brought back.

python -m flows.deployments --pools      # the flows start each stage in its pool
python -m flows.join --pool gpu          # on each machine
"""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.states import Cancelling

from flows.repro import pull
from flows.stages import LOCK, PipelineError
from koala import tracking
from koala.provenance import git_commit

POLL_SECONDS = 2.0
MACHINES = 3
"""Machines that a stage may be lost with: one that takes its machine down would take all."""
LOST_SECONDS = 10.0
"""Pause before a lost stage starts again: what a machine needs may be away for a moment."""


def commit() -> str:
    """Return the commit that the machines check out. Raises PipelineError where this checkout holds more than a commit."""
    found = git_commit() or ""
    if not found or found.endswith("-dirty"):
        raise PipelineError(
            "machines of the pools clone a commit, and this checkout differs from its own: commit, and push"
        )
    if not subprocess.run(["git", "ls-files", "--error-unmatch", LOCK], capture_output=True).returncode:
        raise PipelineError(f"{LOCK} is in git; with pools it travels in MLflow: `git rm --cached {LOCK}`")
    return found


def run_in_pool(stage: str, pool: str, parent_run: str, at: str, show: Callable[[str], None]) -> State[Any]:
    """Run a stage on a machine of `pool`, at commit `at`, and return how it ended. Whatever interrupts this cancels it.

    A stage whose machine was lost starts again, on whichever machine of the pool is free, and resumes from what the lost one
    left where others see it. Prefect itself does not retry a run that crashed.
    """
    for left in reversed(range(MACHINES)):
        run, state = _run_once(stage, pool, parent_run, at)
        if not state.is_crashed():
            break
        tracking.close_runs(str(run))  # the lost machine cannot
        if left:
            show(f"{stage}: lost in run {run} ({state.message}): it starts again on a machine of pool {pool}")
            time.sleep(LOST_SECONDS)
    return state


def _run_once(stage: str, pool: str, parent_run: str, at: str) -> tuple[UUID, State[Any]]:
    """Start a stage by its pool's deployment, and wait for its end. Return the flow run and how it ended."""
    run = run_deployment(
        f"stage/{pool}",
        parameters={"stage": stage, "parent_run": parent_run},
        job_variables={"env": {"KOALA_COMMIT": at}},
        timeout=0,
    )
    assert isinstance(run, FlowRun)  # not a coroutine: this is no async function
    try:
        return run.id, _wait(run.id)
    except BaseException:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Cancelling())
        raise


def _wait(flow_run: UUID) -> State[Any]:
    with get_client(sync_client=True) as client:
        while True:
            state = client.read_flow_run(flow_run).state
            if state and state.is_final():
                return state
            time.sleep(POLL_SECONDS)


def bring_back(stage: str, flow_run: str, parent_run: str, show: Callable[[str], None]) -> None:
    """Fetch what `stage` made into this checkout, whose dvc.lock then names what the flow made. Raises PipelineError."""
    here: dict[str, Any] = yaml.safe_load(LOCK.read_text()) if LOCK.is_file() else {}
    if not tracking.fetch(parent_run, LOCK.name, Path()):
        raise PipelineError(f"the MLflow run {parent_run} holds no {LOCK}: run the flow again")
    made: dict[str, Any] = yaml.safe_load(LOCK.read_text())
    made["stages"] = {**here.get("stages", {}), **made["stages"]}  # of other students' flows
    LOCK.write_text(yaml.safe_dump(made, sort_keys=False))
    outcome = pull(stage, flow_run, show)
    if outcome.status:
        raise PipelineError(f"{stage} was computed, but cannot be fetched: {outcome.complaint}")
