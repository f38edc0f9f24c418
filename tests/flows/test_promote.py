"""Promotion on a real Prefect server, of versions at a real target."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from PIL import Image
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
)
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound, Pause
from prefect.flow_engine import run_flow

from flows.promote import answer, promote, propose
from koala import tracking
from koala.evaluate.prompts import Prompt
from koala.evaluate.values import Values
from koala.publish.targets.folder import FolderTarget


@pytest.fixture
def target(workspace: Path) -> FolderTarget:
    """Two versions of koala-700m, the second of which keeps less of its teacher, and a rule that only the first meets."""
    params = workspace / "params.yaml"
    document = yaml.safe_load(params.read_text())
    rules = [{"metric": "unet_parameters", "at_most": 15}]
    document["profiles"]["smoke"]["publish"] |= {
        "targets": {"folder": {"path": str(workspace / "shelf")}},
        "require": rules,
        "promote": "ask",
    }
    params.write_text(yaml.safe_dump(document))
    target = FolderTarget(path=workspace / "shelf")
    release = workspace / "release"
    release.mkdir()
    for size in (10, 20):
        (release / "metrics.json").write_text(json.dumps({"after": {"unet_parameters": size}, "pinned": {}}))
        prompts = [Prompt("a fox", 0), Prompt("a hen", 1)]
        Values(prompts, {"after": {"psnr": [1.0, size]}}).write(release / "values.parquet")
        (release / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (size, 0, 0)).save(release / "samples/000001.png")
        target.send(release, "koala-700m")
    return target


@pytest.fixture
def run(client: SyncPrefectClient, target: FolderTarget) -> Callable[[UUID], State[Any]]:
    """Do in this process what a worker does with a run of the deployment: until it waits, or ends."""

    def until_it_waits(flow_run: UUID) -> State[Any]:
        with suppress(Pause):
            run_flow(promote, flow_run=client.read_flow_run(flow_run), return_type="state")
        state = client.read_flow_run(flow_run).state
        assert state
        return state

    return until_it_waits


@pytest.fixture
def begin(client: SyncPrefectClient, target: FolderTarget) -> Callable[[str], UUID]:
    def create(version: str) -> UUID:
        deployment = client.create_deployment(
            client.create_flow(promote), name="version", enforce_parameter_schema=False
        )
        parameters = {"student": "koala-700m", "version": version}
        return client.create_flow_run_from_deployment(deployment, parameters=parameters).id

    return create


def latest(target: FolderTarget) -> str | None:
    return target.shelf("koala-700m").latest()


def test_a_rollback_waits_for_a_persons_yes(
    begin: Callable[[str], UUID], run: Callable[[UUID], State[Any]], client: SyncPrefectClient, target: FolderTarget
) -> None:
    waiting = begin("v1")
    assert run(waiting).name == "Suspended"  # and this process is free
    assert latest(target) == "v2"
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[waiting]))
    tables = {each.key: str(each.data) for each in client.read_artifacts(artifact_filter=wanted)}
    assert "| unet_parameters at most 15 | " in tables["koala-700m-promotion"]
    assert "| unet_parameters | 20 | 10 |" in tables["koala-700m-promotion"]
    assert "path=beside.png" in tables["koala-700m-promotion-grid"]

    assert answer("koala-1b", yes=True, by="ada", because="") == []
    assert answer("koala-700m", yes=True, by="ada", because="smaller") == ["promote koala-700m v1"]
    state = run(waiting)
    assert (state.type, state.message) == ("COMPLETED", "koala-700m is v1, was v2: by ada: smaller")
    assert latest(target) == "v1"


def test_a_no_changes_nothing(
    begin: Callable[[str], UUID], run: Callable[[UUID], State[Any]], target: FolderTarget
) -> None:
    waiting = begin("v1")
    run(waiting)
    answer("koala-700m", yes=False, by="ada", because="")
    assert run(waiting).name == "Declined"
    assert latest(target) == "v2"


def test_automatic_only_where_every_rule_is_met(target: FolderTarget, client: SyncPrefectClient) -> None:
    params = Path("params.yaml")
    document = yaml.safe_load(params.read_text())
    document["profiles"]["smoke"]["publish"]["promote"] = "automatic"
    params.write_text(yaml.safe_dump(document))
    state = promote("koala-700m", "v1", return_state=True)
    assert state.message == "koala-700m is v1, was v2: by the rules"
    state = promote("koala-700m", "v2", return_state=True)  # by hand nobody can be asked
    assert not state.is_completed()
    assert latest(target) == "v1"


def test_an_unknown_version_is_one_line(target: FolderTarget, client: SyncPrefectClient) -> None:
    state = promote("koala-700m", "v9", return_state=True)
    assert state.is_failed()
    assert "has no version 'v9': choose one of v1, v2" in str(state.message)


@pytest.mark.usefixtures("forked")
def test_a_command_says_yes_for_one_version(
    begin: Callable[[str], UUID], run: Callable[[UUID], State[Any]], client: SyncPrefectClient, target: FolderTarget
) -> None:
    waiting = begin("v1")
    run(waiting)
    root = str(Path(__file__).parents[2])  # a checkout's folder holds flows/
    environment = {**os.environ, "PREFECT_API_URL": str(client.api_url), "PYTHONPATH": root}

    def approve(version: str) -> tuple[int, str]:
        command = [Path(sys.executable).with_name("koala"), "release", "approve", "koala-700m", version]
        command += ["--because", "smaller", "--by", "ada"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr.strip()

    no = "koala: no promotion of koala-700m v2 waits: prefect deployment run promote/version starts one"
    assert approve("v2") == (2, no)
    assert approve("v1") == (0, "promote: answered: promote koala-700m v1")
    state = run(waiting)
    assert (state.type, state.message) == ("COMPLETED", "koala-700m is v1, was v2: by ada: smaller")
    assert latest(target) == "v1"


@pytest.mark.parametrize("rule", ["ask", "automatic"])
def test_a_candidate_is_asked_for_once(target: FolderTarget, client: SyncPrefectClient, rule: str) -> None:
    with suppress(ObjectNotFound):  # of another test
        client.delete_deployment(client.read_deployment_by_name("promote/version").id)
    student = f"koala-{rule}"
    receipt = Path("receipt.json")
    receipt.write_text(json.dumps({"promote": rule, "targets": [{"kind": "folder", "version": "v2"}]}))
    with tracking.flow_run("koala-smoke", f"distill {student}", "a flow run") as parent:
        tags = {"mlflow.parentRunId": parent.id, "stage": "publish", "student": student}
        with tracking.stage_run("koala-smoke", f"publish@{student}", {}, tags, Path()) as published:
            published.artifact(receipt)

    assert propose(student, "koala-smoke", parent.id) is None  # not deployed
    flow = client.create_flow(promote)
    deployment = client.create_deployment(flow, name="version", enforce_parameter_schema=False)
    asked = [propose(student, "koala-smoke", parent.id) for _ in range(2)]
    mine = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
    runs = [run for run in client.read_flow_runs(flow_run_filter=mine) if run.parameters["student"] == student]
    client.delete_deployment(deployment)
    assert asked == ([runs[0].name] * 2 if rule == "ask" else [None, None])
    assert [run.parameters for run in runs] == [{"student": student, "version": "v2"}] * (rule == "ask")
