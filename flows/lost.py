"""Flow runs that no process carries any more: a process that was killed by SIGKILL tells Prefect nothing.

Each flow run is labelled with its process. Whoever starts next on the same host closes the runs whose process is gone:
Prefect would show them as running for ever, and one of a deployment would hold its deployment's turn.

A machine that is lost has no such successor. Flow runs send heartbeats (prefect.toml), and with pools an automation of
Prefect's marks a run that is silent as crashed; the next flow closes its runs in MLflow.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows.repro import clean_up
from koala import tracking

_UNFINISHED = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
# A run labels itself in its first second.
_LABELLED_AFTER = timedelta(minutes=1)

SILENT = timedelta(seconds=90)
"""Silence after which a flow run counts as lost: three heartbeats."""
# Of a run in one of these no heartbeats come, and its machine is not lost: ends, ours (flows.stage.state_of) too, and waiting.
_SILENT_STATES = ("Completed", "Failed", "Stopped", "Refused", "Cancelled", "Crashed", "Suspended", "Paused")
_AUTOMATION = "koala: a flow run whose machine is silent has crashed"


def label(flow_run: str) -> None:
    """Say in Prefect that this process carries the flow run."""
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(UUID(flow_run), {**tracking.this_process()})


def expect_heartbeats(flows: Sequence[str]) -> None:
    """Have Prefect mark a run of these flows as crashed that sent heartbeats and then nothing for `SILENT`."""
    trigger = EventTrigger(
        posture=Posture.Proactive,
        after={"prefect.flow-run.heartbeat"},
        expect={f"prefect.flow-run.{name}" for name in ("heartbeat", *_SILENT_STATES)},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "flow", "prefect.resource.name": list(flows)},
        for_each={"prefect.resource.id"},
        threshold=1,
        within=SILENT,
    )
    lost = ChangeFlowRunState(
        name="Crashed",
        state=StateType.CRASHED,
        message=f"no heartbeat for {SILENT.seconds} s, so its machine was lost",
        force=False,
    )
    automation = AutomationCore(name=_AUTOMATION, trigger=trigger, actions=[lost])
    with get_client(sync_client=True) as client:
        for old in client.read_automations_by_name(_AUTOMATION):
            client.delete_automation(old.id)
        client.create_automation(automation)


def close_lost_runs(flow: str, no_worker: bool = False) -> None:
    """Close the flow's unfinished runs of this host whose process is gone, in Prefect and in MLflow.

    no_worker: no worker serves the deployments now, so that all their runs are lost.
    """
    named = FlowFilter(name=FlowFilterName(any_=[flow]))
    unfinished = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED)))
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_filter=named, flow_run_filter=unfinished):
            if _is_lost(run, no_worker):
                clean_up(str(run.id))
                _close(client, run.id)
    tracking.close_lost_runs()


def close_runs_of_ended_flows() -> None:
    """Close in MLflow what a flow run that has ended in Prefect left running: the machine that carried it may never come back."""
    with get_client(sync_client=True) as client:
        for flow_run in tracking.running_flow_runs():
            try:
                state = client.read_flow_run(UUID(flow_run)).state
            except (ObjectNotFound, ValueError):  # of another server, or of none, over the same store
                continue
            if state and state.is_final():
                tracking.close_runs(flow_run)


def _is_lost(run: FlowRun, no_worker: bool) -> bool:
    if run.deployment_id and no_worker:
        return True
    if "process.host" in run.labels:
        return tracking.is_gone(run.labels)
    # A worker has not started it yet, or a run by hand was killed in its first second.
    return not run.deployment_id and run.created is not None and datetime.now(UTC) - run.created > _LABELLED_AFTER


def _close(client: SyncPrefectClient, flow_run: UUID) -> None:
    lost: State[Any] = Crashed(message="The process that ran this was killed.")
    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run])),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=_UNFINISHED))),
    )
    for task in tasks:
        client.set_task_run_state(task.id, lost, force=True)
    client.set_flow_run_state(flow_run, lost, force=True)
