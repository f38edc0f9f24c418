"""Why a flow run was started, as a real Prefect server keeps it."""

from base64 import b64encode
from collections.abc import Callable, Iterator
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import IntervalSchedule

from flows.why import why
from koala.console import harmless


@flow
def asks(because: str = "") -> str:
    return why(because)


@pytest.fixture
def deployment(client: SyncPrefectClient) -> Iterator[UUID]:
    daily = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=86400), active=True)
    made = client.create_deployment(client.create_flow(asks), name=str(uuid4()), schedules=[daily])
    yield made
    client.delete_deployment(made)  # and its runs


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Have this process take a flow run for its own, as the one that a worker starts does."""
    return lambda run: monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(run))


def test_what_a_starter_says_comes_first_and_on_one_line() -> None:
    assert why("a \x1b[31mtry\n") == harmless("a \x1b[31mtry\n")
    assert why("x" * 500) == "x" * 100


def test_a_run_that_nothing_else_started_is_by_hand(client: SyncPrefectClient) -> None:
    assert asks() == "by hand"


def test_a_schedule_starts_runs_and_is_known(
    client: SyncPrefectClient, deployment: UUID, within: Callable[[object], None]
) -> None:
    """Prefect's scheduler failed with the next SQLAlchemy: requirements.lock."""
    window = {"start_time": "2030-01-01T00:00:00Z", "end_time": "2030-01-03T00:00:00Z"}
    client._client.post(f"/deployments/{deployment}/schedule", json=window).raise_for_status()
    runs = [run for run in client.read_flow_runs(limit=200) if run.deployment_id == deployment]
    assert runs
    within(runs[0].id)
    assert why("") == "schedule"


def test_an_automation_is_known_by_its_name(
    client: SyncPrefectClient, deployment: UUID, within: Callable[[object], None]
) -> None:
    who = {"Prefect-Automation-ID": str(uuid4()), "Prefect-Automation-Name": b64encode(b"koala: data changed").decode()}
    made = client._client.post(f"/deployments/{deployment}/create_flow_run", json={}, headers=who)
    within(made.raise_for_status().json()["id"])
    assert why("") == "event: koala: data changed"
