"""The flow `stage`: one stage, on a machine of a pool, in a clone of its own at the commit of the flow that started it.

Its deployments `stage/cpu`, `stage/gpu`, ... are generic: a stage's pool stands in dvc.yaml. They make the clone
(infra/prefect.yaml). Data comes from and goes to DVC's remote; dvc.lock travels as a file of the parent's MLflow run.
"""

from pathlib import Path
from typing import Any

from prefect import Flow, flow, get_run_logger
from prefect.client.schemas.objects import FlowRun, State
from prefect.concurrency.sync import concurrency
from prefect.runtime import flow_run as current
from prefect.states import Completed, Failed

from flows.lost import label
from flows.repro import Outcome, clean_up, reproduce_in_clone
from flows.stages import LOCK
from koala import tracking

LEASE_SECONDS = 120.0
"""How long a stage's turn is lent. Prefect renews it while the stage runs."""


def limit(stage: str) -> str:
    """Name the concurrency limit that lets one flow at a time run a stage: a second one restores what the first made."""
    return f"stage-{stage}"


def after_the_end(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Clean up after a run that was cancelled or that died. The worker calls it, since the run's own process is gone."""
    clean_up(str(flow_run.id))


def state_of(outcome: Outcome) -> State[Any]:
    """Return how a stage ended as a state of Prefect: Completed, or Failed as Stopped, Refused or Failed."""
    if outcome.status == 0:
        return Completed()
    name = "Stopped" if outcome.stopped else "Refused" if outcome.fixable else "Failed"
    return Failed(name=name, message=outcome.complaint)


@flow(
    name="stage",
    flow_run_name="{stage}",
    on_cancellation=[after_the_end],
    on_crashed=[after_the_end],
    persist_result=False,
)
def stage(stage: str, parent_run: str) -> State[Any]:
    """Run or restore one stage in this clone; push what it made, and log dvc.lock to the parent's MLflow run."""
    flow_run = str(current.get_id())
    label(flow_run)
    # A machine that is lost holds its turn for as long as its lease. A server that is down for longer costs a turn, not the work.
    with concurrency(limit(stage), strict=True, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False):
        tracking.fetch(parent_run, LOCK.name, Path())
        outcome = reproduce_in_clone(stage, flow_run, parent_run, show=get_run_logger().info)
        if outcome.status == 0:
            tracking.StageRun(parent_run).artifact(LOCK)
    return state_of(outcome)
