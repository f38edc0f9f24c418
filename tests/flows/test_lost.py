"""Flow runs whose process is gone, on a real Prefect server."""

import os
import subprocess
import time
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from mlflow import MlflowClient
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.states import Crashed, Running

from flows import lost
from koala import tracking


@pytest.fixture(autouse=True)
def _store(mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)


@pytest.fixture
def name() -> str:
    """A flow that no other test closes the runs of."""
    return f"flow-{uuid4()}"


def running(client: SyncPrefectClient, name: str) -> FlowRun:
    return client.create_flow_run(flow(name=name)(lambda: None), state=Running())


def ends(client: SyncPrefectClient, *runs: FlowRun) -> list[str]:
    return [str(client.read_flow_run(run.id).state_type).partition(".")[2] for run in runs]


def status(run: str) -> str:
    return str(MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_run(run).info.status)


def label(client: SyncPrefectClient, run: FlowRun, pid: int) -> None:
    client.update_flow_run_labels(run.id, {**tracking.this_process(), "process.pid": str(pid)})


def test_a_run_whose_process_is_gone_is_closed_in_prefect_and_mlflow(client: SyncPrefectClient, name: str) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    gone, alive, elsewhere = (running(client, name) for _ in range(3))
    label(client, gone, process.pid)
    lost.label(str(alive.id))
    client.update_flow_run_labels(elsewhere.id, {**tracking.this_process(), "process.host": "another"})
    with tracking.flow_run("koala-demo", name, str(gone.id)) as run:
        lost.close_lost_runs(name)
        assert ends(client, gone, alive, elsewhere) == ["CRASHED", "RUNNING", "RUNNING"]
        assert status(run.id) == "KILLED"


def test_what_a_machine_left_that_never_came_back_is_closed_in_mlflow(client: SyncPrefectClient, name: str) -> None:
    crashed, alive = (running(client, name) for _ in range(2))
    of = {"process.host": "a-machine-that-was-lost"}
    client.set_flow_run_state(crashed.id, Crashed(), force=True)
    with (
        tracking.flow_run("koala-demo", name, str(crashed.id), tags=of) as its,
        tracking.flow_run("koala-demo", name, str(alive.id), tags=of) as other,
        tracking.flow_run("koala-demo", name, str(uuid4()), tags=of) as of_another_server,
    ):
        lost.close_runs_of_ended_flows()
        assert [status(run.id) for run in (its, other, of_another_server)] == ["KILLED", "RUNNING", "RUNNING"]


def test_a_run_that_has_just_begun_has_no_label_yet(
    client: SyncPrefectClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = running(client, name)
    lost.close_lost_runs(name)
    assert ends(client, run) == ["RUNNING"]
    monkeypatch.setattr(lost, "_LABELLED_AFTER", lost.timedelta(0))
    lost.close_lost_runs(name)
    assert ends(client, run) == ["CRASHED"]


def test_without_a_worker_all_runs_of_deployments_are_lost(client: SyncPrefectClient, name: str) -> None:
    flow_id = client.create_flow_from_name(name)
    deployment = client.create_deployment(flow_id=flow_id, name="one")
    run = client.create_flow_run_from_deployment(deployment, state=Running())
    by_hand = running(client, name)
    lost.label(str(run.id))
    lost.close_lost_runs(name)
    assert ends(client, run, by_hand) == ["RUNNING", "RUNNING"]
    lost.close_lost_runs(name, no_worker=True)
    assert ends(client, run, by_hand) == ["CRASHED", "RUNNING"]


def beat(client: SyncPrefectClient, run: FlowRun, flow_name: str) -> None:
    """Send what a flow run sends every 30 s."""
    of_flow = {"prefect.resource.id": f"prefect.flow.{run.flow_id}", "prefect.resource.role": "flow"}
    event = {
        "event": "prefect.flow-run.heartbeat",
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name},
        "related": [{**of_flow, "prefect.resource.name": flow_name}],
    }
    client._client.post("/events", json=[event]).raise_for_status()


def test_a_run_that_falls_silent_crashes_and_no_other(
    client: SyncPrefectClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost, "SILENT", lost.timedelta(seconds=10))  # the least that Prefect takes
    for _ in range(2):  # a second call takes the place of the first
        lost.expect_heartbeats([name])
    (automation,) = client.read_automations_by_name(lost._AUTOMATION)
    # A server on SQLite can lose an event of a burst to a locked database: what is expected once is read, not played.
    waits = {"prefect.flow-run.Suspended", "prefect.flow-run.Paused", "prefect.flow-run.Refused"}
    assert waits <= automation.trigger.expect
    try:
        silent, alive = (running(client, name) for _ in range(2))
        others = running(client, f"another-{name}")
        deadline = time.monotonic() + 60
        for _ in range(3):  # Prefect's services read automations again every few seconds
            beat(client, silent, name)
            beat(client, others, f"another-{name}")
            time.sleep(2)
        while ends(client, silent) != ["CRASHED"]:
            assert time.monotonic() < deadline
            beat(client, alive, name)
            time.sleep(2)
        time.sleep(3)
        assert ends(client, alive, others) == ["RUNNING", "RUNNING"]
        assert "its machine was lost" in str(client.read_flow_run(silent.id).state.message)
    finally:
        for each in client.read_automations_by_name(lost._AUTOMATION):
            client.delete_automation(each.id)
